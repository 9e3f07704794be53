import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.data import load
from fastssl.losses import power_law_marginal
from fastssl.methods.blocks import spread

SMALL = {"hidden_dim": 16, "out_dim": 8, "num_prototypes": 12, "freeze_steps": 0}


def codes(scores, shares):
    """Sinkhorn-Knopp's, of (B, K) scores: ten times each prototype its share, each image 1 / B."""
    Q = (scores.double() / 0.03).exp().T
    for _ in range(10):
        Q = Q / Q.sum(1, keepdim=True) * shares[:, None]
        Q = Q / Q.sum(0) / Q.shape[1]
    return (Q * Q.shape[1]).T.float()


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_loss_and_gradients_are_the_papers(exponent):
    method, batch = steps.built("seer", exponent=exponent, **SMALL), steps.batch()
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"] and not len(method.queues)
    x = torch.cat(batch.views)  # of one size, so that BatchNorm sees them together
    z = F.normalize(method.projector(method.backbone(x)), dim=1).chunk(2)
    s = [y @ method.prototypes.weight.T for y in z]
    shares = torch.arange(1.0, 13) ** -exponent
    q = [codes(y.detach(), shares / shares.sum()) for y in s]
    logs = [(y / 0.1).log_softmax(1) for y in s]
    want = -((q[0] * logs[1]).sum(1).mean() + (q[1] * logs[0]).sum(1).mean()) / 2
    want = steps.with_gradients(method, want)
    loss, scalars = method.loss(batch)
    torch.testing.assert_close(steps.with_gradients(method, loss), want, atol=1e-5, rtol=1e-3)
    assert scalars["std"] == spread(z[0]) > 0
    assert 1 <= scalars["effective_prototypes"] <= scalars["prototypes"] == 12


def test_a_power_law_leaves_the_last_prototypes_less():
    marginal = steps.built("seer", exponent=0.5, **SMALL).swav.marginal
    torch.testing.assert_close(marginal, power_law_marginal(12, 0.5))
    assert marginal[0] / marginal[3] == pytest.approx(2)
    assert steps.built("seer", **SMALL).swav.marginal is None


def test_loss_of_equal_scores_is_ln_k():
    method = steps.built("seer", **SMALL)
    with torch.no_grad():
        method.prototypes.weight[1:] = method.prototypes.weight[0].clone()
    assert method.loss(steps.batch())[0].item() == pytest.approx(math.log(12), abs=1e-5)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    source, method = load("digits"), steps.built("seer", **SMALL)
    assert [view.size for view in method.views(160, source)] == [160] * 2 + [96] * 4
    assert [view.size for view in method.views(8, source)] == [8] * 2 + [4] * 4
    method = steps.built("seer", local_size=6, local_views=1, **SMALL)
    assert [view.size for view in method.views(96, source)] == [96, 96, 6]


def test_steps(ranks):
    settings = {**SMALL, "exponent": 0.5}
    steps.assert_repeats_and_goes_on("seer", **settings)
    steps.assert_ranks_are_one_process(ranks, "seer", **settings)
