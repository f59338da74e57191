"""Checkpoints that were cut, changed or tampered with: seen before anything is loaded, and never started over."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file

from refiner_hf.commands.train import main
from refiner_hf.training import output_folder
from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.checkpoints import DamagedCheckpointError, check_checkpoint
from refiner_hf.training.output_folder import prepare_output_folder
from refiner_hf.training.trainer import RefinerTrainer

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


def command(photos, out, *more):
    return [
        "defaults",
        "--train_dir", str(photos), "--output_dir", str(out), *QUICK, "--num_train_epochs", "3", "--save_strategy",
        "epoch", "--do_train", "--ema_decay", "0.5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(command(photos, folder))
    return folder


@pytest.fixture
def broken(unbroken, tmp_path):
    """The same run before its end: checkpoints of the steps 3, 6 and 9, and nothing finished."""
    folder = shutil.copytree(unbroken, tmp_path / "run")
    for name in ("train_results.json", "README.md", "model.safetensors"):
        (folder / name).unlink()
    return folder


def choose(folder, **fields):
    """The checkpoint that a run in the folder would go on from."""
    args = RefinerTrainingArguments(
        str(folder), **{"do_train": True, "use_cpu": True, "report_to": "none", "ema_decay": 0.5} | fields
    )
    with ExitStack() as held:
        return prepare_output_folder(args, load_json(folder / "training_arguments.json"), held)


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def tensors(change):
    def damage(file):
        content = load_file(file)
        change(content)
        save_file(content, file, {"format": "pt"})

    return damage


def saved(change):
    def damage(file):
        content = torch.load(file, weights_only=False)
        torch.save(change(content), file)

    return damage


def state(**changes):
    def damage(file):
        content = load_json(file) | changes
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return damage


class Code:
    """A pickle of this runs a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch tampered",)


DAMAGES = {
    "trainer_state.json": [
        (cut, "can't be read"),
        (lambda file: file.write_text("[1, 2]"), "can't be read"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "can't be read"),
        (state(global_step="9"), "says that global_step is '9'"),
        (state(global_step=8), "is of step 8"),
        (state(log_history=None, epoch=None), "says that epoch is 'None'"),
        (state(log_history=[1]), "log of another shape"),
        (state(train_batch_size=None), "train_batch_size"),
        (state(stateful_callbacks={}), "control"),
        (state(surprise=1), "surprise"),
    ],
    "model.safetensors": [
        (cut, "can't be read"),
        (os.unlink, "is missing"),
        (lambda file: file.write_bytes(b""), "can't be read"),
        (tensors(lambda t: t.pop("classifier.weight")), "lacks 1 tensor, such as classifier.weight"),
        (tensors(lambda t: t["classifier.weight"][0].fill_(float("nan"))), "NaN in classifier.weight"),
        (tensors(lambda t: t.update({"classifier.weight": torch.zeros(7, 24)})), r"in the shape \(7, 24\)"),
    ],
    "config.json": [(cut, "isn't JSON"), (lambda f: f.write_text("[]"), "another shape"), (os.unlink, "is missing")],
    "optimizer.pt": [
        (cut, "can't be read"),
        (flip, "was changed or damaged in its part"),
        (os.unlink, "is missing"),
        (saved(lambda content: [content]), "holds a list in place of a dict"),
        (saved(lambda content: {"state": {}}), "can't be read"),
        (saved(lambda content: content | {"param_groups": [{"lr": 1}]}), "another shape"),
        (saved(lambda content: content["state"][0]["exp_avg"].fill_(float("inf")) is None or content), "infinite"),
        (saved(lambda content: content | {"more": Code()}), "holds code, .*: posix.system"),
        (lambda file: file.write_bytes(pickle.dumps(Code())), "can't be read"),
    ],
    "scheduler.pt": [
        (cut, "can't be read"),
        (os.unlink, "is missing"),
        (saved(lambda content: {}), "can't be read"),
        (saved(lambda content: content | {"last_epoch": Code()}), "holds code"),
    ],
    "rng_state.pth": [
        (cut, "can't be read"),
        (os.unlink, "is missing"),
        (saved(lambda content: content | {"cpu": torch.zeros(3, dtype=torch.uint8)}), "can't be read"),
        (saved(lambda content: content | {"python": (3, (1, 2), None)}), "can't be read"),
        (saved(lambda content: {}), "can't be read"),
        (saved(lambda content: content | {"numpy": Code()}), "holds code"),
    ],
    "ema/model.safetensors": [
        (cut, "can't be read"),
        (os.unlink, "is missing"),
        (tensors(lambda t: t.pop("classifier.bias")), "lacks 1 tensor"),
    ],
}  # fmt: skip
CASES = [(name, i) for name, damages in DAMAGES.items() for i in range(len(damages))]


