import json
from collections import Counter

import pytest
import torch
from test_data import picture, unpack

from fastssl.augment import augment, byol
from fastssl.config import from_dict
from fastssl.data import (
    DatasetSource,
    Mixture,
    ShapesSource,
    TensorSource,
    batches,
    epoch_order,
    epoch_size,
    load,
)
from fastssl.train import pretrain

NAMES = ("a", "b", "c")


def tensors(n, name="x", classes=NAMES, channels=1, first=0):
    """n images of one pixel value each: first, first + 1, ..."""
    value = torch.arange(first, first + n).byte()[:, None, None, None]
    labels = torch.arange(n) % max(1, len(classes)) if classes else torch.full((n,), -1)
    return TensorSource(name, value.expand(n, channels, 4, 4).contiguous(), labels, classes)


def counts(mixture, epochs, seed=0):
    """How often each sample comes in so many epochs."""
    drawn = torch.cat([mixture.draw(seed, epoch) % len(mixture) for epoch in range(epochs)])
    return drawn.bincount(minlength=len(mixture))


def test_samples_labels_and_numbers():
    mixture = Mixture([tensors(5), tensors(3, first=100)])
    images, labels = mixture.batch(torch.tensor([4, 5, 7, 8 + 6]))
    assert [int(x[0, 0, 0]) for x in unpack(images)] == [4, 100, 102, 101]
    assert labels.tolist() == [1, 0, 2, 1] and mixture.class_names == NAMES
    assert mixture[7][2] == 7 and len(mixture) == mixture.epoch_size == 8
    assert [part["first_number"] for part in mixture.parts] == [0, 5]

    mixture = Mixture([tensors(5), tensors(3, classes=()), tensors(3, classes=("a", "z"))])
    assert mixture.batch(torch.arange(11))[1].tolist() == [0, 1, 2, 0, 1, -1, -1, -1, 3, 4, 3]
    assert mixture.labels.tolist() == mixture.batch(torch.arange(11))[1].tolist()
    assert mixture.class_names == ("0/a", "0/b", "0/c", "2/a", "2/z")

    unnamed = DatasetSource([(torch.zeros(1, 4, 4, dtype=torch.uint8), 1)] * 2)
    assert unnamed.labels.tolist() == [1, 1]
    assert Mixture([unnamed, tensors(2)]).labels.tolist() == [-1, -1, 0, 1]
    mixture = Mixture([unnamed, unnamed])
    assert mixture.labels.tolist() == mixture.batch(torch.arange(4))[1].tolist() == [-1] * 4

    multi = ShapesSource("shapes:multi", size=4, image_size=16)
    mixture = Mixture([multi, ShapesSource("shapes", size=4, image_size=16)])
    assert mixture.batch(torch.arange(8))[1].tolist() == [-1] * 8 and mixture.num_classes == 0
    assert mixture.labels.tolist() == [-1] * 8
    mixture = Mixture([multi, multi])
    labels = mixture.batch(torch.tensor([1, 5]))[1]
    assert torch.equal(mixture.labels[[1, 5]], labels)
    assert labels.shape == (2, 8) and torch.equal(*labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_and_even_use(seed):
    mixture = Mixture([tensors(40), tensors(10)], weights=[1, 3])
    assert [part["an_epoch"] for part in mixture.parts] == [13, 37]  # 12.5 and 37.5
    for epoch in range(3):
        drawn = mixture.draw(seed, epoch)
        assert len(drawn) == len(drawn.unique()) == 50
        assert (drawn % 50 >= 40).sum() == 37 and drawn.max() // 50 in (3, 4)
    for epochs in (1, 4, 9):  # none comes again before all have come
        for part in counts(mixture, epochs, seed).split([40, 10]):
            assert part.max() - part.min() <= 1
    assert counts(mixture, 40, seed)[:40].tolist() == [13] * 40
    assert not torch.equal(mixture.draw(seed, 0), mixture.draw(seed, 1))
    assert not torch.equal(mixture.draw(seed, 0), mixture.draw(seed + 1, 0))


def test_temperature():
    sources = [tensors(100), tensors(25)]
    for temperature, shares in ((None, [100, 25]), (1, [100, 25]), (0.5, [83, 42]), (0, [63, 62])):
        mixture = Mixture(sources, temperature=temperature)
        assert [part["an_epoch"] for part in mixture.parts] == shares
    assert counts(Mixture(sources), 3).tolist() == [3] * 125  # by size: every sample once


def test_size_matched_is_one_subset():
    sources = [tensors(100), tensors(20, first=100)]
    mixture = Mixture(sources, temperature=0, mode="size_matched")
    assert len(mixture) == epoch_size(mixture) == 20 and counts(mixture, 2).tolist() == [2] * 20
    values = [int(x[0, 0, 0]) for x in unpack(mixture.batch(torch.arange(20))[0])]
    assert len(set(values)) == 20 and sum(value < 100 for value in values) == 10
    again = Mixture(sources, temperature=0, mode="size_matched")
    assert torch.equal(
        again.batch(torch.arange(20))[0].pixels, mixture.batch(torch.arange(20))[0].pixels
    )
    assert mixture.labels.tolist() == mixture.batch(torch.arange(20))[1].tolist()
    other = Mixture(sources, temperature=0, mode="size_matched", seed=1)
    assert not torch.equal(
        other.batch(torch.arange(20))[0].pixels, again.batch(torch.arange(20))[0].pixels
    )
    with pytest.raises(ValueError, match="subset of 60 .* got 30 of the 20 samples of x"):
        Mixture(sources, temperature=0, mode="size_matched", size=60)


def test_epoch_equalised():
    mixture = Mixture([tensors(100), tensors(20)], mode="epoch_equalised", size=12)
    assert (len(mixture), epoch_size(mixture)) == (120, 12)
    assert counts(mixture, 10).tolist() == [1] * 120  # all of it, in more epochs
    assert epoch_order(mixture, 4, seed=0, epoch=0).shape == (3, 4)
    with pytest.raises(ValueError, match="number of images, 12, got 13"):
        epoch_order(mixture, 13, seed=0, epoch=0)


def test_order_and_views_do_not_depend_on_ranks_and_workers():
    mixture = Mixture([tensors(40), tensors(10, first=100)], weights=[1, 3])
    whole = epoch_order(mixture, 10, seed=2, epoch=1)
    assert whole.shape == (5, 10)
    halves = [epoch_order(mixture, 10, seed=2, epoch=1, rank=r, world=2) for r in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole)

    def views(order, **options):
        return [
            augment(x, index, byol(4), seed=0, epoch=1)[0]
            for x, _, index in batches(mixture, order, **options)
        ]

    plain, threaded = views(whole), views(whole, workers=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, threaded, strict=True))
    parts = [torch.cat(x) for x in zip(*map(views, halves), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(plain, parts, strict=True))


def test_a_repeated_sample_has_other_views():
    noise = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    source = TensorSource("x", noise, torch.tensor([-1, -1]), ())
    mixture = Mixture([source], mode="epoch_equalised", size=6)
    drawn = mixture.draw(0, 0)
    first = drawn[drawn % 2 == 0]
    assert first.sort()[0].tolist() == [0, 2, 4]
    x = augment(mixture.batch(first)[0], first, byol(8), seed=0, epoch=0)[0]
    assert not torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])


