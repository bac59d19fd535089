#!/usr/bin/env bash
# A TPU slice of the Cloud TPU API (v4, v5e, v5p, v6e), by a queued resource; newer ones: tpu_gce.sh.
#
#   launch/tpu_vm.sh create  --name NAME --zone ZONE --type TYPE [--version VERSION] [--spot]
#   launch/tpu_vm.sh run     --name NAME --zone ZONE CONFIG [--dotted.key value …]
#   launch/tpu_vm.sh resume  --name NAME --zone ZONE --type TYPE [--spot] CONFIG [--dotted.key value …]
#   launch/tpu_vm.sh logs    --name NAME --zone ZONE [--worker N]
#   launch/tpu_vm.sh stop    --name NAME --zone ZONE
#   launch/tpu_vm.sh delete  --name NAME --zone ZONE
#
#   create   asks for the slice and waits until it is there; does nothing if it is there
#   run      copies what is committed to every host, installs it and starts the run on all of them
#   resume   as run, after asking for the slice again if it was preempted
#   logs     follows the log of one host (0)
#   stop     SIGTERM on every host: the run saves a checkpoint and ends
#   delete   gives the slice back, with its disks
#
#   --type TYPE        v5litepod-256, v5p-512, v6e-64, …
#   --version VERSION  of the runtime; by TYPE if left out
#   --project PROJECT  gcloud's own if left out
#   --spot             may be preempted, costs less
#   --dry-run          prints the commands and runs none, wherever it stands on the line
#
# NAME, ZONE, TYPE and PROJECT may also be variables of these names. The disks of a slice are gone
# with it: the run's output has to be in a bucket, --output gs://BUCKET/runs/NAME, or on a disk that
# all hosts mount, which --before can do: a command that every host runs before the run starts. The
# seconds between two looks at the queue are POLL_SECONDS (30).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

take_dry_run "$@"
set -- "${WORDS[@]}"
action=${1-}
case $action in
-h | --help) usage && exit ;;
create | run | resume | logs | stop | delete) shift ;;
*) die "${action:-an action} is missing or unknown: create, run, resume, logs, stop or delete (-h explains)" ;;
esac
NAME=${NAME-} ZONE=${ZONE-} TYPE=${TYPE-} PROJECT=${PROJECT-} VERSION=${VERSION-}
spot='' before='' worker=0
while (($#)); do
    case $1 in
    --name) value_of "$1" $# && NAME=$2 && shift 2 ;;
    --zone) value_of "$1" $# && ZONE=$2 && shift 2 ;;
    --type) value_of "$1" $# && TYPE=$2 && shift 2 ;;
    --version) value_of "$1" $# && VERSION=$2 && shift 2 ;;
    --project) value_of "$1" $# && PROJECT=$2 && shift 2 ;;
    --before) value_of "$1" $# && before=$2 && shift 2 ;;
    --worker) value_of "$1" $# && worker=$2 && shift 2 ;;
    --spot) spot=1 && shift ;;
    -h | --help) usage && exit ;;
    -*) die "$1: unknown option (-h lists them)" ;;
    *) break ;; # CONFIG, and what belongs to the run
    esac
done
need NAME --name
need ZONE --zone
need_program gcloud
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

runtime() { # the runtime version of a TYPE
    case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--type $1: no runtime version is known for it: give --version (TPU7x and later: tpu_gce.sh)" ;;
    esac
}

state() { # of the queued resource; empty if there is none
    [[ -n ${DRY_RUN-} ]] ||
        gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
            --format='value(state.state)' 2>/dev/null || true
}

on_hosts() { # WORKER COMMAND: over ssh
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --quiet "--worker=$1" "--command=$2"
}

create() {
    local version now
    need TYPE --type
    version=${VERSION:-$(runtime "$TYPE")}
    now=$(state)
    if [[ -z $now ]]; then
        explain 'asks for the slice; the request waits in a queue until there is room'
        run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "--node-id=$NAME" \
            "--accelerator-type=$TYPE" "--runtime-version=$version" ${spot:+--spot}
        now=$(state)
    fi
    [[ -z ${DRY_RUN-} ]] || return 0
    while true; do
        case $now in
        ACTIVE)
            echo "$NAME: there"
            return
            ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
            die "$NAME: $now: launch/tpu_vm.sh delete it, then create it again, or resume the run"
            ;;
        esac
        echo "$NAME: ${now:-asked for}; waiting"
        sleep "${POLL_SECONDS:-30}"
        now=$(state)
    done
}

delete() {
    if [[ -z ${DRY_RUN-} && -z $(state) ]]; then
        echo "$NAME: not there"
        return
    fi
    explain 'gives the slice back, and its disks with it'
    run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

checked() { # before anything is asked for: the run could start
    (($#)) || die "CONFIG is missing: the path of a YAML file in the repository"
    check_config "$@"
    warn_uncommitted 'hosts get what is committed'
}

start() {
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    explain 'packs what is committed'
    run git -C "$here/.." archive --format=tar.gz -o "$archive/jaxrlhf.tar.gz" HEAD
    explain 'copies it to every host'
    run gcloud compute tpus tpu-vm scp "$archive/jaxrlhf.tar.gz" "$NAME:" "${where[@]}" --quiet \
        --worker=all
    explain 'unpacks it there, and installs it into a virtual environment'
    on_hosts all 'mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && jaxrlhf/launch/remote.sh install'
    if [[ -n $before ]]; then
        explain 'what --before asks of every host'
        on_hosts all "$before"
    fi
    explain 'starts the run on all hosts, in the background; its log is run.log; each copies its part of an' \
        'output gs://… there, which outlives the disks of the slice'
    on_hosts all "jaxrlhf/launch/remote.sh start $(quoted "$@")"
}

case $action in
create) create ;;
run)
    checked "$@"
    start "$@"
    ;;
resume)
    checked "$@"
    case $(state) in FAILED | SUSPENDED) delete ;; esac
    create
    start "$@"
    ;;
logs)
    explain 'follows the log of one host, until Ctrl-C'
    on_hosts "$worker" 'tail -n 200 -F jaxrlhf/run.log'
    ;;
stop)
    explain 'SIGTERM: the run saves a checkpoint and ends'
    on_hosts all 'jaxrlhf/launch/remote.sh stop'
    ;;
delete) delete ;;
esac
