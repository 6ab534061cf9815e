"""Whether the installed SGLang is the one that the seams were written against."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from asyncep_sgl import plugin
from asyncep_sgl.errors import SeamError

# Not hooked, but used as they are by the modules of `rank`. For `layer_events` they are SGLang's own seam for gathered
# experts.
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
    ("sglang.srt.mem_cache.radix_cache.RadixCache._delete_leaf", ("self", "node")),
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

# Methods of ours with the name of a method of SGLang's that takes other parameters. Who calls SGLang's is a scheduler,
# and the router's tree of prefixes is in none.
HIDDEN = frozenset({"SharedRadixTree.insert", "SharedRadixTree.evict"})


def check_upstream() -> None:
    """Compares each seam with the installed SGLang, before anything is hooked.

    Raises:
        SeamError: a target is gone or its parameters are others, named.
    """
    hooked = ((seam.target, seam.parameters) for seam in plugin.all_seams())
    for target, parameters in (*hooked, *RELIED_ON):
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (AttributeError, ImportError) as error:
            raise SeamError(f"seam {target} is gone: {error}") from error
        if found != parameters:
            raise SeamError(f"seam {target} takes {found}, expected {parameters}")


def check_overrides(ours: type) -> None:
    """Compares what one of our classes overrides with the class of SGLang's that it is made from.

    Raises:
        SeamError: SGLang has no such method any more, calls it with other parameters, or has one of a name that this
            class uses for itself.
    """
    for name, own in vars(ours).items():
        if name.startswith("__") or f"{ours.__qualname__}.{name}" in HIDDEN:
            continue
        function = _function(own)
        if function is None:
            continue
        meant = getattr(function, "__override__", False)
        base = next((vars(base)[name] for base in ours.__mro__[1:] if _is_upstream(base) and name in vars(base)), None)
        where = f"{ours.__module__}.{ours.__qualname__}.{name}"
        if meant and base is None:
            raise SeamError(f"{where} overrides nothing: SGLang has no such method any more")
        if base is not None and not meant:
            raise SeamError(f"{where} has the name of a method of SGLang's; rename it, or mark it with @override")
        theirs = _function(base)
        if theirs is not None and not _takes(function, theirs):
            raise SeamError(f"{where} takes {inspect.signature(function)}, SGLang's {inspect.signature(theirs)}")


def _function(attribute: Any) -> Callable[..., Any] | None:
    """What is called; None for what is no method or property."""
    if isinstance(attribute, property):
        return attribute.fget
    if isinstance(attribute, classmethod | staticmethod):
        return attribute.__func__
    return attribute if callable(attribute) else None


def _is_upstream(base: type) -> bool:
    return base.__module__.partition(".")[0] == "sglang"


def _takes(ours: Callable[..., Any], upstream: Callable[..., Any]) -> bool:
    """Whether every call that suits upstream's parameters suits ours."""
    mine = inspect.signature(ours).parameters
    names = [name for name, one in mine.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    required = {name for name in names if mine[name].default is inspect.Parameter.empty}
    theirs = list(inspect.signature(upstream).parameters)
    same_order = [name for name in theirs if name in names] == [name for name in names if name in theirs]
    takes_rest = any(one.kind is one.VAR_KEYWORD for one in mine.values())
    return same_order and required <= set(theirs) and (takes_rest or set(theirs) <= set(names))
