#!/usr/bin/env bash
# Stage 2 on a SLURM cluster: sbatch launch/slurm.sh [options of grpo.py]
# On 64 GPUs: sbatch launch/slurm.sh --train gen --replicas 8 --prompts_per_step 128 --init out/full-sft --data shards --eval_data shards
# --replicas 8 on 8 nodes: weights are sharded within a node, gradients alone travel between nodes.
# Edit the lines with #SBATCH. One task is one GPU; grpo.py reads SLURM's variables itself, no torchrun is needed.
#SBATCH --job-name=realign
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
# SIGUSR1 comes 300 s before the time is over: the script gives up its step after the present pass, saves, and leaves with status 85.

cd "${SLURM_SUBMIT_DIR:-.}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python "${SCRIPT:-grpo.py}" --config "${CONFIG:-full}" "$@"
status=$?
if [ "$status" -eq 85 ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same command goes on from the newest state
fi
exit "$status"
