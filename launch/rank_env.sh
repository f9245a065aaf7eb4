#!/usr/bin/env bash
# Set up the environment of a rank, then run its command: every launcher starts ranks this way.
#
#   mpirun ... bash launch/rank_env.sh [--report ID] COMMAND...
#
# The rank is bound to its share of the node's cores, gets as many threads, and sees one of the
# node's GPUs: that of its local rank, modulo their number. Variables that are already set stay as
# they are. Ranks are not bound where a launcher has bound them, where a container has a CPU quota,
# where ranks outnumber cores, or with RANK_CORES=all.
#
# RANK_GPUS=N   share out the first N GPUs of the node; there must be as many
# RANK_GPUS=all show all GPUs to every rank
#
# SHARDOPT_LOCAL_RANK is set to the rank's number on its node, whatever the launcher. A program that
# takes device SHARDOPT_LOCAL_RANK modulo the number of devices that it sees is right in each case.
#
# --report ID  report on stderr how the command ended, for job.sh
set -euo pipefail

main() {
  local id=''
  if [[ ${1:-} == --report ]]; then
    id=$2
    shift 2
  fi
  find_place
  export SHARDOPT_LOCAL_RANK=$local_rank
  share_cores
  share_gpus
  set_up_mpi
  [[ -n $id ]] || exec "$@"
  watch "$id" "$@"
}

# first NAME...: set $value to that of the first of these variables that has one.
first() {
  local name
  for name in "$@"; do
    value=${!name-}
    [[ -z $value ]] || return 0
  done
}

# From PRRTE, Hydra, PALS and Slurm, in this order: within Slurm, an mpirun's numbers are right.
find_place() {
  first OMPI_COMM_WORLD_RANK PMI_RANK PALS_RANKID PMIX_RANK SLURM_PROCID
  rank=${value:-0}
  first OMPI_COMM_WORLD_LOCAL_RANK MPI_LOCALRANKID PALS_LOCAL_RANKID SLURM_LOCALID
  local_rank=${value:-0}
  first OMPI_COMM_WORLD_LOCAL_SIZE MPI_LOCALNRANKS PALS_LOCAL_SIZE
  local_size=$value
  [[ -n $local_size ]] || count_slurm_tasks
}

