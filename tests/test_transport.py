"""Optimal transport against the dense Sinkhorn iteration in fp64, differentiated step by step."""

from functools import partial

import pytest
import torch
from oracle import assert_no_worse

from fastssl.ops import optimal_transport, sinkhorn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def naive(cost, row, col, epsilon=0.3, n_iters=300):
    kernel, u = (-cost / epsilon).exp(), torch.ones_like(row)
    for _ in range(n_iters):
        v = col / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)
        u = row / (kernel @ v.unsqueeze(-1)).squeeze(-1)
    return u.unsqueeze(-1) * kernel * v.unsqueeze(-2)


def plan_of(cost, row, col, epsilon=0.3, n_iters=300, **options):
    marginals = {"row_marginal": row, "col_marginal": col}
    return optimal_transport(cost, epsilon, n_iters, **marginals, **options)


def problem(*shape, dtype=torch.float64):
    """A cost (..., N, M) of order 1, and marginals of sum 1."""
    *batch, N, M = shape
    row, col = (torch.rand(*batch, n, dtype=torch.float64) + 0.1 for n in (N, M))
    row, col = row / row.sum(-1, keepdim=True), col / col.sum(-1, keepdim=True)
    return torch.rand(shape, dtype=torch.float64).to(dtype), row, col


def with_gradients(function, inputs, weight):
    """The plan, and the gradients of its weighted sum; of marginals less their free constant."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    plan = function(*inputs)
    dcost, *grads = torch.autograd.grad((plan * weight.to(plan)).sum(), inputs)
    return plan.detach(), dcost, *(x - x.mean(-1, keepdim=True) for x in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 5), (17, 33), (2, 3, 6, 6), (96, 65)])
def test_plan_and_gradients(shape, dtype, device):
    cost, row, col = problem(*shape, dtype=dtype)
    row, col = row.float(), col.float()
    weight = torch.randn(shape, dtype=torch.float64)
    inputs = cost, row, col
    true = with_gradients(naive, [x.double() for x in inputs], weight)
    plain = with_gradients(naive, [x.float() for x in inputs], weight)
    found = with_gradients(plan_of, [x.to(device) for x in inputs], weight)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for i, (got, t, p) in enumerate(zip(found, true, plain, strict=True)):
        p = t.to(dtype) if i == 1 and dtype != torch.float32 else p  # the result's own rounding
        assert_no_worse(got.cpu(), t, p, factor=3 if i else 2)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_gradients_are_exact_in_fp64(shape):
    inputs, weight = problem(*shape), torch.randn(shape, dtype=torch.float64)
    for epsilon, n_iters in ((0.3, 300), (0.02, 4000)):
        options = {"epsilon": epsilon, "n_iters": n_iters}
        true = with_gradients(partial(naive, **options), inputs, weight)
        found = with_gradients(partial(plan_of, **options), inputs, weight)
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-7)
        sums = torch.cat([found[1].sum(0), found[1].sum(1)])
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


@pytest.mark.parametrize("N,M", [(3, 4), (4, 2)])
def test_gradcheck(N, M):
    cost, row, col = (x.requires_grad_() for x in problem(N, M))
    solve = partial(optimal_transport, epsilon=0.3, n_iters=60)
    names = "row_marginal", "col_marginal"
    for given in ((0, 1), (0,), (1,)):

        def run(cost, *marginals, given=given):
            named = {names[i]: x for i, x in zip(given, marginals, strict=True)}
            return solve(cost, **named)

        assert torch.autograd.gradcheck(run, (cost, *((row, col)[i] for i in given)))


def test_few_iterations_are_those_of_sinkhorn():
    scores = torch.randn(6, 5, dtype=torch.float64)
    for n_iters in (1, 2, 7):
        plan = optimal_transport(-scores, 0.2, n_iters)
        torch.testing.assert_close(plan * 6, sinkhorn(scores, 0.2, n_iters))


def test_rows_are_exact_before_convergence():
    cost, row, col = problem(40, 30, dtype=torch.float32)
    plan = plan_of(cost, row, col, epsilon=1e-2, n_iters=2)
    torch.testing.assert_close(plan.sum(1), row.float())
    assert (plan.sum(0) / col - 1).abs().max() > 0.01


def test_what_rows_and_columns_add_to_the_cost_is_of_no_effect():
    cost, row, col = problem(6, 8)
    shifted = cost + torch.randn(6, 1) + torch.randn(8)
    torch.testing.assert_close(plan_of(shifted, row, col), plan_of(cost, row, col))


def test_graphs_of_different_sizes_in_one_batch():
    sizes, N, M = [(5, 6), (1, 4), (0, 0), (6, 2)], 6, 6
    cost = torch.full((len(sizes), N, M), torch.nan, dtype=torch.float64)  # padding is not read
    row, col = torch.zeros(2, len(sizes), 6, dtype=torch.float64).unbind()
    weight = torch.randn(cost.shape, dtype=torch.float64)
    alone = []
    for i, (n, m) in enumerate(sizes):
        parts = [torch.zeros(N, M), torch.zeros(N, M), torch.zeros(N), torch.zeros(M)]
        parts = [x.double() for x in parts]
        if n:
            one = problem(n, m)
            cost[i, :n, :m], row[i, :n], col[i, :m] = one
            found = with_gradients(plan_of, one, weight[i, :n, :m])
            parts[0][:n, :m], parts[1][:n, :m], parts[2][:n], parts[3][:m] = found
        alone.append(parts)
    inputs = [x.requires_grad_() for x in (cost, row, col)]
    plan = plan_of(*inputs)
    found = [plan, *torch.autograd.grad((plan * weight).sum(), inputs)]
    for i, (n, m) in enumerate(sizes):
        for x, size in ((found[2][i], n), (found[3][i], m)):
            x[:size] -= x[:size].mean() if size else 0
        torch.testing.assert_close([x[i] for x in found], alone[i])


def test_marginals_are_broadcast():
    cost, row, col = problem(3, 4, 5)
    found = plan_of(cost, row[0], col[0])
    torch.testing.assert_close(found, plan_of(cost, row[:1].expand(3, 4), col[:1].expand(3, 5)))
    ones = torch.ones(4)
    square = optimal_transport(cost[..., :4], 0.3, row_marginal=ones)
    torch.testing.assert_close(square.sum(-2), ones.double().expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forbidden_pairs_part_the_problem(dtype):
    """Then the gradient's system is singular in more than one direction."""
    halves, weight = problem(2, 5, 4, dtype=dtype), torch.randn(2, 5, 4)
    cost = torch.full((10, 8), torch.inf, dtype=dtype)
    cost[:5, :4], cost[5:, 4:] = halves[0]
    marginals = [x.flatten() / 2 for x in halves[1:]]
    plan, dcost, *_ = with_gradients(
        plan_of, (cost, *marginals), torch.block_diag(*weight).masked_fill(cost.isinf(), 3)
    )
    parts, dparts, *_ = with_gradients(plan_of, halves, weight)
    torch.testing.assert_close(plan, torch.block_diag(*parts) / 2)
    torch.testing.assert_close(dcost, torch.block_diag(*dparts) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-30, 1e-3, 1e3])
