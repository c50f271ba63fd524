"""Build the site from the notebooks, and look at it.

    python .ci/site.py build             # as nbdev_docs does; with Quarto where it is, else with smalldocs; into _proc/_docs
    python .ci/site.py look CHROMIUM     # open pages in a browser (needs playwright); screenshots land in _proc/screenshots

Building fails on a cell that mixes imports with other code (nbdev runs such cells alone), on a figure that no `#| fig-alt: ...` describes, and on
a link that leads nowhere. Looking fails on a formula that is not drawn, on code or a page that is cut at the right, and on a figure that reached
its page without alternative text.
"""
import ast
import configparser
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

from notebook_tests import code, code_cells, directives

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_proc'/'_docs'
LESSONS = ['01_datasets', '02_augmentations', '03_losses', '04_training', '05_linear_evaluation', '06_clustering', '07_texture',
           '08_false_negatives', '09_diagnosis', '10_distributed']
PAGES = ['index', *LESSONS, '12_reproduction']
WIDTHS = [1280, 400]  # CSS pixels: a laptop, a telephone
IMPORTS = (ast.Import, ast.ImportFrom)


# --- building

def mixed_cells():
    "Cells that import and do something else; strings that are written to files do not count"
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if path.name.startswith('.') or '.ipynb_checkpoints' in path.parts: continue
        for cell in code_cells(nbformat.read(path, 4)):
            body = ast.parse(code(cell)).body
            imports = [isinstance(statement, IMPORTS) for statement in body]
            if any(imports) and not all(imports):
                yield f'{path.relative_to(ROOT)}: a cell mixes imports with other code: {cell.source[:60]!r}'


