import math
import re

import pytest
import torch
import torch.nn.functional as F

from fastssl.data import ShapesSource, TensorSource, load
from fastssl.data.shapes import COLOURS, SHAPE_NAMES, VARIANTS

LUMINANCE = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
# Sum of value times weight over the first 64 training images.
CHECKSUMS = {
    "shapes": 1291959079,
    "shapes:greyscale": 1294958643,
    "shapes:inverted": 1099552675,
    "shapes:multi": 1335345285,
    "shapes:spurious": 1220123975,
    "shapes:long_tail": 1277774906,
    "shapes:mismatched": 1294958643,  # as greyscale
}


@pytest.fixture(scope="module")
def train():
    return load("shapes", "train")


def everything(source):
    return torch.arange(len(source))


def luminance(images):
    """(B, 3, H, W) uint8 to (B, H, W) float64 in [0, 1]."""
    return torch.einsum("bchw,c->bhw", images.double() / 255, LUMINANCE)


def found(images, scene):
    """(B, H, W): what is on the shapes' side of half way to the background's luminance."""
    present, Y, ends = scene.shape >= 0, scene.rgb @ LUMINANCE, scene.ends @ LUMINANCE
    lighter = Y[:, 0] > ends[:, 0]
    least, most = Y.where(present, 1).amin(1), Y.where(present, 0).amax(1)
    middle = torch.where(lighter, least + ends.amax(1), most + ends.amin(1)) / 2
    return (luminance(images) > middle[:, None, None]) == lighter[:, None, None]


def middle(area):
    """(B, H, W) bool to (B, 2): x and y of its middle, in half sides from the image's."""
    ticks = (torch.arange(area.shape[-1]) + 0.5) * (2 / area.shape[-1]) - 1
    area = area / area.sum((1, 2), keepdim=True)
    return torch.stack(((area.sum(1) * ticks).sum(1), (area.sum(2) * ticks).sum(1)), 1)


def whole(scene):
    """(B,): whether the first shape lies inside of the image."""
    return (scene.centre[:, 0].abs().amax(1) + 1.2 * scene.radius[:, 0]) < 1


def chi_square(one, other):
    """Of two (N,) vectors of numbers below 8; 49 degrees of freedom."""
    counts = torch.zeros(8, 8).index_put_((one, other), torch.tensor(1.0), accumulate=True)
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / len(one)
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_source_like_any_other(train):
    test = load("shapes", "test")
    assert isinstance(train, TensorSource) and (len(train), len(test)) == (4096, 1024)
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (3, 32, 32)
    assert train.class_names == SHAPE_NAMES and train.num_classes == 8 and train.name == "shapes"
    assert train.labels.bincount().tolist() == [512] * 8
    image, label, index = train[5]
    assert torch.equal(image, train.images[5]) and (label, index) == (5, 5)
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(seen) == 4096 and not seen & {image.numpy().tobytes() for image in test.images}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_on_every_machine(name):
    images = ShapesSource(name, size=64).images.long().flatten(1)
    weight = torch.arange(1, images.shape[1] + 1) % 97
    # Two values next to a border of rounding may be one level off.
    assert int((images * weight).sum()) == pytest.approx(CHECKSUMS[name], rel=0, abs=2 * 96)


@pytest.mark.parametrize("name", ["shapes", "shapes:multi"])
def test_an_image_depends_on_seed_split_and_number_alone(name):
    small, large = ShapesSource(name, size=5), ShapesSource(name, size=150)
    assert torch.equal(small.images, large.images[:5])
    assert torch.equal(small.labels, large.labels[:5])
    index = torch.tensor([4, 101, 0])
    assert torch.equal(large.masks(index), large.masks(everything(large))[index])
    for other in (ShapesSource(name, "test", size=5), ShapesSource(name, size=5, seed=1)):
        assert not (other.images == small.images).flatten(1).all(1).any()


