"""Problems and traces for T1: what the paper did to its data, with rules that can be read and counted.

    python data_prep.py curate --math PATH --numina PATH --decontaminate PATH ... --out DIR     30,000 clean RL problems
    python data_prep.py cot --problems DIR/rl.jsonl --teacher MODEL --base-url URL --out DIR     cold-start traces
    python data_prep.py benchmarks --out DIR                                                    the evaluation sets in one form
    python data_prep.py embedded --out DIR                                                      the embedded problems and traces

A data set is a local file (.jsonl, .jsonl.gz, .parquet), a folder of such files, or a name of the hub listed in HUB.

Rows are JSON lines:  problem {"id", "problem", "answer", "source", "level"?, "solution"?}
                      trace   {"id", "problem", "response", "answer", "source"}
A response reads `<think> ... </think>` and then the answer in `\\boxed{}`.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import stat
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, lru_cache, partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
from tqdm import tqdm

import verify


class Stop(Exception):
    """The run cannot go on: one line that says what, where, and what to do. Exit code 1."""

    code = 1

    def __str__(self):
        """One line and not a long one, whatever names and texts of the user's stand in it."""
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"


class Misuse(Stop):
    """Something the user gave is wrong. Exit code 2."""

    code = 2


# ----------------------------------------------------------------------------------------------------------------------
# Files and data sets
# ----------------------------------------------------------------------------------------------------------------------

# name on the hub -> [(config, split, file)]; columns are recognised by name, see FIELDS
_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
HUB = {
    "EleutherAI/hendrycks_math": [(subject, "train", None) for subject in _SUBJECTS],  # 7,500 rows; no default config
    "nlile/hendrycks-MATH-benchmark": [(None, "train", None)],  # the 12,000 that are not MATH-500
    "AI-MO/NuminaMath-CoT": [(None, "train", None)],  # 859,494 rows
    "AI-MO/NuminaMath-1.5": [(None, "train", None)],  # 896,215 rows with answers and validity
    "zai-org/T1": [(None, "train", "rl-data.jsonl")],  # the authors' RL problems; the two files have different columns
    "zai-org/T1:sft": [(None, "train", "sft.jsonl")],  # the authors' traces
    "HuggingFaceH4/MATH-500": [(None, "test", None)],
    "HuggingFaceH4/aime_2024": [(None, "train", None)],
    "KbsdJames/Omni-MATH": [(None, "test", None)],
    "openai/gsm8k": [("main", "test", None)],
    "math-ai/amc23": [(None, "test", None)],
}
COLUMNS = set("""id _id row unique_id problem question text answer label solution source level difficulty problem_is_valid solution_is_valid
    question_type messages conversations prompt response url""".split())


ROW_BYTES = 16 << 20  # the longest row; a trace of 32,000 tokens has a hundredth of it
GZIP_BYTES, GZIP_RATIO = 16 << 20, 200  # a file that grows beyond both is a bomb; problems and traces shrink to a fifth


def local_files(name: str) -> list[Path]:
    """The data files of a folder, by name, or the file itself."""
    path = Path(name)
    try:
        name.encode()
        if not stat.S_ISDIR(path.stat().st_mode):
            return [path]
        files = sorted(f for f in path.iterdir() if f.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    except UnicodeEncodeError:
        raise Misuse(f"{name}: a file name must be UTF-8; rename it")
    except FileNotFoundError:
        raise Misuse(f"{name}: no such file, and not one of the data sets known on the hub ({', '.join(HUB)})")
    except (OSError, ValueError) as e:
        raise Misuse(f"{name}: cannot be read ({getattr(e, 'strerror', None) or e})")
    if not files:
        raise Misuse(f"{name}: no .jsonl, .jsonl.gz or .parquet file in this folder")
    return files


def raw_rows(name: str, columns=COLUMNS):
    """Rows of a data set as (where, raw) with raw a line of JSON (bytes) or a dict; read as a stream, never held whole."""
    if name in HUB and not os.path.exists(name):
        yield from hub_rows(name, columns)
        return
    for file in local_files(name):
        yield from parquet_rows(file, columns) if file.suffix == ".parquet" else json_lines(file)


def row_at(where) -> str:
    return f"{where[0]}, row {where[1]}"


def open_file(path: Path):
    """An ordinary file for reading, as bytes. A pipe or a device, which may never end, is refused without being opened."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Misuse(f"{path}: not a file but a folder, a pipe or a device; copy its content into a file")
    return open(path, "rb")


def byte_lines(path: Path):
    """(where, line) of each line, plain or gzipped (whatever its name says), without a byte order mark; in bounded memory."""
    try:
        with open_file(path) as plain:
            zipped = plain.peek(2)[:2] == b"\x1f\x8b"
            f = gzip.GzipFile(fileobj=plain) if zipped else plain
            room = max(GZIP_BYTES, GZIP_RATIO * os.fstat(plain.fileno()).st_size) if zipped else math.inf
            for number, line in enumerate(iter(partial(f.readline, ROW_BYTES + 1), b""), 1):
                room -= len(line)
                if len(line) > ROW_BYTES:
                    raise Misuse(f"{path}, row {number}: longer than {ROW_BYTES >> 20} MiB; one row a line, ended by \\n")
                if room < 0:
                    raise Misuse(f"{path}, row {number}: the gzip file grows to more than {GZIP_RATIO} times its size; unpack it if it is no bomb")
                yield (str(path), number), line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, EOFError, zlib.error, ValueError) as e:
        damaged = "" if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile) else "damaged gzip file: "
        raise Misuse(f"{path}: cannot be read ({damaged}{getattr(e, 'strerror', None) or e})")


def json_lines(path: Path):
    """(where, line) of each line that is not blank."""
    return ((where, line) for where, line in byte_lines(path) if line.strip())


def parquet_rows(file: Path, columns):
    """(where, row) with the wanted columns only: NuminaMath's `messages` repeat problem and solution."""
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_file(file) as f:
            table = pq.ParquetFile(f)
            names = table.schema_arrow.names
            if twice := [c for c, n in Counter(names).items() if n > 1]:
                raise Misuse(f"{file}: column {twice[0]!r} is there twice")
            wanted = [c for c in names if c in columns and (c != "messages" or "problem" not in names)]
            for batch in table.iter_batches(200, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    if sum(len(v) for v in row.values() if isinstance(v, (str, bytes))) > ROW_BYTES:
                        raise Misuse(f"{file}, row {number}: longer than {ROW_BYTES >> 20} MiB")
                    yield (str(file), number), row
    except Misuse:
        raise
    except Exception as e:  # whatever a damaged file makes the library raise
        raise Misuse(f"{file}: cannot be read as parquet (after row {number}: {type(e).__name__}: {e})")


def hub_rows(name: str, columns):
    """(where, row) of a data set of the hub, streamed."""
    from datasets import load_dataset

    for config, split, file in HUB[name]:
        try:
            rows = load_dataset(name.split(":")[0], config, split=split, data_files=file, streaming=True)
            for number, row in enumerate(rows, 1):
                yield (config or name.split("/")[1].replace(":", "-"), number), {c: v for c, v in row.items() if c in columns}
        except (OSError, ValueError) as e:  # connection, missing repository, missing split
            raise Misuse(f"{name}: cannot be loaded from the hub ({' '.join(str(e).split())[:200]}); give a local copy instead")


def _unique(pairs: list) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"key {next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)!r} is there twice")
    return row


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return number


def parse_json(raw: bytes):
    """The value of a JSON text; ValueError or RecursionError for what JSON, UTF-8 or a careful reader does not allow."""
    value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_float=_number, parse_constant=_number)
    if b"\\ud" in raw or b"\\uD" in raw:  # half of a surrogate pair is no text: no file and no tokenizer takes it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> dict:
    """A file that is one JSON object, such as a config.json."""
    try:
        with open_file(path) as f:
            value = parse_json(f.read(ROW_BYTES))
    except (OSError, ValueError, RecursionError) as e:
        raise Misuse(f"{path}: damaged, or no JSON file ({getattr(e, 'strerror', None) or e}); repair it or take another folder")
    if not isinstance(value, dict):
        raise Misuse(f"{path}: damaged: a JSON object is wanted, not a {type(value).__name__}; repair it or take another folder")
    return value


def parse(where, raw) -> dict:
    """A raw row as a dict, or one line that says where it is broken."""
    if isinstance(raw, dict):
        return raw
    try:
        row = parse_json(raw)
    except UnicodeDecodeError as e:
        raise Misuse(f"{row_at(where)}: not UTF-8 text (byte {raw[e.start]:#x} in column {e.start + 1}); save the file as UTF-8")
    except UnicodeEncodeError:
        raise Misuse(f"{row_at(where)}: half of a surrogate pair (\\ud800 to \\udfff), which is no text; repair or remove the line")
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg} in column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
        nul = "; it holds NUL bytes: damaged, or UTF-16 instead of UTF-8" if b"\0" in raw else ""
        raise Misuse(f"{row_at(where)}: not JSON ({reason}{nul}); repair or remove the line")
    if not isinstance(row, dict):
        raise Misuse(f"{row_at(where)}: a row must be a JSON object")
    return row


def field(row: dict, names: str, where) -> str | None:
    """The first of several fields that is there, as text; None if none is."""
    for name in names.split():
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return str(int(value)) if value == int(value) else str(value)  # amc23 writes 27.0
        if isinstance(value, str):
            return value
        if value is not None:
            raise Misuse(f"{row_at(where)}: field {name!r} must be text, not {type(value).__name__}")
    return None


def to_problem(where, raw, default_source: str) -> dict:
    """Any source's row as {"id", "problem", "answer" (None: look into the solution), "solution", "source", "level"}.

    Reads MATH, NuminaMath-CoT and -1.5, the authors' RL rows (text, label, _id) and every benchmark by their column names.
    """
    row = parse(where, raw)
    problem = field(row, "problem question text", where)
    if problem is None:
        raise Misuse(f"{row_at(where)}: field 'problem' (or 'question', 'text') is missing; found {', '.join(sorted(row)) or 'no field'}")
    stem = os.path.basename(where[0]).split(".")[0]
    own = next((row[k] for k in ("id", "_id", "unique_id", "row") if row.get(k) is not None), None)
    source = row.get("source") if "domain" not in row else "omni_math"  # Omni-MATH's `source` is the contest
    if "_id" in row:
        source = re.sub(r"_?\d+$", "", row["_id"]) if isinstance(row["_id"], str) else "math"
    level = re.sub(r"^Level ", "", str(row.get("level", row.get("difficulty", ""))))
    return {
        "id": own if isinstance(own, str) else f"{stem}-{where[1] if own is None else own}",
        "problem": problem,
        "answer": field(row, "answer label", where),
        "solution": field(row, "solution", where) or "",
        "source": source if isinstance(source, str) and source else default_source,
        "level": float(level) if re.fullmatch(r"\d{1,9}\.\d{1,9}", level) else int(level) if re.fullmatch(r"\d{1,9}", level) else None,
        "flags": {k: row[k] for k in ("problem_is_valid", "solution_is_valid", "question_type") if k in row},
    }


LONGEST = 50_000  # characters of a problem, a solution or an answer: the comparisons of texts are no longer linear beyond


def too_long(row: dict) -> bool:
    return any(len(row[name] or "") > LONGEST for name in ("problem", "solution", "answer"))


def checked_problem(where, raw, default_source: str) -> dict:
    """`to_problem` for data whose every row counts: what is too long is an error, where `curate` drops it from a pool."""
    row = to_problem(where, raw, default_source)
    if too_long(row):
        raise Misuse(f"{row_at(where)}: problem, solution or answer of more than {LONGEST:,} characters; shorten or remove the row")
    return row


