"""What the ledger asks of its runs, and what they answer: records -> claims, statistics, tables and a picture.

A claim has two questions: does the part do what it is for (mostly one column of the run), and does it pay (held-out
pass@1)? Both are differences paired by seed, with a 95 % interval (Student's t) and a p-value that is corrected for the
number of questions (Holm)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import data_prep
import t1

LEVEL = 0.05  # of the intervals and, after Holm's correction, of the verdicts
PUBLISHED = Path(__file__).parent.parent / "figures" / "ledger.jsonl"

# --- What is run ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Variant:
    """A run: RL from the SFT variant `start` of its seed, with changes in t1.Config; with `traces` it is SFT alone."""

    changes: dict = field(default_factory=dict)
    start: str = "sft"
    traces: str = ""

STRONG = dict(kl_coef=5e-2)
GARBAGE = dict(start="sft-garbage")
VARIANTS = {  # in the order in which they are run
    "sft": Variant(traces="traces"),
    "base": Variant(),
    "alpha1e-2": Variant(dict(entropy_coef=1e-2)),
    "beta5e-2": Variant(STRONG),
    "beta5e-2-fixed": Variant(STRONG | dict(anchor="fixed")),
    "beta5e-2-uncentred": Variant(STRONG | dict(kl_center=False)),
    "k4": Variant(dict(k=4)),
    "t0.8": Variant(dict(temperature=0.8)),
    "sft-garbage": Variant(traces="garbage"),
    "garbage": Variant(**GARBAGE),
    "garbage-unpunished": Variant(dict(penalties=False), **GARBAGE),
    "alpha0": Variant(dict(entropy_coef=0.0)),
    "alpha1e-1": Variant(dict(entropy_coef=1e-1)),
    "t1.3": Variant(dict(temperature=1.3)),
    "t1.3-minp": Variant(dict(temperature=1.3, min_p=0.05)),
    "unpunished": Variant(dict(penalties=False)),
    "beta0": Variant(dict(kl_coef=0.0)),
    "beta1e-2": Variant(dict(kl_coef=1e-2)),
    "k4-samples": Variant(dict(k=4, prompts=64)),
    "k64-samples": Variant(dict(k=64, prompts=4)),
}

# --- What a run shows: one record -------------------------------------------------------------------------------------

HELD_OUT = "pass_at_1 length overlong repetition garbled honest reflections".split()
STEPS = "reward accuracy length entropy nll kl flat_groups".split()

def read_records(base: Path) -> list[dict]:
    """A record of each finished run under `base`, in the order of VARIANTS and seeds."""
    done = {path.parent.name for name in ("measures.json", "stopped.json") for path in base.glob(f"*/{name}")}
    pairs = [run.rsplit("-seed", 1) for run in done]
    pairs = sorted((list(VARIANTS).index(name), int(seed), name) for name, seed in pairs if name in VARIANTS)
    return [record_of(base, name, seed) for _, seed, name in pairs]

def record_of(base: Path, name: str, seed: int) -> dict:
    """What one run showed, rounded to six digits: held-out means of its last checkpoint, means over tenths of its RL
    steps (`steps`), and its measures. A run that stopped has nothing but the reason."""
    run = base / f"{name}-seed{seed}"
    record = dict(variant=name, seed=seed)
    if (run / "stopped.json").exists():
        return record | dict(stopped=data_prep.read_json(run / "stopped.json")["reason"])
    end = data_prep.read_json(run / "eval/results.json")["checkpoints"][-1]
    rows = [row for row in t1.read_log(run / "eval/responses.jsonl") if row["key"] == end["key"]]
    record |= {column: end[column] for column in HELD_OUT}
    record["samples"], record["pass_at_8"] = [end["problems"], end["samples"]], end["pass_at_k"][-1][1]
    answers = {}
    for row in rows:
        answers.setdefault(row["number"], set()).add(row["answer"])
    record["distinct"] = float(np.mean([len(found) for found in answers.values()]))
    record["corrected"] = float(np.mean([row["corrected"] for row in rows]))
    record["jump"] = data_prep.habit_shares(rows).get("jump", [0.0])[0]
    record["scaling"] = [point[:2] for point in end.get("scaling", [])]
    record["steps"] = {}
    if (run / "rl/metrics.jsonl").exists():
        steps = t1.read_log(run / "rl/metrics.jsonl")
        tenths = np.array_split(steps, min(10, len(steps)))
        record["steps"] = {column: [column_mean(part, column) for part in tenths] for column in STEPS}
    return rounded(record | data_prep.read_json(run / "measures.json"))

def column_mean(rows: list[dict], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))

def rounded(value):
    """Every float in it to six significant digits, so that a table made from the file equals one made from folders."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

