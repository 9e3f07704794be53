"""Views by any function of an image."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..random import CUSTOM, words
from .packed import Packed
from .views import Resize, View


@dataclass(frozen=True, eq=False)
class Custom:
    """A view by a function of one image, for instance a transform of torchvision v2 or kornia.

    It may stand wherever a `View` may. It is slow: the function is called for one image after the
    other, on the CPU, between the steps; and images on a GPU travel there and back.

    Args:
        function: from (C, H, W) on the CPU, uint8 or float32 in [0, 1] as the images are, to
            floating point (C, size, size), normalised as the network wants it.
        size: side of its result in pixels.

    Raises:
        TypeError: function is none, or returns something else. ValueError: a size that is none.

    Notes: torch's, numpy's and Python's generators are seeded by (seed, epoch, sample, view) before
        every call and put back after the last, so that a function which draws from them gives the
        same view in any batch, on any rank and after a resume. Frames of a clip share the seed.

    Example:
        >>> from fastssl.augment import Custom, augment
        >>> tile = Custom(lambda x: x[:, :8, :8] / 255 + 0.1 * torch.rand(3, 8, 8), 8)
        >>> images = torch.zeros(4, 3, 64, 48, dtype=torch.uint8)
        >>> augment(images, torch.arange(4), [tile], seed=0, epoch=0)[0].shape
        torch.Size([4, 3, 8, 8])
    """

    function: Callable[[Tensor], Tensor]
    size: int

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(f"Custom: function must be callable, got {self.function!r}.")
        Resize(self.size)  # refuses what is no size

    def numbers(self) -> list[float]:
        """As `View.numbers`: of the whole image, since nothing is known about the function."""
        return View(Resize(self.size)).numbers()

    def render(self, images: Packed, index: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
        """(B, C, size, size) on the CPU, of samples `index` (B,)."""
        images = images.to("cpu")
        high, low = words(seed, CUSTOM, epoch, index.cpu(), view, 2).unbind(-1)
        seeds = ((high << 31) | (low >> 1)).tolist()
        where = zip(images.offsets.tolist(), images.sizes.tolist(), seeds, strict=True)
        results = []
        with _generators_kept():
            for offset, (H, W), number in where:
                torch.default_generator.manual_seed(number)  # that of the CPU alone
                random.seed(number)
                np.random.seed(number & 0xFFFFFFFF)
                pixels = images.pixels[offset : offset + images.channels * H * W]
                # A copy, which the function may change.
                x = self.function(pixels.view(-1, H, W).clone())
                results.append(self._checked(x, images.channels))
        if not results:
            return torch.empty(0, images.channels, self.size, self.size)
        return torch.stack(results)

    def _checked(self, x: Tensor, channels: int) -> Tensor:
        tensor = isinstance(x, Tensor)
        shape = (channels, self.size, self.size)
        if not tensor or x.shape != shape or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}" if tensor else type(x).__name__
            raise TypeError(
                f"Custom: function must return floating point (C, size, size) = {shape}, "
                f"got {got}. End torchvision's with ToDtype(torch.float32, scale=True)."
            )
        return x.detach()


@contextmanager
def _generators_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
