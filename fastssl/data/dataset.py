"""Data sets of other libraries: Hugging Face's, and any that gives samples by number."""

import io
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..augment.packed import check_images
from ..extras import nearest, require
from .decode import pixels
from .folder import number_names, part_of
from .images import ImageSource, Misfit

_IMAGE_KEYS = ("image", "img", "pixel_values", "x", "jpg", "png")
_LABEL_KEYS = ("label", "labels", "fine_label", "target", "y", "cls")


class DatasetSource(ImageSource):
    """Any `torch.utils.data.Dataset` that gives a sample by its number.

    A sample is an image; a tuple that begins with an image and, if there is one, a label; or a
    mapping with the image under `image`, `img`, `pixel_values`, `x`, `jpg` or `png` and the label
    under `label`, `labels`, `fine_label`, `target`, `y` or `cls`. An image is Pillow's, which is
    taken as a file would be; a tensor (C, H, W), or (H, W), uint8 or float32 in [0, 1]; or a numpy
    array (H, W, C) or (H, W) of these. A label is a whole number, -1 or None for none, or a vector
    of 0 and 1. The first and last sample are read at once, to see what they are.

    What raises an exception when asked for counts as unreadable. Random transforms of the data
    set's own are drawn in threads and follow no seed: leave them to the views. All labels are known
    from `dataset.targets`, if it begins and ends as the samples do and there is no
    `target_transform`; otherwise who asks for `labels`, as evaluation does, has the data set read
    once from end to end.

    Args:
        dataset: with `len` and `[i]`, which may be called from several threads.
        name: how the run's files call it.
        class_names: default: `dataset.classes`, or numbers up to the largest of `targets`. Without
            any of them there are labels, but no classes that a monitor could tell apart.
        mirror: whether a mirror image still shows the same thing (not so for digits and text).
        image_size, max_side: see `ImageSource`; `max_side` for Pillow's images.

    Raises:
        TypeError: no `len` or no `[i]`. ValueError: a sample is none of these, the length is not
            true, images differ in channels or dtype.
    """

    def __init__(
        self,
        dataset: Any,
        name: str | None = None,
        *,
        class_names: list[str] | None = None,
        mirror: bool = True,
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        kind = type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"load: a data set must have len() and give samples by [i], got {kind}. Streams "
                "have no number of a sample: write them to files, or to shards."
            )
        if len(dataset) < 1:
            raise ValueError(f"load: data set {kind} must hold samples, got length {len(dataset)}.")
        self._dataset = dataset
        super().__init__(name or f"python:{kind}", None, None, image_size, max_side)
        self.mirror = mirror
        self._room = 0  # the data set may keep them itself
        self._form = None
        ends = []
        for i in (0, len(dataset) - 1):
            try:
                image, label = self._load(i)
            except IndexError as error:
                raise ValueError(
                    f"load: data set {kind} must give a sample for each number below its length "
                    f"{len(dataset)}, got IndexError for {i}: {error}."
                ) from error
            except OSError:  # a broken file; what fails otherwise is no file
                image, label, _ = self[i]
            self._form = self._form or (len(image), image.dtype)
            ends.append(torch.as_tensor(label))
        self.channels = self._form[0]
        self._targets = _targets(dataset, ends)
        class_names = class_names or getattr(dataset, "classes", None)
        if class_names is None and ends[0].ndim:
            class_names = number_names(len(ends[0]) - 1, f"labels of {self.name}")
        elif class_names is None and self._targets is not None:
            class_names = number_names(int(self._targets.max()), f"targets of {self.name}")
        self.class_names = tuple(class_names or ())

    @cached_property
    def labels(self) -> Tensor:
        """(N,) or (N, classes) int64."""
        if self._targets is not None:
            return self._targets
        return torch.stack([torch.as_tensor(self[i][1]) for i in range(len(self))])

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def _load(self, i: int) -> tuple[Tensor, int | Tensor]:
        sample = self._dataset[i]
        image, label = self._parts(i, sample)
        image, label = self._image(i, image), self._label(i, label)
        if self._form and (len(image), image.dtype) != self._form:
            C, dtype = self._form
            raise Misfit(
                f"load: {self.where(i)} must have {C} channels of {dtype} as the first sample has, "
                f"got {len(image)} of {image.dtype}. Convert all to one mode."
            )
        return image, label

    def _parts(self, i: int, sample: Any) -> tuple[Any, Any]:
        if isinstance(sample, Mapping):
            key = next((key for key in _IMAGE_KEYS if key in sample), None)
            if key is None:
                raise Misfit(
                    f"load: {self.where(i)} must have an image under {', '.join(_IMAGE_KEYS)}, got "
                    f"the keys {', '.join(map(str, sample))}. Rename one."
                )
            label = next((key for key in _LABEL_KEYS if key in sample), None)
            return sample[key], None if label is None else sample[label]
        if isinstance(sample, (tuple, list)):
            return (*sample[:2], None)[:2] if len(sample) else (None, None)
        return sample, None

    def _image(self, i: int, image: Any) -> Tensor:
        if hasattr(image, "getbands"):  # Pillow's
            return pixels(image, self.max_side)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image))
            image = image.permute(2, 0, 1) if image.ndim == 3 else image
        if isinstance(image, Tensor) and image.ndim == 2:
            image = image[None]
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = type(image).__name__
            if isinstance(image, Tensor):
                got = f"{image.dtype} {tuple(image.shape)}"
            raise Misfit(
                f"load: {self.where(i)} must be an image of Pillow, a tensor (C, H, W) or an array "
                f"(H, W, C), got {got}."
            )
        try:
            check_images(f"load: {self.where(i)}", image)
        except (TypeError, ValueError) as error:
            raise Misfit(str(error)) from None
        if image.is_floating_point():
            low, high = (x.item() for x in image.aminmax())
            if not (low >= 0 and high <= 1):
                raise Misfit(
                    f"load: {self.where(i)} must lie in [0, 1] without NaN, got {low} to {high}. "
                    "Scale it; what views need is normalised later."
                )
        return image

    def _label(self, i: int, label: Any) -> int | Tensor:
        if label is None:
            return -1
        try:
            whole = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError):
            whole = None
        if whole is None or whole.is_floating_point() or whole.ndim > 1:
            raise Misfit(
                f"load: the label of {self.where(i)} must be a whole number or a vector of 0 and "
                f"1, got {label!r}. Number the classes from 0 on."
            )
        return whole.long() if whole.ndim else int(whole)


