"""A training step of every method that needs images alone, at the small size of its recipe."""

import inspect

import torch

from ..methods import METHODS
from ..methods.recipes import RECIPES
from .measure import Work
from .step import details, step_providers, stored_images

__all__ = ["DTYPES", "SCALING", "SIZES", "details", "make", "work"]

IMAGE_SIZE = 32


def _runs_alone(method: type) -> bool:
    """Whether images, and labels, are all that it needs: no captions, no file of a teacher."""
    file = inspect.signature(method).parameters.get("teacher")
    return file is None and not getattr(method, "reads_captions", False)


_NAMES = [name for name, method in METHODS.items() if _runs_alone(method)]
SIZES = {
    device: {name: [{"B": min(most, RECIPES[name]["patches"]["batch_size"])}] for name in _NAMES}
    for device, most in (("cpu", 32), ("cuda", 256))
}
DTYPES = {name: ["bfloat16" if torch.cuda.is_available() else "float32"] for name in _NAMES}
SCALING: list = []


def work(case: str, dtype: str, B: int) -> Work:
    return Work()


def make(case: str, dtype: str, device: str, B: int) -> tuple[dict, list[str]]:
    """Providers, each a step; they return nothing to compare, since their views differ."""
    recipe = RECIPES[case]["patches"]
    source = stored_images(4 * B, IMAGE_SIZE, device)
    arguments, backbone = recipe["method_args"], recipe["backbone"]
    return step_providers(case, arguments, backbone, source, IMAGE_SIZE, B, dtype, device)
