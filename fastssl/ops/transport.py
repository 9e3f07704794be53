"""Entropic optimal transport in the log domain, for problems of the size of matched graphs.

The plan is P_ij = exp(f_i + g_j - cost_ij / epsilon); by turns f gives its rows and g its columns
their sums. It is differentiated as it stands, not through the turns: with r and c its sums,
dP_ij = P_ij (df_i + dg_j - dcost_ij / epsilon) must add up to dr and dc. So with D = dL/dP,

    r_i x_i + sum_j P_ij y_j = sum_j P_ij D_ij      dL/dr = x, dL/dc = y
    sum_i P_ij x_i + c_j y_j = sum_i P_ij D_ij      dL/dcost_ij = P_ij (x_i + y_j - D_ij) / epsilon
"""

import math

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import host_may_wait
from fastssl.ops.blocks import wide
from fastssl.ops.checks import check_floating
from fastssl.ops.contrastive import lib, without_autocast

CHECK_EVERY = 10
# The system is singular, the more so the nearer the plan is to falling apart into blocks. What is
# uncertain then is x_i + y_j between blocks, where P_ij is as small as the eigenvalue. So this on
# the diagonal changes the gradient by no more than about its share of max |D| / epsilon.
RIDGE = 1e-12


def _log_sums(x: Tensor, f: Tensor, dim: int, out: Tensor) -> Tensor:
    """log of the sum by `dim` of exp(x + f), f without that dimension's counterpart; NaN of none.

    As torch.logsumexp, with fewer copies and no subnormal numbers, which take ten times as long.
    """
    torch.add(x, f.unsqueeze(-3 - dim), out=out)
    largest = out.amax(dim, keepdim=True)
    out.sub_(largest).clamp_(min=math.log(torch.finfo(x.dtype).tiny) + 1)
    return out.exp_().sum(dim).log_().add_(largest.squeeze(dim))


@without_autocast
def transport_ref(
    cost: Tensor,  # (..., N, M)
    row: Tensor,  # (..., N)
    col: Tensor,  # (..., M)
    epsilon: float,
    n_iters: int,
    tol: float | None,
) -> Tensor:
    """The plan (..., N, M), whose rows have exactly their marginals."""
    no_row, no_col = row == 0, col == 0
    x = cost.to(row.dtype) / -epsilon
    x.masked_fill_(no_row.unsqueeze(-1), -math.inf).masked_fill_(no_col.unsqueeze(-2), -math.inf)
    log_row, log_col = row.log(), col.log()
    f, g, out = torch.zeros_like(row), torch.zeros_like(col), torch.empty_like(x)
    for i in range(n_iters):
        if i:
            f = (log_row - _log_sums(x, g, -1, out)).masked_fill_(no_row, -math.inf)
        before, g = g, (log_col - _log_sums(x, f, -2, out)).masked_fill_(no_col, -math.inf)
        if tol is not None and i and i % CHECK_EVERY == 0 and host_may_wait(x):
            # With `before` the columns' sums are exp(before - g) of what they should be.
            if (before - g).expm1().masked_fill(no_col, 0).abs().amax() <= tol:
                break
    # By softmax: its differences to the maximum are free of rounding, those to a log-sum are not.
    plan = torch.add(x, g.unsqueeze(-2), out=out).softmax(-1).mul_(row.unsqueeze(-1))
    return plan.masked_fill_(no_row.unsqueeze(-1), 0)


# One op, so that torch.compile does not unroll the iterations.
lib.define(
    "transport(Tensor cost, Tensor row, Tensor col, float epsilon, int n_iters, float? tol)"
    " -> Tensor"
)
lib.impl("transport", transport_ref, "CompositeExplicitAutograd")


def _transport_fake(cost, row, col, epsilon, n_iters, tol):
    return cost.new_empty(cost.shape, dtype=row.dtype)


torch.library.register_fake("fastssl::transport", _transport_fake, lib=lib)


