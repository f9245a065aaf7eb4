#!/usr/bin/env bash
# A small cluster on one Linux machine, for tests of jobs that run on several nodes.
#
#   cluster.sh up N [--rate 1gbit] [--slots 2]   start hosts h1 to hN
#   cluster.sh hold N [...]     the same in the foreground, until its standard input ends
#   cluster.sh run COMMAND...   run on h1; mpirun of MPICH or Open MPI uses all hosts
#   cluster.sh on I COMMAND...  run on host I
#   cluster.sh rate R           limit what each host sends, or don't any more: R is none
#   cluster.sh cut I            pull host I's cable: both ends see that it is gone
#   cluster.sh drop I           lose silently all that is sent to or from host I
#   cluster.sh heal I           undo cut and drop
#   cluster.sh kill I           SIGKILL to all that runs on host I
#   cluster.sh boot I           start host I again
#   cluster.sh bytes            bytes that each host has sent and received
#   cluster.sh status           what is up
#   cluster.sh down             end everything; nothing is left
#   cluster.sh check            say why there can be no cluster here, if so
#
# A host has a network, host name, process tree, /dev/shm and $TMPDIR of its own, and an sshd; all
# else of the file system is the machine's. On the hosts a plain `ssh h2` works, for root. The
# addresses 10.0.0.I lead nowhere else: the hosts hang on a bridge in a network of its own.
#
# It needs Linux, root, and Debian's packages iproute2 and openssh-server (which need not run).
#
# CLUSTER_DIR  tells clusters apart, any number of which can be up (/tmp/cluster)
#
# [Note: one process holds all]
# The cluster is one process, the rack, in PID, mount and network namespaces of its own, and what
# it has started: hosts, bridge, links, mounts and keys. The kernel ends them all with the rack, so
# nothing can be left behind, and no name can meet that of another cluster.
# shellcheck disable=SC2016 # '$1' in the scripts for sh -c is meant as it stands
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
self=$(realpath "${BASH_SOURCE[0]}")
dir=${CLUSTER_DIR:-/tmp/cluster}

fail() {
    printf '%s\n' "cluster.sh: $*" >&2
    exit 2
}

# -- outside of the rack ---------------------------------------------------------------------------

check() {
    local program
    ((EUID == 0)) || fail "the user must be root; got $(id -un). Use sudo, or do without."
    for program in unshare nsenter setpriv ip bridge tc ssh ssh-keygen sshd; do
        command -v "$program" >/dev/null || fail "$program must be installed; it is not found." \
            "Install util-linux, iproute2, openssh-client and openssh-server."
    done
    unshare --net --mount --pid --fork --kill-child --mount-proc sh -c '
        mount -t tmpfs tmpfs /run && ip link add br0 type bridge && ip link add type veth
    ' >/dev/null 2>&1 || fail "the machine must allow new namespaces, mounts and links; this" \
        "one does not. In a container, give it more privileges."
}

# hold N [--rate R] [--slots S]: be a cluster until standard input ends.
hold() {
    local num_hosts=${1:-} rate=none slots=1
    shift || true
    while (($#)); do
        case $1 in
            --rate) rate=$2 ;;
            --slots) slots=$2 ;;
            *) fail "options must be --rate or --slots; got $1. See --help." ;;
        esac
        shift 2
    done
    [[ $num_hosts =~ ^[1-9][0-9]?$ ]] ||
        fail "the number of hosts must be from 1 to 99; got '$num_hosts'. See --help."
    check
    mkdir -p "$dir"
    [[ ! -e $dir/pid ]] || fail "$dir must hold no other cluster; it does. Take it down."
    trap down EXIT
    unshare --net --mount --pid --fork --kill-child --mount-proc \
        bash "$self" rack "$num_hosts" "$rate" "$slots" <&0 &
    echo $! >"$dir/pid"
    wait $!
}

up() {
    mkdir -p "$dir"
    mkfifo "$dir/open" 2>/dev/null || fail "$dir must hold no other cluster; it does. Take it down."
    # As it is opened for writing too, it does not end.
    setsid bash "$self" hold "$@" <>"$dir/open" >"$dir/log" 2>&1 &
    until grep -q '^up: ' "$dir/log" 2>/dev/null; do
        kill -0 $! 2>/dev/null || { cat "$dir/log" 2>/dev/null; rm -rf "$dir"; exit 2; }
        sleep 0.05
    done
    cat "$dir/log"
}

down() {
    end_all_in "$dir/pid"
    rm -rf "$dir"
}

# -- anywhere --------------------------------------------------------------------------------------

# enter FILE COMMAND...: run in the namespaces of the unshare whose process id is in the file. When
# this process ends the command gets SIGTERM.
enter() {
    local pid
    pid=$(cat "$1" 2>/dev/null) || fail "$1 must name a process; it is not there. See --help."
    shift
    exec nsenter -t "$pid" --net --uts --ipc --mount --pid="/proc/$pid/ns/pid_for_children" \
        setpriv --pdeathsig TERM sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
}

# end_all_in FILE: kill the first child of the unshare whose process id is in the file. The kernel
# takes all others of its PID namespace with it, and it is the last to go.
end_all_in() {
    local pid init=''
    pid=$(cat "$1" 2>/dev/null) || return 0
    if grep -qz -- --kill-child "/proc/$pid/cmdline" 2>/dev/null; then
        read -r init _ <"/proc/$pid/task/$pid/children" || true
        kill -9 ${init:-"$pid"} || true
        while kill -0 ${init:-"$pid"} 2>/dev/null; do sleep 0.02; done
    fi
    rm -f "$1"
}

# -- in the rack -----------------------------------------------------------------------------------

