"""What the model runs on: the one package that knows DTensors, ZeRO partitions and process groups."""

from spf.sharding.layout import (
    Block,
    Part,
    Sharding,
    full_shape,
    innermost_optimizer,
    object_of_rank_0,
    refuse_sharded,
    reshard,
    same_on_all_ranks,
    shares_parameters,
    spread_over_ranks,
)

__all__ = [
    "Block",
    "Part",
    "Sharding",
    "full_shape",
    "innermost_optimizer",
    "object_of_rank_0",
    "refuse_sharded",
    "reshard",
    "same_on_all_ranks",
    "shares_parameters",
    "spread_over_ranks",
]
