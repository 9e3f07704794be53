"""A short run of every method on small data: better by a frozen margin than what it started from,
mostly random weights of the same network; and no sign of collapse.

    python benchmarks/smoke.py [ROW ...] [--seeds 0 1 2]

Two runs at a time, one thread each. All rows together, which is the default, also write
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

from fastssl.config import PretrainConfig
from fastssl.evaluate import evaluate
from fastssl.evaluate.table import align
from fastssl.methods import METHODS
from fastssl.methods.recipes import RECIPES
from fastssl.train import pretrain
from fastssl.train.folder import read_config
from fastssl.train.metrics import read_metrics

LEAST_STD = 0.3
"""Of the normalised projections, 1 over the sphere; a collapse is told below 0.2."""


def knn_20(run: Path) -> tuple[float, float]:
    """Top-1 of 20 nearest neighbours before and after training, in percent."""
    return _before_and_after(run, "knn", "knn-20", ks=(20,))


def zero_shot(run: Path) -> tuple[float, float]:
    """Top-1 by captions of each class, before and after training."""
    return _before_and_after(run, "zero-shot", "ensemble")


def finetuned_5_shot(run: Path) -> tuple[float, float]:
    """Top-1 of random and of trained weights, fine-tuned on five labels a class: by `vit` with
    MAE's mean of the patches, but in batches that give so few images steps enough, without images
    mixed or changed by RandAugment."""
    few = {"shots": (5,), "epochs": 15, "train_batch_size": 32, "lr": 8e-3, "seeds": 2}
    plain = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": 0}
    return _before_and_after(
        run, "finetune", "finetune-5-shot", recipe="vit", pool="patches", **few, **plain
    )


def _before_and_after(run: Path, protocol: str, name: str, **settings) -> tuple[float, float]:
    config = read_config(run)
    start = config["init_from"]
    before = (start, "pretrained") if start else (run, "random")
    found = [
        evaluate(path, config["data"], [protocol], weights=weights, device="cpu", **settings)
        for path, weights in (before, (run, "pretrained"))
    ]
    before, after = (result[protocol]["top1_percent"][name] for result in found)
    return before, after


def colours_known(run: Path, common: dict[str, Any]) -> dict[str, Any]:
    """What `rad_dino` goes on from: DINOv2 on images with colours."""
    first = f"{run}-first"
    settings = {"method": "dinov2", "data": "shapes", "epochs": 2, **_TINY_DINOV2}
    pretrain(PretrainConfig(**settings, **common, out=first))
    return {"init_from": first}


def taught(run: Path, common: dict[str, Any]) -> dict[str, Any]:
    """The teacher of `distill`: a network pretrained by SimCLRv2, and fine-tuned, from the first
    layer of its head, on five labels a class."""
    first, file = f"{run}-first", f"{run}-teacher.safetensors"
    settings = {"method": "simclr_v2", "data": "patches", "epochs": 10}
    pretrain(PretrainConfig(**settings, **common, out=first))
    tuned = {"shots": (5,), "from_head": 1, "save": file, "seeds": 1}
    evaluate(first, None, ["finetune"], device="cpu", **tuned)
    return {"method_args": {"teacher": file, "temperature": 0.2}}


@dataclass(frozen=True)
class Row:
    """How a method is tried, and what it must reach."""

    margin: float
    """Least gain in points: the mean of three seeds or more less three deviations, 8 at least."""
    data: str = "patches"
    settings: dict[str, Any] = field(default_factory=lambda: {"epochs": 10})
    """Fields of `PretrainConfig` that differ from the recipe's."""
    score: Callable[[Path], tuple[float, float]] = knn_20
    """Of a run: what its start had and what it reached, in percent. The start is the weights of
    `init_from`, else random ones."""
    method: str | None = None
    """None: that of the row's name."""
    first: Callable[[Path, dict[str, Any]], dict[str, Any]] | None = None
    """What comes before a run of this folder and these settings common to all; the settings that
    name what it made."""


_TINY_DINOV2 = {
    "backbone": "timm:test_vit",
    "image_size": 64,
    "lr": 2e-3,
    "warmup_epochs": 0.5,
    "method_args": {"momentum": 0.95, "freeze_epochs": 0.25},
}
_CAPTIONS = {"batch_size": 64, "epochs": 5}

