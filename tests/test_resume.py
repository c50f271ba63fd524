"A run that is killed twenty times ends where a run that was left alone ends, to the byte; nothing that happens to it costs more than one checkpoint."
import csv
import errno
import glob
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked import Script

from marsclr.datasets import msl
from marsclr.archives.marsyard import write_marsyard
from marsclr.engine.packing import pack_archive
from marsclr.pretrain import marsclr_pretrain
from marsclr.engine.runs import load_checkpoint, open_run

SMALL = '--backbone test_resnet --image_size 32 --batch_size 16 --epochs 30 --save_every 1 --device cpu'.split()  # 120 steps
FEWER = [*SMALL, '--epochs', '10']  # for what is launched, which starts slowly
LAUNCH = [sys.executable, '-c', 'from marsclr.engine.processes import marsclr_launch; marsclr_launch()', '--cpu', '--num_processes', '2', '-m', 'marsclr.pretrain']
KEPT = {'.lock', 'config.json', 'images.csv', 'log.csv', 'checkpoint.pt', 'checkpoint-before.pt', 'encoder.safetensors'}


def start(pack, run): return Script(['marsclr_pretrain', pack, run, *SMALL], run.parent/'out')


def finish(pack, run):
    status, out, err = start(pack, run).communicate()
    assert status == 0, err
    return out


