"""Centred features and their Gram matrices, whichever is smaller: for VICReg and Barlow Twins.

With X (N, D), sum_ij (X^T X)_ij^2 = ||X X^T||_F^2, and its gradient is 4 (X X^T) X = 4 X (X^T X).
So where N < D no D x D matrix is needed. For two matrices,
sum_ij (X^T Y)_ij^2 = <X X^T, Y Y^T>_F, of gradient 2 (Y Y^T) X in X. Of centred X and Y these
gradients have columns of mean 0 already: nothing comes of the centring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.dist import Shards, all_sum, gather_rows, resolve_levels
from fastssl.ops.blocks import steps, wide
from fastssl.ops.checks import check_features
from fastssl.ops.contrastive import lib
from fastssl.ops.product import product_
from fastssl.ops.sharded import shards_of

# On the CPU the forms in few calls, which always make X^T X, are as fast as or faster than those in
# blocks up to here, counted by the multiplications that X X^T would save, at least 32 for each
# feature: up to 32 x 512 and 512 x 512 on AMD with one thread. They hold copies of the features.
SMALL = 1 << 23


def is_small(z: Tensor) -> bool:
    """Whether calls cost more than what the form in blocks saves, which is slower than plain torch
    by up to half."""
    N, D = z.shape
    return z.device.type == "cpu" and N * D * max(D - N, 32) <= SMALL


# ---------------------------------------------------------------------------- passes over features


def column_moments_ref(z: Tensor, mean: Tensor | None) -> Tensor:
    """(2, D) in fp64: by column the sums of x and of x^2, x = z - mean (D,)."""
    dtype = wide(z) if mean is None else mean.dtype
    sums = torch.zeros(2, z.shape[1], dtype=torch.float64, device=z.device)
    for s in steps(*z.shape, dtype):
        x = z[s].to(dtype) if mean is None else z[s].to(dtype) - mean
        sums[0] += x.sum(0)
        sums[1] += x.square().sum(0)
    return sums


def column_dots_ref(x: Tensor, y: Tensor) -> Tensor:
    """(1, D) in fp64: by column the sum of x y."""
    total = torch.zeros(1, x.shape[1], dtype=torch.float64, device=x.device)
    for s in steps(*x.shape, x.dtype):
        total += (x[s] * y[s]).sum(0)
    return total


def standardise_ref(z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(z - mean) scale + shift by column, in the dtype of mean (D,)."""
    return torch.addcmul(shift, z.to(mean.dtype) - mean, scale)


PASSES = {
    "column_moments": column_moments_ref,
    "column_dots": column_dots_ref,
    "standardise": standardise_ref,
}
lib.define("column_moments(Tensor z, Tensor? mean) -> Tensor")
lib.define("column_dots(Tensor x, Tensor y) -> Tensor")
lib.define("standardise(Tensor z, Tensor mean, Tensor scale, Tensor shift) -> Tensor")
for name, reference in PASSES.items():
    lib.impl(name, reference, "CompositeExplicitAutograd")


def _sums_fake(rows):
    return lambda z, _: z.new_empty((rows, z.shape[1]), dtype=torch.float64)


torch.library.register_fake("fastssl::column_moments", _sums_fake(2), lib=lib)
torch.library.register_fake("fastssl::column_dots", _sums_fake(1), lib=lib)
torch.library.register_fake(
    "fastssl::standardise", lambda z, mean, *_: z.new_empty(z.shape, dtype=mean.dtype), lib=lib
)


def _pass(name: str, dtype: torch.dtype, *args: Tensor | None) -> Tensor:
    """By the op, or in fp64, which no kernel takes, by its reference."""
    run = PASSES[name] if dtype == torch.float64 else getattr(torch.ops.fastssl, name)
    return run(*args)


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """(D,)"""
    return _pass("column_dots", x.dtype, x, y).squeeze(0)


