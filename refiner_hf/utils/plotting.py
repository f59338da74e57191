"""What all plots share."""

from matplotlib import rc_context


# For functions that draw names of files and labels: a "$" in them is a "$", and begins no formula.
literal_text = rc_context({"text.parse_math": False})
