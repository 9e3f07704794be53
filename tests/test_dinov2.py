import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import ColorJitter, Grayscale, RandomResizedCrop, Solarize
from fastssl.config import PretrainConfig
from fastssl.data import load
from fastssl.methods import DINOv2
from fastssl.methods.masking import block_masks, block_masks_of_pairs
from fastssl.methods.recipes import RECIPES
from fastssl.models import ResNetSmall, build_backbone, patch_tokens
from fastssl.train import load_backbone, pretrain

SIZES = (8, 8, 4, 4)
SMALL = {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "local_views": 2}


def dinov2(**arguments):
    return steps.built("dinov2", **SMALL | arguments)


def batch(step=0):
    return steps.batch(step, sizes=SIZES)


def rectangles(u, count, side):
    """One image's mask by the paper's loop, of the same random numbers."""
    mask, left, failures = torch.zeros(side, side, dtype=torch.bool), count, 0
    for a, r, y, x in u.tolist():
        area, ratio = 4 + a * (left - 4), math.exp((2 * r - 1) * math.log(1 / 0.3))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failures += 1
        if h < side and w < side and failures <= 10:
            top, start = math.floor(y * (side - h + 1)), math.floor(x * (side - w + 1))
            part = mask[top : top + h, start : start + w]
            if 0 < int((~part).sum()) <= left:
                left, failures = left - int((~part).sum()), 0
                part.fill_(True)
    return mask.flatten()


