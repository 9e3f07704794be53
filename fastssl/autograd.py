"""What autograd Functions share."""

import functools

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
        message = (
            f"fastssl: {type(ctx).__name__.removesuffix('Backward')} is differentiable once. "
            "Leave out create_graph=True, or take plain torch for a second derivative."
        )
        given = [grads[i] for i in places]
        for i, grad in zip(
            places, Refused.apply(message, len(given), *given, *sources), strict=True
        ):
            grads[i] = grad
        return grads[0] if alone else tuple(grads)

    return run
