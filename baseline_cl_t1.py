"""Stage 1 of T2FTS: the head teacher T1, trained on the head classes with cross-entropy alone.

    python baseline_cl_t1.py
"""

from recognition.engine import run_stage
from recognition.settings import Settings
from recognition.stage import Stage

# Edit here, or give the flag of the same name (data_root is --data-root); --help lists every setting of the stage.
SETTINGS = Settings(
    data_root="data/FGSC-23",  # made by prepare_dataset.py
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the last part of data_root
    init="baseline",  # the baseline's best checkpoint; or none, imagenet, a checkpoint file
    epochs=100,
    batch_size=8,  # over all processes together
    lr=1e-3,
    schedule="steps",  # or one-cycle, for short runs
    lr_steps=(33, 63, 93),  # epochs that begin with a learning rate cut to a tenth
    image_size=224,
    select="val",  # choose the best epoch on the held-out part; test is the authors' protocol
    seed=0,
)

STAGE = Stage(name="t1", group="head", released={"init": "none"})

if __name__ == "__main__":
    run_stage(STAGE, SETTINGS, __doc__)
