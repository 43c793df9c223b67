#!/usr/bin/env bash
# One node's part of launch/slurm.sbatch, which starts it with srun: launch/slurm_node.sh OUTPUT_DIR WORD...
# The words are for `accelerate launch`.
set -u
. launch/common.sh
output_dir=$1
shift

# Several nodes meet at the first one, and only it opens the port: left to itself, a node guesses from host names whether it
# is the one. A slow file system may start one node minutes after another.
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  is_host=$([ "$SLURM_NODEID" -eq 0 ] && echo 1 || echo 0)
  set -- --machine_rank "$SLURM_NODEID" --rdzv_backend c10d --rdzv_conf "is_host=$is_host,read_timeout=600" "$@"
fi

# SIGUSR1 to the job goes to its steps and not to the batch script, which is to know of it. The launcher would die of it;
# ignored, it reaches only ranks that listen. SIGTERM they get themselves.
trap 'scancel --batch --signal=USR1 "$SLURM_JOB_ID"' USR1
trap : TERM
(
  trap '' USR1
  exec "$python" launch/accelerate_launch.py "$@"
) &
launcher_pid=$!
wait_for "$launcher_pid"

# srun ends the other nodes when this one fails: not before rank 0, which may be on one of them, has said why the run ended.
if [ "$ended_with" -ne 0 ]; then
  for _ in {1..10}; do
    [ ! -f "$output_dir/outcome.json" ] || break
    sleep 1
  done
fi
exit "$ended_with"
