"""Reads what the command line names: devices, links, models, workloads. Every error says which flag is meant."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from asyncep.sim import hardware
from asyncep.sim.errors import DataError, SimulationError
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.paper_mix import SYNTHETIC_TOKENS, real_mix, synthetic
from asyncep.sim.traces import read_azure, read_mooncake
from asyncep.sim.work import Model
from asyncep.sim.workloads import TimedPrompt, few_shot_mix, long_inputs, random_tokens
from asyncep_router.errors import ConfigError, RouterError

SAMPLE_TOKENS = 2_000_000
"""Of a file so many tokens are read: enough for its averages."""
WORKLOADS = ("few-shot", "long", "mix", *(f"synthetic-{name}" for name in SYNTHETIC_TOKENS))

# An owner and a name, as the hub has them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BYTES = {"": 1e9, "gb/s": 1e9, "mb/s": 1e6, "gbit/s": 0.125e9, "mbit/s": 0.125e6}


class InputError(SimulationError, ValueError):
    """A flag has a value it cannot have; the message begins with the flag."""


@dataclass(frozen=True)
class NamedModel:
    """A model as it was named.

    Attributes:
        start_as: what a server is started with: a folder or a hub name.
        config: its Hugging Face configuration.
    """

    start_as: str
    config: Mapping[str, Any]


def read_config(value: str) -> NamedModel:
    """A known name, a `config.json`, a folder with one, or a hub name. Raises `InputError` naming --model."""
    path = Path(value)
    if value in hardware.models():
        known = hardware.model_config(value)
        return NamedModel(known["_name_or_path"], known)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        file = _from_hub(value)
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--model {value!r}: {file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--model {value!r}: {file} holds no configuration")
    return NamedModel(str(path.parent) if path.is_file() else value, config)


def _from_hub(value: str) -> Path:
    known = ", ".join(hardware.models())
    if not _HUB_NAME.fullmatch(value):
        raise InputError(f"--model {value!r}: no such file, and not one of {known}, nor a hub name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(value, "config.json"))
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise InputError(
            f"--model {value!r}: the hub has no config.json of that name, or cannot be reached "
            f"({type(error).__name__}); give a file, or one of {known}"
        ) from error


def read_model(value: str, dtype: str) -> Model:
    """See `read_config`. Raises `InputError` naming --model or --dtype."""
    path, config = Path(value), read_config(value).config
    try:
        return Model.from_config(path.stem if path.suffix else path.name, config, dtype)
    except DataError as error:
        raise InputError(f"--dtype {dtype}: {error}") from error
    except RouterError as error:
        raise InputError(f"--model {value!r}: {error}") from error


def read_link(flag: str, value: str) -> Link:
    """A known name, or a bandwidth such as 360GB/s, 0.76Gbit/s, 45 (GB/s). Raises `InputError` naming `flag`."""
    if value in hardware.links():
        return hardware.link(value)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z/]*)", value.strip().lower())
    if not match or match[2] not in _BYTES or not float(match[1]) > 0:
        known = ", ".join(hardware.links())
        raise InputError(f"{flag} {value!r}: give a bandwidth (360GB/s, 0.76Gbit/s) or one of {known}")
    return Link(value, float(match[1]) * _BYTES[match[2]], 5e-6)


def read_cluster(
    gpus: str, *, link: str | None, between: str | None, host: str | None, per_node: int | None, host_gb: float | None
) -> Cluster:
    """`gpus`: COUNTxNAME, such as 8xh100, or COUNTxFILE.json for a device of one's own. Raises `InputError`."""
    match = re.fullmatch(r"([0-9]+)[xX](.+)", gpus.strip())
    if not match or int(match[1]) < 1:
        raise InputError(f"--gpus {gpus!r}: write COUNTxNAME, such as 8xh100")
    try:
        if match[2].endswith(".json"):
            cluster = replace(_own_device(gpus, Path(match[2])), devices=int(match[1]))
            cluster = cluster if per_node is None else replace(cluster, per_node=per_node)
        else:
            cluster = hardware.cluster(match[2].lower(), int(match[1]), per_node=per_node)
    except DataError as error:
        raise InputError(f"--gpus {gpus!r}: {error}") from error
    changes: dict[str, Any] = {}
    for field, flag, value in (
        ("inside", "--link", link),
        ("between", "--between", between),
        ("host", "--host-link", host),
    ):
        if value is not None:
            changes[field] = read_link(flag, value)
    if host_gb is not None:
        if not host_gb >= 0:
            raise InputError(f"--host-memory {host_gb}: must be at least 0 GB")
        changes["host_bytes"] = host_gb * 1e9
    return replace(cluster, **changes)


