"""SimCLR's view of uint8 images, draws included: ours, torchvision image by image, and kornia.

Draws differ, so what is compared is the standard deviation of some pixels of all views.
"""

import torch

from ..augment import augment, simclr
from .baselines import add, library
from .measure import Work

SIZES = {  # N images of H x H pixels, views of M x M
    "cpu": {"simclr_view": [{"N": N, "H": H, "M": M} for N, H, M in
                            ((1024, 32, 32), (64, 256, 96), (64, 256, 224))]},
    "cuda": {"simclr_view": [{"N": N, "H": H, "M": M} for N, H, M in
                             ((4096, 32, 32), (512, 256, 96), (512, 256, 224))]},
}  # fmt: skip
DTYPES = {"simclr_view": ["uint8"]}
SCALING = [("simclr_view", "N", (32, 64, 128, 256), {"H": 256, "M": 96}, 1)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def work(case: str, dtype: str, N: int, H: int, M: int) -> Work:
    return Work(traffic=3 * N * (H * H + 4 * M * M))  # images read, views written


def make(case: str, dtype: str, device: str, N: int, H: int, M: int) -> tuple[dict, list[str]]:
    """Providers by name, and the absent: each makes all views and gives their deviation."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, 3, H // 4, H // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (H, H), mode="bilinear")
    images = (255 * images).to(getattr(torch, dtype)).to(device)
    index, taps = torch.arange(N, device=device), 2 * max(1, M // 20) + 1
    view, absent = simclr(M, interpolation="bilinear"), []
    views = {"ours": lambda: augment(images, index, [view], seed=0, epoch=0)[0]}
    add(views, absent, "torchvision", lambda: _torchvision(images, M, taps))
    add(views, absent, "kornia", lambda: _kornia(images, M, taps))

    def deviation(make_views):
        torch.manual_seed(0)
        return (make_views()[:, :, ::4, ::4].std(),)

    return {name: lambda call=call: deviation(call) for name, call in views.items()}, absent


def _torchvision(images, size: int, taps: int):
    T = library("torchvision.transforms.v2")
    transform = T.Compose([
        T.RandomResizedCrop(size, antialias=True),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(taps, (0.1, 2.0))], p=0.5),
        T.ToDtype(torch.float32, scale=True),
        T.Normalize(MEAN, STD),
    ])  # fmt: skip
    return lambda: torch.stack([transform(image) for image in images])


def _kornia(images, size: int, taps: int):
    K = library("kornia.augmentation")
    transform = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(images.device)
    return lambda: transform(images.float() / 255)
