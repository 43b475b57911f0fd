"""T1: advancing language model reasoning through reinforcement learning and inference scaling (arXiv 2501.11651), in one file.

    torchrun t1.py --stage sft                      cold start on traces that try, err and verify themselves
    torchrun t1.py --stage rl                       reinforcement learning from the SFT checkpoint
    torchrun t1.py --stage eval                     pass@1 and accuracy against thinking budget, one curve per checkpoint
    python t1.py --stage eval --model NAME --benchmarks math500,aime24           any model on the paper's benchmarks
    python t1.py --stage ablate                     the claims of the paper over switches and seeds: ledger.md, ledger.png
    python t1.py --stage plot --name NAME           every picture of a run again, from its folder alone
    torchrun --nproc-per-node 8 t1.py --stage rl --preset qwen2.5-14b ...        FSDP2 over 8 GPUs, rollouts by vLLM, the paper's values
    python t1.py --bench                            tokens/s and memory, beside TRL's trainers where TRL is installed
    python t1.py --plan                             GPUs x context x micro-batch -> memory per GPU
    python t1.py --help                             every field of Config: unit, default, the paper's value

T1 as a difference from GRPO:
  1. advantage   leave-one-out: reward minus the mean of the OTHER K-1 samples; no division by the standard deviation;
  2. exploration K = 64 samples a prompt at a temperature above 1, and an exact entropy bonus at every generated position;
  3. KL          inside the reward, centred over the K samples of its prompt, against a moving average of the policy;
  4. penalties   -1 for over-long, repetitive or garbled responses, whatever their answer;
  5. on-policy   one update per batch of rollouts: no ratio, no clipping, no value network.

  A_i  = LOO(r'_i) - beta (d_i - mean_K d)        d_i = log pi_theta(y_i|x) - log pi_ref(y_i|x),   r'_i in {-1, 0, 1}
  loss = -(1/N) sum_i sum_t [ A_i log pi_theta(y_it | x, y_i<t) + alpha H(pi_theta(. | x, y_i<t)) ]

Letters: P prompts per step, K samples per prompt, B = P*K rows, T positions, N generated tokens of the whole batch over all
ranks, V vocabulary, D hidden width. Per-response tensors are (P, K), packed token tensors (N,).

Order of sections: Config - helpers - model and tokenizer - mathematics - packed forward and update - rollouts - rewards -
checkpoints - SFT - RL - evaluation and inference scaling - the ledger - pictures - bench and plan - main.

One process holds the whole model. Under torchrun with several the model is sharded by FSDP2 (`shard`), and every rank runs this same
file: all of them know the whole batch, each works on its share (`deal`), and the sums over ranks are those of one process.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data_prep
import verify
from data_prep import Misuse, Stop

# ----------------------------------------------------------------------------------------------------------------------
# Config: every knob, with unit, default and the paper's value; `--help` is made from it
# ----------------------------------------------------------------------------------------------------------------------


def knob(default, doc: str, paper: str = ""):
    """A field of Config: its default (that of the preset `tiny`), its meaning and unit, and what the paper says."""
    return field(default=default, metadata={"doc": doc, "paper": paper})


@dataclass
class Config:
    """Everything that a run depends on. Defaults are the preset `tiny`; PRESETS holds what the others change."""

    stage: str = knob("", "sft | rl | eval | ablate | plot | bench | plan")
    preset: str = knob("tiny", "tiny | glm4-9b | qwen2.5-14b | qwen2.5-32b")
    name: str = knob("", "name of the run's folder; empty: the preset's name")
    out: str = knob("runs", "folder that holds all runs")
    seed: int = knob(0, "seed of data order, sampling and the tiny model's weights")
    # inputs
    model: str = knob(
        "", "folder or hub name of a causal LM; empty: for sft the preset's model, for rl and eval the run's own checkpoints"
    )
    data: str = knob("", "traces (sft) or problems (rl): .jsonl, .jsonl.gz, .parquet or a folder of them; empty: the embedded ones")
    test: str = knob("", "problems to evaluate on, as --data takes them; empty: the embedded test set")
    resume_from: int = knob(
        0, "branch: go on from checkpoint-N of run NAME in a new folder NAME-from-N, with other values if you like; 0: off"
    )
    checkpoint: str = knob("", "folders to evaluate, separated by commas; empty: the run's last SFT and all its RL checkpoints")
    prompt_template: str = knob("", "text around {problem}; empty: the tokenizer's chat template, or '{problem}\\n' where it has none")
    max_prompt: int = knob(256, "longest prompt, tokens", "1,024 in the authors' later code")
    max_new: int = knob(160, "longest response, tokens; longer ones are over-long", "8,192 in the authors' later code")
    # numerics
    dtype: str = knob("float32", "float32 | bfloat16: type of activations; weights, log-probs and entropy stay float32")
    device: str = knob("", "cpu | cuda; empty: cuda where there is one")
    micro_tokens: int = knob(4096, "tokens of one micro-batch (prompts and responses)")
    checkpointing: bool = knob(False, "keep only each layer's input for the backward pass and compute the rest again: memory for time")
    offload_anchor: bool = knob(False, "keep the anchor's shards in the CPU's memory (several ranks, GPU)")
    offload_optimizer: bool = knob(False, "keep the policy's shards, its gradients and AdamW in the CPU's memory (several ranks, GPU)")
    timeout: int = knob(30, "minutes after which a rank gives up waiting for the others")
    grad_clip: float = knob(1.0, "largest gradient norm")
    weight_decay: float = knob(0.0, "AdamW's weight decay", "0.1 in the authors' later code")
    warmup: int = knob(10, "steps of linear warm-up before the cosine decay")
    # checkpoints
    keep: int = knob(10, "how many of the last checkpoints stay ...")
    keep_every: int = knob(0, "... besides those whose step is a multiple of this; 0: none besides")
    # stage sft
    sft_lr: float = knob(1.5e-3, "peak learning rate of SFT", "1e-5")
    sft_epochs: int = knob(3, "passes over the traces", "3")
    sft_steps: int = knob(0, "steps of SFT; 0: what sft_epochs needs")
    sft_batch: int = knob(32, "traces per step", "not stated")
    traces: str = knob("trial-and-error", "trial-and-error | correct-only: the embedded traces with or without their failed tries")
    sft_save_every: int = knob(500, "steps between checkpoints (the last step is always saved)")
    # stage rl
    rl_lr: float = knob(2e-4, "peak learning rate of RL", "1.5e-6")
    rl_steps: int = knob(60, "updates")
    prompts: int = knob(32, "P, prompts per step over all ranks", "32")
    k: int = knob(16, "K, samples per prompt (at least 2)", "64")
    temperature: float = knob(1.1, "sampling temperature, of rollouts and of the trained distribution", "above 1; 1.2 stable")
    min_p: float = knob(0.0, "drop tokens less likely than min_p times the likeliest; 0: off", "ablated")
    kl_coef: float = knob(2e-4, "beta, weight of the KL term in the advantage", "2e-4")
    kl_center: bool = knob(True, "subtract the prompt's mean KL (on-policy KL normalisation)", "true")
    anchor: str = knob("ema", "ema | fixed | none: the reference policy of the KL term", "ema")
    ema_decay: float = knob(0.95, "decay of the moving-average anchor, per step", "not stated; 0.992 in the authors' later code")
    entropy_coef: float = knob(1e-3, "alpha, weight of the entropy bonus", "on; value not stated")
    penalties: bool = knob(True, "reward -1 for over-long, repetitive and garbled responses", "true")
    repeat_ngram: int = knob(8, "repetition: a block of this many tokens ...")
    repeat_count: int = knob(3, "... that stands this many times in one response, without overlap")
    loss_norm: str = knob("tokens", "tokens | responses: divide by all tokens, or each response by its own length first", "not stated")
    entropy_floor: float = knob(0.01, "warn below this mean entropy, nats a token")
    kl_ceiling: float = knob(50.0, "warn above this mean KL to the anchor, nats a response")
    rl_save_every: int = knob(18, "steps between checkpoints (the last step is always saved)")
    # rollout engine
    engine: str = knob("auto", "torch | vllm | auto: vllm where it is installed and there is a GPU")
    rollout_rows: int = knob(1024, "torch engine: rows generated at once")
    vllm_tp: int = knob(1, "vllm engine: ranks that share one engine (tensor parallel); the others are copies of it")
    vllm_memory: float = knob(0.5, "vllm engine: share of the GPU's memory for its weights and cache")
    tis_cap: float = knob(0.0, "weigh each token by min(pi_trainer / pi_engine, this), for what bf16 leaves between the two; 0: off")
    probe_tolerance: float = knob(
        0.0, "largest mean |log-prob(engine) - log-prob(trainer)| of the probe after new weights, nats; 0: 1e-3, in bfloat16 0.1"
    )
    # stage eval
    eval_samples: int = knob(0, "samples per problem; 0: 4 on --test, 32 on AIME, 1 on other benchmarks", "32 on AIME, 1 elsewhere")
    eval_temperature: float = knob(1.0, "temperature of evaluation; 0: greedy")
    benchmarks: str = knob("", "instead of --test: math500, aime24, omni500, gpqa, gsm8k, amc23 and other files, separated by commas")
    benchmark_dir: str = knob("benchmarks", "folder of those files, written by data_prep.py benchmarks")
    budgets: str = knob("16,32,64,96,128,160", "thinking budgets of the picture, tokens; empty: no picture", "1024 to 16384")
    answer_prefix: str = knob("</think>\\nThe answer is \\boxed{", "what closes a thought that is cut (\\n is a new line)", "not stated")
    answer_model: str = knob("", "folder or hub name of the model that answers from a cut thought; empty: the policy itself", "not stated")
    answer_tokens: int = knob(32, "longest answer after a cut thought, tokens; a long one leaves room to think on", "not stated")
    wait_words: str = knob(", wait\\n", "budget forcing: what takes the place of </think> in a thought that ends early")
    spend_samples: int = knob(8, "samples per problem of parallel scaling (last checkpoint); 0: neither that nor budget forcing")
    # stage ablate
    seeds: str = knob("0,1,2", "seeds of the ledger's runs, separated by commas")
    variants: str = knob("", "rows of the ledger to run, separated by commas; empty: all of VARIANTS")
    # stage bench
    bench_pairs: int = knob(5, "measured steps of each job; where TRL is installed each stands beside one of TRL's")
    # the embedded model
    tiny_layers: int = knob(3, "layers of the embedded model")
    tiny_width: int = knob(128, "hidden width of the embedded model")


PAPER = dict(
    max_prompt=1024,
    max_new=8192,
    dtype="bfloat16",
    micro_tokens=32768,
    checkpointing=True,
    tis_cap=2.0,
    keep=2,
    keep_every=550,
    weight_decay=0.1,
    sft_lr=1e-5,
    sft_batch=64,
    rl_lr=1.5e-6,
    rl_steps=1875,
    k=64,
    temperature=1.2,
    ema_decay=0.992,
    repeat_ngram=20,
    repeat_count=20,
    rl_save_every=50,
    budgets="1024,2048,4096,8192,16384",
    answer_tokens=64,
    wait_words="Wait",
    spend_samples=0,
)
BENCH = dict(  # the job of the bench: TRL's RLOOTrainer runs it, too
    max_new=128,
    temperature=1.0,
    prompts=16,
    k=16,
    kl_coef=0.05,
    ema_decay=0.99,
    rl_lr=1e-4,
    sft_lr=1e-4,
    sft_batch=64,
    tiny_layers=4,
    tiny_width=256,
)
PRESETS = {
    "tiny": {},
    "bench": BENCH,
    "glm4-9b": PAPER | dict(model="zai-org/glm-4-9b-hf"),
    "qwen2.5-14b": PAPER | dict(model="Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": PAPER | dict(model="Qwen/Qwen2.5-32B"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Helpers: ranks, seeds, files
# ----------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words):
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))


def gather(items: list) -> list:
    """The items of all ranks, in order of ranks."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_sum(values: list[float]) -> list[float]:
    """The sums over all ranks, in float64."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_rank0(value):
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agree(error: Stop | None = None):
    """Raise on every rank what one of them has to say, so that none is left waiting for one that stopped. Also a barrier."""
    errors = [e for e in gather([error]) if e]
    if errors:
        raise errors[0]


def deal(work: list[int], shares: int) -> list[list[int]]:
    """Numbers of the items that each share gets: the largest first, each to the share with the least work so far."""
    hands, load = [[] for _ in range(shares)], [0] * shares
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        least = load.index(min(load))
        hands[least].append(i)
        load[least] += work[i]
    return [sorted(hand) for hand in hands]


class Interrupt:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) ask for a checkpoint and an orderly end after the step at hand. Launchers often send a
    signal twice within moments; one that comes ten seconds later, or more, ends at once."""

    def __init__(self):
        self.name, self.at = "", 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def note(self, number, frame):
        if self.name and time.monotonic() > self.at + 10:
            self.release()
            os.kill(os.getpid(), number)
        self.name, self.at = self.name or signal.Signals(number).name, self.at or time.monotonic()

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self) -> str:
        """The signal that any rank got, or the empty string; the same answer on every rank."""
        return max(gather([self.name]))


def seed_for(seed: int, *what) -> int:
    """A 63-bit seed for one purpose, step and rank. Stateless: a resumed run draws what the uninterrupted one would have."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest(), "big") >> 1


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The `size` row numbers of step `step` in an endless stream of shuffled epochs over n rows."""
    rows = []
    for i in range(step * size, (step + 1) * size):
        epoch, at = divmod(i, n)
        if not rows or at == 0:
            order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(n)
        rows.append(int(order[at]))
    return rows


def write_text(path: Path, text: str):
    """Written beside, then renamed: a reader never sees half a file."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.rename(path)


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def sync(path: Path):
    """Wait until a file or folder is on the disk, so that a rename after it cannot come first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_log(path: Path) -> list[dict]:
    """The rows of a JSONL log; a last line that a kill cut off does not count."""
    lines = data_prep.json_lines(path) if os.path.lexists(path) else []
    return [data_prep.parse(where, line) for where, line in lines if line.endswith(b"\n")]


