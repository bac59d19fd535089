#!/usr/bin/env bash
# One node, all of its GPUs, one process.
#
#   launch/gpu.sh CONFIG [--dotted.key value …]
#   CUDA_VISIBLE_DEVICES=0,1 launch/gpu.sh configs/grpo_smollm2.yaml --mesh.fsdp 2 --mesh.data 1
#
# With --dry-run, wherever it stands on the line, it prints the command and does not run it.
# Needs jaxrlhf with its extra cuda13 (or cuda12) under PYTHON (python3), and the NVIDIA driver.
# A run that was stopped goes on when the same command is given again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

take_dry_run "$@"
set -- "${WORDS[@]}"
case ${1-} in
-h | --help) usage && exit ;;
"" | -*) die "CONFIG, the path of a YAML file, comes first (-h explains)" ;;
esac
# shellcheck source=launch/env.sh
. "$here/env.sh" gpu
[[ -n ${DRY_RUN-} ]] || (($(jaxrlhf_gpus))) || die "no GPU: nvidia-smi lists none, or CUDA_VISIBLE_DEVICES is empty"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
explain "one process on the GPUs of this node (CUDA_VISIBLE_DEVICES leaves some out)"
run exec "${PYTHON:-python3}" -m jaxrlhf train "$@"
