"""Weights to start from or to export: read from a file, fitted to a backbone by their names."""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PretrainConfig
from ..extras import require
from ..models.keys import LIBRARIES, names_in
from .checkpoint import load_checkpoint
from .folder import read_config
from .kept import last_checkpoint

EXPORTED = "backbone.safetensors"
ROLES = ("student", "teacher")
PUBLISHERS = ("timm", "torchvision")
_TEACHERS = {"teacher", "ema", "momentum", "target", "key", "k"}


def start(config: PretrainConfig, backbone: nn.Module) -> dict[str, Any] | None:
    """Load the starting weights of a run's backbone in place.

    Args:
        config: resolved. backbone: at its random weights, on the CPU.

    Returns:
        What was loaded, as `fit` says; None without `init_from`, or where a checkpoint will be
        loaded instead.

    Raises:
        FileNotFoundError: no such file or run. ImportError: a package is missing.
        ValueError: weights that do not fit. OSError: published weights that cannot be had.
    """
    init_from = config.init_from
    if init_from is None or (config.resume and last_checkpoint(config.out)):
        return None
    if init_from in PUBLISHERS:
        return fit(backbone, published(config.backbone, init_from), init_from)
    path, role = split_role(init_from)
    return fit(backbone, read_weights(path, role), init_from, role)


def start_heads(config: PretrainConfig, method: nn.Module, record: dict[str, Any] | None) -> None:
    """Load in place what the run that `init_from` names has learned beside its backbone.

    That is the parameters of equal names and shapes: heads and prototypes, also the teacher's.

    Args:
        config: resolved. method: whose backbone has been started.
        record: what `start` returned, which is told their names.

    Raises:
        ValueError: `init_from` is no run with a checkpoint, or has no such parameters.
    """
    if not config.init_heads or (config.resume and last_checkpoint(config.out)):
        return
    path = config.init_from and last_checkpoint(split_role(config.init_from)[0])
    if path is None:
        raise ValueError(
            "init_heads: init_from must be the folder of a run with its checkpoints/, which the "
            f"heads are in, got {config.init_from!r}. Give it, or leave init_heads out."
        )
    weights = load_checkpoint(path)["model"]
    heads = {
        name: p
        for name, p in method.named_parameters()
        if "backbone." not in name and (p.requires_grad or name.startswith("ema."))
    }
    record["heads"] = [n for n, p in heads.items() if n in weights and weights[n].shape == p.shape]
    if not record["heads"]:
        raise ValueError(
            f"init_heads: {config.init_from} must have heads of this method's, which are "
            f"{_few(heads)}, got {_few(weights)}. Leave init_heads out."
        )
    with torch.no_grad():
        for name in record["heads"]:
            heads[name].copy_(weights[name])


def absolute(init_from: str | None) -> str | None:
    """The same weights from whatever folder a run is resumed."""
    if init_from is None or init_from in PUBLISHERS:
        return init_from
    path, role = split_role(init_from)
    return str(Path(path).expanduser().resolve()) + (f":{role}" if role else "")


def split_role(text: str) -> tuple[str, str | None]:
    """`runs/a:teacher` is (`runs/a`, `teacher`); without an ending the second is None."""
    path, _, role = text.rpartition(":")
    return (path, role) if role in ROLES else (text, None)


def recorded_backbone(init_from: str) -> str | None:
    """The name of the backbone of the run that `init_from` is; None if it is not one."""
    config = read_config(Path(split_role(init_from)[0]))
    return config["backbone"] if config else None


def read_weights(path: str | Path, role: str | None = None) -> dict[str, Tensor]:
    """Every tensor in a file by its dotted name, on the CPU; nothing in the file is executed.

    Args:
        path: a run's folder, one of Hugging Face's, or a file: safetensors, or what torch.save
            wrote; of a run in shards also the folder of a checkpoint.
        role: of a run's folder: the teacher is in its last checkpoint, the student in the exported
            backbone, or in the checkpoint of a run that has not finished.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder. ValueError: something else.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not (path / "state.pt").is_file():  # no checkpoint in shards
        path = _in_folder(path, role)
    if path.is_dir():
        return dict(_tensors(load_checkpoint(path)))
    if not path.is_file():
        raise FileNotFoundError(
            f"init_from: there is no {path}. Give a run's folder, a .safetensors or a .pt file, "
            "`timm` or `torchvision`."
        )
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch", "train")
        try:
            return safetensors.load_file(path)
        except Exception as error:  # of a Rust extension, of its own type
            raise ValueError(f"init_from: {path} is no safetensors file: {error}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age and kind, before the refusal
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many types
        raise ValueError(
            f"init_from: {path} holds something else than tensors, which is not loaded since that "
            f"could run code ({type(error).__name__}: {str(error).splitlines()[0]}). Save the "
            "network's state_dict() to a file of its own."
        ) from error
    found = dict(_tensors(content))
    if not found:
        raise ValueError(
            f"init_from: {path} must hold tensors by name, got {type(content).__name__}."
        )
    return found


def _in_folder(folder: Path, role: str | None) -> Path:
    """What holds the weights in the folder of a run, or in one of Hugging Face's."""
    names = (EXPORTED, "model.safetensors")
    exported = next((folder / name for name in names if (folder / name).is_file()), None)
    found = last_checkpoint(folder) if role == "teacher" or exported is None else exported
    if found is None:
        raise FileNotFoundError(
            f"init_from: no weights in {folder}: neither {EXPORTED} nor a checkpoint. Give a run's "
            "folder or a file."
        )
    return found


