"""open_clip's losses: their arguments, names, defaults and values."""

from torch import Tensor, nn

from fastssl.dist import Shards, resolve_levels
from fastssl.losses.ranks import check_group, described
from fastssl.ops import info_nce, siglip


def _check(name: str, rank: int, world_size: int, group, exchange: str) -> None:
    check_group(name, group, exchange)
    ranks = Shards.one_each(resolve_levels(name, group))
    own, world = ranks.rank, ranks.total
    if (rank, world_size) not in ((0, 1), (own, world)):  # the defaults say nothing
        raise ValueError(
            f"{name}: rank and world_size must be the group's, {own} and {world}, got {rank} and "
            f"{world_size}. Leave them out, or initialise torch.distributed before, or give the "
            "group that they belong to."
        )


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of matching image and text features; drop-in for open_clip's ClipLoss.

    loss = mean_i (log sum_j e^l_ij + log sum_j e^l_ji) / 2 - l_ii, l_ij = logit_scale <x_i, y_j>.

    Args:
        local_loss, gather_with_grad, cache_labels, use_horovod: accepted, and change nothing.
        rank, world_size: those of the group, or left at 0 and 1; nothing depends on them.
        store_logits: keep the logits for the backward: one product less for 4 N^2 bytes. One
            process only. Ours.
        label_smoothing: share in [0, 1) of the target spread evenly over all pairs. Ours.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.info_nce`. Ours.

    Shapes: image_features and text_features (N, D), normalised by the caller; logit_scale a number
        or one-element tensor; logit_bias is one for all pairs, so it cancels.

    Returns:
        A float32 scalar, or {"contrastive_loss": scalar} with output_dict=True.

    Raises:
        ValueError: rank or world_size that contradict the group; and as `fastssl.ops.info_nce`.

    Memory: O(N D), unless the logits are stored.

    Notes: over several ranks the value is the mean over the pairs of all of them. open_clip's with
        local_loss is the mean over a rank's own, and relies on gather_with_grad: with it the
        gradients are those of here, without it not those of the whole batch.

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
        group=None,
        exchange: str = "auto",
    ):
        super().__init__()
        _check("ClipLoss", rank, world_size, group, exchange)
        self.store_logits = store_logits
        self.label_smoothing = label_smoothing
        self.group = group
        self.exchange = exchange

    def extra_repr(self) -> str:
        return described("", self.group, self.exchange)

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
            group=self.group,
            exchange=self.exchange,
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
        rank, world_size: those of the group, or left at 0 and 1; nothing depends on them.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.siglip`. Ours.

    Shapes: image_features and text_features (N, D), normalised by the caller; logit_scale and
        logit_bias numbers or one-element tensors; logit_bias may be None.

    Returns:
        A float32 scalar, or {"contrastive_loss": scalar} with output_dict=True.

    Raises:
        ValueError: rank or world_size that contradict the group, an unknown dist_impl; and as
            `fastssl.ops.siglip`.

    Memory: O(N D); the logits are never stored.

    Notes: over several ranks the value is that of all N pairs; open_clip's is the part of a rank's
        own images, with the same mean over ranks.

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
        *,
        group=None,
        exchange: str = "auto",
    ):
        super().__init__()
        _check("SigLipLoss", rank, world_size, group, exchange)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                'SigLipLoss: dist_impl must be None, "bidir", "shift", "reduce" or "gather", '
                f"got {dist_impl!r}."
            )
        self.group = group
        self.exchange = exchange

    def extra_repr(self) -> str:
        return described("", self.group, self.exchange)

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
        loss = siglip(
            image_features,
            text_features,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            group=self.group,
            exchange=self.exchange,
        )
        return {"contrastive_loss": loss} if output_dict else loss
