# shellcheck shell=bash
# Functions shared by local.sh, hosts.sh and the batch scripts, which source this file.
#
# [Note: how the end of a job is known]
# The exit code of mpirun is not reliable: Open MPI's may be 0 although a host was lost, and the
# mpirun of either MPI may keep running when all ranks are gone. Each rank therefore reports its own
# exit code (rank_env.sh --report), and a job has succeeded only if every rank reported 0. An mpirun
# that still runs some seconds after the last report, or after the first failure, is killed.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$launch")
# Seconds that mpirun gets after the first failure, or after the last report:
patience_s=${JOB_PATIENCE_S:-15}

fail() {
  printf '%s\n' "${program:-${0##*/}}: $*" >&2
  exit 2
}

# find_mpi COMMAND...: set $mpirun, and $mpi to mpich or openmpi.
find_mpi() {
  local found version
  (($#)) || fail "COMMAND must be given; got none. See --help."
  found=$(command -v "$1") || fail "COMMAND must begin with a program; got '$1'. See --help."
  mpirun=${MPIRUN:-$(command -v mpirun || true)}
  # An environment's own mpirun fits the MPI library that its Python loads.
  [[ -n ${MPIRUN:-} || $1 != */* || ! -x ${found%/*}/mpirun ]] || mpirun=${found%/*}/mpirun
  [[ -n $mpirun ]] || mpirun=${found%/*}/mpirun
  [[ -z ${MPIRUN:-} || $(command -v "$mpirun" || true) ]] ||
    fail "MPIRUN must name a program; got '$MPIRUN'. Unset it, or set it to the path of mpirun."
  [[ $(command -v "$mpirun" || true) ]] ||
    fail "mpirun must be beside $found or in PATH; got none. Activate the environment that has" \
      "it, or set MPIRUN to its path."
  [[ $mpirun != */* ]] || mpirun=$(cd "${mpirun%/*}" && pwd)/${mpirun##*/}
  version=$("$mpirun" --version 2>&1)
  case $version in
    *HYDRA* | *Intel*) mpi=mpich ;;
    *'Open MPI'*) mpi=openmpi ;;
    *) fail "mpirun must be MPICH's or Open MPI's; got ${version%%$'\n'*}. Set MPIRUN to one." ;;
  esac
}

# want_gpus N: have rank_env.sh share out N GPUs of each node.
want_gpus() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] ||
    fail "--gpus-per-node must be at least 1; got '$1'. Leave it out for all that a node shows."
  export RANK_GPUS=$1
}

# rank_command COMMAND...: set $ranked to the command that mpirun starts on each rank.
rank_command() {
  job_id=job-$$-$RANDOM
  ranked=(bash "$(shorten "$launch/rank_env.sh")" --report "$job_id" "$@")
}

