"""The command line: what is refused and with which words, what is passed on and what is added."""

import argparse
from pathlib import Path

import pytest

from asyncep_sgl.config.flags import parse_size
from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.sglang_flags import refused_flag
from asyncep_sgl.launcher.command_line import parse, sglang_arguments, uses_our_router
from asyncep_sgl.launcher.launch import batch_folder, check_batch_folder
from asyncep_sgl.launcher.sglang_names import known_flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dp-size", "0"], "--dp-size 0: at least one rank"),
        (["--tp-size", "2"], "--tp-size 2: .*--dp-size 2"),
        (["--ep", "4"], "--ep-size 4: .*--dp-size 4"),
        (["--nnodes", "2"], "--dist-init-addr '': with --nnodes 2 give node 0's address as HOST:PORT"),
        (["--nnodes", "2", "--dist-init-addr", "a:b"], "--dist-init-addr 'a:b'"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: use 0 to 1 with --nnodes 2"),
        (["--nnodes", "0"], "--nnodes 0: must be at least 1"),
        (["--asyncep-copies", "2"], "--asyncep-copies 2: use 1 to 1, the number of hosts"),
        (["--asyncep-gather-depth", "0"], "--asyncep-gather-depth 0: must be at least 1"),
        (["--quantization", "fp8"], "--quantization fp8: .*leave the flag out"),
        (["--dtype", "float16"], "--dtype float16: use bfloat16 or float32"),
        (["--port", "70000"], "--port 70000"),
        (["--asyncep-kv-free", "--asyncep-decode", "allow"], "--asyncep-kv-free: decoding needs"),
        (["--asyncep-resident-experts", "-1"], "--asyncep-resident-experts -1: must be at least 0"),
    ],
)
def test_what_cannot_be_served_names_flag_and_fix(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(["--model-path", "m", *arguments])


def test_sglang_flags_are_passed_on_and_win_over_ours() -> None:
    options = parse(["--model", "m", "--dp-size", "2", "--attention-backend=flex_attention", "--log-level", "debug"])
    arguments = sglang_arguments(options, cpu=True, max_total_tokens=5000)
    assert "torch_native" not in arguments
    assert arguments[-3:] == ["--attention-backend=flex_attention", "--log-level", "debug"]
    assert arguments[arguments.index("--max-total-tokens") + 1] == "5000"
    assert arguments[arguments.index("--dp-size") + 1] == "2"


def test_keys_stay_in_the_launcher() -> None:
    options = parse(["--model", "m", "--api-key", "of-a-client", "--admin-api-key=of-the-boss"])
    assert options.keys.admin
    assert options.keys.clients
    for text in (repr(options), *sglang_arguments(options, cpu=True, max_total_tokens=None)):
        assert "of-a-client" not in text
        assert "of-the-boss" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", "k", "--admin-api-key", "k"], "--admin-api-key"),
        (["--api-key", "@/nowhere"], "/nowhere"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--asyncep-max-prompts", "0"], "--asyncep-max-prompts 0"),
        (["--asyncep-header-timeout-secs", "0"], "--asyncep-header-timeout-secs"),
    ],
)
def test_what_cannot_guard_the_front_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(["--model", "m", *arguments])


def test_bounds_of_the_front() -> None:
    front = parse(["--model", "m", "--asyncep-max-body-bytes", "1MiB", "--asyncep-cors-origins", "https://a"]).front
    assert (front.max_body_bytes, front.cors_origins) == (1 << 20, ("https://a",))
    assert front.prompt_chars(100) == 3200
    assert parse(["--model", "m", "--asyncep-max-prompt-chars", "7"]).front.prompt_chars(100) == 7


def test_no_abbreviation_swallows_a_flag_of_sglangs() -> None:
    assert parse(["--model", "m", "--log-level-h", "info"]).passed == ("--log-level-h", "info")


