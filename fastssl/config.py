"""One typed configuration for Python, YAML and the command line."""

import ast
import contextlib
import inspect
import json
import math
import os
import re
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .extras import nearest, require


@dataclass
class PretrainConfig:
    """Everything a pretraining run depends on.

    None means "not set": a fresh run takes the value from the method's recipe for the data
    (`fastssl.methods.recipes`), a resumed run from the run itself. The run's config.yaml holds the
    resolved values.

    Raises:
        ValueError: a value of the wrong type, choice or range, or `method_args` that the method's
            class does not take; all messages name the setting, the rule and the value.
    """

    method: str = "simclr"
    data: str | list[Any] = "digits"
    """A folder of images (subfolders are labels), a list of them (.txt, .csv), `shards:PATH` (tar),
    `hf:NAME` (Hugging Face), .npz or .pt, `mix:FILE.yaml` (several; in YAML also a list of {data,
    weight}), or built-in `digits`, `patches` or `shapes`."""
    out: str | None = None
    """The run's folder; none: runs/METHOD."""
    method_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method's class, e.g. temperature."""
    recipe: str | None = None
    """The method's recipe that unset fields come from, as `cifar10` or `imagenet` after published
    runs; none: that of the data."""
    backbone: str | None = None
    """`resnet_small`, `resnet18_cifar`, `vit_small`, `timm:NAME` or `torchvision:NAME`."""
    init_from: str | None = None
    """Weights to start from: a run's folder, a .safetensors or .pt file (with `:teacher` its
    teacher), or `timm`, `torchvision` for what they publish; none: random."""
    init_heads: bool | None = None
    """Start the heads too, with those of the run that init_from names where they fit; none: no."""
    image_size: int | None = None
    """Side of the training crops in pixels; none: the size of the data."""
    epochs: int | None = None
    """Passes over the images."""
    batch_size: int | None = None
    """Images per step over all processes."""
    optimizer: (
        Literal[
            "adamw", "adam", "sgd", "lars", "lamb", "lion",
            "adamw8bit", "adam8bit", "sgd8bit", "lars8bit", "lamb8bit", "lion8bit",
        ]
        | None
    ) = None  # fmt: skip
    """LARS and LAMB are for batches of thousands; 8-bit states take a quarter of the memory."""
    optimizer_args: dict[str, Any] | None = None
    """Keyword arguments of the optimizer's class, as eta=0.02,clip=true for LARS."""
    lr: float | None = None
    """Peak learning rate, used as it is (no scaling with the batch)."""
    lr_schedule: Literal["cosine", "linear", "constant"] | None = None
    """How the rate falls to min_lr after the warm-up; none: cosine."""
    min_lr: float | None = None
    """Learning rate at the end; none: 0."""
    layer_decay: float | None = None
    """Factor in (0, 1] on the rate of each layer of the backbone below the last; none: 1."""
    bias_lr_factor: float | None = None
    """Factor on the rate of what does not decay: biases and normalisation; none: 1."""
    weight_decay: float | None = None
    """Of matrices and filters; biases and normalisation are left alone."""
    final_weight_decay: float | None = None
    """Weight decay at the end, reached by a cosine; none: as weight_decay."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises from zero, before it falls."""
    max_grad_norm: float | None = None
    """Longest gradient over all parameters, longer ones are scaled down; none or 0: any."""
    sam_rho: float | None = None
    """Sharpness-aware steps, with the gradient at this distance; each costs two; none or 0: no."""
    sam_adaptive: bool | None = None
    """Measure sam_rho relative to the weights (ASAM; rho is then 0.5 to 2); none: no."""
    freeze: list[str] | None = None
    """Names of parameters that do not train, commas between, as `backbone.stages.0.*`; none: no."""
    chunk: int | None = None
    """Images the backbone, and captions a text tower, encodes at a time on each rank, for large
    batches in little memory; the gradients are the whole batch's; a step costs about a third more
    time; none or 0: all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 are autocast, with fp32 weights; fp16, for GPUs without bf16, scales the loss;
    auto: bf16 on GPUs that have it, fp32 on CPUs."""
    compile: bool = False
    """Compile the backbone (torch.compile), a text tower not; the first steps take minutes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: the weights whole on each process, or (FSDP2) in shards over them."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` ...; auto: the GPU if there is one."""
    max_side: int | None = None
    """Longest side in pixels of a folder's decoded images; none: three times image_size."""
    workers: int | None = None
    """Decoding threads per rank; none: its share of the cores, up to 8; 0: between the steps."""
    seed: int = 0
    """Of the weights, the order of the images, and their augmentation."""
    log_every: int | None = None
    """Steps between two lines of metrics; none: about a hundred lines, at most 50 steps apart."""
    monitor: bool = True
    """Log probe_top1, knn_top1, rankme and feature_std of the training features; never changes the
    weights."""
    trackers: str | None = None
    """Where metrics also go: any of tensorboard, wandb, mlflow; commas between."""
    save_every: int | None = None
    """Epochs between two checkpoints; the last step is always saved; none: 5."""
    keep: int | None = None
    """The newest checkpoints that stay; none: 1."""
    hold_out: float = 0.0
    """Share of the images not trained on; the checkpoint by whose features they are classified best
    stays too."""
    resume: bool = False
    """Go on with the run in `out` instead of starting a fresh one."""

    def __post_init__(self):
        vars(self).update(_checked(vars(self), get_type_hints(type(self)), "config"))
        if isinstance(self.data, list):
            self.data = f"mix:{json.dumps(self.data)}"
        if self.optimizer_args:  # a tuple as the list that the run's file will have
            self.optimizer_args = json.loads(json.dumps(self.optimizer_args))
        path, _, own = self.method.rpartition(":")
        if path.endswith(".py"):  # the same file from whatever folder a run is resumed
            self.method = f"{Path(path).expanduser().resolve()}:{own}"
        if self.out is None:
            self.out = f"runs/{own}"
        names = [name.strip() for name in (self.trackers or "").split(",") if name.strip()]
        self.trackers = ",".join(names) or None
        for name in names:
            if name not in _TRACKERS:
                hint = nearest(name, _TRACKERS)
                raise ValueError(f"config: trackers must be known ones, got {name!r}. {hint}")
        arguments = method_arguments(self.method)
        self.method_args = _checked(self.method_args, arguments, "config: method_args")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"config: {name} must be a finite number >= {least}, got {value}.")


