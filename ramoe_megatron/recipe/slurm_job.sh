# shellcheck shell=bash
# What every Slurm job of this project does. slurm/*.sbatch source this file, and
# `ramoe run --launcher slurm` copies it into its scripts. Each variable below may be set before sbatch.
# The allocation has one task per node, in which torchrun starts the ranks of that node.

# Where the ranks meet: the first node, at a port of this job. The job also uses the port after it.
: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
: "${MASTER_PORT:=$((10000 + SLURM_JOB_ID % 10000 * 2))}"
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" # Megatron needs it for TP or CP on GPUs before Blackwell
: "${NCCL_DEBUG:=WARN}"               # NCCL prints only warnings and errors
: "${MAX_REQUEUES:=50}"               # after this many restarts a job ends instead
: "${CONTAINER_IMAGE:=}"              # image for pyxis/enroot; empty: no container
: "${CONTAINER_MOUNTS:=}"             # HOST:INSIDE,HOST:INSIDE
unset NODE_RANK GROUP_RANK            # set by a torchrun in which sbatch was called
export MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG

ramoe_need() { # NAME...: end with an error when a setting without a default is not given
    local name missing=()
    for name in "$@"; do if [[ -z ${!name-} ]]; then missing+=("$name"); fi; done
    if ((${#missing[@]})); then
        echo "ramoe: error: not set: ${missing[*]}; set each in the environment of sbatch," \
            "as the first lines of the script show" >&2
        exit 2
    fi
}

ramoe_absolute() { # NAME...: make paths absolute, so that they are the same in a container
    local name
    for name in "$@"; do printf -v "$name" '%s' "$(realpath -m -- "${!name}")"; done
}

ramoe_print() { # NAME...: print each setting as NAME=value
    local name
    for name in "$@" MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG MAX_REQUEUES \
        CONTAINER_IMAGE CONTAINER_MOUNTS; do
        printf 'ramoe: %s=%s\n' "$name" "${!name-}"
    done
    echo "ramoe: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
}

ramoe_on_nodes() { # COMMAND...: run it once on each node; 30 s after one node ends, the others are ended
    # --export: a site may have set sbatch's to NONE. --ntasks: the allocation may have another number.
    local words=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    # Not --kill-on-bad-exit: it kills a node that ends with 75 a second after the others.
    words+=(--kill-on-bad-exit=0 --wait=30)
    # Since 22.05 srun does not take this value from sbatch, and would leave torchrun one core.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then words+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    if [[ -n $CONTAINER_IMAGE ]]; then words+=(--container-image="$CONTAINER_IMAGE"); fi
    if [[ -n $CONTAINER_MOUNTS ]]; then words+=(--container-mounts="$CONTAINER_MOUNTS"); fi
    "${words[@]}" "$@"
}

ramoe_run() { # COMMAND...: run it on each node. Status 75, a stop before the time limit, requeues the job
    local status=0
    ramoe_on_nodes "$@" || status=$?
    if ((status == 75)); then
        if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
            echo "ramoe: unfinished after $MAX_REQUEUES restarts (MAX_REQUEUES): submit it again" >&2
        elif scontrol requeue "$SLURM_JOB_ID"; then
            echo "ramoe: unfinished: job $SLURM_JOB_ID returns to the queue and resumes where it stopped"
            sleep 60 # until Slurm ends this script; if the script ended first, the job would end
        fi
    fi
    return "$status"
}
