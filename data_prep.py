"""Problems and traces for T1: what the paper did to its data, with rules that can be read.

    python data_prep.py curate --math PATH --numina PATH --decontaminate PATH ... --out DIR
                                                        30,000 clean RL problems
    python data_prep.py cot --problems DIR/sft_problems.jsonl --teacher MODEL --out DIR
                                                        cold-start traces
    python data_prep.py benchmarks --out DIR            the evaluation sets
    python data_prep.py embedded --out DIR              the embedded problems

A data set is a local file (.jsonl, .ndjson, .json, .csv, each also .gz; .parquet), a pattern in
quotes, a folder, or a name of the hub listed in HUB. Column names of the usual sets are known
(COLUMNS); --columns names others.
Models answer behind an OpenAI-compatible server (`vllm serve`, `transformers serve`).

Rows are JSON lines:  problem {"id", "problem", "answer", "source", "level"?, "solution"?}
                      trace   {"id", "problem", "response", "answer", "source"}
A response reads `<think> ... </think>` and then the answer in `\\boxed{}`.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import glob
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import stat
import sys
import textwrap
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from difflib import SequenceMatcher
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, lru_cache, partial
from itertools import chain, combinations, cycle, islice, product
from numbers import Number
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import verify


class Stop(Exception):
    """The run must end. The message is one line that says what is wrong, where, and what to do.
    Exit code 1."""

    code = 1

    def __str__(self):
        """One printable line of at most 2,000 characters, whatever texts of the user it quotes."""
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"


class Misuse(Stop):
    """Something that the user gave is wrong. Exit code 2."""

    code = 2


# --- Files and data sets: one reader for every command. An error names the file and the row. ------

# Data sets of the hub: name, configuration, split, file. -: none is named
HUB_PARTS = """
EleutherAI/hendrycks_math       algebra                  train  -
EleutherAI/hendrycks_math       counting_and_probability train  -
EleutherAI/hendrycks_math       geometry                 train  -
EleutherAI/hendrycks_math       intermediate_algebra     train  -
EleutherAI/hendrycks_math       number_theory            train  -
EleutherAI/hendrycks_math       prealgebra               train  -
EleutherAI/hendrycks_math       precalculus              train  -
nlile/hendrycks-MATH-benchmark  -                        train  -
AI-MO/NuminaMath-CoT            -                        train  -
AI-MO/NuminaMath-1.5            -                        train  -
zai-org/T1                      -                        train  rl-data.jsonl
zai-org/T1:sft                  -                        train  sft.jsonl
HuggingFaceH4/MATH-500          -                        test   -
HuggingFaceH4/aime_2024         -                        train  -
KbsdJames/Omni-MATH             -                        test   -
openai/gsm8k                    main                     test   -
openai/gsm8k:train              main                     train  -
ChilleD/SVAMP                   -                        train  -
ChilleD/SVAMP                   -                        test   -
math-ai/amc23                   -                        test   -
"""
HUB = defaultdict(list)  # name -> [(configuration, split, file)]
for line in HUB_PARTS.strip().splitlines():
    name, *part = line.split()
    HUB[name].append([None if word == "-" else word for word in part])
ROW_BYTES = 16 << 20  # longest row; a trace of 32,000 tokens has a hundredth of it
FILE_BYTES = 1 << 30  # largest .json file, which is read whole
GZIP_BYTES = 16 << 20  # a gzip file that grows past this and past 200 times its size is a bomb;
GZIP_RATIO = 200  # problems shrink to a fifth
# all but the last also with .gz
DATA_FILES = ".jsonl .jsonlines .jl .ndjson .json .csv .parquet".split()
UNREAD = ".arrow .tsv .zst .xz .bz2 .lz4 .zip .xlsx .xls".split()  # of a folder: not passed over
NO_ROWS = "dataset_info.json dataset_infos.json report.json state.json".split()  # beside rows
LONGEST = 50_000  # characters of problem, solution or answer: comparing longer ones takes too long
_SPLIT = re.compile(  # in a path: test, TEST, MathTest, but not latest
    r"(?:(?<![A-Za-z\d])|(?=[A-Z][a-z]))((?i:train|test|val|dev|eval|hold|held|bench))"
    r"(?i:ing|id|idation|uation|s|set|_?data|_?out|mark|marks)?\d*(?![a-z\d])"
)


def local_files(name: str) -> list[Path]:
    """The data files of a path: a file, a pattern (`set/**/train-*`), or a folder with all that
    lies in it, sorted. Misuse if there is none, or if a folder holds several splits: its test set
    must not be trained on."""
    path = Path(name)
    if not os.path.isdir(name):
        found = [name] if os.path.lexists(name) else glob.glob(name, recursive=True)
        if not found:
            raise Misuse(
                f"{name}: no such file, and not one of the data sets of the hub ({', '.join(HUB)})"
            )
        return sorted(map(Path, found))
    files = {}  # file -> its split
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path).as_posix()
        data = inside.lower().removesuffix(".gz").endswith((*DATA_FILES, *UNREAD))
        if data and file.name not in NO_ROWS and "/." not in f"/{inside}":
            shard = re.findall(r"(.+)-\d{5}-of-\d{5}", file.name)  # cot-00000-of-00144
            split = list(map(str.lower, _SPLIT.findall(inside)))
            files[file] = (shard or split or ["other"])[-1]
    if not files:
        raise Misuse(f"{name}: no {', '.join(DATA_FILES)} file in this folder")
    splits = sorted(set(files.values()))
    if len(splits) > 1 and splits != ["other", "train"]:
        raise Misuse(
            f"{name}: holds files of several splits ({', '.join(splits)}); give one of them: a "
            f"file, a folder, or a pattern in quotes such as '{name}/**/*{splits[-1]}*'"
        )
    return list(files)


def raw_rows(name: str, columns: str = "", strict: bool = True) -> Iterator[tuple[tuple, dict]]:
    """Rows of a data set, with their columns as they are, as a stream of (where, row); Misuse, one
    line, for whatever cannot be read.

    where: (file, row number from 1), for `row_at`. columns: `problem=COLUMN,answer=COLUMN`, or
    empty; each column must be there, if `strict`, and stands in the row as `=problem`, too."""
    if name in HUB and not os.path.exists(name):
        parts = [hub_rows(name)]
    else:
        parts = map(file_rows, local_files(name))
    renames = dict(part.partition("=")[::2] for part in columns.split(",") if part)
    for kind, column in renames.items():
        if kind not in COLUMNS or not column:
            raise Misuse(
                f"--columns {kind}={column}: must be one of {', '.join(COLUMNS)}, =, a column"
            )
    where = None
    for where, raw in chain.from_iterable(parts):
        row = parse(where, raw)
        for kind, column in renames.items():
            found = at(row, column, ())
            if found != ():
                row["=" + kind] = found
            elif strict:
                raise Misuse(f"{row_at(where)}: --columns {kind}={column}: found {', '.join(row)}")
        yield where, row
    if not where:
        raise Misuse(f"{name}: no rows")


def row_at(where) -> str:
    """A row's place in words: `FILE, row N`."""
    return f"{where[0]}, row {where[1]}"


def open_file(path: Path):
    """Opens an ordinary file as bytes. A pipe or a device, which may never end, is refused without
    being opened."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Misuse(
            f"{path}: not a file but a folder, a pipe or a device; copy its content into a file"
        )
    return open(path, "rb")


def file_rows(path: Path) -> Iterator[tuple]:
    """(where, raw) of each row of a file, read by the end of its name: parquet, csv, a JSON array,
    else JSON lines. raw: a line of JSON as bytes, or a value; `parse` takes both. Blank lines count
    as rows, but are none."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    read = {".parquet": parquet_rows, ".csv": csv_rows, ".json": json_rows}.get(kind, byte_lines)
    number = 0
    try:
        str(path).encode()  # an id may hold the name
        for number, row in enumerate(read(path), 1):
            if not isinstance(row, bytes) or row.strip():
                yield (str(path), number), row
    except Misuse:
        raise
    except Exception as e:  # a damaged file makes the libraries raise almost anything
        raise Misuse(
            f"{path}: cannot be read as {kind[1:]} (after row {number}: {type(e).__name__}: "
            f"{getattr(e, 'strerror', None) or e}); repair it, or name it by what it is"
        )


def byte_lines(path: Path, longest: int = ROW_BYTES) -> Iterator[bytes]:
    """Lines, plain or gzipped whatever the name, without byte order mark; memory is bounded."""
    with open_file(path) as plain:
        file = plain
        most = math.inf
        if plain.peek(2).startswith(b"\x1f\x8b"):
            file = gzip.GzipFile(fileobj=plain)
            most = max(GZIP_BYTES, GZIP_RATIO * os.fstat(plain.fileno()).st_size)
        for number, line in enumerate(iter(partial(file.readline, longest + 1), b""), 1):
            most -= len(line)
            if len(line) > longest:
                raise Misuse(
                    f"{path}, row {number}: longer than {longest >> 20} MiB; rows end with \\n"
                )
            if most < 0:
                raise Misuse(
                    f"{path}, row {number}: the gzip file grows to more than {GZIP_RATIO} times "
                    "its size"
                )
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def json_rows(path: Path) -> Iterator | list:
    """The rows of a .json file: an array of rows, one row, or JSON lines after all."""
    text = bytearray()
    for line in byte_lines(path, FILE_BYTES):
        text += line
        if len(text) > FILE_BYTES:
            raise Misuse(f"{path}: larger than {FILE_BYTES >> 20} MiB; write JSON lines (.jsonl)")
    try:
        value = parse_json(text)
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise
        return byte_lines(path)
    return value if isinstance(value, list) else [value]


def csv_rows(path: Path) -> Iterator[dict | bytes]:
    """The rows of a csv file with a header, which is row 1; an empty cell is no value."""
    csv.field_size_limit(ROW_BYTES)
    table = csv.reader(map(bytes.decode, byte_lines(path)), strict=True)
    header = next(table, [])
    yield b""
    for number, cells in enumerate(table, 2):
        if cells and len(cells) != len(header):
            raise ValueError(f"row {number} has {len(cells)} cells, the header {len(header)}")
        yield _unique(zip(header, (cell or None for cell in cells))) if cells else b""


def parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow.parquet as pq

    with open_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(200):
            yield from batch.select(batch.schema.names).to_pylist()  # refuses a name that is twice


def hub_rows(name: str) -> Iterator[tuple]:
    """(where, row) of a data set of the hub, streamed."""
    for config, split, file in HUB[name]:
        place = config or name.split("/")[1].replace(":", "-")
        try:
            from datasets import load_dataset

            rows = load_dataset(
                name.split(":")[0], config, split=split, data_files=file, streaming=True
            )
            for number, row in enumerate(rows, 1):
                yield (place, number), row
        # connection, missing repository, missing split, missing package
        except (OSError, ValueError, ImportError) as e:
            raise Misuse(
                f"{name}: cannot be loaded from the hub ({textwrap.shorten(str(e), 200)}); give a "
                "local copy"
            )


def _unique(pairs) -> dict:
    row = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"key {name!r} is there twice")
        row[name] = value
    return row


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return number


def parse_json(raw: bytes):
    """The value of a JSON text. ValueError or RecursionError for what is not JSON, not UTF-8, or
    ambiguous."""
    value = json.loads(
        raw.decode(), object_pairs_hook=_unique, parse_float=_number, parse_constant=_number
    )
    if b"\\ud" in raw or b"\\uD" in raw:  # half of a surrogate pair is no text: no file takes it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> dict:
    """A file that is one JSON object, such as a config.json. Misuse if it is not."""
    try:
        with open_file(path) as f:
            return parse((path, 1), f.read(ROW_BYTES))
    except (OSError, Misuse) as e:
        raise Misuse(f"{path}: damaged, or no JSON file ({e}); repair it or take another folder")


def parse(where, raw) -> dict:
    """A raw row of `file_rows` as a dict. Misuse with file, row and reason if it is none."""
    try:
        row = parse_json(raw) if isinstance(raw, bytes) else raw
        if roles_of(row):
            row = {"0": row[0], "1": row[-1], "messages": row}  # ORZ: a row is a list of turns
        if isinstance(row, dict):
            return row
        fault = "a row must be a JSON object; a file that is one array of rows is named .json"
    except UnicodeError as e:
        fault = f"not UTF-8 text ({e}); save the file as UTF-8, or repair the line"
    except (ValueError, RecursionError) as e:
        fault = f"not JSON ({e}); repair or remove the line"
    raise Misuse(f"{row_at(where)}: {fault}")


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"  # str: a date as an id


@contextmanager
def naming(path: Path):
    """An error of the disk says which file it is about."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def sync(path: Path):
    """Wait until a file, or the names in a folder, are on the disk: what comes after cannot get
    there first."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write(path: Path, lines):
    """Writes beside the file, then renames: neither a kill nor a power cut leaves a half under the
    final name."""
    beside = path.with_name(path.name + ".partial")
    with naming(path):
        with open(beside, "w", encoding="utf-8") as f:
            f.writelines(lines)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)


def append_rows(path: Path, rows: list[dict], sync: bool = False):
    """Append to a JSONL log; an incomplete last line, left by a kill, is cut off first. sync: wait
    for the disk."""
    with naming(path), open(path, "ab+") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read())[1] != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write("".join(map(json_line, rows)).encode())
        if sync:
            f.flush()
            os.fsync(f.fileno())


def logged(path: Path) -> Iterator[tuple[tuple, dict]]:
    """(where, row) of a JSONL log; an incomplete last line, left by a kill, does not count."""
    for where, line in file_rows(path) if os.path.lexists(path) else ():
        if line.endswith(b"\n"):
            yield where, parse(where, line)


def read_log(path: Path) -> list[dict]:
    return [row for _, row in logged(path)]


def write_json(path: Path, value):
    write(path, [json.dumps(value, indent=1, ensure_ascii=False)])


def chunks(rows, size: int) -> Iterator[list]:
    """Lists of up to `size` rows."""
    rows = iter(rows)
    return iter(lambda: list(islice(rows, size)), [])


# --- What a row says: one table of column names, for t1.py and every command ----------------------
# The picture: a row is a table from columns to values, and `reading` works on it in this order.
#   chat              a conversation becomes three columns: chat.system, chat.user, chat.assistant
#   BESIDE            what a problem needs and its text does not hold is refused: options, pictures
#   choose_response   of several responses one stays, and only if the marks beside it call it right
#   field             of each kind in COLUMNS the first column that holds text is what the row says
#   the rest          joins what belongs together: a problem and its context, a thought and its
#                     response, an answer and the text that ends in it
# A value where text should stand is never passed over: the row is refused, with its number.

