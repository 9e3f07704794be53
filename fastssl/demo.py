"""The whole loop on two small data sets: pretrain, evaluate against random weights, check, plot."""

import time
from pathlib import Path

from .config import PretrainConfig
from .evaluate import evaluate
from .evaluate.table import align
from .outputs import check_folder
from .report import report
from .train import pretrain

RUNS = (("digits", 0), ("digits", 1), ("digits", 2), ("patches", 0))
BOUNDS = {"digits": ("5-shot", 6.0), "patches": ("linear", 8.0)}
"""Metric and least gap in points between pretrained and random weights, for every run. Half or less
of what is measured: 540 test images alone move an accuracy by a point."""
SHOWN = ("knn-20", "linear", "1-shot", "5-shot", "10-shot")


def demo(out: str | Path = "runs/demo") -> bool:
    """Pretrain SimCLR on `digits` (three seeds) and `patches`; print the gaps and the verdicts.

    Args:
        out: folder for the runs; it must not hold a demo already.

    Returns:
        Whether every gap reaches its bound.

    Raises:
        FileExistsError: `out` holds a demo. NotADirectoryError, PermissionError: it cannot be
            written. ImportError: a package of the `demo` extra is missing.
    """
    out = Path(out)
    check_folder("demo", out)
    if any((out / f"{data}-{seed}").exists() for data, seed in RUNS):
        raise FileExistsError(
            f"demo: out must be a new folder, got {str(out)!r}, which holds a demo. "
            "Remove it, or choose another --out."
        )
    started = time.perf_counter()
    rows = [["data", "seed", "weights", *SHOWN]]
    verdicts, reports, passed = [], [], True
    for data, seed in RUNS:
        print(f"SimCLR on {data}, seed {seed}", flush=True)
        path = out / f"{data}-{seed}"
        pretrain(PretrainConfig(method="simclr", data=data, seed=seed, out=path))
        accuracy = {w: _accuracies(evaluate(path, weights=w)) for w in ("random", "pretrained")}
        gap = {m: accuracy["pretrained"][m] - accuracy["random"][m] for m in SHOWN}
        for weights, values in accuracy.items():
            rows.append([data, str(seed), weights, *(f"{values[m]:.1f}" for m in SHOWN)])
        rows.append([data, str(seed), "gap", *(f"{gap[m]:+.1f}" for m in SHOWN)])
        metric, least = BOUNDS[data]
        passed &= gap[metric] >= least
        verdict = "pass" if gap[metric] >= least else "FAIL"
        verdicts.append(
            f"{verdict}  {data}, seed {seed}: {metric} gap {gap[metric]:+.1f}, bound {least:+.1f}"
        )
        reports.append(report(path))
    print(f"\nTop-1 accuracy of frozen features, %\n\n{align(rows, left=3)}\n")
    print("\n".join(verdicts))
    print(f"\n{time.perf_counter() - started:.0f} s. Reports:")
    print("\n".join(map(str, reports)))
    return passed


def _accuracies(results: dict) -> dict[str, float]:
    return {m: v for result in results.values() for m, v in result["top1_percent"].items()}
