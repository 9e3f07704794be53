"""DINOv2's loss objects, and DINOv3's: their arguments, names, defaults and values.

A teacher's result is a `TeacherAssignment`, scores and a bias for each prototype, which the losses
take without ever making its probabilities.
"""

import warnings
from collections.abc import Sequence
from functools import partial, partialmethod

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastssl.losses.prototypes import (
    center_bias,
    mean_of_images,
    move_center,
    never_empty,
    stacked,
    temperature_of,
    weight_of_image,
)
from fastssl.losses.ranks import check_group, described
from fastssl.ops import prototype_cross_entropy, sinkhorn_bias

__all__ = ["DINOLoss", "TeacherAssignment", "iBOTPatchLoss"]

# What answers from the scores alone, and what leaves their rows whole or is made dense.
ABOUT = {"shape", "ndim", "device", "is_cuda", "requires_grad", "dim", "size", "numel"}
OF_ROWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "chunk", "split", "detach",
}  # fmt: skip
# Python looks these up on the class, where __getattr__ is not asked.
OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv",
    "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "neg", "pos", "abs",
    "eq", "ne", "lt", "le", "gt", "ge", "contains", "array",
)  # fmt: skip


class TeacherAssignment:
    """softmax(scores / temperature + bias), in place of the tensor of these probabilities.

    Args:
        scores: (..., K); not copied: do not change them in place before the loss's backward.
        bias: (K,), or None.
        temperature: > 0.

    Notes: view, reshape, flatten, unflatten, squeeze, unsqueeze, chunk, split, iteration and
        indices into the axes before K give assignments again, at no cost; shape, dtype and the like
        cost nothing either. `dense()` makes the probabilities, once, and keeps them; all else that
        a tensor can do, and torch's functions, do so too, with a warning that names what it was.

    Example:
        >>> teacher = TeacherAssignment(torch.randn(16, 30), torch.zeros(30), 0.04)
        >>> first, second = teacher.view(2, 8, 30)
        >>> second.shape, second.dense().sum(-1).round().unique()
        (torch.Size([8, 30]), tensor([1.]))
    """

    __array_priority__ = Tensor.__array_priority__  # numpy's scalars let our operators go first

    def __init__(self, scores: Tensor, bias: Tensor | None, temperature: float):
        self.scores, self.bias, self.temperature = scores.detach(), bias, temperature
        self.dtype = torch.promote_types(scores.dtype, torch.float32)
        self.made_dense = None

    def dense(self) -> Tensor:
        if self.made_dense is None:
            logits = self.scores.to(self.dtype) / self.temperature
            if self.bias is not None:
                logits += self.bias.to(logits)
            self.made_dense = logits.softmax(-1)
        return self.made_dense

    def _dense_for(self, what: str) -> Tensor:
        if self.made_dense is None:
            warnings.warn(
                f"TeacherAssignment: {what} made its {tuple(self.shape)} probabilities. "
                "Write .dense() if they are wanted.",
                stacklevel=3,
            )
        return self.dense()

    def _rows(self, what: str, *args, **kwargs):
        scores = self.scores
        # Probabilities would be contiguous, which scores need not be.
        parts = getattr(scores, "reshape" if what == "view" else what)(*args, **kwargs)
        every = parts if isinstance(parts, tuple) else (parts,)
        if any(x.shape[-1:] != scores.shape[-1:] for x in every):
            return getattr(self._dense_for(f".{what}"), what)(*args, **kwargs)
        every = tuple(TeacherAssignment(x, self.bias, self.temperature) for x in every)
        return every if isinstance(parts, tuple) else every[0]

    def __getattr__(self, what: str):
        if what.startswith("_") or not hasattr(Tensor, what):
            raise AttributeError(f"TeacherAssignment has no {what!r}.")
        if what in ABOUT:
            return getattr(self.scores, what)
        if what in OF_ROWS:
            return partial(self._rows, what)
        return getattr(self._dense_for(f".{what}"), what)

    def _operator(self, what: str, *args, **kwargs):
        return getattr(self._dense_for(what), what)(*args, **kwargs)

    def __getitem__(self, index):
        axes = index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        if isinstance(index, (int, slice, Tensor)) and axes < self.scores.dim():
            return self._rows("__getitem__", index)
        return self._dense_for("an index")[index]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"TeacherAssignment({tuple(self.shape)}, temperature={self.temperature})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def dense(x):
            return x._dense_for(function.__name__) if isinstance(x, cls) else x

        return function(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


for _name in OPERATORS:
    setattr(
        TeacherAssignment,
        f"__{_name}__",
        partialmethod(TeacherAssignment._operator, f"__{_name}__"),
    )

Teacher = TeacherAssignment | Tensor


def _parts(teacher: Teacher | Sequence[Teacher]) -> tuple[Tensor, Tensor | None, float]:
    """scores (T, B, K) or what a single teacher has, bias (T, K) or (K,), and temperature."""
    if isinstance(teacher, Tensor):  # probabilities: softmax(log q) is q
        return teacher.log(), None, 1.0
    if isinstance(teacher, TeacherAssignment):
        return teacher.scores, teacher.bias, teacher.temperature
    scores, biases, temperatures = zip(*map(_parts, teacher), strict=True)
    if len(scores) == 1:
        return scores[0].unsqueeze(0), biases[0], temperatures[0]
    if any(bias is None for bias in biases) or len(set(temperatures)) > 1:
        dense = [x.dense() if isinstance(x, TeacherAssignment) else x for x in teacher]
        return _parts(torch.stack(dense))
    return torch.stack(scores), torch.stack(biases), temperatures[0]


class _Loss(nn.Module):
    """What both have: the centre, the two teachers, and the cross-entropy with one of them."""

    def __init__(self, center: Tensor, student_temp: float, center_momentum: float, group):
        super().__init__()
        name = type(self).__name__
        check_group(name, group)
        self.student_temp = temperature_of(name, "student_temp", student_temp)
        self.center_momentum, self.group = center_momentum, group
        self.register_buffer("center", center)

    def extra_repr(self) -> str:
        text = f"{self.center.numel()}, student_temp={self.student_temp}"
        return described(f"{text}, center_momentum={self.center_momentum}", self.group)

    def init_weights(self) -> None:
        self.center.zero_()

    def apply_center_update(self) -> None:
        """Nothing: the centre has moved in `update_center`."""

    def _centred(self, scores: Tensor, temperature: float) -> TeacherAssignment:
        name = type(self).__name__
        temperature = temperature_of(name, "teacher_temp", temperature)
        bias = center_bias(name, self.center, scores, temperature)
        return TeacherAssignment(scores, bias, temperature)

    def _move_center(self, scores: Tensor) -> None:
        move_center(type(self).__name__, self.center, scores, self.center_momentum, self.group)

    def _sinkhorn(self, scores: Tensor, temperature: float, n_iters: int) -> TeacherAssignment:
        temperature = temperature_of(type(self).__name__, "teacher_temp", temperature)
        bias = sinkhorn_bias(scores.flatten(0, -2), temperature, n_iters, group=self.group)
        return TeacherAssignment(scores, bias, temperature)

    def _cross_entropy(self, student: Tensor, teacher, **options) -> Tensor:
        scores, bias, temperature = _parts(teacher)
        return prototype_cross_entropy(
            student, scores, bias=bias, student_temperature=self.student_temp,
            teacher_temperature=temperature, group=self.group, **options,
        )  # fmt: skip


class DINOLoss(_Loss):
    """Cross-entropy of a teacher's assignment with a student; drop-in for dinov2.loss.DINOLoss.

    H_st = mean over the rows of H(q_t, softmax(y_s / student_temp)), q the teacher's assignment;
    its sum over all pairs of a list (v2), or mean over those of a tensor (v3).

    Args:
        out_dim: K.
        student_temp: > 0.
        center_momentum: m of the centre, which becomes m c + (1 - m) mean x.
        group: whose ranks' rows are one batch, as in `fastssl.ops.prototype_cross_entropy`. Ours.

    Methods: sinkhorn_knopp_teacher(scores, teacher_temp, n_iterations=3) and
        softmax_center_teacher(scores, teacher_temp) make a `TeacherAssignment` of scores (.., K);
        update_center(scores) moves the centre, at once: apply_center_update() does nothing, and
        update_centers, as v3 gives it to softmax_center_teacher, is not looked at.
        init_weights() sets the centre to 0, as v3 needs it.

    Shapes: student a list of scores (B, K), or (S, B, K); teacher an assignment or probabilities,
        whose rows sum to 1, of shape (T, B, K), or a list of such (B, K). ignore_diagonal leaves
        out the pairs s = t. The names of v2's arguments are taken as well as v3's. Returns a
        float32 scalar.

    Buffer: center (1, K), as DINOv2's, in the state dict.

    Raises:
        TypeError, ValueError: as `fastssl.ops.sinkhorn_bias`,
            `fastssl.ops.prototype_cross_entropy`; a width that is not K.

    Memory: one copy of the scores of a list, in their dtype, unless they are parts of one tensor,
        as those of `chunk`; no probabilities, unless they are given: then their logarithms.

    Notes: over several ranks the value is the mean over the rows of all, the peer's that over a
        rank's own; gradients after DistributedDataParallel's mean are the same. The centre is the
        mean of the rows of all ranks, the peer's weighs ranks equally. It moves at once, in the
        peer at the next softmax_center_teacher, which sees the same; a checkpoint between the two
        has here what would be lost there.

    Example:
        >>> loss = DINOLoss(30)
        >>> teacher = loss.sinkhorn_knopp_teacher(torch.randn(16, 30), teacher_temp=0.04)
        >>> loss(torch.randn(6, 8, 30), teacher.unflatten(0, (2, 8))).shape
        torch.Size([])

    Paper: DINOv2, arXiv:2304.07193; DINOv3, arXiv:2508.10104.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, *, group=None
    ):
        super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum, group)

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> TeacherAssignment:
        return self._centred(teacher_output, teacher_temp)

    def update_center(self, teacher_output: Tensor) -> None:
        self._move_center(teacher_output)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> TeacherAssignment:
        return self._sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_logits: Tensor | Sequence[Tensor] | None = None,
        teacher_probs: Teacher | Sequence[Teacher] | None = None,
        ignore_diagonal: bool = False,
        *,
        student_output_list: Sequence[Tensor] | None = None,
        teacher_out_softmaxed_centered_list: Teacher | Sequence[Teacher] | None = None,
    ) -> Tensor:
        student = student_logits if student_output_list is None else [*student_output_list]
        teacher = teacher_out_softmaxed_centered_list
        teacher = teacher_probs if teacher is None else teacher
        if student is None or teacher is None:
            raise TypeError(
                "DINOLoss: forward takes student_logits and teacher_probs, or a "
                "student_output_list and a teacher_out_softmaxed_centered_list. Give both."
            )
        if isinstance(student, Tensor):
            return self._cross_entropy(student, teacher, ignore_diagonal=ignore_diagonal)
        student = stacked("DINOLoss", "student_output_list", student)
        if not isinstance(teacher, Sequence) and teacher.dim() != 3:
            raise ValueError(
                "DINOLoss: the teacher of a list of student crops must be (T, B, K), or a list of "
                f"(B, K), got {tuple(teacher.shape)}. Use .view(T, B, K)."
            )
        S, T = len(student), len(teacher)
        mean = self._cross_entropy(student, teacher, ignore_diagonal=ignore_diagonal)
        return (S * T - min(S, T) * ignore_diagonal) * mean


class iBOTPatchLoss(_Loss):
    """DINO's loss of masked tokens, averaged by image; drop-in for dinov2.loss.iBOTPatchLoss.

    loss = 1 / images sum_i 1 / n(i) H(q_i, softmax(y_i / student_temp)), i over masked tokens,
    n(i) how many the image of i has, q the teacher's assignment.

    Args:
        patch_out_dim: K.
        student_temp, center_momentum, group: as in `DINOLoss`.

    Methods: as in `DINOLoss`, scores by the name of teacher_patch_tokens but in
        sinkhorn_knopp_teacher, which takes n_masked_patches_tensor as well.

    Shapes: `forward`: student and teacher (images, N, K), student_masks_flat (images, N), all
        tokens, of which the masked count. `forward_masked`: student and teacher (M, K) of the
        masked tokens, image by image, student_masks_flat (images, N) bool; n_masked_patches: only
        so many rows count; masks_weight (M,): the factors, instead of 1 / n(i). Teachers are
        assignments or probabilities. Returns a float32 scalar.

    Buffer: center (1, 1, K), as DINOv2's, in the state dict.

    Raises:
        TypeError, ValueError: without masks_weight, a mask that is not boolean or, on a CPU, has
            not M entries True (elsewhere the loss is NaN); and as in `DINOLoss`.

    Memory: as in `DINOLoss`.

    Notes: the number of masked patches cancels in Sinkhorn-Knopp: n_masked_patches_tensor is not
        looked at, and not changed, as the peer does, which needs torch.distributed for it. Without
        a masked token the loss is 0. Over several ranks as in `DINOLoss`; the mean is that over
        the images of all.

    Example:
        >>> loss, masks = iBOTPatchLoss(30), torch.rand(4, 49) < 0.4
        >>> student, scores = torch.randn(2, int(masks.sum()), 30).unbind()
        >>> teacher = loss.sinkhorn_knopp_teacher(scores, teacher_temp=0.04)
        >>> loss.forward_masked(student, teacher, student_masks_flat=masks).shape
        torch.Size([])

    Paper: iBOT, arXiv:2111.07832; DINOv2, arXiv:2304.07193.
    """

    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        group=None,
    ):
        super().__init__(torch.zeros(1, 1, patch_out_dim), student_temp, center_momentum, group)

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_patch_tokens: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> TeacherAssignment:
        return self._centred(teacher_patch_tokens, teacher_temp)

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        self._move_center(teacher_patch_tokens)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> TeacherAssignment:
        return self._sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: Teacher,
        student_masks_flat: Tensor,
    ) -> Tensor:
        masks = student_masks_flat.float()
        weight = (masks / masks.sum(-1, keepdim=True).clamp(min=1)).flatten()
        student, teacher = (x.flatten(0, 1) for x in (student_patch_tokens, teacher_patch_tokens))
        return self._mean_of_images(student, teacher, weight, len(masks))

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Teacher,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        student = student_patch_tokens_masked[:n_masked_patches]
        teacher = teacher_patch_tokens_masked[:n_masked_patches]
        weight = masks_weight
        if weight is None:
            weight = weight_of_image("iBOTPatchLoss", student_masks_flat, len(student))
        return self._mean_of_images(student, teacher, weight, len(student_masks_flat))

    def _mean_of_images(self, student: Tensor, teacher, weight: Tensor, images: int) -> Tensor:
        scores, bias, temperature = _parts(teacher)
        student, scores, weight = never_empty(student, scores, weight)
        teacher = TeacherAssignment(scores, bias, temperature)
        total = self._cross_entropy(student, teacher, sample_weight=weight, reduction="sum")
        return mean_of_images(self, total, images)
