"""Keys and whose they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_router.errors import ConfigError
from asyncep_router.keys import Caller, Keys, key_from, read_key_file

_KEY = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


@given(st.lists(_KEY, min_size=1, max_size=6, unique=True), _KEY, st.sampled_from(["Bearer", "bearer", "BEARER"]))
def test_a_key_is_its_holders_alone(keys: list[str], other: str, scheme: str) -> None:
    known = Keys({key: Caller(f"c{n}") for n, key in enumerate(keys)})
    for number, key in enumerate(keys):
        assert known.holder(f"{scheme} {key}") == Caller(f"c{number}")
        assert known.holder(key) is None, "a key without a scheme"
    assert (known.holder(f"{scheme} {other}") is None) == (other not in keys)
    assert known.holder(None) is None
    assert all(key not in repr(known) for key in keys if len(key) > 8)


def test_flags() -> None:
    keys = Keys.of("user", "boss")
    assert keys.holder("Bearer user") == Caller("default")
    assert keys.holder("Bearer boss") == Caller("admin", admin=True)
    assert keys.admin
    assert keys.clients
    assert not Keys.of()
    assert not Keys.of(None, "boss").clients


@pytest.mark.parametrize(("api_key", "admin_key"), [("", None), (None, " "), ("same", "same")])
def test_flags_that_would_open_the_server_are_refused(api_key: str | None, admin_key: str | None) -> None:
    with pytest.raises(ConfigError, match="-key"):
        Keys.of(api_key, admin_key)


def test_a_file_of_tenants(key_file: Path) -> None:
    key_file.write_text("# ours\n\nann k1 prompts_per_second=2.5 file_bytes=2GiB\nbob k2\nroot k3 admin\n")
    assert read_key_file(key_file) == {
        "k1": Caller("ann", False, 2.5, 2 * 2**30),
        "k2": Caller("bob"),
        "k3": Caller("root", admin=True),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no line"),
        ("ann\n", "line 1"),
        ("ann secret\nbob secret\n", "line 2: this key"),
        ("ann secret\nann other\n", "line 2: the name"),
        ("an/n secret\n", "letters"),
        ("ann secret speed=1\n", "prompts_per_second=N"),
        ("ann secret prompts_per_second=0\n", "above 0"),
        ("ann secret file_bytes=2parsec\n", "above 0"),
    ],
)
def test_a_wrong_line_is_named_without_its_key(key_file: Path, text: str, said: str) -> None:
    key_file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_key_file(key_file)
    assert "secret" not in str(error.value)


def test_a_file_that_others_may_read_is_refused(key_file: Path) -> None:
    key_file.write_text("ann secret\n")
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(key_file)


def test_where_a_key_comes_from(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file.write_text("from-file\n")
    monkeypatch.setenv("SOME_KEY", "from-environment")
    assert key_from("given", "SOME_KEY") == "given"
    assert key_from(f"@{key_file}", "SOME_KEY") == "from-file"
    assert key_from(None, "SOME_KEY") == "from-environment"
    assert key_from(None, "ANOTHER_KEY") is None
    with pytest.raises(ConfigError, match="cannot be read"):
        key_from("@/nowhere", "SOME_KEY")
