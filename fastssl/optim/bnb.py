"""bitsandbytes' names with these optimizers behind them, for `fastssl.patch("bitsandbytes")`.

The arguments, their order and their defaults are those of the installed bitsandbytes, `args=`
included; the options of `Blockwise` may follow by keyword. What differs from bitsandbytes is the
step, which is that of `fastssl.optim`:

- weight decay comes before the update, and zero stays zero;
- Adam decays apart from the gradient, as bitsandbytes' Adam does, so it is AdamW with decay 0;
- SGD and RMSprop use dampening, nesterov and momentum, which bitsandbytes reads and forgets;
- LARS scales the gradient of each tensor to at most max_unorm of its weights' norm, where
  bitsandbytes limits the momentum, in 32 bits only; LAMB has the paper's ratio, not one of at
  most 1; both leave tensors of one dimension alone;
- states are fp32 below min_8bit_size, or where bitsandbytes' GlobalOptimManager says so.

What bitsandbytes ignores or this step has not is refused with the reason.
"""

import inspect
from typing import Any

from . import rules

# bitsandbytes' families and the class whose step they take.
FAMILIES = {
    "Adam": "AdamW8bit",
    "AdamW": "AdamW8bit",
    "SGD": "SGD8bit",
    "Lion": "Lion8bit",
    "RMSprop": "RMSprop8bit",
    "Adagrad": "Adagrad8bit",
    "LARS": "LARS8bit",
    "LAMB": "LAMB8bit",
    "AdEMAMix": "AdEMAMix8bit",
}
NAMES = tuple(family + bits for family in FAMILIES for bits in ("", "8bit", "32bit"))


def drop_in(original: type) -> type | None:
    """Our class with the arguments of bitsandbytes' class, which has one of NAMES."""
    name = original.__name__
    family = name.removesuffix("8bit").removesuffix("32bit")
    base = getattr(rules, FAMILIES[family], None)
    if base is None:
        return None
    signature = inspect.signature(original)
    options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    signature = signature.replace(parameters=[*signature.parameters.values(), options])

    def __init__(self, *args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        base.__init__(self, **_translated(name, family, bound.arguments))

    # bitsandbytes' module, by which Hugging Face's Trainer knows its optimizers, and pickle ours.
    own = {"__init__": __init__, "__module__": original.__module__, "__signature__": signature}
    doc = f"`fastssl.optim.{base.__name__}` with bitsandbytes' arguments; see fastssl.optim.bnb."
    return type(name, (base,), own | {"__doc__": doc})


def _translated(name: str, family: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our class for those of bitsandbytes'."""
    options = given.pop("options", {})
    out = given | options
    args = out.pop("args", None)
    if name != family:  # whatever the argument says
        out["optim_bits"] = 8 if name.endswith("8bit") else 32
    for setting in ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros"):
        if hasattr(args, setting):
            out[setting] = getattr(args, setting)
    max_unorm, skip_zeros = out.pop("max_unorm", 0.0), out.pop("skip_zeros", False)
    if isinstance(out.get("betas"), str):  # "(0.9, 0.999)", as fairseq's command line has them
        out["betas"] = tuple(float(beta) for beta in out["betas"].strip("() ").split(","))
    ignored = "Leave it out: bitsandbytes ignores it"
    refused = [(skip_zeros, "skip_zeros=True", "Leave it out: gradients of 0 count as any other")]
    if family == "LARS":
        nesterov, dampening = out.pop("nesterov"), out.pop("dampening")
        refused += [
            (nesterov, "nesterov=True", ignored),
            (dampening, f"dampening={dampening}", ignored),
            (not max_unorm > 0, f"max_unorm={max_unorm}", "Use SGD, which has no trust ratio"),
        ]
        out |= {"eta": max_unorm, "clip": True}
    elif family == "LAMB":
        for setting in ("bias_correction", "adam_w_mode"):
            refused.append((not out.pop(setting), f"{setting}=False", ignored))
        refused.append((max_unorm != 1.0, f"max_unorm={max_unorm}", "Leave it at 1"))
    else:
        refused.append((max_unorm, f"max_unorm={max_unorm}", "Use max_grad_norm, of all tensors"))
    for holds, setting, remedy in refused:
        if holds:
            raise ValueError(f"{name}: {setting} is not supported. {remedy}.")
    return out
