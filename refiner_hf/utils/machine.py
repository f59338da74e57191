"""What numbers are measured on: the device, the versions, and the commit of this package."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


PACKAGE = Path(__file__).parents[1]


def describe_machine(device: str) -> dict[str, str | None]:
    """Device, versions, and the commit of this package where it is a checkout."""
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def device_name(device: str | None = None) -> str:
    """What this process computes on: `device` ("cpu" or "cuda"), by default CUDA where there is some."""
    if device != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()  # processors of one name may have others
    return f"CPU ({_cpu_name()}, {instructions}, {threads} thread{'s' * (threads > 1)})"


def computes_bfloat16(device: str | torch.device) -> bool:
    """Whether a device multiplies in bfloat16, and doesn't only pretend to. Of CPUs this is known under Linux."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), "")
    return kind == "cpu" and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def versions() -> str:
    """The versions of Python and of what computes."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    return f"Python {platform.python_version()}, {packages}"


def commit() -> str | None:
    """The last commit that changed this package, and whether files of it were changed since; outside git `None`."""
    # Only about the package's own files: an installed package may be within another repository.
    last = _git("log", "-1", "--format=%h", "--", ".")
    if not last:
        return None
    return f"{last}, modified" if _git("status", "--porcelain", "--", ".") else last


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    named = (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