def write_beside(path: Path, content: str | bytes):
    """Written beside, then renamed: a half-written file never has the final name."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def out_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Misuse(f"--out {path}: not a folder that can be made ({e.strerror})")
    return Path(path)


def ordered_map(function, items, processes: int, setup, setup_args):
    """function over items in order, by several processes, with a bounded number under way: memory does not grow with the input."""
    if processes == 1:
        setup(*setup_args)
        yield from map(function, items)
        return
    with multiprocessing.get_context("spawn").Pool(processes, setup, setup_args) as pool:
        under_way = deque()
        for item in items:
            under_way.append(pool.apply_async(function, (item,)))
            if len(under_way) > 3 * processes:
                yield under_way.popleft().get()
        while under_way:
            yield under_way.popleft().get()


def chunks(rows, size: int):
    """Lists of up to `size` rows."""
    part = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


# ----------------------------------------------------------------------------------------------------------------------
# The text of a problem, made comparable
#
# Every comparison (duplicates, benchmarks) is made on tokens, not on white-space words: `x^2` and `x^{2}`, `\{1` and
# `\{ 1`, `\dfrac12` and `\frac{1}{2}` are the same tokens, while operators, signs and decimal points stay.

_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{\s*([a-zA-Z]+)\*?\s*\}(?:\s*\{[lcr|@{} ]*\})?")
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|$)|\\begin\{asy\}.*?\\end\{asy\}", re.S)
_TOKEN = re.compile(r"\$+|\\[()\[\]]|\\[a-zA-Z]+|\\.|(?:\d+(?:\.\d+)?|\.\d+)|[a-z]+|[^\s{}\w]|[^\W\d_]|[_^]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|,?\\!|\\,)(?=\d{3}(?!\d))")
_SHORT_FRACTION = re.compile(r"(\\[dtc]?frac)\s*(\d)\s*(?=\d)")  # \frac12 is 1/2, not a fraction of 12
_BULLET = re.compile(r"(?:^|\n)\s*[-*\u2022]\s+(?=[A-Za-z$\\(])")
_WORD_HYPHEN = re.compile(r"(?<=[a-zA-Z]{2})-(?=[a-zA-Z]{2})")
_BLANK = re.compile(r"(?:\\_|_){2,}|\\underline\s*\{[\s\\,;:~]*\}|\\\\(?:\[[^\]]*\])?")
_UNICODE = str.maketrans({
    "²": "^2", "³": "^3", "≤": r"\leq ", "≥": r"\geq ", "⩽": r"\leq ", "⩾": r"\geq ", "≦": r"\leq ", "≧": r"\geq ",
    "≠": r"\neq ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "−": "-", "–": "-", "—": " ",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "ω": r"\omega ",
    "°": r"^\circ ", "∞": r"\infty ", "√": r"\sqrt ", "∠": r"\angle ", "△": r"\triangle ", "∈": r"\in ",
    "…": r"\dots ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"'})
# One name for what is written in several ways; an empty name drops the token.
_ALIAS = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\le": "\\leq", "\\leqslant": "\\leq",
          "\\ge": "\\geq", "\\geqslant": "\\geq", "\\ne": "\\neq", "\\to": "\\rightarrow", "\\cdots": "\\dots",
          "\\ldots": "\\dots", "\\dotsc": "\\dots", "\\dotsb": "\\dots", "\\lvert": "|", "\\rvert": "|", "\\vert": "|",
          "\\mid": "|", "\\times": "\\cdot", "\\ast": "*", "\\gt": ">", "\\lt": "<", "\\lbrace": "\\{",
          "\\rbrace": "\\}", "\\degree": "\\circ", "\\epsilon": "\\varepsilon", "\\phi": "\\varphi",
          "\\bmod": "\\mod", "\\pmod": "\\mod", "\\diamond": "\\Diamond"}
_ALIAS |= dict.fromkeys(
    r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits \nolimits \, \; \: \!
    \quad \qquad \text \textbf \textit \textrm \mathrm \mathbf \mathit \mathcal \mathbb \mathsf \operatorname \mbox \hbox
    \rm \bf \it \overline \hspace \vspace \hfill \noindent \medskip \par \item \label \ $ $$ . , ; : ? ! ' " ` ~ &""".split()
    + ["\\ ", "\\$", "\\(", "\\)", "\\[", "\\]"], "")
_ALIAS |= {"\\%": "%", "\\prime": "'"}


# Words that say nothing about what is asked. NOT IN PAPER: a short list, read off true pairs.
_HARMLESS = set("""a an the of in on at by to for from is are be was were it its this that these those there here we you your
    if then let given suppose assume consider where when such with and or as so also now please note find compute calculate
    determine evaluate solve what which value values answer express write written enter give number numbers real reals
    following problem have has had does do can one could will would must may using use figure diagram shown above below
    centre center respectively both each all any some possible denote denotes denoted called say simplest form common fraction
    s th expression""".split())


def tokens(text: str) -> list[str]:
    """A problem as LaTeX-aware tokens: words, single letters, numbers, operators, commands; no braces, no punctuation."""
    text = _DRAWING.sub(" ", unicodedata.normalize("NFC", text)).translate(_UNICODE)
    text = _ENVIRONMENT.sub(" ", _BLANK.sub(" ", _WORD_HYPHEN.sub(" ", _THOUSANDS.sub("", _BULLET.sub(" ", _SHORT_FRACTION.sub(r"\1 \2 ", text))))))
    found, last = [], ""
    for token in _TOKEN.findall(_lower_words(text)):
        if token in "!'" and (len(last) == 1 and last.isalnum() or last.isdigit() or last == ")"):
            found.append(token)  # n! and f'(x) are no punctuation
        elif len(token) <= 3 and token.isalpha() and token not in _HARMLESS:
            found += token  # `ab` and `a b` are the same product; a short word falls apart on both sides alike
        elif name := _ALIAS.get(token, token):
            found.append(name)
        last = token
    return found


_CAPITAL_COMMAND = re.compile(r"\\[a-z]*[A-Z]")


def _lower_words(text: str) -> str:
    """Lower case, but commands keep theirs: `\\Gamma` is not `\\gamma`."""
    if not _CAPITAL_COMMAND.search(text):
        return text.lower()
    return re.sub(r"\\[a-zA-Z]+|[A-Z]+", lambda m: m[0] if m[0][0] == "\\" else m[0].lower(), text)


def key(words: list[str]) -> str:
    """Tokens as one string without spaces: equal for texts that differ in spacing, braces and synonyms only."""
    return re.sub(r"(?<=\d) (?=[\d.])", ",", " ".join(words)).replace(" ", "")


_SIGN = re.compile(r"[\d.]*\d|\\[a-zA-Z]+|[-+/=<>^!%|*']")
_QUIET = {"\\cdot", "*", "\\dots", "\\circ", "^", "|"}  # present or absent by taste: a b, a \cdot b; |S|, #S; 30, 30 degrees


def signs(words: list[str]) -> list[str]:
    """The tokens that make a problem this one and not its neighbour: numbers, operators, signs, functions."""
    return [w for w in words if w not in _QUIET and _SIGN.fullmatch(w)]


def drawing(text: str) -> str:
    """The code of the drawings in a problem, without spaces: two problems may differ in nothing else."""
    return re.sub(r"\s", "", "".join(_DRAWING.findall(text)))


def skeleton(words: list[str]) -> list[str]:
    """Tokens without brackets and harmless words: what is left of `tan^2(20)` and `tan^2 20`, `find` and `what is`."""
    return [w for w in words if w not in _HARMLESS and w not in _BRACKETS]


_BRACKETS = set("()[]|") | {"\\{", "\\}"}
CLAUSE = 6  # tokens; NOT IN PAPER: an insertion this long is a clause of its own (a hint, a credit, the form of the answer)


def alike(a: list[str], b: list[str]) -> bool:
    """Do two lists hold mostly the same tokens (Dice at least 0.7), or is one inside the other but for a tenth?"""
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common >= 0.7 * (len(a) + len(b)) or common >= 0.9 * min(len(a), len(b))


def same_problem(a: list[str], b: list[str], same_answer: bool) -> bool:
    """Do two token lists with a common stretch state the same problem?

    With equal answers, most of the words and signs in common are enough. With different answers (one of them may be wrong,
    or ask for another form) the texts may differ in harmless words and clauses added to one of them only, never in a number
    or a sign: `z^4 - z^2 + 1` and `z^4 + z^2 + 1`, tan 225 and tan 22.5 stay apart. NOT IN PAPER: the thresholds.
    """
    a, b = skeleton(a), skeleton(b)
    if not (alike(a, b) and alike(signs(a), signs(b))):
        return False
    if same_answer:
        return True
    added = set()
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "replace" or tag != "equal" and a1 - a0 + b1 - b0 < CLAUSE:
            return False
        added.add(tag)
    return not {"insert", "delete"} <= added


# ----------------------------------------------------------------------------------------------------------------------
# curate: which rows can a rule grade? Each rule takes a row and returns why it goes, or None
# ----------------------------------------------------------------------------------------------------------------------

_BAD_SYMBOLS = [(re.compile(p), r) for p, r in (
    (r"\\equal\s*\{\}", "="), (r"\\minus\s*\{\}", "-"), (r"\\plus\s*\{\}", "+"), (r"\x0c(?=rac)", r"\\f"), (r"\x08(?=inom|oxed|egin|ar\b)", r"\\b"),
    (r"\x0b(?=ec\b|ert)", r"\\v"), (r"\t(?=imes\b|ext\b|ext\{|frac\b|heta\b|an\b)", r"\\t"), (r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]", ""),
    (r"\r\n?", "\n"), (r"[\xa0\u3000]", " "), ("\ufb00", "ff"), ("\ufb01", "fi"), ("\ufb02", "fl"),
    (r"(?<=[A-Za-z}])\\_(?=[A-Za-z0-9{])", "_"), (r"(?<!\\)\\\\(?=[()](?!\[)|[dt]?frac|sqrt|left|right|pi\b|text|times|cdot|sin|cos|tan|log|ln|alpha|theta)", r"\\"))]
_NEEDS_REPAIR = re.compile("[\x00-\x09\x0b-\x1f\x7f\xa0\u3000\u200b\ufeff\ufb00-\ufb02]|\\\\(?:equal|minus|plus)\\b|\\\\_|\\\\\\\\[()a-z]")


def repair(text: str) -> str:
    """Typographic damage of the sources undone: `\\equal{}`, form feeds that were the \\f of \\frac, ligatures."""
    if _NEEDS_REPAIR.search(text):
        for pattern, replacement in _BAD_SYMBOLS:
            text = pattern.sub(replacement, text)
    return text.strip()


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")


def boxes(text: str) -> list[str | None]:
    """The content of every outermost box, in order; None for a box whose braces do not close."""
    found, end = [], 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # nested in the one before
        at = match.end()
        if text[at : at + 1] != "{":
            found.append(text[at : at + 1] or None)  # `\boxed 2`
            continue
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[at : at + 2000], re.S):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = at + brace.end()
                found.append(text[at + 1 : end - 1])
                break
        else:
            found.append(None)
    return found


_WRAPPED = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]"
    r"|\\boxed\s*\{((?:(?!\\boxed).)*)\}", re.S)


def bare(answer: str) -> str:
    """An answer without dollars, brackets of display mathematics, a box around it, or a full stop."""
    answer = repair(answer).rstrip(".").strip()
    while match := _WRAPPED.fullmatch(answer):
        inner = next(g for g in match.groups() if g is not None)
        if match[4] is not None and "," in inner and "\\boxed" not in inner:
            return f"[{inner}]"  # \[-2, 2\] is an interval that someone escaped
        answer = inner.strip().rstrip(".")
    return answer


_GOES_ON = re.compile(  # `\boxed{2}$ and $f(1) = 3$`, `\boxed{2}$, $4$`
    r"\s*(?:\\[)\]]|\$+)?\s*,?\s*(?:(?:and|or|if|for (?:all|any|every|some))\s*(?:\\[(\[]|\$)|is either\b)"
    r"|\s*(?:\\[)\]]|\$+),\s*(?:\\[(\[]|\$)")


def find_answer(row: dict) -> str | None:
    """Puts the answer into the row: from the answer column, else from the last box of the solution (paper: answers extracted)."""
    if row["answer"] is not None:
        row["answer"] = bare(row["answer"])
        box = bare((boxes(row["solution"]) or [""])[-1] or "")
        if box and not _LETTER.fullmatch(plain_text(box)) and not same_answer(box, row["answer"]):
            return "answer and box differ"
        return None if row["answer"] else "empty answer"
    raw = boxes(row["solution"])
    if not raw:
        return "no box"
    if None in raw:
        return "unbalanced box"
    found = [bare(b) for b in raw]
    if not found[-1]:
        return "empty answer"
    row["answer"] = found[-1]
    last = row["solution"].rfind("{" + raw[-1] + "}")
    if last >= 0 and _GOES_ON.match(row["solution"], last + len(raw[-1]) + 2):
        return "answer goes on after the box"
    if any(b != found[-1] and key(tokens(b)) != key(tokens(found[-1])) and not verify.is_equal(b, found[-1]) for b in set(found)):
        return "several different boxes"
    return None


def marked_invalid(row: dict) -> str | None:
    """NuminaMath-1.5 says itself which rows are incomplete, proofs or multiple choice."""
    flags = row["flags"]
    if flags.get("question_type") == "proof" or row["answer"] in ("proof", "notfound"):
        return "proof"
    if flags.get("question_type") == "MCQ":
        return "multiple choice"
    if any(flags.get(k, "Yes") != "Yes" for k in ("problem_is_valid", "solution_is_valid")):
        return "marked invalid by its source"
    return None


_LINK = re.compile(r"https?:|www\.|!\[|\\includegraphics|\.(?:png|jpe?g|gif|svg)\b|\[img|<img", re.I)
_FIGURE_NAME = r"(?:figure|diagram|picture|image|drawing|sketch|graph|chart|map|grid|illustration|net)s?"
_FIGURE = re.compile(
    rf"\b(?:in|from|on|see|per|using|to)\s+(?:the|this|each|these)\s+(?:\w+\s+){{0,2}}?(?:figure|diagram|picture|image"
    rf"|drawing|sketch|illustration)s?\b"
    rf"|\b{_FIGURE_NAME}\s+(?:(?:is|are|as|given|of\s+\S+(?:\s+(?:is|are))?)\s+)*(?:shown|below|above|pictured"
    rf"|at (?:the )?right|on the (?:left|right))\b"
    rf"|\b(?:shown|pictured|drawn|depicted|illustrated|given)\s+(?:below|above|here|in\s+(?:the\s+)?(?:fig|diagram"
    rf"|pict)|to the (?:left|right)|at (?:the )?(?:left|right))"
    rf"|\bas\s+(?:is\s+)?(?:shown|pictured|illustrated|depicted)\b|\bfig(?:ure|\.)\s*\d"
    rf"|\(\s*see\s+(?:the\s+)?(?:illustration|figure|diagram|picture|image|drawing|fig)|\bthe\s+(?:following"
    rf"|accompanying|adjoining)\s+{_FIGURE_NAME}"
    rf"|\b(?:following|accompanying|adjoining)\s+{_FIGURE_NAME}\b|\bpictured\b|\bthe\s+(?:figure|diagram|picture|graph"
    rf"|chart|table)s?\s+(?:indicates?|shows?|represents?|gives?)\b|\btable\s+(?:below|above|shown)", re.I)
