"""
Make label maps for token labelling: a teacher's scores for each place of each training image.

Any transformers or timm image classifier can be the teacher; it should know the labels of the data. An interrupted run
is continued by the same command; several processes or GPUs, started with torchrun or accelerate, divide the images.
Then train with --label_map_dir.

    refiner label-maps --teacher google/vit-base-patch16-224 --dataset_name imagenet-1k --output_dir maps
    refiner label-maps --teacher timm/dm_nfnet_f6.dm_in1k --image_size 576 --train_dir imagenet/train --output_dir maps
    refiner label-maps --teacher my_classifier --train_dir photos --output_dir maps     # photos/LABEL/*.jpg
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..data.arguments import DataArguments
from ..utils.text import counted
from .options import device_option, pick_device, revision_option
from .running import command, if_interrupted


@dataclass
class LabelMapArguments:
    teacher: str = field(
        metadata={"help": "Folder or Hub name of a transformers classifier; timm/NAME; a folder that timm saved."}
    )
    output_dir: str = field(metadata={"help": "Folder for the maps."})
    revision: str | None = revision_option("a transformers teacher")
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images that the teacher sees, in pixels. Default: its own."}
    )
    top_k: int = field(default=5, metadata={"help": "How many classes of each place are kept."})
    batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    shard_size: int = field(
        default=10_000,
        metadata={"help": "Images in a file. After an interruption at most so many are computed again."},
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})
    device: str | None = device_option()

    def __post_init__(self):
        for name in ("top_k", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@command(LabelMapArguments, DataArguments)
def main(args: LabelMapArguments, data_args: DataArguments) -> None:
    """Makes the maps, and says how often the teacher agrees with the labels."""
    if data_args.streaming:
        raise ValueError("Label maps can't be made of a stream: leave out --streaming.")
    from ..data.sources import load_image_data
    from ..data.unreadable import raise_if_unreadable
    from ..labelling.make import make_label_maps
    from ..labelling.teachers import load_teacher
    from ..utils.processes import Processes

    device, teacher = pick_device(args.device), load_teacher(args.teacher, args.image_size, args.revision)
    data = load_image_data(data_args, need_train=True, need_evaluation=False, seed=0)
    assert data.train is not None  # it was needed
    images, unreadable = data.train.readable("training")
    if data_args.unreadable_images == "stop":
        raise_if_unreadable(unreadable)
    with if_interrupted("The same command continues with the images that have no maps yet."):
        facts = make_label_maps(
            images.data,
            data.labels,
            teacher,
            Path(args.output_dir),
            teacher_name=args.teacher if args.revision is None else f"{args.teacher}@{args.revision}",
            top_k=args.top_k,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            num_workers=args.num_workers,
            device=device,
        )
    if not Processes().is_first:
        return
    share = facts["agreeing"] / facts["images"]
    done = counted(facts["images"], "image")
    print(f"Label maps of {done}, {facts['rows']} x {facts['columns']} places: {args.output_dir}")
    print(f"The teacher gives {share:.1%} of the images the label that they have.")
