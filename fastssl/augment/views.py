"""What a view is: a tuple of small frozen specifications, read like torchvision's Compose."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastssl.ops import view_parameters as op

Range = tuple[float, float]


def _range(spec, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Makes a field two numbers low <= a <= b <= high, or says what is wrong with it."""
    value = getattr(spec, name)
    pair = tuple(value) if isinstance(value, Sequence) else ()
    numbers = len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
    if not numbers or not low <= pair[0] <= pair[1] <= high or not math.isfinite(pair[1]):
        bounds = f"{low:g} <= low <= high" + (f" <= {high:g}" if high < math.inf else "")
        raise ValueError(
            f"{type(spec).__name__}: {name} must be two numbers {bounds}, got {value!r}."
        )
    object.__setattr__(spec, name, pair)


def _number(spec, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(spec, name)
    if not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"{type(spec).__name__}: {name} must be a number {bounds}, got {value!r}.")


def _resizing(spec) -> None:
    name = type(spec).__name__
    if type(spec.size) is not int or not 0 < spec.size < 1 << 15:
        raise ValueError(
            f"{name}: size must be a whole number of pixels, at least 1 and below 32768, "
            f"got {spec.size!r}."
        )
    if spec.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f'{name}: interpolation must be "bilinear" or "bicubic", got {spec.interpolation!r}.'
        )