@pytest.mark.parametrize("flag", ["--dp-size", "--data-parallel-size", "--dp"])
def test_every_name_that_sglang_has_for_ranks_is_ours(flag: str) -> None:
    assert parse(["--model", "m", flag, "3"]).ranks == 3


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ([], True),
        (["--dp-size", "2"], True),
        (["--load-balance-method", "round_robin"], False),
        (["--nnodes", "2", "--dist-init-addr", "h:1"], False),
        (["--nnodes", "2", "--dist-init-addr", "h:1", "--dp-size", "2"], True),
    ],
)
def test_who_has_our_router(arguments: list[str], *, ours: bool) -> None:
    assert uses_our_router(parse(["--model", "m", *arguments])) is ours


@pytest.mark.parametrize(("text", "nbytes"), [("64GiB", 64 << 30), ("500MB", 500_000_000), ("1k", 1000), ("12", 12)])
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-", "1e400"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)


def test_savings_are_flags_of_sglangs_that_the_user_can_overrule() -> None:
    ours = sglang_arguments(parse(["--model", "m"]), cpu=True, max_total_tokens=None)
    assert "--enable-tokenizer-batch-encode" in ours
    assert ours[ours.index("--log-level-http") + 1] == "warning"
    user = sglang_arguments(parse(["--model", "m", "--log-level-http", "info"]), cpu=True, max_total_tokens=None)
    assert user.count("--log-level-http") == 1
    without = parse(["--model", "m", "--asyncep-without", "batch-tokenization, no-access-log"])
    assert without.run.without == ("batch-tokenization", "no-access-log")
    bare = sglang_arguments(without, cpu=True, max_total_tokens=None)
    assert not {"--enable-tokenizer-batch-encode", "--log-level-http"} & set(bare)
    assert len(parse(["--model", "m", "--asyncep-without", "all"]).run.without) > 2


def test_large_batches_do_not_cost_a_cpu_the_memory_that_a_gpus_graphs_would_take() -> None:
    def flags(*given: str, cpu: bool = True) -> list[str]:
        return sglang_arguments(parse(["--model", "m", *given]), cpu=cpu, max_total_tokens=None)

    large = ("--chunked-prefill-size", "36864")
    assert "--mem-fraction-static" in flags(*large)
    assert "--mem-fraction-static" not in flags(*large, cpu=False)
    assert "--mem-fraction-static" not in flags()
    assert flags(*large, "--mem-fraction-static", "0.5").count("--mem-fraction-static") == 1


def test_a_saving_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--asyncep-without", "sleep"])
    assert "'sleep' is none of direct-replies, " in capsys.readouterr().err


def test_a_flag_nobody_knows_is_one_line_with_the_one_that_was_meant() -> None:
    known = {"--dp-size", "--port", "--log-level"}
    said = refused_flag("unrecognized arguments: --dp-sise 2", known)
    assert said.startswith("asyncep serve: unrecognized arguments: --dp-sise 2; did you mean --dp-size? ")
    assert "did you mean" not in refused_flag("unrecognized arguments: --xyz", known)
    assert "did you mean" not in refused_flag("argument --port: invalid int value: 'x'", known)


def test_no_flag_of_sglangs_is_taken_for_a_mistake() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    theirs = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    assert len(theirs) > 300
    assert set(theirs) - {"--help"} <= known_flags()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--dp-sise=2", "--dp-sise: no such flag; did you mean --dp-size[?] asyncep serve --help lists ours"),
        ("--asyncep-gather-dept", "did you mean --asyncep-gather-depth"),
        ("--chunked-prefil-size", "did you mean --chunked-prefill-size"),
        ("--zzz", "--zzz: no such flag; asyncep serve --help"),
    ],
)
def test_a_flag_that_nobody_has_is_found_before_anything_is_imported(flag: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(["--model", "m", flag, "5"])
    parse(["--model", "m", "--chunked-prefill-size=8192", "--mem-fraction", "0.5", "--json-model-override-args", "{}"])
    parse(["--model", "m", "--served-model-name", "--my model", "--random-seed", "-1"])


def test_where_batches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert batch_folder(parse(["--model", "m", "--port", "8000"])) == tmp_path / "asyncep" / "batches" / "8000"
    monkeypatch.chdir(tmp_path)
    assert batch_folder(parse(["--model", "m", "--asyncep-batch-dir", "here"])) == tmp_path / "here"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--asyncep-batch-dir .*file/x: .*give a folder to write to"):
        check_batch_folder(parse(["--model", "m", "--asyncep-batch-dir", "file/x"]))
