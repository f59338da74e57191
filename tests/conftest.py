import json
import os
import sys
import tempfile
import time
from pathlib import Path

from .hub.local_hub import LocalHub


# Tests run side by side: more threads than cores would spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# The client reads these when it is imported, so they come first. Whatever they were (a test process inherits those of
# the process that started it, whose server is another one), no test reaches the real Hub or the user's own files.
HUB = LocalHub()
HF_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = HF_HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"  # that storage has a protocol of its own, which the server does not speak
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # that service is none of the Hub's addresses
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub.utils._http import default_client_factory  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from refiner_hf import (  # noqa: E402
    RefinerConfig,
    RefinerForImageClassification,
    RefinerImageProcessor,
    native_library_refiner,
)
from refiner_hf.conversion.weights import read_config, rename_state_dict  # noqa: E402


torch.set_num_threads(1)
assert huggingface_hub.constants.ENDPOINT == HUB.url, "something imported the client before this file"

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
GOLDEN_MODELS = [
    "released",
    "released_no_dense_head",
    "refine_every_layer",
    "refine_every_layer_expand6_patch_embed",
    "plain_attention",
]


class Golden:
    """One file of numbers that the reference implementation produced."""

    def __init__(self, name: str):
        path = GOLDEN / f"{name}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.settings = file.metadata() or {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def model(self, **overrides) -> RefinerForImageClassification:
        """The golden network, converted, with fields of its configuration changed."""
        reference = self.under("state_dict.")
        config = read_config(reference, num_attention_heads=int(self.settings["heads"]))
        model = RefinerForImageClassification(RefinerConfig(**{**config.to_dict(), **overrides}))
        model.load_state_dict(rename_state_dict(reference))
        return model


@pytest.fixture(scope="session")
def golden():
    files = {}

    def load(name: str) -> Golden:
        if name not in files:
            files[name] = Golden(name)
        return files[name]

    return load


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Within `tolerance` of the expected tensor's largest value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * expected.double().abs().max().item() + 1e-12, f"{what}: off by {difference}"


TINY = dict(
    image_size=16,
    patch_size=4,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_labels=5,
    layerscale_value=0.5,
)


@pytest.fixture
def tiny_config():
    """A configuration small enough to train in a test; keyword arguments change fields."""
    return lambda **overrides: RefinerConfig(**{**TINY, **overrides})


@pytest.fixture
def tiny_model(tiny_config):
    """A network of that configuration, the same at each call."""

    def make(**overrides) -> RefinerForImageClassification:
        torch.manual_seed(0)
        return RefinerForImageClassification(tiny_config(**overrides))

    return make


LAYOUTS = {
    "released": ["plain", "shared_refined"] * 2,
    "refine_every_layer": ["refined"] * 4,
    "plain": ["plain"] * 4,
    "mixed": ["refined", "shared_refined", "shared_refined", "plain"],
}


def save_with_processor(model: PreTrainedModel, folder: Path) -> Path:
    """A model and an image processor of its size, in a folder."""
    model.save_pretrained(folder)
    height, width = model.config.image_height_width
    RefinerImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in order."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def load_json(path) -> dict:
    return json.loads(Path(path).read_text())


class Clock:
    """The `time` module for the client, which notes the pauses instead of making them."""

    def sleep(self, seconds: float) -> None:
        HUB.slept.append(seconds)

    def __getattr__(self, name: str):
        return getattr(time, name)


def client_that_stays_here():
    """A session of the client whose requests all come here.

    Some of its versions ask huggingface.co itself, whatever the endpoint: 1.33 does to have a card checked.
    """

    def come_here(request) -> None:
        if request.url.host not in ("127.0.0.1", "localhost"):
            request.url = request.url.copy_with(scheme="http", netloc=HUB.url.removeprefix("http://").encode())

    session = default_client_factory()
    session.event_hooks["request"].append(come_here)
    return session


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub on this machine; the client, here and in child processes, is online, logged out, its cache empty."""
    constants, home = huggingface_hub.constants, tmp_path / "hf_home"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
        for module in ("huggingface_hub.constants", "datasets.config"):
            if hasattr(sys.modules.get(module), name):
                monkeypatch.setattr(sys.modules[module], name, False)
    places = {
        **{"HF_HOME": "", "HF_HUB_CACHE": "hub", "HUGGINGFACE_HUB_CACHE": "hub", "HF_ASSETS_CACHE": "assets"},
        **{"HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens", "AGENT_HARNESSES_PATH": "agents.json"},
    }
    for name, place in places.items():
        monkeypatch.setattr(constants, name, str(home / place), raising=False)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", constants.HF_HUB_CACHE)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", Clock())
    huggingface_hub.set_client_factory(client_that_stays_here)
    yield HUB
    huggingface_hub.set_client_factory(default_client_factory)  # this closes the session, too
    HUB.reset()


@pytest.fixture(params=["torch's threads", "own threads"])
def four_threads(request, monkeypatch):
    """The C++ functions take four threads, of torch's OpenMP or their own."""
    if request.param == "own threads":
        monkeypatch.setattr(native_library_refiner, "_parallel", lambda: None)
    elif native_library_refiner._parallel() is None:
        pytest.skip("torch has another OpenMP")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
