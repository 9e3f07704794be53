"""The parameters of views: the kernel against the reference, and their distributions against
torchvision's draws and closed forms."""

import math

import pytest
import torch

from fastssl.augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    RandomResizedCrop,
    Resize,
    Rotate,
    Rotate90,
    Solarize,
    Translate,
    View,
    dino,
    small,
    xray,
)
from fastssl.ops.augment import (
    ANGLE,
    BRIGHTNESS,
    FIRST,
    FLIP,
    GRAY,
    HUE,
    NOISE,
    PARAMS,
    SIGMA,
    SOLARIZE,
    TURNS,
    Y1,
)
from fastssl.ops.view_parameters import SPEC, view_parameters_ref

op = torch.ops.fastssl.view_parameters
COUNT = 4000


def spec_of(*views):
    return torch.tensor([view.numbers() for view in views], dtype=torch.float64)


def drawn(view, size=(200, 300), count=COUNT, seed=0):
    """(count, PARAMS) float64 of one view of images of one size."""
    sizes = torch.tensor([size]).repeat(count, 1)
    return op(torch.arange(count), sizes, spec_of(view), seed, 0)[0].double()


def same_law(values, expected):
    """Kolmogorov and Smirnov, against a sample or a distribution function; seeds are fixed."""
    stats = pytest.importorskip("scipy.stats")
    if callable(expected):
        test = stats.kstest(values.numpy(), expected)
    else:
        test = stats.ks_2samp(values.numpy(), expected.numpy())
    assert test.pvalue > 1e-4, test


def uniform_law(low, high):
    return lambda x: ((x - low) / (high - low)).clip(0, 1)


MANY = (
    *dino(32, 16, local_views=1),
    small(8, 1),
    xray(),
    View(Resize(8), Rotate90(0.5)),
    View(RandomResizedCrop(9, scale=(1, 1), ratio=(1, 1)), Translate(0.3)),
    View(RandomResizedCrop(9, ratio=(0.1, 0.3))),
    View(RandomResizedCrop(9, ratio=(3, 9)), ColorJitter((0.5, 2), 0, 0, (0.1, 0.2))),
)


@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**63 - 1])
def test_the_kernel_gives_the_bits_of_the_reference(seed):
    """fp64 whose last bit may differ, rounded to fp32: equal but once in some 2^28 numbers."""
    index = torch.randint(0, 2**56, (300,))
    sizes = torch.cat((torch.randint(1, 5, (100, 2)), torch.randint(1, 900, (200, 2))))
    for epoch in (0, 2**32 - 1):
        got = op(index, sizes, spec_of(*MANY), seed, epoch)
        assert torch.equal(got, view_parameters_ref(index, sizes, spec_of(*MANY), seed, epoch))
        assert not got.isnan().any()


