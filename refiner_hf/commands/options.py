"""What the options of several commands share."""

import os
from dataclasses import field


def revision_option(of: str = "a model") -> str | None:
    """A dataclass field: the version of something on the Hub."""
    return field(default=None, metadata={"help": f"Branch, tag or commit of {of} on the Hub. Default: main."})


def device_option() -> str | None:
    """A dataclass field: where to compute. See [`pick_device`]."""
    return field(default=None, metadata={"help": "cpu or cuda. Default: cuda if there is a GPU."})


def with_code_option() -> bool:
    """A dataclass field: whether a folder gets the model's code."""
    return field(default=False, metadata={"help": "Put the model's code into the folder, for trust_remote_code."})


def pick_device(name: str | None) -> str:
    """
    The device of this name. `None` is CUDA if there is a GPU, else the CPU.

    Raises:
        `ValueError`: there is no such device.
    """
    import torch

    available = torch.cuda.is_available()
    if name is not None and name.startswith("cuda") and not available:
        raise ValueError(f"There is no {name} here: torch {torch.__version__} finds no GPU. Give --device cpu.")
    return name or ("cuda" if available else "cpu")


def check_there(*paths: str | None) -> None:
    """
    Before anything long begins, such as importing torch.

    Raises:
        `FileNotFoundError`: there is no such file or folder.
    """
    for path in paths:
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(f"There is no file or folder {path}.")
