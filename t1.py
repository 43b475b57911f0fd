"""T1: advancing language model reasoning through reinforcement learning and inference scaling
(arXiv 2501.11651). T1 = RLOO + K = 64 samples per prompt at a temperature above 1 + an exact
entropy bonus + a KL to a moving anchor + reward -1 for unexpected patterns.

    torchrun t1.py --stage sft       cold start on traces that try, err and verify themselves
    torchrun t1.py --stage rl        reinforcement learning from the SFT checkpoint
    torchrun t1.py --stage eval      pass@1, and accuracy against thinking budget
    torchrun --nproc-per-node 8 t1.py --stage rl --preset qwen2.5-14b --data problems.jsonl
    python t1.py --help              every option: unit, default, the paper's value

The loss, with P prompts per step and K samples per prompt:

  A_i  = LOO(r'_i - beta d_i)                d_i = log pi_theta(y_i|x) - log pi_ref(y_i|x)
  loss = -(1/N) sum_i sum_t [ A_i log pi_theta(y_it | x, y_i<t) + alpha H(pi_theta(. | x, y_i<t)) ]

LOO is leave-one-out: a value minus the mean of the other K-1. r' is 1 (right), 0 (wrong) or -1
(over-long, repetitive, garbled, improbable). One update per batch: no PPO ratio, no value network.

Letters: B = P*K responses, N generated tokens of the whole batch over all ranks, T positions, V
vocabulary, D hidden width, n tokens scored at once; alpha is entropy_coef, beta is kl_coef.

Parts 1 to 4 of this file are the paper: `rl_step` is its algorithm, in six blocks. At first skip
part 5 (how it is computed) and all below the banner (what a run needs around it). "(section 2)" is
the paper's topic of that number in README's table; `NOT IN PAPER` marks what it leaves open. Of
what the parts use from below the banner, what is not clear from its use:

    cfg                  the options of `Method` and of the run
    RunFolder, latest    logs and checkpoints; a folder's last checkpoint, or the folder
    clock("rollout")     times a phase
    x.on_device          inside this `with`, x is on the device
    interrupt.check      raises Interrupted after a signal
    Stop, Misuse         end the run with one line: a failure; a mistake of the user
    rank(), world()      this process's number, and how many processes torchrun started
    exchange             to sample and to judge, n processes share the work as rollouts[i::n]; after
                         it all have all, those of other ranks as copies
    share_of_rank        to train: indices of this process's responses, balanced by tokens, those of
                         a prompt together
    gather               a list with the items of all ranks
    all_ranks_or_none    what a rank raises inside this `with`, all raise"""

import signal

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
if __name__ == "__main__":  # while the libraries load, signals wait for `main`
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

import bisect
import copy
import dataclasses
import itertools
import math
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

import data_prep
import verify
from data_prep import Misuse, Stop


# ----------------------------------------------------------------------------- the method's options
def knob(default, doc, paper="", stage="", zero=False, free=False, inherit=False):
    """An option. paper: its value there; stage: only this one accepts it; zero: 0 is allowed;
    free: it may change when a run resumes; inherit: the next stages of a run keep its value."""
    words = f"{doc} (default: {default!r}{'; paper: ' if paper else ''}{paper})"
    rules = dict(help=words, stage=stage, zero=zero, free=free, inherit=inherit)
    return field(default=default, metadata=rules)


@dataclass
class Method:
    """The paper's method. Defaults are the preset `tiny`'s; PAPER has those of large models."""

    max_prompt: int = knob(256, "longest prompt, tokens", "not stated", inherit=True)
    max_new: int = knob(160, "longest response, tokens", "10240; 32B: 16384", inherit=True)
    warmup: int = knob(10, "steps of linear warm-up of the rate", "not stated", zero=True)
    weight_decay: float = knob(0.0, "AdamW's weight decay", "not stated", zero=True)
    grad_clip: float = knob(1.0, "largest gradient norm", "not stated")
    # cold start
    sft_lr: float = knob(1.5e-3, "peak learning rate", "1e-5", "sft")
    sft_epochs: int = knob(3, "passes over the traces", "3", "sft")
    sft_batch: int = knob(32, "traces per step", "not stated", "sft")
    # reinforcement learning
    prompts: int = knob(32, "P, prompts per step over all ranks", "32", "rl")
    k: int = knob(16, "K, samples per prompt (at least 2)", "64", "rl")
    temperature: float = knob(1.1, "of rollouts, loss and KL", "above 1; 1.2 stable", "rl")
    min_p: float = knob(0.0, "drop tokens below min_p x the likeliest", "ablated", "rl", zero=True)
    rl_lr: float = knob(2e-4, "peak learning rate", "1.5e-6", "rl")
    rl_steps: int = knob(60, "updates", "about 260", "rl")
    entropy_coef: float = knob(1e-3, "alpha of the entropy bonus", "not stated", "rl", zero=True)
    kl_coef: float = knob(2e-4, "beta, weight of the KL in the advantage", "2e-4", "rl", zero=True)
    ema_decay: float = knob(0.95, "anchor's decay; 1: fixed", "not stated", "rl", zero=True)
    penalties: bool = knob(True, "reward -1 for unexpected patterns", "true")
    repeat_ngram: int = knob(8, "repetition: a block of this many tokens ...", "not stated")
    repeat_count: int = knob(3, "... that occurs this many times, without overlap", "not stated")
    max_nll: float = knob(
        0.0, "perplexity: largest mean -log-prob, nats; 0: off", "not stated", zero=True
    )
    loss_norm: Literal["tokens", "responses"] = knob(
        "tokens", "loss: mean over tokens, or over responses of their means", "not stated", "rl"
    )
    tis_cap: float = knob(0.0, "cap of the weights pi / mu; 0: off", "", "rl", zero=True)
    # inference scaling
    budgets: str = knob("16,32,64,96,128,160", "thinking budgets, tokens", "1024 to 16384", "eval")


# --------------------------------------------------------------- 1. Mathematics: pure functions
def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(P, K) -> (P, K): each reward minus the mean of the other K-1 of its prompt (section 2).

        [[1, 0, 0]] -> [[1, -1/2, -1/2]]

    A baseline without the sample itself adds no bias (1/N adds one of order 1/B, as N depends
    on the samples). GRPO divides by the standard deviation of the group and T1 does not: the
    division raises most the weight of prompts that are nearly always or nearly never solved.

    The KL is a part of the reward, r' - beta d, not of the loss: E[d grad log pi] is the gradient
    of KL(pi || pi_ref), but E[grad d] = E[grad log pi] is zero. Leave-one-out is T1's on-policy KL
    normalisation: it removes what the d of a prompt's samples have in common, which is only
    variance."""
    K = rewards.shape[1]
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (K - 1)  # (P, K)
    return rewards - baseline


def log_softmax_min_p(logits: torch.Tensor, min_p: float, keep=None) -> torch.Tensor:
    """(n, V) logits -> (n, V) log-probs; -inf for tokens less likely than min_p times the
    likeliest, the others renormalised. The tokens `keep` (n,) stay."""
    logp = logits.log_softmax(-1)
    if min_p <= 0:
        return logp
    dropped = logp < logp.amax(-1, keepdim=True) + math.log(min_p)
    if keep is not None:
        dropped.scatter_(1, keep[:, None], False)
    return logp.masked_fill(dropped, -math.inf).log_softmax(-1)


def logprob_and_entropy(hidden, lm_head, targets, temperature: float, min_p: float):
    """hidden (n, D), lm_head (V, D), targets (n,) -> log pi(y_t) and the exact entropy H_t, (n,)
    each, in float32.

    NOT IN PAPER: pi is the sampled distribution everywhere, at its temperature and min-p. The
    target is kept on the min-p support: rounding, or an anchor whose support differs, could drop
    it, and its log-prob would be -inf."""
    dtype = torch.promote_types(lm_head.dtype, torch.float32)
    logits = hidden.to(lm_head.dtype).to(dtype) @ lm_head.to(dtype).T  # (n, V), operands rounded
    logp = log_softmax_min_p(logits / temperature, min_p, keep=targets)  # (n, V)
    finite = logp.masked_fill(logp.isinf(), 0) if min_p > 0 else logp  # 0 log 0 = 0
    entropy = -(logp.exp() * finite).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def paper_loss(logprob, entropy, advantages, weights, entropy_coef: float):
    """-sum_t w_t [A_t log pi(y_t) + alpha H_t]: (n,) each -> scalar (section 2). H's gradient is
    taken at the sampled prefixes; that the policy also chooses these is left out, as in the paper.
    NOT IN PAPER: w_t = 1/N."""
    return -(weights * (advantages * logprob + entropy_coef * entropy)).sum()


def policy_loss_reference(
    hidden, lm_head, targets, advantages, weights, entropy_coef=0.0, temperature=1.0, min_p=0.0
):
    """The loss in plain torch: hidden (n, D), lm_head (V, D); targets, advantages, weights (n,) ->
    scalar. Its up to six (n, V) tensors take 15 GB at n = 4,096 and V = 151,936. Training calls
    `policy_loss`: the same for small batches without tis_cap, else in chunks."""
    logprob, entropy = logprob_and_entropy(hidden, lm_head, targets, temperature, min_p)
    return paper_loss(logprob, entropy, advantages, weights, entropy_coef)


@torch.no_grad()
def ema_update_(anchor, policy, decay: float):
    """anchor <- decay * anchor + (1 - decay) * policy, in place (section 2, dynamic anchor).
    Each rank updates its own shards."""
    for a, p in zip(anchor.parameters(), policy.parameters(), strict=True):
        local(a).lerp_(local(p).to(a.dtype), 1 - decay)


def learning_rate(step: int, steps: int, peak: float, warmup: int, constant=False) -> float:
    """Linear warm-up, then a cosine from the peak down to a tenth of it (SFT), or the peak (RL).
    NOT IN PAPER: the warm-up, the last tenth, and that RL's rate does not fall."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if constant:
        return peak
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(angle))


# ------------------------------------------------------------------------------------ 2. Rewards
@dataclass
class Problem:
    """A row of a data file ("problem", "answer", "id", ...) and the token ids of its prompt."""

    row: dict
    prompt: list[int]


@dataclass
class Rollout:
    """One response: what to sample, what was sampled, its judgement. In SFT it is a trace. The
    update trains on `ids`, never on re-tokenised text."""

    problem: Problem
    seed: int = 0  # of the problem's samples; with `sample` it decides the random numbers
    sample: int = 0  # 0..K-1
    ids: list[int] = field(default_factory=list)  # with the end token, if there is one
    logprobs: list[float] = field(default_factory=list)  # log pi(y_t | x, y_<t), by the sampler
    finished: bool = False  # ended by an end token within max_new
    text: str = ""
    right: bool = False
    ungraded: bool = False  # the grader gave up; counts as wrong
    nll: float = 0.0  # mean -logprob, nats per token: the log of its perplexity
    pattern: str | None = None  # see unexpected_pattern
    reward: float = 0.0
    behaviour: dict = field(default_factory=dict)  # see behaviour_of


def repeats(ids: list[int], n: int) -> int:
    """How often the most frequent block of n tokens occurs in ids, counted without overlap."""
    count = {}
    end = {}  # of the block's last occurrence that was counted
    for i in range(len(ids) - n + 1):
        block = tuple(ids[i : i + n])
        if i >= end.get(block, 0):
            count[block] = count.get(block, 0) + 1
            end[block] = i + n
    return max(count.values(), default=0)


COMMON_WORDS = set("the of is and to in we so for that it be if are this by with as have".split())
WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")  # not a command of LaTeX
CODE = re.compile(r"\[asy\].*?(\[/asy\]|$)|```.*?(```|$)", re.S)


def word_salad(text: str, prompt: str) -> bool:
    """Does `text` have 40 words in a row outside COMMON_WORDS, 20 different ones of 4 letters or
    more among these? Code is ignored. False if the prompt has not two of COMMON_WORDS, "the" or
    "and" among them."""
    english = COMMON_WORDS.intersection(WORD.findall(prompt.lower()))
    if len(english) < 2 or not english & {"the", "and"}:
        return False
    run = []  # the last words, at most 40, none of which is common
    for word in WORD.findall(CODE.sub(" ", text).lower()):
        run = [] if word in COMMON_WORDS else [*run[-39:], word]
        if len(run) == 40 and len({word for word in run if len(word) > 3}) >= 20:
            return True
    return False


def garbled(text: str, prompt: str = "") -> bool:
    """Mixed languages or random characters. Over 1 % of the characters are broken; or 60 Latin
    letters stand in a row; or 5 letters are of scripts used neither in mathematics nor in the
    prompt, if they are over 5 % of all or form 3 different runs of 2 or more; or a word salad."""
    broken = text.count("\ufffd")  # the replacement character
    for c in text:
        if c < " ":
            broken += c not in "\n\t\r"
        elif c > "~":  # control, unassigned, private use, half of a surrogate pair
            broken += unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs")
    if broken > 0.01 * len(text) or re.search(r"[A-Za-z]{60}", text):
        return True
    strange = data_prep.foreign_letters(text, prompt)
    if len(strange) >= 5:
        runs = set(re.findall(f"[{''.join(set(strange))}]{{2,}}", text))
        letters = sum(map(str.isalpha, text))
        if len(runs) >= 3 or len(strange) > 0.05 * letters:
            return True
    return word_salad(text, prompt)


PATTERNS = ("overlong", "repetition", "garbled", "high_perplexity")


def unexpected_pattern(
    text: str, ids: list[int], finished: bool,
    repeat_ngram=20, repeat_count=20, prompt="", nll=0.0, max_nll=0.0,
) -> str | None:  # fmt: skip
    """The first of PATTERNS that applies, or None (section 2).

    NOT IN PAPER: the rules. Over-long: no end token within the limit. Repetition: a block of
    `repeat_ngram` tokens occurs `repeat_count` times. Garbled: see there. High perplexity: the
    response's `nll` is above `max_nll`, if that is not 0. (Defaults: those of large models.)"""
    if not finished:
        return "overlong"
    if repeats(ids, repeat_ngram) >= repeat_count:
        return "repetition"
    if garbled(text, prompt):
        return "garbled"
    if nll > max_nll > 0:
        return "high_perplexity"
    return None


def penalised_reward(value: float, pattern: str | None, penalties: bool = True) -> float:
    """r': the value (1 right, 0 wrong), or -1 for an unexpected pattern whatever the answer
    (section 2). The -1 takes part in leave-one-out, as the paper's formula reads."""
    if pattern and penalties:
        return -1.0
    return float(value)


def grade(rollouts: list[Rollout]):
    """Fill in right and ungraded of each rollout, which has its text."""
    texts = [r.text for r in rollouts]
    golds = [r.problem.row["answer"] for r in rollouts]
    problems = [r.problem.row["problem"] for r in rollouts]
    grades = verify.grade(texts, golds, problems=problems)  # a list, with indices in .failed
    for i, r in enumerate(rollouts):
        r.right = grades[i]
        r.ungraded = i in grades.failed


def judge(rollouts: list[Rollout], tokenizer, cfg) -> torch.Tensor:
    """Fill in text, nll, what `grade` does, pattern, reward and behaviour -> rewards r', (B,). Each
    rank judges a part, and all ranks get all."""
    share = rollouts[rank() :: world()]
    with clock("judge"), all_ranks_or_none():
        for r in share:
            r.text = text_of(r, tokenizer)
            r.nll = -np.mean(r.logprobs)
        grade(share)
        for r in share:
            problem = r.problem.row["problem"]
            rest = (cfg.repeat_ngram, cfg.repeat_count, problem, r.nll, cfg.max_nll)
            r.pattern = unexpected_pattern(r.text, r.ids, r.finished, *rest)
            value = own_reward(cfg.reward, r) if cfg.reward else r.right
            r.reward = penalised_reward(value, r.pattern, cfg.penalties)
            r.behaviour = behaviour_of(problem, r.text, r.right)
    exchange(rollouts, share)
    return torch.tensor([r.reward for r in rollouts])


# ------------------------------------------------------- 3. Reinforcement learning, and cold start
def rl_step(step: int, problems, policy, anchor, engine, optimizer, cfg) -> tuple[dict, list]:
    """One step of T1 (section 2) -> its row of metrics.jsonl, and its rollouts."""
    P = cfg.prompts
    K = cfg.k

    # 1. Oversample: K responses to each of P prompts, at a temperature above 1. All are trained on.
    chosen = [problems[i] for i in batch_indices(len(problems), P, step, cfg.seed)]
    rollouts = sample_responses(engine, policy, chosen, step, cfg)  # B = P * K

    # 2. Reward: 1 for a right answer, 0 for a wrong one, -1 for an unexpected pattern.
    rewards = judge(rollouts, policy.tokenizer, cfg).view(P, K)

    # 3. KL to the moving anchor: d = log pi - log pi_ref.
    kl = kl_to_anchor(anchor, rollouts, cfg).view(P, K)

    # 4. Advantage: the reward minus beta KL, leave-one-out.
    advantages = rloo_advantages(rewards - cfg.kl_coef * kl)  # (P, K)

    # 5. One update on exactly these samples: -(1/N) sum_t [A log pi + alpha H].
    sums = accumulate_gradient(policy, rollouts, advantages.flatten(), cfg)
    lr = learning_rate(step, cfg.rl_steps, cfg.rl_lr, cfg.warmup, constant=True)
    norm = update(policy, optimizer, lr, cfg)

    # 6. The anchor follows the policy.
    with clock("update"), anchor.on_device:
        ema_update_(anchor, policy, cfg.ema_decay)
    return rl_metrics(step, rollouts, rewards, kl, sums, norm, lr), rollouts


def sample_responses(engine, policy, problems: list[Problem], step: int, cfg) -> list[Rollout]:
    """K responses to each problem with the policy's present weights, (P * K,), on every rank."""
    with clock("push"):
        push(engine, policy, problems[0].prompt, cfg)
    rollouts = []
    for number, problem in enumerate(problems):
        seed = seed_for(cfg.seed, "rollout", step, number)
        rollouts += [Rollout(problem, seed, sample) for sample in range(cfg.k)]
    with clock("rollout"):
        generate(engine, rollouts, cfg.max_new, cfg.temperature, cfg.min_p)
        engine.sleep()
    return rollouts


def kl_to_anchor(anchor, rollouts: list[Rollout], cfg) -> torch.Tensor:
    """d_i = log pi_theta(y_i|x) - log pi_ref(y_i|x) of all responses, (B,), summed over tokens.

    NOT IN PAPER: the sampler's log-probs stand for the policy's own, which would cost one more
    forward. In float32 the two agree to 1e-6 per token; in bfloat16 their distance, `logprob_gap`,
    is noise in A. (metrics.jsonl corrects its `kl` by the mean of log pi - log mu.)"""
    interrupt.check()  # a signal raises here: on large models the phases of a step take minutes
    mine = share_of_rank(rollouts)
    rows = [row_of(rollouts[i]) for i in mine]
    with clock("anchor"), anchor.on_device:
        reference = response_logprobs(anchor, rows, cfg, cfg.temperature, cfg.min_p)
    kl = torch.zeros(len(rollouts), dtype=torch.float64)
    for i, logprobs in zip(mine, reference):
        kl[i] = sum(rollouts[i].logprobs) - logprobs.double().sum()
    interrupt.check()
    return sum(gather([kl])).float()  # each rank filled its own places


