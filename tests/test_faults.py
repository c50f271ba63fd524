"What people with other archives met, each with its smallest input, and what it has to give."
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from marsclr.archives.marsyard import write_marsyard
from marsclr.atlas import marsclr_atlas, marsclr_search
from marsclr.clustering import marsclr_cluster
from marsclr.diagnosis import marsclr_falseneg
from marsclr.engine.embed import marsclr_embed, write_features
from marsclr.engine.encoders import create_encoder, load_encoder
from marsclr.engine.packing import Pack, load_pack, marsclr_pack
from marsclr.engine.weights import check_savable, encoder_bytes
from marsclr.linear_evaluation import marsclr_probe
from marsclr.pretrain import marsclr_pretrain
from marsclr.training import pretrain

SMALL = '--backbone test_resnet --image_size 32 --batch_size 16 --epochs 1 --device cpu'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp('faults')
    write_marsyard(base/'yard', n=64, size=64)
    marsclr_pack(['msl', str(base/'y.pack'), '--root', str(base/'yard'), '--size', '64'])
    return base


def run(command, line, base):
    "A command in this process; words that begin with @ are paths below `base`"
    command([str(base/word[1:]) if word[0] == '@' else word for word in line.split()])


def refusal(command, line, base):
    with pytest.raises(SystemExit) as e: run(command, line, base)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_a_transformer_is_trained_probed_and_loaded_at_another_size_than_its_own(base, capsys):
    vit = '--backbone vit_tiny_patch16_224 --image_size 32 --epochs 1 --batch_size 32 --device cpu'
    run(marsclr_pretrain, f'@y.pack @vit {vit}', base)
    line = re.search(r'in plain timm: (timm\.create_model\(.*\))', capsys.readouterr().out)[1]
    plain = eval(line, dict(timm=timm)).eval()
    image = torch.rand(1, 3, 48, 48)
    with torch.no_grad(): torch.testing.assert_close(plain(image), load_encoder(base/'vit')(image))
    run(marsclr_pretrain, f'@y.pack @vit {vit}', base)
    assert 'is finished' in capsys.readouterr().out
    run(marsclr_probe, '@vit @y.pack', base)
    run(marsclr_probe, '@vit @y.pack --stages --to @stages', base)
    run(marsclr_embed, '@vit @y.pack --to @of-vit --device cpu', base)
    assert np.load(base/'of-vit'/'features.npy').shape == (64, 192)
    assert json.loads((base/'of-vit'/'summary.json').read_text())['size'] == 64


def test_one_that_is_built_for_a_size_gets_whole_images_at_that_size(base):
    line = '--backbone resmlp_12_224 --image_size 32 --epochs 1 --batch_size 64 --device cpu'
    run(marsclr_pretrain, f'@y.pack @mlp {line}', base)
    config = json.loads((base/'mlp'/'config.json').read_text())
    assert config['timm_options'] == dict(img_size=32)
    run(marsclr_embed, '@mlp @y.pack --to @of-mlp --device cpu', base)
    assert json.loads((base/'of-mlp'/'summary.json').read_text())['size'] == 32


def test_texture_refuses_a_transformer_in_one_line(base):
    line = '@y.pack --source texture --backbone vit_tiny_patch16_224 --clusters 5 --device cpu'
    assert 'choose a convolutional one' in refusal(marsclr_cluster, line, base)


def test_branches_are_refused_in_one_line(base):
    line = 'random @y.pack --to @branches --backbone crossvit_9_240 --stages'
    assert 'cannot be taken apart into stages' in refusal(marsclr_probe, line, base)


def test_shared_tensors_are_saved_and_loaded():
    encoder = create_encoder('coat_lite_tiny')
    check_savable(encoder, 'coat_lite_tiny')
    assert len(encoder_bytes(encoder)) > 4*sum(p.numel() for p in encoder.parameters())


def test_names_of_the_hub_are_told(base):
    line = f'@y.pack @hub {SMALL}'.replace('test_resnet', 'timm/resnet18.a1_in1k')
    assert "give 'resnet18.a1_in1k'" in refusal(marsclr_pretrain, line, base)


