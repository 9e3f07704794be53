"""A folder of images as a data set."""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require

EXTENSIONS = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
CACHE_BYTES = 1 << 30
"""A folder whose decoded images fit into this many bytes is read once and kept in memory."""

_UNREAD, _GOOD, _CORRUPT = range(3)


class FolderSource:
    """Images below a folder, as RGB.

    Layouts: `train/` and `test/` (or `val/`) inside the folder are the splits; otherwise, if there
    are subfolders, every fifth image of each class is the test split; a flat folder without
    subfolders is unlabelled and all of it is for training. Subfolders are classes.

    An image is resized so that its short side is 1.5 `image_size` and its centre is cut to a
    square: an average random crop then has about as many pixels as the view made from it. EXIF
    orientation is ignored. A file that cannot be decoded is reported once, listed in `corrupt`, and
    replaced, always, by the next readable one.

    Args:
        path: the folder.
        split: "train" or "test".
        image_size: side in pixels of the views to be made; default 64.

    Raises:
        FileNotFoundError: no such folder, no image in it, or no test split in a flat folder.
    """

    channels = 3
    mirror = True

    def __init__(self, path: str | Path, split: str = "train", image_size: int | None = None):
        self._pillow = require("PIL.Image", "train")
        root = Path(path).expanduser().resolve()
        if not root.is_dir():
            raise FileNotFoundError(
                f"load: data must be 'digits', 'patches' or a folder of images, got {str(path)!r}"
                f"{', which is a file' if root.is_file() else ': no such folder'}. "
                "Check the path (subfolders are taken as labels)."
            )
        self.name = str(root)
        self.image_size = image_size or 64
        self._side = round(1.5 * self.image_size)
        self.class_names, self.paths, labels = _list_split(root, split)
        self.num_classes = len(self.class_names)
        self.labels = torch.tensor(labels)
        self._state = torch.full((len(self.paths),), _UNREAD, dtype=torch.uint8)
        self._lock = threading.Lock()
        fits = len(self.paths) * 3 * self._side**2 <= CACHE_BYTES
        shape = (len(self.paths), 3, self._side, self._side)
        self._cache = torch.empty(shape, dtype=torch.uint8) if fits else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        for step in range(len(self)):
            used = (i + step) % len(self)
            image = self._read(used)
            if image is not None:
                return image, int(self.labels[used]), i
        raise FileNotFoundError(f"load: none of the {len(self)} files in {self.name} is readable.")

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, side, side) uint8 and labels (B,) int64 of samples `index` (B,)."""
        if self._cache is not None and bool((self._state[index] == _GOOD).all()):
            return self._cache[index], self.labels[index]
        images, labels, _ = zip(*(self[i] for i in index.tolist()), strict=True)
        return torch.stack(images), torch.tensor(labels)

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Paths of the unreadable files met so far."""
        return tuple(str(self.paths[i]) for i in (self._state == _CORRUPT).nonzero()[:, 0])

    def _read(self, i: int) -> Tensor | None:
        if self._state[i] == _CORRUPT:
            return None
        if self._state[i] == _GOOD and self._cache is not None:
            return self._cache[i]
        try:
            image = self._decode(self.paths[i])
        except Exception as error:  # Pillow's decoders raise many types on broken files
            with self._lock:
                if self._state[i] != _CORRUPT:
                    self._state[i] = _CORRUPT
                    warnings.warn(
                        f"cannot read {self.paths[i]} ({type(error).__name__}: {error}); "
                        "using the next image instead",
                        stacklevel=2,
                    )
            return None
        if self._cache is not None:
            self._cache[i] = image
        self._state[i] = _GOOD
        return image

    def _decode(self, path: Path) -> Tensor:
        """(3, side, side) uint8."""
        with self._pillow.open(path) as picture:
            picture.draft("RGB", (self._side, self._side))  # JPEG: decode at a reduced scale
            if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip
                pixels = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                rgb = self._pillow.fromarray(pixels).convert("RGB")
            else:
                rgb = picture.convert("RGB")
        width, height = rgb.size
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        rgb = rgb.resize(
            (self._side, self._side),
            self._pillow.Resampling.BICUBIC,
            box=(left, top, left + square, top + square),
        )
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _images_below(folder: Path) -> list[Path]:
    """Image files below a folder in a fixed order, without hidden files."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    return sorted(found)


def _list_split(root: Path, split: str) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, paths and labels of one split. Files beside the class folders get label -1."""
    subfolders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] != "."}
    test = next((subfolders[name] for name in ("test", "val") if name in subfolders), None)
    explicit = "train" in subfolders and test is not None
    if explicit:
        # Both parts' classes, so that a class that one of them lacks does not shift the labels.
        parts = (subfolders["train"], test)
        classes = {p.name for part in parts for p in part.iterdir() if p.is_dir()}
        root = parts[split == "test"]
        subfolders = {name: root / name for name in sorted(classes) if name[0] != "."}
    found = {name: _images_below(folder) for name, folder in subfolders.items()}
    names = tuple(name for name, paths in found.items() if paths or explicit)
    loose = [p for p in sorted(root.iterdir()) if p.is_file()]
    loose = [p for p in loose if p.name[0] != "." and p.suffix.lower() in EXTENSIONS]
    if not any(found.values()) and not loose:
        raise FileNotFoundError(
            f"load: no images in {root}. Expected files ending in "
            f"{', '.join(sorted(EXTENSIONS))}, directly or in one subfolder a class."
        )
    if not names and split == "test" and not explicit:
        raise FileNotFoundError(
            f"load: {root} is a flat folder without labels, so it has no test split. "
            "Put the images into one subfolder a class, or into train/ and test/."
        )
    paths, labels = [], []
    for label, name in enumerate(names):
        for number, path in enumerate(found[name]):
            if explicit or (number % 5 == 4) == (split == "test"):
                paths.append(path)
                labels.append(label)
    if explicit or split == "train":
        paths += loose
        labels += [-1] * len(loose)
    if not paths:
        raise FileNotFoundError(
            f"load: {root} has fewer than five images a class, too few for a test split (every "
            "fifth image). Add images or make train/ and test/ folders."
        )
    return names, paths, labels
