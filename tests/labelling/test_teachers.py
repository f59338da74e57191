"""Any classifier says what it sees where."""

import math

import pytest
import timm
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from refiner_hf.labelling.teachers import TimmTeacher, TransformersTeacher, load_teacher

from ..conftest import save_with_processor


TOKENS = dict(
    image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
CONVOLUTIONS = dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
CLASSIFIERS = {
    "vit": (ViTForImageClassification, ViTConfig(**TOKENS, **NAMES), (4, 4)),
    "deit": (DeiTForImageClassification, DeiTConfig(**TOKENS, **NAMES), (4, 4)),
    "beit": (BeitForImageClassification, BeitConfig(**TOKENS, **NAMES), (4, 4)),
    "beit, first token": (BeitForImageClassification, BeitConfig(**TOKENS, **NAMES, use_mean_pooling=False), (4, 4)),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**TOKENS, **NAMES), (4, 4)),
    "swin": (
        SwinForImageClassification,
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **NAMES),
        (8, 8),
    ),
    "resnet": (ResNetForImageClassification, ResNetConfig(**CONVOLUTIONS, layer_type="basic", **NAMES), None),
    "regnet": (RegNetForImageClassification, RegNetConfig(**CONVOLUTIONS, groups_width=4, **NAMES), None),
    "convnext": (
        ConvNextForImageClassification,
        ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, **NAMES),
        None,
    ),
}


# What heads that don't take the class token as it is make of one place (images, places, width).
ONE_PLACE = {
    "beit": lambda model, places: model.classifier(model.beit.pooler.layernorm(places)),
    "dinov2": lambda model, places: model.classifier(torch.cat((places, places), -1)),
}


def randomized(model):
    """Biases and norms too, so that forgetting one shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_transformers(name, tmp_path):
    make, config, grid = CLASSIFIERS[name]
    randomized(make(config)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), None if grid else 32)
    assert isinstance(teacher, TransformersTeacher)
    assert teacher.labels == ["a", "b", "c"] and teacher.size == (32, 32) and list(teacher.mean) == [0.4] * 3
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        scores = teacher(pixels)
        again = teacher(pixels[1:])
        found = teacher.model.base_model(pixels).last_hidden_state
        if grid is not None:  # tokens
            places = found[:, found.shape[1] - math.prod(grid) :]
            expected = ONE_PLACE.get(name, lambda model, places: model.classifier(places))(teacher.model, places)
            assert torch.allclose(scores.flatten(2).transpose(1, 2), expected, rtol=1e-3, atol=1e-3)
    assert scores.shape == (2, 3, *(grid or found.shape[2:]))
    assert torch.allclose(again[0], scores[1], atol=1e-4)
    assert "forward" not in vars(teacher.model.base_model), "the model is left as it was"


def test_what_it_says_of_a_place_is_what_it_says_of_an_image_that_is_all_like_it(tmp_path):
    """For a head that takes the mean over places, the mean of the places' scores is the image's."""
    make, config, _ = CLASSIFIERS["resnet"]
    randomized(make(config)).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), 32)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(teacher(pixels).mean((2, 3)), teacher.model(pixels).logits, rtol=1e-3, atol=1e-3)


def test_a_refiner(tiny_model, tmp_path):
    model = randomized(tiny_model(use_dense_head=True))
    teacher = load_teacher(str(save_with_processor(model, tmp_path)))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        patches = teacher.model.refiner(pixels).last_hidden_state[:, 1:]
        expected = teacher.model.classifier(patches) + 0.5 * teacher.model.dense_classifier(patches)
        assert torch.allclose(teacher(pixels).flatten(2).transpose(1, 2), expected, rtol=1e-3, atol=1e-3)


def test_a_classifier_of_an_unknown_kind(tmp_path, monkeypatch):
    make, config, _ = CLASSIFIERS["vit"]
    make(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    monkeypatch.setattr(teacher.model.classifier, "forward", lambda found: torch.rand(len(found), 3))
    with pytest.raises(ValueError, match="in a way that isn't known here. Take another teacher"):
        teacher(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "name, options, grid",
    [
        ("resnet10t", {}, (1, 1)),
        ("test_convnext", {}, None),
        ("test_vit", {"img_size": 32}, (2, 2)),  # class token
        ("test_vit2", {"img_size": 32}, (2, 2)),  # mean over patches
        ("test_nfnet", {}, None),
        ("test_efficientnet", {}, None),
    ],
)
def test_timm(name, options, grid, tmp_path, monkeypatch):
    model = timm.create_model(name, num_classes=3, **options).eval()
    monkeypatch.setattr("timm.create_model", lambda *_, **__: model)
    teacher = TimmTeacher(name, None)
    teacher.size = (32, 32)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        scores = teacher(pixels)
        whole = model(pixels)
    assert scores.shape[:2] == (2, 3) and (grid is None or scores.shape[2:] == grid)
    if scores.shape[2:] == (1, 1):
        assert torch.allclose(scores[:, :, 0, 0], whole, rtol=1e-3, atol=1e-4), "one place is the whole image"


def test_a_folder_that_timm_saved(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    timm.models.save_for_hf(model, tmp_path, model_args={"img_size": 32, "num_classes": 3})
    teacher = load_teacher(str(tmp_path), 32)
    assert isinstance(teacher, TimmTeacher) and teacher.size == (32, 32)
    with torch.no_grad():
        assert teacher(torch.randn(1, 3, 32, 32)).shape == (1, 3, 2, 2)


def test_images_are_squeezed_whole(tmp_path, tiny_model):
    teacher = load_teacher(str(save_with_processor(tiny_model(), tmp_path)))
    image = Image.new("RGB", (64, 20), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 20))
    pixels = teacher.prepare(image)
    assert pixels.shape == (3, 16, 16)
    assert (pixels[:, :, 2] == torch.tensor([1.0, -1.0, -1.0])[:, None]).all()
    assert (pixels[:, :, -3] == torch.tensor([-1.0, -1.0, 1.0])[:, None]).all()
