"""What stays of a run's checkpoints, and what is left when writing one fails or is cut off."""

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist

from fastssl.train import kept, load_checkpoint, save_checkpoint
from fastssl.train.kept import Checkpoints
from fastssl.train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), False)


def state(step, score=None, like=None):
    """A checkpoint in which every number is its step; of DTensors where `like` is one."""
    weights = torch.full((100_000,), float(step)) if like is None else torch.full_like(like, step)
    return {"method": "m", "step": step, "score": score, "model": {"w": weights}}


def sharded():
    """A DTensor, on the one rank of a process group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(torch.zeros(100_000), init_device_mesh("cpu", (1,)), [Shard(0)])


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def like(request):
    yield sharded() if request.param else None
    if dist.is_initialized():
        dist.destroy_process_group()


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def assert_whole(path):
    """Its step."""
    found = load_checkpoint(path)
    assert (found["model"]["w"] == found["step"]).all() and len(found["model"]["w"]) == 100_000
    return found["step"]


def test_the_last_and_the_best_stay(tmp_path, like):
    end = ".pt" if like is None else ""
    save = {"sharded": like is not None}
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    assert checkpoints.last() is None and checkpoints.best() is None
    scores = [None, 50.0, 70.0, 60.0, 70.0, float("nan")]
    for step, score in enumerate(scores, start=1):
        checkpoints.save(state(step, score, like), **save)
        assert assert_whole(checkpoints.last()) == step
    assert assert_whole(checkpoints.folder / f"best{end}") == 3
    steps = [f"step_{n:08}{end}" for n in ([5, 6] if like is None else [3, 5, 6])]
    assert names(checkpoints) == [f"best{end}", f"last{end}", *steps]

    # Another process goes on: worse ones never take the best one's place.
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    assert checkpoints.best() == (3, 70.0)
    checkpoints.save(state(7, 69.0, like), **save)
    assert assert_whole(checkpoints.folder / f"best{end}") == 3
    checkpoints.save(state(8, 71.0, like), **save)
    assert checkpoints.best() == (8, 71.0)
    assert names(checkpoints) == [f"best{end}", f"last{end}", f"step_00000008{end}"]


def test_over_to_the_other_form(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(state(1, 80.0), sharded=False)
    try:
        checkpoints.save(state(2, 70.0, sharded()), sharded=True)
        assert names(checkpoints) == ["best.pt", "last", "step_00000002"]
        # As if the process had ended before the other form's name was removed.
        save_checkpoint(checkpoints.folder / "last.pt", state(1))
        assert checkpoints.last().name == "last"
        checkpoints.save(state(3, 81.0), sharded=False)
        assert names(checkpoints) == ["best.pt", "last.pt", "step_00000003.pt"]
        assert checkpoints.best() == (3, 81.0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ends_after", range(1, 5))
def test_the_best_is_found_by_a_run_that_ended_between_two_names(tmp_path, monkeypatch, ends_after):
    """As the run goes over from files to folders, so that there are four changes of names."""
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    scores, like = {1: 50.0, 2: 70.0, 3: 60.0}, sharded()
    checkpoints.save(state(1, scores[1]), sharded=False)
    changes = []

    def ending(change):
        def changed(*args):
            if len(changes) == ends_after:
                raise InterruptedError
            changes.append(args)
            change(*args)

        return changed

    try:
        with monkeypatch.context() as patch:
            patch.setattr(kept, "link", ending(kept.link))
            patch.setattr(kept, "remove", ending(kept.remove))
            with pytest.raises(InterruptedError):
                checkpoints.save(state(2, scores[2], like), sharded=True)
        for step in range(assert_whole(checkpoints.last()) + 1, 4):
            checkpoints.save(state(step, scores[step], like), sharded=True)
        assert checkpoints.best() == (2, 70.0) and assert_whole(checkpoints.last()) == 3
        assert assert_whole(checkpoints.folder / "best") == 2
    finally:
        dist.destroy_process_group()


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    for step in (1, 2):
        checkpoints.save(state(step), sharded=False)
    assert assert_whole(checkpoints.folder / "last.pt") == 2


def saving(folder, in_shards):
    """Goes on where another process ended, and saves until it is killed."""
    like = sharded() if in_shards else None
    checkpoints = Checkpoints(Path(folder), ALONE, keep=2)
    step = load_checkpoint(checkpoints.last())["step"]
    while True:
        step += 1
        checkpoints.save(state(step, float(step % 7), like), sharded=in_shards)
        Path(folder, "ready").touch()


@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
def test_kills_while_saving_leave_whole_checkpoints(tmp_path, in_shards):
    checkpoints, steps = Checkpoints(tmp_path, ALONE, keep=2), [1]
    checkpoints.save(state(1), sharded=False)
    for _ in range(25):
        (process,) = runs.start(saving, str(tmp_path), in_shards)
        begun = time.monotonic()
        while not (tmp_path / "ready").exists():
            assert process.is_alive() and time.monotonic() < begun + 60
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        (tmp_path / "ready").unlink()
        assert process.exitcode == -signal.SIGKILL
        steps.append(assert_whole(checkpoints.last()))
        for path in checkpoints.folder.glob("[bs]*"):
            assert_whole(path)
    assert steps == sorted(set(steps))
    checkpoints.save(state(steps[-1] + 1), sharded=False)
    assert not list(checkpoints.folder.glob(".*"))  # nor is anything left for ever


def small_files(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def full(folder):
    """The disk, which is folder's alone."""
    (folder.parent / "other").write_bytes(bytes(int(shutil.disk_usage(folder).free - 250_000)))


def unwritable(folder):
    folder.chmod(0o555)
    os.seteuid(65534)  # root may write anywhere


def failing(folder, in_shards, trouble):
    """The second checkpoint meets trouble; the error's text is left in a file."""
    like = sharded() if in_shards else None
    checkpoints = Checkpoints(Path(folder), ALONE, keep=1)
    checkpoints.save(state(1, like=like), sharded=in_shards)
    with open(Path(folder, "message"), "w") as message:
        trouble(checkpoints.folder)
        try:
            checkpoints.save(state(2, like=like), sharded=in_shards)
        except OSError as error:
            message.write(str(error))


@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(
    "trouble, why", [(small_files, "File too large"), (unwritable, "Permission denied")]
)
def test_trouble_leaves_the_previous_checkpoint_and_a_message(trouble, why, in_shards):
    if trouble is unwritable and os.geteuid() != 0:
        pytest.skip("takes another user's place")
    with tempfile.TemporaryDirectory() as folder:  # pytest's are closed to other users
        folder = Path(folder)
        folder.chmod(0o755)
        runs.run(failing, str(folder), in_shards, trouble)
        # torch's writer of shards does not tell what stopped it.
        assert_explained(folder, "" if trouble is small_files and in_shards else why)


def assert_explained(folder, why):
    message = (folder / "message").read_text()
    assert f"cannot write {folder}/checkpoints/step_00000002" in message and why in message
    assert "bytes are free there. The previous checkpoint is" in message
    checkpoints = Checkpoints(folder, ALONE, keep=1)
    assert assert_whole(checkpoints.last()) == 1
    assert [name[:4] for name in names(checkpoints)] == ["last", "step"]


@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_a_message(tmp_path, in_shards):
    size = ["-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", "-t", "tmpfs", *size], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        runs.run(failing, str(tmp_path), in_shards, full)
        assert_explained(tmp_path, "" if in_shards else "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