# The first process of the cluster. What it keeps is in /run and /etc/ssh, its own while it lives.
rack() {
    local i
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /etc/ssh
    mkdir /run/netns /run/sshd /run/tmp
    echo "$1" >/run/num_hosts
    write_ssh
    echo '127.0.0.1 localhost' >/run/hosts
    mount --bind /run/hosts /etc/hosts
    ip link add br0 up type bridge stp_state 0 forward_delay 0
    for ((i = 1; i <= $1; i++)); do
        echo "10.0.0.$i h$i" >>/run/hosts
        echo "h$i slots=$3" >>/run/hostfile.openmpi
        echo "h$i:$3" >>/run/hostfile.mpich
        ip netns add "h$i"
        ip link add "p$i" up master br0 type veth peer name eth0 netns "h$i"
        ip -n "h$i" link set lo up
        ip -n "h$i" link set eth0 up
        ip -n "h$i" addr add "10.0.0.$i/24" dev eth0
    done
    set_rate "$2"
    for ((i = 1; i <= $1; i++)); do boot "$i"; done
    echo "up: h1 to h$1, rate $2, slots $3"
    read -r _ || true
}

write_ssh() {
    ssh-keygen -q -t ed25519 -N '' -C cluster -f /etc/ssh/key
    cat >/etc/ssh/ssh_config <<'END'
Host *
    IdentityFile /etc/ssh/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 5
END
    cat >/etc/ssh/sshd_config <<'END'
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
# By SHLVL bash takes itself for a nested shell, and leaves a .bashrc alone, which may be slow.
SetEnv TMPDIR=/run/tmp SHLVL=1
END
}

boot() {
    local i=$1
    [[ ! -e /run/h$i.pid ]] || fail "host $i must be off; it is running. Kill it first."
    : >"/run/h$i.log"
    # Process ids repeat from host to host, and Open MPI names its folders after them: hence TMPDIR.
    ip netns exec "h$i" unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc sh -c '
        hostname "$1" && mount -t tmpfs -o mode=1777 tmpfs /dev/shm &&
            mount -t tmpfs -o mode=1777 tmpfs /run/tmp && exec "$2" -D -e
        ' sh "h$i" "$(command -v sshd)" </dev/null >"/run/h$i.log" 2>&1 &
    echo $! >"/run/h$i.pid"
    until grep -q 'Server listening' "/run/h$i.log"; do
        kill -0 $! 2>/dev/null || { cat "/run/h$i.log" >&2; fail "sshd must start; it ended."; }
        sleep 0.02
    done
}

set_rate() {
    local i
    for ((i = 1; i <= $(</run/num_hosts); i++)); do
        tc -n "h$i" qdisc del dev eth0 root 2>/dev/null || true
        [[ $1 == none ]] ||
            tc -n "h$i" qdisc add dev eth0 root tbf rate "$1" burst 256kb latency 50ms
    done
}

# Tell mpirun on h1 of all hosts; ranks talk over eth0, and share cores without knowing it.
set_up_mpi() {
    export PRTE_MCA_plm_ssh_agent=ssh PRTE_MCA_prte_default_hostfile=/run/hostfile.openmpi
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_MCA_rmaps_default_mapping_policy=slot PRTE_MCA_hwloc_default_binding_policy=none
    export OMPI_MCA_mtl=${OMPI_MCA_mtl-^ofi}
    export OMPI_MCA_btl=${OMPI_MCA_btl-^ofi,uct}
    export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle-1}
    export HYDRA_LAUNCHER=ssh HYDRA_HOST_FILE=/run/hostfile.mpich HYDRA_IFACE=eth0
}

bytes() {
    local i
    for ((i = 1; i <= $(</run/num_hosts); i++)); do
        ip netns exec "h$i" sh -c 'cd /sys/class/net/eth0/statistics
            echo "$1 sent $(cat tx_bytes) received $(cat rx_bytes)"' sh "h$i"
    done
}

status() {
    local i power
    for ((i = 1; i <= $(</run/num_hosts); i++)); do
        power=on
        [[ -e /run/h$i.pid ]] || power=off
        echo "h$i 10.0.0.$i $power, link $(bridge link show dev "p$i" | grep -oE 'state \w+')"
    done
}

# need_host I: there must be such a host.
need_host() {
    [[ ${1:-} =~ ^[1-9][0-9]?$ ]] && (($1 <= $(</run/num_hosts))) ||
        fail "the host must be a number from 1 to $(</run/num_hosts); got '${1:-}'."
}

in_rack() {
    local command=$1
    shift
    case $command in
        on | cut | drop | heal | kill | boot) need_host "${1:-}" ;;
    esac
    case $command in
        run) set_up_mpi; TMPDIR=/run/tmp enter /run/h1.pid "$@" ;;
        on) TMPDIR=/run/tmp enter "/run/h$1.pid" "${@:2}" ;;
        rate) set_rate "${1:-none}" ;;
        cut) ip link set "p$1" down ;;
        drop) bridge link set dev "p$1" state 0 ;;
        heal) ip link set "p$1" up && bridge link set dev "p$1" state 3 ;;
        kill) end_all_in "/run/h$1.pid" ;;
        boot | bytes | status) "$command" "$@" ;;
    esac
}

case ${1:-} in
    check | up | hold | down | rack | in_rack) "$@" ;;
    run | on | rate | cut | drop | heal | kill | boot | bytes | status)
        enter "$dir/pid" bash "$self" in_rack "$@"
        ;;
    -h | --help) sed -n '2,/^# CLUSTER_DIR/s/^# \{0,1\}//p' "$self" ;;
    *) fail "the first word must be one of those that --help names; got '${1:-}'." ;;
esac
