"""Every seam between this package and SGLang 0.5.23, and nothing else.

SGLang calls `register` once in each of its processes. In a process that ``asyncep serve`` did not start it does
nothing, so stock ``sglang`` stays stock on a machine where this package is installed. SGLang only logs a hook that
fails to apply, which would serve every expert replicated without a word; `assert_active` turns that into an error
with the seam's name.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.disaggregation.kv_events import EventPublisherFactory
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_model, get_parallel, get_schedule

from asyncep_router.cost import ModelCost
from asyncep_router.long_lived import settle
from asyncep_sgl import cpu_operators, cuda_operators
from asyncep_sgl.batches.mark import in_batch
from asyncep_sgl.config import AsyncEPConfig
from asyncep_sgl.errors import SeamError, StoreError
from asyncep_sgl.experts.manager import join_store
from asyncep_sgl.front import lists
from asyncep_sgl.front.caller import caller
from asyncep_sgl.front.seams import FRONT_SEAMS, admit, count_answer
from asyncep_sgl.front.tokenizing import tokenize
from asyncep_sgl.lifeline import die_with
from asyncep_sgl.model_support import local_folder, read_config
from asyncep_sgl.platform import fallbacks
from asyncep_sgl.platform.cpu import AnyCpuPlatform
from asyncep_sgl.process_seams import PROCESS_SEAMS, keep_torch_from_listening
from asyncep_sgl.scheduling import questions
from asyncep_sgl.scheduling.marks import put_on
from asyncep_sgl.scheduling.rank_order import ranks_take_orders, sort_waiting
from asyncep_sgl.scheduling.reports import RankReporter, RouterEventPublisher, start_beating
from asyncep_sgl.seam import Seam
from asyncep_sgl.strategies import current, registry
from asyncep_sgl.strategies.base import RankPlace
from asyncep_sgl.validation import check_prefill_only, check_priority, check_prompt

logger = logging.getLogger(__name__)

# Name under which SGLang's KV-cache events go to our router (``--kv-events-config``).
ROUTER_PUBLISHER = "asyncep"
# Others have none, which is 0; higher goes first.
_BATCH_PRIORITY = -1
_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"

_config: AsyncEPConfig | None = None
_reporter: RankReporter | None = None


# --- scheduler process -------------------------------------------------------------------------------------------


def _around_scheduler(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Builds the scheduler on this rank's CPUs and on its strategy."""
    global _reporter
    assert_active()
    config = _active_config()
    rank = get_parallel().dp_rank or 0
    keep_torch_from_listening(rank)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus[rank])
        torch.set_num_threads(len(config.cpus[rank]))
    if _our_kernels():
        take_operators()
    experts = join_store(config.transport, rank, config.ranks, config.store_address, config.group)
    cost = ModelCost.from_config(read_config(get_model().model_path, get_model().revision))
    if config.router is not None:
        RouterEventPublisher.join = "joined-events" not in config.without
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
    from asyncep_sgl.attention.cpu_backend import take_over

    take_over()
    cpu_operators.register_fused_ops(current_platform.get_dispatch_key_name())


