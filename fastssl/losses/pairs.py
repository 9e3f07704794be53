"""pytorch-metric-learning's losses of pairs of rows, which `pml` gathers with those around them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastssl.dist import LOCAL, Level, all_sum, gather_rows, resolve_levels
from fastssl.losses.ranks import GatherRows, check_group, described, global_mean
from fastssl.ops import contrastive_lse, sup_con
from fastssl.ops.checks import check_features, int_vector, unit_rows
from fastssl.ops.sharded import shards_of

Indices = tuple[Tensor, ...]  # (anchors, positives, negatives) or (a1, positives, a2, negatives)


def as_pairs(indices_tuple: Indices) -> Indices:
    """(a1, p, a2, n): anchors and positives, anchors and negatives."""
    if len(indices_tuple) == 3:
        a, p, n = indices_tuple
        return a, p, a, n
    if len(indices_tuple) != 4:
        raise ValueError(
            f"indices_tuple must hold 3 tensors (triplets) or 4 (pairs), got {len(indices_tuple)}."
        )
    return indices_tuple


def as_triplets(indices_tuple: Indices) -> Indices:
    """(a, p, n): every positive of an anchor with every negative."""
    if len(indices_tuple) == 3:
        return indices_tuple
    a1, p, a2, n = as_pairs(indices_tuple)
    i, j = (a1.unsqueeze(1) == a2).nonzero().unbind(1)
    return a1[i], p[i], n[j]


def zero_of(embeddings: Tensor) -> Tensor:
    """With a graph, as the library's."""
    return (embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)) * 0).sum()


def check_indices(name: str, levels: tuple[Level, ...]) -> None:
    if levels:
        raise ValueError(
            f"{name}: indices and miners are for the pairs of one process, got several ranks. "
            "Give labels alone, or a loss with group=fastssl.LOCAL."
        )


class PairLoss(nn.Module):
    """What the losses share: arguments, checks, and the choice between labels and indices.

    Of each loss, `by_labels` gives this rank's sum and count of what the mean is over. Its keys are
    those of all ranks if `key_shards` is None, else this rank's.
    """

    def __init__(self, temperature: float, group, exchange: str, unsupported: dict):
        super().__init__()
        name = type(self).__name__
        if not temperature > 0:
            raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
        for argument, value in unsupported.items():
            if value is not None:
                raise TypeError(
                    f"{name}: {argument} is not supported: the similarity is the cosine and the "
                    "reducer the default one. Use pytorch-metric-learning's class for others."
                )
        check_group(name, group, exchange)
        self.temperature = temperature
        self.group = group
        self.exchange = exchange

    def extra_repr(self) -> str:
        return described(f"temperature={self.temperature}", self.group, self.exchange)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        name = type(self).__name__
        levels = resolve_levels(name, self.group)
        check_features(name, empty=bool(levels), embeddings=embeddings, ref_emb=ref_emb)
        N = len(embeddings)
        if indices_tuple is not None:
            check_indices(name, levels)
            pairs = as_pairs(indices_tuple)
            if all(len(x) <= 1 for x in pairs):  # the library's rule
                return zero_of(embeddings)
            q = unit_rows(embeddings)
            k = q if ref_emb is None else unit_rows(ref_emb)
            wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
            with torch.autocast(q.device.type, enabled=False):
                logits = q.to(wide) @ k.to(wide).T / self.temperature
            return self.by_indices(logits, *(x.to(q.device) for x in pairs))
        if labels is None:
            raise ValueError(f"{name}: give labels or indices_tuple, got neither.")
        own_key = None
        if ref_emb is not None:
            if ref_labels is None:
                raise ValueError(f"{name}: ref_labels is needed with ref_emb and no indices_tuple.")
            if ref_labels is labels:  # the library's sign that row i and key i are one
                own_key = torch.arange(N, device=embeddings.device)
        labels = int_vector(name, "labels", labels, (N,), embeddings.device)
        if ref_emb is not None:
            M = len(ref_emb)
            ref_labels = int_vector(name, "ref_labels", ref_labels, (M,), embeddings.device)
        shards, key_shards = shards_of(name, self.group, self.exchange, embeddings, ref_emb)
        if ref_emb is not None:
            pairs = N * M if shards is None else shards.total * key_shards.total
            if pairs <= 2:  # the library's rule: one pair of a kind is none
                return zero_of(embeddings)
        sums = self.by_labels(embeddings, labels, ref_emb, ref_labels, own_key, key_shards)
        return global_mean(*sums, levels)


