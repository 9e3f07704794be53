import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.data import load
from fastssl.methods import SwAV
from fastssl.methods.blocks import spread
from fastssl.models import ResNetSmall
from fastssl.train.parallel import Objective

SIZES = (8, 8, 4, 4)
SMALL = {"hidden_dim": 16, "out_dim": 8, "num_prototypes": 12, "local_views": 2, "freeze_steps": 0}
SMALL |= {"queue_size": 20, "wait_epochs": 0.0}


def swav(**arguments):
    return steps.built("swav", **SMALL | arguments)


def batch(step=0):
    return steps.batch(step, sizes=SIZES)


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
    want = steps.with_gradients(method, want)
    torch.testing.assert_close(steps.with_gradients(method, loss), want, atol=1e-6, rtol=1e-4)
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


def test_prototypes_stand_at_first_and_stay_on_the_sphere():
    method = swav(freeze_steps=2)
    before = method.prototypes.weight.detach().clone()
    steps.trained(method, Objective(method), steps=2, sizes=SIZES)
    torch.testing.assert_close(method.prototypes.weight.detach(), before)  # but for rounding
    steps.trained(method, Objective(method), sizes=SIZES)
    after = method.prototypes.weight.detach()
    assert (after - before).norm() > 1e-3
    torch.testing.assert_close(after.norm(dim=1), torch.ones(12))


def test_sam_moves_the_queues_once():
    plain, sam = swav(), swav()
    steps.trained(plain, Objective(plain), steps=1, sizes=SIZES)
    steps.trained(sam, Objective(sam), steps=1, sizes=SIZES, sam_rho=0.05)
    for one, two in zip(plain.queues, sam.queues, strict=True):
        assert int(one.pointer) == int(two.pointer) == 16
        assert torch.equal(one.features, two.features)
    assert not torch.equal(plain.backbone.conv.weight, sam.backbone.conv.weight)


def test_steps(ranks):
    arguments = SMALL | {"freeze_steps": 1}  # and the queues take part from the third step on
    steps.assert_repeats_and_goes_on("swav", SIZES, **arguments)
    steps.assert_ranks_are_one_process(ranks, "swav", SIZES, **arguments)
