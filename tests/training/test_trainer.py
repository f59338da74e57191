"""The Trainer's traps, each closed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from refiner_hf import RefinerForImageClassification, RefinerForMaskedImageModeling
from refiner_hf.data.masking import MaskPatches
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.training import trainer as trainer_module
from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.norm_statistics_callback import NormStatisticsCallback
from refiner_hf.training.targets import smooth_labels
from refiner_hf.training.trainer import RefinerTrainer
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics

from ..conftest import assert_close, load_json
from ..parsed_card import Card


class Images(Dataset):
    """Random images whose label is in their mean."""

    def __init__(self, count=24, soft=False):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 5
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator) + self.labels[:, None, None, None] - 2
        self.soft = torch.rand(count, 5, generator=generator).softmax(-1) if soft else None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {
            "pixel_values": self.pixels[index],
            "labels": self.labels[index].item() if self.soft is None else self.soft[index],
        }


def arguments(folder, **fields):
    defaults = dict(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        norm_statistics_images=0,
    )
    return RefinerTrainingArguments(**{**defaults, **fields})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """The gradients of the first optimisation step."""

    first = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_weight_decay_spares_norms_biases_scale_token_and_positions(tiny_model, tmp_path):
    model = tiny_model(use_dense_head=True)
    trainer = RefinerTrainer(model, arguments(tmp_path, weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    spared = {name for name, p in model.named_parameters()} - names
    assert all(
        name.endswith(("bias", "cls_token", "position_embeddings", "lambda1")) or "norm" in name for name in spared
    )
    assert {"refiner.embeddings.cls_token", "refiner.embeddings.position_embeddings"} <= spared
    assert not any("norm" in name or "bias" in name or "lambda1" in name for name in names)
    assert "refiner.layers.1.attention.refinement.local_attention.weight" in names and "classifier.weight" in names


@pytest.mark.parametrize("trainer_class", [RefinerTrainer, Trainer])
def test_accumulation_equals_one_large_batch_with_frozen_norms(tiny_model, tmp_path, trainer_class):
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        model = tiny_model(use_dense_head=True)
        model.freeze_norms()
        gradients = Gradients()
        trainer = trainer_class(
            model,
            arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=0),
            train_dataset=Images(),
            callbacks=[gradients],
        )
        trainer.train()
        results.append((losses(trainer), gradients.first))
    (large_losses, large), (small_losses, small) = results
    assert small_losses == pytest.approx(large_losses, rel=1e-4)
    largest = max(g.abs().max().item() for g in large.values())
    for name, gradient in large.items():
        assert (small[name] - gradient).abs().max().item() <= 1e-5 * largest, name


@pytest.mark.parametrize("trainer_class", [RefinerTrainer, Trainer])
def test_soft_labels_give_soft_cross_entropy(tiny_model, tmp_path, trainer_class):
    model = tiny_model().train()
    data = Images(8, soft=True)
    expected = -(data.soft * copy.deepcopy(model)(data.pixels).logits.log_softmax(-1)).sum(-1).mean()
    trainer = trainer_class(model, arguments(tmp_path), train_dataset=data)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_label_smoothing_reaches_the_dense_head_and_not_the_evaluation(tiny_model, tmp_path):
    model = tiny_model(use_dense_head=True).train()
    data = Images(8)
    soft = torch.full((8, 5), 0.3 / 5).scatter(1, data.labels[:, None], 0.7 + 0.3 / 5)
    assert torch.allclose(smooth_labels(data.labels, 5, 0.3), soft)
    expected = copy.deepcopy(model)(data.pixels, labels=soft).loss.item()
    trainer = RefinerTrainer(
        model, arguments(tmp_path, label_smoothing_factor=0.3), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    plain = model.eval()(data.pixels, labels=data.labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-4)


def test_checkpointing_trains_the_same(tiny_model, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(drop_path_rate=0.2)
        trainer = RefinerTrainer(
            model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=Images()
        )
        trainer.train()
        results.append((losses(trainer), dict(model.named_buffers())))
    (plain, buffers), (checkpointed, other_buffers) = results
    assert checkpointed == pytest.approx(plain, rel=1e-4)
    for name, buffer in buffers.items():
        assert_close(other_buffers[name], buffer, 1e-4, name)
    assert model.refiner.layers[1].attention.refinement.output_norm.num_batches_tracked == 3


def test_weights_that_are_spoiled_are_not_saved(tiny_model, tmp_path):
    """Though every loss was finite: the last step's gradients may do it."""
    trainer = RefinerTrainer(tiny_model(), arguments(tmp_path), train_dataset=Images())
    trainer.train()
    next(trainer.model.parameters()).data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss or a weight became infinite or NaN"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_an_evaluation_takes_every_image(tiny_model, tmp_path):
    """Also where a training leaves out its last batch, which isn't whole."""
    data = Images(10)
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8)
    trainer = RefinerTrainer(tiny_model(), args, train_dataset=data, eval_dataset=data)
    assert trainer.train().global_step == 1
    with torch.no_grad():
        expected = trainer.model.eval()(data.pixels, labels=data.labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_images_per_second_are_those_of_training(tiny_model, tmp_path, monkeypatch):
    """By a clock that goes on by 2 s for a batch, and by far more in an evaluation and a save."""
    now = [0]

    class Clock(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            now[0] += 2

        on_step_end = on_substep_end

        def on_evaluate(self, args, state, control, **kwargs):
            now[0] += 1000

    save = RefinerTrainer._save_rng_state
    monkeypatch.setattr(RefinerTrainer, "_save_rng_state", lambda *args: now.append(now.pop() + 1000) or save(*args))
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    often = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, num_train_epochs=2)
    args = arguments(tmp_path, **often, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    RefinerTrainer(tiny_model(), args, train_dataset=Images(), eval_dataset=Images(8), callbacks=[Clock()]).train()
    history = load_json(tmp_path / "checkpoint-6" / "trainer_state.json")["log_history"]
    assert [entry["images_per_second"] for entry in history if "loss" in entry] == [2.0] * 6


def test_images_are_not_dropped_and_the_option_is_refused(tmp_path):
    assert arguments(tmp_path).remove_unused_columns is False
    with pytest.raises(ValueError, match="drop the images"):
        arguments(tmp_path, remove_unused_columns=True)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_resuming_continues_the_same_curve(tiny_model, tmp_path, strategy):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def trainer(folder, callbacks=()):
        data = Images()
        args = arguments(folder, num_train_epochs=4, save_strategy=strategy, save_steps=4, lr_scheduler_type="cosine")
        model = tiny_model(drop_path_rate=0.3, token_mixing=True, use_dense_head=True)
        return RefinerTrainer(model, args, train_dataset=data, callbacks=[NormStatisticsCallback(data, 8), *callbacks])

    unbroken = trainer(tmp_path / "unbroken")
    unbroken.train()
    broken = trainer(tmp_path / "broken", [Stop()])
    broken.train()
    assert len(losses(broken)) < len(losses(unbroken)) == 12
    resumed = trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=1e-5)
    for name, tensor in unbroken.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name].float(), tensor.float(), 1e-4, name)


