"The archives over a network that fails: what is asked for, what is left when a process is killed, and what is said where nothing can be done."
import hashlib
import io
import json
import os
import random
import signal
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
from forked import forks

from marsclr.archives.zenodo import records, unpack
from marsclr.engine.files import MarsclrError
from marsclr.datasets import hirise, image_folder
from marsclr.archives.downloads import Fault, Fetcher, exclusive_folder, get_file, get_json
from marsclr.archives.fetch import marsclr_fetch
from stand_in import StandIn, faults, pictures, rover_stand_in

QUICK = '--rate 2000 --wait .01 --patience .3'


def execute(line, mirror, out):
    "The command, in a process that multiprocessing made"
    for fd in (1, 2): os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
    os.environ['MARSCLR_MIRROR'] = mirror
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without
    marsclr_fetch(f'{line} {QUICK}'.split())


def start(line, server, out):
    process = forks.Process(target=execute, args=(line, getattr(server, 'url', server), out), daemon=True)
    process.start()
    return process


def finish(line, server, out):
    "Exit status and what the command said"
    process = start(line, server, out)
    process.join(120)
    assert process.exitcode is not None, 'it hangs'
    return process.exitcode, out.read_text()


def images(folder): return {o.name for o in folder.glob('[0-9]*/[A-Z]*')}


def wait_for(process, condition, out):
    began = time.monotonic()
    while not condition():
        assert process.is_alive() and time.monotonic() - began < 120, out.read_text()
        time.sleep(.002)


def test_2000_images_with_every_fault_and_five_kills(tmp_path):
    folder, kinds = tmp_path/'perseverance', (*faults, *2*[o for o in faults if o != 'busy'])  # who is asked to wait does so for a second
    line = f'perseverance --sols 10-29 --to {folder}'
    with rover_stand_in('perseverance', range(10, 30), each=100, feed=dict(cap=50), share=.05, kinds=kinds, seed=1) as server:
        before = []  # what was there at each kill, and the requests until then
        for kill in (('*.json', 5), 300, 700, 1200, 1700):
            process = start(line, server, tmp_path/'out')
            wait_for(process, lambda: len(list((folder/'.fetch').glob('*.json'))) >= 5 if isinstance(kill, tuple) else len(images(folder)) >= kill, tmp_path/'out')
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL and not (folder/'table.csv').exists()
            time.sleep(.2)  # the server finishes what was asked of it
            before.append((images(folder), {o.name for o in (folder/'.fetch').glob('[0-9]*.json')}, len(server.log)))
        status, said = finish(line, server, tmp_path/'out')
    assert status == 0, said
    full = {o['imageid']: o for o in server.records if o['sample_type'] == 'Full'}
    table = pd.read_csv(folder/'table.csv')
    assert len(full) == 2000 and set(table.id) == set(full) and table.notna()[['sha256', 'camera', 'taken', 'title']].to_numpy().all()
    for o in table.itertuples(): assert (folder/o.path).read_bytes() == server.files[urlsplit(o.url).path]
    assert {o.name for o in folder.rglob('*.part*')} == set() and not (folder/'.fetch').exists()
    assert {o['fault'] for o in server.log} == {'', *faults}
    for there, sols, n in before:  # what had its name when the process died was never asked for again
        again = {Path(o['path']).name.replace('_1200', '') for o in server.log[n:]}
        assert not there & again
        assert not {f'{int(o["query"]["condition_2"][:2]):05d}.json' for o in server.log[n:] if 'condition_2' in o['query']} & sols
    whole = Counter(o['path'] for o in server.log if o['whole'] and o['path'].endswith('.jpg'))
    assert sum(whole.values()) - len(whole) <= 4*len(before)  # at most what four connections had on the way when it died
    pages = [o for o in server.log if o['path'] == '/rss/api/' and not o['fault'] and 'page' in o['query']]
    assert len({(o['query']['condition_2'], o['query']['page']) for o in pages if int(o['query']['page']) < 2}) == 40


