"""A page on which to hand a network pictures and see where it looks."""
