"""What a command says before its work comes at once: nothing is imported for it that takes seconds."""

import json
import subprocess
import sys

import pytest

from refiner_hf.commands import COMMANDS
from refiner_hf.commands.library_options import library_options


# Runs commands one after the other, and says after each which of the packages are imported.
RUN = """
import contextlib, io, json, sys
from refiner_hf.commands import main
slow = sys.argv[2:]
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    code = None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    print(json.dumps({"code": code, "said": said.getvalue(), "slow": [name for name in slow if name in sys.modules]}))
"""
SLOW = ["torch", "torchvision", "torchao", "datasets", "timm", "matplotlib", "sklearn", "scipy", "pandas", "peft",
        "accelerate", "gradio", "transformers.modeling_utils", "transformers.training_args"]  # fmt: skip


def run(*commands: list[str]) -> list[dict]:
    call = [sys.executable, "-c", RUN, json.dumps(commands), *SLOW]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help():
    commands = [[], *([name] for name in COMMANDS)]
    for words, result in zip(commands, run(*([*words, "--help"] for words in commands)), strict=True):
        assert result["code"] == 0 and "usage: refiner" in result["said"], words
        assert result["slow"] == [], words


def test_a_wrong_option():
    needed = {
        "predict": ["--model", "m", "--images", "i", "--output_file", "o"],
        "demo": ["--model", "m"],
        "convert": ["--checkpoint", "c", "--output_dir", "o"],
        "refine": ["--model", "m", "--data", "d", "--output_dir", "o"],
        "export": ["--model", "m", "--output_dir", "o"],
        "visualize": ["--model", "m", "--image", "i"],
        "analyze": ["--model", "m"],
        "push": ["--folder", "f", "--repo_id", "r"],
        "label-maps": ["--teacher", "t", "--output_dir", "o"],
    }
    commands = [[name, *needed.get(name, []), "--wrogn_option", "1"] for name in COMMANDS]
    for words, result in zip(commands, run(*commands), strict=True):
        assert result["code"] == 2 and "there is no option --wrogn_option" in result["said"], words
        assert result["slow"] == [], words


def test_the_option_that_was_meant():
    near, of_transformers = run(
        ["predict", "--model", "m", "--images", "i", "--output_flie", "o"], ["train", "--num-train-epcohs=3"]
    )
    assert "--output_file" in near["said"]
    assert "Did you mean --num_train_epochs?" in of_transformers["said"] and of_transformers["slow"] == []


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    nothing, full, new = str(tmp_path / "nothing"), str(tmp_path / "full"), str(tmp_path / "new")
    commands = [
        ["predict", "--model", "m", "--images", nothing, "--output_file", new],
        ["convert", "--checkpoint", nothing, "--output_dir", new],
        ["convert", "--checkpoint", f"{full}/file", "--output_dir", full],
        ["refine", "--model", "m", "--data", "d", "--output_dir", full],
        ["export", "--model", "m", "--output_dir", full],
        ["visualize", "--model", "m", "--image", nothing],
        ["push", "--folder", nothing, "--repo_id", "r"],
        ["train", "--train_dir", nothing, "--output_dir", new],
        ["train", "fine_tune", "--model_name_or_path", "m", "--validation_dir", nothing],
    ]
    for words, result in zip(commands, run(*commands), strict=True):
        assert nothing in result["code"] or full in result["code"], words
        assert result["code"].startswith("Error: ") and result["slow"] == [], words


def test_importing_the_package():
    call = (
        f"import refiner_hf, sys; print([name for name in {SLOW + ['transformers', 'numpy']} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", call], capture_output=True, text=True).stdout == "[]\n"


def test_help_all_has_what_help_names(capsys):
    """Read from the source, the names are those of the class."""
    import dataclasses

    from transformers import TrainingArguments

    from refiner_hf.commands import main

    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert names == set(library_options())
    with pytest.raises(SystemExit):
        main(["train", "--help_all"])
    said = capsys.readouterr().out
    assert all(f"--{name} " in said for name in names)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in said for name in names) and "--norm_statistics_images" in said
