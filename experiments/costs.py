"""What a step of RL costs in seconds: a model of generation, update, communication and push, for experiments.plan.

`step_seconds` gives the phases of timings.jsonl; `simulate` is the engine's scheduler. Constants are those of a
`Machine`. With constants measured on a machine at hand the phases of small models come out within 25 % there
(experiments/predict.py); those of GPUs are other people's measurements, named beside each.
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

import t1

# ----------------------------------------------------------------------------------------------------------------------
# The model, and the machine
# ----------------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Machine:
    """Constants of the seconds, each with its source. `ours`: measured on the CPU of docs/speed.md."""

    card: int = 79 * 2**30  # bytes of a GPU as torch sees an H100 of 80 GB
    usable: float = 0.9  # of the card, in the update; the rest is for CUDA, NCCL and fragmentation
    flops: float = 989e12  # H100 SXM, dense bfloat16 (data sheet)
    bandwidth: float = 3.35e12  # bytes/s of its memory (data sheet)
    product: float = (
        0.78  # of flops: matrix products alone reach 770-790 TFLOP/s on an H200, the same chip
    )
    efficiency: float = (
        0.44  # of flops, forward and backward: 0.35 Llama 8B, FSDP2, H100 of 500 W (torchtitan,
    )
    # benchmarks/llama3_h100_202412), 0.53 MPT-13B, FSDP, all recomputed (llm-foundry, benchmarking); between the two
    compiled: float = (
        1.16  # gain of torch.compile: 6,667 against 5,762 tokens/s in the same table of torchtitan
    )
    reading: float = 0.74  # of bandwidth, while decoding: 30.9 ms a token of 72.7 GB a GPU, vLLM, Qwen2.5-72B on two
    # H100 (tt-inference-server issue 143), less 160 all-reduces
    reduce_start: float = (
        9e-6  # seconds of an all-reduce of vLLM, and the bytes/s above that: 26.6 us for 1 MiB on
    )
    reduce_rate: float = 6e10  # two H100, 40.2 on four (sglang pull request 2904, rows "vllm")
    decode: float = (
        1e-3  # seconds a decode step besides (sampler, scheduler beyond what is hidden): assumed
    )
    own: float = (
        4.5 * 2**30
    )  # bytes of vLLM beside weights and cache: four (1,024, V) float32 2.3 GiB, 16,384 tokens
    # of activations 0.9, CUDA graphs about 1: computed
    requests: int = 1024  # rows an engine runs at once: vLLM's default on an H100
    node: int = 8  # GPUs of a node
    nvlink: float = 3.7e11  # bytes/s of NCCL in a node: 376 GB/s of 450 (NCCL issue 1264)
    network: float = (
        2e11  # between nodes of 8 x 400 Gb/s: all-gather over 32 of them (NCCL issue 1218)
    )
    pcie: float = 5e10  # bytes/s from and to pinned host memory: 52.8 GB/s (nvbandwidth issue 24)
    wake: float = 2.6  # seconds for an engine to fall asleep and wake: 0.8-2.6 (vLLM blog, 2025-10-26, level 2)
    tensor: float = 5e-3  # seconds a pushed tensor: 0.23 s for the 51 of a model of 4 layers on two gloo ranks, ours
    judge: float = (
        3e-6  # seconds to judge a token of a response: ours, 32 responses of 3,209 tokens
    )
    disk: float = 5e9  # bytes/s of the shared file system: assumed
    gather: float = (
        1.5e-7  # seconds to give a token with its log-prob to all ranks (pickle, gloo): ours
    )


UPDATE_BYTES = 44  # of memory that an update touches, a parameter: AdamW reads 16, writes 12, the norm 4, the anchor 12
MACHINES = {"h100": Machine(), "h200": Machine(card=139 * 2**30, bandwidth=4.8e12)}


def parameter_counts(shape: Shape) -> tuple[int, int]:
    """Parameters of one layer, and of the root: embedding, last norm, output layer."""
    D, q, kv = shape.hidden, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = (
        2 * D * q + 2 * D * kv + q + 2 * kv
    )  # products and the biases of queries, keys and values
    layer = attention + 3 * D * shape.intermediate + 2 * D  # feed-forward block and two norms
    root = shape.vocabulary * D * (1 if shape.tied else 2) + D
    return layer, root


def cache_bytes(shape: Shape) -> int:
    """Bytes of the keys and values of one token, in bfloat16."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_width


