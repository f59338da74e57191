"""Label maps of a folder of photos, made, taken up again, and trained with."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import default_data_collator

from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.label_maps import main
from refiner_hf.commands.train import main as train
from refiner_hf.data.arguments import AugmentationArguments, DataArguments
from refiner_hf.data.augmentation import Augment, NormalizeViews
from refiner_hf.data.label_maps import open_label_maps
from refiner_hf.data.seeded_sampling import SeededImages
from refiner_hf.data.sources import load_image_data
from refiner_hf.data.transforms import PrepareTraining
from refiner_hf.labelling import make
from refiner_hf.labelling.make import match_teacher
from refiner_hf.labelling.teachers import Teacher
from refiner_hf.training.targets import TrainingTargets

from ..conftest import save_with_processor
from ..images import write_folder
from ..training.test_run import QUICK


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", per_label=5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A classifier that tells red, green and blue: its tokens are its pixels' means, its scores what is strongest."""
    folder = tmp_path_factory.mktemp("teacher")
    names = dict(enumerate(["blue", "green", "red"]))
    config = RefinerConfig(
        image_size=16, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, use_conv_stem=False,
        attention_types=["plain"], id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    model = RefinerForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.refiner.norm.weight.fill_(1)
        projection = model.refiner.embeddings.patch_embeddings.projection.weight
        for channel in range(3):
            projection[channel, channel] = 1 / 16
            model.classifier.weight[2 - channel, channel] = 5
    return save_with_processor(model, folder)


def options(teacher, photos, out, *more):
    return [
        "--teacher", str(teacher), "--train_dir", str(photos), "--output_dir", str(out), "--num_workers", "0",
        "--batch_size", "4", "--shard_size", "6", "--device", "cpu", *more,
    ]  # fmt: skip


def test_made_and_found(teacher, photos, tmp_path, capsys):
    two = Image.new("RGB", (40, 40), (200, 50, 40))
    two.paste((40, 60, 200), (30, 0, 40, 40))
    two.save(photos / "red" / "two.png")
    main(options(teacher, photos, tmp_path / "maps", "--top_k", "2"))
    said = capsys.readouterr().out
    assert "Label maps of 16 images, 4 x 4 places" in said and "gives 100.0% of the images" in said
    assert len(list((tmp_path / "maps").glob("*.parquet"))) == 3 and not list((tmp_path / "maps").glob("*.unfinished"))
    maps = open_label_maps(str(tmp_path / "maps"), ["blue", "green", "red"])
    scores, classes = maps({"path": str(photos / "red" / "two.png"), "bytes": None})
    assert scores.dtype == np.float16 and classes.dtype == np.int16 and scores.shape == (2, 4, 4)
    assert (classes[0] == [2, 2, 2, 0]).all() and (scores[0] >= scores[1]).all()


def test_goes_on_where_it_broke_off(teacher, photos, tmp_path, monkeypatch, capsys):
    main(options(teacher, photos, tmp_path / "unbroken"))
    calls, write = [], make._write_shard

    def break_off(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(make, "_write_shard", break_off)
    with pytest.raises(SystemExit, match="130"):
        main(options(teacher, photos, tmp_path / "broken"))
    with pytest.raises(ValueError, match="aren't finished"):
        open_label_maps(str(tmp_path / "broken"), ["blue", "green", "red"])
    monkeypatch.setattr(make, "_write_shard", write)
    main(options(teacher, photos, tmp_path / "broken"))
    for file in (tmp_path / "unbroken").iterdir():
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(SystemExit, match="label maps, made under other conditions: top_k was"):
        main(options(teacher, photos, tmp_path / "broken", "--top_k", "1"))


def test_several_processes_divide_the_images(teacher, photos, tmp_path):
    """And continue what others have left."""
    main(options(teacher, photos, tmp_path / "alone"))
    main(options(teacher, photos, tmp_path / "together"))
    for name in ("label_maps-00000.parquet", "label_maps-00002.parquet"):
        (tmp_path / "together" / name).unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["refiner_hf", "label-maps", *options(teacher, photos, tmp_path / "together")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Label maps of 15 images") == 1
    assert {file.name for file in (tmp_path / "alone").iterdir()} == {
        file.name for file in (tmp_path / "together").iterdir()
    }
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "together" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bad_input(teacher, photos, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(SystemExit, match="isn't empty and holds no label maps"):
        main(options(teacher, photos, tmp_path / "notes"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="can't be written"):
        main(options(teacher, photos, tmp_path / "file" / "maps"))
    with pytest.raises(SystemExit, match="no folder .*no_model"):
        main(options(tmp_path / "no_model", photos, tmp_path / "maps"))
    other = write_folder(tmp_path / "other", 2, ("cat", "dog"))
    with pytest.raises(SystemExit, match="knows 3 labels, such as .* and the data has 2"):
        main(options(teacher, other, tmp_path / "maps"))


def test_whose_labels_are_whose(monkeypatch):
    said = []
    monkeypatch.setattr(make.logger, "warning", said.append)
    assert match_teacher(["a", "b"], 2, ["a", "b"]) is None
    assert match_teacher(["a", "b", "c"], 3, ["c", "a"]) == [2, 0]
    assert not said
    assert match_teacher(["n01", "n02"], 2, ["cat", "dog"]) is None and match_teacher(None, 2, ["cat", "dog"]) is None
    assert len(said) == 2 and "Check how often it agrees" in said[0]
    for names in (None, ["a", "b", "c"]):
        with pytest.raises(ValueError, match="The teacher knows 3 labels"):
            match_teacher(names, 3, ["cat", "dog"])


def test_trained_with(teacher, photos, tmp_path, monkeypatch):
    """Each image's own map, and what else makes its targets, as the options say."""
    main(options(teacher, photos, tmp_path / "maps"))
    make_targets, steps = TrainingTargets.__call__, []

    def keep(self, inputs, *args):
        targets = make_targets(self, inputs, *args)
        steps.append((self, inputs, targets["labels"]))
        return targets

    monkeypatch.setattr(TrainingTargets, "__call__", keep)
    train(
        ["defaults", "--train_dir", str(photos), *QUICK, "--output_dir", str(tmp_path / "out"), "--label_map_dir",
         str(tmp_path / "maps"), "--transposed_label_maps", "--mixup", "0.8", "--cutmix", "0.3",
         "--repeated_augmentation", "2", "--config_overrides",
         json.dumps({"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "token_mixing": True, "use_dense_head": True})]
    )  # fmt: skip
    assert len(steps) > 1
    for makes, inputs, targets in steps:
        assert (makes.mixup.mixup_alpha, makes.mixup.cutmix_alpha, makes.transposed_boxes) == (0.8, 0.3, True)
        assert targets.shape[1:] == (3, 2 + 16)
        best = inputs["label_map_classes"][:, 0].flatten(1)  # a photo's colour shows nearly everywhere
        assert torch.equal(best.mode(1).values.long(), inputs["labels"])
    _, inputs, _ = steps[0]
    for name in ("labels", "label_map_scores"):  # one image twice, and augmented anew
        assert torch.equal(inputs[name][::2], inputs[name][1::2])
    assert (inputs["pixel_values"][::2] != inputs["pixel_values"][1::2]).flatten(1).any(1).all()
    with pytest.raises(SystemExit, match="holds no label maps"):
        train(
            [
                "defaults",
                "--train_dir",
                str(photos),
                *QUICK,
                "--output_dir",
                str(tmp_path / "no"),
                "--label_map_dir",
                str(photos),
            ]
        )


def test_dense_targets_follow_crop_and_flip(teacher, tmp_path):
    """
    From the files on: what a patch is told to be is the colour that it shows, whatever was cut out and mirrored.
    """
    colours = [(40, 60, 200), (40, 190, 60), (200, 50, 40)]  # blue, green, red: the labels' order
    rng = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "photos" / ("blue", "green", "red")[label]
        folder.mkdir(parents=True)
        for i in range(2):
            regions = Image.fromarray(np.array(colours, np.uint8)[rng.integers(0, 3, (4, 4))])
            regions.resize((160, 160), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    main(options(teacher, tmp_path / "photos", tmp_path / "maps", "--top_k", "3"))
    maps = open_label_maps(str(tmp_path / "maps"), ["blue", "green", "red"])

    processor = RefinerImageProcessor(size={"height": 64, "width": 64})
    data = load_image_data(
        DataArguments(train_dir=str(tmp_path / "photos")), need_train=True, need_evaluation=False, seed=0
    ).train
    images = SeededImages(data, PrepareTraining(Augment(processor, AugmentationArguments()), label_maps=maps))
    rows = [images[row, seed] for row in range(6) for seed in range(10)]
    assert {row["flipped"] for row in rows} == {True, False}
    make = TrainingTargets(normalize=NormalizeViews(processor))
    batch = make(default_data_collator(rows), 3, (4, 4))

    patches = batch["pixel_values"].unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)  # (B, 3, 4, 4, 256)
    shown = (2 - patches.argmax(1)).flatten(1, 2)  # of each pixel, the label of its strongest channel
    of_one_colour = (shown == shown[..., :1]).all(-1)
    told = batch["labels"][:, :, 2:].argmax(1)
    assert of_one_colour.float().mean() > 0.15
    assert (told == shown[..., 0])[of_one_colour].float().mean() > 0.97, "but for where regions meet"
    make.transposed_boxes = True
    wrong = make(default_data_collator(rows), 3, (4, 4))["labels"][:, :, 2:].argmax(1)
    assert (wrong == shown[..., 0])[of_one_colour].float().mean() < 0.9, "the reference's order of a box"


def test_nothing_readable(teacher, tmp_path):
    """Before: KeyError 'agreeing', and a folder that said it was finished."""
    for label in ("blue", "green"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "0.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="none of them can be read"):
        main(options(teacher, tmp_path / "photos", tmp_path / "maps", "--unreadable_images", "skip"))
    assert not (tmp_path / "maps").exists()


def test_a_damaged_file_of_facts(teacher, photos, tmp_path):
    maps = tmp_path / "maps"
    main(options(teacher, photos, maps))
    for content in ("{", "[]"):
        (maps / "label_maps.json").write_text(content)
        with pytest.raises(SystemExit, match="label_maps.json is damaged"):
            main(options(teacher, photos, maps))


class Told(Teacher):
    """It scores what it is told, at each of two places, for the labels of its own order."""

    labels, num_labels, size = ["red", "violet", "blue", "green"], 4, (8, 8)

    def __init__(self, scores: list[list[float]]):
        super().__init__(torch.nn.Identity(), [0.0] * 3, [1.0] * 3)
        self.scores = torch.tensor(scores).T[None, :, None, :]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(pixel_values), -1, -1, -1)


def made_by(teacher: Teacher, photos, out):
    data = load_image_data(DataArguments(train_dir=str(photos)), need_train=True, need_evaluation=False, seed=0)
    return data, make.make_label_maps(data.train.data, data.labels, teacher, out, teacher_name="told", top_k=2)


def test_classes_are_numbered_as_the_datas(photos, tmp_path):
    """The teacher knows more labels, in another order."""
    data, _ = made_by(Told([[3.0, 9.0, 1.0, 2.0], [3.0, 9.0, 1.0, 4.0]]), photos, tmp_path / "maps")
    assert data.labels == ["blue", "green", "red"]
    scores, classes = open_label_maps(str(tmp_path / "maps"), data.labels)(data.train[0]["image"])
    assert classes.tolist() == [[[2, 1]], [[1, 2]]], "red, then green; at the second place the other way round"
    assert scores.tolist() == [[[3, 4]], [[2, 3]]]


def test_agreement_is_of_the_mean_probability(photos, tmp_path):
    next((photos / "green").iterdir()).unlink()
    # Mean of the scores: green. Of the probabilities: red is nearly sure at one place.
    _, facts = made_by(Told([[9.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 1.0]]), photos, tmp_path / "maps")
    assert facts["agreeing"] == 5, "the five red pictures"
