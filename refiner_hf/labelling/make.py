"""Makes label maps of a data set, shard by shard."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Sequence, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.images import EncodedImage
from ..data.label_maps import CLASSES, FACTS_FILE, KEY, SCORES, key_of
from ..data.sources import IMAGE_COLUMN, LABEL_COLUMN
from ..utils.files import read_json, write_json
from ..utils.locking import LOCK, locked_folder
from ..utils.processes import Processes
from ..utils.resuming import check_same_facts
from ..utils.text import counted
from .teachers import Teacher


logger = logging.get_logger(__name__)

AGREES = "agrees"  # a column: whether the teacher gives the image its label
_ELSEWHERE = "Give another --output_dir."


class _ForTeacher(torch.utils.data.Dataset):
    """Encoded rows to (key, pixels, label)."""

    def __init__(self, data: Dataset, teacher: Teacher):
        self.data, self.prepare = data, teacher.prepare

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor, int]:
        row = self.data[number]
        image = EncodedImage(row[IMAGE_COLUMN])
        return key_of({"bytes": image.content}), self.prepare(image.decode()), row[LABEL_COLUMN]


def make_label_maps(
    data: Dataset,
    labels: list[str],
    teacher: Teacher,
    folder: Path,
    *,
    teacher_name: str,
    top_k: int = 5,
    batch_size: int = 64,
    shard_size: int = 10_000,
    num_workers: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """
    Writes `label_maps-00000.parquet` and so on, and `label_maps.json`. An interrupted run continues with the shards
    that aren't there. Processes that torchrun or accelerate has started divide the shards.

    Args:
        data (`datasets.Dataset`): encoded rows.
        labels (`list[str]`): the data's labels. The maps' classes are numbered like these.
        teacher ([`Teacher`]), teacher_name (`str`): the classifier that scores each place, and its name for
            the record.
        folder (`Path`): where to write; empty, or with the maps that are to be continued.
        top_k (`int`): how many classes of each place are kept.
        batch_size (`int`), num_workers (`int`), device (`str`): how the teacher is run.
        shard_size (`int`): images in a file.

    Returns:
        the facts in `label_maps.json`.

    Raises:
        `ValueError`: there are no images, the teacher's labels aren't the data's, or the folder holds other maps.
        `OSError`: the folder can't be written, or another process writes to it.
    """
    if len(data) == 0:
        raise ValueError("There are no images to make label maps of: none of them can be read.")
    columns = match_teacher(teacher.labels, teacher.num_labels, labels)
    top_k = min(top_k, len(labels))
    facts: dict[str, Any] = {
        "teacher": teacher_name,
        "labels": labels,
        "images": len(data),
        "image_size": list(teacher.size),
        "top_k": top_k,
        "shard_size": shard_size,
    }
    processes = Processes()
    files = [folder / f"label_maps-{shard:05}.parquet" for shard in range(math.ceil(len(data) / shard_size))]
    with ExitStack() as held:
        begun: dict[str, Any] = {}
        if processes.is_first:
            held.enter_context(locked_folder(folder))
            begun = _begin(folder, facts)
        to_do = processes.from_first([shard for shard, file in enumerate(files) if not file.exists()])
        done = len(data) - sum(len(_rows_of(shard, data, shard_size)) for shard in to_do)
        device = processes.device(device)
        teacher.model.to(device)
        hidden = not processes.is_first
        with tqdm(total=len(data), initial=done, unit="image", desc="Label maps", disable=hidden) as progress:
            for shard in to_do[processes.number :: processes.count]:
                rows = data.select(_rows_of(shard, data, shard_size))
                loader = DataLoader(_ForTeacher(rows, teacher), batch_size, num_workers=num_workers)
                content, grid = _maps(teacher, loader, device, columns, top_k, progress)
                if processes.is_first and "rows" not in begun:
                    begun |= grid
                    write_json(folder / FACTS_FILE, facts | grid)
                _write_shard(files[shard], content, top_k * math.prod(grid.values()))
        processes.of_all(None)  # all have come
        if processes.is_first:
            agreeing = sum(sum(Dataset.from_parquet(str(file))[AGREES]) for file in files)
            facts |= {name: begun[name] for name in ("rows", "columns")}
            facts |= {"shards": len(files), "agreeing": agreeing, "finished": True}
            write_json(folder / FACTS_FILE, facts)
        return processes.from_first(facts)


def _rows_of(shard: int, data: Dataset, shard_size: int) -> range:
    return range(shard * shard_size, min((shard + 1) * shard_size, len(data)))


def _maps(
    teacher: Teacher, loader: DataLoader, device: str, columns: list[int] | None, top_k: int, progress: tqdm
) -> tuple[dict[str, list], dict[str, int]]:
    """A shard's columns, and how many rows and columns of places a map has."""
    content: dict[str, list] = {KEY: [], SCORES: [], CLASSES: [], AGREES: []}
    for keys, pixels, truth in loader:
        scores = _scores(teacher, pixels.to(device), columns)
        best = scores.topk(top_k, dim=1)
        content[KEY] += keys.tolist()
        content[SCORES] += list(best.values.half().flatten(1).cpu().numpy())
        content[CLASSES] += list(best.indices.short().flatten(1).cpu().numpy())
        content[AGREES] += (scores.float().softmax(1).mean((2, 3)).argmax(1).cpu() == truth).tolist()
        progress.update(len(keys))
    return content, {"rows": scores.shape[2], "columns": scores.shape[3]}


def match_teacher(teacher_labels: list[str] | None, count: int, labels: list[str]) -> list[int] | None:
    """
    Which of the teacher's `count` labels is each of the data's; `None` where they are the same.

    Raises:
        `ValueError`: neither their names nor their number fit.
    """
    if teacher_labels == labels:
        return None
    if teacher_labels is not None and set(labels) <= set(teacher_labels):
        return [teacher_labels.index(label) for label in labels]
    if count == len(labels):
        logger.warning(
            f"The teacher's labels have other names than the data's: its first is taken for {labels[0]!r}, its last "
            f"for {labels[-1]!r}. Check how often it agrees."
        )
        return None
    raise ValueError(
        f"The teacher knows {counted(count, 'label')}, such as {(teacher_labels or ['(without names)'])[:3]}, and the "
        f"data has {len(labels)}, such as {labels[:3]}. Fine-tune the teacher on the data's labels, or name these "
        "like its own."
    )


@torch.no_grad()
def _scores(teacher: Teacher, pixels: torch.Tensor, columns: list[int] | None) -> torch.Tensor:
    scores = teacher(pixels)
    return scores if columns is None else scores[:, columns]


def _begin(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the folder holds already."""
    file = folder / FACTS_FILE
    if not file.exists():
        if any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(f"{folder} isn't empty and holds no label maps. {_ELSEWHERE}")
        write_json(file, facts)
        return {}
    try:
        begun = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error} Remove the folder, or give another --output_dir.") from error
    check_same_facts(begun, facts, f"{folder} holds label maps", _ELSEWHERE)
    return begun


def _write_shard(file: Path, content: dict[str, list], length: int) -> None:
    features = Features(
        {
            KEY: Value("int64"),
            SCORES: Sequence(Value("float16"), length=length),
            CLASSES: Sequence(Value("int16"), length=length),
            AGREES: Value("bool"),
        }
    )
    unfinished = file.with_suffix(".unfinished")
    try:
        Dataset.from_dict(content, features=features).to_parquet(str(unfinished))
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
