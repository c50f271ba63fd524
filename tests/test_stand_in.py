"The server that answers like the archives' servers, and breaks like them."
import io

import requests
from fastcore.test import test_eq
from PIL import Image
from stand_in import FeedPages, StandIn, faults, perseverance_record, rover_stand_in

CONTENT = b'0123456789'


def test_faults_are_drawn_by_the_seed():
    def drawn(seed):
        server = StandIn({}, share=.4, seed=seed)
        server.http.server_close()
        return [server.fault()[0] for _ in range(12)]

    test_eq(drawn(1), drawn(1))
    assert drawn(1) != drawn(2)


def test_a_file_and_a_part_of_it():
    with StandIn({'/a.jpg': CONTENT}) as server:
        whole = requests.get(server.url+'/a.jpg')
        missing = requests.get(server.url+'/b.jpg')
        rest = {'Range': 'bytes=4-', 'If-Range': whole.headers['ETag']}
        part = requests.get(server.url+'/a.jpg', headers=rest)
        other = requests.get(server.url+'/a.jpg', headers=rest | {'If-Range': '"another"'})
    test_eq((whole.status_code, whole.content), (200, CONTENT))
    test_eq(missing.status_code, 404)
    test_eq((part.status_code, part.content), (206, CONTENT[4:]))
    test_eq(part.headers['Content-Range'], 'bytes 4-9/10')
    test_eq((other.status_code, other.content), (200, CONTENT))
    test_eq([(entry['path'], entry['start'], entry['whole']) for entry in server.log],
            [('/a.jpg', 0, True), ('/b.jpg', 0, False), ('/a.jpg', 4, False), ('/a.jpg', 0, True)])


def test_every_fault():
    def seen(kind):
        with StandIn({'/a.jpg': CONTENT}, share=1, kinds=[kind]) as server:
            try: answer = requests.get(server.url+'/a.jpg', timeout=5)
            except requests.RequestException as e: return type(e).__name__
        return answer.status_code, answer.headers.get('Retry-After'), answer.content

    found = {kind: seen(kind) for kind in faults}
    test_eq(found['error'], (500, None, b''))
    test_eq(found['busy'][0], 429)
    test_eq(found['busy'][1], '1')
    test_eq(found['cut'], 'ChunkedEncodingError')
    test_eq(found['drop'], 'ConnectionError')
    test_eq(found['short'], (200, None, CONTENT[:5]))
    test_eq(found['html'][2][:6], b'<html>')
    test_eq(found['drip'], (200, None, CONTENT))


def test_the_feeds_of_raw_images():
    records = [perseverance_record('', 10, i) for i in range(5)]
    feed = FeedPages(records, cap=2, late=2)
    ask = dict(condition_2='10:sol:gte', condition_3='10:sol:lte', search='|NAVCAM_LEFT')
    first = feed({**ask, 'page': '0'}, None)
    second = feed({**ask, 'page': '1'}, None)
    test_eq((first['total_results'], second['total_results']), (4, 5))
    test_eq(first['images'][1], second['images'][0])
    test_eq((first['page'], second['page']), ('0', '1'))


def test_a_rover():
    query = ('per_page=200&page=0&condition_2=7:sol:gte&condition_3=7:sol:lte'
             '&search=NAV_LEFT_B|MAST_LEFT')
    with rover_stand_in('curiosity', [7, 8], each=4) as server:
        page = requests.get(f'{server.url}/api/v1/raw_image_items/?{query}').json()
        picture = requests.get(page['items'][0]['https_url']).content
    test_eq((page['total'], len(page['items'])), (5, 5))
    test_eq(Image.open(io.BytesIO(picture)).size, (32, 32))
    test_eq(len(set(server.files.values())), 10)
