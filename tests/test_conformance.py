"""What transformers asks of each of its vision models, asked of every class here."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers.modeling_outputs import ModelOutput

from refiner_hf import (
    REFINE_IMPLEMENTATIONS,
    RefinerBackbone,
    RefinerConfig,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerModel,
    RefinerPreTrainedModel,
)

from .conftest import LAYOUTS, TINY, assert_close
from .every_class import (
    CLASSES,
    HEADS,
    assert_initialised,
    config_of,
    every_class,
    every_layout,
    inputs_of,
    make,
    results,
)


def training_loss(model: RefinerPreTrainedModel, **options) -> tuple[torch.Tensor, ModelOutput]:
    """The class's own loss, or one that looks at all of its outputs where it has none."""
    outputs = model(**inputs_of(type(model), labels=True), **options)
    if outputs.get("loss") is not None:
        return outputs.loss, outputs
    seen = outputs.get("feature_maps") or (outputs.last_hidden_state,)
    return sum((0.5 + tensor).square().mean() for tensor in seen), outputs


def encoder_name(key: str) -> str:
    return key.removeprefix("refiner.")


@contextlib.contextmanager
def marked_memory() -> Iterator[None]:
    """Memory that nobody initialised is NaN (the largest integer) and not zero by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class TestSaving:
    @every_class
    @pytest.mark.parametrize(
        "dtype, shards",
        [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
    )
    def test_round_trip(self, cls, dtype, shards, tmp_path):
        model = make(cls).to(dtype)
        model.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "1GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == shards
        loaded, info = cls.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        assert loaded.dtype == dtype and not loaded.training
        state = model.state_dict()
        assert state.keys() == loaded.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
        with torch.no_grad():
            for ours, theirs in zip(results(loaded(**inputs_of(cls))), results(model(**inputs_of(cls)))):
                assert torch.equal(ours, theirs)

    @every_class
    @pytest.mark.parametrize("source", CLASSES, ids=lambda cls: f"from_{cls.__name__}")
    def test_every_folder_loads_into_every_class(self, source, cls, tmp_path):
        saved = make(source)
        saved.save_pretrained(tmp_path)
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert {encoder_name(key) for key in info["missing_keys"]} == HEADS[cls] - HEADS[source]
        assert {encoder_name(key) for key in info["unexpected_keys"]} == HEADS[source] - HEADS[cls]
        assert not info["mismatched_keys"]
        theirs = {encoder_name(key): value for key, value in saved.state_dict().items()}
        for name, tensor in loaded.state_dict().items():
            if name not in info["missing_keys"]:
                assert torch.equal(tensor, theirs[encoder_name(name)]), name
        assert_initialised(loaded, set(info["missing_keys"]))

    @pytest.mark.parametrize(
        "auto, cls",
        [
            (AutoModel, RefinerModel),
            (AutoModelForImageClassification, RefinerForImageClassification),
            (AutoModelForMaskedImageModeling, RefinerForMaskedImageModeling),
        ],
    )
    def test_auto_classes(self, auto, cls, tmp_path):
        saved = make(cls)
        saved.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is cls and type(auto.from_config(saved.config)) is cls
        with torch.no_grad():
            for ours, theirs in zip(results(loaded(**inputs_of(cls))), results(saved(**inputs_of(cls)))):
                assert torch.equal(ours, theirs)


class TestInitialisation:
    """What a checkpoint lacks, transformers makes on the meta device and `_init_weights` fills in."""

    @every_class
    @every_layout
    def test_of_a_new_network(self, cls, layout):
        torch.manual_seed(0)
        with marked_memory():
            model = cls(config_of(attention_types=LAYOUTS[layout]))
        assert_initialised(model, set(model.state_dict()))

    @every_class
    def test_of_a_checkpoint_without_tensors(self, cls):
        torch.manual_seed(0)
        with marked_memory():
            model = cls.from_pretrained(None, config=config_of(attention_types=LAYOUTS["mixed"]), state_dict={})
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert_initialised(model, set(model.state_dict()))

    # In name order neighbours belong to one module, so each half lacks a part of almost every module.
    @pytest.mark.parametrize(
        "missing",
        [
            slice(0, None, 2),
            slice(1, None, 2),
            "layers.0.attention.q_proj.bias",
            "layers.1.attention.refinement.expansion_norm.running_mean",
            "layers.1.attention.refinement.local_attention_norm.weight",
            "embeddings.cls_token",
            "embeddings.mask_token",
            "layers.3.layer_scale.lambda1",
            "layers.2.",
        ],
        ids=str,
    )
    @pytest.mark.parametrize("cls", [RefinerForImageClassification, RefinerForMaskedImageModeling])
    def test_a_missing_tensor_leaves_the_others_alone(self, cls, missing, tmp_path):
        make(cls, attention_types=LAYOUTS["mixed"]).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        names = sorted(saved)
        gone = set(names[missing]) if isinstance(missing, slice) else {name for name in names if missing in name}
        if not gone:
            pytest.skip("this class has no such tensor")
        kept = {name: tensor for name, tensor in saved.items() if name not in gone}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

        torch.manual_seed(0)
        with marked_memory():
            loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        # transformers doesn't list missing counters of batches
        assert set(info["missing_keys"]) | {n for n in gone if n.endswith("num_batches_tracked")} == gone
        for name, tensor in kept.items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert_initialised(loaded, gone)


class TestOtherLabels:
    def test_ignore_mismatched_sizes(self, tmp_path, caplog):
        saved = make(RefinerForImageClassification)
        saved.save_pretrained(tmp_path)
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            loaded, info = RefinerForImageClassification.from_pretrained(
                tmp_path, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
            )
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
        heads = HEADS[RefinerForImageClassification]
        assert {name for name, *_ in info["mismatched_keys"]} == heads
        assert all(name in caplog.text for name in heads) and "MISMATCH" in caplog.text
        for name, tensor in loaded.state_dict().items():
            assert name in heads or torch.equal(tensor, saved.state_dict()[name]), name
        assert_initialised(loaded, heads)
        assert loaded.num_labels == loaded.config.num_labels == len(loaded.config.id2label) == 9

    def test_without_it_the_sizes_are_an_error(self, tmp_path):
        make(RefinerForImageClassification).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            RefinerForImageClassification.from_pretrained(tmp_path, num_labels=9)


class TestConfig:
    def test_round_trips(self, tmp_path):
        config = config_of(image_size=[16, 24], out_features=["stem", "stage2"], apply_layernorm=False, colour="red")
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["out_features"] == ["stem", "stage2"] and written["out_indices"] == [0, 2]
        others = {
            "a file": RefinerConfig.from_pretrained(tmp_path),
            "the auto class": AutoConfig.from_pretrained(tmp_path),
            "JSON": RefinerConfig.from_dict(json.loads(config.to_json_string())),
            "what differs from the default": RefinerConfig(**config.to_diff_dict()),
            "a copy": copy.deepcopy(config),
        }
        for way, other in others.items():
            # The auto class notes where the file came from.
            assert type(other) is RefinerConfig and other.to_dict() | {"_name_or_path": ""} == config.to_dict(), way
            # An unknown key survives, as it does in transformers' own.
            assert other.colour == "red" and other.stage_names == config.stage_names, way
        others["a copy"].attention_types[0] = "refined"
        assert config.attention_types[0] == "plain"

    def test_for_model(self):
        config = AutoConfig.for_model("refiner", **TINY)
        assert type(config) is RefinerConfig and config.hidden_size == TINY["hidden_size"]

    def test_number_of_labels_follows_the_setter(self):
        config = config_of(num_labels=3)
        config.num_labels = 7
        assert len(config.id2label) == len(config.label2id) == len(config.label_names) == 7
        assert RefinerForImageClassification(config)(**inputs_of(RefinerModel)).logits.shape == (3, 7)

    def test_of_an_earlier_version(self, tmp_path):
        """Before the backbone and masked image modelling there were no fields for them."""
        model = make(RefinerForImageClassification)
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        for field in ("out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"):
            del written[field]
        (tmp_path / "config.json").write_text(json.dumps(written))
        config = RefinerConfig.from_pretrained(tmp_path)
        assert RefinerBackbone(config).out_features == ["stage4"] == config.out_features
        assert config.apply_layernorm and config.reshape_hidden_states
        loaded = RefinerForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs_of(RefinerModel)).logits, model(**inputs_of(RefinerModel)).logits)

    @pytest.mark.parametrize(
        "given, features, indices",
        [
            (dict(), ["stage4"], [4]),  # the last, however many there are
            (dict(out_features=["stem", "stage3"]), ["stem", "stage3"], [0, 3]),
            (dict(out_indices=(1, -1)), ["stage1", "stage4"], [1, -1]),
            (dict(out_features=["stage2"], out_indices=[2]), ["stage2"], [2]),
        ],
    )
    def test_stages(self, given, features, indices, tmp_path):
        config = RefinerConfig(**TINY, **given)
        assert (config.out_features, config.out_indices) == (features, indices)
        config.save_pretrained(tmp_path)
        loaded = RefinerConfig.from_pretrained(tmp_path)
        assert (loaded.out_features, loaded.out_indices) == (features, indices)
        loaded.out_features = ["stage3"]
        assert loaded.out_indices == [3]
        loaded.out_indices = [1, 2]
        assert loaded.out_features == ["stage1", "stage2"]

    @pytest.mark.parametrize(
        "given, message",
        [
            (dict(out_features=["stage5"]), "subset of stage_names"),
            (dict(out_features=["stage2", "stage1"]), "same order"),
            (dict(out_features=["stage2", "stage2"]), "duplicates"),
            (dict(out_indices=[5]), "valid indices"),
            (dict(out_indices=[4, -1]), "duplicates"),
            (dict(out_features=["stage1"], out_indices=[2]), "same stages"),
        ],
    )
    def test_stages_that_do_not_fit(self, given, message):
        with pytest.raises(ValueError, match=message):
            RefinerConfig(**TINY, **given)

    def test_as_the_librarys_own_backbone_tests_want_it(self):
        """`test_config`, `test_channels` and `test_create_from_modified_config` of transformers' backbone tests."""
        config = RefinerConfig(**TINY, out_features=None, out_indices=None)
        assert config.out_features == [config.stage_names[-1]]
        assert config.out_indices == [len(config.stage_names) - 1]
        model = RefinerBackbone(config).eval()
        assert len(model.channels) == len(config.out_features) == 1
        for changes, count in (({"out_features": None}, 1), ({"out_indices": [1, 3]}, 2)):
            changed = copy.deepcopy(config)
            for name, value in changes.items():
                setattr(changed, name, value)
            model = RefinerBackbone(changed).eval()
            assert len(model(torch.rand(1, 3, 16, 16)).feature_maps) == len(model.channels) == count
            assert len(changed.out_features) == len(changed.out_indices) == count

    def test_the_last_stage_of_other_layers(self, tmp_path):
        """The default is never written down, so it can't be that of another number of layers."""
        config = RefinerConfig(**TINY)
        assert config.out_features == ["stage4"] and json.loads(config.to_json_string())["out_features"] is None
        config.num_hidden_layers = 2
        assert config.out_features == ["stage2"] and config.out_indices == [2]

    def test_fewer_layers_than_the_checkpoint(self, tmp_path):
        make(RefinerModel, out_features=None).save_pretrained(tmp_path)
        fewer = dict(num_hidden_layers=2, attention_types=["plain", "shared_refined"])
        cut = RefinerModel.from_pretrained(tmp_path, **fewer)
        assert len(cut.layers) == 2
        with pytest.raises(ValueError, match="subset of stage_names"):  # the fourth stage was asked for, it is gone
            RefinerBackbone.from_pretrained(tmp_path, out_features=["stage4"], **fewer)
        assert RefinerBackbone.from_pretrained(tmp_path, out_features=["stage2"], **fewer).channels == [24]

    def test_fewer_layers_than_the_checkpoint_round_trip(self, tmp_path):
        make(RefinerModel, out_features=None).save_pretrained(tmp_path / "long")
        fewer = dict(num_hidden_layers=2, attention_types=["plain", "shared_refined"])
        cut = RefinerModel.from_pretrained(tmp_path / "long", **fewer)
        cut.save_pretrained(tmp_path / "short")
        loaded = RefinerModel.from_pretrained(tmp_path / "short")
        assert len(loaded.layers) == 2 and RefinerBackbone(loaded.config).out_features == ["stage2"]

    def test_layer_types_by_default_when_loading(self, tmp_path):
        config_of().save_pretrained(tmp_path)
        config = RefinerConfig.from_pretrained(tmp_path, num_hidden_layers=2, attention_types=None, out_features=None)
        assert len(RefinerModel(config).layers) == 2


