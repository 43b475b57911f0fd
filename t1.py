"""T1: advancing language model reasoning through reinforcement learning and inference scaling (arXiv 2501.11651), in one file.

    torchrun t1.py --stage sft                      cold start on traces that try, err and verify themselves
    torchrun t1.py --stage rl                       reinforcement learning from the SFT checkpoint
    torchrun t1.py --stage eval                     pass@1 and accuracy against thinking budget, one curve per checkpoint
    torchrun t1.py --stage sft --preset qwen2.5-14b --data traces.jsonl          the paper's values on a real model
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
checkpoints - SFT - RL - evaluation and inference scaling - pictures - main.
"""

import argparse
import copy
import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import data_prep
import verify

# ----------------------------------------------------------------------------------------------------------------------
# Config: every knob, with unit, default and the paper's value; `--help` is made from it
# ----------------------------------------------------------------------------------------------------------------------


def knob(default, doc: str, paper: str = ""):
    """A field of Config: its default (that of the preset `tiny`), its meaning and unit, and what the paper says."""
    return field(default=default, metadata={"doc": doc, "paper": paper})


@dataclass
class Config:
    """Everything that a run depends on. Defaults are the preset `tiny`; PRESETS holds what the others change."""

    stage: str = knob("", "sft | rl | eval")
    preset: str = knob("tiny", "tiny | glm4-9b | qwen2.5-14b | qwen2.5-32b")
    name: str = knob("", "name of the run's folder; empty: the preset's name")
    out: str = knob("runs", "folder that holds all runs")
    seed: int = knob(0, "seed of data order, sampling and the tiny model's weights")
    # inputs
    model: str = knob(
        "", "folder or hub name of a causal LM; empty: for sft the embedded model (tiny), for rl the run's last SFT checkpoint"
    )
    data: str = knob("", "JSONL of traces (sft) or problems (rl); empty: the embedded ones")
    test: str = knob("", "JSONL of problems to evaluate on; empty: the embedded test set")
    checkpoint: str = knob("", "folders to evaluate, separated by commas; empty: the run's last SFT and all its RL checkpoints")
    prompt_template: str = knob("", "text around {problem}; empty: the tokenizer's chat template, or '{problem}\\n' where it has none")
    max_prompt: int = knob(256, "longest prompt, tokens", "1,024 in the authors' later code")
    max_new: int = knob(160, "longest response, tokens; longer ones are over-long", "8,192 in the authors' later code")
    # numerics
    dtype: str = knob("float32", "float32 | bfloat16: type of activations; weights, log-probs and entropy stay float32")
    device: str = knob("", "cpu | cuda; empty: cuda where there is one")
    micro_tokens: int = knob(4096, "tokens of one micro-batch (prompts and responses)")
    grad_clip: float = knob(1.0, "largest gradient norm")
    weight_decay: float = knob(0.0, "AdamW's weight decay", "0.1 in the authors' later code")
    warmup: int = knob(10, "steps of linear warm-up before the cosine decay")
    # stage sft
    sft_lr: float = knob(1.5e-3, "peak learning rate of SFT", "1e-5")
    sft_epochs: int = knob(3, "passes over the traces", "3")
    sft_steps: int = knob(0, "steps of SFT; 0: what sft_epochs needs")
    sft_batch: int = knob(32, "traces per step", "not stated")
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
    rl_save_every: int = knob(18, "steps between checkpoints (the last step is always saved)")
    # stage eval
    eval_samples: int = knob(4, "samples per problem", "32 on AIME, 1 elsewhere")
    eval_temperature: float = knob(1.0, "temperature of evaluation; 0: greedy")
    answer_prefix: str = knob("</think>\\nThe answer is \\boxed{", "what closes a thought that is cut (\\n is a new line)", "not stated")
    budgets: str = knob("16,32,64,96,128,160", "thinking budgets of the inference-scaling picture, tokens", "1024 to 16384")
    # the embedded model
    tiny_layers: int = knob(3, "layers of the embedded model")
    tiny_width: int = knob(128, "hidden width of the embedded model")
    rollout_rows: int = knob(1024, "rows that the engine in plain torch generates at once")


PAPER = dict(
    max_prompt=1024,
    max_new=8192,
    dtype="bfloat16",
    micro_tokens=32768,
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
    eval_samples=32,
    budgets="1024,2048,4096,8192,16384",
)
PRESETS = {
    "tiny": {},
    "glm4-9b": PAPER | dict(model="zai-org/glm-4-9b-hf"),
    "qwen2.5-14b": PAPER | dict(model="Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": PAPER | dict(model="Qwen/Qwen2.5-32B"),
}


class Stop(Exception):
    """The run cannot go on: one line that says what, where, and what to do. Exit code 1."""

    code = 1


class Misuse(Stop):
    """Something the user gave is wrong. Exit code 2."""

    code = 2


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


def all_sum(values: list[float]) -> list[float]:
    """The sums over all ranks, in float64."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    if world() > 1:
        dist.barrier()


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


def write_json(path: Path, value):
    """Written beside, then renamed: a reader never sees half a file."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    beside.rename(path)


# ----------------------------------------------------------------------------------------------------------------------
# Model and tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def attention(module, q, k, v, attention_mask, scaling=None, pack=None, **unused):
    """The attention of every forward in this file, registered with transformers as "t1"; no mask is ever built.

    q (1, Hq, n, Dh), k and v (1, Hkv, n, Dh) with `pack`: rows of different lengths stand end to end; they are laid out as (B, T),
    attend causally, and are packed again. Without `pack`: q (B, Hq, 1, Dh) against a cache (decoding), or one
    block from position 0 (prefill). Key-value heads are never repeated.
    """
    if pack is not None:
        to_grid, to_packed, shape = pack
        q, k, v = (x[0].transpose(0, 1).index_select(0, to_grid).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))  # (B, H, T, Dh)
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


