"""Whole runs in several processes."""

import json
import os
import signal
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastssl.config import PretrainConfig
from fastssl.data import TensorSource, epoch_order
from fastssl.methods import METHODS, SimCLR
from fastssl.train import pretrain
from fastssl.train.metrics import read_metrics
from fastssl.train.setup import settle

pytest.importorskip("yaml")
pytest.importorskip("safetensors")


def tiny(out, **changes):
    values = {"out": str(out), "device": "cpu", "epochs": 1, "batch_size": 32, "log_every": 1}
    values |= {"workers": 0, "method_args": {"out_dim": 16}}
    return PretrainConfig(**{**values, **changes})


def noise():
    """Four batches."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (130, 1, 8, 8), generator=generator).byte()
    return TensorSource("noise", images, torch.full((130,), -1), [])


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
            pretrain(tiny(out, **settings), noise())
        except SystemExit as stop:
            return stop.code
        except FloatingPointError as error:
            return str(error)


SETTINGS = {"freeze": ["backbone.conv.*", "backbone.bn.*"], "max_grad_norm": 1.0}


def resumed(group, out):
    return run(group, out, resume=True, **SETTINGS)


def stopped(group, out):
    return run(group, out, "SIGTERM", **SETTINGS)


def whole(group, out, settings):
    return run(group, out, **settings)


def spoiled(group, out):
    return run(group, out, "NaN", log_every=4)


def curve(out):
    return [record[key] for record in read_metrics(out) for key in ("loss", "grad_norm")]


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
    assert ranks.run(resumed, 4, tmp_path / "part") == [None] * 4
    assert ranks.run(whole, 4, tmp_path / "whole", SETTINGS) == [None] * 4
    assert len(curve(tmp_path / "part")) == 8
    assert curve(tmp_path / "part") == pytest.approx(curve(tmp_path / "whole"), rel=1e-3)


# No BatchNorm in the backbone, so that rounding grows slowly.
VIT = {"backbone": "vit_small", "lr": 1e-3, "max_grad_norm": 1.0, "optimizer": "sgd"}


BYOL = {"method": "byol", "method_args": {"out_dim": 16, "hidden_dim": 32}}


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "fsdp", "layer_decay": 0.7, "freeze": ["backbone.patch_embed.*"]},
        BYOL | {"parallel": "fsdp", "sam_rho": 0.05},
        BYOL | {"chunk": 5, "sam_rho": 0.05, "optimizer": "sgd8bit"},
    ],
    ids=["fsdp", "fsdp, teacher, sam", "chunk, teacher, sam"],
)
def test_four_ranks_follow_one_process(ranks, tmp_path, settings):
    assert ranks.run(whole, 4, tmp_path / "four", VIT | settings) == [None] * 4
    pretrain(tiny(tmp_path / "one", **VIT | settings), noise())
    four, one = curve(tmp_path / "four"), curve(tmp_path / "one")
    assert four[:2] == pytest.approx(one[:2], rel=1e-3)
    assert four[::2] == pytest.approx(one[::2], rel=1e-2)  # the losses


def test_chunks_of_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="chunk must be 0 with parallel=fsdp, got 8"):
        settle(tiny(tmp_path, parallel="fsdp", chunk=8), 2)


def test_a_loss_that_is_nan_on_one_rank_is_told_by_all(ranks, tmp_path):
    messages = ranks.run(spoiled, 4, tmp_path)
    assert len(set(messages)) == 1 and "the loss is not finite at step 2" in messages[0]
    batch = json.loads((tmp_path / "bad_batch.json").read_text())
    order = epoch_order(noise(), 32, seed=0, epoch=0)[1]
    assert torch.equal(torch.tensor(batch["index"]).flatten(), order)
    assert len(set(batch["step_seeds"])) == 4
