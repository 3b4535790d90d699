"""Publish the final model in MLflow: log it with the study's run, register it under the study's name, check, promote.

Each step first checks what MLflow has, by the tags below: a study registers nothing twice, and a killed one resumes
with the missing step.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from harness.base.errors import Halt, masked
from harness.base.keys import final_key
from harness.data.splits import ImageSet, items_of, load_split
from harness.final.model_files import CHECK_IMAGES
from harness.final.sentences import test_sentence
from harness.serving.checker import Checker
from harness.serving.export import EXAMPLE_BATCH, disagreement, logits_of, weights_of, write_program
from harness.tracking.client import UID
from harness.tracking.library import artifact_store, faults, first_line, found_set, is_refusal, no_stray_folder
from harness.tracking.mlflow import MLflowTracker

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model
    from torch import Tensor

    from harness.config.contracts import Dataset
    from harness.serving.model import SavedModel
    from harness.store.store import Store

CHAMPION = "champion"
WEIGHTS, TRIAL = "harness.weights", "harness.trial"
# The score is the searched trial's: the final model may be trained on the validation images.
SCORE, IMAGES = "harness.validation_accuracy", "harness.validation_images"
CHECK, PLACE = "harness.check", "harness.place"  # each written after its step
VERSIONS = "mlflow.modelVersions"  # MLflow's own tag: the registered versions on the logged model's page
MEASURED = ("val_accuracy", "test_accuracy", "test_loss")  # of the run that trained the model
PASSED = "passed"
SERVE = "mlflow models serve -m models:/{}@champion --env-manager local"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The final model, and its data for MLflow."""

    name: str  # of the study, and of the registered model
    saved: SavedModel
    images: Tensor  # standardised float32 [N, 3, S, S], for the check
    tags: Mapping[str, str]
    text: str


def candidate(name: str, store: Store, saved: SavedModel) -> Candidate:
    """Return the model to register. The test split is not loaded: only the final run opens it, once.

    The check uses the test images that the final run saved beside the weights; if they are lost, validation images,
    because it only compares two programs.
    """
    from harness.data.augment import normalise

    fingerprint, images = store.facts().validation_images, saved.check_images
    objective = store.facts().objective
    if fingerprint is None or images is None:
        data, preprocessing = saved.config.data, saved.config.backbone.preprocessing()
        split = load_split(data, preprocessing, "val")
        fingerprint = validation_fingerprint(data, split)
        store.set_attribute("validation_images", fingerprint)
        if images is None:
            chosen = split.images[:: max(1, len(split) // CHECK_IMAGES)][:CHECK_IMAGES]
            images = normalise(chosen, preprocessing)
    tags = {
        UID: store.uid,
        TRIAL: str(saved.description["trial"]),
        WEIGHTS: weights_of(saved),
        SCORE: repr(saved.description["trial_validation_accuracy"]),  # of the trial whose configuration it has
        IMAGES: fingerprint if objective == "accuracy" else f"{fingerprint}, {objective}",  # what compares scores
    }
    return Candidate(name=name, saved=saved, images=images, tags=tags, text=test_sentence(store))


def validation_fingerprint(data: Dataset, split: ImageSet) -> str:
    """Return 16 hexadecimal digits of the validation images (at any size), their labels and the class names.

    Scores are compared only if these are equal.
    """
    digest = hashlib.sha256("\x1f".join(data.classes()).encode())
    for item, label in zip(items_of(data, "val"), split.labels.tolist(), strict=True):
        digest.update(hashlib.sha256(data.content(item)).digest() + f"{label} ".encode())
    return digest.hexdigest()[:16]


def publish(
    tracker: MLflowTracker, wanted: Candidate, say: Callable[[str], object] = print, checker: Checker | None = None
) -> bool:
    """Log, register, check and promote the model, and print the outcome; return whether MLflow accepted it.

    It becomes the `champion` if it passes the check and there is no champion, or one whose trial's accuracy on the same
    validation images is lower; test images do not count. A champion with other validation images stays: the two are not
    comparable, and a smaller trial run should not replace a served model. The tracker must have written the study's own
    run. What MLflow refuses permanently is reported and skipped. A `checker` that was started before saves time.
    """
    client = tracker.client
    try:
        run = client.get_run(tracker.parent)
        logged = _logged(client, run, wanted)
        if not logged.metrics:
            _measure(client, tracker, logged, wanted)
        with no_stray_folder(tracker.uri):
            version = _registered(client, run, logged, wanted)
        _show_registered(client, logged.model_id, version)
        if CHECK not in version.tags:
            wrong = _wrong(tracker.uri, logged, wanted, checker)
            client.set_model_version_tag(wanted.name, version.version, CHECK, wrong or PASSED)
            version = client.get_model_version(wanted.name, version.version)
        said = _placed(client, version)
        say(f"model     {wanted.name} version {version.version} in MLflow: {said}")
        if CHAMPION in said:
            where = shlex.quote(masked(tracker.uri))
            other = f"MLFLOW_REGISTRY_URI={where} " if "MLFLOW_REGISTRY_URI" in found_set else ""
            say(f"serve     MLFLOW_TRACKING_URI={where} {other}{SERVE.format(wanted.name)}")
    except faults() as error:
        if not is_refusal(error):
            said = f"MLflow at {tracker.uri} did not accept the model ({first_line(error)})."
            print(masked(said), file=sys.stderr)
            return False
        print(masked(f"MLflow refuses the model, which is skipped: {first_line(error)}"), file=sys.stderr)
    return True


def _logged(client: Any, run: Run, wanted: Candidate) -> LoggedModel:
    """Return the complete logged model of the study's experiment; delete partial ones of killed processes."""
    from mlflow.entities import LoggedModelOutput

    experiment = run.info.experiment_id
    query = " AND ".join(f"tags.`{tag}` = '{wanted.tags[tag]}'" for tag in (UID, WEIGHTS))
    for known in client.search_logged_models([experiment], query):
        if known.status == "READY":
            with artifact_store():
                whole = bool(client.list_logged_model_artifacts(known.model_id))
            if not whole:  # its files were deleted
                _upload(client, known, run, wanted)
            return known
        client.delete_logged_model(known.model_id)
    model = client.create_logged_model(
        experiment, wanted.name, source_run_id=run.info.run_id, tags=dict(wanted.tags), model_type="classifier"
    )
    _upload(client, model, run, wanted)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])  # for the run's page
    return client.finalize_logged_model(model.model_id, "READY")


