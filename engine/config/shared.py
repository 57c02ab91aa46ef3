"""Configuration sections that several commands have, and help texts of keys that several sections have."""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import config_class, key

# Help texts of keys that several sections have.
INPUT_KEY = "column of the prompt, if its name is not recognised (a dot selects a field of an object)"
PROMPT_TRUNCATION = (
    "for a prompt that leaves no room for the answer: raise an error, drop it, or truncate its beginning"
)
TOKEN_BUDGET = (
    "largest micro-batch, without padding (replaces TRL's per_device_train_batch_size; verl: "
    "ppo_max_token_len_per_gpu with use_dynamic_bsz)"
)
SHARING = "what is trained: all weights (full), or low-rank adapters on frozen weights (lora)"
MAX_BATCH = (
    "sequences decoded at a time on each data-parallel rank (TRL: local_rollout_forward_batch_size; verl: "
    "rollout.max_num_seqs)"
)


@config_class
class OptimizerConfig:
    """AdamW with a warm-up and a decay, by Megatron's distributed optimizer."""

    lr: float = key(1e-5, "peak learning rate", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = key(
        "linear", "decay after the warm-up, to min_lr_fraction * lr"
    )
    min_lr_fraction: float = key(0.0, "learning rate at the end, as a fraction of the peak", ge=0, le=1)
    warmup_fraction: float = key(0.0, "linear warm-up, as a fraction of all steps", ge=0, lt=1)
    beta1: float = key(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "Adam's decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "Adam's epsilon; a larger value damps early updates", gt=0)
    weight_decay: float = key(0.0, "decoupled weight decay, not applied to norms and biases", ge=0)
    clip_grad: float = key(1.0, "largest global norm of the gradient; 0: no clipping", ge=0)
    on_host: bool = key(False, "keep Adam's moments and fp32 master weights in host memory, and take the steps there")


@config_class
class SamplingConfig:
    """Sampling of answers. top_k and top_p are for `generate` and `sample`; PPO refuses them."""

    temperature: float = key(1.0, "divides the logits in fp32; 0: greedy", ge=0)
    top_k: int = key(0, "sample from the k most probable tokens; 0: from all", ge=0)
    top_p: float = key(1.0, "sample from the smallest set of tokens with this probability", gt=0, le=1)
    min_p: float = key(
        0.0, "sample from the tokens with at least this share of the largest probability; 0: from all", ge=0, le=1
    )
    max_new_tokens: int = key(256, "longest answer", unit="tokens", ge=1)
    min_new_tokens: int = key(0, "no stop token is sampled before this many tokens", unit="tokens", ge=0)
    stop: list[str] = key([], "texts that end an answer; the token that completes one is its last")
    stop_token_ids: list[int] = key(
        [], "further token ids that end an answer, besides the tokenizer's EOS and the EOS ids of the model"
    )


@config_class
class RolloutConfig:
    """The rollout engine: continuous batching over a paged KV cache."""

    kv_memory: float | str = key(
        0.9,
        "memory of the KV cache: up to 1 a share of the free memory, above 1 bytes, or a text such as 20GiB; requests "
        "that need less take less (vLLM: gpu_memory_utilization)",
    )
    block_size: int = key(16, "tokens of a block of the cache, a power of two", unit="tokens", ge=1)
    token_budget: int = key(
        2048,
        "most rows of a step; longer prompts are computed in parts beside the decoding sequences (vLLM: "
        "max_num_batched_tokens)",
        unit="tokens",
        ge=1,
    )
    order: Literal["first_come", "longest_remaining"] = key("first_come", "which waiting request starts first")
    reuse_prefixes: bool = key(True, "requests reuse cached blocks with the same tokens (vLLM: enable_prefix_caching)")
    cuda_graphs: bool = key(True, "capture decode steps as CUDA graphs, one for each size of the batch")


@config_class
class DataSource:
    """One file and its weight in the blend."""

    path: str = key("", "JSONL or Parquet file; docs/data.md lists the recognised columns")
    input_key: str = key("", INPUT_KEY)
    output_key: str = key("", "column of the answer, or of the answers to rank, if its name is not recognised")
    weight: float = key(1.0, "uses of each row per epoch (1: once; 0.5: in every other epoch; 2: twice)", gt=0)


@config_class
class ParallelConfig:
    """Parallelism of one model. The data-parallel size is the number of ranks / (tensor x pipeline)."""

    tensor: int = key(1, "tensor-parallel size: ranks over which heads, MLP columns and vocabulary are sharded", ge=1)
    sequence_parallel: bool = key(
        False, "shard the tokens between layers over the tensor-parallel ranks: less activation memory, same traffic"
    )
    pipeline: int = key(1, "pipeline-parallel size: ranks with consecutive layers", ge=1)
    virtual_pipeline: int = key(
        1, "interleaved stages per pipeline rank: a smaller bubble, more messages; needs pipeline above 1", ge=1
    )
    pipeline_split: list[int] = key([], "layers of each stage in the order of the forward pass; empty: even")


@config_class
class LoRAConfig:
    """Low-rank adapters: a projection's product x W^T becomes x W^T + alpha / rank * (x A^T) B^T; A and B train."""

    rank: int = key(16, "rank of the adapters (peft: r; verl: lora_rank)", ge=1)
    alpha: float = key(32.0, "the adapters' products are multiplied by alpha / rank (peft, verl: lora_alpha)", gt=0)
    target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "projections of attention and MLP that get an adapter, by their Hugging Face names (peft, verl: "
        "target_modules)",
    )
    use_rslora: bool = key(False, "multiply by alpha / sqrt(rank) instead (peft: use_rslora)")


@config_class
class ProfileConfig:
    """A profile of some steps by PyTorch's profiler, in `<run.dir>/profile`."""

    steps: int = key(0, "steps to profile (PPO: iterations); 0: none", ge=0)
    skip: int = key(1, "first steps of this process that are not profiled: they allocate and warm up", ge=0)
    ranks: list[int] = key([0], "ranks to profile; empty: all")
    memory: bool = key(True, "record allocations, too; on a GPU a snapshot is written for pytorch.org/memory_viz")
    with_stack: bool = key(False, "record the Python call stack of each operator: slower, and a larger trace")


@config_class
class RunConfig:
    """Settings that all training commands share."""

    dir: str = key(
        "", "folder of the run: metrics, checkpoints, exported model; must be empty unless resume or overwrite is set"
    )
    resume: Literal[False, True, "auto"] = key(
        False,
        "resume from the last complete checkpoint in dir; auto: start from the beginning if there is none (a restart "
        "by torchrun --max-restarts uses auto)",
    )
    overwrite: bool = key(
        False,
        "replace an earlier run in dir: its files are removed when the new run has begun, other files in dir stay; "
        "not with resume=true (with resume=auto: only a run without a checkpoint is replaced)",
    )
    checkpoint_in_background: Literal[False, True, "auto"] = key(
        "auto", "copy the state to host memory and train while it is written; auto: on a GPU only"
    )
    seed: int = key(0, "seed of all random numbers", ge=0)
    dtype: Literal["fp32", "bf16"] = key("fp32", "parameters and activations (bf16 keeps fp32 master weights)")
    log_to: list[str] = key([], "loggers besides metrics.jsonl and TensorBoard: wandb, mlflow")
    recompute: Literal["none", "selective", "full"] = key(
        "none", "activations recomputed in the backward pass: none, attention (selective), or complete layers (full)"
    )
