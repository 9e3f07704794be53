"""SimCLR's view of uint8 images, draws included: ours, torchvision image by image, and kornia.

Draws differ, so what is compared is the standard deviation of some pixels of all views.
"""

import harness
import pytest
import torch

from fastssl.augment import augment, simclr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # N images of H x H pixels, views of M x M
    "cpu": [(64, 256, 224), (64, 256, 96), (1024, 32, 32)],
    "cuda": [(512, 256, 224), (512, 256, 96), (4096, 32, 32)],
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_views(images, size: int, taps: int):
    T = pytest.importorskip("torchvision.transforms.v2")
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


def kornia_views(images, size: int, taps: int):
    import kornia.augmentation as K

    transform = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(images.device)
    return lambda: transform(images.float() / 255)


def make(case: str, N: int, M: int, H: int, dtype: str, device: str) -> dict:
    """Ours, the baseline and others by name: each makes all views and gives their deviation."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, 3, H // 4, H // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (H, H), mode="bilinear")
    images = (255 * images).to(getattr(torch, dtype)).to(device)
    index, taps = torch.arange(N, device=device), 2 * max(1, M // 20) + 1
    view = simclr(M, interpolation="bilinear")
    views = {
        "ours": lambda: augment(images, index, [view], seed=0, epoch=0)[0],
        "torchvision": torchvision_views(images, M, taps),
    }
    try:
        views["kornia"] = kornia_views(images, M, taps)
    except ImportError:
        pass

    def deviation(make_views):
        torch.manual_seed(0)
        return (make_views()[:, :, ::4, ::4].std(),)

    return {name: lambda call=call: deviation(call) for name, call in views.items()}


@pytest.mark.parametrize("N,H,M", SIZES[DEVICE])
def test_simclr(benchmark, N, H, M):
    params = {"case": "simclr", "N": N, "M": M, "H": H, "dtype": "uint8", "device": DEVICE}
    traffic = 3 * N * (H * H + 4 * M * M)  # images read, views written
    harness.measure(benchmark, __name__, params, (3 * N, M * M), 0, 0, traffic)
