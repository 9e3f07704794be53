"""The contrastive op against its fp64 reference, on the CPU and, where there is one, the GPU."""

import itertools
import math

import pytest
import torch
from oracle import assert_no_worse, problem
from torch.nn.functional import cross_entropy, normalize

import fastssl
from fastssl.ops import contrastive_lse, info_nce
from fastssl.ops.contrastive import contrastive_bwd_ref, contrastive_fwd_ref, logits_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
fwd, bwd = torch.ops.fastssl.contrastive_fwd, torch.ops.fastssl.contrastive_bwd


def check(p, rows=True, cols=True, symmetric=False, groups=1, store=False, alike=None, wide=False):
    """Forward and backward of the raw op against fp64, no worse than plain torch in p's dtype.

    alike: sums of logits over "all" pairs, or over those of equal "labels", enter as well.
    """
    dtype, device = p["q"].dtype, p["q"].device
    cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in p.items()}
    features = [n for n in ("q", "k", "scale", "bias") if cpu[n] is not None]
    p64 = cpu | {n: cpu[n].double() for n in features}
    flags = rows, cols, symmetric, groups, store
    got = fwd(*p.values(), *flags)
    true = contrastive_fwd_ref(*p64.values(), *flags)

    leaves = {n: cpu[n].to(dtype, copy=True).requires_grad_() for n in features}
    if symmetric:
        leaves["k"] = leaves["q"]
    q, k = (leaves[n].unflatten(0, (groups, -1)) for n in ("q", "k"))
    logits = leaves["scale"] * (q @ k.mT)
    if "bias" in leaves:
        logits = logits + leaves["bias"].view(groups, 1, -1)
    pos = logits.gather(2, cpu["target"].long().view(groups, -1, 1)).flatten()
    _, out = logits_ref(*list(p64.values())[:-1], symmetric, groups)
    if out is not None:  # from fp64: a product rounded in dtype may lie on the limit's other side
        logits = logits.masked_fill(out, -torch.inf)
    empty = logits.new_empty(0)
    labels = None, None
    row_sum = col_sum = empty
    if alike:
        counts = torch.ones(logits.shape, dtype=torch.bool)
        if alike == "labels":
            labels = [torch.randint(0, 4, (len(p[n]),), dtype=torch.int32) for n in ("q", "k")]
            labels = labels[:1] * 2 if symmetric else labels
            counts = labels[0].view(groups, -1, 1) == labels[1].view(groups, 1, -1)
        if symmetric:
            counts = counts & ~torch.eye(counts.shape[2], dtype=torch.bool)
        sums = (leaves["scale"] * (q @ k.mT)) * counts
        row_sum, col_sum = sums.sum(2).flatten(), empty if symmetric else sums.sum(1).flatten()
    row, col = (logits.logsumexp(2) if rows else empty, logits.logsumexp(1) if cols else empty)
    peer = row.flatten(), col.flatten(), pos, logits.flatten(0, 1) if store else empty.view(0, 0)
    # Every logit is a product of this magnitude at most; rounding it costs an eps of that.
    norm_q, norm_k = (p64[n].norm(dim=1).max().item() for n in ("q", "k"))
    largest = p64["scale"].item() * norm_q * norm_k
    for name, *xs in zip(("row_lse", "col_lse", "pos", "logits"), got, true, peer, strict=True):
        print(name)
        assert_no_worse(xs[0].cpu(), xs[1], xs[2].detach(), magnitude=largest)

    outputs = *peer[:3], row_sum, col_sum
    upstream = [torch.randn(x.shape, dtype=torch.float64) for x in outputs]
    for x, u in zip(true[:3], upstream, strict=False):
        u[~x.isfinite()] = 0
    needs = symmetric, groups, True, not symmetric, p["bias"] is not None, wide
    given = [u.float().to(device) for u in upstream]
    there = [x if x is None else x.to(device) for x in labels]
    got = bwd(*p.values(), *there, got[3], *got[:2], *given, *needs)
    true = contrastive_bwd_ref(*p64.values(), *labels, true[3], *true[:2], *upstream, *needs)
    assert got[0].dtype == got[1].dtype == (torch.float32 if wide else dtype)
    total = sum(
        (torch.where(x.isfinite(), x, 0.0) * u.to(dtype)).sum()
        for x, u in zip(outputs, upstream, strict=True)
    )
    names = ["q", *([] if symmetric else ["k"]), *features[2:]]
    grads = torch.autograd.grad(total, [leaves[n] for n in names])
    grads = dict(zip(names, grads, strict=True))
    # dq adds scale * upstream * k over columns; dscale adds upstream * <q, k> over all pairs.
    largest_u = max(u.abs().max().item() for u in upstream if u.numel())
    N, M = len(p64["q"]) // groups, len(p64["k"]) // groups
    terms = *upstream[:3], upstream[3] * M**0.5, upstream[4] * N**0.5
    magnitude = {
        "q": largest_u * p64["scale"].item() * norm_k,
        "k": largest_u * p64["scale"].item() * norm_q,
        "scale": torch.cat(terms).norm().item() * norm_q * norm_k,
        # Each coefficient carries the rounding of a logit, an eps of its size.
        "bias": largest_u * largest,
    }
    for name, *xs in zip(magnitude, got, true, strict=True):
        print("gradient of", name)
        if name in grads:
            assert_no_worse(xs[0].cpu(), xs[1], grads[name].nan_to_num(0.0), 3, magnitude[name])
        else:
            assert xs[0].numel() == 0, "a gradient that was not asked for"


