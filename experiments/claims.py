"""What the ledger asks of its runs, and what they answer: claims, statistics, tables, a picture.

A claim has two questions: does the part do what it is for (mostly one column of the run), and does
it pay (held-out pass@1)? Both are differences paired by seed, with a 95 % interval (Student's t)
and a p-value that is corrected for the number of questions (Holm)."""

import functools
import json
import math
import textwrap
from collections import namedtuple
from pathlib import Path

import mpmath
import numpy as np
from matplotlib.figure import Figure

import data_prep
import t1

LEVEL = 0.05  # of the intervals and, after Holm's correction, of the verdicts
PUBLISHED = Path(__file__).parent.parent / "figures" / "ledger.jsonl"

# --- What is run ----------------------------------------------------------------------------------
BRANCH = "--sft-steps 80 --sft-lr 5e-4 --max-new 640"  # of each seed; garbage has 487 tokens
VARIANTS = {  # name -> options of t1.py, in the order in which they are run
    "sft": BRANCH,
    "base": "",
    "alpha1e-2": "--entropy-coef 0.01",
    "beta5e-2": "--kl-coef 0.05",
    "beta5e-2-fixed": "--kl-coef 0.05 --ema-decay 1",
    "beta5e-2-uncentred": "--kl-coef 0.05",
    "k4": "--k 4",
    "t0.8": "--temperature 0.8",
    "sft-garbage": BRANCH,
    "garbage": "",
    "garbage-unpunished": "--penalties false",
    "alpha0": "--entropy-coef 0",
    "alpha1e-1": "--entropy-coef 0.1",
    "t1.3": "--temperature 1.3",
    "t1.3-minp": "--temperature 1.3 --min-p 0.05",
    "unpunished": "--penalties false",
    "beta0": "--kl-coef 0",
    "beta1e-2": "--kl-coef 0.01",
    "k4-samples": "--k 4 --prompts 32",
    "k64-samples": "--k 64 --prompts 2",
    "long": "--rl-steps 240",
    "long-t0.8": "--rl-steps 240 --temperature 0.8",
    "long-alpha0": "--rl-steps 240 --entropy-coef 0",
    "long-beta5e-2": "--rl-steps 240 --kl-coef 0.05",
    "long-beta5e-2-fixed": "--rl-steps 240 --kl-coef 0.05 --ema-decay 1",
}
TRACES = {"sft": "traces", "sft-garbage": "garbage"}  # these are SFT alone, on these traces
STARTS = {"garbage": "sft-garbage", "garbage-unpunished": "sft-garbage"}  # the others: sft
GONE = "beta5e-2-uncentred"  # its runs are published, its switch (--kl-center false) is gone

# --- What a run shows: one record -----------------------------------------------------------------
HELD_OUT = "pass_at_1 length overlong repetition".split()
STEPS = "reward accuracy entropy nll kl flat_groups".split()
ENDS = ("measures.json", "stopped.json")  # the last file of a run


def read_records(base: Path) -> list[dict]:
    """A record of each finished run under `base`, in the order of VARIANTS and seeds."""
    runs = [path.parent.name.rsplit("-seed") for path in base.glob("*/*") if path.name in ENDS]
    records = []
    for name in VARIANTS:
        for seed in sorted(int(seed) for variant, seed in runs if variant == name):
            records.append(record_of(base, name, seed))
    return records


def record_of(base: Path, name: str, seed: int) -> dict:
    """What one run showed, rounded to six digits: held-out means of its last checkpoint, means over
    tenths of its RL steps (`steps`), and its measures. A run that stopped has only the reason."""
    run = base / f"{name}-seed{seed}"
    record = dict(variant=name, seed=seed)
    if (run / "stopped.json").exists():
        return record | dict(stopped=data_prep.read_json(run / "stopped.json")["reason"])
    end = t1.results_of(run / "eval")[-1]
    rows = [row for row in t1.read_log(run / "eval/responses.jsonl") if row["key"] == end["key"]]
    record |= {column: end[column] for column in HELD_OUT}
    record["samples"] = [end["problems"], end["samples"]]
    record["pass_at_8"] = end["pass_at_k"][-1][1]
    record["corrected"] = float(np.mean([row["corrected"] for row in rows]))
    record["jump"] = data_prep.habit_shares(rows).get("jump", [0.0])[0]
    record["scaling"] = [point[:2] for point in end.get("scaling", [])]
    record["steps"] = {}
    if (run / "rl/metrics.jsonl").exists():
        steps = t1.read_log(run / "rl/metrics.jsonl")
        for column in STEPS:
            tenths = np.array_split(t1.column(steps, column), min(10, len(steps)))
            record["steps"][column] = [float(np.mean(part)) for part in tenths]
    record |= data_prep.read_json(run / "measures.json")
    return json.loads(json.dumps(record), parse_float=lambda number: float(f"{float(number):.6g}"))


