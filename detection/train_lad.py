"""Train a PAA detector whose anchors a frozen teacher assigns: Label Assignment Distillation (LAD, WACV 2022).

    python -m detection.train_lad --depth 18 --teacher runs/mine/teacher_paa/final.pt
    python -m detection.train_lad --depth 18 --distill solad
    python -m detection.train_lad --depth 18 --distill soft-label
"""

from detection.engine import run_stage
from detection.methods.lad import LAD, LADSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = LADSettings(
    train="data/mine/train.json",  # a COCO .json, a Pascal VOC image set .txt, or several joined by commas
    test="data/mine/test.json",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
    teacher="runs/{data}/teacher_paa/final.pt",
    distill="lad",  # the teacher gives the assignment; soft-label: its scores and boxes; solad: both
    init="imagenet",  # of the ResNet: imagenet, a file, or none
    depth=50,  # of the ResNet: 18, 34, 50 or 101
    auxiliary="iou",  # what the head predicts besides: iou, iou+iop, iou+cop, iop or cop
    epochs=12,
    batch_size=16,  # over all processes together
    lr=0.01,  # for a batch of 16; for another it is scaled in proportion
    lr_steps=(9, 12),  # epochs that begin with a learning rate cut to a tenth
    short=(800, 800),  # short side of the images; drawn from a range in multi-scale training
    long=1333,  # limit of their long side
    metric="coco",  # or voc07, voc
    seed=0,
)

METHOD = LAD

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