_FIGURE_WORDS = "figure fig. diagram picture image drawing sketch graph chart grid illustrat shown depicted below above drawn".split()
_DRAWN = re.compile(r"\[asy\]|\\begin\{(?:tikzpicture|asy|tabular|array|matrix)|\|[^|\n]+\|[^|\n]+\|")


def holds(row: dict, words: list[str]) -> bool:
    """Does the problem hold one of these strings? Ten times faster than the regular expression that then decides."""
    lower = row["lower"]
    return any(word in lower for word in words)


def missing_figure(row: dict) -> str | None:
    if _LINK.search(row["words"]):
        return "link or missing figure"
    return "link or missing figure" if holds(row, _FIGURE_WORDS) and _FIGURE.search(row["words"]) and not _DRAWN.search(row["problem"]) else None


SCRIPTS = {  # Greek letters and the letter-like symbols of mathematics are welcome everywhere
    "latin": "", "cyrillic": "\u0400-\u052f", "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff", "kana": "\u3041-\u30ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af", "arabic": "\u0600-\u06ff", "hebrew": "\u05d0-\u05f4", "devanagari": "\u0900-\u097f", "thai": "\u0e01-\u0e5b"}


@lru_cache
def foreign(scripts: tuple[str, ...]) -> re.Pattern:
    """Letters of the scripts that were not asked for; private-use characters and U+FFFD always."""
    return re.compile("[\ue000-\uf8ff\ufffd" + "".join(letters for name, letters in SCRIPTS.items() if name not in scripts) + "]")


def other_script(row: dict, scripts: tuple[str, ...]) -> str | None:
    return "another script" if foreign(scripts).search(row["problem"]) or foreign(scripts).search(row["answer"] or "") else None


_PROOF = re.compile(r"\bprove\b(?! your)|(?:^|[.,;:)]\s*|\b(?:and|then|to|you|please)\s+)show\s+that\b|\bdisprove\b"
    r"|\bdemonstrate\s+that\b|\bverify\s+that\b|\bjustify\b|(?:^|[.;]\s+|\band\s+)construct\b|(?:^|[.;]\s+)show\b|\b(?:compass"
    r"|straightedge|ruler) and\b|\bshow:|\bgive a proof\b", re.I)

_PROVED = re.compile(r"\W*(?:\\text\s*\{)?\W*(?:proof|proved|proven|qed|\\blacksquare)\W*", re.I)
_PROOF_WORDS = "prove proof show demonstrat verify justify construct compass straightedge ruler".split()


def proof(row: dict) -> str | None:
    asked = holds(row, _PROOF_WORDS) and _PROOF.search(row["words"])
    return "proof" if asked or row["answer"] and _PROVED.fullmatch(row["answer"]) else None


_OPTION = [re.compile(p, re.S) for p in (  # at least three options in order
    r"(?<![A-Za-z\\])\(\s*A\s*\).{1,400}?(?<![A-Za-z\\])\(\s*B\s*\).{1,400}?(?<![A-Za-z\\])\(\s*C\s*\)",
    r"\\(?:text|textbf|mathrm|mathbf|bf|rm)\s*\{\s*\(?\s*A\s*[).].{1,400}?\{\s*\(?\s*B\s*[).].{1,400}?\{\s*\(?\s*C\s*[).]",
    r"(?:^|\n|\s{2}|\$)\s*\(?A\s*[).:、].{1,400}?(?:\n|\s)\s*\(?B\s*[).:、].{1,400}?(?:\n|\s)\s*\(?C\s*[).:、]",
    r"\*\*\s*\(?A\s*[).:].{1,400}?\*\*\s*\(?B\s*[).:].{1,400}?\*\*\s*\(?C\s*[).:]",
    r"(?<![A-Za-z\\])A[).:]\s.{1,200}?\sB[).:]\s.{1,200}?\sC[).:]\s.{1,200}?\sD[).:]\s")]
_WHICH = re.compile(r"\bwhich\s+(?:one\s+)?(?:\w+\s+)?of\s+(?:the\s+following|these)\b|\bwhich\s+(?:following|option|choice"
    r"|statement)\b|\bamong the following\b"
                    r"|\bthe following (?:statement|conclusion|proposition|option)s?\b|\b(?:correct|incorrect)\s+(?:option"
    r"|statement)\b|letter of the correct", re.I)
_WHICH_WORDS = "which following letter correct".split()
_SMALL_OPTIONS = re.compile(r"\(a\).+\(b\).+\(c\).+\(d\)", re.S)
_LETTER = re.compile(r"\(?\s*[A-Ha-h]\s*\)\s*.*|[A-H]\s*[.:].*|[A-H](?:\s*(?:,|and|or|;)\s*[A-H])*|.*[\d)}]\s*[,(]\s*[A-E]\s*\)?"
    r"|.*\\(?:implies|[rR]ightarrow|Longrightarrow|to)\W*[A-E]\W*", re.S)
_FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm|it|boldsymbol|quad|qquad)(?![a-zA-Z])|[{}$~]|\*\*"
    r"|\\[ ,;!:]")


def multiple_choice(row: dict) -> str | None:
    """Options in the problem, or an answer that is a letter, also one whose options are gone (three quarters of amc_aime)."""
    if holds(row, _WHICH_WORDS) and _WHICH.search(row["words"]) or any(p.search(row["words"]) for p in _OPTION):
        return "multiple choice"
    letter = plain_text(row["answer"])
    return "multiple choice" if _LETTER.fullmatch(letter) or re.fullmatch("[a-e]", letter) and _SMALL_OPTIONS.search(row["words"]) else None


def plain_text(answer: str) -> str:
    """An answer without fonts, braces and spacing commands."""
    return _FONTS.sub(" ", answer).strip(" .")


_YES_NO = re.compile(r"(?:yes|no(?!\s+(?:\w+\s+)?(?:solution|value|number|root|integer))|true|false|correct|incorrect|possible"
    r"|impossible|not\s+(?:possible|always|necessarily|true)|always|never|exists?|it is (?:im)?possible)\b.*", re.I | re.S)
_WHETHER_WORDS = "whether,if it,or false,or no,there exist,is it".split(",")
_WHETHER = re.compile(r"\b(?:determine|decide|state|judge|check|find\s+out|ask|investigate|examine)\s+(?:whether|if it)\b|(?:^"
    r"|[.?!,:]\s+)(?:(?:does|do)\s+there\s+exist|is\s+it\s+(?:possible|true|necessar\w+|always))\b|\btrue or false\b"
    r"|\byes or no\b", re.I)


def yes_or_no(row: dict) -> str | None:
    answer = plain_text(row["answer"])
    return "yes or no, true or false" if _YES_NO.fullmatch(answer) or holds(row, _WHETHER_WORDS) and _WHETHER.search(row["words"]) else None


_NUMERAL = r"(?:[1-5]|[a-e]|i{1,3}|iv|I{1,3}|IV|Ⅰ|Ⅱ|Ⅲ)"
_PART = re.compile(  # (1) but not f(1); a) at the beginning of a line or sentence; 1. at the beginning of a line; circled numbers
    rf"(?<![A-Za-z\d_^}}\\])\$?(?:\\*\()?\(\s*{_NUMERAL}\s*\)(?:\\*\))?\$?(?!\s*[,=^_+*/])|(?:^|(?<=[\n.:;?!>]))\s*\*{{0,2}}{_NUMERAL}\)|(?:^|(?<=\n))\s*\*{{0,2}}[1-5]\.\s"
    r"|\\text\{\s*\(?[a-eA-E1-5]\)\s*\}|[①②③④⑤]|\b(?:Part|Question)\s+[A-D1-4]\b")
_LIST_OF_TASKS = re.compile(r"\W*(?:calculate|compute|evaluate|simplify|factor\w*|solve|find|determine|write|express)\b(?!.*\b(?:that"
    r"|satisf\w+|conditions?|where|such|if)\b).{0,80}", re.I | re.S)  # Calculate: (1) ... (2) ...
_BLANKS = re.compile(r"(?:\\?_\s?){2,}")
_QUANTITY = r"(?:(?:max|min)imum|largest|smallest|greatest|least|highest|lowest|area|perimeter|volume|average|mean|median|variance|standard deviation|length|measure|equation|probability)"
_AND_WHAT = re.compile(r"\b(?:what|how many|how much)\b[^.?]*\band\s+(?:what|how many|how much)\b", re.I)
_ALSO = re.compile(r"\balso,?\s+(?:find|determine|calculate|compute|give|what)\b", re.I)
_TWO_QUANTITIES = re.compile(rf"\b(?:find|determine|calculate|compute|what\s+(?:is"
    rf"|are))\s+(?:both\s+)?(?:the\s+)?{_QUANTITY}\b[^.?]*?\band\s+(?:the\s+)?{_QUANTITY}\b", re.I)
_ONE_OF_TWO = re.compile(r"sum|product|differ|ratio|between|total|combin|quotient|times|plus|minus|more than|less than|respectively|equal"
    r"|add", re.I)
_TASK = re.compile(  # a part asks: a question mark, or an order at its beginning or after a comma, "and", "then"
    r"\?|(?:^\W*|[.,;:]\s+|\b(?:and|then|also)\s+)(?:please\s+)?(?:find|what|determine|calculate|compute|evaluate|how"
    r"|solve|write|express|derive|establish"
    r"|give|state|factor|simplify|draw|explain|prove|show|investigate|discuss|sketch|list|fill|complete|translate"
    r"|estimate|for (?:which|what))|^\W*(?:who|which|where)\b", re.I)
_ANSWER_PART = re.compile(r"(?:\(\s*(?:1|i|a|I)\s*\)|①|(?:^|[\s,;])[a1]\s*\)).+(?:\(\s*(?:2|ii|b|II)\s*\)|②|[\s,;][b2]\s*\))", re.S)


def several_questions(row: dict) -> str | None:
    """Parts that each ask something, two blanks, two questions, two quantities but one value, or an answer in marked parts."""
    head, *parts = _PART.split(row["words"])
    several = (
        sum(bool(_TASK.search(part)) for part in parts) >= 2
        or len(parts) >= 2 and _LIST_OF_TASKS.fullmatch(head) is not None
        or _ALSO.search(row["words"]) or _AND_WHAT.search(row["words"])
        or len(_BLANKS.findall(row["words"])) >= 2
        or row["words"].count("?") >= 2 and _two_questions(row["words"])
        or _TWO_QUANTITIES.search(row["words"]) and not re.search(r",|and|\\pm|=", row["answer"]) and not _ONE_OF_TWO.search(row["words"])
        or _ANSWER_PART.search(plain_text(row["answer"])))
    return "several questions" if several else None


def _two_questions(problem: str) -> bool:
    """The last two sentences that end in a question mark both ask for a quantity."""
    asked = [s for s in re.split(r"(?<=[?.!])\s+", problem) if s.endswith("?") and re.search(r"\b(?:what|how|find|who|when|where|which)\b", s, re.I)]
    return len(asked) >= 2


MAX_ANSWER = 50  # characters; longer ones are prose or systems that no rule grades
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_VALUE_WORDS = {"and", "sin", "cos", "tan", "log", "frac", "sqrt", "square", "cubic", "per", "hours", "minutes", "seconds", "the", "base", "pmatrix", "begin", "end"}
_NO_VALUE = re.compile(r"\\(?:perp|parallel|cong|sim|implies|iff|forall|exists|(?:Left)?[rR]ightarrow|nmid)(?![a-zA-Z])"
    r"|^\(\w,\s*\d+\)\s*=|clarif|unique|cannot|undetermined|insufficient|unknown|answer|depends|not given"
    r"|certain conditions|\b(?:is|are|powers?|multiples?|numbers?|integers?|primes?|such|choice|option)\b|\bnone of"
    r"|\\[lc]?dots|…", re.I)


def not_a_value(row: dict) -> str | None:
    """Too long, or prose: more than two words are a statement, which a rule can only compare letter by letter."""
    if len(row["answer"]) > MAX_ANSWER:
        return "answer longer than 50 characters"
    words = [w for w in _WORD.findall(plain_text(row["answer"])) if w.lower() not in _VALUE_WORDS]
    return "answer in prose" if len(words) > 2 or _NO_VALUE.search(row["answer"]) else None


_ROUNDED = re.compile(r"\\approx|(?<![\d.])\d*\.(?!\d?[1368][27]5\b)\d{3,}")  # eighths and sixteenths are exact
_ASKS_ROUNDED = re.compile(r"\d\.\d|\.\d|\bround|nearest|approximat|decimal|estimate|significant|percent|accura", re.I)


def rounded(row: dict) -> str | None:
    """A rounded value where the problem asks for none: the exact answer would be graded wrong."""
    guess = re.search(r"\d\.\d", row["answer"]) and re.search(r"\\approx|approximat|≈", row["solution"])
    return "rounded answer" if (guess or _ROUNDED.search(row["answer"])) and not _ASKS_ROUNDED.search(row["words"]) else None


_NOT_VARIABLES = re.compile(r"\\(?:text|textbf|mathrm|operatorname|mbox|mathbb)\s*\{[^}]*\}|\\[a-zA-Z]+|\d+_\{?\w+\}?|[a-zA-Z]{3,}"
    r"|(?<![a-zA-Z])(?:cm|mm|km|kg|ft|in|or|if|m|s|h|g)(?![a-zA-Z])")
_GREEK = {"\\alpha", "\\beta", "\\gamma", "\\lambda", "\\mu", "\\omega", "\\theta"}
_USUAL = set("eidxyfcnzpqrs")  # constants and the names that answers give to what is asked


