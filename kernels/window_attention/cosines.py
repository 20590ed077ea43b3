"""Rows divided by their lengths, whose products are cosines, and the gradient of that."""

import triton
import triton.language as tl

from vlmfast.kernels.common import row_inner_products

NORM_FLOOR = tl.constexpr(1e-12)  # cosines divide by max(|x|, 1e-12), as torch normalises
LARGEST_INVERSE_NORM = tl.constexpr(1e12)


@triton.jit
def shrink_rows(tiles):
    """A split tile in float32, each row times a power of two; and these (M,).

    They leave the largest element of a row below 4, so that squares do not overflow, and never make
    a row longer. float16 holds nothing that long.
    """
    most = tl.max(tl.abs(tiles[0].to(tl.float32)), 1)
    for i in tl.static_range(1, len(tiles)):
        most = tl.maximum(most, tl.max(tl.abs(tiles[i].to(tl.float32)), 1))
    exponents = 255 - (most.to(tl.int32, bitcast=True) >> 23)
    exponents = tl.minimum(tl.maximum(exponents, 1), 127)
    factors = (exponents << 23).to(tl.float32, bitcast=True)
    shrunk = ()
    for i in tl.static_range(len(tiles)):
        shrunk = shrunk + (tiles[i].to(tl.float32) * factors[:, None],)
    return shrunk, factors


@triton.jit
def normalize_rows(tiles):
    """The rows of a split tile times 1 / max(|x|, 1e-12), in the tile's dtype; and that (M,)."""
    rows = tiles
    factors = tl.full([tiles[0].shape[0]], 1.0, tl.float32)
    if tiles[0].dtype != tl.float16:
        rows, factors = shrink_rows(tiles)
    norms = tl.math.sqrt_rn(row_inner_products(rows, rows))
    inverse = tl.math.div_rn(tl.full(norms.shape, 1.0, tl.float32), tl.maximum(norms, NORM_FLOOR))
    normalized = ()
    for i in tl.static_range(len(tiles)):
        row = rows[i].to(tl.float32) * inverse[:, None]
        normalized = normalized + (row.to(tiles[i].dtype),)
    return normalized, inverse * factors


@triton.jit
def normalization_gradient(gradients, normalized, inverse):
    """Gradient of x from that of y = x / max(|x|, 1e-12), and y . gradient (M,).

    It is (gradient - y (y . gradient)) / |x|; below the floor the divisor is a constant.
    """
    products = row_inner_products(gradients, normalized)
    along = tl.where(inverse < LARGEST_INVERSE_NORM, products, 0.0)
    results = ()
    for i in tl.static_range(len(normalized)):
        across = gradients[i] - normalized[i].to(tl.float32) * along[:, None]
        results = results + (across * inverse[:, None],)
    return results, products
