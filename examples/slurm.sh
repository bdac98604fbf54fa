#!/bin/bash
# Quantize a model on several nodes of a Slurm cluster. Submit the same command again to resume.
#
#     sbatch --nodes=4 examples/slurm.sh MODEL RECIPE OUT PROMPTS
#
# MODEL, OUT and PROMPTS are on storage that all nodes mount; every node has the same Python environment.
#SBATCH --job-name=s2q
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=24:00:00
set -euo pipefail

model=$1 recipe=$2 out=$3 prompts=$4
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds, for all nodes to join

# Starts Ray on every node, runs the command on the first one when all nodes have joined, and stops Ray.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    s2q quantize -m "$model" -r "$recipe" -o "$out" --prompts "$prompts" \
    --device cuda --engine ray --ray-address "$head:$port"
