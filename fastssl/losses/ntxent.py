"""lightly's contrastive losses: their arguments, names, defaults and values."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastssl.dist import Shards, gather_rows, resolve_levels
from fastssl.losses.ranks import check_initialized, described, global_mean, group_of, sample_ids
from fastssl.ops import info_nce, queue_nce
from fastssl.ops.checks import unit_rows
from fastssl.queue import FeatureQueue


def _group(name: str, temperature: float, gather_distributed: bool | None, group, exchange: str):
    """The arguments checked, and the group that two of them name."""
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
    return group_of(name, gather_distributed, group, exchange)


def _stacked(loss: nn.Module, out0: Tensor, out1: Tensor) -> tuple[Tensor, Tensor]:
    """Both views' rows, (2 N, D), and the index of each row's other view, (2 N,)."""
    name = type(loss).__name__
    check_initialized(name, loss.gather_distributed)
    if out0.shape != out1.shape:
        raise ValueError(
            f"{name}: both views must have one shape, got {tuple(out0.shape)} and "
            f"{tuple(out1.shape)}."
        )
    N = len(out0)
    return torch.cat([out0, out1]), torch.arange(2 * N, device=out0.device).roll(N)


class NTXentLoss(nn.Module):
    """SimCLR's normalised, temperature-scaled cross-entropy; drop-in for lightly's NTXentLoss.

    loss = mean_i (log sum_{j != i} e^l_ij - l_ip), l_ij = <z_i, z_j> / tau, over the 2N rows of
    both views, p the row's other view. With a memory bank, MoCo's loss of out0 alone: its positive
    is out1, its negatives are the bank.

    Args:
        temperature: tau, positive.
        memory_bank_size: 0, or (rows, D) of the bank: unit rows, random at first, and then the
            last out1. It is renewed after each loss whose out0 requires a gradient.
        gather_distributed: False: group=LOCAL. True: an error, not a silent loss of one process,
            where torch.distributed is not initialised.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.info_nce`. Ours.

    Shapes: out0 and out1 (N, D), normalised inside in float32. Returns a float32 scalar.

    Raises:
        ValueError: non-positive temperature, a bank without D, views of different shape, a
            gather_distributed that contradicts group; and as `fastssl.ops.info_nce`,
            `fastssl.ops.queue_nce`.

    Memory: O(N D), and the bank, which is read without a copy.

    Notes: unlike lightly's, the bank is a `fastssl.FeatureQueue` and saved in the state dict, and a
        batch that reaches over its end goes on at its beginning, where lightly drops the rest. Over
        several ranks it takes the rows of all, and is equal on all from the start. The value is the
        mean over the rows of all ranks, lightly's that over a rank's own; by default lightly does
        not gather.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> NTXentLoss(temperature=0.2)(z0, z1).shape
        torch.Size([])

    Paper: SimCLR, arXiv:2002.05709; MoCo, arXiv:1911.05722.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool | None = None,
        *,
        group=None,
        exchange: str = "auto",
    ):
        super().__init__()
        self.group = _group("NTXentLoss", temperature, gather_distributed, group, exchange)
        self.gather_distributed = gather_distributed
        self.exchange = exchange
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else (*memory_bank_size,)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0 or (rows, D), got {memory_bank_size}."
            )
        self.temperature = temperature
        self.bank = None
        if size[0]:
            self.bank = FeatureQueue(*size, group=self.group)

    def extra_repr(self) -> str:
        bank = "" if self.bank is None else f", memory_bank_size={tuple(self.bank.features.shape)}"
        return described(f"temperature={self.temperature}{bank}", self.group, self.exchange)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        z, partner = _stacked(self, out0, out1)
        options = {"temperature": self.temperature, "group": self.group}
        if self.bank is None:
            return info_nce(z, target=partner, normalize=True, exchange=self.exchange, **options)
        if self.bank.features.device != z.device:
            self.to(z.device)
        q, k = unit_rows(out0), unit_rows(out1)
        loss = queue_nce(q, k, self.bank.features, **options)
        if q.requires_grad:
            self.bank.enqueue(k)
        return loss


class DCLLoss(nn.Module):
    """Decoupled contrastive loss, NT-Xent without its positive in the sum; lightly's DCLLoss.

    loss = mean_i (log sum_{j not i, p} e^l_ij - w_i l_ip), l_ij = <z_i, z_j> / tau, over the 2N
    rows of both views, p the row's other view.

    Args:
        temperature: tau, positive.
        weight_fn: two views' unit rows (N, D), (N, D) to the weights w (N,) of the first's positive
            terms; None: 1. Over several ranks it sees this rank's rows.
        gather_distributed, group, exchange: as in `NTXentLoss`.

    Shapes: out0 and out1 (N, D), normalised inside in float32. Returns a float32 scalar.

    Raises:
        ValueError: non-positive temperature, views of different shape, a gather_distributed that
            contradicts group; and as `fastssl.ops.info_nce`.

    Memory: O(N D); the logits are never stored.

    Notes: N = 1 has no negatives: loss 0 and no gradient, where lightly gives -inf. Over several
        ranks the value is the mean over the rows of all, lightly's that over a rank's own.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> DCLLoss()(z0, z1).shape
        torch.Size([])

    Paper: decoupled contrastive learning, arXiv:2110.06848, equation 6.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool | None = None,
        *,
        group=None,
        exchange: str = "auto",
    ):
        super().__init__()
        self.group = _group(type(self).__name__, temperature, gather_distributed, group, exchange)
        self.gather_distributed = gather_distributed
        self.exchange = exchange
        self.temperature = temperature
        self.weight_fn = weight_fn

    def extra_repr(self) -> str:
        return described(f"temperature={self.temperature}", self.group, self.exchange)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        z, partner = _stacked(self, out0, out1)
        z, levels = unit_rows(z), resolve_levels(type(self).__name__, self.group)
        options = {
            "target": partner, "q_ids": sample_ids(len(out0), levels, z.device).repeat(2),
            "decoupled": True, "temperature": self.temperature, "group": self.group,
            "exchange": self.exchange,
        }  # fmt: skip
        if self.weight_fn is None:
            return info_nce(z, **options)
        z0, z1 = z.chunk(2)
        w = torch.cat([self.weight_fn(z0, z1), self.weight_fn(z1, z0)])
        loss, lse = info_nce(z, reduction="none", return_lse=True, **options)
        lse = torch.where(lse.isneginf(), 0, lse)  # nothing to contrast with: loss is 0 as well
        total = (w * loss + (1 - w) * lse).sum()  # lse - w positive, for loss = lse - positive
        return global_mean(total, loss.new_full((), len(loss)), levels)


def _von_mises_fisher(z0: Tensor, z1: Tensor, sigma: float, group) -> Tensor:
    """2 - N softmax_i(<z0_i, z1_i> / sigma) over the N rows of all ranks."""
    wide = torch.promote_types(z0.dtype, torch.float32)
    logits = (z0.detach().to(wide) * z1.detach().to(wide)).sum(1) / sigma  # (N,)
    lse, N = logits.logsumexp(0), len(z0)
    if levels := resolve_levels("DCLWLoss", group):
        own = torch.stack([lse, lse.new_full((), N)]).unsqueeze(0)
        lses, counts = gather_rows(own, Shards.one_each(levels)).unbind(1)
        lse, N = lses.logsumexp(0), counts.sum()
    return 2 - N * (logits - lse).exp()


class DCLWLoss(DCLLoss):
    """Weighted decoupled contrastive loss: hard positives weigh more; lightly's DCLWLoss.

    `DCLLoss` with w_i = 2 - N softmax_i(<z_i, z_p> / sigma), which takes no gradient.

    Args:
        temperature: tau, positive.
        sigma: positive; the smaller, the more the weights differ.
        gather_distributed, group, exchange: as in `NTXentLoss`.

    Shapes, Raises, Memory, Notes: as in `DCLLoss`. Over several ranks the softmax is over the N
        rows of all, as in one process with them, where lightly's is over a rank's own.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> DCLWLoss(sigma=0.5)(z0, z1).shape
        torch.Size([])

    Paper: decoupled contrastive learning, arXiv:2110.06848.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool | None = None,
        *,
        group=None,
        exchange: str = "auto",
    ):
        if not sigma > 0:
            raise ValueError(f"DCLWLoss: sigma must be positive, got {sigma}.")
        super().__init__(temperature, None, gather_distributed, group=group, exchange=exchange)
        self.weight_fn = partial(_von_mises_fisher, sigma=sigma, group=self.group)
