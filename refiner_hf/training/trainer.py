"""The HF Trainer, with what Refiners need of it."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..configuration_refiner import RefinerConfig
from ..data.seeded_sampling import SeededImages, SeededSampler
from ..data.streams import StreamedImages, StreamPosition, collate_streamed
from ..loss_refiner import image_classification_loss, problem_type_of
from ..modeling_refiner import RefinerForMaskedImageModeling
from ..normalization_refiner import RefinerBatchNorm2d
from .arguments import RefinerTrainingArguments
from .checkpoints import explain_load_errors
from .ema import EmaCallback
from .optimization import hold_from, layerwise_groups, optimizer_of_timm, scaled_learning_rate
from .pushing import PushingTrainer
from .saving import explain_write_errors
from .targets import TrainingTargets


# Kept free of weight decay beside everything with fewer than two dimensions (norms, biases, layer scale).
_UNDECAYED = ("cls_token", "distillation_token", "mask_token", "position_embeddings")


class RefinerTrainer(PushingTrainer):
    """
    [`~transformers.Trainer`] with these differences:

    - no weight decay on norms, biases, layer scale, class and mask token and positions, as in the reference. The stock
      Trainer decays the last three;
    - of [`~refiner_hf.training.arguments.RefinerTrainingArguments`] it heeds `timm_optim`, `layer_decay`,
      `cooldown_steps`, `learning_rate_batch_size`, `ema_decay`, `ema_warmup`, `freeze_norms` and `synchronize_norms`
      by itself. All arguments count as they are when a training begins, also where a hyperparameter search changes
      them, and `label_smoothing_factor` as it is at each step;
    - an evaluation of masked image modelling has a loss. The stock Trainer looks for labels and finds none;
    - `make_targets` makes what a step takes and aims at: by default, `label_smoothing_factor` becomes soft labels, so
      that it reaches the dense head and token mixing. The stock Trainer would take the model's own loss away and put
      one on the class logits in its place, and do nothing where images have several labels. Evaluation losses are not
      smoothed;
    - training data that are [`~refiner_hf.data.seeded_sampling.SeededImages`] or
      [`~refiner_hf.data.streams.StreamedImages`] continue exactly where a checkpoint was made. An
      [`~refiner_hf.training.ema.EmaCallback`] among its callbacks is evaluated, saved and restored;
    - a loss that isn't finite stops the training before it is saved over anything, and a checkpoint that can't be
      written leaves no half of it. Logs have the images per second;
    - a checkpoint has the names that continuing from it looks for, also of models whose names were others once;
    - pushing to the Hub as [`~refiner_hf.training.pushing.PushingTrainer`] does it.

    Args:
        make_targets ([`~refiner_hf.training.targets.TrainingTargets`], *optional*): batches as they are loaded to
            batches that the model takes.
        Everything else as [`~transformers.Trainer`].
    """

    def __init__(self, *args, make_targets: TrainingTargets | None = None, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")  # here it is
            super().__init__(*args, **kwargs)
        self.label_smoother = None  # the targets themselves are smoothed
        self.make_targets = make_targets or TrainingTargets()
        self.ema: EmaCallback | None = None
        self._own_ema: EmaCallback | None = None
        self._position: StreamPosition | None = None
        self.add_callback(_FollowTraining(self))
        self._prepare_model()
        self.begin_clock()

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, *args, **kwargs) -> TrainOutput:
        if trial is not None:
            # The stock Trainer makes a trial's model with the seed of the trial before, and only then sets its own.
            super()._hp_search_setup(trial)
        return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    def _hp_search_setup(self, trial) -> None:
        # Each training calls this, once its model is there (a new one each time where `model_init` makes it) and
        # before it looks at a checkpoint. Only now the arguments are those of the trial.
        super()._hp_search_setup(trial)
        if self.args.push_to_hub and self.args.hub_model_id != self.hub_model_id:
            self.init_hf_repo()
        self._prepare_model()

    def _prepare_model(self) -> None:
        """What the arguments, as they are now, want of the model that there is now."""
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        # transformers saves a model under the names of the files that it was loaded from, which may be an older
        # version's. Continuing from a checkpoint, a Trainer looks for the modules' own, and only warns without them.
        self.model.__dict__["_weight_conversions"] = []
        if isinstance(self.model, RefinerForMaskedImageModeling) and self.args.label_names is None:
            self.label_names = ["bool_masked_pos"]  # without a label, an evaluation would have no loss
        if isinstance(self.args, RefinerTrainingArguments):
            self.args.check()
            for norm in (m for m in self.model.modules() if isinstance(m, RefinerBatchNorm2d)):
                if self.args.freeze_norms:
                    norm.frozen = True
                    norm.eval()
                elif self.args.world_size > 1 and self.args.synchronize_norms:
                    norm.synchronized = True
        self._begin_average()

    def begin_clock(self) -> None:
        """Starts to measure the time, when training begins or continues."""
        self._logged_at, self._logged_step = time.monotonic(), self.state.global_step

    def _begin_average(self) -> None:
        """Finds the average's callback, or makes or drops one as `ema_decay` says, and begins it from the model."""
        callbacks = self.callback_handler.callbacks
        if self._own_ema in callbacks:
            callbacks.remove(self._own_ema)
        self.ema = next((c for c in callbacks if isinstance(c, EmaCallback)), None)
        if isinstance(self.args, RefinerTrainingArguments) and self.args.ema_decay:
            if self.ema is None:
                self.ema = self._own_ema = EmaCallback(self.args.ema_decay, self.args.ema_warmup)
                callbacks.insert(0, self.ema)  # others may look at the average
            elif self.ema.decay != self.args.ema_decay:
                raise ValueError(
                    f"The EmaCallback's decay is {self.ema.decay:g}, and ema_decay in the arguments "
                    f"{self.args.ema_decay:g}: leave one of them out."
                )
        if self.ema is not None:
            self._check_average()
            self.ema.begin(self.model)

    def _check_average(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("An average of the weights (--ema_decay) needs them whole: not with FSDP or DeepSpeed.")
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            raise ValueError(
                "An average of the weights (--ema_decay) stays in float32: not with a half --*_full_eval."
            )
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError("An average of the weights (--ema_decay) is one of a whole network, not of an adapter.")

    # ---- Data ----

    @property
    def follows_stream(self) -> bool:
        """Whether the images of this training come from a stream."""
        return self._position is not None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, SeededImages):
            return super()._get_train_sampler(train_dataset)
        return SeededSampler(dataset, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> DataLoader:
        self._position = None
        if not isinstance(self.train_dataset, StreamedImages):
            return _with_own_numbers(super().get_train_dataloader())
        # Each process reads its own part already; accelerate would deal it out once more.
        self._position = StreamPosition(
            self.args.dataloader_num_workers, self.args.world_size, self.train_dataset.position
        )
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=collate_streamed,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            generator=torch.Generator(),
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        # The stock Trainer would drop images of the evaluation, too, and has nowhere else to say so.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return _with_own_numbers(super().get_eval_dataloader(eval_dataset))
        finally:
            self.args.dataloader_drop_last = drop_last

    # ---- Steps ----

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training or "labels" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        config = self.accelerator.unwrap_model(model).config
        problem, smoothing = problem_type_of(inputs["labels"], config), self.args.label_smoothing_factor
        grid = getattr(config, "patch_grid", (0, 0))  # without one there are no dense targets
        inputs = self.make_targets(inputs, config.num_labels, grid, smoothing, problem)
        if isinstance(config, RefinerConfig):
            return super().compute_loss(model, inputs, *args, **kwargs)
        # Other models' own losses know no soft labels.
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = image_classification_loss(labels, outputs.logits, config)
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        if self._position is not None:
            self._position.take(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite &= torch.isfinite(loss)  # looked at when it is logged: looking waits for a GPU
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        control = self.control
        # A continued run doesn't know the losses before its checkpoint, which would be logged with later ones.
        control.should_log |= control.should_save
        if control.should_log or control.should_evaluate:
            self._check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_finite(self) -> None:
        """Everybody's losses, and the weights, which may be spoiled by gradients alone."""
        weights = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        finite = torch.stack([self._finite, *(weight.detach().isfinite().all() for weight in weights)]).all()
        if self.accelerator.gather(finite[None]).all():
            return
        raise FloatingPointError(
            f"The loss or a weight became infinite or NaN between the steps {self._logged_step} and "
            f"{self.state.global_step}. Nothing was saved since then. Try a smaller --learning_rate, a longer "
            "--warmup_steps, a smaller --max_grad_norm, or --bf16 instead of --fp16; the same command with the same "
            "network and data continues from the last checkpoint."
        )

    # ---- Optimisation ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith(_UNDECAYED)
        ]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        if getattr(args, "timm_optim", None) is None:
            return PushingTrainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer_class, options = optimizer_of_timm(args.timm_optim)
        return optimizer_class, {"lr": args.learning_rate, **options}

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.optimizer is not None or not isinstance(self.args, RefinerTrainingArguments):
            return super().create_optimizer(*args, **kwargs)
        optimizer, images = super().create_optimizer(*args, **kwargs), self.get_total_train_batch_size(self.args)
        for group in optimizer.param_groups:
            group["lr"] = scaled_learning_rate(group["lr"], images, self.args.learning_rate_batch_size)
        if self.args.layer_decay < 1:
            optimizer.param_groups[:] = layerwise_groups(optimizer.param_groups, self.model, self.args.layer_decay)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        new, end = self.lr_scheduler is None, num_training_steps
        if isinstance(self.args, RefinerTrainingArguments):
            end -= self.args.get_cooldown_steps(num_training_steps)
        scheduler = super().create_scheduler(end, optimizer)
        if new and end < num_training_steps:
            hold_from(scheduler, end)
        return scheduler

    # ---- Evaluation and logs ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        with self._clock_stopped():
            averaged = {}
            if self.ema is not None and self.model is not self.ema.model:
                raw, self.model = self.model, self.ema.model
                try:
                    with self.accelerator.autocast():
                        averaged = super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
                finally:
                    self.model = raw
            return averaged | super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            now, steps = time.monotonic(), self.state.global_step - self._logged_step
            images = steps * self.get_total_train_batch_size(self.args)
            logs["images_per_second"] = round(images / (now - self._logged_at), 2)
            self._logged_at, self._logged_step = now, self.state.global_step
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """What happens within doesn't count for the images per second."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._logged_at += time.monotonic() - before

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run: not whole until it is written
        with self._clock_stopped(), explain_write_errors(f"The checkpoint {folder}", folder):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._check_finite()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.ema is not None and self.args.should_save:
            self.ema.save(output_dir or self.args.output_dir, self.processing_class)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._position is not None:
            self._position.save(output_dir, self.args.process_index)
        # The first process marks the checkpoint as whole, when everyone's part is there.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with explain_load_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.ema is not None:
                self.ema.begin(self.model)
                self.ema.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with explain_load_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explain_load_errors(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(self.state.best_model_checkpoint)


class _FollowTraining(TrainerCallback):
    """Calls the trainer at moments for which it has no method to override."""

    def __init__(self, trainer: RefinerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.follows_stream:
            state.epoch = state.global_step / state.max_steps  # a stream has no end: the whole training counts as one


def _with_own_numbers(loader: DataLoader) -> DataLoader:
    """
    Makes a loader draw the seeds of its workers from a generator of its own. A continued run makes its loaders at
    other moments than an uninterrupted one, and this must not change the random numbers of the training.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()
    return loader
