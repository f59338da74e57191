"""A model card, taken apart."""

import re

from huggingface_hub import ModelCard


class Card:
    """
    A card's metadata, its sections' texts by heading (what comes before the first is "Summary"), the example's code
    and the files of its pictures.
    """

    def __init__(self, content: str | bytes):
        card = ModelCard(content.decode() if isinstance(content, bytes) else content)
        self.data = card.data.to_dict()
        parts = re.split(r"^## (.+)\n", card.text, flags=re.MULTILINE)
        self.sections = dict(zip(["Summary", *parts[1::2]], [part.strip() for part in parts[::2]]))
        self.pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text)
        self.code = re.search(r"```python\n(.*?)\n```", self.sections["How to use it"], re.DOTALL)[1]

    def table(self, heading: str) -> dict[str, str]:
        """The two columns of a section's table."""
        lines = [line for line in self.sections[heading].splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert rows[1] == ["---", "---"] and len({name for name, _ in rows}) == len(rows)
        return dict(rows[2:])

    def numbers(self, heading: str) -> list[int]:
        """Whole numbers in a section's first paragraph, in order."""
        return list(map(int, re.findall(r"(?<![\w.])\d+(?![\w.]*\w)", self.sections[heading].split("\n\n")[0])))


def shown(value) -> str:
    """An option's value as a card shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
