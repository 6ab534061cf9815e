"""What the front takes from clients at most."""

from __future__ import annotations

from dataclasses import dataclass

from asyncep_sgl.config.flags import setting

# Of text that is no attack. A run of 32 blanks is a token too.
_CHARS_A_TOKEN = 32

# Seconds that the kernel can count in milliseconds in 31 bits (TCP_USER_TIMEOUT).
_LONGEST = 2_147_483


@dataclass(frozen=True)
class FrontSettings:
    """Bounds on what one client, or all together, may ask of the front. 0 in `max_prompt_chars` means automatic."""

    max_body_bytes: int = setting(64 << 20, "SIZE", "largest body of a request; larger ones are answered 413", least=1)
    max_held_bytes: int = setting(
        256 << 20, "SIZE", "bytes of the bodies of all requests in progress; beyond it 503", least=1
    )
    max_prompts: int = setting(16384, "N", "prompts times n of one request (400 beyond)", least=1)
    max_prompt_chars: int = setting(
        0,
        "N",
        "characters of one prompt (400 beyond, before anything is tokenized); 0: 32 times the tokens of the context",
        least=0,
    )
    max_samples: int = setting(128, "N", "largest n, the samples of a prompt (400 beyond)", least=1)
    max_logprobs: int = setting(
        1_000_000,
        "N",
        "log-probabilities in one answer: positions times ids, all prompts together (400 beyond)",
        least=1,
    )
    max_connections: int = setting(4096, "N", "open connections; further ones are answered 503 and closed", least=1)
    header_timeout_secs: float = setting(
        10.0, "S", "time a client has to send a request's headers", least=0.1, most=_LONGEST
    )
    body_timeout_secs: float = setting(
        30.0, "S", "longest pause in sending a body, or in taking an answer", least=0.1, most=_LONGEST
    )
    keep_alive_timeout_secs: int = setting(
        75, "S", "time after which an unused connection is closed", least=1, most=_LONGEST
    )
    cors_origins: tuple[str, ...] = setting(
        (), "URL", "origins whose pages may call the server from a browser (default none)"
    )

    def prompt_chars(self, context: int) -> int:
        """Characters of one prompt at most, for a model whose context has so many tokens."""
        return self.max_prompt_chars or _CHARS_A_TOKEN * context
