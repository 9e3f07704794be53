"""Whether results can be written where they are to go: asked before they are computed."""

import os
from pathlib import Path


def check_folder(command: str, out: str | os.PathLike) -> None:
    """Refuse an `out` that can be no folder to write into. It need not exist yet.

    Raises:
        NotADirectoryError: it, or a part of its path, is a file. PermissionError: no right to write
            there.
    """
    _check(command, Path(out), Path(out))


def check_file(command: str, out: str | os.PathLike) -> None:
    """Refuse an `out` that can be no file to write. Neither it nor its folder need exist yet.

    Raises:
        IsADirectoryError: it is a folder. NotADirectoryError, PermissionError: as of
            `check_folder`, about its folder.
    """
    out = Path(out)
    if out.is_dir():
        raise IsADirectoryError(
            f"{command}: out must be a file, got the folder {out}. Give the name of a file in it."
        )
    _check(command, out, out.parent)


def _check(command: str, out: Path, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        kind = "a folder" if there == out else "below folders"
        raise NotADirectoryError(
            f"{command}: out must be {kind}, got {out}: {there} is a file. Choose another out."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{command}: out must be where you may write, got {out}: no permission for {there}. "
            "Choose another out."
        )
