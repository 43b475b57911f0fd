"""What a step of RL on GPUs costs, before it is started: memory, seconds, GPU-hours and days.

    python -m experiments.plan                          the presets' models on 8, 16, 32 and 64 GPUs
    python -m experiments.plan --model FOLDER --preset pretrained --gpus 1,2 --offload false
    python -m experiments.plan --set card=1.49e11,bandwidth=4.8e12    an H200; else t1.py's options

Computed for FSDP2 with vLLM beside it; no number comes from a GPU of ours: docs/cluster.md says
what is checked. BEST and WORST say what moves a step. Evaluation and checkpoints come on top."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

import experiments
import t1


@dataclass(frozen=True)
class Shape:  # the sizes of a model of the Llama family
    hidden: int  # D
    layers: int
    intermediate: int  # width of the feed-forward block
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int  # V
    tied: bool  # is the output layer the embedding?


SHAPES = {
    "zai-org/glm-4-9b-hf": Shape(4096, 40, 13696, 32, 2, 128, 151552, False),
    "Qwen/Qwen2.5-14B": Shape(5120, 48, 13824, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B": Shape(5120, 64, 27648, 40, 8, 128, 152064, False),
}


@dataclass(frozen=True)
class Machine:  # constants, each with its source
    card: float = 79 * 2**30  # bytes that torch sees of an H100 of 80 GB
    flops: float = 989e12  # H100 SXM, dense bfloat16 (data sheet)
    bandwidth: float = 3.35e12  # bytes/s of its memory (data sheet)
    product: float = 0.78  # share of flops of matrix products alone (770-790 TFLOP/s, H200)
    # Share of flops in log-probs and gradient. Published: 0.35 (torchtitan, Llama 8B), 0.53
    efficiency: float = 0.40  # (llm-foundry, MPT 13B); 0.40 is nearest to NVIDIA's two steps
    # Share of bandwidth while decoding: Qwen2.5-72B on two H100 takes 30.9 ms a token with vLLM
    reading: float = 0.74  # (tt-inference-server issue 143), less 160 all-reduces
    reduce_start: float = 9e-6  # seconds of an all-reduce of vLLM (sglang pull request 2904)
    reduce_rate: float = 6e10  # its bytes/s (the same)
    decode: float = 3e-3  # seconds of a decode step besides: sampler, scheduler (assumed)
    engine: float = 4.5 * 2**30  # bytes of vLLM beside weights and cache (computed)
    nvlink: float = 3.7e11  # bytes/s of NCCL in a node (NCCL issue 1264)
    network: float = 2e11  # bytes/s between nodes of 8 x 400 Gb/s (NCCL issue 1218)
    push: float = 6  # seconds to wake the engine, push 600 tensors and sleep (vLLM blog; ours)
    pcie: float = 5e10  # bytes/s from and to pinned host memory (nvbandwidth issue 24)
    spread: float = 0.25  # variance of lengths, of the most that mean and limit allow (assumed)


BEST = dict(efficiency=0.50, reading=0.85, spread=0.15)
WORST = dict(efficiency=0.32, reading=0.55, spread=0.40)
NODE = 8  # GPUs
PHASES = ("push", "rollout", "anchor", "gradient", "update")


def shape_of(config) -> Shape:
    """The Shape of a Hugging Face model's config; AttributeError where it is of another family."""
    heads = config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def parameter_counts(shape: Shape) -> tuple[int, int]:
    """Parameters of one layer, and of the root: embedding, last norm, output layer."""
    D, q, kv = shape.hidden, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * D * q + 2 * D * kv + q + 2 * kv  # products; biases of queries, keys, values
    layer = attention + 3 * D * shape.intermediate + 2 * D  # feed-forward block and two norms
    return layer, shape.vocabulary * D * (1 if shape.tied else 2) + D


