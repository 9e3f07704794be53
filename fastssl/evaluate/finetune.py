"""Fine-tuning: the whole network learns from labels, from all of them or from few."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import augment
from ..data import epoch_order
from ..extras import nearest
from ..models import classifier
from ..random import step_seed
from ..train.backbones import load_method
from ..train.checkpoint import replacing
from .features import Split, loaded, process, top1_percent
from .finetune_recipes import RECIPES, Recipe, dropping_paths, mixing, optimizer_of, training_views
from .kshot import draw, draw_share, percent_name
from .layers import FeatureMap, transformer_blocks
from .linear import held_out
from .multilabel import average_precision, check_targets, roc_auc
from .task import Task, check_one_label, spread


def finetune(
    task: Task,
    recipe: str | None = None,
    shares: Sequence[float] = (1.0,),
    shots: Sequence[int] = (),
    epochs: int | None = None,
    train_batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    drop_path: float | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    rand_augment: int | None = None,
    pool: str | None = None,
    precision: str = "auto",
    from_head: int = 0,
    save: str | Path | None = None,
    seeds: int = 3,
) -> dict:
    """Accuracy after training a copy of the whole network and a linear head on labels.

    A tenth of the labelled images is held out class by class. The network is scored on it after
    every epoch; the weights of the best epoch (the first among equals) are scored on the test split
    once. Classes with fewer than ten labels give none of them away; where no class has ten it is
    the last epoch. Images with several labels are learned by binary cross-entropy and scored by the
    mean area under the ROC curve; the tenth is a random one.

    | recipe | optimizer | rate | batch, epochs | else |
    |---|---|---|---|---|
    | vit (MAE's ViT-B) | AdamW, decay 0.05 | 5e-4 B/256, times 0.65 a block downwards, 5 epochs
      warm-up, cosine | 1024, 100 | drop path 0.1, mixup 0.8, cutmix 1.0, smoothing 0.1,
      RandAugment 9; MAE's has pool="patches" |
    | thorax (MAE on radiographs) | AdamW, decay 0.05 | 2.5e-4 B/256, times 0.55 a block downwards,
      5 epochs warm-up, cosine to a hundredth | 1024, 75 | drop path 0.2, RandAugment 6, mean of the
      patches |
    | cnn (ours) | Nesterov 0.9, decay 1e-4 | 0.01 B/256, head 10 times, cosine | 256, 50 | |
    | simclr | Nesterov 0.9 | 0.05 B/256, cosine | 1024, 30; of 1 % 60 | |
    | simclr_v2 | LARS, momentum 0.9 | 0.005 sqrt(B), cosine | 1024, 30; of 1 % 60 | |
    | swav | Nesterov 0.9 | 0.01, head 0.2; of 1 % 0.02 and 5; a fifth at 60 and 80 % | 256, 20 | |

    Args:
        task: network and images.
        recipe: by default "vit" for a network with transformer blocks, of several labels an image
            "thorax", else "cnn".
        shares: of the labels, in (0, 1], the same number of each class; 1 is all.
        shots: numbers of labels a class, instead of shares.
        epochs, train_batch_size, lr, weight_decay, layer_decay, drop_path, mixup, cutmix,
            rand_augment: instead of the recipe's; batches are at most the labelled images.
        pool: "own", the network's features, or "patches", the mean of its last map.
        precision: "fp32", "bf16" by autocast, or "auto": bf16 on a GPU.
        from_head: hidden layers of the head that the run was pretrained with that are kept, below a
            classifier that begins at zero; 1 is SimCLRv2's.
        save: file (.safetensors) for the classifier of seed 0, a teacher for `distill`; with one
            number of labels only.
        seeds: of the head, the order, the augmentation and the drawn labels; from 2 on the
            deviation is given.

    Returns:
        `top1_percent`, or of several labels `percent` with AUC and AP, of several seeds
        `sd_percent`, and the `protocol` with the score held out after each epoch and the chosen
        one.

    Raises:
        ValueError: an unknown recipe, a value out of range, images without labels, several labels
            an image with shots, save or a recipe that mixes them, or a network that from_head or
            save cannot work with.
        ImportError: mixup, cutmix or RandAugment without torchvision. FloatingPointError: the loss
            diverged.

    Notes: augmentation is crops of 8 to 100 % and, where it means the same, the mirror image; then
        RandAugment, twice half the time one of torchvision's operations (timm's list and its noise
        on the magnitude differ a little), an image at a time on the CPU. MAE's random erasing is
        left out. Drop path skips a block as a whole, attention and MLP together, by a hook: any
        backbone's. Under torchrun the runs are dealt out to ranks.

    Example:
        >>> from fastssl.evaluate import evaluate
        >>> found = evaluate(torch.nn.Flatten(), "digits", ["finetune"], epochs=1, seeds=1)
        >>> found["finetune"]["protocol"]["recipe_name"]
        'cnn'

    Paper: MAE, arXiv 2111.06377; SimCLR, arXiv 2002.05709; SwAV, arXiv 2006.09882; SimCLRv2, arXiv
        2006.10029.
    """
    several = task.train.labels.ndim == 2
    if several:
        for split in (task.train, task.test):
            check_targets("finetune", torch.zeros(split.labels.shape), split.labels)
    else:
        check_one_label("finetune", task.train, task.test)
    backbone = task.network.backbone
    default = "thorax" if several else "vit"
    recipe = recipe or (default if transformer_blocks(backbone) else "cnn")
    if recipe not in RECIPES:
        known = nearest(recipe, [name for name in RECIPES if "%" not in name])
        raise ValueError(f"finetune: recipe must be a known one, got {recipe!r}. {known}")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(
            f'finetune: precision must be "fp32", "bf16" or "auto", got {precision!r}.'
        )
    if seeds < 1:
        raise ValueError(f"finetune: seeds must be >= 1, got {seeds}.")
    if pool not in (None, "own", "patches"):
        raise ValueError(f'finetune: pool must be "own" or "patches", got {pool!r}.')
    if several and shots:
        raise ValueError(
            f"finetune: shots must be of images with one label, got {tuple(shots)} and several "
            "labels an image. Use shares."
        )
    given = {
        "epochs": epochs, "batch_size": train_batch_size, "lr": lr, "weight_decay": weight_decay,
        "layer_decay": layer_decay, "drop_path": drop_path, "mixup": mixup, "cutmix": cutmix,
        "rand_augment": rand_augment,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    for name, value in given.items():
        if value < (1 if name in ("epochs", "batch_size") else 0):
            raise ValueError(f"finetune: {name} must be at least 1, a rate at least 0, got {value}")
    if rand_augment is not None and rand_augment > 10:
        raise ValueError(f"finetune: rand_augment must be at most 10, got {rand_augment}.")
    if pool is not None:
        given["pool"] = pool
    if precision == "auto":
        precision = "bf16" if torch.device(task.device).type == "cuda" else "fp32"
    settings = {}
    for part in shots or shares:
        few = not shots and part <= 0.01 and f"{recipe}-1%" in RECIPES
        chosen = RECIPES[f"{recipe}-1%" if few else recipe]
        name = f"{part}-shot" if shots else percent_name(part)
        settings["finetune" if part == 1.0 and not shots else f"finetune-{name}"] = (
            part,
            dataclasses.replace(chosen, **given),
        )

    if several and any(r.mixup or r.cutmix or r.label_smoothing for _, r in settings.values()):
        raise ValueError(
            f"finetune: recipe must neither mix nor smooth labels where images have several, got "
            f"{recipe!r}. Use thorax or cnn, without mixup and cutmix."
        )
    neck = _neck(task, from_head)
    if save is not None:
        save = _checked_path(task, Path(save), settings)

    runs = [(name, seed) for name in settings for seed in range(seeds)]
    rank, world = process()
    done = {}
    for name, seed in runs[rank::world]:
        part, r = settings[name]
        if shots:
            positions = draw(task.train.labels, part, seed)
        else:
            labels = task.train.labels
            classes = torch.zeros(len(labels), dtype=torch.int64) if several else labels
            positions = draw_share(classes, part, seed)
        found, model = _once(task, task.train[positions], r, precision, seed, neck)
        done[name, seed] = found
        if save is not None and seed == 0:
            _save(model, save, task, found)
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, done)
        done = {key: value for found in parts for key, value in found.items()}

    kind, measures = "top1_percent", {"": "top1_percent"}
    if several:
        kind, measures = "percent", {"-auc": "auc_percent", "-map": "map_percent"}
    found = spread(
        [
            {
                f"{name}{m}": done[name, seed][key]
                for name in settings
                for m, key in measures.items()
            }
            for seed in range(seeds)
        ]
    )
    result = {kind: found["mean"]}
    if "sd" in found:
        result |= {"sd_percent": found["sd"], f"{kind}_by_seed": found["each"]}
    protocol = {
        "recipe": {name: dataclasses.asdict(r) for name, (_, r) in settings.items()},
        "recipe_name": recipe,
        "precision": precision,
        "from_head": from_head,
        "augmentation": str(task.inputs.training_view(task.train.source.mirror)),
        "momentum": 0.9,
        "epoch": "best on a tenth of the labelled images, held out; the last if there is none",
        "seeds": seeds,
        "runs": {name: [done[name, seed] for seed in range(seeds)] for name in settings},
    }
    return result | {"protocol": protocol}


def _neck(task: Task, from_head: int) -> nn.Sequential:
    """The layers of the run's head that are kept."""
    if not from_head:
        return nn.Sequential()
    run, weights = task.network.run, task.network.about.get("weights")
    if run is None or weights not in ("pretrained", "random"):
        raise ValueError(
            "finetune: from_head needs a run's folder, in which the head is beside the student's "
            f"backbone, got {task.network.about}. Give the folder, or leave from_head at 0."
        )
    method = load_method(run, trained=weights == "pretrained")
    head = getattr(method, "head", getattr(method, "projector", None))
    return classifier.first_layers(head, from_head)


