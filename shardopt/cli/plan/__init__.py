"""``shardopt plan``: what a job needs before it runs, and how it would scale.

``options`` turns words into what ``planner`` takes, ``contents`` computes the plan as plain values,
which ``--json`` prints, and ``render`` and ``picture`` show them.
"""

import argparse
from pathlib import Path

from shardopt.cli.base import Command, Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    model = parser.add_argument_group("model, one of").add_mutually_exclusive_group(required=True)
    model.add_argument("--params", metavar="N", help="number of parameters, such as 7e9")
    model.add_argument("--model", metavar="SCRIPT:FUNCTION", help="what script.py:make_model makes")
    model.add_argument("--safetensors", type=Path, nargs="+", metavar="FILE", help="saved model")
    size = parser.add_argument_group("with --params")
    dtype_help = "of parameters, such as bfloat16 (default: float32)"
    size.add_argument("--dtype", default="float32", metavar="DTYPE", help=dtype_help)
    size.add_argument("--tensors", default="256", metavar="N", help="equal ones (default: 256)")
    job = parser.add_argument_group("job")
    job.add_argument("--nodes", default="1", metavar="N", help="(default: 1)")
    ranks = job.add_mutually_exclusive_group()
    ranks.add_argument("--ranks-per-node", default="1", metavar="N", help="(default: 1)")
    ranks.add_argument("--ranks", metavar="N", help="on all nodes together")
    job.add_argument("--clip", action="store_true", help="with max_grad_norm")
    job.add_argument("--backward", metavar="TIME", help="of a backward, such as 1.5s, for overlap")
    job.add_argument("--forward", metavar="TIME", help="of a forward, for --prefetch-params")
    job.add_argument("--slow-nodes", metavar="SHARE:FACTOR", help="such as 0.01:2, simulated")
    job.add_argument("--slow-link", metavar="FACTOR", help="one node's, such as 2, simulated")
    job.add_argument(
        "--late-rank", metavar="TIME", help="one rank's delay, such as 50ms, simulated"
    )
    job.add_argument("--node-mtbf", metavar="TIME", help="mean time between failures, such as 5y")
    policy = parser.add_argument_group("settings of ShardPolicy, with its defaults")
    policy.add_argument("--bucket", metavar="SIZE", help="bucket_nbytes, such as 16MiB")
    policy.add_argument("--wire-dtype", choices=("bfloat16", "float16"))
    policy.add_argument("--no-overlap", action="store_true", help="overlap=False")
    policy.add_argument("--prefetch-params", action="store_true")
    policy.add_argument("--stage", type=int, choices=(1, 2), default=1)
    policy.add_argument("--update-in-backward", action="store_true", help="with --stage 2")
    policy.add_argument("--accumulate", choices=("exact", "node"), default="exact")
    policy.add_argument("--ring", metavar="SIZE", help="ring_nbytes, with --stage 2")
    policy.add_argument("--optim-bits", type=int, choices=(8, 32), default=32)
    policy.add_argument("--no-master-weights", action="store_true", help="master_weights=False")
    policy.add_argument("--check-finite", action="store_true")
    policy.add_argument("--offload", action="store_true", help="offload='cpu', with --gpu")
    machine = parser.add_argument_group("machine")
    memory_help = "a node has for training beside activations, such as 256GB"
    machine.add_argument("--node-memory", metavar="SIZE", help=memory_help)
    machine.add_argument("--calibration", type=Path, metavar="FILE", help="of doctor --calibrate")
    machine.add_argument("--memory-bandwidth", metavar="RATE", help="of a node, such as 400GB/s")
    machine.add_argument("--link", metavar="RATE", help="of a node, each way, such as 200Gbit")
    machine.add_argument("--latency", metavar="TIME", help="of a message (default: 5us)")
    cost_help = "of sending one (default: 5us on links above 25Gbit, else 20us)"
    machine.add_argument("--message-cost", metavar="TIME", help=cost_help)
    machine.add_argument("--disk", metavar="RATE", help="of a node (default: 1GB/s)")
    machine.add_argument("--gpu", metavar="NAME", help="of each rank: a100, h100, h200, b200, l40s")
    parser.add_argument("--scaling", action="store_true", help="simulate 1 to 4096 nodes, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it, with --scaling")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> Exit:
    """Compute the plan, and print it."""
    from shardopt.cli.plan.contents import make_plan  # loads NumPy and the layout
    from shardopt.cli.plan.options import read_request
    from shardopt.cli.plan.picture import draw_scaling
    from shardopt.cli.plan.render import render
    from shardopt.cli.text import print_json

    request = read_request(options)
    plan = make_plan(request)
    if options.plot is not None and plan.scaling is not None:
        options.plot.write_text(draw_scaling(plan, plan.scaling), encoding="utf-8")
    if options.json:
        print_json(plan.to_json())
    else:
        print(render(plan))
    return Exit.FINE if plan.fits else Exit.PROBLEMS


COMMAND = Command(
    name="plan",
    summary="compute memory, traffic and time of a job before it runs, and how it scales",
    details=(
        "Bytes and messages are exact: they come from the code that training uses. Times follow\n"
        "from the speeds of the machine and are simulated, not measured."
    ),
    example=(
        "shardopt plan --params 7e9 --dtype bfloat16 --nodes 16 --ranks-per-node 8 \\\n"
        "    --link 200Gbit --memory-bandwidth 400GB/s"
    ),
    exit_codes=("the plan fits the memory given, and that of its GPUs", "it does not fit"),
    add_arguments=add_arguments,
    run=run,
)