def memory_plan(shape: Shape, gpus: int, micro_tokens: int, cfg, machine=None) -> dict:
    """Bytes on each device for a step of RL; `parameters` is their number, over all devices.
    Weights, AdamW's state and anchor are float32 shards. The gradient needs one, `gathered` (the
    layers at hand and the root) and the greatest of three moments: the head works on chunks; the
    last layer runs backward while the head's gradient waits; the root's gradient is summed.
    `update` is the peak of it all. With a `machine` there is vLLM: AdamW's state lies in CPU memory
    but for its step, an engine of `tp` ranks has `share` of each card, room for `cache` tokens."""
    layer, root = parameter_counts(shape)
    parameters, sharded = shape.layers * layer + root, gpus > 1
    size = 2 if cfg.dtype == "bfloat16" else 4  # bytes of an activation
    held = 4 * parameters / gpus
    plan = dict(parameters=parameters, weights=held, gradients=held, anchor=held)
    plan["optimizer"] = 2 * held
    plan["cached"] = 4 * shape.layers * shape.kv_heads * shape.head_width  # of a token, bfloat16
    plan["gathered"] = 2 * parameters if size == 2 else 0  # one rank: autocast's copies
    if sharded:
        plan["gathered"] = size * (2 * layer + root) + (size + 4) * layer
    plan |= activation_plan(shape, micro_tokens, size, machine, cfg)
    output_layer = shape.vocabulary * shape.hidden
    waiting = (size if sharded else 4) * output_layer
    moments = [
        plan["activations"] + plan["head_gradient"] + plan["head_chunks"],
        plan["activations"] + waiting + plan["backward"],
        (size + 4) * root if sharded else 2 * 4 * output_layer,
    ]
    optimizer = 0 if machine or cfg.offload else plan["optimizer"]
    anchor = 0 if cfg.offload else plan["anchor"]
    gradient = plan["gradients"] + plan["gathered"] + max(moments) + optimizer + anchor
    adamw = plan["gradients"] + plan["optimizer"] + anchor
    plan["update"] = plan["weights"] + max(gradient, adamw)
    if machine is None:
        return plan
    # the engine, as t1.engine_layout makes it; the check of a push gathers float32 layers
    gathered = 4 * (2 * layer + root) if sharded else 2 * parameters
    tp = cfg.vllm_tp or t1.engine_ranks(2 * parameters, machine.card, min(gpus, NODE))
    share = cfg.vllm_memory or t1.engine_share(machine.card, plan["weights"] + anchor, gathered)
    room = share * machine.card - 2 * parameters / tp - machine.engine
    cache = room * min(tp, shape.kv_heads) / plan["cached"]
    return plan | dict(tp=tp, share=share, cache=cache)


def activation_plan(shape: Shape, n: int, size: int, machine, cfg) -> dict[str, float]:
    """Bytes that autograd keeps of `n` packed tokens, and what head and backward take besides."""
    D, wide = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * D * (4 + 2 * size)  # computed in float32, kept in the type of the run
    inside = n * (norms + size * (3 * q + 2 * kv + 4 * wide) + 4 * shape.heads)
    last_norm = n * D * (4 + size)
    rotary = 12 * n * shape.head_width
    per_layer = n * size * D if cfg.checkpointing else inside  # its input, or all
    again = inside - last_norm + n * size * D if cfg.checkpointing else 0  # one layer, made again
    chunk = t1.head_chunk(shape.vocabulary, "cuda" if machine else "cpu")
    positions = min(chunk, n) * (3 if machine else 2)
    if 3 * n <= chunk and not cfg.tis_cap:
        positions = 6 * n  # the plain form
    return dict(
        activations=shape.layers * per_layer + last_norm + rotary,
        head_gradient=4 * shape.vocabulary * D,
        head_chunks=4 * shape.vocabulary * positions + 2 * size * n * D,
        backward=2 * size * n * wide + 4 * D * wide + again,
    )


def update_flop(shape: Shape, rows: int, length: float, prompt: float, cfg, variance: float = 0):
    """-> FLOP of the anchor's log-probs, and of the gradient: three forwards, of attention 3.5
    (flash attention computes it again). Checkpointing adds one of each, but for the last product of
    a layer, whose result no backward needs; compiled layers do that one, too."""
    tokens = rows * (length + prompt)
    again = 1 if cfg.checkpointing else 0
    last = 0 if cfg.compile else 2 * shape.layers * shape.intermediate * shape.hidden * tokens
    layers = 2 * shape.layers * parameter_counts(shape)[0] * tokens
    width = shape.layers * shape.heads * shape.head_width
    attention = 2 * width * rows * ((length + prompt) ** 2 + variance)  # causal: half
    head = 2 * shape.vocabulary * shape.hidden * rows * length
    gradient = (3 + again) * layers - again * last + (3.5 + again) * attention + 3 * head
    return layers + attention + head, gradient


def rollout_seconds(shape, memory, n, length, prompt, longest, variance, machine) -> float:
    """Seconds in which one engine writes n responses. As many rows run at once as fit the cache;
    others wait for a place; the last that gets one may be the longest: longest + (n - fit) / fit *
    length decode steps. A step reads the weights, or multiplies them by its rows where that is
    longer; each row reads its cached tokens."""
    tp, layer = memory["tp"], parameter_counts(shape)[0]
    used = 2 * (shape.layers * layer + shape.vocabulary * shape.hidden) / tp  # bytes; FLOP a token
    reading = machine.bandwidth * machine.reading
    reduces = 2 * shape.layers if tp > 1 else 0  # one after attention, one after the feed-forward
    reduced = 2 * (tp - 1) / tp * 2 * shape.hidden  # bytes of each row
    written = (length**2 + variance) / 2 / length  # tokens of a row that runs, on average
    fit = min(n, memory["cache"] / (written + prompt))
    steps = longest + (n - fit) / fit * length
    weights = max(steps * used / reading, n * length * used / machine.flops / machine.product)
    cached = n * length * (written + prompt) * memory["cached"] / tp / reading
    rows = n * length * reduces * reduced / machine.reduce_rate
    steps *= machine.decode + reduces * machine.reduce_start
    return steps + weights + cached + rows


def step_seconds(shape, gpus: int, length: float, prompt: float, memory, cfg, machine) -> dict:
    """Seconds of each of PHASES, as in timings.jsonl, for responses of this mean length. Traffic
    of FSDP runs beside the computation of the same micro-batch: the longer of the two counts."""
    n, parameters = cfg.prompts * cfg.k, memory["parameters"]
    network = machine.nvlink if gpus <= NODE else machine.network
    traffic = parameters * (gpus - 1) / gpus / network  # seconds for a byte of each parameter
    micro = max(1, math.ceil(n * (length + prompt) / gpus / cfg.micro_tokens))
    speed = gpus * machine.flops * machine.efficiency
    variance = machine.spread * length * (cfg.max_new - length)
    anchor, gradient = update_flop(shape, n, length, prompt, cfg, variance)
    size = 2 if cfg.dtype == "bfloat16" else 4
    shard = 4 * parameters / gpus / machine.pcie  # seconds to move a float32 shard, one way
    moved = 2 * shard if cfg.offload else 0
    row = length, prompt, cfg.max_new, variance
    return dict(
        push=machine.push + 2 * traffic,
        rollout=rollout_seconds(shape, memory, n * memory["tp"] / gpus, *row, machine),
        anchor=max(anchor / speed, micro * size * traffic) + moved,
        gradient=max(gradient / speed, micro * (2 * size + 4) * traffic),
        update=4 * shard + moved,
    )


