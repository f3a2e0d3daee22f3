"""Run the suite as other processors and numbers of threads would: `python -m tests.anywhere [what pytest takes]`.

Torch chooses its kernels by what the processor can do, and sums in another order where it may use wider registers or
more threads. Four runs stand for the machines there are; each ends in one line that names the file with all it said.
Exit status 1 if one of them failed.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
)
"""Without a capability torch takes the best there is."""


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(variant: dict[str, str], arguments: list[str]) -> bool:
    """One line about a run of the suite; whether it passed."""
    name = " ".join(f"{key}={value}" for key, value in variant.items())
    log = Path(tempfile.mkdtemp(prefix="sfc-tests-")) / "pytest.log"
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"} | variant
    started, before = time.monotonic(), cpu_seconds()
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, stdout=file, stderr=file)
    lines = log.read_text(errors="replace").splitlines() or ["nothing was said"]
    took = f"{cpu_seconds() - before:.0f} CPU seconds, {time.monotonic() - started:.0f} seconds"
    print(f"{name}: {lines[-1].strip('= ')}; {took}; {log}", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    passed = [run(variant, sys.argv[1:]) for variant in VARIANTS]  # all of them, also after one that failed
    sys.exit(not all(passed))
