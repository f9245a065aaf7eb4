"""One rank gives what torch computed with Adam, AdamW and RAdam, whatever the size of gradients."""

import json

import numpy as np
import pytest

import shardopt
from shardopt.rule.rules import RULES
from tests.core.make_golden_rules import FOLDER, NUM_STEPS, SIZES, inputs

# torch rounds a parameter twice a step, fuses some multiply-adds, and its square root of float32 is
# not correctly rounded.
MAX_ULPS = {"param": 3.5, "exp_avg": 2.5, "exp_avg_sq": 2}
NAMES = [name for name in RULES if name != "NAdam"]


def train(name, dtype, options):
    """Yield the values after each step, by size and key."""
    values, grads = inputs(dtype)
    params = [shardopt.Parameter(values[size].copy(), size) for size in SIZES]
    with getattr(shardopt, name)(params, **options) as opt:
        for step in range(NUM_STEPS):
            for param in params:
                param.grad[...] = grads[param.name][step]
            opt.step()
            for param in params:
                entry = opt.state[param]
                yield step, f"{param.name}/param", param.data.copy()
                for key in ("exp_avg", "exp_avg_sq"):
                    yield step, f"{param.name}/{key}", entry[key].copy()


def ulps(actual, expected):
    """Largest difference in units of the last place of the largest value; inf must be the same."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    if not finite.any():
        return 0.0
    largest = np.abs(expected[finite]).max()
    difference = np.abs(np.subtract(actual[finite], expected[finite], dtype=np.float64)).max()
    return difference / (np.finfo(expected.dtype).eps * largest)


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_torch(name, dtype):
    golden = np.load(FOLDER / f"{name}.{dtype}.npz")
    seen, worst = 0, {}  # the largest difference over all steps
    for number, options in enumerate(json.loads(str(golden["options"]))):
        for step, key, values in train(name, dtype, options):
            expected = golden[f"{number}/{key}"][step]
            case = key, number
            worst[case] = max(ulps(values, expected), worst.get(case, 0))
            seen += 1
    assert seen >= 6 * NUM_STEPS * 3 * len(SIZES)
    assert not {c: w for c, w in worst.items() if w > MAX_ULPS[c[0].partition("/")[2]]}
