"""Features kept between evaluations, found again by the content of all that they depend on."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..data.cache import cache_path
from ..extras import require


class FeatureCache:
    """Files of features in a folder; the least recently used are removed above `max_bytes`.

    The name of a file is a digest of the network's description and every byte of its weights and
    buffers, of the images (their pixels if they lie in memory, else path, size and time of change
    of every file or shard), of the labels, and of what is done to an image before the network.

    Args:
        folder: made when the first features are kept; by default beside torch's own cached files,
            below `~/.cache/torch` or where TORCH_HOME says.
        max_bytes: of all files together; larger features than that are not kept.

    Notes: what a module computes beyond its description and weights, such as code that was
        changed, is not seen: keep no features of networks whose code you are working on.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int = 4 << 30):
        self.folder = cache_path("features", "").parent if folder is None else Path(folder)
        self.max_bytes = max_bytes

    def key(self, weights: dict[str, str], description: str, split, inputs) -> str | None:
        """Digest of everything features depend on; None for data that cannot be identified."""
        digest = hashlib.blake2b(digest_size=16)
        if not _add_data(digest, split.source):
            return None
        parts = [
            weights,
            description,
            split.source.name,
            str(inputs),
            __version__,
            torch.__version__,
        ]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        _add_tensor(digest, split.index)
        return digest.hexdigest()

    def load(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Features and labels, or None. A file that cannot be read is as good as none."""
        path = self._path(key)
        try:
            kept = require("safetensors.torch", "train").load_file(path)
            os.utime(path)  # the latest use
            return kept["h"], kept["y"]
        except Exception:  # absent, removed by another process, or damaged
            return None

    def save(self, key: str, h: Tensor, y: Tensor) -> None:
        """Keep features; a full disk or a folder that cannot be written is no error."""
        if h.nbytes + y.nbytes > self.max_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {"h": h.contiguous(), "y": y.contiguous()}
            require("safetensors.torch", "train").save_file(tensors, partial)
            partial.replace(path)
        except Exception:  # safetensors has an error type of its own for a failed write
            partial.unlink(missing_ok=True)
            return
        self._make_room()

    def _make_room(self) -> None:
        files = []
        for path in self.folder.glob("*.safetensors"):
            try:
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process makes room too
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _add_data(digest, source) -> bool:
    """Add what identifies a source's images and labels; False if nothing does."""
    _add_tensor(digest, source.labels)
    if isinstance(getattr(source, "images", None), Tensor):
        _add_tensor(digest, source.images)
        return True
    files = getattr(source, "paths", None) or getattr(source, "shards", ())
    digest.update(str(getattr(source, "max_side", None)).encode())
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            return False
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return len(files) > 0


def _add_tensor(digest, x: Tensor) -> None:
    x = x.detach().cpu().contiguous()
    digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy())