# --- What is asked ----------------------------------------------------------------------------------------------------

def at_budget(record: dict, budget: int) -> float:
    """Accuracy of the thoughts cut at this budget."""
    return dict(map(tuple, record["scaling"]))[budget]

def entropy_at(record: dict, accuracy: float) -> float:
    """Entropy where training first reaches this accuracy, between tenths of the run by a straight line."""
    right, entropy = record["steps"]["accuracy"], record["steps"]["entropy"]
    i = next(i for i, value in enumerate(right) if value >= accuracy)
    if i == 0:
        return entropy[0]
    share = (accuracy - right[i - 1]) / (right[i] - right[i - 1])
    return entropy[i - 1] + share * (entropy[i] - entropy[i - 1])

def entropy_difference(a: dict, b: dict) -> float:
    """Entropy of a minus that of b, both where they first reach the best accuracy of the weaker one."""
    level = min(max(a["steps"]["accuracy"]), max(b["steps"]["accuracy"]))
    return entropy_at(a, level) - entropy_at(b, level)

def mean_advantage(record: dict) -> float:
    """Leave-one-out rewards sum to zero, so do centred KLs; what is left of the sum is -beta times the mean KL."""
    changes = VARIANTS[record["variant"]].changes
    return 0.0 if changes.get("kl_center", True) else -changes["kl_coef"] * float(np.mean(record["steps"]["kl"]))

def log_slope(noise: dict[str, float]) -> float:
    """Slope of log variance against log K, by least squares."""
    with np.errstate(divide="ignore"):
        return float(np.polyfit(np.log([int(k) for k in noise]), np.log(list(noise.values())), 1)[0])

@dataclass(frozen=True)
class Measure:
    """of: a record -> its value; or two records -> their difference. Values are printed times `scale`, with `unit`."""

    of: Callable
    scale: float = 1
    unit: str = ""
    paired: bool = False

MEASURES = {
    "pass@1": Measure(lambda r: r["pass_at_1"], 100, "points"),
    "pass@8 - pass@1": Measure(lambda r: r["pass_at_8"] - r["pass_at_1"], 100, "points"),
    "spread at T = 1.1 over 0.8": Measure(lambda r: r["spread"]["1.1"] - r["spread"]["0.8"], 100, "points"),
    "spread at T = 1.3 over 1.1": Measure(lambda r: r["spread"]["1.3"] - r["spread"]["1.1"], 100, "points"),
    "spread at T = 1.3 with min-p over none": Measure(
        lambda r: r["spread"]["1.3, min-p 0.05"] - r["spread"]["1.3"], 100, "points"
    ),
    "reward in training, last tenth - first": Measure(lambda r: r["steps"]["reward"][-1] - r["steps"]["reward"][0]),
    "over-long or repetitive": Measure(lambda r: r["overlong"] + r["repetition"], 100, "points"),
    "KL to the SFT policy": Measure(lambda r: r["distance"], 1, "nats a response"),
    "entropy at equal accuracy": Measure(entropy_difference, 1, "nats", True),
    "entropy, last tenth": Measure(lambda r: r["steps"]["entropy"][-1], 1, "nats"),
    "log-prob of samples, last tenth": Measure(lambda r: -r["steps"]["nll"][-1], 1, "nats a token"),
    "mean advantage": Measure(mean_advantage, 1000, "thousandths"),
    "log gradient variance by log K": Measure(lambda r: log_slope(r["noise"])),
    "gain from 32 to 320 tokens": Measure(lambda r: at_budget(r, 320) - at_budget(r, 32), 100, "points"),
    "gain from 128 to 320 tokens": Measure(lambda r: at_budget(r, 320) - at_budget(r, 128), 100, "points"),
    "length": Measure(lambda r: r["length"], 1, "tokens"),
    "right after another try": Measure(lambda r: r["corrected"], 100, "points"),
}

@dataclass(frozen=True)
class Test:
    """`measure` of `variant` minus that of `against` (empty: minus zero), and the claimed sign; 0: none is claimed."""

    measure: str
    variant: str
    against: str
    sign: int

def pays(variant: str, against: str, sign: int = 1) -> Test:
    return Test("pass@1", variant, against, sign)

@dataclass(frozen=True)
class Claim:
    """A row of the ledger. does: what the part is for; pays: what it brings."""

    paper: str  # which of the paper's nine claims it belongs to
    text: str
    does: Test | None
    pays: Test | None

