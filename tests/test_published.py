import copy
import json
import re

import numpy as np
import pytest
import torch

from fastssl.cli import main
from fastssl.config import PretrainConfig, from_dict
from fastssl.data import load
from fastssl.methods import METHODS
from fastssl.methods.published import CIFAR10, FIGURES, IMAGENET
from fastssl.methods.recipes import RECIPES, resolve
from fastssl.models import build_backbone
from fastssl.train import pretrain
from fastssl.train.setup import build_optimizer


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10's binary files with 4 images in each."""
    folder = tmp_path / "images" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        records = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] = (3, 1, 9, 0)
        records.tofile(folder / f"{name}.bin")
    return folder


def test_cifar_files_are_a_source(cifar):
    for path in (cifar, cifar.parent):
        train, test = load(path, "train"), load(path, "test")
        assert (len(train), len(test), train.num_classes) == (20, 4, 10)
        assert train.name == str(cifar) and train.mirror
    raw = np.fromfile(cifar / "data_batch_2.bin", np.uint8).reshape(4, 3073)
    image, label, _ = train[6]
    assert label == 9 and train.class_names[9] == "truck"
    assert (image.numpy() == raw[2, 1:].reshape(3, 32, 32)).all()  # red, green, blue; row by row


def test_cifar_that_is_pickled_or_broken_is_refused(cifar, tmp_path):
    pickled = tmp_path / "cifar-10-batches-py"
    pickled.mkdir()
    (pickled / "data_batch_1").write_bytes(b"\x80\x02}")
    for path in (pickled, tmp_path):
        with pytest.raises(ValueError, match="pickled files.* binary version"):
            load(path)
    (cifar / "data_batch_3.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="data_batch_3.bin must hold records of 3073 bytes, got 3"):
        load(cifar)
    (cifar / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin is missing"):
        load(cifar)


def test_a_published_recipe_needs_only_the_path(cifar, tmp_path, capsys):
    small = ["--backbone", "resnet_small", "--epochs", "1", "--batch-size", "10", "--device", "cpu"]
    argv = ["pretrain", "simclr", "--recipe", "cifar10", "--data", str(cifar), *small]
    assert main([*argv, "--warmup-epochs", "0", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "published by others: 90.7 % (linear head trained along, 1000 epochs" in out
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "recipe: cifar10" in settings and "optimizer: lars" in settings
    assert "eta: 0.02" in settings and "lr: 0.4\n" in settings


def test_wrong_recipes_and_arguments_are_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="recipe must be one of lejepa, got 'cifar10'. .*imagenet"):
        resolve(PretrainConfig(method="lejepa", recipe="cifar10"))
    config = from_dict({"data": "digits", "out": str(tmp_path / "run"), "device": "cpu"})
    config.optimizer_args = {"eta": 1}
    with pytest.raises(ValueError, match="optimizer_args must fit adamw, got {'eta': 1}"):
        pretrain(config)
    assert main(["methods", "--recipe", "cifar"]) == 2
    assert "--recipe must be one of cifar10, imagenet, got 'cifar'" in capsys.readouterr().err


def test_arguments_that_schedules_would_overrule_are_refused():
    config = resolve(PretrainConfig(optimizer_args={"weight_decay": 0.5}))
    with pytest.raises(ValueError, match="optimizer_args must leave out .* got weight_decay"):
        build_optimizer(config, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "fused"), [({}, True), ({"foreach": True}, None), ({"fused": False}, False)]
)
def test_torchs_adam_is_fused_unless_told_otherwise(given, fused):
    torch.manual_seed(0)
    start = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5)
    for name in ("adamw", "adam", "sgd"):
        weights = []
        for args in (given, {"fused": False}):
            config = resolve(PretrainConfig(optimizer=name, optimizer_args=args))
            network = copy.deepcopy(start)
            optimizer = build_optimizer(config, network)
            if args is given:  # SGD by default is not
                want = None if name == "sgd" and not given else fused
                assert all(group["fused"] is want for group in optimizer.param_groups)
            for _ in range(3):
                optimizer.zero_grad()
                network(x).square().sum().backward()
                optimizer.step()
            weights.append(network.weight)
        torch.testing.assert_close(*weights)
        assert not torch.equal(weights[0], start.weight)


def test_text_is_read_as_arguments():
    config = PretrainConfig(optimizer_args={"betas": (0.9, 0.95)})
    assert config.optimizer_args == {"betas": [0.9, 0.95]}  # as a resumed run reads it
    config = from_dict({"optimizer_args": "eta=0.02, clip=true,nesterov=False,name=x"})
    wanted = {"eta": 0.02, "clip": True, "nesterov": False, "name": "x"}
    assert config.optimizer_args == wanted


def test_another_optimizer_does_not_get_the_recipes_arguments():
    for name, wanted in (("sgd", {}), ("lars8bit", {"eta": 0.02, "clip": True})):
        config = resolve(PretrainConfig(recipe="cifar10", optimizer=name))
        assert config.optimizer_args == wanted
    config = resolve(PretrainConfig(recipe="cifar10", optimizer="sgd", optimizer_args={"a": 1}))
    assert config.optimizer_args == {"a": 1}


@pytest.mark.parametrize(("recipe", "settings"), [("cifar10", CIFAR10), ("imagenet", IMAGENET)])
def test_published_recipes_are_whole(recipe, settings, capsys):
    network = torch.nn.Linear(2, 2)
    assert FIGURES[recipe].keys() == settings.keys() <= METHODS.keys()
    for name in settings:
        assert RECIPES[name][recipe] is settings[name]
        # Which checks names, types and ranges, those of the method's arguments too.
        config = resolve(PretrainConfig(method=name, data="/some/folder", recipe=recipe))
        given = config.optimizer_args
        (group, *_) = build_optimizer(config, network).param_groups
        assert group["lr"] == settings[name]["lr"]
        assert json.loads(json.dumps({key: group[key] for key in given})) == given
    assert main(["methods", "--recipe", recipe]) == 0
    out = capsys.readouterr().out
    assert "published by others" in out
    assert all(re.search(rf"^{name} ", out, re.MULTILINE) for name in settings)


def test_resnet18_has_cifars_stem():
    network = build_backbone("resnet18_cifar", 3, 32)
    maps = []
    network.stages[-1].register_forward_hook(lambda *args: maps.append(args[2].shape))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, network.feature_dim)
    assert maps == [(2, 512, 4, 4)]
    assert sum(p.numel() for p in network.parameters()) == 11_168_832
    with pytest.raises(ValueError, match="at least 16 pixels, got 8. Use resnet_small"):
        build_backbone("resnet18_cifar", 1, 8)
