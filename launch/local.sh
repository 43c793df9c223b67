#!/usr/bin/env bash
# Trains on this machine and ends with the run's own exit code (outcome.json), which `accelerate launch` hides.
#
#   launch/local.sh [--config_file accelerate_configs/X.yaml ...] [RECIPE.yaml] [section.key=value ...]
#
# Words that begin with -- go to `accelerate launch`, with the word after each; the rest go to train.py. Without any, one
# process is started. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 become the file STOP in the output directory: the launcher passes
# no signal on. A second one ends everything at once.
set -u
cd "$(dirname "$0")/.." || exit
. launch/common.sh

take_launcher_words "$@"
shift ${#launcher[@]}
[ ${#launcher[@]} -gt 0 ] || launcher=(--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)

check_settings "$@"
forget_outcome
"$python" launch/accelerate_launch.py "${launcher[@]}" train.py "$@" &
launcher_pid=$!

# The launcher and all below it, which are in sessions of their own. Found before any is killed: orphans have no parent to go by.
end_everything='
import sys
from contextlib import suppress
from psutil import NoSuchProcess, Process
with suppress(NoSuchProcess):
    launcher = Process(int(sys.argv[1]))
    for process in [launcher, *launcher.children(recursive=True)]:
        with suppress(NoSuchProcess):
            process.kill()
'

requests=0
# shellcheck disable=SC2317 # the traps below call it
stop() {
  requests=$((requests + 1))
  if [ "$requests" -gt 1 ]; then
    "$python" -c "$end_everything" "$launcher_pid"
    exit 130
  fi
  local told="Stopping after this step, with a checkpoint. Once more ends at once."
  [ ! -t 2 ] || told=$'\n'"$told"$'\n\n' # the run draws its bars over the last three lines of a terminal
  echo "$told" >&2
  ask_to_stop "$launcher_pid" "$1"
}
trap 'stop Ctrl-C' INT
trap 'stop SIGTERM' TERM
trap 'stop SIGHUP' HUP
trap 'stop SIGUSR1' USR1

wait_for "$launcher_pid"
[ "$requests" -eq 0 ] || stop_asking
read_code
exit "$code"
