#!/usr/bin/env bash
# Several processes on this machine, each with several fake CPU devices, joined by gloo over loopback.
#
#   launch/local.sh [-n PROCESSES] [-d DEVICES] [-p PORT] COMMAND…
#   launch/local.sh -n 2 -d 4 train configs/sft_tiny.yaml --mesh.fsdp 8 --mesh.data 1
#   launch/local.sh -n 2 -d 2 -- python my_script.py
#
#   -n PROCESSES   how many (2)
#   -d DEVICES     fake devices of each (1)
#   -p PORT        of process 0 (a free one)
#   COMMAND        words of the jaxrlhf command; after --, any other command
#   --dry-run      among them, or before: print what each process would run
#
# Each line of output starts with the number of its process. When one process fails the others get
# SIGTERM, and SIGKILL after GRACE_SECONDS (10); the exit status is that of the first that failed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

[[ " $* " == *" -- "* ]] || {
    take_dry_run "$@"
    set -- "${WORDS[@]}"
}
processes=2 devices=1 port=
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    -n) value_of "$1" $# && processes=$2 && shift 2 ;;
    -d) value_of "$1" $# && devices=$2 && shift 2 ;;
    -p) value_of "$1" $# && port=$2 && shift 2 ;;
    -*) break ;;
    *) break ;;
    esac
done
python=${PYTHON:-python3}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "-n $processes: must be a whole number above 0"
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "-d $devices: must be a whole number above 0"
(($#)) || die "COMMAND is missing: words of the jaxrlhf command, such as: train CONFIG (-h explains)"
if [[ $1 == -- ]]; then
    shift
    (($#)) || die "a command must follow --"
    command=("$@")
elif [[ $1 == -* ]]; then
    die "$1: unknown option (-h lists them)"
else
    command=("$python" -m jaxrlhf "$@")
fi
if [[ -z $port ]]; then
    port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# shellcheck source=launch/env.sh
. "$here/env.sh" cpu
flags=" ${XLA_FLAGS-} "
flags=$(sed -E 's/ --xla_force_host_platform_device_count=[0-9]+//g' <<<"$flags")
export XLA_FLAGS="${flags# }--xla_force_host_platform_device_count=$devices"
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes

if [[ -n ${DRY_RUN-} ]]; then
    for ((i = 0; i < processes; i++)); do
        explain "process $i of $processes, with $devices fake devices"
        run env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$processes" \
            "JAX_PROCESS_ID=$i" "XLA_FLAGS=$XLA_FLAGS" "${command[@]}"
    done
    exit
fi

pids=()
asked=
stop() { # SIGNAL to those that are still there
    kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'asked=1; stop TERM' TERM INT
for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
done
[[ -z $asked ]] || stop TERM # it came while they were being started

status=0
killer=
left=$processes
while ((left)); do
    code=0
    ended=
    wait -n -p ended "${pids[@]}" || code=$?
    # A signal ends a wait; the next one has who has ended, and how, though it may be gone by now.
    [[ -n ${ended-} ]] || continue
    left=$((left - 1))
    for i in "${!pids[@]}"; do
        [[ ${pids[i]} != "$ended" ]] || unset "pids[i]"
    done
    if ((code && !status)); then
        status=$code
        if ((left)); then
            stop TERM
            (
                sleep "${GRACE_SECONDS:-10}" &
                trap 'kill $!' TERM
                wait $! && stop KILL
            ) >/dev/null 2>&1 &
            killer=$!
        fi
    fi
done
[[ -z $killer ]] || kill "$killer" 2>/dev/null || true
exit "$status"
