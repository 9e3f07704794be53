"""What autograd Functions share."""

import functools

import torch
from torch import Tensor


def once_differentiable(backward):
    """As torch's, but what is differentiated twice fails also where the upstream gradient needs no
    gradient, as that of a loss: torch's drops the second derivative there without a word."""

    @functools.wraps(backward)
    def run(ctx, *upstream):
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return grads
        message = f"fastssl: {type(ctx).__name__.removesuffix('Backward')} is differentiable once."
        message += " Leave out create_graph=True, or take plain torch for a second derivative."
        alone = isinstance(grads, Tensor)
        grads = [grads] if alone else [*grads]
        places = [i for i, grad in enumerate(grads) if grad is not None]
        refuse = torch._C._functions.DelayedError(message.encode(), len(places))
        refused = refuse(*[grads[i].detach().requires_grad_() for i in places])
        for i, grad in zip(places, [refused] if len(places) == 1 else refused, strict=True):
            grads[i] = grad
        return grads[0] if alone else tuple(grads)

    return run
