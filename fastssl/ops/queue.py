"""Contrast with a queue of frozen keys: loss and query gradient in one pass over the queue.

With keys that take no gradient, softmax cross-entropy is attention whose values are its keys:
row_lse_i = log sum_j e^l_ij and out_i = sum_j softmax_ij k_j, so dl/dq_i = scale out_i.
"""

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import Shards, exchange_parts, gather_rows, resolve_levels
from fastssl.ops import contrastive
from fastssl.ops.checks import (
    Problem,
    check_features,
    check_reduction,
    common_dtype,
    flat,
    float_vector,
    number_or_tensor,
    prepare,
    reduced,
    scale_of,
    slope_of_row,
    softplus,
    unit_rows,
)
from fastssl.ops.contrastive import PROBLEM, lib, logits_ref, without_autocast
from fastssl.ops.sharded import shards_of


@without_autocast
def queue_fwd_ref(
    q: Tensor,  # (G N, D)
    k: Tensor,  # (G M, D)
    scale: Tensor,  # ()
    q_ids: Tensor | None,  # (G N,) int32
    k_ids: Tensor | None,  # (G M,) int32
    keep_equal: bool,
    bias: Tensor | None,  # (G M,)
    limit: Tensor | None,  # (G N,)
    groups: int,
) -> tuple[Tensor, Tensor]:
    """row_lse (G N,) and out (G N, D); a row without any pair has -inf and zeros."""
    logits, left_out = logits_ref(q, k, scale, q_ids, k_ids, keep_equal, bias, limit, False, groups)
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    row_lse = logits.logsumexp(2)  # (G, N)
    # Not exp(logits - lse): the rounding of an lse of thousands would scale the whole row.
    p = logits.softmax(2).masked_fill(row_lse.isneginf().unsqueeze(2), 0)
    out = p @ k.to(p.dtype).unflatten(0, (groups, -1))
    return row_lse.flatten(), out.flatten(0, 1)


lib.define(f"queue_fwd({PROBLEM}int groups) -> (Tensor row_lse, Tensor out)")
lib.impl("queue_fwd", queue_fwd_ref, "CompositeExplicitAutograd")


def _fake(q, k, scale, q_ids, k_ids, keep_equal, bias, limit, groups):
    torch._check(q.dim() == 2 and k.dim() == 2, lambda: "queue_fwd: q and k must be 2-D")
    return scale.new_empty(q.shape[0]), scale.new_empty(q.shape)


torch.library.register_fake("fastssl::queue_fwd", _fake, lib=lib)
contrastive.on_cuda("queue", "queue_fwd", queue_fwd_ref)


def forward(problem: Problem, groups: int) -> tuple[Tensor, Tensor]:
    q, k, scale, q_ids, k_ids, *rest = problem
    if not len(q) or not len(k):  # this rank's share of what others hold
        return scale.new_full((len(q),), -torch.inf), scale.new_zeros(q.shape)
    fwd = queue_fwd_ref if q.dtype == torch.float64 else torch.ops.fastssl.queue_fwd
    return fwd(q, k, scale, q_ids, q_ids if k_ids is None else k_ids, *rest, groups)