SIZES = itertools.product([1, 2, 127, 1000], [1, 2, 127, 1000], [64, 96, 100, 128, 384])
LARGE = [(1, 4097, 64), (4097, 2, 96), (1000, 4097, 128), (4097, 127, 384), (4097, 4097, 100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [*SIZES, *LARGE])
@pytest.mark.parametrize("device", DEVICES)
def test_oracle_sizes(N, M, D, dtype, device):
    if dtype == torch.float16 and N * M >= 1_000_000:
        pytest.skip("plain torch multiplies fp16 on CPUs too slowly to compare with")
    variant = (N + M + D) % 4
    check(problem(N, M, D, dtype, ids=variant == 1, bias=variant >= 2, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (2, 3, 7), (7, 5, 33), (33, 17, 100), (257, 96, 65)])
@pytest.mark.parametrize("rows,cols", [(True, True), (True, False), (False, True)])
def test_oracle_every_product_path(N, M, D, dtype, rows, cols, cpu_path):
    check(problem(N, M, D, dtype, ids=N % 2 == 1, bias=M % 2 == 1), rows, cols)


OPTIONS = {
    "keep equal": {"ids": True, "keep_equal": True, "bias": True},
    "limit": {"limit": True},
    "limit, ids and bias": {"limit": True, "ids": True, "bias": True},
    "itself": {"itself": True},
    "itself and ids": {"itself": True, "ids": True},
    "itself, equal ids kept": {"itself": True, "ids": True, "keep_equal": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 3), (2, 3, 7), (33, 17, 100), (257, 500, 64)])
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_oracle_options(options, G, N, M, D, dtype, cpu_path):
    options = OPTIONS[options]
    itself = "itself" in options
    p = problem(N, N if itself else M, D, dtype, G=G, **options)
    check(p, cols="limit" not in options and not itself, symmetric=itself, groups=G)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alike", ["all", "labels"])
@pytest.mark.parametrize("N,M,D,G", [(1, 1, 3, 1), (33, 17, 100, 3), (257, 300, 64, 1)])
@pytest.mark.parametrize("options", ["plain", "store", "ids and limit", "itself"])
def test_oracle_sums_over_pairs(options, N, M, D, G, alike, dtype, cpu_path):
    itself, every = options == "itself", options == "ids and limit"
    p = problem(N, N if itself else M, D, dtype, G=G, itself=itself, ids=every, limit=every)
    check(
        p, cols=not (itself or every), symmetric=itself, groups=G, store=options == "store",
        alike=alike, wide=N == 33,
    )  # fmt: skip


