"""
What a training step takes and aims at: normalised pixels, smoothed labels, dense targets of label maps, mixup, cutmix.

Made where the step runs and not by the processes that load images: pixels as numbers and dense targets are larger than
the images themselves. Shapes: B batch, K labels, k classes of a label map at each place, P patches.
"""

import torch
from timm.data import Mixup
from torch import nn
from torchvision.ops import roi_align

from ..choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..data.augmentation import NormalizeViews
from ..data.label_maps import BOX, FLIPPED, MAP_CLASSES, MAP_SCORES


class TrainingTargets:
    """
    Batches as they are loaded to batches that the model takes.

    Args:
        normalize ([`~refiner_hf.data.augmentation.NormalizeViews`], *optional*): for images that come as levels of 8
            bits. Without it they come as the model takes them.
        mixup ([`timm.data.Mixup`], *optional*): mixes images, and their targets alike. A batch of an odd number of
            images stays as it is.
        transposed_boxes (`bool`): see [`dense_targets`].
        class_weights (`torch.Tensor` of shape (K,), *optional*): how much each label counts in the loss.
    """

    def __init__(
        self,
        *,
        normalize: NormalizeViews | None = None,
        mixup: Mixup | None = None,
        transposed_boxes: bool = False,
        class_weights: torch.Tensor | None = None,
    ):
        self.normalize, self.mixup = normalize, mixup
        self.transposed_boxes, self.class_weights = transposed_boxes, class_weights

    def __call__(
        self,
        inputs: dict[str, torch.Tensor],
        num_labels: int,
        grid: tuple[int, int],
        smoothing: float = 0.0,
        problem_type: str = SINGLE_LABEL,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            inputs: `pixel_values`, `labels`, and what belongs to label maps where there are some.
            num_labels (`int`): K.
            grid (`tuple[int, int]`): rows and columns of patches.
            smoothing (`float`, *optional*, defaults to 0.0): share of each target that is spread evenly over all
                labels; see [`smooth_labels`].
            problem_type (`str`, *optional*, defaults to `"single_label_classification"`): as in a configuration.

        Returns:
            `inputs` with soft labels (B, K) or dense ones (B, K, 2 + P), or numbers for regression; as they were where
            there is nothing to do.

        Raises:
            `ValueError`: label maps, smoothing or weights for a problem that they don't go with, or images that nobody
                normalises.
        """
        inputs = dict(inputs)
        if self.normalize is not None:
            inputs["pixel_values"] = self.normalize(inputs["pixel_values"])
        elif (pixels := inputs.get("pixel_values")) is not None and pixels.dtype == torch.uint8:
            raise ValueError(
                "pixel_values are levels from 0 to 255, which a model doesn't take: give "
                "TrainingTargets(normalize=NormalizeViews(processor))."
            )
        label_maps = {name: inputs.pop(name) for name in (MAP_SCORES, MAP_CLASSES, BOX, FLIPPED) if name in inputs}
        if label_maps:
            if problem_type != SINGLE_LABEL:
                raise ValueError(f"Label maps are for images of one label each, not for {problem_type}.")
            inputs["labels"] = dense_targets(
                scores=label_maps[MAP_SCORES],
                classes=label_maps[MAP_CLASSES],
                boxes=label_maps[BOX],
                flipped=label_maps[FLIPPED],
                labels=inputs["labels"],
                num_labels=num_labels,
                grid=grid,
                smoothing=smoothing,
                transposed_boxes=self.transposed_boxes,
            )
        elif smoothing or self.mixup or self.class_weights is not None:
            inputs["labels"] = smooth_labels(inputs["labels"], num_labels, smoothing, problem_type)
        if self.mixup and len(inputs["labels"]) % 2 == 0:
            inputs["pixel_values"], share = _mix(self.mixup, inputs["pixel_values"])
            inputs["labels"] = share * inputs["labels"] + (1 - share) * inputs["labels"].flip(0)
        if self.class_weights is not None:
            if problem_type != SINGLE_LABEL:
                raise ValueError(f"Class weights are for images of one label each, not for {problem_type}.")
            labels = inputs["labels"]  # the cross-entropy is linear in them
            weights = self.class_weights.to(labels)
            inputs["labels"] = labels * (weights if labels.ndim == 2 else weights[:, None])
        return inputs


def smooth_labels(
    labels: torch.Tensor, num_labels: int, smoothing: float, problem_type: str = SINGLE_LABEL
) -> torch.Tensor:
    """
    Smoothed targets, as floating point numbers.

    - One label an image: soft labels (images, labels), `1 - smoothing` on the given ones, `smoothing` spread evenly
      over all.
    - Several labels an image (`"multi_label_classification"`): each label is a question of its own with two answers,
      so that each 0 or 1 goes `smoothing` of the way to 1/2.
    - Numbers (`"regression"`) have no labels to spread anything over; with `smoothing` 0 they stay what they are.

    Args:
        labels (`torch.Tensor`): integers (images,) or soft labels (images, labels); zeros and ones (images, labels)
            of any type for several labels an image; numbers for regression.
        num_labels (`int`): how many there are.
        smoothing (`float`): from 0 to 1.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`): as in a configuration.

    Raises:
        `ValueError`: smoothing for a regression.
    """
    if problem_type == REGRESSION:
        if smoothing:
            raise ValueError(
                "Label smoothing is for labels, and config.problem_type is 'regression', with numbers: set "
                "label_smoothing_factor to 0."
            )
        return labels.float()
    if problem_type == MULTI_LABEL:
        return (1 - smoothing) * labels.float() + smoothing / 2
    if not labels.is_floating_point():
        one_each = labels.numel() == len(labels)
        labels = nn.functional.one_hot(labels.reshape(-1).long(), num_labels).float() if one_each else labels.float()
    return (1 - smoothing) * labels + smoothing / num_labels


def dense_targets(
    *,
    scores: torch.Tensor,
    classes: torch.Tensor,
    boxes: torch.Tensor,
    flipped: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    grid: tuple[int, int],
    smoothing: float = 0.0,
    transposed_boxes: bool = False,
) -> torch.Tensor:
    """
    Targets of each image and of its patches from label maps: each map is cut, resized and flipped as its image was,
    and the scores become probabilities.

    Args:
        scores, classes (`torch.Tensor` of shape (B, k, rows, columns)): the label maps, of the whole images.
        boxes (`torch.Tensor` of shape (B, 4)): what was cut out of each image: left, top, right, bottom, in shares of
            its width and height.
        flipped (`torch.BoolTensor` of shape (B,)): whether it was flipped left to right afterwards.
        labels (`torch.Tensor` of shape (B,)): the images' own labels.
        num_labels (`int`): K.
        grid (`tuple[int, int]`): rows and columns of patches.
        smoothing (`float`, *optional*, defaults to 0.0): `s` of the label smoothing `y * (1 - s + s / K) + s / K`.
            (Of a target whose sum is 1 that makes 1 + s / K, in the reference as here.)
        transposed_boxes (`bool`, *optional*, defaults to `False`): take a box's x for y and the reverse, as the
            reference's code does: a crop of the right half then gets the labels of the lower half. For its numbers.

    Returns:
        `torch.Tensor` of shape (B, K, 2 + P): the image's own smoothed label, the target of the whole crop, one for
        each patch, row by row.
    """
    batch, _, rows, columns = scores.shape
    maps = scores.new_zeros(batch, num_labels, rows, columns, dtype=torch.float32)
    maps.scatter_(1, classes.long(), scores.float())
    if transposed_boxes:
        boxes = boxes[:, [1, 0, 3, 2]]
    corners = boxes.float() * boxes.new_tensor([columns, rows, columns, rows], dtype=torch.float32)
    corners = torch.cat((torch.arange(batch, device=boxes.device, dtype=torch.float32)[:, None], corners), 1)

    on, off = 1 - smoothing + smoothing / num_labels, smoothing / num_labels
    targets = [nn.functional.one_hot(labels.long(), num_labels).float()[:, :, None]]
    for size in ((1, 1), grid):
        pooled = roi_align(maps, corners, size, aligned=True).softmax(1)  # (B, K, *size)
        pooled = torch.where(flipped[:, None, None, None], pooled.flip(3), pooled)
        targets.append(pooled.flatten(2))
    # The one-hot column has `on` in it and not `on + off`.
    targets[0] = targets[0] * (on - off)
    return torch.cat([targets[0], *(target * on for target in targets[1:])], 2) + off


def _mix(mixup: Mixup, pixel_values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mixed images, and what share each has of itself; the rest is its partner's, at the same place from the end."""
    mixup.num_classes = len(pixel_values)  # "label" i is image i: its target says how much of it there is
    pixel_values, shares = mixup(pixel_values, torch.arange(len(pixel_values)))
    return pixel_values, shares[0, 0].item()
