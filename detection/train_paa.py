"""Train a PAA detector: a teacher for LAD, or the student alone that distillation is compared with.

    python -m detection.train_paa --train data/mine/train.json --test data/mine/test.json
    python -m detection.train_paa --depth 101 --recipe 2x --output runs/mine/teacher_paa
    python -m detection.train_paa --depth 18 --auxiliary iou+cop
"""

from detection.engine import run_stage
from detection.methods.paa import PAA, PAASettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = PAASettings(
    train="data/mine/train.json",  # a COCO .json, a Pascal VOC image set .txt, or several joined by commas
    test="data/mine/test.json",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
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

METHOD = PAA

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
