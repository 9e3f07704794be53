"""Supervised contrast: rows of one label attract, on the op `contrastive` and sums over labels.

The mean logit over positives is linear in them, scale <q_i, sum_p k_p> / |P(i)|, and all rows of
one label share the sum: only the normaliser looks at every pair.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from fastssl.ops.checks import (
    check_features,
    check_reduction,
    check_target,
    common_dtype,
    float_vector,
    int_vector,
    reduced,
    scale_of,
    unit_rows,
)
from fastssl.ops.contrastive import contrastive_lse

# Pairs up to which one comparison of all labels takes less time than sorting them.
SMALL = 128 * 128


def _label_sums(
    x: Tensor, x_labels: Tensor, labels: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row i: the weighted sum of x's rows (M, D) of the label labels[i], and how many they are."""
    M = len(x)
    if len(labels) * M <= SMALL:
        same = labels.unsqueeze(1) == x_labels
        with torch.autocast(x.device.type, enabled=False):
            sums = same.to(x.dtype) @ (x if weight is None else weight.unsqueeze(1) * x)
        return sums, same.sum(1)
    ordered, order = x_labels.sort(stable=True)
    number = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # of the sorted row's label
    # As many sums as there can be labels, for how many there are only the device knows; the last
    # ones, M always, are empty. Each is added up in one order, without atomics.
    first = torch.searchsorted(number, torch.arange(M + 2, device=x.device))
    weight = None if weight is None else weight.index_select(0, order)
    sums = embedding_bag(
        order, x, first, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    at = torch.searchsorted(ordered, labels).clamp(max=M - 1)
    at = torch.where(ordered.index_select(0, at) == labels, number.index_select(0, at), M)
    return sums.index_select(0, at), first.diff().index_select(0, at)


class PositiveSums(torch.autograd.Function):
    """<q_i, sum of the keys of row i's label>, and how many they are; k=None as in `sup_con`.

    In both directions a sum over labels: dq_i = d_i sum_j k_j and dk_j = sum_i d_i q_i.
    """

    @staticmethod
    def forward(ctx, q, k, labels, k_labels):
        sums, count = _label_sums(
            q if k is None else k, labels if k_labels is None else k_labels, labels
        )
        if k is None:
            sums, count = sums.sub_(q), count - 1
        ctx.save_for_backward(q, sums, labels, k_labels)
        ctx.itself = k is None
        ctx.mark_non_differentiable(count)
        return (q * sums).sum(1), count

    @staticmethod
    @once_differentiable
    def backward(ctx, d, _):
        q, sums, labels, k_labels = ctx.saved_tensors
        dq, dk = d.unsqueeze(1) * sums, None
        if ctx.itself or ctx.needs_input_grad[1]:
            dk, _ = _label_sums(q, labels, labels if k_labels is None else k_labels, d)
        if ctx.itself:
            dq, dk = dk.addcmul_(d.unsqueeze(1), q, value=-1).add_(dq), None
        return dq, dk, None, None


def sup_con(
    q: Tensor,
    k: Tensor | None = None,
    *,
    labels: Tensor,
    k_labels: Tensor | None = None,
    own_key: Tensor | None = None,
    positives: str = "out",
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss over P(i), the keys of row i's label, l_ij = <q_i, k_j> / tau.

    "out": loss_i = log sum_j e^l_ij - mean_{p in P(i)} l_ip (the paper's L_out);
    "in":  loss_i = log sum_j e^l_ij - log mean_{p in P(i)} e^l_ip (its L_in);
    "sum": loss_i = log sum_j e^l_ij - log sum_{p in P(i)} e^l_ip.

    Args:
        q: (N, D) anchors, float32, bfloat16, float16 (float64: materialising reference).
        k: (M, D) keys, or None for q against itself: no row is its own key.
        labels: (N,) integers of 32 bits, any values; equal ones are positives of each other.
        k_labels: (M,) those of the keys; default: labels, where k has as many rows.
        own_key: (N,) the key that row i itself is, left out of its sums; negative: none. No key
            belongs to two rows. Needs k and positives="out".
        positives: "out", "in" or "sum".
        temperature, logit_scale: exactly one; logit_scale = 1 / temperature. A number or a
            one-element tensor, which may be learnable.
        sample_weight: (N,) factor of each row's loss.
        normalize: L2-normalise the rows first, in float32.
        reduction: "mean" of the N weighted losses, "sum" or "none" for (N,).

    Returns:
        A float32 scalar, or (N,). A row without a positive has loss 0 and no gradient, and counts
        in the mean.

    Raises:
        TypeError, ValueError: integer features, float labels, differing widths, empty batch, wrong
            shapes, non-positive temperature.

    Memory: O((N + M) D); neither the logits nor a mask of pairs is stored. The positives cost
        O((N + M) D) operations with "out", a second pass over all pairs otherwise.

    Notes: sums accumulate in float32. Deterministic; no host sync. One process: nothing is
        gathered. In 16-bit dtypes the gradients of the log-sum-exp and of the positives are rounded
        one by one: near convergence, where they cancel, give float32 features.

    Example:
        >>> z, labels = torch.randn(8, 16), torch.arange(8) // 4
        >>> sup_con(z, labels=labels, temperature=0.1, normalize=True).shape
        torch.Size([])

    Paper: supervised contrastive learning, arXiv:2004.11362.
    """
    name = "sup_con"
    check_features(name, q=q, k=k)
    if q.dim() != 2:
        raise ValueError(f"{name}: q must be (N, D), got {tuple(q.shape)}.")
    check_reduction(name, reduction)
    if positives not in ("out", "in", "sum"):
        raise ValueError(f'{name}: positives must be "out", "in" or "sum", got {positives!r}.')
    if own_key is not None and (k is None or positives != "out"):
        raise ValueError(f'{name}: own_key needs k and positives="out".')
    scale = scale_of(name, temperature, logit_scale, q)
    if normalize:
        q, k = unit_rows(q), k if k is None else unit_rows(k)
    dtype = common_dtype(q, k)
    if k is q:  # one tensor in both roles: as two, for the autograd Function
        k = q.view_as(q)
    q, k = q.to(dtype), k if k is None else k.to(dtype)
    labels = int_vector(name, "labels", labels, q.shape[:1], q.device)
    if k is None:
        if k_labels is not None:
            raise ValueError(f"{name}: q against itself (k=None) takes no k_labels.")
    elif k_labels is not None:
        k_labels = int_vector(name, "k_labels", k_labels, k.shape[:1], q.device)
    elif len(k) != len(q):
        raise ValueError(
            f"{name}: k_labels is needed where k has not q's rows, got {len(q)} and {len(k)} rows."
        )
    weight = float_vector(name, "sample_weight", sample_weight, q.shape[:1], scale)

    q_ids = k_ids = target = None
    if own_key is not None:
        own_key = int_vector(name, "own_key", own_key, q.shape[:1], q.device).long()
        check_target(name, own_key.clamp(min=0), len(k))
        q_ids, target = torch.arange(len(q), device=q.device), own_key.clamp(min=0)
        slot = torch.where(own_key < 0, len(k), own_key)  # one more, for rows without a key
        k_ids = torch.full((len(k) + 1,), -1, device=q.device).scatter(0, slot, q_ids)[:-1]
    lse, _, own = contrastive_lse(q, k, scale, q_ids=q_ids, k_ids=k_ids, target=target)

    wide = scale.dtype
    positive, count = PositiveSums.apply(
        q.to(wide), None if k is None else k.to(wide), labels, k_labels
    )
    if positives == "out":
        positive = scale * positive
        if own_key is not None:
            own_label = (labels if k_labels is None else k_labels).index_select(0, target)
            among = (own_key >= 0) & (own_label == labels)
            positive, count = positive - torch.where(among, own, 0), count - among.long()
        positive = positive / count.clamp(min=1)
    else:
        positive, _, _ = contrastive_lse(q, k, scale, q_ids=labels, k_ids=k_labels, keep_equal=True)
        if positives == "in":
            positive = positive - count.clamp(min=1).log()
    loss = torch.where(count > 0, lse - positive, 0)
    if weight is not None:
        loss = loss * weight
    return reduced(loss, reduction)
