"""What a frozen backbone's features are worth: probes, retrieval, diagnostics, and metrics."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data import load
from ..extras import nearest as nearest_name
from .clusters import clusters
from .diagnostics import (
    alignment,
    class_alignment,
    diagnostics,
    feature_std,
    rankme,
    uniformity,
)
from .embed import Embedding, embed
from .features import extract, frozen
from .groups import calibration_error, group_report
from .knn import knn, knn_leave_one_out
from .kshot import kshot
from .linear import fit_logistic, linear
from .multilabel import average_precision, multilabel, roc_auc
from .retrieval import copy_detection, retrieval
from .segmentation import ConfusionMatrix
from .table import table

__all__ = [
    "ConfusionMatrix",
    "Embedding",
    "alignment",
    "average_precision",
    "calibration_error",
    "class_alignment",
    "clusters",
    "copy_detection",
    "diagnostics",
    "embed",
    "evaluate",
    "extract",
    "feature_std",
    "fit_logistic",
    "frozen",
    "group_report",
    "knn",
    "knn_leave_one_out",
    "kshot",
    "linear",
    "multilabel",
    "rankme",
    "read_results",
    "retrieval",
    "roc_auc",
    "table",
    "uniformity",
]

# (train_h, train_y, test_h, test_y) -> result
_PROBES = {
    "knn": knn,
    "linear": linear,
    "kshot": kshot,
    "knn-loo": lambda train_h, train_y, *_: knn_leave_one_out(train_h, train_y),
    "retrieval": retrieval,
    "diagnostics": lambda train_h, train_y, *_: diagnostics(train_h, train_y),
}


def evaluate(
    run_or_backbone: str | os.PathLike | nn.Module,
    data=None,
    protocols: Sequence[str] = ("knn", "linear", "kshot"),
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    shots: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, Any]]:
    """Evaluate a run's backbone, or any module, on labelled images; the backbone stays frozen.

    Features are computed once, in eval mode, in float32, from centre squares without augmentation,
    and all protocols share them. The test split is used for nothing but the final score.

    Args:
        run_or_backbone: a run's folder, or a module from (B, C, S, S) float32 to (B, D).
        data: `digits`, `patches`, `shapes` or a folder; or a pair of sources (train, test). Default
            for a run: the images it was trained on.
        protocols: any of knn, linear, kshot, knn-loo (each training image by the others), retrieval
            (test images search the training split), diagnostics.
        weights: of a run: "pretrained", or "random" for the same network as it was at the start,
            the baseline to compare with.
        image_size: S in pixels; default: the run's, or the data's.
        batch_size: images per forward pass.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        shots: labels per class for kshot.

    Returns:
        For each protocol its numbers (`top1_percent`; for retrieval `percent`) and, as `protocol`,
        all that they depend on.
        For a run they are also merged into `results.json` in its folder, by data and weights.

    Raises:
        FileNotFoundError: not a run, or no such data. ValueError: unknown protocol, data without
            labels or with the wrong number of channels, a class missing in the training split.
        RuntimeError: the backbone changed its weights or BatchNorm statistics meanwhile.

    Example:
        >>> pixels = torch.nn.Flatten()  # any module may stand for the backbone
        >>> results = evaluate(pixels, "digits", ["knn"])
        >>> results["knn"]["top1_percent"]["knn-10"] > 95
        True
    """
    for name in protocols:
        if name not in _PROBES:
            known = nearest_name(name, _PROBES)
            raise ValueError(f"evaluate: protocols must be known ones, got {name!r}. {known}")
    if not protocols:
        raise ValueError("evaluate: protocols must name at least one, got none.")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be >= 1, got {batch_size}.")
    if weights not in ("pretrained", "random"):
        raise ValueError(f'evaluate: weights must be "pretrained" or "random", got {weights!r}.')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(run_or_backbone, nn.Module):
        backbone, run, common = run_or_backbone, None, {"weights": "as given"}
        if data is None:
            raise ValueError("evaluate: data must be given with a backbone, got None.")
    else:
        run = Path(run_or_backbone)
        backbone, info = _backbone_of(run, weights)
        data, image_size = data or info["source"], image_size or info["image_size"]
        common = {key: info[key] for key in ("method", "backbone")}
        common |= {"pretrained_on": info["source"], "weights": weights, "step": _step(run, weights)}
    train, test = (
        (load(data, split, image_size) for split in ("train", "test"))
        if isinstance(data, (str, os.PathLike))
        else data
    )
    if run and train.channels != info["channels"]:
        raise ValueError(
            f"evaluate: data must have the {info['channels']} channels the run was trained with, "
            f"got {train.channels} in {train.name!r}. Evaluate on other images."
        )
    image_size = image_size or train.image_size
    train_h, train_y = extract(backbone, train, image_size, batch_size, device)
    test_h, test_y = extract(backbone, test, image_size, batch_size, device)
    common |= {
        "data": train.name,
        "train_images": len(train_h),
        "test_images": len(test_h),
        "image_size": image_size,
        "features": "backbone output, eval mode, float32, centre squares without augmentation",
        "feature_dim": train_h.shape[1],
    }
    results = {}
    for name in protocols:
        settings = {"shots": shots} if name == "kshot" else {}
        result = _PROBES[name](train_h, train_y, test_h, test_y, **settings)
        result["protocol"] = common | result["protocol"]
        results[name] = result
        if run:  # at once, so that an error in one protocol does not cost the others
            _merge_results(run, train.name, weights, results)
    return results


def read_results(run: str | os.PathLike) -> dict[str, dict[str, dict[str, Any]]]:
    """All results of a run: data, then weights, then protocol. Empty before the first evaluation.

    Raises:
        ValueError: `results.json` is not what `evaluate` writes.
    """
    path = Path(run) / "results.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"evaluate: {path} must be JSON, got {error}. Move it away to start a new one."
        ) from error


def _backbone_of(run: Path, weights: str):
    from ..train import load_backbone, random_backbone

    return (load_backbone if weights == "pretrained" else random_backbone)(run)


def _step(run: Path, weights: str) -> int:
    """Optimizer steps behind the weights."""
    return json.loads((run / "summary.json").read_text())["steps"] if weights == "pretrained" else 0


def _merge_results(run: Path, data: str, weights: str, results: dict[str, Any]) -> None:
    everything = read_results(run)
    everything.setdefault(data, {}).setdefault(weights, {}).update(results)
    partial = run / f".results.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(everything, indent=2) + "\n")
    partial.replace(run / "results.json")  # whole or not at all, whenever it is interrupted
