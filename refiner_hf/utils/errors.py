"""Errors of libraries, said in words."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """
    Loading calls into libraries each of which has errors of its own for a damaged file. All but an `OSError`, which
    says that there is no file, become a `ValueError` that begins with `what`.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """An error's text; where it is no sentence (`KeyError: 'x'`), with its kind."""
    if isinstance(error, StrictDataclassError):  # "Class validation error for validator '...':\n    ValueError: ..."
        return " ".join(str(error.__cause__ or error).split())
    if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to run the code
        return "they are a pickle that may hold code, which isn't run. Ask for safetensors."
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, RuntimeError)) and text else f"{type(error).__name__}: {text}"
