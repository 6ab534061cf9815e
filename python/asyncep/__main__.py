"""``python -m asyncep`` is the ``asyncep`` command."""

import sys

from asyncep.cli import main

sys.exit(main())
