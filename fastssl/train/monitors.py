"""What the features are worth while a run goes on: online probe and kNN, RankMe, spread, memory.

All look at rows the step has computed anyway: the backbone's output for the first view, in training
mode, detached. Nothing here touches the method, its gradients or torch's generator, so the weights
are the same bits with and without it. Every rank takes part in every step and holds the same state.

    probe_top1   share of images, of those the probe never trains on, that it classifies rightly
    knn_top1     the same of all images, by the 20 nearest recent features of other images
    rankme       effective rank of the recent features, scaled to length 1 (arXiv 2210.02885)
    feature_std  deviation of this step's features of length 1, times sqrt(D): 0 is collapse
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ranks import Ranks

ROWS = 256
"""Rows of a step that are looked at, over all ranks: bounds the cost for large batches."""
RING = 4096
"""Recent features kept. They are at most 16 steps old, so that a network that moves slowly hardly
makes them differ; a held-out set would cost forward passes of its own."""
HELD_OUT = 8
"""The probe is tested on one image in so many, always the same ones."""
WINDOW = 1024
"""Accuracies are means over about so many of the last predictions."""
QUERIES, NEIGHBOURS, TEMPERATURE = 128, 20, 0.07
LR, MOMENTUM = 2.0, 0.9
"""Of the probe. Its inputs have length 1 on average, and a bias, so that whatever the width the
Hessian of the logistic loss is at most 1, for which steps below 2 (1 + momentum) are stable."""
READ_STEPS = 5
"""Records that hold these numbers are at least so far apart; reading costs as much as many steps'
watching."""
LARGEST_PROBE = 1 << 25
"""Weights; of more, as with a folder of a million classes, neither accuracy is measured."""


class Monitor:
    """Watches a backbone while entered; `step` after every forward, `read` where a record is due.

    Args:
        backbone: the network that trains; its features are (rows, D), D = `feature_dim`.
        source: the training data: `num_classes`, and its length.
        ranks: the processes of the run.
        on: otherwise only the memory is measured.
    """

    def __init__(self, backbone: nn.Module, source, ranks: Ranks, *, on: bool = True):
        self._backbone, self._ranks, self._on = backbone, ranks, on
        self._rows: list[Tensor] = []
        self._seen = 0  # rows written to the ring
        self._last = None  # places in the ring of this step's rows
        if not on:
            return
        D, C = backbone.feature_dim, source.num_classes
        size, device = min(RING, len(source)), ranks.device
        self._probed = C > 1 and C * (D + 1) <= LARGEST_PROBE
        classes = C if self._probed else 0
        self._state = {
            "weight": torch.zeros(classes, D + 1, device=device),  # the last column is the bias
            "velocity": torch.zeros(classes, D + 1, device=device),
            "ring_h": torch.zeros(size, D, device=device, dtype=torch.float16),
            "ring_y": torch.full((size,), -1, device=device),
            "ring_index": torch.full((size,), -1, device=device),
            "probe": torch.zeros(2, device=device),  # right, counted
            "knn": torch.zeros(2, device=device),
        }

    def __enter__(self) -> "Monitor":
        self._hook = self._backbone.register_forward_hook(self._collect) if self._on else None
        return self

    def __exit__(self, *exception) -> None:
        if self._hook is not None:
            self._hook.remove()

    @torch.compiler.disable  # a graph would be made anew for each number of rows already there
    def _collect(self, backbone: nn.Module, inputs, h) -> None:
        # However the method cuts its views into calls, the first rows of a step are the first view.
        if backbone.training and isinstance(h, Tensor) and h.dim() == 2:
            self._rows.append(h.detach())

    @torch.no_grad()
    def step(self, label: Tensor, index: Tensor) -> None:
        """Take in this rank's features of a step. label (B,) int64, -1 where none; index (B,).

        Labels of several classes an image, (B, classes), count as none.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return
        count = max(1, min(len(index), ROWS // self._ranks.world))
        h = self._ranks.rows(torch.cat(rows)[:count].float())  # (n, D), n over all ranks
        y = label if label.dim() == 1 and self._probed else torch.full_like(index, -1)
        y, index = self._ranks.rows(torch.stack((y, index), 1)[:count].to(h.device)).unbind(1)
        finite = h.isfinite().all(1)  # fp16 may overflow in a step that is then left out
        h, y = h.where(finite[:, None], 0), y.where(finite, -1)
        if self._probed:
            self._step_probe(h, y, index)
        state, size = self._state, len(self._state["ring_y"])
        self._last = (self._seen + torch.arange(len(h), device=h.device)) % size
        state["ring_h"][self._last] = F.normalize(h, dim=1).half()
        state["ring_y"][self._last], state["ring_index"][self._last] = y, index
        self._seen += len(h)

    def _step_probe(self, h: Tensor, y: Tensor, index: Tensor) -> None:
        """Test on the held-out rows of h (n, D), then one step of softmax regression on the rest.

        x = (h - mean) / sd / sqrt(D), mean and sd over the rows
        p = softmax(W [x, 1]),  dW = mean_i (p_i - onehot(y_i)) [x_i, 1]^T
        """
        x = F.batch_norm(h, None, None, training=True, eps=1e-8) * h.shape[1] ** -0.5
        x = F.pad(x, (0, 1), value=1.0)
        held_out = (index * 0x9E3779B1 >> 16) % HELD_OUT == 0  # scatters any order of classes
        labelled = y >= 0
        logits = x @ self._state["weight"].T  # (n, C)
        right = (logits.argmax(1) == y) & held_out
        counted = torch.stack((right.sum(), (held_out & labelled).sum()))
        self._average("probe", counted, len(h) / HELD_OUT)
        train = (labelled & ~held_out).float()
        dlogits = logits.softmax(1)
        dlogits.scatter_add_(1, y.clamp_min(0)[:, None], dlogits.new_full((len(y), 1), -1.0))
        dlogits *= (train / train.sum().clamp_min(1))[:, None]
        self._state["velocity"].mul_(MOMENTUM).add_(dlogits.T @ x)
        self._state["weight"].sub_(self._state["velocity"], alpha=LR)

    def _average(self, name: str, counted: Tensor, rows: float) -> None:
        self._state[name].mul_(max(0.0, 1 - rows / WINDOW)).add_(counted)

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The numbers of this moment, the same on all ranks; what cannot be known is left out."""
        numbers = {}
        if self._last is not None:
            filled = self._state["ring_h"][: self._seen].float()
            numbers = {"rankme": _rankme(filled), "feature_std": self._feature_std()}
            if self._probed:
                self._query_neighbours(filled)
                for name in ("probe", "knn"):
                    right, counted = self._state[name].tolist()
                    if counted > 0:
                        numbers[f"{name}_top1"] = right / counted
        return {**numbers, "peak_memory_mb": self._ranks.largest(_peak_memory_mb(self._backbone))}

    def _feature_std(self) -> float:
        h = self._state["ring_h"][self._last].float()
        return (h.std(0, correction=0).mean() * h.shape[1] ** 0.5).item()

    def _query_neighbours(self, h: Tensor) -> None:
        """Classify rows of this step by the ring h (R, D); views of the same image do not vote."""
        state, rows = self._state, self._last[-QUERIES:]
        ring_y, ring_index = (state[key][: len(h)] for key in ("ring_y", "ring_index"))
        y, index = ring_y[rows], ring_index[rows]
        similarity = h[rows] @ h.T
        similarity.masked_fill_((index[:, None] == ring_index) | (ring_y < 0), -torch.inf)
        similarity, nearest = similarity.topk(min(NEIGHBOURS, len(h)))
        votes = ((similarity - similarity[:, :1]) / TEMPERATURE).exp().nan_to_num(0.0)
        score = votes.new_zeros(len(y), len(state["weight"]))
        score.scatter_add_(1, ring_y[nearest].clamp_min(0), votes)
        counted = (y >= 0) & (score.amax(1) > 0)
        right = (score.argmax(1) == y) & counted
        self._average("knn", torch.stack((right.sum(), counted.sum())), len(y))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to measure the same; the same on all ranks."""
        return {**self._state, "seen": self._seen} if self._on else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; from nothing where it is empty or of other data."""
        if not self._on or any(
            key not in state or state[key].shape != mine.shape for key, mine in self._state.items()
        ):
            return
        for key, mine in self._state.items():
            mine.copy_(state[key])
        self._seen = state["seen"]


def _rankme(h: Tensor) -> float:
    """As `fastssl.evaluate.rankme`, from the eigenvalues of the smaller Gram matrix of h (N, D)."""
    h = h.double()
    gram = h.T @ h if h.shape[1] < len(h) else h @ h.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def _peak_memory_mb(backbone: nn.Module) -> int:
    """Largest so far in 10^6 bytes: of the GPU's tensors, or on a CPU of the whole process."""
    device = next(backbone.parameters()).device
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    import resource  # not on Windows

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 1e6)
