"""One update of the weights: precision, sharpness, clipping, and a watch on what is not finite."""

from typing import Any

import torch
from torch import Tensor, nn

from ..config import PretrainConfig
from ..data import Batch
from ..optim import SAM, replay
from ..optim.blockwise import Blockwise

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LASTING = 50
"""Steps skipped in a row, each with half the scale of the one before, after which it is no longer
the scale that makes gradients overflow."""


class Update:
    """Takes the optimizer's step for a batch. No step waits for the device, but that of torch's SGD
    in fp16 for the verdict on its gradients.

    Args:
        method: whose parameters are optimized.
        optimizer: of them; if it clips by itself, `max_grad_norm` is among its settings.
        device: where they are. precision: "fp32", "bf16" or "fp16".

    Attributes:
        watch: what it knows of losses and gradients that were not finite.
    """

    def __init__(
        self,
        config: PretrainConfig,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
    ):
        self.method, self.optimizer = method, optimizer
        self.device_type, self.dtype = device.type, AUTOCAST.get(precision)
        self.max_grad_norm = 0.0 if isinstance(optimizer, Blockwise) else config.max_grad_norm
        self.sam = None
        if config.sam_rho:
            self.sam = SAM(optimizer, rho=config.sam_rho, adaptive=config.sam_adaptive)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
        self.watch = Watch([name for name, _ in self.trained], device)

    def __call__(self, objective: nn.Module, batch: Batch) -> dict[str, Tensor | float]:
        """Scalars of the step: the loss, the method's own, and the norm of the gradient (before
        clipping; of SAM the second, which the optimizer takes)."""
        again = None if self.sam is None else replay(self.method, devices=[batch.index.device])
        loss, scalars = self._backward(objective, batch)
        if self.sam is not None:
            self.sam.first_step(zero_grad=True)
            try:
                with again:
                    self._backward(objective, batch)
            finally:
                self.sam.restore()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norms = self._gradient_norms()
        norm = torch.linalg.vector_norm(norms)
        # A gradient too large for fp16 is no mishap there: the step is skipped, the scale halved.
        told = norms
        if self.scaler is not None:
            told = norms.where(self.skipped_in_a_row >= LASTING, 0.0)
        self.watch.look(batch, loss, told)
        if self.max_grad_norm:
            parameters = [p for _, p in self.trained]
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        scalars = {"loss": loss, **scalars, "grad_norm": norm}
        if self.scaler is None:
            self.optimizer.step()
            return scalars
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = ~norm.isfinite()
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        return {**scalars, "skipped_steps": self.skipped}

    def _backward(self, objective, batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Leaves the gradients of the loss, scaled in fp16, with the parameters."""
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            loss, scalars = objective(batch)
        self.optimizer.zero_grad(set_to_none=True)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach(), scalars

    def _gradient_norms(self) -> Tensor:
        """(T,), of each trained parameter, 0 without a gradient."""
        gradients = [p.grad for _, p in self.trained if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
        if len(gradients) == len(self.trained):
            return norms
        there = iter(norms)
        zero = torch.zeros_like(norms[0])
        return torch.stack([zero if p.grad is None else next(there) for _, p in self.trained])

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        return {"scaler": self.scaler.state_dict(), "skipped": int(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
            self.skipped.fill_(state["skipped"])


class Watch:
    """Keeps the first step whose loss or gradient is not finite, on the device."""

    def __init__(self, names: list[str], device: torch.device):
        self.names = names
        # Step from 1, 0 for none yet; whether the loss was finite; the first parameter whose
        # gradient was not, -1 for none.
        self.found = torch.zeros(3, dtype=torch.int64, device=device)
        self.index = None

    def look(self, batch: Batch, loss: Tensor, norms: Tensor) -> None:
        """norms (T,) of the gradients in the order of the names."""
        fine, finite = loss.isfinite(), norms.isfinite()
        every = finite.all()
        parameter = torch.where(every, -1, finite.to(torch.int8).argmin())
        first = ~(fine & every) & (self.found[0] == 0)
        now = torch.stack([torch.full_like(parameter, batch.step + 1), fine, parameter])
        self.found = torch.where(first, now, self.found)
        before = batch.index if self.index is None else self.index
        self.index = torch.where(first, batch.index, before)

    def read(self) -> dict[str, Any] | None:
        """What was found, None if nothing: waits for the device."""
        step, fine, parameter = self.found.tolist()
        if not step:
            return None
        return {
            "step": step,
            "what": "gradient" if fine else "loss",
            "parameter": "none" if parameter < 0 else self.names[parameter],
            "index": self.index.tolist(),
        }
