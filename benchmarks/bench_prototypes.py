"""Sinkhorn-Knopp over prototypes against the published iteration on all of e^(scores / epsilon)."""

import harness
import pytest
import torch
from torch.nn.functional import normalize

from fastssl.ops import sinkhorn, sinkhorn_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # N samples, M prototypes, features of width D
    "cpu": [(64, 3000, 128), (64, 65536, 256), (4096, 3000, 128)],
    "cuda": [(64, 3000, 128), (64, 65536, 256), (4096, 3000, 128), (8192, 16000, 256)]
    + [(4096, 65536, 256)],
}
EPSILON, ITERATIONS = 0.05, 3
# Exponentials of each score: one a pass, and one where codes are written.
EXPONENTIALS = {"sinkhorn_bias": ITERATIONS, "sinkhorn": ITERATIONS + 1}


def published(scores):
    """SwAV's and DINOv2's iteration: prototypes in rows, in float32 and in place."""
    M = (scores.float() / EPSILON).exp().T
    K, B = M.shape
    M /= M.sum()
    for _ in range(ITERATIONS):
        M /= M.sum(1, keepdim=True)
        M /= K
        M /= M.sum(0, keepdim=True)
        M /= B
    M *= B
    return M.T


def first_codes(scores):
    """What a consumer does with the bias, for one sample: so that results can be compared."""
    bias = sinkhorn_bias(scores, EPSILON, ITERATIONS)
    return torch.softmax(scores[:1].float() / EPSILON + bias, 1)


def make(case: str, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours, the baseline and others by name: each gives codes, of one sample for sinkhorn_bias."""
    generator = torch.Generator().manual_seed(0)
    samples, prototypes = (normalize(torch.randn(n, D, generator=generator)) for n in (N, M))
    scores = (samples @ prototypes.T).to(device, getattr(torch, dtype))
    if case == "sinkhorn_bias":
        providers = {
            "ours": lambda: (first_codes(scores),),
            "published": lambda: (published(scores)[:1].clone(),),
        }
    else:
        providers = {
            "ours": lambda: (sinkhorn(scores, EPSILON, ITERATIONS),),
            "published": lambda: (published(scores),),
        }
    if device == "cuda":
        torch._dynamo.reset()
        compiled = torch.compile(published, dynamic=False)
        providers["compiled"] = lambda: (compiled(scores)[: 1 if case == "sinkhorn_bias" else N],)
    return providers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", EXPONENTIALS)
@pytest.mark.parametrize("N,M,D", SIZES[DEVICE])
def test_forward(benchmark, case, N, M, D, dtype):
    params = {"case": case, "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    harness.measure(benchmark, __name__, params, (N, M), 0, EXPONENTIALS[case])
