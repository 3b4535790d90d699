"""A hyperparameter-search harness for fine-tuning image classifiers: Optuna asks, torch trains, MLflow shows.

Exports every name that a study file or a program needs; each is imported on first access.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.base import __version__ as __version__

if TYPE_CHECKING:
    from harness.api import Result as Result
    from harness.api import list_models as list_models
    from harness.api import open as open
    from harness.api import run as run
    from harness.api import studies as studies
    from harness.base.errors import Halt as Halt
    from harness.base.errors import InputError as InputError
    from harness.base.errors import StudyFailed as StudyFailed
    from harness.config.contracts import Preprocessing as Preprocessing
    from harness.config.space import Choice as Choice
    from harness.config.space import Float as Float
    from harness.config.space import Int as Int
    from harness.config.study import Study as Study
    from harness.config.train import AugmentConfig as AugmentConfig
    from harness.config.train import FinalConfig as FinalConfig
    from harness.config.train import OptimConfig as OptimConfig
    from harness.config.train import RuntimeConfig as RuntimeConfig
    from harness.config.train import TrainConfig as TrainConfig
    from harness.datasets.flowers102 import Flowers102 as Flowers102
    from harness.datasets.image_folder import ImageFolder as ImageFolder
    from harness.datasets.image_table import ImageTable as ImageTable
    from harness.datasets.wrapped import Wrapped as Wrapped
    from harness.garden.dataset import Garden as Garden
    from harness.models.maxvit import MaxViTT as MaxViTT
    from harness.models.maxvit import TinyMaxViT as TinyMaxViT
    from harness.models.module import Module as Module
    from harness.models.timm import EfficientNetLite0 as EfficientNetLite0
    from harness.models.timm import Timm as Timm
    from harness.models.torchvision import Torchvision as Torchvision
    from harness.new_study import init as init
    from harness.search.pruners import Pruner as Pruner
    from harness.search.pruners import asha as asha
    from harness.search.pruners import no_pruning as no_pruning
    from harness.search.samplers import Sampler as Sampler
    from harness.search.samplers import gp as gp
    from harness.search.samplers import grid as grid
    from harness.search.samplers import tpe as tpe

# cuBLAS reads it once, at a program's first product on a GPU; training is deterministic only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_WHERE = {
    "api": ("Result", "list_models", "open", "run", "studies"),
    "base.errors": ("Halt", "InputError", "StudyFailed"),
    "config.contracts": ("Preprocessing",),
    "config.space": ("Choice", "Float", "Int"),
    "config.study": ("Study",),
    "config.train": ("AugmentConfig", "RuntimeConfig", "FinalConfig", "OptimConfig", "TrainConfig"),
    "datasets.flowers102": ("Flowers102",),
    "datasets.image_folder": ("ImageFolder",),
    "datasets.image_table": ("ImageTable",),
    "datasets.wrapped": ("Wrapped",),
    "garden.dataset": ("Garden",),
    "new_study": ("init",),
    "models.maxvit": ("MaxViTT", "TinyMaxViT"),
    "models.module": ("Module",),
    "models.timm": ("EfficientNetLite0", "Timm"),
    "models.torchvision": ("Torchvision",),
    "search.pruners": ("Pruner", "asha", "no_pruning"),
    "search.samplers": ("Sampler", "gp", "grid", "tpe"),
}
_MODULES = {name: f"harness.{module}" for module, names in _WHERE.items() for name in names}
__all__ = [name for name in _MODULES if name != "open"]  # a star would hide the builtin


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
