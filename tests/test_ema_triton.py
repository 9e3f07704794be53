"""The Triton kernel of `ema` against the reference, on a GPU or interpreted.

The interpreter rounds to bf16 wrongly: there, only values are bf16.
"""

import pytest
import torch
from fastssl.kernels import ema as kernels
from fastssl.kernels import tables
from triton_cases import DEVICE, INTERPRETED

from fastssl.ops.ema import ema_ref

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1,), (0, 3), (7, 5), (255,), (16, 16), (257,), (3, 1024), (4099,), (), (10000,)]
PAIRS = [(FP32, FP32), (FP32, BF16), (FP16, FP16), (FP16, FP32), (FP32, FP16)]
PAIRS += [] if INTERPRETED else [(BF16, BF16), (BF16, FP32), (FP16, BF16)]


def weight(w, dtype=torch.float64):
    return torch.tensor(w, dtype=dtype, device=DEVICE)


def problem(pairs=PAIRS):
    """Averages and values of all sizes and pairs of dtypes, which take turns."""
    types = [pairs[i % len(pairs)] for i in range(len(SIZES) * len(pairs))]
    sizes = [s for s in SIZES for _ in pairs]
    averages = [torch.randn(s, device=DEVICE).to(a) for s, (a, _) in zip(sizes, types, strict=True)]
    values = [torch.randn(s, device=DEVICE).to(v) for s, (_, v) in zip(sizes, types, strict=True)]
    return averages, values


def copies(tensors):
    return [x.clone() for x in tensors]


def same(got, expected):
    for new, true in zip(got, expected, strict=True):
        assert torch.equal(new, true)


def right(got, old, values, w):
    """Within a rounding of the result's dtype, and three in fp32."""
    exact = [x.double() for x in old]
    ema_ref(exact, values, weight(w))
    for new, true, a, v in zip(got, exact, old, values, strict=True):
        bound = 3 * torch.finfo(FP32).eps * (a.double().abs() + v.double().abs())
        if new.dtype != FP32:
            bound += 0.5 * torch.finfo(new.dtype).eps * true.abs() + torch.finfo(new.dtype).tiny
        assert new.dtype == a.dtype and ((new - true).abs() <= bound).all()


@pytest.mark.parametrize("w", [1e-4, 0.3, 0.75, 1.0, 0.0])
def test_one_launch_for_all_pairs(w, monkeypatch):
    averages, values = problem()
    old, launches = copies(averages), []
    monkeypatch.setattr(kernels, "ema_kernel", Counted(kernels.ema_kernel, launches))
    kernels.ema_(averages, values, weight(w))
    assert len(launches) == 1
    right(averages, old, values, w)
    if w in (0.0, 1.0):
        for x, a, v in zip(averages, old, values, strict=True):
            assert torch.equal(x, v.to(a.dtype) if w else a)


class Counted:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def test_strides():
    """Pairs of one order, of two, and views with gaps, beside each other."""
    channels = {"memory_format": torch.channels_last}
    x = torch.randn(4, 6, 5, 3, device=DEVICE)
    pairs = [
        (x.to(**channels), torch.randn_like(x).to(**channels)),
        (x.to(**channels), torch.randn_like(x)),
        (x.clone(), torch.randn_like(x).to(**channels)),
        (torch.randn(40, 8, device=DEVICE)[:, 1:4], torch.randn(40, 3, device=DEVICE)),
        (torch.randn(40, 3, device=DEVICE), torch.randn(1, 3, device=DEVICE).expand(40, 3)),
        (torch.randn(9, 3, device=DEVICE).T, torch.randn(9, 3, device=DEVICE).T),
        (torch.randn(5000, device=DEVICE)[1:], torch.randn(4999, device=DEVICE)),
    ]
    averages, values = map(list, zip(*pairs, strict=True))
    old = copies(averages)
    strides = [x.stride() for x in averages]
    kernels.ema_(averages, values, weight(0.1))
    right(averages, old, values, 0.1)
    assert strides == [x.stride() for x in averages]


def test_weights_on_the_host_and_in_fp32():
    averages, values = problem([(FP32, FP32)])
    expected, others = copies(averages), copies(averages)
    kernels.ema_(expected, values, weight(0.125))
    kernels.ema_(averages, values, torch.tensor(0.125, dtype=torch.float64, device="cpu"))
    kernels.ema_(others, values, weight(0.125, torch.float32))
    same(averages, expected)
    same(others, expected)


def test_the_table_is_made_once(monkeypatch):
    monkeypatch.setattr(tables, "plans", {})
    averages, values = problem([(FP32, FP32)])
    for _ in range(2):
        kernels.ema_(averages, values, weight(0.1))
    assert len(tables.plans) == 1


def test_nothing_and_what_is_not_finite():
    kernels.ema_([], [], weight(0.1))
    kernels.ema_([torch.empty(0, device=DEVICE)], [torch.empty(0, device=DEVICE)], weight(0.1))
    a, v = torch.zeros(300, device=DEVICE), torch.zeros(300, device=DEVICE)
    v[3], v[5], a[7] = torch.nan, torch.inf, torch.nan
    kernels.ema_([a], [v], weight(0.1))
    assert a[[3, 7]].isnan().all() and a[5] == torch.inf and (a.isfinite().sum() == 297)


def test_messages():
    x = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"one shape .* got \(4,\) .* and \(3,\)"):
        kernels.ema_([x], [x[:3]], weight(0.1))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got .*float64"):
        kernels.ema_([x.double()], [x], weight(0.1))
    with pytest.raises(ValueError, match="on one device, got .* meta"):
        kernels.ema_([x], [x.to("meta")], weight(0.1))
