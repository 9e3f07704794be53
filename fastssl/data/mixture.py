"""Several sources as one."""

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..augment import Packed, pack
from ..extras import nearest, require
from ..random import MIXTURE, permutation, words

_MODES = ("weights", "size_matched", "epoch_equalised")


class Mixture:
    """Images of several sources in chosen shares; their order is a function of seed and epoch.

    Source i gives an epoch the share

        p_i = w_i / sum_j w_j, or with a temperature n_i^temperature / sum_j n_j^temperature

    of its samples, to the nearest whole number, n_i being its size. Its samples come in one random
    order after the other, that go on from epoch to epoch: none comes again before all have come.

    Modes:
        weights: an epoch has as many samples as all sources together.
        size_matched: the mixture is a subset of `size` samples, the same in every epoch and run:
            what a data set of that size gains from being mixed.
        epoch_equalised: an epoch has `size` samples, whatever the sources hold, drawn from all:
            runs on different mixtures make equally many steps.

    Numbers of samples go on from source to source. Where a sample comes more than once in an epoch,
    `draw` gives it other numbers, larger by a multiple of `len`: so that its views differ.

    Args:
        sources: see `fastssl.data.load`; of one number of channels and one dtype.
        weights: w_i > 0, one a source.
        temperature: instead of weights; 0 for equal shares, 1 (default) for shares by size.
        mode: see above.
        size: of the two other modes; default: that of the smallest source.
        seed: of the subset of `size_matched`.

    Raises:
        ValueError: no source, weights and temperature together, a value out of its range, more
            samples of a source in the subset than it has, other channels or dtypes.

    Notes: labels stay as they are if all sources have the same classes; otherwise those of a source
        come behind those of the sources before it, and its classes are called `number/name`. They
        are -1 of sources that name no classes; and all are, if classes differ and some sources have
        several labels an image.

    Example:
        >>> from fastssl.data import ShapesSource
        >>> parts = [ShapesSource(name, size=8) for name in ("shapes", "shapes:inverted")]
        >>> [part["an_epoch"] for part in Mixture(parts, weights=[3, 1]).parts]
        [12, 4]
    """

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
        temperature: float | None = None,
        mode: Literal["weights", "size_matched", "epoch_equalised"] = "weights",
        size: int | None = None,
        seed: int = 0,
    ):
        self.sources = tuple(sources)
        _check_settings(len(self.sources), weights, temperature, mode, size, seed)
        _check_sources(self.sources)
        sizes = torch.tensor([len(source) for source in self.sources])
        if weights is None:
            weights = sizes.double() ** (1.0 if temperature is None else temperature)
        shares = torch.as_tensor(weights, dtype=torch.float64)
        shares = shares / shares.sum()
        total = sizes.sum() if mode == "weights" else sizes.min() if size is None else size
        self._quotas = _whole(shares * int(total))
        self._subset = None
        if mode == "size_matched":
            if (self._quotas > sizes).any():
                i = int((self._quotas - sizes).argmax())
                raise ValueError(
                    f"mix: a subset of {int(total)} must find its share in every source, got "
                    f"{int(self._quotas[i])} of the {int(sizes[i])} samples of "
                    f"{self.sources[i].name}. Take a smaller size, or weights nearer to the sizes."
                )
            pairs = enumerate(zip(sizes.tolist(), self._quotas.tolist(), strict=True))
            self._subset = [permutation(n, seed, MIXTURE, i)[:q].sort()[0] for i, (n, q) in pairs]
            sizes = self._quotas
        self._sizes = sizes
        self._ends = sizes.cumsum(0)
        self.epoch_size = int(self._quotas.sum())
        self.name = _name(self.sources, weights, mode, size, seed)
        self.channels = self.sources[0].channels
        self.image_size = max(source.image_size for source in self.sources)
        self.mirror = all(source.mirror for source in self.sources)
        self._offsets, self.class_names = _classes(self.sources)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> tuple[Tensor, int | Tensor, int]:
        part, inner = self._place(i)
        image, label, _ = self.sources[part][inner]
        return image, self._label(part, label), i

    def _place(self, i: int) -> tuple[int, int]:
        """The source of sample i, and its number there."""
        at = i % len(self)
        part = int(torch.searchsorted(self._ends, at, right=True))
        inner = at - int(self._ends[part] - self._sizes[part])
        return part, inner if self._subset is None else int(self._subset[part][inner])

    @property
    def captions(self) -> Callable[[Tensor], list[str]] | None:
        """Those of the sources, None unless all of them have some."""
        own = [getattr(source, "captions", None) for source in self.sources]
        if None in own:
            return None
        places = partial(map, self._place)
        return lambda index: [own[p](torch.tensor([i]))[0] for p, i in places(index.tolist())]

    def _label(self, part: int, label: int | Tensor) -> int | Tensor:
        offset = self._offsets[part]
        if offset is None:
            return -1
        return label if isinstance(label, Tensor) or label < 0 else label + offset

    def batch(self, index: Tensor) -> tuple[Packed, Tensor]:
        """Images, packed, and labels (B, ...) int64 of samples `index` (B,)."""
        images, labels, _ = zip(*(self[i] for i in index.tolist()), strict=True)
        return pack(images), torch.stack([torch.as_tensor(label) for label in labels])

    def draw(self, seed: int, epoch: int) -> Tensor:
        """The order of one epoch: (epoch_size,) int64; modulo `len` the samples' numbers."""
        drawn = []
        for part, (n, q) in enumerate(
            zip(self._sizes.tolist(), self._quotas.tolist(), strict=True)
        ):
            if not q:
                continue
            # Sample `t` of all that this source ever gives is number t % n of its order t // n.
            first, last = epoch * q // n, ((epoch + 1) * q - 1) // n
            counter = torch.arange(first * n, (last + 1) * n)
            high, low = words(seed, MIXTURE, part, counter, 0, 2).unbind(-1)
            keys = ((high << 31) | (low >> 1)).view(-1, n)
            repeat = torch.arange(last - first + 1)[:, None]
            start = int(self._ends[part]) - n
            order = (keys.argsort(dim=1, stable=True) + start + repeat * len(self)).flatten()
            drawn.append(order[epoch * q - first * n :][:q])
        drawn = torch.cat(drawn)
        return drawn[permutation(len(drawn), seed, epoch=epoch)]

    @cached_property
    def labels(self) -> Tensor:
        """(N,) or (N, classes) int64."""
        parts = []
        for part, source in enumerate(self.sources):
            if self._offsets[part] is None:
                parts.append(torch.full((int(self._sizes[part]),), -1))
                continue
            y = source.labels.cpu()
            y = y if self._subset is None else y[self._subset[part]]
            parts.append(y if y.ndim > 1 else y.where(y < 0, y + self._offsets[part]))
        return torch.cat(parts)

    @property
    def corrupt(self) -> dict[str, str]:
        """The unreadable files met so far: the reason, by path."""
        return {path: reason for source in self.sources for path, reason in source.corrupt.items()}

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Of each source its name, its samples here, those in an epoch, and its first number."""
        ends, sizes, quotas = self._ends.tolist(), self._sizes.tolist(), self._quotas.tolist()
        return [
            {"data": source.name, "images": n, "an_epoch": q, "first_number": end - n}
            for source, end, n, q in zip(self.sources, ends, sizes, quotas, strict=True)
        ]


def open_mixture(text: str, split: str, open_source) -> Mixture:
    """What follows `mix:`, a YAML file or the YAML itself, as a `Mixture`; to test on, of all that
    the sources hold.

    Args:
        text: a list of names, or of `{data: NAME, weight: NUMBER}`; or a mapping with that list as
            `sources` and `temperature`, `mode`, `size` or `seed` beside it.
        split: "train" or "test".
        open_source: from the name of a source to the source.
    """
    yaml = require("yaml", "train")
    where, base = "mix", ""
    if os.path.splitext(text)[1] in (".yaml", ".yml"):
        where, base = f"mix: {text}", os.path.dirname(os.path.abspath(os.path.expanduser(text)))
        with open(os.path.expanduser(text), encoding="utf-8") as file:
            text = file.read()
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} must be YAML or a .yaml file, got {reason}.") from error
    options = dict(given) if isinstance(given, dict) else {"sources": given}
    listed = options.pop("sources", None)
    for key in options:
        if key not in ("temperature", "mode", "size", "seed"):
            hint = nearest(str(key), ("sources", "temperature", "mode", "size", "seed"))
            raise ValueError(f"{where}: unknown setting {key!r}. {hint}")
    listed_parts = listed if isinstance(listed, list) else []
    parts = [part if isinstance(part, dict) else {"data": part} for part in listed_parts]
    if not parts or any(
        not isinstance(part.get("data"), str) or part.keys() - {"data", "weight"} for part in parts
    ):
        raise ValueError(
            f"{where} must list its sources as names or {{data: NAME, weight: NUMBER}}, "
            f"got {listed!r}."
        )
    if any("weight" in part for part in parts):
        options["weights"] = [part.get("weight", 1) for part in parts]
    names = (part["data"] for part in parts)
    _check_settings(len(parts), **options)  # before large sources are opened
    options = {} if split == "test" else options
    return Mixture([open_source(_from(base, name)) for name in names], **options)


def _from(base: str, name: str) -> str:
    """A path in a file is from the file's folder, where it leads to something there."""
    path = os.path.join(base, os.path.expanduser(name))
    return path if base and os.path.exists(path) else name