def assert_order(model: RefinerPreTrainedModel, outputs: ModelOutput) -> None:
    """`hidden_states` are the embeddings and each layer's output, `attentions` the map of each layer in turn."""
    tokens = 1 + math.prod(model.config.patch_grid)
    base = model.base_model
    assert [h.shape for h in outputs.hidden_states] == [(3, tokens, 24)] * 5
    assert [a.shape for a in outputs.attentions] == [(3, 4, tokens, tokens)] * 4
    previous_map = None
    for i, layer in enumerate(base.layers):
        before = outputs.hidden_states[i]
        after, passed_on = layer(before, previous_map)
        normed = layer.layernorm_before(before * layer.residual_scale)
        assert_close(outputs.attentions[i], layer.attention(normed, previous_map)[1], 1e-5, f"map {i}")
        assert_close(outputs.hidden_states[i + 1], after, 1e-5, f"hidden state {i + 1}")
        previous_map = passed_on


class TestOutputs:
    @every_class
    @every_layout
    def test_hidden_states_and_attentions(self, cls, layout):
        model = make(cls, attention_types=LAYOUTS[layout])
        with torch.no_grad():
            assert "hidden_states" not in model(**inputs_of(cls)) and "attentions" not in model(**inputs_of(cls))
            outputs = model(**inputs_of(cls), output_hidden_states=True, output_attentions=True)
            assert_order(model, outputs)
            masks = {k: v for k, v in inputs_of(cls).items() if k == "bool_masked_pos"}
            embeddings = model.base_model.embeddings(inputs_of(cls)["pixel_values"], **masks)
        assert torch.equal(outputs.hidden_states[0], embeddings)

    @every_class
    def test_asked_by_the_configuration(self, cls, tmp_path):
        model = make(cls)
        expected = model(**inputs_of(cls), output_hidden_states=True, output_attentions=True)
        model.config.output_hidden_states = model.config.output_attentions = True
        model.save_pretrained(tmp_path)
        for asked in (model, cls.from_pretrained(tmp_path)):
            outputs = asked(**inputs_of(cls))
            assert list(outputs) == list(expected)
            for ours, theirs in zip(results(outputs), results(expected)):
                assert torch.equal(ours, theirs)
            refused = asked(**inputs_of(cls), output_hidden_states=False, output_attentions=False)
            assert "hidden_states" not in refused and "attentions" not in refused

    @every_class
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("implementation", ["auto", *REFINE_IMPLEMENTATIONS])
    def test_captured_with_their_gradients(self, cls, checkpointing, implementation):
        """Whatever refines the maps, recomputed in backward or not, each is there once and a gradient reaches it."""
        model = make(cls, attention_types=LAYOUTS["mixed"]).train()
        model.freeze_norms()
        model.set_refine_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        loss, outputs = training_loss(model, output_hidden_states=True, output_attentions=True)
        captured = (*outputs.hidden_states, *outputs.attentions)
        for tensor in captured:
            tensor.retain_grad()
        loss.backward()
        assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in captured)
        assert outputs.hidden_states[0].grad.any() and outputs.attentions[0].grad.any()
        plain = make(cls, attention_types=LAYOUTS["mixed"]).train()
        plain.freeze_norms()
        with torch.no_grad():
            assert_order(plain, outputs)

    @every_class
    def test_return_dict_false(self, cls):
        model = make(cls)
        options = dict(output_hidden_states=True, output_attentions=True)
        expected = model(**inputs_of(cls), **options)
        as_tuple = model(**inputs_of(cls), **options, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(expected)
        for ours, theirs in zip(tree_leaves(as_tuple), results(expected)):
            assert torch.equal(ours, theirs)

    @every_class
    def test_return_dict_false_in_the_configuration(self, cls):
        model = make(cls)
        expected = results(model(**inputs_of(cls)))
        model.config.return_dict = False
        as_tuple = model(**inputs_of(cls))
        assert isinstance(as_tuple, tuple)
        for ours, theirs in zip(tree_leaves(as_tuple), expected):
            assert torch.equal(ours, theirs)
        assert isinstance(model(**inputs_of(cls), return_dict=True), ModelOutput)


class TestEvaluation:
    @every_class
    def test_is_deterministic_and_moves_nothing(self, cls):
        model = make(cls, drop_path_rate=0.5, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        before = copy.deepcopy(model.state_dict())
        first, second = (results(model(**inputs_of(cls))) for _ in range(2))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @every_class
    @every_layout
    def test_an_image_alone_gives_what_it_gives_in_a_batch(self, cls, layout):
        model, inputs = make(cls, attention_types=LAYOUTS[layout]), inputs_of(cls)
        with torch.no_grad():
            together = model(**inputs)
            for i in range(3):
                alone = model(**{name: value[i : i + 1] for name, value in inputs.items()})
                for ours, theirs in zip(results(alone), results(together)):
                    if theirs.ndim:  # the masked loss is the batch's
                        assert_close(ours, theirs[i : i + 1], 1e-5)

    @every_class
    @pytest.mark.parametrize("grid", [(2, 6), (5, 3)])
    def test_other_sizes(self, cls, grid):
        """Positions interpolated on the fly are those of a network that was made for the size."""
        model, inputs = make(cls), inputs_of(cls, grid=grid)
        with torch.no_grad():
            outputs = model(**inputs, interpolate_pos_encoding=True)
            other = make(cls, image_size=(4 * grid[0], 4 * grid[1]))
            positions = model.base_model.embeddings.resized_positions(grid, mode="bilinear", align_corners=True)
            other.load_state_dict(model.state_dict() | {self.name_of_positions(model): positions})
            expected = other(**inputs, interpolate_pos_encoding=False)
        for ours, theirs in zip(results(outputs), results(expected)):
            assert_close(ours, theirs, 1e-5)
        with pytest.raises(ValueError, match="takes 16x16"):
            model(**inputs, interpolate_pos_encoding=False)

    @staticmethod
    def name_of_positions(model: nn.Module) -> str:
        return next(name for name in model.state_dict() if name.endswith("position_embeddings"))


class TestTraining:
    @every_class
    def test_same_seed_same_step(self, cls):
        """Weights, random drops, loss and gradients."""
        steps = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            rates = dict(drop_path_rate=0.3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
            model = cls(config_of(token_mixing=True, **rates)).train()
            weights = copy.deepcopy(model.state_dict())
            loss, _ = training_loss(model)
            loss.backward()
            steps.append([*weights.values(), loss, *(parameter.grad for parameter in model.parameters())])
        assert all(torch.equal(first, second) for first, second in zip(*steps[:2]))
        assert not all(torch.equal(first, third) for first, third in zip(steps[0], steps[2]))

    @every_class
    @every_layout
    def test_every_parameter_gets_a_gradient(self, cls, layout):
        """As distributed training wants it: a parameter without would have to be looked for at every step."""
        model = make(cls, attention_types=LAYOUTS[layout]).train()
        loss, _ = training_loss(model)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert not [name for name, gradient in gradients.items() if gradient is None]
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        # A key's bias moves all of a query's scores alike, which the softmax takes out, and the reduction norm's all
        # of a channel, which the output norm takes out. Nothing else is idle.
        idle = [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-12]
        assert all(name.endswith(("k_proj.bias", "reduction_norm.bias")) for name in idle), idle

    @every_class
    def test_checkpointing_changes_nothing(self, cls):
        steps = []
        for checkpointing in (False, True):
            model = make(cls, attention_types=LAYOUTS["mixed"], drop_path_rate=0.3, hidden_dropout_prob=0.1).train()
            if checkpointing:
                model.gradient_checkpointing_enable(dict(use_reentrant=False))
            torch.manual_seed(0)
            loss, _ = training_loss(model)
            loss.backward()
            steps.append([loss, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
        for ours, theirs in zip(*steps):
            assert_close(ours, theirs, 1e-6)

    @every_class
    def test_batch_of_one(self, cls):
        model = make(cls).train()
        outputs = model(**inputs_of(cls, batch=1))
        assert all(tensor.isfinite().all() for tensor in results(outputs))
        sum(tensor.sum() for tensor in results(outputs)).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestCompiling:
    @every_class
    @pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_without_graph_breaks(self, cls, training):
        types = dict(num_hidden_layers=2, attention_types=["refined", "shared_refined"], out_features=None)
        model, to_compile = (make(cls, **types).train(training) for _ in range(2))
        inputs, options = inputs_of(cls, labels=training), dict(output_hidden_states=True, output_attentions=True)
        # transformers puts its hooks in place at the first call that asks for them, which it can't do while compiling.
        to_compile(**inputs, **options)
        to_compile.load_state_dict(model.state_dict())  # the running statistics from before that call
        torch._dynamo.reset()
        compiled = torch.compile(to_compile, fullgraph=True, backend="aot_eager" if training else "eager")
        theirs, ours = model(**inputs, **options), compiled(**inputs, **options)
        assert list(ours) == list(theirs)
        for ours_one, theirs_one in zip(results(ours), results(theirs)):
            assert_close(ours_one, theirs_one, 1e-5)
        if training:
            for outputs in (ours, theirs):
                sum(tensor.square().mean() for tensor in results(outputs)).backward()
            for (name, parameter), other in zip(model.named_parameters(), compiled.parameters()):
                # Biases before a softmax or a batch norm have gradients of rounding only.
                assert (parameter.grad - other.grad).abs().max() <= 1e-4 * parameter.grad.abs().max() + 1e-6, name
            for buffer, other in zip(model.buffers(), compiled.buffers()):
                assert_close(other, buffer, 1e-5)

    @every_class
    def test_exports_with_any_batch(self, cls):
        model = make(
            cls, num_hidden_layers=3, attention_types=["plain", "shared_refined", "refined"], out_features=None
        )
        inputs = inputs_of(cls)
        shapes = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in inputs}
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        for batch in (1, 3, 5):
            with torch.no_grad():
                ours, theirs = program(**inputs_of(cls, batch)), model(**inputs_of(cls, batch))
            assert type(ours) is type(theirs)
            for ours_one, theirs_one in zip(results(ours), results(theirs)):
                assert_close(ours_one, theirs_one, 1e-5)


class TestHalfPrecision:
    # Roundings of 2^-11 and 2^-8, some dozens of them in a row, not all of one sign.
    @every_class
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
    def test_follows_single(self, cls, dtype, tolerance, tmp_path):
        model = make(cls)
        model.save_pretrained(tmp_path)
        half = cls.from_pretrained(tmp_path, dtype=dtype)
        # Running statistics are cast with the weights, as transformers does; the counters of batches stay integers.
        assert {tensor.dtype for tensor in half.parameters()} == {dtype}
        assert {tensor.dtype for tensor in half.buffers()} == {dtype, torch.int64}
        with torch.no_grad():
            # Images come in single precision from the processor.
            for ours, theirs in zip(results(half(**inputs_of(cls))), results(model(**inputs_of(cls)))):
                assert ours.dtype == (dtype if ours.ndim else torch.float32)  # a loss is single
                assert_close(ours, theirs, tolerance)

    @every_class
    def test_there_and_back(self, cls):
        model = make(cls)
        there = copy.deepcopy(model).half()
        back = copy.deepcopy(there).float()
        for name, tensor in back.state_dict().items():
            assert tensor.dtype == model.state_dict()[name].dtype
            assert torch.equal(tensor, model.state_dict()[name].to(there.state_dict()[name].dtype)), name
        with torch.no_grad():
            for ours, theirs in zip(results(back(**inputs_of(cls))), results(model(**inputs_of(cls)))):
                assert_close(ours, theirs, 0.01)


class TestProblemTypes:
    """The loss is the one that transformers' own classifiers have for the problem."""

    LABELS = torch.Generator().manual_seed(2)

    @pytest.mark.parametrize(
        "problem_type, num_labels, labels, expected",
        [
            ("single_label_classification", 5, torch.tensor([4, 0, 2]), nn.CrossEntropyLoss()),
            (None, 5, torch.tensor([4, 0, 2]), nn.CrossEntropyLoss()),
            (None, 5, torch.tensor([[4], [0], [2]]), lambda x, y: nn.CrossEntropyLoss()(x, y[:, 0])),
            (None, 5, torch.tensor([4, -100, 2]), nn.CrossEntropyLoss()),
            ("multi_label_classification", 5, torch.eye(5)[:3], nn.BCEWithLogitsLoss()),
            (
                "multi_label_classification",
                5,
                torch.eye(5)[1:4].long(),
                lambda x, y: nn.BCEWithLogitsLoss()(x, y * 1.0),
            ),
            ("regression", 5, torch.randn(3, 5, generator=LABELS), nn.MSELoss()),
            ("regression", 1, torch.randn(3, generator=LABELS), lambda x, y: nn.MSELoss()(x[:, 0], y)),
            (None, 1, torch.randn(3, 1, generator=LABELS), nn.MSELoss()),
        ],
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_loss(self, problem_type, num_labels, labels, expected, training):
        model = make(
            RefinerForImageClassification, problem_type=problem_type, num_labels=num_labels, use_dense_head=False
        ).train(training)
        outputs = model(inputs_of(RefinerModel)["pixel_values"], labels=labels)
        assert_close(outputs.loss, expected(outputs.logits, labels), 1e-6)
        outputs.loss.backward()
        assert model.classifier.weight.grad.any()
        # Unlike transformers, which writes down what it inferred: labels of another kind may follow.
        assert model.config.problem_type == problem_type

    def test_floats_without_a_problem_type_are_soft_labels(self):
        """Unlike transformers, which takes them for several labels an image: here mixup and distillation need them."""
        model = make(RefinerForImageClassification, use_dense_head=False)
        labels = torch.softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), 1)
        outputs = model(inputs_of(RefinerModel)["pixel_values"], labels=labels)
        assert_close(outputs.loss, nn.CrossEntropyLoss()(outputs.logits, labels), 1e-6)

    @pytest.mark.parametrize(
        "num_labels",
        [1, 5],
    )
    def test_regression_targets_keep_their_precision_in_half(self, num_labels):
        model = make(
            RefinerForImageClassification, problem_type="regression", num_labels=num_labels, use_dense_head=False
        )
        labels = torch.full((3, num_labels), 257.0)  # bfloat16 has 256 and 258
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs_of(RefinerModel)["pixel_values"], labels=labels)
        assert outputs.logits.dtype == torch.bfloat16
        assert_close(outputs.loss, (outputs.logits.float() - labels).square().mean(), 1e-5)
