"""The folder of a converted model: there whole, and with the right answers, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling_refiner import RefinerForImageClassification


def check_new(folder: Path) -> None:
    """Raises a `FileExistsError` where there is something in `folder` already, or something else in its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and isn't an empty folder. Give another --output_dir.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into, which becomes `folder` at the end, or is removed where anything failed."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@torch.no_grad()
def check_same_answers(model: PreTrainedModel, loaded: RefinerForImageClassification, tolerance: float = 1e-5) -> None:
    """Raises a `RuntimeError` where a model loaded back from disk answers otherwise than the one it was made of."""
    config = loaded.config
    images = torch.randn(
        1, config.num_channels, *config.image_height_width, generator=torch.Generator().manual_seed(0)
    )
    difference = (model.eval()(images).logits - loaded.eval()(images).logits).abs().max().item()
    if not difference < tolerance:
        raise RuntimeError(f"The saved model's logits differ by {difference} from those of the one converted.")
