"""One file a method; each reads like its paper."""

from torch import nn

from ..extras import nearest
from .byol import BYOL
from .lejepa import LeJEPA
from .simclr import SimCLR

METHODS: dict[str, type[nn.Module]] = {"simclr": SimCLR, "byol": BYOL, "lejepa": LeJEPA}

__all__ = ["BYOL", "METHODS", "LeJEPA", "SimCLR", "method_class"]


def method_class(name: str) -> type[nn.Module]:
    """The class of a method.

    Raises:
        ValueError: unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method must be a known method, got {name!r}. {nearest(name, METHODS)}")
    return METHODS[name]
