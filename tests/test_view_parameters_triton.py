"""The Triton kernel of `view_parameters` against the reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import view_parameters as kernels
from test_view_parameters import MANY, spec_of
from triton_cases import DEVICE

from fastssl.ops.view_parameters import view_parameters_ref


@pytest.mark.parametrize(("seed", "epoch"), [(1, 1), (2**40 + 3, 2**32 - 1)])
def test_bits_of_the_reference(seed, epoch):
    """fp64 whose last bit may differ, rounded to fp32: equal but once in some 2^28 numbers."""
    index = torch.randint(0, 2**56, (70,))
    sizes = torch.cat((torch.randint(1, 5, (35, 2)), torch.randint(1, 900, (35, 2))))
    args = [x.to(DEVICE) for x in (index, sizes, spec_of(*MANY))]
    expected = view_parameters_ref(index, sizes, spec_of(*MANY), seed, epoch)
    assert torch.equal(kernels.view_parameters(*args, seed, epoch).cpu(), expected)


def test_no_samples():
    args = [x.to(DEVICE) for x in (torch.arange(0), torch.zeros(0, 2).long(), spec_of(*MANY))]
    assert kernels.view_parameters(*args, 0, 0).shape == (len(MANY), 0, 20)
