"""Names that somebody else has given, such as labels, in places where some letters mean something."""

# What a spreadsheet takes for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(name: str) -> str:
    """A name for a terminal: letters that would steer it, line breaks too, are written as in Python."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
