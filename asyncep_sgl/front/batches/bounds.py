"""How much of the disk whose files may take, and how many files and batches there may be. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncep_router.keys import Caller
from asyncep_sgl.front.batches.records import ApiError

_DAY = 86400
# Callers whom nobody else can be behind: a server without keys, and the one key of --api-key.
_WITHOUT_NEIGHBOURS = ("", "default")
# Answers from which on their mean is believed, and what a line has around its answer.
_TELLING = 20
_LINE = 300


@dataclass(frozen=True)
class Bounds:
    """What the operator allows.

    Attributes:
        file_bytes: bytes of all files together (``--asyncep-file-quota``).
        file_days: days after which files and ended batches are forgotten (``--asyncep-file-days``); 0 keeps them.
        free_bytes: space of the file system that is never used (``--asyncep-disk-floor``); None takes the smaller of
            1 GB and a twentieth.
        files: files of one owner.
        unfinished: unfinished batches of one owner.
        batches: batches of one owner that are remembered; beyond it the oldest ended one is forgotten.
    """

    file_bytes: int = 20 * 10**9
    file_days: int = 30
    free_bytes: int | None = None
    files: int = 10_000
    unfinished: int = 1_000
    batches: int = 10_000

    def expiry(self, now: int, seconds: int | None) -> int | None:
        """When a file made now expires; None is never.

        Args:
            seconds: what the client asked for.
        """
        terms = [*([seconds] if seconds is not None else []), *([self.file_days * _DAY] if self.file_days else [])]
        return now + min(terms) if terms else None


def names_of(caller: Caller) -> tuple[str, ...] | None:
    """Owners whose files and batches a caller sees; None sees all.

    The holder of the one key of ``--api-key`` also sees what was made while the server had no keys.
    """
    if caller.admin:
        return None
    return (caller.name, "") if caller.name == "default" else (caller.name,)


@dataclass(frozen=True)
class Promise:
    """What a batch will still write.

    Attributes:
        owner: whose it is.
        disk: bytes on the disk: answers as they come, and its files.
        files: bytes of its files alone.
        finish: bytes of its files if it ended now.
    """

    owner: str
    disk: int
    files: int
    finish: int

    @staticmethod
    def of(owner: str, estimate: int, total: int, answers: int, size: int) -> Promise:
        """Of a batch as it stands.

        Args:
            estimate: bytes that all its answers were expected to take before there was any.
            total: requests.
            answers, size: number and bytes of the answers it has.
        """
        # Its own answers tell more than its requests did, once there are some.
        mean = size / answers if answers >= _TELLING else estimate / max(1, total)
        rest = round(max(0, total - answers) * mean)
        finish = size + total * _LINE
        return Promise(owner, finish + 2 * rest, finish + rest, finish)


@dataclass
class Ledger:
    """Who uses how much: files, uploads under way, and what batches will write.

    Attributes:
        bounds: what the operator allows.
        files, used: number and bytes of files by owner, uploads under way included.
    """

    bounds: Bounds
    files: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    _promised: dict[str, Promise] = field(default_factory=dict)

    @staticmethod
    def of(bounds: Bounds, owners: Mapping[str, tuple[int, int]]) -> Ledger:
        """The ledger of a folder.

        Args:
            owners: number and bytes of the files of each.
        """
        ledger = Ledger(bounds)
        for owner, (files, size) in owners.items():
            ledger.files[owner], ledger.used[owner] = files, size
        return ledger

    # Files

    def admit(self, caller: Caller) -> None:
        """Counts a file that a caller begins to send.

        Raises:
            ApiError: 413; the caller has too many.
        """
        if self.files[caller.name] >= self.bounds.files:
            message = f"file: you have {self.files[caller.name]} files, the most there may be; delete some"
            raise ApiError(413, message, param="file", code="too_many_files")
        self.files[caller.name] += 1

    def take(self, caller: Caller, size: int) -> None:
        """Counts bytes of a caller's file.

        Raises:
            ApiError: 413; there is no room for them in the quota.
        """
        if (why := self.beyond(caller, size)) is not None:
            raise ApiError(413, f"file: {why}; delete files that are done with", param="file", code="quota_exceeded")
        self.used[caller.name] += size

    def beyond(self, caller: Caller, size: int) -> str | None:
        """Which quota so many more bytes of an upload would exceed; None if none."""
        if (why := self._quota(caller, self._written(), size)) is not None:
            return why
        if caller.file_bytes is None and not caller.admin and caller.name not in _WITHOUT_NEIGHBOURS:
            written = self._written()
            own = self.used[caller.name] + written[caller.name] + size
            left = self.bounds.file_bytes - self.used.total() - written.total() - size
            if own > left:
                return (
                    f"your files would take {own} bytes and leave {left} of {self.bounds.file_bytes} "
                    "(--asyncep-file-quota) to everybody else; one caller has at most as much as is left"
                )
        return None

    def _quota(self, caller: Caller, outputs: Counter[str], size: int) -> str | None:
        """Which quota so many more bytes of files, of whatever kind, would exceed; None if none.

        Args:
            outputs: bytes of running batches' files by owner.
        """
        own = self.used[caller.name] + outputs[caller.name] + size
        everyone = self.used.total() + outputs.total() + size
        if caller.file_bytes is not None and own > caller.file_bytes:
            return (
                f"your files, with the outputs of running batches, would take {own} bytes of the {caller.file_bytes} "
                "that your key allows (file_bytes)"
            )
        if everyone > self.bounds.file_bytes:
            return (
                f"all files, with the outputs of running batches, would take {everyone} bytes of "
                f"{self.bounds.file_bytes} (--asyncep-file-quota)"
            )
        return None

    def _written(self) -> Counter[str]:
        """Bytes of the files that running batches would write if they ended now, by owner."""
        found = Counter[str]()
        for one in self._promised.values():
            found[one.owner] += one.finish
        return found

    def _expected(self) -> Counter[str]:
        """Bytes of the files that running batches are expected to write, by owner."""
        found = Counter[str]()
        for one in self._promised.values():
            found[one.owner] += one.files
        return found

    def give(self, owner: str, size: int, files: int = 0) -> None:
        """Bytes and files of an owner's are gone."""
        self.used[owner] = max(0, self.used[owner] - size)
        self.files[owner] = max(0, self.files[owner] - files)

    def enter(self, owner: str, size: int) -> None:
        """A file that a batch wrote. It was promised, so it is not refused."""
        self.used[owner] += size
        self.files[owner] += 1

    # What batches will write

    @property
    def promised(self) -> int:
        """Bytes of the disk that all batches together will still write."""
        return sum(promise.disk for promise in self._promised.values())

    @property
    def to_finish(self) -> int:
        """Bytes of the disk that all batches together need to end with the answers they have."""
        return sum(promise.finish for promise in self._promised.values())

    def promise(self, batch: str, promise: Promise) -> None:
        """What a batch will still write, instead of what was said of it before."""
        self._promised[batch] = promise

    def settle(self, batch: str) -> None:
        """A batch writes no more."""
        self._promised.pop(batch, None)

    def never(self, caller: Caller, promise: Promise, size: int) -> str | None:
        """Why a batch can never be begun; None where it may be. No answer is smaller than what is counted here.

        Args:
            promise: what it will write; of a batch without answers yet.
            size: bytes of its input, which is there until its end.
        """
        needed = size + promise.finish
        answers = f"its input has {size} bytes and its answers will take at least {promise.finish}"
        if caller.file_bytes is not None and needed > caller.file_bytes:
            return f"{answers}; your key allows {caller.file_bytes} bytes (file_bytes); divide the batch"
        if needed > self.bounds.file_bytes:
            return f"{answers}; all files may take {self.bounds.file_bytes} (--asyncep-file-quota); divide the batch"
        return None

    def full(self, caller: Caller, more: int) -> str | None:
        """Why a running batch of a caller's does not go on; None lets it.

        Args:
            more: bytes of answers that come next.
        """
        if (why := self._quota(caller, self._written(), more)) is not None:
            return f"waits for space: {why}; delete files that are done with, or cancel batches"
        return None

    def hold(self, caller: Caller, promise: Promise, room: int) -> str | None:
        """Why a batch is not begun yet; None begins it. The batch itself has promised nothing yet.

        Args:
            promise: what it will write.
            room: bytes of the disk that may still be used.
        """
        own = [other for other in self._promised.values() if other.owner == caller.name]
        # What is expected keeps a second one waiting. The first is begun on what is certain, or else batches that wait
        # could keep each other from beginning, as their inputs stay.
        outputs, size = (self._expected(), promise.files) if own else (self._written(), promise.finish)
        if (why := self._quota(caller, outputs, size)) is not None:
            return f"waits for space: {why}; delete files that are done with, or cancel batches"
        left = room - self.promised
        if promise.disk > left:
            return (
                f"waits for space: its answers are expected to take {promise.disk} bytes of the disk and "
                f"{max(0, left)} may be used; delete files that are done with, or make space for --asyncep-batch-dir"
            )
        disk = sum(other.disk for other in own) + promise.disk
        if own and caller.name not in _WITHOUT_NEIGHBOURS and disk > left - promise.disk:
            return f"waits for your other batches: together they are expected to take {disk} bytes of the disk"
        return None
