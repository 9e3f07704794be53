"""Where images come from, and in which order."""

from .builtin import digits, patches
from .decode import decode
from .folder import FolderSource
from .loader import Batch, batches, epoch_order, resident
from .shapes import ShapesSource
from .source import TensorSource

__all__ = [
    "Batch",
    "FolderSource",
    "ShapesSource",
    "TensorSource",
    "batches",
    "decode",
    "epoch_order",
    "load",
    "resident",
]

_BUILTIN = {"digits": digits, "patches": patches}


def load(
    name_or_path: str,
    split: str = "train",
    image_size: int | None = None,
    max_side: int | None = None,
):
    """Open a data source.

    Args:
        name_or_path: `digits`, `patches`, `shapes` or a variant (see `ShapesSource`), or a folder
            of images.
        split: "train" or "test".
        image_size: side in pixels the images will be trained or evaluated at.
        max_side: longest side in pixels of a folder's images, larger ones are reduced; default 3
            `image_size` (see `FolderSource`). The built-in sets have their own size.

    Returns:
        A source: `len(source)`; `source[i]` is (image uint8 (C, H, W), label int or -1, i);
        `source.batch(index)` is (images, labels int64 (B,)), images uint8 (B, C, H, W) or, of a
        folder, `fastssl.augment.Packed`; and the attributes name, class_names, num_classes,
        channels, image_size, labels (N,), mirror (whether a mirror image still shows the same
        thing), corrupt (the unreadable files met so far, with the reason).

    Raises:
        ValueError: unknown split. FileNotFoundError: no such folder, or no image in it.
        ImportError: a package of the data set is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f'load: split must be "train" or "test", got {split!r}.')
    if str(name_or_path) in _BUILTIN:
        return _BUILTIN[str(name_or_path)](split)
    if str(name_or_path).partition(":")[0] == "shapes":
        return ShapesSource(str(name_or_path), split)
    return FolderSource(name_or_path, split, image_size, max_side)
