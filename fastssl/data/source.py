"""A data set that is a tensor."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .folder import number_names


class TensorSource:
    """Images held in memory.

    Args:
        name: what `fastssl.data.load` calls it.
        images: (N, C, H, W) uint8, or float32 in [0, 1].
        labels: (N,) int64, -1 where there is none; or (N, classes) of 0 and 1.
        class_names: one name a class.
        mirror: whether a mirror image still shows the same thing (not so for digits and text).

    Raises:
        TypeError: images or labels of another dtype or shape. ValueError: float images with NaN or
            values outside [0, 1]; the message names samples.
    """

    corrupt: Mapping[str, str] = {}

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        mirror: bool = True,
    ):
        dtype = getattr(images, "dtype", None)
        if dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
            raise TypeError(
                "TensorSource: images must be a tensor (N, C, H, W), uint8 or float32 in [0, 1], "
                f"got {_kind(images)}."
            )
        N, C = len(images), len(class_names)
        if getattr(labels, "dtype", None) != torch.int64 or labels.shape not in ((N,), (N, C)):
            raise TypeError(
                f"TensorSource: labels must be a tensor ({N},) int64, one an image, or ({N}, {C}) "
                f"of 0 and 1, got {_kind(labels)}. Without labels give torch.full(({N},), -1)."
            )
        if images.is_floating_point() and images.numel():
            _refuse_strange_values(images)
        self.name = name
        self.images = images
        self.labels = labels
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.channels = images.shape[1]
        self.image_size = images.shape[-1]
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int | Tensor, int]:
        """Image, label (a vector, where there are several an image), and i."""
        label = self.labels[i]
        return self.images[i], label if label.ndim else int(label), i

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B, ...) int64 of samples `index` (B,), where they lie."""
        return self.images[index], self.labels[index]

    def to(self, device: torch.device | str) -> "TensorSource":
        """The same data set on a device."""
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved


def tensor_file(path: str | Path, split: str = "train") -> TensorSource:
    """The images in a `.npz`, `.pt` or `.safetensors` file; nothing is unpickled.

    Arrays `train_images` and `test_images` (or `val_images`), with `..._labels`, are the splits;
    one of `images`, with `labels`, is all for training. Images are (N, C, H, W), (N, H, W) or
    (N, H, W, C) with C of 1, 3 or 4, uint8 or float32 in [0, 1]; labels whole numbers (N,), (N, 1)
    or, of several classes an image, (N, classes).

    Raises:
        FileNotFoundError: no such split. ValueError: the file cannot be read without unpickling,
            holds no images, or images or labels of another shape, dtype or range.
    """
    path = Path(path).expanduser().resolve()
    arrays = _read_arrays(path)
    prefixes = ("test_", "val_") if split == "test" else ("train_", "")
    prefix = next((p for p in prefixes if f"{p}images" in arrays), None)
    if prefix is None:
        wanted = " or ".join(f"{p}images" for p in prefixes)
        kind = FileNotFoundError if split == "test" else ValueError
        raise kind(f"load: {path} must hold {wanted}, got {', '.join(arrays) or 'nothing'}.")
    images = arrays[f"{prefix}images"]
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3, 4) and images.shape[3] in (1, 3, 4):
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = arrays.get(f"{prefix}labels", torch.full((len(images),), -1))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not labels.is_floating_point():
        labels = labels.long()
    if labels.ndim == 2:
        classes = labels.shape[1]
    else:  # over both splits, since one may lack the last class
        parts = (arrays[key] for key in arrays if key.endswith("labels"))
        classes = 1 + max((int(x.max()) for x in parts if x.numel()), default=-1)
    least, most = (0, 1) if labels.ndim == 2 else (-1, torch.inf)
    if not labels.is_floating_point() and ((labels < least) | (labels > most)).any():
        raise ValueError(
            f"load: {path} must hold labels from 0 on, -1 where there is none, or (N, classes) of "
            f"0 and 1, got {int(labels.min())} to {int(labels.max())} in {prefix}labels."
        )
    names = number_names(classes - 1, f"labels in {path}")
    try:
        return TensorSource(str(path), images, labels, names)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {path} does not fit. {error}") from None


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(file[key]) for key in file.files}
        if path.suffix == ".safetensors":
            return require("safetensors.torch", "train").load_file(path)
        arrays = torch.load(path, map_location="cpu", weights_only=True)
        return {key: x for key, x in arrays.items() if isinstance(x, Tensor)}
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"load: {path} must hold numbers by name, readable without unpickling, got "
            f"{type(error).__name__}: {reason[:200]}. Write it by numpy.savez, torch.save of a "
            "dict of tensors, or safetensors."
        ) from error


def _kind(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _refuse_strange_values(images: Tensor) -> None:
    low, high = images.flatten(1).aminmax(dim=1)  # NaN where there is one
    strange = (~((low >= 0) & (high <= 1))).nonzero()[:, 0].tolist()
    if strange:
        shown = ", ".join(map(str, strange[:10])) + (", ..." if len(strange) > 10 else "")
        raise ValueError(
            "TensorSource: float images must lie in [0, 1] without NaN, got other values in "
            f"{len(strange)} of {len(images)} samples: {shown}. Scale them, or leave those out."
        )