def run_rl(cfg):
    folder = RunFolder(cfg)
    sft = str(folder.path.parent / "sft")
    source = folder.source or latest(cfg.model or sft)
    if source == sft:  # `latest` found no checkpoint in it
        raise Misuse(
            f"no SFT checkpoint beside {folder.path}: --stage sft first, or give the --name or"
            " --preset of its run, or --model"
        )
    whole, tokenizer, problems, tests = prepare(folder, source, cfg)
    print0(
        f"{len(problems)} problems of {cfg.data or 'the embedded set'}; the policy starts from"
        f" {source}{unfinished(source)}"
    )

    # Anchor and policy start from the SFT model; with several ranks `shard` makes the copy.
    whole_anchor = copy.deepcopy(whole) if world() == 1 else whole
    anchor = shard(whole_anchor, tokenizer, cfg).requires_grad_(False)
    if cfg.offload:
        anchor.on_device = Parked(anchor.parameters())
    policy = shard(whole, tokenizer, cfg)
    del whole, whole_anchor
    optimizer = make_optimizer(policy, cfg)
    folder.resume(policy, optimizer, anchor)  # it may rename folder.source
    engine = make_engine(folder.source or source, policy, tokenizer, cfg)

    for step in folder.steps():
        try:
            row, rollouts = rl_step(step, problems, policy, anchor, engine, optimizer, cfg)
        except Interrupted:  # before the gradient: save, and do this step again on resume
            folder.after_step(step)
            raise
        folder.log(row, rollouts)
        warn(row, rollouts)
        folder.after_step(step + 1)
    finish_stage(folder, policy, engine, tests, "eval")


def sft_step(step: int, steps: int, traces: list[Rollout], policy, optimizer, cfg) -> dict:
    """One step of SFT (section 1) -> its row of metrics.jsonl.

    SFT is the loss of RL with A = 1, alpha = 0 and temperature 1, on responses from the data.
    NOT IN PAPER: every response token of the batch weighs the same."""
    batch = [traces[i] for i in batch_indices(len(traces), cfg.sft_batch, step, cfg.seed)]
    plain = dict(entropy_coef=0.0, temperature=1.0, min_p=0.0, tis_cap=0.0, loss_norm="tokens")
    cfg = dataclasses.replace(cfg, **plain)
    sums = accumulate_gradient(policy, batch, torch.ones(len(batch)), cfg)
    lr = learning_rate(step, steps, cfg.sft_lr, cfg.warmup)
    norm = update(policy, optimizer, lr, cfg)
    N = sums["tokens"]
    entropy = sums["entropy"] / N
    return dict(step=step, loss=sums["loss"], entropy=entropy, grad_norm=norm, lr=lr, tokens=N)


def run_sft(cfg):
    folder = RunFolder(cfg)
    source = folder.source or latest(cfg.model)
    whole, tokenizer, traces, tests = prepare(folder, source, cfg)
    policy = shard(whole, tokenizer, cfg)
    del whole
    origin = source or "random weights"
    print0(f"{len(traces)} traces, {folder.total} steps; the policy starts from {origin}")
    optimizer = make_optimizer(policy, cfg)
    folder.resume(policy, optimizer)

    for step in folder.steps():
        row = sft_step(step, folder.total, traces, policy, optimizer, cfg)
        folder.log(row)
        folder.after_step(step + 1)
    finish_stage(folder, policy, make_engine(folder.source, policy, tokenizer, cfg), tests, "rl")


# ---------------------------------------- 4. Inference scaling (section 3), evaluation (section 4)
def thought_length(rollout: Rollout, tokenizer) -> float:
    """Tokens up to and including the one that completes `</think>`, found by bisection. Without the
    tag all of a finished response is thought, and the thought of an unfinished one never ends."""
    ids = rollout.ids
    if "</think>" not in tokenizer.decode(ids):
        return len(ids) if rollout.finished else math.inf
    # The smallest n whose first n tokens hold the tag:
    return bisect.bisect_left(
        range(len(ids)), True, key=lambda n: "</think>" in tokenizer.decode(ids[:n])
    )


def cut_thoughts(answerer, tokenizer, rollouts, thoughts, budget: int, cfg) -> list[Rollout]:
    """The responses if their thoughts had been cut after `budget` tokens (section 3).

    thoughts: `thought_length` of each. A thought that ended within the budget keeps its own answer.
    For a longer one the engine `answerer` (a summary model, or the policy itself behind CLOSING:
    `</think>`, an open box) writes the answer. Its text is then that alone; its ids are counted.
    NOT IN PAPER: finished thoughts keep their answer; the policy as answerer; greedy answers."""
    closing = "" if cfg.answer_model else CLOSING
    closing_ids = tokenizer(closing, add_special_tokens=False).input_ids
    late = [i for i, thought in enumerate(thoughts) if thought > budget]
    starts = [cut_at(rollouts[i].ids, budget, tokenizer) + closing_ids for i in late]
    answers = []
    for i, start in zip(late, starts):
        problem = rollouts[i].problem
        prompt = problem.prompt + start
        if cfg.answer_model:
            prompt = summary_prompt(problem.row, tokenizer.decode(start), answerer)
        answers.append(Rollout(Problem(problem.row, prompt)))
    room = SUMMARY_TOKENS if cfg.answer_model else ANSWER_TOKENS
    generate(answerer, answers, room, temperature=0.0)
    result = list(rollouts)
    for i, start, answer in zip(late, starts, answers):
        answer.text = closing + text_of(answer, answerer.tokenizer)
        answer.ids = start + answer.ids
        result[i] = answer
    return result


def accuracy_within(answerer, tokenizer, rollouts, samples: int, cfg) -> list[list]:
    """[budget, pass@1, standard error, mean length] for each thinking budget."""
    thoughts = [thought_length(r, tokenizer) for r in rollouts]
    points = []
    for budget in sorted({int(b) for b in cfg.budgets.split(",")}):
        cut = cut_thoughts(answerer, tokenizer, rollouts, thoughts, budget, cfg)
        share = list(map(copy.copy, cut[rank() :: world()]))  # what is logged keeps its judgement
        with all_ranks_or_none():
            grade(share)
        exchange(cut, share)
        right = np.reshape([r.right for r in cut], (-1, samples))
        length = float(np.mean([len(r.ids) for r in cut]))
        points.append([budget, *mean_and_error(right), length])
    return points


def evaluate(engine, problems: list[Problem], samples: int, cfg) -> list[Rollout]:
    """`samples` judged responses to each problem, one problem after the other."""
    cfg = dataclasses.replace(cfg, reward="")  # right or wrong is measured
    rollouts = []
    for i, problem in enumerate(problems):
        seed = seed_for(cfg.seed, "eval", i)
        rollouts += [Rollout(problem, seed, sample) for sample in range(samples)]
    total = len(rollouts) * engine.ranks // world()  # of this rank's engine
    with tqdm(total=total, desc="responses", disable=rank() > 0) as bar:
        generate(engine, rollouts, cfg.max_new, cfg.eval_temperature, ended=bar.update)
    judge(rollouts, engine.tokenizer, cfg)
    return rollouts


# --- 5. How it is computed: policy, packing and attention, gradient, sampling, the head in chunks
Row = tuple[list[int], list[int]]  # the token ids of a prompt and of its response


def row_of(rollout: Rollout) -> Row:
    return rollout.problem.prompt, rollout.ids


class Policy(torch.nn.Module):
    """A Hugging Face causal LM: packed rows in, hidden states out, and the weight of its head.
    FSDP wraps it as it is (`shard`); its root unit (embedding, last norm, head) stays gathered."""

    def __init__(self, lm, tokenizer, cfg, device=None):
        super().__init__()
        self.lm = lm.eval()  # no dropout: the trained distribution is the sampled one
        self.tokenizer = tokenizer
        self.device = device or run_device()
        self.bf16 = cfg.dtype == "bfloat16"
        self.on_device = Parked()
        embeddings = lm.get_input_embeddings().num_embeddings
        self.vocabulary = min(max(tokenizer.get_vocab().values()) + 1, embeddings)
        eos = lm.generation_config.eos_token_id  # None, one or several
        eos = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        self.end_ids = [i for i in dict.fromkeys(eos) if i is not None]

    @property
    def head(self) -> torch.Tensor:
        """(V, D) without the rows that pad the vocabulary: ids beyond the tokenizer are neither
        sampled nor trained. Read it after a forward: before, FSDP holds a shard."""
        weight = self.lm.get_output_embeddings().weight[: self.vocabulary]
        return weight.bfloat16() if self.bf16 else weight

    def pack(self, rows: "list[Row]") -> "Packed":
        return pack(rows, self.device, ragged=self.bf16 and self.device.type == "cuda")

    def forward(self, batch: "Packed") -> torch.Tensor:
        """-> (n, D), the hidden states that predict the response tokens. transformers hands `pack`
        on to `attention`."""
        hidden = self.backbone(batch.ids, batch.position, use_cache=False, pack=batch)
        return hidden[0].index_select(0, batch.predict)

    def backbone(self, ids, position, **options) -> torch.Tensor:
        """The transformer without its head: ids (B, T) -> (B, T, D)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.lm.base_model(input_ids=ids, position_ids=position, **options)
        return output.last_hidden_state


@dataclass
class Packed:
    """Rows without padding: M tokens, which predict n response tokens. A prompt shared by
    consecutive rows is stored once. The last token of a row is only a target. For attention the
    tokens are copied into cells, row after row: a padded grid, or, if ragged, without its padding
    (0 1 2 3 / 0 1 4 / 0 1 5). Example: prompt a b, responses c d E, e E and f E, E the end:

        ids      a b c d e f                position  0 1 2 3 2 2
        predict  1 2 3  1 4  1 5            targets   c d E  e E  f E
        spread   0 1 2 3 / 0 1 4 4 / 0 1 5 5    collect   0 1 2 3 6 10"""

    ids: torch.Tensor  # (1, M)
    position: torch.Tensor  # (1, M) place in its row
    predict: torch.Tensor  # (n,) places in 0..M-1 that predict the response tokens
    targets: torch.Tensor  # (n,) response tokens, the end token included
    spread: torch.Tensor  # (cells,) the token of each cell
    collect: torch.Tensor  # (M,) first cell of each token: its others are copies, or padding
    bounds: torch.Tensor  # (rows + 1,) int32, where each row begins, and the end
    shape: tuple[int, int]  # rows, and tokens of the longest
    ragged: bool  # cells are the rows end to end; else a grid: short rows repeat a token


def pack(rows: list[Row], device, ragged: bool = False) -> Packed:
    ids = []
    position = []
    predict = []
    targets = []
    places = []  # of the tokens of each row
    for prompt, group in itertools.groupby(rows, key=lambda row: row[0]):
        shared = range(len(ids), len(ids) + len(prompt))
        ids += prompt
        position += range(len(prompt))
        for _, response in group:
            place = [*shared, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
            position += range(len(prompt), len(place))
            predict += place[len(prompt) - 1 :]
            targets += response
            places.append(place)
    lengths = [len(place) for place in places]
    T = max(lengths)
    if not ragged:
        places = [np.pad(place, (0, T - len(place)), mode="edge") for place in places]
    spread = np.concatenate(places)
    arrays = dict(
        ids=[ids],
        position=[position],
        predict=predict,
        targets=targets,
        spread=spread,
        collect=np.unique(spread, return_index=True)[1],
        bounds=np.cumsum([0, *lengths], dtype=np.int32),
    )
    tensors = {name: torch.as_tensor(np.asarray(x), device=device) for name, x in arrays.items()}
    return Packed(**tensors, shape=(len(rows), T), ragged=ragged)


# What transformers may pass on and `attention` does not compute. `unfit_config` refuses windows.
NOT_COMPUTED = "attention_mask softcap s_aux position_bias indices block_indices".split()


def attention(module, q, k, v, attention_mask, scaling=None, pack=None, **others):
    """The attention of all training and sampling, registered with transformers as "t1".

    With `pack`: q (1, Hq, M, Dh), k and v (1, Hkv, M, Dh); each row attends to itself. Without: q
    (B, Hq, T, Dh) is a prefill from position 0, or one position against a cache. No mask is built
    and key-value heads are not repeated. -> (B, T, Hq, Dh), packed (1, M, Hq, Dh)"""
    others["attention_mask"] = attention_mask
    for name in NOT_COMPUTED:
        if others.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
    if pack is not None:
        return packed_attention(q[0], k[0], v[0], scaling, pack)[None], None
    if q.shape[2] > 1:
        return causal_attention(q, k, v, scaling), None
    # Decoding: the query heads of a key-value head become queries, all at one position.
    heads = q.shape[1]
    kv_heads = k.shape[1]
    q = q.reshape(-1, kv_heads, heads // kv_heads, q.shape[3])  # (B, Hkv, Hq / Hkv, Dh)
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.reshape(-1, 1, heads, v.shape[3]), None


def packed_attention(q, k, v, scaling, pack: Packed):
    """(heads, M, Dh) each -> (M, Hq, Dh)."""
    q, k, v = (x.transpose(0, 1).index_select(0, pack.spread) for x in (q, k, v))
    if pack.ragged:
        q, k, v = (x.bfloat16() for x in (q, k, v))  # (cells, heads, Dh)
        bounds = (pack.bounds, pack.bounds, pack.shape[1], pack.shape[1])
        causal = dict(scale=scaling, window_size=(-1, 0), enable_gqa=True)
        out = varlen_attn(q, k, v, *bounds, **causal)
    else:  # a padded grid: padding comes last, so that the causal mask hides it
        q, k, v = (x.unflatten(0, pack.shape).transpose(1, 2) for x in (q, k, v))
        out = causal_attention(q, k, v, scaling).flatten(0, 1)
    return out.index_select(0, pack.collect)


def causal_attention(q, k, v, scaling):
    """(B, heads, T, Dh) each -> (B, T, Hq, Dh)."""
    dtype = v.dtype
    if q.requires_grad and q.device.type == "cpu" and q.shape[2] < 256:
        # In float32 a CPU's backward pass over short rows takes half the time of bfloat16.
        dtype = torch.promote_types(dtype, torch.float32)
    causal = dict(is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    with torch.autocast(q.device.type, enabled=False):  # it would cast back
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), **causal)
    return out.transpose(1, 2)


transformers.AttentionInterface.register("t1", attention)


def micro_batches(policy, rows: list[Row], most: int) -> list[tuple[list[int], float]]:
    """Row indices in groups of up to `most` tokens, each with weight 1. A piece is the rows of one
    prompt whose lengths have the same number of bits. Groups are filled piece by piece, short ones
    first: that saves padding, and a group stores the prompt of a piece once. Sharded layers are
    gathered by all ranks together, so all run the same number of micro-batches: a rank with fewer
    repeats a short row with weight 0."""
    sizes = [len(prompt) + len(response) for prompt, response in rows]
    pieces = {}
    for i in sorted(range(len(rows)), key=sizes.__getitem__):
        pieces.setdefault((tuple(rows[i][0]), sizes[i].bit_length()), []).append(i)
    groups = []
    room = 0  # tokens that still fit in the last group
    for piece in sorted(pieces.values(), key=lambda piece: sizes[piece[-1]]):
        shared = 0  # tokens of the prompt, if it stands in the group
        for i in piece:
            if sizes[i] - shared > room:
                groups.append([])
                room = most  # a row of more tokens is a group of its own
                shared = 0
            groups[-1].append(i)
            room -= sizes[i] - shared
            shared = len(rows[i][0])
    result = [(group, 1.0) for group in groups]
    if isinstance(policy, FSDPModule):
        for _ in range(max(gather([len(groups)])) - len(groups)):
            result.append((groups[0][:1], 0.0))
    return result


def accumulate_gradient(policy, rollouts: list[Rollout], advantages, cfg) -> dict:
    """Add the gradient of the loss on this rank's responses to .grad (section 2).

    advantages (B,), one per response of the whole batch. -> sums over all tokens and ranks; `bias`
    is that of log pi - log mu, mu the sampler, and `gap` that of its size; gap_p99 is the largest
    of the ranks' 99th percentiles. Raises Stop on all ranks if a sum is not finite."""
    N = sum(len(r.ids) for r in rollouts)  # of the whole batch and all ranks: the one division
    B = len(rollouts)
    weights = torch.full((B,), 1 / N)  # of each token of a response
    if cfg.loss_norm == "responses":
        weights = torch.tensor([1 / (B * len(r.ids)) for r in rollouts])
    mine = share_of_rank(rollouts)
    rows = [row_of(rollouts[i]) for i in mine]
    sums = torch.zeros(3, dtype=torch.float64)
    gaps = [torch.zeros(0)]
    with clock("gradient"), all_ranks_or_none():
        for group, real in micro_batches(policy, rows, cfg.micro_tokens):
            which = [mine[i] for i in group]
            batch = [rollouts[i] for i in which]
            packed = policy.pack([rows[i] for i in group])
            lengths = torch.tensor([len(r.ids) for r in batch])
            A = advantages[which].repeat_interleave(lengths).to(policy.device)  # (n,)
            # The loss is a sum over ranks, of whose gradients FSDP takes the mean: hence world(),
            # divided out where the loss is reported. A repeated row has the weight 0.
            w = real * world() * weights[which]
            w = w.repeat_interleave(lengths).to(policy.device)  # (n,)
            log_mu = torch.cat([torch.tensor(r.logprobs) for r in batch])  # (n,), in SFT empty
            log_mu = log_mu.to(policy.device)
            hidden = policy(packed)
            options = (cfg.entropy_coef, cfg.temperature, cfg.min_p, log_mu, cfg.tis_cap)
            loss, logp, entropy = policy_loss(hidden, policy.head, packed.targets, A, w, *options)
            loss.backward()
            if real:
                part = torch.stack([loss.detach() / world(), -logp.sum(), entropy.sum()])
                sums += part.double().cpu()
                if len(log_mu):
                    gaps.append((logp - log_mu).cpu())
        if not sums.isfinite().all():
            raise Stop(f"rank {rank()}: loss, log-prob or entropy is not finite: {sums.tolist()}")
    gaps = torch.cat(gaps)
    noise = torch.stack([gaps.double().sum(), gaps.double().abs().sum()])
    parts = gather([torch.cat([sums, noise])])
    loss, nll, entropy, bias, gap = sum(parts).tolist()
    p99 = np.quantile(gaps.abs().numpy(), 0.99).item() if len(gaps) else 0.0
    p99 = max(gather([p99]))
    return dict(loss=loss, nll=nll, entropy=entropy, bias=bias, gap=gap, gap_p99=p99, tokens=N)


@torch.no_grad()
def response_logprobs(policy, rows: list[Row], cfg, temperature=1.0, min_p=0.0):
    """log pi(y_t | x, y_<t) of each row's response: a tensor for each, float32, on the CPU."""
    result = [torch.zeros(0)] * len(rows)
    for group, _ in micro_batches(policy, rows, cfg.micro_tokens):
        batch = policy.pack([rows[i] for i in group])
        hidden = policy(batch)
        logp, _ = token_logprobs_and_entropy(hidden, policy.head, batch.targets, temperature, min_p)
        lengths = [len(rows[i][1]) for i in group]
        for i, part in zip(group, logp.cpu().split(lengths)):
            result[i] = part
    if isinstance(policy, FSDPModule):
        policy.reshard()  # no backward pass follows that would drop the gathered weights
    return result


def update(policy, optimizer, lr: float, cfg) -> float:
    """Clip and step -> the gradient's norm before clipping. A gradient that is not finite raises
    Stop before the weights change."""
    with clock("update"):
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not math.isfinite(norm):
            raise Stop(
                f"rank {rank()}: the gradient's norm is {norm}: stopped before the weights changed;"
                " lower the rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        with optimizer.on_device:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


# Sampling. An engine has `tokenizer` and `cfg`; `ranks`, how many processes share it;
# `load(policy)`, True if weights were copied; `generate(rollouts, ...)`, which fills them in;
# `sleep()`. `make_engine` chooses TorchEngine or VLLMEngine by --engine.


def sample(logits, temperature: float, min_p: float, uniform):
    """(B, V) logits, (B,) uniform numbers in [0, 1) -> tokens and their log-probs, (B,), of the
    distribution that is trained. Temperature 0 is greedy, with the log-probs of temperature 1."""
    logp = log_softmax_min_p(logits.float() / (temperature or 1.0), min_p)
    token = logp.argmax(-1) if temperature == 0 else draw(logp.exp(), uniform)
    return token, logp.gather(1, token[:, None])[:, 0]


def draw(p, uniform):
    """(B, V) probabilities, (B,) uniform numbers -> tokens (B,): the first whose cumulative sum, in
    float64, exceeds `uniform` of the total. Its block of 256 tokens is found first: the sums of all
    V tokens would be a (B, V) tensor. Rounding never takes a token with p = 0."""
    below_1 = 1 - 2.0**-52
    B, V = p.shape
    blocks = F.pad(p, (0, -V % 256)).view(B, -1, 256)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, V / 256)
    threshold = uniform[:, None].clamp(max=below_1) * sums[:, -1:]
    block = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
    threshold = threshold - F.pad(sums, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(B, device=p.device), block[:, 0]].double().cumsum(-1)  # (B, 256)
    place = torch.searchsorted(inside, threshold.minimum(below_1 * inside[:, -1:]), right=True)
    return (256 * block + place)[:, 0].clamp(max=V - 1)  # p may be NaN, see `generate`


