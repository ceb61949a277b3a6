#!/usr/bin/env bash
# A training run over ssh, started again until it is complete.
#
#   cluster/hostfile.sh --hosts node1:8,node2:8 RUN_FOLDER --config configs/XL.yaml [key.sub=value ...]
#   cluster/hostfile.sh --hostfile FILE         RUN_FOLDER --config ...   # lines `host slots=8`, as DeepSpeed's
#   cluster/hostfile.sh                         RUN_FOLDER --config ...   # the hosts of a PBS or Slurm allocation
#   cluster/hostfile.sh [--hosts ... | --hostfile ...] --print            # the hostfile, and no run
#
# --slots N: ranks on a host that does not say; left out, the GPUs of this machine, or 1. All hosts see the repository
# and the run folder at the same paths, and take an ssh login without a password. `localhost` needs no ssh.
# TERM, INT and USR1 to this script reach every rank; it then ends with exit code 75 where the run wants to go on.
# Where this script dies or a connection breaks, the ranks get TERM.
#
# PYTHON: another interpreter than .venv/bin/python. MASTER_PORT: another port of the first host than 29500.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXIT_REQUEUE=75
# shellcheck source=cluster/requeue.sh
source "$ROOT/cluster/requeue.sh"
# After the first rank of a host ended, the others have as long: guard.rank_timeout_seconds and the time to say so.
WAIT_SECONDS=${WAIT_SECONDS:-900}
# The settings that travel to the other hosts. No keys: they would stand in the lists of processes.
EXPORTED='^(NCCL_|GLOO_|UCX_|CUDA_|TORCH_|OMP_NUM_THREADS$|WAIT_SECONDS$)'

# ----------------------------------------------------------------------------
# One host: starts its ranks, and passes on what comes on standard input

# run_ranks FIRST_RANK SLOTS WORLD_SIZE MASTER_ADDR MASTER_PORT COMMAND...
run_ranks() {
    local first=$1 slots=$2 i
    export WORLD_SIZE=$3 MASTER_ADDR=$4 MASTER_PORT=$5 LOCAL_SIZE=$2 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    require_numbers first slots WORLD_SIZE MASTER_PORT
    require_hosts "$MASTER_ADDR"
    shift 5
    cd "$ROOT"
    # One to the whole process group (a batch system's, a terminal's) is the ranks' matter: stay until they have ended.
    trap : TERM USR1 HUP
    pids=()
    for ((i = 0; i < slots; i++)); do
        RANK=$((first + i)) LOCAL_RANK=$i "$@" </dev/null &
        pids+=($!)
    done
    pass_on_until_all_ended
    local code highest=0
    for i in "${pids[@]}"; do
        code=0
        wait "$i" || code=$?
        highest=$((code > highest ? code : highest))
    done
    return "$highest"
}

