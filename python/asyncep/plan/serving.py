"""From a planned layout to what starts it: a command line, or what `asyncep serve` would need first. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncep.plan.planner import Option
from asyncep.sim.hardware import Cluster

_SECONDS_AN_HOUR = 3600
_MILLION = 1_000_000
# Stock SGLang's flags for a group of so many devices.
_STOCK = {
    "tp": "--tp-size {n}",
    "pp": "--pp-size {n}",
    "ep": "--tp-size {n} --ep-size {n}",
    "dp-ep": "--tp-size {n} --dp-size {n} --ep-size {n} --enable-dp-attention",
}


@dataclass(frozen=True)
class Start:
    """How a layout is started.

    Attributes:
        command: of one server.
        servers: how many of it, behind a router if there are several.
        needs: what has to be there before the command does what was planned; empty if nothing is missing.
    """

    command: str
    servers: int
    needs: tuple[str, ...]


@dataclass(frozen=True)
class MillionRows:
    """What a million requests of the workload take.

    Attributes:
        seconds: on all devices.
        device_hours: hours times devices.
        cost: in the currency of the price; None without one.
    """

    seconds: float
    device_hours: float
    cost: float | None


def start_of(option: Option, cluster: Cluster, model: str, config: Mapping[str, Any]) -> Start:
    """The command line for a layout.

    Args:
        model: as it was named.
        config: its Hugging Face configuration.
    """
    group, strategy = option.deployment.group, option.strategy
    servers = max(1, cluster.devices // group)
    if strategy in _STOCK:
        return Start(f"sglang serve --model-path {model} {_STOCK[strategy].format(n=group)}", servers, ())
    if strategy == "replicated" or group == 1:
        # Ranks that need nothing of each other are one server's.
        most = min(cluster.devices, cluster.per_node)
        group = next(size for size in range(most, 0, -1) if cluster.devices % size == 0)
        servers = cluster.devices // group
    flags = [f"--dp-size {group}", f"--asyncep-strategy {strategy}"]
    memory = option.deployment.memory
    on_gpu = cluster.device.name != "cpu-core"
    if strategy == "asyncep":
        if on_gpu and memory and memory.host:
            flags.append("--asyncep-transport pinned")
    else:
        # Where weights are gathered, the server measures how large a batch has to be.
        flags.append(f"--asyncep-threshold-tokens {option.result.lane_tokens}")
    if not option.deployment.limits.cache_tokens:
        flags.append("--asyncep-kv-free")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if option.deployment.model.dtype == "bf16" and stored != "bfloat16":
        flags.append("--dtype bfloat16")
    command = f"asyncep serve --model-path {model} {' '.join(flags)}"
    return Start(command, servers, tuple(_needs(option, cluster, config, group)))


def million_rows(option: Option, devices: int, price: float | None) -> MillionRows:
    """Time and cost of a million requests.

    Args:
        price: of a device an hour; None if it is not known.
    """
    seconds = _MILLION / option.result.requests_per_second
    hours = seconds / _SECONDS_AN_HOUR * devices
    return MillionRows(seconds, hours, None if price is None else hours * price)


def _needs(option: Option, cluster: Cluster, config: Mapping[str, Any], group: int) -> list[str]:
    from asyncep_sgl.config.model_support import check_supported
    from asyncep_sgl.errors import AsyncEPError

    needs = []
    on_gpu = cluster.device.name != "cpu-core"
    try:
        check_supported(config, device="gpu" if on_gpu else "cpu")
    except AsyncEPError as error:
        needs.append(str(error))
    if option.deployment.model.dtype not in ("bf16", "fp32"):
        needs.append("asyncep serve takes bf16 and fp32 experts, not " + option.deployment.model.dtype)
    if on_gpu and group > cluster.per_node:
        needs.append("asyncep serve shares experts between hosts on CPUs only (--nnodes)")
    if on_gpu:
        needs.append("nothing of asyncep serve has run on a GPU yet")
    return needs
