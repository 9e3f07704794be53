import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fastssl.augment import RandomResizedCrop
from fastssl.config import PretrainConfig
from fastssl.data import Batch, load
from fastssl.dist import SyncBatchNorm
from fastssl.methods import DINO
from fastssl.methods.recipes import resolve
from fastssl.models import ResNetSmall
from fastssl.train import setup
from fastssl.train.parallel import Objective
from fastssl.train.update import Update

CPU = torch.device("cpu")
SMALL = {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "local_views": 2}


def dino(**arguments):
    torch.manual_seed(0)
    return DINO(ResNetSmall(1, 8, 16), **SMALL | arguments)


def batch(step=0, count=16, sizes=(8, 8, 4, 4)):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(count, 1, size, size, generator=generator) for size in sizes]
    index = torch.arange(count)
    return Batch(views, index, torch.full((count,), -1), step, 10, epoch=step / 2)


def scores(network, x):
    z = F.normalize(network.projector(network.backbone(x)), dim=1)
    w = network.prototypes.weight
    return z @ (w / w.norm(dim=1, keepdim=True)).T


def papers_loss(method, views, tau_t):
    """The paper's box, one crop at a time, with the centre or Sinkhorn-Knopp; and what moves it."""
    with torch.no_grad():
        t = torch.cat([scores(method.teacher, x) for x in views[:2]])
        if method.dino.centering == "mean":
            q = ((t - method.dino.center[0]) / tau_t).softmax(1)
        else:
            q = (t / tau_t).exp()
            for _ in range(3):
                q = q / q.sum(0)
                q = q / q.sum(1, keepdim=True)
    logs = [(scores(method, x) / 0.1).log_softmax(1) for x in views]
    pairs = [(a, b) for a in q.chunk(2) for b in logs]
    del pairs[len(views) + 1], pairs[0]  # a crop with itself
    return sum(-(a * b).sum(1).mean() for a, b in pairs) / len(pairs), t.mean(0)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_loss_and_gradients_are_the_papers(centering):
    method = dino(centering=centering, temperature_epochs=4.0).eval()
    for p in method.teacher.parameters():  # another network than the student
        p.add_(0.1 * torch.randn_like(p))
    if centering == "mean":
        method.dino.center.copy_(0.2 * torch.randn(12))
    centre, x = method.dino.center.flatten().clone(), batch(step=4)  # epoch 2 of 4
    want, mean = papers_loss(method, x.views, 0.055)  # half way from 0.04 to 0.07
    loss, scalars = method.loss(x)
    torch.testing.assert_close(loss, want)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for got, right in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-4)
    moved = 0.9 * centre + 0.1 * mean if centering == "mean" else centre
    torch.testing.assert_close(method.dino.center.flatten(), moved)
    assert scalars["teacher_temperature"] == pytest.approx(0.055)
    assert 1 <= scalars["effective_prototypes"] <= scalars["prototypes"] == 12
    assert 0.2 < scalars["std"] < 1.2


def test_loss_of_equal_scores_is_ln_k():
    method = dino()
    torch.nn.init.ones_(method.prototypes.weight)
    loss, _ = method.loss(batch())
    assert loss.item() == pytest.approx(math.log(12), abs=1e-5)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    source = load("digits")
    assert [view.size for view in DINO(ResNetSmall(1, 8, 16), out_dim=4).views(224, source)] == (
        [224] * 2 + [96] * 8
    )
    views = dino().views(8, source)
    assert [view.size for view in views] == [8, 8, 4, 4]
    crops = [view.get(RandomResizedCrop).scale for view in views]
    assert crops == [(0.4, 1.0)] * 2 + [(0.1, 0.4)] * 2
    assert [view.size for view in dino(local_size=6).views(8, source)] == [8, 8, 6, 6]


def test_prototypes_stand_in_the_first_epoch():
    method = dino(freeze_epochs=1.0)
    for step, stands in ((0, True), (1, True), (2, False)):
        method.zero_grad()
        method.loss(batch(step))[0].backward()
        assert bool((method.prototypes.weight.grad == 0).all()) == stands
        assert all(p.grad.any() for p in method.projector.parameters() if p.ndim == 2)
        assert all(p.grad is None for p in method.teacher.parameters())


def test_teacher_follows_more_slowly_and_stands_at_the_end():
    method = dino(momentum=0.5)
    student, teacher = method.prototypes.weight, method.teacher.prototypes.weight
    with torch.no_grad():
        student.add_(1.0)
    for step in (1, 5, 10):
        m = 1 - 0.5 * (math.cos(math.pi * step / 10) + 1) / 2
        want = m * teacher + (1 - m) * student
        method.after_step(step, 10)
        torch.testing.assert_close(teacher, want)
    assert torch.equal(want, teacher)  # m = 1


def trained(method, objective, part=slice(None), steps=3, **settings):
    settings = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0} | settings
    config = resolve(PretrainConfig(method="dino", final_weight_decay=0.0, **settings))
    setup.train_mode(method, [])
    optimizer = setup.build_optimizer(config, method, CPU)
    update = Update(config, method, optimizer, CPU, "fp32")
    for step in range(steps):
        whole = batch(step)
        views = [x[part] for x in whole.views]
        update(objective, dataclasses.replace(whole, views=views, index=whole.index[part]))
        method.after_step(step + 1, 10)
    return method.state_dict()


def test_the_state_is_all_there_is():
    methods = dino(momentum=0.9), dino(momentum=0.9), dino(momentum=0.9)
    once, again, loaded = methods
    trained(once, Objective(once), steps=2)
    loaded.load_state_dict(trained(again, Objective(again), steps=2))
    losses = [method.train().loss(batch(2))[0] for method in methods]
    assert losses[0] == losses[1] == losses[2]
    for method in methods:
        method.after_step(3, 10)
    for name, x in once.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]) and torch.equal(
            x, loaded.state_dict()[name]
        )


def test_sam_moves_the_centre_once():
    plain, sam = dino(), dino()
    trained(plain, Objective(plain), steps=1)
    trained(sam, Objective(sam), steps=1, sam_rho=0.05)
    assert plain.dino.center.any() and torch.equal(plain.dino.center, sam.dino.center)
    assert not torch.equal(plain.backbone.conv.weight, sam.backbone.conv.weight)


def distributed(group, centering):
    rank, world = dist.get_rank(), dist.get_world_size()
    method = SyncBatchNorm.convert_sync_batchnorm(dino(momentum=0.5, centering=centering))
    part = slice(rank * 16 // world, (rank + 1) * 16 // world)
    return trained(method, DistributedDataParallel(Objective(method)), part)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_four_ranks_have_the_weights_centre_and_teacher_of_one_process(ranks, centering):
    method = dino(momentum=0.5, centering=centering)
    want = trained(method, Objective(method))
    for got in ranks.run(distributed, 4, centering):
        assert got.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, atol=1e-4, rtol=1e-3)
