"""Check the log of a run of ``launch/train_lm.py``: ``python -m benchmarks.gpu.losses FOLDER``."""

import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Print the first and the last loss; return 1 if it has not fallen."""
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    first, *_, last = [record for record in records if record["kind"] == "step"]
    has_fallen = last["train_bits"] < first["train_bits"]
    print(json.dumps({"has_fallen": has_fallen, "first_bits": first["train_bits"]} | last))
    return 0 if has_fallen else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