def _name(sources, weights, mode, size, seed) -> str:
    """What `load` opens the mixture by again."""
    weights = torch.as_tensor(weights, dtype=torch.float64).tolist()
    parts = [{"data": s.name, "weight": w} for s, w in zip(sources, weights, strict=True)]
    given = {"sources": parts}
    if mode != "weights":
        given |= {"mode": mode, "seed": seed} | ({} if size is None else {"size": size})
    return "mix:" + json.dumps(given)


def _whole(quotas: Tensor) -> Tensor:
    """(S,) int64 with the same sum: the largest remainders are rounded up."""
    result = quotas.floor().long()
    missing = int(quotas.sum().round()) - int(result.sum())
    result[(quotas - result).argsort(descending=True, stable=True)[:missing]] += 1
    return result


def _classes(sources) -> tuple[list[int | None], tuple[str, ...]]:
    """What is added to the labels of each source, None where they count for none; and the names."""
    names = [tuple(source.class_names) for source in sources]
    several = [isinstance(source[0][1], Tensor) for source in sources]
    if names[0] and len({*zip(names, several, strict=True)}) == 1:
        return [0] * len(sources), names[0]
    if any(several):
        return [None] * len(sources), ()
    offsets = [sum(map(len, names[:i])) if own else None for i, own in enumerate(names)]
    return offsets, tuple(f"{i}/{name}" for i, part in enumerate(names) for name in part)


