"""Stage 2 of T2FTS: the middle teacher T2, trained on the middle classes. Its layer3 features imitate those of T1:
loss = CE + MSE(f_T1, f).

    python baseline_cl_t2.py
"""

from recognition.distillation import each_teacher
from recognition.engine import run_stage
from recognition.settings import Settings
from recognition.stage import Stage

# Edit here, or give the flag of the same name (data_root is --data-root); --help lists every setting of the stage.
SETTINGS = Settings(
    data_root="data/FGSC-23",  # made by prepare_dataset.py
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the last part of data_root
    init="baseline",  # the baseline's best checkpoint; or none, imagenet, a checkpoint file
    t1="",  # its checkpoint; empty for best.pt in the folder t1 beside output
    epochs=100,
    batch_size=8,  # over all processes together
    lr=1e-3,
    schedule="steps",  # or one-cycle, for short runs
    lr_steps=(33, 63, 93),  # epochs that begin with a learning rate cut to a tenth
    image_size=224,
    feature_cache=0.0,  # GB of disk for the teachers' features, so that they run once and not at every step
    select="val",  # choose the best epoch on the held-out part; test is the authors' protocol
    seed=0,
)

STAGE = Stage(name="t2", group="middle", teachers=("t1",), targets=each_teacher, released={"init": "none"})

if __name__ == "__main__":
    run_stage(STAGE, SETTINGS, __doc__)
