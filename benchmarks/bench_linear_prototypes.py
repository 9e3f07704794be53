"""DINO's loss from features and prototypes, forward and backward, against scores made whole."""

from contextlib import nullcontext

import harness
import pytest
import torch
from torch.nn.functional import linear, normalize

from fastssl.ops import linear_prototype_cross_entropy, prototype_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, T = 10, 2  # student and teacher crops
SIZES = [(64, 3000, 256), (64, 65536, 64), (64, 65536, 256), (64, 65536, 512), (256, 65536, 256)]
CASES = [  # under autocast prototypes are float32
    ("linear_prototypes", "float32"),
    ("linear_prototypes", "bfloat16"),
    ("linear_prototypes_autocast", "bfloat16"),
]
# Of each score of a student, and of a teacher.
PRODUCTS = (3 * S + T) / (S + T)
EXPONENTIALS = (2 * S + 3 * T) / (S + T)


def make(case: str, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours and the unfused form by name: each gives the loss and its gradients."""
    generator = torch.Generator().manual_seed(0)
    of_features = getattr(torch, dtype)
    of_prototypes = torch.float32 if case.endswith("autocast") else of_features

    def rows(*size, dtype):
        return normalize(torch.randn(*size, D, generator=generator), dim=-1).to(device, dtype)

    student, teacher = rows(S, N, dtype=of_features), rows(T, N, dtype=of_features)
    W, V = (rows(M, dtype=of_prototypes) for _ in range(2))
    inputs = student.requires_grad_(), W.requires_grad_()
    options = {"bias": torch.randn(M, generator=generator).to(device), "ignore_diagonal": True}

    def unfused(student, W, teacher, V, **options):
        return prototype_cross_entropy(linear(student, W), linear(teacher, V), **options)

    def run(loss):
        with torch.autocast(device, of_features) if case.endswith("autocast") else nullcontext():
            value = loss(student, W, teacher, V, **options)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return {"ours": lambda: run(linear_prototype_cross_entropy), "unfused": lambda: run(unfused)}


@pytest.mark.parametrize("case,dtype", CASES)
@pytest.mark.parametrize("N,M,D", SIZES)
def test_forward_backward(benchmark, case, N, M, D, dtype):
    params = {"case": case, "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    harness.measure(benchmark, __name__, params, ((S + T) * N, M), PRODUCTS, EXPONENTIALS)
