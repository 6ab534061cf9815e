"""Expert calls: rows of tokens go to the host that has their experts, and their products come back."""
