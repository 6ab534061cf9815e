"""Where one rank's time goes on the CPU, with SGLang's operators and with ours, taken in turn in one process.

    python bench/profile_cpu.py [--quick] [--tokens 512] [--requests 8] [--batches 6]

Random Qwen3-MoE of 147M parameters (8 layers, hidden 512, 32 experts x 384, top-4, bf16), one thread, no prefix
cache. Every batch is computed by one of the two; then, with torch's profiler on, once more by each. Prints a table,
and by how much the last token's log-probabilities differ. Writes `bench/out/profile_cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import Claim, write

RESULT = "ASYNCEP_PROFILE_RESULT"
BATCHES = "ASYNCEP_PROFILE_BATCHES"
LEAST_TOKENS = 256  # of a batch that counts; a server's own first requests are smaller
SEED = 0
SIDES = ("stock", "ours")


class Switch:
    """Runs each batch by one side, times it, and profiles the last of each."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches
        self.side = "stock"
        self.count = 0
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.parts: dict[str, dict[str, float]] = {}

    def forward(self, original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.forward_mode.is_extend() or batch.input_ids.numel() < LEAST_TOKENS:
            return original(runner, batch, *args, **kwargs)
        self.side = SIDES[self.count % 2]
        self.count += 1
        if self.count <= 2 * self.batches:
            start = time.perf_counter()
            result = original(runner, batch, *args, **kwargs)
            self.seconds[self.side].append(time.perf_counter() - start)
            return result
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            result = original(runner, batch, *args, **kwargs)
        times = {event.key: event.cpu_time_total / 1e3 for event in profiler.key_averages()}
        parts = {key.removeprefix("part:"): ms for key, ms in times.items() if key.startswith("part:")}
        self.parts[self.side] = {**parts, "all": sum(e.self_cpu_time_total for e in profiler.key_averages()) / 1e3}
        self.path.write_text(json.dumps({"seconds": self.seconds, "parts": self.parts}))
        return result


def part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, seen by the profiler under a name."""

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"part:{name}"):
            return function(*args, **kwargs)

    return ranged


def patch(switch: Switch) -> None:
    """Puts the switch into this process's SGLang."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers import layernorm, linear, logits_processor
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.moe import fused_moe_native, topk
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models import qwen3_moe, utils

    from asyncep_sgl.rank import cpu_attention as cpu_backend
    from asyncep_sgl.rank import cpu_operators

    stock_moe = fused_moe_native.moe_forward_native
    ours_attention = cpu_backend.CpuPrefillBackend.forward_extend

    def moe(*args: Any) -> Any:
        return stock_moe(*args) if switch.side == "stock" else cpu_operators.around_moe_forward_native(stock_moe, *args)

    def attention(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = TorchNativeAttnBackend.forward_extend if switch.side == "stock" else ours_attention
        return chosen(self, *args, **kwargs)

    fused_moe_native.moe_forward_native = part("experts", moe)
    cpu_backend.CpuPrefillBackend.forward_extend = part("attention", attention)  # type: ignore[method-assign]
    cpu_backend.take_over()
    stock_norm, stock_rotary = layernorm.RMSNorm.forward_native, RotaryEmbedding.forward_native
    stock_topk, stock_qk = topk.fused_topk_torch_native, utils.apply_qk_norm

    def norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = stock_norm if switch.side == "stock" else cpu_operators.rms_norm
        return chosen(self, *args, **kwargs)

    def rotate(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = stock_rotary if switch.side == "stock" else cpu_operators.rotary_embedding
        return chosen(self, *args, **kwargs)

    def choose(*args: Any, **kwargs: Any) -> Any:
        if switch.side == "stock":
            return stock_topk(*args, **kwargs)
        return cpu_operators.around_fused_topk(stock_topk, *args, **kwargs)

    def normalise(*args: Any, **kwargs: Any) -> Any:
        if switch.side == "stock":
            return stock_qk(*args, **kwargs)
        return part("norms", cpu_operators.around_apply_qk_norm)(stock_qk, *args, **kwargs)

    topk.fused_topk_torch_native = topk.fused_topk_native = choose
    utils.apply_qk_norm = qwen3_moe.apply_qk_norm = normalise
    BaseFusedOp.register_oot_forward(layernorm.RMSNorm, part("norms", norm), "native")
    BaseFusedOp.register_oot_forward(RotaryEmbedding, part("rotary", rotate), "native")
    for name, owner in (
        ("routing", topk.TopK),
        ("projections", linear.LinearBase),
        ("logits", logits_processor.LogitsProcessor),
    ):
        for kind in (owner, *owner.__subclasses__(), *(s for k in owner.__subclasses__() for s in k.__subclasses__())):
            for method in ("forward", "forward_native"):
                # A fused operator goes to forward_native by itself; a module has only forward.
                if method in vars(kind) and not (method == "forward" and hasattr(kind, "forward_native")):
                    setattr(kind, method, part(name, vars(kind)[method]))
    forward = ModelRunner.forward
    ModelRunner.forward = lambda runner, batch, *a, **k: switch.forward(forward, runner, batch, *a, **k)


# SGLang's scheduler is a spawned process: it imports this file before it runs, with this variable set.
if RESULT in os.environ and __name__ != "__main__":
    patch(Switch(Path(os.environ[RESULT]), int(os.environ[BATCHES])))


def build_model(directory: Path) -> Path:
    """A random checkpoint of the 147M model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        moe_intermediate_size=384,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512, help="of each request")
    parser.add_argument("--requests", type=int, default=8, help="of each batch")
    parser.add_argument("--batches", type=int, default=6, help="timed on each side")
    parser.add_argument("--quick", action="store_true", help="one small batch: shows that it runs, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.requests, options.batches = 128, 4, 1
    total = options.tokens * options.requests
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        # Two more for warming up: oneDNN compiles its kernels there.
        os.environ.update({RESULT: str(result), BATCHES: str(options.batches + 2), "OMP_NUM_THREADS": "1"})
        import sglang

        engine = sglang.Engine(
            model_path=str(build_model(Path(directory) / "model")),
            device="cpu",
            attention_backend="torch_native",
            disable_radix_cache=True,
            disable_overlap_schedule=True,
            skip_tokenizer_init=True,
            skip_server_warmup=True,
            chunked_prefill_size=total,
            max_prefill_tokens=total,
            max_total_tokens=2 * total,
            log_level="error",
        )
        generator = torch.Generator().manual_seed(SEED)
        differences, errors = [], {}
        for _ in range(options.batches + 3):
            prompts = torch.randint(8192, (options.requests, options.tokens), generator=generator).tolist()
            pair = [_log_probabilities(engine, prompts) for _ in SIDES]
            differences.append((pair[0] - pair[1]).abs())
            if not errors:
                exact = _exact(Path(directory) / "model", prompts)
                errors = {side: (found - exact).abs().mean().item() for side, found in zip(SIDES, pair, strict=True)}
        found = json.loads(result.read_text())
        engine.shutdown()
    report(found, torch.stack(differences), errors, options)


def _log_probabilities(engine: Any, prompts: list[list[int]]) -> torch.Tensor:
    """``(requests, 128)``: of every 64th token as the next."""
    answers = engine.generate(
        input_ids=prompts,
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        token_ids_logprob=[list(range(0, 8192, 64))] * len(prompts),
    )
    return torch.tensor([[e[0] for e in a["meta_info"]["output_token_ids_logprobs"][0]] for a in answers])


def _exact(model: Path, prompts: list[list[int]]) -> torch.Tensor:
    """The same in fp32 by Transformers."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [net(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].log_softmax(-1) for prompt in prompts]
    return torch.stack(rows)[:, ::64]


def report(
    found: dict[str, Any], differences: torch.Tensor, errors: dict[str, float], options: argparse.Namespace
) -> None:
    """Prints the tables and writes the file."""
    tokens = options.tokens * options.requests
    seconds = {side: statistics.median(found["seconds"][side][2:]) for side in SIDES}
    print(f"{options.requests} x {options.tokens} tokens, one thread")
    for side in SIDES:
        print(f"  {side:6s} {seconds[side] * 1e3:8.1f} ms  {tokens / seconds[side]:8.0f} tokens/s")
    print(f"  ours {seconds['stock'] / seconds['ours']:.2f} x stock\n")
    parts = found["parts"]
    print(f"{'under the profiler':20s} {'stock ms':>9s} {'%':>5s} {'ours ms':>9s} {'%':>5s}")
    for name in sorted(set(parts["stock"]) - {"all"}, key=lambda name: -parts["stock"][name]):
        row = [(parts[side].get(name, 0.0), 100 * parts[side].get(name, 0.0) / parts[side]["all"]) for side in SIDES]
        print(f"{name:20s} {row[0][0]:9.1f} {row[0][1]:5.1f} {row[1][0]:9.1f} {row[1][1]:5.1f}")
    rest = [parts[side]["all"] - sum(ms for name, ms in parts[side].items() if name != "all") for side in SIDES]
    print(f"{'rest':20s} {rest[0]:9.1f} {'':5s} {rest[1]:9.1f}\n")
    print(f"log-probabilities differ by {differences.mean():.4f} on average, {differences.max():.4f} at most")
    print(f"against fp32 Transformers, mean: stock {errors['stock']:.4f}, ours {errors['ours']:.4f}")
    record = {
        "tokens": options.tokens,
        "requests": options.requests,
        "seconds": found["seconds"],
        "parts_ms": parts,
        "log_probability_difference": {"mean": differences.mean().item(), "max": differences.max().item()},
        "log_probability_error_mean": errors,
    }
    claims = [
        Claim("tokens/s, ours over stock", seconds["stock"] / seconds["ours"], 1.0, "ratio"),
        # Ours may not be further from the exact result than what it replaces; a tenth is chance.
        Claim("mean error, ours over stock", errors["ours"] / errors["stock"], 1.1, "ratio", at_least=False),
    ]
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.3f} (wanted {claim.wanted})")
    print(write("profile_cpu-quick" if options.quick else "profile_cpu", seed=SEED, raw=record, claims=claims))


if __name__ == "__main__":
    main()
