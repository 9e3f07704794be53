"""What is seen of a run while it goes on: probe, neighbours, rank, spread, and where it is sent."""

import csv
import errno
import json
import os
import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import runs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import IMAGES_ONLY
from torch import nn

from fastssl import evaluate
from fastssl.config import PretrainConfig
from fastssl.data import TensorSource
from fastssl.methods import SimCLR
from fastssl.train import load_checkpoint, monitors, pretrain, save_checkpoint
from fastssl.train.health import Health
from fastssl.train.metrics import MetricsLog, read_metrics
from fastssl.train.monitors import Monitor
from fastssl.train.ranks import Ranks
from fastssl.train.trackers import Trackers

pytest.importorskip("yaml")
pytest.importorskip("safetensors")

ALONE = Ranks(0, 1, torch.device("cpu"), False)


class Identity(nn.Module):
    """A backbone whose features are what it is given."""

    def __init__(self, D):
        super().__init__()
        self.feature_dim = D
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


class Labelled:
    def __init__(self, n, classes):
        self.n, self.num_classes = n, classes

    def __len__(self):
        return self.n


def clusters(n=600, D=16, classes=5, spread=0.3):
    y = torch.arange(n) % classes
    return torch.randn(classes, D)[y] + spread * torch.randn(n, D), y


def assert_equal(state, other):
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def watch(h, y, steps, *, B=100, cut=lambda rows: [rows, rows]):
    """A monitor after steps whose rows of h the backbone gave in calls as `cut` says."""
    monitor = Monitor(Identity(h.shape[1]), Labelled(len(h), int(y.max()) + 1), ALONE)
    with monitor:
        for step in range(steps):
            index = (step * B + torch.arange(B)) % len(h)
            for call in cut(h[index]):
                monitor._backbone(call)
            monitor.step(y[index], index)
    return monitor


def test_clusters_are_seen_and_noise_is_chance():
    h, y = clusters()
    numbers = watch(h, y, 40).read()
    assert numbers["probe_top1"] > 0.95 and numbers["knn_top1"] > 0.95
    noise = watch(torch.randn(600, 16), torch.randint(5, (600,)), 40).read()
    assert 0.05 < noise["probe_top1"] < 0.4, "images the probe is tested on must not train it"
    assert 0.05 < noise["knn_top1"] < 0.4, "an image must not vote for itself"


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_probe_does_not_depend_on_the_scale_of_the_features(scale):
    h, y = clusters()
    assert watch(scale * h, y, 30).read()["probe_top1"] > 0.95


def test_the_probe_is_softmax_regression():
    h, y = clusters(n=100)
    index = torch.arange(100)
    monitor = Monitor(Identity(16), Labelled(100, 5), ALONE)
    held_out = (index * 0x9E3779B1 >> 16) % monitors.HELD_OUT == 0
    assert 3 < held_out.sum() < 30
    weight = torch.zeros(5, 17, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=monitors.LR, momentum=monitors.MOMENTUM)
    x = (h - h.mean(0)) / h.std(0, correction=0) / 4
    x = torch.cat((x, torch.ones(100, 1)), 1)[~held_out]
    for _ in range(5):
        monitor._step_probe(h, y, index)
        sgd.zero_grad()
        F.cross_entropy(x @ weight.T, y[~held_out]).backward()
        sgd.step()
    torch.testing.assert_close(monitor._state["weight"], weight.detach(), rtol=1e-4, atol=1e-5)


def test_neighbours_agree_with_the_evaluation():
    h, y = clusters(spread=1.5)
    numbers = watch(h, y, 6).read()  # the ring then holds every image once
    one_out = evaluate.knn_leave_one_out(h, y, ks=(20,))["top1_percent"]["knn-loo-20"]
    assert 40 < one_out < 99
    assert abs(100 * numbers["knn_top1"] - one_out) < 9, "100 queries of 600"


def test_rank_and_spread_agree_with_the_evaluation():
    h = torch.randn(600, 16) * torch.linspace(0.1, 2, 16)
    numbers = watch(h, torch.full((600,), -1), 6).read()
    assert numbers["rankme"] == pytest.approx(evaluate.rankme(F.normalize(h, dim=1)), rel=1e-3)
    assert numbers["feature_std"] == pytest.approx(evaluate.feature_std(h[-100:]), rel=1e-3)
    assert "probe_top1" not in numbers and "knn_top1" not in numbers
    same = watch(torch.ones(600, 16), torch.full((600,), -1), 6).read()
    assert same["rankme"] < 1.01 and same["feature_std"] < 1e-3


@pytest.mark.parametrize(
    "cut",
    [
        lambda rows: [torch.cat((rows, -rows))],  # both views in one call
        lambda rows: [*rows.split(30), *(-rows).split(30)],  # in chunks
    ],
)
def test_the_first_view_however_the_method_calls(cut):
    h, y = clusters()
    state, other = (watch(h, y, 3, cut=c).state_dict() for c in (lambda rows: [rows], cut))
    assert_equal(state, other)


