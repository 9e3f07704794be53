"""Projection and prediction heads."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def mlp(
    dims: Sequence[int],
    *,
    norm: Literal["bn", "ln"] | None = "bn",
    act: Literal["relu", "gelu"] = "relu",
    last_norm: Literal["bn", "bn_noaffine", "ln"] | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """Linear layers with normalisation and activation between them: (B, dims[0]) to (B, dims[-1]).

    Args:
        dims: widths, input first; at least two.
        norm: after every layer but the last.
        last_norm: after the last layer.
        bias: of layers without a normalisation after them; the others have none.
    """
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        last = number == len(dims) - 2
        kind = last_norm if last else norm
        layers.append(nn.Linear(fan_in, fan_out, bias=bias and kind is None))
        if kind is not None:
            layers.append(_norm(kind, fan_out))
        if not last:
            layers.append(_ACTIVATIONS[act]())
    return nn.Sequential(*layers)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "ln":
        return nn.LayerNorm(width)
    return nn.BatchNorm1d(width, affine=kind == "bn")
