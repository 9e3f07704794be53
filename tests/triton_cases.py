"""What the tests of the Triton kernels share. They run on a GPU or, with TRITON_INTERPRET=1 set
before Triton is imported, interpreted on the CPU."""

import os

import pytest
import torch
from oracle import assert_no_worse
from torch.nn.functional import normalize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's bf16 arithmetic is wrong without a word.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SIZES = [(1, 1), (2, 3), (7, 5), (33, 17), (130, 150)]
WIDTHS = [1, 7, 64, 100, 128, 384]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def features(rows, D, dtype):
    return normalize(torch.randn(rows, D, device=DEVICE), dim=1).to(dtype)


def integers(high, size):
    return torch.randint(0, high, (size,), device=DEVICE, dtype=torch.int32)


def number(x):
    return torch.tensor(float(x), device=DEVICE)


def limits(q, k, groups=1):
    """A limit for each row in the widest gap between its products, so that rounding moves none."""
    products = q.double().unflatten(0, (groups, -1)) @ k.double().unflatten(0, (groups, -1)).mT
    products = products.flatten(0, 1).sort(dim=1).values
    above = products[:, -1:] + 1
    low, high = products, torch.cat([products[:, 1:], above], 1)
    gap, at = (high - low)[:, :-1].max(1, keepdim=True) if k.shape[0] > groups else (above, None)
    if at is None:
        return above.flatten().float()
    middle = (low.gather(1, at) + high.gather(1, at)) / 2
    return torch.where(gap < 1e-3, above, middle).flatten().float()


def double(args):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]


def no_worse(name, got, exact, plain, factor=2.0, magnitude=0.0):
    try:
        assert_no_worse(got.cpu(), exact.cpu(), plain.cpu(), factor, magnitude)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def same_bits(run):
    return all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
