"""Protocols that train heads or whole networks, take several labels, or change the images."""

import csv
import importlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.augment import augment
from fastssl.data import ShapesSource, TensorSource
from fastssl.evaluate import (
    Inputs,
    Split,
    Task,
    evaluate,
    fit_logistic,
    knn,
    label_sets,
    multilabel_probe,
    open_network,
    subset,
)
from fastssl.evaluate.features import fingerprint
from fastssl.evaluate.finetune import Classifier, _loss, finetune
from fastssl.evaluate.finetune_recipes import RECIPES, dropping_paths, training_views
from fastssl.evaluate.kshot import draw_share
from fastssl.evaluate.layers import FeatureMap, LastBlocks, transformer_blocks
from fastssl.evaluate.linear_sgd import PRESETS, Heads, Preset, linear_sgd, rate_factor
from fastssl.evaluate.segmentation_probe import segmentation_probe
from fastssl.models import build_backbone, patch_tokens
from fastssl.optim import LARS


class Net(nn.Module):
    """Channel means through BatchNorm: features (B, 3), which tell the class of `colours`."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).mean(dim=(2, 3))


class Moves(Net):
    """BatchNorm follows the images, also in eval mode."""

    def forward(self, x):
        self.norm.train()
        return super().forward(x)


class Learns(Net):
    def forward(self, x):
        self.norm.weight.data.mul_(1.0001)
        return super().forward(x)


def colours(count=60, classes=3, seed=0):
    """Images whose class is a colour, and masks of it in the left half."""
    y = torch.arange(count) % classes
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, 8, 8), generator=g)
    images[..., :4] += 160 * torch.eye(3, dtype=torch.int64)[y][:, :, None, None]
    source = TensorSource("colours", images.byte(), y, [str(c) for c in range(classes)])
    source.masks = partial(_masks, y)
    return source


def _masks(y, index):
    mask = torch.zeros(len(index), 8, 8, dtype=torch.int64)
    mask[..., :4] = 1 + y[index][:, None, None]
    return mask


def task(net, count=60, size=8):
    train, test = colours(count), colours(30, seed=1)
    network = open_network(net)
    return Task(network, Split.whole(train), Split.whole(test), Inputs(size), batch_size=32)


SMALL = {"epochs": 3, "train_batch_size": 20}


# frozen


@pytest.mark.parametrize("net", [Moves, Learns])
@pytest.mark.parametrize(
    "protocol",
    [
        partial(linear_sgd, **SMALL),
        partial(linear_sgd, augmentation=False, **SMALL),
        partial(segmentation_probe, epochs=1),
    ],
    ids=["linear-sgd", "linear-sgd, cached", "segmentation"],
)
def test_heads_on_a_network_that_changes_are_refused(net, protocol):
    with pytest.raises(RuntimeError, match=r"must stay frozen, got a changed '\w*.?norm"):
        protocol(task(net()))


@pytest.mark.parametrize("name", ["copy-detection", "alignment", "robustness", "groups", "knn"])
def test_every_other_protocol_on_images_refuses_it_too(name):
    with pytest.raises(RuntimeError, match="must stay frozen, got a changed 'norm.running_mean'"):
        evaluate(Moves(), (colours(), colours(30)), [name])


def test_networks_are_given_back_as_they_were():
    net = Net().train()
    before = fingerprint(net)
    for name in ("linear-sgd", "segmentation", "finetune"):
        evaluate(net, (colours(), colours(30)), [name], seeds=1, epochs=1)
    assert fingerprint(net) == before and net.training
    assert all(p.grad is None for p in net.parameters())


# heads of a grid


OPTIMIZERS = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, 0.9, weight_decay=wd),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(p, lr, 0.9, weight_decay=wd, nesterov=True),
    "lars": lambda p, lr, wd: LARS(p, lr, 0.9, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_each_head_of_a_grid_is_what_it_would_be_alone(optimizer, norm):
    grid = [(0.5, 0.0, 1), (0.1, 0.01, 1), (0.5, 0.01, 2), (0.1, 0.0, 2)]
    preset = Preset(optimizer, (), False, 16, 1, norm=norm)
    heads = Heads(6, 4, grid, {1: 0.5, 2: 1.0}, preset, seed=3)
    first = heads.weight[2].clone()
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(8)]
    factors = [1.0, 1.0, 0.5, 0.5, 0.2, 0.2, 0.1, 0.1]
    for (h, y), factor in zip(batches, factors, strict=True):
        heads.step(h, y, factor)
    for head, (rate, decay, blocks) in enumerate(grid):
        alone = nn.Linear(6, 4)
        alone.weight.data.copy_(first)
        alone.bias.data.zero_()
        mask = torch.ones(6)
        if blocks == 1:
            mask[3:] = 0
            alone.weight.data *= mask
        layer = {"none": nn.Identity(), "batch": nn.BatchNorm1d(6, 1e-6, affine=False)}.get(
            norm, nn.LayerNorm(6, elementwise_affine=False)
        )
        opt = OPTIMIZERS[optimizer](alone.parameters(), rate, decay)
        for (h, y), factor in zip(batches, factors, strict=True):
            opt.param_groups[0]["lr"] = rate * factor
            opt.zero_grad()
            nn.functional.cross_entropy(alone(layer(h) * mask), y).backward()
            opt.step()
        torch.testing.assert_close(heads.weight[head], alone.weight.data, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(heads.bias[head], alone.bias.data, atol=2e-6, rtol=1e-5)


def test_schedules_of_the_presets():
    moco, mae, dino = PRESETS["moco"], PRESETS["mae"], PRESETS["dino"]
    assert [rate_factor(moco, e) for e in (0, 59, 60, 79, 80)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )
    assert [rate_factor(mae, e) for e in (0, 5, 10, 50)] == pytest.approx([0, 0.5, 1, 0.5])
    assert rate_factor(dino, 50) == pytest.approx(0.5)
    assert (moco.rates, moco.batch_size, moco.linear_rule) == ((30.0,), 256, False)
    assert (mae.optimizer, mae.norm, mae.batch_size) == ("lars", "batch", 16384)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns_colours(preset):
    found = linear_sgd(
        task(Net()), preset, augmentation=preset == "simclr",
        rates=[100.0, 10.0] if preset == "mae" else [1.0, 0.1],  # LARS takes a thousandth
        epochs=60, train_batch_size=27, seeds=2,
    )  # fmt: skip
    key = f"linear-{preset}"
    assert found["top1_percent"][key] > 90 and set(found["sd_percent"]) == {key}
    protocol = found["protocol"]
    assert protocol["heads"] == 2 and "6 of the 60" in protocol["chosen_on"]
    assert len(protocol["held_out_top1_percent"]) == len(protocol["chosen"]) == 2
    assert protocol["epoch"] == "last" and protocol["batch_size"] == 27
    json.dumps(found)


def test_test_labels_choose_no_head():
    right, wrong = task(Net()), task(Net())
    wrong.test.source.labels = wrong.test.source.labels.roll(1)
    run = partial(linear_sgd, rates=[1.0, 1e-3], augmentation=False, **SMALL)
    assert run(right)["protocol"] == run(wrong)["protocol"]


def test_last_blocks_are_candidates_of_one_product():
    torch.manual_seed(0)
    net = build_backbone("vit_small", 3, 8)
    both = LastBlocks(net, 2).eval()
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        features = both(x)
        torch.testing.assert_close(features[:, :96], net(x))
        torch.testing.assert_close(features[:, :96], LastBlocks(net, 1).eval()(x))
        mean = LastBlocks(net, 1, patch_mean=True).eval()(x)
        tokens = FeatureMap(net).eval()(x)
    torch.testing.assert_close(mean[:, 96:], net(x))
    torch.testing.assert_close(mean[:, :96], tokens.mean((2, 3)))
    found = linear_sgd(task(net), "dino", last_blocks=[1, 2], rates=[0.1], **SMALL)
    assert found["protocol"]["heads"] == 2 and found["protocol"]["last_blocks"] == [1, 2]
    with pytest.raises(ValueError, match="between 1 and the network's 4 .* got 5"):
        LastBlocks(net, 5)
    with pytest.raises(ValueError, match="last_blocks needs a transformer .* got Net"):
        linear_sgd(task(Net()), "dino", last_blocks=[1])


def test_sgd_probe_errors():
    with pytest.raises(ValueError, match="got 'simcrl'. Did you mean 'simclr'"):
        linear_sgd(task(Net()), "simcrl")
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        linear_sgd(task(Net()), epochs=0)


# few labels


def test_shares_are_balanced_fixed_and_at_least_one():
    y = torch.arange(600) % 6
    chosen = draw_share(y, 0.1, seed=0)
    assert y[chosen].bincount().tolist() == [10] * 6
    assert torch.equal(chosen, draw_share(y, 0.1, seed=0))
    assert not torch.equal(chosen, draw_share(y, 0.1, seed=1))
    assert len(draw_share(y, 1e-6, seed=0)) == 6 and len(draw_share(y, 1.0, 0)) == 600
    with pytest.raises(ValueError, match=r"shares must be in \(0, 1\], got 1.5"):
        draw_share(y, 1.5, 0)


def test_subset_chooses_on_the_drawn_labels_alone():
    y = torch.arange(200) % 4
    h = 2 * torch.eye(4)[y] + torch.randn(200, 4)
    found = subset(h, y, h, y, shares=(0.1, 0.5), draws=3)
    wrong = subset(h, y, h, y.roll(1), shares=(0.1, 0.5), draws=3)
    l2 = [[share["l2"] for share in f["protocol"]["by_share"].values()] for f in (found, wrong)]
    assert l2[0] == l2[1]
    assert found["protocol"]["by_share"]["10%-labels"]["labels"] == 20
    scores = torch.tensor(found["protocol"]["by_share"]["50%-labels"]["top1_percent"])
    assert found["sd_percent"]["50%-labels"] == pytest.approx(scores.std().item(), abs=1e-4)


# fine-tuning


def test_finetune_learns_and_chooses_on_held_out_labels_only():
    settings = {"epochs": 4, "train_batch_size": 18, "lr": 0.5, "seeds": 2}
    right, wrong = task(Net()), task(Net())
    wrong.test.source.labels = wrong.test.source.labels.roll(1)
    found, other = finetune(right, **settings), finetune(wrong, **settings)
    assert found["top1_percent"]["finetune"] > 60 > other["top1_percent"]["finetune"]
    for a, b in zip(found["protocol"]["runs"]["finetune"], other["protocol"]["runs"]["finetune"],
                    strict=True):  # fmt: skip
        assert a["held_out_top1_percent"] == b["held_out_top1_percent"]
        best = max(a["held_out_top1_percent"])
        assert a["epoch"] == b["epoch"] == 1 + a["held_out_top1_percent"].index(best)
        assert a["held_out"] == 6 and a["fitted_on"] == 54
    json.dumps(found)


def test_finetune_with_few_labels_takes_the_recipe_of_one_percent():
    found = finetune(task(Net(), 300), "simclr", shares=(0.01, 0.5), epochs=1, seeds=2)
    recipes = found["protocol"]["recipe"]
    assert set(found["top1_percent"]) == {"finetune-1%", "finetune-50%"}
    assert found["protocol"]["runs"]["finetune-1%"][0]["labels"] == 3
    assert RECIPES["simclr-1%"].epochs == 60 and recipes["finetune-1%"]["epochs"] == 1
    assert found["protocol"]["runs"]["finetune-1%"][0]["held_out_top1_percent"] == []
    found = finetune(task(Net(), 300), "simclr_v2", shares=(0.1,), epochs=1, seeds=1)
    assert found["protocol"]["recipe"]["finetune-10%"]["optimizer"] == "lars"
    run = found["protocol"]["runs"]["finetune-10%"][0]
    assert run["batch_size"] == 27 and run["lr"] == pytest.approx(0.005 * 27**0.5)
    shots = finetune(task(Net()), shots=(9, 10), epochs=1, seeds=1)
    assert list(shots["top1_percent"]) == ["finetune-9-shot", "finetune-10-shot"]
    held = {name: run["held_out"] for name, (run,) in shots["protocol"]["runs"].items()}
    assert held == {"finetune-9-shot": 0, "finetune-10-shot": 3}  # a tenth of fewer is none


def test_half_of_the_time_twice_an_image_is_changed():
    pytest.importorskip("torchvision")
    a, images = task(Net()), torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)

    def seen(recipe, epoch=0):
        x = images
        for view in training_views(a, RECIPES[recipe]):
            (x,) = augment(x, torch.arange(300), [view], seed=3, epoch=epoch)
        return x

    plain, changed = seen("cnn"), seen("thorax")
    assert changed.shape == (300, 3, 8, 8) and torch.equal(changed, seen("thorax"))
    assert changed.amin() >= plain.amin() - 0.1 and changed.amax() <= plain.amax() + 0.1
    same = torch.isclose(changed, plain, atol=1e-4).flatten(1).all(1)
    assert 0.2 < same.float().mean() < 0.45  # a quarter, and where an operation did nothing
    different = (seen("vit") - plain).abs().mean(), (changed - plain).abs().mean()
    assert different[0] > different[1] > 0.1
    assert not torch.equal(changed, seen("thorax", epoch=1))


def test_finetune_of_a_transformer_decays_rates_by_layer_mixes_and_drops():
    pytest.importorskip("torchvision")
    net = build_backbone("vit_small", 3, 8)
    found = finetune(task(net), epochs=1, seeds=1, precision="bf16", mixup=0.8, cutmix=1.0)
    assert found["protocol"]["recipe_name"] == "vit"
    recipe = found["protocol"]["recipe"]["finetune"]
    assert (recipe["layer_decay"], recipe["rand_augment"]) == (0.65, 9)
    again = finetune(task(net), epochs=1, seeds=1, precision="bf16", mixup=0.8, cutmix=1.0)
    assert found == again


def several_labels(count=60):
    """Images whose channels are bright, each by itself, where a label says so."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (count, 3), generator=g)
    images = 160 * y[:, :, None, None] + torch.randint(0, 60, (count, 3, 8, 8), generator=g)
    return TensorSource("channels", images.byte(), y, ["red", "green", "blue"])


