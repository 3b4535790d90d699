"""A model of one's own, as a backbone."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import linecache
import os
import pickle
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from harness import Module, Preprocessing
from harness.base.errors import InputError
from harness.models.depths import depths_of

ACTIVATION = nn.ReLU()


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def no_head() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3))


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))


def failing() -> nn.Module:
    raise RuntimeError("boom")


class Pair(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return super().forward(x), x


def in_pairs() -> nn.Module:
    return Pair(*small())  # type: ignore[misc]


def nothing() -> Any:
    return None


class Reading(nn.Module):
    """Reads a small tensor of its own in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Any) -> Any:
        return self.head(x.mean((2, 3)) * torch.tensor(2.0).item())


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.projection = nn.Linear(8, 10), nn.Linear(3, 8)

    def forward(self, x: Any) -> Any:
        return self.head(self.projection(x.mean((2, 3))))


SHARED = small()


def shared() -> nn.Module:
    return SHARED


def softmax() -> nn.Module:
    return nn.Sequential(small(), nn.Softmax(1))


def sigmoid() -> nn.Module:
    return nn.Sequential(small(), nn.Sigmoid())


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.Linear(5, 10))


def frozen() -> nn.Module:
    model = small()
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    return model


def half() -> nn.Module:
    return small().half()


def test_its_last_linear_layer_becomes_the_head() -> None:
    model = Module(build=small, hidden=(12,), dropout=0.3).build(5, 64)
    assert [type(layer) for layer in model[-1]] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]  # type: ignore[index]
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def fingerprints(sources: list[str], folder: Path) -> list[str]:
    """The fingerprint of `build` as each source of one file defines it."""
    found = []
    for number, source in enumerate(sources):
        (folder / "own.py").write_text(f"from torch import nn\n{source}\n")
        os.utime(folder / "own.py", ns=(number * 10**9, number * 10**9))
        linecache.checkcache()
        spec = importlib.util.spec_from_file_location("own", folder / "own.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["own"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(Module(build=module.build).fingerprint())
    del sys.modules["own"]
    return found


@pytest.mark.parametrize(
    "use",
    [
        "def build():\n    return Net()",
        "def build():\n    return nn.Sequential(*[Net() for _ in range(2)])",
        "def build():\n    return nn.Sequential(*map(lambda _: Net(), range(2)))",
        "class build(nn.Module):\n    @staticmethod\n    def part():\n        return Net()",
        "class build(nn.Module):\n    @property\n    def part(self):\n        return Net()",
    ],
)
def test_what_it_uses_of_its_file_belongs_to_it(use: str, tmp_path: Path) -> None:
    sources = [f"class Net(nn.{layer}):\n    pass\n{use}" for layer in ("ReLU", "SiLU", "ReLU")]
    one, other, again = fingerprints(sources, tmp_path)
    assert one == again != other


def test_constants_and_defaults_belong_to_it_and_names_of_attributes_do_not(tmp_path: Path) -> None:
    sources = [
        f"WIDTH, weight = {width}, {number}\ndef build():\n    return nn.Linear(3, WIDTH).weight"
        for number, width in enumerate((8, 16, 8))
    ]
    one, other, again = fingerprints(sources, tmp_path)
    assert one == again != other
    for use in ("WIDTH", "Net.width", "Net().own"):
        sources = [
            f"WIDTH = {width}\nclass Net:\n    width = WIDTH\n    def __init__(self, own=WIDTH):\n"
            "        self.own = own\n"
            f"def build():\n    return nn.Linear(3, {use})"
            for width in (8, 16, 8)
        ]
        one, other, again = fingerprints(sources, tmp_path)
        assert one == again != other
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = "def build():\n    return nn.Linear(3, len(__file__))"
    assert fingerprints([source], tmp_path) == fingerprints([source], elsewhere)
    made = [Module(build=lambda width=width: nn.Linear(3, width)) for width in (8, 16, 8)]
    assert made[0] == made[2] != made[1]


class Wrapping(nn.Module):
    """Holds a model in one attribute, as Lightning's modules do, and a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.net = nn.Parameter(torch.ones(1)), resnet18()

    def forward(self, x: Any) -> Any:
        return self.net(x * self.scale)


def test_what_only_wraps_a_model_is_no_depth() -> None:
    own = Module(build=Wrapping)
    own.check(64)
    inner = [tuple("net." + each for each in depth) for depth in depths_of(resnet18(), "fc", "block")]
    assert own.depths("block") == [("scale", *inner[0]), *inner[1:]]
    assert own.depths("block")[-1] == ("net.fc.",)


def test_a_layer_with_the_weights_of_another_has_no_depth_of_its_own() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), *(nn.Linear(48, 48, bias=False) for _ in range(2)), nn.Linear(48, 10))
        model[2].weight = model[1].weight
        return model

    own = Module(build=build)
    own.check(4)
    assert own.depths("block") == [("1.",), ("3.",)]


def test_a_build_may_compute_with_numpy() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, int(torch.linspace(1, 8, 4).numpy()[-1]), 3), *list(small())[1:])

    Module(build=build).check(64)


def test_a_forward_may_read_tensors_of_its_own() -> None:
    Module(build=Reading).check(64)


def test_depths_and_preprocessing_are_the_given_ones_or_found() -> None:
    preset = Preprocessing(mean=(0.5, 0.5, 0.5))
    assert Module(build=small).depths("block") == [("0.",), ("3.",)]
    own = Module(build=small, depths=["0.weight", ("0.bias", "3.")], preprocessing=preset)
    assert own.depths("layer") == [("0.weight",), ("0.bias", "3.")]
    assert own.preprocessing() == preset


def test_weights_come_from_a_file_or_from_its_function(tmp_path: Path) -> None:
    theirs = small()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = Module(build=small, weights=str(tmp_path / "w.pth"))
    ours.check(32)
    assert torch.equal(ours.build(5, 32)[0].weight, theirs[0].weight)  # type: ignore[index]
    assert len(ours.fingerprint()) == 16
    with pytest.raises(InputError, match=r"tensor 0\.weight of shape \(8, 3, 3, 3\) instead of \(16"):
        Module(build=large, weights=str(tmp_path / "w.pth")).check(32)


def test_it_is_the_same_if_its_source_is_and_survives_pickling() -> None:
    one = Module(build=small)
    assert one == Module(build=small) != Module(build=large)
    copies = copy.deepcopy(one), dataclasses.replace(one, dropout=0.2), pickle.loads(pickle.dumps(one))  # noqa: S301
    for other in copies:
        assert other == one
        assert other.build(5, 32)[0].out_channels == 8
    assert one.fingerprint().startswith("small-")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"build": 3}, "build must be a function without arguments, or a class, not 3"),
        ({"build": failing}, r"failing\(\) failed \(RuntimeError: boom\); it must build a model"),
        ({"build": in_pairs}, "The forward of in_pairs returns tuple; return logits"),
        ({"build": nothing}, "returned NoneType; return a torch.nn.Module"),
        ({"build": HeadFirst}, "new head in place of projection, its last linear layer"),
        ({"build": lazy}, r"lazy: 1\.weight is of a lazy layer; give the layer its size"),
        ({"build": frozen}, r"frozen: 0\.weight is frozen, but the harness would train it"),
        ({"build": shared}, r"shared\(\) returns the same model each time"),
        ({"build": softmax}, "softmax returns probabilities, such as a softmax's; return the logits"),
        ({"build": sigmoid}, "sigmoid returns probabilities"),
        ({"build": half}, r"half: 0\.weight is float16; return a model in float32"),
        ({"build": no_head}, "has no linear layer to replace"),
        ({"build": flat}, "does not take images of 64 x 64 pixels"),
        ({"build": small, "depths": ["0."]}, r"the parameter 3\.weight matches none of them"),
        ({"build": small, "depths": ["0.", "1.", "3."]}, r"1\.',\) matches no parameter"),
        ({"build": small, "depths": ["3.", "0."]}, "the last one must be the module of the last linear layer, 3"),
        ({"build": small, "weights": "x"}, "weights must be a file of weights, not 'x'"),
        ({"build": small, "weights": "x.pth"}, r"x\.pth cannot be read"),
        ({"build": small, "stochastic_depth": 0.1}, "stochastic_depth cannot be set"),
        ({"build": lambda layer=ACTIVATION: layer}, "uses objects of an enclosing function, or as a default"),
    ],
)
def test_what_does_not_fit_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Module(**fields).check(64)


class Sizes(NamedTuple):
    width: int


Settings = namedtuple("Settings", "width")


def loading() -> nn.Module:
    model = small()
    model.load_state_dict({name: torch.ones_like(each) for name, each in small().state_dict().items()})
    return model


def of_settings() -> nn.Module:
    width = Settings(8).width + Sizes(0).width
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize("build", [loading, of_settings])
def test_a_build_may_load_its_weights_and_use_named_tuples(build: Any) -> None:
    with catch_warnings(action="error"):
        Module(build=build).check(64)


def test_pretrained_false_does_not_hide_the_weights_of_a_build() -> None:
    assert Module(build=loading, pretrained=False).origin() == Module(build=loading).origin()


MEAN = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)


class Careful(nn.Module):
    """Uses a tensor of its file, and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert torch.isfinite(images).all()
        logits: torch.Tensor = self.head(self.body(images - MEAN).mean((2, 3)))
        return logits


def test_a_forward_may_use_tensors_of_its_file_and_look_at_values() -> None:
    Module(build=Careful).check(64)


class Positioned(nn.Module):
    """Two encoders, each with a parameter of its own beside its list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Encoder(), Encoder()
        self.head = nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.two(self.one(images)).mean((2, 3)))
        return logits


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, 1, 1))
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images + self.position
        for block in self.blocks:
            images = block(images)
        return images


def test_every_parameter_beside_a_list_of_layers_has_a_depth() -> None:
    prefixes = [prefix for depth in Module(build=Positioned).depths("layer") for prefix in depth]
    for name, _ in Positioned().named_parameters():
        assert any(name.startswith(prefix) for prefix in prefixes), name