def moments(z: Tensor, n: int, levels, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of n rows in all by column the mean in dtype, and in fp64 what is still to be added to rows
    less that, and the sum of squares then: (D,) each."""
    sums = _pass("column_moments", dtype, z, None)[0]
    mean = (all_sum(sums, levels) / n).to(dtype)
    rest, squares = all_sum(_pass("column_moments", dtype, z, mean), levels).unbind()
    shift = rest / -n
    return mean, shift, squares.addcmul(shift, rest)


# ------------------------------------------------------------------------------- Gram matrices


class Rows(NamedTuple):
    """One view's rows, centred and perhaps scaled; made in blocks, and kept if one holds all."""

    z: Tensor  # (N, D)
    mean: Tensor  # (D,) in the dtype of the products
    inverse: Tensor  # (D,), what rows less the mean are multiplied by
    shift: Tensor  # (D,), what is then added: what rounding the mean left over
    n: int  # rows of all ranks
    shards: Shards | None
    whole: Tensor | None = None  # (N, D)
    of_columns: bool = False  # X^T X also where X X^T is smaller

    @property
    def of_rows(self) -> bool:
        """Whether the Gram matrix is X X^T."""
        return self.n < self.z.shape[1] and not self.of_columns

    def blocks(self) -> list[tuple[slice, slice]]:
        """Where blocks lie: of columns for X X^T, else of rows."""
        (N, D), dtype = self.z.shape, self.mean.dtype
        if self.of_rows:
            return [(slice(None), s) for s in steps(D, self.n, dtype)]
        return [(s, slice(None)) for s in steps(N, D, dtype)]

    def block(self, at: tuple[slice, slice]) -> Tensor:
        if self.whole is not None:
            return self.whole
        return _pass("standardise", self.mean.dtype, self.z[at], *(x[at[1]] for x in self[1:4]))

    def kept(self) -> "Rows":
        if len(self.blocks()) > 1:
            return self
        return self._replace(whole=_pass("standardise", self.mean.dtype, *self[:4]))

    def of_all(self, x: Tensor) -> Tensor:
        return x if self.shards is None else gather_rows(x, self.shards)


def _strips(m: int) -> list[slice]:
    step = max(128, -(-m // 8))
    return [slice(i, min(i + step, m)) for i in range(0, m, step)]


def gram_matrix(x: Rows) -> Tensor:
    """X X^T, of this rank's rows with all rows (N, n), or X^T X of all rows (D, D).

    A product of a matrix with itself is made below the diagonal, in strips, and mirrored.
    """
    N, D = x.z.shape
    gram = x.mean.new_zeros((N, x.n) if x.of_rows else (D, D))
    if x.of_rows and x.shards is not None:
        for at in x.blocks():
            block = x.block(at)
            product_(gram, block, x.of_all(block).T, add=True)
        return gram
    strips = _strips(len(gram))
    for at in x.blocks():
        y = x.block(at) if x.of_rows else x.block(at).T
        for s in strips:
            product_(gram[s, : s.stop], y[s], y[: s.stop].T, add=True)
    for s in strips[1:]:
        gram[: s.start, s] = gram[s, : s.start].T
    return gram if x.shards is None else all_sum(gram, x.shards.levels)


def check_views(name: str, z_a: Tensor, z_b: Tensor, group, **options) -> tuple[int, Shards | None]:
    """Both views checked: the rows of all ranks, and how they lie over them."""
    check_features(name, empty=bool(resolve_levels(name, group)), z_a=z_a, z_b=z_b)
    if z_a.dim() != 2 or z_a.shape != z_b.shape:
        raise ValueError(
            f"{name}: z_a and z_b must both be (N, D), got {tuple(z_a.shape)} and "
            f"{tuple(z_b.shape)}."
        )
    shards, _ = shards_of(name, group, "gather", z_a, z_b, **{"the options": options})
    n = len(z_a) if shards is None else shards.total
    if n < 2:
        raise ValueError(
            f"{name}: z_a and z_b must have at least 2 rows, over all ranks, got {n}: one row has "
            "no variance. Skip this batch."
        )
    return n, shards
