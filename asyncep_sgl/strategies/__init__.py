"""How experts and tokens come together: the contract in `base`, names in `registry`, a file or folder a strategy."""
