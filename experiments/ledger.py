"""The ledger: does each claim of the paper (sections 2 and 4) hold at this scale? A row per variant, several seeds.

    python -m experiments.ledger                    all of VARIANTS x 3 seeds: 5 hours of one core
    python -m experiments.ledger --variants k4,k64 --seeds 0,1,2,3,4          some of them; base always runs
    python -m experiments.ledger --table            ledger.md, ledger.json and ledger.png of the finished runs alone

Other options are those of t1.py and hold for every run, for instance --rl-steps 120. Each run is an ordinary folder
OUT/NAME/VARIANT-seedS (OUT: runs, NAME: ledger) that keeps its last checkpoint without the trainer's state. All
variants of a seed start from one SFT checkpoint (`cold` from its own), so differences are paired by seed. After a kill
the same command resumes.
"""

import argparse
import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import data_prep
import experiments
import t1


@dataclass(frozen=True)
class Variant:
    """One row of the ledger: what it changes, what it is compared with, and the claim that the comparison tests."""

    changes: dict  # fields of t1.Config that differ from the base run
    against: str = ""  # the variant that it is compared with
    sign: int = 0  # of the claimed difference in held-out pass@1, this one minus `against`; 0: no direction is claimed
    claim: str = ""


HOT = dict(rl_lr=1e-3)  # the policy moves so far and so fast here that KL and penalties have something to hold
VARIANTS = {
    "base": Variant({}),
    "k4": Variant(dict(k=4), "base", -1, "fewer samples per prompt are worse (K = 4, equal prompts)"),
    "k64": Variant(dict(k=64), "base", +1, "more samples per prompt are better (K = 64, equal prompts)"),
    "k4-samples": Variant(
        dict(k=4, prompts=128), "base", -1, "fewer samples per prompt are worse (K = 4, equal samples)"
    ),
    "k64-samples": Variant(
        dict(k=64, prompts=8), "base", +1, "more samples per prompt are better (K = 64, equal samples)"
    ),
    "t0.9": Variant(dict(temperature=0.9), "base", -1, "T = 0.9 is worse than a temperature above 1"),
    "t1.0": Variant(dict(temperature=1.0), "base", -1, "T = 1.0 is worse than a temperature above 1"),
    "t1.2": Variant(dict(temperature=1.2), "base", +1, "T = 1.2 is the best temperature"),
    "t1.3": Variant(dict(temperature=1.3), "t1.2", -1, "T above 1.2 hurts"),
    "t1.3-minp": Variant(
        dict(temperature=1.3, min_p=0.05), "t1.3", 0, "min-p at a high temperature (no direction stated)"
    ),
    "entropy0": Variant(dict(entropy_coef=0.0), "base", -1, "the entropy bonus helps"),
    "anchor-fixed": Variant(dict(anchor="fixed"), "base", -1, "a moving anchor is better than a fixed one"),
    "anchor-none": Variant(dict(anchor="none"), "base", -1, "a KL term helps"),
    "nocenter": Variant(dict(kl_center=False), "base", -1, "centring the KL helps"),
    "penalties-off": Variant(dict(penalties=False), "base", -1, "the penalties help"),
    "cold": Variant(
        dict(traces="correct-only"), "base", -1, "a cold start on trial and error is better than on correct-only traces"
    ),
    "responses": Variant(
        dict(loss_norm="responses"), "base", 0, "each response divided by its own length (nothing stated)"
    ),
    "hot": Variant(HOT, "base", 0, "five times the learning rate (nothing stated)"),
    "hot-kl": Variant(HOT | dict(kl_coef=0.05), "hot", +1, "a KL term helps, where a run can collapse"),
    "hot-kl-nocenter": Variant(
        HOT | dict(kl_coef=0.05, kl_center=False), "hot-kl", -1, "centring the KL helps, where a run can collapse"
    ),
    "hot-penalties-off": Variant(
        HOT | dict(penalties=False), "hot", -1, "the penalties help, where a run can collapse"
    ),
}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 % quantile, 1 to 9 degrees of freedom
T95_MORE = 2.23  # for 10 degrees of freedom; a little too wide for more
UNRESOLVED = "not resolved at this scale"


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def verdict(differences: list[float], sign: int) -> str:
    """What paired differences say of the claim that they have this sign.

    `differences`: one per seed, the variant's pass@1 minus that of the variant it is held against, as shares. Resolved
    if zero lies outside the 95 % interval mean +- t(n - 1) sd / sqrt(n); then the sign of the mean decides.
    -> "holds" or "does not hold"; "higher" or "lower" where sign is 0; or UNRESOLVED.
    """
    n = len(differences)
    if n < 2:
        return UNRESOLVED
    mean, error = t1.mean_and_error([[d] for d in differences])
    quantile = T95[n - 2] if n - 2 < len(T95) else T95_MORE
    if abs(mean) <= quantile * error:
        return UNRESOLVED
    if sign == 0:
        return "higher" if mean > 0 else "lower"
    return "holds" if mean * sign > 0 else "does not hold"