def _around_event_loop(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with _failures_reported():
        _settle()
        if _reporter is None:
            return original(*args, **kwargs)
        try:
            original(*args, **kwargs)
        except Exception:
            # Upstream would now end the whole server; with our router only this rank ends, and is started again.
            logger.exception("rank %d ends", _reporter.rank)
            os._exit(1)


def _before_batch(scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """The router learns what a rank would have died of."""
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
    config, strategy = _active_config(), current.rank()
    adder: Any = chosen
    # Imported only now: in this process, after the hooks.
    from asyncep_sgl.scheduling.flops_batches import adder_class
    from asyncep_sgl.scheduling.one_kind import one_kind
    from asyncep_sgl.scheduling.router_batches import bounded

    if strategy is not None and strategy.batch_flops is not None:
        adder = adder_class(strategy.place.cost, strategy.batch_flops)
    elif strategy and config.router and config.transport == "host" and ranks_take_orders(get_schedule()):
        # Elsewhere batches are SGLang's, which the router counts in too.
        adder = bounded(strategy.place.cost, config.router.threshold_tokens)(chosen)
    return one_kind(adder)


def _after_output_streamer_class(chosen: Any, scheduler: Any) -> Any:
    """Replies with nothing to decode skip the detokenizer."""
    if "direct-replies" in _active_config().without:
        return chosen
    # Imported only now: in this process, after the hooks.
    from asyncep_sgl.scheduling.direct_replies import streamer_class

    return streamer_class(chosen, scheduler.ipc_channels.send_to_tokenizer.socket)


def _after_load_model(_: None, runner: Any, *args: Any, **kwargs: Any) -> None:
    """The rank's shard is written; from here on it needs every other rank's."""
    strategy = current.rank()
    if strategy is None or runner.is_draft_worker:
        return
    strategy.loaded()
    # Imported only now: SGLang's layers must have been hooked before.
    from asyncep_sgl.layer_events import LayerEvents

    LayerEvents(runner.model, strategy)


# --- every process ------------------------------------------------------------------------------------------------


def _load_snapshot_path(_ipc_name: str) -> str:
    return _active_config().load_board


def _settle() -> None:
    if "rare-collections" not in _active_config().without:
        settle()


# --- detokenizer -------------------------------------------------------------------------------------------------


def _before_detokenizing(_manager: Any) -> None:
    _settle()


# --- front (HTTP, tokenizer) -------------------------------------------------------------------------------------


def _before_generate(manager: Any, obj: Any, request: Any = None, *_: Any, **__: Any) -> None:
    """Fields are looked at before SGLang spreads a batch over its requests."""
    admit(manager, obj, _active_config())
    # Requests of this process itself have no caller.
    check_priority(obj.priority, admin=request is None or caller.get().admin)
    if in_batch.get() and _router_has_priorities(manager.server_args):
        # Whatever a line says, others pass it.
        obj.priority = _BATCH_PRIORITY if obj.priority is None else min(obj.priority, _BATCH_PRIORITY)
    obj.http_worker_ipc = None
    if _active_config().router is not None:
        address = getattr(request, "client", None)
        put_on(obj, caller.get().name or (address.host if address else ""))


def _around_generate(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
) -> Any:
    """A long list is served in parts, so that others are heard in between."""
    _before_generate(manager, obj, request)
    some = lists.parts(obj)
    if some is None:
        return original(manager, obj, request)
    return lists.served(some, lambda part: original(manager, part, request))


def _router_has_priorities(server_args: Any) -> bool:
    """Whether a priority is the router's alone: ranks that schedule by it, or refuse it, have an order of their own."""
    return _active_config().router is not None and ranks_take_orders(server_args)


def _before_validate(manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Bad input is answered here, before it can reach a rank."""
    config = _active_config()
    check_prompt(input_ids, manager.model_config.vocab_size)
    count_answer(obj, len(input_ids or ()), config)
    sampling = getattr(obj, "sampling_params", None)
    if config.decode == "refuse" and hasattr(obj, "return_logprob"):
        check_prefill_only(sampling or {})


_WEIGHTS_ARE_SHARED = "the experts are shared by all ranks and read-only; restart asyncep serve to change weights"


async def _refuse_weights_from_disk(*_: Any, **__: Any) -> tuple[bool, str, int]:
    return False, _WEIGHTS_ARE_SHARED, 0


async def _refuse_weights(*_: Any, **__: Any) -> tuple[bool, str]:
    return False, _WEIGHTS_ARE_SHARED


_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_COMMUNICATOR = "sglang.srt.managers.communicator.FanOutCommunicator"

SEAMS: tuple[Seam, ...] = (
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
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.event_loop",
        _before_detokenizing,
        HookType.BEFORE,
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
    Seam(
        "sglang.srt.managers.load_snapshot.shm_path_for",
        _load_snapshot_path,
        HookType.REPLACE,
        ("ipc_name",),
    ),
    Seam(
        f"{_TOKENIZER}.update_weights_from_disk",
        _refuse_weights_from_disk,
        HookType.REPLACE,
        ("self", "obj", "request"),
    ),
    *(
        Seam(
            f"{_TOKENIZER}.update_weights_from_{source}", _refuse_weights, HookType.REPLACE, ("self", "obj", "request")
        )
        for source in ("tensor", "distributed", "ipc")
    ),
    Seam(f"{_COMMUNICATOR}.__call__", questions.call, HookType.REPLACE, ("self", "obj")),
    Seam(f"{_COMMUNICATOR}.handle_recv", questions.handle_recv, HookType.REPLACE, ("self", "recv_obj")),
    Seam(
        f"{_TOKENIZER}.open_session",
        questions.around_open_session,
        HookType.AROUND,
        ("self", "obj", "request"),
    ),
    Seam(
        f"{_TOKENIZER}.generate_request",
        _around_generate,
        HookType.AROUND,
        ("self", "obj", "request"),
    ),
    Seam(
        f"{_TOKENIZER}._tokenize_texts",
        tokenize,
        HookType.AROUND,
        ("self", "texts", "is_cross_encoder"),
    ),
    Seam(
        f"{_TOKENIZER}._validate_one_request",
        _before_validate,
        HookType.BEFORE,
        ("self", "obj", "input_ids"),
    ),
    *FRONT_SEAMS,
    *PROCESS_SEAMS,
)

# Needed wherever the plain-CPU platform serves, stock SGLang included.
CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul",
        fallbacks.fused_gate_sigmoid_mul,
        HookType.REPLACE,
        ("hidden_states", "gate_weight", "shared_output", "output", "do_add"),
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


def _seams() -> tuple[Seam, ...]:
    """Those of this process's run."""
    if _config is not None and _config.transport != "host":
        return (*SEAMS, *CUDA_SEAMS, *(CUDA_KERNEL_SEAMS if _config.kernels == "ours" else ()))
    return (*SEAMS, *(KERNEL_SEAMS if _our_kernels() else ()))


def _our_kernels() -> bool:
    return isinstance(current_platform, AnyCpuPlatform) and _config is not None and _config.kernels == "ours"


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    global _config
    if isinstance(current_platform, AnyCpuPlatform):
        for seam in CPU_SEAMS:
            HookRegistry.register(seam.target, seam.hook, seam.kind)
    _config = AsyncEPConfig.from_environment()
    if _config is None:
        return
    die_with(_config.launcher_pid, _config.run_directory)
    for seam in _seams():
        HookRegistry.register(seam.target, seam.hook, seam.kind)
    if _config.router is not None:
        EventPublisherFactory.register_publisher(ROUTER_PUBLISHER, RouterEventPublisher)
        # Imported only now: it subclasses what it replaces.
        from asyncep_sgl.scheduling.controller import RouterController

        HookRegistry.register(_CONTROLLER, RouterController, HookType.REPLACE)


def assert_active() -> None:
    """Checks that every seam is hooked in this process.

    Raises:
        SystemExit: one is not, named; serving on would silently do without it.
    """
    missing = [seam.target for seam in _seams() if seam.target not in HookRegistry._patched]
    if missing:
        raise SystemExit(f"asyncep: SGLang's {missing[0]} could not be hooked; is the pinned sglang==0.5.23 installed?")


def _active_config() -> AsyncEPConfig:
    if _config is None:
        raise SeamError("a hook ran in a process that has no asyncep configuration")
    return _config
