"""What several kernels compute of split tiles, on the device."""

import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E, row_inner_products


@triton.jit
def select_tiles(condition, yes, no):
    """Rows of one split tile where `condition` (M,) holds, of another elsewhere."""
    selected = ()
    for i in tl.static_range(len(yes)):
        selected = selected + (tl.where(condition[:, None], yes[i], no[i]),)
    return selected


@triton.jit
def sum_of_rows(tiles):
    """Sums over the rows of a split tile, (1, width) each, in float32."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums = sums + (tl.sum(tiles[i].to(tl.float32), 0)[None, :],)
    return sums


@triton.jit
def add_tiles(left, right):
    sums = ()
    for i in tl.static_range(len(left)):
        sums = sums + (left[i] + right[i],)
    return sums


@triton.jit
def row_statistics(grad_out_tiles, out_tiles, logsumexp, grad_logsumexp, rows, num_rows):
    """The shift and the delta of each query; rows that are none or see nothing weigh 0."""
    inside = rows < num_rows
    lse = tl.load(logsumexp + rows, mask=inside, other=float("-inf"))
    delta = row_inner_products(grad_out_tiles, out_tiles)
    if grad_logsumexp is not None:
        grad_lse = tl.load(grad_logsumexp + rows, mask=inside, other=0.0)
        delta -= tl.where(lse == float("-inf"), 0.0, grad_lse)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta
