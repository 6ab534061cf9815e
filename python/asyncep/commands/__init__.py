"""The subcommands of ``asyncep``, one file each."""
