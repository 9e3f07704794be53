"""The views that papers use. `flip=False` leaves the mirror image out: for digits and text."""

from .views import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    Normalize,
    RandomResizedCrop,
    Rotate,
    Solarize,
    Translate,
    View,
)


def _flip(flip: bool) -> tuple:
    return (HorizontalFlip(),) if flip else ()


def simclr(
    size: int = 224,
    *,
    flip: bool = True,
    strength: float = 1.0,
    interpolation: str = "bicubic",
) -> View:
    """Crops of 8 to 100 % of the area, jitter of 0.8, 0.8, 0.8, 0.2 times `strength` with
    probability 0.8, grey 0.2, blur 0.5. Ports to PyTorch often interpolate bilinearly.

    Paper: SimCLR, arXiv 2002.05709, appendix A; strength 0.5 for CIFAR.
    """
    return _simclr(RandomResizedCrop(size, interpolation=interpolation), flip, strength)


def _simclr(crop: RandomResizedCrop, flip: bool, strength: float = 1.0) -> View:
    s = strength
    return View(
        crop,
        *_flip(flip),
        ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        Grayscale(0.2),
        GaussianBlur(0.5),
        Normalize(),
    )


def moco_v2(size: int = 224, *, flip: bool = True) -> View:
    """Crops of 20 to 100 %, jitter of 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey 0.2, blur 0.5.

    Paper: MoCo v2, arXiv 2003.04297.
    """
    return View(
        RandomResizedCrop(size, scale=(0.2, 1.0)),
        *_flip(flip),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(0.2),
        GaussianBlur(0.5),
        Normalize(),
    )


def _byol(crop: RandomResizedCrop, flip: bool, blur: float, solarize: float = 0.0) -> View:
    return View(
        crop,
        *_flip(flip),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        Grayscale(0.2),
        GaussianBlur(blur),
        *((Solarize(solarize),) if solarize else ()),
        Normalize(),
    )


def byol(size: int = 224, *, flip: bool = True, scale=(0.08, 1.0)) -> list[View]:
    """Two views: jitter of 0.4, 0.4, 0.2, 0.1 with probability 0.8, grey 0.2; the first always
    blurred, the second with probability 0.1 and solarised with 0.2. For MoCo v3, VICReg and
    Barlow Twins too.

    Paper: BYOL, arXiv 2006.07733, appendix B.
    """
    crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic")
    return [_byol(crop, flip, 1.0), _byol(crop, flip, 0.1, 0.2)]


def dino(
    size: int = 224,
    local_size: int = 96,
    *,
    local_views: int = 8,
    flip: bool = True,
    scale=(0.4, 1.0),
    local_scale=(0.05, 0.4),
) -> list[View]:
    """Two global views, of 40 to 100 % with BYOL's colours, then local ones of 5 to 40 % that are
    blurred with probability 0.5. DINOv2 divides the scales at 32 %.

    Paper: DINO, arXiv 2104.14294.
    """
    part = RandomResizedCrop(local_size, scale=local_scale, interpolation="bicubic")
    return byol(size, flip=flip, scale=scale) + [_byol(part, flip, 0.5)] * local_views


def rad_dino(
    size: int = 518,
    local_size: int = 224,
    *,
    local_views: int = 8,
    flip: bool = True,
    scale=(0.5, 1.0),
    local_scale=(0.2, 0.5),
) -> list[View]:
    """DINO's views for radiographs: larger parts, so that small findings stay in sight, and of its
    colours only brightness and contrast, of 0.4 with probability 0.8, and blur.

    `flip=False` keeps the heart on its side. Paper: RAD-DINO, arXiv 2401.10815.
    """

    def view(size, scale, blur):
        crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic")
        colour = (ColorJitter(0.4, 0.4, p=0.8), GaussianBlur(blur))
        return View(crop, *_flip(flip), *colour, Normalize())

    whole = [view(size, scale, blur) for blur in (1.0, 0.1)]
    return whole + [view(local_size, local_scale, 0.5)] * local_views


