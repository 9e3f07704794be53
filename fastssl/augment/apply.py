"""Views of a batch: random parameters, then pixels, each by one op."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.ops.augment import PARAMS, X0, Y1, render_views

from .custom import Custom
from .packed import Packed, check_images
from .views import Noise, Normalize, Resize, View

_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def augment(
    images: Tensor | Packed,
    index: Tensor,
    views: Sequence[View | Custom],
    *,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    return_params: bool = False,
    params: Tensor | None = None,
) -> list[Tensor] | tuple[list[Tensor], Tensor]:
    """Random views of a batch, a pure function of (seed, epoch, index, number of the view).

    x_v = render(image, parameters(view v; seed, epoch, index, v)), for every view v and image.

    Args:
        images: (B, C, H, W) uint8, or float32 in [0, 1]; images of several sizes as `pack` makes
            them; clips (B, T, C, H, W), whose frames share their parameters.
        index: (B,) integers in [0, 2^56), the samples' numbers in their data set.
        views: at most 256 descriptions.
        seed: of the run, in [0, 2^63). epoch: of the pass over the data, in [0, 2^32).
        dtype: of the result: float32, bfloat16 or float16.
        channels_last: the result's layout in memory.
        return_params: give the parameters too.
        params: (V, B, PARAMS) float32, parameters to be used instead of random ones, for instance
            returned ones after a change; the columns are named in `fastssl.ops.augment`. Not for a
            `Custom`, which draws for itself.

    Returns:
        A list, for each view (B, C, size, size), of clips (B, T, C, size, size), on the device of
        `images`. With `return_params` the list and a tensor (V, B, PARAMS) float32: crops in pixels
        in its columns X0, Y0, X1, Y1, mirror images in FLIP, and so on.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or ranges; images that require a gradient.

    Memory: the result. Views of one size and normalisation are computed in one call.

    Notes: the same image gives the same bits in any batch, on any rank, for any number of threads;
        parameters are computed in float64. Of one image views differ by their number, so that
        another order of `views` gives other views. NaN in float images stay NaN where they reach.

    Example:
        >>> from fastssl.augment import augment, byol
        >>> images = torch.zeros(4, 3, 64, 48, dtype=torch.uint8)
        >>> [tuple(x.shape) for x in augment(images, torch.arange(4), byol(32), seed=0, epoch=0)]
        [(4, 3, 32, 32), (4, 3, 32, 32)]

    Paper: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, for the numbers.
    """
    views = _checked_views(views)
    clips = isinstance(images, Tensor) and images.dim() == 5
    packed, frames = _packed(images)
    B, device = len(packed) // frames, packed.pixels.device
    if packed.pixels.requires_grad:
        raise ValueError("augment: images take no gradient. Use .detach().")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"augment: dtype must be float32, bfloat16 or float16, got {dtype}.")
    index = _checked_index(index, B).to(device, non_blocking=True)
    for label, value, bits in (("seed", seed, 63), ("epoch", epoch, 32)):
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"augment: {label} must be an int in [0, 2^{bits}), got {value!r}.")
    if params is None:
        spec = _spec(tuple(tuple(view.numbers()) for view in views), device)
        params = torch.ops.fastssl.view_parameters(
            index, packed.sizes[::frames].contiguous(), spec, seed, epoch
        )
    else:
        _check_params(params, (len(views), B, PARAMS))
        if any(isinstance(view, Custom) for view in views):
            raise ValueError(
                "augment: params must be None with a Custom among the views, which draws for "
                "itself. Render the others in a call of their own."
            )
    params = params.to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    results = [None] * len(views)
    for v, view in enumerate(views):
        if isinstance(view, Custom):
            each = index.repeat_interleave(frames)
            x = view.render(packed, each, seed=seed, epoch=epoch, view=v).to(device, dtype)
            x = x.contiguous(memory_format=layout)
            results[v] = x.unflatten(0, (B, frames)) if clips else x
    for numbers in _groups(views):
        view, count = views[numbers[0]], len(numbers)
        mean, std = _normalization(view, packed.channels)
        x = render_views(
            packed.pixels,
            torch.cat([params[v] for v in numbers]).repeat_interleave(frames, 0),
            view.size,
            offsets=packed.offsets,
            sizes=packed.sizes,
            channels=packed.channels,
            source=torch.arange(B * frames, device=device).repeat(count),
            interpolation=view.crop.interpolation,
            antialias=view.crop.antialias,
            mean=mean,
            std=std,
            dtype=dtype,
            channels_last=channels_last,
            noise_key=_noise_key(views, numbers, index, frames, seed, epoch),
        )
        for v, of_view in zip(numbers, x.chunk(count), strict=True):
            results[v] = of_view.unflatten(0, (B, frames)) if clips else of_view
    return (results, params) if return_params else results


def prepare(
    images: Tensor | Packed,
    size: int,
    *,
    crop: float = 1.0,
    interpolation: str = "bilinear",
    specs: Sequence = (),
    index: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The centre square of images as network input, without randomness: for evaluation and export.

    Args:
        images: as `augment` takes them.
        size: side of the result in pixels.
        crop: side of the centre square as a share of the image's shorter side, in (0, 1].
        interpolation: "bilinear" or "bicubic".
        specs: what a `View` may hold behind its crop: other numbers to normalise with than those of
            `Normalize()`, or disturbances to be tested against, which are random functions of
            (seed, index) with index (B,) as for `augment`, of the place in the batch without it.

    Returns:
        (B, C, size, size) float32, resized with antialiasing where the size differs, normalised.
    """
    if not any(isinstance(spec, Normalize) for spec in specs):
        specs = (*specs, Normalize())
    view = View(Resize(size, interpolation), *specs)
    packed, frames = _packed(images)
    sizes = packed.sizes  # (N, 2), of all frames
    index = torch.arange(len(sizes) // frames) if index is None else index
    index = index.to(sizes.device).repeat_interleave(frames)
    spec = _spec((tuple(view.numbers()),), sizes.device)
    params = torch.ops.fastssl.view_parameters(index, sizes, spec, seed, 0)
    side = sizes.amin(1, keepdim=True)
    corner = ((sizes - side) // 2).flip(1)  # x, y
    if crop != 1:
        corner, side = corner + (1 - crop) / 2 * side, crop * side
    params[0, :, X0 : Y1 + 1] = torch.cat([corner, corner + side], 1).to(params.dtype)
    (x,) = augment(packed, index, [view], seed=seed, epoch=0, params=params)
    clips = isinstance(images, Tensor) and images.dim() == 5
    return x.unflatten(0, (len(x) // frames, frames)) if clips else x


@functools.lru_cache(maxsize=64)
def _spec(numbers: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """(V, SPEC); kept, since copying it to a GPU in every step would cost more than its use."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _groups(views: tuple[View | Custom, ...]) -> list[list[int]]:
    """Numbers of views that one call of `render_views` can make."""
    groups = {}
    for number, view in enumerate(views):
        if isinstance(view, Custom):
            continue
        crop = view.crop
        key = crop.size, crop.interpolation, crop.antialias, view.get(Normalize)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _normalization(view: View, channels: int) -> tuple:
    normalize = view.get(Normalize)
    if normalize is None:
        return None, None
    if normalize.mean is not None:
        return normalize.mean, normalize.std
    return _RGB if channels == 3 else ((0.5,) * channels, (0.5,) * channels)


def _noise_key(views, numbers, index, frames, seed, epoch) -> Tensor | None:
    """(M, 4) int64, or None where no view has noise."""
    if not any(views[v].get(Noise) for v in numbers):
        return None
    keys = [torch.stack([torch.full_like(index, k) for k in (epoch, v, seed)], 1) for v in numbers]
    index = index.repeat(len(numbers))[:, None]
    return torch.cat([index, torch.cat(keys)], 1).repeat_interleave(frames, 0)


def _packed(images: Tensor | Packed) -> tuple[Packed, int]:
    """Images one after another, and how many of them a sample has."""
    if isinstance(images, Packed):
        return images, 1
    check_images("augment", images)
    if images.dim() not in (4, 5):
        raise ValueError(
            "augment: images must be (B, C, H, W), clips (B, T, C, H, W) or what pack() makes, "
            f"got {tuple(images.shape)}. Add a dimension to a single image by images[None]."
        )
    frames = images.shape[1] if images.dim() == 5 else 1
    images = images.reshape(-1, *images.shape[-3:])
    count, channels, H, W = images.shape
    offsets = torch.arange(count, device=images.device) * (channels * H * W)
    sizes = torch.full((count, 2), H, device=images.device)
    sizes[:, 1] = W
    return Packed(images.reshape(-1), offsets, sizes, channels), frames


def _checked_views(views: Sequence[View | Custom]) -> tuple[View | Custom, ...]:
    listed = isinstance(views, Sequence)
    if not listed or not all(isinstance(view, View | Custom) for view in views):
        raise TypeError(
            f"augment: views must be a list of View, got {views!r}. Other functions of an image "
            "stand there as Custom(function, size)."
        )
    if not 0 < len(views) <= 256:
        raise ValueError(f"augment: views must be 1 to 256 views, got {len(views)}.")
    return tuple(views)


def _check_params(params: Tensor, shape: tuple[int, ...]) -> None:
    tensor = isinstance(params, Tensor)
    if not tensor or params.shape != shape or params.dtype != torch.float32:
        got = f"{params.dtype} {tuple(params.shape)}" if tensor else repr(params)
        raise ValueError(f"augment: params must be float32 (V, B, PARAMS) = {shape}, got {got}.")


def _checked_index(index: Tensor, B: int) -> Tensor:
    wrong = not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool
    if wrong or index.shape != (B,):
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(
            f"augment: index must be ({B},) integers, the number of each sample in its data set, "
            f"got {got}."
        )
    index = index.long()
    # On the CPU only, since looking at it would stall a GPU.
    if index.device.type == "cpu" and B and not torch.compiler.is_compiling():
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= 1 << 56:
            raise ValueError(f"augment: index must be in [0, 2^56), got {low} to {high}.")
    return index