def _upload(client: Any, model: LoggedModel, run: Run, wanted: Candidate) -> None:
    with tempfile.TemporaryDirectory() as place:
        _write_model(Path(place) / "model", model, run, wanted.saved)
        with artifact_store():
            client.log_model_artifacts(model.model_id, str(Path(place) / "model"))


def _write_model(folder: Path, model: LoggedModel, run: Run, saved: SavedModel) -> None:
    """Write MLflow's format: a torch.export program, its signature, and an example (grey images).

    MLflow unpickles only tensors to read it; MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false enforces that.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    size, kind = saved.image_size, numpy.dtype(numpy.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, 3, size, size))]),
        outputs=Schema([TensorSpec(kind, (-1, len(saved.classes)))]),
    )
    described = Model(
        artifact_path=model.artifact_location,
        run_id=run.info.run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={"classes": list(saved.classes), "preprocessing": saved.description["preprocessing"]},
    )
    try:
        # MLflow would export the model a second time, which takes longer than all else: it exports this layer instead.
        mlflow.pytorch.save_model(
            torch.nn.Flatten(),
            str(folder),
            mlflow_model=described,
            signature=signature,
            input_example=numpy.zeros((EXAMPLE_BATCH, 3, size, size), kind),
            # Given, because otherwise MLflow starts a process to infer them.
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={numpy.__version__}"],
            serialization_format="pt2",
        )
        _replace_program(folder, described, saved)
    except (RuntimeError, OSError) as error:  # only writing can fail, with RuntimeError in torch
        raise Halt(f"{folder} cannot be written ({first_line(error)}); make room for temporary files.") from error


def _replace_program(folder: Path, described: Model, saved: SavedModel) -> None:
    """Put the model's own program, exported before, in the place of MLflow's."""
    (program,) = folder.glob("data/*.pt2")
    described.model_size_bytes -= program.stat().st_size
    program.unlink()
    if saved.program is not None and saved.program.is_file():
        shutil.copyfile(saved.program, program)
    write_program(saved, program)  # unless it is the right one
    described.model_size_bytes += program.stat().st_size
    described.save(str(folder / "MLmodel"))


def _measure(client: Any, tracker: MLflowTracker, model: LoggedModel, wanted: Candidate) -> None:
    """Link the metrics of the run that trained the model to the model.

    The study's own run has the mean over the seeds. The entries keep their timestamps, so the run does not get
    duplicates.
    """
    from mlflow.entities import Metric

    run = tracker.known_runs().get(final_key(int(wanted.tags[TRIAL]), wanted.saved.description["test"]["seed"]))
    if run is None:
        return
    last = [entry for name in MEASURED for entry in client.get_metric_history(run.info.run_id, name)[-1:]]
    metrics = [Metric(each.key, each.value, each.timestamp, each.step, model.model_id) for each in last]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def _registered(client: Any, run: Run, logged: LoggedModel, wanted: Candidate) -> ModelVersion:
    """Return this model's version of the registered model, created if missing."""
    query = f"name = '{wanted.name}'"
    if not client.search_registered_models(query):
        client.create_registered_model(wanted.name)
    for version in client.search_model_versions(query):
        if version.source == logged.artifact_location:
            return version
    return client.create_model_version(
        wanted.name,
        logged.artifact_location,  # not models:/ID, which a local registry resolves in the default database
        run.info.run_id,
        tags=dict(wanted.tags),
        description=wanted.text,
        model_id=logged.model_id,
    )


