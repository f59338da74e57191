"""
Make label maps for token labelling: what a teacher sees where in each training image.

Goes on where it broke off. Any transformers or timm image classifier can be the teacher; its labels should be those of
the data. Then train with --label_map_dir.

    refiner-label-maps --teacher google/vit-base-patch16-224 --dataset_name imagenet-1k --output_dir maps
    refiner-label-maps --teacher timm/dm_nfnet_f6.dm_in1k --image_size 576 --train_dir imagenet/train --output_dir maps
    refiner-label-maps --teacher my_classifier --train_dir photos --output_dir maps     # photos/LABEL/*.jpg
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ..data.arguments import DataArguments
from ..data.checking import find_unreadable, raise_if_unreadable
from ..data.sources import load_image_data
from ..labelling.make import make_label_maps
from ..labelling.teachers import load_teacher
from .parsing import HelpFormatter, pick_device
from .running import command


@dataclass
class LabelMapArguments:
    teacher: str = field(
        metadata={"help": "Folder or Hub name of a transformers classifier; timm/NAME; a folder that timm saved."}
    )
    output_dir: str = field(metadata={"help": "Folder for the maps."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a transformers teacher on the Hub. Default: main."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images that the teacher sees, in pixels. Default: its own."}
    )
    top_k: int = field(default=5, metadata={"help": "How many classes of each place are kept."})
    batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    shard_size: int = field(default=10_000, metadata={"help": "Images in a file; at most so many are made anew."})
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda. Default: cuda where there is one."})

    def __post_init__(self):
        for name in ("top_k", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@command
def main(argv: list[str] | None = None) -> None:
    """Entry point of `refiner-label-maps` and scripts/make_label_maps.py."""
    parser = HfArgumentParser(
        (LabelMapArguments, DataArguments), description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    args, data_args = parser.parse_args_into_dataclasses(argv)
    if data_args.streaming:
        raise ValueError("Label maps are made of a data set that is here: drop --streaming.")
    device, teacher = pick_device(args.device), load_teacher(args.teacher, args.image_size, args.revision)
    data = load_image_data(data_args, need_train=True, need_evaluation=False, seed=0)
    images, unreadable = find_unreadable(data.train, "training")
    if data_args.unreadable_images == "stop":
        raise_if_unreadable(unreadable)
    try:
        facts = make_label_maps(
            images,
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
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("The same command goes on with the images that have no maps yet.") from interrupt
    share = facts["agreeing"] / facts["images"]
    print(f"Label maps of {facts['images']:,} images, {facts['rows']} x {facts['columns']} places: {args.output_dir}")
    print(f"The teacher gives {share:.1%} of the images the label that they have.")


if __name__ == "__main__":
    main()
