"""The loop between data and checkpoint."""

from .backbones import load_backbone, load_method, random_backbone
from .checkpoint import load_checkpoint, save_checkpoint
from .exporting import export
from .loop import Run, pretrain

__all__ = [
    "Run",
    "export",
    "load_backbone",
    "load_checkpoint",
    "load_method",
    "pretrain",
    "random_backbone",
    "save_checkpoint",
]