@pytest.mark.parametrize("alike", ["all", "labels"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
def test_oracle_options_on_devices(options, device, alike):
    options = OPTIONS[options]
    itself = "itself" in options
    p = problem(600, 600 if itself else 333, 96, torch.float32, device=device, **options)
    check(p, cols="limit" not in options and not itself, symmetric=itself, alike=alike)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("G,N,M,D", [(3, 70, 41, 100), (40, 5, 6, 16), (40, 1, 1, 8)])
def test_groups_are_problems_of_their_own(G, N, M, D, dtype, device):
    p = problem(N, M, D, dtype, G=G, ids=True, bias=True, device=device)
    check(p, groups=G)
    rows, cols, pos, _ = fwd(*p.values(), True, True, False, G, False)
    for g in range(G):
        alone = {
            name: x.view(G, -1, *x.shape[1:])[g] if isinstance(x, torch.Tensor) and x.dim() else x
            for name, x in p.items()
        }
        alone = fwd(*alone.values(), True, True, False, 1, False)
        for x, y in zip((rows, cols, pos), alone, strict=False):
            torch.testing.assert_close(x.view(G, -1)[g], y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (33, 17, 100), (257, 96, 65), (300, 700, 128)])
def test_stored_logits_change_no_statistic(N, M, D, dtype, device):
    p = problem(N, M, D, dtype, ids=N % 2 == 1, bias=M % 2 == 0, device=device)
    check(p, store=True)
    plain = fwd(*p.values(), True, True, False, 1, False)
    stored = fwd(*p.values(), True, True, False, 1, True)
    for x, y in zip(plain[:3], stored[:3], strict=True):
        assert torch.equal(x, y)
    assert stored[3].shape == (N, M) and plain[3].numel() == 0


@pytest.mark.parametrize("store", [False, True])
def test_only_the_asked_gradients(store, cpu_path):
    p = problem(40, 30, 24, torch.float32, bias=True)
    *statistics, logits = fwd(*p.values(), True, True, False, 1, store)
    upstream = [x.sin() for x in statistics]

    def run(*needs):
        return bwd(
            *p.values(), None, None, logits, *statistics[:2], *upstream, *[logits.new_empty(0)] * 2,
            False, 1, *needs, False,
        )  # fmt: skip

    full = run(True, True, True)
    for needs in itertools.product([True, False], repeat=3):
        dq, dk, dscale, dbias = run(*needs)
        for x, y, need in zip((dq, dk, dbias), (full[0], full[1], full[3]), needs, strict=True):
            if need:
                torch.testing.assert_close(x, y)
            else:
                assert x.numel() == 0
        if needs[0] or needs[1]:
            torch.testing.assert_close(dscale, full[2])


@pytest.mark.parametrize("options", [{"ids": True}, *OPTIONS.values()])
def test_which_pairs_are_left_out(options):
    """Against the rules written out pair by pair."""
    itself = "itself" in options
    N, M = 9, 9 if itself else 7
    p = problem(N, M, 3, torch.float32, scale=1.3, **options)
    options = {name: p[name] for name in ("q_ids", "bias", "limit")}
    k, bias = p["k"], torch.zeros(M) if p["bias"] is None else p["bias"]
    if not itself:
        options["k_ids"] = p["k_ids"]
    row, _, _ = contrastive_lse(
        p["q"], None if itself else k, 1.3, keep_equal=p["keep_equal"], **options
    )
    for i in range(N):
        total = 0.0
        for j in range(M):
            product = float(p["q"][i] @ k[j])
            equal = p["q_ids"] is not None and bool(p["q_ids"][i] == p["k_ids"][j])
            if p["q_ids"] is not None and equal != p["keep_equal"]:
                continue
            if p["limit"] is not None and product > p["limit"][i]:
                continue
            if itself and i == j:
                continue
            total += math.exp(1.3 * product + bias[j])
        expected = math.log(total) if total else -math.inf
        assert row[i].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "stepped"])
