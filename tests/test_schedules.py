import math

import pytest

from fastssl import schedules
from fastssl.config import PretrainConfig
from fastssl.methods import SimCLR
from fastssl.methods.recipes import resolve
from fastssl.models import ResNetSmall
from fastssl.train.setup import Schedule, build_optimizer


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_from_start_to_end_and_no_further(name):
    schedule = getattr(schedules, name)
    assert schedule(0, 3.0, 1.0) == 3.0 == schedule(-1, 3.0, 1.0)
    assert schedule(1, 3.0, 1.0) == 1.0 == schedule(2, 3.0, 1.0)
    assert schedule(0.5, 3.0, 1.0) == pytest.approx(2.0)
    falling = [schedule(t / 9, 3.0, 1.0) for t in range(10)]
    rising = [schedule(t / 9, 1.0, 3.0) for t in range(10)]
    assert falling == sorted(falling, reverse=True) == pytest.approx([4 - x for x in rising])


def test_quarter_points_by_the_formulas():
    assert schedules.cosine(0.25, 0.0, 1.0) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert schedules.linear(0.25, 0.0, 1.0) == 0.25
    assert schedules.constant(0.25, 2.0, 1.0) == 2.0
    assert [schedules.steps(t / 10, 1.0, (0.3, 0.8)) for t in (2, 3, 8)] == pytest.approx(
        [1, 0.1, 0.01]
    )
    assert schedules.warmup(0, 0) == 1.0


def made(optimizer="adamw", **settings):
    """A schedule over 50 steps, five an epoch."""
    settings = {"optimizer": optimizer, "lr": 2.0, "weight_decay": 0.1} | settings
    config = resolve(PretrainConfig(**settings))
    method = SimCLR(ResNetSmall(1, 8))
    optimizer = build_optimizer(config, method)
    return Schedule(config, optimizer, 5, 50), method


def test_rate_rises_then_falls():
    schedule, _ = made(warmup_epochs=2.0)
    rates = [schedule.learning_rate(step) for step in range(50)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10] == 2.0 and rates[30] == pytest.approx(1.0) and 0 < rates[49] < 0.01
    assert made(warmup_epochs=0.0)[0].learning_rate(0) == 2.0
    schedule, _ = made(warmup_epochs=2.0, lr_schedule="linear", min_lr=0.4)
    assert [schedule.learning_rate(t) for t in (9, 10, 30, 50)] == pytest.approx([2, 2, 1.2, 0.4])
    schedule, _ = made(warmup_epochs=2.0, lr_schedule="constant", min_lr=0.4)
    assert [schedule.learning_rate(t) for t in (4, 20, 49)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd8bit", "lamb"])
def test_layers_keep_their_share_of_the_rate(optimizer):
    schedule, method = made(optimizer, layer_decay=0.5, warmup_epochs=0.0, min_lr=0.2)
    of = {id(p): group for group in schedule.optimizer.param_groups for p in group["params"]}
    assert len(of) == len(list(method.parameters()))
    # Stem, three stages, then what is no part of the backbone.
    names = ["backbone.conv", *(f"backbone.stages.{i}.conv1" for i in range(3)), "head.0"]
    for step in (0, 25, 50):
        rates = schedule.apply(step)
        got = [of[id(method.get_parameter(f"{name}.weight"))]["lr"] for name in names]
        assert got == pytest.approx(
            [rates["lr"] * share for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
        )


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0}, {"layer_decay": 0.5}])
def test_biases_learn_at_a_factor_of_the_rate_of_weights(settings):
    schedule, method = made(bias_lr_factor=0.1, **settings)
    schedule.apply(25)
    groups = schedule.optimizer.param_groups
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    lr = {name: lr[id(p)] for name, p in method.named_parameters()}
    stage = "backbone.stages.1"
    for weight, others in (
        (f"{stage}.conv1.weight", (f"{stage}.bn1.weight", f"{stage}.bn1.bias")),
        ("head.3.weight", ("head.1.weight", "head.3.bias")),
    ):
        assert [lr[name] / lr[weight] for name in others] == pytest.approx([0.1, 0.1])


def test_weight_decay_moves_where_there_is_any():
    schedule, method = made(final_weight_decay=0.4)
    for step, want in ((0, 0.1), (25, 0.25), (50, 0.4)):
        assert schedule.apply(step)["weight_decay"] == pytest.approx(want)
        decays = [group["weight_decay"] for group in schedule.optimizer.param_groups]
        assert decays == pytest.approx([want, 0.0])
    schedule, _ = made()
    assert schedule.apply(25) == {"lr": schedule.learning_rate(25)}
    assert [g["weight_decay"] for g in schedule.optimizer.param_groups] == [0.1, 0.0]


def test_a_checkpoint_of_the_optimizer_does_not_move_the_schedule():
    schedule, _ = made(layer_decay=0.5)
    schedule.apply(40)
    other, _ = made(layer_decay=0.5)
    other.optimizer.load_state_dict(schedule.optimizer.state_dict())
    other.apply(41), schedule.apply(41)
    for one, two in zip(schedule.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert (one["lr"], one["weight_decay"]) == (two["lr"], two["weight_decay"])