def generate(engine, rollouts, max_new: int, temperature: float, min_p=0.0, ended=None):
    """Sample all rollouts, of all problems. Each engine draws its share of the samples of every
    problem, so that the work is even; then every rank holds all of them. ended(n): n of this rank's
    share have just ended."""
    engines = world() // engine.ranks
    share = rollouts[rank() // engine.ranks :: engines]
    with all_ranks_or_none():
        engine.generate(share, max_new, temperature, min_p, ended)
        if not all(math.isfinite(sum(r.logprobs)) for r in share):
            raise Stop(f"rank {rank()}: log-probs are not finite; lower the rate; {RESUMES}")
    exchange(rollouts, share, engine.ranks)


class TorchEngine:
    """Sampling in plain torch, on any device. The model sees no padding: each prompt is prefilled
    to the length of the shortest, in one pass; the rest of longer ones is fed token by token while
    shorter ones already answer. Rows that ended leave the batch. The random numbers of a sample
    depend on its seed, `sample` and max_new alone: batch and ranks change it by rounding only."""

    ranks = 1  # per engine

    def __init__(self, tokenizer, cfg):
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.policy = None

    def load(self, policy) -> bool:
        if not (policy.bf16 or isinstance(policy, FSDPModule)):
            self.policy = policy  # the trainer's own weights: nothing to copy
            return False
        if self.policy is None:  # a whole copy on each rank: large models need vLLM
            lm = empty_lm(policy.lm.config, policy.lm.generation_config)
            self.policy = Policy(lm, self.tokenizer, self.cfg)
            for module in lm.base_model.modules():
                if isinstance(module, torch.nn.Linear) and policy.bf16:
                    module.bfloat16()  # else autocast casts its weights again for every token
            self.policy.to(self.policy.device)
        weights = self.policy.lm.state_dict()
        for name, w in full_weights(policy):
            weights[name].copy_(w)
        # Evaluation comes with several checkpoints, whose tokenizers may differ.
        self.policy.end_ids = policy.end_ids
        self.policy.vocabulary = policy.vocabulary
        return True

    def sleep(self):
        pass

    def generate(self, rollouts, max_new: int, temperature=1.0, min_p=0.0, ended=None):
        """Fill in ids, logprobs and finished. The rollouts of one problem stand together."""
        groups = by_problem(rollouts)
        groups.sort(key=lambda group: len(group[0].problem.prompt))  # similar lengths together
        samples = max(map(len, groups), default=1)
        per_batch = max(1, self.cfg.rollout_rows // samples)
        for start in range(0, len(groups), per_batch):
            batch = groups[start : start + per_batch]
            self._generate(batch, max_new, temperature, min_p, ended)
        return rollouts

    @torch.no_grad()
    def _generate(self, groups: list[list[Rollout]], max_new, temperature, min_p, ended):
        """B samples of one batch, grouped by prompt, in two numberings. A row, 0..B-1, is a sample
        for good (tokens, lengths, uniform, logprobs, end). A slot, 0..b-1, is its place among those
        that still run (hidden, token, place, the cache); slot s is row row_of_slot[s]. If of 5
        slots 1 and 3 end, then left = 3 and slot 4 moves into slot 1: rows 0 4 2. Position t counts
        from the prompt's start."""
        policy = self.policy
        device = policy.device
        rows = [r for group in groups for r in group]
        counts = torch.tensor([len(group) for group in groups], device=device)  # samples per prompt
        tokens, lengths, uniform = self._inputs(groups, max_new)  # (B, longest), (B,), (B, max_new)
        logprobs = torch.zeros(tokens.shape, device=device)
        end = lengths + max_new  # (B,) one past the last token
        end_tokens = torch.tensor(policy.end_ids, device=device)
        lm_head = policy.head
        head = cpu_float32(lm_head)

        # Prefill each prompt to the shortest one's length, once; the cache repeats it per sample.
        B, longest = tokens.shape
        prefix = int(lengths.min())
        first = counts.cumsum(0) - counts  # row of each prompt's first sample
        cache = Cache(policy, counts, longest)
        hidden = self._last_hidden(tokens[first, :prefix], range(prefix), cache)
        hidden = hidden.repeat_interleave(counts, 0)  # (B, D)

        row_of_slot = torch.arange(B, device=device)  # (b,)
        for t in range(prefix, longest):
            # The token at position t: sampled, or the prompt's where the prompt is longer.
            place = t - lengths[row_of_slot]  # (b,) place in the response; below 0: in the prompt
            logits = logits_of(hidden.to(lm_head.dtype), head)
            u = uniform[row_of_slot, place.clamp(min=0)]
            token, logprob = sample(logits, temperature, min_p, u)
            token = torch.where(place < 0, tokens[row_of_slot, t], token)
            tokens[row_of_slot, t] = token
            logprobs[row_of_slot, t] = logprob

            # Rows that ended leave: slots that run, from `left` on, fill the gaps before it.
            stopped = (place >= 0) & torch.isin(token, end_tokens)
            end[row_of_slot] = torch.where(stopped, t + 1, end[row_of_slot])
            running = end[row_of_slot] > t + 1
            left = int(running.sum())
            if ended:
                ended(len(row_of_slot) - left)
            if left == 0:
                break
            if left < len(row_of_slot):
                empty = (~running[:left]).nonzero()[:, 0]
                moved = left + running[left:].nonzero()[:, 0]
                row_of_slot[empty] = row_of_slot[moved]
                token[empty] = token[moved]
                row_of_slot = row_of_slot[:left]
                token = token[:left]
                cache.keep(left, empty, moved)
            hidden = self._last_hidden(token[:, None], [t], cache)

        parts = zip(rows, tokens.tolist(), logprobs.tolist(), lengths.tolist(), end.tolist())
        for rollout, ids, logps, start, stop in parts:
            rollout.ids = ids[start:stop]
            rollout.logprobs = logps[start:stop]
            rollout.finished = ids[stop - 1] in policy.end_ids

    def _inputs(self, groups: list[list[Rollout]], max_new: int):
        """-> tokens (B, longest) that begin with the prompts, lengths of the prompts (B,), and a
        uniform number for each token to be sampled (B, max_new)."""
        prompts = []
        draws = []
        for group in groups:
            prompts += [torch.tensor(r.problem.prompt) for r in group]
            numbers = [r.sample for r in group]
            random = np.random.default_rng(group[0].seed)
            draws.append(random.random((max(numbers) + 1, max_new))[numbers])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        tokens = F.pad(tokens, (0, max_new))
        uniform = torch.from_numpy(np.concatenate(draws))
        device = self.policy.device
        return tokens.to(device), lengths.to(device), uniform.to(device)

    def _last_hidden(self, ids, positions, cache) -> torch.Tensor:
        """ids (b, T) at T positions -> the last hidden state of each row, (b, D)."""
        positions = torch.tensor([list(positions)], device=ids.device)
        hidden = self.policy.backbone(ids, positions, past_key_values=cache, use_cache=True)
        return hidden[:, -1]


# The head. Log-probs and entropy of n tokens need n x V logits, 2.5 GB at n = 4,096 and V =
# 151,936: they are made chunk by chunk. The loss is sum_t a_t log p_t + b_t H_t with a = -w A
# (times the importance weight), b = -w alpha; `forward` makes a chunk's gradients with its logits.
# On a CPU `cpu_float32` and `products_in` keep products of bfloat16 values in float32.


def policy_loss(
    hidden, lm_head, targets, advantages, weights, entropy_coef: float = 0.0,
    temperature: float = 1.0, min_p: float = 0.0, log_mu=None, tis_cap: float = 0.0,
    chunk: int = 0,
):  # fmt: skip
    """The loss of `policy_loss_reference`; log-probs and entropies (n,), float32, without gradient.
    In chunks of c positions; without tis_cap and if 3 n <= c the plain way, which then takes no
    more memory than a chunk.

    NOT IN PAPER: truncated importance weights. An engine in bfloat16 samples from mu, not exactly
    from pi; with its log-probs `log_mu` (n,), A_t is multiplied by min(pi/mu, tis_cap), a
    constant in the gradient. The prefixes stay mu's, which leaves a bias; the cap limits noise. The
    loss that is returned is without these weights."""
    c = chunk or head_chunk(len(lm_head), hidden.device)
    if 3 * len(hidden) <= c and not tis_cap:
        logprob, entropy = logprob_and_entropy(hidden, lm_head, targets, temperature, min_p)
        loss = paper_loss(logprob, entropy, advantages, weights, entropy_coef)
        return loss, logprob.detach(), entropy.detach()
    a = -advantages * weights
    b = -entropy_coef * weights
    return _PolicyLoss.apply(hidden, lm_head, targets, a, b, temperature, min_p, c, log_mu, tis_cap)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, targets, a, b, temperature, min_p, chunk, log_mu, tis_cap):
        dtype = torch.promote_types(lm_head.dtype, torch.float32)
        head = cpu_float32(lm_head)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=dtype)
        logprob = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprob)
        for start in range(0, len(hidden), chunk):
            s = slice(start, start + chunk)
            h = hidden[s].to(lm_head.dtype)
            y = targets[s]
            z, p, lse, logprob[s], entropy[s] = _chunk_stats(h, head, y, temperature, min_p)
            coefficient = a[s]
            if tis_cap:
                coefficient = coefficient * (logprob[s] - log_mu[s]).exp().clamp(max=tis_cap)
            g = _chunk_gradient(z, p, lse, entropy[s], y, coefficient, b[s], temperature)  # (c, V)
            del p  # before g.to(bfloat16) makes one more (c, V)
            if g.is_cuda and h.dtype == torch.bfloat16:  # on the tensor cores, summed in float32
                g = g.to(h.dtype)
                grad_hidden[s] = g @ head
                torch.addmm(grad_head, g.T, h, out_dtype=torch.float32, out=grad_head)
            else:
                with products_in(h.dtype):
                    grad_hidden[s] = g @ head
                    grad_head.addmm_(g.T, h.to(head.dtype))
            del z, g  # before those of the next chunk are made
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(logprob, entropy)
        return (a * logprob + b * entropy).sum(), logprob, entropy

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        grad_hidden, grad_head = ctx.saved_tensors
        others = [None] * 8
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *others


@torch.no_grad()
def token_logprobs_and_entropy(hidden, lm_head, targets, temperature=1.0, min_p=0.0):
    """`logprob_and_entropy` in chunks, without gradient."""
    head = cpu_float32(lm_head)
    c = head_chunk(len(lm_head), hidden.device)
    stats = []
    for h, y in zip(hidden.to(lm_head.dtype).split(c), targets.split(c)):
        stats.append(_chunk_stats(h, head, y, temperature, min_p)[-2:])
    logprobs, entropies = zip(*stats)
    return torch.cat(logprobs), torch.cat(entropies)


def logits_of(hidden, head):
    """(c, D), (V, D) -> (c, V). Products of bfloat16 are summed, and kept, in float32."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    with products_in(hidden.dtype):
        return hidden.to(head.dtype) @ head.T


def _chunk_stats(hidden, lm_head, targets, temperature, min_p):
    """One chunk of c positions: z (c, V), logits / temperature with each row's maximum at 0; p =
    exp(z), 0 off the min-p support; lse (c,), the log of p's sum; log-prob of the target and
    entropy, (c,) each."""
    z = logits_of(hidden, lm_head)
    if temperature != 1:
        z /= temperature
    z -= z.amax(-1, keepdim=True)
    p = z.exp()
    if min_p > 0:  # keep the target: rounding, or the anchor's own support, may exclude it
        p_target = p.gather(1, targets[:, None])
        F.threshold_(p, min_p, 0.0).scatter_(1, targets[:, None], p_target)
    total = p.sum(-1)
    lse = total.log()
    logprob = z.gather(1, targets[:, None])[:, 0] - lse
    if z.is_cuda:
        pz = (p * z).sum(-1)
    else:  # without a third (c, V) buffer
        pz = torch.bmm(p[:, None], z[:, :, None])[:, 0, 0]
    return z, p, lse, logprob, lse - pz / total  # entropy: -sum p log p


def _chunk_gradient(z, p, lse, entropy, targets, a, b, temperature):
    """d (a log P_y + b H) / d logits, (c, V), written over z; a and b are (c,). P = softmax(logits
    / tau) is not the argument p = exp(z), which is not normalised: P = p exp(-lse), log P = z -
    lse.
    With dP_u/dlogit_v = P_u (1[u=v] - P_v) / tau:
        d log P_y / dlogit_v = (1[v=y] - P_v) / tau
        dH / dlogit_v        = -sum_u (log P_u + 1) dP_u/dlogit_v = -P_v (log P_v + H) / tau
    Together (a 1[v=y] - P_v (a + b (log P_v + H))) / tau. Off the min-p support p and P are 0."""
    scale = (-lse).exp() / temperature
    z *= (-b * scale)[:, None]
    z += ((b * (lse - entropy) - a) * scale)[:, None]
    z *= p
    return z.scatter_add_(1, targets[:, None], (a / temperature)[:, None].to(z.dtype))


# ================================================================================================
# T1 ends here. Below is what a run needs around it.
# ================================================================================================
# In this order: presets and options; problems and prompts; measures of a response; evaluation; the
# vLLM engine; models and sharding; checkpoints and run folders; ranks, clock, signals; pictures;
# the command line.
import argparse
import atexit
import contextlib
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import logging
import os
import runpy
import select
import shlex
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from data_prep import append_rows, read_json, read_log, read_rows, sync, write_json


PAPER = dict(
    max_prompt=1024, max_new=10240, dtype="bfloat16", micro_tokens=16384, checkpointing=True,
    compile=True, offload=True, tis_cap=2.0, keep=2, keep_every=78, k=64, weight_decay=0.1,
    sft_lr=1e-5, sft_batch=64, rl_lr=1.5e-6, rl_steps=260, rl_save_every=13, temperature=1.2,
    ema_decay=0.992, repeat_ngram=20, repeat_count=20, budgets="1024,2048,4096,8192,10240",
)  # fmt: skip
PRESETS = {
    "tiny": {},
    "small": dict(  # NOT IN PAPER: SmolLM2-135M on grade-school problems (docs/results.md)
        max_prompt=512, max_new=256, dtype="bfloat16", micro_tokens=1536, warmup=3, tis_cap=2.0,
        sft_lr=2e-4, sft_batch=8, rl_lr=3e-5, rl_steps=20, rl_save_every=5, rollout_rows=256,
        budgets="8,16,32,64,128",
    ),
    "pretrained": dict(  # NOT IN PAPER: a model of up to a few billion parameters on one machine
        max_prompt=1024, max_new=1024, dtype="bfloat16", micro_tokens=16384, checkpointing=True,
        tis_cap=2.0, keep=2, weight_decay=0.1, sft_lr=1e-5, rl_lr=1e-6, rl_steps=200,
        ema_decay=0.99, repeat_ngram=20, repeat_count=20, rl_save_every=20,
        budgets="128,256,512,1024",
    ),
    "glm4-9b": PAPER | dict(  # its context is 8,192 tokens
        model="zai-org/glm-4-9b-hf", max_new=7168, budgets="1024,2048,4096,7040"
    ),
    "qwen2.5-14b": PAPER | dict(model="Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": PAPER | dict(
        model="Qwen/Qwen2.5-32B", max_new=16384, budgets="1024,2048,4096,8192,16384"
    ),
}  # fmt: skip


@dataclass
class Config(Method):
    """All options: those of the method, and those of a run around it."""

    stage: Literal["sft", "rl", "eval"] = knob("", "what to do")
    preset: Literal["", *PRESETS] = knob(
        "", "values for a kind of model; empty: pretrained for --model on own data, else tiny"
    )
    name: str = knob("", "name of the run's folder; empty: the preset's name", free=True)
    out: str = knob("runs", "folder that holds all runs", free=True)
    seed: int = knob(0, "seed of data order, sampling and the tiny model's weights", zero=True)
    # inputs
    model: str = knob(
        "",
        "folder or hub name of a causal LM; empty: in sft the preset's or tiny's, later the run's",
    )
    data: str = knob(
        "", "traces (sft) or problems (rl): .jsonl, .json, .csv, .parquet, folder; empty: embedded"
    )
    columns: str = knob("", "other names of columns of --data: problem=COLUMN,answer=COLUMN, ...")
    test: str = knob("", "problems to evaluate on; empty: a held-out part of --data, or embedded")
    resume_from: int = knob(
        0,
        "branch: continue from checkpoint-N of run NAME in a new folder NAME-from-N",
        "",
        "sft or rl",
        zero=True,
    )
    checkpoint: str = knob(
        "", "folders, by commas; empty: the run's last SFT and all its RL checkpoints", "", "eval"
    )
    prompt_template: str = knob(
        "", "text around {problem}; empty: the chat template, or '{problem}\\n'", inherit=True
    )
    system: str = knob("", "system prompt, for chat templates (\\n: new line)", inherit=True)
    chat_template_kwargs: str = knob(
        "", 'the template\'s variables, JSON, such as {"enable_thinking": true}', inherit=True
    )
    reward: str = knob(
        "", "FILE.py:FUNCTION(response, row) -> float in place of right or wrong", "", "rl"
    )
    # numerics
    dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "activations, saved weights; trained weights, log-probs, entropy: float32",
        inherit=True,
    )
    micro_tokens: int = knob(4096, "tokens of one micro-batch, prompts included", free=True)
    checkpointing: bool = knob(False, "recompute activations in the backward pass", free=True)
    compile: bool = knob(False, "torch.compile each layer of the trainer", free=True)
    offload: bool = knob(
        False, "keep anchor and AdamW's state in CPU memory between uses", free=True
    )
    timeout: int = knob(30, "minutes after which a rank gives up waiting for others", free=True)
    # checkpoints and logs
    keep: int = knob(10, "number of last checkpoints that are kept", free=True)
    keep_every: int = knob(
        0, "also keep the weights of checkpoints at multiples of N; 0: none", zero=True, free=True
    )
    keep_rollouts: bool = knob(False, "keep every response in rollouts.jsonl.gz", free=True)
    # stages
    sft_steps: int = knob(0, "steps of SFT; 0: those of sft_epochs", "", "sft", zero=True)
    sft_save_every: int = knob(500, "steps between checkpoints", "", "sft")
    rl_save_every: int = knob(18, "steps between checkpoints", "", "rl")
    eval_samples: int = knob(
        0,
        "samples per problem; 0: 32 on AIME, 1 on other benchmarks, else 4",
        "32 on AIME",
        "eval",
        zero=True,
    )
    eval_temperature: float = knob(1.0, "temperature of evaluation; 0: greedy", "0", zero=True)
    benchmarks: str = knob(
        "", "instead of --test: math500, aime24, omni500, gpqa, ... from benchmarks/", "", "eval"
    )
    answer_model: str = knob(
        "",
        "folder or hub name of the model that answers cut thoughts; empty: the policy",
        "a summary model",
        "eval",
    )
    # rollout engine
    engine: Literal["auto", "torch", "vllm"] = knob("auto", "auto: vllm, if installed, on a GPU")
    rollout_rows: int = knob(1024, "torch engine: rows generated at once", free=True)
    vllm_tp: int = knob(0, "ranks that share a vllm engine; 0: engine_ranks", zero=True, free=True)
    vllm_memory: float = knob(
        0.0, "vllm engine: share of the GPU; 0: engine_share", zero=True, free=True
    )


TINY = dict(layers=3, width=128)  # of the embedded model
BENCHMARKS = Path("benchmarks")  # written by data_prep.py benchmarks
ENTROPY_FLOOR = 0.01  # nats per token: warn below
KL_CEILING = 50.0  # nats per response: warn above
PUSH_TOLERANCE = dict(float32=1e-3, bfloat16=0.1)  # nats: mean log-prob gap allowed after a push


# ------------------------------------------------------------------- problems, prompts and rewards
def read_data(cfg: Config) -> tuple[list[dict], list[dict]]:
    """-> rows to train on, and held-out problems: those of --test, the embedded ones, or one in
    fifty of --data by a hash of its text, the same in every stage. No held-out problem is trained
    on, however it is spelled, unless nothing else is left."""
    tests = read_rows(cfg.test, "eval", cfg.columns, strict=not cfg.data) if cfg.test else []
    if cfg.stage == "eval" and cfg.test:
        return [], tests
    if cfg.data:
        rows = read_rows(cfg.data, cfg.stage, cfg.columns)
    elif cfg.stage == "sft":
        rows = data_prep.embedded_traces()
    else:
        rows = data_prep.embedded_problems("train")
    if not (cfg.data or cfg.test):
        return rows, data_prep.embedded_problems("test")
    keys = [text_key(row) for row in rows]
    out = {text_key(row) for row in tests}
    if not cfg.test:
        out = {key for key in keys if seed_for(0, key) % 50 == 0}  # traces without answers, too
        held = {key: row for key, row in zip(keys, rows) if key in out and row.get("answer")}
        tests = list(held.values())
    rest = [row for key, row in zip(keys, rows) if key not in out]
    if not rest:
        print0(
            "data: every row is a problem of the test: all are trained on, its pass@1 is not held"
            " out"
        )
        return rows, tests if cfg.test else []
    what = "are problems of --test" if cfg.test else "held out for evaluation (--test for others)"
    print0(f"data: {len(rows) - len(rest)} rows {what}, {len(rest)} rows left to train on")
    return rest, tests


def text_key(row: dict) -> str:
    """The same for a problem in all its spellings."""
    return data_prep.key(data_prep.tokens(row["problem"]))


def prepare(folder, source: str, cfg: Config):
    """-> the model of `source` on one rank, its tokenizer, what to train on (rollouts of the traces
    in sft, problems in rl) and the held-out problems. All is checked before the run's folder is
    made."""
    rows, tests = read_data(cfg)
    whole, tokenizer = load_whole(source, cfg)
    tests = encode_prompts(tests, tokenizer, cfg)
    problems = encode_prompts(rows, tokenizer, cfg)
    examples = problems
    steps = cfg.rl_steps
    if cfg.stage == "sft":
        examples = encode_responses(problems, tokenizer, cfg)
        steps = cfg.sft_steps or math.ceil(cfg.sft_epochs * len(examples) / cfg.sft_batch)
    prompt = look_at_prompt(problems, tokenizer, cfg)
    if not folder.source:
        on_rank0(try_export, whole, tokenizer, cfg)
    folder.create(source, problems, tests, prompt, steps)
    return whole, tokenizer, examples, tests


def test_sets(cfg: Config) -> list[tuple[str, list[dict], int]]:
    """(name, problems, samples per problem) of the benchmarks, or of the run's own test set."""
    if not cfg.benchmarks:
        if cfg.preset != "tiny" and not (cfg.test or cfg.data):
            raise Misuse(
                "--stage eval: on which problems? Give --test FILE, --benchmarks NAMES or the"
                " run's --data"
            )
        name = cfg.test or cfg.data or "embedded"
        _, problems = read_data(cfg)
        if not problems:
            raise Misuse(f"{name}: nothing of it is held out; give --test FILE")
        return [(name, problems, cfg.eval_samples or 4)]
    sets = []
    for name in cfg.benchmarks.split(","):
        path = BENCHMARKS / f"{name}.jsonl"
        if not path.exists():
            extra = "--gpqa YOUR_COPY.csv " if name == "gpqa" else ""
            raise Misuse(
                f"there is no {path}; write it: python data_prep.py benchmarks {extra}--out"
                f" {BENCHMARKS}"
            )
        usual = 32 if name.startswith("aime") else 1
        sets.append((name, read_rows(str(path), "eval"), cfg.eval_samples or usual))
    return sets


