"The checks of the site, each on a page that is good and on one that is not."
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'.ci'))

pytest.importorskip('nbdev')
import site_links
import site_look
import site_pages

# Python has a module `site` of its own
spec = importlib.util.spec_from_file_location('site_of_ci', root/'.ci'/'site.py')
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

HOST, REPOSITORY = 'https://example.org/toy', 'https://git.example.org/toy/blob/main'


# --- links

GOOD = '''<main><h2 id="here">A <code>`_**](x</code></h2>
<p><a href="engine/b.html#there">b</a> <a href="#here">up</a> <a href="https://example.com/x">x</a>
<a href="{repository}/toy.py">the file</a></p>
<p><a href="{repository}/toy.py#L2" target="_blank">source</a></p>
<h3 id="double">double</h3></main>'''.format(repository=REPOSITORY)


@pytest.fixture
def pages(tmp_path):
    "A site of two pages, and the repository that it is made from."
    folder = tmp_path/'site'
    (folder/'engine').mkdir(parents=True)
    (folder/'index.html').write_text(GOOD)
    (folder/'engine'/'b.html').write_text('<p id="there">x</p>')
    (tmp_path/'toy.py').write_text('import os\ndef double(x): return 2*x\n')
    return folder


def faults(pages): return list(site_links.site_faults(pages, HOST, REPOSITORY, pages.parent))


def test_a_good_page_has_no_fault(pages): assert faults(pages) == []


@pytest.mark.parametrize('good,bad,fault', [
    ('engine/b.html#', 'engine/c.html#', 'broken link engine/c.html#there'),
    ('engine/b.html#', '../toy.py#', 'broken link ../toy.py#there'),
    ('b.html#there', 'b.html#nowhere', 'engine/b.html#nowhere names a place that is not there'),
    ('"#here"', '"#hear"', '#hear names a place that is not there'),
    ('https://example.com/x', f'{HOST}/engine/b.html', f'{HOST}/engine/b.html is not relative'),
    ('/toy.py"', '/toy.txt"', f'{REPOSITORY}/toy.txt names no file of the repository'),
    ('/toy.py"', '/toy.py#L9"', f'{REPOSITORY}/toy.py#L9 names no line of the file'),
    ('#L2', '#L1', f'the source of double is not at {REPOSITORY}/toy.py#L1'),
    ('>double<', '>doubles<', f'the source of doubles is not at {REPOSITORY}/toy.py#L2'),
    ('>the file<', '>[`f`](g)<', "Markdown that is not rendered: '[`f`](g)"),
    ('>the file<', '>**bold**<', "Markdown that is not rendered: '**bold**"),
    ('>the file<', '>:class:`f`<', "Markdown that is not rendered: ':class:`f`"),
])
def test_a_bad_page_is_found(pages, good, bad, fault):
    assert good in GOOD
    (pages/'index.html').write_text(GOOD.replace(good, bad))
    found = faults(pages)
    assert len(found) == 1 and found[0].startswith(f'index.html: {fault}'), found


def test_pages_lose_their_numbers_and_links_their_host(pages):
    text = f'<a href="{HOST}/b.html#x">b</a><a class="y" href="../04_training.html#z">t</a>'
    (pages/'engine'/'b.html').write_text(text + f'<p>{HOST}/b.html</p><a href="{HOST}">home</a>')
    (pages/'04_training.html').write_text('<p id="z">z</p>')
    (pages/'search.json').write_text('[{"href": "04_training.html#z"}]')
    site_links.mend(pages, HOST)
    assert sorted(o.name for o in pages.glob('*.html')) == ['index.html', 'training.html']
    assert (pages/'search.json').read_text() == '[{"href": "training.html#z"}]'
    text = '<a href="../b.html#x">b</a><a class="y" href="../training.html#z">t</a>'
    text += f'<p>{HOST}/b.html</p><a href="../index.html">home</a>'
    assert (pages/'engine'/'b.html').read_text() == text


# --- what show_doc shows

def documented(
    first:int, # said of it
    second=None, # a comment that is much too long to stand beside it, and so it goes on below
) -> list: # what comes out
    "Two stars, 2**3, and `a*b`"

def bare(x): return x

def many(a_parameter_with_a_long_name, another_parameter_with_a_long_name,
         a_third_parameter_with_a_long_name): "Too many for a line"

class Base:
    def forward(self): "What the base says"

class Derived(Base):
    def forward(self): return 1


def shown(symbol):
    site_pages.Renderer.faults = []
    return site_pages.Renderer(symbol)