# as shared by the feeds' known clients, in words
REQUESTS = {
    'perseverance': 'https://mars.nasa.gov/rss/api/?feed=raw_images&category=mars2020&feedtype=json&ver=1.2&num=100&page=0&order=sol+desc'
                    '&search=|NAVCAM_LEFT|NAVCAM_RIGHT&condition_2=10:sol:gte&condition_3=10:sol:lte&extended=sample_type::full',
    'curiosity': 'https://mars.nasa.gov/api/v1/raw_image_items/?order=sol desc,instrument_sort asc,sample_type_sort asc,date_taken desc&per_page=200&page=0'
                 '&condition_1=msl:mission&condition_2=10:sol:gte&condition_3=10:sol:lte&search=NAV_LEFT_B|NAV_RIGHT_B&extended=thumbnail::sample_type::noteq'}
LATEST = {'perseverance': 'https://mars.nasa.gov/rss/api/?feed=raw_images&category=mars2020&feedtype=json&ver=1.2&latest=true',
          'curiosity': 'https://mars.nasa.gov/api/v1/raw_image_items/msl/latest/'}


def words(url): return urlsplit(url).path, {k: v[0] for k, v in parse_qs(urlsplit(url).query, keep_blank_values=True).items()}


@pytest.mark.parametrize('rover', REQUESTS)
def test_the_exact_requests(rover, tmp_path, monkeypatch):
    seen = []
    def send(session, request, **kwargs):
        seen.append(request.url)
        return original(session, request, **kwargs)
    original = __import__('requests').Session.send
    monkeypatch.setattr('requests.Session.send', send)
    with rover_stand_in(rover, [10], each=3) as server:
        monkeypatch.setenv('MARSCLR_MIRROR', server.url)
        cameras = words(REQUESTS[rover])[1]['search'].strip('|').replace('|', ',')
        marsclr_fetch(f'{rover} --sols 10 --cameras {cameras} --to {tmp_path/rover} {QUICK}'.split())
    seen = [o.replace(server.url, 'https://mars.nasa.gov') for o in seen]
    assert [words(o) for o in seen[:2]] == [words(LATEST[rover]), words(REQUESTS[rover])]
    assert all(o.isascii() and not set(o) & set(' |') and '%2B' not in o for o in seen)  # blanks travel as +, never as %2B
    named = {o['image_files']['large'] if rover == 'perseverance' else o['https_url'] for o in server.records if (o.get('instrument') or o['camera']['instrument']) in cameras}
    assert {o for o in seen[2:]} <= {o.replace(server.url, 'https://mars.nasa.gov') for o in named} and len(seen) > 2


@pytest.mark.parametrize('what', ['perseverance --sols 10', 'curiosity --sols 10', 'msl', 'hirise'])
@pytest.mark.parametrize('mirror', ['http://127.0.0.1:9', 'http://nowhere.invalid'])
def test_without_a_network_one_line_at_once(what, mirror, tmp_path):
    began = time.monotonic()
    status, said = finish(f'{what} --to {tmp_path/"new"}', mirror, tmp_path/'out')
    assert status == 1 and time.monotonic() - began < 10
    assert len(said.splitlines()) == 1 and said.startswith('marsclr_fetch: no connection to ') and 'check the network' in said
    assert os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize('number, word, status', [(signal.SIGINT, 'interrupted', 1), (signal.SIGTERM, 'stopped', 128+signal.SIGTERM)])
