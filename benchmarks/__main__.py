"""`make bench`: the ops by pytest-benchmark, then the table of explanations. Options go to the table's program."""

import subprocess
import sys
from pathlib import Path

from benchmarks.machine import RESULTS, cpu_slug


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    report = RESULTS / f"ops-{cpu_slug()}.json"
    here = Path(__file__).resolve().parent
    options = ["--benchmark-only", "--benchmark-group-by=group", "--benchmark-columns=median,iqr,rounds"]
    ops = [sys.executable, "-m", "pytest", "-q", str(here), *options, f"--benchmark-json={report}"]
    table = [sys.executable, "-m", "benchmarks.explain", *sys.argv[1:]]
    return max(subprocess.run(command, cwd=here.parent, check=False).returncode for command in (ops, table))


if __name__ == "__main__":
    sys.exit(main())
