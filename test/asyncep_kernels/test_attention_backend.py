"""SGLang's attention backend of ours against SGLang's own, on the same pools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from asyncep_sgl.rank import cpu_attention as cpu_backend
from asyncep_sgl.rank.cpu_attention import CpuPrefillBackend

HEADS, KV_HEADS, DIM = 4, 2, 32


class Pool:
    """The part of SGLang's KV pool that backends use."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = torch.randn(rows, KV_HEADS, DIM, generator=generator).to(dtype)
        self.v = torch.randn(rows, KV_HEADS, DIM, generator=generator).to(dtype)

    def set_kv_buffer(self, _layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[where.loc] = k.view(-1, KV_HEADS, DIM)
        self.v[where.loc] = v.view(-1, KV_HEADS, DIM)

    def get_key_buffer(self, _layer: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, _layer: int) -> torch.Tensor:
        return self.v


def layer(**changed: Any) -> SimpleNamespace:
    fields = {
        "layer_id": 0,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": DIM,
        "v_head_dim": DIM,
        "scaling": DIM**-0.5,
        "logit_cap": 0.0,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": AttentionType.DECODER,
    }
    return SimpleNamespace(**{**fields, **changed})


def batch(new: list[int], prefix: list[int], mode: ForwardMode = ForwardMode.EXTEND) -> tuple[Any, torch.Tensor]:
    """A forward batch and its ``req_to_token``; the first two sequences share 40 tokens of prefix."""
    lengths = [n + p for n, p in zip(new, prefix, strict=True)]
    rows = torch.zeros(len(new) + 1, max(lengths), dtype=torch.int32)
    free = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(3)).int() + 1
    start, out = 0, []
    for index, (n, length) in enumerate(zip(new, lengths, strict=True)):
        rows[index + 1, :length] = free[start : start + length]
        start += length
        if index == 1 and min(prefix[:2]) >= 40:
            rows[2, :40] = rows[1, :40]
        out.append(rows[index + 1, length - n : length])
    found = SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=torch.arange(1, len(new) + 1),
        seq_lens=torch.tensor(lengths),
        extend_prefix_lens=torch.tensor(prefix),
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens=torch.tensor(new),
        extend_seq_lens_cpu=new,
        out_cache_loc=torch.cat(out).long(),
        encoder_lens=None,
    )
    return found, rows


def backend(kind: type[TorchNativeAttnBackend], pool: Pool, rows: torch.Tensor) -> Any:
    return kind(
        SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=rows), token_to_kv_pool=pool)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(
    ("new", "prefix", "changed"),
    [
        ([70, 9, 130], [40, 45, 0], {}),
        ([70, 9, 130], [0, 0, 0], {}),
        ([70, 9, 130], [40, 45, 0], {"sliding_window_size": 25}),
        ([70, 9], [40, 45], {"attn_type": AttentionType.ENCODER_ONLY}),
    ],
)
def test_prefill_equals_torch_native(
    dtype: torch.dtype, tolerance: float, new: list[int], prefix: list[int], changed: dict[str, Any]
) -> None:
    forward, rows = batch(new, prefix)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(sum(new), HEADS * DIM, generator=generator).to(dtype)
    k, v = (torch.randn(sum(new), KV_HEADS * DIM, generator=generator).to(dtype) for _ in range(2))
    results, pools = [], []
    for kind in (TorchNativeAttnBackend, CpuPrefillBackend):
        pool = Pool(2000, dtype)
        attention = backend(kind, pool, rows)
        attention.init_forward_metadata(forward)
        results.append(attention.forward_extend(q, k, v, layer(**changed), forward).float())
        pools.append(pool)
    stock, ours = results
    assert ours.shape == stock.shape
    assert (ours - stock).abs().max() <= tolerance
    assert torch.equal(pools[0].k, pools[1].k)
    assert torch.equal(pools[0].v, pools[1].v)


def test_rows_that_pad_a_batch_are_left_alone() -> None:
    forward, rows = batch([20, 30], [0, 0])
    attention = backend(CpuPrefillBackend, Pool(2000, torch.bfloat16), rows)
    attention.init_forward_metadata(forward)
    q = torch.randn(64, HEADS * DIM).bfloat16()
    out = attention.forward_extend(q, None, None, layer(), forward)
    assert out.shape == q.shape
    assert not out[50:].any()


def test_decode_is_the_parents() -> None:
    forward, rows = batch([1, 1], [44, 50], ForwardMode.DECODE)
    forward.extend_seq_lens_cpu = forward.extend_prefix_lens_cpu = None
    q, k, v = (torch.randn(2, n * DIM).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))
    results = []
    for kind in (TorchNativeAttnBackend, CpuPrefillBackend):
        attention = backend(kind, Pool(2000, torch.bfloat16), rows)
        attention.init_forward_metadata(forward)
        results.append(attention.forward_decode(q, k, v, layer(), forward))
    assert torch.equal(*results)


def test_take_over_serves_the_default_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", ATTENTION_BACKENDS["torch_native"])
    cpu_backend.take_over()
    assert ATTENTION_BACKENDS["torch_native"] is ATTENTION_BACKENDS[cpu_backend.NAME] is cpu_backend.create
