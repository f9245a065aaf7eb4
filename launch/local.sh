#!/usr/bin/env bash
# Run a command on several ranks of this machine, with the mpirun that is there.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

usage() {
  cat <<'END'
usage: bash launch/local.sh [--ranks N] COMMAND...

Runs COMMAND with N ranks on this machine: bash launch/local.sh python launch/train_lm.py --steps 100

  --ranks N   one a core unless said; more share the cores

Each rank gets its part of the cores, as many threads, and one of the GPUs: launch/rank_env.sh. It
takes the mpirun of MPICH or Open MPI that is beside the Python of COMMAND or in PATH, or MPIRUN.
Ctrl-C and SIGTERM ask the ranks to save and end; again, they end mpirun. The exit code is 0 only if
all ranks ended well.
END
}

main() {
  local ranks=''
  while (($#)); do
    case $1 in
      -h | --help) usage && return ;;
      --ranks)
        (($# > 1)) || fail "--ranks must have a value; got none. See --help."
        ranks=$2
        shift 2
        ;;
      --ranks=*) ranks=${1#*=} && shift ;;
      -*) fail "options must be those of --help; got $1. Options of COMMAND go after it." ;;
      *) break ;;
    esac
  done
  find_mpi "$@"
  ranks=${ranks:-$(python3 -I "$repo/shardopt/measure/cores.py" 2>/dev/null || nproc)}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] ||
    fail "--ranks must be a number from 1 up; got '$ranks'. See --help."

  # rank_env.sh binds, in the same way for every MPI.
  local -a command=("$(shorten "$mpirun")" -n "$ranks")
  if [[ $mpi == openmpi ]]; then
    command+=(--oversubscribe --bind-to none)
    (($(id -u))) || command+=(--allow-run-as-root)
  fi
  describe_terminal
  rank_command "$@"
  command+=("${ranked[@]}")
  print_command "${command[@]}"
  run_job "$ranks" "${command[@]}"
}

main "$@"