def over_seeds(values: list[float]) -> list | None:
    """[mean, standard error over seeds], the error None for one seed; None for no seed."""
    return list(t1.mean_and_error([[x] for x in values])) if values else None


def paired_differences(runs: list[dict], variant: str, against: str) -> list[float]:
    """pass@1 of `variant` minus that of `against`, one per seed in which neither run stopped, in order of seeds."""
    values = {(r["variant"], r["seed"]): r["pass_at_1"] for r in runs if not r["stopped"]}
    seeds = sorted({seed for name, seed in values if name == variant and (against, seed) in values})
    return [values[variant, seed] - values[against, seed] for seed in seeds]


def ledger_of(runs: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of `read_runs` -> one row per variant (means over seeds, each [mean, standard error]) and one row per claim
    (paired differences and verdict), both in the order of VARIANTS."""
    rows, claims = [], []
    for name, variant in VARIANTS.items():
        tried = [r for r in runs if r["variant"] == name]
        finished = [r for r in tried if not r["stopped"]]
        if not tried:
            continue
        row = dict(variant=name, changes=variant.changes, runs=len(tried), collapsed=sum(r["collapsed"] for r in tried))
        for field in ("pass_at_1", "length", "entropy", "overlong"):
            row[field] = over_seeds([r[field] for r in finished])
        row["each"] = [r["pass_at_1"] for r in finished]
        row["start"] = over_seeds([r["start"] for r in finished if r["start"] is not None])
        row["gain"] = over_seeds(paired_differences(runs, name, "base")) if name != "base" else None
        rows.append(row)
        if variant.against:
            differences = paired_differences(runs, name, variant.against)
            claim = dict(claim=variant.claim, variant=name, against=variant.against, differences=differences)
            claims.append(claim | dict(verdict=verdict(differences, variant.sign)))
    return rows, claims


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def run_ledger(base: Path, seeds: list[int], variants: list[str], options: list[str]) -> bool:
    """Run what is not finished under `base`, with t1.py's `options` in every run -> False if a signal asked to stop."""
    for seed in seeds:
        for variant in dict.fromkeys(["base", *variants]):
            if not run_variant(base, variant, seed, options):
                t1.print0("interrupted; the same command resumes")
                return False
    return True


def run_variant(base: Path, variant: str, seed: int, options: list[str]) -> bool:
    """RL from the SFT checkpoint of its seed's base run (or its own, where the traces differ), then evaluation.

    A run that cannot continue (a loss that is not finite, say) is a result: stopped.json says why; remove it to
    try again. Finished runs are not run again. -> False if a signal asked for an end.
    """
    name, changes = f"{variant}-seed{seed}", VARIANTS[variant].changes
    run = base / name
    if not (run / "eval" / "results.json").exists() and not (run / "stopped.json").exists():
        t1.print0(f"{name}: {changes or 'nothing changed'}")
        try:
            if not run_stages(base, variant, seed, options):
                return False
        except t1.Misuse:
            raise
        except t1.Stop as e:
            t1.print0(f"{name} stopped: {e}")
            run.mkdir(parents=True, exist_ok=True)
            t1.write_json(run / "stopped.json", dict(reason=str(e)))
    drop_trainer_states(run)
    return True


def run_stages(base: Path, variant: str, seed: int, options: list[str]) -> bool:
    """SFT (where the run has its own start), RL and evaluation of one run -> False if a signal asked for an end."""
    name, changes = f"{variant}-seed{seed}", VARIANTS[variant].changes
    own_start = variant == "base" or "traces" in changes
    fixed = dict(out=str(base), name=name, seed=seed, budgets="", keep=1, keep_every=0) | changes
    start = base / (name if own_start else f"base-seed{seed}") / "sft"
    if own_start and not run_stage("sft", fixed, options):
        return False
    first = t1.newest(start)
    if not run_stage("rl", fixed | dict(model=first), options):
        return False
    last = t1.newest(base / name / "rl")
    return run_stage("eval", fixed | dict(checkpoint=",".join([first] * own_start + [last])), options)


def run_stage(stage: str, fixed: dict, options: list[str]) -> bool:
    """One stage of t1.py -> False if a signal asked for an end. A stage that reached its end has held-out samples."""
    cfg = stage_config(stage, fixed, options)
    {"sft": t1.run_sft, "rl": t1.run_rl, "eval": t1.run_eval}[stage](cfg)
    if stage == "eval":
        return True
    rows = t1.read_log(Path(cfg.out) / cfg.name / stage / "samples.jsonl")
    return any(row.get("kind") == "held-out" for row in rows)


def stage_config(stage: str, fixed: dict, options: list[str]) -> t1.Config:
    """t1.py's `options`, then the fields of Config in `fixed`; those that only other stages read are left out."""
    others = " ".join(names for other, names in t1.STAGE_FIELDS.items() if other != stage).split()
    values = {name: value for name, value in fixed.items() if name not in others}
    return dataclasses.replace(t1.parse_args(experiments.stage_options(stage, options)), **values)


def drop_trainer_states(run: Path):
    """Remove AdamW's state and the anchor from the checkpoints of a finished run: nothing will resume from them."""
    for path in [*t1.checkpoints(run / "sft"), *t1.checkpoints(run / "rl")]:
        sizes = data_prep.read_json(path / "complete.json")
        kept = {file: size for file, size in sizes.items() if not file.startswith("trainer")}
        t1.write_json(path / "complete.json", kept)
        shutil.rmtree(path / "trainer", ignore_errors=True)


def read_runs(base: Path) -> list[dict]:
    """The finished runs under `base`, one dict each, from results.json, rl/metrics.jsonl and rl/config.json.

    Keys: variant, seed, stopped (it could not go on), collapsed; of those that did not stop also pass_at_1 (held out),
    start (that of the SFT checkpoint it began from, or None), length (tokens), overlong (share), entropy (nats, last
    five steps), fell, problems, samples.
    """
    results = {path.parts[-3]: data_prep.read_json(path) for path in base.glob("*/eval/results.json")}
    starts = {}  # RUN/sft/checkpoint-N, wherever the folder was moved -> pass@1
    for result in results.values():
        for checkpoint in result["checkpoints"]:
            starts[Path(checkpoint["checkpoint"]).parts[-3:]] = checkpoint["pass_at_1"]
    runs = []
    for path in sorted(base.glob("*-seed*")):
        variant, _, seed = path.name.rpartition("-seed")
        stopped = (path / "stopped.json").exists()
        if variant in VARIANTS and seed.isdigit() and (stopped or path.name in results):
            run = dict(variant=variant, seed=int(seed), stopped=stopped, collapsed=stopped)
            runs.append(run if stopped else run | measured(path / "rl", results[path.name], starts))
    return runs


def measured(rl_folder: Path, result: dict, starts: dict) -> dict:
    """What one run reached, for `read_runs`; it collapsed if it ended below its start or fell in training, or half of
    its held-out responses are over-long."""
    steps = t1.read_log(rl_folder / "metrics.jsonl")
    source = data_prep.read_json(rl_folder / "config.json").get("started_from", "")
    end = result | result["checkpoints"][-1]
    run = {field: end[field] for field in ("pass_at_1", "length", "overlong", "problems", "samples")}
    run["start"] = starts.get(Path(source).parts[-3:])
    run["entropy"] = column_mean(steps[-5:], "entropy")
    run["fell"] = column_mean(steps[-5:], "accuracy") < column_mean(steps[:5], "accuracy")
    below = run["start"] is not None and run["pass_at_1"] < run["start"]
    return run | dict(collapsed=run["fell"] or below or run["overlong"] > 0.5)


def column_mean(rows: list[dict], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))


