"""Experts: who owns which, where they lie, how they get there."""
