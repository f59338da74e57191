"""
What a training step aims at: smoothed labels, dense targets of label maps, mixup and cutmix.

Made where the step runs and not by the processes that load images: dense targets are larger than the images
themselves. Shapes: B batch, K labels, k classes of a label map at each place, P patches.
"""

import torch
from timm.data import Mixup
from torch import nn
from torchvision.ops import roi_align

from ..data.label_maps import BOX, FLIPPED, MAP_CLASSES, MAP_SCORES


class TrainingTargets:
    """
    Batches as they are loaded to batches that the model takes.

    Args:
        smoothing (`float`): share of each target that is spread evenly over all labels.
        mixup ([`timm.data.Mixup`], *optional*): mixes images, and their targets alike. A batch of an odd number of
            images stays as it is.
        transposed_boxes (`bool`): see [`dense_targets`].
    """

    def __init__(self, smoothing: float = 0.0, mixup: Mixup | None = None, transposed_boxes: bool = False):
        self.smoothing, self.mixup, self.transposed_boxes = smoothing, mixup, transposed_boxes

    def __call__(
        self, inputs: dict[str, torch.Tensor], num_labels: int, grid: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            inputs: `pixel_values`, `labels`, and what belongs to label maps where there are some.
            num_labels (`int`): K.
            grid (`tuple[int, int]`): rows and columns of patches.

        Returns:
            `inputs` with soft labels (B, K) or dense ones (B, K, 2 + P); as they were where there is nothing to do.
        """
        inputs = dict(inputs)
        label_maps = {name: inputs.pop(name) for name in (MAP_SCORES, MAP_CLASSES, BOX, FLIPPED) if name in inputs}
        if label_maps:
            inputs["labels"] = dense_targets(
                scores=label_maps[MAP_SCORES],
                classes=label_maps[MAP_CLASSES],
                boxes=label_maps[BOX],
                flipped=label_maps[FLIPPED],
                labels=inputs["labels"],
                num_labels=num_labels,
                grid=grid,
                smoothing=self.smoothing,
                transposed_boxes=self.transposed_boxes,
            )
        elif self.smoothing or self.mixup:
            inputs["labels"] = smooth_labels(inputs["labels"], num_labels, self.smoothing)
        if self.mixup and len(inputs["labels"]) % 2 == 0:
            inputs["pixel_values"], share = _mix(self.mixup, inputs["pixel_values"])
            inputs["labels"] = share * inputs["labels"] + (1 - share) * inputs["labels"].flip(0)
        return inputs


def smooth_labels(labels: torch.Tensor, num_labels: int, smoothing: float) -> torch.Tensor:
    """
    Soft labels (images, labels): `1 - smoothing` on the given ones, `smoothing` spread evenly over all.

    Args:
        labels (`torch.Tensor`): integers (images,) or soft labels (images, labels).
    """
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels.long(), num_labels).float()
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
