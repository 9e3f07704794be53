"""SIGReg against its integral over characteristic functions written out, in fp64."""

import math
from functools import cache

import pytest
import torch
from oracle import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl.bench.cases import Case
from fastssl.bench.running import peak_alone
from fastssl.ops import sigreg, sigreg_directions
from fastssl.ops.sigreg import knot_weights, sigreg_bwd_ref, sigreg_directions_ref, sigreg_fwd_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCES = {
    "sigreg_directions": sigreg_directions_ref,
    "sigreg_fwd": sigreg_fwd_ref,
    "sigreg_bwd": sigreg_bwd_ref,
}
ops = torch.ops.fastssl
compiled = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("fastssl::sigreg_fwd", "CPU"),
    reason="the extension is not built: only the reference runs",
)
gpu = pytest.param("cuda", marks=pytest.mark.gpu)
# Instruction sets that one machine can run, by `override_cpu_features`.
CPU_PATHS = {"cpu": -1, "avx2": 1, "portable": 0}


@pytest.fixture(params=["reference", pytest.param("cpu", marks=compiled), gpu])
def device(request, monkeypatch):
    """Where to compute: by the reference, by the CPU's kernels, by the GPU's."""
    if request.param == "reference":
        for name, reference in REFERENCES.items():
            monkeypatch.setattr(ops, name, reference)
    elif request.param != "cuda":
        ops.override_cpu_features(CPU_PATHS[request.param])
    yield "cuda" if request.param == "cuda" else "cpu"
    if request.param in CPU_PATHS:
        ops.override_cpu_features(-1)


def written_out(z, directions, knots=17, t_max=3.0):
    """(..., S): N times the integral over [-t_max, t_max] of |mean e^(itp) - phi(t)|^2 phi(t), by
    the trapezoidal rule, in z's dtype."""
    p = z @ directions.to(z)
    t = torch.linspace(-t_max, t_max, 2 * knots - 1, dtype=torch.float64)
    phi = (-t * t / 2).exp().to(z)
    mean = torch.stack([(1j * x * p).exp().mean(-2) for x in t.tolist()], -1)
    return z.shape[-2] * torch.trapezoid((mean - phi).abs().square() * phi, t.to(z))


def with_gradient(z, upstream, function=sigreg, **options):
    """The function of z, and the gradient in z of its product with upstream, a tensor or 1."""
    z = z.detach().requires_grad_()
    value = function(z, **options)
    total = (value * torch.as_tensor(upstream).to(value)).sum()
    return value.detach(), torch.autograd.grad(total, z)[0]


# --------------------------------------------------------------------------------- the statistic

NULL = {5: 1.04968356, 9: 1.05188877, 17: 1.0524641547991607, 41: 1.05262746}


