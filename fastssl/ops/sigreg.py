"""SIGReg: how far features are from an isotropic Gaussian, by characteristic functions of slices.

With p = z a along direction a and knots t_k = k h, h = t_max / (T - 1), over N rows
X_k = sum_n (cos(t_k p_n) - phi_k), Y_k = sum_n sin(t_k p_n), phi_k = e^(-t_k^2 / 2),
statistic = (1 / N) sum_k w_k phi_k (X_k^2 + Y_k^2), w the trapezoid's weights on [-t_max, t_max].
X and Y are all that rows or ranks have to be summed to; knot 0 adds nothing. The gradient
dp_n = (2 / N) sum_k w_k phi_k t_k (Y_k cos(t_k p_n) - X_k sin(t_k p_n)) needs them alone.
"""

import math

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import agree, all_sum, resolve_levels, world_size
from fastssl.ops.blocks import wide
from fastssl.ops.checks import check_floating, check_reduction, checksum, number_or_tensor
from fastssl.ops.contrastive import lib, on_cuda, without_autocast
from fastssl.random import SLICES, philox4x32


def knot_weights(knots: int, t_max: float, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t_k, phi_k and w_k phi_k of the knots k = 0 .. knots - 1, in like's dtype."""
    spacing = t_max / (knots - 1)
    t = torch.arange(knots, device=like.device, dtype=torch.float64) * spacing
    phi = (-t * t / 2).exp()
    weight = phi * (2 * spacing)
    weight[:: knots - 1] /= 2
    return t.to(like.dtype), phi.to(like.dtype), weight.to(like.dtype)


# ------------------------------------------------------------------------------------ references


def sigreg_directions_ref(step: Tensor, seed: int, num_slices: int, dim: int) -> Tensor:
    """(dim, num_slices): columns of length 1, normal numbers before, each a function of (seed,
    step, slice, dimension) alone: Philox4x32-10, four dimensions a block, and Box-Muller."""
    s = torch.arange(num_slices, device=step.device)[:, None]
    block = torch.arange((dim + 3) // 4, device=step.device)[None, :]
    low, high = step & 0xFFFFFFFF, (step >> 32 & 0xFFFFFF) | SLICES << 24
    counter = torch.stack(torch.broadcast_tensors(s, block, low, high), -1)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    u = ((words >> 9).double() + 0.5) * 2.0**-23  # (S, blocks, 4) in (0, 1), exact in float32
    radius = (-2 * u[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * u[..., 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    normal = normal.flatten(1)[:, :dim]  # (S, D)
    return (normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)).T.float().contiguous()


def _angles(z: Tensor, directions: Tensor, spacing: float, knots: int) -> Tensor:
    """(G, knots, N, S): k h p for k = 1 .. knots."""
    t = spacing * torch.arange(1, knots + 1, device=z.device, dtype=wide(z))
    p = z.to(t.dtype) @ directions.to(t.dtype)  # (G, N, S)
    return t.view(-1, 1, 1) * p.unsqueeze(1)


@without_autocast
def sigreg_fwd_ref(
    z: Tensor,  # (G, N, D)
    directions: Tensor,  # (D, S)
    spacing: float,
    knots: int,
    left_out: Tensor | None = None,  # (G,) int64: so many rows of zeros do not count
) -> Tensor:
    """X and Y (G, 2, knots, S) of knots 1 .. knots."""
    angles = _angles(z, directions, spacing, knots)
    t = spacing * torch.arange(1, knots + 1, device=z.device, dtype=angles.dtype)
    phi = (-t * t / 2).exp().view(-1, 1, 1)
    x = (angles.cos() - phi).sum(2)
    if left_out is not None:
        x = x - left_out.view(-1, 1, 1) * (1 - phi.squeeze(2))
    return torch.stack([x, angles.sin().sum(2)], 1)


@without_autocast
def sigreg_bwd_ref(z: Tensor, directions: Tensor, series: Tensor, spacing: float) -> Tensor:
    """dz (G, N, D) of dp_n = sum_k a_k cos(k h p_n) + b_k sin(k h p_n); series (G, 2, knots, S)."""
    a, b = series.unsqueeze(3).unbind(1)  # (G, knots, 1, S)
    angles = _angles(z, directions, spacing, series.shape[2])
    dp = (a * angles.cos() + b * angles.sin()).sum(1)  # (G, N, S)
    return (dp @ directions.to(dp.dtype).T).to(z.dtype)


lib.define("sigreg_directions(Tensor step, int seed, int num_slices, int dim) -> Tensor")
lib.define(
    "sigreg_fwd(Tensor z, Tensor directions, float spacing, int knots, Tensor? left_out=None)"
    " -> Tensor"
)
lib.define("sigreg_bwd(Tensor z, Tensor directions, Tensor series, float spacing) -> Tensor")
lib.impl("sigreg_directions", sigreg_directions_ref, "CompositeExplicitAutograd")
lib.impl("sigreg_fwd", sigreg_fwd_ref, "CompositeExplicitAutograd")
lib.impl("sigreg_bwd", sigreg_bwd_ref, "CompositeExplicitAutograd")


def _directions_fake(step, seed, num_slices, dim):
    return step.new_empty(dim, num_slices, dtype=torch.float32)


def _fwd_fake(z, directions, spacing, knots, left_out=None):
    torch._check(
        z.dim() == 3 and directions.dim() == 2 and z.shape[2] == directions.shape[0],
        lambda: "sigreg_fwd: z must be (G, N, D) and directions (D, S)",
    )
    return z.new_empty(len(z), 2, knots, directions.shape[1], dtype=wide(z))


def _bwd_fake(z, directions, series, spacing):
    return z.new_empty(z.shape)


torch.library.register_fake("fastssl::sigreg_directions", _directions_fake, lib=lib)
torch.library.register_fake("fastssl::sigreg_fwd", _fwd_fake, lib=lib)
torch.library.register_fake("fastssl::sigreg_bwd", _bwd_fake, lib=lib)
on_cuda("sigreg", "sigreg_directions", sigreg_directions_ref, "computes in fp64")
on_cuda("sigreg", "sigreg_fwd", sigreg_fwd_ref, "holds all knots x N x S angles in memory")
on_cuda("sigreg", "sigreg_bwd", sigreg_bwd_ref, "holds all knots x N x S angles in memory")


class SigReg(torch.autograd.Function):
    """The statistics (G, S). Keeps z, the directions, and X and Y of all ranks."""

    @staticmethod
    def forward(ctx, z, directions, count, knots, t_max, levels):
        by_reference = z.dtype == torch.float64  # which exists for oracles
        spacing = t_max / (knots - 1)
        fwd = sigreg_fwd_ref if by_reference else torch.ops.fastssl.sigreg_fwd
        left_out = None if count is None else z.shape[1] - count
        sums = fwd(z, directions, spacing, knots - 1, left_out)
        _, _, weight = knot_weights(knots, t_max, sums)
        if count is None:
            count = sums.new_full((len(z),), z.shape[1])
        count = count.to(sums.dtype)
        if levels:
            packed = all_sum(torch.cat([sums.flatten(), count]), levels)
            sums, count = packed[: sums.numel()].view(sums.shape), packed[sums.numel() :]
        n = count.where(count > 0, math.inf).view(-1, 1)
        ctx.save_for_backward(z, directions, sums, n)
        ctx.options = by_reference, knots, t_max, world_size(levels)
        return (sums.square().sum(1) * weight[1:, None]).sum(1) / n

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        z, directions, sums, n = ctx.saved_tensors
        by_reference, knots, t_max, world = ctx.options
        t, _, weight = knot_weights(knots, t_max, sums)
        slope = (t * weight)[1:, None] * (d * (2 * world) / n).unsqueeze(1)  # (G, knots, S)
        series = torch.stack([slope * sums[:, 1], -slope * sums[:, 0]], 1)
        bwd = sigreg_bwd_ref if by_reference else torch.ops.fastssl.sigreg_bwd
        return bwd(z, directions, series, t_max / (knots - 1)), *[None] * 5


def sigreg_directions(
    num_slices: int, dim: int, *, seed: int = 0, step: int | Tensor = 0, device=None
) -> Tensor:
    """Random directions on the sphere, each number a function of (seed, step, slice, dimension).

    Args:
        num_slices, dim: S and D, >= 1.
        seed: an integer, of which 64 bits count.
        step: >= 0, of which 56 bits count: a number, or an int64 scalar on the device, which no
            host reads.
        device: where, if step is a number.

    Returns:
        (D, S) float32, columns of length 1; the same on every device and rank but for rounding.

    Raises:
        ValueError: sizes below 1, a step of several numbers.

    Example:
        >>> a = sigreg_directions(4, 16, seed=1, step=2)
        >>> bool(torch.allclose(a.norm(dim=0), torch.ones(4)))
        True

    Paper: LeJEPA, arXiv:2511.08544; Philox, SC 2011.
    """
    name = "sigreg_directions"
    for label, value in (("num_slices", num_slices), ("dim", dim)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {label} must be an integer >= 1, got {value!r}.")
    if not isinstance(seed, int):
        raise TypeError(f"{name}: seed must be an integer, got {seed!r}.")
    if not isinstance(step, Tensor):
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"{name}: step must be an integer >= 0, got {step!r}.")
        step = torch.full((), step, dtype=torch.int64, device=device)
    elif step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(
            f"{name}: step must be one int64 number, got {step.dtype} {tuple(step.shape)}."
        )
    seed = (seed + 2**63) % 2**64 - 2**63  # as the int64 with these bits
    return torch.ops.fastssl.sigreg_directions(step.view(()), seed, num_slices, dim)


def slices_of(
    name: str, z: Tensor, directions: Tensor | None, num_slices: int, seed: int, step: int | Tensor
) -> tuple[Tensor, dict[str, object]]:
    """The directions that are given, or random ones, (D, S) in at least float32 on z's device; and
    what must be the same on all ranks."""
    D, random = z.shape[-1], directions is None
    if random:
        directions = sigreg_directions(num_slices, D, seed=seed, step=step, device=z.device)
    elif (
        not isinstance(directions, Tensor)
        or directions.dim() != 2
        or len(directions) != D
        or not directions.shape[1]
    ):
        got = tuple(directions.shape) if isinstance(directions, Tensor) else directions
        raise ValueError(f"{name}: directions must be (D, S) with z's D={D} and S >= 1, got {got}.")
    directions = directions.detach().to(device=z.device, dtype=wide(z))
    # Numbers tell them apart already.
    told = random and not isinstance(step, Tensor)
    same = {
        "the leading dimensions": tuple(z.shape[:-2]),
        "the width and slices": tuple(directions.shape),
        "the dtype": z.dtype,
        "the seed and step": (seed, *number_or_tensor(step)),
        "the checksum of the directions": None if told else checksum(directions),
    }
    return directions, same


def sigreg(
    z: Tensor,
    *,
    num_slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    target_std: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    group=None,
) -> Tensor:
    """Distance of features from N(0, target_std^2 I), by the Epps-Pulley test of random slices.

    statistic_s = N sum_k w_k e^(-t_k^2 / 2) |mean_n e^(i t_k p_ns) - e^(-t_k^2 / 2)|^2,
    p = z a_s / target_std.

    Args:
        z: (..., N, D) float32, bfloat16, float16 (computed in float32; float64: materialising
            reference). Leading dimensions, such as views or positions, have statistics of their
            own along the same directions.
        num_slices: S >= 1, random directions a_s.
        knots: odd, >= 3: t_k are equally spaced on [0, t_max], for an integral over
            [-t_max, t_max] by the trapezoidal rule.
        t_max: > 0, the last knot.
        target_std: > 0, the standard deviation asked for.
        seed, step: of the directions, as in `sigreg_directions`. Other ones every step: count.
        directions: (D, S), in place of random ones; used as they are.
        mask: (..., N) bool, the rows that count; others may hold anything.
        clip: statistics below this count as 0 and have no gradient.
        reduction: "mean" or "sum" over slices and leading dimensions, or "none" for (..., S).
        group: whose ranks' rows are one sample, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, or the statistics, equal on all ranks. About 1.05 a slice where
        z is normal, for any N; 0.40 N where all rows are 0 (17 knots, t_max 3). 0 where no row
        counts.

    Raises:
        TypeError, ValueError: integer z, wrong shapes, numbers out of range, no rows; on all
            ranks, what differs between them and must not.

    Memory: S x knots numbers for each leading index, and on a CPU a block of projections: neither
        N x S projections (a GPU stores those, in float32) nor N x S x knots angles.

    Notes: projections and angles in float32, sums in float32 over blocks of rows, on a CPU in
        float64 across. One all-reduce of sums and counts, exact for uneven ranks; none in the
        backward, which takes the upstream gradient to be equal on all ranks. Deterministic for a
        given number of threads. The order of rows changes rounding alone. Autocast has no effect.
        Differentiable once, in z. Gradients over several ranks as in `info_nce`.

    Example:
        >>> z = torch.randn(2, 512, 16)  # views, N, D
        >>> bool(0.5 < sigreg(z, num_slices=64) < 2)
        True

    Paper: LeJEPA, arXiv:2511.08544; Epps and Pulley, Biometrika 1983.
    """
    name = "sigreg"
    check_floating(name, "z", z)
    check_reduction(name, reduction)
    if clip is not None and not isinstance(clip, (int, float)):
        raise TypeError(f"{name}: clip must be a number or None, got {clip!r}.")
    levels = resolve_levels(name, group)
    if z.dim() < 2 or 0 in (*z.shape[:-2], z.shape[-1]) or not (z.shape[-2] or levels):
        raise ValueError(
            f"{name}: z must be (..., N, D) with at least one row and column, got "
            f"{tuple(z.shape)}. Skip empty batches."
        )
    for label, value in (("t_max", t_max), ("target_std", target_std)):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}: {label} must be a positive number, got {value!r}.")
    if not isinstance(knots, int) or knots < 3 or knots % 2 == 0:
        raise ValueError(
            f"{name}: knots must be an odd integer >= 3, got {knots!r}. Typical: 17 (5 to 41)."
        )
    directions, same = slices_of(name, z, directions, num_slices, seed, step)
    directions = directions / target_std
    flat, count = z.reshape(math.prod(z.shape[:-2]), *z.shape[-2:]), None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != z.shape[:-1]:
            got = (mask.dtype, tuple(mask.shape)) if isinstance(mask, Tensor) else mask
            raise ValueError(
                f"{name}: mask must be a bool tensor of shape {tuple(z.shape[:-1])}, one entry a "
                f"row, got {got}."
            )
        flat_mask = mask.reshape(flat.shape[:2])
        flat, count = flat.where(flat_mask.unsqueeze(2), 0), flat_mask.sum(1)
    if levels:
        same |= {
            "the width, slices and knots": (*directions.shape, knots),
            "t_max and target_std": (t_max, target_std),
            "the reduction and clip": (reduction, clip),
        }
        agree(name, levels, (), z, **same)
    statistic = SigReg.apply(flat, directions, count, knots, t_max, levels)
    if clip is not None:
        statistic = statistic.masked_fill(statistic < clip, 0)
    if reduction == "none":
        return statistic.view(*z.shape[:-2], directions.shape[1])
    return statistic.sum() if reduction == "sum" else statistic.mean()
