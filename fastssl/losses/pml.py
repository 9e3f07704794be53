"""pytorch-metric-learning's contrastive losses: their arguments, names, defaults and values.

With cosine similarity and the default reducers. Labels alone never build a matrix of all pairs;
indices from a miner, which has built one, are looked up in it. Over several ranks the rows of all
of them are one batch, without the library's DistributedLossWrapper: by labels only.
"""

import copy

import torch
from torch import Tensor, nn

from fastssl.dist import Shards, agree, gather_rows, resolve_levels
from fastssl.losses.pairs import (
    Indices,
    NTXentLoss,
    PairLoss,
    SupConLoss,
    as_pairs,
    as_triplets,
    check_indices,
    zero_of,
)
from fastssl.losses.ranks import check_group, global_mean, sample_ids
from fastssl.ops import info_nce
from fastssl.ops.checks import check_features, int_vector

__all__ = ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]


def _wrapped(name: str, loss: nn.Module, group, exchange: str | None) -> nn.Module:
    """loss, with the group and exchange of its wrapper if that has been given any."""
    if not isinstance(loss, PairLoss):
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
            check_indices(name, levels)
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
            return zero_of(embeddings)
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
            given = (as_triplets if len(indices) == 3 else as_pairs)(indices_tuple)
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