def test_a_signature_is_plain_and_fits():
    assert site_pages.signature(documented) == '''def documented(
    first:int,  # said of it
    second=None,  # a comment that is much too long to stand beside it, and so it goes
                  # on below
) -> list  # what comes out'''
    assert site_pages.signature(bare) == 'def bare(x)'
    assert site_pages.signature(Derived) == 'class Derived(Base)'
    assert site_pages.signature(many) == """def many(
    a_parameter_with_a_long_name,
    another_parameter_with_a_long_name,
    a_third_parameter_with_a_long_name,
)"""


@pytest.mark.parametrize('symbol,fault', [
    (documented, []), (bare, ['bare has no docstring of its own']),
    (Base.forward, []), (Derived.forward, ['Derived.forward has no docstring of its own']),
])
def test_a_docstring_of_ones_own_is_asked_for(symbol, fault):
    text = shown(symbol).docs
    assert site_pages.Renderer.faults == fault and bool(text) == (not fault)


def test_what_stands_in_full_below_is_not_said_twice(tmp_path):
    cells = ['#| default_exp a.b', '#| exports\n@patch\ndef look(self:Health): return 1',
             '#| export\ndef hidden(): return 2']
    path = tmp_path/'a.ipynb'
    nbformat.write(new_notebook(cells=[new_code_cell(o) for o in cells]), path)
    assert site_pages.read_names(path) == ('marsclr.a.b', {'Health.look'})
    site_pages.Renderer.module = 'marsclr.engine.health'
    from marsclr.engine.health import Health, spread
    for names, blocks in (set(), 1), ({'Health.look', 'spread'}, 0):
        site_pages.Renderer.shown = names
        texts = [shown(symbol)._repr_markdown_() for symbol in (Health.look, spread)]
        assert [len(site_pages.FENCE.findall(text)) for text in texts] == [blocks, blocks]
        assert [text.splitlines()[4] for text in texts] == [
            '### Health.look {#health.look}', '### spread {#spread}']
    site_pages.Renderer.module, site_pages.Renderer.shown = '', set()


def test_source_stands_below_all_of_its_names():
    cell = lambda name, exported=0, sd=0: SimpleNamespace(
        name=name, has_sd=sd, directives_={'exports': ''} if exported else {})
    cells = [cell('a'), cell('source', 1), cell('second', 0, 1), cell('first', 0, 1),
             cell('source 2', 1), cell('third', 0, 1), cell('b')]
    notebook = SimpleNamespace(cells=cells)
    site_pages.SourceBelow(notebook).begin()
    order = ['a', 'first', 'second', 'source', 'third', 'source 2', 'b']
    assert [o.name for o in notebook.cells] == order


def test_stars_of_a_docstring_stay_stars():
    assert site_pages.plain(shown(documented).docs) == r'Two stars, 2\*\*3, and `a*b`'


@pytest.mark.parametrize('line,fault', [
    ('def f(x):  # as in `g`', []),
    ('def f(x):  # as in [`g`](https://example.org/g.html)', ['a link in a signature']),
    (f'def f({"x"*90}):', ['a signature is wider than 88']),
])
def test_signatures_that_are_wide_or_hold_links_are_found(line, fault):
    text = f'### f\n\n```python\n{line}\n```\n\nwords [`g`](https://g)'
    assert [o.split(':')[0] for o in site_pages.signature_faults(text)] == fault


def test_names_lead_to_the_module_that_defines_them():
    look = site_pages.Lookup()
    page = f'{site.HOST}/losses.html'
    assert look.linkify('as `ContrastiveLoss`') == f'as [`ContrastiveLoss`]({page}#contrastiveloss)'
    assert look.linkify('[`ContrastiveLoss`](x)') == '[`ContrastiveLoss`](x)'
    assert look.linkify('`imagenet` or `no_such_name`') == '`imagenet` or `no_such_name`'
    site_pages.Renderer.module = 'marsclr.datasets'
    try: assert look.doc('imagenet') == f'{site.HOST}/datasets.html#imagenet'
    finally: site_pages.Renderer.module = ''


LONG = '\n'.join(f'x = {i}' for i in range(site_pages.CHECKED))
SAID = [new_output('stream', text='1')]


@pytest.mark.parametrize('cell,in_lesson,elsewhere', [
    (new_code_cell('import os\nfrom pathlib import Path'), 'Imports', 'Imports'),
    (new_code_cell('x = 1\nassert x'), '', ''),
    (new_code_cell(f'{LONG}\nassert x'), '', 'Checks'),
    (new_code_cell(f'{LONG}\nx'), '', ''),
    (new_code_cell(f'{LONG}\nassert x\nx', outputs=SAID), '', ''),
    (new_code_cell(f'#| code-fold: true\n{LONG}\nassert x'), '', ''),
    (nbformat.v4.new_markdown_cell('import os'), '', ''),
])
def test_imports_and_long_checks_are_folded(cell, in_lesson, elsewhere):
    for lesson,name in (True, in_lesson), (False, elsewhere):
        site_pages.Renderer.lesson = lesson
        assert site_pages.summary(cell) == name
        folded = nbformat.NotebookNode(cell)
        site_pages.fold(folded)
        start = f'#| code-fold: true\n#| code-summary: {name}\n' if name else ''
        assert folded.source == start + cell.source