def test_corrupt_files_of_all_parts(tmp_path):
    for part in ("a", "b"):
        for number in range(2):
            picture(tmp_path / part / f"{number}.png", seed=number)
        (tmp_path / part / "1.png").write_bytes(b"broken")
    mixture = Mixture([load(tmp_path / part) for part in ("a", "b")])
    with pytest.warns(UserWarning, match="cannot read"):
        images = unpack(mixture.batch(torch.arange(4))[0])
    assert torch.equal(images[0], images[1])
    assert list(mixture.corrupt) == [str(tmp_path / part / "1.png") for part in ("a", "b")]


def test_mixtures_by_name(tmp_path):
    for part in ("a", "b"):
        for number in range(10):
            picture(tmp_path / part / "any" / f"{number}.png", seed=number)
    (tmp_path / "mix.yaml").write_text(
        "mode: epoch_equalised\nsize: 6\nsources:\n- {data: a, weight: 2}\n- data: b\n"
    )
    mixture = load(f"mix:{tmp_path}/mix.yaml", image_size=16)
    assert mixture.epoch_size == 6 and [part["an_epoch"] for part in mixture.parts] == [4, 2]
    assert [part["data"] for part in mixture.parts] == [str(tmp_path / part) for part in "ab"]
    again, test = load(mixture.name, image_size=16), load(mixture.name, "test")
    assert torch.equal(again.draw(3, 2), mixture.draw(3, 2)) and again.name == mixture.name
    assert len(test) == test.epoch_size == 4 and test.sources[0].class_names == ("any",)
    config = from_dict({"data": [{"data": "shapes", "weight": 2}, "shapes:multi"]})
    assert config.data == 'mix:[{"data": "shapes", "weight": 2}, "shapes:multi"]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "mix must be YAML or a .yaml file, got while parsing"),
        ("[]", r"must list its sources as names or .*, got \[\]"),
        ("3", "must list its sources"),
        ("[{date: shapes}]", "must list its sources"),
        ("[{data: shapes, weigth: 2}]", "must list its sources"),
        (
            "{sources: [shapes], temprature: 1}",
            "unknown setting 'temprature'. Did you mean 'temper",
        ),
        ("{sources: [{data: shapes, weight: 0}]}", "weights must be numbers above 0, got 0"),
        ("{sources: [{data: shapes, weight: a}]}", "weights must be numbers above 0, got 'a'"),
        ("{sources: [shapes], mode: equal}", "mode must be one of weights, .* got 'equal'"),
        ("{sources: [shapes], size: 3}", "size is for the modes size_matched and epoch_eq"),
        ("{sources: [shapes], mode: size_matched, size: 0}", "size must be a whole number from 1"),
        ("{sources: [shapes], temperature: 2}", "temperature must be from 0 to 1, got 2"),
        ("{sources: [{data: shapes, weight: 1}], temperature: 1}", "exclude each other"),
    ],
)
def test_wrong_mixtures(text, message):
    with pytest.raises(ValueError, match=message):
        load(f"mix:{text}", "test")


