"""The command lines: parse, call, print. `scripts/` holds one file for each, for use in a checkout."""
