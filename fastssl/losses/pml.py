"""pytorch-metric-learning's contrastive losses: their arguments, names, defaults and values.

With cosine similarity and the default reducers. Labels alone never build a matrix of all pairs;
indices from a miner, which has built one, are looked up in it. Over several ranks the rows of all
of them are one batch, without the library's DistributedLossWrapper: by labels only.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from fastssl.dist import (
    LOCAL,
    Level,
    Shards,
    agree,
    all_sum,
    gather_rows,
    resolve_levels,
    scatter_sums,
)
from fastssl.losses.ranks import check_group, described, global_mean, sample_ids
from fastssl.ops import contrastive_lse, info_nce, sup_con
from fastssl.ops.checks import check_features, int_vector, unit_rows
from fastssl.ops.sharded import shards_of

Indices = tuple[Tensor, ...]  # (anchors, positives, negatives) or (a1, positives, a2, negatives)


def _as_pairs(indices_tuple: Indices) -> Indices:
    """(a1, p, a2, n): anchors and positives, anchors and negatives."""
    if len(indices_tuple) == 3:
        a, p, n = indices_tuple
        return a, p, a, n
    if len(indices_tuple) != 4:
        raise ValueError(
            f"indices_tuple must hold 3 tensors (triplets) or 4 (pairs), got {len(indices_tuple)}."
        )
    return indices_tuple


def _as_triplets(indices_tuple: Indices) -> Indices:
    """(a, p, n): every positive of an anchor with every negative."""
    if len(indices_tuple) == 3:
        return indices_tuple
    a1, p, a2, n = _as_pairs(indices_tuple)
    i, j = (a1.unsqueeze(1) == a2).nonzero().unbind(1)
    return a1[i], p[i], n[j]


def _zero(embeddings: Tensor) -> Tensor:
    """With a graph, as the library's."""
    return (embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)) * 0).sum()


