"""Settings that cannot be had together, or not in every job; each sentence is here once.

The optimizer raises them on all ranks, and a plan raises them before there are any.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardopt.errors import HyperparamsError
from shardopt.layout.dtypes import has_master
from shardopt.policy import ShardPolicy


@dataclass(frozen=True, slots=True)
class Job:
    """The properties of a job that decide which settings it can have.

    Attributes:
        num_nodes: Nodes.
        on_device: Whether parameters are on a device.
        shows_averages: Whether the framework can show averages in the place of gradients.
        reports_grads: Whether it reports gradients as backward computes them.
        widens_grads: Whether it can show averages of 16-bit gradients in float32.
        reports_forward: Whether it reports which parameters a forward is about to read.
        has_thread: Whether a thread may send while others compute.
    """

    num_nodes: int
    on_device: bool = False
    shows_averages: bool = True
    reports_grads: bool = True
    widens_grads: bool = True
    reports_forward: bool = True
    has_thread: bool = True


def why_not(
    policy: ShardPolicy, job: Job, dtypes: Iterable[str], *, max_grad_norm: float | None = None
) -> HyperparamsError | None:
    """Return why an optimizer cannot be had, or None if it can.

    Args:
        policy: As it was given.
        job: What it is for.
        dtypes: Of the parameters.
        max_grad_norm: As it was given.
    """

    def reasons() -> Iterator[HyperparamsError | None]:
        yield why_not_clip(policy, max_grad_norm)
        yield why_not_stage(policy, job)
        yield why_not_prefetch(policy, job)
        for dtype in dict.fromkeys(dtypes):
            yield why_not_dtype(policy, job, dtype)

    return next((found for found in reasons() if found is not None), None)


def why_not_clip(policy: ShardPolicy, max_grad_norm: float | None) -> HyperparamsError | None:
    """Return why gradients cannot be clipped, or None if they can."""
    if max_grad_norm is None or not policy.update_in_backward:
        return None
    return HyperparamsError(
        f"max_grad_norm must be None with policy.update_in_backward; got {max_grad_norm}. The norm "
        "is known only after backward, which updates: leave the option out to clip."
    )


def why_not_stage(policy: ShardPolicy, job: Job) -> HyperparamsError | None:
    """Return why a policy's stage, or an option of stage 2, cannot be had, or None if it can."""
    if policy.accumulate == "node" and job.num_nodes == 1:
        return HyperparamsError(
            "policy.accumulate must be exact on one node, where nothing is exchanged; got node. "
            "Leave it out."
        )
    if policy.stage == 1:
        return None
    if policy.update_in_backward and checks_finite(policy, job.num_nodes, has_float16=False):
        return HyperparamsError(
            "policy.wire_dtype must be bfloat16 or None with policy.update_in_backward; got "
            f"{policy.wire_dtype}. Sums overflow easily in float16, and must be checked before "
            "any update: use bfloat16, or set check_finite=False to accept overflows."
        )
    if policy.update_in_backward and job.shows_averages and not job.reports_grads:
        return HyperparamsError(
            "policy.update_in_backward must be False with a framework that does not report its "
            "gradients; got True. Leave it out: stage 2 works there."
        )
    sends_nothing = job.num_nodes > 1 and not policy.overlap
    reasons = {
        "parameters on a device": job.on_device,
        "parameters of NumPy or CuPy": not job.shows_averages,
        "overlap=False on several nodes, which would have to wait for backward": sends_nothing,
    }
    for reason, holds in reasons.items():
        if holds:
            return HyperparamsError(
                f"policy.stage must be 1 with {reason}; got 2. Leave it out: stage 1 works there. "
                "Stage 2 is for PyTorch, JAX and lucid on CPUs."
            )
    return None


def why_not_prefetch(policy: ShardPolicy, job: Job) -> HyperparamsError | None:
    """Return why parameters cannot be awaited in forward, or None if they can."""
    if not policy.prefetch_params:
        return None
    has_others = job.num_nodes > 1
    reasons = {
        "parameters on a device": job.on_device,
        "a framework that does not report what forward needs": not job.reports_forward,
        "policy.update_in_backward, which sends parameters in backward": has_others
        and policy.update_in_backward,
        "an MPI that is not thread-safe (see shardopt doctor)": has_others and not job.has_thread,
    }
    for reason, holds in reasons.items():
        if holds:
            return HyperparamsError(
                f"policy.prefetch_params must be False with {reason}; got True. Leave it out: the "
                "step then waits for all parameters. It is for PyTorch on CPUs, with a module as "
                "params."
            )
    return None


def why_not_dtype(policy: ShardPolicy, job: Job, dtype: str) -> HyperparamsError | None:
    """Return why parameters of a dtype cannot be had in stage 2, or None if they can."""
    if policy.stage == 1:
        return None
    if policy.update_in_backward:
        if dtype != "float16":
            return None
        return HyperparamsError(
            "policy.update_in_backward must be False for parameters in float16; got True. Their "
            "gradients overflow easily, and must be looked at before any update: use bfloat16."
        )
    if has_master(dtype) and not job.widens_grads:
        return HyperparamsError(
            f"policy.stage must be 1 for parameters of 16 bits; got 2 with {dtype}. Leave it "
            "out: stage 1 works. Stage 2 takes a torch that has Tensor.grad_dtype, as 2.13."
        )
    return None


def checks_finite(policy: ShardPolicy, num_nodes: int, *, has_float16: bool) -> bool:
    """Whether steps look for inf and NaN; see ``ShardPolicy.check_finite``.

    Args:
        policy: Whether to.
        num_nodes: Nodes.
        has_float16: Whether some parameters, and so their gradients, are float16.
    """
    if policy.check_finite is None:
        return has_float16 or (num_nodes > 1 and policy.wire_dtype == "float16")
    return policy.check_finite
