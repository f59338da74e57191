"""The processes that torchrun or accelerate has started for one job; usually there is one."""

import os
from typing import Any

import torch


class Processes:
    """
    This process among those of its job.

    Attributes:
        count (`int`): how many there are.
        number (`int`): of this one, from 0.

    Raises:
        `RuntimeError`: there are several, and accelerate, which lets them talk, isn't installed.
    """

    def __init__(self) -> None:
        self.count, self.number = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.count > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise RuntimeError("Several processes need accelerate. Install it: pip install accelerate") from error
            # Not told that there is no GPU, it would find no other processes.
            self._state = PartialState(cpu=not torch.cuda.is_available())
            if self._state.num_processes != self.count:
                raise RuntimeError(f"{self.count} processes were started, but only {self._state.num_processes} talk.")

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what belongs to all."""
        return self.number == 0

    def device(self, wanted: str) -> str:
        """The device of this process: each has a GPU of its own."""
        return f"cuda:{self._state.local_process_index}" if self.count > 1 and wanted == "cuda" else wanted

    def from_first(self, value: Any) -> Any:
        """What the first process gives here; the others wait for it."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def of_all(self, value: Any) -> list[Any]:
        """What each process gives here, when all have come."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])
