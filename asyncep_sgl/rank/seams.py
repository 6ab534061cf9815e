"""Where this package sits in SGLang's scheduler, which is a rank's process."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_model, get_parallel, get_schedule

from asyncep_router.cost import ModelCost
from asyncep_router.long_lived import settle
from asyncep_sgl.config.model_support import local_folder, read_config
from asyncep_sgl.config.run import AsyncEPConfig, active_config
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.join import join_store
from asyncep_sgl.platform.cpu import AnyCpuPlatform
from asyncep_sgl.process.seam import Seam, assert_active
from asyncep_sgl.rank import cpu_operators, cuda_operators
from asyncep_sgl.rank.reports import RankReporter, RouterEventPublisher, start_beating
from asyncep_sgl.router.rank_order import ranks_take_orders, sort_waiting
from asyncep_sgl.strategies import current, registry
from asyncep_sgl.strategies.base import RankPlace

logger = logging.getLogger(__name__)

_reporter: RankReporter | None = None


def our_kernels(config: AsyncEPConfig | None) -> bool:
    """Whether this process computes with our kernels for CPUs."""
    return isinstance(current_platform, AnyCpuPlatform) and config is not None and config.settings.kernels == "ours"


def _around_scheduler(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Builds the scheduler on this rank's CPUs and on its strategy."""
    global _reporter
    assert_active()
    config = active_config()
    rank = get_parallel().dp_rank or 0
    _keep_torch_from_listening(rank)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus[rank])
        torch.set_num_threads(len(config.cpus[rank]))
    if our_kernels(config):
        take_operators()
    experts = join_store(config.transport, rank, config.ranks, config.store_address, config.group)
    cost = ModelCost.from_config(read_config(get_model().model_path, get_model().revision))
    if config.router is not None:
        RouterEventPublisher.join = "joined-events" not in config.settings.without
        _reporter = RouterEventPublisher.reporter = RankReporter(rank, config.router.report_address, cost)
        start_beating(rank, config.router.report_address)
    place = RankPlace(
        rank=rank,
        config=config,
        experts=experts,
        cost=cost,
        folder=lambda: local_folder(get_model().model_path, get_model().revision),
        device=lambda: None if config.transport == "host" else torch.device("cuda", torch.cuda.current_device()),
        tell_threshold=_reporter.threshold if _reporter is not None else lambda flops: None,
    )
    try:
        current.take(registry.of(config).rank(place))
    except Exception as error:
        experts.report_failure(error)
        raise
    with _failures_reported():
        original(*args, **kwargs)


def take_operators() -> None:
    """Our operators in the places that are no `KERNEL_SEAMS`. To be called in a scheduler, before it is built."""
    # Imported only now: they build on modules that must have been hooked before.
    from asyncep_sgl.rank.cpu_attention import take_over

    take_over()
    cpu_operators.register_fused_ops(current_platform.get_dispatch_key_name())


