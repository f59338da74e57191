"""Which options are chosen, from what images are like and how long a training may take; without training."""

import pytest

from refiner_hf.auto.choose import choose
from refiner_hf.auto.look import Facts
from refiner_hf.auto.options import to_arguments
from refiner_hf.auto.timing import Speed
from refiner_hf.configuration_refiner import RefinerConfig


SMALL = Facts(
    images=6000, labels=10, fewest=500, most=700, height=28, width=28, grey=True, evaluated=1000, for_statistics=512
)
PHOTOS = Facts(
    images=500, labels=5, fewest=50, most=200, height=480, width=640, grey=False, evaluated=90, for_statistics=500
)


def chosen(facts=SMALL, seconds=600.0, speed=0.1, halved=0.06, has_bf16=True, workers=0, processes=1, **given):
    """The choices, and the options of each trial; a step takes `speed` seconds, in bfloat16 `halved`."""
    tried = []

    def measure(options):
        tried.append(options)
        return Speed(step=halved if options.get("bf16") else speed, evaluated=0.001)

    choices = choose(
        facts, given, seconds=seconds, measure=measure, has_bf16=has_bf16, workers=workers, processes=processes
    )
    return choices, tried


def seconds_planned(choices, speed, facts, evaluated=0.001):
    options = choices.options
    steps = -(-facts.images // options["per_device_train_batch_size"])
    evaluations = options["num_train_epochs"] * steps / options["eval_steps"]
    return options["num_train_epochs"] * steps * speed + evaluations * evaluated * (
        facts.evaluated + facts.for_statistics
    )


def test_what_is_chosen_can_be_trained():
    for facts in (SMALL, PHOTOS):
        choices, _ = chosen(facts)
        model_args, _, _, args = to_arguments({**choices.options, "use_cpu": True})
        config = RefinerConfig(**model_args.overrides)
        assert config.image_height_width[0] % config.patch_height_width[0] == 0
        assert args.eval_strategy == args.save_strategy == "steps" and args.bf16
    assert all(row.value is not None for row in choices.rows)


@pytest.mark.parametrize("seconds", [60, 600, 7200])
def test_it_fits_into_the_time(seconds):
    choices, _ = chosen(seconds=seconds)
    planned = seconds_planned(choices, 0.06, SMALL)
    assert planned <= 0.9 * seconds
    assert planned > 0.7 * seconds or choices.options["num_train_epochs"] == 300


def test_evaluations_take_a_tenth_of_the_time_at_most():
    many = Facts(**{**vars(SMALL), "evaluated": 10_000})
    choices, _ = chosen(many, seconds=600)
    once = 0.001 * 10_512
    options = choices.options
    evaluations = round(options["num_train_epochs"] * 94 / options["eval_steps"])
    assert evaluations == int(60 / once) < 10


def test_at_least_one_epoch_and_two_evaluations():
    choices, _ = chosen(seconds=1, speed=10)
    assert choices.options["num_train_epochs"] == 1 and choices.options["eval_steps"] == 47


def test_several_processes_share_the_images():
    one, _ = chosen(seconds=100)
    two, _ = chosen(seconds=100, processes=2)
    assert two.options["num_train_epochs"] == pytest.approx(2 * one.options["num_train_epochs"], abs=1)


@pytest.mark.parametrize("halved, taken", [(0.06, True), (0.095, False), (0.2, False)])
def test_bfloat16_only_where_it_is_faster(halved, taken):
    choices, tried = chosen(halved=halved)
    assert choices.options["bf16"] is taken
    assert [options.get("bf16", False) for options in tried] == [False, True]
    assert seconds_planned(choices, halved if taken else 0.1, SMALL) <= 0.9 * 600


def test_a_machine_without_bfloat16_is_not_tried():
    choices, tried = chosen(has_bf16=False)
    assert len(tried) == 1 and "bf16" not in choices.options


def test_workers_prepare_images_where_there_are_cores_for_them():
    assert "dataloader_num_workers" not in chosen()[0].options
    choices, tried = chosen(workers=6)
    workers = {"dataloader_num_workers": 6, "dataloader_persistent_workers": True}
    assert all(options.items() >= workers.items() for options in (choices.options, *tried))
    given, _ = chosen(workers=6, dataloader_num_workers=0)  # torch refuses persistent workers where there are none
    assert given.options["dataloader_num_workers"] == 0 and not given.options["dataloader_persistent_workers"]


@pytest.mark.parametrize("length", [{"num_train_epochs": 3}, {"max_steps": 20}])
def test_with_a_given_length_nothing_is_timed(length):
    choices, tried = chosen(**length)
    assert not tried and choices.options.items() >= length.items()
    assert choices.options["eval_steps"] == round(length.get("max_steps", 3 * 94) / 10)


class TestGiven:
    """Any option overrides."""

    def test_options(self):
        choices, _ = chosen(learning_rate=0.1, bf16=False, per_device_train_batch_size=16)
        assert choices.options["learning_rate"] == 0.1 and choices.options["bf16"] is False
        rows = {row.name: row for row in choices.rows}
        assert rows["learning_rate"].reason == "given" and rows["weight_decay"].reason != "given"
        assert seconds_planned(choices, 0.1, SMALL) <= 0.9 * 600

    def test_fields_of_the_network(self):
        choices, _ = chosen(config_overrides={"hidden_size": 48, "use_conv_stem": False})
        network = choices.options["config_overrides"]
        assert network["hidden_size"] == 48 and network["use_conv_stem"] is False and network["patch_size"] == 4

    @pytest.mark.parametrize(
        "given, layers, types",
        [
            ({"num_hidden_layers": 3}, 3, ["plain", "shared_refined", "plain"]),
            ({"attention_types": ["plain"] * 4}, 4, ["plain"] * 4),
        ],
    )
    def test_number_and_kinds_of_layers_fit_each_other(self, given, layers, types):
        network = chosen(config_overrides=given)[0].options["config_overrides"]
        assert (network["num_hidden_layers"], network["attention_types"]) == (layers, types)

    @pytest.mark.parametrize("given", [{"image_size": 32}, {"config_overrides": {"image_size": 32}}])
    def test_the_patches_fit_a_given_size(self, given):
        choices, _ = chosen(PHOTOS, **given)
        assert choices.options["config_overrides"]["patch_size"] == 4

    def test_a_size_that_can_not_be_cut(self):
        with pytest.raises(ValueError, match="31 pixels can't be cut .*even --image_size"):
            chosen(image_size=31)

    def test_a_network_that_has_learned_stays_as_it_is(self):
        choices, _ = chosen(PHOTOS, model_name_or_path="somewhere")
        assert "config_overrides" not in choices.options and "timm_optim" not in choices.options
        assert choices.options["learning_rate"] < 0.001

    def test_a_published_network_is_taken_whole(self):
        choices, _ = chosen(PHOTOS, model_size="small")
        assert "config_overrides" not in choices.options and choices.options["model_size"] == "small"


@pytest.mark.parametrize("side, size, patch", [(8, 16, 2), (28, 28, 4), (33, 32, 4), (64, 64, 8), (480, 64, 8)])
def test_size_and_patches(side, size, patch):
    choices, _ = chosen(Facts(**{**vars(SMALL), "height": side, "width": 2 * side}))
    network = choices.options["config_overrides"]
    assert (network["image_size"], network["patch_size"]) == (size, patch)


def test_mirrored_only_where_it_is_said():
    assert chosen()[0].options["horizontal_flip"] is False
    assert chosen(horizontal_flip=True)[0].options["horizontal_flip"] is True
