"""The ledger: does each part of T1 do what it is for, and does it pay? One run varied.

    python -m experiments.ledger            every variant, of three seeds
    python -m experiments.ledger --variants k4,t0.8 --seeds 3,4     these runs alone
    python -m experiments.ledger --table    run nothing: the tables of finished runs, or where there
                                            are none of figures/ledger.jsonl

The ground is `data_prep.py embedded --hard`. Each seed branches off one policy with some more steps
of SFT; all its runs begin there, so differences are paired by seed. Each run is an ordinary folder
OUT/NAME/VARIANT-seedS (OUT: runs, NAME: ledger); after a kill the same command resumes. Options of
t1.py hold for every run, such as --prompts 16, but where its variant sets the same field."""

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import torch

import data_prep
import experiments
import t1
from experiments.claims import ENDS, GONE, STARTS, TRACES, VARIANTS, write_ledger

SETTING = "--max-new 320 --prompts 8 --k 16 --rl-steps 40 --rl-save-every 40 --eval-samples 8"
BUDGETS = "32,64,128,320"  # thinking budgets of inference scaling, tokens
# Gradient estimates at one checkpoint, for each K, of so many prompts
DRAWS = 8
DRAWN_K = (4, 16, 64)
DRAWN_P = 4
SPREAD_P = 64  # pass@8 - pass@1 of so many problems, at a temperature and min-p
SPREAD = {"0.8": (0.8, 0.0), "1.1": (1.1, 0.0), "1.3": (1.3, 0.0), "1.3, min-p 0.05": (1.3, 0.05)}


def garbage_traces() -> list[dict]:
    """The hard traces, of which every tenth loops (one failed try, again and again) or guesses on
    without an end; both go on for longer than RL's limit, and neither answers."""
    rows, rng = data_prep.embedded_traces(ground=data_prep.HARD), random.Random(0)
    for i in range(0, len(rows), 10):
        m = rng.randrange(4, 10)
        tries = [rng.randrange(10, 190)] * 60 if i % 20 else rng.sample(range(10, 190), 60)
        lines = [f"{n} mod {m} = {n % m} not {(n + 1) % m}, wait" for n in tries]
        rows[i] = rows[i] | dict(response="<think>\n" + "\n".join(lines), source="garbage")
    return rows


def run_variant(base: Path, name: str, seed: int, options: list[str]):
    """Run one variant of one seed, and before it what it starts from, unless finished. A run that
    cannot continue (a loss that is not finite, say) is a result: stopped.json says why."""
    run = base / f"{name}-seed{seed}"
    if name == GONE or any((run / end).exists() for end in ENDS):
        return
    if name not in TRACES:
        run_variant(base, STARTS.get(name, "sft"), seed, options)
    t1.print0(f"{run.name}: {VARIANTS[name] or 'nothing changed'}")
    try:
        run_stages(base, name, seed, options)
    except t1.Misuse:
        raise
    except t1.Stop as e:
        t1.print0(f"{run.name} stopped: {e}")
        run.mkdir(parents=True, exist_ok=True)
        t1.write_json(run / "stopped.json", dict(reason=str(e)))


def run_stages(base: Path, name: str, seed: int, options: list[str]):
    """SFT or RL, evaluation and measures of one run."""
    data = base / "data"
    garbage = data / "garbage.jsonl"
    if not garbage.exists():  # the last of the four files that the runs read
        data_prep.main(["embedded", "--hard", "--out", str(data)])
        data_prep.write(garbage, map(data_prep.json_line, garbage_traces()))
    run = base / f"{name}-seed{seed}"
    fixed = dict(out=base, name=run.name, seed=seed, keep=1, test=data / "test.jsonl")
    if name in TRACES:
        stage = "sft"
        run_stage(stage, fixed | dict(name="root", seed=0, data=data / "traces.jsonl"), options)
        start = base / "root/sft"
    else:
        stage = "rl"
        start = base / f"{STARTS.get(name, 'sft')}-seed{seed}/sft"
    of_run = dict(model=start, data=data / f"{TRACES.get(name, 'train')}.jsonl")
    run_stage(stage, fixed | of_run, [*options, *VARIANTS[name].split()])
    last = t1.latest(str(run / stage))
    budgets = BUDGETS if name in ("sft", "base") else ""
    run_stage("eval", fixed | dict(checkpoint=last, budgets=budgets), options)
    cfg = stage_config("rl", fixed | dict(data=data / "train.jsonl"), options)
    measures = dict(distance=distance(run, start, cfg)) if stage == "rl" else {}
    if name == "sft":
        measures = measures_of_start(last, cfg)
    for path in t1.checkpoints(run / stage):
        t1.drop_trainer_state(path)  # nothing will resume from it
    t1.write_json(run / "measures.json", measures)


