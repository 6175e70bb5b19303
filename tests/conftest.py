"""Tests run as the commands do: `kaf_study` sets what TensorFlow reads when it is imported."""

import pytest

import kaf_study  # noqa: F401

NOTEBOOKS = "test_notebooks.py"  # each test has a process of its own, and they take longest


def pytest_collection_modifyitems(config, items):
    """Under -n, a file stays in one process, but notebooks go apart, and first."""
    if not config.pluginmanager.hasplugin("xdist"):  # the layer's tests need pytest alone
        return
    items.sort(key=lambda item: item.path.name != NOTEBOOKS)
    for item in items:
        file = item.path.name
        item.add_marker(pytest.mark.xdist_group(item.name if file == NOTEBOOKS else file))
