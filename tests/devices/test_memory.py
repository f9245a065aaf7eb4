"""Devices hold what the formulas say, and sums of gradients only where a step needs them."""

import numpy as np
import pytest

from tests.support.device_training import BFLOAT16, up_to_three_ranks

pytestmark = [pytest.mark.mpi, up_to_three_ranks]

NUMEL = 12 * 4096  # whole chunks on up to four ranks
PAGE_NBYTES = 4096


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_devices_hold_what_the_formulas_say(make_pair, dtype, max_grad_norm):
    pair = make_pair([np.ones(NUMEL, dtype)], max_grad_norm=max_grad_norm)
    ranks, is_narrow = pair.comm.size, dtype is not np.float32
    params_nbytes = 2 * NUMEL * np.dtype(dtype).itemsize  # with gradients
    state_nbytes = 0 if pair.way == "offload" else (12 if is_narrow else 8) * NUMEL // ranks
    expected = params_nbytes + state_nbytes
    for _ in range(2):
        assert expected <= pair.device.nbytes < expected + 4 * PAGE_NBYTES
        pair.grads()
        pair.step()
        has_sums = is_narrow and max_grad_norm and ranks > 1 and pair.way != "offload"
        expected = params_nbytes + state_nbytes + (4 * NUMEL // ranks if has_sums else 0)
    assert expected <= pair.device.nbytes < expected + 4 * PAGE_NBYTES
    pair.close()
