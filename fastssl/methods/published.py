"""Settings of published runs, as recipes: `--recipe cifar10`, `--recipe imagenet`; and what others
reached with them, so that a run can be checked. None of these accuracies is ours."""

from typing import Any, NamedTuple

_CIFAR10 = {
    "backbone": "resnet18_cifar",
    "epochs": 1000,
    "batch_size": 256,
    "optimizer": "lars",
    "optimizer_args": {"eta": 0.02, "clip": True},
    "weight_decay": 1e-4,
    "warmup_epochs": 10.0,
}
_IMAGENET = {
    "backbone": "timm:resnet50",
    "image_size": 224,
    "batch_size": 4096,
    "optimizer": "lars",
    "weight_decay": 1e-6,
    "warmup_epochs": 10.0,
}
_IMAGENET_VIT = {
    "backbone": "timm:vit_small_patch16_224",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 512,
    "optimizer": "adamw",
    "warmup_epochs": 10.0,
    "min_lr": 1e-6,
}

# The momentum of MoCo v2 on CIFAR-10 rises to 0.999 there, Barlow Twins' loss is scaled by 0.1, the
# stem pads by 2; here views are those of small images.
CIFAR10: dict[str, dict[str, Any]] = {
    "simclr": _CIFAR10
    | {"lr": 0.4, "method_args": {"temperature": 0.2, "hidden_dim": 2048, "out_dim": 256}},
    "moco_v2": _CIFAR10
    | {
        "optimizer": "sgd",
        "optimizer_args": {},
        "lr": 0.3,
        "method_args": {
            "temperature": 0.2,
            "momentum": 0.99,
            "queue_size": 32768,
            "hidden_dim": 2048,
            "out_dim": 256,
        },
    },
    "moco_v3": _CIFAR10 | {"lr": 0.3, "weight_decay": 1e-6, "method_args": {}},
    "swav": _CIFAR10
    | {
        "lr": 0.6,
        "weight_decay": 1e-6,
        "method_args": {"freeze_steps": 390, "wait_epochs": 50.0, "local_views": 0},
    },
    "byol": _CIFAR10 | {"lr": 1.0, "weight_decay": 1e-5, "method_args": {}},
    "dino": _CIFAR10
    | {
        "lr": 0.3,
        "weight_decay": 1e-6,
        "method_args": {"momentum": 0.9995, "out_dim": 4096, "local_views": 0},
    },
    "vicreg": _CIFAR10 | {"lr": 0.3, "method_args": {"hidden_dim": 2048, "out_dim": 2048}},
    "barlow": _CIFAR10 | {"lr": 0.3, "method_args": {"hidden_dim": 2048, "out_dim": 2048}},
}

# Rates are those of the whole batch: 0.3 B / 256 and so on.
IMAGENET: dict[str, dict[str, Any]] = {
    "simclr": _IMAGENET | {"epochs": 100, "lr": 4.8, "method_args": {"temperature": 0.1}},
    "moco_v2": _IMAGENET
    | {
        "epochs": 200,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.03,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.0,
        "method_args": {},
    },
    "moco_v3": _IMAGENET | {"epochs": 100, "lr": 9.6, "method_args": {"temperature": 1.0}},
    "swav": _IMAGENET
    | {"epochs": 200, "lr": 4.8, "min_lr": 4.8e-3, "method_args": {"queue_size": 0}},
    "byol": _IMAGENET | {"epochs": 200, "lr": 4.8, "weight_decay": 1.5e-6, "method_args": {}},
    "dino": _IMAGENET_VIT
    | {
        "lr": 1e-3,
        "weight_decay": 4e-2,
        "final_weight_decay": 0.4,
        "max_grad_norm": 3.0,
        "method_args": {"teacher_temperature": 0.04},
    },
    "vicreg": _IMAGENET | {"epochs": 1000, "batch_size": 2048, "lr": 1.6, "method_args": {}},
    "barlow": _IMAGENET
    | {"epochs": 300, "batch_size": 2048, "lr": 1.6, "bias_lr_factor": 0.024, "method_args": {}},
    "mae": _IMAGENET_VIT
    | {
        "backbone": "timm:vit_base_patch16_224",
        "epochs": 1600,
        "batch_size": 4096,
        "optimizer_args": {"betas": [0.9, 0.95]},
        "lr": 2.4e-3,
        "min_lr": 0.0,
        "weight_decay": 5e-2,
        "warmup_epochs": 40.0,
        "method_args": {},
    },
    "lejepa": _IMAGENET_VIT
    | {"lr": 5e-4, "weight_decay": 5e-2, "method_args": {"lam": 0.02, "local_size": 96}},
}


