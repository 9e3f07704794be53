"""Whole steps against lightly's losses: same weights, views and targets give the same loss and
gradients. MoCo v2, VICReg and Barlow Twins have theirs in their own files."""

import copy

import pytest
import steps
import torch
import torch.nn.functional as F

lightly = pytest.importorskip("lightly.loss")

CROPS = (8, 8, 4, 4)


def simclr(method, batch):
    z0, z1 = (method.head(method.backbone(x)) for x in batch.views)
    return lightly.NTXentLoss(0.2)(z0, z1)


def byol(method, batch):
    x = torch.cat(batch.views)
    p0, p1 = method.predictor(method.projector(method.backbone(x))).chunk(2)
    with torch.no_grad():
        t0, t1 = method.teacher(x).chunk(2)
    peer = lightly.NegativeCosineSimilarity()
    return 2 + peer(p0, t1) + peer(p1, t0)  # the mean of 2 - 2 cos


def crops(network, batch):
    """The network's output for large and for small crops, V of (B, ...)."""
    views = batch.views
    return [*network(torch.cat(views[:2])).chunk(2), *network(torch.cat(views[2:])).chunk(2)]


def swav(method, batch):
    z = crops(lambda x: method.projector(method.backbone(x)), batch)
    scores = [method.prototypes(F.normalize(x)) for x in z]
    with torch.no_grad():
        past = [method.prototypes(queue.features) for queue in method.queues]
    return lightly.SwaVLoss()(scores[:2], scores[2:], past).squeeze()


def dino(method, batch):
    x = torch.cat(batch.views[:2])
    with torch.no_grad():
        t = method.teacher(x).chunk(2)
    s = crops(lambda x: method.prototypes(method.projector(method.backbone(x))), batch)
    peer = lightly.DINOLoss(12)
    peer.center.copy_(method.dino.center)
    loss = peer([*t], s, teacher_temp=0.055)
    method.dino.center.copy_(peer.center)  # compared after the step
    return loss


CASES = {
    simclr: ({"temperature": 0.2, "out_dim": 8}, (8, 8)),
    byol: ({"hidden_dim": 16, "out_dim": 8}, (8, 8)),
    swav: (
        {
            "hidden_dim": 16, "out_dim": 8, "num_prototypes": 12, "local_views": 2,
            "freeze_steps": 0, "queue_size": 20, "wait_epochs": 0.0,
        },
        CROPS,
    ),
    dino: (
        {
            "hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "local_views": 2,
            "batch_norm": True, "temperature_epochs": 4.0,
        },
        CROPS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("theirs", CASES, ids=lambda theirs: theirs.__name__)
def test_step_is_lightlys(theirs):
    arguments, sizes = CASES[theirs]
    method, batch = steps.built(theirs.__name__, **arguments), steps.batch(4, sizes=sizes)
    if theirs in (byol, dino):
        steps.disturb_teacher(method)
    if theirs is dino:
        method.dino.center.copy_(0.2 * torch.randn(12))
    other = copy.deepcopy(method)
    want = steps.with_gradients(other, theirs(other, batch))
    got = steps.with_gradients(method, method.loss(batch)[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    if theirs is dino:
        torch.testing.assert_close(method.dino.center, other.dino.center)