def test_nuisance_does_not_tell_the_class(train):
    scene = train.scene(everything(train))
    factors = [scene.rgb[:, 0], scene.centre[:, 0], scene.radius, scene.angle]
    factors += [scene.ends.flatten(1), scene.direction[:, None].cos(), scene.direction[:, None]]
    factors = torch.cat(factors, 1)
    both = torch.cat((factors, factors**2, F.one_hot(train.labels)), 1)
    correlation = both.T.corrcoef()[:-8, -8:]
    assert correlation.abs().max() < 4 / len(train) ** 0.5
    assert chi_square(train.labels, scene.colour[:, 0]) < 49 + 4 * 98**0.5


def test_nuisance_is_within_its_ranges(train):
    scene = train.scene(everything(train))
    for values, low, high in (
        (scene.centre, -6 / 16, 6 / 16),
        (scene.radius, 0.4, 0.8),
        (scene.angle.rad2deg(), -20, 20),
    ):
        margin = 0.01 * (high - low)
        assert low <= values.min() < low + margin and high - margin < values.max() <= high
    for colours in (scene.rgb, scene.ends):
        assert colours.min() > -1e-9 and colours.max() < 1 + 1e-9
    assert scene.colour.unique(return_counts=True)[1].min() > 400


@pytest.mark.parametrize("name", ["shapes", "shapes:multi", "shapes:spurious"])
def test_shapes_stand_out_from_their_background(name):
    source = ShapesSource(name, size=1000)
    scene = source.scene(everything(source))
    gap = (scene.rgb @ LUMINANCE)[:, :, None] - (scene.ends @ LUMINANCE)[:, None]  # (B, K, 2)
    gap = gap[scene.shape >= 0]
    assert gap.abs().min() >= 0.25 - 1e-9 and (gap[:, 0] * gap[:, 1] > 0).all()


def test_background_is_a_gradient_with_noise(train):
    scene = train.scene(everything(train))
    plain = ((scene.ends > 0.2) & (scene.ends < 0.8)).flatten(1).all(1)  # no noise is cut off
    ticks = torch.linspace(-1, 1, 32, dtype=torch.float64)
    plane = torch.stack((ticks.expand(32, 32), ticks[:, None].expand(32, 32), torch.ones(32, 32)))
    residuals = []
    for i in plain.nonzero()[:20, 0]:
        free = F.max_pool2d(train.masks(i[None]).double(), 3, 1, 1)[0] == 0
        pixels, basis = train.images[i].double()[:, free].T / 255, plane[:, free].T
        residuals.append(pixels - basis @ torch.linalg.lstsq(basis, pixels).solution)
    residuals = torch.cat(residuals)
    assert len(residuals) > 5000 and float(residuals.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float((residuals**4).mean() / residuals.var() ** 2) - 3) < 0.15  # normal


@pytest.mark.parametrize("name", ["shapes", "shapes:multi", "shapes:greyscale"])
def test_masks_fit_images(name):
    source = ShapesSource(name, size=256, image_size=64)
    masks, scene = source.masks(everything(source)), source.scene(everything(source))
    assert masks.shape == (256, 64, 64) and masks.dtype == torch.int64
    shown = F.one_hot(masks, 9).flatten(1, 2).amax(1)[:, 1:]
    expected = source.labels if name == "shapes:multi" else F.one_hot(source.labels, 8)
    assert torch.equal(shown, expected)
    seen = found(source.images, scene)
    both, either = (seen & (masks > 0)).sum((1, 2)), (seen | (masks > 0)).sum((1, 2))
    assert (both / either).min() > 0.75 and (both / either).mean() > 0.93


def test_areas_are_those_of_the_formulas():
    source = ShapesSource(size=1, image_size=256)
    scene = source.scene(torch.arange(400))
    first = [int((whole(scene) & (scene.shape[:, 0] == k)).nonzero()[0, 0]) for k in range(8)]
    area = 4 * (source.masks(torch.tensor(first)) > 0).double().mean((1, 2))
    area /= scene.radius[first, 0] ** 2
    tan36, tan72 = math.tan(math.pi / 5), math.tan(2 * math.pi / 5)
    expected = {
        "disc": math.pi * 0.95**2,
        "ring": math.pi * (0.97**2 - 0.53**2),
        "square": 1.6**2,
        "triangle": 3 * math.sqrt(3) * 0.55**2,
        "plus": 2 * 1.9 * 0.6 - 0.6**2,
        "stripes": 3 * 1.7 * 0.34,
        "checker": 1.7**2 / 2,
        "star": 5 * 0.36**2 * (tan36 + tan36**2 * tan72),  # a pentagon and five triangles
    }
    assert tuple(expected) == SHAPE_NAMES
    assert area.tolist() == pytest.approx(list(expected.values()), rel=0.02)


