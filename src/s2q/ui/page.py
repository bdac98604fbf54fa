"""The page: what is chosen and typed on the left, both videos with their figures on the right.

Gradio draws it; the videos are the players of the report page, in a frame of their own.
"""

import html
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from s2q.common.arguments import seed_number
from s2q.common.errors import InvalidInputError, S2QError, short_repr
from s2q.generation.defaults import embedded_source
from s2q.generation.prompts import prompt_list
from s2q.generation.settings import requested_settings
from s2q.report.formatting import NOTHING, format_bytes, format_value, title_of
from s2q.report.page import render_players
from s2q.shapes import embedded
from s2q.ui.offers import Offer, partners
from s2q.ui.pipelines import Pipelines
from s2q.ui.side_by_side import SideBySide, generate_side_by_side

logger = logging.getLogger(__name__)

TITLE = "s2q: two models, one prompt"
_METRICS = ("psnr_frame_mean_db", "ssim", "latent_relative_l2", "velocity_relative_error", "first_frame_psnr_db")
_HINT = "<p class='hint'>Choose two models, describe a video and press Generate.</p>"
_EXAMPLES = 8
_SECONDS = 0.2
STYLE = """
.players-frame { width: 100%; height: 480px; border: 0; border-radius: 10px; display: block; }
.hint, .stopped { padding: 24px; color: var(--body-text-color); }
.failed { padding: 14px 18px; border-left: 4px solid #d6423a; background: var(--block-background-fill);
  color: var(--body-text-color); overflow-wrap: anywhere; }
"""


class Stopped(Exception):  # noqa: N818
    """The user has pressed Cancel."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Content of the page when Generate is pressed; settings as they are typed, "" for the model's own."""

    left: str
    right: str
    prompt: str
    image: Any
    seed: str
    steps: str
    guidance: str
    frames: str
    height: str
    width: str
    velocity: bool


