#!/usr/bin/env bash
# What a container runs: the jaxrlhf command, in the environment of its kind of device.
#
#   DEVICE=cpu|gpu|tpu launch/pod.sh train CONFIG [--dotted.key value …]
#
# SIGTERM is passed on; the run saves a checkpoint and ends with 0. To Kubernetes that would mean that
# the work of this pod is done, so a pod that was stopped ends with 143 and is started again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"
[[ ${1-} != -h ]] || { usage && exit; }
need DEVICE "DEVICE (cpu, gpu or tpu)"
# shellcheck source=launch/env.sh
. "$here/env.sh" "$DEVICE"

stopped="" heard="" child=""
# shellcheck disable=SC2329 # by the trap
stop() {
    stopped=1 heard=1
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM
"${PYTHON:-python3}" -m jaxrlhf "$@" &
child=$!
[[ -z $stopped ]] || stop # it came before the child had a number
while :; do
    heard="" status=0
    wait "$child" || status=$?
    # A signal ends a wait; the next one has the child's own status, though it may be gone by now.
    [[ -n $heard ]] || break
done
[[ -z $stopped || $status != 0 ]] || status=143
exit "$status"
