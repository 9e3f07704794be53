"""Which checkpoints of a run stay: the last ones, and the best."""

import shutil
from pathlib import Path
from typing import Any

import torch

from .checkpoint import link, remove, save_checkpoint, save_sharded
from .ranks import Ranks


def last_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint in a run's folder, a file or a folder; None if there is none."""
    names = (Path(run) / "checkpoints" / name for name in ("last.pt", "last"))
    both = [path for path in names if path.exists()]
    # Two of them only where the run ended as it went over from one form to the other.
    return max(both, key=_step) if len(both) == 2 else next(iter(both), None)


class Checkpoints:
    """The folder `checkpoints/` of a run.

        step_00000040.pt, last.pt, best.pt    names of files, several of which may be one file
        step_00000040/, last, best            the same of a run whose weights are in shards

    A checkpoint is whole before it gets its name, and `last` its new meaning only then: whenever
    the process ends, what these names stand for can be loaded.

    Args:
        folder: the run's.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self._ranks, self._keep = folder / "checkpoints", ranks, keep

    def last(self) -> Path | None:
        return last_checkpoint(self.folder.parent)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint."""
        paths = [self.folder / name for name in ("best.pt", "best")]
        # Two of them only where the run ended as it went over from one form to the other.
        found = [_glance(path) for path in paths if path.exists()]
        best = max(found, key=lambda state: state["score"], default=None)
        return best and (best["step"], best["score"])

    def save(self, state: dict[str, Any], *, sharded: bool) -> None:
        """Write a checkpoint, and remove those that need not stay. All ranks must call it.

        Args:
            state: as for `save_checkpoint`; its "score", unless None, decides which is the best.
            sharded: the weights are DTensors, to be written by all ranks.

        Raises:
            OSError: as `save_checkpoint`, on all ranks.
        """
        suffix = "" if sharded else ".pt"
        target = self.folder / f"step_{state['step']:08}{suffix}"
        self._ranks.on_main(self._clear)
        if sharded:
            save_sharded(target, state, self._ranks, previous=self.last())
        else:
            self._ranks.on_main(lambda: save_checkpoint(target, state, previous=self.last()))
        self._ranks.on_main(lambda: self._name(target, suffix, state["score"]))

    def _clear(self) -> None:
        """Remove what a process left that ended while it wrote."""
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _name(self, target: Path, suffix: str, score: float | None) -> None:
        other = ".pt" if suffix == "" else ""
        best = self.best()
        # The best one first: a run that ends in between goes back to the last and scores it again.
        if score is not None and (best is None or score > best[1]):
            link(self.folder / f"best{suffix}", target)
            remove(self.folder / f"best{other}")
        link(self.folder / f"last{suffix}", target)
        remove(self.folder / f"last{other}")
        steps = sorted(self.folder.glob("step_*"))
        used = {name.resolve() for name in (self.folder / "last", self.folder / "best")}
        for path in steps[: -self._keep]:
            if path.resolve() not in used:
                remove(path)


def _glance(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, of which no more is read than is looked at."""
    file = path / "state.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _step(path: Path) -> int:
    return _glance(path)["step"]