def test_extreme_epsilon(epsilon, dtype):
    order = torch.randperm(20)
    near = torch.rand(20, 20) * 0.5 + 0.5
    near[torch.arange(20), order] = 0
    plan, dcost = with_gradients(
        lambda cost: optimal_transport(cost.to(dtype), epsilon), (near,), torch.randn(20, 20)
    )
    expected = torch.eye(20)[order] if epsilon < 1 else torch.full((20, 20), 1 / 20)
    torch.testing.assert_close(plan.float() * 20, expected, rtol=0, atol=1e-3)
    assert dcost.isfinite().all()


def test_tol_ends_the_iterations():
    cost, row, col = problem(4, 30, 20)

    def off(n):
        plan = plan_of(cost, row, col, epsilon=0.05, n_iters=n)
        return (plan.sum(-2) / col - 1).abs().max()

    checked = range(10, 1000, 10)
    needed = next(n for n in checked if off(n) <= 1e-4)
    assert needed > 10
    found = plan_of(cost, row, col, epsilon=0.05, n_iters=1000, tol=1e-4)
    assert torch.equal(found, plan_of(cost, row, col, epsilon=0.05, n_iters=needed + 1))
    col[:, 3] = 0  # whose sum cannot be wrong
    run = partial(plan_of, cost, row * col.sum(-1, keepdim=True), col, epsilon=0.05, n_iters=1000)
    assert not torch.equal(run(tol=1e-4), run())