def swav(
    size: int = 224, local_size: int = 96, *, local_views: int = 6, flip: bool = True
) -> list[View]:
    """Two views of 14 to 100 %, then local ones of 5 to 14 %, all with SimCLR's colours.

    Paper: SwAV, arXiv 2006.09882.
    """
    whole = _simclr(RandomResizedCrop(size, scale=(0.14, 1.0)), flip)
    part = _simclr(RandomResizedCrop(local_size, scale=(0.05, 0.14)), flip)
    return [whole] * 2 + [part] * local_views


def lejepa(
    size: int = 224,
    local_size: int = 98,
    *,
    global_views: int = 2,
    local_views: int = 6,
    flip: bool = True,
) -> list[View]:
    """Global views of 30 to 100 %, local ones of 5 to 30 %; jitter of 0.4, 0.4, 0.2, 0.1 with
    probability 0.8, grey 0.2, blur 0.5, solarised 0.2.

    Paper: LeJEPA, arXiv 2511.08544.
    """
    whole = RandomResizedCrop(size, scale=(0.3, 1.0))
    part = RandomResizedCrop(local_size, scale=(0.05, 0.3))
    globals_, locals_ = ([_byol(crop, flip, 0.5, 0.2)] for crop in (whole, part))
    return globals_ * global_views + locals_ * local_views


def clip(size: int = 224) -> View:
    """Crops of 90 to 100 %, nothing else: captions may tell left from right and name colours.

    Paper: CLIP, arXiv 2103.00020, whose crop is a square of the image's shorter side; the share of
    the area is open_clip's.
    """
    crop = RandomResizedCrop(size, scale=(0.9, 1.0), interpolation="bicubic")
    return View(crop, Normalize())


def align(size: int = 289, *, flip: bool = True) -> View:
    """Crops of 70 % of the area, as of 289 pixels from 346, and mirror images.

    Paper: ALIGN, arXiv 2102.05918.
    """
    crop = RandomResizedCrop(size, scale=(0.7, 0.7), interpolation="bicubic")
    return View(crop, *_flip(flip), Normalize())


def mae(size: int = 224, *, flip: bool = True, scale: tuple[float, float] = (0.2, 1.0)) -> View:
    """Crops of 20 to 100 % and mirror images, nothing else. `scale`: other crops.

    Paper: masked autoencoders, arXiv 2111.06377.
    """
    crop = RandomResizedCrop(size, scale=scale, interpolation="bicubic")
    return View(crop, *_flip(flip), Normalize())


def small(
    size: int, channels: int, *, flip: bool = True, scale: tuple[float, float] | None = None
) -> View:
    """For images of 8 to 64 pixels: milder crops, no blur; noise instead of colour if not RGB.

    RGB: crops of 20 to 100 %, jitter of 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey 0.2. Others:
    crops of 40 to 100 % that reach 10 % beyond the edge, turned by up to 15 degrees, brightness
    and contrast of 0.4 with probability 0.8, noise of 0.1. `scale`: other crops, as of parts.
    """
    if channels == 3:
        return View(
            RandomResizedCrop(size, scale=scale or (0.2, 1.0)),
            *_flip(flip),
            ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            Grayscale(0.2),
            Normalize(),
        )
    return View(
        RandomResizedCrop(size, scale=scale or (0.4, 1.0), pad=0.1),
        Rotate(15.0),
        *_flip(flip),
        ColorJitter(0.4, 0.4, p=0.8),
        Noise(0.1),
        Normalize(),
    )


def xray(size: int = 224, *, flip: bool = True, blur: bool = True) -> View:
    """For radiographs: crops of 60 to 100 %, moved by up to 10 %, turned by up to 20 degrees,
    brightness and contrast 0.6 to 1.4, blur of 0.1 to 3 pixels; no hue or saturation.

    `flip=False` keeps the heart on its side, `blur=False` is for small images. Paper: ConVIRT,
    arXiv 2010.00747; its zoom of 5 % is left to the crop.
    """
    return View(
        RandomResizedCrop(size, scale=(0.6, 1.0)),
        Translate(0.1),
        Rotate(20.0),
        *_flip(flip),
        ColorJitter(0.4, 0.4),
        *((GaussianBlur(1.0, sigma=(0.1, 3.0)),) if blur else ()),
        Normalize(),
    )
