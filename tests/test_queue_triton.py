"""The Triton kernels of `queue` against the fp64 reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import panels
from fastssl.kernels import queue as kernels
from fastssl.kernels.launch import in_registers
from triton_cases import (
    DEVICE,
    DTYPES,
    SIZES,
    WIDTHS,
    double,
    dtypes,
    features,
    integers,
    limits,
    no_worse,
    number,
    same_bits,
)

from fastssl.ops.contrastive import logits_ref
from fastssl.ops.queue import queue_fwd_ref


def problem(q, k, scale, q_ids=None, k_ids=None, bias=None, limit=None, equal=False, groups=1):
    return q, k, number(scale), q_ids, k_ids, equal, bias, limit, groups


def plain_torch(args):
    """The reference, with the second product in the features' dtype as torch would run it."""
    row_lse, out = queue_fwd_ref(*args)
    q, k, *_, groups = args
    if q.dtype != torch.float32:
        logits, left_out = logits_ref(*args[:-1], False, groups)
        if left_out is not None:
            logits = logits.masked_fill(left_out, -torch.inf)
        out = logits.softmax(2).nan_to_num(0).to(q.dtype) @ k.unflatten(0, (groups, -1))
        out = out.flatten(0, 1)
    return row_lse, out


def check(args, rounding=0.0):
    got, exact, plain = kernels.queue_fwd(*args), queue_fwd_ref(*double(args)), plain_torch(args)
    assert all(x.dtype == torch.float32 for x in got)
    for name, *results in zip(("row_lse", "out"), got, exact, plain, strict=True):
        no_worse(name, *results, magnitude=rounding if name == "out" else 0.0)
    return got


