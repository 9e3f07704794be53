"""Protocols that change the images: copies to be found, disturbances, two views of one image."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    RandomResizedCrop,
    Rotate,
    Solarize,
    View,
    presets,
)
from ..data import load
from .diagnostics import alignment, uniformity
from .features import Split, extract, frozen, standardise, top1_percent
from .groups import calibration_error, group_report
from .knn import nearest
from .linear import fit_selected
from .retrieval import copy_detection
from .task import Task, check_one_label, over_seeds

DISTURBANCES = {
    "noise": (Noise(0.1),),
    "blur": (GaussianBlur(1.0, (1.5, 1.5)),),
    "dark": (ColorJitter(brightness=(0.5, 0.5)),),
    "bright": (ColorJitter(brightness=(1.5, 1.5)),),
    "contrast": (ColorJitter(contrast=(0.4, 0.4)),),
    "grey": (Grayscale(1.0),),
    "solarize": (Solarize(1.0),),
}


def copies(task: Task, max_images: int = 2048, k: int = 10, seeds: int = 1) -> dict:
    """Copy detection: edited copies of test images search the originals, half of which are missing.

    The gallery is every second image of the test split. Each image of the split is a query: edited
    by a crop of 50 to 100 %, the mirror image half the time, up to 10 degrees, colours and blur. A
    query whose original is not in the gallery is a copy of nothing and should score low.

    Args:
        task: network and images; labels are not used.
        max_images: of the test split, at equal steps.
        k: pairs kept of each query.
        seeds: of the edits; from 2 on the deviation is given.

    Returns:
        `percent`: muap, micro average precision (`copy_detection`), and recall@1, the share of the
        queries with an original that find it first; of several seeds `sd_percent`; the `protocol`.

    Raises:
        ValueError: fewer than two images. RuntimeError: the backbone changes meanwhile.

    Paper: the metric of Douze et al., "The 2021 Image Similarity Dataset and Challenge",
    arXiv 2106.09672; the edits are ours and milder.
    """
    test, backbone = _thinned(task.test, max_images), task.network.backbone
    if len(test) < 2:
        raise ValueError(f"copy-detection: the test split must hold 2 images, got {len(test)}.")
    size, inputs = task.inputs.size, task.inputs
    crop = RandomResizedCrop(size, (0.5, 1.0), interpolation=inputs.interpolation)
    flip = (HorizontalFlip(),) if task.test.source.mirror else ()
    jitter, blur = ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(0.5)
    edit = View(crop, Rotate(10.0), *flip, jitter, blur, inputs.normalize)
    originals = test[torch.arange(0, len(test), 2)]
    gallery = extract(backbone, originals, inputs, task.batch_size, task.device, task.cache)[0]
    gallery_y = torch.arange(len(gallery))
    query_y = torch.arange(len(test)) // 2
    query_y[1::2] = -1

    def once(seed: int) -> dict[str, float]:
        with frozen(backbone):
            queries, _ = task.view_features(backbone, test, edit, seed=seed, epoch=0)
        first = nearest(queries[::2], gallery, 1)[1][:, 0]
        muap = copy_detection(gallery, gallery_y, queries, query_y, min(k, len(gallery)))
        return {"muap": 100 * muap, "recall@1": top1_percent(first, gallery_y)}

    found = over_seeds(once, seeds)
    result = {"percent": found["mean"]} | ({"sd_percent": found["sd"]} if "sd" in found else {})
    protocol = {"edit": str(edit), "gallery": len(gallery), "queries": len(test), "seeds": seeds}
    protocol |= {"k": k, "copies_of_nothing": len(test) // 2, "similarity": "cosine"}
    return result | {"protocol": protocol}


def view_alignment(task: Task, max_images: int = 4096, seeds: int = 1) -> dict:
    """How close two views of an image are, and how spread over the sphere views are.

    Views are SimCLR's: crops of 8 to 100 %, colours, grey, blur. Low is better for both, and each
    alone is easily had: all features alike are aligned, random ones are uniform.

    Args:
        task: network and images; the test split is used, labels are not.
        max_images: at equal steps of the split.
        seeds: of the views; from 2 on the deviation is given.

    Returns:
        `alignment` and `uniformity` of features of unit length, the `protocol`, and `sd`.

    Raises: RuntimeError: the backbone changes meanwhile.

    Paper: Wang and Isola, arXiv 2005.10242.
    """
    test, backbone = _thinned(task.test, max_images), task.network.backbone
    view = presets.simclr(task.inputs.size, flip=task.test.source.mirror)
    view = View(*(spec for spec in view.specs[:-1]), task.inputs.normalize)

    def once(seed: int) -> dict[str, float]:
        with frozen(backbone):
            x, y = (
                task.view_features(backbone, test, view, seed=seed, epoch=number)[0]
                for number in range(2)
            )
        return {"alignment": alignment(x, y), "uniformity": uniformity(x)}

    found = over_seeds(once, seeds)
    protocol = {"view": str(view), "images": len(test), "alpha": 2.0, "t": 2.0, "seeds": seeds}
    return found["mean"] | {"protocol": protocol} | ({"sd": found["sd"]} if "sd" in found else {})


def robustness(
    task: Task,
    disturbances: Sequence[str] = tuple(DISTURBANCES),
    shifts: Sequence[str] = (),
    seed: int = 0,
) -> dict:
    """A linear classifier of clean training images on disturbed test images and other data sets.

    Args:
        task: network and images.
        disturbances: of the test images, names in DISTURBANCES.
        shifts: data sets as `fastssl.data.load` takes them, whose test splits are scored by names
            of classes; where they have fewer classes, no other is predicted.
        seed: of the noise.

    Returns:
        `top1_percent`: clean, each disturbance and shift, `disturbed_mean`; `worst` and
        `gap_percent` from clean; `calibration_error` of each; and the `protocol`.

    Raises:
        ValueError: an unknown disturbance, a shift with classes the training split lacks, or images
            without one label. RuntimeError: the backbone changes meanwhile.

    Notes: severities are ours and fixed: the numbers compare networks on these images, not with
        ImageNet-C.
    """
    check_one_label("robustness", task.train, task.test)
    for name in disturbances:
        if name not in DISTURBANCES:
            raise ValueError(
                f"robustness: disturbances must be among {', '.join(DISTURBANCES)}, got {name!r}."
            )
    backbone = task.network.backbone
    train_h, train_y = task.features("train")
    weights, protocol = fit_selected(train_h, train_y, task.num_classes)
    top1, errors, of_shift = {}, {}, {}

    def score(name: str, h, y, allowed=None) -> None:
        (h,) = standardise(train_h, h)
        logits = h @ weights[0] + weights[1]
        if allowed is not None:
            other = torch.ones(task.num_classes, dtype=torch.bool).index_fill_(0, allowed, False)
            logits = logits.masked_fill(other, -torch.inf)
        top1[name] = top1_percent(logits.argmax(1), y)
        errors[name] = calibration_error(logits.double().softmax(1), y)

    score("clean", *task.features("test"))
    for name in disturbances:
        with frozen(backbone):
            score(name, *task.disturbed_features(task.test, DISTURBANCES[name], seed))
    if disturbances:
        mean = sum(top1[name] for name in disturbances) / len(disturbances)
    names = task.train.source.class_names
    for shift in shifts:
        source = load(shift, "test", task.inputs.size)
        unknown = sorted(set(source.class_names) - set(names))
        if unknown:
            raise ValueError(
                f"robustness: shifts must have classes of the training split, got {unknown[:5]} in "
                f"{shift!r}. Name the folders alike."
            )
        allowed = torch.tensor([names.index(name) for name in source.class_names])
        of = (backbone, source, task.inputs, task.batch_size, task.device, task.cache)
        h, y = extract(*of)
        check_one_label("robustness", Split.whole(source))
        score(shift, h, allowed[y], allowed)
        of_shift[shift] = {"images": len(h), "classes": len(allowed)}
    worst = min(top1, key=top1.get)
    result = {"top1_percent": top1, "worst": worst, "gap_percent": top1["clean"] - top1[worst]}
    if disturbances:
        result["top1_percent"] = top1 | {"disturbed_mean": mean}
    protocol |= {"disturbances": {name: str(DISTURBANCES[name]) for name in disturbances}}
    protocol |= {"shifts": of_shift, "seed": seed, "calibration_bins": 15}
    return result | {"calibration_error": errors, "protocol": protocol}


def group_accuracy(task: Task, groups: str | os.PathLike | None = None) -> dict:
    """Accuracy by group of a linear classifier's predictions on the test split: `group_report`.

    Args:
        task: network and images.
        groups: CSV file with two columns, image and group, and a line of headings; the image is its
            path inside the data folder, or its number in the test split. By default classes.

    Returns:
        What `group_report` gives, its three accuracies together as `top1_percent`;
        `calibration_error`; and the `protocol`.

    Raises:
        ValueError: a test image without a group, or images without one label.
    """
    check_one_label("groups", task.train, task.test)
    train_h, train_y = task.features("train")
    test_h, test_y = task.features("test")
    weights, protocol = fit_selected(train_h, train_y, task.num_classes)
    (test_h,) = standardise(train_h, test_h)
    logits = test_h @ weights[0] + weights[1]
    names, number = list(task.test.source.class_names), test_y
    if groups is not None:
        names, number = _read_groups(Path(groups), task.test)
    report = group_report(logits.argmax(1) == test_y, number, names)
    means = {"worst-group": "worst_group_percent", "group-mean": "group_mean_percent"}
    report["top1_percent"] = {"linear": report["top1_percent"]}
    report["top1_percent"] |= {name: report.pop(key) for name, key in means.items()}
    report["calibration_error"] = calibration_error(logits.double().softmax(1), test_y)
    return report | {"protocol": protocol | {"groups": str(groups or "classes")}}


def _read_groups(path: Path, split: Split):
    """Names of the groups, and the group (N,) of each image of the split."""
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    given = {row[0]: row[-1] for row in rows}
    names = sorted(set(given.values()))
    numbers = []
    for i, keys in zip(split.index.tolist(), image_names(split), strict=True):
        found = next((given[key] for key in (str(i), *keys) if key in given), None)
        if found is None:
            raise ValueError(
                f"groups: {path} must name the group of each test image, got none for "
                f"{(keys or [i])[0]!r}. Give its path inside the data folder, or its number."
            )
        numbers.append(names.index(found))
    return names, torch.tensor(numbers)


def image_names(split: Split) -> list[list[str]]:
    """The ways to name each image: its path inside the data folder, then its file name."""
    paths = getattr(split.source, "paths", None)
    if paths is None:
        return [[] for _ in range(len(split))]
    root = Path(split.source.name)  # a folder, or a list in one
    root = root if root.is_dir() else root.parent
    return [
        [Path(os.path.relpath(paths[i], root)).as_posix(), Path(paths[i]).name]
        for i in split.index.tolist()
    ]


def _thinned(split: Split, count: int) -> Split:
    """At most this many images at equal steps: sources often come class by class."""
    count = min(count, len(split))
    return split[torch.arange(count) * len(split) // max(count, 1)]
