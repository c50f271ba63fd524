"From a folder and labels of one's own to a probe's accuracy."
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np, pytest
from fastcore.test import expect_fail

from marsclr.linear_evaluation import marsclr_probe
from marsclr.archives.marsyard import marsyard
from marsclr.datasets import Archive, make_table
from marsclr.engine.packing import layouts, load_pack, marsclr_pack
from PIL import Image


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    "A folder of images whose names say nothing, with commas and blanks, and their table"
    root = tmp_path_factory.mktemp('own')
    images, table = marsyard(n=120, size=32, n_classes=3, burst=3)
    (root/'in'/'sub, folder').mkdir(parents=True)
    table['path'] = [('sub, folder/' if i % 2 else '') + f'image {i}, "x".png' for i in range(len(table))]
    for image, path in zip(images, table.path): Image.fromarray(image).save(root/'in'/path)
    table['label'] = [['rock', 'sand, dark', 'sky'][o] for o in table.label]
    return root, table


def pack(root, name, *options):
    marsclr_pack(['folder', str(root/name), '--root', str(root/'in'), '--size', '32', '--labels', str(root/f'{name}.csv'), *options])
    return load_pack(root/name)


def test_from_a_folder_and_a_csv_to_a_probe_in_two_commands(archive, capsys):
    root, table = archive
    table[['path', 'label', 'burst']].rename(columns={'burst': 'Group'}).to_csv(root/'grouped.csv', index=False, encoding='utf-8-sig', lineterminator='\r\n')
    pack(root, 'grouped')
    said = capsys.readouterr().out
    assert 'labels: 120 of 120 images, 3 classes; no split is given; drawn by burst' in said
    marsclr_probe(['random', str(root/'grouped'), '--to', str(root/'probe'), '--backbone', 'resnet10t'])
    summary = json.loads((root/'probe'/'summary.json').read_text())
    assert summary['accuracy'] > .5


def test_groups_do_not_cross_the_split_and_labels_are_right(archive):
    root, table = archive
    table[['burst', 'path', 'label']].rename(columns={'burst': 'group'}).to_csv(root/'again.csv', index=False)
    t = pack(root, 'again').table.set_index('path')
    assert t.groupby('group').split.nunique().max() == 1 and set(t.split) == {'train', 'val', 'test'}
    assert [['rock', 'sand, dark', 'sky'][o] for o in t.label.loc[table.path]] == table.label.tolist()
    other = pack(root, 'again', '--seed', '1') if (root/'again').rename(root/'before') else None
    assert other.table.split.tolist() != t.split.tolist()


def test_a_given_split_is_kept_and_images_without_a_line_have_no_label(archive, capsys):
    root, table = archive
    some = table[['path', 'label', 'split']].iloc[:50]
    some.to_csv(root/'given.csv', index=False, header=False, sep=';')
    t = pack(root, 'given').table.set_index('path')
    assert t.split.loc[some.path].tolist() == some.split.tolist() and (t.label >= 0).sum() == 50
    assert 'labels: 50 of 120 images, 3 classes\n' in capsys.readouterr().out


def test_class_folders(archive, tmp_path):
    root, table = archive
    for path, label, split in zip(table.path, table.label, table.split):
        for to in (tmp_path/'plain'/label, tmp_path/'split'/split/label):
            to.mkdir(parents=True, exist_ok=True)
            (to/path.replace('/', '_')).symlink_to(root/'in'/path)
    for name in ('plain', 'split'):
        marsclr_pack(['classes', str(tmp_path/f'{name}.pack'), '--root', str(tmp_path/name), '--size', '32'])
        p = load_pack(tmp_path/f'{name}.pack')
        assert p.classes == ['rock', 'sand, dark', 'sky'] and p.table.label.value_counts().to_dict() == {i: n for i, n in enumerate(table.label.value_counts().sort_index())}
    assert p.table.split.value_counts().to_dict() == table.split.value_counts().to_dict()
    with expect_fail(SystemExit, 'lies in no class folder'): marsclr_pack(['classes', str(tmp_path/'x'), '--root', str(root/'in')])


def test_a_reader_that_gives_no_split_gets_one(tmp_path, capsys):
    for i in range(40): Image.fromarray(np.full((16, 16), i, np.uint8)).save(tmp_path/f'{i:02d}.png')
    def reader(root):
        table = make_table([f'{i:02d}.png' for i in range(40)], 'mine', label=[i % 2 for i in range(40)])
        return Archive('mine', Path(root), table, ['a', 'b'])
    with patch.dict(layouts, mine=reader):
        marsclr_pack(['mine', str(tmp_path/'mine.pack'), '--root', str(tmp_path), '--size', '16'])
    assert 'no split is given; drawn by burst' in capsys.readouterr().out
    assert set(load_pack(tmp_path/'mine.pack').table.split) == {'train', 'val', 'test'}
