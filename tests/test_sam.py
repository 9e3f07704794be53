import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastssl import FeatureQueue
from fastssl.optim import SAM, AdamW8bit, replay

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
OPTIMIZERS = {
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW8bit": lambda p: AdamW8bit(p, lr=0.01, min_8bit_size=16, max_grad_norm=0.1),
}


def norm_of(tensors):
    return torch.stack([x.square().sum() for x in tensors]).sum().sqrt()


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def two_layers(dtype=torch.float32, device="cpu"):
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(device, dtype)


def closure_of(sam, model, x):
    def closure():
        sam.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("rho", [0.05, torch.tensor(0.3)], ids=["number", "tensor"])
def test_the_quadratic(rho):
    """Of L = w^T H w / 2 the step takes the gradient H (w + rho H w / |H w|)."""
    A = torch.randn(7, 7, dtype=torch.float64)
    H, w = A @ A.T, nn.Parameter(torch.randn(7, dtype=torch.float64))
    sam, start = SAM(torch.optim.SGD([w], lr=0.1), rho=rho), w.detach().clone()

    def closure():
        sam.zero_grad()
        loss = w @ H @ w / 2
        loss.backward()
        return loss

    assert sam.step(closure) == start @ H @ start / 2
    g = H @ start
    expected = H @ (start + float(rho) * g / g.norm())
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.detach(), start - 0.1 * expected, rtol=1e-12, atol=1e-12)


@devices
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_perturbation(adaptive, dtype, device):
    """Over two groups; weights without a gradient stay."""
    model = two_layers(dtype, device)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
    sam = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.5, adaptive=adaptive, eta=0.01)
    model[0].bias.requires_grad_(False)
    model(torch.randn(5, 6, device=device, dtype=dtype)).square().mean().backward()
    moving = [p for p in model.parameters() if p.requires_grad]
    start, fixed = [p.detach().clone() for p in moving], model[0].bias.clone()
    w, g = ([x.double() for x in xs] for xs in (start, [p.grad for p in moving]))
    sam.first_step()
    assert torch.equal(model[0].bias, fixed)
    sizes = [x.abs() + 0.01 if adaptive else torch.ones_like(x) for x in w]
    norm = norm_of([t * x for t, x in zip(sizes, g, strict=True)])
    eps = torch.finfo(dtype).eps
    for p, old, t, x in zip(moving, w, sizes, g, strict=True):
        e = 0.5 * t * t * x / norm
        got = p.detach().double()
        assert ((got - old - e).abs() <= 2 * eps * (old.abs() + e.abs()) + 1e-5 * e.abs()).all()
    sam.restore()
    assert same(moving, start)


@devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_phases_and_closure_are_one_and_a_plain_step_of_that_gradient(name, device):
    models = [two_layers(device=device)]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in models]
    phases, closed, plain = SAM(optimizers[0]), SAM(optimizers[1]), optimizers[2]
    for _ in range(3):
        x = torch.randn(5, 6, device=device)
        models[0](x).square().mean().backward()
        start = bits(models[0])
        phases.first_step(zero_grad=True)
        assert not same(models[0].parameters(), start)
        models[0](x).square().mean().backward()
        for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
            q.grad = p.grad.clone()
        phases.second_step(zero_grad=True)
        plain.step()
        closed.step(closure_of(closed, models[1], x))
        for other in models[1:]:
            assert same(models[0].parameters(), other.parameters())
        assert all(p.grad is None for p in models[0].parameters())


def test_rho_0_is_the_optimizer():
    model = two_layers()
    other, x = copy.deepcopy(model), torch.randn(5, 6)
    sam, plain = (
        SAM(torch.optim.Adam(model.parameters()), rho=0),
        torch.optim.Adam(other.parameters()),
    )
    sam.step(closure_of(sam, model, x))
    closure_of(plain, other, x)()
    plain.step()
    assert same(model.parameters(), other.parameters())


def test_zero_gradients_and_none_at_all():
    w = nn.Parameter(torch.ones(3))
    sam = SAM(torch.optim.SGD([w], lr=0.1))
    sam.first_step()
    sam.second_step()
    w.grad = torch.zeros(3)
    sam.first_step()
    assert torch.equal(w, torch.ones(3))
    sam.second_step()
    assert torch.equal(w, torch.ones(3))


def test_restores_what_is_not_finite():
    w = nn.Parameter(torch.tensor([1.0, torch.inf, -0.0, 1e-42]))
    start = w.detach().clone()
    sam = SAM(torch.optim.SGD([w], lr=0.1))
    w.grad = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    sam.first_step()
    assert w.isnan().all()
    sam.restore()
    assert torch.equal(w.view(torch.int32), start.view(torch.int32))


# ------------------------------------------------------------------------------------------- replay


