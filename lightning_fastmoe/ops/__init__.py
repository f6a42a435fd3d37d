"""The computations of one MoE layer on one device. Imports only torch."""

from lightning_fastmoe.ops import traced_routing as _traced_routing  # noqa: F401  its operators
from lightning_fastmoe.ops.activation import ACTIVATIONS, apply_activation, is_gated
from lightning_fastmoe.ops.expert_layer import expert_layer, expert_mlp, unfused_layer
from lightning_fastmoe.ops.frozen_weight import FrozenWeight
from lightning_fastmoe.ops.grouped_linear import grouped_linear, put_in_place
from lightning_fastmoe.ops.grouped_mlp import LowRank, grouped_mlp
from lightning_fastmoe.ops.pair_rows import PairRows
from lightning_fastmoe.ops.pairs import PairOrder, combine_rows, gather_rows, order_pairs
from lightning_fastmoe.ops.permute import permute, unpermute
from lightning_fastmoe.ops.router_product import router_logits
from lightning_fastmoe.ops.routing import (
    ExpertOrder,
    order_by_expert,
    order_of_held,
    sigmoid_top_k,
    softmax_top_k,
    top_k,
)
from lightning_fastmoe.ops.sparse_layer import Stacks, TrainedRows, sparse_layer

__all__ = [
    "ACTIVATIONS",
    "ExpertOrder",
    "FrozenWeight",
    "LowRank",
    "PairOrder",
    "PairRows",
    "Stacks",
    "TrainedRows",
    "apply_activation",
    "combine_rows",
    "expert_layer",
    "expert_mlp",
    "gather_rows",
    "grouped_linear",
    "grouped_mlp",
    "is_gated",
    "order_by_expert",
    "order_of_held",
    "order_pairs",
    "permute",
    "put_in_place",
    "router_logits",
    "sigmoid_top_k",
    "softmax_top_k",
    "sparse_layer",
    "top_k",
    "unfused_layer",
    "unpermute",
]