_TRACKERS = ("tensorboard", "wandb", "mlflow")
_LEAST = {"epochs": 1, "batch_size": 2, "image_size": 1, "max_side": 1, "log_every": 1}
_LEAST |= {"save_every": 1, "keep": 1, "hold_out": 0, "workers": 0, "seed": 0}
_LEAST |= {"lr": 0, "bias_lr_factor": 0, "weight_decay": 0, "warmup_epochs": 0}
_LEAST |= {"min_lr": 0, "final_weight_decay": 0, "max_grad_norm": 0, "sam_rho": 0, "chunk": 0}


def from_dict(values: dict[str, Any], where: str = "config") -> PretrainConfig:
    """The configuration with these fields; the others keep their default.

    Text is read as the type that is asked for, so that the command line needs no rules of its own,
    and `3e-3`, which YAML takes for text, is a number.

    Args:
        values: fields of `PretrainConfig`.
        where: what the messages call it, for instance the file's name.

    Raises:
        ValueError: an unknown name (with the nearest known one), a wrong type, choice or range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a mapping of settings, got {values!r}.")
    return PretrainConfig(**_checked(values, get_type_hints(PretrainConfig), where))


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, or something else in it.
    """
    yaml = require("yaml", "train")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"config: cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config: {path} must be YAML, got {reason}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold lines of `name: value`, got {values!r}.")
    return values


