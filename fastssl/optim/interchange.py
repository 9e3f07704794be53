"""States from and for other optimizers: bitsandbytes' files, torch.optim's, and our own.

bitsandbytes keeps step, state1, state2, absmax1, absmax2 and the tables qmap1, qmap2 for each
parameter, flat or under one key; second moments in the signed table where they are the only state;
elements in the order of a contiguous tensor; AdEMAMix's two momenta stacked in state1, absmax1.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from fastssl.ops.blockwise import SHA256, code_book

from . import shards, states

VERSION = 2
TABLES = f"signed {SHA256[True]}, unsigned {SHA256[False]}"
NESTED = "__bnb_optimizer_quant_state__"
BNB_BLOCKS = (256, 2048)  # since 0.44, and before
OURS = ("version", "tables", "optim_bits", "min_8bit_size", "block_size", "state_format")


def load(optimizer, state_dict: dict[str, Any]) -> tuple[list[dict], dict[Tensor, dict]]:
    """The new groups, and the states by parameter."""
    name = f"{type(optimizer).__name__}.load_state_dict"
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"{name}: needs 'state' and 'param_groups', got {list(state_dict)}.")
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
        optimizer._check(new)
        new_groups.append(new)
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
    for setting in ("amsgrad", "centered"):
        if saved.get(setting):
            raise ValueError(
                f"{name}: {setting}=True is not supported, got states saved with it. Use "
                "torch.optim: it needs a third state."
            )
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
    """Those of the file that the group has, and what others keep in a group of ours."""
    more = saved.keys() if "version" in saved else {"initial_lr", "param_names"}
    own = (*OURS, "params")
    settings = {k: v for k, v in saved.items() if (k in group or k in more) and k not in own}
    if "betas" in saved and "betas" not in group:  # bitsandbytes' name for all such numbers
        settings |= zip(optimizer.bnb_betas, saved["betas"], strict=False)
    return copy.deepcopy(settings)


def _load_state(
    where: str, optimizer, group: dict, p: Tensor, saved: dict, ours: bool
) -> tuple[dict[str, Tensor], int]:
    """A parameter's state, and how many blocks were rounded as shards are others."""
    if ours and "step" not in saved:
        raise ValueError(f"{where}: needs step, got {sorted(saved)}.")
    like, bits, rounded = states.local(p), optimizer.bits_of(group, p), 0
    step = torch.as_tensor(saved.get("step", 1))  # torch.optim.SGD does not count
    out = {"step": step.detach().to(like.device, torch.int64, copy=True).reshape(())}
    present = optimizer.has_states(group)
    of_bnb = "state1" in saved and not ours
    layout = saved.get("layout") if ours else None

    def moment(k: int, place: int, x: Tensor, absmax: Tensor | None) -> dict[str, Tensor]:
        nonlocal rounded
        root, size = group["state_format"] == "sqrt" and k == 1, group["block_size"]
        if layout is not None and layout.any() and x.dtype != torch.uint8:
            raise ValueError(
                f"{where}: state{k + 1} must be of the 8 bits it was saved with, got {x.dtype}: "
                "torch.distributed.checkpoint reads into states of the bits that the optimizer "
                "has. Build it with the saved one's optim_bits and min_8bit_size, or save "
                "full_precision_state_dict()."
            )
        if x.dtype == torch.uint8 and ours:
            x, absmax, some = shards.load(where, p, k, x, absmax, layout, size)
            rounded += some
            if bits == 8:
                return {f"state{k + 1}": x, f"absmax{k + 1}": absmax}
            x = states.decode(x, absmax, code_book(k == 0, like.device), size, root)
        elif x.dtype == torch.uint8:
            x = states.local(x).to(like.device)
            absmax = absmax.to(like.device, torch.float32, copy=True)
            fitting = [n for n in BNB_BLOCKS if states.blocks(x.numel(), n) == len(absmax)]
            if not fitting:
                raise ValueError(
                    f"{where}: absmax{place} must have a number for each block of "
                    f"{' or '.join(map(str, BNB_BLOCKS))} elements, got {len(absmax)}."
                )
            table = saved[f"qmap{place}"].to(like.device)
            standard = torch.equal(table.cpu(), code_book(k == 0))
            same = standard and fitting[0] == size and x.shape == like.shape
            if bits == 8 and same and not root and states.same_layout(x, like):
                codes = torch.empty_like(like, dtype=torch.uint8).copy_(x)
                return {f"state{k + 1}": codes, f"absmax{k + 1}": absmax}
            x = states.decode(x.contiguous(), absmax, table, fitting[0], False)
        x = torch.empty_like(like, dtype=torch.float32).copy_(shards.part(x, p))
        return states.pack(k, x, bits, size, root)

    for k in (0, 1):
        if not present[k]:
            continue
        place, names = 1 if of_bnb and not all(present) else k + 1, optimizer.moments_of(k)
        x = saved.get(f"state{place}")
        if x is None:
            each = [(saved.get(name), None) for name in names]
        elif ours:
            keys = shards.keys(k, len(names))
            each = [(saved.get(state), saved.get(absmax)) for state, absmax in keys]
        else:
            each = states.moments(x, saved.get(f"absmax{place}"), len(names))
        fit = [
            y is not None
            and y.shape in (p.shape, like.shape)
            and shards.part(y, p).shape == like.shape
            for y, _ in each
        ]
        if not all(fit) or len(fit) != len(names):
            x = saved.get(names[0]) if x is None else x
            raise ValueError(
                f"{where}: needs a state for {' and '.join(names)} of this shape, got "
                f"{'none' if x is None else tuple(x.shape)} among {sorted(saved)}."
            )
        out |= states.stack([moment(k, place, *y) for y in each])
    return out | shards.names(optimizer, p, out), rounded


