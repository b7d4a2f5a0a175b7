"""A job array for Slurm: the index is the run, and submitting it again resumes what is not finished."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.words import counted

_SCRIPT = """#!/usr/bin/env bash
# {title}: {count}, written by `fp4rl plan --slurm`. Submit it with `bash {file} [options of sbatch]`, such as
# --partition=gpu --gres=gpu:1 --time=4:00:00. The same command again resumes: a finished run ends at once.
#SBATCH --job-name={name}
#SBATCH --ntasks=1 --cpus-per-task={cpus}
#SBATCH --requeue --signal=B:INT@120
set -euo pipefail
if [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]; then
  after=()
  # One array for each stage: a run starts when those whose weights it takes have ended, and fails where one failed.
  for indices in {stages}; do
    job=$(sbatch --parsable --array="$indices" "${{after[@]}}" "$@" "$0")
    echo "indices $indices: job ${{job%%;*}}"
    after=(--dependency="afterany:${{job%%;*}}")
  done
  exit
fi
cd {folder}
export OMP_NUM_THREADS=1
arms=({arms})
seeds=({seeds})
exec {command} --jobs 1 --json --arm "${{arms[SLURM_ARRAY_TASK_ID]}}" --seed "${{seeds[SLURM_ARRAY_TASK_ID]}}"
"""


def script(file: Path, runs: Sequence[PlannedRun], words: Sequence[str]) -> str:
    """Return the script of planned runs, each begun by `fp4rl run` with `words` in the present folder.

    Indices are sorted by stage, so that each stage is one array: 0 for runs that need no other, else one more than the
    highest of those that they need.
    """
    stage: dict[str, int] = {}
    for run in runs:  # each behind those that it needs
        stage[run.run_id] = 1 + max((stage[needed] for needed in run.needs.values()), default=-1)
    ordered = sorted(runs, key=lambda run: stage[run.run_id])
    of_each = [stage[run.run_id] for run in ordered]
    firsts = [of_each.index(number) for number in range(of_each[-1] + 1)]
    ends = [*firsts[1:], len(ordered)]
    return _SCRIPT.format(
        title=ordered[0].suite,
        count=counted(len(ordered), "run"),
        file=shlex.quote(file.name),
        name=ordered[0].suite,
        cpus=max(run.experiment.processes for run in ordered),
        stages=" ".join(f"{first}-{end - 1}" for first, end in zip(firsts, ends, strict=True)),
        folder=shlex.quote(str(Path.cwd())),
        arms=shlex.join(run.arm for run in ordered),
        seeds=" ".join(str(run.seed) for run in ordered),
        command=shlex.join([sys.executable, "-m", "fp4rl", "run", *words]),
    )
