"""An exponential moving average of the weights and of the norms' running statistics, beside the raw ones."""

from pathlib import Path

from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..utils.run_files import EMA_FOLDER


logger = logging.get_logger(__name__)


class EmaCallback(TrainerCallback):
    """
    Averages a model after each optimisation step (timm's `ModelEmaV3`).
    [`~refiner_hf.training.trainer.RefinerTrainer`] evaluates the average beside the raw model, as `eval_ema_accuracy`
    and so on, saves it in the folder `ema` of the raw model's, and restores it from a checkpoint. Every process
    averages the same.

    Args:
        decay (`float`): what is left of the average after a step, 0.99996 in the reference.
        warmup (`bool`, *optional*, defaults to `True`): decay less at the beginning, `1 - (1 + step)^(-2/3)`, so that
            the first weights are soon forgotten: for a short training, or the average of a long one early on.

    Raises:
        `ValueError`: a decay that isn't between 0 and 1.
    """

    def __init__(self, decay: float, warmup: bool = True):
        if not 0 < decay < 1:
            raise ValueError(f"The decay of an average must be between 0 and 1, got {decay}.")
        self.decay, self.warmup = decay, warmup
        self.average: ModelEmaV3 | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The averaged model, in evaluation mode."""
        assert self.average is not None, "The average hasn't begun."
        return self.average.module

    def begin(self, model: PreTrainedModel) -> None:
        """Begins the average with the weights of `model`."""
        self.average = ModelEmaV3(model, self.decay, use_warmup=self.warmup)

    def on_step_end(self, args, state, control, model, **kwargs):
        assert self.average is not None
        self.average.update(model, state.global_step)

    def save(self, folder: str | Path, processor: BaseImageProcessor | ProcessorMixin | None) -> None:
        """Into `folder/ema`, which loads by itself."""
        self.model.save_pretrained(Path(folder) / EMA_FOLDER)
        if processor is not None:
            processor.save_pretrained(Path(folder) / EMA_FOLDER)

    def load(self, folder: str | Path) -> None:
        """From `folder/ema`; where there is none, the average begins with the weights that the model has now."""
        file = Path(folder) / EMA_FOLDER / SAFE_WEIGHTS_NAME
        if not file.is_file():
            logger.warning(
                f"{folder} holds no average of the weights. The average begins with the checkpoint's weights."
            )
            return
        self.model.load_state_dict(load_file(file))