def several(net, count=60):
    split = Split.whole(several_labels(count))
    return Task(open_network(net), split, split, Inputs(8))


def test_finetune_with_several_labels_an_image():
    settings = {"epochs": 4, "train_batch_size": 18, "lr": 0.5}
    found = finetune(several(Net()), seeds=2, **settings)
    assert set(found["percent"]) == set(found["sd_percent"]) == {"finetune-auc", "finetune-map"}
    assert found["percent"]["finetune-auc"] > 90
    assert len(found["percent_by_seed"]["finetune-auc"]) == 2
    run = found["protocol"]["runs"]["finetune"][0]
    best = max(run["held_out_auc_percent"])
    assert run["epoch"] == 1 + run["held_out_auc_percent"].index(best)
    assert (run["held_out"], run["fitted_on"]) == (6, 54)
    few = finetune(several(Net()), seeds=1, shares=(0.5,), **settings)
    assert few["protocol"]["runs"]["finetune-50%"][0]["labels"] == 30
    json.dumps(found)


def test_loss_of_several_labels_is_a_binary_cross_entropy_each():
    logits, y = torch.tensor([[0.0, 2.0], [-1.0, 0.0]]), torch.tensor([[1, 0], [0, 0]])
    net = nn.Identity()
    loss = _loss(net, logits, y, RECIPES["thorax"], "fp32")
    p = logits.double().sigmoid()
    want = -torch.where(y == 1, p, 1 - p).log().mean()
    torch.testing.assert_close(loss.double(), want, atol=1e-6, rtol=0)


