"""Triton kernels of the op `prototype_loss`: teachers' and students' scores to losses, and back."""

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of
from fastssl.kernels.tiles import INF, exp_of, finite_or_zero
from torch import Tensor

BLOCK = 4096  # columns of a program; 16 numbers a thread


@triton.jit
def load_logits(ptr, crop, b, offs, mask, scale, bias_ptr, stride_bias, stride_n, stride_b):
    """(BLOCK,) of one row; -inf past the end."""
    ptr += tl.cast(crop, tl.int64) * stride_n + tl.cast(b, tl.int64) * stride_b
    x = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    if bias_ptr is not None:
        row = bias_ptr + tl.cast(crop, tl.int64) * stride_bias
        x += tl.load(row + offs, mask=mask, other=0.0)
    return tl.where(mask, x, -INF)


@triton.jit
def weights_but(
    out, teacher_ptr, b, B, T, offs, mask, scale, bias_ptr, stride_bias, stride_n, stride_b,
    stats_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(BLOCK,) the sum of the teachers' softmaxes, without teacher `out`."""
    q = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, T):
        if t != out:
            x = load_logits(teacher_ptr, t, b, offs, mask, scale, bias_ptr, stride_bias,
                            stride_n, stride_b)  # fmt: skip
            top = tl.load(stats_ptr + t * B + b)
            log_sum = tl.load(stats_ptr + (T + t) * B + b)
            q += exp_of(x - top - log_sum)
    return tl.where(mask, q, 0.0)


@triton.jit(do_not_specialize=["B"])
def prototype_row_kernel(
    x_ptr, bias_ptr, part_ptr, scale, B, K, stride_bias, stride_n, stride_b, BLOCK: tl.constexpr
):  # fmt: skip
    """Maximum of a block of a row's logits, and the sum of e^(x - maximum)."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = load_logits(x_ptr, row // B, row % B, offs, offs < K, scale, bias_ptr, stride_bias,
                    stride_n, stride_b)  # fmt: skip
    top = tl.max(x, 0)
    part_ptr += tl.program_id(1) * rows + row
    tl.store(part_ptr, top)
    tl.store(part_ptr + tl.num_programs(1) * rows, tl.sum(exp_of(x - finite_or_zero(top)), 0))


@triton.jit(do_not_specialize=["B", "S", "T"])
def prototype_loss_fwd_kernel(
    student_ptr, teacher_ptr, bias_ptr, stats_ptr, part_ptr, student_scale, teacher_scale,
    B, K, S, T, stride_ss, stride_sb, stride_ts, stride_tb, stride_bias,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sample and one block of columns, for every student crop: the maximum m of y, and the
    sums of e^(y - m), of q and of q (y - m), q the weights of the teachers it is compared with.

    The teachers' weights are made once and stay in registers while the students' rows come by,
    each read once: 4 (S + T) or 2 (S + T) bytes and S + T exponentials for each column, and the
    teachers' again for the crops that leave one out. 16 bytes written for each block and student.
    Safe: all exponents are differences to maxima. Sums of 4096 terms are trees.
    DINO: arXiv:2104.14294.
    """
    b, rows = tl.program_id(0), S * B
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    every = weights_but(
        T, teacher_ptr, b, B, T, offs, mask, teacher_scale, bias_ptr, stride_bias,
        stride_ts, stride_tb, stats_ptr, BLOCK,
    )  # fmt: skip
    for s in range(0, S):
        q = every
        if IGNORE:
            if s < T:
                q = weights_but(
                    s, teacher_ptr, b, B, T, offs, mask, teacher_scale, bias_ptr, stride_bias,
                    stride_ts, stride_tb, stats_ptr, BLOCK,
                )  # fmt: skip
        y = load_logits(student_ptr, s, b, offs, mask, student_scale, None, 0, stride_ss, stride_sb)
        top = tl.max(y, 0)
        d = y - finite_or_zero(top)
        part = part_ptr + tl.program_id(1) * rows + s * B + b
        step = tl.num_programs(1) * rows
        tl.store(part, top)
        tl.store(part + step, tl.sum(exp_of(d), 0))
        tl.store(part + 2 * step, tl.sum(q, 0))
        # Where no teacher has weight a score of -inf counts nothing.
        tl.store(part + 3 * step, tl.sum(tl.where(q == 0.0, 0.0, q * d), 0))


