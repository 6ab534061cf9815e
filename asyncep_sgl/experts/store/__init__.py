"""The expert store: memory that the launcher owns and every rank of the host maps."""
