"""Features of a frozen backbone, extracted once and shared by every protocol."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import TensorSource, batches
from .cache import FeatureCache
from .networks import Inputs


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Digest of the bytes of every parameter and buffer of `module`, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    digests = {}
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digests[name] = hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()
    return digests


@contextmanager
def frozen(module: nn.Module):
    """Hold `module` in eval mode, without gradients and autocast, and prove that it stays as it is.

    A probe on a network that still trains, or whose BatchNorm still follows the test images,
    reports several points too much without any other sign. So the bytes of all parameters and
    buffers are compared before and after. The train/eval mode is given back at the end.

    Raises:
        RuntimeError: naming the first parameter or buffer that changed inside the block.
    """
    modes = {part: part.training for part in module.modules()}
    before = fingerprint(module)
    module.eval()
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield module
    finally:
        for part, training in modes.items():
            part.training = training
    after = fingerprint(module)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(
            f"evaluate: backbone must stay frozen, got a changed {changed[0]!r} "
            f"({len(changed)} of {len(before)} tensors differ). Its forward pass writes to its own "
            "weights or buffers in eval mode: remove that, or evaluate a copy without it."
        )


@dataclass(frozen=True)
class Split:
    """Some images of a source, by their numbers in it."""

    source: Any
    index: Tensor

    @classmethod
    def whole(cls, source) -> "Split":
        return cls(source, torch.arange(len(source)))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, positions: Tensor) -> "Split":
        return Split(self.source, self.index[positions])

    @property
    def labels(self) -> Tensor:
        return self.source.labels.cpu()[self.index]


def extract(
    backbone: nn.Module,
    source,
    image_size: int | Inputs,
    batch_size: int = 256,
    device="cpu",
    cache: FeatureCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of every image of `source`, in its order, without augmentation.

    Args:
        backbone: maps (B, C, S, S) float32 to (B, D). It is moved to `device`.
        source: a data source, see `fastssl.data.load`, or a `Split` of one.
        image_size: S, side of the network's input in pixels (`fastssl.augment.prepare`), or all
            that is to be done to the images.
        batch_size: images per forward pass; bounds the memory.
        device: where the backbone computes.
        cache: where features of the same weights and images are kept and looked for.

    Returns:
        h, float32 (N, D), and y, int64 (N,) or (N, classes), both on the CPU.

    Raises:
        ValueError: for an empty source or features that are not (B, D).
        RuntimeError: if the backbone changes its weights or buffers meanwhile.

    Notes: under torchrun each rank computes its part, and all of them return the whole.
    """
    split = source if isinstance(source, Split) else Split.whole(source)
    inputs = Inputs(image_size) if isinstance(image_size, int) else image_size
    if len(split) == 0:
        raise ValueError(
            f"evaluate: data must hold images, got an empty split of {split.source.name!r}."
        )
    key = cache.key(fingerprint(backbone), str(backbone), split, inputs) if cache else None
    found = cache.load(key) if key else None
    if on_all_ranks(found is not None):
        return found
    backbone.to(device)
    with frozen(backbone):
        h, y = forward(backbone, split, inputs, batch_size, device)
    if key and main_rank() and not split.source.corrupt:  # which a cache could not tell of
        cache.save(key, h, y)
    return h, y


