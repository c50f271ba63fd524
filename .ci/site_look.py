"""Look at the pages of the site and at an atlas in Chromium, with two browsers side by side."""
import functools
import http.server
import multiprocessing
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_proc'/'_docs'
WIDTHS = [1280, 400]  # CSS pixels: a laptop, a telephone
CHAPTERS = ['Lessons', 'Engine', 'Archives', 'Study']


# --- what is looked at, in the browser's own language

START = """
const main = document.querySelector('main') || document.body;
const start = e => e.textContent.trim().slice(0, 60);
const faults = [];
"""
FORMULAS = r"""
for (const e of main.querySelectorAll('.math'))
    if (!e.querySelector('.katex, mjx-container') || e.querySelector('.katex-error, mjx-merror'))
        faults.push('a formula is not drawn: ' + start(e));
for (const e of main.querySelectorAll('p, li, td'))
    if (!e.querySelector('.math, code') && /\$[^$\s][^$]*\$|\\\(/.test(e.textContent))
        faults.push('a formula is not drawn: ' + start(e));
"""
LAYOUT = r"""
const right = e => e.getBoundingClientRect().right;
function scrolls(e) {
    for (let o = e; o && o !== main; o = o.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(o).overflowX)) return true;
    return false;
}
const folded = main.querySelectorAll('details:not([open])');
for (const e of folded) e.open = true;
for (const e of main.querySelectorAll('pre.sourceCode'))
    if (e.scrollWidth > e.clientWidth + 1) faults.push('code is cut at the right: ' + start(e));
for (const e of main.querySelectorAll('pre, table, img, figure'))
    if (right(e) > right(main) + 1 && !scrolls(e))
        faults.push('wider than its column: ' + (start(e) || e.outerHTML.slice(0, 60)));
if (document.scrollingElement.scrollWidth > innerWidth)
    faults.push('the page is wider than the window');
for (const e of folded) e.open = false;
"""
FIGURES = """
for (const e of main.querySelectorAll('img, svg[role=img]'))
    if (!e.getAttribute('alt')) faults.push('a figure has no alternative text');
"""
SIDEBAR = f"""
const sidebar = document.querySelector('#quarto-sidebar');
for (const name of {CHAPTERS})
    if (!sidebar || !sidebar.textContent.includes(name)) faults.push('no chapter ' + name);
"""
CHECKS = [LAYOUT, FORMULAS, FIGURES, SIDEBAR]


def in_browser(check:str) -> str:
    "The script of a check, which gives a list of faults."
    return f'() => {{ {START} {check} return faults; }}'


# --- the way to the pages

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def serve(folder:Path) -> str:
    "The address at which a folder is served to this machine alone."
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}/'


def formula_script(site:Path) -> str:
    "The address of the script that draws formulas, which pages with formulas name; or empty."
    named = re.compile(r'https://[^"]*(katex|mathjax)[^"]*\.js', re.I)
    for path in sorted(site.rglob('*.html')):
        found = named.search(path.read_text(encoding='utf-8'))
        if found: return found[0]
    return ''


def reached(address:str) -> bool:
    try: urllib.request.urlopen(address, timeout=5).close()
    except OSError: return False
    return True


def katex_from_npm(script:str, folder:Path) -> Path|None:
    "KaTeX as the pages name it, where npm is within reach and the pages' own source is not."
    version = re.search(r'/katex@([\d.]+)/', script)
    if not version or not shutil.which('npm'): return None
    folder.mkdir(parents=True, exist_ok=True)
    command = ['npm', 'pack', '--silent', f'katex@{version[1]}']
    if subprocess.run(command, cwd=folder, capture_output=True).returncode: return None
    shutil.unpack_archive(folder/f'katex-{version[1]}.tgz', folder)
    return folder/'package'/'dist'


# --- pages

def all_pages(site:Path) -> list[str]:
    "The pages of a site, without their suffix."
    return sorted(o.relative_to(site).with_suffix('').as_posix() for o in site.rglob('*.html'))


ALL_DRAWN = """() => [...document.querySelectorAll('.math')]
    .every(e => e.querySelector('.katex, mjx-container'))"""


def wait_for_formulas(tab):
    "Let the page draw its formulas; what is not drawn after some seconds is found by the check."
    from playwright.sync_api import TimeoutError
    try: tab.wait_for_function(ALL_DRAWN, timeout=5000)
    except TimeoutError: pass


def take_picture(tab, folder:Path|None, name:str):
    if not folder: return
    path = folder/f'{name.replace("/", "-")}.jpg'
    tab.screenshot(path=path, full_page=True, type='jpeg')