# The first name that holds text counts; `a.b` is field b of column a; capitals and blanks do not
# matter; `=answer` is what --columns names. An answer that is called final or true comes before
# `answer`, which may be a whole solution, or a model's.
# `chat.user` is the user's turn: OpenThoughts, ShareGPT, tulu, and in `prompt` verl and DAPO.
# Which set uses which, where it is not plain:
#   problem   question: GSM8K, LIMO, s1K, DeepMath; prompt: TRL, SYNTHETIC-1; query: MetaMathQA;
#             instruction: Alpaca; text: the authors' T1; input: AceReason 1.1; 0.value: ORZ;
#             question.problem: PRM800K; squestion: MAWPS; message_1: camel-ai
#   answer    expected_answer: OpenMathReasoning; final_answer: DeepMath, OlympiadBench;
#             final_ans: MultiArith; answer_number: MGSM; gt_answer: SimpleRL;
#             reward_model.ground_truth: verl, DAPO, Skywork;
#             verification_info.ground_truth: SYNTHETIC-1; label: the authors' T1
#   response  completion: TRL; output: Alpaca; generated_solution: OpenMathReasoning;
#             generations: OpenR1; attempt: s1K; r1_solution_1: DeepMath
#   thought   of the response, in a column of its own: s1K, OpenThoughts (metadata), medical-o1
COLUMNS = {
    "problem": "=problem problem question.problem question chat.user prompt query instruction"
    " text input problem_statement 0.value squestion original_text message_1 user",
    "answer": "=answer expected_answer final_answer final_ans answer_number ground_truth gt gold"
    " ground_truth_answer gt_answer gt_ans gold_answer gold_ans golden_answer reference_answer"
    " ref_answer ref_ans true_answer target_answer standard_answer std_answer correct_answer answer"
    " answers ans output_answer lsolutions reward_model.ground_truth 1.ground_truth.value"
    " verification_info.ground_truth question.ground_truth_answer",
    "label": "=label label target result",  # the answer where no text says one
    "solution": "=solution solution gold_standard_solution question.ground_truth_solution"
    " reference_solution solutions",
    "response": "=response response completion output generated_solution llm_response generations"
    " generation r1_solution_1 chat.assistant deepseek_solution deepseek_attempt attempt"
    " gemini_attempt model_answer reannotated_assistant_content qwq longcot combined_text"
    " message_2 assistant responses completions outputs model_output model_response",
    "thought": "=thought reasoning_content thinking thought reasoning deepseek_thinking_trajectory"
    " thinking_trajectories gemini_thinking_trajectory",  # and what _THOUGHT matches
    "system": "=system chat.system system system_prompt system_message system_instruction"
    " system_instructions sys_prompt systemprompt systemmessage systeminstruction",
    "chat": "=chat messages conversations conversation contents",
    "turn": "content value parts text",  # of a chat
    "source": "=source source data_source problem_source source_type source_dataset dataset",
}
_THOUGHT = re.compile(
    r"(\w+_)?(think|thinking|thoughts?|reasoning|cot|rationale|scratchpad|chain_?of_?thoughts?)"
    r"(_(content|text|trace|process|trajectory|chain|output|details|steps|\d+))?|reasoningcontent"
)
# What a problem cannot be understood without: its options, pictures, earlier turns; and places in
# its text that stand for such (MAWPS: N_00), or a reply that its text goes on with
BESIDE = re.compile(
    r"(answer_|mcq?_|multiple_)?(option|choice)s?(_(list|text)|_?[a-h\d])?|op_?d|alternatives"
    r"|(answer|ans|ending|sol)_?([a-h]|\d)|endings|candidates|(mc[12]|multiple_choice)_targets"
    r"|(distractor|(incorrect|wrong|possible)_answer)s?_?\d*"
    r"|((chat|conversation|dialog|dialogue)_)?history|(prev|previous|prior)_(turns|messages)"
    r"|(decoded_|geometry_)?(image|img|picture|photo|figure|diagram|video|audio)s?"
    r"(_?\d|_(id|path|url|file|filename|name|bytes|base64)s?)?"
    r"|backgrounds?|premises?|theory|scenario|story|articles?|documents?|(pre|post)_text"
    r"|paragraphs?|passages|contexts"
)
CONTEXT = ("context", "passage", "table")  # Dolly; AGIEval; TabMWP
_CUT = re.compile(r"<think>(?!.*</think>\s*\S)", re.S)  # a thought without end, or without answer
_HOLE = re.compile(
    r"<image[ _]?\d*>|\bN_0\d|\bnumber0|(?:<\|im_start\|>assistant|assistant<\|end_header_id\|>"
    r"|\[/INST\]|<\|assistant\|>|<start_of_turn>model|<｜Assistant｜>|(?:\A|\n)ASSISTANT:"
    r"|### (?:Response|Answer|Solution|Assistant|Output):)\s*(?!<think>\s*\Z|Let's think)\S"
)
_NUMBER = re.compile(r"\s*\w*\d\s*")  # 7, q_017
_NOTHING = re.compile(r"(?i)(?:[][{},\s]|'\w+':|none|nan|null)*")  # at any depth
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
IDS = "id _id unique_id uuid problem_id row".split()
VALID = ("problem_is_valid", "solution_is_valid")  # NuminaMath-1.5
_MARKS = re.compile(  # columns that say whether a response, or each of several, is right
    r"(\w+_)?(corrects?|right|verified|passed)(_list)?|correctness(_\w+)?|rewards?|scores?"
    r"|\w*verif[iy]\w*|verdicts?|judge?ments?|(answer|exact)_match(es)?|accuracies|grades"
    r"|deepseek_grade"  # s1K-1.1: of the response that is read
)
RIGHT = "true 1 1.0 yes correct right".split()
WRONG = "false 0 0.0 -1 -1.0 no incorrect wrong".split()
_WORKED = re.compile(  # no bare value, nor a single word
    r"(?s)\A(?![\s$]*(?:\\text\w*\{)?[A-Za-z]+[\s}$.]*\Z).*?"
    r"(?:\n|\\f?box|####|(?<![\\A-Za-z])[A-Za-z]{3,}|.{101})"
)

_PACKED = re.compile(
    r"""\s*(?:\{\s*["'].*\}|\[\s*(?:["']|\{\s*["']|true|false|null).*\])\s*""", re.S
)  # JSON in text
_MARKED_THOUGHT = re.compile(  # OpenThoughts, Bespoke-Stratos, Sky-T1; Magistral; gpt-oss; OpenO1
    r"\s*(?:<\|begin_of_thought\|>|\[THINK\]|<\|channel\|>analysis<\|message\|>"
    r"|<(thinking|thought|reasoning|seed:think)>)(.*?)(?:<\|end_of_thought\|>|\[/THINK\]|</\1>"
    r"|<\|end\|>(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>)(.*)",
    re.S | re.I,
)


def unpacked(value):
    """JSON in text as its value (Skywork's ["350"], csv files); {"": text}, which is no text, of a
    list that is no JSON, such as Python's."""
    if isinstance(value, str) and _PACKED.fullmatch(value):
        with suppress(ValueError, RecursionError):
            return parse_json(value.encode())
        return {"": value}
    return value


def says_right(mark) -> bool | None:
    """What a mark says of a response; None of anything else, such as a share."""
    word = str(mark).lower()
    return word in RIGHT if word in RIGHT + WRONG else None


def at(row: dict, path: str, missing=None):
    """The value of a column, or of a field inside one (`reward_model.ground_truth`)."""
    value = row
    for name in [path] if path in row else path.split("."):
        value = unpacked(value.get(name, missing)) if isinstance(value, dict) else missing
    return value


def as_text(value) -> str | None:
    """Text as it is, a number as text (27.0 as "27"), the element of a list of one; None of
    anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value.keys() <= {"type", "text", "response", "response_model"}:
        value = value.get("text") or value.get("response")  # a part of a turn; NaturalReasoning
    if isinstance(value, Number) and not isinstance(value, bool) and abs(value) < math.inf:
        value = str(int(value) if value == int(value) else value)
    return value if isinstance(value, str) else None


def field(row: dict, kind: str, where) -> str:
    """The text of the first column of a kind that holds some; "" if none does; Misuse where another
    value stands."""
    names = COLUMNS[kind].split()
    if kind == "thought":
        names += filter(_THOUGHT.fullmatch, row)
    for name in names:
        value = at(row, name)
        if value is None or kind == "thought" and isinstance(value, Number):  # a switch
            continue
        if name == "label" and not isinstance(value, str):  # a class: KTO
            continue
        text = as_text(value)
        if kind == "problem" and text and _NUMBER.fullmatch(text):  # of the problem
            continue
        if text and text.strip():
            return text
        of_chat = roles_of(value) and (name == "completion" or kind not in ("answer", "response"))
        lost = text is None and not of_chat and not _NOTHING.fullmatch(str(value))
        if lost and kind not in ("label", "solution", "source"):
            raise Misuse(
                f"{row_at(where)}: field {name!r} must be text or a number, not a "
                f"{type(value).__name__}; found {', '.join(row)}; see --columns"
            )
    return ""


def require(row: dict, names, where, found=None) -> dict:
    """The row, if all those fields hold text."""
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise Misuse(
                f"{row_at(where)}: field {name!r} is missing or empty; found "
                f"{', '.join(found or row)}; see --columns"
            )
    return row


def roles_of(value) -> list[str]:
    """Who speaks in each turn of a chat: system, user, assistant or another; [] of all else."""
    roles = []
    for turn in value if isinstance(value, list) else ():
        role = turn.get("role") or turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str):
            return []
        roles.append(ROLES.get(role.lower(), role.lower()))
    return roles


def with_thought(thought: str, text: str) -> str:
    """A response whose thought stands in a field of its own (the answer may follow it there), or
    between marks of another kind. "" where no answer follows."""
    if marked := _MARKED_THOUGHT.fullmatch(text):
        thought = marked[2]
        text = re.sub(r"<\|(?:(?:begin|end)_of_solution|return|end)\|>|</?Output>", "", marked[3])
    if "</think>" in text:
        return text if "<think>" in text else "<think>\n" + text
    if re.fullmatch(r"\s*[A-Za-z/]*\s*", thought):  # `reasoning: on`, or `high`
        return text
    inside, _, after = thought.strip().removeprefix("<think>").partition("</think>")
    answer = after.strip() or text.strip()
    return answer and f"<think>\n{inside.strip()}\n</think>\n{answer}"


def chat(row: dict, where) -> dict:
    """The conversation of a row as {"chat.system", "chat.user", "chat.assistant"}, a thought in its
    own field as <think> ... </think>; {} if there is none. Misuse if it is longer: a reply in the
    middle is neither trained nor forgotten."""
    values = [at(row, name) for name in f"{COLUMNS['chat']} prompt input completion".split()]
    *whole, prompt, asked, completion = (value if roles_of(value) else [] for value in values)
    turns = next(filter(None, whole), (prompt or asked) + completion)
    roles = roles_of(turns)
    if not re.fullmatch(r"((system )?user( assistant)?)?", " ".join(roles)):
        raise Misuse(
            f"{row_at(where)}: a conversation must be [system,] user, assistant; found "
            f"{', '.join(roles)}"
        )
    return {
        f"chat.{role}": with_thought(field(turn, "thought", where), field(turn, "turn", where))
        for role, turn in zip(roles, turns)
    }


def choose_response(row: dict, where) -> bool:
    """Of several responses in a column one stays: the first whose thought ends and which a list
    beside them marks as right (OpenR1: correctness_math_verify, inside `correctness` in its raw
    form). -> Is there none, or does a mark of the whole row say that its response is wrong?"""
    wrong = str(row.get("label")).lower() == "false"  # KTO
    marks = {}  # name of a list -> of each response: right, wrong or not said
    for name in [*filter(_MARKS.fullmatch, row), "correctness.llama", "correctness.math_verify"]:
        value = at(row, name)
        said = list(map(says_right, value)) if isinstance(value, list) else []
        if True in said or False in said:
            marks[name] = said
            wrong |= said == [False]
        elif name != "score" or "." in str(value):  # it may count votes
            wrong |= says_right(value) is False
    for name in COLUMNS["response"].split():
        texts = at(row, name)
        if not isinstance(texts, list) or roles_of(texts):
            continue
        for mark, said in marks.items():
            if len(said) != len(texts):
                raise Misuse(
                    f"{row_at(where)}: {len(said)} marks in {mark!r} of {len(texts)} responses; "
                    "they must be as many"
                )
        right = list(map(any, zip(*marks.values()))) or [True] * len(texts)
        kept = [
            text for text, ok in zip(texts, right) if ok and text and not _CUT.search(str(text))
        ]
        wrong |= bool(texts) and not kept
        row[name] = kept[:1]
    return wrong


def final(text: str) -> str | None:
    """The value that a worked text ends in: its last box, or what the #### of its last line (GSM8K;
    elsewhere they are a heading) or words (MetaMathQA) say."""
    said = re.findall(r"(?:####(?=.*\s*\Z)|The answer is:)[ \t]*([^\n]+)", text)
    return verify.extract_answer(text) or (said[-1].rstrip(" .") if said else None)


def reading(row: dict, where) -> dict:
    """What a row says, whatever its layout: its problem, answer, solution, response, system message
    and source, empty where it has none. An answer in the solution stays there. Misuse where
    it cannot be understood."""
    row = {re.sub(r"[ -]+", "_", name.strip().lower()): row[name] for name in row} | row
    row |= chat(row, where)
    # Nothing that the problem needs may stand beside it.
    for name, value in row.items():
        lost = name in ("body", *CONTEXT) and as_text(value) is None
        lost |= name == "input" and as_text(value) is None and not roles_of(unpacked(value))
        lost |= name == "c" and "b" in row  # C-Eval
        if (lost or BESIDE.fullmatch(name)) and value and not _NOTHING.fullmatch(str(value)):
            raise Misuse(f"{row_at(where)}: {name!r} beside the problem; write it into its text")
    wrong = choose_response(row, where)
    said = {kind: field(row, kind, where) for kind in COLUMNS}
    problem, answer, label, solution, response, thought, *_ = said.values()
    # The problem is joined with its context.
    for name in ("instruction", "input", *CONTEXT):  # Alpaca
        text = as_text(row.get(name)) or ""
        inside = text in problem or name not in CONTEXT and problem in text
        if problem and text.strip() and not inside:
            problem += "\n\n" + text
    if problem and (body := as_text(row.get("body"))):  # SVAMP
        problem = f"{body} {problem}"
    if hole := _HOLE.search(problem):
        raise Misuse(f"{row_at(where)}: {hole[0]!r} in the problem; write what is meant, or cut it")
    # A column for the answer may hold a whole solution, and one for the solution a bare answer.
    worked = as_text(row.get("answer")) or ""
    if "####" in worked:
        solution = solution or worked
    if answer in ("", solution) and not _WORKED.search(solution):  # DAPO-processed
        answer = solution
        solution = ""
    if len(set(boxes(answer))) < 2:
        answer = final(answer) or answer
    # Without a response the solution is one; without an answer the response may name it.
    response = with_thought(thought, response or solution or thought and worked)
    if wrong or _CUT.search(response):
        response = ""
        wrong = True
    if not answer and not final(solution):
        answer = final(response) or label
    return said | dict(
        id=next((row[name] for name in IDS if row.get(name) is not None), None),
        problem=problem,
        answer=answer,
        solution=solution,
        response=response,
        marked_wrong=wrong,
    )


def to_problem(where, row: dict, default_source: str) -> dict:
    """A row as {"id", "problem", "answer" ("": look into the solution), "solution", "source",
    "level", "flags"}."""
    said = require(reading(row, where), ["problem"], where, row)
    own = where[1] if said["id"] is None else said["id"]
    source = said["source"] or default_source
    if "_id" in row:  # the authors' rows
        source = re.sub(r"_?\d+$", "", row["_id"]) if isinstance(row["_id"], str) else "math"
    level = re.fullmatch(
        r"(?:Level )?((?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,9})?)",
        str(row.get("level", row.get("difficulty", ""))),
    )
    folder, file = os.path.split(where[0])
    stem = file.split(".")[0]
    if folder and (_SPLIT.match(stem) or stem.isdigit()):  # the same in each folder
        stem = f"{os.path.basename(folder)}-{stem}"
    return {
        "id": own if isinstance(own, str) else f"{stem}-{own}",
        "problem": said["problem"],
        "answer": said["answer"],
        "solution": said["solution"] or said["response"].rpartition("</think>")[2].strip(),
        "source": source,
        "level": level and json.loads(level[1]),
        "flags": row,
    }


def too_long(row: dict) -> str | None:
    long = any(len(row[name] or "") > LONGEST for name in "problem solution answer".split())
    return "too long" if long else None


def problem_row(row: dict) -> dict:
    """A row of `to_problem` as it is written: without the fields that are empty."""
    names = "id problem answer source level solution".split()
    return {
        name: row[name] for name in names if name in ("id", "answer") or row[name] not in (None, "")
    }


def all_problems(name: str, default_source: str, columns: str = "") -> Iterator[tuple[tuple, dict]]:
    """(where, row) of `to_problem` for a data set whose every row counts: an over-long row is
    Misuse, where `curate` drops it from a pool."""
    for where, row in raw_rows(name, columns):
        row = to_problem(where, row, default_source)
        if too_long(row):
            raise Misuse(
                f"{row_at(where)}: problem, solution or answer of more than {LONGEST:,} "
                "characters; shorten it"
            )
        yield where, row


def left_out(row: dict, said: dict, stage: str) -> str | None:
    """Why t1.py does not take a row that can be read, or None."""
    if any(row.get(name) not in (None, "Yes") for name in VALID):
        return "marked invalid"
    if stage == "sft":
        return "marked wrong" if said["marked_wrong"] else None
    proof = row.get("question_type") == "proof" or said["answer"] in ("proof", "notfound")
    return "proofs" if proof else None


def gradable(answer: str) -> bool:
    """Can verify.py read an answer, and is it no prose (which equals itself alone)?"""
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", answer)
    return len(words) < 12 and verify.is_readable(answer)


def read_rows(path: str, stage: str, columns: str = "", strict: bool = True) -> list[dict]:
    """Rows of a data set for a stage: traces (sft: "problem", "response") or problems (rl, eval:
    "problem", "answer"), with "system", where the row has one, "where", and all columns of the file
    as they are. Misuse, with the row, where one of these texts is missing. columns, strict: see
    `raw_rows`; a test set beside the data may have other columns than these."""
    rows = []
    gone = Counter()
    for where, row in raw_rows(path, columns, strict):
        said = reading(row, where)
        said["answer"] = said["answer"] or final(said["solution"])
        if reason := left_out(row, said, stage):
            gone[reason] += 1
            continue
        require(said, ["problem", "response" if stage == "sft" else "answer"], where, row)
        row = {} if stage == "sft" else row  # all columns are for --reward
        names = "id problem answer solution response system source".split()
        row |= {name: said[name] for name in names if said[name]}
        rows.append(row | dict(where=row_at(where)))
    bad = [] if stage == "sft" else [row for row in rows if not gradable(row["answer"])]
    first = f"{bad[0]['where']}: {bad[0]['answer'][:60]!r}" if bad else ""
    if not rows or len(bad) == len(rows):
        what = (
            f"{first}; verify.py reads none of the answers" if rows else f"left out: {dict(gone)}"
        )
        raise Misuse(f"{path}: {what}; nothing is left; see --columns")
    if os.environ.get("RANK", "0") == "0":
        if gone:
            print(f"{path}: rows left out: {dict(gone)}")
        if bad:
            print(f"{path}: {len(bad)} answers that verify.py cannot read, {first} ...")
    return rows


# --- The text of a problem, made comparable -------------------------------------------------------
# Duplicates and benchmark problems are found on tokens, not on white-space words: `x^2` and
# `x^{2}`, `\{1` and `\{ 1`, `\dfrac12` and `\frac{1}{2}` give the same tokens, while operators,
# signs and decimal points stay.


def pattern(text: str, flags: int = 0) -> re.Pattern:
    """A regular expression written over several lines, whose ends and margins do not count."""
    return re.compile(re.sub(r"\n *", "", text), flags)


def substituted(text: str, table: list[tuple[str | re.Pattern, str]]) -> str:
    """A text after all replacements of a table, in its order."""
    for found, replacement in table:
        text = re.sub(found, replacement, text)
    return text


_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|$)|\\begin\{asy\}.*?\\end\{asy\}", re.S)
_TOKEN = re.compile(
    r"\$+|\\[()\[\]]|\\[a-zA-Z]+|\\.|(?:\d+(?:\.\d+)?|\.\d+)|[a-z]+|[^\s{}\w]|[^\W\d_]|[_^]"
)

_SIGNS = r"""² ^2 ³ ^3 ≤ \leq ≥ \geq ⩽ \leq ⩾ \geq ≦ \leq ≧ \geq ≠ \neq
    × \times · \cdot ⋅ \cdot ÷ \div − - – - π \pi α \alpha β \beta
    γ \gamma θ \theta λ \lambda ω \omega ° ^\circ ∞ \infty √ \sqrt ∠ \angle △ \triangle
    ∈ \in … \dots""".split()
_UNICODE = {ord(sign): name + " " for sign, name in zip(_SIGNS[::2], _SIGNS[1::2])}
_UNICODE |= str.maketrans(  # the last have no width
    "\u2014\u2032\u2019\u2018\u201c\u201d０１２３４５６７８９＋－＝（）",
    " '''\"\"0123456789+-=()",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad",
)
# One name for a token that is written in several ways; an empty name drops the token.
_SYNONYMS = r"""
    \frac \dfrac \tfrac \cfrac; \leq \le \leqslant; \geq \ge \geqslant; \neq \ne; \rightarrow \to;
    \mod \bmod \pmod; \dots \cdots \ldots \dotsc \dotsb; | \lvert \rvert \vert \mid; \cdot \times; *
    \ast; > \gt; < \lt; \{ \lbrace; \} \rbrace; \circ \degree; \varepsilon \epsilon; \varphi \phi;
    \Diamond \diamond; % \%; ' \prime"""
