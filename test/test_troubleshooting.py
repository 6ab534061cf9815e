"""`docs/use/troubleshooting.md` has every message that an operator or a client can meet."""

from __future__ import annotations

from error_messages import ROOMS, ROOT, messages, squeezed

PAGE = squeezed((ROOT / "docs" / "use" / "troubleshooting.md").read_text())
# Only a mistake in this project brings these about.
INTERNAL = frozenset(
    {
        # Two processes of one server that do not speak the same protocol.
        "the exporter at",
        "the expert store answered",
        "the expert store does not understand:",
        "what is no report has come where ranks report:",
        # Steps of a rank's start in another order, or a layout that leaves an expert out.
        "no device yet",
        "finds no shard with every missing expert of layer",
        # The collective: no server gathers with it, tests and benches do.
        ": the other ranks own",
        "the collective from rank",
        # Limits of the router's policy: flags of the same names are refused before, by name.
        ": must lie between 0 and 1",
        ": must lie in 0..1",
        "default_threshold=",
        # A session without a server, and a client that is used after its end: the runtime makes neither.
        "chat: needs a server, which has the model's chat template",
        "the client is closed; use it in an async with",
    }
)


def test_every_message_stands_in_the_page() -> None:
    missing = [one for one in messages() if one.fragment not in PAGE and one.fragment not in INTERNAL]
    assert not missing, "write a row, or add the fragment to INTERNAL with the reason"


def test_internal_messages_are_there_and_not_in_the_page() -> None:
    found = {message.fragment for message in messages()}
    assert found >= INTERNAL
    assert not [fragment for fragment in INTERNAL if fragment in PAGE]


def test_every_room_has_messages() -> None:
    files = {message.file for message in messages()}
    assert not [room for room, _ in ROOMS if not any(file.startswith(room) for file in files)]
