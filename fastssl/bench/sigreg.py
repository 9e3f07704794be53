"""SIGReg, forward and backward, against the published formula on the angles of all knots."""

import torch

from ..ops import sigreg, sigreg_directions
from .measure import Work

SIZES = {
    device: {
        "sigreg": [  # V views of N rows, M slices, D
            {"V": 4, "N": 256, "M": 256, "D": 16},
            {"V": 8, "N": 512, "M": 1024, "D": 64},
            {"V": 1, "N": 4096, "M": 1024, "D": 64},
            {"V": 8, "N": 512, "M": 1024, "D": 512},
        ]
    }
    for device in ("cpu", "cuda")
}
DTYPES = {"sigreg": ["float32", "bfloat16"]}
SCALING = [
    ("sigreg", "N", (1024, 2048, 4096, 8192), {"V": 1, "M": 512, "D": 64}, 1),
    ("sigreg", "M", (256, 512, 1024, 2048), {"V": 1, "N": 2048, "D": 64}, 1),
]
KNOTS, T_MAX = 17, 3.0


def work(case: str, dtype: str, V: int, N: int, M: int, D: int) -> Work:
    # Projections (V N, M): made twice, and dz made of them; a sine and a cosine in the forward and
    # in the backward, each about as dear as an exponential.
    return Work(V * N, M, D, 3, 4, 2 * V * N * D * getattr(torch, dtype).itemsize)


def make(
    case: str, dtype: str, device: str, V: int, N: int, M: int, D: int
) -> tuple[dict, list[str]]:
    """Providers by name, none absent: each gives the statistic and its gradient. Ours also draws
    its directions."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(V, N, D, generator=generator).to(device, getattr(torch, dtype)).requires_grad_()
    directions = sigreg_directions(M, D, step=1, device=device)
    step = torch.ones((), dtype=torch.int64, device=device)
    compiled = torch.compile(published, dynamic=False)

    def run(loss):
        value = loss()
        return value.detach(), *torch.autograd.grad(value, z)

    def ours():
        return sigreg(z, num_slices=M, knots=KNOTS, t_max=T_MAX, step=step)

    return {
        "ours": lambda: run(ours),
        "published": lambda: run(lambda: published(z, directions)),
        "compiled": lambda: run(lambda: compiled(z, directions)),
    }, []


def published(z, directions):
    """LeJEPA's minimal example, for directions that are given."""
    t = torch.linspace(0, T_MAX, KNOTS, device=z.device)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weights[[0, -1]] /= 2
    x_t = (z @ directions.to(z.dtype)).unsqueeze(-1) * t  # (V, N, S, T)
    error = (x_t.cos().mean(-3) - phi).square() + x_t.sin().mean(-3).square()
    return (error @ (weights * phi) * z.shape[-2]).mean()