@triton.jit(do_not_specialize=["rows", "blocks", "B", "T"])
def prototype_merge_kernel(
    part_ptr, stats_ptr, loss_ptr, rows, blocks, B, T,
    IGNORE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A row's maximum, log sum e^(x - maximum) and, of a student, its loss, from its blocks."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCKS)
    mask, step = offs < blocks, blocks * rows
    part_ptr += row
    tops = tl.load(part_ptr + offs * rows, mask=mask, other=-INF)
    sums = tl.load(part_ptr + step + offs * rows, mask=mask, other=0.0)
    top = tl.max(tops, 0)
    log_sum = tl.log(tl.sum(sums * exp_of(tops - top), 0))
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows + row, log_sum)
    if loss_ptr is not None:
        q = tl.load(part_ptr + 2 * step + offs * rows, mask=mask, other=0.0)
        dot = tl.load(part_ptr + 3 * step + offs * rows, mask=mask, other=0.0)
        pairs = T
        if IGNORE:
            pairs = T - tl.where(row // B < T, 1, 0)
        dot += tl.where(q == 0.0, 0.0, q * (finite_or_zero(tops) - top))
        loss = pairs * log_sum - tl.sum(dot, 0)
        tl.store(loss_ptr + row, tl.where(pairs == 0, 0.0, loss))


@triton.jit(do_not_specialize=["B", "S", "T"])
def prototype_loss_bwd_kernel(
    student_ptr, teacher_ptr, bias_ptr, student_stats_ptr, teacher_stats_ptr, dloss_ptr, out_ptr,
    student_scale, teacher_scale, B, K, S, T, stride_ss, stride_sb, stride_ts, stride_tb,
    stride_bias, IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dstudent = dloss student_scale (pairs softmax(y) - q) of one sample and one block of columns.

    As in the forward every student row is read once, and its gradient written once, rounded once.
    out may be the student: no program reads a number that another one writes.
    """
    b = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    every = weights_but(
        T, teacher_ptr, b, B, T, offs, mask, teacher_scale, bias_ptr, stride_bias,
        stride_ts, stride_tb, teacher_stats_ptr, BLOCK,
    )  # fmt: skip
    for s in range(0, S):
        q, pairs = every, T
        if IGNORE:
            if s < T:
                q = weights_but(
                    s, teacher_ptr, b, B, T, offs, mask, teacher_scale, bias_ptr, stride_bias,
                    stride_ts, stride_tb, teacher_stats_ptr, BLOCK,
                )  # fmt: skip
                pairs = T - 1
        y = load_logits(student_ptr, s, b, offs, mask, student_scale, None, 0, stride_ss, stride_sb)
        top = tl.load(student_stats_ptr + s * B + b)
        log_sum = tl.load(student_stats_ptr + (S + s) * B + b)
        factor = tl.load(dloss_ptr + s * B + b) * student_scale
        g = factor * (pairs * exp_of(y - top - log_sum) - q)
        g = tl.where(pairs == 0, 0.0, g)
        out = out_ptr + (tl.cast(s, tl.int64) * B + b) * K + offs
        tl.store(out, g.to(out_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _bias(bias: Tensor | None) -> tuple[Tensor | None, int]:
    if bias is None:
        return None, 0
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    return bias, bias.stride(0)


def _block(K: int) -> dict[str, int]:
    return {"BLOCK": min(BLOCK, max(16, triton.next_power_of_2(K))), "num_warps": 8}


def prototype_loss_fwd(
    student: Tensor,  # (S, B, K) float32, bfloat16 or float16
    teacher: Tensor,  # (T, B, K)
    bias: Tensor | None,  # (T, K) float32
    student_scale: float,
    teacher_scale: float,
    ignore_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (S, B), statistics of student (2, S, B) and of teacher (2, T, B), in float32."""
    student, teacher, (bias, stride_bias) = _rows(student), _rows(teacher), _bias(bias)
    (S, B, K), T = student.shape, len(teacher)
    known = _block(K)
    blocks = triton.cdiv(K, known["BLOCK"])
    like = {"dtype": torch.float32, "device": student.device}
    loss, student_stats = torch.empty(S, B, **like), torch.empty(2, S, B, **like)
    teacher_stats = torch.empty(2, T, B, **like)
    parts = torch.empty(4, blocks, max(S, T) * B, **like)
    merged = {"IGNORE": ignore_diagonal, "BLOCKS": triton.next_power_of_2(blocks)}
    with device_of(student):
        prototype_row_kernel[(T * B, blocks)](
            teacher, bias, parts, teacher_scale, B, K, stride_bias, *teacher.stride()[:2], **known
        )
        prototype_merge_kernel[(T * B,)](parts, teacher_stats, None, T * B, blocks, B, T, **merged)
        prototype_loss_fwd_kernel[(B, blocks)](
            student, teacher, bias, teacher_stats, parts, student_scale, teacher_scale, B, K, S, T,
            *student.stride()[:2], *teacher.stride()[:2], stride_bias,
            IGNORE=ignore_diagonal, **known,
        )  # fmt: skip
        prototype_merge_kernel[(S * B,)](parts, student_stats, loss, S * B, blocks, B, T, **merged)
    return loss, student_stats, teacher_stats


def prototype_loss_bwd(
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
    return _fill_dstudent(
        student.new_empty(student.shape), _rows(student), teacher, bias, student_scale,
        teacher_scale, ignore_diagonal, student_stats, teacher_stats, dloss,
    )  # fmt: skip


def prototype_loss_bwd_(student: Tensor, *args) -> None:
    """The same over the student, contiguous: a program reads each number before it writes it."""
    _fill_dstudent(student, student, *args)


def _fill_dstudent(
    dstudent, student, teacher, bias, student_scale, teacher_scale, ignore_diagonal, student_stats,
    teacher_stats, dloss,
):  # fmt: skip
    teacher, (bias, stride_bias) = _rows(teacher), _bias(bias)
    (S, B, K), T = student.shape, len(teacher)
    known = _block(K)
    with device_of(student):
        prototype_loss_bwd_kernel[(B, triton.cdiv(K, known["BLOCK"]))](
            student, teacher, bias, student_stats, teacher_stats, dloss, dstudent, student_scale,
            teacher_scale, B, K, S, T, *student.stride()[:2], *teacher.stride()[:2], stride_bias,
            IGNORE=ignore_diagonal, **known,
        )  # fmt: skip
    return dstudent