ONE_DAY = datetime.datetime(2024, 7, 26)  # of templates that write the date: it must not change


def prompt_ids(row: dict, tokenizer, cfg: Config) -> list[int]:
    """The problem as the model sees it, with the system message of its row or of --system.
    NOT IN PAPER: the template; a model was trained on its own chat template."""
    problem = row["problem"]
    system = row.get("system", "")
    if not cfg.prompt_template and getattr(tokenizer, "chat_template", None):
        messages = [dict(role="user", content=problem)]
        if system or cfg.system:
            messages.insert(0, dict(role="system", content=system or unescaped(cfg.system)))
        options = json_object(cfg.chat_template_kwargs)
        options |= dict(
            tokenize=True,
            return_dict=False,
            truncation=False,
            padding=False,
            add_generation_prompt=True,
            strftime_now=ONE_DAY.strftime,
        )
        try:
            return tokenizer.apply_chat_template(messages, **options)
        except Exception as e:  # whatever the template raises
            raise Misuse(f"{place_of(row)}: refused by the chat template: {reason_of(e)}")
    if system:
        problem = f"{system}\n\n{problem}"
    text = (unescaped(cfg.prompt_template) or "{problem}\n").replace("{problem}", problem)
    ids = tokenizer(text).input_ids
    plain = tokenizer(text, add_special_tokens=False).input_ids
    # Some tokenizers put an end token after a text, and begin tokens before one that has them.
    if ids[-1:] == [tokenizer.eos_token_id] != plain[-1:]:
        ids = ids[:-1]
    begin = ids[: len(ids) - len(plain)]
    return plain if plain[: len(begin)] == begin else ids


def text_of(rollout: Rollout, tokenizer) -> str:
    """The response without its end token. Special tokens stay: <think> may be one. If the prompt
    opened <think>, it is prepended, so that a box inside the thought is not taken as the answer."""
    ids = rollout.ids
    if rollout.finished and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    text = tokenizer.decode(ids)
    if opens_thought(rollout.problem.prompt, tokenizer):
        text = "<think>" + text
    return text


def cut_at(ids: list[int], budget: int, tokenizer) -> list[int]:
    """The first `budget` tokens; fewer where the cut would fall inside a tag."""
    ids = ids[:budget]
    while re.search(r"</?(t(h(i(nk?)?)?)?)?$", tokenizer.decode(ids[-8:])):
        ids = ids[:-1]
    return ids


# NOT IN PAPER: what a summary model is asked; what makes the policy answer; the longest answers.
ASK = """%s

Here are thoughts about this problem. They may break off.

%s

Do not go on with them. Write only the final answer that they lead to, in \\boxed{}."""
CLOSING = "</think>\nThe answer is \\boxed{"
ANSWER_TOKENS = 64  # of the policy, which only fills the box
SUMMARY_TOKENS = 512  # of a summary model


def summary_prompt(row: dict, thought: str, answerer) -> list[int]:
    """What --answer-model is asked: problem and thought as text, by its own tokenizer and template.
    No part of that text becomes one of its special tokens. Too long a prompt loses its middle."""
    text = ASK % (row["problem"], thought)
    for token in answerer.tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(str(token), " ")
    ids = prompt_ids(row | dict(problem=text, system=""), answerer.tokenizer, answerer.cfg)
    half = answerer.cfg.max_prompt // 2
    if len(ids) > 2 * half:
        print0(
            f"{place_of(row)}: too long for --answer-model, its middle is left out; raise"
            " --max-prompt"
        )
        del ids[half:-half]
    return ids


def unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def opens_thought(prompt: list[int], tokenizer) -> bool:
    """Does the prompt end in <think>, so that the response begins inside a thought?"""
    return tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")


def look_at_prompt(problems: list[Problem], tokenizer, cfg: Config) -> str:
    """Print the first prompt as the model sees it, and what it says about options and traces;
    Misuse where these cannot have the wanted effect. -> its text, which resuming compares."""
    first = problems[0]
    text = tokenizer.decode(first.prompt)
    print0(
        f"the first of {len(problems)} prompts, {len(first.prompt)} tokens:"
        f" {shortened(repr(text))}\nits ids: {shortened(str(first.prompt))}"
    )
    template = "" if cfg.prompt_template else tokenizer.chat_template
    problem = first.row["problem"]
    before, _, after = text.rpartition(problem)
    check_prompt_options(first, before, template, tokenizer, cfg)

    # A template around a prompt that has one already.
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if template:
        marks.append(after.strip())
    for mark in marks:
        if mark and mark in problem and text.count(mark) > problem.count(mark):
            raise Misuse(
                f"the first problem holds {mark!r}, as a prompt with a template does; give bare"
                " problems, or --prompt-template '{problem}'"
            )
    check_open_thought(problems, text, cfg)
    return text


def check_prompt_options(first: Problem, before: str, template, tokenizer, cfg: Config):
    """Say or refuse options that change nothing in the prompt; --system: see `is_whole`."""
    if cfg.chat_template_kwargs:
        if not template:
            raise Misuse(
                "--chat-template-kwargs: these prompts come from no chat template; leave it out, or"
                " give '' in place of what the stage before had"
            )
        plain = dataclasses.replace(cfg, chat_template_kwargs="")
        if prompt_ids(first.row, tokenizer, plain) == first.prompt:
            print0("--chat-template-kwargs changes nothing in this prompt")
    system = first.row.get("system") or cfg.system
    if template and not system and "system" in before.lower():
        print0("the system prompt is the chat template's own; --system TEXT for another")
    if "strftime_now" in str(template):
        print0(f"the chat template writes a date: in every run it is {ONE_DAY:%d %b %Y}")


def check_open_thought(problems: list[Problem], text: str, cfg: Config):
    """Refuse traces that do not fit a prompt which begins a thought, or has ended one."""
    responses = [p.row["response"] for p in problems if cfg.stage == "sft"]
    endless = sum("</think>" not in response for response in responses)
    if text.rstrip().endswith("<think>") and endless:
        raise Misuse(
            f"the prompt ends in <think>, and {endless} of {len(problems)} responses have no"
            " </think>: their answers would be thoughts; see --prompt-template"
        )
    if text.rstrip().endswith("</think>"):
        what = "the prompt ends in a thought that is closed"
        if any("<think>" in response for response in responses):
            raise Misuse(
                f"{what}, and the traces have thoughts; give --prompt-template, or for many models"
                """ --chat-template-kwargs '{"enable_thinking": true}'"""
            )
        print0(f"{what}: responses are answers without a thought")


