import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import PretrainConfig
from fastssl.data import Batch, load
from fastssl.dist import SyncBatchNorm
from fastssl.methods import SwAV
from fastssl.methods.blocks import spread
from fastssl.methods.recipes import resolve
from fastssl.models import ResNetSmall
from fastssl.train import setup
from fastssl.train.parallel import Objective
from fastssl.train.update import Update

CPU = torch.device("cpu")
SMALL = {"hidden_dim": 16, "out_dim": 8, "num_prototypes": 12, "local_views": 2, "freeze_steps": 0}
SMALL |= {"queue_size": 20, "wait_epochs": 0.0}


def swav(**arguments):
    torch.manual_seed(0)
    return SwAV(ResNetSmall(1, 8, 16), **SMALL | arguments)


def batch(step=0, count=16, sizes=(8, 8, 4, 4)):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(count, 1, size, size, generator=generator) for size in sizes]
    index = torch.arange(count)
    return Batch(views, index, torch.full((count,), -1), step, 10, epoch=step / 2)


def codes(scores, count):
    """The paper's listing: of the last `count` rows of (N, K) scores."""
    Q = (scores / 0.05).exp().T
    Q = Q / Q.sum()
    K, N = Q.shape
    for _ in range(3):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0) / N
    return (Q * N).T[-count:]


@pytest.mark.parametrize("step", [0, 2], ids=["without queue", "with queue"])
def test_loss_and_gradients_are_the_papers(step):
    method, x = swav().eval(), batch(step)
    for queue in method.queues:
        queue.enqueue(F.normalize(torch.randn(20, 8)))
    C = method.prototypes.weight
    z = [F.normalize(method.projector(method.backbone(view))) for view in x.views]
    with torch.no_grad():
        past = [queue.features @ C.T for queue in method.queues]
        large = [
            torch.cat([p, y @ C.T]) if step else y @ C.T for p, y in zip(past, z[:2], strict=True)
        ]
        q = [codes(scores, 16) for scores in large]
    logs = [(y @ C.T / 0.1).log_softmax(1) for y in z]
    terms = [-(q[a] * p).sum(1).mean() for a in range(2) for v, p in enumerate(logs) if v != a]
    want = sum(terms) / len(terms)
    loss, scalars = method.loss(x)
    torch.testing.assert_close(loss, want)
    parameters = list(method.parameters())
    for got, right in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-4)
    for queue, y in zip(method.queues, z[:2], strict=True):  # 20 rows stand before these
        torch.testing.assert_close(queue.features[:16], y.detach())
    assert 1 <= scalars["effective_prototypes"] <= scalars["prototypes"] == 12
    assert scalars["std"] == spread(z[0])


def test_the_queue_waits_until_it_is_full_and_the_epochs_are_over():
    method = swav(wait_epochs=1.5)
    active = [method._queued(batch(step)) is not None for step in range(5)]
    assert active == [False, False, False, True, True]  # full after 2 steps of 16, epoch 1.5 at 3
    assert [len(rows) for rows in method._queued(batch(3))] == [20, 20]
    assert swav(queue_size=0).loss(batch(3))[0].isfinite()


def test_loss_of_equal_scores_is_ln_k():
    method = swav()
    with torch.no_grad():
        method.prototypes.weight[1:] = method.prototypes.weight[0].clone()
    loss, _ = method.loss(batch())
    assert loss.item() == pytest.approx(math.log(12), abs=1e-5)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    source = load("digits")
    method = SwAV(ResNetSmall(1, 8, 16))
    assert [view.size for view in method.views(224, source)] == [224] * 2 + [96] * 6
    assert [view.size for view in swav().views(8, source)] == [8, 8, 4, 4]
    assert [view.size for view in swav(local_size=6).views(8, source)] == [8, 8, 6, 6]


def trained(method, objective, part=slice(None), steps=4, **settings):
    settings = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.01} | settings
    config = resolve(PretrainConfig(method="swav", **settings))
    setup.train_mode(method, [])
    optimizer = setup.build_optimizer(config, method, CPU)
    update = Update(config, method, optimizer, CPU, "fp32")
    for step in range(steps):
        whole = batch(step)
        views = [x[part] for x in whole.views]
        update(objective, dataclasses.replace(whole, views=views, index=whole.index[part]))
        method.after_step(step + 1, 10)
    return method.state_dict()


def test_prototypes_stand_at_first_and_stay_on_the_sphere():
    method = swav(freeze_steps=2)
    before = method.prototypes.weight.detach().clone()
    trained(method, Objective(method), steps=2)
    torch.testing.assert_close(method.prototypes.weight.detach(), before)  # but for rounding
    trained(method, Objective(method), steps=3)
    after = method.prototypes.weight.detach()
    assert (after - before).norm() > 1e-3
    torch.testing.assert_close(after.norm(dim=1), torch.ones(12))


def test_the_state_is_all_there_is():
    methods = swav(), swav(), swav()
    once, again, loaded = methods
    trained(once, Objective(once), steps=3)
    loaded.load_state_dict(trained(again, Objective(again), steps=3))
    losses = [method.train().loss(batch(3))[0] for method in methods]
    assert losses[0] == losses[1] == losses[2]
    for name, x in once.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]) and torch.equal(
            x, loaded.state_dict()[name]
        )


def test_sam_moves_the_queues_once():
    plain, sam = swav(), swav()
    trained(plain, Objective(plain), steps=1)
    trained(sam, Objective(sam), steps=1, sam_rho=0.05)
    for one, two in zip(plain.queues, sam.queues, strict=True):
        assert int(one.pointer) == int(two.pointer) == 16
        assert torch.equal(one.features, two.features)
    assert not torch.equal(plain.backbone.conv.weight, sam.backbone.conv.weight)


def distributed(group):
    rank, world = dist.get_rank(), dist.get_world_size()
    method = SyncBatchNorm.convert_sync_batchnorm(swav(freeze_steps=1))
    part = slice(rank * 16 // world, (rank + 1) * 16 // world)
    return trained(method, DistributedDataParallel(Objective(method)), part)


def test_four_ranks_have_the_weights_and_queues_of_one_process(ranks):
    method = swav(freeze_steps=1)
    want = trained(method, Objective(method))
    for got in ranks.run(distributed, 4):
        assert got.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, atol=1e-4, rtol=1e-3)
