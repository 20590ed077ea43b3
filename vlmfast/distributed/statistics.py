"""The statistics of a whole batch: of this process alone, or of all ranks."""

from __future__ import annotations

from torch import Tensor

from vlmfast.contrastive_statistics import Statistics, block_statistics
from vlmfast.distributed.ranks import Ranks


def everyone(own: Tensor, ranks: Ranks | None) -> Tensor:
    """The columns that `statistics` takes: those of all ranks, or in a ring this rank's own."""
    if ranks is None or ranks.ring or ranks.size == 1:
        return own
    from vlmfast.distributed.gather import gather

    return gather(own, ranks)


def statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    sigmoid: bool = False,
    column_statistics: bool = True,
    backend: str | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """`block_statistics` of this rank's own rows and own columns, among those of all ranks.

    Row i and column i of a rank are a pair.

    Args:
        rows: this rank's.
        columns: what `everyone` returned.
        ranks: all of them take part; None for this process alone.
    """
    if ranks is not None and ranks.ring and ranks.size > 1:
        from vlmfast.distributed.ring import ring_statistics

        return ring_statistics(
            rows, columns, scale, bias, sigmoid, column_statistics, backend, ranks
        )
    first_column = 0 if ranks is None else ranks.offset
    block = block_statistics(
        rows, columns, scale, bias, first_column, sigmoid, column_statistics, backend
    )
    if ranks is None or ranks.size == 1 or not column_statistics:
        return block
    from vlmfast.distributed.gather import merge_columns

    column_max, column_sum = merge_columns(block.column_max, block.column_sum, ranks)
    return block._replace(column_max=column_max, column_sum=column_sum)
