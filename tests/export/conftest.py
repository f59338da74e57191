"""A network and its exported graph."""

import pytest

from refiner_hf import RefinerForImageClassification
from refiner_hf.export.graph import export_onnx

from ..every_class import make


@pytest.fixture(scope="module")
def network():
    return make(RefinerForImageClassification)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(network, file)
    return file
