"""A data set that is a tensor."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.images[i], int(self.labels[i]), i

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B, ...) int64 of samples `index` (B,), where they lie."""
        return self.images[index], self.labels[index]

    def to(self, device: torch.device | str) -> "TensorSource":
        """The same data set on a device."""
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved


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