@dataclass(frozen=True)
class Resize:
    """The whole image as a square of `size` pixels; its aspect is not kept."""

    size: int
    interpolation: str = "bilinear"
    antialias: bool = True

    def __post_init__(self):
        _resizing(self)

    def write(self, row: list[float]) -> None:
        row[op.CROP] = 0


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image as a square of `size` pixels, drawn as torchvision's.

    `scale` is the part's area as a share of the image's, uniform; `ratio` its width over its
    height, log-uniform. With `pad` the part may reach so far beyond each edge, as a share of the
    image's side, where the edge's pixels are repeated; corners then lie between pixels.
    """

    size: int
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    antialias: bool = True
    pad: float = 0.0

    def __post_init__(self):
        _resizing(self)
        _range(self, "scale", 1e-6, 1)
        _range(self, "ratio", 1e-3)
        _number(self, "pad", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.CROP] = 1
        row[op.AREA : op.AREA + 2] = self.scale
        row[op.RATIO : op.RATIO + 2] = self.ratio
        row[op.PAD] = self.pad


@dataclass(frozen=True)
class Translate:
    """Moves the part by U(-fraction, fraction) of its side along each axis; edges are repeated."""

    fraction: float

    def __post_init__(self):
        _number(self, "fraction", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.SHIFT] = self.fraction


@dataclass(frozen=True)
class Rotate:
    """Turns the part about its centre by U(-degrees, degrees); edges are repeated.

    What is turned is sampled bilinearly without antialiasing.
    """

    degrees: float

    def __post_init__(self):
        _number(self, "degrees", 0, 180)

    def write(self, row: list[float]) -> None:
        row[op.ROTATION] = math.radians(self.degrees)


@dataclass(frozen=True)
class Rotate90:
    """With probability p a turn by 0, 1, 2 or 3 quarters, each as likely."""

    p: float = 1.0

    def __post_init__(self):
        _number(self, "p", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.TURNS_P] = self.p


@dataclass(frozen=True)
class HorizontalFlip:
    """With probability p the mirror image, left and right exchanged."""

    p: float = 0.5

    def __post_init__(self):
        _number(self, "p", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.FLIP_P] = self.p


@dataclass(frozen=True)
class ColorJitter:
    """With probability p four colour operations in a random order, as torchvision's.

    A number b stands for factors in (max(0, 1 - b), 1 + b), for the hue (-b, b) turns; or give the
    pair. Saturation and hue are left out for images without exactly three channels.
    """

    brightness: float | Range = 0.0
    contrast: float | Range = 0.0
    saturation: float | Range = 0.0
    hue: float | Range = 0.0
    p: float = 1.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            if isinstance(value := getattr(self, name), (int, float)):
                _number(self, name, 0)
                object.__setattr__(self, name, (max(0.0, 1.0 - value), 1.0 + value))
            _range(self, name, 0)
        if isinstance(self.hue, (int, float)):
            _number(self, "hue", 0, 0.5)
            object.__setattr__(self, "hue", (0.0 - self.hue, 0.0 + self.hue))
        _range(self, "hue", -0.5, 0.5)
        _number(self, "p", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.JITTER_P] = self.p
        row[op.FACTORS : op.FACTORS + 8] = (
            *self.brightness, *self.contrast, *self.saturation, *self.hue,
        )  # fmt: skip


@dataclass(frozen=True)
class Grayscale:
    """With probability p the luminance in all three channels."""

    p: float = 0.1

    def __post_init__(self):
        _number(self, "p", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.GRAY_P] = self.p


@dataclass(frozen=True)
class GaussianBlur:
    """With probability p a blur of standard deviation U(sigma), in pixels of the view.

    The window reaches max(1, size // 20) pixels to each side, about SimCLR's tenth of the view.
    """

    p: float = 0.5
    sigma: Range = (0.1, 2.0)

    def __post_init__(self):
        _number(self, "p", 0, 1)
        _range(self, "sigma", 1e-3)

    def write(self, row: list[float]) -> None:
        row[op.BLUR_P] = self.p
        row[op.BLUR : op.BLUR + 2] = self.sigma


@dataclass(frozen=True)
class Solarize:
    """With probability p values from the threshold on become 1 minus themselves."""

    p: float = 0.2
    threshold: float = 128 / 255

    def __post_init__(self):
        _number(self, "p", 0, 1)
        _number(self, "threshold", 0, 1)

    def write(self, row: list[float]) -> None:
        row[op.SOLARIZE_P], row[op.THRESHOLD] = self.p, self.threshold


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of this standard deviation on every value, for values in [0, 1]."""

    std: float

    def __post_init__(self):
        _number(self, "std", 0)

    def write(self, row: list[float]) -> None:
        row[op.NOISE_STD] = self.std


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / std by channels. None: ImageNet's numbers for three channels, else 0.5 and 0.5.

    Without it values lie in [0, 1].
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError("Normalize: give both mean and std, or neither.")
        if self.mean is None:
            return
        mean, std = (
            tuple(float(v) for v in x) if isinstance(x, Iterable) else ()
            for x in (self.mean, self.std)
        )
        if not mean or len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                "Normalize: mean and std must hold one number a channel each, std above 0, "
                f"got {self.mean} and {self.std}."
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def write(self, row: list[float]) -> None:
        """Nothing: it is not random."""


_ORDER = (
    (RandomResizedCrop, Resize),
    (Translate, Rotate),
    (Rotate90,),
    (ColorJitter,),
    (Grayscale,),
    (GaussianBlur,),
    (Solarize,),
    (Noise,),
    (Normalize,),
)
_STAGE = {kind: stage for stage, kinds in enumerate(_ORDER) for kind in kinds}


@dataclass(frozen=True, init=False, repr=False)
class View:
    """One random view of an image: specifications in the order the kernels go through them.

    View(RandomResizedCrop | Resize, Translate, Rotate, Rotate90, ColorJitter, Grayscale,
    GaussianBlur, Solarize, Noise, Normalize); HorizontalFlip anywhere. Only the first is needed,
    each may be given once. Views are equal where their specifications are.

    Raises:
        TypeError: something else than a specification. ValueError: another order, one given twice,
            or neither RandomResizedCrop nor Resize; the message gives the right order.

    Example:
        >>> from fastssl.augment import GaussianBlur, HorizontalFlip, RandomResizedCrop, View
        >>> View(RandomResizedCrop(224, scale=(0.2, 1.0)), HorizontalFlip(), GaussianBlur(0.5)).size
        224
    """

    specs: tuple

    def __init__(self, *specs):
        for spec in specs:
            if type(spec) not in _STAGE and not isinstance(spec, HorizontalFlip):
                raise TypeError(
                    f"View: must hold specifications such as RandomResizedCrop(224), got {spec!r}."
                )
        ordered = [spec for spec in specs if type(spec) in _STAGE]
        stages = [_STAGE[type(spec)] for spec in ordered]
        names = [type(spec).__name__ for spec in specs]
        if len(set(names)) < len(names) or stages.count(0) > 1:
            raise ValueError(f"View: each specification may stand once, got {', '.join(names)}.")
        if stages != sorted(stages):
            right = [type(spec).__name__ for spec in sorted(ordered, key=lambda s: _STAGE[type(s)])]
            raise ValueError(
                f"View: the order must be {', '.join(right)}, got {', '.join(names)}. "
                "The kernels apply it so, whatever stands first here."
            )
        if 0 not in stages:
            raise ValueError(
                f"View: must begin with RandomResizedCrop(size) or Resize(size), got "
                f"{', '.join(names) or 'nothing'}."
            )
        object.__setattr__(self, "specs", specs)

    def __repr__(self) -> str:
        return f"View({', '.join(map(repr, self.specs))})"

    def get(self, kind: type):
        """The specification of this type, or None."""
        return next((spec for spec in self.specs if isinstance(spec, kind)), None)

    @property
    def crop(self) -> RandomResizedCrop | Resize:
        return self.get(RandomResizedCrop) or self.get(Resize)

    @property
    def size(self) -> int:
        """Side of the view in pixels."""
        return self.crop.size

    def numbers(self) -> list[float]:
        """A row of `ops.view_parameters`' spec."""
        row = [0.0] * op.SPEC
        row[op.AREA : op.RATIO + 2] = (1.0,) * 4
        row[op.FACTORS : op.FACTORS + 8] = [x for x in op.NEUTRAL for _ in range(2)]
        row[op.BLUR : op.BLUR + 2] = (1.0,) * 2
        for spec in self.specs:
            spec.write(row)
        return row
