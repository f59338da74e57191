"""The options of `transformers.TrainingArguments`, by name, from its source: importing the class takes seconds."""

import ast
from importlib.util import find_spec
from pathlib import Path


def library_options() -> list[str]:
    """The names of the fields, as they are written in the library's source."""
    spec = find_spec("transformers.training_args")
    assert spec is not None and spec.origin is not None  # the package needs transformers
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (written,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return [
        node.target.id
        for node in written.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
