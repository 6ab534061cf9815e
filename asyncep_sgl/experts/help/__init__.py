"""Idle ranks of a host compute blocks of experts of a rank that is not."""
