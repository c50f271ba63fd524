"W processes must be one process: the loss on a divided batch, its gradients, the weights after training, features, and resuming with another W."
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fastai.learner import Recorder
from fastai.optimizer import OptimWrapper
from forked import forks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from marsclr.engine.views import Views
from marsclr.engine.clusters import label_clusters, load_clusters
from marsclr.datasets import msl
from marsclr.engine.encoders import ContrastiveModel, create_encoder, encode
from marsclr.losses import losses, plain_loss
from marsclr.archives.marsyard import write_marsyard
from marsclr.engine.learner import StopAfter
from marsclr.engine.packing import load_pack, pack_archive
from marsclr.engine.processes import process_group, rank, world_size
from marsclr.engine.runs import PackLoader, RunFolder
from marsclr.texture import TripletLoss
from marsclr.training import contrastive_learner

IMAGES, DIM = 8, 6


def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, IMAGES, DIM, generator=g, dtype=torch.float64)
    ids = torch.arange(IMAGES)
    return x, ids, ids % 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def backward(model, loss):
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def contrastive(name, model, part):
    "Two views of the images in `part`, as the training loop stacks them"
    x, ids, clusters = batch()
    return backward(model, losses[name](temperature=.3)(model(torch.cat([x[0, part], x[1, part]])), ids[part].repeat(2), clusters[part].repeat(2)))


def plain(name, model):
    "The same with the lesson's plain loss, in one process"
    x, ids, clusters = batch()
    loss = losses[name]()
    switches = loss.positives, loss.negatives, loss.positive_in_denominator
    return backward(model, plain_loss(model(x.flatten(0, 1)), ids.repeat(2), clusters.repeat(2), .3, *switches))


