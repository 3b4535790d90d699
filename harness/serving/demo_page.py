"""The demo page: drop a photograph, press Submit, see the saved model's prediction.

Gradio renders the page. Nothing leaves the machine: no analytics, no external fonts or scripts (a policy makes the
browser refuse them), and uploads are in a temporary folder that is deleted at the end. The page accepts files of that
folder only; Gradio alone would fetch URLs and, on a mounted page like this one, copy any file of the machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import InputError
from harness.base.words import percent
from harness.config.train import DataConfig
from harness.serving.predict import TOP, Predictor

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI

EXAMPLES = 8
TITLE = "What is in this photograph?"
EXAMPLE_PIXELS = 384  # drawn flowers are drawn at this size, photographs reduced to it
LARGEST_FILE = "50mb"
# The browser may load from this server only. Gradio's scripts and styles are inline.
POLICY = "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"
CSS = """
.gradio-container { width: 100%; max-width: 960px !important; margin: 0 auto !important; }
#answer .container { padding-top: 2.2em; }
#answer .confidence-set, #answer .label { font-family: var(--font); }
#answer .bar { height: 8px; border-radius: 4px; }
#note p { font-weight: 600; margin: 0; }
"""


def check_installed() -> None:
    """Raise InputError if Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('The demo page needs Gradio; install it with pip install -e ".[demo]".')


def serve(predictor: Predictor, host: str, port: int) -> None:
    """Serve the page at http://host:port until the process is interrupted."""
    with tempfile.TemporaryDirectory(prefix="flower-demo-") as folder:
        import uvicorn

        app = build_app(predictor, Path(folder))
        print(f"The page opens at http://{host}:{port} (Ctrl-C ends it).", flush=True)
        # A browser keeps its connection open while it shows the page; wait one second for it.
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            headers=[("Content-Security-Policy", POLICY)],
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run()


def build_app(predictor: Predictor, folder: Path) -> FastAPI:
    """Return the page as an application; uploads go to `folder`."""
    # Gradio reads both at import.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    import gradio
    from fastapi import FastAPI, HTTPException

    app = FastAPI(openapi_url=None)

    @app.api_route("/gradio_api/file=http{url:path}", methods=["GET", "HEAD"])
    def refuse(url: str) -> None:
        raise HTTPException(403, "This page fetches nothing.")

    blocks = build_page(predictor, write_examples(predictor, folder), folder)
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        css=CSS,
        theme=theme(),
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
    )


def write_examples(predictor: Predictor, folder: Path) -> list[Path]:
    """Write validation images of different classes to `folder`; return the files, none if the data are missing."""
    config: Any = predictor.saved.config
    data = dataclasses.replace(config.data, stored_size=max(EXAMPLE_PIXELS, config.data.stored_size))
    files: list[Path] = []
    if isinstance(data, DataConfig) and not data.is_here():
        print("The page shows no examples: the images are not on this machine.", file=sys.stderr)
        return files
    try:
        first = {label: item for item, label in reversed(data.samples("val"))}
        labels = sorted(first)
        for label in labels[:: -(-len(labels) // EXAMPLES)]:
            image = data.open(first[label])
            image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
            image.save(folder / f"example {label + 1}.png")
            files.append(folder / f"example {label + 1}.png")
    except InputError as error:
        print(f"The page shows {len(files) or 'no'} examples: {error}", file=sys.stderr)
    return files


def theme() -> gradio.Theme:
    """Return Gradio's theme with system fonts: named fonts would be downloaded."""
    import gradio

    return gradio.themes.Soft(
        primary_hue="fuchsia",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # darker than the default, for readable white text on the button and coloured text on white
        body_background_fill="*neutral_50",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        block_label_text_color="*primary_800",
        block_title_text_color="*primary_800",
    )


def uploaded(values: Any, folder: Path) -> bool:
    """Return whether all files in an event's values are in `folder`; a URL never is."""
    if isinstance(values, dict):
        path = values.get("path")
        if path is not None and not (isinstance(path, str) and Path(path).resolve().is_relative_to(folder.resolve())):
            return False
        values = list(values.values())
    return not isinstance(values, list) or all(uploaded(value, folder) for value in values)


def build_page(predictor: Predictor, examples: Sequence[Path], folder: Path) -> gradio.Blocks:
    """Return the page, ready to serve; uploads are in `folder`."""
    import gradio

    class Page(gradio.Blocks):
        def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
            """Check the inputs before Gradio fetches or copies a file."""
            if not uploaded(inputs, folder):
                raise gradio.Error("This page accepts uploaded files only.", print_exception=False)
            super().validate_inputs(block_fn, inputs)

    with Page(title=TITLE, analytics_enabled=False) as blocks:
        gradio.Markdown(heading(predictor.saved.description))
        with gradio.Row():
            with gradio.Column():
                photograph = gradio.Image(
                    label="Photograph",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=360,
                    elem_id="photograph",
                )
                # Gradio would open the file first and report a damaged one itself.
                photograph.preprocess = lambda payload: payload and payload.path
                with gradio.Row():
                    clear = gradio.Button("Clear", min_width=100)
                    submit = gradio.Button("Submit", variant="primary", min_width=100)
            with gradio.Column():
                answer = gradio.Label(label="It is most likely", num_top_classes=TOP, elem_id="answer")
                note = gradio.Markdown(elem_id="note")
        if examples:
            gradio.Examples([str(each) for each in examples], photograph, label="Examples", elem_id="examples")
            gradio.Markdown(note_of(predictor.saved.description))
        submit.click(_answering(predictor), photograph, [answer, note])
        clear.click(lambda: (None, None, ""), None, [photograph, answer, note])
    return blocks


def heading(description: Mapping[str, Any]) -> str:
    """Return the page's heading from model.json: the saved seed's numbers, as in the model card."""
    test = description["test"]
    lost = " These weights were retrained after the tested ones were lost; the result is that of the tested ones."
    return (
        f"# {TITLE}\n\nDrop a photograph and press Submit. The model knows "
        f"{len(description['classes'])} classes; trained from seed {test['seed']}, it was right on "
        f"{test['correct']:,} of the {test['total']:,} test images ({percent(test['accuracy'])})."
        f"{'' if description['weights'].get('tested') else lost}"
    )


def note_of(description: Mapping[str, Any]) -> str:
    """Return whether the model was trained on the examples."""
    seen = {
        "train": "the model was not trained on them.",
        "train+val": "the model was trained on them too, so it does better on them than on other images.",
    }
    return f"The examples are validation images of the study; {seen[description['fit_on']]}"


def _answering(predictor: Predictor) -> Callable[[str | None], tuple[dict[str, float] | None, str]]:
    """Return Submit's function: the path of an upload to probabilities and a message."""

    def answer(path: str | None) -> tuple[dict[str, float] | None, str]:
        if path is None:
            return None, _sentence("There is no image yet; drop one, or select an example.")
        try:
            image = predictor.photograph(Path(path))
            guesses = predictor.guesses(image.unsqueeze(0), min(TOP, len(predictor.saved.classes)))[0]
        except InputError as error:
            return None, _sentence(str(error).replace(path, Path(path).name))
        return {guess.name: guess.probability for guess in guesses}, ""

    return answer


def _sentence(text: str) -> str:
    """Escape the punctuation of a text for Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)
