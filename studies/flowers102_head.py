"""The frozen MaxViT-T's head alone on Oxford Flowers-102, on features that are computed once: fifty trials in minutes.

    python run_study.py --study flowers102_head

Before the first trial the backbone sees every training and validation image once as it is and in four augmented views;
after that a trial trains its head on these features alone. A search by hand in a notebook found .94 to .95 (15 epochs,
Adam, its own split with 6,552 training images; the official one has 1,020). What this study reaches was not measured.
"""

from harness import Choice, FinalConfig, Float, Flowers102, MaxViTT, OptimConfig, Study, TrainConfig, gp, no_pruning

STUDY = Study(
    name="flowers102_head",
    train=TrainConfig(
        data=Flowers102(),
        backbone=MaxViTT(hidden=(1024,), dropout=0.1),
        optim=OptimConfig(base_lr=1e-3, depth_lr_mult=0.0, weight_decay=0.02, warmup_epochs=1),
        batch_size=34,  # 1,020 images make exactly 30 steps
        epochs=30,
        feature_views=4,
    ),
    space={
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((256,), (512,), (1024,), (1024, 512))),
        "optim.base_lr": Float(1e-4, 1e-2, log=True),
    },
    sampler=gp(),
    pruner=no_pruning(),  # a trial takes seconds
    trials=50,
    final=FinalConfig(seeds=3, fit_on="train+val"),
)
