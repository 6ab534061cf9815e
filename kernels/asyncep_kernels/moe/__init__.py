"""Mixture-of-Experts feed-forward: routed tokens through SiLU-gated experts, weighted and summed."""
