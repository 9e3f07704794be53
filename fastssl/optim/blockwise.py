"""The base of the optimizers: states in 8 or 32 bits, one op call for the step of all tensors."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fastssl.ops import blockwise as op
from fastssl.ops.ema import is_dense

from . import interchange, overrides, shards, states
from .states import local

# What each setting must be.
RANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lr": (">= 0", lambda x: x >= 0),
    "betas": ("both in [0, 1)", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x)),
    "eps": (">= 0", lambda x: x >= 0),
    "weight_decay": (">= 0", lambda x: x >= 0),
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "dampening": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "alpha": ("in [0, 1)", lambda x: 0 <= x < 1),
    "eta": ("> 0", lambda x: x > 0),
    "lr_decay": (">= 0", lambda x: x >= 0),
    "initial_accumulator_value": (">= 0", lambda x: x >= 0),
    "optim_bits": ("8 or 32", lambda x: x in (8, 32)),
    "min_8bit_size": (">= 0", lambda x: x >= 0),
    "block_size": (
        "a power of two from 64 to 2048",
        lambda x: isinstance(x, int) and x in (64, 128, 256, 512, 1024, 2048),
    ),
    "state_format": ("'bnb' or 'sqrt'", lambda x: x in ("bnb", "sqrt")),
    "max_grad_norm": ("> 0 or None", lambda x: x is None or x > 0),
    "seed": ("an integer of 64 bits", lambda x: isinstance(x, int) and -(2**63) <= x < 2**63),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _there(values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied without a wait: the memory stays pinned until then."""
    x = torch.tensor(values, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Call:
    """What stays from step to step of one op call, which takes the tensors of one device, rule and
    form of states: their steps are one tensor, and each `state["step"]` is a view of it."""

    def __init__(self, optimizer: "Blockwise", kind: tuple, members: list):
        self.device, self.rule, self.block_size, self.root = kind
        self.params = [p for p, _, _ in members]
        self.strides = [local(p).stride() for p in self.params]
        of_each = [optimizer.state[p] for p in self.params]
        none = torch.empty(0, device=self.device)
        names = ("state1", "absmax1", "state2", "absmax2")
        self.states = [[states.flat(s.get(name, none)) for s in of_each] for name in names]
        numbers = _there([number for _, _, number in members], torch.int64, self.device)
        self.counters = torch.stack([torch.stack([s["step"] for s in of_each]), numbers], 1)
        for t, state in enumerate(of_each):
            state["step"] = self.counters[t, 0]
        self.group = _there([i for _, i, _ in members], torch.int64, self.device)
        adapt = [optimizer.adapts(optimizer.param_groups[i], p) for p, i, _ in members]
        self.adapt = _there(adapt, torch.float64, self.device)
        self.held = [list(s.values()) for s in of_each]  # so that no others have their ids
        self.rows = None

    def table(self, rows: list[list[float]]) -> Tensor:
        """(T, HYPER) fp64: for each tensor the row of its group."""
        if rows != self.rows:
            self.rows = rows
            self.of_rows = _there(rows, torch.float64, self.device)[self.group]
            self.of_rows[:, op.ADAPT] = self.adapt
        return self.of_rows.clone()

    def gradients(self, name: str) -> list[Tensor]:
        """In the memory layout of the parameters."""
        out = []
        for p, strides in zip(self.params, self.strides, strict=True):
            p, g = local(p), local(p.grad)
            if p.device != self.device or p.stride() != strides:
                raise RuntimeError(
                    f"{name}: a parameter of shape {tuple(p.shape)} is on {p.device} with strides "
                    f"{p.stride()}, its state on {self.device} with {strides}. Move the model "
                    "before it is optimized, or load the optimizer's state_dict() afterwards."
                )
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{name}: the gradient of a parameter of shape {tuple(p.shape)} is sparse "
                    f"({g.layout}). Use sparse=False in its module, or torch.optim.SparseAdam."
                )
            if g.stride() != strides and not states.same_layout(g, p):
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            out.append(g)
        return out


