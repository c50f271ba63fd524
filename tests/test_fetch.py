"""The archives over a network that fails: what is asked for, what is left when a process is killed,
and what is said where nothing can be done."""
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
import requests
from forked import forks

from marsclr.archives.downloads import exclusive_folder, get_file
from marsclr.archives.fetch import marsclr_fetch
from marsclr.archives.fetcher import Fault, Fetcher, get_json
from marsclr.archives.zenodo import records, unpack
from marsclr.datasets import hirise, image_folder
from marsclr.engine.files import MarsclrError
from stand_in import StandIn, faults, pictures, rover_stand_in

QUICK = '--rate 2000 --wait .01 --patience .3'
NASA = 'https://mars.nasa.gov'


def execute(line, mirror, out):
    "The command, in a process that multiprocessing made"
    for stream in (1, 2): os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ['MARSCLR_MIRROR'] = mirror
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    marsclr_fetch(f'{line} {QUICK}'.split())


def start(line, server, out):
    address = getattr(server, 'url', server)
    process = forks.Process(target=execute, args=(line, address, out), daemon=True)
    process.start()
    return process


def finish(line, server, out):
    "Exit status and what the command said"
    process = start(line, server, out)
    process.join(120)
    assert process.exitcode is not None, 'it hangs'
    return process.exitcode, out.read_text()


def succeed(line, server, out):
    status, said = finish(line, server, out)
    assert status == 0, said


def fail(line, server, out):
    "The last line of a command that fails"
    status, said = finish(line, server, out)
    assert status == 1, said
    assert 'Traceback' not in said
    return said.splitlines()[-1]


def images(folder): return {path.name for path in folder.glob('[0-9]*/[A-Z]*')}


def listed(folder): return {path.name for path in (folder/'.fetch').glob('[0-9]*.json')}


def wait_for(process, condition, out):
    began = time.monotonic()
    while not condition():
        assert process.is_alive() and time.monotonic() - began < 120, out.read_text()
        time.sleep(.002)


def sols_asked(log):
    queries = [entry['query'] for entry in log]
    return [query['condition_2'] for query in queries if 'condition_2' in query]


def test_2000_images_with_every_fault_and_five_kills(tmp_path):
    folder = tmp_path/'perseverance'
    out = tmp_path/'out'
    line = f'perseverance --sols 10-29 --to {folder}'
    kinds = (*faults, *2*[fault for fault in faults if fault != 'busy'])  # 'busy' costs a second
    how = dict(each=100, feed=dict(cap=50), share=.05, kinds=kinds, seed=1)
    kills = [lambda: len(listed(folder)) >= 5]
    kills += [lambda n=n: len(images(folder)) >= n for n in (300, 700, 1200, 1700)]
    before = []  # what was there at each kill, and the requests until then
    with rover_stand_in('perseverance', range(10, 30), **how) as server:
        for condition in kills:
            process = start(line, server, out)
            wait_for(process, condition, out)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert not (folder/'table.csv').exists()
            time.sleep(.2)  # the server finishes what was asked of it
            before.append((images(folder), listed(folder), len(server.log)))
        succeed(line, server, out)

    full = {record['imageid'] for record in server.records if record['sample_type'] == 'Full'}
    table = pd.read_csv(folder/'table.csv')
    assert len(full) == 2000 and set(table.id) == full
    assert table.notna()[['sha256', 'camera', 'taken', 'title']].to_numpy().all()
    for row in table.itertuples():
        assert (folder/row.path).read_bytes() == server.files[urlsplit(row.url).path]
    assert not list(folder.rglob('*.part*')) and not (folder/'.fetch').exists()
    assert {entry['fault'] for entry in server.log} == {'', *faults}

    for there, sols, n in before:  # what had its name at the kill was never asked for again
        later = server.log[n:]
        assert not there & {Path(entry['path']).name.replace('_1200', '') for entry in later}
        assert not sols & {f'{int(sol[:2]):05d}.json' for sol in sols_asked(later)}
    whole = Counter(entry['path'] for entry in server.log
                    if entry['whole'] and entry['path'].endswith('.jpg'))
    on_the_way = 4*len(before)  # four connections, each time that it died
    assert sum(whole.values()) - len(whole) <= on_the_way
    pages = {(entry['query']['condition_2'], int(entry['query']['page'])) for entry in server.log
             if entry['path'] == '/rss/api/' and not entry['fault'] and 'page' in entry['query']}
    assert len([page for sol, page in pages if page < 2]) == 40


