# shellcheck shell=bash
# What every Slurm job of this project does. slurm/*.sbatch source this file, and `ramoe run --launcher slurm` copies it
# into its scripts. Each variable below may be set before sbatch. The allocation has one task per node, in which torchrun
# starts the ranks of that node.

: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}" # where the ranks meet: the first node
: "${MASTER_PORT:=$((10000 + SLURM_JOB_ID % 10000 * 2))}"                         # of this job alone, and the one after it
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"                                            # Megatron's need with TP or CP before Blackwell
: "${NCCL_DEBUG:=WARN}"                                                          # NCCL says what is wrong, and no more
: "${MAX_REQUEUES:=50}"                                                          # after so many restarts a job ends instead
: "${CONTAINER_IMAGE:=}"                                                         # pyxis/enroot: image; empty is no container
: "${CONTAINER_MOUNTS:=}"                                                        # HOST:INSIDE,HOST:INSIDE
unset NODE_RANK GROUP_RANK                                                       # of a torchrun that sbatch was called in
export MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG

ramoe_need() { # NAME...: refuse settings that have no default and were not given
    local name missing=()
    for name in "$@"; do if [[ -z ${!name-} ]]; then missing+=("$name"); fi; done
    if ((${#missing[@]})); then
        echo "ramoe: error: not set: ${missing[*]}; give each in the environment of sbatch, as the script's first lines show" >&2
        exit 2
    fi
}

ramoe_absolute() { # NAME...: paths that hold in a container too
    local name
    for name in "$@"; do printf -v "$name" '%s' "$(realpath -m -- "${!name}")"; done
}

ramoe_print() { # NAME...: each setting as NAME=value
    local name
    for name in "$@" MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG MAX_REQUEUES CONTAINER_IMAGE CONTAINER_MOUNTS; do
        printf 'ramoe: %s=%s\n' "$name" "${!name-}"
    done
    echo "ramoe: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
}

ramoe_on_nodes() { # COMMAND...: once on each node; a node that fails takes the others along
    # --export: a site may have set sbatch's to NONE; --ntasks: whatever number of tasks the allocation was asked with
    local words=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1)
    # since 22.05 srun does not take this over from sbatch, and would leave torchrun one core
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then words+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    if [[ -n $CONTAINER_IMAGE ]]; then words+=(--container-image="$CONTAINER_IMAGE"); fi
    if [[ -n $CONTAINER_MOUNTS ]]; then words+=(--container-mounts="$CONTAINER_MOUNTS"); fi
    "${words[@]}" "$@"
}

ramoe_run() { # COMMAND...: on each node; status 75 is a stop before the time limit, and the job goes back into the queue
    local status=0
    ramoe_on_nodes "$@" || status=$?
    if ((status == 75)); then
        if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
            echo "ramoe: unfinished after $MAX_REQUEUES restarts (MAX_REQUEUES): submit it again to go on" >&2
        elif scontrol requeue "$SLURM_JOB_ID"; then
            echo "ramoe: unfinished: job $SLURM_JOB_ID goes back into the queue and will go on where it stopped"
            sleep 60 # Slurm ends this script; its own end would end the job
        fi
    fi
    return "$status"
}