def test_oracle_layouts(layout, device):
    p = problem(130, 67, 100, torch.float32, ids=True, device=device)
    if layout == "transposed":
        p["q"], p["k"] = p["q"].T.contiguous().T, p["k"].T.contiguous().T
    elif layout == "sliced":
        p["q"] = torch.cat([p["q"], p["q"]], 1)[:, 100:]
        p["k"] = torch.cat([p["k"], p["k"]], 0)[67:]
    else:
        p["k"] = p["k"].repeat_interleave(2, 0)[::2]
    check(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["scale 100", "orthogonal", "thousands", "tiny temperature"])
def test_oracle_extremes(case, dtype, cpu_path):
    scale = {"tiny temperature": 1e4, "thousands": 30.0}.get(case, 100.0)
    p = problem(300, 200, 96, dtype, scale=scale, unit=case != "thousands")
    if case == "orthogonal":
        # Rows whose best logit lies far under the tile's largest one: a fixed offset loses them.
        p["q"] = torch.eye(300, 96).to(dtype)
        p["k"] = -torch.eye(200, 96).roll(1, 1).to(dtype)
        p["k"][0] = p["q"][0]
    check(p)


def test_one_exponential_window_falls_back():
    # Row 0 peaks 400 nats over row 1: one shared offset would flush row 1 to zero.
    q = torch.tensor([[200.0, 0.0], [-200.0, 0.0]])
    k = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    row, col, _ = contrastive_lse(q, k, cols=True)
    torch.testing.assert_close(row, torch.tensor([200.0, -200.0]) + math.log(2))
    torch.testing.assert_close(col, torch.tensor([200.0, 200.0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R,D", [(2, 3), (40, 64), (254, 100), (1300, 96)])
def test_q_against_itself(R, D, dtype, device):
    z = normalize(torch.randn(R, D)).to(device, dtype)
    target = torch.arange(R).roll(R // 2)
    ids = torch.arange(R, dtype=torch.int32)
    upstream = torch.randn(2, R, dtype=torch.float64)

    def run(z, lse_of):
        z = z.clone().requires_grad_()
        scale = torch.tensor(5.0, dtype=z.dtype, device=z.device, requires_grad=True)
        lse, pos = lse_of(z, scale)
        up = upstream.to(lse.device, lse.dtype)
        dz, dscale = torch.autograd.grad((lse * up[0] + pos * up[1]).sum(), [z, scale])
        return [x.detach().cpu() for x in (lse, pos, dz, dscale)]

    def ours(z, scale):
        row, _, pos = contrastive_lse(z, None, scale, target=target)
        return row, pos

    def plain(z, scale):
        logits = scale.to(z.dtype) * (z @ z.T)
        pos = logits.gather(1, target[:, None])[:, 0]
        return logits.masked_fill(ids[:, None] == ids[None], -torch.inf).logsumexp(1), pos

    results = run(z, ours), run(z.cpu().double(), plain), run(z.cpu(), plain)
    terms = upstream.norm().item()
    for i, xs in enumerate(zip(*results, strict=True)):
        assert_no_worse(*xs, 2 if i < 2 else 3, magnitude=terms if i == 3 else 0.0)


@pytest.mark.parametrize("mode", ["plain", "symmetric", "self", "ids", "target"])
def test_gradcheck(mode):
    q, k = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1])

    def loss(q, k, scale, bias):
        if mode == "self":
            target = torch.tensor([1, 2, 3, 4, 0])
            return info_nce(q, logit_scale=scale, target=target, reduction="none")
        extra = {
            "plain": {"bias": bias},
            "symmetric": {"symmetric": True, "reduction": "none"},
            "ids": {"q_ids": ids, "symmetric": True, "bias": bias, "normalize": True},
            "target": {"target": torch.tensor([1, 1, 0, 4, 2]), "q_ids": ids},
        }[mode]
        return info_nce(q, k, logit_scale=scale, **extra)

    torch.autograd.gradcheck(loss, (q, k, scale, bias))


@pytest.mark.parametrize(
    "options", ["plain", "store", "ids", "keep equal", "limit", "itself", "itself, equal ids kept"]
)
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_gradcheck_of_the_sums(options, shape):
    q, k = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[:-1], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 1, 1])[: shape[-2]].expand(shape[:-1])
    target = ids.roll(1)
    extra = {
        "plain": {"bias": bias, "cols": True},
        "store": {"bias": bias, "cols": True, "store_logits": True, "q_ids": ids},
        "ids": {"q_ids": ids, "bias": bias, "rows": False, "cols": True},
        "keep equal": {"q_ids": ids, "k_ids": ids.flip(-1), "keep_equal": True, "cols": True},
        "limit": {"limit": torch.full(shape[:-1], 0.5), "bias": bias},
        "itself": {"q_ids": ids},
        "itself, equal ids kept": {"q_ids": ids, "keep_equal": True},
    }[options]

    def sums(q, k, scale, bias):
        keys = None if "itself" in options else k
        out = contrastive_lse(q, keys, scale, target=target, **extra)
        return [x for x in out if x.numel()]

    torch.autograd.gradcheck(sums, (q, k, scale, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_three_dimensions_are_groups(device):
    q, k = torch.randn(3, 9, 8, device=device), torch.randn(3, 7, 8, device=device)
    ids = torch.randint(0, 3, (3, 9)), torch.randint(0, 3, (3, 7))
    target, bias = torch.randint(0, 7, (3, 9)), torch.randn(3, 7)
    got = contrastive_lse(
        q, k, 2.0, q_ids=ids[0], k_ids=ids[1], bias=bias, target=target, cols=True
    )
    for g in range(3):
        alone = contrastive_lse(
            q[g], k[g], 2.0, q_ids=ids[0][g], k_ids=ids[1][g], bias=bias[g], target=target[g],
            cols=True,
        )  # fmt: skip
        for x, y in zip(got, alone, strict=True):
            torch.testing.assert_close(x[g], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("options", [{}, {"ids": True, "bias": True}, {"itself": True}])
def test_opcheck(options, store, device):
    itself = "itself" in options
    p = problem(9, 9 if itself else 7, 16, torch.float32, device=device, **options)
    needs = True, not itself, p["bias"] is not None
    args = (*p.values(), True, not itself, itself, 1, store)
    torch.library.opcheck(fwd.default, args)
    *statistics, logits = fwd(*args)
    upstream = [x.sin() for x in statistics]
    for labels, wide in ((None, False), (torch.arange(9, device=device, dtype=torch.int32), True)):
        alike = statistics[0].new_empty(0) if labels is None else statistics[0].cos()
        args = (
            *p.values(), labels, None if labels is None else labels[: len(p["k"])], logits,
            *statistics[:2], *upstream, alike, alike[:0], itself, 1, *needs, wide,
        )  # fmt: skip
        torch.library.opcheck(bwd.default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    q, k = (torch.randn(12, 16, device=device, requires_grad=True) for _ in range(2))
    scale = torch.tensor(3.0, device=device, requires_grad=True)

    def loss(q, k, scale):
        return info_nce(q, k, logit_scale=scale, symmetric=True, normalize=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, scale), (q, k, scale))
    got = torch.autograd.grad(compiled(q, k, scale), (q, k, scale))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeat(dtype, device):
    p = problem(700, 900, 100, dtype, ids=True, bias=True, device=device)
    q, k = p["q"].requires_grad_(), p["k"].requires_grad_()

    def run():
        row, col, pos = contrastive_lse(q, k, 9.0, q_ids=p["q_ids"], k_ids=p["k_ids"],
                                        target=p["target"], cols=True)  # fmt: skip
        total = row.nan_to_num(neginf=0).sum() + col.nan_to_num(neginf=0).sin().sum() + pos.sum()
        return row, col, pos, *torch.autograd.grad(total, (q, k))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_every_pair_left_out(device):
    q = torch.randn(4, 8, device=device, requires_grad=True)
    k = torch.randn(5, 8, device=device, requires_grad=True)
    q_ids, k_ids = torch.tensor([1, 1, 2, 1]), torch.ones(5, dtype=torch.long)
    row, col, _ = contrastive_lse(q, k, q_ids=q_ids, k_ids=k_ids, cols=True)
    assert row.cpu().isneginf().tolist() == [True, True, False, True]
    (row[2] + col.sum()).backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    assert (q.grad[[0, 1, 3]] == 0).all() and (q.grad[2] != 0).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_visible(bad, device):
    q, k = torch.randn(200, 16), torch.randn(300, 16)
    q[7, 3] = bad
    row, col, _ = contrastive_lse(q.to(device), k.to(device), cols=True)
    assert not row[7].isfinite()
    assert row.isfinite().sum() == 199, "the other rows are not concerned"
    # A logit of -inf is a pair that weighs nothing; +inf and NaN must show.
    assert not col[(bad * k[:, 3]).to(device) != -math.inf].isfinite().any()
    assert not info_nce(q.to(device), k.to(device), temperature=0.1).isfinite()


def test_ids_leave_out_groups_but_never_the_positive():
    q, k = torch.randn(6, 8), torch.randn(6, 8)
    ids = torch.tensor([0, 1, 0, 2, 2, 0])
    logits = 3 * q @ k.T
    out = (ids[:, None] == ids[None]) & ~torch.eye(6, dtype=torch.bool)
    logits = logits.masked_fill(out, -torch.inf)
    labels = torch.arange(6)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    got = info_nce(q, k, logit_scale=3.0, q_ids=ids, symmetric=True)
    torch.testing.assert_close(got, expected)


def test_closed_form():
    # Two rows of the identity in both views: -1 + ln(e + 2) each.
    z = torch.eye(2).repeat(2, 1)
    loss = info_nce(z, target=torch.tensor([2, 3, 0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 2) - 1, abs=1e-6)
    # One anchor, key and queue (e1, e2, -e1): -1 + ln(e + 1 + 1/e).
    keys = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    loss = info_nce(keys[:1], keys, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 1 + 1 / math.e) - 1, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_the_products_in_bf16(device):
    q, k = (torch.randn(20, 32, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        loss = info_nce(q, k, temperature=0.5)
    expected = info_nce(q.bfloat16(), k.bfloat16(), temperature=0.5)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    assert q.grad.dtype == torch.float32


def test_bias_is_the_log_of_repeated_keys():
    q, k = torch.randn(5, 8), torch.randn(3, 8)
    times = torch.tensor([1, 4, 2])
    row, _, _ = contrastive_lse(q, k, 2.0, bias=times.float().log())
    torch.testing.assert_close(row, contrastive_lse(q, k.repeat_interleave(times, 0), 2.0)[0])


good = torch.randn(4, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: info_nce(good, good[:, :5], temperature=1), ValueError, "q's width D=8, got"),
        (lambda: info_nce(good[:0], good, temperature=1), ValueError, "at least one row"),
        (lambda: info_nce(good[0], good, temperature=1), ValueError, r"must be \(rows, D\)"),
        (lambda: info_nce(good.long(), good, temperature=1), TypeError, "torch.int64"),
        (lambda: info_nce(good, good, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: info_nce(good, good, temperature=-1.0), ValueError, "got -1.0"),
        (lambda: info_nce(good, good, temperature=math.nan), ValueError, "must be positive"),
        (lambda: info_nce(good, good), ValueError, "exactly one of temperature"),
        (lambda: info_nce(good, good[:3], temperature=1), ValueError, "at least 4 rows, got 3"),
        (lambda: info_nce(good, temperature=1), ValueError, "needs a target"),
        (
            lambda: info_nce(good, good, temperature=1, target=torch.zeros(3).long()),
            ValueError,
            r"target must have shape \(4,\).*got \(3,\)",
        ),
        (
            lambda: info_nce(good, good, temperature=1, target=torch.zeros(4)),
            TypeError,
            "target must be an integer tensor",
        ),
        (
            lambda: info_nce(good, good, temperature=1, q_ids=torch.zeros(5).long()),
            ValueError,
            r"q_ids must have shape \(4,\)",
        ),
        (
            lambda: info_nce(good, good, temperature=1, bias=torch.zeros(5)),
            ValueError,
            r"bias must be a tensor of shape \(4,\)",
        ),
        (lambda: info_nce(good, good, temperature=1, reduction="avg"), ValueError, "got 'avg'"),
        (lambda: contrastive_lse(good, good, torch.ones(2)), ValueError, "must hold one number"),
        (lambda: contrastive_lse(good, cols=True), ValueError, "gives rows only"),
        (lambda: contrastive_lse(good, store_logits=True), ValueError, "stores nothing"),
        (lambda: contrastive_lse(good, good, keep_equal=True), ValueError, "needs q_ids"),
        (
            lambda: contrastive_lse(good, good, limit=torch.ones(4), cols=True),
            ValueError,
            "limit is a rule of rows",
        ),
        (
            lambda: contrastive_lse(good, good, limit=torch.ones(3)),
            ValueError,
            r"limit must be a tensor of shape \(4,\), got \(3,\)",
        ),
        (
            lambda: contrastive_lse(good[None], good),
            ValueError,
            r"k must have q's groups \(1,\), got \(4, 8\)",
        ),
        (
            lambda: contrastive_lse(good, k_ids=torch.arange(4)),
            ValueError,
            "neither k_ids nor bias",
        ),
        (
            lambda: info_nce(good, good, temperature=1, q_ids=torch.arange(4) * 2**32),
            ValueError,
            "q_ids must fit into 32 bits",
        ),
        (
            lambda: info_nce(good, good, temperature=1, bias=1.0),
            ValueError,
            "bias must be a tensor",
        ),
    ],
)
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("target", [-1, 7, 2**31 - 1])
def test_the_op_does_not_read_outside_of_the_logits(target):
    p = problem(9, 7, 16, torch.float32)
    p["target"][2] = target
    with pytest.raises((RuntimeError, IndexError)):
        fwd(*p.values(), True, True, False, 1, False)


@pytest.mark.parametrize("N", [1, 31, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pair_aligned_at_scale_100(N, dtype, cpu_path):
    # All lse lie near 100: weights of columns that only pad a strip must not become 0 * inf.
    q = normalize(torch.randn(N, 64)).to(dtype).requires_grad_()
    k = q.detach().clone().requires_grad_()
    info_nce(q, k, logit_scale=100.0, symmetric=True).backward()
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    logits, labels = 100 * q64 @ k64.T, torch.arange(N)
    ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).backward()
    for x, y in ((q, q64), (k, k64)):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-2, atol=5e-3 / N)


def test_columns_only_with_large_logits(cpu_path):
    q, k = torch.ones(32, 1, requires_grad=True), torch.full((40, 1), 89.0)
    contrastive_lse(q, k, rows=False, cols=True)[1].sum().backward()
    torch.testing.assert_close(q.grad, torch.full((32, 1), 89.0 * 40 / 32))


def test_every_nan_is_kept():
    # The NaN that CUDA writes has all payload bits set.
    q, k = torch.randn(20, 16), torch.randn(60, 16)
    q.view(torch.int32)[7, 3] = 0x7FFFFFFF
    row, col, _ = contrastive_lse(q, k, cols=True)
    assert row[7].isnan() and col.isnan().all()


def test_most_negative_bias_is_a_logit():
    bias = torch.zeros(40)
    bias[3] = torch.finfo(torch.float32).min
    row, col, _ = contrastive_lse(torch.ones(5, 2), torch.ones(40, 2), bias=bias, cols=True)
    torch.testing.assert_close(row, torch.full((5,), 2.0 + math.log(39)))
    assert col[3] == bias[3]


def test_compiles_with_one_tensor_in_both_roles():
    z = torch.randn(12, 16, requires_grad=True)
    ids = torch.arange(12) // 2
    calls = [
        lambda z: fastssl.losses.NTXentLoss(0.3)(z[:6], z[6:]),
        lambda z: info_nce(z, z, temperature=0.3, q_ids=ids),
    ]
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), call(z))
        got, expected = (torch.autograd.grad(f(z), z)[0] for f in (compiled, call))
        torch.testing.assert_close(got, expected)
