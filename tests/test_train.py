import builtins
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastssl.augment import prepare
from fastssl.config import PretrainConfig
from fastssl.data import epoch_order, load
from fastssl.methods import METHODS, SimCLR
from fastssl.methods.recipes import EVERY, RECIPES
from fastssl.ops import (
    effective_prototypes,
    prototype_cross_entropy,
    prototype_usage,
    sinkhorn_bias,
)
from fastssl.random import step_seed
from fastssl.train import (
    load_backbone,
    load_checkpoint,
    pretrain,
    random_backbone,
    save_checkpoint,
)
from fastssl.train.metrics import read_metrics
from fastssl.train.ranks import Ranks
from fastssl.train.setup import settle

Image = pytest.importorskip("PIL.Image")
yaml = pytest.importorskip("yaml")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A hundred pictures of 12 x 12 pixels without labels."""
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(0, 256, (100, 12, 12, 3), generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pixels.byte().numpy()):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def tiny(images):
    """A run of ten steps of twenty images, five steps an epoch."""
    return partial(tiny_config, images)


def tiny_config(images, out, **changes):
    values = {"data": str(images), "out": str(out), "image_size": 8, "epochs": 2}
    values |= {"batch_size": 20, "device": "cpu", "log_every": 1, "lr": 3e-3}
    return PretrainConfig(**{**values, **changes})


def last(out):
    return load_checkpoint(Path(out) / "checkpoints" / "last.pt")


def assert_equal_states(one, other):
    assert one["step"] == other["step"]
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for key, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(other["optimizer"]["state"][key][name])
            )


def losses(out):
    return [(record["step"], record["loss"]) for record in read_metrics(out)]


def test_a_loss_and_what_follows_a_step_know_how_far_the_run_is(tmp_path, monkeypatch, tiny):
    seen, real = [], SimCLR.loss
    monkeypatch.setattr(
        SimCLR, "loss", lambda self, batch: (seen.append(batch), real(self, batch))[1]
    )
    monkeypatch.setattr(SimCLR, "after_step", lambda self, *steps: seen.append(steps))
    pretrain(tiny(tmp_path))
    assert [(b.step, b.total_steps, b.epoch) for b in seen[::2]] == [
        (t, 10, t / 5) for t in range(10)
    ]
    assert seen[1::2] == [(t + 1, 10) for t in range(10)]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run that was never stopped."""
    return pretrain(tiny_config(images, tmp_path_factory.mktemp("run") / "whole"))