def unknown_letter(row: dict) -> str | None:
    """An answer in letters that the problem does not name (a family k pi, an arbitrary constant): no other choice of letters equals it."""
    letters = set(re.findall(r"[a-z]", _NOT_VARIABLES.sub(" ", row["answer"]).lower())) - _USUAL
    known = {w for w in tokens(row["problem"]) if len(w) == 1 or w[0] == "\\"}
    if letters <= known and {w for w in tokens(row["answer"]) if w in _GREEK} <= known:
        return None
    return "letters that the problem does not name"


_ASKS = re.compile(
    r"\?|find|determin|calculat|comput|evaluat|what|how|solv|simplif|express|writ|give|which|who|when|where|name|list"
    r"|estimat|convert|factor|expand|enter|count|obtain|decide"
    r"|reduce|perform|round|add|subtract|multipl|divid|represent|graph|plot|state|rationaliz|describe|prove|show|use"
    r"|_|\\qquad|\\boxed|answer|value|number|[=:]\W*(?:quad)?\W*$|\b(?:is|are|equals?|to|be|by|of|at|have|has|in"
    r"|then)\W*$", re.I)
_NAMES = set("""monday tuesday wednesday thursday friday saturday sunday january february march april may june july august september october november december
    even odd neither both infinite infinity undefined empty solution solutions real none all circle ellipse parabola hyperbola line point triangle square""".split())


_ANY = re.compile(r"\b(?:find|give|determine|name|write|list|draw)\s+(?:down\s+)?(?:an?\s+(?:example|set of|\w+-digit)|any|some"
    r"|\d+\s+(?:natural|positive|different|distinct))\b|\bhow\s+(?:can|could|should|might)\s+(?:you|we|one|he|she"
    r"|they|this|it)\b", re.I)
_ONE = re.compile(r"smallest|largest|least|greatest|unique|only|all\b", re.I)


def nothing_asked(row: dict) -> str | None:
    """A statement instead of a question, a question with many right answers, or an answer in a word that neither the problem nor
    common names offer (`Complete`)."""
    words = [w.lower() for w in _WORD.findall(plain_text(row["answer"]))]
    strange = words and not re.search(r"[\d=<>\\]", plain_text(row["answer"])) and not any(w in row["problem"].lower() or w in _NAMES for w in words)
    many = _ANY.search(row["words"]) and not _ONE.search(row["words"])
    return "nothing definite asked" if strange or many or not _ASKS.search(row["words"]) else None


def empty_problem(row: dict) -> str | None:
    row["words"] = _DRAWING.sub(" ", row["problem"])  # the rules on wording must not read the labels of a drawing
    row["lower"] = row["words"].lower()
    return None if len(row["words"]) >= 10 else "empty problem"


def rules(scripts: tuple[str, ...]):
    """The steps in the order of the funnel."""
    return (empty_problem, marked_invalid, missing_figure, partial(other_script, scripts=scripts), proof, find_answer, multiple_choice, yes_or_no, several_questions,
            partial(other_script, scripts=scripts), not_a_value, rounded, unknown_letter, nothing_asked)


REASONS = """too long; empty problem; marked invalid by its source; link or missing figure; another script; proof; no box; unbalanced box; empty answer
several different boxes; answer goes on after the box; answer and box differ; multiple choice; yes or no, true or false
several questions; answer longer than 50 characters; answer in prose; rounded answer; letters that the problem does not name
nothing definite asked; ungradable; in a benchmark; same problem, different answers; duplicate; near-duplicate
pass rate 0 or 1; beyond the target""".replace("\n", "; ").split("; ")


# ----------------------------------------------------------------------------------------------------------------------
# curate: benchmarks and near-duplicates
# ----------------------------------------------------------------------------------------------------------------------

N_GRAM = 13  # tokens: the usual length of decontamination, here on LaTeX-aware tokens
SHORT = 8  # tokens of the skeleton, for short or reworded problems. NOT IN PAPER: finds candidates only, same_problem decides
SHINGLE, BANDS, BAND = 4, 16, 4  # MinHash: 4-token shingles, 16 bands of 4 values: pairs with Jaccard 0.7 are found in 99 %
NEAR = 0.6  # exact Jaccard index of near-duplicates
_POWERS = np.random.default_rng(2501).integers(1, 1 << 63, N_GRAM, np.uint64) | np.uint64(1)  # any odd numbers
_MIX = np.random.default_rng(11651).integers(1, 1 << 63, (BANDS * BAND, 1), np.uint64) | np.uint64(1)


@lru_cache(1 << 18)
def token_hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


def gram_hashes(words: list[str], n: int) -> np.ndarray:
    """64-bit hashes of all n-grams; of the whole list if it is shorter. The same in every process and on every machine."""
    ids = np.array([token_hash(w) for w in words] or [0], np.uint64)
    n = min(n, len(ids))
    total = np.lib.stride_tricks.sliding_window_view(ids, n) @ _POWERS[:n]  # modulo 2^64
    return total ^ (total >> np.uint64(29))


def bands(words: list[str]) -> np.ndarray:
    """The BANDS bucket numbers of a problem under MinHash; two that state the same problem share one almost surely."""
    grams = np.unique(gram_hashes(words, SHINGLE))
    mixed = _MIX * grams  # (64, grams): multiply, fold
    least = (mixed ^ (mixed >> np.uint64(31))).min(1).reshape(BANDS, BAND)
    return least @ _POWERS[:BAND]


def reworded(a: list[str], b: list[str]) -> bool:
    """Equal in all signs, in order, and in nine tenths of the other words: near enough to leave a row out for a benchmark's
    sake, whatever its answer (labels of the pools are noisy). For duplicates it would be too much: largest, smallest."""
    a, b = skeleton(a), skeleton(b)
    return signs(a) == signs(b) and 2 * sum((Counter(a) & Counter(b)).values()) >= 0.9 * (len(a) + len(b))


class Benchmarks:
    """Finds the benchmark problem that a row repeats: equal normalised text, or a common 13-gram (or 8-gram of skeletons)
    and then `same_problem`: every hit is decided by comparing the two."""

    PHRASE = 12  # an n-gram that more problems of the benchmarks share is a phrase ("m and n are relatively prime ...")

    def __init__(self, rows: list[dict]):
        self.rows = [(r["id"], tokens(repair(r["problem"])), bare(r["answer"] or (boxes(r["solution"]) or [""])[-1] or "")) for r in rows]
        self.keys = {key(words): i for i, (_, words, _) in reversed(list(enumerate(self.rows)))}
        owners = defaultdict(set)
        for i, (_, words, _) in enumerate(self.rows):
            for h in self.grams(words).tolist():
                owners[h].add(i)
        self.owners = {h: sorted(found) for h, found in sorted(owners.items()) if len(found) <= self.PHRASE}
        self.hashes = np.array(list(self.owners) or [0], np.uint64)

    @staticmethod
    def grams(words: list[str]) -> np.ndarray:
        return np.concatenate([gram_hashes(words, N_GRAM), gram_hashes(skeleton(words), SHORT)])

    def find(self, words: list[str], answer: str) -> str | None:
        """The id of the benchmark problem that this one repeats, or None."""
        if (i := self.keys.get(key(words))) is not None:
            return self.rows[i][0]
        grams = self.grams(words)
        at = np.minimum(np.searchsorted(self.hashes, grams), len(self.hashes) - 1)
        candidates = {i for h in grams[self.hashes[at] == grams].tolist() for i in self.owners.get(h, ())}
        for i in sorted(candidates):
            name, other, gold = self.rows[i]
            if same_problem(words, other, same_answer(answer, gold)) or reworded(words, other):
                return name
        return None


def same_answer(a: str, b: str) -> bool:
    return a == b or key(tokens(a)) == key(tokens(b)) or verify.is_equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# curate: the pipeline
# ----------------------------------------------------------------------------------------------------------------------

_WORKER = {}  # what each process needs to judge rows: set once by `prepare`


def prepare(benchmarks: list[dict], scripts: tuple[str, ...]):
    _WORKER.update(benchmarks=Benchmarks(benchmarks), rules=rules(scripts))


def sift(chunk) -> tuple[Counter, list[tuple]]:
    """One chunk of raw rows -> (counts of (source, why it went or "read"), kept rows with what later steps compare)."""
    default_source, rows = chunk
    counts, kept = Counter(), []
    for where, raw in rows:
        row = to_problem(where, raw, default_source)
        counts[row["source"], "read"] += 1
        if too_long(row):
            counts[row["source"], "too long"] += 1
            continue
        row["problem"] = repair(row["problem"])
        if reason := next(filter(None, (rule(row) for rule in _WORKER["rules"])), None):
            counts[row["source"], reason] += 1
            continue
        words = tokens(row["problem"])
        hit = _WORKER["benchmarks"].find(words, row["answer"])
        # Near-duplicates must agree in every number and sign, so these belong to the bucket: template problems with
        # other numbers never meet, which keeps the search linear.
        same_signs = np.uint64(token_hash(" ".join(sorted(signs(words)))))
        line = json_line({k: row[k] for k in ("id", "problem", "answer", "source", "level", "solution") if row[k] not in (None, "")})
        kept.append((line, row["answer"], row["source"], row["id"], hit, token_hash(key(words) + drawing(row["problem"])), bands(words) ^ same_signs))
    return counts, kept


class Spool:
    """Rows that passed the rules: text in a temporary file, and in memory only what the later steps compare."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "w+b")
        self.answers, self.sources, self.ids, self.hits = [], [], [], []
        self.offsets, self.keys, self.bands = array("Q"), array("Q"), array("Q")

    def add(self, line, answer, source, name, hit, digest, row_bands):
        self.offsets.append(self.file.tell())
        self.file.write(line.encode())
        self.answers.append(sys.intern(answer))
        self.sources.append(sys.intern(source))
        self.ids.append(name)
        self.hits.append(hit)
        self.keys.append(digest)
        self.bands.frombytes(row_bands.tobytes())

    def row(self, i: int) -> dict:
        self.file.seek(self.offsets[i])
        return json.loads(self.file.readline())

    def close(self):
        self.file.close()
        self.path.unlink(missing_ok=True)


def read_pools(pools: list[tuple[str, str]], benchmarks: list[dict], scripts, processes: int, spool: Spool) -> Counter:
    """Streams every pool through the rules into the spool -> counts of (source, reason)."""
    counts = Counter()
    work = ((default, part) for name, default in pools for part in chunks(raw_rows(name), 250))
    with tqdm(unit=" rows", desc="rules", mininterval=1) as bar:
        for part, kept in ordered_map(sift, work, processes, prepare, (benchmarks, scripts)):
            counts += part
            for row in kept:
                spool.add(*row)
            bar.update(sum(n for (_, reason), n in part.items() if reason == "read"))
            bar.set_postfix(kept=len(spool.offsets), refresh=False)
    if not counts:
        raise Misuse(f"{', '.join(name for name, _ in pools)}: no rows")
    return counts


def ungradable(answers: list[str]) -> set[str]:
    """Answers that verify.py cannot read or does not find equal to themselves. Each pair has its own deadline there."""
    different = sorted(a for a in set(answers) if not re.fullmatch(r"-?\d{1,15}", a))
    equal = verify.grade(["\\boxed{" + a + "}" for a in different], different)
    return {a for a, ok in zip(different, equal, strict=True) if not (ok and verify.is_readable(a))}


def near_pairs(spool: Spool, rows: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows that share a MinHash bucket and are near-duplicates by the exact test."""
    table = np.frombuffer(spool.bands, np.uint64).reshape(-1, BANDS)[rows]
    found = set()
    for column in table.T:
        order = np.argsort(column, kind="stable")
        new = np.r_[True, column[order][1:] != column[order][:-1]]
        first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]  # of each row's bucket
        for other in (first, np.r_[order[:1], order[:-1]]):  # each row against the first and the previous of its bucket
            pick = ~new & (other != order)
            found.update(zip(np.minimum(other, order)[pick].tolist(), np.maximum(other, order)[pick].tolist()))
    words = lru_cache(1 << 14)(lambda i: tokens(spool.row(i)["problem"]))
    pairs = []
    for a, b in tqdm(sorted((rows[i].item(), rows[j].item()) for i, j in found), desc="near-duplicates", unit=" pairs", mininterval=1):
        grams_a, grams_b = (set(gram_hashes(words(i), SHINGLE).tolist()) for i in (a, b))
        equal = same_answer(spool.answers[a], spool.answers[b])
        if len(grams_a & grams_b) >= NEAR * len(grams_a | grams_b) and same_problem(words(a), words(b), equal):
            if equal or drawing(spool.row(a)["problem"]) == drawing(spool.row(b)["problem"]):
                pairs.append((a, b))
    return pairs


def judge_groups(spool: Spool, alive: list[int]) -> dict[int, str]:
    """Rows that go because of other rows -> why. A group states one problem: one row of it stays, the first; all go if it
    is in a benchmark (also through a sibling) or if the answers differ."""
    first_of, parent = {}, {}
    for i in alive:
        first_of.setdefault(spool.keys[i], i)
        parent[i] = first_of[spool.keys[i]]

    def root(i):
        while parent[i] != i:
            i = parent[i] = parent[parent[i]]
        return i

    for a, b in near_pairs(spool, np.array(sorted(first_of.values()), np.int64)):
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    groups = defaultdict(list)
    for i in alive:
        groups[root(i)].append(i)
    gone = {}
    for first, group in groups.items():
        hit = next((spool.hits[i] for i in group if spool.hits[i]), None)
        others = {spool.answers[i] for i in group} - {spool.answers[first]}
        if hit:
            gone |= dict.fromkeys(group, "in a benchmark")
        elif not all(same_answer(a, spool.answers[first]) for a in others):
            gone |= dict.fromkeys(group, "same problem, different answers")
        else:
            gone |= {i: "duplicate" if spool.keys[i] == spool.keys[first] else "near-duplicate" for i in group[1:]}
    return gone


