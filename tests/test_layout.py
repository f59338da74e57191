"""Imports point one way: between files, and between the folders of the package."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "refiner_hf"
MODEL = "model files"  # the flat files, which a Hub repository carries


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules of this package that a module imports anywhere, also within functions; not as a program."""
    is_package = FILES[module].name == "__init__.py"
    found = set()
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ == '__main__'")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            base = base[: len(base) - (node.level - 1)] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            # `from . import name` imports a module where there is one of that name.
            found |= {f"{source}.{name.name}" if f"{source}.{name.name}" in FILES else source for name in node.names}
    return {name for name in found if name in FILES} - {module}


GRAPH = {module: imports_of(module) for module in FILES}


def folder_of(module: str) -> str:
    parts = module.split(".")
    return MODEL if FILES[module].parent == PACKAGE and parts[-1].endswith("_refiner") else ".".join(parts[:2])


def folders() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        needed = {folder_of(each) for each in imported} - {folder_of(module)}
        graph.setdefault(folder_of(module), set()).update(needed)
    return graph


def test_this_test_sees_imports():
    assert "refiner_hf.attention_refiner" in GRAPH["refiner_hf.modeling_refiner"]
    assert "refiner_hf.export.preprocess" in {each for module in GRAPH for each in GRAPH[module]}
    assert MODEL in folders()["refiner_hf.utils"]


@pytest.mark.parametrize("graph", [GRAPH, folders()], ids=["files", "folders"])
def test_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"These import each other in a circle: {' <- '.join(error.args[1])}")


def test_the_model_needs_nothing_else_of_the_package():
    assert folders()[MODEL] == set()


def test_nobody_imports_the_package_itself():
    assert {module for module, imported in GRAPH.items() if "refiner_hf" in imported} == set()


def test_nobody_imports_the_commands():
    users = {folder for folder, needed in folders().items() if "refiner_hf.commands" in needed}
    assert users <= {"refiner_hf.__main__"}


def sentences(module: str) -> set[str]:
    """The text in a module that is long enough to be a sentence, without docstrings."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {
        each.strip()
        for node in texts
        if id(node) not in docstrings
        for each in re.split(r"(?<=[.:])\s+", node.value)
        if len(each.split()) > 4
    }


def test_a_sentence_of_a_card_is_in_one_file():
    cards = {module: sentences(module) for module in FILES if module.startswith("refiner_hf.cards.")}
    assert len(set.union(*cards.values())) > 60
    for module, said in cards.items():
        twice = {other: said & sentences(other) for other in FILES if other != module and said & sentences(other)}
        assert not twice, module
