"""Settings that work, by method and data: the values of a config's unset fields."""

import dataclasses
from typing import Any

from ..config import PretrainConfig

_SIMCLR_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 1.0,
    "method_args": {"temperature": 0.2},
}

_BYOL_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 1.0,
    "method_args": {"hidden_dim": 512, "out_dim": 128},
}

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

# Parts of an 8 x 8 digit say too little: with them the loss stays near ln K, SwAV's too.
_DINO_DIGITS = {**_DINO_SMALL["method_args"], "local_views": 0}

_LEJEPA_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 5e-2,
    "warmup_epochs": 1.0,
    "method_args": {"lam": 0.02, "out_dim": 32, "global_views": 4, "local_views": 0},
}

_MOCO_V2_SMALL = {
    **_SIMCLR_SMALL,
    "method_args": {"temperature": 0.1, "momentum": 0.99, "queue_size": 1024},
}

_MOCO_V3_SMALL = {**_SIMCLR_SMALL, "method_args": {"hidden_dim": 512, "out_dim": 128}}

_VICREG_SMALL = {**_SIMCLR_SMALL, "method_args": {"hidden_dim": 512, "out_dim": 512}}

_BARLOW_SMALL = {**_SIMCLR_SMALL, "method_args": {"hidden_dim": 512, "out_dim": 512}}

_SWAV_SMALL = {
    "backbone": "resnet_small",
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 1.0,
    "method_args": {
        "hidden_dim": 512,
        "num_prototypes": 128,
        "freeze_steps": 30,
        "queue_size": 512,
        "wait_epochs": 5.0,
        "local_views": 4,
    },
}

_SWAV_DIGITS = {**_SWAV_SMALL["method_args"], "epsilon": 0.03, "local_views": 0}

EVERY: dict[str, Any] = {
    "lr_schedule": "cosine",
    "min_lr": 0.0,
    "layer_decay": 1.0,
    "max_grad_norm": 0.0,
    "sam_rho": 0.0,
    "sam_adaptive": False,
    "freeze": [],
    "chunk": 0,
    "save_every": 5,
    "keep": 1,
}
"""Of all recipes that do not say otherwise, and of runs older than the setting."""

_OWN = {**_SIMCLR_SMALL, "lr": 1e-3, "epochs": 20, "method_args": {}}
"""Of methods without recipes, which are those in a file of one's own."""

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "barlow": {
        "digits": {**_BARLOW_SMALL, "epochs": 20},
        "patches": {**_BARLOW_SMALL, "epochs": 20},
        "shapes": {**_BARLOW_SMALL, "epochs": 10},
        "folder": {**_BARLOW_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "byol": {
        "digits": {**_BYOL_SMALL, "epochs": 20},
        "patches": {**_BYOL_SMALL, "epochs": 20},
        "shapes": {**_BYOL_SMALL, "epochs": 10},
        "folder": {**_BYOL_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "dino": {
        "digits": {**_DINO_SMALL, "epochs": 20, "method_args": _DINO_DIGITS},
        "patches": {**_DINO_SMALL, "epochs": 20},
        "shapes": {**_DINO_SMALL, "epochs": 10},
        "folder": {**_DINO_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "lejepa": {
        "digits": {**_LEJEPA_SMALL, "epochs": 20},
        "patches": {**_LEJEPA_SMALL, "epochs": 20},
        "shapes": {**_LEJEPA_SMALL, "epochs": 10},
        "folder": {**_LEJEPA_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "moco_v2": {
        "digits": {**_MOCO_V2_SMALL, "epochs": 20},
        "patches": {**_MOCO_V2_SMALL, "epochs": 20},
        "shapes": {**_MOCO_V2_SMALL, "epochs": 10},
        "folder": {**_MOCO_V2_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "moco_v3": {
        "digits": {**_MOCO_V3_SMALL, "epochs": 20},
        "patches": {**_MOCO_V3_SMALL, "epochs": 20},
        "shapes": {**_MOCO_V3_SMALL, "epochs": 10},
        "folder": {**_MOCO_V3_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "simclr": {
        "digits": {**_SIMCLR_SMALL, "epochs": 20},
        "patches": {**_SIMCLR_SMALL, "epochs": 20},
        "shapes": {**_SIMCLR_SMALL, "epochs": 10},
        "folder": {**_SIMCLR_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "swav": {
        "digits": {**_SWAV_SMALL, "epochs": 20, "method_args": _SWAV_DIGITS},
        "patches": {**_SWAV_SMALL, "epochs": 20},
        "shapes": {**_SWAV_SMALL, "epochs": 10},
        "folder": {**_SWAV_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
    "vicreg": {
        "digits": {**_VICREG_SMALL, "epochs": 20},
        "patches": {**_VICREG_SMALL, "epochs": 20},
        "shapes": {**_VICREG_SMALL, "epochs": 10},
        "folder": {**_VICREG_SMALL, "epochs": 100, "lr": 1e-3, "warmup_epochs": 5.0},
    },
}
"""Method; `digits`, `patches`, `shapes` or `folder` (anything else); fields of `PretrainConfig`."""


def resolve(config: PretrainConfig) -> PretrainConfig:
    """A copy of `config` with its unset fields taken from the recipe.

    `method_args` are merged: the recipe's, then the config's over them. What depends
    on data or machine stays unset where the recipe has none: `image_size`, `log_every`, `workers`.
    """
    recipes = RECIPES.get(config.method, {"folder": _OWN})
    recipe = EVERY | recipes.get(config.data.partition(":")[0], recipes["folder"])  # shapes:multi
    values = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    values["method_args"] = {**recipe["method_args"], **config.method_args}
    config = dataclasses.replace(config, **values)
    if config.final_weight_decay is None:
        config.final_weight_decay = config.weight_decay
    return config


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the settings that came after it, as the run did without them."""
    return dataclasses.asdict(resolve(PretrainConfig(**{**EVERY, **saved})))
