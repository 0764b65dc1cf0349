"""Train a detector of oriented boxes, rotated RetinaNet: a teacher, or the student alone.

    python -m detection.train_rotated --train data/dota/train --test data/dota/val
    python -m detection.train_rotated --depth 34 --recipe 2x --output runs/dota/teacher
    python -m detection.train_rotated --depth 18 --box-loss smooth_l1 --reg-max 0    # without distributions
"""

from detection.engine import run_stage
from detection.methods.rotated import ROTATED, RotatedSettings

# Edit here, or give the flag of the same name (batch_size is --batch-size); --help lists every setting there is.
SETTINGS = RotatedSettings(
    train="data/dota/train",  # a folder of DOTA, a COCO .json with polygons, or several joined by commas
    test="data/dota/val",
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the folder that train lies in
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
    metric="dota",
    seed=0,
)

METHOD = ROTATED

if __name__ == "__main__":
    run_stage(METHOD, SETTINGS, __doc__)
