"""Prefix-aware dispatch of prefill-only requests: pure policy, a ZeroMQ face and an HTTP face."""