# ----------------------------------------------------------------------------------------------------------------------
# Model and tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def attention(module, q, k, v, attention_mask, scaling=None, pack=None, **unused):
    """The attention of every forward in this file, registered with transformers as "t1"; no mask is ever built.

    q (1, Hq, n, Dh), k and v (1, Hkv, n, Dh) with `pack`: rows of different lengths stand end to end and attend causally, each to itself:
    on a GPU in bfloat16 by flash attention's form for such rows, elsewhere laid out as (B, T) and packed again. Without `pack`:
    q (B, Hq, 1, Dh) against a cache (decoding), or one block from position 0 (prefill). Key-value heads are never repeated.
    """
    if pack is not None:
        to_grid, to_packed, shape, ends = pack
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (n, H, Dh)
        if q.is_cuda and torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
            return varlen_attn(q, k, v, ends, ends, shape[1], shape[1], scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None
        q, k, v = (x.index_select(0, to_grid).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))  # (B, H, T, Dh)
    heads, kv_heads = q.shape[1], k.shape[1]
    if pack is None and q.shape[2] == 1:  # the heads of a group are one block of queries: exact, since each sees the whole cache
        out = F.scaled_dot_product_attention(q.reshape(-1, kv_heads, heads // kv_heads, q.shape[3]), k, v, scale=scaling)
        return out.reshape(-1, 1, heads, q.shape[3]), None
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads)
    out = out.transpose(1, 2)  # (B, T, Hq, Dh)
    return (out.flatten(0, 1).index_select(0, to_packed).unsqueeze(0) if pack is not None else out), None


def matmul_t(x, w, bias=None):
    """x @ w.T + bias in float32 by oneDNN: on CPUs with AVX-512 up to twice as fast as `F.linear`, whose library keeps to AVX2 on some."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


class _FastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        ctx.bias = bias is not None
        return matmul_t(x, w, bias)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        flat = g.flatten(0, -2)
        grad_x = matmul_t(g, w.t()) if ctx.needs_input_grad[0] else None
        return grad_x, matmul_t(flat.t(), x.flatten(0, -2).t()), flat.sum(0) if ctx.bias else None


class FastLinear(torch.nn.Linear):
    """torch.nn.Linear on a CPU, faster; the same parameters under the same names."""

    def forward(self, x):
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _FastLinear.apply(x, self.weight, self.bias)
        return matmul_t(x, self.weight, self.bias)


def use_fast_linears(model):
    """On CPUs with AVX-512: every torch.nn.Linear of the model becomes a FastLinear."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = FastLinear


def load_policy(folder: str, cfg: Config, device=None):
    """-> a causal LM in float32 on `device` (the run's by default), with `attention` as its attention, and its tokenizer. Misuse if anything is amiss."""
    transformers.AttentionInterface.register("t1", attention)
    try:
        check_folder(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(folder, dtype=torch.float32, attn_implementation="t1", output_loading_info=True, trust_remote_code=False)
        if info["missing_keys"]:
            raise Misuse(f"{folder}: {len(info['missing_keys'])} weights are missing, the first is {sorted(info['missing_keys'])[0]}")
        return ready(model, tokenizer, folder, cfg, device), tokenizer
    except (Stop, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as e:  # whatever a damaged folder makes the libraries raise (a panic of their Rust code is no Exception)
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise Misuse(f"{folder}: no model that can be loaded ({reason}); give a folder with config, weights and tokenizer, or a hub name")


def check_folder(folder: str):
    """What the libraries would wait for, or work on without an end, in a folder that is no model's."""
    path = Path(folder)
    if not path.is_dir():
        if folder.startswith((".", "/", "~")):
            raise FileNotFoundError("there is no such folder")
        return  # the name of a model on the hub
    odd = next((p.name for p in path.iterdir() if not (p.is_file() or p.is_dir())), None)
    if odd:
        raise Misuse(f"{folder}: {odd} is not an ordinary file")
    if (path / "generation_config.json").exists():  # the library takes a damaged one for none, and its end tokens would be lost
        data_prep.read_json(path / "generation_config.json")
    for key, value in data_prep.read_json(path / "config.json").items():
        if isinstance(value, int) and value > (LARGEST_COUNT if key.startswith(("num_", "n_")) else LARGEST_SIZE):
            raise Misuse(f"{folder}: config.json says {key} = {value}, which no model has; repair it")


LARGEST_COUNT, LARGEST_SIZE = 4096, 1 << 27  # of layers, heads or experts; of any other number in a config.json


def end_ids(model, tokenizer) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]


def ready(model, tokenizer, folder: str, cfg: Config, device=None):
    """A loaded or fresh model on its device, after the last checks."""
    rows = model.get_input_embeddings().num_embeddings
    words = tokenizer.get_vocab()
    if not prompt_ids("1 + 1", tokenizer, cfg) or tokenizer.eos_token_id is None:
        raise Misuse(
            f"{folder}: the tokenizer is missing, empty or has no end-of-text token; give a folder with tokenizer.json and eos_token"
        )
    padding = lambda word: word == tokenizer.pad_token and re.fullmatch(r"<.+>|\[.+\]", word)  # never written nor read here
    beyond = sorted((i, word) for word, i in words.items() if i >= rows and not padding(word))
    ends = end_ids(model, tokenizer)
    if beyond or not all(isinstance(i, int) and 0 <= i < rows for i in ends):
        what = f"token {beyond[0][1]!r} has number {beyond[0][0]}" if beyond else f"the end tokens are {ends}"
        raise Misuse(f"{folder}: the model has {rows} tokens, but {what}; tokenizer and model do not belong together")
    model.vocabulary = min(max(words.values()) + 1, rows)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and cfg.max_prompt + cfg.max_new > longest:
        raise Misuse(f"{folder}: takes {longest} tokens, --max-prompt {cfg.max_prompt} and --max-new {cfg.max_new} together want more")
    model = model.to(device or device_of(cfg)).eval()  # eval: no dropout, so that trained and sampled distribution are one
    if model.device.type == "cpu":
        use_fast_linears(model)
    check_forward(model, folder, cfg)
    return model


@torch.no_grad()
def check_forward(model, folder: str, cfg: Config):
    """Stop at a model that `attention` and a plain linear head do not describe (soft-caps, sliding windows, scaled logits, a biased head):
    its log-probs would be wrong without a word. One row, through this file and through the library's own code."""
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise Misuse(f"{folder}: its attention has a sliding window, which is not supported")
    row = [1 + i % (model.vocabulary - 1) for i in range(33)]
    model.set_attn_implementation("eager")
    ids = torch.tensor([row], device=model.device)
    theirs = model(ids).logits[0, :-1, : model.vocabulary].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
    model.set_attn_implementation("t1")
    for dtype, limit in {"float32": 1e-2, cfg.dtype: 1e-2 if cfg.dtype == "float32" else 0.5}.items():
        (ours,) = response_logprobs(model, [(row[:1], row[1:])], dataclasses.replace(cfg, dtype=dtype))
        if not ours.isfinite().all():
            raise Misuse(f"{folder}: its weights give log-probs that are not finite; they are damaged")
        gap = (theirs - ours).abs().max().item()
        if not gap < limit:
            raise Misuse(
                f"{folder}: a {model.config.model_type} model computes its log-probs in a way that is not supported (off by {gap:.2g} nats)"
            )


def backbone(model):
    """The transformer without its head: ids (1, n) -> hidden states (1, n, D)."""
    return getattr(model, model.base_model_prefix)


def head_of(model) -> torch.Tensor:
    """The head's weight, (V, D), without the rows that pad the vocabulary: ids beyond the tokenizer are neither sampled nor trained."""
    return model.get_output_embeddings().weight[: model.vocabulary]


def device_of(cfg: Config) -> torch.device:
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def load_whole(source: str, cfg: Config):
    """-> model and tokenizer of a folder, or the embedded ones. With several ranks only rank 0 holds the model (in the CPU's memory), the
    others get None for it: `shard` deals it out."""
    model = tokenizer = error = None
    if rank() == 0:
        device = torch.device("cpu") if world() > 1 else None
        try:
            model, tokenizer = load_policy(source, cfg, device) if source else tiny_policy(cfg)
        except Misuse as e:
            error = e
    agree(error)
    return model, from_rank0(tokenizer)


def shard(whole, cfg: Config, offload: bool = False):
    """FSDP2: rank 0's model cut into shards over all ranks; on one rank it stays what it is.

    Each layer is a unit that is gathered while it runs; embedding, last norm and head are another. Shards are float32, gathered and run
    in cfg.dtype; gradients are summed in float32. Shards are born on the meta device: no other rank ever holds the whole model.
    """
    if world() == 1:
        model, units = whole, backbone(whole).layers
    else:
        config, generation_config, vocabulary = from_rank0(rank() == 0 and (whole.config, whole.generation_config, whole.vocabulary))
        transformers.AttentionInterface.register("t1", attention)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="t1").eval()
        model.generation_config, model.vocabulary, units = generation_config, vocabulary, backbone(model).layers
        gpu = device_of(cfg).type == "cuda"
        mesh = init_device_mesh(device_of(cfg).type, (world(),))
        how = dict(mesh=mesh, offload_policy=CPUOffloadPolicy() if offload and gpu else OffloadPolicy())
        if cfg.dtype == "bfloat16":
            how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if not gpu:
            use_fast_linears(model)
        for unit in (*units, model):
            fully_shard(unit, **how)
        model.to_empty(device="cpu" if offload and gpu else device_of(cfg))
        buffers = from_rank0(rank() == 0 and {name: b.cpu() for name, b in whole.named_buffers()})
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole.state_dict() if rank() == 0 else {}, options=options)
        model.on_rows = functools.partial(on_rows, model)
        register_fsdp_forward_method(model, "on_rows")  # so that the head, too, is whole while it is used
    if cfg.checkpointing:
        for unit in units:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False)
    if cfg.dtype == "bfloat16" and device_of(cfg).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32, the head's gradient: finer than bfloat16
    return model


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or the tensor itself where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_weights(model, dtype=None):
    """(name, whole tensor) of the model's state, one at a time: no second copy of the model is made. All ranks must go through it."""
    for name, w in model.state_dict().items():
        w = w.to(dtype) if dtype else w
        yield name, w.full_tensor() if isinstance(w, DTensor) else w


def tiny_policy(cfg: Config):
    """-> the embedded model, with random weights, and its tokenizer; saved, they are an ordinary Hugging Face folder.

    The tokenizer is Qwen2's class over single bytes, so any text can be written, plus whole tokens for the numbers 0 to 199 and for
    what stands between numbers in the embedded traces: a check such as `12 mod 5 = 2 not 3, wait` is 8 tokens, and tokens are the
    budget of a CPU run.
    """
    symbols = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    texts = [row[part] + "\n" for row in data_prep.embedded_traces() for part in ("problem", "response")]
    pieces = {piece for text in texts for piece in re.split(r"\d+|(?<=\n)", text) if piece}
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in [*map(str, range(200)), *sorted(pieces)]])
    torch.manual_seed(seed_for(cfg.seed, "weights"))
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=cfg.tiny_width,
            intermediate_size=3 * cfg.tiny_width,
            num_hidden_layers=cfg.tiny_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    transformers.AttentionInterface.register("t1", attention)
    model.set_attn_implementation("t1")
    return ready(model, tokenizer, "the embedded model", cfg, torch.device("cpu") if world() > 1 else None), tokenizer


def prompt_ids(problem: str, tokenizer, cfg: Config) -> list[int]:
    """The problem as the model sees it. NOT IN PAPER: the template; a model's own chat template is what it was trained on."""
    if not cfg.prompt_template and getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template([{"role": "user", "content": problem}], add_generation_prompt=True, return_dict=False)
    return tokenizer((cfg.prompt_template or "{problem}\n").replace("{problem}", problem)).input_ids


# ----------------------------------------------------------------------------------------------------------------------
# Mathematics: pure functions
# ----------------------------------------------------------------------------------------------------------------------


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(P, K) -> (P, K): each reward minus the mean of the other K-1 of its prompt (paper section 2, leave-one-out).

    rloo_advantages([[1, 0, 0]]) = [[1, -1/2, -1/2]]
    """
    K = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)


def center_kl(kl: torch.Tensor) -> torch.Tensor:
    """(P, K) -> (P, K): d_i - mean_K d, the on-policy KL normalisation (paper section 2).

    KL is positive on average: uncentred it would push every sample of a prompt down.
    """
    return kl - kl.mean(1, keepdim=True)


def advantages_of(rewards: torch.Tensor, kl: torch.Tensor, kl_coef: float, kl_center: bool = True) -> torch.Tensor:
    """A = LOO(r') - beta (d - mean_K d), all (P, K) (paper section 2)."""
    return rloo_advantages(rewards) - kl_coef * (center_kl(kl) if kl_center else kl)


def penalised_reward(right: bool, pattern: str | None, penalties: bool = True) -> float:
    """r': 1 for a right answer, 0 for a wrong one, -1 for an unexpected pattern whatever the answer (paper section 2).

    NOT IN PAPER: the -1 takes part in leave-one-out as any other reward, as the paper's formula reads.
    """
    return -1.0 if pattern and penalties else float(right)


def log_softmax_min_p(z: torch.Tensor, min_p: float) -> torch.Tensor:
    """(n, V) logits -> log-probs; with min_p, those below min_p times the largest are -inf and the rest renormalised."""
    logp = z.log_softmax(-1)
    if min_p <= 0:
        return logp
    return logp.masked_fill(logp < logp.amax(-1, keepdim=True) + math.log(min_p), -math.inf).log_softmax(-1)


def head_chunk(vocabulary: int, device) -> int:
    """Positions of the head that are worked on at once: one float32 buffer (c, V) takes 128 MiB, on a GPU 1 GiB; two of them live."""
    return max(1, 2 ** (30 if torch.device(device).type == "cuda" else 27) // (4 * vocabulary))


def _head_chunk(hidden, lm_head, targets, temperature, min_p):
    """One chunk of the head: (c, D) -> logits z (c, V), the largest of each row at 0; p = exp(z) (c, V), 0 outside the min-p support;
    (c,) each, in float32 at least: the log of p's sum, log-prob of the target, entropy."""
    z = (hidden @ lm_head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    if temperature != 1:
        z.div_(temperature)
    p = z.sub_(z.amax(-1, keepdim=True)).exp()
    if min_p > 0:  # the target stays: at the very edge it may fall on the other side than when it was sampled
        mine = p.gather(1, targets[:, None])
        F.threshold_(p, min_p, 0.0).scatter_(1, targets[:, None], mine)
    total = p.sum(-1)
    lse = total.log()
    logprob = z.gather(1, targets[:, None])[:, 0] - lse
    entropy = lse - torch.bmm(p[:, None], z[:, :, None])[:, 0, 0] / total  # -sum p log p, without a third buffer
    return z, p, lse, logprob, entropy


def _head_chunk_grad(z, p, lse, entropy, targets, a, b, temperature):
    """d(a log p(target) + b H)/d logits, written over `z`: a (onehot - p) - b p (log p + H), divided by T. (c, V)"""
    scale = (-lse).exp() / temperature  # p is not yet divided by its sum
    z.mul_((-b * scale)[:, None]).add_(((b * (lse - entropy) - a) * scale)[:, None]).mul_(p)
    return z.scatter_add_(1, targets[:, None], (a / temperature)[:, None].to(z.dtype))


def _head_backward(hidden, lm_head, targets, a, b, temperature, min_p, chunk, behaviour=None, tis_cap=0.0):
    """Gradients of sum(a log p + b H), chunk by chunk -> (n, D), (V, D) in float32 at least; and log p and H, (n,) each."""
    grad_hidden = torch.empty_like(hidden)
    grad_head = torch.zeros_like(lm_head, dtype=torch.promote_types(lm_head.dtype, torch.float32))
    stats = torch.empty(2, len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    chunk = chunk or head_chunk(len(lm_head), hidden.device)
    for i in range(0, len(targets), chunk):
        s = slice(i, i + chunk)
        h = hidden[s].to(lm_head.dtype)
        z, p, lse, stats[0, s], stats[1, s] = _head_chunk(h, lm_head, targets[s], temperature, min_p)
        weight = (stats[0, s] - behaviour[s]).exp().clamp(max=tis_cap) if tis_cap and behaviour is not None else 1.0
        g = _head_chunk_grad(z, p, lse, stats[1, s], targets[s], a[s] * weight, b[s], temperature)  # (c, V)
        del p
        grad_hidden[s] = g.to(h.dtype) @ lm_head
        grad_head.addmm_(g.T, h.to(grad_head.dtype))
        del z, g  # before the next chunk's are made
    return grad_hidden, grad_head, *stats


class _TokenStats(torch.autograd.Function):
    """log p and H with gradients of both; the backward recomputes each chunk, so nothing of size N x V is ever held."""

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, temperature, min_p, chunk):
        ctx.save_for_backward(hidden, lm_head, targets)
        ctx.args = temperature, min_p, chunk
        chunk = chunk or head_chunk(len(lm_head), hidden.device)
        pairs = zip(hidden.split(chunk), targets.split(chunk))
        stats = [_head_chunk(h.to(lm_head.dtype), lm_head, y, temperature, min_p)[-2:] for h, y in pairs]
        return tuple(torch.cat(x) for x in zip(*stats))

    @staticmethod
    def backward(ctx, a, b):
        hidden, lm_head, targets = ctx.saved_tensors
        grad_hidden, grad_head, _, _ = _head_backward(hidden, lm_head, targets, a, b, *ctx.args)
        return grad_hidden, grad_head.to(lm_head.dtype), None, None, None, None


def token_logprobs_and_entropy(hidden, lm_head, targets, temperature: float = 1.0, min_p: float = 0.0, chunk: int = 0):
    """(n, D), (V, D), (n,) -> log-prob of each target and entropy of each distribution, (n,) and (n,), float32.

    The distribution is the sampled one: softmax(hidden lm_head^T / temperature), renormalised on the min-p support
    (the support itself is held constant in the gradient). Gradients of both outputs reach hidden and lm_head.
    """
    return _TokenStats.apply(hidden, lm_head, targets, temperature, min_p, chunk)


class _PolicyLoss(torch.autograd.Function):
    """The loss is linear in log p and H with coefficients known beforehand: each chunk's backward runs at once, without recomputation."""

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, a, b, *how):
        grad_hidden, grad_head, logprob, entropy = _head_backward(hidden, lm_head, targets, -a, -b, *how)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = lm_head.dtype
        ctx.mark_non_differentiable(logprob, entropy)
        return -(a * logprob + b * entropy).sum(), logprob, entropy

    @staticmethod
    def backward(ctx, g, *unused):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(g), grad_head.mul_(g).to(ctx.head_dtype), *[None] * 8


def policy_loss(
    hidden,
    lm_head,
    targets,
    advantages,
    weights,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    min_p: float = 0.0,
    behaviour=None,
    tis_cap: float = 0.0,
    chunk: int = 0,
):
    """-sum_t w_t [A_t log pi(y_t) + alpha H_t], the paper's objective; also the log-probs and entropies, without gradient.

    hidden (n, D), lm_head (V, D), targets, advantages and weights (n,). With w_t = 1/N, N the generated tokens of the
    whole batch, any split of a batch into calls adds up to the same gradient. A = 1 and alpha = 0 is SFT.

    NOT IN PAPER: truncated importance weights. An engine in bfloat16 samples from mu, not quite from pi; with its log-probs `behaviour` (n,)
    A_t is weighed by min(pi/mu, tis_cap), a constant in the gradient: unbiased up to the cap, which bounds the variance.
    """
    return _PolicyLoss.apply(
        hidden, lm_head, targets, advantages * weights, entropy_coef * weights, temperature, min_p, chunk, behaviour, tis_cap
    )


@torch.no_grad()
def ema_update_(anchor, policy, decay: float):
    """anchor <- decay anchor + (1 - decay) policy, in place, each rank its own shards (paper section 2, dynamic anchor)."""
    for a, p in zip(anchor.parameters(), policy.parameters(), strict=True):
        local(a).lerp_(local(p).to(a.device, a.dtype), 1 - decay)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine decay to a tenth. NOT IN PAPER: warm-up, and the decay of RL (the authors' later code has one)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------------------------
# Packed forward and update, shared by SFT and RL
# ----------------------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # prompt ids, response ids


def micro_batches(rows: list[Row], budget: int) -> list[list[int]]:
    """Row numbers sorted by length and cut where the token budget is full: little padding in attention, flat memory."""
    groups, room = [], 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1])):
        size = len(rows[i][0]) + len(rows[i][1])
        if size > room:
            groups.append([])
            room = budget
        groups[-1].append(i)
        room -= size
    return groups


def lockstep(model, rows: list[Row], budget: int) -> list[tuple[list[int], float]]:
    """Micro-batches, each with its weight. Sharded layers are gathered by all ranks together, so each must run as many micro-batches as the
    busiest: the others repeat their shortest row with weight 0."""
    groups = micro_batches(rows, budget)
    extra = max(gather([len(groups)])) - len(groups) if is_sharded(model) else 0
    return [(group, 1.0) for group in groups] + [(groups[0][:1], 0.0)] * extra


