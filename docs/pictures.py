"""Draws docs/images/views.png: views of two photographs by each preset. Needs the `demo` extra."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from fastssl.augment import (
    Normalize,
    View,
    augment,
    byol,
    dino,
    lejepa,
    mae,
    moco_v2,
    simclr,
    small,
    swav,
    xray,
)

TILE, GAP, LABEL = 80, 3, 92
SEED = 0
COLUMNS = 4  # a photograph's views in each row
# What stands left, the views of one sample, and how large they are drawn.
ROWS = [
    ("simclr", [simclr()], [TILE]),
    ("moco_v2", [moco_v2()], [TILE]),
    ("byol", byol(), [TILE] * 2),
    ("dino", dino(), [TILE] * 2 + [TILE * 96 // 224] * 8),
    ("swav", swav(), [TILE] * 2 + [TILE * 96 // 224] * 6),
    ("lejepa", lejepa(), [TILE] * 2 + [TILE * 98 // 224] * 6),
    ("mae", [mae()], [TILE]),
    ("small", [small(32, 3)], [TILE]),
    ("xray", [xray()], [TILE]),
]


def plain(view: View) -> View:
    """The view with values in [0, 1]."""
    return View(*(spec for spec in view.specs if not isinstance(spec, Normalize)))


def drawn(x: torch.Tensor, side: int) -> torch.Tensor:
    """(C, s, s) as (3, side, side); small images show their pixels."""
    large = x.shape[-1] > side
    x = F.interpolate(
        x[None], (side, side), mode="bilinear" if large else "nearest", antialias=large
    )
    return x[0].expand(3, -1, -1)


def row(
    photo: torch.Tensor, first: int, name: str, views: list[View], sides: list[int]
) -> torch.Tensor:
    """(3, TILE, width): one sample of a multi-crop preset, several of the others."""
    image = photo[None]
    if name == "small":
        H, W = image.shape[2:]
        middle = image[..., (W - H) // 2 : (W + H) // 2]
        image = F.interpolate(middle.float(), (32, 32), mode="area").byte()
    if name == "xray":
        image = image.float().mean(1, keepdim=True).byte()
    step = TILE + GAP
    out = torch.ones(3, TILE, COLUMNS * step - GAP)
    for sample in range(max(1, COLUMNS // len(views))):
        index = torch.tensor([first + sample])
        tiles = augment(image, index, list(map(plain, views)), seed=SEED, epoch=0)
        for v, (x, side) in enumerate(zip(tiles, sides, strict=True)):
            top, left = 0, (sample * len(views) + v) * step
            if side < TILE:  # local views in two lines beside the two global ones
                top, left = v % 2 * (side + GAP), 2 * step + (v - 2) // 2 * (side + GAP)
            out[:, top : top + side, left : left + side] = drawn(x[0], side)
    return out


def main() -> None:
    photos = [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in load_sample_images().images]
    step, width = TILE + GAP, COLUMNS * (TILE + GAP) + 4 * GAP
    page = torch.ones(3, (1 + len(ROWS)) * step, LABEL + 2 * width)
    for number, photo in enumerate(photos):
        left = LABEL + number * width
        whole = F.interpolate(
            photo[None].float() / 255, (TILE, TILE * 3 // 2), mode="bilinear", antialias=True
        )
        page[:, :TILE, left : left + whole.shape[-1]] = whole[0]
        for line, (name, views, sides) in enumerate(ROWS, start=1):
            tiles = row(photo, 100 * line + 10 * number, name, views, sides)
            page[:, line * step : line * step + TILE, left : left + tiles.shape[-1]] = tiles
    picture = Image.fromarray((page * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for line, name in enumerate(["photograph", *(name for name, *_ in ROWS)]):
        pen.text((4, line * step + TILE // 2), name, "black", font, anchor="lm")
    path = Path(__file__).parent / "images" / "views.png"
    path.parent.mkdir(exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
