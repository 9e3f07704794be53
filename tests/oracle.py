"""The oracle rule: a kernel errs at most `factor` times as much as plain PyTorch in its dtype."""

import torch
from torch import Tensor


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
