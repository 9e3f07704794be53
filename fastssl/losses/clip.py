"""open_clip's losses: their arguments, names, defaults and values."""

from torch import Tensor, nn

from fastssl.ops import info_nce, siglip


def _one_process(name: str, world_size: int) -> None:
    if world_size != 1:
        raise ValueError(
            f"{name}: world_size must be 1, got {world_size}. "
            "Negatives of other processes are not gathered yet."
        )


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of matching image and text features; drop-in for open_clip's ClipLoss.

    loss = mean_i (log sum_j e^l_ij + log sum_j e^l_ji) / 2 - l_ii, l_ij = logit_scale <x_i, y_j>.

    Args:
        local_loss, gather_with_grad, cache_labels, use_horovod: accepted; they choose among equal
            results of several processes, and change nothing in one.
        rank, world_size: one process only (0 and 1).
        store_logits: keep the logits for the backward: one product less for 4 N^2 bytes. Ours.
        label_smoothing: share in [0, 1) of the target spread evenly over all pairs. Ours.

    Shapes: image_features and text_features (N, D), normalised by the caller; logit_scale a number
        or one-element tensor; logit_bias is one for all pairs, so it cancels.

    Returns:
        A float32 scalar, or {"contrastive_loss": scalar} with output_dict=True.

    Raises:
        ValueError: world_size other than 1; and as `fastssl.ops.info_nce`.

    Memory: O(N D), unless the logits are stored.

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
        *,
        store_logits: bool = False,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        _one_process("ClipLoss", world_size)
        self.store_logits = store_logits
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = info_nce(
            image_features,
            text_features,
            logit_scale=logit_scale,
            symmetric=True,
            store_logits=self.store_logits,
            label_smoothing=self.label_smoothing,
        )
        if isinstance(logit_bias, Tensor):  # it cancels; its gradient is 0, not None
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Sigmoid loss of all image and text pairs; drop-in for open_clip's SigLipLoss.

    loss = sum_ij log(1 + e^(-y_ij x_ij)) / N, x_ij = logit_scale <x_i, y_j> + logit_bias, with
    y_ij = 1 for i = j and -1 else.

    Args:
        cache_labels, dist_impl, chunk_size: accepted; they choose among equal results.
        rank, world_size: one process only (0 and 1).

    Shapes: image_features and text_features (N, D), normalised by the caller; logit_scale and
        logit_bias numbers or one-element tensors; logit_bias may be None.

    Returns:
        A float32 scalar, or {"contrastive_loss": scalar} with output_dict=True.

    Raises:
        ValueError: world_size other than 1, an unknown dist_impl; and as `fastssl.ops.siglip`.

    Memory: O(N D); the logits are never stored.

    Example:
        >>> image, text = torch.randn(2, 8, 16).unbind()
        >>> SigLipLoss()(image, text, logit_scale=10.0, logit_bias=-10.0).shape
        torch.Size([])

    Paper: SigLIP, arXiv:2303.15343.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
    ):
        super().__init__()
        _one_process("SigLipLoss", world_size)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                'SigLipLoss: dist_impl must be None, "bidir", "shift", "reduce" or "gather", '
                f"got {dist_impl!r}."
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if image_features.shape != text_features.shape:
            raise ValueError(
                "SigLipLoss: image_features and text_features must have one shape, got "
                f"{tuple(image_features.shape)} and {tuple(text_features.shape)}."
            )
        loss = siglip(image_features, text_features, logit_scale=logit_scale, logit_bias=logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
