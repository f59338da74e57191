"""Text and tables in Markdown."""

import re
from typing import Any


# What begins or ends markup in Markdown or HTML; an underline only where a word begins or ends.
_MARKUP = re.compile(r"[\\`*\[\]<>|$&~]|(?<!\w)_+|_+(?!\w)")


def markdown_text(name: str) -> str:
    """A name as Markdown shows it letter by letter, in one line."""
    one_line = " ".join(name.split())
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), one_line)


def markdown_table(head: list[str], rows: Any) -> str:
    """A Markdown table of rows of text."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + " --- |" * len(head),
            *("| " + " | ".join(row) + " |" for row in cells),
        ]
    )
