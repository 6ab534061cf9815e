"""Operations of the prefill path: a reference, a CPU and a GPU implementation of each."""
