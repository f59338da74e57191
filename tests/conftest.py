import json
import os
from pathlib import Path


# Tests run side by side: more threads than cores would spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from refiner_hf import RefinerConfig, RefinerForImageClassification  # noqa: E402
from refiner_hf.conversion.weights import read_config, rename_state_dict  # noqa: E402


torch.set_num_threads(1)

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
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= tolerance * expected.float().abs().max().item() + 1e-12, f"{what}: off by {difference}"


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


def load_json(path) -> dict:
    return json.loads(Path(path).read_text())
