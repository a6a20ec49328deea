#!/usr/bin/env bash
# A Slurm cluster on this machine alone, for tests: one controller and two nodes on loopback, no systemd, no accounting.
#   slurm/cluster.sh up FOLDER      start it (needs root and Debian's slurm-wlm and munge); prints its SLURM_CONF
#   slurm/cluster.sh down FOLDER    end its jobs and daemons
#   slurm/cluster.sh install        apt-get install what is missing; exit code 1 and the reason where that cannot be
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
packages=(slurm-wlm munge)

die() { echo "slurm/cluster.sh: $*" >&2; exit 1; }

install() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  [[ $(id -u) == 0 ]] || die "Slurm is not installed, and installing ${packages[*]} needs root"
  command -v apt-get >/dev/null || die "Slurm is not installed, and there is no apt-get to install ${packages[*]} with"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 ||
    die "apt-get could not install ${packages[*]}"
}

configure() { # the ports are free ones: several clusters may run at once
  local port
  port=$(python3 -c 'import socket; s = [socket.socket() for _ in range(3)]; [x.bind(("127.0.0.1", 0)) for x in s]; print(*(x.getsockname()[1] for x in s))')
  read -r controller node1 node2 <<<"$port"
  mkdir -p "$root"/{log,state,spool.n1,spool.n2}
  chmod 755 "$root"
  (umask 077 && head -c 128 /dev/urandom >"$root/munge.key")
  for n in n1 n2; do # a node's name must resolve: the ranks meet there
    grep -qE "^127\.0\.0\.1\s+$n\$" /etc/hosts || echo "127.0.0.1 $n" >>/etc/hosts
  done
  for gpu in 0 1 2 3; do # /dev/null by another name: jobs may ask for GPUs that nothing computes on
    [[ -c $root/gpu$gpu ]] || mknod -m 666 "$root/gpu$gpu" c 1 3 || : >"$root/gpu$gpu"
  done
  echo "AutoDetect=off
Name=gpu File=$root/gpu[0-3]" >"$root/gres.conf"
  # cred_expire: also how long a requeued job waits. No cgroups and no systemd: linuxproc, task/none.
  # config_overrides: nodes may claim more CPUs and memory than this machine has.
  cat >"$root/slurm.conf" <<END
ClusterName=test$controller
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$controller
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
GresTypes=gpu
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
PropagateResourceLimits=NONE
ReturnToService=2
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=86400
KillWait=15
MessageTimeout=30
MailProg=/bin/true
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$node1,$node2] CPUs=8 RealMemory=16000 Gres=gpu:4 Feature=loop State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=30 PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=1-0 DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=1-0 DefaultTime=30 PriorityTier=100 PreemptMode=OFF
END
}

up() {
  install
  [[ -s $root/slurm.conf ]] || configure
  [[ -S $root/munge.sock ]] || munged --force --key-file="$root/munge.key" --socket="$root/munge.sock" --num-threads=2 \
    --pid-file="$root/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/munge.seed"
  slurmctld -f "$root/slurm.conf"
  slurmd -N n1 -f "$root/slurm.conf"
  slurmd -N n2 -f "$root/slurm.conf"
  for _ in $(seq 300); do
    [[ $(SLURM_CONF=$root/slurm.conf sinfo --noheader --Node --partition=main --format=%T 2>/dev/null | grep -c idle) != 2 ]] ||
      { echo "$root/slurm.conf"; return; }
    sleep 0.1
  done
  tail -n 5 "$root"/log/*.log >&2
  die "the nodes were not idle after 30 s"
}

down() {
  export SLURM_CONF=$root/slurm.conf
  jobs=$(squeue --noheader --format=%A 2>/dev/null | sort -u) || jobs=
  [[ -z $jobs ]] || scancel --quiet $jobs || true
  for _ in $(seq 300); do [[ -n $(squeue --noheader 2>/dev/null) ]] || break; sleep 0.1; done
  for file in "$root"/slurmd.*.pid "$root"/slurmctld.pid "$root"/munged.pid; do
    [[ ! -s $file ]] || kill "$(cat "$file")" 2>/dev/null || true
  done
  for _ in $(seq 100); do compgen -G "$root/*.pid" >/dev/null || return 0; sleep 0.1; done
}

case ${1:-} in
  install) install ;;
  up | down) root=$(mkdir -p "${2:?a folder}" && cd "$2" && pwd -P) && "$1" ;;
  *) sed -n '2,5s/^# \?//p' "$0"; exit 2 ;;
esac
