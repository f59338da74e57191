"""
Fine-tune a BERT on a task of GLUE, as it is and refined: the paper's experiment with texts, with the options of
transformers' own example. Needs the Hub, but for --train_file and --validation_file (CSV or JSON lines with columns
sentence1, perhaps sentence2, and label).

    python scripts/train_glue.py --task_name sst2 --output_dir outputs/sst2_plain
    python scripts/train_glue.py --task_name sst2 --refine --output_dir outputs/sst2_refined
    python scripts/train_glue.py --train_file train.csv --validation_file dev.csv --refine --output_dir outputs/mine

All but the refinement is the same in both, so run each task with and without --refine, with several --seed. What
`TrainingArguments` has is an option, too. An interrupted run continues with --resume_from_checkpoint.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from refiner_hf import NormStatisticsCallback, refine
from refiner_hf.choices_refiner import REFINEMENT_NAMES


# By task: its columns of texts, and how its validation split is called.
TASKS = {
    "cola": (("sentence",), "validation"),
    "sst2": (("sentence",), "validation"),
    "mrpc": (("sentence1", "sentence2"), "validation"),
    "stsb": (("sentence1", "sentence2"), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
    "qnli": (("question", "sentence"), "validation"),
    "rte": (("sentence1", "sentence2"), "validation"),
    "wnli": (("sentence1", "sentence2"), "validation"),
}


@dataclass
class GlueArguments:
    task_name: str | None = field(default=None, metadata={"help": "Task of GLUE.", "choices": list(TASKS)})
    train_file: str | None = field(default=None, metadata={"help": "Own texts in place of a task: CSV or JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "The same to measure on."})
    model_name_or_path: str = field(
        default="google/bert_uncased_L-4_H-512_A-8", metadata={"help": "Folder or Hub name; default: BERT-small."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})
    refine: bool = field(default=False, metadata={"help": "Put refinements into the model before it is trained."})
    refinement: str = field(
        default="expansion_convolution", metadata={"help": "Kind of refinement.", "choices": REFINEMENT_NAMES}
    )
    expansion_ratio: int = field(default=3, metadata={"help": "Expanded heads per head."})
    refinement_kernel_size: int = field(default=3, metadata={"help": "Side of the kernel over the maps, odd."})
    norm_statistics_texts: int = field(
        default=256, metadata={"help": "Texts over which the norms' statistics are estimated before each evaluation."}
    )

    def __post_init__(self):
        if (self.task_name is None) == (self.train_file is None or self.validation_file is None):
            raise ValueError("Give --task_name, or --train_file and --validation_file.")


def load(args: GlueArguments) -> tuple[DatasetDict, tuple[str, ...], str]:
    """The texts, the columns that hold them, and the split to measure on."""
    if args.task_name is not None:
        return load_dataset("nyu-mll/glue", args.task_name), *TASKS[args.task_name]
    kind = "csv" if Path(args.train_file).suffix == ".csv" else "json"
    data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    columns = tuple(name for name in ("sentence1", "sentence2") if name in data["train"].column_names)
    if not columns or "label" not in data["train"].column_names:
        raise ValueError(f"{args.train_file} must have columns sentence1, perhaps sentence2, and label.")
    return data, columns, "validation"


def metric_of(args: GlueArguments, regression: bool):
    """What the task is measured by: `evaluate`'s for GLUE; for own texts the accuracy."""
    official = None if args.task_name is None else evaluate.load("glue", args.task_name)

    def compute(answers) -> dict[str, float]:
        predictions = answers.predictions[:, 0] if regression else answers.predictions.argmax(-1)
        if official is not None:
            return official.compute(predictions=predictions, references=answers.label_ids)
        return {"accuracy": float(np.mean(predictions == answers.label_ids))}

    return compute


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((GlueArguments, TrainingArguments), description=__doc__)
    args, training = parser.parse_args_into_dataclasses(argv)
    set_seed(training.seed)
    data, columns, measured_on = load(args)
    regression = args.task_name == "stsb"
    labels = 1 if regression else len(set(data["train"].unique("label")))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=labels)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config)

    def prepare(rows):
        return tokenizer(*(rows[name] for name in columns), truncation=True, max_length=args.max_seq_length)

    splits = {name: data[name] for name in ("train", measured_on)}
    prepared = {
        name: rows.map(prepare, batched=True, remove_columns=[c for c in rows.column_names if c != "label"])
        for name, rows in splits.items()
    }
    collate, callbacks = DataCollatorWithPadding(tokenizer), []
    if args.refine:
        options = {name: getattr(args, name) for name in ("refinement", "expansion_ratio", "refinement_kernel_size")}
        refine(model, data["train"].select_columns(list(columns)), tokenizer, **options)
        some = (
            prepared["train"]
            .shuffle(seed=training.seed)
            .select(range(min(args.norm_statistics_texts, len(prepared["train"]))))
        )
        callbacks.append(NormStatisticsCallback(some, training.per_device_eval_batch_size, collate))
    trainer = Trainer(
        model,
        training,
        train_dataset=prepared["train"],
        eval_dataset=prepared[measured_on],
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=metric_of(args, regression),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    found = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", found)
    print(json.dumps({"task": args.task_name or args.train_file, "refined": args.refine, **found}, indent=1))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
