"""A server on your own machine that answers like the archives' servers, faults included"""

import email.utils, io, json, random, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image
from marsclr.archives.marsyard import marsyard

faults = ('error', 'busy', 'cut', 'drop', 'short', 'html', 'drip')


# --- answers and faults

def _head(status, size, kind='image/jpeg', **headers):
    "The first lines of an answer"
    headers = {'Content-Length': size, 'Content-Type': kind} | headers
    lines = [f'{name.replace("_", "-")}: {value}' for name, value in headers.items()]
    return '\r\n'.join([f'HTTP/1.1 {status} -', *lines, '', '']).encode()

def _retry_after(n):
    "A second from now, in one of the two ways of saying it"
    return 1 if n % 2 else email.utils.formatdate(time.time()+1, usegmt=True)

def _drip(send, head, body):
    "Byte by byte, slowly"
    send(head)
    for byte in body:
        send(bytes([byte]))
        time.sleep(.05)

def _spoil(send, fault, head, body, n):
    "Answer with a fault; False where the connection is to be cut"
    half = len(body)//2
    if fault == 'error': send(_head(500, 0))
    if fault == 'busy': send(_head(429, 0, Retry_After=_retry_after(n)))
    if fault == 'cut': send(head + body[:half])
    if fault == 'short': send(_head(200, half) + body[:half])
    if fault == 'html': send(_head(200, 26, 'text/html') + b'<html>Please log in</html>')
    if fault == 'drip': _drip(send, head, body)
    return fault not in ('cut', 'drop')

def _cut(handler):
    "Close a connection as a dying machine does"
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


# --- the server

