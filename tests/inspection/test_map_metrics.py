"""Numbers of maps and tokens: by hand, by plain loops, and what must not change them."""

import itertools
import math

import pytest
import torch
from torch import nn

from refiner_hf.inspection.map_metrics import (
    attention_distance,
    effective_rank,
    head_similarity,
    layer_similarity,
    map_entropy,
    token_similarity,
)

from ..conftest import assert_close


GRID = (2, 3)
TOKENS = 1 + math.prod(GRID)  # with a class token

# Each as a function of one layer's map; where layers are compared, the other one's map is its transpose.
METRICS = {
    "head similarity": head_similarity,
    "head correlation": lambda maps: head_similarity(maps, centred=True),
    "entropy": map_entropy,
    "effective rank": effective_rank,
    "distance": lambda maps: attention_distance(maps, GRID),
    "layer similarity": lambda maps: layer_similarity([maps, maps.mT])[0],
    "layer correlation": lambda maps: layer_similarity([maps, maps.mT])[1],
}


def refined_like_maps(seed: int = 0, images: int = 2, heads: int = 4) -> torch.Tensor:
    """Maps of both signs whose rows don't add up to 1, as refined ones are."""
    generator = torch.Generator().manual_seed(seed)
    return 0.05 + torch.randn(images, heads, TOKENS, TOKENS, generator=generator)