# --- What is asked --------------------------------------------------------------------------------
def at_budget(record: dict, budget: int) -> float:
    """Accuracy of the thoughts cut at this budget."""
    return dict(record["scaling"])[budget]


def entropy_at(record: dict, accuracy: float) -> float:
    """Entropy where training first reaches this accuracy, between tenths of the run."""
    right = record["steps"]["accuracy"]
    entropy = record["steps"]["entropy"]
    i = next(i for i, value in enumerate(right) if value >= accuracy)
    around = slice(max(0, i - 1), i + 1)
    return float(np.interp(accuracy, right[around], entropy[around]))


def entropy_difference(a: dict, b: dict) -> float:
    """Entropy of a minus that of b, both where they first reach the weaker one's best accuracy."""
    level = min(max(a["steps"]["accuracy"]), max(b["steps"]["accuracy"]))
    return entropy_at(a, level) - entropy_at(b, level)


def mean_advantage(record: dict) -> float:
    """Leave-one-out rewards sum to zero, so do centred KLs; the rest is -beta times the mean KL."""
    if record["variant"] != GONE:
        return 0.0
    return -0.05 * float(np.mean(record["steps"]["kl"]))  # its beta


def log_slope(noise: dict[str, float]) -> float:
    """Slope of log variance against log K, by least squares."""
    sizes, variances = [int(k) for k in noise], list(noise.values())
    with np.errstate(divide="ignore"):
        return float(np.polyfit(np.log(sizes), np.log(variances), 1)[0])


# of: a record -> its value; if paired, two records -> their difference. Printed times `scale`.
Measure = namedtuple("Measure", "of scale digits paired", defaults=(1, 3, False))


def points(of) -> Measure:
    return Measure(of, scale=100, digits=1)


def last_tenth(record: dict, column: str) -> float:
    """Mean over the last tenth of the steps of RL; no number for SFT."""
    return record["steps"][column][-1] if record["steps"] else math.nan


def rise(record: dict) -> float:
    """Reward in the last fifth of the steps minus that in the first."""
    reward = record["steps"]["reward"]
    return np.mean(reward[-2:]) - np.mean(reward[:2])


MEASURES = {  # name, with the unit if it has one
    "pass@1, points": points(lambda r: r["pass_at_1"]),
    "pass@8, points": points(lambda r: r["pass_at_8"]),
    "pass@8 - pass@1, points": points(lambda r: r["pass_at_8"] - r["pass_at_1"]),
    "rise of reward": Measure(rise, 1, 2),
    "variance ~ K to the": Measure(lambda r: log_slope(r["noise"]), 1, 2),
    "spread 1.1 - 0.8, points": points(lambda r: r["spread"]["1.1"] - r["spread"]["0.8"]),
    "spread 1.3 - 1.1, points": points(lambda r: r["spread"]["1.3"] - r["spread"]["1.1"]),
    "spread, points": points(lambda r: r["spread"]["1.3, min-p 0.05"] - r["spread"]["1.3"]),
    "garbage, points": points(lambda r: r["overlong"] + r["repetition"]),
    "KL from SFT, nats": Measure(lambda r: r.get("distance", math.nan), 1, 2),  # a response
    "entropy, nats": Measure(entropy_difference, 1, 3, True),  # per token, at equal accuracy
    "last entropy": Measure(lambda r: last_tenth(r, "entropy")),  # no accuracy is common to both
    "flat groups, points": points(lambda r: last_tenth(r, "flat_groups")),
    "log-prob, nats": Measure(lambda r: -last_tenth(r, "nll")),  # of the samples, per token
    "mean advantage, 1/1000": Measure(mean_advantage, 1000, 1),
    "32 to 320 tokens, points": points(lambda r: at_budget(r, 320) - at_budget(r, 32)),
    "128 to 320 tokens, points": points(lambda r: at_budget(r, 320) - at_budget(r, 128)),
    "tokens": Measure(lambda r: r["length"], 1, 1),
    "corrected, points": points(lambda r: r["corrected"]),  # right after another candidate
    "jumps, points": points(lambda r: r["jump"]),
}


