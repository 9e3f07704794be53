"""Metrics sent to TensorBoard, Weights & Biases or MLflow, beside the files of the run."""

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..extras import require
from .checkpoint import replacing


class Trackers:
    """The trackers of a run while entered. One that fails is left out, with a warning; the run and
    its metrics.jsonl go on.

    Args:
        names: of `config.trackers`, commas between; None: none.
        folder: of the run. Its name is the run's name there; `trackers.json` keeps their ids, so
            that a resumed run goes on in the same place.
        settings: the resolved configuration.
        step: the last step that was kept, from which a resumed run goes on.
        on: False on ranks that write nothing; they only look whether the packages are there.

    Raises:
        ImportError: a package is missing; the message names the extra.
    """

    def __init__(
        self,
        names: str | None,
        folder: Path,
        settings: dict[str, Any],
        *,
        step: int = 0,
        on: bool = True,
    ):
        self._names = names.split(",") if names else []
        for name in self._names:
            require(name, name)
        self._opening = (folder, settings, step) if on else None
        self._open: dict[str, tuple[Callable, Callable]] = {}  # name: log, close

    def __enter__(self) -> "Trackers":
        if self._opening is None:
            return self
        folder, settings, step = self._opening
        path = folder / "trackers.json"
        ids = json.loads(path.read_text()) if path.exists() else {}
        for name in self._names:
            with _Spared(self, name):
                *self._open[name], ids[name] = _OPEN[name](folder, settings, step, ids.get(name))
        if any(ids.values()):
            with replacing(path) as file:
                file.write(f"{json.dumps(ids)}\n".encode())
        return self

    def write(self, record: dict[str, Any]) -> None:
        """One record of metrics; what is not a finite number is passed over."""
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name in [*self._open]:
            with _Spared(self, name):
                self._open[name][0](numbers, record["step"])

    def __exit__(self, *exception) -> None:
        for name in [*self._open]:
            with _Spared(self, name):
                self._open[name][1]()


class _Spared:
    """Turns a tracker's exception into a warning, and does without the tracker from there on."""

    def __init__(self, trackers: Trackers, name: str):
        self._trackers, self._name = trackers, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, Exception):
            return False
        self._trackers._open.pop(self._name, None)
        reason = " ".join(str(error).split())
        offline = " To go without a network set WANDB_MODE=offline." * (self._name == "wandb")
        warnings.warn(
            f"{self._name} failed and is left out from here on ({type(error).__name__}: {reason}). "
            f"The run goes on; metrics.jsonl has everything.{offline}",
            stacklevel=3,
        )
        return True


def _tensorboard(folder: Path, settings, step: int, id: None):
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote after its last checkpoint is hidden.
    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return log, writer.close, None


def _wandb(folder: Path, settings, step: int, id: str | None):
    import wandb

    run = wandb.init(
        project="fastssl",
        name=folder.resolve().name,
        dir=folder,
        config=settings,
        id=id,
        resume="allow",
    )
    return lambda numbers, step: run.log(numbers, step=step), run.finish, run.id


def _mlflow(folder: Path, settings, step: int, id: str | None):
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    # Where it stores is MLflow's own setting (MLFLOW_TRACKING_URI).
    client = MlflowClient()
    if id is None:
        experiment = client.get_experiment_by_name("fastssl")
        number = experiment.experiment_id if experiment else client.create_experiment("fastssl")
        id = client.create_run(number, run_name=folder.resolve().name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        client.log_batch(id, params=params)

    def log(numbers: dict[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, value, now_ms, step) for key, value in numbers.items()]
        client.log_batch(id, metrics=metrics)

    return log, lambda: client.set_terminated(id), id


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
