"""Forward and backward of SIGReg against the published formula on the angles of all knots."""

import harness
import pytest
import torch

from fastssl.ops import sigreg, sigreg_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # V views of N rows, M slices, D
    (4, 256, 256, 16),
    (1, 4096, 1024, 64),
    (8, 512, 1024, 64),
    (8, 512, 1024, 512),
]
KNOTS, T_MAX = 17, 3.0
# Of the projections (V N, M): made twice, and dz made of them; a sine and a cosine in the forward
# and in the backward, each about as dear as an exponential.
PRODUCTS, EXPONENTIALS = 3, 4


def published(z, directions):
    """LeJEPA's minimal example, for directions that are given."""
    t = torch.linspace(0, T_MAX, KNOTS, device=z.device)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weights[[0, -1]] /= 2
    x_t = (z @ directions.to(z.dtype)).unsqueeze(-1) * t  # (V, N, S, T)
    error = (x_t.cos().mean(-3) - phi).square() + x_t.sin().mean(-3).square()
    return (error @ (weights * phi) * z.shape[-2]).mean()


def make(case: str, V: int, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours, which also draws its directions, the baseline and others by name: each gives the
    statistic and its gradient."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(V, N, D, generator=generator).to(device, getattr(torch, dtype)).requires_grad_()
    directions = sigreg_directions(M, D, step=1, device=device)
    step = torch.ones((), dtype=torch.int64, device=device)

    def run(loss):
        value = loss()
        return value.detach(), *torch.autograd.grad(value, z)

    def ours():
        return sigreg(z, num_slices=M, knots=KNOTS, t_max=T_MAX, step=step)

    providers = {
        "ours": lambda: run(ours),
        "published": lambda: run(lambda: published(z, directions)),
    }
    if device == "cuda":
        torch._dynamo.reset()
        graph = torch.compile(published, dynamic=False)
        providers["compiled"] = lambda: run(lambda: graph(z, directions))
    return providers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("V,N,M,D", CASES)
def test_forward_backward(benchmark, V, N, M, D, dtype):
    params = {"case": "sigreg", "V": V, "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    harness.measure(benchmark, __name__, params, (V * N, M), PRODUCTS, EXPONENTIALS)
