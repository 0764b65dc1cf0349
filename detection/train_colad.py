"""Train two PAA detectors that assign each other's anchors: Co-learning Label Assignment Distillation (CoLAD, WACV
2022). The student is OUTPUT/final.pt, its peer OUTPUT/peer/final.pt; both are tested.

    python -m detection.train_colad --depth 101 --auxiliary iou+cop --peer-depth 50
    python -m detection.train_colad --depth 18 --peer-depth 18 --init-peer runs/mine/paa/final.pt
"""

from detection.engine import run_stage
from detection.methods.colad import COLAD, CoLADSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = CoLADSettings(
    train="data/mine/train.json",  # a COCO .json, a Pascal VOC image set .txt, or several joined by commas
    test="data/mine/test.json",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
    init="imagenet",  # of both ResNets: imagenet, a file, or none
    init_peer="",  # a checkpoint of a PAA detector that the peer starts from instead
    depth=101,  # of the student's ResNet: 18, 34, 50 or 101
    auxiliary="iou+cop",  # what the student's head predicts besides: iou, iou+iop, iou+cop, iop or cop
    peer_depth=50,
    peer_auxiliary="iou",
    epochs=24,
    batch_size=16,  # over all processes together
    lr=0.01,  # for a batch of 16; for another it is scaled in proportion
    lr_steps=(17, 23),  # epochs that begin with a learning rate cut to a tenth
    short=(640, 800),  # short side of the images, drawn from a range
    long=1333,  # limit of their long side
    metric="coco",  # or voc07, voc
    seed=0,
)

METHOD = COLAD

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
