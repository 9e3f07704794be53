"""The Triton kernels of `render_views` against the reference, on a GPU or interpreted."""

import math

import pytest
import torch
from fastssl.kernels import augment as kernels
from triton_cases import DEVICE, dtypes, no_worse

from fastssl.ops.augment import (
    ANGLE,
    BRIGHTNESS,
    CONTRAST,
    FIRST,
    FLIP,
    FOURTH,
    GRAY,
    HUE,
    NOISE,
    PARAMS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TURNS,
    X0,
    X1,
    Y0,
    Y1,
    render_views,
    render_views_ref,
)

# Squares of a tile outside the view come to nothing by way of 0 / 0, of which NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NONE = -1.0
ALL = {BRIGHTNESS: 1.3, CONTRAST: 0.6, SATURATION: 1.5, HUE: 0.1}


def order(*operations):
    return dict(zip(range(FIRST, FOURTH + 1), [*operations, NONE, NONE, NONE, NONE], strict=False))


def rows(H, W, *views):
    """(M, PARAMS): the whole image, but for what the dicts say."""
    params = torch.zeros(len(views), PARAMS)
    params[:, X1], params[:, Y1], params[:, FIRST:GRAY], params[:, SOLARIZE] = W, H, NONE, 2
    params[:, BRIGHTNESS:HUE] = 1
    for row, view in zip(params, views, strict=True):
        for column, value in view.items():
            row[column] = value
    return params


def images(count, C, H, W, floats=False):
    x = torch.randint(0, 256, (count, C, H, W), dtype=torch.uint8)
    return x / 255 if floats else x


def arguments(x, params, size, *, sizes=None, source=None, key=None, **options):
    """Those of the op. x (B, C, H, W) or a list of (C, H, W)."""
    C, shapes = x[0].shape[0], torch.tensor([i.shape[1:] for i in x])
    lengths = torch.tensor([0] + [i.numel() for i in x])
    source = torch.arange(len(params)) % len(x) if source is None else torch.tensor(source)
    given = {"bicubic": False, "antialias": True, "mean": [0.3] * C, "std": [0.25] * C,
             "dtype": torch.float32, "channels_last": False} | options  # fmt: skip
    pixels = torch.cat([i.flatten() for i in x])
    return [pixels, lengths.cumsum(0)[:-1], shapes, source, params, C, size, *given.values(), key]


def on_device(args):
    return [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]


def agree(*given, **options):
    args = arguments(*given, **options)
    got = kernels.render_views(*on_device(args)).cpu()
    plain = render_views_ref(*args)
    dtype = args.index(plain.dtype)
    exact = render_views_ref(*args[:dtype], torch.float64, *args[dtype + 1 :])
    layout = torch.channels_last if args[dtype + 1] else torch.contiguous_format
    assert got.dtype == plain.dtype and got.is_contiguous(memory_format=layout)
    for m in range(len(got)):
        no_worse(f"view {m}", got[m], exact[m], plain[m], magnitude=1 / min(args[dtype - 1]))
    return got


# Inverted from 0.5 on, a value that rounding moves over the threshold stays where it was.
OPERATIONS = [
    {X0: 3.3, Y0: 2.1, X1: 11.7, Y1: 16.2, FLIP: 1},
    order(0) | {BRIGHTNESS: 1.4},
    order(1) | {CONTRAST: 0.4},
    order(2) | {SATURATION: 0.3},
    order(3) | {HUE: -0.13},
    order(2, 0, 1, 3) | ALL,
    order(1, 3, 2, 0) | ALL | {GRAY: 1, SIGMA: 0.6, SOLARIZE: 0.5},
    {GRAY: 1},
    {SIGMA: 1.7, TURNS: 1},
    {SOLARIZE: 0.5},
    {ANGLE: 0.4, X0: 2, FLIP: 1},
]


# On a GPU each size, dtype and layout is compiled anew: the tests share a few.
@dtypes
def test_every_operation(dtype):
    views = rows(20, 24, *OPERATIONS)
    agree(images(2, 3, 20, 24), views, 33, dtype=dtype, channels_last=dtype != torch.float32)


def test_every_operation_on_float_images():
    agree(images(2, 3, 20, 24, True), rows(20, 24, *OPERATIONS), 8)


def test_a_view_of_imagenet():
    simclr = order(3, 0, 1, 2) | ALL | {SIGMA: 1.3, FLIP: 1}
    agree(images(1, 3, 40, 40), rows(40, 40, simclr), 224)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("bicubic", [False, True])
def test_filters(bicubic, antialias):
    """Shrunk and enlarged, of crops that reach outside or lie within a pixel."""
    crops = [
        (0, 0, 24, 20), (0.4, 3.7, 23.1, 9.2), (-5, -3.5, 31, 40), (7.2, 4.6, 7.4, 4.7),
        (30, -9, 40, -2), (0, 19, 24, 20),
    ]  # fmt: skip
    views = rows(20, 24, *(dict(zip((X0, Y0, X1, Y1), crop, strict=True)) for crop in crops))
    agree(images(1, 3, 20, 24, True), views, 8, bicubic=bicubic, antialias=antialias)