def test_a_log_has_no_bars(base, capsys):
    run(marsclr_pack, '@msl @log.pack --root @yard --size 32'.replace('@msl', 'msl'), base)
    run(marsclr_probe, 'random @log.pack --to @log-probe --backbone test_resnet', base)
    run(marsclr_pretrain, f'@log.pack @log-run {SMALL}', base)
    out, err = capsys.readouterr()
    assert err == ''
    assert not set('\r█|') & set(out)
    assert len([line for line in out.splitlines() if line[0] != ' ']) == 8, out


def test_names_with_commas_and_plus_signs(base):
    for name in ('Mars, 2020.pack', 'a+b.pack'):
        shutil.copytree(base/'y.pack', base/name)
        settings = dict(backbone='test_resnet', image_size=32, batch_size=16, epochs=1, device='cpu')
        done = pretrain(base/name, base/f'run of {name}', **settings)
        assert (done/'encoder.safetensors').is_file()
    both = pretrain([base/'Mars, 2020.pack', str(base/'a+b.pack')], base/'both', **settings)
    assert json.loads((both/'config.json').read_text())['images'] == 128


def test_features_of_tiled_images(base):
    run(marsclr_pack, 'folder @tiled --root @yard --size 32 --tiles', base)
    run(marsclr_embed, 'random @tiled --to @of-tiles --backbone test_resnet --device cpu', base)
    table = pd.read_csv(base/'of-tiles'/'features.csv')
    features = np.load(base/'of-tiles'/'features.npy', mmap_mode='r')
    assert len(table) == len(features) == 64 < len(load_pack(base/'tiled'))
    assert table.path.is_unique


def test_copies_are_told(base, capsys):
    first, second = sorted((base/'yard'/'images').iterdir())[:2]
    (base/'same').mkdir()
    for i in range(20): shutil.copy(first, base/'same'/f'{i}.jpg')
    shutil.copy(second, base/'same')
    run(marsclr_pack, 'folder @same.pack --root @same --size 32', base)
    run(marsclr_pretrain, f'@same.pack @same-run {SMALL}', base)
    assert '19 of 21 images are copies of others' in capsys.readouterr().out


def test_the_default_number_of_clusters_fits_a_small_pack(base, capsys):
    run(marsclr_cluster, '@y.pack --source pixels --to @few.npz', base)
    assert '150 clusters are too many for 64 images: making 16' in capsys.readouterr().out
    assert pd.read_csv(base/'few.csv').cluster.nunique() <= 16
    refusal(marsclr_cluster, '@y.pack --source pixels --to @many.npz --clusters 65', base)


def test_a_probe_names_what_is_on_images_without_labels(base, capsys):
    run(marsclr_pack, 'folder @plain.pack --root @yard/images --size 64', base)
    line = 'random @y.pack --to @kept --backbone test_resnet --predict @plain.pack'
    run(marsclr_probe, line, base)
    first = (base/'kept'/'classes-plain.pack.csv').read_bytes()
    table = pd.read_csv(base/'kept'/'classes-plain.pack.csv')
    assert len(table) == 64 and table.confidence.between(0, 1).all()
    assert set(table['class']) <= set(load_pack(base/'y.pack').classes)
    run(marsclr_probe, line, base)
    assert (base/'kept'/'classes-plain.pack.csv').read_bytes() == first
    assert 'exists: remove it' in refusal(marsclr_probe, 'random @y.pack --to @kept', base)


def test_a_probe_of_images_from_their_tiles(base):
    run(marsclr_pack, 'msl @tiled-msl --root @yard --size 32 --tiles', base)
    line = 'random @tiled-msl --to @of-images --backbone test_resnet --by_image'
    run(marsclr_probe, line, base)
    of_tiles = load_pack(base/'tiled-msl').table
    summary = json.loads((base/'of-images'/'summary.json').read_text())
    assert summary['images'] == of_tiles.path[of_tiles.split == 'test'].nunique()


def test_views_upside_down_turned_and_blurred(base):
    line = f'@y.pack @turned {SMALL} --upside_down .5 --quarter_turns --blur .5'
    run(marsclr_pretrain, line, base)
    run(marsclr_pretrain, f'@y.pack @upright {SMALL}', base)
    logs = [pd.read_csv(base/name/'log.csv') for name in ('turned', 'upright')]
    assert logs[0].loss[0] != logs[1].loss[0]
    assert 'give a probability' in refusal(marsclr_pretrain, f'@y.pack @x {SMALL} --blur 2', base)