def _check_indices(name: str, levels: tuple[Level, ...]) -> None:
    if levels:
        raise ValueError(
            f"{name}: indices and miners are for the pairs of one process, got several ranks. "
            "Give labels alone, or a loss with group=fastssl.LOCAL."
        )


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks; a row's gradient is the sum of what all of them give it."""

    @staticmethod
    def forward(ctx, x, shards):
        ctx.shards = shards
        return gather_rows(x, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        wide = d.to(torch.promote_types(d.dtype, torch.float32))
        return scatter_sums(wide, ctx.shards).to(d.dtype), None


class _PairLoss(nn.Module):
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
            _check_indices(name, levels)
            pairs = _as_pairs(indices_tuple)
            if all(len(x) <= 1 for x in pairs):  # the library's rule
                return _zero(embeddings)
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
                return _zero(embeddings)
        sums = self.by_labels(embeddings, labels, ref_emb, ref_labels, own_key, key_shards)
        return global_mean(*sums, levels)


class NTXentLoss(_PairLoss):
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
            k = _GatherRows.apply(k, key_shards)
            ref_labels = gather_rows(ref_labels, key_shards)
            own_key = None if own_key is None else own_key + key_shards.first
        if not len(q):  # but all ranks reduce the gradients of the keys
            return _zero(q) + _zero(k), torch.zeros((), device=q.device)
        scale = 1 / self.temperature
        lse, _, _ = contrastive_lse(q, k, scale, q_ids=labels, k_ids=ref_labels)  # (N,) negatives
        if k is None:
            k, ref_labels, own_key = q, labels, torch.arange(len(q), device=q.device)
        wide = lse.dtype
        total, pairs = _zero(embeddings), torch.zeros((), device=q.device)
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
            return _zero(logits)
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


class SupConLoss(_PairLoss):
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
            rows = _zero(embeddings).expand(0)
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


def _wrapped(name: str, loss: nn.Module, group, exchange: str | None) -> nn.Module:
    """loss, with the group and exchange of its wrapper if that has been given any."""
    if not isinstance(loss, _PairLoss):
        raise TypeError(
            f"{name}: loss must be a fastssl.losses.pml NTXentLoss or SupConLoss, "
            f"got {type(loss).__module__}.{type(loss).__name__}."
        )
    if group is not None or exchange is not None:
        loss = copy.copy(loss)
        loss.group = loss.group if group is None else group
        loss.exchange = loss.exchange if exchange is None else exchange
        check_group(name, loss.group, loss.exchange)
    return loss


class SelfSupervisedLoss(nn.Module):
    """Row i of one view and row i of the other are positives of each other; all others negatives.

    Drop-in for pytorch-metric-learning's SelfSupervisedLoss.

    Args:
        loss: an `NTXentLoss` or `SupConLoss` of this module.
        symmetric: contrast the rows of both views with each other; else embeddings with ref_emb.
        group, exchange: in place of those of the loss. Ours.

    Shapes: embeddings and ref_emb (N, D). Returns a float32 scalar.

    Raises:
        TypeError, ValueError: another loss, views of different shape.

    Memory: O(N D).

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> SelfSupervisedLoss(NTXentLoss(0.1))(z0, z1).shape
        torch.Size([])

    Paper: SimCLR, arXiv:2002.05709.
    """

    def __init__(
        self, loss: nn.Module, symmetric: bool = True, *, group=None, exchange: str | None = None
    ):
        super().__init__()
        self.loss = _wrapped("SelfSupervisedLoss", loss, group, exchange)
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        if embeddings.shape != ref_emb.shape:
            raise ValueError(
                "SelfSupervisedLoss: both views must have one shape, got "
                f"{tuple(embeddings.shape)} and {tuple(ref_emb.shape)}."
            )
        N, loss = len(embeddings), self.loss
        q, k, target = embeddings, ref_emb, None
        if self.symmetric:
            q, k, target = torch.cat([q, k]), None, torch.arange(2 * N, device=q.device).roll(N)
        if isinstance(loss, NTXentLoss):  # one positive a row, known beforehand
            return info_nce(
                q, k, target=target, temperature=loss.temperature, normalize=True,
                group=loss.group, exchange=loss.exchange,
            )  # fmt: skip
        labels = sample_ids(N, resolve_levels("SelfSupervisedLoss", loss.group), q.device)
        if k is None:
            return loss(q, labels.repeat(2))
        return loss(q, labels, ref_emb=k, ref_labels=labels.clone())


class CrossBatchMemory(nn.Module):
    """Contrast with the rows of past batches; drop-in for the library's CrossBatchMemory.

    Args:
        loss: an `NTXentLoss` or `SupConLoss` of this module.
        embedding_size: D.
        memory_size: rows remembered.
        miner: called with (embeddings, labels, memory, its labels) for an indices_tuple.
        group, exchange: in place of those of the loss. Ours.

    Shapes: embeddings (N, D) with N at most memory_size, labels (N,) integers. The batch is stored
        first; then its rows are contrasted with the memory, except each with itself. indices_tuple
        adds pairs or triplets of rows and slots. enqueue_mask (N,) bool: the marked rows are
        stored, and the others contrasted. Returns a float32 scalar.

    Raises:
        TypeError, ValueError: another loss, a batch larger than the memory, wrong shapes, indices
            or a miner and several ranks.

    Memory: memory_size x D, and its normalised copy; with a miner or indices the N x memory_size
        similarities.

    Notes: the filling is saved with the state dict. The library takes a batch of one row for its
        own positive and counts an empty one as a full memory; here neither happens. Over several
        ranks the memory takes the rows of all, in rank order, and is equal on all.

    Example:
        >>> loss = CrossBatchMemory(SupConLoss(), embedding_size=16, memory_size=64)
        >>> loss(torch.randn(8, 16), torch.arange(8) // 4).shape
        torch.Size([])

    Paper: cross-batch memory, arXiv:1912.06798.
    """

    embedding_memory: Tensor  # (memory_size, D)
    label_memory: Tensor  # (memory_size,)

    def __init__(
        self,
        loss: nn.Module,
        embedding_size: int,
        memory_size: int = 1024,
        miner=None,
        *,
        group=None,
        exchange: str | None = None,
    ):
        super().__init__()
        self.loss = _wrapped("CrossBatchMemory", loss, group, exchange)
        self.miner = miner
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.long))
        self.has_been_filled = False
        self.queue_idx = 0

    def get_extra_state(self) -> dict:
        return {"has_been_filled": self.has_been_filled, "queue_idx": self.queue_idx}

    def set_extra_state(self, state: dict) -> None:
        self.has_been_filled, self.queue_idx = state["has_been_filled"], state["queue_idx"]

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        name = "CrossBatchMemory"
        levels = resolve_levels(name, self.loss.group)
        if indices_tuple is not None or self.miner is not None:
            _check_indices(name, levels)
        check_features(name, empty=bool(levels), embeddings=embeddings)
        N = len(embeddings)
        if embeddings.shape[1:] != (self.embedding_size,):
            raise ValueError(
                f"{name}: embeddings must be (N, {self.embedding_size}), "
                f"got {tuple(embeddings.shape)}."
            )
        labels = int_vector(name, "labels", labels, (N,), embeddings.device)
        stored = embeddings.detach(), labels
        if enqueue_mask is not None:
            if indices_tuple is not None:
                raise ValueError(f"{name}: give indices_tuple or enqueue_mask, got both.")
            if enqueue_mask.dtype != torch.bool or enqueue_mask.shape != (N,):
                raise ValueError(
                    f"{name}: enqueue_mask must be ({N},) of torch.bool, "
                    f"got {tuple(enqueue_mask.shape)} of {enqueue_mask.dtype}."
                )
            stored = embeddings.detach()[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        own_slots, queries = slice(None), len(embeddings)
        if levels:
            same = {"the width D": embeddings.shape[1], "the dtype": embeddings.dtype}
            rows = len(embeddings), len(stored[0])
            sizes, stored_sizes = agree(name, levels, rows, embeddings, **same)
            shards, queries = Shards(levels, stored_sizes), sum(sizes)
            own_slots = slice(shards.first, shards.first + len(stored[0]))
            stored = [gather_rows(x, shards) for x in stored]
        if len(stored[0]) > self.memory_size:
            raise ValueError(
                f"{name}: a batch must fit into memory_size={self.memory_size}, "
                f"got {len(stored[0])} rows."
            )
        slots = self._store(*stored)[own_slots]
        rows = self.memory_size if self.has_been_filled else self.queue_idx
        memory, memory_labels = self.embedding_memory[:rows], self.label_memory[:rows]
        if queries * rows <= 2:  # no pairs, or the library's rule as above
            return _zero(embeddings)
        own_key = slots if enqueue_mask is None else None
        if self.miner is None and indices_tuple is None:
            memory_labels = memory_labels.to(torch.int32)
            sums = self.loss.by_labels(embeddings, labels, memory, memory_labels, own_key, None)
            return global_mean(*sums, levels)
        if self.miner is None:
            same = labels.unsqueeze(1) == memory_labels
            indices = (*same.nonzero().unbind(1), *(~same).nonzero().unbind(1))
        else:
            indices = self.miner(embeddings, labels.long(), memory, memory_labels)
        if own_key is not None:
            other = own_key[indices[0]] != indices[1]
            positives = 3 if len(indices) == 3 else 2
            indices = (*(x[other] for x in indices[:positives]), *indices[positives:])
        if indices_tuple is not None:
            given = (_as_triplets if len(indices) == 3 else _as_pairs)(indices_tuple)
            indices = tuple(torch.cat([x, y.to(x)]) for x, y in zip(indices, given, strict=True))
        return self.loss(embeddings, indices_tuple=indices, ref_emb=memory)

    @torch.no_grad()
    def _store(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The slots the rows went to."""
        self.embedding_memory = self.embedding_memory.to(embeddings)
        self.label_memory = self.label_memory.to(labels.device)
        end = self.queue_idx + len(embeddings)
        slots = torch.arange(self.queue_idx, end, device=labels.device) % self.memory_size
        self.embedding_memory[slots] = embeddings
        self.label_memory[slots] = labels.long()
        self.has_been_filled |= end >= self.memory_size
        self.queue_idx = end % self.memory_size
        return slots
