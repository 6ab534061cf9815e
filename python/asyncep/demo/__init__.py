"""The demo's model, made from a dense one, and its text."""