def load_policy(folder: str, cfg: Config):
    """-> a causal LM in float32 on the run's device, with `attention` as its attention, and its tokenizer. Misuse if anything is amiss."""
    transformers.AttentionInterface.register("t1", attention)
    try:
        if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
            raise FileNotFoundError("there is no such folder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(folder, dtype=torch.float32, attn_implementation="t1", output_loading_info=True)
    except Exception as e:  # whatever a damaged folder makes the libraries raise, the user is told in one line
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise Misuse(f"{folder}: no model that can be loaded ({reason}); give a folder with config, weights and tokenizer, or a hub name")
    if info["missing_keys"]:
        raise Misuse(f"{folder}: {len(info['missing_keys'])} weights are missing, the first is {sorted(info['missing_keys'])[0]}")
    if not tokenizer("1 + 1").input_ids or tokenizer.eos_token_id is None:
        raise Misuse(
            f"{folder}: the tokenizer is missing, empty or has no end-of-text token; give a folder with tokenizer.json and eos_token"
        )
    return ready(model, tokenizer, folder, cfg), tokenizer


def ready(model, tokenizer, folder: str, cfg: Config):
    """A loaded or fresh model on the run's device, after the last checks."""
    model.vocabulary = min(max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and cfg.max_prompt + cfg.max_new > longest:
        raise Misuse(f"{folder}: takes {longest} tokens, --max-prompt {cfg.max_prompt} and --max-new {cfg.max_new} together want more")
    model = model.to(device_of(cfg)).eval()  # eval: no dropout, so that trained and sampled distribution are one
    if model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = FastLinear
    check_forward(model, folder, cfg)
    return model


@torch.no_grad()
def check_forward(model, folder: str, cfg: Config):
    """Stop at a model that `attention` and a plain linear head do not describe (soft-caps, sliding windows, scaled logits, a biased head):
    its log-probs would be wrong without a word. One row, through this file and through the library's own code."""
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise Misuse(f"{folder}: its attention has a sliding window, which is not supported")
    row = [1 + i % (model.vocabulary - 1) for i in range(33)]
    hidden, targets = response_hidden(model, [(row[:1], row[1:])], dataclasses.replace(cfg, dtype="float32"))
    ours, _ = token_logprobs_and_entropy(hidden, head_of(model), targets)
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([row], device=targets.device)).logits[0, :-1, : model.vocabulary]
    model.set_attn_implementation("t1")
    gap = (logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0] - ours).abs().max().item()
    if not gap < 1e-2:
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
    return ready(model, tokenizer, "the embedded model", cfg), tokenizer


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


def log_softmax_min_p(z: torch.Tensor, min_p: float, keep: torch.Tensor | None = None) -> torch.Tensor:
    """(n, V) logits -> log-probs; with min_p, those below min_p times the largest are -inf and the rest renormalised.

    `keep` (n,): ids that stay in the support in any case: a sampled token whose probability stands at the very edge
    may fall on the other side when it is computed again.
    """
    logp = z.log_softmax(-1)
    if min_p <= 0:
        return logp
    drop = logp < logp.amax(-1, keepdim=True) + math.log(min_p)
    if keep is not None:
        drop.scatter_(1, keep[:, None], False)
    return logp.masked_fill(drop, -math.inf).log_softmax(-1)


