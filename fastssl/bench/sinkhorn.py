"""Sinkhorn-Knopp against the published iteration on all of e^(scores / epsilon), and the
cross-entropy over prototypes, forward and backward."""

from contextlib import nullcontext

import torch
from torch.nn.functional import linear, normalize

from ..ops import (
    linear_prototype_cross_entropy,
    prototype_cross_entropy,
    sinkhorn,
    sinkhorn_bias,
)
from .baselines import add, library
from .measure import Work

_SCORES = [{"N": 64, "M": 3000}, {"N": 64, "M": 65536}, {"N": 4096, "M": 3000}]
_CROPS = [{"N": 64, "M": 3000}, {"N": 64, "M": 65536}]
_FEATURES = [{"N": 64, "M": 3000, "D": 256}, {"N": 64, "M": 65536, "D": 256}]
SIZES = {
    "cpu": {
        "sinkhorn_bias": _SCORES,
        "sinkhorn": _SCORES,
        "dino": _CROPS,
        "linear_prototypes": _FEATURES,
        "linear_prototypes_autocast": _FEATURES,
    },
    "cuda": {
        "sinkhorn_bias": [*_SCORES, {"N": 8192, "M": 16000}, {"N": 4096, "M": 65536}],
        "sinkhorn": [*_SCORES, {"N": 8192, "M": 16000}, {"N": 4096, "M": 65536}],
        "dino": _CROPS,
        "linear_prototypes": [*_FEATURES, {"N": 256, "M": 65536, "D": 256}],
        "linear_prototypes_autocast": _FEATURES,
    },
}
DTYPES = {case: ["float32", "bfloat16"] for case in SIZES["cpu"]}
DTYPES["linear_prototypes_autocast"] = ["bfloat16"]  # with prototypes in float32
SCALING = [
    ("sinkhorn", "M", (8192, 16384, 32768, 65536), {"N": 64}, 1),
    ("sinkhorn", "N", (512, 1024, 2048, 4096), {"M": 3000}, 1),
    ("dino", "M", (8192, 16384, 32768, 65536), {"N": 64}, 1),
]
EPSILON, ITERATIONS = 0.05, 3
TEACHERS, STUDENTS = 2, 10
CROPS = TEACHERS + STUDENTS
WIDTH = 128
"""Of the features that scores are made of, where only scores are wanted."""
# Exponentials of each score: one a pass, and one where codes are written; forward and backward.
EXPONENTIALS = {
    "sinkhorn_bias": ITERATIONS,
    "sinkhorn": ITERATIONS + 1,
    "dino": 2,
    "linear_prototypes": (2 * STUDENTS + 3 * TEACHERS) / CROPS,
}


def work(case: str, dtype: str, N: int, M: int, D: int = 0) -> Work:
    case = case.removesuffix("_autocast")
    rows = N if case.startswith("sinkhorn") else CROPS * N
    item = getattr(torch, dtype).itemsize
    if D:  # of each score of a student, and of a teacher
        products = (3 * STUDENTS + TEACHERS) / CROPS
        traffic = ((CROPS + STUDENTS) * N + 3 * M) * D * item
        return Work(rows, M, D, products, EXPONENTIALS[case], traffic)
    touched = {"sinkhorn_bias": 1, "sinkhorn": 2, "dino": 1 + STUDENTS / CROPS}[case]
    return Work(rows, M, 0, 0, EXPONENTIALS[case], touched * rows * M * item)


def make(case: str, dtype: str, device: str, N: int, M: int, D: int = 0) -> tuple[dict, list[str]]:
    """Providers by name, and the absent: each gives codes, of one sample for sinkhorn_bias, or the
    gradients of the crops."""
    generator = torch.Generator().manual_seed(0)
    of_features = getattr(torch, dtype)
    if D:
        autocast = case.endswith("autocast")
        return _of_features(generator, of_features, device, autocast, N, M, D), []
    crops = CROPS if case == "dino" else 1
    samples, prototypes = (
        normalize(torch.randn(n, WIDTH, generator=generator)) for n in (crops * N, M)
    )
    scores = (samples @ prototypes.T).to(device, of_features)
    if case == "dino":
        return _dino(scores.view(crops, N, M))
    rows = 1 if case == "sinkhorn_bias" else N
    compiled = torch.compile(published, dynamic=False)
    ours = {
        "sinkhorn_bias": lambda: (_first_codes(scores),),
        "sinkhorn": lambda: (sinkhorn(scores, EPSILON, ITERATIONS),),
    }
    return {
        "ours": ours[case],
        "published": lambda: (
            published(scores)[:rows].clone() if rows == 1 else published(scores),
        ),
        "compiled": lambda: (compiled(scores)[:rows],),
    }, []


def published(scores, epsilon: float = EPSILON, iterations: int = ITERATIONS):
    """SwAV's and DINOv2's iteration: prototypes in rows, in float32 and in place."""
    M = (scores.float() / epsilon).exp().T
    K, B = M.shape
    M /= M.sum()
    for _ in range(iterations):
        M /= M.sum(1, keepdim=True)
        M /= K
        M /= M.sum(0, keepdim=True)
        M /= B
    M *= B
    return M.T


def _first_codes(scores):
    """What a consumer does with the bias, for one sample: so that results can be compared."""
    bias = sinkhorn_bias(scores, EPSILON, ITERATIONS)
    return torch.softmax(scores[:1].float() / EPSILON + bias, 1)


def _dino(scores) -> tuple[dict, list[str]]:
    """The gradient of each crop. lightly's is left without the update of its centre."""
    teacher, student = scores[:TEACHERS], scores[TEACHERS:].clone().requires_grad_()
    crops = [x.detach().requires_grad_() for x in student]
    found, absent = {}, []

    def ours():
        loss = prototype_cross_entropy(student, teacher, ignore_diagonal=True)
        return tuple(torch.autograd.grad(loss, student)[0])

    def lightly():
        peer = library("lightly.loss").DINOLoss(scores.shape[-1]).to(scores.device)
        peer.update_center = lambda _: None
        half = scores.dtype != torch.float32  # it takes fp32, or what autocast makes of 16 bits

        def theirs():
            with torch.autocast(scores.device.type, scores.dtype if half else None, enabled=half):
                loss = peer(list(teacher), crops)
            return torch.autograd.grad(loss, crops)

        return theirs

    found["ours"] = ours
    add(found, absent, "lightly DINOLoss", lightly)
    return found, absent


def _of_features(generator, dtype, device: str, autocast: bool, N: int, M: int, D: int) -> dict:
    """DINO's loss from features and prototypes, against scores made whole."""

    def rows(*size, dtype):
        return normalize(torch.randn(*size, D, generator=generator), dim=-1).to(device, dtype)

    student, teacher = rows(STUDENTS, N, dtype=dtype), rows(TEACHERS, N, dtype=dtype)
    W, V = (rows(M, dtype=torch.float32 if autocast else dtype) for _ in range(2))
    inputs = student.requires_grad_(), W.requires_grad_()
    options = {"bias": torch.randn(M, generator=generator).to(device), "ignore_diagonal": True}

    def whole(student, W, teacher, V, **options):
        return prototype_cross_entropy(linear(student, W), linear(teacher, V), **options)

    def run(loss):
        with torch.autocast(device, dtype) if autocast else nullcontext():
            value = loss(student, W, teacher, V, **options)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return {
        "ours": lambda: run(linear_prototype_cross_entropy),
        "eager scores": lambda: run(whole),
    }