def _around_event_loop(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with _failures_reported():
        if "rare-collections" not in active_config().settings.without:
            settle()
        if _reporter is None:
            return original(*args, **kwargs)
        try:
            original(*args, **kwargs)
        except Exception:
            # Upstream would now end the whole server; with our router only this rank ends, and is started again.
            logger.exception("rank %d ends", _reporter.rank)
            os._exit(1)


def _before_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """The strategy learns that a batch begins, and the router what a rank would have died of."""
    if (strategy := current.rank()) is not None:
        strategy.batch_begins()
    if _reporter is not None:
        # SGLang counts a batch in the method that follows.
        _reporter.batch_started(scheduler.forward_ct + 1, batch)


def _after_batch_result(_: None, _scheduler: Any, batch: Any, *__: Any) -> None:
    """A batch's replies are out: the router learns which requests that were."""
    seconds = time.monotonic() - batch.launch_ts
    if _reporter is not None:
        _reporter.batch_done(batch, seconds)
    if (strategy := current.rank()) is not None:
        # SGLang leaves a batch that decodes the lengths of its prefill.
        decodes = batch.forward_mode.is_decode()
        lengths = () if decodes else zip(batch.extend_lens or (), batch.prefix_lens or (), strict=True)
        strategy.batch_done(list(lengths), seconds)


@contextmanager
def _failures_reported() -> Iterator[None]:
    """SGLang ends a server whose scheduler raises by signals; the launcher should know the reason, not the signal."""
    try:
        yield
    except Exception as error:
        if (strategy := current.rank()) is not None:
            strategy.failed(error)
        raise


def _after_create_weights(_: None, method: Any, layer: Any, num_experts: int, *args: Any, **kwargs: Any) -> None:
    """Expert parameters have their shape and no contents yet: the moment to put them on shared memory."""
    if (strategy := current.rank()) is not None:
        strategy.adopt(layer.layer_id, num_experts, dict(layer.named_parameters(recurse=False)))


def _around_weight_loader(
    original: Callable[..., None],
    layer: Any,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int | None,
) -> None:
    """Writes one expert's tensor only where this rank reads the expert."""
    strategy = current.rank()
    if strategy is not None and expert_id is not None and not strategy.reads(layer.layer_id, expert_id):
        return
    original(layer, param, loaded_weight, weight_name, shard_id, expert_id)


def _before_weight_loader_fused(layer: Any, *_: Any) -> None:
    """No served family stores a layer's experts in one tensor; one that did would be loaded whole by every rank."""
    if current.rank() is not None:
        raise StoreError(f"layer {layer.layer_id}: checkpoints with all experts in one tensor are not served")


def _around_weights_iterator(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], loader: Any, source: Any, **kwargs: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Leaves other ranks' experts unread on disk."""
    resolved, strategy = kwargs.get("resolved_source"), current.rank()
    if strategy is None:
        return original(loader, source, **kwargs)
    if resolved is None:
        _, files, safetensors = loader._prepare_weights(
            source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
        )
    else:
        files, safetensors = list(resolved.weight_files), resolved.use_safetensors
    if not safetensors:
        # Pickled checkpoints cannot be read in part; the loader hooks above still write only what is owned.
        return original(loader, source, **kwargs)
    return ((source.prefix + name, tensor) for name, tensor in strategy.weights(files))


def _after_calc_priority(_: None, policy: Any, waiting_queue: list[Any], *__: Any, **___: Any) -> None:
    """A rank's next batch begins with what the router wants first."""
    if _reporter is not None and not policy.enable_priority_scheduling:
        sort_waiting(waiting_queue)


def _after_prefill_adder_class(chosen: Any, _scheduler: Any) -> Any:
    """Batches are of one kind, and as large as the strategy wants them or the router counts on."""
    config, strategy = active_config(), current.rank()
    adder: Any = chosen
    # Imported only now: in this process, after the hooks.
    from asyncep_sgl.rank.flops_batches import adder_class
    from asyncep_sgl.rank.one_kind import one_kind
    from asyncep_sgl.rank.router_batches import bounded

    if strategy is not None and strategy.batch_flops is not None:
        adder = adder_class(strategy.place.cost, strategy.batch_flops)
    elif strategy and config.router and config.transport == "host" and ranks_take_orders(get_schedule()):
        # Elsewhere batches are SGLang's, which the router counts in too.
        adder = bounded(strategy.place.cost, config.settings.threshold_tokens)(chosen)
    return one_kind(adder)


def _after_output_streamer_class(chosen: Any, scheduler: Any) -> Any:
    """Replies with nothing to decode skip the detokenizer."""
    if "direct-replies" in active_config().settings.without:
        return chosen
    # Imported only now: in this process, after the hooks.
    from asyncep_sgl.rank.direct_replies import streamer_class

    return streamer_class(chosen, scheduler.ipc_channels.send_to_tokenizer.socket)


def _after_load_model(_: None, runner: Any, *args: Any, **kwargs: Any) -> None:
    """The rank's shard is written; from here on it needs every other rank's."""
    strategy = current.rank()
    if strategy is None or runner.is_draft_worker:
        return
    strategy.loaded()
    # Imported only now: SGLang's layers must have been hooked before.
    from asyncep_sgl.rank.layer_events import LayerEvents

    LayerEvents(runner.model, strategy)


def _keep_torch_from_listening(rank: int) -> None:
    """torch's store of a rank is a file in the run's folder: its server would listen on every address of the host."""
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{tempfile.mkdtemp(prefix=f'rank-{rank}-')}/store"
    # From these, which would be the store's address, SGLang's kernels for AMX name their shared memory.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(os.getpid()))


RANK_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        _around_scheduler,
        HookType.AROUND,
        ("self", "server_args", "port_args"),
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.run_event_loop",
        _around_event_loop,
        HookType.AROUND,
        ("self",),
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        _before_batch,
        HookType.BEFORE,
        ("self", "batch", "pp_proxy_tensors"),
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        _after_batch_result,
        HookType.AFTER,
        ("self", "batch", "result"),
    ),
    Seam(
        "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority",
        _after_calc_priority,
        HookType.AFTER,
        ("self", "waiting_queue", "running_batch", "processed_tokens"),
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
        _after_prefill_adder_class,
        HookType.AFTER,
        ("self",),
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        _after_output_streamer_class,
        HookType.AFTER,
        ("self",),
    ),
    Seam(
        "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.create_weights",
        _after_create_weights,
        HookType.AFTER,
        (
            "self",
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
            "with_bias",
            "extra_weight_attrs",
        ),
    ),
    Seam(
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader",
        _around_weight_loader,
        HookType.AROUND,
        ("self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
    ),
    Seam(
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader_fused",
        _before_weight_loader_fused,
        HookType.BEFORE,
        ("self", "param", "loaded_weight", "weight_name", "shard_id"),
    ),
    Seam(
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator",
        _around_weights_iterator,
        HookType.AROUND,
        ("self", "source", "resolved_source", "startup_prefetch_started", "startup_prefetch_active"),
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        _after_load_model,
        HookType.AFTER,
        ("self",),
    ),
)

# Our kernels on the plain-CPU platform.
KERNEL_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        cpu_operators.around_moe_forward_native,
        HookType.AROUND,
        ("layer", "x", "topk_output", "moe_runner_config"),
    ),
    Seam(
        # The name it is called by; hooks do not reach another name in its own module.
        "sglang.srt.layers.moe.topk.fused_topk_native",
        cpu_operators.around_fused_topk,
        HookType.AROUND,
        ("hidden_states", "gating_output", "topk", "renormalize", "correction_bias", "scoring_func"),
    ),
    Seam(
        "sglang.srt.models.utils.apply_qk_norm",
        cpu_operators.around_apply_qk_norm,
        HookType.AROUND,
        ("q", "k", "q_norm", "k_norm", "head_dim", "alt_stream", "allow_inplace"),
    ),
)

# On CUDA: experts that are not where SGLang thinks, and our kernels. Have not run on a GPU.
CUDA_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.model_loader.loader.device_loading_context",
        cuda_operators.around_device_loading,
        HookType.AROUND,
        ("module", "target_device"),
    ),
)
CUDA_KERNEL_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.forward_cuda",
        cuda_operators.around_forward_cuda,
        HookType.AROUND,
        ("self", "layer", "dispatch_output"),
    ),
)
