"""Whole training steps: the plain forms do what ours do, and what is told of them."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Normalize,
    RandomResizedCrop,
    Solarize,
    View,
    augment,
)
from fastssl.bench import cases, plain, running, step
from fastssl.bench.results import environment, markdown
from fastssl.methods.recipes import RECIPES
from fastssl.ops import sigreg_directions


def test_whole_steps_come_in_parts():
    pytest.importorskip("torchvision")
    (case,) = cases(["methods"], names=["moco_v2"], sizes={"B": [8]})
    row = running.row(case, threads=1, seconds=0.001, repeats=1, baselines=None, apart=False)
    assert row["failed"] == {} and set(row["providers"]) == {"ours", "eager", "eager, our views"}
    for name, parts in row["parts_percent"].items():
        assert sum(parts.values()) == pytest.approx(100)
        assert min(parts[part] for part in ("encoder", "backward")) > 1
        assert row["images_per_s"][name] == pytest.approx(8e3 / row["providers"][name]["median_ms"])
    text = markdown({"environment": environment(1), "rows": [row]})
    assert text.count("| moco_v2 | B 8 |") == 3 and "largest batch" not in text


def test_what_steps_hold_and_how_large_they_can_be(monkeypatch):
    (case,) = cases(["methods"], names=["simclr"], sizes={"B": [4]})
    providers, _ = case.make()
    held = {}
    for name in ("ours", "eager, our views"):
        providers[name]()
        held[name] = providers[name].held_mib()
    weights = sum(p.numel() for p in providers["ours"].method.parameters())
    # Two states of a byte for each weight, not two of float32.
    assert held["eager, our views"] - held["ours"] == pytest.approx(6 * weights / 2**20, rel=0.05)

    backward = step.Step.backward

    def of_at_most_16(self):
        if self.B > 16:
            raise torch.OutOfMemoryError("no room")
        return backward(self)

    monkeypatch.setattr(step.Step, "backward", of_at_most_16)
    providers["ours"].forget()
    assert providers["ours"].largest_batch() == (16, True) and providers["ours"].B == 4
    assert providers["ours"].method is None
    monkeypatch.setattr(step, "SEARCH_S", 1e-9)
    assert providers["ours"].largest_batch() == (8, False)


@pytest.mark.parametrize(
    "specs",
    [
        (HorizontalFlip(1.0), ColorJitter((0.7, 0.7)), Solarize(1.0, 0.6)),
        (Grayscale(1.0), GaussianBlur(1.0, (0.5, 0.5))),
    ],
)
def test_torchvisions_views_are_ours(specs):
    pytest.importorskip("torchvision")
    crop = RandomResizedCrop(24, (1.0, 1.0), (1.0, 1.0), "bicubic")
    view = View(crop, *specs, Normalize())
    images = torch.randint(256, (2, 3, 32, 32), generator=torch.manual_seed(0)).byte()
    (ours,) = augment(images, torch.arange(2), [view], seed=0, epoch=0)
    transform = plain.torchvision_view(view)
    error = (torch.stack([transform(x) for x in images]) - ours).abs()
    assert error.mean() < 0.02  # it rounds to bytes after each part


class KernelsCalled(TorchDispatchMode):
    """The names of our ops that run."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastssl":
            self.seen.add(op.name())
        return op(*args, **kwargs or {})

    def __enter__(self):
        self.seen = set()
        return super().__enter__()


ALIKE = "view_parameters", "render_views", "sinkhorn_pass", "sigreg_directions"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*sorted(plain.LOSSES), "dino, mean"])
def test_plain_forms_are_the_methods(name, dtype, monkeypatch):
    """Of the same views and weights, in two steps: losses, gradients, teachers, queues, centres."""
    name, _, centering = name.partition(", ")
    recipe = RECIPES[name]["patches"]
    arguments = recipe["method_args"] | ({"centering": centering} if centering else {})
    draws = itertools.count()

    def ours_drew(D, slices, device):
        return sigreg_directions(slices, D, seed=0, step=next(draws), device=device)

    monkeypatch.setattr(plain, "directions", ours_drew)
    found = []
    for eager in (False, True):
        images = step.stored_images(16, 32, "cpu")
        one = step.Step(name, arguments, recipe["backbone"], images, 32, 16, dtype, "cpu", eager, 0)
        losses = []
        with KernelsCalled() as kernels:
            for number in range(2):
                losses.append(one.backward())
                gradients = [p.grad for p in one.method.parameters() if p.grad is not None]
                with torch.no_grad():
                    for p in one.method.backbone.parameters():
                        p.mul_(1.5)
                one.method.after_step(number + 1, 10)
        found.append((losses, gradients, one.method.state_dict()))
    # Our views and the monitors' usage of prototypes, which are the same in both.
    assert kernels.seen <= {f"fastssl::{op}" for op in ALIKE}
    assert not any("fastssl.losses" in type(m).__module__ for m in one.method.modules())
    (losses, gradients, state), (its_losses, its_gradients, its_state) = found
    rounding = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(losses, its_losses, rtol=rounding, atol=rounding)
    if dtype == "bfloat16":
        return
    largest = max(float(g.abs().max()) for g in gradients)
    torch.testing.assert_close(gradients, its_gradients, rtol=1e-3, atol=1e-4 * largest)
    shared = state.keys() & its_state.keys()
    torch.testing.assert_close({k: state[k] for k in shared}, {k: its_state[k] for k in shared})
