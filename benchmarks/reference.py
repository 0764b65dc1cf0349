"""The student step as the paper's released code computes it: slow and obvious. Benchmarks measure against it, and tests
take its losses for the truth of `--teacher-batch-norm train`."""

import warnings

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.images import decode_square
from dataset import network_input


class DecodedAgain(Dataset):
    """Images that are decoded, resized, flipped and scaled each time they are asked for."""

    def __init__(self, info, samples, size):
        self.info, self.samples, self.size = info, samples, size

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        image = torch.from_numpy(decode_square(self.info.images / sample.path, self.size).copy())
        return network_input(image[None, None], torch.rand(1) < 0.5)[0], sample.label


def load_batch(dataset, indices, workers=8):
    """The batch of one step from a loader that is made for this step alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of more workers than cores
        return next(iter(DataLoader(dataset, batch_sampler=[indices], num_workers=workers)))


def student_losses(student, teachers, images, labels, group_of_class):
    """Cross-entropy, and the MSE towards each image's own teacher, (B,) each; the losses are computed image by image,
    and for each image every teacher runs on the whole batch, its batch norm in train mode.

    teachers: [T1, T2, T3] of head, middle and tail. images: (B, 1, H, W) float. group_of_class: (classes,) 0, 1, 2."""
    logits, features = student(images)
    cross_entropy, distillation = [], []
    for i in range(len(images)):
        with torch.no_grad():
            features_of_teachers = [teacher(images)[1] for teacher in teachers]
        own = features_of_teachers[group_of_class[labels[i]]][i]
        cross_entropy.append(F.cross_entropy(logits[i:i + 1].float(), labels[i:i + 1]))
        distillation.append(F.mse_loss(features[i].float(), own.float()))
    return torch.stack(cross_entropy), torch.stack(distillation)


def student_step(student, teachers, optimizer, batch, group_of_class):
    """One step of the released code on a (images, labels) batch."""
    cross_entropy, distillation = student_losses(student, teachers, *batch, group_of_class)
    optimizer.zero_grad()
    (cross_entropy.mean() + distillation.mean()).backward()
    optimizer.step()
