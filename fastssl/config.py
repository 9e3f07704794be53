"""One typed configuration for Python, YAML and the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class PretrainConfig:
    """Everything a pretraining run depends on.

    None means "not set": a fresh run takes the value from the method's recipe for the data
    (`fastssl.methods.recipes`), a resumed run from the run itself. The run's config.yaml holds the
    resolved values.
    """

    method: str = "simclr"
    data: str = "digits"
    """A folder of images (subfolders are labels), or the built-in `digits` or `patches`."""
    out: str = "runs/simclr"
    method_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method's class, e.g. temperature."""
    backbone: str | None = None
    """`resnet_small`, `vit_small`, `timm:NAME` or `torchvision:NAME`."""
    image_size: int | None = None
    """Side of the training crops in pixels; None: the size of the data."""
    epochs: int | None = None
    batch_size: int | None = None
    """Images per step over all processes."""
    optimizer: Literal["adamw", "lars", "sgd"] | None = None
    lr: float | None = None
    """Peak learning rate, used as it is (no scaling with the batch)."""
    weight_decay: float | None = None
    warmup_epochs: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    workers: int = 0
    """Decoding threads per rank; 0 decodes between the steps."""
    seed: int = 0
    log_every: int | None = None
    """Steps between two lines of metrics; None: about a hundred lines, at most 50 steps apart."""
    save_every: int = 5
    """Epochs between two checkpoints; the last step is always saved."""
    resume: bool = False
    """Go on with the run in `out` instead of starting a fresh one."""
