"""The cross-entropy over prototypes from features: scores z W^T exist for a block of samples only.

A block's scores are made by one product, its loss and their gradient dS by the kernels of
`prototype_loss`, then dz = dS W and dW += dS^T z. A reduced loss does all of it in the forward, so
no product is made twice: the upstream gradient is one number, by which the backward multiplies.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastssl.autograd import once_differentiable
from fastssl.ops.checks import (
    check_floating,
    common_dtype,
    reduced,
    slope_of_row,
)
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.product import is_wider, multiplied, product, product_
from fastssl.ops.prototype_loss import (
    PrototypeLoss,
    crops_of,
    loss_options,
    prototype_loss_bwd_ref_,
    prototype_loss_fwd_ref,
)

# What the scores of a block may take, if that is enough rows for the products' full speed. With
# K = 65536 on AMD cores 64 rows cost up to 24 % more, and 512 gain at most 6 %. Scores that fit a
# block are made whole, unless products of ours, faster than the library's, gain more than blocks
# cost; and for 16-bit prototypes those of less than twice their gradient in float32, which only
# blocks need: with S + T = 12, D = 256 it costs 14 % at B = 64.
BLOCK_BYTES = 32 << 20
LEAST_ROWS = 256
OWN_PRODUCTS_FROM = 1 << 23  # S B D K
# Prototypes whose gradient is added at a time: their part of it, in 16 bit, stays in cache.
PROTOTYPES = 4096


def _step(B: int, crops: int, K: int, dtype: torch.dtype) -> int:
    """Samples of a block; the blocks are of nearly one size."""
    rows = max(BLOCK_BYTES // (K * dtype.itemsize), LEAST_ROWS)
    blocks = -(-B // max(rows // crops, 1))
    return -(-B // max(blocks, 1))


def _scores(z: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """z W^T in the first rows of `out`: fresh memory costs as much as a product."""
    out = out[: len(z)]
    return product_(out, z, W.T) if out.dtype == torch.float32 else torch.mm(z, W.T, out=out)


@without_autocast
def _pass(
    student: Tensor,  # (S, B, D)
    W: Tensor,  # (K, D)
    teacher: Tensor,  # (T, B, E), or (T, B, K) where V is None
    V: Tensor | None,  # (K, E)
    bias: Tensor | None,  # (T, K)
    dloss: Tensor,  # (S, B)
    dtypes: tuple[torch.dtype, torch.dtype],  # of the student's and the teacher's scores
    options: tuple[float, float, bool],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss (S, B), and the gradient of sum dloss loss in at least fp32: dstudent, dW, as needed."""
    (S, B, D), T, K = student.shape, len(teacher), len(W)
    wide, ops = dloss.dtype, torch.ops.fastssl
    by_reference = wide == torch.float64
    fwd = prototype_loss_fwd_ref if by_reference else ops.prototype_loss_fwd
    bwd = prototype_loss_bwd_ref_ if by_reference else ops.prototype_loss_bwd_
    step = _step(B, S + T, K, dtypes[0])
    loss = torch.empty_like(dloss)
    dstudent = dloss.new_empty(S, B, D) if needs[0] else None
    dW = dloss.new_zeros(K, D) if needs[1] else None
    W, out = W.to(dtypes[0]), W.new_empty(S * step, K, dtype=dtypes[0])
    if V is not None:
        V, teacher_out = V.to(dtypes[1]), V.new_empty(T * step, K, dtype=dtypes[1])
    for i in range(0, B, max(step, 1)):
        rows = slice(i, i + step)
        z, x = student[:, rows].flatten(0, 1).to(W.dtype), teacher[:, rows]
        y = _scores(z, W, out).view(S, -1, K)
        if V is not None:
            x = _scores(x.flatten(0, 1).to(V.dtype), V, teacher_out).view(T, -1, K)
        loss[:, rows], *stats = fwd(y, x, bias, *options)
        if not any(needs):
            continue
        bwd(y, x, bias, *options, *stats, dloss[:, rows].contiguous())
        dy = y.view(-1, K)
        if dstudent is not None:
            dz = product(dy, W) if W.dtype == torch.float32 else dy @ W
            dstudent[:, rows] = dz.view(S, -1, D)
        if dW is not None:
            for part, g in zip(dW.split(PROTOTYPES), dy.split(PROTOTYPES, 1), strict=True):
                if part.dtype == W.dtype:
                    product_(part, g.T, z, add=True)
                else:
                    part += g.T @ z
    return loss, dstudent, dW


