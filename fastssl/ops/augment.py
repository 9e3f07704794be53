"""Random views of images, given their parameters: all pixel operations in one pass over a view.

In this order: crop and resize (or rotate), quarter turns, flip, four colour operations in any
order, grey, blur, solarise, noise, clamp to [0, 1], normalise. Images are packed one after another,
so they need not be of one size, and any number of views may be taken of each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops.contrastive import lib, on_cuda
from fastssl.random import AUGMENT, words

# Columns of `params`, a row for each view.
PARAMS = 20
X0, Y0, X1, Y1 = range(4)  # the crop in pixels of its image; it may reach outside
ANGLE = 4  # radians about the crop's centre; 0: resized with antialiasing instead
TURNS = 5  # quarter turns counter-clockwise
FLIP = 6  # 1: left and right exchanged, after the turns
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(7, 11)  # factors; HUE in turns
FIRST, SECOND, THIRD, FOURTH = range(11, 15)  # operation 0 .. 3 of the line above; -1: none
GRAY = 15  # 1: luminance in all channels
SIGMA = 16  # of the blur, in pixels of the view; 0: none
SOLARIZE = 17  # intensities from here on are inverted; inf: none
NOISE = 18  # standard deviation; 0: none
# Column 19 is reserved and 0.

NOISE_WORD = 64  # the first of the random words of noise; those below are drawn for the parameters
LUMINANCE = (0.2989, 0.587, 0.114)


# ------------------------------------------------------------------------------- 1. reference


def resize_weights(
    low: float, high: float, size: int, length: int, bicubic: bool, antialias: bool
) -> Tensor:
    """(size, length) float64: what each pixel of a line of the view takes of a line of the image.

    Pixel i sees a triangle, or a cubic, about the centre of its share of [low, high], widened with
    antialiasing to the share where that is more than a pixel. Pixels of the image that are not even
    partly in [low, high] take no part; what lies outside the image repeats its edge.
    """
    share = (high - low) / size
    centre = low + share * (torch.arange(size, dtype=torch.float64) + 0.5)
    first, last = math.floor(low), math.ceil(high) - 1
    pixel = torch.arange(first - 2, last + 3)
    t = (pixel + 0.5 - centre[:, None]).abs()
    if antialias:
        t = t / max(share, 1.0)
    if bicubic:  # the constants of torch's two forms
        a = -0.5 if antialias else -0.75
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        weight = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    else:
        weight = (1 - t).clamp(min=0)
    if antialias:
        weight = weight * ((pixel >= first) & (pixel <= last))
    weight = weight / weight.sum(1, keepdim=True)
    place = pixel.clamp(first, last).clamp(0, length - 1).expand_as(weight)
    return torch.zeros(size, length, dtype=torch.float64).scatter_add_(1, place, weight)


def _rotated(image: Tensor, box: list[float], angle: float, size: int) -> Tensor:
    """Bilinear samples (C, size, size) of the box turned about its centre, edges repeated."""
    x0, y0, x1, y1 = box
    unit = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    u, v = (x1 - x0) * unit, (y1 - y0) * unit[:, None]
    x = (x0 + x1) / 2 + math.cos(angle) * u - math.sin(angle) * v - 0.5  # (size, size)
    y = (y0 + y1) / 2 + math.sin(angle) * u + math.cos(angle) * v - 0.5
    bottom, right = image.shape[1] - 1, image.shape[2] - 1
    x, y = x.clamp(0, right), y.clamp(0, bottom)
    left, top = x.long(), y.long()
    x, y = ((p - p.floor()).to(image) for p in (x, y))
    rows = []
    for row in (top, (top + 1).clamp(max=bottom)):
        a, b = image[:, row, left], image[:, row, (left + 1).clamp(max=right)]
        rows.append(a + x * (b - a))
    return rows[0] + y * (rows[1] - rows[0])


def _luminance(x: Tensor) -> Tensor:
    """(1, size, size): luminance of colours, otherwise the mean of the channels."""
    if len(x) != 3:
        return x.mean(0, keepdim=True)
    return (x * x.new_tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)


def _hue(x: Tensor, shift: float) -> Tensor:
    """The hue turned by `shift` turns, value and chroma kept (HSV)."""
    r, g, b = x
    value, low = x.amax(0), x.amin(0)
    chroma = value - low
    safe = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == r,
        (g - b) / safe,
        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )  # hue in sixths of a turn
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + sector + 6 * shift, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels)


def _colour(x: Tensor, operation: int, factor: float) -> Tensor:
    if operation == 0:
        x = x * factor
    elif operation == 1:
        x = factor * x + (1 - factor) * _luminance(x).mean()
    elif operation == 2 and len(x) == 3:
        x = factor * x + (1 - factor) * _luminance(x)
    elif operation == 3 and len(x) == 3:
        x = _hue(x, factor)
    else:
        return x
    return x.clamp(0, 1)


def blur_weights(sigma: float, size: int) -> Tensor:
    """(2 radius + 1,) float64: a Gaussian over about a tenth of the view, as SimCLR takes it."""
    radius = max(1, size // 20)
    t = torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma
    return (-0.5 * t * t).softmax(0)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Separable, reflected at the edges."""
    size = x.shape[-1]
    if size == 1:
        return x
    taps = blur_weights(sigma, size).to(x)
    radius = len(taps) // 2
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    rows = sum(w * padded[:, t : t + size] for t, w in enumerate(taps))
    return sum(w * rows[:, :, t : t + size] for t, w in enumerate(taps))