class NTXentLoss(PairLoss):
    """NT-Xent of every positive pair; drop-in for pytorch-metric-learning's NTXentLoss.

    loss = mean over positive pairs (a, p) of -log e^l_ap / (e^l_ap + sum_n e^l_an),
    l_ij = <z_i, z_j> / tau of normalised rows, n the rows of other labels.

    Args:
        temperature: tau, positive.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.info_nce`. Ours.
        **kwargs: the library's distance, reducer, embedding_regularizer ...: None only.

    Shapes: embeddings (N, D), labels (N,) integers, ref_emb (M, D), ref_labels (M,); without
        ref_emb, embeddings against themselves. indices_tuple: a miner's triplets or pairs in place
        of all pairs. Returns a float32 scalar; 0, with a graph, where there are no positive or no
        negative pairs.

    Raises:
        TypeError, ValueError: unsupported arguments, non-positive temperature, neither labels nor
            indices, float labels, wrong shapes, indices and several ranks.

    Memory: O((N + M) D) and at most 4 numbers a positive pair, of all classes of a size together;
        with an indices_tuple the N x M similarities. Over several ranks M counts the keys of all,
        which are gathered whatever `exchange` says.

    Notes: labels are counted on the host, once a call. ref_labels that is the very tensor given as
        labels leaves out the pairs (i, i), as in the library.

    Example:
        >>> z, labels = torch.randn(8, 16), torch.arange(8) // 4
        >>> NTXentLoss()(z, labels).shape
        torch.Size([])

    Paper: SimCLR, arXiv:2002.05709.
    """

    def __init__(self, temperature: float = 0.07, *, group=None, exchange="auto", **kwargs):
        super().__init__(temperature, group, exchange, kwargs)

    def by_labels(self, embeddings, labels, ref_emb, ref_labels, own_key, key_shards):
        q = unit_rows(embeddings)
        k = None if ref_emb is None else unit_rows(ref_emb)
        if key_shards is not None:
            if k is None:
                k, ref_labels, own_key = q, labels, torch.arange(len(q), device=q.device)
            k = GatherRows.apply(k, key_shards)
            ref_labels = gather_rows(ref_labels, key_shards)
            own_key = None if own_key is None else own_key + key_shards.first
        if not len(q):  # but all ranks reduce the gradients of the keys
            return zero_of(q) + zero_of(k), torch.zeros((), device=q.device)
        scale = 1 / self.temperature
        lse, _, _ = contrastive_lse(q, k, scale, q_ids=labels, k_ids=ref_labels)  # (N,) negatives
        if k is None:
            k, ref_labels, own_key = q, labels, torch.arange(len(q), device=q.device)
        wide = lse.dtype
        total, pairs = zero_of(embeddings), torch.zeros((), device=q.device)
        for rows, is_row, keys, is_key in _label_blocks(labels, ref_labels):
            with torch.autocast(q.device.type, enabled=False):
                logits = scale * (q[rows].to(wide) @ k[keys].to(wide).mT)  # (C, n, m)
            positive = is_row.unsqueeze(2) & is_key.unsqueeze(1)
            if own_key is not None:
                positive &= keys.unsqueeze(1) != own_key[rows].unsqueeze(2)
            losses = softplus(lse[rows].unsqueeze(2) - logits)
            total = total + torch.where(positive, losses, 0).sum()
            pairs = pairs + positive.sum()
        return total, pairs

    def by_indices(self, logits, a1, p, a2, n) -> Tensor:
        if len(a1) == 0 or len(a2) == 0:
            return zero_of(logits)
        negative = logits[a2, n]
        # log-sum-exp by anchor, a pair counting as often as it is given
        most = torch.full_like(logits[:, 0], -torch.inf).scatter_reduce(
            0, a2, negative.detach(), "amax"
        )
        most = most.clamp(min=torch.finfo(most.dtype).min)  # anchors without a negative
        each = (negative - most[a2]).exp()
        lse = torch.zeros_like(most).index_add(0, a2, each).log() + most
        return softplus(lse[a1] - logits[a1, p]).mean()