class Figure(NamedTuple):
    """What others reached."""

    top1: str
    """Percent; a range where settings or runs differ."""
    setting: str
    source: str


def _solo(top1: str) -> Figure:
    return Figure(top1, "linear head trained along, 1000 epochs, near these settings", "solo-learn")


def _lightly(top1: str) -> Figure:
    setting = "kNN-200, SGD, 200 epochs of batch 128 to 800 of 512, best epoch on the test split"
    return Figure(top1, setting, "lightly")


FIGURES: dict[str, dict[str, list[Figure]]] = {
    "cifar10": {
        "simclr": [
            _solo("90.7"),
            Figure("85.6 ± 0.2", "linear, SGD, 100 epochs of batch 512", "dkobak/simclr-cifar10"),
            _lightly("84.7 to 87.9"),
        ],
        "moco_v2": [_solo("92.9"), _lightly("83.8 to 89.9")],
        "moco_v3": [_solo("93.1")],
        "swav": [_solo("89.2"), _lightly("81.2 to 88.4")],
        "byol": [_solo("92.6"), _lightly("86.8 to 91.0")],
        "dino": [_solo("89.5"), _lightly("81.3 to 84.8")],
        "vicreg": [_solo("92.1"), Figure("90.1", "300 epochs of batch 256", "eb_jepa")],
        "barlow": [_solo("92.1"), _lightly("81.9 to 85.9")],
    },
    "imagenet": {
        "simclr": [
            Figure("64.5", "linear, ResNet-50, 100 epochs", "the authors"),
            Figure("64.4", "linear, ResNet-50, 100 epochs", "VISSL"),
            Figure("63.2", "linear, ResNet-50, 100 epochs of batch 256", "lightly"),
        ],
        "moco_v2": [
            Figure("67.5", "linear, ResNet-50, 200 epochs", "the authors; mmselfsup"),
            Figure("66.4", "linear, ResNet-50, 200 epochs", "VISSL"),
        ],
        "moco_v3": [
            Figure("68.9", "linear, ResNet-50, 100 epochs", "the authors"),
            Figure("69.6", "linear, ResNet-50, 100 epochs", "mmselfsup"),
        ],
        "swav": [
            Figure("73.9", "linear, ResNet-50, 200 epochs", "the authors; VISSL"),
            Figure("70.5", "linear, ResNet-50, 200 epochs", "mmselfsup"),
        ],
        "byol": [
            Figure("71.8", "linear, ResNet-50, 200 epochs", "mmselfsup"),
            Figure("68.4", "linear, ResNet-50, 100 epochs", "solo-learn"),
            Figure("62.5", "linear, ResNet-50, 100 epochs of batch 256", "lightly"),
        ],
        "dino": [
            Figure("74.0", "linear, ViT-S/16, 100 epochs; kNN 69.3", "the authors"),
            Figure("73.3", "linear, ViT-S/16, 100 epochs; kNN 67.5", "lightly"),
        ],
        "vicreg": [
            Figure("73.2", "linear, ResNet-50, 1000 epochs", "the authors"),
            Figure("63.0", "linear, ResNet-50, 100 epochs of batch 256", "lightly"),
        ],
        "barlow": [
            Figure("70.8", "linear, ResNet-50, 300 epochs", "VISSL"),
            Figure("71.8", "linear, ResNet-50, 300 epochs", "mmselfsup"),
        ],
        "mae": [
            Figure("68.0", "linear, ViT-B/16, 1600 epochs; fine-tuned 83.66", "the authors"),
            Figure("67.1", "linear, ViT-B/16, 1600 epochs; fine-tuned 83.5", "mmselfsup"),
            Figure("46.0", "linear, ViT-B/16, 100 epochs; kNN 11.2", "lightly"),
        ],
        "lejepa": [
            Figure(
                "64.0",
                "linear, ViT-S/16, 100 epochs, before a mend of the loss; kNN 47.1",
                "lightly",
            )
        ],
    },
}
"""By recipe and method; of ImageNet top-1 in percent on its validation images."""


def figures(recipe: str | None, method: str) -> list[str]:
    """One line for each figure of others, to print; [] where there are none."""
    found = FIGURES.get(recipe or "", {}).get(method, [])
    return [f"{f.top1} % ({f.setting}; {f.source})" for f in found]
