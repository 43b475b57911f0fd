"""Other ways of spending tokens than a longer thought: budget forcing and the majority of k.

    python -m experiments.spending --name NAME                      after python t1.py --stage eval --name NAME
    python -m experiments.spending --name NAME --samples 32 --wait-words Wait

NOT IN PAPER, both. Takes the run's last evaluated checkpoint and asks, on the same test set, what accuracy its tokens
could have bought otherwise:
  cut       a thought of at most a budget of tokens (paper, section 3): read from results.json;
  forced    budget forcing after Muennighoff et al., s1: Simple test-time scaling (arXiv 2501.19393): each time a
            thought ends before the budget, `</think>` gives way to --wait-words and the policy thinks on; one thought
            per problem, the first of responses.jsonl;
  majority  the most frequent answer of k of --samples responses.
Writes OUT/NAME/eval/spending.json, spending.png and spending.jsonl (the responses of `majority`). Settings are those of
the run and of its evaluation; other options are t1.py's. The same command after a kill resumes and ends with the same
numbers.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import data_prep
import experiments
import t1
import verify

# ----------------------------------------------------------------------------------------------------------------------
# Majority
# ----------------------------------------------------------------------------------------------------------------------


def majority(answers: list[str | None]) -> int | None:
    """Index of the first response with the most frequent answer; None if no response has an answer.

    A tie goes to the answer that appeared first. Two answers are one if `verify.is_equal` says so; a response without
    an answer has no vote.
    >>> majority(["1/2", "3", "0.5", None])
    0
    """
    votes = {}  # index of the first answer of its kind -> votes
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in votes if verify.is_equal(answer, answers[j])), i)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=votes.get) if votes else None  # max takes the first of equals


def maj_at_k(answers: list[str | None], right: list[bool], k: int) -> float:
    """How often the majority of k samples is right: the mean over the n // k disjoint groups of k consecutive ones."""
    hits = []
    for start in range(0, len(answers) - k + 1, k):
        chosen = majority(answers[start : start + k])
        hits.append(chosen is not None and right[start + chosen])
    return sum(hits) / len(hits)


def majorities(records: list[dict], samples: int) -> list[list]:
    """maj@k for k = 1, 2, 4, ... samples -> [k, accuracy, standard error over problems, tokens spent per problem].

    `records`: of `samples` consecutive responses per problem, with "answer", "right" and "length" (tokens).
    """
    answers = t1.grouped([r["answer"] for r in records], samples)
    right = t1.grouped([r["right"] for r in records], samples)
    length = float(np.mean([r["length"] for r in records]))
    points = []
    for k in (2**i for i in range(samples.bit_length())):
        points.append(
            [
                k,
                *t1.mean_and_error([[maj_at_k(a, r, k)] for a, r in zip(answers, right)]),
                k * length,
            ]
        )
    return points


# ----------------------------------------------------------------------------------------------------------------------
# Budget forcing
# ----------------------------------------------------------------------------------------------------------------------


def before_end(ids: list[int], tokenizer) -> list[int]:
    """The tokens of a thought before its `</think>`: the longest run of whole tokens whose text ends before it."""
    text = tokenizer.decode(ids).partition("</think>")[0]
    n = t1.thought_length(ids, tokenizer) or len(ids)
    while not text.startswith(tokenizer.decode(ids[:n])):
        n -= 1
    return ids[:n]


def reopened(ids: list[int], finished: bool, wait: list[int], tokenizer) -> list[int]:
    """The thought without its end, then `wait`; one that was cut off before it ended is returned unchanged."""
    ids = ids[:-1] if finished else ids  # without the end token
    thought = before_end(ids, tokenizer)
    ended = finished or len(thought) < len(ids)
    return thought + wait if ended else thought


