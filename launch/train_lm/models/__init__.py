"""The same transformer in each framework, with its optimizer: one file per framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_lm.models.base import Learner


def import_learner(framework: str) -> type[Learner]:
    """Import a framework and return its ``Learner`` class.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import_module(framework)
    except ImportError as error:
        raise ValueError(
            f"--framework {framework} must be installed; got: {error}. "
            f"Install it: pip install '.[{framework}]'."
        ) from None
    learner: type[Learner] = import_module(f"{__name__}.{framework}").Learner
    return learner
