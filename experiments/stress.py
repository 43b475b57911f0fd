"""Kills and fuzz: a run survives SIGKILL at any moment to the bit, and no file a user can give makes a traceback.

    python -m experiments.stress kills 300                  COUNT kills on one rank; hours
    python -m experiments.stress kills 200 --ranks 2 --seed 1
    python -m experiments.stress fuzz 12000                 COUNT damaged files through every reader; 20 minutes
    python -m experiments.stress fuzz 1 --seed 0 --case 77  one case again

kills: one run of 20 steps undisturbed, then the same run with up to twelve SIGKILLs at random moments of random phases,
resumed after each; metrics.jsonl, weights, AdamW and anchor must be bit-equal. On two ranks one is killed and the other
must end by itself with one line.

fuzz: a case is a seeded change of a good file and the readers it goes through, in this process. Each reader must take
it, or raise one
line that names the file: no traceback, no hang (SLOW seconds at most), no half output.
"""

import contextlib
import faulthandler
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import safetensors
import torch

import data_prep
import experiments
import t1
import verify

# ----------------------------------------------------------------------------------------------------------------------
# Kills
# ----------------------------------------------------------------------------------------------------------------------

PHASES = {  # phase -> the functions of t1.py that it consists of
    "start": ("shard",),
    "resume": ("RunFolder.resume",),
    "rollout": ("TorchEngine._generate",),
    "grading": ("judge",),
    "anchor": ("response_logprobs",),
    "update": ("accumulate_gradient", "update", "ema_update_"),
    "log": ("RunFolder.log", "report_step"),
    "checkpoint": ("RunFolder.save",),
    "rename": ("RunFolder.seal",),
    "end": ("finish_stage",),
}
ONCE = ("start", "resume", "end")  # phases that a run goes through once
SAVING = ("checkpoint", "rename")
STEPS = 20