def test_the_thorax_recipe_is_that_of_transformers_with_several_labels():
    pytest.importorskip("torchvision")
    net = build_backbone("vit_small", 3, 8)
    found = finetune(several(net), epochs=1, seeds=1)
    assert found["protocol"]["recipe_name"] == "thorax"
    recipe = found["protocol"]["recipe"]["finetune"]
    assert (recipe["layer_decay"], recipe["drop_path"], recipe["pool"]) == (0.55, 0.2, "patches")
    last = RECIPES["thorax"].rate_factor(75)
    assert last == pytest.approx(0.01) and RECIPES["thorax"].rate_factor(5) == 1


def test_the_mean_of_patches_may_be_what_the_head_sees():
    net = build_backbone("vit_small", 3, 8).eval()
    x = torch.randn(4, 3, 8, 8)
    model = Classifier(net, task(net), task(net).train, torch.nn.Sequential(), "patches")
    torch.testing.assert_close(model.features(x), patch_tokens(net, x)[1].mean(dim=1))
    model = Classifier(net, task(net), task(net).train, torch.nn.Sequential())
    torch.testing.assert_close(model.features(x), net(x))


def test_what_several_labels_do_not_take():
    for settings, message in [
        ({"shots": (5,)}, r"shots must be of images with one label, got \(5,\)"),
        ({"recipe": "vit"}, "must neither mix nor smooth labels .* got 'vit'. Use thorax or cnn"),
        ({"recipe": "cnn", "mixup": 0.8}, "must neither mix nor smooth"),
        ({"pool": "mean"}, 'pool must be "own" or "patches", got \'mean\''),
    ]:
        with pytest.raises(ValueError, match=message):
            finetune(several(Net()), **settings)
    uncertain = several(Net())
    uncertain.train.source.labels[0, 0] = -1
    with pytest.raises(ValueError, match="targets must be 0 or 1, got -1"):
        finetune(uncertain)


