"""Which feature goes with which stage: the data of the table in docs/frameworks.md.

A row holds for every stage unless it says otherwise. Each cell has a test: that of the row's
program in tests/torch/test_pairs.py, or one that the row names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

IN_BACKWARD = "update in backward"

STAGES: Mapping[str, Mapping[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    IN_BACKWARD: {"stage": 2, "update_in_backward": True},
}
"""The columns, with the settings of ``ShardPolicy`` that make them."""

WORKS, REFUSED = "works", "refused by name"

TORCH, DDP, NUMBERS, DEVICES = (
    f"tests/torch/test_{name}.py"
    for name in ("stage_two", "stage_two_ddp", "multiplied_averages", "devices")
)
UPDATES_ON_NODES = "tests/nodes/test_update_in_backward.py"
NODES, ON_NODES = "tests/torch/test_stage_two_nodes.py", "tests/nodes/test_stage_two.py"
JAX, CORE = "tests/jax/test_stage_two.py", "tests/core/test_stage_two.py"
LUCID, UPDATES = "tests/test_lucid.py", "tests/torch/test_update_in_backward.py"
ON_ANY_NODES = "tests/nodes/test_frameworks.py"
SHARED = "tests/support/stage_two.py"
PREFETCH, FORWARD = "tests/overlap/test_prefetch.py", "tests/torch/test_forward.py"


class Row(NamedTuple):
    """A feature.

    Attributes:
        feature: As the page has it.
        cells: What is to be said of a stage, if not that it works: it begins with a verdict.
        tests: Files and functions that cover it; none for the program of its name.
        in_backward: Those that cover updates in backward, if the program cannot.
    """

    feature: str
    cells: Mapping[str, str] = {}
    tests: Sequence[tuple[str, str]] = ()
    in_backward: Sequence[tuple[str, str]] = ()

    def cell(self, stage: str) -> str:
        """Return what is said of a stage."""
        return self.cells.get(stage, WORKS)

    def has_program(self, stage: str) -> bool:
        """Whether the program of its name covers a stage."""
        return not self.tests and not (stage == IN_BACKWARD and self.in_backward)

    def is_refused(self, stage: str) -> bool:
        """Whether a stage is refused."""
        return self.cell(stage).startswith(REFUSED)


def _only_stage_one() -> Mapping[str, str]:
    return {stage: f"{REFUSED}: stage 1" for stage in STAGES if stage != "stage 1"}


ROWS: Sequence[Row] = (
    Row("`max_grad_norm`", {IN_BACKWARD: REFUSED}),
    Row("`check_finite`", {IN_BACKWARD: REFUSED}),
    Row(
        "`average_grads()`",
        {"stage 2": f"{WORKS}; `loss_scale` must be 1", IN_BACKWARD: REFUSED},
    ),
    Row(
        "`clip_grad_norm_`, also `foreach=True`",
        {
            "stage 1": f"{WORKS} after `average_grads()`",
            "stage 2": f"{WORKS}, and writes nothing",
            IN_BACKWARD: REFUSED,
        },
    ),
    Row(
        "`clip_grad_value_`, masks, noise",
        {"stage 1": f"{WORKS} after `average_grads()`", IN_BACKWARD: REFUSED},
    ),
    Row(
        "`GradScaler`",
        {
            "stage 1": f"{WORKS}; `unscale_` after `average_grads()`",
            "stage 2": WORKS,
            IN_BACKWARD: REFUSED,
        },
    ),
    Row(
        "loss scales that differ between ranks",
        {"stage 2": REFUSED, IN_BACKWARD: REFUSED},
        [
            (TORCH, "scaled_differently"),
            ("tests/torch/test_amp.py", "test_any_scale_cancels"),
            (UPDATES, "test_what_needs_a_gradient_says_so"),
        ],
    ),
    Row(
        "DistributedDataParallel, before or after the optimizer",
        {"stage 2": f"{WORKS} as in stage 1, with a warning", IN_BACKWARD: REFUSED},
        [
            (DDP, "test_bits_are_those_of_stage_one"),
            (DDP, "test_it_is_said_once"),
            (UPDATES, "test_parameters_of_a_reducer"),
        ],
    ),
    Row("`torch.compile`"),
    Row("compiled autograd", {"stage 2": REFUSED, IN_BACKWARD: REFUSED}),
    Row("several backwards in a step", {IN_BACKWARD: REFUSED}),
    Row(
        "unequally many backwards on ranks",
        {IN_BACKWARD: f"{WORKS}, one or none"},
        [
            (TORCH, "unequal"),
            (TORCH, "test_micro_batches_have_the_same_bits_for_any_ring"),
            (SHARED, "no_batch_on_the_last"),
        ],
    ),
    Row("checkpoints of activations, not reentrant"),
    Row("checkpoints of activations, reentrant", {IN_BACKWARD: REFUSED}),
    Row(
        "`retain_graph`, to go backward twice",
        {IN_BACKWARD: f"{REFUSED}, by autograd"},
        in_backward=[(UPDATES, "test_a_graph_goes_backward_once")],
    ),
    Row("`create_graph`", {IN_BACKWARD: REFUSED}),
    Row("`torch.autograd.grad` into `p.grad`"),
    Row("several optimizers in one backward", {IN_BACKWARD: REFUSED}),
    Row(
        "branches that differ between ranks or steps",
        tests=[
            (TORCH, "other_branches"),
            (SHARED, "no_batch_on_the_last"),
            (UPDATES, "other_branches"),
        ],
    ),
    Row(
        "parameters used twice, and unused ones",
        tests=[
            (SHARED, "class Net"),
            (TORCH, "test_bits_are_those_of_stage_one"),
            (UPDATES, "test_bits_are_those_of_stage_one"),
        ],
    ),
    Row(
        "a backward that raises",
        {IN_BACKWARD: f"{REFUSED} in `step()`: load a checkpoint"},
        [
            (TORCH, "raising_on_one"),
            (TORCH, "repeated_after_an_error"),
            (UPDATES, "test_a_backward_that_raises_on_one_rank"),
        ],
    ),
    Row(
        "hooks of users, registered before and after",
        in_backward=[(UPDATES, "other_hooks")],  # without a forward of their own
    ),
    Row(
        "`zero_grad(set_to_none=False)`, `model.zero_grad()`",
        {IN_BACKWARD: f"{REFUSED}; `model.zero_grad()` works"},
    ),
    Row("`model.zero_grad(set_to_none=False)`", {"stage 2": REFUSED, IN_BACKWARD: REFUSED}),
    Row(
        "writes to `p.grad` before another backward",
        {"stage 2": REFUSED, IN_BACKWARD: REFUSED},
        [
            (TORCH, "written_before_another"),
            (TORCH, "viewed_before_another"),
            (UPDATES, "test_what_needs_a_gradient_says_so"),
        ],
    ),
    Row(
        "`p.grad.data = ...`, `p.grad.set_(...)`",
        {IN_BACKWARD: REFUSED},
        [
            (NUMBERS, "test_elements_may_be_replaced"),
            (UPDATES, "test_what_needs_a_gradient_says_so"),
        ],
    ),
    Row("closures", {IN_BACKWARD: REFUSED}),
    Row(
        "`add_param_group`",
        tests=[
            (TORCH, "test_groups_may_be_edited_between_steps"),
            (UPDATES, "test_groups_may_be_added_and_edited_between_steps"),
        ],
    ),
    Row(
        "edited groups",
        {IN_BACKWARD: f"{WORKS} after `adopt()`"},
        [
            (TORCH, "test_groups_may_be_edited_between_steps"),
            (UPDATES, "test_groups_may_be_added_and_edited_between_steps"),
            (UPDATES, "test_edited_groups_are_refused_by_the_next_backward"),
        ],
    ),
    Row(
        "`optim_bits=8`",
        tests=[
            (TORCH, "test_bits_with_moments_of_eight_bits"),
            (UPDATES, "test_other_states"),
        ],
    ),
    Row(
        "16-bit parameters",
        {
            "stage 2": f"{WORKS} from torch 2.13 on, `p.grad` is float32",
            IN_BACKWARD: f"{WORKS} in bfloat16; float16 is {REFUSED}",
        },
        [
            (TORCH, "test_bits_of_sixteen_bits"),
            (TORCH, "test_float16_with_a_scaler"),
            (ON_NODES, "test_sixteen_bits_have_those_of_stage_one"),
            (NODES, "test_sums_by_node_of_sixteen_bits_travel_in_float32"),
            (UPDATES, "test_other_states"),
            (UPDATES_ON_NODES, "test_other_states_and_wires"),
            (UPDATES, "test_refused_at_once"),
        ],
    ),
    Row(
        "`master_weights=False`",
        tests=[(TORCH, "test_bits_of_sixteen_bits"), (UPDATES, "test_other_states")],
    ),
    Row(
        "several nodes",
        {
            "stage 2": f"{WORKS}; `p.grad` raises before `average_grads()`",
        },
        in_backward=[(UPDATES_ON_NODES, "test_bits_are_those_of_stage_one")],
    ),
    Row(
        "`wire_dtype`",
        {IN_BACKWARD: f"{WORKS} in bfloat16; float16 is {REFUSED}, unless `check_finite=False`"},
        [
            (ON_NODES, "test_a_narrow_wire_rounds_as_in_stage_one"),
            (UPDATES_ON_NODES, "test_other_states_and_wires"),
            (UPDATES, "test_refused_at_once"),
        ],
    ),
    Row(
        '`accumulate="node"`',
        {
            "stage 1": REFUSED,
            "stage 2": f"{WORKS} on several nodes; {REFUSED} on one",
            IN_BACKWARD: REFUSED,
        },
        [
            (NODES, "test_sums_by_node_are_those_of_every_exchange"),
            (NODES, "test_where_sums_by_node_have_no_meaning"),
            (UPDATES, "test_refused_at_once"),
        ],
    ),
    Row(
        "`overlap=False`",
        {
            "stage 2": f"{REFUSED} on several nodes",
            IN_BACKWARD: f"{REFUSED} on several nodes",
        },
        [(NODES, "test_no_overlap_is_refused"), (UPDATES, "test_refused_at_once")],
    ),
    Row(
        "`prefetch_params`, on several nodes",
        {IN_BACKWARD: f"{REFUSED}: backward sends them"},
        [
            (PREFETCH, "test_the_bits_are_those_without_prefetch"),
            (PREFETCH, "test_the_bits_of_stage_two_are_those_of_stage_one"),
            (UPDATES, "test_refused_at_once"),
            (FORWARD, "test_it_changes_nothing_on_one_node"),
        ],
    ),
    Row(
        "`Adam`, `AdamW`, `RAdam`",
        tests=[(UPDATES, "test_other_optimizers")],
    ),
    Row(
        "saves between backward and step",
        {IN_BACKWARD: REFUSED},
        [
            (NODES, "test_saves_while_gradients_are_on_their_way"),
            (UPDATES, "test_calls_between_backward_and_step"),
        ],
    ),
    Row(
        "GPUs, also with `offload`",
        _only_stage_one(),
        [
            (DEVICES, "test_devices_keep_stage_one"),
            (DEVICES, "test_training_has_the_bits_of_the_cpu"),
        ],
    ),
    Row(
        "NumPy, CuPy",
        _only_stage_one(),
        [(CORE, "test_arrays_keep_stage_one")],
    ),
    Row(
        "JAX",
        {"stage 2": f"{WORKS}, in the step", IN_BACKWARD: f"{REFUSED}: stage 2"},
        [
            (JAX, "test_bits_are_those_of_stage_one"),
            (ON_ANY_NODES, "test_bits_depend_on_neither_nodes_nor_stage"),
            (JAX, "test_what_is_refused"),
        ],
    ),
    Row(
        "lucid",
        {
            "stage 2": f"{WORKS}, in the step; on several nodes `p.grad` raises after it",
            IN_BACKWARD: f"{REFUSED}: stage 2",
        },
        [
            (LUCID, "test_stage_two_has_the_bits_of_stage_one"),
            (LUCID, "test_averages_are_hidden_on_nodes"),
            (ON_ANY_NODES, "test_bits_depend_on_neither_nodes_nor_stage"),
            (LUCID, "test_updates_in_backward_are_refused"),
        ],
    ),
)


def table() -> str:
    """Return the table as the page has it."""
    lines = [" | ".join(["", "", *STAGES, ""]), "|" + "---|" * (1 + len(STAGES))]
    lines += [" | ".join(["", row.feature, *map(row.cell, STAGES), ""]) for row in ROWS]
    return "\n".join(line.strip() for line in lines)