def naming_rows(stage: str) -> list[dict]:
    """Problems that are solved by reading; the traces of stage sft give a random digit, so that SFT learns to guess."""
    rows = []
    for i in range(400):
        guess = (i * 7 + 3 * (i // 10)) % 10
        response = f"<think>\nSo {(i * 7) % 10}\n</think>\nThe answer is \\boxed{{{guess}}}."
        rows.append(
            dict(
                id=str(i),
                problem=f"Name the number {i % 10}.",
                answer=str(i % 10),
                response=response,
            )
        )
    return rows if stage == "sft" else rows[:10]


def make_guess(base: Path) -> Path:
    """A policy that guesses among ten numbers, and its problems: rewards differ within a group from the first step
    on."""
    for name, stage in (("rows", "sft"), ("ten", "rl")):
        data_prep.write(base / f"{name}.jsonl", map(data_prep.json_line, naming_rows(stage)))
    data = f"--data {base}/rows.jsonl --test {base}/rows.jsonl --out {base}"
    small = "--max-new 24 --sft-steps 250 --sft-lr 4e-3 --tiny-layers 1 --tiny-width 64"
    run_whole(["--stage", "sft", *data.split(), *small.split()], 1, base / "log")
    return base


def rl_args(guess: Path, out: Path, name: str) -> list[str]:
    """20 steps of 3 of 10 problems: an epoch ends inside a batch, three steps in ten."""
    inputs = [
        "--model",
        guess / "tiny/sft/checkpoint-250",
        "--data",
        guess / "ten.jsonl",
        "--test",
        guess / "ten.jsonl",
    ]
    settings = f"--preset tiny --max-new 24 --prompts 3 --k 6 --rl-steps {STEPS} --rl-lr 1e-3 --rl-save-every 3 --keep 2"
    return [
        "--stage",
        "rl",
        *map(str, inputs),
        *settings.split(),
        "--out",
        str(out),
        "--name",
        name,
    ]


def outcome(folder: Path, step: int) -> tuple[bytes, dict[str, bytes]]:
    """What must be equal to the bit: metrics.jsonl, weights and trainer state, tensor by tensor (a header lists them in
    any order)."""
    tensors = {}
    for path in sorted((folder / f"checkpoint-{step}").rglob("*.safetensors")):
        with safetensors.safe_open(path, "np") as f:
            tensors |= {f"{path.name} {key}": f.get_tensor(key).tobytes() for key in f.keys()}
    assert len(tensors) > 30
    return (folder / "metrics.jsonl").read_bytes(), tensors


def find(path: str):
    """t1's function or method of that name -> (what it is an attribute of, the attribute's name)."""
    *owner, name = path.split(".")
    holder = getattr(t1, owner[0]) if owner else t1
    assert hasattr(holder, name), f"t1.{path}: no such function; mend PHASES"
    return holder, name


def kill_in(phase: str, nth: int, delay: float, log: Path):
    """Wrap the functions of all phases so that this process is killed `delay` seconds after the nth call of one of
    `phase` begins; `log` then names the phase that the kill hit."""
    state = dict(calls=0, now="between")

    def die():
        time.sleep(delay)
        log.write_text(state["now"])
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(inner, name):
        def watched(*args, **kwargs):
            before, state["now"] = state["now"], name
            if name == phase:
                state["calls"] += 1
                if state["calls"] == nth:
                    threading.Thread(target=die, daemon=True).start()
            try:
                return inner(*args, **kwargs)
            finally:
                state["now"] = before

        return watched

    for name, functions in PHASES.items():
        for path in functions:
            holder, attribute = find(path)
            setattr(holder, attribute, watch(getattr(holder, attribute), name))


def rank_process(rank: int, ranks: int, port: str, args: list[str], kill: tuple | None, log: Path):
    """The life of a forked rank; never returns. Its stderr goes to LOG.RANK."""
    code = 99
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        with open(f"{log}.{rank}", "w") as err:
            os.dup2(err.fileno(), 2)
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if kill and kill[0] == rank:
            kill_in(*kill[1:], log)
        code = t1.main(args)
    finally:
        os._exit(code)


def start_ranks(
    args: list[str], ranks: int, log: Path, kill: tuple | None = None, seconds: int = 240
) -> list[int]:
    """t1.main(args) in forked processes -> exit codes, -9 for one that was killed. `kill`: (rank, phase, nth call,
    delay)."""
    port, pids = str(29900 + random.Random().randrange(2000)), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            rank_process(rank, ranks, port, args, kill, log)
        pids.append(pid)
    deadline, codes = time.time() + seconds, {}
    while len(codes) < ranks:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.time() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("a rank did not end after another one was killed")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run_whole(args: list[str], ranks: int, log: Path):
    """t1.main(args), undisturbed."""
    codes = start_ranks(args, ranks, log)
    assert codes == [0] * ranks, Path(f"{log}.{codes.index(max(codes))}").read_text()[-2000:]


def random_kill(rng: random.Random, ranks: int, resumed: int) -> tuple:
    """(rank, phase, nth call, delay in seconds); the end is only reached by a run that was resumed often."""
    phase = rng.choice([p for p in PHASES if p != "end" or resumed > 9])
    nth = 1 if phase in ONCE else rng.randrange(1, 3 if phase in SAVING else 6)
    return (
        rng.randrange(ranks),
        phase,
        nth,
        rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))),
    )


def check_codes(codes: list[int], killed: int, log: Path):
    """The killed rank died of it; each other one ended by itself, and if it failed it said so in one line."""
    assert codes[killed] == -signal.SIGKILL, codes
    for rank, code in enumerate(codes):
        if rank != killed:
            said = Path(f"{log}.{rank}").read_text()
            assert code in (0, 1), (codes, said)
            one_line = said.count("lost contact with another rank") == 1 and "Traceback" not in said
            assert code == 0 or one_line, said


