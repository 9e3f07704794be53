"""Settings that work, by method and data: the values of a config's unset fields."""

import dataclasses
from typing import Any

from ..config import PretrainConfig
from ..extras import nearest
from .published import CIFAR10, IMAGENET

_SIMCLR_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 1.0,
    "method_args": {"temperature": 0.2},
}

_BYOL_SMALL = {**_SIMCLR_SMALL, "method_args": {"hidden_dim": 512, "out_dim": 128}}

_DINO_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 4e-2,
    "final_weight_decay": 0.4,
    "max_grad_norm": 3.0,
    "warmup_epochs": 1.0,
    "method_args": {
        "momentum": 0.99,
        "teacher_temperature": 0.04,
        "centering": "sinkhorn",
        "hidden_dim": 512,
        "bottleneck_dim": 64,
        "batch_norm": True,
        "out_dim": 256,
        "local_views": 4,
    },
}

_DINOV2_SMALL = {
    **_DINO_SMALL,
    "backbone": "vit_small",
    "batch_size": 64,
    "lr": 5e-4,
    "method_args": {
        "momentum": 0.99,
        "teacher_temperature": 0.04,
        "hidden_dim": 256,
        "bottleneck_dim": 64,
        "out_dim": 256,
        "local_views": 2,
    },
}

# On radiographs, from DINOv2's weights or others that `init_from` names.
_RAD_DINO = {
    **_DINOV2_SMALL,
    "backbone": "timm:vit_base_patch14_dinov2",
    "init_from": "timm",
    "image_size": 518,
    "epochs": 100,
    "lr": 5e-4,
    "warmup_epochs": 5.0,
    "method_args": {"global_area": 0.5, "local_area": 0.2, "colors": False},
}

_LEJEPA_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 5e-2,
    "warmup_epochs": 1.0,
    "method_args": {"lam": 0.02, "out_dim": 32, "global_views": 4, "local_views": 0},
}

_MAE_SMALL = {
    "backbone": "vit_small",
    "batch_size": 32,
    "optimizer": "adamw",
    "optimizer_args": {"betas": [0.9, 0.95]},
    "lr": 3e-4,
    "weight_decay": 5e-2,
    "warmup_epochs": 1.0,
    "method_args": {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3},
}

# Of radiographs: published for some 0.3 M of them.
_MAE_THORAX = {
    "backbone": "timm:vit_small_patch16_224",
    "image_size": 224,
    "batch_size": 2048,
    "optimizer": "adamw",
    "optimizer_args": {"betas": [0.9, 0.95]},
    "lr": 1.2e-3,
    "weight_decay": 5e-2,
    "warmup_epochs": 40.0,
    "epochs": 800,
    "method_args": {"mask_ratio": 0.9, "min_crop": 0.5, "norm_pix": False, "decoder_depth": 2},
}

_LOOK_SMALL = {
    **_SIMCLR_SMALL,
    "batch_size": 128,
    "method_args": {"k": 200, "momentum": 0.99, "queue_size": 2048, "hidden_dim": 512},
}

_MOCO_V2_SMALL = {
    **_SIMCLR_SMALL,
    "method_args": {"temperature": 0.1, "momentum": 0.99, "queue_size": 1024},
}

_VICREG_SMALL = {**_SIMCLR_SMALL, "method_args": {"hidden_dim": 512, "out_dim": 512}}

_SWAV_SMALL = {
    **_SIMCLR_SMALL,
    "batch_size": 128,
    "method_args": {
        "hidden_dim": 512,
        "num_prototypes": 128,
        "freeze_steps": 30,
        "queue_size": 512,
        "wait_epochs": 5.0,
        "epsilon": 0.03,
        "local_views": 2,
    },
}

_CLIP_SMALL = {
    **_SIMCLR_SMALL,
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 0.1,
    "method_args": {"out_dim": 64},
}

_ALIGN_SMALL = {**_CLIP_SMALL, "method_args": {"temperature": 0.07}}

_CONVIRT_SMALL = {**_CLIP_SMALL, "method_args": {"out_dim": 128}}

_SEER_SMALL = {
    **_SIMCLR_SMALL,
    "batch_size": 128,
    "method_args": {
        "hidden_dim": 512,
        "out_dim": 128,
        "num_prototypes": 96,
        "freeze_steps": 30,
        "local_views": 2,
    },
}

