"""The optimizers: arguments as torch.optim has them, and what each rule's columns hold."""

from typing import Any

import torch
from torch import Tensor

from fastssl.ops.blockwise import (
    ADAPT,
    COMPLEMENT1,
    COMPLEMENT2,
    COMPLEMENT3,
    CORRECTION1,
    CORRECTION2,
    DECAY,
    EPS,
    EXTRA,
    LR,
    MOMENTUM,
    MOST,
)

from .blockwise import RANGES, Blockwise


def _complements(group: dict[str, Any]) -> dict[int, float]:
    columns = (COMPLEMENT1, COMPLEMENT2, COMPLEMENT3)
    return {column: 1 - beta for column, beta in zip(columns, group["betas"], strict=False)}


def _adam_row(group: dict[str, Any]) -> dict[int, float]:
    return _complements(group) | {EPS: group["eps"]}


def _adam_timed(h: Tensor, t: Tensor) -> None:
    for complement, correction in ((COMPLEMENT1, CORRECTION1), (COMPLEMENT2, CORRECTION2)):
        h[:, correction] = 1 - (1 - h[:, complement]) ** t


class Adam8bit(Blockwise):
    """Adam with states of 8 bits; weight decay is added to the gradient, as torch.optim.Adam's.

        g = g + weight_decay p,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element. betas, eps: as above.
        weight_decay: of the formula; bitsandbytes' Adam8bit decays as AdamW8bit does.
        amsgrad: must be False. options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 2.03 bytes a parameter; no temporary of a parameter's size.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> Adam8bit([p], lr=0.1).step()

    Paper: Kingma and Ba, arXiv 1412.6980; 8 bits: Dettmers et al., arXiv 2110.02861.
    """

    rule = "adam"
    torch_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, amsgrad=amsgrad, **options)

    def row(self, group):
        return _adam_row(group)

    def timed(self, h, t):
        _adam_timed(h, t)


class AdamW8bit(Adam8bit):
    """AdamW with states of 8 bits: decay apart from the gradient and before the update.

        p = p - lr weight_decay p,  then Adam's step without decay

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas, eps, weight_decay: as in `Adam8bit`'s formula and this one.
        amsgrad: must be False. options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 2.03 bytes a parameter; no temporary of a parameter's size.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> AdamW8bit([p], lr=0.1, max_grad_norm=1.0).step()

    Paper: Loshchilov and Hutter, arXiv 1711.05101; 8 bits: Dettmers et al., arXiv 2110.02861.
    """

    rule = "adamw"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class AdEMAMix8bit(Blockwise):
    """AdamW with a second, slow momentum, so that old gradients count too; states of 8 bits.

        m1 = beta1 m1 + (1 - beta1) g,  m2 = beta3' m2 + (1 - beta3') g,
        v = beta2 v + (1 - beta2) g^2,
        u = (m1 / (1 - beta1^t) + alpha' m2) / (sqrt(v / (1 - beta2^t)) + eps),
        p = p - lr (u + weight_decay p)

    with alpha' = alpha min(t / t_alpha, 1), and beta3' from beta1 at step 0 to beta3 at t_beta3 so
    that the time in which m2 forgets half, 1 / log beta3', grows linearly.

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: beta1, beta2, beta3, each in [0, 1).
        alpha: weight of the slow momentum, >= 0; the paper's 4 to 10.
        t_alpha, t_beta3: steps of the two warm-ups, 0 or None for none; the paper takes all steps
            of the training for both.
        eps, weight_decay: as above. options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 3.05 bytes a parameter, 12 with optim_bits=32; no temporary of a parameter's size.

    Notes: m1 and m2 are one state of shape (2, *p.shape), as in bitsandbytes; m2 begins a block of
    its own. In 8 bits a change of m2 below half the distance of two codes is lost: with random
    gradients and beta3 = 0.9999 it was 11 to 23 % off after 1000 steps, 33 to 46 % after 4000.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> AdEMAMix8bit([p], lr=0.1, t_alpha=1000, t_beta3=1000).step()

    Paper: Pagliardini et al., "The AdEMAMix optimizer", arXiv 2409.03137; 8 bits: Dettmers et al.,
    arXiv 2110.02861.
    """

    rule = "ademamix"
    torch_names = ("exp_avg", "exp_avg_sq")
    slow_name = "exp_avg_slow"
    ranges = RANGES | {
        "betas": ("three, in [0, 1)", lambda x: len(x) == 3 and all(0 <= b < 1 for b in x)),
        "alpha": (">= 0", lambda x: x >= 0),
        "t_alpha": (">= 0 or None", lambda x: x is None or x >= 0),
        "t_beta3": (">= 0 or None", lambda x: x is None or x >= 0),
    }

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options,
    ):
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha}
        defaults |= {"t_beta3": t_beta3, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def row(self, group):
        # The warm-ups' lengths stand where `timed` puts the corrections.
        warm_ups = {CORRECTION1: group["t_alpha"] or 0, CORRECTION2: group["t_beta3"] or 0}
        return _adam_row(group) | warm_ups | {EXTRA: group["alpha"]}

    def timed(self, h, t):
        h[:, EXTRA] *= (t / h[:, CORRECTION1]).clamp(max=1)
        done = (t / h[:, CORRECTION2]).clamp(max=1)
        log1, log3 = (torch.log1p(-h[:, column]) for column in (COMPLEMENT1, COMPLEMENT3))
        warm = -torch.expm1(1 / ((1 - done) / log1 + done / log3))
        h[:, COMPLEMENT3] = torch.maximum(warm, h[:, COMPLEMENT3])
        _adam_timed(h, t)


class SGD8bit(Blockwise):
    """SGD with a momentum of 8 bits.

        g = g + weight_decay p,  m = momentum m + (1 - dampening) g (first m = g),
        p = p - lr m,  or with nesterov  p = p - lr (g + momentum m)

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: in [0, 1); 0 keeps no state. dampening, weight_decay, nesterov: as above.
        options: those of `Blockwise`.

    Raises: as `Blockwise`; ValueError: nesterov without momentum or with dampening.

    Memory: 1.02 bytes a parameter; no temporary of a parameter's size.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> SGD8bit([p], lr=0.1, momentum=0.9).step()

    Paper: 8 bits: Dettmers et al., arXiv 2110.02861.
    """

    rule = "sgd"
    torch_names = ("momentum_buffer", None)
    bnb_betas = ("momentum",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options,
    ):
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"{type(self).__name__}: nesterov needs momentum > 0 and dampening 0, got "
                f"momentum={momentum}, dampening={dampening}."
            )
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, **options)

    def rule_of(self, group):
        return "nesterov" if group["nesterov"] else "sgd"

    def has_states(self, group):
        return group["momentum"] != 0, False

    def row(self, group):
        dampening = group["dampening"] if group["momentum"] else 0.0
        return {MOMENTUM: group["momentum"], COMPLEMENT1: 1 - dampening}

    def timed(self, h, t):
        h[:, COMPLEMENT1].masked_fill_(t <= 1, 1.0)


