"""A data set that is a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TensorSource:
    """Images held in memory.

    Args:
        name: what `fastssl.data.load` calls it.
        images: (N, C, H, W) uint8.
        labels: (N,) int64, -1 where there is none.
        class_names: one name a class.
        mirror: whether a mirror image still shows the same thing (not so for digits and text).
    """

    corrupt: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        mirror: bool = True,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"TensorSource: images must be uint8 (N, C, H, W), got {images.dtype} "
                f"{tuple(images.shape)}."
            )
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
        """Images (B, C, H, W) uint8 and labels (B,) int64 of samples `index` (B,)."""
        return self.images[index], self.labels[index]
