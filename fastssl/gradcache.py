"""Contrastive batches larger than memory: features of the whole batch, a graph of one chunk."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastssl.autograd import once_differentiable


class GradCache(nn.Module):
    """`encoder`, with the activations of one chunk instead of the whole batch: same gradients.

    The forward encodes chunk by chunk without a graph and returns all features. The loss is
    computed on them as ever; its backward leaves the gradient g of the features, and then encodes
    each chunk c again, now with a graph, for dloss/dw = sum_c (dfeatures_c / dw)^T g_c.

    Args:
        encoder: a module, a method of one (`clip.encode_image`), or any function of tensors.
        chunk: rows encoded at a time, >= 1; the last chunk may be smaller.
        module: owner of the parameters and buffers that a plain function uses; an
            `nn.ModuleList` if there are several.

    Called like the encoder. Arguments may hold tensors in tuples, lists and dicts: all of them
    (N, ...) of one N, except 0-dim ones, which each chunk gets whole. So for what it returns;
    0-dim outputs, such as a learnable logit scale, and all that are no tensors are those of the
    first chunk.

    Raises:
        TypeError: a function without its module. ValueError: a chunk below 1, an encoder wrapped
            in DistributedDataParallel, tensors of different N, outputs of another number of rows.
        RuntimeError, in the backward: weights changed since the forward, or a parameter that is
            not the module's (FSDP's are not).

    Memory: inputs, features, and the activations of one chunk. Each chunk's forward runs twice, so
        a step costs about a third more time. A batch of at most one chunk is encoded as usual.

    Notes: exact for encoders whose rows do not depend on each other. BatchNorm in training mode
        takes its statistics from the chunk; buffers change as in the forward and no second time.
        The second encoding draws the same random numbers from torch's generators (not Python's or
        NumPy's) under the same autocast. Checkpoints in the encoder must have use_reentrant=False.
        Parameters get their gradient once, after all chunks, so DDP(GradCache(encoder, chunk))
        reduces once a step and needs no `no_sync`. The backward can be differentiated no further.

        Summing the losses of chunks instead gives another loss: each row would meet only its own
        chunk's negatives.

    Example:
        >>> from fastssl.ops import info_nce
        >>> cache, views = GradCache(torch.nn.Linear(8, 4), chunk=3), torch.randn(2, 10, 8)
        >>> loss = info_nce(cache(views[0]), cache(views[1]), temperature=0.1, normalize=True)
        >>> loss.backward()

    Paper: Scaling deep contrastive learning batch size under memory limited setup,
        arXiv:2101.06983. Deviation: the second pass is the features' backward, not a step of the
        user's.
    """

    def __init__(self, encoder: Callable, chunk: int, *, module: nn.Module | None = None):
        super().__init__()
        if module is not None or not isinstance(encoder, nn.Module):
            owner = getattr(encoder, "__self__", None) if module is None else module
            if not isinstance(owner, nn.Module):
                raise TypeError(
                    f"GradCache: encoder must be a module or a method of one, got {encoder!r}. "
                    "Name the owner of a function's parameters with module=."
                )
            encoder = _Function(encoder, owner)
        if not chunk >= 1:
            raise ValueError(f"GradCache: chunk must be at least 1 row, got {chunk}.")
        if any(isinstance(m, DistributedDataParallel) for m in encoder.modules()):
            raise ValueError(
                "GradCache: encoder must not be wrapped in DistributedDataParallel, which would "
                "synchronise every chunk. Wrap the cache: DDP(GradCache(encoder, chunk))."
            )
        self.encoder, self.chunk = encoder, chunk

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}"

    def forward(self, *args, **kwargs) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        N = _rows(tensors)
        if N <= self.chunk:
            return self.encoder(*args, **kwargs)
        learns = torch.is_grad_enabled()
        parameters = [p for p in self.encoder.parameters() if learns and p.requires_grad]
        call = _Call(self.encoder, self.chunk, leaves, spec, N, parameters)
        # Parameters are arguments of the node: they get their gradient from it in one piece, and
        # what waits for that (DDP, hooks on gradients) sees one ordinary backward.
        outputs = _Chunks.apply(call, *tensors, *parameters)
        return tree_unflatten(list(outputs), call.out_spec)


class _Function(nn.Module):
    """A function as a module that owns what the function uses."""

    def __init__(self, function: Callable, module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class _Call:
    """A call of the encoder that can be repeated on any chunk of the rows."""

    def __init__(self, encoder, chunk, leaves, spec, N, parameters):
        self.encoder, self.parameters, self.spec = encoder, parameters, spec
        self.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.parts = [slice(i, min(i + chunk, N)) for i in range(0, N, chunk)]
        devices = {x.device for x in (*(leaves[i] for i in self.where), *parameters)}
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(device.type for device in self.devices)}
        ]

    def encode(self, tensors: list[Tensor], buffers: dict[str, Tensor] | None = None) -> list:
        """All outputs for these tensors; with `buffers`, on those instead of the encoder's."""
        leaves = list(self.others)
        for i, x in zip(self.where, tensors, strict=True):
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        with ExitStack() as stack:
            for autocast in self.autocasts:
                stack.enter_context(torch.autocast(*autocast))
            if buffers is None:
                output = self.encoder(*args, **kwargs)
            else:
                output = functional_call(self.encoder, buffers, args, kwargs)
        outputs, self.out_spec = tree_flatten(output)
        return outputs

    def random_state(self) -> list[Tensor]:
        states = [torch.get_device_module(d).get_rng_state(d) for d in self.devices]
        return [torch.get_rng_state(), *states]

    def set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


