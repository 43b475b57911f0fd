"""One real step of RL on the embedded model, number by number: K = 4 responses to one prompt.

    python -m experiments.walkthrough [OUT]  writes docs/walkthrough.md; 10 minutes on one thread

A cold start of `tiny` (runs/walkthrough) and a few ordinary steps of RL come first, so that policy
and anchor differ. Then each line of `t1.rl_step` is taken by hand, and what it made is written down.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch

import t1

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"


TEMPLATE = """# One step of T1, number by number

`python -m experiments.walkthrough` wrote this page: the embedded model after its cold start and
{rl_steps} steps of RL, one prompt, K = 4. Each line names the line of `t1.rl_step` that made it.

## 1. Oversample

`rollouts = sample_responses(engine, policy, batch, step, cfg)`: four responses at temperature
{temperature} to the prompt

```
{prompt}
```

{responses}

## 2. Reward

`rewards = judge(rollouts, policy.tokenizer, cfg).view(P, K)`: 1 right, 0 wrong, -1 pattern.

- patterns: {patterns}
- rewards: {rewards}

## 3. KL to the anchor

`kl = kl_to_anchor(anchor, rollouts, cfg).view(P, K)`: d = log pi - log pi_ref, summed over the
tokens of each response, in nats.

- d: {kl}

## 4. Advantage

`advantages = rloo_advantages(rewards) - cfg.kl_coef * kl_term`, with beta = {beta} and kl_term = d -
mean d.

- A: {advantages}

## 5. One update

`policy_loss_reference` needs log pi and the entropy H of each of the N = {N} tokens. The first
tokens of response 1:

- tokens: {tokens}
- log pi: {logprobs}
- H: {entropies}

The mean of H over all tokens is {mean_entropy}. The loss is -(1/N) sum [A log pi + alpha H], with
alpha = {alpha}.

- by `policy_loss_reference`: {plain}
- by `policy_loss`, in chunks: {chunked}

`norm = update(policy, optimizer, lr, cfg)`: the gradient's norm is {norm}, the rate {lr}. log pi of
the responses moves with the sign of A:

- before: {before}
- after: {after}
- change: {changes}

## 6. The anchor follows

`ema_update_(anchor, policy, cfg.ema_decay)`: anchor <- {decay} anchor + (1 - {decay}) policy. log pi
before the update, minus log pi_ref now:

- {behind}
"""


def warm_up(out: str, sft_steps: int, rl_steps: int):
    """A cold start and `rl_steps` steps of RL -> what `rl_step` needs, and the problems."""
    options = ["--out", out, "--name", "walkthrough"]
    steps = ["--sft-steps", str(sft_steps)] if sft_steps else []
    t1.main(["--stage", "sft", *options, *steps])
    cfg = t1.parse_args(["--stage", "rl", *options, "--k", "4"])
    policy, tokenizer = t1.load_policy(t1.latest(f"{out}/walkthrough/sft"), cfg)
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = t1.make_optimizer(policy, cfg)
    engine = t1.make_engine("", policy, tokenizer, cfg)
    rows, _ = t1.read_data(cfg)
    problems = t1.encode_prompts(rows, tokenizer, cfg)
    for step in range(rl_steps):
        t1.rl_step(step, problems, policy, anchor, engine, optimizer, cfg)
    return policy, anchor, engine, optimizer, problems, dataclasses.replace(cfg, prompts=1)


def mixed(policy, engine, problems, step: int, cfg):
    """The first problem with one or two wrong responses of four, and its judged responses."""
    for problem in problems:
        rollouts = t1.sample_responses(engine, policy, [problem], step, cfg)
        rewards = t1.judge(rollouts, policy.tokenizer, cfg)
        if 0.25 <= rewards.mean() < 1:
            return rollouts, rewards.view(1, 4)
    raise SystemExit("no problem has right and wrong responses")


def logprob_of(policy, rollouts, cfg) -> torch.Tensor:
    """log pi of each response, (K,)."""
    rows = [t1.row_of(r) for r in rollouts]
    logprobs = t1.response_logprobs(policy, rows, cfg, cfg.temperature, cfg.min_p)
    return torch.stack([x.sum() for x in logprobs])


def losses(policy, rollouts, advantages, cfg) -> tuple:
    """The loss by `policy_loss_reference` and by `policy_loss`, and the entropy of each token."""
    batch = t1.pack([t1.row_of(r) for r in rollouts], policy.device)
    N = len(batch.targets)
    sizes = torch.tensor([len(r.ids) for r in rollouts])
    A = advantages.repeat_interleave(sizes)
    weights = torch.full((N,), 1 / N)
    with torch.no_grad():
        hidden = policy(batch)
        arguments = (hidden, policy.head, batch.targets, A, weights)
        options = (cfg.entropy_coef, cfg.temperature, cfg.min_p)
        plain = t1.policy_loss_reference(*arguments, *options)
        chunked, logprob, entropy = t1.policy_loss(*arguments, *options)
    return plain.item(), chunked.item(), logprob, entropy


def numbers(values, digits: int = 4) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def page(out: str = "runs", sft_steps: int = 0, rl_steps: int = 10) -> str:
    policy, anchor, engine, optimizer, problems, cfg = warm_up(out, sft_steps, rl_steps)
    rollouts, rewards = mixed(policy, engine, problems, rl_steps, cfg)
    kl = t1.kl_to_anchor(anchor, rollouts, cfg).view(1, 4)
    advantages = t1.rloo_advantages(rewards) - cfg.kl_coef * t1.center_kl(kl)
    plain, chunked, logprob, entropy = losses(policy, rollouts, advantages.flatten(), cfg)
    before = logprob_of(policy, rollouts, cfg)
    sums = t1.accumulate_gradient(policy, rollouts, advantages.flatten(), cfg)
    lr = t1.learning_rate(rl_steps, cfg.rl_steps, cfg.rl_lr, cfg.warmup)
    norm = t1.update(policy, optimizer, lr, cfg)
    after = logprob_of(policy, rollouts, cfg)
    t1.ema_update_(anchor, policy, cfg.ema_decay)
    behind = before - logprob_of(anchor, rollouts, cfg)
    first = len(rollouts[0].ids)
    tokens = [policy.tokenizer.decode([i]) for i in rollouts[0].ids[:8]]
    responses = "\n\n".join(f"**{i}**\n```\n{r.text}\n```" for i, r in enumerate(rollouts, 1))
    return TEMPLATE.format(
        rl_steps=rl_steps,
        prompt=rollouts[0].problem.row["problem"],
        responses=responses,
        patterns=", ".join(str(r.pattern) for r in rollouts),
        rewards=numbers(rewards[0], 0),
        kl=numbers(kl[0]),
        beta=cfg.kl_coef,
        alpha=cfg.entropy_coef,
        temperature=cfg.temperature,
        advantages=numbers(advantages[0]),
        tokens=" ".join(repr(token) for token in tokens),
        logprobs=numbers(logprob[:first][:8]),
        entropies=numbers(entropy[:first][:8]),
        mean_entropy=f"{entropy.mean():.4f}",
        N=sums["tokens"],
        plain=f"{plain:.6f}",
        chunked=f"{chunked:.6f}",
        norm=f"{norm:.4f}",
        lr=f"{lr:.6f}",
        before=numbers(before),
        after=numbers(after),
        changes=numbers(after - before),
        decay=cfg.ema_decay,
        behind=numbers(behind),
    )


if __name__ == "__main__":
    PAGE.write_text(page(*sys.argv[1:2]), encoding="utf-8")
