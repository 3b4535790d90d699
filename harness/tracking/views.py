"""The saved view of a study's runs in MLflow's UI: validation and test results and the searched hyperparameters.

MLflow 3.15 and newer keep a view as a tag of the experiment, and open it by its id in the page's address. Older ones
ignore both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

from harness.base.words import metric_name
from harness.tracking.client import STATE
from harness.tracking.library import milliseconds

if TYPE_CHECKING:
    from harness.config.study import Study

PREFIX, OURS = "mlflow.sharedViewState.", "harness-"
MOST = 20  # hyperparameters; the tag is limited to 5,000 characters


def view_of(study: Study) -> tuple[str, str]:
    """Return a study's view as a tag's key and value; the key changes with the columns."""
    value, test = (f"{split}_{metric_name(study.objective)}" for split in ("val", "test"))
    columns = [
        *(f"metrics.`{name}`" for name in (value, test)),
        *(f"params.`{path}`" for path in list(study.space)[:MOST]),
        f"tags.`{STATE}`",
    ]
    state = {"selectedColumns": columns, "columnOrder": columns, "orderByKey": columns[0], "orderByAsc": False}
    now = milliseconds()
    view = {"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return f"{PREFIX}{OURS}{sha256(json.dumps(columns).encode()).hexdigest()[:8]}", json.dumps(view)


def newest_view(tags: Mapping[str, str]) -> str | None:
    """Return the id of a study's newest view by its experiment's tags; None without one."""
    ours = {key: value for key, value in tags.items() if key.startswith(PREFIX + OURS)}
    newest = max(ours, key=lambda key: json.loads(ours[key])["createdAt"], default=None)
    return None if newest is None else newest.removeprefix(PREFIX)
