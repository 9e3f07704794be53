"""A page about a run, or about several side by side."""

import os
from pathlib import Path

from ..outputs import check_file
from .page import compare, describe, read

__all__ = ["report"]


def report(
    *runs: str | os.PathLike,
    out: str | os.PathLike | None = None,
    data: str | None = None,
    images: bool = True,
    tsne: bool = False,
) -> Path:
    """Write one HTML page, complete in itself: curves, warnings, results, settings, pictures.

    Of one run it has also views, neighbours and a map of its features; of several the curves are
    drawn over each other, and results and what differs in the settings stand side by side. A run
    may still be going on, or have been stopped. What is missing is said in a sentence.

    Args:
        runs: folders of runs.
        out: the file; default: report.html in the run's folder, comparison.html beside the first of
            several.
        data: images for the neighbours and the map; default: those of the run.
        images: False leaves out what needs the images and the network, and so takes no time.
        tsne: also a map by t-SNE (scikit-learn, in the extra `demo`); up to a minute.

    Returns:
        The file.

    Raises:
        FileNotFoundError: a folder that holds no run. ValueError: no run, or `results.json` that is
            not what `evaluate` writes. IsADirectoryError, NotADirectoryError, PermissionError: out
            cannot be written.
    """
    if not runs:
        raise ValueError("report: runs must name at least one run's folder, got none.")
    read_runs = [read(Path(run)) for run in runs]
    first = read_runs[0].folder
    default = first / "report.html" if len(runs) == 1 else first.parent / "comparison.html"
    path = Path(out or default)
    check_file("report", path)
    html = describe(read_runs[0], data, images, tsne) if len(runs) == 1 else compare(read_runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files that are not UTF-8 come as lone surrogates.
    path.write_text(html, "utf-8", "backslashreplace")
    return path
