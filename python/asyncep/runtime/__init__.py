"""The runtime: a model to ask from Python, its ranks started for the purpose or running elsewhere."""
