"""What autograd Functions share."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class Refused(torch.autograd.Function):
    """The first n tensors as they are; to differentiate them by any of the tensors is an error."""

    @staticmethod
    def forward(ctx, message, n, *tensors):
        ctx.message = message
        return tuple(x.detach() for x in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def once_differentiable(backward):
    """As torch's, but a second derivative fails also where the upstream gradient needs no gradient,
    as that of a loss: torch's leaves it out there without a word."""

    @functools.wraps(backward)
    def run(ctx, *upstream):
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # Before the backward: one in place may overwrite what is saved.
        sources = [*upstream, *ctx.saved_tensors] if twice else []
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not twice:
            return grads
        sources = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
        alone = isinstance(grads, Tensor)
        grads = [grads] if alone else [*grads]
        places = [i for i, grad in enumerate(grads) if grad is not None]
        name = getattr(ctx, "function", type(ctx).__name__.removesuffix("Backward"))
        message = (
            f"fastssl: {name} is differentiable once. "
            "Leave out create_graph=True, or take plain torch for a second derivative."
        )
        given = [grads[i] for i in places]
        for i, grad in zip(
            places, Refused.apply(message, len(given), *given, *sources), strict=True
        ):
            grads[i] = grad
        return grads[0] if alone else tuple(grads)

    return run


class WithGradient(torch.autograd.Function):
    """A loss whose gradients are made already: all that is left to autograd is one node, and one
    multiplication for each. For small inputs, whose calls cost more than their arithmetic.

    tensors: what the gradients are by, and in the same order these, in at least fp32, or None. A
    loss scale reaches them before they are rounded to the dtype of what they are by.
    """

    @staticmethod
    def forward(ctx, name: str, loss: Tensor, *tensors: Tensor | None):
        ctx.function = name
        ctx.save_for_backward(*tensors)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        n = len(ctx.saved_tensors) // 2
        inputs, made = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        scaled = iter(torch._foreach_mul([grad for grad in made if grad is not None], dloss))
        grads = [None if grad is None else next(scaled) for grad in made]
        for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
            if grad is not None and grad.dtype != x.dtype:
                grads[i] = grad.to(x.dtype)
        return None, None, *grads, *[None] * n


def with_gradient(name: str, made: Callable, inputs: tuple[Tensor, ...], *options) -> Tensor:
    """The loss that made(*inputs, *options, needs) gives along with its gradients by the inputs,
    None for those whose place in `needs` is False."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    with torch.no_grad():
        loss, *grads = made(*inputs, *options, needs)
    return WithGradient.apply(name, loss, *inputs, *grads) if any(needs) else loss
