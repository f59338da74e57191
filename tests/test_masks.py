"""
A refinement with a mask: as if each example were alone, without its padding.

The reference keeps the examples apart, each at its own size; only norms see all of them, as one long row of values.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from refiner_hf import blocked_refiner
from refiner_hf.attention_refiner import REFINE_IMPLEMENTATIONS, RefinerMapRefinement
from refiner_hf.normalization_refiner import RefinerBatchNorm2d

from .conftest import assert_close
from .refinements import make_maps, make_refinement, step


SIZES = (7, 3, 5, 1)
KINDS = ["expansion_convolution", "expansion", "convolution"]


def real_maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, n, n, generator=generator, dtype=torch.float64).softmax(-1) for n in SIZES]


def each(module: nn.Module, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(module, nn.BatchNorm2d):
        return [module(one[None])[0] for one in maps]
    values = torch.cat([one.flatten(1) for one in maps], 1)[None, :, :, None]
    sizes = [one[0].numel() for one in maps]
    return [part.view_as(one) for part, one in zip(module(values)[0, :, :, 0].split(sizes, 1), maps)]


def refine_apart(refinement: RefinerMapRefinement, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    hidden = maps
    if hasattr(refinement, "convolution"):
        return each(refinement.output_norm, each(refinement.convolution, hidden))
    hidden = each(nn.ReLU6(), each(refinement.expansion_norm, each(refinement.expansion, hidden)))
    if refinement.local_attention is not None:
        hidden = each(nn.ReLU6(), each(refinement.local_attention_norm, each(refinement.local_attention, hidden)))
    hidden = each(refinement.reduction_norm, each(refinement.reduction, hidden))
    return each(refinement.output_norm, [a + b for a, b in zip(hidden, maps)])


def padded(parts: list[torch.Tensor], side: str, to: int, fill: float = 0.0) -> torch.Tensor:
    rows = []
    for part in parts:
        around = (0, to - part.shape[-1]) if side == "right" else (to - part.shape[-1], 0)
        rows.append(nn.functional.pad(part, around * 2, value=fill))
    return torch.stack(rows)


def run(refinement, side: str, to: int, fill: float):
    """Refined maps without padding, gradients, running statistics."""
    refinement, maps = copy.deepcopy(refinement), [one.requires_grad_() for one in real_maps()]
    mask = padded([torch.ones(1, n, n) for n in SIZES], side, to).bool()
    refined = refinement(padded(maps, side, to, fill), 0.5, mask)
    assert not refined[~mask.expand_as(refined)].any()
    places = [slice(None, n) if side == "right" else slice(to - n, None) for n in SIZES]
    return results(refinement, maps, [one[:, at, at] for one, at in zip(refined, places)])


def run_apart(refinement):
    refinement, maps = copy.deepcopy(refinement), [one.requires_grad_() for one in real_maps()]
    return results(refinement, maps, [0.5 * one for one in refine_apart(refinement, maps)])


def results(refinement, maps, refined):
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in refined]
    sum((a * b).sum() for a, b in zip(refined, weights)).backward()
    parameters = [parameter.grad for parameter in refinement.parameters()]
    buffers = [buffer.double() for buffer in refinement.buffers()]
    return [*refined, *(one.grad for one in maps), *parameters, *buffers]


def choose(monkeypatch, refinement: RefinerMapRefinement, implementation: str) -> list[str]:
    """Lets a refinement be computed in one way; what ran is noted."""
    ran: list[str] = []
    for name, each in REFINE_IMPLEMENTATIONS.items():
        refine = lambda *args, name=name, each=each: ran.append(name) or each.refine(*args)  # noqa: E731
        monkeypatch.setitem(REFINE_IMPLEMENTATIONS, name, each._replace(refine=refine))
    refinement.config.refine_implementation = implementation
    return ran


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side, to, fill", [("right", 7, 0.0), ("left", 7, 0.3), ("right", 12, 5.0), ("left", 9, 0.0)])
def test_padding_makes_no_difference(kind, training, side, to, fill):
    refinement = make_refinement(refinement=kind).double().train(training)
    for ours, theirs in zip(run(refinement, side, to, fill), run_apart(refinement), strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("piece", [2**10, 2**23], ids=["small pieces", "whole images"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ratio, kernel", [(3, 3), (1, 5)])
@pytest.mark.parametrize("side, to", [("right", 12), ("left", 9), ("right", 7)])
def test_nor_in_pieces(ratio, kernel, training, side, to, piece, monkeypatch):
    monkeypatch.setattr(blocked_refiner, "_PIECE", piece)
    refinement = make_refinement(ratio=ratio, kernel=kernel).double().train(training)
    expected = run(refinement, side, to, 0.0)
    ran = choose(monkeypatch, refinement, "blocked")
    for ours, theirs in zip(run(refinement, side, to, 0.3), expected, strict=True):
        assert_close(ours, theirs, 1e-9)
    assert ran == ["blocked"]


def shapes() -> dict[str, torch.Tensor]:
    """Masks (4, 1, 9, 9) of other shapes than squares."""
    place = torch.arange(9)
    band = (place[:, None] - place).abs() <= 2
    holes = torch.rand(4, 9, generator=torch.Generator().manual_seed(7)) > 0.4
    holes[3] = False  # a text of padding alone
    pairs = (holes[:, :, None] & holes[:, None, :])[:, None]
    return {"band": band.expand(4, 1, 9, 9), "holes": pairs, "band with holes": pairs & band}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("piece", [2**10, 2**23], ids=["small pieces", "whole images"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize(
    "kind, ratio", [("expansion_convolution", 3), ("expansion_convolution", 1), ("expansion", 2), ("convolution", 1)]
)
def test_masks_of_any_shape(kind, ratio, shape, training, piece, grad, monkeypatch):
    """In pieces as module by module."""
    monkeypatch.setattr(blocked_refiner, "_PIECE", piece)
    refinement = make_refinement(ratio=ratio, refinement=kind).double().train(training)
    maps, mask = make_maps(4, dtype=torch.float64), shapes()[shape]
    given = []
    for name in ("eager", "blocked"):
        choose(monkeypatch, refinement, name)
        with torch.set_grad_enabled(grad):
            if grad:
                refine = lambda module, maps, scale: module(maps, scale, mask)  # noqa: E731
                given.append(step(refine, refinement, maps))
            else:
                twin = copy.deepcopy(refinement)
                given.append({"output": twin(maps, 0.7, mask), **dict(twin.named_buffers())})
    for name in given[0]:
        assert_close(given[1][name].double(), given[0][name].double(), 1e-9, name)


def test_padding_is_left_out(monkeypatch):
    """Of the padding of images that are pieces of their own, nothing is computed."""
    monkeypatch.setattr(blocked_refiner, "_PIECE", 2**10)
    sizes, convolve = [], blocked_refiner._convolve
    monkeypatch.setattr(blocked_refiner, "_convolve", lambda h, local: sizes.append(h.shape[3]) or convolve(h, local))
    refinement = make_refinement().eval()
    choose(monkeypatch, refinement, "blocked")
    mask = padded([torch.ones(1, n, n) for n in SIZES], "right", 30).bool()
    with torch.no_grad():
        refinement(padded(real_maps(), "right", 30).float(), 1.0, mask)
    assert sorted(set(sizes), reverse=True) == sorted(SIZES, reverse=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_hides_nothing(kind, training):
    refinement, maps = make_refinement(refinement=kind).double().train(training), torch.stack([real_maps()[0]] * 3)
    other = copy.deepcopy(refinement)
    assert_close(refinement(maps, 2.0, torch.ones(3, 1, 7, 7, dtype=torch.bool)), other(maps, 2.0), 1e-12)
    for ours, theirs in zip(refinement.buffers(), other.buffers()):
        assert_close(ours.double(), theirs.double(), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_in_other_types(dtype, tolerance):
    refinement = make_refinement().double()
    expected = run(refinement, "right", 9, 0.0)[: len(SIZES)]
    mask = padded([torch.ones(1, n, n) for n in SIZES], "right", 9).bool()
    refined = copy.deepcopy(refinement).to(dtype)(padded(real_maps(), "right", 9).to(dtype), 0.5, mask)
    assert refined.dtype == dtype
    for ours, theirs, n in zip(refined, expected, SIZES):
        assert_close(ours[:, :n, :n].double(), theirs, tolerance)


def test_statistics_move_once_under_checkpointing():
    refinement = make_refinement().double()
    other, maps = copy.deepcopy(refinement), padded(real_maps(), "right", 8).requires_grad_()
    mask = padded([torch.ones(1, n, n) for n in SIZES], "right", 8).bool()
    torch.utils.checkpoint.checkpoint(refinement, maps, 1.0, mask, use_reentrant=False).sum().backward()
    other(maps, 1.0, mask)
    norms = [module for module in refinement.modules() if isinstance(module, RefinerBatchNorm2d)]
    assert len(norms) == 4 and all(norm.num_batches_tracked == 1 for norm in norms)
    for ours, theirs in zip(refinement.buffers(), other.buffers()):
        assert torch.equal(ours, theirs)


def process(rank: int, folder: Path) -> None:
    """What each of two processes runs: a half of the examples, with norms that see both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    refinement = make_refinement().double()
    for module in refinement.modules():
        if isinstance(module, RefinerBatchNorm2d):
            module.synchronized = True
    half = slice(2 * rank, 2 * rank + 2)
    maps = [one.requires_grad_() for one in real_maps()[half]]
    mask = padded([torch.ones(1, n, n) for n in SIZES[half]], "right", 9).bool()
    refined = refinement(padded(maps, "right", 9), 1.0, mask)
    sum(one.pow(3).sum() * (rank + 1) for one in refined).backward()
    parameters = [parameter.grad for parameter in refinement.parameters()]
    torch.save([[one.grad for one in maps], parameters, list(refinement.buffers())], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    code = "import tests.conftest, tests.test_masks as t; t.process({}, t.Path({!r}))"
    children = [
        subprocess.Popen([sys.executable, "-c", code.format(rank, str(tmp_path))], cwd=Path(__file__).parents[1])
        for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    refinement, maps = make_refinement().double(), [one.requires_grad_() for one in real_maps()]
    refined = refine_apart(refinement, maps)
    sum(one.pow(3).sum() * (1 + i // 2) for i, one in enumerate(refined)).backward()
    for ours, theirs in zip(one[0] + other[0], maps, strict=True):
        assert_close(ours, theirs.grad, 1e-10)
    for ours, more, theirs in zip(one[1], other[1], refinement.parameters(), strict=True):
        assert_close(ours + more, theirs.grad, 1e-10)
    for ours, more, theirs in zip(one[2], other[2], refinement.buffers(), strict=True):
        assert_close(ours.double(), theirs.double(), 1e-10)
        assert torch.equal(ours, more)