SLOPE = "log gradient variance by log K"
GARBLED, FROM_SFT, ENTROPY = "over-long or repetitive", "KL to the SFT policy", "entropy at equal accuracy"
STRONG_KL, LOOSE = "beta5e-2", "beta5e-2-uncentred"
CLAIMS = [
    Claim("RL lifts SFT", "RL earns reward in training, and more right answers held out",
          Test("reward in training, last tenth - first", "base", "", 1), pays("base", "sft")),
    Claim("K", "more samples, less noise (-1 is 1/K); K = 4 is worse, equal prompts",
          Test(SLOPE, "sft", "", -1), pays("k4", "base", -1)),
    Claim("K", "K = 4 is worse, equal samples (64 prompts)", None, pays("k4-samples", "base", -1)),
    Claim("K", "K = 64 is better, equal samples (4 prompts)", None, pays("k64-samples", "base")),
    Claim("temperature", "T = 0.8, not 1.1: samples spread less; worse",
          Test("spread at T = 1.1 over 0.8", "sft", "", 1), pays("t0.8", "base", -1)),
    Claim("temperature", "T = 1.3, not 1.1: samples spread more; worse",
          Test("spread at T = 1.3 over 1.1", "sft", "", 1), pays("t1.3", "base", -1)),
    Claim("temperature", "min-p 0.05 at T = 1.3: samples spread less; nothing stated",
          Test("spread at T = 1.3 with min-p over none", "sft", "", -1), pays("t1.3-minp", "t1.3", 0)),
    Claim("temperature", "T = 0.8, not 1.1: the trained policy spreads less",
          Test("pass@8 - pass@1", "t0.8", "base", -1), None),
    Claim("penalties", "after a cold start with garbage: less of it; better",
          Test(GARBLED, "garbage", "garbage-unpunished", -1), pays("garbage", "garbage-unpunished")),
    Claim("penalties", "after a clean one: less of it; better",
          Test(GARBLED, "base", "unpunished", -1), pays("base", "unpunished")),
    Claim("moving anchor", "beta 0.05, EMA, not fixed: farther from SFT; better",
          Test(FROM_SFT, STRONG_KL, "beta5e-2-fixed", 1), pays(STRONG_KL, "beta5e-2-fixed")),
    Claim("KL term", "beta 2e-4, not 0: nearer to SFT; better",
          Test(FROM_SFT, "base", "beta0", -1), pays("base", "beta0")),
    Claim("KL term", "beta 1e-2, not 2e-4", Test(FROM_SFT, "beta1e-2", "base", -1), pays("beta1e-2", "base")),
    Claim("KL term", "beta 5e-2, not 2e-4", Test(FROM_SFT, STRONG_KL, "base", -1), pays(STRONG_KL, "base")),
    Claim("centred KL", "beta 0.05, uncentred: samples are pushed down; worse",
          Test("log-prob of samples, last tenth", LOOSE, STRONG_KL, -1), pays(LOOSE, STRONG_KL, -1)),
    Claim("centred KL", "beta 0.05, uncentred: the advantages sum to less than zero",
          Test("mean advantage", LOOSE, "", -1), None),
    Claim("entropy bonus", "alpha 1e-3, not 0: more entropy; better",
          Test(ENTROPY, "base", "alpha0", 1), pays("base", "alpha0")),
    Claim("entropy bonus", "alpha 1e-2, not 1e-3", Test(ENTROPY, "alpha1e-2", "base", 1), pays("alpha1e-2", "base")),
    Claim("entropy bonus", "alpha 1e-1, not 1e-3", Test(ENTROPY, "alpha1e-1", "base", 1), pays("alpha1e-1", "base")),
    Claim("inference scaling", "RL gains more from 32 -> 320 tokens than SFT; from 128 -> 320 it still gains",
          Test("gain from 32 to 320 tokens", "base", "sft", 1), Test("gain from 128 to 320 tokens", "base", "", 1)),
    Claim("longer, self-correcting", "RL's responses are longer", Test("length", "base", "sft", 1), None),
    Claim("longer, self-correcting", "RL's are right after another try more often",
          Test("right after another try", "base", "sft", 1), None),
]  # fmt: skip
TESTS = list(dict.fromkeys(test for claim in CLAIMS for test in (claim.does, claim.pays) if test))

# --- Statistics -------------------------------------------------------------------------------------------------------