def noise_ref(key: list[int], channels: int, size: int) -> Tensor:
    """(C, size, size) float64, normal by Box and Muller: a pair of uniforms gives two values."""
    index, epoch, view, seed = key
    count = channels * size**2
    pairs = (count + 1) // 2
    w = words(seed, AUGMENT, epoch, torch.tensor([index]), view, 2 * pairs, first=NOISE_WORD)[0]
    u = (w.double() + 0.5) / 2**32  # in (0, 1)
    radius, turn = (-2 * u[:pairs].log()).sqrt(), 2 * math.pi * u[pairs:]
    normal = torch.cat((radius * turn.cos(), radius * turn.sin()))[:count]
    return normal.view(channels, size, size)


def render_views_ref(
    pixels: Tensor,  # (P,) uint8, or floating point in [0, 1]
    offsets: Tensor,  # (B,) int64: image b is (C, H, W) from here on
    sizes: Tensor,  # (B, 2) int64: H, W
    source: Tensor,  # (M,) int64: the image of each view
    params: Tensor,  # (M, PARAMS) fp32
    channels: int,
    size: int,
    bicubic: bool,
    antialias: bool,
    mean: list[float],  # a number a channel
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    noise_key: Tensor | None,  # (M, 4) int64: index, epoch, view, seed
) -> Tensor:
    """(M, C, size, size), computed in fp32; in fp64 for a result in fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    places, shapes = offsets.tolist(), sizes.tolist()
    keys = None if noise_key is None else noise_key.tolist()
    views = []
    for m, (b, p) in enumerate(zip(source.tolist(), params.tolist(), strict=True)):
        height, width = shapes[b]
        image = pixels[places[b] : places[b] + channels * height * width]
        image = image.view(channels, height, width).cpu().to(wide)
        if not pixels.is_floating_point():
            image = image / 255
        if p[ANGLE] == 0:
            rows = resize_weights(p[Y0], p[Y1], size, height, bicubic, antialias).to(wide)
            columns = resize_weights(p[X0], p[X1], size, width, bicubic, antialias).to(wide)
            x = rows @ image.nan_to_num(0) @ columns.T
            # A product with a weight of 0 would carry a NaN all over the view.
            reached = (rows != 0).to(wide) @ image.isnan().to(wide) @ (columns != 0).to(wide).T
            x = x.masked_fill(reached > 0, torch.nan)
        else:
            x = _rotated(image, p[:ANGLE], p[ANGLE], size)
        x = x.rot90(int(p[TURNS]), (1, 2))
        if p[FLIP]:
            x = x.flip(2)
        for operation in map(int, p[FIRST : FOURTH + 1]):
            if operation >= 0:
                x = _colour(x, operation, p[BRIGHTNESS + operation])
        if p[GRAY] and channels == 3:
            x = _luminance(x).expand(3, -1, -1)
        if p[SIGMA] > 0:
            x = _blur(x, p[SIGMA])
        # A constant image stays constant: its pixels differ by the rounding of their weights.
        x = torch.where(x >= p[SOLARIZE] - 1e-6, 1 - x, x)
        if p[NOISE] > 0:
            x = x + p[NOISE] * noise_ref(keys[m], channels, size).to(wide)
        views.append(x.clamp(0, 1))
    if views:
        x = torch.stack(views).to(pixels.device)
    else:
        x = pixels.new_empty(0, channels, size, size, dtype=wide)
    x = (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)


# ------------------------------------------------------- 2.-4. schema, reference kernel and fake

lib.define(
    "render_views(Tensor pixels, Tensor offsets, Tensor sizes, Tensor source, Tensor params,"
    " int channels, int size, bool bicubic, bool antialias, float[] mean, float[] std,"
    " ScalarType dtype, bool channels_last, Tensor? noise_key) -> Tensor"
)
lib.impl("render_views", render_views_ref, "CompositeExplicitAutograd")


def _fake(
    pixels, offsets, sizes, source, params, channels, size, bicubic, antialias, mean, std, dtype,
    channels_last, noise_key,
):  # fmt: skip
    torch._check(
        params.dim() == 2 and params.shape[1] == PARAMS,
        lambda: f"render_views: params must be (M, {PARAMS})",
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (params.shape[0], channels, size, size),
        dtype=dtype, device=pixels.device, memory_format=layout,
    )  # fmt: skip


torch.library.register_fake("fastssl::render_views", _fake, lib=lib)
on_cuda("augment", "render_views", render_views_ref, "goes view by view on the CPU")


# -------------------------------------------------------------------------- 8. public function


def render_views(
    pixels: Tensor,
    params: Tensor,
    size: int,
    *,
    offsets: Tensor | None = None,
    sizes: Tensor | None = None,
    channels: int | None = None,
    source: Tensor | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    noise_key: Tensor | None = None,
) -> Tensor:
    """Views of images: (clamp(f_m(image_source[m])) - mean) / std with f_m after params[m].

    f is, in this order: crop and resize, quarter turns, flip, colour operations, grey, blur,
    solarise, noise. Each is torchvision's on float images; the colour operations clamp to [0, 1].

    Args:
        pixels: (B, C, H, W) images, or (P,) of several images packed one after another, each planar
            (C, H, W); uint8, or float32 in [0, 1].
        params: (M, PARAMS) float32, a row a view; the columns are named in this module. A crop with
            an angle is sampled bilinearly, without antialiasing.
        size: side of the views in pixels.
        offsets, sizes, channels: of packed images: (B,) integers, where in `pixels` image b begins;
            (B, 2), its H and W in pixels; C, the same for all.
        source: (M,) integers, the image of each view; default: view m is of image m.
        interpolation: "bilinear" or "bicubic" (cubic convolution); may leave [0, 1] until a colour
            operation or the end clamps it.
        antialias: widen the filter where the crop shrinks.
        mean, std: a number a channel; default 0 and 1, so that views lie in [0, 1].
        dtype: of the result: float32, bfloat16 or float16.
        channels_last: the result's layout in memory.
        noise_key: (M, 4) integers (index, epoch, view, seed), what the noise of a view is a
            function of; needed where a NOISE of `params` is not 0.

    Returns:
        (M, C, size, size) of `dtype`, on the device of `pixels`.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; images that require a gradient; on
            the CPU also float images not in [0, 1], crops that are empty, not finite or beyond 2^20
            pixels, images not within `pixels`, sources that are no image, contrast twice in a view,
            noise without a key.

    Memory: the result. On the CPU no image or view is stored between the operations but those in
        work, one a thread: a view in float32, and the rows of the image that 16 of its rows take.
        On a GPU a buffer of the result's shape, float16 for a result of 16 bits, else float32; and
        one in float32 for noise.

    Notes: computed in float32 and rounded once; but on a GPU pixels of a result of 16 bits wait for
        contrast and blur in float16. Weights of the crop are computed in float64 on the CPU, on a
        GPU in float32 from distances in float64. On one device a view's bits depend on nothing but
        its image and its row. A NaN of a float image stays one wherever it reaches. Saturation,
        hue and grey are skipped unless C is 3; contrast then is about the mean of all channels. The
        blur covers about a tenth of the view, with reflected edges.

    Example:
        >>> images, params = torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.zeros(2, PARAMS)
        >>> params[:, X1 : Y1 + 1], params[:, FIRST:GRAY], params[:, SOLARIZE] = 40, -1, torch.inf
        >>> render_views(images, params, 32).shape
        torch.Size([2, 3, 32, 32])

    Paper: the operations of SimCLR, arXiv:2002.05709; solarisation of BYOL, arXiv:2006.07733.
    """
    name = "render_views"
    if not isinstance(pixels, Tensor) or pixels.dtype not in (torch.uint8, torch.float32):
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"{name}: pixels must be a uint8 tensor, or float32 in [0, 1], got {got}. "
            "Convert it, with 16-bit images divided by 65535."
        )
    if not isinstance(params, Tensor):
        raise TypeError(
            f"{name}: params must be a tensor (M, {PARAMS}), got {type(params).__name__}."
        )
    if pixels.requires_grad or params.requires_grad:
        raise ValueError(f"{name}: views take no gradient. Use .detach().")
    device, packed = pixels.device, pixels.dim() == 1
    if not packed and (pixels.dim() != 4 or 0 in pixels.shape[1:]):
        raise ValueError(
            f"{name}: pixels must be (B, C, H, W) or packed (P,), got {tuple(pixels.shape)}."
        )
    if any((x is None) == packed for x in (offsets, sizes, channels)):
        raise ValueError(
            f"{name}: offsets, sizes and channels go with packed (P,) pixels, and only with them, "
            f"got pixels {tuple(pixels.shape)}."
        )
    if not packed:
        B, channels, H, W = pixels.shape
        offsets = torch.arange(B, device=device) * (channels * H * W)
        sizes = torch.tensor([[H, W]], device=device).expand(B, 2)
    M = len(params)
    if source is None:
        source = torch.arange(M, device=device)
        if M != len(offsets):
            raise ValueError(
                f"{name}: params must have a row an image, {len(offsets)}, got {M}. "
                "Give source, the image of each view."
            )
    if noise_key is None:
        keys = ()
    else:
        keys = (("noise_key", noise_key, (M, 4)),)
    for label, x, shape in (
        ("params", params, (M, PARAMS)),
        ("offsets", offsets, (len(offsets),)),
        ("sizes", sizes, (len(offsets), 2)),
        ("source", source, (M,)),
        *keys,
    ):
        if x.shape != shape or x.is_floating_point() != (label == "params"):
            kind = "float" if label == "params" else "integer"
            raise ValueError(
                f"{name}: {label} must be {kind} {shape}, got {x.dtype} {tuple(x.shape)}."
            )
        if x.device != device:
            raise ValueError(
                f"{name}: {label} must be on the device of pixels, {device}, got {x.device}. "
                "Use .to()."
            )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f'{name}: interpolation must be "bilinear" or "bicubic", got {interpolation!r}.'
        )
    if not isinstance(size, int) or size < 1 or channels < 1:
        raise ValueError(
            f"{name}: size and channels must be whole and at least 1, got {size} and {channels}."
        )
    mean = [0.0] * channels if mean is None else list(mean)
    std = [1.0] * channels if std is None else list(std)
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise ValueError(
            f"{name}: mean and std must have a number for each of {channels} channels, std above "
            f"0, got {mean} and {std}."
        )
    params = params.float().contiguous()
    offsets, sizes, source = (x.long().contiguous() for x in (offsets, sizes, source))
    if device.type == "cpu" and not torch.compiler.is_compiling():
        if pixels.is_floating_point() and pixels.numel():
            low, high = (float(x) for x in pixels.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"{name}: float pixels must be in [0, 1], got {low:g} to {high:g}. Divide "
                    "values of 0 to 255 by 255."
                )
        if packed and len(offsets):
            _check_images(name, pixels, offsets, sizes, channels)
        if M:
            _check_views(name, len(offsets), source, params, noise_key)
    return torch.ops.fastssl.render_views(
        pixels.reshape(-1), offsets, sizes, source, params, channels, size,
        interpolation == "bicubic", antialias, mean, std, dtype, channels_last,
        None if noise_key is None else noise_key.long().contiguous(),
    )  # fmt: skip


# Values are looked at on the CPU only, since that would stall a GPU.


def _check_images(name: str, pixels: Tensor, offsets: Tensor, sizes: Tensor, channels: int) -> None:
    if sizes.amin() < 1:
        b = int(sizes.amin(1).argmin())
        raise ValueError(
            f"{name}: images must be of at least 1 x 1 pixels, got image {b} of "
            f"{tuple(sizes[b].tolist())}. Leave it out."
        )
    end = offsets + channels * sizes.prod(1)
    if offsets.amin() < 0 or end.amax() > pixels.numel():
        b = int(((offsets < 0) | (end > pixels.numel())).int().argmax())
        raise ValueError(
            f"{name}: image {b} must lie in pixels, of {pixels.numel()} elements, got "
            f"[{int(offsets[b])}, {int(end[b])}). Check offsets, sizes and channels."
        )


def _check_views(
    name: str, images: int, source: Tensor, params: Tensor, noise_key: Tensor | None
) -> None:
    low, high = (int(b) for b in source.aminmax())
    if low < 0 or high >= images:
        raise ValueError(
            f"{name}: source must be in [0, {images}), got {low if low < 0 else high}. "
            "It is the place of a view's image."
        )
    box = params[:, : ANGLE + 1]
    if not (box.abs().amax() <= 2**20 and (box[:, 2:4] - box[:, :2]).amin() > 0):
        good = (box.abs() <= 2**20).all(1) & (box[:, :2] < box[:, 2:4]).all(1)
        m = int(good.int().argmin())
        raise ValueError(
            f"{name}: crops must be x0 < x1, y0 < y1, they and the angle within 2^20, got "
            f"{tuple(box[m].tolist())} of view {m}."
        )
    twice = (params[:, FIRST:GRAY] == CONTRAST - BRIGHTNESS).sum(1) > 1
    if twice.any():
        raise ValueError(
            f"{name}: a view must have contrast once at most, got it twice in view "
            f"{int(twice.int().argmax())}."
        )
    if noise_key is None and params[:, NOISE].amax() > 0:
        raise ValueError(f"{name}: views with noise need noise_key, got None.")
