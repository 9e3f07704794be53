"""What can be evaluated, the cache of features, labels and masks beside images, and ranks."""

import csv
import importlib
import json
import os

import pytest
import torch
from torch import nn

from fastssl.cli import main
from fastssl.config import PretrainConfig
from fastssl.data import TensorSource, load
from fastssl.evaluate import FeatureCache, Inputs, Split, evaluate, extract, open_network
from fastssl.evaluate.features import gather_rows
from fastssl.evaluate.labels import with_masks
from fastssl.models import build_backbone
from fastssl.train import load_backbone, pretrain

PIXELS = nn.Flatten()


def grey(count=40, name="grey", seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (count, 1, 12, 12), generator=g).byte()
    return TensorSource(name, images, torch.arange(count) % 4, [*"abcd"], mirror=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    for package in ("sklearn", "yaml", "safetensors"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return pretrain(PretrainConfig(out=out, epochs=1, batch_size=512, device="cpu")).path


# networks


def test_a_run_its_checkpoint_and_its_file_are_one_network(run):
    expected, _ = load_backbone(run)
    checkpoints = [p for p in (run / "checkpoints").iterdir() if not p.is_symlink()]
    for what in (run, run / "backbone.safetensors", checkpoints[0]):
        opened = open_network(what)
        assert opened.data == "digits" and opened.about["backbone"] == "resnet_small"
        assert (opened.inputs.size, opened.inputs.channels) == (8, 1)
        for name, value in expected.state_dict().items():
            assert torch.equal(opened.backbone.state_dict()[name], value), (what, name)
        assert not opened.backbone.training
    with pytest.raises(ValueError, match="holds no teacher"):
        open_network(f"{run / 'backbone.safetensors'}:teacher")


def test_random_weights_are_others_and_the_same_each_time(run):
    one, two = (open_network(run / "backbone.safetensors", "random").backbone for _ in range(2))
    trained = open_network(run / "backbone.safetensors").backbone
    assert torch.equal(one.conv.weight, two.conv.weight)
    assert not torch.equal(one.conv.weight, trained.conv.weight)


def test_a_file_of_somebody_elses_weights_needs_a_name(tmp_path):
    net = build_backbone("resnet_small", 3, 32)
    state = {f"module.encoder.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="must say which network it is of.* Give backbone"):
        open_network(tmp_path / "a.pth")
    opened = open_network(tmp_path / "a.pth", backbone="resnet_small")
    assert torch.equal(opened.backbone.conv.weight, net.conv.weight)
    assert opened.about["before_names"] == "state_dict.module.encoder."
    del state["module.encoder.conv.weight"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="must hold all weights .* got no 'conv.weight' "):
        open_network(tmp_path / "b.pth", backbone="resnet_small")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:resnet10t", Inputs(176, 0.875, "bicubic", channels=3)),
        ("timm:vit_tiny_patch16_224", Inputs(224, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3, 3)),
        ("torchvision:resnet18", Inputs(224, 224 / 256, "bilinear", channels=3)),
    ],
)
def test_published_models_keep_their_own_inputs(name, expected):
    pytest.importorskip(name.partition(":")[0])
    found = open_network(name, "random").inputs
    assert (found.size, found.crop, found.interpolation) == (
        expected.size, pytest.approx(expected.crop), expected.interpolation
    )  # fmt: skip
    assert found.mean == (expected.mean or (0.485, 0.456, 0.406)) and found.channels == 3
    assert open_network(name, "random", image_size=64).inputs.size == 64


def test_published_weights_fill_the_network_without_its_head(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    whole = models.get_model("resnet18", weights=None)
    networks = importlib.import_module("fastssl.evaluate.networks")
    monkeypatch.setattr(networks, "published", lambda name, library: whole.state_dict())
    opened = open_network("torchvision:resnet18", image_size=32)
    assert opened.about["weights"] == "published"
    assert torch.equal(opened.backbone.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)


def test_own_normalisation_crop_and_grey_images():
    inputs = Inputs(6, 0.5, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), channels=3)
    images = torch.randint(0, 255, (2, 1, 12, 12)).byte()
    middle = images[:, :, 3:9, 3:9].float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (inputs.mean, inputs.std))
    torch.testing.assert_close(inputs(images), (middle - mean) / std, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no model 'nix'"):
        open_network("timm:nix", "random")


# cache


def counting():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
    net.calls = 0

    def count(module, args, output):
        module.calls += 1

    net.register_forward_hook(count)
    return net


def test_features_are_found_again_by_content(tmp_path):
    pytest.importorskip("safetensors")
    cache, net, data = FeatureCache(tmp_path), counting(), grey()
    h, y = extract(net, data, 12, cache=cache)
    assert net.calls == 1
    again, y_again = extract(net, grey(), 12, cache=cache)
    assert net.calls == 1 and torch.equal(h, again) and torch.equal(y, y_again)
    for change in ("weights", "images", "labels", "part", "size", "crop"):
        before, other, size = net.calls, grey(), 12
        if change == "weights":
            net[1].weight.data[0, 0] += 1e-3
        elif change == "images":
            other.images = other.images.clone()
            other.images[3, 0, 2, 2] ^= 1
        elif change == "labels":
            other.labels = other.labels.roll(1)
        elif change == "part":
            other = Split(other, torch.arange(7))
        else:
            size = Inputs(12, 0.9) if change == "crop" else Inputs(12, interpolation="bicubic")
        extract(net, other, size, cache=cache)
        assert net.calls == before + 1, change
    assert not list(tmp_path.glob("*.partial"))


def test_the_least_recently_used_are_removed_and_damage_is_no_error(tmp_path):
    pytest.importorskip("safetensors")
    cache, net = FeatureCache(tmp_path, max_bytes=4000), counting()  # of 1.3 kB each: three
    parts = [Split(grey(80), torch.arange(i, i + 40)) for i in range(5)]
    for number, part in enumerate(parts[:3]):
        extract(net, part, 12, cache=cache)
        for path in tmp_path.iterdir():
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
        assert len(list(tmp_path.iterdir())) == number + 1
    extract(net, parts[0], 12, cache=cache)  # used again: the newest
    extract(net, parts[3], 12, cache=cache)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    calls = net.calls
    extract(net, parts[0], 12, cache=cache)
    assert net.calls == calls
    extract(net, parts[1], 12, cache=cache)
    assert net.calls == calls + 1
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    extract(net, parts[0], 12, cache=cache)
    assert net.calls == calls + 2
    big = FeatureCache(tmp_path / "small", max_bytes=10)
    extract(net, parts[0], 12, cache=big)
    assert not (tmp_path / "small").exists()


# labels and masks beside the images


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rows = [["image", "left", "right"]]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(24):
            pixels = torch.zeros(16, 24, 3, dtype=torch.uint8)
            mask = torch.zeros(16, 24, dtype=torch.uint8)
            if i % 2:
                pixels[:, 4:10], mask[:, 4:10] = 200, 1
            if i % 3:
                pixels[:, 14:20], mask[:, 14:20] = 200, 2
            image.fromarray(pixels.numpy()).save(tmp_path / split / f"{i:02}.jpg")
            target = tmp_path / "masks" / split / f"{i:02}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(mask.numpy()).save(target)
            rows.append([f"{split}/{i:02}.jpg", int(i % 2 > 0), int(i % 3 > 0)])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_a_labels_file_in_the_folder_makes_it_multi_label(folder):
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    results = evaluate(net, str(folder), image_size=16)
    assert results["multilabel"]["percent"]["map"] == pytest.approx(100)
    assert set(results["multilabel"]["classes"]["roc_auc"]) == {"left", "right"}
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith("test/03")) + "\n"
    )
    with pytest.raises(ValueError, match="a line for every image, got none for 'test/03.jpg'"):
        evaluate(net, str(folder), image_size=16)
    (folder / "other.csv").write_text("image,left\ntrain/00.jpg,-1\n")
    with pytest.raises(ValueError, match="must have 0 or 1 for each of 1 classes, got 'train/00"):
        evaluate(net, str(folder), image_size=16, labels=folder / "other.csv")


