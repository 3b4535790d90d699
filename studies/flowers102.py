"""MaxViT-T, pretrained on ImageNet, fine-tuned on Oxford Flowers-102 with its official split: the real study.

    python run_study.py --trials 50

Expected test accuracy after training on train and validation images: 97.5 to 98.3 % (an estimate from published results
of like models; not measured here). A GPU is needed to end the same day; the harness says after the first epoch how long
this machine will take.
"""

from harness import Choice, FinalConfig, Float, Flowers102, MaxViTT, OptimConfig, Study, TrainConfig, asha, gp

STUDY = Study(
    name="flowers102",
    train=TrainConfig(
        data=Flowers102(),
        backbone=MaxViTT(hidden=(1024,), dropout=0.2),
        optim=OptimConfig(base_lr=6e-4, depth_lr_mult=0.6, weight_decay=0.02, warmup_epochs=1),
        batch_size=34,  # 1,020 images make exactly 30 steps
        epochs=15,
    ),
    space={
        "backbone.dropout": Float(0.0, 0.6),
        "backbone.hidden": Choice(((256,), (512,), (1024,), (1024, 512))),
        "optim.base_lr": Float(1e-5, 3e-3, log=True),
        "optim.depth_lr_mult": Float(0.1, 1.0),
    },
    sampler=gp(),
    pruner=asha(min_epochs=4),
    trials=50,
    final=FinalConfig(seeds=3, fit_on="train+val", flip=True),
)
