"""Names that somebody else has given, such as labels, in places where some letters mean something."""

import re


# What begins or ends markup in Markdown or HTML; an underline only where a word begins or ends.
_MARKUP = re.compile(r"[\\`*\[\]<>|$&~]|(?<!\w)_+|_+(?!\w)")
# What a spreadsheet takes for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown_text(name: str) -> str:
    """A name as Markdown shows it letter by letter, in one line."""
    one_line = " ".join(name.split())
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), one_line)


def printable(name: str) -> str:
    """A name for a terminal: letters that would steer it, line breaks too, are written as in Python."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
