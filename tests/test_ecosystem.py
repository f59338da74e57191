"""The libraries around transformers, with Refiners: accelerate, PEFT, torchao, segmentation heads, pipelines."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoBackbone, TorchAoConfig, UperNetConfig, UperNetForSemanticSegmentation, pipeline

from refiner_hf import (
    RefinerBackbone,
    RefinerConfig,
    RefinerForImageClassification,
    RefinerImageProcessor,
    RefinerModel,
)

from .conftest import LAYOUTS, assert_close
from .every_class import (
    assert_initialised,
    config_of,
    every_class,
    inputs_of,
    make,
    results,
)


IMAGES = inputs_of(RefinerModel)["pixel_values"]


def prefix(cls) -> str:
    return "" if issubclass(cls, RefinerModel) else "refiner."


class TestOffloading:
    """accelerate spreads a network over memory and disk, and brings each part in when its turn comes."""

    @pytest.fixture(autouse=True)
    def accelerate(self):
        return pytest.importorskip("accelerate")

    @every_class
    @pytest.mark.parametrize("place", ["auto", "disk", "half of it on disk"])
    def test_same_outputs(self, cls, place, tmp_path):
        model = make(cls)
        model.save_pretrained(tmp_path)
        # A class's own embeddings, layers, norm and heads, by turns.
        parts = [name for name, _ in model.named_children() if name != "refiner"]
        parts += [f"refiner.{name}" for name, _ in model.base_model.named_children()] if prefix(cls) else []
        device_map = {
            "auto": "auto",
            "disk": {"": "disk"},
            "half of it on disk": {part: ("cpu", "disk")[i % 2] for i, part in enumerate(parts)},
        }[place]
        offloaded = cls.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
        assert any(parameter.is_meta for parameter in offloaded.parameters()) == (place != "auto")
        with torch.no_grad():
            for ours, theirs in zip(results(offloaded(**inputs_of(cls))), results(model(**inputs_of(cls)))):
                assert_close(ours, theirs)  # the refinement of offloaded weights goes module by module
            # Parameters that forward looks at itself must come in as well.
            wide = inputs_of(cls, grid=(4, 6)) | dict(interpolate_pos_encoding=True)
            for ours, theirs in zip(results(offloaded(**wide)), results(model(**wide))):
                assert_close(ours, theirs)
        offloaded.save_pretrained(tmp_path / "again")
        again = cls.from_pretrained(tmp_path / "again").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())

    @every_class
    def test_layers_and_embeddings_stay_whole(self, cls, accelerate):
        """A layer adds its input to its output, and embeddings add theirs, so these must be on one device."""
        model, cuts = make(cls, use_conv_stem=False), set()
        size = accelerate.utils.compute_module_sizes(model)[""]
        for room in range(1, 60):  # for so many sixtieths of the model
            device_map = accelerate.infer_auto_device_map(
                model,
                max_memory={"cpu": room / 60 * size, "disk": 2 * size},
                no_split_module_classes=model._no_split_modules,
            )
            cuts.add(tuple(device_map.values()))
            # From "layers.0" to "layers.0.mlp" is a step inside.
            assert all(len(name.removeprefix("refiner.").split(".")) <= 2 for name in device_map), device_map
            assert not any(name.startswith(f"{prefix(cls)}embeddings.") for name in device_map), device_map
        assert len(cuts) >= 4  # nothing, the embeddings, and they with one layer or two are in memory

    def test_another_image_size_is_refused_where_the_positions_are_on_disk(self, tmp_path):
        cls = RefinerForImageClassification
        make(cls).save_pretrained(tmp_path)
        options = dict(device_map={"": "disk"}, offload_folder=tmp_path / "offload")
        with pytest.raises(ValueError, match="offloaded, so they can't be resized"):
            cls.from_pretrained(tmp_path, image_size=24, **options)
        offloaded = cls.from_pretrained(tmp_path, **options)
        with pytest.raises(ValueError, match="offloaded, so they can't be resized"):
            offloaded.set_image_size(24)
        with torch.no_grad():  # nothing changed
            assert_close(offloaded(IMAGES).logits, make(cls)(IMAGES).logits, 1e-6)

    def test_another_image_size_with_the_embeddings_in_memory(self, tmp_path):
        cls = RefinerForImageClassification
        make(cls).save_pretrained(tmp_path)
        parts = {"refiner.embeddings": "cpu", "refiner.layers": "disk", "refiner.norm": "cpu"}
        device_map = parts | {"classifier": "cpu", "dense_classifier": "disk"}
        images = torch.randn(2, 3, 24, 24)
        offloaded = cls.from_pretrained(
            tmp_path, image_size=24, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        with torch.no_grad():
            expected = cls.from_pretrained(tmp_path, image_size=24)(images).logits
            assert_close(offloaded(images).logits, expected)


class TestPeft:
    """LoRA on queries and values, new classifiers beside it. Layers that take the map before them have no queries."""

    def adapted(self, folder, **options):
        peft = pytest.importorskip("peft")
        base = make(RefinerForImageClassification, attention_types=LAYOUTS["mixed"])
        base.save_pretrained(folder)
        if options.pop("freeze_norms", False):
            base.freeze_norms()
        heads = ["classifier", "dense_classifier", *options.pop("also_saved", [])]
        # Adapters that begin with random numbers: as LoRA begins, it changes nothing, and merging could do anything.
        lora = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], modules_to_save=heads, init_lora_weights=False, **options
        )
        return peft.get_peft_model(base, lora)

    def step(self, model):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(pixel_values=IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        return model.eval()

    @pytest.mark.parametrize("freeze_norms", [False, True])
    def test_only_adapters_and_classifiers_learn(self, tmp_path, freeze_norms):
        model = self.adapted(tmp_path, freeze_norms=freeze_norms)
        before = copy.deepcopy(model.state_dict())
        self.step(model)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        learnt = {name for name in changed if "lora_" in name or "modules_to_save" in name}
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learnt
        # Three layers of four make a map of their own; each of the four has values.
        with_lora = {name.split(".lora_")[0] for name in learnt if "lora_" in name}
        assert sum("q_proj" in name for name in with_lora) == LAYOUTS["mixed"].count("refined") + 1
        assert sum("v_proj" in name for name in with_lora) == 4
        # LoRA freezes parameters; running statistics are none, and freeze_norms() is for them.
        statistics = changed - learnt
        assert all(name.rpartition(".")[2].startswith(("running_", "num_batches")) for name in statistics)
        assert bool(statistics) != freeze_norms

    def test_merged(self, tmp_path):
        model = self.step(self.adapted(tmp_path))
        with torch.no_grad():
            expected = model(pixel_values=IMAGES).logits
            merged = model.merge_and_unload()
            assert type(merged) is RefinerForImageClassification
            assert_close(merged(IMAGES).logits, expected, 1e-5)
            merged.save_pretrained(tmp_path / "merged")
            loaded, info = RefinerForImageClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
            assert not any(info.values())
            assert torch.equal(loaded(IMAGES).logits, merged(IMAGES).logits)

    @pytest.mark.parametrize("how", ["frozen norms", "norms saved"])
    def test_saved_adapter(self, tmp_path, how):
        """
        An adapter's file holds adapters and `modules_to_save`: running statistics that moved in training must be among
        those, or not have moved.
        """
        peft = pytest.importorskip("peft")
        if how == "frozen norms":
            model = self.adapted(tmp_path, freeze_norms=True)
        else:
            bare = make(RefinerForImageClassification, attention_types=LAYOUTS["mixed"])
            norms = [name for name, module in bare.named_modules() if isinstance(module, nn.BatchNorm2d)]
            model = self.adapted(tmp_path, also_saved=norms)
        self.step(model).save_pretrained(tmp_path / "adapter")
        base = RefinerForImageClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            without = base(IMAGES).logits
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            assert torch.equal(loaded(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)
            assert not torch.equal(loaded(pixel_values=IMAGES).logits, without)


class TestTorchAo:
    """Eight-bit weights: each within 1/254 of its row's largest, which a few layers add up to some per cent."""

    TOLERANCE = 0.05

    @every_class
    def test_quantized_in_place(self, cls):
        quantization = pytest.importorskip("torchao.quantization")
        model, quantized = make(cls), make(cls)
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
        assert type(quantized.base_model.layers[0].mlp.fc1.weight.data) is not torch.Tensor
        with torch.no_grad():
            for ours, theirs in zip(results(quantized(**inputs_of(cls))), results(model(**inputs_of(cls)))):
                assert_close(ours, theirs, self.TOLERANCE)
                assert not torch.equal(ours, theirs)

    def test_quantized_while_loading(self, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        cls = RefinerForImageClassification
        model = make(cls)
        model.save_pretrained(tmp_path)
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        quantized = cls.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        assert type(quantized.refiner.layers[0].mlp.fc1.weight.data) is not torch.Tensor
        quantized.save_pretrained(tmp_path / "quantized")
        loaded = cls.from_pretrained(tmp_path / "quantized")
        with torch.no_grad():
            assert_close(quantized(IMAGES).logits, model(IMAGES).logits, self.TOLERANCE)
            assert torch.equal(loaded(IMAGES).logits, quantized(IMAGES).logits)
            wider = cls.from_pretrained(tmp_path / "quantized", image_size=24)
            assert wider(torch.randn(1, 3, 24, 24)).logits.shape == (1, 5)


class TestSegmentation:
    """transformers' UperNet on feature maps of a Refiner."""

    def make(self, **overrides) -> UperNetForSemanticSegmentation:
        torch.manual_seed(0)
        backbone = config_of(out_features=["stage1", "stage2", "stage3", "stage4"], **overrides)
        return UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=backbone,
                hidden_size=16,
                pool_scales=[1, 2],
                num_labels=3,
                auxiliary_in_channels=24,
                auxiliary_channels=8,
            )
        )

    def scene(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of three colours, 24 x 32 pixels, and which is where."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 3, (4, 3, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
        images = nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
        return images + 0.1 * torch.randn(images.shape, generator=generator), labels

    def test_backbone_is_initialised_as_a_refiner(self):
        backbone = self.make().backbone
        assert type(backbone) is RefinerBackbone and backbone.channels == [24] * 4
        assert_initialised(backbone, set(backbone.state_dict()))

    def test_round_trip(self, tmp_path):
        model, (images, _) = self.make().eval(), self.scene()
        model.save_pretrained(tmp_path)
        loaded, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded.config.backbone_config) is RefinerConfig
        assert loaded.config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
        with torch.no_grad():
            outputs = loaded(images, output_hidden_states=True, output_attentions=True)
            assert outputs.logits.shape == (4, 3, 24, 32)
            assert torch.equal(loaded(images).logits, model(images).logits)
            assert_close(outputs.logits, model(images).logits, 1e-5)  # with maps, which are made in another way
        assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_learns(self, layout):
        model, (images, labels) = self.make(attention_types=LAYOUTS[layout]).train(), self.scene()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(images, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.75 * losses[0]

    def test_pretrained_backbone(self, tmp_path):
        """A classifier's encoder, in front of a head that is yet to learn."""
        make(RefinerForImageClassification).save_pretrained(tmp_path)
        model = self.make()
        model.backbone = RefinerBackbone.from_pretrained(tmp_path, config=model.config.backbone_config)
        assert model.eval()(self.scene()[0]).logits.shape == (4, 3, 24, 32)
        assert AutoBackbone.from_config(model.config.backbone_config).out_indices == [1, 2, 3, 4]


class TestPipelines:
    def picture(self, seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))

    def test_image_feature_extraction(self, tmp_path):
        model = make(RefinerModel)
        model.save_pretrained(tmp_path)
        processor = RefinerImageProcessor(size=dict(height=16, width=16), crop_size=dict(height=16, width=16))
        processor.save_pretrained(tmp_path)
        extract = pipeline("image-feature-extraction", model=str(tmp_path))
        pictures = [self.picture(0), self.picture(1)]
        with torch.no_grad():
            expected = model(**processor(pictures, return_tensors="pt"))
        for i, picture in enumerate(pictures):
            tokens = expected.last_hidden_state[i : i + 1]
            assert_close(extract(picture, return_tensors=True), tokens, 1e-5)
            assert_close(torch.tensor(extract(picture)), tokens, 1e-5)
            assert_close(extract(picture, pool=True, return_tensors=True), tokens[:, 0], 1e-5)
        for features, tokens in zip(extract(pictures, batch_size=2), expected.last_hidden_state, strict=True):
            assert_close(torch.tensor(features), tokens[None], 1e-5)
