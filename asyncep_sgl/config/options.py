"""What the command line of ``asyncep serve`` asks for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from asyncep_router.keys import Keys
from asyncep_sgl.config.flags import Mode, meaningless, useless
from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.config.settings import BatchSettings, GroupSettings, RouterSettings, RunSettings
from asyncep_sgl.errors import UsageError


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
    passed: tuple[str, ...]

    def refuse_meaningless(self, mode: Mode, possible: Collection[Mode] = ()) -> list[str]:
        """Refuses flags that would do nothing where the experts lie so.

        Args:
            mode: of this run.
            possible: modes of which the server has chosen this one by itself. A flag that means something in another of
                them is not refused, because the next machine may choose otherwise.

        Returns:
            A warning for each flag that does nothing here.

        Raises:
            UsageError: names the flag and where it means something.
        """
        warnings = []
        for settings in (self.run, self.group):
            for flag in meaningless(settings, {mode, *possible}):
                raise UsageError(f"{useless(flag, mode)}; leave the flag out")
            warnings += [useless(flag, mode) for flag in meaningless(settings, {mode})]
        return warnings
