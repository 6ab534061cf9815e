"""The router's settings: names, defaults and meanings of every flag that does something here.

The command line is made from this dataclass (`flags.py`). Defaults are `sglang_router`'s except for
`policy`; flags that router lacks are at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncep_router.config import Limits
from asyncep_router.errors import ConfigError
from asyncep_router.http.breaker import BreakerSettings
from asyncep_router.http.retry import RetryPolicy
from asyncep_router.http.worker_urls import normalize, worker_key
from asyncep_router.keys import Keys

POLICIES = ("asyncep", "cache_aware", "round_robin", "random", "power_of_two")


KEY_VARIABLE = "ASYNCEP_ROUTER_API_KEY"
ADMIN_KEY_VARIABLE = "ASYNCEP_ROUTER_ADMIN_API_KEY"
WORKER_ADMIN_KEY_VARIABLE = "ASYNCEP_ROUTER_WORKER_ADMIN_API_KEY"
WORKER_KEY_VARIABLE = "ASYNCEP_ROUTER_WORKER_API_KEY"


def _flag(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


def _key(variable: str, text: str) -> Any:
    """Not shown when printed. `variable`: of the environment, asked where the flag is silent."""
    text = f"{text}; @FILE: its first line is the key ({variable})"
    return field(default=None, repr=False, metadata={"help": text, "choices": None, "variable": variable})


@dataclass(frozen=True)
class RouterOptions:
    """Every setting. Raises `ConfigError` for values they cannot have."""

    worker_urls: tuple[str, ...] = _flag((), "URLs of the SGLang servers; more can be added while serving")
    host: str = _flag("0.0.0.0", "address to listen on")
    port: int = _flag(30000, "port to listen on")
    policy: str = _flag("asyncep", "how ranks are chosen (sglang_router's default is cache_aware)", POLICIES)
    cache_threshold: float = _flag(0.3, "cache_aware: share of a prompt that must be held to follow it")
    balance_abs_threshold: int = _flag(64, "cache_aware: requests of imbalance that are tolerated")
    balance_rel_threshold: float = _flag(1.5, "cache_aware: ratio of imbalance that is tolerated")
    max_tree_size: int = _flag(67108864, "tokens of the view of the ranks' caches, all ranks together")
    max_payload_size: int = _flag(67108864, "bytes of a request body at most (sglang_router: 536870912)")
    api_key: str | None = _key(
        KEY_VARIABLE, "key that clients must present; also sent to the workers of --worker-urls (--worker-api-key)"
    )
    worker_startup_timeout_secs: int = _flag(1800, "seconds until a worker that never answered is reported as failed")
    worker_startup_check_interval: int = _flag(30, "seconds between looks at a worker that does not answer, at most")
    log_level: str = _flag("info", "log level", ("debug", "info", "warn", "error"))
    prometheus_port: int = _flag(29000, "port of /metrics; 0: no metrics server")
    prometheus_host: str | None = _flag(None, "address of /metrics; default that of --host")
    prometheus_duration_buckets: tuple[float, ...] = _flag((), "bounds of the duration histograms, seconds")
    request_id_headers: tuple[str, ...] = _flag((), "headers to take a request's id from, first match wins")
    request_timeout_secs: int = _flag(1800, "seconds a worker may take for an answer")
    shutdown_grace_period_secs: int = _flag(180, "seconds to finish requests after SIGTERM")
    cors_allowed_origins: tuple[str, ...] = _flag((), "origins allowed to call from a browser")
    max_concurrent_requests: int = _flag(-1, "requests worked on at once; -1: no limit")
    queue_size: int = _flag(100, "requests that wait beyond that; more are answered 429")
    queue_timeout_secs: int = _flag(60, "seconds a request waits before it is answered 408")
    rate_limit_tokens_per_second: int | None = _flag(None, "requests a second; default no limit")
    retry_max_retries: int = _flag(5, "attempts after the first")
    retry_initial_backoff_ms: int = _flag(50, "wait before the second attempt, milliseconds")
    retry_max_backoff_ms: int = _flag(30000, "longest wait between attempts, milliseconds")
    retry_backoff_multiplier: float = _flag(1.5, "growth of the wait from attempt to attempt")
    retry_jitter_factor: float = _flag(0.2, "share of the wait that is left to chance")
    disable_retries: bool = _flag(False, "one attempt only")
    health_failure_threshold: int = _flag(3, "failed checks in a row after which a worker counts as unhealthy")
    health_success_threshold: int = _flag(2, "successful checks in a row after which it counts as healthy again")
    health_check_timeout_secs: int = _flag(5, "seconds a check may take")
    health_check_interval_secs: int = _flag(60, "seconds between checks")
    health_check_endpoint: str = _flag("/health", "what is asked")
    disable_health_check: bool = _flag(False, "do not check workers that answered once")
    cb_failure_threshold: int = _flag(10, "failures in a row that open a worker's circuit")
    cb_success_threshold: int = _flag(3, "successes that close it again")
    cb_timeout_duration_secs: int = _flag(60, "seconds it stays open")
    cb_window_duration_secs: int = _flag(120, "seconds after which a failure is forgotten")
    disable_circuit_breaker: bool = _flag(False, "never open a circuit")
    model_path: str | None = _flag(None, "where the model's config.json is; default: what the workers say")
    tokenizer_path: str | None = _flag(None, "where its tokenizer is; default: what the workers say")
    tls_cert_path: str | None = _flag(None, "certificate to serve HTTPS with (PEM)")
    tls_key_path: str | None = _flag(None, "its key (PEM)")

    admin_api_key: str | None = _key(ADMIN_KEY_VARIABLE, "key for adding and removing workers, flushing and aborting")
    api_key_file: str | None = _flag(
        None, "keys of several clients, a line each: NAME KEY [admin] [prompts_per_second=N]"
    )
    worker_api_key: str | None = _key(
        WORKER_KEY_VARIABLE, "key of the workers of --worker-urls; default that of --api-key"
    )
    worker_admin_api_key: str | None = _key(
        WORKER_ADMIN_KEY_VARIABLE, "their key for /flush_cache and /abort_request, where they want another one for that"
    )
    trusted_worker_urls: tuple[str, ...] = _flag(
        (), "URLs that get the workers' key also when they are added by POST /workers without an api_key"
    )
    max_prompts: int = _flag(16384, "prompts of one request at most (400 beyond)")
    max_held_bytes: int = _flag(1 << 30, "bytes of the bodies of all requests in progress together (503 beyond)")
    max_connections: int = _flag(16384, "open connections of clients; further ones are answered 503 and closed")
    header_timeout_secs: float = _flag(10.0, "seconds a client has to send a request's headers (408 beyond)")
    body_timeout_secs: float = _flag(
        30.0,
        "seconds a client has to send a body, and one more for each 16 KiB that came (408 beyond); also the "
        "longest pause in taking an answer",
    )
    keep_alive_timeout_secs: float = _flag(75.0, "seconds after which an unused connection is closed")
    tokenizer: str = _flag(
        "auto",
        "who tokenizes text: this process, a worker's /tokenize, or nobody (prefixes are then compared as text); "
        "auto: this process if it agrees with a worker on samples, else a worker",
        ("auto", "local", "worker", "none"),
    )
    prefix_view: str = _flag("blocks", "view of the ranks' caches: blocks, or SGLang's radix tree", ("blocks", "radix"))
    prefix_block_tokens: int = _flag(64, "blocks: tokens by which prompts are compared")
    threshold_tokens: int = _flag(0, "tokens that saturate a rank; 0: its chunked prefill size, else 8192")
    inflight_target: float = _flag(2.0, "a rank gets work while it has less than this many times that")
    max_wait_ms: float = _flag(0.0, "milliseconds a request is held for company while every rank is below T")
    starve_after_secs: float = _flag(10.0, "seconds from which a waiting request goes first")
    affinity: float = _flag(0.5, "share of a prompt that must be held for it to wait for that rank")
    without_rules: tuple[str, ...] = _flag((), "rules of the policy to leave out, of F1 F2 F3; for ablations")
    log_decisions: bool = _flag(False, "one JSON line on stdout for every request sent")

    def __post_init__(self) -> None:
        for name in ("queue_size", "queue_timeout_secs", "shutdown_grace_period_secs", "port", "prometheus_port"):
            self._at_least(name, 0)
        for name in (
            "max_tree_size",
            "max_payload_size",
            "request_timeout_secs",
            "health_failure_threshold",
            "health_success_threshold",
            "health_check_timeout_secs",
            "health_check_interval_secs",
            "worker_startup_check_interval",
            "prefix_block_tokens",
            "max_prompts",
            "max_held_bytes",
            "max_connections",
        ):
            self._at_least(name, 1)
        for name in ("header_timeout_secs", "body_timeout_secs", "keep_alive_timeout_secs"):
            self._at_least(name, 0.1)
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy {self.policy}: known are {', '.join(POLICIES)}")
        if bool(self.tls_cert_path) != bool(self.tls_key_path):
            raise ConfigError("--tls-cert-path and --tls-key-path: give both or neither")
        # Built for their checks.
        _ = (self.retry_policy, self.breaker_settings, self.limits, self.keys, self.trusted_urls)
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

    def _at_least(self, name: str, least: float) -> None:
        if getattr(self, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")

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
