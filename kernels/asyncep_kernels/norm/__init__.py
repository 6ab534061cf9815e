"""Root-mean-square normalisation, with the residual's sum in the same pass."""
