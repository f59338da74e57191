"""Cross-validation."""

import pytest

from refiner_hf.commands.train import main
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.sources import load_image_data

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos", 20)


def paths(rows):
    return {row["image"]["path"] for row in rows}


def test_every_image_is_measured_on_once(photos):
    parts = []
    for fold in (1, 2, 3):
        args = DataArguments(train_dir=str(photos), k_folds=3, fold=fold)
        data = load_image_data(args, need_train=True, need_evaluation=True, seed=0)
        assert paths(data.train) | paths(data.evaluation) == paths(photos_of(photos))
        assert not paths(data.train) & paths(data.evaluation)
        assert data.evaluation_split.endswith(f"held out of train, fold {fold} of 3")
        parts.append(paths(data.evaluation))
    assert sum(map(len, parts)) == 60 == len(set.union(*parts))


def photos_of(folder):
    return [{"image": {"path": str(file.resolve())}} for file in folder.rglob("*.png")]


def test_a_folder_for_each_and_numbers_for_all(photos, tmp_path, capsys):
    words = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, "--k_folds", "3"]
    result = main(words)
    said, summary = capsys.readouterr().out, load_json(tmp_path / "out" / "k_folds.json")
    measured = [load_json(tmp_path / "out" / f"fold_{i}" / "eval_results.json") for i in (1, 2, 3)]
    accuracies = [each["eval_accuracy"] for each in measured]
    assert summary["eval_accuracy"]["folds"] == result.metrics["eval_accuracy"] == accuracies
    assert summary["eval_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert "baseline_accuracy" in summary and "eval_runtime" not in summary
    assert "Measured on 3 folds" in said and "eval_accuracy" in said
    assert (tmp_path / "out" / "fold_2" / "README.md").exists()
    # Again: nothing is trained.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refiner_hf.training.folds.run", None)
        assert main(words).metrics == result.metrics


def test_finished_folds_stay_after_an_interruption(photos, tmp_path, monkeypatch):
    from refiner_hf.training import folds

    words = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, "--k_folds", "2"]
    run, begun = folds.run, []

    def stop(model_args, data_args, *args):
        begun.append(data_args.fold)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return run(model_args, data_args, *args)

    monkeypatch.setattr(folds, "run", stop)
    with pytest.raises(SystemExit):
        main(words)
    assert not (tmp_path / "out" / "k_folds.json").exists()
    main(words)
    assert begun == [1, 2, 2] and (tmp_path / "out" / "k_folds.json").exists()


def test_one_fold_alone(photos, tmp_path):
    words = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK]
    result = main([*words, "--k_folds", "4", "--fold", "2"])
    assert result.trained and "fold 2 of 4" in result.data.evaluation_split


def test_with_auto(photos, tmp_path, capsys):
    words = ["--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--k_folds", "2", "--max_steps", "2"]
    result = main([*words, "--use_cpu", "--report_to", "none"])
    assert len(result.metrics["eval_accuracy"]) == 2 and "Chosen" in capsys.readouterr().out
    assert (tmp_path / "out" / "fold_1" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--k_folds", "1"], "--k_folds must be at least 2"),
        (["--k_folds", "2", "--validation_dir", "."], "divides the training images by itself"),
        (["--fold", "2"], "--fold must be a number from 1 to --k_folds"),
        (["--k_folds", "2", "--fold", "3"], "--fold must be a number from 1 to --k_folds"),
        (["--k_folds", "2", "--push_to_hub"], "none is pushed"),
        (["--k_folds", "2", "--do_train"], "trains and measures"),
    ],
)
def test_refused(photos, tmp_path, words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, *words])
    assert says in f"{ended.value} {capsys.readouterr().err}"