def stratified_order(rows: list[int], sources: list[str], seed: int, mix: str) -> list[int]:
    """A seeded order of rows whose every prefix holds the sources in proportion to their size, or equally until one ends.

    NOT IN PAPER: the mixture. Proportional is what a uniform draw gives on average; equal is nearer to the authors' own 30,000.
    """
    strata = defaultdict(list)
    for i in rows:
        strata[sources[i]].append(i)
    place = {}
    for source in sorted(strata):
        random.Random(f"{seed} {source}").shuffle(strata[source])
        size = len(strata[source]) if mix == "proportional" else 1
        place |= {i: ((rank + 0.5) / size, source) for rank, i in enumerate(strata[source])}
    return sorted(rows, key=place.__getitem__)


def pass_rates(spool: Spool, order: list[int], generator, n: int, journal: Path):
    """(row, share of n sampled answers that are right) in the given order; each is measured once, also over a restart."""
    done = {r["id"]: r["pass_rate"] for r in read_journal(journal, {"n": n, "model": generator.name}, {"id": str, "pass_rate": (int, float)})}
    for part in chunks(order, generator.batch * generator.workers):
        todo = [spool.row(i) | {"id": spool.ids[i]} for i in part if spool.ids[i] not in done]
        with ThreadPoolExecutor(generator.workers) as pool:
            sampled = pool.map(lambda some: generator.generate([ATTEMPT.format(problem=r["problem"]) for r in some], n), chunks(todo, generator.batch))
            for row, texts in zip(todo, (texts for some in sampled for texts in some)):
                done[row["id"]] = sum(verify.grade(texts, [row["answer"]] * n)) / n
                append(journal, [{"id": row["id"], "pass_rate": done[row["id"]]}])
        yield from ((i, done[spool.ids[i]]) for i in part)


def curate(args) -> int:
    """Pools -> rl.jsonl, report.json, funnel.png and a data card (paper: MATH-train and NuminaMath, filtered to 30,000)."""
    out, scripts = out_folder(args.out), tuple(args.scripts)
    pools = [(name, default) for default in ("math", "numina") for name in getattr(args, default) or ()]
    if not pools:  # the paper's sources, without what it is evaluated on
        pools = [("EleutherAI/hendrycks_math", "math"), ("AI-MO/NuminaMath-CoT", "numina")]
        args.decontaminate = args.decontaminate or [BENCHMARKS[name] for name in ("math500", "aime24", "omni")]
    benchmarks = [checked_problem(where, raw, "benchmark") for name in args.decontaminate for where, raw in raw_rows(name)]
    if not benchmarks:
        print("data_prep.py: warning: no --decontaminate: the problems may hold benchmark problems", file=sys.stderr)
    spool = Spool(out / "rows.partial")
    try:
        counts = read_pools(pools, benchmarks, scripts, args.processes, spool)
        bad = ungradable(spool.answers)
        gone = {i: "ungradable" for i, answer in enumerate(spool.answers) if answer in bad}
        gone |= judge_groups(spool, [i for i in range(len(spool.answers)) if i not in gone])
        order = stratified_order([i for i in range(len(spool.answers)) if i not in gone], spool.sources, args.seed, args.mix)
        kept = draw(spool, order, args, out, gone)
        for i, reason in gone.items():
            counts[spool.sources[i], reason] += 1
        removed = {spool.ids[i]: spool.hits[i] for i, reason in sorted(gone.items()) if reason == "in a benchmark"}
        write_report(out, args, pools, counts, kept, removed, len(benchmarks))
    finally:
        spool.close()
    return 0


def draw(spool: Spool, order: list[int], args, out: Path, gone: dict[int, str]) -> Counter:
    """Writes rl.jsonl with the first --target rows of the order (that pass the difficulty filter) -> rows per source."""
    seen, chosen = Counter(), {}
    for i in sorted(order):  # two sources may use one id; the resume of `cot` needs them different
        seen[spool.ids[i]] += 1
        if seen[spool.ids[i]] > 1:
            spool.ids[i] += f"~{seen[spool.ids[i]]}"
    rates = ((i, None) for i in order)
    if args.pass_rate:
        rates = pass_rates(spool, order, make_generator(args.pass_rate, args), args.samples, out / "pass_rates.jsonl")
    for i, rate in rates:
        if rate in (0, 1):
            gone[i] = "pass rate 0 or 1"
            continue
        chosen[i] = {"id": spool.ids[i]} if rate is None else {"id": spool.ids[i], "pass_rate": rate}
        if len(chosen) == args.target:
            break
    gone |= {i: "beyond the target" for i in order if i not in chosen and i not in gone}
    beside = out / "rl.jsonl.partial"
    with open(beside, "w", encoding="utf-8") as f:
        f.writelines(json_line(spool.row(i) | chosen[i]) for i in sorted(chosen))
    os.replace(beside, out / "rl.jsonl")
    return Counter(spool.sources[i] for i in chosen)


def write_report(out: Path, args, pools, counts: Counter, kept: Counter, removed: dict, n_benchmarks: int):
    """The funnel on the console, as report.json, as a picture and in the data card."""
    sources = sorted({source for source, _ in counts})
    total = Counter()
    for (_, reason), n in counts.items():
        total[reason] += n
    funnel = [("read", total["read"], total["read"])]
    for reason in REASONS:
        if total[reason]:
            funnel.append((reason, total[reason], funnel[-1][2] - total[reason]))
    settings = {"pools": [name for name, _ in pools], "decontaminate": args.decontaminate, "benchmark problems": n_benchmarks, "target": args.target,
                "seed": args.seed, "mix": args.mix, "scripts": args.scripts, "pass_rate": args.pass_rate}
    report = {
        "settings": settings, "read": total["read"], "rows": kept.total(),
        "funnel": [{"why": why, "gone": n, "left": left} for why, n, left in funnel[1:]],
        "by_source": {s: {"read": counts[s, "read"], "kept": kept[s]} | {r: counts[s, r] for r in REASONS if counts[s, r]} for s in sources},
        "in a benchmark": removed}
    table = ["| step | gone | left |", "|---|---:|---:|", f"| read | | {total['read']:,} |"]
    table += [f"| {why} | {n:,} | {left:,} |" for why, n, left in funnel[1:]]
    by_source = ["| source | read | kept |", "|---|---:|---:|", *(f"| {s} | {counts[s, 'read']:,} | {kept[s]:,} |" for s in sources)]
    write_beside(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw_funnel(out / "funnel.png", funnel)
    texts = {"settings": json.dumps(settings, ensure_ascii=False), "funnel": "\n".join(table), "sources": "\n".join(by_source)}
    write_beside(out / "README.md", CARD.format(rows=kept.total(), **texts))
    print("\n".join(table + [""] + by_source))
    print(f"\n{kept.total():,} problems in {out / 'rl.jsonl'}; report, funnel.png and data card beside it")
    print(f"next: python t1.py --stage rl --data {out / 'rl.jsonl'}")


def draw_funnel(path: Path, funnel):
    import matplotlib

    matplotlib.use("Agg")
    import io

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.32 * len(funnel) + 1))
    names = [why for why, _, _ in funnel]
    axes.barh(names, [left for _, _, left in funnel], color="tab:blue", label="left")
    axes.barh(names, [n if why != "read" else 0 for why, n, _ in funnel], left=[left for _, _, left in funnel], color="tab:red", label="gone")
    for at, (why, n, left) in enumerate(funnel):
        axes.text(left + (n if why != "read" else 0), at, f" {left:,}" if why == "read" else f" -{n:,}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rows", xlim=(0, funnel[0][2] * 1.15))
    axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    write_beside(path, image.getvalue())


CARD = """---
language: en
task_categories: [question-answering]
tags: [mathematics, reinforcement-learning]
configs: [{{config_name: default, data_files: rl.jsonl}}]
---
# {rows:,} mathematics problems with answers that a rule can grade

Made by `python data_prep.py curate`. One JSON object a line: `id`, `problem`, `answer`, `source`, and where known `level`, `solution`, `pass_rate`.
The licences are those of the sources; answers are the sources' own, read off the last box or the answer column and not proven.

## What was kept and why the rest went
{funnel}

{sources}

Settings: `{settings}`

"In a benchmark": equal normalised text, or a common LaTeX-aware 13-gram (8-gram without filler words) and the same problem on comparison,
or a duplicate of such a row. The removed ids and the benchmark problems they repeat are in `report.json`.
"""


# ----------------------------------------------------------------------------------------------------------------------
# Models: text in, n texts out. A generator has name, batch (problems worked on together), workers and
# generate(prompts, n) -> n texts for each prompt
# ----------------------------------------------------------------------------------------------------------------------


class Unfinished(Exception):
    """A model did not answer in time after all retries; the problem stays open and the same command takes it up again."""


class Refused(Exception):
    """The server will never answer this request (too long, filtered): the problem goes, with the reason."""


class ServerModel:
    """A model behind an OpenAI-compatible server (`vllm serve`), asked by as many threads as --concurrency says."""

    batch = 1

    def __init__(self, name: str, args):
        import openai

        self.name, self.openai, self.args, self.workers = name, openai, args, args.concurrency
        self.client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=args.timeout, max_retries=0)

    def generate(self, prompts: list[str], n: int) -> list[list[str]]:
        answers = []
        for prompt in prompts:
            texts = []
            while len(texts) < n:  # some servers give one choice whatever n
                texts += self._ask(prompt, n - len(texts))
            answers.append(texts[:n])
        return answers

    def _ask(self, prompt: str, n: int) -> list[str]:
        """One request with retries: on 408, 409, 429, 5xx, lost connections, time-outs and replies that are no completion."""
        for attempt in range(self.args.retries + 1):
            wait = min(self.args.backoff * 2**attempt, 60)
            try:
                reply = self.client.chat.completions.create(
                    model=self.name, messages=[{"role": "user", "content": prompt}], n=n, temperature=self.args.temperature, max_tokens=self.args.max_tokens)
                texts = [choice.message.content for choice in reply.choices]
                if texts and all(isinstance(text, str) and text.strip() for text in texts):
                    return texts
                fault = "a reply without text"
            except self.openai.APIStatusError as e:
                fault = f"status {e.status_code}"
                if e.status_code in (401, 403, 404):
                    raise Misuse(f"--base-url {self.args.base_url}: {fault} for model {self.name!r}; check the address, the model's name and "
    f"OPENAI_API_KEY")
                if e.status_code < 500 and e.status_code not in (408, 409, 429):
                    raise Refused(f"refused by the server with {fault}")
                after = e.response.headers.get("retry-after", "")
                wait = min(max(wait, float(after)), 60) if re.fullmatch(r"\d+(\.\d+)?", after) else wait
            except (self.openai.APIError, ValueError, TypeError, AttributeError, KeyError) as e:  # connection, time-out, not JSON, not a completion
                fault = f"{type(e).__name__}: {e}"
            if attempt < self.args.retries:
                time.sleep(wait)
        raise Unfinished(f"{self.name}: no usable reply after {self.args.retries + 1} requests (last: {fault[:120]})")


class EngineModel:
    """A model folder or hub name run by the rollout engine that RL uses."""

    workers = 1

    def __init__(self, name: str, args):
        import t1  # and with it torch: only where a model runs in this process

        self.name, self.batch, self.args, self.t1 = name, args.batch, args, t1
        self.cfg = t1.Config(model=name, seed=args.seed, dtype=args.dtype, rollout_rows=args.batch)
        model, self.tokenizer = t1.load_policy(name, self.cfg)
        self.engine = t1.TorchEngine(self.tokenizer, self.cfg)
        self.engine.load(model)

    def generate(self, prompts: list[str], n: int) -> list[list[str]]:
        ids = [self.t1.prompt_ids(prompt, self.tokenizer, self.cfg) for prompt in prompts]
        seeds = [self.t1.seed_for(self.args.seed, prompt) for prompt in prompts]  # by content: a resumed run samples what the whole one would
        rollouts = self.engine.generate(ids, n, seeds, self.args.max_tokens, self.args.temperature)
        texts = [self.tokenizer.decode(r.ids, skip_special_tokens=True) for r in rollouts]
        return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]


def make_generator(name: str, args):
    return ServerModel(name, args) if args.base_url else EngineModel(name, args)


# ----------------------------------------------------------------------------------------------------------------------
# Journals: what is finished survives kill -9
# ----------------------------------------------------------------------------------------------------------------------


def read_journal(path: Path, settings: dict, kinds: dict) -> list[dict]:
    """Finished rows of an earlier run with the same settings; `kinds` are the types of their fields. A line cut by a kill is cut off;
    other settings, and a file that is no journal, are errors and left as they are."""
    lines = list(json_lines(path)) if os.path.lexists(path) else []
    cut = len(lines.pop()[1]) if lines and not lines[-1][1].endswith(b"\n") else 0
    rows = [parse(*line) for line in lines]
    old = rows[0].get("settings") if rows else settings
    ours = bool(rows) or not cut or path.read_bytes().startswith(b'{"settings":'[:cut])
    if not (ours and isinstance(old, dict)):
        raise Misuse(f"{path}: not a journal of this command; take another --out, or remove the file")
    if old != settings:
        changed = sorted(k for k in settings.keys() | old.keys() if settings.get(k) != old.get(k))
        raise Misuse(f"{path}: written with another {', '.join(changed)}; take another --out, or delete the file to start again")
    for (where, _), row in zip(lines[1:], rows[1:]):
        if wrong := [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]:
            raise Misuse(f"{row_at(where)}: field {wrong[0]!r} is missing or of another type; remove the line, and its problem is asked again")
    if cut:
        os.truncate(path, path.stat().st_size - cut)
    if not rows:
        append(path, [{"settings": settings}])
    return rows[1:]


