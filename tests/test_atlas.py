"The page of an atlas in a real browser, and its table as embedding-atlas reads it."
import json
import re
import shutil
import socket
import subprocess
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from marsclr.archives.marsyard import write_marsyard
from marsclr.atlas import marsclr_atlas, write_atlas
from marsclr.datasets import msl
from marsclr.engine import atlas_page, atlas_server
from marsclr.engine.atlas_page import readable
from marsclr.engine.packing import Pack, pack_archive

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
EVIL = '<img src=x onerror="document.title=\'hacked\'"> & \udce9 </script>.jpg'


@pytest.fixture(scope='module')
def atlas(tmp_path_factory):
    "An atlas of twenty grey images, from features that lie on a circle: neighbours are known"
    grey = np.linspace(0, 255, 20).astype(np.uint8)
    images = np.tile(grey[:, None, None, None], (1, 32, 32, 3))
    table = pd.DataFrame(dict(path=[EVIL, *(f'{i}.jpg' for i in range(1, 20))], label=-1, domain='own', split=''))
    for name in ('rover', 'camera', 'sequence'): table[name] = ''
    pack = Pack([images], table.assign(sol=-1, time=np.nan))
    angle = np.arange(20)*2*np.pi/20
    to = tmp_path_factory.mktemp('atlas')/'grey.atlas'
    write_atlas(pack, np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32), to, k=4, near=2)
    return to


def dom(page, at=''):
    "The page as Chromium has it when its program has run"
    words = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=3000', '--dump-dom']
    done = subprocess.run([CHROMIUM, *words, page.as_uri() + at], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium here')
def test_a_chosen_image_shows_its_neighbours(atlas):
    text = dom(atlas/'atlas.html', '#5')
    near = re.findall(r'<button title="(\d+).jpg">', text)
    assert set(near) == {'4', '6'}
    assert '5.jpg, cluster' in text
    assert '<button' not in dom(atlas/'atlas.html')  # nothing is chosen at first


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium here')
def test_a_name_with_html_in_it_stays_a_name(atlas):
    text = dom(atlas/'atlas.html', '#0')
    assert '&lt;img src=x onerror=' in text and '<img src="x"' not in text
    assert '<title>Atlas of pack</title>' in text


def test_the_page_holds_what_the_table_holds(atlas):
    data = re.search('<script type="application/json" id="atlas">(.*?)</script>', (atlas/'atlas.html').read_text(), re.S)[1]
    assert json.loads(data)['path'][0] == readable(EVIL)
    table = pd.read_csv(atlas/'table.csv', encoding_errors='surrogateescape')
    assert json.loads(data)['x'] == table.x.tolist() and table.path[0] == EVIL


@pytest.mark.skipif(find_spec('pyarrow') is None, reason="needs pip install '.[atlas]'")
def test_the_parquet_has_the_columns_of_embedding_atlas(atlas):
    table = pd.read_parquet(atlas/'atlas.parquet')
    assert {'path', 'x', 'y', 'cluster', 'image', 'neighbors'} <= set(table)
    assert sorted(table.neighbors[5]['ids']) == [4, 6]
    assert table.image[0]['bytes'][:2] == b'\xff\xd8'


@pytest.fixture
def yard(tmp_path):
    "A small pack, and the words of a command that makes its atlas"
    archive = msl(write_marsyard(tmp_path/'yard', n=20, size=32, n_classes=3))
    pack_archive(archive, tmp_path/'yard.pack', 32)
    return ['random', str(tmp_path/'yard.pack'), '--backbone', 'resnet10t', '--clusters', '3', '--device', 'cpu']


def test_without_the_extra_the_page_is_written_and_one_line_says_what_to_install(yard, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_server, 'find_spec', lambda name: None)
    for _ in range(2):  # the second time, the atlas is there
        with pytest.raises(SystemExit) as end: marsclr_atlas([*yard, '--serve'])
        assert end.value.code == "marsclr_atlas: --serve needs embedding-atlas: pip install '.[atlas]'"
        assert (tmp_path/'yard.atlas'/'atlas.html').exists()


def test_a_port_in_use_is_named_before_anything_is_computed(yard, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as end: marsclr_atlas([*yard, '--serve', '--port', str(port)])
    assert end.value.code == f'marsclr_atlas: --port {port} cannot be used (Address already in use): give another'
    assert not (tmp_path/'yard.atlas').exists()


def test_an_atlas_that_is_there_is_shown_and_not_made_anew(yard, tmp_path, monkeypatch):
    marsclr_atlas(yard)
    shown = []
    monkeypatch.setattr('marsclr.atlas.serve_atlas', lambda *words: shown.append(words))
    before = (tmp_path/'yard.atlas'/'atlas.html').stat().st_mtime_ns
    marsclr_atlas([*yard, '--serve', '--port', '5071'])
    assert shown == [(tmp_path/'yard.atlas', 5071)]
    assert (tmp_path/'yard.atlas'/'atlas.html').stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match='was made with other seed: give another folder'):
        marsclr_atlas([*yard, '--serve', '--seed', '1'])


@pytest.mark.skipif(find_spec('pyarrow') is None, reason="needs pip install '.[atlas]'")
def test_a_large_archive_has_no_thumbnails_in_its_table_and_one_line_says_so(yard, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('marsclr.atlas.most_thumbnails', 19)
    monkeypatch.setattr(atlas_page, 'most_on_page', 19)
    started = []
    monkeypatch.setattr(atlas_server, 'find_spec', lambda name: True)
    monkeypatch.setattr('subprocess.run', lambda words, check: started.append(words) or subprocess.CompletedProcess(words, 0))
    marsclr_atlas([*yard, '--serve', '--port', '5072'])
    assert capsys.readouterr().out.count(f'no thumbnails in {tmp_path}/yard.atlas/atlas.parquet: it holds up to 19') == 1
    assert 'image' not in pd.read_parquet(tmp_path/'yard.atlas'/'atlas.parquet')
    assert not (tmp_path/'yard.atlas'/'atlas.html').exists()
    assert '--neighbors' in started[0] and '--image' not in started[0]


@pytest.mark.parametrize('run,said', [
    ('random,nowhere', 'nowhere holds no encoder.safetensors'), ('random,', "'random,' leaves an encoder out"), ('', "'' leaves an encoder out")])
def test_an_encoder_that_is_not_there_is_named(yard, tmp_path, run, said):
    with pytest.raises(SystemExit, match=said): marsclr_atlas([run, *yard[1:]])
    assert not (tmp_path/'yard.atlas').exists()


def test_two_encoders_look_side_by_side_and_an_atlas_is_not_overwritten(yard, tmp_path):
    both = ['random, random', *yard[1:]]
    marsclr_atlas(both)
    before = (tmp_path/'yard.atlas'/'atlas.json').read_bytes()
    with pytest.raises(SystemExit, match='yard.atlas exists: remove it or give another folder'): marsclr_atlas(both)
    assert (tmp_path/'yard.atlas'/'atlas.json').read_bytes() == before
