"""What a training step aims at."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from refiner_hf.data.augmentation import NormalizeViews
from refiner_hf.image_processing_refiner import RefinerImageProcessor
from refiner_hf.training.targets import TrainingTargets, dense_targets, smooth_labels
from refiner_hf.training.trainer import RefinerTrainer

from ..conftest import assert_close
from .test_trainer import Images, arguments, losses


LABELS = 20  # of the golden maps


def golden_targets(file, grid, smoothing, **options):
    row, column, height, width = file["crop_row_col_height_width_fraction"].unbind(1)
    return dense_targets(
        scores=file["top5_scores"],
        classes=file["top5_classes"].short(),
        boxes=torch.stack((column, row, column + width, row + height), 1),
        flipped=torch.zeros(4, dtype=torch.bool),
        labels=file["labels"],
        num_labels=LABELS,
        grid=(grid, grid),
        smoothing=smoothing,
        **options,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("grid", [1, 7, 14])
def test_golden_label_maps(golden, grid, smoothing):
    file = golden("token_label_maps")
    targets = golden_targets(file, grid, smoothing, transposed_boxes=True)
    expected = file[f"target.grid{grid}.smoothing{smoothing}.mixup1.0"]
    assert_close(targets[:, :, : expected.shape[2]], expected, 1e-5)
    mixed = 0.3 * targets + 0.7 * targets.flip(0)
    assert_close(mixed[:, :, : expected.shape[2]], file[f"target.grid{grid}.smoothing{smoothing}.mixup0.3"], 1e-5)
    right = golden_targets(file, grid, smoothing)
    assert (right - targets)[0].abs().max() > 0.02, "the right order of a box is the default, and differs"


def regions(rows=8, columns=8, labels=4):
    """A label map whose quarters are of the classes 0 and 1 above, 2 and 3 below."""
    down, across = torch.arange(rows)[:, None] >= rows // 2, torch.arange(columns)[None] >= columns // 2
    classes = (2 * down.int() + across.int())[None, None]
    return torch.full((1, 1, rows, columns), 9.0).half(), classes.short()


def targets_of(box, flipped=False, grid=(2, 2), shape=(8, 8), **options):
    scores, classes = regions(*shape)
    return dense_targets(
        scores=scores, classes=classes, boxes=torch.tensor([box]), flipped=torch.tensor([flipped]),
        labels=torch.tensor([0]), num_labels=4, grid=grid, **options,
    )[0]  # fmt: skip


class TestGeometry:
    """Dense targets follow what was done to the image."""

    @pytest.mark.parametrize("shape", [(8, 8), (6, 12)])
    def test_whole_image(self, shape):
        targets = targets_of([0.0, 0.0, 1.0, 1.0], shape=shape)
        assert targets[:, 2:].argmax(0).tolist() == [0, 1, 2, 3]
        assert torch.allclose(targets[:, 1], torch.full((4,), 0.25), atol=0.01)

    def test_flip(self):
        assert targets_of([0.0, 0.0, 1.0, 1.0], flipped=True)[:, 2:].argmax(0).tolist() == [1, 0, 3, 2]

    @pytest.mark.parametrize(
        "box, seen",
        [
            ([0.5, 0.0, 1.0, 1.0], [1, 1, 3, 3]),  # the right half
            ([0.0, 0.5, 1.0, 1.0], [2, 3, 2, 3]),  # the lower half
            ([0.5, 0.5, 1.0, 1.0], [3, 3, 3, 3]),
        ],
    )
    def test_crops(self, box, seen):
        targets = targets_of(box)
        assert targets[:, 2:].argmax(0).tolist() == seen
        assert targets[:, 1].topk(len(set(seen))).indices.sort().values.tolist() == sorted(set(seen))

    def test_transposed_boxes_are_the_references(self):
        seen = targets_of([0.5, 0.0, 1.0, 1.0], transposed_boxes=True)[:, 2:].argmax(0).tolist()
        assert seen == [2, 3, 2, 3], "the right half gets the labels of the lower half"

    def test_sums(self):
        targets = targets_of([0.1, 0.2, 0.9, 0.7], smoothing=0.2, grid=(3, 2))
        assert targets.shape == (4, 2 + 6)
        assert torch.allclose(targets[:, 0], torch.tensor([0.85, 0.05, 0.05, 0.05]))
        assert torch.allclose(targets[:, 1:].sum(0), torch.full((7,), 1.05)), "1 + off, as in the reference"


class TestTrainingTargets:
    def inputs(self, count=4):
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator), "labels": torch.arange(count) % 3}

    def test_nothing_to_do(self):
        inputs = self.inputs()
        made = TrainingTargets()(inputs, 3, (2, 2))
        assert made.keys() == inputs.keys() and all(made[name] is inputs[name] for name in inputs)

    def test_levels_become_pixels_before_they_are_mixed(self):
        levels = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3)
        inputs = {"pixel_values": levels, "labels": torch.arange(2)}
        normalize = NormalizeViews(RefinerImageProcessor())
        made = TrainingTargets(normalize=normalize)(inputs, 2, (2, 2))
        assert (made["pixel_values"] == torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8)).all()
        np.random.seed(3)
        make = TrainingTargets(normalize=normalize, mixup=Mixup(0.8, label_smoothing=0.0))
        made = make(inputs, 2, (2, 2))
        share = made["labels"][0, 0].item()
        assert 0 < share < 1 and made["pixel_values"][0].mean().item() == pytest.approx(1 - 2 * share, abs=1e-5)
        with pytest.raises(ValueError, match=r"levels from 0 to 255.*TrainingTargets\(normalize=NormalizeViews"):
            TrainingTargets()(inputs, 2, (2, 2))

    @pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
    def test_images_and_labels_are_mixed_alike(self, alphas):
        np.random.seed(3)
        make, shares = TrainingTargets(mixup=Mixup(*alphas, label_smoothing=0.0)), []
        for _ in range(16):
            # an image's levels are its number: its mean says what share of which images there is
            inputs = {"pixel_values": torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8).clone()}
            inputs["labels"] = torch.arange(6)
            made = make(inputs, 6, (2, 2), smoothing=0.1)
            means = made["pixel_values"].mean((1, 2, 3))
            share = (means[0].item() - 5) / (0 - 5)
            shares.append(share)
            expected = smooth_labels(torch.arange(6), 6, 0.1)
            assert_close(made["labels"], share * expected + (1 - share) * expected.flip(0), 1e-5)
            assert_close(made["labels"].sum(1), torch.ones(6), 1e-5)
        assert len(set(shares)) > 8

    def test_an_odd_batch_is_not_mixed(self):
        inputs = self.inputs(3)
        made = TrainingTargets(mixup=Mixup(0.8, 1.0, label_smoothing=0.0))(inputs, 3, (2, 2), smoothing=0.1)
        assert (made["pixel_values"] == inputs["pixel_values"]).all()
        assert_close(made["labels"], smooth_labels(inputs["labels"], 3, 0.1))

    def test_label_maps_are_mixed_with_the_images(self):
        np.random.seed(1)
        scores, classes = regions()
        inputs = self.inputs(2) | {
            "label_map_scores": scores.expand(2, -1, -1, -1),
            "label_map_classes": torch.cat((classes, 3 - classes)),
            "box": torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2),
            "flipped": torch.tensor([False, True]),
        }
        plain = TrainingTargets()(dict(inputs), 4, (2, 2))
        assert set(plain) == {"pixel_values", "labels"} and plain["labels"].shape == (2, 4, 6)
        pixels = inputs["pixel_values"].clone()
        mixed = TrainingTargets(mixup=Mixup(0.8, label_smoothing=0.0))(dict(inputs), 4, (2, 2))
        share = ((mixed["pixel_values"] - pixels.flip(0)) / (pixels - pixels.flip(0))).median().item()
        assert 0 < share < 1
        assert_close(mixed["labels"], share * plain["labels"] + (1 - share) * plain["labels"].flip(0), 1e-4)


SEVERAL, NUMBERS = "multi_label_classification", "regression"


class TestOtherProblems:
    """Several labels an image, and numbers: by hand."""

    @pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.uint8, torch.float32])
    def test_each_of_several_labels_goes_towards_a_half(self, kind):
        labels = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(kind)
        smoothed = smooth_labels(labels, 3, 0.2, SEVERAL)
        assert_close(smoothed, torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.1, 0.9]]))

    def test_several_labels_are_mixed(self):
        np.random.seed(3)
        labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
        inputs = {"pixel_values": torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8).clone(), "labels": labels}
        made = TrainingTargets(mixup=Mixup(0.8, label_smoothing=0.0))(inputs, 3, (2, 2), 0.2, SEVERAL)
        share = 1 - made["pixel_values"][0].mean().item()  # image i is i everywhere
        assert 0 < share < 1
        one, other = torch.tensor([0.9, 0.1, 0.9]), torch.tensor([0.1, 0.1, 0.9])
        assert_close(made["labels"][0], share * one + (1 - share) * other)
        assert_close(made["labels"][1], share * other + (1 - share) * one)

    def test_numbers_are_mixed_and_not_smoothed(self):
        np.random.seed(3)
        inputs = {"pixel_values": torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8).clone()}
        inputs["labels"] = torch.tensor([4, 8])
        make = TrainingTargets(mixup=Mixup(0.8, label_smoothing=0.0))
        made = make(dict(inputs), 1, (2, 2), 0.0, NUMBERS)
        share = 1 - made["pixel_values"][0].mean().item()
        assert_close(made["labels"], torch.tensor([8 - 4 * share, 4 + 4 * share]))
        with pytest.raises(ValueError, match="'regression'.*set label_smoothing_factor to 0"):
            make(dict(inputs), 1, (2, 2), 0.1, NUMBERS)

    def test_label_maps_are_for_one_label(self):
        with pytest.raises(ValueError, match="one label each, not for multi_label"):
            TrainingTargets()({"box": 0, "labels": torch.zeros(2, 3)}, 3, (2, 2), 0.0, SEVERAL)

    def test_a_column_of_labels(self):
        labels = torch.tensor([2, 0, 1])
        assert torch.equal(smooth_labels(labels[:, None], 3, 0.1), smooth_labels(labels, 3, 0.1))


class Several(Images):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return row | {"labels": torch.tensor([(row["labels"] + i) % 2 for i in range(5)], dtype=self.kind)}


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_a_training_with_several_labels_an_image(tiny_model, tmp_path, kind, recwarn):
    """Its first loss is the binary cross-entropy with smoothed targets; the evaluation's the one with the labels."""
    model, data = tiny_model(problem_type=SEVERAL, use_dense_head=True), Several(8)
    data.kind = kind
    labels = torch.stack([data[i]["labels"] for i in range(8)])
    with torch.no_grad():
        expected = model.train()(data.pixels, labels=0.7 * labels.float() + 0.15).loss.item()
    args = arguments(tmp_path, label_smoothing_factor=0.3)
    trainer = RefinerTrainer(tiny_model(problem_type=SEVERAL, use_dense_head=True), args, train_dataset=data)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        measured = trainer.model.eval()(data.pixels, labels=labels).loss.item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(measured, rel=1e-4)
    assert not any("Label smoothing" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("fields", [dict(problem_type=NUMBERS), dict(num_labels=1)])
def test_a_regression_is_not_smoothed(tiny_model, tmp_path, fields):
    model = tiny_model(**{"num_labels": 1} | fields)
    trainer = RefinerTrainer(model, arguments(tmp_path, label_smoothing_factor=0.3), train_dataset=Images(8))
    with pytest.raises(ValueError, match="label_smoothing_factor to 0"):
        trainer.train()
    trainer.args.label_smoothing_factor = 0.0
    trainer.train()


def test_integers_that_may_mean_several_things(tiny_model, tmp_path):
    data = Several(8)
    data.kind = torch.long
    trainer = RefinerTrainer(tiny_model(), arguments(tmp_path, label_smoothing_factor=0.3), train_dataset=data)
    with pytest.raises(ValueError, match="multi_label_classification"):
        trainer.train()