def print_table(name: str, shape: Shape, own, cfg, machine: Machine):
    """A row for each number of GPUs: memory in GiB, seconds of a step, and what a run takes."""
    length, longest = own.length or 25 / 64 * cfg.max_new, cfg.max_prompt + cfg.max_new
    if not 1 <= length < cfg.max_new:
        raise t1.Misuse(f"--length {length:g}: at least 1 and below --max-new {cfg.max_new}")
    t1.print0(f"\n{name}: {cfg.prompts} x {cfg.k} responses of {length:,.0f} tokens")
    phases = "".join(f"{phase:>9}" for phase in PHASES)
    t1.print0(f" GPUs    GiB share tp      cache fits{phases}    step        range GPU-hours  days")
    for gpus in own.gpus:
        plan = memory_plan(shape, gpus, max(cfg.micro_tokens, longest), cfg, machine)
        fits = plan["update"] <= 0.9 * machine.card and plan["cache"] >= longest
        row = f"{gpus:5}{plan['update'] / 2**30:7.1f}{plan['share']:6.2f}{plan['tp']:3}"
        row += f"{max(0, plan['cache']):11,.0f}{'  yes' if fits else '   no'}"
        if plan["cache"] >= longest:
            machines = [replace(machine, **changed) for changed in ({}, BEST, WORST)]
            job = shape, gpus, length, own.prompt, plan, cfg
            steps = [step_seconds(*job, at) for at in machines]
            step, low, high = (sum(phases.values()) for phases in steps)
            hours = step * cfg.rl_steps / 3600
            row += "".join(f"{steps[0][phase]:9.1f}" for phase in PHASES)
            ends = f"{low:,.0f}-{high:,.0f}"
            row += f"{step:8,.0f}{ends:>13}{gpus * hours:10,.0f}{hours / 24:6.1f}"
        t1.print0(row)


def shape_for(cfg) -> tuple[str, Shape]:
    """Name and Shape of the folder cfg.model, or of the preset's model."""
    model = cfg.model or t1.PRESETS[cfg.preset].get("model", "")
    if not cfg.model and model in SHAPES:
        return Path(model).name, SHAPES[model]
    try:
        config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
        shape = shape_of(config)
        with torch.device("meta"):  # takes no memory
            found = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
        if not 0.99 < memory_plan(shape, 1, 1, cfg)["parameters"] / found < 1.01:
            raise ValueError(f"{found:,} parameters are not those of Llama's layers: experts?")
        return Path(model).name, shape
    except Exception as e:  # whatever the library raises of a damaged config.json
        raise t1.Misuse(f"--model {model}: no such causal LM ({t1.reason_of(e)})")


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("plan", __doc__)
    add = parser.add_argument
    add("--gpus", type=experiments.whole_numbers, default=[8, 16, 32, 64], help="how many")
    add("--length", type=float, default=0, help="mean response (default: 25/64 of --max-new)")
    add("--prompt", type=int, default=200, help="mean prompt, tokens (default: %(default)s)")
    add("--set", default="", help="NAME=VALUE,... of plan.Machine (default: none)")
    own, options = parser.parse_known_args(argv)
    pairs = [part.split("=") for part in own.set.split(",") if part]
    try:
        machine = replace(Machine(), **{name: float(value) for name, value in pairs})
    except (TypeError, ValueError):
        raise t1.Misuse(f"--set {own.set}: NAME=NUMBER, names are {', '.join(vars(Machine()))}")
    if min(own.gpus) < 1:
        raise t1.Misuse("--gpus must be above 0")
    presets = [name for name, values in t1.PRESETS.items() if values.get("model") in SHAPES]
    if any(option.partition("=")[0] in ("--preset", "--model") for option in options):
        presets = ["qwen2.5-14b"]  # below the one that is given
    for preset in presets:
        cfg = t1.parse_args(["--preset", preset, *options, "--stage", "rl"])
        print_table(*shape_for(cfg), own, cfg, machine)
    moved = "; ".join(f"{name} {WORST[name]} to {BEST[name]}" for name in BEST)
    t1.print0(f"\nThe range: {moved}. GiB: of the update; it fits in 0.9 of a card.")


if __name__ == "__main__":
    raise SystemExit(main())
