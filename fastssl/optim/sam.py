"""Sharpness-aware minimization around any optimizer."""

import contextlib
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .states import expanded, local, sharded


class replay:
    """Makes the second forward of a step meet what the first one met, and leave nothing behind.

    Made before the first forward. Inside the context random numbers are drawn again as they were
    (the same dropout masks), and buffers are again what they were (the same queue, not pushed
    twice); after it, both are as the first forward left them: running statistics of BatchNorm are
    those of the first forward, at the weights themselves.

    Args:
        modules: whose buffers count: the model, and losses that hold a queue or a centre.
        devices: whose random numbers count beside the CPU's; None for those of the modules.

    Memory: two copies of the buffers, to the end of the context.

    Notes: nothing waits for the device. State that is in no buffer (a list, a counter in Python, a
        generator of one's own) is not replayed; nor may an EMA or a queue be moved between.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())
        >>> x, again = torch.randn(8, 4), replay(model)
        >>> first = model(x)
        >>> with again:
        ...     assert torch.equal(model(x), first)
    """

    def __init__(self, *modules: nn.Module, devices=None):
        self.modules = modules
        if devices is None:
            tensors = [x for m in modules for x in (*m.parameters(), *m.buffers())]
            devices = {x.device for x in tensors}
        self.devices = [device for device in devices if device.type == "cuda"]
        self.before = self._now()

    def __enter__(self) -> "replay":
        if self.before is None:
            raise RuntimeError("replay: is used up. Make one before each first forward.")
        self.after = self._now()
        self._put_back(self.before)
        return self

    def __exit__(self, *error) -> None:
        self._put_back(self.after)
        del self.after
        self.before = None

    @torch.no_grad()
    def _now(self) -> tuple[list, list[Tensor]]:
        """Where buffers are, with their values, and the states of the generators."""
        buffers = [
            (owner, name, buffer, None if buffer is None else buffer.clone())
            for module in self.modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
        ]
        return buffers, [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @torch.no_grad()
    def _put_back(self, then: tuple[list, list[Tensor]]) -> None:
        buffers, (cpu, *others) = then
        values = [(b, value) for _, _, b, value in buffers if not (b is None or expanded(b))]
        if values:
            torch._foreach_copy_(*map(list, zip(*values, strict=True)))
        for owner, name, buffer, _ in buffers:  # which a forward may have replaced by another
            owner._buffers[name] = buffer
        torch.set_rng_state(cpu)
        for state, device in zip(others, self.devices, strict=True):
            torch.cuda.set_rng_state(state, device)


class SAM(Optimizer):
    """Takes an optimizer's step with the gradient at the worst weights near by.

        e = rho g / |g|,   adaptive:  e = rho T^2 g / |T g|,  T = |w| + eta,
        g' = gradient at w + e on the same batch,   w = step of the optimizer from w with g'

    The norm is over all parameters of all groups. Either

        def closure():
            sam.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss
        sam.step(closure)                   # calls it twice

    or, with gradients clipped, scaled or accumulated as you please,

        again = replay(model)
        loss_of(model).backward()
        sam.first_step(zero_grad=True)      # w + e
        with again:
            loss_of(model).backward()
        sam.second_step(zero_grad=True)     # w again, to the last bit, and the optimizer's step

    Args:
        optimizer: any, of torch.optim, of this package, of bitsandbytes; its step must need no
            closure. Groups and states are its own: schedules may be given either, and a
            `state_dict()` is the optimizer's, to be loaded with SAM or without.
        modules: of `replay`, for `step(closure)`: the model, and losses that hold a queue.
        rho: >= 0, the length of e, also as a tensor (). 0.05 for ResNets, 0.1 to 0.2 for ViTs;
            0.5 to 2 if adaptive.
        adaptive: measure e relative to the weights (ASAM).
        eta: >= 0, for weights near 0; ASAM's own runs took 0.01.
        rank_local: under DistributedDataParallel each rank perturbs by the gradient of its own
            samples (the paper's m-sharpness, often the better one) and an all-reduce is saved;
            `modules` must hold the wrapped model. In two phases: the first forward and backward
            under `model.no_sync()`.

    Raises:
        ValueError: a number out of range; rank_local without a module that has no_sync.
        RuntimeError: phases out of order; sparse gradients.
        TypeError: not an optimizer, modules or a number; `step` without a closure.

    Memory: between the phases a copy of the parameters that have a gradient; for a moment in the
        first as much again, adaptive twice that.

    Notes: norms are summed in at least float32; nothing waits for the device. Parameters without a
    gradient stay where they are. Weight decay and `max_grad_norm` act once, in the optimizer's
    step. Under DistributedDataParallel gradients of both passes are means, so all
    ranks perturb alike; the norm of shards (FSDP2) is that of the whole. Weights in bfloat16 round
    most of e away: keep them in float32 under autocast, whose cached copies of weights SAM drops.
    With GradScaler, e does not depend on the scale: scale both losses, then `sam.restore()`,
    `scaler.unscale_(sam.base_optimizer)` if gradients are to be clipped,
    `scaler.step(sam.base_optimizer)` and `scaler.update()`. If the closure fails in its second call
    the weights are put back.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)
        >>> def closure():
        ...     sam.zero_grad()
        ...     loss = model(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = sam.step(closure)

    Paper: Foret et al., arXiv 2010.01412; adaptive: Kwon et al., arXiv 2102.11600; ViTs: Chen et
    al., arXiv 2106.01548.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *modules: nn.Module,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        rank_local: bool = False,
    ):
        # Without Optimizer.__init__: groups and states are those of the optimizer, always.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"SAM: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Write SAM(AdamW(model.parameters(), ...), model)."
            )
        for m in modules:
            if not isinstance(m, nn.Module):
                raise TypeError(
                    f"SAM: modules must be nn.Module, got {m!r}. rho goes by keyword: rho=0.05."
                )
        for label, value in (("rho", rho), ("eta", eta)):
            scalar = isinstance(value, Tensor) and value.dim() == 0
            number = value.item() if scalar else value
            if not isinstance(number, Real):
                raise TypeError(f"SAM: {label} must be a number or a tensor (), got {value!r}.")
            if not number >= 0:
                raise ValueError(f"SAM: {label} must be at least 0, got {number}.")
        self.silent = [m.no_sync for m in modules if rank_local and hasattr(m, "no_sync")]
        if rank_local and not self.silent:
            raise ValueError(
                "SAM: rank_local needs the model wrapped in DistributedDataParallel among modules."
            )
        self.base_optimizer, self.modules = optimizer, modules
        self.rho, self.adaptive, self.eta = rho, adaptive, eta
        self._saved: list[tuple[Tensor, Tensor]] | None = None
        super().__setstate__({})  # what is a SAM's own of an Optimizer: the hooks of its step

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, for Optimizer.__setstate__
        names = "base_optimizer", "modules", "silent", "rho", "adaptive", "eta", "_saved"
        return {name: getattr(self, name) for name in names}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, *args, **kwargs):
        return self.base_optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args, **kwargs):
        return self.base_optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args, **kwargs):
        return self.base_optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args, **kwargs):
        return self.base_optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Adds e to the weights, from their gradients."""
        if self._saved is not None:
            raise RuntimeError(
                "SAM.first_step: the weights are perturbed. Call second_step() or restore() first."
            )
        alike: dict[tuple, list[Tensor]] = {}  # what one foreach call can take
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            if local(p.grad).layout is not torch.strided:
                raise RuntimeError(
                    f"SAM: the gradient of a parameter of shape {tuple(p.shape)} is sparse "
                    f"({local(p.grad).layout}). Use sparse=False in its module."
                )
            wide = torch.promote_types(p.grad.dtype, torch.float32)
            alike.setdefault((p.device, wide, getattr(p, "device_mesh", None)), []).append(p)
        directions, norms = [], []
        for (_, wide, _), params in alike.items():
            direction, norm = self._direction(params, wide)
            directions.append(direction)
            norms.append(norm)
        if norms:
            norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            scale = self.rho / (norm + 1e-12)
        self._saved = []
        for (device, wide, _), params in alike.items():
            weights = [local(p) for p in params]
            self._saved += [(w, w.clone()) for w in weights]
            e = torch._foreach_mul(directions.pop(0), scale.to(device, wide))
            torch._foreach_add_(weights, e)
        torch.clear_autocast_cache()
        if zero_grad:
            self.zero_grad()

    def _direction(self, params: list[Tensor], wide: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """e without its length, of this rank's parts, and what |e| / rho is of all."""
        gradients = [local(p.grad).to(wide) for p in params]
        if self.adaptive:
            sizes = torch._foreach_abs([local(p).to(wide) for p in params])
            torch._foreach_add_(sizes, self.eta)
            gradients = torch._foreach_mul(gradients, sizes)
        whole = [sharded(g, p.grad) for g, p in zip(gradients, params, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(whole)))
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).double()
        if self.adaptive:
            torch._foreach_mul_(gradients, sizes)
        return gradients, norm

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back, without the optimizer's step."""
        if self._saved is None:
            raise RuntimeError("SAM: the weights are not perturbed. Call first_step() before.")
        if self._saved:
            torch._foreach_copy_(*map(list, zip(*self._saved, strict=True)))
        self._saved = None
        self._opt_called = True  # what schedulers look at
        torch.clear_autocast_cache()

    def second_step(self, zero_grad: bool = False) -> None:
        """Puts the weights back and takes the optimizer's step with the gradients there are now."""
        self.restore()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """Both phases; returns the first loss, that of the weights themselves."""
        if closure is None:
            raise TypeError(
                "SAM.step: needs a closure that computes loss and gradients, twice. Give one, or "
                "call first_step() and second_step()."
            )
        devices = {p.device for group in self.param_groups for p in group["params"]}
        again = replay(*self.modules, devices=devices)
        with torch.enable_grad(), contextlib.ExitStack() as silence:
            for no_sync in self.silent:
                silence.enter_context(no_sync())
            loss = closure()
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad(), again:
                closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss
