"""The form that messages about values have."""

from shardopt.errors import CheckpointError


def must(name: str, rule: str, got: object, remedy: str) -> str:
    """Return ``<name> must <rule>; got <got>. <remedy>.``, filled in."""
    return f"{name} must {rule}; got {got}. {remedy}."


def require(holds: bool, name: str, rule: str, got: object, remedy: str) -> None:
    """Raise the sentence of ``must`` unless ``holds``.

    Raises:
        CheckpointError: The value is not what it must be.
    """
    if not holds:
        raise CheckpointError(must(name, rule, got, remedy))
