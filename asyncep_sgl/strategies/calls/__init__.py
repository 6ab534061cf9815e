"""Tokens travel: rows go to the hosts that have their experts, and their products come back."""
