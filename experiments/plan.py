"""What a run of RL on GPUs costs, before it is started: memory, seconds a step by phase, GPU-hours and days.

    python -m experiments.plan                                    the presets' models on 8, 16, 32 and 64 GPUs
    python -m experiments.plan --offload false --rl-steps 500     other options are t1.py's, on top of each preset
    python -m experiments.plan --model FOLDER --preset pretrained --gpus 1,2 --length 400
    python -m experiments.plan --lengths runs/NAME/rl             response lengths as a run had them
    python -m experiments.plan --machine h200 --set efficiency=0.35,network=1e11

The layout is that of FSDP2 as t1.py shards a model, with vLLM beside it. Computed, not measured: no number here was
read from a GPU. On one rank in float32 the memory agrees with the live tensors of a step, and its activations with what
autograd saves (test_experiments.py); how the seconds are checked: experiments/costs.py. `save` is what a checkpoint
takes, dealt to the steps; the evaluation comes on top.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import transformers

import data_prep
import experiments
import t1
from experiments.costs import (
    MACHINES,
    Machine,
    Shape,
    cache_bytes,
    parameter_counts,
    response_lengths,
    step_seconds,
)

SHAPES = {
    "zai-org/glm-4-9b-hf": Shape(4096, 40, 13696, 32, 2, 128, 151552, False),
    "Qwen/Qwen2.5-14B": Shape(5120, 48, 13824, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B": Shape(5120, 64, 27648, 40, 8, 128, 152064, False),
}


def shape_of(config) -> Shape:
    """The Shape of a Hugging Face model's config; AttributeError where it is of another family."""
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def memory_plan(
    shape: Shape, gpus: int, micro_tokens: int, cfg: t1.Config, machine: Machine | None = None
) -> dict:
    """Bytes on each device for one step of RL; `parameters` is their number, over all devices.

    `weights`, `optimizer` (AdamW's state) and `anchor`: float32 shards over all ranks (`t1.shard`). During the gradient
    besides: `gradients`; `gathered`, the layers at hand and the root in cfg.dtype; and the greatest of three moments:
    the head works on its chunks (`activations` kept, `head_gradient`, `head_chunks`); the last layer runs `backward`
    while the head's gradient waits; the root's gradient is summed over ranks. `update` is the peak of anchor, gradient
    and AdamW. micro_tokens: of a micro-batch, which has at least one row.

    With a `machine` the devices are GPUs with vLLM: AdamW's state lies in CPU memory but for its step, the engine gets
    `share` of the card during the rollout, `cache` is the room for keys and values in tokens, of one engine, `tp` the
    ranks that share it, and `rollout` the peak of that phase. The engine's memory is free during the update.
    """
    layer, root = parameter_counts(shape)
    parameters, sharded = shape.layers * layer + root, gpus > 1
    size = 2 if cfg.dtype == "bfloat16" else 4  # bytes of an activation
    share = 4 * parameters / gpus
    plan = dict(parameters=parameters, weights=share, gradients=share, optimizer=2 * share)
    plan["anchor"] = 0 if cfg.anchor == "none" else share
    if sharded:
        plan["gathered"] = size * (2 * layer + root) + (size + 4) * layer
    else:
        plan["gathered"] = 2 * parameters if cfg.dtype == "bfloat16" else 0  # autocast's copies
    plan |= activation_plan(shape, micro_tokens, size, machine, cfg)

    output_layer = shape.vocabulary * shape.hidden
    waiting = (size if sharded else 4) * output_layer
    at_the_head = plan["activations"] + plan["head_gradient"] + plan["head_chunks"]
    in_the_last_layer = plan["activations"] + waiting + plan["backward"]
    summing_the_root = (size + 4) * root if sharded else 2 * 4 * output_layer
    gradient = (
        plan["gradients"] + plan["gathered"] + max(at_the_head, in_the_last_layer, summing_the_root)
    )
    parked = machine is not None or cfg.offload
    optimizer, anchor = (0 if parked else plan["optimizer"]), (0 if cfg.offload else plan["anchor"])
    adamw = plan["gradients"] + plan["optimizer"] + anchor
    plan["update"] = plan["weights"] + max(gradient + optimizer + anchor, adamw)
    if machine is None:
        return plan

    held, card = plan["weights"] + anchor, machine.card
    gathered = (
        4 * (2 * layer + root) if sharded else 2 * parameters
    )  # by the check of a push, as t1.engine_layout
    tp = cfg.vllm_tp or t1.engine_ranks(2 * parameters, card, min(gpus, machine.node))
    plan |= dict(tp=tp, share=cfg.vllm_memory or t1.engine_share(card, int(held), gathered))
    room = plan["share"] * card - 2 * parameters / tp - machine.own
    plan["cache"] = room * min(tp, shape.kv_heads) / cache_bytes(shape)
    plan["rollout"] = held + gathered + plan["share"] * card
    return plan


