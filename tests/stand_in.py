"""A server on your own machine that answers like the archives' servers, faults included"""

import email.utils, io, json, random, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image
from marsclr.archives.marsyard import marsyard

faults = ('error', 'busy', 'cut', 'drop', 'short', 'html', 'drip')

def _head(status, size, kind='image/jpeg', **more):
    lines = [f'HTTP/1.1 {status} -', f'Content-Length: {size}', f'Content-Type: {kind}', *(f'{k.replace("_", "-")}: {v}' for k,v in more.items())]
    return '\r\n'.join([*lines, '', '']).encode()

def _spoil(send, fault, head, body, n):
    "Answer with a fault; False where the connection is to be cut"
    if fault == 'error': send(_head(500, 0))
    if fault == 'busy': send(_head(429, 0, Retry_After=1 if n % 2 else email.utils.formatdate(time.time()+1, usegmt=True)))
    if fault == 'cut': send(head + body[:len(body)//2])
    if fault == 'short': send(_head(200, len(body)//2) + body[:len(body)//2])
    if fault == 'html': send(_head(200, 26, 'text/html') + b'<html>Please log in</html>')
    if fault == 'drip':
        send(head)
        for o in body:
            send(bytes([o]))
            time.sleep(.05)
    return fault not in ('cut', 'drop')

class StandIn:
    "A local server, to be used in a `with` block; `url` is its address"
    def __init__(self,
        files:dict,       # path -> bytes
        pages=None,       # path -> function of (query, server), which gives a JSON object
        share:float=0.,   # of all answers that fail
        kinds=faults,     # how they fail, in turn
        seed:int=0,       # which of them fail
        port:int=0,       # any that is free by default
    ):
        self.files,self.pages,self.share,self.kinds = files,pages or {},share,kinds
        self.log,self.draw,self.lock,self.failed = [],random.Random(seed),threading.Lock(),0
        server = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version,disable_nagle_algorithm = 'HTTP/1.1',True
            def do_GET(self): server.answer(self)
            def log_message(self, *_): pass
        self.http = ThreadingHTTPServer(('127.0.0.1', port), Handler)
        self.http.daemon_threads,self.http.handle_error = True,lambda *_: None
        self.url = f'http://127.0.0.1:{self.http.server_port}'

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
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
        h, # the handler of one request
    ):
        "Answer one request, or spoil it"
        at = urlsplit(h.path)
        path,query = unquote(at.path),{k: v[0] for k,v in parse_qs(at.query, keep_blank_values=True).items()}
        fault,n = self.fault()
        start = int(h.headers.get('Range', 'bytes=0-')[6:-1])
        entry = dict(path=path, query=query, start=start, fault=fault, whole=False)
        self.log.append(entry)
        page = path in self.pages
        if not page and path not in self.files: return h.wfile.write(_head(404, 0))
        body,kind = (json.dumps(self.pages[path](query, self)).encode(), 'application/json') if page else (self.files[path], 'image/jpeg')
        tag = f'"{len(body)}-{hash(body)}"'
        if start and h.headers.get('If-Range') != tag: start = entry['start'] = 0
        more = ({} if page else dict(ETag=tag)) | (dict(Content_Range=f'bytes {start}-{len(body)-1}/{len(body)}') if start else {})
        head,rest = _head(206 if start else 200, len(body)-start, kind, **more),body[start:]
        if fault and not _spoil(h.wfile.write, fault, head, rest, n): self.cut(h)
        if not fault: h.wfile.write(head + rest)
        entry['whole'] = not fault and not start

    def cut(self,
        h, # the handler of one request
    ):
        "Close a connection as a dying machine does"
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        h.close_connection = True
        h.connection.shutdown(socket.SHUT_RDWR)

def pictures(
    n:int,       # how many
    size:int=32, # side, pixels
) -> list: # of bytes, JPEG, no two alike
    "Small pictures of MarsYard, turned and mirrored to make many of few"
    images = marsyard(max(1, -(-n//8)), size=size)[0]
    turned = [np.rot90(o, k)[:,::flip] for o in images for flip in (1, -1) for k in range(4)]
    out = []
    for o in turned[:n]:
        Image.fromarray(o).save(f := io.BytesIO(), 'jpeg', quality=90)
        out.append(f.getvalue())
    return out

def perseverance_record(
    url:str,    # of the server
    sol:int,
    i:int,      # its number among the sol's
    camera='NAVCAM_LEFT',
    sample='Full',
) -> dict: # as the feed's `images` have it
    name = f'NLF_{sol:04d}_{667000000+sol*88775+i:010d}_{i%1000:03d}EBY_{sample[0] if sample == "Thumbnail" else "N"}0030578NCAM00709_01_195J01'
    base = f'{url}/mars2020-raw-images/{name}'
    return dict(imageid=name, sol=sol, site='3', drive='578', sample_type=sample, credit='NASA/JPL-Caltech', title=f'Mars Perseverance Sol {sol}',
                camera=dict(instrument=camera, filter_name='UNK'), extended=dict(mastAz='156.098', mastEl='-10.1652', sclk='667', dimension='(32,32)'),
                image_files=dict(small=base+'_320.jpg', medium=base+'_800.jpg', large=base+'_1200.jpg', full_res=base+'.png'),
                date_taken_utc='2021-03-01T00:00:00.000', date_received='2021-03-01T06:00:00Z', link=f'{url}/mars2020/{name}')

def curiosity_record(
    url:str,    # of the server
    sol:int,
    i:int,      # its number among the sol's
    camera='NAV_LEFT_B',
    sample='full',
) -> dict: # as the feed's `items` have it
    name = f'NLB_{397000000+sol*88775+i}EDR_{"T" if sample == "thumbnail" else "F"}0300000NCAM00709M_'
    file = f'{url}/msl-raw-images/{name}.JPG'
    return dict(id=sol*10000+i, imageid=name, sol=sol, instrument=camera, url=file, https_url=file, site=30, drive=1344, is_thumbnail=sample == 'thumbnail',
                date_taken='2013-03-01T00:00:00.000Z', date_received='2013-03-01T06:00:00.000Z', title=f'Sol {sol}', image_credit='NASA/JPL-Caltech',
                extended=dict(sample_type=sample, mast_az='156.098', mast_el=None, url_list=file, filter_name=None), link=f'/raw_images/{sol*10000+i}')

class FeedPages:
    "What the server says about a list of records"
    def __init__(self,
        records:list,   # newest first
        cap:int=100,    # records a page at most
        late:int=0,     # how many of the first arrive only while others page, one with each page that is asked for
        total_off:int=0, # how far the stated totals are off
    ): self.records,self.cap,self.late,self.total_off = records,cap,late,total_off

    def latest(self,
        query:dict, # of the request, without meaning here
        server,     # that is asked, without meaning here
    ) -> dict: # as Curiosity's feed says it
        "The newest sol"
        return dict(latest_data=dict(latest_sol=max(o['sol'] for o in self.records)))

    def __call__(self,
        query:dict, # of the request
        server,     # that is asked, without meaning here
    ) -> dict: # a page in the shape of the rover's feed
        if query.get('latest'): return self.latest(query, server)['latest_data']
        self.late = max(self.late-1, 0)
        low,high = (int(query[f'condition_{k}'].split(':')[0]) for k in (2, 3))
        cameras,page = query['search'].split('|'),int(query['page'])
        found = [o for o in self.records[self.late:] if low <= o['sol'] <= high and (o.get('instrument') or o['camera']['instrument']) in cameras]
        if query.get('extended'): found = [o for o in found if (o.get('sample_type') or o['extended']['sample_type']).lower() != 'thumbnail']
        shown,total = found[page*self.cap:(page+1)*self.cap],len(found)+self.total_off
        if 'per_page' in query: return dict(items=shown, total=total, page=page, per_page=self.cap, more=len(found) > (page+1)*self.cap)
        return dict(images=shown, total_results=total, page=str(page), per_page=str(self.cap), mission='mars2020')

_paths = dict(perseverance='/rss/api/', curiosity='/api/v1/raw_image_items/')

def rover_stand_in(
    rover:str,      # perseverance or curiosity
    sols,           # which
    each:int,       # images a sol; a thumbnail comes in addition
    size:int=32,    # side, pixels
    feed=None,      # what `FeedPages` shall do besides
    **kwargs        # passed on to `StandIn`
) -> StandIn: # with the records as `records`
    "A server of a rover's feed and pictures"
    make,thumb = (perseverance_record, 'Thumbnail') if rover == 'perseverance' else (curiosity_record, 'thumbnail')
    cameras = ('NAVCAM_LEFT', 'MCZ_RIGHT') if rover == 'perseverance' else ('NAV_LEFT_B', 'MAST_LEFT')
    server = StandIn({}, **kwargs)
    server.records = [make(server.url, s, i, cameras[i % 2], *([thumb] if i == each else [])) for s in sorted(sols, reverse=True) for i in range(each+1)]
    for o,jpeg in zip(server.records, pictures(len(server.records), size)):
        for url in o['image_files'].values() if 'image_files' in o else [o['https_url']]: server.files[urlsplit(url).path] = jpeg
    server.feed = FeedPages(server.records, **(feed or {}))
    server.pages = {_paths[rover]: server.feed, _paths['curiosity']+'msl/latest/': server.feed.latest}
    return server