def _checked_path(task: Task, save: Path, settings: dict[str, Any]) -> Path:
    if "backbone" not in task.network.about or task.inputs.mean is not None:
        raise ValueError(
            "finetune: save needs a network of known name whose images are normalised as in "
            f"pretraining, got {task.network.about}. Give a run's folder."
        )
    if len(settings) > 1 or save.suffix != ".safetensors" or task.train.labels.ndim == 2:
        raise ValueError(
            "finetune: save must be one .safetensors file, for one number of labels and images of "
            f"one class each, got {str(save)!r} for {', '.join(settings)}."
        )
    if any(r.pool != "own" for _, r in settings.values()):
        raise ValueError("finetune: save must go with pool own, got the mean of patches.")
    return save


def _save(model: "Classifier", path: Path, task: Task, found: dict[str, Any]) -> None:
    source = task.train.source
    content = classifier.packed(
        model,
        backbone=task.network.about["backbone"],
        method="finetune",
        data=source.name,
        channels=str(task.inputs.channels or source.channels),
        image_size=str(task.inputs.size),
        classes=json.dumps(list(source.class_names)),
        labels=str(found["labels"]),
        test_top1_percent=str(found["top1_percent"]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def _once(
    task: Task, labelled: Split, r: Recipe, precision: str, seed: int, neck: nn.Sequential
) -> tuple[dict, "Classifier"]:
    """One run: what its best epoch reaches on the test split and how that was chosen, and the
    network."""
    several = labelled.labels.ndim == 2
    devices = [task.device] if torch.device(task.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step_seed(seed, 0, 0))
        model = Classifier(task.network.backbone, task, labelled, neck, r.pool).to(task.device)
        classes = torch.zeros(len(labelled), dtype=torch.int64) if several else labelled.labels
        # Of fewer it would be no tenth, and too few to tell epochs apart.
        held = held_out(classes, seed) & (classes.bincount()[classes] >= 10)
        fitted, scored = labelled[(~held).nonzero()[:, 0]], labelled[held.nonzero()[:, 0]]
        batch_size = min(r.batch_size, len(fitted))
        scale = (batch_size / 256) ** r.batch_power
        optimizer = optimizer_of(model, r, scale)
        base = [group["lr"] for group in optimizer.param_groups]
        mix = mixing(r, task.num_classes)
        views = training_views(task, r)
        curve, best, weights, step = [], -1.0, None, 0
        for epoch in range(r.epochs):
            order = epoch_order(len(fitted), batch_size, seed=seed, epoch=epoch)
            model.train()
            with dropping_paths(model.backbone, r.drop_path):
                numbers = (fitted.index[batch] for batch in order)
                parts = loaded(fitted.source, numbers, task.device)
                for number, (images, y, index) in enumerate(parts):
                    step += 1
                    torch.manual_seed(step_seed(seed, step, 0))
                    at = epoch if r.milestones else epoch + number / len(order)
                    for group, lr in zip(optimizer.param_groups, base, strict=True):
                        group["lr"] = lr * r.rate_factor(at)
                    x = task.inputs.colour(images)
                    for view in views:
                        (x,) = augment(x, index, [view], seed=seed, epoch=epoch)
                    x, y = mix(x, y)
                    loss = _loss(model, x, y, r, precision)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            if not loss.isfinite():
                raise FloatingPointError(
                    f"finetune: the loss must stay finite, got {loss.item()} in epoch {epoch}. "
                    "Try a lower lr or precision fp32."
                )
            if len(scored):
                curve.append(next(iter(model.score(task, scored, precision).values())))
                if curve[-1] > best:
                    best, chosen = curve[-1], epoch + 1
                    weights = copy.deepcopy(model.state_dict())
        if weights is not None:
            model.load_state_dict(weights)
        test = model.score(task, task.test, precision)
    run = {"seed": seed, "labels": len(labelled), "fitted_on": len(fitted)}
    run |= {"batch_size": batch_size, "lr": r.lr * scale, "held_out": len(scored)}
    run |= {f"held_out_{next(iter(test))}": curve, "epoch": chosen if curve else r.epochs}
    return run | test, model


class Classifier(classifier.Classifier):
    """A copy of a backbone and of layers of its head, all to be trained, and a linear head."""

    def __init__(
        self, backbone: nn.Module, task: Task, labelled: Split, neck: nn.Sequential, pool="own"
    ):
        body = copy.deepcopy(nn.Sequential(backbone, neck)).requires_grad_().to(task.device).eval()
        super().__init__(*body, head=nn.Identity())
        self.pool = pool
        images, _ = labelled.source.batch(labelled.index[:1])
        with torch.no_grad():
            width = self(task.inputs(images).to(task.device)).shape[1]
        self.head = nn.Linear(width, task.num_classes)
        nn.init.normal_(self.head.weight, std=0.0 if len(neck) else 0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        if self.pool == "patches":
            return FeatureMap(self.backbone)(x).mean(dim=(2, 3))
        return super().features(x)

    @torch.no_grad()
    def score(self, task: Task, split: Split, precision: str) -> dict[str, float]:
        """In percent, on centre squares: top-1, or of several labels the means of AUC, by which
        epochs are chosen, and AP over the classes that have both."""
        self.eval()
        scores, labels = [], []
        parts = split.index.split(task.batch_size)
        for images, y, _ in loaded(split.source, parts, task.device):
            with _autocast(task.device, precision):
                logits = self(task.inputs(images))
            scores.append(logits.float().cpu())
            labels.append(y.cpu())
        scores, y = torch.cat(scores), torch.cat(labels)
        if y.ndim == 1:
            return {"top1_percent": top1_percent(scores.argmax(1), y)}
        measures = {"auc_percent": roc_auc(scores, y), "map_percent": average_precision(scores, y)}
        return {name: 100 * x.nanmean().nan_to_num().item() for name, x in measures.items()}


def _autocast(device, precision: str):
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def _loss(model: nn.Module, x: Tensor, y: Tensor, r: Recipe, precision: str) -> Tensor:
    with _autocast(x.device, precision):
        logits = model(x)
    if y.ndim == 2 and not (r.mixup or r.cutmix):  # several labels, not shares of one
        return F.binary_cross_entropy_with_logits(logits.float(), y.float())
    return F.cross_entropy(logits.float(), y, label_smoothing=r.label_smoothing)