def test_wrong_sources():
    for sources, message in (
        ([], "at least one, got none"),
        (["shapes"], "must be data sources, got 'shapes'. Open each by fastssl.data.load"),
        ([[1]], "must be data sources, got list"),
        ([tensors(2), tensors(2, channels=3)], "got 1 of torch.uint8 in x and 3 of torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(sources)
    with pytest.raises(ValueError, match="one a source, 1, got 2"):
        Mixture([tensors(2)], weights=[1, 2])


def test_pretraining_on_a_mixture_and_on_a_data_set(tmp_path):
    parts = [ShapesSource(name, size=16, image_size=8) for name in ("shapes", "shapes:inverted")]
    settings = {"batch_size": 8, "epochs": 1, "workers": 0, "log_every": 1}
    mixture = Mixture(parts, weights=[3, 1], mode="epoch_equalised", size=16)
    config = from_dict({**settings, "out": tmp_path / "a"})
    assert pretrain(config, mixture).metrics["steps"] == 2
    written = json.loads((tmp_path / "a" / "data.json").read_text())
    assert Counter({p["data"]: p["an_epoch"] for p in written["parts"]}) == {
        "shapes": 12, "shapes:inverted": 4,
    }  # fmt: skip
    assert "mix:" in (tmp_path / "a" / "config.yaml").read_text()

    pairs = [(x, int(y)) for x, y in zip(parts[0].images, parts[0].labels, strict=True)]
    config = from_dict({**settings, "out": tmp_path / "b"})
    assert pretrain(config, DatasetSource(pairs, "pairs", image_size=8)).metrics["steps"] == 2
    assert "data: pairs" in (tmp_path / "b" / "config.yaml").read_text()
    assert not (tmp_path / "b" / "data.json").exists()
