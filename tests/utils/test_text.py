import pytest

from refiner_hf.utils.markdown import markdown_text
from refiner_hf.utils.text import printable


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "[a](http://b)",
        "`code`",
        "a|b",
        "$x$",
        "*bold*",
        "__init__",
        "a\\b",
        "R&D",
        "~~no~~",
    ],
)
def test_markdown_shows_the_name_letter_by_letter(name):
    """Rendered by the library that renders the docs."""
    markdown = pytest.importorskip("markdown")
    import html

    rendered = markdown.markdown(f"Labels: {markdown_text(name)}.", extensions=["extra"])
    assert rendered.count("<") == 2, rendered  # the paragraph's own
    assert html.unescape(rendered) == f"<p>Labels: {name}.</p>"


def test_ordinary_names_stay_as_they_are():
    for name in ("great_white_shark", "Egyptian cat", "cat-1 (old)", "emoji 😀", "n01440764"):
        assert markdown_text(name) == printable(name) == name


def test_one_line():
    assert markdown_text("two\n\nlines") == "two lines"
    assert printable("two\nlines\x1b[2J") == "two\\nlines\\x1b[2J"
