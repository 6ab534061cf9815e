"""What a run is: what was asked for on the command line, and what a checkpoint says of its model."""