def _own_device(gpus: str, file: Path) -> Cluster:
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--gpus {gpus!r}: {file}: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"--gpus {gpus!r}: {file} holds no object")
    return hardware.read_machine(file.stem, row)


def read_workload(value: str, seed: int = 0) -> list[TimedPrompt]:
    """A known name, a JSONL or Azure CSV file, or lengths such as 512,4096x3. Raises `InputError`."""
    if value == "few-shot":
        return few_shot_mix(1500, seed=seed)
    if value == "long":
        return long_inputs(64, seed=seed)
    if value == "mix":
        return real_mix(seed=seed, scale=0.05)
    if value.startswith("synthetic-"):
        name = value.removeprefix("synthetic-")
        try:
            return synthetic(name, max(8, SAMPLE_TOKENS // 4 // SYNTHETIC_TOKENS.get(name, 1)), seed=seed, spread=0.2)
        except ConfigError as error:
            raise InputError(f"--workload {value!r}: {error}") from error
    if re.fullmatch(r"[0-9]+(x[0-9]+)?(,[0-9]+(x[0-9]+)?)*", value):
        return _lengths(value, seed)
    path = Path(value)
    if not path.is_file():
        raise InputError(
            f"--workload {value!r}: give one of {', '.join(WORKLOADS)}, a .jsonl or .csv file, or lengths (512,4096x3)"
        )
    try:
        prompts = read_azure(path, limit=20_000) if path.suffix == ".csv" else _jsonl(path, seed)
    except (RouterError, UnicodeDecodeError) as error:
        raise InputError(f"--workload {value!r}: {error}") from error
    if not prompts:
        raise InputError(f"--workload {value!r}: no requests in it")
    return prompts


def _lengths(value: str, seed: int) -> list[TimedPrompt]:
    rng = Random(seed)
    prompts = []
    for part in value.split(","):
        length, _, count = part.partition("x")
        if not int(length) or (count and not int(count)):
            raise InputError(f"--workload {value!r}: lengths and counts must be above 0")
        for _ in range(int(count or 1)):
            prompts.append(TimedPrompt(0.0, random_tokens(rng, int(length))))
    rng.shuffle(prompts)
    return prompts


def _jsonl(path: Path, seed: int) -> list[TimedPrompt]:
    """A Mooncake trace, or lines with `tokens` and, where prompts of a `group` begin alike, `shared` tokens."""
    with path.open() as lines:
        first = lines.readline()
    if "hash_ids" in first:
        return read_mooncake(path, limit=2_000)
    rng = Random(seed)
    heads: dict[str, array[int]] = {}
    groups: dict[str, int] = {}
    prompts: list[TimedPrompt] = []
    total = 0
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                tokens, shared, group = int(row["tokens"]), int(row.get("shared", 0)), str(row.get("group", ""))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"--workload {path}:{number}: expected hash_ids (a Mooncake trace) or "
                    f'{{"tokens": 900, "shared": 600, "group": "task 1"}}: {error!r}'
                ) from error
            if not 0 <= shared <= tokens or tokens < 1:
                raise InputError(
                    f"--workload {path}:{number}: tokens={tokens}, shared={shared}: need 0 <= shared <= tokens"
                )
            head = heads.setdefault(group, array("q"))
            if len(head) < shared:
                head.extend(random_tokens(rng, shared - len(head)))
            index = groups.setdefault(group, len(groups))
            prompts.append(
                TimedPrompt(0.0, head[:shared] + random_tokens(rng, tokens - shared), index if shared else -1, shared)
            )
            total += tokens
            if total >= SAMPLE_TOKENS:
                break
    return prompts