class Runs:
    """Runs requests one after the other; the run of a session can be stopped at its next step."""

    def __init__(self, offers: Sequence[Offer], pipelines: Pipelines) -> None:
        self.offers = {offer.label: offer for offer in offers}
        self._pipelines = pipelines
        self._lock = threading.Lock()
        self._stops: dict[str | None, threading.Event] = {}

    def run(self, request: Request, *, session: str | None, progress: Callable[[str, int, int], None]) -> str:
        """Return the HTML of a result, or of the error that prevented it."""
        stop = self._stops.setdefault(session, threading.Event())

        def report(stage: str, done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(stage, done, total)

        try:
            report("starting", 0, 1)
            while not self._lock.acquire(timeout=_SECONDS):
                report("waiting for another run", 0, 1)
            try:
                return framed(self._generate(request, report))
            finally:
                self._lock.release()
        except Stopped:
            return "<p class='stopped' role='status'>Cancelled.</p>"
        except S2QError as error:
            return failed(str(error))
        except Exception as error:
            logger.exception("ui: generating failed")
            return failed(f"{type(error).__name__}: {error}; the traceback is in the terminal")
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    def answer(
        self,
        left: str,
        right: str,
        prompt: str,
        image: Any,
        seed: str,
        steps: str,
        guidance: str,
        frames: str,
        height: str,
        width: str,
        velocity: bool,
        asked: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """Run what the fields of the page ask for; Gradio passes them in their order, then itself."""
        request = Request(
            left=left,
            right=right,
            prompt=prompt,
            image=image,
            seed=seed,
            steps=steps,
            guidance=guidance,
            frames=frames,
            height=height,
            width=width,
            velocity=velocity,
        )
        return self.run(
            request,
            session=asked.session_hash,
            progress=lambda stage, done, total: progress((done, total), desc=stage),
        )

    def announce(self, session: str | None) -> None:
        """Expect a run of a session, which can be stopped from now on; one that is in progress stays the one."""
        known = self._stops.get(session)
        if known is None or known.is_set():
            self._stops[session] = threading.Event()

    def stop(self, session: str | None) -> None:
        """Stop the run of a session at its next step, or at its start."""
        if session in self._stops:
            self._stops[session].set()

    def _generate(self, request: Request, progress: Callable[[str, int, int], None]) -> str:
        item: dict[str, Any] = {"prompt": request.prompt}
        if request.image is not None:
            item["image"] = request.image
        (prompt,) = prompt_list("prompts", [item])
        requested = requested_settings(
            num_frames=_number("Frames", request.frames, int),
            height=_number("Height", request.height, int),
            width=_number("Width", request.width, int),
            num_inference_steps=_number("Denoising steps", request.steps, int),
        ) | requested_settings(guidance_scale=_number("Guidance scale", request.guidance, float))
        result = generate_side_by_side(
            self.offers[request.left],
            self.offers[request.right],
            prompt=prompt,
            seed=seed_number(_number("Seed", request.seed, int) or 0),
            requested=requested,
            velocity=request.velocity,
            pipelines=self._pipelines,
            progress=progress,
        )
        return rendered(result)


def rendered(result: SideBySide) -> str:
    """Return the HTML document of a result: players and figures."""
    left, right = result.pair.labels
    metrics = result.pair.metrics
    rows = [
        ("", left, right),
        *(
            (title_of(name), _value(name, metrics.get(f"reference_{name}")), _value(name, metrics[name]))
            for name in _METRICS
            if metrics.get(name) is not None
        ),
        ("Time", *(f"{cost.seconds:.2f} s" for cost in (result.left, result.right))),
        ("Transformer weights", *(format_bytes(cost.weight_bytes) for cost in (result.left, result.right))),
        ("Working memory, peak", *(_bytes(cost.working_bytes) for cost in (result.left, result.right))),
    ]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.settings.items())
    note = (
        f"Metrics compare the right video with the left one. Time is from the prompt to the frames; the first run of a "
        f"model also warms it up. Working memory is what was in use above the loaded models. Settings: {settings}."
    )
    return render_players([result.pair], title=TITLE, rows=rows, note=note, fps=result.frame_rate)


def framed(document: str) -> str:
    """Return the HTML of a frame that shows a document."""
    return f'<iframe class="players-frame" title="Videos and figures" srcdoc="{html.escape(document)}"></iframe>'


def failed(message: str) -> str:
    """Return the HTML of an error."""
    return f'<p class="failed" role="alert"><strong>Error:</strong> {html.escape(message)}</p>'


def theme() -> gr.themes.Base:
    """Return the theme: the colours of the report page, and fonts of the system, so the browser asks for none."""
    fonts = ("system-ui", "sans-serif")
    base = gr.themes.Base(
        primary_hue="indigo", neutral_hue="neutral", font=fonts, font_mono=("ui-monospace", "monospace")
    )
    return base.set(
        body_background_fill="#f7f7f5",
        body_background_fill_dark="#131416",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c1e21",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        input_background_fill="#f0f0ec",
        input_background_fill_dark="#26292d",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        border_color_primary="#e2e2de",
        border_color_primary_dark="#32353a",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )


def build_page(offers: Sequence[Offer], pipelines: Pipelines) -> gr.Blocks:
    """Return the page; `launch` of it needs `STYLE` as css."""
    runs = Runs(offers, pipelines)
    left, right = _first_pair(offers)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nThe same noise, full precision and quantized, with the difference and what it costs.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                one = gr.Dropdown(
                    [offer.label for offer in offers],
                    value=left.label,
                    label="Left model, the reference",
                    filterable=False,
                )
                two = gr.Dropdown(
                    [offer.label for offer in partners(left, offers)],
                    value=right.label,
                    label="Right model",
                    filterable=False,
                )
                prompt = gr.Textbox(_example(left), label="Prompt", lines=3, elem_id="prompt")
                example = gr.Button("Another example", size="sm", visible=_example(left) != "")
                image = gr.Image(
                    label="First frame", type="pil", visible=left.needs_image, sources=["upload"], height=220
                )
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=80)
                fields = _settings(left)
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML(_HINT, elem_id="result", min_height=160)

        def announce(asked: gr.Request) -> None:
            runs.announce(asked.session_hash)

        gr.on([generate.click, prompt.submit], announce, None, None, queue=False, api_visibility="private").then(
            runs.answer,
            [one, two, prompt, image, *fields],
            result,
            concurrency_limit=None,  # `Runs` waits
            api_visibility="private",
        )

        def stop(asked: gr.Request) -> None:
            runs.stop(asked.session_hash)

        def choose(label: str) -> tuple[Any, ...]:
            return _chosen(runs.offers[label], offers)

        def another(label: str, text: str) -> str:
            return _example(runs.offers[label], after=text)

        page.unload(stop)
        cancel.click(stop, None, None, queue=False, api_visibility="private")
        one.change(choose, one, [two, prompt, example, image], api_visibility="private")
        example.click(another, [one, prompt], prompt, api_visibility="private")
    return page


