import copy

import pytest
import steps
import torch

from fastssl.augment import Solarize
from fastssl.data import load
from fastssl.methods import VICReg

SMALL = {"hidden_dim": 16, "out_dim": 8}


def test_constant_embeddings():
    method = VICReg(steps.Rows(4), out_dim=4)
    method.expander = torch.nn.Identity()
    loss, scalars = steps.loss_of_rows(method, *torch.ones(2, 6, 4))
    assert float(loss) == pytest.approx(24.75) and float(scalars["std"]) == 0


def embeddings(method):
    return [method.expander(method.backbone(x)) for x in steps.batch().views]


def reference(z0, z1):
    """25 invariance + 25 variance + covariance, as in the paper's listing."""
    B, D = z0.shape
    loss = 25 * (z0 - z1).square().mean()
    for z in (z0, z1):
        x = z - z.mean(0)
        cov = x.T @ x / (B - 1)
        std = (cov.diagonal() + 1e-4).sqrt()
        off_diagonal = cov - cov.diagonal().diag()
        loss = loss + 25 * (1 - std).relu().mean() / 2 + off_diagonal.square().sum() / D
    return loss


@pytest.mark.parametrize("peer", ["listing", "lightly"])
def test_step_is_the_papers(peer):
    method = steps.built("vicreg", **SMALL)
    other = copy.deepcopy(method)
    form = reference
    if peer == "lightly":
        form = pytest.importorskip("lightly.loss").VICRegLoss()
    want = steps.with_gradients(other, form(*embeddings(other)))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}
    assert 0.2 < scalars["std"] < 1.2


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("vicreg", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "vicreg", **SMALL)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("vicreg", **SMALL)
    assert len(set(method.views(8, load("digits")))) == 1
    first, second = method.views(96, load("digits"))
    assert second.get(Solarize) and not first.get(Solarize)