def load_config(path: str | os.PathLike) -> PretrainConfig:
    """The configuration in a YAML file, for instance a run's config.yaml. Raises as `from_dict`."""
    return from_dict(read_yaml(path), str(path))


def method_arguments(method: str) -> dict[str, Any]:
    """Keyword arguments of a method's class, by name, with their type annotations.

    Raises:
        ValueError: unknown method.
    """
    # Methods import their recipes, and those this file.
    from .methods import method_class

    init = method_class(method).__init__
    hints = get_type_hints(init)
    parameters = inspect.signature(init).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY}


def field_help() -> dict[str, str]:
    """The text below each field of `PretrainConfig` in this file: the command line's help."""
    body = ast.parse(inspect.getsource(PretrainConfig)).body[0].body
    texts = {f.name: "" for f in fields(PretrainConfig)}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[statement.target.id] = inspect.cleandoc(following.value.value)
    return texts


def argument_help(cls: type) -> dict[str, str]:
    """The text behind each name in the `Args:` of a class's docstring, in one line."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        begun = re.match(r"([\w, ]+): (.+)", line)
        if begun:
            names = [name.strip() for name in begun[1].split(",")]
            texts |= dict.fromkeys(names, begun[2])
        elif line.startswith(" ") and names:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            names = []
    return texts


def type_name(kind: Any) -> str:
    """A type as a reader writes it: `int or none`, `adamw, lars, sgd or none`."""
    *names, last = _type_names(kind)
    return f"{', '.join(names)} or {last}" if names else last


def _type_names(kind: Any) -> list[str]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(choice) for choice in parts]
    if origin in (Union, types.UnionType):
        return [name for part in parts for name in _type_names(part)]
    names = {str: "text", bool: "true or false", dict: "a mapping", type(None): "none", Any: "any"}
    names |= {int: "a whole number", float: "a number", list: "a list", Path: "a file"}
    return [names.get(origin or kind, str(kind))]


_NO_ACCUMULATION = (
    "Summed losses of small batches are not the contrastive loss of a large one, as each row meets "
    "only its own batch's negatives. A chunk, images encoded at a time, fits a large batch."
)


def _checked(values: dict[str, Any], hints: dict[str, Any], where: str) -> dict[str, Any]:
    for name in values:
        if name not in hints:
            hint = _NO_ACCUMULATION if "accum" in str(name) else nearest(str(name), hints)
            raise ValueError(f"{where}: unknown setting {name!r}. {hint}".rstrip())
    return {name: _convert(value, hints[name], name, where) for name, value in values.items()}


def _convert(value: Any, kind: Any, name: str, where: str) -> Any:
    """`value` as the type `kind`, or a ValueError that names both."""
    try:
        return _as_type(value, kind)
    except ValueError:
        got = f"{value!r}" if isinstance(value, str) else f"{value!r} ({type(value).__name__})"
        choices = [
            c for k in (kind, *get_args(kind)) if get_origin(k) is Literal for c in get_args(k)
        ]
        hint = nearest(str(value), choices) if choices else ""
        message = f"{where}: {name} must be {type_name(kind)}, got {got}. {hint}"
        raise ValueError(message.rstrip()) from None


def _as_type(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or (origin is Literal and value in parts):
        return value
    if kind is type(None) and value in (None, "none", "null"):
        return None
    if origin in (Union, types.UnionType):
        # None first, because `str | None` would take the text "none".
        for part in sorted(parts, key=lambda part: part is not type(None)):
            try:
                return _as_type(value, part)
            except ValueError:
                continue
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if kind in (int, float) and isinstance(value, str):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if origin is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if origin is dict and isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        return {name.strip(): _number_or_text(text.strip()) for name, _, text in pairs}
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is Path and isinstance(value, (str, os.PathLike)):  # from whatever folder it is read
        return str(Path(value).expanduser().resolve())
    # By exact type: True is an int to isinstance, and `epochs: true` is a mistake.
    if type(value) is (origin or kind):
        return value
    raise ValueError


def _number_or_text(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # true, and True as Python has it
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    return text