# Print a path relative to this folder, if it lies below.
shorten() {
  local path=${1#"$PWD/"}
  [[ $path == */* ]] || path=./$path
  printf '%s\n' "$path"
}

print_command() {
  local word line='$'
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,+@%^-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "$line"
}

# Tell the ranks whether output goes to a terminal: they write to a pipe of mpirun's.
describe_terminal() {
  if [[ -t 1 ]]; then
    export TTY_COMPATIBLE=1 TTY_INTERACTIVE=1
    COLUMNS=$(tput cols 2>/dev/null || echo 80) && export COLUMNS
  else
    export TTY_COMPATIBLE=0 TTY_INTERACTIVE=0
  fi
}

# run_job NUM_RANKS MPIRUN...: run a job to its end; see [Note: how the end of a job is known].
run_job() {
  local num_ranks=$1 pipe
  shift
  ended=() first_bad='' last_report_s='' killed='' stopped=''
  pipe=$(mktemp -u)
  mkfifo "$pipe"
  # Ctrl-C reaches a process group of its own only by way of stop: two would make mpirun kill.
  set -m
  "$@" </dev/null 2>"$pipe" &
  job=$!
  set +m
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM HUP
  trap forward_usr1 USR1
  exec 3<"$pipe"
  rm "$pipe"
  relay_stderr "$num_ranks"
  exec 3<&-
  conclude "$num_ranks"
}

# stop SIGNAL STATUS: ask the ranks to save and end; the second time, end mpirun.
stop() {
  local signal=$1
  [[ $mpi != openmpi || -n $stopped ]] || signal=USR2 # see watch in rank_env.sh
  stopped=$2
  kill -s "$signal" "$job" 2>/dev/null || true
}

# SIGUSR1 asks the ranks to save and go on.
forward_usr1() { kill -USR1 "$job" 2>/dev/null || true; }

# Pass on what mpirun prints on stderr until it ends, without the reports of the ranks.
relay_stderr() {
  local num_ranks=$1 line got kept=''
  while :; do
    got=0 line=''
    IFS= read -r -t 1 -u 3 line || got=$?
    # After a timeout, $line holds the part of a line that has arrived so far. It may end within a
    # report, which is then kept until the rest of it has come.
    line=$kept$line kept=''
    if ((got > 128)) && kill -0 "$job" 2>/dev/null && ends_in_report "$line"; then
      kept="<${line##*<}"
      line=${line%"$kept"}
    fi
    if ((got)); then relay "$line" ''; else relay "$line" $'\n'; fi
    ((got == 0 || got > 128)) || return 0
    ((got == 0)) || [[ -n $kept ]] || kill -0 "$job" 2>/dev/null || return 0
    [[ -z $last_report_s ]] || ((SECONDS < last_report_s + patience_s)) || kill_mpirun
  done
}

# ends_in_report TEXT: whether TEXT ends with the first part of a rank's report.
ends_in_report() {
  local start="<$job_id: rank " last="<${1##*<}"
  [[ $1 == *'<'* && $last != *'>'* ]] && [[ $start == "$last"* || $last == "$start"* ]]
}

# relay TEXT END: keep the reports in TEXT, print the rest.
relay() {
  local text=$1 report="<$job_id: rank ([0-9]+) ended with ([0-9]+)>"
  while [[ $text =~ $report ]]; do
    text=${text/"${BASH_REMATCH[0]}"/}
    ended[BASH_REMATCH[1]]=${BASH_REMATCH[2]}
    ((BASH_REMATCH[2] == 0)) || first_bad=${first_bad:-${BASH_REMATCH[2]}}
    if ((${#ended[@]} == num_ranks)) || [[ -n $first_bad ]]; then
      last_report_s=${last_report_s:-$SECONDS}
    fi
    [[ -n $text ]] || return 0
  done
  printf '%s%s' "$text" "$2" >&2
}

kill_mpirun() {
  [[ -n $killed ]] || printf '%s\n' "${program:-${0##*/}}: mpirun did not end; killing it." >&2
  killed=1
  kill -KILL -- "-$job" 2>/dev/null || true
}

# Return 0 if every rank reported 0, else the code of the first failure or of mpirun.
conclude() {
  local num_ranks=$1 status=0 rank silent=()
  wait "$job" || status=$?
  while kill -0 "$job" 2>/dev/null; do
    status=0
    wait "$job" || status=$?
  done
  for ((rank = 0; rank < num_ranks; rank++)); do
    [[ -n ${ended[rank]-} ]] || silent+=("$rank")
  done
  if ((${#silent[@]})) && ((status == 0)) && [[ -z $first_bad ]]; then
    printf '%s: no exit code from rank %s, although mpirun ended with 0. %s\n' \
      "${program:-${0##*/}}" "${silent[*]}" \
      'Check whether a host or a process died, and start the job again.' >&2
  fi
  if [[ -n $stopped ]]; then return "$stopped"; fi
  if [[ -z $first_bad ]] && ((${#silent[@]} == 0)); then return 0; fi
  if [[ -z $killed ]] && ((status)); then return "$status"; fi
  return "${first_bad:-1}"
}
