"""The Triton kernel of `siglip` against the fp64 reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import panels
from fastssl.kernels import siglip as kernels
from triton_cases import (
    DEVICE,
    SIZES,
    WIDTHS,
    double,
    dtypes,
    features,
    integers,
    no_worse,
    number,
    same_bits,
)

from fastssl.ops.siglip import siglip_fwd_ref


def problem(q, k, scale=10, bias=-10, q_ids=None, k_ids=None, target=None, weight=None):
    N = len(q)
    if target is None:
        target = torch.arange(N, device=DEVICE, dtype=torch.int32)
    weight = torch.rand(N, device=DEVICE) + 0.5 if weight is None else weight
    return q, k, number(scale), number(bias), q_ids, k_ids, target, weight


def check(args, need_dq=True, need_dk=True):
    got = kernels.siglip_fwd(*args, need_dq, need_dk)
    exact = siglip_fwd_ref(*double(args), need_dq, need_dk)
    plain = list(siglip_fwd_ref(*args, need_dq, need_dk))
    assert all(x.dtype == torch.float32 for x in got)

    q, k, scale, bias, q_ids, k_ids, target, weight = double(args)
    products = q @ k.T
    logits = scale * products + bias
    positive = (target[:, None] == torch.arange(len(k), device=DEVICE)).double()
    slope = logits.sigmoid() - positive
    if q_ids is not None:
        slope = slope.masked_fill((q_ids[:, None] == k_ids) & (positive == 0), 0)
    g = weight[:, None] * slope
    if args[0].dtype != torch.float32:  # as torch would multiply in the features' dtype
        rounded = g.to(args[0].dtype)
        plain[1] = args[2] * (rounded @ args[1]).float() if need_dq else plain[1]
        plain[2] = args[2] * (rounded.T @ args[0]).float() if need_dk else plain[2]
    # What rounding the logits, and the terms of sums of both signs, may cost.
    logits = (scale * products).abs() + bias.abs()
    g = g.abs() * (1 + (1 - slope.abs()) * logits)
    sizes = (slope.abs() * logits).sum(1).max(), 0, 0, (g * products.abs()).sum(), g.sum()
    names = "loss", "dq", "dk", "dscale", "dbias"
    for name, a, b, c, size in zip(names, got, exact, plain, sizes, strict=True):
        no_worse(name, a, b, c, 3 if name.startswith("d") else 2, float(size))
    return got


@dtypes
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N, M", SIZES)
def test_sizes(N, M, D, dtype):
    check(problem(features(N, D, dtype), features(M, D, dtype)))


@dtypes
@pytest.mark.parametrize(
    "need_dq, need_dk", [(True, True), (True, False), (False, True), (False, False)]
)
def test_needs_and_ids(need_dq, need_dk, dtype):
    q, k = features(40, 48, dtype), features(170, 48, dtype)
    ids = integers(10, 40), integers(10, 170)
    target = integers(170, 40)
    check(problem(q, k), need_dq, need_dk)
    got = check(problem(q, k, 10, -3, *ids, target), need_dq, need_dk)
    if not (need_dq or need_dk):
        assert got[3] == 0 and got[4] == 0


@dtypes
@pytest.mark.parametrize(
    "scale, bias", [(0, 0), (1, 0), (100, -10), (100, 30), (5, -60), (2000, 0)]
)
def test_extremes(scale, bias, dtype):
    """From all losses tiny to all large: each must be right relative to its own size."""
    q, k = features(40, 24, dtype), features(70, 24, dtype)
    target = torch.full((40,), -1, device=DEVICE, dtype=torch.int32)
    target[::2] = 70
    check(problem(q, k, scale, bias))
    args = problem(q, k, scale, bias, target=target)
    loss = check(args)[0]
    exact = siglip_fwd_ref(*double(args), False, False)[0]
    # The rounding of a logit, relative to its size, is relative to a small loss as well.
    rounding = 3e-7 * (1 + abs(scale) + abs(bias))
    assert ((loss - exact).abs() <= rounding * exact).all()


@dtypes
def test_small_weights(dtype):
    """A mean over many rows: coefficients far below the smallest fp16 number."""
    q, k = features(60, 40, dtype), features(70, 40, dtype)
    weight = torch.rand(60, device=DEVICE) + 0.5
    _, *large = kernels.siglip_fwd(*problem(q, k, weight=weight), True, True)
    _, *small = kernels.siglip_fwd(*problem(q, k, weight=weight * 2.0**-40), True, True)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(a, b * 2.0**40, rtol=1e-5, atol=1e-9)
    zero = kernels.siglip_fwd(*problem(q, k, weight=0 * weight), True, True)
    assert not any(x.any() for x in zero[1:]) and zero[0].isfinite().all()


@dtypes
@pytest.mark.parametrize("needs", [(True, True), (False, False)])
def test_several_panels(needs, dtype, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_ROWS", 128)
    monkeypatch.setattr(panels, "PANEL_BYTES", 128 * 128 * dtype.itemsize)
    monkeypatch.setattr(panels, "PIECE", 128 * 128)
    q, k = features(257, 40, dtype), features(130, 40, dtype)
    check(problem(q, k, 10, -3, integers(40, 257), integers(40, 130)), *needs)


@dtypes
@pytest.mark.parametrize("D", [40, 264])
def test_strided(D, dtype):
    q = features(33, 2 * D, dtype)[:, :D]
    check(problem(q, features(50, 2 * D, dtype)[::2, D:]))
    check(problem(q, features(D, 25, dtype).T))


@dtypes
def test_nan(dtype):
    q, k = features(40, 24, dtype), features(100, 24, dtype)
    q[7, 3] = torch.nan
    got = kernels.siglip_fwd(*problem(q, k), True, True)
    exact = siglip_fwd_ref(*double(problem(q, k)), True, True)
    for a, b in zip(got, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@dtypes
@pytest.mark.parametrize("D", [64, 264])
def test_repeats_to_the_bit(D, dtype):
    args = problem(features(70, D, dtype), features(100, D, dtype))
    assert same_bits(lambda: kernels.siglip_fwd(*args, True, True))
