"""Turn the notebooks into what Quarto or smalldocs renders.

It is what nbdev's `proc_nbs` does, but signatures are plain and fit on a page, a function whose
source follows is not shown twice, names lead to the module that defines them, and imports and long
checks are folded. Two processes share the work, and what it imports.
"""
import ast
import inspect
import multiprocessing
import os
import re
import shutil
import textwrap
import warnings
from pathlib import Path

import nbdev.processors
import nbdev.showdoc
import nbformat
from fastcore.docments import DocmentText, qual_name
from IPython.core.history import HistoryManager
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _get_exps, patch_name
from nbdev.process import Processor
from nbdev.serve_drv import exec_nb

from notebook_tests import checks, code, directives, is_import, notebooks

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 88    # characters of a line of a signature, at most
CHECKED = 6   # lines of a check that stays open outside the lessons, at most
DEEPER = ' '*8
CONFIG = get_config(path=ROOT)
REPOSITORY = f'{CONFIG.git_url}/blob/{CONFIG.branch}'
FENCE = re.compile(r'^```\w*\n(.*?)^```', re.M | re.S)
LINK = re.compile(r'\]\(\S*://')


# --- signatures

def wrap(text:str, comment:str='') -> list[str]:
    "A line of a signature and its comment, on as many lines as WIDTH asks for."
    line = f'{text}  # {comment}' if comment else text
    if len(line) <= WIDTH: return [line]
    if comment and len(text) <= WIDTH//2:
        first, next_ = f'{text}  # ', ' '*len(text) + '  # '
        return textwrap.wrap(comment, WIDTH, initial_indent=first, subsequent_indent=next_)
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=DEEPER, break_long_words=False)
    mark = DEEPER + '# '
    return lines + textwrap.wrap(comment, WIDTH, initial_indent=mark, subsequent_indent=mark)


def takes_constructor(cls) -> bool:
    "Is a class's constructor another library's? Its arguments are then not of interest here."
    ours = [o for o in cls.__mro__ if o.__module__.startswith(('__main__', 'marsclr'))]
    return not any({'__init__', '__new__'} & vars(o).keys() for o in ours)


def class_line(cls) -> str:
    "A class without its constructor; a named tuple with its fields."
    bases = [base.__name__ for base in cls.__bases__ if base is not object]
    inside = ', '.join(getattr(cls, '_fields', bases))
    return '\n'.join(wrap(f'class {cls.__name__}({inside})' if inside else f'class {cls.__name__}'))


def one_line(text) -> str: return ' '.join((text or '').split())


def signature(sym) -> str:
    "The signature of a function or class, with the comments of its parameters."
    is_class = inspect.isclass(sym)
    if is_class and (takes_constructor(sym) or hasattr(sym, '_fields')): return class_line(sym)
    parts = DocmentText(sym, docstring=False)
    params = [(text.replace(':NoneType', ''), one_line(said)) for text,said in parts.params]
    returned = {} if is_class else parts.dm.get('return', {})
    comment = one_line(returned.get('docment'))
    kind = returned.get('anno', inspect.Parameter.empty)
    end = ')' if kind is inspect.Parameter.empty else f') -> {getattr(kind, "__name__", kind)}'
    start = f'{"class" if is_class else "def"} {sym.__name__}('
    short = start + ', '.join(text for text,_ in params) + end
    if len(short) <= WIDTH and not any(said for _,said in params):
        return '\n'.join(wrap(short, comment))
    lines = [line for text,said in params for line in wrap(f'    {text},', said)]
    return '\n'.join([start, *lines, *wrap(end, comment)])


def own_docstring(sym) -> str:
    "What the docstring of a function or class says, without those that it inherits."
    text = vars(sym).get('__doc__') if inspect.isclass(sym) else sym.__doc__
    return inspect.cleandoc(text or '')


def plain(text:str) -> str:
    "A docstring as Markdown that shows its stars as they are; `code` stays code."
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(o if i % 2 else re.sub(r'([*<$])', r'\\\1', o) for i,o in enumerate(parts))


class Renderer(nbdev.showdoc.BasicMarkdownRenderer):
    "What `show_doc` shows: a link to the source, the name as a heading, signature and docstring."
    module = ''  # of the notebook in work, such as marsclr.engine.files
    lesson = False  # is it one of the lessons?
    shown = set()  # names whose whole source stands below what is shown of them
    faults = []  # what is wrong in that notebook

    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name=name or qual_name(sym), title_level=title_level)
        self.docs = own_docstring(self.sym)
        if not self.docs: self.faults.append(f'{self.nm} has no docstring of its own')
        self.dm = signature(self.sym)

    def _repr_markdown_(self):
        file = self.module.replace('.', '/') + '.py'
        address = f'{REPOSITORY}/{file}#L{_get_exps(file)[self.nm]}'
        link = f'[source]({address}){{target="_blank" style="float:right; font-size:smaller"}}'
        shown = self.nm.replace('_', r'\_')
        head = f'{"#"*self.title_level} {shown} {{#{self.nm.lower()}}}'
        rest = [] if self.nm in self.shown else [f'```python\n{self.dm}\n```', plain(self.docs)]
        return '\n\n'.join(['---', link, head, *rest])


# --- links

NAME = re.compile(r'(?<!\[)`([^`\s]+?)(?:\(\))?`(?!\])')  # in backticks, and no link already


