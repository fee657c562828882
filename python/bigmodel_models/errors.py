"""The one error of the training command, and the check for the packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class TrainingError(ValueError):
    """A run that cannot start or go on, for a reason its user can mend: the message names the remedy."""


def require(module: str, purpose: str) -> ModuleType:
    """The optional ``module``, or a `TrainingError` that says what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainingError(
            f"{purpose} needs {module.split('.')[0]}: pip install 'bigmodel_kernels[models]'"
        ) from error
