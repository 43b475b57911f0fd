"""What a run on GPUs costs, before it is started: memory per GPU, computed from the shape of the model.

    python -m experiments.plan --vllm-tp 4                          the presets' models
    python -m experiments.plan --model FOLDER --gpus 1,2 --contexts 4096

Other options are t1.py's, on top of the preset qwen2.5-14b (--preset for another): --dtype, --checkpointing,
--offload-anchor, ... The layout is that of FSDP2 as t1.py shards a model. Computed, not measured: no number here was
read from a GPU. On one rank in float32 the plan agrees with the live tensors of a step, and its activations with what
autograd saves (test_experiments.py).
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import transformers

import experiments
import t1


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of the Llama family."""

    hidden: int  # D
    layers: int
    intermediate: int  # width of the feed-forward block
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int  # V
    tied: bool  # is the output layer the embedding?


SHAPES = {
    "glm-4-9b-hf": Shape(4096, 40, 13696, 32, 2, 128, 151552, False),
    "Qwen2.5-14B": Shape(5120, 48, 13824, 40, 8, 128, 152064, False),
    "Qwen2.5-32B": Shape(5120, 64, 27648, 40, 8, 128, 152064, False),
}
VLLM_ROWS = 8  # rows of full context for which the plan gives vLLM's cache room
CARDS = (80, 141)  # GB: H100, H200
USABLE = 0.9  # of a card's memory; the rest is for the CUDA context, NCCL and fragmentation


def shape_of(config) -> Shape:
    """The Shape of a Hugging Face model's config; AttributeError where it is of another family."""
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def parameter_counts(shape: Shape) -> tuple[int, int]:
    """Parameters of one layer, and of the root: embedding, last norm, output layer."""
    D, q, kv = shape.hidden, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * D * q + 2 * D * kv + q + 2 * kv  # products and the biases of queries, keys and values
    layer = attention + 3 * D * shape.intermediate + 2 * D  # feed-forward block and two norms
    root = shape.vocabulary * D * (1 if shape.tied else 2) + D
    return layer, root


def memory_plan(shape: Shape, gpus: int, context: int, micro_tokens: int, cfg: t1.Config) -> dict[str, float]:
    """Bytes on each device for one step of RL; `parameters` is their number, over all devices.

    Held throughout: `weights`, `optimizer` (AdamW) and `anchor`, float32 shards over all ranks (`t1.shard`). During the
    update besides: `gradients`; `gathered`, the layers at hand and the root in cfg.dtype; and the greatest of three
    moments: the head works on its chunks (`activations` kept, `head_gradient`, `head_chunks`); the last layer runs
    `backward` while the head's gradient waits; the root's gradient is summed over ranks. `update` and `rollout` are the
    peaks of the two phases; vLLM sleeps during the update. `context`: tokens of the longest row; a micro-batch has
    `micro_tokens`, but at least one row.
    """
    layer, root = parameter_counts(shape)
    parameters, n, sharded = shape.layers * layer + root, max(context, micro_tokens), gpus > 1
    size = 2 if cfg.dtype == "bfloat16" else 4  # bytes of an activation
    share = 4 * parameters / gpus
    policy = 0 if cfg.offload_optimizer and sharded else share
    plan = dict(parameters=parameters, weights=policy, gradients=policy, optimizer=2 * policy)
    plan["anchor"] = 0 if cfg.anchor == "none" or (cfg.offload_anchor and sharded) else share
    if sharded:
        plan["gathered"] = size * (2 * layer + root) + (size + 4) * layer
    else:
        plan["gathered"] = 2 * parameters if cfg.dtype == "bfloat16" else 0  # autocast's copies
    plan |= activation_plan(shape, n, size, sharded, cfg)

    output_layer = shape.vocabulary * shape.hidden
    waiting = (size if sharded else 4) * output_layer
    at_the_head = plan["activations"] + plan["head_gradient"] + plan["head_chunks"]
    in_the_last_layer = plan["activations"] + waiting + plan["backward"]
    summing_the_root = (size + 4) * root if sharded else 2 * 4 * output_layer
    held = plan["weights"] + plan["optimizer"] + plan["anchor"]
    plan["update"] = held + plan["gradients"] + plan["gathered"] + max(at_the_head, in_the_last_layer, summing_the_root)

    kv_width = shape.kv_heads * shape.head_width
    cache = VLLM_ROWS * context * shape.layers * 2 * kv_width * 2  # keys and values in bfloat16
    plan["vllm"] = 2 * parameters / cfg.vllm_tp + cache / min(cfg.vllm_tp, shape.kv_heads)
    plan["rollout"] = held + plan["vllm"]
    return plan


