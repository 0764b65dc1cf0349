"""The mixture of two Gaussians, against scikit-learn's and against numbers."""

import pytest
import torch

from detection.assigners.mixture import two_gaussians
from detection.assigners.paa import cheap_ones


def one(values):
    """Labels, 0 for the first component, and densities of one row."""
    values = torch.tensor([values])
    first, density = two_gaussians(values, torch.ones_like(values, dtype=torch.bool))
    return (~first[0]).int().tolist(), density[0].tolist()


def positives(values, lone_candidate=False):
    values = torch.tensor([values])
    return int(cheap_ones(values, torch.ones_like(values, dtype=torch.bool), lone_candidate).sum())


def random_rows(count, seed=0):
    """Rows of 2 to 45 ascending values: one group, two groups, or equal ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        size = int(torch.randint(2, 46, (1,), generator=generator))
        row = torch.rand(size, generator=generator, dtype=torch.float64) * 2
        far = torch.rand(size, generator=generator) < 0.5
        row = row + far * (number % 4)
        rows.append((row.round(decimals=1) if number % 5 == 0 else row).sort().values)
    return rows


def padded(rows):
    """The rows as one matrix, with NaN where a row has no value, and where it has one."""
    values = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=torch.float64)
    for number, row in enumerate(rows):
        values[number, :len(row)] = row
    return values, ~values.isnan()


def test_200_random_rows_have_the_labels_and_densities_of_scikit_learn():
    mixture = pytest.importorskip("sklearn.mixture", reason="scikit-learn is not installed")
    rows = random_rows(200)
    first, density = two_gaussians(*padded(rows))
    for number, row in enumerate(rows):
        column = row.numpy()[:, None]
        fitted = mixture.GaussianMixture(2, weights_init=[0.5, 0.5], means_init=[column.min(0), column.max(0)],
                                         precisions_init=[[1.0], [1.0]], covariance_type="diag").fit(column)
        assert (~first[number, :len(row)]).int().tolist() == fitted.predict(column).tolist()
        assert density[number, :len(row)].tolist() == pytest.approx(fitted.score_samples(column).tolist(), abs=1e-6)


@pytest.mark.parametrize(("values", "labels", "count"), [
    ([.10, .15, .20, .90, 1.0, 1.1, 1.3], [0, 0, 0, 1, 1, 1, 1], 3),
    ([.1, .2, .3, .35, .4, 2.0, 2.1, 2.3, 2.8], [0, 0, 0, 0, 0, 1, 1, 1, 1], 3),
    ([.2, 1.4], [0, 1], 1),
    ([.5, .5], [0, 0], 1),  # of equal densities the first counts
])
def test_rows_that_were_fitted_elsewhere(values, labels, count):
    assert one(values)[0] == labels and positives(values) == count


def test_densities_that_were_computed_elsewhere():
    assert one([.1, .2, .3, .35, .4, 2.0, 2.1, 2.3, 2.8])[1][:5] == pytest.approx(
        [-.523975, .510418, .682817, .445769, -.006779], abs=1e-5)


def test_a_shift_of_all_costs_changes_no_positive():
    values, taken = padded(random_rows(60, 1))
    chosen = cheap_ones(values, taken, False)
    assert torch.equal(cheap_ones(values + 7, taken, False), chosen) and chosen.any(dim=1).all()


def test_a_row_does_not_depend_on_those_beside_it():
    rows = random_rows(12, 2)
    first, density = two_gaussians(*padded([*rows, torch.zeros(0)]))
    for number, row in enumerate(rows):
        alone = two_gaussians(row[None], torch.ones(1, len(row), dtype=torch.bool))
        assert torch.equal(first[number, :len(row)], alone[0][0])
        assert torch.allclose(density[number, :len(row)], alone[1][0], atol=1e-9)


@pytest.mark.parametrize("lone_candidate", [False, True])
def test_a_lone_candidate_is_positive_if_asked_for(lone_candidate):
    assert positives([0.3], lone_candidate) == lone_candidate
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert not cheap_ones(torch.full((2, 4), torch.inf), nothing, lone_candidate).any()
    assert cheap_ones(torch.zeros(0, 4), nothing[:0], lone_candidate).shape == (0, 4)