class QueueNCE(torch.autograd.Function):
    """loss_i = log(e^pos_i + e^lse_i) - pos_i = softplus(lse_i - pos_i), of slope sigmoid.

    The forward leaves out_i in fp32, so the backward is one sum of rows: the upstream gradient,
    and with it a loss scale, is applied before anything is rounded.
    """

    @staticmethod
    def forward(ctx, q, positive, scale, weight, reduction, shards, queue_sharded, queue, *vectors):
        wide = scale.dtype
        problem = Problem(q, queue, scale, *vectors)
        if queue_sharded:
            lse, out = _over_shards(problem, shards)
        else:
            lse, out = forward(problem, 1)
        gap = lse - scale * (q.to(wide) * positive.to(wide)).sum(1)
        loss = softplus(gap)
        if weight is not None:
            loss = loss * weight
        ctx.save_for_backward(q, positive, scale, weight, out, gap)
        ctx.each = slope_of_row(reduction, len(q), shards)
        return reduced(loss, reduction, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        q, positive, scale, weight, out, gap = ctx.saved_tensors
        need_q, need_positive, need_scale = ctx.needs_input_grad[:3]
        slope = gap.sigmoid() * (dloss * ctx.each)
        if weight is not None:
            slope = slope * weight
        difference = out - positive.to(out.dtype)  # (N, D)
        wide = q.to(out.dtype)
        by_row = (scale * slope).unsqueeze(1)
        return (
            (by_row * difference).to(q.dtype) if need_q else None,
            (-by_row * wide).to(positive.dtype) if need_positive else None,
            (slope * (wide * difference).sum(1)).sum() if need_scale else None,
            *[None] * 10,
        )


def _over_shards(problem: Problem, shards: Shards) -> tuple[Tensor, Tensor]:
    """`forward` where each rank holds a part of the queue: all queries visit all parts."""
    q, q_ids = gather_rows(problem.q, shards), problem.q_ids
    q_ids = None if q_ids is None else gather_rows(q_ids, shards)
    lse, out = forward(problem._replace(q=q, q_ids=q_ids), 1)

    def merge(parts):  # (P, N, 1 + D)
        lse = parts[..., :1]
        share = lse.softmax(0).masked_fill(lse.isneginf(), 0)
        return torch.cat([lse.logsumexp(0), (share * parts[..., 1:]).sum(0)], 1)

    both = exchange_parts(torch.cat([lse.unsqueeze(1), out], 1), shards, merge)
    return both[:, 0], both[:, 1:]


def queue_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    q_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group=None,
    queue_sharded: bool = False,
) -> Tensor:
    """InfoNCE of one positive against a queue: -log e^s_i / (e^s_i + sum_j e^<q_i, queue_j>/tau).

    s_i = <q_i, k_i> / tau.

    Args:
        q: (N, D) queries; float32, bfloat16, float16 (float64: materialising reference).
        k: (N, D) the positive key of each query; it may take a gradient.
        queue: (M, D) negatives, which take none.
        temperature, logit_scale: exactly one; logit_scale = 1 / temperature. A number or a
            one-element tensor, which may be learnable.
        q_ids, queue_ids: (N,), (M,) integers of 32 bits (checked on the CPU only); a queue row of
            the query's id is no negative.
        bias: (M,) added to the logit of that queue row; no gradient.
        sample_weight: (N,) factor of each loss.
        normalize: L2-normalise q and k first, in float32; the queue is taken as it is.
        reduction: "mean" (of the N weighted losses), "sum" or "none" for (N,).
        group: as in `info_nce`: whose ranks' rows the loss is the mean of.
        queue_sharded: `queue` (with its ids and bias) is this rank's part of the negatives, and
            all parts together count; else every rank holds all of them, and nothing is exchanged
            but the sum of losses.

    Returns:
        A float32 scalar, or (N,). Over several ranks the scalar is that of the rows of all ranks,
        equal on each.

    Raises:
        TypeError, ValueError: integer features, differing widths or devices, empty batch, wrong
            shapes, non-positive temperature; a queue, bias or weight that requires a gradient.

    Memory: O((N + M) D); the logits are never stored. 2 products of N x M x D in all. With
        `queue_sharded` N counts the rows of all ranks, whose N (D + 1) fp32 results are exchanged.

    Notes: sums accumulate in float32; the gradient made in the forward is kept in float32, so a
        loss scale reaches it before it is rounded. Deterministic. The queue is read in the
        forward only, so it may be overwritten before the backward. Gradients over several ranks as
        in `info_nce`.

    Example:
        >>> q, k, queue = torch.randn(4, 16), torch.randn(4, 16), torch.randn(64, 16)
        >>> queue_nce(q, k, queue, temperature=0.2, normalize=True).shape
        torch.Size([])

    Paper: MoCo, arXiv:1911.05722; NNCLR, arXiv:2104.14548.
    """
    name = "queue_nce"
    levels = resolve_levels(name, group)
    parts = bool(levels) and queue_sharded
    check_features(name, empty=parts or (bool(levels) and len(queue) > 0), q=q, k=k, queue=queue)
    if q.dim() != 2 or q.shape != k.shape:
        raise ValueError(
            f"{name}: q and k must both be (N, D), got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    for label, x in (("queue", queue), ("bias", bias), ("sample_weight", sample_weight)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {label} must not require a gradient: it is frozen here. "
                "Use info_nce if it is to learn, or .detach()."
            )
    if (q_ids is None) != (queue_ids is None):
        raise ValueError(f"{name}: q_ids and queue_ids go together, got only one of them.")
    check_reduction(name, reduction)
    scale = scale_of(name, temperature, logit_scale, q)
    if normalize:
        q, k = unit_rows(q), unit_rows(k)
    if k is q:  # as two tensors, for the autograd Function
        k = q.view_as(q)
    dtype = common_dtype(q, k, queue)
    problem, _ = prepare(
        name, flat(q, dtype), flat(queue, dtype), scale, q_ids, queue_ids, False, bias,
        k_ids_name="queue_ids",
    )  # fmt: skip
    weight = float_vector(name, "sample_weight", sample_weight, q.shape[:1], scale)
    q, queue, scale, *vectors = problem
    shards, _ = shards_of(
        name, group, "gather", q, queue, scale,
        **{"the reduction": reduction, "queue_sharded": queue_sharded, "ids": q_ids is not None},
        **{"temperature and logit_scale": number_or_tensor(temperature, logit_scale)},
    )  # fmt: skip
    sharded = queue_sharded and shards is not None
    return QueueNCE.apply(
        q, flat(k, dtype), scale, weight, reduction, shards, sharded, queue, *vectors
    )
