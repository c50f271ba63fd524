"""Mend the links of a rendered site, and find what is wrong in its pages: links that lead nowhere,
links to other lines than the source's, and Markdown that was not rendered.
"""
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NUMBERED = re.compile(r'(?<=["/])\d\d_(\w+\.html)')  # a page as smalldocs names it
UNRENDERED = re.compile(r'\]\(\S|(?<!\w)\*\*\w|`|^:::|:\w+:`|\.\. \w+::|\{target=', re.M)
SOURCE = re.compile(r'<a href="([^"]*)"[^>]*>source</a></p>\s*<h\d[^>]*>(.*?)</h\d>', re.S)
UNREAD = {'code', 'pre', 'script', 'style'}  # their text is no prose
EMPTY = {'br', 'col', 'hr', 'img', 'input', 'link', 'meta', 'source', 'wbr'}  # have no end


def mend(site:Path, host:str):
    "Take the numbers from the names of pages, as Quarto does, and make links to `host` relative."
    for path in sorted(site.rglob('[0-9][0-9]_*.html')): path.rename(path.with_name(path.name[3:]))
    for path in [o for kind in ('html', 'json', 'xml') for o in site.rglob(f'*.{kind}')]:
        text = NUMBERED.sub(r'\1', path.read_text(encoding='utf-8'))
        folder = path.parent.relative_to(site).as_posix()

        def relative(match):
            return match[1] + posixpath.relpath(match[2] or 'index.html', folder) + match[3]

        link = rf'(<a\s[^>]*?href="){re.escape(host)}/?([^"#]*)((?:#[^"]*)?")'
        path.write_text(re.sub(link, relative, text), encoding='utf-8')


class Page(HTMLParser):
    "The addresses that a page names, the places in it that others can name, and its prose."
    def __init__(self, text:str):
        super().__init__()
        self.addresses, self.places, self.prose = {}, {'', 'top'}, []
        self.open = []  # elements whose text is no prose, from the outermost on
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses |= {values[name]: tag for name in ('href', 'src') if values.get(name)}
        self.places |= {values[name] for name in ('id', 'name') if values.get(name)}
        unread = self.open or tag in UNREAD or 'math' in (values.get('class') or '').split()
        if unread and tag not in EMPTY: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag: pass

    def handle_data(self, data):
        if not self.open: self.prose.append(data)


def repository_fault(address:str, repository:str, root:Path) -> str:
    "What is wrong with a link to a file of the repository; empty if it is there."
    url = urlsplit(address)
    file = root/unquote(address.removeprefix(repository + '/').split('#')[0])
    if not file.exists(): return f'{address} names no file of the repository'
    line = re.fullmatch(r'L(\d+)', url.fragment)
    if not url.fragment: return ''
    n_lines = len(file.read_text(encoding='utf-8').splitlines())
    return '' if line and int(line[1]) <= n_lines else f'{address} names no line of the file'


def source_faults(text:str, repository:str, root:Path):
    "Links beside a name that do not lead to the line that defines it."
    for address, head in SOURCE.findall(text):
        name = re.sub('<[^>]*>', '', head).strip()
        file, _, line = address.removeprefix(repository + '/').partition('#L')
        path = root/file
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        found = lines[int(line) - 1] if line.isdigit() and int(line) <= len(lines) else ''
        if not re.search(rf'\b(def|class) {re.escape(name.split(".")[-1])}\b', found):
            yield f'the source of {name} is not at {address}'


def link_fault(address:str, path:Path, pages:dict, site:Path) -> str:
    "What is wrong with a link of the page `path` to a page or file of the site; empty if nothing."
    url = urlsplit(address)
    target = (path.parent/unquote(url.path)).resolve() if url.path else path
    if not target.is_relative_to(site) or not target.exists(): return f'broken link {address}'
    known = pages[target].places if target in pages else {unquote(url.fragment)}
    return '' if unquote(url.fragment) in known else f'{address} names a place that is not there'


def page_faults(path:Path, pages:dict, site:Path, host:str, repository:str, root:Path):
    "What is wrong in one page."
    page = pages[path]
    for address, tag in page.addresses.items():
        if address.startswith(repository + '/'): yield repository_fault(address, repository, root)
        elif tag == 'a' and address.startswith(host): yield f'{address} is not relative'
        elif not urlsplit(address).scheme and not urlsplit(address).netloc:
            yield link_fault(address, path, pages, site)
    for line in ''.join(page.prose).splitlines():
        if UNRENDERED.search(line): yield f'Markdown that is not rendered: {line.strip()[:80]!r}'
    yield from source_faults(path.read_text(encoding='utf-8'), repository, root)


def site_faults(site:Path, host:str, repository:str, root:Path):
    "What is wrong in the pages of a site; `repository` is where `root` is published."
    site = site.resolve()
    pages = {o: Page(o.read_text(encoding='utf-8')) for o in sorted(site.rglob('*.html'))}
    for path in pages:
        for fault in page_faults(path, pages, site, host, repository, root):
            if fault: yield f'{path.relative_to(site).as_posix()}: {fault}'
