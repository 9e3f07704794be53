"""Plots of a run, as PNG files in its folder."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from .data import load
from .evaluate import extract, read_results
from .extras import require
from .train import load_backbone, random_backbone
from .train.metrics import read_metrics

_RANDOM, _PRETRAINED = "#9aa5b1", "#1f6fb4"


def report(run: str | os.PathLike, data: str | None = None) -> list[Path]:
    """Draw what there is: training curves, probe accuracies, and a map of the features.

    Args:
        run: folder of a finished run.
        data: images for the map of features; default: those of the run. Labels give colours.

    Returns:
        The files written: training.png, probes.png (after an evaluation), embedding.png.

    Raises:
        FileNotFoundError: not a finished run. ImportError: matplotlib is missing.
    """
    run = Path(run)
    require("matplotlib", "demo")
    networks = {"random weights": random_backbone(run), "pretrained": load_backbone(run)}
    info = networks["pretrained"][1]
    paths = [plot_training(read_metrics(run), run / "training.png")]
    results = read_results(run)
    if results:
        paths.append(plot_probes(results, run / "probes.png"))
    train, size = load(data or info["source"], "train", info["image_size"]), info["image_size"]
    try:
        source = load(train.name, "test", size)
    except FileNotFoundError:  # a folder without labels has no test split
        source = train
    maps = {}
    for name, (backbone, _) in networks.items():
        h, y = extract(backbone, source, size)
        maps[name] = project(h)
    paths.append(plot_embedding(maps, y, source.class_names, source.name, run / "embedding.png"))
    return paths


def project(h: Tensor) -> Tensor:
    """The first two principal components of features h (N, D): (N, 2), in units of their spread."""
    centred = h - h.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:2].T
    # Signs of singular vectors are arbitrary: the larger tail points up and right.
    scores = scores * scores.pow(3).mean(0).sign()
    return scores / scores.std(0).clamp_min(1e-12)


def plot_training(metrics: list[dict], path: Path) -> Path:
    """Loss and learning rate over optimizer steps, from the records of metrics.jsonl; with
    prototypes, and no further terms, also ln K, where the loss of a collapsed run stays."""
    if not metrics:
        raise ValueError(f"report: metrics must hold records, got none for {path.parent}.")
    figure = _figure(7, 4.5)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [record["step"] for record in metrics]
    loss.plot(steps, [record["loss"] for record in metrics], color=_PRETRAINED, linewidth=1.5)
    if "prototypes" in metrics[-1] and "prototype_loss" not in metrics[-1]:
        K = metrics[-1]["prototypes"]
        loss.axhline(
            math.log(K), color=_RANDOM, linestyle="--", label=f"ln {K:.0f}: all images alike"
        )
        loss.legend(frameon=False, fontsize=9)
    loss.set(ylabel="loss (nats)", title=f"Pretraining: {path.resolve().parent.name}")
    rate.plot(steps, [record["lr"] for record in metrics], color="#c2571a", linewidth=1.5)
    rate.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return _save(figure, path, loss, rate)


def plot_probes(results: dict, path: Path) -> Path:
    """Top-1 accuracy of each probe, random weights beside pretrained; one panel per data set.

    Args:
        results: of `fastssl.evaluate.read_results`, with at least one data set.
    """
    figure = _figure(8, 3.8 * len(results))
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (data, by_weights) in zip(panels, results.items(), strict=True):
        accuracies = {weights: _accuracies(by_weights[weights]) for weights in by_weights}
        names = list(dict.fromkeys(name for values in accuracies.values() for name in values))
        for weights, shift, colour in (("random", -0.2, _RANDOM), ("pretrained", 0.2, _PRETRAINED)):
            values = accuracies.get(weights, {})
            if not values:
                continue
            bars = axes.bar(
                [names.index(name) + shift * (len(accuracies) > 1) for name in values],
                [value for value, _ in values.values()],
                width=0.38,
                yerr=[sd for _, sd in values.values()],
                error_kw={"linewidth": 1, "capsize": 2, "ecolor": "#333333"},
                color=colour,
                label=weights,
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel="top-1 accuracy (%)", ylim=(0, 108))
        axes.set_title(f"Frozen features on {_short(data)}", loc="left")
        axes.set_yticks(range(0, 101, 20))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    return _save(figure, path, *panels)


def plot_embedding(
    maps: dict[str, Tensor], y: Tensor, class_names: tuple[str, ...], data: str, path: Path
) -> Path:
    """Scatter of 2-D maps (N, 2), side by side, coloured by label y (N,); -1 is grey."""
    figure = _figure(5 * len(maps) + 1.5, 4.8)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    classes = [c for c in y.unique().tolist() if c >= 0]
    palette = require("matplotlib", "demo").colormaps["tab10"]
    for axes, (title, points) in zip(panels, maps.items(), strict=True):
        unlabelled = points[y < 0]
        axes.scatter(*unlabelled.T.tolist(), s=10, color=_RANDOM, linewidths=0)
        for rank, c in enumerate(classes):
            # Ten colours that can be told apart; further tens get another marker.
            axes.scatter(
                *points[y == c].T.tolist(),
                s=14,
                color=palette(rank % 10),
                marker="o^s"[rank // 10 % 3],
                alpha=0.75,
                linewidths=0,
                label=class_names[c],
            )
        axes.set(title=title, xlabel="1st principal component (sd)")
    panels[0].set_ylabel("2nd principal component (sd)")
    if classes and len(classes) <= 30:
        panels[-1].legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            fontsize=8,
            frameon=False,
            markerscale=1.8,
        )
    figure.suptitle(f"Features of {len(y)} images of {_short(data)}")
    return _save(figure, path, *panels)


def _accuracies(results: dict) -> dict[str, tuple[float, float]]:
    """Accuracy and its deviation (NaN without draws) in percent, by metric."""
    return {
        metric: (value, result.get("sd_percent", {}).get(metric, math.nan))
        for result in results.values()
        for metric, value in result.get("top1_percent", {}).items()
    }


def _short(data: str) -> str:
    return Path(data).name


def _figure(width: float, height: float):
    # Not pyplot: it would choose a window system and keep every figure alive.
    return require("matplotlib.figure", "demo").Figure((width, height), layout="constrained")


def _save(figure, path: Path, *panels) -> Path:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dddddd")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    return path
