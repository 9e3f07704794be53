"""SimCLR on photo patches with views by fastssl and by torchvision's transforms, three seeds.

    python benchmarks/compare_views.py

prints top-1 accuracies of linear probes and writes results/<machine>/views_training.json.
"""

import statistics
import tempfile
from pathlib import Path

import harness
import torch
from compare_optimizers import SEEDS, accuracy
from torchvision.transforms import v2

from fastssl.augment import Custom, small
from fastssl.methods.simclr import SimCLR


def theirs(size: int) -> Custom:
    """What `small` does to colour images."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return Custom(transform, size)


PROVIDERS = {"fastssl": lambda size: small(size, 3), "torchvision": theirs}


def main() -> None:
    rows = []
    for name, make in PROVIDERS.items():
        SimCLR.views = lambda self, size, source, make=make: [make(size)] * 2
        with tempfile.TemporaryDirectory() as out:
            runs = [accuracy("adamw", 3e-3, seed, Path(out)) for seed in SEEDS]
        rows.append({"views": name, "seeds": SEEDS, "runs": runs})
        probes = [run["linear"] for run in runs]
        spread = f"{statistics.mean(probes):.1f} +- {statistics.stdev(probes):.1f}"
        print(f"{name:12} linear probe {spread}", flush=True)
    print(harness.write("views_training", rows))


if __name__ == "__main__":
    main()
