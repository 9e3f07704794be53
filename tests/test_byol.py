import signal

import pytest
import steps
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastssl.config import PretrainConfig
from fastssl.data import load
from fastssl.methods import BYOL
from fastssl.methods.blocks import Branch, batch_mean, encode, spread
from fastssl.methods.recipes import resolve
from fastssl.train import load_checkpoint, pretrain, setup
from fastssl.train.metrics import read_metrics

SMALL = {"hidden_dim": 16, "out_dim": 8}


def byol(**arguments):
    return steps.built("byol", **SMALL | arguments)


def test_closed_form():
    method = BYOL(steps.Rows(4), hidden_dim=4, out_dim=4)
    method.projector = method.predictor = torch.nn.Identity()
    method.ema.model = method.ema.module = Branch(method.backbone, torch.nn.Identity())
    x = torch.randn(5, 4)
    for y, want in ((-2 * x, 4), (3 * x, 0)):
        assert float(steps.loss_of_rows(method, x, y)[0]) == pytest.approx(want, abs=1e-6)


def test_loss_and_gradients_are_the_papers():
    method = byol().eval()
    steps.disturb_teacher(method)
    x0, x1 = steps.batch().views
    loss, scalars = method.loss(steps.batch())
    assert 0 < loss < 4 and 0 < scalars["std"] < 1.2
    got, terms = steps.with_gradients(method, loss), []
    for x, other in ((x0, x1), (x1, x0)):
        p = F.normalize(method.predictor(method.projector(method.backbone(x))), dim=1)
        with torch.no_grad():
            t = F.normalize(method.teacher.projector(method.teacher.backbone(other)), dim=1)
        terms.append((p - t).square().sum(1).mean())
    want = steps.with_gradients(method, (terms[0] + terms[1]) / 2)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    assert got.keys() - {"loss"} == {n for n, p in method.named_parameters() if p.requires_grad}


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    assert len(set(byol().views(8, load("digits")))) == 1
    first, second = byol().views(96, load("digits"))
    assert first != second and first.size == 96


def test_teacher_follows_more_slowly_and_stands_at_the_end():
    method = byol(momentum=0.5)
    steps.assert_teacher_follows(
        method, method.backbone.conv.weight, method.teacher.backbone.conv.weight
    )


def test_teacher_is_saved_and_not_optimized():
    method = byol()
    optimizer = setup.build_optimizer(resolve(PretrainConfig(method="byol")), method)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in method.teacher.parameters()}
    assert optimized == {id(p) for p in method.parameters() if p.requires_grad}
    keys = set(method.state_dict())
    assert {f"backbone.{name}" for name in method.backbone.state_dict()} < keys
    assert {f"ema.module.{name}" for name in method.teacher.state_dict()} < keys
    parts = ("backbone.", "projector.", "predictor.", "ema.module.")
    assert all(name.startswith(parts) for name in keys)


def test_views_of_a_size_share_a_forward():
    seen = []

    def network(x):
        seen.append(tuple(x.shape))
        return x.mean((2, 3)).expand(-1, 5) * torch.arange(5.0)

    views = steps.batch(count=3, sizes=(8, 4, 8, 6, 4)).views
    out = encode(network, views)
    assert seen == [(6, 1, 8, 8), (6, 1, 4, 4), (3, 1, 6, 6)]
    for x, y in zip(views, out, strict=True):
        torch.testing.assert_close(y, network(x))


def test_spread_tells_collapse_from_health():
    z = torch.randn(2000, 16)
    assert spread(z) == pytest.approx(1, abs=0.02) and spread(z[:1].repeat(9, 1)) < 1e-6


def digits(out, **changes):
    values = {"method": "byol", "data": "digits", "out": str(out), "device": "cpu"}
    values |= {"epochs": 1, "batch_size": 128, "log_every": 1}
    values["method_args"] = {"hidden_dim": 64, "out_dim": 16, "momentum": 0.9}
    return PretrainConfig(**{**values, **changes})


@pytest.mark.parametrize("settings", [{}, {"sam_rho": 0.05}], ids=["plain", "sam"])
def test_resumed_run_has_the_same_bits(tmp_path, monkeypatch, settings):
    pytest.importorskip("sklearn")
    whole, real = pretrain(digits(tmp_path / "whole", **settings)), BYOL.after_step

    def interrupt(self, step, total_steps):
        real(self, step, total_steps)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(BYOL, "after_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(digits(tmp_path / "part", **settings))
    part = pretrain(digits(tmp_path / "part", resume=True, **settings))
    one, two = (load_checkpoint(run.path / "checkpoints" / "last.pt") for run in (whole, part))
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())
    name = "stages.0.conv1.weight"
    assert not torch.equal(
        one["model"][f"backbone.{name}"], one["model"][f"ema.module.backbone.{name}"]
    )
    curves = [[record["loss"] for record in read_metrics(run.path)] for run in (whole, part)]
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0]


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("byol", momentum=0.5, **SMALL)
    steps.assert_ranks_are_one_process(ranks, "byol", momentum=0.5, **SMALL)


def mean_and_gradient(group):
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.arange(16.0)[rank**2 : (rank + 1) ** 2].requires_grad_()  # 1, 3, 5 and 7 of them
    mean = batch_mean(rows**2)
    mean.backward()
    return mean.detach(), rows.grad / world  # as DistributedDataParallel's mean


def test_mean_over_uneven_ranks(ranks):
    means, gradients = zip(*ranks.run(mean_and_gradient, 4), strict=True)
    torch.testing.assert_close(torch.stack(means), torch.full((4,), 77.5))
    torch.testing.assert_close(torch.cat(gradients), torch.arange(16.0) / 8)


def test_a_momentum_out_of_range_is_refused_at_once():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        byol(momentum=1.5)