# as shared by the feeds' known clients, in words
REQUESTS = {
    'perseverance': f'{NASA}/rss/api/?feed=raw_images&category=mars2020&feedtype=json&ver=1.2'
                    '&num=100&page=0&order=sol+desc&search=|NAVCAM_LEFT|NAVCAM_RIGHT'
                    '&condition_2=10:sol:gte&condition_3=10:sol:lte&extended=sample_type::full',
    'curiosity': f'{NASA}/api/v1/raw_image_items/?order=sol desc,instrument_sort asc,'
                 'sample_type_sort asc,date_taken desc&per_page=200&page=0'
                 '&condition_1=msl:mission&condition_2=10:sol:gte&condition_3=10:sol:lte'
                 '&search=NAV_LEFT_B|NAV_RIGHT_B&extended=thumbnail::sample_type::noteq'}
LATEST = {
    'perseverance': f'{NASA}/rss/api/?feed=raw_images&category=mars2020&feedtype=json&ver=1.2'
                    '&latest=true',
    'curiosity': f'{NASA}/api/v1/raw_image_items/msl/latest/'}


def words(url):
    "Path and query of an address, decoded"
    at = urlsplit(url)
    query = parse_qs(at.query, keep_blank_values=True)
    return at.path, {name: values[0] for name, values in query.items()}


def addresses(rover, records, cameras):
    "Where the images of some cameras are"
    for record in records:
        if rover == 'perseverance' and record['camera']['instrument'] in cameras:
            yield record['image_files']['large']
        if rover == 'curiosity' and record['instrument'] in cameras: yield record['https_url']


@pytest.mark.parametrize('rover', REQUESTS)
def test_the_exact_requests(rover, tmp_path, monkeypatch):
    seen = []
    original = requests.Session.send
    def send(session, request, **kwargs):
        seen.append(request.url)
        return original(session, request, **kwargs)
    monkeypatch.setattr('requests.Session.send', send)
    cameras = words(REQUESTS[rover])[1]['search'].strip('|').replace('|', ',')
    with rover_stand_in(rover, [10], each=3) as server:
        monkeypatch.setenv('MARSCLR_MIRROR', server.url)
        line = f'{rover} --sols 10 --cameras {cameras} --to {tmp_path/rover} {QUICK}'
        marsclr_fetch(line.split())
    seen = [url.replace(server.url, NASA) for url in seen]
    assert [words(url) for url in seen[:2]] == [words(LATEST[rover]), words(REQUESTS[rover])]
    for url in seen:  # blanks travel as +, never as %2B
        assert url.isascii() and not set(url) & set(' |') and '%2B' not in url
    named = {url.replace(server.url, NASA) for url in addresses(rover, server.records, cameras)}
    assert len(seen) > 2 and set(seen[2:]) <= named


@pytest.mark.parametrize('what', ['perseverance --sols 10', 'curiosity --sols 10', 'msl', 'hirise'])
@pytest.mark.parametrize('mirror', ['http://127.0.0.1:9', 'http://nowhere.invalid'])
def test_without_a_network_one_line_at_once(what, mirror, tmp_path):
    began = time.monotonic()
    status, said = finish(f'{what} --to {tmp_path/"new"}', mirror, tmp_path/'out')
    assert status == 1 and time.monotonic() - began < 10
    assert len(said.splitlines()) == 1
    assert said.startswith('marsclr_fetch: no connection to ') and 'check the network' in said
    assert os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize('number, word, status', [
    (signal.SIGINT, 'interrupted', 1), (signal.SIGTERM, 'stopped', 128+signal.SIGTERM)])
def test_an_interrupted_folder_goes_on(number, word, status, tmp_path):
    folder = tmp_path/'curiosity'
    out = tmp_path/'out'
    line = f'curiosity --sols 10-12 --to {folder}'
    with rover_stand_in('curiosity', range(10, 13), each=100) as server:
        process = start(line + ' --connections 1', server, out)
        wait_for(process, lambda: len(images(folder)) > 50, out)
        os.kill(process.pid, number)
        process.join(20)
        said = out.read_text()
        assert process.exitcode == status and 'Traceback' not in said
        last = said.splitlines()[-1]
        assert last.startswith(f'marsclr_fetch: {word}') and 'the same command goes on' in last
        there = images(folder)
        assert 50 < len(there) < 300
        n = len(server.log)
        succeed(line, server, out)
        asked = {Path(entry['path']).name.replace('.JPG', '.jpg') for entry in server.log[n:]}
        assert not asked & there
    assert len(image_folder(folder)) == 300


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full here')
def test_a_full_disk_is_one_line_and_goes_on(tmp_path):
    folder = tmp_path/'perseverance'
    line = f'perseverance --sols 10 --to {folder}'
    with rover_stand_in('perseverance', [10], each=9) as server:
        part = folder/'0010'/f'.{server.records[0]["imageid"]}.jpg.part'
        part.parent.mkdir(parents=True)
        part.symlink_to('/dev/full')
        notes = part.with_name(part.name + '.json')
        notes.write_text(json.dumps(dict(version='"1"', length=9)))
        last = fail(line, server, tmp_path/'out')
        assert last.startswith('marsclr_fetch: no room is left')
        assert not (folder/'table.csv').exists()
        part.unlink()
        succeed(line, server, tmp_path/'out')
    assert len(image_folder(folder)) == 9


