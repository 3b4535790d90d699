"""Kept features: they are what the frozen backbone makes, made once, and a training on them is the training it was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.base.errors import InputError
from harness.base.seeds import derive_seed
from harness.cli.commands import main
from harness.config.space import Choice, Float
from harness.config.train import TrainConfig
from harness.data.augment import IMAGENET, normalise
from harness.data.splits import load_split, load_splits, load_test
from harness.garden.dataset import Garden
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.store.opening import read_store
from harness.training.assemble import assemble, evaluation_of, with_validation_images
from harness.training.features import FeatureSet, FrozenBody, View, keep_features, split
from harness.training.loop import Training, _batches, fit, logits_of, measure
from harness.training.optim import build_optimizer, lr_factor, set_lr
from harness.training.step import seeded
from tests.conftest import make_study
from tests.faulty import Pebble
from tests.refusal import assert_refused, demo_with
from tests.small import SmallNet
from tests.training.test_checkpoint import RUNTIMES, check_every_stop
from tests.training.test_loop import CPU, equal, state, timeless
from tests.training.test_optim import OtherNet

TINY = TinyMaxViT(pretrained=False, hidden=(16,))
VIEWS = 2


def head_only(cache: Path, **changes: Any) -> TrainConfig:
    """The tiny study's training with a frozen backbone, on the features of each image and two views of it."""
    train = make_study(cache).train
    frozen = dataclasses.replace(train.optim, depth_lr_mult=0.0)
    return dataclasses.replace(train, **{"optim": frozen, "feature_views": VIEWS} | changes)


@pytest.fixture
def cache(tmp_path: Path, image_cache: Path) -> Path:
    """The images are decoded already, and no features are kept yet."""
    keep_decoded = shutil.ignore_patterns("features")
    load_splits(make_study(image_cache).train.data, IMAGENET)
    load_split(make_study(image_cache).train.data, IMAGENET, "train")
    return Path(shutil.copytree(image_cache, tmp_path / "cache", ignore=keep_decoded))


def files(cache: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file of features, with its bytes and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(cache.glob("features/*/*"))}


# --- the split ---


@pytest.mark.parametrize(
    ("backbone", "head", "numbers"), [(TINY, "classifier", 96), (SmallNet(), "2", 6), (Pebble(), "classifier", 16)]
)
def test_body_and_head_one_after_the_other_are_the_model(backbone: Any, head: str, numbers: int) -> None:
    model = backbone.build(16, 64).eval()
    names = list(model.state_dict())
    body, rest = split(model, head)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert body(images).shape == (3, numbers)
        assert torch.equal(rest(body(images)), model(images))
    assert list(model.state_dict()) == names
    assert {id(each) for each in rest.parameters()} == {id(each) for each in model.get_submodule(head).parameters()}


def test_a_head_within_a_submodule_is_found_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 2))))
    body, rest = split(model.eval(), "1.1")
    inputs = torch.randn(3, 4)
    assert torch.equal(rest(body(inputs)), model(inputs))
    assert isinstance(rest[0], nn.Dropout)  # what draws belongs to the head


def test_a_model_that_does_more_after_its_head_is_refused(tmp_path: Path) -> None:
    class Sharp(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = super().forward(images)
            return 5 * logits + 1

    model = Sharp(*SmallNet().build(4, 64).children())
    with pytest.raises(InputError, match="2: features cannot be cached"):
        FrozenBody(model, "2", 64, CPU, tmp_path)


def test_a_model_that_uses_parts_of_its_head_is_refused(tmp_path: Path) -> None:
    class Piecewise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 4)})

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head["fc"](self.head["norm"](self.body(images)))
            return logits

    with pytest.raises(InputError, match="is not its body and then head"):
        FrozenBody(Piecewise(), "head", 64, CPU, tmp_path)


def test_a_head_that_works_in_place_leaves_the_features_as_they_are(cache: Path) -> None:
    kept = FeatureSet(features=torch.ones(4, 1, 2), labels=torch.zeros(4))
    for part in kept.parts(2, CPU):
        part.mul_(3)
    assert torch.equal(kept.features, torch.ones(4, 1, 2))


def test_a_last_depth_that_is_a_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class_token, is not a module"):
        FrozenBody(OtherNet().build(4, 64), "class_token", 64, CPU, tmp_path)


@pytest.mark.parametrize("family", ["vit", "convnext", "swin", "swin_v2"])
def test_other_families_can_keep_their_features(tmp_path: Path, family: str) -> None:
    backbone = OtherNet(family=family)
    FrozenBody(backbone.build(4, 64), backbone.depths("block")[-1].rstrip("."), 64, CPU, tmp_path)


