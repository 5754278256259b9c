# shellcheck shell=bash
# Phi-3.5-MoE (instruct). Source it: GPUS=16 source examples/models/phi-3.5-moe.sh
#
# Sets MODEL_ARGS (the architecture) and, by GPUS (8, 16 or 64, of 80 GB), PARALLEL_ARGS. TOKENIZER: a folder
# or hub name in place of the default; SEQ_LENGTH: 4096 unless set. Checked against Megatron's parser and
# validation, never run on GPUs.
#
# Published: 41.9B parameters, 6.6B active; 32 layers, 16 experts, top-2, no shared expert.
#
# `ramoe convert` writes the checkpoint with a note, by which our jobs give the model its SparseMixer router,
# the biases of the attention's output and of the output layer, and LongRoPE up to 4096 tokens
# (docs/models.md). In training, the published code samples the experts and jitters their input; here training
# is deterministic.
#
# Memory, by `python -m benchmarks.model_memory`, whose text says what is counted. Weights: with gradients and
# optimizer. Megatron's activations know no experts and no recompute; ours do, with evenly loaded experts.
# Leave 10 GB for NCCL, CUDA and uneven experts. Megatron's weights for 8 GPUs count the optimizer, which
# these flags put on the host.
# memory table
#  GB per GPU      | Megatron's estimate            | ours
#  GPUs  EP  DP    | weights  activations  total    | weights  activations  total
#     8   8   8    |   102.7         19.5  122.1    |    39.8          3.2   43.1
#    16  16  16    |    56.1         19.5   75.6    |    56.1          3.2   59.4
#    64   8  64    |    47.7         19.5   67.2    |    47.7          3.2   50.9
# end of memory table
# shellcheck disable=SC2034 # the arrays are read by the script that sources this file

MODEL_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-microsoft/Phi-3.5-MoE-instruct}"
    --padded-vocab-size 32064
    --num-layers 32
    --hidden-size 4096
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --normalization LayerNorm # with bias, unlike the other three
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --untie-embeddings-and-output-weights
    --position-embedding-type rope
    --rotary-base 10000
    --max-position-embeddings 131072 # the published sliding window is as long: no window
    --attention-dropout 0            # Megatron's default is 0.1
    --hidden-dropout 0
    --ffn-hidden-size 6400
    --moe-ffn-hidden-size 6400
    --num-experts 16
    --moe-router-topk 2
    --moe-router-score-function softmax # of which SparseMixer takes two weights, see above
    --moe-router-dtype fp32             # small differences decide who is in the top-k
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0 # router_aux_loss_coef of the published configuration
)

# Layout. Tensor parallel size 1: expert parallelism splits what is large. A flag given after these counts in
# their place; with a tensor parallel size above 1 add --sequence-parallel, and set
# CUDA_DEVICE_MAX_CONNECTIONS=1.
case "${GPUS:-}" in
    8) # fits only with the optimizer on the host: about 670 GB of host memory a node
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 # only layers' inputs are kept
            --optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d)
        ;;
    16) # one expert a GPU
        expert_parallel=16
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    64) # dispatch stays inside a node of 8; eight replicas share the optimizer's state
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    *)
        echo "phi-3.5-moe.sh: GPUS='${GPUS:-}': expected 8, 16 or 64 (GPUS=16 source phi-3.5-moe.sh)" >&2
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
