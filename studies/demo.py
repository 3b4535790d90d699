"""The whole pipeline in about two minutes, offline and on a CPU: a tiny MaxViT on sixteen species of drawn flowers.

    python run_study.py --study demo --trials 10

The tiny MaxViT was pretrained on 64 other drawn species, so base LR and depth-LR multiplier mean here what they mean in
the real study: too high a rate forgets the pretraining, too low a one learns nothing in six epochs.
"""

from harness import (
    AugmentConfig,
    Choice,
    FinalConfig,
    Float,
    Garden,
    OptimConfig,
    RuntimeConfig,
    Study,
    TinyMaxViT,
    TrainConfig,
    asha,
    gp,
)

STUDY = Study(
    name="demo",
    train=TrainConfig(
        data=Garden(val_per_class=30),
        backbone=TinyMaxViT(),
        augment=AugmentConfig(crop_scale=(0.6, 1.0)),
        # What recipes for a hundred epochs of fine-tuning write: a good guess, and too slow for six.
        optim=OptimConfig(base_lr=5e-4, depth_lr_mult=0.8),
        # Named, not "auto": the demo should compute in the same way on every machine.
        runtime=RuntimeConfig(precision="fp32", channels_last="on", compile="off"),
        batch_size=24,
        epochs=6,
    ),
    space={
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((64,), (128,), (256,), (128, 64))),
        "optim.base_lr": Float(1e-4, 3e-2, log=True),
        "optim.depth_lr_mult": Float(0.0, 1.0),
    },
    sampler=gp(n_startup_trials=4),
    pruner=asha(min_epochs=2, reduction=2),
    trials=10,
    final=FinalConfig(seeds=3, fit_on="train"),
)
