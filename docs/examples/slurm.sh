#!/bin/bash
#SBATCH --job-name=batchrun
#SBATCH --time=08:00:00
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to srun's step 10 minutes before the time is up: the run stops between two steps.
#SBATCH --signal=TERM@600

cd "$SLURM_SUBMIT_DIR" || exit

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/batchrun run jobs.jsonl --model demo --quiet
code=$?

# Stopped early: the same job again, which goes on.
if [[ $code == 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
