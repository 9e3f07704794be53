"""Two small data sets that need no download: they lie inside packages one installs anyway."""

from pathlib import Path

import numpy as np
import torch

from ..extras import require
from ..random import SPLIT, permutation, uniform
from .source import TensorSource


def digits(split: str) -> TensorSource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: 1,257 to train on and 540 to test."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = permutation(len(labels), seed=0, stream=SPLIT)
    part = order[:1257] if split == "train" else order[1257:]
    names = [str(n) for n in range(10)]
    return TensorSource("digits", images[part], labels[part], names, mirror=False)


# Photographs and micrographs in the packages' own files; nothing that would be downloaded.
_SKIMAGE = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
    "color.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png "
    "page.png retina.jpg rocket.jpg text.png"
).split()
_SKLEARN = ("china.jpg", "flower.jpg")
_SIDE, _SQUARE = 32, 64
_PER_PICTURE = {"train": 100, "test": 50}


def patches(split: str) -> TensorSource:
    """32 x 32 RGB patches of 21 pictures inside scikit-image and scikit-learn, labelled by picture.

    A picture is laid out as a checkerboard of 64-pixel squares; training patches lie inside the
    squares of one colour and test patches inside those of the other, so they share no pixel.
    2,100 patches to train on and 1,050 to test.
    """
    image_module = require("PIL.Image", "train")
    folders = (
        (Path(require("skimage", "demo").__file__).parent / "data", _SKIMAGE),
        (Path(require("sklearn", "demo").__file__).parent / "datasets" / "images", _SKLEARN),
    )
    paths = [folder / name for folder, names in folders for name in names]
    images = []
    for number, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"patches: {path} is missing. This picture ships inside scikit-image or "
                'scikit-learn: reinstall with pip install "fastssl-kernels[demo]".'
            )
        with image_module.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # (H, W, 3)
        images += _cut(pixels, number, split)
    labels = torch.arange(len(paths)).repeat_interleave(_PER_PICTURE[split])
    return TensorSource("patches", torch.stack(images), labels, [path.stem for path in paths])


def _cut(pixels: torch.Tensor, number: int, split: str) -> list[torch.Tensor]:
    """Random patches (3, 32, 32) of one picture (H, W, 3), inside squares of the split's colour."""
    rows, columns = pixels.shape[0] // _SQUARE, pixels.shape[1] // _SQUARE
    colour = 0 if split == "train" else 1
    squares = [(r, c) for r in range(rows) for c in range(columns) if (r + c) % 2 == colour]
    count = _PER_PICTURE[split]
    u = uniform(0, SPLIT, 1 + colour, torch.arange(count) + number * count, 0, 3)
    result = []
    for pick, down, right in u.tolist():
        r, c = squares[int(pick * len(squares))]
        y = r * _SQUARE + int(down * (_SQUARE - _SIDE + 1))
        x = c * _SQUARE + int(right * (_SQUARE - _SIDE + 1))
        result.append(pixels[y : y + _SIDE, x : x + _SIDE].permute(2, 0, 1).contiguous())
    return result
