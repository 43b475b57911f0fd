"""One real step of RL on the embedded model, number by number: K = 4 responses to one prompt.

    python -m experiments.walkthrough [OUT]     writes docs/walkthrough.md; 10 minutes on one thread

A cold start of `tiny` (OUT/walkthrough) and ten ordinary steps of RL come first, so that policy and
anchor differ. Then each line of `t1.rl_step` is taken by hand, and what it made is written down."""

import copy
import dataclasses
import textwrap
from pathlib import Path

import torch

import experiments
import t1

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"


def start(out: str, steps: int) -> tuple:
    """A cold start and `steps` steps of RL -> policy, anchor, optimizer and the Config of one more
    step, and its responses and rewards: of the first prompt with right and wrong ones."""
    if t1.main(["--stage", "sft", "--out", out, "--name", "walkthrough"]):
        raise SystemExit(1)  # the reason was said
    cfg = t1.parse_args(["--stage", "rl", "--out", out, "--name", "walkthrough", "--k", "4"])
    policy, tokenizer = t1.load_policy(t1.latest(f"{out}/walkthrough/sft"), cfg)
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = t1.make_optimizer(policy, cfg)
    engine = t1.make_engine("", policy, tokenizer, cfg)
    problems = t1.encode_prompts(t1.read_data(cfg)[0], tokenizer, cfg)
    for step in range(steps):
        t1.rl_step(step, problems, policy, anchor, engine, optimizer, cfg)
    cfg = dataclasses.replace(cfg, prompts=1)
    for problem in problems:
        rollouts = t1.sample_responses(engine, policy, [problem], steps, cfg)
        rewards = t1.judge(rollouts, tokenizer, cfg).view(1, 4)
        if 0 < rewards.mean() < 1:
            break
    return policy, anchor, optimizer, cfg, rollouts, rewards


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


def page(out: str, steps: int = 10) -> str:
    """The text of docs/walkthrough.md; each number stands where it is computed."""
    policy, anchor, optimizer, cfg, rollouts, rewards = start(out, steps)
    prompt = textwrap.fill(rollouts[0].problem.row["problem"], 100)
    responses = "\n".join(f"--- response {i}\n{r.text}" for i, r in enumerate(rollouts, 1))
    kl = t1.kl_to_anchor(anchor, rollouts, cfg).view(1, 4)
    advantages = t1.rloo_advantages(rewards - cfg.kl_coef * kl)[0]
    text = f"""# One step of T1, number by number

`python -m experiments.walkthrough` wrote this page: the embedded model after its cold start and
{steps} steps of RL, one prompt, K = 4. Each line of code is one of `t1.rl_step`.

1. `rollouts = sample_responses(engine, policy, chosen, step, cfg)`: four responses at temperature
   {cfg.temperature} to the prompt

```
{prompt}
{responses}
```

2. `rewards = judge(rollouts, policy.tokenizer, cfg).view(P, K)`: 1 right, 0 wrong, -1 pattern
   - patterns: {", ".join(str(r.pattern) for r in rollouts)}
   - rewards: {numbers(rewards[0], 0)}
3. `kl = kl_to_anchor(anchor, rollouts, cfg).view(P, K)`: d = log pi - log pi_ref, summed over the
   tokens of each response, in nats
   - d: {numbers(kl[0])}
4. `advantages = rloo_advantages(rewards - cfg.kl_coef * kl)`, with beta = {cfg.kl_coef}
   - A: {numbers(advantages)}
"""
    first = [repr(policy.tokenizer.decode([i])) for i in rollouts[0].ids[:8]]
    n = len(first)
    plain, chunked, logprob, entropy = losses(policy, rollouts, advantages, cfg)
    before = logprob_of(policy, rollouts, cfg)
    sums = t1.accumulate_gradient(policy, rollouts, advantages, cfg)
    lr = t1.learning_rate(steps, cfg.rl_steps, cfg.rl_lr, cfg.warmup, constant=True)
    norm = t1.update(policy, optimizer, lr, cfg)
    said = f"the gradient's norm is {norm:.4f}, the rate {lr:.6f}"
    after = logprob_of(policy, rollouts, cfg)
    decay = cfg.ema_decay
    t1.ema_update_(anchor, policy, decay)
    behind = before - logprob_of(anchor, rollouts, cfg)
    return f"""{text}\
5. `sums = accumulate_gradient(policy, rollouts, advantages.flatten(), cfg)`: the loss is
   -(1/N) sum [A log pi + alpha H] over N = {sums["tokens"]} tokens, with alpha = {cfg.entropy_coef}
   - tokens of response 1: {" ".join(first)}
   - their log pi: {numbers(logprob[:n])}
   - their H: {numbers(entropy[:n])}
   - mean H of all N tokens: {entropy.mean():.4f}
   - the loss by `policy_loss_reference`: {plain:.6f}
   - the loss by `policy_loss`, in chunks of 50: {chunked:.6f}
6. `norm = update(policy, optimizer, lr, cfg)`: {said}. The
   log pi of the responses; those that share tokens with a wrong one may fall with it
   - before: {numbers(before)}
   - after: {numbers(after)}
   - change: {numbers(after - before)}
7. `ema_update_(anchor, policy, cfg.ema_decay)`: anchor <- {decay} anchor + (1 - {decay}) policy
   - log pi before the update, minus log pi_ref after it: {numbers(behind)}
"""


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("walkthrough", __doc__)
    parser.add_argument("out", nargs="?", default="runs", help="folder of runs (default: runs)")
    PAGE.write_text(page(parser.parse_args(argv).out), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
