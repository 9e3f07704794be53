"""Shards: tar files of images in the layout of webdataset, read in any order."""

import glob
import io
import itertools
import json
import os
import re
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import cache_path, keep
from .folder import no_test_split, number_names, part_of
from .images import EXTENSIONS, ImageSource

_OFFSET, _SIZE, _LABEL, _TEXT, _TEXT_SIZE = range(5)
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class ShardSource(ImageSource):
    """Images inside uncompressed tar files.

    Files of one name but for what follows its first dot are a sample: an image, and beside it
    `.cls` (a class number), or `.json` with a whole number `label`, and `.txt` (a caption). Samples
    without an image are left out.

    The place of every image is found out once, by the headers, and remembered. From then on an
    image is read by its place, so that shards are shuffled as a whole, over all ranks, and a run
    resumes exactly, at any step, as from a folder. They have to lie on a disk, not in a stream.

    Args:
        path: a tar file; a folder of them, where those with the word `test`, or else `val`, `valid`
            or `validation`, in their names or their folder's are the test split if others have
            `train`; or a pattern with `{000000..000012}`, `{a,b}`, `*` or `?`, whose test split has
            `test` or `val` in the place of `train`.
        split: "train" or "test".
        image_size, max_side: see `ImageSource`.

    Raises:
        FileNotFoundError: no such shards; no test split. ValueError: a shard is compressed, cut
            off, holds a name twice, two images in a sample, or no image; a label is no number.

    Memory: about 200 bytes a sample.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        spec = os.path.abspath(os.path.expanduser(path))
        self.shards = _find(spec, split)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_index, self.shards))
        self._names = list(itertools.chain.from_iterable(names for names, _ in parts))
        self._table = torch.from_numpy(np.concatenate([table for _, table in parts]))  # (N, 5)
        counts = torch.tensor([len(names) for names, _ in parts])
        self._shard = torch.arange(len(parts)).repeat_interleave(counts)
        labels = self._table[:, _LABEL].clone()
        class_names = number_names(int(labels.max()), f"labels in {spec}")
        super().__init__(f"shards:{spec}", labels, class_names, image_size, max_side)

    def captions(self, index: Tensor) -> list[str]:
        """The text of samples `index` (B,), "" where there is none."""
        texts = (self._bytes(self._shown(i), _TEXT, _TEXT_SIZE) for i in index.tolist())
        return [text.decode(errors="replace").strip() for text in texts]

    def where(self, i: int) -> str:
        return f"{self.shards[self._shard[i]]}: {self._names[i]}"

    def _open(self, i: int) -> io.BytesIO:
        return io.BytesIO(self._bytes(i, _OFFSET, _SIZE))

    def _bytes(self, i: int, offset: int, size: int) -> bytes:
        # Opened anew: threads share no position, and thousands of shards no limit of open files.
        with open(self.shards[self._shard[i]], "rb") as file:
            file.seek(int(self._table[i, offset]))
            return file.read(int(self._table[i, size]))


def _find(spec: str, split: str) -> list[str]:
    """The shards of one split, in a fixed order."""
    if os.path.isdir(spec):
        names = sorted(os.listdir(spec))
        if "train" in names and os.path.isdir(os.path.join(spec, "train")):
            names = [os.path.join(part, name) for part in names for name in _tars(spec, part)]
        else:
            names = _tars(spec)
        words = [(part_of(name) or "", name) for name in names]
        parts = {
            part: [name for word, name in words if word.startswith(part)]
            for part in ("train", "test", "val")
        }
        test = parts["test"] or parts["val"]
        if parts["train"] and test:
            names = test if split == "test" else parts["train"]
        elif split == "test":
            raise FileNotFoundError(
                f"load: {spec} has no test split: expected tar files with the word train in their "
                "names, and some with test or val. To train, or embed, none is needed."
            )
        if not names:
            raise FileNotFoundError(f"load: no .tar files in {spec}. Check the path.")
        return [os.path.join(spec, name) for name in names]
    if split == "test":
        folder, name = os.path.split(re.sub(r"\{[^{}]*\}", "*", spec))
        patterns = [os.path.join(folder, name.replace("train", part)) for part in ("test", "val")]
        found = next((sorted(f) for f in map(glob.glob, patterns) if f and "train" in name), None)
        if not found:
            raise FileNotFoundError(no_test_split(spec))
        return found
    found, missing = [], []
    for pattern in _braces(spec):
        matches = sorted(glob.glob(pattern)) if re.search(r"[*?[]", pattern) else [pattern]
        found += [path for path in matches if os.path.isfile(path)]
        if not matches or not os.path.isfile(matches[0]):
            missing.append(pattern)
    if missing:
        raise FileNotFoundError(
            f"load: no shard {missing[0]}"
            + (f", nor {len(missing) - 1} others of {spec}" if missing[1:] else "")
            + ". Check the path and the numbers in braces."
        )
    return found


def _tars(*path: str) -> list[str]:
    folder = os.path.join(*path)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.search(r"\.tar$|\.tar\.|\.tgz$", name))


def _braces(pattern: str) -> list[str]:
    """The pattern with `{000..012}` and `{a,b}` written out."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        names = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    else:
        names = names.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for name in names for whole in _braces(f"{head}{name}{tail}")]