def options(q, k, groups=1):
    """ids that leave out some pairs, a bias and a limit."""
    ids = integers(max(2, len(q) // 2), len(q)), integers(max(2, len(q) // 2), len(k))
    return *ids, torch.randn(len(k), device=DEVICE), limits(q, k, groups)


@dtypes
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N, M", [*SIZES, (3, 500)])
def test_sizes(N, M, D, dtype):
    q, k = features(N, D, dtype), features(M, D, dtype)
    check(problem(q, k, 10, *options(q, k)))


@dtypes
@pytest.mark.parametrize("given", range(8), ids=lambda g: f"options{g:03b}")
def test_options(given, dtype):
    q, k = features(40, 48, dtype), features(270, 48, dtype)
    q_ids, k_ids, bias, limit = options(q, k)
    ids = (q_ids, k_ids) if given & 1 else (None, None)
    rest = bias if given & 2 else None, limit if given & 4 else None
    check(problem(q, k, 10, *ids, *rest))
    check(problem(q, k, 10, *ids, *rest, equal=given % 2 == 1))


@dtypes
@pytest.mark.parametrize("D", [24, 264])
@pytest.mark.parametrize("N, M", [(1, 2), (7, 150), (130, 70)])
def test_groups(N, M, D, dtype):
    q, k = features(3 * N, D, dtype), features(3 * M, D, dtype)
    check(problem(q, k, 10, *options(q, k, 3), groups=3))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("units", [1, 4, 100])
def test_splits(units, dtype, monkeypatch):
    """Without a split, and merged from a few and from more than one block of splits."""

    def splits_of(x, rows, columns, groups, known):
        tiles = -(-columns // known["BLOCK_M"])
        each = -(-tiles // units)
        blocks = groups * -(-rows // known["BLOCK_N"])
        return blocks, -(-tiles // each), each * known["BLOCK_M"]

    monkeypatch.setattr(kernels, "splits_of", splits_of)
    q, k = features(5, 100, dtype), features(2500, 100, dtype)
    q_ids, k_ids, bias, limit = options(q, k)
    k_ids[:2000] = 0
    q_ids[:] = torch.tensor([0, 0, 1, 2, 3])
    check(problem(q, k, 20, q_ids, k_ids, bias, limit))
    assert same_bits(lambda: kernels.queue_fwd(*problem(q, k, 20, q_ids, k_ids, bias)))


@dtypes
def test_several_panels(dtype, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_ROWS", 128)
    monkeypatch.setattr(panels, "PANEL_BYTES", 128 * 128 * dtype.itemsize)
    q, k = features(150, 264, dtype), features(270, 264, dtype)
    check(problem(q, k, 10, *options(q, k)))


@dtypes
@pytest.mark.parametrize("D", [40, 264])
def test_strided(D, dtype):
    q = features(33, 2 * D, dtype)[:, :D]
    k = features(50, 2 * D, dtype)[::2, D:]
    check(problem(q, k, 10, *options(q, k)))
    check(problem(q, features(D, 25, dtype).T, 10))


@pytest.mark.parametrize("D", [64, 264])
def test_probabilities_below_fp16(D):
    """Keys that weigh less than half the smallest fp16 number beside the nearest, a zero."""
    q, k = features(1, D, torch.float16), features(300, D, torch.float16)
    k[0] = 0
    bias = torch.full((300,), -17.7, device=DEVICE)
    bias[0] = 0
    args = problem(q, k, 0, bias=bias)
    out, exact = kernels.queue_fwd(*args)[1], queue_fwd_ref(*double(args))[1]
    assert (out - exact).abs().max() <= 1e-3 * exact.abs().max()


@dtypes
@pytest.mark.parametrize("D", [64, 264])
def test_large_logits(D, dtype):
    """Logits in the thousands: only the maxima count. Where panels make the weights, from the
    difference of a logit and a log-sum-exp, each carries the rounding of the two."""
    q, k = torch.randint(-8, 9, (2, 150, D), device=DEVICE).to(dtype)
    q_ids, k_ids, bias, _ = options(q, k)
    for args in (
        problem(q, k, 4, q_ids, k_ids),
        problem(q / 8, k / 8, 4, bias=1000 * bias.round()),
    ):
        largest = kernels.queue_fwd(*args)[0].abs().max() * args[1].abs().max()
        check(args, 0.0 if in_registers(dtype, D) else largest.item())


@dtypes
@pytest.mark.parametrize("D", [16, 264])
def test_nothing_left(D, dtype):
    q, k = features(20, D, dtype), features(300, D, dtype)
    q_ids, k_ids, bias, _ = options(q, k)
    k_ids[:] = 1
    q_ids[:] = 0
    q_ids[4] = 1
    row_lse, out = check(problem(q, k, 10, q_ids, k_ids, bias))
    assert row_lse[4] == -torch.inf and row_lse.isneginf().sum() == 1 and not out[4].any()
    row_lse, out = check(problem(q, k, 10, limit=torch.full((20,), -2.0, device=DEVICE)))
    assert row_lse.isneginf().all() and not out.any()


@dtypes
@pytest.mark.parametrize("D", [16, 264])
def test_nan(D, dtype):
    q, k = features(40, D, dtype), features(100, D, dtype)
    bad = k.clone()
    bad[7, 3] = torch.nan
    row_lse, out = kernels.queue_fwd(*problem(q, bad, 10))
    assert row_lse.isnan().all() and out.isnan().all()
    q[7, 3] = torch.nan
    row_lse, out = kernels.queue_fwd(*problem(q, k, 10))
    bad = torch.arange(40, device=DEVICE) == 7
    assert torch.equal(row_lse.isnan(), bad) and torch.equal(out.isnan().all(1), bad)
    assert torch.equal(out.isnan().any(1), bad)


@dtypes
@pytest.mark.parametrize("D", [64, 264])
def test_repeats_to_the_bit(D, dtype):
    q, k = features(40, D, dtype), features(100, D, dtype)
    args = problem(q, k, 10, *options(q, k))
    assert same_bits(lambda: kernels.queue_fwd(*args))
