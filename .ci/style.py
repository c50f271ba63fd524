"""How far the notebooks are from what we aim at, in numbers.

    python .ci/style.py               # a table with a row for each notebook; '!' marks a missed aim
    python .ci/style.py NOTEBOOK...   # of these alone
    python .ci/style.py --check       # only the hard rules; exit 1 where one is broken

Most aims are a matter of judgement. Three are hard rules, which `.ci/build.py --check` checks too:
no line of code over WIDTH characters, no cell that mixes imports with other code, and no module
over MODULE lines.
"""
import argparse
import ast
import configparser
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from notebook_tests import (BuildError, called, code, directives, exports, is_import, is_tool,
                            notebooks)

WIDTH = 100          # characters of a line of code or output, at most
MEDIAN = 12          # lines of an exported cell: the median, at most
P90 = 25             # and the 90th percentile
TUPLES = 1.5         # assignments to several names in 100 lines of code, at most
CHECKS = 2           # checks for each exported cell, at least
MARKDOWN = 0.8, 1.2  # Markdown cells for each cell of code, at least and at most
MODULE = 300         # lines of a module, at most


# --- reading a cell

def parsed(cell) -> ast.Module:
    "The syntax tree of a cell; an empty one where it is no Python, which the build reports."
    try: return ast.parse(code(cell))
    except (SyntaxError, BuildError): return ast.Module([], [])

def mixes_imports(cell) -> bool:
    "Does a cell hold imports and other code? The cells that only run nbdev are left alone."
    tree = parsed(cell)
    kinds = {is_import(node) for node in tree.body}
    return len(kinds) == 2 and not is_tool(cell)

def long_lines(text:str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > WIDTH]

def is_check(node) -> bool:
    "An assertion, or a call of a function that checks."
    if isinstance(node, ast.Assert): return True
    if not isinstance(node, ast.Call): return False
    name = called(node)
    return name == 'raises' or name.startswith(('test_', 'assert_', 'expect_', 'fails', 'refuse'))

def is_tuple_assignment(node) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(o, ast.Tuple) for o in node.targets)

def printed(cell) -> str:
    "What is printed or shown as text under a cell."
    outputs = cell.get('outputs', [])
    parts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in outputs]
    return '\n'.join(parts)

def lines_of_code(cell) -> int:
    "Lines of a cell that are neither empty nor directives."
    lines = [line.strip() for line in cell.source.splitlines()]
    return sum(bool(line) and not line.startswith('#|') for line in lines)


# --- measuring a notebook

@dataclass
class Measures:
    "What is counted in a notebook; those of several notebooks can be added."
    code: int = 0      # lines
    long: int = 0      # lines over WIDTH, of code and output
    tuples: int = 0    # assignments to several names
    checks: int = 0
    cells: int = 0     # of code
    markdown: int = 0  # cells
    module: int = 0    # lines
    exported: list = field(default_factory=list)  # lines of each exported cell

    def __add__(self, other):
        return Measures(*(getattr(self, o) + getattr(other, o) for o in self.__dataclass_fields__))

def count_cell(found:Measures, cell):
    "Add what a cell of code holds."
    found.cells += 1
    found.code += lines_of_code(cell)
    found.long += len(long_lines(cell.source)) + len(long_lines(printed(cell)))
    tree = parsed(cell)
    found.tuples += sum(map(is_tuple_assignment, ast.walk(tree)))
    found.checks += sum(map(is_check, ast.walk(tree)))
    defines = exports(cell) and not all(map(is_import, tree.body))
    if defines: found.exported.append(lines_of_code(cell))

def measure(path:Path) -> Measures:
    "Count what a notebook and its module hold."
    found = Measures()
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == 'markdown': found.markdown += 1
        if cell.cell_type == 'code': count_cell(found, cell)
    found.module = module_lines(path, nb)
    return found

def project(path:Path) -> tuple[Path, Path, Path]:
    "The project that a notebook is of: its root, its folder of notebooks and its package."
    root = next((o for o in path.resolve().parents if (o/'settings.ini').is_file()), None)
    if root is None: raise BuildError(f'{path}: no settings.ini in any folder above it')
    settings = configparser.ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    return root, root/settings['DEFAULT']['nbs_path'], root/settings['DEFAULT']['lib_path']

def module_lines(path:Path, nb) -> int:
    "Lines of the module that a notebook makes, 0 if it makes none."
    names = [directives(o)['default_exp'] for o in nb.cells
             if o.cell_type == 'code' and 'default_exp' in directives(o)]
    if not names: return 0
    module = project(path)[2]/(names[0].replace('.', '/') + '.py')
    return len(module.read_text(encoding='utf-8').splitlines()) if module.is_file() else 0


# --- the hard rules

def broken_rules(path:Path) -> list[str]:
    "What a notebook breaks of the hard rules, a line for each."
    nb = nbformat.read(path, 4)
    res = []
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        res += [f'a line of {len(line)} characters: {line.strip()[:60]!r}'
                for line in long_lines(cell.source)]
        if mixes_imports(cell):
            res.append(f'imports and other code in one cell: {cell.source[:60]!r}')
    lines = module_lines(path, nb)
    if lines > MODULE: res.append(f'its module has {lines} lines, more than {MODULE}')
    return res

def check_styles(root:Path, paths:list[Path]) -> list[str]:
    "Faults of all notebooks of a project."
    return [f'{path.relative_to(root).as_posix()}: {fault}'
            for path in paths for fault in broken_rules(path)]


# --- the table

COLUMNS = 'code', 'long', 'tuples', 'export', 'median', 'p90', 'checks', 'md/code', 'module'

def ninetieth(sizes:list) -> int: return sorted(sizes)[int(.9*(len(sizes)-1))]

def row(o:Measures) -> list[tuple]:
    "The value of each column, and whether it misses its aim."
    tuples = 100*o.tuples/max(o.code, 1)
    checks = o.checks/max(len(o.exported), 1)
    markdown = o.markdown/max(o.cells, 1)
    median = statistics.median(o.exported) if o.exported else 0
    p90 = ninetieth(o.exported) if o.exported else 0
    return [(o.code, False), (o.long, o.long > 0), (round(tuples, 1), tuples > TUPLES),
            (len(o.exported), False), (median, median > MEDIAN), (p90, p90 > P90),
            (round(checks, 1), bool(o.exported) and checks < CHECKS),
            (round(markdown, 2), not MARKDOWN[0] <= markdown <= MARKDOWN[1]),
            (o.module, o.module > MODULE)]

def write_row(name:str, values:list):
    print(f'{name[-34:]:34}', *(f'{value:>9}' for value in values))

def write_table(paths:list[Path]):
    "Print a row for each notebook, and one for all."
    write_row('', COLUMNS)
    total = Measures()
    for path in paths:
        found = measure(path)
        write_row(str(path), [f'{value}{"!" if missed else " "}' for value,missed in row(found)])
        total += found
    if len(paths) > 1: write_row('all', [f'{value} ' for value,_ in row(total)])

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path, help='all of the project by default')
    p.add_argument('--check', action='store_true', help='check the hard rules alone')
    args = p.parse_args()
    root, nbs, _ = project(Path(__file__))
    every = notebooks(root, nbs.name)
    if not args.check: return write_table(args.notebooks or every)
    if faults := check_styles(root, every): sys.exit('\n'.join(faults))

if __name__ == '__main__':
    try: main()
    except BuildError as e: sys.exit(str(e))