def append(path: Path, rows: list[dict]):
    with open(path, "ab") as f:
        f.write("".join(map(json_line, rows)).encode())
        f.flush()
        os.fsync(f.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# cot: cold-start traces (paper section 1: attempts from several models, a critique of each, merged into one train of thought)
# ----------------------------------------------------------------------------------------------------------------------

ATTEMPT = """{problem}

Solve the problem step by step and put the final answer in \\boxed{{}}."""

CRITIQUE = """Here is a problem and one attempt at it. The attempt's final answer is {verdict}.

Problem:
{problem}

Attempt:
{attempt}

{task}
Write a short critique only, in the words of someone checking the work. Do not mention that you were told the verdict."""
WHY_IT_FAILS = "Find the first step that goes wrong, say why it is wrong, and how one could notice it."
WHY_IT_HOLDS = "Check the result by an independent route (substitute it back, try a special case, or count another way) and say why it holds."

REWRITE = """Rewrite the material below as one train of thought of a single person who solves the problem alone, thinking aloud.

Problem:
{problem}

{attempts}

Rules:
- Follow the order above. Present each wrong attempt as your own try with its wrong result, then notice the fault ("Wait, ..."), say why it fails, and try again.
- Arrive at the result of the right attempt, then verify it once more with its check before you finish.
- Keep the mathematics of the attempts. Do not mention attempts, critiques, models or instructions.
- Write the whole thought between <think> and </think>, then a short solution that ends in \\boxed{{}} with the final answer."""
ONE_ATTEMPT = """Attempt {number} ({verdict}):
{attempt}
{kind}:
{critique}
"""

_NOTICE = re.compile(r"\b(?:wait|but|however|mistake|wrong|error|incorrect|not right|no[,.;:!]|hmm|oops|fails?|failed|contradict\w*"
    r"|doesn't|does not|can't be|cannot be|isn't|is not|overlooked|forgot|missed|recheck|re-?examine|reconsider"
    r"|try again|instead)\b", re.I)
_VERIFY = re.compile(r"\b(?:check\w*|verif\w+|confirm\w*|substitut\w+|plug\w*|double-check\w*|consistent|indeed|holds|test\w*)\b", re.I)


def without_thought(text: str) -> str:
    """What a reasoning model says after its own thought."""
    return text.rsplit("</think>", 1)[-1].strip()


def choose_attempts(row: dict, attempts: list[str], args) -> tuple[list[tuple[str, bool]], str | None]:
    """The attempts that the path shows, wrong ones first, the right one last; or why there is no path."""
    right = verify.grade(attempts, [row["answer"]] * len(attempts))
    good = [a for a, ok in zip(attempts, right) if ok]
    wrong = {verify.extract_answer(a): a for a, ok in zip(attempts, right) if not ok and verify.extract_answer(a)}
    rng = random.Random(f"{args.seed} {row['id']}")
    reflect = rng.random() < args.reflect_share
    if not good:
        return [], "no right attempt"
    if reflect and not wrong:
        return [], "no failed attempt"
    failed = rng.sample(sorted(wrong.values()), min(len(wrong), rng.randint(1, args.max_failed))) if reflect else []
    return [(a, False) for a in failed] + [(rng.choice(good), True)], None


def critique_prompt(row: dict, attempt: str, ok: bool) -> str:
    return CRITIQUE.format(problem=row["problem"], attempt=attempt, verdict="right" if ok else "wrong", task=WHY_IT_HOLDS if ok else WHY_IT_FAILS)


def rewrite_prompt(row: dict, path: list[tuple[str, bool]], critiques: list[str]) -> str:
    parts = [ONE_ATTEMPT.format(number=i, verdict="right" if ok else "wrong", attempt=attempt, kind="Check" if ok else "Why it fails", critique=critique)
             for i, ((attempt, ok), critique) in enumerate(zip(path, critiques), 1)]
    return REWRITE.format(problem=row["problem"], attempts="\n".join(parts))


def said(text: str, answer: str) -> list[int]:
    """Where a text names an answer, whatever the spacing and fonts: positions in the text as `plain` writes it."""
    target = plain(answer)
    return [m.start() for m in re.finditer(rf"(?<![\d.\w]){re.escape(target)}(?![\w]|\.\d)", text)] if target else []


def plain(text: str) -> str:
    text = re.sub(r"\\(?:boxed|text|mathrm|left|right|displaystyle|[dt]?frac(?=\b))|[{}$\\]|(?<=\d),(?=\d{3}\b)", lambda m: " frac " if "frac" in m[0] else "", text)
    return re.sub(r"\s+", " ", text).strip()


def recognised(thought: str, failed: list[str], gold: str) -> bool:
    """Does a failed answer stand in the thought, then a word that takes it back, and only then the right answer for good?

    NOT IN PAPER: a rule in place of a reader. It asks for the wrong value itself, so a mere "wait" does not count.
    """
    text = plain(thought)
    for answer in failed:
        for at in said(text, answer)[:1]:
            notice = _NOTICE.search(text, at)
            if notice and any(right > notice.start() for right in said(text, gold)):
                return True
    return False


def trace_fault(row: dict, response: str, path: list[tuple[str, bool]], args) -> str | None:
    """Why a rewritten path is not a trace, or None."""
    if response.count("<think>") != 1 or response.count("</think>") != 1 or not response.startswith("<think>") or len(response.split("</think>")[0]) < 40:
        return "not one thought and one answer"
    if not verify.grade([response], [row["answer"]])[0]:
        return "wrong answer"
    if len(response) > args.max_chars:
        return "over-long"
    words = response.split()
    if max(Counter(zip(*(words[i:] for i in range(12)))).values(), default=0) > 3:
        return "repetitive"
    strange = foreign(("latin",))
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd]|\S{200,}", response) or len(strange.findall(response)) > len(strange.findall(row["problem"])):
        return "garbled"
    thought = response[len("<think>") : response.index("</think>")]
    failed = [verify.extract_answer(a) for a, ok in path if not ok]
    if failed and not recognised(thought, failed, row["answer"]):
        return "failed attempt not recognised"
    text = plain(thought)
    if not (places := said(text, plain(verify.extract_answer(response) or ""))) or not _VERIFY.search(text, places[0]):
        return "no self-verification"
    return None


def make_traces(rows: list[dict], teachers, critic, rewriter, args) -> list[dict]:
    """Problems -> one outcome each: {"id", "trace" or None, "why", "attempts", "right"}."""
    attempts = [[] for _ in rows]
    for t, teacher in enumerate(teachers):  # attempts are shared out over the teachers, the first ones take the rest
        if share := len(range(t, args.attempts, len(teachers))):
            for i, texts in enumerate(teacher.generate([ATTEMPT.format(problem=r["problem"]) for r in rows], share)):
                attempts[i] += map(without_thought, texts)
    chosen = [choose_attempts(row, tried, args) for row, tried in zip(rows, attempts)]
    asked = [critique_prompt(row, attempt, ok) for row, (path, _) in zip(rows, chosen) for attempt, ok in path]
    critiques = iter(without_thought(texts[0]) for texts in (critic.generate(asked, 1) if asked else []))
    ready = [i for i, (path, why) in enumerate(chosen) if not why]
    prompts = [rewrite_prompt(rows[i], chosen[i][0], [next(critiques) for _ in chosen[i][0]]) for i in ready]
    responses = dict(zip(ready, (texts[0].strip() for texts in rewriter.generate(prompts, 1)) if prompts else ()))
    outcomes = []
    for i, row in enumerate(rows):
        path, why = chosen[i]
        why = why or trace_fault(row, responses[i], path, args)
        trace = {"id": row["id"], "problem": row["problem"], "response": responses[i], "answer": row["answer"], "source": row["source"]} if not why else None
        outcomes.append({"id": row["id"], "trace": trace, "why": why or "kept", "failed": len(path) - 1 if path else 0})
    return outcomes


def read_problems(name: str) -> list[dict]:
    """Problem rows for cot: any source that `curate` reads, answers included. Ids must differ, for the resume."""
    rows, seen = [], set()
    for where, raw in raw_rows(name):
        row = checked_problem(where, raw, "local")
        if find_answer(row):
            raise Misuse(f"{row_at(where)}: no answer, neither in field 'answer' (or 'label') nor in a box of 'solution'; run "
    f"`curate` first")
        if row["id"] in seen:
            raise Misuse(f"{row_at(where)}: field 'id': {row['id']!r} is there twice; give each problem its own")
        seen.add(row["id"])
        rows.append({k: row[k] for k in ("id", "problem", "answer", "source")})
    if not rows:
        raise Misuse(f"{name}: no rows")
    return rows


def cot(args) -> int:
    """Problems -> sft.jsonl, by models; every finished problem is on disk at once and is never asked again."""
    out = out_folder(args.out)
    if args.authors:
        return read_authors(args.authors, out)
    if not args.teacher or not args.problems:
        raise Misuse("cot: give --problems FILE and at least one --teacher (or --authors FILE to convert the authors' traces)")
    problems = read_problems(args.problems)
    names = [*dict.fromkeys([*args.teacher, args.critic or args.teacher[0], args.rewriter or args.teacher[0]])]
    prompts = hashlib.sha256("".join((ATTEMPT, CRITIQUE, WHY_IT_FAILS, WHY_IT_HOLDS, REWRITE, ONE_ATTEMPT)).encode()).hexdigest()[:16]
    settings = {k: getattr(args, k) for k in ("teacher", "critic", "rewriter", "attempts", "reflect_share", "max_failed", "temperature", "max_tokens", "max_chars", "seed")}
    models = {name: make_generator(name, args) for name in names}
    journal, kinds = out / "journal.jsonl", {"id": str, "trace": (dict, type(None)), "why": str, "failed": int}
    done = {row["id"]: row for row in read_journal(journal, settings | {"prompts": prompts}, kinds)}
    roles = ([models[name] for name in args.teacher], models[args.critic or args.teacher[0]], models[args.rewriter or args.teacher[0]])
    todo = list(chunks((r for r in problems if r["id"] not in done), roles[0][0].batch))
    open_problems = []
    bar = tqdm(total=len(problems), initial=len(problems) - sum(map(len, todo)), unit=" problems", desc="traces")
    with ThreadPoolExecutor(roles[0][0].workers) as pool:
        under_way = {pool.submit(make_traces, part, *roles, args): part for part in todo}
        try:
            for task in as_completed(under_way):
                try:
                    outcomes = task.result()
                except Refused as e:
                    outcomes = [{"id": r["id"], "trace": None, "why": str(e), "failed": 0} for r in under_way[task]]
                except Unfinished as e:
                    open_problems.append(e)
                    continue
                append(journal, outcomes)
                done |= {row["id"]: row for row in outcomes}
                bar.update(len(outcomes))
        finally:
            pool.shutdown(cancel_futures=True)
    bar.close()
    if open_problems:
        print(f"data_prep.py: {len(open_problems)} of {len(problems)} problems are still open ({open_problems[0]}); run the "
    f"same command again to go on", file=sys.stderr)
        return 1
    return write_traces(out, [done[r["id"]] for r in problems], settings)


