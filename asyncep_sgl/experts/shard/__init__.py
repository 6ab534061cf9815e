"""The part of the experts that a rank reads from the checkpoint, and where all of them lie."""
