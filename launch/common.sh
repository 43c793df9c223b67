# What launch/local.sh, launch/slurm.sbatch and launch/slurm_node.sh share. They source it at the repository's root.
# shellcheck shell=bash disable=SC2034 # they read what is set here

python=${PYTHON:-python}
# On a CPU: threads that wait must sleep. Spinning ones take the cores from loader workers and from other programs, and a
# step then takes ten times as long.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# What the launchers set by themselves, with a warning about it; on a CPU each rank then takes its share of the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() {
  echo "$1" >&2
  exit 2
}

# take_launcher_words WORD...: the words for `accelerate launch`, into the array `launcher`. They come first, in pairs.
take_launcher_words() {
  launcher=()
  while [ $# -gt 0 ] && [ "${1#--}" != "$1" ]; do
    [ $# -ge 2 ] || fail "$1 needs a value after it: --config_file accelerate_configs/X.yaml RECIPE.yaml"
    launcher+=("$1" "$2")
    shift 2
  done
}

# check_settings WORD...: ends the script where they are wrong, before any process is launched; sets `output_dir`.
check_settings() {
  output_dir=$("$python" -m vl_dist settings --key run.output_dir -- "$@") || exit $?
}

outcome() { # KEY
  "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$output_dir/outcome.json" "$1"
}

# An earlier run's outcome must not be taken for this one's, should the launcher fail to start it.
forget_outcome() {
  rm -f "$output_dir/outcome.json" || exit 2
}

# ask_to_stop PID REASON: the STOP file, again and again while PID lives: a run that is only just starting removes one it
# finds. What stands in it is what the run gives as its reason.
ask_to_stop() {
  mkdir -p "$output_dir"
  local reason=$2
  (
    trap '' INT TERM HUP USR1
    while kill -0 "$1" 2>/dev/null; do
      [ -e "$output_dir/STOP" ] || echo "$reason" >"$output_dir/STOP"
      sleep 1
    done
  ) &
  toucher_pid=$!
}

stop_asking() {
  kill -KILL "$toucher_pid" 2>/dev/null
  wait "$toucher_pid" 2>/dev/null # or it could make the file once more
  rm -f "$output_dir/STOP"
}

# wait_for PID: its exit code, into `ended_with`.
wait_for() {
  while
    wait "$1"
    ended_with=$?
    kill -0 "$1" 2>/dev/null # `wait` also returns when a signal was caught
  do :; done
  wait "$1" 2>/dev/null # where it did so just before the end, the exit code is still to be had
  local code=$?
  [ "$code" -eq 127 ] || ended_with=$code
}

# The run's own code, into `code`; ends the script where the run left none.
read_code() {
  ls "$output_dir" >/dev/null 2>&1 # a network file system looks again only when a directory is opened
  if [ -f "$output_dir/outcome.json" ]; then
    code=$(outcome code) || exit 1
    return
  fi
  # Where no directory can be made there is nowhere for an outcome; train.py has said so.
  mkdir -p "$output_dir" 2>/dev/null || exit 2
  echo "The run ended with code $ended_with and left no $output_dir/outcome.json: see the messages above." >&2
  exit 1
}
