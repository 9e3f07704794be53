"""What all sources of encoded images share: decoding, unreadable ones, and memory."""

import errno
import threading
import warnings
from collections.abc import Sequence
from typing import BinaryIO

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
"""Decoded images are kept in memory up to this many bytes: small data sets are read once."""


class Misfit(ValueError):
    """What a data set gives is no image of the set: the run must end, not pass it over."""


class ImageSource:
    """Images that are decoded when asked for, as RGB, each of its own size.

    How files are read is told at `fastssl.data.decode`. A file that cannot be read is reported
    once, listed with the reason in `corrupt`, and replaced, always, by the next readable one. What
    the machine fails at (too many open files, no memory, no answer of a disk or network: an OSError
    with one of the numbers in `PASSING`) is raised instead, since the file may be whole.

    A kind of source says where its images are: by `paths`, or by `_open` and `where`.

    Args:
        name: with this `fastssl.data.load` opens it again.
        labels: (N,) int64, -1 where there is none; None for a kind that finds them out itself.
        class_names: one name a class; None likewise.
        image_size: side in pixels of the views to be made; default 64.
        max_side: longer sides are reduced to this many pixels; default 3 `image_size`, so that a
            crop of 8 % of a photograph is enlarged about one and a half times.
    """

    channels = 3
    mirror = True
    paths: Sequence[str]

    def __init__(
        self,
        name: str,
        labels: Tensor | None,
        class_names: Sequence[str] | None,
        image_size: int | None,
        max_side: int | None,
    ):
        require("PIL.Image", "train")  # missing, it is no reason to call every file unreadable
        if max_side is not None and max_side < 1:
            raise ValueError(f"load: max_side must be at least 1 pixel, got {max_side}.")
        self.name = name
        if labels is not None:
            self.labels = labels
        if class_names is not None:
            self.class_names = tuple(class_names)
        self.image_size = image_size or 64
        self.max_side = max_side or 3 * self.image_size
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT_BYTES
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int | Tensor, int]:
        for step in range(len(self)):
            used = (i + step) % len(self)
            found = self._read(used)
            if found is not None:
                return *found, i
        raise FileNotFoundError(f"load: none of the {len(self)} files in {self.name} is readable.")

    def batch(self, index: Tensor) -> tuple[Packed, Tensor]:
        """Images, packed since they differ in size, and labels (B, ...) int64 of `index` (B,)."""
        images, labels, _ = zip(*(self[i] for i in index.tolist()), strict=True)
        return pack(images), torch.stack([torch.as_tensor(label) for label in labels])

    def _shown(self, i: int) -> int:
        """The sample whose image stands for that of i: i, or the next that can be read."""
        while i in self._reasons:
            i = (i + 1) % len(self)
        return i

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def corrupt(self) -> dict[str, str]:
        """The unreadable files met so far: the reason, by path."""
        with self._lock:
            return {self.where(i): reason for i, reason in sorted(self._reasons.items())}

    def where(self, i: int) -> str:
        """What a person looks for to see image i."""
        return self.paths[i]

    def _open(self, i: int) -> str | BinaryIO:
        """The encoded image, as `decode` takes it."""
        return self.paths[i]

    def _load(self, i: int) -> tuple[Tensor, int | Tensor]:
        """Image (C, H, W) and label. Raises anything on a broken file, Misfit to end the run."""
        return decode(self._open(i), self.max_side), int(self.labels[i])

    def _read(self, i: int) -> tuple[Tensor, int | Tensor] | None:
        """Image and label, or None if it cannot be read."""
        if i in self._reasons:
            return None
        if i in self._kept:
            return self._kept[i], int(self.labels[i])
        try:
            image, label = self._load(i)
        except Misfit:
            raise
        except Exception as error:
            # Pillow's decoders raise many types on broken files, MemoryError too (sizes in a PNG).
            if isinstance(error, OSError) and error.errno in PASSING:
                error.filename = self.where(i)  # a failed read does not say of what
                raise
            # One line, in a message and in a list.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            with self._lock:
                if i in self._reasons:
                    return None
                self._reasons[i] = reason
            warnings.warn(
                f"cannot read {self.where(i)} ({reason}); using the next image instead",
                stacklevel=2,
            )
            return None
        with self._lock:
            if i not in self._kept and image.numel() <= self._room:
                self._kept[i] = image
                self._room -= image.numel()
        return image, label
