"""VICReg and Barlow Twins against their formulas written out in fp64."""

from functools import partial

import pytest
import torch
from oracle import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import LOCAL, losses
from fastssl.losses import BarlowTwinsLoss, VICRegLoss
from fastssl.ops import barlow_twins, blocks, gram, vicreg
from fastssl.ops.barlow import NORMALIZATIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["few calls", "blocks"])
def form(request, monkeypatch):
    """Both forms at every size."""
    monkeypatch.setattr(gram, "SMALL", {"few calls": 1 << 62, "blocks": 0}[request.param])
    return request.param


both_forms = pytest.mark.usefixtures("form")


def off_diagonal(x):
    return x - torch.diag(x.diagonal())


def vicreg_naive(a, b):
    loss = 25 * (a - b).square().mean()
    for z in (a, b):
        x = z - z.mean(0)
        loss = loss + 12.5 * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
        loss = loss + off_diagonal(x.T @ x / (len(z) - 1)).square().sum() / z.shape[1]
    return loss


def standardised(z, normalization):
    if normalization == "local_std":
        return (z - z.mean(0)) / (z.var(0).sqrt() + 1e-5)
    return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()


def barlow_naive(a, b, normalization="batch_norm", sizes=None):
    sizes = [len(a)] if normalization == "batch_norm" or sizes is None else [n for n in sizes if n]
    a, b = (torch.cat([standardised(x, normalization) for x in z.split(sizes)]) for z in (a, b))
    c = a.T @ b / len(a)
    return (c.diagonal() - 1).square().sum() + 5e-3 * off_diagonal(c).square().sum()


LOSSES = {
    "vicreg": (vicreg, vicreg_naive),
    "barlow": (barlow_twins, barlow_naive),
    "barlow_std": [partial(f, normalization="local_std") for f in (barlow_twins, barlow_naive)],
}


def views(N, D, dtype=torch.float64):
    a = torch.randn(N, D, dtype=torch.float64) * torch.rand(D).double() * 2 + 0.5
    return [x.to(dtype) for x in (a, a + 0.3 * torch.randn_like(a))]


