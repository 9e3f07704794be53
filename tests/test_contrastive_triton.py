"""The Triton kernels of `contrastive` against the fp64 reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import contrastive as kernels
from fastssl.kernels import panels
from triton_cases import (
    DEVICE,
    SIZES,
    WIDTHS,
    double,
    dtypes,
    features,
    integers,
    limits,
    no_worse,
    number,
    same_bits,
)

from fastssl.ops.contrastive import contrastive_bwd_ref, contrastive_fwd_ref

DIRECTIONS = [(True, False), (False, True), (True, True)]


def extras(N, M, groups=1):
    """ids that leave out some pairs, a bias and a target."""
    n, m = groups * N, groups * M
    ids = integers(max(2, N // 2), n), integers(max(2, N // 2), m)
    return *ids, torch.randn(m, device=DEVICE), integers(M, n)


def problem(q, k, scale, q_ids=None, k_ids=None, bias=None, target=None, limit=None, equal=False):
    return q, k, number(scale), q_ids, k_ids, equal, bias, limit, target


def backward(run, args, forward, upstream, *needs, labels=(None, None), wide=False):
    """The op's backward after its forward; of the five upstream gradients the last may be left out:
    those of the sums over pairs of equal labels."""
    upstream = [*upstream, *[forward[0].new_empty(0)] * (5 - len(upstream))]
    return run(*args, *labels, forward[3], *forward[:2], *upstream, *needs, wide)


def check(
    args, rows=True, cols=True, symmetric=False, groups=1, store=False,
    need_dq=True, need_dk=True, need_dbias=None,
    labels=(None, None), alike=(False, False), upstream=None, wide=False,
):  # fmt: skip
    """Both directions of the op against fp64 and plain torch; returns what the kernels gave."""
    need_dk = need_dk and not symmetric
    need_dbias = args[6] is not None if need_dbias is None else need_dbias
    flags = rows, cols, symmetric, groups, store
    got = kernels.contrastive_fwd(*args, *flags)
    exact = contrastive_fwd_ref(*double(args), *flags)
    plain = contrastive_fwd_ref(*args, *flags)
    if upstream is None:
        upstream = [torch.randn_like(x) / len(args[0]) for x in got[:3]]
        for x, given in zip(args[:2], alike, strict=True):
            # Smaller, as they count for many pairs.
            upstream.append(torch.randn(len(x) * given, device=DEVICE) / len(args[0]) / 10)
    needs = symmetric, groups, need_dq, need_dk, need_dbias
    rest = {"labels": labels, "wide": wide}
    results = [
        (*got, *backward(kernels.contrastive_bwd, args, got, upstream, *needs, **rest)),
        (
            *exact,
            *backward(contrastive_bwd_ref, double(args), exact, double(upstream), *needs, **rest),
        ),
        (*plain, *backward(contrastive_bwd_ref, args, plain, upstream, *needs, **rest)),
    ]
    largest = max(
        [float(x[x.isfinite()].abs().max()) for x in exact[:3] if x.isfinite().any()] + [1]
    )
    names = "row_lse", "col_lse", "pos", "logits", "dq", "dk", "dscale", "dbias"
    for name, a, b, c in zip(names, *results, strict=True):
        narrow = name in ("dq", "dk") and not wide
        assert a.dtype == (args[0].dtype if narrow else torch.float32), name
        if name == "dscale":
            check_dscale(a, b, c, args, largest, upstream, store, labels, groups)
            continue
        magnitude = float(b.abs().max()) if name.startswith("d") and b.numel() else 0.0
        if name == "dbias":
            # Sums of coefficients, each with the rounding of a log-sum-exp and of a logit.
            magnitude *= largest
        elif wide:
            # They, too, come from coefficients rounded to the features' dtype.
            magnitude *= torch.finfo(args[0].dtype).eps / torch.finfo(torch.float32).eps
        no_worse(name, a, b, c, 3 if name.startswith("d") else 2, magnitude)
    return results[0]


def check_dscale(got, exact, plain, args, largest, upstream, store, labels, groups):
    """dscale sums terms of both signs, so its floor is that of the terms: each coefficient carries
    the rounding of a log-sum-exp and of a logit. From stored logits it comes from coefficients
    rounded to the features' dtype."""
    q, k = args[:2]
    terms = sum(x.abs().sum() for x in upstream[:3])
    equal = torch.ones(groups, len(q) // groups, len(k) // groups, device=DEVICE)
    if labels[0] is not None:
        equal *= labels[0].view(groups, -1, 1) == labels[1].view(groups, 1, -1)
    for d, pairs in zip(upstream[3:], (equal.sum(2), equal.sum(1)), strict=True):
        terms += (d.abs() * pairs.flatten()).sum() if d.numel() else 0
    terms *= q.norm(dim=1).max() * k.norm(dim=1).max()
    eps = torch.finfo(torch.float32).eps * largest
    eps += torch.finfo(args[0].dtype).eps if store else 0
    limit = 3 * (plain - exact).abs() + eps * terms
    assert (got - exact).abs() <= limit, f"dscale: {got} for {exact}, plain torch {plain}"


@dtypes
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N, M", SIZES)
def test_sizes(N, M, D, dtype):
    check(problem(features(N, D, dtype), features(M, D, dtype), 10, *extras(N, M)))


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
@pytest.mark.parametrize("given", range(8), ids=lambda g: f"extras{g:03b}")
def test_options(given, rows, cols, dtype):
    q_ids, k_ids, bias, target = extras(40, 70)
    ids = (q_ids, k_ids) if given & 1 else (None, None)
    options = bias if given & 2 else None, target if given & 4 else None
    args = problem(features(40, 48, dtype), features(70, 48, dtype), 10, *ids, *options)
    check(args, rows, cols)


@dtypes
@pytest.mark.parametrize("D", [24, 264])
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_masks(rows, cols, D, dtype):
    """keep_equal and limit, each alone and together with ids and a bias."""
    q, k = features(40, D, dtype), features(70, D, dtype)
    q_ids, k_ids, bias, target = extras(40, 70)
    limit = limits(q, k)
    check(problem(q, k, 10, q_ids, k_ids, bias, target, equal=True), rows, cols)
    check(problem(q, k, 10, None, None, None, target, limit), rows, cols)
    check(problem(q, k, 10, q_ids, k_ids, bias, target, limit, True), rows, cols)


@dtypes
@pytest.mark.parametrize("D", [24, 264])
@pytest.mark.parametrize("N", [1, 2, 7, 130])
def test_symmetric(N, D, dtype):
    """A row leaves itself out by its index, also where equal ids leave out more."""
    z = features(N, D, dtype)
    ids, target = integers(max(2, N // 2), N), integers(N, N)
    check(problem(z, z, 10, target=target), cols=False, symmetric=True)
    for equal in (False, True):
        args = problem(z, z, 10, ids, ids, None, target, equal=equal)
        check(args, cols=False, symmetric=True)


@dtypes
def test_symmetric_columns(dtype):
    """Rows past the end of the last block must not count, not even with their self-pair."""
    z = torch.cat([features(64, 32, dtype), 30 * features(1, 32, dtype)])
    forward = kernels.contrastive_fwd(*problem(z, z, 1), True, True, True, 1, False)
    exact = contrastive_fwd_ref(*double(problem(z, z, 1)), True, True, True, 1, False)
    plain = contrastive_fwd_ref(*problem(z, z, 1), True, True, True, 1, False)
    for name, *lse in zip(("row_lse", "col_lse"), forward, exact, plain, strict=False):
        no_worse(name, *lse)


@dtypes
@pytest.mark.parametrize("N, M, D", [(1, 2, 24), (7, 5, 264), (130, 70, 24), (40, 70, 264)])
def test_groups(N, M, D, dtype):
    q, k = features(3 * N, D, dtype), features(3 * M, D, dtype)
    q_ids, k_ids, bias, target = extras(N, M, 3)
    args = problem(q, k, 10, q_ids, k_ids, bias, target, limits(q, k, 3))
    for rows, cols in DIRECTIONS:
        check(args, rows, cols, groups=3)
    check(problem(q, q, 10, target=integers(N, 3 * N)), cols=False, symmetric=True, groups=3)


@dtypes
@pytest.mark.parametrize("D", [24, 264])
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_stored_logits(rows, cols, D, dtype):
    q, k = features(78, D, dtype), features(210, D, dtype)
    q_ids, k_ids, bias, target = extras(26, 70, 3)
    args = problem(q, k, 10, q_ids, k_ids, bias, target, limits(q, k, 3))
    check(args, rows, cols, groups=3, store=True)
    check(args, rows, cols, groups=3, store=True, need_dq=False)
    check(args, rows, cols, groups=3, store=True, need_dk=False, need_dbias=False)
    check(args, rows, cols, groups=3, store=True, need_dq=False, need_dk=False)
    check(problem(q, k, 0, target=target), rows, cols, groups=3, store=True)


@dtypes
@pytest.mark.parametrize("D", [32, 264])
@pytest.mark.parametrize("need_dq, need_dk", [(True, False), (False, True), (False, False)])
def test_needs(need_dq, need_dk, D, dtype):
    args = problem(features(40, D, dtype), features(70, D, dtype), 10, *extras(40, 70))
    for need_dbias in (False, True):
        check(args, need_dq=need_dq, need_dk=need_dk, need_dbias=need_dbias)


ALIKE = pytest.mark.parametrize("alike", [(True, False), (False, True), (True, True)], ids=str)


def labels_of(n, m):
    return integers(5, n), integers(5, m)


@dtypes
@ALIKE
@pytest.mark.parametrize("N, M, D", [(130, 150, 24), (40, 70, 136), (40, 70, 264)])
def test_alike(N, M, D, alike, dtype):
    """Coefficients for pairs of equal labels, or for all pairs: left out of the sums or not."""
    q, k = features(N, D, dtype), features(M, D, dtype)
    q_ids, k_ids, bias, target = extras(N, M)
    everything = q_ids, k_ids, bias, target, limits(q, k)
    for labels in ((None, None), labels_of(N, M)):
        check(problem(q, k, 10), False, False, labels=labels, alike=alike)
        check(problem(q, k, 10), False, True, labels=labels, alike=alike)
        for equal in (False, True):
            check(problem(q, k, 10, *everything, equal), labels=labels, alike=alike)
    for need_dq, need_dk in ((True, False), (False, True), (False, False)):
        args = problem(q, k, 10, *everything)
        check(args, need_dq=need_dq, need_dk=need_dk, labels=labels, alike=alike)


@dtypes
@pytest.mark.parametrize("N, D", [(1, 24), (2, 264), (7, 24), (70, 264), (130, 24)])
def test_alike_symmetric(N, D, dtype):
    """A row is not alike to itself."""
    for groups in (1, 3):
        z, target = features(groups * N, D, dtype), integers(N, groups * N)
        ids, own = integers(max(2, N // 2), groups * N), integers(5, groups * N)
        rest = {"cols": False, "symmetric": True, "groups": groups, "alike": (True, False)}
        for labels in ((None, None), (own, own)):
            check(problem(z, z, 10), labels=labels, **rest)
            check(problem(z, z, 10, ids, ids, None, target), labels=labels, **rest)
            check(problem(z, z, 10, own, own, equal=True), labels=labels, **rest)


@dtypes
@ALIKE
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("N, M, D", [(1, 2, 24), (130, 70, 24), (40, 70, 264)])
def test_alike_groups(N, M, D, store, alike, dtype):
    q, k = features(3 * N, D, dtype), features(3 * M, D, dtype)
    q_ids, k_ids, bias, target = extras(N, M, 3)
    args = problem(q, k, 10, q_ids, k_ids, bias, target, limits(q, k, 3))
    for labels in ((None, None), labels_of(3 * N, 3 * M)):
        check(args, groups=3, store=store, labels=labels, alike=alike)


@dtypes
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("D", [32, 264])
def test_alike_near_convergence(D, store, dtype):
    """Rows of a label are equal and far from all others: the parts of a coefficient cancel but for
    a few parts in a thousand, which rounding them one by one would lose."""
    own, other = integers(6, 70), integers(6, 90)
    own[:6] = other[:6] = torch.arange(6, device=DEVICE)
    basis = torch.eye(D, device=DEVICE).to(dtype)

    def upstream(labels, against, left_out=0):
        pairs = (labels[:, None] == against).sum(1) - left_out
        d = 0.5 + torch.rand(len(labels), device=DEVICE)
        return d, torch.where(pairs > 0, -d / pairs, 0)

    empty = torch.empty(0, device=DEVICE)
    drow, drow_alike = upstream(own, other)
    dcol, dcol_alike = upstream(other, own)
    check(
        problem(basis[own], basis[other], 8), store=store, labels=(own, other),
        upstream=[drow, dcol, empty, drow_alike, dcol_alike],
    )  # fmt: skip
    if not store:
        drow, drow_alike = upstream(own, own, 1)
        z = basis[own]
        check(
            problem(z, z, 8), cols=False, symmetric=True, labels=(own, own),
            upstream=[drow, empty, empty, drow_alike, empty],
        )  # fmt: skip


@dtypes
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("N, D", [(40, 24), (130, 24), (40, 264)])
def test_wide(N, D, store, dtype):
    """Gradients in fp32 from features of any dtype, also where they are too small for fp16."""
    q, k = features(3 * N, D, dtype), features(3 * 70, D, dtype)
    args = problem(q, k, 10, *extras(N, 70, 3))
    rest = {"groups": 3, "store": store, "wide": True}
    check(args, labels=labels_of(3 * N, 3 * 70), alike=(True, True), **rest)
    sizes = 3 * N, 3 * 70, 3 * N, 0, 0
    got = check(args, upstream=[torch.rand(n, device=DEVICE) * 1e-9 for n in sizes], **rest)
    assert got[4].any() and got[4].abs().max() < 1e-7
    if not store:
        upstream = torch.rand(3 * N, device=DEVICE) * 1e-9, *[q.new_empty(0).float()] * 4
        args = problem(q, q, 10)
        check(args, cols=False, symmetric=True, groups=3, wide=True, upstream=upstream)


@dtypes
def test_several_panels(dtype, monkeypatch):
    """Panels that split rows and columns; that hold a few groups; and pieces of sums alone."""
    monkeypatch.setattr(panels, "PANEL_ROWS", 128)
    monkeypatch.setattr(panels, "PANEL_BYTES", 128 * 128 * dtype.itemsize)
    monkeypatch.setattr(panels, "PIECE", 128 * 128)
    D = 20 if dtype == torch.float32 else 264
    q, k = features(257, D, dtype), features(130, D, dtype)
    args = problem(q, k, 10, *extras(257, 130))
    check(args)
    check(args, need_dq=False, need_dk=False)
    check(args, store=True)
    for store in (False, True):
        check(args, store=store, labels=labels_of(257, 130), alike=(True, True), wide=True)
    q, k = features(5 * 50, D, dtype), features(5 * 40, D, dtype)
    check(problem(q, k, 10, *extras(50, 40, 5)), groups=5)


@dtypes
@pytest.mark.parametrize("D", [40, 264])
def test_strided(D, dtype):
    q = features(33, 2 * D, dtype)[:, :D]
    check(problem(q, features(50, 2 * D, dtype)[::2, D:], 10, *extras(33, 25)))
    check(problem(q, features(D, 25, dtype).T, 10, *extras(33, 25)))


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_orthogonal_features(rows, cols, dtype):
    """Scale 100 and features that share nothing but one pair: a fixed maximum would lose them."""
    q, k = torch.eye(150, device=DEVICE).to(dtype).chunk(2)
    k = k.clone()
    k[3] = q[5]
    target = torch.arange(75, device=DEVICE, dtype=torch.int32)
    check(problem(q.contiguous(), k, 100, target=target), rows, cols)


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_large_logits(rows, cols, dtype):
    """Logits in the thousands, many exponents apart. Products of small integers are exact, so the
    comparison does not depend on the order of sums."""
    q, k = torch.randint(-8, 9, (2, 150, 64), device=DEVICE).to(dtype)
    q_ids, k_ids, bias, target = extras(150, 150)
    check(problem(q, k, 4, q_ids, k_ids, None, target), rows, cols)
    check(problem(q / 8, k / 8, 4, None, None, 1000 * bias.round(), target), rows, cols)


@dtypes
@pytest.mark.parametrize("D", [16, 264])
def test_nothing_left(D, dtype):
    """All pairs of a row, of a column, or of everything left out: -inf and no gradient."""
    q, k = features(20, D, dtype), features(30, D, dtype)
    q_ids, k_ids, bias, target = extras(20, 30)
    k_ids[:] = 1
    q_ids[:] = 0
    q_ids[4] = 1
    for store in (False, True):
        got = check(problem(q, k, 10, q_ids, k_ids, bias), store=store)
        assert got[0][4] == -torch.inf and got[0].isneginf().sum() == 1 and not got[4][4].any()
        got = check(problem(q, k, 10, q_ids, k_ids, bias, equal=True), store=store)
        assert got[0].isneginf().sum() == 19 and not got[4][5].any() and got[4][4].any()
        got = check(problem(q, k, 10, 0 * q_ids, 0 * k_ids, bias), store=store)
        assert got[0].isneginf().all() and got[1].isneginf().all()
        assert not any(gradient.any() for gradient in got[4:])
    got = check(problem(q, k, 10, bias=bias, limit=torch.full((20,), -2.0, device=DEVICE)))
    assert got[0].isneginf().all() and not any(gradient.any() for gradient in got[4:])


@dtypes
@pytest.mark.parametrize("D", [16, 264])
def test_equal_and_zero_rows(D, dtype):
    q, k = features(20, D, dtype), features(30, D, dtype)
    q[3:9] = q[3]
    k[5:25] = q[3]
    q[11], k[2] = 0, 0
    check(problem(q, k, 100, None, None, None, integers(30, 20)))
    check(problem(q, k, 0, *extras(20, 30)))


@dtypes
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("D", [16, 264])
def test_small_gradients(D, store, dtype):
    """Gradients of a mean over many rows are far below the smallest fp16 number."""
    args = problem(features(60, D, dtype), features(70, D, dtype), 5, *extras(60, 70))
    forward = kernels.contrastive_fwd(*args, True, True, False, 1, store)
    grads = [torch.rand_like(x) * 1e-5 for x in forward[:3]]
    needs = False, 1, True, True, True
    got = backward(kernels.contrastive_bwd, args, forward, grads, *needs)
    exact = contrastive_fwd_ref(*double(args), True, True, False, 1, store)
    exact = backward(contrastive_bwd_ref, double(args), exact, double(grads), *needs)
    plain = backward(contrastive_bwd_ref, args, forward, grads, *needs)
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for a, b, c in zip(got, exact, plain, strict=True):
        rounding = torch.finfo(dtype).eps if store and a is got[2] else 1e-6
        limit = 3 * (c.double() - b).abs().max() + rounding * b.abs().max()
        assert (a.double() - b).abs().max() <= limit + (tiny if a.dtype == dtype else 0)


@dtypes
@pytest.mark.parametrize("D", [16, 264])
def test_nan(D, dtype):
    q, k = features(40, D, dtype), features(140, D, dtype)
    k[7, 3] = torch.nan
    ids = integers(3, 40), integers(3, 140)
    for store in (False, True):
        for args in (problem(q, k, 10), problem(k, q, 10), problem(q, k, 10, *ids)):
            forward = kernels.contrastive_fwd(*args, True, True, False, 1, store)
            exact = contrastive_fwd_ref(*double(args), True, True, False, 1, store)
            for a, b in zip(forward, exact, strict=True):
                assert torch.equal(a.isnan(), b.isnan())
            grads = [torch.ones_like(x) for x in forward[:3]]
            needs = False, 1, True, True, False
            got = backward(kernels.contrastive_bwd, args, forward, grads, *needs)
            exact = backward(contrastive_bwd_ref, double(args), exact, double(grads), *needs)
            for a, b in zip(got, exact, strict=True):
                assert (a.isnan() | ~b.isnan()).all()


@dtypes
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("D", [64, 264])
def test_repeats_to_the_bit(D, store, dtype):
    args = problem(features(70, D, dtype), features(150, D, dtype), 10, *extras(70, 150))
    forward = kernels.contrastive_fwd(*args, True, True, False, 1, store)
    assert same_bits(lambda: kernels.contrastive_fwd(*args, True, True, False, 1, store))
    grads = [torch.randn_like(x) for x in forward[:3]] + [
        torch.randn(n, device=DEVICE) for n in (70, 150)
    ]
    needs = False, 1, True, True, True
    assert same_bits(lambda: backward(kernels.contrastive_bwd, args, forward, grads, *needs))


def test_target_out_of_range():
    q, k = features(10, 8, torch.float32), features(8, 8, torch.float32)
    target = torch.tensor([0, 4, -1, 3, 1 << 30] * 2, device=DEVICE, dtype=torch.int32)
    args = problem(q, k, 1, target=target)
    pos = kernels.contrastive_fwd(*args, True, False, False, 2, False)[2]
    assert pos.isnan().tolist() == [False, True, True, False, True] * 2
