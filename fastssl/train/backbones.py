"""Exporting a run's backbone, and reading it back."""

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..augment import prepare
from ..data import load
from ..extras import require
from ..methods import method_class
from ..models import build_backbone
from ..random import permutation
from .checkpoint import load_checkpoint, replacing
from .kept import last_checkpoint
from .weights import EXPORTED, ROLES, fit, read_weights


def seeded_backbone(config: dict[str, Any], channels: int) -> nn.Module:
    """The backbone of a config at its initial weights, on the CPU. Seeds torch's generator."""
    torch.manual_seed(config["seed"])
    return build_backbone(config["backbone"], channels, config["image_size"])


def export_backbone(backbone: nn.Module, folder: Path, config, source) -> None:
    """Write `backbone.safetensors`, read it back and compare the outputs bit for bit.

    Args:
        backbone: trained network; its parameter names are the file's keys.
        folder: the run's folder.
        config: resolved `PretrainConfig`. source: the training data, for a few images to compare.

    Raises:
        RuntimeError: the reloaded network computes something else.
    """
    safetensors = require("safetensors.torch", "train")
    path = folder / EXPORTED
    weights = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    metadata = {
        "format": "pt",
        "backbone": config.backbone,
        "method": config.method,
        "data": source.name,
        "channels": str(source.channels),
        "image_size": str(config.image_size),
    }
    with replacing(path) as file:  # save_file would close the file to other users
        file.write(safetensors.save(weights, metadata))

    reloaded = seeded_backbone(dataclasses.asdict(config), source.channels)
    reloaded.load_state_dict(safetensors.load_file(path))
    original = copy.deepcopy(backbone).to("cpu", memory_format=torch.contiguous_format)
    x = prepare(source.batch(torch.arange(min(8, len(source))))[0], config.image_size)
    with torch.no_grad():
        same = torch.equal(reloaded.eval()(x), original.eval()(x))
    if not same:
        raise RuntimeError(
            f"export_backbone: the network reloaded from {path} computes other features than the "
            "trained one. The file is not usable; please report this."
        )


def load_backbone(
    run_path: str | Path, weights: str = "student"
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained backbone of a run, in eval mode on the CPU, and what one must know to use it.

    Args:
        run_path: the run's folder.
        weights: "student", or "teacher" of a method that has one.

    Returns:
        backbone: (B, channels, image_size, image_size) float, as `fastssl.augment.prepare` makes
            it, to (B, feature_dim).
        info: image_size, channels, source (the data's name or folder), backbone, feature_dim,
            method, config (the resolved configuration as a dict).

    Raises:
        FileNotFoundError: not a run, or a run that has not finished. ValueError: no such weights.
    """
    if weights not in ROLES:
        raise ValueError(f'load_backbone: weights must be "student" or "teacher", got {weights!r}.')
    backbone, info = _initial(Path(run_path))
    state = read_weights(run_path, weights)
    if weights == "teacher":
        fit(backbone, state, f"{run_path}'s checkpoint", weights, caller="load_backbone")
    else:
        backbone.load_state_dict(state)
    return backbone.eval(), info


def random_backbone(
    run_path: str | Path, *, images: int = 1024
) -> tuple[nn.Module, dict[str, Any]]:
    """The same network before training: the run's initial weights, with BatchNorm statistics
    measured on up to `images` training images. Returns what `load_backbone` returns.

    The fair thing to compare a trained backbone with: random features of the same architecture.
    """
    backbone, info = _initial(Path(run_path))
    source = load(info["source"], "train", info["image_size"])
    index = permutation(len(source), info["config"]["seed"])[:images]
    _calibrate(
        backbone, [prepare(source.batch(i)[0], info["image_size"]) for i in index.split(256)]
    )
    return backbone.eval(), info


def load_method(run_path: str | Path, *, trained: bool = True) -> nn.Module:
    """The whole method of a run, heads and all, in eval mode on the CPU.

    Args:
        run_path: the run's folder.
        trained: as its last checkpoint has it, else as it was before training.

    Raises:
        FileNotFoundError: not a run, a run that has not finished, or one without a checkpoint.
    """
    _, info = _initial(Path(run_path))
    config = info["config"]
    with torch.random.fork_rng(devices=[]):
        backbone = seeded_backbone(config, info["channels"])
        method = method_class(config["method"])(backbone, **config["method_args"])
    if trained:
        path = last_checkpoint(run_path)
        if path is None:
            raise FileNotFoundError(
                f"load_method: {run_path} has no checkpoint, which the heads are in. Give a run "
                "with its checkpoints/."
            )
        method.load_state_dict(load_checkpoint(path)["model"])
    return method.eval()


def _initial(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The run's network at its initial weights, leaving torch's generator as it was."""
    config_path, weights_path = folder / "config.yaml", folder / EXPORTED
    if not config_path.is_file():
        raise FileNotFoundError(
            f"load_backbone: {folder} is not a run: it has no config.yaml. "
            "Give the folder that was the run's out."
        )
    if not weights_path.is_file():
        raise FileNotFoundError(
            f"load_backbone: {folder} has no {EXPORTED}: the run has not finished. "
            "Resume it with resume=True (--resume) and the same out."
        )
    config = require("yaml", "train").safe_load(config_path.read_text())
    with require("safetensors", "train").safe_open(weights_path, "pt") as file:
        channels = int(file.metadata()["channels"])
    with torch.random.fork_rng(devices=[]):
        backbone = seeded_backbone(config, channels)
    info = {
        "image_size": config["image_size"],
        "channels": channels,
        "source": config["data"],
        "backbone": config["backbone"],
        "feature_dim": backbone.feature_dim,
        "method": config["method"],
        "config": config,
    }
    return backbone, info


@torch.no_grad()
def _calibrate(backbone: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set BatchNorm's running statistics to the averages over `inputs`."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    backbone.train()
    for x in inputs:
        backbone(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
