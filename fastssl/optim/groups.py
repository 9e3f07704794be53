"""Which parameters decay, and which learn slower."""

import re
from collections import defaultdict
from fnmatch import fnmatchcase

from torch import nn

from fastssl.extras import require

# Of the last part of a name: class and other tokens, positions.
_INPUTS = re.compile(r"(?:^|\.)(?:cls|\w*token|\w*pos\w*emb\w*)$")
# Blocks of a transformer, stages of a ResNet: ours, timm's, torchvision's.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|stages|layers?|encoder_layer)[._]?(\d+)\.")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and kernels with `weight_decay`, the rest without.

    The rest is everything with fewer than two dimensions (biases, scales of normalisations,
    temperatures), class tokens, positions, and what the `no_weight_decay()` of a module names, as
    those of timm do. Parameters that do not require gradients are left out.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decaying = _decaying(model)
    decay = [p for name, p in trained if name in decaying]
    rest = [p for name, p in trained if name not in decaying]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def param_groups_layer_decay(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups of a backbone whose early layers learn slower, for fine-tuning.

        lr of layer i = lr layer_decay^(depth + 1 - i)

    with i = 0 for what stands before the blocks (patches, class token, positions, stem), k + 1 for
    block k, and depth + 1 for what follows them (last normalisation, head).

    Args:
        model: one backbone, with or without a head: a vision transformer or ResNet of this package
            or torchvision, or a model of timm. Those with a `group_matcher` are grouped as timm
            does it: the last normalisation of a transformer belongs to its last block, ResNets go
            by blocks and not by stages, and without a head the last block has the full rate.
            Inside another module they are grouped by the names of their parameters, as the others.
        lr: learning rate of the last layers, >= 0.
        weight_decay: as for `param_groups`: not of what has fewer than two dimensions, of tokens,
            positions or what `no_weight_decay()` names.
        layer_decay: in (0, 1]; 0.65 to 0.75 for fine-tuning of large transformers.

    Returns:
        A group for each layer and kind, first layers first: {"params", "lr", "weight_decay"}.

    Raises:
        ValueError: layer_decay out of range, or a model without known blocks.

    Notes: schedules must scale each group's own rate, as those of torch do. "Before" and "after"
    are of the order of `model.named_parameters()`.

    Example:
        >>> from fastssl.models import ViTSmall
        >>> groups = param_groups_layer_decay(ViTSmall(), 1e-3, 0.05, layer_decay=0.5)
        >>> groups[0]["lr"], groups[-1]["lr"]
        (3.125e-05, 0.001)

    Paper: Clark et al., ELECTRA, arXiv 2003.10555; for images Bao et al., BEiT, arXiv 2106.08254.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"param_groups_layer_decay: needs layer_decay in (0, 1], got {layer_decay}. 1 is none."
        )
    layers, last = _layers(model)
    decaying, groups = _decaying(model), defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[layers[name], name in decaying].append(p)
    return [
        {
            "params": groups[layer, decays],
            "lr": lr * layer_decay ** (last - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for layer, decays in sorted(groups)
    ]


def _decaying(model: nn.Module) -> set[str]:
    """Names of the parameters that decay."""
    spared, asked = [], ()  # names with wildcards; of modules, as timm only the outermost
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        if hasattr(module, "no_weight_decay") and not path.startswith(asked):
            spared += [prefix + name for name in module.no_weight_decay()]
            asked += (prefix,)
        if isinstance(module, nn.Embedding) and _INPUTS.search(path):
            spared.append(prefix + "weight")
    wide = [
        name for name, p in model.named_parameters() if p.ndim >= 2 and not _INPUTS.search(name)
    ]
    return {name for name in wide if not any(fnmatchcase(name, s) for s in spared)}


def _layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each parameter, by name, and the one with the full rate."""
    if hasattr(model, "group_matcher"):
        models = require("timm.models", "vision")
        out = models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        return out, max(out.values())
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    if not blocks:
        raise ValueError(
            f"param_groups_layer_decay: {type(model).__name__} must have blocks named "
            f"blocks.0, stages.0, layer1 or encoder_layer_0, got {', '.join(names[:3])}, ... "
            "Make groups with their own lr instead."
        )
    ranks = {number: rank for rank, number in enumerate(sorted(set(blocks.values())), 1)}
    out, last, outside = {}, len(ranks) + 1, 0
    for name in names:
        if name in blocks:
            outside = last
        out[name] = ranks[blocks[name]] if name in blocks else outside
    return out, last
