#!/usr/bin/env bash
# On a host of a TPU slice: what tpu_vm.sh and tpu_gce.sh ask it to do, in the folder above this one.
#
#   launch/remote.sh install                            a virtual environment with jaxrlhf[tpu,gcs]
#   launch/remote.sh start CONFIG [--dotted.key value …]   train in the background, into run.log
#   launch/remote.sh stop                               SIGTERM: the run saves a checkpoint and ends
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"
cd "$here/.."

running() {
    [[ -s run.pid ]] && kill -0 "$(<run.pid)" 2>/dev/null
}

install() {
    local python
    python=$(command -v python3.12 || command -v python3.11) || {
        sudo apt-get -qq update
        sudo apt-get -qq install -y python3.11 python3.11-venv
        python=$(command -v python3.11)
    }
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu,gcs]'
}

start() {
    ! running || die "$(hostname): a run is in progress (pid $(<run.pid)): stop it first"
    export PYTHON=$PWD/.venv/bin/python
    [[ -x $PYTHON ]] || die "$(hostname): not installed: launch/remote.sh install"
    # shellcheck source=launch/env.sh
    . "$here/env.sh" tpu
    nohup setsid "$PYTHON" -m jaxrlhf train "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    echo "$(hostname): started, pid $(<run.pid)"
}

case ${1-} in
-h | --help) usage ;;
install) install ;;
start)
    shift
    (($#)) || die "start: CONFIG is missing"
    start "$@"
    ;;
stop)
    if running; then
        kill -TERM "$(<run.pid)"
    fi
    ;;
*) die "${1-}: unknown (install, start or stop)" ;;
esac
