"""SGLang's torch-native attention backend with the prefill replaced by `asyncep_kernels.attention`.

Importing this module registers it as ``asyncep_cpu``. SGLang 0.5.23 asks for ``torch_native`` by name in half a dozen
places, and an unknown name gets a Triton kernel there (``mem_cache/allocation.py`` with pages of more than one
token); so ours serves under that name too once `take_over` was called.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from typing_extensions import override

from asyncep_kernels.attention import cpu
from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.attention.plan import Plan, plan
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.strategies import current
from asyncep_sgl.strategies.base import Attention

NAME = "asyncep_cpu"
_SERVED = (torch.bfloat16, torch.float32)


class CpuPrefillBackend(TorchNativeAttnBackend):  # type: ignore[misc] # upstream is untyped
    """Causal prefill by our kernel; decode, cross and bidirectional attention as the parent does them."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._workspace = Workspace()
        self._batch: Batch | None = None
        self._plans: dict[int | None, Plan] = {}

    @override
    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Reads the batch's lengths and slots once; plans are made when the first layer of a kind asks."""
        super().init_forward_metadata(forward_batch)
        self._batch = self._read(forward_batch)
        self._plans.clear()

    @override
    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Writes the new keys and values, then attends.

        Args:
            q: ``(T, Hq * D)`` or ``(T, Hq, D)``; T may exceed the batch's tokens, the rest is padding.
            k: ``(T, Hkv * D)`` or None where an earlier layer has written them; v alike.

        Returns:
            ``(T, Hq * Dv)``, as the parent.
        """
        pool = self.token_to_kv_pool
        batch = self._batch
        if batch is None or not self._is_ours(q, layer) or batch.tokens > q.shape[0]:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        heads, kv_heads, tokens = layer.tp_q_head_num, layer.tp_k_head_num, batch.tokens
        new_kv = None
        if k is not None and v is not None:
            new_kv = (
                k.reshape(-1, kv_heads, layer.qk_head_dim)[:tokens],
                v.reshape(-1, kv_heads, layer.v_head_dim)[:tokens],
            )
        out = q.new_empty(q.shape[0], heads * layer.v_head_dim)
        out[tokens:].zero_()
        asked = Attention(
            q.reshape(-1, heads, layer.qk_head_dim)[:tokens],
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self._plan(layer.sliding_window_size),
            layer.scaling,
            out[:tokens].view(tokens, heads, layer.v_head_dim),
        )
        strategy = current.rank()
        if strategy is None or not strategy.attention(asked):
            cpu.attention(
                *(asked.q, asked.k_cache, asked.v_cache, asked.plan),
                scale=asked.scale,
                new_kv=new_kv,
                out=asked.out,
                workspace=self._workspace,
            )
        return out

    def _read(self, forward_batch: Any) -> Batch | None:
        """The batch as the kernel knows it; None for one that is not a plain prefill."""
        new, prefix = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        if new is None or prefix is None or forward_batch.encoder_lens is not None:
            return None
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return None
        new, prefix = [int(length) for length in new], [int(length) for length in prefix]
        rows = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        slots = [row[: n + p] for row, n, p in zip(rows, new, prefix, strict=True)]
        return Batch(new, prefix, slots)

    def _is_ours(self, q: torch.Tensor, layer: Any) -> bool:
        """Whether this layer is causal attention over a cache in the dtype it computes in."""
        return (
            layer.attn_type == AttentionType.DECODER
            and not layer.is_cross_attention
            and not layer.logit_cap
            and not self.use_sliding_window_kv_pool
            and q.dtype in _SERVED
            and self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype == q.dtype
        )

    def _plan(self, window: int | None) -> Plan:
        window = None if window is None or window < 0 else window
        if window not in self._plans:
            if self._batch is None:
                raise RuntimeError("attention before init_forward_metadata")
            self._plans[window] = plan(self._batch, window)
        return self._plans[window]


@register_attention_backend(NAME)  # type: ignore[untyped-decorator] # upstream is untyped
def create(runner: Any) -> CpuPrefillBackend:
    """SGLang's factory of this backend."""
    return CpuPrefillBackend(runner)


def take_over() -> None:
    """Serves ``torch_native``, the plain-CPU platform's default, with this backend."""
    ATTENTION_BACKENDS["torch_native"] = create
