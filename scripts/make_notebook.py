"""
Writes docs/quick_start.ipynb anew from docs/quick_start.md: its text, its Python, and its commands as bash cells. What
the page shows as a command's output is left out: in the notebook the reader's own stands there.

    python scripts/make_notebook.py
"""

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>.*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```\n", re.MULTILINE | re.DOTALL
)


def make_notebook(page: str) -> nbformat.NotebookNode:
    """The cells of a page in Markdown. A block that the tests skip becomes text."""
    cells, end = [], 0
    for block in _BLOCK.finditer(page):
        cells.append(_text(page[end : block.start()]))
        end = block.end()
        skipped = (block["comment"] or "").startswith("skip")
        if block["language"] == "python" and not skipped:
            cells.append(new_code_cell(block["code"].rstrip()))
        elif block["language"] == "bash" and not skipped:
            cells.append(new_code_cell("%%bash\n" + block["code"].rstrip()))
        elif block["language"] != "text":
            cells.append(_text(f"```{block['language']}\n{block['code']}```\n"))
    cells.append(_text(page[end:]))
    kept = [cell for cell in cells if cell.source]
    for number, cell in enumerate(kept):
        cell.id = f"cell-{number}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=kept, metadata=kernel)


def _text(markdown: str) -> nbformat.NotebookNode:
    return new_markdown_cell(re.sub(r"^<!-- .*? -->\n", "", markdown, flags=re.MULTILINE).strip())


if __name__ == "__main__":
    text = (DOCS / "quick_start.md").read_text(encoding="utf-8")
    nbformat.write(make_notebook(text), DOCS / "quick_start.ipynb")
