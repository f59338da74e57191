"""What a model does differently to be fast: which implementation is picked, and that no result depends on it."""

import copy
import logging

import pytest
import torch
from torch import nn

from refiner_hf import RefinerForImageClassification, native_library_refiner
from refiner_hf.attention_refiner import pick_implementation
from refiner_hf.normalization_refiner import RefinerBatchNorm2d

from .conftest import LAYOUTS, assert_close
from .refinements import make_maps, make_refinement


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 3])


def gradients_and_buffers(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    """Of a step in float64, where what differs is the mathematics and not the order of additions."""
    loss = model.double()(**{"pixel_values": IMAGES.double(), "labels": LABELS, **inputs}).loss
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for name, value in theirs.items() if name.startswith("gradient")).item()
    for name, value in theirs.items():
        # The maps are rounded to float32 on their way; below, that is all there is.
        if not name.startswith("gradient") or value.abs().max() > 1e-6 * largest:
            assert_close(ours[name], value, tolerance, name)


@pytest.fixture
def lines(monkeypatch):
    """The lines that the choice logs, as (level, text)."""
    once = (logging.Logger.warning_once, logging.Logger.info_once)
    for each in once:
        each.cache_clear()
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            f"refiner_hf.attention_refiner.logger.{level}", lambda text, level=level: said.append((level, text))
        )
    yield said
    for each in once:
        each.cache_clear()


class TestChoice:
    def picked(self, maps: torch.Tensor, refinement=None, asked: str = "auto") -> str:
        refinement = make_refinement() if refinement is None else refinement
        refinement.config.refine_implementation = asked
        return pick_implementation(refinement, maps)

    @pytest.mark.parametrize("compiler", [True, False])
    def test_inference_on_a_cpu(self, lines, compiler, monkeypatch):
        monkeypatch.setattr(native_library_refiner, "_loaded", lambda: print if compiler else "there is no compiler")
        fastest = "native" if compiler else "blocked"
        with torch.no_grad():
            assert self.picked(make_maps(), make_refinement().eval()) == fastest
        assert self.picked(make_maps(), make_refinement().eval().requires_grad_(False)) == fastest
        assert lines == [("info", f"Attention maps are refined by {fastest!r}: the fastest on cpu.")]  # once

    def test_training_goes_by_the_size_of_the_maps(self, lines):
        assert self.picked(torch.rand(2, 4, 9, 9)) == "eager"
        assert self.picked(torch.rand(1, 1, 1, 1).expand(10, 4, 197, 197)) == "blocked"
        assert [level for level, _ in lines] == ["info"] * 2
        assert "below 16 MB" in lines[0][1] and "from 16 MB up" in lines[1][1]

    def test_processes_that_synchronize_pick_alike(self, monkeypatch):
        monkeypatch.setattr(RefinerBatchNorm2d, "synchronizing", True)
        assert self.picked(torch.rand(2, 4, 9, 9)) == self.picked(torch.rand(1, 4, 197, 197)) == "blocked"

    def test_eager_for_shapes_alone(self, lines):
        assert self.picked(make_maps().to("meta")) == "eager"
        assert "traced" in lines[0][1]

    def test_eager_where_the_asked_for_cannot(self, lines):
        whole = make_refinement(refinement="convolution")
        assert self.picked(make_maps(), whole, "blocked") == "eager"
        assert self.picked(make_maps(), whole, "blocked") == "eager"
        ((level, text),) = lines
        assert level == "warning" and "not by 'blocked'" in text
        assert self.picked(make_maps(), make_refinement(refinement="expansion"), "blocked") == "eager"
        mixed = make_refinement()
        mixed.output_norm.eval()
        assert self.picked(make_maps(), mixed, "blocked") == "eager"
        assert "some norms are frozen" in lines[-1][1]

    @pytest.mark.parametrize(
        "how", ["hook", "pre-hook", "backward hook", "wrapped", "parametrized", "replaced", "bias", "not affine"]
    )
    def test_eager_where_calling_the_modules_matters(self, how):
        refinement = make_refinement().eval().requires_grad_(False)
        if how == "hook":
            refinement.reduction.register_forward_hook(lambda module, args, output: 2 * output)
        elif how == "pre-hook":
            refinement.output_norm.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        elif how == "backward hook":
            refinement.reduction.register_full_backward_pre_hook(lambda module, gradients: gradients)
        elif how == "bias":
            refinement.reduction.bias = nn.Parameter(torch.ones(4), requires_grad=False)
        elif how == "not affine":
            refinement.output_norm = RefinerBatchNorm2d(4, affine=False).eval()
        elif how == "wrapped":  # as accelerate does
            forward = refinement.expansion.forward
            refinement.expansion.forward = lambda hidden: 2 * forward(hidden)
        elif how == "parametrized":
            nn.utils.parametrizations.weight_norm(refinement.reduction)
        else:
            refinement.output_norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        assert self.picked(make_maps(), refinement) == "eager"

    @pytest.mark.parametrize("asked", ["auto", "native", "blocked", "triton"])
    def test_eager_where_there_is_next_to_nothing(self, asked):
        refinement = make_refinement()
        assert self.picked(make_maps(images=0), refinement, asked) == "eager"
        refinement(make_maps(images=0))
        with pytest.raises(ValueError, match="more than 1 value"):
            refinement(make_maps(images=1, tokens=1))

    def test_triton_says_what_it_needs(self, lines):
        if torch.cuda.is_available():
            pytest.skip("here it can")
        with torch.no_grad():
            assert self.picked(make_maps(), make_refinement().eval(), "triton") == "eager"
        assert "NVIDIA GPU" in lines[0][1]


