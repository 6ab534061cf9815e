"""How experts that lie elsewhere come into a slot: one file a way."""