class TestMaskedImageModeling:
    """Pretraining without labels, with the same Trainer."""

    @pytest.fixture
    def make(self, tiny_config, tmp_path):
        def make(epochs: int = 6, statistics: bool = True) -> RefinerTrainer:
            torch.manual_seed(0)
            model = RefinerForMaskedImageModeling(tiny_config())
            collate = MaskPatches(model.config)
            return RefinerTrainer(
                model,
                arguments(tmp_path, num_train_epochs=epochs, learning_rate=3e-3, save_strategy="epoch"),
                train_dataset=Images(),
                eval_dataset=Images(),
                data_collator=collate,
                callbacks=[NormStatisticsCallback(Images(), 8, collate)] if statistics else [],
            )

        return make

    @pytest.fixture
    def trainer(self, make):
        return make()

    def test_masks_of_the_statistics_are_none_of_the_trainings(self, make):
        curves = []
        for statistics in (True, False):
            trainer = make(2, statistics)
            trainer.train()
            curves.append(losses(trainer))
        assert curves[0] == curves[1]

    def test_it_learns_and_is_measured(self, trainer, tmp_path):
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < 0.9 * before
        trainer.create_model_card()
        card = Card((tmp_path / "README.md").read_bytes())
        assert "masked image model" in card.sections["Summary"] and "hidden pixels" in list(card.table("Results"))[0]
        assert list(card.table("Results").values())[0] == f"{after['eval_loss']:.4f}"
        assert card.data["pipeline_tag"] == "image-feature-extraction" and card.data["pipeline_tag"] in card.code

    def test_statistics_are_those_under_masks(self, trainer):
        """Without masks the maps are others, and an evaluation under masks gets worse by it."""
        trainer.train()
        model, collate = trainer.model, trainer.data_collator
        torch.manual_seed(1)
        batch = collate([Images()[i] for i in range(24)])
        with torch.no_grad():
            evaluated = model.eval()(**batch).loss
            trained = model.train()(**batch).loss
        assert evaluated.item() == pytest.approx(trained.item(), rel=0.1)
        reestimate_norm_statistics(model, [batch["pixel_values"]])
        with torch.no_grad():
            unmasked = model.eval()(**batch).loss
        assert abs(unmasked - trained) > 2 * abs(evaluated - trained)

    def test_the_mask_token_does_not_decay(self, trainer):
        names = trainer.get_decay_parameter_names(trainer.model)
        assert "decoder.weight" in names and not [name for name in names if "token" in name]

    def test_collator(self, tiny_config):
        rows = [Images()[i] for i in range(8)]
        batch = MaskPatches(tiny_config(image_size=[16, 24]), 0.5)(rows)
        assert batch["bool_masked_pos"].shape == (8, 24) and (batch["bool_masked_pos"].sum(1) == 12).all()
        assert batch.keys() == {"pixel_values", "bool_masked_pos"} and len(batch["bool_masked_pos"].unique(dim=0)) > 1
        with pytest.raises(ValueError, match="between 0 and 1"):
            MaskPatches(tiny_config(), 1.0)


