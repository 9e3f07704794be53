"""Features of every image in a folder, with the files' names."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..augment import pack
from ..data import decode
from ..data.images import EXTENSIONS, PASSING
from ..data.listing import listing
from ..extras import require
from ..outputs import check_file
from ..train.checkpoint import replacing
from .features import frozen
from .networks import open_network


@dataclass(frozen=True)
class Embedding:
    """Features of images, row by row."""

    features: Tensor
    """(N, D) float32."""
    paths: list[str]
    """The N files, below the folder, in the order of their names."""
    corrupt: dict[str, str]
    """Files that could not be read, and why; they have no row."""


def embed(
    what: str | os.PathLike | nn.Module,
    folder: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    backbone: str | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    workers: int = 4,
    device: str = "auto",
) -> Embedding:
    """Features of every image below a folder, without augmentation: the backbone's output for the
    centre square, normalised as it is used to, in eval mode and float32.

    Args:
        what: a run's folder or a file of weights, either with `:teacher` at its end for the moving
            average; `timm:NAME` or `torchvision:NAME` for what they publish; or a module from
            (B, C, S, S) float32 to (B, D).
        folder: images, also in folders below it. Those below a hidden folder are passed over.
        out: a .npz file (arrays `features` and `paths`) or a .safetensors file (`features`, and in
            its metadata `paths`, a JSON list); None: none is written.
        backbone: name of the network that a file is of, where it does not say so itself.
        image_size: S in pixels; default: the network's own.
        batch_size: images per forward pass; bounds the memory. workers: threads that decode.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...

    Returns:
        The features, the paths and the files that could not be read.

    Raises:
        FileNotFoundError: no such folder or run, or no image that can be read.
        ValueError: a module without image_size or whose output is not (B, D), a run of images that
            are not RGB, weights that do not fit, or a wrong ending of out.
        IsADirectoryError, NotADirectoryError, PermissionError: out cannot be written.
        RuntimeError: the backbone changed its weights or BatchNorm statistics meanwhile.

    Example:
        >>> import skimage  # comes with pictures
        >>> pixels = torch.nn.Flatten()  # any module may stand for the backbone
        >>> embed(pixels, skimage.data_dir, image_size=8).features.shape[1]
        192
    """
    if out is not None and Path(out).suffix not in (".npz", ".safetensors"):
        raise ValueError(f"embed: out must end in .npz or .safetensors, got {str(out)!r}.")
    if out is not None:
        check_file("embed", out)
    network = open_network(what, image_size=image_size, backbone=backbone)
    inputs = network.inputs
    if inputs is None:
        raise ValueError("embed: image_size must be given with a module, got None.")
    if inputs.channels not in (3, None):
        raise ValueError(
            f"embed: {what} must take images of 3 channels, as files are read, got "
            f"{inputs.channels}. Give extract() the source instead."
        )
    root = Path(folder).expanduser().resolve()
    paths = _images(root)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network.backbone.to(device)
    rows, names, corrupt = [], [], {}
    with frozen(model), ThreadPoolExecutor(max(1, workers)) as threads:
        for start in range(0, len(paths), batch_size):
            part, images = paths[start : start + batch_size], []
            read = threads.map(lambda path: _read(path, 3 * inputs.size), part)
            for path, image in zip(part, read, strict=True):
                name = path.relative_to(root).as_posix()
                if isinstance(image, str):
                    corrupt[name] = image
                else:
                    images.append(image)
                    names.append(name)
            if images:
                x = inputs(pack(images)).to(device)
                rows.append(_rows(model(x), len(images)))
    if not rows:
        name, reason = next(iter(corrupt.items()))
        raise FileNotFoundError(
            f"embed: none of the {len(paths)} images in {folder} can be read; {name}: {reason}."
        )
    embedding = Embedding(torch.cat(rows), names, corrupt)
    if out is not None:
        _write(embedding, Path(out))
    return embedding


def _images(folder: Path) -> list[Path]:
    """Image files below a folder by name, without hidden ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"embed: {folder} must be a folder of images. Check the path.")
    found = sorted(map(Path, listing(str(folder)).below("")))
    if not found:
        known = ", ".join(sorted(EXTENSIONS))
        raise FileNotFoundError(f"embed: no images in {folder}. Expected files ending in {known}.")
    return found


def _read(path: Path, max_side: int) -> Tensor | str:
    """The image, or why it cannot be read."""
    try:
        return decode(path, max_side)
    except Exception as error:  # broken files raise many types
        if isinstance(error, OSError) and error.errno in PASSING:  # the machine's fault
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())


def _rows(h: Tensor, B: int) -> Tensor:
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != B:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(
            f"embed: backbone must return features (B, D) = ({B}, D), got {got}. Pool the feature "
            "map, or return one tensor."
        )
    return h.float().cpu()


def _write(embedding: Embedding, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        if out.suffix == ".npz":
            paths = np.array(embedding.paths)  # of text, which loads without pickle
            np.savez(file, features=embedding.features.numpy(), paths=paths)
        else:
            metadata = {"format": "pt", "paths": json.dumps(embedding.paths)}
            safetensors = require("safetensors.torch", "train")
            file.write(safetensors.save({"features": embedding.features}, metadata))
