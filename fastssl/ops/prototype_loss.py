"""Cross-entropy of a teacher's assignment to prototypes with a student's: DINO, iBOT, SwAV.

With x_tb = teacher / T_t + bias and y_sb = student / T_s over K prototypes, q_t = softmax_k(x_tb):
loss_sb = sum_t [LSE_k(y_sb) - sum_k q_tbk y_sbk], dy_sb = n_s softmax(y_sb) - sum_t q_tb,
t over the n_s teachers that student s is compared with. Both are linear in q, so the teachers'
weights are summed before a student's row is read; they are made in blocks and never stored.
"""

import functools
import math

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import Shards, agree, resolve_levels
from fastssl.ops.checks import check_floating, check_reduction, reduced, slope_of_row
from fastssl.ops.contrastive import lib, on_cuda, without_autocast


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _logits(scores: Tensor, scale: float, bias: Tensor | None, dtype) -> Tensor:
    x = scores.to(dtype) * scale
    return x if bias is None else x + bias.to(dtype).unsqueeze(1)


def _statistics(x: Tensor) -> Tensor:
    """(2, crops, B): the rows' maxima, and log sum e^(x - max). Their sum would be rounded."""
    top = x.amax(-1)
    return torch.stack([top, (x - top.unsqueeze(-1)).exp().sum(-1).log()])


def _softmax(x: Tensor, stats: Tensor) -> Tensor:
    top, log_sum = stats.unsqueeze(-1)
    return (x - top - log_sum).exp()


def _compared(s: int, T: int, ignore_diagonal: bool) -> list[int]:
    """The teachers that student crop s is compared with."""
    return [t for t in range(T) if not (ignore_diagonal and t == s)]


