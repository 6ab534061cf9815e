"""An SGLang plug-in for benches: stock SGLang's layouts across hosts on CPUs, on our kernels if asked.

`emulation/layouts.py` puts it on PYTHONPATH beside an entry point, so only a bench's servers load it. With
``ASYNCEP_BASELINE_KERNELS=ours`` a rank computes with the operators that `asyncep serve` has; without, this only
repairs what does not run on a CPU. Nothing here changes what a layout sends or when.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

KERNELS_VARIABLE = "ASYNCEP_BASELINE_KERNELS"


def _around_scheduler(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Once SGLang's modules have been hooked: some learn that this is a CPU, and our operators take their places."""
    from sglang.srt.layers import logits_processor
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor import forward_batch_info

    # Upstream means its own CPU engine by this. Here it decides on pinned memory and GPU kernels only.
    forward_batch_info._is_cpu = logits_processor._is_cpu = True
    # Then padding asks for this, which only the backend of that engine has.
    AttentionBackend.get_cpu_graph_seq_len_fill_value = _fill_value
    if os.environ.get(KERNELS_VARIABLE) == "ours":
        from asyncep_sgl.rank.seams import take_operators

        take_operators()
    original(*args, **kwargs)


def _all_gather_into_tensor(group: Any, output: Any, input: Any) -> None:
    """Upstream's goes through an operator that is registered for GPUs only."""
    group._all_gather_into_tensor(output, input)


def _reduce_scatter_tensor(group: Any, output: Any, input: Any) -> None:
    group._reduce_scatter_tensor(output, input)


def _reduce_scatterv(group: Any, input_: Any, output: Any = None, sizes: Any = None) -> Any:
    """Upstream's needs NCCL; its deterministic way, an all-reduce of which each rank keeps its part, does not."""
    return group._deterministic_reduce_scatterv(input_, output, sizes)


def _inplace_all_reduce(tensor: Any, group_name: str) -> None:
    from sglang.srt.distributed import parallel_state

    parallel_state._groups[group_name]()._all_reduce_in_place(tensor)


def _memcpy(dst: Any, src: Any, dim: int, offset: Any, sz: Any, offset_src: bool) -> None:
    """Upstream has both; which is used hangs on a variable that wants builds of sgl-kernel too."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(dst, src, dim, offset, sz, offset_src)


def _fill_value(_backend: Any) -> int:
    """Length of the sequences that pad a batch; torch_native has none because it captures no graphs."""
    return 1


def _event_loop(controller: Any) -> None:
    """Dispatches as upstream does, but sleeps while there is nothing: upstream's takes half a core from a rank."""
    import zmq
    from sglang.srt.managers.data_parallel_controller import sock_recv

    poller = zmq.Poller()
    poller.register(controller.recv_from_tokenizer, zmq.POLLIN)
    while True:
        controller.soft_watchdog.feed()
        if not poller.poll(1000):
            continue
        while True:
            try:
                request = sock_recv(controller.recv_from_tokenizer, zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            controller._request_dispatcher(request)


_GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
# Target, what takes its place, and why it has to.
REPAIRS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    (f"{_GROUP}.all_gather_into_tensor", _all_gather_into_tensor, "registered for GPUs only"),
    (f"{_GROUP}.reduce_scatter_tensor", _reduce_scatter_tensor, "registered for GPUs only"),
    (f"{_GROUP}.reduce_scatterv", _reduce_scatterv, "NCCL only"),
    ("sglang.srt.distributed.parallel_state.inplace_all_reduce", _inplace_all_reduce, "registered for GPUs only"),
    ("sglang.srt.layers.dp_attention.memcpy", _memcpy, "Triton only"),
    (
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.get_cuda_graph_seq_len_fill_value",
        _fill_value,
        "missing in torch_native",
    ),
    (
        "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
        _event_loop,
        "polls without sleeping",
    ),
)


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from asyncep_sgl.rank.seams import KERNEL_SEAMS

    for target, repair, _ in REPAIRS:
        HookRegistry.register(target, repair, HookType.REPLACE)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _around_scheduler, HookType.AROUND)
    if os.environ.get(KERNELS_VARIABLE) == "ours":
        for seam in KERNEL_SEAMS:
            HookRegistry.register(seam.target, seam.hook, seam.kind)
