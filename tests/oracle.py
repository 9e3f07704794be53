"""The oracle rule: a kernel errs at most `factor` times as much as plain PyTorch in its dtype;
and the problems that the similarity ops are put to."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize


def assert_no_worse(
    got: Tensor,
    ref64: Tensor,
    torch_same_dtype: Tensor,
    factor: float = 2.0,
    magnitude: float = 0.0,
):
    """Worst error of `got` against fp64: at most factor times plain torch's, plus a few eps.

    The floor is 4 eps of plain torch's dtype times the largest true value or, where terms cancel,
    times the size of the terms (`magnitude`): what rounding them may cost. Without it a lucky
    rounding of plain torch would set the bound. Where the truth is not finite, `got` must be the
    same.
    """
    assert got.shape == ref64.shape, f"shape {tuple(got.shape)}, expected {tuple(ref64.shape)}"
    if got.numel() == 0:
        return
    finite = ref64.isfinite()
    same = torch.where(ref64.isnan(), got.isnan(), got.double() == ref64)
    assert bool((finite | same).all()), "not finite where the truth is not, but different"
    if not finite.any():
        return
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (got.double() - ref64).abs(), zero)
    allowed_error = torch.where(finite, (torch_same_dtype.double() - ref64).abs(), zero)
    scale = max(float(ref64[finite].abs().max()), magnitude, 1e-30)
    floor = 4 * torch.finfo(torch_same_dtype.dtype).eps * scale
    limit = factor * allowed_error.max().nan_to_num(torch.inf) + floor
    i = int(error.nan_to_num(torch.inf).argmax())
    assert error.flatten()[i] <= limit, (
        f"worst element {i}: kernel {got.flatten()[i]:.9g}, fp64 {ref64.flatten()[i]:.9g}, "
        f"plain torch {torch_same_dtype.flatten()[i]:.9g}; error {error.flatten()[i]:.3g}, "
        f"allowed {limit:.3g}"
    )


def limit_in_a_gap(q, k, groups):
    """Each row's limit in the widest gap of its upper products: rounding flips no pair."""
    q, k = (x.double().unflatten(0, (groups, -1)) for x in (q, k))
    products = (q @ k.mT).flatten(0, 1).sort(1).values  # (G N, M)
    if products.shape[1] == 1:
        return products[:, 0].float() + 1
    upper = products[:, (products.shape[1] - 1) // 2 :]
    at = upper.diff(dim=1).argmax(1, keepdim=True)
    limit = (upper.gather(1, at) + upper.gather(1, at + 1))[:, 0] / 2
    limit[: len(limit) // 8] = -math.inf  # rows without any pair
    return limit.float()


def problem(
    N, M, D, dtype, *, G=1, scale=20.0, ids=False, keep_equal=False, bias=False, limit=False,
    itself=False, unit=True, device="cpu",
):  # fmt: skip
    """Arguments up to `target`, in the op's order. Features with duplicates, aligned pairs and
    zero rows, in fp64 rounded to dtype; G problems of N x M."""
    q = torch.randn(G, N, D, dtype=torch.float64)
    k = torch.randn(G, M, D, dtype=torch.float64)
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    same = min(N, M) // 2
    k[:, :same] = q[:, :same]
    if N > 4 and M > 4:
        q[:, -1], k[:, -2], k[:, -1] = 0, 0, k[:, 0]
    q, k = q.flatten(0, 1).to(dtype), k.flatten(0, 1).to(dtype)
    p = {
        "q": q,
        "k": k,
        "scale": torch.tensor(scale),
        "q_ids": torch.randint(0, 4, (G * N,), dtype=torch.int32) if ids else None,
        "k_ids": torch.randint(0, 4, (G * M,), dtype=torch.int32) if ids else None,
        "keep_equal": keep_equal,
        "bias": torch.randn(G * M) if bias else None,
        "limit": limit_in_a_gap(q, k, G) if limit else None,
        "target": torch.randint(0, M, (G * N,), dtype=torch.int32),
    }
    p = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in p.items()}
    if itself:
        p["k"], p["k_ids"] = p["q"], p["q_ids"]
    return p
