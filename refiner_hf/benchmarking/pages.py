"""What a page says of the run of a script that made it."""

import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from ..utils.machine import commit, device_name


def facts_of_run() -> dict[str, str]:
    """The script's command line, the CPU, the versions of torch and OpenVINO, this package's commit, and the day."""
    return {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": device_name("cpu"),
        "versions": f"torch {version('torch')}, OpenVINO {version('openvino')}",
        "commit": str(commit()),
        "date": date.today().isoformat(),
    }
