"""What all tests share: a seeded generator, and where CI runs no skipped test and no luck."""

import os

import hypothesis
import numpy as np
import pytest
import torch

if (
    os.environ.get("CI") == "true"
):  # the same examples every time; elsewhere new ones are looked for
    hypothesis.settings.register_profile("fixed", derandomize=True)
    hypothesis.settings.load_profile("fixed")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def np_rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With CI=true a skip is a failure: what a test needs must be installed there."""
    outcome = yield
    report = outcome.get_result()
    allowed = item.get_closest_marker("gpu") or hasattr(report, "wasxfail")
    if report.skipped and os.environ.get("CI") == "true" and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
