"""A folder that appears only when it is complete, and checks of the model in it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling_refiner import RefinerForImageClassification
from .loading import said_in_words
from .locking import locked_beside


def check_new(folder: Path) -> None:
    """Raises a `FileExistsError` where there is something in `folder` already, or something else in its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and isn't an empty folder. Give another --output_dir.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into. At the end it is renamed to `folder`; if anything fails, it is removed."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_beside(folder, f"the folder {folder}"):
        check_new(folder)
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


def check_processor(processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """Raises a `ValueError` where an image processor makes something else of a picture than what a model takes."""
    mode = "L" if config.num_channels == 1 else "RGB"
    with said_in_words(f"The image processor ({type(processor).__name__}) can't prepare a picture"):
        made = processor(Image.new(mode, (48, 32)), return_tensors="pt").pixel_values.shape[1:]
    size = config.image_size
    wanted = (config.num_channels, *((size, size) if isinstance(size, int) else size))
    if tuple(made) != wanted:
        raise ValueError(
            f"The image processor ({type(processor).__name__}) makes {tuple(made)} (channels, height, width) of a "
            f"picture, and the model takes {wanted}: its preprocessor_config.json doesn't fit its config.json."
        )


@torch.no_grad()
def check_same_answers(model: PreTrainedModel, loaded: RefinerForImageClassification, tolerance: float = 1e-5) -> None:
    """
    Raises a `RuntimeError` if a model that was loaded again from disk gives other logits than the saved model: they
    differ by more than `tolerance`, or by more than this share of the largest logit if that is above 1.
    """
    config = loaded.config
    images = torch.randn(
        1, config.num_channels, *config.image_height_width, generator=torch.Generator().manual_seed(0)
    )
    expected = model.eval()(images).logits
    difference = (expected - loaded.eval()(images).logits).abs().max().item()
    if not difference < tolerance * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"The saved model's logits differ by {difference} from those of the one converted.")
