"""The Triton kernels of `sigreg` against the fp64 reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import sigreg as kernels
from triton_cases import DEVICE, dtypes, no_worse, same_bits

from fastssl.ops.sigreg import (
    knot_weights,
    sigreg_bwd_ref,
    sigreg_directions_ref,
    sigreg_fwd_ref,
)


def problem(G, N, D, S, dtype=torch.float32, scale=1.0):
    z = (scale * torch.randn(G, N, D, device=DEVICE)).to(dtype)
    directions = torch.randn(D, S, device=DEVICE)
    return z, directions / directions.norm(dim=0)


def statistic(sums, N, knots, t_max=3.0):
    sums = sums.double()
    weight = knot_weights(knots, t_max, sums)[2]
    return torch.einsum("k,gcks->gs", weight[1:], sums.square()) / N


def check(z, directions, spacing=3 / 16, knots=16):
    """Sums and gradient, no worse than plain torch's."""
    exact, N = (z.double(), directions.double()), z.shape[1]
    got = kernels.sigreg_fwd(z, directions, spacing, knots)
    plain = sigreg_fwd_ref(z, directions, spacing, knots)
    assert got.dtype == torch.float32
    # Terms are up to 1, and the angle of the last knot is knots times the first one's.
    size = N**0.5 * max(1, knots / 16)
    no_worse("sums", got, sigreg_fwd_ref(*exact, spacing, knots), plain, magnitude=size)
    torch.manual_seed(1)
    series = torch.randn_like(got) / N
    gradient = kernels.sigreg_bwd(z, directions, series, spacing)
    assert gradient.dtype == z.dtype and gradient.shape == z.shape
    plain = sigreg_bwd_ref(z, directions, series, spacing)
    true = sigreg_bwd_ref(*exact, series.double(), spacing)
    no_worse("gradient", gradient, true, plain, 3.0)
    return got, gradient


# ------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize("S, D", [(1, 1), (5, 7), (9, 64), (20, 131), (3, 600)])
@pytest.mark.parametrize("step, seed", [(0, 0), (3, -5), ((5 << 32) + 7, (3 << 45) + 3)])
def test_directions(step, seed, S, D):
    step = torch.tensor(step, device=DEVICE)
    got = kernels.sigreg_directions(step, seed, S, D)
    true = sigreg_directions_ref(step, seed, S, D)
    assert got.shape == true.shape and (got - true).abs().max() <= 1e-6


# ---------------------------------------------------------------------------------- the statistic


@pytest.mark.parametrize("N", [1, 7, 256])
def test_statistic(N):
    z, directions = problem(1, N, 16, 33)
    got = statistic(kernels.sigreg_fwd(z, directions, 3 / 16, 16), N, 17)
    true = statistic(sigreg_fwd_ref(z.double(), directions.double(), 3 / 16, 16), N, 17)
    assert ((got - true).abs() <= 1e-5 * true).all()
    assert (got.mean() - true.mean()).abs() <= 1e-6 * true.mean()


@pytest.mark.parametrize("spacing", [3 / 16, 0.7])
@pytest.mark.parametrize("largest", [10, 1000])
def test_large_projections(largest, spacing):
    """On the kernel's own projections, whose rounding matters more the larger they are."""
    z, directions = problem(1, 64, 8, 20)
    z *= largest / (z @ directions).abs().max()
    p = kernels.projections(z, directions)
    assert (p.double() - z.double() @ directions.double()).abs().max() <= 3e-7 * largest
    got = kernels.sigreg_fwd(z, directions, spacing, 16)
    true = sigreg_fwd_ref(p.double(), torch.eye(20, device=DEVICE).double(), spacing, 16)
    assert (got - true).abs().max() <= 3e-5
    got, true = statistic(got, 64, 17), statistic(true, 64, 17)
    assert ((got - true).abs() <= 1e-5 * true).all()
    assert (got.mean() - true.mean()).abs() <= 1e-6 * true.mean()


def test_sums_of_many_rows():
    """300 spans of 256 rows near the null: nothing is left of sums that fp32 adds up."""
    _, phi, _ = knot_weights(17, 3.0, torch.empty(0, dtype=torch.float64, device=DEVICE))
    rest = torch.randn(300, 1, 2, 16, 3, device=DEVICE)
    rest[:, :, 0] += 256 * phi[1:, None].float()
    true = rest.double().sum(0)
    true[:, 0] -= 300 * 256 * phi[1:, None]
    assert (kernels.merged(rest, 300 * 256, 3 / 16) - true).abs().max() <= 1e-5


def test_rows_left_out():
    z, directions = problem(2, 20, 4, 8)
    z[0, :15] = 0
    left_out = torch.tensor([15, 0], device=DEVICE)
    got = kernels.sigreg_fwd(z, directions, 3 / 16, 16, left_out)
    true = sigreg_fwd_ref(z[:1, 15:].double(), directions.double(), 3 / 16, 16)
    torch.testing.assert_close(got[:1].double(), true, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1:], kernels.sigreg_fwd(z, directions, 3 / 16, 16)[1:])


@pytest.mark.parametrize("largest", [1e5, 1e9, 1e30])
def test_out_of_reach(largest):
    """Angles mean nothing there, but no element may weigh more than 1."""
    z, directions = problem(1, 20, 4, 8, scale=largest)
    sums = kernels.sigreg_fwd(z, directions, 3 / 16, 16)
    series = torch.ones(1, 2, 16, 8, device=DEVICE)
    gradient = kernels.sigreg_bwd(z, directions, series, 3 / 16)
    sums[:, 0] += 20 * knot_weights(17, 3.0, sums)[1][1:, None]
    assert (sums.abs() <= 20 * (1 + 1e-5)).all()
    assert (gradient.abs().sum(2) <= 8 * 16 * 2 * 4**0.5).all()


