"""The supervised contrastive loss with the signature of its authors' script."""

import torch
from torch import Tensor, nn

from fastssl.dist import resolve_levels
from fastssl.losses.ranks import check_group, described, sample_ids
from fastssl.ops import contrastive_lse, sup_con


class SupConLoss(nn.Module):
    """Supervised contrastive loss of V views; drop-in for the SupContrast repository's SupConLoss.

    loss = tau / tau_0 mean_i (log sum_{j != i} e^l_ij - sum_j m_ij l_ij / sum_j m_ij),
    l_ij = <z_i, z_j> / tau, over the B V rows of all views; m_ij = 1 for rows of one label, or the
    mask's entry of their samples, and m_ii = 0.

    Args:
        temperature: tau, positive.
        contrast_mode: "all": every row is an anchor i; "one": view 0 only.
        base_temperature: tau_0, positive.
        group, exchange: whose ranks' rows are one batch, and how keys travel, as in
            `fastssl.ops.sup_con`. Ours.

    Shapes: features (B, V, ...), normalised by the caller; labels (B,) integers, or mask (B, B) of
        weights, which may be asymmetric, or neither: then only views of one sample are positives
        (SimCLR). A mask is for one process. Returns a float32 scalar.

    Raises:
        ValueError: features of less than 3 dimensions, labels together with a mask, a mask of
            another shape, a mask and several ranks, an unknown contrast_mode; and as
            `fastssl.ops.sup_con`.

    Memory: O(B V D), and the given mask; the logits are never stored. With a mask the
        products run in float32.

    Notes: an anchor without a positive has loss 0 and counts in the mean, as in the script's
        present version.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)
        >>> SupConLoss()(z, labels=torch.arange(8) // 4).shape
        torch.Size([])

    Paper: supervised contrastive learning, arXiv:2004.11362, L_out.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        group=None,
        exchange: str = "auto",
    ):
        super().__init__()
        if not temperature > 0 or not base_temperature > 0:
            raise ValueError(
                "SupConLoss: temperature and base_temperature must be positive, "
                f"got {temperature} and {base_temperature}."
            )
        if contrast_mode not in ("all", "one"):
            raise ValueError(
                f'SupConLoss: contrast_mode must be "all" or "one", got {contrast_mode!r}.'
            )
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        check_group("SupConLoss", group, exchange)
        self.base_temperature = base_temperature
        self.group = group
        self.exchange = exchange

    def extra_repr(self) -> str:
        text = (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}"
        )
        return described(text, self.group, self.exchange)

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if features.dim() < 3:
            raise ValueError(
                f"SupConLoss: features must be (B, V, ...), got {tuple(features.shape)}. "
                "Use .unsqueeze(1) for one view."
            )
        if labels is not None and mask is not None:
            raise ValueError("SupConLoss: give labels or mask, got both.")
        levels = resolve_levels("SupConLoss", self.group)
        if mask is not None and levels:
            raise ValueError(
                "SupConLoss: a mask holds the pairs of one process, got one with several ranks. "
                "Give labels, or SupConLoss(group=fastssl.LOCAL)."
            )
        B, V = features.shape[:2]
        features = features.flatten(2)
        z = features.transpose(0, 1).flatten(0, 1)  # (V B, D), view by view
        if mask is None:
            labels = sample_ids(B, levels, z.device) if labels is None else labels.reshape(-1)
            arguments = {
                "temperature": self.temperature,
                "group": self.group,
                "exchange": self.exchange,
            }
            if self.contrast_mode == "all":
                loss = sup_con(z, labels=labels.repeat(V), **arguments)
            else:
                arguments["own_key"] = torch.arange(B, device=z.device)
                arguments["k_labels"] = labels.repeat(V)
                loss = sup_con(z[:B], z, labels=labels, **arguments)
        else:
            # In at least fp32: the gradients of the two parts of the loss, which cancel near
            # convergence, are rounded one by one.
            wide = torch.promote_types(features.dtype, torch.float32)
            with torch.autocast(z.device.type, enabled=False):
                loss = self._masked(z.to(wide), features.sum(1, dtype=wide), mask, V)
        return self.temperature / self.base_temperature * loss

    def _masked(self, z: Tensor, summed: Tensor, mask: Tensor, V: int) -> Tensor:
        """z (V B, D), its sum over views (B, D), mask (B, B)."""
        B = len(summed)
        if mask.shape != (B, B):
            raise ValueError(f"SupConLoss: mask must be {(B, B)}, got {tuple(mask.shape)}.")
        scale = 1 / self.temperature
        if self.contrast_mode == "all":
            anchors = z
            lse, _, _ = contrastive_lse(z, scale=scale)
        else:
            anchors = z[:B]
            sample = torch.arange(B, device=z.device)
            k_ids = torch.cat([sample, sample.new_full((V * B - B,), -1)])
            lse, _, _ = contrastive_lse(anchors, z, scale, q_ids=sample, k_ids=k_ids)
        mask = mask.to(summed)
        own = mask.diagonal()
        x = anchors.unflatten(0, (-1, B))  # (V or 1, B, D)
        positive = (x * (mask @ summed)).sum(2) - own * x.square().sum(2)
        count = V * mask.sum(1) - own
        mean = scale * positive / torch.where(count > 0, count, 1)
        return torch.where(count > 0, lse.unflatten(0, (-1, B)) - mean, 0).mean()
