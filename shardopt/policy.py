"""Settings of the sharding itself, apart from the mathematics."""

import os
from dataclasses import dataclass, field, fields

from shardopt.errors import HyperparamsError


@dataclass(slots=True, unsafe_hash=True)  # of what never changes
class ShardPolicy:
    """How parameters are sharded and communicated; equal on every rank.

    Only ``timeout_s`` and ``trace`` may differ between ranks.

    Only ``timeout_s`` can be set later, as ``opt.policy.timeout_s``, which holds from the next wait
    on. Optimizers that were built with the same object share it.

    Attributes:
        bucket_nbytes: Upper bound, in bytes of parameters, of the unit of communication; at least a
            chunk of 4096 elements is taken. None takes ``layout.traffic.default_bucket_nbytes``.
        wire_dtype: Dtype in which gradients are sent between nodes; they are summed in float32 all
            the same. ``bfloat16`` or ``float16`` halve their bytes and round what each node sends.
            None loses no bit. Updated parameters are always sent as they are. On a single node
            nothing is sent.
        master_weights: Keep float32 copies of 16-bit parameters, each in the shard of its owner.
            None and True do. False does without for bfloat16: each update is rounded up or down by
            chance, so that small ones are not lost; see [Note: random numbers of updates]. float16
            is refused then, and float32 and float64 need no copies in any case. Not on GPUs.
        optim_bits: Bits of an element of the moments: 32, or 8 with a float32 scale for each block
            of 256 elements; see [Note: codes of 8 bits]. A param group may have its own
            ``optim_bits``. Parameters of fewer than 4096 elements keep theirs in float32, as do the
            embeddings of a module that torch's ``NAdam(model)`` is given. float64 is refused. Not
            on GPUs.
        seed: Of all rounding by chance.
        overlap: Send gradients to other nodes while backward still computes others, if the
            framework reports when one is ready (torch does) and computes on CPUs. The bits are the
            same. Must be True in stage 2 on several nodes. See
            [Note: gradients sent during backward].
        prefetch_params: Have ``step`` return while updated parameters are on their way to other
            nodes; each module waits for its own before it runs. For torch's ``NAdam(model)`` on
            CPUs, in stage 1 and 2; not with ``overlap=False``, nor, on several nodes, with
            ``update_in_backward``. Whatever else reads parameters after a step calls
            ``opt.wait_params()`` before. On one node nothing is on its way, and it changes nothing.
            The bits are the same. See [Note: parameters on their way].
        share_node: Keep one copy of the parameters per node, in shared memory. A number limits how
            many ranks share one, for example to those of a NUMA domain. False makes every rank a
            node of its own.
        threads: Cores that a rank's updates use; None takes this rank's share of those it may run
            on.
        check_finite: Look for inf and NaN in gradients before the update, and skip the step on all
            ranks if there are any. That takes a pass over the gradients. None does so if the pass
            runs anyway, for ``max_grad_norm``, and for gradients in float16, of parameters or sent
            between nodes, which overflow easily; bfloat16 has the range of float32. True always
            does, False never skips. (A finite gradient whose square overflows the dtype of the
            moments, above some 5e20 in float32, freezes its element, as in torch.)
        offload: For parameters on a GPU: ``cpu`` keeps the optimizer state, and float32 copies of
            16-bit parameters, in the memory of the node, where CPUs update them; ``host`` is
            another name of it. Parameters and gradients stay on the GPU. On one node they are
            copied beside the updates; see [Note: copies beside updates]. None keeps everything on
            the GPU of its owner. Parameters on CPUs are updated where they are in any case. The
            bits are the same.
        trace: A folder to which this rank writes what its steps and saves do, and when, in a file
            that ``shardopt trace`` and Chrome's and Perfetto's viewers read. None takes the
            environment variable SHARDOPT_TRACE, and writes nothing if that is not set either. May
            differ between ranks.
        stage: The parts that are sharded, in the words of ZeRO. 1: the optimizer state; each rank
            of a node has a row of gradients. 2: gradients as well: they are averaged as backward
            goes, on one node into its one row, on several into the shards of their owners; for
            torch on CPUs, and for JAX and lucid there, whose steps average them. See
            [Note: gradients averaged in backward].
        update_in_backward: Update parameters while backward goes on, in stage 2, for torch on CPUs:
            a bucket is updated as soon as all ranks have its gradients, which are then let go, and
            ``step()`` waits for the last ones and counts the step. On several nodes backward also
            exchanges the sums, and the parameters once they are updated. No averages are kept, so
            gradients cannot be clipped, accumulated, checked or looked at. See
            [Note: updated in backward] and [Note: updated between nodes].
        ring_nbytes: Memory of a node for gradients that wait to be averaged, in stage 2. None
            takes ``layout.ring.default_ring_nbytes``; at least two buckets of each rank are taken.
            Must be None in stage 1.
        accumulate: The order in which several backwards of a step are added up in stage 2 on
            several nodes. ``exact``: each is averaged over all ranks, so that the bits do not
            depend on how ranks are cut into nodes, and each is exchanged. ``node``: they are summed
            on each node and exchanged once, in the step, which takes memory for a row of gradients
            of each node, and rounds otherwise. Must be exact in stage 1 and on one node.
        timeout_s: Longest wait for another rank, in seconds; then the missing ranks are named and
            the job is ended. May differ between ranks.

    Raises:
        HyperparamsError: A setting is out of range; the message names it.
    """

    bucket_nbytes: int | None = None
    wire_dtype: str | None = None
    master_weights: bool | None = None
    optim_bits: int = 32
    seed: int = 0
    overlap: bool = True
    prefetch_params: bool = False
    share_node: bool | int = True
    threads: int | None = None
    check_finite: bool | None = None
    offload: str | None = None
    stage: int = 1
    update_in_backward: bool = False
    ring_nbytes: int | None = None
    accumulate: str = "exact"
    trace: str | os.PathLike[str] | None = None
    timeout_s: float = field(default=300.0, hash=False)

    def __post_init__(self) -> None:
        bucket = self.bucket_nbytes is None or _is_count(self.bucket_nbytes)
        self._require(bucket, "bucket_nbytes", "be a whole number >= 1 or None")
        wire = self.wire_dtype in (None, "bfloat16", "float16")
        self._require(wire, "wire_dtype", "be bfloat16, float16 or None")
        masters = self.master_weights is None or type(self.master_weights) is bool
        self._require(masters, "master_weights", "be True, False or None")
        bits = type(self.optim_bits) is int and self.optim_bits in (8, 32)
        self._require(bits, "optim_bits", "be 8 or 32")
        seed = type(self.seed) is int and 0 <= self.seed < 1 << 64
        self._require(seed, "seed", "be a whole number in [0, 2**64)")
        self._require(type(self.overlap) is bool, "overlap", "be True or False")
        self._require(type(self.prefetch_params) is bool, "prefetch_params", "be True or False")
        has_thread = self.overlap or not self.prefetch_params
        rule = "be False with overlap=False, whose thread sends parameters, too"
        self._require(has_thread, "prefetch_params", rule)
        share = type(self.share_node) is bool or _is_count(self.share_node)
        self._require(share, "share_node", "be True, False or a whole number >= 1")
        threads = self.threads is None or _is_count(self.threads)
        self._require(threads, "threads", "be a whole number >= 1 or None")
        check = self.check_finite is None or type(self.check_finite) is bool
        self._require(check, "check_finite", "be True, False or None")
        offload = self.offload is None or self.offload in ("cpu", "host")
        self._require(offload, "offload", "be cpu or None (state on disk is not supported yet)")
        self._require_stage()
        self._require_update_in_backward()
        ring = self.ring_nbytes is None or _is_count(self.ring_nbytes)
        self._require(ring, "ring_nbytes", "be a whole number >= 1 or None")
        has_ring = self.ring_nbytes is None or self.stage == 2
        self._require(has_ring, "ring_nbytes", "be None with stage=1, which has no ring")
        accumulate = self.accumulate in ("exact", "node")
        self._require(accumulate, "accumulate", "be exact or node")
        sums = self.accumulate == "exact" or self.stage == 2
        self._require(sums, "accumulate", "be exact with stage=1, which sends once in a step")
        if self.offload is not None:
            object.__setattr__(self, "offload", "cpu")  # one name, so that ranks may use either
        folder: object = self.trace
        if isinstance(folder, os.PathLike):
            folder = os.fspath(folder)
        is_folder = folder is None or (isinstance(folder, str) and folder != "")
        self._require(is_folder, "trace", "be the path of a folder or None")
        object.__setattr__(self, "trace", folder)

    def __setattr__(self, name: str, value: object) -> None:
        """Set a field for the first time, or ``timeout_s`` at any time.

        Raises:
            AttributeError: Another field, or something that is none.
            HyperparamsError: ``timeout_s`` is out of range.
        """
        if name not in _NAMES:
            raise AttributeError(
                f"policy.{name} must be a setting of ShardPolicy; got {value!r}. Settings are "
                f"{', '.join(_NAMES)}."
            )
        if name == "timeout_s":
            if not _is_positive(value):
                raise _wrong(name, "be a number > 0", value)
        elif hasattr(self, name):
            raise AttributeError(
                f"policy.{name} must stay as it was at construction; got {value!r}. Build a new "
                f"optimizer with policy=ShardPolicy({name}=...), and load the old one's state."
            )
        object.__setattr__(self, name, value)

    def describe(self) -> dict[str, object]:
        """The settings that ranks must share, by name."""
        names = [name for name in _NAMES if name not in ("timeout_s", "trace")]
        return {f"policy.{name}": getattr(self, name) for name in names}

    def _require_stage(self) -> None:
        is_known = type(self.stage) is int and self.stage in (1, 2)
        rule = "be 1 or 2 (0 shards nothing: use torch's own optimizer; 3 is not supported yet)"
        self._require(is_known, "stage", rule)

    def _require_update_in_backward(self) -> None:
        name, is_on = "update_in_backward", self.update_in_backward
        self._require(type(is_on) is bool, name, "be True or False")
        self._require(not is_on or self.stage == 2, name, "be False without stage=2")
        remedies = "it needs all gradients before the first update"
        self._require(
            not (is_on and self.check_finite), name, f"be False with check_finite=True: {remedies}"
        )
        self._require(not (is_on and self.offload), name, "be False with offload: it is for CPUs")
        self._require(
            not (is_on and self.accumulate == "node"),
            name,
            'be False with accumulate="node": there is one backward in a step',
        )

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise _wrong(name, rule, getattr(self, name))


_NAMES = tuple(each.name for each in fields(ShardPolicy))


def _wrong(name: str, rule: str, got: object) -> HyperparamsError:
    return HyperparamsError(
        f"policy.{name} must {rule}; got {got!r}. Leave it out for the default."
    )


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]  # of a number


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1
