"""Where the tokens of a window lie on the map, and how they are loaded and stored."""

from typing import NamedTuple

import triton
import triton.language as tl

from vlmfast.kernels.common import load_pieces, store_pieces

# Whether tokens are added to fill the windows, before or after the shift: the PADDING parameter.
NO_PADDING = tl.constexpr(0)
WRAP_PADDED = tl.constexpr(1)
WRAP_UNPADDED = tl.constexpr(2)


class Geometry(NamedTuple):
    """A map and its windows: sizes along height and width, and the windows of the whole batch."""

    map_size: tuple[int, int]
    grid: tuple[int, int]  # windows
    shift: tuple[int, int]
    num_windows: int


class Place(NamedTuple):
    """Where tokens lie, (M,): row and column of the map, whether on it, and whether padding."""

    y: tl.tensor
    x: tl.tensor
    inside: tl.tensor
    is_padding: tl.tensor


@triton.jit
def piece_tokens(first, PIECES: tl.constexpr, i: tl.constexpr):
    return first + PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))


@triton.jit
def source_on_axis(place, size, padded_size, shift, SHIFTED: tl.constexpr, PADDING: tl.constexpr):
    """Where on one axis of the map the places of the shifted, padded map come from.

    Gives their indices, and whether they come from the map at all.
    """
    source = place
    if SHIFTED:
        wrap = size if PADDING == WRAP_UNPADDED else padded_size
        source = place + shift % wrap
        source = tl.where(source >= wrap, source - wrap, source)
    return source, (place if PADDING == WRAP_UNPADDED else source) < size


@triton.jit
def locate_tokens(
    tokens,
    window,
    geometry,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Where tokens of a window lie.

    `tokens` count through the window row by row; those beyond it are neither map nor padding.
    """
    map_size, grid, shift = geometry.map_size, geometry.grid, geometry.shift
    exists = tokens < WINDOW[0] * WINDOW[1]
    place_y = window // grid[1] % grid[0] * WINDOW[0] + tokens // WINDOW[1]
    place_x = window % grid[1] * WINDOW[1] + tokens % WINDOW[1]
    padded_y, padded_x = grid[0] * WINDOW[0], grid[1] * WINDOW[1]
    y, inside_y = source_on_axis(place_y, map_size[0], padded_y, shift[0], SHIFTED, PADDING)
    x, inside_x = source_on_axis(place_x, map_size[1], padded_x, shift[1], SHIFTED, PADDING)
    inside = exists
    if PADDING != NO_PADDING:
        inside = exists & inside_y & inside_x
    return Place(y, x, inside, exists & ~inside)


@triton.jit
def holds_regions(window, geometry):
    """Whether the shift put a window together from parts of the map that are no neighbours."""
    grid, shift = geometry.grid, geometry.shift
    in_last_row = window // grid[1] % grid[0] == grid[0] - 1
    in_last_column = window % grid[1] == grid[1] - 1
    return (in_last_row & (shift[0] > 0)) | (in_last_column & (shift[1] > 0))


@triton.jit
def not_hoisted(tokens, window, geometry):
    """The same tokens, in a way that what is computed of them stays within the loop over windows.

    The compiler would keep it in registers from window to window, which has none to spare.
    """
    return tokens + window // geometry.num_windows  # + 0


@triton.jit
def region_of_tokens(tokens, window, geometry, WINDOW: tl.constexpr):
    """Numbers the parts: which of the last shift rows and columns tokens are in."""
    grid, shift = geometry.grid, geometry.shift
    tokens = not_hoisted(tokens, window, geometry)
    in_last_row = window // grid[1] % grid[0] == grid[0] - 1
    in_last_column = window % grid[1] == grid[1] - 1
    wrapped_y = in_last_row & (tokens >= (WINDOW[0] - shift[0]) * WINDOW[1])
    wrapped_x = in_last_column & (tokens % WINDOW[1] >= WINDOW[1] - shift[1])
    return 2 * wrapped_y.to(tl.int32) + wrapped_x.to(tl.int32)


@triton.jit
def token_pointers(tensor, window, head, place, geometry, D: tl.constexpr, UNIT: tl.constexpr):
    """Addresses (M, 1) of a head's first channel in the located tokens; in 64 bits."""
    grid, strides = geometry.grid, tensor.strides
    batch = window // (grid[0] * grid[1])
    pointer = tensor.pointer + tl.cast(batch, tl.int64) * strides[0] * UNIT
    pointer += tl.cast(head, tl.int64) * D * strides[3]
    offsets = place.y.to(tl.int64) * strides[1] * UNIT + place.x.to(tl.int64) * strides[2] * UNIT
    return pointer + offsets[:, None]


@triton.jit
def load_tokens(
    tensor,
    window,
    head,
    place,
    geometry,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Split tile (M, D) of a head in the located tokens; those not on the map read as 0."""
    pointers = token_pointers(tensor, window, head, place, geometry, D, UNIT)
    return load_pieces(pointers, tensor.strides[3], place.inside, D, PIECES, CHECK)


@triton.jit
def store_tokens(
    tensor,
    window,
    head,
    place,
    geometry,
    tiles,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write a split tile to the located tokens, but those not on the map."""
    pointers = token_pointers(tensor, window, head, place, geometry, D, UNIT)
    store_pieces(pointers, tensor.strides[3], place.inside, tiles, D, PIECES)
