"""One real step of RL on the embedded model, number by number: K = 4 responses to one prompt.

    python -m experiments.walkthrough [OUT]     writes docs/walkthrough.md; 10 minutes on one thread

A cold start of `tiny` (OUT/walkthrough) and ten ordinary steps of RL come first, so that policy and
anchor differ. Then each line of `t1.rl_step` is taken by hand, and what it made is written down.
"""

import copy
import dataclasses
import sys
import textwrap
from pathlib import Path

import torch

import t1

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
TEMPLATE = """# One step of T1, number by number

`python -m experiments.walkthrough` wrote this page: the embedded model after its cold start and
{steps} steps of RL, one prompt, K = 4. Each line of code is one of `t1.rl_step`.

1. `rollouts = sample_responses(engine, policy, chosen, step, cfg)`: four responses at temperature
   {temperature} to the prompt

```
{prompt}
{responses}
```

2. `rewards = judge(rollouts, policy.tokenizer, cfg).view(P, K)`: 1 right, 0 wrong, -1 pattern
   - patterns: {patterns}
   - rewards: {rewards}
3. `kl = kl_to_anchor(anchor, rollouts, cfg).view(P, K)`: d = log pi - log pi_ref, summed over the
   tokens of each response, in nats
   - d: {kl}
4. `advantages = rloo_advantages(rewards - cfg.kl_coef * kl)`, with beta = {beta}
   - A: {advantages}
5. `sums = accumulate_gradient(policy, rollouts, advantages.flatten(), cfg)`: the loss is
   -(1/N) sum [A log pi + alpha H] over N = {N} tokens, with alpha = {alpha}
   - tokens of response 1: {tokens}
   - their log pi: {logprobs}
   - their H: {entropies}
   - mean H of all N tokens: {mean_entropy}
   - the loss by `policy_loss_reference`: {plain}
   - the loss by `policy_loss`, in chunks of 50: {chunked}
6. `norm = update(policy, optimizer, lr, cfg)`: the gradient's norm is {norm}, the rate {lr}. The
   log pi of the responses; those that share tokens with a wrong one may fall with it
   - before: {before}
   - after: {after}
   - change: {change}
7. `ema_update_(anchor, policy, cfg.ema_decay)`: anchor <- {decay} anchor + (1 - {decay}) policy
   - log pi before the update, minus log pi_ref after it: {behind}
"""


def start(out: str, steps: int):
    """A cold start and `steps` steps of RL -> what `rl_step` needs, and the problems."""
    if t1.main(["--stage", "sft", "--out", out, "--name", "walkthrough"]):
        raise SystemExit(1)  # the reason was said
    options = ["--out", out, "--name", "walkthrough", "--k", "4"]
    cfg = t1.parse_args(["--stage", "rl", *options])
    policy, tokenizer = t1.load_policy(t1.latest(f"{out}/walkthrough/sft"), cfg)
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = t1.make_optimizer(policy, cfg)
    engine = t1.make_engine("", policy, tokenizer, cfg)
    problems = t1.encode_prompts(t1.read_data(cfg)[0], tokenizer, cfg)
    for step in range(steps):
        t1.rl_step(step, problems, policy, anchor, engine, optimizer, cfg)
    return policy, anchor, engine, optimizer, problems, dataclasses.replace(cfg, prompts=1)


def logprob_of(policy, rollouts, cfg) -> torch.Tensor:
    """log pi of each response, (K,)."""
    rows = [t1.row_of(r) for r in rollouts]
    logprobs = t1.response_logprobs(policy, rows, cfg, cfg.temperature, cfg.min_p)
    return torch.stack([x.sum() for x in logprobs])


@torch.no_grad()
def losses(policy, rollouts, advantages, cfg) -> tuple:
    """The loss by `policy_loss_reference` and by `policy_loss`, log pi and H of each token."""
    batch = policy.pack([t1.row_of(r) for r in rollouts])
    sizes = torch.tensor([len(r.ids) for r in rollouts])
    A = advantages.repeat_interleave(sizes)
    weights = torch.full_like(A, 1 / len(A))
    arguments = (policy(batch), policy.head, batch.targets, A, weights)
    options = (cfg.entropy_coef, cfg.temperature, cfg.min_p)
    plain = t1.policy_loss_reference(*arguments, *options)
    return plain, *t1.policy_loss(*arguments, *options, chunk=50)


def numbers(values, digits: int = 4) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def page(out: str = "runs", steps: int = 10) -> str:
    policy, anchor, engine, optimizer, problems, cfg = start(out, steps)
    for problem in problems:  # the first with both right and wrong responses
        rollouts = t1.sample_responses(engine, policy, [problem], steps, cfg)
        rewards = t1.judge(rollouts, policy.tokenizer, cfg).view(1, 4)
        if 0 < rewards.mean() < 1:
            break
    kl = t1.kl_to_anchor(anchor, rollouts, cfg).view(1, 4)
    advantages = t1.rloo_advantages(rewards - cfg.kl_coef * kl)
    plain, chunked, logprob, entropy = losses(policy, rollouts, advantages[0], cfg)
    before = logprob_of(policy, rollouts, cfg)
    sums = t1.accumulate_gradient(policy, rollouts, advantages[0], cfg)
    lr = t1.learning_rate(steps, cfg.rl_steps, cfg.rl_lr, cfg.warmup, constant=True)
    norm = t1.update(policy, optimizer, lr, cfg)
    after = logprob_of(policy, rollouts, cfg)
    t1.ema_update_(anchor, policy, cfg.ema_decay)
    first = rollouts[0].ids[:8]
    return TEMPLATE.format(
        steps=steps,
        temperature=cfg.temperature,
        prompt=textwrap.fill(problem.row["problem"], 100),
        responses="\n".join(f"--- response {i}\n{r.text}" for i, r in enumerate(rollouts, 1)),
        patterns=", ".join(str(r.pattern) for r in rollouts),
        rewards=numbers(rewards[0], 0),
        kl=numbers(kl[0]),
        beta=cfg.kl_coef,
        advantages=numbers(advantages[0]),
        N=sums["tokens"],
        alpha=cfg.entropy_coef,
        tokens=" ".join(repr(policy.tokenizer.decode([i])) for i in first),
        logprobs=numbers(logprob[: len(first)]),
        entropies=numbers(entropy[: len(first)]),
        mean_entropy=f"{entropy.mean():.4f}",
        plain=f"{plain:.6f}",
        chunked=f"{chunked:.6f}",
        norm=f"{norm:.4f}",
        lr=f"{lr:.6f}",
        before=numbers(before),
        after=numbers(after),
        change=numbers(after - before),
        decay=cfg.ema_decay,
        behind=numbers(before - logprob_of(anchor, rollouts, cfg)),
    )


if __name__ == "__main__":
    PAGE.write_text(page(*sys.argv[1:]), encoding="utf-8")