def test_greyscale_and_inverted_show_the_same_shapes(train):
    index = torch.arange(64)
    grey, inverted = (ShapesSource(f"shapes:{name}", size=64) for name in ("greyscale", "inverted"))
    assert torch.equal(grey.images[:, 0], grey.images[:, 1])
    for other in (grey, inverted):
        assert torch.equal(other.masks(index), train.masks(index))
    plain = train.images[:64]
    assert (luminance(plain) - luminance(grey.images)).abs().mean() < 0.06  # two images' noise
    difference = luminance(plain) + luminance(inverted.images) - 1
    background = F.max_pool2d((train.masks(index) > 0).double(), 3, 1, 1) == 0
    texture, none = difference[background].std(), difference[train.masks(index) > 0].std()
    assert difference.mean().abs() < 0.01 and none < 0.075 and texture > 1.2 * none


def test_multi_has_one_to_three_different_shapes():
    source = ShapesSource("shapes:multi", size=3000, image_size=1)
    assert source.labels.shape == (3000, 8) and source.labels.dtype == torch.int64
    assert source.labels.unique().tolist() == [0, 1]
    counts = source.labels.sum(1).bincount(minlength=4)
    assert counts[0] == 0 and len(counts) == 4 and (counts[1:] - 1000).abs().max() < 120
    assert (source.labels.sum(0) - 750).abs().max() < 100  # each in two of eight images
    image, label, index = source[7]
    assert torch.equal(label, source.labels[7]) and index == 7
    assert source.batch(torch.arange(3))[1].shape == (3, 8)


def test_spurious_colour_tells_the_class_only_in_training():
    for split, share in (("train", 0.95), ("test", 1 / 8)):
        source = ShapesSource("shapes:spurious", split, size=4000, image_size=1)
        agree = source.scene(everything(source)).colour[:, 0] == source.labels
        assert float(agree.double().mean()) == pytest.approx(share, abs=0.02)


def test_long_tail_is_for_training():
    train, test = (
        ShapesSource("shapes:long_tail", s, size=4000, image_size=1) for s in ("train", "test")
    )
    share = 1 / torch.arange(1.0, 9.0)
    share /= share.sum()
    assert (train.labels.bincount() / 4000 - share).abs().max() < 0.025
    assert test.labels.bincount().tolist() == [500] * 8


def test_captions_tell_what_is_seen(train):
    index = everything(train)
    pattern = (
        rf"(a )?(small|medium|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPE_NAMES)}) (?:in the "
        r"centre|(?:at the|on the) ((?:top|bottom)?) ?((?:left|right)?))"
    )
    words = [re.fullmatch(pattern, caption).groups("") for caption in train.captions(index)]
    assert [SHAPE_NAMES.index(row[3]) for row in words] == train.labels.tolist()
    assert all(bool(row[0]) == (row[3] != "stripes") for row in words)
    discs = index[whole(train.scene(index)) & (train.labels == 0)]
    masks = train.masks(discs) > 0
    radius = (4 * masks.double().mean((1, 2)) / math.pi).sqrt() / 0.95
    sizes, rows, columns = set(), set(), set()
    for i, r, (x, y) in zip(discs.tolist(), radius, middle(masks), strict=True):
        _, size, _, _, row, column = words[i]
        low, high = {"small": (0, 0.54), "medium": (0.52, 0.68), "large": (0.66, 1)}[size]
        assert low < r < high
        for word, at, names in ((row, y, ("top", "bottom")), (column, x, ("left", "right"))):
            low, high = {names[0]: (-1, -0.1), "": (-0.15, 0.15), names[1]: (0.1, 1)}[word]
            assert low < at < high
        sizes.add(size), rows.add(row), columns.add(column)
    assert (len(sizes), len(rows), len(columns)) == (3, 3, 3)