# --- the same numbers as through the whole model ---


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [TINY, SmallNet()])
@pytest.mark.parametrize("runtime", ["fp32", "channels_last"])
def test_kept_and_live_logits_agree(cache: Path, backbone: Any, runtime: str) -> None:
    config = head_only(cache, backbone=backbone)
    training = assemble(config, RUNTIMES[runtime], 0)
    next(fit(training))
    check_logits(training)


def check_logits(training: Training) -> None:
    data, runtime = training.config.data, training.runtime
    live = logits_of(training.model, load_split(data, IMAGENET, "val"), runtime)
    assert training.val is not None
    kept = logits_of(training.learner, training.val, runtime)
    assert live.abs().max() > 1e-2
    torch.testing.assert_close(kept, live, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_kept_and_live_logits_of_maxvit_t_agree(tmp_path: Path) -> None:
    data = Garden(limit=16, image_size=224, stored_size=256, cache=str(tmp_path))
    backbone = MaxViTT(pretrained=False, hidden=(32,))
    training = assemble(head_only(tmp_path, data=data, backbone=backbone, feature_views=0), CPU, 0)
    assert isinstance(training.train, FeatureSet)
    assert training.train.features.shape == (16, 1, 512)
    next(fit(training))
    check_logits(training)


def by_hand(training: Training, seed: int) -> list[float]:
    """The losses of a plain loop through the whole model, each image in the version that the training draws."""
    config, model = training.config, training.model
    data = config.data
    plain, stored = (load_split(data, IMAGENET, "train", margin=margin) for margin in (False, True))
    views = [View(config=config.augment, size=data.image_size, number=number) for number in range(VIEWS)]
    versions = torch.stack([normalise(plain.images), *(view.of(stored.images, 0, IMAGENET) for view in views)], 1)
    optimizer, losses, step = build_optimizer(model, training.groups, config.optim), [], 0
    for epoch in range(1, config.epochs + 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        total = 0.0
        with seeded(derive_seed(seed, "epoch", epoch), CPU.device):
            batches = _batches(len(plain), config.batch_size, generator)
            steps = len(batches)
            for batch in batches:
                set_lr(optimizer, lr_factor(step, config.epochs * steps, config.optim.warmup_epochs * steps, "cosine"))
                images = versions[batch, torch.randint(1 + VIEWS, (len(batch),), generator=generator)]
                model.eval()
                model.get_submodule(config.backbone.depths("block")[-1].rstrip(".")).train()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), plain.labels[batch], label_smoothing=config.label_smoothing)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total, step = total + loss.item() * len(batch), step + 1
        losses.append(total / len(plain))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [TINY, SmallNet()])
def test_the_loss_curve_is_that_of_a_plain_loop_through_the_whole_model(cache: Path, backbone: Any) -> None:
    config = head_only(cache, backbone=backbone, epochs=4)
    results = list(fit(assemble(config, CPU, 3)))
    whole = assemble(config, CPU, 3)
    assert [each.train.loss for each in results] == pytest.approx(by_hand(whole, 3), rel=1e-4)
    shown = load_split(config.data, IMAGENET, "val")
    live = measure(logits_of(whole.model, shown, CPU), shown.labels)
    assert results[-1].val is not None
    assert (results[-1].val.correct, results[-1].val.loss) == (live.correct, pytest.approx(live.loss, rel=1e-4))


@pytest.mark.slow
def test_the_frozen_part_neither_learns_nor_draws(cache: Path) -> None:
    """Its weights and BatchNorm's statistics stay, and stochastic depth does nothing."""
    still = TinyMaxViT(pretrained=False, hidden=(16,), stochastic_depth=0.0)
    training = assemble(head_only(cache, backbone=still), CPU, 0)
    before = state(training)
    results = timeless(list(fit(training)))
    after = state(training)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier"}
    dropping = dataclasses.replace(still, stochastic_depth=0.9, bn_momentum=1.0)
    assert timeless(list(fit(assemble(head_only(cache, backbone=dropping), CPU, 0)))) == results


def test_bodies_are_the_same_in_all_trials_and_heads_are_not(cache: Path) -> None:
    """Though nothing of it is pretrained, and whatever head stands on it."""
    other = dataclasses.replace(SmallNet(), hidden=(8, 8), dropout=0.1)
    one, two = (
        assemble(head_only(cache, backbone=backbone), CPU, seed) for seed, backbone in enumerate((SmallNet(), other))
    )
    for name, tensor in one.model.state_dict().items():
        if not name.startswith("2."):
            assert torch.equal(tensor, two.model.state_dict()[name])
    again = assemble(head_only(cache, backbone=SmallNet()), CPU, 1)
    heads = [{name: each for name, each in state(training).items() if name[0] == "2"} for training in (one, again)]
    assert not equal(*heads)