# `measure` of `variant` minus that of `against` (empty: minus zero), and the claimed sign; 0: none
Test = namedtuple("Test", "measure variant against sign")
# A row of the ledger. paper: which of the paper's nine claims it belongs to; does, pays: the Test,
# or None, of what the part is for and of what it brings
Claim = namedtuple("Claim", "paper text does pays")


def parse_test(text: str, measure: str = "pass@1, points") -> Test | None:
    """`k4 < base`: it is claimed that k4 is below base; `base >`: above zero; `a ~ b`: no claim."""
    if not text:
        return None
    variant, sign, against = [*text.split(), ""][:3]
    return Test(measure, variant, against, {"<": -1, "~": 0, ">": 1}[sign])


def parse_claim(line: str) -> Claim:
    """Paper's claim | here | measure: test | test of pass@1; a sign alone: of the same two runs."""
    paper, text, does, brings = (cell.strip() for cell in line.split("|"))
    measure, _, test = does.partition(": ")
    does = parse_test(test, measure)
    if brings in ("<", ">"):
        brings = f"{does.variant} {brings} {does.against}"
    return Claim(paper, text, does, parse_test(brings))


CLAIMS = """
RL lifts SFT      | RL over SFT             | rise of reward: base >                 | base > sft
K                 | K = 4, not 16           | variance ~ K to the: sft <             | k4 < base
K | K = 4, as many samples |  | k4-samples < base
K | K = 64, as many samples |  | k64-samples > base
temperature       | 0.8, not 1.1            | spread 1.1 - 0.8, points: sft >        | t0.8 < base
temperature       | 1.3, not 1.1            | spread 1.3 - 1.1, points: sft >        | t1.3 < base
temperature | 1.3 with min-p | spread, points: sft < | t1.3-minp ~ t1.3
temperature       | 0.8, not 1.1, trained   | pass@8 - pass@1, points: t0.8 < base   |
temperature       | 0.8, 240 steps          | flat groups, points: long-t0.8 > long  | <
penalties         | on, garbage start       | garbage, points: garbage < garbage-unpunished | >
penalties         | on, clean start         | garbage, points: base < unpunished     | >
moving anchor     | EMA, beta .05           | KL from SFT, nats: beta5e-2 > beta5e-2-fixed | >
moving anchor | EMA, 240 steps | KL from SFT, nats: long-beta5e-2 > long-beta5e-2-fixed | >
KL term           | beta 2e-4, not 0        | KL from SFT, nats: base < beta0        | >
KL term           | beta .01, not 2e-4      | KL from SFT, nats: beta1e-2 < base     | >
KL term           | beta .05, not 2e-4      | KL from SFT, nats: beta5e-2 < base     | >
centred KL        | uncentred, beta .05     | log-prob, nats: beta5e-2-uncentred < beta5e-2 | <
centred KL        | uncentred, sum          | mean advantage, 1/1000: beta5e-2-uncentred < |
entropy bonus     | alpha .001, not 0       | entropy, nats: base > alpha0           | >
entropy bonus     | alpha .01, not .001     | entropy, nats: alpha1e-2 > base        | >
entropy bonus     | alpha .1, not .001      | last entropy: alpha1e-1 > base         | >
entropy bonus     | alpha .001, 240 steps   | last entropy: long > long-alpha0       | >
inference scaling | RL over SFT             | 32 to 320 tokens, points: base > sft   |
inference scaling | RL, last budget         | 128 to 320 tokens, points: base >      |
longer            | RL over SFT             | tokens: base > sft                     |
self-correcting   | RL over SFT             | corrected, points: base > sft          |
"""
CLAIMS = [parse_claim(line) for line in CLAIMS.strip().splitlines()]
TESTS = list(dict.fromkeys(test for claim in CLAIMS for test in (claim.does, claim.pays) if test))


# --- Statistics -----------------------------------------------------------------------------------
def p_value(t: float, dof: int) -> float:
    """Two-sided: the chance that Student's t with `dof` degrees of freedom lies farther from zero
    than `t`, as an incomplete beta function (Abramowitz and Stegun 26.7.1)."""
    share = dof / (dof + t * t)
    return float(mpmath.betainc(dof / 2, 0.5, 0, share, regularized=True))


