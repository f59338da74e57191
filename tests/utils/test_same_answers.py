import numpy as np
import pytest
import torch

from refiner_hf.utils.image_config import image_shape_of
from refiner_hf.utils.same_answers import check_same_answers, noise_of


def test_the_largest_difference_is_given():
    assert check_same_answers(torch.tensor([1.0, 2.0]), np.array([1.0, 2.25]), 0.2, "It") == 0.25


@pytest.mark.parametrize(
    "expected, actual",
    [
        ([0.1, 0.2], [0.1, 0.2 + 2e-3]),  # below 1 the tolerance is absolute
        ([0.0, 100.0], [0.0, 100.2]),  # above, a share of the largest
        ([1.0, 2.0], [1.0, float("nan")]),
        ([1.0, 2.0], [1.0, float("inf")]),
        ([1.0, 2.0], [[1.0], [2.0]]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_what_is_not_the_same(expected, actual):
    with pytest.raises(RuntimeError, match="^The graph "):
        check_same_answers(np.array(expected), np.array(actual), 1e-3, "The graph")
    near = np.array(expected) + 0.9e-3
    assert check_same_answers(np.array(expected), near, 1e-3, "The graph") < 1e-3


def test_noise_is_the_same_each_time(tiny_config):
    config = tiny_config(image_size=[16, 24], num_channels=1)
    assert noise_of(image_shape_of(config), 3).shape == (3, 1, 16, 24)
    torch.randn(5)
    assert torch.equal(noise_of(image_shape_of(config), 3), noise_of(image_shape_of(config), 3))
