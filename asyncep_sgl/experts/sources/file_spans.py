"""Which stretches of files to read for bytes that lie all over them, in whole blocks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asyncep_sgl.experts.shard.checkpoint_map import FileRun

# Past the page cache, a file is read in multiples of this (at most a page on any file system we know).
BLOCK = 4096


@dataclass(frozen=True)
class Part:
    """``nbytes`` at ``source`` of what a span reads belong at ``target`` of the slot."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Span:
    """``nbytes`` at ``offset`` of ``file``, both multiples of `BLOCK`; the file may end before."""

    file: str
    offset: int
    nbytes: int
    parts: tuple[Part, ...]

    @property
    def needed(self) -> int:
        """Bytes up to the last one that is wanted."""
        return max(part.source + part.nbytes for part in self.parts)


def spans(wanted: Iterable[tuple[FileRun, int]], most: int) -> Sequence[Span]:
    """Spans of at most ``most`` bytes that read every run once, in the files' order; neighbours are read together.

    Args:
        wanted: runs, and where in the slot each belongs.
        most: a multiple of `BLOCK`, at least two of them.
    """
    found: list[Span] = []
    for run, target in sorted(wanted, key=lambda entry: (entry[0].file, entry[0].offset)):
        position, end = run.offset, run.offset + run.nbytes
        while position < end:
            if not (found and _reaches(found[-1], run.file, position, most)):
                found.append(Span(run.file, position // BLOCK * BLOCK, 0, ()))
            span = found[-1]
            stop = min(-(-end // BLOCK) * BLOCK, span.offset + most)
            taken = min(end, stop) - position
            part = Part(position - span.offset, target + position - run.offset, taken)
            found[-1] = Span(span.file, span.offset, max(span.nbytes, stop - span.offset), (*span.parts, part))
            position += taken
    return found


def _reaches(span: Span, file: str, position: int, most: int) -> bool:
    """Whether ``position`` can be read with ``span``, and next to nothing that nobody wants."""
    end = span.offset + span.nbytes
    return span.file == file and position <= end + BLOCK and position < span.offset + most