def stop_after(monkeypatch, step):
    def after_step(self, done, total):
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SimCLR, "after_step", after_step)


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_run_has_the_same_bits(whole, tmp_path, monkeypatch, capsys, step, images, tiny):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"Stopped after step {step} of 10" in capsys.readouterr().err
    assert last(tmp_path)["step"] == step and len(losses(tmp_path)) == step

    # A crash after the checkpoint may leave more lines, and half a line.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**read_metrics(tmp_path)[-1], "step": step + 1}) + "\n" + '{"st')
    torch.manual_seed(99)
    run = pretrain(PretrainConfig(data=str(images), out=str(tmp_path), resume=True))
    assert_equal_states(last(run.path), last(whole.path))
    assert losses(run.path) == losses(whole.path)
    assert (run.path / "metrics.csv").read_text().count("\n") == 11
    one, other = load_backbone(run.path)[0], load_backbone(whole.path)[0]
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    "number, codes", [(signal.SIGINT, (130, -signal.SIGINT)), (signal.SIGTERM, (143,))]
)
def test_real_interrupt_of_a_process(whole, images, tmp_path, tiny, number, codes):
    code = (
        "import sys, time\n"
        "from fastssl.config import PretrainConfig\n"
        "from fastssl.methods import SimCLR\n"
        "from fastssl.train import pretrain\n"
        "SimCLR.after_step = lambda self, t, _: (print('step', t, flush=True), time.sleep(.1))\n"
        "pretrain(PretrainConfig(data=sys.argv[2], out=sys.argv[1], image_size=8, epochs=2,\n"
        "                        batch_size=20, log_every=1, lr=3e-3, device='cpu'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(images)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "step 3" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in codes
    assert "saved in" in err and "resume=True" in err
    assert 3 <= last(tmp_path)["step"] < 10
    run = pretrain(tiny(tmp_path, resume=True))
    assert_equal_states(last(run.path), last(whole.path))
    assert losses(run.path) == losses(whole.path)


def test_run_folder(whole):
    names = {path.name for path in whole.path.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "checkpoints", "backbone.safetensors",
        "environment.json", "summary.json",
    }  # fmt: skip
    record = read_metrics(whole.path)[-1]
    assert list(record) == [
        "step", "epoch", "loss", "lr", "images_per_s", "data_wait", "std", "grad_norm",
        "rankme", "feature_std", "peak_memory_mb",
    ]  # fmt: skip
    assert 0 <= record["data_wait"] <= 1 and record["lr"] < 1.5e-3
    assert whole.metrics["steps"] == 10 and whole.metrics["corrupt_images"] == 0
    config = last(whole.path)["config"]
    assert config["backbone"] == "resnet_small" and config["image_size"] == 8


def test_the_export_is_as_open_as_the_other_files(whole):
    modes = {(whole.path / n).stat().st_mode for n in ("backbone.safetensors", "config.yaml")}
    assert len(modes) == 1


def test_a_device_that_there_is_not(tmp_path, tiny):
    with pytest.raises(ValueError, match='device must be "auto", "cpu".*got \'gpu\''):
        pretrain(tiny(tmp_path, device="gpu"))


def test_finished_run_resumes_to_itself(whole, tiny):
    before = (whole.path / "checkpoints" / "last.pt").stat().st_mtime_ns
    again = pretrain(tiny(whole.path, resume=True))
    assert again.metrics == whole.metrics
    assert (whole.path / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_backbones(whole, images):
    backbone, info = load_backbone(whole.path)
    assert not backbone.training
    assert (info["image_size"], info["channels"], info["feature_dim"]) == (8, 3, 128)
    assert (info["source"], info["backbone"]) == (str(images), "resnet_small")
    assert info["method"] == info["config"]["method"] == "simclr"
    untrained, _ = random_backbone(whole.path)
    again, _ = random_backbone(whole.path)
    x = prepare(load(images, "train", 8).batch(torch.arange(100))[0], 8)
    assert torch.equal(untrained(x), again(x)) and not torch.equal(untrained(x), backbone(x))
    # Calibrated statistics: the first normalised map is centred and of unit size.
    normalised = untrained.bn(untrained.conv(x))
    assert normalised.mean().abs() < 0.1 and abs(normalised.var() - 1) < 0.2
    with pytest.raises(FileNotFoundError, match="not a run"):
        load_backbone(whole.path / "checkpoints")


def test_fresh_run_does_not_overwrite_and_resume_needs_a_run(whole, tmp_path, tiny):
    with pytest.raises(FileExistsError, match="already holds a run.*resume=True"):
        pretrain(tiny(whole.path))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        pretrain(tiny(tmp_path, resume=True))


def test_a_setting_that_came_after_the_run(whole, tmp_path, tiny):
    shutil.copytree(whole.path, tmp_path / "old")
    path = tmp_path / "old" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("seed:", "keep:", "max_side:"))]
    assert len(kept) == len(lines) - 3
    path.write_text("".join(kept))
    assert pretrain(tiny(tmp_path / "old", resume=True, keep=3)).metrics == whole.metrics
    path.write_text("".join(kept))
    with pytest.raises(ValueError, match="seed is 4, the run has 0. Leave"):
        pretrain(tiny(tmp_path / "old", resume=True, seed=4))