def undescribed_figures():
    "Cells with a saved figure and no `#| fig-alt: ...`, which is read to those who do not see it"
    for path in sorted((ROOT/'nbs').rglob('[!.]*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for cell in code_cells(nbformat.read(path, 4)):
            figures = [output for output in cell.outputs if 'image/png' in output.get('data', {})]
            if figures and not directives(cell).get('fig-alt'):
                yield f'{path.relative_to(ROOT)}: a figure has no alternative text: {cell.source[:60]!r}'


def without_a_place():
    "Notebooks that the sidebar does not name"
    sidebar = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    for path in sorted((ROOT/'nbs').rglob('[!.]*.ipynb')):
        name = path.relative_to(ROOT/'nbs').as_posix()
        if '.ipynb_checkpoints' not in path.parts and f'- {name}\n' not in sidebar: yield f'nbs/{name} is not in the sidebar of _quarto.yml'


def run(command, **env):
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode: sys.exit(f'{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')


def link_to_repository():
    "In the processed notebooks, links to the repository's other files, which the site does not hold, become addresses of the repository"
    config = configparser.ConfigParser()
    config.read(ROOT/'settings.ini', encoding='utf-8')
    home = config['DEFAULT']['git_url'] + '/blob/' + config['DEFAULT']['branch']
    for path in (ROOT/'_proc').rglob('*.ipynb'):
        folder = (ROOT/'nbs'/path.relative_to(ROOT/'_proc')).parent

        def moved(match):
            target = (folder/match[1]).resolve()
            outside = target.is_relative_to(ROOT) and not target.is_relative_to(ROOT/'nbs')
            return f']({home}/{target.relative_to(ROOT)})' if outside and target.exists() else match[0]

        path.write_text(re.sub(r'\]\((\.\./[^)\s#]*)\)', moved, path.read_text(encoding='utf-8')), encoding='utf-8')


def build():
    "Write the site into SITE; the stand-in server that some notebooks import lies in tests/"
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    process = 'from nbdev.serve import proc_nbs; proc_nbs()'
    run([sys.executable, '-c', process], PYTHONPATH=os.pathsep.join([str(ROOT/'tests'), os.environ.get('PYTHONPATH', '')]))
    link_to_repository()
    run([shutil.which('quarto') or 'smalldocs', 'render', '_proc'])


class Links(HTMLParser):
    "The addresses that a page names, and the places in it that others can name"
    def __init__(self, text):
        super().__init__()
        self.addresses, self.places = [], {'', 'top'}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[name] for name in ('href', 'src') if values.get(name)]
        self.places |= {values[name] for name in ('id', 'name') if values.get(name)}


def broken_links():
    "Links between the pages, and to their files, that lead nowhere"
    pages = {path: Links(path.read_text(encoding='utf-8')) for path in sorted(SITE.rglob('*.html'))}
    for path, links in pages.items():
        for address in dict.fromkeys(links.addresses):
            url = urlsplit(address)
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if not target.is_relative_to(SITE) or not target.exists():
                yield f'{path.relative_to(SITE)}: broken link {address}'
            elif target in pages and unquote(url.fragment) not in pages[target].places:
                yield f'{path.relative_to(SITE)}: {address} names a place that is not there'


# --- looking

FORMULAS = r"""() => {
    const faults = [], main = document.querySelector('main') || document.body, start = e => e.textContent.trim().slice(0, 60);
    for (const e of main.querySelectorAll('.math'))
        if (!e.querySelector('.katex, mjx-container') || e.querySelector('.katex-error, mjx-merror')) faults.push('a formula is not drawn: ' + start(e));
    for (const e of main.querySelectorAll('p, li, td'))
        if (!e.querySelector('.math, code') && /\$[^$\s][^$]*\$|\\\(/.test(e.textContent)) faults.push('a formula is not drawn: ' + start(e));
    return faults;
}"""
LAYOUT = r"""() => {
    const faults = [], main = document.querySelector('main') || document.body, start = e => e.textContent.trim().slice(0, 60);
    for (const e of main.querySelectorAll('pre.sourceCode'))
        if (e.scrollWidth > e.clientWidth + 1) faults.push('code is cut at the right: ' + start(e));
    for (const e of main.querySelectorAll('pre, table, img, figure')) {
        const right = e.getBoundingClientRect().right, box = e.closest('main');
        let scrolls = false;
        for (let o = e; o && o !== box; o = o.parentElement) scrolls ||= ['auto', 'scroll'].includes(getComputedStyle(o).overflowX);
        if (right > box.getBoundingClientRect().right + 1 && !scrolls) faults.push('wider than its column: ' + (start(e) || e.outerHTML.slice(0, 60)));
    }
    if (document.scrollingElement.scrollWidth > innerWidth) faults.push('the page is wider than the window');
    return faults;
}"""
UNDESCRIBED = "() => [...document.querySelectorAll('main img, main svg[role=img]')].filter(e => !e.getAttribute('alt')).length"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def serve():
    "The address at which the site is served to this machine alone"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}/'


def formula_script():
    "The address of the script that draws the formulas, which the pages with formulas name; None where no page does"
    for path in sorted(SITE.rglob('*.html')):
        found = re.search(r'https://[^"]*(katex|mathjax)[^"]*\.js', path.read_text(encoding='utf-8'), re.I)
        if found: return found[0]
    return None


def reached(address):
    try: urllib.request.urlopen(address, timeout=10).close()
    except OSError: return False
    return True


def katex_from_npm(script, folder):
    "KaTeX, in the version that the pages name, for a machine that reaches npm but not the pages' own source; None if there is none"
    version = re.search(r'/katex@([\d.]+)/', script)
    if not version or not shutil.which('npm'): return None
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(['npm', 'pack', '--silent', f'katex@{version[1]}'], cwd=folder, capture_output=True, text=True)
    if done.returncode: return None
    shutil.unpack_archive(folder/f'katex-{version[1]}.tgz', folder)
    return folder/'package'/'dist'


DRAWN = "() => pen.getImageData(0, 0, canvas.width, canvas.height).data.filter((v, i) => i % 4 == 3 && v).length"


