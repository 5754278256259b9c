# shellcheck shell=bash
# OLMoE-1B-7B (0924). Source it: GPUS=16 source examples/models/olmoe-1b-7b.sh
#
# Sets MODEL_ARGS (the architecture) and, by GPUS (8, 16 or 64, of 80 GB), PARALLEL_ARGS. TOKENIZER: a folder
# or hub name in place of the default; SEQ_LENGTH: 4096 unless set. Checked against Megatron's parser and
# validation, never run on GPUs.
#
# Published: 6.9B parameters, 1.3B active; 16 layers, 64 experts, top-8, no shared expert.
#
# `ramoe convert` writes the checkpoint with a note, by which our jobs give the model its norm over all
# queries and all keys (docs/models.md). The scale of the load-balancing loss differs. Megatron's is, a layer,
# 1/8 (top-k) of that in transformers, and is summed over the 16 layers where transformers takes their mean:
# the same coefficient is 2 times as strong here.
#
# Memory, by `python -m benchmarks.model_memory`, whose text says what is counted. Weights: with gradients and
# optimizer. Megatron's activations know no experts and no recompute; ours do, with evenly loaded experts.
# Leave 10 GB for NCCL, CUDA and uneven experts.
# memory table
#  GB per GPU      | Megatron's estimate            | ours
#  GPUs  EP  DP    | weights  activations  total    | weights  activations  total
#     8   8   8    |    18.1          5.3   23.3    |    18.1         15.8   33.9
#    16   8  16    |    12.9          5.3   18.1    |    12.9         15.8   28.7
#    64   8  64    |     9.0          5.3   14.2    |     9.0         15.8   24.8
# end of memory table
# shellcheck disable=SC2034 # the arrays are read by the script that sources this file

MODEL_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-allenai/OLMoE-1B-7B-0924}"
    --padded-vocab-size 50304
    --num-layers 16
    --hidden-size 2048
    --num-attention-heads 16 # each with its own key and value
    --kv-channels 128
    --qk-layernorm # over the whole projection, see above
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --position-embedding-type rope
    --rotary-base 10000
    --max-position-embeddings 4096
    --attention-dropout 0 # Megatron's default is 0.1
    --hidden-dropout 0
    --ffn-hidden-size 1024
    --moe-ffn-hidden-size 1024
    --num-experts 64
    --moe-router-topk 8
    --moe-router-score-function softmax
    --moe-router-pre-softmax # over all 64, and the chosen 8 are not renormalised (norm_topk_prob: false)
    --moe-router-dtype fp32  # small differences decide who is in the top-k
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01 # router_aux_loss_coef; on another scale, see above
)

# Layout. Tensor parallel size 1: expert parallelism splits what is large. A flag given after these counts in
# their place; with a tensor parallel size above 1 add --sequence-parallel, and set
# CUDA_DEVICE_MAX_CONNECTIONS=1.
case "${GPUS:-}" in
    8) # no recompute: everything fits
        expert_parallel=8
        memory_args=()
        ;;
    16) # dispatch stays inside a node of 8
        expert_parallel=8
        memory_args=()
        ;;
    64) # the same
        expert_parallel=8
        memory_args=()
        ;;
    *)
        echo "olmoe-1b-7b.sh: GPUS='${GPUS:-}': expected 8, 16 or 64 (GPUS=16 source olmoe-1b-7b.sh)" >&2
        return 1
        ;;
esac
PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --expert-model-parallel-size "$expert_parallel"
    --expert-tensor-parallel-size 1 # whole experts: their matrices are too small to cut
    --use-distributed-optimizer
    --bf16
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --seq-length "${SEQ_LENGTH:-4096}"
    --micro-batch-size 1
    "${memory_args[@]}"
)
unset expert_parallel memory_args
