"""The card beside the weights: its numbers are the storage's, and its code runs."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import yaml
from markdown_it import MarkdownIt

from harness.base.words import percent
from harness.config.final_result import FinalResult
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.datasets.flowers102 import Flowers102
from harness.datasets.image_folder import ImageFolder
from harness.final.model_files import PROGRAM
from harness.final.predictions import calibration_sentence
from harness.final.sentences import conclusion, final_sentence, selection_sentence
from harness.garden.dataset import Garden
from harness.report.overview import overview
from harness.serving.card import CARD, UNKNOWN_LICENCE, _plain, card, write_card
from harness.serving.export import logits_of, write_program
from harness.serving.model import SavedModel, load_saved, preprocess
from harness.store.ledger import appended
from harness.store.opening import open_store
from harness.store.store import Store
from tests.faulty import CommandLine, complete, small_study


@dataclass(frozen=True)
class Finished:
    """A study that was run to its end, with its model, program and card."""

    study: Study
    store: Store
    folder: Path
    saved: SavedModel

    def card(self) -> str:
        write_card(self.study.name, self.study.train.data, self.store, self.folder, PROGRAM)
        return (self.folder / CARD).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    place = tmp_path_factory.mktemp("finished")
    study = dataclasses.replace(small_study(image_cache), final=FinalConfig(seeds=2, publish=False))
    complete(study, place)
    with open_store(study, f"sqlite:///{place}/tiny.db") as store:
        saved = load_saved(study, store, place / "tiny.model")
        write_program(saved, place / "tiny.model" / PROGRAM)
        yield Finished(study, store, place / "tiny.model", saved)


# -- what it says --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_its_numbers_are_those_of_the_storage(finished: Finished) -> None:
    text, final = finished.card(), finished.store.attributes().get("final")
    assert final_sentence(FinalResult.of(final)) in text
    assert conclusion(finished.store) in text
    for each in final["per_seed"]:
        assert f"| {each['seed']} | {each['correct']} | {each['total']} | {percent(each['accuracy'])} |" in text
    shown = overview("tiny", finished.store, "")["test"]
    assert shown["seeds"] == 2
    assert calibration_sentence(shown) in text, "the report's words"
    if (sentence := selection_sentence(FinalResult.of(final))) is not None:
        assert sentence in text
    trial = next(each for each in finished.store.trials() if each.number == final["trial"])
    assert f"trial {trial.number} was chosen, with {percent(trial.value)}" in text
    assert "32 training, 32 validation, 32 test images" in text
    assert "pretrained weights: none." in text
    for path in trial.params:
        assert f"| `{path}` |" in text


@pytest.mark.slow
def test_its_front_matter_is_what_model_hubs_read(finished: Finished) -> None:
    front = finished.card().split("---\n")[1]
    found, final = yaml.safe_load(front), finished.store.facts().final
    assert final is not None
    (model,) = found["model-index"]
    (result,) = model["results"]
    (metric,) = result["metrics"]
    assert (found["license"], found["pipeline_tag"], model["name"]) == ("unknown", "image-classification", "tiny")
    assert result["dataset"] == {"type": "Garden", "name": "Garden", "split": "test"}
    assert (metric["type"], metric["value"]) == ("accuracy", pytest.approx(final.value, abs=1e-6))
    assert (
        metric["name"] == f"test accuracy, 95 % interval {percent(final.interval[0])} to {percent(final.interval[1])}"
    )
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(finished.card())
    card.validate = None  # asks a server
    assert card.data.eval_results[0].metric_value == pytest.approx(final.value, abs=1e-6)


@pytest.mark.slow
def test_it_says_where_the_images_come_from_and_what_was_not_tested(finished: Finished) -> None:
    text = finished.card()
    assert f"Garden: 32 training, 32 validation, 32 test images. {Garden.licence}" in text
    assert "no clear licence and are for research" in Flowers102.licence
    assert not hasattr(ImageFolder, "licence"), "nobody knows whose photographs they are"
    for words in ("## Limits", "names one of them for any image", "It was tested only on", "other cameras"):
        assert words in text


@pytest.mark.slow
@pytest.mark.slow
def test_a_data_set_that_says_nothing_of_its_licence(finished: Finished, tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((finished.folder / name).read_bytes())
    write_card("tiny", ImageFolder(), finished.store, tmp_path, None)
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    assert UNKNOWN_LICENCE in text
    assert "```" not in text, "without a program there is nothing to load it with"


def test_every_opening_of_the_test_set_is_listed_with_its_reason(finished: Finished) -> None:
    lines = finished.store.attributes().get("ledger")
    assert finished.card().count("- The test set was opened for trial") == 1
    again = lines[0] | {"trial": 7, "time": "2026-01-02T03:04:05+00:00", "reason": "a wrong label was found"}
    finished.store.set_attribute("ledger", [*lines, again])
    try:
        text = finished.card()
    finally:
        finished.store.set_attribute("ledger", lines)
    assert "The test set was opened for trial 7 on 2026-01-02. Reason: a wrong label was found." in text
    assert finished.card() != text, "the card follows the storage"


def rendered(markdown: str) -> tuple[list[str], str]:
    """The tags of the page that a card becomes, and its text."""
    page = MarkdownIt("commonmark").enable("table").render(markdown)
    return re.findall(r"<(\w+)", page), html.unescape(re.sub(r"<[^>]*>", "", page))


WRITTEN = "a | b\n\n# c\n- d `e` <img src=x onerror=f()> *g* __h__ [i](j) ![k](l) ~~m~~ \\| &lt; <!-- n"


def test_what_somebody_wrote_is_shown_and_changes_nothing_around_it(finished: Finished) -> None:
    lines, saved = finished.store.attributes().get("ledger"), json.loads((finished.folder / "model.json").read_text())
    opened = {"event": "opened", "trial": 7, "time": "2026-01-02T03:04:05+00:00", "commit": "abc", "configuration": "d"}
    uid = finished.store.attributes().get("uid")
    pages = []
    for reason, name in (("plain", "rose"), (WRITTEN, "wild | <b>rose</b>_a_")):
        finished.store.set_attribute("ledger", appended(lines, uid, opened | {"reason": reason}))
        try:
            text = card("tiny", "", finished.store, saved | {"classes": [name] * len(saved["classes"])}, None)
        finally:
            finished.store.set_attribute("ledger", lines)
        pages.append(rendered(text))
    (tags, _), (same, words) = pages
    assert same == tags
    assert f"Reason: {' '.join(WRITTEN.split())}." in words
    assert "wild | <b>rose</b>_a_ (0 of 2)" in words
    assert "with the lowest test accuracy, for seed 0" in words


@pytest.mark.parametrize("written", ["a|b", "a\\|b", "<i>`_*a_*"])
def test_a_searched_choice_stays_in_its_cell(finished: Finished, written: str) -> None:
    row = f"| `a` | {_plain(written)} |"
    tags, words = rendered(f"| searched field | chosen value |\n| --- | --- |\n{row}")
    assert tags.count("td") == 2
    assert words.split()[-1] == written


def test_it_is_written_again_only_when_it_changes(finished: Finished) -> None:
    finished.card()
    before = (finished.folder / CARD).stat().st_mtime_ns
    finished.card()
    assert (finished.folder / CARD).stat().st_mtime_ns == before
    (finished.folder / CARD).write_text("half a ca")
    assert finished.card().startswith("---\n")


# -- what it tells to run ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.slow
def test_its_lines_of_code_run_without_this_project_and_say_what_the_model_says(finished: Finished) -> None:
    code = re.findall(r"```python\n(.*?)```", finished.card(), re.S)
    assert len(code) == 1
    lines = code[0].split("\n\n")[1].splitlines()
    assert len(lines) == 5, "after the imports"
    data = finished.study.train.data
    image = data.open(data.samples("val")[5][0]).resize((101, 77))
    image.save(finished.folder / "photo.jpg", "PNG")  # the same pixels; Pillow goes by what is in the file
    after = "import sys, numpy\nnumpy.save('logits.npy', logits.detach().numpy())\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code[0] + after], cwd=finished.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = logits_of(finished.saved, preprocess([image], finished.saved.config))
    assert numpy.abs(numpy.load(finished.folder / "logits.npy") - wanted).max() < 1e-4
    said, modules = done.stdout.splitlines()
    assert said == finished.saved.classes[int(wanted.argmax())]
    assert not {name.split(".")[0] for name in modules.split()} & {"harness", "mlflow", "safetensors"}


# -- when it is written --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lost_card_is_written_by_the_same_command(line: CommandLine, tmp_path: Path) -> None:
    assert line.run("--trials", "2").code == 0
    path = tmp_path / "studies" / "tiny.model" / CARD
    before = path.read_bytes()
    path.unlink()
    again = line.run("--trials", "2")
    assert again.code == 0
    assert "The test set was opened once" in again.out
    assert path.read_bytes() == before
    assert "Nothing is missing" in line.run("--trials", "2").out


@pytest.mark.slow
def test_the_card_lies_with_the_study_in_mlflow(line: CommandLine, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    assert line.run("--trials", "1").code == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    parent = next(
        run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["harness.key"] == "study"
    )
    names = {Path(each.path).name for each in client.list_artifacts(parent.info.run_id, "tiny.model")}
    assert names == {CARD, "check.safetensors", "model.json", "model.safetensors"}
