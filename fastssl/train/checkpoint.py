"""Checkpoints that are either whole or not there."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Version of the checkpoint's contents."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically.

    The file is written beside `path`, flushed to the disk, and renamed over it, so a crash or a
    full disk leaves the previous checkpoint as it was.

    Args:
        path: file to write; its folder is made.
        state: tensors, numbers, strings, lists and dicts (what `weights_only=True` can load).

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names the path and
            the free space.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed write into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or cause
        free_bytes = shutil.disk_usage(path.parent).free
        kept = "The previous checkpoint is intact. " if path.exists() else ""
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO,
            f"save_checkpoint: cannot write {path} ({reason}); {free_bytes} bytes are free there. "
            f"{kept}Free some space and resume the run.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, *, method: str | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything in it.

    Args:
        path: file written by `save_checkpoint`.
        method: the method it must be of; None: any.

    Raises:
        FileNotFoundError: no such file. ValueError: not one of ours, a newer format, or a
            checkpoint of another method.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: there is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many types
        raise ValueError(
            f"load_checkpoint: {path} is not a checkpoint of fastssl ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"load_checkpoint: {path} is not a checkpoint of fastssl.")
    if state["format"] > FORMAT:
        raise ValueError(
            f"load_checkpoint: {path} has format {state['format']}, this version reads up to "
            f"{FORMAT}. Update fastssl-kernels."
        )
    if method is not None and state.get("method") != method:
        raise ValueError(
            f"load_checkpoint: {path} is of method {state.get('method')!r}, expected {method!r}. "
            "Resume with that method or choose another out folder."
        )
    return state


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be opened (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
