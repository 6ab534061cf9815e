"""A job's ranks on several hosts, through Ray."""
