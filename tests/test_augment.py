import colorsys
import dataclasses

import pytest
import torch

from fastssl.augment import View, augment, draw, normalize, prepare, render, simclr, small
from fastssl.augment.random import (
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
    16, crop_scale=(0.1, 1.0), pad=0.1, rotate=20, flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2),
    jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.3, noise=0.1,
)  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("part", [1, 5, 17])
def test_views_are_the_same_in_any_batch(channels, part):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, channels, 20, 24), dtype=torch.uint8)
    index = torch.randperm(40) + 100
    whole = augment(images, index, [EVERYTHING] * 2, seed=1, epoch=3)
    for rows in torch.arange(40).split(part):
        torch.manual_seed(int(rows[0]))  # torch's own generators must not matter
        some = augment(images[rows], index[rows], [EVERYTHING] * 2, seed=1, epoch=3)
        assert all(torch.equal(s, w[rows]) for s, w in zip(some, whole, strict=True))
    assert not torch.equal(whole[0], whole[1])
    other_epoch = augment(images, index, [EVERYTHING], seed=1, epoch=4)
    assert not torch.equal(whole[0], other_epoch[0])


def test_a_view_without_randomness_is_the_image():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    (x,) = augment(images, torch.arange(4), [View(16, crop_ratio=(1, 1))], seed=0, epoch=0)
    torch.testing.assert_close(x, prepare(images, 16), atol=1e-5, rtol=0)
    (mirrored,) = augment(
        images, torch.arange(4), [View(16, crop_ratio=(1, 1), flip=1)], seed=0, epoch=0
    )
    torch.testing.assert_close(mirrored, prepare(images, 16).flip(3), atol=1e-5, rtol=0)


def test_boxes_have_the_area_and_ratio_asked_for():
    view = View(8, crop_scale=(0.2, 0.6))
    draws = draw(view, torch.arange(4000), seed=0, epoch=0, number=0, shape=(3, 30, 60))
    x0, y0, x1, y1 = draws.box.double().unbind(1)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 1 and y1.max() <= 1
    area, ratio = (x1 - x0) * (y1 - y0), (x1 - x0) * 60 / ((y1 - y0) * 30)
    assert 0.2 <= area.min() + 1e-6 and area.max() - 1e-6 <= 0.6
    assert 3 / 4 <= ratio.min() + 1e-5 and ratio.max() - 1e-5 <= 4 / 3
    # A crop of all of a wide image never fits; the fallback is the largest centred one.
    whole = draw(View(8), torch.arange(2), seed=0, epoch=0, number=0, shape=(3, 30, 60))
    torch.testing.assert_close(whole.box, torch.tensor([[1 / 6, 0, 5 / 6, 1]] * 2))


@pytest.mark.parametrize("rotation", [1, 3])
def test_rotation_of_a_square_by_quarter_turns(rotation):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    view = View(8, crop_ratio=(1, 1))
    draws = draw(view, torch.arange(2), seed=0, epoch=0, number=0, shape=(3, 8, 8))
    turned = dataclasses.replace(draws, angle=torch.full((2,), rotation * torch.pi / 2))
    expected = prepare(images, 8).rot90(rotation, dims=(2, 3))
    torch.testing.assert_close(render(images, view, turned), expected, atol=1e-4, rtol=0)


def _one_operation(number, factor, images):
    """Render with exactly one colour operation of a given factor; intensities in [0, 1]."""
    view = View(images.shape[-1], crop_ratio=(1, 1))
    count = len(images)
    draws = draw(view, torch.arange(count), seed=0, epoch=0, number=0, shape=images.shape[1:])
    factors, order = torch.ones(count, 4), torch.full((count, 4), -1)
    factors[:, number], order[:, 2] = factor, number
    x = render(images, view, dataclasses.replace(draws, factors=factors, order=order))
    zero, one = normalize(torch.zeros(1, 3, 1, 1)), normalize(torch.ones(1, 3, 1, 1))
    return (x - zero) / (one - zero)


def test_colour_operations_by_their_definitions():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    x = images.double() / 255
    luminance = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    mean = luminance.mean(dim=(2, 3), keepdim=True)
    for number, expected in enumerate(
        [1.4 * x, mean + 1.4 * (x - mean), luminance + 1.4 * (x - luminance)]
    ):
        got = _one_operation(number, 1.4, images).double()
        torch.testing.assert_close(got, expected.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-0.2, 0.1, 0.5])
def test_hue_against_colorsys(shift):
    images = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8)
    images[0, :, 0] = 77  # greys have no hue
    got = _one_operation(3, shift, images)[0].flatten(1).T
    for pixel, result in zip((images[0].flatten(1).T / 255).tolist(), got.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert result == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=1e-5)


def test_blur_keeps_constants_and_smooths():
    images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    images[1] = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    view = View(32, crop_ratio=(1, 1), blur_p=1.0, blur_sigma=(1.0, 1.0))
    (x,) = augment(images, torch.arange(2), [view], seed=0, epoch=0)
    torch.testing.assert_close(x[0], prepare(images, 32)[0], atol=1e-5, rtol=0)
    assert x[1].std() < 0.7 * prepare(images, 32)[1].std()


def test_noise_has_its_standard_deviation():
    images = torch.full((64, 1, 8, 8), 128, dtype=torch.uint8)
    (x,) = augment(images, torch.arange(64), [View(8, noise=0.1)], seed=0, epoch=0)
    noise = x * 0.5 + 0.5 - 128 / 255
    assert abs(noise.std() - 0.1) < 0.005 and abs(noise.mean()) < 0.005


def test_presets_fit_their_images():
    assert small(8, 1, flip=False).flip == 0
    assert simclr(224).blur_p == 0.5 and simclr(224).crop_scale == (0.08, 1.0)
    for channels in (1, 3):
        images = torch.randint(0, 256, (8, channels, 96, 80), dtype=torch.uint8)
        views = [simclr(96), small(32, channels)]
        x = augment(images, torch.arange(8), views, seed=0, epoch=0)
        assert [tuple(v.shape) for v in x] == [(8, channels, s, s) for s in (96, 32)]
        assert all(v.isfinite().all() for v in x)


def test_impossible_views_are_refused():
    with pytest.raises(ValueError, match="crop_scale must be"):
        View(8, crop_scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="flip is a probability"):
        View(8, flip=2)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        View(0)
