"""The image files below a folder, remembered for large ones."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .cache import cache_path, keep
from .images import EXTENSIONS

CACHED_FROM = 20_000
"""Smaller folders are listed anew: it takes no longer than reading what is remembered."""
_VERSION = 1
_FRESH_NS = 2_000_000_000
"""A folder changed so shortly before it was listed may change again at the same time stamp."""


@dataclass(frozen=True)
class Listing:
    """The image files below `root`, without hidden ones, in a fixed order."""

    root: str
    folders: dict[str, tuple[int, list[str], list[str]]]
    """By path from the root ("" is itself): mtime in ns, image files and folders in it, sorted."""

    def subfolders(self, folder: str = "") -> list[str]:
        return self.folders[folder][2]

    def files(self, folder: str) -> list[str]:
        """Paths of the images directly in a folder."""
        start = os.path.join(self.root, folder, "")
        return [start + name for name in self.folders[folder][1]]

    def below(self, folder: str) -> list[str]:
        """Paths of all images below a folder, sorted by the parts of their paths."""
        _, files, folders = self.folders[folder]
        if not folders:
            return self.files(folder)
        found, inner = [], set(folders)
        for name in sorted(files + folders):
            path = os.path.join(folder, name)
            found += self.below(path) if name in inner else [os.path.join(self.root, path)]
        return found


def listing(root: str) -> Listing:
    """List the images below a folder, following links.

    What a large folder held is remembered with the time stamps of all folders in it, and only those
    whose stamp differs are listed again. What is remembered and cannot be understood is not used.

    Raises:
        OSError: a folder cannot be read; it names it.
    """
    cached = cache_path("listings", root)
    known, taken_at = _remembered(cached, root)
    now = time.time_ns()
    folders, ancestors, level = {}, {"": ()}, [""]
    with ThreadPoolExecutor(8) as pool:  # folders on a network answer side by side
        while level:
            below = []
            scans = pool.map(lambda folder: _scan(root, folder, known, taken_at), level)
            for folder, (identity, entry) in zip(level, scans, strict=True):
                mtime, files, inner = entry
                if identity in ancestors[folder]:  # a link to a folder that it lies in
                    entry = mtime, files, inner = mtime, [], []
                folders[folder] = entry
                for name in inner:
                    path = os.path.join(folder, name)
                    ancestors[path] = (*ancestors[folder], identity)
                    below.append(path)
            level = below
    unchanged = folders.keys() == known.keys() and all(folders[f] is known[f] for f in folders)
    if sum(len(files) for _, files, _ in folders.values()) >= CACHED_FROM and not unchanged:
        record = {"version": _VERSION, "root": root, "time": now, "folders": folders}
        keep(cached, json.dumps(record).encode())
    return Listing(root, folders)


def _scan(root: str, folder: str, known: dict, taken_at: int):
    """What tells a folder from others, and its entry for `Listing.folders`."""
    path = os.path.join(root, folder)
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    before = known.get(folder)
    if before and before[0] == status.st_mtime_ns < taken_at - _FRESH_NS:
        return identity, before
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_dir():
                folders.append(name)
            elif name[name.rfind(".") :].lower() in EXTENSIONS:
                files.append(name)
    return identity, (status.st_mtime_ns, sorted(files), sorted(folders))


def _remembered(path: os.PathLike, root: str) -> tuple[dict, int]:
    try:
        with open(path, "rb") as file:
            record = json.load(file)
        if (record["version"], record["root"]) != (_VERSION, root):
            return {}, 0
        folders = {key: (int(m), list(f), list(d)) for key, (m, f, d) in record["folders"].items()}
        return folders, int(record["time"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0
