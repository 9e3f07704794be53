"""Paired measurements of the kernels against the libraries people would use instead."""

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..outputs import check_folder
from . import results, running, sharded
from .baselines import refuse_unknown
from .cases import GROUPS, Case, cases, scaling_cases
from .charts import draw
from .results import compare, read

__all__ = ["GROUPS", "Case", "bench", "cases", "compare", "draw", "read"]


def bench(
    groups: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    names: Sequence[str] | None = None,
    sizes: dict[str, Sequence[int | str]] | None = None,
    dtypes: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    seconds: float = 1.0,
    repeats: int = 2,
    minutes: float | None = None,
    short: bool = False,
    scaling: bool = False,
    apart: bool = True,
) -> Path:
    """Measure cases and write a folder: results.json, .csv and .md, and pictures.

    Args:
        groups, names, sizes, dtypes, short: which, as `cases` takes them.
        out: the folder; None: bench/MACHINE.
        device: cpu or cuda; auto: the GPU if there is one.
        threads: of torch; None: as many as it takes by itself.
        baselines: names or their first words; None: all that are installed, but compiled ones on a
            CPU, where the compiler takes longer than the case.
        seconds: on the rounds of one run of a case, about.
        repeats: runs of each case, each in another process, every case once before any again.
        minutes: no run but the first is begun after so many; each case's first come before any
            second.
        scaling: curves of the cost against one growing size in the place of the cases; of `sizes`,
            `dtypes` and `short` they know nothing.
        apart: each run in a process of its own; False: in this one, which starts faster, and what
            does not fit into memory may end it.

    Returns:
        The folder. An unfinished run's has the rows so far.

    Raises:
        ValueError: an unknown name or size, a number out of range, or no GPU.
            NotADirectoryError, PermissionError: out cannot be written. KeyboardInterrupt: stopped;
            the folder has the rows so far.

    Notes: warns where there are no pictures because matplotlib is missing; `draw` makes them later.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    for name, value in (("threads", threads), ("repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"bench: {name} must be at least 1, got {value}.")
    for name, value in (("seconds", seconds), ("minutes", minutes)):
        if value is not None and not value > 0:
            raise ValueError(f"bench: {name} must be above 0, got {value:g}.")
    refuse_unknown(baselines)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device must be cpu here, got 'cuda': torch finds no GPU.")
    threads = threads or torch.get_num_threads()
    chosen = []
    if not scaling:
        chosen = cases(groups, device, names=names, sizes=sizes, dtypes=dtypes, short=short)
    folder = Path(out or Path("bench") / results.machine(device))
    check_folder("bench", folder)
    options = {"threads": threads, "seconds": seconds, "baselines": baselines, "apart": apart}
    result: dict[str, Any] = {
        "command": results.command(), "environment": results.environment(threads, device),
        "rows": [],
    }  # fmt: skip
    started = time.perf_counter()
    # The second run of a case comes minutes after its first, so that both tell of the noise between
    # two measurements.
    measured: dict[Case, list[dict]] = {case: [] for case in chosen}
    try:
        for number, case in enumerate(chosen * repeats, 1):
            late = minutes is not None and time.perf_counter() - started > 60 * minutes
            if late and number > 1:
                left = len(chosen) * repeats - number + 1
                warnings.warn(f"{left} of {len(chosen) * repeats} runs are left out", stacklevel=2)
                break
            measured[case].append(running.run(case, measured[case], **options))
            rows = [running.merged(each, runs, threads) for each, runs in measured.items() if runs]
            results.pool_noise(rows)
            result |= {"rows": rows, "seconds": time.perf_counter() - started}
            results.write(folder, result)
            said = _said(rows[(number - 1) % len(chosen)])
            print(f"{number}/{len(chosen) * repeats} {case}: {said}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if result["rows"]:
            results.write(folder, result)  # which may be what was interrupted
            print(f"the rows so far are in {folder}", file=sys.stderr)
        raise
    if scaling:
        result["scaling"] = _curves(groups, names, device, options)
        result["seconds"] = time.perf_counter() - started
        results.write(folder, result)
    try:
        draw(folder, result)
    except ImportError as error:
        warnings.warn(f"no pictures: {error}", stacklevel=2)
    return folder


def _said(row: dict[str, Any]) -> str:
    if "ours" not in row.get("providers", ()):
        return row["failed"].get("ours", "nothing measured")
    parts = [f"{row['providers']['ours']['median_ms']:.3g} ms"]
    parts += [
        f"{ratio['ratio']:.2f} ± {ratio['ratio'] * ratio['noise']:.2f} of {name}"
        for name, ratio in row["ratios"].items()
    ]
    parts += [f"{name}: {why}" for name, why in row["failed"].items()]
    return ", ".join(parts)


def _curves(groups, names, device: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours alone at growing sizes and, on a CPU, over more processes. A curve with a size that does
    not fit into memory is left out."""
    found = []
    options = {key: value for key, value in options.items() if key != "baselines"}
    for letter, expected, grown in scaling_cases(groups, device, names):
        values = [dict(case.sizes)[letter] for case in grown]
        others = {k: v for k, v in grown[0].sizes if k != letter}
        times = _lesser(lambda case: running.median_ms(case, **options), grown)
        found.append(_curve(grown[0].name, letter, others, values, times, expected))
    case, others, expected = sharded.SCALING
    if device == "cpu" and "losses" in (groups or GROUPS) and case in (names or [case]):
        worlds = sharded.worlds()
        if len(worlds) > 1:
            times = _lesser(sharded.median_ms, worlds)
            found.append(_curve(case, "W", others, worlds, times, expected))
    if not found:
        raise ValueError(f"bench: no curve fits groups {groups} and cases {names}.")
    return [curve for curve in found if not math.isnan(curve["exponent"])]


def _lesser(measured: Callable[[Any], float], points: list) -> list[float]:
    """Each measured on the way up and on the way down: what else the machine does only adds."""
    up = [measured(point) for point in points]
    down = [measured(point) for point in reversed(points)]
    return [min(pair) for pair in zip(up, reversed(down), strict=True)]


def _curve(
    case: str, letter: str, others: dict, values: list, times: list, expected: float
) -> dict[str, Any]:
    """With the exponent of the line through the logarithms."""
    x, y = [math.log(v) for v in values], [math.log(t) for t in times]
    slope = statistics.linear_regression(x, y).slope
    print(f"{case} against {letter}: {slope:.2f}", file=sys.stderr, flush=True)
    return {
        "case": case, "letter": letter, "others": others, "values": values, "times_ms": times,
        "exponent": slope, "expected": expected,
    }  # fmt: skip