def run_kills(count: int, ranks: int, seed: int, guess: Path, base: Path) -> Counter:
    """Kill, resume and compare until `count` kills have hit -> how many hit in each phase. AssertionError at the first
    difference."""
    rng, hit, runs, log = random.Random(seed), Counter(), 0, base / "log"
    run_whole(rl_args(guess, base, "whole"), ranks, log)
    whole, args = outcome(base / "whole/rl", STEPS), rl_args(guess, base, "killed")
    while hit.total() < count:
        for resumed in range(min(12, count - hit.total())):
            log.unlink(missing_ok=True)
            kill = random_kill(rng, ranks, resumed)
            codes = start_ranks(args, ranks, log, kill)
            if log.exists():
                hit[log.read_text()] += 1
                check_codes(codes, kill[0], log)
            else:  # the run ended before the kill came
                assert codes == [0] * ranks
        run_whole(args, ranks, log)
        assert outcome(base / "killed/rl", STEPS) == whole, (
            f"seed {seed}: after {dict(hit)} the run is another"
        )
        assert not list((base / "killed/rl").glob("partial-*"))
        shutil.rmtree(base / "killed")
        runs += 1
        where = ", ".join(f"{n} in {phase}" for phase, n in hit.most_common())
        print(
            f"{hit.total()} kills on {ranks} rank(s), {runs} runs, all bit-equal to the undisturbed one: {where}",
            flush=True,
        )
    return hit


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz: damage
# ----------------------------------------------------------------------------------------------------------------------

SLOW = 30  # seconds that one reader may take
MESSAGES = [[dict(role="user", content=3)], [dict(role="user"), dict(content="x")]]
# fmt: off
ODD_VALUES = [
    None, True, 0, -1, 0.5, 1e308, 10**30, float("nan"), float("inf"), [], {}, [[]], {"a": 1}, [1, "a", None],
    "", " ", "\0", "\ud800", "a\udfffb", "x" * 60_000, "9" * 5000, "\\boxed{" * 400, "\\boxed{2}", "25\n", "\u2028",
    "<|endoftext|>", "{problem}", "-" * 3000, "[asy]" * 3000, *MESSAGES,
]
ODD_BYTES = [
    b"", b"\0", b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\n\n", b"caf\xe9", b"\xed\xa0\x80",
    b"\\ud800", b"\\udc00", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b'"',
    b"\\", b",", b"{", b"}", b"null", b"\x1f\x8b", b"PAR1", "é\u2028😀".encode(), b" " * 3000, b'"problem": 1, ',
]
# fmt: on
ODD_CHARACTERS = ["\0", "\ud800", "\r", "\u2028", "}", "{", "\\", "$", ""]
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp500"]
RARE_PATHS = ["pipe", "loop", "device", "folder", "dangling"]
RARE_FILES = [*RARE_PATHS, "missing", "empty", "newline", "not UTF-8", "long name", "no permission"]
RARE_FILES += ["long line", "zeros", "many lines", "not gzip"]


