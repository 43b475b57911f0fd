"""Fuzz: no file makes a traceback, a hang or an output. Each case damages one good file; every
reader takes it, or raises one line that names it.

    FUZZ=3000 python -m pytest -m slow -k fuzz experiments"""

import contextlib
import faulthandler
import io
import json
import random
import shutil
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pyarrow.parquet

import data_prep
import experiments
import t1
import test_t1
import verify

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
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for kind in READERS:
        (folder / kind).mkdir(parents=True)
    (folder / "rows/a.jsonl").write_bytes(lines)
    (folder / "pairs/a.jsonl").write_bytes(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "parquet/a.parquet")
    journal = [dict(key="a", outcome=dict(why="kept")), dict(key="b", asked="c", replies=[])]
    data_prep.append_rows(folder / "journal/a.jsonl", journal)
    data_prep.prepare([], ("latin",))  # as curate does before it sifts
    with experiments.embedded_model(1, 8):
        policy, tokenizer = t1.tiny_policy(CFG)
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


def run_fuzz(cases: range, seed: int, folder: Path) -> Counter:
    """-> counts of (kind, outcome). The first case that fails raises; its number is said."""
    counts = Counter()
    good_files(folder / "good")
    for case in cases:
        kind = list(READERS)[case % len(READERS)]
        rng = random.Random(f"{seed} {case}")
        try:
            counts[kind, fuzz_case(kind, rng, folder / "good", folder / f"case{case}")] += 1
        except Exception:
            t1.print0(f"{kind}: case {case} of seed {seed}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder / f"case{case}")
    return counts
