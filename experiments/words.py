"""Ground W: grade-school word problems for a small pretrained model. Writes sft.jsonl (traces),
rl.jsonl (other problems) and test.jsonl into --out; with --runs words.jsonl and results.md's table.

    python -m experiments.words --out data/words
    python -m experiments.words --runs runs/words0,runs/words1 --out figures

The thought is SVAMP's equation, and the calculations of GSM8K's human solutions, of which those
with at most two are taken. Each set comes from the hub or from a file of its rows."""

import re
import sys
from pathlib import Path

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
    parser.add_argument("--svamp", default="ChilleD/SVAMP")
    parser.add_argument("--gsm8k", nargs="+", default=["openai/gsm8k:train", "openai/gsm8k"])
    parser.add_argument("--runs", default="", help="folders of evaluated runs, by commas")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    command = publish if args.runs else make
    command(args)


def publish(args):
    """words.jsonl: an entry of results.json for each checkpoint of the runs."""
    rows = []
    for folder in map(Path, args.runs.split(",")):
        for entry in t1.results_of(folder / "eval"):
            kept = {name: value for name, value in entry.items() if name not in LOCAL}
            rows.append(dict(run=folder.name, **kept))
    data_prep.write(args.out / "words.jsonl", map(data_prep.json_line, rows))
    print(table(rows))


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        k, chance, error = row["pass_at_k"][-1]
        right = f"{100 * row['pass_at_1']:.1f} ± {100 * row['standard_error']:.1f} %"
        best = f"{100 * chance:.1f} ± {100 * error:.1f} % ({k})"
        cut = f"{100 * row['overlong']:.1f} %"
        lines.append([row["run"], row["name"], right, best, f"{row['length']:.0f}", cut])
    columns = ["run", "checkpoint", "pass@1", "pass@k (k)", "length", "over-long"]
    return claims.table_of(columns, lines)


def make(args):
    train = []
    test = []
    for where, raw in data_prep.raw_rows(args.svamp):
        row = data_prep.parse(where, raw)
        parts = svamp(row, where)
        number = int(row["id"].removeprefix("chal-"))
        (train if number <= 700 else test).append(trace(f"svamp-{number}", parts))
    for name in args.gsm8k:
        for number, (where, raw) in enumerate(data_prep.raw_rows(name)):
            row = data_prep.require(data_prep.parse(where, raw), ("question", "answer"), where)
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
    sys.exit(main())