def head_chunk(vocabulary: int, device) -> int:
    """Positions of the head that are worked on at once: one float32 buffer (c, V) takes 128 MiB, on a GPU 1 GiB; two of them live."""
    return max(1, 2 ** (30 if torch.device(device).type == "cuda" else 27) // (4 * vocabulary))


def _head_chunk(hidden, lm_head, targets, temperature, min_p):
    """One chunk of the head: (c, D) -> logits z (c, V); their softmax p (c, V), not yet divided by its sum; that sum, log-sum-exp of z,
    log-prob of the target and entropy, (c,) each, in float32 at least. On the min-p support p is 0 outside, and z is left as it is."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = (hidden @ lm_head.T).to(wide)
    if temperature != 1:
        z.div_(temperature)
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    if min_p > 0:  # the largest p is 1. The target stays: at the very edge it may fall on the other side than when it was sampled
        mine = p.gather(1, targets[:, None])
        F.threshold_(p, min_p, 0.0).scatter_(1, targets[:, None], mine)
    total = p.sum(-1)
    lse = total.log() + top[:, 0]
    logprob = z.gather(1, targets[:, None])[:, 0] - lse
    entropy = lse - torch.bmm(p[:, None], z[:, :, None])[:, 0, 0] / total  # -sum p log p, without a third buffer
    return z, p, total, lse, logprob, entropy


def _head_chunk_grad(z, p, total, lse, entropy, targets, a, b, temperature):
    """d(a log p(target) + b H)/d logits, written over `z`: a (onehot - p) - b p (log p + H), divided by T. (c, V)"""
    scale = 1 / (total * temperature)
    z.mul_((-b * scale)[:, None]).add_(((b * (lse - entropy) - a) * scale)[:, None]).mul_(p)
    return z.scatter_add_(1, targets[:, None], (a / temperature)[:, None].to(z.dtype))


def _head_backward(hidden, lm_head, targets, a, b, temperature, min_p, chunk):
    """Gradients of sum(a log p + b H), chunk by chunk -> (n, D), (V, D) in float32 at least; and log p and H, (n,) each."""
    grad_hidden = torch.empty_like(hidden)
    grad_head = torch.zeros_like(lm_head, dtype=torch.promote_types(lm_head.dtype, torch.float32))
    stats = torch.empty(2, len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    chunk = chunk or head_chunk(len(lm_head), hidden.device)
    for i in range(0, len(targets), chunk):
        s = slice(i, i + chunk)
        h = hidden[s].to(lm_head.dtype)
        z, p, total, lse, stats[0, s], stats[1, s] = _head_chunk(h, lm_head, targets[s], temperature, min_p)
        g = _head_chunk_grad(z, p, total, lse, stats[1, s], targets[s], a[s], b[s], temperature)  # (c, V)
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
    def forward(ctx, hidden, lm_head, targets, a, b, temperature, min_p, chunk):
        grad_hidden, grad_head, logprob, entropy = _head_backward(hidden, lm_head, targets, -a, -b, temperature, min_p, chunk)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(logprob, entropy)
        return -(a * logprob + b * entropy).sum(), logprob, entropy

    @staticmethod
    def backward(ctx, g, *unused):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(g), grad_head.mul_(g), None, None, None, None, None, None


def policy_loss(
    hidden,
    lm_head,
    targets,
    advantages,
    weights,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    min_p: float = 0.0,
    chunk: int = 0,
):
    """-sum_t w_t [A_t log pi(y_t) + alpha H_t], the paper's objective; also the log-probs and entropies, without gradient.

    hidden (n, D), lm_head (V, D), targets, advantages and weights (n,). With w_t = 1/N, N the generated tokens of the
    whole batch, any split of a batch into calls adds up to the same gradient. A = 1 and alpha = 0 is SFT.
    """
    return _PolicyLoss.apply(hidden, lm_head, targets, advantages * weights, entropy_coef * weights, temperature, min_p, chunk)


@torch.no_grad()
def ema_update_(anchor, policy, decay: float):
    """anchor <- decay anchor + (1 - decay) policy, parameter by parameter, in place (paper section 2, dynamic anchor)."""
    for a, p in zip(anchor.parameters(), policy.parameters(), strict=True):
        a.lerp_(p.to(a.dtype), 1 - decay)


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


def response_hidden(model, rows: list[Row], cfg: Config):
    """Rows end to end, no padding, through the backbone -> hidden states (n, D) that predict the response tokens, targets (n,)."""
    device = device_of(cfg)
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
            pack=(tensor(to_grid), tensor(to_packed), (len(rows), T)),
        )
    return out.last_hidden_state[0].index_select(0, tensor(predict)), tensor(np.concatenate([np.array(y, dtype=np.int64) for _, y in rows]))


def accumulate_gradient(model, rows, advantages, weights, cfg, entropy_coef=0.0, temperature=1.0, min_p=0.0):
    """Add the gradient of the objective to .grad; advantages and weights: a number a row.

    Returns the loss and, summed over tokens, -log p and the entropy.
    """
    head = head_of(model)
    sums = torch.zeros(3, dtype=torch.float64)
    for group in micro_batches(rows, cfg.micro_tokens):
        hidden, targets = response_hidden(model, [rows[i] for i in group], cfg)  # (n, D), (n,)
        sizes = torch.tensor([len(rows[i][1]) for i in group])
        per_token = lambda x: torch.tensor([x[i] for i in group], dtype=torch.float32).repeat_interleave(sizes).to(hidden.device)
        loss, logprob, entropy = policy_loss(
            hidden, head, targets, per_token(advantages), per_token(weights), entropy_coef, temperature, min_p
        )
        loss.backward()
        sums += torch.stack([loss.detach(), -logprob.sum(), entropy.sum()]).double().cpu()
    return sums.tolist()


@torch.no_grad()
def response_logprobs(model, rows: list[Row], cfg: Config) -> list[float]:
    """log pi(y|x) of each row's response under the sampled distribution, summed over its tokens."""
    head, result = head_of(model), [0.0] * len(rows)
    for group in micro_batches(rows, cfg.micro_tokens):
        hidden, targets = response_hidden(model, [rows[i] for i in group], cfg)
        logprob, _ = token_logprobs_and_entropy(hidden, head, targets, cfg.temperature, cfg.min_p)
        for i, part in zip(group, logprob.double().split([len(rows[i][1]) for i in group])):
            result[i] = part.sum().item()
    return result


def make_optimizer(model, cfg: Config):
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)


