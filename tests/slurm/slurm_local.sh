#!/usr/bin/env bash
# slurm_local.sh - a real, private, throw-away Slurm cluster on one machine.
#
#   slurm_local.sh start [options]     bring the cluster up (no-op when already up)
#   slurm_local.sh stop                cancel jobs, stop every process it started
#   slurm_local.sh status              daemons, nodes, queue; exit 0 only when usable
#   slurm_local.sh env                 print "export SLURM_CONF=..." for eval
#   slurm_local.sh exec CMD...         run CMD as on a login node of this cluster
#   slurm_local.sh crash-node NAME     SIGKILL the node's slurmd and all its tasks
#   slurm_local.sh start-node NAME     bring a crashed node back
#   slurm_local.sh wait JOBID [SECS]   wait for a job to leave the queue
#
# Options (also as environment variables)
#   --dir DIR     SLURM_LOCAL_DIR    private directory   (default: $TMPDIR/slurm_local.<uid>)
#   --nodes N     SLURM_LOCAL_NODES  emulated nodes      (default: 2)
#   --gpus N      SLURM_LOCAL_GPUS   fake GPUs per node  (default: 8; 0: none)
#   --cpus N      SLURM_LOCAL_CPUS   claimed CPUs a node (default: 64)
#
# What it is: the distribution's own munged, slurmctld and one slurmd per
# emulated node, each with its own name, address (127.0.1.K), port and spool
# folder. CPUs, memory and GPUs are only counted, never isolated (no cgroups),
# so `--nodes=2 --gpus-per-node=8` is scheduled as on a real cluster.
# Every slurmd lives in its own UTS and mount namespace: `hostname` says node1,
# and node names resolve through a private /etc/hosts that only that node sees.
# Nothing outside DIR is written.
#
# Root: needed only to install the packages (apt-get install slurm-wlm munge).
# Running needs no root: every daemon runs as the caller, who is SlurmUser, and
# jobs then run as the caller too. Namespaces need root or unprivileged user
# namespaces. As root, other users may submit too.
#
# Bounded: every wait has a limit. Daemons are ended by the pid noted at their
# start, and only after /proc says the pid still is ours; tasks by Slurm.
set -euo pipefail
umask 022

die()  { echo "slurm_local: $*" >&2; exit 1; }
note() { echo "slurm_local: $*" >&2; }

verb=${1:-}; [ $# -gt 0 ] && shift
N_NODES=${SLURM_LOCAL_NODES:-2}
N_GPUS=${SLURM_LOCAL_GPUS:-8}
N_CPUS=${SLURM_LOCAL_CPUS:-64}
DIR=${SLURM_LOCAL_DIR:-${TMPDIR:-/tmp}/slurm_local.$(id -u)}
pos=()
while [ $# -gt 0 ]; do
    case $1 in
        --dir)   DIR=$2;     shift 2 ;;
        --nodes) N_NODES=$2; shift 2 ;;
        --gpus)  N_GPUS=$2;  shift 2 ;;
        --cpus)  N_CPUS=$2;  shift 2 ;;
        --)      shift; pos+=("$@"); break ;;
        -*)      die "unknown option $1" ;;
        *)       if [ "$verb" = exec ]; then pos+=("$@"); break; fi
                 pos+=("$1"); shift ;;
    esac