def test_a_run_from_before_goes_on(base):
    "Its configuration lacks what has come since, its log the columns of health"
    run(marsclr_pretrain, f'@y.pack @old {SMALL}', base)
    config = json.loads((base/'old'/'config.json').read_text())
    for name in ('timm_options', 'upside_down', 'quarter_turns', 'blur'): del config[name]
    (base/'old'/'config.json').write_text(json.dumps(config))
    log = pd.read_csv(base/'old'/'log.csv')
    log[['epoch', 'loss', 'lr', 'seconds', 'images_per_s']].to_csv(base/'old'/'log.csv', index=False)
    (base/'old'/'images.csv').unlink()
    run(marsclr_pretrain, f'@y.pack @old {SMALL}'.replace('epochs 1', 'epochs 2'), base)
    assert pd.read_csv(base/'old'/'log.csv').same_image.isna().tolist() == [True, False]
    assert json.loads((base/'old'/'config.json').read_text())['epochs'] == 2
    load_encoder(base/'old')


def test_a_run_of_many_short_epochs_tells_its_first_and_its_last(base, capsys):
    run(marsclr_pretrain, f'@y.pack @lines {SMALL}'.replace('epochs 1', 'epochs 4'), base)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch ')]
    assert [line.split(',')[0] for line in lines] == ['epoch 1/4', 'epoch 4/4']


def test_marsyard_is_found_at_its_earlier_place():
    module = importlib.import_module('marsclr.marsyard')
    assert module.write_marsyard is write_marsyard


def test_a_pack_from_memory_goes_through_every_command(base):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    Pack([pixels], pd.DataFrame(dict(path=[f'{i}.png' for i in range(20)]))).save(base/'memory')
    assert (load_pack(base/'memory')[:].numpy() == pixels).all()
    run(marsclr_cluster, '@memory --source capture --to @memory.npz', base)
    assert pd.read_csv(base/'memory.csv').cluster.tolist() == list(range(20))
    run(marsclr_embed, 'random @memory --to @memory.features --backbone test_resnet', base)
    assert pd.read_csv(base/'memory.features'/'features.csv').path.tolist() == [f'{i}.png' for i in range(20)]
    run(marsclr_falseneg, 'diagnose @memory --batch 8', base)
    run(marsclr_pretrain, f'@memory @memory.run {SMALL}', base)
    run(marsclr_atlas, 'random @memory --clusters 3 --backbone test_resnet', base)
    assert 'no labeled train images' in refusal(marsclr_probe, '@memory.run @memory', base)


def test_new_images_are_named_and_the_way_on_is_told(base, capsys):
    shutil.copytree(base/'yard'/'images', base/'grown')
    run(marsclr_pack, 'folder @before.pack --root @grown --size 32', base)
    run(marsclr_pretrain, f'@before.pack @before {SMALL}', base)
    Image.new('RGB', (64, 64), 'red').save(base/'grown'/'new.jpg')
    run(marsclr_pack, 'folder @after.pack --root @grown --size 32', base)
    said = refusal(marsclr_pretrain, f'@after.pack @before {SMALL}', base)
    assert '1 new, such as new.jpg, none gone' in said and '--init' in said
    run(marsclr_pretrain, f'@after.pack @on --init @before {SMALL}', base)
    (base/'grown'/'new.jpg').unlink()
    (base/'grown').rename(base/'moved')
    run(marsclr_pack, 'folder @moved.pack --root @moved --size 32', base)
    run(marsclr_pretrain, f'@moved.pack @before {SMALL}', base)
    assert 'is finished' in capsys.readouterr().out.splitlines()[-1]


def test_images_of_which_nothing_can_be_learned_are_refused_before_the_first_step(base):
    (base/'blank').mkdir()
    for i in range(32): Image.new('RGB', (64, 64), (i, i, i)).save(base/'blank'/f'{i}.png')
    run(marsclr_pack, 'folder @blank.pack --root @blank --size 32', base)
    said = refusal(marsclr_pretrain, f'@blank.pack @blank-run {SMALL}', base)
    assert 'all 32 images are blank' in said and not (base/'blank-run'/'config.json').exists()


