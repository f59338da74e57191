"""The web page: a picture in, classes and maps out, with controls for layer, head and query."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from ..image_processing_pil_refiner import open_image, to_8_bit_rgb
from ..inspection.attention_views import APPLIED, BEFORE, name_of
from ..inspection.networks import Network
from ..utils.markdown import markdown_text
from . import THIS_MACHINE
from .rendering import (
    TOP,
    VisitorState,
    draw_map,
    draw_picture,
    drawing_size,
    in_words,
    only_one_map,
    patch_at,
    view_from_patch,
    view_picture,
    weights_of,
    which_refine,
)
from .serving import guards, own_folder


File = dict[str, Any] | None  # as Gradio describes it, with its path
Updates = dict[Component, Any]

_PAPER = "https://arxiv.org/abs/2106.03714"
_INVITATION = "Give it a picture, or take an example."
_VISITORS = 100  # the maps of the latest 100 visitors are kept
_CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
.uploaded img { width: 100%; height: 100%; object-fit: contain; }
.drawing img { cursor: crosshair; }
.drawing .icon-button-wrapper { display: none; }
"""


def build_demo(network: Network, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """
    A page on which a visitor hands a network a picture, and sees its classes and where it looks: the maps before and
    after their refinement over the picture, for each layer and head, from the class token or from a patch that the
    visitor clicks.

    The network runs when a picture is given and when a patch is clicked. The maps are kept for each visitor.

    Args:
        network ([`~refiner_hf.inspection.networks.Network`]): a Refiner, or another vision transformer, which has no
            maps before refinement. Without a classifier there are maps only.
        examples (`Sequence[str | Path]`, *optional*): pictures to offer.

    Returns:
        `gr.Blocks`: to be shown by its own `launch`. ([`launch`] does it all.)
    """
    page = _Page(network)
    with gr.Blocks(title=f"Where {network.name} looks", analytics_enabled=False) as demo:
        page.lay_out(examples)
        page.connect()
    return demo


@contextmanager
def served(
    network: Network,
    examples: Sequence[str | Path] = (),
    port: int | None = None,
    share: bool = False,
    host: str = THIS_MACHINE,
) -> Iterator[str]:
    """
    The page of [`build_demo`] on this machine, as long as the block lasts. The server sends
    nothing to other servers, except with `share`. It answers only browsers on this machine, unless it is shared or has
    another `host`. What visitors upload is deleted at the end.

    Args:
        network, examples: see [`build_demo`].
        port (`int`, *optional*): where. Default: one that is free.
        share (`bool`, *optional*, defaults to `False`): whether to ask Gradio's service for a public address as well.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): this machine's address at which the page is; with
            `"0.0.0.0"` whoever reaches this machine can open it, as in a container.

    Returns:
        the page's address (of a context manager).

    Raises:
        `OSError`: the port is taken, or there is no such port, or no such address of this machine.
    """
    with own_folder():
        demo = build_demo(network, examples)
        try:
            _, address, public_address = demo.launch(
                server_name=host,
                server_port=port,
                share=share,
                ssr_mode=False,
                show_error=True,
                state_session_capacity=_VISITORS,
                footer_links=[],
                theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono="monospace"),
                css=_CSS,
                quiet=True,
                prevent_thread_lock=True,
                app_kwargs={"middleware": guards(share or host != THIS_MACHINE)},
            )
        except (OSError, OverflowError) as error:
            raise OSError(
                f"Port {port} can't be opened at {host}: it is taken, or this machine has no such port or address."
            ) from error
        try:
            yield public_address or address
        finally:
            demo.close(verbose=False)


def launch(
    network: Network,
    examples: Sequence[str | Path] = (),
    port: int = 7860,
    share: bool = False,
    host: str = THIS_MACHINE,
) -> None:
    """Shows the page until it is stopped (Ctrl-C). Arguments and errors as [`served`]'s."""
    with served(network, examples, port, share, host) as address, suppress(KeyboardInterrupt):
        print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
        while True:
            time.sleep(1)