_ALIAS = {other: name for name, *others in map(str.split, _SYNONYMS.split(";")) for other in others}
_ALIAS |= dict.fromkeys(
    r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits
    \nolimits \, \; \: \! \quad \qquad \text \textbf \textit \textrm \mathrm \mathbf \mathit
    \mathcal \mathbb \mathsf \operatorname \mbox \hbox \rm \bf \it \overline \hspace \vspace \hfill
    \noindent \medskip \par \item \label \ $ $$ . , ; : ? ! ' " ` ~ &""".split()
    + ["\\ ", "\\$", "\\(", "\\)", "\\[", "\\]"],
    "",
)
# Words that do not change the question. NOT IN PAPER: a short list, read off true pairs of
# duplicates.
_HARMLESS = set(
    """a an the of in on at by to for from is are be was were it its this that these those there
    here we you your if then let given suppose assume consider where when such with and or as so
    also now please note find compute calculate determine evaluate solve what which value values
    answer express write written enter give number numbers real reals following question problem
    have has had does do can one could will would must may using use figure diagram shown above
    below centre center respectively both each all any some possible denote denotes denoted called
    say simplest form common fraction s th expression""".split()
)
_FORM = pattern(  # how to answer, as prompts for models say it; labels of a dialogue
    r"""(?:\blet'?s\b|\bplease\b|\bremember\b|\bput\b|\bpresent\b|\bexplain\b
        |\byou (?:must|should|need|are)\b
        |\bthe last line\b|\bshow\b
        |\bsolve th\w+\b|\bthink\b|\bmake sure\b|\boutput\b|\b(?:give|return|write|box|state
        |provide) (?:me )?(?:your|the final)\b
        |\byour final\b|\bthe (?:user|assistant|reasoning)\b|\ba conversation\b)
        [^.?!\n]{0,99}?
        (?:step[- ]by[- ]step|\\boxed|final answer|\byour (?:answer|response|work|reasoning)
        |following (?:math )?(?:question|problem)|user|assistant|tutor|mathematician|enclosed)
        (?:i\.e\.|[^.?!\n:]|:(?! \S)|(?<=answer):|(?<=answer is):|(?<=format):)*(?:[.?!\n:]+|\Z)
        |</?(?:think|answer)>|<\|\w+\|>(?:system|user|assistant)?
        |\b(?:below is an instruction|write a response that|I hope it is correct)\b[^.\n]*
        |(?:\#+ |\bhere is a )?\b(?:math )?(?:question|problem|answer|solution|user|assistant|human
        |instruction|response):""",
    re.I,
)
_PLAINER = [
    (_FORM, " "),
    (_DRAWING, " "),
    (r"(\\[dtc]?frac)\s*(\d)\s*(?=\d)", r"\1 \2 "),  # \frac12 is 1/2, not a fraction of 12
    (r"(?:^|\n)[^\S\n]*[-*\u2022]\s+(?=[A-Za-z$\\(])", " "),  # bullets
    (r"(?<=\d)(?:,|\{,\}|,?\\!|\\,)(?=\d{3}(?!\d))", ""),  # 1,000
    (r"(?<=[a-zA-Z]{2})-(?=[a-zA-Z]{2})", " "),  # a hyphen is no minus
    (r"(?:\\_|_){2,}|\\underline\s*\{[\s\\,;:~]*\}|\\\\(?:\[[^\]]*\])?", " "),  # blanks, line ends
    (r"\\(begin|end)\s*\{\s*([a-zA-Z]+)\*?\s*\}(?:\s*\{[lcr|@{} ]*\})?", " "),
]


def tokens(text: str) -> list[str]:
    """A problem as LaTeX-aware tokens: words, single letters, numbers, operators, commands; no
    braces, punctuation."""
    text = unicodedata.normalize("NFC", text).translate(_UNICODE)
    text = substituted(text, _PLAINER)
    # `\Gamma` is not `\gamma`
    text = re.sub(r"(\\[a-zA-Z]+)|[A-Z]+", lambda m: m[1] or m[0].lower(), text)
    found = []
    last = ""
    for token in _TOKEN.findall(text):
        if token in "!'" and (len(last) == 1 and last.isalnum() or last.isdigit() or last == ")"):
            found.append(token)  # n! and f'(x) are no punctuation
        elif len(token) <= 3 and token.isalpha() and token not in _HARMLESS:
            found += token  # `ab` is `a b`; a short word falls apart on both sides alike
        elif name := _ALIAS.get(token, token):
            found.append(name)
        last = token
    return found


def key(words: list[str]) -> str:
    """Tokens as one string without spaces: equal for texts that differ in spacing, braces and
    synonyms only."""
    return re.sub(r"(?<=\d) (?=[\d.])", ",", " ".join(words)).replace(" ", "")


_SIGN = re.compile(r"[\d.]*\d|\\[a-zA-Z]+|[-+/=<>^!%|*']")
# written or left out by taste: a b, a \cdot b; |S|, #S
_QUIET = set(r"\cdot * \dots \circ ^ |".split())
_BRACKETS = set(r"( ) [ ] | \{ \}".split())
CLAUSE = 6  # tokens. NOT IN PAPER: a longer insertion is a clause of its own (a hint, a credit)


def signs(words: list[str]) -> list[str]:
    """The tokens that tell a problem from its neighbours: numbers, operators, signs, functions."""
    return [w for w in words if w not in _QUIET and _SIGN.fullmatch(w)]


def skeleton(words: list[str]) -> list[str]:
    """Tokens without brackets and harmless words: equal for `tan^2(20)` and `tan^2 20`, `find x`
    and `what is x`."""
    return [w for w in words if w not in _HARMLESS and w not in _BRACKETS]


# Plain text for LaTeX: `<=`, `sqrt(x)`, `(a)/(b)`, `pi`. Commands are read as words, and what is
# often left out is dropped.
_SPOKEN = {r"\leq": "<", r"\geq": ">", r"\neq": "", r"\pm": "+ -", r"\rightarrow": "- >"}
_SPOKEN |= {r"\infty": "infinity", r"\cup": "union", r"\cap": "intersection"}
_UNSPOKEN = set(
    r"""\frac frac / \div * \cdot ^ ! \circ degree degrees \angle angle \triangle triangle \dots \in
    \lfloor \rfloor floor \lceil \rceil ceil \langle \rangle langle rangle prime \pmod pmod bmod
    \mod begin end pmatrix matrix cases array align aligned \perp \equiv =""".split()
)


def spoken(words: list[str]) -> list[str]:
    """A skeleton as plain text, to find benchmark problems: equal for `\\frac{\\pi}{2}` and
    `(pi)/(2)`."""
    plain = []
    for word in words:
        if word[0] == "\\" and word not in _UNSPOKEN:
            name = word[1:].lower()
            plain += _SPOKEN.get(word, name if len(name) > 3 else " ".join(name)).split()
        elif word not in _UNSPOKEN:
            plain.append(word)
    return skeleton(plain)


def drawing(text: str) -> str:
    """The code of the drawings in a problem, without spaces: two problems may differ in nothing
    else."""
    return re.sub(r"\s", "", "".join(_DRAWING.findall(text)))


def in_common(a: list[str], b: list[str]) -> int:
    """How many tokens two lists share, in any order."""
    return (Counter(a) & Counter(b)).total()


def alike(a: list[str], b: list[str]) -> bool:
    """Do two lists share most of their tokens (Dice at least 0.7), or is one, but for a tenth,
    inside the other?"""
    common = in_common(a, b)
    return 2 * common >= 0.7 * (len(a) + len(b)) or common >= 0.9 * min(len(a), len(b))


def same_problem(a: list[str], b: list[str], same_answer: bool) -> bool:
    """Do two token lists with a common stretch state the same problem? NOT IN PAPER: the
    thresholds.

    With equal answers it is enough that they share most words and signs. With different answers
    (one may be wrong, or of another form) they may differ only in harmless words and in clauses
    added to one of them, never in a number or a sign: `z^4 - z^2 + 1` and `z^4 + z^2 + 1`, tan 225
    and tan 22.5 are different problems."""
    a = skeleton(a)
    b = skeleton(b)
    same = alike(a, b) and alike(signs(a), signs(b))
    if same_answer or not same:
        return same
    changes = [
        c for c in SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if c[0] != "equal"
    ]
    clauses = all(a1 - a0 + b1 - b0 >= CLAUSE for _, a0, a1, b0, b1 in changes)
    return clauses and {tag for tag, *_ in changes} in (set(), {"insert"}, {"delete"})


def reworded(a: list[str], b: list[str]) -> bool:
    """Are all signs equal, in order, and nine tenths of the other words? Enough to leave a row out
    for the sake of a benchmark, whatever its answer (labels of the pools are noisy); too loose for
    duplicates: largest, smallest."""
    a = skeleton(a)
    b = skeleton(b)
    return signs(a) == signs(b) and 2 * in_common(a, b) >= 0.9 * (len(a) + len(b))


def same_answer(a: str, b: str) -> bool:
    return a == b or key(tokens(a)) == key(tokens(b)) or verify.is_equal(a, b)


# --- curate: which rows can a rule grade? ---------------------------------------------------------
# NOT IN PAPER: every rule below. The paper extracted answers, filtered noisy rows and removed too
# easy problems (--pass-rate); its rules are not known. A rule takes a row and returns why it is
# rejected, or None. Each was read off rejected and kept rows, and rejects at least 20 of the 29,078
# rows of docs/data.md that no other rule rejects; `marked_invalid` reads columns that those do not
# have.

_REPAIRS = [
    (r"\\equal\s*\{\}", "="),
    (r"\\plus\s*\{\}", "+"),
    (r"\\minus\s*\{\}", "-"),  # of the AoPS forum
    (r"\x0c(?=rac)", r"\\f"),  # a form feed that was the \f of \frac
    (r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]", ""),
    (r"\r\n?", "\n"),
    (r"\s{40,}", "\n"),
    (r"[\xa0\u3000]", " "),
    (r"(?<=[A-Za-z}])\\_(?=[A-Za-z0-9{])", "_"),
    (
        pattern(
            r"""(?<!\\)\\\\(?=[()](?!\[)|[dt]?frac|sqrt|left|right|pi\b|text|times|cdot|sin|cos|tan
                |log|ln)"""
        ),
        r"\\",
    ),
]
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_WRAPPED = pattern(
    r"""\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]
        |\\boxed\s*\{((?:(?!\\boxed).)*)\}""",
    re.S,
)
_FONTS = pattern(
    r"""\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm|it|boldsymbol|quad
        |qquad)(?![a-zA-Z])
        |[{}$~]|\*\*|\\[ ,;!:]"""
)


def repair(text: str) -> str:
    """Undoes typographic damage of the sources: `\\equal{}`, form feeds that were the \\f of
    \\frac, odd spaces."""
    return substituted(text, _REPAIRS).strip()


def boxes(text: str) -> list[str | None]:
    """The content of every outermost box, in order; None for a box whose braces do not close."""
    found = []
    end = 0
    for match in _BOX.finditer(text):
        at = match.end()
        depth = 0
        if match.start() < end:
            continue  # inside the box before
        if text[at : at + 1] != "{":
            found.append(text[at : at + 1] or None)  # `\boxed 2`
            continue
        for brace in re.finditer(r"\\.|[{}]", text[at : at + 2000], re.S):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = at + brace.end()
                break
        found.append(text[at + 1 : end - 1] if end > at else None)
    return found


def bare(answer: str) -> str:
    """An answer without dollars, brackets of display mathematics, a box around it, or a full
    stop."""
    answer = repair(answer).rstrip(".").strip()
    match = _WRAPPED.fullmatch(answer)
    while match:
        inner = next(g for g in match.groups() if g is not None)
        if match[4] is not None and "," in inner and "\\boxed" not in inner:
            return f"[{inner}]"  # \[-2, 2\] is an interval that someone escaped
        answer = inner.strip().rstrip(".")
        match = _WRAPPED.fullmatch(answer)
    return answer


def plain_text(answer: str) -> str:
    """An answer without fonts, braces and spacing commands."""
    return _FONTS.sub(" ", answer).strip(" .")


def found_in(row: dict, patterns: dict[str, re.Pattern]) -> bool:
    return any(wanted.search(row[part]) for part, wanted in patterns.items())


def searched(reason: str, unless: dict[str, str] | None = None, **patterns: str) -> Callable:
    """A rule: rejects a row if a pattern is found in the part of the row that it names, unless an
    excuse is."""
    wanted = {part: pattern(text, re.S) for part, text in patterns.items()}
    excuses = {part: pattern(text) for part, text in (unless or {}).items()}

    def rule(row: dict) -> str | None:
        rejected = found_in(row, wanted) and not found_in(row, excuses)
        return reason if rejected else None

    return rule


def empty_problem(row: dict) -> str | None:
    row["problem"] = repair(row["problem"])
    # the rules on wording must not read the labels of a drawing
    row["words"] = _DRAWING.sub(" ", row["problem"])
    row["lower"] = row["words"].lower()
    return None if len(row["words"]) >= 10 else "empty problem"


def marked_invalid(row: dict) -> str | None:
    """NuminaMath-1.5 says itself which rows are incomplete, proofs or multiple choice."""
    kind = row["flags"].get("question_type")
    if kind == "proof" or row["answer"] in ("proof", "notfound"):
        return "proof"
    if kind == "MCQ":
        return "multiple choice"
    valid = all(row["flags"].get(name) in (None, "Yes") for name in VALID)
    return None if valid else "marked invalid by its source"


_LETTER = r"""\A(?:\(?\s*[A-Ha-h]\s*\)\s*.*|[A-H]\s*[.:].*|[A-H](?:\s*(?:,|and|or|;)\s*[A-H])*
        |.*(?:[\d)}]\s*[,(]|\\(?:implies|\w*[rR]ightarrow|to)\W*)\s*[A-E]\W*)\Z"""