def test_the_newest_whole_one(broken):
    assert choose(broken) == str(broken / "checkpoint-9")
    newer = shutil.copytree(broken / "checkpoint-9", broken / "checkpoint-12")
    state(global_step=12)(newer / "trainer_state.json")
    assert choose(broken) == str(newer)


def test_nothing_to_resume_from(broken):
    for checkpoint in broken.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert choose(broken) is None
    with pytest.raises(ValueError, match="no checkpoint in .*run to resume from"):
        choose(broken, resume_from_checkpoint="True")


@pytest.mark.parametrize("name, number", CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_a_damaged_one_is_left_aside(broken, monkeypatch, name, number):
    monkeypatch.chdir(broken)
    damage, reason = DAMAGES[name][number]
    damage(broken / "checkpoint-9" / name)
    said = []
    monkeypatch.setattr(output_folder.logger, "warning", said.append)
    assert choose(broken) == str(broken / "checkpoint-6")
    assert said[0].startswith(f"{broken / 'checkpoint-9'} is damaged: {name}") and "It is not used" in said[0]
    with pytest.raises(ValueError, match=f"(?s)checkpoint-9 can't be used: {name}.*{reason}.*Name another"):
        choose(broken, resume_from_checkpoint=str(broken / "checkpoint-9"))
    assert not (broken / "tampered").exists(), "code of a pickle was run"


def test_none_is_left(broken):
    for checkpoint in broken.glob("checkpoint-*"):
        cut(checkpoint / "optimizer.pt")
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    for named in (None, "True"):
        with pytest.raises(ValueError, match="No checkpoint in .* can be used .*checkpoint-9: optimizer.pt.*delete"):
            choose(broken, resume_from_checkpoint=named)
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


def test_the_only_one_broke_off_while_it_was_saved(broken, monkeypatch):
    """Nothing is lost by beginning again."""
    said = []
    monkeypatch.setattr(output_folder.logger, "warning", said.append)
    for step in (3, 6):
        shutil.rmtree(broken / f"checkpoint-{step}")
    (broken / "checkpoint-9" / "trainer_state.json").unlink()
    assert choose(broken) is None
    assert "checkpoint-9 is incomplete" in said[0]


def test_what_is_not_needed_may_be_missing(broken):
    shutil.rmtree(broken / "checkpoint-9" / "ema")  # the average begins with the checkpoint's weights, and it is said
    assert choose(broken) == str(broken / "checkpoint-9")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (broken / "checkpoint-9" / name).unlink()
    assert choose(broken, save_only_model=True) == str(broken / "checkpoint-9")
    cut(broken / "checkpoint-6" / "ema" / "model.safetensors")
    assert choose(broken) == str(broken / "checkpoint-3")
    assert choose(broken, ema_decay=0.0) == str(broken / "checkpoint-6")


def test_the_best_so_far_must_be_whole_too(broken):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    for step, of in ((9, 3), (6, 6)):
        state(best_model_checkpoint=str(broken / f"checkpoint-{of}"))(
            broken / f"checkpoint-{step}" / "trainer_state.json"
        )
    assert choose(broken, **best) == str(broken / "checkpoint-9")
    cut(broken / "checkpoint-3" / "model.safetensors")
    assert choose(broken, **best) == str(broken / "checkpoint-6")
    assert choose(broken) == str(broken / "checkpoint-9")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"workers": 1}', '{"processes": 1, "workers": 1, "next": 5, "cursors": {}}',
                '{"processes": 1, "workers": 1, "next": 0, "cursors": {"0": {"epoch": "1"}}}'],
)  # fmt: skip
def test_places_in_a_stream(broken, content):
    args = RefinerTrainingArguments(str(broken), use_cpu=True, report_to="none")
    with pytest.raises(DamagedCheckpointError, match="stream_position_0.json is missing"):
        check_checkpoint(broken / "checkpoint-9", args, streamed=True)
    file = broken / "checkpoint-9" / "stream_position_0.json"
    cursor = {"epoch": 0, "block": 0, "place": 3, "rows": None}
    file.write_text(json.dumps({"processes": 1, "workers": 1, "next": 0, "cursors": {"0": cursor}}))
    check_checkpoint(broken / "checkpoint-9", args, streamed=True)
    file.write_text(content)
    with pytest.raises(DamagedCheckpointError, match="stream_position_0.json"):
        check_checkpoint(broken / "checkpoint-9", args, streamed=True)


