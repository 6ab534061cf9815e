"""The router's settings: names, defaults and meanings of every flag that does something here.

The command line is made from this dataclass (`flags.py`). Defaults are `sglang_router`'s, except for
`policy`, `max_payload_size` and `prometheus_host`; flags that router lacks are at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from asyncep_router.config import Limits
from asyncep_router.errors import ConfigError
from asyncep_router.http.breaker import BreakerSettings
from asyncep_router.http.retry import RetryPolicy
from asyncep_router.http.worker_urls import normalize, worker_key
from asyncep_router.keys import Keys

_LAST_PORT = 65535
POLICIES = ("asyncep", "cache_aware", "round_robin", "random", "power_of_two")


KEY_VARIABLE = "ASYNCEP_ROUTER_API_KEY"
ADMIN_KEY_VARIABLE = "ASYNCEP_ROUTER_ADMIN_API_KEY"
WORKER_ADMIN_KEY_VARIABLE = "ASYNCEP_ROUTER_WORKER_ADMIN_API_KEY"
WORKER_KEY_VARIABLE = "ASYNCEP_ROUTER_WORKER_API_KEY"


_LARGEST = (1 << 63) - 1
# Beyond, an event loop's clock overflows; some flags are given a very large number for "never".
_LONGEST_SECONDS = 10**10
# The kernel counts how long an answer may be untaken in milliseconds, in 31 bits (TCP_USER_TIMEOUT).
_LONGEST_TAKING = 2_147_483


def _flag(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """``least``, ``most``: bounds of a number; other values are refused by the flag's name."""
    return field(default=default, metadata={"help": text, "choices": choices, "least": least, "most": most})


def _key(variable: str, text: str) -> Any:
    """Not shown when printed. `variable`: of the environment, asked where the flag is silent."""
    text = f"{text}; @FILE reads the key from a file's first line ({variable})"
    return field(default=None, repr=False, metadata={"help": text, "choices": None, "variable": variable})


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _check_number(flag: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{flag} {value}: must be a finite number")
    least, most = bounds.get("least"), min(bounds.get("most") or _LARGEST, _LARGEST)
    if least is not None and value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}")
    if value > most:
        raise ConfigError(f"{flag} {value}: must be at most {most}")


