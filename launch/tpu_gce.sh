#!/usr/bin/env bash
# A TPU slice of Compute Engine, as a managed instance group: TPU7x and later, which the Cloud TPU API
# does not serve, and v5p and v6e.
#
#   launch/tpu_gce.sh create --name NAME --zone ZONE --project PROJECT --topology 2x2x2 [--spot]
#   launch/tpu_gce.sh run    --name NAME --zone ZONE --project PROJECT CONFIG [--dotted.key value …]
#   launch/tpu_gce.sh logs   --name NAME --zone ZONE --project PROJECT
#   launch/tpu_gce.sh stop   --name NAME --zone ZONE --project PROJECT
#   launch/tpu_gce.sh delete --name NAME --zone ZONE --project PROJECT
#
#   --topology AxBxC        chips along each axis of the slice
#   --machine-type TYPE     tpu7x-standard-4t; its last number is the chips of a host
#   --image-family FAMILY   ubuntu-accel-2404-amd64-tpu-tpu7x, of ubuntu-os-accelerator-images
#   --spot                  may be preempted, costs less
#   --reservation NAME      the capacity to use
#   --before COMMAND        every host runs it before the run starts, to mount a shared disk, say
#   --dry-run               prints the commands and runs none, wherever it stands on the line
#
# NAME, ZONE, PROJECT and TOPOLOGY may also be variables of these names. create leaves alone what is
# there; run starts a stopped run again where it was; logs follows the first host's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

take_dry_run "$@"
set -- "${WORDS[@]}"
action=${1-}
case $action in
-h | --help) usage && exit ;;
create | run | logs | stop | delete) shift ;;
*) die "${action:-an action} is missing or unknown: create, run, logs, stop or delete (-h explains)" ;;
esac
NAME=${NAME-} ZONE=${ZONE-} PROJECT=${PROJECT-} TOPOLOGY=${TOPOLOGY-}
machine=tpu7x-standard-4t family=ubuntu-accel-2404-amd64-tpu-tpu7x
spot='' reservation='' before=''
while (($#)); do
    case $1 in
    --name) value_of "$1" $# && NAME=$2 && shift 2 ;;
    --zone) value_of "$1" $# && ZONE=$2 && shift 2 ;;
    --project) value_of "$1" $# && PROJECT=$2 && shift 2 ;;
    --topology) value_of "$1" $# && TOPOLOGY=$2 && shift 2 ;;
    --machine-type) value_of "$1" $# && machine=$2 && shift 2 ;;
    --image-family) value_of "$1" $# && family=$2 && shift 2 ;;
    --reservation) value_of "$1" $# && reservation=$2 && shift 2 ;;
    --before) value_of "$1" $# && before=$2 && shift 2 ;;
    --spot) spot=1 && shift ;;
    -h | --help) usage && exit ;;
    -*) die "$1: unknown option (-h lists them)" ;;
    *) break ;;
    esac
done
need NAME --name
need ZONE --zone
need PROJECT --project
need_program gcloud
region=${ZONE%-*}
project=("--project=$PROJECT")
zone=("--zone=$ZONE" "${project[@]}")
policy=$NAME-policy template=$NAME-template

