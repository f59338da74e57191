"""Tiny encoders of transformers, one of each family, with inputs, for the tests of refining them."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel


IMAGE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
TEXT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=100,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
PATCHES = {name: value for name, value in IMAGE.items() if name != "image_size"} | {"num_patches": 16}
DISTILBERT = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=100, pad_token_id=0)

# By name: the configuration, the bare model and one with a head.
IMAGE_ENCODERS = {
    "vit": ("ViTConfig", IMAGE, "ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTConfig", IMAGE, "DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Config", IMAGE, "Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2 with registers": (
        "Dinov2WithRegistersConfig", IMAGE, "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification",
    ),
    "dinov3": ("DINOv3ViTConfig", {**IMAGE, "num_register_tokens": 4}, "DINOv3ViTModel", "DINOv3ViTBackbone"),
    "siglip": ("SiglipVisionConfig", IMAGE, "SiglipVisionModel", None),
    "siglip2": ("Siglip2VisionConfig", PATCHES, "Siglip2VisionModel", None),
    "clip vision": ("CLIPVisionConfig", IMAGE, "CLIPVisionModel", None),
    "beit": (
        "BeitConfig", {**IMAGE, "use_relative_position_bias": True}, "BeitModel", "BeitForImageClassification",
    ),
}  # fmt: skip
TEXT_ENCODERS = {
    "bert": ("BertConfig", TEXT, "BertModel", "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", TEXT, "RobertaModel", "RobertaForSequenceClassification"),
    "electra": ("ElectraConfig", {**TEXT, "embedding_size": 32}, "ElectraModel", "ElectraForSequenceClassification"),
    "distilbert": ("DistilBertConfig", DISTILBERT, "DistilBertModel", "DistilBertForSequenceClassification"),
    "modernbert": (
        "ModernBertConfig", {**TEXT, "local_attention": 6}, "ModernBertModel", "ModernBertForSequenceClassification",
    ),
}  # fmt: skip
ENCODERS = IMAGE_ENCODERS | TEXT_ENCODERS
LENGTHS = (9, 4, 6)


def make_encoder(family: str, head: bool = False, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
    """In evaluation, the same at each call; without dropout, whose random numbers are of each batch's own shape."""
    config_name, settings, bare, headed = ENCODERS[family]
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)
    config_class = getattr(transformers, config_name)
    known = {name: value for name, value in none.items() if hasattr(config_class(), name)}
    config = config_class(**settings, **known, **fields)
    config.initializer_range = 0.2  # so that maps differ from place to place
    torch.manual_seed(0)
    model = getattr(transformers, headed if head else bare)(config).eval()
    model.set_attn_implementation(attention)
    return model


def inputs_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "siglip2":
        mask = torch.ones(3, 16, dtype=torch.long)
        mask[1, 12:] = 0
        shapes = torch.tensor([[4, 4], [4, 3], [4, 4]])
        pixels = torch.randn(3, 16, 192, generator=generator, dtype=dtype)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if family in IMAGE_ENCODERS:
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator, dtype=dtype)}
    return padded_texts(max(LENGTHS))


def padded_texts(to: int, side: str = "right", numbers: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    """Some of three texts of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(5, 100, (length,), generator=generator) for length in LENGTHS]
    ids, mask = torch.zeros(len(numbers), to, dtype=torch.long), torch.zeros(len(numbers), to, dtype=torch.long)
    for row, text in enumerate(texts[number] for number in numbers):
        places = slice(None, len(text)) if side == "right" else slice(to - len(text), None)
        ids[row, places], mask[row, places] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(inputs: dict[str, torch.Tensor]) -> Any:
    """Where tokens aren't padding."""
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    return slice(None) if mask is None else mask.bool()


def disturb(model: torch.nn.Module) -> None:
    """Moves every refinement away from its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".refinement." in name and tensor.is_floating_point():
                tensor.add_(0.3 * tensor.abs().mean().clamp(min=0.1) * torch.rand_like(tensor))