def with_gradients(loss, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def check(ours, naive, *inputs, device="cpu"):
    """By the oracle rule; the baseline in fp32, which is what bf16 and fp16 are computed in."""
    true = with_gradients(naive, *(x.double() for x in inputs))
    plain = with_gradients(naive, *(x.float() for x in inputs))
    found = with_gradients(ours, *(x.to(device) for x in inputs))
    assert found[0].dtype == torch.float32
    for i, (got, t, p) in enumerate(zip(found, true, plain, strict=True)):
        if i and inputs[0].dtype != torch.float32:  # the result's own rounding
            p = t.to(inputs[0].dtype)
        assert_no_worse(got.cpu(), t, p, factor=3 if i else 2)


@both_forms
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("N,D", [(2, 3), (7, 5), (17, 33), (40, 40), (257, 96), (65, 300)])
def test_covariance_losses(N, D, loss, dtype, device, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * D * 20)  # several blocks
    check(*LOSSES[loss], *views(N, D, dtype), device=device)


@both_forms
@pytest.mark.parametrize("loss", ["vicreg", "barlow"])
@pytest.mark.parametrize("spread", [1, 1e-2])
@pytest.mark.parametrize("N,D", [(64, 128), (700, 40)])
def test_large_means(N, D, spread, loss):
    check(*LOSSES[loss], *((z * spread + 1e4).float() for z in views(N, D)))


@both_forms
@pytest.mark.parametrize("loss", ["vicreg", "barlow"])
@pytest.mark.parametrize("N,D", [(64, 128), (120, 128), (300, 400)])
def test_a_column_that_outweighs_all_others(N, D, loss):
    a, b = views(N, D)
    a[:, 7] *= 1000
    b[:, 7] *= 1000
    check(*LOSSES[loss], a.float(), b.float())


@both_forms
@pytest.mark.parametrize("N,D", [(5, 3), (3, 5)])
def test_gradcheck(N, D):
    a, b = (x.requires_grad_() for x in views(N, D))
    for ours, _ in LOSSES.values():
        assert torch.autograd.gradcheck(ours, (a, b))


@both_forms
def test_layouts_and_parts():
    for ours, _ in LOSSES.values():
        a, b = views(9, 12, torch.float32)
        value, da, db = with_gradients(ours, a, b)
        strided = torch.stack([a, b], 2)[..., 0], b.T.contiguous().T
        torch.testing.assert_close(with_gradients(ours, *strided), (value, da, db))
        frozen = with_gradients(lambda a, b=b, ours=ours: ours(a, b), a)
        assert torch.equal(frozen[1], da)
        x = a.clone().requires_grad_()
        ours(x, x).backward()
        torch.testing.assert_close(x.grad, sum(with_gradients(ours, a, a)[1:]))


@both_forms
@pytest.mark.parametrize("N,D", [(24, 40), (40, 24)])
def test_parity_with_lightly(N, D):
    lightly = pytest.importorskip("lightly.loss")
    a, b = views(N, D, torch.float32)
    images = [x.view(N, 2, 2, -1) for x in (a, b)]
    for name, args, inputs in (
        ("VICRegLoss", (), images), ("VICRegLoss", (5, 7, 2, False, 1e-3), (a, b)),
        ("BarlowTwinsLoss", (), (a, b)), ("BarlowTwinsLoss", (0.1, False), (a, b)),
        ("VICRegLoss", (), (a, b)),
    ):  # fmt: skip
        ours, theirs = (getattr(library, name)(*args) for library in (losses, lightly))
        got, expected = with_gradients(ours, *inputs), with_gradients(theirs, *inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defined_results(dtype):
    for normalization in NORMALIZATIONS:  # constant columns
        a, b = (z.clone() for z in views(8, 6, dtype))
        a[:, 2] = 3
        found = with_gradients(partial(barlow_twins, normalization=normalization), a, b)
        assert all(x.isfinite().all() for x in found)
    assert all(x.isfinite().all() for x in with_gradients(vicreg, a, b))
    a[0, 0] = torch.nan
    assert all(loss(a, b).isnan() for loss, _ in LOSSES.values())


def test_forms(monkeypatch):
    """Which one a size takes; and that without gradients the value is the same to the bit."""
    monkeypatch.setattr(gram, "SMALL", 8 * 6 * 32)
    for ours, large in ((vicreg, "VICReg"), (barlow_twins, "BarlowTwins")):
        for N, node in ((8, "WithGradient"), (9, large)):
            a, b = (z.requires_grad_() for z in views(N, 6, torch.float32))
            value = ours(a, b)
            assert value.grad_fn.name() == f"{node}Backward"
            assert torch.equal(ours(a.detach(), b.detach()), value)
            with torch.no_grad():
                assert torch.equal(ours(a, b), value)
    kept = barlow_twins(a[:8], b[:8], normalization="local_std")
    assert kept.grad_fn.name() == "BarlowTwinsBackward"


@both_forms
def test_autocast_has_no_effect():
    a, b = views(20, 30, torch.float32)
    for ours in (vicreg, barlow_twins):
        with torch.autocast("cpu", torch.bfloat16):
            inside = with_gradients(ours, a, b)
        assert all(map(torch.equal, inside, with_gradients(ours, a, b)))


@both_forms
def test_compiles_without_a_graph_break():
    for N, D in ((6, 9), (9, 6), (140, 150)):  # the last in several strips
        a, b = views(N, D, torch.float32)
        for ours in (vicreg, barlow_twins):
            compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(with_gradients(compiled, a, b), with_gradients(ours, a, b))


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize("loss", [vicreg, barlow_twins])
@pytest.mark.parametrize("N,D", [(50, 1100), (1100, 50)])
def test_memory(loss, N, D, monkeypatch):
    """Nothing larger than the inputs: of N x N and D x D never the larger."""
    monkeypatch.setattr(gram, "SMALL", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    a, b = views(N, D, torch.float32)
    with Largest() as largest:
        with_gradients(loss, a, b)
    assert largest.numel <= N * D


ERRORS = [
    (lambda x: vicreg(x, x[:2]), r"both be \(N, D\), got \(3, 4\) and \(2, 4\)"),
    (lambda x: vicreg(x[:1], x[:1]), "at least 2 rows, over all ranks, got 1"),
    (lambda x: vicreg(x, x, eps=0), "eps must be positive, got 0"),
    (lambda x: vicreg(x.int(), x), "z_a must be a float32.*got torch.int32"),
    (lambda x: barlow_twins(x, x, normalization="l2"), "must be one of .* got 'l2'"),
    (lambda x: VICRegLoss(gather_distributed=True)(x, x), "needs torch.distributed"),
    (lambda x: BarlowTwinsLoss(1, True, group=LOCAL), "True contradicts group=fastssl.LOCAL"),
]


@pytest.mark.parametrize("call, text", ERRORS)
def test_error_messages(call, text):
    with pytest.raises(TypeError if "int32" in text else ValueError, match=text):
        call(torch.randn(3, 4))


# --------------------------------------------------------------------------------- several ranks

OVER_RANKS = {"vicreg": (vicreg, vicreg_naive)}
for kind in NORMALIZATIONS:
    OVER_RANKS[kind] = [partial(f, normalization=kind) for f in (barlow_twins, barlow_naive)]


def on_rank(group, sizes, D, loss, dtype):
    a, b = (z.to(dtype).double().requires_grad_() for z in views(sum(sizes), D))
    ours, naive = OVER_RANKS[loss]
    truth = naive(a, b, sizes=sizes) if loss in NORMALIZATIONS else naive(a, b)
    own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    true = [len(sizes) * d[own] for d in torch.autograd.grad(truth, (a, b))]
    inputs = [z[own].to(dtype) for z in (a, b)]
    found = with_gradients(lambda a, b: ours(a, b, group=group), *inputs)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    for x, y in zip(found, [truth.detach(), *true], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=close, atol=close)
    return found[0]


@pytest.mark.parametrize("sizes", [(5,), (6, 6), (7, 3), (4, 0, 6), (2, 2, 3, 5)])
@pytest.mark.parametrize("D", [9, 20])
@pytest.mark.parametrize("loss", OVER_RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_over_ranks_as_in_one_process(loss, D, sizes, dtype, ranks):
    values = ranks.run(on_rank, len(sizes), sizes, D, loss, dtype)
    assert all(torch.equal(value, values[0]) for value in values)
