"""Sigmoid loss of all pairs, and its gradient in the same pass.

With x_ij = scale <q_i, k_j> + bias and y_ij = 1 for the positive, -1 else,
loss_i = sum_j log(1 + e^(-y_ij x_ij)). No normaliser, so dloss/dx_ij = sigmoid(x_ij) - [y_ij = 1]
is known from the pair alone: three products in all where two passes would take four.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastssl.autograd import once_differentiable, with_gradient
from fastssl.dist import Shards, check_exchange, gather_rows, resolve_levels
from fastssl.ops import contrastive
from fastssl.ops.checks import (
    check_features,
    check_reduction,
    check_target,
    common_dtype,
    flat,
    float_vector,
    int_vector,
    number_or_tensor,
    reduced,
    scale_of,
    scale_tensor,
    slope_of_row,
    unit_rows,
)
from fastssl.ops.contrastive import lib, without_autocast
from fastssl.ops.sharded import each_block, shards_of

# On the CPU all N x M logits up to here are made at once in few calls, without ids, targets
# and weights: 0.90 to 1.08 of open_clip's speed from 8 x 8 to 128 x 128, where tiles reach 0.90.
SMALL = 1 << 14


@without_autocast
def siglip_fwd_ref(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    q_ids: Tensor | None,  # (N,) int32
    k_ids: Tensor | None,  # (M,) int32
    target: Tensor,  # (N,) int32; outside [0, M): no positive
    weight: Tensor,  # (N,)
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), and of sum_i weight_i loss_i: dq (N, D), dk (M, D), dscale (), dbias ().

    Pairs of equal ids count nothing, but the target's pair always counts. dscale and dbias are
    given where dq or dk is.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_ = q.to(dtype), k.to(dtype)
    products = q_ @ k_.T
    x = scale.to(dtype) * products + bias.to(dtype)  # (N, M)
    positive = target[:, None] == torch.arange(len(k), device=q.device)
    counts = torch.ones_like(positive)
    if q_ids is not None:
        counts = (q_ids[:, None] != k_ids[None]) | positive
    losses = softplus(torch.where(positive, -x, x)).masked_fill(~counts, 0)
    g = (weight.to(dtype)[:, None] * (x.sigmoid() - positive.to(dtype))).masked_fill(~counts, 0)
    need = need_dq or need_dk
    return (
        losses.sum(1),
        scale * (g @ k_) if need_dq else g.new_empty(0, q.shape[1]),
        scale * (g.T @ q_) if need_dk else g.new_empty(0, q.shape[1]),
        (g * products).sum() if need else g.new_zeros(()),
        g.sum() if need else g.new_zeros(()),
    )


lib.define(
    "siglip_fwd(Tensor q, Tensor k, Tensor scale, Tensor bias, Tensor? q_ids, Tensor? k_ids,"
    " Tensor target, Tensor weight, bool need_dq, bool need_dk)"
    " -> (Tensor loss, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)"
)
lib.impl("siglip_fwd", siglip_fwd_ref, "CompositeExplicitAutograd")


def _fake(q, k, scale, bias, q_ids, k_ids, target, weight, need_dq, need_dk):
    torch._check(q.dim() == 2 and k.dim() == 2, lambda: "siglip_fwd: q and k must be 2-D")
    D = q.shape[1]
    return (
        scale.new_empty(q.shape[0]),
        scale.new_empty(q.shape[0] if need_dq else 0, D),
        scale.new_empty(k.shape[0] if need_dk else 0, D),
        scale.new_empty(()),
        scale.new_empty(()),
    )


torch.library.register_fake("fastssl::siglip_fwd", _fake, lib=lib)
contrastive.on_cuda("siglip", "siglip_fwd", siglip_fwd_ref)


class SigLIP(torch.autograd.Function):
    """A reduced loss brings its gradient along, in fp32, and the backward multiplies it by one
    number, in place: a loss scale reaches it before it is rounded. Losses by row, and a second
    backward, run the pass again."""

    @staticmethod
    def forward(
        ctx, q, k, scale, bias, q_ids, k_ids, target, weight, reduction, needs, shards, key_shards
    ):
        need_q, need_k, need_scalars = needs
        by_row = reduction == "none"
        ctx.each, ctx.key_shards = slope_of_row(reduction, len(q), shards), key_shards
        total = scale.new_full((len(q),), ctx.each) if weight is None else weight * ctx.each
        loss, *grads = _forward(
            key_shards, q, k, scale, bias, q_ids, k_ids, target, total,
            not by_row and (need_q or (need_scalars and not need_k)), not by_row and need_k,
        )  # fmt: skip
        ctx.save_for_backward(q, k, scale, bias, q_ids, k_ids, target, weight)
        ctx.grads = None if by_row else grads
        if weight is not None:
            loss = loss * weight
        return reduced(loss, reduction, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        need_q, need_k, need_scale, need_bias = ctx.needs_input_grad[:4]
        *problem, weight = ctx.saved_tensors
        q = problem[0]
        if ctx.grads is not None:
            dq, dk, dscale, dbias = (grad.mul_(dloss) for grad in ctx.grads)
            ctx.grads = None
        else:
            total = torch.full_like(q[:, 0], ctx.each, dtype=dloss.dtype).mul_(dloss)
            total = total if weight is None else total * weight
            _, dq, dk, dscale, dbias = _forward(
                ctx.key_shards, *problem, total, need_q or not need_k, need_k
            )
        return (
            dq.to(q.dtype) if need_q else None,
            dk.to(q.dtype) if need_k else None,
            dscale if need_scale else None,
            dbias if need_bias else None,
            *[None] * 8,
        )


@without_autocast
def _siglip_small(q, k, scale, bias, each, needs):
    """Each of N losses times `each`, summed, and its gradients as needed, with key i row i's
    positive: by all logits, in few calls."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    products = torch.mm(q, k.T)  # (N, M)
    x = torch.addcmul(bias, products, scale)
    positive = x.diagonal()
    positive.neg_()
    loss = softplus(x, threshold=50.0).sum().mul_(each)  # beyond it x, also in fp64
    if not any(needs):
        return loss, *[None] * 4
    g = x.sigmoid_().mul_(each)  # becomes dloss / dlogits
    positive.neg_()
    dscale = (g * products).sum() if needs[2] else None
    dbias = g.sum() if needs[3] else None
    g.mul_(scale)
    dq = torch.mm(g, k) if needs[0] else None
    return loss, dq, torch.mm(g.T, q) if needs[1] else None, dscale, dbias


