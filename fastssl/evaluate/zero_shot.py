"""Classification by captions: the class whose name, in sentences, lies nearest to the image."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .features import frozen
from .task import Task, check_one_label
from .towers import open_towers

PHOTOS = (
    "a photo of a {}.",
    "a snapshot of a {}.",
    "a bad photo of a {}.",
    "a photo of a large {}.",
    "a photo of a small {}.",
    "a {} in a video game.",
    "a drawing of a {}.",
)
"""Prompts for data that bring none of their own."""


def class_weights(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """A classifier from the names of the classes.

        W_c = n(mean_t n(g(t with c's name))),    n(x) = x / |x|

    Args:
        encode: g, M captions to (M, D).
        names: K; an underscore counts as a space.
        templates: sentences, with {} in the place of the name.

    Returns:
        (K, D) float32, rows of unit length.

    Raises:
        ValueError: no class, no template, or one without {}.

    Memory: the K x T captions' features at once.

    Example:
        >>> lengths = lambda texts: torch.tensor([[len(text), 1.0] for text in texts])
        >>> class_weights(lengths, ["ox"], ["{}", "an {}"]).shape
        torch.Size([1, 2])

    Paper: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    wrong = [template for template in templates if "{}" not in template]
    if not names or not templates or wrong:
        got = f"the template {wrong[0]!r}" if wrong else f"{len(names)} and {len(templates)}"
        raise ValueError(
            "zero-shot: needs names of classes and templates with {} for the name, got " + got + "."
        )
    texts = [t.replace("{}", name.replace("_", " ")) for name in names for t in templates]
    each = F.normalize(encode(texts).float(), dim=1).view(len(names), len(templates), -1)
    return F.normalize(each.mean(1), dim=1)


def zero_shot(task: Task, templates: str | os.PathLike | Sequence[str] | None = None) -> dict:
    """Classify the scored images without any label: by cosine with `class_weights`.

    Args:
        task: of a run whose method has a text tower; one label an image.
        templates: sentences, or a text file of them, one a line; by default those of the source, or
            seven for photos.

    Returns:
        `top1_percent` of the first template alone ("single") and of all ("ensemble"), and the
        `protocol`.

    Raises:
        ValueError: not such a run; templates without {}; images without one label each.
    """
    check_one_label("zero-shot", task.test)
    names = task.test.source.class_names
    if templates is None:
        templates = getattr(task.test.source, "templates", PHOTOS)
    elif isinstance(templates, (str, os.PathLike)):
        lines = Path(templates).read_text(encoding="utf-8").splitlines()
        templates = [line.strip() for line in lines if line.strip()]
    towers = open_towers("zero-shot", task)
    with frozen(towers):
        kinds = {"single": templates[:1], "ensemble": templates}
        weights = {
            kind: class_weights(lambda texts: towers.texts(texts, task.batch_size), names, some)
            for kind, some in kinds.items()
        }
    h, y = task.features("test", towers)
    found = {kind: (h @ W.T).argmax(1) for kind, W in weights.items()}
    return {
        "top1_percent": {k: 100 * (p == y).double().mean().item() for k, p in found.items()},
        "protocol": {
            "classes": len(names),
            "templates": len(templates),
            "first_template": templates[0],
            "features": "image encoder's output, cosine with the mean of the prompts' directions",
        },
    }
