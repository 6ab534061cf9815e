"""What shows that nobody's request hurts anybody: hostile clients, killed processes, and long mixed loads.

`bench/fuzz.py`, `bench/chaos.py` and `bench/soak.py` are the commands; docs/internals/hostile.md says what each shows.
"""
