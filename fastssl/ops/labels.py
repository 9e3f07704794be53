"""Sums over the rows of one label, in place of masks of pairs."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Pairs up to which one comparison of all labels takes less time than sorting them.
SMALL = 128 * 128


def label_sums(x: Tensor, x_labels: Tensor, labels: Tensor) -> Tensor:
    """Row i: the sum of the rows of x (M, D) whose label is labels[i]."""
    M = len(x)
    if len(labels) * M <= SMALL:
        same = labels.unsqueeze(1) == x_labels
        with torch.autocast(x.device.type, enabled=False):
            return same.to(x.dtype) @ x
    ordered, order = x_labels.sort(stable=True)
    number = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # of the sorted row's label
    # As many sums as there can be labels, for how many there are only the device knows; the last
    # ones, M always, are empty. Each is added up in one order, without atomics.
    first = torch.searchsorted(number, torch.arange(M + 2, device=x.device))
    sums = embedding_bag(order, x, first, mode="sum", include_last_offset=True)
    at = torch.searchsorted(ordered, labels).clamp(max=M - 1)
    at = torch.where(ordered.index_select(0, at) == labels, number.index_select(0, at), M)
    return sums.index_select(0, at)
