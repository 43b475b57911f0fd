"""Ground W: grade-school word problems for a small pretrained model. Writes sft.jsonl (traces),
rl.jsonl (other problems) and test.jsonl into --out; with --responses chosen.jsonl, the problems of
rl.jsonl that are solved sometimes; with --runs words.jsonl and results.md's table.

    python -m experiments.words --out data/words
    python -m experiments.words --responses runs/words0/eval/responses.jsonl --out data/words
    python -m experiments.words --runs runs/words0,runs/words1 --out figures

A thought is SVAMP's equation, or at most two calculations of GSM8K. Sets: hub names or files."""

import re
from pathlib import Path

import numpy as np

import data_prep
import experiments
import t1
from experiments import claims

LOCAL = ("key", "checkpoint", "test")  # of a machine
CALCULATION = re.compile("<<(.*?)=(.*?)>>")


def svamp(row: dict, where) -> tuple[str, str, str]:
    """-> problem, thought, answer"""
    if "Body" in row:  # the hub's spelling
        data_prep.require(row, ("Question", "Equation", "Answer"), where)
        row["problem"] = f"{row['Body'].strip()} {row['Question'].strip()}"
        row |= dict(id=row.get("ID"), equation=row["Equation"], answer=row["Answer"])
    data_prep.require(row, ("id", "problem", "equation", "answer"), where)
    thought = re.sub(r"^\( | \)$|\.0(?!\d)", "", row["equation"])
    answer = row["answer"].removesuffix(".0")
    return row["problem"], f"{thought} = {answer}", answer


def gsm8k(row: dict) -> tuple[str, str, str]:
    solution, answer = row["answer"].split("####")
    thought = "\n".join(f"{left} = {right}" for left, right in CALCULATION.findall(solution))
    return row["question"], thought, answer.strip().replace(",", "")


def trace(name: str, parts: tuple[str, str, str]) -> dict:
    problem, thought, answer = parts
    response = f"<think>\n{thought}\n</think>\nThe answer is \\boxed{{{answer}}}."
    return dict(id=name, problem=problem, response=response, answer=answer)


def is_one(row: dict) -> bool:
    return row["response"].count(" = ") == 1


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("words", __doc__)
    add = parser.add_argument
    add("--svamp", default="ChilleD/SVAMP", help="a set of the hub or a file")
    add("--gsm8k", nargs="+", default=["openai/gsm8k:train", "openai/gsm8k"], help="the same")
    add("--runs", default="", help="folders of evaluated runs, by commas")
    add("--responses", type=Path, help="of an evaluation on rl.jsonl")
    add("--out", type=Path, required=True, help="folder of the written files")
    args = parser.parse_args(argv)
    if args.runs:
        publish(args)
    elif args.responses:
        choose(args)
    else:
        make(args)


def choose(args):
    """chosen.jsonl: the problems of rl.jsonl with right and with wrong responses."""
    grades = {}
    for row in data_prep.read_log(args.responses):
        grades.setdefault(row["problem"], set()).add(row["right"])
    rows = data_prep.read_log(args.out / "rl.jsonl")
    kept = [row for row in rows if len(grades.get(row["problem"], ())) == 2]
    data_prep.write(args.out / "chosen.jsonl", map(data_prep.json_line, kept))
    print(f"{args.out / 'chosen.jsonl'}: {len(kept)} of {len(rows)} rows")


def publish(args):
    """words.jsonl: an entry of results.json for each checkpoint of the runs."""
    rows = []
    for folder in map(Path, args.runs.split(",")):
        right = {}  # of each checkpoint and problem
        for row in data_prep.read_log(folder / "eval" / "responses.jsonl"):
            right.setdefault(row["key"], {}).setdefault(row["problem"], []).append(row["right"])
        entries = [e for e in t1.results_of(folder / "eval") if e["test"].endswith("test.jsonl")]
        if not entries:
            raise t1.Misuse(f"--runs: {folder} has no evaluation on test.jsonl; run --stage eval")
        first = right[entries[0]["key"]]
        for entry in entries:  # its gain over the first: mean and error, paired by problem
            own = right[entry["key"]]
            gain = t1.mean_and_error([[np.mean(own[x]) - np.mean(first[x])] for x in own])
            kept = {name: value for name, value in entry.items() if name not in LOCAL}
            rows.append(dict(run=folder.name, **kept, gain=gain))
    data_prep.write(args.out / "words.jsonl", map(data_prep.json_line, rows))
    print(table(rows), mean_gain(rows), sep="\n")


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        right = percent(row["pass_at_1"], row["standard_error"])
        change, spread = np.multiply(100, row["gain"])
        gain = f"{change:+.1f} ± {spread:.1f}" if spread else ""
        k, chance, error = row["pass_at_k"][-1]
        best = f"{percent(chance, error)} ({k})"
        rest = (f"{row['length']:.0f}", f"{100 * row['overlong']:.1f} %")
        lines.append([row["run"], row["name"], right, gain, best, *rest])
    columns = ["run", "checkpoint", "pass@1", "gain, points", "pass@k (k)", "length", "over-long"]
    return claims.table_of(columns, lines)


def percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def mean_gain(rows: list[dict]) -> str:
    """Of the checkpoints after the preset's 20 steps, if two are there."""
    gains = [100 * row["gain"][0] for row in rows if row["name"] == "rl 20"]
    if len(gains) < 2:
        return ""
    return f"mean gain {np.mean(gains):.1f}, standard deviation {np.std(gains, ddof=1):.1f}"


def make(args):
    train = []
    test = []
    for where, row in data_prep.raw_rows(args.svamp):
        parts = svamp(row, where)
        number = int(row["id"].removeprefix("chal-"))
        (train if number <= 700 else test).append(trace(f"svamp-{number}", parts))
    for name in args.gsm8k:
        for number, (where, row) in enumerate(data_prep.raw_rows(name)):
            data_prep.require(row, ("question", "answer"), where)
            split = row.get("split") or ("test" if name == "openai/gsm8k" else "train")
            if row["answer"].count("<<") in (1, 2):
                rows = test if split == "test" else train
                rows.append(trace(f"gsm8k-{split}-{number}", gsm8k(row)))

    # Half of the problems is for SFT, the other for RL. Two calculations teach SFT alone: its model
    # solves 1 % of them, and a group without a right sample teaches nothing.
    files = dict(sft=[], rl=[], test=[row for row in test if is_one(row)])
    for row in train:
        if t1.seed_for(0, row["problem"]) % 2:
            files["sft"].append(row)
        elif is_one(row):
            files["rl"].append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        data_prep.write(args.out / f"{name}.jsonl", map(data_prep.json_line, rows))
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    raise SystemExit(main())
