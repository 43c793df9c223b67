#!/usr/bin/env bash
# Trains on this machine and ends with the run's own exit code (outcome.json), which `accelerate launch` hides.
#
#   launch/local.sh [--config_file accelerate_configs/X.yaml ...] [RECIPE.yaml] [section.key=value ...]
#
# Words that begin with -- go to `accelerate launch`, with the word after each; the rest go to train.py. Without any, one
# process is started. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 become the file STOP in the output directory: the launcher passes
# no signal on. A second one ends everything at once.
set -u
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
# On a CPU: threads that wait must sleep. Spinning ones take the cores from loader workers and from other programs, and a
# step then takes ten times as long.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
launcher=()
while [ $# -gt 0 ] && [ "${1#--}" != "$1" ]; do
  if [ $# -lt 2 ]; then
    echo "$1 needs a value after it: launch/local.sh --config_file accelerate_configs/X.yaml RECIPE.yaml" >&2
    exit 2
  fi
  launcher+=("$1" "$2")
  shift 2
done
[ ${#launcher[@]} -gt 0 ] || launcher=(--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)

# Wrong settings end here, before any process is launched.
output_dir=$("$python" -m vl_dist settings --key run.output_dir -- "$@") || exit $?

# An earlier run's outcome must not be taken for this one's, should the launcher fail to start it.
rm -f "$output_dir/outcome.json"

# `accelerate launch` in a session of its own, so that a Ctrl-C in the terminal reaches this script and not the launcher, and
# without the tracebacks that launchers add to every exit code but 0: train.py has said what there is to say.
launch='
import logging, os, subprocess, sys
os.setsid()
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    main()
except (subprocess.CalledProcessError, ChildFailedError):
    sys.exit(1)
'
"$python" -c "$launch" "${launcher[@]}" train.py "$@" &
launcher_pid=$!

# The launcher and all below it: the processes of several ranks are in sessions of their own.
tree() {
  echo "$1"
  for child in $(pgrep -P "$1"); do tree "$child"; done
}

requests=0
stop() {
  requests=$((requests + 1))
  if [ "$requests" -gt 1 ]; then
    # shellcheck disable=SC2046 # one word a process
    kill -KILL $(tree "$launcher_pid") 2>/dev/null
    exit 130
  fi
  echo "Stopping after this step, with a checkpoint. Once more ends at once." >&2
  mkdir -p "$output_dir"
  # Again and again: a run that is only just starting removes a STOP file it finds.
  while kill -0 "$launcher_pid" 2>/dev/null; do
    touch "$output_dir/STOP"
    sleep 1
  done &
  toucher_pid=$!
}
trap stop INT TERM HUP USR1

while kill -0 "$launcher_pid" 2>/dev/null; do
  wait "$launcher_pid"
  launcher_code=$?
done

if [ "$requests" -gt 0 ]; then
  kill "$toucher_pid" 2>/dev/null
  wait "$toucher_pid" 2>/dev/null # or it could make the file once more
  rm -f "$output_dir/STOP"
fi

if [ -f "$output_dir/outcome.json" ]; then
  exit "$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$output_dir/outcome.json")"
fi
# Where no directory can be made there is nowhere for an outcome; train.py has said so.
mkdir -p "$output_dir" 2>/dev/null || exit 2
echo "The run ended with code $launcher_code and left no $output_dir/outcome.json: see the messages above." >&2
exit 1