_OPTION = pattern(  # `\textbf{(D)}\; 192`, `\text{(D) 21}`, `A: 8`
    r"""(?:\\(?:text|math)[a-z]*\{?|[$~\s])*+\(?\s*+[A-H]\s*+(?:\)|[.:](?=[\s\\}]))
        (?:[\s}~]|\\[ ,;:!]|\\q?quad)*+(\S.*)""",
    re.S,
)
_OPTIONS_ASKED = pattern(  # the question means nothing without its options
    r"""\b(?:closest|nearest) to\b|\bwhich (?:of|one|is|statement)|\bof the following|\bbest\b
        |\bapproximate|\btrue\b
        |\b(?:must|could|may|might|cannot) (?:not |always )?(?:be|equal|have).{0,9}\Z|\b(?:between
        |interval|range)\W*\Z"""
)


_WORD = pattern(
    r"""(?<![\\a-z])(?!(?:and|or|sin|cos|tan|log|cm|sqrt|feet|inches|cents|meters|miles|minutes
        |hours|seconds|square|cubic|units|degrees)(?![a-z]))[a-z]{3,}""",
    re.I,
)
_CONTINUES = pattern(  # `\boxed{2}$ and $f(1) = 3$`, `\boxed{2}$, $4$`
    r"""\s*(?:\\[)\]]|\$+)?\s*,?\s*(?:(?:and|or|if|for some)\s*(?:\\[(\[]|\$)(?!\\(?:text|math)|\()
        |is either\b|such that\b|where\b)
        |\s*(?:\\[)\]]|\$+),\s*(?:\\[(\[]|\$)"""
)


def value_of(answer: str, problem: str) -> str:
    """An answer without the letter of its option, and without the left side that the problem asks
    for: `\\textbf{(D)}\\; 192` is 192, `a_3 + a_5 = 8` is 8 (a bare 8 would not equal the
    equation)."""
    option = _OPTION.fullmatch(answer)
    if option and not _OPTIONS_ASKED.search(problem.lower()):
        value = option[1]
        if value.count("}") > value.count("{"):
            value = "".join(value.rsplit("}", 1))
        if value.strip("{} ") and not _WORD.search(value):
            answer = value
    # 0,5 cm or 3{,}5; not the digits 0,1,2, the point (0,1), the roots 0,1
    decimal_comma = re.search(r"(?<![\d,(\[{])0(?:,|\{,\})\d+(?!,?\d)", problem) or re.search(
        r"\d\{,\}\d(?!\d\d(?!\d))", answer
    )
    if decimal_comma and not re.search(r"[(\[]|\\\{", answer):
        answer = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d)", ".", answer)
    left, _, right = answer.partition("=")
    whole = len(left.strip()) > 1 and left.count("{") == left.count("}") and "=" not in right
    if not whole or not right or _WORD.search(right):
        return answer
    asked = key(tokens(left)) in key(tokens(problem)) and not re.search(
        r"equation|relation|equality|compare", problem.lower()
    )
    return bare(right) if asked and not verify.is_equal(right, answer) else answer


def find_answer(row: dict) -> str | None:
    """Puts the answer into the row: from the answer column, else from the last box of the solution
    (paper: answers extracted). Returns why there is none, or none that can be trusted."""
    raw = boxes(row["solution"])
    found = [bare(box or "") for box in raw] or [""]
    last = found[-1]
    value = value_of(last, row["problem"])
    if row["answer"]:
        row["answer"] = value_of(bare(row["answer"]), row["problem"])
        is_letter = pattern(_LETTER, re.S).search(plain_text(value))
        if last and not is_letter and not same_answer(value, row["answer"]):
            return "answer and box differ"
    elif not raw or None in raw:
        return "no box"
    else:
        row["answer"] = value
        before, _, after = row["solution"].rpartition("{" + raw[-1] + "}")
        # one value of several, the one asked for
        name = re.search(r"(\S+)\s*=\s*\\boxed\s*\Z", before[-60:])
        asked = name and re.search(
            r"(?:ind|is|of)\W*" + re.escape(name[1].strip("$")) + r"[$.?\s]*(?:\Z|if)",
            row["problem"],
        )
        if _CONTINUES.match(after[:200]) and not asked:
            return "answer continues after the box"
        if last and not all(same_answer(box, last) for box in set(found)):
            return "several different boxes"
    row["plain"] = plain_text(row["answer"])
    return None if row["answer"] else "empty answer"


_NUMERAL = r"(?:[1-5]|[a-e]|i{1,3}|iv|I{1,3}|IV|Ⅰ|Ⅱ|Ⅲ)"
# (1) but not f(1); a) at the beginning of a line or sentence; 1. at the beginning of a line; ①
_PART = pattern(
    rf"""(?<![A-Za-z\d_^}}\\])\$?(?:\\*\()?\(\s*{_NUMERAL}\s*\)(?:\\*\))?\$?(?!\s*[,=^_+*/])
        |(?:^|(?<=[\n.:;?!>]))\s*\*{{0,2}}{_NUMERAL}\)|(?:^|(?<=\n))\s*\*{{0,2}}[1-5]\.\s|[①②③④⑤]"""
)
# a part asks: a question mark, or an order at its beginning or after a comma, "and", "then"
_TASK = pattern(
    r"""\?|(?:^\W*|[.,;:]\s+|\b(?:and|then|also)\s+)(?:please\s+)?(?:find|what|determine|calculate
        |compute|evaluate|how
        |solve|write|express|derive|establish|give|state|factor|simplify|draw|explain|prove|show
        |investigate|discuss
        |sketch|list|fill|complete|translate|estimate|for (?:which|what))""",
    re.I,
)
_LIST_OF_TASKS = pattern(  # Calculate: (1) ... (2) ..., also at the end of a longer head
    r"""\b(?:calculate|compute|evaluate|simplify|factor\w*|solve|find|determine|write|express)\b
        (?!.*\b(?:that|satisf\w+|conditions?|where|such|if)\b)[^.?]{0,80}\Z""",
    re.I | re.S,
)


def several_questions(row: dict) -> str | None:
    """Parts that each ask something, or two sentences that do."""
    head, *parts = _PART.split(row["words"])
    asked = sum(
        s.endswith("?") and bool(re.search(r"\b(?:what|how|find|who|when|where|which)\b", s))
        for s in re.split(r"(?<=[?.!])\s+", row["lower"])
    )
    tasks = sum(bool(_TASK.search(part)) for part in parts)
    if re.search(r"\(2\)|Ⅱ|\(II\)", row["words"][len(head) :][:6]):
        tasks += 1  # the head is the first part
    several = asked >= 2 or tasks >= 2 or len(parts) >= 2 and _LIST_OF_TASKS.search(head[-200:])
    return "several questions" if several else None


_NOT_VARIABLES = pattern(
    r"""\\(?:text|textbf|mathrm|operatorname|mbox|mathbb)\s*\{[^}]*\}|\\[a-zA-Z]+|\d+_\{?\w+\}?
        |[a-zA-Z]{3,}
        |(?<![a-zA-Z])(?:cm|mm|km|kg|ft|in|no|or|if|m|s|h|g)(?![a-zA-Z])"""
)
_USUAL = set("eidxyfcnzpqrs")  # constants, and the names that answers give to the unknown


def long_answer(row: dict) -> str | None:
    """Prose, or a system that no rule grades; commands and brackets do not count."""
    shown = re.sub(r"\\[a-zA-Z]+|[{}()\[\]\s\\&$]", "", row["answer"])
    return "answer longer than 80 characters" if len(shown) > 80 else None


def unknown_letter(row: dict) -> str | None:
    """Letters that the problem does not name (a family k pi, an arbitrary constant): other letters
    are never equal."""
    letters = set(re.findall(r"[a-z]", _NOT_VARIABLES.sub(" ", row["answer"]).lower())) - _USUAL
    return (
        None if letters <= set(tokens(row["problem"])) else "letters that the problem does not name"
    )


def another_script(row: dict) -> str | None:
    """Letters of other scripts than those of --scripts, broken characters, and those of private
    use."""
    text = row["problem"] + row["answer"]
    strange = set(map(script_of, foreign_letters(text))) - {*_WORKER["scripts"]}
    broken = re.search("[\ue000-\uf8ff\ufffd]", text)
    return "another script" if strange or broken else None


_VALUE_WORDS = """and|sin|cos|tan|log|frac|sqrt|square|cubic|per|hours|minutes|seconds|the|base
    |pmatrix|begin|end"""


RULES = (  # in the order of the funnel
    too_long,
    empty_problem,
    marked_invalid,
    searched("link or missing figure", lower=r"https?:|!\["),
    searched("answer given", problem=r"\\boxed\s*\{[^{}_?]*[0-9][^_?]*\}\W*\Z"),
    searched(  # spoken of, but not there as code or as a table
        "link or missing figure",
        lower=r"""\bfig\.|\(\s*see\b|\bfig(?:ure)?\s*\d|\b(?:following|accompanying)\s+(?:figure
            |diagram|picture
            |graph)|\b(?:in|from|on|see|using|to)\s+(?:the|this|each|these)\s+(?:\w+\s+){0,2}?
            (?:figure|diagram|picture|image|drawing|sketch|illustration)s?\b|\b(?:shown|pictured
            |drawn|depicted
            |illustrated|given)\s+(?:below|above|here|in\s+(?:the\s+)?(?:fig|diag|pict))
            |\b(?:graph|grid|net|figure|diagram|picture|chart)s?\s+(?:is\s+|are\s+)?(?:shown
            |below|above
            |indicates?|shows?)\b|\bas\s+(?:is\s+)?(?:shown|pictured|illustrated|depicted)\b""",
        unless={
            "problem": r"""\[asy\]|\\begin\{(?:tikzpicture|asy|tabular|array|matrix)
            |\|[^|\n]+\|[^|\n]+\|"""
        },
    ),
    searched(
        "proof",
        lower=r"""\bprove\b(?! your)|\bjustify\b|(?:^|[.;]\s+|\band\s+)construct\b
            |(?:^|[.,;:)]\s+|\b(?:and|then|to|you|please)\s+)(?:show|verify)\s+(?:that|why)\b""",
    ),
    find_answer,
    another_script,
    searched(
        "multiple choice",
        # at least three options, in order
        words=r"""(?<![A-Za-z\\])\(\s*A\s*\).{1,400}?(?<![A-Za-z\\])\(\s*B\s*\).{1,400}?
            (?<![A-Za-z\\])\(\s*C\s*\)
            |(?:^|\n|\s{2}|\$)\s*(?:\*\*)?\(?A\s*[).:、].{1,400}?\s(?:\*\*)?\(?B\s*[).:、]
            .{1,400}?\s(?:\*\*)?\(?C\s*[).:、]""",
        lower=r"""\bwhich\s+(?:\w+\s+){0,2}?of\s+(?:the\s+following|these)\b
            |\bamong the following\b
            |\bthe following (?:statement|conclusion|proposition|option)s?\b""",
        # also where the options are gone, and the numbers of statements
        plain=rf"{_LETTER}|[\u2460-\u2473]|\A(?:\(\d\)\W*){{2,}}\Z",
    ),
    searched(
        "yes or no, true or false",
        lower=r"""\b(?:determine|decide|state|judge|check|find\s+out|ask|investigate
            |examine)\s+(?:whether|if it)\b
            |(?:^|[.?!,:]\s+)(?:(?:does|do)\s+there\s+exist|is\s+it\s+(?:possible|true
            |necessar\w+|always))\b""",
        plain=r"""(?i)\A(?:yes|no(?!\s+(?:\w+\s+)?(?:solution|value|number|root|integer))|true|false
            |(?:in)?correct
            |(?:im)?possible|not\s+(?:possible|always|necessarily|true)|always|never|exists?
            |it is (?:im)?possible)\b""",
    ),
    several_questions,
    searched(  # two quantities, one answer; two problems in one row
        "several questions",
        lower=r"""\b(?:find|determine|calculate|compute|what (?:is
            |are)) the (?:[a-z]+ ){1,2}and (?:the )?
            [a-z]+(?: [a-z]+){0,2} (?:of|for)\b|\n\s*-{3,}\s*\n""",
        unless={"plain": r",|;|\band\b|\bor\b"},
    ),
    searched(
        "several questions",
        # two tasks in one sentence
        lower=r"""\b(?:what|how many|how much)\b[^.?]*\band\s+(?:what|how many|how much)\b
            |\balso,?\s+(?:find|determine|calculate|compute|give|what)\b""",
        # two blanks to fill, roman parts
        words=r"(?:\\?_\s?){2,}+.*(?:\\?_\s?){2,}|\(?Ⅰ.*Ⅱ|\(I\).*\(II\)",
    ),
    long_answer,
    searched(
        "answer in prose",
        # three words; a rule can compare statements only letter by letter
        plain=rf"(?i)(?:(?<![\\a-z])(?!(?:{_VALUE_WORDS})(?![a-z]))[a-z]{{3,}}(?![a-z]).*?){{3}}",
        answer=r"""answer|\\[lc]?dots|\.\.\.
            |\\(?:perp|parallel|cong|sim|implies|iff|forall|exists|(?:Left)?[rR]ightarrow
            |nmid)(?![a-zA-Z])
            |(?i:\b(?:is|are|powers?|multiples?|numbers?|integers?|primes?|such|choice)\b)""",
    ),
    searched(  # where an exact one is asked for; eighths and sixteenths are exact
        "rounded answer",
        answer=r"\\approx|(?<![\d.])\d*\.(?!\d?[1368][27]5\b)\d{3,}",
        unless={
            "lower": r"""\bround|nearest|decimal|estimate|significant|accura|scientific
                |\.\d.*probab|probab.*\.\d"""
        },
    ),
    unknown_letter,
    searched("ungradable", answer=r"\[\s*-?\s*\\infty|\\infty\s*(?:\\right)?\s*\]"),
    searched(  # many right answers
        "nothing definite asked",
        lower=r"""\b(?:find|give|determine|name|write|list|draw)\s+(?:down\s+)?(?:an?\s+(?:example
            |set of)
            |any|some|\d+\s+(?:natural|positive|different|distinct))\b
            |\bhow\s+(?:can|could|should|might)\s+(?:you|we|one|he|she)\b""",
        unless={"lower": r"smallest|largest|least|greatest|unique|only|all\b"},
    ),
    searched(  # a statement instead of a question
        "nothing definite asked",
        lower="",
        unless={
            "lower": r"""\A(?:[^a-z\\]|\\[a-z]+|\\[^a-z]|(?<![a-z\\])[a-z]{1,3}(?![a-z]))*+\Z
                |\?|formulat|find|determin|calculat|comput|evaluat|what|how|solv|simplif|express
                |writ|give|which|who|when|where|name|list|estimat|convert|factor|expand|enter
                |count|obtain|decide|reduce|perform|round|add|subtract|multipl|divid|represent
                |graph|plot|state|rationaliz|describe|use|_|\\q?quad|answer|\\boxed|value|number
                |[=:]\W*$
                |\b(?:is|was|are|were|equals?|to|be|by|of|at|have|has|in|then)\W*$"""
        },
    ),
)


REASONS = """too long; no solution; empty problem; marked invalid by its source; \
link or missing figure; answer given; proof; no box; empty answer; \
answer continues after the box; several different boxes; answer and box differ; \
another script; multiple choice; yes or no, true or false; several questions; \
answer longer than 80 characters; answer in prose; rounded answer; \
letters that the problem does not name; nothing definite asked; ungradable; \
in a benchmark; same problem, different answers; duplicate; near-duplicate; \
solved too seldom; solved too often; beyond the target""".split("; ")

# --- curate: benchmark problems and near-duplicates -----------------------------------------------
# NOT IN PAPER: how they are found. The evaluation sets must not be trained on.

N_GRAM = 8  # tokens; usual is 13, where an n-gram alone decides
WHOLE = 13  # tokens of a benchmark problem that may stand inside a longer one
PHRASE = 12  # an n-gram in more benchmark problems is a phrase ("relatively prime positive")
SHINGLE = 4  # tokens, for near-duplicates
SKETCH = 8  # the shingles with the least hashes make up the sketch of a row
NEAR = 0.6  # exact Jaccard index of near-duplicates
_ODD = np.random.default_rng(2501).integers(1, 1 << 63, N_GRAM, np.uint64) | np.uint64(1)