def _show_registered(client: Any, model_id: str, version: ModelVersion) -> None:
    """Add the version to the logged model's page, as MLflow's `register_model` does; servers do it themselves."""
    known = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS, "[]"))
    if (version.name, str(version.version)) not in {(each["name"], str(each["version"])) for each in known}:
        entry = {"name": version.name, "version": str(version.version)}
        client.set_logged_model_tags(model_id, {VERSIONS: json.dumps([*known, entry])})


def _wrong(uri: str, logged: LoggedModel, wanted: Candidate, checker: Checker | None) -> str | None:
    """Return what is wrong with the stored model; None if a new process gets the same logits from it.

    Raises MLflow's error if the model cannot be downloaded.
    """
    import mlflow.artifacts

    with tempfile.TemporaryDirectory() as place:
        kept = logged.artifact_location
        with artifact_store():
            folder = mlflow.artifacts.download_artifacts(artifact_uri=kept, dst_path=place, tracking_uri=uri)
        with nullcontext(checker) if checker and checker.lives() else Checker() as process:
            found = process.logits(Path(folder), wanted.images.numpy())
    return found if isinstance(found, str) else disagreement(found, logits_of(wanted.saved, wanted.images))


def _placed(client: Any, version: ModelVersion) -> str:
    """Give the alias to the version if it is better; return the outcome as text. Decided once per version."""
    said: str | None = version.tags.get(PLACE)
    if said is None:
        said = _why_not(client, version)
        if said is None:
            client.set_registered_model_alias(version.name, CHAMPION, version.version)
            said = f"checked, became the {CHAMPION}"
        client.set_model_version_tag(version.name, version.version, PLACE, said)
    return said


def _why_not(client: Any, version: ModelVersion) -> str | None:
    """Return why the version does not get the alias; None if it has it, or no other is as good on the same images."""
    if version.tags[CHECK] != PASSED:
        return f"not promoted, because in a new process it {version.tags[CHECK]}"
    number = client.get_registered_model(version.name).aliases.get(CHAMPION)
    if number is None or str(number) == str(version.version):
        return None
    holder = client.get_model_version(version.name, number)
    stays = f"checked; version {holder.version} stays the {CHAMPION}"
    if holder.tags.get(IMAGES) != version.tags[IMAGES]:
        return f"{stays}, because its validation images differ; set the alias by hand to promote this one"
    mine, theirs = float(version.tags[SCORE]), float(holder.tags[SCORE])
    if mine > theirs:
        return None
    return f"{stays}, with {100 * theirs:.2f} % on the validation images against {100 * mine:.2f} %"
