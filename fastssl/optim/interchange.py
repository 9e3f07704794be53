"""States from and for other optimizers: bitsandbytes' files, torch.optim's, and our own.

bitsandbytes keeps step, state1, state2, absmax1, absmax2 and the tables qmap1, qmap2 for each
parameter, flat or under one key; second moments in the signed table where they are the only state;
elements in the order of a contiguous tensor.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl.ops.blockwise import SHA256, code_book

from . import shards, states

VERSION = 2
TABLES = f"signed {SHA256[True]}, unsigned {SHA256[False]}"
NESTED = "__bnb_optimizer_quant_state__"
BNB_BLOCKS = (256, 2048)  # since 0.44, and before
OURS = ("version", "tables", "optim_bits", "min_8bit_size", "block_size", "state_format")


def load(optimizer, state_dict: dict[str, Any]) -> tuple[list[dict], dict[Tensor, dict]]:
    """The groups for torch's own load_state_dict, and the states by parameter."""
    name = f"{type(optimizer).__name__}.load_state_dict"
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    sizes, saved_sizes = ([len(g["params"]) for g in each] for each in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"{name}: the groups must have {sizes} parameters, got {saved_sizes}. Build the "
            "optimizer with the parameter groups of the saved one."
        )
    loaded, new_groups, rounded = {}, [], 0
    for group, saved in zip(groups, saved_groups, strict=True):
        _check_form(name, group, saved)
        new = group | _settings(optimizer, group, saved)
        new_groups.append(new | {"params": saved["params"]})
        for p, key in zip(group["params"], saved["params"], strict=True):
            state = dict(state_dict["state"].get(key, {}))
            state |= state.pop(NESTED, {})
            if state:
                where = f"{name}: parameter {key} of shape {tuple(p.shape)}"
                loaded[p], some = _load_state(where, optimizer, new, p, state, "version" in saved)
                rounded += some
    if rounded:
        warnings.warn(
            f"{name}: {rounded} blocks of this rank join parts of several saved ones, as shards or "
            "memory formats are others. They were rounded anew; the rest is kept bit for bit.",
            stacklevel=3,
        )
    return new_groups, loaded


def _check_form(name: str, group: dict[str, Any], saved: dict[str, Any]) -> None:
    if "version" not in saved:  # of another library
        return
    form = {"block_size": group["block_size"], "state_format": group["state_format"]}
    for key, expected in {"version": VERSION, "tables": TABLES, **form}.items():
        if saved[key] != expected:
            raise ValueError(
                f"{name}: {key} must be {expected!r}, got {saved[key]!r}. Build the optimizer "
                "with the saved one's settings, or load what its full_precision_state_dict() gives."
            )


