"""Metrics on disk and progress on the terminal."""

import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .checkpoint import replacing


class MetricsLog:
    """Appends records to metrics.jsonl and metrics.csv, and warnings to warnings.txt, in a run's
    folder.

    Lines after `resumed_step` are dropped first, so that a resumed run repeats none.
    """

    def __init__(self, folder: Path, resumed_step: int):
        self._folder, self._csv = folder, folder / "metrics.csv"
        self._jsonl, self._warnings = folder / "metrics.jsonl", folder / "warnings.txt"
        kept = [r for r in read_metrics(folder) if r["step"] <= resumed_step]
        with replacing(self._jsonl) as file:  # the one record of the steps before
            file.writelines(f"{json.dumps(record)}\n".encode() for record in kept)
        self._fields = list(dict.fromkeys(key for record in kept for key in record))
        self._rewrite_csv()
        said = self._warnings.read_text().splitlines(True) if self._warnings.exists() else []
        if said:
            before = [line for line in said if int(line.split("\t")[0]) <= resumed_step]
            self._warnings.write_text("".join(before))

    def write(self, record: dict[str, Any]) -> None:
        with open(self._jsonl, "a") as file:
            file.write(json.dumps(record) + "\n")
        unknown = [key for key in record if key not in self._fields]
        if unknown:  # not every record has every key: the header grows
            self._fields += unknown
            self._rewrite_csv()
            return
        with open(self._csv, "a", newline="") as file:
            csv.DictWriter(file, self._fields).writerow(record)

    def warn(self, step: int, message: str) -> None:
        with open(self._warnings, "a") as file:
            file.write(f"{step}\t{' '.join(message.split())}\n")

    def _rewrite_csv(self) -> None:
        with open(self._csv, "w", newline="") as file:
            writer = csv.DictWriter(file, self._fields)
            if self._fields:
                writer.writeheader()
                writer.writerows(read_metrics(self._folder))


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl, in order; a line cut off by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Progress:
    """A bar on a terminal, plain lines some seconds apart elsewhere, nothing if silent."""

    _LINES_APART_S = 3.0

    def __init__(self, total_steps: int, step: int, *, silent: bool):
        self._total, self._silent = total_steps, silent
        self._bar, self._last_line = None, -math.inf
        self._knn = ""  # not in every record
        if not silent and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total_steps, completed=step, text="")

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        text = (
            f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s  "
            f"data wait {record['data_wait']:.0%}"
        )
        if "knn_top1" in record:
            self._knn = f"  kNN {record['knn_top1']:.0%}"
        text += self._knn
        if "prototypes" in record and "effective_prototypes" in record:
            used, K = record["effective_prototypes"], record["prototypes"]
            text += f"  prototypes {used:.0f} of {K:.0f}"
        if self._bar is not None:
            self._bar.update(self._task, text=text)
            return
        last = record["step"] == self._total
        if not self._silent and (last or time.monotonic() > self._last_line + self._LINES_APART_S):
            self._last_line = time.monotonic()
            where = f"epoch {record['epoch']}  step {record['step']}/{self._total}"
            print(f"{where}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar():
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )


class Meter:
    """Images per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    def waiting(self, loader: Iterable) -> Iterator:
        """The loader's items; the time until each arrives counts as waiting for data."""
        loader = iter(loader)
        while True:
            before = time.perf_counter()
            item = next(loader, None)
            self._waited += time.perf_counter() - before
            if item is None:
                return
            yield item

    def count(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        reading = {"images_per_s": self._images / elapsed, "data_wait": self._waited / elapsed}
        self._reset()
        return reading
