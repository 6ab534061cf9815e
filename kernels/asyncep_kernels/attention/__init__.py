"""Prefill attention over a variable-length batch whose prefixes lie in a paged KV cache."""