def _tensors(content: Any, prefix: str = ""):
    """(dotted name, tensor) of nested dicts, as those of optimizers, students and teachers."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}{key}.")
    elif isinstance(content, Tensor):
        yield prefix[:-1], content


def published(name: str, library: str) -> dict[str, Tensor]:
    """The weights that a library publishes for its network of this name. Downloads them once.

    Raises:
        ValueError: a backbone of another library, or one without weights. OSError: no download.
    """
    own, _, model = name.partition(":")
    if own != library:
        raise ValueError(
            f"init_from: {library} has weights for backbones {library}:NAME, got {name!r}. Choose "
            "such a backbone, or a file."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the heads' weights are those without init_from
            if library == "torchvision":
                models = require("torchvision.models", "vision")
                return models.get_model(model, weights="DEFAULT").state_dict()
            timm = require("timm", "vision")
            config = timm.get_pretrained_cfg(model)
            if config is None or not config.has_weights:
                raise ValueError(
                    f"init_from: timm publishes no weights for {model!r}. `timm.list_models("
                    "pretrained=True)` has the names that do."
                )
            return timm.create_model(model, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"init_from: the weights of {name} could not be downloaded "
            f"({' '.join(str(error).split())[:200]}). On a machine without network, fetch the file "
            "elsewhere and give its path."
        ) from error


def fit(
    backbone: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    role: str | None = None,
    caller: str = "init_from",
) -> dict[str, Any]:
    """Load weights into a backbone in place, by name whatever stands before it.

    The names may be those of the backbone or, for a plain ViT or ResNet, those of timm, torchvision
    or Hugging Face. What stands before them (`module.`, `state_dict.encoder_q.`) is what makes most
    of them match. The channels of the first convolution are adapted, and position embeddings of
    another grid interpolated; heads are left alone.

    Args:
        backbone: on the CPU. weights: tensors by name. where: what messages call them.
        role: take the "teacher" of a pair, or the "student"; None: the student if there are both.
        caller: what messages begin with.

    Returns:
        init_from, before_names, names (whose they are), loaded and of (numbers of tensors),
        resized, missing and unused (lists of names).

    Raises:
        ValueError: fewer than half of the backbone's tensors have a match, one has another shape or
            is not finite, or there is no teacher.
    """
    own = backbone.state_dict()
    style, plan, prefix = _match(weights, own, f"{caller}: {where}", role)
    loaded, resized, misfits = {}, [], []
    for name, parts in plan.items():
        if not all(prefix + part in weights for part in parts):
            continue
        found, target = [weights[prefix + part] for part in parts], own[name]
        value = torch.cat(found) if found[1:] else found[0]
        if value.shape != target.shape:
            got = tuple(value.shape)
            value = _resized(value, target, backbone, first=name == _first_filter(own))
            if value is None:
                misfits.append(f"{name} is {got}, the backbone has {tuple(target.shape)}")
                continue
            resized.append(name)
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{caller}: {where} holds NaN or infinity in {prefix + parts[0]!r}: the network "
                "has diverged. Take an earlier checkpoint."
            )
        loaded[name] = value
    if misfits:
        raise ValueError(
            f"{caller}: {where} has {len(misfits)} tensors of another shape: "
            f"{'; '.join(misfits[:3])}. Choose the backbone and image_size they were trained with."
        )
    backbone.load_state_dict({**own, **loaded})
    used = {prefix + part for name in loaded for part in plan[name]}
    return {
        "init_from": where,
        "before_names": prefix,
        "names": style,
        "loaded": len(loaded),
        "of": len(own),
        "resized": resized,
        "missing": [name for name in own if name not in loaded],
        "unused": [name for name in weights if name.startswith(prefix) and name not in used],
    }


def _match(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, role: str | None
) -> tuple[str, dict[str, tuple[str, ...]], str]:
    """Whose names the weights have, those names for each of the backbone's, and what stands before
    them."""
    styles = {"own": {name: (name,) for name in own}}
    for library in LIBRARIES:
        try:
            styles[library] = names_in(library, own)
        except ValueError:
            break  # no plain ViT or ResNet
    candidates = [
        (count / sum(map(len, plan.values())), not _teaches(prefix), -len(prefix), style, prefix)
        for style, plan in styles.items()
        for prefix, count in _prefixes(weights, plan).items()
        if role is None or _teaches(prefix) == (role == "teacher")
    ]
    if role and not candidates:
        raise ValueError(
            f"{where} holds no {role} of this backbone, whose names are {_few(own)}; it has "
            f"{_few(weights)}. Take the {'student' if role == 'teacher' else 'teacher'}."
        )
    # Of equals the student, then the least before the names, then the style that comes first.
    best = max(candidates, key=lambda c: c[:3], default=(0.0, True, 0, "own", ""))
    share, *_, style, prefix = best
    if share < 0.5:
        raise ValueError(
            f"{where} has {share:.0%} of the backbone's tensors, too few to start from. Its names "
            f"are {_few(weights)}; the backbone's are {_few(own)}. Choose the backbone they are of."
        )
    return style, styles[style], prefix


def report(folder: Path, record: dict[str, Any] | None) -> None:
    """Say what `fit` did, and write it to init.json in the run's folder, if it did anything."""
    if record:
        print(summary(record))
        (folder / "init.json").write_text(json.dumps(record, indent=2) + "\n")


