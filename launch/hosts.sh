#!/usr/bin/env bash
# Run a command on the ranks of several hosts, over ssh, with the mpirun that is there.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

usage() {
  cat <<'END'
usage: bash launch/hosts.sh [--ranks N] [--interface NAME] HOSTFILE COMMAND...

Runs COMMAND on the hosts of HOSTFILE: bash launch/hosts.sh hosts python launch/train_lm.py

HOSTFILE has a line for each host, with the number of ranks there (1 unless said):

    node1 4
    node2 4      # "node2 slots=4" and "node2:4" are read, too

  --ranks N          fewer than HOSTFILE has room for (all)
  --interface NAME   the network that the hosts share, such as eth0, where MPI chooses a wrong one

The hosts must let you in by ssh without a password, and have this folder, the program and its data
at the same place: a shared file system, or copies.

Each rank gets its part of its host's cores, as many threads, and one of the GPUs:
launch/rank_env.sh. It takes the mpirun of MPICH or Open MPI that is beside the Python of COMMAND or
in PATH, or MPIRUN. Ctrl-C and SIGTERM ask the ranks to save and end; again, they end mpirun. The
exit code is 0 only if all ranks ended well. A host that falls silent ends the job.
END
}

# Variables that ranks on other hosts should have, too. MPICH takes all along.
exported='^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|COLUMNS|(PYTHON|CONDA_|OMP_|OPENBLAS_|MKL_|NUMBA_|'
exported+='JAX_|XLA_|TORCH_|CUDA_|NCCL_|UCX_|FI_|RANK_|SHARDOPT_|TTY_).*)$'
# A connection that is silent for so long is given up: in 20 s at most.
keepalive='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3'

main() {
  local ranks='' interface='' hosts room
  while (($#)); do
    case $1 in
      -h | --help) usage && return ;;
      --ranks | --interface)
        (($# > 1)) || fail "$1 must have a value; got none. See --help."
        if [[ $1 == --ranks ]]; then ranks=$2; else interface=$2; fi
        shift 2
        ;;
      --ranks=*) ranks=${1#*=} && shift ;;
      --interface=*) interface=${1#*=} && shift ;;
      -*) fail "options must be those of --help; got $1. Options of COMMAND go after it." ;;
      *) break ;;
    esac
  done
  read_hosts "${1:-}"
  shift
  find_mpi "$@"
  ranks=${ranks:-$room}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] && ((ranks <= room)) ||
    fail "--ranks must be from 1 to $room, the room on the hosts; got '$ranks'. See --help."

  local -a command=("$mpirun" -n "$ranks")
  case $mpi in
    mpich) add_mpich_options ;;
    openmpi) add_openmpi_options ;;
  esac
  [[ -z $interface ]] || set_interface
  describe_terminal
  [[ $mpi == mpich ]] || add_exports
  rank_command "$@"
  command+=("${ranked[@]}")
  print_command "${command[@]}"
  run_job "$ranks" "${command[@]}"
}

# read_hosts FILE: set $hosts to "node1:4,node2:4", which both MPIs read, and $room to the sum.
read_hosts() {
  local line pattern='^([^:=[:space:]]+)(:|[[:space:]]+(slots=)?)([1-9][0-9]*)$'
  [[ -f $1 && -r $1 ]] || fail "HOSTFILE must be a file that can be read; got '$1'. See --help."
  hosts='' room=0
  while read -r line || [[ -n $line ]]; do
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    [[ -n $line ]] || continue
    [[ $line == *[:[:space:]]* ]] || line+=' 1'
    [[ $line =~ $pattern ]] || fail "HOSTFILE must have lines 'host ranks'; got '$line'. See --help."
    hosts+=${hosts:+,}${BASH_REMATCH[1]}:${BASH_REMATCH[4]}
    room=$((room + BASH_REMATCH[4]))
  done <"$1"
  ((room)) || fail "HOSTFILE must name a host; $1 names none. See --help."
}

# rank_env.sh binds, in the same way for every MPI.
add_mpich_options() {
  command=(env "HYDRA_LAUNCHER_EXTRA_ARGS=$keepalive" "${command[@]}" -launcher ssh -hosts "$hosts")
}

add_openmpi_options() {
  command+=(--host "$hosts" --map-by slot --bind-to none)
  (($(id -u))) || command+=(--allow-run-as-root)
  command+=(
    --prtemca plm ssh
    --prtemca plm_ssh_agent "ssh $keepalive"
    --prtemca oob_tcp_keepalive_time 5
    --prtemca oob_tcp_keepalive_intvl 5
    --prtemca oob_tcp_keepalive_probes 3
  )
}

set_interface() {
  if [[ $mpi == openmpi ]]; then
    command+=(--prtemca prte_if_include "$interface" --mca btl_tcp_if_include "$interface")
  else
    command+=(-iface "$interface")
    export FI_TCP_IFACE=$interface UCX_NET_DEVICES=$interface
  fi
}

add_exports() {
  local name
  for name in $(compgen -e | grep -E "$exported" | sort); do command+=(-x "$name"); done
}

main "$@"
