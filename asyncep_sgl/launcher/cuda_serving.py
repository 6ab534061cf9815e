"""How a model is served on GPUs: where its experts lie, and the flags that go with it. Pure. Has not run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from asyncep_router.cost import read_shape
from asyncep_sgl.config.flags import Mode
from asyncep_sgl.config.options import ServeOptions
from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher.cuda_attention import CudaHost, choose, needs_of
from asyncep_sgl.launcher.cuda_host import Gpu
from asyncep_sgl.process.host import format_bytes

Transport = Literal["cuda", "pinned"]

# Our kernels are compiled for nothing older.
LEAST_CAPABILITY = (8, 0)
# Of a device's memory, what weights and slots may take; the rest is for the KV pool, activations and workspaces.
WEIGHTS_SHARE = 0.8
# Two copy engines can be busy at once; the link is full with that.
LANES = 2
# Of a batch: four times what hides a gather from peers on H100s (docs/internals/gpu_kernels.md).
MOST_TOKENS = 65536
# Host links are slow: layers are fetched further ahead than from peers.
PINNED_DEPTH = 4


@dataclass(frozen=True)
class CudaPlan:
    """What the launcher does differently for GPUs.

    Attributes:
        transport: where the experts lie, see `AsyncEPConfig.transport`.
        group: how they are gathered.
        flags: for SGLang's command line, where the user's is silent.
        environment: for every process.
        reason: one line for the operator.
    """

    transport: Transport
    group: GroupConfig
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    reason: str

    @property
    def mode(self) -> Mode:
        """Where the experts lie, as far as flags depend on it."""
        return "gpu" if self.transport == "cuda" and self.group.devices == 1 else self.transport


@dataclass(frozen=True)
class Weights:
    """Bytes of a model.

    Attributes:
        layers: sparse layers.
        layer: the experts of the largest sparse layer.
        others: everything that is not a routed expert, in every rank.
    """

    layers: int
    layer: int
    others: int

    @classmethod
    def of(cls, config: Mapping[str, Any], item_bytes: int) -> Weights:
        """From a Hugging Face configuration."""
        shape = read_shape(config)
        sparse = [layer.mlp for layer in shape.layers if layer.mlp.experts]
        largest = max(3 * mlp.experts * mlp.expert_width * shape.hidden for mlp in sparse)
        # Embeddings, output head, attention, dense and shared experts: from above, as query heads are the most.
        others = 2 * shape.vocab * shape.hidden
        for layer in shape.layers:
            others += 4 * shape.hidden * layer.attention.heads * layer.attention.head_dim
            others += 3 * shape.hidden * layer.mlp.dense_width
        return cls(len(sparse), largest * item_bytes, others * item_bytes)


def plan(
    options: ServeOptions, config: Mapping[str, Any], gpus: Sequence[Gpu], host: CudaHost, item_bytes: int = 2
) -> CudaPlan:
    """Chooses.

    Args:
        options: the command line.
        config: of the model.
        gpus: those the ranks may use.
        host: what is installed.
        item_bytes: of one weight.

    Raises:
        UsageError: it cannot be served here; names flag and fix.
    """
    _refuse(options, gpus)
    weights = Weights.of(config, item_bytes)
    memory = int(min(gpu.memory for gpu in gpus[: options.ranks]) * WEIGHTS_SHARE) - weights.others
    asked = options.group
    group = replace(GroupConfig.of(asked), memory_limit=None, resident_layers=0)
    transport, why = _transport(options, weights, memory, group.depth)
    if transport == "cuda":
        resident = asked.resident_layers if options.ranks > 1 else 0
        group = replace(group, devices=options.ranks, resident_layers=resident, lanes=LANES)
    else:
        depth = asked.gather_depth or PINNED_DEPTH
        # The last layer stays in host memory whatever fits: with nothing there this would be the other transport.
        room = max(0, min(memory - depth * weights.layer, (weights.layers - 1) * weights.layer))
        if memory < weights.layer:
            raise UsageError(
                f"one layer's experts take {format_bytes(weights.layer)} and a GPU has {format_bytes(max(0, memory))} "
                "for them; use GPUs with more memory"
            )
        if asked.memory_limit is not None:
            kept = min(room, asked.memory_limit)
        else:
            kept = 0 if options.run.transport == "pinned" else room
        group = replace(group, memory_limit=kept, depth=min(depth, max(1, memory // weights.layer)))
    # Where batches are cut by FLOPs a long prompt is cut too, and its keys are needed for its next piece.
    kv_free = options.run.kv_free and not group.divides
    attention = choose(host, needs_of(config), requested=_requested(options.passed), kv_free=kv_free)
    # The layout of weights that our kernels and the store expect.
    flags = [*attention.flags, "--moe-runner-backend", "triton"]
    if group.divides:
        # Batches are cut by FLOPs there; the tokens of a batch are only the bound that memory sets.
        # SGLang would keep memory free for graphs in proportion to them, more than a GPU has.
        flags += ["--chunked-prefill-size", str(MOST_TOKENS), "--mem-fraction-static", "0.8"]
    environment = {
        **attention.environment,
        # Would write to all experts after loading, other ranks' too.
        "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "0",
    }
    return CudaPlan(transport, group, tuple(flags), environment, f"{why}; attention by {attention.backend}")


def _refuse(options: ServeOptions, gpus: Sequence[Gpu]) -> None:
    if options.ranks > len(gpus):
        raise UsageError(f"--dp-size {options.ranks}: a rank needs a GPU of its own and there are {len(gpus)}")
    for gpu in gpus[: options.ranks]:
        if gpu.capability < LEAST_CAPABILITY:
            major, minor = gpu.capability
            raise UsageError(f"{gpu.name} has compute capability {major}.{minor}, at least 8.0 is needed; --device cpu")
    if options.group.nodes > 1:
        raise UsageError(
            f"--nnodes {options.group.nodes}: GPUs of several hosts are not served by this version; start a server on "
            "each and python -m asyncep_router.launch_router in front of them"
        )
    if options.dtype in ("float32", "float"):
        raise UsageError(f"--dtype {options.dtype}: on GPUs experts are served in bfloat16")


def _transport(options: ServeOptions, weights: Weights, memory: int, depth: int) -> tuple[Transport, str]:
    ranks = options.ranks
    slots = depth * weights.layer if ranks > 1 else 0
    # The first layers are whole in every rank; of the others a part each.
    whole = min(options.group.resident_layers, weights.layers) if ranks > 1 else weights.layers
    needed = whole * weights.layer + (weights.layers - whole) * weights.layer // ranks + slots
    short = f"{format_bytes(needed)} of experts and slots a GPU, {format_bytes(max(0, memory))} there"
    asked = options.run.transport
    if asked == "pinned" or (asked == "auto" and options.group.memory_limit is not None):
        return "pinned", "experts in pinned host memory, as asked for"
    if needed <= memory:
        return "cuda", f"experts in the GPUs' memory ({short})"
    if asked == "cuda":
        raise UsageError(f"--asyncep-transport cuda: {short}; use more ranks (--dp-size) or --asyncep-transport pinned")
    return "pinned", f"experts in pinned host memory ({short})"


def _requested(passed: Sequence[str]) -> str | None:
    """The user's ``--attention-backend``, in either spelling."""
    for at, flag in enumerate(passed):
        if flag == "--attention-backend" and at + 1 < len(passed):
            return passed[at + 1]
        if flag.startswith("--attention-backend="):
            return flag.partition("=")[2]
    return None
