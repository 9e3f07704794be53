"""SimCLR on photo patches with each optimizer's states in 32 and in 8 bits, three seeds.

    python benchmarks/compare_optimizers.py

prints top-1 accuracies of linear probes and writes results/<machine>/optimizer_training.json.
"""

import statistics
import tempfile
from pathlib import Path

import harness

from fastssl.config import PretrainConfig
from fastssl.evaluate import evaluate
from fastssl.train import pretrain

RATES = {"sgd": 0.2, "adamw": 3e-3, "lars": 10.0}
SEEDS = (0, 1, 2)


def accuracy(optimizer: str, lr: float, seed: int, out: Path) -> dict[str, float]:
    path = out / f"{optimizer}-{seed}"
    run = pretrain(
        PretrainConfig(
            method="simclr", data="patches", optimizer=optimizer, lr=lr, seed=seed, out=path
        )
    )
    found = evaluate(path, protocols=("knn", "linear"))
    top1 = {m: v for result in found.values() for m, v in result["top1_percent"].items()}
    return {"loss": run.metrics["loss"], **top1}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for name, lr in RATES.items():
            for optimizer in (name, f"{name}8bit"):
                runs = [accuracy(optimizer, lr, seed, Path(out)) for seed in SEEDS]
                rows.append({"optimizer": optimizer, "lr": lr, "seeds": SEEDS, "runs": runs})
                probes = [run["linear"] for run in runs]
                spread = f"{statistics.mean(probes):.1f} +- {statistics.stdev(probes):.1f}"
                print(f"{optimizer:10} lr {lr:<6g} linear probe {spread}", flush=True)
    print(harness.write("optimizer_training", rows))


if __name__ == "__main__":
    main()