def _settings(optimizer, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Those of the file that the group has."""
    settings = {k: v for k, v in saved.items() if k in group and k not in OURS}
    if "betas" in saved and "betas" not in group:  # bitsandbytes' name for all such numbers
        settings |= zip(optimizer.bnb_betas, saved["betas"], strict=False)
    return settings


def _load_state(
    where: str, optimizer, group: dict, p: Tensor, saved: dict, ours: bool
) -> tuple[dict[str, Tensor], int]:
    """A parameter's state, and how many blocks were rounded as shards are others."""
    like, bits, rounded = states.local(p), optimizer.bits_of(group, p), 0
    step = torch.as_tensor(saved.get("step", 1))  # torch.optim.SGD does not count
    out = {"step": step.detach().to(like.device, torch.int64, copy=True).reshape(())}
    present = optimizer.has_states(group)
    of_bnb = "state1" in saved and not ours
    for k, signed in enumerate((True, False)):
        if not present[k]:
            continue
        place = 1 if of_bnb and not all(present) else k + 1
        x = saved.get(f"state{place}", saved.get(optimizer.torch_names[k]))
        fits = x is not None and x.shape in (p.shape, like.shape)
        if not fits or shards.part(x, p).shape != like.shape:
            raise ValueError(
                f"{where}: needs a state for {optimizer.torch_names[k]} of this shape, got "
                f"{'none' if x is None else tuple(x.shape)} among {sorted(saved)}."
            )
        root, small = group["state_format"] == "sqrt" and k == 1, x.dtype == torch.uint8
        layout = saved.get("layout") if ours else None
        if layout is not None and layout.any() and not small:
            raise ValueError(
                f"{where}: state{k + 1} must be of the 8 bits it was saved with, got {x.dtype}: "
                "torch.distributed.checkpoint reads into states of the bits that the optimizer "
                "has. Build it with the saved one's optim_bits and min_8bit_size, or save "
                "full_precision_state_dict()."
            )
        if small and ours:
            size, absmax = group["block_size"], saved.get(f"absmax{k + 1}")
            x, absmax, some = shards.load(where, p, k, x, absmax, layout, size)
            rounded += some
            if bits == 8:
                out |= {f"state{k + 1}": x, f"absmax{k + 1}": absmax}
                continue
            x = states.decode(x, absmax, code_book(signed, like.device), size, root)
        elif small:
            x = states.local(x).to(like.device)
            absmax = saved[f"absmax{place}"].to(like.device, torch.float32, copy=True)
            fitting = [size for size in BNB_BLOCKS if states.blocks(x.numel(), size) == len(absmax)]
            if not fitting:
                raise ValueError(
                    f"{where}: absmax{place} must have a number for each block of "
                    f"{' or '.join(map(str, BNB_BLOCKS))} elements, got {len(absmax)}."
                )
            table = saved[f"qmap{place}"].to(like.device)
            standard = torch.equal(table.cpu(), code_book(signed))
            same = standard and fitting[0] == group["block_size"] and x.shape == like.shape
            if bits == 8 and same and not root and states.same_layout(x, like):
                codes = torch.empty_like(like, dtype=torch.uint8).copy_(x)
                out |= {f"state{k + 1}": codes, f"absmax{k + 1}": absmax}
                continue
            x = states.decode(x.contiguous(), absmax, table, fitting[0], False)
        x = torch.empty_like(like, dtype=torch.float32).copy_(shards.part(x, p))
        out |= states.pack(k, x, bits, group["block_size"], root)
    return out | shards.layout(p, out), rounded


def _values(group: dict[str, Any], state: dict[str, Tensor]) -> list[Tensor | None]:
    """The two states of a parameter in fp32, as it lies in memory."""
    out = []
    for k in (0, 1):
        x = state.get(f"state{k + 1}")
        if x is not None and x.dtype == torch.uint8:
            root = group["state_format"] == "sqrt" and k == 1
            table = code_book(k == 0, x.device)
            x = states.decode(x, state[f"absmax{k + 1}"], table, group["block_size"], root)
        out.append(None if x is None else x.clone())
    return out


def parameters(optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def full_precision(optimizer) -> dict[str, Any]:
    out = Optimizer.state_dict(optimizer)
    for key, (p, group) in enumerate(parameters(optimizer)):
        state = optimizer.state.get(p) or optimizer.new_state(group, p)
        values = zip(optimizer.torch_names, _values(group, state), strict=True)
        new = {name: states.sharded(x, p) for name, x in values if x is not None}
        out["state"][key] = {"step": state["step"].float(), **new}
    out["param_groups"] = [
        {k: v for k, v in group.items() if k not in OURS} for group in out["param_groups"]
    ]
    return out


def bitsandbytes(optimizer) -> dict[str, Any]:
    out = Optimizer.state_dict(optimizer)
    of_key = parameters(optimizer)
    for key, state in out["state"].items():
        p, group = of_key[key]
        present = optimizer.has_states(group)
        if optimizer.rule == "rmsprop" and all(present):
            raise ValueError(
                f"{type(optimizer).__name__}.bnb_state_dict: bitsandbytes keeps no momentum for "
                f"RMSprop, got momentum={group['momentum']}."
            )
        new = {"step": int(state["step"])}
        values = [x.contiguous() for x in _values(group, state) if x is not None]
        for place, x in enumerate(values, 1):
            signed = place == 1  # the first place is read by the signed table whatever it holds
            own = f"state{place}" if all(present) else "state1" if present[0] else "state2"
            small = state[own].dtype == torch.uint8
            ready = small and group["block_size"] == 256 and group["state_format"] == "bnb"
            ready = ready and (own == f"state{place}") and state[own].is_contiguous()
            if ready:
                form = {f"state{place}": state[own].clone()}
                form[f"absmax{place}"] = state[f"absmax{place}"].clone()
            elif small:
                codes, absmax = states.encode(x, 256, signed, False)
                form = {f"state{place}": codes, f"absmax{place}": absmax}
            else:
                form = {f"state{place}": x}
            new |= form | ({f"qmap{place}": code_book(signed, x.device)} if small else {})
        if optimizer.rule in ("lars", "lamb"):
            new["unorm_vec"] = torch.zeros(1, device=states.local(p).device)
        out["state"][key] = new
    out["param_groups"] = [_bnb_group(optimizer, group) for group in out["param_groups"]]
    return out


def _bnb_group(optimizer, group: dict[str, Any]) -> dict[str, Any]:
    betas = group.get("betas") or [group[name] for name in optimizer.bnb_betas]
    betas = (*betas, 0.0, 0.0)[:2]
    named = {"lr": float(group["lr"]), "betas": betas, "eps": group.get("eps", 0.0)}
    unused = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # of AdEMAMix, read for all
    return named | unused | {"weight_decay": group["weight_decay"], "params": group["params"]}