def _settings(left: Offer) -> tuple[Any, ...]:
    """Draw the generation settings, in the order of `Request`."""
    with gr.Accordion("Settings", open=False):
        seed = gr.Textbox("0", label="Seed", max_lines=1)
        others = [
            gr.Textbox("", label=label, placeholder="the model's own", max_lines=1)
            for label in ("Denoising steps", "Guidance scale", "Frames", "Height", "Width")
        ]
        velocity = gr.Checkbox(
            embedded_source(left.source) is not None,
            label="Measure the velocity error",
            info="The right model also answers the calls of the left one, which takes about as long as its video.",
        )
    return seed, *others, velocity


def _first_pair(offers: Sequence[Offer]) -> tuple[Offer, Offer]:
    """Return the first choice: a full-precision model and a quantized one, or the first two that compare."""
    pairs = [(left, right) for left in offers for right in partners(left, offers)]
    if not pairs:
        labels = ", ".join(offer.label for offer in offers)
        raise InvalidInputError(
            f"ui: {labels}: no two of them can be compared; add the model that a checkpoint is made from"
        )
    wanted = [pair for pair in pairs if pair[1].quantized and not pair[0].quantized]
    given = [pair for pair in wanted if pair[1].recipe is None]
    return (given or wanted or pairs)[0]


def _chosen(left: Offer, offers: Sequence[Offer]) -> tuple[Any, ...]:
    """Update what depends on the left model: right models, prompt, button of examples, image."""
    others = partners(left, offers)
    right = next((offer for offer in others if offer.quantized), others[0] if others else None)
    return (
        gr.update(choices=[offer.label for offer in others], value=None if right is None else right.label),
        gr.update(value=_example(left)) if _example(left) else gr.update(),
        gr.update(visible=_example(left) != ""),
        gr.update(visible=left.needs_image, value=None),
    )


def _example(offer: Offer, *, after: str | None = None) -> str:
    """Return a held-out caption of the embedded model that a model is or was made from, "" if there is none.

    With `after`, the one that follows that caption.
    """
    source = embedded_source(offer.source)
    if source is None:
        return ""
    captions = embedded.embedded_prompts(source, count=_EXAMPLES)
    return captions[(captions.index(after) + 1) % _EXAMPLES if after in captions else 0]


def _number(name: str, text: str, kind: Callable[[str], float]) -> Any:
    """Read a field, an int or a float; None if it is empty."""
    try:
        return kind(text) if text.strip() else None
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InvalidInputError(f"{name}: got {short_repr(text)}; expected {what}, or nothing") from None


def _value(name: str, value: float | None) -> str:
    return "" if value is None else format_value(name, value)


def _bytes(count: int | None) -> str:
    return NOTHING if count is None else format_bytes(count)
