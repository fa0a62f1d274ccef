#!/usr/bin/env bash
# GPU nodes under SLURM: sbatch --nodes=2 scripts/slurm.sh itune train --config sft --config.model.path=... --workdir runs/x
#
# One process a node, which takes all its GPUs. The first node is the coordinator. SLURM warns two minutes before it takes
# the nodes back (or the time is over); every process then saves and leaves with code 143, and the job is queued again:
# the same command resumes. --workdir must be on a file system that all nodes share.
#SBATCH --job-name=itune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=itune-%j.log
set -uo pipefail

die() { echo "slurm.sh: $*" >&2; exit 2; }
[ -n "${1:-}" ] || die "give the command, such as: sbatch scripts/slurm.sh itune train --config sft ..."
for needed in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NNODES; do
  [ -n "${!needed:-}" ] || die "$needed is not set: not under SLURM; start it with sbatch"
done

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)
[ -n "$first" ] || die "'scontrol show hostnames $SLURM_JOB_NODELIST' names no node, so there is no coordinator"
export ITUNE_COORDINATOR="$first:$((20000 + SLURM_JOB_ID % 20000))"
export ITUNE_NUM_PROCESSES=$SLURM_NNODES

# each task knows its own number
# shellcheck disable=SC2016  # expanded by the task's shell
srun --kill-on-bad-exit=1 bash -c 'export ITUNE_PROCESS_ID=$SLURM_PROCID; exec -- "$@"' itune "$@"
code=$?
if [ "$code" -eq 143 ]; then
  echo "slurm.sh: preempted with everything saved; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