class Loss(nn.Module):
    """Dropout, BatchNorm, a queue pushed in the forward, a buffer that is replaced by another."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
        )
        self.queue = FeatureQueue(16, 4)
        self.register_buffer("center", None)
        self.seen = []

    def forward(self, x):
        self.seen.append([b.clone() for b in self.buffers()])
        if self.center is None:
            self.center = torch.zeros(4, device=x.device)
        z = normalize(self.net(x), dim=1)
        logits = (z - self.center) @ self.queue.features.clone().T
        self.queue.enqueue(z.detach())
        self.center = 0.5 * self.center + z.detach().mean(0)
        return logits.logsumexp(1).mean()


@devices
def test_the_second_forward_is_the_first_and_leaves_nothing(device):
    model = Loss().to(device)
    once, x = copy.deepcopy(model), torch.randn(5, 6, device=device)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=1e-30)  # so that w + e is w
    for p in model.parameters():
        p.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(3):
        seen = []
        torch.manual_seed(7)
        once(x)
        after = torch.rand(3, device=device), torch.rand(3)
        torch.manual_seed(7)
        sam.step(closure_of(sam, lambda x: model(x), x))
        assert same((torch.rand(3, device=device), torch.rand(3)), after)
        assert same(*model.seen[-2:])
        assert same(seen[: len(seen) // 2], seen[len(seen) // 2 :])
        assert same(model.buffers(), once.buffers())
        once.load_state_dict(model.state_dict())
    assert model.queue.filled == 15 and model.net[1].num_batches_tracked == 3


def test_statistics_are_those_of_the_weights_themselves():
    model = Loss()
    once, x = copy.deepcopy(model), torch.randn(5, 6)
    torch.manual_seed(7)
    once(x)
    torch.manual_seed(7)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0)
    sam.step(closure_of(sam, lambda x: model(x), x))
    assert same(model.buffers(), once.buffers())


def test_replay_by_hand():
    model = Loss()
    queue = model.queue.features
    x, again = torch.randn(5, 6), replay(model)
    first = model(x)
    left = [b.clone() for b in model.buffers()]
    with pytest.raises(KeyError), again:
        assert model(x) == first
        raise KeyError
    assert same(model.buffers(), left) and model.queue.features is queue
    with pytest.raises(RuntimeError, match="is used up. Make one before"), again:
        pass


def test_buffers_that_are_expanded_or_sparse():
    """The first are never written, only replaced."""
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.ones(1, 1).expand(4, 4))
    model.register_buffer("few", torch.eye(4).to_sparse())
    again = replay(model)
    model.mask = model.mask * 2
    model.few.mul_(2)
    with again:
        assert model.mask.eq(1).all() and model.few.to_dense().sum() == 4
    assert model.mask.eq(2).all() and model.few.to_dense().sum() == 8


def test_a_closure_that_fails():
    model = Loss()
    start, sam = bits(model), SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def closure():
        if len(model.seen) == 1:
            raise KeyError
        model(torch.randn(5, 6)).backward()

    with pytest.raises(KeyError):
        sam.step(closure)
    assert same(model.parameters(), start) and model.queue.filled == 5


def test_within_autocast():
    """Autocast keeps its bfloat16 copies of weights: the second forward must not take them."""
    model, x = two_layers(), torch.randn(5, 6)
    sam, losses = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=5.0), []

    def closure():
        losses.append(model(x).float().square().mean())
        losses[-1].backward()

    with torch.autocast("cpu", torch.bfloat16):
        sam.step(closure)
        losses.append(model(x).float().square().mean())
    assert losses[1] > 1.5 * losses[0] and losses[2] == losses[0]


# ---------------------------------------------------------------------------- what stands around it


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_with_and_without(name):
    model, x = two_layers(), torch.randn(5, 6)
    sam = SAM(OPTIMIZERS[name](model.parameters()))
    sam.step(closure_of(sam, model, x))
    other = copy.deepcopy(model)
    plain = OPTIMIZERS[name](other.parameters())
    plain.load_state_dict(copy.deepcopy(sam.state_dict()))  # torch's takes the tensors
    resumed = SAM(OPTIMIZERS[name](other.parameters()))
    resumed.load_state_dict(plain.state_dict())
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    for s, m in ((sam, model), (resumed, other)):
        s.step(closure_of(s, m, x))
    assert same(model.parameters(), other.parameters())


class Pair(nn.Module):
    """Model and SAM as one object, to be copied together."""

    def __init__(self, name):
        super().__init__()
        self.model = two_layers()
        self.sam = SAM(OPTIMIZERS[name](self.model.parameters()), self.model, rho=0.3)

    def step(self, x):
        self.sam.step(closure_of(self.sam, self.model, x))
        return list(self.model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(name, copied):
    """Of SAM and model; what was made before goes on, and so does what is made after."""
    pair, x = Pair(name), torch.randn(5, 6)
    pair.step(x)
    other = copied(pair)
    assert other.sam.modules == (other.model,) and other.model is not pair.model
    torch.optim.lr_scheduler.StepLR(other.sam, 1)
    assert same(pair.step(x), other.step(x))
    Pair(name).step(x)


def test_hooks():
    model, x, seen = two_layers(), torch.randn(5, 6), []
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    sam.register_step_pre_hook(lambda *_: seen.append("pre"))
    sam.register_step_post_hook(lambda *_: seen.append("post"))
    sam.step(closure_of(sam, model, x))
    for kind in ("state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            getattr(sam, f"register_{kind}_{when}_hook")(lambda *_, k=kind: seen.append(k))
    sam.load_state_dict(sam.state_dict())
    assert seen == ["pre", "post", *["state_dict"] * 2, *["load_state_dict"] * 2]


def test_schedules_move_the_optimizer():
    model, x = two_layers(), torch.randn(5, 6)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of schedules before the first step
        model(x).sum().backward()
        sam.first_step()
        sam.second_step()
        schedule.step()
        sam.step(closure_of(sam, model, x))
        schedule.step()
    assert sam.base_optimizer.param_groups[0]["lr"] == 0.25
    sam.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 3.0})
    assert len(sam.base_optimizer.param_groups) == 2 and "lr: 3.0" in repr(sam)


def test_grad_scaler():
    """Scaled losses perturb alike; a step that is skipped leaves the weights as they were, and a
    schedule on the SAM does not take it for a missing one."""
    model, x = two_layers(), torch.randn(5, 6)
    other = copy.deepcopy(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(x):
        for phase in (1, 2):
            scaler.scale(model(x).square().mean()).backward()
            if phase == 1:
                sam.first_step(zero_grad=True)
        sam.restore()
        scaler.step(sam.base_optimizer)
        scaler.update()
        sam.zero_grad()

    scaled_step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    plain = SAM(torch.optim.SGD(other.parameters(), lr=0.1))
    plain.step(closure_of(plain, other, x))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    start = bits(model)
    scaled_step(x * torch.inf)
    assert same(model.parameters(), start) and scaler.get_scale() == 512.0


def test_messages():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SAM(optimizer)
    for make, error, message in (
        (lambda: SAM(model.parameters()), TypeError, r"got generator. Write SAM\(AdamW"),
        (lambda: SAM(optimizer, rho=-1), ValueError, "SAM: rho must be at least 0, got -1"),
        (lambda: SAM(optimizer, eta=-1), ValueError, "SAM: eta must be at least 0, got -1"),
        (lambda: SAM(optimizer, rho=torch.tensor(-1.0)), ValueError, "at least 0, got -1"),
        (lambda: SAM(optimizer, rho="a"), TypeError, "SAM: rho must be a number .* got 'a'"),
        (lambda: SAM(optimizer, rho=torch.ones(2)), TypeError, r"\(\), got tensor\(\[1., 1."),
        (lambda: SAM(optimizer, 0.05), TypeError, "modules must be .* got 0.05. rho goes by key"),
        (lambda: SAM(optimizer, model, rank_local=True), ValueError, "DistributedDataParallel"),
        (lambda: sam.step(), TypeError, "needs a closure .* first_step"),
        (lambda: sam.second_step(), RuntimeError, "not perturbed. Call first_step"),
        (lambda: [sam.first_step() for _ in "12"], RuntimeError, "are perturbed. Call second"),
    ):
        with pytest.raises(error, match=message):
            make()
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\) is sparse .* Use sparse=False"):
        SAM(torch.optim.SGD(embedding.parameters(), lr=0.1)).first_step()


# --------------------------------------------------------------------------------------- many ranks


def on_ranks(group, rank_local):
    """Weights after two steps, the first batch's rows shared among the ranks."""
    W, r = group.size(), group.rank()
    model, x = two_layers(), torch.randn(2, 8, 6)
    if W > 1:
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, rank_local=rank_local)
    for rows in x:
        sam.step(closure_of(sam, model, rows.chunk(W)[r]))
    return bits(model)


