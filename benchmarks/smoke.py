"""A short run of every method on small data: better than the same network with random weights by a
frozen margin, and no sign of collapse.

    python benchmarks/smoke.py [METHOD ...] [--seeds 0 1 2]

Two runs at a time, one thread each. All methods together, which is the default, also write
results/<machine>/smoke.json. Exit code 1 if a run fails.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import torch

from fastssl.config import PretrainConfig, load_config
from fastssl.evaluate import evaluate
from fastssl.evaluate.table import align
from fastssl.methods import METHODS
from fastssl.train import pretrain
from fastssl.train.metrics import read_metrics

LEAST_STD = 0.3
"""Of the normalised projections, 1 over the sphere; a collapse is told below 0.2."""


def knn_20(run: Path) -> tuple[float, float]:
    """Top-1 of 20 nearest neighbours before and after training, in percent."""
    return _before_and_after(run, "knn", "knn-20", ks=(20,))


def finetuned_5_shot(run: Path) -> tuple[float, float]:
    """Top-1 after fine-tuning on five labels a class, from random weights and from the run's."""
    return _before_and_after(run, "finetune", "5-shot", shots=(5,), seeds=3)


def _before_and_after(run: Path, protocol: str, name: str, **settings) -> tuple[float, float]:
    found = [
        evaluate(run, None, [protocol], weights=weights, device="cpu", **settings)
        for weights in ("random", "pretrained")
    ]
    before, after = (result[protocol]["top1_percent"][name] for result in found)
    return before, after


def taught(out: Path, seed: int) -> dict[str, Any]:
    """What `distill` needs, by the steps that come before it: a network pretrained by SimCLRv2, and
    fine-tuned, from the first layer of its head, on five labels a class."""
    first, file = Path(f"{out}-first"), f"{out}-teacher.safetensors"
    settings = {"data": "patches", "epochs": 10, "device": "cpu", "workers": 0}
    pretrain(PretrainConfig(method="simclr_v2", seed=seed, out=first, **settings))
    tuned = {"shots": (5,), "from_head": 1, "save": file, "seeds": 1}
    evaluate(first, None, ["finetune"], device="cpu", **tuned)
    return {"init_from": str(first), "method_args": {"teacher": file, "temperature": 0.2}}


def teacher_and_student(run: Path) -> tuple[float, float]:
    """Top-1 of both classifiers, in percent."""
    teacher = load_config(run / "config.yaml").method_args["teacher"]
    found = [
        evaluate(network, "patches", ["classifier"], device="cpu") for network in (teacher, run)
    ]
    before, after = (result["classifier"]["top1_percent"]["classifier"] for result in found)
    return before, after


@dataclass(frozen=True)
class Row:
    """How a method is tried, and what it must reach."""

    margin: float
    """Least gain in points: the mean of three seeds less three deviations, and 8 at least. Of a
    student over its teacher, what it may lose."""
    data: str = "patches"
    settings: dict[str, Any] = field(default_factory=lambda: {"epochs": 10})
    """Fields of `PretrainConfig` that differ from the recipe's."""
    score: Callable[[Path], tuple[float, float]] = knn_20
    """Of a run: what its method is compared with and what it reached, in percent."""
    needs: Callable[[Path, int], dict[str, Any]] | None = None
    """Makes what a run of this seed needs, beside its folder; the settings that name it."""


ROWS = {
    "simclr": Row(margin=8.0),
    "simclr_v2": Row(margin=9.6, settings={"epochs": 15}),
    "distill": Row(
        margin=-2.0,
        settings={"epochs": 12, "batch_size": 128},
        score=teacher_and_student,
        needs=taught,
    ),
    "seer": Row(margin=8.6, settings={"epochs": 12, "method_args": {"local_views": 2}}),
    "byol": Row(margin=8.0, settings={"epochs": 15}),
    "moco_v2": Row(margin=8.0),
    "moco_v3": Row(margin=8.0),
    "dino": Row(margin=8.0),
    "swav": Row(margin=8.0, settings={"epochs": 15}),
    "vicreg": Row(margin=8.0, settings={"epochs": 15}),
    "barlow": Row(margin=8.0, settings={"epochs": 15}),
    "lejepa": Row(margin=8.0, settings={"epochs": 6}),
    "look": Row(margin=21.0, data="shapes", settings={"epochs": 6}),
}


