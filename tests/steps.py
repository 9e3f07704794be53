"""Steps of a small method: in one process, over ranks, and twice."""

import copy
import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import PretrainConfig
from fastssl.data import Batch
from fastssl.dist import SyncBatchNorm
from fastssl.methods import METHODS
from fastssl.methods.recipes import resolve
from fastssl.models import ResNetSmall, ViTSmall
from fastssl.train import setup
from fastssl.train.parallel import Objective
from fastssl.train.update import Update

CPU = torch.device("cpu")
NEED_PATCHES = {"dinov2", "mae"}
"""Methods that read patch tokens."""


def built(name, **arguments):
    torch.manual_seed(0)
    backbone = ViTSmall(1, 8, 24, 2) if name in NEED_PATCHES else ResNetSmall(1, 8, 16)
    return METHODS[name](backbone, **arguments)


def batch(step=0, count=16, part=slice(None), sizes=(8, 8)):
    """The sizes are those of the views; two steps are an epoch. Three classes."""
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(count, 1, size, size, generator=generator)[part] for size in sizes]
    index = torch.arange(count)[part]
    captions = [f"number {i} of 16, step {step}" for i in index.tolist()]
    return Batch(views, index, index % 3, step, 10, step / 2, captions)


def with_gradients(method, loss):
    """The loss, and the gradient of each parameter that has one, by its name."""
    method.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_teacher_follows(method, student, teacher):
    """A method of momentum 0.5 at the start: a weight of its teacher's follows the student's more
    slowly with every step, and stands at the end."""
    with torch.no_grad():
        student.add_(1.0)
    for step in (1, 5, 10):
        m = 1 - 0.5 * (math.cos(math.pi * step / 10) + 1) / 2
        want = m * teacher + (1 - m) * student
        method.after_step(step, 10)
        torch.testing.assert_close(teacher, want)
    assert torch.equal(want, teacher)  # m = 1


def disturb_teacher(method):
    """Makes it another network than the student."""
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))


def trained(method, objective, part=slice(None), steps=3, first=0, sizes=(8, 8), **settings):
    """The losses of so many steps, and the state after them."""
    settings = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0} | settings
    config = resolve(PretrainConfig(**settings))
    setup.train_mode(method, [])
    update = Update(config, method, setup.build_optimizer(config, method), CPU, "fp32")
    losses = []
    for step in range(first, first + steps):
        losses.append(update(objective, batch(step, part=part, sizes=sizes))["loss"])
        method.after_step(step + 1, 10)
    return {"losses": torch.stack(losses), **copy.deepcopy(method.state_dict())}


def _on_a_rank(group, name, sizes, arguments):
    rank, world = dist.get_rank(), dist.get_world_size()
    method = SyncBatchNorm.convert_sync_batchnorm(built(name, **arguments))
    part = slice(rank * 16 // world, (rank + 1) * 16 // world)
    return trained(method, DistributedDataParallel(Objective(method)), part, sizes=sizes)


def assert_ranks_are_one_process(ranks, name, sizes=(8, 8), **arguments):
    """Losses, weights, teacher and queue after three steps on four ranks are those of one."""
    method = built(name, **arguments)
    want = trained(method, Objective(method), sizes=sizes)
    for got in ranks.run(_on_a_rank, 4, name, sizes, arguments):
        assert got.keys() == want.keys()
        for key, x in want.items():
            torch.testing.assert_close(got[key], x, atol=1e-4, rtol=1e-3, msg=key)


def assert_repeats_and_goes_on(name, sizes=(8, 8), **arguments):
    """Equal seeds give equal bits; so does a state loaded by another method of that kind."""

    def run(method, first=0):
        return trained(method, Objective(method), steps=2, first=first, sizes=sizes)

    one, two, other, fresh = (built(name, **arguments) for _ in range(4))
    states = run(one), run(two)
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    other.load_state_dict({key: torch.zeros_like(x) for key, x in other.state_dict().items()})
    other.load_state_dict(one.state_dict())
    states = run(one, first=2), run(other, first=2)
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert not torch.equal(states[0]["losses"], run(fresh, first=2)["losses"])


class Rows(torch.nn.Module):
    """A backbone whose features are the pixels, to put values into a loss."""

    def __init__(self, width):
        super().__init__()
        self.feature_dim = width

    def forward(self, x):
        return x.flatten(1)


def loss_of_rows(method, *rows):
    """The loss of a method whose heads are identities, of rows (B, D) for each view."""
    views = [x.view(len(x), 1, 1, -1) for x in rows]
    index = torch.arange(len(rows[0]))
    return method.loss(Batch(views, index, torch.full_like(index, -1)))
