"""What the command line of ``asyncep serve`` asks for."""

from __future__ import annotations

from dataclasses import dataclass

from asyncep_router.keys import Keys
from asyncep_sgl.config.flags import Mode, refuse_meaningless
from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.config.settings import BatchSettings, GroupSettings, RouterSettings, RunSettings


@dataclass(frozen=True)
class ServeOptions:
    """What the launcher itself has to know.

    Attributes:
        model: checkpoint folder or hub name.
        ranks: scheduler processes sharing the experts.
        host, port: where the front listens.
        dtype, revision, device: as SGLang has them; None is SGLang's own choice.
        run, router, group, batches, front: our settings.
        keys: of clients and of the administrator.
        given: which of our flags the command line has.
        passed: SGLang's own flags as the user gave them, the above excluded.
    """

    model: str
    ranks: int
    host: str
    port: int
    dtype: str
    revision: str | None
    device: str | None
    run: RunSettings
    router: RouterSettings
    group: GroupSettings
    batches: BatchSettings
    front: FrontSettings
    keys: Keys
    given: frozenset[str]
    passed: tuple[str, ...]

    def refuse_meaningless(self, mode: Mode) -> None:
        """Refuses flags that would do nothing where the experts lie so.

        Raises:
            UsageError: names the flag and where it means something.
        """
        for settings in (RunSettings, GroupSettings):
            refuse_meaningless(self.given, settings, mode)
