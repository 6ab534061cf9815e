"""Idle ranks of a host compute blocks of the experts and the attention of a rank that is not."""
