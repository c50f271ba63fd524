"Text files as spreadsheets and editors save them: the same archive, whatever stands around its words."
import numpy as np
import pytest
from PIL import Image

from marsclr.datasets import msl
from marsclr.engine.packing import load_pack, marsclr_pack

NAMES = [f'{i:04d}ML0000000370100057E01_DRCL.jpg' for i in range(6)]
DRESS = {'plain': lambda o: o, 'with a byte-order mark and CRLF': lambda o: b'\xef\xbb\xbf' + o.replace(b'\n', b'\r\n'),
         'with trailing blanks': lambda o: o.replace(b'\n', b' \t\n'), "with old Macs' line ends": lambda o: o.replace(b'\n', b'\r'),
         'with quotes and commas': lambda o: b''.join(b','.join(b'"%b"' % p for p in line.replace(b',', b' ').split()) + b',\r\n' for line in o.splitlines())}


def write_msl(root, dress):
    (root/'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES: Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root/'images'/name)
    (root/'class_map.csv').write_bytes(dress(b'0,Rock\n1,Sand\n'))
    for split, rows in dict(train=range(3), val=[3], test=range(4, 6)).items():
        (root/f'{split}-set-v2.1.txt').write_bytes(dress(''.join(f'{NAMES[i]} {i % 2}\n' for i in rows).encode()))
    return root


@pytest.mark.parametrize('name', DRESS)
def test_label_files_are_read_however_they_are_saved(name, tmp_path):
    archive = msl(write_msl(tmp_path/'msl', DRESS[name]))
    assert archive.classes == ['Rock', 'Sand'] and archive.table.label.tolist() == [0, 1]*3
    assert archive.table.split.tolist() == ['train']*3 + ['val'] + ['test']*2 and archive.table.path.tolist() == [f'images/{o}' for o in NAMES]
    marsclr_pack(['msl', str(tmp_path/'pack'), '--root', str(tmp_path/'msl'), '--size', '32'])
    assert len(load_pack(tmp_path/'pack')) == 6