def p_value(t: float, dof: int) -> float:
    """Two-sided: the chance that Student's t with `dof` degrees of freedom lies farther from zero than `t`. The finite
    series in the angle atan(t / sqrt(dof)) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(dof))
    term, total = (math.cos(angle), 0.0) if dof % 2 else (1.0, 0.0)
    for i in range(2 + dof % 2, dof + 1, 2):  # terms of the series: cos, 2/3 cos^3, ... or 1, 1/2 cos^2, ...
        total += term
        term *= math.cos(angle) ** 2 * (i - 1) / i
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if dof % 2 else math.sin(angle) * total
    return max(0.0, 1 - inside)

def t_quantile(dof: int, level: float = LEVEL) -> float:
    """The t that p_value takes to `level`, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, dof) > level else (low, middle)
    return high

def holm(values: list[float]) -> list[float]:
    """p-values -> those of Holm's step-down procedure, in the same order: the i-th smallest (from 0) of m is multiplied
    by m - i, and none is smaller than the one before."""
    order, adjusted, largest = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values), 0.0
    for i, at in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - i) * values[at]))
        adjusted[at] = largest
    return adjusted

def statistics(differences: list[float]) -> dict:
    """n, mean, standard deviation, half-width of the 95 % interval and p-value of paired differences."""
    n, mean, sd = len(differences), float(np.mean(differences)), float(np.std(differences, ddof=1))
    if sd == 0:
        return dict(n=n, mean=mean, sd=0.0, half=0.0, p=float(mean == 0))
    error = sd / math.sqrt(n)
    return dict(n=n, mean=mean, sd=sd, half=t_quantile(n - 1) * error, p=p_value(mean / error, n - 1))

def seeds_for(sd: float, effect: float) -> int:
    """The fewest seeds whose interval, at this standard deviation of the differences, is no wider than +- `effect`."""
    return next((n for n in range(2, 100) if t_quantile(n - 1) * sd / math.sqrt(n) <= effect), 100)

def verdict(mean: float, sign: int, p: float) -> str:
    """yes or no: does the difference have the claimed sign? "higher" or "lower" where none is claimed; "open" if p is
    above LEVEL."""
    if p > LEVEL:
        return "open"
    return ("higher" if mean > 0 else "lower") if sign == 0 else "yes" if mean * sign > 0 else "no"

def differences(records: list[dict], test: Test) -> list[float]:
    """One per seed in which both runs are there and neither stopped, in order of seeds; without those of no value."""
    runs, measure = {(r["variant"], r["seed"]): r for r in records if "stopped" not in r}, MEASURES[test.measure]
    found = []
    for seed in sorted({seed for _, seed in runs}):
        a, b = runs.get((test.variant, seed)), runs.get((test.against, seed))
        if a and b:
            found.append(measure.of(a, b) if measure.paired else measure.of(a) - measure.of(b))
        elif a and not test.against:
            found.append(measure.of(a))
    return [value for value in found if math.isfinite(value)]

def answers(records: list[dict]) -> dict[Test, dict]:
    """Test -> its `statistics` with Holm's p-value (`holm`) and `verdict`, of all tests that have two seeds or more."""
    found = {test: differences(records, test) for test in TESTS}
    result = {test: statistics(values) for test, values in found.items() if len(values) > 1}
    for (test, answer), p in zip(result.items(), holm([answer["p"] for answer in result.values()])):
        answer |= dict(holm=p, verdict=verdict(answer["mean"], test.sign, p))
    return result

def open_variants(records: list[dict]) -> list[str]:
    """Variants of which some question is open: unanswered by Holm's procedure, or with fewer than two seeds."""
    found, wanted = answers(records), set()
    for test in TESTS:
        if test not in found or found[test]["verdict"] == "open":
            wanted |= {test.variant, test.against}
    return [name for name in VARIANTS if name in wanted]

# --- Tables and picture -----------------------------------------------------------------------------------------------

HOW_TO_READ = """
Mean difference over n seeds, paired by seed, with its 95 % interval (Student's t). A verdict is `yes` or `no` where the
p-value, corrected for the number of questions by Holm's procedure, is at most 0.05; else it is open, and effects
outside the interval are excluded, each at 95 %.
"""

def write_ledger(base: Path):
    """ledger.jsonl, ledger.md and ledger.png, from the finished runs under `base`, or from the published ones."""
    records = read_records(base)
    if records:
        data_prep.write(base / "ledger.jsonl", map(data_prep.json_line, records))
    elif PUBLISHED.exists():
        records = t1.read_log(PUBLISHED)
        base.mkdir(parents=True, exist_ok=True)
    else:
        raise t1.Misuse(f"{base}: no finished run there; give --out and --name of a ledger")
    found = answers(records)
    about = f"{len(records)} runs, {len(found)} questions with two seeds or more."
    parts = [about + "\n", claim_table(found), variant_table(records)]
    data_prep.write(base / "ledger.md", ["\n".join(parts), HOW_TO_READ])
    draw(base / "ledger.png", found, about)

