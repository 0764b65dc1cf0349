"""Two groups in a row of numbers: a mixture of two Gaussians, fitted by expectation and maximisation (EM)."""

import math

import torch

FLOOR = 1e-6  # added to each variance
TOLERANCE = 1e-3  # change of the mean log-likelihood at which a row has converged
MOST_STEPS = 100


def two_gaussians(values: torch.Tensor, taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a mixture of two one-dimensional Gaussians to each row, all rows at once, in double precision.

    values: (T, n). taken: (T, n) bool, which of them count. Returns whether the first component is the likelier one of
    each value, (T, n) bool; and the logarithm of the mixture's density there, (T, n). What is not taken has any value.

    The components start at the smallest and the largest value with weights 1/2 and variances 1. A row has converged
    when its mean log-likelihood changes by less than TOLERANCE, and then stays as it is: the results of PAA depend on
    how early that is. The same as scikit-learn's GaussianMixture with these starting values, and its defaults."""
    values = values.double()
    smallest = values.masked_fill(~taken, torch.inf).amin(dim=1)
    largest = values.masked_fill(~taken, -torch.inf).amax(dim=1)
    means = torch.stack([smallest, largest], dim=1).nan_to_num(0, 0, 0)  # (T, 2); rows without values have any
    values = torch.where(taken, values, means[:, :1])[..., None]  # (T, n, 1)
    variances, weights = torch.ones_like(means), torch.full_like(means, 0.5)
    count = taken.sum(dim=1).clamp(min=1)
    before = torch.full_like(smallest, -torch.inf)
    running = torch.ones_like(taken[:, 0])
    for _ in range(MOST_STEPS):
        joint = log_densities(values, means, variances, weights)  # (T, n, 2)
        density = joint.logsumexp(dim=2)  # (T, n)
        shares = (joint - density[..., None]).exp() * taken[..., None]
        counts = shares.sum(dim=1) + 10 * torch.finfo(shares.dtype).eps  # (T, 2)
        new_means = (shares * values).sum(dim=1) / counts
        new_variances = (shares * (values - new_means[:, None])**2).sum(dim=1) / counts + FLOOR
        new_weights = counts / counts.sum(dim=1, keepdim=True)
        means, variances, weights = (torch.where(running[:, None], new, old) for new, old in (
            (new_means, means), (new_variances, variances), (new_weights, weights)))
        mean_density = (density * taken).sum(dim=1) / count
        running = running & ~((mean_density - before).abs() < TOLERANCE)
        before = mean_density
        if not running.any():
            break
    joint = log_densities(values, means, variances, weights)
    return joint[..., 0] >= joint[..., 1], joint.logsumexp(dim=2)


def log_densities(values: torch.Tensor, means: torch.Tensor, variances: torch.Tensor,
                  weights: torch.Tensor) -> torch.Tensor:
    """Logarithm of weight times density of each component at each value, (T, n, 2). values: (T, n, 1). means,
    variances, weights: (T, 2)."""
    means, variances, weights = means[:, None], variances[:, None], weights[:, None]
    return weights.log() - ((2 * math.pi * variances).log() + (values - means)**2 / variances) / 2