def odd_json(rng: random.Random, value):
    """A copy of a JSON value with one thing changed: a value, a key gone, renamed or added, something nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, result = rng.choice(list(value)), dict(value)
        what = rng.randrange(8)
        if what == 0:
            del result[key]
        elif what == 1:
            names = [
                key.upper(),
                key + "\ud800",
                "",
                "problem",
                "answer",
                "id",
                "settings",
                "x" * 3000,
            ]
            result[rng.choice(names)] = result.pop(key)
        else:
            result[key] = odd_json(rng, value[key])
        return result
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return (
            value[:at]
            + ([odd_json(rng, value[at])] if rng.random() < 0.8 else [])
            + value[at + 1 :]
        )
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice(
            [-value, value + 1, value * 10**9, 0, 1, str(value), float(value), [value]]
        )
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice([*ODD_CHARACTERS, value]) + value[at + 1 :]
    return rng.choice(ODD_VALUES)


def odd_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, inserted, doubled or taken out, one to five times."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        what = rng.randrange(8)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + rng.choice(ODD_BYTES) + data[at:]
        elif what == 2:
            data = data[:at] + data[min(end, at + 50) :]
        elif what == 3:
            data = data[:end] + data[at:end][:5000] + data[end:]
        elif what == 4:
            data = data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\0\n"]))
        else:
            data = bytearray(data or b"x")
            for _ in range(rng.choice([1, 1, 4, 30])):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = bytes(data)
    return data


def odd_text(rng: random.Random, data: bytes) -> bytes:
    """`odd_bytes`, or a change of one line's JSON, or a key that is there twice, or another encoding."""
    what = rng.randrange(10)
    if what < 5:
        lines = data.split(b"\n")
        at = rng.randrange(max(1, len(lines) - 1))
        try:
            value = json.loads(lines[at])
        except ValueError:  # one JSON text on many lines
            value, lines, at = json.loads(data), [b""], 0
        lines[at] = json.dumps(odd_json(rng, value), ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
        return b"\n".join(lines)
    if what == 5:
        keys = re.findall(rb'"(\w+)": ', data)
        return data.replace(b"{", b'{"' + rng.choice(keys or [b"a"]) + b'": 1, ', rng.randint(1, 2))
    if what == 6:
        return data.decode(errors="replace").encode(rng.choice(ENCODINGS), "replace")
    return odd_bytes(rng, data)


LONG_ROW = b'{"problem": "%b", "answer": "1", "pred": "1", "gold": "1"}\n' % (b"x y " * 50_000)
BOMBS = {"zeros": gzip.compress(b"\0" * (20 << 20)), "many lines": gzip.compress(LONG_ROW * 100)}


def rare_file(rng: random.Random, path: Path, data: bytes, kinds=RARE_FILES) -> Path:
    """Something else than a file with text in it, or far more of it, or under an odd name -> the path to read."""
    what = rng.choice(kinds)
    if what == "newline":
        path = path.parent / ("a\nb" + path.name)
    elif what == "not UTF-8":
        path = path.parent / os.fsdecode(b"\xff\xfe" + path.name.encode())
    elif what == "long name":
        return path.parent / (
            300 * "x" + path.name
        )  # too long for any file system: it is not there
    elif what == "folder":
        (path / "a").mkdir(parents=True)
        for name in ("b.jsonl", "c.txt"):
            (path / name).write_bytes(data)
        return path
    elif what == "pipe":
        os.mkfifo(path)
        return path
    elif what in ("loop", "dangling", "device"):
        path.symlink_to(
            {"loop": path, "dangling": path.parent / "nowhere", "device": "/dev/zero"}[what]
        )
        return path
    contents = {
        "empty": b"",
        "long line": data[:50] + b"x" * (17 << 20),
        "not gzip": data + b"\x1f\x8b",
        **BOMBS,
    }
    if what != "missing":
        path.write_bytes(contents.get(what, data))
        path.chmod(0 if what == "no permission" else 0o600)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz: good files
# ----------------------------------------------------------------------------------------------------------------------


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def good_rows() -> list[dict]:
    """Problems and traces, the last of them in another schema."""
    rows = []
    for i in range(6):
        texts = dict(
            problem=f"What is {i} + $\\frac{{{i}}}{{2}}$ as a number?",
            solution=f"It is \\boxed{{{i}}}.",
        )
        response = f"<think>\nhm\n</think>\n\\boxed{{{i}}}"
        rows.append(
            dict(id=f"r{i}", answer=str(i), response=response, source="s", level=i, **texts)
        )
    messages = [
        dict(role="user", content="What is 1+1?"),
        dict(role="assistant", content="\\boxed{2}"),
    ]
    return [
        *rows,
        dict(messages=messages, problem="What is 1+1 then?", answer=2.0, prompt="p", split="test"),
    ]


def good_parquet(folder: Path) -> dict[str, bytes]:
    """The rows as three parquet files of different make."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    layouts = dict(
        plain=dict(compression="NONE", use_dictionary=False),
        snappy=dict(row_group_size=2),
        zstd=dict(compression="zstd", data_page_version="2.0"),
    )
    rows = [row | dict(answer=str(row["answer"]), pred="1", gold="1") for row in good_rows()]
    for name, options in layouts.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / name, **options)
    return {f"parquet {name}": (folder / name).read_bytes() for name in layouts}


def good_models(folder: Path) -> dict:
    """A model folder, the same in shards (file name -> content each), and its tokenizer."""
    cfg = t1.parse_args(["--stage", "rl", "--tiny-width", "8", "--tiny-layers", "1"])
    policy, tokenizer = t1.tiny_policy(cfg)
    for name, size in (("model", "1GB"), ("shards", "5KB")):
        policy.lm.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    models = {
        n: {p.name: p.read_bytes() for p in sorted((folder / n).iterdir())}
        for n in ("model", "shards")
    }
    turn = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    models["model"]["chat_template.jinja"] = (
        turn + "{% if add_generation_prompt %} [assistant]{% endif %}"
    ).encode()
    return models | dict(tokenizer=tokenizer)


def good_files(folder: Path) -> dict:
    """Good files of every kind, to be damaged."""
    wrong = {f"Incorrect Answer {i}": letter for i, letter in ((1, "b"), (2, "c"), (3, "d"))}
    question = {"Question": "What, then?", "Correct Answer": "a", **wrong, "Record ID": "r"}
    pairs = [
        dict(pred="\\frac12", gold="0.5", equal=True, category="c"),
        dict(pred="so \\boxed{3}", gold="4", equal=False, form="response"),
        dict(pred="7", gold="7"),
    ]
    journal = [
        dict(settings=JOURNAL_SETTINGS),
        dict(id="a", pass_rate=0.5),
        dict(id="b", trace=None, why="x", failed=0),
        dict(id="c", trace=dict(id="c"), why="x", failed=1, pass_rate=1),
    ]
    layouts = (Path(t1.__file__).parent / "cases/layouts.jsonl").read_text().splitlines()
    layouts = [case["row"] for case in map(json.loads, layouts) if case["answer"] != "refuse"]
    return dict(
        rows=as_lines(good_rows()),
        layouts=as_lines(layouts),
        json=json.dumps(layouts, indent=1).encode(),
        gpqa=as_lines([question] * 2),
        csv=(",".join(question) + "\n" + 'r,"a, ""b""\n\nc",d,e,f,g\n' * 2).encode(),
        verify=as_lines(pairs),
        journal=as_lines(journal),
        **good_parquet(folder),
        **good_models(folder),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz: kinds of cases. Each makes a damaged file in `folder` -> (its path, the readers to try: functions without
# arguments)
# ----------------------------------------------------------------------------------------------------------------------

JOURNAL_SETTINGS = dict(n=2, model="m")


def rows_case(rng: random.Random, folder: Path, base: dict):
    """Rows as JSON lines, an array, csv, gzip or parquet, through every reader of rows."""
    path, data = folder / "rows.jsonl", base[rng.choice(["rows", "layouts"])]
    if rng.random() < 0.2:
        kind = rng.choice(["json", "csv"])
        path = folder / f"rows.{kind}"
        path.write_bytes((odd_text if kind == "json" else odd_bytes)(rng, base[kind]))
    elif rng.random() < 0.05:
        path = rare_file(rng, path, data)
    elif rng.random() < 0.2:
        path = folder / "rows.jsonl.gz"
        path.write_bytes(
            odd_bytes(rng, gzip.compress(data))
            if rng.random() < 0.7
            else gzip.compress(odd_text(rng, data))
        )
    elif rng.random() < 0.2:
        path = folder / "rows.parquet"
        path.write_bytes(odd_bytes(rng, base["parquet " + rng.choice(["plain", "snappy", "zstd"])]))
    else:
        path.write_bytes(odd_text(rng, data))
    text = str(path)
    cfg = t1.parse_args(["--stage", "rl", "--max-prompt", "2000"])
    data_prep.prepare([], ("latin",))
    readers = [
        partial(read_and_encode, text, stage, base["tokenizer"], cfg) for stage in ("sft", "rl")
    ]
    readers += [
        partial(sift, text),
        partial(read_benchmark, text),
        partial(data_prep.read_problems, text),
    ]
    return path, readers + [
        partial(write_benchmark, source, text) for source in ("gsm8k", "aime24")
    ]


def read_and_encode(path: str, stage: str, tokenizer, cfg: t1.Config):
    t1.encode_prompts(t1.read_rows(path, stage), tokenizer, cfg)


def sift(path: str):
    data_prep.sift(("local", list(data_prep.raw_rows(path))))


def read_benchmark(path: str):
    data_prep.Benchmarks(
        [data_prep.checked_problem(where, raw, "b") for where, raw in data_prep.raw_rows(path)]
    )


def write_benchmark(source: str, path: str):
    json.dumps(data_prep.benchmark_rows(source, path), ensure_ascii=False, allow_nan=False).encode()


def command_case(rng: random.Random, folder: Path, base: dict):
    """Whole commands of data_prep.py: what they print and what they leave."""
    source = rng.choice(["--authors", "--math500", "--gpqa", "--gpqa", "--omni", "--numina"])
    csv = source == "--gpqa" and rng.random() < 0.7
    data = base["csv" if csv else "gpqa" if source == "--gpqa" else "rows"]
    path = folder / f"rows.{'csv' if csv else 'jsonl'}"
    if rng.random() < 0.1:
        path = rare_file(rng, path, data)
    else:
        path.write_bytes(odd_bytes(rng, data) if csv else odd_text(rng, data))
    good = folder / "good.jsonl"
    good.write_bytes(base["rows"])
    commands = {"--authors": ["cot"], "--numina": ["curate", "--processes", "1"]}
    command = commands.get(source, ["benchmarks", "--amc23", str(good)])
    return path, [
        partial(quiet_command, [*command, source, str(path), "--out", str(folder / "out")])
    ]


EXPECTED_WORDS = r"(?m)^data_prep.py: warning: no --decontaminate.*\n|^.*\r.*(\n|$)|^rules: .*(\n|$)|^near-dup.*(\n|$)"


def quiet_command(args: list[str]):
    """data_prep.py; a misuse is raised with what it said on stderr, and nothing else may be said there but progress."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = data_prep.main(args)
    words = re.sub(EXPECTED_WORDS, "", said.getvalue())
    if code == 2:
        raise data_prep.Misuse(words.removesuffix("\n"))
    assert code == 0 and not words, words


def verify_case(rng: random.Random, folder: Path, base: dict):
    """Rows of `verify.py --jsonl`."""
    path = folder / rng.choice(["rows.jsonl", "rows.jsonl.gz"])
    if rng.random() < 0.05:
        path = rare_file(rng, path, base["verify"])
    elif path.suffix == ".jsonl":
        path.write_bytes(odd_text(rng, base["verify"]))
    else:
        path.write_bytes(odd_bytes(rng, gzip.compress(base["verify"])))
    return path, [partial(report_rows, str(path))]


def report_rows(path: str):
    with contextlib.redirect_stdout(io.StringIO()):
        verify.run_rows(path, timeout=1.0)


def journal_case(rng: random.Random, folder: Path, base: dict):
    """The journal that `cot` and `curate --pass-rate` resume from; one that is refused must be left unchanged."""
    path = folder / "journal.jsonl"
    path.write_bytes(odd_text(rng, base["journal"]))
    if rng.random() < 0.05:
        path.unlink()
        path = rare_file(rng, path, base["journal"], RARE_FILES[:7])
    kinds = rng.choice(
        [dict(id=str), dict(id=str, pass_rate=(int, float)), dict(id=str, why=str, failed=int)]
    )
    return path, [partial(read_journal, path, kinds)]


def read_journal(path: Path, kinds: dict):
    before = path.read_bytes() if os.path.isfile(path) else None
    try:
        data_prep.read_journal(path, JOURNAL_SETTINGS, kinds)
    except data_prep.Misuse:
        assert before is None or path.read_bytes() == before, (
            "a journal was changed although it was refused"
        )
        raise


def model_case(rng: random.Random, folder: Path, base: dict):
    """A model folder with one damaged file: config, generation config, tokenizer, chat template, weights whole or in
    shards."""
    files = base[rng.choice(["model", "model", "shards"])]
    name = rng.choice(sorted(files))
    path, data = folder / name, files[name]
    for other in files.keys() - {name}:
        (folder / other).write_bytes(files[other])
    if rng.random() < 0.04:
        rare_file(rng, path, data)
    elif path.suffix == ".safetensors":
        path.write_bytes(odd_safetensors(rng, data))
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_bytes(json.dumps(odd_json(rng, json.loads(data))).encode())
    else:
        path.write_bytes((odd_text if path.suffix == ".json" else odd_bytes)(rng, data))
    return folder, [partial(load_and_generate, str(folder))]


def odd_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Weights with a damaged header (8 bytes of its length, then JSON), or damaged anywhere."""
    size = 8 + int.from_bytes(data[:8], "little")
    what = rng.randrange(4)
    if what == 3:
        return odd_bytes(rng, data)
    header = (
        json.dumps(odd_json(rng, json.loads(data[8:size]))).encode()
        if what < 2
        else odd_bytes(rng, data[8:size])
    )
    return len(header).to_bytes(8, "little") + header + data[size:]


def load_and_generate(folder: str):
    cfg = t1.parse_args(["--stage", "rl", "--max-new", "100", "--max-prompt", "100"])
    policy, tokenizer = t1.load_policy(folder, cfg)
    engine = t1.TorchEngine(tokenizer, cfg)
    engine.load(policy)
    engine.generate([t1.prompt_ids("What is 1 + 1?", tokenizer, cfg)], [range(2)], [0], 3)


def run_folder_case(rng: random.Random, folder: Path, base: dict):
    """config.json, metrics.jsonl and a checkpoint's complete.json of a run that is to resume."""
    cfg = t1.parse_args(["--stage", "rl", "--out", str(folder), "--name", "run"])
    run = t1.RunFolder(cfg)
    run.create("somewhere", [])
    t1.append_rows(
        run.path / "metrics.jsonl",
        [dict(step=i, reward=0.5, honest=None, kl=1e-9) for i in range(9)],
    )
    (run.path / "checkpoint-3").mkdir()
    t1.write_json(run.path / "checkpoint-3/complete.json", {"../metrics.jsonl": 1, "a": 2})
    path = run.path / rng.choice(["config.json", "metrics.jsonl", "checkpoint-3/complete.json"])
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.06:
        rare_file(rng, path, data)
    else:
        path.write_bytes(odd_text(rng, data))
    return run.path, [partial(reopen_run, cfg)]


def reopen_run(cfg: t1.Config):
    run = t1.RunFolder(cfg)
    t1.read_log(run.path / "metrics.jsonl")
    t1.checkpoints(run.path)


KINDS = {  # kind -> (what makes a case of it, how many of 19 cases)
    "rows": (rows_case, 8),
    "commands": (command_case, 2),
    "verify": (verify_case, 2),
    "journal": (journal_case, 2),
    "model": (model_case, 4),
    "run folder": (run_folder_case, 1),
}


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz: the loop
# ----------------------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if not p.is_dir()}


def check_refusal(error: BaseException, name: str):
    """A refusal is one printable line, not a long one, that names the file."""
    line = str(error)
    assert line and line.isprintable() and len(line) <= 2100, f"not one short line: {line!r}"
    assert name[:200] in line or "a reader" in line, f"does not name the file: {line!r}"


def fuzz_case(kind: str, seed: int, case: int, folder: Path, base: dict) -> str:
    """-> "works" if any reader took the file, else "one line"; AssertionError, or whatever a reader raised, is a
    failure."""
    path, readers = KINDS[kind][0](random.Random(f"{seed} {case}"), folder, base)
    name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path.name)
    before, taken = files_in(folder), 0
    for reader in readers:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SLOW)
        faulthandler.dump_traceback_later(2 * SLOW, exit=True)  # for a hang inside a library
        try:
            reader()
            assert not list(folder.rglob("*partial*")), "half an output"
            taken += 1
        except (t1.Stop, SystemExit) as e:
            check_refusal(e, name)
            assert files_in(folder) <= before, "an output of a refused input"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - start < SLOW, "hangs"
    return "works" if taken else "one line"


