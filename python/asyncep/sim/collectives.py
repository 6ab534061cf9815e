"""Seconds of the usual exchanges, in the latency-bandwidth model.

With P devices, a message of n bytes, bandwidth B in each direction and latency a:

    point to point   a + n / B
    all-reduce       2 (P - 1) a + 2 (P - 1) / P · n / B     ring: reduce-scatter, then all-gather
    all-gather       (P - 1) a + (P - 1) / P · n / B         n: all parts together; ring
    all-to-all       a + (P - 1) / P · n / B                 n: what one device has for all, itself included; direct

Sources: the ring's terms are those of Patarasuk and Yuan (2009) and of nccl-tests' bus bandwidth; the direct
all-to-all sends P - 1 messages over a full-duplex switch at once. Over several nodes the inner and the outer part
run on different wires, so each is computed by itself.
"""

from __future__ import annotations

from asyncep.sim.hardware import Cluster, Link


def point_to_point(size: float, link: Link) -> float:
    """Seconds for `size` bytes to the neighbour."""
    return link.latency + size / link.bandwidth


def all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds until all of `ranks` devices have the sum of `size` bytes."""
    if ranks <= 1:
        return 0.0
    return 2 * (ranks - 1) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def all_gather(size: float, ranks: int, link: Link) -> float:
    """Seconds until all have all parts, `size` bytes together. A reduce-scatter takes as long."""
    if ranks <= 1:
        return 0.0
    return (ranks - 1) * link.latency + (ranks - 1) / ranks * size / link.bandwidth


def all_to_all(size: float, ranks: int, link: Link) -> float:
    """Seconds of an even exchange in which each device has `size` bytes for all, its own share included."""
    if ranks <= 1:
        return 0.0
    return link.latency + (ranks - 1) / ranks * size / link.bandwidth


def tree_all_reduce(size: float, cluster: Cluster, ranks: int) -> float:
    """All-reduce over `ranks` devices of a cluster: reduce-scatter inside nodes, all-reduce of the parts between
    them, all-gather inside."""
    inner, nodes = _nodes(cluster, ranks)
    seconds = 2 * all_gather(size, inner, cluster.inside)
    if nodes > 1:
        seconds += all_reduce(size / inner, nodes, cluster.between)
    return seconds


def distinct(choices: int, places: int) -> float:
    """Expected number of different places that `choices` independent even choices hit: P (1 - (1 - 1/P)^k)."""
    return places * (1 - (1 - 1 / places) ** choices)


def token_exchange(tokens: float, token_bytes: float, top_k: int, cluster: Cluster, ranks: int, skew: float) -> float:
    """One of expert parallelism's two all-to-alls: `tokens` of a device to the devices of their `top_k` experts.

    A token goes to each device once however many of its experts are there (as DeepEP does), and over the network
    once to each node, from where it is passed on. `skew`: load of the busiest device over the mean; its wire is the
    bottleneck.
    """
    if ranks <= 1:
        return 0.0
    inner, nodes = _nodes(cluster, ranks)
    copies = distinct(top_k, ranks)
    size = tokens * token_bytes * skew
    # Inside: what comes for this device, from anywhere but itself.
    local = (
        cluster.inside.latency + copies * (inner - 1) / inner * size / cluster.inside.bandwidth if inner > 1 else 0.0
    )
    if nodes == 1:
        return local
    remote = distinct(top_k, nodes) * (nodes - 1) / nodes * size / cluster.between.bandwidth
    return max(local, cluster.between.latency + remote)


def weight_gather(layer_bytes: float, cluster: Cluster, ranks: int, host_share: float = 0.0) -> float:
    """t_EP: seconds in which a device fetches one layer's experts that it does not own, all devices doing so.

    Peers in the node by one link, those in other nodes by the other, at the same time; `host_share` of what a device
    owns comes from its host's memory, also at the same time. The slowest channel counts.
    """
    inner, _ = _nodes(cluster, ranks)
    seconds = 0.0
    if inner > 1:
        seconds = cluster.inside.latency + layer_bytes * (inner - 1) / ranks / cluster.inside.bandwidth
    if ranks > inner:
        away = cluster.between.latency + layer_bytes * (ranks - inner) / ranks / cluster.between.bandwidth
        seconds = max(seconds, away)
    if host_share > 0:
        seconds = max(seconds, cluster.host.latency + host_share * layer_bytes / ranks / cluster.host.bandwidth)
    return seconds


def _nodes(cluster: Cluster, ranks: int) -> tuple[int, int]:
    """(devices in a node, nodes) that `ranks` devices take up."""
    inner = min(ranks, cluster.per_node)
    return inner, -(-ranks // inner)
