"""Train a GFL detector that a frozen teacher teaches: Localization Distillation (LD, CVPR 2022).

    python -m detection.train_ld --depth 18 --teacher runs/mine/teacher/final.pt
    python -m detection.train_ld --depth 18 --imitation gibox
    python -m detection.train_ld --teacher runs/mine/gfl/final.pt --lambda-kd-main 0 --lambda-ld-vlr 0    # self-LD
"""

from detection.engine import run_stage
from detection.methods.ld import LD, LDSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = LDSettings(
    train="data/mine/train.json",  # a COCO .json, a Pascal VOC image set .txt, or several joined by commas
    test="data/mine/test.json",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
    teacher="runs/{data}/teacher/final.pt",
    init="imagenet",  # of the ResNet: imagenet, a file, or none
    depth=50,  # of the ResNet: 18, 34, 50 or 101
    epochs=12,
    batch_size=6,  # over all processes together; LD's sums are tuned for two or three images a process
    lr=0.01,  # for a batch of 16; for another it is scaled in proportion
    lr_steps=(9, 12),  # epochs that begin with a learning rate cut to a tenth
    short=(800, 800),  # short side of the images; drawn from a range in multi-scale training
    long=1333,  # limit of their long side
    lambda_ld_main=0.25,  # LD on the positive anchors
    lambda_ld_vlr=0.25,  # LD on the valuable localization region around them
    lambda_kd_main="auto",  # the classification's distillation on the positive anchors: 10 for 80 classes
    lambda_kd_vlr=0.0,  # ... on the valuable localization region
    imitation="none",  # or fitnet, fitnet_full, decouple, finegrained, gibox
    metric="coco",  # or voc07, voc
    seed=0,
)

METHOD = LD

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
