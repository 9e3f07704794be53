"""`info_nce` and its options against the loss written out with all logits in memory."""

import math

import pytest
import torch
from oracle import assert_no_worse
from torch.nn.functional import cross_entropy
from torch.nn.functional import normalize as unit
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.ops import contrastive_lse, info_nce

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def direction(x, y, scale, target, x_ids, y_ids, bias, margin, decoupled, extra, soft, smoothing,
              itself):  # fmt: skip
    """Losses (N,) and log-sum-exp (N,) of rows x against keys y."""
    products = x @ y.T
    logits = scale * products + bias
    out = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.arange(len(x))
    if x_ids is not None:
        out |= x_ids[:, None] == y_ids[None]
    if margin is not None:
        out |= products > products[rows, target][:, None] + margin
    if target is not None:
        out[rows, target] = decoupled
    if itself:
        out |= torch.eye(len(x), dtype=torch.bool)
    counted = logits.masked_fill(out, -torch.inf)
    if extra is not None:
        counted = torch.cat([counted, scale * (extra @ x[:, :, None])[:, :, 0]], 1)
    lse = counted.logsumexp(1)
    if soft is not None:
        return (soft * (lse[:, None] - logits)).sum(1), lse
    expected = logits[rows, target]
    if smoothing:
        mean = logits.masked_fill(out, 0).sum(1) / (~out).sum(1)
        expected = (1 - smoothing) * expected + smoothing * mean
    return torch.where(lse.isneginf(), 0, lse - expected), lse


def written_out(
    q, k=None, *, logit_scale, target=None, symmetric=False, q_ids=None, k_ids=None, bias=None,
    margin=None, decoupled=False, hard_negatives=None, soft_target=None, label_smoothing=0.0,
    sample_weight=None, row_weight=0.5, normalize=False, store_logits=False,
):  # fmt: skip
    """Losses (N,), or (G, N), and log-sum-exp."""
    if q.dim() == 3:
        vectors = {"target": target, "q_ids": q_ids, "k_ids": k_ids, "bias": bias,
                   "hard_negatives": hard_negatives, "soft_target": soft_target,
                   "sample_weight": sample_weight}  # fmt: skip
        rest = {"logit_scale": logit_scale, "symmetric": symmetric, "margin": margin,
                "decoupled": decoupled, "label_smoothing": label_smoothing,
                "row_weight": row_weight, "normalize": normalize}  # fmt: skip
        each = [
            written_out(
                q[g], None if k is None else k[g], **rest,
                **{name: None if x is None else x[g] for name, x in vectors.items()},
            )
            for g in range(len(q))
        ]  # fmt: skip
        return torch.stack([x for x, _ in each]), torch.stack([x for _, x in each], -2)
    if normalize:
        q, k = unit(q, dim=1), k if k is None else unit(k, dim=1)
        hard_negatives = None if hard_negatives is None else unit(hard_negatives, dim=2)
    keys, key_ids = (q, q_ids) if k is None else (k, q_ids if k_ids is None else k_ids)
    if target is None and soft_target is None:
        target = torch.arange(len(q))
    bias = torch.zeros(len(keys)) if bias is None else bias
    losses, lse = direction(
        q, keys, logit_scale, target, q_ids, key_ids, bias[None], margin, decoupled,
        hard_negatives, soft_target, label_smoothing, k is None,
    )  # fmt: skip
    if symmetric:
        by_column, column_lse = direction(
            keys, q, logit_scale, target, key_ids, q_ids, bias[:, None], margin, decoupled,
            None, None, label_smoothing, False,
        )  # fmt: skip
        losses = row_weight * losses + (1 - row_weight) * by_column
        lse = torch.stack([lse, column_lse])
    return losses if sample_weight is None else losses * sample_weight, lse


N, M, D = 6, 9, 4
PARTNER = torch.tensor([3, 4, 5, 0, 1, 2])
IDS = torch.tensor([0, 1, 0, 2, 2, 0])  # some rows share an id
PAIRED = torch.tensor([0, 1, 2, 0, 1, 2])  # a row shares its id with its partner only
KEY_IDS = torch.tensor([0, 3, 1, 2, 0, 4, 2, 1, 5])


def bias():
    return {"bias": torch.linspace(-1, 1, M).double().requires_grad_()}


def square_bias():
    return {"bias": torch.linspace(-1, 1, N).double().requires_grad_()}


def extra():
    return {"hard_negatives": torch.randn(N, 2, D).double().requires_grad_()}


