"""RegNetY-800MF with spatial skipping, ImageNet's 1000 classes: the network of LAUDNet's table.

For tools/benchmark.py; it has no data set of its own.
"""

default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="las_mm.LASRegNet",
        arch="regnety_800mf",
        mode="spatial",
        granularity=(4, 4, 2, 1),
        out_indices=(3,),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=784,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
)