def _adjoint(plan: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., N) and y (..., M) of the system above for u (..., N) and v (..., M)."""
    N, M = plan.shape[-2:]
    if N < M:
        y, x = _adjoint(plan.mT, v, u)
        return x, y
    # Scaled to a unit diagonal, less x: (1 - K^T K) w = rhs, the eigenvalues from 0 to 1.
    p, q = (s.rsqrt().masked_fill(s == 0, 0) for s in (plan.sum(-1), plan.sum(-2)))
    K = plan * p.unsqueeze(-1) * q.unsqueeze(-2)  # (..., N, M)
    system = -(K.mT @ K)  # (..., M, M)
    system.diagonal(dim1=-2, dim2=-1).add_(1 + RIDGE)
    u, v = (p * u).unsqueeze(-1), (q * v).unsqueeze(-1)
    w = torch.cholesky_solve(v - K.mT @ u, torch.linalg.cholesky_ex(system).L)  # (..., M, 1)
    return p * (u - K @ w).squeeze(-1), q * w.squeeze(-1)


class Transport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, row, col, epsilon, n_iters, tol):
        plan = torch.ops.fastssl.transport(cost, row, col, epsilon, n_iters, tol)
        ctx.save_for_backward(plan)
        ctx.epsilon, ctx.dtype = epsilon, cost.dtype
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx, dplan):
        (plan,) = ctx.saved_tensors
        P = plan.double()
        PD = P * dplan.double()
        x, y = _adjoint(P, PD.sum(-1), PD.sum(-2))
        dcost = (P * (x.unsqueeze(-1) + y.unsqueeze(-2)) - PD) / ctx.epsilon
        # x + a constant and y - it is a solution too. This one does not change with the rows' mass.
        r, c = P.sum(-1), P.sum(-2)
        mean = (r * x).sum(-1, True) / r.sum(-1, True)
        drow, dcol = (x - mean).masked_fill(r == 0, 0), (y + mean).masked_fill(c == 0, 0)
        return dcost.to(ctx.dtype), drow.to(plan), dcol.to(plan), None, None, None


def _marginal(name: str, label: str, x: Tensor | None, shape: tuple, like: Tensor) -> Tensor | None:
    """(..., n) of the given shape, in at least fp32."""
    if x is None:
        return None
    check_floating(name, label, x)
    if x.shape not in (shape, shape[-1:]):
        raise ValueError(
            f"{name}: {label} must have shape {shape[-1:]} or {shape}, got {tuple(x.shape)}."
        )
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = x.detach().aminmax()
        if not (low >= 0 and high < math.inf):
            raise ValueError(
                f"{name}: {label} must hold finite numbers >= 0, got {low:g} to {high:g}."
            )
    return x.to(device=like.device, dtype=wide(like)).expand(shape)


def _marginals(name, row_marginal, col_marginal, cost) -> tuple[Tensor, Tensor]:
    """Both, of the same mass: that of the columns."""
    *batch, N, M = cost.shape
    row = _marginal(name, "row_marginal", row_marginal, (*batch, N), cost)
    col = _marginal(name, "col_marginal", col_marginal, (*batch, M), cost)
    if col is None:
        mass = cost.new_ones(*batch, 1, dtype=wide(cost)) if row is None else row.sum(-1, True)
        col = (mass / M).expand(*batch, M)
    mass = col.sum(-1, True)
    if row is None:
        return (mass / N).expand(*batch, N), col
    found = row.sum(-1, True)
    if cost.device.type == "cpu" and not torch.compiler.is_compiling():
        given = (x for x in (row_marginal, col_marginal) if x is not None)
        off = (found - mass).detach().abs() / mass.detach().clamp(min=1e-30)
        if off.amax() > max(1e-5, *(torch.finfo(x.dtype).eps for x in given)):
            i = off.argmax()
            raise ValueError(
                f"{name}: row_marginal and col_marginal must have one sum, got "
                f"{found.flatten()[i]:g} and {mass.flatten()[i]:g}. Divide each by its sum."
            )
    # Detached: the gradient of `Transport` is that of the rows' shares already.
    return row * (mass / found.clamp(min=torch.finfo(found.dtype).tiny)).detach(), col


def optimal_transport(
    cost: Tensor,
    epsilon: float,
    n_iters: int = 100,
    *,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:
    """Entropic optimal transport: the plan P of least sum_ij P_ij (cost_ij + epsilon log P_ij).

    P_ij = exp((f_i + g_j - cost_ij) / epsilon), sum_j P_ij = row_i, sum_i P_ij = col_j, f and g by
    Sinkhorn's iterations in the log domain: g from the columns' sums, then f from the rows'.

    Args:
        cost: (..., N, M) float32, bfloat16, float16 (computed in float32) or float64. inf forbids a
            pair. A matching of largest score has the cost -score.
        epsilon: > 0, in units of the cost. The smaller, the nearer the plan is to a permutation and
            the more iterations it takes.
        n_iters: >= 1, the most iterations.
        row_marginal: (..., N) or (N,), >= 0; None: equal ones of col_marginal's sum, or of 1.
        col_marginal: (..., M) or (M,), >= 0, of row_marginal's sum; None: equal ones. Zeros are
            padding, in graphs of fewer nodes: such rows and columns of the plan are 0, whatever
            stands there in the cost.
        tol: None: n_iters are run. Else none are after the sums of all columns are right to this
            share of them, which is looked at every 10 iterations; not while a CUDA graph is
            captured.

    Returns:
        P (..., N, M) in float32 (float64). The rows' sums are exact, the columns' where the
        iterations have converged.

    Raises:
        TypeError, ValueError: integer cost, an empty one, epsilon, n_iters or tol out of range,
            marginals of wrong shape, negative or of different sums. On a GPU values are not looked
            at: rows are scaled to the columns' sum, and of negative numbers comes NaN.

    Memory: 3 times the cost in float32, in the backward 5 times in float64 and 2 matrices of
        min(N, M)^2: nothing grows with n_iters.

    Notes: the gradient is that of the exact plan whose rows and columns have the sums that this one
        has, from one linear system in float64: exact near convergence, and before it not that of
        the iterations. In cost its rows and columns sum to 0. Only a marginal's shares count, where
        both are given: the mass is the columns'. A marginal of 0 has gradient 0. No epsilon
        overflows, but float32 knows log P to about 1e-7 cost / epsilon, and no tol below that is
        met. NaN, or a row or column of mass all of whose pairs are forbidden, makes its problem's
        plan NaN. Autocast has no effect. Deterministic.

    Example:
        >>> plan = optimal_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.1)
        >>> plan.mul(2).round().tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Paper: Sinkhorn distances, arXiv:1306.0895; in the log domain, arXiv:1610.06519;
        differentiated, arXiv:1805.11897.
    """
    name = "optimal_transport"
    check_floating(name, "cost", cost)
    if cost.dim() < 2 or 0 in cost.shape:
        raise ValueError(
            f"{name}: cost must be (..., N, M) and not empty, got {tuple(cost.shape)}."
        )
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
        raise ValueError(
            f"{name}: epsilon must be a positive number, got {epsilon!r}. Typical: 0.01 to 0.1 of "
            "the cost's spread."
        )
    if not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"{name}: n_iters must be an integer >= 1, got {n_iters!r}.")
    if tol is not None and not tol > 0:
        raise ValueError(f"{name}: tol must be positive or None, got {tol!r}. Typical: 1e-3.")
    row, col = _marginals(name, row_marginal, col_marginal, cost)
    return Transport.apply(cost, row, col, epsilon, n_iters, tol)
