"""One file a method; each reads like its paper."""

import functools
import importlib.util
import sys
from pathlib import Path

from torch import nn

from ..extras import nearest
from .align import ALIGN
from .barlow import BarlowTwins
from .byol import BYOL
from .clip import CLIP
from .convirt import ConVIRT
from .dino import DINO
from .dinov2 import DINOv2
from .distill import Distill
from .lejepa import LeJEPA
from .look import LOOK
from .mae import MAE
from .moco_v2 import MoCoV2
from .moco_v3 import MoCoV3
from .seer import SEER
from .simclr import SimCLR
from .simclr_v2 import SimCLRv2
from .swav import SwAV
from .vicreg import VICReg

METHODS: dict[str, type[nn.Module]] = {
    "simclr": SimCLR,
    "simclr_v2": SimCLRv2,
    "distill": Distill,
    "byol": BYOL,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "dinov2": DINOv2,
    "swav": SwAV,
    "seer": SEER,
    "vicreg": VICReg,
    "barlow": BarlowTwins,
    "lejepa": LeJEPA,
    "mae": MAE,
    "look": LOOK,
    "clip": CLIP,
    "align": ALIGN,
    "convirt": ConVIRT,
}

__all__ = [
    "ALIGN",
    "BYOL",
    "CLIP",
    "DINO",
    "DINOv2",
    "LOOK",
    "MAE",
    "METHODS",
    "SEER",
    "BarlowTwins",
    "ConVIRT",
    "Distill",
    "LeJEPA",
    "MoCoV2",
    "MoCoV3",
    "SimCLR",
    "SimCLRv2",
    "SwAV",
    "VICReg",
    "method_class",
]


def method_class(name: str) -> type[nn.Module]:
    """The class of a method: one of `METHODS`, or `FILE.py:CLASS`, whose file is then executed.

    Raises:
        ValueError: unknown name, no such file, or no such class in it.
    """
    if name in METHODS:
        return METHODS[name]
    path, _, own = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(path, own)
    known = nearest(name, [*METHODS, "FILE.py:CLASS"])
    raise ValueError(f"method must be a known method, got {name!r}. {known}")


@functools.cache
def _from_file(path: str, name: str) -> type[nn.Module]:
    if not Path(path).is_file():
        raise ValueError(f"method must be FILE.py:CLASS, got no file {path!r}. Check the path.")
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        known = nearest(name, classes)
        raise ValueError(f"method must be a class in {path}, got {name!r}. {known}".rstrip())
    return found