@functools.cache
def t_quantile(dof: int, level: float = LEVEL) -> float:
    """The t that p_value takes to `level`, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, dof) > level else (low, middle)
    return high


def holm(values: list[float]) -> list[float]:
    """p-values -> those of Holm's step-down procedure, in the same order: the i-th smallest (from
    0) of m is multiplied by m - i, and none is smaller than the one before."""
    adjusted, largest = [0.0] * len(values), 0.0
    for i, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - i) * values[at]))
        adjusted[at] = largest
    return adjusted


def statistics(differences: list[float]) -> dict:
    """n, mean, standard deviation, half-width of the 95 % interval and p-value."""
    n, mean = len(differences), float(np.mean(differences))
    sd = float(np.std(differences, ddof=1))
    error = sd / math.sqrt(n)
    p = p_value(mean / error, n - 1) if sd > 0 else float(mean == 0)
    return dict(n=n, mean=mean, sd=sd, half=t_quantile(n - 1) * error, p=p)


def seeds_for(sd: float, effect: float) -> int:
    """The fewest seeds whose interval, at this standard deviation, is no wider than +- `effect`."""
    enough = (n for n in range(2, 100) if t_quantile(n - 1) * sd / math.sqrt(n) <= effect)
    return next(enough, 100)


def verdict(mean: float, sign: int, p: float) -> str:
    """yes, no: is the sign as claimed? higher, lower: none is claimed. open: p is above LEVEL."""
    if p > LEVEL:
        return "open"
    if sign == 0:
        return "higher" if mean > 0 else "lower"
    return "yes" if mean * sign > 0 else "no"


def differences(records: list[dict], test: Test) -> list[float]:
    """One per seed whose two runs are there, did not stop and have a value; in order of seeds."""
    runs = {(r["variant"], r["seed"]): r for r in records if "stopped" not in r}
    measure, found = MEASURES[test.measure], []
    for seed in sorted({seed for _, seed in runs}):
        a, b = runs.get((test.variant, seed)), runs.get((test.against, seed))
        if a and b:
            found.append(measure.of(a, b) if measure.paired else measure.of(a) - measure.of(b))
        elif a and not test.against:
            found.append(measure.of(a))
    return [value for value in found if math.isfinite(value)]


def answers(records: list[dict]) -> dict[Test, dict]:
    """Test -> its `statistics` with Holm's p-value and `verdict`, where it has two seeds."""
    found = {test: differences(records, test) for test in TESTS}
    result = {test: statistics(values) for test, values in found.items() if len(values) > 1}
    corrected = holm([answer["p"] for answer in result.values()])
    for (test, answer), p in zip(result.items(), corrected):
        answer |= dict(holm=p, verdict=verdict(answer["mean"], test.sign, p))
    return result


# --- Tables and picture ---------------------------------------------------------------------------
HOW_TO_READ = """
Mean difference over n seeds, paired by seed, with its 95 % interval (Student's t). A verdict (has
it the claimed sign?) is given where p, corrected by Holm's procedure, is at most 0.05; else open.
"""


def write_ledger(base: Path):
    """ledger.jsonl, .md and .png, from the finished runs under `base`, or the published ones."""
    records = read_records(base) or t1.read_log(PUBLISHED)
    if not records:
        raise t1.Misuse(f"{base}: no finished run there; give --out and --name of a ledger")
    base.mkdir(parents=True, exist_ok=True)
    data_prep.write(base / "ledger.jsonl", map(data_prep.json_line, records))
    found = answers(records)
    about = f"{len(records)} runs, {len(found)} questions with two seeds or more."
    parts = [about + "\n", claim_table(found), seeds_needed(found), variant_table(records)]
    data_prep.write(base / "ledger.md", ["\n".join(parts), HOW_TO_READ])
    draw(base / "ledger.png", found, about)