def _label_blocks(labels: Tensor, k_labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows and keys of each label, (C, n) and (C, m) with masks, labels of a size together.

    Sizes are rounded up to powers of 2, so blocks hold at most 4 times the pairs of equal labels.
    """
    N, M = len(labels), len(k_labels)
    values, number = torch.unique(torch.cat([labels, k_labels]), return_inverse=True)
    sides = []
    for of in number.split([N, M]):
        count = torch.bincount(of, minlength=len(values))
        sides.append((of.argsort(stable=True), count.cumsum(0) - count, count))
    exponents = torch.stack([count for *_, count in sides]).double().log2().ceil()  # -inf: none
    for exponent in exponents[:, exponents.isfinite().all(0)].unique(dim=1).T:
        members = (exponents == exponent.unsqueeze(1)).all(0).nonzero()  # (C, 1)
        block = []
        for (order, first, count), width in zip(sides, exponent.exp2().tolist(), strict=True):
            offset = torch.arange(int(width), device=order.device)
            inside = offset < count[members]
            block += [order[torch.where(inside, first[members] + offset, 0)], inside]
        yield tuple(block)


class SupConLoss(PairLoss):
    """Supervised contrastive loss; drop-in for pytorch-metric-learning's SupConLoss.

    loss_i = log sum_{j != i} e^l_ij - mean over positives p of l_ip, l_ij = <z_i, z_j> / tau of
    normalised rows; the mean over rows of loss_i > 0, which are those that have a positive.

    Args:
        temperature: tau, positive.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.info_nce`. Ours.
        **kwargs: the library's distance, reducer, embedding_regularizer ...: None only.

    Shapes: embeddings (N, D), labels (N,) integers, ref_emb (M, D), ref_labels (M,); without
        ref_emb, embeddings against themselves. indices_tuple: a miner's triplets or pairs in place
        of all pairs. Returns a float32 scalar; 0, with a graph, where there are no positive or no
        negative pairs.

    Raises:
        TypeError, ValueError: unsupported arguments, non-positive temperature, neither labels nor
            indices, float labels, wrong shapes, a pair that is positive and negative, indices and
            several ranks.

    Memory: O((N + M) D); with an indices_tuple the N x M similarities.

    Notes: a loss_i too small for float32 counts in the mean, where the library, rounding it to 0,
        leaves it out. ref_labels that is the very tensor given as labels leaves out the pairs
        (i, i), as in the library.

    Example:
        >>> z, labels = torch.randn(8, 16), torch.arange(8) // 4
        >>> SupConLoss()(z, labels).shape
        torch.Size([])

    Paper: supervised contrastive learning, arXiv:2004.11362, L_out.
    """

    def __init__(self, temperature: float = 0.1, *, group=None, exchange="auto", **kwargs):
        super().__init__(temperature, group, exchange, kwargs)

    def by_labels(self, embeddings, labels, ref_emb, ref_labels, own_key, key_shards):
        group = LOCAL if key_shards is None else self.group
        if len(embeddings) or key_shards is not None:
            rows = sup_con(
                embeddings, ref_emb, labels=labels, k_labels=ref_labels, own_key=own_key,
                temperature=self.temperature, normalize=True, reduction="none", group=group,
                exchange=self.exchange,
            )  # fmt: skip
        else:
            rows = zero_of(embeddings).expand(0)
        own = 1 if ref_labels is None or own_key is not None else 0  # a key of the row's label
        every = labels if ref_labels is None else ref_labels
        ordered = (every if key_shards is None else gather_rows(every, key_shards)).sort().values
        first, end = (torch.searchsorted(ordered, labels, right=r) for r in (False, True))
        equal, keys = end - first, len(ordered)
        negatives = all_sum((equal < keys).sum(), resolve_levels("SupConLoss", self.group))
        counted = (equal > own) & (negatives > 0) & (keys - own > 1)
        return torch.where(counted, rows, 0).sum(), counted.sum()

    def by_indices(self, logits, a1, p, a2, n) -> Tensor:
        positive = torch.zeros_like(logits, dtype=torch.bool)
        negative = torch.zeros_like(positive)
        positive[a1, p] = True
        negative[a2, n] = True
        if (positive & negative).any():
            raise ValueError("SupConLoss: a pair of indices_tuple is both positive and negative.")
        kept, count = positive | negative, positive.sum(1)
        lse = logits.masked_fill(~kept, -torch.inf).logsumexp(1)
        mean = logits.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
        counted = (count > 0) & (kept.sum(1) > 1) & negative.any()
        return torch.where(counted, lse - mean, 0).sum() / counted.sum().clamp(min=1)