# ----------------------------------------------------------------------------------------------------------------------
# Table and picture
# ----------------------------------------------------------------------------------------------------------------------

HOW_TO_READ = """
A claim holds, or does not, if zero lies outside the 95 % interval of the paired differences (Student's t over seeds);
else it is not resolved at this scale. Of twenty such intervals one is wrong on average. Collapsed: held-out pass@1
below that of the SFT start, accuracy in training lower in the last five steps than in the first, more than half of the
held-out responses over-long, or a run that stopped. Entropy: mean of the last five steps, at the run's own temperature.
"""


def write_ledger(base: Path):
    """ledger.json, ledger.md and ledger.png, from the finished runs under `base` alone."""
    runs = read_runs(base)
    if not runs:
        raise t1.Misuse(f"{base}: no finished run there; give --out and --name of a ledger")
    rows, claims = ledger_of(runs)
    seeds = ", ".join(map(str, sorted({r["seed"] for r in runs})))
    done = next((r for r in runs if not r["stopped"]), {})
    about = f"{len(runs)} runs, seeds {seeds}; {done.get('problems')} held-out problems x {done.get('samples')} samples"
    t1.write_json(base / "ledger.json", dict(about=about, runs=runs, variants=rows, claims=claims))
    parts = [
        about + "; mean±standard error over seeds, gains over base paired by seed.\n",
        variant_table(rows),
        claim_table(claims),
    ]
    data_prep.write(base / "ledger.md", ["\n".join(parts), HOW_TO_READ])
    draw(base / "ledger.png", rows, about)