EVERY: dict[str, Any] = {
    "lr_schedule": "cosine",
    "min_lr": 0.0,
    "layer_decay": 1.0,
    "bias_lr_factor": 1.0,
    "max_grad_norm": 0.0,
    "sam_rho": 0.0,
    "sam_adaptive": False,
    "freeze": [],
    "init_heads": False,
    "optimizer_args": {},
    "chunk": 0,
    "save_every": 5,
    "keep": 1,
}
"""Of all recipes that do not say otherwise, and of runs older than the setting."""

_OWN = {**_SIMCLR_SMALL, "lr": 1e-3, "epochs": 20, "method_args": {}}
"""Of methods without recipes, which are those in a file of one's own."""


def _by_data(small: dict[str, Any], **digits: Any) -> dict[str, dict[str, Any]]:
    """A method's recipes; `digits` are arguments of it that differ there."""
    return {
        "digits": {**small, "epochs": 20, "method_args": {**small["method_args"], **digits}},
        "patches": {**small, "epochs": 20},
        "shapes": {**small, "epochs": 10},
        "folder": {**small, "epochs": 100, "lr": min(small["lr"], 1e-3), "warmup_epochs": 5.0},
    }


def _with_captions(small: dict[str, Any], **shapes: Any) -> dict[str, dict[str, Any]]:
    """The same of a method that reads captions, which the other built-in data have not."""
    recipes = _by_data(small)
    recipes["shapes"]["method_args"] = {**small["method_args"], **shapes}
    return {data: recipes[data] for data in ("shapes", "folder")}


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The captions of shapes tell left from right.
    "align": _with_captions(_ALIGN_SMALL, flip=False),
    "barlow": _by_data(_VICREG_SMALL),
    "byol": _by_data(_BYOL_SMALL),
    "clip": _with_captions(_CLIP_SMALL),
    "convirt": _with_captions(_CONVIRT_SMALL, flip=False),
    # Parts of an 8 x 8 digit say too little: with them the loss stays near ln K, SwAV's too.
    "dino": _by_data(_DINO_SMALL, local_views=0),
    "distill": _by_data({**_SIMCLR_SMALL, "method_args": {}}),
    "dinov2": {**_by_data(_DINOV2_SMALL, local_views=0), "rad_dino": _RAD_DINO},
    "lejepa": _by_data(_LEJEPA_SMALL),
    "look": _by_data(_LOOK_SMALL),
    "mae": _by_data(_MAE_SMALL, min_crop=0.6) | {"thorax": _MAE_THORAX},
    "moco_v2": _by_data(_MOCO_V2_SMALL),
    "moco_v3": _by_data(_BYOL_SMALL),
    "seer": _by_data(_SEER_SMALL, local_views=0),
    "simclr": _by_data(_SIMCLR_SMALL),
    "simclr_v2": _by_data(_SIMCLR_SMALL),
    "swav": _by_data(_SWAV_SMALL, local_views=0),
    "vicreg": _by_data(_VICREG_SMALL),
}
"""Method; `digits`, `patches`, `shapes` or `folder` (anything else), or the name of a `recipe`;
fields of `PretrainConfig`."""
for _name, _settings in (("cifar10", CIFAR10), ("imagenet", IMAGENET)):
    for _method, _values in _settings.items():
        RECIPES[_method][_name] = _values


def resolve(config: PretrainConfig) -> PretrainConfig:
    """A copy of `config` with its unset fields taken from the recipe.

    `method_args` are merged: the recipe's, then the config's over them. What depends
    on data or machine stays unset where the recipe has none: `image_size`, `log_every`, `workers`.

    Raises:
        ValueError: a recipe that the method does not have.
    """
    recipes = RECIPES.get(config.method, {"folder": _OWN})
    if config.recipe and config.recipe not in recipes:
        raise ValueError(
            f"config: recipe must be one of {config.method}, got {config.recipe!r}. "
            f"{nearest(config.recipe, recipes)}"
        )
    name = config.recipe or config.data.partition(":")[0]  # shapes:multi
    recipe = EVERY | recipes.get(name, recipes["folder"])
    if config.optimizer and recipe["optimizer"] != config.optimizer.removesuffix("8bit"):
        recipe["optimizer_args"] = {}  # another class's
    values = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    values["method_args"] = {**recipe["method_args"], **config.method_args}
    config = dataclasses.replace(config, **values)
    if config.final_weight_decay is None:
        config.final_weight_decay = config.weight_decay
    return config


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the settings that came after it, as the run did without them."""
    return dataclasses.asdict(resolve(PretrainConfig(**{**EVERY, **saved})))