def test_unlabelled_images_and_broken_features_do_not_count():
    h, y = clusters()
    y[::2] = -1
    h[1::10] = torch.inf
    monitor = watch(h, y, 12)
    assert all(torch.as_tensor(x).isfinite().all() for x in monitor.state_dict().values())
    assert monitor.read()["probe_top1"] > 0.9


def test_evaluation_between_steps_is_not_watched():
    h, y = clusters()
    monitor = Monitor(Identity(16), Labelled(600, 5), ALONE)
    with monitor, evaluate.frozen(monitor._backbone) as backbone:
        backbone(h)
    assert not monitor._rows and not monitor._backbone._forward_hooks


def test_the_cost_is_bounded_for_large_batches_and_many_classes(monkeypatch):
    h, y = clusters(n=3000)
    assert watch(h, y, 2, B=1500)._seen == 2 * monitors.ROWS
    monkeypatch.setattr(monitors, "LARGEST_PROBE", 5 * 17 - 1)
    monitor = watch(h, y, 2)
    assert monitor._state["weight"].numel() == 0 and "probe_top1" not in monitor.read()


def test_no_step_waits_for_the_device():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():  # tensors without values: what asks for one raises
        monitor = Monitor(Identity(16), Labelled(600, 5), ALONE)
        for _ in range(2):
            monitor._rows = [torch.randn(100, 16)]
            monitor.step(torch.zeros(100, dtype=torch.int64), torch.arange(100))
        with pytest.raises(DataDependentOutputException):
            monitor.read()


def test_a_compiled_backbone_stays_one_graph():
    from torch._dynamo.testing import CompileCounter  # slow to import, for the ranks too

    h, y = clusters()
    backbone, counter = nn.Linear(16, 16), CompileCounter()
    backbone.feature_dim = 16
    backbone.compile(backend=counter, dynamic=False)
    with Monitor(backbone, Labelled(600, 5), ALONE) as monitor:
        for step in range(3):
            index = step * 100 + torch.arange(100)
            for _ in range(10):  # views, each for itself
                backbone(h[index])
            monitor.step(y[index], index)
    assert monitor._seen == 300 and counter.frame_count == 1


def sharded(group, h, y):
    """As `watch` with 100 rows a step, 25 of them on each of four ranks."""
    rank = dist.get_rank(group)
    ranks = Ranks(rank, dist.get_world_size(group), torch.device("cpu"), False)
    monitor = Monitor(Identity(16), Labelled(len(h), 5), ranks)
    with monitor:
        for step in range(8):
            index = (step * 100 + rank * 25 + torch.arange(25)) % len(h)
            monitor._backbone(h[index])
            monitor.step(y[index], index)
    return monitor.state_dict(), {**monitor.read(), "peak_memory_mb": 0}


def test_ranks_measure_what_one_process_would(ranks):
    h, y = clusters()
    one = watch(h, y, 8)
    expected = one.state_dict(), {**one.read(), "peak_memory_mb": 0}
    for state, numbers in ranks.run(sharded, 4, h, y):
        assert numbers == expected[1]
        assert_equal(state, expected[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_process():
    (high_water_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert monitors._peak_memory_mb(Identity(1)) == pytest.approx(int(high_water_kb) / 976.6, 0.02)


@pytest.fixture
def few(monkeypatch):
    """Runs on 60 labelled pictures of 8 pixels: ten steps of twelve."""
    pictures = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    source = TensorSource("few", pictures.byte(), torch.arange(60) % 3, ["a", "b", "c"])
    monkeypatch.setattr("fastssl.train.setup.load", lambda *args, **settings: source)
    monkeypatch.setattr("fastssl.train.loop.READ_STEPS", 2)

    def run(out, **changes):
        values = {"out": out, "epochs": 2, "batch_size": 12, "device": "cpu", "log_every": 1}
        return pretrain(PretrainConfig(**{**values, **changes})).path

    return run


def test_the_weights_are_the_same_bits_without_monitors(few, tmp_path, capsys):
    on, off = few(tmp_path / "on"), few(tmp_path / "off", monitor=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "step 10/10" in line]
    assert ["kNN" in line for line in lines] == [True, False]
    one, other = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (on, off))
    assert one["monitor"]["weight"].abs().sum() > 0 and other["monitor"] == {}
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    numbers = {"probe_top1", "knn_top1", "rankme", "feature_std", "peak_memory_mb"}
    assert numbers <= set(read_metrics(on)[-1])
    assert numbers & set(read_metrics(off)[-1]) == {"peak_memory_mb"}


@pytest.mark.parametrize(
    "changes", [*({"method": name} for name in IMAGES_ONLY), {"backbone": "vit_small", "chunk": 5}]
)
def test_every_method_is_watched(few, tmp_path, changes):
    changes = {"method_args": runs.needed(changes.get("method"), tmp_path), **changes}
    record = read_metrics(few(tmp_path / "run", **changes))[-1]
    assert {"probe_top1", "knn_top1", "rankme", "feature_std"} <= set(record)


def test_a_resumed_run_measures_the_same(few, tmp_path, monkeypatch):
    whole = few(tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(self, step, total_steps):
            if step == 7:
                raise RuntimeError("as if killed")

        patch.setattr(SimCLR, "after_step", stop)
        with pytest.raises(RuntimeError, match="as if killed"):
            few(tmp_path / "run", save_every=1)
    run = few(tmp_path / "run", save_every=1, resume=True)
    shown = ("step", "loss", "probe_top1", "knn_top1", "rankme", "feature_std")
    one, other = (
        [[record.get(key) for key in shown] for record in read_metrics(path)]
        for path in (whole, run)
    )
    assert one == other
    states = [load_checkpoint(path / "checkpoints" / "last.pt")["monitor"] for path in (whole, run)]
    assert_equal(*states)


def test_a_checkpoint_from_before_monitors_resumes(few, tmp_path):
    run = few(tmp_path / "run")
    path = run / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    del state["monitor"], state["format"]
    state["step"] = 5
    save_checkpoint(path, state)
    few(tmp_path / "run", resume=True)
    assert read_metrics(run)[-1]["step"] == 10


def test_collapsing_features_are_announced_after_warmup():
    health = Health(1e-3, warmup_steps=10, total_steps=100)
    record = {"loss": 1.0, "feature_std": 0.01}
    assert health.messages({"step": 5, **record}) == []
    (message,) = health.messages({"step": 15, **record})
    assert "features are collapsing (feature_std 0.010)" in message
    assert health.messages({"step": 20, **record}) == [], "said once"


def test_csv_takes_keys_that_come_later(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 3.0})
    log.write({"step": 2, "loss": 2.0, "knn_top1": 0.5})
    log.write({"step": 3, "loss": 1.0})
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "knn_top1": 0.6, "loss": 1.5})
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["3.0", "2.0", "1.5"]
    assert [row["knn_top1"] for row in rows] == ["", "0.5", "0.6"]


