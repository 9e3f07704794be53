"""Losses, forward and backward, against the libraries people use for them; top-k search."""

import torch
from torch.nn.functional import cross_entropy, normalize

import fastssl

from .baselines import add, library
from .measure import Work

SMALL = (64, 256, 1024)
SIZES = {
    "cpu": {  # N rows (of each view), M keys where they are others, D
        "clip": [{"N": N, "D": 256} for N in (*SMALL, 8192)] + [{"N": 1024, "D": 512}],
        "clip_stored": [{"N": N, "D": 256} for N in (64, 1024, 8192)],
        "nt_xent": [{"N": N, "D": 128} for N in (*SMALL, 4096)],
        "queue": [{"N": N, "M": 4096, "D": 128} for N in SMALL]
        + [{"N": 256, "M": 65536, "D": 128}],
        "siglip": [{"N": N, "D": 512} for N in (*SMALL, 4096)],
        "sup_con": [{"N": N, "D": 128} for N in (*SMALL, 4096)],
    },
    "cuda": {
        "clip": [{"N": N, "D": D} for N in (256, 1024, 4096, 16384, 32768) for D in (128, 512)]
        + [{"N": 16384, "D": 1024}],
        "clip_stored": [{"N": 16384, "D": 1024}],
        "nt_xent": [{"N": N, "D": 128} for N in (256, 1024, 4096, 16384)],
        "queue": [{"N": 256, "M": 65536, "D": 128}, {"N": 1024, "M": 65536, "D": 256}],
        "siglip": [{"N": N, "D": 512} for N in (256, 1024, 4096, 16384)],
        "sup_con": [{"N": N, "D": 128} for N in (1024, 8192)],
    },
}
_WIDE = [{"N": N, "D": D} for N, D in ((256, 2048), (4096, 1024), (2048, 8192))]
_GRAM = {
    "vicreg": _WIDE,
    "barlow_twins": _WIDE,
    "koleo": [{"N": N, "D": 1024} for N in (256, 4096)],
    "topk": [{"N": 1024, "M": 65536, "D": 384}],
}
SIZES = {device: sizes | _GRAM for device, sizes in SIZES.items()}
# A product of fp16 matrices takes eager CPU torch 40 times as long as one of bf16: no baseline.
DTYPES = {case: ["float32"] if case in _GRAM else ["float32", "bfloat16"] for case in SIZES["cpu"]}
# Products of all rows with all keys and exponentials of each pair that must be computed; a product
# of a matrix with itself is half a product.
WORK = {
    "clip": (4, 2),
    "clip_stored": (3, 2),
    "nt_xent": (2.5, 1.5),
    "queue": (2, 1),
    "siglip": (3, 1),
    "sup_con": (2.5, 1.5),
    "vicreg": (3, 0),
    "barlow_twins": (3, 0),
    "koleo": (0.5, 0),
    "topk": (1, 0),
}
SCALING = [  # case, the size that grows, its values, others, expected exponent
    ("clip", "N", (512, 1024, 2048, 4096), {"D": 256}, 2),
    ("clip", "D", (128, 256, 512, 1024), {"N": 1024}, 1),
    ("queue", "M", (8192, 16384, 32768, 65536), {"N": 256, "D": 128}, 1),
    ("vicreg", "D", (1024, 2048, 4096, 8192), {"N": 512}, 1),
]
_NAMES = {"vicreg": "VICRegLoss", "barlow_twins": "BarlowTwinsLoss", "koleo": "KoLeoLoss"}


def work(case: str, dtype: str, N: int, D: int, M: int | None = None) -> Work:
    products, exponentials = WORK[case]
    rows, keys = (2 * N, 2 * N) if case == "nt_xent" else (N, M or N)
    if case in ("vicreg", "barlow_twins", "koleo"):
        keys = min(N, D)
    item = getattr(torch, dtype).itemsize
    traffic = 2 * (rows + (M or N)) * D * item  # features read, gradients written
    return Work(rows, keys, D, products, exponentials, traffic)