@pytest.mark.parametrize("found", ["checkpoint-3", ValueError("No checkpoint")])
def test_other_processes_do_what_the_first_found(broken, monkeypatch, found):
    monkeypatch.setattr(output_folder, "broadcast_object_list", lambda objects: objects.__setitem__(0, found))
    monkeypatch.setattr(RefinerTrainingArguments, "process_index", 1)
    if isinstance(found, str):
        assert choose(broken) == found
    else:
        with pytest.raises(ValueError, match="No checkpoint"):
            choose(broken)


def test_the_run_goes_on_from_the_one_before(photos, unbroken, broken):
    flip(broken / "checkpoint-9" / "optimizer.pt")
    main(command(photos, broken))
    for name in ("model.safetensors", "ema/model.safetensors"):
        one, two = load_file(unbroken / name), load_file(broken / name)
        assert all(torch.equal(one[key], two[key]) for key in one), name
    with zipfile.ZipFile(broken / "checkpoint-9" / "optimizer.pt") as archive:
        assert archive.testzip() is None, "it was made again"


def test_one_that_is_written_again_is_not_whole_before_its_end(photos, broken, monkeypatch):
    flip(broken / "checkpoint-9" / "optimizer.pt")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(RefinerTrainer, "_save_rng_state", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main(command(photos, broken))
    assert not (broken / "checkpoint-9" / "trainer_state.json").exists()
    assert choose(broken) == str(broken / "checkpoint-6")


@pytest.mark.parametrize("named", [(), pytest.param(("named",), marks=pytest.mark.slow)], ids=["found", "named"])
def test_whole_runs_say_it_in_words(photos, broken, named):
    for step in (3, 6, 9):
        cut(broken / f"checkpoint-{step}" / "model.safetensors")
    named = ["--resume_from_checkpoint", str(broken / "checkpoint-6")] if named else []
    code = "from refiner_hf.commands.train import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, *command(photos, broken, *named)], capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "Error: " in run.stderr and "model.safetensors can't be read" in run.stderr


def test_a_checkpoint_of_another_network_or_optimizer(photos, broken, tmp_path):
    named = ["--resume_from_checkpoint", str(broken / "checkpoint-6")]
    wide = json.dumps(dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    for more in (["--config_overrides", wide], ["--layer_decay", "0.5"]):
        with pytest.raises(SystemExit, match="checkpoint-6 doesn't fit this training: "):
            main(command(photos, tmp_path / "out", *named, *more))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 1}'])
def test_a_damaged_file_of_options(broken, content):
    arguments = load_json(broken / "training_arguments.json")
    (broken / "training_arguments.json").write_text(content)
    args = RefinerTrainingArguments(str(broken), do_train=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="training_arguments.json is damaged.*--resume_from_checkpoint"):
        prepare_output_folder(args, arguments, ExitStack())