def test_masks_beside_the_images_are_the_centre_squares(folder):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = evaluate(
        net, str(folder), ["segmentation"], image_size=16, masks=folder / "masks", epochs=20, lr=0.1
    )["segmentation"]
    # Left and right look alike to a pixel: the classes are background and one of the two.
    assert found["percent"]["pixel_accuracy"] > 70 and found["protocol"]["classes"] == 3
    with pytest.raises(FileNotFoundError, match="masks must be a folder, got"):
        evaluate(net, str(folder), ["segmentation"], image_size=16, masks=folder / "nix")

    # An image that cannot be read is replaced, and so is its mask.
    (folder / "test" / "00.jpg").write_text("broken")
    source = with_masks(load(folder, "test", 16), folder / "masks")
    with pytest.warns(UserWarning, match="cannot read"):
        images, _ = source.batch(torch.arange(2))
    assert torch.equal(*source.masks(torch.arange(2))) and source.masks(torch.tensor([0])).any()


def test_unreadable_images_are_told_also_the_second_time(folder):
    (folder / "train" / "00.jpg").write_text("broken")
    cache = FeatureCache(folder / "cache")
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot read"):
            found = evaluate(nn.Flatten(), str(folder), ["rankme"], image_size=16, cache=cache)
        said = found["rankme"]["protocol"]["unreadable_images"]
        assert said == "1, each replaced by the next one"


