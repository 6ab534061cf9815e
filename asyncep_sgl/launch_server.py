"""``python -m asyncep_sgl.launch_server``: the same as ``asyncep serve``, in the shape of SGLang's own command."""

from __future__ import annotations

import sys

from asyncep_sgl.launch import main

if __name__ == "__main__":
    sys.exit(main())