# --------------------------------------------------------------------- sums, gradients and layouts


@dtypes
@pytest.mark.parametrize(
    "G, N, D, S",
    [(1, 1, 1, 1), (2, 2, 3, 5), (1, 33, 17, 70), (3, 9, 70, 7), (1, 40, 70, 65), (2, 3, 2048, 4)],
)
def test_sizes(G, N, D, S, dtype):
    check(*problem(G, N, D, S, dtype))


@pytest.mark.parametrize("knots", [1, 2, 4, 7, 8, 17, 18, 40])
def test_knots(knots):
    """Before the first anchor, at the edges of anchors and launches; of T = 3, 5, 9, 41."""
    check(*problem(2, 11, 6, 9), 3 / knots, knots)


@dtypes
@pytest.mark.parametrize("programs", [1, 100])
def test_splits(programs, dtype, monkeypatch):
    """Rows in one span and in many, the gradient's product in one piece and in several."""
    spans = []

    def splits_of(x, rows, columns, groups, known):
        tiles = -(-columns // known["BLOCK_M"])
        each = -(-tiles // programs)
        spans.append(each)
        blocks = groups * -(-rows // known["BLOCK_N"])
        return blocks, -(-tiles // each), each * known["BLOCK_M"]

    monkeypatch.setattr(kernels, "splits_of", splits_of)
    monkeypatch.setattr(kernels, "ROWS_A_LANE", 5)
    check(*problem(1, 60, 5, 40, dtype))
    assert (max(spans) > 5) == (programs == 1) and (min(spans) == 1) == (programs == 100)


@dtypes
def test_layouts(dtype):
    z, directions = problem(2, 9, 20, 18, dtype)
    expected = check(z, directions, 3 / 4, 4)
    for other in (
        z.transpose(0, 1).contiguous().transpose(0, 1),
        z.mT.contiguous().mT,
        torch.cat([z, z], 2)[:, :, 20:],
        z.repeat_interleave(2, 1)[:, ::2],
    ):
        for got, want in zip(check(other, directions, 3 / 4, 4), expected, strict=True):
            assert torch.equal(got, want)
    check(z[:1].expand(2, 9, 20), directions.T.contiguous().T, 3 / 4, 4)


@dtypes
def test_gradient_keeps_the_series_apart(dtype):
    """Each a_k and b_k by itself: an error in one of 32 does not hide behind the others."""
    z, directions = problem(1, 4, 3, 32, dtype)
    series = torch.eye(32, device=DEVICE).view(1, 2, 16, 32)  # slice s has coefficient s alone
    flat = kernels.sigreg_bwd(z, directions, series, 3 / 16)
    true = sigreg_bwd_ref(z.double(), directions.double(), series.double(), 3 / 16)
    no_worse("gradient", flat, true, sigreg_bwd_ref(z, directions, series, 3 / 16), 3.0)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@dtypes
def test_what_is_not_finite(dtype):
    z, directions = problem(3, 9, 6, 10, dtype)
    clean = kernels.sigreg_fwd(z, directions, 3 / 4, 4)
    series = torch.randn_like(clean)
    finite = kernels.sigreg_bwd(z, directions, series, 3 / 4)
    for bad in (torch.nan, torch.inf):
        z[1, 7, 2] = bad
        sums = kernels.sigreg_fwd(z, directions, 3 / 4, 4)
        assert sums[1].isnan().all() and torch.equal(sums[::2], clean[::2])
        gradient = kernels.sigreg_bwd(z, directions, series, 3 / 4)
        assert gradient[1, 7].isnan().all()
        gradient[1, 7] = finite[1, 7]
        assert torch.equal(gradient, finite)
    # The NaN that GPUs make, all of whose bits are set: rounding could make a number of it.
    series[2, 1, 1, 3].view(torch.int32).fill_(0x7FFFFFFF)
    gradient = kernels.sigreg_bwd(z, directions, series, 3 / 4)
    assert gradient[2].isnan().all() and torch.equal(gradient[0], finite[0])


@dtypes
def test_nothing_to_sum(dtype):
    z, directions = problem(2, 4, 6, 3, dtype)
    assert torch.equal(
        kernels.sigreg_fwd(z[:, :0], directions, 0.1, 4),
        torch.zeros(2, 2, 4, 3, device=DEVICE),
    )
    series = torch.ones(2, 2, 4, 3, device=DEVICE)
    assert kernels.sigreg_bwd(z[:, :0], directions, series, 0.1).shape == (2, 0, 6)
    assert kernels.sigreg_fwd(z, directions[:, :0], 0.1, 4).shape == (2, 2, 4, 0)
    none = kernels.sigreg_bwd(z, directions[:, :0], series[..., :0], 0.1)
    assert torch.equal(none, torch.zeros_like(z))


@dtypes
def test_repeats_to_the_bit(dtype):
    z, directions = problem(1, 30, 10, 20, dtype)
    series = torch.randn(1, 2, 16, 20, device=DEVICE)
    assert same_bits(
        lambda: (
            kernels.sigreg_fwd(z, directions, 3 / 16, 16),
            kernels.sigreg_bwd(z, directions, series, 3 / 16),
        )
    )