def test_turns_and_flips():
    """And rotation, by angles of every quadrant."""
    views = [{TURNS: t, FLIP: f, X1: 13.5} for t in range(4) for f in range(2)]
    views += [{ANGLE: a, TURNS: 1} for a in (-3, -1.7, 0.8, math.pi / 2, 9)]
    agree(images(1, 1, 14, 19), rows(14, 19, *views), 8)


@pytest.mark.parametrize("C, size, channels_last", [(1, 8, True), (4, 33, False), (4, 8, True)])
def test_images_of_other_channels(C, size, channels_last):
    """Contrast is about the mean of all; what needs colours is left out."""
    views = rows(9, 7, order(2, 1, 3, 0) | ALL | {GRAY: 1}, {SIGMA: 0.8}, {SOLARIZE: 0.5})
    norm = {"mean": [0.1 * c for c in range(C)], "std": [0.2 + c for c in range(C)]}
    agree(images(2, C, 9, 7), views, size, channels_last=channels_last, **norm)


def test_packed_images_and_what_bits_depend_on():
    x = [images(1, 3, h, w)[0] for h, w in ((1, 1), (31, 5), (9, 30))]
    source = [1, 0, 2, 1, 1]
    views = torch.cat([
        rows(*x[b].shape[1:], view)
        for b, view in zip(source, [{}, {SIGMA: 1}, order(1) | ALL, {FLIP: 1}, ALL], strict=True)
    ])  # fmt: skip
    got = agree(x, views, 33, source=source)
    for m, b in enumerate(source):
        alone = kernels.render_views(*on_device(arguments([x[b]], views[m : m + 1], 33)))
        assert torch.equal(alone[0].cpu(), got[m])
    empty = arguments(x, views[:0], 33, source=[])
    assert kernels.render_views(*on_device(empty)).shape == (0, 3, 33, 33)


def test_one_pixel():
    view = order(1, 0) | ALL | {SIGMA: 2}
    agree(images(1, 3, 5, 4), rows(5, 4, view), 1)


def test_solarize_at_the_threshold():
    """Of an image that is copied."""
    x = torch.arange(192).view(1, 3, 8, 8) / 192
    views = rows(8, 8, {SOLARIZE: 100 / 192})
    args = arguments(x, views, 8, mean=[0.0] * 3, std=[1.0] * 3)
    x = torch.where(x >= torch.tensor(100 / 192), 1 - x, x)
    assert torch.equal(kernels.render_views(*on_device(args)).cpu(), x)
    x = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)  # weights of a crop round
    views = rows(8, 8, {X0: 0.3, X1: 7.1, Y0: -2, SOLARIZE: 200 / 255})
    args = arguments(x, views, 8, mean=[0.0] * 3, std=[1.0] * 3)
    x = torch.full((1, 3, 8, 8), 55 / 255)
    torch.testing.assert_close(kernels.render_views(*on_device(args)).cpu(), x, atol=1e-6, rtol=0)


def test_noise():
    key = torch.tensor([[7, 3, 1, 5], [2**40 + 9, 2**32 - 1, 255, 2**61 + 3], [7, 3, 1, 5]])
    views = rows(8, 8, {NOISE: 0.1}, {NOISE: 0.2, SIGMA: 0.7}, order(1) | ALL | {NOISE: 0.3})
    agree(images(3, 3, 8, 8), views, 8, key=key)
    agree(images(3, 1, 8, 8), views, 8, key=key)


@pytest.mark.parametrize("size", [8, 33])
def test_nan_stays_where_it_reaches(size):
    """Not further, though products of the blur take in whole squares."""
    x = images(1, 3, 12, 12, True)
    x[0, 1, 3, 9] = torch.nan
    views = rows(12, 12, {}, {SIGMA: 0.5, X1: 7.0}, {SIGMA: 0.5}, order(3) | ALL, order(1) | ALL)
    got = agree(x, views, size)
    assert not got[1].isnan().any() and not got[2, 0].isnan().any()
    assert 0 < got[2, 1].isnan().float().mean() < 0.5


def test_what_is_impossible_is_nan():
    crops = [{X1: 0.0}, {X0: math.inf}, {Y1: 2.0**21}, {Y0: math.nan}, {ANGLE: math.inf}]
    views = rows(6, 6, {}, *crops, {NOISE: 0.1}, order(1, 0, 1), {}, {}, {}, {})
    args = arguments(images(3, 3, 6, 6, True), views, 8, source=[0] * 8 + [1, 2, 3, -1])
    args[1][1], args[2][2, 0] = -1, 7
    got = kernels.render_views(*on_device(args)).cpu()
    assert got[0].isfinite().all() and got[1:].isnan().all()


def test_views_that_are_too_large():
    args = arguments(images(1, 3, 2, 2), rows(2, 2, {}), 30000)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements, got 3 x 30000 x 30000"):
        kernels.render_views(*args)


@pytest.mark.gpu
def test_graphs_replay_views():
    """Nothing of the parameters is known on the host."""
    x = images(4, 3, 40, 40).cuda()
    params = rows(40, 40, {}, {}, {}, {}).cuda()
    render_views(x, params, 33)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = render_views(x, params, 33)
    params.copy_(rows(40, 40, {SIGMA: 1}, order(1) | ALL, {FLIP: 1}, ALL | order(3, 1, 0)))
    graph.replay()
    assert torch.equal(got, render_views(x, params, 33))