class LinearPrototypeLoss(torch.autograd.Function):
    """A reduced loss brings its gradient along, without the factors that all rows share: these
    reach it in at least fp32, in place, before it is rounded. Losses by row, and a second backward,
    run the pass again."""

    @staticmethod
    def forward(
        ctx, student, W, teacher, V, bias, weight, scales, ignore_diagonal, reduction, shards,
        dtypes, needs,
    ):  # fmt: skip
        (S, B, _), T = student.shape, len(teacher)
        ctx.dtypes, ctx.options, ctx.needs = dtypes, (*scales, ignore_diagonal), needs
        pairs = S * T - min(S, T) * ignore_diagonal if reduction == "mean" else 1
        ctx.slope = slope_of_row(reduction, B, shards) / pairs
        inputs = student, W, teacher, V, bias
        by_row = reduction == "none"
        loss, *grads = _pass(
            *inputs, weight, dtypes, ctx.options, (False, False) if by_row else needs
        )
        ctx.grads = None if by_row else grads
        ctx.save_for_backward(*inputs, weight)
        loss = loss * weight
        return loss if by_row else reduced(loss.sum(0) / pairs, reduction, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        *inputs, weight = ctx.saved_tensors
        factor = dloss * ctx.slope
        if ctx.grads is not None:
            grads = [None if grad is None else grad.mul_(factor) for grad in ctx.grads]
            ctx.grads = None
        else:
            _, *grads = _pass(*inputs, weight * factor, ctx.dtypes, ctx.options, ctx.needs)
        grads = (
            None if grad is None else grad.to(x.dtype)
            for grad, x in zip(grads, inputs[:2], strict=True)
        )
        return *grads, *[None] * 10


def _features(name: str, label: str, x: Tensor, prototypes: Tensor) -> Tensor:
    """(crops, B, D) of that or (B, D), which with the prototypes (K, D) gives scores."""
    check_floating(name, label, x)
    check_floating(name, f"{label}_prototypes", prototypes)
    if x.dim() not in (2, 3) or 0 in (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"{name}: {label} must be (B, D), or (crops, B, D), with at least one column, "
            f"got {tuple(x.shape)}."
        )
    if prototypes.dim() != 2 or prototypes.shape[1] != x.shape[-1] or not len(prototypes):
        raise ValueError(
            f"{name}: {label}_prototypes must be (K, D) with {label}'s width D={x.shape[-1]} and "
            f"at least one prototype, got {tuple(prototypes.shape)}."
        )
    if prototypes.device != x.device:
        raise ValueError(
            f"{name}: {label} and {label}_prototypes must be on one device, got {x.device} and "
            f"{prototypes.device}. Use .to()."
        )
    return x.unsqueeze(0) if x.dim() == 2 else x


def linear_prototype_cross_entropy(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor | None,
    *,
    bias: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    ignore_diagonal: bool = False,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    group=None,
) -> Tensor:
    """`prototype_cross_entropy` of student @ student_prototypes.T and the teacher's, never stored.

    loss_sb = sum_t H(softmax_k(v_k . teacher_tb / T_t + bias), softmax_k(w_k . student_sb / T_s)).

    Args:
        student: (S, B, D) features of S crops of B samples, or (B, D), in float32, bfloat16 or
            float16 (float64: materialising reference, in the same blocks).
        student_prototypes: (K, D), w: the weight of the last layer, as it multiplies.
        teacher: (T, B, E) or (B, E) features, a constant.
        teacher_prototypes: (K, E), v, a constant; or None, and teacher is scores (T, B, K) or
            (B, K), which Sinkhorn needs as a whole.
        bias, student_temperature, teacher_temperature, ignore_diagonal, sample_weight, reduction,
            group: as in `prototype_cross_entropy`. Every rank has its own B, also 0.

    Returns:
        A float32 scalar, or losses by row. Over several ranks the scalar is that of the rows of all
        ranks, equal on each.

    Raises:
        TypeError, ValueError: integer features, shapes that do not fit, an empty batch, no pair
            left, temperatures not positive; on all ranks, what differs between them and must not.

    Memory: scores of a block of samples (32 MiB, or 256 rows), and what a reduced loss
        keeps for its backward: both gradients in float32, O(S B D + K D). Scores that fit a block,
        or little beside 16-bit prototypes, may be made whole.

    Notes: a reduced loss makes its gradient in the forward, with the products of the unfused form
        and none twice; the backward is one multiplication, in float32, and rounds once. With
        reduction="none", and in a second backward, the scores are made again. Under autocast, and
        where features or prototypes are 16-bit, products and scores are 16-bit, as of a linear
        layer, and each block's part of the prototypes' gradient is rounded so before it is added in
        float32. Deterministic. Differentiable once, in student and student_prototypes. Gradients
        over several ranks as in `info_nce`, and prototypes are parameters: their gradients are to
        be averaged, as DistributedDataParallel does.
        With weight norm give the effective weight, to which autograd goes on:
        `head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(D, K, bias=False))`,
        then `head.weight`. A student's own bias in the last layer: a column more of the prototypes,
        and of ones of the features.

    Example:
        >>> student, teacher = torch.randn(4, 8, 16), torch.randn(2, 8, 16)  # crops, B, D
        >>> W = torch.nn.Linear(16, 32).weight
        >>> linear_prototype_cross_entropy(student, W, teacher, W, ignore_diagonal=True).shape
        torch.Size([])

    Paper: DINO, arXiv:2104.14294; the gradient made in the forward, block by block, as in Liger
        Kernel, arXiv:2410.10989.
    """
    name = "linear_prototype_cross_entropy"
    one_crop = isinstance(student, Tensor) and student.dim() == 2
    student = _features(name, "student", student, student_prototypes)
    (S, B, _), K = student.shape, len(student_prototypes)
    dtypes = [multiplied(student, common_dtype(student, student_prototypes))]
    if teacher_prototypes is None:
        teacher = crops_of(name, "teacher", teacher)
        dtypes.append(teacher.dtype)
    else:
        teacher = _features(name, "teacher", teacher, teacher_prototypes)
        teacher_prototypes = teacher_prototypes.detach()
        dtypes.append(multiplied(teacher, common_dtype(teacher, teacher_prototypes)))
    teacher_K = teacher.shape[-1] if teacher_prototypes is None else len(teacher_prototypes)
    if (teacher.shape[1], teacher_K) != (B, K):
        raise ValueError(
            f"{name}: teacher must have student's batch and prototypes (B, K)={(B, K)}, got "
            f"{(teacher.shape[1], teacher_K)}."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: student and teacher must be on one device, got {student.device} and "
            f"{teacher.device}. Use .to()."
        )
    options = loss_options(
        name, (S, len(teacher), B, K), dtypes, student, bias, student_temperature,
        teacher_temperature, ignore_diagonal, sample_weight, reduction, group,
    )  # fmt: skip
    # Asked here: a Function's forward runs without gradients, whatever its caller does.
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student, student_prototypes)]
    teacher = teacher.detach()
    scores_bytes = B * K * (S * dtypes[0].itemsize + len(teacher) * dtypes[1].itemsize)
    sums_bytes = 4 * student_prototypes.numel() if student_prototypes.itemsize == 2 else 0
    own_products = (
        dtypes == [torch.float32] * 2
        and student.numel() * K >= OWN_PRODUCTS_FROM
        and is_wider(student)
    )
    if scores_bytes <= max(BLOCK_BYTES, 2 * sums_bytes) and not own_products:
        with torch.autocast(student.device.type, enabled=False):
            scores = linear(student.to(dtypes[0]), student_prototypes.to(dtypes[0]))
            if teacher_prototypes is not None:
                teacher = linear(teacher.to(dtypes[1]), teacher_prototypes.to(dtypes[1]))
        loss = PrototypeLoss.apply(scores, teacher, *options, False)
    else:
        loss = LinearPrototypeLoss.apply(
            student, student_prototypes, teacher, teacher_prototypes, *options, dtypes, needs
        )
    return loss[0] if one_crop and reduction == "none" else loss
