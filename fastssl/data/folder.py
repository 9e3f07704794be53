"""A folder, or a list, of image files as a data set."""

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .images import EXTENSIONS, ImageSource
from .listing import Listing, listing

_TEST = ("test", "val", "valid", "validation")
_PARTS = re.compile(
    r"(?<![a-z])(train|test|validation|valid|val)(?:ing|val)?(?![a-z])", re.IGNORECASE
)


def part_of(path: str) -> str | None:
    """The split that a file is of, by the last word of its path that names one."""
    return next((word.lower() for word in reversed(_PARTS.findall(path))), None)


class FolderSource(ImageSource):
    """Images below a folder.

    Layouts: `train/` and `test/` (or `val/`, `valid/`, `validation/`) inside the folder are the
    splits; otherwise, if there are subfolders, every fifth image of each class is the test split; a
    flat folder without subfolders is unlabelled and all of it is for training. Subfolders are
    classes.

    Args:
        path: the folder.
        split: "train" or "test".
        image_size, max_side: see `ImageSource`.

    Raises:
        FileNotFoundError: no such folder, no image in it, or no test split in a flat folder.
        ValueError: max_side is below 1.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        root = Path(path).expanduser().resolve()
        if not root.is_dir():
            got = "which is a file" if root.is_file() else "no such folder"
            raise FileNotFoundError(
                "load: data must be 'digits', 'patches', 'shapes', a folder or list of images, or "
                f"a form that docs/data.md names, got {str(path)!r}: {got}. Check the path."
            )
        class_names, self.paths, labels = _list_split(listing(str(root)), split)
        super().__init__(str(root), torch.tensor(labels), class_names, image_size, max_side)


def _list_split(found: Listing, split: str) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, paths and labels of one split. Files beside the class folders get label -1."""
    root, top, classes = found.root, "", {name: name for name in found.subfolders()}
    test = next((name for name in _TEST if name in classes), None)
    explicit = "train" in classes and test is not None
    if explicit:
        # Both parts' classes, so that a class that one of them lacks does not shift the labels.
        top = test if split == "test" else "train"
        names = {name for part in ("train", test) for name in found.subfolders(part)}
        classes = {name: os.path.join(top, name) for name in sorted(names)}
        root = os.path.join(root, top)
    images = {
        name: found.below(folder) if folder in found.folders else []
        for name, folder in classes.items()
    }
    names = tuple(name for name, paths in images.items() if paths or explicit)
    loose = found.files(top)
    if not any(images.values()) and not loose:
        tars = any(name.endswith(".tar") for name in os.listdir(root))
        raise FileNotFoundError(
            f"load: no images in {root}. Expected files ending in "
            f"{', '.join(sorted(EXTENSIONS))}, directly or in one subfolder a class."
            + (f" Its tar files are read by the name shards:{root}." if tars else "")
        )
    if not names and split == "test" and not explicit:
        raise FileNotFoundError(
            f"load: {root} is a flat folder without labels, so it has no test split. "
            "Put the images into one subfolder a class, or into train/ and test/."
        )
    paths, labels = [], []
    for label, name in enumerate(names):
        part = images[name]
        if not explicit:
            part = part[4::5] if split == "test" else [p for i, p in enumerate(part) if i % 5 != 4]
        paths += part
        labels += [label] * len(part)
    if explicit or split == "train":
        paths += loose
        labels += [-1] * len(loose)
    if not paths:
        raise FileNotFoundError(
            f"load: {root} has fewer than five images a class, too few for a test split (every "
            "fifth image). Add images or make train/ and test/ folders."
        )
    return names, paths, labels


