"""lightly's losses over prototypes: their arguments, names, defaults and values.

All three are `fastssl.ops.prototype_cross_entropy`, whose teacher is softmax(scores / T + bias):
SwAV's bias is that of Sinkhorn-Knopp, DINO's and iBOT's is -centre / T.
"""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastssl.dist import all_sum, resolve_levels
from fastssl.losses.ranks import check_group, check_initialized, described, group_of
from fastssl.ops import prototype_cross_entropy, sinkhorn, sinkhorn_bias


def power_law_marginal(K: int, exponent: float) -> Tensor:
    """(K,) shares of the mass r_k ~ (k + 1)^-exponent, as SEER's `shk_powerlaw`; their sum is 1.

    Example:
        >>> power_law_marginal(3, exponent=1)
        tensor([0.5455, 0.2727, 0.1818])
    """
    shares = torch.arange(1, K + 1, dtype=torch.float32) ** -exponent
    return shares / shares.sum()


class EvenlySpaced(torch.autograd.Function):
    """torch.stack without a copy, of tensors at one distance from each other in one storage."""

    @staticmethod
    def forward(ctx, distance, *crops):
        first = crops[0].detach()
        return first.as_strided((len(crops), *first.shape), (distance, *first.stride()))

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return None, *d.unbind()


def _distance(crops: Sequence[Tensor]) -> int:
    """Between the beginnings of each two neighbours; 0 where it is not the same."""
    storages = {(x.untyped_storage().data_ptr(), x.dtype, x.stride()) for x in crops}
    places = [x.storage_offset() for x in crops]
    distances = {b - a for a, b in zip(places, places[1:], strict=False)}
    return max(*distances, 0) if len(storages) == len(distances) == 1 else 0


def stacked(name: str, label: str, crops: Sequence[Tensor] | Tensor) -> Tensor:
    """(crops, B, K) of a list of (B, K), without a copy where they are parts of such a tensor."""
    if isinstance(crops, Tensor) and crops.dim() == 3:
        return crops
    crops = crops if isinstance(crops, Tensor) else tuple(crops)  # a generator gives them once
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in crops]
    if not shapes or isinstance(crops, Tensor) or len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            f"{name}: {label} must be tensors (B, K) of one shape, one for each crop, got "
            f"{shapes if shapes else 'none'}. Give a list, or one tensor (crops, B, K)."
        )
    distance = 0 if torch.compiler.is_compiling() else _distance(crops)
    return EvenlySpaced.apply(distance, *crops) if distance else torch.stack(crops)


def temperature_of(name: str, label: str, value: float | Tensor) -> float:
    """A Python number; of numpy's, or of a tensor () on the CPU, as well."""
    if isinstance(value, Tensor) and not value.dim() and value.device.type == "cpu":
        value = value.item()
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(
            f"{name}: {label} must be a positive number, or a CPU tensor () of one, got {value!r}. "
            "Typical: 0.1 for students, 0.04 to 0.07 for teachers."
        )
    return float(value)


def check_centering(name: str, center_mode: str, centering: str) -> None:
    if center_mode != "mean":
        raise ValueError(f'{name}: center_mode must be "mean", got {center_mode!r}.')
    if centering not in ("mean", "sinkhorn", "none"):
        raise ValueError(
            f'{name}: centering must be "mean", "sinkhorn" or "none", got {centering!r}.'
        )


def bias_of(loss: nn.Module, center: Tensor, scores: Tensor, temperature: float) -> Tensor | None:
    """The bias (K,) of a teacher with these scores (.., K), by `loss.centering`."""
    if loss.centering == "none":
        return None
    if loss.centering == "sinkhorn":
        return sinkhorn_bias(scores.flatten(0, -2), temperature, loss.n_iters, group=loss.group)
    return center_bias(type(loss).__name__, center, scores, temperature)


