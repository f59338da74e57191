"""What RefinerForMaskedImageModeling and RefinerBackbone compute."""

import pytest
import torch
from transformers import AutoBackbone

from refiner_hf import RefinerBackbone, RefinerForImageClassification, RefinerForMaskedImageModeling, RefinerModel

from .conftest import LAYOUTS, assert_close
from .every_class import inputs_of, make


every_stem = pytest.mark.parametrize("stem", [True, False], ids=["stem", "no_stem"])
# Height and width differ in the image, in a patch and in the grid of 4 x 3 patches.
OBLONG = dict(image_size=(8, 18), patch_size=(2, 6))
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def oblong_inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 18, generator=generator), torch.rand(batch, 4, 3, generator=generator) < 0.5


def in_patch(y: int, x: int) -> tuple[int, int]:
    return y // 2, x // 6


class TestMaskedImageModeling:
    @every_stem
    @pytest.mark.parametrize("training", [False, True])
    def test_what_lies_under_the_mask_reaches_the_loss_only(self, stem, training):
        model = make(RefinerForMaskedImageModeling, use_conv_stem=stem, **OBLONG).train(training)
        images, mask = oblong_inputs()
        pixels = mask.repeat_interleave(2, 1).repeat_interleave(6, 2)[:, None].expand_as(images)
        with torch.no_grad():
            first = model(images, mask)
            others = torch.where(pixels, 10 * torch.randn_like(images), images)
            second = model(others, mask)
            seen = model(torch.where(pixels, images, images + 0.1), mask)
        assert torch.equal(first.reconstruction, second.reconstruction)
        assert first.loss != second.loss
        assert (first.reconstruction != seen.reconstruction).flatten(1).any(1).all()

    @every_stem
    def test_every_visible_patch_reaches_every_masked_one(self, stem):
        model = make(RefinerForMaskedImageModeling, use_conv_stem=stem, **OBLONG)
        images, mask = oblong_inputs(1)
        images.requires_grad_()
        reconstruction = model(images, mask).reconstruction
        for y, x in mask[0].nonzero().tolist():
            patch = reconstruction[0, :, 2 * y : 2 * y + 2, 6 * x : 6 * x + 6]
            (gradient,) = torch.autograd.grad(patch.sum(), images, retain_graph=True)
            reached = gradient[0].abs().sum(0).unflatten(0, (4, 2)).unflatten(2, (3, 6)).sum((1, 3)) > 0
            assert torch.equal(reached, ~mask[0])

    def test_loss_is_the_mean_distance_over_the_masked_pixels(self):
        model = make(RefinerForMaskedImageModeling, **OBLONG)
        images, mask = oblong_inputs()
        outputs = model(images, mask)
        differences = [
            abs(outputs.reconstruction[b, c, y, x].item() - images[b, c, y, x].item())
            for b in range(2)
            for c in range(3)
            for y in range(8)
            for x in range(18)
            if mask[(b, *in_patch(y, x))]
        ]
        assert outputs.loss.item() == pytest.approx(sum(differences) / len(differences), rel=1e-5)

    def test_pixels_are_put_where_they_belong(self):
        """A decoder that says which pixel of which patch it paints."""
        model = make(RefinerForMaskedImageModeling, **OBLONG)
        with torch.no_grad():
            model.decoder.weight.zero_()
            model.decoder.weight[:, 0] = 1000
            model.decoder.bias.copy_(torch.arange(3 * 2 * 6))

        def number_patches(module, args, outputs):
            outputs.last_hidden_state = torch.arange(-1.0, 12)[None, :, None].expand(
                2, -1, 24
            )  # the class token first
            return outputs

        model.refiner.register_forward_hook(number_patches)
        reconstruction = model(*oblong_inputs()).reconstruction
        for c in range(3):
            for y in range(8):
                for x in range(18):
                    row, column = in_patch(y, x)
                    expected = 1000 * (3 * row + column) + 12 * c + 6 * (y % 2) + x % 6
                    assert (reconstruction[:, c, y, x] == expected).all()

    def test_masks_of_either_shape_and_any_kind(self):
        model = make(RefinerForMaskedImageModeling, **OBLONG)
        images, mask = oblong_inputs()
        expected = model(images, mask)
        for same in (mask.flatten(1), mask.long(), mask.flatten(1).byte()):
            outputs = model(images, same)
            assert torch.equal(outputs.loss, expected.loss)
            assert torch.equal(outputs.reconstruction, expected.reconstruction)

    @pytest.mark.parametrize("shape", [(2, 11), (1, 12), (12,), (2, 3, 4), (2, 1, 12), (2, 8, 18)])
    def test_masks_that_do_not_fit(self, shape):
        model = make(RefinerForMaskedImageModeling, **OBLONG)
        with pytest.raises(ValueError, match=r"bool_masked_pos must have shape \(2, 12\) or \(2, 4, 3\)"):
            model(oblong_inputs()[0], torch.zeros(shape, dtype=torch.bool))

    @pytest.mark.parametrize("mask", [torch.rand(2, 12), [[True] * 12] * 2, "all"], ids=["shares", "list", "text"])
    def test_masks_of_another_kind(self, mask):
        model = make(RefinerForMaskedImageModeling, **OBLONG)
        with pytest.raises(ValueError, match="bool_masked_pos must be a tensor of booleans"):
            model(oblong_inputs()[0], mask)

    @pytest.mark.parametrize("cls", [RefinerModel, RefinerForImageClassification, RefinerBackbone])
    def test_models_without_a_mask_token_say_so(self, cls):
        with pytest.raises(ValueError, match="no mask token"):
            make(cls)(**inputs_of(RefinerForMaskedImageModeling))

    def test_no_images(self):
        with pytest.raises(ValueError, match="pixel_values"):
            make(RefinerForMaskedImageModeling)(bool_masked_pos=torch.zeros(1, 16))

    def test_nothing_masked(self):
        model = make(RefinerForMaskedImageModeling).train()
        images = inputs_of(RefinerModel)["pixel_values"]
        outputs = model(images, torch.zeros(3, 16, dtype=torch.bool))
        assert outputs.loss == 0
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        # Without a mask there is no loss, and the reconstruction is that of the whole image.
        without = model.eval()(images)
        assert without.loss is None
        assert torch.equal(without.reconstruction, model(images, torch.zeros(3, 16, dtype=torch.bool)).reconstruction)

    def test_everything_masked(self):
        """Then all that an image can be told from is its mask token and positions, the same for all."""
        reconstruction = make(RefinerForMaskedImageModeling)(
            inputs_of(RefinerModel)["pixel_values"], torch.ones(3, 16, dtype=torch.bool)
        ).reconstruction
        assert_close(reconstruction[1:], reconstruction[:1].expand(2, -1, -1, -1), 1e-5)

    def test_cosine_regulariser_is_added(self):
        plain, regularised = (
            make(
                RefinerForMaskedImageModeling, attention_types=LAYOUTS["plain"], cosine_regularizer_weight=weight
            ).train()
            for weight in (0.0, 0.25)
        )
        inputs = inputs_of(RefinerForMaskedImageModeling)
        similarity = regularised.refiner(**inputs).map_similarity
        assert similarity > 0
        assert_close(regularised(**inputs).loss - plain(**inputs).loss, 0.25 * similarity, 1e-4)
        regularised.load_state_dict(plain.state_dict())  # the same running statistics
        assert torch.equal(regularised.eval()(**inputs).loss, plain.eval()(**inputs).loss)

    def test_loss_of_a_large_batch_in_half_precision(self):
        model = make(RefinerForMaskedImageModeling, image_size=64, patch_size=16, use_conv_stem=False)
        images, mask = torch.randn(8, 3, 64, 64), torch.ones(8, 16, dtype=torch.bool)
        expected = model(images, mask).loss
        assert_close(model.half()(images.half(), mask).loss, expected, 0.01)

    @every_stem
    def test_learns(self, stem):
        """Images of one colour each, which the visible patches tell."""
        torch.manual_seed(0)
        model = make(RefinerForMaskedImageModeling, use_conv_stem=stem).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        shares = []
        for _ in range(40):
            images = torch.randn(16, 3, 1, 1).expand(-1, -1, 16, 16)
            loss = model(images, torch.rand(16, 16) < 0.5).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(loss.item() / images.abs().mean().item())  # of what knowing nothing costs
        assert shares[0] > 0.9 and sum(shares[-5:]) / 5 < 0.8