def _check_urls(flag: str, urls: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for url in urls:
        try:
            normal = normalize(url)
        except ConfigError as error:
            raise ConfigError(f"{flag}: {error}") from None
        if normal in seen:
            raise ConfigError(f"{flag}: {normal} stands there twice")
        seen.add(normal)


@dataclass(frozen=True)
class RouterOptions:
    """Every setting. Raises `ConfigError` for values they cannot have."""

    worker_urls: tuple[str, ...] = _flag((), "URLs of the SGLang servers; more can be added while serving")
    host: str = _flag("0.0.0.0", "address to listen on")
    port: int = _flag(30000, "port to listen on", least=0, most=_LAST_PORT)
    policy: str = _flag(
        "asyncep", f"how ranks are chosen: {', '.join(POLICIES)} (sglang_router's default is cache_aware)", POLICIES
    )
    cache_threshold: float = _flag(
        0.3, "cache_aware: share of a prompt that a rank must hold to get it", least=0, most=1
    )
    balance_abs_threshold: int = _flag(
        64,
        "cache_aware: requests that the busiest rank may have more than the least busy (both limits must be passed)",
        least=0,
    )
    balance_rel_threshold: float = _flag(
        1.5, "cache_aware: ratio that requests of the busiest rank may have to the least busy one's", least=0
    )
    max_tree_size: int = _flag(67108864, "tokens of the view of the ranks' caches, all ranks together", least=1)
    max_payload_size: int = _flag(67108864, "bytes of a request body at most (sglang_router: 536870912)", least=1)
    api_key: str | None = _key(
        KEY_VARIABLE,
        "key that clients must present; also sent to the workers of --worker-urls, unless --worker-api-key is given",
    )
    worker_startup_timeout_secs: int = _flag(
        1800, "seconds until a worker that never answered is reported as failed", least=0, most=_LONGEST_SECONDS
    )
    worker_startup_check_interval: int = _flag(
        30, "seconds between looks at a worker that does not answer, at most", least=1, most=_LONGEST_SECONDS
    )
    log_level: str = _flag("info", "log level", ("debug", "info", "warn", "error"))
    prometheus_port: int = _flag(29000, "port of /metrics; 0: no metrics server", least=0, most=_LAST_PORT)
    prometheus_host: str | None = _flag(None, "address of /metrics; default that of --host")
    prometheus_duration_buckets: tuple[float, ...] = _flag((), "bounds of the duration histograms, seconds")
    request_id_headers: tuple[str, ...] = _flag((), "headers to take a request's id from, first match wins")
    request_timeout_secs: int = _flag(1800, "seconds a worker may take for an answer", least=1, most=_LONGEST_SECONDS)
    shutdown_grace_period_secs: int = _flag(
        180, "seconds to finish requests after SIGTERM", least=0, most=_LONGEST_SECONDS
    )
    cors_allowed_origins: tuple[str, ...] = _flag((), "origins allowed to call from a browser")
    max_concurrent_requests: int = _flag(-1, "requests worked on at once; -1: no limit", least=-1)
    queue_size: int = _flag(
        100, "requests that wait when --max-concurrent-requests are worked on; more are answered 429", least=0
    )
    queue_timeout_secs: int = _flag(
        60, "seconds a request waits before it is answered 408", least=0, most=_LONGEST_SECONDS
    )
    rate_limit_tokens_per_second: int | None = _flag(None, "requests a second; default no limit", least=1)
    retry_max_retries: int = _flag(5, "attempts after the first", least=0)
    retry_initial_backoff_ms: int = _flag(
        50, "wait before the second attempt, milliseconds", least=0, most=_LONGEST_SECONDS
    )
    retry_max_backoff_ms: int = _flag(
        30000, "longest wait between attempts, milliseconds", least=0, most=_LONGEST_SECONDS
    )
    retry_backoff_multiplier: float = _flag(1.5, "growth of the wait from attempt to attempt", least=1)
    retry_jitter_factor: float = _flag(0.2, "each wait is longer or shorter by up to this share", least=0, most=1)
    disable_retries: bool = _flag(False, "one attempt only")
    health_failure_threshold: int = _flag(3, "failed checks in a row after which a worker counts as unhealthy", least=1)
    health_success_threshold: int = _flag(
        2, "successful checks in a row after which an unhealthy worker counts as healthy", least=1
    )
    health_check_timeout_secs: int = _flag(5, "seconds a check may take", least=1, most=_LONGEST_SECONDS)
    health_check_interval_secs: int = _flag(60, "seconds between checks", least=1, most=_LONGEST_SECONDS)
    health_check_endpoint: str = _flag("/health", "path of the health check")
    disable_health_check: bool = _flag(False, "stop the regular checks of a worker after its first answer")
    cb_failure_threshold: int = _flag(10, "failures in a row that open a worker's circuit", least=1)
    cb_success_threshold: int = _flag(3, "successes that close an open circuit", least=1)
    cb_timeout_duration_secs: int = _flag(60, "seconds a circuit stays open", least=0, most=_LONGEST_SECONDS)
    cb_window_duration_secs: int = _flag(
        120, "seconds after which a failure is forgotten", least=0, most=_LONGEST_SECONDS
    )
    disable_circuit_breaker: bool = _flag(False, "never open a circuit")
    model_path: str | None = _flag(None, "where the model's config.json is; default: what the workers say")
    tokenizer_path: str | None = _flag(None, "where its tokenizer is; default: what the workers say")
    tls_cert_path: str | None = _flag(None, "certificate to serve HTTPS with (PEM)")
    tls_key_path: str | None = _flag(None, "private key of --tls-cert-path (PEM)")

    admin_api_key: str | None = _key(ADMIN_KEY_VARIABLE, "key for adding and removing workers, flushing and aborting")
    api_key_file: str | None = _flag(
        None, "keys of several clients, a line each: NAME KEY [admin] [prompts_per_second=N]"
    )
    worker_api_key: str | None = _key(
        WORKER_KEY_VARIABLE, "key of the workers of --worker-urls; default that of --api-key"
    )
    worker_admin_api_key: str | None = _key(
        WORKER_ADMIN_KEY_VARIABLE, "key of those workers for /flush_cache and /abort_request, if it differs"
    )
    trusted_worker_urls: tuple[str, ...] = _flag(
        (), "URLs that get the workers' key also when they are added by POST /workers without an api_key"
    )
    max_prompts: int = _flag(16384, "prompts of one request at most (400 beyond)", least=1)
    max_held_bytes: int = _flag(
        1 << 30, "bytes of the bodies of all requests in progress together (503 beyond)", least=1
    )
    max_connections: int = _flag(
        16384, "open connections of clients; further ones are answered 503 and closed", least=1
    )
    header_timeout_secs: float = _flag(
        10.0, "seconds for the headers of a connection's first request (408 beyond)", least=0.1, most=_LONGEST_SECONDS
    )
    body_timeout_secs: float = _flag(
        30.0,
        "seconds a client has to send a body, and one more for each 16 KiB that came (408 beyond); also the "
        "longest pause in taking an answer",
        least=0.1,
        most=_LONGEST_TAKING,
    )
    keep_alive_timeout_secs: float = _flag(
        75.0,
        "seconds until the headers of a later request are complete; then the connection is closed",
        least=0.1,
        most=_LONGEST_SECONDS,
    )
    tokenizer: str = _flag(
        "auto",
        "who tokenizes text: this process, a worker's /tokenize, or nobody (prefixes are then compared as text); "
        "auto: this process if it agrees with a worker on samples, else a worker",
        ("auto", "local", "worker", "none"),
    )
    prefix_view: str = _flag("blocks", "view of the ranks' caches: blocks, or SGLang's radix tree", ("blocks", "radix"))
    prefix_block_tokens: int = _flag(64, "--prefix-view blocks: tokens of a block", least=1)
    threshold_tokens: int = _flag(
        0, "T of a rank in tokens; 0: what the worker reports, else its chunked prefill size, else 8192", least=0
    )
    inflight_target: float = _flag(
        2.0, "a rank gets work while its FLOPs in flight are below this many times T", least=1
    )
    max_wait_ms: float = _flag(
        0.0,
        "longest milliseconds that requests wait for more while every rank is idle and less than a batch waits",
        least=0,
        most=_LONGEST_SECONDS,
    )
    starve_after_secs: float = _flag(
        10.0, "seconds from which a waiting request goes first", least=0, most=_LONGEST_SECONDS
    )
    affinity: float = _flag(
        0.5, "share of a prompt that a rank must hold for the prompt to wait for it", least=0, most=1
    )
    without_rules: tuple[str, ...] = _flag(
        (), "rules of the policy to leave out, to measure them: F1 longest prefix first, F2 net FLOPs, F3 fill to T"
    )
    log_decisions: bool = _flag(False, "one JSON line on stdout for each prompt sent")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_number(flag_of(each.name), getattr(self, each.name), each.metadata)
        if self.max_concurrent_requests == 0:
            raise ConfigError("--max-concurrent-requests 0: must be at least 1, or -1 for no limit")
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy {self.policy}: known are {', '.join(POLICIES)}")
        if bool(self.tls_cert_path) != bool(self.tls_key_path):
            raise ConfigError("--tls-cert-path and --tls-key-path: give both or neither")
        buckets = self.prometheus_duration_buckets
        if list(buckets) != sorted(set(buckets)) or not all(map(math.isfinite, buckets)):
            raise ConfigError(
                f"--prometheus-duration-buckets {' '.join(map(str, buckets))}: finite bounds in rising order are needed"
            )
        for name in ("worker_urls", "trusted_worker_urls"):
            _check_urls(flag_of(name), getattr(self, name))
        # Built for their checks.
        _ = (self.retry_policy, self.breaker_settings, self.limits, self.keys)
        for flag, key in (
            ("--worker-api-key", self.key_for_workers),
            ("--worker-admin-api-key", self.worker_admin_api_key),
        ):
            try:
                worker_key(key)
            except ConfigError as error:
                raise ConfigError(f"{flag}: {error}") from None

    @property
    def keys(self) -> Keys:
        """Of clients and administrators."""
        return Keys.of(self.api_key, self.admin_api_key, self.api_key_file)

    @property
    def key_for_workers(self) -> str | None:
        """What the workers of `--worker-urls` get."""
        return self.worker_api_key or self.api_key

    @property
    def trusted_urls(self) -> frozenset[str]:
        """`--trusted-worker-urls`, normalized."""
        return frozenset(normalize(url) for url in self.trusted_worker_urls)

    @property
    def metrics_host(self) -> str:
        """Where /metrics listens."""
        return self.host if self.prometheus_host is None else self.prometheus_host

    @property
    def retry_policy(self) -> RetryPolicy:
        """The retry flags."""
        return RetryPolicy(
            0 if self.disable_retries else self.retry_max_retries,
            self.retry_initial_backoff_ms / 1000,
            self.retry_max_backoff_ms / 1000,
            self.retry_backoff_multiplier,
            self.retry_jitter_factor,
        )

    @property
    def breaker_settings(self) -> BreakerSettings:
        """The circuit breaker flags."""
        return BreakerSettings(
            self.cb_failure_threshold,
            self.cb_success_threshold,
            self.cb_timeout_duration_secs,
            self.cb_window_duration_secs,
            not self.disable_circuit_breaker,
        )

    @property
    def limits(self) -> Limits:
        """What the frontend needs to know."""
        return Limits(
            inflight_target=self.inflight_target,
            max_wait=self.max_wait_ms / 1000,
            starve_after=self.starve_after_secs,
            affinity=self.affinity,
            without=frozenset(self.without_rules),
        )
