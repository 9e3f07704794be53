"""What a network's features are worth: probes, fine-tuning, retrieval, diagnostics, metrics."""

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import __version__
from ..data import load
from ..extras import nearest as nearest_name
from .cache import FeatureCache
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
from .features import Split, extract, frozen, main_rank
from .finetune import finetune
from .groups import calibration_error, group_report
from .knn import knn, knn_leave_one_out
from .kshot import kshot, subset
from .labels import with_labels, with_masks
from .linear import fit_logistic, held_out, linear
from .linear_sgd import linear_sgd
from .multilabel import average_precision, label_sets, multilabel, multilabel_probe, roc_auc
from .networks import Inputs, Network, open_network
from .own_classifier import own_classifier
from .retrieval import copy_detection, retrieval
from .segmentation import ConfusionMatrix
from .segmentation_probe import segmentation_probe
from .table import table
from .task import Task
from .text_retrieval import text_ranks, text_retrieval
from .views import copies, group_accuracy, robustness, view_alignment
from .zero_shot import class_weights, zero_shot

__all__ = [
    "PROTOCOLS",
    "ConfusionMatrix",
    "Embedding",
    "FeatureCache",
    "Inputs",
    "Split",
    "Task",
    "alignment",
    "average_precision",
    "calibration_error",
    "class_alignment",
    "class_weights",
    "clusters",
    "copy_detection",
    "diagnostics",
    "embed",
    "evaluate",
    "extract",
    "feature_std",
    "finetune",
    "fit_logistic",
    "frozen",
    "group_report",
    "knn",
    "knn_leave_one_out",
    "kshot",
    "label_sets",
    "linear",
    "linear_sgd",
    "multilabel",
    "multilabel_probe",
    "merge_results",
    "open_network",
    "own_classifier",
    "rankme",
    "read_results",
    "retrieval",
    "robustness",
    "roc_auc",
    "segmentation_probe",
    "subset",
    "table",
    "text_ranks",
    "uniformity",
]

# (train_h, train_y, test_h, test_y, settings) -> result
_ON_FEATURES = {
    "knn": knn,
    "knn-loo": knn_leave_one_out,
    "linear": linear,
    "kshot": kshot,
    "subset": subset,
    "multilabel": multilabel_probe,
    "retrieval": retrieval,
    "clusters": clusters,
    "diagnostics": diagnostics,
    "rankme": diagnostics,
}
_TRAIN_ONLY = {"knn-loo", "clusters", "diagnostics", "rankme"}
# (task, settings) -> result: they go back to the images
_ON_IMAGES = {
    "linear-sgd": linear_sgd,
    "finetune": finetune,
    "classifier": own_classifier,
    "segmentation": segmentation_probe,
    "copy-detection": copies,
    "alignment": view_alignment,
    "robustness": robustness,
    "groups": group_accuracy,
    "zero-shot": zero_shot,
    "text-retrieval": text_retrieval,
}
PROTOCOLS = (*_ON_FEATURES, *_ON_IMAGES)
_DEFAULT = ("knn", "linear", "kshot")
_ANY_LABELS = {"multilabel", "finetune", "segmentation", "copy-detection", "alignment", "rankme"}
_ANY_LABELS |= {"text-retrieval"}
_SCORED = {"test": "test split", "held-out": "a tenth of the training split, held out"}
_GIVEN = {"train_h", "train_y", "test_h", "test_y", "gallery_h", "gallery_y", "query_h", "query_y"}
_GIVEN |= {"h", "y", "task"}


