"""One typed configuration for Python, YAML and the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class PretrainConfig:
    """Everything a pretraining run depends on."""

    method: str = "simclr"
    data: str = "digits"
    """A folder of images (subfolders are labels), or the built-in `digits` or `patches`."""
    out: str = "runs/simclr"
    method_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method's class, e.g. temperature."""
    backbone: str = "resnet_small"
    """`resnet_small`, `vit_small`, `timm:NAME` or `torchvision:NAME`."""
    image_size: int | None = None
    """Side of the training crops in pixels; None: the size of the data."""
    epochs: int = 20
    batch_size: int = 256
    """Images per step over all processes."""
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 3e-3
    """Peak learning rate, used as it is (no scaling with the batch)."""
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    workers: int = 0
    """Decoding processes per rank."""
    seed: int = 0
    log_every: int = 10
    """Steps between two lines of metrics."""
    save_every: int = 5
    """Epochs between two checkpoints; the last step is always saved."""
    resume: bool = False
    """Go on with the run in `out` instead of starting a fresh one."""