class Lookup(NbdevLookup):
    """Where a name in backticks leads: to the page that it stands on, if its module defines it.

    A name that several other modules define leads nowhere, and so does a plain word such as
    `clusters`, which is a variable or the value of an option more often than a function.
    """
    def doc(self, name):
        modules = self.entries['marsclr']['syms']
        found = {o: modules[o][f'{o}.{name}'] for o in modules if f'{o}.{name}' in modules[o]}
        if Renderer.module in found: return found[Renderer.module][0]
        if len(found) > 1 or re.fullmatch('[a-z0-9]+', name): return None
        return next(iter(found.values()))[0] if found else super().doc(name)

    def link_line(self, line): return NAME.sub(self._link_sym, line)


def signature_faults(text:str) -> list[str]:
    "Lines of code in Markdown that do not fit on a page, or that hold a link."
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    wide = [f'a signature is wider than {WIDTH}: {line}' for line in lines if len(line) > WIDTH]
    return wide + [f'a link in a signature: {line}' for line in lines if LINK.search(line)]


def add_links(cell):
    "Link names in text and in what `show_doc` shows; code stays code."
    look = Lookup()
    if cell.cell_type == 'markdown': cell.source = look.linkify(cell.source)
    for output in cell.get('outputs', []):
        text = output.get('data', {}).get('text/markdown')
        if not text: continue
        output.data['text/markdown'] = linked = look.linkify(''.join(text))
        if 'show_doc(' in cell.source: Renderer.faults += signature_faults(linked)


# --- notebooks

class SourceBelow(Processor):
    "Put the source that a page shows below what is shown of all its names."
    def begin(self):
        cells = self.nb.cells
        for at in [i for i,o in enumerate(cells) if 'exports' in o.directives_]:
            end = at + 1
            while end < len(cells) and getattr(cells[end], 'has_sd', 0): end += 1
            cells[at:end] = [*reversed(cells[at + 1:end]), cells[at]]


def summary(cell) -> str:
    """What a cell is called where it is folded, or empty where it stays open.

    Imports are folded everywhere, and outside the lessons checks that are long and show nothing.
    `#| code-fold: true` folds any other cell; the source of a lesson's functions stays open.
    """
    if cell.cell_type != 'code' or 'code-fold' in directives(cell): return ''
    body = ast.parse(code(cell)).body
    if body and all(map(is_import, body)): return 'Imports'
    long = len(code(cell).splitlines()) > CHECKED
    if Renderer.lesson or cell.get('outputs') or not long: return ''
    return 'Checks' if checks(body) else ''


def show_private(cell):
    "Show exported cells that define nothing public, folded: they would be missing on the page."
    said = getattr(cell, 'directives_', {})
    if cell.cell_type != 'code' or 'export' not in said: return
    body = [node for node in ast.parse(cell.source).body if not is_import(node)]
    if not body or any(getattr(node, 'name', '_')[0] != '_' for node in body): return
    said['exports'] = said.pop('export')
    cell.source = f'#| code-fold: true\n#| code-summary: Source\n{cell.source}'


def fold(cell):
    "Fold what a reader can do without at first sight."
    name = summary(cell)
    if name: cell.source = f'#| code-fold: true\n#| code-summary: {name}\n{cell.source}'


def keep_together(cell):
    "In tables, keep a number and its interval on one line."
    for output in cell.get('outputs', []):
        text = output.get('data', {}).get('text/html')
        if text: output.data['text/html'] = ''.join(text).replace(' ± ', '&nbsp;±&nbsp;')


class Processors(nbdev.processors.FilterDefaults):
    "nbdev's steps, three of them our own, with one before and one after them."
    def base_procs(self):
        own = {'add_links': add_links, 'add_fold': fold, 'mv_exports': SourceBelow}
        steps = [own.get(step.__name__, step) for step in super().base_procs()]
        return [show_private, *steps, keep_together]


def read_names(path:Path) -> tuple[str, set]:
    "The module that a notebook makes, empty if none, and the names whose source it shows."
    cells = [o for o in nbformat.read(path, 4).cells if o.cell_type == 'code']
    modules = [directives(o)['default_exp'] for o in cells if 'default_exp' in directives(o)]
    shown = [node for o in cells if 'exports' in directives(o) for node in ast.parse(code(o)).body]
    names = {patch_name(node) for node in shown if hasattr(node, 'name')}
    return (f'marsclr.{modules[0]}' if modules else ''), names


def process(path:Path) -> list[str]:
    "Write the processed notebook; its faults."
    name = path.relative_to(ROOT/'nbs')
    Renderer.module, Renderer.shown = read_names(path)
    Renderer.faults, Renderer.lesson = [], path.name[0].isdigit()
    nbdev.showdoc.BasicMarkdownRenderer = Renderer
    try: exec_nb(path, ROOT/'_proc'/name, Processors)
    except Exception as e: return [f'nbs/{name}: {e}: {e.__cause__}']
    return [f'nbs/{name}: {fault}' for fault in Renderer.faults]


def process_all() -> list[str]:
    "Fill _proc with the processed notebooks and all their files; the faults of all."
    warnings.simplefilter('ignore')
    HistoryManager.enabled = False  # a data base for each notebook
    import marsclr.training  # once, before the work is shared, with torch and fastai
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    hidden = shutil.ignore_patterns('.*', '*.ipynb')
    shutil.copytree(ROOT/'nbs', ROOT/'_proc', ignore=hidden)
    paths = sorted(notebooks(ROOT, 'nbs'), key=lambda o: -o.stat().st_size)
    os.environ['IN_TEST'] = '1'  # nbdev's sign that nothing may be exported
    with multiprocessing.get_context('fork').Pool(2) as pool:
        return sorted(sum(pool.map(process, paths, chunksize=1), []))