@lru_cache(1 << 18)
def token_hash(token: str) -> int:
    """A hash of 64 bits, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


def gram_hashes(words: list[str], n: int) -> np.ndarray:
    """64-bit hashes of all n-grams, `(len(words) - n + 1,)`; one hash of the whole list if it is
    shorter."""
    ids = np.array([token_hash(w) for w in words] or [0], np.uint64)
    n = min(n, len(ids))
    total = np.lib.stride_tricks.sliding_window_view(ids, n) @ _ODD[:n]  # modulo 2^64
    return total ^ (total >> np.uint64(29))


def sketch(words: list[str]) -> np.ndarray:
    """The least hashes of a problem's shingles, `(SKETCH,)`: a random sample that depends on the
    set of shingles alone, so that near-duplicates share at least one almost surely. MinHash with
    one hash function (Broder 1997)."""
    least = np.unique(gram_hashes(words, SHINGLE))
    return np.resize(least, SKETCH)  # a short problem repeats its own


class Benchmarks:
    """Finds the benchmark problem that a row repeats, on plain text: equal, or inside the row, or a
    common 8-gram, after which `same_problem` or `reworded` decides."""

    def __init__(self, rows: list[dict]):
        self.rows = []  # (id, words, their key, gold answer)
        self.alike = defaultdict(list)  # signs, or key without signs -> (key, id) of those rows
        owners = defaultdict(set)  # gram -> rows
        for i, row in enumerate(rows):
            words = tokens(repair(row["problem"]))
            plain = spoken(words)
            gold = bare(row["answer"] or final(row["solution"]) or "")
            text = key(plain)
            self.rows.append((row["id"], plain, text, gold))
            self.alike[key(signs(plain)) or text].append((text, row["id"]))
            for gram in self.grams(words, plain):
                owners[gram].add(i)
        self.owners = {gram: found for gram, found in owners.items() if len(found) <= PHRASE}

    def grams(self, words: list[str], plain: list[str]) -> list[int]:
        hashes = [gram_hashes(part, N_GRAM) for part in (skeleton(words), plain)]
        return np.concatenate(hashes).tolist()

    def find(self, words: list[str], answer: str) -> str | None:
        """The id of the benchmark problem that a row with these tokens repeats, or None."""
        plain = spoken(words)
        text = key(plain)
        for inside, name in self.alike.get(key(signs(plain)) or text, ()):
            if inside in text:  # equal, or within a prompt for models
                return name
        grams = self.grams(words, plain)
        for i in sorted({i for gram in grams for i in self.owners.get(gram, ())}):
            name, other, inside, gold = self.rows[i]
            if len(other) >= WHOLE and inside in text:
                return name
            if same_problem(plain, other, same_answer(answer, gold)) or reworded(plain, other):
                return name
        return None


# --- curate: the pipeline -------------------------------------------------------------------------

_WORKER = {}  # benchmarks, scripts and rules of this process, set once by `prepare`


class Candidate(NamedTuple):
    """A row that passed the rules: its text, and what the later steps compare."""

    line: bytes  # the problem row as JSON
    id: str
    answer: str
    source: str
    hit: str | None  # the benchmark problem that it repeats
    text: int  # hash of the normalised text: equal for duplicates
    buckets: np.ndarray  # (SKETCH,) uint64: rows that share one are compared


def prepare(benchmarks: list[dict], scripts: tuple[str, ...], solutions_only: bool = False):
    """Gives a process what it needs to judge rows. One of a pool ends with the process that started
    it."""
    if multiprocessing.parent_process():
        threading.Thread(target=verify.leave_with, args=(os.getppid(),), daemon=True).start()
    checks = RULES
    if solutions_only:
        checks = (*checks, searched("no solution", solution=r"\A[^ ]{0,80}\Z"))
    _WORKER.update(benchmarks=Benchmarks(benchmarks), scripts=scripts, rules=checks)


def sift(chunk) -> tuple[Counter, list[Candidate]]:
    """One chunk (default source, rows) -> counts of (source, reason or "read"), and the rows that
    pass."""
    default_source, rows = chunk
    counts = Counter()
    passed = []
    for where, row in rows:
        row = to_problem(where, row, default_source)
        counts[row["source"], "read"] += 1
        counts[row["source"], "answer only"] += not row["solution"].strip(" $\n")
        reason = next(filter(None, (rule(row) for rule in _WORKER["rules"])), None)
        if reason:
            counts[row["source"], reason] += 1
            continue
        words = tokens(row["problem"])
        # Near-duplicates agree in every number and sign, so these are part of the bucket: problems
        # made from one template with other numbers never meet, which keeps the search linear.
        buckets = sketch(words) ^ np.uint64(token_hash(" ".join(sorted(signs(words)))))
        passed.append(
            Candidate(
                line=json_line(problem_row(row)).encode(),
                id=row["id"],
                answer=row["answer"],
                source=row["source"],
                hit=_WORKER["benchmarks"].find(words, row["answer"]),
                buckets=buckets,
                text=token_hash(key(words) + drawing(row["problem"])),
            )
        )
    return counts, passed


def read_pools(
    pools: list[tuple[str, str]], shared: tuple, processes: int, columns: str = ""
) -> tuple[Counter, list]:
    """Streams every pool through the rules -> counts of (source, reason), and the candidates in
    order. shared: of `prepare`."""
    counts = Counter()
    candidates = []
    pool = None
    work = (
        (default, part) for name, default in pools for part in chunks(raw_rows(name, columns), 250)
    )
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, prepare, shared)  # sees that a process died
    else:
        prepare(*shared)
    with pool or nullcontext(), tqdm(unit=" rows", desc="rules", mininterval=1) as bar:
        for some in chunks(work, 16 * processes):  # no more of them in memory
            for part, passed in (pool.map if pool else map)(sift, some):
                counts += part
                candidates += passed
                bar.update(sum(n for (_, reason), n in part.items() if reason == "read"))
    return counts, candidates


def ungradable(answers: list[str]) -> set[str]:
    """Answers that verify.py cannot read or does not find equal to themselves; each has its own
    deadline there."""
    different = sorted(set(answers))
    equal = verify.grade(["\\boxed{" + a + "}" for a in different], different)
    return {a for a, ok in zip(different, equal) if not ok}


def near_pairs(rows: list[Candidate], alive: list[int]) -> list[tuple[int, int]]:
    """Pairs of duplicates and near-duplicates among the rows `alive` (ascending), the earlier row
    first. Each row is compared with the first one of its text and of each of its buckets."""
    first = {}  # text or bucket -> row
    found = set()
    for i in alive:
        found |= {(first.setdefault(x, i), i) for x in (rows[i].text, *rows[i].buckets.tolist())}
    found = sorted((a, b) for a, b in found if a != b)
    bar = tqdm(found, desc="near-duplicates", unit=" pairs", mininterval=1)
    return [(a, b) for a, b in bar if is_near(rows[a], rows[b])]


@lru_cache(1 << 12)
def comparable(line: bytes) -> tuple[str, list[str], set[int]]:
    """A candidate's drawings, tokens and shingles."""
    problem = json.loads(line)["problem"]
    words = tokens(problem)
    return drawing(problem), words, set(gram_hashes(words, SHINGLE).tolist())


def is_near(a: Candidate, b: Candidate) -> bool:
    if a.text == b.text:
        return True
    drawing_a, words_a, grams_a = comparable(a.line)
    drawing_b, words_b, grams_b = comparable(b.line)
    if len(grams_a & grams_b) < NEAR * len(grams_a | grams_b):
        return False
    equal = same_answer(a.answer, b.answer)
    return same_problem(words_a, words_b, equal) and (equal or drawing_a == drawing_b)


def judge_groups(rows: list[Candidate], alive: list[int]) -> dict[int, str]:
    """Rows that are rejected because of other rows -> reason. A group of rows states one problem
    and its first row is kept; the whole group is rejected if a row of it is in a benchmark, or if
    the answers differ."""
    group_of = {i: [i] for i in alive}
    gone = {}
    for a, b in near_pairs(rows, alive):
        if group_of[a] is not group_of[b]:
            merged = sorted(group_of[a] + group_of[b])
            group_of |= dict.fromkeys(merged, merged)
    for group in {group[0]: group for group in group_of.values()}.values():
        first = rows[group[0]]
        if any(rows[i].hit for i in group):
            gone |= dict.fromkeys(group, "in a benchmark")
        elif not all(same_answer(rows[i].answer, first.answer) for i in group):
            gone |= dict.fromkeys(group, "same problem, different answers")
        else:
            for i in group[1:]:
                gone[i] = "duplicate" if rows[i].text == first.text else "near-duplicate"
    return gone


def stratified_order(rows: list[int], sources: list[str], seed: int, mix: str) -> list[int]:
    """A seeded order of rows whose every prefix holds the sources in proportion to their size, or
    equally until one source ends. NOT IN PAPER: the mixture; equal is nearer to the authors' own
    30,000."""
    strata = defaultdict(list)
    place = {}
    for i in rows:
        strata[sources[i]].append(i)
    for source in sorted(strata):
        random.Random(f"{seed} {source}").shuffle(strata[source])
        size = len(strata[source]) if mix == "proportional" else 1
        place |= {i: ((rank + 0.5) / size, source) for rank, i in enumerate(strata[source])}
    return sorted(rows, key=place.__getitem__)


def pass_rates(problems: Iterator[dict], model: str, args) -> Iterator[dict]:
    """Problems with their "pass_rate", the share of sampled answers that are right, in order."""
    settings = [model, args.temperature, args.max_tokens, args.samples, ATTEMPT]
    journal = Journal(Path(args.out) / "pass_rates.jsonl", settings, Server(args, model))

    def measure(key: str, problem: dict) -> dict:
        prompt = ATTEMPT.format(problem=problem["problem"])
        kinds = kinds_of(journal.ask(key, model, prompt, args.samples), problem["answer"])
        return {"pass_rate": kinds.count("right") / args.samples}

    with tqdm(desc="pass rates", unit=" problems") as bar:
        for part in chunks(problems, 4 * args.concurrency):
            outcomes = journal.run(part, measure, args.concurrency, bar)
            if journal.refused:
                raise journal.refused
            yield from map(dict.__or__, part, outcomes)


def draw(rows: list[Candidate], order: list[int], args, gone: dict[int, str]) -> dict[int, dict]:
    """Row -> problem, for the first rows of the order that pass the difficulty filter: --target for
    RL and 2/5 as many for traces. Others go to `gone`, with the reason."""
    seen = Counter()
    names = {}  # two sources may use one id
    for i in sorted(order):
        name = rows[i].id
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name}~{seen[name]}"
    problems = (json.loads(rows[i].line) | {"id": names[i]} for i in order)
    low, high = 0.0, 1.0
    if args.pass_rate:
        name, low, high = args.pass_rate
        problems = pass_rates(problems, name, args)
    chosen = {}
    for i, problem in zip(order, problems):
        rate = problem.get("pass_rate", low)
        if low <= rate <= high:
            chosen[i] = problem
        else:
            gone[i] = "solved too seldom" if rate < low else "solved too often"
        if len(chosen) == args.target + 2 * args.target // 5:
            break
    gone |= {i: "beyond the target" for i in order if i not in chosen and i not in gone}
    return chosen


def bounds(given: list[str]) -> tuple[str, float, float]:
    """--pass-rate MODEL [LOW HIGH] -> model, and the least and largest share of right answers."""
    try:
        name, *shares = given
        low, high = map(float, shares or (1 / 16, 15 / 16))
        if not 0 <= low <= high <= 1:
            raise ValueError
    except ValueError:
        raise Misuse(f"--pass-rate {' '.join(given)}: give MODEL, or MODEL LOW HIGH of 0 to 1")
    return name, low, high


def curate(args, out: Path) -> int:
    """Pools -> rl.jsonl, sft_problems.jsonl, report.json and a data card (paper: MATH-train and
    NuminaMath; 30,000 problems for RL and 12,000 others for traces)."""
    if args.mix not in ("proportional", "equal"):
        raise Misuse(f"--mix {args.mix}: give proportional or equal")
    pools = [(name, "math") for name in args.math]
    pools += [(name, Path(name).name.split(".")[0]) for name in args.numina]
    if not pools:  # the paper's sources, without what it is evaluated on
        pools = [("EleutherAI/hendrycks_math", "math"), ("AI-MO/NuminaMath-CoT", "numina")]
        known = [BENCHMARKS[name] for name in "math500 aime24 omni".split()]
        args.decontaminate = args.decontaminate or known
    if args.pass_rate:
        args.pass_rate = bounds(args.pass_rate)
        Server(args, args.pass_rate[0])  # does it answer?
    benchmarks = [row for name in args.decontaminate for _, row in all_problems(name, "benchmark")]
    if not benchmarks:
        print(
            "data_prep.py: warning: no --decontaminate: the problems may hold benchmark problems",
            file=sys.stderr,
        )
    shared = (benchmarks, tuple(args.scripts), args.solutions_only)
    counts, rows = read_pools(pools, shared, args.processes, args.columns)
    bad = ungradable([row.answer for row in rows])
    gone = {i: "ungradable" for i, row in enumerate(rows) if row.answer in bad}
    gone |= judge_groups(rows, [i for i in range(len(rows)) if i not in gone])
    left = [i for i in range(len(rows)) if i not in gone]
    order = stratified_order(left, [row.source for row in rows], args.seed, args.mix)
    chosen = draw(rows, order, args, gone)
    traces = [i for number, i in enumerate(chosen) if number % 7 in (3, 6)]  # 2 of 7
    files = {"sft_problems.jsonl": traces, "rl.jsonl": chosen.keys() - set(traces)}
    for name, members in files.items():
        write(out / name, (json_line(chosen[i]) for i in sorted(members)))
    counts.update((rows[i].source, reason) for i, reason in gone.items())
    counts.update((rows[i].source, "kept") for i in chosen)
    removed = {rows[i].id: rows[i].hit for i in sorted(gone) if gone[i] == "in a benchmark"}
    names = """math numina decontaminate columns target seed mix scripts solutions_only
        pass_rate""".split()
    settings = {name: getattr(args, name) for name in names}
    sizes = {name: len(members) for name, members in files.items()}
    write_report(out, {"settings": settings, "rows": sizes, "in a benchmark": removed}, counts)
    if not chosen:
        raise Stop(f"no row was kept; the table above and {out}/report.json say why")
    return 0


def write_report(out: Path, report: dict, counts: Counter):
    """The funnel on the console, as report.json, and in the data card. counts: of (source, "read",
    "answer only", "kept" or reason)."""
    names = ("read", "answer only", "kept", *REASONS)
    by_source = defaultdict(dict)
    for source, name in product(sorted({source for source, _ in counts}), names):
        if counts[source, name]:
            by_source[source][name] = counts[source, name]
    total = sum(map(Counter, by_source.values()), Counter())
    left = total["read"]
    funnel = []
    table = ["| step | gone | left |", "|---|---:|---:|", f"| read | | {left:,} |"]
    for why in REASONS:
        left -= total[why]
        if total[why]:
            funnel.append({"why": why, "gone": total[why], "left": left})
            table.append(f"| {why} | {total[why]:,} | {left:,} |")
    table += ["", "| source | read | kept | |", "|---|---:|---:|---|"]
    for source, row in by_source.items():
        remark = "answers only" if row.get("answer only") == row["read"] else ""
        table.append(f"| {source} | {row['read']:,} | {row.get('kept', 0):,} | {remark} |")
    report |= {"read": total["read"], "kept": total["kept"], "funnel": funnel}
    write_json(out / "report.json", report | {"by_source": by_source})
    card = (
        f"# {total['kept']:,} mathematics problems with answers that a rule can grade\n\nMade by "
        "`data_prep.py curate`. Licences and answers are those of the sources; nothing is proven. "
        'Those of a source with "answers only" have no solution, and more of them are wrong.\n\n'
    )
    settings = f"\n\nSettings: `{json.dumps(report['settings'])}`\n"
    write(out / "README.md", card + "\n".join(table) + settings)
    print("\n".join(table))
    for name, size in report["rows"].items():
        print(f"{size:,} problems in {out / name}")
    print(f"next: data_prep.py cot --problems {out}/sft_problems.jsonl, then t1.py --stage sft")


# --- Models behind a server, and the journal that keeps their work --------------------------------

GROUP = 2  # samples in one request: what is asked again if it fails, or if the process is killed
PAUSE = 0.5  # seconds before a request is repeated; twice as many before each later repetition


class Unfinished(Stop):
    """A model did not answer after all retries; the same command asks again for what is still open.
    Exit code 1."""


class Refused(Stop):
    """The server will never answer this request (too long, filtered), in its own words. Exit code
    1."""


class Reply(NamedTuple):
    """One sample of a model."""

    text: str  # without what a server with a reasoning parser has moved out of it; may be empty
    thought: str  # that part
    cut: bool  # stopped by --max-tokens, or by the server's filter

    @property
    def answer(self) -> str:
        """What follows the model's own thought."""
        return self.text.rpartition("</think>")[2].strip()


def to_reply(choice) -> Reply:
    """A choice of a completion. Servers name a moved thought `reasoning` or `reasoning_content`.
    ValueError for half of a surrogate pair, which is no text: the journal could not take it."""
    said = choice.message
    thought = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None) or ""
    text = said.content or ""
    (text + thought).encode()
    cut = choice.finish_reason in ("length", "content_filter")
    return Reply(text.strip(), thought.strip(), cut)


