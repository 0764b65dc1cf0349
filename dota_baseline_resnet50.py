"""baseline_resnet50.py for the chips of DOTA's objects: the baseline of T2FTS, as there but for the data set.

    python dota_baseline_resnet50.py
"""

from dataclasses import replace

from baseline_resnet50 import SETTINGS, STAGE
from recognition.engine import run_stage

# Edit here, or in baseline_resnet50.py for both; every setting of the stage is also a flag.
SETTINGS = replace(
    SETTINGS,
    data_root="data/DOTA",  # made by prepare_dataset.py
)

STAGE = replace(STAGE, script_prefix="dota_", released={"init": "none"})

if __name__ == "__main__":
    run_stage(STAGE, SETTINGS, __doc__)
