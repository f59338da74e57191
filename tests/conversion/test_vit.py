"""A ViT or DeiT refined: the same function at the start, and a Refiner that learns from there."""

import copy
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BatchFeature,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from refiner_hf import RefinerForImageClassification, refine_vit
from refiner_hf.commands.refine_vit import main
from refiner_hf.commands.train import main as train

from ..conftest import assert_close, load_json
from ..images import write_folder


SIZE = dict(
    image_size=[24, 40],
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    num_labels=3,
)
SOURCES = {
    "vit": (ViTForImageClassification, ViTConfig),
    "deit": (DeiTForImageClassification, DeiTConfig),
    "deit_with_teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig),
}
REFINEMENTS = ["expansion_convolution", "expansion", "convolution"]
every_source = pytest.mark.parametrize("kind", SOURCES)


def source_of(kind: str, **overrides):
    """A network whose maps are far from even, so that a refinement that does anything would show."""
    torch.manual_seed(0)
    cls, config = SOURCES[kind]
    model = cls(config(**{**SIZE, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pictures(batch: int = 6, seed: int = 1, size=(24, 40)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def counterparts(refined: RefinerForImageClassification, source) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each parameter of the source beside the refined model's of the same meaning."""
    own, pairs = dict(refined.named_parameters()), []
    for name, parameter in source.named_parameters():
        renamed = name.replace(f"{source.base_model_prefix}.", "refiner.").replace("cls_classifier", "classifier")
        pairs.append((name, own[renamed.replace("refiner.layernorm.", "refiner.norm.")], parameter))
    return pairs


@every_source
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_the_same_answers_states_and_maps(kind, refinement):
    source = source_of(kind, attn_implementation="eager")
    refined = refine_vit(source, pictures(), refinement=refinement)
    asked = dict(output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        expected, actual = source(pictures(seed=2), **asked), refined(pictures(seed=2), **asked)
    assert_close(actual.logits, expected.logits)
    for i, (ours, theirs) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_close(ours, theirs, what=f"hidden state {i}")
    for i, (ours, theirs) in enumerate(zip(actual.attentions, expected.attentions, strict=True)):
        assert_close(ours, theirs, what=f"map {i}")
    assert refined.config.attention_types == ["refined"] * 3 and refined.config.refinement == refinement


@every_source
def test_the_same_gradients(kind):
    """Of everything that the two have in common, with the statistics that evaluation takes."""
    source = source_of(kind)
    refined = refine_vit(source, pictures())
    labels = torch.arange(6) % 3
    for model in (source, refined):
        torch.nn.functional.cross_entropy(model(pictures(seed=2)).logits, labels).backward()
    for name, ours, theirs in counterparts(refined, source):
        largest = max(theirs.grad.abs().max().item(), 1e-3)
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_training_begins_near_the_source_and_teaches_the_refinement(refinement):
    source = source_of("vit")
    refined = refine_vit(source, pictures(32), refinement=refinement)
    before = {name: tensor.clone() for name, tensor in refined.state_dict().items()}
    refined.train()
    logits = refined(pictures(32, seed=2)).logits
    expected = source(pictures(32, seed=2)).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()

    optimizer = torch.optim.SGD(refined.parameters(), lr=0.01)
    for _ in range(3):  # the silent branch's own weights get gradients once its norm has begun to speak
        optimizer.zero_grad()
        refined(pictures(32), labels=torch.arange(32) % 3).loss.backward()
        optimizer.step()
    for name, parameter in refined.named_parameters():
        if not name.endswith("k_proj.bias"):  # the softmax takes no notice of it
            assert not torch.equal(parameter, before[name]), f"{name} doesn't learn"


def test_measured_on_the_pictures_that_were_given():
    """The statistics are those of the maps, so a batch like them is normalised to itself in training."""
    source, batches = source_of("vit", attn_implementation="eager"), [pictures(8, seed=1), pictures(8, seed=2)]
    refined = refine_vit(source, iter(batches))
    norm = refined.refiner.layers[1].attention.refinement.output_norm
    seen = [
        source.set_attn_implementation("eager") or source(b, output_attentions=True).attentions[1] for b in batches
    ]
    values = torch.cat(seen).transpose(0, 1).flatten(1)  # by head, of all pictures together
    assert_close(norm.running_mean, values.mean(1))
    assert_close(norm.running_var, values.var(1))


def test_pictures_as_the_image_processor_gives_them():
    source = source_of("vit")
    refined = refine_vit(source, BatchFeature({"pixel_values": pictures()}))
    assert_close(refined(pictures()).logits, source(pictures()).logits)


def test_without_pictures_the_answers_are_the_same_too():
    source = source_of("vit")
    with CaptureLogger(logging.get_logger("refiner_hf.conversion.vit")) as log:
        refined = refine_vit(source)
    assert "come from noise" in log.out
    assert_close(refined(pictures()).logits, source(pictures()).logits)


def test_the_source_stays_as_it_is():
    source = source_of("deit")
    before = copy.deepcopy(source.state_dict())
    refined = refine_vit(source, pictures())
    with torch.no_grad():
        for parameter in refined.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert not refined.training


@pytest.mark.parametrize(
    "overrides",
    [
        dict(qkv_bias=False),
        dict(hidden_act="relu", layer_norm_eps=1e-3),
        dict(num_channels=1),
        dict(image_size=16, patch_size=4),
        dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2),
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_configurations_of_the_source(overrides):
    source = source_of("vit", **overrides)
    images = pictures()[:, : overrides.get("num_channels", 3), : overrides.get("image_size", 24)]
    images = images[..., : overrides.get("image_size", 40)]
    refined = refine_vit(source, images)
    assert_close(refined(images).logits, source(images).logits)
    for name in overrides:
        assert getattr(refined.config, name) == overrides[name]


def test_some_layers_only():
    source = source_of("vit")
    refined = refine_vit(source, pictures(), attention_types=["plain", "plain", "refined"], expansion_ratio=6)
    assert_close(refined(pictures()).logits, source(pictures()).logits)
    refinements = {name.split(".")[2] for name, _ in refined.named_parameters() if ".refinement." in name}
    assert refinements == {"2"}
    plain = refine_vit(source, attention_types=["plain"] * 3)
    assert_close(plain(pictures()).logits, source(pictures()).logits)


def test_labels_and_kind_of_problem_come_along():
    names = {0: "cat", 1: "dog", 2: "owl"}
    source = source_of("vit", id2label=names, label2id={n: i for i, n in names.items()})
    source.config.problem_type = "multi_label_classification"
    refined = refine_vit(source, pictures())
    assert refined.config.label_names == ["cat", "dog", "owl"]
    assert refined.config.problem_type == "multi_label_classification"


@every_source
def test_from_a_folder_and_back_to_one(kind, tmp_path):
    source = source_of(kind)
    source.save_pretrained(tmp_path / "source")
    refined = refine_vit(str(tmp_path / "source"), pictures())
    refined.save_pretrained(tmp_path / "refined")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "refined")
    assert type(loaded) is RefinerForImageClassification
    assert_close(loaded(pictures()).logits, source(pictures()).logits)


def test_a_folder_in_half_precision_becomes_float32(tmp_path):
    source = source_of("vit").bfloat16()
    source.save_pretrained(tmp_path / "source")
    refined = refine_vit(str(tmp_path / "source"), pictures())
    assert refined.dtype == torch.float32
    assert_close(refined(pictures()).logits, source.float()(pictures()).logits)


def test_what_cannot_be_refined():
    with pytest.raises(ValueError, match="'dinov2' model"):
        refine_vit(Dinov2ForImageClassification(Dinov2Config(**{**SIZE, "image_size": 16})))
    with pytest.raises(ValueError, match="ViTModel has no classifier"):
        refine_vit(ViTModel(ViTConfig(**SIZE)))
    with pytest.raises(ValueError, match="no map of its own"):
        refine_vit(source_of("vit"), attention_types=["plain", "shared_refined", "refined"])
    with pytest.raises(ValueError, match="24x40"):
        refine_vit(source_of("vit"), pictures(size=(24, 24)))
    with pytest.raises(ValueError, match="no images"):
        refine_vit(source_of("vit"), [])
    with pytest.raises(ValueError, match="aren't finite"):
        refine_vit(source_of("vit"), torch.full((2, 3, 24, 40), torch.nan))
    with pytest.raises(ValueError, match=r"images must be tensors .* got \(3, 24, 40\)"):
        refine_vit(source_of("vit"), pictures()[0])
    with pytest.raises(ValueError, match="got a ndarray"):
        refine_vit(source_of("vit"), [pictures().numpy()])
    with pytest.raises(ValueError, match="A Linear can't be refined"):
        refine_vit(torch.nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(ValueError, match="offloaded"):
        refine_vit(ViTForImageClassification(ViTConfig(**SIZE)))
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        refine_vit("nowhere")


# ---- From folder to folder, and fine-tuned ----

PROCESSORS = {
    "vit": ViTImageProcessor(size={"height": 24, "width": 40}),
    "deit": DeiTImageProcessor(size={"height": 30, "width": 50}, crop_size={"height": 24, "width": 40}),
    "deit_with_teacher": DeiTImageProcessor(size={"height": 24, "width": 40}, do_center_crop=False),
}


@pytest.fixture
def saved(tmp_path):
    """A source in a folder, with its processor and the labels of `photos`."""

    def save(kind: str):
        names = {0: "blue", 1: "green", 2: "red"}
        source = source_of(kind, id2label=names, label2id={n: i for i, n in names.items()})
        source.save_pretrained(tmp_path / kind)
        PROCESSORS[kind].save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", per_label=8, side=32)


@every_source
def test_command_and_pipeline(saved, photos, tmp_path, kind, capsys):
    source, out = saved(kind), tmp_path / "out"
    main(["--model", str(source), "--images", str(photos), "--output_dir", str(out), "--refined_layers", "2", "3"])
    assert "2 of 3 layers refine their map" in capsys.readouterr().out
    assert load_json(out / "config.json")["attention_types"] == ["plain", "refined", "refined"]
    assert type(AutoImageProcessor.from_pretrained(out)) is type(PROCESSORS[kind])

    picture = str(photos / "red" / "0.png")
    expected, actual = (pipeline("image-classification", model=str(each))(picture) for each in (source, out))
    assert [each["label"] for each in actual] == [each["label"] for each in expected]
    assert [each["score"] for each in actual] == pytest.approx([each["score"] for each in expected], abs=1e-5)

    card = ModelCard.load(out / "README.md")
    assert f"made of `{kind}`" in card.text and "statistics come from pictures" in card.text
    assert card.data.base_model is None  # a folder of this machine is nobody's base


ANSWER = """
import sys
sys.modules["refiner_hf"] = None  # importing it fails: the folder's own code must do
from transformers import pipeline
answers = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)(sys.argv[2])
print("\\n".join(f"{each['label']} {each['score']:.6f}" for each in answers))
"""


@pytest.mark.parametrize("kind", [pytest.param("vit", marks=pytest.mark.slow), "deit"])
def test_with_code(saved, photos, tmp_path, kind):
    """The model's code is ours, the image processor stays the source's."""
    source, out = saved(kind), tmp_path / "out"
    main(["--model", str(source), "--images", str(photos), "--output_dir", str(out), "--with_code"])
    picture = str(photos / "red" / "0.png")
    run = subprocess.run(
        [sys.executable, "-P", "-c", ANSWER, str(out), picture], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    answers = [line.split() for line in run.stdout.splitlines()]
    expected = pipeline("image-classification", model=str(source))(picture)
    assert [label for label, _ in answers] == [each["label"] for each in expected]
    assert [float(score) for _, score in answers] == pytest.approx([each["score"] for each in expected], abs=1e-5)


def test_command_refuses_and_leaves_nothing(saved, photos, tmp_path):
    source, out = str(saved("vit")), tmp_path / "out"

    def fails(*words: str, says: str) -> None:
        with pytest.raises(SystemExit, match=says):
            main(["--output_dir", str(out), *words])
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    fails("--model", source, "--refined_layers", "2", "4", says="there is no layer 4")
    fails("--model", source, "--images", str(tmp_path / "nowhere"), says="no folder")
    fails("--model", source, "--refinement_kernel_size", "2", says="odd")
    fails("--model", str(tmp_path / "none"), says="none")
    ViTModel(ViTConfig(**SIZE)).save_pretrained(tmp_path / "headless")
    PROCESSORS["vit"].save_pretrained(tmp_path / "headless")
    fails("--model", str(tmp_path / "headless"), says="they lack classifier.bias")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(source)
    fails("--model", source, says="makes .3, 24, 24. .channels, height, width. of a picture")
    PROCESSORS["vit"].save_pretrained(source)
    weights = tmp_path / "vit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails("--model", source, says="model.safetensors are damaged")
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(SystemExit, match="isn't an empty folder"):
        main(["--model", source, "--output_dir", str(out)])


TRAINING = "--max_steps 2 --per_device_train_batch_size 4 --report_to none --use_cpu --disable_tqdm True".split()


@pytest.mark.parametrize(
    "kind, size, resized",
    [("vit", (48, 80), None), ("deit", (48, 40), (60, 50)), ("deit_with_teacher", (24, 40), None)],
)
def test_fine_tuned(saved, photos, tmp_path, kind, size, resized):
    """With the source's own image processor, at its own size and another."""
    out = tmp_path / "out"
    main(["--model", str(saved(kind)), "--images", str(photos), "--output_dir", str(out)])
    overrides = f'{{"image_size": [{size[0]}, {size[1]}]}}' if size != (24, 40) else "{}"
    words = ["--model_name_or_path", str(out), "--train_dir", str(photos), "--output_dir", str(tmp_path / "tuned")]
    train([*words, *TRAINING, "--config_overrides", overrides])
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert tuned.config.image_height_width == size
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tuned")
    assert type(processor) is type(PROCESSORS[kind])
    assert (processor.size["height"], processor.size["width"]) == (resized or size)
    answers = pipeline("image-classification", model=str(tmp_path / "tuned"))(str(photos / "red" / "0.png"))
    assert {each["label"] for each in answers} == {"blue", "green", "red"}


def test_a_share_to_crop_is_for_the_own_processor(saved, photos, tmp_path):
    main(["--model", str(saved("vit")), "--images", str(photos), "--output_dir", str(tmp_path / "out")])
    words = ["--model_name_or_path", str(tmp_path / "out"), "--train_dir", str(photos), "--crop_pct", "0.8"]
    with pytest.raises(SystemExit, match="ViTImageProcessor, which knows no --crop_pct"):
        train([*words, *TRAINING, "--output_dir", str(tmp_path / "tuned")])
