"""The same comparison with MaxViT-T from random weights, for the published ones may not be at hand."""

from harness.config.space import Choice
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig, TrainConfig
from harness.datasets.image_folder import ImageFolder
from harness.models.maxvit import MaxViTT
from harness.search.pruners import no_pruning
from harness.search.samplers import grid

STUDY = Study(
    name="maxvit",
    train=TrainConfig(
        data=ImageFolder(),
        backbone=MaxViTT(pretrained=False),
        optim=OptimConfig(base_lr=6e-4, depth_lr_mult=0.6, warmup_epochs=0),
        batch_size=34,
        epochs=1,
    ),
    space={"optim.base_lr": Choice((6e-4,)), "backbone.dropout": Choice((0.2,))},
    sampler=grid(),
    pruner=no_pruning(),
    trials=1,
    final=FinalConfig(seeds=1, fit_on="train+val", compare_base=False, publish=False),
)
