"W processes must be one process: the loss on a divided batch, and its gradients, equal those on the whole."
import pytest, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from marsclr.losses import losses

IMAGES, DIM = 8, 6


def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, IMAGES, DIM, generator=g, dtype=torch.float64)
    ids = torch.arange(IMAGES)
    return x, ids, ids % 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def loss_and_gradients(model, name, part):
    "Two views of the images in `part`, as the training loop stacks them"
    x, ids, clusters = batch()
    loss = losses[name](temperature=.3)(model(torch.cat([x[0, part], x[1, part]])), ids[part].repeat(2), clusters[part].repeat(2))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def one_process(rank, world, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)
    assert dist.get_world_size() == world
    part = torch.arange(IMAGES).view(world, -1)[rank]
    res = {name: loss_and_gradients(DistributedDataParallel(network()), name, part) for name in losses}
    torch.save(res, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, 4])
def test_divided_batch_gives_the_loss_and_gradients_of_the_whole(world, tmp_path):
    torch.multiprocessing.spawn(one_process, (world, str(tmp_path)), nprocs=world)
    whole = {name: loss_and_gradients(network(), name, torch.arange(IMAGES)) for name in losses}
    for rank in range(world):
        for name, (loss, grads) in torch.load(tmp_path/f'{rank}.pt', weights_only=True).items():
            assert loss == pytest.approx(whole[name][0], abs=1e-9)
            for ours, theirs in zip(grads, whole[name][1]): torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
