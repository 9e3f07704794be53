"""What was found out about large data sets, kept between runs beside torch's own cached files."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch


def cache_path(kind: str, key: str) -> Path:
    """The file that keeps what is known of `key`: below `~/.cache/torch`, or where TORCH_HOME or
    XDG_CACHE_HOME say that torch's files are."""
    digest = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
    return Path(torch.hub.get_dir()).parent / "fastssl" / kind / digest


def keep(path: Path, data: bytes) -> None:
    """Write a cache file as a whole; not at all where there is no room or no permission."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
