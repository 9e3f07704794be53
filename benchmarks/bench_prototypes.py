"""Sinkhorn-Knopp against the published iteration on all of e^(scores / epsilon), and the
cross-entropy over prototypes, forward and backward, against lightly's."""

import harness
import pytest
import torch
from torch.nn.functional import normalize

from fastssl.ops import prototype_cross_entropy, sinkhorn, sinkhorn_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # N samples, M prototypes, features of width D
    "cpu": [(64, 3000, 128), (64, 65536, 256), (4096, 3000, 128)],
    "cuda": [(64, 3000, 128), (64, 65536, 256), (4096, 3000, 128), (8192, 16000, 256)]
    + [(4096, 65536, 256)],
}
EPSILON, ITERATIONS = 0.05, 3
TEACHERS, STUDENTS = 2, 10
# Exponentials of each score: one a pass, and one where codes are written; forward and backward.
EXPONENTIALS = {"sinkhorn_bias": ITERATIONS, "sinkhorn": ITERATIONS + 1, "dino": 2}


def published(scores):
    """SwAV's and DINOv2's iteration: prototypes in rows, in float32 and in place."""
    M = (scores.float() / EPSILON).exp().T
    K, B = M.shape
    M /= M.sum()
    for _ in range(ITERATIONS):
        M /= M.sum(1, keepdim=True)
        M /= K
        M /= M.sum(0, keepdim=True)
        M /= B
    M *= B
    return M.T


def first_codes(scores):
    """What a consumer does with the bias, for one sample: so that results can be compared."""
    bias = sinkhorn_bias(scores, EPSILON, ITERATIONS)
    return torch.softmax(scores[:1].float() / EPSILON + bias, 1)


def sinkhorn_providers(case: str, scores) -> dict:
    if case == "sinkhorn_bias":
        providers = {
            "ours": lambda: (first_codes(scores),),
            "published": lambda: (published(scores)[:1].clone(),),
        }
    else:
        providers = {
            "ours": lambda: (sinkhorn(scores, EPSILON, ITERATIONS),),
            "published": lambda: (published(scores),),
        }
    if scores.is_cuda:
        torch._dynamo.reset()
        compiled = torch.compile(published, dynamic=False)
        rows = 1 if case == "sinkhorn_bias" else len(scores)
        providers["compiled"] = lambda: (compiled(scores)[:rows],)
    return providers


def dino_providers(scores) -> dict:
    """The gradient of each crop. lightly's is left without the update of its centre.

    Its loss, one product over all B x K, errs by 3e-4 in fp32: too much to compare.
    """
    teacher, student = scores[:TEACHERS], scores[TEACHERS:].clone().requires_grad_()
    crops = [x.detach().requires_grad_() for x in student]
    peer = pytest.importorskip("lightly.loss").DINOLoss(scores.shape[-1]).to(scores.device)
    peer.update_center = lambda _: None

    def ours():
        loss = prototype_cross_entropy(student, teacher, ignore_diagonal=True)
        return tuple(torch.autograd.grad(loss, student)[0])

    def theirs():
        # It takes fp32, or what autocast makes of 16 bits.
        half = scores.dtype != torch.float32
        with torch.autocast(scores.device.type, scores.dtype if half else None, enabled=half):
            loss = peer(list(teacher), crops)
        return torch.autograd.grad(loss, crops)

    return {"ours": ours, "lightly DINOLoss": theirs}


def make(case: str, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours, the baseline and others by name: each gives codes, of one sample for sinkhorn_bias."""
    generator = torch.Generator().manual_seed(0)
    crops = TEACHERS + STUDENTS if case == "dino" else 1
    samples, prototypes = (
        normalize(torch.randn(n, D, generator=generator)) for n in (crops * N, M)
    )
    scores = (samples @ prototypes.T).to(device, getattr(torch, dtype))
    if case == "dino":
        return dino_providers(scores.view(crops, N, M))
    return sinkhorn_providers(case, scores)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["sinkhorn_bias", "sinkhorn"])
@pytest.mark.parametrize("N,M,D", SIZES[DEVICE])
def test_sinkhorn(benchmark, case, N, M, D, dtype):
    params = {"case": case, "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    harness.measure(benchmark, __name__, params, (N, M), 0, EXPONENTIALS[case])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("N,M,D", [(64, 3000, 256), (64, 65536, 256)])
def test_dino(benchmark, N, M, D, dtype):
    params = {"case": "dino", "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    rows = (TEACHERS + STUDENTS) * N
    harness.measure(benchmark, __name__, params, (rows, M), 0, EXPONENTIALS["dino"])
