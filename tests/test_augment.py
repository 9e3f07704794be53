"""Views of batches: the numbers they come from, what they depend on, specifications, errors."""

import pytest
import torch
import torch.nn.functional as F

from fastssl import extension, random
from fastssl.augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Noise,
    Normalize,
    RandomResizedCrop,
    Resize,
    Rotate,
    Rotate90,
    Solarize,
    Translate,
    View,
    augment,
    byol,
    dino,
    lejepa,
    mae,
    moco_v2,
    pack,
    prepare,
    simclr,
    small,
    swav,
    xray,
)
from fastssl.data import TensorSource, batches, epoch_order
from fastssl.ops.augment import FLIP, NOISE, PARAMS, X0, Y1
from fastssl.random import (
    AUGMENT,
    ORDER,
    permutation,
    philox4x32,
    step_seed,
    uniform,
    words,
)

# Known answers of Philox4x32-10: counter, key, result (Random123's kat_vectors).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    counter, key, expected = (
        [int(w, 16) for w in text.split()] for text in (counter, key, expected)
    )
    assert philox4x32(torch.tensor(counter), tuple(key)).tolist() == expected


def test_words_do_not_depend_on_how_they_are_asked_for():
    index = torch.tensor([0, 7, 2**40 + 3, 7])
    all_words = words(5, AUGMENT, 2, index, 1, 30)
    assert torch.equal(words(5, AUGMENT, 2, index[1:2], 1, 30)[0], all_words[1])
    assert torch.equal(words(5, AUGMENT, 2, index, 1, 10, first=8), all_words[:, 8:18])
    assert torch.equal(all_words[1], all_words[3])
    changed = [
        words(6, AUGMENT, 2, index, 1, 30),
        words(5 + 2**32, AUGMENT, 2, index, 1, 30),
        words(5, ORDER, 2, index, 1, 30),
        words(5, AUGMENT, 3, index, 1, 30),
        words(5, AUGMENT, 2, index, 0, 30),
        words(5, AUGMENT, 2, index + 1, 1, 30),
        words(5, AUGMENT, 2, index + 2**32, 1, 30),
    ]
    assert all((other != all_words).float().mean() > 0.99 for other in changed)


def test_uniform_is_open(monkeypatch):
    """In float32 the largest word would give 1, and with it an order or a corner out of range."""
    extremes = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr(random, "words", lambda *args: extremes)
    u = uniform(0, AUGMENT, 0, torch.arange(1), 0, 2)
    assert u.dtype == torch.float64 and 0 < u[0] < u[1] < 1


def test_uniform_is_uniform():
    u = uniform(0, AUGMENT, 0, torch.arange(20000), 0, 4)
    assert 0 < u.min() and u.max() < 1
    assert (u.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(u.T) - torch.eye(4)).abs().max() < 0.03


def test_permutation():
    order = permutation(1000, seed=3, epoch=1)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, permutation(1000, seed=3, epoch=2))
    assert step_seed(0, 1, 0) != step_seed(0, 1, 1) != step_seed(0, 2, 1)


EVERYTHING = View(
    RandomResizedCrop(16, scale=(0.1, 1.0), pad=0.1), Translate(0.1), Rotate(20), Rotate90(0.5),
    HorizontalFlip(), ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8), Grayscale(0.2), GaussianBlur(0.5),
    Solarize(0.3), Noise(0.1), Normalize(),
)  # fmt: skip
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
VIEWS = [EVERYTHING, EVERYTHING, simclr(24), small(8, 3)]


def pictures(count, channels=3, height=20, width=24):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------- what views depend on


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("part", [1, 5, 17])
def test_views_are_the_same_in_any_batch(channels, part):
    images, index = pictures(40, channels), torch.randperm(40) + 100
    whole = augment(images, index, VIEWS, seed=1, epoch=3)
    for rows in torch.arange(40).split(part):
        torch.manual_seed(int(rows[0]))  # torch's own generators must not matter
        some = augment(images[rows], index[rows], VIEWS, seed=1, epoch=3)
        assert same(some, [w[rows] for w in whole])
    assert not torch.equal(whole[0], whole[1])
    for change in ({"epoch": 4}, {"seed": 2}):
        other = augment(images, index, VIEWS, **{"seed": 1, "epoch": 3, **change})
        assert not any(torch.equal(a, b) for a, b in zip(other, whole, strict=True))


