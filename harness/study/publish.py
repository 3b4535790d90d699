"""The end of a study: describe and register its model, and complete MLflow."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from harness.base.errors import InputError, masked
from harness.final.model_files import PROGRAM, has_model, is_registered, published, record_files
from harness.serving.card import CARD, write_card
from harness.serving.checker import Checker
from harness.serving.export import write_program
from harness.serving.registry import candidate, publish
from harness.store.store import Store
from harness.study.command import Command
from harness.tracking import expected
from harness.tracking.mlflow import MLflowTracker

if TYPE_CHECKING:
    from harness.serving.model import SavedModel

START = "start"  # the lease key for starting: one coordinator at a time


def write_again(command: Command, store: Store, tracker: MLflowTracker) -> None:
    """Write a finished study to MLflow again; this trains nothing and needs no images."""
    from harness.serving.model import load_saved

    study, model = command.study, command.beside(".model")
    with store.exclusive(START):
        tracker.start(study, store, expected.recorded_facts(study, store))
    told = tracker.finish(expected.study_metrics(store), published(store, model), "complete")
    if told and is_registered(study, store, model):
        told = register(command, store, tracker, load_saved(study, store, model))
    if not told:
        command.console.say(f"MLflow at {masked(tracker.uri)} is incomplete; run the same command to try again.")


def describe_model(command: Command, store: Store) -> SavedModel | None:
    """Write the exported program and the model card; return the model if it is to be registered."""
    from harness.serving.model import load_saved

    study, folder = command.study, command.beside(".model")
    if not (store.has_final() and has_model(folder)):
        return None
    model, program = None, None
    if study.final.publish:
        saved = load_saved(study, store, folder)
        try:
            with command.console.status("Exporting the final model …"):
                write_program(saved, folder / PROGRAM)
            model, program = saved, PROGRAM
        except InputError as error:  # a backbone that torch cannot export; the result is still valid
            print(f"{error} It is saved as weights only, and not registered in MLflow.", file=sys.stderr)
            store.set_attribute("registered", saved.description["trial"])
    write_card(study.name, study.train.data, store, folder, program)
    record_files(store, folder, CARD, PROGRAM)
    return model


def register(
    command: Command, store: Store, tracker: MLflowTracker, model: SavedModel, checker: Checker | None = None
) -> bool:
    """Register the model in MLflow; return whether that succeeded."""
    with command.console.status("Registering and checking the final model in MLflow …"):
        done = publish(tracker, candidate(command.study.name, store, model), command.console.say, checker)
    if done:
        store.set_attribute("registered", model.description["trial"])
    return done
