"""The study that `benchmarks.whole_study` compares: ten configurations of the tiny MaxViT, fixed beforehand.

Every contestant trains these ten for as many epochs, retrains the best on train and validation photographs with one
seed, tests it and keeps the model. Nothing is pruned.
"""

from harness.config.space import Choice
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig, TrainConfig
from harness.datasets.image_folder import ImageFolder
from harness.models.maxvit import TinyMaxViT
from harness.search.pruners import no_pruning
from harness.search.samplers import grid

STUDY = Study(
    name="tiny",
    train=TrainConfig(
        data=ImageFolder(image_size=64, stored_size=72),
        backbone=TinyMaxViT(),
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.6),
        batch_size=34,
        epochs=3,
    ),
    space={
        "optim.base_lr": Choice((1e-3, 2e-3, 4e-3, 6e-3, 8e-3)),
        "backbone.dropout": Choice((0.1, 0.3)),
    },
    sampler=grid(),
    pruner=no_pruning(),
    trials=10,
    final=FinalConfig(seeds=1, fit_on="train+val", compare_base=False, publish=False),
)
