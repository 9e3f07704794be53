"""The contrastive ops as modules that hold their hyper-parameters, for home-made loops."""

import math

import torch
from torch import Tensor, nn

from fastssl.losses.ranks import check_group, described
from fastssl.ops import info_nce, queue_nce


class _Tempered(nn.Module):
    """A temperature, fixed or learnable, and fixed options of an op."""

    def __init__(self, temperature: float, learnable: bool, sharding: dict, **options):
        super().__init__()
        name = type(self).__name__
        if not temperature > 0:
            raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
        if learnable and temperature < 0.01:
            raise ValueError(
                f"{name}: a learnable temperature must start at 0.01 or more, got {temperature}."
            )
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None
        check_group(name, **sharding)
        self.sharding = sharding  # group and, where keys travel, exchange
        self.options = options

    def extra_repr(self) -> str:
        values = {"temperature": self.temperature, "learnable": self.logit_scale is not None}
        text = ", ".join(f"{name}={value!r}" for name, value in (values | self.options).items())
        return described(text, **self.sharding)

    def _scale(self) -> float | Tensor:
        if self.logit_scale is None:
            return 1 / self.temperature
        # The parameter itself is kept in bounds: a clamp of its value would stop the gradient.
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        return self.logit_scale.exp()


class InfoNCELoss(_Tempered):
    """`fastssl.ops.info_nce` with its hyper-parameters stored, the temperature learnable.

    loss_i = log sum_j e^l_ij - l_{i, target_i}, l_ij = <q_i, k_j> / tau.

    Args:
        temperature: tau, positive; the initial one if learnable, then at least 0.01.
        learnable: hold log(1 / tau) as the parameter `logit_scale`, kept below log 100 (CLIP).
        symmetric: average the directions q to k and k to q.
        normalize: L2-normalise the rows first, in float32.
        decoupled, margin, label_smoothing, row_weight, store_logits, reduction, group, exchange:
            as in `info_nce`.

    Shapes: called with q (N, D), k (M, D) or None, and as keywords target, q_ids, k_ids, bias,
        hard_negatives, soft_target, sample_weight, return_lse of `info_nce`. Returns what it does.

    Raises:
        ValueError: non-positive temperature; and as `fastssl.ops.info_nce`.

    Memory: O((N + M) D); the logits are never stored unless asked for.

    Example:
        >>> q, k = torch.randn(2, 8, 16).unbind()
        >>> InfoNCELoss(0.1, symmetric=True)(q, k).shape
        torch.Size([])

    Paper: CPC, arXiv:1807.03748; the learnable temperature: CLIP, arXiv:2103.00020.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        decoupled: bool = False,
        margin: float | None = None,
        label_smoothing: float = 0.0,
        row_weight: float = 0.5,
        store_logits: bool = False,
        reduction: str = "mean",
        group=None,
        exchange: str = "auto",
    ):
        super().__init__(
            temperature, learnable, {"group": group, "exchange": exchange}, symmetric=symmetric,
            normalize=normalize, decoupled=decoupled, margin=margin,
            label_smoothing=label_smoothing, row_weight=row_weight, store_logits=store_logits,
            reduction=reduction,
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor | None = None, **arguments):
        options = self.options | self.sharding
        return info_nce(q, k, logit_scale=self._scale(), **options, **arguments)


class QueueNCELoss(_Tempered):
    """`fastssl.ops.queue_nce` with its hyper-parameters stored, the temperature learnable.

    loss_i = -log e^s_i / (e^s_i + sum_j e^(<q_i, queue_j> / tau)), s_i = <q_i, k_i> / tau.

    Args:
        temperature, learnable: as in `InfoNCELoss`.
        normalize: L2-normalise q and k first, in float32; the queue is taken as it is.
        reduction: "mean", "sum" or "none".
        group, queue_sharded: as in `queue_nce`.

    Shapes: called with q (N, D), k (N, D), queue (M, D), and as keywords q_ids, queue_ids, bias,
        sample_weight of `queue_nce`. Returns a float32 scalar, or (N,).

    Raises:
        ValueError: non-positive temperature; and as `fastssl.ops.queue_nce`.

    Memory: O((N + M) D); the logits are never stored.

    Example:
        >>> q, k, queue = torch.randn(8, 16), torch.randn(8, 16), torch.randn(64, 16)
        >>> QueueNCELoss(0.2)(q, k, queue).shape
        torch.Size([])

    Paper: MoCo, arXiv:1911.05722.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        group=None,
        queue_sharded: bool = False,
    ):
        super().__init__(
            temperature, learnable, {"group": group}, normalize=normalize, reduction=reduction,
            queue_sharded=queue_sharded,
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, queue: Tensor, **arguments) -> Tensor:
        options = self.options | self.sharding
        return queue_nce(q, k, queue, logit_scale=self._scale(), **options, **arguments)
