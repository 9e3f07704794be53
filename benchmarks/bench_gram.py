"""Forward and backward of VICReg, Barlow Twins and KoLeo against lightly's; top-k search."""

import harness
import pytest
import torch
from torch.nn.functional import normalize

import fastssl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # case, N, M, D
    ("vicreg", 256, 256, 2048),
    ("vicreg", 2048, 2048, 8192),
    ("vicreg", 4096, 4096, 1024),
    ("barlow_twins", 256, 256, 2048),
    ("barlow_twins", 2048, 2048, 8192),
    ("barlow_twins", 4096, 4096, 1024),
    ("koleo", 256, 256, 1024),
    ("koleo", 4096, 4096, 1024),
    ("topk", 1024, 65536, 384),
]
# Products that must be computed; those of a matrix with itself are half a product.
PRODUCTS = {"vicreg": 3, "barlow_twins": 3, "koleo": 0.5, "topk": 1}
LOSSES = {"vicreg": "VICRegLoss", "barlow_twins": "BarlowTwinsLoss", "koleo": "KoLeoLoss"}


def make(case: str, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours and the baseline by name: each gives the loss and its gradients, or the cosines."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, D, generator=generator).to(device) for _ in range(2))
    if case == "topk":
        bank = torch.randn(M, D, generator=generator).to(device)

        def eager():
            return (normalize(a) @ normalize(bank).T).topk(20, dim=1)[:1]

        return {"ours": lambda: fastssl.ops.topk_cosine(a, bank, 20)[:1], "eager": eager}
    lightly = pytest.importorskip("lightly.loss")
    inputs = [x.requires_grad_() for x in ([a] if case == "koleo" else [a, a.detach() + b])]
    name = LOSSES[case]

    def run(loss):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    ours, theirs = getattr(fastssl.losses, name)(), getattr(lightly, name)()
    return {"ours": lambda: run(ours), f"lightly {name}": lambda: run(theirs)}


@pytest.mark.parametrize("case,N,M,D", CASES)
def test_forward_backward(benchmark, case, N, M, D):
    params = {"case": case, "N": N, "M": M, "D": D, "dtype": "float32", "device": DEVICE}
    shape = (N, M if case == "topk" else min(N, D))
    harness.measure(benchmark, __name__, params, shape, PRODUCTS[case], 0)
