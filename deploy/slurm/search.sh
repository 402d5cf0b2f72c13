#!/bin/bash
# One study on several nodes: each task of the array is a member of it, and any may be killed.
#
#   STORAGE=postgresql://user@host/studies sbatch --array=1-20 deploy/slurm/search.sh --trials 500
#
# Submit it in the root of the repository, on a file system that all nodes share. Further arguments
# are options of run.py. libpq reads the password from ~/.pgpass (mode 600).
#SBATCH --job-name=search
#SBATCH --array=1-3
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=search-%A-%a.log
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# exec: scancel's and the time limit's SIGTERM reach run.py, which requeues its trial.
exec python run.py --storage "${STORAGE:?set it to the URL of a PostgreSQL database}" "$@"