def _index(shard: str) -> tuple[list[str], np.ndarray]:
    """Names of the images in a shard, and for each where it is: (n, 5) int64."""
    status = os.stat(shard)
    state = np.array([1, status.st_size, status.st_mtime_ns])  # the first is this format's version
    cached = cache_path("shards", shard)
    try:
        with np.load(cached) as file:
            if np.array_equal(file["state"], state):
                names = file["names"].tobytes().decode(errors="surrogateescape").split("\0")
                table = file["table"]
                if table.shape == (len(names), 5) and table.dtype == np.int64:
                    return names, table
    except Exception:  # of many types, where it is not what was written
        pass
    names, table = _scan(shard)
    buffer = io.BytesIO()
    text = np.frombuffer("\0".join(names).encode(errors="surrogateescape"), np.uint8)
    np.savez(buffer, state=state, names=text, table=table)
    keep(cached, buffer.getvalue())
    return names, table


def _scan(shard: str) -> tuple[list[str], np.ndarray]:
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    with open(shard, "rb") as file:
        head = file.read(6)
        for magic, tool in _PACKED.items():
            if head.startswith(magic):
                raise ValueError(
                    f"load: shard {shard} must be uncompressed, so that images are read by their "
                    f"place; they are compressed themselves. Unpack it with {tool}."
                )
        file.seek(0)
        for name, offset, size in _members(shard, file):
            folder, base = os.path.split(name)
            stem, _, extension = base.partition(".")
            if not stem:  # hidden
                continue
            parts = samples.setdefault(os.path.join(folder, stem), {})
            if extension.lower() in parts:
                raise ValueError(f"load: shard {shard} holds {name!r} twice. Write it anew.")
            parts[extension.lower()] = name, offset, size
        names, rows, without = [], [], []
        for key, parts in samples.items():
            images = [e for e in parts if f".{e}" in EXTENSIONS]
            if not images:
                without.append(key)
                continue
            if len(images) > 1:
                raise ValueError(
                    f"load: sample {key!r} of shard {shard} must have one image, got "
                    f"{', '.join(images)}. Others, such as masks, go by a name like mask.png."
                )
            name, offset, size = parts[images[0]]
            names.append(name)
            rows.append(
                (offset, size, _label(shard, file, parts), *parts.get("txt", (0, 0, 0))[1:])
            )
    if not rows:
        raise ValueError(
            f"load: shard {shard} holds no image in {len(samples)} samples. Expected files named "
            f"KEY.jpg, KEY.png, ...{f', got {without[0]}' if without else ''}."
        )
    if without:
        warnings.warn(
            f"{len(without)} samples of {shard} have no image and are left out, for instance "
            f"{without[0]!r}",
            stacklevel=2,
        )
    return names, np.array(rows, np.int64)


def _members(shard: str, file):
    """Name, offset and size of the files in a tar; its end must be marked."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(_damaged(shard, str(error))) from None
    file.seek(end)
    if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
        raise ValueError(_damaged(shard, f"no header at byte {end}"))


def _damaged(shard: str, reason: str) -> str:
    return (
        f"load: shard {shard} must be a whole tar file, got one that is cut off or damaged "
        f"({reason}). Copy or write it anew, or leave it out."
    )


def _label(shard: str, file, parts: dict[str, tuple[str, int, int]]) -> int:
    kind = next((kind for kind in ("cls", "json") if kind in parts), None)
    if kind is None:
        return -1
    name, offset, size = parts[kind]
    file.seek(offset)
    text = file.read(size).decode(errors="replace").strip()
    try:
        label = int(text) if kind == "cls" else json.loads(text).get("label", -1)
        if type(label) is int and label >= -1:
            return label
    except (ValueError, AttributeError):
        label = text
    rule = "a class number" if kind == "cls" else "a mapping whose `label` is a class number"
    raise ValueError(
        f"load: {name!r} in shard {shard} must be {rule} from 0 on, got {str(label)[:40]!r}."
    )
