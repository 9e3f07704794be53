"""Checkpoints that are either whole or not there.

In one file; or, where the weights are sharded over ranks, in a folder that every rank writes its
shards to, by torch.distributed.checkpoint, with all else in its `state.pt`.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .ranks import Ranks

FORMAT = 1
"""Version of the checkpoint's contents."""

_SHARDED = "sharded tensor"
"""The key that stands in state.pt for what the shards hold."""


def save_checkpoint(
    path: str | Path, state: dict[str, Any], *, previous: str | Path | None = None
) -> None:
    """Write `state` to `path` atomically.

    The file is written beside `path`, flushed to the disk, and renamed over it, so a crash or a
    full disk leaves the previous checkpoint as it was.

    Args:
        path: file to write; its folder is made.
        state: tensors, numbers, strings, lists and dicts (what `weights_only=True` can load).
        previous: the checkpoint that stays if this one fails, for the message; None: `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names the path and
            the free space.
    """
    path = Path(path)
    with _explained(path, Path(previous or path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)


def save_sharded(
    path: str | Path, state: dict[str, Any], ranks: Ranks, *, previous: str | Path | None = None
) -> None:
    """Write `state`, whose DTensors lie on all ranks, to the folder `path` atomically.

    All ranks must call it. As `save_checkpoint`: the folder is written beside `path` and renamed,
    and an error, raised on all ranks, leaves the previous checkpoint as it was. A checkpoint that
    is there already, of the same step of the same run, stays.
    """
    import torch.distributed.checkpoint as dcp

    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shards: dict[str, Tensor] = {}
    rest = _without_shards(state, "", shards)

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish():
        with replacing(partial / "state.pt") as file:
            torch.save({"format": FORMAT, **rest}, file)
        if path.exists():
            shutil.rmtree(partial)
            return
        os.replace(partial, path)
        _sync_folder(path.parent)

    with _explained(path, Path(previous or path)):
        try:
            ranks.on_main(begin)
            try:
                dcp.save(shards, checkpoint_id=partial)
            except dcp.api.CheckpointException as error:  # is a BaseException
                raise _first_failure(error) from error
            ranks.on_main(finish)
        except Exception:
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that is written beside `path`, and takes its place when it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # an interrupt too
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which must not exist, and becomes `path` when it is filled."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def load_checkpoint(
    path: str | Path,
    *,
    method: str | None = None,
    like: Callable[[tuple], Tensor | None] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Of a file nothing is executed. A folder's index is a pickle of torch.distributed.checkpoint,
    which could: read only folders whose origin you know.

    Args:
        path: file written by `save_checkpoint`, or folder by `save_sharded`.
        method: the method it must be of; None: any.
        like: of the keys that lead to a tensor, the tensor that it is to lie in memory as. Where
            that is sharded, only this rank's part is read of a folder, or kept of a file. None:
            all tensors are whole.

    Raises:
        FileNotFoundError: no such file. ValueError: not one of ours, a newer format, or a
            checkpoint of another method.
    """
    path = Path(path)
    file = path / "state.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"load_checkpoint: there is no checkpoint {path}.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many types
        raise _not_ours(path, error) from error
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
    like = like or (lambda keys: None)
    if path.is_dir():
        _read_shards(path, state, like)
    return _placed(state, (), like)


def remove(path: Path) -> None:
    """Remove a checkpoint; half of one never stands there under its name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path.with_name(f".{path.name}.partial")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def link(name: Path, target: Path) -> None:
    """Make `name` stand for its neighbour `target`, at once: another name of a file (a copy where
    the file system has no hard links), a symbolic link to a folder."""
    partial = name.with_name(f".{name.name}.partial")
    partial.unlink(missing_ok=True)
    if target.is_dir():
        partial.symlink_to(target.name)
    else:
        try:
            os.link(target, partial)
        except OSError:
            shutil.copyfile(target, partial)
    os.replace(partial, name)
    partial.unlink(missing_ok=True)  # stays where both were names of one file already
    _sync_folder(name.parent)


# ------------------------------------------------------------------------------------------ shards


def _without_shards(tree: Any, name: str, shards: dict[str, Tensor]) -> Any:
    """`tree` with a mark for each DTensor, which goes to `shards` by the keys that lead to it."""
    if isinstance(tree, dict):
        return {k: _without_shards(v, f"{name}.{k}", shards) for k, v in tree.items()}
    if hasattr(tree, "to_local"):
        shards[name[1:]] = tree
        return {_SHARDED: name[1:]}
    return tree


def _marks(tree: Any, keys: tuple = ()) -> Iterator[tuple[str, tuple]]:
    """The name of each sharded tensor and the keys that lead to it."""
    if isinstance(tree, dict):
        if _SHARDED in tree:
            yield tree[_SHARDED], keys
            return
        for key, value in tree.items():
            yield from _marks(value, (*keys, key))


def _read_shards(path: Path, state: dict[str, Any], like) -> None:
    """Put tensors in the places of the marks in `state`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import empty

    try:
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors, places = {}, dict(_marks(state))
        for name, keys in places.items():
            size, dtype, place = known[name].size, known[name].properties.dtype, like(keys)
            tensors[name] = torch.empty(size, dtype=dtype)
            if hasattr(place, "to_local"):
                mesh = place.device_mesh
                tensors[name] = empty(
                    *size, dtype=dtype, device_mesh=mesh, placements=place.placements
                )
        with warnings.catch_warnings():  # that torch.distributed may not be there is fine
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            # Each rank reads by itself: nobody waits for one that meets an error.
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # is a BaseException
        raise _not_ours(path, error) from error
    for name, (*keys, last) in places.items():
        inner = state
        for key in keys:
            inner = inner[key]
        inner[last] = tensors[name]


def _placed(tree: Any, keys: tuple, like) -> Any:
    """`tree` with each whole tensor in shards, or in the order of memory, of the one it is like:
    torch's fused steps read a weight and its states in that order, whatever their strides."""
    if isinstance(tree, dict):
        return {k: _placed(v, (*keys, k), like) for k, v in tree.items()}
    if not isinstance(tree, Tensor) or hasattr(tree, "to_local"):
        return tree
    place = like(keys)
    if place is None or place.shape != tree.shape:
        return tree
    if not hasattr(place, "to_local"):
        if tree.stride() == place.stride():
            return tree
        return torch.empty_like(place, dtype=tree.dtype, device=tree.device).copy_(tree)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tree.to(place.device).contiguous(), place.device_mesh, place.placements, src_data_rank=None
    )