# Find this node in "2(x3),1": nodes 0 to 2 have two tasks, node 3 has one.
count_slurm_tasks() {
  local node=${SLURM_NODEID:-0} part
  for part in ${SLURM_STEP_TASKS_PER_NODE:+${SLURM_STEP_TASKS_PER_NODE//,/ }}; do
    [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]]
    local_size=${BASH_REMATCH[1]}
    node=$((node - ${BASH_REMATCH[3]:-1}))
    ((node >= 0)) || break
  done
  local_size=${local_size:-1}
}

share_cores() {
  local -a cores
  local own quota period name threads start
  mapfile -t cores < <(list_cores "$(allowed_to self)")
  own=${#cores[@]}
  if [[ $(allowed_to self) != "$(allowed_to "$PPID")" ]]; then
    # The launcher has bound this rank, or each of Slurm's tasks may use all cores of the job.
    threads=$(count_physical "${cores[@]}")
    ((threads <= ${SLURM_CPUS_PER_TASK:-threads})) || threads=$SLURM_CPUS_PER_TASK
  else
    read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max || quota=max
    if [[ $quota != max ]] && ((quota < own * period)); then
      threads=$((quota / period / local_size))
    elif ((own < local_size)); then
      threads=1
    else
      start=$((local_rank * own / local_size))
      cores=("${cores[@]:start:(local_rank + 1) * own / local_size - start}")
      threads=$(count_physical "${cores[@]}")
      [[ ${RANK_CORES:-} == all ]] || bind "${cores[@]}"
    fi
  fi
  for name in OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS NPROC; do # NPROC is JAX's
    [[ -n ${!name-} ]] || export "$name=$((threads > 0 ? threads : 1))"
  done
}

# Print the cores that a process may run on, such as "0-3,8".
allowed_to() { sed -n 's/^Cpus_allowed_list:\s*//p' "/proc/$1/status" 2>/dev/null || true; }

# list_cores LIST: print the logical cores of a list, neighbours on the chip next to each other, in
# lines "SOCKET.CORE LOGICAL".
list_cores() {
  local place range
  place=$(lscpu -p=NODE,SOCKET,CORE,CPU 2>/dev/null | grep -v '^#') || place=''
  for range in ${1//,/ }; do seq "${range%-*}" "${range#*-}"; done |
    awk -F, -v OFS=, '
      NR == FNR { place[$4] = $1 "," $2 "," $3; next }
      { print ($1 in place ? place[$1] : "0,0," $1), $1 }
    ' <(printf '%s\n' "$place") - | sort -t, -k1,1n -k2,2n -k3,3n -k4,4n |
    sed -E 's/^[0-9]*,([0-9]*),([0-9]*),([0-9]*)$/\1.\2 \3/'
}

count_physical() { printf '%s\n' "${@% *}" | sort -u | wc -l; }

bind() {
  local list
  list=$(IFS=, && echo "${*#* }")
  taskset -cp "$list" $$ >/dev/null 2>&1 || true # inherited by the command
}

# Schedulers such as Slurm set a list of GPUs; each rank takes one of them.
share_gpus() {
  local -a gpus
  local wanted=${RANK_GPUS:-}
  [[ $wanted != all ]] || return 0
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(compgen -G '/dev/nvidia[0-9]*')
    gpus=("${!gpus[@]}") # CUDA numbers the visible ones from 0
  fi
  if [[ -n $wanted ]]; then
    ((${#gpus[@]} >= wanted)) || refuse_gpus "$wanted" "${#gpus[@]}"
    gpus=("${gpus[@]:0:wanted}")
  fi
  ((${#gpus[@]} < 2)) && [[ -z $wanted ]] ||
    export CUDA_VISIBLE_DEVICES=${gpus[local_rank % ${#gpus[@]}]}
}

# refuse_gpus WANTED FOUND: end this rank, with a message from one rank of the node.
refuse_gpus() {
  ((local_rank)) ||
    printf '%s %s\n' "rank_env.sh: --gpus-per-node must be at most the GPUs of a node; got $1, while" \
      "$(uname -n) shows $2. Ask for fewer, or check CUDA_VISIBLE_DEVICES." >&2
  exit 2
}

# Each MPI ignores the settings of the other.
set_up_mpi() {
  local shm_kib
  # A waiting rank yields its core, in case there are more ranks than cores.
  export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle-1}
  # Where there is no fast network, Open MPI would spend a second looking for one.
  if ! compgen -G '/sys/class/infiniband/*' >/dev/null && ! compgen -G '/sys/class/cxi/*' >/dev/null
  then
    export OMPI_MCA_btl=${OMPI_MCA_btl-^ofi,uct} OMPI_MCA_mtl=${OMPI_MCA_mtl-^ofi}
  fi
  # MPICH wants 5.3 MiB per rank in /dev/shm and may crash at its start where some ranks get it and
  # others do not. Four fifths are UCX's, which then uses another kind of shared memory.
  shm_kib=$(df -kP /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }') || true # none: 0
  ((${shm_kib:-0} >= 5340 * local_size)) || export UCX_TLS=${UCX_TLS-^posix}
}

# watch ID COMMAND...: run a command and report how it ended. It runs in a process group of its own,
# so that a signal that mpirun sends to this group reaches it once, from here. On SIGTERM Open MPI's
# mpirun would kill the ranks, but SIGUSR2 it forwards: job.sh sends that to make them save and end.
watch() {
  local id=$1 status=0 asked='' child
  local -a die_too=()
  shift
  ! command -v setpriv >/dev/null || die_too=(setpriv --pdeathsig KILL)
  set -m
  ${die_too[@]+"${die_too[@]}"} "$@" <&0 &
  child=$!
  set +m
  trap 'asked=1; kill -INT "$child" 2>/dev/null' INT
  trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM HUP USR2
  trap 'kill -USR1 "$child" 2>/dev/null' USR1
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  printf '<%s: rank %d ended with %d>\n' "$id" "$rank" "$status" >&2
  # The end of a rank that was asked to end must not make mpirun kill those that still save.
  [[ -z $asked ]] || status=0
  exit "$status"
}

main "$@"
