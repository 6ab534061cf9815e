"""Named as a package, so that it comes before the bench of the same name."""
