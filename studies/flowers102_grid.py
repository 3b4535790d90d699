"""The search that was first made by hand in a notebook: three base rates by three multipliers, nothing pruned.

    python run_study.py --study flowers102_grid --data-root FOLDER

FOLDER holds train/, valid/ and test/ with one folder a class, named 1 to 102, and may hold cat_to_name.json (then add
--set data.names=cat_to_name.json). The notebook's stage 2, best validation accuracy by base LR and multiplier:
1e-3: .9928 .9916 .9868; 6e-4: .9894 .9870 .9868; 3e-4: .9834 .9919 .9882; test .9859 of the best. It counted the best
of the epochs and left dropout on while it evaluated; here the last epoch counts and dropout is off: expect to differ.
"""

from harness import (
    AugmentConfig,
    Choice,
    FinalConfig,
    ImageFolder,
    MaxViTT,
    OptimConfig,
    Study,
    TrainConfig,
    grid,
    no_pruning,
)

STUDY = Study(
    name="flowers102_grid",
    train=TrainConfig(
        data=ImageFolder(),
        backbone=MaxViTT(hidden=(1024,), dropout=0.5),
        # The notebook's crops of scale 0.5 to 1.5: torchvision draws again until one fits, so 0.5 to 1.
        augment=AugmentConfig(crop_scale=(0.5, 1.0), rotation_degrees=30, brightness=0.03, hue=0.03),
        optim=OptimConfig(
            name="adam", base_lr=1e-3, depth_lr_mult=0.3, weight_decay=0.0, warmup_epochs=0, clip_norm=None
        ),
        batch_size=32,
        epochs=10,
        label_smoothing=0.0,
    ),
    space={
        "optim.base_lr": Choice((1e-3, 6e-4, 3e-4)),
        "optim.depth_lr_mult": Choice((0.3, 0.6, 0.9)),
    },
    sampler=grid(),
    pruner=no_pruning(),
    trials=9,
    final=FinalConfig(seeds=3, fit_on="train"),
)