def _values(optimizer, group: dict[str, Any], state: dict[str, Tensor]) -> list[list[Tensor]]:
    """Of each of a parameter's two states the moments in fp32, as they lie in memory."""
    out = []
    for k in (0, 1):
        x, absmax = state.get(f"state{k + 1}"), state.get(f"absmax{k + 1}")
        root, found = group["state_format"] == "sqrt" and k == 1, []
        if x is not None:
            for y, scale in states.moments(x, absmax, len(optimizer.moments_of(k))):
                if y.dtype == torch.uint8:
                    table = code_book(k == 0, y.device)
                    y = states.decode(y, scale, table, group["block_size"], root)
                found.append(y.clone())
        out.append(found)
    return out


def parameters(optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def numbered(optimizer) -> dict[str, Any]:
    """The state_dict() of torch.optim's base class, before hooks."""
    place = {}
    for i, (p, _) in enumerate(parameters(optimizer)):
        place.setdefault(p, i)
    groups = [g | {"params": [place[p] for p in g["params"]]} for g in optimizer.param_groups]
    state = {place[p]: state for p, state in optimizer.state.items() if p in place}
    return {"state": state, "param_groups": groups}


def full_precision(optimizer) -> dict[str, Any]:
    out = numbered(optimizer)
    for key, (p, group) in enumerate(parameters(optimizer)):
        state = optimizer.state.get(p) or optimizer.new_state(group, p)
        new = {}
        for k, moments in enumerate(_values(optimizer, group, state)):
            names = optimizer.moments_of(k)
            new |= {name: states.sharded(x, p) for name, x in zip(names, moments, strict=False)}
        out["state"][key] = {"step": state["step"].float(), **new}
    out["param_groups"] = [
        {k: v for k, v in group.items() if k not in OURS} for group in out["param_groups"]
    ]
    return out


def bitsandbytes(optimizer) -> dict[str, Any]:
    out = numbered(optimizer)
    of_key = parameters(optimizer)
    for key, state in out["state"].items():
        p, group = of_key[key]
        if shards.split(p):
            raise ValueError(
                f"{type(optimizer).__name__}.bnb_state_dict: needs whole parameters, got a shard "
                f"of one of shape {tuple(p.shape)}. Use full_precision_state_dict()."
            )
        present = optimizer.has_states(group)
        if optimizer.rule == "rmsprop" and all(present):
            raise ValueError(
                f"{type(optimizer).__name__}.bnb_state_dict: bitsandbytes keeps no momentum for "
                f"RMSprop, got momentum={group['momentum']}."
            )
        new = {"step": int(state["step"])}
        values = [moments for moments in _values(optimizer, group, state) if moments]
        for place, moments in enumerate(values, 1):
            signed = place == 1  # the first place is read by the signed table whatever it holds
            own = f"state{place}" if all(present) else "state1" if present[0] else "state2"
            small = state[own].dtype == torch.uint8
            ready = small and group["block_size"] == 256 and group["state_format"] == "bnb"
            ready = ready and (own == f"state{place}") and state[own].is_contiguous()
            if ready:
                form = {f"state{place}": state[own].clone()}
                form[f"absmax{place}"] = state[f"absmax{place}"].clone()
            else:
                bits = 8 if small else 32
                packed = [states.pack(place - 1, x.contiguous(), bits, 256, False) for x in moments]
                form = states.stack(packed)
            table = code_book(signed, state[own].device)
            new |= form | ({f"qmap{place}": table} if small else {})
        if optimizer.rule in ("lars", "lamb"):
            new["unorm_vec"] = torch.zeros(1, device=states.local(p).device)
        out["state"][key] = new
    out["param_groups"] = [_bnb_group(optimizer, group) for group in out["param_groups"]]
    return out


def _bnb_group(optimizer, group: dict[str, Any]) -> dict[str, Any]:
    betas = group.get("betas") or [group[name] for name in optimizer.bnb_betas]
    betas = (*betas, 0.0, 0.0)[: max(2, len(betas))]
    named = {"lr": float(group["lr"]), "betas": betas, "eps": group.get("eps", 0.0)}
    of_ademamix = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # read for all
    if optimizer.rule == "ademamix":
        of_ademamix = {key: group[key] for key in of_ademamix}
    return named | of_ademamix | {"weight_decay": group["weight_decay"], "params": group["params"]}
