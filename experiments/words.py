"""Ground W: grade-school word problems for a small pretrained model. Writes sft.jsonl (traces),
rl.jsonl (other problems) and test.jsonl into --out.

    python -m experiments.words --out data/words

The thought is SVAMP's equation, and the calculations of GSM8K's human solutions, of which those
with at most two are taken. Each set comes from the hub or from a file of its rows."""

import re
import sys
from pathlib import Path

import data_prep
import t1

from . import Parser, run

CALCULATION = re.compile("<<(.*?)=(.*?)>>")


def svamp(row: dict) -> tuple[str, str, str]:
    """-> problem, thought, answer"""
    problem = row.get("problem") or f"{row['Body'].strip()} {row['Question'].strip()}"
    equation = str(row.get("equation") or row["Equation"])
    thought = re.sub(r"^\( | \)$", "", equation).replace(".0", "")
    answer = str(row.get("answer") or row["Answer"]).removesuffix(".0")
    return problem, f"{thought} = {answer}", answer


def gsm8k(row: dict) -> tuple[str, str, str]:
    solution, answer = row["answer"].split("####")
    thought = "\n".join(f"{left} = {right}" for left, right in CALCULATION.findall(solution))
    return row["question"], thought, answer.strip().replace(",", "")


def is_short(row: dict) -> bool:
    return 1 <= len(CALCULATION.findall(row["answer"])) <= 2


def trace(name: str, parts: tuple[str, str, str]) -> dict:
    problem, thought, answer = parts
    response = f"<think>\n{thought}\n</think>\nThe answer is \\boxed{{{answer}}}."
    return dict(id=name, problem=problem, response=response, answer=answer)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("words", __doc__, t1_options=False)
    parser.add_argument("--svamp", default="ChilleD/SVAMP")
    parser.add_argument("--gsm8k", nargs="+", default=["openai/gsm8k:train", "openai/gsm8k"])
    parser.add_argument("--out", type=Path, required=True)
    return run(parser, make, argv)


def make(args, options: list[str]):
    train = []
    test = []
    for where, raw in data_prep.raw_rows(args.svamp):
        row = data_prep.parse(where, raw)
        number = int(str(row.get("id") or row["ID"]).removeprefix("chal-"))
        (train if number <= 700 else test).append(trace(f"svamp-{number}", svamp(row)))
    for name in args.gsm8k:
        for number, (where, raw) in enumerate(data_prep.raw_rows(name)):
            row = data_prep.parse(where, raw)
            split = row.get("split") or ("test" if name == "openai/gsm8k" else "train")
            if is_short(row):
                rows = test if split == "test" else train
                rows.append(trace(f"gsm8k-{split}-{number}", gsm8k(row)))

    # Half of the problems is for SFT, the other for RL. GSM8K's last 223 wait for another use.
    files = dict(sft=[], rl=[], test=test[:500])
    for row in train:
        half = "sft" if t1.seed_for(0, row["problem"]) % 2 else "rl"
        files[half].append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        data_prep.write(args.out / f"{name}.jsonl", map(data_prep.json_line, rows))
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(main())