def update(model, optimizer, lr: float, cfg: Config) -> float:
    """Sum gradients over ranks, clip, step; returns the gradient's norm. A gradient that is not finite changes nothing."""
    if world() > 1:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
    if not math.isfinite(norm):
        raise Stop(f"the gradient's norm is {norm}: stopped with the weights untouched; try a smaller learning rate under another --name")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts: an engine has generate(prompts, k, ...) -> rollouts and load(policy)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One sampled response: what the update trains on are these ids, never re-tokenised text."""

    prompt: list[int]
    ids: list[int]  # with the end token, if it came
    logprob: float  # log pi(y|x) under the sampled distribution, summed
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
    ones token by token while the shorter ones already answer. Rows that ended leave the batch. The cache is allocated once."""

    def __init__(self, tokenizer, cfg: Config):
        self.tokenizer, self.cfg = tokenizer, cfg
        self.ends = {tokenizer.eos_token_id}

    def load(self, policy):
        self.model = policy  # the trainer's own weights: nothing to push
        ends = policy.generation_config.eos_token_id
        self.ends |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def generate(
        self, prompts: list[list[int]], k: int, seed: int, max_new: int, temperature: float = 1.0, min_p: float = 0.0
    ) -> list[Rollout]:
        """k samples of each prompt (token ids), prompt by prompt; temperature 0 is greedy."""
        per_batch = max(1, self.cfg.rollout_rows // k)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
        result = [None] * len(prompts)
        for start in range(0, len(order), per_batch):
            part = order[start : start + per_batch]
            rollouts = self._generate([prompts[i] for i in part], k, seed_for(seed, start), max_new, temperature, min_p)
            for j, i in enumerate(part):
                result[i] = rollouts[j * k : (j + 1) * k]
        return [r for group in result for r in group]

    @torch.no_grad()
    def _generate(self, prompts, k, seed, max_new, temperature, min_p):
        device = device_of(self.cfg)
        generator = torch.Generator(device).manual_seed(seed)
        head = head_of(self.model)
        lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(k)  # (B,)
        prefix, longest, B = int(lengths.min()), int(lengths.max()) + max_new, len(lengths)
        tokens = torch.zeros(B, longest, dtype=torch.long, device=device)
        for i, p in enumerate(prompts):
            tokens[i * k : (i + 1) * k, : len(p)] = torch.tensor(p, device=device)
        logprobs = torch.zeros(B, dtype=torch.float64, device=device)
        ended_at = lengths + max_new  # (B,) one past the last token
        ends = torch.tensor(sorted(self.ends), device=device)
        caches = Caches(self.model.config.num_hidden_layers)
        hidden = self._forward(tokens[::k, :prefix], torch.arange(prefix, device=device), caches)[:, -1].repeat_interleave(k, 0)  # (B, D)
        for cache in caches.layers:
            cache.extend(B, k, longest)
        alive = torch.arange(B, device=device)  # rows of the batch -> rows of `tokens`
        for t in range(prefix, longest):
            token, logprob = sample(hidden @ head.T, temperature, min_p, generator)
            forced = t < lengths[alive]  # still inside the prompt
            token = torch.where(forced, tokens[alive, t], token)
            tokens[alive, t] = token
            logprobs[alive] += torch.where(forced, 0.0, logprob.double())
            stopped = ~forced & torch.isin(token, ends)
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
        return [Rollout(row[:n], row[n:end], lp, finished) for row, n, end, lp, finished in columns]

    def _forward(self, ids, positions, caches):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            return backbone(self.model)(
                input_ids=ids, position_ids=positions[None], past_key_values=caches, use_cache=True
            ).last_hidden_state


def make_engine(model, tokenizer, cfg: Config):
    """The one place that chooses an engine."""
    engine = TorchEngine(tokenizer, cfg)
    engine.load(model)
    return engine


def sample(logits, temperature: float, min_p: float, generator):
    """(B, V) -> token (B,) and its log-prob (B,) under the very distribution that the update trains."""
    logp = log_softmax_min_p(logits.float() / (temperature or 1.0), min_p)
    if temperature == 0:
        token = logp.argmax(-1)
    else:  # argmax of log p + Gumbel noise, as p / Exponential noise
        token = (logp.exp() / torch.empty_like(logp).exponential_(generator=generator)).argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


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


def judge(rollouts: list[Rollout], problems: list[dict], tokenizer, cfg: Config) -> list[dict]:
    """One record a rollout, K consecutive rollouts a problem."""
    asked = [p for p in problems for _ in range(len(rollouts) // len(problems))]
    texts = tokenizer.batch_decode([r.ids for r in rollouts], skip_special_tokens=True)
    grades = verify.grade(texts, [p["answer"] for p in asked])
    failed = sum(grades.stats[name] for name in ("timeouts", "crashes"))
    if failed > 0.01 * len(rollouts):
        print0(f"the grader gave up on {failed} of {len(rollouts)} answers (timeouts and crashes count as wrong)")
    records = []
    for rollout, problem, text, right in zip(rollouts, asked, texts, grades):
        pattern = unexpected_pattern(text, rollout.ids, rollout.finished, cfg.repeat_ngram, cfg.repeat_count, problem["problem"])
        checks, honest = data_prep.audit_checks(problem["problem"], text)
        reward = penalised_reward(right, pattern, cfg.penalties)
        record = dict(id=problem.get("id"), problem=problem["problem"], response=text, reward=reward, right=bool(right), pattern=pattern)
        records.append(record | dict(checks=checks, honest=honest, length=len(rollout.ids)))
    records[0]["ungraded"] = failed
    return records


def means(records: list[dict]) -> dict:
    """What is logged of a set of judged rollouts: means over the responses of all ranks. README's glossary says what each is."""
    sums = {name: sum(float(r[name]) for r in records) for name in ("reward", "right", "length", "checks", "honest")}
    sums |= {name: sum(r["pattern"] == name for r in records) for name in ("overlong", "repetition", "garbled")}
    sums |= dict(ungraded=sum(r.get("ungraded", 0) for r in records), responses=len(records))
    sums = dict(zip(sums, all_sum(list(sums.values()))))
    honest = sums.pop("honest") / sums["checks"] if sums["checks"] else None
    B, right = sums.pop("responses"), sums.pop("right")
    return dict(accuracy=right / B, honest=honest) | {name: total / B for name, total in sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Data, run folders, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def read_rows(path: str, stage: str) -> list[dict]:
    """Traces ({"problem", "response"}, stage sft) or problems ({"problem", "answer"}) of a JSONL or JSONL.gz file.

    Where a row has neither response nor answer its "solution" serves: as the response, or for the answer in its last box.
    """
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8-sig")
    except OSError as e:
        raise Misuse(f"{path}: cannot be read ({e.strerror or e})")
    except (EOFError, zlib.error):
        raise Misuse(f"{path}: a damaged gzip file")
    except UnicodeDecodeError as e:
        raise Misuse(f"{path}: not UTF-8 text (at byte {e.start})")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise Misuse(f"{path}, line {number}: not JSON ({e})")
        if not isinstance(row, dict):
            raise Misuse(f"{path}, line {number}: a row must be a JSON object")
        solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
        if stage == "sft":
            row.setdefault("response", solution)
        else:
            row.setdefault("answer", verify.extract_answer(solution) or "")
        for name in ("problem", "response" if stage == "sft" else "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise Misuse(f"{path}, line {number}: field {name!r} is missing, empty or not text")
            if any("\ud800" <= c <= "\udfff" for c in row[name]):
                raise Misuse(f"{path}, line {number}: field {name!r} holds half of a surrogate pair, which is no text")
        rows.append(row | dict(where=f"{path}, line {number}"))
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
        if len(ids) > cfg.max_prompt:
            where = row.get("where") or f"problem {row['id']}"
            raise Misuse(f"{where}: a prompt of {len(ids)} tokens, --max-prompt is {cfg.max_prompt}; raise it or leave the row out")
    return encoded


def checkpoints(stage_folder: Path) -> list[Path]:
    """The finished checkpoints of one stage in order of steps."""
    found = [p for p in stage_folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def newest(folders: list[Path]) -> str:
    return str(folders[-1]) if folders else ""


class RunFolder:
    """The folder of one stage: config.json; metrics.jsonl (a row a step, the same bits for the same seed); timings.jsonl; samples.jsonl;
    checkpoint-N; curves.png. A stage that was interrupted goes on from its last checkpoint."""

    logs = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")

    def __init__(self, cfg: Config):
        self.path = Path(cfg.out) / (cfg.name or cfg.preset) / cfg.stage
        mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "name")}
        if (self.path / "config.json").exists():
            try:
                theirs = dict(json.loads((self.path / "config.json").read_text(encoding="utf-8"))["config"])
            except (ValueError, KeyError, TypeError):
                raise Misuse(f"{self.path / 'config.json'}: damaged; choose another --name, or remove that folder")
            differing = [f"{k} ({theirs.get(k)!r} there, {v!r} now)" for k, v in mine.items() if theirs.get(k) != v]
            if differing:
                raise Misuse(
                    f"{self.path} holds a run of another configuration: {', '.join(differing)}; choose another --name, or remove that folder"
                )
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

    def create(self, source: str):
        """Called when all inputs have been read and checked, so that a misuse leaves no folder behind."""
        try:
            if rank() == 0:
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self.path / "config.json").exists():
                    write_json(self.path / "config.json", self.config | dict(started_from=source))
        except OSError as e:
            raise Misuse(f"{self.path}: cannot be written ({e.strerror}); choose another --out")
        barrier()

    def append(self, name: str, *rows: dict):
        if rank() == 0:
            with open(self.path / name, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def read(self, name: str) -> list[dict]:
        """The rows of a log; a last line that a kill cut off does not count."""
        path = self.path / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def save(self, step: int, model, tokenizer, optimizer, anchor=None):
        """An ordinary Hugging Face folder with the trainer's state beside the weights; written beside, then renamed."""
        if rank() == 0:
            beside = self.path / f"partial-{step}"
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            torch.save(dict(optimizer=optimizer.state_dict(), anchor=anchor.state_dict() if anchor else None), beside / "trainer.pt")
            beside.rename(self.path / f"checkpoint-{step}")
        barrier()

    def resume(self, model, optimizer, anchor=None) -> int:
        """Load the trainer's state of the newest checkpoint (its weights are in `model` already), cut the logs back to it; -> next step."""
        found = checkpoints(self.path)
        step = int(found[-1].name[11:]) if found else 0
        if found:
            state = torch.load(found[-1] / "trainer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            if anchor:
                anchor.load_state_dict(state["anchor"])
            print0(f"going on from {found[-1]}")
        for name in self.logs if rank() == 0 else ():
            if (self.path / name).exists():
                rows = [row for row in self.read(name) if row["step"] < step]
                (self.path / (name + ".partial")).unlink(missing_ok=True)
                self.append(name + ".partial", *rows)
                (self.path / (name + ".partial")).replace(self.path / name)
        return step


# ----------------------------------------------------------------------------------------------------------------------
# Stage sft: cold start (paper section 1)
# ----------------------------------------------------------------------------------------------------------------------


def run_sft(cfg: Config):
    folder = RunFolder(cfg)
    traces = read_rows(cfg.data, "sft") if cfg.data else data_prep.embedded_traces()
    source = newest(checkpoints(folder.path)) or cfg.model
    model, tokenizer = load_policy(source, cfg) if source else tiny_policy(cfg)
    tests = encoded_tests(tokenizer, cfg)
    rows = [
        (x, tokenizer(t["response"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
        for x, t in zip(encode_prompts(traces, tokenizer, cfg), traces)
    ]
    kept = [row for row in rows if len(row[1]) <= cfg.max_new]
    if not kept:
        raise Misuse(f"every response is longer than --max-new {cfg.max_new} tokens (the shortest has {min(len(y) for _, y in rows)})")
    folder.create(source)
    steps = cfg.sft_steps or math.ceil(cfg.sft_epochs * len(kept) / cfg.sft_batch)
    print0(
        f"{len(kept)} traces of {np.mean([len(y) for _, y in kept]):.0f} tokens ({len(rows) - len(kept)} longer than --max-new left out), "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of {cfg.sft_batch}"
    )
    optimizer = make_optimizer(model, cfg)
    start = folder.resume(model, optimizer)
    bar = tqdm(range(start, steps), "sft", initial=start, total=steps, disable=rank() > 0, mininterval=1)
    for step in bar:
        began = time.perf_counter()
        batch = [kept[i] for i in batch_indices(len(kept), cfg.sft_batch, step, cfg.seed)]
        N = sum(len(y) for _, y in batch)  # tokens of the batch over all ranks: the one division
        mine = batch[rank() :: world()]
        # NOT IN PAPER: the loss stands on the response only, and every token of the batch weighs the same
        loss, _, entropy = all_sum(accumulate_gradient(model, mine, [1.0] * len(mine), [1 / N] * len(mine), cfg))
        lr = learning_rate(step, steps, cfg.sft_lr, cfg.warmup)
        norm = update(model, optimizer, lr, cfg)
        seconds = time.perf_counter() - began
        folder.append("metrics.jsonl", dict(step=step, loss=loss, entropy=entropy / N, grad_norm=norm, lr=lr, tokens=N))
        folder.append("timings.jsonl", dict(step=step, train=seconds, tokens=N))
        bar.set_postfix_str(f"loss {loss:.3f} entropy {entropy / N:.3f} {N / seconds:,.0f} tokens/s", refresh=False)
        last = step + 1 == steps
        if last or (step + 1) % 100 == 0:
            draw_curves(folder, cfg)
        if last or (step + 1) % cfg.sft_save_every == 0:
            folder.save(step + 1, model, tokenizer, optimizer)
    finish_stage(folder, steps, make_engine(model, tokenizer, cfg), tests, cfg, "rl")


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
    source = newest(checkpoints(folder.path)) or cfg.model or newest(cold)
    if not source:
        raise Misuse(f"no SFT checkpoint beside {folder.path}: run --stage sft first, or give --model")
    problems = read_rows(cfg.data, "rl") if cfg.data else data_prep.embedded_problems("train")
    model, tokenizer = load_policy(source, cfg)
    prompts, tests = encode_prompts(problems, tokenizer, cfg), encoded_tests(tokenizer, cfg)
    folder.create(source)
    print0(f"{len(problems)} problems; the policy starts from {source}")
    anchor = copy.deepcopy(model).requires_grad_(False) if cfg.anchor != "none" else None
    optimizer = make_optimizer(model, cfg)
    start = folder.resume(model, optimizer, anchor)
    engine = make_engine(model, tokenizer, cfg)
    bar = tqdm(range(start, cfg.rl_steps), "rl", initial=start, total=cfg.rl_steps, disable=rank() > 0)
    for step in bar:
        clock = [time.perf_counter()]
        # 1. oversample: K responses to each of P prompts
        chosen = batch_indices(len(problems), cfg.prompts, step, cfg.seed)[rank() :: world()]
        rollouts = engine.generate(
            [prompts[i] for i in chosen], cfg.k, seed_for(cfg.seed, "rollout", step, rank()), cfg.max_new, cfg.temperature, cfg.min_p
        )
        clock.append(time.perf_counter())
        # 2. reward: right answer, -1 for unexpected patterns
        records = judge(rollouts, [problems[i] for i in chosen], tokenizer, cfg)
        rewards = torch.tensor([r["reward"] for r in records]).view(-1, cfg.k)  # (P, K)
        clock.append(time.perf_counter())
        # 3. advantage: leave-one-out reward, centred KL to the anchor
        rows = [(r.prompt, r.ids) for r in rollouts]
        kl = torch.zeros_like(rewards)  # (P, K)
        if anchor is not None:
            kl = (torch.tensor([r.logprob for r in rollouts]) - torch.tensor(response_logprobs(anchor, rows, cfg))).view(-1, cfg.k)  # d_i
        advantages = advantages_of(rewards, kl, cfg.kl_coef, cfg.kl_center)  # (P, K)
        # 4. one update on these rollouts, entropy bonus included; the anchor follows
        flat = sum((r == r[0]).all().item() for r in rewards)  # groups that teach nothing: their advantages are zero, KL aside
        N, B, kl_sum, flat, sampled = all_sum(
            [sum(len(y) for _, y in rows), len(rows), kl.sum().item(), flat, sum(r.logprob for r in rollouts)]
        )
        weights = [1 / N if cfg.loss_norm == "tokens" else 1 / (B * len(y)) for _, y in rows]
        _, nll, entropy = all_sum(
            accumulate_gradient(model, rows, advantages.flatten().tolist(), weights, cfg, cfg.entropy_coef, cfg.temperature, cfg.min_p)
        )
        lr = learning_rate(step, cfg.rl_steps, cfg.rl_lr, cfg.warmup)
        norm = update(model, optimizer, lr, cfg)
        if cfg.anchor == "ema":
            ema_update_(anchor, model, cfg.ema_decay)
        engine.load(model)
        clock.append(time.perf_counter())
        # 5. say what happened
        row = dict(step=step, **means(records), kl=kl_sum / B, entropy=entropy / N, logprob_gap=abs(sampled + nll) / N)
        row |= dict(flat_groups=flat * cfg.k / B, grad_norm=norm, lr=lr, tokens=int(N))
        report_step(folder, bar, row, clock, records, cfg)
        last = step + 1 == cfg.rl_steps
        if last or (step + 1) % 10 == 0:
            draw_curves(folder, cfg)
        if last or (step + 1) % cfg.rl_save_every == 0:
            folder.save(step + 1, model, tokenizer, optimizer, anchor)
    finish_stage(folder, cfg.rl_steps, engine, tests, cfg, "eval")


def report_step(folder, bar, row, clock, records, cfg):
    """The console line, metrics.jsonl, timings.jsonl (seconds differ from run to run and stand apart), and a few samples."""
    generate, check, train = np.diff(clock).tolist()
    folder.append("metrics.jsonl", row)
    folder.append("timings.jsonl", dict(step=row["step"], generate=generate, verify=check, train=train, tokens=row["tokens"]))
    if row["step"] % 10 == 0:
        by_reward = sorted(records, key=lambda r: r["reward"])
        for kind, r in (("best", by_reward[-1]), ("worst", by_reward[0]), ("longest", max(records, key=lambda r: r["length"]))):
            folder.append("samples.jsonl", dict(step=row["step"], kind=kind, **r))
    total = generate + check + train
    bar.set_postfix_str(
        f"reward {row['reward']:.2f} right {row['accuracy']:.2f} length {row['length']:.0f} entropy {row['entropy']:.3f} kl {row['kl']:.2f} "
        f"overlong {row['overlong']:.2f} repeat {row['repetition']:.2f} flat {row['flat_groups']:.2f} {row['tokens'] / total:,.0f} tokens/s "
        f"({100 * generate / total:.0f} % generate, {100 * check / total:.0f} % verify, {100 * train / total:.0f} % train)"
    )
    if row["overlong"] > 0.5:
        print0(
            f"step {row['step']}: {100 * row['overlong']:.0f} % of the responses reached --max-new {cfg.max_new} without an end"
            " and teach nothing but brevity; raise --max-new"
        )
    if row["logprob_gap"] > 0.02:
        print0(f"step {row['step']}: sampler and trainer disagree by {row['logprob_gap']:.3f} nats a token: they are not the same policy")


# ----------------------------------------------------------------------------------------------------------------------
# Stage eval: pass@1, and accuracy against thinking budget (paper section 3)
# ----------------------------------------------------------------------------------------------------------------------


def encoded_tests(tokenizer, cfg: Config) -> tuple[list[dict], list[list[int]]]:
    """The held-out problems and their prompts."""
    problems = read_rows(cfg.test, "eval") if cfg.test else data_prep.embedded_problems("test")
    return problems, encode_prompts(problems, tokenizer, cfg)


def mean_and_error(values: list[list[float]]) -> tuple[float, float]:
    """Mean over problems of the mean over each problem's samples, and its standard error.

    The error is over PROBLEMS: the samples of one problem are not independent.
    """
    per_problem = np.array([np.mean(v) for v in values], dtype=float)
    return per_problem.mean().item(), (per_problem.std(ddof=1) / len(per_problem) ** 0.5).item() if len(per_problem) > 1 else float("nan")


def evaluate(engine, problems: list[dict], prompts: list[list[int]], samples: int, cfg: Config):
    """-> rollouts and their records, `samples` consecutive ones a problem."""
    rollouts = engine.generate(prompts, samples, seed_for(cfg.seed, "eval"), cfg.max_new, cfg.eval_temperature)
    return rollouts, judge(rollouts, problems, engine.tokenizer, cfg)


def thought_length(ids: list[int], tokenizer) -> int | None:
    """Tokens up to and including the one that completes `</think>`; None if it never comes. Ids are cut, text is never re-encoded."""
    if "</think>" not in tokenizer.decode(ids):
        return None
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if "</think>" in tokenizer.decode(ids[:middle]) else (middle + 1, high)
    return low


def cut_and_answer(engine, tokenizer, rollouts: list[Rollout], budget: int, cfg: Config) -> list[str]:
    """The response each rollout would have given had its thought been cut after `budget` tokens (paper section 3).

    A thought that ended within the budget keeps its own answer. Another is cut, closed with `answer_prefix`, and the policy writes
    the answer from it. NOT IN PAPER: the words of the prefix, and the answer being greedy.
    """
    prefix = tokenizer(cfg.answer_prefix.replace("\\n", "\n"), add_special_tokens=False).input_ids
    lengths = [thought_length(r.ids, tokenizer) for r in rollouts]
    late = lambda r, n: len(r.ids) > budget or not r.finished if n is None else n > budget  # a thought without an end is always cut
    cut = [i for i, (r, n) in enumerate(zip(rollouts, lengths)) if late(r, n)]
    prompts = [rollouts[i].prompt + rollouts[i].ids[:budget] + prefix for i in cut]
    answers = engine.generate(prompts, 1, seed_for(cfg.seed, "answer"), 32, temperature=0.0)
    ids = [r.ids for r in rollouts]
    for i, answer in zip(cut, answers):
        ids[i] = ids[i][:budget] + prefix + answer.ids
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def run_eval(cfg: Config):
    base = Path(cfg.out) / (cfg.name or cfg.preset)
    folders = [Path(c) for c in cfg.checkpoint.split(",") if c] or checkpoints(base / "sft")[-1:] + checkpoints(base / "rl")
    if not folders:
        raise Misuse(f"no checkpoint in {base}: run --stage sft and --stage rl first, or give --checkpoint")
    for path in folders:
        if not (path / "config.json").exists():
            raise Misuse(f"--checkpoint {path}: no such checkpoint (no config.json there)")
    budgets = sorted({int(b) for b in cfg.budgets.split(",")})
    names = [f"{p.parent.name} {p.name.removeprefix('checkpoint-')}" for p in folders]
    names = names if len(set(names)) == len(names) else [str(p) for p in folders]
    results = []
    for path, name in zip(folders, names):
        model, tokenizer = load_policy(str(path), cfg)
        engine = make_engine(model, tokenizer, cfg)
        problems, prompts = encoded_tests(tokenizer, cfg)
        rollouts, records = evaluate(engine, problems, prompts, cfg.eval_samples, cfg)
        group = lambda values: [values[i : i + cfg.eval_samples] for i in range(0, len(values), cfg.eval_samples)]
        value, error = mean_and_error(group([r["right"] for r in records]))
        scaling = []
        for budget in budgets:
            texts = cut_and_answer(engine, tokenizer, rollouts, budget, cfg)
            right = verify.grade(texts, [p["answer"] for p in problems for _ in range(cfg.eval_samples)])
            scaling.append([budget, *mean_and_error(group(right))])
        results.append(dict(checkpoint=str(path), name=name, pass_at_1=value, standard_error=error, **means(records), scaling=scaling))
        print0(
            f"{path}: pass@1 {100 * value:.1f} +- {100 * error:.1f} %, {results[-1]['length']:.0f} tokens, "
            f"over-long {100 * results[-1]['overlong']:.1f} %; by thinking budget "
            + ", ".join(f"{b}: {100 * v:.1f}" for b, v, _ in scaling)
        )
    if rank() == 0:
        (base / "eval").mkdir(parents=True, exist_ok=True)
        about = dict(test=cfg.test or "embedded", problems=len(problems), samples=cfg.eval_samples, temperature=cfg.eval_temperature)
        write_json(base / "eval" / "results.json", about | dict(seed=cfg.seed, checkpoints=results))
        draw_scaling(
            base / "eval" / "inference_scaling.png",
            results,
            f"{len(problems)} problems x {cfg.eval_samples} samples, T = {cfg.eval_temperature}, seed {cfg.seed}; bars: standard error",
        )
    print0(f"results.json and inference_scaling.png in {base / 'eval'}")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

PANELS = {
    "sft": [("loss (nats a token)", ["loss"]), ("entropy (nats a token)", ["entropy"]), ("gradient norm", ["grad_norm"])],
    "rl": [
        ("reward, share right", ["reward", "accuracy"]),
        ("response length (tokens)", ["length"]),
        ("share of responses", ["overlong", "repetition", "garbled"]),
        ("entropy (nats a token)", ["entropy"]),
        ("KL to the anchor (nats a response)", ["kl"]),
        ("checks: share honest; number / 10", ["honest", "checks"]),
    ],
}


def draw_curves(folder: RunFolder, cfg: Config):
    """curves.png of a stage from its metrics.jsonl: faint lines are steps, strong ones a moving average over 5 % of them."""
    if rank() > 0:
        return
    rows = folder.read("metrics.jsonl")
    panels = PANELS[cfg.stage]
    figure, axes = pyplot_figure(len(panels) // 3, 3)
    window = max(1, len(rows) // 20)
    for axis, (label, names) in zip(axes, panels):
        for name, style in zip(names, ("-", "--", ":")):
            y = np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float) * (0.1 if name == "checks" else 1)
            x = np.array([row["step"] + 1 for row in rows])
            line = axis.plot(x, y, lw=0.6, alpha=0.35)[0]
            axis.plot(x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid"), style, color=line.get_color(), label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    save_figure(figure, folder.path / "curves.png", f"T1 {cfg.stage}, run {cfg.name or cfg.preset}, seed {cfg.seed}")


def draw_scaling(path: Path, results: list[dict], title: str):
    """Accuracy against thinking budget, one curve per checkpoint, in the form of the paper's figure."""
    figure, (axis,) = pyplot_figure(1, 1)
    for i, result in enumerate(results):
        x, y, e = np.array(result["scaling"]).T
        axis.errorbar(
            x,
            100 * y,
            100 * e,
            marker="osD^vPX*"[i % 8],
            ls=("-", "--", "-.", ":")[i % 4],
            color=str(0.65 * (1 - i / max(1, len(results) - 1))) if len(results) > 1 else "black",
            capsize=2,
            label=result["name"],
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{b:.0f}" for b in x])
    axis.set_xlabel("thinking budget (tokens)")
    axis.set_ylabel("pass@1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="checkpoint")
    save_figure(figure, path, title)


def pyplot_figure(rows: int, columns: int):
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 2 * (columns == 1), 3 * rows + 1.5 * (columns == 1)), squeeze=False)
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
# Main
# ----------------------------------------------------------------------------------------------------------------------

STAGES = {"sft": run_sft, "rl": run_rl, "eval": run_eval}


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
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        raise Misuse(f"--preset {preset!r}: there is no such preset; choose from {', '.join(PRESETS)}")
    cfg = Config(**{**PRESETS[preset], **given})
    check_config(cfg)
    return cfg


CHOICES = dict(
    stage=tuple(STAGES),
    anchor=("ema", "fixed", "none"),
    loss_norm=("tokens", "responses"),
    dtype=("float32", "bfloat16"),
    device=("", "cpu", "cuda"),
)
MAY_BE_ZERO = {"seed", "sft_steps", "warmup", "min_p", "kl_coef", "ema_decay", "entropy_coef", "weight_decay", "eval_temperature"}


def check_config(cfg: Config):
    """Raise Misuse for values that make no sense."""

    def need(holds, name, what):
        if not holds:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(cfg, name)!r}: {what}")

    for name, value in dataclasses.asdict(cfg).items():
        if name in CHOICES:
            need(value in CHOICES[name], name, f"choose from {', '.join(filter(None, CHOICES[name]))}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            need(math.isfinite(value) and value >= 0, name, "must be a finite number, not below 0")
            need(value > 0 or name in MAY_BE_ZERO, name, "must be above 0")
    need(cfg.k >= 2, "k", "leave-one-out needs at least 2 samples per prompt")
    need(cfg.min_p < 1, "min_p", "must be below 1")
    need(cfg.ema_decay <= 1, "ema_decay", "must be at most 1")
    need(cfg.repeat_count > 1, "repeat_count", "must be at least 2: every block stands once")
    need(cfg.tiny_width % 8 == 0, "tiny_width", "must be a multiple of 8: four heads of an even width")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "device", "torch sees no GPU here")
    need(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.budgets), "budgets", "must be whole numbers above 0, separated by commas")
    need("{problem}" in (cfg.prompt_template or "{problem}"), "prompt_template", "must contain {problem}")
    need(not re.search(r"[/\\\0]|^\.+$", cfg.name), "name", "must be the name of one folder")
    need(cfg.prompts >= world(), "prompts", f"each of the {world()} ranks needs one at least")
    need(cfg.sft_batch >= world(), "sft_batch", f"each of the {world()} ranks needs one at least")


def main(argv: list[str] | None = None) -> int:
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        if distributed:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        cfg = parse_args(argv)
        STAGES[cfg.stage](cfg)
        return 0
    except Stop as e:
        print(f"t1.py{f', rank {rank()}' if world() > 1 else ''}: {e}", file=sys.stderr)
        return e.code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
