"""Kills and fuzz: a run survives SIGKILL at any moment to the bit, and no file makes a traceback.

    python -m experiments.stress kills 300 --ranks 2         COUNT kills of the tests' run of RL
    python -m experiments.stress fuzz 3000                   COUNT damaged files

kills: SIGKILL in random functions, resumed after each; log, weights and state must be bit-equal
to a run undisturbed. Of two ranks one is killed, the other must end with one line. fuzz: each case
damages one good file; every reader takes it, or raises one line that names it."""

import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pyarrow.parquet

import data_prep
import experiments
import t1
import test_t1
import verify

ONCE = ["shard", "RunFolder.resume", "finish_stage"]  # functions of t1.py in which a kill may fall
OFTEN = """TorchEngine._generate judge response_logprobs accumulate_gradient update ema_update_
    RunFolder.log draw_steps RunFolder.save RunFolder.seal""".split()


def kill_in(function: str, nth: int, delay: float):
    """Let this process be killed `delay` seconds after the nth call of t1's `function` begins."""
    owner, _, name = function.rpartition(".")
    holder = getattr(t1, owner) if owner else t1
    inner, calls = getattr(holder, name), []

    def watched(*args, **kwargs):
        calls.append(0)
        if len(calls) == nth:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return inner(*args, **kwargs)

    setattr(holder, name, watched)


def run_rank(args: list[str], kill: tuple) -> int:
    t1.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave
    if kill and kill[0] == int(os.environ["RANK"]):
        kill_in(*kill[1:])
    return t1.main(args)


def run_ranks(args: list[str], ranks: int, log: Path, kill: tuple = ()) -> bool:
    """Run t1.main(args), one rank with `kill` (rank, function, call, delay) -> was it killed?"""
    meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29900 + os.getpid() % 2000))
    meet |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(ranks))
    processes = []
    for rank in map(str, range(ranks)):
        ours = meet | dict(RANK=rank, LOCAL_RANK=rank)
        processes.append(test_t1.Fork(f"{log}.{rank}", run_rank, args, kill, environment=ours))
    ends = []
    for process in processes:
        ends.append(process.ended())
        process.kill()  # if it hangs
    hit = bool(kill) and ends[kill[0]][0] == -signal.SIGKILL
    for rank, (code, said) in enumerate(ends):
        one_line = said.count("lost contact with another rank") == 1 and "Traceback" not in said
        expected = code == 0 or hit and (rank == kill[0] or one_line)
        assert expected, f"rank {rank} ended with {code}: {said[-2000:]}"
    return hit


def run_kills(count: int, ranks: int, seed: int, base: Path):
    """Kill, resume and compare until `count` kills have hit."""
    rng, hit, log, folder = random.Random(seed), Counter(), base / "log", base / "killed/tiny/rl"
    test_t1.make_guess(base)
    args = [str(x) for x in test_t1.rl_args(base, "--out")]
    run_ranks([*args, str(base / "whole")], ranks, log)
    whole = test_t1.outcome(base / "whole/tiny/rl", 20)
    while hit.total() < count:
        for resumed in range(min(12, count - hit.total())):
            function = rng.choice(ONCE[: 3 if resumed > 9 else 2] + OFTEN)
            nth = 1 if function in ONCE else rng.randrange(1, 4)
            delay = rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
            kill = rng.randrange(ranks), function, nth, delay
            hit[function] += run_ranks([*args, str(base / "killed")], ranks, log, kill)
        run_ranks([*args, str(base / "killed")], ranks, log)
        assert test_t1.outcome(folder, 20) == whole, f"seed {seed}: after {hit} another run"
        assert not list(folder.glob("partial-*"))
        shutil.rmtree(base / "killed")
        t1.print0(f"{hit.total()} kills on {ranks} rank(s), all runs bit-equal: {dict(hit)}")


# fmt: off
ODD_VALUES = [
    None, True, 0, -1, 0.5, 1e308, 10**30, float("nan"), float("inf"), [], {}, [[]], {"a": 1}, "",
    "\0", "\ud800", "x" * 60_000, "9" * 5000, "\\boxed{" * 400, "\\boxed{2}", "25\n", "\u2028", [1],
    "{problem}", "-" * 3000, [dict(role="user", content=3)], "\ufeff", "1e999", '{"a":' * 3000,
]
# fmt: on
ENCODINGS = ["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp500"]