def one_head(*rows: list[float]) -> torch.Tensor:
    """A map of one image and head."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def cosine(a: torch.Tensor, b: torch.Tensor, centred: bool) -> float:
    a, b = a.double(), b.double()
    if centred:
        a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


class TestHeadSimilarity:
    @pytest.mark.parametrize(
        "rows, expected",
        [
            ([[1, 2, 0], [1, 2, 0]], 1),
            ([[1, 2, 0], [3, 6, 0]], 1),
            ([[1, 0, 0], [0, 2, 0]], 0),
            ([[1, 2, 0], [-1, -2, 0]], -1),
            ([[3, 4, 0], [4, 3, 0]], 24 / 25),
            ([[1, 0, 0], [1, 0, 0], [0, 1, 0]], 1 / 3),
            ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]], -1 / 6),
        ],
    )
    def test_by_hand(self, rows, expected):
        maps = torch.tensor(rows, dtype=torch.float32)[None, :, None].repeat(1, 1, 3, 1)  # the same for all queries
        assert head_similarity(maps).tolist() == pytest.approx([expected], abs=1e-6)

    def test_correlation_by_hand(self):
        maps = torch.tensor([[1.0, 2, 3], [1, 3, 2]])[None, :, None].repeat(1, 1, 3, 1)
        assert head_similarity(maps, centred=True).item() == pytest.approx(0.5)

    @pytest.mark.parametrize("centred", [False, True])
    def test_equals_loops_over_pairs_and_queries(self, centred):
        maps = refined_like_maps()
        for image, similarity in zip(maps, head_similarity(maps, centred)):
            cosines = [
                cosine(one[query], other[query], centred)
                for one, other in itertools.combinations(image, 2)
                for query in range(TOKENS)
            ]
            assert similarity.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)

    def test_only_the_correlation_ignores_what_is_added_to_a_row(self):
        maps = refined_like_maps()
        raised = maps + torch.linspace(-2, 2, 4 * TOKENS).view(4, TOKENS, 1)
        assert_close(head_similarity(raised, centred=True), head_similarity(maps, centred=True), 1e-5)
        assert (head_similarity(raised) - head_similarity(maps)).abs().min() > 0.01

    @pytest.mark.parametrize("centred", [False, True])
    def test_one_head(self, centred):
        assert head_similarity(refined_like_maps(heads=1), centred).isnan().tolist() == [True, True]

    @pytest.mark.parametrize("tokens", [7, 197, 577])
    def test_even_rows_have_no_direction_to_correlate(self, tokens):
        # Their mean may be a rounding error off: what then remains without it is no direction.
        maps = torch.full((1, 3, tokens, tokens), 1 / tokens)
        assert head_similarity(maps, centred=True).item() == pytest.approx(0, abs=1e-3)


class TestEntropy:
    @pytest.mark.parametrize(
        "row, expected",
        [
            ([1, 1, 1, 1], 1),
            ([0.25, 0.25, 0.25, 0.25], 1),
            ([0, 1, 0, 0], 0),
            ([0.5, 0, 0.5, 0], 0.5),
            ([3, 0, -3, 0], 0.5),
            ([-1, 1, -1, 1], 1),
            ([6, 2, 0, 0], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)),
        ],
    )
    def test_by_hand(self, row, expected):
        assert map_entropy(one_head(row, row, row, row)).tolist() == pytest.approx([expected], abs=1e-6)

    def test_is_the_mean_over_heads_and_queries(self):
        even, single = one_head(*[[1, 1]] * 2), one_head([1, 0], [0, 1])
        assert map_entropy(torch.cat((even, single), dim=1)).item() == pytest.approx(0.5)
        assert map_entropy(one_head([1, 1], [0, 1])).item() == pytest.approx(0.5)


class TestEffectiveRank:
    @pytest.mark.parametrize("size", [2, 5, 9])
    def test_from_one_to_all(self, size):
        row = torch.linspace(1, 2, size)
        assert effective_rank(torch.eye(size)[None, None]).item() == pytest.approx(size, rel=1e-5)
        assert effective_rank(torch.outer(row, row.flip(0))[None, None]).item() == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("rotation", [0.0, 0.7])
    def test_by_hand(self, rotation):
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        turn = torch.tensor([[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]])
        for diagonal in ([3.0, 1.0], [1.0, -3.0]):
            attention_map = turn @ torch.diag(torch.tensor(diagonal))
            assert effective_rank(attention_map[None, None]).item() == pytest.approx(math.exp(entropy), rel=1e-5)

    def test_is_the_mean_over_heads(self):
        maps = torch.stack((torch.eye(4), torch.ones(4, 4)))[None]
        assert effective_rank(maps).item() == pytest.approx(2.5, rel=1e-5)

    def test_centred(self):
        """The direction of an even look is gone: a map whose rows differ in one direction has rank 1 then."""
        size = 6
        even = torch.full((size, size), 1 / size)
        assert effective_rank(even[None, None], centred=True).item() == pytest.approx(1)
        differs = torch.outer(torch.linspace(-1, 1, size), torch.tensor([1.0, -1, 0, 0, 0, 0])) / 20
        maps = (even + differs)[None, None]
        assert effective_rank(maps).item() > 1.1
        assert effective_rank(maps, centred=True).item() == pytest.approx(1, rel=1e-4)
        shifted = maps - torch.linspace(0, 1, size)[:, None]  # as a batch norm does to all of them alike
        assert effective_rank(shifted, centred=True).item() == pytest.approx(1, rel=1e-4)

    def test_rounding_is_no_direction(self):
        smooth = torch.softmax(torch.zeros(1, 1, 577, 577), dim=-1)
        assert effective_rank(smooth, centred=True).item() == pytest.approx(1)


class TestDistance:
    @pytest.mark.parametrize("grid", [(1, 2), (3, 1), (2, 3), (4, 4)])
    def test_patches_that_look_at_themselves(self, grid):
        assert attention_distance(torch.eye(math.prod(grid))[None, None], grid).item() == 0

    @pytest.mark.parametrize(
        "grid, expected",
        [((1, 2), 0.5), ((2, 1), 0.5), ((1, 3), 8 / 9), ((2, 2), (0 + 1 + 1 + math.sqrt(2)) / 4)],
    )
    def test_patches_that_look_everywhere(self, grid, expected):
        patches = math.prod(grid)
        maps = torch.full((1, 2, patches, patches), 1 / patches)
        assert attention_distance(maps, grid).tolist() == pytest.approx([expected])

    @pytest.mark.parametrize(
        "grid, expected",
        [
            ((2, 3), (2 + 1 + 0 + math.sqrt(5) + math.sqrt(2) + 1) / 6),
            ((3, 2), (1 + math.sqrt(2) + 0 + 1 + 1 + math.sqrt(2)) / 6),
        ],
    )
    def test_patches_are_counted_row_by_row(self, grid, expected):
        maps = torch.zeros(1, 1, 6, 6)
        maps[..., 2] = 1  # all look at the third
        assert attention_distance(maps, grid).item() == pytest.approx(expected)

    @pytest.mark.parametrize("others", [0, 1, 3])
    def test_equals_loops_and_leaves_out_tokens_before_the_patches(self, others):
        maps = torch.randn(2, 3, others + 6, others + 6, generator=torch.Generator().manual_seed(0))
        for image, distance in zip(maps.abs().double(), attention_distance(maps, (2, 3))):
            total = 0.0
            for head, query in itertools.product(range(3), range(6)):
                weights = image[head, others + query, others:]
                for key in range(6):
                    away = math.hypot(query // 3 - key // 3, query % 3 - key % 3)
                    total += float(weights[key] / weights.sum()) * away
            assert distance.item() == pytest.approx(total / 18, rel=1e-5)

    def test_a_negative_weight_counts_by_its_size(self):
        assert attention_distance(one_head([1, -3], [0, 1]), (1, 2)).item() == pytest.approx(0.375)


class TestTokenSimilarity:
    @pytest.mark.parametrize(
        "patches, expected",
        [
            ([[1, 2], [1, 2]], 1),
            ([[1, 0], [0, 5]], 0),
            ([[1, 2], [-2, -4]], -1),
            ([[1, 0], [2, 0], [0, 1]], 1 / 3),
        ],
    )
    @pytest.mark.parametrize("others", [0, 1, 2])
    def test_by_hand(self, patches, expected, others):
        tokens = torch.tensor([[-7.0, 3]] * others + patches)[None]
        assert token_similarity(tokens, (1, len(patches))).tolist() == pytest.approx([expected], abs=1e-6)

    def test_equals_loops_over_pairs(self):
        tokens = 0.5 + torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
        for image, similarity in zip(tokens, token_similarity(tokens, GRID)):
            cosines = [cosine(one, other, False) for one, other in itertools.combinations(image[1:], 2)]
            assert similarity.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)

    def test_one_patch(self):
        assert token_similarity(torch.ones(2, 2, 4), (1, 1)).isnan().tolist() == [True, True]

    def test_half_precision_small_numbers_and_zeros(self):
        tokens = torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(token_similarity(tokens, GRID), token_similarity(tokens.float(), GRID))
        assert_close(token_similarity(1e-8 * tokens.float(), GRID), token_similarity(tokens, GRID), 1e-4)
        assert token_similarity(torch.zeros(1, TOKENS, 8), GRID).tolist() == [0]


class TestLayerSimilarity:
    def test_by_hand(self):
        maps = [one_head([1, 0], [1, 0]), one_head([0, 2], [0, 2]), one_head([3, 3], [-3, -3])]
        cosines, correlations = layer_similarity(maps)
        assert_close(cosines, torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]]))
        # Of (1, 0) and (0, 2) remain (1, -1) and its opposite, of even rows nothing.
        assert_close(correlations, torch.tensor([[[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]]]))

    def test_equals_loops(self):
        layers = [refined_like_maps(seed) for seed in range(3)]
        for centred, similarity in zip((False, True), layer_similarity(layers)):
            assert similarity.shape == (2, 3, 3)
            for image, i, j in itertools.product(range(2), range(3), range(3)):
                cosines = [
                    cosine(layers[i][image, head, query], layers[j][image, head, query], centred)
                    for head, query in itertools.product(range(4), range(TOKENS))
                ]
                assert similarity[image, i, j].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)

    def test_heads_are_compared_with_their_like(self):
        maps = refined_like_maps()
        assert layer_similarity([maps, maps])[0].min() > 0.999
        assert layer_similarity([maps, maps.roll(1, dims=1)])[0][:, 0, 1].max() < 0.5


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
class TestAllMetrics:
    def test_the_size_of_a_map_says_nothing(self, metric):
        maps = refined_like_maps()
        for factor in (0.01, 1e-8, 3000):
            assert_close(metric(factor * maps), metric(maps), 1e-4)

    def test_the_order_of_heads_says_nothing(self, metric):
        maps = refined_like_maps()
        assert_close(metric(maps[:, [2, 0, 3, 1]]), metric(maps))

    def test_images_are_measured_one_by_one(self, metric):
        maps = refined_like_maps(images=3)
        together = metric(maps)
        assert len(together) == 3 and (together[0] != together[1]).any()
        assert_close(together, torch.cat([metric(image[None]) for image in maps]))

    def test_rows_of_zeros(self, metric):
        maps = refined_like_maps()
        maps[0, 1, 2] = 0
        assert metric(maps).isfinite().all()
        assert metric(torch.zeros_like(maps)).isfinite().all()

    def test_half_precision(self, metric):
        maps = refined_like_maps().bfloat16()
        result = metric(maps)
        assert result.dtype == torch.float32
        assert_close(result, metric(maps.float()), 0.01)


def test_maps_of_softmax():
    """Positive rows have a cosine well above 0 even where they don't correlate, which the correlation shows."""
    maps = nn.functional.softmax(torch.randn(8, 6, 40, 40, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert head_similarity(maps).mean() > 0.3
    assert head_similarity(maps, centred=True).abs().mean() < 0.01
