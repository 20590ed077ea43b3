"""The specification: against its own words in float64, and against numerical gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.reference.contrastive_loss import contrastive_loss


def features(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(shape, dtype=dtype), dim=-1).requires_grad_()


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("first_column", [0, 3, -2, 7, -5, 100])
@pytest.mark.parametrize("queries", [1, 4])
def test_statistics_are_what_their_names_say(queries, first_column):
    rows, columns, scale, bias = features(5, queries, 8), features(7, 8), number(9.0), number(-0.5)
    row_max, row_sum, row_total, positive, column_max, column_sum = contrastive_loss(
        rows, columns, scale, bias, first_column
    )
    logits = [
        [max((scale * query @ column + bias).item() for query in row) for column in columns]
        for row in rows
    ]
    others = {(i, j): x for i, row in enumerate(logits) for j, x in enumerate(row)}
    pairs = [others.pop((i, i + first_column), 0.0) for i in range(5)]
    assert_close(positive, torch.tensor(pairs).double())
    for i in range(5):
        row = [x for (k, _), x in others.items() if k == i]
        assert_close(row_max[i].item(), max(row))
        assert_close(row_sum[i].item(), sum(math.exp(x - max(row)) for x in row))
        assert_close(row_total[i].item(), sum(row))
    for j in range(7):
        column = [x for (_, k), x in others.items() if k == j]
        assert_close(column_max[j].item(), max(column))
        assert_close(column_sum[j].item(), sum(math.exp(x - max(column)) for x in column))


def test_sigmoid_sums_losses_of_the_others():
    rows, columns, scale, bias = features(5, 1, 8), features(7, 8), number(9.0), number(-3.0)
    row_max, row_sum, _, positive, *of_columns = contrastive_loss(
        rows, columns, scale, bias, 1, sigmoid=True, column_statistics=False
    )
    logits = scale * rows.squeeze(1) @ columns.T + bias
    paired = torch.eye(7, dtype=torch.bool)[1:6]
    expected = -F.logsigmoid(-logits).masked_fill(paired, 0.0).sum(1)
    assert_close(row_sum, expected)
    assert_close(positive, logits[paired])
    assert not row_max.any() and all(x.shape == (0,) for x in of_columns)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_numerical_gradients(sigmoid, queries):
    """Of what depends on max + log(sum): a maximum alone is a shift."""
    inputs = (features(4, queries, 6), features(5, 6), number(3.0), number(-1.0))

    def losses(rows, columns, scale, bias):
        row_max, row_sum, row_total, positive, column_max, column_sum = contrastive_loss(
            rows, columns, scale, bias, 1, sigmoid, not sigmoid
        )
        assert not row_max.requires_grad and not column_max.requires_grad
        if sigmoid:
            return row_sum, row_total, positive
        return row_sum.log() + row_max, row_total, positive, column_sum.log() + column_max

    def losses_with_fixed_shift(*inputs):
        return losses(*inputs)[1:3] if not sigmoid else losses(*inputs)

    assert torch.autograd.gradcheck(losses_with_fixed_shift, inputs)
    # The maxima move with the inputs, so numerical differences see them, autograd does not:
    # compare with a logsumexp instead.
    if not sigmoid:
        rows, columns, scale, bias = inputs
        logits = (scale * (rows @ columns.T)).max(1).values + bias
        paired = torch.arange(5) == torch.arange(4)[:, None] + 1
        others = logits.masked_fill(paired, -torch.inf)
        row, _, _, column = losses(*inputs)
        weights = [torch.randn_like(row), torch.randn_like(column)]
        expected = [others.logsumexp(1), others.logsumexp(0)]
        assert_close(row, expected[0])
        assert_close(column, expected[1])
        gradients = torch.autograd.grad([row, column], inputs, weights)
        truths = torch.autograd.grad(expected, inputs, weights)
        for gradient, truth in zip(gradients, truths, strict=True):
            assert_close(gradient, truth)


@pytest.mark.parametrize("n, m", [(1, 1), (0, 3), (3, 0), (0, 0)])
def test_nothing_to_compare_with(n, m):
    rows, columns, scale = features(n, 1, 4), features(m, 4), number(2.0)
    row_max, row_sum, row_total, positive, column_max, column_sum = contrastive_loss(
        rows, columns, scale
    )
    assert row_max.isneginf().all() and not row_sum.any() and not row_total.any()
    assert column_max.isneginf().all() and not column_sum.any()
    assert_close(
        positive, scale * (rows[:, 0] * columns).sum(1) if n == m else torch.zeros(n).double()
    )
    total = row_sum.sum() + row_total.sum() + positive.sum() + column_sum.sum()
    gradients = torch.autograd.grad(total, (rows, columns, scale))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_is_computed_in_float32():
    rows, columns = features(6, 2, 8), features(7, 8)
    for dtype in (torch.bfloat16, torch.float16):
        half = contrastive_loss(rows.to(dtype), columns.to(dtype), number(10.0))
        wide = contrastive_loss(rows.to(dtype).float(), columns.to(dtype).float(), number(10.0))
        for x, y in zip(half, wide, strict=True):
            assert x.dtype == torch.float32 and torch.equal(x, y)
