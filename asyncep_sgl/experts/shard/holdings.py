"""Which experts of which layer lie where, from the flags and the sizes of the layers. Pure.

The launcher asks it whether a run gathers, by the sizes in the model's configuration; each rank lays its layers out by
it, by the sizes of its tensors, and refuses to serve where that comes to another answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from asyncep_router.cost import read_shape
from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.experts.shard.layout import GroupLayout


class MoeLayer(NamedTuple):
    """A decoder layer with experts: how many, and bytes of all of them."""

    layer: int
    experts: int
    nbytes: int


def moe_layers(config: Mapping[str, Any], item_bytes: int) -> list[MoeLayer]:
    """The layers with experts of a Hugging Face configuration; ``item_bytes`` is a weight's."""
    shape = read_shape(config)
    return [
        MoeLayer(index, layer.mlp.experts, 3 * layer.mlp.experts * layer.mlp.expert_width * shape.hidden * item_bytes)
        for index, layer in enumerate(shape.layers)
        if layer.mlp.experts
    ]


def host_layout(group: GroupConfig, ranks: int, before: Sequence[MoeLayer], layer: MoeLayer) -> GroupLayout:
    """Who keeps which experts of a layer in the memory of hosts.

    Args:
        ranks: of each host.
        before: the layers with experts before it: the first of all are kept whole, and fill the host's memory.
    """
    resident = frozenset({layer.layer} if len(before) < group.resident_layers else ())
    filled = sum(other.nbytes for other in before) + layer.nbytes
    beyond = group.memory_limit is not None and filled > group.memory_limit
    on_disk = frozenset({layer.layer} if beyond else ())
    return GroupLayout(layer.experts, group.nodes, ranks, group.copies, resident, on_disk, group.resident_experts)


def device_layout(group: GroupConfig, ranks: int, before: Sequence[MoeLayer], layer: MoeLayer) -> GroupLayout:
    """Who keeps which experts of a layer where each rank has a device of its own: a device is a host of one rank."""
    resident = frozenset({layer.layer} if len(before) < group.resident_layers else ())
    return GroupLayout(layer.experts, ranks, 1, 1, resident)


def gathers(
    group: GroupConfig, ranks: int, transport: Literal["host", "cuda", "pinned"], layers: Sequence[MoeLayer]
) -> bool:
    """Whether a rank lacks experts of any layer.

    Args:
        transport: where the experts lie, see `AsyncEPConfig.transport`.
        layers: all with experts, in order.
    """
    if transport == "pinned":
        return sum(layer.nbytes for layer in layers) > (group.memory_limit or 0)
    for place, layer in enumerate(layers):
        if transport == "cuda":
            layout = device_layout(group, ranks, layers[:place], layer)
            lacking = any(layout.missing(layer.layer, rank) for rank in range(ranks))
        else:
            lacking = bool(host_layout(group, ranks, layers[:place], layer).missing(layer.layer, group.node))
        if lacking:
            return True
    return False