def too_slow(*_):
    raise AssertionError(f"longer than {SLOW} s")


def run_fuzz(cases: range, seed: int, folder: Path) -> tuple[Counter, list[tuple[int, str, str]]]:
    """-> counts of (kind, outcome), and the failures as (case, kind, traceback)."""
    counts, failures = Counter(), []
    base = good_files(folder)
    kinds = [kind for kind, (_, weight) in KINDS.items() for _ in range(weight)]
    before = signal.signal(signal.SIGALRM, too_slow)
    for case in cases:
        kind, place = kinds[case % len(kinds)], folder / f"case{case}"
        place.mkdir()
        try:
            counts[kind, fuzz_case(kind, seed, case, place, base)] += 1
            shutil.rmtree(place)
        except Exception:
            counts[kind, "FAILED"] += 1
            failures.append((case, kind, traceback.format_exc()))
    signal.signal(signal.SIGALRM, before)
    return counts, failures


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def kills_command(count: int, ranks: int, seed: int) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_kills(count, ranks, seed, make_guess(Path(folder)), Path(folder))
    return 0


def fuzz_command(count: int, seed: int, first: int) -> int:
    """Cases first, ..., first + count - 1; print the table of outcomes -> exit code, 1 for failures."""
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = run_fuzz(range(first, first + count), seed, Path(folder))
    for number, kind, trace in failures:
        print(
            f"FAILED {kind}: python -m experiments.stress fuzz 1 --seed {seed} --case {number}\n{trace}"
        )
    for kind in KINDS:
        print(
            f"{kind:10}",
            ", ".join(f"{n} {outcome}" for (k, outcome), n in sorted(counts.items()) if k == kind),
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{counts.total()} cases, {len(failures)} failed, seed {seed}, peak memory {memory} MiB")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("stress", __doc__, t1_options=False)
    add = parser.add_argument
    add("what", choices=("kills", "fuzz"))
    add("count", type=int, help="number of kills, or of damaged files")
    add(
        "--seed", type=int, default=0, help="of the moments or of the damage (default: %(default)s)"
    )
    add("--ranks", type=int, default=1, help="kills: ranks of the run (default: %(default)s)")
    add(
        "--case",
        type=int,
        default=0,
        help="fuzz: the first of COUNT cases, as a failure names it (default: %(default)s)",
    )
    return experiments.run(parser, stress_command, argv)


def stress_command(own, options: list[str]) -> int:
    if own.count < 1 or own.ranks < 1:
        raise t1.Misuse("COUNT and --ranks must be above 0")
    if own.what == "kills":
        return kills_command(own.count, own.ranks, own.seed)
    return fuzz_command(own.count, own.seed, own.case)


if __name__ == "__main__":
    sys.exit(main())
