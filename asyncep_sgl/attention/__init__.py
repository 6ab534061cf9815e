"""Attention backends for SGLang."""
