"The server that answers like the archives' servers, and breaks like them."
import email.utils, io, json, random, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
import numpy as np
from fastcore.basics import patch
from PIL import Image
from marsclr.archives.marsyard import marsyard
import requests
from fastcore.test import *
from stand_in import *


def test_the_server():
    def drawn(seed):
        server = StandIn({}, share=.4, seed=seed)
        server.http.server_close()
        return [server.fault()[0] for _ in range(12)]

    test_eq(drawn(1), drawn(1))
    assert drawn(1) != drawn(2)
    drawn(1)

    with StandIn({'/a.jpg': b'0123456789'}) as server:
        whole,rest = requests.get(server.url+'/a.jpg'),requests.get(server.url+'/b.jpg')
        part = requests.get(server.url+'/a.jpg', headers={'Range': 'bytes=4-', 'If-Range': whole.headers['ETag']})
    test_eq((whole.status_code, whole.content, rest.status_code), (200, b'0123456789', 404))
    test_eq((part.status_code, part.content, part.headers['Content-Range']), (206, b'456789', 'bytes 4-9/10'))
    [(o['path'], o['start'], o['whole']) for o in server.log]

    def seen(kind):
        with StandIn({'/a.jpg': b'0123456789'}, share=1, kinds=[kind]) as server:
            try: r = requests.get(server.url+'/a.jpg', timeout=5)
            except requests.RequestException as e: return type(e).__name__
        return r.status_code, r.headers.get('Retry-After'), r.content

    {o: seen(o) for o in faults}

    test_eq(seen('short'), (200, None, b'01234'))
    test_eq(seen('html')[2][:6], b'<html>')
    test_eq(seen('cut'), 'ChunkedEncodingError')


def test_the_feeds_of_raw_images():
    records = [perseverance_record('', 10, i) for i in range(5)]
    feed = FeedPages(records, cap=2, late=2)
    ask = dict(condition_2='10:sol:gte', condition_3='10:sol:lte', search='|NAVCAM_LEFT')
    first,second = (feed({**ask, 'page': str(i)}, None) for i in range(2))
    test_eq((first['total_results'], second['total_results']), (4, 5))
    test_eq(first['images'][1], second['images'][0])
    list(first), first['page']

    with rover_stand_in('curiosity', [7, 8], each=4) as server:
        page = requests.get(server.url+'/api/v1/raw_image_items/?per_page=200&page=0&condition_2=7:sol:gte&condition_3=7:sol:lte&search=NAV_LEFT_B|MAST_LEFT').json()
        picture = requests.get(page['items'][0]['https_url']).content
    test_eq((page['total'], len(page['items'])), (5, 5))
    test_eq(Image.open(io.BytesIO(picture)).size, (32, 32))
    test_eq(len(set(server.files.values())), 10)
    page['items'][0]
