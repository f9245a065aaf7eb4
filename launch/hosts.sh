#!/usr/bin/env bash
# Run a command on the ranks of several hosts over ssh, with MPICH's or Open MPI's mpirun.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

usage() {
  cat <<'END'
usage: bash launch/hosts.sh [--ranks N] [--gpus-per-node N] [--interface NAME] HOSTFILE COMMAND...

Runs COMMAND on the hosts of HOSTFILE: bash launch/hosts.sh hosts python launch/train_lm.py

HOSTFILE has one line per host, with the number of ranks there (if it is left out: 1, or one for each
GPU with --gpus-per-node):

    node1 4
    node2 4      # also "node2 slots=4" and "node2:4"

  --ranks N           number of ranks (all in HOSTFILE)
  --gpus-per-node N   number of GPUs to use on each host (all)
  --interface NAME    network interface that the hosts share, such as eth0, if MPI picks a wrong one

The hosts must accept ssh without a password, and must have this folder, the program and its data at
the same path: on a shared file system, or as copies.

Each rank gets its share of its host's cores, as many threads, and one of the GPUs; see
launch/rank_env.sh. The mpirun is that beside COMMAND's program, if you name that by its path, or
else that in PATH; set MPIRUN to choose another. Ctrl-C and SIGTERM ask the ranks to save and end;
the second time they end mpirun. The exit code is 0 only if every rank ended with 0. The job ends if
a host stops responding.
END
}

# Variables to pass on to other hosts. MPICH passes on all by itself.
exported='^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|COLUMNS|(PYTHON|CONDA_|OMP_|OPENBLAS_|MKL_|NUMBA_|'
exported+='JAX_|XLA_|TORCH_|CUDA_|NCCL_|UCX_|FI_|RANK_|SHARDOPT_|TTY_).*)$'
# A connection that stops responding is given up within 20 s.
keepalive='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3'

main() {
  local ranks='' gpus='' interface='' hosts room
  while (($#)); do
    case $1 in
      -h | --help) usage && return ;;
      --ranks | --gpus-per-node | --interface)
        (($# > 1)) || fail "$1 must have a value; got none. See --help."
        case $1 in
          --ranks) ranks=$2 ;;
          --gpus-per-node) gpus=$2 ;;
          --interface) interface=$2 ;;
        esac
        shift 2
        ;;
      --ranks=*) ranks=${1#*=} && shift ;;
      --gpus-per-node=*) gpus=${1#*=} && shift ;;
      --interface=*) interface=${1#*=} && shift ;;
      -*) fail "options must be listed in --help; got $1. Put options of COMMAND after it." ;;
      *) break ;;
    esac
  done
  [[ -z $gpus ]] || want_gpus "$gpus"
  read_hosts "${1:-}" "${gpus:-1}"
  shift
  find_mpi "$@"
  ranks=${ranks:-$room}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] && ((ranks <= room)) ||
    fail "--ranks must be from 1 to $room, the ranks in HOSTFILE; got '$ranks'. See --help."

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

# read_hosts FILE RANKS: set $hosts to "node1:4,node2:4", which both MPIs read, and $room to the sum.
# RANKS is the number on hosts for which the file has none.
read_hosts() {
  local line pattern='^([^:=[:space:]]+)(:|[[:space:]]+(slots=)?)([1-9][0-9]*)$'
  [[ -f $1 && -r $1 ]] || fail "HOSTFILE must be a readable file; got '$1'. See --help."
  hosts='' room=0
  while read -r line || [[ -n $line ]]; do
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    [[ -n $line ]] || continue
    [[ $line == *[:[:space:]]* ]] || line+=" $2"
    [[ $line =~ $pattern ]] ||
      fail "HOSTFILE must have lines 'host ranks'; got '$line'. See --help."
    hosts+=${hosts:+,}${BASH_REMATCH[1]}:${BASH_REMATCH[4]}
    room=$((room + BASH_REMATCH[4]))
  done <"$1"
  ((room)) || fail "HOSTFILE must name a host; got none in $1. See --help."
}

# Binding is left to rank_env.sh, which does it alike for every MPI.
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
