#!/usr/bin/env bash
# A JobSet on GKE, from the manifests in launch/gke/.
#
#   launch/gke.sh run tpu --name NAME --image IMAGE --type tpu-v6e-slice --topology 16x16
#       [--slices N] [--chips 4] [--queue QUEUE] [--claim CLAIM] CONFIG [--dotted.key value …]
#   launch/gke.sh run gpu --name NAME --image IMAGE --type nvidia-h100-80gb --nodes 4
#       [--chips 8] [--queue QUEUE] [--claim CLAIM] CONFIG [--dotted.key value …]
#   launch/gke.sh logs    --name NAME
#   launch/gke.sh delete  --name NAME
#
#   --type TYPE      the node label cloud.google.com/gke-tpu-accelerator, or …/gke-accelerator
#   --topology AxB   of a TPU slice
#   --slices N       TPU slices (1)
#   --nodes N        GPU nodes (1)
#   --chips N        chips, or GPUs, of a node (4, or 8)
#   --queue QUEUE    Kueue's local queue; left out where there is none
#   --claim CLAIM    the claim mounted at /runs (jaxrlhf-runs, of launch/gke/storage.yaml)
#   --dry-run        prints the manifest and applies nothing, wherever it stands on the line
#
# IMAGE is built by launch/Dockerfile; write the run to a bucket, --output gs://BUCKET/NAME, or
# below /runs, which --claim mounts: --output /runs/NAME. kubectl has to point at the cluster, which
# needs JobSet 0.5 or newer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

take_dry_run "$@"
set -- "${WORDS[@]}"
action=${1-} kind=
case $action in
-h | --help) usage && exit ;;
run)
    kind=${2-}
    [[ $kind == tpu || $kind == gpu ]] || die "run: tpu or gpu must follow"
    shift 2
    ;;
logs | delete) shift ;;
*) die "${action:-an action} is missing or unknown: run, logs or delete (-h explains)" ;;
esac
NAME=${NAME-} IMAGE=${IMAGE-} TYPE=${TYPE-} TOPOLOGY=${TOPOLOGY-}
SLICES=1 QUEUE='' CLAIM=jaxrlhf-runs nodes=1
CHIPS=4
[[ $kind != gpu ]] || CHIPS=8
while (($#)); do
    case $1 in
    --name) value_of "$1" $# && NAME=$2 && shift 2 ;;
    --image) value_of "$1" $# && IMAGE=$2 && shift 2 ;;
    --type) value_of "$1" $# && TYPE=$2 && shift 2 ;;
    --topology) value_of "$1" $# && TOPOLOGY=$2 && shift 2 ;;
    --slices) value_of "$1" $# && SLICES=$2 && shift 2 ;;
    --nodes) value_of "$1" $# && nodes=$2 && shift 2 ;;
    --chips) value_of "$1" $# && CHIPS=$2 && shift 2 ;;
    --queue) value_of "$1" $# && QUEUE=$2 && shift 2 ;;
    --claim) value_of "$1" $# && CLAIM=$2 && shift 2 ;;
    -h | --help) usage && exit ;;
    -*) die "$1: unknown option (-h lists them)" ;;
    *) break ;;
    esac
done
need NAME --name
# The longest name made of it is that of a pod, NAME-worker-0-1234-abcde, of at most 63 letters.
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name $NAME: must be 1 to 40 of a-z, 0-9 and -"
need_program kubectl

hosts() { # of a slice, or the nodes
    if [[ $kind == gpu ]]; then
        echo "$nodes"
        return
    fi
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || die "--topology $TOPOLOGY: must be as 16x16"
    local chips=$((${TOPOLOGY//x/*}))
    ((chips % CHIPS == 0)) || die "--topology $TOPOLOGY: its $chips chips do not fill hosts of $CHIPS"
    echo $((chips / CHIPS))
}

manifest() { # WORDS of the jaxrlhf command
    local text name hosts args
    hosts=$(hosts)
    args=$("${PYTHON:-python3}" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
    declare -A values=(
        [NAME]=$NAME [IMAGE]=$IMAGE [TYPE]=$TYPE [TOPOLOGY]=$TOPOLOGY [SLICES]=$SLICES
        [HOSTS]=$hosts [CHIPS]=$CHIPS [QUEUE]=$QUEUE [CLAIM]=$CLAIM
    )
    text=$(<"$here/gke/$kind.yaml")
    [[ -n $QUEUE ]] || text=$(sed '/queue-name/d' <<<"$text")
    for name in "${!values[@]}"; do
        text=${text//"\${$name}"/"${values[$name]}"}
    done
    text=${text//"\${ARGS}"/"$args"} # last: the user's words stay as they are
    printf '%s\n' "$text"
}

case $action in
run)
    need IMAGE --image
    need TYPE --type
    [[ $kind == gpu ]] || need TOPOLOGY --topology
    for number in "$SLICES" "$CHIPS" "$nodes"; do
        [[ $number =~ ^[1-9][0-9]*$ ]] || die "$number: --slices, --nodes and --chips are whole numbers above 0"
    done
    (($#)) || die "CONFIG is missing: the path of a YAML file in the image"
    text=$(manifest train "$@")
    check_config "$@"
    warn_uncommitted 'the image has what it was built of'
    explain 'kubectl apply would create this: a JobSet, whose pods are the hosts of the run'
    if [[ -n ${DRY_RUN-} ]]; then
        printf '%s\n' "$text"
    else
        kubectl apply -f - <<<"$text"
    fi
    ;;
logs)
    explain 'follows the log of the first pod, until Ctrl-C'
    run kubectl logs --follow --tail=200 \
        "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
delete)
    explain 'ends the run and takes its pods away; what it wrote to the claim stays'
    run kubectl delete jobset "$NAME" --ignore-not-found
    ;;
esac
