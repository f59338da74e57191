"""Killed, full disks, losses that are none: the same command goes on, and nothing is written over."""

import json
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from refiner_hf.commands.train import main
from refiner_hf.training.trainer import RefinerTrainer

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


# Everything that draws random numbers or keeps a state, with checkpoints in the middle of epochs of five steps.
EVERYTHING = [
    *QUICK, "--num_train_epochs", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1",
    "--train_val_split", "0.34", "--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "steps",
    "--eval_steps", "3", "--ema_decay", "0.9", "--mixup", "0.8", "--cutmix", "1.0", "--auto_augment",
    "rand-m9-mstd0.5-inc1", "--random_erasing", "0.5", "--label_smoothing_factor", "0.1", "--cooldown_steps", "0.2",
    "--layer_decay", "0.8", "--timm_optim", "nmuon", "--rotation", "10",
    "--repeated_augmentation", "2", "--gradient_accumulation_steps", "1",
    "--config_overrides", json.dumps(dict(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, drop_path_rate=0.2,
        token_mixing=True, cosine_regularizer_weight=0.1,
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos", per_label=10)


def command(photos, out, *more):
    return ["defaults", "--train_dir", str(photos), "--output_dir", str(out), *EVERYTHING, *more]


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    start(photos, folder).check_returncode()
    return folder


def start(photos, out, *more, before="", **options):
    """refiner train in a process of its own, after some lines of Python."""
    code = textwrap.dedent(before) + "\nfrom refiner_hf.commands.train import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *command(photos, out, *more)], capture_output=True, text=True, check=False,
        **options,
    )  # fmt: skip


# Kills its own process, as kill -9 does, when a step begins or in the middle of writing a checkpoint.
KILL_IN_A_STEP = """
    import os, signal
    from refiner_hf.training.trainer import RefinerTrainer
    step = RefinerTrainer.training_step
    def kill(self, *args, **kwargs):
        if self.state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)
    RefinerTrainer.training_step = kill
"""
KILL_IN_A_SAVE = """
    import os, signal
    from refiner_hf.training.trainer import RefinerTrainer
    save = RefinerTrainer.{method}
    def kill(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    RefinerTrainer.{method} = kill
"""


def assert_same_run(broken, unbroken):
    """The curves and everything that was saved, to the last bit."""
    curves = []
    for folder in (unbroken, broken):
        history = load_json(folder / "trainer_state.json")["log_history"]
        timed = ("runtime", "per_second", "train_", "total_flos")
        curves.append([{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in history])
    assert [entry for entry in curves[1] if entry.keys() - {"step", "epoch"}] == [
        entry for entry in curves[0] if entry.keys() - {"step", "epoch"}
    ]
    for file in ("model.safetensors", "ema/model.safetensors"):
        one, two = load_file(unbroken / file), load_file(broken / file)
        assert all(torch.equal(one[name], two[name]) for name in one), file


@pytest.mark.parametrize(
    "before, kept",
    [
        (KILL_IN_A_STEP.format(step=7), "checkpoint-6"),
        pytest.param(KILL_IN_A_SAVE.format(method="_save"), "checkpoint-6", marks=pytest.mark.slow),
        pytest.param(KILL_IN_A_SAVE.format(method="_save_rng_state"), "checkpoint-6", marks=pytest.mark.slow),
    ],
    ids=["step", "save of the weights", "save of the states"],
)
def test_killed_and_taken_up_again(photos, unbroken, tmp_path, before, kept):
    out = tmp_path / "broken"
    assert start(photos, out, before=before).returncode == -signal.SIGKILL
    again = start(photos, out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"Continuing from {out / kept}" in again.stderr + again.stdout
    assert_same_run(out, unbroken)


@pytest.mark.slow
def test_killed_with_workers(photos, unbroken, tmp_path):
    """Worker processes load the same images with the same augmentation, before and after."""
    out = tmp_path / "broken"
    workers = ("--dataloader_num_workers", "2")
    assert start(photos, out, *workers, before=KILL_IN_A_STEP.format(step=7)).returncode == -signal.SIGKILL
    start(photos, out, *workers).check_returncode()
    assert_same_run(out, unbroken)


def test_a_full_disk(photos, unbroken, tmp_path):
    """A limit on the size of a file stands for it: the weights fit, the optimizer's state doesn't."""
    out = tmp_path / "broken"
    limit = (unbroken / "model.safetensors").stat().st_size + 20_000
    full = start(photos, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 1
    assert "Error: The checkpoint" in full.stderr and "can't be written" in full.stderr and "Make room" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(out.glob("checkpoint-*")), "no half of one is left"
    start(photos, out).check_returncode()
    assert_same_run(out, unbroken)


def test_a_loss_that_is_none(photos, tmp_path, monkeypatch):
    compute_loss = RefinerTrainer.compute_loss

    def spoiled(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step == 7 else loss

    monkeypatch.setattr(RefinerTrainer, "compute_loss", spoiled)
    more = ("--logging_steps", "5", "--logging_nan_inf_filter", "True")
    with pytest.raises(SystemExit, match="became infinite or NaN between the steps 6 and 9. Nothing was saved"):
        main(command(photos, tmp_path / "out", *more))
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6"]
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "out" / saved[1] / "model.safetensors").values()
    )
    monkeypatch.setattr(RefinerTrainer, "compute_loss", compute_loss)
    main(command(photos, tmp_path / "out", *more))


def test_a_folder_that_became_read_only(photos, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):  # what may be written depends on who runs the tests
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(RefinerTrainer, "_save_optimizer_and_scheduler", refuse)
    with pytest.raises(SystemExit, match="checkpoint-3 can't be written: .*Permission denied.*Make room on the disk"):
        main(command(photos, tmp_path / "out"))