def shortened(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"


def json_object(text: str) -> dict | None:
    """The object that a JSON text is, {} for no text; None if it is none."""
    try:
        value = data_prep.parse_json((text or "{}").encode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def encode_prompts(rows: list[dict], tokenizer, cfg: Config) -> list[Problem]:
    """A prompt is never cut: those that are not whole are counted and left out."""
    prompts = {}  # ids and `is_whole` of a text: traces repeat their problem
    kept = []
    gone = []
    for row in rows:
        text = row["problem"], row.get("system")
        if text not in prompts:
            ids = prompt_ids(row, tokenizer, cfg)
            prompts[text] = ids, is_whole(row, ids, tokenizer, cfg)
        ids, whole = prompts[text]
        (kept if whole else gone).append(Problem(row, ids))
    if gone:
        bad = (
            f"{len(gone)} of {len(rows)} prompts are empty or longer than --max-prompt"
            f" {cfg.max_prompt}, or do not hold the problem as it was given, the first is"
            f" {place_of(gone[0].row)}"
        )
        if not kept:
            raise Misuse(f"{bad}; nothing is left")
        print0(f"{bad}: left out")
    return kept


def is_whole(row: dict, ids: list[int], tokenizer, cfg: Config) -> bool:
    """Is the whole problem in its prompt, and that within max_prompt? Misuse for a system message
    that is not."""
    text = letters_of(tokenizer.decode(ids))
    if letters_of(row.get("system") or unescaped(cfg.system)) not in text:
        raise Misuse(
            f"{place_of(row)}: --system is not in the prompt: there is no chat template, or it"
            " takes none; write it into --prompt-template 'TEXT\\n{problem}\\n'"
        )
    return letters_of(row["problem"]) in text and len(ids) <= cfg.max_prompt


def letters_of(text: str) -> str:
    """What a tokenizer keeps of a text: not all keep white space and forms of characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def encode_responses(problems: list[Problem], tokenizer, cfg) -> list[Rollout]:
    """Traces as rollouts that are already there. Those longer than max_new, and those that would
    teach to go on after an end token, are counted and left out."""
    texts = []
    for problem in problems:
        response = problem.row["response"]
        if opens_thought(problem.prompt, tokenizer):  # the prompt has written the tag
            response = response.removeprefix("<think>").lstrip("\n")
        texts.append(response.removesuffix(tokenizer.eos_token))
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    traces = [Rollout(p, ids=[*ids, end], finished=True) for p, ids in zip(problems, encoded)]
    kept = [t for t in traces if t.ids.index(end) + 1 == len(t.ids) <= cfg.max_new]
    if not kept:
        shortest = min(len(trace.ids) for trace in traces)
        raise Misuse(
            f"every response is longer than --max-new {cfg.max_new} tokens"
            f" (the shortest has {shortest}), or holds {tokenizer.eos_token} before its end"
        )
    if len(kept) < len(traces):
        print0(
            f"{len(traces) - len(kept)} of {len(traces)} responses are longer than --max-new"
            f" {cfg.max_new} tokens, or hold {tokenizer.eos_token} before their end: left out"
        )
    return kept


@functools.cache
def reward_function(spec: str):
    """The function that --reward FILE.py:FUNCTION names; it can import the modules beside its
    file."""
    file, _, name = spec.rpartition(":")
    try:
        sys.path.insert(0, str(Path(file).resolve().parent))
        return runpy.run_path(file)[name].__call__  # an error here if it has none
    except BaseException as e:
        raise Misuse(f"--reward {spec}: {type(e).__name__}: {reason_of(e)}; give FILE.py:FUNCTION")


def own_reward(spec: str, rollout: Rollout) -> float:
    """The value of --reward FILE.py:FUNCTION; the function gets a copy of the row."""
    row = rollout.problem.row
    try:
        value = float(reward_function(spec)(rollout.text, copy.deepcopy(row)))
        if not torch.tensor(value).isfinite():  # as training reads it, in float32
            raise ValueError(f"{value} is no reward")
        return value
    except BaseException as e:
        raise Stop(f"--reward {spec}: {type(e).__name__}: {reason_of(e)}; in {place_of(row)}")


def place_of(row: dict) -> str:
    return row.get("where") or row.get("id")


# ------------------------------------------------------------------------ measures of a response
REFLECTION = re.compile(
    r"\b(?:wait|hmm+|perhaps|maybe|alternatively|however|actually|reconsider|re-?check"
    r"|double-check|let me (?:check|verify|try))\b",
    re.I,
)


def behaviour_of(problem: str, response: str, right: bool) -> dict:
    """What RL may teach, measured on one response: reflection words (section 3) and, in embedded
    problems, checks such as `12 mod 5 = 2 not 3`.

    honoured: the final answer was checked, and no check of it said no. first_right, corrected: a
    right answer that was the first candidate tried, or that replaced another one."""
    checks = data_prep.read_checks(problem, response)  # (candidate, verdict, honest) of each
    answer = verify.extract_answer(response)
    verdicts = [yes for candidate, yes, _ in checks if candidate == answer]
    first = bool(checks) and checks[0][0] == answer
    return dict(
        answer=answer,
        reflections=len(REFLECTION.findall(response)),
        checks=len(checks),
        honest=sum(honest for _, _, honest in checks),
        honoured=bool(verdicts) and all(verdicts),
        first_right=right and first,
        corrected=right and bool(checks) and not first,
    )


def means(rollouts: list[Rollout]) -> dict:
    """Means over judged responses (docs/metrics.md). None: there is nothing to take a mean of."""
    n = len(rollouts)
    tokens = sum(len(r.ids) for r in rollouts)
    patterns = [r.pattern for r in rollouts]
    checked = sum(r.behaviour["checks"] > 0 for r in rollouts)

    def total(name):
        return sum(r.behaviour[name] for r in rollouts)

    def of_checked(name):  # share of the responses that hold checks
        return total(name) / checked if checked else None

    return dict(
        accuracy=sum(r.right for r in rollouts) / n,
        honest=total("honest") / total("checks") if checked else None,
        reward=sum(r.reward for r in rollouts) / n,
        length=tokens / n,
        checks=total("checks") / n,
        **{name: patterns.count(name) / n for name in PATTERNS},
        honoured=of_checked("honoured"),
        first_right=of_checked("first_right"),
        corrected=of_checked("corrected"),
        reflections=total("reflections") / (tokens / 100),
        ungraded=sum(r.ungraded for r in rollouts) / n,
    )


def rl_metrics(step: int, rollouts, rewards, kl, sums: dict, norm: float, lr: float) -> dict:
    """A row of metrics.jsonl; docs/metrics.md defines each column."""
    N = sums["tokens"]
    flat = [(group == group[0]).all().item() for group in rewards]
    return dict(
        step=step,
        **means(rollouts),
        # The advantages' d is log mu - log pi_ref, mu the sampler. Its mean plus that of log pi -
        # log mu, found with the gradient, is that of log pi - log pi_ref.
        kl=kl.mean().item() + sums["bias"] / len(rollouts),
        entropy=sums["entropy"] / N,
        nll=sums["nll"] / N,
        logprob_gap=sums["gap"] / N,
        logprob_gap_p99=sums["gap_p99"],
        flat_groups=np.mean(flat).item(),
        grad_norm=norm,
        lr=lr,
        tokens=N,
    )


def record_of(rollout: Rollout) -> dict:
    """A judged response as it is logged."""
    row = rollout.problem.row
    return dict(
        id=row.get("id"),
        problem=row["problem"],
        response=rollout.text,
        reward=rollout.reward,
        right=rollout.right,
        pattern=rollout.pattern,
        **rollout.behaviour,
        length=len(rollout.ids),
        nll=rollout.nll,
        ungraded=rollout.ungraded,
    )


def warn(row: dict, rollouts: list[Rollout]):
    """A line for each thing of a step of RL that looks wrong."""

    def say(wrong, words):
        if wrong:
            print0(f"step {row['step']}:", words)

    overlong = f"{row['overlong']:.0%} of the responses reached --max-new: they are paid -1"
    say(row["overlong"] > 0.5, f"{overlong}, right or wrong (see --penalties); raise --max-new")
    ungraded = f"the grader gave up on {row['ungraded']:.1%} of the answers"
    say(row["ungraded"] > 0.01, f"{ungraded}, which count as wrong")
    flat = "all groups have equal rewards, only entropy and KL act"
    say(row["flat_groups"] == 1, f"{flat}; take other problems, or a larger --k")
    gap = f"engine and trainer are {row['logprob_gap']:.3g} nats per token apart"
    say(row["logprob_gap"] > 0.02, f"{gap}; see --tis-cap")
    entropy = f"entropy {row['entropy']:.3g} is low"
    say(row["entropy"] < ENTROPY_FLOOR, f"{entropy}; raise --temperature or --entropy-coef")
    kl = f"KL {row['kl']:.3g} to the anchor is high"
    say(row["kl"] > KL_CEILING, f"{kl}; lower --rl-lr, or raise --kl-coef")
    least = min(r.reward for r in rollouts)
    say(least < -1, f"--reward gave {least:.3g}: less than garbage gets, -1")


# ---------------------------------------------------------------------- evaluation of checkpoints
def run_eval(cfg: Config):
    """Checkpoints one after the other -> results.json and its pictures. An entry that is there, of
    the same code, weights, problems and options, is kept."""
    folder = Path(cfg.out) / (cfg.name or cfg.preset) / "eval"
    paths = checkpoints_to_evaluate(folder.parent, cfg)
    sets = test_sets(cfg)
    answer_weights = on_rank0(weights_of, latest(cfg.answer_model))
    locks = []  # of rank 0, held until the stage ends

    def lock():
        with all_ranks_or_none():
            if rank() == 0 and not locks:
                locks.append(locked_folder(folder))

    engine = None
    for path, name in paths.items():
        models = (on_rank0(weights_of, path), answer_weights)
        known = {old["key"]: old for old in on_rank0(results_of, folder)}
        todo = []  # entry, problems, samples
        for test, rows, samples in sets:
            key = on_rank0(entry_key, models, rows, samples, cfg)
            entry = dict(key=key, name=name, checkpoint=path, test=test)
            if key in known:
                print0(f"{path}, {test}: evaluated before, pass@1 {known[key]['pass_at_1']:.1%}")
                lock()
                on_rank0(add_result, folder, known[key] | entry)
            else:
                todo.append((entry, rows, samples))
        if not todo:
            continue
        release(engine)
        whole, tokenizer = load_whole(path, cfg)
        todo = [(entry, encode_prompts(rows, tokenizer, cfg), n) for entry, rows, n in todo]
        first = todo[0][1]
        policy = shard(whole, tokenizer, cfg)
        del whole
        if engine is None:
            look_at_prompt(first, tokenizer, cfg)
            engine = make_engine(path, policy, tokenizer, cfg)
            answerer = answer_engine(engine, cfg) if cfg.answer_model else engine
        lock()
        engine.tokenizer = tokenizer
        push(engine, policy, first[0].prompt, cfg)
        del policy
        for entry, problems, samples in todo:
            result, rollouts = measure(engine, answerer, problems, samples, cfg)
            on_rank0(log_responses, folder, entry, rollouts)
            on_rank0(add_result, folder, entry | result)
            report(entry | result)
    if rank() == 0:
        draw_results(folder)
    print0(f"results and pictures in {folder}")


def entry_key(models: tuple, rows: list[dict], samples: int, cfg: Config) -> str:
    """Identifies an entry of results.json by all that it depends on."""
    values = deciding(cfg)
    for name in "model data test checkpoint benchmarks answer_model eval_samples".split():
        del values[name]  # by content: `models`, `rows`, `samples`
    return digest((digest_of_code(), values, digest_of_rows(rows), samples, models))[:16]


def results_of(folder: Path) -> list[dict]:
    """The entries of results.json; none where there is no such file."""
    path = folder / "results.json"
    try:
        entries = read_json(path)["checkpoints"] if os.path.lexists(path) else []
        for entry in entries:
            [entry[name] for name in ("key", "name", "checkpoint", "test")]
    except (KeyError, TypeError):
        raise Misuse(f"{path}: it holds what --stage eval does not write; rename or remove it")
    return entries


def add_result(folder: Path, entry: dict):
    """Put an entry at the end of results.json, in place of the one of the same checkpoint and test,
    and of the one with its key: that checkpoint was moved, copied, or spelled in another way."""
    entries = []
    for old in results_of(folder):
        same = old["checkpoint"] == entry["checkpoint"] and old["test"] == entry["test"]
        if not (same or old["key"] == entry["key"]):
            entries.append(old)
    write_json(folder / "results.json", dict(checkpoints=[*entries, entry]))


def log_responses(folder: Path, entry: dict, rollouts: list[Rollout]):
    """Put responses at the end of responses.jsonl, in place of those that a kill left there."""
    path = folder / "responses.jsonl"
    if path.exists():
        cut_log(
            path, path, lambda row: row.get("key") != entry["key"], folder / "responses.jsonl.cut"
        )
    rows = []
    for r in rollouts:
        rows.append(entry | record_of(r) | dict(sample=r.sample, finished=r.finished, ids=r.ids))
    append_rows(path, rows, sync=True)


def mean_and_error(values) -> tuple[float, float | None]:
    """(problems, samples) -> the mean over problems of the mean over each problem's samples, and
    its standard error (None for one problem). The error is over PROBLEMS: the samples of one
    problem are not independent."""
    per_problem = np.mean(values, axis=1)
    n = len(per_problem)
    error = (per_problem.std(ddof=1) / n**0.5).item() if n > 1 else None
    return per_problem.mean().item(), error


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, include a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list[str | None]) -> int | None:
    """Index of the first response with the most frequent answer; None if there is no answer.
    NOT IN PAPER."""
    votes = {}  # index of the first answer of its kind -> votes
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in votes if verify.is_equal(answer, answers[j])), i)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=votes.get, default=None)


def measure(engine, answerer, problems: list[Problem], samples: int, cfg) -> tuple[dict, list]:
    """A policy on a test set -> its entry of results.json (docs/metrics.md), and its responses."""
    rollouts = evaluate(engine, problems, samples, cfg)
    right = np.reshape([r.right for r in rollouts], (-1, samples))
    value, error = mean_and_error(right)
    ungradable = [not verify.is_readable(r.behaviour["answer"] or "") for r in rollouts]
    votes = []
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        i = majority([r.behaviour["answer"] for r in group])
        votes.append([i is not None and group[i].right])
    chances = []
    for i in range(samples.bit_length()):
        k = 2**i
        chance = [[pass_at_k(samples, n, k)] for n in right.sum(1)]
        chances.append([k, *mean_and_error(chance)])
    result = dict(
        problems=len(problems),
        samples=samples,
        temperature=cfg.eval_temperature,
        seed=cfg.seed,
        max_new=cfg.max_new,
        answer_model=cfg.answer_model,
        pass_at_1=value,
        standard_error=error,
        **means(rollouts),
        ungradable=float(np.mean(ungradable)),
        pass_at_k=chances,
        majority=mean_and_error(votes),
    )
    if not (cfg.test or cfg.data or cfg.benchmarks):
        result["habits"] = data_prep.habit_shares([record_of(r) for r in rollouts])
    if cfg.budgets:
        result["scaling"] = accuracy_within(answerer, engine.tokenizer, rollouts, samples, cfg)
    return result, rollouts


def checkpoints_to_evaluate(run: Path, cfg: Config) -> dict[str, str]:
    """Path -> name in the pictures."""
    given = (cfg.model, *cfg.checkpoint.split(","))
    paths = [latest(name) for name in given if name]
    if not paths:
        sft = on_rank0(checkpoints, run / "sft")
        rl = on_rank0(manifests, run / "rl")
        paths = list(map(str, [*sft[-1:], *filter(rl.get, rl)]))
        for path in rl:
            if not rl[path]:
                print0(f"{path}: damaged (incomplete, or of another run), left out")
    if not paths:
        raise Misuse(
            f"no checkpoint in {run}: run --stage sft and --stage rl first, or give --checkpoint"
            " or --model"
        )
    names = {}
    for path in paths:
        check_model_folder(path)
        folder = Path(path)
        step = folder.name.removeprefix("checkpoint-")
        names[path] = f"{folder.parent.name} {step}".strip()
    return names


def release(engine):
    """Let go of the policy that was evaluated last: one checkpoint in memory at a time."""
    if isinstance(engine, TorchEngine):
        engine.policy = None  # the next one may have another architecture
    gc.unfreeze()  # vLLM froze what was alive when it started,
    gc.collect()  # and a policy refers to itself (FSDP's hooks, `checkpoint`)


def answer_engine(engine, cfg: Config):
    """The engine of --answer-model, whose tokenizer, end tokens and template are its own. It shares
    the ranks of the first, and gets the memory left."""
    path = latest(cfg.answer_model)
    cfg = dataclasses.replace(
        cfg,
        max_prompt=cfg.max_prompt + cfg.max_new,  # a problem and its thought
        max_new=SUMMARY_TOKENS,
        prompt_template="",
        system="",
        chat_template_kwargs="",
        answer_model="",
        vllm_tp=engine.ranks,
        vllm_memory=cfg.vllm_memory / 2,
    )
    whole, tokenizer = load_whole(path, cfg)
    policy = shard(whole, tokenizer, cfg)
    answerer = make_engine(path, policy, tokenizer, cfg)
    answerer.load(policy)
    return answerer


def report(result: dict):
    """The console line of a checkpoint and test set."""
    line = (
        f"{result['checkpoint']}, {result['test']}: pass@1 {result['pass_at_1']:.1%}"
        f" ± {result['standard_error'] or 0:.1%}, {result['length']:.0f} tokens"
        f", over-long {result['overlong']:.1%}"
    )
    for budget, value, *_ in result.get("scaling", []):
        line += f", {value:.1%} within {budget} tokens"
    print0(line)


def finish_stage(folder, policy, engine, problems: list[Problem], next_stage: str):
    """Evaluate on the held-out problems; say what was reached and what the next command is."""
    cfg = folder.cfg
    print0(f"checkpoint, metrics and curves.png are in {folder.path}")
    if problems:
        push(engine, policy, problems[0].prompt, cfg)
        rollouts = evaluate(engine, problems, 1, cfg)
        value, error = mean_and_error([[r.right] for r in rollouts])
        print0(
            f"held-out pass@1 {value:.1%} ± {error or 0:.1%} ({len(problems)} problems of"
            f" {cfg.test or cfg.data or 'the embedded test set'}, one sample each at"
            f" T = {cfg.eval_temperature})"
        )
        if rank() == 0:
            some = rollouts[:: max(1, len(rollouts) // 8)]
            rows = [dict(step=folder.total, kind="held-out", **record_of(r)) for r in some]
            append_rows(folder.path / "samples.jsonl", rows)
    print0(next_command(folder, next_stage))


def next_command(folder, stage: str) -> str:
    """The command of the next stage: this one's options that differ from the preset's."""
    cfg = folder.cfg
    usual = Config(**PRESETS[cfg.preset] | dict(preset="tiny", name=cfg.preset))
    data = "PROBLEMS.jsonl" if cfg.data and stage == "rl" else cfg.data  # not those of SFT
    cfg = dataclasses.replace(cfg, name=folder.path.parent.name, data=data)
    words = ["next: torchrun"]
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if nodes != "1":
        words.append(f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500")
    if world() > 1:
        words.append(f"--nproc-per-node {LOCAL_RANKS}")
    words.append(f"t1.py --stage {stage}")
    for option in dataclasses.fields(cfg):
        value = getattr(cfg, option.name)
        of_stage = option.metadata["stage"] or option.name in ("stage", "model")
        if not of_stage and value != getattr(usual, option.name):
            words.append(f"--{option.name.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join(words)


# ------------------------------------------------------------------------------- the vLLM engine
class VLLMEngine:
    """vLLM inside the trainer's processes: under torchrun every `vllm_tp` ranks share one engine.
    New weights arrive tensor by tensor; on a GPU the engine frees its memory while the update runs.
    The random numbers of a call depend on its first sample alone, so that samples change with the
    number of engines."""

    def __init__(self, folder: str, policy, tokenizer, cfg: Config):
        vllm = import_vllm()
        from vllm.v1.sample.logits_processor import LogitsProcessor

        class KnownIds(LogitsProcessor):
            """Ids beyond the tokenizer, which pad the vocabulary of many models, are never
            sampled."""

            vocabulary = policy.vocabulary  # `load` changes it
            __init__ = update_state = lambda *unused: None  # it has no state of a batch
            is_argmax_invariant = lambda self: False

            def apply(self, logits):
                logits[:, self.vocabulary :] = -math.inf
                return logits

        self.known_ids = KnownIds
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.sampling_params = vllm.SamplingParams
        self.dtype = getattr(torch, cfg.dtype)
        self.ranks, memory = engine_layout(policy, cfg)
        # 64: the text that closes a cut thought has fewer tokens.
        room = cfg.max_prompt + cfg.max_new + ANSWER_TOKENS + 64
        context = getattr(policy.lm.config, "max_position_embeddings", room)
        backbone = type(policy.lm.base_model)
        init = backbone.__init__
        with self.failing("could not be started"):
            self.llm = vllm.LLM(
                folder,
                dtype=cfg.dtype,
                seed=cfg.seed,
                tensor_parallel_size=self.ranks,
                **memory,
                max_model_len=min(room, context),
                distributed_executor_backend="external_launcher" if world() > 1 else None,
                logprobs_mode="processed_logprobs",  # after temperature and min-p, as sampled
                logits_processors=[KnownIds],
                generation_config="vllm",
                enforce_eager=run_device().type != "cuda",
                disable_log_stats=True,
                hf_overrides=dict(head_dtype="float32"),  # as the trainer's logits
            )
        # Of some models (Glm) vLLM changes the `__init__` of a class that the trainer uses as well.
        backbone.__init__ = init
        backbone.do_not_compile = True

    @contextlib.contextmanager
    def failing(self, what: str):
        try:
            yield
        except Exception as e:
            raise Stop(f"rank {rank()}: the vLLM engine {what} ({reason_of(e)}); {RESUMES}")

    def load(self, policy) -> bool:
        with self.failing("did not take the new weights"):
            self.llm.wake_up(tags=["weights"])  # does nothing to an engine that is awake
            weights = dict(weights_iterator=full_weights(policy, self.dtype))
            self.llm.collective_rpc("reload_weights", kwargs=weights)
            self.llm.reset_prefix_cache()
            self.llm.wake_up(tags=["kv_cache"])
        self.end_ids = policy.end_ids
        self.known_ids.vocabulary = policy.vocabulary
        return True

    def sleep(self):
        """Give the GPU's memory to the update; the next `load` wakes the engine."""
        if sleeps(self.cfg):
            with self.failing("did not fall asleep"):
                self.llm.sleep(level=2)

    def generate(self, rollouts, max_new: int, temperature=1.0, min_p=0.0, ended=None):
        """As TorchEngine.generate. The ranks that share the engine call it together."""
        params = self.sampling_params(
            temperature=temperature,
            min_p=min_p,
            max_tokens=max_new,
            logprobs=0,
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # that of the folder from which vLLM started
            flat_logprobs=True,
            detokenize=False,
        )
        # A request for each sample: vLLM refuses several greedy ones in one.
        prompts = [{"prompt_token_ids": r.problem.prompt} for r in rollouts]
        answers = []
        if rollouts:
            torch.manual_seed(rollouts[0].seed + rollouts[0].sample)
            with self.failing("failed"):
                answers = self.llm.generate(prompts, params, use_tqdm=False)
        for rollout, answer in zip(rollouts, answers):
            (output,) = answer.outputs
            rollout.ids = list(output.token_ids)
            rollout.logprobs = list(output.logprobs.logprobs)
            rollout.finished = output.finish_reason == "stop"
        if ended:
            ended(len(rollouts))
        return rollouts


def import_vllm():
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process: weights need no copy to reach it
        VLLM_USE_V2_MODEL_RUNNER="0",  # V2: other logits processors, seeds that no call sets
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    warnings.filterwarnings("ignore", module="vllm")
    return importlib.import_module("vllm")


def uses_vllm(cfg: Config) -> bool:
    if cfg.engine == "auto":
        return run_device().type == "cuda" and installed("vllm")
    return cfg.engine == "vllm"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sleeps(cfg: Config) -> bool:
    """Does the engine free its memory for the update? AdamW's state is offloaded during rollouts
    then."""
    return cfg.stage == "rl" and uses_vllm(cfg) and run_device().type == "cuda"


def engine_ranks(weights: int, card: int, ranks: int) -> int:
    """NOT IN PAPER: the fewest ranks (1, 2, 4 or 8; `ranks`: of a machine) that must share an
    engine for its bfloat16 weights to take at most a quarter of each card, so that most of it is
    cache. weights and card in bytes."""
    fitting = [n for n in (1, 2, 4, 8) if ranks % n == 0]
    for n in fitting:
        if weights / n <= card / 4:
            return n
    return fitting[-1]


def engine_share(card: int, held: int, gathered: int) -> float:
    """Share of a card for the engine: what the trainer does not hold then, less the weights that
    `push` gathers while the engine is awake, less 4 GiB for activations, CUDA and NCCL. In
    bytes."""
    return max(0.01, (card - held - gathered - 2**32) / card)


def number_of_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def engine_layout(policy, cfg: Config) -> tuple[int, dict]:
    """-> ranks that share a vLLM engine, and vLLM's options for its memory."""
    if run_device().type == "cpu":
        return cfg.vllm_tp or 1, dict(kv_cache_memory_bytes=1 << 29)
    torch.cuda.empty_cache()
    free, card = torch.cuda.mem_get_info()
    layers = [number_of_parameters(layer) for layer in policy.lm.base_model.layers]
    parameters = number_of_parameters(policy)
    # The trainer's forward in `push` gathers the root and two layers, each as a buffer and
    # its copy: 2 x 2 bytes a parameter. One rank gathers nothing, but autocast copies all: 2 bytes.
    gathered = 2 * parameters
    if world() > 1:
        gathered = 4 * (parameters - sum(layers[2:]))
    share = cfg.vllm_memory or min(gather([engine_share(card, card - free, gathered)]))
    engines = 2 if cfg.answer_model else 1
    memory = dict(gpu_memory_utilization=share / engines, enable_sleep_mode=sleeps(cfg))
    return cfg.vllm_tp or engine_ranks(2 * parameters, card, LOCAL_RANKS), memory


def make_engine(folder: str, policy, tokenizer, cfg: Config):
    """The engine gets the policy's weights by `load`; vLLM starts from those of `folder`."""
    if uses_vllm(cfg):
        return VLLMEngine(folder, policy, tokenizer, cfg)
    return TorchEngine(tokenizer, cfg)


# Both engines: their check, and the cache of TorchEngine.


def engine_gaps(engine, policy, prompts, max_new: int, cfg, agreement=contextlib.nullcontext):
    """Distances (n,) of the engine's log-probs of greedy answers to the prompts from the trainer's.
    agreement: `all_ranks_or_none`, if all ranks call this together."""
    probes = [Rollout(Problem({}, prompt)) for prompt in prompts]
    with agreement():
        engine.generate(probes, max_new, temperature=0.0)
    sampled = torch.cat([torch.tensor(r.logprobs) for r in probes])
    scored = torch.cat(response_logprobs(policy, [row_of(r) for r in probes], cfg))
    return (sampled - scored).abs()


def push(engine, policy, prompt: list[int], cfg: Config):
    """Give the engine the policy's weights. Where they were copied, both must then give the same
    log-probs to one greedy answer: a copy that fails silently would leave the rollouts to an old
    policy for the rest of the run."""
    if not engine.load(policy):
        return
    gap = engine_gaps(engine, policy, [prompt], 16, cfg, all_ranks_or_none).mean().item()
    tolerance = PUSH_TOLERANCE[cfg.dtype]
    with all_ranks_or_none():
        if not gap <= tolerance:
            raise Stop(
                f"rank {rank()}: engine and trainer are {gap:.2g} nats per token apart after a push"
                f" of weights (tolerance {tolerance}): it failed, or they differ"
            )


class Cache:
    """The cache of TorchEngine, with the methods that transformers' layers call: per layer one
    preallocated tensor of keys and values, (2, b, Hkv, longest, Dh), of which the first `n`
    positions are filled. The prefill has one row for each prompt; `counts` (prompts,) says how many
    samples each has, and `update` then keeps its row once for each of them."""

    def __init__(self, policy, counts, longest: int):
        self.kv = {}
        self.n = {}
        self.dtype = torch.bfloat16 if policy.bf16 else torch.float32  # as attention reads it
        self.counts = counts
        self.longest = longest

    def update(self, k, v, layer: int, *args, **kwargs):
        if k.shape != v.shape:
            raise NotImplementedError("its keys and values have heads of different sizes")
        n = self.get_seq_length(layer)
        end = n + k.shape[2]
        self.n[layer] = end
        new = torch.stack([k, v]).to(self.dtype)
        if n == 0:  # prefill
            _, _, heads, _, width = new.shape
            room = new.new_empty(2, int(self.counts.sum()), heads, self.longest, width)
            room[:, :, :, :end] = new.repeat_interleave(self.counts, 1)
            self.kv[layer] = room
        else:
            self.kv[layer][:, :, :, n:end] = new
            new = self.kv[layer][:, :, :, :end]
        return new.unbind()

    def get_seq_length(self, layer: int = 0) -> int:
        return self.n.get(layer, 0)

    def keep(self, left: int, empty, moved):
        """Keep the first `left` slots, after the slots `moved` took the `empty` ones."""
        for layer, x in self.kv.items():
            n = self.n[layer]
            x[:, empty, :, :n] = x[:, moved, :, :n]
            self.kv[layer] = x[:, :left]


# ------------------------------------------------------------------------ models and sharding
def cpu_float32(lm_head):
    """On a CPU, a bfloat16 head as float32: a product has the dtype of its operands there."""
    if lm_head.is_cuda:
        return lm_head
    return lm_head.to(torch.promote_types(lm_head.dtype, torch.float32))


@contextlib.contextmanager
def products_in(dtype):
    """With bfloat16 a CPU rounds float32 operands to it and sums in float32. Logits lose nothing by
    that, their operands are bfloat16 values; the products of the head's gradient are then as coarse
    as those of all other layers."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def head_chunk(vocabulary: int, device) -> int:
    """Positions per chunk: one float32 buffer (c, V) takes 128 MiB, on a GPU 1 GiB."""
    bits = 30 if torch.device(device).type == "cuda" else 27
    return max(1, 2**bits // (4 * vocabulary))


def run_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def load_policy(folder: str, cfg: Config):
    """-> a Policy in float32 and its tokenizer. Misuse where anything is amiss."""
    try:
        check_model_folder(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # `check_model` goes on with "t1".
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
        )
        faults = dict(missing="are missing", unexpected="that the model has no place for")
        for kind, what in faults.items():
            names = sorted(info[f"{kind}_keys"])
            if names:
                raise Misuse(
                    f"{folder}: {len(names)} weights {what}, the first is {names[0]}; is"
                    " config.json its own?"
                )
        return checked_policy(lm, tokenizer, folder, cfg), tokenizer
    except (Stop, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as e:
        # Of the libraries, on a damaged folder. (A Rust panic is no Exception.)
        if no_more_processes(e):
            raise Stop(failure_of(e))
        raise Misuse(
            f"{folder}: no model (config, weights, tokenizer) that can be loaded: {reason_of(e)}"
        )


def check_model_folder(folder: str):
    """Misuse for folders that would hang the loaders, exhaust memory, or be read as something
    else."""
    path = Path(folder)
    if not path.is_dir():
        if folder.startswith((".", "/", "~")) or folder.count("/") > 1:
            raise Misuse(f"{folder}: there is no such folder")
        return  # a name on the hub
    for file in sorted(path.iterdir()):
        if file.name.startswith("adapter_"):
            raise Misuse(f"{file}: adapters are not supported; merge it into the weights")
        if not (file.is_file() or file.is_dir()):
            raise Misuse(f"{folder}: {file.name} is not an ordinary file")
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json")  # the library would ignore a damaged one
    for key, value in read_json(path / "config.json").items():
        if key == "quantization_config":
            raise Misuse(
                f"{folder}: quantised weights are not supported; take those they were made of"
            )
        most = 4096 if key.startswith(("num_", "n_")) else 1 << 27
        if isinstance(value, int) and value > most:
            raise Misuse(
                f"{folder}: config.json says {key} = {value}, which no model has; repair it"
            )


def checked_policy(lm, tokenizer, folder: str, cfg: Config) -> Policy:
    """Validate model and tokenizer, and move the model to its device: the CPU if it will be cut
    into shards."""
    row = dict(problem="1 + 1", where=folder)
    if tokenizer.eos_token_id is None or not prompt_ids(row, tokenizer, cfg):
        raise Misuse(
            f"{folder}: the tokenizer is missing, empty or has no eos_token; add tokenizer.json, or"
            " eos_token to tokenizer_config.json"
        )
    policy = Policy(lm, tokenizer, cfg, torch.device("cpu") if world() > 1 else None)
    mend_generation_config(policy, folder)
    rows = lm.get_input_embeddings().num_embeddings
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    if re.fullmatch(r"<.+>|\[.+\]", tokenizer.pad_token or ""):
        words.pop(tokenizer.pad_token_id, None)  # never written nor read here
    for i in (*sorted(words), *policy.end_ids):
        if not (isinstance(i, int) and 0 <= i < rows):
            word = words.get(i, "an end token")
            raise Misuse(
                f"{folder}: {word!r} has id {i}, but the model has {rows} tokens: tokenizer and"
                " model are not of one kind"
            )
    context = getattr(lm.config, "max_position_embeddings", None) or math.inf
    if cfg.max_prompt + cfg.max_new > context:
        raise Misuse(
            f"{folder}: its context of {context} tokens is shorter than --max-prompt and --max-new"
            " together; lower them, or give another --model"
        )
    check_model(policy.to(policy.device), folder, cfg)
    return policy


def mend_generation_config(policy, folder: str):
    """Checkpoints stop where training stops. What the library would refuse to save is left out."""
    lm = policy.lm
    lm.generation_config.eos_token_id = policy.end_ids
    try:
        lm.generation_config.validate(strict=True)
    except ValueError as e:
        print0(
            f"{folder}: checkpoints keep the end tokens alone of generation_config.json:"
            f" {shortened(' '.join(str(e).split()))}"
        )
        lm.generation_config = transformers.GenerationConfig(eos_token_id=policy.end_ids)


# Plain text for checks: what a model makes of it is what it makes of any text.
PROBE_TEXT = (
    "Tom has 12 apples and buys 30 more, so he has 12 + 30 = 42 apples. He gives half away."
)


def check_model(policy, folder: str, cfg: Config):
    """Prove what training relies on, or refuse the model in a line that says what differs."""
    family = policy.lm.config.model_type
    try:
        fault = what_differs(policy, cfg)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as e:  # of `attention` and `Cache`
        fault = reason_of(e)
    except Exception as e:  # the model's own code may fail in any way on packed rows or our cache
        fault = f"{type(e).__name__} in its forward: {reason_of(e)}"
    if fault:
        raise Misuse(f"{folder}: a {family} model is not supported ({fault})")


@torch.no_grad()
def what_differs(policy, cfg: Config) -> str:
    """Compare this file's forward with the library's own eager code -> what differs, or the empty
    string. Three rows of text in one pack score as the library scores them one by one, in float32
    and in the run's dtype; a longer row changes none of them; decoded tokens score as one
    forward."""
    lm = policy.lm
    longest = cfg.max_prompt + cfg.max_new
    fault = unfit_config(lm, longest)
    if fault:
        return fault
    ids = policy.tokenizer(PROBE_TEXT).input_ids[:64]
    rows = [(ids[:3], ids[3:9]), (ids[:3], ids[4:16]), (ids[:6], ids[6:])]
    cfg = dataclasses.replace(cfg, micro_tokens=10**6)  # one pack
    for dtype in dict.fromkeys(["float32", cfg.dtype]):  # the run's own dtype last: it stays
        policy.bf16 = dtype == "bfloat16"
        lm.set_attn_implementation("eager")
        theirs = torch.cat([library_logprobs(policy, row) for row in rows])
        lm.set_attn_implementation("t1")
        ours = torch.cat(response_logprobs(policy, rows, cfg))
        if not ours.isfinite().all():
            return "its weights give log-probs that are not finite; they are damaged"
        # SmolLM2-135M: 6e-6 and 2e-5 in float32, 0.03 and 0.1 in bfloat16.
        mean, largest = (0.1, 2.0) if policy.bf16 else (1e-4, 1e-3)
        gaps = (theirs - ours).abs()
        if not (gaps.mean() <= mean and gaps.max() <= largest):  # NaN, too
            return f"log-probs of packed rows are {gaps.max():.2g} nats off in {dtype}"
        if not policy.bf16:
            batch = policy.pack(rows)
            batch.position[0, -1] = longest - 1
            far, _ = token_logprobs_and_entropy(policy(batch), policy.head, batch.targets)
            if not (far.cpu() - ours)[:-1].abs().max() <= largest:
                return "the longest row of a pack changes the positions of the others"
            if not uses_vllm(cfg):
                engine = TorchEngine(policy.tokenizer, cfg)
                engine.policy = policy
                decoded = engine_gaps(engine, policy, [ids[:7], ids[:9]], 2, cfg)
                if not decoded.max() <= largest:
                    return "decoded tokens do not score as one forward"
    return ""


def unfit_config(lm, longest: int) -> str:
    """What a config says that this file does not compute, or the empty string."""
    if not isinstance(getattr(lm.base_model, "layers", None), torch.nn.ModuleList):
        return "its layers are not in base_model.layers"
    head = lm.get_output_embeddings()
    if head.bias is not None:
        return "its output layer has a bias"
    # The library unties a head that has other weights, and keeps a config that says the opposite.
    if lm.config.tie_word_embeddings and head.weight is not lm.get_input_embeddings().weight:
        return "tie_word_embeddings is true, but its head is not its embedding; make it false"
    for name, value in vars(lm.config).items():
        if "softcap" in name and value:  # hardly seen in the log-probs while logits are flat
            return f"it has {name}"
    window = shortest_window(lm.config)
    if window < longest:
        return (
            f"a token sees only {window} others, --max-prompt and --max-new are {longest} together"
        )
    return ""


def shortest_window(config) -> float:
    """Tokens that the attention of some layer is limited to; infinite without a limit."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention", "chunked_attention"]
    limits = [math.inf]
    if "sliding_attention" in kinds and getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None) or math.inf)
    if "chunked_attention" in kinds:
        limits.append(getattr(config, "attention_chunk_size", None) or math.inf)
    return min(limits)


