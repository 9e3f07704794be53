"""Where images come from, and in which order."""

import os

from ..extras import nearest
from .builtin import digits, patches
from .captions import check_captions, draw_captions
from .cifar import cifar, find_cifar
from .dataset import DatasetSource, HuggingFaceSource
from .decode import decode
from .folder import FolderSource, ListSource
from .loader import Batch, batches, epoch_order, epoch_size, resident
from .mixture import Mixture, open_mixture
from .shapes import ShapesSource
from .shards import ShardSource
from .source import TensorSource, tensor_file

__all__ = [
    "Batch",
    "DatasetSource",
    "FolderSource",
    "HuggingFaceSource",
    "ListSource",
    "Mixture",
    "ShapesSource",
    "ShardSource",
    "TensorSource",
    "batches",
    "check_captions",
    "decode",
    "draw_captions",
    "epoch_order",
    "epoch_size",
    "load",
    "resident",
]

_BUILTIN = {"digits": digits, "patches": patches}
_PREFIXES = {"shards": ShardSource, "hf": HuggingFaceSource}
_SUFFIXES = {".txt": ListSource, ".csv": ListSource, ".tsv": ListSource, ".tar": ShardSource}
_TENSORS = (".npz", ".pt", ".safetensors")


def load(
    data,
    split: str = "train",
    image_size: int | None = None,
    max_side: int | None = None,
):
    """Open a data source.

    Args:
        data: a name or path:

            - `digits`, `patches`, `shapes` or a variant (see `ShapesSource`);
            - a folder of images (`FolderSource`), or a `.txt`, `.csv` or `.tsv` list of them
              (`ListSource`);
            - the folder of CIFAR-10's binary version (`cifar`);
            - `shards:` and a folder or pattern of tar files, or one `.tar` (`ShardSource`);
            - `hf:` and a data set of Hugging Face's library (`HuggingFaceSource`);
            - a `.npz`, `.pt` or `.safetensors` file of arrays (`TensorSource`);
            - `mix:` and a `.yaml` file, or YAML, of several of these (`Mixture`);

            or a source, which is given back, or any `torch.utils.data.Dataset` (`DatasetSource`).
        split: "train" or "test".
        image_size: side in pixels the images will be trained or evaluated at.
        max_side: longest side in pixels of encoded images, larger ones are reduced; default 3
            `image_size` (see `ImageSource`). The built-in sets and tensors have their own size.

    Returns:
        A source: `len(source)`; `source[i]` is (image uint8 (C, H, W), label int or -1, i);
        `source.batch(index)` is (images, labels int64 (B,)), images uint8 (B, C, H, W) or, of a
        folder, `fastssl.augment.Packed`; and the attributes name, class_names, num_classes,
        channels, image_size, mirror (whether a mirror image still shows the same thing), corrupt
        (the unreadable files met so far, with the reason). One with captions has
        `source.captions(index)`, a text for each of the samples index (B,), "" where there is none;
        several of an image stand in lines.

    Raises:
        ValueError: unknown split or prefix. FileNotFoundError: no such data, or no image in it.
        ImportError: a package that the data needs is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f'load: split must be "train" or "test", got {split!r}.')
    if not isinstance(data, (str, os.PathLike)):
        if hasattr(data, "batch"):
            return data
        return DatasetSource(data, image_size=image_size, max_side=max_side)
    name = os.fspath(data)
    prefix, _, rest = name.partition(":")
    if name in _BUILTIN:
        return _BUILTIN[name](split)
    if prefix == "shapes":
        return ShapesSource(name, split)
    if prefix in _PREFIXES and rest:
        return _PREFIXES[prefix](rest, split, image_size, max_side)
    if prefix == "mix" and rest:
        return open_mixture(rest, split, lambda part: load(part, split, image_size, max_side))
    if prefix == "python":
        raise ValueError(
            f"load: {name!r} was given in Python and has no file. Give the data again, or other "
            "data by name."
        )
    if rest and not os.path.exists(name):
        raise ValueError(
            f"load: data must begin with a known prefix, got {name!r}. "
            f"{nearest(prefix, (*_PREFIXES, 'mix', 'shapes'))}"
        )
    suffix = os.path.splitext(name)[1].lower()
    if suffix in (*_SUFFIXES, *_TENSORS) and not os.path.isdir(name):
        folder, base = os.path.split(os.path.abspath(os.path.expanduser(name)))
        if not os.path.isfile(os.path.join(folder, base)):
            there = os.listdir(folder) if os.path.isdir(folder) else ()
            others = [file for file in there if file.endswith(suffix)]
            hint = nearest(base, others) if others else ""
            raise FileNotFoundError(f"load: no file {base} in {folder}. {hint}".rstrip())
        if suffix in _TENSORS:
            return tensor_file(name, split)
        return _SUFFIXES[suffix](name, split, image_size, max_side)
    if folder := find_cifar(name):
        return cifar(folder, split)
    return FolderSource(name, split, image_size, max_side)
