"""Parameters whose states have bits of their own, whatever their group says."""

import sys
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By module, not by parameter: `.to()`, copies and FSDP put other parameters into a module.
_stable: weakref.WeakSet["StableEmbedding"] = weakref.WeakSet()


def of(p: Tensor) -> dict[str, Any]:
    """What `StableEmbedding` and bitsandbytes' GlobalOptimManager, where loaded, say of p.

    Raises:
        ValueError: the manager overrides anything but optim_bits and min_8bit_size.
    """
    out = {"optim_bits": 32} if any(module.weight is p for module in _stable) else {}
    library = sys.modules.get("bitsandbytes.optim.optimizer")
    if library is None:
        return out
    manager = library.GlobalOptimManager.get_instance()
    for module, name, config in manager.module_weight_config_triple:
        if getattr(module, name) is p:
            out |= config
    out |= manager.pid2config.get(id(p), {})
    for key, value in out.items():
        if key != "min_8bit_size" and not (key == "optim_bits" and value in (8, 32)):
            raise ValueError(
                "GlobalOptimManager: overrides must be of optim_bits (8 or 32) or min_8bit_size, "
                f"got {key}={value!r} for a parameter of shape {tuple(p.shape)}. Give the "
                "parameter a group of its own."
            )
    return out


class StableEmbedding(nn.Embedding):
    """An embedding for training with 8-bit states: Xavier weights, a layer norm behind them.

        y = LayerNorm(weight[input]),  weight ~ U(-a, a),  a = sqrt(6 / (rows + columns))

    The optimizers of this package keep fp32 states for its weight: most rows have no gradient in a
    step, and the others' vary widely.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype: torch.nn.Embedding's, and bitsandbytes' in its order; sparse gradients
            are refused by the optimizers.
        _weight: (num_embeddings, embedding_dim), in the place of Xavier's.

    Returns: (*, embedding_dim) in the weight's dtype, of int (*) indices.

    Memory: the looked-up rows once more, in float32.

    Notes: the norm is computed in float32 or wider. The keys of state_dict() are bitsandbytes'.

    Example:
        >>> embedding = StableEmbedding(1000, 64)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])

    Paper: Dettmers et al., arXiv 2110.02861, section 2.3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        _stable.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies and pickles
        super().__setstate__(state)
        _stable.add(self)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        wide = torch.promote_types(rows.dtype, torch.float32)
        norm = self.norm
        y = F.layer_norm(
            rows.to(wide),
            norm.normalized_shape,
            norm.weight.to(wide),
            norm.bias.to(wide),
            norm.eps,
        )
        return y.to(rows.dtype)