def test_resume_names_the_changed_settings(whole, tiny):
    with pytest.raises(
        ValueError, match="lr is 0.1, the run has 0.003; seed is 4, the run has 0. Leave"
    ):
        pretrain(tiny(whole.path, resume=True, lr=0.1, seed=4, log_every=3, workers=1))


def test_what_may_change_in_a_resume_and_what_else_stays(whole, tmp_path, tiny):
    saved = tiny(tmp_path, save_every=1, keep=2)
    pretrain(saved)
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2
    config, _ = settle(tiny(tmp_path, resume=True, compile=True, monitor=False, workers=0), 1)
    assert config.compile and (config.save_every, config.keep) == (1, 2)
    assert settle(tiny(tmp_path, resume=True, keep=1), 1)[0].keep == 1
    assert yaml.safe_load((whole.path / "config.yaml").read_text())["save_every"] == 5


def test_checkpoint_of_another_method_or_no_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"method": "dino", "step": 3})
    assert load_checkpoint(path)["step"] == 3
    with pytest.raises(ValueError, match="is of method 'dino', expected 'simclr'"):
        load_checkpoint(path, method="simclr")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a checkpoint of fastssl"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="format 99.*Update"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("where", ["fsync", "write"])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, where):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, {"step": 1, "x": torch.ones(3)})
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args):
        raise full

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        real_open = builtins.open

        def open_small_disk(file, mode="r", *args, **kwargs):
            handle = real_open(file, mode, *args, **kwargs)
            return _SmallDisk(handle, full) if ".partial" in str(file) else handle

        monkeypatch.setattr(builtins, "open", open_small_disk)
    with pytest.raises(
        OSError, match=r"cannot write .*last.pt.*bytes are free.*is intact"
    ) as caught:
        save_checkpoint(path, {"step": 2, "x": torch.ones(10000)})
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


class _SmallDisk:
    """A file on a disk that is full after 1000 bytes."""

    def __init__(self, file, error):
        self.file, self.error, self.written = file, error, 0

    def write(self, data):
        self.written += len(data)
        if self.written > 1000:
            raise self.error
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_infinite_loss_stops_with_advice(tmp_path, monkeypatch, tiny):
    real = SimCLR.loss

    def loss(self, batch):
        value, scalars = real(self, batch)
        self.calls = getattr(self, "calls", 0) + 1
        return (value / 0 if self.calls == 2 else value), scalars

    monkeypatch.setattr(SimCLR, "loss", loss)
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 2 .*lower lr"):
        pretrain(tiny(tmp_path, log_every=4))
    assert not (tmp_path / "checkpoints").exists()
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    assert (batch["step"], batch["epoch"], batch["what"]) == (2, 0, "loss")
    assert batch["parameter"] == "backbone.conv.weight"  # all are infinite, and this is the first
    assert batch["index"] == epoch_order(100, 20, seed=0, epoch=0)[1:2].tolist()
    assert batch["step_seeds"] == [step_seed(0, 1, 0)]


def test_infinite_gradient_of_a_finite_loss_stops_too(tmp_path, monkeypatch, tiny):
    real = SimCLR.loss

    def loss(self, batch):
        value, scalars = real(self, batch)
        if batch.step == 4:  # the root's slope at 0
            weight = self.head[3].weight
            value = value + (weight - weight.detach()).square().sum().sqrt()
        return value, scalars

    monkeypatch.setattr(SimCLR, "loss", loss)
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 5 .*head.3.w"):
        pretrain(tiny(tmp_path, log_every=5))
    assert json.loads((tmp_path / "bad_batch.json").read_text())["what"] == "gradient"


def test_collapse_is_announced(tmp_path, monkeypatch, tiny):
    def loss(self, batch):
        return self.ntxent(*(self.head(self.backbone(x)) for x in batch.views)), {
            "std": torch.tensor(0.05)
        }

    monkeypatch.setattr(SimCLR, "loss", loss)
    with pytest.warns(UserWarning, match="collapsing .std 0.050"):
        pretrain(tiny(tmp_path, epochs=1, warmup_epochs=0.5, log_every=5))