def _targets(dataset: Any, ends: list[Tensor]) -> Tensor | None:
    """All labels, as torchvision's data sets have them; None where they are not the samples'."""
    whole = getattr(dataset, "dataset", None) if hasattr(dataset, "indices") else dataset
    if getattr(whole, "target_transform", None) is not None:
        return None
    targets = getattr(whole, "targets", None)
    try:
        labels = torch.as_tensor(targets).long()
    except (TypeError, ValueError, RuntimeError):  # none, boxes, names
        return None
    if whole is not dataset:  # torch.utils.data.Subset
        labels = labels[torch.as_tensor(dataset.indices)]
    if len(labels) != len(dataset):
        return None
    fit = (torch.equal(a, b) for a, b in zip(ends, labels[[0, -1]], strict=True))
    return labels if all(fit) else None


class HuggingFaceSource(ImageSource):
    """A data set of the `datasets` library: one feature of images, and perhaps one of labels.

    Args:
        name: `PATH_OR_NAME`, or `PATH_OR_NAME:SPLIT`. A folder that `save_to_disk` wrote, a parquet
            or arrow file or a folder of them, or what `load_dataset` knows by name and has stored
            or can fetch. Code of a data set's own is never run. Without SPLIT the training split is
            `train`; the test split is `test`, `validation`, `valid` or `val`.
        split: "train" or "test".
        image_size, max_side: see `ImageSource`.

    Raises:
        ImportError: `datasets` is missing. FileNotFoundError: no such data set or split.
        ValueError: no feature of images, or several; labels that are no classes.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        library = require("datasets", "hf")
        path, _, own_split = name.partition(":")
        if os.path.exists(os.path.expanduser(path)):
            path = os.path.abspath(os.path.expanduser(path))
        rows = _one_split(_open_dataset(library, path), own_split, split, path)
        images = [k for k, kind in rows.features.items() if isinstance(kind, library.Image)]
        if len(images) != 1:
            raise ValueError(
                f"load: hf:{path} must have one feature of images, got {len(images)} in "
                f"{', '.join(rows.features)}. Cast or drop columns, then save_to_disk."
            )
        # Encoded, so that `decode` can reduce a JPEG while it is read.
        self._rows = rows.select_columns(images).cast_column(images[0], library.Image(decode=False))
        self._column = images[0]
        label = next((key for key in _LABEL_KEYS if key in rows.features), None)
        labels, class_names = torch.full((len(rows),), -1), ()
        if label is not None:
            labels = _class_numbers(rows, label, f"{label!r} of hf:{path}")
            class_names = getattr(rows.features[label], "names", None) or number_names(
                int(labels.max()), f"{label!r} of hf:{path}"
            )
        where = f"hf:{path}" + (f":{own_split}" if own_split else "")
        super().__init__(where, labels, class_names, image_size, max_side)

    def where(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def _open(self, i: int) -> str | io.BytesIO:
        image = self._rows[i][self._column]
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


def _open_dataset(library, path: str):
    if not os.path.exists(path):
        try:
            return library.load_dataset(path)
        except Exception as error:  # of many types, from the library and from the network
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileNotFoundError(
                f"load: no data set hf:{path}: neither a file or folder here nor one that "
                f"datasets.load_dataset can open ({reason})."
            ) from error
    folder = Path(path)
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return library.load_from_disk(path)
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    files = files or sorted(folder.rglob("*.arrow"))
    kinds = {file.suffix for file in files}
    if not files or not kinds <= {".parquet", ".arrow"}:
        raise FileNotFoundError(
            f"load: hf:{path} must be what save_to_disk wrote, or parquet or arrow files, got "
            "none of these. A folder of images needs no hf:."
        )
    splits: dict[str, list[str]] = {}
    for file in files:
        name = file.name if file == folder else str(file.relative_to(folder))
        part = part_of(name) or "train"
        splits.setdefault(part, []).append(str(file))
    return library.load_dataset(files[0].suffix[1:], data_files=splits)


def _one_split(found, own_split: str, split: str, path: str):
    """The wanted part of what the library opened: one data set, or several by split."""
    if not isinstance(found, Mapping):
        if split == "test" or own_split:
            raise FileNotFoundError(
                f"load: hf:{path} is one data set without splits, so it has no "
                f"{own_split or 'test'} split. Save a DatasetDict, or leave the split out."
            )
        return found
    wanted = ("test", "validation", "valid", "val") if split == "test" else (own_split or "train",)
    part = next((name for name in wanted if name in found), None)
    if part is None:
        raise FileNotFoundError(
            f"load: hf:{path} must have the split {' or '.join(wanted)}. "
            f"{nearest(wanted[0], found)} Name one of training as hf:PATH:SPLIT."
        )
    return found[part]


def _class_numbers(rows, column: str, where: str) -> Tensor:
    values = list(rows[column])
    wrong = next((v for v in values if v is not None and type(v) is not int), None)
    if wrong is not None:
        raise ValueError(
            f"load: {where} must hold class numbers, got {wrong!r}. Make it a ClassLabel with "
            "class_encode_column, or drop it."
        )
    return torch.tensor([-1 if v is None else v for v in values])