def test_boxes_are_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    for (H, W), scale, ratio in (
        ((200, 300), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((300, 100), (0.5, 1.0), (3 / 4, 4 / 3)),  # often without a try that fits
        ((7, 9), (0.2, 0.6), (0.5, 2.0)),
    ):
        peer = transforms.RandomResizedCrop(8, scale=scale, ratio=ratio)
        image = torch.zeros(1, H, W)
        box = [peer.make_params([image]) for _ in range(COUNT)]
        y0, x0, h, w = (
            torch.tensor([b[k] for b in box], dtype=torch.float64)
            for k in ("top", "left", "height", "width")
        )
        ours = drawn(View(RandomResizedCrop(8, scale, ratio)), (H, W))[:, : Y1 + 1]
        a0, b0, a1, b1 = ours.unbind(1)
        assert torch.equal(ours, ours.round()) and (a0 >= 0).all() and (b0 >= 0).all()
        assert (a1 <= W).all() and (b1 <= H).all() and (a1 > a0).all() and (b1 > b0).all()
        for got, expected in (
            (a0, x0), (b0, y0), (a1 - a0, w), (b1 - b0, h),
            ((a1 - a0) * (b1 - b0), w * h), ((a1 - a0) / (b1 - b0), w / h),
            (a0 + a1, x0 + x0 + w),
        ):  # fmt: skip
            same_law(got, expected)


def test_boxes_where_nothing_fits_and_of_tiny_images():
    crop = View(RandomResizedCrop(8, scale=(1, 1), ratio=(3 / 4, 4 / 3)))
    for size, box in (
        ((30, 60), [10, 0, 50, 30]), ((60, 30), [0, 10, 30, 50]), ((1, 1), [0, 0, 1, 1]),
        ((1, 9), [4, 0, 5, 1]), ((9, 1), [0, 4, 1, 5]),
    ):  # fmt: skip
        assert drawn(crop, size, 20)[:, : Y1 + 1].tolist() == [box] * 20
    narrow = View(RandomResizedCrop(8, scale=(1, 1), ratio=(0.1, 0.2)))
    assert drawn(narrow, (2, 5), 1)[0, : Y1 + 1].tolist() == [2, 0, 3, 2]  # of no pixel otherwise
    assert drawn(View(Resize(8)), (30, 60), 5)[:, : Y1 + 1].tolist() == [[0, 0, 60, 30]] * 5


def test_padded_boxes_reach_as_far_as_asked():
    view = View(RandomResizedCrop(8, scale=(0.25, 0.25), ratio=(1, 1), pad=0.5))
    x0, y0, x1, y1 = drawn(view, (100, 100))[:, : Y1 + 1].unbind(1)
    side = torch.full_like(x0, 100)
    torch.testing.assert_close(x1 - x0, side, atol=2e-5, rtol=0)
    torch.testing.assert_close(y1 - y0, side, atol=2e-5, rtol=0)
    same_law(x0, uniform_law(-50, 50))
    same_law(y0, uniform_law(-50, 50))


def test_translation_is_a_share_of_the_box():
    x0, y0, x1, y1 = drawn(View(Resize(8), Translate(0.1)), (50, 200))[:, : Y1 + 1].unbind(1)
    same_law(x0, uniform_law(-20, 20))
    same_law(y0, uniform_law(-5, 5))
    torch.testing.assert_close(x1 - x0, torch.full_like(x0, 200), atol=1e-4, rtol=0)
    assert abs(float(torch.corrcoef(torch.stack((x0, y0)))[0, 1])) < 0.06


def test_colours_are_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    settings = (0.8, 0.4, (0.5, 3.0), 0.2)
    peer = transforms.ColorJitter(*settings)
    draws = [peer.make_params([]) for _ in range(COUNT)]
    ours = drawn(View(Resize(8), ColorJitter(*settings)))
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for operation, name in enumerate(names):
        expected = torch.tensor([float(d[name]) for d in draws], dtype=torch.float64)
        same_law(ours[:, BRIGHTNESS + operation], expected)
    orders = ours[:, FIRST : FIRST + 4].long()
    assert orders.sort(1).values.unique(dim=0).tolist() == [[0, 1, 2, 3]]
    _, counts = orders.unique(dim=0, return_counts=True)
    chi2 = ((counts - COUNT / 24) ** 2 / (COUNT / 24)).sum()
    assert len(counts) == 24 and chi2 < 49.7  # 0.1 % of 23 degrees of freedom


def test_jitter_leaves_out_what_changes_nothing():
    p = drawn(View(Resize(8), ColorJitter(0.4, 0, 0, 0.1, p=0.5)))
    order = p[:, FIRST : FIRST + 4]
    drawn_rows = (order >= 0).any(1)
    assert set(order[drawn_rows].sort(1).values.unique(dim=0).flatten().tolist()) == {-1, 0, 3}
    assert (order[~drawn_rows] == -1).all()
    assert abs(drawn_rows.double().mean() - 0.5) < 0.03
    same_law(p[:, HUE], uniform_law(-0.1, 0.1))


@pytest.mark.parametrize(
    ("spec", "column", "on"),
    [
        (HorizontalFlip(0.3), FLIP, lambda x: x == 1),
        (Grayscale(0.3), GRAY, lambda x: x == 1),
        (Solarize(0.3, 0.25), SOLARIZE, lambda x: x == 0.25),
        (GaussianBlur(0.3), SIGMA, lambda x: x > 0),
        (Rotate90(0.4), TURNS, lambda x: x > 0),  # a quarter of the turns is by nothing
    ],
    ids=lambda x: type(x).__name__,
)
def test_probabilities(spec, column, on):
    happened = on(drawn(View(Resize(8), spec))[:, column]).double().mean()
    assert abs(happened - 0.3) < 4 * math.sqrt(0.3 * 0.7 / COUNT)
    assert not on(drawn(View(Resize(8)))[:, column]).any()


def test_other_distributions():
    p = drawn(View(Resize(8), Rotate(30), Rotate90(), GaussianBlur(1.0, (0.1, 3.0)), Noise(0.25)))
    same_law(p[:, ANGLE], uniform_law(-math.pi / 6, math.pi / 6))
    same_law(p[:, SIGMA], uniform_law(0.1, 3.0))
    counts = p[:, TURNS].long().bincount()
    assert len(counts) == 4 and (counts - COUNT / 4).abs().max() < 4 * math.sqrt(COUNT * 3 / 16)
    assert (p[:, NOISE] == 0.25).all()


def test_parameters_are_independent():
    """Of each other, of neighbouring samples, views and epochs."""
    view = View(
        RandomResizedCrop(8), Rotate(30), HorizontalFlip(), ColorJitter(0.8, 0.8, 0.8, 0.2),
        GaussianBlur(1.0), Solarize(0.5),
    )  # fmt: skip
    index, sizes = torch.arange(COUNT + 1), torch.tensor([[200, 200]]).repeat(COUNT + 1, 1)
    columns = [0, 1, ANGLE, FLIP, *range(BRIGHTNESS, HUE + 1), SIGMA, SOLARIZE]
    first, second = op(index, sizes, spec_of(view, view), 0, 0)[..., columns]
    later = op(index, sizes, spec_of(view), 0, 1)[0][..., columns]
    never = first[:, -1].isinf()
    assert abs(never.double().mean() - 0.5) < 0.05
    first, second, later = (x.nan_to_num(posinf=1) for x in (first, second, later))
    together = torch.cat((first[1:], first[:-1], second[1:], later[1:]), 1)
    correlation = torch.corrcoef(together.double().T).fill_diagonal_(0)
    for block in range(4):  # corners of one box go together, as both need a small box
        correlation[10 * block, 10 * block + 1] = correlation[10 * block + 1, 10 * block] = 0
    assert correlation.abs().max() < 5 / math.sqrt(COUNT)


def test_schema_and_fake():
    index, sizes = torch.arange(3), torch.tensor([[4, 5]]).repeat(3, 1)
    torch.library.opcheck(op, (index, sizes, spec_of(*MANY), 1, 2))
    assert op(index, sizes, spec_of(*MANY), 1, 2).shape == (len(MANY), 3, PARAMS)
    assert op(index[:0], sizes[:0], spec_of(*MANY), 1, 2).shape == (len(MANY), 0, PARAMS)
    run = torch.compile(lambda *args: op(*args), backend="eager", fullgraph=True)
    args = index, sizes, spec_of(small(8, 1)), 1, 2
    assert torch.equal(run(*args), op(*args)) and args[2].shape == (1, SPEC)