def start_two(pack, run):
    return subprocess.Popen([*LAUNCH, pack, run, *FEWER], env=os.environ | {'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_two(pack, run):
    process = start_two(pack, run)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def position(run):
    "Epoch and step of the newest checkpoint, which must be readable, or None"
    for name in ('checkpoint.pt', 'checkpoint-before.pt'):
        with suppress(FileNotFoundError):
            state = torch.load(run/name, weights_only=True)
            return state['epoch'], state['step']


def wait_for(process, condition):
    "Wait until it holds; the process must not end before"
    began = time.monotonic()
    while not condition():
        assert process.poll() is None and time.monotonic() - began < 120, 'it ended too early, or hangs'
        time.sleep(.0005)


def kill(pack, run, when):
    "Kill a run `when` seconds after its next checkpoint (after its start, if that is below zero), or while it writes one (None). The position it is left at"
    process, before = start(pack, run), position(run)
    if when is None or when >= 0: wait_for(process, lambda: position(run) != before)
    if when is None: wait_for(process, lambda: glob.glob(f'{run}/.checkpoint.pt-*/*'))
    else: time.sleep(abs(when))
    assert process.poll() is None, 'there was nothing left to kill'
    process.kill()
    assert process.communicate()[0] == -signal.SIGKILL
    for o in run.glob('checkpoint*.pt'): load_checkpoint(o)
    return position(run)


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
    "A run that is killed twenty times: eight times at a random moment of a step, eight times while it writes a checkpoint, four times while it starts; with the positions it was left at"
    run, rng = tmp_path_factory.mktemp('killed')/'run', random.Random(7)
    moments = [rng.uniform(0, .2) for _ in range(8)] + [None]*8 + [-rng.uniform(.02, .3) for _ in range(4)]
    rng.shuffle(moments)
    left = [kill(pack, run, o) for o in moments]
    finish(pack, run)
    return run, [o for o in [*left, position(run)] if o]


def test_the_run_was_stopped_midway_and_never_went_back(killed):
    _, left = killed
    assert left == sorted(left) and left[0] < (30, 0) and left[-1] == (30, 0)
    assert len(set(left)) >= 16 and any(step for _, step in left)


def test_the_encoder_is_that_of_an_undisturbed_run(killed, alone):
    assert digest(killed[0]/'encoder.safetensors') == digest(alone/'encoder.safetensors')


def test_the_log_is_that_of_an_undisturbed_run(killed, alone):
    logs = [list(csv.DictReader((o/'log.csv').read_text().splitlines())) for o in (killed[0], alone)]
    for row in logs[0] + logs[1]: del row['seconds'], row['images_per_s']
    assert logs[0] == logs[1]
    assert [int(o['epoch']) for o in logs[0]] == list(range(30)) and len({o['loss'] for o in logs[0]}) == 30


def test_nothing_but_the_run_is_left(killed, alone):
    for run in (alone, killed[0]): assert {o.name for o in run.iterdir()} == KEPT


def test_a_run_killed_before_its_encoder_was_written_writes_it(pack, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path/'run', ignore=shutil.ignore_patterns('encoder*'))
    marsclr_pretrain([str(pack), str(run), *SMALL])
    assert digest(run/'encoder.safetensors') == digest(alone/'encoder.safetensors')


def test_half_a_checkpoint_that_a_killed_run_left_is_cleared_away(pack, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path/'run', ignore=shutil.ignore_patterns('encoder*'))
    (run/'.checkpoint.pt-abc1d_2e').mkdir()
    (run/'.checkpoint.pt-abc1d_2e'/'checkpoint.pt').write_bytes(b'half')
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
    assert e.value.code == f'marsclr_pretrain: {run}/checkpoint.pt cannot be written (OSError: [Errno 28] No space left on device); the last one is intact'
    assert position(run) == (0, 2) and {o.name for o in run.iterdir()} == {'.lock', 'config.json', 'images.csv', 'checkpoint.pt', 'checkpoint-before.pt'}


def test_a_full_disk_leaves_the_checkpoint_before(pack, alone, tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    size = (alone/'checkpoint.pt').stat().st_size*5//2  # room for two, not for the next beside them
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'no small disk can be mounted: {mounted.stderr.strip()}')
    try:
        with pytest.raises(SystemExit, match=f'^marsclr_pretrain: {disk}/run/checkpoint.pt cannot be written [^\n]*$'):
            marsclr_pretrain([str(pack), str(disk/'run'), *SMALL])
        assert {o.name for o in (disk/'run').iterdir()} == {'.lock', 'config.json', 'images.csv', 'checkpoint.pt', 'checkpoint-before.pt'}
        assert position(disk/'run') == (0, 2) and [load_checkpoint(disk/'run'/o)['step'] for o in ('checkpoint.pt', 'checkpoint-before.pt')] == [2, 1]
    finally: subprocess.run(['umount', disk], check=True)


def test_a_damaged_checkpoint_costs_one_step(pack, alone, tmp_path):
    run = shutil.copytree(alone, tmp_path/'run', ignore=shutil.ignore_patterns('encoder*'))
    bits = bytearray((run/'checkpoint.pt').read_bytes())
    bits[len(bits)//2] ^= 1
    (run/'checkpoint.pt').write_bytes(bits)
    out = finish(pack, run)
    assert re.search(rf'^{run}/checkpoint.pt cannot be read .* has another checksum\): going on from {run}/checkpoint-before.pt$', out, re.M)
    assert digest(run/'encoder.safetensors') == digest(alone/'encoder.safetensors')


@pytest.mark.parametrize('by', [signal.SIGTERM, signal.SIGINT], ids=lambda o: o.name)
def test_a_signal_saves_and_the_same_command_goes_on(pack, alone, tmp_path, by):
    run = tmp_path/'run'
    process = start(pack, run)
    wait_for(process, lambda: position(run))
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(SystemExit, match=f'^marsclr_pretrain: {run} is in use by another process: wait for it, or give another folder$'):
        marsclr_pretrain([str(pack), str(run), *SMALL])
    process.send_signal(signal.SIGCONT)
    process.send_signal(by)
    status, _, err = process.communicate()
    epoch, step = position(run)
    assert status == 128 + by
    assert err.splitlines()[-1] == f'marsclr_pretrain: {run} stopped by {by.name} before epoch {epoch}, step {step}: the same command goes on from there'
    finish(pack, run)
    assert digest(run/'encoder.safetensors') == digest(alone/'encoder.safetensors')


def children(process): return [int(o) for o in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


def rank_of(pid): return dict(o.split('=', 1) for o in Path(f'/proc/{pid}/environ').read_text().split('\0') if '=' in o).get('RANK')


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='which process has which rank is read from /proc')
def test_two_processes_of_which_one_is_killed_go_on(pack, tmp_path):
    "The first one, which writes the checkpoints"
    two_alone, run, which = tmp_path/'two_alone', tmp_path/'run', '0'
    finish_two(pack, two_alone)
    process = start_two(pack, run)
    wait_for(process, lambda: position(run))
    [victim] = [o for o in children(process) if rank_of(o) == which]
    os.kill(victim, signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and err.splitlines()[-1] == f'marsclr_launch: process {which} failed first: Signal 9 (SIGKILL) received by PID {victim}', err
    finish_two(pack, run)
    assert digest(run/'encoder.safetensors') == digest(two_alone/'encoder.safetensors')


def test_sigterm_to_two_processes_stops_both_at_one_step(pack, tmp_path):
    run = tmp_path/'run'
    process = start_two(pack, run)
    wait_for(process, lambda: position(run))
    process.terminate()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and err.splitlines()[-1] == 'marsclr_launch: stopped by SIGTERM', err
    stopped = [o for o in err.splitlines() if 'the same command goes on from there' in o]
    assert len(stopped) == 2 and len(set(stopped)) == 1
    assert 'epoch {}, step {}:'.format(*position(run)) in stopped[0]


def test_sigterm_to_a_launcher_of_one_process_reaches_it(pack, alone, tmp_path):
    run, launch = tmp_path/'run', [o if o != '2' else '1' for o in LAUNCH]
    process = subprocess.Popen([*launch, pack, run, *SMALL], env=os.environ | {'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: position(run))
    process.terminate()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and 'stopped by SIGTERM before epoch {}, step {}:'.format(*position(run)) in err, err
    finish(pack, run)
    assert digest(run/'encoder.safetensors') == digest(alone/'encoder.safetensors')


def test_a_learning_rate_that_explodes_stops_with_the_step(pack, tmp_path):
    with pytest.raises(SystemExit, match=r'^marsclr_pretrain: the loss is (nan|inf) at epoch \d+, step \d+ \(ContrastiveLoss\(temperature=0.5, .*lr 1.0e\+30, (bf16|fp32)\): lower the learning rate'
                                         r'|^marsclr_pretrain: .* is not finite after epoch \d+, step \d+: lower the learning rate'):
        marsclr_pretrain([str(pack), str(tmp_path/'run'), *SMALL, '--lr', '1e30'])
    for o in (tmp_path/'run').glob('checkpoint*.pt'): assert all(v.isfinite().all() for v in load_checkpoint(o)['model'].values())


def cluster(pack, to):
    return Script(['marsclr_cluster', pack, '--to', to, '--source', 'texture', *'--clusters 4 --backbone test_resnet --epochs 4 --size 32 --device cpu'.split()], to.parent/'out')


def test_texture_clustering_that_was_killed_finds_the_same_clusters(pack, tmp_path):
    for name in ('alone', 'killed'):
        process = cluster(pack, tmp_path/f'{name}.npz')
        if name == 'killed':
            wait_for(process, lambda: position(tmp_path/'killed.run'))
            process.kill()
            process.communicate()
            assert not (tmp_path/'killed.npz').exists() and position(tmp_path/'killed.run') < (4, 0)
            process = cluster(pack, tmp_path/'killed.npz')
        status, _, err = process.communicate()
        assert status == 0, err
    assert digest(tmp_path/'alone.npz') == digest(tmp_path/'killed.npz')