def test_what_is_kept_does_not_grow_with_the_iterations():
    kept = []
    cost = torch.rand(30, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        optimal_transport(cost, 0.1, 50)
    assert sum(x.numel() for x in kept) == cost.numel()


def test_nan_stays_in_its_problem():
    cost = torch.rand(3, 4, 5)
    cost[1, 2, 3] = torch.nan
    cost[2, 1] = torch.inf
    plan, dcost = with_gradients(lambda cost: optimal_transport(cost, 0.1), (cost,), cost)
    assert plan[0].isfinite().all() and dcost[0].isfinite().all()
    assert plan[1:].isnan().all() and dcost[1:].isnan().all()


def test_autocast_has_no_effect():
    cost, row, col = problem(8, 6, dtype=torch.float32)
    run = partial(with_gradients, plan_of, (cost, row, col), torch.randn(8, 6))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    assert all(map(torch.equal, inside, run()))


def test_compiles_without_a_graph_break():
    cost, row, col = problem(6, 8, dtype=torch.float32)
    row.requires_grad_(), col.requires_grad_()
    for tol in (None, 1e-3):
        ours = partial(plan_of, epsilon=0.1, n_iters=1000, tol=tol)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        run = partial(with_gradients, inputs=(cost, row, col), weight=torch.rand(6, 8))
        torch.testing.assert_close(run(compiled), run(ours))
    args = cost, row.detach().float(), col.detach().float(), 0.1, 5, None
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastssl.transport.default, args, test_utils=tests)


ERRORS = [
    ({"cost": torch.ones(3, 4).int()}, "cost must be a float32.*got torch.int32"),
    ({"cost": torch.ones(3)}, r"cost must be \(..., N, M\) and not empty, got \(3,\)"),
    ({"cost": torch.ones(3, 0)}, r"cost must be \(..., N, M\) and not empty, got \(3, 0\)"),
    ({"epsilon": 0}, "epsilon must be a positive number, got 0"),
    ({"n_iters": 0}, "n_iters must be an integer >= 1, got 0"),
    ({"tol": 0}, "tol must be positive or None, got 0"),
    ({"row_marginal": torch.ones(4)}, r"must have shape \(3,\) or \(2, 3\), got \(4,\)"),
    ({"row_marginal": [1, 1, 1]}, "row_marginal must be a float32.*got list"),
    ({"row_marginal": torch.tensor([1.0, -1, 1])}, "numbers >= 0, got -1 to 1"),
    ({"col_marginal": torch.tensor([1.0, torch.nan, 1, 1])}, "numbers >= 0, got nan to nan"),
    (
        {"row_marginal": torch.ones(3), "col_marginal": torch.ones(4)},
        "must have one sum, got 3 and 4. Divide each by its sum",
    ),
]


@pytest.mark.parametrize("arguments, text", ERRORS)
def test_error_messages(arguments, text):
    with pytest.raises(TypeError if "float32" in text else ValueError, match=text):
        optimal_transport(**{"cost": torch.ones(2, 3, 4), "epsilon": 0.1} | arguments)
