#!/usr/bin/env bash
# Run a command on several ranks of this machine, with MPICH's or Open MPI's mpirun.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

usage() {
  cat <<'END'
usage: bash launch/local.sh [--ranks N] [--gpus-per-node N] COMMAND...

Runs COMMAND on N ranks of this machine: bash launch/local.sh python launch/train_lm.py --steps 99

  --ranks N           number of ranks (one per core); more than there are cores share them
  --gpus-per-node N   number of GPUs to use (all); then there is one rank for each by default

Each rank gets its share of the cores, as many threads, and one of the GPUs; see launch/rank_env.sh.
The mpirun is that beside COMMAND's program, if you name that by its path, or else that in PATH; set
MPIRUN to choose another. Ctrl-C and SIGTERM ask the ranks to save and end; the second time they end
mpirun. The exit code is 0 only if every rank ended with 0.
END
}

main() {
  local ranks='' gpus=''
  while (($#)); do
    case $1 in
      -h | --help) usage && return ;;
      --ranks | --gpus-per-node)
        (($# > 1)) || fail "$1 must have a value; got none. See --help."
        if [[ $1 == --ranks ]]; then ranks=$2; else gpus=$2; fi
        shift 2
        ;;
      --ranks=*) ranks=${1#*=} && shift ;;
      --gpus-per-node=*) gpus=${1#*=} && shift ;;
      -*) fail "options must be listed in --help; got $1. Put options of COMMAND after it." ;;
      *) break ;;
    esac
  done
  [[ -z $gpus ]] || want_gpus "$gpus"
  find_mpi "$@"
  ranks=${ranks:-${gpus:-$(python3 -I "$repo/shardopt/measure/cores.py" 2>/dev/null || nproc)}}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] ||
    fail "--ranks must be at least 1; got '$ranks'. See --help."

  # Binding is left to rank_env.sh, which does it alike for every MPI.
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