def spread(pair: list | None, scale: float = 1.0, digits: int = 1) -> str:
    """[mean, standard error] as text, both times `scale`; empty for None."""
    if pair is None:
        return ""
    mean, error = pair
    return f"{scale * mean:.{digits}f}" + (f"±{scale * error:.{digits}f}" if error is not None else "")


def table_of(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def variant_table(rows: list[dict]) -> str:
    """One row per variant; the last column is the number of collapsed runs of all its runs."""
    table = []
    if rows[0]["variant"] == "base" and rows[0]["start"]:
        table.append(["SFT start", "", spread(rows[0]["start"], 100), "", "", "", "", ""])
    for r in rows:
        changed = [f"{name}={'off' if value is False else value}" for name, value in r["changes"].items()]
        shares = [spread(r["pass_at_1"], 100), spread(r["gain"], 100), spread(r["length"], 1, 0)]
        shares += [spread(r["entropy"], 1, 3), spread(r["overlong"], 100)]
        table.append([r["variant"], " ".join(changed), *shares, f"{r['collapsed']}/{r['runs']}"])
    columns = ["run", "changed", "pass@1, %", "gain, points", "tokens", "entropy, nats", "over-long, %", "collapsed"]
    return table_of(columns, table)


def claim_table(claims: list[dict]) -> str:
    """One row per claim; n is the number of paired seeds."""
    table = []
    for c in claims:
        short = c["verdict"].removesuffix(" at this scale")
        difference = spread(over_seeds(c["differences"]), 100)
        table.append([c["claim"], f"{c['variant']} - {c['against']}", len(c["differences"]), difference, short])
    return table_of(["claim", "difference of", "n", "points", "verdict"], table)


def draw(path: Path, rows: list[dict], about: str):
    """Held-out pass@1 of every variant: a circle per seed, the mean and its standard error, a note on collapsed runs;
    base and SFT start as vertical lines."""
    axis = Figure(figsize=(6.2, 0.32 * len(rows) + 1.5)).subplots()
    for y, row in enumerate(reversed(rows)):
        if row["pass_at_1"]:
            axis.plot([100 * v for v in row["each"]], [y] * len(row["each"]), "o", mfc="none", color="0.5", ms=5)
            mean, error = row["pass_at_1"]
            axis.errorbar(100 * mean, y, xerr=100 * error if error else None, fmt="D", color="black", ms=4, capsize=3)
        if row["collapsed"]:
            note = f"{row['collapsed']} of {row['runs']} collapsed"
            axis.text(1.01, y, note, va="center", fontsize=7, transform=axis.get_yaxis_transform())
    if rows[0]["variant"] == "base":
        for label, style, pair in (("base", "--", rows[0]["pass_at_1"]), ("SFT start", ":", rows[0]["start"])):
            if pair:
                axis.axvline(100 * pair[0], ls=style, color="black", lw=0.9, label=label)
    axis.plot([], [], "o", mfc="none", color="0.5", label="one seed")
    axis.errorbar([], [], xerr=[], fmt="D", color="black", ms=4, capsize=3, label="mean, standard error")
    axis.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)], fontsize=8)
    axis.set_xlabel("held-out pass@1 (%)")
    axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    t1.save_figure(axis.figure, path, about)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def variant_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"no variant {name!r}; choose from {', '.join(VARIANTS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("ledger", __doc__)
    add = parser.add_argument
    add("--seeds", type=experiments.whole_numbers, default=[0, 1, 2], metavar="LIST", help="by commas (default: 0,1,2)")
    add("--variants", type=variant_names, default=list(VARIANTS), metavar="LIST", help="rows to run (default: all)")
    add("--table", action="store_true", help="run nothing: write the ledger of the finished runs (default: off)")
    return experiments.run(parser, ledger_command, argv)


def ledger_command(own, options: list[str]):
    cfg = t1.parse_args(experiments.stage_options("rl", options))
    base = Path(cfg.out) / (cfg.name or "ledger")
    if own.table or run_ledger(base, own.seeds, own.variants, options):
        write_ledger(base)
        t1.print0((base / "ledger.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
