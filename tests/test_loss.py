import numpy as np
import pytest
import torch
from torch.nn import functional as F

from refiner_hf import modeling_refiner
from refiner_hf.loss_refiner import image_classification_loss
from refiner_hf.token_mixing_refiner import mix_targets, mix_tokens, sample_mixing_mask


torch.manual_seed(0)
LOGITS, PATCHES = torch.randn(3, 5), torch.randn(3, 4, 5)
LABELS = torch.tensor([0, 4, 2])


def soft_cross_entropy(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


class TestKindsOfLabels:
    def test_integers(self, tiny_config):
        assert torch.equal(image_classification_loss(LABELS, LOGITS, tiny_config()), F.cross_entropy(LOGITS, LABELS))

    def test_soft_labels_give_soft_cross_entropy(self, tiny_config):
        soft = torch.rand(3, 5).softmax(-1)
        loss = image_classification_loss(soft, LOGITS, tiny_config())
        assert loss.item() == pytest.approx(soft_cross_entropy(LOGITS, soft).item(), rel=1e-6)

    def test_every_patch_gets_the_images_target(self, tiny_config):
        config = tiny_config(dense_loss_weight=0.25)
        expected = F.cross_entropy(LOGITS, LABELS) + 0.25 * F.cross_entropy(
            PATCHES.reshape(12, 5), LABELS.repeat_interleave(4)
        )
        assert image_classification_loss(LABELS, LOGITS, config, PATCHES).item() == pytest.approx(expected.item())
        one_hot = F.one_hot(LABELS, 5).float()
        assert image_classification_loss(one_hot, LOGITS, config, PATCHES).item() == pytest.approx(expected.item())

    def test_dense_targets(self, tiny_config):
        dense = torch.rand(3, 5, 6).softmax(1)
        expected = soft_cross_entropy(LOGITS, dense[:, :, 1]) + 0.5 * soft_cross_entropy(
            PATCHES, dense[:, :, 2:].transpose(1, 2)
        )
        loss = image_classification_loss(dense, LOGITS, tiny_config(), PATCHES)
        assert loss.item() == pytest.approx(expected.item())

    def test_dense_targets_without_patches(self, tiny_config):
        dense = torch.rand(3, 5, 2).softmax(1)
        expected = soft_cross_entropy(LOGITS, dense[:, :, 1])
        assert image_classification_loss(dense, LOGITS, tiny_config()).item() == pytest.approx(expected.item())

    def test_an_explicit_problem_type_wins(self, tiny_config):
        several = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
        config = tiny_config(problem_type="multi_label_classification")
        expected = F.binary_cross_entropy_with_logits(LOGITS, several.float())
        for labels in (several, several.float()):
            assert image_classification_loss(labels, LOGITS, config).item() == pytest.approx(expected.item())
        assert config.problem_type == "multi_label_classification"

        config = tiny_config(problem_type="regression")
        values = torch.randn(3, 5)
        assert image_classification_loss(values, LOGITS, config).item() == pytest.approx(
            F.mse_loss(LOGITS, values).item()
        )
        config = tiny_config(problem_type="single_label_classification")
        one_hot = F.one_hot(LABELS, 5)
        assert image_classification_loss(one_hot, LOGITS, config).item() == pytest.approx(
            F.cross_entropy(LOGITS, LABELS).item()
        )

    def test_one_label_is_regression(self, tiny_config):
        config = tiny_config(num_labels=1)
        values = torch.randn(3)
        loss = image_classification_loss(values, LOGITS[:, :1], config)
        assert loss.item() == pytest.approx(F.mse_loss(LOGITS[:, 0], values).item())

    def test_nothing_is_written_into_the_config(self, tiny_config):
        config = tiny_config()
        image_classification_loss(LABELS, LOGITS, config)
        assert config.problem_type is None


class TestLabelsThatDoNotFit:
    @pytest.mark.parametrize("wrong", [5, -1])
    def test_out_of_range(self, tiny_config, wrong):
        with pytest.raises(ValueError, match=rf"0\.\.4.*\[{wrong}\]"):
            image_classification_loss(torch.tensor([0, 1, wrong]), LOGITS, tiny_config())

    def test_several_integers_without_problem_type(self, tiny_config):
        with pytest.raises(ValueError, match="multi_label_classification"):
            image_classification_loss(torch.ones(3, 5, dtype=torch.long), LOGITS, tiny_config())

    def test_wrong_shape(self, tiny_config):
        with pytest.raises(ValueError, match=r"\(3, 4\)"):
            image_classification_loss(torch.rand(3, 4), LOGITS, tiny_config())

    def test_wrong_number_of_patches(self, tiny_config):
        with pytest.raises(ValueError, match="7 patches.*4 patches"):
            image_classification_loss(torch.rand(3, 5, 9), LOGITS, tiny_config(), PATCHES)


class TestTokenMixing:
    def test_twice_is_identity(self):
        patches = torch.randn(4, 6, 3)
        mask = torch.tensor([[True, False, False], [True, True, False]])
        mixed = mix_tokens(patches, mask)
        assert torch.equal(mixed[0, 0], patches[3, 0]) and torch.equal(mixed[0, 1], patches[0, 1])
        assert torch.equal(mix_tokens(mixed, mask), patches)

    def test_targets_follow_the_share(self):
        targets = F.one_hot(torch.tensor([0, 1]), 3).float()
        mask = torch.tensor([[True, False], [False, False]])
        assert mix_targets(targets, mask).tolist() == [[0.75, 0.25, 0], [0.25, 0.75, 0]]

    def test_boxes(self):
        torch.manual_seed(0)
        masks = [sample_mixing_mask((6, 9), torch.device("cpu")) for _ in range(3000)]
        for mask in masks:
            assert mask.shape == (6, 9)
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            if len(rows):  # one solid box
                assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # How often each patch is mixed, against the box rule written out in plain numbers.
        rng = np.random.default_rng(0)
        expected = np.zeros((6, 9))
        for _ in range(3000):
            side = np.sqrt(1 - rng.beta(1, 1))
            height, width, row, column = int(6 * side), int(9 * side), rng.integers(6), rng.integers(9)
            top, left = max(row - height // 2, 0), max(column - width // 2, 0)
            expected[top : row + height // 2, left : column + width // 2] += 1 / 3000
        assert np.abs(torch.stack(masks).float().mean(0).numpy() - expected).max() < 0.04

    @pytest.mark.parametrize("kind", ["integers", "soft labels"])
    def test_only_in_training(self, tiny_model, monkeypatch, kind):
        """The class token learns of both images by their share, each patch of the image that it came from."""
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[:2, 1:] = True
        monkeypatch.setattr(modeling_refiner, "sample_mixing_mask", lambda grid, device: mask)
        model, twin = (tiny_model(token_mixing=mixing, use_dense_head=True) for mixing in (True, False))
        images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
        soft = F.one_hot(labels, 5).float()
        if kind == "soft labels":
            labels = soft = torch.rand(4, 5).softmax(-1)
        assert torch.equal(model.eval()(images).logits, twin.eval()(images).logits)

        outputs = model.train()(images, labels=labels)
        tokens = twin.train().refiner(images, mixing_mask=mask).last_hidden_state
        logits, patches = twin.classifier(tokens[:, 0]), twin.dense_classifier(tokens[:, 1:])
        patches = torch.where(mask.flatten()[:, None], patches.flip(0), patches)
        share = 6 / 16
        expected = soft_cross_entropy(logits, (1 - share) * soft + share * soft.flip(0))
        expected += 0.5 * soft_cross_entropy(patches, soft[:, None])
        assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.equal(outputs.patch_logits, patches)


class TestCosineRegularizer:
    def test_by_default_only_pairs_of_different_maps(self, tiny_model):
        images = torch.randn(2, 3, 16, 16)
        losses = {}
        for weight, repeated in ((0.0, False), (1.0, False), (1.0, True)):
            model = tiny_model(cosine_regularizer_weight=weight, cosine_regularizer_repeated_pairs=repeated).train()
            losses[weight, repeated] = model(images, labels=torch.tensor([0, 1])).loss
        different = losses[1.0, False] - losses[0.0, False]
        everything = losses[1.0, True] - losses[0.0, False]
        # Of three pairs, the first and the last are one and the same map, with similarity 1.
        assert everything.item() == pytest.approx((2 + different.item()) / 3, abs=1e-5)
        assert 0 < different.item() < 1

    def test_not_in_evaluation(self, tiny_model):
        images = torch.randn(2, 3, 16, 16)
        a = tiny_model().eval()(images, labels=torch.tensor([0, 1])).loss
        b = tiny_model(cosine_regularizer_weight=1.0).eval()(images, labels=torch.tensor([0, 1])).loss
        assert torch.equal(a, b)
