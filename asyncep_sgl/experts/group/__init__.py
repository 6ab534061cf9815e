"""The hosts that share one set of experts: who is there, and a host's exporter."""
