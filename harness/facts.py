"""What a study keeps beside its trials: Optuna's user attributes of the study, each under its name here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from harness.final_result import FinalResult


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """As they stand in the storage; a default for what is not known yet."""

    # Of its start
    uid: str = ""
    format: int = 0
    definition: dict[str, Any] | None = None  # `Study.definition()`, and fingerprints of images and weights
    images: int | None = None
    depths: dict[str, list[str]] | None = None  # prefixes of parameter names by "block" and by "layer"
    # Of its last start
    file: str | None = None
    command: str | None = None
    runtime: dict[str, Any] | None = None  # `Runtime.to_dict()`
    versions: dict[str, str] = field(default_factory=dict)
    wanted: int = 0  # trials
    # Of what comes after the search
    choice: dict[str, Any] | None = None  # `harness.choice.choose`
    rerank: dict[str, Any] | None = None  # `harness.rerank`
    final: FinalResult | None = None
    predictions: dict[str, Any] | None = None  # `harness.predictions`
    thumbnails: dict[str, str] = field(default_factory=dict)  # by number of the test image
    duplicates: dict[str, Any] | None = None  # `harness.data.duplicates`
    audit: dict[str, Any] | None = None  # `harness.audit.record`
    files: dict[str, str] = field(default_factory=dict)  # the sha256 of the model's files
    published: int | None = None  # trials that had ended when MLflow was told everything
    registered: int | None = None  # the trial whose model MLflow's registry has
    validation_images: str | None = None  # their fingerprint, once the registry was told

    def is_registered(self) -> bool:
        """Whether MLflow's registry was given the model of the final result."""
        return self.final is not None and self.registered == self.final.trial

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> StudyFacts:
        """Raises InputError when the final result is not whole."""
        found = {name: value for name in NAMES if (value := attributes.get(name)) is not None}
        if "final" in found:
            found["final"] = FinalResult.of(found["final"])
        return StudyFacts(**found)


NAMES = tuple(each.name for each in fields(StudyFacts))