def small_atlas(folder):
    "The page of an atlas, made by the two commands that a newcomer would give"
    from marsclr.archives.marsyard import write_marsyard
    from marsclr.atlas import marsclr_atlas
    from marsclr.engine.packing import marsclr_pack
    shutil.rmtree(folder, ignore_errors=True)
    yard = write_marsyard(folder/'yard', n=60, size=48)
    marsclr_pack(['folder', str(folder/'yard.pack'), '--root', str(yard), '--size', '48'])
    marsclr_atlas(['random', str(folder/'yard.pack'), '--backbone', 'resnet10t', '--clusters', '6', '--device', 'cpu'])
    return folder/'yard.atlas'/'atlas.html'


def atlas_faults(browser, page, shot):
    "Open an atlas, point at an image, click on it, and click on its nearest neighbour"
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.set_default_timeout(10_000)
    errors = []
    tab.on('pageerror', lambda error: errors.append(f'atlas: {error}'))
    tab.goto(page.as_uri())
    tab.wait_for_function(f'({DRAWN})() > 1000')
    x, y = tab.evaluate('place(7)')
    image = tab.evaluate('([x, y]) => under({offsetX: x, offsetY: y})', [x, y])
    path = tab.evaluate('i => atlas.path[i]', image)
    tab.mouse.move(x, y)
    tab.wait_for_selector('#tip img', state='visible')
    if path not in tab.inner_text('#tip'): yield f'atlas: pointing at {path} shows {tab.inner_text("#tip")!r}'
    tab.mouse.click(x, y)
    tab.wait_for_selector('.near button')
    shown = tab.eval_on_selector_all('.near button', 'buttons => buttons.map(button => button.title)')
    if shown != tab.evaluate('i => atlas.near[i].map(j => atlas.path[j])', image): yield f'atlas: the neighbours of {path} are not shown'
    tab.screenshot(path=shot)
    tab.click('.near button')
    tab.wait_for_function('path => document.querySelector("#chosen p").textContent.startsWith(path)', arg=shown[0])
    yield from errors


def look(chromium):
    "Faults of PAGES in each width of WIDTHS; a screenshot of each"
    from playwright.sync_api import sync_playwright
    home, shots = serve(), ROOT/'_proc'/'screenshots'
    shots.mkdir(exist_ok=True)
    script = formula_script() or ''
    online = reached(script) if script else True
    katex = None if online else katex_from_npm(script, ROOT/'_proc'/'katex')
    checks = [LAYOUT, FORMULAS] if online or katex else [LAYOUT]
    if FORMULAS not in checks: print(f'formulas are not checked: neither {script} nor npm is within reach')

    def answer(route):
        file = katex and '/katex@' in route.request.url and katex/urlsplit(route.request.url).path.split('/dist/')[1]
        if file and file.is_file(): route.fulfill(path=file)
        elif online or route.request.url.startswith(home): route.continue_()
        else: route.abort()  # fonts and the like, from elsewhere

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        for width in WIDTHS:
            tab = browser.new_page(viewport=dict(width=width, height=900))
            tab.route('**/*', answer)
            for page in PAGES:
                tab.goto(f'{home}{page}.html')
                tab.wait_for_load_state('networkidle')
                yield from (f'{page} at {width} px: {fault}' for check in checks for fault in tab.evaluate(check))
                bare = tab.evaluate(UNDESCRIBED)
                if bare: yield f'{page}: {bare} figures without alternative text'
                tab.screenshot(path=shots/f'{page}-{width}.png', full_page=True)
        yield from atlas_faults(browser, small_atlas(ROOT/'_proc'/'atlas'), shots/'atlas.png')
        browser.close()


def report(faults, done):
    faults = list(dict.fromkeys(faults))
    if faults: sys.exit('\n'.join(faults))
    print(done)


if __name__ == '__main__':
    if sys.argv[1:] == ['build']:
        report([*mixed_cells(), *undescribed_figures(), *without_a_place()],
               'no cell mixes imports with other code, every figure is described, and the sidebar names every notebook')
        build()
        report(broken_links(), f'{len(list(SITE.rglob("*.html")))} pages, no broken link')
    elif len(sys.argv) == 3 and sys.argv[1] == 'look':
        report(look(sys.argv[2]), f'{len(PAGES)} pages and an atlas looked at, {" and ".join(map(str, WIDTHS))} px wide')
    else: sys.exit(__doc__)
