"""Two processes never write to one place."""

import os
import signal
import subprocess
import sys

import pytest

from refiner_hf.utils.locking import LOCK, locked_folder


HOLD = """
import sys, time
from refiner_hf.utils.locking import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes to `tmp_path / "out"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_until_the_first_has_ended(holder, tmp_path):
    with (
        pytest.raises(BlockingIOError, match="Another process writes to the folder .*out"),
        locked_folder(tmp_path / "out"),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)  # nothing of its own runs any more
    holder.wait()
    with locked_folder(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out" / LOCK).exists()


def test_an_error_ends_it(tmp_path):
    with pytest.raises(PermissionError, match="mine"), locked_folder(tmp_path):
        raise PermissionError("mine")
    with locked_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="can't be written.*Give another"), locked_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.slow
def test_of_many_at_once_one_at_a_time(tmp_path):
    """Lock files go and come again all the time; never do two processes hold one."""
    count = """
import sys, time
from pathlib import Path
from refiner_hf.utils.locking import locked
number, end = Path(sys.argv[2]), time.monotonic() + 3
while time.monotonic() < end:
    try:
        with locked(sys.argv[1], "it"):
            before = int(number.read_text())
            time.sleep(0.001)
            number.write_text(str(before + 1))
            print("x", end="")
    except BlockingIOError:
        pass
"""
    number = tmp_path / "number"
    number.write_text("0")
    arguments = [sys.executable, "-c", count, str(tmp_path / "lock"), str(number)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counted = sum(len(process.communicate()[0]) for process in processes)
    assert counted > 10 and int(number.read_text()) == counted
