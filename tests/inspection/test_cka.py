"""Linear CKA from minibatches: its estimate of HSIC term by term, what must change it and what must not."""

import itertools

import numpy as np
import pytest
import torch

from refiner_hf.inspection.cka import SMALLEST, MinibatchCKA, gram_matrix, unbiased_hsic

from ..conftest import assert_close


def features(seed: int, images: int = 8, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, width, generator=generator, dtype=torch.float64)


def grams_of(*layers: torch.Tensor) -> torch.Tensor:
    return torch.stack([gram_matrix(layer) for layer in layers])


def cka(*minibatches: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """CKA and its error, each minibatch given as the layers' features."""
    adds_up = MinibatchCKA()
    for layers in minibatches:
        adds_up.add(grams_of(*layers))
    return adds_up.result()


class TestGramMatrix:
    def test_products_between_images(self):
        centred = torch.tensor([[1.0, 2], [-1, 0], [0, -2]])
        products = torch.tensor([[5, -1, -4], [-1, 1, 0], [-4, 0, 4]], dtype=torch.float64)
        assert_close(gram_matrix(centred), products)
        assert gram_matrix(centred).dtype == torch.float64

    def test_all_tokens_are_one_feature(self):
        tokens = features(0, 6, 12)
        assert_close(gram_matrix(tokens.view(6, 3, 4)), gram_matrix(tokens))

    def test_digits_are_not_lost_in_what_all_images_share(self):
        few = features(0)
        assert_close(unbiased_hsic(grams_of(few + 1000)), unbiased_hsic(grams_of(few)), 1e-3)

    def test_half_precision(self):
        few = features(0).bfloat16()
        assert_close(gram_matrix(few), gram_matrix(few.float()))


class TestUnbiasedHSIC:
    @pytest.mark.parametrize("images", [SMALLEST, 5, 6])
    def test_is_the_mean_over_all_quadruples_of_images(self, images):
        # Symmetric matrices, whatever is on their diagonals.
        grams = torch.stack([m + m.T for m in (features(seed, images, images) for seed in range(3))])
        expected = torch.zeros(3, 3, dtype=torch.float64)
        for (a, k), (b, l) in itertools.product(enumerate(grams), repeat=2):  # noqa: E741
            terms = [
                k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
                for i, j, q, r in itertools.permutations(range(images), 4)
            ]
            expected[a, b] = sum(terms) / len(terms)
        assert_close(unbiased_hsic(grams), expected, 1e-9)

    @pytest.mark.parametrize("images", range(1, SMALLEST))
    def test_too_few_images(self, images):
        with pytest.raises(ValueError, match=f"at least 4 images, got {images}"):
            unbiased_hsic(grams_of(features(0, images)))
        with pytest.raises(ValueError, match="at least 4"):
            cka((features(0, images),))


class TestWhatChangesIt:
    """A layer beside what becomes of it."""

    FEATURES = features(0), features(1)

    def change(self, how) -> torch.Tensor:
        (before, _), (after, _) = cka(self.FEATURES), cka(tuple(map(how, self.FEATURES)))
        return after - before

    def test_none_of_itself(self):
        values, _ = cka((features(0), features(0), features(1)))
        assert_close(values.diagonal(), torch.ones(3))
        assert values[0, 1].item() == pytest.approx(1)
        assert torch.equal(values, values.T) and abs(values[0, 2]) < 0.9

    @pytest.mark.parametrize(
        "how",
        [
            lambda layer: 30 * layer,
            lambda layer: 1e-3 * layer,
            lambda layer: -layer,
            lambda layer: layer + torch.linspace(-3, 5, 5),
            lambda layer: layer @ torch.linalg.qr(features(2, 5, 5)).Q,
            lambda layer: layer[:, [3, 0, 4, 1, 2]],
        ],
        ids=["larger", "smaller", "opposite", "shifted", "rotated", "features reordered"],
    )
    def test_not_a_similarity_of_features(self, how):
        values, _ = cka((self.FEATURES[0], how(self.FEATURES[0])))
        assert_close(values, torch.ones(2, 2), 1e-4)
        assert self.change(how).abs().max() < 1e-4

    def test_not_the_order_of_images_that_both_have(self):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        assert self.change(lambda layer: layer[order]).abs().max() < 1e-5

    def test_the_order_of_one_layers_images(self):
        assert cka((features(0), features(0).roll(1, 0)))[0][0, 1] < 0.5

    @pytest.mark.parametrize(
        "how",
        [
            lambda layer: layer * torch.tensor([10.0, 1, 1, 1, 0.1]),
            lambda layer: layer @ features(2, 5, 5),
        ],
        ids=["stretched", "any linear map"],
    )
    def test_a_general_linear_map(self, how):
        assert cka((self.FEATURES[0], how(self.FEATURES[0])))[0][0, 1] < 0.9
        assert self.change(how).abs().max() > 0.01


class TestMinibatches:
    def test_of_independent_features_it_is_0(self):
        """A biased estimate would be far above: features wider than a minibatch always fit each other somewhat."""
        minibatches = [(features(2 * i, 6, 20), features(2 * i + 1, 6, 20)) for i in range(400)]
        values, errors = cka(*minibatches)
        assert abs(values[0, 1]) < 0.03
        assert 0.003 < errors[0, 1] < 0.03

    def test_many_small_ones_find_what_one_large_one_does(self):
        shared, own, other = features(0, 2000, 4), features(1, 2000, 4), features(2, 2000, 4)
        layers = shared + own, shared + other
        whole, _ = cka(layers)
        pieces, errors = cka(*zip(*(layer.split(5) for layer in layers)))
        assert whole[0, 1].item() == pytest.approx(0.25, abs=0.05)  # half the variance of each is shared
        assert abs(pieces[0, 1] - whole[0, 1]) < 3 * errors[0, 1] < 0.1

    @pytest.mark.parametrize("count", [2, 3])
    def test_jackknife_by_hand(self, count):
        minibatches = [(features(3 * i), features(3 * i) + features(3 * i + 1)) for i in range(count)]
        hsics = [unbiased_hsic(grams_of(*layers)).numpy() for layers in minibatches]

        def ratio(some: list[np.ndarray]) -> float:
            mean = np.mean(some, axis=0)
            return mean[0, 1] / np.sqrt(mean[0, 0] * mean[1, 1])

        without = [ratio(hsics[:i] + hsics[i + 1 :]) for i in range(count)]
        variance = (count - 1) / count * sum((each - np.mean(without)) ** 2 for each in without)
        values, errors = cka(*minibatches)
        assert values[0, 1].item() == pytest.approx(ratio(hsics))
        assert errors[0, 1].item() == pytest.approx(variance**0.5) and errors[0, 1] > 1e-3
        assert_close(errors.diagonal(), torch.zeros(2), what="a layer's own")

    def test_one_has_no_error(self):
        values, errors = cka(TestWhatChangesIt.FEATURES)
        assert values.isfinite().all() and errors.isnan().all() and errors.shape == (2, 2)

    def test_result_at_any_time(self):
        minibatches = [(features(2 * i), features(2 * i + 1)) for i in range(3)]
        adds_up = MinibatchCKA()
        for i, layers in enumerate(minibatches):
            adds_up.add(grams_of(*layers))
            assert torch.equal(adds_up.result()[0], cka(*minibatches[: i + 1])[0])

    def test_layers_of_different_width(self):
        values, _ = cka((features(0, 8, 5), features(1, 8, 50), torch.cat((features(0, 8, 5),) * 2, dim=1)))
        assert values.shape == (3, 3) and values[0, 2].item() == pytest.approx(1)
