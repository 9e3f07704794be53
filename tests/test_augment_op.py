"""`render_views` against torchvision on the same parameters, and its kernels against fp64."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_worse

import fastssl
from fastssl.ops import contrastive
from fastssl.ops.augment import (
    ANGLE,
    BRIGHTNESS,
    FIRST,
    FLIP,
    FOURTH,
    GRAY,
    HUE,
    NOISE,
    PARAMS,
    SIGMA,
    SOLARIZE,
    TURNS,
    X0,
    X1,
    Y1,
    render_views,
    render_views_ref,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEVEL = 1 / 255


def identity(M, H, W):
    """Parameters (M, PARAMS) that take the whole image as it is."""
    params = torch.zeros(M, PARAMS)
    params[:, X1], params[:, Y1] = W, H
    params[:, BRIGHTNESS:HUE] = 1
    params[:, FIRST : FOURTH + 1] = -1
    params[:, SOLARIZE] = torch.inf
    return params


def random_params(M, H, W, *, angle=False, noise=False):
    """Everything at once, crops reaching 3 pixels out of the image; no solarise, which jumps."""
    params = identity(M, H, W)
    low, high = torch.rand(M, 2, 2).sort(1).values.unbind(1)
    shape = torch.tensor([W, H])
    params[:, X0:X1] = low * (shape + 6) - 3
    params[:, X1 : Y1 + 1] = high * (shape + 6) - 2
    if angle:
        params[:, ANGLE] = torch.rand(M) - 0.5
    params[:, TURNS] = torch.arange(M) % 4
    params[:, FLIP] = torch.arange(M) // 4 % 2
    params[:, BRIGHTNESS:HUE] = 1.6 * torch.rand(M, 3) + 0.2
    params[:, HUE] = torch.rand(M) - 0.5
    order = torch.stack([torch.randperm(4) for _ in range(M)])
    params[:, FIRST : FOURTH + 1] = torch.where(torch.rand(M, 4) < 0.8, order, -1).float()
    params[:, GRAY] = (torch.rand(M) < 0.3).float()
    params[:, SIGMA] = torch.where(torch.rand(M) < 0.6, 2 * torch.rand(M) + 0.1, 0)
    if noise:
        params[:, NOISE] = 0.1
    return params


def random_images(B, C, H, W, dtype=torch.uint8):
    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8)
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def arguments(images, params, size, bicubic=False, antialias=True):
    """Of the raw op, up to dtype: view m is of image m % B."""
    B, C, H, W = images.shape
    return (
        images.reshape(-1), torch.arange(B) * (C * H * W), torch.tensor([[H, W]] * B),
        torch.arange(len(params)) % B, params, C, size, bicubic, antialias, [0.4] * C, [0.25] * C,
    )  # fmt: skip


def check(images, params, size, bicubic=False, antialias=True, device="cpu", key=None):
    args = arguments(images, params, size, bicubic, antialias)
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    there_key = None if key is None else key.to(device)
    got = torch.ops.fastssl.render_views(*there, torch.float32, False, there_key).cpu()
    ref64 = render_views_ref(*args, torch.float64, False, key)
    assert_no_worse(got, ref64, render_views_ref(*args, torch.float32, False, key))
    return got


# --------------------------------------------------------------------------- against torchvision


def torchvision():
    pytest.importorskip("torchvision")
    import torchvision.transforms.v2.functional as functional

    return functional


def modes():
    from torchvision.transforms import InterpolationMode

    return {False: InterpolationMode.BILINEAR, True: InterpolationMode.BICUBIC}


CROPS = [(0, 0, 40, 52), (3, 5, 30, 37), (7, 11, 1, 1), (0, 20, 40, 2), (39, 0, 1, 52)]


@pytest.mark.parametrize("size", [8, 32, 33, 64])
@pytest.mark.parametrize("box", CROPS)
def test_crops_are_torchvision_s(box, size):
    peer, (y, x, h, w) = torchvision(), box
    images = random_images(2, 3, 40, 52)
    params = identity(2, 40, 52)
    params[:, :ANGLE] = torch.tensor([x, y, x + w, y + h])
    expected = peer.resized_crop(images, y, x, h, w, [size, size], antialias=True)
    got = render_views(images, params, size)
    assert (got - expected / 255).abs().max() <= LEVEL
    for bicubic in (False, True):
        for antialias in (False, True):
            expected = peer.resized_crop(
                images / 255, y, x, h, w, [size, size], modes()[bicubic], antialias
            )
            got = render_views(
                images, params, size,
                interpolation="bicubic" if bicubic else "bilinear", antialias=antialias,
            )  # fmt: skip
            torch.testing.assert_close(got, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_a_large_crop_and_one_out_of_the_image():
    peer = torchvision()
    images = random_images(2, 3, 256, 256)
    params = identity(2, 256, 256)
    params[0, :ANGLE] = torch.tensor([30, 10, 200, 250])
    params[1, :ANGLE] = torch.tensor([-9, -4, 240, 300])
    padded = F.pad(images / 255, (64, 64, 64, 64), mode="replicate")
    got = render_views(images, params, 224)
    for m, (y, x, h, w) in enumerate([(10, 30, 240, 170), (-4, -9, 304, 249)]):
        expected = peer.resized_crop(padded[m], y + 64, x + 64, h, w, [224, 224])
        # torchvision computes positions, up to 300, in fp32.
        torch.testing.assert_close(got[m], expected, atol=1e-4, rtol=0)


COLOURS = {
    "adjust_brightness": [0.3, 1.7],
    "adjust_contrast": [0.2, 1.8],
    "adjust_saturation": [0.0, 1.8],
    "adjust_hue": [-0.5, -0.2, 0.1, 0.5],
}


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("operation", range(4))
def test_colour_operations_are_torchvision_s(operation, size):
    peer = getattr(torchvision(), list(COLOURS)[operation])
    images = random_images(2, 3, size, size)
    images[0, :, 0] = 77  # greys have no hue
    images[0, :, 1] = torch.tensor([255, 0, 0]).view(3, 1)
    for factor in list(COLOURS.values())[operation]:
        params = identity(2, size, size)
        params[:, FIRST + 2], params[:, BRIGHTNESS + operation] = operation, factor
        got = render_views(images, params, size)
        level = (255 * got + 1e-4).floor()  # uint8 results are cut off there
        assert (level - peer(images, factor)).abs().max() <= 1
        torch.testing.assert_close(got, peer(images / 255, factor), atol=1e-5, rtol=0)


def test_grey_solarise_turns_and_flip_are_torchvision_s():
    peer, images = torchvision(), random_images(9, 3, 24, 24)
    params = identity(9, 24, 24)
    params[0, GRAY], params[1:, SOLARIZE] = 1, 128 / 255
    params[1:, TURNS], params[1:, FLIP] = torch.arange(8) % 4, torch.arange(8) // 4
    got = render_views(images, params, 24)
    expected = peer.rgb_to_grayscale(images[0] / 255, 3)
    torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=0)
    for m in range(1, 9):
        x = images[m].rot90((m - 1) % 4, (1, 2))
        x = peer.horizontal_flip(x) if m > 4 else x
        assert (got[m] - peer.solarize(x, 128) / 255).abs().max() < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("box", [(3, 1, 31, 38), (0.3, 2.7, 9.1, 8.8), (-4, 0, 40, 40)])
def test_solarise_takes_all_of_a_constant_image_at_the_threshold(box, device):
    levels = torch.arange(1, 256)
    images = levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 40, 40)
    params = identity(255, 40, 40)
    params[:, :ANGLE], params[:, SOLARIZE] = torch.tensor(box), levels / 255
    params[::2, SIGMA] = 1.2
    for at, expected in ((0, 255 - levels), (LEVEL / 2, levels)):
        params[:, SOLARIZE] += at
        got = render_views(images.to(device), params.to(device), 24).cpu()
        assert (got - (expected / 255).view(-1, 1, 1, 1)).abs().max() < 2e-6


@pytest.mark.parametrize("size", [8, 33, 224])
def test_blur_is_torchvision_s(size):
    peer, images = torchvision(), random_images(3, 3, size, size, torch.float32)
    params = identity(3, size, size)
    params[:, SIGMA] = torch.tensor([0.1, 0.7, 2.0])
    taps = 2 * max(1, size // 20) + 1
    expected = [
        peer.gaussian_blur(x, [taps, taps], [s])
        for x, s in zip(images, [0.1, 0.7, 2.0], strict=True)
    ]
    got = render_views(images, params, size)
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("H,W,size", [(40, 52, 32), (33, 47, 33), (256, 256, 224)])
def test_chains_are_torchvision_s(H, W, size, bicubic):
    """SimCLR's, on float images; where a solarised value lies at the threshold, either will do."""
    peer = torchvision()
    images, params = random_images(2, 3, H, W), identity(4, H, W)
    params[:, :ANGLE] = torch.tensor([3, 2, W - 5, H - 8])
    params[:, FLIP] = 1
    params[:, BRIGHTNESS : HUE + 1] = torch.tensor([1.3, 0.6, 1.5, -0.1])
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
    params[:, FIRST : FOURTH + 1] = order
    params[1, GRAY], params[1:3, SIGMA], params[2:, SOLARIZE] = 1, 1.1, 0.5
    got = render_views(
        images, params, size, source=torch.tensor([0, 1, 0, 1]),
        interpolation="bicubic" if bicubic else "bilinear",
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    taps = 2 * max(1, size // 20) + 1
    for m in range(4):
        x = peer.resized_crop(
            images[m % 2] / 255, 2, 3, H - 10, W - 8, [size, size], modes()[bicubic]
        )
        x = peer.horizontal_flip(x)
        for operation in order[m].tolist():
            factor = params[m, BRIGHTNESS + operation].item()
            x = getattr(peer, list(COLOURS)[operation])(x, factor).clamp(0, 1)
        if m == 1:
            x = peer.rgb_to_grayscale(x, 3)
        if m in (1, 2):
            x = peer.gaussian_blur(x, [taps, taps], [1.1])
        near = (x - 0.5).abs() < 1e-4
        if m >= 2:
            x = peer.solarize(x, 0.5)
        expected = peer.normalize(x.clamp(0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        error = (got[m] - expected).abs() * 0.225
        assert error[~near].max() < LEVEL / 10


# ------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("C", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "H,W,size", [(1, 1, 1), (1, 1, 8), (9, 5, 2), (20, 9, 40), (33, 47, 17), (96, 80, 32)]
)
def test_oracle(H, W, size, C, dtype, device):
    images = random_images(3, C, H, W, dtype)
    for bicubic, antialias in ((False, True), (True, True), (True, False)):
        check(images, random_params(8, H, W), size, bicubic, antialias, device)
    check(images, random_params(8, H, W, angle=True), size, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_oracle_large(device):
    images = random_images(2, 3, 300, 260)
    check(images, random_params(8, 300, 260), 224, device=device)
    check(images, random_params(3, 300, 260), 448, True, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C,size", [(1, 1), (1, 7), (2, 16), (3, 33)])
def test_noise(C, size, device):
    images, params = random_images(2, C, 40, 40), random_params(8, 40, 40, noise=True)
    key = torch.randint(0, 2**40, (8, 4))
    key[:, 1], key[:, 2] = key[:, 1] % 2**32, key[:, 2] % 256
    check(images, params, size, device=device, key=key)


def test_noise_is_normal():
    params = identity(40, 32, 32)
    params[:, NOISE] = 0.1
    key = torch.stack((torch.arange(40), *torch.zeros(3, 40, dtype=torch.int64)), 1)
    images = torch.full((40, 3, 32, 32), 0.5)
    x = (render_views(images, params, 32, noise_key=key) - 0.5) / 0.1
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    assert abs(torch.corrcoef(x.flatten(1)) - torch.eye(40)).max() < 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("C,size", [(1, 8), (3, 33), (4, 16)])
def test_result_is_rounded_once_in_any_layout(C, size, dtype, device):
    images, params = random_images(8, C, 40, 52).to(device), random_params(8, 40, 52).to(device)
    exact = render_views(images, params, size, mean=[0.4] * C, std=[0.25] * C)
    for channels_last in (False, True):
        got = render_views(
            images, params, size, mean=[0.4] * C, std=[0.25] * C, dtype=dtype,
            channels_last=channels_last,
        )  # fmt: skip
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
        assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_has_the_same_bits_alone_packed_and_on_any_threads(device):
    shapes = [(40, 52), (17, 9), (64, 64), (1, 3)]
    images = [random_images(1, 3, *shape).to(device) for shape in shapes]
    offsets = torch.tensor([x.numel() for x in images]).cumsum(0).roll(1)
    offsets[0] = 0
    source = torch.tensor([3, 0, 1, 2, 1, 0, 2, 0])
    params = torch.cat([random_params(8, *shapes[b])[i : i + 1] for i, b in enumerate(source)])
    packed = {
        "offsets": offsets.to(device), "sizes": torch.tensor(shapes, dtype=torch.int32).to(device),
        "channels": 3, "source": source.to(device),
    }  # fmt: skip
    pixels, params = torch.cat([x.flatten() for x in images]), params.to(device)
    got = render_views(pixels, params, 24, **packed)
    for m, b in enumerate(source.tolist()):
        assert torch.equal(got[m], render_views(images[b], params[m : m + 1], 24)[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(got, render_views(pixels, params, 24, **packed))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bicubic", [False, True])
def test_nan_stays_where_it_reaches(bicubic, device):
    images, params = random_images(1, 3, 40, 52, torch.float32), random_params(24, 40, 52)
    images[0, 1, 20, 30] = torch.nan
    params[:8, SIGMA] = 0
    params[8:16, FIRST : FOURTH + 1] = torch.tensor([2, 3, 0, -1])
    # A small sigma makes weights that round to nothing, which carry no NaN in the kernel.
    params[8:, SIGMA] = params[8:, SIGMA].clamp(min=1.5)
    got = check(images, params, 32, bicubic, device=device)
    assert got.isnan().any()
    params = identity(1, 40, 52)
    params[:, ANGLE] = 0.3
    rotated = check(images, params, 32, device=device)[0].isnan().flatten(1)
    assert 0 < rotated[1].sum() < 10 and not rotated[0].any()


# ------------------------------------------------------------------------------------ the op


def test_opcheck():
    for C, key in ((3, None), (1, torch.zeros(4, 4, dtype=torch.int64))):
        args = arguments(random_images(4, C, 20, 24), random_params(4, 20, 24), 8)
        for dtype, channels_last in ((torch.float32, False), (torch.bfloat16, True)):
            torch.library.opcheck(
                torch.ops.fastssl.render_views, (*args, dtype, channels_last, key)
            )


def test_compiles_to_one_graph():
    images, params = random_images(4, 3, 20, 24), random_params(4, 20, 24)
    compiled = torch.compile(render_views, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, params, 16), render_views(images, params, 16))


def test_no_views():
    assert render_views(random_images(0, 3, 8, 8), identity(0, 8, 8), 4).shape == (0, 3, 4, 4)
    none = torch.arange(0)
    assert render_views(random_images(2, 3, 8, 8), identity(0, 8, 8), 4, source=none).numel() == 0


def test_errors():
    images, params = random_images(4, 3, 8, 10), identity(4, 8, 10)
    empty, far, noisy, twice = (params.clone() for _ in range(4))
    empty[2, X1], far[1, Y1], noisy[:, NOISE] = 0, torch.inf, 0.1
    twice[3, FIRST], twice[3, FOURTH] = 1, 1
    packed = {
        "offsets": torch.tensor([0]), "sizes": torch.tensor([[8, 10]]), "channels": 3,
        "source": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    for error, message, args, options in [
        (TypeError, "pixels must be a uint8 tensor, or float32", (images.double(), params), {}),
        (ValueError, "take no gradient", (images / 255, params.clone().requires_grad_()), {}),
        (ValueError, "go with packed", (images.flatten(), params), {}),
        (ValueError, "go with packed", (images, params), {"channels": 3}),
        (ValueError, r"\(B, C, H, W\) or packed", (images[0], params), {}),
        (ValueError, "a row an image, 4, got 3", (images, params[:3]), {}),
        (ValueError, r"params must be float \(4, 20\)", (images, params[:, :19]), {}),
        (ValueError, "source must be integer", (images, params), {"source": params[:, 0]}),
        (TypeError, "dtype must be float32", (images, params), {"dtype": torch.float64}),
        (ValueError, "interpolation must be", (images, params), {"interpolation": "nearest"}),
        (ValueError, "size and channels must be", (images, params, 0), {}),
        (ValueError, "size and channels must be whole", (images, params, 32.0), {}),
        (TypeError, r"params must be a tensor \(M, 20\), got NoneType", (images, None), {}),
        (ValueError, "a number for each of 3 channels", (images, params), {"mean": [0.5]}),
        (ValueError, "std above 0", (images, params), {"std": [1, 0, 1]}),
        (ValueError, "of view 2", (images, empty), {}),
        (ValueError, "of view 1", (images, far), {}),
        (ValueError, "contrast once at most, got it twice in view 3", (images, twice), {}),
        (ValueError, r"in \[0, 1\], got 0 to 1.5", (1.5 * (images > 99), params), {}),
        (ValueError, r"in \[0, 1\], got -2 to -?0\.", (-2.0 * (images > 99), params), {}),
        (ValueError, "noise need noise_key", (images, noisy), {}),
        (ValueError, "source must be in", (images, params), {"source": torch.arange(4) + 1}),
        (ValueError, "image 0 must lie in pixels", (images.flatten(), params),
         packed | {"offsets": torch.tensor([721])}),
        (ValueError, "at least 1 x 1", (images.flatten(), params),
         packed | {"sizes": torch.tensor([[8, 0]])}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            render_views(*args, **({"size": 8} if len(args) == 2 else {}), **options)


def test_without_triton_a_gpu_says_once_what_it_costs(monkeypatch):
    registered = {}
    monkeypatch.setattr(contrastive.lib, "impl", lambda name, f, key: registered.update({name: f}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    contrastive.on_cuda("module", "op", lambda x: x + 1, "goes one by one")
    with pytest.warns(UserWarning, match="so op on CUDA goes one by one. Install triton"):
        assert registered["op"](1) == 2
    assert registered["op"](2) == 3


def test_the_kernel_itself_reads_no_memory_that_is_not_the_image_s():
    if fastssl.extension.why_missing:
        pytest.skip("the extension is not built: only the reference runs")
    good = identity(2, 8, 8)
    args = arguments(random_images(2, 3, 8, 8), good, 8)
    for place, value in [
        (1, torch.tensor([0, 193])),
        (1, torch.tensor([0, -1])),
        (2, torch.tensor([[8, 8], [8, 9]])),
        (2, torch.tensor([[8, 8], [2**40, 2**40]])),
        (3, torch.tensor([0, 2])),
        (4, good * torch.inf),
        (4, torch.full_like(good, torch.nan)),
    ]:
        bad = [value if i == place else x for i, x in enumerate(args)]
        with pytest.raises(RuntimeError, match="render_views: "):
            torch.ops.fastssl.render_views(*bad, torch.float32, False, None)