def library_logprobs(policy, row: Row) -> torch.Tensor:
    """`response_logprobs` of one row by the library's own code, (T,)."""
    prompt, response = row
    ids = torch.tensor([prompt + response], device=policy.device)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.bf16):
        logits = policy.lm(ids).logits[0, len(prompt) - 1 : -1, : policy.vocabulary]
    logp = logits.float().log_softmax(-1)
    return logp.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def tiny_policy(cfg: Config):
    """-> the embedded model, with random weights, and its tokenizer; saved, they are an ordinary
    model folder."""
    tokenizer = data_prep.embedded_tokenizer()
    torch.manual_seed(seed_for(cfg.seed, "weights"))
    width = TINY["width"]
    config = transformers.Qwen2Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=TINY["layers"],
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    lm = transformers.Qwen2ForCausalLM(config)
    lm.set_attn_implementation("t1")
    return checked_policy(lm, tokenizer, "the embedded model", cfg), tokenizer


def load_whole(source: str, cfg: Config):
    """-> the policy of a folder, or the embedded one, and its tokenizer. With several ranks only
    rank 0 gets the policy, in CPU memory; `shard` deals it out."""
    refuse_damage(source)
    policy = tokenizer = None
    with all_ranks_or_none():
        if rank() == 0:
            policy, tokenizer = load_policy(source, cfg) if source else tiny_policy(cfg)
    return policy, from_rank0(tokenizer)


def empty_lm(config, generation_config):
    lm = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="t1"
    )
    lm.generation_config = generation_config
    return lm


def shard(whole: Policy | None, tokenizer, cfg: Config) -> Policy:
    """FSDP2: rank 0's policy cut into shards over all ranks; on one rank it stays whole.

    Each layer is a unit, gathered while it runs. Embedding, last norm and head are the root unit,
    gathered until the backward pass is over. Shards are float32, born on the meta device (only rank
    0 holds the whole model here), gathered and run in cfg.dtype; gradients are summed in
    float32."""
    policy = sharded(whole, tokenizer, cfg) if world() > 1 else whole
    for layer in policy.lm.base_model.layers:
        if cfg.compile:
            layer.forward = compiled(layer.forward)
        if cfg.checkpointing:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    return policy


def sharded(whole: Policy | None, tokenizer, cfg: Config) -> Policy:
    parts = None
    if whole:
        buffers = {name: b.cpu() for name, b in whole.named_buffers()}
        parts = (whole.lm.config, whole.lm.generation_config, buffers)
    config, generation_config, buffers = from_rank0(parts)
    with torch.device("meta"):
        policy = Policy(empty_lm(config, generation_config), tokenizer, cfg)
    options = dict(mesh=dist.init_device_mesh(run_device().type, (world(),)))
    if cfg.dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options, reshard_after_forward=False)
    policy.to_empty(device=run_device())
    for name, b in policy.named_buffers():
        b.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, whole.state_dict() if whole else {}, options=options)
    return policy


def compiled(forward):
    """A layer's forward, compiled for packed rows. Decoding, whose shapes change with every token,
    stays as it is."""
    fast = torch.compile(forward, dynamic=True)

    def choose(*args, **options):
        if options.get("pack") is None:
            return forward(*args, **options)
        return fast(*args, **options)

    return choose


class Parked:
    """Tensors that lie in CPU memory, pinned if there is a GPU, except inside `with parked:
    ...`."""

    def __init__(self, tensors=()):
        self.bytes = []
        for x in tensors:
            storage = local(x).untyped_storage()
            if storage.nbytes():
                empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
                self.bytes.append(empty.set_(storage))
        self.sizes = [len(x) for x in self.bytes]
        pinned = torch.cuda.is_available()
        # In one piece: pages are pinned in powers of two.
        piece = torch.empty(sum(self.sizes), dtype=torch.uint8, pin_memory=pinned)
        self.saved = piece.split(self.sizes)
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
    """(name, whole tensor) of the model's state, one at a time, never all at once; all ranks
    iterate together. Parameters are cast to `dtype`; buffers keep theirs, as in the library."""
    parameters = dict(policy.lm.named_parameters(remove_duplicate=False))
    for name, w in policy.lm.state_dict().items():
        if dtype and name in parameters:
            w = w.to(dtype)
        yield name, w.full_tensor() if isinstance(w, DTensor) else w


def exported_weights(policy, dtype) -> dict:
    """What a checkpoint holds: parameters, tied ones once, and persistent buffers; on rank 0, but
    all ranks call it together."""
    tensors = [*policy.lm.named_parameters(), *policy.lm.named_buffers()]
    names = {name for name, _ in tensors if rank() == 0}
    return {name: w.detach().cpu() for name, w in full_weights(policy, dtype) if name in names}


def write_model(folder: Path, policy, weights: dict, dtype):
    """An ordinary Hugging Face folder of these weights."""
    policy.lm.save_pretrained(folder, state_dict=weights)
    policy.lm.config.dtype = dtype  # of these weights; the library wrote that of its own
    policy.lm.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def try_export(policy, tokenizer, cfg: Config, limit: int = 2**30):
    """Write and read back a folder as checkpoints will be, before anything is trained: with weights
    of at most `limit` bytes; of a larger model their names and shapes. Misuse with the library's
    reason."""
    dtype = getattr(torch, cfg.dtype)
    small = dtype.itemsize * number_of_parameters(policy) <= limit
    weights = exported_weights(policy, dtype) if small else {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_model(folder, policy, weights, dtype)
            again = transformers.AutoTokenizer.from_pretrained(folder)
            if small:
                read = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="t1"
                )
            else:
                with torch.device("meta"):
                    read = empty_lm(transformers.AutoConfig.from_pretrained(folder), None)
        found = read.state_dict()
        for name, w in full_weights(policy, dtype):
            same = found[name].shape == w.shape
            if small:
                same = found[name].float().equal(w.cpu().float())
            if not same:
                raise ValueError(f"{name} is another one when it is read back")
        if again(PROBE_TEXT).input_ids != tokenizer(PROBE_TEXT).input_ids:
            raise ValueError("the tokenizer is another one when it is read back")
    except Exception as e:  # of any library
        raise Misuse(
            f"a checkpoint of this model could not be saved and read back: {reason_of(e)} (it was"
            " tried in TMPDIR, or else in /tmp)"
        )


def make_optimizer(policy, cfg: Config):
    """AdamW. The state is allocated up front so that a checkpoint can be loaded into it; it is kept
    on the CPU with --offload or a sleeping engine. NOT IN PAPER: betas, one weight decay for
    all."""
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    moments = []
    for p in policy.parameters():
        step = torch.zeros((), device=local(p).device)
        mean = torch.zeros_like(p)
        square = torch.zeros_like(p)
        optimizer.state[p] = dict(step=step, exp_avg=mean, exp_avg_sq=square)
        moments += [mean, square]
    optimizer.on_device = Parked(moments if cfg.offload or sleeps(cfg) else ())
    return optimizer


# ------------------------------------------------------------------- checkpoints and run folders
MANIFEST = "complete.json"  # {"step", "run", "files": {name: [bytes, CRC-32]}, "crc": of the rest}


def checksums(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """File name -> [bytes, CRC-32], read by several threads; [] for a file that is not there."""

    def checksum(name):
        path = folder / name
        if not path.exists():
            return []
        crc = 0
        with data_prep.naming(path), data_prep.open_file(path) as f:
            for part in iter(functools.partial(f.read, 1 << 20), b""):
                crc = zlib.crc32(part, crc)
        return [path.stat().st_size, crc]

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(checksum, names)))


def manifest_of(checkpoint_folder: Path) -> dict:
    """What a checkpoint says of itself; {} where it is damaged: no manifest, or a file of another
    size. OSError where the disk does not answer: what cannot be read is neither damaged nor
    absent."""
    path = checkpoint_folder / MANIFEST
    try:
        with data_prep.naming(path), data_prep.open_file(path) as f:
            manifest = data_prep.parse_json(f.read(data_prep.ROW_BYTES))
        crc = manifest.pop("crc")
        whole = crc == zlib.crc32(repr(manifest).encode())
        for name, (size, _) in manifest["files"].items():
            whole = whole and (checkpoint_folder / name).stat().st_size == size
        return manifest if whole else {}
    except (FileNotFoundError, NotADirectoryError, Misuse):  # the file is not there, or none
        return {}
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):  # nor a manifest
        return {}


def write_manifest(checkpoint_folder: Path, step: int, run: str, files: dict):
    manifest = dict(step=step, run=run, files=files)
    crc = zlib.crc32(repr(manifest).encode())
    write_json(checkpoint_folder / MANIFEST, manifest | dict(crc=crc))


def damaged_file(checkpoint_folder: Path, files: dict) -> str:
    """The first file whose bytes are not those that were saved, or the empty string. Each rank
    reads a share."""
    with all_ranks_or_none():
        found = checksums(checkpoint_folder, sorted(files)[rank() :: world()])
    return min(gather([name for name in found if found[name] != files[name]]), default="")


def model_files(manifest: dict) -> dict:
    """The files of a checkpoint that are an ordinary model folder, with their checksums."""
    files = manifest["files"]
    return {name: files[name] for name in files if not name.startswith("trainer/")}


def weights_of(folder: str) -> dict | str:
    """What tells a model from others: the checksums of its files; for the hub its name."""
    path = Path(folder)
    if not folder or not path.is_dir():
        return folder
    manifest = manifest_of(path)
    if manifest:
        return model_files(manifest)
    return checksums(path, sorted(p.name for p in path.iterdir() if p.is_file()))


def refuse_damage(folder: str):
    """Misuse for a checkpoint whose weights, config or tokenizer are not those that were saved."""
    path = Path(folder)
    if on_rank0(os.path.lexists, path / MANIFEST):
        manifest = on_rank0(manifest_of, path)
        damaged = damaged_file(path, model_files(manifest)) if manifest else MANIFEST
        if damaged:
            raise Misuse(
                f"{path}: damaged ({damaged} is not what was saved); take another checkpoint, or"
                f" remove {MANIFEST} if you changed it yourself"
            )


def manifests(stage_folder: Path) -> dict[Path, dict]:
    """Each folder checkpoint-N of a stage -> its manifest, in order of steps; at the end those that
    are damaged or of another run -> {}."""
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = [n for n in os.listdir(stage_folder) if re.fullmatch(r"checkpoint-\d+", n)]
        config = stage_folder / "config.json"
        run = read_json(config).get("run") if names and config.exists() else None
        for name in names:
            manifest = manifest_of(stage_folder / name)
            same_run = run is None or manifest.get("run") == run
            found[stage_folder / name] = manifest if same_run else {}
    return dict(sorted(found.items(), key=lambda item: item[1].get("step", math.inf)))


# Which checkpoint? `checkpoints`: all of a stage. `latest`: what a name means. `sound_checkpoint`:
# the one from which a run goes on.


