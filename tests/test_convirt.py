import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import GaussianBlur
from fastssl.data import load

SMALL = {"out_dim": 8}


def reference(method, batch, image_weight, ids=None):
    """Both directions as the paper sums them, pair by pair."""
    v = F.normalize(method.image_head(method.backbone(batch.views[0])), dim=1)
    u = F.normalize(method.text_head(method.text(batch.captions)), dim=1)
    total = 0
    for i in range(16):
        kept = [j for j in range(16) if ids is None or j == i or ids[j] != ids[i]]
        own = v[i] @ u[i] / 0.1
        of_image = (u[kept] @ v[i] / 0.1).logsumexp(0) - own
        of_text = (v[kept] @ u[i] / 0.1).logsumexp(0) - own
        total = total + image_weight * of_image + (1 - image_weight) * of_text
    return total / 16


@pytest.mark.parametrize("image_weight", [0.75, 0.0])
def test_step_is_the_papers(image_weight):
    method, other = (steps.built("convirt", image_weight=image_weight, **SMALL) for _ in range(2))
    want = steps.with_gradients(other, reference(other, steps.batch(), image_weight))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}
    assert 0.05 < scalars["std"] < 1.2 and 0.05 < scalars["text_std"] < 1.2


def test_equal_sentences_can_be_spared():
    method, batch = steps.built("convirt", spare_equal=True, **SMALL), steps.batch()
    batch.captions[5] = batch.captions[2]
    torch.testing.assert_close(
        method.loss(batch)[0], reference(method, batch, 0.75, ids=batch.captions)
    )


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("convirt", freeze_below=1, **SMALL)
    steps.assert_ranks_are_one_process(ranks, "convirt", freeze_below=1, **SMALL)


def test_views_follow_the_data():
    shapes, method = load("shapes", "test"), steps.built("convirt", **SMALL)
    assert method.reads_captions == "sentence"
    assert method.views(224, shapes)[0].get(GaussianBlur)
    assert not method.views(32, shapes)[0].get(GaussianBlur)
