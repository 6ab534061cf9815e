"""The public face: command line, runtime and jobs.

from asyncep import Runtime
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncep.client.errors import OptionError as OptionError
    from asyncep.client.errors import ServerError as ServerError
    from asyncep.files.kinds import InputError as InputError
    from asyncep.jobs.journal import JobError as JobError
    from asyncep.jobs.spec import JobResult as JobResult
    from asyncep.local_server import StartError as StartError
    from asyncep.own_files import OutputError as OutputError
    from asyncep.runtime.runtime import Runtime as Runtime
    from asyncep.tasks.label_mass import LabelMassWarning as LabelMassWarning
    from asyncep.tasks.results import Classification as Classification
    from asyncep.tasks.results import Ranked as Ranked
    from asyncep.tasks.results import Score as Score
    from asyncep.tasks.results import TokenLogProbs as TokenLogProbs

    __version__: str

# Where each name comes from: it is imported when it is asked for, because `asyncep --help` should not wait for an HTTP
# client.
_HOMES = {
    "Runtime": "asyncep.runtime.runtime",
    **dict.fromkeys(("Classification", "Ranked", "Score", "TokenLogProbs"), "asyncep.tasks.results"),
    "JobResult": "asyncep.jobs.spec",
    "LabelMassWarning": "asyncep.tasks.label_mass",
    **dict.fromkeys(("OptionError", "ServerError"), "asyncep.client.errors"),
    "InputError": "asyncep.files.kinds",
    "OutputError": "asyncep.own_files",
    "JobError": "asyncep.jobs.journal",
    "StartError": "asyncep.local_server",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Imports what is asked for."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("asyncep-sgl")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'asyncep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
