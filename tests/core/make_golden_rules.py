"""Write what torch computes with Adam, AdamW and RAdam: python -m tests.core.make_golden_rules.

A file for each optimizer and dtype in tests/golden/rules: the initial parameters and gradients of
[8 steps], of three sizes, and for each set of options the parameter and its moments after each
step, [8, numel], as ``torch.optim`` (2.13.0, CPU, ``foreach=False``) has them.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden" / "rules"
NUM_STEPS, NUMEL = 8, 12
SIZES = {"tiny": 1e-8, "usual": 1.0, "huge": 1e21}
BETA2 = (0.5, 0.9, 0.999)
OPTIONS = [
    *({"betas": [0.9, beta2]} for beta2 in BETA2),
    {"betas": [0.95, 0.9], "weight_decay": 0.1, "lr": 0.01},
    {"betas": [0.9, 0.9], "weight_decay": 0.1, "maximize": True},
    {"eps": 1e-3, "lr": 0.01, "betas": [0.0, 0.99]},
]
OF_ONE = {
    "RAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": [0.9, 0.9]}],
    "Adam": [{"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": [0.9, 0.9]}],
    "AdamW": [],
}


def inputs(dtype):
    """Initial parameters, and gradients of all steps, by size."""
    rng = np.random.default_rng(5)
    params = {size: rng.standard_normal(NUMEL).astype(dtype) for size in SIZES}
    signs = rng.choice([-1.0, 1.0], (len(SIZES), NUM_STEPS, NUMEL))
    spread = 2.0 ** rng.uniform(0, 1, (len(SIZES), NUM_STEPS, NUMEL))
    grads = {
        size: (signs[index] * spread[index] * scale).astype(dtype)
        for index, (size, scale) in enumerate(SIZES.items())
    }
    return params, grads


def train(name, dtype, options):
    """Yield the name of an array and its values after each step, by torch."""
    import torch  # here, as the test that reads the files needs none of it

    params, grads = inputs(dtype)
    for size in SIZES:
        param = torch.nn.Parameter(torch.tensor(params[size]))
        opt = getattr(torch.optim, name)([param], foreach=False, **options)
        steps = []
        for grad in grads[size]:
            param.grad = torch.tensor(grad)
            opt.step()
            state = opt.state[param]
            values = {"param": param.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
            steps.append({key: value.numpy().copy() for key, value in values.items()})
        for key in steps[0]:
            yield f"{size}/{key}", np.array([step[key] for step in steps])


def main():
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, more in OF_ONE.items():
        for dtype in ("float32", "float64"):
            arrays = {"options": np.array(json.dumps(OPTIONS + more))}
            for number, options in enumerate(OPTIONS + more):
                found = train(name, dtype, options)
                arrays |= {f"{number}/{key}": values for key, values in found}
            np.savez_compressed(FOLDER / f"{name}.{dtype}.npz", **arrays)


if __name__ == "__main__":
    main()
