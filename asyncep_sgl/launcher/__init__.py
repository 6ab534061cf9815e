"""The launcher: the command line, what the host can hold, and the watch over the processes of one server."""