# ------------------------------------------------------------------------------------------ errors


def _not_ours(path: Path, error: BaseException) -> ValueError:
    first_line = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"load_checkpoint: {path} is not a checkpoint of fastssl ({type(error).__name__}: "
        f"{first_line})."
    )


def _first_failure(error) -> Exception:
    """What went wrong on the first rank that failed."""
    cause, _ = next(iter(error.failures.values()))
    return _origin(cause) if isinstance(cause, Exception) else RuntimeError(str(cause))


def _origin(error: BaseException) -> BaseException:
    """The error of the operating system that an error comes from: torch's zip writer turns a failed
    write into a RuntimeError."""
    origin = error
    while origin is not None and not isinstance(origin, OSError):
        origin = origin.__cause__ or origin.__context__
    return origin or error


@contextmanager
def _explained(path: Path, previous: Path):
    """Errors of writing `path`, in words."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _origin(error)
        reason = getattr(cause, "strerror", None) or cause
        there = next(p for p in path.parents if p.exists())
        kept = "The previous checkpoint is intact. " if previous.exists() else ""
        raise OSError(
            getattr(cause, "errno", None) or errno.EIO,
            f"save_checkpoint: cannot write {path} ({reason}); "
            f"{shutil.disk_usage(there).free} bytes are free there. "
            f"{kept}Free some space, or make the folder writable, and resume the run.",
        ) from error


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