def _forward(
    key_shards: Shards | None, q, k, scale, bias, q_ids, k_ids, target, weight, need_dq, need_dk
) -> tuple[Tensor, ...]:
    """The op; with `key_shards` over the keys of all ranks, whose gradients go to their owners."""
    fwd = siglip_fwd_ref if q.dtype == torch.float64 else torch.ops.fastssl.siglip_fwd
    if key_shards is None:
        return fwd(q, k, scale, bias, q_ids, k_ids, target, weight, need_dq, need_dk)
    all_ids = None if k_ids is None else gather_rows(k_ids, key_shards)
    loss, dq = scale.new_zeros(len(q)), scale.new_zeros(len(q) if need_dq else 0, q.shape[1])
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(scale)
    none = torch.full_like(target, -1)
    target = torch.where(target < len(k), target, none)

    def compute(step, first, block, piece):
        own = none if step else torch.where(target < 0, none, target + (key_shards.first - first))
        ids = None if all_ids is None else all_ids[first : first + len(block)]
        part, part_dq, part_dk, part_dscale, part_dbias = fwd(
            q, block, scale, bias, q_ids, ids, own, weight, need_dq, need_dk
        )
        for total, x in ((loss, part), (dq, part_dq), (dscale, part_dscale), (dbias, part_dbias)):
            total += x
        return part_dk if need_dk else None

    dk = each_block(k, None, key_shards, False, len(q), compute, scale.dtype if need_dk else None)
    return loss, dq, scale.new_zeros(0, q.shape[1]) if dk is None else dk, dscale, dbias


