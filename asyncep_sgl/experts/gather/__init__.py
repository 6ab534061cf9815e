"""The gather: slots, the order in which they are filled, and how much work hides it."""
