"""The same command in several processes, over gloo."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file

from ..conftest import assert_close, load_json
from ..images import write_folder
from .test_nothing_lost import KILL_IN_A_STEP
from .test_run import QUICK


# Nothing that each process draws for itself; and plain gradient descent, since Adam makes whole steps of what is
# rounding in gradients that should be zero.
OPTIONS = [
    *QUICK, "--optim", "sgd", "--learning_rate", "0.1",
    "--num_train_epochs", "2", "--logging_steps", "1", "--ema_decay", "0.8",
    "--norm_statistics_images", "0", "--auto_augment", "rand-m9-mstd0.5-inc1", "--label_smoothing_factor", "0.1",
    "--eval_strategy", "epoch", "--save_strategy", "epoch", "--per_device_eval_batch_size", "4",
    "--config_overrides", json.dumps(dict(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, use_dense_head=True,
        drop_path_rate=0.0,
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "others", per_label=4, labels=("blue", "red"), side=20)
    return write_folder(folder / "photos")


def data(photos):
    """24 training images, three steps of eight; 8 to evaluate on."""
    return ["defaults", "--train_dir", str(photos), "--validation_dir", str(photos.parent / "others")]


def launch(processes, *words, launcher=("-m", "torch.distributed.run", "--standalone"), script="scripts/train.py"):
    """The training script as a user launches it on several GPUs, here on CPUs."""
    return subprocess.run(
        [sys.executable, *launcher, f"--nproc_per_node={processes}", script, *words],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """One process with eight images in a step, two with four each."""
    folders = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("runs") / f"processes_{processes}"
        words = [*data(photos), "--output_dir", str(folder), *OPTIONS, "--per_device_train_batch_size"]
        run = launch(processes, *words, str(8 // processes))
        assert run.returncode == 0, run.stderr[-3000:]
        folders.append(folder)
    return folders


def test_auto_times_and_chooses_for_all_processes(photos, tmp_path):
    words = [*data(photos)[1:], "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]
    run = launch(2, "auto", *words, "--time_budget", "6s", "--disable_tqdm", "true")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Chosen (an option") == 1
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    state = load_json(tmp_path / "out" / "trainer_state.json")
    assert state["epoch"] == recipe["num_train_epochs"] and state["global_step"] >= 1


def test_two_processes_train_as_one_with_the_joined_batch(runs):
    """
    Losses, weights, running statistics, the average of them all, and what is measured, in float32 through six steps:
    test_synchronized_norms.py has the same of single steps in float64.
    """
    one, two = (load_json(folder / "trainer_state.json")["log_history"] for folder in runs)
    for name in ("loss", "grad_norm", "eval_loss", "eval_ema_loss", "eval_accuracy", "eval_ema_accuracy"):
        values = [[entry[name] for entry in history if name in entry] for history in (one, two)]
        tolerance = 2e-2 if name == "grad_norm" else 1e-3
        assert values[0] and values[1] == pytest.approx(values[0], rel=tolerance), name
    for file in ("model.safetensors", "ema/model.safetensors"):
        one, two = (load_file(folder / file) for folder in runs)
        assert any("running_var" in name for name in one)
        for name, value in one.items():
            if name.endswith(("k_proj.bias", "reduction_norm.bias")):
                continue  # their gradients are zero but for rounding: softmax, and another norm, follow
            assert_close(two[name], value, 0.06, name)


@pytest.mark.slow
def test_each_processes_norms_alone_are_not_enough(photos, runs, tmp_path):
    """With --synchronize_norms False they normalise with the statistics of half of the images each."""
    words = [*data(photos), "--output_dir", str(tmp_path), *OPTIONS, "--per_device_train_batch_size", "4"]
    run = launch(2, *words, "--synchronize_norms", "False")
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (
        [entry["loss"] for entry in load_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]
        for folder in (runs[0], tmp_path)
    )
    assert two[:3] != pytest.approx(one[:3], rel=1e-3)


def test_the_card_and_the_folder_are_written_once(runs):
    assert "2 processes, each on" in (runs[1] / "README.md").read_text()
    assert (runs[1] / "ema" / "config.json").exists()


@pytest.mark.slow
def test_accelerate_launch(photos, tmp_path):
    """Its launcher starts several processes on GPUs (or with MPI) only; here one."""
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no")
    words = [*data(photos), "--output_dir", str(tmp_path), *OPTIONS, "--num_train_epochs", "1"]
    run = subprocess.run(
        [sys.executable, *launcher, "scripts/train.py", *words, "--per_device_train_batch_size", "4"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "README.md").exists()


@pytest.fixture(scope="module")
def parquet(photos, tmp_path_factory):
    """The photos in four files, as a data set that can be streamed."""
    folder = tmp_path_factory.mktemp("stream")
    images = load_dataset("imagefolder", data_dir=str(photos), split="train").shuffle(seed=0)
    for i in range(4):
        images.shard(4, i).to_parquet(str(folder / f"train-{i}.parquet"))
    images.select(range(6)).to_parquet(str(folder / "test-0.parquet"))
    return folder


STREAM = [
    "--streaming", "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "no",
    "--per_device_train_batch_size", "4", "--norm_statistics_images", "8",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, workers",
    [(1, "0"), (2, "0"), (2, "2")],
)
def test_a_stream_goes_on_where_it_was(parquet, tmp_path, processes, workers):
    words = ["defaults", "--dataset_name", str(parquet), *OPTIONS, *STREAM, "--dataloader_num_workers", workers]
    whole = launch(processes, *words, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    script = tmp_path / "killed.py"
    script.write_text(
        "\n".join(line[4:] for line in KILL_IN_A_STEP.format(step=4).splitlines())
        + "\nfrom refiner_hf.commands.train import main\nmain()\n"
    )
    assert launch(processes, *words, "--output_dir", str(tmp_path / "broken"), script=str(script)).returncode != 0
    assert (tmp_path / "broken" / "checkpoint-3" / f"stream_position_{processes - 1}.json").exists()
    again = launch(processes, *words, "--output_dir", str(tmp_path / "broken"))
    assert again.returncode == 0, again.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_all_processes_leave_a_damaged_checkpoint_aside(photos, runs, tmp_path):
    """Also where it is another process's file that was cut."""
    broken = shutil.copytree(runs[1], tmp_path / "broken")
    (broken / "train_results.json").unlink()
    file = broken / "checkpoint-6" / "rng_state_1.pth"
    file.write_bytes(file.read_bytes()[:100])
    words = [*data(photos), "--output_dir", str(broken), *OPTIONS, "--per_device_train_batch_size", "4"]
    again = launch(2, *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "checkpoint-6 is damaged: rng_state_1.pth can't be read" in again.stderr
    one, two = (load_file(folder / "model.safetensors") for folder in (runs[1], broken))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("checkpoint-3", "checkpoint-6"):
        (broken / name / "scheduler.pt").write_bytes(b"")
    (broken / "train_results.json").unlink()
    again = launch(2, *words)
    assert (
        again.returncode != 0
        and again.stderr.count("Error: No checkpoint in") == 2
        and "ValueError" not in again.stderr
    )
