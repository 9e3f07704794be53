"""The text tower of a run, beside the backbone that all protocols have."""

import torch
from torch import Tensor, nn

from ..methods import method_class
from ..train.backbones import load_method
from .task import Task


class Towers(nn.Module):
    """A method's image encoder as a network, (B, C, S, S) to (B, D), and its text encoder."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return self.method.encode_image(x)

    @torch.no_grad()
    def texts(self, captions: list[str], batch_size: int) -> Tensor:
        """(N, D) float32 on the CPU; the caller holds the towers frozen."""
        parts = (captions[i : i + batch_size] for i in range(0, len(captions), batch_size))
        return torch.cat([self.method.encode_text(part).float().cpu() for part in parts])


def open_towers(caller: str, task: Task) -> Towers:
    """The method of the task's run around the task's backbone, on its device: with the weights of
    the newest checkpoint, or, where the backbone is the random one, before training.

    Raises:
        ValueError: not a run, or of a method without a text tower. FileNotFoundError: a run without
            checkpoints.
    """
    network = task.network
    name = network.about.get("method")
    if network.run is None or not hasattr(method_class(name), "encode_text"):
        got = f"a run of {name}" if network.run else "no run"
        raise ValueError(
            f"{caller}: network must be the folder of a run whose method has a text tower, got "
            f"{got}. Train clip, align or convirt."
        )
    method = load_method(network.run, trained=network.about["weights"] != "random")
    method.backbone = network.backbone
    return Towers(method).to(task.device)