def table_of(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def in_words(test: Test | None, found: dict[Test, dict]) -> list[str]:
    """Two cells: the difference with its interval and seeds; the verdict with its p-value."""
    if not test or test not in found:
        return ["", "no two seeds" if test else ""]
    measure, answer = MEASURES[test.measure], found[test]
    mean, half = (f"{measure.scale * answer[x]:.{measure.digits}f}" for x in ("mean", "half"))
    name = "" if test.measure == "pass@1, points" else test.measure + " "
    said = "open" if answer["verdict"] == "open" else f"**{answer['verdict']}**"
    p = f"{answer['holm']:.2g}" if answer["holm"] >= 0.01 else f"{answer['holm']:.1g}"
    return [f"{name}{mean} ± {half} ({answer['n']})", f"{said} {p}"]


def claim_table(found: dict[Test, dict]) -> str:
    """One row per claim with its two verdicts."""
    rows = [[c.paper, c.text, *in_words(c.does, found), *in_words(c.pays, found)] for c in CLAIMS]
    head = ["claim", "here", "does it do what it is for?", "", "does it pay? points", ""]
    return table_of(head, rows)


def seeds_needed(found: dict[Test, dict]) -> str:
    """Of each open question of pass@1, how many seeds would make its interval +- 2 points."""
    said = []
    for test, answer in found.items():
        if test.measure.startswith("pass@1") and answer["verdict"] == "open":
            said.append(f"{test.variant} - {test.against} {seeds_for(answer['sd'], 0.02)}")
    if not said:
        return ""
    return textwrap.fill(f"Seeds for an interval of ± 2 points: {', '.join(said)}.", 118) + "\n"


COLUMNS = {  # of the table of runs -> a measure; pass@1 first, `variant_table` adds its sd
    "pass@1 (sd)": "pass@1, points",
    "pass@8": "pass@8, points",
    "tokens": "tokens",
    "jump %": "jumps, points",
    "corrected %": "corrected, points",
    "garbage %": "garbage, points",
    "entropy": "last entropy",
    "flat %": "flat groups, points",
    "from SFT": "KL from SFT, nats",
}


def variant_table(records: list[dict]) -> str:
    """Means over seeds and the sd of pass@1; `stopped` counts the runs that could not continue."""
    rows = []
    for name in dict.fromkeys(r["variant"] for r in records):
        runs = [r for r in records if r["variant"] == name]
        done = [r for r in runs if "stopped" not in r]
        row = [name, f"{len(runs) - len(done)}/{len(runs)}"]
        for measure in map(MEASURES.get, COLUMNS.values()):
            mean = np.mean([measure.scale * measure.of(r) for r in done]) if done else math.nan
            row.append("" if math.isnan(mean) else f"{mean:.{measure.digits}f}")
        if len(done) > 1:
            row[2] += f" ± {100 * np.std([r['pass_at_1'] for r in done], ddof=1):.1f}"
        rows.append(row)
    return table_of(["run", "stopped", *COLUMNS], rows)


def draw(path: Path, found: dict[Test, dict], about: str):
    """Two panels, a row per claim that has an answer. Left: the mechanism's difference in
    half-widths of its interval, the claimed direction to the right: beyond 1 the interval excludes
    zero. Right: pass@1 in points with its interval."""
    asked = [claim for claim in reversed(CLAIMS) if claim.does in found or claim.pays in found]
    figure = Figure(figsize=(11, 0.32 * len(asked) + 1.8))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = dict(yes="tab:green", no="tab:red", higher="tab:blue", lower="tab:blue", open="0.6")
    for y, claim in enumerate(asked):
        does, pays = found.get(claim.does), found.get(claim.pays)
        if does:
            sign = claim.does.sign or 1
            size = sign * does["mean"] / (does["half"] or math.inf)
            left.plot(size, y, "D", color=colours[does["verdict"]])
        if pays:
            mean, half = 100 * pays["mean"], 100 * pays["half"]
            right.errorbar(mean, y, xerr=half, fmt="D", color=colours[pays["verdict"]], capsize=3)
    left.set_xscale("symlog", linthresh=2)
    left.set_xticks([-10, -2, -1, 0, 1, 2, 5, 10, 20], "-10 -2 -1 0 1 2 5 10 20".split())
    left.axvspan(-1, 1, color="0.9")
    for axis in (left, right):
        axis.axvline(0, color="black", lw=0.8)
    left.set_yticks(range(len(asked)), [f"{c.paper}: {c.text}" for c in asked], fontsize=8)
    does = "does it do what it is for?\ndifference / half-width of its interval"
    left.set_xlabel(does, fontsize=8)
    right.set_xlabel("does it pay?\npoints of held-out pass@1, 95 % interval", fontsize=8)
    for name, label in dict(yes="yes", no="no", higher="no sign claimed", open="open").items():
        right.plot([], [], "D", color=colours[name], label=label)
    figure.legend(fontsize=8, ncols=4, loc="upper right")
    t1.save_figure(figure, path, about)
