"""`refiner`, which starts every command."""

import subprocess
import sys

import pytest

from refiner_hf import __version__
from refiner_hf.commands import COMMANDS, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert end.value.code == 0
    assert [[name, command.summary] for name, command in COMMANDS.items()] == [
        line for line in lines if line and line[0] in COMMANDS
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: refiner {name} ")
    assert f"\n    refiner {name}" in said and "default: " in said


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"refiner_hf {__version__}\n"


@pytest.mark.parametrize(
    "words, said", [(["trian"], "Did you mean 'train'?"), (["xyz"], "There are train, predict"), ([], "required")]
)
def test_no_such_command(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_names_may_have_underscores(capsys):
    with pytest.raises(SystemExit):
        main(["label_maps", "--help"])
    assert capsys.readouterr().out.startswith("usage: refiner label-maps ")


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_not_abbreviated(name, capsys):
    """An abbreviation would mean something else once there is another option that begins alike."""
    with pytest.raises(SystemExit):
        main([name, "--hel"])
    assert "usage" not in capsys.readouterr().out


def test_the_old_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/refiner-label-maps", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: refiner label-maps ")


def test_as_a_module():
    run = subprocess.run([sys.executable, "-m", "refiner_hf", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == f"refiner_hf {__version__}\n", run.stderr