@pytest.mark.parametrize("side", [4, 9])
def test_masks_are_unions_of_rectangles(side):
    u = torch.rand(40, 32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    count = torch.linspace(0, 0.5 * side**2, 40).long()
    masks = block_masks(u, count, side)
    for one, n, mask in zip(u, count.tolist(), masks, strict=True):
        assert torch.equal(mask, rectangles(one, n, side))
    assert (masks.sum(1) <= count).all() and masks.sum() > 0.9 * count.sum()


def test_half_of_the_crops_are_masked_by_stratified_shares():
    index = torch.arange(100, 140)
    masks, count = block_masks_of_pairs(index, 20, seed=0, step=3)
    assert masks.shape == (2, 40, 400) and masks.sum() == count
    assert torch.equal(masks.any(2).sum(0), torch.ones(40, dtype=torch.int64))
    assert 10 <= masks[0].any(1).sum() <= 30
    shares, _ = (masks.sum((0, 2)) / 400).sort()
    # The i-th lies in the i-th slice of a hundredth, to a patch.
    assert (shares - torch.linspace(0.105, 0.495, 40)).abs().max() <= 0.0075
    for part in masks.sum((0, 2)).view(4, 10):  # of four ranks
        assert 0.27 < part.float().mean() / 400 < 0.33
    assert torch.equal(masks, block_masks_of_pairs(index, 20, seed=0, step=3)[0])
    assert not torch.equal(masks, block_masks_of_pairs(index, 20, seed=0, step=4)[0])
    assert not torch.equal(masks, block_masks_of_pairs(index, 20, seed=1, step=3)[0])
    # In blocks: most hidden patches have a hidden neighbour on the right, at random 0.3 would.
    grid = masks.any(0).view(40, 20, 20)
    assert (grid[:, :, 1:] & grid[:, :, :-1]).sum() > 0.7 * grid[:, :, :-1].sum()


def scores(network, head, h):
    z = F.normalize(network.heads[head].projector(h), dim=1)
    return z @ F.normalize(network.heads[head].prototypes.weight, dim=1).T


def targets(t, centre, tau, centering):
    if centering == "mean":
        return ((t - centre.flatten()) / tau).softmax(1)
    q = (t / tau).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def papers_loss(method, x, tau):
    """The paper's three terms, crop by crop and image by image; and the means of the scores."""
    centering = method.dino.centering
    masks, _ = block_masks_of_pairs(x.index, 4, seed=0, step=x.step)
    with torch.no_grad():
        seen = [patch_tokens(method.teacher.backbone, v) for v in x.views[:2]]
        t = torch.cat([scores(method.teacher, 0, h) for h, _ in seen])
        t_patch = torch.cat([p[m] for (_, p), m in zip(seen, masks, strict=True)])
        t_patch = scores(method.teacher, -1, t_patch)
        q = targets(t, method.dino.center, tau, centering).chunk(2)
        q_patch = targets(t_patch, method.ibot.center.value, tau, centering)
    hidden = [{"mask": m, "mask_token": method.mask_token} for m in masks]
    seen = [
        patch_tokens(method.backbone, v, **(hidden[i] if i < 2 else {}))
        for i, v in enumerate(x.views)
    ]
    logs = [(scores(method, 0, h) / 0.1).log_softmax(1) for h, _ in seen]
    pairs = [(a, b) for i, a in enumerate(q) for j, b in enumerate(logs) if i != j]
    L_dino = sum(-(a * b).sum(1).mean() for a, b in pairs) / len(pairs)

    L_ibot, done = 0, 0
    for (_, patches), mask in zip(seen, masks, strict=False):
        for one, m in zip(patches, mask, strict=True):
            if n := int(m.sum()):
                log = (scores(method, -1, one[m]) / 0.1).log_softmax(1)
                L_ibot = L_ibot - (q_patch[done : done + n] * log).sum() / n / masks[..., 0].numel()
                done += n

    L_koleo = 0
    for h, _ in seen[:2]:
        y = F.normalize(h, dim=1)
        nearest = (y @ y.T - 3 * torch.eye(len(y))).argmax(1)
        L_koleo = L_koleo - (y - y[nearest]).norm(dim=1).log().mean()
    return L_dino + 0.7 * L_ibot + 0.1 * L_koleo, t.mean(0), t_patch.mean(0)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("shared_head", [False, True])
def test_loss_and_gradients_are_the_papers(centering, shared_head):
    method = dinov2(
        centering=centering, shared_head=shared_head, temperature_epochs=4.0, patch_weight=0.7
    )
    steps.disturb_teacher(method)
    torch.nn.init.normal_(method.mask_token)
    centres = [method.dino.center, method.ibot.center.value]
    if centering == "mean":
        for centre in centres:
            centre.copy_(0.2 * torch.randn(12))
    before, x = [centre.flatten().clone() for centre in centres], batch(step=4)  # epoch 2 of 4
    want, *means = papers_loss(method, x, 0.055)  # half way from 0.04 to 0.07
    loss, scalars = method.loss(x)
    want = steps.with_gradients(method, want)
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got["mask_token"].any() and not any(name.startswith("ema") for name in got)
    for centre, old, mean in zip(centres, before, means, strict=True):
        moved = 0.9 * old + 0.1 * mean if centering == "mean" else old
        torch.testing.assert_close(centre.flatten(), moved)
    assert 1 <= scalars["effective_prototypes"] <= scalars["prototypes"] == 12
    assert 0.2 < scalars["std"] < 1.2


def test_equal_scores_cost_ln_k_and_half_of_it_as_one_crop_of_two_is_masked():
    method = dinov2()
    torch.nn.init.ones_(method.heads[0].prototypes.weight)
    _, scalars = method.loss(batch())
    assert float(scalars["loss_dino"]) == pytest.approx(math.log(12), abs=1e-5)
    assert float(scalars["loss_ibot"]) == pytest.approx(math.log(12) / 2, abs=1e-5)


def test_prototypes_stand_in_the_first_epoch():
    method = dinov2(shared_head=False)
    for step, stands in ((1, True), (2, False)):
        method.zero_grad()
        method.loss(batch(step))[0].backward()
        for head in method.heads:
            assert bool((head.prototypes.weight.grad == 0).all()) == stands
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    source = load("digits")
    views = dinov2().views(8, source)
    assert [view.size for view in views] == [8, 8, 4, 4]
    crops = [view.get(RandomResizedCrop).scale for view in views]
    assert crops == [(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 2
    method = dinov2()
    method.patch = 14
    assert [view.size for view in method.views(224, source)] == [224] * 2 + [98] * 2
    assert method.views(224, source)[1].get(Solarize)


def test_radiographs_have_larger_crops_and_no_colours():
    pytest.importorskip("sklearn")
    arguments = RECIPES["dinov2"]["rad_dino"]["method_args"]
    views = dinov2(**arguments | SMALL).views(224, load("digits"))
    crops = [view.get(RandomResizedCrop).scale for view in views]
    assert crops == [(0.5, 1.0)] * 2 + [(0.2, 0.5)] * 2
    for view in views:
        jitter = view.get(ColorJitter)
        assert jitter.saturation == (1.0, 1.0) and jitter.hue == (0.0, 0.0)
        assert not (view.get(Solarize) or view.get(Grayscale))


def test_student_and_teacher_start_from_the_given_weights(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("yaml")
    safetensors = pytest.importorskip("safetensors.torch")
    start = build_backbone("vit_small", 1, 8)
    safetensors.save_file(start.state_dict(), tmp_path / "start.safetensors")
    run = pretrain(
        PretrainConfig(
            method="dinov2", data="digits", out=str(tmp_path / "run"), device="cpu", epochs=1,
            batch_size=1000, lr=1e-12, init_from=str(tmp_path / "start.safetensors"), workers=0,
            monitor=False, method_args=SMALL,
        )
    )  # fmt: skip
    for role in ("student", "teacher"):
        backbone, _ = load_backbone(run.path, role)
        for name, weight in start.state_dict().items():
            torch.testing.assert_close(backbone.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


def test_networks_without_patches_are_refused():
    with pytest.raises(ValueError, match="must be a vision transformer, got ResNetSmall"):
        DINOv2(ResNetSmall(1, 8, 16))


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_steps(ranks, centering):
    arguments = SMALL | {"momentum": 0.5, "centering": centering}
    steps.assert_repeats_and_goes_on("dinov2", SIZES, **arguments)
    steps.assert_ranks_are_one_process(ranks, "dinov2", SIZES, **arguments)
