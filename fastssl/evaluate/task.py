"""What protocols that go back to the images receive, and the spread of several seeds."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..augment import View, augment
from .cache import FeatureCache
from .features import (
    Split,
    check_classes,
    extract,
    features_of,
    fingerprint,
    forward,
    gather_rows,
    loaded,
    process,
)
from .networks import Inputs, Network


@dataclass
class Task:
    """A network, the images to fit on and those to score, and where to compute."""

    network: Network
    train: Split
    test: Split
    inputs: Inputs
    batch_size: int = 256
    device: str = "cpu"
    cache: FeatureCache | None = None
    _kept: dict = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return self.train.source.num_classes

    @cached_property
    def weights_digest(self) -> str:
        """Of the bytes of all the network's parameters and buffers."""
        digests = fingerprint(self.network.backbone)
        return hashlib.blake2b(repr(sorted(digests.items())).encode(), digest_size=16).hexdigest()

    @property
    def feature_dim(self) -> dict[str, int]:
        """Width of the features, if they were computed: not by every protocol."""
        kept = [h for h, _ in self._kept.values()]
        return {"feature_dim": kept[0].shape[1]} if kept else {}

    def features(self, name: str, backbone: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Features and labels of "train" or "test" without augmentation, computed once.

        Args:
            backbone: the network's by default; of another one nothing is kept but in the cache.
        """
        net = self.network.backbone if backbone is None else backbone
        if backbone is None and name in self._kept:
            return self._kept[name]
        split = getattr(self, name)
        found = extract(net, split, self.inputs, self.batch_size, self.device, self.cache)
        if backbone is None:
            self._kept[name] = found
        return found

    def view_features(
        self, backbone: nn.Module, split: Split, view: View, *, seed: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of an augmented view of each image; the caller freezes `backbone`."""

        def inputs(images, index: Tensor) -> Tensor:
            return augment(self.inputs.colour(images), index, [view], seed=seed, epoch=epoch)[0]

        return forward(backbone, split, inputs, self.batch_size, self.device)

    def view_batches(
        self, backbone: nn.Module, order: list[Tensor], view: View, *, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of an augmented view of each of these batches of training images, on
        the device; the caller freezes `backbone`.

        Args:
            order: numbers of samples in the source, for each batch, which may be larger than what
                goes through the network at a time.
        """
        rank, world = process()
        batches = [index.tensor_split(world)[rank].split(self.batch_size) for index in order]
        batches = [[part for part in parts if len(part)] for parts in batches]
        stream = loaded(self.train.source, (p for parts in batches for p in parts), self.device)
        for parts in batches:
            features, labels = [], []
            for _ in parts:
                images, y, index = next(stream)
                colour = self.inputs.colour(images)
                x = augment(colour, index, [view], seed=seed, epoch=epoch)[0]
                features.append(features_of(backbone, x))
                labels.append(y)
            yield gather_rows(features), gather_rows(labels)

    def disturbed_features(self, split: Split, specs: Sequence, seed: int) -> tuple[Tensor, Tensor]:
        """Features and labels where `specs` were done to the centre squares; see `prepare`."""
        inputs = partial(self.inputs, specs=specs, seed=seed)
        return forward(self.network.backbone, split, inputs, self.batch_size, self.device)


def check_one_label(caller: str, *splits: Split) -> None:
    """Raise ValueError unless all images have one label each, of a class in the first split."""
    for split in splits:
        if split.labels.ndim != 1 or (split.labels < 0).any():
            raise ValueError(
                f"{caller}: data must have one label an image, got {split.source.name!r} with "
                f"{'several classes each' if split.labels.ndim != 1 else 'images without a label'}."
                " Use multilabel for several; rankme and alignment need none."
            )
        check_classes(caller, splits[0].labels, split.labels)


def over_seeds(run: Callable[[int], dict[str, float]], seeds: int) -> dict[str, dict]:
    """Mean of each number over seeds 0 .. seeds - 1, with more than one also their deviation."""
    if seeds < 1:
        raise ValueError(f"evaluate: seeds must be >= 1, got {seeds}.")
    return spread([run(seed) for seed in range(seeds)])


def spread(runs: list[dict[str, float]]) -> dict[str, dict]:
    """{"mean": ..} of each number over runs; of several also "sd" (n - 1) and "each"."""
    columns = {key: torch.tensor([r[key] for r in runs], dtype=torch.float64) for key in runs[0]}
    found = {"mean": {key: column.mean().item() for key, column in columns.items()}}
    if len(runs) > 1:
        found["sd"] = {key: column.std().item() for key, column in columns.items()}
        found["each"] = {key: column.tolist() for key, column in columns.items()}
    return found
