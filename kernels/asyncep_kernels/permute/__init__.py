"""Tokens ordered by expert for a grouped GEMM, and its results summed back, all on the device."""