ROWS = {
    # Three seeds of simclr and of moco_v3 lay closer together than rounding alone moves one: their
    # margins are of runs with AVX2, moco_v3's of four, one of them before a change of rounding.
    "simclr": Row(margin=10.3),
    "simclr_v2": Row(margin=9.6, settings={"epochs": 15}),
    "distill": Row(margin=10.4, settings={"epochs": 12, "batch_size": 128}, first=taught),
    "seer": Row(margin=9.1, settings={"epochs": 14, "lr": 2.5e-3}),
    "byol": Row(margin=11.0, settings={"epochs": 12, "batch_size": 128}),
    "moco_v2": Row(margin=9.0),
    "moco_v3": Row(margin=12.2),
    "dino": Row(margin=9.2),
    "dinov2": Row(margin=16.0, data="shapes:greyscale", settings={"epochs": 3, **_TINY_DINOV2}),
    "rad_dino": Row(
        margin=9.5,
        method="dinov2",
        data="shapes:greyscale",
        settings=_TINY_DINOV2
        | {
            "epochs": 2,
            "warmup_epochs": 0.25,
            "method_args": {
                **_TINY_DINOV2["method_args"],
                **RECIPES["dinov2"]["rad_dino"]["method_args"],
            },
        },
        first=colours_known,
    ),
    "swav": Row(margin=9.2, settings={"epochs": 12}),
    # In few steps dimensions are told apart only by a larger weight.
    "vicreg": Row(
        margin=9.8,
        settings={
            "epochs": 14,
            "batch_size": 128,
            "method_args": {"cov": 8.0, "hidden_dim": 256, "out_dim": 256},
        },
    ),
    "barlow": Row(margin=8.8, settings={"epochs": 14, "batch_size": 128}),
    "lejepa": Row(margin=9.7, settings={"epochs": 6}),
    "mae": Row(margin=8.0, settings={"epochs": 12}, score=finetuned_5_shot),
    "look": Row(margin=21.0, data="shapes", settings={"epochs": 6}),
    # Without colours a caption's image is told by its shape sooner.
    "clip": Row(34.0, data="shapes:greyscale", settings=_CAPTIONS, score=zero_shot),
    "align": Row(
        38.0, data="shapes:mismatched", settings=_CAPTIONS | {"epochs": 8}, score=zero_shot
    ),
    "convirt": Row(42.0, data="shapes:greyscale", settings=_CAPTIONS),
}


def tried(name: str, seed: int, out: str) -> dict[str, Any]:
    """One run in a process of its own: what it was and what it reached."""
    torch.set_num_threads(1)
    row, path = ROWS[name], Path(out, f"{name}-{seed}")
    common = {"seed": seed, "device": "cpu", "workers": 0}
    settings = {"method": row.method or name, "data": row.data, **row.settings}
    started = time.perf_counter()
    with open(f"{path}.log", "w") as log, redirect_stderr(log):  # two runs' progress is a muddle
        if row.first:
            settings |= row.first(path, common)
        pretrain(PretrainConfig(**settings, **common, out=path))
    trained = time.perf_counter()
    before, after = row.score(path)
    last = read_metrics(path)[-1]
    warnings = path / "warnings.txt"
    result = {
        "row": name,
        "data": row.data,
        "settings": row.settings,
        "first": row.first and row.first.__name__,
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
    parser.add_argument("rows", nargs="*", metavar="ROW", help="Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    options = parser.parse_args()
    names = options.rows or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}.")

    tried_methods = {row.method or name for name, row in ROWS.items()}
    untried = [f"FAIL  {name}: no row in ROWS" for name in METHODS if name not in tried_methods]
    results, failed = [], [] if options.rows else untried
    with (
        tempfile.TemporaryDirectory() as out,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
    ):
        jobs = {
            pool.submit(tried, name, seed, out): f"{name}, seed {seed}"
            for name in names
            for seed in options.seeds
        }
        for job in as_completed(jobs):
            name = jobs[job]
            try:
                result = job.result()
            except Exception as error:  # of one row; the others go on
                failed.append(f"FAIL  {name}: {type(error).__name__}: {error}")
                continue
            results.append(result)
            failed += [f"FAIL  {name}: {fault}" for fault in result["faults"]]
            print(f"{name}: {result['gain']:+.1f} points", flush=True)
    results.sort(key=lambda result: (names.index(result["row"]), result["seed"]))
    print(f"\n{text(results)}\n")
    print("\n".join(failed or ["all pass"]))
    if not options.rows:
        torch.set_num_threads(1)  # as the runs had, for the record
        print(harness.write("smoke", results))
    return 1 if failed else 0


def text(results: list[dict[str, Any]]) -> str:
    """A line for each run, and of several seeds their mean and deviation."""
    lines = [["row", "data", "metric", "seed", "before", "after", "gain", "margin", "std", "s"]]
    for result in results:
        numbers = [f"{result[key]:.1f}" for key in ("before", "after", "gain", "margin")]
        std = f"{result['monitors'].get('std', float('nan')):.2f}"
        seconds = f"{result['train_s'] + result['evaluate_s']:.0f}"
        names = [result["row"], result["data"], result["metric"], str(result["seed"])]
        lines.append([*names, *numbers, std, seconds])
    for row in dict.fromkeys(result["row"] for result in results):
        gains = [result["gain"] for result in results if result["row"] == row]
        if len(gains) > 1:
            mean, deviation = statistics.mean(gains), statistics.stdev(gains)
            gain = f"{mean:.1f} ± {deviation:.1f}"
            floor = f"{mean - 3 * deviation:.1f}"
            lines.append([row, "", "gain; mean - 3 sd", "", "", "", gain, floor, "", ""])
    return align(lines, left=3)


if __name__ == "__main__":
    sys.exit(main())