def soft():
    return {"soft_target": torch.rand(N, M).double().softmax(1)}


def weight():
    return {"sample_weight": torch.linspace(0, 2, N).double()}


SELF, BOTH = {"k": None, "target": PARTNER}, {"symmetric": True}
CASES = {
    "plain": lambda: {},
    "target": lambda: {"target": torch.tensor([8, 1, 1, 0, 7, 3])},
    "bias": lambda: bias(),
    "ids": lambda: {"q_ids": IDS, "k_ids": KEY_IDS, "target": torch.tensor([0, 2, 1, 8, 3, 4])},
    "normalize": lambda: {"normalize": True},
    "weight": lambda: weight(),
    "store": lambda: {"store_logits": True, **bias()},
    "margin": lambda: {"margin": 0.3},
    "negative margin": lambda: {"margin": -0.4},
    "margin, ids, bias": lambda: {"margin": 0.1, "q_ids": IDS, "k_ids": KEY_IDS, **bias()},
    "decoupled": lambda: {"decoupled": True},
    "decoupled, target, bias": lambda: {"decoupled": True, "target": PARTNER, **bias()},
    "hard negatives": lambda: {**extra()},
    "hard negatives, ids, normalize": lambda: {
        "q_ids": IDS, "k_ids": KEY_IDS, "normalize": True, **extra()},
    "hard negatives, margin, decoupled": lambda: {"margin": 0.5, "decoupled": True, **extra()},
    "soft target": lambda: soft(),
    "soft target, bias, ids": lambda: {"q_ids": IDS, "k_ids": KEY_IDS, **soft(), **bias()},
    "smoothing": lambda: {"label_smoothing": 0.2},
    "smoothing, bias, weight": lambda: {"label_smoothing": 0.2, **bias(), **weight()},
    "itself": lambda: SELF,
    "itself, ids": lambda: {**SELF, "q_ids": IDS},
    "itself, decoupled": lambda: {**SELF, "q_ids": PAIRED, "decoupled": True},
    "itself, smoothing": lambda: {**SELF, "label_smoothing": 0.3, **weight()},
    "itself, hard negatives": lambda: {**SELF, **extra()},
    "symmetric": lambda: BOTH,
    "symmetric, ids, bias": lambda: {**BOTH, "q_ids": IDS, **square_bias()},
    "symmetric, two ids": lambda: {**BOTH, "q_ids": IDS, "k_ids": KEY_IDS[:N]},
    "symmetric, store": lambda: {**BOTH, "q_ids": IDS, "store_logits": True, **square_bias()},
    "symmetric, weight": lambda: {**BOTH, **weight()},
    "symmetric, row weight": lambda: {**BOTH, "row_weight": 0.3, "q_ids": IDS},
    "symmetric, rows alone": lambda: {**BOTH, "row_weight": 1.0},
    "symmetric, margin": lambda: {**BOTH, "margin": 0.2, "row_weight": 0.3, **weight()},
    "symmetric, margin, two ids": lambda: {
        **BOTH, "margin": 0.2, "q_ids": IDS, "k_ids": KEY_IDS[:N]},
    "symmetric, decoupled": lambda: {**BOTH, "decoupled": True, **square_bias()},
    "symmetric, decoupled, margin": lambda: {**BOTH, "decoupled": True, "margin": 0.2},
    "symmetric, hard negatives": lambda: {**BOTH, **extra()},
    "symmetric, smoothing": lambda: {**BOTH, "label_smoothing": 0.1, **square_bias()},
}  # fmt: skip


def inputs(case, groups=0):
    """q, k (or None) and options in fp64; with groups, as many problems that differ."""
    options = dict(CASES[case]())
    keys = N if options.get("symmetric") else M
    shape = (groups,) if groups else ()
    q = torch.randn(*shape, N, D).double().requires_grad_()
    k = torch.randn(*shape, keys, D).double().requires_grad_()
    k = options.pop("k", k)
    if groups:
        for name, x in options.items():
            if isinstance(x, torch.Tensor):
                stacked = x.detach().expand(groups, *x.shape).clone()
                if x.is_floating_point():
                    stacked *= 1 + 0.1 * torch.arange(groups).view(-1, *[1] * x.dim())
                options[name] = stacked.requires_grad_(x.requires_grad)
    return q, k, options


