"""Supervised contrast: rows of one label attract, on the op `contrastive` and sums over labels.

The mean logit over positives is linear in them, scale <q_i, sum_p k_p> / |P(i)|, and all rows of
one label share the sum: only the normaliser looks at every pair.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastssl.dist import resolve_levels
from fastssl.ops.checks import (
    Problem,
    check_features,
    check_reduction,
    check_target,
    common_dtype,
    float_vector,
    int_vector,
    number_or_tensor,
    reduced,
    scale_of,
    softplus,
    unit_rows,
)
from fastssl.ops.contrastive import Contrastive
from fastssl.ops.sharded import Sharded, shards_of


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
    group=None,
    exchange: str = "auto",
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
        group, exchange: as in `info_nce`: rows of all ranks are keys of each other, and equal
            labels attract wherever they are; own_key counts within the rank's own keys.

    Returns:
        A float32 scalar, or (N,). Over several ranks the scalar is that of the rows of all ranks,
        equal on each. A row without a positive has loss 0 and no gradient, and counts
        in the mean.

    Raises:
        TypeError, ValueError: integer features, float labels, differing widths, empty batch, wrong
            shapes, non-positive temperature; on all ranks, what differs between them and must not.

    Memory: O((N + M) D); neither the logits nor a mask of pairs is stored. The positives cost
        O((N + M) D) operations with "out", a second pass over all pairs otherwise.

    Notes: sums accumulate in float32. Deterministic. Gradients over several ranks as in `info_nce`.

    Example:
        >>> z, labels = torch.randn(8, 16), torch.arange(8) // 4
        >>> sup_con(z, labels=labels, temperature=0.1, normalize=True).shape
        torch.Size([])

    Paper: supervised contrastive learning, arXiv:2004.11362.
    """
    name = "sup_con"
    check_features(name, empty=bool(resolve_levels(name, group)), q=q, k=k)
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

    given = {"k": k is not None, "own_key": own_key is not None}
    shards, key_shards = shards_of(
        name, group, exchange, q, k, scale,
        **{"the reduction": reduction, "positives": positives, "what is given": given},
        **{"temperature and logit_scale": number_or_tensor(temperature, logit_scale)},
    )  # fmt: skip
    first = 0 if shards is None else shards.first
    q_ids = k_ids = target = None
    if own_key is not None:
        own_key = int_vector(name, "own_key", own_key, q.shape[:1], q.device)
        target = own_key.clamp(min=0)
        check_target(name, target, max(len(k), 1))
        q_ids = torch.arange(first, first + len(q), device=q.device, dtype=torch.int32)
        slot = torch.where(own_key < 0, len(k), own_key).long()  # one more, for rows without a key
        k_ids = q_ids.new_full((len(k) + 1,), -1).scatter(0, slot, q_ids)[:-1]

    def sums(problem, target, alike, *by_label):
        if shards is None:
            return Contrastive.apply(*problem, target, True, False, 1, False, alike, *by_label)
        return Sharded.apply(*problem, target, False, alike, *by_label, key_shards)

    problem = Problem(q, k, scale, q_ids, k_ids, False, None, None)
    if positives == "out":
        lse, _, own, positive, _, count = sums(problem, target, True, labels, k_labels)
        if own_key is not None:
            of_keys = pad(labels if k_labels is None else k_labels, (0, 1))  # a rank may have none
            among = (own_key >= 0) & (of_keys.index_select(0, target) == labels)
            positive, count = positive - torch.where(among, own, 0), count - among.to(count.dtype)
        loss = lse - positive / count.clamp(min=1)
    else:
        # log sum_j = log sum_p + softplus(log sum_n - log sum_p) with n the rows of other labels:
        # near convergence the sum over all and that over the positives would cancel.
        # Clones: one tensor in two roles would break the graph under torch.compile.
        ids = labels.clone(), None if k_labels is None else k_labels.clone()
        problem = problem._replace(q_ids=ids[0], k_ids=ids[1])
        negative = sums(problem, None, False, None, None)[0]
        problem = problem._replace(keep_equal=True)
        positive, *_, count = sums(problem, None, False, labels, k_labels)
        loss = softplus(negative - torch.where(count > 0, positive, 0))
        if positives == "in":
            loss = loss + count.clamp(min=1).log()
    loss = torch.where(count > 0, loss, 0)
    if weight is not None:
        loss = loss * weight
    return reduced(loss, reduction, shards)
