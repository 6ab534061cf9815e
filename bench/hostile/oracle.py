"""What an answer to a hostile request must be. Pure.

Refusing is right, serving is right; what is wrong is no answer, a late one, one that says the server is at fault, and
one that says what it should not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from hostile.cases import Case

_INSIDES = re.compile(rb"Traceback \(most recent call last\)|/site-packages/|File \\?\"/")
# The word by which a server says that a request was on a rank when it died, twice.
_QUARANTINED = b"quarantined"
_NEVER_JSON = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        status: None where no whole answer came; ``error`` then says why.
        seconds: from the first byte sent to the last one received.
    """

    status: int | None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""
    seconds: float = 0.0


def verdict(case: Case, outcome: Outcome, secrets: Collection[str] = ()) -> str | None:
    """None where all is well, else what is wrong, in a few words that are the same for the same kind of fault.

    Args:
        secrets: words that no answer may have in it.
    """
    if case.manner != "whole":
        return None
    if outcome.status is None:
        return "no answer in time" if outcome.error == "timeout" else f"no answer: {outcome.error}"
    if any(secret.encode() in outcome.body for secret in secrets):
        return "a key in an answer"
    if outcome.status >= 500:
        if _QUARANTINED in outcome.body:
            return "a rank died of it"
        if outcome.status != 503 or "retry-after" not in outcome.headers:
            return f"{outcome.status}"
    if outcome.status >= 400 and _INSIDES.search(outcome.body):
        return "the server's insides in an answer"
    if outcome.status >= 400 and not outcome.body.strip() and case.method != "HEAD":
        return f"{outcome.status} without a reason"
    # The answer to a HEAD has the headers of a document, and none.
    return _unreadable(outcome) if case.method != "HEAD" else None


def _unreadable(outcome: Outcome) -> str | None:
    kind = outcome.headers.get("content-type", "")
    documents: list[bytes] = []
    if kind.startswith("application/json"):
        documents = [outcome.body]
    elif kind.startswith("text/event-stream"):
        events = [line[6:] for line in outcome.body.splitlines() if line.startswith(b"data: ")]
        documents = [event for event in events if event != b"[DONE]"]
    for document in documents:
        try:
            json.loads(document, parse_constant=_refuse)
        except ValueError:
            return "an answer that is no JSON"
        except RecursionError:
            return "an answer too deep to read"
    return None


def _refuse(word: str) -> None:
    assert word in _NEVER_JSON
    raise ValueError(f"{word} is not JSON")


def kind_of(case: Case, wrong: str, outcome: Outcome) -> str:
    """Cases of the same kind are one finding: the same route, fault and words, whatever the numbers in them."""
    words = re.sub(rb"[0-9]+|'[^']*'|\"[^\"]{30,}\"", b"#", outcome.body[:300]).decode(errors="replace")
    fields = ",".join(sorted({name.split(".")[-1] for name, _ in case.changed}))
    return f"{case.path} {wrong} {words[:120] or fields}"
