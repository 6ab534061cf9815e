"""The command line of ``asyncep serve``: our flags, SGLang's that we act on, what we add. Pure."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from asyncep_router.errors import ConfigError
from asyncep_router.keys import Keys, key_from
from asyncep_sgl.config.flags import add_flags, changed, read_flags
from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.config.options import ServeOptions
from asyncep_sgl.config.settings import BatchSettings, GroupSettings, RouterSettings, RunSettings
from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher.sglang_names import refuse_unknown
from asyncep_sgl.process.key_memory import ADMIN_KEY_VARIABLE, KEY_VARIABLE

_DESCRIPTION = """\
Serve a Mixture-of-Experts model for prefill-only work: classification, scoring, reranking.

--dp-size N starts N independent ranks. On CPUs they share one copy of the experts. SGLang's own flags are passed on to
its server (`sglang serve --help` lists them); those that cannot be served are refused by name.
"""

_EXAMPLES = """\
examples:
  asyncep serve --model-path ./demo-model --dp-size 2
  asyncep serve --model-path Qwen/Qwen3-30B-A3B --dp-size 2 --port 8000 --api-key @key.txt

endpoints: /generate (max_new_tokens=0, token_ids_logprob), /v1/score, /v1/completions (echo), /v1/batches,
/asyncep/status and SGLang's others.
"""


_GROUPS: tuple[tuple[str, str, type], ...] = (
    ("asyncep", "how the server computes and ends", RunSettings),
    ("router", "the router inside the server", RouterSettings),
    (
        "experts that do not fit, or that several hosts share",
        "several hosts: run the same command on each, with its own --node-rank",
        GroupSettings,
    ),
    ("files and batches", "/v1/files and /v1/batches", BatchSettings),
    ("what clients may ask", "bounds that are checked before any work is done", FrontSettings),
)


def parse(arguments: Sequence[str]) -> ServeOptions:
    """Reads the command line.

    Raises:
        UsageError: a value that cannot be served, naming flag and fix.
        SystemExit: argparse's own, for ``--help`` and malformed flags.
    """
    parser = argparse.ArgumentParser(
        "asyncep serve",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", "--model", required=True, metavar="PATH", help="checkpoint folder or hub name")
    parser.add_argument(
        "--dp-size",
        "--data-parallel-size",
        "--dp",
        type=int,
        default=1,
        metavar="N",
        help="ranks sharing the experts (default 1)",
    )
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--ep-size", "--expert-parallel-size", "--ep", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--pp-size", "--pipeline-parallel-size", "--pp", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--quantization", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on (default 30000)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="bfloat16 or float32; on GPUs bfloat16 only "
        "(default: the checkpoint's, but float16 for a float32 checkpoint)",
    )
    parser.add_argument("--revision", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: what is found)")
    for title, description, settings in _GROUPS[:-1]:
        add_flags(parser.add_argument_group(title, description), settings)
    access = parser.add_argument_group("keys", "KEY may be @FILE, whose first line is the key; docs/use/security.md")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients send (default: $ASYNCEP_API_KEY; without a key, anybody may call)",
    )
    access.add_argument(
        "--admin-api-key", metavar="KEY", help="key of control endpoints such as /flush_cache ($ASYNCEP_ADMIN_API_KEY)"
    )
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys of several clients, a line each: NAME KEY [admin] [prompts_per_second=N] [file_bytes=SIZE]",
    )
    title, description, settings = _GROUPS[-1]
    add_flags(parser.add_argument_group(title, description), settings)
    known, passed = parser.parse_known_args(list(arguments))
    refuse_unknown(passed, [flag for action in parser._actions for flag in action.option_strings])
    options = ServeOptions(
        model=known.model_path,
        ranks=known.dp_size,
        host=known.host,
        port=known.port,
        dtype=known.dtype,
        revision=known.revision,
        device=known.device,
        run=read_flags(known, RunSettings),
        router=read_flags(known, RouterSettings),
        group=read_flags(known, GroupSettings),
        batches=read_flags(known, BatchSettings),
        front=read_flags(known, FrontSettings),
        keys=_keys(known),
        passed=tuple(passed),
    )
    _refuse_unservable(known, options)
    return options


def _keys(known: argparse.Namespace) -> Keys:
    try:
        return Keys.of(
            key_from(known.api_key, KEY_VARIABLE),
            key_from(known.admin_api_key, ADMIN_KEY_VARIABLE),
            known.api_key_file,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _refuse_unservable(known: argparse.Namespace, options: ServeOptions) -> None:
    if options.ranks < 1:
        raise UsageError(f"--dp-size {options.ranks}: at least one rank is needed")
    for flag, value in (
        ("--tp-size", known.tp_size),
        ("--ep-size", known.ep_size),
        ("--pp-size", known.pp_size),
    ):
        if value != 1:
            raise UsageError(
                f"{flag} {value}: ranks here are independent and whole; use {flag} 1 and --dp-size {value} instead"
            )
    if options.run.kv_free and options.run.decode == "allow":
        raise UsageError("--asyncep-kv-free: decoding needs the keys and values of earlier steps; leave one flag out")
    _refuse_impossible_group(options.group)
    _refuse_without_router(options)
    if known.quantization is not None:
        raise UsageError(
            f"--quantization {known.quantization}: this version shares bf16 and fp32 experts; leave the flag out"
        )
    if options.dtype not in ("auto", "bfloat16", "float32", "float"):
        raise UsageError(f"--dtype {options.dtype}: use bfloat16 or float32")
    if not 0 < options.port < 65536:
        raise UsageError(f"--port {options.port}: use 1 to 65535")


def _refuse_impossible_group(group: GroupSettings) -> None:
    nodes = group.nodes
    if not 0 <= group.node < nodes:
        raise UsageError(f"--node-rank {group.node}: use 0 to {nodes - 1} with --nnodes {nodes}")
    if group.copies > nodes:
        raise UsageError(f"--asyncep-copies {group.copies}: use 1 to {nodes}, the number of hosts (--nnodes)")
    if nodes == 1:
        return
    host, _, port = group.rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--dist-init-addr {group.rendezvous!r}: with --nnodes {nodes} give node 0's address as HOST:PORT"
        )


def _refuse_without_router(options: ServeOptions) -> None:
    if uses_our_router(options):
        return
    for flag in changed(options.router):
        raise UsageError(
            f"{flag.name}: for the router inside the server, which there is not with --load-balance-method and on one "
            "rank of several hosts; leave the flag out"
        )


def uses_our_router(options: ServeOptions) -> bool:
    """Whether requests go through our router to the ranks: unless one of SGLang's methods is asked for.

    A host with one rank among several has none: all that it could know, the router in front of the hosts does.
    """
    asked = any(flag.startswith("--load-balance-method") for flag in options.passed)
    return not asked and (options.ranks > 1 or options.group.nodes == 1)


def sglang_arguments(
    options: ServeOptions, *, cpu: bool, max_total_tokens: int | None, extra: Sequence[str] = ()
) -> list[str]:
    """SGLang's command line for these options: the user's flags and, where they are silent, what AsyncEP needs.

    Args:
        cpu: the plain-CPU platform is in use.
        max_total_tokens: KV cache size of a rank in tokens; None leaves it to SGLang.
        extra: flags with their values that the strategy or a GPU needs.
    """
    arguments = [
        "--model-path", options.model,
        "--host", options.host,
        "--port", str(options.port),
        "--dp-size", str(options.ranks),
        "--tp-size", "1",
        "--dtype", options.dtype,
    ]  # fmt: skip
    if options.revision is not None:
        arguments += ["--revision", options.revision]
    if cpu:
        arguments += ["--device", "cpu"]
    elif options.device is not None:
        arguments += ["--device", options.device]

    def given(flag: str) -> bool:
        return any(part == flag or part.startswith(flag + "=") for part in options.passed)

    def unless_given(flag: str, *value: str) -> None:
        if not given(flag):
            arguments.extend((flag, *value))

    at = 0
    while at < len(extra):
        values = list(itertools.takewhile(lambda part: not _is_flag(part), extra[at + 1 :]))
        unless_given(extra[at], *values)
        at += 1 + len(values)
    # Idle schedulers would otherwise poll a core each away from the ranks that work.
    unless_given("--sleep-on-idle")
    # The stock warm-up decodes eight tokens; a prefill-only server has nothing to warm up for that.
    unless_given("--skip-server-warmup")
    if "batch-tokenization" not in options.run.without:
        # Texts of a list go to the tokenizer and on to the router together; SGLang's default is one after the other.
        unless_given("--enable-tokenizer-batch-encode")
    if "no-access-log" not in options.run.without:
        # A line a request is a tenth of the front's work; errors are logged as ever.
        unless_given("--log-level-http", "warning")
    if options.run.kv_free:
        unless_given("--disable-radix-cache")
    elif uses_our_router(options):
        # Evictions in a rank have to reach the router; a page is the grain in which they are told.
        unless_given("--kv-events-config", '{"publisher": "asyncep"}')
        if "--page-size" not in extra:
            unless_given("--page-size", "16")
    if cpu and given("--chunked-prefill-size") and "--mem-fraction-static" not in extra:
        # SGLang would keep memory free for a GPU's graphs in proportion to that, more than a small host has.
        unless_given("--mem-fraction-static", "0.8")
    if cpu:
        # SGLang's default on x86 is intel_amx, which needs builds of sgl-kernel that a plain CPU does not have.
        unless_given("--attention-backend", "torch_native")
        # Overlapping the scheduler with the device needs a device.
        unless_given("--disable-overlap-schedule")
        if max_total_tokens is not None:
            unless_given("--max-total-tokens", str(max_total_tokens))
    return arguments + list(options.passed)


def _is_flag(part: str) -> bool:
    return part.startswith("--")
