"The page of an atlas in a real browser, and its table as embedding-atlas reads it."
import json
import re
import shutil
import subprocess
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from marsclr.atlas import write_atlas
from marsclr.engine.atlas_page import readable
from marsclr.engine.packing import Pack

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


@pytest.mark.skipif(find_spec('pyarrow') is None, reason="needs pip install 'marsclr[atlas]'")
def test_the_parquet_has_the_columns_of_embedding_atlas(atlas):
    table = pd.read_parquet(atlas/'atlas.parquet')
    assert {'path', 'x', 'y', 'cluster', 'image', 'neighbors'} <= set(table)
    assert sorted(table.neighbors[5]['ids']) == [4, 6]
    assert table.image[0]['bytes'][:2] == b'\xff\xd8'
