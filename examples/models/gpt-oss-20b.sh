# shellcheck shell=bash
# gpt-oss-20b. Source it: GPUS=16 source examples/models/gpt-oss-20b.sh
#
# Sets MODEL_ARGS (the architecture) and, by GPUS (8, 16 or 64, of 80 GB), PARALLEL_ARGS. TOKENIZER: a folder
# or hub name in place of the default; SEQ_LENGTH: 4096 unless set. Checked against Megatron's parser and
# validation, never run on GPUs.
#
# Published: 20.9B parameters, 3.6B active; 24 layers, 32 experts, top-4, no shared expert.
#
# `ramoe convert` reads the published MXFP4 experts, writes them in bfloat16, and these flags beside them.
# Attention sinks (--softmax-type learnable) need transformer-engine 2.8 or later on GPUs; it picks the
# kernel.
#
# Memory, by `python -m benchmarks.model_memory`, whose text says what is counted. Weights: with gradients and
# optimizer. Megatron's activations know no experts and no recompute; ours do, with evenly loaded experts.
# Leave 10 GB for NCCL, CUDA and uneven experts. Megatron's weights have two thirds of each expert: it does
# not know that --quick-geglu has a gate.
# memory table
#  GB per GPU      | Megatron's estimate            | ours
#  GPUs  EP  DP    | weights  activations  total    | weights  activations  total
#     8   8   8    |    42.1         11.9   54.0    |    56.5          9.7   66.2
#    16   8  16    |    31.2         11.9   43.1    |    40.8          9.7   50.5
#    64   8  64    |    23.1         11.9   34.9    |    29.0         29.1   58.1
# end of memory table
# shellcheck disable=SC2034 # the arrays are read by the script that sources this file

MODEL_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-openai/gpt-oss-20b}"
    --padded-vocab-size 201088 # rows of the published embedding; the tokenizer has fewer entries
    --num-layers 24
    --hidden-size 2880
    --num-attention-heads 64
    --group-query-attention
    --num-query-groups 8
    --kv-channels 64 # not hidden / heads, which is 45
    --softmax-type learnable # attention sinks: one learned logit a head in the softmax's denominator
    --window-size "127,0"      # keys to the left beside the token itself: its window of 128 counts the token
    --window-attn-skip-freq 2 # every second layer sees everything, the first does not
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --quick-geglu                   # gate * sigmoid(1.702 gate) ...
    --glu-linear-offset 1           # ... * (up + 1), biases in all linear layers, the router's too
    --activation-func-clamp-value 7 # swiglu_limit
    --no-bias-gelu-fusion           # the fused activation clamps before it adds the bias
    --untie-embeddings-and-output-weights
    --position-embedding-type yarn
    --rotary-base 150000
    --rotary-scaling-factor 32
    --yarn-original-max-position-embeddings 4096
    --yarn-beta-fast 32
    --yarn-beta-slow 1
    --no-yarn-correction-range-round-to-int # truncate: false
    --no-rope-fusion # YaRN scales the cosines (mscale 1.35), which the fused kernel does not
    --max-position-embeddings 131072
    --attention-dropout 0 # Megatron's default is 0.1
    --hidden-dropout 0
    --ffn-hidden-size 2880
    --moe-ffn-hidden-size 2880
    --num-experts 32
    --moe-router-topk 4
    --moe-router-score-function softmax # over the chosen 4
    --expert-tensor-parallel-size 1     # Megatron does not split experts with biases
    --moe-router-dtype fp32             # small differences decide who is in the top-k
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0 # the published 0.9 is not in use (output_router_logits is off)
)

# Layout. Tensor parallel size 1: expert parallelism splits what is large. A flag given after these counts in
# their place; with a tensor parallel size above 1 add --sequence-parallel, and set
# CUDA_DEVICE_MAX_CONNECTIONS=1.
case "${GPUS:-}" in
    8) # the optimizer's state takes most of it: nothing of a layer but its input is kept
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    16) # dispatch stays inside a node of 8
        expert_parallel=8
        memory_args=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
        ;;
    64) # eight replicas share the optimizer's state: room for all activations
        expert_parallel=8
        memory_args=()
        ;;
    *)
        echo "gpt-oss-20b.sh: GPUS='${GPUS:-}': expected 8, 16 or 64 (GPUS=16 source gpt-oss-20b.sh)" >&2
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
