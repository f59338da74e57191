"""Checks that a model on the Hub gives the same output as the local folder."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ..utils import same_answers
from ..utils.same_answers import check_same_answers
from .code import PACKAGE
from .publish import Published, auto_class_for
from .repository import PublishError, hub


TOLERANCE = 1e-5


def verify(published: Published, *, token: str | None = None) -> float:
    """
    Loads a published model from the Hub in a fresh process with an empty cache, by its commit, and compares what it
    answers with what the local folder's model answered: one fixed picture, through the image processor and the
    network. A model that carries its code is loaded with that code alone; the process can't import this package.

    Args:
        published: as [`publish_folder`] gave it.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        `float`: the largest difference of a number in the model's output.

    Raises:
        [`PublishError`]: it can't be loaded (the message ends as the process did), or it answers differently.
    """
    question = {
        "model": published.repo_id,
        "revision": published.commit,
        "auto_class": auto_class_for(published.model_class),
        "shape": published.shape,
        "remote_code": published.remote_code,
        "processed": published.processed,
        "base_model": published.base_model,
    }
    what = f"{published.repo_id} at {published.commit}, compared with the folder,"
    try:
        return check_same_answers(published.fingerprint, _ask(question, token), TOLERANCE, what)
    except RuntimeError as error:
        raise PublishError(str(error)) from error


def _ask(question: dict, token: str | None) -> np.ndarray:
    """The answers of the model on the Hub, from a process of its own."""
    # -P keeps the modules beside that file, such as `errors`, out of the process.
    program = [sys.executable, "-P", same_answers.__file__, json.dumps(question)]
    with tempfile.TemporaryDirectory() as cache:
        answer = Path(cache) / "answer.npy"
        environment = os.environ | {
            "HF_HOME": cache,
            "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_MODULES_CACHE": str(Path(cache) / "modules"),
            "HF_TOKEN": str(hub(token).token or ""),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        }
        process = subprocess.run([*program, str(answer)], env=environment, capture_output=True, text=True)
        if process.returncode:
            last = "\n".join(process.stderr.strip().splitlines()[-5:])
            raise PublishError(f"{question['model']} was published, but can't be loaded from the Hub:\n{last}")
        return np.load(answer)
