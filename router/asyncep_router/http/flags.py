"""The command line: flags of `sglang_router`, each used, ignored with a warning, or refused with a reason."""

from __future__ import annotations

import argparse
import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from asyncep_router.errors import ConfigError
from asyncep_router.http.options import RouterOptions, flag_of
from asyncep_router.keys import key_from

logger = logging.getLogger("asyncep_router")


class Support(Enum):
    """What becomes of a flag that has no setting of its own."""

    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of `sglang_router` without a meaning here. `takes`: argparse's nargs, "" for a switch.

    `harmless`: a value that asks for nothing, accepted in silence.
    """

    name: str
    support: Support
    reason: str
    takes: str | None = None
    harmless: str | None = None


_PREFILL_ONLY = "there is one kind of worker here: prefill is all there is"
_PARSERS = "the workers parse answers themselves; start them with this flag"
_HISTORY = "no conversations are kept here"
_DISCOVERY = "no Kubernetes discovery; add workers with POST /workers"
_CONTROL_PLANE = (
    "keys are given by --api-key, --admin-api-key and --api-key-file; ignoring this would leave a door open"
)
_OUTGOING_TLS = "TLS towards workers uses the system's certificates only"
_TOKENIZER_CACHE = "every prompt is tokenized once, nothing is cached"
_TRACING = "no traces are sent; --log-decisions and /metrics show every decision"

_I, _R = Support.IGNORED, Support.REFUSED
FOREIGN: tuple[ForeignFlag, ...] = (
    ForeignFlag("dp-aware", _I, "always on: every rank behind a URL is seen and addressed", ""),
    ForeignFlag("eviction-interval-secs", _I, "the view keeps to its budget at every insertion"),
    ForeignFlag("max-idle-secs", _I, "only the manual policy has it"),
    ForeignFlag("assignment-mode", _I, "only the manual policy has it"),
    ForeignFlag("bucket-adjust-interval-secs", _I, "only the bucket policy has it"),
    ForeignFlag("chat-template", _I, "the workers apply their own"),
    ForeignFlag("reasoning-parser", _I, _PARSERS),
    ForeignFlag("tool-call-parser", _I, _PARSERS),
    ForeignFlag("tokenizer-cache-enable-l0", _I, _TOKENIZER_CACHE, ""),
    ForeignFlag("tokenizer-cache-l0-max-entries", _I, _TOKENIZER_CACHE),
    ForeignFlag("tokenizer-cache-enable-l1", _I, _TOKENIZER_CACHE, ""),
    ForeignFlag("tokenizer-cache-l1-max-memory", _I, _TOKENIZER_CACHE),
    ForeignFlag("history-backend", _I, _HISTORY, harmless="memory"),
    ForeignFlag("oracle-pool-min", _I, _HISTORY),
    ForeignFlag("oracle-pool-max", _I, _HISTORY),
    ForeignFlag("oracle-pool-timeout-secs", _I, _HISTORY),
    ForeignFlag("postgres-pool-max", _I, _HISTORY),
    ForeignFlag("redis-pool-max", _I, _HISTORY),
    ForeignFlag("redis-retention-days", _I, _HISTORY),
    ForeignFlag("log-dir", _I, "logs go to stderr, decisions to stdout; redirect them"),
    ForeignFlag("enable-trace", _I, _TRACING, ""),
    ForeignFlag("otlp-traces-endpoint", _I, _TRACING),
    ForeignFlag("service-discovery-port", _I, _DISCOVERY),
    ForeignFlag("bootstrap-port-annotation", _I, _PREFILL_ONLY),
    ForeignFlag("backend", _R, "workers are SGLang servers", harmless="sglang"),
    ForeignFlag("mini-lb", _R, "there is one router; leave the flag out", ""),
    ForeignFlag("pd-disaggregation", _R, _PREFILL_ONLY, ""),
    ForeignFlag("prefill", _R, _PREFILL_ONLY, "+"),
    ForeignFlag("decode", _R, _PREFILL_ONLY, "+"),
    ForeignFlag("prefill-policy", _R, _PREFILL_ONLY),
    ForeignFlag("decode-policy", _R, _PREFILL_ONLY),
    ForeignFlag("enable-igw", _R, "one router serves one model; start one for each", ""),
    ForeignFlag("service-discovery", _R, _DISCOVERY, ""),
    ForeignFlag("selector", _R, _DISCOVERY, "+"),
    ForeignFlag("prefill-selector", _R, _DISCOVERY, "+"),
    ForeignFlag("decode-selector", _R, _DISCOVERY, "+"),
    ForeignFlag("service-discovery-namespace", _R, _DISCOVERY),
    ForeignFlag("oracle-wallet-path", _R, _HISTORY),
    ForeignFlag("oracle-tns-alias", _R, _HISTORY),
    ForeignFlag("oracle-connect-descriptor", _R, _HISTORY),
    ForeignFlag("oracle-username", _R, _HISTORY),
    ForeignFlag("oracle-password", _R, _HISTORY),
    ForeignFlag("postgres-db-url", _R, _HISTORY),
    ForeignFlag("redis-url", _R, _HISTORY),
    ForeignFlag("mcp-config-path", _R, "no tools are called here"),
    ForeignFlag("client-cert-path", _R, _OUTGOING_TLS),
    ForeignFlag("client-key-path", _R, _OUTGOING_TLS),
    ForeignFlag("ca-cert-paths", _R, _OUTGOING_TLS, "*"),
    ForeignFlag("control-plane-api-keys", _R, _CONTROL_PLANE, "*"),
    ForeignFlag("control-plane-audit-enabled", _R, _CONTROL_PLANE, ""),
    ForeignFlag("jwt-issuer", _R, _CONTROL_PLANE),
    ForeignFlag("jwt-audience", _R, _CONTROL_PLANE),
    ForeignFlag("jwt-jwks-uri", _R, _CONTROL_PLANE),
    ForeignFlag("jwt-role-mapping", _R, _CONTROL_PLANE, "*"),
)

# Policies of sglang_router that have no counterpart, and why.
_FOREIGN_POLICIES = {
    "manual": "sticky sessions are for conversations; prefill-only requests are placed by their prefix",
    "bucket": _PREFILL_ONLY,
}


def add_flags(parser: argparse.ArgumentParser, prefix: str = "", without: frozenset[str] = frozenset()) -> None:
    """Add every flag as `--PREFIXname`, those in `without` (names of settings) left out."""
    hints = get_type_hints(RouterOptions)
    for setting in fields(RouterOptions):
        if setting.name in without:
            continue
        kind, many = _kind(hints[setting.name])
        flag = f"--{prefix}{setting.name.replace('_', '-')}"
        default = "" if setting.default in (None, ()) else f" (default {setting.default})"
        keywords: dict[str, Any] = {"help": setting.metadata["help"] + default, "default": None}
        if kind is bool:
            keywords["action"] = "store_true"
        else:
            keywords["type"] = kind
            if many:
                keywords["nargs"] = "*"
            if setting.metadata["choices"] and setting.name != "policy":
                keywords["choices"] = setting.metadata["choices"]
        parser.add_argument(flag, dest=_dest(setting.name), **keywords)
    for foreign in FOREIGN:
        keywords = {"help": argparse.SUPPRESS, "default": None, "dest": _dest(foreign.name)}
        if foreign.takes == "":
            keywords["action"] = "store_true"
        elif foreign.takes:
            keywords["nargs"] = foreign.takes
        parser.add_argument(f"--{prefix}{foreign.name}", **keywords)


def read_flags(namespace: argparse.Namespace, prefix: str = "", **settings: Any) -> RouterOptions:
    """The settings from parsed flags; `settings` stand in for flags left out.

    Warns of ignored flags. Raises `ConfigError` for refused ones and for values out of range.
    """
    for foreign in FOREIGN:
        value = getattr(namespace, _dest(foreign.name), None)
        if value is None or value is False or value == foreign.harmless:
            continue
        message = f"--{prefix}{foreign.name}: {foreign.reason}"
        if foreign.support is Support.REFUSED:
            raise ConfigError(message)
        logger.warning("%s (ignored)", message)
    given: dict[str, Any] = {}
    for setting in fields(RouterOptions):
        value = getattr(namespace, _dest(setting.name), None)
        variable = setting.metadata.get("variable")
        # A key that stands in for the flag, such as the servers' in launch_server, comes before the environment's.
        if variable is not None and (value is not None or not settings.get(setting.name)):
            value = key_from(value, variable)
        if value is not None and value is not False:
            given[setting.name] = tuple(value) if isinstance(value, list) else value
    policy = given.get("policy")
    if policy in _FOREIGN_POLICIES:
        raise ConfigError(f"--{prefix}policy {policy}: {_FOREIGN_POLICIES[policy]}")
    try:
        return RouterOptions(**{**settings, **given})
    except ConfigError as error:
        # Settings that the caller gives have flags of their own, without the prefix.
        own = tuple(map(flag_of, settings))
        if prefix and str(error).startswith("--") and not str(error).startswith(own):
            raise ConfigError(f"--{prefix}{str(error).removeprefix('--')}") from None
        raise


def parse(arguments: Sequence[str], prog: str = "asyncep_router.launch_router") -> RouterOptions:
    """The router's own command line. Raises `ConfigError`; exits as argparse does on unknown flags."""
    parser = argparse.ArgumentParser(prog=prog, description="Prefix-aware router in front of SGLang servers.")
    add_flags(parser)
    return read_flags(parser.parse_args(arguments))


def key_flags(prefix: str = "") -> list[str]:
    """The flags whose values are keys."""
    named = (setting.name for setting in fields(RouterOptions) if "variable" in setting.metadata)
    return [f"--{prefix}{name.replace('_', '-')}" for name in named]


def _dest(name: str) -> str:
    return "router_" + name.replace("-", "_")


def _kind(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether there are several)."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
