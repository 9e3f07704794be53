"""Paired measurements of the kernels against the libraries people would use instead."""

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import results, running
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
        seconds: on the rounds of a case in one process, about.
        repeats: processes that time each case.
        scaling: also curves of the cost against one growing size.
        apart: each case in processes of its own; False: in this one, which starts faster, and what
            does not fit into memory may end it.

    Returns:
        The folder. An unfinished run's has the rows so far.

    Raises:
        ValueError: an unknown name or size.

    Notes: warns where there are no pictures because matplotlib is missing; `draw` makes them later.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    threads = threads or torch.get_num_threads()
    chosen = cases(groups, device, names=names, sizes=sizes, dtypes=dtypes, short=short)
    folder = Path(out or Path("bench") / results.machine())
    options = {"threads": threads, "seconds": seconds, "repeats": repeats, "apart": apart}
    options["baselines"] = baselines
    result: dict[str, Any] = {
        "command": results.command(), "environment": results.environment(threads), "rows": []
    }  # fmt: skip
    started = time.perf_counter()
    for number, case in enumerate(chosen, 1):
        row = running.row(case, **options)
        result["rows"].append(row)
        print(f"{number}/{len(chosen)} {case}: {_said(row)}", file=sys.stderr, flush=True)
        result["seconds"] = time.perf_counter() - started
        results.write(folder, result)
    if scaling:
        result["scaling"] = _curves(groups, device, options)
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
        f"{ratio['ratio']:.2f} ± {ratio['noise']:.2f} of {name}"
        for name, ratio in row["ratios"].items()
    ]
    parts += [f"{name}: {why}" for name, why in row["failed"].items()]
    return ", ".join(parts)


def _curves(groups, device: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours alone at growing sizes; the exponent is of the line through the logarithms."""
    found = []
    for letter, expected, grown in scaling_cases(groups, device):
        rows = [running.row(case, **options | {"baselines": [], "repeats": 1}) for case in grown]
        values = [dict(case.sizes)[letter] for case in grown]
        times = [row["providers"]["ours"]["median_ms"] for row in rows]
        others = {k: v for k, v in grown[0].sizes if k != letter}
        x, y = [math.log(v) for v in values], [math.log(t) for t in times]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        slope /= sum((a - mean_x) ** 2 for a in x)
        found.append({
            "case": grown[0].name, "letter": letter, "others": others, "values": values,
            "times_ms": times, "exponent": slope, "expected": expected,
        })  # fmt: skip
        print(f"{grown[0].name} against {letter}: {slope:.2f}", file=sys.stderr, flush=True)
    return found