class RMSprop8bit(Blockwise):
    """RMSprop with states of 8 bits.

        g = g + weight_decay p,  v = alpha v + (1 - alpha) g^2,
        m = momentum m + g / (sqrt(v) + eps),  p = p - lr m

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        alpha, eps, weight_decay, momentum: as above; momentum 0 keeps no m.
        centered: must be False. options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 1.02 bytes a parameter, 2.03 with momentum; no temporary of a parameter's size.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> RMSprop8bit([p], lr=0.1).step()

    Paper: the formula is torch.optim.RMSprop's; 8 bits: Dettmers et al., arXiv 2110.02861.
    """

    rule = "rmsprop"
    torch_names = ("momentum_buffer", "square_avg")
    bnb_betas = ("alpha", "momentum")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options,
    ):
        if centered:
            raise ValueError(
                f"{type(self).__name__}: centered=True is not supported. Use torch.optim.RMSprop: "
                "it would need a third state."
            )
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"momentum": momentum}, **options)

    def has_states(self, group):
        return group["momentum"] != 0, True

    def row(self, group):
        return {MOMENTUM: group["momentum"], COMPLEMENT2: 1 - group["alpha"], EPS: group["eps"]}


class Adagrad8bit(Blockwise):
    """Adagrad with a state of 8 bits.

        g = g + weight_decay p,  v = v + g^2,
        p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        lr_decay, weight_decay, eps: as above. initial_accumulator_value: the first v.
        options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 1.02 bytes a parameter; no temporary of a parameter's size.

    Notes: v only grows, and in 8 bits not by less than half a code's distance, 0.4 % of the block's
    largest element: use state_format="sqrt" or 32 bits for long runs.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> Adagrad8bit([p], lr=0.1).step()

    Paper: Duchi et al., JMLR 12 (2011); 8 bits: Dettmers et al., arXiv 2110.02861.
    """

    rule = "adagrad"
    torch_names = (None, "sum")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options,
    ):
        defaults = {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay}
        defaults["initial_accumulator_value"] = initial_accumulator_value
        super().__init__(params, defaults, **options)

    def row(self, group):
        return {EPS: group["eps"], EXTRA: group["lr_decay"]}

    def timed(self, h, t):
        h[:, LR] /= 1 + (t - 1) * h[:, EXTRA]