def test_colours_are_those_of_the_captions(train):
    scene = train.scene(everything(train))
    pure = {"red": "100", "orange": "1h0", "yellow": "110", "green": "010", "cyan": "011",
            "blue": "001", "purple": "h01", "pink": "10h"}  # fmt: skip
    table = torch.tensor([[{"0": 0, "1": 1, "h": 0.5}[c] for c in pure[name]] for name in COLOURS])
    relative = scene.rgb[:, 0] - scene.rgb[:, 0].amin(1, keepdim=True)
    relative /= relative.amax(1, keepdim=True)
    assert torch.equal(torch.cdist(relative.float(), table).argmin(1), scene.colour[:, 0])


def test_captions_of_variants():
    multi = ShapesSource("shapes:multi", size=200, image_size=1)
    for caption, label in zip(multi.captions(everything(multi)), multi.labels, strict=True):
        names = [name for name in SHAPE_NAMES if name in caption.split()]
        assert names == [SHAPE_NAMES[k] for k in label.nonzero()[:, 0]]
        assert caption.count(" and ") == len(names) - 1
        places = re.findall("at the (?:top|bottom) (?:left|right)", caption)
        assert len(set(places)) == len(names)
    for name in ("shapes:greyscale", "shapes:inverted"):
        for caption in ShapesSource(name, size=1, image_size=1).captions(torch.arange(50)):
            assert not set(caption.split()) & set(COLOURS)
    index = torch.arange(1000)
    for split, least, most in (("train", 0.26, 0.34), ("test", 0, 0)):
        right, other = (
            ShapesSource(name, split, size=1, image_size=1).captions(index)
            for name in ("shapes:greyscale", "shapes:mismatched")
        )
        assert least <= sum(a != b for a, b in zip(right, other, strict=True)) / 1000 <= most


def test_tracks_move_from_the_image():
    source = ShapesSource(size=16, image_size=48)
    index = torch.tensor([0, 2, 3, 4, 8, 10])
    tracks = source.tracks(index)
    assert tracks.shape == (6, 8, 3, 48, 48) and tracks.dtype == torch.uint8
    assert torch.equal(tracks[:, 0], source.images[index])
    assert torch.equal(source.tracks(index[1:2])[0], tracks[1])
    assert (tracks[:, 1:] != tracks[:, :-1]).double().mean() > 0.6  # new noise in every frame
    start, end = source.scene(index), source.scene(index, 1.0)
    for name in ("shape", "rgb", "ends"):
        assert torch.equal(getattr(start, name), getattr(end, name))
    for name in ("centre", "radius", "angle"):
        assert (getattr(start, name) != getattr(end, name)).all()
    for frame in range(8):
        now = source.scene(index, frame / 7)
        inside = whole(now) & (now.shape[:, 0] != 3)  # a triangle's middle is not its centre
        assert inside.any()
        seen = middle(found(tracks[:, frame], now)[inside])
        assert (seen - now.centre[inside, 0]).abs().max() < 0.04
    assert source.tracks(index, 1).shape[1] == 1


@pytest.mark.parametrize("side", [1, 3, 500])
def test_any_side(side):
    source = ShapesSource("shapes:inverted", size=2, image_size=side)
    assert source.images.shape == (2, 3, side, side)
    assert source.masks(torch.arange(2)).shape == (2, side, side)


def test_errors():
    with pytest.raises(ValueError, match="got 'shapes:mulit'. Did you mean 'shapes:multi'?"):
        load("shapes:mulit")
    with pytest.raises(ValueError, match='"train" or "test", got \'val\''):
        ShapesSource(split="val")
    with pytest.raises(ValueError, match="at least 1, got 0 and 32"):
        ShapesSource(size=0)
    source = ShapesSource(size=1)
    with pytest.raises(ValueError, match="frames must be between 1 and 128, got 0"):
        source.tracks(torch.arange(1), 0)
    for index in (torch.tensor([3, -1]), torch.tensor(0), torch.tensor([0.0])):
        for method in (source.captions, source.masks, source.tracks):
            with pytest.raises(ValueError, match="index must be sample numbers from 0 on"):
                method(index)
    nothing = torch.arange(0)
    assert source.captions(nothing) == [] and len(source.tracks(nothing)) == 0
