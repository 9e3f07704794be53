"""Runs that are killed and go on, with as many ranks as before or others."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import runs
import torch

from fastssl.train import load_backbone, load_checkpoint
from fastssl.train.checkpoint import link, remove
from fastssl.train.metrics import read_metrics

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("yaml")
pytest.importorskip("safetensors")

STEPS = 6  # three an epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Fifty pictures of 10 x 10 pixels in two classes; three of them cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(0, 256, (50, 10, 10, 3), generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pixels.byte().numpy()):
        split = "train" if number < 48 else "test"
        path = folder / split / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        if number in (7, 20, 41):
            path.write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def train(images, tmp_path_factory):
    """Trains in processes of their own; what was never stopped, once for all tests."""
    whole = {}

    def train(out, world=1, kill_at=None, watch=None, **settings):
        settings = {"method": "simclr", "workers": 0, "save_every": 1, **settings}
        settings |= {"data": str(images), "out": str(out), "device": "cpu", "image_size": 8}
        settings |= {"batch_size": 14, "epochs": 2, "log_every": 1, "lr": 3e-3}
        ends = 0 if kill_at is None else -signal.SIGKILL
        runs.run(runs.pretrained, settings, kill_at, watch, world=world, ends=ends)
        return Path(out)

    def never_stopped(world, **settings):
        key = f"{world} {sorted(settings.items())}"
        if key not in whole:
            out = tmp_path_factory.mktemp("whole") / "run"
            whole[key] = train(out, world, watch=3, **settings)
        return whole[key]

    train.never_stopped, train.folder = never_stopped, images.parent
    return train


def last(out):
    """The newest checkpoint of a run, whole, in whichever form."""
    folder = Path(out) / "checkpoints"
    return load_checkpoint(folder / ("last" if (folder / "last").exists() else "last.pt"))


def losses(out):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(out)]


def assert_equal(one, other, where=()):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], (*where, key))
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif where[-1] != "seconds" and where[0] != "config":
        assert one == other, where


def assert_same_run(one, other):
    assert_equal(last(one), last(other))
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(load_backbone(one)[0](x), load_backbone(other)[0](x))


@pytest.mark.parametrize("world, workers, sam_rho", [(1, (0, 2), 0.05), (2, (2, 0), 0.0)])
@pytest.mark.parametrize("method", runs.IMAGES_ONLY)
def test_a_killed_run_goes_on_to_the_same_bits(train, tmp_path, method, world, workers, sam_rho):
    """Also with other workers than before."""
    own = runs.needed(method, train.folder)
    settings = {"method": method, "sam_rho": sam_rho, "method_args": own}
    whole = train.never_stopped(world, **settings)
    kill_at = random.randrange(4, 6)
    train(tmp_path / "run", world, kill_at, workers=workers[0], **settings)
    assert last(tmp_path / "run")["step"] == 3 and len(losses(tmp_path / "run")) >= kill_at - 1
    run = train(tmp_path / "run", world, workers=workers[1], resume=True, **settings)
    assert_same_run(run, whole)
    assert read_metrics(run)[-1]["step"] == STEPS
    assert len((run / "corrupt.txt").read_text().splitlines()) == 3


# Two checkpoints stay: to go on from the first one too.
VIT = {"backbone": "vit_small", "keep": 2, "hold_out": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", **VIT},
        {"optimizer": "adamw8bit", **VIT},
        {"method": "byol", "sam_rho": 0.05, "max_grad_norm": 1.0, "keep": 2, "hold_out": 0.1},
    ],
    ids=["adamw", "adamw8bit", "teacher"],
)
def test_a_killed_run_in_shards_goes_on_to_the_same_bits(train, tmp_path, settings):
    settings = {"parallel": "fsdp", **settings}
    whole = train.never_stopped(2, **settings)
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"last", "best", "step_00000003", "step_00000006"}
    train(tmp_path / "run", 2, random.randrange(4, 6), **settings)
    assert last(tmp_path / "run")["step"] == 3
    assert_same_run(train(tmp_path / "run", 2, resume=True, **settings), whole)


FORMS = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}


@pytest.mark.parametrize(
    "before, after, optimizer, backbone",
    [
        ("ddp", "one", "adamw", "vit_small"),
        ("one", "fsdp", "adamw8bit", "vit_small"),
        ("ddp", "fsdp", "adamw", "vit_small"),
        ("fsdp", "ddp", "adamw", "vit_small"),
        ("fsdp", "one", "adamw8bit", "vit_small"),
        # Kernels of convolutions lie in another order of memory in shards.
        ("ddp", "fsdp", "adamw", "resnet_small"),
        ("fsdp", "one", "adamw", "resnet_small"),
        ("fsdp", "ddp", "adamw8bit", "resnet_small"),
        ("fsdp", "one", "sgd", "resnet_small"),
    ],
)
def test_a_run_goes_on_with_other_ranks(train, tmp_path, before, after, optimizer, backbone):
    (world, parallel), (world_after, parallel_after) = FORMS[before], FORMS[after]
    settings = {"optimizer": optimizer, **VIT, "backbone": backbone}
    whole = train.never_stopped(world, parallel=parallel, **settings)
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    for name in ("backbone.safetensors", "summary.json"):
        (out / name).unlink()
    checkpoints, suffix = out / "checkpoints", "" if parallel == "fsdp" else ".pt"
    link(checkpoints / f"last{suffix}", checkpoints / f"step_00000003{suffix}")
    remove(checkpoints / f"step_00000006{suffix}")
    train(out, world_after, watch=3, begun=3, parallel=parallel_after, resume=True, **settings)

    seen = [torch.load(whole / f"seen_{r}_of_{world}.pt") for r in range(world)]
    again = [torch.load(out / f"seen_{r}_of_{world_after}.pt") for r in range(world_after)]
    for one, other in zip(*(map(_joined, (seen, again))), strict=True):
        assert torch.equal(one, other)  # the same samples, and the same views of them
    assert losses(out)[:3] == losses(whole)[:3]
    assert losses(out)[3][1] == pytest.approx(losses(whole)[3][1], rel=1e-4)
    assert losses(out)[-1][1] == pytest.approx(losses(whole)[-1][1], rel=2e-2)
    # States in another order of memory than their weights would move these elsewhere.
    start, want, got = (
        torch.cat([x.flatten() for x in state["model"].values() if x.ndim > 1])
        for state in (
            load_checkpoint(checkpoints / f"step_00000003{suffix}"),
            last(whole),
            last(out),
        )
    )
    off = (got - want).norm() / (want - start).norm()
    assert off < (0.05 if optimizer == "adamw8bit" else 1e-4)  # blocks of 8 bits are made anew
    form = "last" if parallel_after == "fsdp" and world_after > 1 else "last.pt"
    assert (checkpoints / form).exists() and load_backbone(out) and last(out)["step"] == STEPS


def _joined(seen):
    """Sample numbers and each view over the ranks."""
    indices, views = zip(*seen, strict=True)
    return [torch.cat(parts) for parts in (indices, *zip(*views, strict=True))]
