import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import HorizontalFlip
from fastssl.data import load
from fastssl.optim import param_groups


def reference(method, batch):
    """Cross-entropy with smoothed targets, of rows and of columns."""
    x = F.normalize(method.backbone(batch.views[0]), dim=1)
    y = F.normalize(method.text_projection(method.text(batch.captions)), dim=1)
    logits, own = x @ y.T / method.log_temperature.exp(), torch.arange(16)
    return sum(F.cross_entropy(Z, own, label_smoothing=0.1) for Z in (logits, logits.T))


def test_step_is_the_papers():
    method, other = (steps.built("align", temperature=0.3) for _ in range(2))
    want = steps.with_gradients(other, reference(other, steps.batch()))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}
    assert 0.05 < scalars["std"] < 1.2 and 0.05 < scalars["text_std"] < 1.2
    assert float(scalars["temperature"]) == pytest.approx(0.3)


def test_the_temperature_begins_at_one_and_does_not_decay():
    method = steps.built("align")
    assert method.log_temperature.item() == math.log(1)
    _, rest = param_groups(method, 0.1)
    assert any(p is method.log_temperature for p in rest["params"])


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="ALIGN: temperature must be positive, got 0"):
        steps.built("align", temperature=0.0)


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("align")
    steps.assert_ranks_are_one_process(ranks, "align")


def test_views_follow_the_data():
    shapes = load("shapes", "test")
    assert steps.built("align").views(289, shapes)[0].get(HorizontalFlip)
    assert not steps.built("align", flip=False).views(289, shapes)[0].get(HorizontalFlip)
