"""Which parameters decay."""

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and kernels with `weight_decay`, the rest without.

    The rest is everything with fewer than two dimensions: biases, scales of normalisations, class
    tokens, temperatures. Parameters that do not require gradients are left out.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
