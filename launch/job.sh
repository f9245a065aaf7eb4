# shellcheck shell=bash
# What local.sh, hosts.sh and the batch scripts share: they source it.
#
# [Note: what a job's end is known by]
# The exit code of mpirun does not tell. Open MPI's may be 0 when a host was lost, and either MPI's
# mpirun may stay when all ranks are gone. So each rank says itself how it ended (rank_env.sh
# --report), and only a job in which all of them ended with 0 has succeeded. A mpirun that is still
# there some seconds after the last word, or after the first bad one, is killed.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$launch")
# After the first rank that ended badly, or the last that ended well:
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
  # The mpirun of an environment goes with its Python.
  [[ -n ${MPIRUN:-} || $1 != */* || ! -x ${found%/*}/mpirun ]] || mpirun=${found%/*}/mpirun
  [[ -n $mpirun ]] || mpirun=${found%/*}/mpirun
  [[ -z ${MPIRUN:-} || $(command -v "$mpirun" || true) ]] ||
    fail "MPIRUN must name a program; got '$MPIRUN'. Unset it, or set it to the place of mpirun."
  [[ $(command -v "$mpirun" || true) ]] ||
    fail "mpirun must be in PATH or beside $found; it is not. Activate the environment that has" \
      "it, or set PATH, or MPIRUN to its place."
  [[ $mpirun != */* ]] || mpirun=$(cd "${mpirun%/*}" && pwd)/${mpirun##*/}
  version=$("$mpirun" --version 2>&1)
  case $version in
    *HYDRA* | *Intel*) mpi=mpich ;;
    *'Open MPI'*) mpi=openmpi ;;
    *) fail "mpirun must be MPICH's or Open MPI's; got ${version%%$'\n'*}. Set MPIRUN." ;;
  esac
}

# rank_command COMMAND...: set $ranked to what mpirun is to start.
rank_command() {
  job_id=job-$$-$RANDOM
  ranked=(bash "$(shorten "$launch/rank_env.sh")" --report "$job_id" "$@")
}

# A path as short as it can be said from here.
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

# mpirun stands between the ranks and the terminal, so they cannot see whether there is one.
describe_terminal() {
  if [[ -t 1 ]]; then
    export TTY_COMPATIBLE=1 TTY_INTERACTIVE=1
    COLUMNS=$(tput cols 2>/dev/null || echo 80) && export COLUMNS
  else
    export TTY_COMPATIBLE=0 TTY_INTERACTIVE=0
  fi
}

# run_job NUM_RANKS MPIRUN...: run it to its end; see [Note: what a job's end is known by].
run_job() {
  local num_ranks=$1 pipe
  shift
  ended=() first_bad='' last_word_s='' killed='' stopped=''
  pipe=$(mktemp -u)
  mkfifo "$pipe"
  # In a process group of its own, mpirun hears a Ctrl-C once: from here. (Twice means "kill".)
  set -m
  "$@" </dev/null 2>"$pipe" &
  job=$!
  set +m
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM HUP
  trap hand_on_usr1 USR1
  exec 3<"$pipe"
  rm "$pipe"
  listen "$num_ranks"
  exec 3<&-
  conclude "$num_ranks"
}

# stop SIGNAL STATUS: let the ranks save and end. The second time it is mpirun's turn.
stop() {
  local signal=$1
  [[ $mpi != openmpi || -n $stopped ]] || signal=USR2 # see watch in rank_env.sh
  stopped=$2
  kill -s "$signal" "$job" 2>/dev/null || true
}

# To the ranks SIGUSR1 is a request to save, and to go on.
hand_on_usr1() { kill -USR1 "$job" 2>/dev/null || true; }

# Read what mpirun prints on stderr until it ends, and pass it on.
listen() {
  local num_ranks=$1 line got
  while :; do
    got=0 line=''
    IFS= read -r -t 1 -u 3 line || got=$?
    # Without the end of a line there is what has come of it so far.
    if ((got)); then hear "$line" ''; else hear "$line" $'\n'; fi
    ((got == 0 || got > 128)) || return 0
    ((got == 0)) || kill -0 "$job" 2>/dev/null || return 0
    [[ -z $last_word_s ]] || ((SECONDS < last_word_s + patience_s)) || kill_mpirun
  done
}

# hear TEXT END: note what ranks say of their ends, print the rest.
hear() {
  local text=$1 word="<$job_id: rank ([0-9]+) ended with ([0-9]+)>"
  while [[ $text =~ $word ]]; do
    text=${text/"${BASH_REMATCH[0]}"/}
    ended[BASH_REMATCH[1]]=${BASH_REMATCH[2]}
    ((BASH_REMATCH[2] == 0)) || first_bad=${first_bad:-${BASH_REMATCH[2]}}
    if ((${#ended[@]} == num_ranks)) || [[ -n $first_bad ]]; then
      last_word_s=${last_word_s:-$SECONDS}
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

# Say whether all ranks ended well, and which did not.
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
    printf '%s must end well on all ranks; %s of ranks %s, and mpirun ended with 0. %s\n' \
      "${program:-${0##*/}}: the job" 'nothing was heard' "${silent[*]}" \
      'Look for what was lost, and start it again.' >&2
  fi
  if [[ -n $stopped ]]; then return "$stopped"; fi
  if [[ -z $first_bad ]] && ((${#silent[@]} == 0)); then return 0; fi
  if [[ -z $killed ]] && ((status)); then return "$status"; fi
  return "${first_bad:-1}"
}