class _Page:
    """The page's parts, and what happens when a visitor uses them."""

    def __init__(self, network: Network):
        self.network = network
        self.refining = which_refine(network.model)

    def lay_out(self, examples: Sequence[str | Path]) -> None:
        gr.Markdown(
            f"# {markdown_text(self.network.name)}\nWhat the network sees in a picture, and where it looks: "
            f"its attention maps before and after they are refined ([Refiner, arXiv 2106.03714]({_PAPER}))."
        )
        self.shown = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.picture = gr.Image(
                    label="Your picture", sources=["upload", "clipboard"],
                    height=290, buttons=[], elem_classes="uploaded",
                )  # fmt: skip
                classifies = "ForImageClassification" in type(self.network.model).__name__
                self.classes = gr.Label(label="Classes", num_top_classes=TOP, visible=classifies)
            with gr.Column(scale=3, min_width=480):
                self.lay_out_controls()
                with gr.Row():
                    self.who = gr.Markdown(_INVITATION)
                    self.back = gr.Button(visible=False, size="sm", scale=0, min_width=220)
                with gr.Row():
                    self.seen, self.seen_caption = _panel("As the network gets it")
                    self.before, self.before_caption = _panel("Before refinement")
                    self.applied, self.applied_caption = _panel("As applied")
                if examples:
                    gr.Examples([[str(path)] for path in examples], self.picture, cache_examples=False)

    def lay_out_controls(self) -> None:
        layers, heads = len(self.refining), self.network.model.config.num_attention_heads
        refining = [index + 1 for index, refines in enumerate(self.refining) if refines]
        info = f"Refining their maps: {', '.join(map(str, refining))}." if refining else None
        numbers = [(str(head), head) for head in range(1, heads + 1)]
        with gr.Row():
            last = max(refining, default=layers)
            self.layer = gr.Slider(1, layers, last, step=1, label="Layer", info=info, scale=2)
            self.head = gr.Radio([("average", 0), *numbers], value=0, label="Head", scale=3)

    def connect(self) -> None:
        """
        Only `view` and `click` run the network; `draw` shows what they stored in `self.shown`. They take the picture's
        file (`preprocess=False`): with a file that is no picture, Gradio would fail before the page can say so.
        """
        controls = [self.shown, self.layer, self.head]
        drawn = [
            *(self.who, self.back, self.seen, self.seen_caption),
            *(self.before, self.before_caption, self.applied, self.applied_caption),
        ]
        self.picture.change(
            self.view, [self.picture, self.layer, self.head], [self.shown, self.classes, *drawn],
            api_name="view", preprocess=False,
        )  # fmt: skip
        gr.on(
            [self.layer.change, self.head.change], self.draw, controls, drawn,
            api_name="draw", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        gr.on(
            [image.select for image in (self.seen, self.before, self.applied)],
            self.click, [self.picture, *controls], [self.shown, *drawn],
            api_visibility="private", preprocess=False,
        )  # fmt: skip
        self.back.click(self.go_back, controls, [self.shown, *drawn], api_visibility="private", show_progress="hidden")

    def view(self, file: File, layer: int, head: int) -> Updates:
        """The visitor gave a new picture, or took the picture away."""
        image = self.open(file)
        state = view_picture(self.network, image) if image else None
        return {self.shown: state, self.classes: state and state.classes} | self.draw(state, layer, head)

    def click(self, file: File, state: VisitorState | None, layer: int, head: int, event: gr.SelectData) -> Updates:
        """The visitor clicked a patch in one of the drawings, at the pixel (x, y)."""
        if state and (image := self.open(file)):
            state = view_from_patch(self.network, _patch_clicked(state, event.index), image, state)
        return {self.shown: state} | self.draw(state, layer, head)

    def go_back(self, state: VisitorState | None, layer: int, head: int) -> Updates:
        """Back to the query that was shown first."""
        state = state and state.back()
        return {self.shown: state} | self.draw(state, layer, head)

    def open(self, file: File) -> Image.Image | None:
        """The picture in an uploaded file. `None` where the file is no picture; the page then says so."""
        if file is None:
            return None
        path = Path(file["path"]).resolve()
        try:
            # A request that doesn't come from the page may name any file of this machine.
            if not path.is_relative_to(Path(self.picture.GRADIO_CACHE).resolve()):
                raise ValueError(f"The image {path} wasn't uploaded.")
            return to_8_bit_rgb(open_image(path))
        except ValueError as error:
            gr.Warning(str(error).replace(str(path), path.name))
            return None

    def draw(self, state: VisitorState | None, layer: int, head: int) -> Updates:
        """The drawings and texts for a state. Layers and heads count from 1; head 0 is the average."""
        if state is None:
            captions = dict.fromkeys((self.seen_caption, self.before_caption, self.applied_caption), "")
            drawings = dict.fromkeys((self.seen, self.before, self.applied))
            return {self.who: _INVITATION, self.back: gr.update(visible=False)} | drawings | captions
        layer = _number(layer, "layer", 1, len(self.refining))
        head = _number(head, "head", 0, self.network.model.config.num_attention_heads)
        first, who = state.first.queries[-1], name_of(state.query)
        chosen = layer - 1, head - 1 if head else None
        before, applied = (weights_of(state, stage, *chosen) for stage in (BEFORE, APPLIED))
        assert applied is not None  # every layer has a map as applied
        which = f"head {head}" if head else "the average of its heads"
        return {
            self.who: f"**{who[0].upper()}{who[1:]}** looks. Click a patch in a picture to see where that one looks.",
            self.back: gr.update(value=f"Back to {name_of(first)}", visible=state.query != first),
            self.seen: draw_picture(state),
            self.seen_caption: "In the maps red patches add, blue ones subtract; each map has its own scale.",
            self.before: None if before is None else draw_map(state, before),
            self.before_caption: only_one_map(self.network.name, self.refining, layer - 1)
            if before is None
            else f"The map that layer {layer} gets, {which}. {in_words(before)}",
            self.applied: draw_map(state, applied),
            self.applied_caption: f"The map that layer {layer} looks with, {which}. {in_words(applied)}",
        }


def _number(value: Any, what: str, first: int, last: int) -> int:
    """A whole number from the page's controls. A request that doesn't come from the page may send anything."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not first <= value <= last or value != int(value):
        raise gr.Error(f"There is no {what} {value!r}: give a whole number from {first} to {last}.")
    return int(value)


def _patch_clicked(state: VisitorState, place: Any) -> tuple[int, int]:
    """The patch at (x, y) of a drawing."""
    if not isinstance(place, list | tuple) or len(place) != 2:
        raise gr.Error(f"A place in a drawing is [x, y], not {place!r}.")
    height, width = drawing_size(state)
    return patch_at(state, _number(place[0], "column", 0, width - 1), _number(place[1], "row", 0, height - 1))


def _panel(title: str) -> tuple[gr.Image, gr.Markdown]:
    """A place for a drawing, and for its caption."""
    with gr.Column(min_width=200):
        gr.Markdown(f"**{title}**")
        # PNG keeps the patches' edges sharp.
        image = gr.Image(show_label=False, format="png", interactive=False, buttons=[], elem_classes="drawing")
        return image, gr.Markdown()
