"""The Triton kernels of `prototype_loss` against the fp64 reference, on a GPU or interpreted."""

import math

import pytest
import torch
from fastssl.kernels import prototype_loss as kernels
from triton_cases import DEVICE, double, dtypes, no_worse, same_bits

from fastssl.ops.prototype_loss import prototype_loss_bwd_ref, prototype_loss_fwd_ref


def problem(S, T, B, K, dtype, bias=None, ignore_diagonal=True, size=0.3):
    student, teacher = (size * torch.randn(n, B, K, device=DEVICE) for n in (S, T))
    if bias is not None:
        bias = torch.randn(bias, K, device=DEVICE).expand(T, K)
    return student.to(dtype), teacher.to(dtype), bias, 10.0, 25.0, ignore_diagonal


def run(fwd, bwd, args):
    loss, *stats = fwd(*args)
    dloss = torch.linspace(0.5, 2, loss.numel(), device=DEVICE).view(loss.shape).to(loss)
    return loss, bwd(*args, *stats, dloss)


def check(args):
    got = run(kernels.prototype_loss_fwd, kernels.prototype_loss_bwd, args)
    exact = run(prototype_loss_fwd_ref, prototype_loss_bwd_ref, double(args))
    plain = run(prototype_loss_fwd_ref, prototype_loss_bwd_ref, args)
    assert [x.dtype for x in got] == [x.dtype for x in plain]
    no_worse("loss", got[0], exact[0], plain[0], 2, float(exact[0].nan_to_num(0, 0).max()))
    no_worse("dstudent", got[1], exact[1], plain[1], 3, 20.0 * len(args[1]))


@dtypes
@pytest.mark.parametrize("S, T, ignore_diagonal", [(1, 1, False), (4, 2, True), (2, 3, True)])
@pytest.mark.parametrize("B, K", [(1, 1), (3, 17), (2, 4096), (2, 9001)])
def test_sizes(B, K, S, T, ignore_diagonal, dtype):
    check(problem(S, T, B, K, dtype, 1 if K % 2 else None, ignore_diagonal))


@dtypes
def test_strides_and_a_bias_for_each_teacher(dtype):
    student, teacher, bias, *options = problem(3, 2, 5, 40, dtype, 2)
    student, teacher = torch.stack([*student], 1).transpose(0, 1), torch.cat([teacher] * 2, 2)
    check((student, teacher[..., 40:], bias, *options))
    check((student.mT.contiguous().mT, teacher[..., ::2], bias, *options))


@dtypes
def test_extremes(dtype):
    check(problem(3, 2, 2, 5000, dtype, 1, size=8.0))
    student, teacher, *options = problem(3, 1, 2, 9000, dtype)  # student 0 has no pair
    student[..., :5000] = teacher[..., :5000] = -math.inf
    check((student, teacher, *options))
    student[1, 0, 7000], teacher[0, 1, 8000] = math.nan, math.nan
    check((student, teacher, *options))


@dtypes
def test_repeats_to_the_bit(dtype):
    args = problem(3, 2, 3, 5000, dtype, 1)
    run_it = lambda: run(kernels.prototype_loss_fwd, kernels.prototype_loss_bwd, args)  # noqa: E731
    assert same_bits(run_it)


@dtypes
def test_in_place(dtype):
    student, *args = problem(4, 2, 3, 5000, dtype, 1)
    loss, *stats = kernels.prototype_loss_fwd(student, *args)
    args += *stats, torch.rand_like(loss)
    expected = kernels.prototype_loss_bwd(student, *args)
    kernels.prototype_loss_bwd_(student, *args)
    assert torch.equal(student, expected)
