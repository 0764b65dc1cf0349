"""Means over the processes that train together."""

import torch

from common.runtime import sum_over_processes, world_size


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """A scalar tensor's mean over the processes that train together."""
    return sum_over_processes(value.clone()) / world_size() if world_size() > 1 else value