def evaluate(
    network: str | os.PathLike | nn.Module,
    data=None,
    protocols: Sequence[str] | None = None,
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
    backbone: str | None = None,
    split: Literal["test", "held-out"] = "test",
    labels: str | os.PathLike | None = None,
    masks: str | os.PathLike | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    cache: FeatureCache | None = None,
    **settings,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run, a checkpoint, a model of timm or torchvision, or any module on images.

    All but `finetune` leave the network frozen, and prove it. Features are computed once, in eval
    mode, in float32, without augmentation, and protocols share them. Nothing is chosen on the
    images that are scored.

    Args:
        network: a run's folder, a file of weights, `timm:NAME`, `torchvision:NAME`, see
            `open_network`; or a module from (B, C, S, S) float32 to (B, D).
        data: `digits`, `patches`, `shapes` or a folder; or a pair of sources (train, test). Default
            for a run: the images it was trained on.
        protocols: any of PROTOCOLS; by default knn, linear and kshot, with several labels an image
            multilabel.
        weights: "pretrained", or "random" for the same network as it was before training, the
            baseline to compare with.
        backbone: of a file of weights that does not say whose they are.
        split: what is scored: "test"; or "held-out", a tenth of the training split that is then
            left out of it, for choices: the test split is not opened.
        labels: CSV file with several labels an image, see `labels.with_labels`; a `labels.csv` in
            the data folder is found. masks: folder of masks, see `labels.with_masks`.
        image_size: S in pixels; default: the network's own, or the data's.
        batch_size: images per forward pass.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        cache: where features are kept between calls; None keeps none.
        settings: of the protocols, under the names of their arguments; each goes to all that have
            it. `seeds` is also the number of draws of kshot and subset.

    Returns:
        For each protocol its numbers (`top1_percent` or `percent`) and, as `protocol`, all that
        they depend on.
        For a run they are also merged into `results.json` in its folder, by data and weights.

    Raises:
        FileNotFoundError: not a run, or no such data. ValueError: unknown protocol or setting, data
            without labels or with the wrong number of channels, a class missing in the training
            split. RuntimeError: the network changed its weights or BatchNorm statistics meanwhile.

    Notes: under torchrun each rank computes a part of the features, and the first writes.

    Example:
        >>> pixels = torch.nn.Flatten()  # any module may stand for the backbone
        >>> results = evaluate(pixels, "digits", ["knn"])
        >>> results["knn"]["top1_percent"]["knn-10"] > 95
        True
    """
    _check_protocols(protocols, settings)
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be >= 1, got {batch_size}.")
    if weights not in ("pretrained", "random"):
        raise ValueError(f'evaluate: weights must be "pretrained" or "random", got {weights!r}.')
    if split not in ("test", "held-out"):
        raise ValueError(f'evaluate: split must be "test" or "held-out", got {split!r}.')
    opened = open_network(network, weights, image_size, backbone)
    if data is None and opened.data is None:
        raise ValueError("evaluate: data must be given with a backbone, got None.")
    test_needed = protocols is None or not _TRAIN_ONLY.issuperset(protocols)
    given = opened.data if data is None else data
    train, test = _splits(given, opened, image_size, split, test_needed)
    train, test = (_with_sidecars(part, labels, masks) for part in (train, test))
    _check_channels(opened, train.source)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = opened.inputs or Inputs(train.source.image_size)
    task = Task(opened, train, test, inputs, batch_size, device, cache)
    several = train.labels.ndim == 2
    if protocols is None:
        protocols = ("multilabel",) if several else _DEFAULT
    for name in protocols:
        if several and name not in _ANY_LABELS:
            raise ValueError(
                f"evaluate: {name} must have one label an image, got several in "
                f"{train.source.name!r}. Use {', '.join(sorted(_ANY_LABELS))}."
            )
    results = {}
    for name in protocols:
        result = _run(name, task, settings)
        result["protocol"] = opened.about | _common(name, task, split) | result["protocol"]
        results[name] = result
        if opened.run and main_rank():  # at once: an error in one does not cost the others
            merge_results(opened.run / "results.json", opened.about["weights"], results)
    return results


def _check_protocols(protocols: Sequence[str] | None, settings: dict[str, Any]) -> None:
    for name in protocols or ():
        if name not in PROTOCOLS:
            known = nearest_name(name, PROTOCOLS)
            if "Known" not in known:
                known += f"Known: {', '.join(PROTOCOLS)}."
            raise ValueError(f"evaluate: protocols must be known ones, got {name!r}. {known}")
    if protocols is not None and not protocols:
        raise ValueError("evaluate: protocols must name at least one, got none.")
    asked = (*_DEFAULT, "multilabel") if protocols is None else protocols
    taken = {key for name in asked for key in settings_of(name)}
    taken |= {"seeds"} if "draws" in taken else set()
    for key in settings:
        if key not in taken:
            raise ValueError(
                f"evaluate: no protocol asked for takes {key!r}. {nearest_name(key, taken)}"
            )


def settings_of(protocol: str) -> dict[str, inspect.Parameter]:
    """What can be set of a protocol: name and default."""
    function = (_ON_FEATURES | _ON_IMAGES)[protocol]
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in parameters.items() if key not in _GIVEN}


def _run(name: str, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    takes = settings_of(name)
    own = {key: value for key, value in settings.items() if key in takes}
    if "seeds" in settings and "draws" in takes:
        own.setdefault("draws", settings["seeds"])
    if name in _ON_IMAGES:
        return _ON_IMAGES[name](task, **own)
    h, y = task.features("train")
    if name == "rankme":
        found = diagnostics(h, **own)
        return {key: found[key] for key in ("rankme", "feature_std", "protocol")}
    if name == "multilabel":
        own.setdefault("names", task.train.source.class_names if y.ndim == 2 else None)
    rest = () if name in _TRAIN_ONLY else task.features("test")
    return _ON_FEATURES[name](h, y, *rest, **own)


def _splits(
    data, opened: Network, image_size: int | None, split: str, test_needed: bool
) -> tuple[Split, Split]:
    """Images to fit on and images to score, none where only the former are asked for."""
    size = image_size or (opened.inputs and opened.inputs.size)
    named = isinstance(data, (str, os.PathLike))
    train = Split.whole(load(data, "train", size) if named else data[0])
    if split == "test" and not test_needed:
        return train, train[torch.arange(0)]
    if split == "test":
        return train, Split.whole(load(data, "test", size) if named else data[1])
    labels = train.labels
    several = labels.ndim == 2 or (labels < 0).any()
    held = held_out(torch.zeros(len(train), dtype=torch.int64) if several else labels, seed=1)
    return train[(~held).nonzero()[:, 0]], train[held.nonzero()[:, 0]]


def _with_sidecars(split: Split, labels, masks) -> Split:
    source = split.source
    beside = Path(source.name, "labels.csv")
    if labels is None and hasattr(source, "paths") and beside.is_file():
        labels = beside
    if labels is not None:
        source = with_labels(source, Path(labels))
    if masks is not None:
        source = with_masks(source, Path(masks))
    return Split(source, split.index)


def _check_channels(opened: Network, source) -> None:
    wanted = opened.inputs and opened.inputs.channels
    if wanted and source.channels != wanted and (source.channels, wanted) != (1, 3):
        raise ValueError(
            f"evaluate: data must have the {wanted} channels the run was trained with, "
            f"got {source.channels} in {source.name!r}. Evaluate on other images."
        )


def _common(name: str, task: Task, split: str) -> dict[str, Any]:
    """What the protocols' numbers depend on beside their own settings."""
    source = task.train.source
    only_train = name in _TRAIN_ONLY
    once = name in _ON_FEATURES or name in ("robustness", "groups")
    common = {
        "data": source.name,
        "train_images": len(task.train),
        "test_images": len(task.test),
        "scored": "training split" if only_train and split == "test" else _SCORED[split],
        "image_size": task.inputs.size,
        "inputs": task.inputs.described(),
        "weights_digest": task.weights_digest,
        "versions": {"fastssl": __version__, "torch": torch.__version__},
    } | task.feature_dim
    unreadable = {path for part in (task.train, task.test) for path in part.source.corrupt}
    if unreadable:
        common["unreadable_images"] = f"{len(unreadable)}, each replaced by the next one"
    if once:
        common["features"] = "backbone output, eval mode, float32, without augmentation"
    return common


def read_results(run: str | os.PathLike) -> dict[str, dict[str, dict[str, Any]]]:
    """All results of a run, or in a file: data, then weights, then protocol. Empty before the first
    evaluation.

    Raises:
        ValueError: `results.json`, or the file, is not what `evaluate` writes.
    """
    return _read(Path(run) if Path(run).is_file() else Path(run) / "results.json")


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"evaluate: {path} must be JSON, got {error}. Move it away to start a new one."
        ) from error


def merge_results(path: Path, weights: str, results: dict[str, Any]) -> None:
    """Add results to a file of them, which is whole or as before whenever this is interrupted.

    They go by the data they are of; those of held-out images apart from those of the test split.
    """
    everything = _read(path)
    for name, result in results.items():
        data = result["protocol"]["data"]
        if result["protocol"]["scored"] == _SCORED["held-out"]:
            data += " (held-out)"
        everything.setdefault(data, {}).setdefault(weights, {})[name] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(everything, indent=2) + "\n")
    partial.replace(path)