def test_drop_path_skips_whole_blocks_and_keeps_the_mean():
    net = build_backbone("vit_small", 3, 8)
    blocks = transformer_blocks(net)
    x = torch.randn(400, 17, 96)
    whole = blocks[3](x) - x
    with dropping_paths(net, 0.5):
        part = blocks[3](x) - x
        torch.testing.assert_close(blocks[0](x[:4]) - x[:4], blocks[0].forward(x[:4]) - x[:4])
    kept = part.flatten(1).abs().sum(1) > 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(part[kept], 2 * whole[kept], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(blocks[3](x) - x, whole)


def test_a_classifier_leaves_the_network_it_copies_alone():
    net = Net()
    model = Classifier(net, task(net), task(net).train, nn.Sequential())
    model.backbone.norm.weight.data.fill_(7)
    assert net.norm.weight.eq(1).all() and model.head.weight.shape == (3, 3)


def test_finetune_errors():
    for settings, message in [
        ({"recipe": "vti"}, "got 'vti'. Did you mean 'vit'"),
        ({"precision": "fp8"}, 'precision must be "fp32", "bf16" or "auto", got \'fp8\''),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"rand_augment": 11}, "rand_augment must be at most 10, got 11"),
        ({"shares": (2.0,)}, "shares must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            finetune(task(Net()), **settings)


# several labels


def test_binary_heads_reach_scikit_learns_optimum():
    models = pytest.importorskip("sklearn.linear_model")
    h = torch.randn(120, 5, dtype=torch.float64)
    y = (h[:, :3] + torch.randn(120, 3) > 0.3).long()
    weight, bias = fit_logistic(h, y, 3, 1e-2)
    for c in range(3):
        oracle = models.LogisticRegression(C=1 / (120 * 1e-2), tol=1e-10, max_iter=5000)
        oracle.fit(h.numpy(), y[:, c].numpy())
        torch.testing.assert_close(weight[:, c], torch.tensor(oracle.coef_[0]), atol=1e-4, rtol=0)
        assert bias[c].item() == pytest.approx(oracle.intercept_[0], abs=1e-4)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_logistic_objective_is_scikit_learns_to_1e_6_and_predictions_agree(l2):
    models = pytest.importorskip("sklearn.linear_model")
    y = torch.arange(160) % 4
    h = torch.randn(4, 8, dtype=torch.float64)[y] + 2 * torch.randn(160, 8, dtype=torch.float64)

    def objective(w, b):
        return nn.functional.cross_entropy(h @ w + b, y) + 0.5 * l2 * w.square().sum()

    ours = fit_logistic(h, y, 4, l2)
    oracle = models.LogisticRegression(C=1 / (160 * l2), tol=1e-8, max_iter=10_000)
    oracle.fit(h.numpy(), y.numpy())
    theirs = torch.tensor(oracle.coef_.T), torch.tensor(oracle.intercept_)
    assert objective(*ours).item() == pytest.approx(objective(*theirs).item(), abs=1e-6)
    logits = h @ ours[0] + ours[1]
    first, second = logits.topk(2, dim=1).values.unbind(1)
    differing = logits.argmax(1) != torch.tensor(oracle.predict(h.numpy()))
    assert (first - second)[differing].le(1e-3).all()


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_multilabel_averages_equal_scikit_learn_and_torchmetrics(average):
    metrics = pytest.importorskip("sklearn.metrics")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    h = torch.randn(90, 6, dtype=torch.float64)
    y = (h[:, :4] + torch.randn(90, 4) > 0.5).long()
    result = multilabel_probe(h[:60], y[:60], h[60:], y[60:])
    scores = _scores(h, y, result["protocol"]["l2"])
    key = "" if average == "macro" else f"_{average}"
    ap = metrics.average_precision_score(y[60:].numpy(), scores.numpy(), average=average)
    auc = metrics.roc_auc_score(y[60:].numpy(), scores.numpy(), average=average)
    assert result["percent"][f"map{key}"] == pytest.approx(100 * ap, abs=1e-4)
    assert result["percent"][f"auc{key}"] == pytest.approx(100 * auc, abs=1e-4)
    if average != "weighted":
        p = scores.sigmoid()
        ap = functional.multilabel_average_precision(p, y[60:], 4, average=average)
        assert result["percent"][f"map{key}"] == pytest.approx(100 * ap.item(), abs=1e-4)
        auc = functional.multilabel_auroc(p, y[60:], 4, average=average)
        assert result["percent"][f"auc{key}"] == pytest.approx(100 * auc.item(), abs=1e-4)


def _scores(h, y, l2):
    """Of the last 30 rows, by a classifier of the first 60."""
    mean, sd = h[:60].mean(0), h[:60].std(0, correction=0)
    weight, bias = fit_logistic((h[:60] - mean) / sd, y[:60], y.shape[1], l2)
    return (h[60:] - mean) / sd @ weight + bias


def test_test_labels_choose_no_strength_of_multilabel():
    h = torch.randn(80, 4)
    y = (h + torch.randn(80, 4) > 0).long()
    found = multilabel_probe(h[:50], y[:50], h[50:], y[50:])["protocol"]
    other = multilabel_probe(h[:50], y[:50], h[50:], 1 - y[50:])["protocol"]
    same = ("l2", "held_out_map", "l2_chosen_on")
    assert [found[key] for key in same] == [other[key] for key in same]


def test_label_sets_equal_a_loop():
    scores = torch.randn(200, 6)
    targets = torch.rand(200, 6) < 0.3
    found = label_sets(scores, targets, n_min=1)
    real, share, exact, by_size = [], [], [], {}
    for s, t in zip(scores, targets, strict=True):
        valid = set(t.nonzero()[:, 0].tolist())
        if valid:
            order = s.argsort(descending=True).tolist()
            real.append(order[0] in valid)
            share.append(len(valid & set(order[: len(valid)])) / len(valid))
            exact.append(share[-1] == 1)
            by_size.setdefault(len(valid), []).append(share[-1])
    assert found["real"] == pytest.approx(100 * np.mean(real))
    assert found["variable_top_k"] == pytest.approx(100 * np.mean(share))
    assert found["exact_match"] == pytest.approx(100 * np.mean(exact))
    expected = 100 * np.mean([np.mean(values) for values in by_size.values()])
    assert found["asma"] == pytest.approx(expected)
    assert found["no_label"] == 200 - len(real)
    assert label_sets(scores, targets, "size")["asma"] == pytest.approx(found["variable_top_k"])
    perfect = label_sets(targets.float(), targets)
    assert perfect["asma"] == 100 == perfect["exact_match"]
    assert label_sets(scores, targets)["real"] >= 0
    with pytest.raises(ValueError, match='weights must be "uniform" or "size"'):
        label_sets(scores, targets, "mean")
    with pytest.raises(ValueError, match="must hold a label, got none"):
        label_sets(scores, torch.zeros(200, 6))


def test_several_labels_an_image_are_evaluated_as_such():
    data = [
        ShapesSource("shapes:multi", split, size=60, image_size=8) for split in ("train", "test")
    ]
    results = evaluate(nn.Flatten(), tuple(data), image_size=8)
    assert list(results) == ["multilabel"] and 0 < results["multilabel"]["percent"]["map"] < 100
    assert list(results["multilabel"]["classes"]["roc_auc"])[0] == "disc"
    assert evaluate(nn.Flatten(), tuple(data), ["rankme"])["rankme"]["rankme"] > 1
    tuned = evaluate(nn.Flatten(), tuple(data), ["finetune"], image_size=8, epochs=1, seeds=1)
    assert 0 < tuned["finetune"]["percent"]["finetune-auc"] < 100
    with pytest.raises(ValueError, match="knn must have one label an image, got several"):
        evaluate(nn.Flatten(), tuple(data), ["knn"])


# knn between features as they are


@pytest.mark.parametrize("votes", ["uniform", "distance"])
def test_knn_by_distance_equals_scikit_learn(votes):
    neighbors = pytest.importorskip("sklearn.neighbors")
    y = torch.arange(300) % 4
    h = (torch.randn(4, 6)[y] + torch.randn(300, 6)).double() + 100
    train, test = (h[:200], y[:200]), (h[200:], y[200:])
    for k in (1, 5, 40):
        oracle = neighbors.KNeighborsClassifier(k, weights=votes).fit(*(x.numpy() for x in train))
        expected = 100 * oracle.score(*(x.numpy() for x in test))
        found = knn(*train, *test, ks=(k,), votes=votes, metric="l2")["top1_percent"]
        assert found[f"knn-{k}"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="metric must be one of 'cosine', 'l2', got 'l1'"):
        knn(*train, *test, metric="l1")


# segmentation


def test_segmentation_of_colours_and_scores_by_torchmetrics(monkeypatch):
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    module = importlib.import_module("fastssl.evaluate.segmentation_probe")
    oracle = torchmetrics.MulticlassJaccardIndex(4)
    update = module.ConfusionMatrix.update

    def spy(self, predicted, target):
        update(self, predicted, target)
        if predicted.ndim == 3:
            oracle.update(predicted, target)

    monkeypatch.setattr(module.ConfusionMatrix, "update", spy)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = segmentation_probe(task(net), epochs=8, lr=0.1)
    assert found["percent"]["miou"] > 90 and found["protocol"]["classes"] == 4
    assert found["percent"]["miou"] == pytest.approx(100 * oracle.compute().item(), abs=1e-4)
    with pytest.raises(ValueError, match="feature map .* got none inside"):
        segmentation_probe(task(nn.Flatten()), epochs=1)
    bare = task(net)
    del bare.train.source.masks
    with pytest.raises(ValueError, match="data must have masks, got 'colours' without"):
        segmentation_probe(bare)


@pytest.mark.parametrize("name", ["resnet_small", "vit_small", "timm:resnet10t",
                                  "timm:vit_tiny_patch16_224", "torchvision:resnet18"])  # fmt: skip
def test_the_last_map_of_known_networks(name):
    pytest.importorskip(name.partition(":")[0] if ":" in name else "torch")
    net = build_backbone(name, 3, 64).eval()
    with torch.no_grad():
        maps = FeatureMap(net)(torch.randn(2, 3, 64, 64))
    assert maps.shape[:2] == (2, net.feature_dim) and maps[0, 0].numel() > 1
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        pooled = FeatureMap(net)(x).mean((2, 3)) if "resnet" in name else LastBlocks(net, 1)(x)
        torch.testing.assert_close(pooled, net(x))


def test_blocks_of_torchvisions_transformers():
    models = pytest.importorskip("torchvision.models")
    net = models.VisionTransformer(16, 4, 2, 2, 24, 48).eval()
    net.heads = nn.Identity()
    with torch.no_grad():
        x = torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(LastBlocks(net, 2)(x)[:, :24], net(x))
        assert FeatureMap(net)(x).shape == (3, 24, 4, 4)


# images that are changed


def test_copies_disturbances_groups_and_views():
    data = colours(), colours(30, seed=1)
    protocols = ["copy-detection", "alignment", "robustness", "groups"]
    results = evaluate(Net(), data, protocols, seeds=2)
    assert results["robustness"]["top1_percent"]["clean"] == 100
    assert results["robustness"]["top1_percent"]["grey"] < 70  # colour is all there is
    assert results["robustness"]["worst"] == "grey"
    assert results["groups"]["top1_percent"]["worst-group"] == 100 and set(
        results["groups"]["groups"]
    ) == {*"012"}
    copies = results["copy-detection"]
    assert copies["protocol"]["copies_of_nothing"] == 15 and 0 < copies["percent"]["muap"] < 100
    same = evaluate(Net(), data, ["alignment"])["alignment"]
    assert 0 < same["alignment"] < 2 and same["uniformity"] < 0
    assert results == evaluate(Net(), data, protocols, seeds=2)


def test_identical_copies_are_found(monkeypatch):
    views = importlib.import_module("fastssl.evaluate.views")
    monkeypatch.setattr(Task, "view_features", lambda self, net, split, view, **_: (
        torch.stack([net(self.inputs(split.source.images[i : i + 1]))[0] for i in split.index]), 0
    ))  # fmt: skip
    found = views.copies(task(nn.Flatten()))
    assert found["percent"]["recall@1"] == 100 and found["percent"]["muap"] == pytest.approx(100)


def test_shifts_are_scored_by_the_names_of_their_classes():
    data = tuple(ShapesSource("shapes", s, size=64, image_size=32) for s in ("train", "test"))
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    found = evaluate(net, data, ["robustness"], disturbances=[], shifts=["shapes:greyscale"])
    found = found["robustness"]
    assert set(found["top1_percent"]) == {"clean", "shapes:greyscale"}
    assert found["protocol"]["shifts"]["shapes:greyscale"]["classes"] == 8
    with pytest.raises(ValueError, match="shifts must have classes of the training split, got"):
        evaluate(net, data, ["robustness"], disturbances=[], shifts=["patches"])
    with pytest.raises(ValueError, match="disturbances must be among noise, blur"):
        evaluate(net, data, ["robustness"], disturbances=["fog"])


def test_groups_of_a_file(tmp_path):
    path = tmp_path / "groups.csv"
    rows = [["image", "group"], *([i, "even" if i % 2 == 0 else "odd"] for i in range(30))]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = evaluate(Net(), (colours(), colours(30)), ["groups"], groups=path)["groups"]
    assert {name: g["n"] for name, g in found["groups"].items()} == {"even": 15, "odd": 15}
    path.write_text("image,group\n0,a\n")
    with pytest.raises(ValueError, match="must name the group of each test image, got none for 1"):
        evaluate(Net(), (colours(), colours(30)), ["groups"], groups=path)


# splits and settings


def test_the_test_split_is_not_opened_for_choices():
    class Closed:
        def __getattr__(self, name):
            raise AssertionError(f"the test split was asked for its {name}")

    results = evaluate(Net(), (colours(), Closed()), ["knn", "linear"], split="held-out")
    protocol = results["knn"]["protocol"]
    assert (protocol["train_images"], protocol["test_images"]) == (54, 6)
    assert protocol["scored"].startswith("a tenth of the training split")


@pytest.mark.parametrize("protocol", ["knn", "linear-sgd", "finetune", "robustness", "groups"])
def test_a_class_without_training_images_is_refused(protocol):
    with pytest.raises(ValueError, match=r"no training sample of \[2\]"):
        evaluate(Net(), (colours(classes=2), colours(30)), [protocol])


def test_settings_go_to_the_protocols_that_take_them():
    data = colours(), colours(30)
    results = evaluate(Net(), data, ["knn", "kshot"], metric="l2", ks=(3,), shots=(2,), seeds=4)
    assert list(results["knn"]["top1_percent"]) == ["knn-3"]
    assert results["kshot"]["protocol"]["draws"] == 4
    with pytest.raises(ValueError, match="takes 'metrics'. Did you mean 'metric'"):
        evaluate(Net(), data, ["knn"], metrics="l2")
    for settings in ({"recipe": "vit"}, {"seeds": 2}):
        with pytest.raises(ValueError, match=f"no protocol asked for takes '{[*settings][0]}'"):
            evaluate(Net(), data, ["knn"], **settings)
    with pytest.raises(ValueError, match='split must be "test" or "held-out"'):
        evaluate(Net(), data, split="val")