@without_autocast
def prototype_loss_fwd_ref(
    student: Tensor,  # (S, B, K)
    teacher: Tensor,  # (T, B, K)
    bias: Tensor | None,  # (T, K)
    student_scale: float,
    teacher_scale: float,
    ignore_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (S, B), summed over teachers, and statistics of student (2, S, B), teacher (2, T, B).

    Where no teacher has weight a student's score of -inf counts nothing.
    """
    dtype = wide_dtype(student.dtype, teacher.dtype)
    x = _logits(teacher, teacher_scale, bias, dtype)
    y = _logits(student, student_scale, None, dtype)
    teacher_stats, student_stats = _statistics(x), _statistics(y)
    q = _softmax(x, teacher_stats)
    loss = y.new_zeros(y.shape[:2])
    top, log_sum = student_stats.unsqueeze(-1)
    for s, logs in enumerate(y - top - log_sum):
        if which := _compared(s, len(q), ignore_diagonal):
            weight = q[which].sum(0)
            loss[s] = -torch.where(weight > 0, weight * logs, weight).sum(-1)
    return loss, student_stats, teacher_stats


@without_autocast
def prototype_loss_bwd_ref(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    ignore_diagonal: bool,
    student_stats: Tensor,  # (2, S, B)
    teacher_stats: Tensor,  # (2, T, B)
    dloss: Tensor,  # (S, B)
) -> Tensor:
    """dstudent (S, B, K) in the student's dtype."""
    dtype = wide_dtype(student.dtype, teacher.dtype)
    q = _softmax(_logits(teacher, teacher_scale, bias, dtype), teacher_stats)
    p = _softmax(_logits(student, student_scale, None, dtype), student_stats)
    dstudent = torch.zeros_like(student, memory_format=torch.contiguous_format)
    for s, factor in enumerate(student_scale * dloss):
        if which := _compared(s, len(q), ignore_diagonal):
            dstudent[s] = factor.unsqueeze(-1) * (len(which) * p[s] - q[which].sum(0))
    return dstudent


def prototype_loss_bwd_ref_(student: Tensor, *args) -> None:
    """dstudent over the student's scores."""
    student.copy_(prototype_loss_bwd_ref(student, *args))


PROBLEM = (
    "Tensor teacher, Tensor? bias, float student_scale, float teacher_scale, bool ignore_diagonal"
)
GIVEN = "Tensor student_stats, Tensor teacher_stats, Tensor dloss"
lib.define(
    f"prototype_loss_fwd(Tensor student, {PROBLEM})"
    " -> (Tensor loss, Tensor student_stats, Tensor teacher_stats)"
)
lib.define(f"prototype_loss_bwd(Tensor student, {PROBLEM}, {GIVEN}) -> Tensor")
lib.define(f"prototype_loss_bwd_(Tensor(a!) student, {PROBLEM}, {GIVEN}) -> ()")
lib.impl("prototype_loss_fwd", prototype_loss_fwd_ref, "CompositeExplicitAutograd")
lib.impl("prototype_loss_bwd", prototype_loss_bwd_ref, "CompositeExplicitAutograd")
lib.impl("prototype_loss_bwd_", prototype_loss_bwd_ref_, "CompositeExplicitAutograd")


def _fwd_fake(student, teacher, *_):
    torch._check(
        student.dim() == 3 and teacher.dim() == 3 and student.shape[1:] == teacher.shape[1:],
        lambda: "prototype_loss_fwd: student must be (S, B, K) and teacher (T, B, K)",
    )
    S, B, _ = student.shape
    like = student.new_empty((), dtype=wide_dtype(student.dtype, teacher.dtype))
    return like.new_empty(S, B), like.new_empty(2, S, B), like.new_empty(2, len(teacher), B)


def _bwd_fake(student, *_):
    return student.new_empty(student.shape)


torch.library.register_fake("fastssl::prototype_loss_fwd", _fwd_fake, lib=lib)
torch.library.register_fake("fastssl::prototype_loss_bwd", _bwd_fake, lib=lib)
torch.library.register_fake("fastssl::prototype_loss_bwd_", lambda *_: None, lib=lib)
on_cuda("prototype_loss", "prototype_loss_fwd", prototype_loss_fwd_ref, "copies all scores to fp32")
on_cuda("prototype_loss", "prototype_loss_bwd", prototype_loss_bwd_ref, "copies all scores to fp32")
on_cuda(
    "prototype_loss", "prototype_loss_bwd_", prototype_loss_bwd_ref_, "copies all scores to fp32"
)


class PrototypeLoss(torch.autograd.Function):
    """Keeps the scores as they came and two numbers a row; the backward makes the weights again."""

    @staticmethod
    def forward(
        ctx, student, teacher, bias, weight, scales, ignore_diagonal, reduction, shards, inplace
    ):
        # fp64 exists for oracles, and kernels take no empty batch.
        by_reference = (
            wide_dtype(student.dtype, teacher.dtype) == torch.float64 or not student.shape[1]
        )
        ops = torch.ops.fastssl
        fwd = prototype_loss_fwd_ref if by_reference else ops.prototype_loss_fwd
        ctx.inplace = inplace
        if inplace:
            ctx.bwd = prototype_loss_bwd_ref_ if by_reference else ops.prototype_loss_bwd_
        else:
            ctx.bwd = prototype_loss_bwd_ref if by_reference else ops.prototype_loss_bwd
        (S, B, _), T = student.shape, len(teacher)
        pairs = S * T - min(S, T) * ignore_diagonal if reduction == "mean" else 1
        ctx.slope = slope_of_row(reduction, B, shards) / pairs
        ctx.options = *scales, ignore_diagonal
        loss, *stats = fwd(student, teacher, bias, *ctx.options)
        ctx.save_for_backward(student, teacher, bias, weight, *stats)
        loss = loss * weight
        if reduction == "none":
            return loss
        return reduced(loss.sum(0) / pairs, reduction, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        student, teacher, bias, weight, *stats = ctx.saved_tensors
        d = dloss * ctx.slope * weight  # (S, B)
        args = student, teacher, bias, *ctx.options, *stats, d.contiguous()
        if not ctx.inplace:
            return ctx.bwd(*args), *[None] * 8
        ctx.bwd(*args)
        # Whoever saved the scores, this loss included, must not take the gradient for them.
        torch.autograd.graph.increment_version(student)
        return student.detach(), *[None] * 8


def crops_of(name: str, label: str, x: Tensor) -> Tensor:
    """(crops, B, K) of that or (B, K)."""
    if isinstance(x, list | tuple):
        raise TypeError(
            f"{name}: {label} must be one tensor, got a {type(x).__name__}. torch.stack the crops."
        )
    check_floating(name, label, x)
    if x.dim() not in (2, 3) or 0 in (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"{name}: {label} must be (B, K), or (crops, B, K), with at least one prototype, "
            f"got {tuple(x.shape)}."
        )
    return x.unsqueeze(0) if x.dim() == 2 else x


def _check_overwritable(name: str, student: Tensor) -> None:
    if not student.is_contiguous():
        raise ValueError(
            f"{name}: student must be contiguous for inplace=True, got strides {student.stride()}. "
            "Use .contiguous(), or inplace=False."
        )
    whole = student if student._base is None else student._base
    if any(x.is_leaf and x.requires_grad for x in (student, whole)):  # a view of a leaf is none
        raise ValueError(
            f"{name}: student must be computed by a model for inplace=True, got a leaf that "
            "requires grad. Its values would be lost: use inplace=False."
        )


def _scale_of(name: str, label: str, temperature: float) -> float:
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(
            f"{name}: {label} must be a positive number, got {temperature!r}. "
            "Typical: 0.1 for the student, 0.04 to 0.07 for the teacher."
        )
    return 1 / temperature


def loss_options(
    name, sizes, dtypes, like, bias, student_temperature, teacher_temperature, ignore_diagonal,
    sample_weight, reduction, group,
):  # fmt: skip
    """Checked, for `PrototypeLoss`: bias (T, K), weight (S, B), scales, ignore_diagonal, reduction,
    shards."""
    S, T, B, K = sizes
    check_reduction(name, reduction)
    if ignore_diagonal and S == T == 1:
        raise ValueError(
            f"{name}: ignore_diagonal=True must leave a pair, got one student and one teacher crop."
        )
    scales = (
        _scale_of(name, "student_temperature", student_temperature),
        _scale_of(name, "teacher_temperature", teacher_temperature),
    )
    like = like.new_empty(0, dtype=wide_dtype(*dtypes))
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape not in ((K,), (T, K)):
            got = tuple(bias.shape) if isinstance(bias, Tensor) else bias
            raise ValueError(
                f"{name}: bias must be a tensor of shape {(K,)}, or {(T, K)} for one of each "
                f"teacher crop, got {got}."
            )
        bias = bias.detach().to(like).contiguous().expand(T, K)
    if sample_weight is None:
        weight = like.new_ones(1)
    elif not isinstance(sample_weight, Tensor) or sample_weight.shape not in ((B,), (S, B)):
        got = tuple(sample_weight.shape) if isinstance(sample_weight, Tensor) else sample_weight
        raise ValueError(
            f"{name}: sample_weight must be a tensor of shape {(B,)} or {(S, B)}, got {got}."
        )
    elif sample_weight.requires_grad:
        raise ValueError(f"{name}: sample_weight takes no gradient here. Use .detach().")
    else:
        weight = sample_weight.to(like)
    levels, shards = resolve_levels(name, group), None
    if levels:
        same = {
            "the crops and prototypes": (S, T, K),
            "the dtypes": dtypes,
            "the temperatures": (student_temperature, teacher_temperature),
            "the reduction": reduction,
            "ignore_diagonal": ignore_diagonal,
        }
        (rows,) = agree(name, levels, (B,), like, **same)
        shards = Shards(levels, rows)
    if not (B if shards is None else shards.total):
        raise ValueError(f"{name}: the batch must have a row, got B=0. Skip it.")
    return bias, weight.expand(S, B), scales, ignore_diagonal, reduction, shards


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    bias: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    ignore_diagonal: bool = False,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    group=None,
) -> Tensor:
    """Cross-entropy of softmax(teacher / T_t + bias) with softmax(student / T_s), of all crops.

    loss_sb = sum_t H(softmax_k(teacher_tb / T_t + bias), softmax_k(student_sb / T_s)).

    Args:
        student: (S, B, K) scores of S crops of B samples for K prototypes, or (B, K), in float32,
            bfloat16 or float16 (float64: materialising reference).
        teacher: (T, B, K) or (B, K), of any of these dtypes; taken as a constant.
        bias: (K,), or (T, K) for each teacher crop its own; a constant. `sinkhorn_bias` of the
            teacher's scores, -centre / T_t, or None for neither.
        student_temperature, teacher_temperature: > 0, T_s and T_t.
        ignore_diagonal: leave out the pairs s = t: the first teacher and student crops are the same
            images.
        sample_weight: (B,) or (S, B), factor of each row's loss, such as 1 / masked tokens of its
            image.
        reduction: "mean" over the pairs of crops that count and the B rows, "sum" over both, or
            "none" for (S, B), summed over teachers; (B,) where student is (B, K).
        inplace: the gradient is written over student's scores, which nothing else may need, teacher
            included. Student must be contiguous and computed by something, not a leaf. Without
            effect under torch.compile.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own B, also 0.

    Returns:
        A float32 scalar, or losses by row. Over several ranks the scalar is that of the rows of all
        ranks, equal on each.

    Raises:
        TypeError, ValueError: integer scores, shapes that do not fit, an empty batch, no pair left,
            temperatures not positive, scores that `inplace` may not overwrite; on all ranks, what
            differs between them and must not. RuntimeError: a second backward of an `inplace` loss.

    Memory: O((S + T) B) and, unless `inplace`, the gradient; no probabilities, nothing of B x K in
        float32.

    Notes: every student row is read once for all teachers, in the forward and in the backward, and
        the gradient is written once, in the student's dtype, after the upstream factor. Exponents
        are differences to maxima, so scores of any size are safe; scores of -inf have no weight,
        and where the teachers have none either, no loss. Sums in float32, blocks of them in float64
        on a CPU. Deterministic. Autocast changes nothing. Differentiable once, in student.
        Gradients over several ranks as in `info_nce`.

    Example:
        >>> student, teacher = torch.randn(4, 8, 16), torch.randn(2, 8, 16)  # crops, B, K
        >>> prototype_cross_entropy(student, teacher, ignore_diagonal=True).shape
        torch.Size([])

    Paper: DINO, arXiv:2104.14294; SwAV, arXiv:2006.09882; iBOT, arXiv:2111.07832.
    """
    name = "prototype_cross_entropy"
    given = student
    student, teacher = (
        crops_of(name, "student", student),
        crops_of(name, "teacher", teacher).detach(),
    )
    (S, B, K), T = student.shape, len(teacher)
    if teacher.shape[1:] != (B, K):
        raise ValueError(
            f"{name}: teacher must have student's batch and prototypes (B, K)={(B, K)}, got "
            f"{tuple(teacher.shape)}."
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: student and teacher must be on one device, got {student.device} and "
            f"{teacher.device}. Use .to()."
        )
    # The compiler plans memory by itself, and hides what student is a view of.
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        _check_overwritable(name, given)
    options = loss_options(
        name, (S, T, B, K), (student.dtype, teacher.dtype), student, bias, student_temperature,
        teacher_temperature, ignore_diagonal, sample_weight, reduction, group,
    )  # fmt: skip
    loss = PrototypeLoss.apply(student, teacher, *options, inplace)
    return loss[0] if given.dim() == 2 and reduction == "none" else loss
