"""`make bench`: the ops, forward and backward together, the table of explanations. Options go to the last."""

import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "ops.json"
        rounds = ["--benchmark-min-rounds=5", "--benchmark-max-time=0.5", "--benchmark-disable-gc"]
        options = ["--benchmark-only", "--benchmark-quiet", *rounds, f"--benchmark-json={report}"]
        commands = (
            [sys.executable, "-m", "pytest", "-q", str(here), *options],
            [sys.executable, "-m", "benchmarks.ops_table", str(report)],
            [sys.executable, "-m", "benchmarks.backward"],
            [sys.executable, "-m", "benchmarks.explain", *sys.argv[1:]],
        )
        return max(subprocess.run(command, cwd=here.parent, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
