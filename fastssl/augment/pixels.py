"""The pixels of a batch of views: draws in, float images out; plain batched tensor operations.

Every sum over pixels is taken row by row, and everything else is element-wise, so that an image's
result has the same bits whatever batch it is in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .views import View

_LUMINANCE = (0.2989, 0.587, 0.114)
_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def render(images: Tensor, view: View, draws: Draws) -> Tensor:
    """Crop, rotate, flip, colour, blur, solarise, add noise and normalise.

    Args:
        images: (B, C, H, W) uint8.
        view: the description the draws were made from.
        draws: parameters of B images.

    Returns:
        (B, C, size, size) float32 on the device of `images`, normalised by `normalize`.
    """
    x = _crop(images.float() / 255, view.size, draws)
    for position in range(4):
        for number, operation in enumerate(_COLOUR):
            # The draws are on the CPU, so finding the rows does not wait for the device.
            rows = (draws.order[:, position] == number).nonzero()[:, 0].to(x.device)
            if len(rows) and (number < 2 or x.shape[1] == 3):
                factor = draws.factors[:, number].to(x.device)[rows].view(-1, 1, 1, 1)
                x[rows] = operation(x[rows], factor).clamp_(0, 1)
    if x.shape[1] == 3 and draws.gray.any():
        rows = draws.gray.nonzero()[:, 0].to(x.device)
        x[rows] = _luminance(x[rows]).expand(-1, 3, -1, -1)
    if draws.sigma.any():
        rows = draws.sigma.nonzero()[:, 0]
        blurred = _blur(x[rows.to(x.device)], draws.sigma[rows].to(x.device))
        x[rows.to(x.device)] = blurred
    if draws.solarize.any():
        mask = draws.solarize.to(x.device).view(-1, 1, 1, 1) & (x >= 128 / 255)
        x = torch.where(mask, 1 - x, x)
    if draws.noise is not None:
        x = (x + draws.noise.to(x.device)).clamp_(0, 1)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """Intensities (B, C, H, W) in [0, 1] to network input: ImageNet's mean and standard deviation
    for RGB, (x - 0.5) / 0.5 otherwise."""
    if x.shape[1] != 3:
        return (x - 0.5) / 0.5
    return (x - x.new_tensor(_RGB_MEAN).view(3, 1, 1)) / x.new_tensor(_RGB_STD).view(3, 1, 1)


def prepare(images: Tensor, size: int) -> Tensor:
    """Whole images as network input, without randomness: what evaluation and export use.

    Args:
        images: (B, C, H, W) uint8.
        size: side of the result in pixels.

    Returns:
        (B, C, size, size) float32, resized with antialiasing where the size differs.
    """
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalize(x.clamp(0, 1))


def _crop(x: Tensor, size: int, draws: Draws) -> Tensor:
    """Crop, rotation and flip in one bilinear resampling; outside the image the edge is repeated.

    No antialiasing: crops should not be much larger than the view in pixels. The grid is written
    out because a matrix product rounds differently for different batch sizes.
    """
    height, width = x.shape[-2:]
    box = draws.box.to(x.device)
    x0, y0, x1, y1 = (v.view(-1, 1, 1) for v in box.unbind(1))
    sign = torch.where(draws.flip, -1.0, 1.0)
    cos = (draws.angle.double().cos()).float().to(x.device).view(-1, 1, 1)
    sin = (draws.angle.double().sin()).float().to(x.device).view(-1, 1, 1)
    centres = (torch.arange(size, device=x.device, dtype=torch.float32) + 0.5) / size - 0.5
    u = sign.to(x.device).view(-1, 1, 1) * (x1 - x0) * centres.view(1, 1, -1)  # (B, 1, size)
    v = (y1 - y0) * centres.view(1, -1, 1)  # (B, size, 1)
    # Rotation in pixels, so that it stays one in images that are not square.
    ratio = width / height
    gx = (x0 + x1) / 2 + (cos * u - sin * v / ratio)
    gy = (y0 + y1) / 2 + (sin * u * ratio + cos * v)
    grid = torch.stack((gx * 2 - 1, gy * 2 - 1), dim=-1)  # (B, size, size, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _luminance(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 1, H, W)."""
    if x.shape[1] != 3:
        # Channel by channel: a mean over dim 1 would be free to choose its order of summation.
        return sum(x[:, c : c + 1] for c in range(x.shape[1])) / x.shape[1]
    r, g, b = _LUMINANCE
    return r * x[:, 0:1] + g * x[:, 1:2] + b * x[:, 2:3]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luminance(x).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    return mean + (x - mean) * factor


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luminance(x)
    return gray + (x - gray) * factor


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns, keeping value and saturation (HSV)."""
    r, g, b = x.unbind(1)
    value, low = x.amax(dim=1), x.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == r,
        (g - b) / safe,
        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )  # hue in sixths of a turn
    sector = sector + 6 * shift[:, 0]
    # Channel n is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + sector, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


_COLOUR = (_brightness, _contrast, _saturation, _hue)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur, one `sigma` (B,) an image, reflected at the edges.

    About size / 10 taps, as SimCLR; a sum of shifted copies, because a convolution may choose
    another algorithm for another batch.
    """
    radius = max(1, x.shape[-1] // 20)
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float64)
    weight = (-0.5 * (taps / sigma.double()[:, None]) ** 2).exp()
    weight = (weight / weight.sum(dim=1, keepdim=True)).float()  # (B, taps)
    height, width = x.shape[-2:]
    padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
    x = sum(
        weight[:, t].view(-1, 1, 1, 1) * padded[..., t : t + width] for t in range(2 * radius + 1)
    )
    padded = F.pad(x, (0, 0, radius, radius), mode="reflect")
    return sum(
        weight[:, t].view(-1, 1, 1, 1) * padded[..., t : t + height, :]
        for t in range(2 * radius + 1)
    )