def _check_settings(
    count: int, weights=None, temperature=None, mode="weights", size=None, seed=0
) -> None:
    if mode not in _MODES:
        raise ValueError(f"mix: mode must be one of {', '.join(_MODES)}, got {mode!r}.")
    if weights is not None and temperature is not None:
        raise ValueError("mix: weights and temperature exclude each other, got both.")
    if weights is not None and len(weights) != count:
        raise ValueError(f"mix: weights must be one a source, {count}, got {len(weights)}.")
    for weight in weights or ():
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"mix: weights must be numbers above 0, got {weight!r}.")
    if temperature is not None and not (
        isinstance(temperature, (int, float)) and 0 <= temperature <= 1
    ):
        raise ValueError(f"mix: temperature must be from 0 to 1, got {temperature!r}.")
    if mode == "weights" and size is not None:
        raise ValueError(
            f"mix: size is for the modes size_matched and epoch_equalised, got {size}."
        )
    for name, value, least in (("size", 1 if size is None else size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"mix: {name} must be a whole number from {least} on, got {value!r}.")


def _check_sources(sources) -> None:
    if not sources:
        raise ValueError("mix: sources must be at least one, got none.")
    for source in sources:
        if isinstance(source, str) or not hasattr(source, "batch"):
            got = repr(source) if isinstance(source, str) else type(source).__name__
            raise ValueError(
                f"mix: sources must be data sources, got {got}. Open each by fastssl.data.load."
            )
    first = sources[0][0][0]
    for source in sources[1:]:
        image = source[0][0]
        if len(image) != len(first) or image.dtype != first.dtype:
            raise ValueError(
                f"mix: sources must have one number of channels and one dtype, got {len(first)} of "
                f"{first.dtype} in {sources[0].name} and {len(image)} of {image.dtype} in "
                f"{source.name}. Convert the images of one."
            )