def force_budget(
    engine, rollouts: list[t1.Rollout], budget: int, wait_words: str, cfg: t1.Config
) -> list[t1.Rollout]:
    """The same thoughts, each forced to `budget` tokens: `wait_words` replace every `</think>`. Ids only,
    nothing is encoded again. Cut at a smaller budget they are the thoughts forced to that one: one set of generations
    serves all budgets."""
    tokenizer = engine.tokenizer
    wait = tokenizer(wait_words.replace("\\n", "\n"), add_special_tokens=False).input_ids
    thoughts = [reopened(r.ids, r.finished, wait, tokenizer) for r in rollouts]
    turn = 0
    while short := [i for i, thought in enumerate(thoughts) if len(thought) < budget]:
        turn += 1
        room = budget - min(len(thoughts[i]) for i in short)
        seeds = [t1.seed_for(cfg.seed, "forced", turn, i) for i in short]
        prompts = [rollouts[i].prompt + thoughts[i] for i in short]
        for i, new in zip(
            short, engine.generate(prompts, [[0]] * len(prompts), seeds, room, cfg.eval_temperature)
        ):
            thoughts[i] = reopened(thoughts[i] + new.ids, new.finished, wait, tokenizer)
    return [
        t1.Rollout(r.prompt, thought[:budget], [], False) for r, thought in zip(rollouts, thoughts)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder
# ----------------------------------------------------------------------------------------------------------------------

OWN = (
    "stage name out model checkpoint resume_from config".split()
)  # fields that this command sets or ignores


def settings_of(base: Path, entry: dict, options: list[str]) -> t1.Config:
    """The Config of the run's evaluation: what its folder and an entry of results.json say, then `options`."""
    values, ignored = {}, [*OWN, *t1.STAGE_FIELDS["sft"].split(), *t1.STAGE_FIELDS["rl"].split()]
    for stage in ("sft", "rl"):
        if (base / stage / "config.json").exists():
            values |= data_prep.read_json(base / stage / "config.json")["config"]
    values |= {name: entry[name] for name in ("seed", "max_new", "answer_model")}
    values |= dict(eval_temperature=entry["temperature"])
    stored = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if name not in ignored
    ]
    return t1.parse_args([*stored, *options, "--stage", "eval"])


def problems_of(entry: dict, cfg: t1.Config) -> list[dict]:
    """The problems of one entry of results.json: embedded, a benchmark, held out of --data, or a --test file."""
    test = entry["test"]
    source = dict(benchmarks="", data="", test="")
    if (Path(cfg.benchmark_dir) / f"{test}.jsonl").exists():
        source["benchmarks"] = test
    elif test != "embedded":
        source["data" if test == cfg.data else "test"] = test
    ((_, problems, _),) = t1.test_sets(dataclasses.replace(cfg, **source))
    if len(problems) != entry["problems"]:
        raise t1.Misuse(
            f"{entry['test']}: {len(problems)} problems, {entry['problems']} were evaluated; evaluate again"
        )
    return problems


def responses_of(base: Path, entry: dict) -> list[dict]:
    """The evaluated responses of one entry of results.json, its samples of each problem in order."""
    path = base / "eval" / "responses.jsonl"
    rows = {
        (row["number"], row["sample"]): row
        for row in t1.read_log(path)
        if row["key"] == entry["key"]
    }
    if len(rows) != entry["problems"] * entry["samples"]:
        raise t1.Misuse(
            f"{path}: it does not hold the responses of {entry['name']} on {entry['test']}; evaluate again"
        )
    return [rows[cell] for cell in sorted(rows)]


# ----------------------------------------------------------------------------------------------------------------------
# Measurement
# ----------------------------------------------------------------------------------------------------------------------


def at_each_budget(
    answerer, rollouts: list[t1.Rollout], golds: list[str], budgets: list[int], cfg
) -> list[list]:
    """One rollout per problem, cut at each budget and answered -> [budget, accuracy, standard error, tokens spent]."""
    points = []
    for budget in budgets:
        cut = t1.cut_thoughts(answerer, answerer.tokenizer, rollouts, budget, cfg)
        right = verify.grade([t1.text_of(r, answerer.tokenizer) for r in cut], golds)
        points.append(
            [
                budget,
                *t1.mean_and_error([[r] for r in right]),
                float(np.mean([len(r.ids) for r in cut])),
            ]
        )
    return points


