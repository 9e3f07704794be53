"""An image file as pixels."""

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..extras import require

_ORIENTATION = 0x0112  # the number of EXIF's field


def decode(file: str | Path | BinaryIO, max_side: int) -> Tensor:
    """An image file as RGB, upright as its EXIF orientation says, at its own size.

    A longer side above `max_side` is reduced to it, JPEG already while it is decoded. Grey, palette
    and CMYK become RGB, 16 bits become 8 by leaving out the low ones, what is transparent shows
    white; of several frames or pages it is the first.

    Args:
        file: of any format that Pillow reads; its path, or open.
        max_side: longest side of the result in pixels, at least 1.

    Returns:
        (3, H, W) uint8.

    Raises:
        Exception: a broken file raises what Pillow's decoder does, of many types. ValueError:
            pixels of 32 bits, whose range is not known.
    """
    # Pillow alone: torchvision.io gives the same bytes of a JPEG, but reads neither EXIF nor most
    # formats.
    with require("PIL.Image", "train").open(file) as picture:
        # JPEG: decode at a half, a quarter or an eighth
        picture.draft("RGB", _within(picture.size, max_side))
        return pixels(picture, max_side)


def pixels(picture, max_side: int) -> Tensor:
    """(3, H, W) uint8 of a Pillow image, which stays as it is; see `decode`."""
    image_module, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    picture.load()
    with suppress(Exception):  # broken EXIF tells no orientation; the pixels are read already
        if picture.getexif().get(_ORIENTATION, 1) != 1:
            picture = operations.exif_transpose(picture)
    rgb = _as_rgb(picture, image_module)
    size = _within(rgb.size, max_side)
    if size != rgb.size:
        rgb = rgb.resize(size, image_module.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.stack([np.asarray(band) for band in rgb.split()]))


def _within(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """The size, scaled so that its longer side is at most `max_side`."""
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _as_rgb(picture, image_module):
    if picture.mode[0] in "IF":
        pixels = np.asarray(picture)
        # A TIFF of 32 bits may hold values of 8; where other formats give "I" it is of 16.
        least = 1 << 8 if (picture.mode, picture.format) == ("I", "TIFF") else 0
        if picture.mode == "F" or pixels.min() < 0 or not least <= pixels.max() < 1 << 16:
            raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16 bits")
        picture = image_module.fromarray((pixels >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = image_module.new("RGBA", picture.size, "white")
        picture = image_module.alpha_composite(white, picture)
    return picture.convert("RGB")
