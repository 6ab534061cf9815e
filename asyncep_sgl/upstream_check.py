"""Whether the installed SGLang is the one that the seams were written against."""

from __future__ import annotations

import inspect
import pkgutil

from asyncep_sgl import plugin
from asyncep_sgl.errors import SeamError

# Not hooked, but used as they are by `cpu_operators`, `scheduling.direct_replies` and `layer_events`, for which it is
# SGLang's own seam for gathered experts.
RELIED_ON: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native",
        ("self", "positions", "query", "key", "offsets", "fused_set_kv_buffer_arg"),
    ),
    (
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        ("self", "output", "recv_obj"),
    ),
    ("sglang.srt.managers.detokenizer_manager.DetokenizerManager.handle_batch_token_id_out", ("self", "recv_obj")),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_output", ("self", "recv_obj")),
    ("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.bind_full_expert_weights", ("self", "weights")),
    ("sglang.srt.runtime_context.set_global_dwdp_manager", ("manager",)),
    ("sglang.srt.managers.schedule_policy.PrefillAdder.budget_state", ("self",)),
    ("sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req", ("self", "req")),
    (
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
    ),
    (
        "sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission",
        (
            "self",
            "req",
            "total_tokens",
            "host_hit_length",
            "swa_host_hit_length",
            "truncation_align_size",
            "has_chunked_req",
        ),
    ),
)


def check_upstream() -> None:
    """Compares each seam with the installed SGLang, before anything is hooked.

    Raises:
        SeamError: a target is gone or its parameters are others, named.
    """
    hooked = (
        (seam.target, seam.parameters)
        for seam in (
            *plugin.SEAMS,
            *plugin.CPU_SEAMS,
            *plugin.KERNEL_SEAMS,
            *plugin.CUDA_SEAMS,
            *plugin.CUDA_KERNEL_SEAMS,
        )
    )
    for target, parameters in (*hooked, *RELIED_ON):
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (AttributeError, ImportError) as error:
            raise SeamError(f"seam {target} is gone: {error}") from error
        if found != parameters:
            raise SeamError(f"seam {target} takes {found}, expected {parameters}")