def odd_json(rng: random.Random, value):
    """A copy of a JSON value with one thing changed: a value, a key, something nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, result = rng.choice(list(value)), dict(value)
        old = result.pop(key)
        if rng.random() < 0.85:
            result[rng.choice([key, key, key, key.upper(), "problem"])] = odd_json(rng, old)
        return result
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return value[:place] + [odd_json(rng, value[place])] + value[place + 1 :]
    return rng.choice([*ODD_VALUES, [value], str(value)])


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, inserted, doubled, taken out or flipped; or the JSON of one line changed."""
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    what = rng.randrange(10)
    if what == 0:
        return data[:start]
    if what == 1:
        odd = str(rng.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
        return data[:start] + odd + data[start:]
    if what == 2:
        return data[:end] + data[start:end][:5000] + data[end:]
    if what == 3:
        return data.decode(errors="replace").encode(rng.choice(ENCODINGS), "replace")
    lines = data.split(b"\n")
    place = rng.randrange(max(1, len(lines) - 1))
    try:
        text = json.dumps(odd_json(rng, json.loads(lines[place])), ensure_ascii=rng.random() < 0.5)
        lines[place] = text.encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    except ValueError:  # no JSON lines
        changed = bytearray(data or b"x")
        for _ in range(rng.choice([1, 1, 4, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)


def good_files(folder: Path):
    """FOLDER/KIND: what the readers of each kind take, to be damaged."""
    rows = []
    for i in range(6):
        texts = dict(problem=f"What is {i} + $\\frac{{{i}}}{{2}}$?", solution=f"So \\boxed{{{i}}}.")
        response = f"<think>\nhm\n</think>\n\\boxed{{{i}}}"
        rows.append(dict(id=f"r{i}", answer=str(i), response=response, pred="1", gold="1") | texts)
    for kind in READERS:
        (folder / kind).mkdir(parents=True)
    test_t1.write_rows(folder / "rows/a.jsonl", rows)
    test_t1.write_rows(folder / "pairs/a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "parquet/a.parquet")
    journal = [dict(key="a", outcome=dict(why="kept")), dict(key="b", asked="c", replies=[])]
    data_prep.append_rows(folder / "journal/a.jsonl", journal)
    data_prep.prepare([], ("latin",))  # as curate does before it sifts
    policy, tokenizer = test_t1.embedded_model(1, 8)
    policy.lm.save_pretrained(folder / "model", max_shard_size="5KB")
    tokenizer.save_pretrained(folder / "model")


made_once = cache(data_prep.embedded_tokenizer)  # takes seconds


def encode_rows(stage: str, path: Path):
    t1.encode_prompts(t1.read_rows(str(path), stage), made_once(), CFG)


def load_and_generate(path: Path):
    policy, tokenizer = t1.load_policy(str(path.parent), CFG)
    engine = t1.TorchEngine(tokenizer, CFG)
    engine.load(policy)
    prompt = t1.prompt_ids(dict(problem="What is 1 + 1?"), tokenizer, CFG)
    engine.generate(test_t1.asked([prompt], 2), 3)


CFG = t1.parse_args("--stage rl --max-new 100".split())
ROWS = [
    partial(encode_rows, "sft"),
    partial(encode_rows, "rl"),
    lambda path: data_prep.read_problems(str(path)),
    lambda path: data_prep.sift(("local", list(data_prep.raw_rows(str(path))))),
]
READERS = dict(
    rows=ROWS,
    parquet=ROWS,
    pairs=[lambda path: verify.run_rows(str(path), timeout=1.0)],
    journal=[lambda path: data_prep.Journal(path, dict(n=2))],
    model=[load_and_generate],
)


def fuzz_case(kind: str, rng: random.Random, good: Path, folder: Path) -> str:
    """-> "works" if a reader took the damaged file, else "one line"."""
    shutil.copytree(good / kind, folder)
    path = rng.choice(sorted(x for x in folder.rglob("*") if x.is_file()))
    path.write_bytes(damaged(rng, path.read_bytes()))
    before, said = sorted(folder.rglob("*")), "one line"
    name = folder.name if kind == "model" else path.name
    for reader in READERS[kind]:
        faulthandler.dump_traceback_later(600, exit=True)  # a hang
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                reader(path)
            said = "works"
        except (t1.Stop, SystemExit) as e:
            line = str(e)
            assert line.isprintable() and len(line) <= 2100, f"not one short line: {line!r}"
            assert name in line, f"does not name the file: {line!r}"
        assert sorted(folder.rglob("*")) == before, "an output beside the input"
    return said


def run_fuzz(cases: range, seed: int, folder: Path) -> int:
    """Run the cases and print counts of (kind, outcome) -> exit code, 1 if a case failed."""
    counts, kinds = Counter(), list(READERS)
    good_files(folder / "good")
    for case in cases:
        kind, rng = kinds[case % len(kinds)], random.Random(f"{seed} {case}")
        try:
            said = fuzz_case(kind, rng, folder / "good", folder / f"case{case}")
        except Exception:
            said = "FAILED"
            print(f"{kind}: stress fuzz 1 --seed {seed} --case {case}\n{traceback.format_exc()}")
        counts[kind, said] += 1
        shutil.rmtree(folder / f"case{case}")
    for (kind, said), n in sorted(counts.items()):
        print(f"{kind:8} {said:9}{n:6}")
    failed = sum(n for (_, said), n in counts.items() if said == "FAILED")
    print(f"{counts.total()} cases, {failed} failed, seed {seed}")
    return int(failed > 0)


@experiments.program
def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("stress", __doc__)
    add = parser.add_argument
    add("what", choices=("kills", "fuzz"))
    add("count", type=int, help="number of kills, or of damaged files")
    add("--seed", type=int, default=0, help="of moments or damage (default: 0)")
    add("--ranks", type=int, default=1, help="kills: ranks of the run (default: 1)")
    add("--case", type=int, default=0, help="fuzz: the first case (default: 0)")
    own = parser.parse_args(argv)
    if own.count < 1 or own.ranks < 1:
        raise t1.Misuse("COUNT and --ranks must be above 0")
    with tempfile.TemporaryDirectory() as folder:
        if own.what == "kills":
            return run_kills(own.count, own.ranks, own.seed, Path(folder))
        return run_fuzz(range(own.case, own.case + own.count), own.seed, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
