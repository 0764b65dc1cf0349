"""Train a GFL detector that a frozen teacher teaches: layer-calibration and task-disentangle distillation (LTD, TGRS
2023).

    python -m detection.train_ltd --depth 18 --recipe nwpu --teacher runs/nwpu/teacher/final.pt
    python -m detection.train_ltd --depth 18 --no-tasd --no-lic    # cross-layer calibration alone
    python -m detection.train_ltd --depth 18 --no-tasd --lambda-ld-main 0.25 --lambda-ld-vlr 0.25    # and LD
"""

from detection.engine import run_stage
from detection.methods.ltd import LTD, LTDSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = LTDSettings(
    train="data/mine/train.json",  # a COCO .json, a Pascal VOC image set .txt, or several joined by commas
    test="data/mine/test.json",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
    teacher="runs/{data}/teacher/final.pt",
    init="imagenet",  # of the ResNet: imagenet, a file, or none
    depth=18,  # of the ResNet: 18, 34, 50 or 101
    epochs=12,
    batch_size=8,  # over all processes together; TASD's sums are tuned for eight images a process
    lr=0.01,  # for a batch of 16; for another it is scaled in proportion
    lr_steps=(9, 12),  # epochs that begin with a learning rate cut to a tenth
    short=(800, 800),  # short side of the images; drawn from a range in multi-scale training
    long=1333,  # limit of their long side
    clip=35.0,  # largest norm of the gradients, as published
    ccd=True,  # cross-layer calibration distillation of the feature pyramid
    lic=True,  # local implicit calibration, a part of it
    tasd=True,  # task-aware spatial disentangle distillation of boxes and classes
    lambda_fuse=0.5,  # CCD, the fused and the pooled maps
    lambda_attention=1e-3,  # CCD, under the mask of attention
    lambda_tasd_ld=0.025,  # TASD, boxes
    lambda_tasd_kd=0.5,  # TASD, classes
    metric="coco",  # or voc07, voc
    seed=0,
)

METHOD = LTD

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
