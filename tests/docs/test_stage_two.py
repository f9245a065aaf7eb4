"""The table of what stage 2 goes with: each row is covered by tests, and no row is missing."""

import re

import pytest

from tests.support.pages import ROOT

TORCH, CORE, JAX = (f"tests/{name}/test_stage_two.py" for name in ("torch", "core", "jax"))
LUCID, DEVICES = "tests/test_lucid.py", "tests/torch/test_devices.py"

WORKS = {
    "`max_grad_norm`, `check_finite`": [(TORCH, "test_bits_are_those_of_stage_one")],
    "several backwards in a step, also unequally many": [
        (TORCH, "test_several_backwards_are_added_up"),
        (TORCH, "test_micro_batches_have_the_same_bits_for_any_ring"),
    ],
    "checkpoints of activations, `retain_graph`, `create_graph`": [
        (TORCH, "checkpointed"),
        (TORCH, "retained"),
        (TORCH, "test_create_graph"),
    ],
    "`clip_grad_norm_`, masks, noise, `GradScaler`": [
        (TORCH, "test_averages_may_be_changed_alike"),
        (TORCH, "test_grad_scaler"),
    ],
    "`average_grads()`": [(TORCH, "clipped"), (TORCH, "test_averages_take_no_loss_scale")],
    "branches that differ between ranks or steps": [
        (TORCH, "other_branches"),
        (TORCH, "test_averages_where_ranks_take_other_rounds"),
    ],
    "a backward that raises": [(TORCH, "raising_on_one"), (TORCH, "repeated_after_an_error")],
    "`optim_bits=8`": [(TORCH, "test_bits_with_moments_of_eight_bits")],
    "several optimizers": [(TORCH, "test_two_optimizers_in_one_backward")],
    "edited param groups, `add_param_group`": [(TORCH, "test_groups_may_be_edited_between_steps")],
    "hooks of users": [(TORCH, "other_hooks")],
}
REFUSED = {
    "loss scales that differ between ranks": [(TORCH, "scaled_differently")],
    "writes to `p.grad` before another backward": [
        (TORCH, "written_before_another"),
        (TORCH, "scaled_before_another"),
        (TORCH, "viewed_before_another"),
    ],
    "16-bit parameters": [(TORCH, "test_sixteen_bits_are_refused")],
    "DistributedDataParallel": [(TORCH, "test_modules_in_ddp_are_refused")],
    "NumPy, CuPy, JAX, lucid": [
        (CORE, "test_arrays_keep_stage_one"),
        (JAX, "test_jax_keeps_stage_one"),
        (LUCID, "test_lucid_keeps_stage_one"),
    ],
    "several nodes": [(TORCH, "test_several_nodes_are_refused")],
    "GPUs, also with `offload`": [(DEVICES, "test_devices_keep_stage_one")],
}


def rows():
    page = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
    table = re.search("<!-- stage 2 begin -->(.*)<!-- stage 2 end -->", page, re.DOTALL)
    cells = re.findall(r"^\| (.+?) \| (works|refused by name)", table[1], re.MULTILINE)
    assert len(cells) == table[1].count("\n|") - 2
    return dict(cells)


def test_the_table_is_complete():
    expected = dict.fromkeys(WORKS, "works") | dict.fromkeys(REFUSED, "refused by name")
    assert rows() == expected


@pytest.mark.parametrize("row", [*WORKS, *REFUSED])
def test_each_row_has_its_tests(row):
    for file, name in (WORKS | REFUSED)[row]:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), name