def tried(method: str, seed: int, out: str) -> dict[str, Any]:
    """One run in a process of its own: what it was and what it reached."""
    torch.set_num_threads(1)
    row, path = ROWS[method], Path(out, f"{method}-{seed}")
    started = time.perf_counter()
    settings = {"data": row.data, "seed": seed, "out": path, "device": "cpu", "workers": 0}
    with open(f"{path}.log", "w") as log, redirect_stderr(log):  # two runs' progress is a muddle
        needed = row.needs(path, seed) if row.needs else {}
        pretrain(PretrainConfig(method=method, **settings, **row.settings, **needed))
    trained = time.perf_counter()
    before, after = row.score(path)
    last = read_metrics(path)[-1]
    warnings = path / "warnings.txt"
    result = {
        "method": method,
        "data": row.data,
        "settings": row.settings,
        "metric": row.score.__name__,
        "seed": seed,
        "before": before,
        "after": after,
        "gain": after - before,
        "margin": row.margin,
        "train_s": trained - started,
        "evaluate_s": time.perf_counter() - trained,
        "monitors": {
            name: last[name]
            for name in ("std", "feature_std", "rankme", "prototypes", "effective_prototypes")
            if name in last
        },
        "warnings": warnings.read_text().splitlines() if warnings.exists() else [],
    }
    return result | {"faults": faults(result)}


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with a run, in words; [] if nothing is."""
    found = list(result["warnings"])
    if result["gain"] < result["margin"]:
        found.append(f"a gain of {result['gain']:.1f} points, below {result['margin']:g}")
    monitors = result["monitors"]
    if monitors.get("std", 1.0) < LEAST_STD:
        found.append(f"std {monitors['std']:.2f}, below {LEAST_STD}")
    if monitors.get("effective_prototypes", 2.0) < 2.0:
        found.append(f"{monitors['effective_prototypes']:.1f} prototypes in use")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    options = parser.parse_args()
    methods = options.methods or list(METHODS)
    if missing := [name for name in methods if name not in ROWS]:
        parser.error(f"no row in ROWS for {', '.join(missing)}; there are {', '.join(ROWS)}.")

    results, failed = [], []
    with (
        tempfile.TemporaryDirectory() as out,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
    ):
        jobs = {
            pool.submit(tried, method, seed, out): (method, seed)
            for method in methods
            for seed in options.seeds
        }
        for job in as_completed(jobs):
            name = "{}, seed {}".format(*jobs[job])
            try:
                result = job.result()
            except Exception as error:  # of one method; the others go on
                failed.append(f"FAIL  {name}: {type(error).__name__}: {error}")
                continue
            results.append(result)
            failed += [f"FAIL  {name}: {fault}" for fault in result["faults"]]
            print(f"{name}: {result['gain']:+.1f} points", flush=True)
    results.sort(key=lambda result: (methods.index(result["method"]), result["seed"]))
    print(f"\n{text(results)}\n")
    print("\n".join(failed or ["all pass"]))
    if not options.methods:
        torch.set_num_threads(1)  # as the runs had, for the record
        print(harness.write("smoke", results))
    return 1 if failed else 0


def text(results: list[dict[str, Any]]) -> str:
    """A line for each run, and of several seeds their mean and deviation."""
    lines = [["method", "data", "metric", "seed", "before", "after", "gain", "margin", "std", "s"]]
    for result in results:
        numbers = [f"{result[key]:.1f}" for key in ("before", "after", "gain", "margin")]
        std = f"{result['monitors'].get('std', float('nan')):.2f}"
        seconds = f"{result['train_s'] + result['evaluate_s']:.0f}"
        names = [result["method"], result["data"], result["metric"], str(result["seed"])]
        lines.append([*names, *numbers, std, seconds])
    for method in dict.fromkeys(result["method"] for result in results):
        gains = [result["gain"] for result in results if result["method"] == method]
        if len(gains) > 1:
            mean, deviation = statistics.mean(gains), statistics.stdev(gains)
            gain = f"{mean:.1f} ± {deviation:.1f}"
            floor = f"{mean - 3 * deviation:.1f}"
            lines.append([method, "", "gain; mean - 3 sd", "", "", "", gain, floor, "", ""])
    return align(lines, left=3)


if __name__ == "__main__":
    sys.exit(main())
