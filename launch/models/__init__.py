"""One transformer in each framework, with the optimizer that trains it: a file a framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.base import Learner


def find_learner(framework: str) -> type[Learner]:
    """Import a framework and return what makes learners with it.

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
    learner: type[Learner] = import_module(f"models.{framework}").Learner
    return learner
