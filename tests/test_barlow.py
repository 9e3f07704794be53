import copy

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import Solarize
from fastssl.data import load
from fastssl.methods import BarlowTwins

SMALL = {"hidden_dim": 16, "out_dim": 8}


def test_white_twins_have_no_loss():
    method = BarlowTwins(steps.Rows(2), out_dim=2)
    method.projector = torch.nn.Identity()
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(steps.loss_of_rows(method, z, z)[0]) == pytest.approx(0, abs=1e-8)
    loss, _ = steps.loss_of_rows(method, z, z[:, :1].expand(4, 2))  # C = [[1, 1], [0, 0]]
    assert float(loss) == pytest.approx(1 + 0.0051, rel=1e-4)


def projections(method):
    return [method.projector(method.backbone(x)) for x in steps.batch().views]


def reference(z0, z1):
    """sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, as in the released code."""
    x0, x1 = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    c = x0.T @ x1 / len(z0)
    off_diagonal = c - c.diagonal().diag()
    return (1 - c.diagonal()).square().sum() + 0.0051 * off_diagonal.square().sum()


@pytest.mark.parametrize("peer", ["released", "lightly"])
def test_step_is_the_papers(peer):
    method = steps.built("barlow", **SMALL)
    other = copy.deepcopy(method)
    form = reference
    if peer == "lightly":
        form = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)
    want = steps.with_gradients(other, form(*projections(other)))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}
    assert 0.2 < scalars["std"] < 1.2


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("barlow", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "barlow", **SMALL)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("barlow", **SMALL)
    assert len(set(method.views(8, load("digits")))) == 1
    first, second = method.views(96, load("digits"))
    assert second.get(Solarize) and not first.get(Solarize)
