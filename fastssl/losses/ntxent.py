"""lightly's contrastive losses: their arguments, names, defaults and values."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastssl.dist import LOCAL
from fastssl.ops import contrastive_lse, info_nce, queue_nce
from fastssl.ops.checks import unit_rows
from fastssl.queue import FeatureQueue


def _check(name: str, temperature: float, gather_distributed: bool) -> None:
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
    if gather_distributed:
        raise ValueError(
            f"{name}: gather_distributed must be False, got True. "
            "Negatives of other processes are not gathered yet."
        )


def _stacked(name: str, out0: Tensor, out1: Tensor) -> tuple[Tensor, Tensor]:
    """Both views' rows, (2 N, D), and the index of each row's other view, (2 N,)."""
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
        gather_distributed: False only.

    Shapes: out0 and out1 (N, D), normalised inside in float32. Returns a float32 scalar.

    Raises:
        ValueError: non-positive temperature, a bank without D, views of different shape; and as
            `fastssl.ops.info_nce`, `fastssl.ops.queue_nce`.

    Memory: O(N D), and the bank, which is read without a copy.

    Notes: unlike lightly's, the bank is a `fastssl.FeatureQueue` and saved in the state dict, and a
        batch that reaches over its end goes on at its beginning, where lightly drops the rest.

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
        gather_distributed: bool = False,
    ):
        super().__init__()
        _check("NTXentLoss", temperature, gather_distributed)
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else (*memory_bank_size,)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0 or (rows, D), got {memory_bank_size}."
            )
        self.temperature = temperature
        self.bank = None
        if size[0]:
            self.bank = FeatureQueue(*size, group=LOCAL, seed=int(torch.randint(2**31, ())))

    def extra_repr(self) -> str:
        bank = "" if self.bank is None else f", memory_bank_size={tuple(self.bank.features.shape)}"
        return f"temperature={self.temperature}{bank}"

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        z, partner = _stacked("NTXentLoss", out0, out1)
        if self.bank is None:
            return info_nce(z, target=partner, temperature=self.temperature, normalize=True)
        if self.bank.features.device != z.device:
            self.to(z.device)
        q, k = unit_rows(out0), unit_rows(out1)
        loss = queue_nce(q, k, self.bank.features, temperature=self.temperature)
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
            terms; None: 1.
        gather_distributed: False only.

    Shapes: out0 and out1 (N, D), normalised inside in float32. Returns a float32 scalar.

    Raises:
        ValueError: non-positive temperature, views of different shape; and as
            `fastssl.ops.contrastive_lse`.

    Memory: O(N D); the logits are never stored.

    Notes: N = 1 has no negatives: loss 0 and no gradient, where lightly gives -inf.

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
        gather_distributed: bool = False,
    ):
        super().__init__()
        _check(type(self).__name__, temperature, gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        z, partner = _stacked(type(self).__name__, out0, out1)
        z = unit_rows(z)
        image = partner % len(out0)
        lse, _, positive = contrastive_lse(
            z, scale=1 / self.temperature, q_ids=image, target=partner
        )
        if self.weight_fn is not None:
            z0, z1 = z.chunk(2)
            positive = positive * torch.cat([self.weight_fn(z0, z1), self.weight_fn(z1, z0)])
        return torch.where(lse.isneginf(), 0, lse - positive).mean()


def _von_mises_fisher(z0: Tensor, z1: Tensor, sigma: float) -> Tensor:
    similarity = (z0.detach().float() * z1.detach().float()).sum(1)  # (N,)
    return 2 - len(z0) * torch.softmax(similarity / sigma, dim=0)


class DCLWLoss(DCLLoss):
    """Weighted decoupled contrastive loss: hard positives weigh more; lightly's DCLWLoss.

    `DCLLoss` with w_i = 2 - N softmax_i(<z_i, z_p> / sigma), which takes no gradient.

    Args:
        temperature: tau, positive.
        sigma: positive; the smaller, the more the weights differ.
        gather_distributed: False only.

    Shapes, Raises, Memory, Notes: as in `DCLLoss`.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> DCLWLoss(sigma=0.5)(z0, z1).shape
        torch.Size([])

    Paper: decoupled contrastive learning, arXiv:2110.06848.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ):
        if not sigma > 0:
            raise ValueError(f"DCLWLoss: sigma must be positive, got {sigma}.")
        super().__init__(temperature, partial(_von_mises_fisher, sigma=sigma), gather_distributed)
