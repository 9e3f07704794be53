"""A backbone and the layers on it that tell classes: what fine-tuning makes, and its file."""

import json
from pathlib import Path

from torch import Tensor, nn

from ..extras import require
from .heads import mlp


class Classifier(nn.Module):
    """Class scores (B, classes) of images x: head(neck(backbone(x))).

    Args:
        backbone: (B, C, s, s) to (B, D).
        neck: layers between, such as the first ones of the head it was pretrained with.
        head: to (B, classes).
    """

    def __init__(self, backbone: nn.Module, neck: nn.Sequential, head: nn.Linear):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def first_layers(head: nn.Module, count: int) -> nn.Sequential:
    """The first hidden layers of an `mlp`, each with the normalisation and activation after it."""
    layers = list(head) if isinstance(head, nn.Sequential) else []
    ends = [i for i, layer in enumerate(layers, 1) if isinstance(layer, (nn.ReLU, nn.GELU))]
    if not 1 <= count <= len(ends):
        raise ValueError(
            f"finetune: from_head must be at most the {len(ends)} hidden layers of the head of the "
            f"method, got {count}."
        )
    return nn.Sequential(*layers[: ends[count - 1]])


def packed(model: Classifier, *, backbone: str, **about: str) -> bytes:
    """A file for `load_classifier`, which says the name of the backbone and what else is given: at
    least channels and image_size."""
    linear = [layer for layer in model.neck if isinstance(layer, nn.Linear)]
    kinds = {type(layer) for layer in model.neck}
    neck = {
        "dims": [x.in_features for x in linear[:1]] + [x.out_features for x in linear],
        "norm": "bn" if nn.BatchNorm1d in kinds else None,
        "act": "gelu" if nn.GELU in kinds else "relu",
    }
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "backbone": backbone, **about, "neck": json.dumps(neck)}
    return require("safetensors.torch", "train").save(weights, metadata)


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, str]]:
    """The classifier in a file that fine-tuning saved, in eval mode, and what the file says of it.

    Raises:
        ValueError: another file. FileNotFoundError: none.
    """
    from . import build_backbone

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"classifier: there is no file {path}. Make one with: fastssl evaluate RUN --protocol "
            "finetune --save FILE."
        )
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            known = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of a Rust extension, of its own type
        raise ValueError(f"classifier: {path} is no safetensors file: {error}.") from error
    if "neck" not in known:
        raise ValueError(
            f"classifier: {path} must be a file that fine-tuning saved (fastssl evaluate RUN "
            f"--protocol finetune --save FILE), got one that says {known}."
        )
    backbone = build_backbone(known["backbone"], int(known["channels"]), int(known["image_size"]))
    neck = json.loads(known["neck"])
    dims = neck.pop("dims")
    layers = mlp([*dims, 1], **neck)[:-1] if dims else nn.Sequential()
    classes, width = state["head.weight"].shape
    classifier = Classifier(backbone, layers, nn.Linear(width, classes))
    classifier.load_state_dict(state)
    return classifier.eval(), known
