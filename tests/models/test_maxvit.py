"""The two MaxViTs: sizes, heads, depths, and weights that load, or are refused by name."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import maxvit_t

from harness.base.errors import InputError
from harness.models.maxvit import TINY_WEIGHTS, MaxViTT, TinyMaxViT

WEIGHTS_FILE = "maxvit_t-bc5ab103.pth"
PUBLISHED_PARAMETERS = 30_919_624  # of torchvision's maxvit_t with its 1,000 classes
CLASS_LAYER = 512 * 1000  # has no bias


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tiny(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return TinyMaxViT(pretrained=False, **fields).build(16, 64)


@pytest.fixture(scope="module")
def maxvit() -> nn.Module:
    return MaxViTT(pretrained=False, hidden=(1024,), bn_momentum=0.07).build(102, 224)


# --- size, head, behaviour ---


def test_maxvit_t_has_the_published_parameters_and_the_new_head(maxvit: nn.Module) -> None:
    head = 512 * 1024 + 1024 + 1024 * 102 + 102
    assert parameters(maxvit) == PUBLISHED_PARAMETERS - CLASS_LAYER + head


def test_the_tiny_one_is_tiny() -> None:
    assert parameters(tiny()) < 1_000_000


def test_images_become_one_logit_a_class() -> None:
    assert tiny()(torch.zeros(2, 3, 64, 64)).shape == (2, 16)


@pytest.mark.slow
def test_maxvit_t_turns_images_into_one_logit_a_class(maxvit: nn.Module) -> None:
    with torch.inference_mode():
        assert maxvit.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 102)


@pytest.mark.parametrize("hidden", [(), (12,), (12, 7)], ids=str)
def test_the_head_has_linear_relu_dropout_per_hidden_width_then_the_classes(hidden: tuple[int, ...]) -> None:
    model = tiny(hidden=hidden, dropout=0.3)
    *kept, head = model.classifier
    kinds = [nn.AdaptiveAvgPool2d, nn.Flatten, nn.LayerNorm, nn.Linear, nn.Tanh]
    assert [type(layer) for layer in kept] == kinds
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Dropout] * len(hidden) + [nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == list(zip((96, *hidden), (*hidden, 16), strict=True))
    assert all(layer.p == 0.3 for layer in head if isinstance(layer, nn.Dropout))


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    model = tiny(dropout=0.5, stochastic_depth=0.5)
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_every_batch_norm_has_the_momentum_of_the_configuration(maxvit: nn.Module) -> None:
    for model in (maxvit, tiny(bn_momentum=0.07)):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) > 5
        assert {norm.momentum for norm in norms} == {0.07}
        assert {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.4])
def test_stochastic_depth_grows_to_the_probability_of_the_configuration(probability: float) -> None:
    for model in (
        MaxViTT(pretrained=False, stochastic_depth=probability).build(2, 224),
        tiny(stochastic_depth=probability),
    ):
        drops = [module.p for module in model.modules() if type(module).__name__ == "StochasticDepth"]
        assert max(drops) == pytest.approx(probability)
        assert drops == sorted(drops)


# --- depths ---


@pytest.mark.parametrize(("by", "count"), [("block", 6), ("layer", 13)])
def test_maxvit_t_has_six_depths_by_block_and_thirteen_by_layer(maxvit: nn.Module, by: Any, count: int) -> None:
    depths = MaxViTT().depths(by)
    assert len(depths) == len(set(depths)) == count
    assert (depths[0], depths[-1]) == (("stem.",), ("classifier.",))
    for name, _ in maxvit.named_parameters():
        assert sum(name.startswith(depth) for depth in depths) == 1, name


def test_the_tiny_one_has_five_depths() -> None:
    assert len(TinyMaxViT().depths("block")) == len(TinyMaxViT().depths("layer")) == 5


# --- bad fields ---


@pytest.mark.parametrize("family", [MaxViTT, TinyMaxViT])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden", (0,)),
        ("hidden", (64, -1)),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("stochastic_depth", 1.0),
        ("stochastic_depth", -0.1),
        ("bn_momentum", 0.0),
        ("bn_momentum", 1.5),
    ],
)
def test_a_bad_field_is_named(family: Any, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"backbone\.{field}"):
        family(**{field: value})


@pytest.mark.parametrize("size", [224, 448])
def test_maxvit_t_takes_multiples_of_224(size: int) -> None:
    MaxViTT(pretrained=False).check(size)


@pytest.mark.parametrize("size", [1, 223, 256, 300])
def test_maxvit_t_refuses_other_sizes(size: int) -> None:
    with pytest.raises(InputError, match=rf"data\.image_size must be a multiple of 224.*{size}"):
        MaxViTT(pretrained=False).check(size)


def test_the_tiny_one_takes_multiples_of_64() -> None:
    TinyMaxViT(pretrained=False).check(128)
    with pytest.raises(InputError, match=r"data\.image_size must be a multiple of 64"):
        TinyMaxViT(pretrained=False).check(72)


# --- the published weights, from a hub cache of our own ---


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch home whose checkpoint has the published layout and weights of our own."""
    home = tmp_path_factory.mktemp("torch")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(7)
    torch.save(maxvit_t(weights=None).state_dict(), checkpoints / WEIGHTS_FILE)
    return home


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the checkpoint in an empty torch home, without network: nobody listens where downloads go."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints / WEIGHTS_FILE


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 448])
def test_all_but_the_class_layer_come_from_the_checkpoint(
    hub: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    published: dict[str, Tensor] = torch.load(hub / "hub" / "checkpoints" / WEIGHTS_FILE, weights_only=True)
    MaxViTT().check(size)
    loaded = MaxViTT().build(102, size).state_dict()
    head = {name for name in loaded if name.startswith("classifier.5.")}
    assert set(loaded) - head == set(published) - {"classifier.5.weight"}
    for name in set(loaded) - head:
        assert torch.equal(loaded[name], published[name]), name


def test_missing_weights_without_network_name_the_file_and_its_address(empty_hub: Path) -> None:
    with pytest.raises(InputError) as caught:
        MaxViTT().check(224)
    for part in (str(empty_hub), f"/models/{WEIGHTS_FILE}", "backbone.weights=FILE", "backbone.pretrained=false"):
        assert part in str(caught.value)


def saved(thing: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def zipped(content: bytes) -> bytes:
    """As torch before 1.6 distributed checkpoints: one file in a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(WEIGHTS_FILE, content)
    return buffer.getvalue()


WEIGHTS = {"stem.0.0.weight": torch.ones(50)}
GARBAGE = {
    "empty": b"",
    "text": b"hello world\n" * 100,
    "a page": b"<!DOCTYPE html><html>404</html>",
    "zeros": bytes(5000),
    "cut early": saved(WEIGHTS)[:100],
    "cut in half": saved(WEIGHTS)[: len(saved(WEIGHTS)) // 2],
    "cut late": saved(WEIGHTS)[:-10],
    "old format, one byte": saved(WEIGHTS, _use_new_zipfile_serialization=False)[:1],
    "old format, cut": saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-10],
    "a zip of text": zipped(b"abc"),
    "no dictionary": saved(torch.ones(3)),
    "another model": saved(WEIGHTS),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_is_named_before_the_study_starts(empty_hub: Path, kind: str) -> None:
    empty_hub.write_bytes(GARBAGE[kind])
    with pytest.raises(InputError) as caught:
        MaxViTT().check(224)
    assert str(empty_hub) in str(caught.value)


class Malicious:
    """Unpickled without care, it runs a command."""

    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("wrap", [pickle.dumps, saved, lambda thing: zipped(pickle.dumps(thing))])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_runs_code_does_not_run_it(empty_hub: Path, tmp_path: Path, wrap: Any) -> None:
    witness = tmp_path / "was here"
    empty_hub.write_bytes(wrap({"stem.0.0.weight": Malicious(witness)}))
    with pytest.raises(InputError):
        MaxViTT().check(224)
    assert not witness.exists()


# --- the shipped weights ---


def test_the_shipped_weights_are_small_and_load_the_same_twice() -> None:
    assert TINY_WEIGHTS.stat().st_size < 1_300_000
    TinyMaxViT().check(64)
    first, again = (TinyMaxViT().build(16, 64).state_dict() for _ in range(2))
    head = {name for name in first if name.startswith("classifier.5.")}
    for name in set(first) - head:
        assert torch.equal(first[name], again[name]), name
        assert first[name].dtype in (torch.float32, torch.int64)
    assert any(not torch.equal(first[name], again[name]) for name in head), "the class layer is drawn anew"


def test_the_fingerprint_tells_which_weights_a_study_began_with() -> None:
    assert MaxViTT(pretrained=False).fingerprint() == TinyMaxViT(pretrained=False).fingerprint() == "none"
    assert MaxViTT().fingerprint() == "bc5ab103d47a7c6c", "which older studies recorded"
    assert TinyMaxViT().fingerprint() == hashlib.sha256(TINY_WEIGHTS.read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("backbone", "classes", "size"),
    [(TinyMaxViT, 16, 64), pytest.param(MaxViTT, 102, 224, marks=pytest.mark.slow)],
)
def test_a_file_of_weights_takes_the_place_of_the_published_ones(
    backbone: Any, classes: int, size: int, tmp_path: Path
) -> None:
    theirs = backbone(pretrained=False, hidden=()).build(classes, size)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = backbone(weights=str(tmp_path / "w.pth"), hidden=())
    ours.check(size)
    state = ours.build(classes, size).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert name.startswith("classifier.5.") or torch.equal(state[name], tensor), name