def center_bias(name: str, center: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """(K,): with it softmax(scores / T + bias) = softmax((scores - center) / T)."""
    if scores.shape[-1] != center.numel():
        raise ValueError(
            f"{name}: the teacher's scores must have as many columns as the loss has prototypes, "
            f"{center.numel()}, got {tuple(scores.shape)}."
        )
    return -center.flatten() / temperature


@torch.no_grad()
def move_center(name: str, center: Tensor, scores: Tensor, momentum: float, group) -> None:
    """center (.., K) becomes m center + (1 - m) mean of all ranks' scores (.., K), if any."""
    rows = scores.flatten(0, -2)
    sums = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    sums = torch.cat([sums, sums.new_full((1,), len(rows))])
    sums = all_sum(sums, resolve_levels(name, group))
    mean = (sums[:-1] / sums[-1]).view_as(center).to(center)
    mean = torch.where(sums[-1] > 0, mean, center)
    center.mul_(momentum).add_(mean, alpha=1 - momentum)


def weight_of_image(name: str, mask: Tensor, rows: int) -> Tensor:
    """(rows,): 1 / masked tokens of a masked token's image, for mask (images, ...) of booleans."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2:
        got = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
        raise TypeError(f"{name}: mask must be a bool tensor (images, tokens..), got {got}.")
    counts = mask.flatten(1).sum(1)
    total = counts.sum()
    # Elsewhere looking at it would stall a GPU: there the loss is NaN.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and int(total) != rows:
        raise ValueError(
            f"{name}: mask must have one True for each of the {rows} rows of scores, "
            f"got {int(total)}. Give the scores of the masked tokens only."
        )
    place = torch.arange(rows, device=mask.device)
    image = torch.searchsorted(counts.cumsum(0), place, right=True)
    weight = (1 / counts)[image.clamp(max=len(mask) - 1)]
    return torch.where(total == rows, weight, torch.nan)


def never_empty(*rows: Tensor) -> tuple[Tensor, ...]:
    """Scores (N, K) and weights (N,), or a row of zeros for each where N = 0.

    It has no weight, and keeps the graph: the ops refuse a batch that is empty on all ranks, and
    no rank knows of the others' rows.
    """
    if any(map(len, rows)):
        return rows
    return tuple(torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in rows)


def mean_of_images(loss: nn.Module, total: Tensor, images: int) -> Tensor:
    """total, which is the sum over all ranks, by the images of all ranks."""
    count = torch.full_like(total.detach(), images)
    return total / all_sum(count, resolve_levels(type(loss).__name__, loss.group)).clamp(min=1)


class SwaVLoss(nn.Module):
    """Swapped prediction of Sinkhorn-Knopp codes; drop-in for lightly's SwaVLoss.

    loss = mean over the pairs i != v of H(q_i, softmax(s_v / temperature)), i a high-resolution
    crop and v any, q_i = softmax(s_i / epsilon + l_i), l_i the bias of Sinkhorn-Knopp.

    Args:
        temperature: > 0, of the predictions.
        sinkhorn_iterations: >= 0; 0 is a plain softmax, where lightly's codes do not sum to 1.
        sinkhorn_epsilon: > 0, the regularisation.
        sinkhorn_gather_distributed: False: group=LOCAL. True: an error, not silently the codes of
            one process, where torch.distributed is not initialised.
        joint: one Sinkhorn problem of all high-resolution crops, not one of each. Ours.
        hard: codes of 1 at the most likely prototype and 0 elsewhere. Ours.
        marginal: (K,) the prototypes' shares of the mass, as in `fastssl.ops.sinkhorn_bias`, such
            as `power_law_marginal`; None: equal ones. Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.sinkhorn_bias`. Ours.

    Shapes: high_resolution_outputs, low_resolution_outputs: lists of scores (B, K), the second may
        be empty; queue_outputs: for each high-resolution crop (Q, K), of one Q for all, which take
        part in the balance only. Each also as one tensor with the crops first. Returns a float32
        scalar.

    Raises:
        ValueError: crops of different shape, one crop, another number of queues than of
            high-resolution crops, a sinkhorn_gather_distributed that contradicts group; and as
            `fastssl.ops.sinkhorn_bias`, `fastssl.ops.prototype_cross_entropy`.

    Memory: one copy of the scores of lists, in their dtype, unless they are parts of one tensor;
        no codes but hard ones.

    Notes: over several ranks the codes are balanced over the rows of all, and the value is the mean
        of these; lightly's codes are by default those of a rank's own rows, as here with
        group=fastssl.LOCAL, and its value is always theirs. lightly returns a tensor of shape (1,).
        Scores of any size are safe, where lightly's exponentials overflow from 88 epsilon on.

    Example:
        >>> high, low = torch.randn(2, 8, 30).unbind(), torch.randn(6, 8, 30).unbind()
        >>> SwaVLoss()(high, low).shape
        torch.Size([])

    Paper: SwAV, arXiv:2006.09882; marginals and hard codes: SEER, arXiv:2103.01988.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool | None = None,
        *,
        joint: bool = False,
        hard: bool = False,
        marginal: Tensor | None = None,
        group=None,
    ):
        super().__init__()
        label = "sinkhorn_gather_distributed"
        self.group = group_of("SwaVLoss", sinkhorn_gather_distributed, group, label=label)
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed
        self.temperature = temperature_of("SwaVLoss", "temperature", temperature)
        self.sinkhorn_epsilon = temperature_of("SwaVLoss", "sinkhorn_epsilon", sinkhorn_epsilon)
        self.sinkhorn_iterations, self.joint, self.hard = sinkhorn_iterations, joint, hard
        self.register_buffer("marginal", marginal, persistent=False)  # lightly saves nothing

    def extra_repr(self) -> str:
        text = (
            f"temperature={self.temperature}, sinkhorn_iterations={self.sinkhorn_iterations}, "
            f"sinkhorn_epsilon={self.sinkhorn_epsilon}"
        )
        text += ", joint=True" * self.joint + ", hard=True" * self.hard
        return described(text, self.group)

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        label = "sinkhorn_gather_distributed"
        check_initialized("SwaVLoss", self.sinkhorn_gather_distributed, label)
        A, V = len(high_resolution_outputs), len(low_resolution_outputs)
        if not A or A + V < 2:
            raise ValueError(
                "SwaVLoss: there must be a high-resolution crop and another one, got "
                f"{A} of high and {V} of low resolution."
            )
        student = stacked("SwaVLoss", "crops", [*high_resolution_outputs, *low_resolution_outputs])
        teacher, queue = student[:A].detach(), None
        if queue_outputs is not None:
            if len(queue_outputs) != A:
                raise ValueError(
                    f"SwaVLoss: queue_outputs must be one for each of the {A} high-resolution "
                    f"crops, got {len(queue_outputs)}."
                )
            queue = stacked("SwaVLoss", "queue_outputs", queue_outputs)
        scores, epsilon, bias = teacher, self.sinkhorn_epsilon, None
        if self.joint:
            scores, queue = teacher.flatten(0, 1), None if queue is None else queue.flatten(0, 1)
        problem = {
            "epsilon": epsilon, "n_iters": self.sinkhorn_iterations, "marginal": self.marginal,
            "queue_scores": queue, "group": self.group,
        }  # fmt: skip
        if self.hard:  # the softmax of 0 and 1 at this temperature is 0 and 1
            teacher, epsilon = sinkhorn(scores, hard=True, **problem).view_as(teacher), 2.0**-10
        else:
            bias = sinkhorn_bias(scores, **problem)
        return prototype_cross_entropy(
            student, teacher, bias=bias, student_temperature=self.temperature,
            teacher_temperature=epsilon, ignore_diagonal=True, group=self.group,
        )  # fmt: skip


class DINOLoss(nn.Module):
    """Cross-entropy of a centred, sharpened teacher with a student; drop-in for lightly's DINOLoss.

    loss = mean over the pairs t != s of H(softmax((x_t - c) / T_t), softmax(y_s / T_s)), after
    which c becomes m c + (1 - m) mean x.

    Args:
        output_dim: K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: T_t, which with `epoch` goes
            from the first to the second over so many epochs.
        student_temp: T_s > 0.
        center_momentum: m.
        center_mode: "mean".
        centering: "mean", as above; "sinkhorn": DINOv2's, one Sinkhorn-Knopp problem of all
            teacher crops, in place of the centre; "none". Ours.
        n_iters: of "sinkhorn". Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.prototype_cross_entropy`. Ours.

    Shapes: teacher_out, student_out: lists of scores (B, K), crops of the same images at the same
        place of both, or tensors (crops, B, K). teacher_temp in `forward`: T_t of this call.
        Returns a float32 scalar.

    Buffer: center (1, 1, K), as lightly's, in the state dict; `update_center(teacher_out)` moves
        it, as `forward` does. `teacher_temp_schedule` is a tensor of the warm-up's T_t.

    Raises:
        ValueError: crops of different shape, one crop, a width that is not K, another centering;
            and as `fastssl.ops.prototype_cross_entropy`.

    Memory: one copy of the scores of a list, in their dtype, unless they are parts of one tensor;
        no probabilities.

    Notes: over several ranks the value and the centre are means over the rows of all; lightly's
        value is that of a rank's own rows, and its centre weighs ranks, not rows, equally.

    Example:
        >>> teacher, student = torch.randn(2, 8, 30).unbind(), torch.randn(6, 8, 30).unbind()
        >>> DINOLoss(output_dim=30)(teacher, student, epoch=0).shape
        torch.Size([])

    Paper: DINO, arXiv:2104.14294; Sinkhorn in place of the centre: DINOv2, arXiv:2304.07193.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        centering: str = "mean",
        n_iters: int = 3,
        group=None,
    ):
        super().__init__()
        check_centering("DINOLoss", center_mode, centering)
        check_group("DINOLoss", group)
        self.teacher_temp = temperature_of("DINOLoss", "teacher_temp", teacher_temp)
        self.student_temp = temperature_of("DINOLoss", "student_temp", student_temp)
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        first, steps = float(warmup_teacher_temp), max(warmup_teacher_temp_epochs - 1, 1)
        slope = (self.teacher_temp - first) / steps
        # Numbers, not a tensor: there is nothing to read on meta or fake devices.
        self._warmup = [first + epoch * slope for epoch in range(warmup_teacher_temp_epochs)]
        self.center_momentum, self.centering = center_momentum, centering
        self.n_iters, self.group = n_iters, group
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def extra_repr(self) -> str:
        text = f"{self.center.numel()}, teacher_temp={self.teacher_temp}"
        text += f", student_temp={self.student_temp}, centering={self.centering!r}"
        return described(text, self.group)

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        teacher = stacked("DINOLoss", "teacher_out", teacher_out).detach()
        student = stacked("DINOLoss", "student_out", student_out)
        if len(teacher) == len(student) == 1:
            raise ValueError(
                "DINOLoss: there must be two crops, got one, which is not compared with itself."
            )
        if teacher_temp is None:
            warming_up = epoch is not None and epoch < len(self._warmup)
            teacher_temp = self._warmup[epoch] if warming_up else self.teacher_temp
        teacher_temp = temperature_of("DINOLoss", "teacher_temp", teacher_temp)
        bias = bias_of(self, self.center, teacher, teacher_temp)
        loss = prototype_cross_entropy(
            student, teacher, bias=bias, student_temperature=self.student_temp,
            teacher_temperature=teacher_temp, ignore_diagonal=True, group=self.group,
        )  # fmt: skip
        if self.centering == "mean":
            self.update_center(teacher)
        return loss

    def update_center(self, teacher_out: Tensor) -> None:
        """For scores (crops, B, K) of the teacher; `forward` does it by itself."""
        move_center("DINOLoss", self.center, teacher_out, self.center_momentum, self.group)

    @property
    def teacher_temp_schedule(self) -> Tensor:
        """(warmup_teacher_temp_epochs,)"""
        return torch.tensor(self._warmup, dtype=torch.float32)