def spend(
    policy, engine, answerer, base: Path, entry: dict, samples: int, wait_words: str, cfg: t1.Config
) -> dict:
    """What each way of spending tokens buys on the test set of `entry`, one entry of results.json.

    -> cut, forced, majority: lists of [budget or k, accuracy, standard error over problems, tokens spent per problem].
    """
    problems, kept = problems_of(entry, cfg), responses_of(base, entry)
    _, prompts = t1.encode_prompts(problems, engine.tokenizer, cfg)
    firsts = [
        t1.Rollout(prompts[r["number"]], r["ids"], [], r["finished"])
        for r in kept
        if r["sample"] == 0
    ]
    budgets = [point[0] for point in entry["scaling"]]
    forced = force_budget(engine, firsts, budgets[-1], wait_words, cfg)
    if samples > entry["samples"]:
        _, kept = t1.evaluate(engine, problems, prompts, samples, cfg)
        rows = [dict(number=i // samples, sample=i % samples) | r for i, r in enumerate(kept)]
        data_prep.write(base / "eval" / "spending.jsonl", map(data_prep.json_line, rows))
    else:
        kept = [r for r in kept if r["sample"] < samples]
    return dict(
        test=entry["test"],
        problems=len(problems),
        cut=entry["scaling"],
        forced=at_each_budget(answerer, forced, [p["answer"] for p in problems], budgets, cfg),
        majority=majorities(kept, samples),
    )


def run_spending(samples: int, wait_words: str, options: list[str]) -> Path:
    """Measure the last evaluated checkpoint on every test set it was evaluated on -> the folder of spending.json."""
    asked = t1.parse_args([*options, "--stage", "eval"])
    base = Path(asked.out) / (asked.name or asked.preset)
    if not (base / "eval" / "results.json").exists():
        raise t1.Misuse(
            f"{base / 'eval'}: no results.json; run python t1.py --stage eval first, or give --out, --name"
        )
    results = data_prep.read_json(base / "eval" / "results.json")
    last = results["checkpoints"][-1]
    entries = {
        entry["test"]: entry
        for entry in results["checkpoints"]
        if entry["checkpoint"] == last["checkpoint"]
    }
    if not all(entry.get("scaling") for entry in entries.values()):
        raise t1.Misuse(f"{base / 'eval'}: evaluated without --budgets; evaluate again")
    cfg = settings_of(base, last, options)
    policy, tokenizer = t1.load_policy(last["checkpoint"], cfg)
    engine = answerer = t1.make_engine(last["checkpoint"], policy, tokenizer, cfg)
    if cfg.answer_model:
        folder = t1.latest(cfg.answer_model)  # as stage eval takes it
        other, _ = t1.load_policy(folder, cfg)
        answerer = t1.make_engine(folder, other, tokenizer, cfg)
        answerer.load(other)
    engine.load(policy)
    tests = [
        spend(policy, engine, answerer, base, entry, samples, wait_words, cfg)
        for entry in entries.values()
    ]
    about = dict(
        checkpoint=last["checkpoint"],
        name=last["name"],
        seed=cfg.seed,
        temperature=cfg.eval_temperature,
    )
    about |= dict(wait_words=wait_words, samples=samples, tests=tests)
    t1.write_json(base / "eval" / "spending.json", about)
    draw(base / "eval", about)
    return base / "eval"


# ----------------------------------------------------------------------------------------------------------------------
# Picture
# ----------------------------------------------------------------------------------------------------------------------


def draw(folder: Path, content: dict):
    """spending.png: accuracy over the tokens spent per problem, one curve for each way, one picture per test set."""
    for test in content["tests"]:
        ways = {
            "cut at a budget": test["cut"],
            "forced to a budget (1 sample)": test["forced"],
            f"majority of k (of {content['samples']} samples)": test["majority"],
        }
        axis = Figure(figsize=(6.2, 4.5)).subplots()
        for (label, points), style, color in zip(
            ways.items(), ("o-", "s--", "D-."), ("0", "0.35", "0.55")
        ):
            value, error, tokens = np.array([point[1:] for point in points], dtype=float).T
            axis.errorbar(
                tokens, 100 * value, 100 * error, fmt=style, color=color, capsize=2, label=label
            )
        for k, value, _, tokens in test["majority"]:
            axis.annotate(
                f"k={k}", (tokens, 100 * value), (3, -10), textcoords="offset points", fontsize=7
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens spent per problem")
        axis.set_ylabel("accuracy (%)")
        axis.legend(fontsize=8, title=content["name"])
        title = f"{test['problems']} problems ({test['test']}), T = {content['temperature']}, seed {content['seed']}"
        several = f"-{test['test']}" if len(content["tests"]) > 1 else ""
        t1.save_figure(
            axis.figure,
            folder / f"spending{several}.png",
            title + "; bars: standard error over problems",
        )


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("spending", __doc__)
    add = parser.add_argument
    add(
        "--samples",
        type=int,
        default=8,
        help="responses per problem of the majority (default: %(default)s)",
    )
    words = "what replaces </think>, \\n for a new line (default: %(default)r)"
    add("--wait-words", default=", wait\\n", help=words)
    return experiments.run(parser, spending_command, argv)


def spending_command(own, options: list[str]):
    if own.samples < 1 or not own.wait_words:
        raise t1.Misuse(
            "--samples must be above 0, and --wait-words not empty: the thought would end again at once"
        )
    t1.print0(
        f"spending.json and spending.png in {run_spending(own.samples, own.wait_words, options)}"
    )


if __name__ == "__main__":
    sys.exit(main())