def write_traces(out: Path, outcomes: list[dict], settings: dict) -> int:
    counts = Counter(row["why"] for row in outcomes)
    kept = [row for row in outcomes if row["trace"]]
    reflecting = sum(row["failed"] > 0 for row in kept)
    write_beside(out / "sft.jsonl", "".join(json_line(row["trace"]) for row in kept))
    outcome = dict(sorted(counts.items(), key=lambda c: (-c[1], c[0])))
    report = {"settings": settings, "problems": len(outcomes), "outcomes": outcome, "with a failed attempt": reflecting}
    write_beside(out / "report.json", json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{n:8,}  {why}" for why, n in outcome.items()))
    print(f"{len(kept):,} traces in {out / 'sft.jsonl'}, {reflecting:,} with a failed attempt that is recognised")
    print(f"next: python t1.py --stage sft --data {out / 'sft.jsonl'}")
    return 0


def read_authors(name: str, out: Path) -> int:
    """The authors' sft.jsonl -> trace rows: a list of messages, or a prompt and a response, under any usual name.

    Its columns are not documented: what is not recognised is an error that lists the columns found.
    """
    traces, counts = [], Counter()
    for where, raw in raw_rows(name):
        row = parse(where, raw)
        turns = row.get("messages") or row.get("conversations")
        try:
            if turns:
                prompt, response = [t.get("content", t.get("value")) for t in turns if t.get("role", t.get("from")) != "system"][:2]
            else:
                names = ("prompt", "problem", "question", "instruction", "text"), ("response", "solution", "output", "answer")
                prompt, response = (next(row[k] for k in some if k in row) for some in names)
            if not (isinstance(prompt, str) and isinstance(response, str)):
                raise ValueError
        except (ValueError, AttributeError, TypeError, RuntimeError):
            raise Misuse(f"{row_at(where)}: neither 'messages' nor 'prompt' and 'response'; found {', '.join(sorted(row))}")
        answer = verify.extract_answer(response)
        if not answer:
            counts["no boxed answer"] += 1
            continue
        if "</think>" not in response:  # their traces think aloud without tags; the last paragraph is the answer
            thought, _, rest = response.rpartition("\n\n") if verify.extract_answer(response.rpartition("\n\n")[2]) else (response, "", f"\\boxed{{{answer}}}")
            response = f"<think>\n{thought.strip()}\n</think>\n{rest.strip()}"
        traces.append({"id": f"t1-sft-{where[1]}", "problem": prompt, "response": response, "answer": answer, "source": "t1-sft"})
        counts["kept"] += 1
    if not traces:
        raise Misuse(f"{name}: no rows with a boxed answer")
    write_beside(out / "sft.jsonl", "".join(map(json_line, traces)))
    print(f"{counts['kept']:,} traces in {out / 'sft.jsonl'}; {counts['no boxed answer']:,} rows without a boxed answer left out")
    print(f"next: python t1.py --stage sft --data {out / 'sft.jsonl'}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# benchmarks: the evaluation sets of the paper in one form
# ----------------------------------------------------------------------------------------------------------------------

# option -> (file and source name, name on the hub)
BENCHMARKS = {"math500": "HuggingFaceH4/MATH-500", "aime24": "HuggingFaceH4/aime_2024", "omni": "KbsdJames/Omni-MATH",
              "gsm8k": "openai/gsm8k", "amc23": "math-ai/amc23", "gpqa": None}
OMNI = 500  # problems; NOT IN PAPER which: the paper's own 500 are not published, so a seeded draw with its list of ids


def benchmark_rows(source: str, name: str) -> list[dict]:
    """A benchmark's rows in our form."""
    rows = []
    for where, raw in raw_rows(name):
        given = parse(where, raw)
        if given.get("split", "test") != "test":  # a local file may hold GSM8K's both splits
            continue
        row = checked_problem(where, given, source)
        answer = row["answer"] if row["answer"] is not None else (boxes(row["solution"]) or [None])[-1]
        if source == "gsm8k" and answer and "####" in answer:
            row["solution"], _, answer = answer.partition("####")
        if source == "aime24" and answer and re.fullmatch(r"\s*\d{1,9}\s*", answer):
            answer = str(int(answer))  # "025"
        number = row["id"] if isinstance(given.get("unique_id", given.get("id")), str) else f"{source}-{given.get('id', given.get('row', len(rows)))}"
        row |= {"id": number, "problem": repair(row["problem"]), "answer": bare(answer or ""), "solution": row["solution"].strip(), "source": source}
        rows.append({k: row[k] for k in ("id", "problem", "answer", "source", "level", "solution") if row[k] not in (None, "") or k == "answer"})
    if not rows:
        raise Misuse(f"{name}: no rows")
    return rows


def gpqa_rows(path: str, seed: int) -> list[dict]:
    """GPQA-diamond from the user's own copy (gpqa_diamond.csv, or the same columns as JSONL or parquet); options shuffled by seed.

    Its authors ask that no example be published: nothing of it is in this repository.
    """
    columns = {"Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"}
    if path.endswith(".csv"):
        try:
            lines = (line.decode() for file in local_files(path) for _, line in byte_lines(file))
            given = [((path, number), row) for number, row in enumerate(csv.DictReader(lines, strict=True), 2)]
        except (UnicodeDecodeError, csv.Error) as e:
            raise Misuse(f"--gpqa {path}: cannot be read ({e})")
    else:
        given = [(where, parse(where, raw)) for where, raw in raw_rows(path, columns)]
    rows = []
    for where, row in given:
        for column in sorted(columns - {"Record ID"}):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise Misuse(f"{row_at(where)}: field {column!r} is missing, empty or not text")
        options = [row["Correct Answer"].strip(), *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
        order = random.Random(f"{seed} {row['Question']}").sample(range(4), 4)
        listed = "\n".join(f"({letter}) {options[i]}" for letter, i in zip("ABCD", order))
        rows.append({"id": f"gpqa-{row.get('Record ID') or len(rows)}", "problem": f"{row['Question'].strip()}\n\n{listed}\n\nAnswer with the letter of the right option in \\boxed{{}}.",
                     "answer": "ABCD"[order.index(0)], "source": "gpqa"})
    return rows


def benchmarks(args) -> int:
    """Writes one JSONL per benchmark, and report.json with the golds that verify.py cannot read and the ids of Omni-MATH-500."""
    out, report, contents = out_folder(args.out), {"seed": args.seed, "benchmarks": {}}, {}
    given = {source: getattr(args, source) for source in BENCHMARKS if getattr(args, source)}
    names = given or {source: name for source, name in BENCHMARKS.items() if name}
    for source, name in names.items():
        rows = gpqa_rows(name, args.seed) if source == "gpqa" else benchmark_rows(source, name)
        bad = ungradable([r["answer"] for r in rows])
        listed = [r["id"] for r in rows if r["answer"] in bad]
        entry = {"from": name, "rows": len(rows), "unreadable": listed}
        if source == "omni":  # drawn from what a rule can grade, else a part of the score would be lost by construction
            fit = [r for r in rows if r["answer"] not in bad]
            rows = [fit[i] for i in sorted(random.Random(args.seed).sample(range(len(fit)), min(OMNI, len(fit))))]
            entry |= {"drawn": len(rows), "ids": [r["id"] for r in rows]}
        path = out / f"{'omni500' if source == 'omni' else source}.jsonl"
        contents[path] = "".join(map(json_line, rows))
        report["benchmarks"][source] = entry
        print(f"{len(rows):6,} problems for {path}; {len(listed)} of {entry['rows']:,} golds not readable{': ' + ', '.join(listed[:5]) if listed else ''}")
    for path, content in contents.items():  # when all have been read: a misuse leaves none of them
        write_beside(path, content)
    write_beside(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Embedded problems: number theory in plain words whose answer must be found by trial and checked
#
# The cold start of the paper in small. Three imagined teachers solve each problem, each by a habit of its own; their attempts
# and the checks of them are merged into one path  attempt -> reflect -> ... -> answer -> self-verify,  and what is kept is
# what a filter by answer would keep: paths that end right. So SFT shows the policy a mixture of habits that all look successful;
# which of them really works is for RL to find out.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Puzzle:
    """One embedded problem."""

    level: int  # 1 to 3
    words: str
    answer: int
    candidates: range  # what a methodical solver tries, in order; the last one is the answer
    guesses: range  # what a careless solver draws from
    checks: Callable[[int], list[tuple[str, int, int]]]  # the elementary checks of n: (left side, its value, the value needed)


def remainders() -> Iterator[Puzzle]:
    """n from its remainders for two or three coprime moduli (Chinese remainder theorem)."""
    for moduli in [*combinations(range(3, 10), 2), *combinations(range(2, 8), 3)]:
        size, step = math.prod(moduli), max(moduli)
        if size > 84 or any(math.gcd(a, b) > 1 for a, b in combinations(moduli, 2)):
            continue
        order = sorted(moduli, key=lambda m: (m == step, -m))  # candidates step through the largest modulus: it is checked last
        for answer in range(1, size + 1):
            parts = [f"remainder {answer % m} when divided by {m}" for m in moduli]
            words = f"Find the smallest positive integer n that leaves {', '.join(parts[:-1])} and {parts[-1]}."
            checks = partial(lambda order, answer, n: [(f"{n} mod {m}", n % m, answer % m) for m in order], order, answer)
            level = 3 if len(moduli) == 3 else 1 if step <= 7 else 2
            yield Puzzle(level, words, answer, range(answer % step or step, answer + 1, step), range(1, size + 1), checks)


def multiples() -> Iterator[Puzzle]:
    """Smallest n for which a n + c leaves a given remainder (a linear congruence)."""
    for m in range(4, 10):
        for a, c, r in product(range(2, m), range(1, m), range(m)):
            if math.gcd(a, m) == 1:
                answer = next(n for n in range(1, m + 1) if (a * n + c) % m == r)
                words = f"Find the smallest positive integer n such that {a} n + {c} leaves remainder {r} when divided by {m}."
                checks = partial(lambda a, c, m, r, n: [(f"{n} gives {a * n + c} mod {m}", (a * n + c) % m, r)], a, c, m, r)
                yield Puzzle(1 if m <= 5 else 2 if m <= 7 else 3, words, answer, range(1, answer + 1), range(1, m + 1), checks)


def coins() -> Iterator[Puzzle]:
    """Fewest pens in an exact sum of two prices (a linear Diophantine equation)."""
    for a, b, total in product(range(2, 6), range(3, 8), range(15, 50)):
        if math.gcd(a, b) == 1 and total > a * b:
            answer = next(n for n in range(1, b + 1) if (total - a * n) % b == 0)
            words = (
                f"Pens cost {a} coins and books cost {b} coins. With some of both, exactly {total} coins are spent."
                " What is the smallest possible number of pens?"
            )
            checks = partial(lambda a, b, total, n: [(f"{n} leaves {total - a * n} mod {b}", (total - a * n) % b, 0)], a, b, total)
            yield Puzzle(min(3, b - 2), words, answer, range(1, answer + 1), range(1, b + 1), checks)


FAMILIES = {remainders: 2, multiples: 1, coins: 1}  # family: its share of the test set and of the traces
HABITS = {"jump": 0.5, "wander": 0.25, "orderly": 0.25}  # teacher: its share of the traces


def verdicts(checks: list[tuple[str, int, int]]) -> str:
    """Elementary checks in words, up to the first that fails: `13 mod 5 = 3 yes, 13 mod 4 = 1 not 2`."""
    said = []
    for left, value, need in checks:
        said.append(f"{left} = {value} " + ("yes" if value == need else f"not {need}"))
        if value != need:
            break
    return ", ".join(said)


def attempts(puzzle: Puzzle, habit: str, rng: random.Random) -> list[int]:
    """The candidates that a teacher tries, the answer last: none before it (jump: the answer comes out of the blue and is only
    verified), any in any order (wander), or the methodical ones (orderly)."""
    if habit == "jump":
        return []
    if habit == "orderly":
        return list(puzzle.candidates)
    drawn = rng.sample(puzzle.guesses, len(puzzle.guesses))
    return drawn[: drawn.index(puzzle.answer) + 1]


def response_of(puzzle: Puzzle, tried: list[int]) -> str:
    """One path attempt -> reflect -> ... -> answer -> self-verify (paper section 1)."""
    lines = [verdicts(puzzle.checks(n)) + ("" if n == puzzle.answer else ", wait") for n in tried]
    lines.append(f"So {puzzle.answer}, check: {verdicts(puzzle.checks(puzzle.answer))}")
    return "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is \\boxed{{{puzzle.answer}}}."


@cache
def _embedded(n_test: int = 256) -> tuple[list, list]:
    """-> training and test problems, each (row, puzzle). The split never changes: it does not depend on a run's seed."""
    train, test = [], []
    for family, share in FAMILIES.items():
        puzzles = list(family())
        random.Random(family.__name__).shuffle(puzzles)
        rows = [
            (dict(id=f"{family.__name__}/{i}", problem=p.words, answer=str(p.answer), source="embedded", level=p.level), p)
            for i, p in enumerate(puzzles)
        ]
        cut = n_test * share // sum(FAMILIES.values())
        test += rows[:cut]
        train += rows[cut:]
    return train, test


def embedded_problems(split: str) -> list[dict]:
    """Problem rows of the split "train" or "test"; no problem is in both."""
    return [dict(row) for row, _ in _embedded()[split == "test"]]


def embedded_traces(count: int = 25600, longest: int = 16, correct_only: bool = False) -> list[dict]:
    """Cold-start traces over the training problems, at most `longest` attempts each; `source` names the teacher.

    `correct_only`: the failed tries are left out, so that every trace is its right attempt and the check of it, a jump.
    """
    habits = {"jump": 1.0} if correct_only else HABITS
    rng, traces = random.Random(0), []
    by_family = {family: [x for x in _embedded()[0] if x[0]["id"].startswith(family.__name__ + "/")] for family in FAMILIES}
    while len(traces) < count:
        family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
        row, puzzle = rng.choice(by_family[family])
        habit = rng.choices(list(habits), list(habits.values()))[0]
        tried = attempts(puzzle, habit, rng)
        if len(tried) <= longest:
            traces.append(
                dict(id=row["id"], problem=row["problem"], response=response_of(puzzle, tried), answer=row["answer"], source=habit)
            )
    return traces


def read_checks(problem: str, response: str) -> list[tuple[str, bool, bool]]:
    """The elementary checks in a response to an embedded problem, in order: (candidate, does the verdict say yes, is it honest: the
    arithmetic right and the verdict one that fits). [] for any other text."""
    need = {m: r for r, m in re.findall(r"remainder (\d+) when divided by (\d+)", problem)}  # modulus -> remainder
    linear = re.search(r"such that (\d+) n \+ (\d+) leaves", problem)
    spent = re.search(r"^Pens cost (\d+) coins and books cost (\d+) coins\..* exactly (\d+) coins", problem)
    if spent:
        need = {spent[2]: "0"}
    found = []
    for n, verb, x, m, value, verdict, other in re.findall(
        r"(?:\b(\d{1,9}) (gives|leaves) )?\b(\d{1,9}) mod (\d{1,9}) = (\d{1,9}) (yes|not (\d{1,9}))", response
    ):
        if m in need:
            right = int(x) % int(m) == int(value) and (value == need[m] if verdict == "yes" else other == need[m] != value)
            if linear:
                right &= verb == "gives" and int(linear[1]) * int(n) + int(linear[2]) == int(x)
            if spent:
                right &= verb == "leaves" and int(spent[3]) - int(spent[1]) * int(n) == int(x)
            found.append((n or x, verdict == "yes", right))
    return found


def audit_checks(problem: str, response: str) -> tuple[int, int]:
    """How many elementary checks a response holds, and how many of them are honest."""
    found = read_checks(problem, response)
    return len(found), sum(honest for _, _, honest in found)


def habit_of(response: str) -> str:
    """Whose habit a response to an embedded problem shows: jump (no try before the answer), orderly (one try, or tries at equal steps)
    or wander."""
    tried = [int(n) for n in re.findall(r"^(\d{1,9}) (?:mod|gives|leaves) ", response, re.M)]
    steps = {b - a for a, b in zip(tried, tried[1:])}
    return "jump" if not tried else "orderly" if len(steps) < 2 else "wander"


def embedded(args) -> int:
    """Writes the embedded problems, their test set and their traces as files."""
    out = out_folder(args.out)
    for name, rows in (("train", embedded_problems("train")), ("test", embedded_problems("test")), ("traces", embedded_traces())):
        write_beside(out / f"{name}.jsonl", "".join(map(json_line, rows)))
        print(f"{out / name}.jsonl: {len(rows)} rows")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def add_model_options(parser, max_tokens: int, temperature: float):
    parser.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1 (key in OPENAI_API_KEY); without it models run in "
    "this process")
    parser.add_argument("--temperature", type=float, default=temperature, help="of every sample (default %(default)s)")
    parser.add_argument("--max-tokens", type=count, default=max_tokens, help="limit of one reply, tokens (default %(default)s)")
    parser.add_argument("--concurrency", type=count, default=32, help="requests under way at once (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="of one request, seconds (default %(default)s)")
    parser.add_argument("--retries", type=int, default=6, help="after 429, 5xx, time-outs and broken replies (default %(default)s)")
    parser.add_argument("--backoff", type=float, default=1.0, help="seconds before the first retry, then doubled (default %(default)s)")
    parser.add_argument("--batch", type=count, default=32, help="problems, and samples, worked on at once by a model in this process (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a model in this process (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("curate", help="MATH and NuminaMath -> clean RL problems")
    p.add_argument("--math", nargs="+", metavar="DATA", help="MATH: files or hub names (without --math and --numina: both from the hub)")
    p.add_argument("--numina", nargs="+", metavar="DATA", help="NuminaMath-CoT, NuminaMath-1.5, the authors' rl-data.jsonl, or any file with problem and answer or solution")
    p.add_argument("--decontaminate", nargs="+", default=[], metavar="DATA", help="benchmarks no problem may be in: MATH-500, AIME 2024, Omni-MATH, GPQA ...")
    p.add_argument("--out", default="data", help="folder of the results (default %(default)s)")
    p.add_argument("--target", type=count, default=30000, help="problems to draw (paper and default: 30,000), or all there are")
    p.add_argument("--mix", choices=("proportional", "equal"), default="proportional", help="share of each source in the draw (default %(default)s)")
    p.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=["latin"], help="scripts of the problems to keep (default: latin)")
    p.add_argument("--processes", type=count, default=os.cpu_count(), help="default: all cores; the result is the same for any number")
    p.add_argument("--pass-rate", metavar="MODEL", help="drop problems that this model solves never or always")
    p.add_argument("--samples", type=count, default=8, help="samples per problem for --pass-rate (default %(default)s)")
    add_model_options(p, 4096, 1.0)
    p.set_defaults(run=curate)

    p = commands.add_parser("cot", help="problems -> cold-start traces, by models")
    p.add_argument("--problems", metavar="DATA", help="problem rows, e.g. rl.jsonl of curate")
    p.add_argument("--teacher", nargs="+", metavar="MODEL", help="models that attempt: folders or hub names, or names that the server knows")
    p.add_argument("--critic", metavar="MODEL", help="model that writes critiques (default: the first teacher)")
    p.add_argument("--rewriter", metavar="MODEL", help="model that merges (default: the first teacher)")
    p.add_argument("--attempts", type=count, default=8, help="attempts per problem, shared out over the teachers (default %(default)s)")
    p.add_argument("--reflect-share", type=share, default=1.0, help="share of problems whose trace must hold a failed attempt (default %(default)s)")
    p.add_argument("--max-failed", type=count, default=2, help="most failed attempts in one trace (default %(default)s)")
    p.add_argument("--max-chars", type=count, default=32000, help="longest trace, characters (default %(default)s)")
    p.add_argument("--authors", metavar="DATA", help="convert the authors' sft.jsonl (file, or zai-org/T1:sft) instead of asking models")
    p.add_argument("--out", default="data", help="folder of the results (default %(default)s)")
    add_model_options(p, 8192, 1.0)
    p.set_defaults(run=cot)

    p = commands.add_parser("benchmarks", help="the evaluation sets in one form (without options: all but GPQA, from the hub)")
    for source, name in BENCHMARKS.items():
        p.add_argument(f"--{source}", metavar="DATA", help=f"file, or {name}" if name else "your own copy of gpqa_diamond.csv (gated on the hub)")
    p.add_argument("--seed", type=int, default=0, help="of the 500 of Omni-MATH and of GPQA's options")
    p.add_argument("--out", default="benchmarks", help="folder of the results (default %(default)s)")
    p.set_defaults(run=benchmarks)

    p = commands.add_parser("embedded", help="the embedded problems, their test set and the cold-start traces, as files")
    p.add_argument("--out", default="data", help="folder for train.jsonl, test.jsonl and traces.jsonl (default %(default)s)")
    p.set_defaults(run=embedded)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        return args.run(args)
    except Misuse as e:
        print(f"data_prep.py: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # a full disk, a folder that nobody may write to
        print(f"data_prep.py: error: {Stop(e)}", file=sys.stderr)
        return 1


# ----------------------------------------------------------------------------------------------------------------------
# What t1.py shares: rows and logs, measures of a response, text rules, the embedded tokenizer, data order
# ----------------------------------------------------------------------------------------------------------------------

REFLECTION = re.compile(
    r"\b(?:wait|hmm+|perhaps|maybe|alternatively|however|actually|reconsider|re-?check|double-check"
    r"|let me (?:check|verify|try))\b", re.I,
)  # fmt: skip

def behaviour(problem: str, response: str, right: bool) -> dict:
    """What RL may teach, measured on one response: reflection words (section 3) and, in embedded problems, checks.

    honoured: the final answer was checked, and every check of it said yes: it contradicts no check of its own.
    first_right, corrected: a right answer that was the first candidate tried, or that replaced another one.
    """
    found, answer = read_checks(problem, response), verify.extract_answer(response)
    verdicts = [yes for candidate, yes, _ in found if candidate == answer]
    first = bool(found) and found[0][0] == answer
    return dict(
        answer=answer,
        reflections=len(REFLECTION.findall(response)),
        checks=len(found),
        honest=sum(honest for _, _, honest in found),
        honoured=bool(verdicts) and all(verdicts),
        first_right=right and first,
        corrected=right and bool(found) and not first,
    )

def habit_shares(records: list[dict]) -> dict[str, list[float]]:
    """Embedded problems: habit -> [share of the responses, share right among them]."""
    count = Counter((habit_of(r["response"]), r["right"]) for r in records)
    shares = {}
    for habit in HABITS:
        n = count[habit, True] + count[habit, False]
        if n:
            shares[habit] = [n / len(records), count[habit, True] / n]
    return shares

def append_rows(path: Path, rows: list[dict]):
    """Append to a JSONL log; an incomplete last line, left by a kill, is cut off first."""
    with open(path, "ab+") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read())[1] != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write("".join(map(json_line, rows)).encode())

def read_log(path: Path) -> list[dict]:
    """The rows of a JSONL log; an incomplete last line, left by a kill, does not count."""
    lines = json_lines(path) if os.path.lexists(path) else []
    return [parse(where, line) for where, line in lines if line.endswith(b"\n")]

def write_json(path: Path, value):
    write_beside(path, json.dumps(value, indent=1, ensure_ascii=False))

def read_rows(path: str, stage: str) -> list[dict]:
    """Traces ({"problem", "response"}, stage sft) or problems ({"problem", "answer"}) of a data set.

    A row without response or answer is completed from its "solution": as the response, or its last box as the answer.
    """
    rows, needed = [], ("problem", "response" if stage == "sft" else "answer")
    for where, raw in raw_rows(path):
        everything = parse(where, raw)
        row = {k: v for k, v in everything.items() if isinstance(v, (str, int))}  # fit for a log
        messages = everything.get("messages")  # chat data: the last message of each role
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict) and message.get("role") in ("user", "assistant"):
                row[{"user": "problem", "assistant": "response"}[message["role"]]] = message.get("content")
        solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
        row.setdefault("answer", verify.extract_answer(solution) or "")
        row.setdefault("response", solution)
        for name in needed:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise Misuse(f"{row_at(where)}: field {name!r} is missing, empty or not text")
        rows.append(row | dict(where=row_at(where)))
    if not rows:
        raise Misuse(f"{path}: no rows")
    unreadable = [row["where"] for row in rows if stage != "sft" and not verify.is_readable(row["answer"])]
    if unreadable and os.environ.get("RANK", "0") == "0":
        print(f"{len(unreadable)} answers cannot be read by verify.py, so nothing will equal them; the first is in {unreadable[0]}")
    return rows

def repeats(ids: list[int], n: int) -> int:
    """How often the most frequent block of n tokens occurs in ids, counted without overlap."""
    seen, most = {}, 0  # block -> (count, end of its last occurrence)
    for i in range(len(ids) - n + 1):
        block = tuple(ids[i : i + n])
        count, end = seen.get(block, (0, 0))
        if i >= end:
            seen[block] = count + 1, i + n
            most = max(most, count + 1)
    return most

MATHS_SCRIPTS = set("LATIN GREEK MATHEMATICAL DOUBLE-STRUCK SCRIPT BLACK-LETTER SUPERSCRIPT SUBSCRIPT MODIFIER FEMININE"
                    " MASCULINE ALEF BET GIMEL DALET MICRO OHM ANGSTROM PLANCK".split())  # fmt: skip
BROKEN = ("Cc", "Cn", "Co", "Cs")  # Unicode categories: control, unassigned, private use, half surrogate pairs

def garbled(text: str, prompt: str = "") -> bool:
    """Mixed languages or random characters: at least 5 letters, and 5 % of all, are of a script used neither in
    mathematics nor in the prompt; or more than 1 % of the characters are broken (replacement, control, unassigned); or
    60 Latin letters follow each other."""
    broken = [c for c in text if (c < " " and c not in "\n\t\r") or (c > "~" and unicodedata.category(c) in BROKEN)]
    if len(broken) + text.count("\ufffd") > 0.01 * len(text) or re.search(r"[A-Za-z]{60}", text):
        return True
    if text.isascii():
        return False
    scripts, known = ([unicodedata.name(c, "?").split()[0] for c in t if c.isalpha()] for t in (text, prompt))
    foreign = sum(name not in MATHS_SCRIPTS and name not in known for name in scripts)
    return foreign >= 5 and foreign > 0.05 * len(scripts)

def means(records: list[dict]) -> dict:
    """Means over judged responses, as they are logged (docs/metrics.md). None: there is nothing to take a mean of."""
    n, checked = len(records), sum(r["checks"] > 0 for r in records)
    names = "right reward length checks honest honoured first_right corrected reflections ungraded".split()
    total = {name: sum(float(r[name]) for r in records) for name in names}
    row = dict(accuracy=total["right"] / n, honest=total["honest"] / total["checks"] if total["checks"] else None)
    row |= {name: total[name] / n for name in ("reward", "length", "checks")}
    row |= {name: sum(r["pattern"] == name for r in records) / n for name in ("overlong", "repetition", "garbled")}
    row |= {name: total[name] / checked if checked else None for name in ("honoured", "first_right", "corrected")}
    return row | dict(reflections=total["reflections"] / (total["length"] / 100), ungraded=total["ungraded"] / n)

def check_model_folder(folder: str):
    """Reject folders that would hang the loaders, exhaust memory, or be read as something else."""
    path = Path(folder)
    if not path.is_dir():
        if folder.startswith((".", "/", "~")) or folder.count("/") > 1:
            raise Misuse(f"{folder}: there is no such folder")
        return  # a name on the hub
    for file in path.iterdir():
        if not (file.is_file() or file.is_dir()):
            raise Misuse(f"{folder}: {file.name} is not an ordinary file")
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json")  # the library would ignore a damaged one, and with it the end tokens
    for key, value in read_json(path / "config.json").items():
        if isinstance(value, int) and value > (4096 if key.startswith(("num_", "n_")) else 1 << 27):
            raise Misuse(f"{folder}: config.json says {key} = {value}, which no model has; repair it")

def embedded_tokenizer():
    """The tokenizer of the embedded model: Qwen2's class over single bytes, so any text can be written, with whole tokens
    for the numbers 0 to 199 and for the text between numbers in the traces: `12 mod 5 = 2 not 3, wait` is 8 tokens."""
    import tokenizers  # not for those who only prepare data
    import transformers

    symbols = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    texts = [row[part] + "\n" for row in embedded_traces() for part in ("problem", "response")]
    pieces = {piece for text in texts for piece in re.split(r"\d+|(?<=\n)", text) if piece}
    words = [*map(str, range(200)), *sorted(pieces)]
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return tokenizer

def seed_for(seed: int, *what) -> int:
    """A 63-bit seed for one purpose and step. Stateless: a resumed run draws what the uninterrupted one would have."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest(), "big") >> 1

def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The `size` row numbers of step `step` in an endless stream of shuffled epochs over n rows."""
    rows = []
    for i in range(step * size, (step + 1) * size):
        epoch, at = divmod(i, n)
        if not rows or at == 0:
            order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(n)
        rows.append(int(order[at]))
    return rows


if __name__ == "__main__":
    sys.modules["data_prep"] = sys.modules["__main__"]  # t1.py, where it is asked for, imports this very module: one Misuse, not two
    sys.exit(main())