class TestBackbone:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_feature_maps_are_the_models_hidden_states(self, layout):
        """Normed, without the class token, as images."""
        backbone = make(RefinerBackbone, attention_types=LAYOUTS[layout], out_features=STAGES, **OBLONG)
        model = make(RefinerModel, attention_types=LAYOUTS[layout], **OBLONG)
        images, _ = oblong_inputs()
        with torch.no_grad():
            feature_maps = backbone(images).feature_maps
            outputs = model(images, output_hidden_states=True)
        assert len(feature_maps) == len(outputs.hidden_states) == 5
        for feature_map, hidden_state in zip(feature_maps, outputs.hidden_states):
            assert feature_map.shape == (2, 24, 4, 3)
            for row in range(4):
                for column in range(3):
                    token = model.norm(hidden_state[:, 1 + 3 * row + column])
                    assert_close(feature_map[:, :, row, column], token, 1e-6)
        assert_close(feature_maps[-1].flatten(2).transpose(1, 2), outputs.last_hidden_state[:, 1:], 1e-6)

    @pytest.mark.parametrize(
        "given, stages",
        [
            (dict(out_features=None), [4]),
            (dict(out_features=["stem", "stage3"]), [0, 3]),
            (dict(out_features=None, out_indices=[1, -2]), [1, 3]),
            (dict(out_features=None, out_indices=(0, -1)), [0, 4]),
        ],
    )
    def test_chosen_stages(self, given, stages):
        images = inputs_of(RefinerBackbone)["pixel_values"]
        every_stage = make(RefinerBackbone, out_features=STAGES)(images).feature_maps
        backbone = make(RefinerBackbone, **given)
        feature_maps = backbone(images).feature_maps
        assert len(feature_maps) == len(stages)
        assert all(torch.equal(ours, every_stage[i]) for ours, i in zip(feature_maps, stages))
        # What a segmentation or detection head asks a backbone.
        assert backbone.stage_names == STAGES and backbone.out_features == [STAGES[i] for i in stages]
        assert [i % 5 for i in backbone.out_indices] == stages
        assert backbone.channels == [24] * len(stages) and backbone.out_feature_channels == dict.fromkeys(STAGES, 24)

        backbone.out_features = ["stage1", "stage2"]
        assert all(torch.equal(a, b) for a, b in zip(backbone(images).feature_maps, every_stage[1:3]))

    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("reshape", [True, False])
    def test_norm_and_shape_can_be_left_alone(self, norm, reshape):
        backbone = make(
            RefinerBackbone, out_features=STAGES, apply_layernorm=norm, reshape_hidden_states=reshape, **OBLONG
        )
        outputs = backbone(oblong_inputs()[0], output_hidden_states=True)
        for feature_map, hidden_state in zip(outputs.feature_maps, outputs.hidden_states):
            expected = backbone.norm(hidden_state) if norm else hidden_state
            if reshape:
                assert_close(feature_map, expected[:, 1:].reshape(2, 4, 3, 24).permute(0, 3, 1, 2), 1e-6)
            else:
                assert_close(feature_map, expected, 1e-6)

    def test_takes_other_sizes_by_default(self):
        backbone = make(RefinerBackbone)
        images = inputs_of(RefinerBackbone, grid=(3, 7))["pixel_values"]
        assert [f.shape for f in backbone(images).feature_maps] == [(3, 24, 3, 7)] * 2
        with pytest.raises(ValueError, match="takes 16x16"):
            backbone(images, interpolate_pos_encoding=False)
        with pytest.raises(ValueError, match="multiples"):
            backbone(images[..., :-1])
        with pytest.raises(ValueError, match="pixel_values"):
            backbone()

    def test_hidden_states_where_asked_for(self):
        """Though the backbone itself always needs them."""
        backbone, images = make(RefinerBackbone), inputs_of(RefinerBackbone)["pixel_values"]
        assert list(backbone(images)) == ["feature_maps"]
        assert len(backbone(images, output_hidden_states=True).hidden_states) == 5
        backbone.config.output_hidden_states = True
        assert list(backbone(images)) == ["feature_maps", "hidden_states"]
        assert list(backbone(images, output_hidden_states=False)) == ["feature_maps"]

    def test_from_a_classifiers_folder_and_from_a_configuration(self, tmp_path):
        classifier = make(RefinerForImageClassification)
        classifier.save_pretrained(tmp_path)
        backbone = RefinerBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"])
        images = inputs_of(RefinerBackbone)["pixel_values"]
        hidden_states = classifier(images, output_hidden_states=True).hidden_states
        for feature_map, i in zip(backbone(images).feature_maps, (1, 3), strict=True):
            expected = classifier.refiner.norm(hidden_states[i])[:, 1:].transpose(1, 2)
            assert torch.equal(feature_map.flatten(2), expected)
        assert type(AutoBackbone.from_config(backbone.config)) is RefinerBackbone

        backbone.save_pretrained(tmp_path / "backbone")
        assert RefinerBackbone.from_pretrained(tmp_path / "backbone").out_features == ["stage1", "stage3"]