class Lion(Blockwise):
    """Lion: the sign of a mean of gradients, decay apart from it.

        p = p - lr weight_decay p,  p = p - lr sign(beta1 m + (1 - beta1) g),
        m = beta2 m + (1 - beta2) g

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups.
        lr: learning rate, a number or a tensor of one element; a third to a tenth of AdamW's.
        betas: as above. weight_decay: three to ten times AdamW's.
        options: those of `Blockwise`.

    Raises: as `Blockwise`.

    Memory: 4 bytes a parameter (`Lion8bit`: 1.02); no temporary of a parameter's size.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(8192))
        >>> p.grad = torch.ones(8192)
        >>> Lion([p], lr=1e-4).step()

    Paper: Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675.
    """

    rule = "lion"
    bits = 32
    torch_names = ("exp_avg", None)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options
        )

    def row(self, group):
        return _complements(group)


class Lion8bit(Lion):
    """`Lion` with a momentum of 8 bits (arXiv 2110.02861): 1.02 bytes a parameter."""

    bits = 8


class LARS(Blockwise):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    For tensors with at least two dimensions

        d = g + weight_decay w,   r = eta |w| / |d| (1 if a norm is zero),
        mu = momentum mu + r d,   w = w - lr mu;

    the others (biases, scales of normalisations) take plain momentum: r = 1 and no decay.

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups; a
            group's "adapt", True or False, overrides the rule of two dimensions.
        lr: learning rate; large, because eta scales it: the paper's rule is 0.3 B / 256.
        momentum: in [0, 1).
        weight_decay: added to the gradient.
        eta: trust coefficient. clip: limit r to at most 1, as small-data recipes with eta 0.02 do.
        options: those of `Blockwise`.

    Raises: as `Blockwise`; ValueError: shards of a tensor that is to be adapted.

    Memory: 4 bytes a parameter (`LARS8bit`: 1.02); no temporary of a parameter's size.

    Notes: no host synchronisation; squares for norms are fp32, their sums over blocks fp64. The
    learning rate is outside the momentum buffer, which differs from SimCLR's release only while the
    rate changes.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(128, 64))
        >>> w.grad = torch.ones(128, 64)
        >>> LARS([w], lr=1.0).step()

    Paper: You et al., "Large batch training of convolutional networks", arXiv 1708.03888.
    """

    rule = "lars"
    bits = 32
    torch_names = ("momentum", None)
    bnb_betas = ("momentum",)

    def __init__(
        self,
        params,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        clip: bool = False,
        **options,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, defaults | {"clip": clip}, **options)

    def row(self, group):
        most = {MOST: 1.0} if group["clip"] else {}
        return {MOMENTUM: group["momentum"], EXTRA: group["eta"], **most}

    def timed(self, h, t):
        h[:, DECAY] *= h[:, ADAPT]


class LARS8bit(LARS):
    """`LARS` with a momentum of 8 bits (arXiv 2110.02861): 1.02 bytes a parameter."""

    bits = 8


class LAMB(Blockwise):
    """Adam whose step is scaled, tensor by tensor, to the size of the weights.

        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p,
        r = |p| / |u| (1 if a norm is zero, or the tensor has fewer than two dimensions),
        p = p - lr r u

    Args:
        params: float32, bfloat16 or float16 tensors of any dense layout, or parameter groups; a
            group's "adapt", True or False, overrides the rule of two dimensions.
        lr: learning rate, a number or a tensor of one element.
        betas, eps, weight_decay: as above; m and v are Adam's.
        options: those of `Blockwise`.

    Raises: as `Blockwise`; ValueError: shards of a tensor that is to be adapted.

    Memory: 8 bytes a parameter (`LAMB8bit`: 2.03); no temporary of a parameter's size.

    Notes: squares for norms are fp32, their sums over blocks fp64. Gradients are not normalised
    before: set max_grad_norm=1.0 for the release's behaviour.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(128, 64))
        >>> w.grad = torch.ones(128, 64)
        >>> LAMB([w], lr=1e-2).step()

    Paper: You et al., "Large batch optimization for deep learning", arXiv 1904.00962.
    """

    rule = "lamb"
    bits = 32
    torch_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **options,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def row(self, group):
        return _adam_row(group)

    def timed(self, h, t):
        _adam_timed(h, t)


class LAMB8bit(LAMB):
    """`LAMB` with states of 8 bits (arXiv 2110.02861): 2.03 bytes a parameter."""

    bits = 8
