"""Train a detector of oriented boxes that a frozen teacher teaches: Rotated-LD (arXiv:2204.05957).

    python -m detection.train_rotated_ld --teacher runs/dota/teacher/final.pt
    python -m detection.train_rotated_ld --teacher FILE --recipe kld-r34
    python -m detection.train_rotated_ld --teacher FILE --recipe gwd-r50
"""

from detection.engine import run_stage
from detection.methods.rotated_ld import ROTATED_LD, RotatedLDSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = RotatedLDSettings(
    train="data/dota/train",  # a folder of DOTA, a COCO .json with polygons, or several joined by commas
    test="data/dota/val",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
    teacher="runs/{data}/teacher/final.pt",
    init="imagenet",  # of the ResNet: imagenet, a file, or none
    depth=18,  # of the ResNet: 18, 34, 50 or 101
    epochs=12,
    batch_size=2,  # over all processes together
    lr=0.02,  # for a batch of 16; for another it is scaled in proportion
    lr_steps=(9, 12),  # epochs that begin with a learning rate cut to a tenth
    clip=35.0,  # largest norm of all gradients together
    short=(1024, 1024),  # short side of the images
    long=1024,  # limit of their long side
    box_loss="gwd",  # or kld, smooth_l1
    lambda_ld=10.0,  # LD on the main and the valuable region
    lambda_kd=20.0,  # the classification's distillation there, for 15 classes
    imitation="none",  # or finegrained
    metric="dota",
    seed=0,
)

METHOD = ROTATED_LD

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