pass_on_until_all_ended() {
    local line code connected=yes deadline=''
    while count_living && ((num_living > 0)); do
        if ((num_living < ${#pids[@]})); then
            deadline=${deadline:-$((SECONDS + WAIT_SECONDS))}
            ((SECONDS < deadline)) || kill_ranks KILL
        fi
        if [[ ! $connected ]]; then
            sleep 1
            continue
        fi
        code=0
        read -r -t 1 line || code=$?
        if ((code == 0)); then
            if [[ $line =~ ^(TERM|USR1)$ ]]; then kill_ranks "$line"; fi
        elif ((code <= 128)); then # the end of the input, not of the second
            connected=''
            kill_ranks TERM
        fi
    done
}

count_living() {
    local pid
    num_living=0
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then num_living=$((num_living + 1)); fi
    done
}

kill_ranks() {
    local pid
    for pid in "${pids[@]}"; do
        kill "-$1" "$pid" 2>/dev/null || true
    done
}

if [[ ${1:-} == --ranks-of-this-host ]]; then
    shift
    run_ranks "$@"
    exit
fi

# ----------------------------------------------------------------------------
# The hosts

slots='' list='' hostfile='' print=''
while [[ ${1:-} == -* ]]; do
    case $1 in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    --hosts | --hostfile | --slots)
        (($# > 1)) || fail "$1: expected a value"
        if [[ $1 == --hosts ]]; then list=$2; elif [[ $1 == --hostfile ]]; then hostfile=$2; else slots=$2; fi
        shift 2
        ;;
    --print)
        print=yes
        shift
        ;;
    *) fail "$1: unknown option; --help lists them, and RUN_FOLDER comes before --config" ;;
    esac
done

# Lines `host` or `host slots=N`, from wherever the hosts stand.
name_hosts() {
    if [[ $list ]]; then
        tr ',' '\n' <<<"$list" | sed 's/:/ slots=/'
    elif [[ $hostfile ]]; then
        sed 's/#.*//' <"$hostfile"
    elif [[ ${PBS_NODEFILE:-} ]]; then
        awk '!seen[$1]++ {print $1}' <"$PBS_NODEFILE" # a host may stand there once a core
    elif [[ ${SLURM_JOB_NODELIST:-} ]]; then
        scontrol show hostnames "$SLURM_JOB_NODELIST"
    else
        return 1
    fi
}

default_slots() {
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    echo $((gpus > 0 ? gpus : 1))
}

[[ ! $hostfile || -r $hostfile ]] || fail "--hostfile: $hostfile cannot be read"
named=$(name_hosts) || fail "no hosts: give --hosts or --hostfile, or start it inside a PBS or Slurm allocation"
[[ $slots =~ ^[1-9][0-9]{0,5}$ || ! $slots ]] || fail "--slots: expected a number from 1, got $slots"
hosts=() counts=() world_size=0
while read -r host count rest; do
    [[ $host ]] || continue
    count=${count:-slots=${slots:=$(default_slots)}}
    require_hosts "$host"
    [[ $count =~ ^slots=[1-9][0-9]{0,5}$ && ! $rest ]] || fail "host $host: expected host:N or host slots=N, got $count $rest"
    hosts+=("$host")
    counts+=("${count#slots=}")
    world_size=$((world_size + ${count#slots=}))
done <<<"$named"
((world_size > 0)) || fail "no hosts in ${hostfile:-the list}"
if ((${#hosts[@]} > 1)) && [[ ${hosts[0]} == localhost ]]; then
    fail "the first of several hosts needs a name that the others know, got localhost"
fi
if [[ $print ]]; then
    for i in "${!hosts[@]}"; do
        echo "${hosts[i]} slots=${counts[i]}"
    done
    exit
fi

# ----------------------------------------------------------------------------
# The run

(($# >= 3)) || fail "usage: cluster/hostfile.sh [--hosts ... | --hostfile FILE] RUN_FOLDER --config FILE [key.sub=value ...]"
cd "$ROOT"
run_folder=$1
shift
train=("${PYTHON:-$ROOT/.venv/bin/python}" cfpretrain/train.py "$@" "run.folder=$run_folder")
settings=()
while read -r name; do
    if [[ $name =~ $EXPORTED ]]; then settings+=("$name=${!name}"); fi
done < <(compgen -e)

# Each host's standard input is a named pipe that this script alone holds open: lines written to it reach its ranks,
# and when this script dies, all of them read the end of the file.
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
controls=() signalled=''
tell_ranks() {
    local control
    signalled=yes
    echo "[cluster] $1: telling all ranks"
    for control in "${controls[@]}"; do
        echo "$1" >&"$control" || true
    done
}
trap '' PIPE # a host may be gone
trap 'tell_ranks USR1' USR1
trap 'tell_ranks TERM' TERM INT

start_host() {
    local host=$1 pipe=$2
    shift 2
    if [[ $host == localhost ]]; then
        exec bash "$ROOT/cluster/hostfile.sh" --ranks-of-this-host "$@" <"$pipe"
    else
        exec ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "$host" \
            "$(printf '%q ' env "${settings[@]}" bash "$ROOT/cluster/hostfile.sh" --ranks-of-this-host "$@")" <"$pipe"
    fi
}

# Runs all hosts to their end; the exit code is the highest of their ranks'.
run_hosts() {
    local i pid control code highest=0 first=0 pids=()
    for i in "${!hosts[@]}"; do
        rm -f "$pipes/$i"
        mkfifo "$pipes/$i"
        start_host "${hosts[i]}" "$pipes/$i" \
            "$first" "${counts[i]}" "$world_size" "${hosts[0]}" "${MASTER_PORT:-29500}" "${train[@]}" &
        pids+=($!)
        first=$((first + counts[i]))
    done
    controls=()
    for i in "${!hosts[@]}"; do
        exec {control}>"$pipes/$i"
        controls+=("$control")
    done
    for pid in "${pids[@]}"; do
        # A signal ends `wait`, not the host.
        while kill -0 "$pid" 2>/dev/null; do
            wait "$pid" || true
        done
        code=0
        wait "$pid" || code=$?
        highest=$((code > highest ? code : highest))
    done
    for control in "${controls[@]}"; do
        exec {control}>&-
    done
    controls=()
    return "$highest"
}

while true; do
    echo "[cluster] $world_size ranks on ${hosts[*]}"
    code=0
    run_hosts || code=$?
    if [[ $signalled ]]; then
        if [[ -s $run_folder/requeue ]]; then code=$EXIT_REQUEUE; fi
        echo "[cluster] stopped by a signal; the same command goes on with $run_folder"
        exit "$code"
    fi
    run_again "$run_folder" "$code" || exit "$code"
    sleep "${RESTART_SECONDS:-10}"
done
