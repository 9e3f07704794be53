"""Whole runs in several processes."""

import json
import os
import signal
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastssl.config import PretrainConfig
from fastssl.data import epoch_order
from fastssl.methods import METHODS, SimCLR
from fastssl.train import pretrain
from fastssl.train.metrics import read_metrics

pytest.importorskip("sklearn")
pytest.importorskip("yaml")
pytest.importorskip("safetensors")


def digits(out, **changes):
    values = {"data": "digits", "out": str(out), "device": "cpu", "epochs": 1, "batch_size": 256}
    values |= {"log_every": 1, "workers": 0, "method_args": {"out_dim": 16}}
    return PretrainConfig(**{**values, **changes})


def run(group, out, trouble=None, **settings):
    """What a run ended with on this rank of four: nothing, an exit code, or a message."""
    rank = dist.get_rank()
    world = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}
    real = SimCLR.loss

    def loss(self, batch):
        value, scalars = real(self, batch)
        if (trouble, rank, batch.step) == ("SIGTERM", 3, 1):
            signal.raise_signal(signal.SIGTERM)
        if (trouble, rank, batch.step) == ("NaN", 2, 1):
            value = value * torch.nan
        return value, scalars

    with mock.patch.dict(os.environ, world), mock.patch.object(SimCLR, "loss", loss):
        try:
            pretrain(digits(out, **settings))
        except SystemExit as stop:
            return stop.code
        except FloatingPointError as error:
            return str(error)


SETTINGS = {"freeze": ["backbone.conv.*", "backbone.bn.*"], "max_grad_norm": 1.0}


def resumed(group, out):
    return run(group, out, resume=True, **SETTINGS)


def stopped(group, out):
    return run(group, out, "SIGTERM", **SETTINGS)


def whole(group, out):
    return run(group, out, **SETTINGS)


def spoiled(group, out):
    return run(group, out, "NaN", log_every=4)


class Spare(SimCLR):
    def __init__(self, backbone, *, out_dim: int = 16):
        super().__init__(backbone, out_dim=out_dim)
        self.spare = torch.nn.Linear(3, 2)


def with_a_spare(group, out, **settings):
    with mock.patch.dict(METHODS, spare=Spare):
        try:
            return run(group, out, method="spare", **settings)
        except ValueError as error:
            return str(error)


def with_a_frozen_spare(group, out):
    return with_a_spare(group, out, freeze=["spare.*"])


def test_parameters_that_the_loss_does_not_use_are_named(ranks, tmp_path):
    for message in ranks.run(with_a_spare, 4, tmp_path / "run"):
        assert "got none of it for spare.weight, spare.bias (2 in all). Name these" in message
    assert ranks.run(with_a_frozen_spare, 4, tmp_path / "frozen") == [None] * 4


def test_a_signal_to_one_rank_stops_all_and_they_go_on(ranks, tmp_path):
    assert ranks.run(stopped, 4, tmp_path / "part") == [143] * 4
    assert len(read_metrics(tmp_path / "part")) == 2
    for function, name in ((resumed, "part"), (whole, "whole")):
        assert ranks.run(function, 4, tmp_path / name) == [None] * 4
    pretrain(digits(tmp_path / "alone", **SETTINGS))
    curves = [
        [record[key] for record in read_metrics(tmp_path / name) for key in ("loss", "grad_norm")]
        for name in ("part", "whole", "alone")
    ]
    assert len(curves[0]) == 8 and curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[1] == pytest.approx(curves[2], rel=1e-2)


def test_a_loss_that_is_nan_on_one_rank_is_told_by_all(ranks, tmp_path):
    messages = ranks.run(spoiled, 4, tmp_path)
    assert len(set(messages)) == 1 and "the loss is not finite at step 2" in messages[0]
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    order = epoch_order(1257, 256, seed=0, epoch=0)[1]
    assert torch.equal(torch.tensor(batch["index"]).flatten(), order)
    assert len(set(batch["step_seeds"])) == 4
