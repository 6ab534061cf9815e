"""CPU kernels in C: compiled once per machine, loaded with ctypes, done without where that cannot be."""