class StandIn:
    "A local server, to be used in a `with` block; `url` is its address, `log` says what was asked"
    def __init__(self,
        files:dict,       # path -> bytes
        pages=None,       # path -> function of (query, server), which gives a JSON object
        share:float=0.,   # of all answers that fail
        kinds=faults,     # how they fail, in turn
        seed:int=0,       # which of them fail
        port:int=0,       # any that is free by default
    ):
        self.files = files
        self.pages = pages or {}
        self.share = share
        self.kinds = kinds
        self.log = []
        self.draw = random.Random(seed)
        self.lock = threading.Lock()
        self.failed = 0
        self.http = self._server(port)
        self.url = f'http://127.0.0.1:{self.http.server_port}'

    def _server(self, port):
        server = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            disable_nagle_algorithm = True
            def do_GET(self): server.answer(self)
            def log_message(self, *_): pass
        http = ThreadingHTTPServer(('127.0.0.1', port), Handler)
        http.daemon_threads = True
        http.handle_error = lambda *_: None  # a client that has gone is no error
        return http

    def __enter__(self):
        serve = dict(target=self.http.serve_forever, kwargs=dict(poll_interval=.02))
        threading.Thread(**serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def fault(self):
        "The fault of the next answer, and how many there were; '' for most"
        with self.lock:
            if self.draw.random() >= self.share: return '', self.failed
            self.failed += 1
            return self.kinds[self.failed % len(self.kinds)], self.failed

    def answer(self,
        handler, # of one request
    ):
        "Answer one request, or spoil it, and write it down"
        at = urlsplit(handler.path)
        path = unquote(at.path)
        query = parse_qs(at.query, keep_blank_values=True)
        query = {name: values[0] for name, values in query.items()}
        fault, n = self.fault()
        start = int(handler.headers.get('Range', 'bytes=0-')[6:-1])
        entry = dict(path=path, query=query, start=start, fault=fault, whole=False)
        self.log.append(entry)
        send = handler.wfile.write
        version = handler.headers.get('If-Range')
        if path in self.pages: head, body = self._page(path, query)
        elif path in self.files: head, body, entry['start'] = self._file(path, start, version)
        else: return send(_head(404, 0))
        if not fault: send(head + body)
        elif not _spoil(send, fault, head, body, n): _cut(handler)
        entry['whole'] = not fault and not entry['start']

    def _page(self, path, query):
        "Head and body of a page of JSON"
        body = json.dumps(self.pages[path](query, self)).encode()
        return _head(200, len(body), 'application/json'), body

    def _file(self, path, start, version):
        "Head and body of a file, and where the body starts: at `start` if `version` is still right"
        content = self.files[path]
        tag = f'"{len(content)}-{hash(content)}"'
        if version != tag: start = 0
        if not start: return _head(200, len(content), ETag=tag), content, 0
        span = f'bytes {start}-{len(content)-1}/{len(content)}'
        return _head(206, len(content)-start, ETag=tag, Content_Range=span), content[start:], start


# --- pictures and records

def pictures(
    n:int,       # how many
    size:int=32, # side, pixels
) -> list: # of bytes, JPEG, no two alike
    "Small pictures of MarsYard, turned and mirrored to make many of few"
    images = marsyard(max(1, -(-n//8)), size=size)[0]
    turns = [(flip, k) for flip in (1, -1) for k in range(4)]
    turned = [np.rot90(image, k)[:, ::flip] for image in images for flip, k in turns]
    return [_jpeg(image) for image in turned[:n]]

def _jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'jpeg', quality=90)
    return file.getvalue()

def perseverance_record(
    url:str,    # of the server
    sol:int,
    i:int,      # its number among the sol's
    camera='NAVCAM_LEFT',
    sample='Full',
) -> dict: # as the feed's `images` have it
    kind = 'T' if sample == 'Thumbnail' else 'N'
    clock = 667000000+sol*88775+i
    name = f'NLF_{sol:04d}_{clock:010d}_{i%1000:03d}EBY_{kind}0030578NCAM00709_01_195J01'
    base = f'{url}/mars2020-raw-images/{name}'
    sizes = dict(small='_320.jpg', medium='_800.jpg', large='_1200.jpg', full_res='.png')
    return dict(imageid=name, sol=sol, site='3', drive='578', sample_type=sample,
                credit='NASA/JPL-Caltech', title=f'Mars Perseverance Sol {sol}',
                camera=dict(instrument=camera, filter_name='UNK'),
                extended=dict(mastAz='156.098', mastEl='-10.1652', sclk='667', dimension='(32,32)'),
                image_files={size: base+end for size, end in sizes.items()},
                date_taken_utc='2021-03-01T00:00:00.000', date_received='2021-03-01T06:00:00Z',
                link=f'{url}/mars2020/{name}')

def curiosity_record(
    url:str,    # of the server
    sol:int,
    i:int,      # its number among the sol's
    camera='NAV_LEFT_B',
    sample='full',
) -> dict: # as the feed's `items` have it
    is_thumbnail = sample.lower() == 'thumbnail'
    name = f'NLB_{397000000+sol*88775+i}EDR_{"T" if is_thumbnail else "F"}0300000NCAM00709M_'
    file = f'{url}/msl-raw-images/{name}.JPG'
    number = sol*10000+i
    return dict(id=number, imageid=name, sol=sol, instrument=camera, url=file, https_url=file,
                site=30, drive=1344, is_thumbnail=is_thumbnail,
                date_taken='2013-03-01T00:00:00.000Z', date_received='2013-03-01T06:00:00.000Z',
                title=f'Sol {sol}', image_credit='NASA/JPL-Caltech',
                extended=dict(sample_type=sample, mast_az='156.098', mast_el=None, url_list=file,
                              filter_name=None), link=f'/raw_images/{number}')

def _instrument(record): return record.get('instrument') or record['camera']['instrument']

def _sample(record): return (record.get('sample_type') or record['extended']['sample_type']).lower()

def _files(record):
    "The addresses of a record's pictures"
    return record['image_files'].values() if 'image_files' in record else [record['https_url']]


# --- the feeds

class FeedPages:
    "What the server says about a list of records"
    def __init__(self,
        records:list,   # newest first
        cap:int=100,    # records a page at most
        late:int=0,     # how many of the first arrive only while others page, one with each page
        total_off:int=0, # how far the stated totals are off
    ):
        self.records = records
        self.cap = cap
        self.late = late
        self.total_off = total_off

    def latest(self,
        query:dict, # of the request, without meaning here
        server,     # that is asked, without meaning here
    ) -> dict: # as Curiosity's feed says it
        "The newest sol"
        return dict(latest_data=dict(latest_sol=max(record['sol'] for record in self.records)))

    def _matching(self, query):
        "The records that a query asks for"
        first, last = (int(query[f'condition_{k}'].split(':')[0]) for k in (2, 3))
        cameras = query['search'].split('|')
        for record in self.records[self.late:]:
            if not first <= record['sol'] <= last or _instrument(record) not in cameras: continue
            if query.get('extended') and _sample(record) == 'thumbnail': continue
            yield record

    def __call__(self,
        query:dict, # of the request
        server,     # that is asked, without meaning here
    ) -> dict: # a page in the shape of the rover's feed
        if query.get('latest'): return self.latest(query, server)['latest_data']
        self.late = max(self.late-1, 0)
        found = list(self._matching(query))
        page = int(query['page'])
        end = (page+1)*self.cap
        shown = found[page*self.cap:end]
        total = len(found)+self.total_off
        if 'per_page' in query:
            more = len(found) > end
            return dict(items=shown, total=total, page=page, per_page=self.cap, more=more)
        return dict(images=shown, total_results=total, page=str(page), per_page=str(self.cap),
                    mission='mars2020')


_paths = dict(perseverance='/rss/api/', curiosity='/api/v1/raw_image_items/')
_makers = dict(perseverance=(perseverance_record, 'Thumbnail', ('NAVCAM_LEFT', 'MCZ_RIGHT')),
               curiosity=(curiosity_record, 'thumbnail', ('NAV_LEFT_B', 'MAST_LEFT')))

def _records(rover, url, sols, each):
    "Records of a rover, newest first: `each` full frames a sol, and a thumbnail"
    make, thumbnail, cameras = _makers[rover]
    for sol in sorted(sols, reverse=True):
        for i in range(each): yield make(url, sol, i, cameras[i % 2])
        yield make(url, sol, each, cameras[each % 2], thumbnail)

def rover_stand_in(
    rover:str,      # perseverance or curiosity
    sols,           # which
    each:int,       # images a sol; a thumbnail comes in addition
    size:int=32,    # side, pixels
    feed=None,      # what `FeedPages` shall do besides
    **kwargs        # passed on to `StandIn`
) -> StandIn: # with the records as `records`
    "A server of a rover's feed and pictures"
    server = StandIn({}, **kwargs)
    server.records = list(_records(rover, server.url, sols, each))
    for record, jpeg in zip(server.records, pictures(len(server.records), size)):
        for url in _files(record): server.files[urlsplit(url).path] = jpeg
    server.feed = FeedPages(server.records, **(feed or {}))
    latest = _paths['curiosity']+'msl/latest/'
    server.pages = {_paths[rover]: server.feed, latest: server.feed.latest}
    return server