class Server:
    """Models behind an OpenAI-compatible server (`vllm serve`, `transformers serve`); `ask` may be
    called by threads. Misuse within ten seconds if no server answers, rather than minutes of
    retries, problem by problem."""

    def __init__(self, args, model: str):
        import openai

        self.args = args
        self.sent = {}  # thread -> when it sent the request that it waits for
        key = os.environ.get("OPENAI_API_KEY") or "none"
        try:
            self.client = openai.OpenAI(
                base_url=args.base_url, api_key=key, timeout=args.timeout, max_retries=0
            )
            self.client.with_options(timeout=10).models.list()
        except (openai.APIStatusError, ValueError, TypeError, AttributeError):
            pass  # a server without a list of models may still answer questions
        except Exception as e:  # refused, unknown host, no answer in time, no address
            raise Misuse(
                f"--base-url {args.base_url}: no server answers ({e.__cause__ or e}); start "
                f"one, for instance `vllm serve {model}`, or correct the address"
            )

    def ask(self, model: str, prompt: str, n: int) -> list[Reply]:
        """1 to n replies of a model (some servers give one whatever n). Lost connections,
        time-outs, 408, 409, 429, 5xx and broken replies are asked again, with a line each. Raises
        Misuse, Refused, or at last Unfinished."""
        import openai

        fault = None
        for repetition in range(self.args.retries + 1):
            if fault:
                tqdm.write(f"{model}: {fault}; asked again", sys.stderr)
                time.sleep(min(8, PAUSE * 2**repetition))
            self.sent[threading.get_ident()] = time.monotonic()
            try:
                completion = self.client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    n=n,
                    temperature=self.args.temperature,
                    max_tokens=self.args.max_tokens,
                )
                if completion.choices:
                    return list(map(to_reply, completion.choices[:n]))
                fault = "a reply without choices"
            except openai.APIStatusError as e:
                fault = f"status {e.status_code} for model {model!r}: {e.body!r:.300}"
                where = f"--base-url {self.args.base_url}: {fault}"
                if e.status_code in (401, 403, 404):
                    raise Misuse(f"{where}; check the address, the model's name and OPENAI_API_KEY")
                if e.status_code < 500 and e.status_code not in (408, 409, 429):
                    raise Refused(where)
            except (openai.APIError, ValueError, TypeError, AttributeError, KeyError) as e:
                fault = f"no usable reply ({type(e).__name__}: {str(e)[:120]})"
            finally:
                del self.sent[threading.get_ident()]
        raise Unfinished(f"{model}: {fault}")


def is_reply(value) -> bool:
    """Is a value of JSON the three parts of a Reply?"""
    return isinstance(value, list) and list(map(type, value)) == [str, str, bool]


class Journal:
    """What models said, and the outcome of each finished problem: JSON lines, on the disk as they
    come. After kill -9 only requests under way are asked again. A problem's key is a hash of its
    text, its answer and the settings, so that nothing of another problem or of other settings is
    ever used. Misuse for a file that is no journal; it is not changed."""

    def __init__(self, path: Path, settings: dict, server: Server | None = None):
        self.path = path
        self.settings = settings
        self.server = server
        self.lock = threading.Lock()
        self.refused = None  # the error to raise when all is done
        self.outcomes = {}  # key -> outcome
        self.replies = defaultdict(dict)  # key of an open problem -> hash of a question -> replies
        begun = path.read_bytes()[:8] if path.exists() else b""
        if not b'{"key": '.startswith(begun):
            raise Misuse(
                f"{path}: not a journal of this command; take another --out, or remove the file"
            )
        for where, row in logged(path):
            require(row, ["key"], where)
            kinds = {"key": str, "outcome": dict, "asked": str, "replies": list}
            good = all(type(value) is kinds.get(name) for name, value in row.items())
            if not (good and all(map(is_reply, row.get("replies", [])))):
                raise Misuse(f"{row_at(where)}: no row of a journal; take another --out")
            self.keep(**row)

    def keep(self, key: str, outcome=None, asked=None, replies=()):
        """A row of the journal: an outcome, or replies to a question."""
        if outcome:
            self.outcomes[key] = outcome
            self.replies.pop(key, None)
        else:
            self.replies[key].setdefault(asked, []).extend(Reply(*reply) for reply in replies)

    def add(self, **row):
        with self.lock:
            append_rows(self.path, [row], sync="outcome" in row)
        self.keep(**row)

    def key(self, problem: dict) -> str:
        return digest([problem["problem"], problem["answer"], self.settings])

    def ask(self, key: str, model: str, prompt: str, n: int = 1) -> list[Reply]:
        """n replies of a model for a problem, asked for in small groups; each group is kept as it
        comes."""
        asked = digest([model, prompt])
        replies = self.replies[key].setdefault(asked, [])
        while len(replies) < n:
            new = self.server.ask(model, prompt, min(GROUP, n - len(replies)))
            self.add(key=key, asked=asked, replies=new)
        return replies[:n]

    def run(self, problems: list[dict], work: Callable, threads: int, bar: tqdm) -> list:
        """The outcome of each problem, or None: a known one, else work(key, problem), by threads.
        What cannot be answered now has none: the same command asks again. Raises Unfinished when
        the others are done, or when the server seems gone: as many problems in a row as threads,
        and at least 4, have no answer. Misuse if it refuses everything; a refusal of some is kept
        in `self.refused` for the caller to raise."""
        keys = list(map(self.key, problems))
        todo = {key: row for key, row in zip(keys, problems) if key not in self.outcomes}
        bar.update(len(problems) - len(todo))
        unfinished = refused = None  # the last error of each kind
        failed = 0  # problems in a row
        with ThreadPoolExecutor(threads) as pool:
            tasks = {pool.submit(work, key, row): key for key, row in todo.items()}
            waiting = set(tasks)
            try:
                while waiting and failed < max(threads, 4):
                    ended, waiting = wait(waiting, 10, FIRST_COMPLETED)
                    for task in ended:
                        try:
                            self.add(key=tasks[task], outcome=task.result())
                            failed = 0
                        except Unfinished as e:
                            unfinished = e
                            failed += 1
                        except Refused as e:
                            refused = e
                            failed += not self.outcomes  # else not all are refused
                    sent = [*self.server.sent.values(), time.monotonic()]
                    bar.update(len(ended))
                    bar.set_postfix_str(
                        f"{len(sent) - 1} requests wait, the oldest {max(sent) - min(sent):.0f} s"
                    )
            finally:
                pool.shutdown(cancel_futures=True)
        outcomes = list(map(self.outcomes.get, keys))
        fault = unfinished or refused
        if fault:
            said = f"{outcomes.count(None)} of {len(keys)} problems are still open ({fault})"
            if unfinished:
                raise Unfinished(f"{said}; run the same command again to resume")
            self.refused = Refused(said)
            if not any(outcomes):
                raise Misuse(said)
        return outcomes


def digest(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


# --- cot: cold-start traces (paper, section 1) ----------------------------------------------------
# The paper's recipe: attempts of several models, a critique of each, merged into one train of
# thought. NOT IN PAPER: the wording of the prompts, the number of attempts (notes on the paper say
# 16), and the rules by which a rewritten trace is kept.

ATTEMPT = """{problem}

Solve the problem step by step and put the final answer in \\boxed{{}}."""
CRITIQUE = """Here is a problem and one attempt at it. The attempt's final answer is {verdict}.

Problem:
{problem}

Attempt:
{attempt}

{task}
Write a short critique only, in the words of someone checking the work. Do not mention that you \
were told the \
verdict."""
WHY_IT_FAILS = (
    "Find the first step that goes wrong, say why it is wrong, and how one could notice it."
)
WHY_IT_HOLDS = (
    "Check the result by an independent route (substitute it back, try a special case, or count "
    "another way) and say why it holds."
)
REWRITE = """Rewrite the material below as one train of thought of a single person who solves the \
problem alone, \
thinking aloud.

Problem:
{problem}

{attempts}

Rules:
- Follow the order above. Present each wrong attempt as your own try with its wrong result, then \
notice the fault \
("Wait, ..."), say why it fails, and try again.
- Arrive at the result of the right attempt, then verify it once more with its check before you \
finish.
- Keep the mathematics of the attempts. Do not mention attempts, critiques, models or instructions.
- Write the whole thought between <think> and </think>, then a short solution that ends in \
\\boxed{{}} with the final \
answer."""
ONE_ATTEMPT = """Attempt {number} ({verdict}):
{attempt}
{kind}:
{critique}
"""
JUDGE = """Here is a problem and the solution of someone who thinks aloud.

Problem:
{problem}

Solution:
{response}

Is the solution coherent from beginning to end and in the language of the problem: each \
calculation right, unless it \
is taken back later, each step following from what stands before it, nothing said again and \
again, no sentence broken \
off, and no word of an answer, a remark or a task that somebody else has given? \
Answer with one word, yes or no."""
PROMPTS = [ATTEMPT, CRITIQUE, WHY_IT_FAILS, WHY_IT_HOLDS, REWRITE, ONE_ATTEMPT, JUDGE]


def kinds_of(attempts: list[Reply], gold: str) -> list[str]:
    """Of each attempt: right, wrong, no box, or cut (whatever it says by then)."""
    right = verify.grade([attempt.text for attempt in attempts], [gold] * len(attempts))
    kinds = []
    for attempt, ok in zip(attempts, right):
        kind = "right" if ok else "wrong" if verify.extract_answer(attempt.text) else "no box"
        kinds.append("cut" if attempt.cut else kind)
    return kinds


def choose_attempts(
    row: dict, attempts: list[Reply], kinds: list[str], args
) -> tuple[list[tuple[str, bool]], str | None]:
    """The attempts that the trace shows, as (text, is it right): wrong ones first, the right one
    last; or why none."""
    good = [attempt.answer for attempt, kind in zip(attempts, kinds) if kind == "right"]
    wrong = {}  # answer -> attempt
    for attempt, kind in zip(attempts, kinds):
        answer = verify.extract_answer(attempt.text)
        if kind == "wrong" and not any(same_answer(answer, other) for other in wrong):
            wrong[answer] = attempt.answer
    rng = random.Random(f"{args.seed} {row['id']}")
    reflect = rng.random() < args.reflect_share
    if not good:
        return [], f"no right attempt: most are {Counter(kinds).most_common(1)[0][0]}"
    if reflect and not wrong:
        return [], "no failed attempt"
    shown = min(len(wrong), rng.randint(1, args.max_failed)) if reflect else 0
    failed = rng.sample(sorted(wrong.values()), shown)
    return [(text, False) for text in failed] + [(rng.choice(good), True)], None


def critique_prompt(row: dict, attempt: str, ok: bool) -> str:
    verdict, task = ("right", WHY_IT_HOLDS) if ok else ("wrong", WHY_IT_FAILS)
    return CRITIQUE.format(problem=row["problem"], attempt=attempt, verdict=verdict, task=task)


def rewrite_prompt(row: dict, path: list[tuple[str, bool]], critiques: list[str]) -> str:
    parts = []
    for number, ((attempt, ok), critique) in enumerate(zip(path, critiques), 1):
        verdict, kind = ("right", "Check") if ok else ("wrong", "Why it fails")
        parts.append(
            ONE_ATTEMPT.format(
                number=number, verdict=verdict, attempt=attempt, kind=kind, critique=critique
            )
        )
    return REWRITE.format(problem=row["problem"], attempts="\n".join(parts))


def rewritten(reply: Reply) -> str:
    """A rewriter's reply as `<think> ... </think> ...`, without a thought of its own: a reasoning
    model thinks before it writes the thought that was asked for; a server or a chat template may
    have taken the first tag, or the thought."""
    own, opened, rest = reply.text.rpartition("<think>")
    if opened or "</think>" in reply.text:
        return "<think>" + rest
    return f"<think>\n{reply.thought}\n</think>\n{reply.text}"


# What a thought says, in plain text: the values that it names, in their order, and the words around
# them.

_MARKUP = re.compile(
    r"\\(?:boxed|fbox|text|mathrm|left|right|displaystyle|[,;!:()\[\] ])(?![a-zA-Z])|[$~]|\*\*"
)
_ITEM = r"""(?:\\(?!(?:to|Rightarrow|implies|q?quad)(?![a-zA-Z]))[a-zA-Z]+|\\[{}%]
        |\d{1,3}(?:,\d{3})+(?!\d)|\d+(?::| : )\d+|\d*\.?\d+|(?<=[\w)}])!(?! [-\d\\])
        |(?<![a-zA-Z])(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve
        |(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty
        |sqrt|sin|cos|tan|log|ln|pi)(?![a-zA-Z])
        |(?<=\d)(?!(?:[ap]m|[ckm]m|k?g|k[mg]|m?l|min|th|st|nd|rd)(?![a-zA-Z]))[a-zA-Z]{1,3}
        (?![a-zA-Z])
        |(?<![a-zA-Z'’])(?!(?<=\d[ ])[msghLNJWV]\b)(?:[b-zB-HJ-Z]|[aAI](?=\s?[-+*/^_=<>)\]]))
        (?![a-zA-Z])
        |[-+−±*/^_%°√πθ∞²³·×÷½∪()\[\]{}|]|,(?=\S))"""
_VALUE = pattern(rf"(?>{_ITEM}(?: ?{_ITEM}){{0,99}})")
_VALUES = pattern(  # several values, or an equation
    rf"""{_VALUE.pattern}(?:\s{{0,2}}(?:[=<>≤≥;,]|,? {{1,2}}(?:and|or|to)\b|\\(?:leq?|geq?
        |in)\b)\s{{0,2}}{_VALUE.pattern})+"""
)
_END = re.compile(r"[.?!](?=\s|$)|\n|\Z")  # of a sentence
_LEADS = pattern(  # to a result
    r"""\b(?:so|thus|hence|therefore|get|gets|got|gives?|giving|obtain|find|yields?|answer|result
        |total|finally|says?|guess|think|try|maybe|perhaps|suppose|value)\b
        |(?:=|\b(?:is|are|be|equals?|makes?|leaves?))\W*$""",
    re.I,
)
_NOTICE = pattern(  # a result is taken back or doubted
    r"""\b(?:wait|hmm+|oops|oh|hold on|actually|mistake\w*|wrong\w*|errors?
        |incorrect\w*|fail(?:s|ed)?
        |contradict\w*|overlooked|not (?:a )?valid|absurd|nonsens\w+|upside down|backwards|reversed
        |inverted|swapped|confus\w+|mix(?:ed|es|ing)? (?:up|those|these|the)|slip(?:ped)?|careless
        |also counts?|(?:double|over|under)[- ]?count\w*
        |forg[eo]t\w*|missed|neglect\w+|ignor\w+|omit\w*|left out|leaves? out|misread|mis\w*count\w*
        |lost|impossible|implausible|re-?check|re-?examine|reconsider|rethink
        |try again|redo|recompute|recount|scratch that|correct(?:ing|ion)
        |start (?:over|again)|too (?:small|large|big|low|high|many|few|much|long|short|early)
        |but|however|though|although|not|nor?|never|cannot|should
        |must|would|rather|instead|still|yet|only|except|of course|whereas|twice|false|suspicious
        |I (?:need|have) to|dropped|aside
        |once more|closer|let me (?:see|look|think|consider|re\w+|go back|start|fix)
        |(?:this|that|it)(?:'s| is| was) (?:the|a|for|just))\b|n't\b|[?!](?!\d|\w)""",
    re.I,
)
_VERIFY = pattern(
    r"""\b(?:(?:double-|re-?)?check\w*|verif\w+|confirm\w*|substitut\w+|plug\w*
        |put(?:ting)? .{0,30}back|test\w*|cross-?check|recomput\w+|(?:an)?other (?:way|route|method)
        |same (?:number|value|result|answer)
        |consistent|holds|to be sure|make sure|agrees?|matches|fits|adds? up|satisf\w+)\b|[✓✔]""",
    re.I,
)
_VERDICT = pattern(  # of a check: the group is a bad one
    r"""\b((?:fail(?:s|ed)?|(?<!was )wrong|incorrect|contradict\w*
        |inconsistent|disagrees?|mistake|mismatch
        |no[,.;:!]|cannot be|impossible
        |(?:does|do|did|is|are)
        (?:n't| not) (?:right|correct|true|equal|\S*\d|hold|work|fit|match|agree|check|satisf\w+
        |add up|the same))|≠|\\ne)
        |\b(?:holds?|works?|right|correct|fine|confirm\w*|consistent|match\w*|agrees?|satisf\w*|yes
        |good|true|required
        |expected|exactly|indeed)\b""",
    re.I,
)
_CONCLUDES = re.compile(
    r"\b(?:answer|result|final(?! (?:check|test|step))\w*|conclu\w+"
    r"|(?:so|hence|thus|therefore),? it(?:'s| is| must be)(?= \W*\d))\b",
    re.I,
)
_GIVEN_AWAY = pattern(  # the answer that was given, the critiques, the instructions
    r"""\bcriti(?:que|c)s?\b|\bverdicts?\b|\binstruct(?:ions?|ed)\b
        |\brewriter\b|\brewrit\w+ (?:the|this|these) (?:material|attempts?|solutions?|thoughts?)\b
        |\bprompts?\b(?! (?:me|us|a)\b)
        |\bthe (?:grader|reviewer|feedback|hint|key (?:says|has|gives))\b
        |\bmarked (?:\w+ ){0,2}(?:as )?(?:wrong|right|(?:in)?correct)\b
        |\b(?:to|with|in) the (?:answer )?(?:key|reference)\b
        |\b(?:responses?|samples?|candidates?) \#?\d
        |\b(?:answer|result) (?:is|was) (?:supposed|meant|claimed|said) to\b
        |\b(?:answer|solution|result) (?:was )?provided\b
        |\battempts? *(?:\#?\d|one\b|two\b|three\b|(?-i:[A-D])\b)|\bthe task (?:says|tells)\b
        |\b(?:the|wrong|right|failed|given|provided|correct|these|both|all) attempts?\b(?! to)
        |\bthe (?:first|second|third|last|previous|earlier|other|next) attempts?\b
        |\bthe rules (?:say|ask|require)\b|\bexpected result (?:is|was)\b
        |\bground[- ]truth\b
        |\b(?:given|provided|expected|official|known|stated|supplied|reference|gold
        |target) (?:final )?answer\b
        |\b(?:reference|official|provided) (?:value|result)\b|\b(?:answer|solution) (?:key|sheet)\b
        |\b(?:answer|solution) says\b|\b(?:given|reference|official|provided) solution\b
        |\bthe reference (?:is|says|gives)\b
        |\b(?:answer|result|solution) (?:is|was|has been|i was) (?:already )?(?:given|provided|known
        |told|supplied)\b
        |\b(?:given|told|know|knowing|known) (?:that )?the (?:right |correct |final 
        |true )?(?:answer|result|solution)\b
        |\bI(?:'m|'ve| am| was| have)(?: been)? (?:told|given|instructed|shown|informed
        |asked to (?:show|present|write))\b
        |\bas an? (?:AI|assistant)\b
        |\b(?:language|AI) models?\b|\bthe user\b|\bsystem message\b|\btrain of thought\b
        |\bas requested\b
        |\bmaterial (?:above|below)\b|\bfollow\w* the (?:order|rules)\b""",
    re.I,
)
_EMPTY = set(  # words that do not argue
    """the this that these there and but now all not wait wrong right correct wrongly sure yes fine
    clear done good true check checks checked verify verified hold holds get got gives answer result
    value final solution number maybe hmm let try again see know therefore thus hence indeed well
    okay""".split()
)
_GARBLED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ue000-\uf8ff\ufffd]|\S{200}")


