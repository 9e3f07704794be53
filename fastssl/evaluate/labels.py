"""Labels and masks that lie beside a folder of images."""

import copy
import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .features import Split
from .views import image_names


class Labelled:
    """A source of files with other labels, and, if given, masks; everything else is the source's.

    Args:
        source: a folder or list of images. labels: (N,) or (N, classes) int64.
        class_names: one a class.
        masks: folder with a mask for each image, see `read_mask`; None for none.
    """

    def __init__(self, source, labels: Tensor, class_names, masks: Path | None = None):
        # Where a source replaces an unreadable image it gives that one's label: here, its number.
        self._source = copy.copy(source)
        self._source.labels = torch.arange(len(source))
        self._replaced: dict[int, int] = {}
        self.labels, self.class_names = labels, tuple(class_names)
        self.num_classes = len(self.class_names)
        if masks is not None:
            self._mask_folder = masks
            self.masks = self._masks

    def __getattr__(self, name: str):
        if name == "_source":  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, index: Tensor):
        images, used = self._source.batch(index)
        self._replaced |= {
            i: u for i, u in zip(index.tolist(), used.tolist(), strict=True) if i != u
        }
        return images, self.labels[used]

    def _masks(self, index: Tensor) -> Tensor:
        """(B, S, S) int64 of samples `index` (B,), of the images that `batch` gave for them."""
        used = torch.tensor([self._replaced.get(i, i) for i in index.tolist()], dtype=torch.int64)
        names = image_names(Split(self, used))
        return torch.stack([read_mask(self._mask_folder, n[0], self.image_size) for n in names])


def with_labels(source, path: Path) -> Labelled:
    """The source with several labels an image, from a CSV file.

    The first line holds a heading for the images and the names of the classes; each further line
    the image, its path inside the data folder or its file name, and 0 or 1 for each class.

    Raises:
        ValueError: a malformed file, an image of the source without a line, or a source that is no
            folder or list of images.
    """
    _check_paths(source)
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ValueError(
            f"evaluate: {path} must have a line of headings, image and classes, and a line for "
            f"each image, got {len(rows)} lines."
        )
    names, given = rows[0][1:], {}
    for row in rows[1:]:
        if len(row) != len(rows[0]) or not set(row[1:]) <= {"0", "1"}:
            raise ValueError(
                f"evaluate: {path} must have 0 or 1 for each of {len(names)} classes, got "
                f"{','.join(row)!r}. Set uncertain labels to one of them, or drop the line."
            )
        given[row[0]] = [int(value) for value in row[1:]]
    labels = []
    for keys in image_names(Split.whole(source)):
        found = next((given[key] for key in keys if key in given), None)
        if found is None:
            raise ValueError(
                f"evaluate: {path} must have a line for every image, got none for {keys[0]!r}. "
                "Give its path inside the data folder."
            )
        labels.append(found)
    return Labelled(source, torch.tensor(labels), names)


def with_masks(source, folder: Path) -> Labelled:
    """The source with masks: for images/a.jpg of the data folder FOLDER/images/a.png.

    Raises:
        FileNotFoundError: no such folder. ValueError: a source that is no folder or list of images.
    """
    _check_paths(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"evaluate: masks must be a folder, got {str(folder)!r}.")
    return Labelled(source, source.labels, source.class_names, folder)


def _check_paths(source) -> None:
    if not hasattr(source, "paths"):
        raise ValueError(
            "evaluate: labels and masks beside images need a folder or list of images, got "
            f"{source.name!r}. Leave them out."
        )


def read_mask(folder: Path, name: str, size: int) -> Tensor:
    """(size, size) int64: the centre square of a PNG of class numbers, grey or with a palette;
    255 does not count. Enlarged or reduced without mixing numbers."""
    path = (folder / name).with_suffix(".png")
    if not path.is_file():
        raise FileNotFoundError(f"evaluate: masks must hold one for each image, got no {path}.")
    image = require("PIL.Image", "train")
    with image.open(path) as picture:
        if picture.mode not in ("L", "P", "1"):
            raise ValueError(
                f"evaluate: {path} must be a PNG of class numbers in one channel of 8 bits, got "
                f"mode {picture.mode}."
            )
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        square = picture.resize((size, size), image.Resampling.NEAREST, box=box)
        return torch.from_numpy(np.array(square)).long()