def siglip(
    q: Tensor,
    k: Tensor,
    *,
    logit_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group=None,
    exchange: str = "auto",
) -> Tensor:
    """Sigmoid loss: loss_i = sum_j log(1 + e^(-y_ij x_ij)), x_ij = scale <q_i, k_j> + bias.

    Args:
        q: (N, D), k: (M, D) float32, bfloat16, float16 (float64: materialising reference).
        logit_scale, temperature: exactly one; logit_scale = 1 / temperature. A number or a
            one-element tensor, which may be learnable.
        logit_bias: number or one-element tensor (learnable); None is 0.
        target: (N,) integers, the positive key of each row, -1 for a row that has none; default:
            row i's is key i, and rows from M on have none.
        q_ids, k_ids: (N,), (M,) integers; pairs of equal ids are no negatives of each other. A
            row's own positive always counts.
        sample_weight: (N,) factor of each row's loss.
        normalize: L2-normalise the rows of q and k first, in float32.
        reduction: "mean" over the N rows (the paper's and open_clip's), "sum" or "none" for (N,).
        group, exchange: as in `info_nce`: every rank's keys are negatives of every rank's rows; a
            row's positive is among its own rank's keys, and target counts within those.

    Returns:
        A float32 scalar, or (N,). Over several ranks the scalar is that of the rows of all ranks,
        equal on each.

    Raises:
        TypeError, ValueError: integer features, differing widths, empty batch, wrong shapes,
            non-positive scale; on all ranks, what differs between them and must not.

    Memory: O((N + M) D), M counting the keys of all ranks if they are gathered and those of this
        rank round a ring; the logits are never stored. 3 products of N x M x D in all; with
        reduction="none" 4, since the gradient then waits for the upstream one.

    Notes: sums accumulate in float32, and the gradient made in the forward is kept in float32 so
        that a loss scale reaches it before it is rounded. Deterministic. Gradients over several
        ranks as in `info_nce`.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> siglip(image, text, logit_scale=10.0, logit_bias=-10.0, normalize=True).shape
        torch.Size([])

    Paper: SigLIP, arXiv:2303.15343.
    """
    name = "siglip"
    check_features(name, empty=bool(resolve_levels(name, group)), q=q, k=k)
    if q.dim() != 2:
        raise ValueError(f"{name}: q must be (N, D), got {tuple(q.shape)}.")
    check_reduction(name, reduction)
    scale = scale_of(name, temperature, logit_scale, q)
    bias = scale_tensor(name, "logit_bias", 0.0 if logit_bias is None else logit_bias, q)
    if normalize:
        q, k = unit_rows(q), unit_rows(k)
    if k is q:
        k = q.view_as(q)
    dtype, (N, M) = common_dtype(q, k), (q.shape[0], k.shape[0])
    plain = all(x is None for x in (target, q_ids, k_ids, sample_weight)) and reduction != "none"
    if plain and q.device.type == "cpu" and N * M <= SMALL and not resolve_levels(name, group):
        check_exchange(name, exchange)
        inputs = q.to(dtype), k.to(dtype), scale, bias
        return with_gradient(name, _siglip_small, inputs, slope_of_row(reduction, N))
    if target is None:
        target = torch.arange(N, device=q.device, dtype=torch.int32)
    else:
        target = int_vector(name, "target", target, (N,), q.device)
        check_target(name, target.clamp(min=0), max(M, 1))
    if isinstance(sample_weight, Tensor) and sample_weight.requires_grad:
        raise ValueError(f"{name}: sample_weight takes no gradient here. Use .detach().")
    if k_ids is None and N == M:
        k_ids = q_ids
    if (q_ids is None) != (k_ids is None):
        raise ValueError(f"{name}: q_ids and k_ids go together, got only one of them.")
    q_ids = int_vector(name, "q_ids", q_ids, (N,), q.device)
    k_ids = int_vector(name, "k_ids", k_ids, (M,), q.device)
    if k_ids is q_ids and q_ids is not None:
        k_ids = q_ids.clone()
    weight = float_vector(name, "sample_weight", sample_weight, (N,), scale)
    grad = torch.is_grad_enabled()
    needs = tuple(
        grad and (x.requires_grad if isinstance(x, Tensor) else any(t.requires_grad for t in x))
        for x in (q, k, (scale, bias))
    )
    q, k = flat(q, dtype), flat(k, dtype)
    shards, key_shards = shards_of(
        name, group, exchange, q, k, scale, bias,
        **{"the reduction": reduction, "ids": q_ids is not None},
        **{"the scale and bias": number_or_tensor(temperature, logit_scale, logit_bias)},
    )  # fmt: skip
    return SigLIP.apply(
        q, k, scale, bias, q_ids, k_ids, target, weight, reduction, needs, shards, key_shards
    )
