"""What a view is: one frozen description, and the presets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """One random view of an image. The defaults change nothing but the size.

    Colour parts (saturation, hue, grey) are skipped for images without exactly three channels.
    """

    size: int
    """Side of the view in pixels."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Area of the crop as a fraction of the (padded) image, uniform."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, log-uniform; (1, 1) keeps it square."""
    pad: float = 0.0
    """Border the crop may reach into, as a fraction of the side; filled with the edge pixels."""
    rotate: float = 0.0
    """Largest rotation about the centre of the crop, in degrees."""
    flip: float = 0.0
    """Probability of a left-right mirror image."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation (factors in 1 -+ s) and hue (turns)."""
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian in pixels of the view, uniform."""
    solarize_p: float = 0.0
    noise: float = 0.0
    """Standard deviation of Gaussian pixel noise, for intensities in [0, 1]."""

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"View: size must be at least 1 pixel, got {self.size}.")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"View: crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}. "
                "Use pad for crops that are larger than the image."
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"View: crop_ratio must be 0 < low <= high, got {self.crop_ratio}.")
        for name in ("flip", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"View: {name} is a probability in [0, 1], got {getattr(self, name)}."
                )


def simclr(size: int, *, flip: bool = True, strength: float = 1.0) -> View:
    """The augmentation of SimCLR (arXiv 2002.05709, appendix A) for photographs."""
    s = strength
    return View(
        size,
        crop_scale=(0.08, 1.0),
        flip=0.5 * flip,
        jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5,
    )


def small(size: int, channels: int, *, flip: bool = True) -> View:
    """For images of 8 to 64 pixels: milder crops, no blur; noise instead of colour if not RGB."""
    if channels == 3:
        return View(
            size,
            crop_scale=(0.2, 1.0),
            flip=0.5 * flip,
            jitter=(0.4, 0.4, 0.4, 0.1),
            jitter_p=0.8,
            gray_p=0.2,
        )
    return View(
        size,
        crop_scale=(0.4, 1.0),
        pad=0.1,
        rotate=15.0,
        flip=0.5 * flip,
        jitter=(0.4, 0.4, 0.0, 0.0),
        jitter_p=0.8,
        noise=0.1,
    )
