"""Build the site from the notebooks, and look at it.

    python .ci/site.py build                   # into _proc/_docs
    python .ci/site.py look CHROMIUM [FOLDER]  # needs playwright; FOLDER gets pictures

The site is built by Quarto where it is installed, else by smalldocs. Building fails on
- a cell that mixes imports with other code, which nbdev would run alone,
- a notebook that the sidebar does not name,
- a figure that no readable `#| fig-alt: ...` describes,
- a function on a page without a docstring of its own, and a signature that is wide or holds a link,
- a link that leads nowhere, past the line that it names, or to the site's published copy,
- Markdown that is not rendered.

Looking fails on a formula that is not drawn, on code or a page that is cut at the right, on a
figure without alternative text, on a chapter that the sidebar lacks, and on a dead atlas.
"""
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from notebook_tests import code_cells, directives, notebooks
from style import mixes_imports

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_proc'/'_docs'
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
HOST = SETTINGS['doc_host'] + SETTINGS['doc_baseurl']             # where the site is published
REPOSITORY = SETTINGS['git_url'] + '/blob/' + SETTINGS['branch']  # and the files


def cell_faults(cell):
    start = repr(cell.source[:60])
    if mixes_imports(cell): yield f'a cell mixes imports with other code: {start}'
    kinds = [kind for output in cell.outputs for kind in output.get('data', {})]
    described = directives(cell).get('fig-alt', '')
    if any(kind.startswith('image/') for kind in kinds) and not described:
        yield f'a figure has no alternative text: {start}'
    if ': ' in described: yield f'YAML cannot read a fig-alt with a second colon: {start}'


def notebook_faults(root:Path):
    "What stands in the way of a good page in the notebooks of a project."
    sidebar = (root/'_quarto.yml').read_text(encoding='utf-8')
    for path in notebooks(root, 'nbs'):
        name = path.relative_to(root/'nbs').as_posix()
        if f'- {name}\n' not in sidebar: yield f'nbs/{name} is not in the sidebar of _quarto.yml'
        for cell in code_cells(nbformat.read(path, 4)):
            yield from (f'nbs/{name}: {fault}' for fault in cell_faults(cell))


def link_to_repository(root:Path, repository:str):
    "In the processed notebooks, make links to other files of the repository addresses there."
    for path in (root/'_proc').rglob('*.ipynb'):
        folder = (root/'nbs'/path.relative_to(root/'_proc')).parent

        def moved(match):
            target = (folder/match[1]).resolve()
            outside = target.is_relative_to(root) and not target.is_relative_to(root/'nbs')
            if not outside or not target.exists(): return match[0]
            return f']({repository}/{target.relative_to(root)})'

        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'\]\((\.\./[^)\s#]*)\)', moved, text), encoding='utf-8')


def build():
    "Write the site into SITE; the stand-in server that some notebooks import lies in tests/."
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
    import site_links
    import site_pages
    report(site_pages.process_all())
    link_to_repository(ROOT, REPOSITORY)
    command = [shutil.which('quarto') or 'smalldocs', 'render', '_proc']
    done = subprocess.run(command, capture_output=True, text=True)
    said = f'{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    if done.returncode: sys.exit(f'{command[0]} failed:\n{said}')
    site_links.mend(SITE, HOST)
    report(site_links.site_faults(SITE, HOST, REPOSITORY, ROOT))
    print(f'{len(list(SITE.rglob("*.html")))} pages, no broken link')


def report(faults):
    faults = list(dict.fromkeys(faults))
    if faults: sys.exit('\n'.join(faults))


if __name__ == '__main__':
    if sys.argv[1:] == ['build']:
        report(notebook_faults(ROOT))
        build()
    elif sys.argv[1:2] == ['look'] and len(sys.argv) in (3, 4):
        import site_look
        report(site_look.look(sys.argv[2], *map(Path, sys.argv[3:])))
        print(f'{len(site_look.all_pages(SITE))} pages and an atlas looked at, '
              f'{" and ".join(map(str, site_look.WIDTHS))} px wide')
    else: sys.exit(__doc__)
