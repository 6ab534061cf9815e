"""``asyncep serve``, which is also ``python -m asyncep_sgl.launch_server`` in the shape of SGLang's own command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from asyncep_router.errors import RouterError
from asyncep_router.process_title import hide_keys
from asyncep_sgl.errors import AsyncEPError
from asyncep_sgl.launcher.command_line import parse
from asyncep_sgl.launcher.launch import serve
from asyncep_sgl.process.key_memory import KEY_FLAGS
from asyncep_sgl.process.stop_signals import Stopped, StopSignals

logger = logging.getLogger("asyncep")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Exit status: 0 after an ordered stop, 1 when the server died, 2 for a command line that cannot be served.
    """
    logging.basicConfig(format="asyncep: %(message)s", level=logging.INFO)
    signals = StopSignals()
    signals.install()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        hide_keys(KEY_FLAGS)
        return serve(options, signals)
    except Stopped as stop:
        logger.info("%s: stopped before anything was started", stop)
        return 0
    except (AsyncEPError, RouterError) as error:
        print(f"asyncep serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