@lru_cache(1 << 16)
def same_value(text: str, answer: str) -> bool:
    if text.count("(") + text.count("[") != text.count(")") + text.count("]"):
        text = text.strip("()[]")
    return bool(text) and verify.is_equal(text, answer)


def named(text: str, answer: str) -> list[re.Match]:
    """Where a text, without markup, names an answer, in any spelling that verify.py finds equal, in
    order."""
    found = []
    several = re.search(r"[,;:=<>]|\\cup|\\pm|\bor\b|\band\b|\\in\b", answer)
    for match in chain(_VALUE.finditer(text), _VALUES.finditer(text) if several else ()):
        value = match[0].strip(" ,*/^_+")
        if len(value) <= 2 * len(answer) + 30 and same_value(value.rstrip("-"), answer):
            found.append(match)
    words = _MARKUP.sub("", answer).strip("{} ")
    if re.search(r"(?<!\\)\b[^\W\d_]{2,}", words):
        words = " ?".join(map(re.escape, words.replace(" ", "")))
        found += re.finditer(rf"(?<!\w){words}(?!\w)", text, re.I)
    return sorted(found, key=re.Match.span)


def sentence(match: re.Match) -> tuple[str, str]:
    """What stands before and after a match in its sentence."""
    text = match.string
    start, end = match.span()
    first = max(text.rfind(mark, 0, start) for mark in (". ", "? ", "! ", "\n")) + 1
    return text[first:start], text[end : _END.search(text, end).start()]


def is_result(value: re.Match) -> bool:
    """Is a value said as a result: after a word that leads to one, or near the end of its
    sentence?"""
    before, after = sentence(value)
    goes_on = re.match(r"(?! is the (?:answer|result))(?:.*\d|(?:\W+\w+){7})", after)
    return bool(_LEADS.search(before)) or not goes_on


def ends_elsewhere(text: str, answer: str) -> bool:
    """Does the last sentence of a text that speaks of a result name values, and not the
    answer?"""
    said = [sentence(match)[1] for match in _CONCLUDES.finditer(text)]
    said = [rest for rest in said if re.search(r"\d", rest)]
    return bool(said) and not named(said[-1], answer)


def story_fault(text: str, failed: list[str], answer: str) -> str | None:
    """Does a thought name each failed answer as a result and take it back, then the right one, then
    verify that, and end with it? Why not, or None. NOT IN PAPER: rules in place of a reader; the
    judge reads what passes them."""
    told = named(text, answer)
    right = list(filter(is_result, told))
    at = 0
    for wrong in failed:
        places = [place for place in named(text, wrong) if place.start() >= at and is_result(place)]
        if not places:
            return "failed attempt not recognised"
        start, end = places[0].span()
        later = [place.start() for place in right if place.start() >= end]
        notice = _NOTICE.search(text, end, min(later, default=len(text)))
        if not notice:
            return "failed attempt not recognised"
        for place in right:
            if place.end() <= start:
                checked = _VERIFY.search(text[place.end() : min(place.end() + 60, start)])
                if checked or _CONCLUDES.search(sentence(place)[0]):
                    return "right answer before the failed one"
        at = notice.end()
    told = [place for place in told if place.start() >= at]
    if failed and not told:
        return "failed attempt not recognised"
    check = _VERIFY.search(text, told[0].end()) if told else None
    if not check:
        return "no self-verification"
    fails = None
    for match in _VERDICT.finditer(text, check.start()):
        clause = re.split(r"[.,;:?!] |\n", text[: match.start()])[-1]
        if not match[1] or named(clause, answer) or not re.search(r"\d", clause):
            fails = match[1]
    if fails:
        return "verification fails"
    if ends_elsewhere(text[at:], answer):
        return "ends at another value"
    numbers = set(re.findall(r"\d+", text)) - set(re.findall(r"\d+", " ".join([answer, *failed])))
    words = set(re.findall(r"[^\W\d_]{3,}", text.lower())) - _EMPTY
    return "no reasoning" if len(numbers | words) < 3 else None


def trace_fault(row: dict, response: str, path: list[tuple[str, bool]], args) -> str | None:
    """Why a rewritten response is not a trace, or None."""
    parts = re.fullmatch(
        r"<think>((?:(?!</?think>).){33,})</think>((?:(?!</?think>).)*)", response, re.S
    )
    if not parts:
        return "not one thought and one answer"
    if not verify.grade([response], [row["answer"]])[0]:
        return "wrong answer"
    if len(response) > args.max_chars:
        return "over-long"
    words = response.split()
    if max(Counter(zip(*(words[i:] for i in range(12)))).values(), default=0) > 3:
        return "repetitive"
    if foreign_letters(response, row["problem"]) or _GARBLED.search(response):
        return "garbled"
    if any(m[0].lower() not in row["problem"].lower() for m in _GIVEN_AWAY.finditer(response)):
        return "speaks of what was given"
    thought, solution = (_MARKUP.sub(" ", part) for part in parts.groups())
    if ends_elsewhere(solution, row["answer"]):
        return "ends at another value"
    failed = [verify.extract_answer(attempt) for attempt, ok in path if not ok]
    return story_fault(thought, failed, row["answer"])


def make_trace(key: str, row: dict, journal: Journal, args) -> dict:
    """A problem -> its outcome: {"id", "why" it gave no trace or "kept", "response", "failed":
    failed attempts that the trace shows, "attempts": how many were right, wrong, without box,
    cut}."""
    ask = partial(journal.ask, key)
    attempts = []
    shares = Counter(islice(cycle(args.teacher), args.attempts))
    for teacher, share in shares.items():
        attempts += ask(teacher, ATTEMPT.format(problem=row["problem"]), share)
    kinds = kinds_of(attempts, row["answer"])
    path, why = choose_attempts(row, attempts, kinds, args)
    response = ""
    if not why:
        critiques = [
            ask(args.critic, critique_prompt(row, attempt, ok))[0].answer for attempt, ok in path
        ]
        reply = ask(args.rewriter, rewrite_prompt(row, path, critiques))[0]
        response = rewritten(reply)
        why = "rewrite cut" if reply.cut else trace_fault(row, response, path, args)
    if not why:
        prompt = JUDGE.format(problem=row["problem"], response=response)
        verdict = ask(args.judge, prompt)[0].answer
        if not re.search(r"^\W*yes\b|\byes\W*$", verdict, re.I):
            why = "rejected by the judge"
    return {
        "id": row["id"],
        "why": why or "kept",
        "response": "" if why else response,
        "failed": max(len(path) - 1, 0),
        "attempts": Counter(kinds),
    }


def read_problems(name: str, columns: str = "") -> list[dict]:
    """Problem rows for `cot`: any source that `curate` reads, answers included, with distinct
    ids."""
    rows = {}
    for where, row in all_problems(name, "local", columns):
        fault = find_answer(row)
        if fault:
            raise Misuse(
                f"{row_at(where)}: no answer that can be trusted ({fault}); mend field 'answer' "
                "or the box of 'solution', or run `curate` first"
            )
        if row["id"] in rows:
            raise Misuse(
                f"{row_at(where)}: field 'id': {row['id']!r} is there twice; give each "
                "problem its own"
            )
        rows[row["id"]] = {k: row[k] for k in "id problem answer source".split()}
    return list(rows.values())


def cot(args, out: Path) -> int:
    """Problems -> sft.jsonl, by models; what has come is on disk at once and is never asked for
    again."""
    if args.authors:
        return read_authors(args.authors, args.columns, out)
    if not args.teacher or not args.problems:
        raise Misuse(
            "cot: give --problems FILE and at least one --teacher (or --authors FILE for the "
            "authors' traces)"
        )
    problems = read_problems(args.problems, args.columns)
    args.critic = args.critic or args.teacher[0]
    args.rewriter = args.rewriter or args.teacher[0]
    args.judge = args.judge or args.critic
    names = """teacher critic rewriter judge attempts reflect_share max_failed temperature
        max_tokens max_chars seed""".split()
    settings = {name: getattr(args, name) for name in names} | {"prompts": digest(PROMPTS)}
    journal = Journal(out / "journal.jsonl", settings, Server(args, args.teacher[0]))
    make = partial(make_trace, journal=journal, args=args)
    with tqdm(desc="traces", total=len(problems), unit=" problems") as bar:
        outcomes = journal.run(problems, make, args.concurrency, bar)
    why = Counter()
    attempts = Counter()
    traces = []
    reflecting = 0
    for row, outcome in zip(problems, outcomes):
        if not outcome:
            continue
        why[outcome["why"]] += 1
        attempts.update(outcome["attempts"])
        if outcome["response"]:
            traces.append(row | {"response": outcome["response"]})
            reflecting += outcome["failed"] > 0
    report = {
        "settings": settings,
        "problems": why.total(),
        "outcomes": dict(why.most_common()),
        "attempts": attempts,
        "with a failed attempt": reflecting,
    }
    write_json(out / "report.json", report)
    print("attempts: " + ", ".join(f"{n:,} {kind}" for kind, n in attempts.most_common()))
    print("\n".join(f"{n:8,}  {reason}" for reason, n in why.most_common()))
    if not traces:
        raise Stop(f"no trace was kept of {why.total()} problems; {out}/report.json says why")
    write_traces(out, traces, f"{reflecting:,} with a failed attempt that is recognised")
    if journal.refused:
        raise journal.refused
    return 0


def write_traces(out: Path, traces: list[dict], remark: str) -> int:
    write(out / "sft.jsonl", map(json_line, traces))
    print(f"{len(traces):,} traces in {out / 'sft.jsonl'}, {remark}")
    print(f"next: python t1.py --stage sft --model YOUR_MODEL --data {out / 'sft.jsonl'}")
    return 0


def read_authors(name: str, columns: str, out: Path) -> int:
    """The authors' sft.jsonl, whose columns are not documented, or any other traces -> trace
    rows."""
    rows = read_rows(name, "sft", columns)
    traces = []
    for number, row in enumerate(rows, 1):
        response = row["response"]
        if not (answer := verify.extract_answer(response)):
            continue
        if "</think>" not in response:  # they think aloud without tags; the answer comes last
            thought, _, rest = response.rpartition("\n\n")
            if not (thought and verify.extract_answer(rest)):
                thought = response
                rest = f"\\boxed{{{answer}}}"
            response = f"<think>\n{thought.strip()}\n</think>\n{rest.strip()}"
        traces.append(
            dict(
                id=f"t1-sft-{number}",
                problem=row["problem"],
                response=response,
                answer=answer,
                source="t1-sft",
            )
        )
    if not traces:
        raise Misuse(f"{name}: no rows with a boxed answer")
    return write_traces(
        out, traces, f"{len(rows) - len(traces):,} rows without a boxed answer left out"
    )


# --- benchmarks: the evaluation sets of the paper in one form -------------------------------------

BENCHMARKS = {  # option, also the source's name -> name on the hub
    "math500": "HuggingFaceH4/MATH-500",
    "aime24": "HuggingFaceH4/aime_2024",
    "omni": "KbsdJames/Omni-MATH",
    "gsm8k": "openai/gsm8k",
    "amc23": "math-ai/amc23",
    "gpqa": None,
}
# NOT IN PAPER: which problems. The paper's own 500 are not published: a seeded draw lists its ids.
OMNI = 500


def benchmark_rows(source: str, name: str, columns: str = "") -> list[dict]:
    """A benchmark's rows as problem rows."""
    rows = []
    for _, row in all_problems(name, source, columns):
        given = row["flags"]
        if given.get("split", "test") != "test":  # a local file may hold both splits of GSM8K
            continue
        answer = bare(row["answer"] or final(row["solution"]) or "")
        if source == "aime24" and re.fullmatch(r"\d{1,9}", answer):
            answer = str(int(answer))  # "025"
        if not isinstance(given.get("unique_id", given.get("id")), str):
            row["id"] = f"{source}-{given.get('id', given.get('row', len(rows)))}"
        row |= dict(problem=repair(row["problem"]), answer=answer, source=source)
        rows.append(problem_row(row))
    return rows


def gpqa_rows(path: str, seed: int) -> list[dict]:
    """GPQA-diamond from the user's own copy (gpqa_diamond.csv, or its columns in another file),
    options shuffled by seed. Its authors ask that no example be published: nothing of it is in this
    repository."""
    columns = "Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Question"
    rows = []
    for where, row in raw_rows(path):
        texts = {column: as_text(row.get(column)) for column in columns.split(",")}
        *options, question = map(str.strip, require(texts, texts, where, row).values())
        order = random.Random(f"{seed} {texts['Question']}").sample(range(4), 4)
        listed = "\n".join(f"({letter}) {options[i]}" for letter, i in zip("ABCD", order))
        problem = (
            f"{question}\n\n{listed}\n\nAnswer with the letter of the right option in \\boxed{{}}."
        )
        rows.append(
            {
                "id": f"gpqa-{row.get('Record ID') or len(rows)}",
                "problem": problem,
                "answer": "ABCD"[order.index(0)],
                "source": "gpqa",
            }
        )
    return rows


def benchmarks(args, out: Path) -> int:
    """Writes a JSONL per benchmark, and report.json with unreadable golds and the ids drawn of
    Omni-MATH."""
    report = {"seed": args.seed, "benchmarks": {}}
    contents = {}
    given = {source: getattr(args, source) for source in BENCHMARKS}
    names = given if any(given.values()) else BENCHMARKS
    for source, name in names.items():
        if not name:
            continue
        rows = (
            gpqa_rows(name, args.seed)
            if source == "gpqa"
            else benchmark_rows(source, name, args.columns)
        )
        bad = ungradable([r["answer"] for r in rows])
        unreadable = [r["id"] for r in rows if r["answer"] in bad]
        entry = {"from": name, "rows": len(rows), "unreadable": unreadable}
        if source == "omni":
            # drawn from golds that a rule can grade: on the others no response would be right
            fit = [r for r in rows if r["answer"] not in bad]
            rows = [
                fit[i]
                for i in sorted(
                    random.Random(args.seed).sample(range(len(fit)), min(OMNI, len(fit)))
                )
            ]
            entry |= {"drawn": len(rows), "ids": [r["id"] for r in rows]}
        path = out / f"{'omni500' if source == 'omni' else source}.jsonl"
        contents[path] = rows
        report["benchmarks"][source] = entry
        print(
            f"{len(rows):6,} problems for {path}; {len(unreadable)} of {entry['rows']:,} golds not "
            "readable (report.json lists them)"
        )
    for path, rows in contents.items():  # after all have been read: a misuse leaves none of them
        write(path, map(json_line, rows))
    write_json(out / "report.json", report)
    return 0


# --- Embedded problems: number theory in words, whose answers are found by trial and checked ------
# A miniature of the paper's cold start. Three imagined teachers solve each problem, each by its own
# habit; attempts and checks are merged into one path  attempt -> reflect -> ... -> answer ->
# self-verify,  and every path ends right, as after a filter on the answer. So SFT shows the policy
# a mixture of habits that all look successful; RL has to find out which of them works.