# ----------------------------------------------------------------------------------------------------------------------
# Seconds
# ----------------------------------------------------------------------------------------------------------------------


def response_lengths(
    P: int, K: int, mean: float, cut: float, longest: int, between: float = 0.5
) -> np.ndarray:
    """(P, K) lognormal lengths, cut at `longest`: of this mean, a share `cut` of them cut (both in metrics.jsonl).

    Assumed: half of the logarithms' variance lies between prompts, the other half between the samples of a prompt. Both
    normal variables take their quantiles in random order, so that another seed changes little.
    """
    rng = np.random.default_rng(0)
    z_prompt, z_sample = (
        np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]) for n in (P, K)
    )
    z = between**0.5 * rng.permutation(z_prompt)[:, None] + (1 - between) ** 0.5 * rng.permuted(
        [z_sample] * P, axis=1
    )
    edge, low, high = (
        NormalDist().inv_cdf(1 - cut),
        0.01,
        5.0,
    )  # the spread lies between low and high
    for _ in range(40):
        spread = (low + high) / 2
        lengths = np.exp(np.minimum(spread * (z - edge), 0)) * longest
        low, high = (spread, high) if lengths.mean() > mean else (low, spread)
    return np.maximum(1, np.rint(lengths)).astype(int)


@dataclass(frozen=True)
class Decode:
    """Seconds of an engine's work: of a decode step, the reading of the weights or `product` of each row, whichever is
    longer; and of each row, each cached token that a row reads, each token that is read in (prompts)."""

    step: float
    weights: float
    product: float
    row: float
    cached: float
    prefill: float


def decode_costs(shape: Shape, tp: int, machine: Machine) -> Decode:
    layer, root = parameter_counts(shape)
    used = shape.layers * layer + shape.vocabulary * shape.hidden  # parameters that a token meets
    reading, product = machine.bandwidth * machine.reading, machine.flops * machine.product
    reduces = 2 * shape.layers * (tp > 1)  # one after attention, one after the feed-forward block
    return Decode(
        step=machine.decode + reduces * machine.reduce_start,
        weights=2 * used / tp / reading,
        product=2 * used / tp / product,
        row=reduces * 2 * (tp - 1) / tp * 2 * shape.hidden / machine.reduce_rate,
        cached=cache_bytes(shape) / tp / reading,
        prefill=2 * shape.layers * layer / tp / product,
    )