# --- versions ---


def test_a_batch_takes_all_versions_alike_and_an_evaluation_the_image_as_it_is(cache: Path) -> None:
    numbers = torch.arange(3000).view(1000, 3, 1)
    kept = FeatureSet(features=numbers, labels=torch.zeros(1000))
    chosen = torch.randperm(1000)
    batch = kept.batch(chosen, head_only(cache), CPU, torch.Generator().manual_seed(0))[:, 0]
    assert torch.equal(batch // 3, chosen)
    assert min((batch % 3).bincount().tolist()) > 280
    assert torch.equal(torch.cat(list(kept.parts(300, CPU))), numbers[:, 0])


def test_more_views_leave_the_first_ones_as_they_were(cache: Path) -> None:
    few, more = (assemble(head_only(cache, feature_views=count), CPU, 0).train for count in (1, 3))
    assert isinstance(few, FeatureSet)
    assert isinstance(more, FeatureSet)
    assert torch.equal(few.features, more.features[:, :2])
    assert not torch.equal(more.features[:, 1], more.features[:, 2])


@pytest.mark.slow
def test_the_final_training_has_the_validation_images_and_their_views(cache: Path) -> None:
    training = with_validation_images(assemble(head_only(cache), CPU, 0))
    assert isinstance(training.train, FeatureSet)
    assert training.train.features.shape == (64, 1 + VIEWS, 96)
    assert next(fit(training)).train.total == 64
    test = load_test(training.config.data, IMAGENET)
    live, kept = logits_of(training.model, test, CPU), logits_of(training.learner, evaluation_of(training, test), CPU)
    torch.testing.assert_close(kept, live, rtol=0, atol=1e-4)


# --- kept once ---


def test_a_second_training_computes_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = timeless(list(fit(assemble(head_only(cache), CPU, 0))))
    assert "features of 96 images and views" in capsys.readouterr().err
    before = files(cache)
    assert timeless(list(fit(assemble(head_only(cache), CPU, 0)))) == first
    assert files(cache) == before
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_what_decides_the_features_gives_others(cache: Path) -> None:
    """Images, weights, augmentation and arithmetic."""
    config = head_only(cache)
    keep_features(config, CPU, with_validation=False)
    count = len(files(cache))
    others = [
        ({"augment": dataclasses.replace(config.augment, flip=0.0)}, CPU, VIEWS),
        ({"data": dataclasses.replace(config.data, limit=20)}, CPU, 2 + VIEWS),
        ({"backbone": TinyMaxViT(hidden=(16,))}, CPU, 2 + VIEWS),
        ({}, RUNTIMES["bf16"], 2 + VIEWS),
        ({"backbone": dataclasses.replace(TINY, hidden=(8,), dropout=0.5), "batch_size": 5, "epochs": 1}, CPU, 0),
    ]
    for changes, runtime, new in others:
        keep_features(dataclasses.replace(config, **changes), runtime, with_validation=False)
        assert len(files(cache)) == count + new, changes
        count += new


@pytest.mark.slow
def test_a_process_that_was_killed_leaves_whole_files_and_the_next_goes_on_to_the_same_bits(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Garden(train_per_class=10, val_per_class=2, test_per_class=2, cache=str(cache))  # 160 images: two files
    config = head_only(cache, data=data)
    keep_features(config, CPU, with_validation=True)
    whole = files(cache)
    lost = [path for number, path in enumerate(whole) if number % 3 == 1]
    for path in lost:
        path.unlink()
    capsys.readouterr()
    keep_features(config, CPU, with_validation=True)
    assert {path: content for path, (content, _) in files(cache).items()} == {path: whole[path][0] for path in whole}
    assert all(stamp == whole[path][1] for path, (_, stamp) in files(cache).items() if path not in lost)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_named_and_made_again(cache: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    config = head_only(cache)
    results = timeless(list(fit(assemble(config, CPU, 0))))
    before = files(cache)
    path = next(iter(before))
    content = before[path][0]
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    path.write_bytes({"cut": content[:-100], "flipped": flipped, "empty": b""}[damage])
    capsys.readouterr()
    assert timeless(list(fit(assemble(config, CPU, 0)))) == results
    assert f"{path} is damaged" in capsys.readouterr().err
    assert path.read_bytes() == content


@pytest.mark.slow
def test_a_whole_file_in_another_ones_place_is_not_taken(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = head_only(cache)
    results = timeless(list(fit(assemble(config, CPU, 0))))
    before = files(cache)
    (one, (content, _)), (_, (other, _)) = list(before.items())[:2]
    one.write_bytes(other)
    capsys.readouterr()
    assert timeless(list(fit(assemble(config, CPU, 0)))) == results
    assert f"{one} belongs to other images" in capsys.readouterr().err
    assert one.read_bytes() == content


# --- the laws of every training ---


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [TINY, SmallNet()])
def test_stopped_anywhere_it_ends_as_if_it_was_not(cache: Path, tmp_path: Path, backbone: Any) -> None:
    check_every_stop(tmp_path, head_only(cache, backbone=backbone, epochs=3), CPU)


STUDY_FILE = """
import dataclasses
from harness.config.space import Float
from tests.conftest import make_study
from tests.small import SmallNet

STUDY = make_study("data/cache")
STUDY = dataclasses.replace(
    STUDY,
    space={"backbone.dropout": Float(0.0, 0.6), "optim.base_lr": Float(1e-4, 1e-2, log=True)},
    train=dataclasses.replace(
        STUDY.train,
        backbone=SmallNet(),
        feature_views=2,
        optim=dataclasses.replace(STUDY.train.optim, depth_lr_mult=0.0),
    ),
)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_whole_study_ends_with_a_whole_model_and_every_trial_is_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.py").write_text(STUDY_FILE)
    assert main(["run", "--study", "tiny"]) == 0
    assert "The test set was opened once" in capsys.readouterr().out
    for number in "012":
        assert main(["reproduce", "tiny", number]) == 0
    assert main(["doctor", "tiny"]) == 0
    model = tmp_path / "studies" / "tiny.model"
    (model / "model.safetensors").unlink()
    assert main(["run", "--study", "tiny"]) == 0  # the lost model is trained again
    assert main(["doctor", "tiny"]) == 0
    with read_store("tiny", f"sqlite:///{tmp_path}/studies/tiny.db") as store:
        said = store.attributes().get("final")
    from safetensors.torch import load_file

    net = SmallNet(hidden=(16,)).build(16, 64)
    net.load_state_dict(load_file(model / "model.safetensors"))
    data = Garden(train_per_class=2, val_per_class=2, test_per_class=2, cache=str(tmp_path / "data/cache"))
    test = load_test(data, IMAGENET)
    assert measure(logits_of(net, test, CPU), test.labels).correct == said["correct"]
    assert json.loads((model / "model.json").read_text())["configuration"]["feature_views"] == 2


# --- what is refused ---


def test_features_of_a_backbone_that_learns_are_refused(image_cache: Path) -> None:
    frozen = head_only(image_cache)
    study = make_study(image_cache)
    with pytest.raises(InputError, match=r"optim\.depth_lr_mult is or may become 0\.5: set it to 0 and remove"):
        dataclasses.replace(study.train, feature_views=0)
    with pytest.raises(InputError, match=r"may become 1: .* remove it from the study's space"):
        dataclasses.replace(study, train=frozen)  # its space has multipliers
    space = {"optim.base_lr": Float(1e-4, 1e-2), "optim.depth_lr_mult": Choice((0.0,))}
    assert dataclasses.replace(study, train=frozen, space=space).train == frozen
    mixed = dataclasses.replace(frozen, feature_views=None)  # as ever: some trials freeze, others do not
    assert dataclasses.replace(study, train=mixed).train == mixed


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["feature_views=4"], ["optim.depth_lr_mult is or may become 0.8", "set it to 0 and remove"]),
        (["optim.depth_lr_mult=0", "feature_views=4"], ["may become 1", "remove it from the study's space"]),
        (["optim.depth_lr_mult=0", "feature_views=-1"], ["feature_views must lie in 0..1000, or be null, not -1"]),
        (["optim.depth_lr_mult=0", "feature_views=1000000000"], ["feature_views must lie in 0..1000"]),
        (["feature_views=1.5"], ["feature_views must be a whole number or null, not 1.5"]),
        (["feature_views=true"], ["feature_views must be a whole number or null"]),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_anything_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str], settings: list[str], words: list[str]
) -> None:
    arguments = ["run", "--study", "demo", *(word for each in settings for word in ("--set", each))]
    assert_refused(workspace, capsys, arguments, words)


@pytest.mark.usefixtures("offline")
def test_a_study_file_that_searches_the_multiplier_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_with(workspace, "bad", "batch_size=24,", "batch_size=24,\n        feature_views=2,")
    assert_refused(workspace, capsys, ["run", "--study", "bad"], ["bad.py", "optim.depth_lr_mult is or may become"])


def test_what_changes_no_view_makes_no_other_features(cache: Path) -> None:
    plain = head_only(cache)
    assemble(plain, CPU, 0)
    before = files(cache)
    augment = dataclasses.replace(plain.augment, mixup=0.3, tail=0.5)
    assemble(dataclasses.replace(plain, augment=augment), CPU, 0)
    assert files(cache) == before
