import pytest
import torch
from PIL import Image

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.show_refinement import main
from refiner_hf.inspection.maps import plot_refinement, refined_maps

from .conftest import LAYOUTS, assert_close


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_maps_are_those_before_and_after(tiny_model):
    model = tiny_model().eval()
    attentions = model(IMAGES, output_attentions=True).attentions
    maps = refined_maps(model, IMAGES)
    assert sorted(maps) == [1, 3]
    for layer, (before, after) in maps.items():
        assert_close(before, attentions[layer - 1])
        assert_close(after, attentions[layer])
    assert not any(m._forward_hooks for m in model.modules() if type(m).__name__ == "RefinerMapRefinement")


def test_own_maps(tiny_model):
    model = tiny_model(attention_types=LAYOUTS["refine_every_layer"]).eval()
    attentions = model(IMAGES, output_attentions=True).attentions
    assert_close(refined_maps(model, IMAGES)[2][1], attentions[2])


def test_nothing_to_see(tiny_model):
    with pytest.raises(ValueError, match="No layer"):
        refined_maps(tiny_model(attention_types=LAYOUTS["plain"]).eval(), IMAGES)


@pytest.mark.parametrize("choice, message", [(dict(layer=0), r"\[1, 3\]"), (dict(query=17), "no token 17")])
def test_bad_choices(tiny_model, tmp_path, choice, message):
    with pytest.raises(ValueError, match=message):
        plot_refinement(tiny_model().eval(), Image.new("RGB", (8, 8)), IMAGES[:1], tmp_path / "a.png", **choice)


def test_command_line(tiny_model, tmp_path, capsys):
    tiny_model(image_size=[16, 24]).save_pretrained(tmp_path / "model")
    RefinerImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "model")
    Image.new("RGB", (30, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.png"), "--query", "3"]
    main([*words, "--image", str(tmp_path / "photo.png")])
    assert Image.open(tmp_path / "out.png").size[0] > 400
    (tmp_path / "broken.png").write_text("no")
    with pytest.raises(SystemExit, match="broken.png"):
        main([*words, "--image", str(tmp_path / "broken.png")])
    assert isinstance(RefinerForImageClassification.from_pretrained(tmp_path / "model").config.image_size, list)