def triplet(model, part):
    x, ids, _ = batch()
    return backward(model, TripletLoss(.5)(model(x[0, part]), ids[part]//2, 42, 0, 0))


SETTINGS = {**{name: partial(contrastive, name) for name in losses}, 'triplet': triplet}


def gradients(folder):
    part = torch.arange(IMAGES).view(world_size(), -1)[rank()]
    torch.save({name: f(DistributedDataParallel(network()), part) for name, f in SETTINGS.items()}, f'{folder}/{rank()}.pt')


def projector():
    "Without batch statistics: a ConvNeXt has layer norm, and the head is linear"
    torch.manual_seed(1)
    encoder = create_encoder('convnext_atto', depths=(1, 1, 1, 1), dims=(16, 32, 64, 128))
    return ContrastiveModel(encoder, nn.Linear(encoder.num_features, 16))


class Double(nn.Module):
    "A model that works in float64"
    def __init__(self, model):
        super().__init__()
        self.model = model.double()
    def forward(self, x): return self.model(x.double())


def sgd(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, momentum=.9, **kwargs)


PRECISIONS = {'float32': dict(opt_func=sgd, lr=.001), 'float64': dict(lr=3e-4)}


def train(folder, name, precision='float32', cbs=()):
    "Twenty steps, four an epoch"
    pack = load_pack(f'{folder}/pack')
    model = projector() if precision == 'float32' else Double(projector())
    loss = losses[name](temperature=.5)
    clusters = label_clusters(pack).ids if loss.needs_clusters else None
    learn = contrastive_learner(pack, model, loss, Views(32), clusters, bs=16, bf16=False, device='cpu', cbs=cbs, **PRECISIONS[precision])
    learn.remove_cb(Recorder)  # it cannot average float64
    with learn.no_bar(): learn.fit(5)
    return learn.model.state_dict()


def train_all(folder):
    torch.save({(name, precision): train(folder, name, precision) for name in losses for precision in PRECISIONS}, f'{folder}/{rank()}.pt')


def train_half(folder): train(folder, 'ntxent', cbs=[RunFolder(f'{folder}/run', save_every=5), StopAfter(10)])


def train_on(folder): torch.save(train(folder, 'ntxent', cbs=RunFolder(f'{folder}/run', save_every=5)), f'{folder}/{rank()}.pt')


def features(folder):
    net = projector().encoder
    few = load_pack(f'{folder}/pack').where(np.arange(64) < 5)
    torch.save([encode(net, o, device='cpu') for o in (load_pack(f'{folder}/pack'), few)], f'{folder}/{rank()}.pt')


def indivisible(folder):
    with pytest.raises(ValueError, match='a batch of 15 images cannot be divided among 2 processes'): PackLoader(load_pack(f'{folder}/pack'), 15)
    open(f'{folder}/{rank()}.pt', 'w').close()


def one_process(number, w, port, work, folder):
    torch.set_num_threads(1)  # or they fight for the cores
    os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(w), MASTER_ADDR='localhost', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    if w == 1: dist.init_process_group('gloo')  # data-parallel training wants a group even then
    with process_group(torch.device('cpu')):
        assert (world_size(), rank(), dist.get_backend()) == (w, number, 'gloo')
        work(str(folder))
    if w > 1:
        with pytest.raises(ValueError, match='cannot a second time'), process_group(torch.device('cpu')): pass


def several(w, work, folder):
    "Run `work` in that many processes"
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(one_process, (w, port, work, folder), nprocs=w, start_method=forks.get_start_method())


def make_pack(folder):
    pack_archive(msl(write_marsyard(folder/'yard', n=64, size=32, n_classes=3)), folder/'pack', size=32)
    return folder


@pytest.fixture
def folder(tmp_path): return make_pack(tmp_path)


def largest_difference(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize('w', [1, 2, 4])
def test_divided_batch_gives_the_loss_and_gradients_of_the_whole(w, tmp_path):
    several(w, gradients, tmp_path)
    whole = {name: f(network(), torch.arange(IMAGES)) for name, f in SETTINGS.items()}
    whole |= {name: plain(name, network()) for name in losses
              if hasattr(losses[name](), 'positive_in_denominator')}
    for i in range(w):
        for name, (loss, grads) in torch.load(tmp_path/f'{i}.pt', weights_only=True).items():
            assert loss == pytest.approx(whole[name][0], abs=1e-9)
            for ours, theirs in zip(grads, whole[name][1]): torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The weights that one process ends at, and those it began with"
    folder = make_pack(tmp_path_factory.mktemp('alone'))
    train_all(folder)
    return torch.load(folder/'0.pt', weights_only=True), projector().state_dict()


@pytest.mark.parametrize('w', [2, 4])
def test_twenty_steps_end_at_the_weights_of_one_process(w, folder, alone):
    "To 1e-6 in float32 with SGD, to 1e-9 in float64 with Adam (which makes full steps of gradients that are rounding noise, so float32 tells nothing)"
    several(w, train_all, folder)
    for i in range(w):
        for (name, precision), weights in torch.load(folder/f'{i}.pt', weights_only=True).items():
            assert largest_difference(weights, alone[0][name, precision]) < dict(float32=1e-6, float64=1e-9)[precision], (name, precision)
            if precision == 'float32': assert largest_difference(weights, alone[1]) > 1e-3, name


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, folder, alone):
    several(before, train_half, folder)
    assert torch.load(folder/'run/checkpoint.pt', weights_only=True)['epoch'] == 2
    several(after, train_on, folder)
    for i in range(after): assert largest_difference(torch.load(folder/f'{i}.pt', weights_only=True), alone[0]['ntxent', 'float32']) < 1e-6


def test_processes_share_the_encoding(folder):
    several(4, features, folder)
    all_of_it, few = load_pack(folder/'pack'), load_pack(folder/'pack').where(np.arange(64) < 5)
    net = projector().encoder
    for i in range(4):
        for ours, pack in zip(torch.load(folder/f'{i}.pt', weights_only=True), (all_of_it, few)):
            torch.testing.assert_close(ours, encode(net, pack, device='cpu'), rtol=0, atol=.02*ours.abs().max().item())


def test_a_batch_that_cannot_be_divided_is_refused(folder):
    several(2, indivisible, folder)
    assert {o.name for o in folder.glob('*.pt')} == {'0.pt', '1.pt'}


def launch(*line):
    "A command line in two processes"
    start = [sys.executable, '-c', 'from marsclr.engine.processes import marsclr_launch; marsclr_launch()', '--cpu', '--num_processes', '2']
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    return subprocess.run([*start, *map(str, line)], env=env, capture_output=True, text=True, timeout=300)


def test_clustering_and_probing_run_in_two_processes_and_write_once(folder):
    pack, small = folder/'pack', '--device cpu --backbone resnet10t --clusters 4 --size 32'.split()
    for source, found in (('texture', '4 clusters of 64 images from texture, K=4'), ('features', '4 clusters of 64 images from features of a random resnet10t, K=4')):
        done = launch('--no_python', 'marsclr_cluster', pack, '--source', source, '--to', folder/f'{source}.npz', *small, *(['--epochs', '2'] if source == 'texture' else []))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f'{found}: {folder}/{source}.npz') == 1
        assert set(load_clusters(folder/f'{source}.npz', load_pack(pack)).ids) == set(range(4))
    done = launch('--no_python', 'marsclr_probe', 'random', pack, '--backbone', 'resnet10t', '--to', folder/'probe')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('accuracy') == 1 and (folder/'probe'/'summary.json').is_file()


def test_what_one_process_refuses_two_refuse_and_say_last(folder):
    done = launch('-m', 'marsclr.pretrain', folder/'pack', folder/'pack', '--backbone', 'resnet10t', '--batch_size', '16', '--device', 'cpu')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f'failed first: MarsclrError: {folder}/pack exists and is not a run: give another run folder')
    done = launch('--no_python', 'marsclr_pack', 'folder', folder/'new.pack', '--root', folder/'yard')
    assert 'works in one process' in done.stderr.splitlines()[-1] and not (folder/'new.pack').exists()
