"""Where gathered experts come from: other hosts, other devices, host memory, files."""
