"""Every exception and warning of shardopt.

Each error is also the built-in it resembles, so that code written for torch's ``ValueError`` keeps
working. Texts follow one form: ``<name> must <rule>; got <value>. <remedy>.``
"""


class ShardoptError(Exception):
    """Base of all errors that shardopt raises on purpose."""


class HyperparamsError(ShardoptError, ValueError):
    """A hyperparameter or a policy setting is out of its range."""


class PartitionError(ShardoptError, ValueError):
    """Parameters cannot be laid out, or one was replaced by something that does not fit."""


class CheckpointError(ShardoptError, ValueError):
    """A state dict or a checkpoint does not fit this optimizer, or is damaged."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was saved: something is missing, changed, or too much."""


class SharedMemoryError(ShardoptError, MemoryError):
    """The node's shared memory is too small for the windows."""


class KernelError(ShardoptError, RuntimeError):
    """No kernel can update such parameters, or a kernel could not be compiled."""


class ClosedError(ShardoptError, RuntimeError):
    """An optimizer was used after ``close()``."""


class LauncherError(ShardoptError, RuntimeError):
    """The launcher and the MPI library do not belong together."""


class RankMismatchError(ShardoptError, RuntimeError):
    """Ranks that must agree on something were given different values."""


class RankFailureError(ShardoptError, RuntimeError):
    """A rank did not come to a call that all ranks must make, or has left the job."""


class NonFiniteWarning(RuntimeWarning):
    """Gradients or parameters are inf or NaN."""


class NoGradientWarning(RuntimeWarning):
    """A step found no gradient to go by."""


class CheckpointWarning(RuntimeWarning):
    """A checkpoint could not be saved, or was passed over when the newest was looked for."""


class RandomStreamWarning(RuntimeWarning):
    """Random streams could not be continued and were seeded anew."""
