"""What a benchmark can be asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class BenchmarkOptions:
    part: Literal["all", "model", "op", "curves", "startup", "tiles"] = field(
        default="all",
        metadata={
            "help": "Networks, one refinement on its own, its cost against tokens and batch, or how long commands "
            "take to answer; or all of these. On its own, tiles: the Triton kernels' sizes that are fastest on this "
            "NVIDIA GPU, for all that runs on it from then on; takes minutes, and leaves no record."
        },
    )
    models: list[str] = field(
        default_factory=lambda: ["S", "M", "L"], metadata={"help": "Among S, M, L, and tiny to try this out."}
    )
    image_sizes: list[int] = field(default_factory=lambda: [224, 384, 448], metadata={"help": "In pixels."})
    contenders: list[str] | None = field(
        default=None,
        metadata={
            "help": 'What is compared with "eager". Default: everything that runs here. Compiling takes most of the '
            "time."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Images in inference. Default: 8 on a CPU, 128 on CUDA."}
    )
    train_batch_size: int | None = field(
        default=None, metadata={"help": "Images in training. Default: 6 on a CPU, 128 on CUDA."}
    )
    rounds: int = field(default=10, metadata={"help": "How many times each contender is timed."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of weights and images in inference; of autocast in training."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda. Default: cuda where there is one."})
    threads: int | None = field(default=None, metadata={"help": "Threads on a CPU. Default: torch's own choice."})
    roofline: bool = field(
        default=False,
        metadata={
            "help": "First measure the machine's own rates (a product of 2048 x 2048, a copy), and relate to them."
        },
    )
    output_dir: str = field(
        default="benchmarks", metadata={"help": "Folder for the record, the tables and the plots."}
    )
    name: str | None = field(default=None, metadata={"help": "Stem of the files in it. Default: the device."})
    fresh: bool = field(default=False, metadata={"help": "Start again instead of continuing the record."})
    report: bool = field(
        default=False, metadata={"help": "Measure nothing; write the tables and plots of the record again."}
    )

    def __post_init__(self):
        import torch

        from .contenders import NETWORKS, contender_names

        if unknown := [name for name in self.models if name not in NETWORKS]:
            raise ValueError(f"There is no model {unknown[0]!r}; choose among {', '.join(NETWORKS)}.")
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"The device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available() and not self.report:
            raise ValueError("There is no CUDA device here.")
        if self.part == "tiles":
            self._check_tiles()
        on_cuda = self.device == "cuda"
        self.batch_size = (128 if on_cuda else 8) if self.batch_size is None else self.batch_size
        self.train_batch_size = (128 if on_cuda else 6) if self.train_batch_size is None else self.train_batch_size
        everybody = contender_names("model", self.device)
        if unknown := [name for name in self.contenders or () if name not in everybody]:
            raise ValueError(f"There is no contender {unknown[0]!r}; choose among {', '.join(everybody)}.")
        for name in ("batch_size", "train_batch_size", "rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def _check_tiles(self) -> None:
        import torch

        from ..triton_launch_refiner import why_no_kernels

        # In Triton's interpreter kernels run without a GPU, too.
        reason = why_no_kernels(torch.empty(0, device=self.device)) if self.device == "cuda" else "there is none here"
        if reason is not None:
            raise ValueError(
                "--part tiles times Triton's kernels on an NVIDIA GPU of compute capability 8.0 or newer, but "
                f"{reason}. Nothing was changed."
            )
        if self.report:
            raise ValueError("--part tiles leaves no record, of which --report could write tables.")

    @property
    def stem(self) -> Path:
        return Path(self.output_dir, str(self.name or self.device))
