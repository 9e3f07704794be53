"""Losses as modules, with the signatures of the libraries they replace."""

import torch
from torch import Tensor, nn

from fastssl.ops import info_nce


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of matching image and text features; drop-in for open_clip's ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, use_horovod: accepted; they choose among equal
            results of several processes, and change nothing in one.
        rank, world_size: one process only (0 and 1).

    Shapes: image_features and text_features (N, D), normalised by the caller; logit_scale a number
        or one-element tensor; returns a float32 scalar, or {"contrastive_loss": scalar} with
        output_dict=True.

    Raises:
        ValueError: world_size other than 1; and as `fastssl.ops.info_nce`.

    Example:
        >>> image, text = torch.randn(2, 8, 16).unbind()
        >>> ClipLoss()(image, text, logit_scale=10.0).shape
        torch.Size([])

    Paper: CLIP, arXiv:2103.00020.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if world_size != 1:
            raise ValueError(
                f"ClipLoss: world_size must be 1, got {world_size}. "
                "Negatives of other processes are not gathered yet."
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = info_nce(image_features, text_features, logit_scale=logit_scale, symmetric=True)
        if isinstance(logit_bias, Tensor):  # one bias for all pairs cancels; its gradient is 0
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(nn.Module):
    """SimCLR's normalised, temperature-scaled cross-entropy; drop-in for lightly's NTXentLoss.

    Row i of one view and row i of the other are positives; the other 2N - 2 rows are negatives.

    Args:
        temperature: positive.
        memory_bank_size: 0 only.
        gather_distributed: False only.

    Shapes: out0 and out1 (N, D), normalised inside in float32; returns a float32 scalar, the mean
        over all 2N rows.

    Raises:
        ValueError: non-positive temperature, a memory bank, views of different shape.

    Example:
        >>> z0, z1 = torch.randn(2, 8, 16).unbind()
        >>> NTXentLoss(temperature=0.2)(z0, z1).shape
        torch.Size([])

    Paper: SimCLR, arXiv:2002.05709.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"NTXentLoss: temperature must be positive, got {temperature}.")
        if memory_bank_size != 0:
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0, got {memory_bank_size}. "
                "Use the batch's own negatives."
            )
        if gather_distributed:
            raise ValueError(
                "NTXentLoss: gather_distributed must be False, got True. "
                "Negatives of other processes are not gathered yet."
            )
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if out0.shape != out1.shape:
            raise ValueError(
                f"NTXentLoss: both views must have one shape, got {tuple(out0.shape)} and "
                f"{tuple(out1.shape)}."
            )
        N = out0.shape[0]
        partner = torch.arange(2 * N, device=out0.device).roll(N)
        z = torch.cat([out0, out1])
        return info_nce(z, target=partner, temperature=self.temperature, normalize=True)
