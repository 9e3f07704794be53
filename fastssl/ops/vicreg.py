"""VICReg by whichever Gram matrix is smaller: see `gram`."""

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import all_sum
from fastssl.ops.blocks import steps, wide, world
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.gram import Rows, check_views, column_dots, gram_matrix, moments
from fastssl.ops.product import product_


@without_autocast
def _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards):
    """The loss, and of each view: what X is made of, X if kept, and in the gradient the factors of
    X: the Gram matrix (N, n) or (D, D), and (D,)."""
    levels, D, dtype = () if shards is None else shards.levels, z_a.shape[1], wide(z_a, z_b)
    loss = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for s in steps(*z_a.shape, dtype):
        difference = z_a[s].to(dtype) - z_b[s].to(dtype)
        loss += column_dots(difference, difference).sum()
    loss = all_sum(loss, levels) * (sim / (n * D))
    share = cov / (D * (n - 1) ** 2)
    kept, ones = [], z_a.new_ones(D, dtype=dtype)
    for z in (z_a, z_b):
        mean, shift, squares = moments(z, n, levels, dtype)
        x = Rows(z, mean, ones, shift.to(dtype), n, shards).kept()
        gram = gram_matrix(x)
        root = (squares / (n - 1) + eps).sqrt()
        loss = loss + std / 2 * (1 - root).relu().mean()
        factor = torch.where(root < 1, -std / (2 * D * (n - 1)) / root, 0)
        if x.of_rows:
            off_diagonal = all_sum(column_dots(gram, gram).sum(), levels) - squares.square().sum()
            factor = factor - 4 * share * squares
        else:
            gram.diagonal().zero_()
            off_diagonal = column_dots(gram, gram).sum()
        loss = loss + share * off_diagonal
        kept += [*x[1:4], x.whole, gram.mul_(4 * share), factor.to(dtype)]
    return loss.to(dtype), kept


@without_autocast
def _vicreg_bwd(z, other, kept, slope, sim, n, shards):
    """dz: slope times the gradient of the loss in z."""
    *made, whole, gram, factor = kept
    D, dz, x = z.shape[1], torch.empty_like(z), Rows(z, *made, n, shards, whole)
    for at in x.blocks():
        block = x.block(at)
        d = block * factor[at[1]]
        if x.of_rows:
            product_(d, gram, x.of_all(block), add=True)
        else:
            product_(d, block, gram, add=True)
        d.add_(z[at].to(d.dtype) - other[at].to(d.dtype), alpha=2 * sim / (n * D))
        dz[at] = d.mul_(slope)
    return dz


class VICReg(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, sim, std, cov, eps, n, shards):
        loss, kept = _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards)
        ctx.save_for_backward(z_a, z_b, *kept)
        ctx.options = sim, n, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z_a, z_b, *kept = ctx.saved_tensors
        slope = dloss * world(ctx.options[-1])
        dz_a = dz_b = None
        if ctx.needs_input_grad[0]:
            dz_a = _vicreg_bwd(z_a, z_b, kept[:6], slope, *ctx.options)
        if ctx.needs_input_grad[1]:
            dz_b = _vicreg_bwd(z_b, z_a, kept[6:], slope, *ctx.options)
        return dz_a, dz_b, *[None] * 6


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    sim: float = 25.0,
    std: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
    group=None,
) -> Tensor:
    """Variance, invariance and covariance of two views' features.

    loss = sim mean (z_a - z_b)^2 + sum over z of both views of
    std / (2 D) sum_i max(0, 1 - sqrt(V_ii + eps)) + cov / D sum_{i != j} V_ij^2,
    V = X^T X / (N - 1), X = z less its mean.

    Args:
        z_a, z_b: (N, D) float32, bfloat16, float16 (computed in float32) or float64, N >= 2.
        sim, std, cov: factors of the three terms.
        eps: > 0, added to the variance under the root.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks.

    Raises:
        TypeError, ValueError: integer features, views of different shape, fewer than 2 rows over
            all ranks, eps not positive; on all ranks, what differs between them and must not.

    Memory: min(N, D)^2 numbers for each view and blocks of 8 MiB, N the rows of all ranks; over
        W ranks those of the N x N matrix that belong to a rank's rows. Centred features are stored
        only where one block holds a view's.

    Notes: where N <= D by X X^T, whose rows are gathered in blocks of columns over several ranks,
        in the backward again; else by X^T X, which is all-reduced. Every statistic is that of the
        rows of all ranks, exactly. Products in float32, the loss in float64; autocast has no
        effect. Deterministic. Gradients over several ranks as in `info_nce`.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16).unbind()
        >>> vicreg(z_a, z_b).shape
        torch.Size([])

    Paper: VICReg, arXiv:2105.04906, whose invariance term sums over D in the text and takes the
        mean in its code: the mean here.
    """
    name = "vicreg"
    if not eps > 0:
        raise ValueError(f"{name}: eps must be positive, got {eps}. Typical: 1e-4.")
    n, shards = check_views(name, z_a, z_b, group, sim=sim, std=std, cov=cov, eps=eps)
    if z_b is z_a:
        z_b = z_a.view_as(z_a)
    return VICReg.apply(z_a, z_b, sim, std, cov, eps, n, shards)