hosts() { # of a slice: its chips over those of a host
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || die "--topology $TOPOLOGY: must be as 2x2x2"
    [[ $machine =~ -([0-9]+)t$ ]] || die "--machine-type $machine: must end in the chips of a host, as -4t"
    local each=${BASH_REMATCH[1]} chips=$((${TOPOLOGY//x/*}))
    ((chips % each == 0)) || die "--topology $TOPOLOGY: its $chips chips do not fill hosts of $each"
    echo $((chips / each))
}

create() {
    local count options=()
    need TOPOLOGY --topology
    count=$(hosts)
    [[ -z $spot || -z $reservation ]] || die "--spot and --reservation: give one of them"
    [[ -z $spot ]] || options=(--provisioning-model=SPOT --instance-termination-action=DELETE)
    [[ -z $reservation ]] || options=(
        --provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE
        --reservation-affinity=specific "--reservation=$reservation"
    )
    explain 'a policy: the hosts lie together, in this topology'
    try gcloud compute resource-policies describe "$policy" "--region=$region" "${project[@]}" ||
        run gcloud compute resource-policies create workload-policy "$policy" "--region=$region" \
            "${project[@]}" --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY"
    explain 'a template: what each host is'
    try gcloud compute instance-templates describe "$template" "${project[@]}" ||
        run gcloud compute instance-templates create "$template" "${project[@]}" \
            "--machine-type=$machine" "--image-family=$family" \
            --image-project=ubuntu-os-accelerator-images --boot-disk-type=hyperdisk-balanced \
            --boot-disk-size=200GB --maintenance-policy=TERMINATE --scopes=cloud-platform \
            "${options[@]}"
    explain 'the group: as many hosts as the slice has, all or none; this is what costs'
    try gcloud compute instance-groups managed describe "$NAME" "${zone[@]}" ||
        run gcloud compute instance-groups managed create "$NAME" "${zone[@]}" "--size=$count" \
            "--template=$template" --target-size-policy-mode=bulk \
            --default-action-on-vm-failure=do-nothing \
            "--workload-policy=projects/$PROJECT/regions/$region/resourcePolicies/$policy"
    explain 'waits until they run'
    run gcloud compute instance-groups managed wait-until "$NAME" "${zone[@]}" --stable
}

instances() {
    if [[ -n ${DRY_RUN-} ]]; then
        echo "$NAME-host"
    else
        gcloud compute instance-groups managed list-instances "$NAME" "${zone[@]}" \
            --format='value(instance.basename())' | sort
    fi
}

everywhere() { # FUNCTION WORDS…: once a host, at the same time; fails if one of them does
    local host pid failed='' pids=() all
    all=$(instances)
    [[ -n $all ]] || die "$NAME has no instances: create it first"
    for host in $all; do
        "$1" "$host" "${@:2}" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    [[ -z $failed ]] || die "not every host could be told (see above)"
}

copy() { # HOST FILE
    run gcloud compute scp "$2" "$1:" "${zone[@]}" --quiet
}

tell() { # HOST COMMAND
    run gcloud compute ssh "$1" "${zone[@]}" --quiet "--command=$2"
}

start() {
    (($#)) || die "CONFIG is missing: the path of a YAML file in the repository"
    check_config "$@"
    warn_uncommitted 'hosts get what is committed'
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    explain 'packs what is committed'
    run git -C "$here/.." archive --format=tar.gz -o "$archive/jaxrlhf.tar.gz" HEAD
    explain 'copies it to every host'
    everywhere copy "$archive/jaxrlhf.tar.gz"
    explain 'unpacks it there, and installs it into a virtual environment'
    everywhere tell 'mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && jaxrlhf/launch/remote.sh install'
    if [[ -n $before ]]; then
        explain 'what --before asks of every host'
        everywhere tell "$before"
    fi
    explain 'starts the run on all hosts, in the background; its log is run.log; each copies its part of an' \
        'output gs://… there, which outlives the disks of the slice'
    everywhere tell "jaxrlhf/launch/remote.sh start $(quoted "$@")"
}

delete() { # what there is, in the order that lets go of one another
    local there=''
    explain 'group, template and policy go, in this order'
    if [[ -n ${DRY_RUN-} ]] || try gcloud compute instance-groups managed describe "$NAME" "${zone[@]}"; then
        there=1
        run gcloud compute instance-groups managed delete "$NAME" "${zone[@]}" --quiet
    fi
    if [[ -n ${DRY_RUN-} ]] || try gcloud compute instance-templates describe "$template" "${project[@]}"; then
        there=1
        run gcloud compute instance-templates delete "$template" "${project[@]}" --quiet
    fi
    if [[ -n ${DRY_RUN-} ]] || try gcloud compute resource-policies describe "$policy" "--region=$region" "${project[@]}"; then
        there=1
        run gcloud compute resource-policies delete "$policy" "--region=$region" "${project[@]}" --quiet
    fi
    [[ -n $there ]] || echo "$NAME: not there"
}

case $action in
create) create ;;
run) start "$@" ;;
logs)
    all=$(instances)
    explain 'follows the log of the first host, until Ctrl-C'
    tell "${all%%$'\n'*}" 'tail -n 200 -F jaxrlhf/run.log'
    ;;
stop)
    explain 'SIGTERM: the run saves a checkpoint and ends'
    everywhere tell 'jaxrlhf/launch/remote.sh stop'
    ;;
delete) delete ;;
esac
