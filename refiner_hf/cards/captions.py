"""The captions of a card's pictures."""

from ..utils.text import counted


MOST_NAMED_LABELS = 40  # of more, a picture has no names and a table no rows

LEARNING_CURVE = (
    "Loss and accuracy during training. The training loss includes regularisation and the loss of a dense head."
)
MISTAKES = "Evaluation pictures that it gave a wrong label, those with the highest scores, and these labels"
PREDICTIONS = "Pictures of the evaluation set, as 'true label: prediction, score'"
OVERVIEW = "Where the class token looks in an evaluation picture, averaged over heads"


def confusion_matrix(split: str) -> str:
    """Of the evaluation on `split`."""
    return f"Confusion matrix on {split}"


def curves(images: int, refines: bool) -> str:
    """Of an analysis on so many images. In a network that refines there are maps before refinement."""
    before = "; hollow dots: maps before their refinement" if refines else ""
    return (
        f"Each layer's attention maps and tokens, measured on {counted(images, 'evaluation image')} (bands: standard "
        f"deviation; of CKA, standard error{before})"
    )


def layers(images: int) -> str:
    """Of the same analysis."""
    return (
        f"Similarity of the maps and features of different layers, measured on {counted(images, 'evaluation image')}"
    )


def heads(layer: int) -> str:
    """Of one layer's maps; its number is from 1."""
    return f"The same for each head, through the refinement in layer {layer}"
