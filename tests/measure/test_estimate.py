"""Errors and intervals of means over windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.measure.estimate import estimate, student_quantile

VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=20)


@given(VALUES)
def test_without_documents_it_is_the_standard_error_of_the_mean(values):
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.stderr == pytest.approx(scipy.stats.sem(values), abs=1e-12)


@given(VALUES, st.integers(1, 4))
def test_copies_of_a_document_add_no_information(values, copies):
    repeated = np.repeat(values, copies)
    assert estimate(repeated, np.repeat(range(len(values)), copies)) == pytest.approx(estimate(values), abs=1e-12)


def test_the_error_is_that_of_a_bootstrap_over_documents():
    random = np.random.default_rng(0)
    documents = np.repeat(range(60), random.integers(1, 5, 60))
    values = random.normal(size=60)[documents] + random.normal(size=len(documents))
    groups = [values[documents == number] for number in range(60)]
    means = [np.concatenate([groups[number] for number in random.integers(0, 60, 60)]).mean() for _ in range(4000)]
    assert estimate(values, documents).stderr == pytest.approx(np.std(means), rel=0.05)
    assert estimate(values, documents).stderr > 1.2 * estimate(values).stderr


def test_one_document_has_no_error():
    found = estimate([1.0, 2.0, 6.0], [7, 7, 7])
    assert found.mean == 3
    assert all(math.isnan(value) for value in found[1:])


def test_an_infinite_value_has_no_error():
    assert math.isnan(estimate([1.0, math.inf, 2.0]).stderr)


@pytest.mark.parametrize("degrees", [1, 3, 15, 1000])
def test_the_quantile_is_students(degrees):
    assert student_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees))
