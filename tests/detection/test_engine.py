"""A training step of a detector: the learning rate, the teacher's part in it, and that a detector learns."""

import dataclasses

import pytest
import torch

from demo.draw_scenes import write_demo
from detection.data import batches
from detection.data.annotations import read_annotations
from detection.engine import learning_rate, train_step
from detection.inference import detect, inference_network
from detection.methods.gfl import GFL, GFLSettings
from detection.methods.ld import LD, LDSettings
from detection.metrics.coco_ap import coco_ap
from detection.network.detector import Architecture, Detector
from detection.settings import Settings
from tests.support import detector_run, real


def test_the_learning_rate_warms_up_and_steps_down():
    settings = Settings(lr=0.01, batch_size=8, lr_steps=(3, 4), warmup_steps=10)
    rates = [learning_rate(settings, *at, 20) for at in ((1, 0), (1, 5), (1, 10), (2, 19), (3, 0), (4, 0))]
    assert rates == pytest.approx([5e-6, 5e-3 * 0.5005, 5e-3, 5e-3, 5e-4, 5e-5])


def test_the_teacher_answers_once_a_step_and_learns_nothing(tmp_path):
    write_demo(tmp_path / "scenes", seed=0, train=2, test=1, size=64)
    teacher, student = (Detector(3, Architecture(18, 64, 1)) for _ in range(2))
    asked, before = [], {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.eval().requires_grad_(False).register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    run = detector_run(LD, student, LDSettings(batch_size=2, warmup_steps=0), teacher=teacher)
    annotations = read_annotations(tmp_path / "scenes" / "train.json")
    draws = [batches.Draw(i, 64, 64, False) for i in (0, 1)]
    batch = batches.collate(batches.DetectionDataset(annotations).__getitems__(draws))
    names, terms = train_step(run, run.trainee.train(), batch)
    assert asked == [False] and len(names) == len(terms) == 6 and terms.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in student.state_dict())


@pytest.mark.real_data
def test_four_real_images_are_learned_by_heart():
    torch.manual_seed(0)
    annotations = read_annotations(real("nwpu_vhr10") / "instances_train2017.json")
    records = [record for record in annotations.records if 3 <= len(record.labels) <= 6][:4]
    annotations = dataclasses.replace(annotations, records=records)
    draws = batches.test_draws(annotations, 256, 320)
    batch = batches.collate(batches.DetectionDataset(annotations).__getitems__(draws))
    network = Detector(10, Architecture(18, 64, 2)).to(memory_format=torch.channels_last)
    run = detector_run(GFL, network, GFLSettings(lr=0.08, batch_size=4, lr_steps=(90,), warmup_steps=20, clip=35))
    for run.epoch in range(100):
        train_step(run, run.trainee.train(), batch)
    found = detect(inference_network(network, run.device), batch.images, batch.sizes, batch.scales, run.device, "fp32")
    assert coco_ap(found, annotations)["AP50"] > 0.95
