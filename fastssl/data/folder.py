"""A folder of images as a data set."""

import errno
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..augment import Packed, pack
from ..extras import require
from .decode import decode

EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
"""What the machine fails at, not the file: it may be read the next time."""
KEPT_BYTES = 1 << 30
"""Decoded images are kept in memory up to this many bytes: small folders are read once."""


class FolderSource:
    """Images below a folder, as RGB, each of its own size.

    Layouts: `train/` and `test/` (or `val/`) inside the folder are the splits; otherwise, if there
    are subfolders, every fifth image of each class is the test split; a flat folder without
    subfolders is unlabelled and all of it is for training. Subfolders are classes.

    How files are read is told at `fastssl.data.decode`. A file that cannot be read is reported
    once, listed with the reason in `corrupt`, and replaced, always, by the next readable one. What
    the machine fails at (too many open files, no memory, no answer of a disk or network: an OSError
    with one of the numbers in `PASSING`) is raised instead, since the file may be whole.

    Args:
        path: the folder.
        split: "train" or "test".
        image_size: side in pixels of the views to be made; default 64.
        max_side: longer sides are reduced to this many pixels; default 3 `image_size`, so that a
            crop of 8 % of a photograph is enlarged about one and a half times.

    Raises:
        FileNotFoundError: no such folder, no image in it, or no test split in a flat folder.
        ValueError: max_side is below 1.
    """

    channels = 3
    mirror = True

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        require("PIL.Image", "train")  # missing, it is no reason to call every file unreadable
        root = Path(path).expanduser().resolve()
        if not root.is_dir():
            raise FileNotFoundError(
                "load: data must be 'digits', 'patches', 'shapes' or a folder of images, got "
                f"{str(path)!r}{', which is a file' if root.is_file() else ': no such folder'}. "
                "Check the path (subfolders are taken as labels)."
            )
        if max_side is not None and max_side < 1:
            raise ValueError(f"load: max_side must be at least 1 pixel, got {max_side}.")
        self.name = str(root)
        self.image_size = image_size or 64
        self.max_side = max_side or 3 * self.image_size
        self.class_names, self.paths, labels = _list_split(root, split)
        self.num_classes = len(self.class_names)
        self.labels = torch.tensor(labels)
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT_BYTES
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        for step in range(len(self)):
            used = (i + step) % len(self)
            image = self._read(used)
            if image is not None:
                return image, int(self.labels[used]), i
        raise FileNotFoundError(f"load: none of the {len(self)} files in {self.name} is readable.")

    def batch(self, index: Tensor) -> tuple[Packed, Tensor]:
        """Images, packed since they differ in size, and labels (B,) int64 of samples `index`."""
        images, labels, _ = zip(*(self[i] for i in index.tolist()), strict=True)
        return pack(images), torch.tensor(labels)

    @property
    def corrupt(self) -> dict[str, str]:
        """The unreadable files met so far: the reason, by path."""
        with self._lock:
            return {str(self.paths[i]): reason for i, reason in sorted(self._reasons.items())}

    def _read(self, i: int) -> Tensor | None:
        if i in self._reasons:
            return None
        if i in self._kept:
            return self._kept[i]
        try:
            image = decode(self.paths[i], self.max_side)
        except Exception as error:
            # Pillow's decoders raise many types on broken files, MemoryError too (sizes in a PNG).
            if isinstance(error, OSError) and error.errno in PASSING:
                error.filename = str(self.paths[i])  # a failed read does not say of what
                raise
            # One line, in a message and in a list.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            with self._lock:
                if i in self._reasons:
                    return None
                self._reasons[i] = reason
            warnings.warn(
                f"cannot read {self.paths[i]} ({reason}); using the next image instead",
                stacklevel=2,
            )
            return None
        with self._lock:
            if i not in self._kept and image.numel() <= self._room:
                self._kept[i] = image
                self._room -= image.numel()
        return image


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