@pytest.mark.skipif(bool(extension.why_missing), reason="the library's products may")
@pytest.mark.parametrize("threads", [2, 3])
def test_views_do_not_depend_on_threads(threads):
    images, index, before = pictures(40), torch.arange(40), torch.get_num_threads()
    one = augment(images, index, VIEWS, seed=1, epoch=3)
    torch.set_num_threads(threads)
    try:
        assert same(one, augment(images, index, VIEWS, seed=1, epoch=3))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_views_do_not_depend_on_workers_or_ranks(workers, world):
    """The global batches of an epoch, however they are decoded and shared out."""
    source = TensorSource("pictures", pictures(50), torch.zeros(50, dtype=torch.long), ["any"])

    def epoch(workers, world):
        of_rank = []
        for rank in range(world):
            order = epoch_order(50, 16, seed=0, epoch=2, rank=rank, world=world)
            of_rank.append([
                torch.stack(augment(images, index, VIEWS[:2], seed=0, epoch=2))
                for images, _, index in batches(source, order, workers=workers)
            ])  # fmt: skip
        return [torch.cat(step, 1) for step in zip(*of_rank, strict=True)]

    assert len(epoch(0, 1)) == 3 and same(epoch(0, 1), epoch(workers, world))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_views():
    images, index = pictures(40), torch.arange(40)
    settings = {"seed": 1, "epoch": 3, "return_params": True}
    cpu, drawn = augment(images, index, VIEWS, **settings)
    gpu, drawn_there = augment(images.cuda(), index, VIEWS, **settings)
    assert torch.equal(drawn_there.cpu(), drawn)
    for a, b in zip(cpu, gpu, strict=True):
        # Solarising may tip a value that rounding moves over the threshold.
        assert ((a - b.cpu()).abs() > 1e-4).float().mean() < 1e-3


def test_the_number_of_a_view_counts_and_not_its_neighbours():
    images, index = pictures(6), torch.arange(6)
    x = augment(images, index, VIEWS, seed=0, epoch=0)
    assert torch.equal(augment(images, index, VIEWS[:1], seed=0, epoch=0)[0], x[0])
    assert torch.equal(augment(images, index, [mae(8), *VIEWS[1:]], seed=0, epoch=0)[3], x[3])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integers_are_numbers_of_samples_too(dtype):
    images, index = pictures(4), torch.arange(4)
    x = augment(images, index, VIEWS, seed=0, epoch=0)
    assert same(x, augment(images, index.to(dtype), VIEWS, seed=0, epoch=0))


def test_compiles_to_one_graph():
    images, index = pictures(4), torch.arange(4)

    def both(images, index):
        views = augment(images, index, VIEWS, seed=1, epoch=3, channels_last=True)
        return [*views, prepare(images, 8)]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert same(compiled(images, index), both(images, index))


# ------------------------------------------------------------------------- images and results