def checkpoints(stage_folder: Path) -> list[Path]:
    """A stage's checkpoints that were written to their end, in order of their manifests' steps."""
    return [path for path, manifest in manifests(stage_folder).items() if manifest]


def latest(name: str) -> str:
    """The model that a name means: of a stage's folder (runs/NAME/sft) its last checkpoint, else
    the name itself."""
    found = on_rank0(checkpoints, Path(name)) if name else []
    return str(found[-1]) if found else name


def sound_checkpoint(stage_folder: Path, at: int = 0) -> str:
    """The last checkpoint (`at`: that of a step) with the trainer's state and every byte as it was
    saved; the empty string if there is no checkpoint at all. What is damaged is said; Misuse if
    nothing else is left."""
    found = on_rank0(manifests, stage_folder)
    steps = []  # with the trainer's state
    for path, manifest in reversed(found.items()):
        damaged = ""
        if not manifest:
            damaged = "incomplete, or of another run"
        elif model_files(manifest) != manifest["files"]:
            steps.insert(0, manifest["step"])
            if at in (0, manifest["step"]):
                damaged = damaged_file(path, manifest["files"])
                if not damaged:
                    return str(path)
        if damaged:
            print0(f"{path}: damaged ({damaged}), ignored")
    if found or at:
        asked = f" of step {at}" if at else ""
        there = ", ".join(map(str, steps)) or "none"
        raise Misuse(
            f"{stage_folder}: no checkpoint{asked} is whole and has the trainer's state; there"
            f" are: {there}; choose another --name (and --model CHECKPOINT: the weights of one"
            " are a start)"
        )
    return ""


def step_of(checkpoint_folder: Path) -> int:
    return manifest_of(checkpoint_folder)["step"]


def remove(checkpoint_folder: Path):
    """Remove a checkpoint, under a name that a kill may leave; of a link, the link."""
    if checkpoint_folder.is_symlink():
        checkpoint_folder.unlink()
    elif checkpoint_folder.exists():
        name = checkpoint_folder.name.replace("checkpoint", "removed")
        beside = checkpoint_folder.rename(checkpoint_folder.with_name(name))
        sync(beside.parent)
        shutil.rmtree(beside)


def unfinished(source: str) -> str:
    """A remark on a checkpoint that is not the last of its stage, or the empty string."""
    manifest = manifest_of(Path(source))
    config = Path(source).parent / "config.json"
    if manifest and config.is_file():
        step = manifest["step"]
        steps = read_json(config).get("steps", 0)
        if step < steps:
            return f", which is step {step} of {steps}: its stage did not end"
    return ""


def drop_trainer_state(checkpoint_folder: Path):
    """Keep a checkpoint's weights: it can be evaluated and trained from, not resumed."""
    manifest = manifest_of(checkpoint_folder)
    write_manifest(checkpoint_folder, manifest["step"], manifest["run"], model_files(manifest))
    shutil.rmtree(checkpoint_folder / "trainer", ignore_errors=True)


def cut_log(path: Path, origin: Path, keep, aside: Path):
    """Write to `path` the rows of the log `origin` that `keep` accepts. The others, and lines that
    are no rows, are set aside if the two are one file. A gzipped log ends where a kill broke it."""
    opener = gzip.open if path.suffix == ".gz" else open
    beside = path.with_name(path.name + ".partial")
    dropped = []
    with data_prep.naming(path), opener(origin, "rb") as old, opener(beside, "wb") as new:
        with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
            for line in old:
                try:
                    kept = line.endswith(b"\n") and keep(data_prep.parse_json(line))
                except (ValueError, RecursionError, AttributeError):
                    kept = False
                if kept:
                    new.write(line)
                else:
                    dropped.append(line.rstrip(b"\n") + b"\n")
    if dropped and path == origin:
        with data_prep.naming(aside), open(aside, "ab") as f:
            f.writelines(dropped)
        sync(aside)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def digest_of_rows(rows: list[dict]) -> str:
    """Of all columns, which --reward may read, wherever the rows lie."""
    return digest([digest(row | dict(where="")) for row in rows])


def digest_of_code() -> str:
    files = (__file__, data_prep.__file__, verify.__file__)
    return digest([Path(file).read_bytes() for file in files])