@pytest.mark.parametrize('command, line', [
    (marsclr_atlas, 'random @y.pack --to @shut/a'), (marsclr_embed, 'random @y.pack --to @shut/a'),
    (marsclr_probe, 'random @y.pack --to @shut/a'), (marsclr_pretrain, f'@y.pack @shut/a {SMALL}'),
    (marsclr_cluster, '@y.pack --to @shut/a.npz'), (marsclr_pack, 'folder @shut/a --root @yard'),
    (marsclr_falseneg, 'diagnose @y.pack --batch 16 --to @shut/a.png')])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(base, command, line, monkeypatch):
    (base/'shut').mkdir(exist_ok=True)
    monkeypatch.setattr('os.access', lambda path, mode: Path(path).name != 'shut')
    monkeypatch.setattr('marsclr.engine.encoders.feature_batches', lambda *args, **kwargs: pytest.fail('work'))
    assert 'shut cannot be written to: give another place for' in refusal(command, line, base)


def test_an_atlas_of_images_from_their_tiles(base, capsys):
    run(marsclr_pack, 'folder @of-tiles.pack --root @yard/images --size 32 --tiles', base)
    run(marsclr_atlas, 'random @of-tiles.pack --backbone test_resnet --clusters 5 --by_image', base)
    run(marsclr_embed, 'random @of-tiles.pack --backbone test_resnet --to @of-tiles.features', base)
    features = [np.load(base/f'of-tiles.{kind}'/'features.npy') for kind in ('atlas', 'features')]
    assert features[0].shape == (64, 96)
    np.testing.assert_allclose(*features, atol=1e-5)
    table = pd.read_csv(base/'of-tiles.atlas'/'table.csv')
    names = sorted(path.name for path in (base/'yard'/'images').iterdir())
    assert table.path.tolist() == names
    run(marsclr_search, f'@yard/images/{names[5]} --atlas @of-tiles.atlas --n 3 --to @found.png', base)
    found = capsys.readouterr().out.splitlines()[-4].split()
    assert (found[0], float(found[-1])) == (names[5], 1)


def test_weights_that_are_no_numbers_are_told_in_one_line(base):
    run(marsclr_pretrain, f'@y.pack @sound {SMALL}', base)
    shutil.copytree(base/'sound', base/'diverged')
    weights = load_file(base/'diverged'/'encoder.safetensors')
    next(w for name, w in weights.items() if name.endswith('weight')).fill_(float('nan'))
    save_file(weights, base/'diverged'/'encoder.safetensors')
    one_step = SMALL.replace('batch_size 16', 'batch_size 64')
    assert 'the loss is nan at epoch 0, step 0' in refusal(marsclr_pretrain, f'@y.pack @from-it {one_step} --init @diverged', base)
    assert 'NaN' in refusal(marsclr_embed, '@diverged @y.pack --to @of-it --device cpu', base)


class Watched(torch.nn.Linear):
    "A network of 256 features that notes the memory that its process holds, in MiB"
    num_features = 256
    def forward(self, x):
        lines = Path('/proc/self/status').read_text().splitlines()
        self.memory.append(int(next(line.split()[1] for line in lines if line.startswith('RssAnon')))/1024)
        return super().forward(x.flatten(1))


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_features_of_many_images_are_not_held(tmp_path):
    n = 200_000
    images = np.lib.format.open_memmap(tmp_path/'images.npy', 'w+', np.uint8, (n, 8, 8, 3))
    pack = Pack([images], pd.DataFrame(dict(path=np.arange(n).astype(str), sha256='')))
    encoder = Watched(192, 256)
    encoder.memory = []
    features = write_features(tmp_path, encoder, pack, {}, 8, device='cpu')
    assert features.nbytes == n*256*4 > 190*2**20
    assert max(encoder.memory) - encoder.memory[0] < 80
    assert (np.asarray(features[-1]) == np.asarray(features[0])).all() and len(features) == n
