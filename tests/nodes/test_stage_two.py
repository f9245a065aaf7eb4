"""Stage 2 on any nodes has the bits of stage 1; ranks of one machine play several."""

import pytest

pytest.importorskip("torch")

from tests.support.nodes import several_nodes, ways_to_the_same_bits
from tests.support.stage_two import SMALL, no_batch_on_the_last
from tests.support.torch_models import bytes_of
from tests.torch.test_stage_two import (
    SIXTEEN_BITS,
    assert_same_bits,
    needs_wide_grads,
    run,
    train_sixteen_bits,
    unequal,
)

pytestmark = pytest.mark.mpi(min_size=2)


def test_bits_are_those_of_stage_one(comm):
    """In some steps the last rank has no batch: a node of one rank has nothing to send then."""
    for share in several_nodes(comm):
        settings = {**SMALL, "share_node": share}
        assert_same_bits(comm, no_batch_on_the_last, settings=settings, max_grad_norm=0.01)


@pytest.mark.any_mpi  # arithmetic
def test_micro_batches_have_the_same_bits_on_any_nodes(comm):
    """Ranks run unequally many; each is exchanged."""
    seen = set()
    for share in ways_to_the_same_bits(comm):
        for ring in (SMALL, {}):
            params, norms, _ = run(
                comm, unequal, 2, settings={**ring, "share_node": share}, max_grad_norm=0.01
            )
            seen.add((*map(bytes_of, params), *norms))
    assert len(seen) == 1


@pytest.mark.any_mpi
def test_a_narrow_wire_rounds_as_in_stage_one(comm):
    settings = {**SMALL, "share_node": False, "wire_dtype": "bfloat16"}
    assert_same_bits(comm, no_batch_on_the_last, settings=settings)


@needs_wide_grads
@pytest.mark.any_mpi
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize(("dtype", "settings"), SIXTEEN_BITS)
def test_sixteen_bits_have_those_of_stage_one(comm, dtype, settings, wire_dtype):
    """Sums of a node are sent as in stage 1: those of a lone rank are its gradients."""
    for share in several_nodes(comm):
        chosen = {**settings, "share_node": share, "wire_dtype": wire_dtype}
        for accumulate in ("exact", "node"):
            by_stage = (1, {}), (2, {"accumulate": accumulate})
            theirs, ours = (
                train_sixteen_bits(comm, stage, dtype, {**chosen, **more}, max_grad_norm=0.01)
                for stage, more in by_stage
            )
            assert ours == theirs


@needs_wide_grads
@pytest.mark.any_mpi
def test_micro_batches_of_sixteen_bits_have_the_same_bits_on_any_nodes(comm):
    """Each backward is averaged, and averages are summed, in float32."""
    dtype, settings = SIXTEEN_BITS[0]
    seen = [
        train_sixteen_bits(comm, 2, dtype, {**settings, "share_node": share}, num_micros=3)
        for share in ways_to_the_same_bits(comm)
    ]
    assert all(each == seen[0] for each in seen)