class Assignments(SimCLR):
    """SwAV on two crops. Equal features collapse: balanced assignments to ln K, others to one."""

    def __init__(self, backbone, *, equal=False, balanced=True):
        super().__init__(backbone, out_dim=16)
        self.prototypes = torch.nn.Linear(16, 30, bias=False)
        self.register_buffer("features_of", torch.randn(100, 16))
        self.equal, self.balanced = equal, balanced

    def loss(self, batch):
        z = torch.stack([self.head(self.backbone(x)) for x in batch.views])  # (2, B, 16)
        # Pictures of noise teach little in forty steps: what is to be found is put there.
        z = z.mean((0, 1)).expand_as(z) if self.equal else z + self.features_of[batch.index]
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        scores = self.prototypes(F.normalize(z, dim=2))
        bias = sinkhorn_bias(scores, 0.05) if self.balanced else None
        loss = prototype_cross_entropy(
            scores, scores, bias=bias, student_temperature=0.5, teacher_temperature=0.05,
            ignore_diagonal=True,
        )  # fmt: skip
        usage = prototype_usage(scores.flatten(0, 1), 0.05)
        return loss, {"prototypes": 30, "effective_prototypes": effective_prototypes(usage)}


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({}, None),
        ({"equal": True}, "the loss 3.4.* stays at ln 30 = 3.4012"),
        ({"equal": True, "balanced": False}, "most images on one prototype .1.. of 30 in use"),
    ],
    ids=["healthy", "flat", "one"],
)
def test_state_of_prototypes(tmp_path, monkeypatch, capsys, tiny, arguments, text):
    monkeypatch.setitem(METHODS, "assignments", Assignments)
    recipe = RECIPES["simclr"]["folder"] | {"warmup_epochs": 0.0, "method_args": {}}
    monkeypatch.setitem(RECIPES, "assignments", {"folder": recipe})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = pretrain(
            tiny(tmp_path, method="assignments", epochs=8, lr=0.01, method_args=arguments)
        )
    record = read_metrics(run.path)[-1]
    assert f"prototypes {record['effective_prototypes']:.0f} of 30" in capsys.readouterr().err
    messages = [str(w.message) for w in caught if "prototype" in str(w.message)]
    if text is None:
        assert not messages and record["loss"] < 3 and record["effective_prototypes"] > 5
    else:
        assert len(messages) == 1 and re.search(text, messages[0])


def test_wrong_settings(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pretrain(tiny(tmp_path, data="digts"))
    with pytest.raises(ValueError, match="unknown backbone 'resnet'"):
        pretrain(tiny(tmp_path, backbone="resnet"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            pretrain(tiny(tmp_path, device="cuda"))
    assert not list(tmp_path.iterdir())


def test_folder_with_broken_images(images, tmp_path, tiny, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images.iterdir())[:13]:
        (folder / path.name).write_bytes(path.read_bytes())
    broken = [str(folder / name) for name in ("004.png", "007.png")]
    for path in broken:
        Path(path).write_bytes(b"broken")
    config = {"data": str(folder), "workers": 2, "batch_size": 6}
    with pytest.warns(UserWarning, match="cannot read"):
        run = pretrain(tiny(tmp_path / "run", **config))
    assert run.metrics["corrupt_images"] == 2 and run.metrics["corrupt_paths"] == broken
    lines = (run.path / "corrupt.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == broken
    assert all("\tUnidentifiedImageError: cannot identify" in line for line in lines)

    # A resumed run lists those met before too.
    stop_after(monkeypatch, 2)
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tmp_path / "two", **config))
    assert list(last(tmp_path / "two")["corrupt"]) == broken
    monkeypatch.setattr("fastssl.data.FolderSource.corrupt", {"0.png": "other"})
    with pytest.warns(UserWarning):
        run = pretrain(tiny(tmp_path / "two", resume=True, **config))
    assert run.metrics["corrupt_paths"] == [*broken, "0.png"]


def test_a_checkpoint_without_the_reasons_of_unreadable_files(whole, tmp_path, tiny):
    shutil.copytree(whole.path, tmp_path / "old")
    path, state = tmp_path / "old" / "checkpoints" / "last.pt", last(whole.path)
    torch.save(state | {"step": 5, "corrupt": ["a.png"]}, path)
    run = pretrain(tiny(tmp_path / "old", resume=True))
    assert run.metrics["corrupt_paths"] == ["a.png"]
    assert last(run.path)["corrupt"] == {"a.png": ""}


def gathered(group):
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), torch.device("cpu"), False).gather({str(rank): "why"})


