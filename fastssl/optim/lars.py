"""Layer-wise adaptive rate scaling."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    For tensors with at least two dimensions

        d = g + weight_decay w,   r = eta |w| / |d| (1 if a norm is zero),
        mu = momentum mu + r d,   w = w - lr mu;

    the others (biases, scales of normalisations) take plain momentum: r = 1 and no decay.

    Args:
        params: tensors or parameter groups.
        lr: learning rate; large, because eta scales it: the paper's rule is 0.3 B / 256.
        momentum: in [0, 1).
        weight_decay: added to the gradient.
        eta: trust coefficient. clip: limit r to at most 1, as small-data recipes with eta 0.02 do.

    Raises:
        ValueError: an argument out of range.

    Notes: no host synchronisation. The learning rate is outside the momentum buffer, which differs
    from SimCLR's release only while the rate changes.

    Paper: You et al., "Large batch training of convolutional networks", arXiv 1708.03888.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        clip: bool = False,
    ):
        if lr < 0 or weight_decay < 0 or eta <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                "LARS: lr and weight_decay must be >= 0, eta > 0 and momentum in [0, 1), got "
                f"lr={lr}, weight_decay={weight_decay}, eta={eta}, momentum={momentum}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "clip": clip,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                d = w.grad
                if w.ndim >= 2:
                    d = d.add(w, alpha=group["weight_decay"])
                    d = d * _trust_ratio(w, d, group["eta"], group["clip"])
                mu = self.state[w].get("momentum")
                if mu is None:
                    mu = self.state[w]["momentum"] = torch.zeros_like(w)
                mu.mul_(group["momentum"]).add_(d)
                w.add_(mu, alpha=-group["lr"])
        return loss


def _trust_ratio(w: torch.Tensor, d: torch.Tensor, eta: float, clip: bool) -> torch.Tensor:
    """eta |w| / |d|, or 1 where either norm is zero."""
    w_norm, d_norm = w.norm(), d.norm()
    ratio = eta * w_norm / d_norm
    if clip:
        ratio = ratio.clamp(max=1)
    return torch.where((w_norm > 0) & (d_norm > 0), ratio, 1.0)