class Center(nn.Module):
    """A centre in a module of its own, where lightly's checkpoints have it: `center.center`."""

    def __init__(self, K: int, momentum: float, group):
        super().__init__()
        self.momentum, self.group = momentum, group
        self.register_buffer("center", torch.zeros(1, K))

    @property
    def value(self) -> Tensor:
        return self.center

    def update(self, x: Tensor) -> None:
        """For scores (N, K) of the teacher."""
        move_center("IBOTPatchLoss", self.center, x, self.momentum, self.group)


class IBOTPatchLoss(nn.Module):
    """DINO's loss of masked tokens, averaged by image; drop-in for lightly's IBOTPatchLoss.

    loss = 1 / images sum_i 1 / n(i) H(softmax((x_i - c) / T_t), softmax(y_i / T_s)), i over masked
    tokens, n(i) how many the image of i has; after which c becomes m c + (1 - m) mean x.

    Args:
        output_dim: K.
        teacher_temp, student_temp: T_t, T_s > 0.
        center_mode: "mean".
        center_momentum: m.
        centering: "mean", as above; "sinkhorn": one Sinkhorn-Knopp problem of all masked tokens,
            as DINOv2; "none". Ours.
        n_iters: of "sinkhorn". Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.prototype_cross_entropy`. Ours.

    Shapes: teacher_out, student_out (N, K), scores of the masked tokens image by image; mask
        (images, height, width) bool with N entries True. teacher_temp in `forward`: T_t of this
        call. Returns a float32 scalar.

    Buffer: center.center (1, K), as lightly's, in the state dict; also center.value, and
        `center.update(scores)` moves it, as `forward` does.

    Raises:
        TypeError, ValueError: a mask that is not boolean or, on a CPU, has not N entries True
            (elsewhere the loss is NaN), a width that is not K, another centering; and
            as `fastssl.ops.prototype_cross_entropy`.

    Memory: O(N) and the gradient; no probabilities.

    Notes: without a masked token the loss is 0, and the centre stays. Over several ranks the value
        is the mean over the images of all, and the centre over the tokens of all; lightly's value
        is that of a rank's own images, and its centre weighs ranks equally, whatever number of
        tokens they have.

    Example:
        >>> mask = torch.rand(4, 7, 7) < 0.4
        >>> teacher, student = torch.randn(2, int(mask.sum()), 30).unbind()
        >>> IBOTPatchLoss(output_dim=30)(teacher, student, mask).shape
        torch.Size([])

    Paper: iBOT, arXiv:2111.07832; Sinkhorn in place of the centre: DINOv2, arXiv:2304.07193.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        centering: str = "mean",
        n_iters: int = 3,
        group=None,
    ):
        super().__init__()
        check_centering("IBOTPatchLoss", center_mode, centering)
        check_group("IBOTPatchLoss", group)
        self.teacher_temp = temperature_of("IBOTPatchLoss", "teacher_temp", teacher_temp)
        self.student_temp = temperature_of("IBOTPatchLoss", "student_temp", student_temp)
        self.centering, self.n_iters, self.group = centering, n_iters, group
        self.center = Center(output_dim, center_momentum, group)

    def extra_repr(self) -> str:
        text = f"{self.center.center.numel()}, teacher_temp={self.teacher_temp}"
        text += f", student_temp={self.student_temp}, centering={self.centering!r}"
        return described(text, self.group)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        temperature = temperature_of("IBOTPatchLoss", "teacher_temp", temperature)
        weight = weight_of_image("IBOTPatchLoss", mask, len(teacher_out))
        bias = bias_of(self, self.center.center, teacher_out, temperature)
        student, teacher, weight = never_empty(student_out, teacher_out, weight)
        total = prototype_cross_entropy(
            student, teacher, bias=bias, student_temperature=self.student_temp,
            teacher_temperature=temperature, sample_weight=weight, reduction="sum",
            group=self.group,
        )  # fmt: skip
        if self.centering == "mean":
            self.center.update(teacher_out)
        return mean_of_images(self, total, len(mask))