def test_exact_constants():
    like = torch.zeros(0, dtype=torch.float64)
    for knots, null in NULL.items():
        _, phi, weight = knot_weights(knots, 3.0, like)
        digits = 1e-15 if knots == 17 else 1e-8
        assert (weight * (1 - phi * phi)).sum().item() == pytest.approx(null, rel=digits)
    weight = knot_weights(17, 3.0, like)[2]
    assert weight.sum().item() == pytest.approx(2.4996663000823514, rel=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_of_collapsed_features(dtype, tolerance, device):
    for N in (1, 7, 1000):
        got = sigreg(torch.zeros(N, 5, dtype=dtype, device=device), num_slices=3, reduction="none")
        expected = torch.full_like(got, N * 0.40204757973166455)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("knots", NULL)
def test_expectation_for_normal_features_by_quadrature(knots):
    p = torch.linspace(-9, 9, 181, dtype=torch.float64)
    chance = (-p * p / 2).exp() * (p[1] - p[0]) / math.sqrt(2 * math.pi)
    for z, chances in (
        (p.view(-1, 1, 1), chance),  # one row
        (torch.cartesian_prod(p, p).unsqueeze(2), torch.outer(chance, chance).flatten()),  # two
    ):
        got = sigreg(z, knots=knots, directions=torch.ones(1, 1), reduction="none")
        assert (chances @ got).item() == pytest.approx(NULL[knots], rel=1e-8)


def test_expectation_for_normal_features_by_sampling(device):
    z = 0.7 * torch.randn(400, 32, 6, device=device)
    means = sigreg(z, num_slices=16, target_std=0.7, reduction="none").double().mean(1)
    assert (means.mean() - NULL[17]).abs() < 3 * means.std() / 20


@cache
def accuracy_problem(N, knots, largest):
    generator = torch.Generator().manual_seed(N + knots)
    if largest == 1000:  # projections are the columns themselves, without rounding
        z, directions = 2000 * torch.rand(N, 16, generator=generator) - 1000, torch.eye(16)
    else:
        z, directions = torch.randn(N, 24, generator=generator), sigreg_directions(16, 24)
        if largest == 10:
            z *= 10 / (z @ directions).abs().max()
    return z, directions, written_out(z.double(), directions, knots)


@pytest.mark.parametrize("largest", ["normal", 10, 1000])
@pytest.mark.parametrize("N,knots", [(1, 17), (7, 17), (256, 5), (256, 17), (256, 41), (4096, 17)])
def test_accuracy(N, knots, largest, device):
    z, directions, true = accuracy_problem(N, knots, largest)
    got = sigreg(z.to(device), directions=directions, knots=knots, reduction="none").cpu()
    assert (got - true).mean().abs() <= 1e-6 * true.mean()
    # The reference's angles of 3000 are off by up to 1e-4, which few rows do not average out.
    few = ops.sigreg_fwd is sigreg_fwd_ref and largest == 1000 and N < 256
    assert ((got - true).abs() <= (5e-5 if few else 1e-5) * true).all()


@compiled
def test_kernel_reduces_large_angles_exactly():
    z, directions = 1e5 * torch.randn(50, 16), torch.eye(16)
    got = sigreg(z, directions=directions, reduction="none").double()
    torch.testing.assert_close(got, written_out(z.double(), directions), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_rounded_features(dtype, device):
    z = torch.randn(8, 256, 64, device=device)
    true = sigreg(z, num_slices=512)
    assert (sigreg(z.to(dtype), num_slices=512) - true).abs() <= 2e-4 * true


SIZES = [(1, 1, 1, 3), (2, 3, 5, 5), (7, 5, 3, 17), (33, 17, 9, 41), (257, 96, 40, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,D,S,knots", [*SIZES, (300, 64, 70, 17)])
def test_oracle(N, D, S, knots, dtype, device):
    z, upstream = (1.3 * torch.randn(2, N, D)).to(dtype), torch.randn(2, S)
    options = {"directions": sigreg_directions(S, D, step=N), "knots": knots}
    got, dz = with_gradient(z.to(device), upstream, reduction="none", **options)
    assert got.dtype == torch.float32 and dz.dtype == dtype
    true, dtrue = with_gradient(z.double(), upstream, written_out, **options)
    plain, dplain = with_gradient(z.float(), upstream, written_out, **options)
    assert_no_worse(got.cpu(), true, plain)
    if dtype != torch.float32:  # the result's own rounding
        dplain = dtrue.to(dtype)
    assert_no_worse(dz.cpu(), dtrue, dplain, factor=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N,D,S,knots", [*SIZES, (5, 4, 19, 2), (40, 4, 130, 7), (9, 4, 16, 9), (150, 3, 1100, 8)]
)
@pytest.mark.parametrize(
    "device", [pytest.param(path, marks=compiled) for path in CPU_PATHS] + [gpu], indirect=True
)
def test_kernels_on_every_path(N, D, S, knots, dtype, device):
    z, directions = torch.randn(2, N, D).to(dtype), torch.randn(D, S)
    args = z, directions, torch.randn(2, 2, knots - 1, S)
    wide, own = ([x.to(d) for x in args] for d in (torch.float64, torch.float32))
    there = [x.to(device) for x in args]
    got = ops.sigreg_fwd(*there[:2], 0.2, knots - 1).cpu()
    true, plain = (sigreg_fwd_ref(*x[:2], 0.2, knots - 1) for x in (wide, own))
    assert_no_worse(got, true, plain)
    got = ops.sigreg_bwd(*there, 0.2).cpu()
    true, plain = (sigreg_bwd_ref(*x, 0.2) for x in (wide, own))
    plain = plain if dtype == torch.float32 else true.to(dtype)
    assert_no_worse(got, true, plain, factor=3)


def test_gradcheck():
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 3, 4) < 0.7
    for options in (
        {}, {"t_max": 1.0, "knots": 5}, {"t_max": 5.0, "target_std": 0.3, "reduction": "sum"},
        {"mask": mask, "reduction": "none"}, {"clip": 1.0, "reduction": "none"},
    ):  # fmt: skip
        assert torch.autograd.gradcheck(lambda z, o=options: sigreg(z, num_slices=6, **o), (z,))


# ------------------------------------------------------------------------------------- arguments

EACH = {"num_slices": 7, "reduction": "none"}


@pytest.mark.parametrize("t_max", [1, 3.0, 5.0])
@pytest.mark.parametrize("target_std", [1, 0.25])
def test_integral_and_target(t_max, target_std, device):
    z, directions = target_std * torch.randn(50, 8), sigreg_directions(10, 8)
    options = {"t_max": t_max, "target_std": target_std, "directions": directions}
    got = sigreg(z.to(device), reduction="none", **options).cpu()
    true = written_out(z.double() / target_std, directions, t_max=t_max)
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=0)


def test_leading_dimensions_reduction_and_clip(device):
    z, upstream = torch.randn(2, 3, 20, 8, device=device), torch.randn(2, 3, 7, device=device)
    every = sigreg(z, **EACH)
    assert every.shape == (2, 3, 7)
    for x, statistics in zip(z.flatten(0, 1), every.flatten(0, 1), strict=True):
        torch.testing.assert_close(sigreg(x, **EACH), statistics, rtol=1e-5, atol=0)
    torch.testing.assert_close(sigreg(z, num_slices=7), every.mean())
    torch.testing.assert_close(sigreg(z, num_slices=7, reduction="sum"), every.sum())
    clip = every.median().item()
    above = every >= clip
    clipped, dz = with_gradient(z, upstream, clip=clip, **EACH)
    assert torch.equal(clipped, every * above) and 0 < above.sum() < above.numel()
    assert torch.equal(dz, with_gradient(z, upstream * above, **EACH)[1])


@pytest.mark.parametrize("hidden", [math.nan, math.inf, 3.0])
def test_masked_rows_do_not_count(hidden, device):
    z, mask, upstream = torch.randn(3, 40, 6), torch.rand(3, 40) < 0.6, torch.randn(3, 7)
    mask[2] = False
    z[~mask] = hidden
    got = with_gradient(z.to(device), upstream, mask=mask.to(device), **EACH)
    got, dz = (x.cpu().double() for x in got)
    assert not got[2].any() and not dz[~mask].any()
    for i in range(2):
        true = with_gradient(z[i, mask[i]].double(), upstream[i], **EACH)
        torch.testing.assert_close((got[i], dz[i, mask[i]]), true, rtol=1e-5, atol=1e-6)


@compiled
def test_few_rows_among_many_masked():
    """What masked rows add is gone but for the rounding of 128 rows' sums."""
    z, mask = torch.randn(4096, 8), torch.zeros(4096, dtype=torch.bool)
    mask[::200] = True
    directions = sigreg_directions(64, 8)
    got = sigreg(z, directions=directions, mask=mask, reduction="none")
    true = sigreg(z[mask].double(), directions=directions.double(), reduction="none")
    torch.testing.assert_close(got.double(), true, rtol=1.5e-5, atol=0)


def test_layouts(device):
    z, directions = torch.randn(2, 33, 12), sigreg_directions(7, 12).to(device)
    z, upstream = z.to(device), torch.randn(7)
    transposed = z.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = with_gradient(z, upstream, directions=directions, reduction="none")
    for x, a in (
        (transposed, directions),
        (torch.cat([z, z], 2)[..., 12:], directions),
        (z, directions.T.contiguous().T),
        (z, directions.double()),
    ):
        found = with_gradient(x, upstream, directions=a, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_rows_changes_rounding_alone(device):
    z, order, upstream = torch.randn(1000, 16, device=device), torch.randperm(1000), torch.randn(7)
    value, dz = with_gradient(z, upstream, **EACH)
    other, dother = with_gradient(z[order], upstream, **EACH)
    torch.testing.assert_close(other, value, rtol=1e-5, atol=0)
    torch.testing.assert_close(dother, dz[order], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------- directions


def test_directions_are_uniform_on_the_sphere(device):
    S = 6000
    error = 5 / S**0.5  # standard errors of a mean of numbers of variance 1
    for dim in (1, 2, 3, 7, 64):
        a = sigreg_directions(S, dim, seed=dim, device=device).cpu().double()
        torch.testing.assert_close(a.norm(dim=0), torch.ones(S).double(), rtol=0, atol=1e-6)
        assert (a.mean(1).abs() < error / dim**0.5).all()
        assert ((a @ a.T / S - torch.eye(dim) / dim).abs() < 1.5 * error / dim).all()
        fourth = 3 / (dim * (dim + 2))
        assert ((a**4).mean(1) - fourth).abs().max() < 4 * error * fourth
        assert (a[:, 1:] * a[:, :-1]).sum(0).mean().abs() < error / dim**0.5  # with the next one
        if dim == 3:  # each coordinate is uniform on [-1, 1] (Archimedes); Kolmogorov's test
            place = (a.sort(dim=1).values + 1) / 2
            assert (place - torch.linspace(0, 1, S)).abs().max() < 1.9 / S**0.5


def test_directions_are_a_function_of_seed_step_slice_and_dimension(device):
    def directions(S=9, D=10, seed=5, step=3):
        return sigreg_directions(S, D, seed=seed, step=step, device=device)

    a = directions()
    assert a.shape == (10, 9) and a.dtype == torch.float32
    assert torch.equal(a, directions()) and torch.equal(a[:, :4], directions(S=4))
    shorter = a[:7] / a[:7].norm(dim=0)
    torch.testing.assert_close(directions(D=7), shorter, rtol=0, atol=3e-7)
    step = torch.tensor(3, device=device)
    assert torch.equal(a, directions(step=step)) and torch.equal(a, directions(step=step.view(1)))
    for seed, step in (0, 3), (5, 4), (3, 5), (5 + 2**40, 3), (-5, 3), (5, 3 + 2**32), (5, 2**55):
        assert (a.T @ directions(seed=seed, step=step)).abs().max() < 0.97, (seed, step)
    assert ((a.T @ a).abs() > 0.97).sum() == 9


@compiled
@pytest.mark.parametrize("S,D", [(1, 1), (5, 3), (300, 130)])
def test_directions_by_kernel_and_reference(S, D):
    for seed, step in ((0, 0), (-1, 7), (2**63 - 1, 2**56 - 1)):
        expected = sigreg_directions_ref(torch.tensor(step), seed, S, D)
        got = sigreg_directions(S, D, seed=seed, step=step)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_every_step_takes_other_directions():
    z = torch.randn(30, 5)
    own = sigreg(z, directions=sigreg_directions(6, 5, seed=2, step=9))
    assert torch.equal(sigreg(z, num_slices=6, seed=2, step=9), own)
    assert torch.equal(sigreg(z, num_slices=6, seed=2, step=torch.tensor(9)), own)
    assert not torch.equal(sigreg(z, num_slices=6, seed=2, step=10), own)


# ------------------------------------------------------------------------------ manners of an op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["cpu", gpu])
def test_opcheck_and_repeat(dtype, where):
    z, directions = torch.randn(2, 9, 5).to(where, dtype), torch.randn(5, 7, device=where)
    series = torch.randn(2, 2, 4, 7, device=where)
    for op, args in (
        (ops.sigreg_fwd, (z, directions, 0.3, 4)),
        (ops.sigreg_fwd, (z, directions, 0.3, 4, torch.tensor([2, 0], device=where))),
        (ops.sigreg_bwd, (z, directions, series, 0.3)),
        (ops.sigreg_directions, (torch.tensor(3, device=where), 1, 7, 5)),
    ):  # fmt: skip
        torch.library.opcheck(op.default, args)
        assert torch.equal(op(*args), op(*args))


def test_compiles_without_a_graph_break():
    z, masks = torch.randn(2, 9, 5), (None, torch.rand(2, 9) < 0.8)
    graph = torch.compile(sigreg, fullgraph=True, backend="aot_eager")
    for mask in masks:
        for step in (torch.tensor(3), torch.tensor(4)):
            options = {"num_slices": 8, "step": step, "mask": mask, "clip": 0.1}
            got = with_gradient(z, 1, graph, **options)
            torch.testing.assert_close(got, with_gradient(z, 1, **options))


@compiled
@pytest.mark.parametrize("N,D,S", [(2100, 40, 200), (5, 512, 1024)])
def test_threads_change_the_rounding_of_products_alone(N, D, S):
    before, z, found = torch.get_num_threads(), torch.randn(N, D), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradient(z, 1, num_slices=S))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_autocast_has_no_effect(device):
    z = torch.randn(20, 30, device=device)
    with torch.autocast(device, torch.bfloat16):
        inside = with_gradient(z, 1, num_slices=16)
    assert all(map(torch.equal, inside, with_gradient(z, 1, num_slices=16)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_what_is_not_a_number_stays_in_its_place(bad, clip, device):
    z = torch.randn(3, 20, 4, device=device)
    fine = with_gradient(z, 1, **EACH)
    z[1, 7, 2] = bad
    value, dz = with_gradient(z, 1, clip=clip, **EACH)
    assert value[1].isnan().all() and torch.equal(value[[0, 2]], fine[0][[0, 2]])
    assert dz[1].isnan().any() and torch.equal(dz[[0, 2]], fine[1][[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(dtype, device):
    for size in (0.0, 1e-30, 1e8, 1e30):
        z = (size * torch.randn(50, 4)).to(device, dtype)
        value, dz = with_gradient(z, 1, num_slices=6)
        assert value.isfinite() and value > 0 and dz.isfinite().all(), size
    directions, series = torch.randn(4, 3, device=device), torch.randn(1, 2, 5, 3, device=device)
    assert not ops.sigreg_fwd(z[None, :0], directions, 0.3, 5).any()
    assert ops.sigreg_bwd(z[None, :0], directions, series, 0.3).shape == (1, 0, 4)


ERRORS = [
    (lambda z: sigreg(z.int()), "sigreg: z must be a float32.*got torch.int32"),
    (lambda z: sigreg(z[0]), r"z must be \(..., N, D\) with at least one row.*got \(4,\)"),
    (lambda z: sigreg(z[:0]), r"at least one row and column, got \(0, 4\). Skip empty batches"),
    (lambda z: sigreg(z[:, :0]), r"got \(3, 0\)"),
    (lambda z: sigreg(z.expand(0, 3, 4)), r"got \(0, 3, 4\)"),
    (lambda z: sigreg(z, t_max=0), "t_max must be a positive number, got 0"),
    (lambda z: sigreg(z, t_max=math.inf), "t_max must be a positive number, got inf"),
    (lambda z: sigreg(z, target_std=-1), "target_std must be a positive number, got -1"),
    (lambda z: sigreg(z, target_std=None), "target_std must be a positive number, got None"),
    (lambda z: sigreg(z, knots=16), "knots must be an odd integer >= 3, got 16. Typical"),
    (lambda z: sigreg(z, knots=1), "knots must be an odd integer >= 3, got 1"),
    (lambda z: sigreg(z, knots=17.0), "knots must be an odd integer >= 3, got 17.0"),
    (lambda z: sigreg(z, num_slices=0), "num_slices must be an integer >= 1, got 0"),
    (lambda z: sigreg(z, step=torch.ones(1)), r"step must be one int64.*torch.float32 \(1,\)"),
    (
        lambda z: sigreg(z, directions=z),
        r"directions must be .* with z's D=4 and S >= 1, got \(3, 4\)",
    ),
    (lambda z: sigreg(z, directions=[1]), r"directions must be \(D, S\).* got \[1\]"),
    (lambda z: sigreg(z, mask=z > 0), r"bool tensor of shape \(3,\).*\(torch.bool, \(3, 4\)\)"),
    (lambda z: sigreg(z, mask=torch.ones(3)), r"mask must be a bool.*\(torch.float32, \(3,\)\)"),
    (lambda z: sigreg(z, mask=[True]), r"mask must be a bool tensor.* got \[True\]"),
    (lambda z: sigreg(z, reduction="avg"), "got 'avg'"),
    (lambda z: sigreg_directions(2, 0), "sigreg_directions: dim must be an integer >= 1, got 0"),
    (lambda z: sigreg_directions(2.0, 3), "num_slices must be an integer >= 1, got 2.0"),
    (lambda z: sigreg_directions(2, 3, step=torch.ones(2, dtype=torch.int64)), r"got.*\(2,\)"),
]


@pytest.mark.parametrize("call, text", ERRORS)
def test_error_messages(call, text):
    with pytest.raises(TypeError if "int32" in text else ValueError, match=text):
        call(torch.randn(3, 4))


@compiled
def test_memory():
    """In a fresh process: far below the 16 MiB of N x S projections."""
    case = Case(
        "sigreg", "sigreg", (("V", 1), ("N", 4096), ("M", 1024), ("D", 64)), "float32", "cpu"
    )
    assert peak_alone(case, "ours") < 4


# --------------------------------------------------------------------------------- several ranks


def on_rank(group, sizes):
    first = sum(sizes[: group.rank()])
    own = slice(first, first + sizes[group.rank()])
    z, upstream = torch.randn(2, sum(sizes), 5, dtype=torch.float64), torch.randn(())
    mask, found = torch.rand(z.shape[:-1]) < 0.7, []
    for options in {}, {"mask": mask}, {"mask": mask, "reduction": "sum", "clip": 1.0}:
        options = options | {"num_slices": 6}
        true, dtrue = with_gradient(z, upstream, group=fastssl.LOCAL, **options)
        if "mask" in options:
            options["mask"] = mask[:, own]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            got = with_gradient(z[:, own].to(dtype), upstream, group=group, **options)
            expected = true.to(dtype), len(sizes) * dtrue[:, own].to(dtype)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            found.append(got[0])
    return found


@pytest.mark.parametrize("sizes", [(5,), (7, 3), (4, 0, 6), (2, 1, 3, 5)])
def test_over_ranks_as_in_one_process(sizes, ranks):
    values = ranks.run(on_rank, len(sizes), sizes)
    for other in values[1:]:
        assert all(map(torch.equal, other, values[0])), "the value must be equal on all ranks"


class Collectives(TorchDispatchMode):
    """Those called under it: the name, and how many numbers go in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace and function._opname != "wait_tensor":
            self.calls.append((function._opname, args[0].numel()))
        return function(*args, **(kwargs or {}))


def collectives_of_a_step(group):
    with Collectives() as forward:
        value = sigreg(torch.randn(2, 3, 5, requires_grad=True), num_slices=6, group=group)
    with Collectives() as backward:
        value.backward()
    return forward.calls, backward.calls


def test_one_collective_besides_the_agreement_and_none_in_the_backward(ranks):
    for forward, backward in ranks.run(collectives_of_a_step, 2):
        assert [name for name, _ in forward] == ["all_gather_into_tensor", "all_reduce"]
        assert forward[1][1] == 2 * (2 * 16 * 6 + 1)  # each leading index: sums and a count
        assert backward == []


def without_rows_and_that_differ(group):
    r, z = group.rank(), torch.randn(2, 3, 4)
    value, dz = with_gradient(z[:, :0], 1, num_slices=3, group=group)
    assert value == 0 and dz.shape == (2, 0, 4)
    for label, x, options in (
        ("leading dimensions", z[: 1 + r], {}),
        ("width, slices and knots", z, {"knots": 5 + 2 * r}),
        ("dtype", z.half() if r else z, {}),
        ("t_max and target_std", z, {"t_max": 3 + r}),
        ("seed", z, {"seed": r}),
        ("step", z, {"step": r}),
        ("checksum of the directions", z, {"step": torch.tensor(r)}),
        ("reduction and clip", z, {"reduction": "sum" if r else "mean"}),
    ):
        with pytest.raises(ValueError, match=f"sigreg: .*{label}.*must be the same on all ranks"):
            sigreg(x, num_slices=3, group=group, **options)


def test_ranks_without_rows_and_ranks_that_differ(ranks):
    ranks.run(without_rows_and_that_differ, 2)