def test_an_interrupted_folder_goes_on(number, word, status, tmp_path):
    line = f'curiosity --sols 10-12 --to {tmp_path/"curiosity"}'
    with rover_stand_in('curiosity', range(10, 13), each=100) as server:
        process = start(line + ' --connections 1', server, tmp_path/'out')
        wait_for(process, lambda: len(images(tmp_path/'curiosity')) > 50, tmp_path/'out')
        os.kill(process.pid, number)
        process.join(20)
        said = (tmp_path/'out').read_text()
        assert process.exitcode == status and 'Traceback' not in said
        assert said.splitlines()[-1].startswith(f'marsclr_fetch: {word}') and 'the same command goes on' in said.splitlines()[-1]
        assert 50 < len(images(tmp_path/'curiosity')) < 300
        n, there = len(server.log), images(tmp_path/'curiosity')
        assert finish(line, server, tmp_path/'out')[0] == 0
        assert not {Path(o['path']).name.replace('.JPG', '.jpg') for o in server.log[n:]} & there
    assert len(image_folder(tmp_path/'curiosity')) == 300


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full here')
def test_a_full_disk_is_one_line_and_goes_on(tmp_path):
    folder = tmp_path/'perseverance'
    with rover_stand_in('perseverance', [10], each=9) as server:
        part = folder/'0010'/f'.{server.records[0]["imageid"]}.jpg.part'
        part.parent.mkdir(parents=True)
        part.symlink_to('/dev/full')
        part.with_name(part.name + '.json').write_text(json.dumps(dict(version='"1"', length=9)))
        status, said = finish(f'perseverance --sols 10 --to {folder}', server, tmp_path/'out')
        assert status == 1 and 'Traceback' not in said
        assert said.splitlines()[-1].startswith('marsclr_fetch: no room is left') and not (folder/'table.csv').exists()
        part.unlink()
        assert finish(f'perseverance --sols 10 --to {folder}', server, tmp_path/'out')[0] == 0
    assert len(image_folder(folder)) == 9


def test_a_second_process_is_refused(tmp_path):
    with rover_stand_in('perseverance', [10], each=3) as server, exclusive_folder(tmp_path/'perseverance'):
        status, said = finish(f'perseverance --sols 10 --to {tmp_path/"perseverance"}', server, tmp_path/'out')
    assert status == 1 and 'another process' in said.splitlines()[-1]


def test_what_is_gone_is_named_and_asked_for_again(tmp_path):
    line = f'perseverance --sols 10 --to {tmp_path/"p"}'
    with rover_stand_in('perseverance', [10], each=20) as server:
        path = urlsplit(server.records[3]['image_files']['large']).path
        jpeg = server.files.pop(path)
        status, said = finish(line, server, tmp_path/'out')
        assert status == 1 and said.splitlines()[-1].startswith('marsclr_fetch: 1 missing') and 'status 404' in said
        assert len(pd.read_csv(tmp_path/'p'/'table.csv')) == 19 and pd.read_csv(tmp_path/'p'/'missing.csv').id.tolist() == [server.records[3]['imageid']]
        server.files[path], n = jpeg, len(server.log)
        assert finish(line, server, tmp_path/'out')[0] == 0
    assert len(server.log) == n + 2 and not (tmp_path/'p'/'missing.csv').exists()  # the newest sol, and that image
    assert len(pd.read_csv(tmp_path/'p'/'table.csv')) == 20


def test_a_sol_that_cannot_be_listed_stops_nothing_else(tmp_path):
    line = f'perseverance --sols 10-12 --to {tmp_path/"p"}'
    with rover_stand_in('perseverance', [10, 11, 12], each=5) as server:
        server.pages['/rss/api/'] = lambda query, server: server.feed(query, server) if query.get('condition_2') != '11:sol:gte' else 1/0
        status, said = finish(line, server, tmp_path/'out')
        assert status == 1 and '1 missing' in said.splitlines()[-1] and 'sol 11: cannot be listed' in said.splitlines()[-1]
        assert pd.read_csv(tmp_path/'p'/'table.csv').sol.tolist() == 5*[10] + 5*[12]
        assert 'nothing can be drawn yet' in finish(line.replace('/p', '/q') + ' --images 3', server, tmp_path/'out')[1].splitlines()[-1]
        server.pages['/rss/api/'], n = server.feed, len(server.log)
        assert finish(line, server, tmp_path/'out')[0] == 0
        assert {o['query']['condition_2'] for o in server.log[n:] if 'page' in o['query']} == {'11:sol:gte'}
    assert len(pd.read_csv(tmp_path/'p'/'table.csv')) == 15