def test_a_second_process_is_refused(tmp_path):
    folder = tmp_path/'perseverance'
    with rover_stand_in('perseverance', [10], each=3) as server, exclusive_folder(folder):
        last = fail(f'perseverance --sols 10 --to {folder}', server, tmp_path/'out')
    assert 'another process' in last


def test_what_is_gone_is_named_and_asked_for_again(tmp_path):
    folder = tmp_path/'p'
    line = f'perseverance --sols 10 --to {folder}'
    with rover_stand_in('perseverance', [10], each=20) as server:
        gone = server.records[3]
        path = urlsplit(gone['image_files']['large']).path
        jpeg = server.files.pop(path)
        last = fail(line, server, tmp_path/'out')
        assert last.startswith('marsclr_fetch: 1 missing') and 'status 404' in last
        assert len(pd.read_csv(folder/'table.csv')) == 19
        assert pd.read_csv(folder/'missing.csv').id.tolist() == [gone['imageid']]
        server.files[path] = jpeg
        n = len(server.log)
        succeed(line, server, tmp_path/'out')
    assert len(server.log) == n + 2  # the newest sol, and that image
    assert not (folder/'missing.csv').exists()
    assert len(pd.read_csv(folder/'table.csv')) == 20


def test_a_sol_that_cannot_be_listed_stops_nothing_else(tmp_path):
    line = f'perseverance --sols 10-12 --to {tmp_path/"p"}'
    out = tmp_path/'out'
    with rover_stand_in('perseverance', [10, 11, 12], each=5) as server:
        def broken(query, server):
            assert query.get('condition_2') != '11:sol:gte'
            return server.feed(query, server)
        server.pages['/rss/api/'] = broken
        last = fail(line, server, out)
        assert '1 missing' in last and 'sol 11: cannot be listed' in last
        assert pd.read_csv(tmp_path/'p'/'table.csv').sol.tolist() == 5*[10] + 5*[12]
        draw = line.replace('/p', '/q') + ' --images 3'
        assert 'nothing can be drawn yet' in fail(draw, server, out)
        server.pages['/rss/api/'] = server.feed
        n = len(server.log)
        succeed(line, server, out)
        assert set(sols_asked(server.log[n:])) == {'11:sol:gte'}
    assert len(pd.read_csv(tmp_path/'p'/'table.csv')) == 15


def test_another_request_for_the_same_folder_is_refused(tmp_path):
    with rover_stand_in('perseverance', [10, 11], each=3) as server:
        succeed(f'perseverance --sols 10 --to {tmp_path/"p"}', server, tmp_path/'out')
        last = fail(f'perseverance --sols 11 --to {tmp_path/"p"}', server, tmp_path/'out')
    assert 'was begun with sols [10, 10], not [11, 11]' in last


def test_a_manifest_brings_the_same_images_again(tmp_path):
    out = tmp_path/'out'
    first = tmp_path/'p'
    again = tmp_path/'again'
    with rover_stand_in('perseverance', [10], each=9) as server:
        succeed(f'perseverance --sols 10 --to {first}', server, out)
        manifest = first/'table.csv'
        line = f'perseverance --manifest {manifest} --to {again}'
        for _ in range(2): succeed(line, server, out)
        last = fail(f'curiosity --manifest {manifest} --to {tmp_path/"c"}', server, out)
        assert 'is a manifest of Perseverance, not of curiosity' in last
        last = fail(f'perseverance --manifest {manifest} --to {first}', server, out)
        assert 'was begun with manifest None' in last
        spoiled = next(again.rglob('*.jpg'))
        spoiled.write_bytes(spoiled.read_bytes()[:-1] + b'x')
        succeed(line, server, out)
    assert (again/'table.csv').read_bytes() == manifest.read_bytes()
    assert spoiled.read_bytes() == (first/spoiled.relative_to(again)).read_bytes()


def hirise_zip():
    "Three images in the layout of the release, with each label twice"
    names = [f'ESP_01128{i}_2265_RED-0030.jpg' for i in range(3)]
    splits = ('train', 'val', 'test')
    labels = ''.join(f'{name} 1 {split}\n' for name, split in zip(names, splits))
    files = {f'map-proj-v3_2/{name}': jpeg for name, jpeg in zip(names, pictures(3))}
    files['landmarks_map-proj-v3_2_classmap.csv'] = '0,other\n1,crater\n'
    files['labels-map-proj_v3_2_train_val_test.txt'] = labels*2
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z:
        for name, content in files.items(): z.writestr(f'hirise-map-proj-v3_2/{name}', content)
        z.writestr('__MACOSX/hirise-map-proj-v3_2/._x', 'x')
    return buffer.getvalue()