@pytest.mark.parametrize("layout", ["released", "refine_every_layer", "mixed"])
class TestBlockedModel:
    def models(self, tiny_model, layout, **fields):
        models = [tiny_model(attention_types=LAYOUTS[layout], **fields).train() for _ in range(2)]
        models[0].set_refine_implementation("blocked")
        models[1].set_refine_implementation("eager")
        return models

    def test_trains_alike(self, tiny_model, layout):
        ours, theirs = self.models(tiny_model, layout, use_dense_head=True)
        assert_same(gradients_and_buffers(ours), gradients_and_buffers(theirs))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, tiny_model, layout, reentrant):
        ours, theirs = self.models(tiny_model, layout)
        ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        assert_same(gradients_and_buffers(ours), gradients_and_buffers(theirs))

    def test_frozen_norms(self, tiny_model, layout):
        ours, theirs = self.models(tiny_model, layout)
        for model in (ours, theirs):
            model.freeze_norms()
        assert_same(gradients_and_buffers(ours), gradients_and_buffers(theirs))

    def test_accumulated_gradients(self, tiny_model, layout):
        ours, theirs = self.models(tiny_model, layout)
        for model in (ours, theirs):
            gradients_and_buffers(model)
        assert_same(gradients_and_buffers(ours), gradients_and_buffers(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "blocked"])
@pytest.mark.parametrize("training", [True, "with frozen norms", False])
def test_compiled_in_one_graph(tiny_model, implementation, training):
    torch.compiler.reset()
    ours = tiny_model(num_hidden_layers=2)
    if training == "with frozen norms":
        ours.freeze_norms()
    ours.train(bool(training))
    ours.set_refine_implementation(implementation)
    theirs = copy.deepcopy(ours)
    theirs.set_refine_implementation("eager")
    compiled = torch.compile(ours, fullgraph=True)
    if training:
        result = gradients_and_buffers(compiled)
        result = {name.replace("_orig_mod.", ""): value for name, value in result.items()}
        assert_same(result, gradients_and_buffers(theirs), 1e-3)
    else:
        with torch.no_grad():
            assert_close(compiled(IMAGES).logits, theirs(IMAGES).logits)


def test_exported(tiny_model):
    for implementation in ("auto", "blocked"):
        model = tiny_model().eval()
        model.set_refine_implementation(implementation)
        with torch.no_grad():
            program = torch.export.export(model, (IMAGES,))
            assert_close(program.module()(IMAGES).logits, model(IMAGES).logits)
            if implementation == "auto":
                assert "batch_norm" in str(program.graph)  # the plain modules


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
class TestTransformed:
    """Whatever records or transforms a model meets plain operations."""

    @pytest.fixture
    def model(self, tiny_model, implementation):
        model = tiny_model().eval().requires_grad_(False)
        model.set_refine_implementation(implementation)
        return model

    def test_traced_for_other_batches(self, model):
        traced = torch.jit.trace(lambda images: model(images).logits, IMAGES)
        more = torch.randn(5, 3, 16, 16)
        assert_close(traced(more), model(more).logits)

    def test_an_ensemble(self, model):
        members = [model, copy.deepcopy(model)]
        nn.init.normal_(members[1].classifier.weight)
        parameters, buffers = torch.func.stack_module_state(members)

        def logits(parameters, buffers):
            return torch.func.functional_call(model, (parameters, buffers), (IMAGES,)).logits

        together = torch.vmap(logits)(parameters, buffers)
        for member, ours in zip(members, together):
            assert_close(ours, member(IMAGES).logits)

    def test_forward_mode(self, model):
        direction = torch.randn_like(IMAGES)
        _, ours = torch.func.jvp(lambda images: model(images).logits, (IMAGES,), (direction,))
        model.double()
        step = 1e-4 * direction.double()
        theirs = (model(IMAGES.double() + step).logits - model(IMAGES.double() - step).logits) / 2e-4
        assert_close(ours, theirs, 0.02)

    def test_replicas(self, implementation):
        """Those of nn.DataParallel have tensors where modules have parameters."""
        refinement, maps = make_refinement().eval(), make_maps()
        refinement.config.refine_implementation = implementation
        expected = torch.autograd.grad(refinement(maps).sum(), refinement.reduction.weight)
        replica = refinement._replicate_for_data_parallel()
        for name, child in refinement.named_children():
            copied = child._replicate_for_data_parallel()
            for kind, parameter in child._parameters.items():
                setattr(copied, kind, None if parameter is None else parameter * 1)
            for kind, buffer in child.named_buffers():
                setattr(copied, kind, buffer)
            setattr(replica, name, copied)
        assert_close(torch.autograd.grad(replica(maps).sum(), refinement.reduction.weight)[0], expected[0])