def test_ranks_tell_each_other_what_they_could_not_read(ranks):
    assert ranks.run(gathered, 4) == [[{str(r): "why"} for r in range(4)]] * 4


def test_batch_of_more_than_all_images(images, tmp_path, tiny):
    with pytest.warns(UserWarning, match="exceeds the 100 images; using 100"):
        pretrain(tiny(tmp_path, batch_size=120, epochs=1))


def test_a_folder_of_mixed_sizes_whatever_the_workers(tmp_path, tiny):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        pixels = torch.randint(0, 256, (10 + number, 90 - 3 * number, 3)).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    config = {"data": str(folder), "batch_size": 10, "max_side": 40}
    one, other = (
        pretrain(tiny(tmp_path / f"{workers}", workers=workers, **config)) for workers in (0, 4)
    )
    assert_equal_states(last(one.path), last(other.path))


def test_vit_with_lars_in_bf16(tmp_path, tiny):
    changes = {"backbone": "vit_small", "optimizer": "lars", "precision": "bf16", "lr": 1.0}
    run = pretrain(tiny(tmp_path, epochs=1, **changes))
    assert torch.isfinite(torch.tensor(run.metrics["loss"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw8bit"},
        {"optimizer": "lars8bit"},
        {"optimizer": "sgd8bit", "final_weight_decay": 0.1, "layer_decay": 0.7, "min_lr": 1e-4},
        {"optimizer": "lamb8bit", "sam_rho": 0.05, "max_grad_norm": 1.0, "chunk": 7},
    ],
    ids=lambda settings: settings["optimizer"],
)
@pytest.mark.filterwarnings("ignore:chunk")
def test_8_bit_optimizers_resume_exactly(tmp_path, tiny, settings, monkeypatch):
    whole = pretrain(tiny(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(tmp_path / "part", **settings))
    run = pretrain(tiny(tmp_path / "part", resume=True))  # all settings are in the run
    states = last(run.path)["optimizer"]["state"].values()
    assert torch.uint8 in {x.dtype for state in states for x in state.values()}
    assert_equal_states(last(run.path), last(whole.path))
    assert losses(run.path) == losses(whole.path)


def test_scaler_and_skipped_steps_resume(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("fastssl.train.setup.precision", lambda config, device: "fp16")
    large = partial(torch.amp.GradScaler, init_scale=2.0**60)  # so that steps are skipped
    monkeypatch.setattr("torch.amp.GradScaler", large)
    whole = pretrain(tiny(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(tmp_path / "part"))
    run = pretrain(tiny(tmp_path / "part", resume=True))
    assert_equal_states(last(run.path), last(whole.path))
    assert last(run.path)["update"] == last(whole.path)["update"]
    assert read_metrics(run.path)[-1]["skipped_steps"] == 10


def test_a_run_older_than_a_setting_resumes_without_it(whole, tmp_path, tiny):
    old = tmp_path / "old"
    shutil.copytree(whole.path, old)
    state = {k: v for k, v in last(old).items() if k != "update"}
    torch.save(state | {"step": 5}, old / "checkpoints" / "last.pt")
    values = yaml.safe_load((old / "config.yaml").read_text())
    later = {*EVERY, "final_weight_decay", "compile"}
    values = {name: value for name, value in values.items() if name not in later}
    (old / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="sam_rho is 0.05, the run has 0.0. Leave"):
        pretrain(tiny(old, resume=True, sam_rho=0.05))
    assert pretrain(tiny(old, resume=True)).metrics["steps"] == 10
    assert yaml.safe_load((old / "config.yaml").read_text())["freeze"] == []


def test_threads_are_a_share_of_the_cores_one_may_use(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3, 9)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for ranks, workers in ((1, 6), (2, 3), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert settle(tiny(tmp_path), 1)[0].workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    assert settle(tiny(tmp_path), 1)[0].workers == 8


def test_digits_loss_falls(tmp_path):
    pytest.importorskip("sklearn")
    run = pretrain(PretrainConfig(data="digits", out=str(tmp_path), epochs=1, batch_size=64))
    curve = [loss for _, loss in losses(run.path)]
    assert len(curve) == 19 and sum(curve[-4:]) / 4 < curve[0] - 0.4
    assert read_metrics(run.path)[-1]["std"] > 0.5


def test_two_processes_share_the_batch(images, tmp_path, tiny):
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from fastssl.config import PretrainConfig\n"
        "from fastssl.methods import SimCLR\n"
        "from fastssl.train import pretrain\n"
        "seen, real = [], SimCLR.loss\n"
        "def loss(self, batch):\n"
        "    seen.append((batch.index.clone(), batch.views[0].clone()))\n"
        "    return real(self, batch)\n"
        "def after_step(self, step, total):\n"
        "    w = torch.cat([p.detach().flatten() for p in self.parameters()])\n"
        "    torch.save((seen, w), f'{sys.argv[1]}/rank{dist.get_rank()}.pt')\n"
        "SimCLR.loss, SimCLR.after_step = loss, after_step\n"
        "pretrain(PretrainConfig(data=sys.argv[2], out=sys.argv[1] + '/run', image_size=8,\n"
        "                        epochs=1, batch_size=20, log_every=1, lr=0.1, device='cpu',\n"
        "                        optimizer='sgd'))"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path), str(images)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (seen0, w0), (seen1, w1) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert torch.equal(w0, w1)
    whole = epoch_order(100, 20, seed=0, epoch=0)
    assert len(seen0) == len(seen1) == len(whole) == 5
    one, threads = [], torch.get_num_threads()
    real = SimCLR.loss
    torch.set_num_threads(1)
    try:
        SimCLR.loss = lambda self, batch: (one.append(batch), real(self, batch))[1]
        pretrain(tiny(tmp_path / "one", epochs=1, optimizer="sgd", lr=0.1))
    finally:
        SimCLR.loss = real
        torch.set_num_threads(threads)
    for row, batch, a, b in zip(whole, one, seen0, seen1, strict=True):
        assert torch.equal(torch.cat((a[0], b[0])), row) and torch.equal(batch.index, row)
        assert torch.equal(torch.cat((a[1], b[1])), batch.views[0])
    # The loss, BatchNorm and gradients of one process; a rank's own negatives or statistics, or
    # gradients of another scale, would change weights by more than a tenth of what they moved.
    # Rounding grows from step to step where ReLUs switch, hence as many threads as the ranks have.
    records = [read_metrics(tmp_path / name) for name in ("run", "one")]
    assert len(records[0]) == 5
    for got, want in zip(*records, strict=True):
        for name in ("step", "loss", "lr", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), name
    start = random_backbone(tmp_path / "one")[0].state_dict()
    got, want = last(tmp_path / "run")["model"], last(tmp_path / "one")["model"]
    moved = (want["backbone.conv.weight"] - start["conv.weight"]).abs().max()
    assert got.keys() == want.keys() and moved > 1e-2
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-2 * moved, rtol=1e-3)
    assert load_backbone(tmp_path / "run")[1]["method"] == "simclr"