@pytest.mark.parametrize('source,shown', [
    ('def _grain(): return 1', True), ('_sizes = 1, 2', True), ('import os', False),
    ('def grain(): return 1', False), ('_size = 1\nclass Grain: pass', False),
])
def test_exported_code_without_a_public_name_is_shown_folded(source, shown):
    cell = new_code_cell(source)
    cell.directives_ = {'export': []}
    site_pages.show_private(cell)
    assert ('exports' in cell.directives_) == shown == ('export' not in cell.directives_)
    assert cell.source == '#| code-fold: true\n#| code-summary: Source\n'*shown + source


def test_a_number_and_its_interval_stay_on_one_line():
    table = new_output('display_data', {'text/html': '<td>1 ± 2</td>'})
    cell = new_code_cell('x ± y', outputs=[table])
    site_pages.keep_together(cell)
    assert cell.outputs[0]['data']['text/html'] == '<td>1&nbsp;±&nbsp;2</td>'
    assert cell.source == 'x ± y'


# --- notebooks

FIGURE = [new_output('display_data', {'image/png': 'x'})]
PHOTO = [new_output('execute_result', {'image/jpeg': 'x'})]


@pytest.mark.parametrize('cell,name,fault', [
    (new_code_cell('x = 1'), 'a.ipynb', []),
    (new_code_cell('#| fig-alt: a line\nplot()', outputs=FIGURE), 'a.ipynb', []),
    (new_code_cell('plot()', outputs=FIGURE), 'a.ipynb', ['a figure has no alternative text']),
    (new_code_cell('#| fig-alt: Mars: a line\nplot()', outputs=FIGURE), 'a.ipynb',
     ['YAML cannot read a fig-alt with a second colon']),
    (new_code_cell('photo', outputs=PHOTO), 'a.ipynb', ['a figure has no alternative text']),
    (new_code_cell('import os\nx = 1'), 'a.ipynb', ['a cell mixes imports with other code']),
    (new_code_cell('x = 1'), 'b.ipynb', ['is not in the sidebar of _quarto.yml']),
])
def test_notebooks_that_make_no_good_page_are_found(tmp_path, cell, name, fault):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'_quarto.yml').write_text('      - a.ipynb\n')
    nbformat.write(new_notebook(cells=[cell]), tmp_path/'nbs'/name)
    found = list(site.notebook_faults(tmp_path))
    assert len(found) == len(fault) and all(map(str.__contains__, found, fault)), found


# --- in a browser

SIDEBAR = '<nav id="quarto-sidebar">Lessons Engine Archives Study</nav>'
FINE = '''<html><body>{nav}<main style="width: 300px"><p>An img <img alt="a rock" src="data:,"></p>
<span class="math"><span class="katex">x</span></span>
<pre class="sourceCode">x = 1</pre></details><table><tr><td>5 $</td></tr></table></main></body></html>'''
FINE = FINE.format(nav=SIDEBAR)


@pytest.fixture(scope='module')
def tab():
    "A page of a browser."
    api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser.new_page()
        browser.close()


@pytest.mark.parametrize('good,bad,fault', [
    ('x = 1', 'x = 2', []),
    ('<pre class', '<details><pre class', []),
    ('<pre class="sourceCode">x', '<details><pre class="sourceCode">' + 'x'*200, ['code is cut at']),
    ('x = 1', 'x'*200, ['code is cut at the right: xxx', 'the page is wider than the window']),
    ('<table>', '<table style="width: 320px">', ['wider than its column: 5 $']),
    ('5 $', '$x^2$', ['a formula is not drawn: $x^2$']),
    ('class="katex"', 'class="cat"', ['a formula is not drawn: x']),
    ('class="katex"', 'class="katex katex-error"', ['a formula is not drawn: x']),
    ('alt="a rock"', '', ['a figure has no alternative text']),
    ('Archives', '', ['no chapter Archives']),
])
def test_what_looks_bad_is_found(tab, tmp_path, good, bad, fault):
    assert good in FINE
    (tmp_path/'a.html').write_text(FINE.replace(good, bad))
    found = list(site_look.look_at(tab, site_look.serve(tmp_path), 'a', site_look.CHECKS, tmp_path))
    narrow = [o for o in found if o.startswith('a at 400 px: ')]
    assert all(any(part in o for o in narrow) for part in fault), found
    assert (fault == []) == (found == [])
    assert {o.name for o in tmp_path.glob('*.jpg')} == {'a-1280.jpg', 'a-400.jpg'}