def response_hidden(model, rows: list[Row], cfg: Config):
    """Rows end to end, no padding, through the backbone -> hidden states (n, D) that predict the response tokens, targets (n,)."""
    device = device_of(cfg) if is_sharded(model) else model.device
    lengths = np.array([len(p) + len(y) - 1 for p, y in rows])  # the last token predicts nothing
    starts = np.cumsum(lengths) - lengths
    T = int(lengths.max())
    position = np.concatenate([np.arange(n) for n in lengths])
    to_packed = np.repeat(np.arange(len(rows)), lengths) * T + position
    to_grid = (starts[:, None] + np.minimum(np.arange(T), lengths[:, None] - 1)).ravel()  # cells past a row's end repeat its last token
    predict = np.concatenate([s + len(p) - 1 + np.arange(len(y)) for s, (p, y) in zip(starts, rows)])
    tensor = lambda x: torch.as_tensor(x, device=device)
    ids = tensor(np.concatenate([np.array((p + y)[:-1], dtype=np.int64) for p, y in rows]))
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        out = backbone(model)(
            input_ids=ids[None],
            position_ids=tensor(position)[None],
            use_cache=False,
            pack=(tensor(to_grid), tensor(to_packed), (len(rows), T), tensor(np.cumsum([0, *lengths]).astype(np.int32))),
        )
    return out.last_hidden_state[0].index_select(0, tensor(predict)), tensor(np.concatenate([np.array(y, dtype=np.int64) for _, y in rows]))


def on_rows(model, rows: list[Row], cfg: Config, head):
    """head(hidden (n, D), lm_head (V, D), targets (n,)) of packed rows."""
    hidden, targets = response_hidden(model, rows, cfg)
    return head(hidden, head_of(model), targets)


def through(model, rows: list[Row], cfg: Config, head):
    """`on_rows`, as FSDP's forward method where the model is sharded."""
    return getattr(model, "on_rows", functools.partial(on_rows, model))(rows, cfg, head)


def accumulate_gradient(model, rows, advantages, weights, cfg, entropy_coef=0.0, temperature=1.0, min_p=0.0, sampled=None):
    """Add the gradient of the objective to .grad; advantages and weights: a number a row. `sampled`: the engine's log-probs of each row.

    Returns the loss and, summed over this rank's tokens, -log p and the entropy; and |log p - sampled| of each token.
    """
    sums, gaps, error = torch.zeros(3, dtype=torch.float64), [torch.zeros(0)], None
    ranks = world() if is_sharded(model) else 1  # FSDP takes the mean over ranks where the objective has a sum
    for group, real in lockstep(model, rows, cfg.micro_tokens):
        sizes = torch.tensor([len(rows[i][1]) for i in group])
        behaviour = torch.cat([torch.tensor(sampled[i]) for i in group]) if sampled else None

        def head(hidden, lm_head, targets):
            per_token = lambda x, scale=1.0: (scale * torch.tensor([x[i] for i in group])).repeat_interleave(sizes).to(hidden.device)
            w = per_token(weights, real * ranks)
            mu = behaviour.to(hidden.device) if sampled else None
            return policy_loss(hidden, lm_head, targets, per_token(advantages), w, entropy_coef, temperature, min_p, mu, cfg.tis_cap)

        loss, logprob, entropy = through(model, [rows[i] for i in group], cfg, head)
        loss.backward()
        if real:
            part = torch.stack([loss.detach() / ranks, -logprob.sum(), entropy.sum()]).double().cpu()
            if not part.isfinite().all():
                error = error or Stop(f"rank {rank()}: loss, log-prob or entropy of rows {group[:8]} is not finite: {part.tolist()}")
            sums += part
            if sampled:
                gaps.append((logprob.cpu() - behaviour).abs())
    agree(error)
    return *sums.tolist(), torch.cat(gaps)


@torch.no_grad()
def response_logprobs(model, rows: list[Row], cfg: Config, temperature: float = 1.0, min_p: float = 0.0) -> list[torch.Tensor]:
    """log pi(y_t | x, y_<t) of the tokens of each row's response, float32, on the CPU."""
    result = [torch.zeros(0)] * len(rows)
    for group, _ in lockstep(model, rows, cfg.micro_tokens):
        logprob, _ = through(model, [rows[i] for i in group], cfg, lambda h, w, y: token_logprobs_and_entropy(h, w, y, temperature, min_p))
        for i, part in zip(group, logprob.cpu().split([len(rows[i][1]) for i in group])):
            result[i] = part
    if is_sharded(model):
        model.reshard()  # no backward comes that would do it, and gathered weights do not follow the next update
    return result


def make_optimizer(model, cfg: Config):
    """AdamW. NOT IN PAPER: betas, and one weight decay for all weights. Its state is made now, so that a checkpoint can be read into it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    for p in model.parameters():
        step = torch.zeros((), device=local(p).device)
        optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


def update(model, optimizer, lr: float, cfg: Config) -> float:
    """Clip and step; returns the gradient's norm. A gradient that is not finite changes nothing."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise Stop(
            f"rank {rank()}: the gradient's norm is {norm}: stopped with the weights untouched; try a smaller learning rate under another --name"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts: an engine has generate(prompts, k, seeds, ...) -> rollouts, load(policy) -> are its weights copies?, and sleep()
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One sampled response: what the update trains on are these ids, never re-tokenised text."""

    prompt: list[int]
    ids: list[int]  # with the end token, if it came
    logprobs: list[float]  # log pi(y_t | x, y_<t) under the sampled distribution
    finished: bool  # ended by an end token within max_new


class Cache:
    """Preallocated keys and values of one layer, (B, Hkv, Tmax, Dh); rows are dropped as they finish."""

    def __init__(self):
        self.n, self.keys, self.values = 0, None, None

    def extend(self, rows: int, repeats: int, longest: int):
        """Repeat each prompt's prefix for its samples and make room for `longest` positions."""

        def grow(x):
            big = x.new_empty(rows, x.shape[1], longest, x.shape[3])
            big[:, :, : self.n] = x.repeat_interleave(repeats, 0)
            return big

        self.keys, self.values = grow(self.keys), grow(self.values)

    def keep(self, left: int, holes, moved):
        """Keep `left` rows: those of `moved`, from the end, take the places `holes` of rows that ended."""
        for x in (self.keys, self.values):
            x[holes, :, : self.n] = x[moved, :, : self.n]
        self.keys, self.values = self.keys[:left], self.values[:left]

    def update(self, k, v):
        if self.keys is None:
            self.keys, self.values, self.n = k, v, k.shape[2]
            return k, v
        self.keys[:, :, self.n : self.n + 1], self.values[:, :, self.n : self.n + 1] = k, v
        self.n += 1
        return self.keys[:, :, : self.n], self.values[:, :, : self.n]


class Caches:
    """What transformers' layers ask of a cache, over one `Cache` a layer."""

    def __init__(self, layers: int):
        self.layers = [Cache() for _ in range(layers)]

    def update(self, k, v, layer_idx, *args, **kwargs):
        return self.layers[layer_idx].update(k, v)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx].n


class TorchEngine:
    """Sampling in plain torch, on any device. Nothing is padded: what all prompts have in length is read at once, the rest of the longer
    ones token by token while the shorter ones already answer. Rows that ended leave the batch. The cache is allocated once.

    Each sample has random numbers of its own, so it does not depend on what else is in the batch, nor on the number of ranks."""

    def __init__(self, tokenizer, cfg: Config):
        self.tokenizer, self.cfg, self.model = tokenizer, cfg, None

    def load(self, policy) -> bool:
        if not is_sharded(policy):
            self.model = policy  # the trainer's own weights: nothing to push
            return False
        if self.model is None:  # of a sharded policy each rank needs a whole copy: for small models; large ones want vLLM
            make = transformers.AutoModelForCausalLM.from_config
            self.model = make(policy.config, dtype=torch.float32, attn_implementation="t1").to(device_of(self.cfg)).eval()
            self.model.generation_config, self.model.vocabulary = policy.generation_config, policy.vocabulary
        mine = self.model.state_dict()
        for name, w in full_weights(policy):
            mine[name].copy_(w)
        return True

    def sleep(self):
        pass

    def generate(
        self, prompts: list[list[int]], k: int, seeds: list[int], max_new: int, temperature: float = 1.0, min_p: float = 0.0
    ) -> list[Rollout]:
        """k samples of each prompt (token ids), prompt by prompt, from one seed a prompt; temperature 0 is greedy."""
        per_batch = max(1, self.cfg.rollout_rows // k)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
        result = [None] * len(prompts)
        for start in range(0, len(order), per_batch):
            part = order[start : start + per_batch]
            rollouts = self._generate([prompts[i] for i in part], k, [seeds[i] for i in part], max_new, temperature, min_p)
            for j, i in enumerate(part):
                result[i] = rollouts[j * k : (j + 1) * k]
        return [r for group in result for r in group]

    @torch.no_grad()
    def _generate(self, prompts, k, seeds, max_new, temperature, min_p):
        device = self.model.device
        uniform = np.concatenate([np.random.default_rng(seed).random((k, max_new)) for seed in seeds])
        uniform = torch.from_numpy(uniform).to(device)  # (B, max_new), one number a token
        head = head_of(self.model)
        lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(k)  # (B,)
        prefix, longest, B = int(lengths.min()), int(lengths.max()) + max_new, len(lengths)
        tokens = torch.zeros(B, longest, dtype=torch.long, device=device)
        for i, p in enumerate(prompts):
            tokens[i * k : (i + 1) * k, : len(p)] = torch.tensor(p, device=device)
        logprobs = torch.zeros(B, longest, device=device)
        ended_at = lengths + max_new  # (B,) one past the last token
        ends = torch.tensor(end_ids(self.model, self.tokenizer), device=device)
        caches = Caches(self.model.config.num_hidden_layers)
        hidden = self._forward(tokens[::k, :prefix], torch.arange(prefix, device=device), caches)[:, -1].repeat_interleave(k, 0)  # (B, D)
        for cache in caches.layers:
            cache.extend(B, k, longest)
        alive = torch.arange(B, device=device)  # rows of the batch -> rows of `tokens`
        for t in range(prefix, longest):
            at = t - lengths[alive]  # (B,) position in the response; below 0: still inside the prompt
            token, logprob = sample(hidden @ head.T, temperature, min_p, uniform[alive, at.clamp(min=0)])
            token = torch.where(at < 0, tokens[alive, t], token)
            tokens[alive, t], logprobs[alive, t] = token, logprob
            stopped = (at >= 0) & torch.isin(token, ends)
            ended_at[alive] = torch.where(stopped, t + 1, ended_at[alive])
            going = ended_at[alive] > t + 1
            left = int(going.sum())
            if left == 0:
                break
            if left < len(alive):  # rows from the end take the places of those that ended
                holes, moved = (~going[:left]).nonzero()[:, 0], left + going[left:].nonzero()[:, 0]
                alive[holes], token[holes] = alive[moved], token[moved]
                alive, token = alive[:left], token[:left]
                for cache in caches.layers:
                    cache.keep(left, holes, moved)
            hidden = self._forward(token[:, None], torch.tensor([t], device=device), caches)[:, -1]
        last = tokens[torch.arange(B, device=device), ended_at - 1]
        columns = zip(tokens.tolist(), lengths.tolist(), ended_at.tolist(), logprobs.tolist(), torch.isin(last, ends).tolist())
        return [Rollout(row[:n], row[n:end], logprob[n:end], finished) for row, n, end, logprob, finished in columns]

    def _forward(self, ids, positions, caches):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            return backbone(self.model)(
                input_ids=ids, position_ids=positions[None], past_key_values=caches, use_cache=True
            ).last_hidden_state


def sample(logits, temperature: float, min_p: float, uniform):
    """(B, V) logits, (B,) uniform numbers in [0, 1) -> token (B,) and its log-prob (B,), under the very distribution that is trained."""
    logp = log_softmax_min_p(logits.float() / (temperature or 1.0), min_p)
    if temperature == 0:
        token = logp.argmax(-1)
    else:  # the inverse of the cumulative distribution
        cumulative = logp.exp().double().cumsum(-1)
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


class VLLMEngine:
    """vLLM inside the trainer's processes: under torchrun every `vllm_tp` ranks share one engine, and each engine serves its own ranks.

    New weights come from the trainer tensor by tensor. On a GPU the engine hands its memory back while the update runs. A call's random
    numbers depend on its first seed alone, so the same call gives the same samples, but not if prompts are dealt to other engines."""

    def __init__(self, folder: str, model, tokenizer, cfg: Config):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights need no copy to reach it
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 takes other logits processors, and seeds of numpy that no call sets
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", module="vllm")
        import vllm
        from vllm.v1.sample.logits_processor import LogitsProcessor

        class KnownIds(LogitsProcessor):
            """Ids beyond the tokenizer, which pad the vocabulary of many models, are never sampled."""

            def __init__(self, *unused):
                pass

            def is_argmax_invariant(self):
                return False

            def update_state(self, batch_update):
                pass

            def apply(self, logits, beyond=model.vocabulary):
                logits[:, beyond:] = -math.inf
                return logits

        self.tokenizer, self.cfg, self.asleep, self.gpu = tokenizer, cfg, False, device_of(cfg).type == "cuda"
        self.ends, self.params, self.dtype = end_ids(model, tokenizer), vllm.SamplingParams, getattr(torch, cfg.dtype)
        longest = max([cfg.max_new, *(int(b) for b in cfg.budgets.split(",") if b)] if cfg.stage == "eval" else [cfg.max_new])
        room = cfg.max_prompt + longest + cfg.answer_tokens + 64  # 64: the words that close a cut thought
        self.sleeps = self.gpu and cfg.stage == "rl"
        share = cfg.vllm_memory / (2 if cfg.answer_model and cfg.stage == "eval" else 1)  # then there are two engines
        where = dict(gpu_memory_utilization=share, enable_sleep_mode=self.sleeps) if self.gpu else dict(kv_cache_memory_bytes=1 << 29)
        with self.failing("could not be started"):
            self.llm = vllm.LLM(
                folder,
                dtype=cfg.dtype,
                max_model_len=min(room, getattr(model.config, "max_position_embeddings", room)),
                seed=cfg.seed,
                tensor_parallel_size=cfg.vllm_tp,
                distributed_executor_backend="external_launcher" if world() > 1 else None,
                logprobs_mode="processed_logprobs",  # those of the sampled distribution: after temperature and min-p
                logits_processors=[KnownIds],
                generation_config="vllm",
                enforce_eager=not self.gpu,
                disable_log_stats=True,
                **where,
            )

    @contextlib.contextmanager
    def failing(self, what: str):
        try:
            yield
        except Exception as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise Stop(f"rank {rank()}: the vLLM engine {what} ({reason}); the same command goes on from the last checkpoint")

    def load(self, policy) -> bool:
        with self.failing("did not take the new weights"):
            if self.asleep:
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=full_weights(policy, self.dtype)))
            self.llm.reset_prefix_cache()
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        return True

    def sleep(self):
        """Give the GPU's memory to the update; the next `load` wakes the engine."""
        if self.sleeps:
            with self.failing("did not fall asleep"):
                self.llm.sleep(level=2)
            self.asleep = True

    def generate(
        self, prompts: list[list[int]], k: int, seeds: list[int], max_new: int, temperature: float = 1.0, min_p: float = 0.0
    ) -> list[Rollout]:
        """As TorchEngine.generate; the ranks of one tensor-parallel group must call it together."""
        with self.failing("failed"):
            if self.cfg.vllm_tp > 1:  # every rank of the group asks for the prompts of all, and takes its own
                from vllm.distributed import get_tp_group

                parts = [None] * self.cfg.vllm_tp
                dist.all_gather_object(parts, (prompts, seeds), group=get_tp_group().cpu_group)
                first = sum(len(p) for p, _ in parts[: get_tp_group().rank_in_group])
                mine = slice(first, first + len(prompts))
                prompts, seeds = ([x for part in parts for x in part[i]] for i in (0, 1))
            else:
                mine = slice(None)
            if not prompts:
                return []
            torch.manual_seed(seeds[0])
            how = dict(n=k, temperature=temperature, min_p=min_p, max_tokens=max_new, stop_token_ids=self.ends)
            params = self.params(**how, logprobs=0, flat_logprobs=True, detokenize=False)
            answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)[mine]
        return [
            Rollout(list(a.prompt_token_ids), list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason == "stop")
            for a in answers
            for o in sorted(a.outputs, key=lambda o: o.index)
        ]


def make_engine(folder: str, model, tokenizer, cfg: Config):
    """The one place that chooses an engine; `folder` holds weights of the model, which vLLM starts from."""
    gpu, installed = device_of(cfg).type == "cuda", importlib.util.find_spec("vllm") is not None
    if cfg.engine == "vllm" and not installed:
        raise Misuse("--engine vllm: vLLM is not installed here; pip install vllm==0.32.0 (README, set up), or take --engine torch")
    use_vllm = cfg.engine == "vllm" or cfg.engine == "auto" and gpu and installed
    engine = VLLMEngine(folder, model, tokenizer, cfg) if use_vllm else TorchEngine(tokenizer, cfg)
    engine.load(model)
    return engine


def check_push(engine, model, prompt: list[int], cfg: Config):
    """After new weights: engine and trainer must give the same log-probs to one greedy answer. A push that fails without a word would
    leave the rollouts to an old policy for the rest of the run."""
    (probe,) = engine.generate([prompt], 1, [0], 16, temperature=0.0)
    (ours,) = response_logprobs(model, [(probe.prompt, probe.ids)], cfg)
    gap = (torch.tensor(probe.logprobs) - ours).abs().mean().item()
    error, tolerance = None, cfg.probe_tolerance or dict(float32=1e-3, bfloat16=0.1)[cfg.dtype]
    if not gap <= tolerance:
        error = Stop(
            f"rank {rank()}: after new weights engine and trainer are {gap:.2g} nats a token apart on a fixed probe (--probe-tolerance"
            f" {tolerance}): the push failed, or the two compute differently"
        )
    agree(error)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards
# ----------------------------------------------------------------------------------------------------------------------


def unexpected_pattern(
    text: str, token_ids: list[int], finished: bool, repeat_ngram: int = 20, repeat_count: int = 20, prompt: str = ""
) -> str | None:
    """Which of "overlong", "repetition" and "garbled" a response is, or None (paper section 2: it is rewarded -1 whatever its answer).

    NOT IN PAPER: the rules. Over-long: no end token within the limit. Repetition: a block of `repeat_ngram` tokens stands
    `repeat_count` times without overlap. Garbled: see `garbled`; `prompt` tells which scripts are at home.
    """
    if not finished:
        return "overlong"
    if repeats(token_ids, repeat_ngram) >= repeat_count:
        return "repetition"
    return "garbled" if garbled(text, prompt) else None


def repeats(ids: list[int], n: int) -> int:
    """How often the most frequent block of n tokens stands in ids, counted without overlap."""
    seen, most = {}, 0  # block -> (count, end of its last occurrence)
    for i in range(len(ids) - n + 1):
        block = tuple(ids[i : i + n])
        count, end = seen.get(block, (0, 0))
        if i >= end:
            seen[block] = count + 1, i + n
            most = max(most, count + 1)
    return most


MATHS_SCRIPTS = set(
    "LATIN GREEK MATHEMATICAL DOUBLE-STRUCK SCRIPT BLACK-LETTER SUPERSCRIPT SUBSCRIPT MODIFIER FEMININE MASCULINE"
    " ALEF BET GIMEL DALET MICRO OHM ANGSTROM PLANCK".split()
)


def garbled(text: str, prompt: str = "") -> bool:
    """Mixed languages or random characters: five letters or more, and more than 5 % of all, are of a script that is at home neither in
    mathematics nor in the prompt; more than 1 % of the characters are broken (replacement, control, unassigned); or 60 Latin letters
    stand in a row."""
    if re.search(r"[A-Za-z]{60}", text):
        return True
    if text.isascii():
        return sum(c < " " and c not in "\n\t\r" for c in text) > 0.01 * len(text)
    script = lambda c: unicodedata.name(c, "?").split()[0]
    letters = [c for c in text if c.isalpha()]
    welcome = MATHS_SCRIPTS | {script(c) for c in prompt if c.isalpha()}
    broken = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\n\t\r" for c in text)
    foreign = sum(script(c) not in welcome for c in letters)
    return broken > 0.01 * len(text) or foreign >= 5 and foreign > 0.05 * len(letters)


REFLECTION = re.compile(
    r"\b(?:wait|hmm+|perhaps|maybe|alternatively|however|actually|reconsider|re-?check|double-check|let me (?:check|verify|try))\b", re.I
)


def behaviour(problem: str, text: str, right: bool) -> dict:
    """What RL may teach, seen in one response: its reflection words (paper section 3), and in embedded problems its elementary checks.

    honoured: the final answer was checked and every check of it said yes: the response does not answer against its own checks.
    first_right, corrected: a right answer that was the first candidate tried, or that took the place of another.
    """
    found, answer = data_prep.read_checks(problem, text), verify.extract_answer(text)
    said = [yes for candidate, yes, _ in found if candidate == answer]
    first = bool(found) and found[0][0] == answer
    return dict(
        answer=answer,
        reflections=len(REFLECTION.findall(text)),
        checks=len(found),
        honest=sum(honest for _, _, honest in found),
        honoured=bool(said) and all(said),
        first_right=right and first,
        corrected=right and bool(found) and not first,
    )


