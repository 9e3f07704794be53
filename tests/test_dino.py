import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import RandomResizedCrop
from fastssl.data import load
from fastssl.methods import DINO
from fastssl.models import ResNetSmall
from fastssl.train.parallel import Objective

SIZES = (8, 8, 4, 4)
SMALL = {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "local_views": 2}


def dino(**arguments):
    return steps.built("dino", **SMALL | arguments)


def batch(step=0):
    return steps.batch(step, sizes=SIZES)


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
    steps.disturb_teacher(method)
    if centering == "mean":
        method.dino.center.copy_(0.2 * torch.randn(12))
    centre, x = method.dino.center.flatten().clone(), batch(step=4)  # epoch 2 of 4
    want, mean = papers_loss(method, x.views, 0.055)  # half way from 0.04 to 0.07
    loss, scalars = method.loss(x)
    want = steps.with_gradients(method, want)
    torch.testing.assert_close(steps.with_gradients(method, loss), want, atol=1e-6, rtol=1e-4)
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
    steps.assert_teacher_follows(method, method.prototypes.weight, method.teacher.prototypes.weight)


def test_sam_moves_the_centre_once():
    plain, sam = dino(), dino()
    steps.trained(plain, Objective(plain), steps=1, sizes=SIZES)
    steps.trained(sam, Objective(sam), steps=1, sizes=SIZES, sam_rho=0.05)
    assert plain.dino.center.any() and torch.equal(plain.dino.center, sam.dino.center)
    assert not torch.equal(plain.backbone.conv.weight, sam.backbone.conv.weight)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_steps(ranks, centering):
    arguments = SMALL | {"momentum": 0.5, "centering": centering}
    steps.assert_repeats_and_goes_on("dino", SIZES, **arguments)
    steps.assert_ranks_are_one_process(ranks, "dino", SIZES, **arguments)
