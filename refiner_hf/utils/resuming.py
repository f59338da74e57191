"""Work that was interrupted continues only under the facts under which it began."""

from typing import Any


def changed_facts(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, one text for each fact of `now`: its name, and its value then and now."""
    return [
        f"{name} was {begun.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if begun.get(name) != value
    ]


def check_same_facts(begun: dict[str, Any], now: dict[str, Any], what: str, advice: str) -> None:
    """
    Args:
        begun, now (`dict[str, Any]`): facts by name, as they were at the beginning and as they are.
        what (`str`): says what was begun, the beginning of a sentence: "out holds label maps".
        advice (`str`): what to do about other facts, a sentence.

    Raises:
        `ValueError`: a fact of `now` differs.
    """
    if changes := changed_facts(begun, now):
        raise ValueError(f"{what}, made under other conditions: {'; '.join(map(_short, changes))}. {advice}")


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
