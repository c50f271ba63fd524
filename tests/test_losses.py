"The losses as training calls them: no step waits for a device, and the fast loss is the plain one, on one process or with the anchors divided among several."
import pickle
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marsclr.engine.tiled_loss import contrastive_loss
from marsclr.losses import ContrastiveLoss, losses, plain_loss

WAITS = ('nonzero', 'item', '_local_scalar_dense', 'is_nonzero', 'masked_select', '_unique2', 'unique_dim', 'equal', 'repeat_interleave')


class NoWaiting(TorchDispatchMode):
    "Count the operations, and refuse those that would wait for a GPU"
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix('aten::').split('.')[0]
        assert name not in WAITS, f'{name} waits'
        if name.strip('_').startswith('index'):
            indices = [o for a in args[1:] if isinstance(a, (list, tuple)) for o in a]
            assert not any(isinstance(o, torch.Tensor) and o.dtype in (torch.bool, torch.uint8) for o in indices), f'{name} by a mask waits'
        self.count += 1
        return func(*args, **(kwargs or {}))


def batch(images=64, dim=16, k=5, dtype=torch.float32):
    z = torch.randn(2*images, dim, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(images).repeat(2)
    return z, ids, ids % k


@pytest.mark.parametrize('wait', [lambda z: z[z > 0], lambda z: (z > 0).nonzero(), lambda z: z.sum().item(), lambda z: bool((z > 0).any()),
                                  lambda z: z.masked_select(z > 0), lambda z: z.clone().__setitem__(z > 0, 0), lambda z: z.unique()])
def test_the_guard_refuses_what_waits(wait):
    with pytest.raises(AssertionError, match='waits'), NoWaiting(): wait(batch()[0].detach())


@pytest.mark.parametrize('name', losses)
def test_value_and_gradient_at_128_views_take_few_operations_and_wait_for_nothing(name):
    z, ids, clusters = batch()
    loss = losses[name](temperature=.5)
    loss(z, ids, clusters)  # the first call checks the ids, and waits
    with NoWaiting() as mode: loss(z, ids, clusters).backward()
    if isinstance(loss, ContrastiveLoss): assert mode.count <= 65
    assert z.grad.abs().max() > 0


@pytest.mark.parametrize('name', losses)
def test_a_pickled_loss_gives_the_same(name):
    z, ids, clusters = batch()
    loss = losses[name](temperature=.3)
    again = pickle.loads(pickle.dumps(loss))
    assert repr(again) == repr(loss)
    assert again(z, ids, clusters) == loss(z, ids, clusters)


def value_and_gradient(f, z):
    z = z.detach().requires_grad_()
    value = f(z)
    value.backward()
    return torch.cat([value.detach()[None], z.grad.flatten()])


@pytest.mark.parametrize('switches', product(('view', 'cluster'), ('view', 'cluster'), (True, False)))
@pytest.mark.parametrize('w', [1, 2, 4])
@pytest.mark.parametrize('k', [1, 3, 64])
def test_the_fast_loss_is_the_plain_one_whoever_takes_which_anchors(switches, w, k):
    z, ids, clusters = batch(k=k, dtype=torch.float64)
    plain = value_and_gradient(lambda z: plain_loss(z, ids, clusters, .2, *switches), z)
    each = len(z)//w
    for tile in (None, 10):
        def part(i): return lambda z: contrastive_loss(z, ids, clusters, .2, *switches, slice(i*each, (i+1)*each), tile)[0]
        parts = [value_and_gradient(part(i), z) for i in range(w)]
        torch.testing.assert_close(sum(parts)/w, plain, rtol=0, atol=1e-9)
    module = value_and_gradient(lambda z: ContrastiveLoss(.2, *switches)(z, ids, clusters), z)
    torch.testing.assert_close(module, plain, rtol=0, atol=1e-9)


def test_large_clusters():
    "A thousand views in two clusters: about 500 positives an anchor"
    z, ids, clusters = batch(images=512, k=2, dtype=torch.float64)
    for tile in (None, 100):
        fast = value_and_gradient(lambda z: contrastive_loss(z, ids, clusters, .1, 'cluster', 'cluster', False, tile=tile)[0], z)
        plain = value_and_gradient(lambda z: plain_loss(z, ids, clusters, .1, 'cluster', 'cluster', False), z)
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-9)
