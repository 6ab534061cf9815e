"""A template of processes that is started anew because the one its owner had has been killed."""

from __future__ import annotations

import gc
import importlib
import socket
import sys

from asyncep_router.long_lived import importing


def import_everything() -> None:
    """Imports what the front, the router, the ranks and the detokenizer need.

    To be called when SGLang's plug-ins are loaded.
    """
    for module in (
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.data_parallel_controller",
        # All models, which every rank would otherwise import for itself.
        "sglang.srt.models.registry",
    ):
        importlib.import_module(module)


def main(descriptor: int, owner: int) -> None:
    """Imports what a server's processes need and forks them on demand.

    Args:
        descriptor: the line on which ``owner`` asks.
        owner: the process whose children they become.
    """
    line = socket.socket(fileno=descriptor)
    with importing():
        from sglang.srt.plugins import load_plugins

        # First, as in the front: what is imported from here on is already hooked.
        load_plugins()
        from asyncep_sgl.process.prefork import serve_template

        import_everything()
    gc.freeze()  # a collection would write to every object, and so copy every page
    serve_template(line, owner)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
