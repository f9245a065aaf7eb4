"""Settings of the sharding itself, apart from the mathematics."""

from dataclasses import dataclass

from shardopt.errors import HyperparamsError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardPolicy:
    """How parameters are shared out and exchanged; equal on every rank.

    Attributes:
        bucket_nbytes: Upper bound of what one exchange carries.
        wire_dtype: Dtype of gradients between nodes; None is the parameters' own, the only one yet.
        master_weights: fp32 copies of 16-bit parameters; None, as there are no 16-bit kernels yet.
        share_node: Keep one copy of the parameters on a node, in shared memory. False makes every
            rank a node of its own.
        threads: Cores that a rank's updates use; None takes this rank's share of those it may run
            on.
        check_finite: Find inf and NaN in gradients before the update and skip such a step on all
            ranks. None does so where it is free: with ``max_grad_norm``. True adds a pass over the
            gradients, False never skips.
        timeout_s: Longest wait for another rank, in seconds, before the job is ended with the
            names of those missing.

    Raises:
        HyperparamsError: A setting is out of range; the message names it.
    """

    bucket_nbytes: int = 32 * MIB
    wire_dtype: str | None = None
    master_weights: bool | None = None
    share_node: bool = True
    threads: int | None = None
    check_finite: bool | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        self._require(
            self.bucket_nbytes >= 1, "bucket_nbytes", "be >= 1", "Leave it out for 32 MiB"
        )
        self._require(self.wire_dtype is None, "wire_dtype", "be None", "Leave it out")
        self._require(self.master_weights is None, "master_weights", "be None", "Leave it out")
        threads = self.threads
        self._require(threads is None or threads >= 1, "threads", "be >= 1 or None", "Leave it out")
        self._require(self.timeout_s > 0, "timeout_s", "be > 0", "Leave it out for 300 seconds")

    def _require(self, holds: bool, name: str, rule: str, remedy: str) -> None:
        if not holds:
            raise HyperparamsError(
                f"policy.{name} must {rule}; got {getattr(self, name)!r}. {remedy}."
            )