def activation_plan(shape: Shape, n: int, size: int, sharded: bool, cfg: t1.Config) -> dict[str, float]:
    """Bytes that autograd keeps of `n` packed tokens (`activations`), and what head and backward take besides.

    With checkpointing each layer's input is kept, and one layer's inside is made again in its backward.
    """
    D, q, kv = shape.hidden, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * D * (4 + 2 * size)  # computed in float32, kept in the type of the run
    inside = n * (norms + size * (3 * q + 2 * kv + 4 * shape.intermediate) + 4 * shape.heads)
    last_norm = n * D * (4 + size)
    rotary = 12 * n * shape.head_width
    per_layer = n * size * D if cfg.checkpointing else inside
    chunk = min(t1.head_chunk(shape.vocabulary, "cuda" if sharded else cfg.device or "cpu"), n)
    return dict(
        activations=shape.layers * per_layer + last_norm + rotary,
        head_gradient=4 * shape.vocabulary * D,
        head_chunks=2 * 4 * shape.vocabulary * chunk + 2 * size * n * D,
        backward=2 * size * n * shape.intermediate
        + 4 * D * shape.intermediate
        + (inside - last_norm + n * size * D if cfg.checkpointing else 0),
    )


COLUMNS = ("weights", "optimizer", "anchor", "gathered", "activations", "update", "vllm", "rollout")


def table_of(shapes: dict[str, Shape], gpus: list[int], contexts: list[int], cfg: t1.Config) -> list[str]:
    """Lines of the table, GiB per GPU: model x GPUs x context x micro-batch (one row, and cfg.micro_tokens)."""
    lines = [
        f"{'model':14} {'GPUs':>4} {'context':>8} {'micro':>7} " + " ".join(f"{c:>11}" for c in COLUMNS) + "  fits"
    ]
    for name, shape in shapes.items():
        for count in gpus:
            for context in contexts:
                for micro in dict.fromkeys((context, max(context, cfg.micro_tokens))):
                    plan = memory_plan(shape, count, context, micro, cfg)
                    need = max(plan["update"], plan["rollout"])
                    fits = next((f"{card} GB" for card in CARDS if need <= USABLE * 1e9 * card), "no")
                    cells = " ".join(f"{plan[c] / 2**30:11.1f}" for c in COLUMNS)
                    lines.append(f"{Path(name).name:14} {count:4} {context:8,} {micro:7,} {cells}  {fits}")
    return lines


def run_plan(gpus: list[int], contexts: list[int], cfg: t1.Config):
    """Print the plan of the presets' models, or of the folder cfg.model."""
    shapes = SHAPES
    if cfg.model:
        try:
            shapes = {cfg.model: shape_of(transformers.AutoConfig.from_pretrained(cfg.model, local_files_only=True))}
        except (OSError, ValueError, AttributeError) as e:
            reason = str(e).splitlines()[0]
            raise t1.Misuse(f"--model {cfg.model}: no config.json of a causal LM that can be planned for ({reason})")
    switches = [
        f"{name} {'on' if getattr(cfg, name) else 'off'}"
        for name in ("checkpointing", "offload_optimizer", "offload_anchor")
    ]
    t1.print0(", ".join([cfg.dtype, *switches, f"anchor {cfg.anchor}", f"vllm_tp {cfg.vllm_tp}"]))
    t1.print0(f"GiB per GPU, computed. `rollout` has vLLM's weights and a cache of {VLLM_ROWS} rows of full context.")
    t1.print0(f"A card fits where {USABLE:.0%} of it is enough: the rest is for CUDA, NCCL and fragmentation.")
    for line in table_of(shapes, gpus, contexts or [4096, cfg.max_prompt + cfg.max_new, 32768], cfg):
        t1.print0(line)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("plan", __doc__)
    add, numbers = parser.add_argument, experiments.whole_numbers
    add("--gpus", type=numbers, default=[8, 16, 32, 64], metavar="LIST", help="numbers of GPUs (default: 8,16,32,64)")
    default = "(default: 4096, --max-prompt + --max-new, 32768)"
    add("--contexts", type=numbers, default=[], metavar="LIST", help=f"prompt and response, tokens {default}")
    add("--vllm-tp", type=int, default=1, help="ranks that share one vLLM engine (default: %(default)s)")
    return experiments.run(parser, plan_command, argv)


def plan_command(own, options: list[str]):
    if min(own.vllm_tp, *own.gpus, *own.contexts) < 1:
        raise t1.Misuse("--gpus, --contexts and --vllm-tp must be above 0")
    cfg = t1.parse_args(["--preset", "qwen2.5-14b", *options, "--stage", "rl"])
    run_plan(own.gpus, own.contexts, dataclasses.replace(cfg, vllm_tp=own.vllm_tp))


if __name__ == "__main__":
    sys.exit(main())
