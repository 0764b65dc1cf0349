"""Stage 0 of T2FTS: the baseline, a ResNet-50 trained on all classes with cross-entropy. The teachers and the student
may start from it, and the student is compared with it.

    python baseline_resnet50.py
    python baseline_resnet50.py --data-root data/mine --init none --epochs 20 --schedule one-cycle --lr 0.01
    torchrun --nproc_per_node 2 baseline_resnet50.py
"""

from recognition.engine import run_stage
from recognition.settings import Settings
from recognition.stage import Stage

# Edit here, or give the flag of the same name (data_root is --data-root); --help lists every setting of the stage.
SETTINGS = Settings(
    data_root="data/FGSC-23",  # made by prepare_dataset.py
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the last part of data_root
    init="imagenet",  # none, imagenet, or a checkpoint file
    epochs=100,
    batch_size=8,  # over all processes together
    lr=1e-3,
    schedule="steps",  # or one-cycle, for short runs
    lr_steps=(33, 63, 93),  # epochs that begin with a learning rate cut to a tenth
    image_size=224,
    sampler="shuffled",  # or class-aware
    select="val",  # choose the best epoch on the held-out part; test is the authors' protocol
    seed=0,
)

STAGE = Stage(name="baseline", group="all", released={"init": "imagenet"})

if __name__ == "__main__":
    run_stage(STAGE, SETTINGS, __doc__)
