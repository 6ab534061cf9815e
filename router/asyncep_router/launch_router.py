"""`python -m asyncep_router.launch_router --worker-urls …`: the router in front of servers that run already."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from asyncep_router.errors import ConfigError
from asyncep_router.http.flags import key_flags, parse
from asyncep_router.http.serve import run
from asyncep_router.process_title import hide_keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped. Exit status: 0 after an ordered stop, 2 for a command line that cannot be served."""
    logging.basicConfig(format="asyncep_router: %(message)s")
    if arguments is None:
        hide_keys(key_flags())
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"asyncep_router: {error}", file=sys.stderr)
        return 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