def test_another_request_for_the_same_folder_is_refused(tmp_path):
    with rover_stand_in('perseverance', [10, 11], each=3) as server:
        assert finish(f'perseverance --sols 10 --to {tmp_path/"p"}', server, tmp_path/'out')[0] == 0
        status, said = finish(f'perseverance --sols 11 --to {tmp_path/"p"}', server, tmp_path/'out')
    assert status == 1 and 'was begun with sols [10, 10], not [11, 11]' in said.splitlines()[-1]


def test_a_manifest_brings_the_same_images_again(tmp_path):
    with rover_stand_in('perseverance', [10], each=9) as server:
        assert finish(f'perseverance --sols 10 --to {tmp_path/"p"}', server, tmp_path/'out')[0] == 0
        manifest = tmp_path/'p'/'table.csv'
        for _ in range(2): assert finish(f'perseverance --manifest {manifest} --to {tmp_path/"again"}', server, tmp_path/'out')[0] == 0
        status, said = finish(f'curiosity --manifest {manifest} --to {tmp_path/"c"}', server, tmp_path/'out')
        assert status == 1 and 'is a manifest of Perseverance, not of curiosity' in said.splitlines()[-1]
        status, said = finish(f'perseverance --manifest {manifest} --to {tmp_path/"p"}', server, tmp_path/'out')
        assert status == 1 and 'was begun with manifest None' in said.splitlines()[-1]
        spoiled = next((tmp_path/'again').rglob('*.jpg'))
        spoiled.write_bytes(spoiled.read_bytes()[:-1] + b'x')
        assert finish(f'perseverance --manifest {manifest} --to {tmp_path/"again"}', server, tmp_path/'out')[0] == 0
    assert (tmp_path/'again'/'table.csv').read_bytes() == manifest.read_bytes()
    assert spoiled.read_bytes() == (tmp_path/'p'/spoiled.relative_to(tmp_path/'again')).read_bytes()


def test_hirise_comes_in_the_layout_that_its_reader_reads(tmp_path, monkeypatch):
    names = [f'ESP_01128{i}_2265_RED-0030.jpg' for i in range(3)]
    files = {'landmarks_map-proj-v3_2_classmap.csv': '0,other\n1,crater\n', **{f'map-proj-v3_2/{n}': o for n, o in zip(names, pictures(3))},
             'labels-map-proj_v3_2_train_val_test.txt': ''.join(f'{n} 1 {s}\n' for n, s in zip(names, ('train', 'val', 'test')))*2}
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as z:
        for k, v in files.items(): z.writestr(f'hirise-map-proj-v3_2/{k}', v)
        z.writestr('__MACOSX/hirise-map-proj-v3_2/._x', 'x')
    body = buffer.getvalue()
    md5 = hashlib.md5(body).hexdigest()
    monkeypatch.setitem(records['hirise'], 'md5', md5)
    page = lambda query, server: dict(files=[dict(key='hirise-map-proj-v3_2.zip', size=len(body), checksum=f'md5:{md5}', links=dict(self=server.url+'/zip'))])
    with StandIn({'/zip': body}, {'/api/records/4002935': page}) as server:
        monkeypatch.setenv('MARSCLR_MIRROR', server.url)
        monkeypatch.setenv('MARSCLR_DATA', str(tmp_path))
        for _ in range(2): marsclr_fetch(['hirise'])
        assert len(server.log) == 2
    archive = hirise()
    assert archive.table.split.tolist() == ['train', 'val', 'test'] and archive.open(0).size == (32, 32)


def test_a_draw_is_the_same_whatever_came_first(tmp_path):
    with rover_stand_in('curiosity', range(10, 14), each=25) as server:
        for name, more in (('a', '--images 30'), ('b', '--images 30'), ('c', '--images 40'), ('d', '--images 30 --seed 1')):
            assert finish(f'curiosity --sols 10-13 --to {tmp_path/name} {more}', server, tmp_path/'out')[0] == 0
    a, b, c, d = (set(pd.read_csv(tmp_path/o/'table.csv').id) for o in 'abcd')
    assert len(a) == 30 and a == b and a < c and a != d


