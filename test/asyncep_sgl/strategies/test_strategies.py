"""The seam of strategies: a third one plugs in, names are found or refused, and nobody else knows which there are."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import tiny_models
from server import Server

import asyncep_sgl
from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig
from asyncep_sgl.errors import UsageError
from asyncep_sgl.experts.shard.holdings import MoeLayer, gathers, moe_layers
from asyncep_sgl.launcher.command_line import parse
from asyncep_sgl.strategies import registry
from asyncep_sgl.strategies.base import RankStrategy, Strategy

PROMPTS = [
    [(7 * i + 13 * k) % (tiny_models.VOCABULARY - 3) + 3 for i in range(length)] for k, length in enumerate((5, 64))
]
LABELS = [3, 17, 101]
HERE = Path(__file__).parent


@pytest.mark.server
def test_a_strategy_of_ones_own_serves(
    tiny_model: Callable[[str], Path], serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end, with the log-probabilities of the one that is there; of product files it touches none."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    model = tiny_model("qwen3_moe")
    found = []
    for name in ("toy_strategy:Toy", "replicated"):
        server = serve(model, "--dtype", "float32", "--asyncep-strategy", name)
        found.append(server.log_probabilities(PROMPTS, LABELS))
        said = server.log.read_text().count("computes with the toy")
        assert said == (2 if name.startswith("toy") else 0)
        server.stop()
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert len((HERE / "toy_strategy.py").read_text().splitlines()) < 60


@pytest.mark.server
def test_a_group_with_nothing_to_gather_measures_nothing(
    tiny_model: Callable[[str], Path], serve: Callable[..., Server]
) -> None:
    """Launcher, ranks and front agree that all layers are kept; the front has no gathers to measure."""
    server = serve(tiny_model("qwen3_moe"), "--asyncep-expert-memory", "1TB")
    assert server.status()["gathers"] == []
    # Nobody has asked for anything yet, the front itself included.
    assert httpx.get(server.url + "/router/state", timeout=60).json()["submitted"] == 0
    server.log_probabilities(PROMPTS, LABELS)


@pytest.mark.parametrize(
    ("flags", "group", "words"),
    [
        ("--asyncep-strategy nobody", GroupConfig(), ["--asyncep-strategy nobody", "replicated, asyncep"]),
        ("--asyncep-strategy json:JSONDecoder", GroupConfig(), ["JSONDecoder is no", "Strategy"]),
        ("--asyncep-strategy json:Nothing", GroupConfig(), ["json:Nothing", "MODULE:CLASS"]),
        ("--asyncep-strategy no.such.module:X", GroupConfig(), ["no.such", "MODULE:CLASS"]),
        ("--asyncep-strategy asyncep", GroupConfig(), ["--nnodes N", "--asyncep-expert-memory SIZE"]),
        (
            "--asyncep-strategy replicated --asyncep-expert-memory 1GB",
            GroupConfig(memory_limit=10**9),
            ["leave --asyn"],
        ),
        ("--asyncep-strategy replicated", GroupConfig(devices=2), ["use asyncep"]),
        ("--asyncep-strategy toy_strategy:Toy --asyncep-kernels sglang", GroupConfig(), ["--asyncep-kernels sglang"]),
        (
            "--asyncep-strategy toy_strategy:Toy --asyncep-expert-memory 1GB",
            GroupConfig(memory_limit=10**9),
            ["toy_strategy:Toy", "leave --asyncep-expert-memory out"],
        ),
        ("--asyncep-strategy toy_strategy:Toy", GroupConfig(devices=2), ["use asyncep"]),
        ("--asyncep-strategy broken_strategy:Toy", GroupConfig(), ["division by zero"]),
        (
            "--nnodes 2 --dist-init-addr h:5000 --asyncep-kernels sglang",
            GroupConfig(nodes=2, gathers=True),
            ["--asyncep-kernels sglang", "leave the flag out"],
        ),
        (
            "--dp-size 2 --asyncep-kernels sglang",
            GroupConfig(devices=2, gathers=True),
            ["--asyncep-kernels sglang", "leave the flag out"],
        ),
        (
            "--asyncep-expert-memory 1GB --asyncep-kernels sglang",
            GroupConfig(memory_limit=10**9, gathers=True),
            ["--asyncep-kernels sglang"],
        ),
    ],
)
def test_what_a_strategy_does_not_do_is_refused(
    flags: str, group: GroupConfig, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_strategy.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(tmp_path)
    options = parse(["--model", "m", *flags.split()])
    with pytest.raises(UsageError) as refused:
        registry.find(options.run.strategy or registry.default(group)).refuse(options, group)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_strategy_of_ours_keeps_the_contract(name: str) -> None:
    """It is found by its name, and overrides nothing that the contract does not have."""
    kind = registry.find(name)
    assert kind.name == name
    mine = {key for key in vars(kind) if not key.startswith("_")}
    assert mine <= {key for key in dir(Strategy) if not key.startswith("_")} | {"name"}
    strategy = kind(AsyncEPConfig(ranks=1, store_address="", launcher_pid=1, load_board="", strategy=name))
    assert isinstance(strategy.gathers, bool)
    assert strategy.side_processes() == ()


@pytest.mark.parametrize(
    ("group", "transport", "expected"),
    [
        (GroupConfig(), "host", False),
        (GroupConfig(nodes=2, resident_layers=1), "host", True),
        (GroupConfig(nodes=2, resident_layers=3), "host", False),
        (GroupConfig(nodes=2, copies=2), "host", False),
        (GroupConfig(nodes=2, resident_experts=4), "host", False),
        (GroupConfig(nodes=2, resident_experts=3), "host", True),
        (GroupConfig(memory_limit=300), "host", False),
        (GroupConfig(memory_limit=299), "host", True),
        (GroupConfig(memory_limit=299, resident_experts=8), "host", False),
        (GroupConfig(devices=2), "cuda", True),
        (GroupConfig(devices=2, resident_layers=3), "cuda", False),
        (GroupConfig(memory_limit=300), "pinned", False),
        (GroupConfig(memory_limit=200), "pinned", True),
    ],
)
def test_whether_a_run_gathers(group: GroupConfig, transport: str, expected: bool) -> None:
    layers = [MoeLayer(layer, 8, 100) for layer in (1, 2, 3)]
    assert gathers(group, 2, transport, layers) is expected  # type: ignore[arg-type]


def test_layers_of_a_configuration(tiny_model: Callable[[str], Path]) -> None:
    """Their bytes are those of the tensors that a rank will share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model("qwen3_moe"))
    net = AutoModelForCausalLM.from_config(config)
    for layer in moe_layers(config.to_dict(), 4):
        tensors = [p for name, p in net.named_parameters() if f"layers.{layer.layer}.mlp.experts" in name]
        assert sum(tensor.numel() * 4 for tensor in tensors) == layer.nbytes
    assert moe_layers(config.to_dict(), 4)


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nobody_outside_names_a_strategy() -> None:
    """Others know the contract, the registry and whose rank this is; how weights travel is the strategy's own."""
    package = Path(asyncep_sgl.__file__).parent
    known = {"base", "registry", "current"}
    own = tuple(f"asyncep_sgl.experts.{room}" for room in ("gather", "sources", "group", "start"))
    for file in package.rglob("*.py"):
        place = file.relative_to(package).parts[0]
        for name in _imports(file):
            if name.startswith("asyncep_sgl.strategies.") and place != "strategies":
                assert name.split(".")[2] in known, f"{file}: {name}"
            if place not in ("strategies", "experts"):
                assert not name.startswith(own), f"{file}: {name}"


def test_the_ranks_contract_has_no_holes() -> None:
    """Everything that is called on a rank's strategy is there to override, with a docstring."""
    for name, method in vars(RankStrategy).items():
        if callable(method) and not name.startswith("_"):
            assert method.__doc__, name