def table_of(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)

def in_words(test: Test | None, answer: dict | None) -> list[str]:
    """[difference with its interval and n, verdict] of one test."""
    if not test:
        return ["", ""]
    measure = MEASURES[test.measure]
    if not answer:
        return [test.measure, "not run"]
    mean, half = measure.scale * answer["mean"], measure.scale * answer["half"]
    digits = 1 if measure.unit == "points" else 3
    value = f"{test.measure}: {mean:+.{digits}f} ± {half:.{digits}f} {measure.unit}".rstrip()
    return [f"{value} (n = {answer['n']})", f"**{answer['verdict']}**" if answer["verdict"] != "open" else "open"]

def claim_table(found: dict[Test, dict]) -> str:
    """One row per claim with its two verdicts."""
    rows = []
    for claim in CLAIMS:
        does, pays = (in_words(test, found.get(test)) for test in (claim.does, claim.pays))
        rows.append([claim.paper, claim.text, *does, *pays])
    return table_of(["the paper's", "claim", "does it do what it is for?", "", "does it pay?", ""], rows)

def variant_table(records: list[dict]) -> str:
    """Means over seeds and standard deviations of pass@1; the last column counts the runs that stopped."""
    rows = []
    for name, variant in VARIANTS.items():
        runs = [r for r in records if r["variant"] == name]
        done = [r for r in runs if "stopped" not in r]
        if not runs:
            continue
        changed = [f"{field}={'off' if value is False else value}" for field, value in variant.changes.items()]
        row = [name, " ".join(changed), f"{len(runs) - len(done)}/{len(runs)}"]
        columns = dict(pass_at_1=(100, 1), pass_at_8=(100, 1), length=(1, 0), jump=(100, 0), corrected=(100, 0))
        for column, (scale, digits) in columns.items():
            values = [scale * r[column] for r in done]
            error = f" ± {np.std(values, ddof=1):.{digits}f}" if column == "pass_at_1" and len(values) > 1 else ""
            row.append(f"{np.mean(values):.{digits}f}{error}" if done else "")
        row.append(f"{100 * np.mean([r['overlong'] + r['repetition'] for r in done]):.1f}" if done else "")
        row.append(f"{np.mean([r['steps']['entropy'][-1] for r in done]):.3f}" if done and done[0]["steps"] else "")
        rows.append(row)
    columns = "run,changed,stopped,pass@1 (sd),pass@8,tokens,jump %,corrected %,garbage %,entropy".split(",")
    return table_of(columns, rows)

def draw(path: Path, found: dict[Test, dict], about: str):
    """Two panels, a row per claim. Left: the mechanism's difference in half-widths of its interval, the claimed
    direction to the right: beyond 1 it excludes zero. Right: pass@1 in points with the interval."""
    figure = Figure(figsize=(12, 0.34 * len(CLAIMS) + 1.6))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {"yes": "tab:green", "higher": "tab:blue", "lower": "tab:blue", "no": "tab:red", "open": "0.6"}
    for y, claim in enumerate(reversed(CLAIMS)):
        does, pays = found.get(claim.does), found.get(claim.pays)
        if does:
            size = (claim.does.sign or 1) * does["mean"] / (does["half"] or math.inf)
            left.plot(size, y, "D", color=colours[does["verdict"]])
        if pays:
            mean, half = 100 * pays["mean"], 100 * pays["half"]
            right.errorbar(mean, y, xerr=half, fmt="D", color=colours[pays["verdict"]], capsize=3)
    left.set_xscale("symlog", linthresh=2)
    left.axvspan(-1, 1, color="0.9")
    for axis in (left, right):
        axis.axvline(0, color="black", lw=0.8)
    names = [f"{claim.text.split(';')[0]} [{claim.paper}]" for claim in reversed(CLAIMS)]
    left.set_yticks(range(len(CLAIMS)), names, fontsize=7)
    left.set_xlabel("does it do what it is for: difference / half-width of its interval")
    right.set_xlabel("does it pay: points of held-out pass@1, 95 % interval")
    for name in ("yes", "no", "open"):
        right.plot([], [], "D", color=colours[name], label=name)
    right.legend(fontsize=8)
    t1.save_figure(figure, path, about)