def locked_folder(path: Path):
    """Make a folder that no other process works in -> its lock, held until it is closed."""
    try:
        new = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for p in new:
            sync(p.parent)
        for p in path.iterdir():
            if not (p.is_file() or p.is_dir()):
                raise Misuse(f"{p}: neither a file nor a folder; remove it")
        lock = open(path / "lock", "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno != errno.ENOSYS:  # Lustre without `-o flock`
                raise
            print0(f"{path}: this file system has no locks: start no second process here")
        lock.truncate(0)
        print(os.getpid(), time.time_ns(), file=lock, flush=True)  # see `wait_for_rank0`
        os.fsync(lock)
    except BlockingIOError:
        raise Misuse(
            f"{path}: another process works in this folder; wait for it, or choose another --name"
        )
    except OSError as e:
        raise Misuse(f"{path}: cannot be written ({e.strerror}); choose another --out")
    return lock


def wait_for_rank0(lock: Path):
    """Every rank must see what rank 0 wrote; a network file system may show it late."""
    written = on_rank0(lock.read_text)
    with all_ranks_or_none():
        for second in range(60):
            if lock.exists() and lock.read_text() == written:
                return
            time.sleep(1)
        raise Misuse(
            f"{lock.parent}: rank {rank()} does not see what rank 0 writes there; --out must lie"
            " on a file system that all nodes share"
        )


def written_files(beside: Path) -> dict[str, list[int]]:
    """The checksums of the files that this rank wrote, taken while the disk writes them."""
    umask = os.umask(0o022)
    os.umask(umask)
    names = []
    for path in beside.rglob("*"):
        by = int(path.name[6:11]) - 1 if path.name.startswith("shard-") else 0
        if path.is_file() and by == rank():
            path.chmod(0o666 & ~umask)  # as the user's other files
            names.append(str(path.relative_to(beside)))
    with ThreadPoolExecutor(8) as pool:
        on_disk = pool.map(sync, [beside / name for name in names])
        files = checksums(beside, names)
        list(on_disk)  # raises what `sync` raised
    return files


def machine() -> dict:
    """What a run's bits depend on besides its values and inputs."""
    return dict(
        source_sha256=digest_of_code(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        world_size=world(),
    )


def deciding(cfg: Config) -> dict:
    """The options that a stage's results depend on."""
    values = {}
    for option in dataclasses.fields(cfg):
        of_stage = cfg.stage in (option.metadata["stage"] or cfg.stage)
        if of_stage and not option.metadata["free"]:
            values[option.name] = getattr(cfg, option.name)
    return values


class RunFolder:
    """The folder of one stage: config.json; metrics.jsonl (one row per step, the same bits for the
    same seed); timings.jsonl; samples.jsonl; checkpoint-N; curves.png.

    `source`: the last checkpoint that has the trainer's state and whose every byte is what was
    saved; the same command resumes from it. Empty for a run that begins. `create` sets `total`, the
    number of steps; `resume` sets what `after_step` saves. Then come, for each of `steps`, `log`
    and `after_step`. All ranks call all of these."""

    logs = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "rollouts.jsonl.gz")

    def __init__(self, cfg: Config):
        run = Path(cfg.out) / (cfg.name or cfg.preset)
        origin = run / cfg.stage
        if cfg.resume_from:
            run = run.with_name(f"{run.name}-from-{cfg.resume_from}")
        self.cfg = cfg
        self.path = run / cfg.stage
        self.values = deciding(cfg)
        if os.path.lexists(self.path / "config.json"):
            self.compare_values()
        elif manifests(self.path):
            raise Misuse(
                f"{self.path}: checkpoints without config.json; bring it back, or choose another"
                " --name"
            )
        self.source = sound_checkpoint(self.path)
        if cfg.resume_from and not self.source:
            self.source = sound_checkpoint(origin, cfg.resume_from)
        self.step = step_of(Path(self.source)) if self.source else 0  # of the last checkpoint

    def compare_values(self):
        config = self.path / "config.json"
        before = read_json(config).get("config")
        if not isinstance(before, dict):
            raise Misuse(f"{config}: damaged; choose another --name, or remove that folder")
        changed = []
        for name, value in self.values.items():
            of_content = name in ("model", "data", "test", "reward")  # `create` compares contents
            if before.get(name) != value and not of_content:
                changed.append(f"{name} ({before.get(name)!r} there, {value!r} now)")
        if changed:
            raise Misuse(
                f"{self.path} holds a run of other values: {', '.join(changed)}; choose another"
                " --name, branch with --resume-from, or move that folder away"
            )

    def create(self, source: str, problems, tests, prompt: str, steps: int):
        """Called when all inputs have been checked: a misuse leaves nothing behind. Resuming needs
        the same contents of --data, --test and --reward, wherever they lie (of --model, if its name
        is another), and the same text of the first prompt; another machine or version is said."""
        self.total = steps
        if self.cfg.resume_from >= steps:
            raise Misuse(f"--resume-from: all {steps} steps are done; give more steps")
        with all_ranks_or_none():  # not `on_rank0`: a lock cannot be sent to other ranks
            if rank() == 0:
                self.lock = locked_folder(self.path)
        wait_for_rank0(self.path / "lock")
        rows = [problem.row for problem in problems]
        file, _, function = self.cfg.reward.rpartition(":")
        contents = dict(
            data=digest_of_rows(rows),
            test=digest_of_rows([problem.row for problem in tests]),
            reward=digest((function, file and Path(file).read_bytes())),
            prompt=prompt,
        )
        model = latest(self.cfg.model)
        config = self.path / "config.json"
        with all_ranks_or_none():
            # Killed before its first checkpoint, a run begins anew, maybe from another model.
            if rank() == 0 and not (self.source and config.exists()):
                contents["model"] = digest(weights_of(model))
                run = dict(
                    config=self.values,
                    steps=steps,
                    started_from=source,
                    run=f"{time.time_ns():x}",
                    **machine(),
                    contents=contents,
                )
                write_json(config, run)
        before = on_rank0(read_json, config)  # a network file system shows it late to others
        self.run = before.get("run")
        if before["config"].get("model") != self.cfg.model:
            contents["model"] = digest(on_rank0(weights_of, model))
        for name, value in contents.items():
            old = before.get("contents", {}).get(name)
            if old != value:
                what = f"--{name}"
                if name == "prompt":
                    what = f"first prompt, {shortened(repr(old))}"
                raise Misuse(f"{self.path} was started with another {what}; choose another --name")
        for name, value in machine().items():
            if before.get(name) != value:
                print0(f"{self.path} was started with {name} {before.get(name)}, now {value}")

    def steps(self):
        """The steps that are left, with a progress bar. A signal is heard after a step, and between
        the phases of one that has not reached its gradient: the checkpoint is then of the step
        before."""
        interrupt.stepping = True
        with tqdm(
            desc=self.cfg.stage,
            initial=self.step,
            total=self.total,
            disable=rank() > 0,
            mininterval=1,
        ) as self.bar:
            for step in range(self.step, self.total):
                clock.take()
                yield step
                self.bar.update()
        interrupt.check()  # a signal that came while the last checkpoint was saved
        interrupt.stepping = False

    def log(self, row: dict, rollouts: list[Rollout] = ()):
        """A row of metrics.jsonl; seconds, which differ from run to run, in a file of their own;
        the best, worst and longest response of every tenth step."""
        wall = {phase: seconds[1] for phase, seconds in clock.take().items()}
        if rank() > 0:
            return
        step = row["step"]
        self.bar.set_postfix_str(console_words(row, wall), False)
        append_rows(self.path / "metrics.jsonl", [row])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        times = dict(
            step=step,
            **wall,
            tokens=row["tokens"],
            resident=pages * os.sysconf("SC_PAGE_SIZE"),  # bytes of memory
            gpu_peak=torch.cuda.max_memory_allocated(),
        )
        append_rows(self.path / "timings.jsonl", [times])
        if rollouts and step % 10 == 0:
            by_reward = sorted(rollouts, key=lambda r: r.reward)
            longest = max(rollouts, key=lambda r: len(r.ids))
            some = dict(best=by_reward[-1], worst=by_reward[0], longest=longest)
            rows = [dict(step=step, kind=kind, **record_of(r)) for kind, r in some.items()]
            append_rows(self.path / "samples.jsonl", rows)
        if self.cfg.keep_rollouts and rollouts:
            path = self.path / "rollouts.jsonl.gz"
            with data_prep.naming(path), gzip.open(path, "at", encoding="utf-8") as f:
                f.writelines(data_prep.json_line(dict(step=step) | record_of(r)) for r in rollouts)

    def after_step(self, done: int):
        """Save and draw when it is time, at the end, and on a signal, which then ends the run."""
        of_rl = self.cfg.stage == "rl"
        save_every = self.cfg.rl_save_every if of_rl else self.cfg.sft_save_every
        signalled = interrupt.received()
        now = done == self.total or signalled
        if done > self.step and (now or done % save_every == 0):
            self.save(done, *self.trained)
        if now or done % (10 if of_rl else 100) == 0:
            draw_steps(self.path)
        if signalled:
            print0(
                f"{signalled}: stopped after step {done} of {self.total}; the same command resumes"
                " there"
            )
            raise Interrupted

    def save(self, step: int, policy, optimizer, anchor=None):
        """An ordinary Hugging Face folder with the trainer's state beside the weights. It is
        written beside, synced to the disk, sealed by its manifest, then renamed; then checkpoints
        beyond --keep and --keep-every are removed."""
        beside = self.path / f"partial-{step}"
        dtype = getattr(torch, self.cfg.dtype)
        try:
            (logprobs,) = response_logprobs(policy, [([0], [0, 0])], self.cfg)
            finite = logprobs.isfinite().all()
            weights = exported_weights(policy, dtype)
            if rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
                write_model(beside, policy, weights, dtype)
            del weights
            all_ranks_agree()  # a rank that failed says so to this call, in `except`
            with trainer_state(policy, optimizer, anchor) as state:
                with all_ranks_or_none():
                    if not (finite and all(local(x).isfinite().all() for x in state.values())):
                        raise Stop(
                            f"rank {rank()}: weights, AdamW's state or log-probs are not finite:"
                            f" not saved; lower the rate; {RESUMES}"
                        )
                # A file of 32 tensors is held in memory, then written.
                files = {name: 1 + i // 32 for i, name in enumerate(state)}
                place = str(beside / "trainer")
                writer = dcp.HuggingFaceStorageWriter(place, files, save_distributed=True)
                dcp.save(state, storage_writer=writer)
            all_ranks_agree()
            with all_ranks_or_none():
                written = written_files(beside)
            on_rank0(self.seal, beside, step, gather([written]))
            self.step = step
            self.source = str(self.path / f"checkpoint-{step}")
        except (Exception, dcp.CheckpointException) as e:  # a full disk has many names
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(e, Stop):  # `all_ranks_agree` raised it, on all ranks
                raise
            all_ranks_agree(
                Stop(
                    f"rank {rank()}: {beside}: cannot be written ({reason_of(e)}); make room:"
                    f" {RESUMES}, {self.source or 'the start'}"
                )
            )

    def seal(self, beside: Path, step: int, parts: list[dict]):
        """Manifest, then name, each on the disk before the next; only then old checkpoints go."""
        folders = [path for path in beside.rglob("*") if path.is_dir()]
        logs = [self.path / name for name in self.logs]
        for path in (*folders, *logs, self.path):
            if path.exists():
                sync(path)
        files = {}
        for part in parts:
            files |= part
        write_manifest(beside, step, self.run, files)
        final = self.path / f"checkpoint-{step}"
        remove(final)  # one that was found damaged
        beside.rename(final)
        sync(self.path)
        older = [path for path in checkpoints(self.path) if step_of(path) <= step]
        for old in older[: -self.cfg.keep]:
            if (old / "trainer").exists():  # what an earlier --keep-every kept stays
                if not self.cfg.keep_every or step_of(old) % self.cfg.keep_every:
                    remove(old)
                else:
                    drop_trainer_state(old)

    def resume(self, policy, optimizer, anchor=None):
        """Load the trainer's state of `source` and cut the logs back to its step. From now on
        `after_step` saves these."""
        self.trained = (policy, optimizer, anchor)
        if self.source:
            reader = dcp.HuggingFaceStorageReader(str(Path(self.source) / "trainer"))
            with trainer_state(policy, optimizer, anchor) as state:
                try:
                    dcp.load(state, storage_reader=reader)
                except dcp.CheckpointException as e:  # raised on all ranks
                    raise Misuse(f"{self.source}: does not fit this model ({reason_of(e)})")
            print0(f"resuming from {self.source}")
        self.source = on_rank0(self.tidy)

    def tidy(self) -> str:
        """Remove what a kill left, give the checkpoint the name of its step, and cut the logs back
        to that step -> `source`, by that name."""
        for path in self.path.iterdir():
            if re.fullmatch(r"(partial|removed)-\d+", path.name) and path.is_dir():
                print0(f"{path}: incomplete, removed")
                shutil.rmtree(path)
        source = Path(self.source)
        origin = source.parent if self.source else self.path
        named = self.path / f"checkpoint-{self.step}"
        if self.source and origin == self.path and source != named:
            remove(named)
            source.rename(named)
            sync(self.path)
            self.source = str(named)
        for name in self.logs:
            path = origin / name
            if not path.exists():  # a branch may keep rollouts that its origin did not
                path = self.path / name
            once = name in ("metrics.jsonl", "timings.jsonl")  # one row per step
            seen = set()

            def keep(row):
                step = row.get("step")
                good = type(step) is int and 0 <= step < self.step and not (once and step in seen)
                if good:
                    seen.add(step)
                return good

            if path.exists():
                cut_log(self.path / name, path, keep, self.path / f"{name}.cut-{self.step}")
            missing = sorted(set(range(self.step)) - seen)
            if once and missing:
                print0(
                    f"{path}: {len(missing)} of {self.step} steps are missing, the first is"
                    f" {missing[0]}"
                )
        return self.source


@contextlib.contextmanager
def trainer_state(policy, optimizer, anchor=None):
    """Tensors needed to resume, by flat names, as shards where the model is sharded: weights in
    float32, AdamW's state, the anchor. No random state: every draw has a seed of its own, made from
    the run's seed, the step and the place."""
    state = {}
    for name, p in policy.lm.named_parameters():
        state["policy." + name] = p.detach()
        for kind, x in optimizer.state[p].items():
            state[f"{kind}.{name}"] = x
    if anchor is not None:
        for name, p in anchor.lm.named_parameters():
            state["anchor." + name] = p.detach()
    with optimizer.on_device, (anchor or policy).on_device:  # the policy's parks nothing
        yield state


def console_words(row: dict, wall: dict) -> str:
    """A row of metrics.jsonl, and seconds per phase, for the progress bar."""
    total = sum(wall.values())
    shares = ", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in wall.items())
    speed = f"{row['tokens'] / total:,.0f} tokens/s ({shares})"
    if "loss" in row:
        return f"loss {row['loss']:.3f} entropy {row['entropy']:.3f} {speed}"
    return (
        f"reward {row['reward']:.2f} right {row['accuracy']:.2f} length {row['length']:.0f}"
        f" entropy {row['entropy']:.3f} kl {row['kl']:.2f} overlong {row['overlong']:.2f}"
        f" repeat {row['repetition']:.2f} flat {row['flat_groups']:.2f}"
        f" ungraded {row['ungraded']:.2f} gap {row['logprob_gap']:.0e} {speed}"
    )


# --------------------------------------------------------------------- ranks, the clock, signals
# A Stop, or an error of the disk, inside `all_ranks_or_none` ends all ranks with its line: no rank
# may wait for the failed one between the error and the end of that `with`. Any other error ends its
# rank alone: the others lose contact in their next collective (`main`), or after cfg.timeout.


LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine; vLLM overwrites it


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


def exchange(rollouts: list[Rollout], share: list[Rollout], together: int = 1):
    """Every `together` ranks completed one share, each n-th rollout: now all ranks get all of
    them."""
    shares = gather([share] if rank() % together == 0 else [])
    for i, part in enumerate(shares):
        rollouts[i :: len(shares)] = part


def from_rank0(value):
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_rank0(function, *args):
    """Call on rank 0 alone -> its result, or its Stop, on all ranks."""
    result = None
    with all_ranks_or_none():
        if rank() == 0:
            result = function(*args)
    return from_rank0(result)


@contextlib.contextmanager
def all_ranks_or_none():
    """If a Stop, or an error of the disk, is raised inside on any rank, all ranks raise it, so that
    none waits for one that stopped."""
    error = None
    try:
        yield
    except Stop as e:
        error = e
    except OSError as e:
        error = Stop(failure_of(e))
    all_ranks_agree(error)


def all_ranks_agree(error: Stop | None = None):
    """Raise the first rank's error on all ranks. Also a barrier."""
    for e in gather([error]):
        if e is not None:
            raise e


def share_of_rank(rollouts: list[Rollout]) -> list[int]:
    """Indices of the responses that this rank trains on. Those to one prompt stay together where no
    rank then has 2 % more tokens than the mean; else they are split in 2, 4, ... pieces."""
    of_prompt = {}
    for i, r in enumerate(rollouts):
        of_prompt.setdefault(tuple(r.problem.prompt), []).append(i)  # other ranks send copies
    pieces = 1
    while True:
        items = []
        for group in of_prompt.values():
            group.sort(key=lambda i: len(rollouts[i].ids))
            items += [group[j::pieces] for j in range(min(pieces, len(group)))]
        work = []
        for item in items:
            prompt = rollouts[item[0]].problem.prompt
            work.append(len(prompt) + sum(len(rollouts[i].ids) for i in item))
        parts = deal(work, world())
        loads = [sum(map(work.__getitem__, part)) for part in parts]
        even = max(loads) * world() <= 1.02 * sum(work) and min(loads) > 0
        if even or len(items) == len(rollouts):
            return sorted(itertools.chain(*[items[k] for k in parts[rank()]]))
        pieces *= 2


def by_problem(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Consecutive rollouts of one problem -> a list per problem. A batch that crosses an epoch may
    hold a problem twice in a row, with two seeds."""
    groups = itertools.groupby(rollouts, key=lambda r: (id(r.problem), r.seed))
    return [list(group) for _, group in groups]


def deal(work: list[int], shares: int) -> list[list[int]]:
    """Item indices per share, balanced greedily: the largest item first, each to the smallest
    share."""
    items = [[] for _ in range(shares)]
    load = [0] * shares
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        least = load.index(min(load))
        items[least].append(i)
        load[least] += work[i]
    return [sorted(part) for part in items]


def seed_for(seed: int, *what) -> int:
    """A 63-bit seed for one purpose and step. Stateless: a resumed run draws what the uninterrupted
    one would have drawn."""
    hashed = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "big") >> 1


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The `size` row numbers of step `step` in an endless stream of shuffled epochs over n rows."""
    rows = []
    for i in range(step * size, (step + 1) * size):
        epoch, at = divmod(i, n)
        if not rows or at == 0:
            order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(n)
        rows.append(int(order[at]))
    return rows


def reason_of(e: BaseException) -> str:
    """The line of an error that says the reason, for a message of one line."""
    lines = (str(e).strip() or type(e).__name__).splitlines()
    return lines[-1 if isinstance(e, dcp.CheckpointException) else 0]


class Clock:
    """Seconds of the phases of a step: `with clock("rollout"): ...`."""

    def __init__(self):
        self.seconds = {}  # phase -> (CPU, wall)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        cpu, wall = self.seconds.get(phase, (0.0, 0.0))
        cpu -= time.process_time()
        wall -= time.perf_counter()
        yield
        self.seconds[phase] = (cpu + time.process_time(), wall + time.perf_counter())

    def take(self) -> dict:
        """The seconds so far; the clock begins anew."""
        seconds = self.seconds
        self.seconds = {}
        return seconds


clock = Clock()  # one of the process, as its CPU time is


class Console:
    """A standard stream whose reader may die or stop reading (`2>&1 | tee log`, a closed terminal).
    Lines are lost then, but nothing raises, and nothing waits longer than a second."""

    patience = 1.0  # seconds

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str):
        data = text.encode(self.encoding, "backslashreplace")
        with contextlib.suppress(OSError, ValueError):
            for start in range(0, len(data), 4096):  # what a pipe that is ready takes at once
                ready = select.select([], [self], [], self.patience)[1]
                self.patience = 1.0 if ready else 0.0
                if ready:
                    os.write(self.fileno(), data[start : start + 4096])


def console(stream):
    """A standard stream as a Console; a stream in memory as it is."""
    standard = stream and stream in (sys.__stdout__, sys.__stderr__)
    return Console(stream) if standard else stream


class Interrupted(Exception):
    """A signal was heard: before a step's gradient, or after the checkpoint of a step was saved."""


class Interrupt:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 (SLURM's warning), from the first line of this file to
    the last. While steps are taken they ask for a checkpoint and an orderly end; a second one
    within 10 s is ignored (launchers send two). A later one, and one at any other time, ends the
    process."""

    name = ""  # of the first signal
    at = math.inf  # when it came
    stepping = False

    def __init__(self):
        self.outer = []  # handlers and mask of before: a command may call `main`

    def __enter__(self):
        self.name = ""
        self.at = math.inf
        self.stepping = False
        before = {}
        for number in SIGNALS:
            # nohup stays nohup
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self.hear)
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.outer.append((before, mask))
        return self

    def __exit__(self, *unused):
        before, mask = self.outer.pop()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        name = signal.Signals(number).name
        if not self.stepping or time.monotonic() > self.at + 10:
            with contextlib.suppress(Exception):
                complain(f"{name}: stopped; {RESUMES}", 1)
            os._exit(1)
        if not self.name:
            self.name = name
            self.at = time.monotonic()
            with contextlib.suppress(Exception):
                print("\nstopping: a checkpoint is saved first", file=sys.stderr)

    def received(self) -> str:
        """The signal that any rank got, or the empty string; the same answer on every rank."""
        return max(gather([self.name]))

    def check(self):
        if self.received():
            raise Interrupted


interrupt = Interrupt()  # signals are the process's


# ---------------------------------------------------------- pictures, from the files of a run alone
PANELS = {  # stage -> panels of curves.png: label with unit, and columns of metrics.jsonl
    "sft": {
        "loss (nats per token)": "loss",
        "entropy (nats per token)": "entropy",
        "gradient norm": "grad_norm",
    },
    "rl": {
        "reward, share right": "reward accuracy",
        "response length (tokens)": "length",
        "share of responses": " ".join(PATTERNS),
        "entropy (nats per token)": "entropy",
        "KL to the anchor (nats per response)": "kl",
        "share of groups with equal rewards": "flat_groups",
        "share of checks, responses": "honest honoured",
        "right: share of responses": "first_right corrected",
        "reflection words (per 100 tokens)": "reflections",
    },
}
WORDS = dict(
    accuracy="right",
    overlong="over-long",
    high_perplexity="improbable",
    first_right="at the first try",
    corrected="after another try",
)


def column(rows: list[dict], name: str) -> np.ndarray:
    """A column of metrics.jsonl; NaN where it is empty."""
    return np.array([row.get(name) for row in rows], dtype=float)  # None becomes NaN


def draw_steps(folder: Path):
    """curves.png from metrics.jsonl: steps are faint, a centred mean over 5 % of them is strong.
    Empty columns get no panel."""
    rows = read_log(folder / "metrics.jsonl") if rank() == 0 else []
    if not rows:
        return
    panels = []
    for label, text in PANELS[folder.name].items():
        names = text.split()
        if not np.isnan(column(rows, names[0])).all():
            panels.append((label, names))
    height = math.ceil(len(panels) / 3)
    window = max(1, len(rows) // 20)
    steps = column(rows, "step") + 1
    figure = Figure(figsize=(12.6, 3 * height))
    for i, (label, names) in enumerate(panels):
        axis = figure.add_subplot(height, 3, i + 1, xlabel="step", ylabel=label)
        for name, style in zip(names, ("-", "--", ":", "-.")):
            values = column(rows, name)
            faint = axis.plot(steps, values, lw=0.6, alpha=0.35)[0]
            mean = np.convolve(values, np.ones(window) / window, "valid")
            x = steps[window // 2 :][: len(mean)]
            axis.plot(x, mean, ls=style, color=faint.get_color(), label=WORDS.get(name, name))
        if axis.dataLim.y0 == axis.dataLim.y1 == 0:
            axis.set_ylim(0, 1)
        if len(names) > 1:
            axis.legend(fontsize=8)
    title = f"stage {folder.name} of run {folder.parent.name}"
    save_figure(figure, folder / "curves.png", title)


def draw_results(folder: Path):
    """inference_scaling.png of each test set: accuracy against thinking budget, a curve per
    checkpoint (section 3)."""
    by_test = {}
    for entry in results_of(folder):
        if entry.get("scaling"):
            by_test.setdefault(entry["test"], []).append(entry)
    for test, entries in by_test.items():
        axis = Figure(figsize=(6.2, 4.5)).subplots()
        names = [entry["name"] for entry in entries]
        for i, entry in enumerate(entries):
            name = entry["name"]
            budgets, value, error, _ = np.array(entry["scaling"], dtype=float).T
            axis.errorbar(
                budgets,
                100 * value,
                100 * error,
                label=name if names.count(name) == 1 else entry["checkpoint"],  # two runs
                marker="osD^vPX*"[i % 8],
                color=colormaps["viridis_r"]((i + 1) / len(entries)),  # darker with each checkpoint
                capsize=2,
            )
        axis.set(xscale="log", xlabel="thinking budget (tokens)", ylabel="pass@1 (%)")
        ticks = sorted({point[0] for entry in entries for point in entry["scaling"]})
        axis.set_xticks(ticks, ticks, rotation=45)
        axis.minorticks_off()
        axis.legend(fontsize=8, title="checkpoint")
        title = f"{test}: {entry['problems']} problems x {entry['samples']} samples"
        title += f" at T = {entry['temperature']}; bars: standard error"
        # The folders, too: test sets of two folders may have one name. File names are limited.
        which = re.sub(r"\W+", "-", f"-{test}")[-99:] if len(by_test) > 1 else ""
        save_figure(axis.figure, folder / f"inference_scaling{which}.png", title)


def save_figure(figure: Figure, path: Path, title: str):
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    beside = path.with_name("partial-" + path.name)
    figure.savefig(beside, dpi=110)
    beside.rename(path)


# ------------------------------------------------------------------------------- the command line
STAGES = {"sft": run_sft, "rl": run_rl, "eval": run_eval}
RESUMES = "the same command resumes from the last checkpoint"


class Parser(argparse.ArgumentParser):
    """One argument for each option of Config, as its `knob` declares it; only those that are given
    get a value."""

    def __init__(self):
        super().__init__(
            prog="t1.py",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        for option in dataclasses.fields(Config):
            names = {f"--{option.name.replace('_', '-')}", f"--{option.name}"}
            choices = get_args(option.type)  # of a Literal
            rules = dict(help=option.metadata["help"])
            if choices:
                rules["choices"] = choices
            elif option.type is bool:
                rules |= dict(type=truth, nargs="?", const=True)
            else:
                rules["type"] = option.type
            self.add_argument(*sorted(names), **rules)

    def error(self, message):
        hint = "python t1.py --help lists every option, such as --stage sft"
        words = re.findall(r"--?[\w-]+", message)
        if "unrecognized" in message and words:
            close = difflib.get_close_matches(words[0], self._option_string_actions)
            if close:
                hint = f"did you mean {close[0]}?"
        raise Misuse(f"{message}; {hint}")


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError  # argparse says which option it is of
    return text.lower() in ("true", "1")


def settings_before(cfg: Config) -> dict:
    """The config of the given model's stage; else of this stage, of RL or of SFT of the run, the
    first that is there; else {}."""
    given = [Path(name) for name in (cfg.model, *cfg.checkpoint.split(",")) if name]
    run = Path(cfg.out) / (cfg.name or cfg.preset or "tiny")
    own = [run / "sft", run / "rl", run / cfg.stage]
    for folder in reversed(given or own):  # a stage that runs again: its own; RL's before SFT's
        if folder.name.startswith("checkpoint-"):
            folder = folder.parent
        path = folder / "config.json"
        settings = read_json(path).get("config") if path.is_file() else None
        if isinstance(settings, dict) and settings.get("preset") in PRESETS:
            return settings
    return {}


def parse_args(argv: list[str] | None = None) -> Config:
    """The preset's values, then what the stage before hands on, then the options that are given."""
    given = vars(Parser().parse_args(argv))
    cfg = Config(**given)
    before = settings_before(cfg)
    of_user = (cfg.model or cfg.checkpoint) and (cfg.data or cfg.test or cfg.benchmarks)
    preset = cfg.preset or before.get("preset") or ("pretrained" if of_user else "tiny")
    values = dict(PRESETS[preset])
    if cfg.stage != "sft":
        values.pop("model", None)  # where SFT starts; later stages take the run's checkpoints
    if before.get("preset") == preset:
        for option in dataclasses.fields(Config):
            if option.metadata["inherit"] and option.name in before:
                values[option.name] = before[option.name]
    cfg = Config(**values | given | dict(preset=preset))
    check_config(cfg)
    return cfg


def check_config(cfg: Config):
    """Misuse for values that no run can have."""
    ranks = number_of_ranks()
    usual = Config(**PRESETS[cfg.preset])

    def need(holds, name, what):
        if not holds:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(cfg, name)!r}: {what}")

    need(cfg.stage in STAGES, "stage", f"choose from {', '.join(STAGES)}")
    for option in dataclasses.fields(cfg):
        name = option.name
        value = getattr(cfg, name)
        stage = option.metadata["stage"] or cfg.stage
        if cfg.stage not in stage:
            need(value == getattr(usual, name), name, f"only --stage {stage} uses it")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            need(math.isfinite(value) and value >= 0, name, "must be a finite number, not below 0")
            need(value > 0 or option.metadata["zero"], name, "must be above 0")
        elif isinstance(value, str):
            need(value == value.encode(errors="replace").decode(), name, "is not UTF-8 text")
    need(cfg.k >= 2, "k", "leave-one-out needs at least 2 samples per prompt")
    need(cfg.min_p < 1, "min_p", "must be below 1")
    need(cfg.ema_decay <= 1, "ema_decay", "must be at most 1")
    need(cfg.repeat_count > 1, "repeat_count", "must be at least 2: every block occurs once")
    numbers = r"([1-9]\d{0,8}(,[1-9]\d{0,8})*)?"
    need(
        re.fullmatch(numbers, cfg.budgets),
        "budgets",
        "must be whole numbers above 0 and below 10^9, with commas between",
    )
    names = r"([\w-]+(,[\w-]+)*)?"
    need(re.fullmatch(names, cfg.benchmarks), "benchmarks", "must be names, with commas between")
    template = cfg.prompt_template or "{problem}"
    need("{problem}" in template, "prompt_template", "must contain {problem}")
    values = json_object(cfg.chat_template_kwargs)
    need(values is not None, "chat_template_kwargs", "must be a JSON object")
    if cfg.reward:
        reward_function(cfg.reward)  # before a model is loaded
    need(not re.search(r"[/\\\0]|^\.+$", cfg.name), "name", "must be the name of one folder")
    need(
        cfg.engine != "vllm" or installed("vllm"),
        "engine",
        "not installed here: pip install vllm==0.32.0",
    )
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    need(not (cfg.checkpoint and cfg.model), "checkpoint", "or --model, not both")
    need(not cfg.compile or compiler, "compile", "needs a C compiler; --compile false goes without")
    need(not cfg.vllm_tp or cfg.engine != "torch", "vllm_tp", "only with --engine vllm")
    need(ranks % (cfg.vllm_tp or 1) == 0, "vllm_tp", f"must divide the number of ranks, {ranks}")
    need(cfg.vllm_memory < 1, "vllm_memory", "must be below 1")
    one_each = f"each of the {ranks} ranks needs at least one"
    need(cfg.prompts * cfg.k >= ranks, "prompts", f"{one_each} response")
    if cfg.stage == "sft":
        need(cfg.sft_batch >= ranks, "sft_batch", f"{one_each} trace")


def main(argv: list[str] | None = None) -> int:
    out = contextlib.redirect_stdout(console(sys.stdout))
    err = contextlib.redirect_stderr(console(sys.stderr))
    with interrupt, out, err:
        try:
            cfg = parse_args(argv)
            join_ranks(cfg)
            quiet()
            print0(f"preset {cfg.preset}{changes_of(cfg)}")
            if cfg.stage != "sft" and cfg.repeat_ngram * cfg.repeat_count > cfg.max_new:
                blocks = f"{cfg.repeat_count} blocks of {cfg.repeat_ngram} tokens"
                print0(f"repetition is never found: {blocks} are more than --max-new {cfg.max_new}")
            STAGES[cfg.stage](cfg)
            close_groups()
            return 0
        except Interrupted:
            close_groups()
            return 0
        except Stop as e:
            return complain(str(e), e.code)
        except (OSError, MemoryError, RuntimeError) as e:
            reason = failure_of(e)
            if not reason:
                raise
            return complain(reason, 1)


def changes_of(cfg: Config) -> str:
    """The options that differ from those of the preset `tiny`."""
    usual = Config(stage=cfg.stage, preset=cfg.preset)
    values = [
        f"{name} {value}"
        for name, value in dataclasses.asdict(cfg).items()
        if value != getattr(usual, name)
    ]
    return ": " + ", ".join(values) if values else ""


def failure_of(e: Exception) -> str:
    """What happened to the machine, in a line; the empty string for an error of the program."""
    reason = reason_of(e)
    if isinstance(e, MemoryError) or re.search("out of memory|alloc.*memory|memory.*alloc", str(e)):
        return f"out of memory ({reason}); lower --micro-tokens, --rollout-rows or --vllm-memory"
    if no_more_processes(e):
        return f"no thread or process can be started ({reason}); raise ulimit -u"
    if isinstance(e, OSError):
        return f"{e.filename or 'a file'}: {e.strerror or e}; {RESUMES}"
    if world() > 1 and re.search("gloo|NCCL|[Cc]onnection|Broken pipe|Timed out", str(e)):
        return f"lost contact with another rank ({reason}); {RESUMES}"
    return ""


def no_more_processes(e: BaseException) -> bool:
    return bool(re.search("start new thread|Resource temporarily|ThreadPoolBuild", str(e)))


def number_of_ranks() -> int:
    """As torchrun tells every process that it starts."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    beside = ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    if ranks != "1" and not (ranks.isdecimal() and set(beside) <= set(os.environ)):
        raise Misuse(
            f"WORLD_SIZE is {ranks!r}, and torchrun sets {', '.join(beside)} beside it: start"
            " several ranks by torchrun"
        )
    return int(ranks)


def join_ranks(cfg: Config):
    """Under torchrun: the process group, this rank's GPU and threads."""
    # NOT IN PAPER: a model this small gains little from more threads, and loses tenfold beside a
    # busy process.
    if cfg.preset == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if number_of_ranks() == 1:
        return
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // LOCAL_RANKS))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=cfg.timeout))


def close_groups():
    """Called by all ranks together, since NCCL waits for the others here. A rank that fails alone
    only exits, and torchrun then ends the rest."""
    if dist.is_initialized() and "vllm" in sys.modules:
        # Its groups first: it would look for them at exit.
        sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet():
    """Remarks of libraries stay off the console; failures raise."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # of one process
    logging.disable(logging.WARNING)


def complain(message: str, code: int) -> int:
    """One line on stderr; with several ranks on a line of its own, below rank 0's progress bar."""
    who = f"\nt1.py, rank {rank()}" if world() > 1 else "t1.py"
    print(f"{who}: {message}", file=sys.stderr)
    return code


def leave(code: int):
    """Exit. Several ranks skip the interpreter's finalization: a thread of gloo that still has a
    tensor to release asks for the interpreter's lock there, and Python ends such a thread in a way
    that aborts the process (exit -6)."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and (code or "vllm" not in sys.modules):  # which has shared memory to remove
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
