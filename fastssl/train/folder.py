"""The folder of a run: what is in it, and whether a run may go on there."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import PretrainConfig
from ..extras import require
from ..outputs import check_folder
from .checkpoint import replacing
from .ranks import Ranks

# A run may change these when it resumes: what is computed stays, but for rounding.
_FREE = frozenset(
    "out workers parallel compile device log_every monitor trackers save_every keep resume".split()
)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run in `folder`; None if there is no run."""
    path = folder / "config.yaml"
    return require("yaml", "train").safe_load(path.read_text()) if path.is_file() else None


def saved_config(config: PretrainConfig) -> dict[str, Any] | None:
    """The configuration to go on from: of the run in `config.out` when resuming, else None.

    Raises:
        FileExistsError: a fresh run would overwrite one. FileNotFoundError: nothing to resume.
        NotADirectoryError, PermissionError: out cannot be written.
    """
    folder = Path(config.out)
    check_folder("pretrain", folder)
    saved = read_config(folder)
    if config.resume and saved is None:
        raise FileNotFoundError(
            f"pretrain: resume=True, but {folder} holds no run. Check out, or start without resume."
        )
    if not config.resume and (saved is not None or (folder / "checkpoints").exists()):
        raise FileExistsError(
            f"pretrain: {folder} already holds a run. Go on with it by resume=True (--resume), or "
            "choose another out."
        )
    return saved


def unset_from(config: PretrainConfig, saved: dict[str, Any]) -> PretrainConfig:
    """A copy of `config` whose unset fields are those of the saved run."""
    values = {k: v for k, v in saved.items() if getattr(config, k, v) is None}
    values["method_args"] = {**saved["method_args"], **config.method_args}
    return dataclasses.replace(config, **values)


def refuse_changes(config: PretrainConfig, saved: dict[str, Any]) -> None:
    """Compare resolved configurations.

    Raises:
        ValueError: a key that changes what is computed differs; all of them are named.
    """
    # A run of an earlier version lacks later settings: it was as by their defaults.
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    changes = [
        f"{key} is {value!r}, the run has {saved.get(key, defaults[key])!r}"
        for key, value in dataclasses.asdict(config).items()
        if key not in _FREE
        and (value != saved[key] if key in saved else defaults[key] not in (None, value))
    ]
    if changes:
        raise ValueError(
            f"pretrain: cannot resume {config.out} with another configuration: "
            f"{'; '.join(changes)}. Leave these as they were, or choose another out."
        )


def write_description(config: PretrainConfig, ranks: Ranks, precision: str) -> None:
    """config.yaml and environment.json."""
    device = ranks.device
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    values = {**dataclasses.asdict(config), "resume": False}
    text = require("yaml", "train").safe_dump(values, sort_keys=False)
    with replacing(folder / "config.yaml") as file:  # without it the run could not go on
        file.write(text.encode())
    environment = {
        "fastssl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
        "precision": precision,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def write_bad_batch(folder: Path, batch: dict[str, Any]) -> None:
    """bad_batch.json: the step whose loss or gradient was not finite, its images and seeds."""
    (folder / "bad_batch.json").write_text(json.dumps(batch, indent=2) + "\n")


def write_corrupt(folder: Path, corrupt: dict[str, str]) -> None:
    """corrupt.txt: the files that could not be read and why; none where all could."""
    if corrupt:
        lines = (f"{path}\t{reason}\n" for path, reason in corrupt.items())
        (folder / "corrupt.txt").write_text("".join(lines), "utf-8", "surrogateescape")


def write_parts(folder: Path, source) -> None:
    """data.json: of a mixture, what each of its sources gives; see `fastssl.data.Mixture.parts`."""
    if hasattr(source, "parts"):
        text = json.dumps({"epoch_size": source.epoch_size, "parts": source.parts}, indent=2)
        (folder / "data.json").write_text(text + "\n")
