"""Compares two computations with their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.testing import assert_close


def assert_same(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> None:
    """Same shape, dtype and values, and the same gradients to the inputs."""
    assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    ours = torch.autograd.grad(ours, inputs, grad)
    for x, y in zip(ours, torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert_close(x, y)
