#!/usr/bin/env bash
# A workload of xpk, on a cluster that `xpk cluster create` has made.
#
#   launch/xpk.sh --cluster CLUSTER --name NAME --type TYPE --image IMAGE [--slices N]
#       [--project PROJECT] [--zone ZONE] [--dry-run] CONFIG [--dotted.key value …]
#   launch/xpk.sh --cluster prod --name ppo-1 --type v5litepod-256 \
#       --image REGISTRY/jaxrlhf:tpu configs/ppo_smollm2_sentiment.yaml --output /runs/ppo-1
#
# IMAGE is built by launch/Dockerfile. xpk is a tool of its own: install it apart from jaxrlhf, whose
# versions it would change. CLUSTER, NAME, TYPE and IMAGE may also be variables.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

take_dry_run "$@"
set -- "${WORDS[@]}"
CLUSTER=${CLUSTER-} NAME=${NAME-} TYPE=${TYPE-} IMAGE=${IMAGE-} slices=1 place=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --cluster) value_of "$1" $# && CLUSTER=$2 && shift 2 ;;
    --name) value_of "$1" $# && NAME=$2 && shift 2 ;;
    --type) value_of "$1" $# && TYPE=$2 && shift 2 ;;
    --image) value_of "$1" $# && IMAGE=$2 && shift 2 ;;
    --slices) value_of "$1" $# && slices=$2 && shift 2 ;;
    --project | --zone) value_of "$1" $# && place+=("$1=$2") && shift 2 ;;
    -*) die "$1: unknown option (-h lists them)" ;;
    *) break ;;
    esac
done
need CLUSTER --cluster
need NAME --name
need TYPE --type
need IMAGE --image
(($#)) || die "CONFIG is missing: the path of a YAML file in the image"
need_program xpk
check_config "$@"
warn_uncommitted 'the image has what it was built of'
explain 'a workload: xpk makes it a JobSet of the cluster'
run xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$TYPE" \
    "--num-slices=$slices" "--docker-image=$IMAGE" "${place[@]}" \
    "--command=. launch/env.sh tpu && python -m jaxrlhf train $(quoted "$@")"