def summary(record: Mapping[str, Any]) -> str:
    """What `fit` did, in a line or three."""
    text = f"init_from: {record['loaded']} of {record['of']} tensors from {record['init_from']}"
    if record["before_names"]:
        text += f", below {record['before_names']!r}"
    if record["names"] != "own":
        text += f", by {record['names']}'s names"
    for kind in ("resized", "missing", "unused", "heads"):
        if record.get(kind):
            text += f"\n  {kind}: {_few(record[kind])}"
    return text


def _prefixes(weights: Mapping[str, Tensor], plan: Mapping[str, tuple[str, ...]]) -> Counter:
    """How many wanted names the weights have, by what stands before them."""
    wanted = {part for parts in plan.values() for part in parts}
    counts = Counter()
    for key in weights:
        start = 0
        while start >= 0:
            if key[start:] in wanted:
                counts[key[:start]] += 1
            start = key.find(".", start) + 1 or -1
    return counts


def _teaches(prefix: str) -> bool:
    return not _TEACHERS.isdisjoint(re.split("[._]", prefix))


def _first_filter(own: Mapping[str, Tensor]) -> str | None:
    return next((name for name, tensor in own.items() if tensor.ndim == 4), None)


def _resized(value: Tensor, target: Tensor, backbone: nn.Module, first: bool) -> Tensor | None:
    """`value` in the shape of `target` where that means something, else None."""
    if first and value.ndim == 4 and value.shape[2:] == target.shape[2:]:
        return _channels(value, target.shape[1]) if len(value) == len(target) else None
    if value.ndim == target.ndim == 3 and value.shape[::2] == target.shape[::2]:
        return _positions(value, target.shape[1], getattr(backbone, "num_prefix_tokens", 1))
    return None


def _channels(filters: Tensor, channels: int) -> Tensor:
    """Filters (O, C, k, k) for other channels, as timm does: the sum for one, else repeated and
    scaled, so that a grey image has the same response if their numbers divide."""
    C = filters.shape[1]
    if channels == 1:
        return filters.sum(1, keepdim=True)
    repeated = filters.repeat(1, math.ceil(channels / C), 1, 1)[:, :channels]
    return repeated * (C / channels)


def _positions(embedding: Tensor, length: int, prefix: int) -> Tensor | None:
    """Position embeddings (1, prefix + g * g, D) for `length` tokens; the prefix stays."""
    side, new = (math.isqrt(max(0, n - prefix)) for n in (embedding.shape[1], length))
    if side * side + prefix != embedding.shape[1] or new * new + prefix != length:
        return None
    grid = embedding[:, prefix:].unflatten(1, (side, side)).movedim(3, 1).float()  # (1, D, g, g)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding[:, :prefix], grid.flatten(2).mT.to(embedding.dtype)], 1)


def _few(names) -> str:
    names = list(names)
    shown = ", ".join(names[:3])
    return shown + (f" ... ({len(names)} in all)" if len(names) > 3 else "")
