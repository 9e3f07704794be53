"""Forward and backward of the contrastive losses against the libraries people use for them."""

import importlib.util

import harness
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import fastssl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = (64, 256, 1024)
CASES = {  # case, N, M, D: N rows (of each view, for clip, nt_xent and siglip) and M keys
    "cpu": [("clip", N, N, 256) for N in (*SMALL, 8192)]
    + [("clip", 1024, 1024, 512)]
    + [("clip_stored", N, N, D) for N, D in ((64, 256), (1024, 256), (1024, 512), (8192, 256))]
    + [("nt_xent", N, N, 128) for N in (*SMALL, 4096)]
    + [("queue", N, 4096, 128) for N in SMALL]
    + [("queue", 256, 65536, 128)]
    + [("siglip", N, N, 512) for N in (*SMALL, 4096)]
    + [("sup_con", N, N, 128) for N in (*SMALL, 4096)],
    "cuda": [("clip", N, N, D) for N in (256, 1024, 4096, 16384, 32768) for D in (128, 512)]
    + [("clip", 16384, 16384, 1024), ("clip_stored", 16384, 16384, 1024)]
    + [("nt_xent", N, N, 128) for N in (256, 1024, 4096, 16384)]
    + [("queue", N, 65536, D) for N, D in ((256, 128), (1024, 256))]
    + [("siglip", N, N, 512) for N in (256, 1024, 4096, 16384)]
    + [("sup_con", N, N, 128) for N in (1024, 8192)],
}
# A product of fp16 matrices takes eager CPU torch 40 times as long as one of bf16: no baseline.
DTYPES = ("float32", "bfloat16")
# What must be computed: products of all rows with all keys, and exponentials of each pair.
WORK = {
    "clip": (4, 2),
    "clip_stored": (3, 2),
    "nt_xent": (2.5, 1.5),
    "queue": (2, 1),
    "siglip": (3, 1),
    "sup_con": (2.5, 1.5),
}
COMPILED = [("clip", 512), ("nt_xent", 128), ("queue", 128), ("queue", 256), ("siglip", 512)]
library = pytest.importorskip


def moco(q, k, queue, temperature=0.2):
    """The loss of MoCo's algorithm 1; queue (D, M)."""
    q, k = normalize(q, dim=1), normalize(k, dim=1).detach()
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def make(case: str, N: int, M: int, D: int, dtype: str, device: str) -> dict:
    """Ours, the baseline and others by name: each gives the loss and its gradients."""
    generator = torch.Generator().manual_seed(0)
    a, b, queue = (torch.randn(rows, D, generator=generator) for rows in (N, N, M))
    b = a + 2 * b  # views that resemble each other: of strangers the scale's gradient cancels
    a, b, queue = (x.to(device, getattr(torch, dtype)) for x in (a, b, queue))
    scale, bias = (torch.tensor(x, device=device) for x in (14.3, -10.0))
    if case in ("clip", "clip_stored"):
        losses = {
            "ours": fastssl.losses.ClipLoss(store_logits=case == "clip_stored"),
            "open_clip ClipLoss": library("open_clip.loss").ClipLoss(),
        }
        inputs = [normalize(a), normalize(b), scale]
    elif case == "siglip":
        losses = {
            "ours": fastssl.losses.SigLipLoss(),
            "open_clip SigLipLoss": library("open_clip.loss").SigLipLoss(),
        }
        inputs = [normalize(a), normalize(b), scale, bias]
    elif case == "nt_xent":
        losses = {
            "ours": fastssl.losses.NTXentLoss(0.2),
            "lightly NTXentLoss": library("lightly.loss").NTXentLoss(0.2),
        }
        inputs = [a, b]
    elif case == "queue":
        queue = normalize(queue)
        columns = queue.T.contiguous()  # each in the layout it would have in a model

        def queue_nce(q):
            return fastssl.ops.queue_nce(q, b, queue, temperature=0.2, normalize=True)

        losses = {"ours": queue_nce, "eager MoCo": lambda q: moco(q, b, columns)}
        inputs = [a]
    else:
        labels = torch.randint(0, 100, (N,), generator=generator).to(device)
        ours = fastssl.losses.pml.SupConLoss(0.1)
        theirs = library("pytorch_metric_learning.losses").SupConLoss(0.1)
        losses = {
            "ours": lambda z: ours(z, labels),
            "pytorch-metric-learning SupConLoss": lambda z: theirs(z, labels),
        }
        inputs = [a]
    inputs = [x.requires_grad_() for x in inputs]

    def run(loss, inputs):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    providers = {name: lambda loss=loss: run(loss, inputs) for name, loss in losses.items()}
    # Compiling takes seconds a case: one width of CLIP is enough.
    if device == "cuda" and dtype == "bfloat16" and (case, D) in COMPILED:
        torch._dynamo.reset()
        compiled = torch.compile(list(losses.values())[1], dynamic=False)
        providers["compiled"] = lambda: run(compiled, inputs)
    if device == "cuda" and case == "clip":
        for name, loss in peers(D).items():
            providers[name] = lambda loss=loss: run(loss, inputs[:2])
    return providers


def peers(D: int) -> dict:
    """Fused CLIP losses of others, where installed; their scale takes no gradient."""
    found = {}
    if importlib.util.find_spec("memeff"):
        import memeff

        found["memeff"] = memeff.MemoryEfficientCLIPLoss(1 / 14.3, True, stable=False)
    if importlib.util.find_spec("inf_cl"):
        from inf_cl import cal_flash_loss

        def inf_cl(x, y):
            both = (cal_flash_loss(*pair, scale=14.3, head_dim=min(D, 256)) for pair in
                    ((x, y), (y, x)))  # fmt: skip
            return sum(loss.mean() for loss in both) / 2

        found["inf_cl"] = inf_cl
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case,N,M,D", CASES[DEVICE])
def test_forward_backward(benchmark, case, N, M, D, dtype):
    params = {"case": case, "N": N, "M": M, "D": D, "dtype": dtype, "device": DEVICE}
    shape = (2 * N, 2 * M) if case == "nt_xent" else (N, M)
    harness.measure(benchmark, __name__, params, shape, *WORK[case])
