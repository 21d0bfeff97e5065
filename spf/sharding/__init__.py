"""What the model runs on: the one package that knows DTensors, ZeRO partitions and process groups."""

from spf.sharding.blocks import Block, Part, is_cut, local
from spf.sharding.layout import Sharding, innermost_optimizer, refuse_sharded, reshard, sees_all, shares_parameters
from spf.sharding.ranks import (
    gather_objects,
    is_first,
    object_of_rank_0,
    rank_and_ranks,
    same_on_all_ranks,
    spread_over_ranks,
)
from spf.sharding.zero import at_rest, full_shape, is_partitioned

__all__ = [
    "Block",
    "Part",
    "Sharding",
    "at_rest",
    "full_shape",
    "gather_objects",
    "innermost_optimizer",
    "is_cut",
    "is_first",
    "is_partitioned",
    "local",
    "object_of_rank_0",
    "rank_and_ranks",
    "refuse_sharded",
    "reshard",
    "same_on_all_ranks",
    "sees_all",
    "shares_parameters",
    "spread_over_ranks",
]
