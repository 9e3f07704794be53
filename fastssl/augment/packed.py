"""Images of any sizes in one buffer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST_SIDE = 1 << 19
"""Pixels. Crops are float32 numbers of pixels, which must tell neighbouring ones well apart."""


@dataclass(frozen=True)
class Packed:
    """B images of one number of channels and of any sizes, one after another; see `pack`."""

    pixels: Tensor
    """(P,) uint8, or float32 in [0, 1]."""
    offsets: Tensor
    """(B,) int64: image b is (C, H, W) from here on."""
    sizes: Tensor
    """(B, 2) int64: H and W in pixels."""
    channels: int

    def __len__(self) -> int:
        return len(self.offsets)

    def to(self, device, *, non_blocking: bool = False) -> "Packed":
        pixels, offsets, sizes = (
            x.to(device, non_blocking=non_blocking) for x in (self.pixels, self.offsets, self.sizes)
        )
        return Packed(pixels, offsets, sizes, self.channels)


def check_images(name: str, x: Tensor) -> None:
    """Of one image or of a batch: what pixels must be, and how large."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.uint8, torch.float32):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name}: images must be uint8, or float32 in [0, 1], got {got}. Convert them: 16-bit "
            "images divided by 65535, 16-bit floats by .float()."
        )
    shape = x.shape if x.dim() == 3 else x.shape[1:]  # no images at all are a batch, too
    if x.dim() > 2 and (0 in shape or max(shape[-2:]) > LONGEST_SIDE):
        raise ValueError(
            f"{name}: images must have a channel and sides of 1 to {LONGEST_SIDE} pixels, "
            f"got {tuple(x.shape)}."
        )


def pack(images: Sequence[Tensor]) -> Packed:
    """One buffer of images that differ in size.

    Args:
        images: each (C, H, W), on one device; all uint8, or all float32 in [0, 1]; one C for all.

    Returns:
        A copy of them.

    Raises:
        TypeError: another dtype, or several. ValueError: no image, another shape, an image without
            pixels, or several numbers of channels.

    Example:
        >>> from fastssl.augment import pack
        >>> pack([torch.zeros(3, 20, 30), torch.zeros(3, 9, 5)]).sizes.tolist()
        [[20, 30], [9, 5]]
    """
    images = list(images)
    if not images:
        raise ValueError("pack: images must be at least one image, got none.")
    first = images[0]
    for number, image in enumerate(images):
        check_images("pack", image)
        if image.dim() != 3 or image.shape[0] != first.shape[0]:
            raise ValueError(
                f"pack: images must be (C, H, W) with one C for all, got {tuple(image.shape)} for "
                f"image {number} and {tuple(first.shape)} for the first. Convert them to one mode."
            )
        if image.dtype != first.dtype:
            raise TypeError(
                f"pack: images must have one dtype, got {image.dtype} for image {number} and "
                f"{first.dtype} for the first."
            )
    lengths = torch.tensor([0] + [image.numel() for image in images[:-1]])
    return Packed(
        torch.cat([image.reshape(-1) for image in images]),
        lengths.cumsum(0).to(first.device),
        torch.tensor([image.shape[1:] for image in images], device=first.device),
        first.shape[0],
    )