def make(
    case: str, dtype: str, device: str, N: int, D: int, M: int | None = None
) -> tuple[dict, list[str]]:
    """Providers by name, "ours" first and the baseline next: each gives the loss and its gradients,
    or the cosines; and the names of the absent."""
    generator = torch.Generator().manual_seed(0)
    a, b, bank = (
        torch.randn(rows, D, generator=generator).to(device, getattr(torch, dtype))
        for rows in (N, N, M or 0)
    )
    if case == "topk":
        return {
            "ours": lambda: fastssl.ops.topk_cosine(a, bank, 20)[:1],
            "eager": lambda: (normalize(a) @ normalize(bank).T).topk(20, dim=1)[:1],
        }, []
    b = a + 2 * b  # views that resemble each other: of strangers the scale's gradient cancels
    losses, inputs, absent = _losses(case, a, b, bank)
    inputs = [x.requires_grad_() for x in inputs]

    def run(loss, inputs):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    found = {name: lambda loss=loss: run(loss, inputs) for name, loss in losses.items()}
    if len(losses) > 1:
        compiled = torch.compile(list(losses.values())[1], dynamic=False)
        found["compiled"] = lambda: run(compiled, inputs)
    if case == "clip" and device == "cuda":  # their scale takes no gradient
        for name, build in {"memeff": _memeff, "inf_cl": lambda: _inf_cl(D)}.items():
            add(found, absent, name, lambda: _without_scale(build(), run, inputs))  # noqa: B023
    return found, absent


def _losses(case: str, a, b, bank) -> tuple[dict, list, list[str]]:
    """By name, their inputs, and the names of the absent."""
    scale, bias = (torch.tensor(x, device=a.device) for x in (14.3, -10.0))
    found, absent = {}, []
    if case in ("clip", "clip_stored"):
        found["ours"] = fastssl.losses.ClipLoss(store_logits=case == "clip_stored")
        add(found, absent, "open_clip ClipLoss", lambda: library("open_clip.loss").ClipLoss())
        return found, [normalize(a), normalize(b), scale], absent
    if case == "siglip":
        found["ours"] = fastssl.losses.SigLipLoss()
        add(found, absent, "open_clip SigLipLoss", lambda: library("open_clip.loss").SigLipLoss())
        return found, [normalize(a), normalize(b), scale, bias], absent
    if case == "nt_xent":
        found["ours"] = fastssl.losses.NTXentLoss(0.2)
        add(found, absent, "lightly NTXentLoss", lambda: library("lightly.loss").NTXentLoss(0.2))
        return found, [a, b], absent
    if case == "queue":
        queue = normalize(bank)
        columns = queue.T.contiguous()  # each in the layout it would have in a model
        found["ours"] = lambda q: fastssl.ops.queue_nce(
            q, b, queue, temperature=0.2, normalize=True
        )
        found["eager MoCo"] = lambda q: _moco(q, b, columns)
        return found, [a], absent
    if case == "sup_con":
        labels = torch.randint(0, 100, (len(a),), generator=torch.Generator().manual_seed(0))
        labels, ours = labels.to(a.device), fastssl.losses.pml.SupConLoss(0.1)
        found["ours"] = lambda z: ours(z, labels)

        def theirs():
            loss = library("pytorch_metric_learning.losses").SupConLoss(0.1)
            return lambda z: loss(z, labels)

        add(found, absent, "pytorch-metric-learning SupConLoss", theirs)
        return found, [a], absent
    name = _NAMES[case]
    found["ours"] = getattr(fastssl.losses, name)()
    add(found, absent, f"lightly {name}", lambda: getattr(library("lightly.loss"), name)())
    return found, [a] if case == "koleo" else [a, b], absent


def _moco(q, k, queue, temperature=0.2):
    """The loss of MoCo's algorithm 1; queue (D, M)."""
    q, k = normalize(q, dim=1), normalize(k, dim=1).detach()
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def _without_scale(loss, run, inputs):
    return lambda: run(loss, inputs[:2])


def _memeff():
    return library("memeff").MemoryEfficientCLIPLoss(1 / 14.3, True, stable=False)


def _inf_cl(D: int):
    flash = library("inf_cl").cal_flash_loss

    def loss(x, y):
        both = (flash(*pair, scale=14.3, head_dim=min(D, 256)) for pair in ((x, y), (y, x)))
        return sum(one.mean() for one in both) / 2

    return loss
