"""Every exception and warning of shardopt.

Each error is also a built-in one, so that code written for torch's ``ValueError`` keeps working.
Messages about arguments have the form ``<name> must <rule>; got <value>. <remedy>.`` Messages about
events say what happened, why, and what to do.
"""


class ShardoptError(Exception):
    """Base of all errors that shardopt raises on purpose."""


class HyperparamsError(ShardoptError, ValueError):
    """A hyperparameter or a policy setting is out of its range."""


class PartitionError(ShardoptError, ValueError):
    """Parameters cannot be laid out, or one was replaced by something that does not fit."""


class PlanError(ShardoptError, ValueError):
    """A plan is asked for with values that are missing, out of range or cannot be read."""


class TraceError(ShardoptError, ValueError):
    """A trace cannot be written where it was asked for, or what is to be read is none."""


class CheckpointError(ShardoptError, ValueError):
    """A state, a state dict or a checkpoint does not fit this optimizer, or is damaged."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was saved: something is missing, changed or superfluous."""


class SharedMemoryError(ShardoptError, MemoryError):
    """The node's shared memory is too small for the parameters and gradients."""


class KernelError(ShardoptError, RuntimeError):
    """No kernel can update such parameters, or a kernel could not be compiled."""


class ClosedError(ShardoptError, RuntimeError):
    """An optimizer was used after ``close()`` or ``MPI.Finalize()``, or in a forked child."""


class CallOrderError(ShardoptError, RuntimeError):
    """Calls were made in an order in which they mean nothing."""


class ThreadError(ShardoptError, RuntimeError):
    """Two threads used the optimizers of one communicator at the same time."""


class LauncherError(ShardoptError, RuntimeError):
    """The launcher belongs to another MPI library than the one loaded."""


class RankMismatchError(ShardoptError, RuntimeError):
    """Ranks were given different values where all must have the same."""


class RankFailureError(ShardoptError, RuntimeError):
    """A rank stopped responding in a call that all ranks must make, or has left the job."""


class NonFiniteWarning(RuntimeWarning):
    """Gradients or parameters are inf or NaN."""


class NoGradientWarning(RuntimeWarning):
    """A step found no gradient on any rank."""


class EditedGradientsWarning(RuntimeWarning):
    """A rank's gradients were changed before they are averaged, which changes its part alone."""


class StageWarning(RuntimeWarning):
    """Gradients take more memory than the stage of a policy promises."""


class DivergedWarning(RuntimeWarning):
    """Ranks have written different values into a parameter or its state."""


class PartialStateWarning(RuntimeWarning):
    """A state dict is that of one node of several, and not the whole."""


class CompileCacheWarning(RuntimeWarning):
    """Compiled code cannot be kept on disk, so that every process compiles anew."""


class StaleStateWarning(RuntimeWarning):
    """A state of optax is kept that cannot be gone back to, as its moments are gone."""


class LostStateWarning(RuntimeWarning):
    """A parameter came back to an optimizer that has let go of its state."""


class CheckpointWarning(RuntimeWarning):
    """A checkpoint could not be saved, or was skipped in the search for the newest one."""


class TraceWarning(RuntimeWarning):
    """A trace has ended early; training goes on."""


class RandomStreamWarning(RuntimeWarning):
    """Random streams could not be restored: they were seeded anew, or their devices are missing."""