class TestNormStatistics:
    def test_nothing_else_changes(self, tiny_model):
        model = tiny_model()
        model.train()
        model.refiner.layers[0].eval()
        modes = {name: module.training for name, module in model.named_modules()}
        parameters = {name: p.clone() for name, p in model.named_parameters()}
        reestimate_norm_statistics(model, torch.randn(2, 4, 3, 16, 16))
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
        norms = [m for m in model.modules() if isinstance(m, RefinerBatchNorm2d)]
        assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 0 for norm in norms)

    def test_without_batches_or_with_frozen_norms_nothing_is_lost(self, tiny_model):
        model = tiny_model()
        model.train()(torch.randn(4, 3, 16, 16))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert reestimate_norm_statistics(model, []) == 0
        model.freeze_norms()
        assert reestimate_norm_statistics(model, torch.randn(2, 4, 3, 16, 16)) == 0
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    def test_make_evaluation_agree_with_training_after_few_steps(self, tiny_model, tmp_path):
        """Running averages still remember their initial 1, far above the maps' variance; re-estimated ones don't."""
        model = tiny_model()
        data = Images(24)
        RefinerTrainer(model, arguments(tmp_path, learning_rate=1e-4), train_dataset=data).train()
        wanted = copy.deepcopy(model).train()(data.pixels).logits
        lagging = model.eval()(data.pixels).logits
        reestimate_norm_statistics(model, [data.pixels])
        better = model(data.pixels).logits
        assert (better - wanted).abs().max() < 0.1 * (lagging - wanted).abs().max()

    def test_what_is_evaluated_is_what_is_saved(self, tiny_model, tmp_path):
        model, data = tiny_model(), Images()
        args = arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch", norm_statistics_images=24)
        callback = NormStatisticsCallback(data, 8)
        trainer = RefinerTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])
        trainer.train()
        evaluated = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
        saved = RefinerForImageClassification.from_pretrained(next(tmp_path.glob("checkpoint-*")))
        by_hand = copy.deepcopy(model)
        reestimate_norm_statistics(by_hand, data.pixels.split(8))
        for name, buffer in by_hand.named_buffers():
            assert_close(saved.state_dict()[name].float(), buffer.float(), 1e-5, name)
        with torch.no_grad():
            assert saved(data.pixels, labels=data.labels).loss.item() == pytest.approx(evaluated, rel=1e-4)

    @pytest.mark.parametrize("save_strategy", ["epoch", "no"])
    def test_also_without_evaluation(self, tiny_model, tmp_path, save_strategy):
        model, data = tiny_model(), Images()
        args = arguments(tmp_path, save_strategy=save_strategy)
        RefinerTrainer(model, args, train_dataset=data, callbacks=[NormStatisticsCallback(data, 8)]).train()
        by_hand = copy.deepcopy(model)
        reestimate_norm_statistics(by_hand, data.pixels.split(8))
        models = [model]
        if save_strategy == "epoch":
            models.append(RefinerForImageClassification.from_pretrained(next(tmp_path.glob("checkpoint-*"))))
        for trained in models:
            for name, buffer in by_hand.named_buffers():
                assert_close(trained.state_dict()[name].float(), buffer.float(), 1e-5, name)

    def test_survive_a_batch_that_fails(self, tiny_model):
        model = tiny_model()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with pytest.raises(ValueError, match="1 channels"):
            reestimate_norm_statistics(model, [torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16)])
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    def test_do_not_touch_the_training(self, tiny_model, tmp_path):
        curves = []
        for callbacks in ([], [NormStatisticsCallback(Images(), 8)]):
            args = arguments(tmp_path, num_train_epochs=2, eval_strategy="steps", eval_steps=1)
            trainer = RefinerTrainer(
                tiny_model(drop_path_rate=0.3),
                args,
                train_dataset=Images(),
                eval_dataset=Images(8),
                callbacks=callbacks,
            )
            trainer.train()
            curves.append(losses(trainer))
        assert curves[0] == curves[1]
