"""A layer computed by several processes of a host that map the same weights."""
