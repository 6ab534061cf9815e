"""Mails out of the SpamAssassin corpus: what is readable of them, and what is said where the corpus is not there."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from asyncep.cli import main
from asyncep.demo.spam import FILE, all_mails, corpus_path, read_mail

PLAIN = b"Subject: =?x?\n\nHello  there\r\n\r\n\r\nagain\x00\n"
HTML = b"Subject: Buy\nContent-Type: text/html; charset=no-such\n\n<style>p {}</style><p>Cheap &amp; <b>now</b></p>\n"
MIXED = (
    b"Subject: Two\n parts\nContent-Type: multipart/alternative; boundary=B\n\n--B\nContent-Type: text/plain\n"
    b"Content-Transfer-Encoding: base64\n\n" + base64.b64encode("naïve".encode("latin-1")) + b"\n"
    b"--B\nContent-Type: text/html\n\n<p>the same</p>\n--B--\n"
)


def test_readable_text_of_mails() -> None:
    assert read_mail("n", "ham", PLAIN).text == "Subject: =?x?\n\nHello there\n\nagain"
    assert read_mail("n", "spam", HTML).body == "Cheap &amp; now"
    assert read_mail("n", "ham", MIXED).text == "Subject: Two parts\n\nnaïve"
    assert read_mail("n", "ham", b"\xff\xfe no mail at all").label == "ham"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of three mails where the real one would be."""
    monkeypatch.setenv("ASYNCEP_CACHE", str(tmp_path))
    path = tmp_path / "datasets" / FILE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (
            ("package/data/easy-ham-1/00001.0a.txt", PLAIN),
            ("package/data/easy-ham-1/00001.0a.json", b"{}"),
            ("package/data/spam-2/00002.0b.txt", HTML),
            ("package/data/hard-ham-1/00003.0c.txt", MIXED),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_corpus_is_read_from_its_file(corpus: Path, tmp_path: Path) -> None:
    assert [(mail.name, mail.label) for mail in all_mails()] == [
        ("easy-ham-1/00001.0a", "ham"),
        ("spam-2/00002.0b", "spam"),
        ("hard-ham-1/00003.0c", "ham"),
    ]
    out = tmp_path / "mails.jsonl"
    assert main(["demo-data", "spam-assassin", str(out), "--characters", "12"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["label"] for row in rows] == ["ham", "spam", "ham"]
    assert rows[1]["text"] == "Subject: Buy"


def test_it_says_how_to_get_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASYNCEP_CACHE", str(tmp_path))
    assert main(["demo-data", "spam-assassin", str(tmp_path / "out.jsonl")]) == 2
    assert "fetch it with scripts/fetch_spam_assassin.sh" in capsys.readouterr().err


@pytest.mark.skipif(
    not corpus_path().is_file(), reason="the corpus has not been fetched: scripts/fetch_spam_assassin.sh"
)
def test_the_real_corpus() -> None:
    mails = list(all_mails())
    assert Counter(mail.label for mail in mails) == {"ham": 4150, "spam": 1896}
    assert len({mail.name for mail in mails}) == len(mails)
    assert sum(not mail.body for mail in mails) < 0.01 * len(mails)


def test_news_as_a_file(tmp_path: Path) -> None:
    assert main(["demo-data", "bbc", str(tmp_path / "news.jsonl")]) == 0
    assert len((tmp_path / "news.jsonl").read_text().splitlines()) == 2225
