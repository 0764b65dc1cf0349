"""Stage 4 of T2FTS: the student, trained on all classes. Its layer3 features imitate, image by image, those of the
teacher whose subset holds the image's class y: loss = CE + MSE(f_t(y), f). The sampler practises what the student has
distilled worst.

    python baseline_cl_s_weight.py
    python baseline_cl_s_weight.py --test-only --weights FILE     ours, or the authors' released weights
"""

from recognition.distillation import own_teacher
from recognition.engine import run_stage
from recognition.settings import Settings
from recognition.stage import Stage

# Edit here, or give the flag of the same name (data_root is --data-root); --help lists every setting of the stage.
SETTINGS = Settings(
    data_root="data/FGSC-23",  # made by prepare_dataset.py
    output="runs/{data}/{stage}",  # checkpoints, log and results; {data} is the last part of data_root
    init="baseline",  # the baseline's best checkpoint; or none, imagenet, a checkpoint file
    t1="",  # its checkpoint; empty for best.pt in the folder t1 beside output
    t2="",  # its checkpoint; empty for best.pt in the folder t2 beside output
    t3="",  # its checkpoint; empty for best.pt in the folder t3 beside output
    epochs=100,
    batch_size=8,  # over all processes together
    lr=1e-3,
    schedule="steps",  # or one-cycle, for short runs
    lr_steps=(53,),  # epochs that begin with a learning rate cut to a tenth
    image_size=224,
    sampler="self-calibrated",  # or class-aware, shuffled
    calibration_momentum=0.0,  # above 0: weigh classes by a running loss, not by the last batch alone
    feature_cache=0.0,  # GB of disk for the teachers' features, so that they run once and not at every step
    select="val",  # choose the best epoch on the held-out part; test is the authors' protocol
    seed=0,
)

STAGE = Stage(name="student", group="all", teachers=("t1", "t2", "t3"), targets=own_teacher,
              released={"init": "none", "lr_steps": (53,), "sampler": "self-calibrated"})

if __name__ == "__main__":
    run_stage(STAGE, SETTINGS, __doc__)
