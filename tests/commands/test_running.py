"""How commands end."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from refiner_hf.commands.running import command, if_interrupted


def ends(error: BaseException):
    @command()
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main([])
    return end.value.code


def test_errors_in_words(capsys):
    assert ends(ValueError("Too large.")) == "Error: Too large."
    assert ends(OSError(28, "No space left on device")) == (
        "Error: [Errno 28] No space left on device. Make room on the disk, and give the same command again."
    )
    assert "Make room" in ends(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert "Make room" in ends(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert ends(OSError(13, "Permission denied", "x")) == "Error: [Errno 13] Permission denied: 'x'"
    assert ends(MemoryError()) == "Error: MemoryError"
    assert ends(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "\nInterrupted.\n"
    assert ends(KeyboardInterrupt("Half is kept.")) == 130
    assert capsys.readouterr().err == "\nInterrupted. Half is kept.\n"


def test_what_is_kept_after_an_interruption(capsys):
    def interrupted():
        with if_interrupted(lambda: "2 rows are kept."):
            raise KeyboardInterrupt

    @command()
    def main():
        interrupted()

    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 130 and capsys.readouterr().err == "\nInterrupted. 2 rows are kept.\n"


def test_a_fault_of_ours_shows_where_it_is():
    @command()
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        main([])


@pytest.mark.parametrize("usual", [True, False])
def test_signals_are_handled_while_it_runs_unless_somebody_else_does(usual):
    def own(number, frame):
        raise AssertionError

    given = {signal.SIGTERM: signal.SIG_DFL if usual else own, signal.SIGINT: signal.default_int_handler}
    before, within = {number: signal.signal(number, handler) for number, handler in given.items()}, {}

    @command()
    def main(argv=None):
        within.update({number: signal.getsignal(number) for number in given})

    try:
        main([])
        assert {number: signal.getsignal(number) for number in given} == given
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (within != given) == usual


PROGRAM = """
import os, sys, time
from pathlib import Path
from refiner_hf.commands.running import command
from refiner_hf.utils.new_folder import new_folder

@command()
def main():
    with new_folder(Path(sys.argv[1])) as unfinished:
        (unfinished / "half").write_text("half")
        ready, says_so = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(says_so, b"x")  # a signal that comes earlier is lost
            time.sleep(60)  # as a process that reads images would
        os.read(ready, 1)
        print(child, flush=True)
        time.sleep(60)

main([])
"""


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals_leave_nothing_half_written(number, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    child = int(process.stdout.readline())
    assert len(list(tmp_path.iterdir())) == 2  # the unfinished folder and its lock
    process.send_signal(number)
    os.kill(child, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    for _ in range(100):  # the child is gone, too, and quietly
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


IGNORED = {
    # As a data loader starts its workers: the signal comes while the process is forked.
    "a process is started": """
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), int(sys.argv[1])))
start = lambda: multiprocessing.get_context("fork").Process(target=print).start()
""",
    "a destructor": """
class Thing:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.01)
start = Thing
""",
}
WHERE_IGNORED = """
import multiprocessing, os, sys, time
from refiner_hf.commands.running import command
%s
@command()
def main():
    start()
    time.sleep(60)

main([])
"""


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("where", IGNORED)
def test_signals_where_python_ignores_what_is_raised(where, number, code):
    """There a Ctrl-C was printed and forgotten, and the command went on to its end."""
    run = subprocess.run(
        [sys.executable, "-c", WHERE_IGNORED % IGNORED[where], str(int(number))],
        capture_output=True,
        text=True,
        timeout=50,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.returncode == code and "Exception ignored" not in run.stderr, run.stderr