def look_at(tab, home:str, page:str, checks:list[str], pictures:Path|None):
    "Faults of a page in each width; with `pictures`, a picture of each lands there."
    tab.goto(f'{home}{page}.html')
    if FORMULAS in checks: wait_for_formulas(tab)
    for width in WIDTHS:
        tab.set_viewport_size(dict(width=width, height=900))
        for check in checks:
            faults = tab.evaluate(in_browser(check))
            yield from (f'{page} at {width} px: {fault}' for fault in faults)
        take_picture(tab, pictures, f'{page}-{width}')


def answer(route, katex:Path|None):
    "What a page asks of other hosts: KaTeX from here, and nothing else."
    path = urlsplit(route.request.url).path
    if katex and '/katex@' in path: route.fulfill(path=katex/path.split('/dist/')[1])
    else: route.abort()


def look_at_pages(browser, pictures:Path|None, pages:list[str], online:bool, katex:Path|None):
    "Faults of some pages; formulas are checked where something is at hand that draws them."
    home = serve(SITE)
    tab = browser.new_page()
    foreign = lambda url: not url.startswith(home)
    if not online: tab.route(foreign, lambda route: answer(route, katex))
    checks = [o for o in CHECKS if o != FORMULAS or online or katex]
    for page in pages: yield from look_at(tab, home, page, checks, pictures)


# --- an atlas

DRAWN = """() => pen.getImageData(0, 0, canvas.width, canvas.height).data
    .filter((value, i) => i % 4 == 3 && value).length > 1000"""
AT = '([x, y]) => under({offsetX: x, offsetY: y})'
SHOWN = 'path => document.querySelector("#chosen p").textContent.startsWith(path)'


def small_atlas(folder:Path) -> Path:
    "The page of an atlas, made by the two commands that a newcomer would give."
    from marsclr.archives.marsyard import write_marsyard
    from marsclr.atlas import marsclr_atlas
    from marsclr.engine.packing import marsclr_pack
    shutil.rmtree(folder, ignore_errors=True)
    yard = write_marsyard(folder/'yard', n=60, size=48)
    marsclr_pack(['folder', str(folder/'yard.pack'), '--root', str(yard), '--size', '48'])
    marsclr_atlas(['random', str(folder/'yard.pack'), '--backbone', 'resnet10t',
                   '--clusters', '6', '--device', 'cpu'])
    return folder/'yard.atlas'/'atlas.html'


def look_at_atlas(browser, pictures:Path|None, page:Path):
    "Open an atlas, point at an image, click on it, and click on its nearest neighbour."
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.set_default_timeout(10_000)
    errors = []
    tab.on('pageerror', lambda error: errors.append(f'atlas: {error}'))
    tab.goto(page.as_uri())
    tab.wait_for_function(DRAWN)
    x, y = tab.evaluate('place(7)')
    image = tab.evaluate(AT, [x, y])
    path = tab.evaluate('i => atlas.path[i]', image)
    tab.mouse.move(x, y)
    tab.wait_for_selector('#tip img', state='visible')
    tip = tab.inner_text('#tip')
    if path not in tip: yield f'atlas: pointing at {path} shows {tip!r}'
    tab.mouse.click(x, y)
    tab.wait_for_selector('#chosen .near button')
    shown = tab.eval_on_selector_all('#chosen .near button', 'buttons => buttons.map(o => o.title)')
    near = tab.evaluate('i => atlas.near[i].map(j => atlas.path[j])', image)
    if shown != near: yield f'atlas: the neighbours of {path} are not shown'
    take_picture(tab, pictures, 'atlas-page')
    tab.click('#chosen .near button')
    tab.wait_for_function(SHOWN, arg=shown[0])
    yield from errors


# --- the whole

def in_a_browser(chromium:str, work, *args) -> list[str]:
    "Do some work in a browser of its own; the faults that it finds."
    from playwright.sync_api import sync_playwright
    flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        faults = list(work(browser, *args))
        browser.close()
    return faults


def look_for_atlas(chromium:str, pictures:Path|None) -> list[str]:
    return in_a_browser(chromium, look_at_atlas, pictures, small_atlas(ROOT/'_proc'/'atlas'))


def look(chromium:str, pictures:Path|None=None) -> list[str]:
    "Faults of all pages in each width of WIDTHS, and of an atlas; two processes share the work."
    script = formula_script(SITE)
    online = not script or reached(script)
    katex = None if online else katex_from_npm(script, ROOT/'_proc'/'katex')
    if not online and not katex:
        print(f'formulas are not checked: neither {script} nor npm is within reach')
    if pictures: pictures.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        jobs = [pool.apply_async(look_for_atlas, [chromium, pictures])]
        pages = all_pages(SITE)
        for part in pages[::2], pages[1::2]:
            args = chromium, look_at_pages, pictures, part, online, katex
            jobs.append(pool.apply_async(in_a_browser, args))
        return sum([job.get() for job in jobs], [])