def leaves(q, k, options):
    return [x for x in (q, k, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, groups):
    q, k, options = inputs(case, groups)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    xs = [*leaves(q, k, options), scale]
    upstream = torch.linspace(0.5, 2, q.shape[:-1].numel()).view(q.shape[:-1])
    expected, expected_lse = written_out(q, k, logit_scale=scale, **options)
    got = info_nce(q, k, logit_scale=scale, reduction="none", **options)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad((got * upstream).sum(), xs)
    true = torch.autograd.grad((expected * upstream).sum(), xs, retain_graph=True)
    for x, y in zip(grads, true, strict=True):
        torch.testing.assert_close(x, y)
    for reduction in ("sum", "mean"):
        got = info_nce(q, k, logit_scale=scale, reduction=reduction, **options)
        torch.testing.assert_close(got, getattr(expected, reduction)())
        true = torch.autograd.grad(getattr(expected, reduction)(), xs, retain_graph=True)
        for x, y in zip(torch.autograd.grad(got, xs), true, strict=True):
            torch.testing.assert_close(x, y)
    if "symmetric, margin" in case or "decoupled, margin" in case:
        return
    loss, lse = info_nce(q, k, logit_scale=scale, return_lse=True, **options)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(lse, expected_lse)
    true = torch.autograd.grad(expected_lse.sin().sum(), xs)
    for x, y in zip(torch.autograd.grad(lse.sin().sum(), xs), true, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    q, k, options = inputs(case)
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    xs = [*leaves(q, k, options), temperature]

    def loss(*_):
        return info_nce(q, k, temperature=temperature, **options)

    torch.autograd.gradcheck(loss, xs)


def narrow(x, device):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().to(device, torch.float32).requires_grad_(x.requires_grad)
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_formula(case, groups, device):
    q, k, options = inputs(case, groups)
    expected, _ = written_out(q, k, logit_scale=2.5, **options)
    true = torch.autograd.grad(expected.mean(), leaves(q, k, options))
    q, k = narrow(q, device), narrow(k, device)
    options = {name: narrow(x, device) for name, x in options.items()}
    loss = info_nce(q, k, logit_scale=2.5, **options)
    torch.testing.assert_close(loss.double().cpu(), expected.mean(), rtol=1e-5, atol=1e-5)
    for x, y in zip(torch.autograd.grad(loss, leaves(q, k, options)), true, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "margin",
        "decoupled",
        "itself, ids",
        "symmetric, store",
        "soft target, bias, ids",
        "smoothing, bias, weight",
        "hard negatives, ids, normalize",
    ],
)
def test_compiles_without_a_graph_break(case):
    q, k, options = inputs(case)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    xs = [*leaves(q, k, options), scale]

    def loss(q, k, scale):
        return info_nce(q, k, logit_scale=scale, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, scale), xs)
    for x, y in zip(torch.autograd.grad(compiled(q, k, scale), xs), expected, strict=True):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------ gradients wanted


