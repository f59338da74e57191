"""Labels that are rare: weights in the loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from refiner_hf.commands.train import main
from refiner_hf.loss_refiner import image_classification_loss
from refiner_hf.training.building import _class_weights
from refiner_hf.training.targets import TrainingTargets

from ..conftest import load_json
from ..images import write_folder
from .test_baseline import pictures, rows


WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_weighted(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 0, 1])
    made = TrainingTargets(class_weights=WEIGHTS)({"labels": labels}, 3, (0, 0), smoothing)["labels"]
    loss = image_classification_loss(made, logits, SimpleNamespace(problem_type=None, num_labels=3))
    soft = (1 - smoothing) * nn.functional.one_hot(labels, 3) + smoothing / 3
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, soft, weight=WEIGHTS))


def test_each_patch_of_a_dense_target_is_weighted():
    targets = torch.rand(2, 3, 6).softmax(1)
    made = TrainingTargets(class_weights=WEIGHTS)({"labels": targets}, 3, (2, 2))["labels"]
    torch.testing.assert_close(made, targets * WEIGHTS[:, None])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems_are_refused(problem):
    with pytest.raises(ValueError, match="Class weights are for images of one label each"):
        TrainingTargets(class_weights=WEIGHTS)({"labels": torch.rand(2, 3)}, 3, (0, 0), problem_type=problem)


def test_balanced_weights_by_the_networks_numbers():
    pixels, _ = pictures(10, 8, 3, 0)
    train = rows(pixels, np.array([0] * 6 + [1] * 3 + [2]))
    config = SimpleNamespace(id2label={0: "z", 1: "a", 2: "b", 3: "c"}, num_labels=4)
    plan = SimpleNamespace(
        data=SimpleNamespace(train=train), label_ids=[2, 3, 1], model=SimpleNamespace(config=config)
    )
    weights = _class_weights(plan)
    torch.testing.assert_close(weights, torch.tensor([0, 10 / 3, 10 / 18, 10 / 9]))  # ten images, three labels


def test_from_the_command_line(tmp_path):
    folder = write_folder(tmp_path / "photos", 12)
    for file in list((folder / "red").iterdir())[3:]:
        file.unlink()
    options = ["--class_weights", "balanced", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    main(["digits", "--train_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--use_cpu", *options])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| class_weights | balanced |" in card
    assert load_json(tmp_path / "out" / "training_arguments.json")["training"]["class_weights"] == "balanced"