@dataclass(frozen=True)
class Puzzle:
    """One embedded problem."""

    level: int  # 1 to 3
    words: str
    answer: int
    size: int  # a careless solver draws from 1 to size
    step: int  # between the candidates of a methodical solver, of which the last is the answer
    conditions: list[tuple[str, int, int, int, int]]  # (verb, a, c, m, r): a n + c mod m is r


@dataclass(frozen=True)
class Ground:
    """Which embedded problems and traces: the sizes of the puzzles, and how the teachers search."""

    pairs: range = range(3, 10)  # moduli of `remainders`, by two and by three
    triples: range = range(2, 8)
    sizes: range = range(85)  # their products
    books: range = range(3, 8)  # coins a book
    totals: range = range(15, 50)  # coins in all
    longest: int = 16  # tries in one trace
    # habit, its share before traces of more tries go
    habits: tuple = (("jump", 0.5), ("wander", 0.25), ("orderly", 0.25))


EASY = Ground()
HARD = Ground(  # the same arithmetic, longer searches
    range(5, 11),
    range(2, 10),
    range(40, 191),
    range(7, 11),
    range(40, 111),
    longest=28,
    habits=(("jump", 0.5), ("wander", 0.3), ("orderly", 0.2)),
)


def remainders(ground: Ground) -> Iterator[Puzzle]:
    """n from its remainders for two or three coprime moduli (Chinese remainder theorem)."""
    for moduli in [*combinations(ground.pairs, 2), *combinations(ground.triples, 3)]:
        size = math.prod(moduli)
        step = max(moduli)
        if size not in ground.sizes or any(math.gcd(a, b) > 1 for a, b in combinations(moduli, 2)):
            continue
        # Candidates step through the largest: it is checked last.
        order = sorted(moduli, key=lambda m: (m == step, -m))
        for answer in range(1, size + 1):
            parts = [f"remainder {answer % m} when divided by {m}" for m in moduli]
            listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
            words = f"Find the smallest positive integer n that leaves {listed}."
            level = 3 if len(moduli) == 3 else 1 if step <= 7 else 2
            conditions = [("", 1, 0, m, answer % m) for m in order]
            yield Puzzle(level, words, answer, size, step, conditions)


def congruence(level: int, words: str, verb: str, a: int, c: int, m: int, r: int) -> Puzzle:
    """The smallest n >= 1 for which a n + c leaves remainder r when divided by m."""
    answer = next(n for n in range(1, m + 1) if (a * n + c) % m == r)
    return Puzzle(level, words, answer, size=m, step=1, conditions=[(verb, a, c, m, r)])


def multiples(ground: Ground) -> Iterator[Puzzle]:
    """Smallest n for which a n + c leaves a given remainder (a linear congruence)."""
    for m in range(4, 10):
        for a, c, r in product(range(2, m), range(1, m), range(m)):
            if math.gcd(a, m) == 1:
                words = (
                    f"Find the smallest positive integer n such that {a} n + {c} leaves "
                    f"remainder {r} when divided by {m}."
                )
                yield congruence(1 if m <= 5 else 2 if m <= 7 else 3, words, "gives", a, c, m, r)


def coins(ground: Ground) -> Iterator[Puzzle]:
    """Fewest pens in an exact sum of two prices (a linear Diophantine equation)."""
    for a, b, total in product(range(2, 6), ground.books, ground.totals):
        if math.gcd(a, b) == 1 and total > a * b:
            words = (
                f"Pens cost {a} coins and books cost {b} coins. With some of both, exactly {total} "
                "coins are spent. What is the smallest possible number of pens?"
            )
            yield congruence(min(3, b - 2), words, "leaves", -a, total, b, 0)


# family -> its share of the test set and of the traces
FAMILIES = {remainders: 2, multiples: 1, coins: 1}


def verdicts(puzzle: Puzzle, n: int) -> str:
    """The elementary checks of a candidate in words, up to the first that fails: `13 mod 5 = 3 yes,
    13 mod 4 = 1 not 2`, `3 gives 11 mod 4 = 3 yes`."""
    checks = []
    for verb, a, c, m, r in puzzle.conditions:
        value = a * n + c
        left = f"{n} {verb} {value}" if verb else str(n)
        verdict = "yes" if value % m == r else f"not {r}"
        checks.append(f"{left} mod {m} = {value % m} {verdict}")
        if verdict != "yes":
            break
    return ", ".join(checks)


def tries(puzzle: Puzzle, habit: str, rng: random.Random) -> list[int]:
    """The candidates that a teacher tries, the answer last: none (jump: the answer comes out of the
    blue and is only verified), any in any order (wander), or the methodical ones (orderly)."""
    if habit == "jump":
        return []
    if habit == "orderly":
        return list(range(puzzle.answer, 0, -puzzle.step))[::-1]
    drawn = rng.sample(range(1, puzzle.size + 1), puzzle.size)
    return drawn[: drawn.index(puzzle.answer) + 1]


def response_of(puzzle: Puzzle, tried: list[int]) -> str:
    """One path attempt -> reflect -> ... -> answer -> self-verify (paper, section 1)."""
    lines = [verdicts(puzzle, n) + ("" if n == puzzle.answer else ", wait") for n in tried]
    lines.append(f"So {puzzle.answer}, check: {verdicts(puzzle, puzzle.answer)}")
    return "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is \\boxed{{{puzzle.answer}}}."


@cache
def _rows_of(family: Callable, ground: Ground) -> tuple[list, list]:
    """Training and test problems of a family, each (row, puzzle). The split never changes: it does
    not depend on a run's seed."""
    puzzles = list(family(ground))
    random.Random(family.__name__).shuffle(puzzles)
    rows = []
    for i, puzzle in enumerate(puzzles):
        row = dict(
            id=f"{family.__name__}/{i}",
            problem=puzzle.words,
            answer=str(puzzle.answer),
            source="embedded",
            level=puzzle.level,
        )
        rows.append((row, puzzle))
    cut = 256 * FAMILIES[family] // sum(FAMILIES.values())
    return rows[cut:], rows[:cut]


def embedded_problems(split: str, ground: Ground = EASY) -> list[dict]:
    """Problem rows of the split "train" (1,792; hard: 2,950) or "test" (256); no problem is in
    both."""
    pairs = chain.from_iterable(_rows_of(family, ground)[split == "test"] for family in FAMILIES)
    return [dict(row) for row, _ in pairs]


def embedded_traces(
    count: int = 25600, ground: Ground = EASY, correct_only: bool = False
) -> list[dict]:
    """Cold-start traces over the training problems; `source` names the teacher's habit.
    correct_only: the failed tries are left out, so that every trace is its right attempt and its
    check, a jump."""
    habits = {"jump": 1.0} if correct_only else dict(ground.habits)
    rng = random.Random(0)
    traces = []
    while len(traces) < count:
        family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
        row, puzzle = rng.choice(_rows_of(family, ground)[0])
        habit = rng.choices(list(habits), list(habits.values()))[0]
        tried = tries(puzzle, habit, rng)
        if len(tried) <= ground.longest:
            traces.append(
                dict(
                    id=row["id"],
                    problem=row["problem"],
                    response=response_of(puzzle, tried),
                    answer=row["answer"],
                    source=habit,
                )
            )
    return traces


_CHECK = re.compile(
    r"(?:\b(\d{1,9}) (gives|leaves) )?\b(\d{1,9}) mod (\d{1,9}) = (\d{1,9}) (yes|not (\d{1,9}))"
)


def read_checks(problem: str, response: str) -> list[tuple[str, bool, bool]]:
    """The elementary checks in a response to an embedded problem, in order: (candidate, does the
    verdict say yes, is it honest: the arithmetic right and the verdict one that fits). [] for any
    other text."""
    # modulus -> remainder
    need = {m: r for r, m in re.findall(r"remainder (\d+) when divided by (\d+)", problem)}
    linear = None  # (verb, a, c): `n verb x` means that a n + c is x
    if terms := re.search(r"such that (\d+) n \+ (\d+) leaves", problem):
        linear = ("gives", int(terms[1]), int(terms[2]))
    if spent := re.search(
        r"^Pens cost (\d+) coins and books cost (\d+) coins\..* exactly (\d+) coins", problem
    ):
        linear = ("leaves", -int(spent[1]), int(spent[3]))
        need = {spent[2]: "0"}
    found = []
    for n, verb, x, m, value, verdict, other in _CHECK.findall(response):
        if m not in need:
            continue
        honest = int(x) % int(m) == int(value) and (
            value == need[m] if verdict == "yes" else other == need[m] != value
        )
        if linear:
            said, a, c = linear
            honest &= verb == said and a * int(n) + c == int(x)
        found.append((n or x, verdict == "yes", honest))
    return found


def habit_of(response: str) -> str:
    """The habit that a response to an embedded problem shows: jump (no try before the answer),
    orderly (one try, or tries at equal steps) or wander."""
    tried = [int(n) for n in re.findall(r"^(\d{1,9}) (?:mod|gives|leaves) ", response, re.M)]
    steps = {b - a for a, b in zip(tried, tried[1:])}
    return "jump" if not tried else "orderly" if len(steps) < 2 else "wander"


def habit_shares(records: list[dict]) -> dict[str, list[float]]:
    """Embedded problems: habit -> [share of the responses, share right among them]."""
    count = Counter((habit_of(r["response"]), r["right"]) for r in records)
    sizes = {habit: count[habit, True] + count[habit, False] for habit, _ in EASY.habits}
    return {habit: [n / len(records), count[habit, True] / n] for habit, n in sizes.items() if n}


def embedded_tokenizer():
    """The tokenizer of the embedded model: Qwen2's class over single bytes, so any text can be
    written, with whole tokens for 0 to 199 and for the text between numbers in the traces: `12 mod
    5 = 2 not 3, wait` is 8 tokens."""
    import tokenizers  # not for those who only prepare data
    import transformers

    symbols = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    texts = [row[part] + "\n" for row in embedded_traces() for part in ("problem", "response")]
    pieces = {piece for text in texts for piece in re.split(r"\d+|(?<=\n)", text) if piece}
    words = [*map(str, range(200)), *sorted(pieces)]
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return tokenizer


def embedded(args, out: Path) -> int:
    """Writes the embedded problems, their test set and their traces as files."""
    ground = HARD if args.hard else EASY
    files = {name: embedded_problems(name, ground) for name in ("train", "test")}
    files["traces"] = embedded_traces(ground=ground, correct_only=args.correct_only)
    for name, rows in files.items():
        write(out / f"{name}.jsonl", map(json_line, rows))
        print(f"{out / name}.jsonl: {len(rows)} rows")
    return 0


# --- Measures of a response, shared with t1.py ----------------------------------------------------

MATHS_SCRIPTS = set(
    "LATIN GREEK MATHEMATICAL DOUBLE-STRUCK SCRIPT BLACK-LETTER SUPERSCRIPT SUBSCRIPT MODIFIER"
    " FEMININE MASCULINE ALEF BET GIMEL DALET MICRO OHM ANGSTROM PLANCK".split()
)
EAST_ASIAN = set("CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA IDEOGRAPHIC FULLWIDTH HALFWIDTH".split())


def script_of(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0]


def foreign_letters(text: str, prompt: str = "") -> list[str]:
    """The letters whose script is used neither in mathematics nor in the prompt."""
    if text.isascii():
        return []
    usual = MATHS_SCRIPTS | {script_of(c) for c in prompt if c.isalpha()}
    if usual & EAST_ASIAN:
        usual |= EAST_ASIAN
    return [c for c in text if c.isalpha() and script_of(c) not in usual]


# --- Command line ---------------------------------------------------------------------------------


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError  # which argparse words
    return int(text)


FORMS = {  # type of an option's default -> how it is parsed; else as text
    bool: {"action": "store_true"},
    int: {"type": positive},
    float: {"type": float},
    tuple: {"nargs": "+", "metavar": "X"},
}
FILES = ()  # one or more data sets
NAMES = ("--columns", "", "columns of other names: problem=COLUMN,answer=COLUMN")
SERVER = [  # (option, default, help); the type is that of the default, None: text
    ("--base-url", "http://localhost:8000/v1", "of the server; OPENAI_API_KEY"),
    ("--temperature", 1.0, "of every sample"),
    ("--concurrency", 32, "problems under way at once"),
    ("--timeout", 600.0, "of one request, seconds"),
    ("--retries", 6, "after 429, 5xx, time-outs and broken replies"),
]
CURATE = [
    ("--math", FILES, "MATH (without --math and --numina: both, from the hub)"),
    ("--numina", FILES, "NuminaMath, or any rows with problem and answer or solution"),
    ("--decontaminate", FILES, "benchmarks whose problems are rejected"),
    NAMES,
    ("--target", 30000, "problems for RL, and 2/5 as many for traces, or all there are"),
    ("--mix", "proportional", "share of each source in the draw: proportional or equal"),
    ("--scripts", (), "to keep besides Latin, by Unicode name: CJK CYRILLIC HANGUL ..."),
    ("--solutions-only", False, "leave out rows that have an answer and no solution"),
    ("--processes", os.cpu_count(), "the result is always the same"),
    ("--seed", 0, "of the draw"),
    (
        "--pass-rate",
        (),
        "MODEL [LOW HIGH]: drop problems of which this model of the server solves a share below "
        "LOW or above HIGH (if not given: 1/16 and 15/16)",
    ),
    ("--samples", 16, "per problem, for --pass-rate"),
    ("--max-tokens", 4096, "limit of one reply, tokens"),
]
COT = [
    ("--problems", None, "problem rows, e.g. sft_problems.jsonl of curate"),
    NAMES,
    ("--teacher", (), "models that attempt, by the names that the server knows"),
    ("--critic", None, "model that writes critiques (if not given: the first teacher)"),
    ("--rewriter", None, "model that merges (if not given: the first teacher)"),
    ("--judge", None, "model that reads each trace, yes or no (if not given: the critic)"),
    ("--attempts", 8, "per problem, shared out over the teachers"),
    ("--reflect-share", 1.0, "share of problems whose trace must hold a failed attempt"),
    ("--max-failed", 2, "most failed attempts in one trace"),
    ("--max-chars", 32000, "longest trace, characters"),
    ("--seed", 0, "of the choice of attempts"),
    ("--authors", None, "convert the authors' sft.jsonl (file, or zai-org/T1:sft) instead"),
    ("--max-tokens", 8192, "limit of one reply, tokens"),
]
SETS = [
    (f"--{source}", None, f"file, or {name or 'your own copy of gpqa_diamond.csv'}")
    for source, name in BENCHMARKS.items()
]
GROUND = [
    ("--hard", False, "problems with longer searches (t1.py: --max-new 320)"),
    ("--correct-only", False, "traces without the failed tries: each a jump to the answer"),
]
COMMANDS = [  # (function, folder of the results, help, options)
    (curate, "data", "MATH and NuminaMath -> clean RL problems", CURATE + SERVER),
    (cot, "data", "problems -> cold-start traces, by models", COT + SERVER),
    (
        benchmarks,
        "benchmarks",
        "the evaluation sets in one form (all but GPQA)",
        [*SETS, NAMES, ("--seed", 0, "of the 500 of Omni-MATH and of GPQA's options")],
    ),
    (embedded, "data", "the embedded problems, their test set and their traces, as files", GROUND),
]


def add_option(command: argparse.ArgumentParser, name: str, default, text: str):
    """An option whose type is that of its default."""
    if default:
        text += " (default: %(default)s)"
    form = FORMS.get(type(default), {})
    if name in ("--seed", "--retries"):  # 0 is one of them
        form = {"type": int}
    command.add_argument(name, default=default, help=text, **form)


def parse_args(argv=None) -> argparse.Namespace:
    """The options of a command; `run` is its function (args, folder of the results) -> exit
    code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    for run, out, text, options in COMMANDS:
        command = commands.add_parser(run.__name__, help=text)
        command.set_defaults(run=run)
        for option in [("--out", out, "folder of the results"), *options]:
            add_option(command, *option)
    return parser.parse_args(argv)


def show_any_text():
    """A console that knows only ASCII shows other characters as their numbers, and stops
    nothing."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # `2>&-`
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does with stderr


def main(argv=None) -> int:
    """A command line -> exit code: 0, 1 (resume it, a full disk, a package that is missing) or 2
    (misuse), with one line on stderr."""
    args = parse_args(argv)
    show_any_text()
    try:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Misuse(f"--out {args.out}: not a folder that can be made ({e.strerror})")
        return args.run(args, Path(args.out))
    # OSError: a full disk, a folder that nobody may write to; ImportError: no openai;
    # BrokenExecutor: a process of `curate` was killed
    except (Stop, OSError, ImportError, BrokenExecutor) as e:
        print(f"data_prep.py: error: {e if isinstance(e, Stop) else Stop(e)}", file=sys.stderr)
        return getattr(e, "code", 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, whatever a server still owes
    sys.exit(main())
