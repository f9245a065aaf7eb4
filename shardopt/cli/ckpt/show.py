"""``shardopt ckpt show``."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardopt.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from shardopt.checkpoint.format.reader import read_manifest
from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.contents import (
    abbreviate,
    decode_extra,
    decode_groups,
    decode_model,
    flatten,
)
from shardopt.cli.ckpt.find import file_problems, is_leftover, require_one
from shardopt.cli.ckpt.layout import read_header
from shardopt.errors import DamagedCheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    path_help = "checkpoint; it may be damaged or unfinished"
    parser.add_argument("path", type=Path, metavar="PATH", help=path_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Show the contents of a checkpoint."""
    path = require_one(options.path)
    try:
        manifest = read_manifest(path)
        content = _describe(path, manifest)
    except DamagedCheckpointError as error:
        content = _describe_files(path, str(error))
    if options.json:
        text.print_json(content)
    else:
        print("\n\n".join(_paragraphs(content)))
    return Exit.PROBLEMS if content["problems"] else Exit.FINE


def _describe(path: Path, manifest: Manifest) -> dict[str, Any]:
    problems = list(file_problems(path, manifest))
    if is_leftover(path):
        problems.insert(0, _never_committed(path))
    return {
        "path": str(path),
        "problems": problems,
        "step": manifest.step,
        "ranks": manifest.world_size,
        "created": manifest.created,
        "nbytes": manifest.nbytes,
        "writer": dict(manifest.writer),
        "optimizer": manifest.optimizer,
        "num_steps": manifest.num_steps,
        "loss_scale": manifest.loss_scale,
        "groups": decode_groups(manifest),
        "extra": decode_extra(manifest),
        "model": decode_model(manifest),
        "params": [
            {
                "name": param.name,
                "dtype": param.dtype,
                "shape": param.shape,
                "group": param.group,
                "step": param.step,
                "state": param.tensors[1:],
            }
            for param in manifest.params
        ],
        "files": [{"name": file.name, "nbytes": file.nbytes} for file in manifest.files],
    }


def _describe_files(path: Path, problem: str) -> dict[str, Any]:
    """Describe the files by their own headers, in the absence of a valid manifest."""
    problems, files, tensors = [problem], [], []
    if not (path / MANIFEST_NAME).exists():
        problems = [_never_committed(path)]
    for file in sorted(path.iterdir()):
        if file.name == MANIFEST_NAME:
            continue
        nbytes = file.lstat().st_size
        files.append({"name": file.name, "nbytes": nbytes})
        try:
            header_nbytes, arrays = read_header(file)
        except (DamagedCheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        stop = max((array.stop for array in arrays), default=header_nbytes)
        if stop != nbytes:
            problems.append(f"file {file.name} must have {stop} bytes; got {nbytes}.")
        for array in arrays:
            tensor = {"name": array.name, "dtype": array.dtype, "file": file.name}
            tensors.append({**tensor, "nbytes": array.numel})
    return {"path": str(path), "problems": problems, "files": files, "tensors": tensors}


def _never_committed(path: Path) -> str:
    return f"{path.name} was never committed or is partly removed: it is not a checkpoint."


def _paragraphs(content: dict[str, Any]) -> Iterator[str]:
    if content["problems"]:
        yield "\n".join(map(text.printable, content["problems"]))
    if "step" in content:
        yield text.fields(_overview(content))
        pairs = [
            *flatten(content["groups"], "param_groups"),
            *flatten(_with_one_rank(content["extra"]), "extra"),
            *content["model"].items(),
        ]
        yield text.fields([(name, abbreviate(value)) for name, value in pairs])
        rows = (
            (param["name"], param["dtype"], str(list(param["shape"])), str(param["step"]))
            for param in content["params"]
        )
        yield text.table(("parameter", "dtype", "shape", ">step"), rows)
    else:
        rows = (
            (tensor["name"], tensor["dtype"], text.nbytes(tensor["nbytes"]), tensor["file"])
            for tensor in content["tensors"]
        )
        yield text.table(("array", "dtype", ">size", "file"), rows)
    files = ((file["name"], text.nbytes(file["nbytes"])) for file in content["files"])
    yield text.table(("file", ">size"), files)


def _overview(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("checkpoint", content["path"]),
        ("step", str(content["step"])),
        ("optimizer", content["optimizer"]),
        ("optimizer steps", str(content["num_steps"])),
        ("loss scale", str(content["loss_scale"])),
        ("ranks", str(content["ranks"])),
        ("size", text.nbytes(content["nbytes"])),
        ("saved", text.when(content["created"])),
        ("with", ", ".join(f"{name} {version}" for name, version in content["writer"].items())),
    ]


def _with_one_rank(extra: dict[str, Any]) -> dict[str, Any]:
    """Keep only the first rank's values, since all ranks have the same kind."""
    per_rank = extra.get("per_rank")
    if not isinstance(per_rank, list) or len(per_rank) < 2:
        return extra
    shown = {key: value for key, value in extra.items() if key != "per_rank"}
    return {**shown, f"per_rank, rank 0 of {len(per_rank)}": per_rank[0]}


COMMAND = Command(
    name="show",
    summary="show the contents of a checkpoint",
    details=(
        "Reads the manifest, but no data. For a checkpoint that is torn or was never committed it\n"
        "shows the headers of its files."
    ),
    example="shardopt ckpt show runs/7b/step-000000012000",
    exit_codes=("it is complete", "it is damaged or unfinished"),
    add_arguments=add_arguments,
    run=run,
)