class Blockwise(Optimizer):
    """Base of the optimizers whose states are of 8 bits in blocks, and of their 32-bit forms.

    A state holds for each block of `block_size` elements the largest magnitude in fp32, and one
    byte an element: 2.03 bytes a parameter for Adam instead of 8. Elements that are 0 stay 0
    exactly, and a step's own update uses the state before it is rounded. All tensors take their
    step in one call.

    Args (of every optimizer of this package, by keyword, after its own):
        optim_bits: 8 or 32 bits a state; a parameter group may have its own (there "bits" too), as
            any setting up to state_format. Single parameters have theirs by `StableEmbedding` or
            bitsandbytes' GlobalOptimManager.
        min_8bit_size: tensors of fewer elements keep fp32 states.
        block_size: elements that share a scale, a power of two from 64 to 2048.
        state_format: "bnb", as bitsandbytes stores them, or "sqrt", which stores the square root of
            second moments: a third of the error where gradients inside a block span three decades.
        maximize: ascend instead of descend.
        max_grad_norm: scale all gradients together so that their norm is at most this, as
            torch.nn.utils.clip_grad_norm_ does, within the step; `p.grad` stays as it is.
        nonfinite: of NaN and infinite gradients: "propagate" as torch does (8-bit states carry it
            into the whole block at the next step), "skip_element" (those elements and their states
            stay as they are) or "skip_step" (everything stays if the norm of all gradients is not
            finite).
        stochastic_rounding: bfloat16 parameters are rounded up or down at random so that the mean
            is exact. The random numbers depend on seed, step, the place of the parameter in the
            groups and of the element in memory alone: a resumed run repeats them.
        seed: of stochastic rounding.
        foreach, fused, capturable: accepted, without effect: a step is always one call that waits
            for nothing; in a CUDA graph lr must be a tensor.

    Raises:
        ValueError: a setting out of range, or one that is not supported, with the reason.
        TypeError: parameters that are not float32, bfloat16 or float16.
        RuntimeError: sparse gradients; a parameter that moved away from its state.

    Notes: GradScaler's scale and its verdict are read on the device; a skipped step does not count.
    Shards (DTensor) are stepped where they lie. The memory of states that were replaced in place is
    held until the next step.
    """

    rule: str
    bits = 8
    # Of the two states, the names that torch.optim has for them; None where the rule has none.
    torch_names: tuple[str | None, str | None]
    # Of the second moment that the first state holds too, where it does.
    slow_name: str | None = None
    ranges = RANGES
    # The settings that bitsandbytes keeps as "betas", where the rule has none of that name.
    bnb_betas: tuple[str, ...] = ()
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        optim_bits: int | None = None,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        state_format: str = "bnb",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        stochastic_rounding: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        amsgrad: bool = False,
        is_paged: bool = False,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        name = type(self).__name__
        for refused, setting, remedy in (
            (differentiable, "differentiable=True", "Use torch.optim: this step has no gradient"),
            (amsgrad, "amsgrad=True", "Use torch.optim: it would need a third state"),
            (is_paged, "is_paged=True", "Leave it out: states in 8 bits are not paged to the host"),
            (
                percentile_clipping != 100,
                f"percentile_clipping={percentile_clipping}",
                "Use max_grad_norm: bitsandbytes has removed it too",
            ),
            (not block_wise, "block_wise=False", "Leave it out: all states are in blocks"),
        ):
            if refused:
                raise ValueError(f"{name}: {setting} is not supported. {remedy}.")
        if nonfinite not in ("propagate", "skip_element", "skip_step"):
            raise ValueError(
                f"{name}: nonfinite must be 'propagate', 'skip_element' or 'skip_step', "
                f"got {nonfinite!r}."
            )
        if max_grad_norm is not None and nonfinite == "skip_element":
            raise ValueError(
                f"{name}: one gradient that is not finite makes the norm of all so: with "
                "max_grad_norm use nonfinite='skip_step'."
            )
        self.settings = {
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._check_ranges(self.settings)
        defaults |= {
            "optim_bits": self.bits if optim_bits is None else optim_bits,
            "min_8bit_size": min_8bit_size,
            "block_size": block_size,
            "state_format": state_format,
            "maximize": maximize,
            "version": interchange.VERSION,
            "tables": interchange.TABLES,
        }
        self._calls, self._made_for = [], None
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ what a rule says of itself

    def rule_of(self, group: dict[str, Any]) -> str:
        return self.rule

    def has_states(self, group: dict[str, Any]) -> tuple[bool, bool]:
        """Whether the rule has a first moment, signed, and a second one."""
        return self.torch_names[0] is not None, self.torch_names[1] is not None

    def moments_of(self, k: int) -> tuple[str | None, ...]:
        """Names of the moments in state k, 0 or 1; AdEMAMix has two in the first."""
        slow = self.slow_name if k == 0 else None
        return (self.torch_names[k],) if slow is None else (self.torch_names[k], slow)

    def row(self, group: dict[str, Any]) -> dict[int, float]:
        """Columns of `hyper` that do not change from step to step."""
        raise NotImplementedError

    def timed(self, h: Tensor, t: Tensor) -> None:
        """Sets the columns of h (T, HYPER) fp64 that depend on the step t (T,), from 1."""

    def adapts(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether LARS and LAMB scale the step of this tensor to its size."""
        adapt = group.get("adapt")
        return p.dim() >= 2 if adapt is None else bool(adapt)

    # ------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # torch.compiler.disable, which would import the compiler here
    def _step(self) -> None:
        active = [
            (p, i, number)
            for number, (i, p) in enumerate(
                (i, p) for i, group in enumerate(self.param_groups) for p in group["params"]
            )
            if p.grad is not None and p.numel()
        ]
        kinds = [(self.rule_of(group), *self._form(group)) for group in self.param_groups]
        self._prepare(active, kinds)
        scale, found_inf = self._scale([p.grad for p, _, _ in active]) if active else (None, None)
        rows = [self._row(group) for group in self.param_groups]
        for call in self._calls:
            gradients = call.gradients(type(self).__name__)
            skip = None if found_inf is None else found_inf.to(call.device, torch.float32)
            call.counters[:, 0] += 1 if skip is None else skip == 0
            h = call.table(rows)
            for i, group in enumerate(self.param_groups):
                if isinstance(group["lr"], Tensor):
                    lr = group["lr"].to(h, non_blocking=True)
                    h[:, op.LR] = torch.where(call.group == i, lr, h[:, op.LR])
            self.timed(h, call.counters[:, 0])
            if scale is not None:
                h[:, op.SCALE] *= scale.to(call.device)
            torch.ops.fastssl.blockwise_step_(
                [local(p) for p in call.params],
                gradients,
                *call.states,
                h.float(),
                call.counters,
                skip,
                op.RULES.index(call.rule),
                call.block_size,
                call.root,
                self.settings["nonfinite"] == "skip_element",
                self.settings["stochastic_rounding"],
                self.settings["seed"],
            )

    def _form(self, group: dict[str, Any]) -> tuple:
        return group["block_size"], group["state_format"] == "sqrt", self.has_states(group)

    def _prepare(self, active: list[tuple[Tensor, int, int]], kinds: list[tuple]) -> None:
        """Makes the calls anew where parameters, their groups' rules or their states are others."""
        if self._made_of(active, kinds) == self._made_for:
            return
        members = {}
        for p, i, number in active:
            group, state = self.param_groups[i], self.state[p]
            if (
                any(
                    present and f"state{k + 1}" not in state
                    for k, present in enumerate(self.has_states(group))
                )
                or "step" not in state
            ):
                if self.rule == "sgd":  # whose first momentum is the gradient, whenever it begins
                    state.pop("step", None)
                state |= self.new_state(group, p) | state
            device = local(p).device
            for name, x in self.state[p].items():
                if x.device != device:
                    raise RuntimeError(
                        f"{type(self).__name__}: {name} of a parameter of shape {tuple(p.shape)} "
                        f"is on {x.device}, the parameter on {device}. Load the optimizer's "
                        "state_dict() after moving the model: it brings states to their parameters."
                    )
            rule, block_size, root, _ = kinds[i]
            members.setdefault((device, rule, block_size, root), []).append((p, i, number))
        self._calls = [_Call(self, kind, some) for kind, some in members.items()]
        self._made_for = self._made_of(active, kinds)

    def _made_of(self, active: list[tuple[Tensor, int, int]], kinds: list[tuple]) -> tuple:
        each = [(id(p), i, n, *map(id, self.state.get(p, {}).values())) for p, i, n in active]
        return each, kinds, [group.get("adapt") for group in self.param_groups]

    def new_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        like, root = local(p), group["state_format"] == "sqrt"
        state = {"step": torch.zeros((), dtype=torch.int64, device=like.device)}
        start = group.get("initial_accumulator_value", 0.0)
        for k, present in enumerate(self.has_states(group)):
            if present:
                bits, each = self.bits_of(group, p), self.moments_of(k)
                form = bits, group["block_size"], root and k == 1
                moment = states.constant(k, like, start if k else 0.0, *form)
                state |= states.stack([moment] * len(each))
        return state | shards.names(self, p, state)

    def bits_of(self, group: dict[str, Any], p: Tensor) -> int:
        settings = group | overrides.of(p)
        return 32 if p.numel() < settings["min_8bit_size"] else settings["optim_bits"]

    def _row(self, group: dict[str, Any]) -> list[float]:
        of_tensor = isinstance(group["lr"], Tensor)
        row = {op.LR: 0.0 if of_tensor else float(group["lr"]), op.MOST: math.inf}
        row |= {op.CORRECTION1: 1.0, op.CORRECTION2: 1.0, op.DECAY: group["weight_decay"]}
        row |= {op.SCALE: -1.0 if group["maximize"] else 1.0, **self.row(group)}
        return [float(row.get(column, 0.0)) for column in range(op.HYPER)]

    def _scale(self, gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are multiplied by, and whether to skip the step, where needed."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = None if scale is None else 1 / scale.double()
        limit, skip = self.settings["max_grad_norm"], self.settings["nonfinite"] == "skip_step"
        if limit is None and not skip:
            return scale, found_inf
        wide = torch.float32  # the norm of fp16 gradients may be none in fp16
        norm = get_total_norm(
            [g if g.dtype == wide else torch.linalg.vector_norm(g, dtype=wide) for g in gradients]
        )
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).double()
        if skip:
            bad = ~norm.isfinite()
            found_inf = bad if found_inf is None else bad | (found_inf != 0).to(bad.device)
        if limit is not None:
            scale = torch.ones_like(norm) if scale is None else scale.to(norm.device)
            scale = scale * (limit / (norm * scale + 1e-6)).clamp(max=1)
        return scale, found_inf

    # ---------------------------------------------------------------------- groups and their checks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "bits" in param_group:
            param_group["optim_bits"] = param_group.pop("bits")
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check_ranges(self, settings: dict[str, Any]) -> None:
        for key, (rule, holds) in self.ranges.items():
            if key not in settings:
                continue
            try:
                fits = bool(holds(settings[key]))
            except (TypeError, RuntimeError):  # of no number, of a tensor of several
                fits = False
            if not fits:
                raise ValueError(
                    f"{type(self).__name__}: needs {key} {rule}, got {settings[key]!r}."
                )

    def _check(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        self._check_ranges(group)
        for p in group["params"]:
            part = local(p)
            if part.dtype not in DTYPES:
                raise TypeError(
                    f"{name}: parameters must be float32, bfloat16 or float16, got {part.dtype} of "
                    f"shape {tuple(p.shape)}. Give others to an optimizer of torch.optim."
                )
            if not is_dense(part):
                raise ValueError(
                    f"{name}: parameters must fill their memory, got shape {tuple(part.shape)} "
                    f"with strides {part.stride()}. Make the parameter from a .clone()."
                )
            sharded = any(placement.is_shard() for placement in getattr(p, "placements", ()))
            if sharded and self.rule in ("lars", "lamb") and self.adapts(group, p):
                raise ValueError(
                    f"{name}: the trust ratio needs the norm of the whole tensor, got a shard of "
                    f"one of shape {tuple(p.shape)}. Replicate it, or set adapt=False in its group."
                )

    # ------------------------------------------------------------------------------------ the state

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls, self._made_for = [], None

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; each group also says what the bytes of its states mean.

        Its tensors have the same shapes for any number of ranks, those of sharded parameters are
        DTensors: torch.distributed.checkpoint saves them as they are, in 8 bits, and loads them
        into the states of an optimizer of the same settings, for whatever ranks.

        Raises:
            ValueError: 8-bit states of shards that are not of whole rows.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        out = interchange.numbered(self)
        for key, (p, group) in enumerate(interchange.parameters(self)):
            if key in out["state"]:
                out["state"][key] = shards.portable(self, p, out["state"][key], group["block_size"])
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, out)
            out = out if changed is None else changed
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes its own state_dict(), bitsandbytes' (any version and block size) or torch.optim's.

        Settings of the groups are taken too, as torch.optim does, but for `optim_bits` and
        `min_8bit_size`, by which states are converted. Its own 8-bit states must be of the same
        block size, format and table; what converts, converts exactly or to the nearest codes.

        Shards are cut out of states that are whole. States of other shards than these are blocked
        anew: elements that share a block now as before keep their bits, blocks that join parts of
        several are rounded, with one warning that says how many. Then all ranks must call this.

        Raises:
            ValueError: other states than the parameters', or in another form.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups, loaded = interchange.load(self, state_dict)
        self.__setstate__({"state": defaultdict(dict, loaded), "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def full_precision_state_dict(self) -> dict[str, Any]:
        """A state_dict() with fp32 states by torch.optim's names, which the class there loads.

        Of shards they are DTensors, which torch.distributed.checkpoint saves whole and loads on any
        number of ranks, into what this gives for a new optimizer: it has the states of parameters
        that had no step yet, too.
        """
        return interchange.full_precision(self)

    def bnb_state_dict(self) -> dict[str, Any]:
        """A state_dict() that bitsandbytes' class of this name loads, in blocks of 256."""
        return interchange.bitsandbytes(self)
