"Large frames as tiles at their own scale: nothing lost, nothing across the split, and a kill in the middle."
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from marsclr.engine.clusters import capture_clusters
from marsclr.datasets import image_folder
from marsclr.engine.packing import load_pack, marsclr_pack, pack_archive
from marsclr.engine.reading import Reading
from marsclr.engine.tiles import put_together


def noise(seed, width, height): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_frames(root, sizes):
    root.mkdir(exist_ok=True)
    for i, o in enumerate(sizes): Image.fromarray(noise(i, *o)).save(root/f'{i}.png', compress_level=1)
    return root


def test_tiles_of_a_frame_put_together_give_the_frame(tmp_path):
    root = write_frames(tmp_path/'in', [(1648, 1200)])
    marsclr_pack(['folder', str(tmp_path/'pack'), '--root', str(root), '--size', '192', '--tiles', '--overlap', '16'])
    pack = load_pack(tmp_path/'pack')
    assert (put_together(pack[:].numpy(), list(zip(pack.table.x, pack.table.y))) == noise(0, 1648, 1200)).all()
    assert set(pack.table.tiles) == {len(pack)} and set(pack.table.image) == {0}
    meta = json.loads((tmp_path/'pack'/'pack.json').read_text())
    assert (meta['images'], meta['tiled_images'], meta['overlap']) == (len(pack), 1, 16)


def test_splits_labels_and_bursts_follow_the_image(tmp_path):
    root = write_frames(tmp_path/'in', [(160, 120)]*12)
    (tmp_path/'labels.csv').write_text(''.join(f'{i}.png,{"rock" if i % 3 else "sand"}\n' for i in range(12)))
    marsclr_pack(['folder', str(tmp_path/'pack'), '--root', str(root), '--size', '32', '--tiles', '--labels', str(tmp_path/'labels.csv'), '--most_tiles', '7'])
    pack = load_pack(tmp_path/'pack')
    t = pack.table.groupby('path')
    assert len(pack) == 84 and set(t.size()) == {7} and set(pack.table.split) == {'train', 'val', 'test'}
    assert t.split.nunique().max() == t.label.nunique().max() == 1 and pack.classes == ['rock', 'sand']
    assert t.label.first().to_dict() == {f'{i}.png': 0 if i % 3 else 1 for i in range(12)}
    bursts = capture_clusters(pack).ids
    assert all(len(set(bursts[pack.table.path == p])) == 1 for p in pack.table.path) and len(set(bursts)) == 12


def test_without_tiles_the_loss_is_told_and_small_images_are_not_blown_up(tmp_path, capsys):
    root = write_frames(tmp_path/'in', [(1648, 1200), (5000, 800), (2000, 3), (1, 1)])
    marsclr_pack(['folder', str(tmp_path/'pack'), '--root', str(root), '--size', '192'])
    said = capsys.readouterr().out
    assert re.search(r'images are shrunk 5.2 times \(median\), and 56% of them are cut off at their longer sides; --tiles keeps their scale and makes \d+ squares', said), said
    quarantine = (tmp_path/'pack'/'quarantine.csv').read_text()
    assert '2000 x 3 pixels: too small for 192' in quarantine and '1 x 1 pixels: too small' in quarantine
    marsclr_pack(['folder', str(tmp_path/'all'), '--root', str(root), '--size', '192', '--keep_small'])
    assert len(load_pack(tmp_path/'all')) == 4


def test_tiles_that_were_cut_off_go_on_and_packs_of_other_tiles_have_another_fingerprint(tmp_path, capsys):
    archive = image_folder(write_frames(tmp_path/'in', [(160, 120)]*5))
    whole = pack_archive(archive, tmp_path/'whole', 32, reading=Reading(tiles=True))
    for cut in (0, 200, 1000, 3000, 5000):
        part = tmp_path/'.again-partial'
        shutil.copytree(tmp_path/'whole', part)
        (part/'pack.json').unlink()
        os.truncate(part/'table.csv', cut)
        pack_archive(archive, tmp_path/'again', 32, reading=Reading(tiles=True))
        for o in (tmp_path/'whole').iterdir(): assert (tmp_path/'again'/o.name).read_bytes() == o.read_bytes(), (cut, o.name)
        shutil.rmtree(tmp_path/'again')
    assert re.findall(r'going on after (\d) of 5', capsys.readouterr().out) == ['1', '2']
    assert pack_archive(archive, tmp_path/'other', 32, reading=Reading(tiles=True, overlap=8)).fingerprint != whole.fingerprint


@pytest.mark.parametrize('name', ['jpg', 'png'])
def test_deep_and_turned_frames_are_tiled_as_they_stand(name, tmp_path):
    frame, side = noise(0, 100, 64), Image.Exif()
    side[0x0112] = 6
    (tmp_path/'in').mkdir()
    Image.fromarray(np.ascontiguousarray(np.rot90(frame))).save(tmp_path/'in'/f'a.{name}', exif=side, **(dict(quality=100, subsampling=0) if name == 'jpg' else {}))
    pack = pack_archive(image_folder(tmp_path/'in'), tmp_path/'pack', 32, reading=Reading(tiles=True))
    got = put_together(pack[:].numpy(), list(zip(pack.table.x, pack.table.y))).astype(int)
    assert got.shape == frame.shape and np.abs(got-frame).max() <= (0 if name == 'png' else 12)
