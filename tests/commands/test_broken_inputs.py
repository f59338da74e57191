"""Every command beside every kind of broken model folder: it says what is wrong, in words, and writes nothing."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refiner_hf import RefinerConfig, RefinerForImageClassification
from refiner_hf.commands import COMMANDS, main
from refiner_hf.utils.locking import locked

from ..conftest import save_with_processor
from ..images import write_folder


LABELS = {0: "blue", 1: "green", 2: "red"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    torch.manual_seed(0)
    config = RefinerConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, id2label=LABELS
    )
    return save_with_processor(RefinerForImageClassification(config), tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), per_label=6)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """A page that was opened would stay open."""
    pytest.importorskip("gradio")
    monkeypatch.setattr("refiner_hf.demo.app.launch", lambda *args: None)


# By name, a command line around a model's folder, the photos and a place to write to.
LINES = {
    "analyze": "analyze --model {model} --data {photos} --max_examples 4 --output_dir {out}",
    "visualize": "visualize --model {model} --image {photos}/red/0.png --output_dir {out}",
    "demo": "demo --model {model}",
    "predict": "predict --model {model} --images {photos} --num_workers 0 --output_file {out}/answers.csv",
    "export": "export --model {model} --output_dir {out}",
    "push": "push --folder {model} --repo_id alice/model",
    "label_maps": "label-maps --teacher {model} --train_dir {photos} --num_workers 0 --output_dir {out}",
    "refine": "refine --model {model} --data {photos} --output_dir {out}",
    "fine_tune": "train --model_name_or_path {model} --train_dir {photos} --max_steps 1 --use_cpu --report_to none "
    "--output_dir {out}",
    "evaluate": "train --model_name_or_path {model} --validation_dir {photos} --do_eval --report_to none --use_cpu "
    "--output_dir {out}",
}
# They take no folder of a model.
WITHOUT_A_MODEL = {"convert", "benchmark"}


def test_every_command_is_here():
    assert {line.split()[0] for line in LINES.values()} | WITHOUT_A_MODEL == set(COMMANDS)


def run(line: str, **places: Path) -> None:
    main([word.format(**places) for word in line.split()])


def changed(file: str, **fields):
    """A change to a JSON file's fields."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | fields))

    return change


def config(**fields):
    return changed("config.json", **fields)


def processor(**fields):
    return changed("preprocessor_config.json", **fields)


def written(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


def weights(change):
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


class Opens:
    """What a pickle can do: it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Opens(folder / "executed")}))


NAN = torch.tensor(float("nan"))
DEFECTS = {
    "no folder": shutil.rmtree,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "an empty configuration": written("config.json", b""),
    "a cut configuration": written("config.json", b'{"model_type": '),
    "a list as configuration": written("config.json", b"[]"),
    "an unknown model": config(model_type="something"),
    "-1 layers": config(num_hidden_layers=-1),
    "0 heads": config(num_attention_heads=0),
    "patches of 0": config(patch_size=0),
    "a width in words": config(hidden_size="sixteen"),
    "a width that doesn't divide": config(hidden_size=17),
    "a width of 97": config(hidden_size=97),
    "an unknown activation": config(hidden_act="something"),
    "more layers than weights": config(num_hidden_layers=10**6, attention_types=None),
    "more labels than weights": config(id2label={str(i): str(i) for i in range(10**5)}, label2id={}),
    "labels in a list": config(id2label=["blue", "green", "red"]),
    "another number of labels": config(id2label={"0": "blue", "1": "red"}, label2id={"blue": 0, "red": 1}),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": written("model.safetensors", b""),
    "cut weights": cut,
    "weights that aren't any": written("model.safetensors", b"x" * 1000),
    "every second tensor": weights(lambda tensors: dict(list(tensors.items())[::2])),
    "one tensor too many": weights(lambda tensors: tensors | {"refiner.layers.2.mlp.fc1.bias": torch.zeros(2)}),
    "a tensor of another shape": weights(lambda tensors: tensors | {"refiner.norm.weight": torch.ones(3)}),
    "NaN": weights(lambda tensors: tensors | {"refiner.norm.weight": tensors["refiner.norm.weight"] * NAN}),
    "a pickle": pickled,
    "a list as processor": written("preprocessor_config.json", b"[]"),
    "a cut processor": written("preprocessor_config.json", b'{"size": '),
    "an unknown processor": processor(image_processor_type="Something"),
    "an unknown resampling": processor(resample=99),
    "a processor of another size": processor(size={"height": 32, "width": 32}),
    "a processor without a size": processor(size={"shortest_edge": 16}),
    "a processor that divides by 0": processor(image_std=[0, 0, 0]),
}


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_in_words(command, defect, sound, photos, tmp_path):
    model, out = shutil.copytree(sound, tmp_path / "model"), tmp_path / "out"
    DEFECTS[defect](model)
    with pytest.raises(SystemExit) as stopped:
        run(LINES[command], model=model, photos=photos, out=out)
    said = stopped.value.code
    assert isinstance(said, str) and said.startswith("Error: ") and len(said) > 30, said
    assert not (model / "executed").exists()
    if out.exists():
        assert not [file.name for file in out.rglob("*") if file.is_file()]


@pytest.mark.parametrize("command", [name for name in LINES if name not in ("push", "refine")])
def test_sound(command, sound, photos, tmp_path):
    """The commands above do run."""
    run(LINES[command], model=sound, photos=photos, out=tmp_path / "out")


# Where a command's lock lies.
LOCKS = {
    "analyze": "out/.lock",
    "visualize": "out/.lock",
    "label_maps": "out/.lock",
    "fine_tune": "out/.lock",
    "evaluate": "out/.lock",
    "export": ".out.lock",
    "predict": "out/.answers.csv.lock",
}


@pytest.mark.parametrize("command", LOCKS)
def test_another_process_writes_there(command, sound, photos, tmp_path):
    (tmp_path / LOCKS[command]).parent.mkdir(exist_ok=True)
    with locked(tmp_path / LOCKS[command], "it"), pytest.raises(SystemExit, match="Another process writes to .*out"):
        run(LINES[command], model=sound, photos=photos, out=tmp_path / "out")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
