"""How many prototypes are in use, against closed forms; and what a run's records say of it."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import fastssl
from fastssl.ops import effective_prototypes, prototype_usage, sinkhorn, sinkhorn_bias
from fastssl.train.health import Health, prototype_symptoms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, K", [(1, 1), (7, 5), (33, 300)])
def test_usage_is_the_mean_of_the_assignments(B, K, dtype, device):
    scores, bias = torch.randn(2, B, K).to(dtype), torch.randn(2, K)
    for given in (None, bias[0], bias):
        x = scores.double() / 0.3 + (0 if given is None else given.double().view(-1, 1, K))
        got = prototype_usage(
            scores.to(device), 0.3, None if given is None else given.to(device)
        ).cpu()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), x.softmax(-1).mean(1), atol=1e-6, rtol=1e-5)
    one = prototype_usage(scores[1].to(device), 0.3, bias[1].to(device))
    torch.testing.assert_close(one.cpu(), got[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_effective_number_in_closed_form(dtype):
    K = 3000
    assert effective_prototypes(torch.ones(K, dtype=dtype)).item() == pytest.approx(K, rel=1e-5)
    assert effective_prototypes(torch.eye(K, dtype=dtype)[7]).item() == 1
    counts = torch.tensor([[5, 0, 5, 5], [1, 0, 0, 0]])
    torch.testing.assert_close(effective_prototypes(counts), torch.tensor([3.0, 1.0]))
    # p_k = 2^-k of infinitely many has entropy 2 ln 2.
    geometric = 0.5 ** torch.arange(1, 61, dtype=torch.float64)
    assert effective_prototypes(geometric).item() == pytest.approx(4, rel=1e-12)
    k = torch.arange(1.0, K + 1, dtype=torch.float64)
    Z = (1 / k).sum()  # power law of exponent 1: the entropy is ln Z + (sum_k ln k / k) / Z
    power_law = Z * ((k.log() / k).sum() / Z).exp()
    assert effective_prototypes(1 / k).item() == pytest.approx(power_law.item(), rel=1e-12)
    assert effective_prototypes(torch.tensor([1.0, torch.nan])).isnan()
    assert effective_prototypes(torch.zeros(3)).isnan()


def test_usage_of_sharp_flat_and_broken_scores():
    on_one = torch.eye(6)[2].expand(40, 6)
    torch.testing.assert_close(prototype_usage(on_one, 0.01), torch.eye(6)[2])
    torch.testing.assert_close(prototype_usage(0 * on_one, 0.01), torch.full((6,), 1 / 6))
    each_its_own = torch.eye(6).repeat(2, 1)[:9]  # the first three prototypes twice
    usage = prototype_usage(each_its_own, 0.01)
    torch.testing.assert_close(usage, torch.tensor([2.0, 2, 2, 1, 1, 1]) / 9)
    dead = on_one.clone()
    dead[:, 0] = -torch.inf
    assert prototype_usage(dead, 1.0)[0] == 0 and not prototype_usage(dead, 1.0).isnan().any()
    for bad in (torch.nan, torch.inf):
        assert prototype_usage(dead.index_fill(0, torch.tensor(3), bad), 1.0).isnan().all()
    assert not prototype_usage(on_one.clone().requires_grad_(), 1.0).requires_grad


def test_sinkhorn_hides_a_collapse_and_its_bias_shows_it():
    prototypes = normalize(torch.randn(200, 16))
    spread = normalize(torch.randn(500, 16)) @ prototypes.T
    on_one = normalize(prototypes[0] + 0.01 * torch.randn(500, 16)) @ prototypes.T
    for scores, used in ((spread, True), (on_one, False)):
        bias = sinkhorn_bias(scores, 0.05)
        codes = effective_prototypes(prototype_usage(scores, 0.05, bias))
        plain = effective_prototypes(prototype_usage(scores, 0.05))
        free = effective_prototypes((-bias).softmax(0))
        assert codes > 190
        assert plain > 150 and free > 150 if used else plain < 2 and free < 2
    # Exactly so where all features are equal.
    equal = spread[:1].expand(500, 200)
    usage = prototype_usage(equal, 0.05)
    torch.testing.assert_close((-sinkhorn_bias(equal, 0.05)).softmax(0), usage)
    torch.testing.assert_close(usage, (equal[0] / 0.05).softmax(0))


def test_compiles_without_a_graph_break():
    scores, bias = torch.randn(9, 21), torch.randn(21)

    def run(x, bias):
        return effective_prototypes(prototype_usage(x, 0.1, bias))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, bias), run(scores, bias))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x: prototype_usage(x.int(), 0.1), TypeError, "scores must be a float32.*int32"),
        (lambda x: prototype_usage(x, 0), ValueError, "temperature must be a positive number, got"),
        (lambda x: prototype_usage(x[:, :0], 0.1), ValueError, "at least one prototype"),
        (lambda x: prototype_usage(x[:0], 0.1), ValueError, r"must have a row, got \(0, 4\)"),
        (
            lambda x: prototype_usage(x, 0.1, torch.ones(3)),
            ValueError,
            r"^prototype_usage: bias must be a tensor of shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_error_messages(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(3, 4))


# ---------------------------------------------------------------------------- what records say


def test_symptoms_and_their_remedies():
    assert prototype_symptoms(7.2, 3000, 900.0) == {}
    found = prototype_symptoms(8.006, 3000, 900.0)
    assert list(found) == ["flat"] and "the loss 8.0060 stays at ln 3000 = 8.0064" in found["flat"]
    assert "a lower epsilon or teacher temperature (0.03" in found["flat"]
    assert list(prototype_symptoms(8.3178, 4096)) == ["flat"]
    assert prototype_symptoms(math.log(4096) - 0.02, 4096) == {}, "a student has to start to learn"
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    text = prototype_symptoms(8.006, 3000, **temperatures)["flat"]
    assert "teacher temperature than 0.05" in text and "must be below" not in text
    text = prototype_symptoms(8.006, 3000, **temperatures | {"teacher_temperature": 0.1})["flat"]
    assert "temperature 0.1 must be below the student's 0.1" in text
    found = prototype_symptoms(0.2, 3000, 1.3)
    assert list(found) == ["few"] and "(1.3 of 3000 in use). Try a higher" in found["few"]
    assert prototype_symptoms(0.2, 2, 1.9) == {}


def steps_of_messages(records, warmup_steps=0, total_steps=1000):
    health = Health(0.1, warmup_steps, total_steps)
    return [(r["step"], text) for r in records for text in health.messages(r)]


def records_of(loss, steps, **scalars):
    return [{"step": step, "loss": loss, "prototypes": 3000, **scalars} for step in steps]


def test_a_stretch_after_warmup_is_announced_once():
    flat, fine = math.log(3000), 7.0
    ((step, text),) = steps_of_messages(records_of(flat, range(10, 1000, 10)))
    assert step == 100 and text.startswith("step 100: the loss 8.0064 stays at ln 3000")
    # Warm-up is not counted, and 5 % of the steps must pass however dense the records.
    ((step, _),) = steps_of_messages(records_of(flat, range(10, 1000, 10)), warmup_steps=300)
    assert step == 400
    ((step, _),) = steps_of_messages(records_of(flat, range(1, 1000)))
    assert step == 51
    # Nothing is said of a loss that only starts at ln K, or is there now and then.
    assert not steps_of_messages(records_of(flat, range(10, 100, 10)) + records_of(fine, [100]))
    now_and_then = [records_of(fine if step % 90 == 0 else flat, [step])[0] for step in
                    range(10, 1000, 10)]  # fmt: skip
    assert not steps_of_messages(now_and_then)


def test_few_prototypes_further_terms_and_std():
    few = records_of(0.1, range(10, 1000, 10), effective_prototypes=1.2)
    ((step, text),) = steps_of_messages(few)
    assert step == 100 and "(1.2 of 3000 in use)" in text
    # With further terms the cross-entropy alone counts.
    assert not steps_of_messages(records_of(8.0064, range(10, 1000, 10), prototype_loss=7.1))
    assert steps_of_messages(records_of(9.1, range(10, 1000, 10), prototype_loss=8.0064))
    both = steps_of_messages(records_of(8.0064, range(10, 1000, 10), std=0.05))
    assert [step for step, _ in both] == [10, 100] and "(std 0.050; 1 is healthy" in both[0][1]
    low = [{"step": step, "loss": 1.0, "std": 0.05} for step in range(10, 1000, 10)]
    assert [step for step, _ in steps_of_messages(low, warmup_steps=300)] == [310]
    assert not steps_of_messages([{"step": step, "loss": 0.0} for step in range(10, 1000, 10)])


# --------------------------------------------------------------------------------- several ranks


def on_rank(group, sizes, K):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, sum(sizes), K, generator=generator)
    bias = torch.randn(2, K, generator=generator)
    truth = prototype_usage(scores, 0.2, bias, group=fastssl.LOCAL)
    first = sum(sizes[: group.rank()])
    own = scores[:, first : first + sizes[group.rank()]]
    return prototype_usage(own, 0.2, bias, group=group), truth


@pytest.mark.parametrize("sizes, K", [((5,), 11), ((6, 3), 11), ((1, 0, 3, 4), 11), ((2, 1), 1)])
def test_over_ranks_as_in_one_process(sizes, K, ranks):
    found = ranks.run(on_rank, len(sizes), sizes, K)
    for got, truth in found:
        torch.testing.assert_close(got, truth, atol=1e-6, rtol=1e-6)
        assert torch.equal(got, found[0][0]), "the usage must be equal on all ranks"


def without_rows_and_that_differ(group):
    scores = torch.randn(0, 4)
    with pytest.raises(ValueError, match="prototype_usage: the batch must have a row"):
        prototype_usage(scores, 0.1, group=group)
    for n_iters in (0, 1, 3):
        assert torch.equal(sinkhorn_bias(scores, 0.1, n_iters, group=group), torch.zeros(4))
        assert sinkhorn(scores, 0.1, n_iters, group=group).shape == (0, 4)
    with pytest.raises(ValueError, match="temperature must be the same on all ranks, got 0.1 on"):
        prototype_usage(torch.randn(3, 4), 0.1 + group.rank(), group=group)


def test_ranks_without_rows_and_ranks_that_differ(ranks):
    ranks.run(without_rows_and_that_differ, 2)
