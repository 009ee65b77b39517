"""Libraries of tests that are imported at their first use, so that collecting the tests does not wait for them."""

import importlib
from importlib.util import find_spec

import pytest


class Library:
    """Stands for a module."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("_"):  # pytest looks for its own marks at every name of a module
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips tests where a library that only development needs is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {missing}: pip install -r requirements-dev.txt")


torchvision = Library("torchvision")
diffusers = Library("diffusers")
integrate = Library("scipy.integrate")
