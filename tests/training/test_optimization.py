"""Optimizers of timm; learning rates: of layers, batch sizes, and at the end."""

import pytest
import torch
from timm.optim import Muon

from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.optimization import scaled_learning_rate
from refiner_hf.training.trainer import RefinerTrainer

from .test_trainer import arguments


def rates(trainer, steps):
    """The learning rate of each step."""
    trainer.create_optimizer_and_scheduler(steps)
    seen = []
    for _ in range(steps):
        seen.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return seen


def test_the_papers_schedule(tiny_model, tmp_path):
    """Up from 1e-6 in 5 epochs, a cosine down to 1e-5 until 300, ten more there; ten steps an epoch here."""
    args = arguments(
        tmp_path, learning_rate=5e-4, lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5, "warmup_lr_rate": 0.002}, warmup_steps=5 / 300, cooldown_steps=10 / 310,
    )  # fmt: skip
    seen = rates(RefinerTrainer(tiny_model(), args), 3100)
    assert seen[0] == pytest.approx(1e-6)
    assert max(seen) == pytest.approx(5e-4, rel=1e-3) and 48 <= seen.index(max(seen)) <= 51
    assert seen[1525] == pytest.approx((5e-4 + 1e-5) / 2, rel=0.01), "half way down"
    assert all(a >= b for a, b in zip(seen[51:], seen[52:]))
    assert seen[3000:] == pytest.approx([1e-5] * 100) and seen[2950] > 1.01e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_cooldown_stays_at_the_schedules_end(tiny_model, tmp_path, schedule):
    args = arguments(tmp_path, learning_rate=1.0, lr_scheduler_type=schedule, cooldown_steps=5)
    seen = rates(RefinerTrainer(tiny_model(), args), 20)
    alone = rates(RefinerTrainer(tiny_model(), arguments(tmp_path, learning_rate=1.0, lr_scheduler_type=schedule)), 15)
    assert seen == [*alone, *[0] * 5] and alone[-1] > 0


@pytest.mark.parametrize("cooldown, expected", [(0, 0), (7, 7), (0.1, 10), (200, 100)])
def test_cooldown_in_steps_or_as_a_share(tmp_path, cooldown, expected):
    assert arguments(tmp_path, cooldown_steps=cooldown).get_cooldown_steps(100) == expected


def test_cooldown_needs_a_schedule_in_steps(tiny_model, tmp_path):
    args = arguments(tmp_path, cooldown_steps=5, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    trainer = RefinerTrainer(tiny_model(), args, eval_dataset=[0])
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="cooldown_steps doesn't go with ReduceLROnPlateau"):
        trainer.create_scheduler(20)


def test_layers_learn_more_slowly_the_earlier_they_come(tiny_model, tmp_path):
    model = tiny_model(use_dense_head=True, attention_types=["plain", "shared_refined"] * 2)
    trainer = RefinerTrainer(model, arguments(tmp_path, layer_decay=0.5, learning_rate=1.0, weight_decay=0.1))
    groups = trainer.create_optimizer().param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(rate) == len(names)
    assert groups[0]["lr"] == 1, "the full rate is the one that is logged"
    for name, expected in {
        "classifier.weight": 1, "dense_classifier.bias": 1, "refiner.norm.weight": 1,
        "refiner.layers.3.mlp.fc1.weight": 1 / 2,
        "refiner.layers.1.attention.refinement.local_attention.weight": 1 / 8, "refiner.layers.0.mlp.fc1.bias": 1 / 16,
        "refiner.embeddings.cls_token": 1 / 32, "refiner.embeddings.patch_embeddings.projection.weight": 1 / 32,
    }.items():  # fmt: skip
        assert rate[id(names[name])] == expected, name
    assert decay[id(names["refiner.layers.0.mlp.fc1.weight"])] == 0.1
    assert decay[id(names["refiner.layers.0.mlp.fc1.bias"])] == 0
    # the schedule scales them all
    trainer.create_scheduler(10)
    trainer.optimizer.step(), trainer.lr_scheduler.step()
    after = trainer.lr_scheduler.get_last_lr()
    assert [a / b["initial_lr"] for a, b in zip(after, groups)] == pytest.approx([0.9] * len(groups))


class TestTimm:
    """`timm_optim`, an optimizer of timm in place of `optim`."""

    def test_the_groups_are_ours(self, tiny_model, tmp_path):
        """Decay, rates and layers as for any other; of Muon the matrices, while what isn't one gets AdamW's steps."""
        args = arguments(
            tmp_path, timm_optim="nmuon", learning_rate=0.005, weight_decay=0.1, layer_decay=0.5,
            learning_rate_batch_size=2,
        )  # fmt: skip
        model = tiny_model()
        trainer = RefinerTrainer(model, args)
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is Muon and optimizer.defaults["nesterov"]
        images = trainer.get_total_train_batch_size(args)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005 * images / 2)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))

    def test_a_step_orthogonalizes_matrices(self, tiny_model, tmp_path):
        model = tiny_model()
        trainer = RefinerTrainer(model, arguments(tmp_path, timm_optim="nmuon", learning_rate=0.01, weight_decay=0.0))
        optimizer = trainer.create_optimizer()
        weight = model.refiner.layers[0].mlp.fc1.weight
        before = weight.detach().clone()
        loss = model(torch.rand(4, 3, 16, 16), labels=torch.tensor([0, 1, 2, 3])).loss
        loss.backward()
        optimizer.step()
        values = torch.linalg.svdvals((weight - before).detach())
        assert values.max() / values[: len(values) // 2].min() < 2, "AdamW's step of one batch has a few large ones"

    def test_arguments_count_when_a_training_begins(self, tiny_model, tmp_path):
        trainer = RefinerTrainer(tiny_model(), arguments(tmp_path, timm_optim="lion", learning_rate=0.1))
        assert type(trainer.create_optimizer()).__name__ == "Lion"
        trainer.optimizer, trainer.args.timm_optim = None, None
        assert type(trainer.create_optimizer()).__name__ == "AdamW"

    def test_a_name_that_timm_does_not_know(self, tmp_path):
        with pytest.raises(ValueError, match="--timm_optim moun: timm has no optimizer of this name"):
            RefinerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, timm_optim="moun")


def test_rate_follows_the_number_of_images_in_a_step():
    assert scaled_learning_rate(5e-4, 1024, 256) == pytest.approx(2e-3)
    assert scaled_learning_rate(5e-4, 32, 256) == pytest.approx(6.25e-5)
    assert scaled_learning_rate(5e-4, 1024, None) == 5e-4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_decay": 0.0}, "--layer_decay must be in"),
        ({"ema_decay": 1.0}, "--ema_decay must be in"),
        ({"cooldown_steps": -1}, "--cooldown_steps must not be negative"),
        ({"learning_rate_batch_size": 0}, "--learning_rate_batch_size must be at least 1"),
    ],
)
def test_options_out_of_range(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        RefinerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)