class TestMapsNobodyNeeds:
    """A plain layer whose map nobody takes weights its values without making one."""

    FIELDS = dict(accumulate_attention=False, attention_types=["plain", "plain", "shared_refined", "plain"])

    def calls(self, monkeypatch) -> list:
        calls, original = [], nn.functional.scaled_dot_product_attention

        def counted(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
        return calls

    @pytest.mark.parametrize("training", [True, False])
    def test_same_results(self, tiny_model, monkeypatch, training):
        calls = self.calls(monkeypatch)
        model = tiny_model(**self.FIELDS).train(training)
        twin = copy.deepcopy(model)
        ours = gradients_and_buffers(model)
        assert len(calls) == 2  # the first layer's and the last's; the second's is refined by the third
        theirs = gradients_and_buffers(twin, output_attentions=True)  # all maps are asked for
        assert len(calls) == 2
        assert_same(ours, theirs)

    def test_maps_asked_for_are_there(self, tiny_model):
        model = tiny_model(**self.FIELDS).eval()
        maps = model(IMAGES, output_attentions=True).attentions
        assert [attention.shape for attention in maps] == [(2, 4, 17, 17)] * 4
        model.config.output_attentions = model.refiner.config.output_attentions = True
        assert len(model(IMAGES).attentions) == 4

    @pytest.mark.parametrize(
        "fields",
        [
            dict(cosine_regularizer_weight=0.1, attention_types=LAYOUTS["plain"]),
            dict(attention_probs_dropout_prob=0.1, attention_types=LAYOUTS["plain"]),
            dict(accumulate_attention=True, attention_types=LAYOUTS["plain"]),
            dict(attention_types=LAYOUTS["refine_every_layer"]),
        ],
    )
    def test_made_where_somebody_needs_them(self, tiny_model, monkeypatch, fields):
        calls = self.calls(monkeypatch)
        tiny_model(**{**self.FIELDS, **fields}).train()(IMAGES, labels=LABELS)
        # The last layer's map accumulates the others'.
        assert len(calls) == 0


def test_accumulation_in_place_spoils_no_map(tiny_model):
    model = tiny_model(attention_types=LAYOUTS["plain"]).eval()
    expected = model(IMAGES, output_attentions=True)
    with torch.no_grad():
        ours = model(IMAGES, output_attentions=True)
    for one, other in zip((ours.logits, *ours.attentions), (expected.logits, *expected.attentions)):
        assert_close(one, other)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_folded_stem(tiny_model, dtype, tolerance):
    stem = tiny_model().refiner.embeddings.patch_embeddings.stem.eval().to(dtype)
    for module in stem.modules():
        if isinstance(module, RefinerBatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    expected = stem(IMAGES.to(dtype))  # with gradients, module by module
    with torch.no_grad():
        assert_close(stem(IMAGES.to(dtype)), expected, tolerance)
        seen = []
        stem.convolution2_norm.register_forward_hook(lambda *_: seen.append(1))
        assert_close(stem(IMAGES.to(dtype)), expected, tolerance)
        assert seen


@pytest.mark.parametrize("fields", [dict(), dict(use_conv_stem=False), dict(image_size=(12, 20), patch_size=(4, 10))])
def test_projection_as_a_product(tiny_model, fields):
    model = tiny_model(**fields).train()
    images = torch.randn(2, 3, *model.config.image_height_width).double()
    twin = copy.deepcopy(model)
    twin.refiner.embeddings.patch_embeddings.projection.register_forward_hook(lambda *_: None)  # calls the convolution
    ours, theirs = (gradients_and_buffers(each, pixel_values=images) for each in (model, twin))
    assert_same(ours, theirs)


def test_float16_on_a_cpu(tiny_model):
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(IMAGES).logits
        assert_close(model.half()(IMAGES).logits, expected, 0.02)


def test_synchronized_norms_survive_nothing_saved(tiny_model, tmp_path):
    model = tiny_model()
    model.synchronize_norms()
    model.save_pretrained(tmp_path)
    loaded = RefinerForImageClassification.from_pretrained(tmp_path)
    assert not any(m.synchronized for m in loaded.modules() if isinstance(m, RefinerBatchNorm2d))
