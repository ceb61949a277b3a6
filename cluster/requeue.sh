# Whether a run that ended is to be started again. Sourced by slurm.sbatch and hostfile.sh.
# shellcheck shell=bash

MAX_IDLE_RESTARTS=${MAX_IDLE_RESTARTS:-3}

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
        reason=$(<"$folder/requeue")
    elif ((code >= 128)); then
        reason="killed, exit code $code"
    else
        echo "[cluster] $folder ended with exit code $code and left no $folder/requeue: see its output above"
    fi
    if [[ -z ${reason:-} ]]; then
        rm -f "$notes"
        return 1
    fi

    latest=$(cat "$folder/checkpoints/latest" 2>/dev/null || echo none)
    before=none idle=0
    if [[ -f $notes ]]; then
        read -r before idle <"$notes" || true
    fi
    if [[ $latest != "$before" ]]; then
        idle=0
    elif ((idle >= MAX_IDLE_RESTARTS)); then
        echo "[cluster] $folder was restarted $idle times without a new checkpoint (latest: $latest); the last end:" \
            "$reason. Not again: mend the cause, then submit the same command"
        rm -f "$notes"
        return 1
    else
        idle=$((idle + 1))
    fi
    echo "$latest $idle" >"$notes" || return 1
    echo "[cluster] $folder runs again from $latest: $reason"
}