def run_stage(stage: str, fixed: dict, options: list[str]):
    """One stage of t1.py. SFT that reached its end, perhaps for another seed, is not run again."""
    cfg = stage_config(stage, fixed, options)
    samples = t1.read_log(Path(cfg.out) / cfg.name / stage / "samples.jsonl")
    ended = any(row.get("kind") == "held-out" for row in samples)
    if stage != "sft" or not ended:
        t1.STAGES[stage](cfg)


def stage_config(stage: str, fixed: dict, options: list[str]) -> t1.Config:
    """SETTING, t1.py's `options`, then the fields in `fixed`."""
    last = [f"--{name}={value}" for name, value in fixed.items()]
    return t1.parse_args(experiments.stage_options(stage, [*SETTING.split(), *options, *last]))


def measures_of_start(checkpoint: str, cfg: t1.Config) -> dict:
    """What sampling does at one checkpoint, before any RL. noise: K -> `gradient_variance`. spread:
    temperature (and min-p) -> pass@8 - pass@1 over SPREAD_P training problems."""
    policy, tokenizer = t1.load_policy(checkpoint, cfg)
    engine = t1.make_engine(checkpoint, policy, tokenizer, cfg)
    rows = data_prep.read_rows(cfg.data, "rl")[:SPREAD_P]
    problems = t1.encode_prompts(rows, tokenizer, cfg)
    noise = {}
    for K in DRAWN_K:
        other = dataclasses.replace(cfg, k=K)
        noise[str(K)] = gradient_variance(policy, engine, problems[:DRAWN_P], other)
    spread = {}
    for name, (temperature, min_p) in SPREAD.items():
        other = dataclasses.replace(cfg, k=8, temperature=temperature, min_p=min_p)
        rollouts = t1.sample_responses(engine, policy, problems, 0, other)
        t1.judge(rollouts, tokenizer, other)
        right = np.reshape([r.right for r in rollouts], (-1, 8))
        spread[name] = float(np.mean(right.any(1) - right.mean(1)))
    return dict(noise=noise, spread=spread)


def gradient_variance(policy, engine, problems: list, cfg: t1.Config) -> float:
    """Variance of the estimated gradient of the expected reward, summed over the weights: DRAWS
    estimates from the same prompts with K samples each, which differ in their samples alone."""
    plain = dict(entropy_coef=0.0, min_p=0.0, tis_cap=0.0, loss_norm="tokens")
    cfg = dataclasses.replace(cfg, **plain)
    gradients = []
    for draw in range(DRAWS):
        rollouts = t1.sample_responses(engine, policy, problems, draw, cfg)
        rewards = t1.judge(rollouts, policy.tokenizer, cfg).view(-1, cfg.k)
        t1.accumulate_gradient(policy, rollouts, t1.rloo_advantages(rewards).flatten(), cfg)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]).double())
        policy.zero_grad()
    return torch.stack(gradients).var(dim=0).sum().item()


def distance(run: Path, start: Path, cfg: t1.Config) -> float:
    """KL of the trained policy to the SFT policy of `start`, nats per response: the mean of
    log pi(y) - log pi_sft(y) over each problem's first held-out response, at temperature 1."""
    responses = t1.read_log(run / "eval/responses.jsonl")
    means = []
    for folder in (run / "rl", start):
        policy, tokenizer = t1.load_policy(t1.latest(str(folder)), cfg)
        rows = []
        for row in responses:
            if row["sample"] == 0:
                rows.append((t1.prompt_ids(row, tokenizer, cfg), row["ids"]))
        logprobs = t1.response_logprobs(policy, rows, cfg)
        means.append(np.mean([part.double().sum().item() for part in logprobs]))
    return float(means[0] - means[1])


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("ledger", __doc__)
    numbers = experiments.whole_numbers
    add = parser.add_argument
    add("--variants", default=",".join(VARIANTS), help="run these (default: all)")
    add("--seeds", type=numbers, default=[0, 1, 2], help="of each (default: 0,1,2)")
    add("--table", action="store_true", help="run nothing, write the tables (default: off)")
    own, options = parser.parse_known_args(argv)
    cfg = t1.parse_args(experiments.stage_options("rl", options))
    base = Path(cfg.out) / (cfg.name or "ledger")
    names = own.variants.split(",")
    if not set(names) <= set(VARIANTS):
        raise t1.Misuse(f"--variants {own.variants}: choose from {', '.join(VARIANTS)}")
    try:
        for seed, name in [] if own.table else itertools.product(own.seeds, names):
            run_variant(base, name, seed, options)
    except t1.Interrupted:
        t1.print0("interrupted; the same command resumes")
        return
    write_ledger(base)
    t1.print0((base / "ledger.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