def test_warnings_are_kept_up_to_the_resumed_step(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.warn(3, "step 3: first\nand more")
    log.warn(9, "step 9: second")
    MetricsLog(tmp_path, 5)
    assert (tmp_path / "warnings.txt").read_text() == "3\tstep 3: first and more\n"


def test_a_full_disk_leaves_the_records_of_the_run_that_goes_on(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mock.Mock(side_effect=full))
        with pytest.raises(OSError, match="No space"):
            MetricsLog(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


class Wandb(types.ModuleType):
    """The part of wandb that is used; `init` fails, or the third `log`."""

    def __init__(self, fails):
        super().__init__("wandb")
        self.fails, self.calls = fails, []
        self.id = "abc"

    def init(self, **settings):
        if self.fails == "init":
            raise ConnectionError("no network")
        self.calls.append(("init", settings["id"]))
        return self

    def log(self, numbers, step):
        if self.fails == "log" and step == 3:
            raise ConnectionError("no network")
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append("finish")


def test_a_tracker_gets_numbers_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb(None))
    for _ in range(2):
        with Trackers("wandb", tmp_path, {"lr": 1.0}) as trackers:
            trackers.write({"step": 1, "loss": 2.0, "bad": float("nan"), "text": "x"})
    once = [(1, {"loss": 2.0}), "finish"]
    assert wandb.calls == [("init", None), *once, ("init", "abc"), *once]
    with Trackers("wandb", tmp_path, {}, on=False) as trackers:
        trackers.write({"step": 1, "loss": 2.0})
    assert len(wandb.calls) == 6, "other ranks write nothing"


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_never_stops_a_run(few, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails))
    with pytest.warns(UserWarning, match="wandb failed and is left out.*no network") as told:
        run = few(tmp_path / "run", trackers="wandb")
    assert sum("wandb" in str(w.message) for w in told) == 1, "said once"
    assert read_metrics(run)[-1]["step"] == 10


def test_a_missing_or_unknown_tracker(few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install \"fastssl-kernels\[mlflow\]\""):
        few(tmp_path / "run", trackers="mlflow")
    assert not (tmp_path / "run").exists(), "said before anything is written"
    assert PretrainConfig(trackers=" wandb, mlflow,").trackers == "wandb,mlflow"
    assert PretrainConfig(trackers="").trackers is None
    with pytest.raises(ValueError, match="trackers must be known ones, got 'tensorbord'. Did you"):
        PretrainConfig(trackers="wandb,tensorbord")


def test_tensorboard(few, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = few(tmp_path / "run", trackers="tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with Trackers("mlflow", tmp_path, {"lr": 1.0}) as trackers:
        trackers.write({"step": 1, "loss": 2.0})
    id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    (metric,) = mlflow.MlflowClient().get_metric_history(id, "loss")
    assert (metric.step, metric.value) == (1, 2.0)
