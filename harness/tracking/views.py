"""The saved view of a study's runs in MLflow's UI: validation and test results and the searched hyperparameters.

MLflow 3.15 and newer keep a view as a tag of the experiment, and open it by its id in the page's address. Older ones
ignore both.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from harness.base.words import metric_name
from harness.tracking.client import STATE
from harness.tracking.library import milliseconds

if TYPE_CHECKING:
    from harness.config.study import Study

VIEW = "harness-results"
TAG = f"mlflow.sharedViewState.{VIEW}"
MOST = 20  # hyperparameters; the tag is limited to 5,000 characters


def view_of(study: Study) -> str:
    """Return a study's view, the value of TAG."""
    columns = [
        *(f"metrics.`{split}_{metric_name(study.objective)}`" for split in ("val", "test")),
        *(f"params.`{path}`" for path in list(study.space)[:MOST]),
        f"tags.`{STATE}`",
    ]
    state = {"selectedColumns": columns, "columnOrder": columns, "orderByKey": columns[0], "orderByAsc": False}
    now = milliseconds()
    return json.dumps({"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})