def by_hand():
    """As `on_ranks` of 2, rank-local: the mean of gradients at each half's own worst weights."""
    torch.manual_seed(0)
    model, x = two_layers(), torch.randn(2, 8, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in x:
        means = [torch.zeros_like(p) for p in model.parameters()]
        for half in rows.chunk(2):
            sam = SAM(optimizer, rho=0.5)
            closure_of(sam, model, half)()
            sam.first_step()
            closure_of(sam, model, half)()
            sam.restore()
            torch._foreach_add_(means, [p.grad / 2 for p in model.parameters()])
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    return bits(model)


def test_two_ranks_are_one_process(ranks):
    (alone,) = ranks.run(on_ranks, 1, False)
    first, second = ranks.run(on_ranks, 2, False)
    assert same(first, second)
    for p, q in zip(first, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_ranks_that_perturb_by_themselves(ranks):
    first, second = ranks.run(on_ranks, 2, True)
    assert same(first, second)
    for p, q in zip(first, by_hand(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def on_shards(group, adaptive):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model, x = two_layers(), torch.randn(2, 5, 6)
    plain = copy.deepcopy(model)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), ignored_params={model[2].bias})
    for m in (model, plain):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.5, adaptive=adaptive)
        for rows in x:
            sam.step(closure_of(sam, m, rows))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(whole, q, rtol=1e-5, atol=1e-6)
    return True


@pytest.mark.parametrize("adaptive", [False, True])
def test_shards(ranks, adaptive):
    assert ranks.run(on_shards, 2, adaptive) == [True, True]
