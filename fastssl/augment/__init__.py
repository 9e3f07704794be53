"""Views of images: what they are, their random parameters, their pixels."""

from collections.abc import Sequence

from torch import Tensor

from .draws import Draws, draw
from .pixels import normalize, prepare, render
from .views import View, simclr, small

__all__ = ["Draws", "View", "augment", "draw", "normalize", "prepare", "render", "simclr", "small"]


def augment(
    images: Tensor, index: Tensor, views: Sequence[View], *, seed: int, epoch: int
) -> list[Tensor]:
    """Random views of a batch, a pure function of (seed, epoch, index, number of the view).

    Args:
        images: (B, C, H, W) uint8.
        index: (B,) int64, the samples' numbers in their data set.
        views: one description a view.
        seed: of the run. epoch: of the pass over the data.

    Returns:
        One (B, C, size, size) float32 a view. The same image gives the same bits in any batch.
    """
    shape = tuple(images.shape[1:])
    return [
        render(images, view, draw(view, index, seed=seed, epoch=epoch, number=n, shape=shape))
        for n, view in enumerate(views)
    ]
