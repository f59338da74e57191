"""What a training would do, without training."""

import numpy as np
import pytest
from PIL import Image

from refiner_hf.commands.train import main

from ..images import write_folder
from .test_run import QUICK


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", 12)


def test_says_and_draws(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("refiner_hf.training.trainer.RefinerTrainer.train", None)  # it isn't called
    options = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK]
    main([*options, "--dry_run", "--mixup", "0.8", "--random_erasing", "0.25", "--push_to_hub"])
    said = capsys.readouterr().out
    assert "Nothing was trained" in said and "3 labels" in said and "24 x 30" not in said
    assert "30 x 24 pixels (median), from 24 to 30 on a side" in said
    assert "crops: from 35% of an image, mirrored: half of them, erasing: 0.25, mixup: 0.8" in said
    assert "1 epochs of" in said and "learning rate 0.002" in said and "parameters" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["_dry_run.png"]
    assert min(Image.open(tmp_path / "out" / "_dry_run.png").size) > 300


def test_boxes_are_erased(photos, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("refiner_hf.training.dry_run.plot_predictions", lambda pictures, *_: drawn.append(pictures))
    for share in ("0", "1"):
        options = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / share), *QUICK]
        main([*options, "--dry_run", "--random_erasing", share])
    plain, erased = np.array(drawn)  # (images, height, width, 3)
    changed = (plain != erased).any(-1).mean((1, 2))
    assert len(changed) > 1 and 0 < changed.min() and changed.max() < 0.5


def test_the_training_may_follow(photos, tmp_path):
    options = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK]
    main([*options, "--dry_run"])
    result = main([*options, "--max_steps", "1", "--eval_strategy", "no"])
    assert result.trained and (tmp_path / "out" / "model.safetensors").exists()


def test_refused(tmp_path):
    with pytest.raises(SystemExit, match="--dry_run is for a training"):
        main(["--model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), "--do_eval", "--dry_run"])