def test_prepare_is_all_of_a_square():
    images = pictures(4, height=16, width=16)
    x = images.float() / 255
    torch.testing.assert_close(prepare(images, 16), (x - MEAN) / STD, atol=1e-6, rtol=1e-6)
    resized = F.interpolate(x, (9, 9), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(prepare(images, 9), (resized - MEAN) / STD, atol=1e-5, rtol=1e-5)
    gray = prepare(images[:, :1], 16)
    torch.testing.assert_close(gray, (x[:, :1] - 0.5) / 0.5, atol=1e-6, rtol=1e-6)


def test_images_of_many_sizes_in_one_buffer():
    images = [pictures(1, 3, h, w)[0] for h, w in ((1, 1), (40, 7), (9, 30), (20, 24))]
    index = torch.tensor([5, 2**40, 0, 5])
    got = augment(pack(images), index, VIEWS, seed=0, epoch=1)
    for b, image in enumerate(images):
        alone = augment(image[None], index[b : b + 1], VIEWS, seed=0, epoch=1)
        assert same(alone, [x[b : b + 1] for x in got])
    packed = pack(images)
    assert len(packed) == 4 and packed.to("meta").sizes.device.type == "meta"


def test_prepare_is_the_centre_square():
    images = [pictures(1, 3, h, w)[0] for h, w in ((1, 1), (40, 7), (9, 30), (20, 24))]
    squares = [images[0], images[1][:, 16:23], images[2][:, :, 10:19], images[3][:, :, 2:22]]
    for size in (8, 20):
        assert torch.equal(prepare(pack(images), size), prepare(pack(squares), size))
    clips = pictures(6).view(2, 3, 3, 20, 24)
    assert torch.equal(prepare(clips, 9), prepare(clips[..., 2:22], 9))
    assert torch.equal(prepare(clips, 9)[1, 2], prepare(clips[1], 9)[2])


def test_frames_of_a_clip_share_their_parameters():
    clips, index = pictures(6).view(2, 3, 3, 20, 24), torch.tensor([4, 9])
    got, params = augment(clips, index, VIEWS, seed=0, epoch=0, return_params=True)
    assert got[2].shape == (2, 3, 3, 24, 24) and params.shape == (len(VIEWS), 2, PARAMS)
    for t in range(3):
        frame = augment(clips[:, t], index, VIEWS, seed=0, epoch=0)
        assert same(frame, [x[:, t] for x in got])


def test_float_images_are_the_same_views():
    images, index = pictures(8), torch.arange(8)
    bytes_ = augment(images, index, VIEWS, seed=0, epoch=0)
    floats = augment(images.float() / 255, index, VIEWS, seed=0, epoch=0)
    for a, b in zip(bytes_, floats, strict=True):
        # Solarising may tip a value that rounding moves over the threshold.
        assert ((a - b).abs() > 1e-4).float().mean() < 1e-3
    images = images.float() / 255
    images[3, 1, 0, 2] = torch.nan
    x = prepare(images, 20)
    assert x[3, 1].isnan().any() and not x[3, 0].isnan().any() and x[:3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout_of_the_result(dtype):
    images, index = pictures(4), torch.arange(4)
    exact = augment(images, index, VIEWS, seed=0, epoch=0)
    for channels_last in (False, True):
        got = augment(
            images, index, VIEWS, seed=0, epoch=0, dtype=dtype, channels_last=channels_last
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert all(x.is_contiguous(memory_format=layout) for x in got)
        assert same(got, [x.to(dtype) for x in exact])


def test_parameters_come_out_and_go_in():
    images, index, views = pictures(8), torch.arange(8), [*byol(16), mae(12), small(9, 1)]
    x, params = augment(images, index, views, seed=3, epoch=1, return_params=True)
    assert params.shape == (4, 8, PARAMS) and params.dtype == torch.float32
    again = augment(images, index, views, seed=3, epoch=1, params=params)
    assert same(x, again)
    mirrored = params.clone()
    mirrored[..., FLIP] = 1 - mirrored[..., FLIP]
    mirrored[..., NOISE] = params[..., NOISE] = 0
    plain = augment(images, index, views, seed=3, epoch=1, params=params)
    flipped = augment(images, index, views, seed=3, epoch=1, params=mirrored)
    for a, b in zip(plain, flipped, strict=True):
        torch.testing.assert_close(a, b.flip(3), atol=1e-5, rtol=0)
    # The crop says where in the image a view's pixels are.
    x0, y0, x1, y1 = (int(v) for v in params[2, 0, X0 : Y1 + 1])
    part = images[:1, :, y0:y1, x0:x1].float() / 255
    part = F.interpolate(part, (12, 12), mode="bicubic", antialias=True, align_corners=False)
    part = (part.clamp(0, 1) - MEAN) / STD
    one = params[2:3, :1].clone()
    one[..., FLIP] = 0
    view = View(Resize(12, "bicubic"), Normalize())
    (got,) = augment(images[:1], index[:1], [view], seed=0, epoch=0, params=one)
    torch.testing.assert_close(got, part, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------- specifications


def test_presets_fit_their_images():
    for channels in (1, 3, 4):
        images = pictures(3, channels, 96, 80)
        views = [
            simclr(32), moco_v2(32), *byol(32), *dino(32, 16), *swav(32, 16), *lejepa(32, 16),
            mae(32), small(32, channels), xray(32),
        ]  # fmt: skip
        x = augment(images, torch.arange(3), views, seed=0, epoch=0)
        assert [v.shape[-1] for v in x] == [v.size for v in views]
        assert all(v.isfinite().all() and v.shape[:2] == (3, channels) for v in x)
    assert [v.size for v in dino()] == [224] * 2 + [96] * 8
    assert [v.size for v in swav()] == [224] * 2 + [96] * 6
    assert [v.size for v in lejepa()] == [224] * 2 + [98] * 6
    assert not any(v.get(HorizontalFlip) for v in [*dino(flip=False), small(8, 1, flip=False)])
    assert simclr(strength=0.5).get(ColorJitter) == ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    assert xray().get(ColorJitter).hue == (0, 0)


def test_views_compare_and_say_what_they_are():
    view = View(RandomResizedCrop(8, scale=[0.2, 1]), HorizontalFlip())
    assert view == View(RandomResizedCrop(8, scale=(0.2, 1)), HorizontalFlip())
    assert view != View(RandomResizedCrop(8, scale=(0.3, 1)), HorizontalFlip())
    assert eval(repr(view)) == view and len({view, eval(repr(view))}) == 1
    assert (view.size, view.crop.scale, view.get(Noise)) == (8, (0.2, 1), None)
    View(HorizontalFlip(), Resize(8), Rotate(1), Translate(0.1), Normalize())  # may stand anywhere


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(), r"View: must begin with RandomResizedCrop\(size\) or .*got nothing"),
        (lambda: View(Normalize()), "must begin with .*got Normalize"),
        (lambda: View(Resize(8), Resize(9)), "each specification may stand once, got Resize, Re"),
        (lambda: View(Resize(8), RandomResizedCrop(9)), "each specification may stand once"),
        (lambda: View(Resize(8), GaussianBlur(), Grayscale()),
         "the order must be Resize, Grayscale, GaussianBlur, got Resize, GaussianBlur, Gray"),
        (lambda: View(224), r"must hold specifications such as RandomResizedCrop\(224\), got 224"),
        (lambda: Resize(0), "Resize: size must be a whole number of pixels, at least 1"),
        (lambda: Resize(8.5), "Resize: size must be a whole number"),
        (lambda: Resize(8, "nearest"), 'interpolation must be "bilinear" or "bicubic", got'),
        (lambda: RandomResizedCrop(8, scale=(0.5, 1.5)), "scale must be two numbers .*<= 1, got"),
        (lambda: RandomResizedCrop(True), "RandomResizedCrop: size must be a whole number"),
        (lambda: RandomResizedCrop(8, scale=("a", "b")), "scale must be two numbers"),
        (lambda: RandomResizedCrop(8, scale=0.5), "scale must be two numbers"),
        (lambda: RandomResizedCrop(8, ratio=(2, 1)), "ratio must be two numbers"),
        (lambda: RandomResizedCrop(8, ratio=(1, float("inf"))), "ratio must be two numbers"),
        (lambda: RandomResizedCrop(8, pad=-1), r"pad must be a number in \[0, 1\], got -1"),
        (lambda: HorizontalFlip(2), r"HorizontalFlip: p must be a number in \[0, 1\], got 2"),
        (lambda: Grayscale(float("nan")), "Grayscale: p must be a number"),
        (lambda: ColorJitter(hue=0.6), r"ColorJitter: hue must be a number in \[0, 0.5\]"),
        (lambda: ColorJitter((-1, 1)), "ColorJitter: brightness must be two numbers 0 <= low"),
        (lambda: ColorJitter(-1), "ColorJitter: brightness must be a number at least 0, got -1"),
        (lambda: GaussianBlur(sigma=(0, 1)), "GaussianBlur: sigma must be two numbers"),
        (lambda: Rotate(200), r"Rotate: degrees must be a number in \[0, 180\]"),
        (lambda: Noise(-1), "Noise: std must be a number at least 0"),
        (lambda: Normalize((0.5,)), "give both mean and std"),
        (lambda: Normalize(0.5, 0.5), "one number a channel each, .*got 0.5 and 0.5"),
        (lambda: Normalize((0.5,), (0.0,)), "std above 0"),
    ],
)  # fmt: skip
def test_impossible_views_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


IMAGES, INDEX = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES.int()}, "augment: images must be uint8, or float32 .*int32. Convert"),
        ({"images": IMAGES.half()}, r"got torch.float16. .*16-bit floats by .float\(\)"),
        ({"images": IMAGES.numpy()}, "got ndarray"),
        ({"images": IMAGES[0]}, r"must be \(B, C, H, W\), clips .*got \(3, 8, 8\). Add a dim"),
        ({"images": IMAGES[:, :, :0]}, r"sides of 1 to 524288 pixels, got \(2, 3, 0, 8\)"),
        ({"images": torch.zeros(2, 0, 3, 8, 8)}, r"got \(2, 0, 3, 8, 8\)"),
        ({"images": torch.zeros(1, device="meta").expand(2, 1, 1, 2**31)},
         r"sides of 1 to 524288 pixels, got \(2, 1, 1, 2147483648\)"),
        ({"images": IMAGES.float().requires_grad_()}, "take no gradient"),
        ({"index": torch.arange(3)}, r"index must be \(2,\) integers, .*got torch.int64 \(3,\)"),
        ({"index": torch.zeros(2)}, "integers, .*got torch.float32"),
        ({"index": [0, 1]}, r"integers, .*got \[0, 1\]"),
        ({"index": torch.tensor([-1, 0])}, r"index must be in \[0, 2\^56\), got -1 to 0"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^63\), got -1"),
        ({"seed": torch.tensor(3)}, r"seed must be an int .*got tensor\(3\)"),
        ({"seed": 1.5}, "seed must be an int .*got 1.5"),
        ({"seed": "1"}, "seed must be an int .*got '1'"),
        ({"epoch": 2**32}, r"epoch must be an int in \[0, 2\^32\), got 4294967296"),
        ({"views": mae(8)}, "views must be a list of View, got View"),
        ({"views": (mae(8) for _ in range(2))}, "views must be a list of View, got <generator"),
        ({"params": [1]}, r"params must be float32 .*got \[1\]"),
        ({"views": []}, "views must be 1 to 256 views, got 0"),
        ({"views": [mae(8)] * 257}, "views must be 1 to 256 views, got 257"),
        ({"params": torch.zeros(1, 3, 20)}, r"\(V, B, PARAMS\) = \(1, 2, 20\), got .*\(1, 3, 20\)"),
        ({"params": torch.zeros(1, 2, 20)}, "crops must be x0 < x1"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        ({"views": [View(Resize(8), Normalize((0.5,), (0.5,)))]}, "each of 3 channels"),
    ],
)  # fmt: skip
def test_impossible_batches_are_refused(arguments, message):
    arguments = {"images": IMAGES, "index": INDEX, "views": [mae(8)], "seed": 0, "epoch": 0,
                 **arguments}  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        augment(arguments.pop("images"), arguments.pop("index"), arguments.pop("views"),
                **arguments)  # fmt: skip


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "pack: images must be at least one image"),
        ([IMAGES[0], IMAGES[0, :1]], r"one C for all, got \(1, 8, 8\) for image 1 and \(3, 8, 8\)"),
        ([IMAGES], r"must be \(C, H, W\) with one C for all, got \(2, 3, 8, 8\) for image 0"),
        ([IMAGES[0], IMAGES[0].float()], "one dtype, got torch.float32 for image 1"),
        ([IMAGES[0, :, :0]], r"sides of 1 to 524288 pixels, got \(3, 0, 8\)"),
        ([IMAGES[0].long()], "images must be uint8"),
        ([torch.tensor(1.0)], r"must be \(C, H, W\) with one C for all, got \(\) for image 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed(images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pack(images)


def test_no_images():
    assert [x.shape for x in augment(IMAGES[:0], INDEX[:0], VIEWS, seed=0, epoch=0)] == [
        (0, 3, v.size, v.size) for v in VIEWS
    ]
