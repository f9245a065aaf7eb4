"""Settings of the optimizer for JAX are set as those of the others."""

import numpy as np
import pytest

pytest.importorskip("jax")

from shardopt.jax import NAdam
from tests.support.errors import POLICY

pytestmark = pytest.mark.mpi


def test_what_can_be_set_holds_and_all_else_raises(comm):
    tree = {"w": np.ones(4, np.float32)}
    with NAdam(tree, comm=comm, policy=POLICY) as opt:
        opt.max_grad_norm = 0.5
        opt.step(tree)
        assert opt.last_step.clip_factor == pytest.approx(0.25, rel=1e-5)
        opt.defaults["lr"] = 0.25
        assert opt.core.defaults["lr"] == 0.25
        for name in ("lr", "params", "count", "max_gradnorm", "policy"):
            with pytest.raises(AttributeError, match=f"{name} of an optimizer must not be assign"):
                setattr(opt, name, 0.5)