def test_hirise_comes_in_the_layout_that_its_reader_reads(tmp_path, monkeypatch):
    content = hirise_zip()
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(records['hirise'], 'md5', md5)
    file = dict(key='hirise-map-proj-v3_2.zip', size=len(content), checksum=f'md5:{md5}')
    def page(query, server): return dict(files=[file | dict(links=dict(self=server.url+'/zip'))])
    with StandIn({'/zip': content}, {'/api/records/4002935': page}) as server:
        monkeypatch.setenv('MARSCLR_MIRROR', server.url)
        monkeypatch.setenv('MARSCLR_DATA', str(tmp_path))
        for _ in range(2): marsclr_fetch(['hirise'])
        assert len(server.log) == 2
    archive = hirise()
    assert archive.table.split.tolist() == ['train', 'val', 'test']
    assert archive.open(0).size == (32, 32)


def test_a_draw_is_the_same_whatever_came_first(tmp_path):
    asked = dict(a='--images 30', b='--images 30', c='--images 40', d='--images 30 --seed 1')
    drawn = {}
    with rover_stand_in('curiosity', range(10, 14), each=25) as server:
        for name, options in asked.items():
            line = f'curiosity --sols 10-13 --to {tmp_path/name} {options}'
            succeed(line, server, tmp_path/'out')
            drawn[name] = set(pd.read_csv(tmp_path/name/'table.csv').id)
    assert len(drawn['a']) == 30
    assert drawn['a'] == drawn['b'] and drawn['a'] < drawn['c'] and drawn['a'] != drawn['d']


@pytest.mark.parametrize('changed, starts', [(False, [0, 1]), (True, [0, 0])])
def test_a_part_is_continued_only_while_the_file_is_the_same(changed, starts, tmp_path):
    one, two = pictures(2, 64)
    fetcher = Fetcher(rate=1000, wait=.01, patience=.3, tries=1)
    file = tmp_path/'a.jpg'
    with StandIn({'/a.jpg': one}, share=1, kinds=['cut']) as server:
        with pytest.raises(Fault): get_file(fetcher, server.url+'/a.jpg', file)
        server.share = 0
        if changed: server.files['/a.jpg'] = two
        n = len(server.log)
        get_file(fetcher, server.url+'/a.jpg', file)
        assert [entry['start'] > 0 for entry in server.log[n:]] == [bool(starts[1])]
    assert file.read_bytes() == (two if changed else one)


def test_nobody_asks_while_the_server_wants_to_be_left_alone(tmp_path):
    pages = {'/page': lambda query, server: {}}
    with StandIn({'/a.jpg': pictures(1)[0]}, pages) as server:
        server.fault = lambda: ('busy', 1) if not server.log else ('', 0)  # `Retry-After: 1`
        fetcher = Fetcher(rate=1000, wait=.01)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(get_file, fetcher, server.url+'/a.jpg', tmp_path/'a.jpg')]
            time.sleep(.2)
            tasks += [pool.submit(get_json, fetcher, server.url+'/page') for _ in range(3)]
            time.sleep(.5)
            assert len(server.log) == 1 and not any(task.done() for task in tasks)
        assert time.monotonic() - began > 1 and len(server.log) == 5


def test_no_more_requests_a_second_than_wanted():
    pages = {'/page': lambda query, server: {}}
    with StandIn({}, pages) as server, ThreadPoolExecutor(4) as pool:
        fetcher = Fetcher(rate=20)
        began = time.monotonic()
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
    gone = 'no connection .* goes on from here once it is back'
    with pytest.raises(MarsclrError, match=gone):
        get_file(fetcher, server.url+'/c.jpg', tmp_path/'c.jpg')


def damaged(data, draw, cut_off):
    "A copy with up to three bits turned, perhaps cut off"
    data = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
    return data[:draw.randrange(len(data))] if cut_off else data


def test_damaged_zip_files_are_refused_or_right(tmp_path):
    content = {f'{i}.jpg': jpeg for i, jpeg in enumerate(pictures(8))}
    good = io.BytesIO()
    with zipfile.ZipFile(good, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, jpeg in content.items(): z.writestr(f'top/{name}', jpeg)
    draw = random.Random(0)
    refused = 0
    for k in range(120):
        data = damaged(good.getvalue(), draw, cut_off=k % 10 == 0)
        (tmp_path/'a.zip').write_bytes(data)
        try: unpack(tmp_path/'a.zip', tmp_path/str(k))
        except (MarsclrError, OSError): refused += 1
        else:
            unpacked = {path.read_bytes() for path in (tmp_path/str(k)).rglob('*.*')}
            assert unpacked <= set(content.values())
        assert {path.name for path in tmp_path.iterdir()} <= {'a.zip', *map(str, range(k+1))}
    assert refused > 80
