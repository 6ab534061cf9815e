"""From a loaded shard to a rank that gathers: what is missing, who has it, how long it takes."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.experts.gather.device import Device, TorchDevice
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, LayerSource, slot_layout
from asyncep_sgl.experts.gather.log import GatherBook
from asyncep_sgl.experts.gather.peak import gemm_flops_per_second
from asyncep_sgl.experts.group.view import ViewClient
from asyncep_sgl.experts.shard.manager import ExpertManager
from asyncep_sgl.experts.sources.cuda import CudaSource
from asyncep_sgl.experts.sources.device_managers import DeviceExpertManager, PinnedExpertManager
from asyncep_sgl.experts.sources.files import FileSource
from asyncep_sgl.experts.sources.peer_source import PeerSource
from asyncep_sgl.experts.sources.pinned import PinnedSource
from asyncep_sgl.experts.sources.remote import RemoteReader

logger = logging.getLogger(__name__)

# Of a matrix product that shows a device's peak; a CPU's shows at less.
_PEAK_EXTENT = 8192


def _torch_device(device: torch.device) -> Device:
    return TorchDevice(device.index)


def missing_layers(manager: ExpertManager) -> list[GatheredLayer]:
    """The layers of which this host lacks experts, in order."""
    found = []
    for layer in sorted(manager.layouts):
        missing = manager.missing(layer)
        if missing:
            parameters = {name: parameter.data for name, parameter in manager.parameters(layer).items()}
            found.append(GatheredLayer(layer, parameters, slot_layout(parameters, missing)))
    return found


def peer_source(manager: ExpertManager, group: GroupConfig, name: str = "rank") -> PeerSource:
    """Where a rank takes experts of other hosts from. ``name``: another for each source of a rank."""
    return PeerSource(
        RemoteReader(f"asyncep-{name}-{group.node}-{manager.rank}-{os.getpid()}"),
        ViewClient(group.exporter_address),
        node=group.node,
        nodes=group.nodes,
        verify=group.verify == "every",
    )


def start_gather(
    manager: ExpertManager,
    group: GroupConfig,
    model: str,
    decoder_layers: int,
    log: bool,
    *,
    device: torch.device | None = None,
    device_of: Callable[[torch.device], Device] = _torch_device,
    source: LayerSource | None = None,
) -> tuple[ExpertGather, GatherBook] | None:
    """Waits for the other hosts, connects to them and measures; None if this host has every expert.

    To be called once the rank's own shard is complete.

    Args:
        model: the checkpoint's folder.
        decoder_layers: of the whole model.
        log: write a line for each batch.
        device: what this rank computes on; the CPU by default.
        device_of: streams and events of it.
        source: where missing experts come from; by default what the manager and the group say.
    """
    layers = missing_layers(manager)
    if not layers:
        return None
    dtype = layers[0].parameters["w13_weight"].dtype
    if source is not None:
        pass
    elif isinstance(manager, DeviceExpertManager) and device is not None:
        source = CudaSource(
            device_of(device), manager.shards(), rank=manager.rank, ranks=manager.ranks, lanes=group.lanes
        )
    elif isinstance(manager, PinnedExpertManager) and device is not None:
        source = PinnedSource(device_of(device), lambda layer, name: manager.parameters(layer)[name].data)
    elif group.nodes == 1:
        source = FileSource(sorted(Path(model).glob("*.safetensors")), str(dtype).removeprefix("torch."))
    else:
        source = peer_source(manager, group)
    gather = ExpertGather(layers, source, group.depth, device or "cpu")
    # The first connects, and warms caches.
    gather.measure(rounds=1)
    seconds = statistics.median(gather.measure())
    if device is None or device.type == "cpu":
        peak = gemm_flops_per_second(dtype)
    else:
        peak = gemm_flops_per_second(dtype, _PEAK_EXTENT, device=device)
    nbytes = max(entry.slot.nbytes for entry in layers)
    logger.info(
        "rank %d gathers %d layers of up to %d bytes: %.1f ms each, %.0f MB/s; peak %.0f GFLOP/s",
        manager.rank, len(layers), nbytes, seconds * 1e3, nbytes / seconds / 1e6, peak / 1e9,
    )  # fmt: skip
    gather.begin()
    book = GatherBook(manager.rank, decoder_layers, len(layers), nbytes, seconds, peak, group.margin, log)
    return gather, book
