"""Names that users have given, such as labels, in places where some letters mean something; and counts of things."""

from collections.abc import Sequence


# What a spreadsheet takes for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(name: str) -> str:
    """A name for a terminal: letters that would control it, also line breaks, are written as in Python."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def counted(number: int, noun: str) -> str:
    """A number with a noun that gets an s in the plural: "1 image", "2,000 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def name_some(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list: "a, b and 3 more"."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others:,} more" if others > 0 else "")