def judge(rollouts: list[Rollout], problems: list[dict], tokenizer, cfg: Config) -> list[dict]:
    """One record a rollout, K consecutive rollouts a problem."""
    asked = [p for p in problems for _ in range(len(rollouts) // len(problems))]
    texts = tokenizer.batch_decode([r.ids for r in rollouts], skip_special_tokens=True)
    grades = verify.grade(texts, [p["answer"] for p in asked])
    failed = sum(grades.stats[name] for name in ("timeouts", "crashes"))
    records = []
    for rollout, problem, text, right in zip(rollouts, asked, texts, grades):
        pattern = unexpected_pattern(text, rollout.ids, rollout.finished, cfg.repeat_ngram, cfg.repeat_count, problem["problem"])
        reward = penalised_reward(right, pattern, cfg.penalties)
        record = dict(id=problem.get("id"), problem=problem["problem"], response=text, reward=reward, right=bool(right), pattern=pattern)
        records.append(
            record | behaviour(problem["problem"], text, bool(right)) | dict(length=len(rollout.ids), ungraded=failed / len(rollouts))
        )
    return records


def roll_out(engine, problems, prompts, k: int, seeds: list[int], cfg: Config, temperature: float, min_p: float = 0.0):
    """-> k rollouts of each problem, and a record of each. The problems are dealt to the engines by length, each rank judges what its engine
    made, and every rank gets all of it, in the order of the problems."""
    engines = world() // cfg.vllm_tp
    mine = deal([len(p) for p in prompts], engines)[rank() // cfg.vllm_tp] if rank() % cfg.vllm_tp == 0 else []
    rollouts = engine.generate([prompts[i] for i in mine], k, [seeds[i] for i in mine], cfg.max_new, temperature, min_p)
    records = judge(rollouts, [problems[i] for i in mine], engine.tokenizer, cfg) if mine else []
    everything = gather([(i, rollouts[n * k : (n + 1) * k], records[n * k : (n + 1) * k]) for n, i in enumerate(mine)])
    everything.sort(key=lambda part: part[0])
    return [r for _, part, _ in everything for r in part], [r for _, _, part in everything for r in part]


def means(records: list[dict]) -> dict:
    """What is logged of a set of judged rollouts: means over the responses. README's glossary says what each is."""
    total = lambda name: sum(float(r[name]) for r in records)
    share = lambda name, of: total(name) / of if of else None  # None: there is nothing of the kind in these responses
    checked = sum(r["checks"] > 0 for r in records)
    row = dict(accuracy=share("right", len(records)), honest=share("honest", total("checks")))
    row |= {name: share(name, len(records)) for name in ("reward", "length", "checks")}
    row |= {name: sum(r["pattern"] == name for r in records) / len(records) for name in ("overlong", "repetition", "garbled")}
    row |= {name: share(name, checked) for name in ("honoured", "first_right", "corrected")}
    return row | dict(reflections=share("reflections", total("length") / 100), ungraded=share("ungraded", len(records)))


# ----------------------------------------------------------------------------------------------------------------------
# Data, run folders, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def read_rows(path: str, stage: str) -> list[dict]:
    """Traces ({"problem", "response"}, stage sft) or problems ({"problem", "answer"}) of a data set as data_prep.py takes it.

    Where a row has neither response nor answer its "solution" serves: as the response, or for the answer in its last box.
    """
    rows, needed = [], ("problem", "response" if stage == "sft" else "answer")
    for where, raw in data_prep.raw_rows(path):
        row = {k: v for k, v in data_prep.parse(where, raw).items() if isinstance(v, (str, int))}  # what a log can hold
        solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
        if stage == "sft":
            row.setdefault("response", solution)
        else:
            row.setdefault("answer", verify.extract_answer(solution) or "")
        for name in needed:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise Misuse(f"{data_prep.row_at(where)}: field {name!r} is missing, empty or not text")
        rows.append(row | dict(where=data_prep.row_at(where)))
    if not rows:
        raise Misuse(f"{path}: no rows")
    unreadable = [row["where"] for row in rows if stage != "sft" and not verify.is_readable(row["answer"])]
    if unreadable:
        print0(f"{len(unreadable)} answers that verify.py cannot read, so that nothing will equal them, the first in {unreadable[0]}")
    return rows


def encode_prompts(rows: list[dict], tokenizer, cfg: Config) -> list[list[int]]:
    """Prompt ids of all rows; one that is longer than max_prompt is an error, never cut."""
    encoded = [prompt_ids(row["problem"], tokenizer, cfg) for row in rows]
    for ids, row in zip(encoded, rows):
        where = row.get("where") or f"problem {row.get('id')}"
        if not ids:
            raise Misuse(f"{where}: the tokenizer knows none of its characters; leave the row out, or take another model")
        if len(ids) > cfg.max_prompt:
            raise Misuse(f"{where}: a prompt of {len(ids)} tokens, --max-prompt is {cfg.max_prompt}; raise it or leave the row out")
    return encoded


def is_whole(folder: Path) -> bool:
    """Was this checkpoint written to its end? complete.json, its last file, holds the size of each of the others."""
    try:
        sizes = data_prep.read_json(folder / "complete.json")
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, Misuse):
        return False


def checkpoints(stage_folder: Path) -> list[Path]:
    """The whole checkpoints of one stage in order of steps."""
    found = [p for p in stage_folder.glob("checkpoint-*") if p.name[11:].isdigit() and is_whole(p)]
    return sorted(found, key=lambda p: int(p.name[11:]))


def newest(folders: list[Path]) -> str:
    return str(folders[-1]) if folders else ""


def trainer_state(model, optimizer, anchor=None) -> dict[str, torch.Tensor]:
    """What goes on from a checkpoint, under flat names, shards where the model is sharded: weights in float32, AdamW's state, the anchor.
    No random state: every draw has a seed of its own, made from the run's seed, the step and the place in the batch."""
    state = {}
    for name, p in model.named_parameters():
        state["policy." + name] = p.detach()
        state |= {f"{kind}.{name}": x for kind, x in optimizer.state[p].items()}
    return state | {"anchor." + name: p.detach() for name, p in (anchor.named_parameters() if anchor else ())}


class RunFolder:
    """The folder of one stage: config.json; metrics.jsonl (a row a step, the same bits for the same seed); timings.jsonl; samples.jsonl;
    checkpoint-N; curves.png. A stage that was interrupted goes on from its last whole checkpoint."""

    logs = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
    # fields that may differ when a run goes on: what changes nothing in it, what only other stages read, what but changes the order of sums
    free = "out name timeout keep keep_every entropy_floor kl_ceiling".split()
    free += "eval_samples benchmarks benchmark_dir budgets answer_prefix answer_model answer_tokens wait_words spend_samples".split()
    free += "seeds variants bench_pairs".split()
    layout = "micro_tokens checkpointing offload_anchor offload_optimizer rollout_rows vllm_tp vllm_memory probe_tolerance".split()

    def __init__(self, cfg: Config):
        run = Path(cfg.out) / (cfg.name or cfg.preset)
        self.cfg = cfg
        self.path = (run.with_name(f"{run.name}-from-{cfg.resume_from}") if cfg.resume_from else run) / cfg.stage
        self.branch = run / cfg.stage / f"checkpoint-{cfg.resume_from}"  # where a branch starts
        if cfg.resume_from and not is_whole(self.branch):
            there = ", ".join(p.name[11:] for p in checkpoints(self.branch.parent)) or "none"
            raise Misuse(f"--resume-from {cfg.resume_from}: {self.branch} is no whole checkpoint; there are: {there}")
        mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in self.free}
        if os.path.lexists(self.path / "config.json"):
            try:
                theirs = dict(data_prep.read_json(self.path / "config.json")["config"])
            except (ValueError, KeyError, TypeError):
                raise Misuse(f"{self.path / 'config.json'}: damaged; choose another --name, or remove that folder")
            differing = {k: f"{k} ({theirs.get(k)!r} there, {v!r} now)" for k, v in mine.items() if theirs.get(k) != v}
            if not differing.keys() <= set(self.layout):
                others = ", ".join(differing.values())
                raise Misuse(f"{self.path} holds a run of another configuration: {others}; choose another --name, or remove that folder")
            if differing:
                print0(f"{self.path} began with other values: {', '.join(differing.values())}; the same up to the order of sums")
        self.config = dict(
            config=mine,
            world_size=world(),
            python=sys.version.split()[0],
            torch=torch.__version__,
            transformers=transformers.__version__,
            source_sha256=hashlib.sha256(
                b"".join(Path(m.__file__).read_bytes() for m in (sys.modules[__name__], data_prep, verify))
            ).hexdigest(),
        )

    def source(self) -> str:
        """The checkpoint that this stage goes on from, or the empty string; what rank 0 sees on the disk."""
        return from_rank0(newest(checkpoints(self.path)) or (str(self.branch) if self.cfg.resume_from else "") if rank() == 0 else "")

    def create(self, source: str):
        """Called when all inputs have been read and checked, so that a misuse leaves no folder behind."""
        error = None
        try:
            if rank() == 0:
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self.path / "config.json").exists():
                    write_json(self.path / "config.json", self.config | dict(started_from=source))
        except OSError as e:
            error = Misuse(f"{self.path}: cannot be written ({e.strerror}); choose another --out")
        agree(error)

    def append(self, name: str, *rows: dict):
        if rank() == 0:
            with open(self.path / name, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def read(self, name: str, folder: Path | None = None) -> list[dict]:
        """The rows of a log; a last line that a kill cut off does not count."""
        path = (folder or self.path) / name
        rows = read_log(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise Misuse(f"{path}: a row without its step; repair it, or choose another --name")
        return rows

    def save(self, step: int, model, tokenizer, optimizer, anchor=None):
        """An ordinary Hugging Face folder with the trainer's state beside the weights. Written beside, brought to the disk, marked as
        complete, then renamed; then the older ones that --keep and --keep-every do not hold are removed."""
        beside, error = self.path / f"partial-{step}", None
        weights = {}
        dtype = getattr(torch, self.cfg.dtype)
        names = {name for name, _ in model.named_parameters()}  # tied weights once
        for name, w in full_weights(model, dtype):
            if rank() == 0 and name in names:
                weights[name] = w.detach().cpu()
        try:
            if rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
                model.config.dtype = dtype
                model.save_pretrained(beside, state_dict=weights)
                tokenizer.save_pretrained(beside)
        except Exception as e:  # a full disk speaks through many libraries
            error = self.unwritten(e, beside)
        del weights
        agree(error)
        try:
            state = trainer_state(model, optimizer, anchor)
            files = {name: 1 + i // 32 for i, name in enumerate(state)}  # a file is gathered in memory before it is written
            writer = dcp.HuggingFaceStorageWriter(
                str(beside / "trainer"), files, save_distributed=True
            )  # safetensors: nothing is unpickled
            dcp.save(state, storage_writer=writer)
        except (Exception, dcp.CheckpointException) as e:
            error = self.unwritten(e, beside)
        agree(error)
        try:
            if rank() == 0:
                self.seal(beside, step)
        except OSError as e:
            error = self.unwritten(e, beside)
        agree(error)

    def after_step(self, step: int, steps: int, draw_every: int, save_every: int, interrupt: Interrupt, *what) -> bool:
        """Draw and save (`what`: the arguments of `save`) when it is time, at the end, and when a signal asks for an end: True."""
        last, asked = step + 1 == steps, interrupt.asked()
        if last or asked or (step + 1) % draw_every == 0:
            draw_steps(self.path, self.cfg)
        if last or asked or (step + 1) % save_every == 0:
            self.save(step + 1, *what)
        if asked and not last:
            print0(f"{asked}: saved after step {step + 1} of {steps}; the same command goes on from there")
            return True
        return False

    def seal(self, beside: Path, step: int):
        files = [p for p in beside.rglob("*") if p.is_file()]
        write_json(beside / "complete.json", {str(p.relative_to(beside)): p.stat().st_size for p in files})
        for path in (*files, beside, beside / "trainer", *(self.path / name for name in self.logs if (self.path / name).exists())):
            sync(path)
        final = self.path / f"checkpoint-{step}"
        if final.exists():  # one that was found not whole
            shutil.rmtree(final)
        beside.rename(final)
        sync(self.path)
        for old in checkpoints(self.path)[: -self.cfg.keep]:
            if not self.cfg.keep_every or int(old.name[11:]) % self.cfg.keep_every:
                shutil.rmtree(old.rename(self.path / f"partial-{old.name[11:]}"))

    def unwritten(self, e: Exception, beside: Path) -> Stop:
        shutil.rmtree(beside, ignore_errors=True)
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        there = checkpoints(self.path)
        last = f"the last whole checkpoint is {there[-1]}" if there else "there is no checkpoint yet"
        return Stop(
            f"rank {rank()}: {beside}: the checkpoint cannot be written ({reason}); {last}; make room and give the same command again"
        )

    def resume(self, model, optimizer, anchor=None) -> int:
        """Load the trainer's state of the newest whole checkpoint and cut the logs back to it; -> next step."""
        source = self.source()
        step = int(Path(source).name[11:]) if source else 0
        found, error = Path(source).parent if source else self.path, None
        for path in sorted(self.path.glob("*-*")) if rank() == 0 else ():
            if path.name.startswith("partial-") and path.is_dir():
                print0(f"{path}: half-written, removed")
                shutil.rmtree(path)
            elif path.name.startswith("checkpoint-") and not is_whole(path):
                print0(f"{path}: half-written, ignored")
        if source:
            state = trainer_state(model, optimizer, anchor)
            try:
                dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(Path(source) / "trainer")))
            except (Exception, dcp.CheckpointException) as e:
                reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
                error = Misuse(f"{source}: its trainer state cannot be read ({reason}); remove that folder to go on from the one before")
            agree(error)
            ranks = data_prep.read_json(self.path / "config.json").get("world_size")
            other = f"; the run began on {ranks} ranks, here are {world()}: the same up to the order of sums" if ranks != world() else ""
            print0(f"going on from {source}{other}")
        for name in self.logs if rank() == 0 else ():
            if (found / name).exists():
                rows = [row for row in self.read(name, found) if row["step"] < step]
                (self.path / (name + ".partial")).unlink(missing_ok=True)
                self.append(name + ".partial", *rows)
                (self.path / (name + ".partial")).replace(self.path / name)
        agree()
        return step


# ----------------------------------------------------------------------------------------------------------------------
# Stage sft: cold start (paper section 1)
# ----------------------------------------------------------------------------------------------------------------------


def run_sft(cfg: Config):
    folder = RunFolder(cfg)
    traces = read_rows(cfg.data, "sft") if cfg.data else data_prep.embedded_traces(correct_only=cfg.traces == "correct-only")
    source = folder.source() or cfg.model
    whole, tokenizer = load_whole(source, cfg)
    tests = encoded_tests(tokenizer, cfg)
    rows = [
        (x, tokenizer(t["response"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
        for x, t in zip(encode_prompts(traces, tokenizer, cfg), traces)
    ]
    kept = [row for row in rows if len(row[1]) <= cfg.max_new]
    if not kept:
        raise Misuse(f"every response is longer than --max-new {cfg.max_new} tokens (the shortest has {min(len(y) for _, y in rows)})")
    folder.create(source)
    model = shard(whole, cfg, cfg.offload_optimizer)
    steps = cfg.sft_steps or math.ceil(cfg.sft_epochs * len(kept) / cfg.sft_batch)
    print0(f"the policy starts from {source or 'random weights'}")
    print0(
        f"{len(kept)} traces of {np.mean([len(y) for _, y in kept]):.0f} tokens ({len(rows) - len(kept)} longer than --max-new left out), "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of {cfg.sft_batch}"
    )
    optimizer = make_optimizer(model, cfg)
    start = folder.resume(model, optimizer)
    interrupt = Interrupt()
    bar = tqdm(range(start, steps), "sft", initial=start, total=steps, disable=rank() > 0, mininterval=1)
    for step in bar:
        began = time.perf_counter()
        batch = [kept[i] for i in batch_indices(len(kept), cfg.sft_batch, step, cfg.seed)]
        N = sum(len(y) for _, y in batch)  # tokens of the batch over all ranks: the one division
        mine = [batch[i] for i in deal([len(x) + len(y) for x, y in batch], world())[rank()]]
        # NOT IN PAPER: the loss stands on the response only, and every token of the batch weighs the same
        *sums, _ = accumulate_gradient(model, mine, [1.0] * len(mine), [1 / N] * len(mine), cfg)
        loss, _, entropy = all_sum(sums)
        lr = learning_rate(step, steps, cfg.sft_lr, cfg.warmup)
        norm = update(model, optimizer, lr, cfg)
        seconds = time.perf_counter() - began
        folder.append("metrics.jsonl", dict(step=step, loss=loss, entropy=entropy / N, grad_norm=norm, lr=lr, tokens=N))
        folder.append("timings.jsonl", dict(step=step, train=seconds, tokens=N))
        bar.set_postfix_str(f"loss {loss:.3f} entropy {entropy / N:.3f} {N / seconds:,.0f} tokens/s", refresh=False)
        if folder.after_step(step, steps, 100, cfg.sft_save_every, interrupt, model, tokenizer, optimizer):
            return
    interrupt.release()
    finish_stage(folder, steps, make_engine(folder.source(), model, tokenizer, cfg), tests, cfg, "rl")


def finish_stage(folder: RunFolder, steps: int, engine, tests, cfg: Config, next_stage: str):
    """Say what was reached, where it lies and what comes next."""
    _, records = evaluate(engine, *tests, 1, cfg)
    value, error = mean_and_error([[r["right"]] for r in records])
    if not any(row.get("kind") == "held-out" for row in folder.read("samples.jsonl")):
        folder.append("samples.jsonl", *(dict(step=steps - 1, kind="held-out", **r) for r in records[:: max(1, len(records) // 8)]))
    print0(
        f"held-out pass@1 {100 * value:.1f} +- {100 * error:.1f} % ({len(records)} problems, one sample each at T = {cfg.eval_temperature});"
        f" checkpoint, metrics and curves.png in {folder.path}"
    )
    carried = ("preset", "name", "out", "seed", "test", "prompt_template", "max_prompt", "max_new", "dtype", "device")
    preset = Config(**PRESETS[cfg.preset] | dict(preset="tiny"))
    flags = "".join(
        f" --{k.replace('_', '-')} {shlex.quote(str(getattr(cfg, k)))}" for k in carried if getattr(cfg, k) != getattr(preset, k)
    )
    print0(f"next: torchrun t1.py --stage {next_stage}{flags}")


# ----------------------------------------------------------------------------------------------------------------------
# Stage rl (paper section 2)
# ----------------------------------------------------------------------------------------------------------------------


def run_rl(cfg: Config):
    folder = RunFolder(cfg)
    cold = checkpoints(folder.path.parent / "sft")
    source = folder.source() or cfg.model or newest(cold)
    if not source:
        raise Misuse(f"no SFT checkpoint beside {folder.path}: run --stage sft first, or give --model")
    problems = read_rows(cfg.data, "rl") if cfg.data else data_prep.embedded_problems("train")
    whole, tokenizer = load_whole(source, cfg)
    prompts, tests = encode_prompts(problems, tokenizer, cfg), encoded_tests(tokenizer, cfg)
    folder.create(source)
    print0(f"{len(problems)} problems; the policy starts from {source}")
    anchor = None
    if cfg.anchor != "none":
        anchor = shard(copy.deepcopy(whole) if world() == 1 else whole, cfg, cfg.offload_anchor).requires_grad_(False)
    model = shard(whole, cfg, cfg.offload_optimizer)
    del whole
    optimizer = make_optimizer(model, cfg)
    start = folder.resume(model, optimizer, anchor)
    engine = make_engine(source, model, tokenizer, cfg)
    interrupt = Interrupt()
    bar = tqdm(range(start, cfg.rl_steps), "rl", initial=start, total=cfg.rl_steps, disable=rank() > 0)
    for step in bar:
        clock = [time.perf_counter()]
        # 1. oversample: K responses to each of P prompts; 2. reward: right answer, -1 for unexpected patterns
        batch = batch_indices(len(problems), cfg.prompts, step, cfg.seed)
        seeds = [seed_for(cfg.seed, "rollout", step, place) for place in range(cfg.prompts)]
        rollouts, records = roll_out(
            engine, [problems[i] for i in batch], [prompts[i] for i in batch], cfg.k, seeds, cfg, cfg.temperature, cfg.min_p
        )
        rewards = torch.tensor([r["reward"] for r in records]).view(-1, cfg.k)  # (P, K)
        engine.sleep()
        clock.append(time.perf_counter())
        # 3. advantage: leave-one-out reward, centred KL to the anchor. Every rank knows the whole batch and takes its share of the work
        rows = [(r.prompt, r.ids) for r in rollouts]
        mine = deal([len(x) + len(y) for x, y in rows], world())[rank()]
        take = lambda x: [x[i] for i in mine]
        kl = np.zeros(len(rows))
        if anchor is not None:
            sampled = np.array([sum(rollouts[i].logprobs) for i in mine])
            kl[mine] = sampled - [x.double().sum().item() for x in response_logprobs(anchor, take(rows), cfg, cfg.temperature, cfg.min_p)]
        kl = torch.tensor(all_sum(kl.tolist()), dtype=torch.float32).view(-1, cfg.k)  # d_i, (P, K)
        advantages = advantages_of(rewards, kl, cfg.kl_coef, cfg.kl_center).flatten().tolist()  # (P, K) -> (B,)
        clock.append(time.perf_counter())
        # 4. one update on these rollouts, entropy bonus included; the anchor follows
        N, B = sum(len(y) for _, y in rows), len(rows)
        weights = [1 / N if cfg.loss_norm == "tokens" else 1 / (B * len(y)) for _, y in rows]
        *sums, gaps = accumulate_gradient(
            model,
            take(rows),
            take(advantages),
            take(weights),
            cfg,
            cfg.entropy_coef,
            cfg.temperature,
            cfg.min_p,
            sampled=take([r.logprobs for r in rollouts]),
        )
        _, nll, entropy, gap = all_sum([*sums, gaps.sum().item()])
        worst_gap = max(gather([np.quantile(gaps.numpy(), 0.99).item()]))
        flat = np.mean([(r == r[0]).all().item() for r in rewards]).item()  # groups that teach nothing: their advantages are zero, KL aside
        lr = learning_rate(step, cfg.rl_steps, cfg.rl_lr, cfg.warmup)
        if flat < 1:
            norm = update(model, optimizer, lr, cfg)
            if cfg.anchor == "ema":
                ema_update_(anchor, model, cfg.ema_decay)
        else:
            norm = 0.0
            optimizer.zero_grad(set_to_none=True)
        if engine.load(model):  # a step without an update, too, has to wake the engine
            check_push(engine, model, prompts[0], cfg)
        clock.append(time.perf_counter())
        # 5. say what happened
        row = dict(step=step, **means(records), kl=kl.mean().item(), entropy=entropy / N, nll=nll / N, logprob_gap=gap / N)
        row |= dict(logprob_gap_p99=worst_gap, flat_groups=flat, skipped=flat == 1, grad_norm=norm, lr=lr, tokens=N)
        report_step(folder, bar, row, clock, records, cfg)
        if folder.after_step(step, cfg.rl_steps, 10, cfg.rl_save_every, interrupt, model, tokenizer, optimizer, anchor):
            return
    interrupt.release()
    finish_stage(folder, cfg.rl_steps, engine, tests, cfg, "eval")


def report_step(folder, bar, row, clock, records, cfg):
    """The console line, metrics.jsonl, timings.jsonl (seconds differ from run to run and stand apart), and a few samples."""
    generate, score, train = np.diff(clock).tolist()
    folder.append("metrics.jsonl", row)
    folder.append("timings.jsonl", dict(step=row["step"], generate=generate, score=score, train=train, tokens=row["tokens"]))
    if row["step"] % 10 == 0:
        by_reward = sorted(records, key=lambda r: r["reward"])
        for kind, r in (("best", by_reward[-1]), ("worst", by_reward[0]), ("longest", max(records, key=lambda r: r["length"]))):
            folder.append("samples.jsonl", dict(step=row["step"], kind=kind, **r))
    total = generate + score + train
    bar.set_postfix_str(
        f"reward {row['reward']:.2f} right {row['accuracy']:.2f} length {row['length']:.0f} entropy {row['entropy']:.3f} kl {row['kl']:.2f} "
        f"overlong {row['overlong']:.2f} repeat {row['repetition']:.2f} flat {row['flat_groups']:.2f} {row['tokens'] / total:,.0f} tokens/s "
        f"({100 * generate / total:.0f} % generate and verify, {100 * score / total:.0f} % anchor, {100 * train / total:.0f} % train)"
    )
    for name, strange, what in (
        (
            "overlong",
            row["overlong"] > 0.5,
            f"of the responses reached --max-new {cfg.max_new} and teach nothing but brevity; raise --max-new",
        ),
        ("ungraded", row["ungraded"] > 0.01, "of the answers made the grader give up (they count as wrong); look at samples.jsonl"),
        (
            "skipped",
            row["skipped"],
            "step without an update: all K rewards of every prompt are equal; take easier or harder problems, or a larger --k",
        ),
        ("logprob_gap", row["logprob_gap"] > 0.02, "nats a token between engine and trainer: nearly two policies; see --tis-cap"),
        ("entropy", row["entropy"] < cfg.entropy_floor, "nats a token, below --entropy-floor; raise --temperature or --entropy-coef"),
        ("kl", row["kl"] > cfg.kl_ceiling, "nats a response, beyond --kl-ceiling; lower --rl-lr, or raise --kl-coef"),
    ):
        if strange:
            print0(f"step {row['step']}: {name} {float(row[name]):.3g} {what}")


# ----------------------------------------------------------------------------------------------------------------------
# Stage eval: pass@1, and accuracy against thinking budget (paper section 3)
# ----------------------------------------------------------------------------------------------------------------------


def encoded_tests(tokenizer, cfg: Config) -> tuple[list[dict], list[list[int]]]:
    """The held-out problems and their prompts."""
    problems = held_out(cfg)
    return problems, encode_prompts(problems, tokenizer, cfg)


def held_out(cfg: Config) -> list[dict]:
    return read_rows(cfg.test, "eval") if cfg.test else data_prep.embedded_problems("test")


def test_sets(cfg: Config) -> list[tuple[str, list[dict], int]]:
    """(name, problems, samples per problem) of every set to evaluate on: the benchmarks asked for, or the run's own test set."""
    if not cfg.benchmarks:
        return [(cfg.test or "embedded", held_out(cfg), cfg.eval_samples or 4)]
    sets = []
    for name in cfg.benchmarks.split(","):
        path = Path(cfg.benchmark_dir) / f"{name}.jsonl"
        if not path.exists():
            own = "--gpqa YOUR_COPY.csv " if name == "gpqa" else ""
            raise Misuse(f"--benchmarks {name}: no {path}; write it with: python data_prep.py benchmarks {own}--out {cfg.benchmark_dir}")
        sets.append((name, read_rows(str(path), "eval"), cfg.eval_samples or (32 if name.startswith("aime") else 1)))
    return sets


def mean_and_error(values: list[list[float]]) -> tuple[float, float]:
    """Mean over problems of the mean over each problem's samples, and its standard error.

    The error is over PROBLEMS: the samples of one problem are not independent.
    """
    per_problem = np.array([np.mean(v) for v in values], dtype=float)
    return per_problem.mean().item(), (per_problem.std(ddof=1) / len(per_problem) ** 0.5).item() if len(per_problem) > 1 else float("nan")


def with_error(values: list[list[float]]) -> list:
    """`mean_and_error` as it stands in JSON: null for the error of a single value."""
    mean, error = mean_and_error(values)
    return [mean, error if math.isfinite(error) else None]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k), the unbiased estimate."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list[str | None]) -> int | None:
    """Index of the first response with the most frequent answer; a tie goes to the answer that appeared first. None: no answer at all.

    Two answers are one if `verify.is_equal` says so; a response without an answer has no vote.
    """
    votes = {}  # index of the first answer of its kind -> votes
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in votes if verify.is_equal(answer, answers[j])), i)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=votes.get) if votes else None  # max takes the first of equals


def maj_at_k(answers: list[str | None], right: list[bool], k: int) -> float:
    """How often the majority of k samples is right, over the n // k disjoint groups of k consecutive samples: an unbiased estimate."""
    groups = [range(i, i + k) for i in range(0, len(answers) - k + 1, k)]
    chosen = [(group, majority([answers[i] for i in group])) for group in groups]
    return sum(at is not None and right[group[at]] for group, at in chosen) / len(groups)


def fingerprint(model, problems, prompts, samples: int, cfg: Config) -> str:
    """Names a set of responses by what it depends on: problems, settings, and a sample of every weight tensor."""
    settings = [getattr(cfg, f) for f in ("seed", "max_new", "eval_temperature", "rollout_rows", "dtype")]
    digest = hashlib.blake2b(repr((settings, samples, prompts, [p["answer"] for p in problems])).encode(), digest_size=8)
    for _, w in full_weights(model):
        digest.update(w.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def evaluate(engine, problems: list[dict], prompts: list[list[int]], samples: int, cfg: Config, path: Path | None = None, about=None):
    """-> rollouts and their records, `samples` consecutive ones a problem.

    With `path` every response is kept there, with `about` and its "key", a chunk of `rollout_rows` at a time. What lies there is not
    generated again, and seeds are stateless: a killed evaluation that goes on ends with the same bits.
    """
    on_disk = from_rank0(read_log(path) if path and rank() == 0 else [])  # what one rank sees, all see
    kept = {(row["number"], row["sample"]): row for row in on_disk if row["key"] == about["key"]}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
    seeds = [seed_for(cfg.seed, "eval", i) for i in range(len(prompts))]
    size, result = max(1, cfg.rollout_rows // samples) * world() if path else len(order), {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        asked, cells = [problems[i] for i in part], [(i, j) for i in part for j in range(samples)]
        if all(cell in kept for cell in cells):
            rollouts = [Rollout(prompts[i], kept[i, j]["ids"], [], kept[i, j]["finished"]) for i, j in cells]
            records = judge(rollouts, asked, engine.tokenizer, cfg)
        else:
            take = lambda x: [x[i] for i in part]
            rollouts, records = roll_out(engine, asked, take(prompts), samples, take(seeds), cfg, cfg.eval_temperature)
        result |= zip(cells, zip(rollouts, records))
        if path and rank() == 0:
            with open(path, "a", encoding="utf-8") as f:
                for (i, j), r, record in zip(cells, rollouts, records):
                    if (i, j) not in kept:
                        row = about | dict(number=i, sample=j, finished=r.finished) | record | dict(ids=r.ids)
                        f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return map(list, zip(*(result[i, j] for i in range(len(prompts)) for j in range(samples))))


def thought_length(ids: list[int], tokenizer) -> int | None:
    """Tokens up to and including the one that completes `</think>`; None if it never comes. Ids are cut, text is never re-encoded."""
    if "</think>" not in tokenizer.decode(ids):
        return None
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if "</think>" in tokenizer.decode(ids[:middle]) else (middle + 1, high)
    return low


def words_ids(words: str, tokenizer) -> list[int]:
    return tokenizer(words.replace("\\n", "\n"), add_special_tokens=False).input_ids


def cut_ids(engine, tokenizer, rollouts: list[Rollout], budget: int, cfg: Config, lengths=None) -> list[list[int]]:
    """The responses' ids had their thoughts been cut after `budget` tokens (paper section 3); `lengths`: their `thought_length`s.

    A thought that ended within the budget keeps its own answer. Another is cut, closed with `answer_prefix`, and `engine` (the policy,
    or another model with its tokenizer) writes the answer from it. NOT IN PAPER: the words of the prefix, and the answer: greedy and short.
    """
    prefix = words_ids(cfg.answer_prefix, tokenizer)
    lengths = lengths or [thought_length(r.ids, tokenizer) for r in rollouts]
    late = lambda r, n: len(r.ids) > budget or not r.finished if n is None else n > budget  # a thought without an end is always cut
    cut = [i for i, (r, n) in enumerate(zip(rollouts, lengths)) if late(r, n)]
    prompts = [rollouts[i].prompt + rollouts[i].ids[:budget] + prefix for i in cut]
    answers = engine.generate(prompts, 1, [0] * len(prompts), cfg.answer_tokens, temperature=0.0)
    ids = [r.ids for r in rollouts]
    for i, answer in zip(cut, answers):
        ids[i] = ids[i][:budget] + prefix + answer.ids
    return ids


def cut_and_answer(engine, tokenizer, rollouts: list[Rollout], budget: int, cfg: Config, lengths=None) -> list[str]:
    """The texts of `cut_ids`: the response each rollout would have given with a thought of at most `budget` tokens."""
    return tokenizer.batch_decode(cut_ids(engine, tokenizer, rollouts, budget, cfg, lengths), skip_special_tokens=True)


def before_end(ids: list[int], tokenizer) -> list[int]:
    """The tokens of a thought before its `</think>`: the longest run of whole tokens whose text ends before it."""
    text = tokenizer.decode(ids).partition("</think>")[0]
    n = thought_length(ids, tokenizer) or len(ids)
    while not text.startswith(tokenizer.decode(ids[:n])):
        n -= 1
    return ids[:n]


def force_budget(engine, rollouts: list[Rollout], budget: int, cfg: Config) -> list[Rollout]:
    """Budget forcing: the same thoughts, each made to go on to `budget` tokens by `wait_words` in place of every `</think>`.

    Cut at a smaller budget they are the thoughts forced to that one: one set of generations serves all. After Muennighoff et al.,
    s1: Simple test-time scaling (arXiv 2501.19393); the T1 paper does not do it. Ids only.
    """
    tokenizer, wait = engine.tokenizer, words_ids(cfg.wait_words, engine.tokenizer)

    def opened(ids, finished):  # a thought that ended, or a response that did, waits instead; one that was cut off is as it is
        ids = ids[:-1] if finished else ids
        thought = before_end(ids, tokenizer)
        return thought + wait if finished or len(thought) < len(ids) else thought

    thoughts, turn = [opened(r.ids, r.finished) for r in rollouts], 0
    while short := [i for i, thought in enumerate(thoughts) if len(thought) < budget]:
        room = budget - min(len(thoughts[i]) for i in short)
        turn += 1
        seeds = [seed_for(cfg.seed, "forced", turn, i) for i in short]
        new = from_rank0(engine.generate([rollouts[i].prompt + thoughts[i] for i in short], 1, seeds, room, cfg.eval_temperature))
        for i, r in zip(short, new):
            thoughts[i] = opened(thoughts[i] + r.ids, r.finished)
    return [Rollout(r.prompt, thought[:budget], [], False) for r, thought in zip(rollouts, thoughts)]


def measure(model, engine, answerer, test: tuple, about: dict, last: bool, folder: Path, cfg: Config) -> dict:
    """Everything that results.json says of one checkpoint on one test set (README's glossary says what each is).

    Lists are [k or budget, value, standard error over problems] and, for inference scaling, mean tokens spent per problem.
    """
    tokenizer, (test_name, problems, samples) = engine.tokenizer, test
    prompts = encode_prompts(problems, tokenizer, cfg)
    golds = [p["answer"] for p in problems]
    budgets = sorted({int(b) for b in cfg.budgets.split(",") if b})

    def responses(n):
        key = dict(key=fingerprint(model, problems, prompts, n, cfg), **about, test=test_name)
        rollouts, records = evaluate(engine, problems, prompts, n, cfg, folder / "responses.jsonl", key)
        return rollouts, records, key

    def at_each_budget(rollouts, lengths, n):
        points = []
        for budget in budgets:
            ids = cut_ids(answerer, tokenizer, rollouts, budget, cfg, lengths)
            right = verify.grade(tokenizer.batch_decode(ids, skip_special_tokens=True), [g for g in golds for _ in range(n)])
            points.append([budget, *with_error(grouped(right, n)), float(np.mean([len(y) for y in ids]))])
        return points

    def majorities(records, n):
        answers, right = (grouped([r[field] for r in records], n) for field in ("answer", "right"))
        return [[k, *with_error([[maj_at_k(a, r, k)] for a, r in zip(answers, right)])] for k in powers_of_two(n)]

    rollouts, records, key = responses(samples)
    right = grouped([r["right"] for r in records], samples)
    value, error = with_error(right)
    result = dict(**key, problems=len(problems), samples=samples, pass_at_1=value, standard_error=error, **means(records))
    result["ungradable"] = float(np.mean([r["answer"] is None or not verify.is_readable(r["answer"]) for r in records]))
    result["pass_at_k"] = [[k, *with_error([[pass_at_k(samples, sum(r), k)] for r in right])] for k in powers_of_two(samples)]
    result["maj_at_k"] = majorities(records, samples)
    if test_name == "embedded":
        habits = Counter((data_prep.habit_of(r["response"]), r["right"]) for r in records)
        count = {h: habits[h, True] + habits[h, False] for h in data_prep.HABITS}
        result["habits"] = {h: [n / len(records), habits[h, True] / n] for h, n in count.items() if n}  # share, right among them
    if budgets:
        result["scaling"] = at_each_budget(rollouts, [thought_length(r.ids, tokenizer) for r in rollouts], samples)
    if budgets and cfg.spend_samples and last:
        forced = force_budget(engine, rollouts[::samples], budgets[-1], cfg)  # one thought a problem
        result["forced"] = at_each_budget(forced, [None] * len(forced), 1)
        _, records, _ = responses(cfg.spend_samples)
        result["parallel"] = [[*point, point[0] * means(records)["length"]] for point in majorities(records, cfg.spend_samples)]
    return result


def grouped(values, n: int) -> list[list]:
    """Consecutive values, n a problem -> a list a problem."""
    return [list(values[i : i + n]) for i in range(0, len(values), n)]


def powers_of_two(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length())]


def run_eval(cfg: Config):
    base = Path(cfg.out) / (cfg.name or cfg.preset)
    folders = [c for c in cfg.checkpoint.split(",") if c] or [cfg.model] * bool(cfg.model)
    folders = folders or [str(p) for p in checkpoints(base / "sft")[-1:] + checkpoints(base / "rl")]
    if not folders:
        raise Misuse(f"no checkpoint in {base}: run --stage sft and --stage rl first, or give --checkpoint or --model")
    for path in folders if cfg.checkpoint else ():
        if not (Path(path) / "config.json").exists():
            raise Misuse(f"--checkpoint {path}: no such checkpoint (no config.json there)")
    names = [" ".join([*Path(p).parts[-2:-1], Path(p).name.removeprefix("checkpoint-")]) for p in folders]
    names = names if len(set(names)) == len(names) else folders
    tests = test_sets(cfg)
    answer_model, answer_tokenizer = load_policy(cfg.answer_model, cfg) if cfg.answer_model else (None, None)
    folder, engine = base / "eval", None
    results = []
    for path, name in zip(folders, names):
        whole = model = None  # one checkpoint at a time
        if isinstance(engine, TorchEngine) and world() == 1:
            engine.model = None
        whole, tokenizer = load_whole(path, cfg)
        model = shard(whole, cfg)
        if answer_model and answer_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise Misuse(
                f"--answer-model {cfg.answer_model}: its tokenizer is not that of {path}, and a thought is handed over as token ids"
            )
        if engine is None:
            engine = make_engine(path, model, tokenizer, cfg)
            answerer = make_engine(cfg.answer_model, answer_model, tokenizer, cfg) if answer_model else engine
        else:
            engine.load(model)
        for test in tests:
            encode_prompts(test[1], tokenizer, cfg)  # a prompt that is too long is said before anything is written
        start_log(folder)
        for test in tests:
            result = measure(model, engine, answerer, test, dict(name=name, checkpoint=path), path == folders[-1], folder, cfg)
            results.append(result)
            print0(
                f"{path}, {test[0]}: pass@1 {percent(result['pass_at_1'], result['standard_error'])} %, "
                f"{result['length']:.0f} tokens, over-long {100 * result['overlong']:.1f} %"
                + "".join(f", within {b} tokens {100 * v:.1f}" for b, v, *_ in result.get("scaling", []))
            )
    if rank() == 0:
        about = dict(seed=cfg.seed, temperature=cfg.eval_temperature, max_new=cfg.max_new, answer_model=cfg.answer_model)
        write_json(folder / "results.json", about | dict(checkpoints=results))
        write_text(folder / "results.md", results_table(results))
        draw_results(folder)
    print0(f"results and pictures in {folder}")


def start_log(folder: Path):
    """Make the folder; what a kill left of a last line is cut off, so that the next row begins a line of its own."""
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "responses.jsonl", "ab+") as f:
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        except OSError as e:
            raise Misuse(f"{folder}: cannot be written ({e.strerror}); choose another --out")
    agree()


PAPER_TABLE = {  # pass@1 in %, the paper's results
    "T1-SFT (GLM-4-9B)": (60.2, 4.1, 20.0, 37.2),
    "T1 (GLM-4-9B)": (65.8, 9.2, 24.4, 38.1),
    "T1-SFT (Qwen2.5-14B)": (77.2, 10.3, 28.5, 42.3),
    "T1 (Qwen2.5-14B)": (87.4, 30.5, 38.6, 48.3),
    "T1-SFT (Qwen2.5-32B)": (83.4, 24.9, 34.6, 49.5),
    "T1 (Qwen2.5-32B)": (92.4, 50.6, 49.6, 56.1),
}
PAPER_TESTS = ("math500", "aime24", "omni500", "gpqa")


def percent(value: float, error: float | None = None) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def results_table(results: list[dict]) -> str:
    """results.md: one row a checkpoint and test set, and, for the paper's benchmarks, the paper's rows under ours."""
    lines = ["| checkpoint | test | problems x samples | pass@1 | pass@k | maj@k | tokens | over-long | ungradable |", "|" + "---|" * 9]
    for r in results:
        k, *best = r["pass_at_k"][-1]
        lines.append(
            f"| {r['name']} | {r['test']} | {r['problems']} x {r['samples']} | {percent(r['pass_at_1'], r['standard_error'])} | k = {k}: {percent(*best)} "
            f"| k = {r['maj_at_k'][-1][0]}: {percent(*r['maj_at_k'][-1][1:])} | {r['length']:.0f} | {percent(r['overlong'])} | {percent(r['ungradable'])} |"
        )
    tests = [t for t in dict.fromkeys(r["test"] for r in results) if t in PAPER_TESTS]
    if tests:
        ours = {}
        for r in results:
            ours.setdefault(r["name"], {})[r["test"]] = percent(r["pass_at_1"], r["standard_error"])
        lines += ["", f"| pass@1 | {' | '.join(tests)} |", "|" + "---|" * (len(tests) + 1)]
        lines += [f"| {name} | {' | '.join(row.get(t, '') for t in tests)} |" for name, row in ours.items()]
        for name, row in PAPER_TABLE.items():
            lines.append(f"| paper: {name} | {' | '.join(str(row[PAPER_TESTS.index(t)]) for t in tests)} |")
        lines += [
            "",
            "The paper's rows: MATH-500 and AIME 2024 (mean of 32 samples) as here; its own 500 of Omni-MATH, which are not published; GPQA.",
        ]
    lines += ["", "In %; ± is the standard error over problems. Ungradable: no box after the thought, or none that verify.py can read."]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Stage ablate: the ledger, every claim of the paper over switches and seeds
# ----------------------------------------------------------------------------------------------------------------------

HOT = dict(rl_lr=1e-3)  # so far and so fast does the policy move here that KL and penalties have something to hold
# variant -> (changed fields, variant it is held against, sign of the claimed difference in held-out pass@1 (0: nothing is claimed), claim)
VARIANTS = {
    "base": ({}, "", 0, ""),
    "k4": (dict(k=4), "base", -1, "fewer samples a prompt are worse (K = 4, equal prompts)"),
    "k64": (dict(k=64), "base", +1, "more samples a prompt are better (K = 64, equal prompts)"),
    "k4-samples": (dict(k=4, prompts=128), "base", -1, "fewer samples a prompt are worse (K = 4, equal samples)"),
    "k64-samples": (dict(k=64, prompts=8), "base", +1, "more samples a prompt are better (K = 64, equal samples)"),
    "t0.9": (dict(temperature=0.9), "base", -1, "T = 0.9 is worse than a temperature above 1"),
    "t1.0": (dict(temperature=1.0), "base", -1, "T = 1.0 is worse than a temperature above 1"),
    "t1.2": (dict(temperature=1.2), "base", +1, "T = 1.2 is the best temperature"),
    "t1.3": (dict(temperature=1.3), "t1.2", -1, "T above 1.2 hurts"),
    "t1.3-minp": (dict(temperature=1.3, min_p=0.05), "t1.3", 0, "min-p at a high temperature (no direction stated)"),
    "entropy0": (dict(entropy_coef=0.0), "base", -1, "the entropy bonus helps"),
    "anchor-fixed": (dict(anchor="fixed"), "base", -1, "a moving anchor is better than a fixed one"),
    "anchor-none": (dict(anchor="none"), "base", -1, "a KL term helps"),
    "nocenter": (dict(kl_center=False), "base", -1, "centring the KL helps"),
    "penalties-off": (dict(penalties=False), "base", -1, "the penalties help"),
    "cold": (dict(traces="correct-only"), "base", -1, "a cold start on trial and error is better than on correct-only traces"),
    "responses": (dict(loss_norm="responses"), "base", 0, "each response divided by its own length (nothing stated)"),
    "hot": (HOT, "base", 0, "five times the learning rate: ground on which a run can collapse (nothing stated)"),
    "hot-kl": (HOT | dict(kl_coef=0.05), "hot", +1, "a KL term helps, where a run can collapse"),
    "hot-kl-nocenter": (HOT | dict(kl_coef=0.05, kl_center=False), "hot-kl", -1, "centring the KL helps, where a run can collapse"),
    "hot-penalties-off": (HOT | dict(penalties=False), "hot", -1, "the penalties help, where a run can collapse"),
}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 % quantile for 1 to 9 degrees of freedom; then 2.23


def verdict(differences: list[float], sign: int) -> str:
    """What paired differences (one a seed, variant minus the one it is held against) say of a claim that they have this sign.

    Resolved if zero lies outside the 95 % interval mean +- t(n - 1) sd / sqrt(n); then the mean's sign decides.
    """
    n = len(differences)
    mean, error = mean_and_error([[d] for d in differences]) if n > 1 else (0.0, 0.0)
    if n < 2 or abs(mean) <= (T95 + (2.23,))[min(n - 2, 9)] * error:
        return "not resolved at this scale"
    if sign == 0:
        return "higher" if mean > 0 else "lower"
    return "holds" if mean * sign > 0 else "does not hold"


def run_ablate(cfg: Config):
    """The runs of the ledger, each an ordinary folder OUT/NAME/VARIANT-seedS; finished ones are not run again."""
    base = Path(cfg.out) / (cfg.name or "ablate")
    chosen = [v for v in cfg.variants.split(",") if v] or list(VARIANTS)
    for seed in map(int, cfg.seeds.split(",")):
        for variant in dict.fromkeys(["base", *chosen]):
            if not run_variant(base, variant, seed, cfg):
                return print0("interrupted; the same command goes on")
    write_ledger(base)
    print0((base / "ledger.md").read_text(encoding="utf-8") if rank() == 0 else "")


def run_variant(base: Path, variant: str, seed: int, cfg: Config) -> bool:
    """One run: RL from the SFT checkpoint of the base run of its seed (or its own, where the traces differ), then evaluation.

    -> False if a signal asked for an end. The folder keeps the last checkpoint of each stage, without the trainer's state.
    """
    name, changes = f"{variant}-seed{seed}", VARIANTS[variant][0]
    own_start = variant == "base" or "traces" in changes
    fixed = dict(out=str(base), name=name, seed=seed, budgets="", spend_samples=0, keep=1, keep_every=0)
    one = dataclasses.replace(cfg, **fixed | changes)
    run, start = base / name, base / (name if own_start else f"base-seed{seed}") / "sft"
    if not (run / "eval" / "results.json").exists() and not (run / "stopped.json").exists():
        print0(f"{name}: {changes or 'nothing changed'}")
        try:
            for stage in ["sft"] * own_start + ["rl"]:
                if stage == "sft":
                    run_sft(dataclasses.replace(one, stage=stage))
                else:
                    run_rl(dataclasses.replace(one, stage=stage, model=newest(checkpoints(start))))
                if not any(row.get("kind") == "held-out" for row in read_log(run / stage / "samples.jsonl")):
                    return False
            ends = [newest(checkpoints(start))] * own_start + [newest(checkpoints(run / "rl"))]
            run_eval(dataclasses.replace(one, stage="eval", checkpoint=",".join(ends)))
        except Misuse:
            raise
        except Stop as e:  # a run that cannot go on is a result
            print0(f"{name} stopped: {e}")
            if rank() == 0:
                write_json(run / "stopped.json", dict(reason=str(e)))
    for path in [p for stage in ("sft", "rl") for p in checkpoints(run / stage)] if rank() == 0 else ():
        sizes = data_prep.read_json(path / "complete.json")
        write_json(path / "complete.json", {file: size for file, size in sizes.items() if not file.startswith("trainer")})
        shutil.rmtree(path / "trainer", ignore_errors=True)
    agree()
    return True


def read_runs(base: Path) -> list[dict]:
    """What the finished runs under `base` reached: one dict a run, from results.json, rl/metrics.jsonl and rl/config.json."""
    results = {path.parts[-3]: data_prep.read_json(path) for path in base.glob("*/eval/results.json")}
    tail = lambda path: Path(path).parts[-3:]  # RUN/sft/checkpoint-N, wherever the folder stands now
    starts = {tail(c["checkpoint"]): c["pass_at_1"] for r in results.values() for c in r["checkpoints"]}
    runs = []
    for path in sorted(base.glob("*-seed*/rl/metrics.jsonl")):
        name = path.parts[-3]
        variant, _, seed = name.rpartition("-seed")
        stopped = (base / name / "stopped.json").exists()
        if variant not in VARIANTS or not seed.isdigit() or not (stopped or name in results):
            continue
        run = dict(variant=variant, seed=int(seed), stopped=stopped)
        if not stopped:
            end = results[name]["checkpoints"][-1]
            source = data_prep.read_json(path.parent / "config.json").get("started_from", "")
            steps, mean_of = read_log(path), lambda name, rows: float(np.mean([row[name] for row in rows]))
            run |= {k: end.get(k, results[name].get(k)) for k in ("pass_at_1", "length", "overlong", "problems", "samples")}
            run |= dict(start=starts.get(tail(source)), entropy=mean_of("entropy", steps[-5:]))
            run |= dict(fell=mean_of("accuracy", steps[-5:]) < mean_of("accuracy", steps[:5]))
        below = not stopped and run["start"] is not None and run["pass_at_1"] < run["start"]
        runs.append(run | dict(collapsed=stopped or run["fell"] or below or run["overlong"] > 0.5))
    return runs


def ledger_of(runs: list[dict]) -> tuple[list[dict], list[dict]]:
    """-> a row a variant (means over seeds, each [mean, standard error]) and a row a claim (paired difference, verdict)."""
    by = {v: {r["seed"]: r for r in runs if r["variant"] == v and not r["stopped"]} for v in VARIANTS}
    paired = lambda v, against: [by[v][s]["pass_at_1"] - by[against][s]["pass_at_1"] for s in sorted(by[v].keys() & by[against].keys())]
    over_seeds = lambda values: with_error([[x] for x in values]) if values else None
    rows, claims = [], []
    for variant, (changes, against, sign, claim) in VARIANTS.items():
        finished = list(by[variant].values())
        tried = [r for r in runs if r["variant"] == variant]
        if tried:
            row = dict(variant=variant, changes=changes, runs=len(tried), collapsed=sum(r["collapsed"] for r in tried))
            row |= {field: over_seeds([r[field] for r in finished]) for field in ("pass_at_1", "length", "entropy", "overlong")}
            row |= dict(each=[r["pass_at_1"] for r in finished], start=over_seeds([r["start"] for r in finished if r["start"] is not None]))
            rows.append(row | dict(gain=over_seeds(paired(variant, "base")) if variant != "base" else None))
            if against:
                differences = paired(variant, against)
                claims.append(
                    dict(claim=claim, variant=variant, against=against, differences=differences, verdict=verdict(differences, sign))
                )
    return rows, claims


def write_ledger(base: Path):
    """ledger.json, ledger.md and ledger.png, from the finished runs under `base` alone."""
    runs = read_runs(base)
    if rank() > 0 or not runs:
        return
    rows, claims = ledger_of(runs)
    done = next((r for r in runs if not r["stopped"]), {})
    about = f"{len(runs)} runs, seeds {', '.join(map(str, sorted({r['seed'] for r in runs})))}; {done.get('problems')} held-out problems x {done.get('samples')} samples"
    write_json(base / "ledger.json", dict(about=about, runs=runs, variants=rows, claims=claims))
    spread = lambda pair, scale=1.0, digits=1: (
        "" if pair is None else f"{scale * pair[0]:.{digits}f}" + (f" ± {scale * pair[1]:.{digits}f}" if pair[1] is not None else "")
    )
    lines = [about + "; mean ± standard error over seeds, gains paired by seed.", ""]
    lines += [
        "| run | changed | seeds | pass@1, % | gain over base, points | tokens | entropy, nats | over-long, % | collapsed |",
        "|" + "---|" * 9,
    ]
    if rows[0]["variant"] == "base" and rows[0]["start"]:
        lines.append(f"| SFT start | | {len(rows[0]['each'])} | {spread(rows[0]['start'], 100)} | | | | | |")
    for r in rows:
        changed = ", ".join(f"{k} {v}" for k, v in r["changes"].items())
        lines.append(
            f"| {r['variant']} | {changed} | {r['runs']} | {spread(r['pass_at_1'], 100)} | {spread(r['gain'], 100)} | {spread(r['length'], 1, 0)} "
            f"| {spread(r['entropy'], 1, 3)} | {spread(r['overlong'], 100)} | {r['collapsed']} of {r['runs']} |"
        )
    lines += ["", "| claim | runs compared | difference, points | verdict |", "|---|---|---|---|"]
    for c in claims:
        difference = spread(with_error([[d] for d in c["differences"]]), 100) if c["differences"] else ""
        lines.append(
            f"| {c['claim']} | {c['variant']} against {c['against']}, {len(c['differences'])} seeds | {difference} | {c['verdict']} |"
        )
    lines += [
        "",
        "A claim holds, or does not, if zero lies outside the 95 % interval of the paired differences (Student's t over seeds); else it is not resolved at this scale. "
        "Of twenty such intervals one is wrong on average. Collapsed: held-out pass@1 below that of the SFT start, accuracy in training lower in the last five "
        "steps than in the first, more than half of the held-out responses over-long, or a run that stopped. Entropy: mean of the last five steps, at the run's own temperature.",
    ]
    write_text(base / "ledger.md", "\n".join(lines) + "\n")
    draw_ledger(base / "ledger.png", rows, about)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: each is drawn from files of a run's folder alone, so that --stage plot draws them all again
# ----------------------------------------------------------------------------------------------------------------------

PANELS = {  # stage -> picture -> panels: (label with unit, columns of metrics.jsonl)
    "sft": {"curves": [("loss (nats a token)", ["loss"]), ("entropy (nats a token)", ["entropy"]), ("gradient norm", ["grad_norm"])]},
    "rl": {
        "curves": [
            ("reward, share right", ["reward", "accuracy"]),
            ("response length (tokens)", ["length"]),
            ("share of responses", ["overlong", "repetition", "garbled"]),
            ("entropy (nats a token)", ["entropy"]),
            ("KL to the anchor (nats a response)", ["kl"]),
            ("checks: share honest; number / 10", ["honest", "checks"]),
        ],
        "behaviour": [
            ("response length (tokens)", ["length"]),
            ("reflection words (per 100 tokens)", ["reflections"]),
            ("share of checks, of responses", ["honest", "honoured"]),
            ("right: share of responses", ["first_right", "corrected"]),
        ],
    },
}


def run_plot(cfg: Config):
    """Every picture of a run again, from its folder alone; in a ledger's folder, the ledger and every picture of its runs."""
    base = Path(cfg.out) / (cfg.name or cfg.preset)
    for run in [base, *sorted(base.glob("*-seed*"))]:
        for stage in PANELS:
            if (run / stage / "metrics.jsonl").exists():
                config = data_prep.read_json(run / stage / "config.json").get("config") or {}
                draw_steps(run / stage, Config(**{k: v for k, v in config.items() if k in Config.__dataclass_fields__}))
        if (run / "eval" / "results.json").exists():
            draw_results(run / "eval")
    write_ledger(base)
    pictures = sorted(base.glob("**/*.png"))
    if not pictures:
        raise Misuse(f"{base}: no run there; give --out and --name of one")
    print0("\n".join(map(str, pictures)))


def draw_steps(folder: Path, cfg: Config):
    """curves.png (and behaviour.png) of a stage from its metrics.jsonl: faint lines are steps, strong ones a moving average over 5 %."""
    rows = read_log(folder / "metrics.jsonl")
    if rank() > 0 or not rows:
        return
    each = f"{cfg.prompts} prompts x {cfg.k} samples" if cfg.stage == "rl" else f"{cfg.sft_batch} traces"
    window = max(1, len(rows) // 20)
    x = np.array([row["step"] + 1 for row in rows])
    for picture, panels in PANELS[cfg.stage].items():
        figure, axes = pyplot_figure(*((2, 2) if len(panels) == 4 else (len(panels) // 3, 3)))
        for axis, (label, names) in zip(axes, panels):
            for name, style in zip(names, ("-", "--", ":")):
                y = np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float) * (
                    0.1 if name == "checks" else 1
                )
                line = axis.plot(x, y, lw=0.6, alpha=0.35)[0]
                axis.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), style, color=line.get_color(), label=name)
            axis.set_xlabel("step")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend(fontsize=8)
        save_figure(figure, folder / f"{picture}.png", f"T1 {cfg.stage}, run {folder.parent.name}, seed {cfg.seed}, {each} a step")


STYLES = [dict(marker="osD^vPX*"[i], ls=("-", "--", "-.", ":")[i % 4], capsize=2) for i in range(8)]


def draw_results(folder: Path):
    """inference_scaling.png of each test set in results.json: accuracy against thinking budget, one curve per checkpoint, in the form of
    the paper's figure; beside it, for the last checkpoint, what each way of spending tokens buys."""
    content = data_prep.read_json(folder / "results.json")
    everything = [c for c in content["checkpoints"] if c.get("scaling")]
    tests = list(dict.fromkeys(c.get("test") for c in everything))
    for test in tests if rank() == 0 else ():
        results = [c for c in everything if c.get("test") == test]
        last, ways = results[-1], {}
        if last.get("forced"):
            most = last["parallel"][-1][0]
            ways = {
                "cut at a budget": "scaling",
                "forced to a budget (1 sample)": "forced",
                f"majority of k (of {most} samples)": "parallel",
            }
        figure, axes = pyplot_figure(1, 1 + bool(ways))
        for i, result in enumerate(results):
            shade = str(0.65 * (1 - i / max(1, len(results) - 1))) if len(results) > 1 else "black"
            draw_points(axes[0], [point[:3] for point in result["scaling"]], label=result["name"], color=shade, **STYLES[i % 8])
        for i, (label, name) in enumerate(ways.items()):
            points = [(tokens, value, error) for _, value, error, tokens in last[name]]
            draw_points(axes[1], points, label=label, color=("0", "0.35", "0.55")[i], **STYLES[i])
        for k, value, _, tokens in last["parallel"] if ways else ():
            axes[1].annotate(f"k={k}", (tokens, 100 * value), (3, -10), textcoords="offset points", fontsize=7)
        axes[0].set_xticks([p[0] for p in last["scaling"]], [p[0] for p in last["scaling"]])
        axes[0].set_xlabel("thinking budget (tokens)")
        axes[0].set_ylabel("pass@1 (%)")
        axes[0].legend(fontsize=8, title="checkpoint")
        if ways:
            axes[1].set_xlabel("tokens spent per problem")
            axes[1].legend(fontsize=8, title=last["name"])
        one = content | last
        title = f"{one['problems']} problems x {one['samples']} samples ({test or one['test']}), T = {one['temperature']}, seed {one['seed']}; bars: standard error over problems"
        save_figure(figure, folder / f"inference_scaling{f'-{test}' * (len(tests) > 1)}.png", title)


def draw_points(axis, points, **style):
    """(x, share, standard error) as a curve in % with error bars over a logarithmic x."""
    x, y, e = np.array(points, dtype=float).T
    axis.errorbar(x, 100 * y, 100 * e, **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_ylabel("accuracy (%)")
    axis.grid(alpha=0.3)


def draw_ledger(path: Path, rows: list[dict], about: str):
    """Held-out pass@1 of every variant: a circle a seed, the mean and its standard error, a cross for collapsed; base and SFT start as lines."""
    figure, (axis,) = pyplot_figure(1, 1, height=0.32 * len(rows) + 1.5)
    for y, row in enumerate(reversed(rows)):
        if row["pass_at_1"]:
            axis.plot([100 * v for v in row["each"]], [y] * len(row["each"]), "o", mfc="none", color="0.5", ms=5)
            mean, error = row["pass_at_1"]
            axis.errorbar(100 * mean, y, xerr=100 * error if error else None, fmt="D", color="black", ms=4, capsize=3)
        if row["collapsed"]:
            axis.text(
                1.01, y, f"{row['collapsed']} of {row['runs']} collapsed", va="center", fontsize=7, transform=axis.get_yaxis_transform()
            )
    for label, style, pair in (("base", "--", rows[0]["pass_at_1"]), ("SFT start", ":", rows[0]["start"])):
        if rows[0]["variant"] == "base" and pair:
            axis.axvline(100 * pair[0], ls=style, color="black", lw=0.9, label=label)
    axis.plot([], [], "o", mfc="none", color="0.5", label="one seed")
    axis.errorbar([], [], xerr=[], fmt="D", color="black", ms=4, capsize=3, label="mean, standard error")
    axis.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)], fontsize=8)
    axis.set_xlabel("held-out pass@1 (%)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_figure(figure, path, about)


def pyplot_figure(rows: int, columns: int, height: float = 0):
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    size = (4.2 * columns + 2 * (columns == 1), height or 3 * rows + 1.5 * (columns <= 2 and rows == 1))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    return figure, axes.ravel()


def save_figure(figure, path: Path, title: str):
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    beside = path.with_name("partial-" + path.name)
    figure.savefig(beside, dpi=110)
    beside.rename(path)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Bench and plan
# ----------------------------------------------------------------------------------------------------------------------


def median_of(values) -> str:
    digits = 2 if max(values) < 100 else 0
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


class Stopwatch:
    """CPU and wall seconds between marks."""

    def __init__(self):
        self.mark("", {})

    def mark(self, name: str, seconds: dict):
        now = np.array([time.process_time(), time.perf_counter()])
        if name:
            seconds[name] = now - self.last
        self.last = now


def bench_rl_step(step: int, problems: list[dict], policy, cfg: Config) -> dict:
    """One step of RL as `run_rl` takes it -> seconds (CPU, wall) of each phase, and tokens. The reward compares strings."""
    model, anchor, engine, optimizer, tokenizer = policy
    watch, seconds = Stopwatch(), {}
    prompts = [tokenizer(p["prompt"]).input_ids for p in problems]
    seeds = [seed_for(cfg.seed, "bench", step, i) for i in range(len(prompts))]
    rollouts = engine.generate(prompts, cfg.k, seeds, cfg.max_new, cfg.temperature)
    watch.mark("rollout", seconds)
    texts = tokenizer.batch_decode([r.ids for r in rollouts])
    rewards = torch.tensor(bench_reward(texts, [p["answer"] for p in problems for _ in range(cfg.k)])).view(-1, cfg.k)
    rows = [(r.prompt, r.ids) for r in rollouts]
    anchored = response_logprobs(anchor, rows, cfg, cfg.temperature)
    watch.mark("log-prob of the anchor", seconds)
    kl = torch.tensor([sum(r.logprobs) - a.sum().item() for r, a in zip(rollouts, anchored)]).view(-1, cfg.k)
    advantages, N = advantages_of(rewards, kl, cfg.kl_coef), sum(len(y) for _, y in rows)
    accumulate_gradient(model, rows, advantages.flatten().tolist(), [1 / N] * len(rows), cfg, cfg.entropy_coef, cfg.temperature)
    watch.mark("gradient", seconds)
    update(model, optimizer, cfg.rl_lr, cfg)
    ema_update_(anchor, model, cfg.ema_decay)
    engine.load(model)
    watch.mark("update", seconds)
    return dict(seconds=seconds, tokens=N, total=sum(seconds.values()))


def bench_reward(completions, answer, **unused) -> list[float]:
    return [1.0 if c.strip().startswith(a) else 0.1 * (c[:1] == a[:1]) for c, a in zip(completions, answer)]


def bench_sft_step(step: int, rows: list[Row], policy, cfg: Config) -> dict:
    model, _, _, optimizer, _ = policy
    watch, seconds = Stopwatch(), {}
    batch = [rows[i] for i in batch_indices(len(rows), cfg.sft_batch, step, cfg.seed)]
    N = sum(len(y) for _, y in batch)
    accumulate_gradient(model, batch, [1.0] * len(batch), [1 / N] * len(batch), cfg)
    update(model, optimizer, cfg.sft_lr, cfg)
    watch.mark("sft", seconds)
    return dict(seconds=seconds, tokens=N, total=seconds["sft"])


def trl_beside(trainer, tokens: list, ours, pairs: int):
    """Run a TRL trainer for `pairs` steps and one more to warm up; after each of its steps run ours(step) -> pairs of results."""
    watch, results = Stopwatch(), []

    class InTurn(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            watch.mark("", {})

        def on_step_end(self, *args, **kwargs):
            seconds = {}
            watch.mark("all", seconds)
            theirs = dict(total=seconds["all"], tokens=sum(tokens))
            tokens.clear()
            results.append((ours(len(results)), theirs))
            mine, trl = (r["tokens"] / r["total"][0] for r in results[-1])
            print0(
                f"{type(trainer).__name__} {len(results) - 1} of {pairs}: {mine:,.0f} and {trl:,.0f} tokens per CPU second, {mine / trl:.2f}"
            )
            watch.mark("", {})

    trainer.add_callback(InTurn())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return results[1:]


def trl_trainers(folder: str, problems: list[dict], traces: list[dict], cfg: Config):
    """TRL's RLOOTrainer and SFTTrainer (with packing) on the bench's jobs, and the lists in which they count the tokens they train on."""
    import datasets
    import trl

    steps, B = cfg.bench_pairs + 1, cfg.prompts * cfg.k
    micro = math.gcd(B, 64)
    common = dict(
        output_dir=folder + "/trl", lr_scheduler_type="constant", max_steps=steps, max_grad_norm=cfg.grad_clip, report_to=[], seed=0
    )
    common |= dict(save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, bf16=cfg.dtype == "bfloat16")
    common |= dict(use_cpu=device_of(cfg).type == "cpu")
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rl = trl.RLOOConfig(
        **common, per_device_train_batch_size=micro, gradient_accumulation_steps=B // micro, num_generations=cfg.k, beta=cfg.kl_coef,
        max_completion_length=cfg.max_new, temperature=cfg.temperature, learning_rate=cfg.rl_lr, shuffle_dataset=False,
        sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1 - cfg.ema_decay,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(problems)
    rloo = trl.RLOOTrainer(model=load(), args=rl, train_dataset=rows, reward_funcs=bench_reward, processing_class=tokenizer)
    rl_tokens, generate = [], rloo._generate_single_turn

    def counted_generate(*args, **kwargs):
        ids = generate(*args, **kwargs)
        rl_tokens.extend(map(len, ids))
        return ids

    rloo._generate_single_turn = counted_generate
    packed = dict(packing=True, max_length=1024, per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=cfg.sft_lr)
    rows = datasets.Dataset.from_list([{"prompt": t["problem"] + "\n", "completion": t["response"]} for t in traces])
    sft = trl.SFTTrainer(model=load(), args=trl.SFTConfig(**common, **packed), train_dataset=rows, processing_class=tokenizer)
    sft_tokens, loss = [], sft.compute_loss

    def counted_loss(model, inputs, *args, **kwargs):
        sft_tokens.append((inputs["labels"] != -100).sum().item())
        return loss(model, inputs, *args, **kwargs)

    sft.compute_loss = counted_loss
    return (rloo, rl_tokens), (sft, sft_tokens)


def run_bench(cfg: Config):
    """Speed of rollout, log-prob, update and SFT on the embedded model with random weights; where TRL is installed, beside TRL's trainers.

    Prompts are "a+b=". Up to 128 new tokens the model has one end token, so nearly all responses have the full length; above, one token in
    64 is an end token: lengths differ, 64 on average. The same folder, prompts, K, lengths, type and threads for both sides, in turn.
    """
    if world() > 1:
        raise Misuse("--bench measures one process: python t1.py --bench")
    rng = np.random.default_rng(cfg.seed)
    sums = rng.integers(1, 1000, (cfg.prompts * (cfg.bench_pairs + 2), 2))
    problems = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in sums.tolist()]
    traces = data_prep.embedded_traces()[: 64 * 4 * (cfg.bench_pairs + 2)]
    model, tokenizer = tiny_policy(cfg)
    ends = len(tokenizer) // 64 if cfg.max_new > 128 else 1
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 19 + ends)]
    rows = [(prompt_ids(t["problem"], tokenizer, cfg), tokenizer(t["response"]).input_ids + [tokenizer.eos_token_id]) for t in traces]
    with tempfile.TemporaryDirectory() as folder:
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        policy = [
            model,
            copy.deepcopy(model).requires_grad_(False),
            make_engine(folder, model, tokenizer, cfg),
            make_optimizer(model, cfg),
            tokenizer,
        ]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print0(
            f"bench: {size:.2f} M parameters, V {model.vocabulary}, {cfg.prompts} prompts x {cfg.k} samples, at most {cfg.max_new} new tokens, "
            f"{cfg.dtype}, {torch.get_num_threads()} thread(s), {device_of(cfg)}, {cfg.bench_pairs} steps and one to warm up: median (min-max)"
        )
        rl_step = lambda step: bench_rl_step(step, problems[step * cfg.prompts : (step + 1) * cfg.prompts], policy, cfg)
        sft_step = lambda step: bench_sft_step(step, rows, policy, cfg)
        has_trl = importlib.util.find_spec("trl") is not None
        if has_trl:
            rl_step(0), sft_step(0)
            memory = peak_memory()
            trainers = trl_trainers(folder, problems, traces, cfg)
            rl, sft = (trl_beside(*t, ours, cfg.bench_pairs) for t, ours in zip(trainers, (rl_step, sft_step)))
        else:
            rl, sft = ([(ours(step), None) for step in range(cfg.bench_pairs + 1)][1:] for ours in (rl_step, sft_step))
            memory = peak_memory()
    report_bench(rl, sft, memory)


def peak_memory() -> float:
    """GiB: the most that this process has held so far; on a GPU, of its memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report_bench(rl: list, sft: list, memory: float):
    """The bench's table."""
    print0(f"{'phase':24} {'tokens per CPU second':>26} {'tokens per second':>26} {'share of a step':>16}")
    for name in (*rl[0][0]["seconds"], "step", "sft"):
        runs = [a for a, _ in (sft if name == "sft" else rl)]
        seconds = [a["total"] if name in ("step", "sft") else a["seconds"][name] for a in runs]
        cpu, wall = ([a["tokens"] / s[i] for a, s in zip(runs, seconds)] for i in range(2))
        share = "" if name in ("step", "sft") else f"{100 * np.median([s[0] / a['total'][0] for a, s in zip(runs, seconds)]):.0f} %"
        print0(f"{name:24} {median_of(cpu):>26} {median_of(wall):>26} {share:>16}")
    print0(f"peak memory of the process {memory:.2f} GiB, {np.median([a['tokens'] for a, _ in rl]):,.0f} tokens a step of RL")
    if rl[0][1] is None:
        print0("TRL is not installed here: nothing to compare with (pip install trl==1.16.0)")
        return
    for name, pairs in (("RLOOTrainer", rl), ("SFTTrainer, packing", sft)):
        for i, unit in enumerate(("CPU second", "second")):
            mine, theirs = ([r["tokens"] / r["total"][i] for r in side] for side in zip(*pairs))
            ratio = [a / b for a, b in zip(mine, theirs)]
            print0(f"{name}: trained tokens per {unit} {median_of(mine)}, TRL {median_of(theirs)}, ratio {median_of(ratio)}")
    print0(f"peak memory with TRL in the same process {peak_memory():.2f} GiB")


SHAPES = {  # hidden, layers, intermediate, heads, key-value heads, head width, vocabulary, is the head the embedding?
    "glm-4-9b-hf": (4096, 40, 13696, 32, 2, 128, 151552, False),
    "Qwen2.5-14B": (5120, 48, 13824, 40, 8, 128, 152064, False),
    "Qwen2.5-32B": (5120, 64, 27648, 40, 8, 128, 152064, False),
}
VLLM_ROWS = 8  # rows of full context that the plan gives vLLM's cache room for


def memory_plan(shape: tuple, gpus: int, context: int, micro_tokens: int, cfg: Config) -> dict[str, float]:
    """Bytes on each device for one step of RL: what is held, and the most during the update and during the rollout.

    `held` weights, AdamW and anchor are float32 shards over all ranks (`shard`); gradients too. In the update the layers at hand and the
    root (embedding, last norm, head) are gathered in cfg.dtype. Activations are what autograd keeps: all layers', or with
    checkpointing each layer's input and one layer's inside. Three moments compete: the head works on its chunks; the last layer's
    backward runs (the head's gradient waits); the root's gradient is summed. A micro-batch holds at least one row, so `context` tokens.
    """
    D, layers, I, heads, kv_heads, width, V, tied = shape
    Q, KV, s = heads * width, kv_heads * width, 2 if cfg.dtype == "bfloat16" else 4
    layer = 2 * D * Q + 2 * D * KV + Q + 2 * KV + 3 * D * I + 2 * D  # parameters
    root = V * D * (1 if tied else 2) + D
    parameters, n, sharded = layers * layer + root, max(context, micro_tokens), gpus > 1
    shard_bytes = 4 * parameters / gpus
    policy = 0 if cfg.offload_optimizer and sharded else shard_bytes
    plan = dict(parameters=parameters, weights=policy, gradients=policy, optimizer=2 * policy)
    plan["anchor"] = 0 if cfg.anchor == "none" or cfg.offload_anchor and sharded else shard_bytes
    plan["gathered"] = s * (2 * layer + root) + (s + 4) * layer if sharded else 2 * parameters * (s == 2)  # one rank: autocast's copies

    inside = n * (2 * D * (4 + 2 * s) + s * (3 * Q + 2 * KV + 4 * I) + 4 * heads)  # norms in float32; q, k, v, output; gate, up, product
    last_norm = n * D * (4 + s)
    kept = layers * (n * s * D if cfg.checkpointing else inside) + last_norm + 12 * n * width  # and the rotary tables
    head = (s if sharded else 4) * V * D  # the gradient that waits for the root's
    chunks = 2 * 4 * V * min(head_chunk(V, "cuda" if sharded else cfg.device or "cpu"), n)
    backward = 2 * s * n * I + 4 * D * I + (inside - last_norm + n * s * D if cfg.checkpointing else 0)
    plan |= dict(activations=kept, head_gradient=4 * V * D, head_chunks=chunks + 2 * s * n * D, backward=backward)
    root_sum = (s + 4) * root if sharded else 2 * 4 * V * D
    held = plan["weights"] + plan["optimizer"] + plan["anchor"]
    moments = (kept + 4 * V * D + chunks + 2 * s * n * D, kept + head + backward, root_sum)
    plan["update"] = held + plan["gradients"] + plan["gathered"] + max(moments)
    plan["vllm"] = 2 * parameters / cfg.vllm_tp + VLLM_ROWS * context * 2 * 2 * layers * KV / min(cfg.vllm_tp, kv_heads)
    plan["rollout"] = held + plan["vllm"]  # vLLM sleeps during the update
    return plan


def shape_of(config) -> tuple:
    """The row of SHAPES of a model's config."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sizes = config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads, kv_heads, width
    return *sizes, config.vocab_size, config.tie_word_embeddings


def run_plan(cfg: Config):
    """GPUs x context x micro-batch -> GiB per GPU, for the presets' models or the folder given as --model."""
    shapes = SHAPES
    if cfg.model:
        try:
            shapes = {cfg.model: shape_of(transformers.AutoConfig.from_pretrained(cfg.model, local_files_only=True))}
        except (OSError, ValueError, AttributeError) as e:
            raise Misuse(f"--model {cfg.model}: no config.json of a causal LM that can be planned for ({str(e).splitlines()[0]})")
    on = lambda name: f"{name} {'on' if getattr(cfg, name) else 'off'}"
    print0(
        f"{cfg.dtype}, {on('checkpointing')}, {on('offload_optimizer')}, {on('offload_anchor')}, anchor {cfg.anchor}, vllm_tp {cfg.vllm_tp}"
    )
    print0(
        f"GiB per GPU, computed. `rollout` has vLLM's weights and a cache of {VLLM_ROWS} rows of full context. A card is said to fit where"
    )
    print0("90 % of it is enough: the rest is for CUDA, NCCL and fragmentation.")
    columns = ("weights", "optimizer", "anchor", "gathered", "activations", "update", "vllm", "rollout")
    print0(f"{'model':14} {'GPUs':>4} {'context':>8} {'micro':>7} " + " ".join(f"{c:>11}" for c in columns) + "  fits")
    for name, shape in shapes.items():
        for gpus in (8, 16, 32, 64):
            for context in (4096, cfg.max_prompt + cfg.max_new, 32768):
                for micro in dict.fromkeys((context, max(context, cfg.micro_tokens))):
                    plan = memory_plan(shape, gpus, context, micro, cfg)
                    need = max(plan["update"], plan["rollout"])
                    fits = next((f"{card} GB" for card in (80, 141) if need <= 0.9e9 * card), "no")
                    cells = " ".join(f"{plan[c] / 2**30:11.1f}" for c in columns)
                    print0(f"{Path(name).name:14} {gpus:4} {context:8,} {micro:7,} {cells}  {fits}")


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------

STAGES = {"sft": run_sft, "rl": run_rl, "eval": run_eval, "ablate": run_ablate, "plot": run_plot, "bench": run_bench, "plan": run_plan}


def parse_args(argv: list[str] | None = None) -> Config:
    """Config from the command line: the preset's values, then what is given."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Misuse(f"{message}; python t1.py --help lists every field")

    def boolean(text):
        if text.lower() not in ("true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1")

    parser = Parser(prog="t1.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        doc = f"{f.metadata['doc']} (default: {f.default!r}" + (f"; paper: {f.metadata['paper']}" if f.metadata["paper"] else "") + ")"
        switch = dict(type=boolean, nargs="?", const=True) if isinstance(f.default, bool) else dict(type=type(f.default))
        parser.add_argument(
            *dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}")),
            dest=f.name,
            default=argparse.SUPPRESS,
            metavar=type(f.default).__name__.upper(),
            help=doc.replace("%", "%%"),
            **switch,
        )
    for stage in ("bench", "plan"):
        parser.add_argument(
            f"--{stage}", dest="stage", action="store_const", const=stage, default=argparse.SUPPRESS, help=f"--stage {stage}"
        )
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", {"bench": "bench", "plan": "qwen2.5-14b"}.get(given.get("stage"), "tiny"))
    if preset not in PRESETS:
        raise Misuse(f"--preset {preset!r}: there is no such preset; choose from {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    if given.get("stage") != "sft":  # a preset's model is where SFT starts; the other stages take the run's own checkpoints
        values.pop("model", None)
    cfg = Config(**{**values, "preset": preset, **given})
    check_config(cfg)
    return cfg


CHOICES = dict(
    stage=tuple(STAGES),
    anchor=("ema", "fixed", "none"),
    loss_norm=("tokens", "responses"),
    traces=("trial-and-error", "correct-only"),
    engine=("auto", "torch", "vllm"),
    dtype=("float32", "bfloat16"),
    device=("", "cpu", "cuda"),
)
MAY_BE_ZERO = {
    "probe_tolerance",
    "keep_every",
    "resume_from",
    "tis_cap",
    "entropy_floor",
    "seed",
    "sft_steps",
    "warmup",
    "min_p",
    "kl_coef",
    "ema_decay",
    "entropy_coef",
    "weight_decay",
    "eval_temperature",
    "eval_samples",
    "spend_samples",
}


def check_config(cfg: Config):
    """Raise Misuse for values that make no sense."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))

    def need(holds, name, what):
        if not holds:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(cfg, name)!r}: {what}")

    for name, value in dataclasses.asdict(cfg).items():
        if name in CHOICES:
            need(value in CHOICES[name], name, f"choose from {', '.join(filter(None, CHOICES[name]))}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            need(math.isfinite(value) and value >= 0, name, "must be a finite number, not below 0")
            need(value > 0 or name in MAY_BE_ZERO, name, "must be above 0")
        elif isinstance(value, str):
            need(value == value.encode(errors="replace").decode(), name, "is not UTF-8 text")
    need(cfg.k >= 2, "k", "leave-one-out needs at least 2 samples per prompt")
    need(cfg.min_p < 1, "min_p", "must be below 1")
    need(cfg.ema_decay <= 1, "ema_decay", "must be at most 1")
    need(cfg.repeat_count > 1, "repeat_count", "must be at least 2: every block stands once")
    need(cfg.tiny_width % 8 == 0, "tiny_width", "must be a multiple of 8: four heads of an even width")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "device", "torch sees no GPU here")
    need(re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", cfg.budgets), "budgets", "must be whole numbers above 0, separated by commas")
    need(re.fullmatch(r"\d+(,\d+)*", cfg.seeds), "seeds", "must be whole numbers, separated by commas")
    need(re.fullmatch(r"([\w-]+(,[\w-]+)*)?", cfg.benchmarks), "benchmarks", "must be names as math500,aime24, separated by commas")
    need(cfg.wait_words, "wait_words", "must not be empty: the thought would end again at once")
    for variant in filter(None, cfg.variants.split(",")):
        need(variant in VARIANTS, "variants", f"no variant {variant!r}; choose from {', '.join(VARIANTS)}")
    need("{problem}" in (cfg.prompt_template or "{problem}"), "prompt_template", "must contain {problem}")
    need(not re.search(r"[/\\\0]|^\.+$", cfg.name), "name", "must be the name of one folder")
    planned = cfg.stage == "plan"  # for ranks that are not here
    need(cfg.vllm_tp == 1 or cfg.engine == "vllm" or planned, "vllm_tp", "only with --engine vllm")
    need(ranks % cfg.vllm_tp == 0 or planned, "vllm_tp", f"must divide the number of ranks, {ranks}")
    need(cfg.vllm_memory < 1, "vllm_memory", "must be below 1")
    need(cfg.prompts * cfg.k >= ranks, "prompts", f"each of the {ranks} ranks needs one response at least")
    need(cfg.sft_batch >= ranks, "sft_batch", f"each of the {ranks} ranks needs one at least")


def main(argv: list[str] | None = None) -> int:
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        cfg = parse_args(argv)
        if distributed:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=cfg.timeout))
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that there is one process
        logging.disable(logging.WARNING)  # the libraries' remarks; what fails is raised, and said in one line
        STAGES[cfg.stage](cfg)
        return 0
    except Stop as e:
        return complain(str(e), e.code)
    except (MemoryError, torch.OutOfMemoryError):
        return complain("out of memory; lower --micro-tokens, --rollout-rows or --vllm-memory, or turn on --checkpointing", 1)
    except OSError as e:
        return complain(f"{e.filename or 'a file'}: {e.strerror or e}; the same command goes on from the last whole checkpoint", 1)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0]
        if "memory" in reason and "alloc" in reason:
            return complain(f"out of memory ({reason}); lower --micro-tokens or --rollout-rows, or turn on --checkpointing", 1)
        if world() > 1 and any(word in str(e) for word in ("gloo", "NCCL", "Connection", "connection", "Broken pipe", "Timed out")):
            return complain(f"lost contact with another rank ({reason}); the same command goes on from the last checkpoint", 1)
        raise
    finally:
        if "vllm" in sys.modules:  # its groups first: it would look for them at exit
            sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()
        if dist.is_initialized():
            dist.destroy_process_group()


def complain(message: str, code: int) -> int:
    """One line on stderr; with several ranks on a line of its own, whatever the progress bar of rank 0 was doing."""
    print(f"\nt1.py, rank {rank()}: {message}" if world() > 1 else f"t1.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
