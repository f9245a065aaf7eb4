#!/usr/bin/env bash
# Slurm on the hosts of cluster.sh, as long as they live, without systemd and cgroups.
#
#   cluster.sh on 1 bash slurm.sh start N           on hosts h1 to hN; h1 decides
#   cluster.sh on 1 bash slurm.sh run COMMAND...    sbatch, srun, sinfo ...
#   slurm.sh check                                  say what is missing, if so
#
# It needs Debian's packages slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge. With
# libpmix2 srun lists --mpi=pmix, but can use it only with the unversioned libpmix.so of libpmix-dev.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
dir=/run/slurm # all hosts see the same
export SLURM_CONF=$dir/slurm.conf

check() {
    local program
    for program in slurmctld slurmd munged sbatch srun; do
        command -v "$program" >/dev/null || {
            echo "slurm.sh: $program must be installed; it is not found. Install Slurm and munge." >&2
            exit 2
        }
    done
}

start() {
    local num_hosts=$1 i
    mkdir -p "$dir/state"
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 600 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    write_config "$num_hosts"
    slurmctld
    for ((i = 1; i <= num_hosts; i++)); do
        mkdir "$dir/spool.h$i"
        ssh "h$i" "SLURM_CONF=$SLURM_CONF $(command -v slurmd) -N h$i"
    done
    until [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "$num_hosts" ]]; do sleep 0.1; done
}

# Slurm lets a job start again only after what it gave out for the first start has expired: 5 s.
write_config() {
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=h1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=pmix
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=h[1-$1] CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES State=UP
END
    # It loads a plugin for cgroups in any case; that of version 1 needs no mount.
    echo 'CgroupPlugin=cgroup/v1' >"$dir/cgroup.conf"
    echo 'PMIxCliTmpDirBase=/run/tmp' >"$dir/mpi.conf" # each host's own
}

case ${1:-} in
    check) check ;;
    start) start "$2" ;;
    run) shift && exec "$@" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" ;;
esac