def activation_plan(
    shape: Shape, n: int, size: int, machine: Machine | None, cfg: t1.Config
) -> dict[str, float]:
    """Bytes that autograd keeps of `n` packed tokens (`activations`), and what head and backward take besides.

    With checkpointing each layer's input is kept, and one layer's inside is made again in its backward.
    """
    D, q, kv = shape.hidden, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * D * (4 + 2 * size)  # computed in float32, kept in the type of the run
    inside = n * (norms + size * (3 * q + 2 * kv + 4 * shape.intermediate) + 4 * shape.heads)
    last_norm = n * D * (4 + size)
    rotary = 12 * n * shape.head_width
    per_layer = n * size * D if cfg.checkpointing else inside
    chunk = min(t1.head_chunk(shape.vocabulary, "cuda" if machine else "cpu"), n)
    return dict(
        activations=shape.layers * per_layer + last_norm + rotary,
        head_gradient=4 * shape.vocabulary * D,
        head_chunks=(3 if machine else 2) * 4 * shape.vocabulary * chunk + 2 * size * n * D,
        backward=2 * size * n * shape.intermediate
        + 4 * D * shape.intermediate
        + (inside - last_norm + n * size * D if cfg.checkpointing else 0),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

MEMORY = ("weights", "optimizer", "anchor", "gathered", "activations", "update", "rollout")
PHASES = ("push", "rollout", "anchor", "gradient", "update")


def lengths_for(own, cfg: t1.Config) -> np.ndarray:
    """(P, K) response lengths: as the options say, or as the last steps of the run in own.lengths had them."""
    longest, mean, cut = cfg.max_new, own.length or 25 / 64 * cfg.max_new, own.overlong
    if own.lengths:
        folder = Path(own.lengths)
        rows = data_prep.read_log(folder / "metrics.jsonl")[-20:]
        if not rows or "overlong" not in rows[0]:
            raise t1.Misuse(f"--lengths {folder}: no metrics.jsonl of stage rl there")
        mean, cut = (float(np.mean([row[name] for row in rows])) for name in ("length", "overlong"))
        longest = data_prep.read_json(folder / "config.json")["config"]["max_new"]
    if not 1 <= mean < longest:
        raise t1.Misuse(f"--length {mean:g}: must be at least 1 and below --max-new {longest}")
    return np.minimum(response_lengths(cfg.prompts, cfg.k, mean, cut, longest), cfg.max_new)


def rows_of(shape: Shape, own, cfg: t1.Config, machine: Machine) -> tuple[list[str], list[str]]:
    """For each number of GPUs a row of the table of memory, and one of the table of seconds."""
    lengths, longest, memories, seconds = (
        lengths_for(own, cfg),
        cfg.max_prompt + cfg.max_new,
        [],
        [],
    )
    for gpus in own.gpus:
        plan = memory_plan(shape, gpus, max(cfg.micro_tokens, longest), cfg, machine)
        fits = plan["update"] <= machine.usable * machine.card and plan["cache"] >= longest
        cells = "".join(f"{plan[name] / 2**30:12.1f}" for name in MEMORY)
        engine = f"{plan['tp']:4} {plan['share']:6.2f} {max(0, plan['cache']):10,.0f}"
        memories.append(f"{gpus:5}{cells}{engine}  {'yes' if fits else 'no'}")
        if plan["cache"] < longest:
            continue
        phases = step_seconds(shape, gpus, lengths, own.prompt, plan, cfg, machine)
        step, saving = (
            sum(phases.values()),
            18 * plan["parameters"] / machine.disk / cfg.rl_save_every,
        )
        hours = (step + saving) * cfg.rl_steps / 3600
        cells = "".join(f"{phases[name]:10.1f}" for name in PHASES)
        whole = f"{saving:8.1f}{cfg.rl_steps:8}{gpus * hours:11,.0f}{hours / 24:7.1f}"
        seconds.append(f"{gpus:5}{lengths.mean():8,.0f}{cells}{step:9.0f}{whole}")
    return memories, seconds


def shape_for(cfg: t1.Config) -> tuple[str, Shape]:
    """Name and Shape of the folder cfg.model, or of the preset's model."""
    model = cfg.model or t1.PRESETS[cfg.preset].get("model", "")
    if not cfg.model and model in SHAPES:
        return Path(model).name, SHAPES[model]
    try:
        return Path(model).name, shape_of(
            transformers.AutoConfig.from_pretrained(model, local_files_only=True)
        )
    except (OSError, ValueError, AttributeError) as e:
        reason = str(e).splitlines()[0]
        raise t1.Misuse(
            f"--model {model}: no config.json of a causal LM that can be planned for ({reason})"
        )


def run_plan(own, configs: list[t1.Config], machine: Machine):
    """Print both tables for the model of each Config."""
    first, memory, seconds = configs[0], [], []
    for name, shape, cfg in [(*shape_for(cfg), cfg) for cfg in configs]:
        for lines, rows in zip((memory, seconds), rows_of(shape, own, cfg, machine)):
            lines += [f"{name[:14]:14}{row}" for row in rows]
    switches = ("checkpointing", "compile", "offload")
    on = [name for name in switches if getattr(first, name)]
    t1.print0(
        ", ".join(
            [first.dtype, *on, f"anchor {first.anchor}", f"micro-batches of {first.micro_tokens:,}"]
        )
    )
    t1.print0(
        "GiB per GPU, computed; `cache` in tokens of an engine of `tp` GPUs. The update fits where"
    )
    t1.print0(
        f"{machine.usable:.0%} of {machine.card / 2**30:.0f} GiB is enough: the rest is for CUDA and NCCL."
    )
    t1.print0(
        f"{'model':14} GPUs"
        + "".join(f"{name:>12}" for name in MEMORY)
        + "  tp  share      cache  fits"
    )
    t1.print0("\n".join(memory))
    t1.print0(
        f"\nSeconds a step of {first.prompts} x {first.k} responses of so many `tokens` in the mean, computed."
    )
    phases = "".join(f"{phase:>10}" for phase in PHASES)
    t1.print0(f"{'model':14} GPUs  tokens{phases}     step    save   steps  GPU-hours   days")
    t1.print0("\n".join(seconds))


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def constants(text: str) -> dict[str, float]:
    """Type of --set: efficiency=0.4,pcie=2e10 -> fields of Machine."""
    values = dict(part.partition("=")[::2] for part in text.split(","))
    types = {field.name: field.type for field in dataclasses.fields(Machine)}
    try:
        return {name: types[name](float(value)) for name, value in values.items()}
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give name=number, names are {', '.join(types)}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("plan", __doc__)
    add, numbers = parser.add_argument, experiments.whole_numbers
    add(
        "--gpus",
        type=numbers,
        default=[8, 16, 32, 64],
        metavar="LIST",
        help="numbers of GPUs (default: 8,16,32,64)",
    )
    add(
        "--length",
        type=float,
        default=0,
        help="mean response, tokens (default: 25/64 of --max-new, 3,200 of 8,192)",
    )
    add(
        "--overlong",
        type=float,
        default=0.05,
        help="share of responses that reach --max-new (default: %(default)s)",
    )
    add(
        "--lengths",
        default="",
        metavar="FOLDER",
        help="take both from the last 20 steps of this runs/NAME/rl",
    )
    add("--prompt", type=int, default=200, help="mean prompt, tokens (default: %(default)s)")
    add(
        "--vllm-tp",
        type=int,
        default=0,
        help="GPUs that share an engine (default: 0, as t1.engine_ranks says)",
    )
    add(
        "--machine",
        choices=MACHINES,
        default="h100",
        help="constants to begin with (default: %(default)s)",
    )
    add(
        "--set",
        type=constants,
        default={},
        metavar="NAME=VALUE,...",
        help="other constants, see costs.Machine",
    )
    return experiments.run(parser, plan_command, argv)


def plan_command(own, options: list[str]):
    if min(own.gpus) < 1 or own.vllm_tp < 0 or any(gpus % (own.vllm_tp or 1) for gpus in own.gpus):
        raise t1.Misuse("--gpus must be above 0, and multiples of --vllm-tp")
    if not 0 < own.overlong < 1:
        raise t1.Misuse("--overlong must be between 0 and 1")
    presets = [name for name, values in t1.PRESETS.items() if values.get("model") in SHAPES]
    if any(option.partition("=")[0] in ("--preset", "--model") for option in options):
        presets = ["qwen2.5-14b"]  # below the one that is given
    configs = [t1.parse_args(["--preset", name, *options, "--stage", "rl"]) for name in presets]
    configs = [dataclasses.replace(cfg, vllm_tp=own.vllm_tp) for cfg in configs]
    run_plan(own, configs, dataclasses.replace(MACHINES[own.machine], **own.set))


if __name__ == "__main__":
    sys.exit(main())