done
set -- ${pos[@]+"${pos[@]}"}
case $DIR in /*) ;; *) DIR=$PWD/$DIR ;; esac
case $DIR in *[[:space:],=\[\]]*) die "DIR must not hold spaces, commas, = or brackets" ;; esac
case $N_NODES$N_GPUS$N_CPUS in *[!0-9]*) die "--nodes, --gpus and --cpus take numbers" ;; esac
CONF=$DIR/etc/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
READY_S=${SLURM_LOCAL_READY_S:-30}

# ---- processes -------------------------------------------------------------
# Every daemon carries SLURM_LOCAL_HOME=$DIR in its environment; a pid counts
# as ours only while its environment says so.
ours() {  # PID
    [ -n "${1:-}" ] && [ -r "/proc/$1/environ" ] &&
        grep -zqxF "SLURM_LOCAL_HOME=$DIR" "/proc/$1/environ" 2>/dev/null
}
pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null || true; }
alive()  { ours "$(pid_of "$1")"; }

spawn() {  # NAME CMD...   in the background, its own session, its pid noted
    local name=$1; shift
    (
        # shellcheck disable=SC2046
        unset $(compgen -v | grep -E '^(SLURM_|SLURMD_|SBATCH_|SALLOC_|SRUN_)' || true)
        export SLURM_LOCAL_HOME=$DIR SLURM_CONF=$CONF
        cd "$DIR"
        exec setsid "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null 9>&-
    ) &
    echo $! >"$DIR/run/$name.pid"
}

end() {  # NAME SECONDS   TERM, then KILL after SECONDS
    local pid i; pid=$(pid_of "$1")
    if ours "$pid"; then
        kill -TERM "$pid" 2>/dev/null || true
        for ((i = 0; i < $2 * 20; i++)); do ours "$pid" || break; sleep 0.05; done
        if ours "$pid"; then kill -KILL "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$DIR/run/$1.pid"
}

# ---- namespaces ------------------------------------------------------------
NS=()
namespaces() {
    if unshare --uts --mount true 2>/dev/null; then NS=(unshare --uts --mount)
    elif unshare --user --map-current-user --keep-caps --uts --mount \
            sh -c 'hostname x && mount --bind /dev/null /etc/hosts' 2>/dev/null; then
        NS=(unshare --user --map-current-user --keep-caps --uts --mount)
    else die "no namespaces to be had here: wanted root, or unprivileged user namespaces"
    fi
}

start_node() {  # NAME
    mkdir -p "$DIR/spool/$1"
    # shellcheck disable=SC2016
    spawn "$1" "${NS[@]}" sh -c '
        mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2" -f "$3"' \
        sh "$DIR/etc/hosts" "$1" "$CONF"
}

# ---- set-up ----------------------------------------------------------------
free_port() {  # FIRST -> a port with nothing listening from here on
    local p=$1
    while (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null; do p=$((p + 1)); done
    echo "$p"
}

write_config() {
    local me host k base ctl ports="" gres="" types=""
    me=$(id -un); host=$(hostname -s)
    mkdir -p "$DIR"/{etc,run,log,state,spool,dev,munge}
    chmod 700 "$DIR/etc" "$DIR/munge"; chmod 755 "$DIR/run" "$DIR/log"
    # the users of a root-run cluster must read the config and reach the socket
    [ "$(id -u)" != 0 ] || chmod 755 "$DIR" "$DIR/etc" "$DIR/munge"
    if [ ! -s "$DIR/etc/munge.key" ]; then
        (umask 077; dd if=/dev/urandom of="$DIR/etc/munge.key" bs=128 count=1 status=none)
    fi
    # below the ports of jobs (20000 and up), spread by pid so that two clusters rarely meet
    ctl=$(free_port $((11000 + ($$ % 8000))))
    base=$(free_port $((ctl + 1)))
    for ((k = 1; k <= N_NODES; k++)); do
        ports="$ports $base"; base=$(free_port $((base + 1)))
    done
    { cat /etc/hosts; for ((k = 1; k <= N_NODES; k++)); do echo "127.0.1.$k node$k"; done; } >"$DIR/etc/hosts"
    : >"$DIR/etc/gres.conf"
    if [ "$N_GPUS" -gt 0 ]; then
        # Slurm counts a GPU per device file; links to /dev/null will do
        for ((k = 0; k < N_GPUS; k++)); do ln -sfn /dev/null "$DIR/dev/gpu$k"; done
        echo "Name=gpu Type=fake File=$DIR/dev/gpu[0-$((N_GPUS - 1))]" >"$DIR/etc/gres.conf"
        gres=" Gres=gpu:fake:$N_GPUS"; types="GresTypes=gpu"
    fi
    # a private plugstack and cgroup.conf, or slurmd reads the system's
    : >"$DIR/etc/plugstack.conf"; : >"$DIR/etc/cgroup.conf"
    {
        cat <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctl
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# cred_expire also is how long a requeued job waits before it may start (default 120, least 5)
AuthInfo=socket=$DIR/munge/sock,cred_expire=${SLURM_LOCAL_REQUEUE_S:-5}
CredType=cred/munge
PlugStackConfig=$DIR/etc/plugstack.conf
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.own.pid
SlurmdPidFile=$DIR/run/%n.own.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
BatchStartTimeout=10
CompleteWait=0
MinJobAge=600
DefMemPerCPU=1024
EnforcePartLimits=ALL
$types
CONF
        k=0
        for p in $ports; do
            k=$((k + 1))
            echo "NodeName=node$k NodeHostname=node$k NodeAddr=127.0.1.$k Port=$p CPUs=$N_CPUS Boards=1 SocketsPerBoard=2 CoresPerSocket=$((N_CPUS / 2)) ThreadsPerCore=1 RealMemory=1000000$gres"
        done
        echo "PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 GraceTime=20 State=UP"
        # jobs here push out jobs of main, as a higher tier does on a shared cluster
        echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP"
    } >"$CONF"
    echo "N_NODES=$N_NODES" >"$DIR/etc/local.env"
}

usable() {  # all nodes up and none odd
    local states; states=$(SLURM_CONF=$CONF timeout 5 sinfo -h -N -o '%T' 2>/dev/null) || return 1
    [ "$(echo "$states" | grep -cE '^(idle|mixed|allocated|completing)$')" -ge $((2 * N_NODES)) ]
}

load() { [ -r "$DIR/etc/local.env" ] && . "$DIR/etc/local.env"; }

do_start() {
    local t0 i k bin want
    local want_nodes=$N_NODES
    t0=$(date +%s.%N)
    for bin in munged slurmctld slurmd sbatch; do
        command -v $bin >/dev/null || die "$bin is missing: apt-get install slurm-wlm munge"
    done
    mkdir -p "$DIR"; exec 9>"$DIR/.lock"; flock -w 60 9 || die "another start or stop holds $DIR"
    if alive slurmctld && load && usable; then note "already up in $DIR"; return; fi
    want="N_NODES=$want_nodes"
    if [ -e "$CONF" ]; then teardown; eval "$want"; fi
    namespaces
    rm -rf "$DIR/state" "$DIR/spool" "$DIR/run" "$DIR/munge" "$DIR/log"
    write_config
    spawn munged munged --foreground --force --socket="$DIR/munge/sock" \
        --key-file="$DIR/etc/munge.key" --log-file="$DIR/munge/log" \
        --pid-file="$DIR/munge/pid" --seed-file="$DIR/munge/seed"
    for ((i = 0; i < 100; i++)); do [ -S "$DIR/munge/sock" ] && break; sleep 0.05; done
    [ -S "$DIR/munge/sock" ] || { tail -n 5 "$DIR/log/munged.out" >&2; die "munged did not start"; }
    spawn slurmctld slurmctld -D -c -f "$CONF"
    for ((k = 1; k <= N_NODES; k++)); do start_node "node$k"; done
    for ((i = 0; i < READY_S * 10; i++)); do
        usable && break
        alive slurmctld || { tail -n 8 "$DIR/log/slurmctld.log" >&2; die "slurmctld ended"; }
        sleep 0.1
    done
    if ! usable; then
        SLURM_CONF=$CONF timeout 5 sinfo -N -o '%N %T %E' >&2 || true
        grep -h error "$DIR"/log/slurm*.log | tail -n 8 >&2 || true
        teardown; die "not usable after $READY_S s; logs in $DIR/log"
    fi
    note "up: $N_NODES nodes x $N_GPUS fake GPUs, $(awk -v a="$t0" -v b="$(date +%s.%N)" 'BEGIN{printf "%.1f", b-a}') s; SLURM_CONF=$CONF"
}

teardown() {
    local i f p
    load || true
    if alive slurmctld; then
        SLURM_CONF=$CONF timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        [ "$(id -u)" != 0 ] || SLURM_CONF=$CONF timeout 5 squeue -h -o %A 2>/dev/null |
            SLURM_CONF=$CONF timeout 5 xargs -r scancel 2>/dev/null || true
        for ((i = 0; i < 150; i++)); do  # beyond KillWait
            [ -n "$(SLURM_CONF=$CONF timeout 5 squeue -h -t R,CG,S 2>/dev/null)" ] || break; sleep 0.1
        done
    fi
    for f in "$DIR"/run/node*.pid; do
        case $f in *.own.pid|*\**) continue ;; esac
        p=$(basename "$f" .pid); end "$p" 5
    done
    end slurmctld 5
    end munged 3
}

do_stop() {
    [ -e "$CONF" ] || { note "nothing in $DIR"; return; }
    exec 9>"$DIR/.lock"; flock -w 60 9 || die "another start or stop holds $DIR"
    teardown
    note "stopped $DIR"
}

crash_node() {  # power loss: slurmd, its step daemons and their tasks, at once
    local name=$1 pid ns p; load || die "no cluster in $DIR"
    pid=$(pid_of "$name"); ours "$pid" || die "$name is not running"
    local hit="$pid"
    ns=$(readlink "/proc/$pid/ns/uts")
    [ "$ns" != "$(readlink /proc/self/ns/uts)" ] || die "$name has no namespace of its own yet"
    for p in /proc/[0-9]*; do
        [ "$(readlink "$p/ns/uts" 2>/dev/null)" != "$ns" ] || hit="$hit ${p#/proc/}"
    done
    # shellcheck disable=SC2086
    kill -KILL $hit 2>/dev/null || true
    rm -f "$DIR/run/$name.pid"
}

case $verb in
    start)  do_start ;;
    stop)   do_stop ;;
    status) load || die "no cluster in $DIR"
            for f in munged slurmctld $(seq -f 'node%.0f' 1 "$N_NODES"); do
                alive "$f" && echo "$f $(pid_of "$f")" || echo "$f down"; done
            SLURM_CONF=$CONF timeout 5 sinfo -N || true; SLURM_CONF=$CONF timeout 5 squeue || true
            usable ;;
    env)    echo "export SLURM_CONF=$CONF" ;;
    exec)   [ $# -gt 0 ] || die "exec what?"; SLURM_CONF=$CONF exec "$@" ;;
    crash-node) crash_node "${1:?node}" ;;
    start-node) load; namespaces; alive "${1:?node}" || start_node "$1" ;;
    wait)   id=${1:?job}; limit=${2:-60}; s=''
            for ((i = 0; i < limit * 5; i++)); do
                s=$(SLURM_CONF=$CONF timeout 5 squeue -h -j "$id" -t all -o %T 2>/dev/null | sort -u | tr '\n' ' ')
                case $s in *PENDING*|*RUNNING*|*COMPLETING*|*CONFIGURING*|*SUSPENDED*|*REQUEUE*) sleep 0.2 ;; *) echo "$s"; exit 0 ;; esac
            done; die "job $id still $s after $limit s" ;;
    *) sed -n '2,35p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
