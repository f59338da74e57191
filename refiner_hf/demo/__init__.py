"""A page on which to hand a network pictures and see where it looks."""

THIS_MACHINE = "127.0.0.1"  # an address that no other machine reaches