class ListSource(ImageSource):
    """The images that a text file names, one a line, by paths from the list's own folder.

    `.txt`: the path, and behind a space or tab a label if there is one. `.csv` and `.tsv`: columns
    path and label, or under a heading those named `path`, `label` and `caption`. Labels are whole
    numbers from 0 on, or names, which are numbered in alphabetical order; no label, or -1, is none.
    Several captions stand in lines of one cell, in quotes. A line that begins with # is passed over
    in a `.txt`.

    All of a list is one split. That of testing is the file of the same name with `test` or `val` in
    the place of `train`. Names are numbered over both.

    Args:
        path: the file.
        split: "train" or "test".
        image_size, max_side: see `ImageSource`.

    Raises:
        FileNotFoundError: no such list, or a file that it names; no list of the other split.
        ValueError: an empty list, a heading without `path`, a file named twice, labels of two
            kinds. The message tells the line.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_size: int | None = None,
        max_side: int | None = None,
    ):
        given = Path(path).expanduser().resolve()
        lists = [given, *other_splits(given)]
        if split == "test" and len(lists) == 1:
            raise FileNotFoundError(no_test_split(given))
        rows = [_read_list(each) for each in lists]
        self.paths = _existing_files(lists[split == "test"], rows[split == "test"])
        labels, class_names = _numbered(lists, rows)
        self._captions = [row[3] for row in rows[split == "test"]]
        super().__init__(
            str(given), torch.tensor(labels[split == "test"]), class_names, image_size, max_side
        )

    @property
    def captions(self) -> Callable[[Tensor], list[str]] | None:
        """The captions of samples index (B,), "" where there is none; None without a column."""
        if self._captions[0] is None:  # of one line as of all; they may be millions
            return None
        return lambda index: [self._captions[self._shown(i)] for i in index.tolist()]


def other_splits(path: Path) -> list[Path]:
    """The file of the test split beside a file of the training split, if there is one."""
    if "train" not in path.name:
        return []
    others = (path.with_name(path.name.replace("train", name)) for name in ("test", "val"))
    return [other for other in others if other.exists()][:1]


def no_test_split(path: str | Path) -> str:
    name = Path(path).name
    rule = (
        f"expected {name.replace('train', 'test')} or {name.replace('train', 'val')} beside it"
        if "train" in name
        else "a name with 'train' in it leads to that with 'test' or 'val'"
    )
    return f"load: {path} has no test split: {rule}. To train, or embed, none is needed."


# Number of the line, path, label or "", caption or None where there is no column of them.
_Row = tuple[int, str, str, str | None]


def _read_list(path: Path) -> list[_Row]:
    kind = path.suffix.lower()
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if kind == ".txt":
            lines = [(n, line.strip()) for n, line in enumerate(file, 1)]
            rows = [(n, *_split_line(line), None) for n, line in lines if line and line[0] != "#"]
        else:
            reader = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")
            cells = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(row)]
            at, of, says = 0, 1, None
            if cells and not _is_image(cells[0][1][0]):
                heading = cells.pop(0)[1]
                if "path" not in heading:
                    raise ValueError(
                        f"load: {path} must have a column `path`, got the heading "
                        f"{', '.join(heading)}. Rename one, or begin with an image's path."
                    )
                at = heading.index("path")
                of = heading.index("label") if "label" in heading else len(heading)
                says = heading.index("caption") if "caption" in heading else None
            rows = [
                (n, *("" if i >= len(row) else row[i] for i in (at, of)), _caption(row, says))
                for n, row in cells
            ]
    if not rows:
        raise ValueError(f"load: {path} must name images, one a line, got no line of any.")
    return rows


def _caption(row: list[str], column: int | None) -> str | None:
    return None if column is None else "".join(row[column : column + 1])


def _split_line(line: str) -> tuple[str, str]:
    if _is_image(line):
        return line, ""
    path, *label = line.rsplit(None, 1)
    return path, label[0] if label else ""


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _existing_files(path: Path, rows: list[_Row]) -> list[str]:
    """The files of a list, in its order. Folders are listed: that is faster than asking for every
    file."""
    files = [os.path.normpath(os.path.join(path.parent, name)) for _, name, *_ in rows]
    there: dict[str, set[str]] = {}
    first: dict[str, int] = {}
    missing = []
    for (line, name, *_), file in zip(rows, files, strict=True):
        folder, base = os.path.split(file)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in there[folder]:
            missing.append(f"{name!r} (line {line})")
        if first.setdefault(file, line) != line:
            raise ValueError(
                f"load: {path} must name a file once, got {name!r} in lines {first[file]} and "
                f"{line}. Leave one out; a mixture gives images more weight."
            )
    if missing:
        raise FileNotFoundError(
            f"load: {len(missing)} of the {len(rows)} files in {path} do not exist: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Paths are from the "
            "list's folder, or absolute; a label stands behind a space, tab or comma."
        )
    return files


def _numbered(lists: list[Path], rows: list[list[_Row]]) -> tuple[list[list[int]], tuple[str, ...]]:
    """Labels of each list as numbers, and the names of the classes."""
    seen: dict[bool, tuple[Path, _Row]] = {}
    for path, part in zip(lists, rows, strict=True):
        for row in part:
            if row[2]:
                seen.setdefault(_is_number(row[2]), (path, row))
    if len(seen) == 2:
        where = (f"{row[2]!r} in line {row[0]} of {path.name}" for path, row in seen.values())
        raise ValueError(
            f"load: labels in {lists[0]} must be whole numbers from 0 on, or all of them names, "
            f"got {' and '.join(where)}."
        )
    if True in seen:
        labels = [[int(label or -1) for _, _, label, _ in part] for part in rows]
        return labels, number_names(max(max(part) for part in labels), f"labels in {lists[0]}")
    names = sorted({label for part in rows for _, _, label, _ in part if label})
    numbers = {"": -1} | {name: n for n, name in enumerate(names)}
    return [[numbers[label] for _, _, label, _ in part] for part in rows], tuple(names)


def number_names(largest: int, of: str) -> tuple[str, ...]:
    """The names of classes that have only numbers."""
    if largest >= 1 << 20:
        raise ValueError(
            f"load: {of} must be class numbers below {1 << 20}, got {largest}. Number the classes "
            "from 0 on, or give them names."
        )
    return tuple(map(str, range(largest + 1)))


def _is_number(label: str) -> bool:
    return label == "-1" or (label.isascii() and label.isdigit())
