"""Views of images: what they are, their random parameters, their pixels."""

from .apply import augment, prepare
from .custom import Custom
from .packed import Packed, pack
from .presets import byol, dino, lejepa, mae, moco_v2, rad_dino, simclr, small, swav, xray
from .views import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    Normalize,
    RandomResizedCrop,
    Resize,
    Rotate,
    Rotate90,
    Solarize,
    Translate,
    View,
)

__all__ = [
    "ColorJitter",
    "Custom",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "Noise",
    "Normalize",
    "Packed",
    "RandomResizedCrop",
    "Resize",
    "Rotate",
    "Rotate90",
    "Solarize",
    "Translate",
    "View",
    "augment",
    "byol",
    "dino",
    "lejepa",
    "mae",
    "moco_v2",
    "pack",
    "prepare",
    "rad_dino",
    "simclr",
    "small",
    "swav",
    "xray",
]
