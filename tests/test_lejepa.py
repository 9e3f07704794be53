"""LeJEPA's losses, SIGReg's siblings, and the method."""

import copy
import signal
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from fastssl import LOCAL
from fastssl.config import PretrainConfig
from fastssl.data import Batch, load
from fastssl.losses import EppsPulley, LeJEPALoss, SIGReg, SlicingUnivariateTest
from fastssl.methods import LeJEPA
from fastssl.models import build_backbone
from fastssl.ops import sigreg, sigreg_directions, sliced_moments, visreg
from fastssl.train import load_checkpoint, pretrain
from fastssl.train.metrics import read_metrics

NULL, COLLAPSE = 1.0524641547991607, 0.40204757973166455


def statistic(z, a, knots=17, t_max=3.0):
    """The paper's, of z (..., N, D) along a (D, S): (..., S)."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    angles = (z @ a).unsqueeze(-1) * t
    phi = (-t * t / 2).exp()
    error = (angles.cos().mean(-3) - phi) ** 2 + angles.sin().mean(-3) ** 2
    return 2 * z.shape[-2] * torch.trapezoid(error * phi, t)


def with_gradient(loss, z):
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def features(*shape, dtype=torch.float64):
    return (torch.randn(*shape, dtype=torch.float64) * 1.5 + 0.3).to(dtype)


# --------------------------------------------------------------------------------------- SIGReg


def test_collapse_and_null():
    assert float(SIGReg(32)(torch.zeros(3, 50, 8))) == pytest.approx(50 * COLLAPSE, rel=1e-5)
    assert float(SIGReg(256)(torch.randn(8, 512, 16))) == pytest.approx(NULL, rel=0.1)
    z = torch.zeros(4, 50, 8)
    loss = LeJEPALoss(0.1, sigreg_num_vectors=32)(global_proj=z)
    assert float(loss) == pytest.approx(5 * COLLAPSE, rel=1e-5)


def test_the_step_counts_forwards_in_training_alone():
    z, loss = torch.randn(20, 6), SIGReg(8, seed=3)
    values = [loss(z) for _ in range(3)]
    assert loss.step.dtype == torch.int64 and int(loss.step) == 3
    for step, value in enumerate(values):
        assert torch.equal(value, sigreg(z, num_slices=8, seed=3, step=step))
    assert len({float(value) for value in values}) == 3
    loss.eval()
    assert torch.equal(loss(z), loss(z)) and int(loss.step) == 3
    other = SIGReg(8, seed=3)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(z), loss(z)) and int(other.step) == 4
    assert not torch.equal(SIGReg(8, seed=4)(z), values[0])


def test_pooled_views_are_one_sample():
    z, mask, a = torch.randn(3, 10, 6), torch.rand(3, 10) < 0.7, sigreg_directions(8, 6)
    pooled = SIGReg(pool_views=True)
    assert torch.equal(pooled(z, directions=a), sigreg(z.flatten(0, 1), directions=a))
    value = pooled(z, mask, a)
    torch.testing.assert_close(value, sigreg(z[mask], directions=a))
    apart = SIGReg()(z, mask, a)
    each = [sigreg(x[m], directions=a) for x, m in zip(z, mask, strict=True)]
    torch.testing.assert_close(apart, torch.stack(each).mean())


def test_the_published_call():
    x = torch.randn(3, 40, 6)
    test = EppsPulley(t_max=4, n_points=9)
    loss = SlicingUnivariateTest(univariate_test=test, num_slices=12)
    options = {"num_slices": 12, "knots": 9, "t_max": 4}
    assert torch.equal(loss(x), sigreg(x, **options))
    assert torch.equal(loss(x), sigreg(x, step=1, **options))
    each = SlicingUnivariateTest(test, 12, None, "gaussian", 1.0)(x)
    assert torch.equal(each, sigreg(x, reduction="none", clip=1.0, **options))
    assert each.shape == (3, 12) and (each == 0).any() and (each > 0).any()
    assert float(SlicingUnivariateTest(EppsPulley(), 12, "sum")(torch.zeros(5, 2))) == (
        pytest.approx(12 * 5 * COLLAPSE, rel=1e-5)
    )


# --------------------------------------------------------------------------------------- LeJEPA

# Rows of the table of conventions: mixing, centre, pooled views, lambda.
CONVENTIONS = {
    "the paper's short example": ("convex", "all", False, 0.02),
    "lightly": ("convex", "global", False, 0.05),
    "stable-pretraining": ("additive", "global", True, 0.02),
    "the rest": ("additive", "all", True, 3.0),
}


def by_formula(z, Vg, a, mixing, centre, pool_views, lam):
    spread = statistic(z.flatten(0, 1) if pool_views else z, a).mean()
    c = z.mean(0) if centre == "all" else z[:Vg].mean(0)
    return lam * spread + (1 - lam if mixing == "convex" else 1) * ((c - z) ** 2).mean()


def lejepa(convention, **options):
    mixing, centre, pool_views, lam = CONVENTIONS[convention]
    options |= {"mixing": mixing, "centre": centre, "pool_views": pool_views}
    return LeJEPALoss(lam, sigreg_num_vectors=16, **options)


def of_views(loss, z, Vg=2):
    return loss(global_proj=z[:Vg], local_proj=z[Vg:])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention):
    z, a = features(5, 12, 6), sigreg_directions(16, 6, seed=7).double()
    expected = with_gradient(lambda z: by_formula(z, 2, a, *CONVENTIONS[convention]), z)
    got = with_gradient(lambda z: of_views(lejepa(convention, seed=7), z), z)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    lists = lejepa(convention, seed=7)(global_proj=list(z[:2]), local_proj=[z[2], z[3], z[4]])
    assert torch.equal(lists, got[0])
    whole = with_gradient(lambda z: lejepa(convention, seed=7)(global_proj=z), z)
    expected = with_gradient(lambda z: by_formula(z, 5, a, *CONVENTIONS[convention]), z)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lam,knots,t_max", [(0.05, 17, 3.0), (0.3, 9, 5.0)])
def test_parity_with_lightly(lam, knots, t_max, monkeypatch):
    peer = pytest.importorskip("lightly.loss").LeJEPALoss(
        lam, sigreg_knots=knots, sigreg_t_max=t_max, sigreg_num_vectors=64
    )
    ours = LeJEPALoss(lam, sigreg_knots=knots, sigreg_t_max=t_max, sigreg_num_vectors=64)
    a = sigreg_directions(64, 24)
    monkeypatch.setattr(peer.sigreg, "_generate_unit_vectors", lambda *args: a)
    z = features(6, 33, 24, dtype=torch.float32)
    expected = with_gradient(partial(of_views, peer), z)
    for got, value in zip(with_gradient(partial(of_views, ours), z), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_lightlys_checkpoints_load():
    peer, ours = pytest.importorskip("lightly.loss").LeJEPALoss(), LeJEPALoss()
    ours(global_proj=features(2, 9, 4))
    state = torch.nn.ModuleList([peer]).state_dict()  # as a part of a model
    torch.nn.ModuleList([ours]).load_state_dict(state)
    assert int(ours.sigreg.step) == 0 and len(state) == 3, "what is loaded from is left as it was"
    spread = SIGReg()
    spread.load_state_dict(peer.sigreg.state_dict())
    for broken in ({}, {**peer.state_dict(), "sigreg.other": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match="Missing key.*sigreg.step|Unexpected.*sigreg.other"):
            ours.load_state_dict(broken)


def test_half_precision_is_computed_in_float32():
    z = features(4, 30, 8, dtype=torch.bfloat16)
    value = of_views(lejepa("lightly"), z)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, of_views(lejepa("lightly"), z.float()), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of_views(lejepa("lightly"), z.float()), value)
        for sibling in (sliced_moments, visreg):
            assert torch.equal(sibling(z), sibling(z.float()))


# ------------------------------------------------------------------------------------- siblings


def naive_moments(z, a):
    p = z @ a
    return (p.mean(-2) ** 2 + (p.std(-2, unbiased=False) - 1) ** 2).mean()


def naive_visreg(z, a):
    mean, std = z.mean(-2, keepdim=True), z.std(-2, unbiased=False, keepdim=True)
    p = ((z - mean) / (std.detach() + 1e-4) @ a).sort(-2).values
    n = z.shape[-2]
    q = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(1, n + 1).to(z) / (n + 1))
    return (mean**2).mean() + ((std - 1) ** 2).mean() + ((p - q.unsqueeze(-1)) ** 2).mean()


SIBLINGS = {"sliced_moments": (sliced_moments, naive_moments), "visreg": (visreg, naive_visreg)}


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 40, 7), (2, 2, 6, 13)])
@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings(name, shape):
    (ours, naive), z = SIBLINGS[name], features(*shape)
    a = sigreg_directions(11, shape[-1], seed=2, step=5).double()
    got = with_gradient(partial(ours, num_slices=11, seed=2, step=5), z)
    expected = with_gradient(lambda z: naive(z, a), z)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(z, directions=a), expected[0], rtol=1e-9, atol=1e-9)
    single = ours(z.float(), directions=a)
    torch.testing.assert_close(single, expected[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_of_normal_and_of_equal_rows(name):
    ours, _ = SIBLINGS[name]
    assert float(ours(torch.randn(4096, 8))) < 0.01
    equal = torch.ones(6, 4, requires_grad=True)
    loss = ours(equal, shape=0) if name == "visreg" else ours(equal)
    assert float(loss.detach()) > 1 and torch.autograd.grad(loss, equal)[0].isfinite().all()


def test_visreg_equals_lightly(monkeypatch):
    peer = pytest.importorskip("lightly.loss.visreg_loss")
    z, normal = features(3, 33, 24, dtype=torch.float32), torch.randn(24, 64)
    monkeypatch.setattr(peer.torch, "randn", lambda *args, **options: normal)

    def three_terms(z):
        shape = peer.visreg_shape_loss(z, 64)
        return 2 * shape + 3 * peer.visreg_scale_loss(z) + 4 * peer.visreg_center_loss(z)

    expected = with_gradient(three_terms, z)
    a = normalize(normal, dim=0)
    got = with_gradient(partial(visreg, directions=a, shape=2, scale=3, centre=4), z)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- ranks

OVER_RANKS = {
    name: (
        lambda z, group, name=name: of_views(lejepa(name, group=group), z),
        lambda z, a, name=name: by_formula(z, 2, a, *CONVENTIONS[name]),
    )
    for name in CONVENTIONS
}
OVER_RANKS |= {
    name: (lambda z, group, ours=ours: ours(z, num_slices=16, group=group), naive)
    for name, (ours, naive) in SIBLINGS.items()
}


def on_rank(group, case, sizes, D):
    ours, naive = OVER_RANKS[case]
    z, a = features(3, sum(sizes), D), sigreg_directions(16, D).double()
    own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    value, dz = with_gradient(lambda z: naive(z, a), z)
    expected = value, len(sizes) * dz[:, own]
    got = with_gradient(lambda z: ours(z, group), z[:, own])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    return got[0]


@pytest.mark.parametrize("sizes", [(5,), (6, 6), (7, 3), (4, 0, 6), (2, 2, 3, 5)])
@pytest.mark.parametrize("D", [7, 16])
@pytest.mark.parametrize("case", OVER_RANKS)
def test_over_ranks_as_in_one_process(case, D, sizes, ranks):
    values = ranks.run(on_rank, len(sizes), case, sizes, D)
    assert all(torch.equal(value, values[0]) for value in values)


def alone(group, case):
    torch.manual_seed(group.rank())
    z = features(3, 8, 5)
    return float(OVER_RANKS[case][0](z, LOCAL)), float(OVER_RANKS[case][1](
        z, sigreg_directions(16, 5).double()
    ))  # fmt: skip


@pytest.mark.parametrize("case", ["lightly", "sliced_moments", "visreg"])
def test_local_groups(case, ranks):
    (one, own), (other, others_own) = ranks.run(alone, 2, case)
    assert one == pytest.approx(own) and other == pytest.approx(others_own) and one != other


def message_of(group, case):
    width = 5 + group.rank() if case == "width" else 5
    rows = 0 if case == "rows" else 4
    with pytest.raises(ValueError) as caught:
        if case == "gather":
            LeJEPALoss(gather_distributed=False, group=group)
        visreg(torch.zeros(rows, width), group=group)
    return str(caught.value)


@pytest.mark.parametrize(
    "case,message",
    [
        ("width", "visreg: the width and slices must be the same on all ranks, got (5, 256) on"),
        ("rows", "visreg: z must have at least one row, got none."),
        ("gather", "LeJEPALoss: gather_distributed=False contradicts group="),
    ],
)
def test_messages_of_ranks(case, message, ranks):
    assert all(text.startswith(message) for text in ranks.run(message_of, 2, case))


# ----------------------------------------------------------------------------------------- form


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda z: LeJEPALoss(1.5), "lambda_param must lie in [0, 1] where mixing is 'convex', go"),
        (lambda z: LeJEPALoss(-1, mixing="additive"), "lambda_param must be a number >= 0 where"),
        (lambda z: LeJEPALoss(mixing="sum"), 'mixing must be "convex" or "additive", got \'sum\'.'),
        (lambda z: LeJEPALoss(centre="mean"), 'centre must be "global" or "all", got \'mean\'.'),
        (lambda z: LeJEPALoss(gather_distributed=True)(global_proj=z), "needs torch.distributed"),
        (lambda z: LeJEPALoss()(global_proj=z[0]), "global_proj must be (V, N, D) with at least o"),
        (lambda z: LeJEPALoss()(global_proj=[]), "global_proj must be views (N, D) of one shape, "),
        (
            lambda z: LeJEPALoss()(global_proj=z, local_proj=z[:, 1:]),
            "local_proj must have global_proj's samples and width (4, 8), got (3, 3, 8).",
        ),
        (lambda z: SIGReg(knots=16)(z), "sigreg: knots must be an odd integer >= 3, got 16."),
        (
            lambda z: SlicingUnivariateTest(torch.nn.Identity(), 4),
            "univariate_test must be fastssl.losses.EppsPulley(), got Identity.",
        ),
        (
            lambda z: SlicingUnivariateTest(EppsPulley(), 4, sampler="sobol"),
            "sampler must be \"gaussian\", got 'sobol'.",
        ),
        (lambda z: visreg(z.long()), "visreg: z must be a float32, bfloat16, float16 or float64"),
        (lambda z: sliced_moments(z[:, :0]), "sliced_moments: z must have at least one row, got"),
        (lambda z: sliced_moments(z[0, 0]), "sliced_moments: z must be (..., N, D) with at least"),
        (
            lambda z: visreg(z, directions=z),
            "visreg: directions must be (D, S) with z's D=8 and S >= 1, got",
        ),
        (lambda z: visreg(z, num_slices=0), "num_slices must be an integer >= 1, got 0."),
    ],
)
def test_error_messages(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(torch.randn(3, 4, 8))
    assert message in str(caught.value)


def test_repr():
    assert repr(SIGReg(8, pool_views=True, group=LOCAL)) == (
        "SIGReg(num_slices=8, knots=17, t_max=3.0, pool_views=True, group=fastssl.LOCAL)"
    )
    assert "lambda_param=0.05, mixing='convex', centre='global'" in repr(LeJEPALoss())


def test_compiles_without_a_graph_break():
    z = torch.randn(4, 20, 6)
    for loss, call in (
        (lejepa("lightly"), of_views),
        (lejepa("stable-pretraining"), of_views),
        (SlicingUnivariateTest(EppsPulley(), 16), lambda loss, z: loss(z)),
        (sliced_moments, lambda loss, z: loss(z, num_slices=16)),
        (visreg, lambda loss, z: loss(z, num_slices=16)),
    ):
        eager = partial(call, copy.deepcopy(loss))
        compiled = torch.compile(partial(call, loss), backend="aot_eager", fullgraph=True)
        for _ in range(2):  # the second has other directions
            torch.testing.assert_close(with_gradient(compiled, z), with_gradient(eager, z))


# ----------------------------------------------------------------------------------- the method


def batch_of(views):
    return Batch(views, torch.arange(len(views[0])), torch.full((len(views[0]),), -1))


def test_the_methods_loss_is_the_papers():
    backbone = build_backbone("resnet_small", 1, 16)
    method = LeJEPA(backbone, lam=0.1, hidden_dim=32, out_dim=8, num_slices=16).eval()
    views = [torch.randn(6, 1, 16, 16) for _ in range(2)]
    views += [torch.randn(6, 1, 8, 8) for _ in range(6)]
    loss, scalars = method.loss(batch_of(views))
    z = torch.stack([method.projector(method.features(x)) for x in views]).detach().double()
    a = sigreg_directions(16, 8).double()
    torch.testing.assert_close(loss.double(), by_formula(z, 2, a, "convex", "global", False, 0.1))
    inv, sigreg, std = (float(scalars[name]) for name in ("inv", "sigreg", "std"))
    assert float(loss.detach()) == pytest.approx(0.1 * sigreg + 0.9 * inv)
    assert std == pytest.approx(float(z.std(1).mean()), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = LeJEPA(build_backbone("resnet_small", 1, 8), local_views=3)
    views = method.views(224, load("digits"))
    assert [view.size for view in views] == [224, 224, 98, 98, 98]
    assert [view.crop.scale for view in views[1:3]] == [(0.3, 1.0), (0.05, 0.3)]
    assert [view.size for view in method.views(8, load("digits"))] == [8] * 5


def digits(out, **changes):
    values = {"method": "lejepa", "data": "digits", "out": str(out), "device": "cpu"}
    values |= {"epochs": 1, "batch_size": 128, "log_every": 1}
    values["method_args"] = {"hidden_dim": 64, "out_dim": 16, "num_slices": 64}
    return PretrainConfig(**{**values, **changes})


def test_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    whole = pretrain(digits(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt = lambda self, step, _: step == 4 and signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(LeJEPA, "after_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(digits(tmp_path / "other"))
    other = pretrain(PretrainConfig(method="lejepa", data="digits", out=str(tmp_path / "other"),
                                    resume=True))  # fmt: skip
    one, two = (load_checkpoint(run.path / "checkpoints" / "last.pt") for run in (whole, other))
    assert one["step"] == int(one["model"]["lejepa.sigreg.step"]) == 9
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())
    curves = [[record["loss"] for record in read_metrics(run.path)] for run in (whole, other)]
    assert curves[0] == curves[1]


def test_twenty_steps_of_digits_spread_the_projections(tmp_path):
    pytest.importorskip("sklearn")
    first, *_, last = read_metrics(pretrain(digits(tmp_path, epochs=2, batch_size=120)).path)
    assert last["step"] == 20 and first["sigreg"] > 30 and last["sigreg"] < 15
    assert last["std"] > first["std"] + 0.2 and last["inv"] < 0.8 * last["std"] ** 2
