# Whether a run that ended should be started again, and checks of values. Sourced by slurm.sbatch and hostfile.sh.
# shellcheck shell=bash

EXIT_USER_ERROR=2

fail() {
    echo "${BASH_SOURCE[-1]##*/}: $1" >&2
    exit "$EXIT_USER_ERROR"
}

# require_numbers NAME...: variables that hold a whole number where they are set. Arithmetic runs the commands that
# stand in a subscript of anything else.
require_numbers() {
    local name
    for name; do
        [[ ! ${!name:-} || ${!name} =~ ^(0|[1-9][0-9]{0,17})$ ]] ||
            fail "$name: expected a whole number of at most 18 digits, got $(printf '%q' "${!name}")"
    done
}

# require_hosts HOST...: names that ssh and the ranks take for nothing else.
require_hosts() {
    local host
    for host; do
        [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.:@-]*$ ]] ||
            fail "host $(printf '%q' "$host"): expected a name of letters, digits and _ . : @ -, not begun by the last"
    done
}

# first_line FILE: of a regular file in a run folder, which may be a stranger's, what can be printed anywhere.
first_line() {
    local line=''
    if [[ -f $1 && ! -L $1 ]]; then
        IFS= read -r -n 300 line <"$1" || true
    fi
    LC_ALL=C
    printf '%s' "${line//[^ -~]/?}"
}

MAX_IDLE_RESTARTS=${MAX_IDLE_RESTARTS:-3}
require_numbers MAX_IDLE_RESTARTS WAIT_SECONDS RESTART_SECONDS MASTER_PORT SLURM_JOB_ID
[[ ${SLURM_JOB_NODELIST:-} != -* ]] || fail "SLURM_JOB_NODELIST: expected hosts, got an option"

# run_again RUN_FOLDER EXIT_CODE
#
# Returns 0 where the same command should run again, else 1, and prints why.
# EXIT_CODE is the highest of the ranks' codes (README.md says what they mean). The run says in RUN_FOLDER/requeue
# whether it wants to go on; ranks that were killed outright could not say. A run that ends MAX_IDLE_RESTARTS times
# after its last checkpoint without writing another is left alone: what ends it will end it again.
run_again() {
    local folder=$1 code=$2 reason latest before idle
    local notes=$folder/idle_restarts

    if [[ $code == 0 ]]; then
        echo "[cluster] $folder is complete"
    elif [[ $code == 2 || $code == 3 ]]; then
        echo "[cluster] $folder ended with exit code $code: running it again would not help"
    elif [[ -s $folder/requeue ]]; then
        reason=$(first_line "$folder/requeue")
        reason=${reason:-for no reason that can be read}
    elif ((code >= 128)); then
        reason="killed, exit code $code"
    else
        echo "[cluster] $folder ended with exit code $code and left no $folder/requeue: see its output above"
    fi
    if [[ -z ${reason:-} ]]; then
        rm -f -- "$notes"
        return 1
    fi

    latest=$(first_line "$folder/checkpoints/latest")
    [[ $latest =~ ^step_[0-9]+$ ]] || latest=none
    read -r before idle <<<"$(first_line "$notes")"
    if [[ $latest != "${before:=none}" || ! ${idle:=0} =~ ^[0-9]{1,8}$ ]]; then
        idle=0
    elif ((10#$idle >= MAX_IDLE_RESTARTS)); then
        echo "[cluster] $folder was restarted $idle times without a new checkpoint (latest: $latest); the last end:" \
            "$reason. Not again: fix the cause, then submit the same command"
        rm -f -- "$notes"
        return 1
    else
        idle=$((10#$idle + 1))
    fi
    rm -f -- "$notes" # a link would lead elsewhere, and so would one made since: nothing may be there
    (set -o noclobber && echo "$latest $idle" >"$notes") || return 1
    echo "[cluster] $folder runs again from $latest: $reason"
}
