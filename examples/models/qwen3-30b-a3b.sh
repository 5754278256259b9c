# shellcheck shell=bash
# Qwen3-30B-A3B. Source it: GPUS=16 source examples/models/qwen3-30b-a3b.sh
#
# Sets MODEL_ARGS (the architecture) and, by GPUS (8, 16 or 64, of 80 GB), PARALLEL_ARGS. TOKENIZER: a folder
# or hub name in place of the default; SEQ_LENGTH: 4096 unless set. Checked against Megatron's parser and
# validation, never run on GPUs.
#
# Published: 30.5B parameters, 3.3B active; 48 layers, 128 experts, top-8, no shared expert.
#
# The scale of the load-balancing loss differs. Megatron's is, a layer, 1/8 (top-k) of that in transformers,
# and is summed over the 48 layers where transformers takes their mean: the same coefficient is 6 times as
# strong here.
#
# Memory, by `python -m benchmarks.model_memory`, whose text says what is counted. Weights: with gradients and
# optimizer. Megatron's activations know no experts and no recompute; ours do, with evenly loaded experts.
# Leave 10 GB for NCCL, CUDA and uneven experts. Megatron's weights for 8 GPUs count the optimizer, which
# these flags put on the host.
# memory table
#  GB per GPU      | Megatron's estimate            | ours
#  GPUs  EP  DP    | weights  activations  total    | weights  activations  total
#     8   8   8    |    76.8         15.7   92.5    |    31.0          7.9   38.9
#    16  16  16    |    43.0         15.7   58.7    |    43.0          7.9   50.9
#    64   8  64    |    36.7         15.7   52.4    |    36.7          7.9   44.6
# end of memory table
# shellcheck disable=SC2034 # the arrays are read by the script that sources this file

MODEL_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-Qwen/Qwen3-30B-A3B}"
    --padded-vocab-size 151936 # rows of the published embedding; the tokenizer has fewer entries
    --num-layers 48
    --hidden-size 2048
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128 # not hidden / heads, which is 64
    --qk-layernorm    # RMS norm of each head's query and key
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --position-embedding-type rope
    --rotary-base 1000000
    --max-position-embeddings 40960
    --attention-dropout 0 # Megatron's default is 0.1
    --hidden-dropout 0
    --ffn-hidden-size 6144 # of dense layers; the model has none
    --moe-ffn-hidden-size 768
    --num-experts 128
    --moe-router-topk 8
    --moe-router-score-function softmax # over the chosen 8 (norm_topk_prob)
    --moe-router-dtype fp32             # small differences decide who is in the top-k
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.001 # router_aux_loss_coef; on another scale, see above
)

# Layout. Tensor parallel size 1: expert parallelism splits what is large. A flag given after these counts in
# their place; with a tensor parallel size above 1 add --sequence-parallel, and set
# CUDA_DEVICE_MAX_CONNECTIONS=1.
case "${GPUS:-}" in
    8) # fits only with the optimizer on the host: about 490 GB of host memory a node
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 # only layers' inputs are kept
            --optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d)
        ;;
    16) # as few experts a GPU as two nodes give
        expert_parallel=16
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    64) # dispatch stays inside a node of 8; eight replicas share the optimizer's state
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    *)
        echo "qwen3-30b-a3b.sh: GPUS='${GPUS:-}': expected 8, 16 or 64 (GPUS=16 source qwen3-30b-a3b.sh)" >&2
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
