"""
Publish a finished folder on the Hub, in one commit: weights, configuration, image processor, card, pictures, results,
and the model's code if asked. The folder isn't changed. After a failure the same command continues.

    refiner push --folder outputs/demo --repo_id USER/my-refiner --verify
    refiner push --folder out --repo_id my-refiner --private --with_code
    refiner push --folder out --repo_id SOMEBODY/their-refiner --create_pr
    refiner push --folder out --repo_id LAB/my-refiner --branch trial --tag v1 --message "Trained for longer"
"""

from dataclasses import dataclass, field

from .options import check_there
from .running import command


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Folder of a finished run, of a conversion, or of save_pretrained."})
    repo_id: str = field(metadata={"help": "NAME in your own namespace, or NAMESPACE/NAME. Made if it isn't there."})
    private: bool = field(
        default=False, metadata={"help": "Make the repository private. Refused if it exists and is public."}
    )
    public: bool = field(
        default=False,
        metadata={
            "help": "The repository must be public. Without both options an existing one stays as it is, and a new "
            "one is as its namespace has it."
        },
    )
    branch: str | None = field(default=None, metadata={"help": "Branch to write to. Made if it isn't there."})
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request instead, also in somebody else's repository."}
    )
    tag: str | None = field(default=None, metadata={"help": "Tag to put on the commit. Must be new."})
    message: str = field(default="Upload with refiner_hf", metadata={"help": "Message of the commit."})
    token: str | None = field(default=None, metadata={"help": "By default that of `hf auth login` or HF_TOKEN."})
    with_code: bool = field(
        default=False,
        metadata={"help": "Publish the model's code too, for trust_remote_code where this package isn't installed."},
    )
    verify: bool = field(
        default=False,
        metadata={"help": "Load the model back from the Hub in a fresh process, and compare both models' outputs."},
    )

    def __post_init__(self):
        if self.private and self.public:
            raise ValueError("Private or public? Give only one of --private and --public.")


@command(PushArguments)
def main(args: PushArguments) -> None:
    """Publishes the folder."""
    check_there(args.folder)
    from ..hub.publish import publish_folder
    from ..hub.verification import verify

    published = publish_folder(
        args.folder,
        args.repo_id,
        private=True if args.private else False if args.public else None,
        branch=args.branch,
        tag=args.tag,
        create_pr=args.create_pr,
        token=args.token,
        message=args.message,
        with_code=args.with_code,
    )
    print(f"Published: {published.url} (commit {published.commit[:8]})")
    if args.verify:
        difference = verify(published, token=args.token)
        print(f"Loaded back from the Hub in a fresh process: largest difference of an output {difference:g}.")
