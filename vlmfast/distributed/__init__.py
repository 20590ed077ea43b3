"""Contrastive losses whose batch is spread over the ranks of a torch.distributed process group.

Rank r holds n_r of the N pairs. It computes the n_r x N block of logits between its own rows and
the columns of all ranks, once: of each of its own rows it then knows everything, and what the
blocks say of a column is merged on the rank that owns it, from (maximum, sum) pairs. Backward goes
the same way in reverse, and a rank does 1 / W of the work of one process.

    statistic      gather (the default)                       `Ring`
    columns        all-gathered, kept for backward            passed around, in backward again
    of columns     all-to-all of (maximum, sum)               travel with their columns
    their gradient all-gathered (maximum, gradient of sum)    travel with their columns
    gradient to
    the columns    summed in float32 by reduce-scatter        summed in float32 as it travels

Nothing here is an engine of its own: all communication is torch.distributed's, so a rank that dies
or stays away ends the call by the timeout of the group. Users meet `Ring` alone.

What loads torch._dynamo, to stay outside of compiled graphs, is imported where it is called, by
those who have a group.
"""

from vlmfast.distributed.ranks import Ranks, Ring, rank_in, world_size

__all__ = ["Ranks", "Ring", "rank_in", "world_size"]