class _Chunks(torch.autograd.Function):
    """Encodes without a graph; its backward encodes each chunk again, with one."""

    @staticmethod
    def forward(ctx, call, *tensors):
        inputs = tensors[: len(call.where)]
        ctx.call, ctx.random_states = call, []
        ctx.versions = [p._version for p in call.parameters]
        ctx.buffers = {name: b.clone() for name, b in call.encoder.named_buffers()}
        pieces = []
        for part in call.parts:
            ctx.random_states.append(call.random_state())
            pieces.append(call.encode([_cut(x, part) for x in inputs]))
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(_join(column, call.parts) for column in zip(*pieces, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        call, inputs = ctx.call, ctx.saved_tensors
        if ctx.versions != [p._version for p in call.parameters]:
            raise RuntimeError(
                "GradCache: weights must not change between the forward and the backward, which "
                "encodes again. Call backward() before optimizer.step()."
            )
        # A copy of what the forward found, so that the second encoding sees and changes the same
        # as the first, while the encoder's own buffers stay as the first left them.
        buffers = {name: b.clone() for name, b in ctx.buffers.items()}
        needs = ctx.needs_input_grad[1 : 1 + len(inputs)]
        dinputs = [torch.zeros_like(x) for x, need in zip(inputs, needs, strict=True) if need]
        dparameters: list[Tensor | None] = [None] * len(call.parameters)
        random_state = call.random_state()
        try:
            for part, state in zip(call.parts, ctx.random_states, strict=True):
                call.set_random_state(state)
                rows = [
                    _cut(x, part).detach().requires_grad_(need)
                    for x, need in zip(inputs, needs, strict=True)
                ]
                with torch.enable_grad():
                    outputs = call.encode(rows, buffers)
                found = _gradients(
                    outputs, grads, part, [x for x in rows if x.requires_grad] + call.parameters
                )
                for dx in dinputs:
                    d = next(found)
                    if d is not None:
                        _cut(dx, part).add_(d)
                for i, d in enumerate(found):
                    if d is not None:  # not in place: one tensor may be the gradient of two
                        dparameters[i] = d if dparameters[i] is None else dparameters[i] + d
        finally:
            call.set_random_state(random_state)
        dinputs = iter(dinputs)
        return None, *(next(dinputs) if need else None for need in needs), *dparameters


def _gradients(outputs, grads, part: slice, learned: list[Tensor]) -> Iterator[Tensor | None]:
    """Of each of `learned`, from this part of the outputs' gradients."""
    first = part.start == 0
    pairs = [
        (y, _cut(g, part))
        for y, g in zip(outputs, grads, strict=True)
        if g is not None and y.requires_grad and (y.dim() or first)
    ]
    if not pairs:
        return iter([None] * len(learned))
    outputs, grads = zip(*pairs, strict=True)
    if first:
        _refuse_strangers(outputs, learned)
    return iter(torch.autograd.grad(outputs, learned, grads, allow_unused=True))


def _refuse_strangers(outputs: tuple[Tensor, ...], learned: list[Tensor]) -> None:
    """A leaf of the graph that the node does not know would silently get no gradient."""
    known = {id(x) for x in learned}
    todo, seen = [torch.autograd.graph.get_gradient_edge(y).node for y in outputs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            raise RuntimeError(
                f"GradCache: a tensor {tuple(node.variable.shape)} in the encoder requires a "
                "gradient but is neither an argument nor a parameter of its module. Pass it as an "
                "argument, or name its owner with module=. FSDP is not supported."
            )


def _cut(x: Tensor, part: slice) -> Tensor:
    return x[part] if x.dim() else x


def _rows(tensors: list[Tensor]) -> int:
    rows = {x.shape[0] for x in tensors if x.dim()}
    if len(rows) != 1:
        raise ValueError(
            "GradCache: the arguments must hold tensors with one number of rows, got "
            f"{[tuple(x.shape) for x in tensors]}."
        )
    return rows.pop()


def _join(column: tuple, parts: list[slice]) -> Any:
    """One output of all chunks as one."""
    if not isinstance(column[0], Tensor) or not column[0].dim():
        return column[0]
    for y, part in zip(column, parts, strict=True):
        if not y.dim() or y.shape[0] != part.stop - part.start:
            raise ValueError(
                "GradCache: encoder must return one row for each of its arguments', got "
                f"{tuple(y.shape)} for a chunk of {part.stop - part.start}."
            )
    return torch.cat(column)
