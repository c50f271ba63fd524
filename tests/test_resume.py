"A run that is killed again and again ends where a run that was left alone ends, to the byte; a full disk costs no checkpoint."
import csv
import errno
import glob
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from marsclr.datasets import msl
from marsclr.marsyard import write_marsyard
from marsclr.packing import pack_archive
from marsclr.pretrain import marsclr_pretrain
from marsclr.training import open_run

SMALL = '--backbone resnet10t --image_size 32 --batch_size 16 --epochs 6 --save_every 1 --device cpu'.split()  # 24 steps
KEPT = {'config.json', 'log.csv', 'checkpoint.pt', 'encoder.safetensors'}


def start(pack, run):
    return subprocess.Popen([sys.executable, '-m', 'marsclr.pretrain', pack, run, *SMALL], env=os.environ | {'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(pack, run):
    process = start(pack, run)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err


def position(run):
    "Epoch and step of the checkpoint, which must be readable, or None"
    if not (run/'checkpoint.pt').exists(): return None
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    return state['epoch'], state['step']


def kill(pack, run, checkpoints, delay=None):
    "Kill a run once it has written that many checkpoints: after a delay, or while it writes the next. The positions of the checkpoints, as they came"
    process, seen = start(pack, run), [position(run)]
    began = time.monotonic()
    while len(seen) <= checkpoints or delay is None and not glob.glob(f'{run}/.checkpoint.pt-*/*'):
        assert process.poll() is None and time.monotonic() - began < 120, process.stderr.read() if process.poll() else 'it ended too early, or hangs'
        now = position(run)
        if now != seen[-1]: seen.append(now)
    time.sleep(delay or 0)
    assert process.poll() is None, 'there was nothing left to kill'
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return [o for o in [*seen, position(run)] if o]


@pytest.fixture(scope='module')
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pack')
    pack_archive(msl(write_marsyard(folder/'yard', n=64, size=32, n_classes=3)), folder/'yard.pack', size=32)
    return folder/'yard.pack'


@pytest.fixture(scope='module')
def alone(pack, tmp_path_factory):
    "A run that nobody disturbs"
    run = tmp_path_factory.mktemp('alone')/'run'
    finish(pack, run)
    return run


@pytest.fixture(scope='module')
def killed(pack, tmp_path_factory):
    "A run that is killed three times; with the positions of the checkpoints"
    run, rng = tmp_path_factory.mktemp('killed')/'run', random.Random(7)
    seen = kill(pack, run, 1, rng.uniform(0, .5)) + kill(pack, run, 2) + kill(pack, run, rng.randint(1, 4), rng.uniform(0, .5))
    finish(pack, run)
    return run, [*seen, position(run)]


def test_the_run_was_stopped_midway_and_never_went_back(killed):
    _, seen = killed
    assert seen == sorted(seen) and seen[0] < (6, 0) and seen[-1] == (6, 0)
    assert len(set(seen)) >= 5 and any(step for _, step in seen)


def test_the_encoder_is_that_of_an_undisturbed_run(killed, alone):
    assert (killed[0]/'encoder.safetensors').read_bytes() == (alone/'encoder.safetensors').read_bytes()


def test_the_log_is_that_of_an_undisturbed_run(killed, alone):
    logs = [list(csv.DictReader((o/'log.csv').read_text().splitlines())) for o in (killed[0], alone)]
    for row in logs[0] + logs[1]: del row['seconds'], row['images_per_s']
    assert logs[0] == logs[1]
    assert [o['epoch'] for o in logs[0]] == list('012345') and len({o['loss'] for o in logs[0]}) == 6


def test_nothing_but_the_run_is_left(killed, alone):
    for run in (alone, killed[0]): assert {o.name for o in run.iterdir()} == KEPT


def test_a_run_killed_before_its_encoder_was_written_writes_it(pack, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path/'run', ignore=shutil.ignore_patterns('encoder*'))
    marsclr_pretrain([str(pack), str(run), *SMALL])
    assert (run/'encoder.safetensors').read_bytes() == (alone/'encoder.safetensors').read_bytes()


def test_half_a_checkpoint_that_a_killed_run_left_is_cleared_away(pack, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path/'run', ignore=shutil.ignore_patterns('encoder*'))
    (run/'.checkpoint.pt-abc').mkdir()
    (run/'.checkpoint.pt-abc'/'checkpoint.pt').write_bytes(b'half')
    marsclr_pretrain([str(pack), str(run), *SMALL])
    assert {o.name for o in run.iterdir()} == KEPT


def test_a_run_killed_while_it_wrote_its_configuration_can_start(tmp_path):
    (tmp_path/'run'/'.config.json-abc').mkdir(parents=True)
    assert open_run(tmp_path/'run', dict(seed=1))


def test_a_write_that_fails_halfway_leaves_the_checkpoint_before(pack, tmp_path, monkeypatch):
    run, save, paths = tmp_path/'run', torch.save, []
    def full_disk(state, path):
        paths.append(path)
        if len(paths) < 3: return save(state, path)
        save(state, whole := io.BytesIO())
        Path(path).write_bytes(whole.getvalue()[:len(whole.getvalue())//2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(SystemExit) as e: marsclr_pretrain([str(pack), str(run), *SMALL])
    assert e.value.code == f'marsclr_pretrain: {run}/checkpoint.pt cannot be written (OSError: [Errno 28] No space left on device); the one before is intact'
    assert position(run) == (0, 2) and {o.name for o in run.iterdir()} == {'config.json', 'checkpoint.pt'}


def test_a_full_disk_leaves_the_checkpoint_before(pack, alone, tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    size = (alone/'checkpoint.pt').stat().st_size*3//2  # room for one, not for the next beside it
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'no small disk can be mounted: {mounted.stderr.strip()}')
    try:
        with pytest.raises(SystemExit, match=f'^marsclr_pretrain: {disk}/run/checkpoint.pt cannot be written [^\n]*$'):
            marsclr_pretrain([str(pack), str(disk/'run'), *SMALL])
        assert position(disk/'run') == (0, 1) and {o.name for o in (disk/'run').iterdir()} == {'config.json', 'checkpoint.pt'}
    finally: subprocess.run(['umount', disk], check=True)


def cluster(pack, to):
    return subprocess.Popen([sys.executable, '-c', 'from marsclr.cluster_quality import marsclr_cluster; marsclr_cluster()', pack, '--to', to, '--source', 'texture',
                             *'--clusters 4 --backbone resnet10t --epochs 4 --size 32 --device cpu'.split()], env=os.environ | {'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_texture_clustering_that_was_killed_finds_the_same_clusters(pack, tmp_path):
    for name in ('alone', 'killed'):
        process = cluster(pack, tmp_path/f'{name}.npz')
        if name == 'killed':
            while position(tmp_path/'killed.run') is None: assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (tmp_path/'killed.npz').exists() and position(tmp_path/'killed.run') < (4, 0)
            process = cluster(pack, tmp_path/'killed.npz')
        assert process.communicate(timeout=120) and process.returncode == 0
    assert (tmp_path/'alone.npz').read_bytes() == (tmp_path/'killed.npz').read_bytes()
