"""CIFAR-10 as its authors publish it, in the binary version."""

from pathlib import Path

import numpy as np
import torch

from .source import TensorSource

_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
_RECORD = 1 + 3 * 32 * 32  # the label, then the image (3, 32, 32)
_INSIDE = "cifar-10-batches-bin"


def find_cifar(path: str | Path) -> Path | None:
    """The folder of CIFAR-10's files: `path` or the one inside that the archive unpacks to; None if
    neither is.

    Raises:
        ValueError: it is the version for Python, which would have to be unpickled.
    """
    path = Path(path).expanduser().resolve()
    for folder in (path, path / _INSIDE):
        if (folder / "data_batch_1.bin").is_file():
            return folder
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            raise ValueError(
                f"load: {folder} holds the Python version of CIFAR-10, got pickled files. "
                "Unpickling runs whatever code a file brings. Take the binary version "
                f"(cifar-10-binary.tar.gz, of the same page), and give its folder {_INSIDE}."
            )
    return None


def cifar(folder: Path, split: str = "train") -> TensorSource:
    """50,000 images to train on and 10,000 to test, 32 x 32 RGB, of ten classes.

    Args:
        folder: with data_batch_1.bin to data_batch_5.bin and test_batch.bin.
        split: "train" or "test".

    Raises:
        FileNotFoundError: a file is missing. ValueError: one is cut off or something else.
    """
    names = ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    parts = []
    for path in (folder / f"{name}.bin" for name in names):
        if not path.is_file():
            raise FileNotFoundError(
                f"load: {path} is missing. Unpack cifar-10-binary.tar.gz again."
            )
        records = np.fromfile(path, np.uint8)
        if not records.size or records.size % _RECORD:
            raise ValueError(
                f"load: {path} must hold records of {_RECORD} bytes, got {records.size} bytes. "
                "Unpack cifar-10-binary.tar.gz again."
            )
        parts.append(torch.from_numpy(records.reshape(-1, _RECORD)))
    records = torch.cat(parts)
    labels = records[:, 0].long()
    if labels.max() >= len(_CLASSES):
        raise ValueError(
            f"load: {folder} must hold labels from 0 to 9, got {int(labels.max())}. CIFAR-100 has "
            "another layout: save its arrays as .npz."
        )
    images = records[:, 1:].reshape(-1, 3, 32, 32).contiguous()
    return TensorSource(str(folder), images, labels, _CLASSES)