def forward(
    backbone: nn.Module,
    split: Split,
    inputs: Callable[[Any, Tensor], Tensor],
    batch_size: int,
    device,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels on the CPU, all ranks' together.

    Args:
        inputs: the network's input from images and their numbers in the source.
    """
    features, labels = [], []
    rank, world = process()
    mine = split.index.tensor_split(world)[rank]
    order = mine.split(batch_size) if len(mine) else ()
    for images, y, index in loaded(split.source, order, device):
        features.append(features_of(backbone, inputs(images, index=index).to(device)).cpu())
        labels.append(y.cpu())
    return gather_rows(features), gather_rows(labels)


def features_of(backbone: nn.Module, x: Tensor) -> Tensor:
    """(B, D) float32 of inputs x (B, C, S, S)."""
    h = backbone(x)
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != len(x):
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(
            f"evaluate: backbone must return features (B, D) = ({len(x)}, D), "
            f"got {got}. Pool the feature map, or return one tensor."
        )
    return h.float()


def loaded(source, order: Iterable[Tensor], device) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Images, labels and numbers of each batch of sample numbers, on the device; encoded images are
    decoded ahead."""
    workers = 0 if isinstance(source, TensorSource) else min(8, os.cpu_count() or 1)
    return batches(source, order, workers=workers, device=device)


def process() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def main_rank() -> bool:
    return process()[0] == 0


def on_all_ranks(fact: bool) -> bool:
    """Whether it is so on every rank: what decides about a collective must be the same on all."""
    facts = [fact] * process()[1]
    if len(facts) > 1:
        dist.all_gather_object(facts, fact)
    return all(facts)


def gather_rows(parts: list[Tensor]) -> Tensor:
    """The rows (n, ...) of this rank's parts, then of the next rank's, the same on all ranks."""
    rank, world = process()
    if world == 1:
        return torch.cat(parts)
    mine = torch.cat(parts) if parts else None
    shapes = [None] * world
    dist.all_gather_object(shapes, None if mine is None else (tuple(mine.shape), mine.dtype))
    shape, dtype = next(s for s in shapes if s is not None)  # a rank may have no rows
    counts = [0 if s is None else s[0][0] for s in shapes]
    device = parts[0].device if parts else "cpu"
    padded = torch.zeros(max(counts), *shape[1:], dtype=dtype, device=device)
    if mine is not None:
        padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def check_split(caller: str, name: str, h: Tensor, y: Tensor) -> None:
    """Raise ValueError unless h is finite (N, D) and y holds N labels >= 0, N >= 1."""
    if h.ndim != 2 or not h.is_floating_point():
        raise ValueError(
            f"{caller}: {name}_h must be floating point (N, D), got {h.dtype} {tuple(h.shape)}."
        )
    if len(h) == 0:
        raise ValueError(f"{caller}: {name}_h must have at least one row, got an empty split.")
    if y.shape != h.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"{caller}: {name}_y must be integer ({len(h)},), one label for each row of {name}_h, "
            f"got {y.dtype} {tuple(y.shape)}."
        )
    if (y < 0).any():
        raise ValueError(
            f"{caller}: {name}_y must be labelled, got no label (-1) on {int((y < 0).sum())} of "
            f"{len(y)} images. Sort the images into one subfolder per class."
        )
    if not h.isfinite().all():
        rows = int((~h.isfinite().all(1)).sum())
        raise ValueError(
            f"{caller}: {name}_h must be finite, got NaN or infinity in {rows} of {len(h)} rows. "
            "The run has diverged, or the images were not normalised."
        )


def check_splits(
    caller: str, train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor
) -> int:
    """Check both splits and that they fit each other; return the number of classes."""
    check_split(caller, "train", train_h, train_y)
    check_split(caller, "test", test_h, test_y)
    if train_h.shape[1] != test_h.shape[1]:
        raise ValueError(
            f"{caller}: test_h must have train_h's width D={train_h.shape[1]}, "
            f"got {tuple(test_h.shape)}."
        )
    check_classes(caller, train_y, test_y)
    return int(train_y.max()) + 1


def check_classes(caller: str, train_y: Tensor, test_y: Tensor) -> None:
    """Raise ValueError unless the labels train_y (N,) hold all that occur in test_y (M,)."""
    missing = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if missing:
        raise ValueError(
            f"{caller}: train_y must contain every class of the test split, "
            f"got no training sample of {missing[:10]}. Use another split, or drop these classes."
        )


def standardise(reference: Tensor, *others: Tensor) -> list[Tensor]:
    """Each of `others` (n, D) minus the mean and over the standard deviation of `reference` (N, D).

    Dimensions that never vary in `reference` carry nothing and become zero.
    """
    mean, sd = reference.mean(0), reference.std(0, correction=0)
    # Rounding leaves about |mean| * eps of spread in a constant column: it is no signal.
    alive = sd > 1e-6 * (1e-6 + mean.abs())
    scale = torch.where(alive, 1 / torch.where(alive, sd, 1), 0)
    return [(h - mean) * scale for h in others]


def top1_percent(predicted: Tensor, y: Tensor) -> float:
    """Share of predicted (N,) labels that equal y (N,), in percent."""
    return 100.0 * (predicted == y).double().mean().item()
