"""Features from inside a backbone: of its last blocks, and as a map."""

import torch
from torch import Tensor, nn

_ATTENTION = {"attn", "qkv", "self_attention"}


def transformer_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a vision transformer of this package, timm or torchvision; none of others."""
    for path in ("blocks", "encoder.layers"):
        try:
            blocks = list(backbone.get_submodule(path).children())
        except AttributeError:
            continue
        if blocks and _ATTENTION & {n.rpartition(".")[2] for n, _ in blocks[-1].named_modules()}:
            return blocks
    return []


class LastBlocks(nn.Module):
    """Class tokens of the last n blocks, the last block first, each through the last norm.

    Args:
        backbone: a vision transformer, see `transformer_blocks`.
        n: number of blocks. patch_mean: before them the mean of the last block's patch tokens.

    Raises:
        ValueError: another kind of backbone, or n out of range.
    """

    def __init__(self, backbone: nn.Module, n: int, patch_mean: bool = False):
        super().__init__()
        blocks = transformer_blocks(backbone)
        if not 1 <= n <= len(blocks):
            raise ValueError(
                f"evaluate: last_blocks must be between 1 and the network's {len(blocks)} "
                f"transformer blocks, got {n}."
            )
        self.backbone, self.n, self.patch_mean = backbone, n, patch_mean
        self._hooked = blocks[: -n - 1 : -1]

    def extra_repr(self) -> str:
        return f"n={self.n}, patch_mean={self.patch_mean}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) to (B, n D), or (B, (n + 1) D)."""
        prefix = _prefix(self.backbone)
        normed = [_norm(self.backbone)(t) for t in _outputs(self.backbone, self._hooked, x)]
        parts = [t[:, 0] if prefix else t.mean(1) for t in normed]
        if self.patch_mean:
            parts.insert(0, normed[0][:, prefix:].mean(1))
        return torch.cat(parts, 1)


class FeatureMap(nn.Module):
    """The last map (B, D, h, w): a transformer's normed patch tokens, else the last output of any
    layer with more than one pixel."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        blocks = transformer_blocks(self.backbone)
        if blocks:
            (tokens,) = _outputs(self.backbone, blocks[-1:], x)
            tokens = _norm(self.backbone)(tokens)[:, _prefix(self.backbone) :]
            side = round(tokens.shape[1] ** 0.5)
            return tokens.transpose(1, 2).unflatten(2, (side, -1))
        last: list[Tensor] = []

        def keep(module, args, output):
            if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                last[:] = [output]

        hooks = [m.register_forward_hook(keep) for m in self.backbone.modules()]
        try:
            pooled = self.backbone(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not last:
            raise ValueError(
                "evaluate: backbone must have a feature map (B, D, h, w) of more than one pixel, "
                "got none inside. Give a larger image_size, or another backbone."
            )
        channels_last = last[0].shape[1] != pooled.shape[1] == last[0].shape[3]  # swin
        return last[0].permute(0, 3, 1, 2) if channels_last else last[0]


def _outputs(backbone: nn.Module, layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """What these layers give out in one forward pass."""
    found = {}

    def keep(module, args, output):
        found[module] = output

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        backbone(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]


def _norm(backbone: nn.Module) -> nn.Module:
    if hasattr(backbone, "encoder"):
        return backbone.encoder.ln
    return backbone.norm


def _prefix(backbone: nn.Module) -> int:
    """Number of tokens that are no patches."""
    return getattr(backbone, "num_prefix_tokens", 1)
