# shellcheck shell=bash
# The environment of a run, for one kind of device:   . launch/env.sh cpu|gpu|tpu
#
# Sets flags of XLA and libtpu (those the installed versions know; flags.py), the share of GPU memory
# and the folder of compiled programs. A flag or variable that is set already stays as it is.
# PYTHON is the interpreter of the run (python3).

jaxrlhf_add_flags() { # VARIABLE xla|libtpu FLAG… : appends the known ones that are not there yet
    local variable=$1 kind=$2 flag kept here wanted=()
    shift 2
    for flag in "$@"; do
        [[ " ${!variable-}" == *" ${flag%%=*}"[=\ ]* || " ${!variable-}" == *" ${flag%%=*}" ]] || wanted+=("$flag")
    done
    ((${#wanted[@]})) || return 0
    here=$(dirname "${BASH_SOURCE[0]}")
    kept=$("${PYTHON:-python3}" "$here/flags.py" "$kind" "${wanted[@]}") || return 1
    [[ -z $kept ]] || export "$variable=${!variable:+${!variable} }$kept"
}

jaxrlhf_gpus() { # how many GPUs this process may use
    local all
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        all=${CUDA_VISIBLE_DEVICES//[!,]/}
        echo $((${#CUDA_VISIBLE_DEVICES} ? ${#all} + 1 : 0))
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

jaxrlhf_env() {
    case ${1-} in
    cpu)
        export JAX_PLATFORMS=cpu
        ;;
    gpu)
        export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.9}
        # Overlapping communication costs memory, and there is none to overlap on a single GPU.
        if (($(jaxrlhf_gpus) > 1 || ${SLURM_NTASKS:-${JAX_NUM_PROCESSES:-1}} > 1)); then
            jaxrlhf_add_flags XLA_FLAGS xla --xla_gpu_enable_latency_hiding_scheduler=true || return 1
        fi
        ;;
    tpu)
        # Of the last flag: else a product with a weight that is split over many chips becomes a loop
        # over the pieces, which reads and writes its result once for each.
        jaxrlhf_add_flags LIBTPU_INIT_ARGS libtpu \
            --xla_tpu_enable_async_collective_fusion=true \
            --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
            --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
            --xla_tpu_overlap_compute_collective_tc=true \
            --xla_enable_async_all_gather=true \
            --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 || return 1
        ;;
    *)
        echo "usage: . launch/env.sh cpu|gpu|tpu" >&2
        return 2
        ;;
    esac
}

jaxrlhf_env "$@"
