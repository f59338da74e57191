"""The temperature that makes scores say how often they are right."""

import json

import numpy as np
import pytest
import torch

from refiner_hf.commands.train import main
from refiner_hf.training.calibration import fit_temperature
from refiner_hf.utils.loading import load_classifier_and_processor

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


def drawn(temperature: float, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are drawn from their softmax at that temperature."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (images, 5))
    scores = torch.tensor(logits / temperature).softmax(-1).numpy()
    return logits, np.array([random.choice(5, p=each / each.sum()) for each in scores])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_finds_the_temperature_that_labels_were_drawn_with(temperature):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.1)


def test_stays_finite_where_every_answer_is_right():
    logits = np.eye(3).repeat(4, 0)
    assert fit_temperature(logits, np.arange(3).repeat(4)) == pytest.approx(0.05, rel=0.05)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos", 24)


SEVERAL = {"use_dense_head": True, "use_distillation_token": True, "use_distillation_head": True}
HEADS = {"one": {}, "dense and distilled": SEVERAL}


@pytest.mark.parametrize("heads", list(HEADS))
def test_answers_stay_and_the_saved_scores_are_divided(photos, tmp_path, heads):
    """The same training with and without: the weights differ in the heads alone, and the logits by the temperature."""
    overrides = json.loads(QUICK[1]) | HEADS[heads]
    logits, results = [], []
    for name, words in (("raw", []), ("calibrated", ["--calibrate"])):
        out = tmp_path / name
        main(
            ["defaults", "--train_dir", str(photos), "--output_dir", str(out), *QUICK, "--config_overrides",
             json.dumps(overrides), "--ema_decay", "0.5", *words]
        )  # fmt: skip
        results.append(load_json(out / "eval_results.json"))
        for folder in (out, out / "ema"):
            model, processor = load_classifier_and_processor(str(folder))
            with torch.no_grad():
                logits.append(model(torch.ones(2, 3, 16, 16) * torch.tensor([0.3, -0.5])[:, None, None, None]).logits)
    raw, raw_average, divided, divided_average = logits
    temperature = load_json(tmp_path / "calibrated" / "train_results.json")["temperature"]
    torch.testing.assert_close(divided * temperature, raw, rtol=1e-4, atol=1e-5)
    ratio = raw_average / divided_average
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert results[0]["eval_accuracy"] == results[1]["eval_accuracy"]
    assert results[1]["eval_loss"] <= results[0]["eval_loss"]
    card = (tmp_path / "calibrated" / "README.md").read_text()
    assert f"logits divided by {temperature:.3g}" in card and "have not been calibrated" not in card


def test_an_adapters_head_is_divided(photos, tmp_path):
    main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "base"), *QUICK])
    words = QUICK[QUICK.index("--num_train_epochs") :]
    main(
        ["defaults", "--model_name_or_path", str(tmp_path / "base"), "--train_dir", str(photos), "--adapter", "lora",
         "--output_dir", str(tmp_path / "out"), *words, "--calibrate"]
    )  # fmt: skip
    temperature = load_json(tmp_path / "out" / "train_results.json")["temperature"]
    assert temperature != 1 and (tmp_path / "out" / "adapter_model.safetensors").exists()
    measured = load_json(tmp_path / "out" / "eval_results.json")
    again = main(
        ["--model_name_or_path", str(tmp_path / "out"), "--train_dir", str(photos), "--do_eval", "--use_cpu",
         "--output_dir", str(tmp_path / "again"), "--report_to", "none"]
    )  # fmt: skip
    assert again.metrics["eval_loss"] == pytest.approx(measured["eval_loss"], rel=1e-4)


def test_needs_a_training_with_evaluation(photos, tmp_path):
    with pytest.raises(SystemExit, match="--calibrate is for a training with evaluation images"):
        main(
            ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path), *QUICK, "--do_train",
             "--calibrate"]
        )  # fmt: skip