@pytest.mark.parametrize('changed, starts', [(False, [0, 1]), (True, [0, 0])])
def test_a_part_is_continued_only_while_the_file_is_the_same(changed, starts, tmp_path):
    one, two = pictures(2, 64)
    fetcher = Fetcher(rate=1000, wait=.01, patience=.3, tries=1)
    with StandIn({'/a.jpg': one}, share=1, kinds=['cut']) as server:
        with pytest.raises(Fault): get_file(fetcher, server.url+'/a.jpg', tmp_path/'a.jpg')
        server.share = 0
        if changed: server.files['/a.jpg'] = two
        n = len(server.log)
        get_file(fetcher, server.url+'/a.jpg', tmp_path/'a.jpg')
        assert [o['start'] > 0 for o in server.log[n:]] == [bool(starts[1])]
    assert (tmp_path/'a.jpg').read_bytes() == (two if changed else one)


def test_nobody_asks_while_the_server_wants_to_be_left_alone(tmp_path):
    with StandIn({'/a.jpg': pictures(1)[0]}, {'/page': lambda query, server: {}}) as server:
        server.fault = lambda: ('busy', 1) if not server.log else ('', 0)  # `Retry-After: 1`
        fetcher, began = Fetcher(rate=1000, wait=.01), time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(get_file, fetcher, server.url+'/a.jpg', tmp_path/'a.jpg')
            time.sleep(.2)
            others = [pool.submit(get_json, fetcher, server.url+'/page') for _ in range(3)]
            time.sleep(.5)
            assert len(server.log) == 1 and not any(o.done() for o in (first, *others))
        assert time.monotonic() - began > 1 and len(server.log) == 5


def test_no_more_requests_a_second_than_wanted():
    with StandIn({}, {'/page': lambda query, server: {}}) as server, ThreadPoolExecutor(4) as pool:
        fetcher, began = Fetcher(rate=20), time.monotonic()
        list(pool.map(lambda i: get_json(fetcher, server.url+'/page'), range(11)))
    assert .5 <= time.monotonic() - began


def test_an_outage_in_the_night_is_waited_out(tmp_path):
    jpeg = pictures(1)[0]
    server = StandIn({'/a.jpg': jpeg, '/b.jpg': jpeg})
    fetcher = Fetcher(rate=1000, wait=.01, tries=2)
    with server: get_file(fetcher, server.url+'/a.jpg', tmp_path/'a.jpg')
    fetcher.session.close()
    def back():
        time.sleep(1)
        return StandIn(server.files, port=server.http.server_port).__enter__()
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(back)
        get_file(fetcher, server.url+'/b.jpg', tmp_path/'b.jpg')  # many more tries than two
        later.result().__exit__()
    fetcher.session.close()
    fetcher.outage = .5
    with pytest.raises(MarsclrError, match='no connection .* goes on from here once it is back'): get_file(fetcher, server.url+'/c.jpg', tmp_path/'c.jpg')


def test_damaged_zip_files_are_refused_or_right(tmp_path):
    good = io.BytesIO()
    with zipfile.ZipFile(good, 'w', zipfile.ZIP_DEFLATED) as z:
        for i, o in enumerate(pictures(8)): z.writestr(f'top/{i}.jpg', o)
    content, draw, refused = {f'{i}.jpg': o for i, o in enumerate(pictures(8))}, random.Random(0), 0
    for k in range(120):
        data = bytearray(good.getvalue())
        for _ in range(draw.randrange(1, 4)): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path/'a.zip').write_bytes(data[:draw.randrange(len(data))] if k % 10 == 0 else data)
        try: unpack(tmp_path/'a.zip', tmp_path/str(k))
        except (MarsclrError, OSError): refused += 1
        else: assert set(content.values()) >= {o.read_bytes() for o in (tmp_path/str(k)).rglob('*.*')}
        assert {o.name for o in tmp_path.iterdir()} <= {'a.zip', *map(str, range(k+1))}
    assert refused > 80
