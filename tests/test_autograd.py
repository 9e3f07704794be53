"""No loss leaves out a second derivative without a word."""

import importlib

import pytest
import torch

from fastssl import ops

LOSSES = {
    "info_nce": lambda x: ops.info_nce(x, x.detach() + 1, temperature=0.5, normalize=True),
    "sup_con": lambda x: ops.sup_con(x, labels=torch.arange(8) // 2, temperature=0.5),
    "siglip": lambda x: ops.siglip(x, x.detach() + 1, logit_scale=2.0, logit_bias=0.0),
    "queue_nce": lambda x: ops.queue_nce(x, x.detach(), torch.randn(12, 6), temperature=0.5),
    "prototype_cross_entropy": lambda x: ops.prototype_cross_entropy(x, x.detach()),
    "linear_prototype_cross_entropy": lambda x: ops.linear_prototype_cross_entropy(
        x, torch.ones(5, 6), x.detach(), torch.ones(5, 6)
    ),
    "koleo": ops.koleo,
    "vicreg": lambda x: ops.vicreg(x, x.detach() + 1),
    "barlow_twins": lambda x: ops.barlow_twins(x, x.detach() + 1),
    "sigreg": lambda x: ops.sigreg(x, num_slices=4),
    "optimal_transport": lambda x: ops.optimal_transport(x, 0.5).square().sum(),
}


@pytest.fixture(params=[1 << 62, 0], ids=["few calls", "blocks"], autouse=True)
def form(request, monkeypatch):
    """Both forms of those losses that have one for small inputs."""
    for module in ("gram", "neighbours", "siglip"):
        found = importlib.import_module(f"fastssl.ops.{module}")
        monkeypatch.setattr(found, "SMALL", request.param)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused(name):
    w1, w2 = torch.randn(5, 7).requires_grad_(), torch.randn(7, 6).requires_grad_()
    x = torch.randn(8, 5)

    def first():
        loss = LOSSES[name]((x @ w1).tanh() @ w2)
        return loss, *torch.autograd.grad(loss, w1, create_graph=True)

    refused = pytest.raises(RuntimeError, match="is differentiable once")
    for inputs in (None, [w1], [w2]):
        loss, d = first()
        with refused:
            (loss + d.square().sum()).backward(inputs=inputs)
        loss, d = first()
        with refused:
            torch.autograd.grad(d.square().sum(), inputs or [w1, w2])


def test_the_first_derivative_is_right_with_a_graph():
    x = torch.randn(8, 6, requires_grad=True)
    for loss in LOSSES.values():
        torch.manual_seed(0)
        (plain,) = torch.autograd.grad(loss(x), x)
        torch.manual_seed(0)
        (kept,) = torch.autograd.grad(loss(x), x, create_graph=True)
        assert torch.equal(kept, plain)
