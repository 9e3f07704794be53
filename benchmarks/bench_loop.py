"""Images a second of `fastssl pretrain simclr`, of a bare loop over the same kernels, and of
lightly's example code: same network, views, batch and optimizer, on photo patches.

    python benchmarks/bench_loop.py

Rounds are interleaved; a speed is the median over stretches of some steps, after the first of each
round. Writes results/<machine>/loop.json.
"""

import statistics
import tempfile
import time
from pathlib import Path

import harness
import torch
from lightly.loss import NTXentLoss as LightlyNTXent
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from fastssl.augment import augment, small
from fastssl.config import PretrainConfig
from fastssl.data import batches, epoch_order, load
from fastssl.losses import NTXentLoss
from fastssl.models import build_backbone, mlp
from fastssl.train import pretrain
from fastssl.train.metrics import read_metrics

BATCH, STRETCH, STRETCHES, ROUNDS = 256, 5, 4, 5
STEPS = STRETCH * (STRETCHES + 1)
LR, TEMPERATURE = 3e-3, 0.2


def speeds(steps) -> list[float]:
    """Images a second of each stretch but the first, while `steps` runs."""
    found, start = [], time.perf_counter()
    for step, _ in zip(range(1, STEPS + 1), steps, strict=False):
        if step % STRETCH == 0:
            now = time.perf_counter()
            found.append(BATCH * STRETCH / (now - start))
            start = now
    return found[1:]


def network(source):
    torch.manual_seed(0)
    return build_backbone("resnet_small", source.channels, source.image_size)


def of_pretrain(source) -> list[float]:
    epochs = -(-STEPS // (len(source) // BATCH))
    with tempfile.TemporaryDirectory() as out:
        config = PretrainConfig(
            "simclr", "patches", f"{out}/run", epochs=epochs, batch_size=BATCH, log_every=STRETCH
        )
        pretrain(config)
        records = read_metrics(Path(out, "run"))
    return [record["images_per_s"] for record in records[1 : STRETCHES + 1]]


def of_bare_loop(source) -> list[float]:
    def steps():
        backbone = network(source).to(memory_format=torch.channels_last)
        D = backbone.feature_dim
        model = torch.nn.Sequential(backbone, mlp([D, D, 128])).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4, fused=True)
        ntxent, views = NTXentLoss(TEMPERATURE), [small(source.image_size, 3)] * 2
        for epoch in range(STEPS):
            order = epoch_order(len(source), BATCH, seed=0, epoch=epoch)
            for images, _, index in batches(source, order):
                x0, x1 = augment(images, index, views, seed=0, epoch=epoch, channels_last=True)
                loss = ntxent(model(x0), model(x1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield

    return speeds(steps())


class _Pictures(Dataset):
    """As torchvision's data sets give them: a PIL image, transformed in the worker."""

    def __init__(self, source, transform):
        self.images = [to_pil_image(image) for image in source.images]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def of_lightly(source) -> list[float]:
    def steps():
        backbone = network(source)
        D = backbone.feature_dim
        model = torch.nn.Sequential(backbone, SimCLRProjectionHead(D, D, 128)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4, fused=True)
        criterion = LightlyNTXent(temperature=TEMPERATURE)
        transform = SimCLRTransform(
            input_size=source.image_size, min_scale=0.2, random_gray_scale=0.2, gaussian_blur=0.0,
            cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4, cj_hue=0.1,
        )  # fmt: skip
        loader = DataLoader(
            _Pictures(source, transform), BATCH, shuffle=True, drop_last=True,
            num_workers=torch.get_num_threads(), persistent_workers=True,
        )  # fmt: skip
        while True:
            for x0, x1 in loader:
                loss = criterion(model(x0), model(x1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield

    return speeds(steps())


PROVIDERS = {"fastssl pretrain": of_pretrain, "bare loop": of_bare_loop, "lightly": of_lightly}


def main() -> None:
    source = load("patches", "train")
    found = {name: [] for name in PROVIDERS}
    for _ in range(ROUNDS):
        for name, run in PROVIDERS.items():
            found[name] += run(source)
    median = {name: statistics.median(values) for name, values in found.items()}
    rows = [
        {
            "provider": name,
            "batch": BATCH,
            "image_size": source.image_size,
            "images_per_s": median[name],
            "p20": statistics.quantiles(values, n=5)[0],
            "p80": statistics.quantiles(values, n=5)[3],
            "of_bare_loop": median[name] / median["bare loop"],
            "of_lightly": median[name] / median["lightly"],
        }
        for name, values in found.items()
    ]
    for row in rows:
        print(
            f"{row['provider']:18} {row['images_per_s']:7.0f} images/s  "
            f"{row['of_bare_loop']:.3f} of the bare loop  {row['of_lightly']:.2f} of lightly"
        )
    print(harness.write("loop", rows))


if __name__ == "__main__":
    main()