class Calls(TorchDispatchMode):
    """Names and arguments of the library's ops while it is on."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastssl":
            self.made.append((op.name().removeprefix("fastssl::"), args))
        return op(*args, **(kwargs or {}))


def needs(args):
    """need_dq, need_dk, need_dbias of a call of contrastive_bwd."""
    return args[-4:-1]


@pytest.mark.parametrize(
    "q_learns, k_learns, scale_learns, expected",
    [
        (True, False, False, (True, False, False)),
        (False, True, False, (False, True, False)),
        (True, False, True, (True, False, False)),
        (False, True, True, (False, True, False)),
        (False, False, True, (True, False, False)),
        (True, True, True, (True, True, False)),
    ],
)
def test_a_locked_side_costs_no_gradient(q_learns, k_learns, scale_learns, expected):
    q = torch.randn(6, 8, requires_grad=q_learns)
    k = torch.randn(6, 8, requires_grad=k_learns)
    scale = torch.tensor(2.0, requires_grad=scale_learns)
    with Calls() as calls:
        info_nce(q, k, logit_scale=scale, symmetric=True).backward()
    assert [name for name, _ in calls.made] == ["contrastive_fwd", "contrastive_bwd"]
    assert needs(calls.made[1][1]) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "target", "ids", "bias"])
def test_frozen_keys_give_what_learning_ones_give(case, dtype, device):
    q, k, options = inputs(case)
    q, k = (x.detach().to(device, dtype).requires_grad_() for x in (q, k))
    options = {name: narrow(x.detach(), device) for name, x in options.items()}
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    with Calls() as calls:
        loss = info_nce(q, k, logit_scale=scale, **options)
        expected = torch.autograd.grad(loss, (q, scale))
    assert [name for name, _ in calls.made] == ["contrastive_fwd", "contrastive_bwd"]
    with Calls() as calls:
        frozen = info_nce(q, k.detach(), logit_scale=scale, **options)
        got = torch.autograd.grad(frozen, (q, scale))
    assert [name for name, _ in calls.made] == ["queue_fwd"], "one pass over the keys"
    torch.testing.assert_close(frozen, loss, rtol=1e-5, atol=1e-5)
    for x, y in zip(got, expected, strict=True):
        # One rounds softmax weights to dtype, the other the loss's derivative by the logits.
        error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=0, atol=error * y.abs().max().item())


def test_without_gradients_one_forward_runs():
    q, k = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    with Calls() as calls, torch.no_grad():
        loss = info_nce(q, k, temperature=0.5)
    assert [name for name, _ in calls.made] == ["contrastive_fwd"] and not loss.requires_grad


def test_frozen_keys_and_a_loss_scale_of_fp16():
    # Easy rows of a large batch: their gradients are fp16 subnormals until they are scaled.
    q = unit(torch.randn(2000, 64)).half().requires_grad_()
    keys = torch.cat([q.detach(), unit(torch.randn(100, 64)).half()])
    ids = torch.zeros(2000, dtype=torch.long), torch.tensor([0]).repeat(2100)
    ids[1][2000:] = 1
    (65536 * info_nce(q, keys, temperature=0.1, q_ids=ids[0], k_ids=ids[1])).backward()
    wide, keys = q.detach().double().requires_grad_(), keys.double()
    written_out(wide, keys, logit_scale=10.0, q_ids=ids[0], k_ids=ids[1])[0].mean().backward()
    assert wide.grad.abs().median() < 2**-14, "the gradients are no subnormals"
    torch.testing.assert_close(q.grad.double() / 65536, wide.grad, rtol=2e-3, atol=1e-10)


# --------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("extra", ["nothing", "weight", "symmetric"])
def test_a_row_without_negatives_has_neither_loss_nor_gradient(extra, frozen):
    q = torch.randn(3, 8, requires_grad=True)
    k = torch.randn(3, 8, requires_grad=not frozen)
    ids = torch.tensor([1, 1, 1])
    options = {
        "nothing": {},
        "weight": {"sample_weight": torch.ones(3)},
        "symmetric": {"symmetric": True},
    }[extra]
    losses = info_nce(q, k, temperature=0.1, q_ids=ids, reduction="none", **options)
    assert (losses == 0).all()
    losses.sum().backward()
    assert (q.grad == 0).all() and (frozen or (k.grad == 0).all())


def test_even_soft_targets_of_equal_logits():
    q, k = torch.ones(3, 4), torch.ones(7, 4)
    loss = info_nce(q, k, temperature=0.3, soft_target=torch.full((3, 7), 1 / 7))
    assert float(loss) == pytest.approx(math.log(7))


def test_a_soft_target_without_keys_that_count():
    q = torch.randn(2, 8, requires_grad=True)
    ids, key_ids, soft = torch.tensor([1, 2]), torch.tensor([1, 1]), torch.full((2, 2), 0.5)
    losses = info_nce(q, torch.randn(2, 8), temperature=1, q_ids=ids, k_ids=key_ids,
                      soft_target=soft, reduction="none")  # fmt: skip
    assert losses[0] == 0 and losses[1] != 0
    losses.sum().backward()
    assert (q.grad[0] == 0).all() and (q.grad[1] != 0).any()


@pytest.mark.parametrize("options", [
    {}, {"symmetric": True}, {"label_smoothing": 0.1}, {"decoupled": True}, {"margin": 0.1},
    {"symmetric": True, "store_logits": True}, {"soft_target": torch.ones(1, 1)},
])  # fmt: skip
def test_one_row_and_one_key(options):
    q, k = (torch.randn(1, 8, requires_grad=True) for _ in range(2))
    loss = info_nce(q, k, temperature=0.1, **options)
    loss.backward()
    assert loss.abs() < 1e-5
    assert q.grad.abs().max() < 1e-5 and k.grad.abs().max() < 1e-5


def test_two_rows_against_each_other():
    z = torch.randn(2, 8, requires_grad=True)
    loss = info_nce(z, target=torch.tensor([1, 0]), temperature=0.5)
    loss.backward()
    assert loss == 0 and z.grad.abs().max() < 1e-5


def test_copies_of_the_positive_pass_a_margin_of_zero():
    q, positive = unit(torch.randn(40, 96)), unit(torch.randn(1, 96))
    k = positive.repeat(40, 1)
    loss = info_nce(q, k, temperature=0.01, margin=0.0)
    torch.testing.assert_close(loss, torch.tensor(40.0).log(), rtol=1e-4, atol=0)


def test_a_large_gap_is_not_rounded_away():
    # Of a positive that leads by 20 nats the loss is 2e-9.
    q, k = torch.tensor([[1.0, 0]]), torch.tensor([[20.0, 0], [0, 1]])
    ids = torch.tensor([0]), torch.tensor([0, 1])
    loss = info_nce(q, k, temperature=1.0, q_ids=ids[0], k_ids=ids[1])
    torch.testing.assert_close(loss, torch.tensor(math.exp(-20)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "case", ["hard negatives", "soft target, bias, ids", "smoothing, bias, weight"]
)
def test_autocast_rounds_features_only(case):
    q, k, options = inputs(case)
    q, k = q.detach().bfloat16().float(), k.detach().bfloat16().float()
    options = {name: narrow(x, "cpu") for name, x in options.items()}
    expected = info_nce(q.bfloat16(), k.bfloat16(), logit_scale=50.0, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(q, k, logit_scale=50.0, **options)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_one_tensor_in_both_roles_add_up():
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    twice = z.detach().clone().requires_grad_()
    got = torch.autograd.grad(info_nce(z, z, temperature=0.5, q_ids=IDS, symmetric=True), z)[0]
    loss = info_nce(z, twice, temperature=0.5, q_ids=IDS, symmetric=True)
    torch.testing.assert_close(got, sum(torch.autograd.grad(loss, (z, twice))))


good = torch.randn(4, 8)


def call(**options):
    return lambda: info_nce(good, options.pop("k", good), **{"temperature": 1.0} | options)


@pytest.mark.parametrize(
    "make, message",
    [
        (call(temperature=1e-45), "temperature must be positive and finite, got 1e-45"),
        (call(temperature=math.inf), "temperature must be positive and finite, got inf"),
        (call(temperature=None, logit_scale=1e39), "logit_scale must be positive and finite"),
        (call(logit_scale=1.0), "exactly one of temperature and logit_scale"),
        (call(target=torch.tensor([0, 1, -1, 3])), r"target must lie in \[0, 4\), got -1"),
        (call(target=torch.arange(4) + 2**32), r"target must lie in \[0, 4\), got 2147483647"),
        (call(symmetric=True, target=torch.arange(4)), "takes no target"),
        (call(symmetric=True, k=torch.randn(5, 8)), "k must have 4 rows, got 5"),
        (call(k=None), "needs a target and symmetric=False"),
        (call(k=None, target=torch.arange(4), symmetric=True), "symmetric=False"),
        (call(k=None, target=torch.arange(4), margin=0.1), "margin needs k"),
        (call(k=None, target=torch.arange(4), store_logits=True), "store_logits needs k"),
        (call(k=None, target=torch.arange(4), decoupled=True), "with k=None, q_ids"),
        (call(soft_target=torch.ones(4, 3)), r"must have shape \(4, 4\), got \(4, 3\)"),
        (call(soft_target=torch.ones(4, 4), symmetric=True), "soft_target needs k and excludes"),
        (call(soft_target=torch.ones(4, 4), margin=0.1), "soft_target needs k and excludes"),
        (call(soft_target=torch.ones(4, 4), decoupled=True), "soft_target needs k and excludes"),
        (call(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\)"),
        (call(row_weight=1.5), r"row_weight in \[0, 1\], got 0.0 and 1.5"),
        (call(label_smoothing=0.1, q_ids=torch.arange(4)), "it excludes ids"),
        (call(label_smoothing=0.1, margin=0.1), "it excludes ids, margin"),
        (call(hard_negatives=torch.ones(4, 8)), r"hard_negatives must be \(4, 'H', 8\)"),
        (call(hard_negatives=torch.ones(4, 2, 7)), r"got \(4, 2, 7\)"),
        (call(sample_weight=torch.ones(3)), r"sample_weight must be a tensor of shape \(4,\)"),
        (call(symmetric=True, margin=0.1, return_lse=True), "margin with symmetric=True excludes"),
        (call(q_ids=torch.arange(4), k=torch.randn(5, 8)), "go together, got only one"),
        (call(k=good[None]), r"k must have q's groups \(\), got \(1, 4, 8\)"),
    ],
)
def test_error_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["live", "frozen", "symmetric", "ids", "soft_target"])
def test_a_bias_of_minus_infinity_leaves_keys_out(option, device):
    q, k = (torch.randn(5, 8, device=device, requires_grad=True) for _ in range(2))
    keys = k.detach() if option == "frozen" else k
    options = {
        "symmetric": {"symmetric": True},
        "ids": {"q_ids": torch.tensor([0, 0, 1, 2, 3]), "sample_weight": torch.ones(5)},
        "soft_target": {"soft_target": torch.eye(5, device=device)},
    }.get(option, {})
    bias = torch.full((5,), -torch.inf, device=device)
    loss = info_nce(q, keys, temperature=1.0, bias=bias, **options)
    grads = torch.autograd.grad(loss, (q, k), materialize_grads=True, allow_unused=True)
    assert loss == 0 and not any(x.any() for x in grads)
    if option != "soft_target":
        return
    bias[:4], target = 0, torch.zeros(5, 5, device=device)
    target[:, 0] = 1
    got = info_nce(q, k, temperature=1.0, bias=bias, soft_target=target)
    torch.testing.assert_close(got, -(q @ k[:4].T).log_softmax(1)[:, 0].mean())


def test_a_margin_never_leaves_the_positive_out():
    q = 10 * torch.randn(64, 256)
    k = torch.randn(64, 256)
    k = 10 * (k - (k * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True) * q)
    logits = (q @ k.T).double() / 25600
    out = (logits > logits.diag()[:, None]) & ~torch.eye(64, dtype=torch.bool)
    expected = cross_entropy(logits.masked_fill(out, -torch.inf), torch.arange(64))
    got = info_nce(q, k, temperature=25600.0, margin=0.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_frozen_keys_compile_without_a_graph_break():
    q, k = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    call = torch.compile(
        lambda q: info_nce(q, k, temperature=0.5), fullgraph=True, backend="aot_eager"
    )
    expected = info_nce(q, k, temperature=0.5)
    torch.testing.assert_close(call(q), expected)
    got, expected = (torch.autograd.grad(x, q)[0] for x in (call(q), expected))
    torch.testing.assert_close(got, expected)


def test_smoothing_one_row_against_itself():
    z = torch.randn(1, 8, requires_grad=True)
    loss = info_nce(z, target=torch.tensor([0]), temperature=1.0, label_smoothing=0.1)
    loss.backward()
    assert loss == 0 and not z.grad.any()


def test_ids_of_both_sides_may_be_one_tensor_only_where_the_sizes_agree():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match=r"k_ids must have shape \(5,\)"):
        info_nce(torch.randn(3, 4), torch.randn(5, 4), temperature=1.0, q_ids=ids, k_ids=ids)


def test_huge_upstream_gradients_stay_finite():
    q, k = torch.diag(torch.tensor([200.0, 0.0])), torch.eye(2)
    q.requires_grad_()
    row, col, _ = contrastive_lse(q, k, cols=True)
    (1e13 * (row.sum() + col.sum())).backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["soft", "smooth"])
def test_oracle_near_convergence_of_spread_targets(target, dtype):
    """Targets spread over equal keys: what the sum pushes and what the targets pull cancels."""
    x = unit(torch.randn(5, 24, dtype=torch.float64)).repeat_interleave(6, 0)
    q, k = (unit(x + 0.01 * torch.randn_like(x)).to(dtype) for _ in range(2))
    if target == "soft":
        t = torch.block_diag(*[torch.full((6, 6), 1 / 6, dtype=torch.float64)] * 5)
        options, scale = {"soft_target": t}, 40.0
    else:  # of equal keys each is as likely as the others, so almost all of the target is spread
        q, k = torch.ones_like(q[:30]), torch.ones_like(k[:30]) + 0.01 * k
        t = 0.99 / 30 + 0.01 * torch.eye(30, dtype=torch.float64)
        options, scale = {"label_smoothing": 0.99}, 0.02

    def run(loss_of, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k)]
        return torch.autograd.grad(loss_of(*leaves), leaves)

    def ours(q, k):
        return info_nce(q, k, logit_scale=scale, **options)

    def peer(q, k):
        return -(t.to(q.dtype) * (scale * q @ k.T).log_softmax(1)).sum(1).mean()

    # In any dtype a coefficient carries the float32 rounding of its row's log-sum-exp.
    rounding = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for xs in zip(run(ours, dtype), run(peer, torch.float64), run(peer, dtype), strict=True):
        assert_no_worse(*xs, 3, magnitude=rounding * scale * scale / 30)
