"""The command line of ``asyncep serve``: our flags, SGLang's that we act on, what we add. Pure."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import get_args

from asyncep_router.errors import ConfigError
from asyncep_router.keys import Keys, key_from
from asyncep_sgl.config import front as front_options
from asyncep_sgl.config.options import Decode, Kernels, ServeOptions, Transport
from asyncep_sgl.config.run import Saving
from asyncep_sgl.errors import UsageError
from asyncep_sgl.process.key_memory import ADMIN_KEY_VARIABLE, KEY_VARIABLE

_DESCRIPTION = """\
Serve a Mixture-of-Experts model for prefill-only work: classification, scoring, reranking.

--dp-size N starts N independent ranks that share one copy of the experts. Every flag of SGLang's own server is
taken as well and passed on; `sglang serve --help` lists them.
"""

_EXAMPLES = """\
examples:
  asyncep serve --model-path ./demo-model --dp-size 2
  asyncep serve --model-path Qwen/Qwen3-30B-A3B --dp-size 2 --port 8000 --api-key @key.txt

endpoints: /generate (max_new_tokens=0, token_ids_logprob), /v1/score, /v1/completions (echo), /v1/batches,
/asyncep/status and SGLang's others.
"""


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
    parser.add_argument("--dtype", default="auto", help="bfloat16 or float32 (default: the checkpoint's)")
    parser.add_argument("--revision", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: what is found)")
    group = parser.add_argument_group("asyncep")
    group.add_argument(
        "--asyncep-store-limit",
        type=parse_size,
        metavar="SIZE",
        help="most memory the shared experts may take, such as 64GiB (default: what is free)",
    )
    group.add_argument(
        "--asyncep-expert-memory",
        type=parse_size,
        metavar="SIZE",
        help="keep so much of the experts in memory and read the other layers from the checkpoint for each batch, "
        "ahead of the computation; for models larger than memory; on GPUs: so much on each GPU, the other layers in "
        "pinned host memory (default: keep all)",
    )
    group.add_argument(
        "--asyncep-kv-free",
        action="store_true",
        help="keep no prefix from one batch to the next and memory for the keys and values of one batch only; for work "
        "whose prompts have nothing in common",
    )
    group.add_argument(
        "--asyncep-decode",
        choices=get_args(Decode),
        default="refuse",
        help="requests that would decode: refuse answers 400, allow serves them as SGLang does (default refuse)",
    )
    group.add_argument(
        "--asyncep-kernels",
        choices=get_args(Kernels),
        default="ours",
        help="experts and attention on a CPU: ours are faster, sglang's give the bits of stock SGLang (default ours)",
    )
    group.add_argument(
        "--asyncep-transport",
        choices=get_args(Transport),
        default="auto",
        help="on GPUs: cuda keeps a part of the experts in each GPU and gathers from the others, pinned keeps them in "
        "host memory (default auto: cuda where they fit); has not run on a GPU yet",
    )
    group.add_argument(
        "--asyncep-strategy",
        metavar="NAME",
        help="how experts and tokens come together: replicated (this host's memory has all experts), asyncep (each "
        "host or GPU keeps a part and gathers the rest ahead of the computation), or MODULE:CLASS of your own "
        "(docs/strategies.md). Default: asyncep where other flags divide the experts, else replicated",
    )
    group.add_argument(
        "--asyncep-threshold-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="tokens whose FLOPs make a batch that computes well: a rank is given two of it at a time, and T, which is "
        "measured where weights are gathered, is at least that (default 2048)",
    )
    group.add_argument(
        "--asyncep-max-wait-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="how long little work may wait for company while ranks are idle (default 0)",
    )
    group.add_argument(
        "--asyncep-batch-dir",
        default=None,
        metavar="DIR",
        help="where /v1/files and /v1/batches keep their state (default $XDG_STATE_HOME/asyncep/batches/PORT)",
    )
    access = parser.add_argument_group("keys", "KEY may be @FILE, whose first line is the key; docs/security.md")
    access.add_argument(
        "--api-key", metavar="KEY", help="key that clients send (default: $ASYNCEP_API_KEY; without, none is asked for)"
    )
    access.add_argument(
        "--admin-api-key", metavar="KEY", help="key of control endpoints such as /flush_cache ($ASYNCEP_ADMIN_API_KEY)"
    )
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys of several clients, a line each: NAME KEY [admin] [prompts_per_second=N] [file_bytes=SIZE]",
    )
    front_options.add_flags(parser, parse_size)
    group.add_argument(
        "--asyncep-file-quota",
        type=parse_size,
        default=20 * 10**9,
        metavar="SIZE",
        help="most bytes of all files in /v1/files together; a caller of --api-key-file may have less (default 20GB)",
    )
    group.add_argument(
        "--asyncep-file-days",
        type=int,
        default=30,
        metavar="N",
        help="days after which files and ended batches are forgotten; 0 keeps them (default 30)",
    )
    group.add_argument(
        "--asyncep-disk-floor",
        type=parse_size,
        metavar="SIZE",
        help="space on the disk of --asyncep-batch-dir that files and batches leave free (default 1GB, or a twentieth "
        "of a smaller disk)",
    )
    hosts = parser.add_argument_group("several hosts", "run the same command on each, with its own --node-rank")
    hosts.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts that share the experts (default 1)")
    hosts.add_argument("--node-rank", type=int, default=0, metavar="I", help="which of them this is, from 0")
    hosts.add_argument(
        "--dist-init-addr",
        default="",
        metavar="HOST:PORT",
        help="address of node 0 that every host can reach; hosts may start in any order",
    )
    hosts.add_argument(
        "--asyncep-copies",
        type=int,
        default=1,
        metavar="N",
        help="hosts that keep each expert; with 2 or more a host may be lost without a pause (default 1)",
    )
    hosts.add_argument(
        "--asyncep-resident-layers",
        type=int,
        default=1,
        metavar="N",
        help="MoE layers, from the first, that every host keeps whole (default 1)",
    )
    hosts.add_argument(
        "--asyncep-resident-experts",
        type=int,
        default=0,
        metavar="N",
        help="experts of every other layer that each host keeps beyond its share, or beside --asyncep-expert-memory: "
        "so many less to gather (default 0)",
    )
    hosts.add_argument(
        "--asyncep-gather-depth",
        type=int,
        default=None,
        metavar="N",
        help="slots of gathered layers in each rank; 1 overlaps with attention only (default 2; 4 from pinned memory)",
    )
    hosts.add_argument(
        "--asyncep-margin",
        type=float,
        default=1.2,
        metavar="GAMMA",
        help="T is the FLOPs that just hide a gather, times this; below 1 ranks wait for gathers (default 1.2)",
    )
    hosts.add_argument(
        "--asyncep-verify",
        choices=("every", "off"),
        default="every",
        help="compare every gathered expert with its owner's digest, or trust the link (default every)",
    )
    hosts.add_argument(
        "--asyncep-patience-secs",
        type=float,
        default=30.0,
        metavar="S",
        help="how long requests wait for a host that went away before they get a 503 (default 30)",
    )
    hosts.add_argument("--asyncep-log-gathers", action="store_true", help="log each batch's gathers as a JSON line")
    group.add_argument(
        "--asyncep-without",
        type=parse_savings,
        default=(),
        metavar="NAMES",
        help=f"savings of processor time to leave out, to measure what they are worth: {', '.join(get_args(Saving))}, "
        "with commas between, or all (docs/cpu.md)",
    )
    group.add_argument("--asyncep-log-decisions", action="store_true", help="log each routing decision as a JSON line")
    group.add_argument(
        "--shutdown-grace-period-secs",
        type=float,
        default=10.0,
        metavar="S",
        help="on Ctrl-C or SIGTERM, time for requests in flight; a second signal ends at once (default 10)",
    )
    known, passed = parser.parse_known_args(list(arguments))
    _refuse_unservable(known)
    return ServeOptions(
        model=known.model_path,
        ranks=known.dp_size,
        host=known.host,
        port=known.port,
        dtype=known.dtype,
        revision=known.revision,
        device=known.device,
        store_limit=known.asyncep_store_limit,
        expert_memory=known.asyncep_expert_memory,
        threshold_tokens=known.asyncep_threshold_tokens,
        max_wait_seconds=known.asyncep_max_wait_ms / 1000,
        log_decisions=known.asyncep_log_decisions,
        grace_seconds=known.shutdown_grace_period_secs,
        decode=known.asyncep_decode,
        kernels=known.asyncep_kernels,
        transport=known.asyncep_transport,
        strategy=known.asyncep_strategy,
        nodes=known.nnodes,
        node=known.node_rank,
        rendezvous=known.dist_init_addr,
        copies=known.asyncep_copies,
        resident_layers=known.asyncep_resident_layers,
        resident_experts=known.asyncep_resident_experts,
        gather_depth=known.asyncep_gather_depth,
        margin=known.asyncep_margin,
        verify=known.asyncep_verify == "every",
        patience_seconds=known.asyncep_patience_secs,
        kv_free=known.asyncep_kv_free,
        log_gathers=known.asyncep_log_gathers,
        without=known.asyncep_without,
        batch_folder=known.asyncep_batch_dir,
        keys=_keys(known),
        front=front_options.read_flags(known),
        file_bytes=known.asyncep_file_quota,
        file_days=known.asyncep_file_days,
        disk_floor=known.asyncep_disk_floor,
        passed=tuple(passed),
    )


def _keys(known: argparse.Namespace) -> Keys:
    try:
        return Keys.of(
            key_from(known.api_key, KEY_VARIABLE),
            key_from(known.admin_api_key, ADMIN_KEY_VARIABLE),
            known.api_key_file,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _refuse_unservable(known: argparse.Namespace) -> None:
    if known.dp_size < 1:
        raise UsageError(f"--dp-size {known.dp_size}: at least one rank is needed")
    for flag, value in (
        ("--tp-size", known.tp_size),
        ("--ep-size", known.ep_size),
        ("--pp-size", known.pp_size),
    ):
        if value != 1:
            raise UsageError(
                f"{flag} {value}: ranks here are independent and whole; use {flag} 1 and --dp-size {value} instead"
            )
    if known.asyncep_kv_free and known.asyncep_decode == "allow":
        raise UsageError("--asyncep-kv-free: decoding needs the keys and values of earlier steps; leave one flag out")
    _refuse_impossible_group(known)
    if known.quantization is not None:
        raise UsageError(
            f"--quantization {known.quantization}: this version shares bf16 and fp32 experts; leave the flag out"
        )
    if known.dtype not in ("auto", "bfloat16", "float32", "float"):
        raise UsageError(f"--dtype {known.dtype}: use bfloat16 or float32")
    if known.asyncep_threshold_tokens < 1 or known.asyncep_max_wait_ms < 0:
        raise UsageError("--asyncep-threshold-tokens must be at least 1 and --asyncep-max-wait-ms at least 0")
    if known.asyncep_file_quota < 0 or not 0 <= known.asyncep_file_days <= 36500:
        raise UsageError("--asyncep-file-quota must be at least 0 and --asyncep-file-days 0 to 36500")
    if known.asyncep_disk_floor is not None and known.asyncep_disk_floor < 0:
        raise UsageError(f"--asyncep-disk-floor {known.asyncep_disk_floor}: use 0 or more")
    if not 0 < known.port < 65536:
        raise UsageError(f"--port {known.port}: use 1 to 65535")


def _refuse_impossible_group(known: argparse.Namespace) -> None:
    nodes = known.nnodes
    if nodes < 1 or not 0 <= known.node_rank < nodes:
        raise UsageError(f"--node-rank {known.node_rank}: use 0 to {max(nodes, 1) - 1} with --nnodes {nodes}")
    if not 1 <= known.asyncep_copies <= nodes:
        raise UsageError(f"--asyncep-copies {known.asyncep_copies}: use 1 to {nodes}, the number of hosts (--nnodes)")
    if known.asyncep_resident_experts < 0:
        raise UsageError(f"--asyncep-resident-experts {known.asyncep_resident_experts}: use 0 or more")
    depth = known.asyncep_gather_depth
    if (depth is not None and depth < 1) or known.asyncep_resident_layers < 0 or known.asyncep_margin <= 0:
        raise UsageError(
            "--asyncep-gather-depth at least 1, --asyncep-resident-layers at least 0 and --asyncep-margin above 0 are "
            "needed"
        )
    if nodes == 1:
        return
    if known.asyncep_expert_memory is not None:
        raise UsageError("--asyncep-expert-memory: on one host only; several hosts (--nnodes) divide the experts")
    host, _, port = known.dist_init_addr.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--dist-init-addr {known.dist_init_addr!r}: with --nnodes {nodes} give node 0's address as HOST:PORT"
        )


def parse_savings(text: str) -> tuple[Saving, ...]:
    """The savings of a list such as ``direct-replies,batch-tokenization``, or of ``all``.

    Raises:
        argparse.ArgumentTypeError: there is no such saving.
    """
    known: tuple[Saving, ...] = get_args(Saving)
    names = known if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}, all")
    return tuple(saving for saving in known if saving in names)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``64GiB``, ``500MB`` or ``1048576``.

    Raises:
        argparse.ArgumentTypeError: not a size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units[f"{letter}b"] = units[letter] = 1000**power
        units[f"{letter}ib"] = 1024**power
    number = text.strip().rstrip("bBiIkKmMgGtT")
    unit = text.strip()[len(number) :].lower()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write it as 64GiB, 500MB or a number of bytes"
        ) from None


def uses_our_router(options: ServeOptions) -> bool:
    """Whether requests go through our router to the ranks: unless one of SGLang's methods is asked for.

    A host with one rank among several has none: all that it could know, the router in front of the hosts does.
    """
    asked = any(flag.startswith("--load-balance-method") for flag in options.passed)
    return not asked and (options.ranks > 1 or options.nodes == 1)


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
    if "batch-tokenization" not in options.without:
        # Texts of a list go to the tokenizer and on to the router together; SGLang's default is one after the other.
        unless_given("--enable-tokenizer-batch-encode")
    if "no-access-log" not in options.without:
        # A line a request is a tenth of the front's work; errors are logged as ever.
        unless_given("--log-level-http", "warning")
    if options.kv_free:
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