def simulate(lengths, prompts, prompt: int, cache: float, requests: int, costs: Decode) -> float:
    """Seconds in which an engine writes responses of these `lengths`; `prompts`: to which prompt each belongs.

    As vLLM schedules: first come, first served, up to `requests` rows; one is admitted when what it has so far fits the
    cache of so many tokens. Where the cache is full, the last one admitted leaves it, waits until another ends and is
    read in again, in full (vLLM would find some of it still there). The `prompt` tokens of a prompt are there once for
    its samples; of the block of 16 tokens in which a row writes, half is empty.
    """
    waiting, running, done = list(range(len(lengths)))[::-1], [], np.zeros(len(lengths), int)
    there, seconds, full = Counter(), 0.0, False
    while waiting or running:
        used = done[running].sum() + 8 * len(running) + prompt * len(there)
        while waiting and not full and len(running) < requests:
            i = waiting[-1]
            new = done[i] + prompt * (prompts[i] not in there)
            if used + new + 16 > cache:
                break
            running.append(waiting.pop())
            there[prompts[i]] += 1
            seconds, used = seconds + costs.prefill * new, used + new + 8
        if not running:
            return math.inf  # not one fits
        rows, here, here_left = len(running), done[running], lengths[running] - done[running]
        steps = min(here_left.min(), int((cache - used) // rows))
        if steps < 1:
            gone, full = [running[-1]], True
            waiting.append(running[-1])
        else:
            read = steps * (here.sum() + rows * prompt) + rows * steps * (steps - 1) / 2
            each = costs.step + max(costs.weights, rows * costs.product) + rows * costs.row
            seconds += steps * each + costs.cached * read
            done[running] += steps
            gone = [i for i, left in zip(running, here_left) if left == steps]
            full = full and not gone
        there.subtract(prompts[i] for i in gone)
        there = +there
        running = [i for i in running if i not in gone]
    return seconds


def update_flop(shape: Shape, lengths, prompt: int, cfg: t1.Config) -> tuple[float, float]:
    """FLOP of the anchor's log-probs and of the gradient, for responses of these lengths after `prompt` tokens each.

    The gradient is three forward passes; attention, which flash attention computes again in its backward, 3.5. With
    checkpointing one more of each, but for the last product of a layer, whose result no backward needs; the head's
    logits are never computed again.
    """
    rows, again = lengths + prompt, 1 if cfg.checkpointing else 0
    last = 2 * shape.layers * shape.intermediate * shape.hidden * rows.sum()
    layers = 2 * shape.layers * parameter_counts(shape)[0] * rows.sum()
    attention = (
        2 * shape.layers * shape.heads * shape.head_width * (rows.astype(float) ** 2).sum()
    )  # causal: half
    head = 2 * shape.vocabulary * shape.hidden * lengths.sum()
    return layers + attention + head, (3 + again) * layers - again * last + (
        3.5 + again
    ) * attention + 3 * head


def step_seconds(
    shape, gpus: int, lengths, prompt: int, memory: dict, cfg, machine: Machine, costs=None
) -> dict:
    """Seconds of the phases of a step of RL (those of timings.jsonl), for responses of (P, K) lengths.

    Traffic of FSDP runs beside the computation of the same micro-batch, so the longer of the two counts. An engine's
    samples are those that `t1.roll_out` deals to it; the slowest engine counts. `costs`: of the engine, if measured.
    """
    (P, K), N, tp, parameters = lengths.shape, lengths.sum(), memory["tp"], memory["parameters"]
    network = machine.nvlink if gpus <= machine.node else machine.network
    traffic = parameters * (gpus - 1) / gpus / network  # seconds for a byte of each parameter
    micro = max(1, math.ceil((N + prompt * P * K) / gpus / cfg.micro_tokens))
    speed = gpus * machine.flops * machine.efficiency * (machine.compiled if cfg.compile else 1)
    anchor, gradient = update_flop(shape, lengths, prompt, cfg)
    size = 2 if cfg.dtype == "bfloat16" else 4
    parking = 4 * parameters / gpus / machine.pcie  # seconds for a shard in float32, one way
    touched = UPDATE_BYTES * parameters / gpus
    moved, copies = 4 * bool(cfg.offload), cfg.anchor != "none"

    engines, engine = gpus // tp, np.add.outer(np.arange(P), np.arange(K)) % (gpus // tp)
    costs, rollout = costs or decode_costs(shape, tp, machine), 0.0
    for number in range(engines):
        prompts = np.nonzero(engine == number)[0]
        one = simulate(
            lengths[engine == number], prompts, prompt, memory["cache"], machine.requests, costs
        )
        rollout = max(rollout, one)
    return dict(
        push=machine.wake + 2 * traffic + (12 * shape.layers + 3) * machine.tensor,
        rollout=rollout + N / gpus * machine.judge + N * machine.gather,
        anchor=copies * max(anchor / speed, micro * size * traffic)
        + copies * moved / 4 * 2 * parking,
        gradient=max(gradient / speed, micro * (2 * size + 4) * traffic),
        update=touched / (machine.bandwidth * machine.reading) + (4 + moved / 2) * parking,
    )