def test_what_looks_at_the_training_split_alone_needs_no_other(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(4):
        image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = evaluate(nn.Flatten(), str(tmp_path), ["rankme"], image_size=8)["rankme"]
    assert found["protocol"]["scored"] == "training split"
    assert (found["protocol"]["train_images"], found["protocol"]["test_images"]) == (4, 0)


@pytest.mark.parametrize("beside", ["labels", "masks"])
def test_labels_and_masks_need_files(folder, beside):
    path = folder / ("masks" if beside == "masks" else "labels.csv")
    with pytest.raises(ValueError, match="need a folder or list of images, got 'digits'"):
        evaluate(nn.Flatten(), "digits", ["multilabel"], **{beside: path})


# ranks


def _rows(group):
    rank = torch.distributed.get_rank()
    parts = [torch.full((rank, 2), float(rank))] if rank else []  # the first rank has none
    return gather_rows(parts), gather_rows([torch.arange(3) + 10 * rank])


def test_rows_of_all_ranks_in_order_also_where_one_has_none(ranks):
    for rows, numbers in ranks.run(_rows, 4):
        assert rows[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
        assert numbers.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


def _evaluated(group, count):
    pair = grey(count), grey(20, seed=1)
    protocols = ["knn", "linear-sgd", "finetune"]
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8))
    return evaluate(net, pair, protocols, epochs=2, train_batch_size=10, seeds=2, preset="moco",
                    rates=[1.0], lr=0.1)  # fmt: skip


@pytest.mark.parametrize("count", [40, 43])
def test_four_ranks_compute_what_one_process_does(ranks, count):
    torch.manual_seed(0)
    expected = _evaluated(None, count)
    for found in ranks.run(_evaluated, 4, count):
        for name in expected:
            assert found[name]["top1_percent"] == pytest.approx(expected[name]["top1_percent"])
        assert found["knn"]["protocol"] == expected["knn"]["protocol"]
        assert found["knn"]["protocol"]["train_images"] == count


# command line


def test_published_models_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("timm")
    out = tmp_path / "results.json"
    argv = ["evaluate", "timm:resnet10t", "--data", "digits", "--weights", "random"]
    argv += ["--image-size", "32", "--protocol", "knn,rankme", "--metric", "l2", "--votes"]
    argv += ["uniform", "--split", "held-out", "--out", str(out), "--cache", str(tmp_path / "c")]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "knn-20" in text and "rankme" in text and f"written to {out}" in text
    ((weights, found),) = json.loads(out.read_text())["digits (held-out)"].items()
    protocol = found["knn"]["protocol"]
    assert weights == "random" and protocol["votes"] == "1" and protocol["image_size"] == 32
    assert protocol["inputs"].startswith("centre square of 0.875 of the side, bicubic, mean (0.485")
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert main([*argv, "--no-cache", "--shots", "5"]) == 2
    assert "takes 'shots'" in capsys.readouterr().err
