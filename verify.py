"""Is this answer right?  The answer checker that is the reward of RL (NOT IN PAPER: the authors had an LLM judge).

    python verify.py '\\frac12' 0.5             prints True and exits 0 (False: 1, misuse: 2)
    python verify.py --jsonl rows.jsonl         rows {"pred", "gold"[, "equal"]}: accuracy, throughput, timeouts
    python verify.py --jsonl rows.jsonl --bench the same rows through the installed math-verify, too

Three names matter: `extract_answer` (the last complete box), `is_equal` (two answers, pure) and `grade` (a batch of
responses, in worker processes under a deadline and a memory limit). The text of an answer is data: it is never
evaluated by Python or by a computer algebra system, only read by the small parser below, whose trees are bounded.

Order of this file: limits - extraction - clean-up - tokens - units - parser - values - comparison, cheapest layer
first - grade and its workers - command line.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, OrderedDict
from fractions import Fraction
from functools import lru_cache, reduce, wraps
from typing import Callable, NamedTuple

import mpmath

MAX_CHARS = 2000           # a longer answer is no answer; bounds the tokens, the tree and every regular expression
MAX_DEPTH = 80             # nested terms, atoms and exponents: 40 brackets
MAX_BITS = 40_000          # of an exact numerator or denominator, about 12,000 digits
MAX_FACTORIAL = 3000       # largest argument that is computed exactly
MAX_ITEMS = 400            # of a list
MAX_SUMS = 4               # \sum and \prod in one answer; nested ones are read, not evaluated
MAX_SUM_STEPS = 1500       # terms of a sum times the nodes of a term
MAX_WORDS = 12             # a longer text is prose: no rule can tell whether two of them agree
CACHE_SIZE = 100_000       # pairs that `grade` remembers
TRIES = 4                 # deaths of workers on one pair, or of servers on one batch, until it counts as crashed
MAX_MEMORY = 512 << 20     # bytes of address space of one worker process


class Unreadable(ValueError):
    """The text is no answer that this parser knows."""


class Undefined(ArithmeticError):
    """The expression has no value: 1/0, log 0, 0 * infinity."""


class TooBig(ArithmeticError):
    """The value is beyond the limits above; nothing is known about it."""


# ----------------------------------------------------------------------------------------------------------------------
# Extraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|(-?\d[\d.,]*\d|-?\d|[A-Za-z](?![A-Za-z])))|\\.|[{}]", re.S)


def extract_answer(response: str) -> str | None:
    """Content of the last complete `\\boxed{...}` or `\\fbox{...}` after `</think>`, or None.

    Braces may be nested, `\\boxed 5` is read as TeX users mean it, of nested boxes the outer one counts, and a
    response that opens `<think>` without closing it has not answered yet.
    NOT IN PAPER: the authors let an LLM find the answer in prose. A rule is the better reward: it costs microseconds,
    gives the same verdict every time, and cannot be talked to by the policy that is optimised against it.
    """
    end = response.rfind("</think>")
    if end < 0 and "<think>" in response:
        return None
    body = response[end + len("</think>"):] if end >= 0 else response
    first = min((i for i in (body.find("\\boxed"), body.find("\\fbox")) if i >= 0), default=-1)
    if first < 0:
        return None
    found, opened = None, []                        # opened: start of the content for a box, None for a plain brace
    for match in _BOX.finditer(body, first):
        token = match.group()
        if match.group(1):
            opened.append(match.end())
        elif match.group(2):
            found = match.group(2)
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = body[start:match.start()]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Clean-up: what changes only the looks of an answer

_GREEK = dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
                  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
                  "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split()))
_UNICODE = str.maketrans(
    dict.fromkeys("−–—‐‑﹣－", "-") | dict.fromkeys("·⋅∙•", r"\cdot ") | dict.fromkeys("÷∕⁄", "/") | dict.fromkeys("°º˚", r"^\circ ")
    | dict.fromkeys("∅⌀", r"\emptyset ") | dict.fromkeys("，、", ",") | dict.fromkeys("。．", ".") | dict.fromkeys("≤≦⩽", r"\le ")
    | dict.fromkeys("≥≧⩾", r"\ge ") | dict.fromkeys("πℼ", r"\pi ") | dict.fromkeys("’′", "'") | dict.fromkeys("∣｜", "|")
    | {"×": r"\times ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∞": r"\infty ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ",
       "∪": r"\cup ", "∩": r"\cap ", "±": r"\pm ", "∓": r"\mp ", "∠": r"\angle ", "ℝ": r"\R ", "∖": r"\setminus ",
       "≡": r"\equiv ", "ϕ": r"\phi ", "∘": r"\circ ", "；": ";", "：": ":", "…": r"\ldots ", "％": "%", "＄": "$", "⟨": r"\langle ", "⟩": r"\rangle "}
    | {letter: f"\\{name} " for letter, name in _GREEK.items()}
    | {c: "\\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", c).split("⁄")) for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"})

_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)|([₀₁₂₃₄₅₆₇₈₉]+)")

_FONTS = re.compile(r"\\(?:text(?:bf|it|rm|up|sf|tt|normal)?|emph|[mh]box|math(?:rm|bf|it|sf|tt|cal|scr|frak)|boldsymbol|bm|pmb"
                    r"|operatorname\*?|bf|rm|it)(?![a-zA-Z])\s*(\{[^{}]*\})?")
_CLEAN = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\\\\s*\[[^\]]*\]", r"\\\\ "),                                                    # row distance: \\[4pt]
    (r"(?<!\\)\\[()\[\]]|\\(?:boxed|fbox|displaystyle|textstyle|[lL]arge|huge|small|limits|nolimits|left\.|right\.)(?![a-zA-Z])", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:hspace|vspace|phantom|tag)\s*\*?\{[^{}]*\}", " "),
    (r"\\(?:underline|mathop|ensuremath)(?![a-zA-Z])", ""),
    (r"\\mathbb\s*\{?([A-Z])\}?", r"\\\1 "),
    (r"(?<=\d),?\\!\s*(?=\d{3}(?!\d))|(?<=\d)\{,\}(?=\d{3})|(?<=\d)(?<!\d\.\d)\\[, ](?=\d{3}(?!\d))", ""),   # 1\,000
    (r"(?<!\\)\\[!,;:> ]|\\(?:quad|qquad|thinspace|enspace|medspace)(?![a-zA-Z])|~|\\+\s*$", " "),
    (r"\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|\^\s*\{\s*(?:st|nd|rd|th)\s*\}", " "),             # 5^{\text{th}}
    (r"(?<=\d)\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}|(?<=\d)(?:st|nd|rd|th)(?![a-zA-Z])", " "),                # 21st
    (r"\b([aApP])\.\s?[mM]\b\.?", r"\1m"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac "), (r"\\[dt]binom(?![a-zA-Z])", r"\\binom "),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "° "),
    (r"°\s*\\text\s*\{\s*([CF])\s*\}|°\s*([CF])(?![a-zA-Z])", r"\\text{degree\1\2}"),
    (r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])", "..."),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}|^([^{}]*)\\over(?![a-zA-Z])([^{}]*)$", r"\\frac {\1\3}{\2\4}"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom {\1}{\2}"), (r"\bper cent\b", "percent"),
    (r"\((\d[0-9A-F]*)\)\s*(?=_)", r"\1"),                                                                # (12)_5
    (r"(?<=\d)\s*(?:\\text\s*\{)?\s*\(?\s*base[-\s]*\}?\s*(\d{1,2})\s*\)?\s*\}?", r"_{\1}"),              # 12\text{ base }5
    (r"\(\s*\\text\s*\{([A-J])\}\s*\)", r"\\text{(\1)}"), (r"\{([-+])\}", r"\1"),
    (r"^(.+?)\s*\\text\s*\{\s*\(([A-J])\)\s*\}\s*$", r"\\text{(\2)} \1"),                             # 20 \textbf{(D)}
    (r"\\%", "%"), (r"\\\$|\\euro(?![a-zA-Z])", " $ "), (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"(?i)^\s*(?:\\text\s*\{)?\s*(?:the )?(?:final )?answer\b\s*(?:is|:)?\s*:?\s*\}?(?=.)", ""),
    (r"^\s*\*\*([^*]+)\*\*", r"\1"), (r"\\_", "_"), (r"\\not\s*=", r"\\ne "), (r"^\s*([-+]?\d{1,3}) (\d{3})(?: (\d{3}))?(?: (\d{3}))?\s*$", r"\1\2\3\4"), (r"\s+", " "))]


@lru_cache(maxsize=1 << 14)
def clean(text: str) -> str:
    """The answer in one spelling: unicode to LaTeX, no layout, no math delimiters, no final full stop."""
    text = re.sub("(?<=\\d) ?m(?=[²³])", r" \\text{m}", text)
    text = _SCRIPTS.sub(lambda m: ("^" if m.group(1) else "_") + "{" + unicodedata.normalize("NFKC", m.group()) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:        # pairs are math delimiters, a single one is money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = _FONTS.sub(lambda m: f"\\text{m.group(1)}" if m.group(1) else " ", text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)    # \\frac: escaped once too often
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    text = text.strip().lstrip(",;: ")
    return text if text.endswith("...") else text.rstrip(" .,;:")


def squeeze(text: str) -> str:
    """A cleaned answer without blanks (but those between two digits) and without text commands: the key of layer 1."""
    text = re.sub(r"\\text *\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

class Token(NamedTuple):
    kind: str       # num, let (one letter), word, cmd, op, begin, end, eof
    text: str
    spaced: bool    # a blank comes before it


_TOKEN = r"""
  (?P<space>\s+) | \\text\s*\{(?P<body>[^{}]*)\} | \\(?P<env>begin|end)\s*\{(?P<name>[a-zA-Z]+)\*?\}(?P<cols>\{[lcr|\s]*\})?
| (?P<rep>\d*\.\d*(?:\\(?:overline|bar)\s*\{\d+\}|\\(?:overline|bar)\s*\d|\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?|\(\d+\)|(?<=\d)\.\.\.))
| (?P<num>SEPARATED\d[0-9A-F]*[A-F][0-9A-F]*(?=_\{?1[1-9])|\d+(?:\.\d+)?|\.\d+) | \\(?P<cmd>[a-zA-Z]+|.) | (?P<word>[A-Za-z]+|[^\W\d_A-Za-z]+)
| (?P<op><=|>=|!=|==|:=|\*\*|\.\.\.|.)"""
_LEXERS = {separated: re.compile(_TOKEN.replace("SEPARATED", r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?:\.\d+)?|" if separated else ""), re.X | re.S)
           for separated in (True, False)}

_OPERATORS = {alias: op for op, aliases in {
    "<=": "le leq leqslant leqq", ">=": "ge geq geqslant geqq", "!=": "ne neq", "<": "lt", ">": "gt", "~": "approx simeq thickapprox doteq",
    "in": "in", "≡": "equiv", "cup": "cup bigcup", "cap": "cap bigcap", "setminus": "setminus backslash smallsetminus",
    "*": "cdot times ast", "/": "div", "±": "pm", "∓": "mp", "\\{": "lbrace {", "\\}": "rbrace }", "(": "langle lparen lgroup",
    ")": "rangle rparen rgroup", "[": "lbrack", "]": "rbrack", "|": "lvert rvert vert mid |", ":": "colon", ",": "land", "or": "lor",
    "cr": "\\ cr newline", "&": "&", "mod": "mod pmod bmod", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil"}.items() for alias in aliases.split()}
_FUNCTIONS = {name: canon for canon, names in {
    "sin": "sin", "cos": "cos", "tan": "tan tg", "cot": "cot ctg cotg", "sec": "sec", "csc": "csc cosec", "asin": "arcsin asin",
    "acos": "arccos acos", "atan": "arctan atan arctg", "acot": "arccot", "asec": "arcsec", "acsc": "arccsc", "sinh": "sinh",
    "cosh": "cosh", "tanh": "tanh", "asinh": "arcsinh asinh", "acosh": "arccosh acosh", "atanh": "arctanh atanh", "ln": "ln", "log": "log",
    "lg": "lg", "exp": "exp", "gcd": "gcd", "lcm": "lcm", "max": "max", "min": "min", "sgn": "sgn sign"}.items() for name in names.split()}
_GREEK_NAMES = set(_GREEK.values()) | {"pi", "varphi", "vartheta", "varepsilon", "ell", "hbar", "top"}
_CONNECTORS = {"and": "and", "or": "or", "或": "or", "和": "and", "与": "and", "且": "and", "或者": "or", "и": "and", "или": "or"}
_SHORT_WORDS = set("yes no odd the an not to per of one two six ten sq cu".split())


def tokenise(text: str, separated: bool, inside: Token | None = None) -> list[Token]:
    """Tokens of a cleaned answer. `separated`: 1,200 is one number. `inside`: the token before a \\text{...} whose words these are."""
    tokens: list[Token] = []
    spaced = False
    for match in _LEXERS[separated].finditer(text):
        kind, value = match.lastgroup, match.group()
        if kind == "space":
            spaced = True
            continue
        if match.group("body") is not None:
            tokens += tokenise(match.group("body").strip(), separated, tokens[-1] if tokens else Token("begin", "", False))
        elif match.group("env"):
            tokens.append(Token(match.group("env"), match.group("name"), spaced))
            if match.group("cols") and match.group("name") != "array":
                raise Unreadable("columns")
        elif match.group("rep"):
            tokens.append(Token("num", str(_repeating(value)), spaced))
        elif kind == "num":
            tokens.append(Token("num", value.replace(",", ""), spaced))
        elif kind == "cmd":
            name = match.group("cmd")
            if name in _OPERATORS:
                tokens.append(Token("op", _OPERATORS[name], spaced))
            elif name not in (" ", "'", "-", "/"):
                tokens.append(Token("cmd", "infty" if name == "infin" else name, spaced))
        elif kind == "word":
            tokens += _words(value, spaced, inside is not None, tokens[-1] if tokens else inside)
        elif value != "." or not inside:                    # a full stop in a text ends an abbreviation
            tokens.append(Token("op", {"**": "^", "==": "=", ":=": "="}.get(value, value), spaced))
        spaced = False
    return tokens


def _words(run: str, spaced: bool, in_text: bool, before: Token | None) -> list[Token]:
    """A run of letters: a connector, a function, a constant, a word (unit, name, text) or a product of letters.

    Outside \\text{...} only known units, and longer runs with a vowel that do not stick to a number, are words.
    """
    low = run.lower()
    after_number = before is not None and (before.kind == "num" or before.text in (")", "}", "°", "%", "pi"))
    if low in _CONNECTORS:
        return [Token("op", _CONNECTORS[low], spaced)]
    if run in _FUNCTIONS and not (low in UNITS and after_number):
        return [Token("cmd", run, spaced)]
    if run in ("pi", "theta", "alpha", "beta", "sqrt", "infty"):
        return [Token("cmd", run, spaced)]
    if low in ("nan", "zoo"):
        raise Unreadable("not a number")
    if low in ("infinity", "inf"):
        return [Token("cmd", "infty", spaced)]
    if run[:2] in ("平方", "立方") and len(run) > 2:
        return [Token("word", run[:2], spaced), Token("word", run[2:], False)]
    if len(run) == 1 and run.isascii():
        unit_letter = in_text and run in UNITS and (after_number or before is not None and before.text in ("/", "*"))
        return [Token("word" if unit_letter else "let", run, spaced)]
    unit = (run in UNITS or low in UNITS) and (len(run) > 2 or after_number or before is not None and (before.kind == "word" or before.text == "/"))
    if in_text or unit or not run.isascii() or low in _SHORT_WORDS or run == "DNE":
        return [Token("word", run, spaced)]
    outside = before is None or before.kind in ("word", "let", "num") or before.text in ("and", "or", ",", ";", "=", "in", ")", "}")
    if outside and any(c in "aeiouy" for c in run) and (spaced or not after_number) and len(run) + after_number > 3 and not run.isupper():
        return [Token("word", run, spaced)]
    if run[:-1] in _FUNCTIONS:                                              # sinx
        return [Token("cmd", run[:-1], spaced), Token("let", run[-1], False)]
    if run[-2:] == "pi" and len(run) == 3:
        return [Token("let", run[0], spaced), Token("cmd", "pi", False)]
    return [Token("let", letter, spaced and i == 0) for i, letter in enumerate(run)]


def _repeating(text: str) -> Fraction:
    """0.1\\overline{6}, 0.\\dot{1}4\\dot{2}, 0.1(6) or 0.1666... as an exact fraction."""
    head, _, tail = text.partition(".")
    if tail.endswith("..."):
        digits = tail[:-3]
        for period in range(1, len(digits) // 2 + 1):
            block = digits[-period:]
            if digits.endswith(block * (3 if period == 1 else 2)):
                fixed = digits[:-period]
                break
        else:
            raise Unreadable("dots")
    else:
        fixed = re.match(r"\d*", tail).group()
        block = "".join(re.findall(r"\d", tail[len(fixed):]))
    return int(head or 0) + Fraction(int(fixed or 0), 10 ** len(fixed)) + Fraction(int(block), 10 ** len(fixed) * (10 ** len(block) - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Units: name -> (base, factor). Units of one base convert (75 cents = 0.75 dollars); units of different bases differ.

_UNIT_TABLE = """
m 1 m meter metre 米; m 1/100 cm centimeter centimetre 厘米; m 1/1000 mm millimeter millimetre 毫米; m 1000 km kilometer kilometre 千米 公里;
m 1/10 dm decimeter 分米; inch 1 in inch inche; inch 12 ft foot feet; inch 36 yd yard; inch 63360 mi mile; g 1 g gram 克; g 1000 kg kilogram 千克 公斤;
g 1/1000 mg milligram; tonne 1 tonne ton 吨; pound 1 lb pound; pound 1/16 oz ounce; second 1 s sec second 秒; second 1/1000 ms millisecond; second 60 min minute 分钟;
second 3600 h hr hour 小时; second 86400 day 天; second 604800 week; month 1 month; month 12 year yr 年; liter 1 l L liter litre 升; liter 1/1000 ml mL milliliter;
gallon 1 gal gallon; gallon 1/4 quart; gallon 1/8 pint; dollar 1 $ dollar usd buck; dollar 1/100 cent penny pennie ¢; euro 1 euro; poundsterling 1 £;
yuan 1 yuan 元 rmb; yen 1 ¥; rupee 1 rupee rs; newton 1 N newton; joule 1 J joule; watt 1 W watt; volt 1 V volt; hertz 1 Hz hertz; mole 1 mol mole;
kelvin 1 K; degreeC 1 degreeC; degreeF 1 degreeF; radian 1 rad radian; unit 1 unit; am 1 am; pm 1 pm"""
UNITS: dict[str, tuple[str, Fraction]] = {}
for _row in _UNIT_TABLE.replace("\n", "").split(";"):
    _base, _factor, *_names = _row.split()
    UNITS |= {_form: (_base, Fraction(_factor)) for _name in _names for _form in (_name, _name + "s")[:1 + (len(_name) > 2 or _name in "hr yr lb")]}
UNITS |= {"mph": ("inch second^-1", Fraction(88, 5)), "kmh": ("m second^-1", Fraction(5, 18)), "kph": ("m second^-1", Fraction(5, 18))}
UNITS |= {name: ("°", Fraction(1)) for name in ("degree", "degrees", "deg", "度")}
UNITS |= {name: ("%", Fraction(1)) for name in ("percent", "pct", "percentage", "percents")}
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12, "dozen": 12}
_NUMERALS = {word: i for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split())}
_NUMERALS |= {word: i for i, word in enumerate("零一二三四五六七八九十")}
# Words that change what the number before them means: nothing that has them is a number with a unit.
_NOT_UNITS = set("""not no maybe perhaps possibly than least most more less about around approximately approx between minus plus times over if when where
    is are was be then else but nor either both neither either except unless probably almost nearly half third quarter all any every none other
    mod modulo remainder squared cubed i'm guess because since which true false yes correct wrong answer gold same equal equals""".split())
_MONTHS = "january february march april may june july august september october november december".split()
_MONTHS_BY_PREFIX = {month[:3]: month for month in _MONTHS}


def singular(word: str) -> str:
    word = word.lower()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


# ----------------------------------------------------------------------------------------------------------------------
# Parser: the grammar of answers. A node is a tuple (kind, ...); every kind is made in exactly one place below.
#   num Fraction | sym name | add items | mul items | pow base exponent | fn name args | call name args | pm sign node
#   deg node | pct node | unit node base factor | sum/prod var low high body | matrix rows | list items joiner | set items
#   tuple open close items | rel operators items | ratio items | based digits base | cup/cap/setminus a b | where items
#   text words | choice letter node

Node = tuple
_CALLS = set("fghpqrstuvwFGHPQRSTUVWNEL")
_OPAQUE = set("fghFGH")                                     # f(x) is never f times x
_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "~", "in", "≡", "mod"}
_CLOSERS = {")", "]", "\\}", "}"}
_NUMBER_SETS = {"R": "ℝ", "N": "ℕ", "Z": "ℤ", "Q": "ℚ", "C": "ℂ"}
_MARKS = {"angle", "triangle", "odot", "overline", "vec", "overrightarrow", "hat", "bar", "widehat", "tilde"}
_POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
_FILLERS = set("of the in total different distinct possible such old long each".split())


def number(value) -> Node:
    return ("num", Fraction(value))


def negative(node: Node) -> Node:
    if node[0] == "num":
        return ("num", -node[1])
    return ("based", "-" + node[1], node[2]) if node[0] == "based" else ("mul", (number(-1), node))


def reciprocal(node: Node) -> Node:
    return ("pow", node, number(-1))


def limited(method):
    """Every cycle of the recursion below passes through one of these methods."""
    @wraps(method)
    def inside(self, *args):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deep")
        node = method(self, *args)
        self.depth -= 1
        return node
    return inside


class Parser:
    """Recursive descent over the tokens of one answer. Raises Unreadable where the grammar of answers ends."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at, self.depth = tokens + [Token("eof", "", False)] * 4, 0, 0
        self.bars = False                       # inside |...| or {... | ...}: a bar ends what came before
        self.in_set = False                     # inside {...}: a colon, too
        self.currency: str | None = None        # seen in the quantity that is being read
        self.sums = 0

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead]

    def is_op(self, *texts: str) -> bool:
        token = self.tokens[self.at]
        return token.kind == "op" and token.text in texts

    def take(self, *texts: str) -> Token | None:
        """The next token if it is one of these operators; any token if none is named."""
        token = self.tokens[self.at]
        if token.kind == "eof" or texts and not (token.kind == "op" and token.text in texts):
            if texts:
                return None
            raise Unreadable("it breaks off")
        self.at += 1
        return token

    def need(self, *texts: str) -> Token:
        token = self.take(*texts)
        if token is None:
            raise Unreadable(f"{texts[0]!r} expected, not {self.peek().text!r}")
        return token

    # answers: lists, relations, sets

    def answer(self) -> Node:
        node = self.items()
        if self.peek().kind != "eof":
            raise Unreadable(f"{self.peek().text!r} is left over")
        return node

    def items(self) -> Node:
        """Items between commas, 'and', 'or'; groups of them between semicolons. One item stands for itself."""
        groups, joiner = [[]], ","
        while True:
            groups[-1].append(self.relation())
            separators = []
            while self.is_op(*((",", ";", "and", "or") if not separators else ("and", "or"))):      # ", and" is one
                separators.append(self.take().text)
            if not separators or self.peek().kind == "eof" or self.is_op(*_CLOSERS):
                break
            joiner = separators[-1] if separators[-1] in ("and", "or") else joiner
            if ";" in separators:
                groups.append([])
        if sum(map(len, groups)) > MAX_ITEMS:
            raise Unreadable("too many items")
        if len(groups) > 1:
            groups = [[group[0] if len(group) == 1 else ("tuple", "(", ")", tuple(group)) for group in groups]]
        return groups[0][0] if len(groups[0]) == 1 else ("list", tuple(groups[0]), joiner)

    def relation(self) -> Node:
        sides, operators = [], []
        sides.append(("sym", "?") if self.is_op(*_RELATIONS) else self.ratio())      # "> 5": the unknown is not written
        while self.is_op(*_RELATIONS):
            operators.append(self.take().text)
            sides.append(self.ratio())
        if len(operators) == 1 and operators[0] in "=~" and sides[0] == ("sym", "?"):
            return sides[1]
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.is_op(":") and not self.in_set or self.peek().text == "to" and self.peek(1).kind == "num":
            self.take()
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else ("ratio", tuple(parts))

    def union(self) -> Node:
        node = self.quantity()
        while self.is_op("cup", "cap", "setminus"):
            left, node = (self.take().text, node), self.quantity()
            node = left[:1] + tuple(("set", n[1] if n[0] == "list" else (n,)) if n[0] in ("list", "num") else n for n in (left[1], node))
        return node

    # quantities and texts

    def quantity(self) -> Node:
        """An expression with its unit (currency may come before or after it), or words."""
        if self.peek().kind == "word" and not (self.depth and self.peek().text.isupper()) or any(self.peek(i).text.lower() in _MONTHS for i in (1, 2)):
            return self.words()
        self.currency = None
        node = self.expression()
        currency = self.take().text if self.is_op(*"$€£¥¢") else self.currency
        base, factor, count = self.unit() if self.peek().kind == "word" and self.peek().text != "to" else ("", Fraction(1), 1)
        node = node if count == 1 else ("mul", (number(count), node))                # 5 million
        if currency and base not in ("°", "%"):             # "$3 million", "$5 each"
            money, scale = UNITS.get(currency, (currency, 1))
            base, factor = money, scale
        if base in ("°", "%"):
            return ("deg" if base == "°" else "pct", node)
        if base:
            if self.peek().kind == "num":                   # 2 hours 30 minutes
                rest = self.quantity()
                if rest[0] != "unit" or rest[2] != base or rest[3] >= factor:
                    raise Unreadable("two quantities")
                return ("unit", ("add", (("mul", (number(factor), node)), ("mul", (number(rest[3]), rest[1])))), base, Fraction(1))
            return ("unit", node, base, Fraction(factor))
        return node

    def unit(self) -> tuple[str, Fraction, int]:
        """The words after a number: ('m^2', 1/10000, 1) for 'square centimetres', ('yuan', 1, 1000) for 'thousand yuan'.

        Unknown words are units of their own.
        """
        parts, factor, count, sign, power = [], Fraction(1), 1, 1, 1
        for _ in range(2 * MAX_WORDS):
            token = self.peek()
            word = token.text if token.text in UNITS else token.text.lower()
            if token.kind != "word":
                if not (parts and self.is_op("/", "*", "-") and (self.peek(1).kind == "word" or self.peek(1).text in UNITS)):
                    break
                sign = -1 if self.take().text == "/" else 1
                self.tokens[self.at] = self.peek()._replace(kind="word")             # the h of km/h
                continue
            self.take()
            if word in _NOT_UNITS or word in _NUMERALS:
                raise Unreadable(f"{word!r} is no unit")
            if word in _POWERS:
                power = _POWERS[word]
            elif parts and word in ("per", "a", "an"):
                sign = -1
            elif not parts and word in _MULTIPLIERS:
                count *= _MULTIPLIERS[word]
            elif word not in _FILLERS or word == "in" and not parts:
                base, scale = UNITS.get(word) or (singular(word), Fraction(1))
                if self.take("^"):
                    exponent = self.raw_group().strip("{}")
                    if exponent not in ("2", "3"):
                        raise Unreadable("power of a unit")
                    power = int(exponent)
                factor *= scale ** (sign * power)
                parts.append(base if sign * power == 1 else f"{base}^{sign * power}")
                sign = power = 1
        return " ".join(parts), factor, count

    def words(self) -> Node:
        """A text: lower case, singular, no articles. Some texts are numbers (five), choices (option C) or dates (4 July)."""
        words: list[str] = []
        while self.peek().kind in ("word", "let", "num") or self.is_op("-", "'", "/") and words:
            token = self.take()
            if token.kind != "op":
                word = token.text.lower() if token.kind == "word" else token.text
                words.append(_MONTHS_BY_PREFIX.get(word, word))
        words = [word for word in words if word not in ("a", "an", "the", "of")] or words
        if len(words) > MAX_WORDS:
            raise Unreadable("prose")
        if len(words) == 1 and words[0] in _NUMERALS:
            return number(_NUMERALS[words[0]])
        if len(words) == 2 and words[0] in ("option", "choice", "answer", "选项", "选") and re.fullmatch("[A-J]", words[1]):
            return ("sym", words[1])
        if set(words) & set(_MONTHS):
            words.sort(key=lambda word: (word not in _MONTHS, len(word) > 2))        # month, day, year
        text = " ".join(map(singular, words))
        if text in ("all real number", "all real", "any real number"):
            return ("sym", "ℝ")
        return ("text", {"doe not exist": "dne"}.get(text, text))

    # expressions

    def expression(self) -> Node:
        terms = [self.term()]
        while self.is_op("+", "-", "±", "∓"):
            terms.append(self.term())                       # term() reads the sign
        return terms[0] if len(terms) == 1 else ("add", tuple(terms))

    @limited
    def term(self) -> Node:
        """Factors joined by *, / or by standing side by side. Signs bind looser: -x^2 is -(x^2)."""
        sign = self.take("+", "-", "±", "∓")
        if sign:
            node = self.term()
            return node if sign.text == "+" else negative(node) if sign.text == "-" else ("pm", 1 if sign.text == "±" else -1, node)
        factors = [self.power()]
        while True:
            if self.is_op("*") or self.is_op("/") and self.peek(1).kind != "word":
                divided = self.take().text == "/"
                factor = self.signed_power()
                factors.append(reciprocal(factor) if divided else factor)
            elif self.starts_factor():
                factors.append(self.power())
            else:
                return factors[0] if len(factors) == 1 else ("mul", tuple(factors))

    def signed_power(self) -> Node:
        return negative(self.power()) if self.take("-") else self.power()

    def starts_factor(self) -> bool:
        """May the next token begin a factor that is multiplied without a sign? Never a number after a number."""
        token, before = self.peek(), self.tokens[self.at - 1]
        if token.kind == "num":
            return before.kind != "num" and before.text not in ("%", "°")
        return token.kind in ("let", "begin", "cmd") or self.is_op("(", "[", "{", "\\{", "...", "⌊", "⌈") or self.is_op("|") and not self.bars

    def power(self) -> Node:
        node = self.postfix(self.atom())
        if not self.take("^"):
            return node
        exponent = self.exponent()
        if node[0] == "matrix" and exponent in (("sym", "T"), ("sym", "\\top")):
            return ("matrix", tuple(zip(*node[1])))
        return self.postfix(("pow", node, exponent))

    @limited
    def exponent(self) -> Node:
        """A group, or a signed power: x^-1, x^10, and 2^3^2 from the right."""
        return self.group() if self.is_op("{") else self.signed_power() if self.is_op("-") or self.peek().kind == "num" else self.postfix(self.atom())

    def postfix(self, node: Node) -> Node:
        while True:
            if self.take("!"):
                node = ("fn", "fac2" if self.take("!") else "factorial", (node,))
            elif self.take("%"):
                node = ("pct", node)
            elif self.take("°"):
                node = ("deg", node)
            else:
                return node

    # atoms

    @limited
    def atom(self) -> Node:
        token = self.take()
        reader = {"num": self.numeral, "let": self.symbol, "cmd": self.command, "begin": self.environment}.get(token.kind)
        if reader:
            return reader(token.text)
        if token.kind == "word" and token.text.isascii() and token.text.isupper():             # segments that look like words: NO
            return ("mul", tuple(("sym", letter) for letter in token.text))
        if token.kind == "op":
            if token.text in "([":
                return self.bracket(token.text)
            if token.text == "{":
                self.at -= 1
                return self.group()
            if token.text == "\\{":
                return self.braces()
            if token.text in "|⌊⌈":
                return self.fence(token.text)
            if token.text == "...":
                return ("sym", "...")
            if token.text in "$€£¥":
                self.currency = token.text
                return self.signed_power()
        raise Unreadable(f"{token.text!r} in a formula")

    def numeral(self, text: str) -> Node:
        """A number, a mixed number (3\\frac12, 3 1/2) or a number in another base (12_5)."""
        if self.take("_"):
            base = self.raw_group().strip("{()}").removeprefix("base")
            base = str(_NUMERALS.get(base.lower(), base))
            if not re.fullmatch(r"\d{1,2}", base) or "/" in text:
                raise Unreadable("base of a numeral")
            return number(text) if base == "10" else ("based", text.lstrip("0") or "0", int(base))
        if not text[-1].isdigit():
            raise Unreadable("letters in a number")
        start, parts = self.at, None
        if text.isdigit() and self.peek() == Token("cmd", "frac", self.peek().spaced):
            self.take()
            parts = self.argument(), self.argument()
        elif text.isdigit() and self.peek().spaced and [self.peek(i).kind for i in range(3)] == ["num", "op", "num"] and self.peek(1).text == "/":
            parts = number(self.peek().text), number(self.peek(2).text)
            self.at += 3
        if parts and all(part[0] == "num" and part[1].denominator == 1 for part in parts) and 0 < parts[0][1] < parts[1][1]:
            return number(int(text) + parts[0][1] / parts[1][1])
        self.at = start
        return number(text)

    def raw_group(self) -> str:
        """The text of a subscript: one token or a braced group, unparsed."""
        text, level = "", 0
        while True:
            token = self.take()
            level += (token.text == "{") - (token.text == "}")
            text += token.text
            if level <= 0:
                return text

    def symbol(self, name: str) -> Node:
        """A letter with its subscript and primes; a letter before a bracket may be a function: f(x)."""
        if self.take("_"):
            name += "_" + self.raw_group().removeprefix("{").removesuffix("}")
        while self.take("'"):
            name += "'"
        if self.is_op("(") and name[0] in _CALLS:
            inside = self.bracket(self.take().text)
            return ("call", name, inside[3] if inside[0] == "tuple" else (inside,))
        return ("sym", name)

    def group(self) -> Node:
        """`{...}` of LaTeX: one item, or a plain list ({1,2} is often meant as the set)."""
        self.need("{")
        node = self.enclosed()
        self.need("}")
        return node

    def enclosed(self, in_set: bool = False) -> Node:
        """What stands between brackets: bars and colons outside do not matter inside."""
        outer = self.bars, self.in_set
        self.bars = self.in_set = in_set
        node = self.items()
        self.bars, self.in_set = outer
        return node

    def argument(self) -> Node:
        """The argument of \\frac, \\binom or \\log_: a group, or one digit of a longer number as TeX reads it."""
        if self.is_op("{"):
            return self.group()
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.at] = token._replace(text=token.text[1:])
            return number(token.text[0])
        return negative(self.atom()) if self.take("-") else self.atom()

    def bracket(self, opening: str) -> Node:
        """After '(' or '[': a group, or a tuple, point or interval with its brackets as written."""
        node = self.enclosed()
        closing = self.need(")", "]").text
        return ("tuple", opening, closing, node[1]) if node[0] == "list" else node

    def braces(self) -> Node:
        """After `\\{`: a set by its elements, or by the conditions after | or :."""
        if self.take("\\}"):
            return ("set", ())
        node = self.enclosed(in_set=True)
        if not self.take("|", ":"):
            self.need("\\}")
            return ("set", node[1] if node[0] == "list" else (node,))
        condition = self.enclosed()
        self.need("\\}")
        conditions, joiner = condition[1:] if condition[0] == "list" else ((condition,), ",")
        if node[0] == "rel" and node[2][-1] != ("sym", "ℝ"):
            if joiner == "or":
                raise Unreadable("a condition that binds on both sides of 'or'")
            conditions = (node,) + conditions
        return ("where", conditions, joiner)

    def fence(self, opening: str) -> Node:
        """|x|, floor and ceiling."""
        outer, self.bars = self.bars, opening == "|"
        node = self.expression()
        self.need({"|": "|", "⌊": "⌋", "⌈": "⌉"}[opening])
        self.bars = outer
        return ("fn", {"|": "abs", "⌊": "floor", "⌈": "ceil"}[opening], (node,))

    def environment(self, name: str) -> Node:
        """A matrix, a determinant, or the lines of `cases` as a list."""
        lines = name in ("cases", "aligned", "align", "gathered")
        if not lines and name not in ("pmatrix", "bmatrix", "matrix", "array", "Bmatrix", "smallmatrix", "vmatrix"):
            raise Unreadable(f"environment {name}")
        rows = [[]]
        while self.peek().kind != "end":
            rows[-1].append(self.enclosed())
            if self.take("cr"):
                rows.append([])
            elif not self.take("&") and self.peek().kind != "end":
                raise Unreadable(f"{self.peek().text!r} in a matrix")
        self.take()
        rows = tuple(tuple(row) for row in rows if row)
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("ragged matrix")
        if lines:
            return ("list", tuple(item for row in rows for item in row), ",")
        return ("fn", "det", (("matrix", rows),)) if name == "vmatrix" else ("matrix", rows)

    def command(self, name: str) -> Node:
        if name == "frac":
            top, bottom = self.argument(), self.argument()
            return number(top[1] / bottom[1]) if top[0] == bottom[0] == "num" and bottom[1] else ("mul", (top, reciprocal(bottom)))
        if name == "sqrt":
            degree = number(2)
            if self.take("["):
                degree = self.expression()
                self.need("]")
            inside = self.group() if self.is_op("{") else self.atom()
            return ("pow", inside, number(1 / degree[1]) if degree[0] == "num" and degree[1] else reciprocal(degree))
        if name == "binom":
            return ("fn", name, (self.argument(), self.argument()))
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if name in ("sum", "prod"):
            return self.big_operator(name)
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if name in _NUMBER_SETS and not self.is_op("^", "_"):
            return ("sym", _NUMBER_SETS[name])
        if name in _MARKS:                                  # \overline{AB}, \angle ABC
            letters = self.raw_group().strip("{}")
            while name in ("angle", "triangle", "odot") and self.peek().kind == "let" and self.peek().text.isupper():
                letters += self.take().text
            return ("sym", f"{name} {letters}")
        if name == "infty" or name in _GREEK_NAMES:
            return self.symbol({"infty": "∞", "pi": "π"}.get(name, f"\\{name}"))
        raise Unreadable(f"command \\{name}")

    def function(self, name: str) -> Node:
        """sin x, sin^2 x, sin^{-1} x, log_2 x, max(a, b). Without brackets the argument goes on to the next + or function."""
        base = power = None
        while self.is_op("_", "^"):
            if self.take("^"):
                power = self.exponent()
            elif name == "log" and self.take("_"):
                base = self.atom() if self.peek().text == "10" else self.argument()
            else:
                raise Unreadable(f"subscript of {name}")
        if self.is_op("(", "[", "{", "\\{"):
            inside = self.atom()
            arguments = inside[3] if inside[0] == "tuple" else inside[1] if inside[0] in ("list", "set") else (inside,)
            if power is None and self.take("^"):
                power = self.exponent()
        else:
            negated = bool(self.take("-"))
            factors = [self.power()]
            while self.starts_factor() and self.peek().text not in _FUNCTIONS and not self.is_op("(", "["):
                factors.append(self.power())
            argument = factors[0] if len(factors) == 1 else ("mul", tuple(factors))
            arguments = (negative(argument) if negated else argument,)
        if power == number(-1) and name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"):
            name, power = "a" + name, None
        node = ("fn", name, arguments + ((base,) if base else ()))
        return node if power is None else ("pow", node, power)

    def big_operator(self, name: str) -> Node:
        """\\sum_{k=1}^{n} body with written bounds."""
        self.need("_")
        start = self.group()
        self.need("^")
        high = self.exponent()
        if start[:2] != ("rel", ("=",)) or start[2][0][0] != "sym":
            raise Unreadable("bounds")
        body = self.term()
        self.sums += 1
        if self.sums > MAX_SUMS:
            raise Unreadable("many sums")
        return (name, start[2][0], start[2][1], high, body)


# ----------------------------------------------------------------------------------------------------------------------
# Values: exact fractions as long as possible, else 50 digits (and 110, where 50 leave a doubt)

_LOW, _HIGH = mpmath.MPContext(), mpmath.MPContext()
_LOW.dps, _HIGH.dps = 50, 110
_HUGE = 10 ** 30                                             # beyond it, powers and functions are not evaluated


class Scope(NamedTuple):
    """What an evaluation needs: the arithmetic, the values of the unknowns, and how to read three notations."""
    mp: mpmath.MPContext
    env: dict
    degree: bool = True          # 30° is pi/6 (else 30)
    percent: bool = True         # 25% is 1/4 (else 25)
    log10: bool = False          # log is decimal (else natural)
    real: bool = False           # roots and logarithms of negative numbers are undefined


def undefined(reason: str):
    raise Undefined(reason)


def to_mp(value, mp):
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else mp.convert(value)


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooBig("digits")
    return value


def plus(a, b, mp):
    """Sum of two numbers or of two matrices (tuples of rows)."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        if shape(a) != shape(b):
            raise Undefined("sum of different shapes")
        return tuple(tuple(plus(x, y, mp) for x, y in zip(r, s)) for r, s in zip(a, b))
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a + b)
    return to_mp(a, mp) + to_mp(b, mp)


def times(a, b, mp):
    """Product of numbers and matrices."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a[0]) != len(b) or len(a) * len(b) * len(b[0]) > 1000:
            raise Undefined("product of these shapes")
        return tuple(tuple(reduce(lambda s, t: plus(s, t, mp), (times(x, y, mp) for x, y in zip(row, column))) for column in zip(*b)) for row in a)
    if isinstance(a, tuple) or isinstance(b, tuple):
        rows, factor = (a, b) if isinstance(a, tuple) else (b, a)
        return tuple(tuple(times(x, factor, mp) for x in row) for row in rows)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a * b)
    return to_mp(a, mp) * to_mp(b, mp)


def shape(value) -> tuple | None:
    return (len(value), len(value[0])) if isinstance(value, tuple) else None


def raised(a, b, mp):
    """a to the b. Odd roots of negative numbers are real, as schools write them: (-8)^{1/3} = -2."""
    if isinstance(b, tuple):
        raise Undefined("matrix as an exponent")
    if isinstance(a, tuple):
        if b not in range(1, 9):
            raise TooBig("power of a matrix")
        return reduce(lambda s, t: times(s, t, mp), [a] * int(b))
    if a == 0:
        if mp.re(to_mp(b, mp)) > 0:
            return Fraction(0)
        raise Undefined("0 to the power 0 or below")
    if abs(b) > _HUGE:
        raise TooBig("exponent")
    if isinstance(b, Fraction):
        if b.denominator == 1:
            if isinstance(a, Fraction) and (abs(a) == 1 or max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b) <= MAX_BITS):
                return a ** int(b)
            return to_mp(a, mp) ** int(b)
        if isinstance(a, Fraction) and a > 0:
            top, bottom = exact_root(a.numerator, b.denominator), exact_root(a.denominator, b.denominator)
            if top and bottom:
                return raised(Fraction(top, bottom), Fraction(b.numerator), mp)
        if b.denominator % 2 and mp.im(to_mp(a, mp)) == 0 and mp.re(to_mp(a, mp)) < 0:
            root = raised(-a, b, mp)
            return -root if b.numerator % 2 else root
    if abs(b) * abs(mp.log(to_mp(a, mp))) > _HUGE:
        raise TooBig("power")
    return to_mp(a, mp) ** to_mp(b, mp)


def exact_root(n: int, k: int) -> int | None:
    """The integer k-th root of n > 0, if it has one."""
    if n.bit_length() > 900 or k > 60:
        return None
    root = math.isqrt(n) if k == 2 else round(n ** (1 / k))
    return root if root ** k == n else None


def evaluate(node: Node, s: Scope):
    """The value of an expression: Fraction, mpf, mpc, or a tuple of rows for a matrix."""
    kind, mp = node[0], s.mp
    if kind == "num":
        return node[1]
    if kind == "sym":
        if node[1] in s.env:
            return s.env[node[1]]
        if node[1] in ("π", "e", "i"):
            return {"π": mp.pi, "e": mp.e, "i": mp.j}[node[1]] * 1
    if kind in ("add", "mul"):
        return reduce(lambda a, b: (plus if kind == "add" else times)(a, b, mp), (evaluate(item, s) for item in node[1]))
    if kind == "pow":
        value = raised(evaluate(node[1], s), evaluate(node[2], s), mp)
        return value if not s.real or is_real(value) else undefined("not real")
    if kind == "fn":
        value = apply(node[1], [evaluate(argument, s) for argument in node[2]], s)
        return value if not s.real or is_real(value) else undefined("not real")
    if kind == "call":
        return call(node, s)
    if kind == "deg":
        return times(evaluate(node[1], s), mp.pi / 180 if s.degree else Fraction(1), mp)
    if kind == "pct":
        return times(evaluate(node[1], s), Fraction(1, 100 if s.percent else 1), mp)
    if kind == "unit":
        return times(evaluate(node[1], s), node[3], mp)
    if kind in ("sum", "prod"):
        return series(node, s)
    if kind == "matrix":
        rows = tuple(tuple(evaluate(cell, s) for cell in row) for row in node[1])
        return rows if shape(rows) != (1, 1) else rows[0][0]
    if kind == "tuple" and node[1] == "(":                  # a vector
        return tuple((evaluate(item, s),) for item in node[3])
    raise Undefined(f"{kind} without a value")


def call(node: Node, s: Scope):
    """f(x) of an unknown function gets a value that depends on its name and arguments only; a(b+c) is a product."""
    arguments = [evaluate(argument, s) for argument in node[2]]
    if node[1][0] not in _OPAQUE and len(arguments) == 1:
        return times(evaluate(("sym", node[1]), s), arguments[0], s.mp)
    key = node[1] + repr([s.mp.nstr(to_mp(a, s.mp), 12) for a in arguments if not isinstance(a, tuple)])
    return Fraction(random.Random(key).randrange(1, 10 ** 6), 99_991)


def series(node: Node, s: Scope):
    name, variable, low, high, body = node
    low, high = evaluate(low, s), evaluate(high, s)
    if any(not isinstance(v, Fraction) or v.denominator != 1 for v in (low, high)) or (high - low) * len(walk(body)) > MAX_SUM_STEPS \
            or has(body, "sum", "prod"):
        raise TooBig("bounds of a sum")
    total = Fraction(name == "prod")
    for k in range(int(low), int(high) + 1):
        total = (plus if name == "sum" else times)(total, evaluate(body, s._replace(env=s.env | {variable[1]: Fraction(k)})), s.mp)
    return total


def apply(name: str, arguments: list, s: Scope):
    """A named function. Arguments so large that reducing them would take long are refused."""
    mp, x = s.mp, arguments[0]
    if name == "det":
        return determinant(x, mp)
    if any(isinstance(a, tuple) for a in arguments):
        raise Undefined("function of a matrix")
    if any(abs(a) > _HUGE for a in arguments) and name != "abs":
        raise TooBig("argument")
    exact = all(isinstance(a, Fraction) for a in arguments)
    integers = exact and all(a.denominator == 1 for a in arguments)
    if name in ("gcd", "lcm") and integers:
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*map(int, arguments)))
    if name in ("max", "min") and all(map(is_real, arguments)):
        return (max if name == "max" else min)(arguments, key=lambda a: mp.re(to_mp(a, mp)))
    if name == "binom" and len(arguments) == 2:
        if integers and 0 <= x <= MAX_FACTORIAL and arguments[1] >= 0:
            return Fraction(math.comb(int(x), int(arguments[1])))
        if all(map(is_real, arguments)) and all(abs(a) < 10 ** 6 for a in arguments):
            return mp.binomial(*(to_mp(a, mp) for a in arguments))
    if name == "log" and len(arguments) == 2 and arguments[1] not in (0, 1):
        return apply("ln", [x], s) / apply("ln", [arguments[1]], s)
    if len(arguments) != 1 or name in ("gcd", "lcm", "max", "min", "binom") or name == "sgn" and not is_real(x):
        raise Undefined(f"{name} of these arguments")
    if name in ("abs", "sgn"):
        return abs(x) if name == "abs" else Fraction(int(mp.sign(mp.re(to_mp(x, mp)))))
    if name in ("floor", "ceil") and is_real(x):
        near = mp.nint(mp.re(to_mp(x, mp)))                 # sqrt(2)^2 at 50 digits is 2
        return Fraction(int(near if close(x, near) else getattr(math, name)(x if exact else mp.re(x))))
    if name in ("factorial", "fac2") and integers and x <= MAX_FACTORIAL:
        if x < 0:
            raise Undefined("factorial of a negative number")
        return Fraction(math.factorial(int(x)) if name == "factorial" else math.prod(range(int(x), 0, -2)))
    if name in ("ln", "log", "lg"):
        if x == 0:
            raise Undefined("log 0")
        return mp.log(to_mp(x, mp)) / (mp.log(10) if name == "lg" or name == "log" and s.log10 else 1)
    if name in ("exp", "sinh", "cosh") and abs(x) > 10 ** 9 or name in ("factorial", "fac2") and (name == "fac2" or not is_real(x) or abs(x) > 10 ** 6):
        raise TooBig(name)
    try:
        return getattr(mp, name)(to_mp(x, mp))
    except (ZeroDivisionError, ValueError) as error:        # a pole
        raise Undefined(f"{name}: {error}") from None


def determinant(rows: tuple, mp):
    if len(rows) != len(rows[0]) or len(rows) > 5:
        raise Undefined("determinant")
    if len(rows) == 1:
        return rows[0][0]
    minors = (tuple(row[:j] + row[j + 1:] for row in rows[1:]) for j in range(len(rows)))
    signed = (times(times(head, Fraction((-1) ** j), mp), determinant(minor, mp), mp) for j, (head, minor) in enumerate(zip(rows[0], minors)))
    return reduce(lambda a, b: plus(a, b, mp), signed)


_POINTS = [Fraction(p, q) for p, q in ((127, 83), (211, 97), (89, 61), (307, 113), (53, 71), (173, 101), (41, 59), (263, 89), (109, 73))]


@lru_cache(maxsize=256)
def points_of(names: tuple[str, ...]) -> tuple:
    if not names:
        return (("real", {}),)
    found = []
    for k in range(12):
        rng = random.Random(7919 * k + len(names))
        if k < 8:
            values = [rng.choice(_POINTS) + (i // len(_POINTS)) for i in range(len(names))] if len(names) > len(_POINTS) else rng.sample(_POINTS, len(names))
            values = values if k < 3 else [v * rng.choice((1, -1, 2, -3)) for v in values]
        else:
            values = map(Fraction, rng.sample(range(1, 9 + len(names)), len(names)))
        found.append(("real" if k < 8 else "whole", dict(zip(names, values))))
    return tuple(found)


def points(names: list[str]) -> tuple:
    """Values for the unknowns: fractions, first positive, then of both signs (rational expressions are compared exactly
    there), then whole numbers, for n!, (-1)^n and sums. They are fixed, so that a verdict never depends on chance."""
    return points_of(tuple(names))


def close(a, b) -> bool | None:
    """Do two values agree? None: 50 digits do not tell, the numbers are close or tiny."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        if shape(a) != shape(b):
            return False
        verdicts = [close(x, y) for r, t in zip(a, b) for x, y in zip(r, t)]
        return False if False in verdicts else None if None in verdicts else True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = to_mp(a, _LOW), to_mp(b, _LOW)
    if not (_LOW.isfinite(a) and _LOW.isfinite(b)):
        raise Undefined("infinite")
    scale, gap = max(abs(a), abs(b)), abs(a - b)
    return True if gap <= scale * _LOW.mpf(10) ** -40 else False if gap > scale * 1e-5 and scale > 1e-20 else None


def vanishes(low: tuple, high: tuple) -> bool:
    """Two pairs of values, at 50 and at 110 digits: does the gap shrink with the precision? That of equal numbers does,
    as of sin(pi) and 0; that of different ones, however tiny, stays."""
    if isinstance(low[0], tuple):
        return all(vanishes(*pairs) for r, s, t, u in zip(*low, *high) for pairs in zip(zip(r, s), zip(t, u)))
    gap_low, gap_high = (abs(to_mp(a, mp) - to_mp(b, mp)) for (a, b), mp in ((low, _LOW), (high, _HIGH)))
    return gap_high <= gap_low * 1e-50


# ----------------------------------------------------------------------------------------------------------------------
# Trees

_KINDS = set("num sym add mul pow fn call pm deg pct unit sum prod matrix list set tuple rel ratio based cup cap setminus where text choice".split())


def mapped(part, change):
    """A copy of a node (or of a tuple of nodes) with `change` applied to its direct children."""
    def visit(item):
        if not isinstance(item, tuple):
            return item
        return change(item) if item and item[0] in _KINDS else tuple(map(visit, item))
    return part[:1] + tuple(map(visit, part[1:]))


@lru_cache(maxsize=1 << 14)
def walk(node: Node) -> tuple[Node, ...]:
    """The node and all nodes below it."""
    found = [node]
    mapped(node, lambda child: found.extend(walk(child)))
    return tuple(found)


@lru_cache(maxsize=1 << 14)
def canonical(node: Node) -> Node:
    """The tree with flat, sorted sums, products and sets: equal for two answers that differ only in such order."""
    node = mapped(node, canonical)
    if node[0] in ("add", "mul"):
        items = [part for item in node[1] for part in (item[1] if item[0] == node[0] else (item,))]
        return (node[0], tuple(sorted(items, key=repr)))
    return ("set", tuple(sorted(node[1], key=repr))) if node[0] == "set" else node


@lru_cache(maxsize=1 << 14)
def unknowns(node: Node) -> frozenset[str]:
    """The names without a fixed value; the index of a sum is not one of them."""
    names = {n[1] for n in walk(node) if n[0] == "sym" or n[0] == "call" and n[1][0] not in _OPAQUE}
    return frozenset(names - {"π", "e", "i", "∞"} - {n[1][1] for n in walk(node) if n[0] in ("sum", "prod")})


def has(node: Node, *kinds: str) -> bool:
    return any(n[0] in kinds for n in walk(node))


def variants(node: Node) -> list[Node]:
    """An expression with plus-minus signs stands for its two values; all its signs go together."""
    if not has(node, "pm"):
        return [node]

    def pick(part, sign):
        if part[0] == "pm":
            inner = pick(part[2], sign)
            return inner if part[1] == sign else negative(inner)
        return mapped(part, lambda child: pick(child, sign))
    return [pick(node, 1), pick(node, -1)]


def defined(tree: Node) -> bool:
    """Has every expression of the tree a value somewhere? 1/0 has none, and is no answer."""
    infinity = ("sym", "∞")
    if tree in (infinity, negative(infinity)):
        return True
    if tree[0] not in ("add", "mul", "pow", "fn", "pm"):
        parts: list[Node] = []
        mapped(tree, parts.append)
        return all(map(defined, parts))
    if has(tree, "set", "cup", "cap", "setminus") or ("sym", "ℝ") in walk(tree):
        return True                                         # R - {0}
    for _, env in points(sorted(unknowns(tree))):
        try:
            for variant in variants(tree):
                evaluate(variant, Scope(_LOW, env))
            return True
        except TooBig:
            return True
        except Undefined:
            continue
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Comparison, cheapest layer first

# Layer 1, strings: `squeeze` of the cleaned texts is the same. Safe, as the clean-up removes layout only.
# Layer 2, plain numbers.

_PLAIN = re.compile(r"([-+]?)([1-9]\d{0,2}(?:,\d{3})+|\d*)(\.\d+)?(?:[eE]([-+]?\d{1,3}))?|([-+]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))")


def plain_number(text: str) -> Fraction | None:
    """The exact value of a written integer (1,200 too), decimal or fraction of integers; None for all else.

    Safe: the pattern leaves no second reading, and the arithmetic is exact. Linear in the text.
    """
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_CHARS else None
    if not match:
        return None
    sign, whole, decimals, exponent, sign2, top, bottom, top2, bottom2 = match.groups()
    if whole or decimals:
        return Fraction(f"{sign}{whole.replace(',', '') or 0}{decimals or ''}e{exponent or 0}")
    top, bottom = int(top or top2 or 0), int(bottom or bottom2 or 0)
    return Fraction(-top if sign2 == "-" else top, bottom) if bottom else None


def same_plain(answer: str, gold: str) -> bool | None:
    """The verdict on two plain numbers; None if it takes the parser, or the rule for printed floats."""
    a, b = plain_number(answer.strip()), plain_number(gold.strip())
    if a is None or b is None:
        return None
    return True if a == b else False if max(len(answer), len(gold)) < 15 else None


# Layer 3, trees.

_CHOICE = re.compile(r"(?P<open>\\text *\{ *)?(?:\((?=.\)))?(?P<letter>[A-J])(?:\)|\.(?= ))(?P<shut> *\})?(?:(?<=[ }])|[ :]+|(?<=\))(?=[\d\\]))"
                     r"(?P<rest>[^ +*/^=<>,)&_!].*)")                                # (C) 8, \textbf{(C)}\ 8, C) 8, C. 8


@lru_cache(maxsize=1 << 14)
def read(text: str) -> tuple[Node, ...]:
    """The readings of a cleaned answer, () if it has none: 1,200 may be a number or two, 12,5 may be 12.5."""
    if not text or len(text) > MAX_CHARS:
        return ()
    if plain_number(text) is not None:
        return (number(plain_number(text)),)
    choice = _CHOICE.fullmatch(text)
    if choice:
        text = choice["rest"] if choice["shut"] or not choice["open"] else choice["rest"].replace("}", "", 1)
    readings = [False]
    if re.search(r"(?<!\d)[1-9]\d{0,2},\d{3}(?!\d)", text) and not re.search(r"[(\[][^()\[\]]*\d,\d{3}(?!\d)", text):
        readings = [True] if re.search(r"\d,0\d\d(?!\d)", text) else [True, False]
    trees = []
    for separated in readings:
        try:
            trees.append(Parser(tokenise(text, separated)).answer())
        except Unreadable:
            pass
    if trees and re.fullmatch(r"[-+]?\d+,\d+", text) and readings == [False]:
        trees.append(number(text.replace(",", ".")))                                 # a decimal comma
    words = re.findall(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    if not trees and len(words) <= MAX_WORDS and ("\\text" in text and words or len(words) > 1) \
            and text.count("{") == text.count("}") and not re.search(r"[_\\]{2}|[;#@`]", text):
        trees.append(("text", squeeze(text).lower()))                                # words and formulas: equal as a text only
    if choice:
        trees = [("choice", choice["letter"], tree) for tree in trees]
    return tuple(tree for tree in trees if defined(tree))


def same(a: Node, b: Node) -> bool:
    """Do two trees mean the same answer? One rule for each kind; what no rule accepts is different."""
    if a == b or canonical(a) == canonical(b):
        return True
    if "choice" in (a[0], b[0]):
        return same_choice(a, b)
    a, b = simplified(a), simplified(b)
    kinds = (a[0], b[0])
    if a == b:
        return True
    if "text" in kinds or "based" in kinds:
        return False
    if is_region(a) or is_region(b):
        left, right = region(a), region(b)
        if left and right:
            return same_region(left, right)
    if is_collection(a) or is_collection(b):
        return same_collection(a, b)
    if "rel" in kinds:
        return same_relation(a, b)
    if "ratio" in kinds:
        return same_ratio(a, b)
    if kinds == ("tuple", "tuple"):
        return a[1:3] == b[1:3] and len(a[3]) == len(b[3]) and all(map(same, a[3], b[3]))
    if "unit" in kinds:
        return same_quantity(a, b)
    return same_value(a, b)


def simplified(node: Node) -> Node:
    """A set or list of one is its element; a chain of equations is its ends: x = 2 + 3 = 5 is x = 5, 2^4 = 16 is 16."""
    if node[0] in ("list", "set") and len(node[1]) == 1 and not has(node, "pm"):
        return simplified(node[1][0])
    if node[0] != "rel" or not set(node[1]) <= {"=", "~"}:
        return node
    operators, sides = node[1], list(node[2])
    if operators[0] == "=" and "~" in operators:             # x = 1/3 ~ 0.33: the exact part counts
        sides = sides[:operators.index("~") + 1]
    if operators == ("~",) and not any(map(unknowns, sides)):      # 3\\sqrt2 ~ 4.24
        exact, rounded = (to_mp(evaluate(side, Scope(_LOW, {})), _LOW) for side in sides)
        if abs(exact - rounded) > abs(exact) / 100:
            raise Unreadable("a bad approximation")
        return sides[0]
    if is_label(sides[-1]) and not is_label(sides[0]) and not unknowns(sides[0]):
        sides.reverse()                                     # 5 = x
    if not is_label(sides[0]) and not any(map(unknowns, sides)):
        if all(same(sides[0], side) for side in sides[1:]):
            return sides[-1]
        raise Unreadable("a false equation")
    if not all(same(side, sides[-1]) for side in sides[1:-1] if not is_label(side) and not unknowns(side)):
        raise Unreadable("a false equation")                 # x = 6 = 5
    return ("rel", ("=",), (sides[0], sides[-1]))            # of a chain with a name the last value counts


def is_label(node: Node) -> bool:
    """Is this the name of something asked for: x, a_1, f(x), AB, \\angle ABC, |AB|, (p, q), AB/CD, V_1:V_2?"""
    kind = node[0]
    if kind == "sym":
        return node[1] not in ("π", "e", "i", "∞")
    if kind == "call":
        return all(argument[0] == "num" or is_label(argument) for argument in node[2])
    if kind in ("tuple", "ratio"):
        return all(map(is_label, node[-1]))
    if kind == "fn":
        return node[1] == "abs" and node[2][0][0] == "mul" and is_label(node[2][0])
    if kind == "pow":
        return node[2] == number(-1) and is_label(node[1])
    if kind == "mul":                                       # points are capital letters; the m of m\angle ABC is none
        return all(item[0] in ("pow", "mul") and is_label(item)
                   or item[0] == "sym" and (item[1][0].isupper() or " " in item[1] or item[1] == "m" and " " in str(node[1][1:]))
                   for item in node[1])
    return kind == "text"


def same_choice(a: Node, b: Node) -> bool:
    """(C) 8 is C, and is 8; (C) 8 is not (D) 8."""
    if a[0] == b[0]:
        return a[1] == b[1] and same(a[2], b[2])
    choice, other = (a, b) if a[0] == "choice" else (b, a)
    return other == ("sym", choice[1]) or same(choice[2], other)


def same_quantity(a: Node, b: Node) -> bool:
    """Units on both sides must be the same or convert; where one side writes none, the question gave it."""
    if a[0] == b[0]:
        return a[2] == b[2] and same_value(a, b)
    bare, measured = (a, b[1]) if b[0] == "unit" else (b, a[1])
    return bare[0] not in ("deg", "pct") and same(bare, measured)


def same_ratio(a: Node, b: Node) -> bool:
    """3:4 = 6:8 = 3/4, but times of day (7:20) agree digit by digit."""
    if a[0] == b[0]:
        if len(a[1]) != len(b[1]) or all(map(same, a[1], b[1])):
            return len(a[1]) == len(b[1])
        (x, *xs), (y, *ys) = a[1], b[1]
        return not (is_time(a) and is_time(b)) and all(same_value(("mul", (u, y)), ("mul", (v, x))) for u, v in zip(xs, ys))
    ratio, other = (a, b) if a[0] == "ratio" else (b, a)
    return len(ratio[1]) == 2 and other[0] not in ("tuple", "unit", "deg", "pct") and same_value(
        ("mul", (ratio[1][0], reciprocal(ratio[1][1]))), other)


def is_time(ratio: Node) -> bool:
    hours, minutes, *_ = (part[1] if part[0] == "unit" else part for part in ratio[1])
    return hours[0] == minutes[0] == "num" and hours[1] <= 24 and (minutes[1] == 0 or 10 <= minutes[1] < 60)


# Collections

def is_collection(node: Node) -> bool:
    return node[0] in ("list", "set") or node[0] not in ("tuple", "matrix", "ratio") and has(node, "pm")


def elements(node: Node) -> list[Node]:
    """The members of a list or set, plus-minus written out and inner lists spliced in (x = {1, 2}, too)."""
    if node[0] in ("list", "set"):
        return [member for item in node[1] for member in ([item] if item[0] == "set" else elements(item))]
    if node[:2] == ("rel", ("=",)) and node[2][1][0] in ("list", "set"):
        return [("rel", ("=",), (node[2][0], member)) for member in elements(node[2][1])]
    return variants(node)


def label_of(node: Node) -> Node | None:
    """The name in `name = value` and `name in set`."""
    return canonical(node[2][0]) if node[0] == "rel" and node[1] in (("=",), ("in",)) and is_label(node[2][0]) else None


def same_collection(a: Node, b: Node) -> bool:
    """Lists and sets, in any order. A list without names agrees with `x = 1, y = 2` in this order only, and so does a tuple."""
    if "tuple" in (a[0], b[0]):
        pair, plain = (a, b) if a[0] == "tuple" else (b, a)
        if pair[1:3] != ("(", ")") or plain[0] != "list":
            return False
        xs, ys, ordered = list(pair[3]), elements(plain), True
    else:
        xs, ys, ordered = elements(a), elements(b), False
    xs, ys = [[simplified(member) for member in members] for members in (xs, ys)]
    names = [{label_of(member) for member in members} - {None} for members in (xs, ys)]
    if min(map(len, names)) > 1 and not ordered:
        return matched(xs, ys)
    if all(names) and names[0] != names[1]:
        return False
    xs, ys = [[member[2][1] if label_of(member) else member for member in members] for members in (xs, ys)]
    if ordered or max(map(len, names)) > 1:
        return len(xs) == len(ys) and all(map(same, xs, ys))
    if "set" in (a[0], b[0]) or has(a, "pm") or has(b, "pm") or all(member[0] in ("tuple", "rel") for member in xs + ys):
        xs, ys = distinct(xs), distinct(ys)
    return matched(xs, ys)


def distinct(nodes: list[Node]) -> list[Node]:
    """Without repeats: {1, 1, 2} is {1, 2}, and a solution that is listed twice is one solution."""
    nodes = list({canonical(node): node for node in nodes}.values())
    return nodes if len(nodes) > 30 else [node for i, node in enumerate(nodes) if not any(same(node, other) for other in nodes[:i])]


def matched(xs: list[Node], ys: list[Node]) -> bool:
    """Is there a one-to-one match? Equal trees are cancelled first; many that are left mean different lists."""
    if len(xs) != len(ys):
        return False
    left, right = Counter(map(canonical, xs)), Counter(map(canonical, ys))
    xs, ys = list((left - right).elements()), list((right - left).elements())
    if len(xs) > 40:
        return False
    for x in xs:
        partner = next((y for y in ys if same(x, y)), None)
        if partner is None:
            return False
        ys.remove(partner)
    return True


# Relations

_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}


def same_relation(a: Node, b: Node) -> bool:
    """Two equations or inequalities: the same sides, or the same up to a factor. A value agrees with `name = value` only."""
    if a[0] != b[0]:
        relation, value = (a, b) if a[0] == "rel" else (b, a)
        return label_of(relation) is not None and same(relation[2][1], value)
    if a[1] == b[1] and all(map(same, a[2], b[2])):
        return True
    if not set(a[1] + b[1]) <= set(_FLIP):
        return False
    flipped = tuple(_FLIP[op] for op in reversed(b[1]))
    if a[1] == flipped and all(map(same, a[2], reversed(b[2]))):
        return True
    return len(a[1]) == 1 and a[1] in (b[1], flipped) and proportional(a, b)


def proportional(a: Node, b: Node) -> bool:
    """Is (left - right) of one a constant multiple of the other's, with the sign that the direction asks for?"""
    f, g = (("add", (node[2][0], negative(node[2][1]))) for node in (a, b))
    if unknowns(f) != unknowns(g):
        return False
    factor, agreed = None, 0
    for _, env in points(sorted(unknowns(f))):
        try:
            x, y = evaluate(f, Scope(_LOW, env)), evaluate(g, Scope(_LOW, env))
            if isinstance(x, tuple) or isinstance(y, tuple) or x == 0 or y == 0:
                continue
            ratio = times(x, raised(y, Fraction(-1), _LOW), _LOW)
        except (Undefined, TooBig):
            continue
        if factor is None:
            factor = ratio
            if not is_real(ratio) or a[1][0] not in ("=", "!=") and (ratio > 0) != (a[1] == b[1]):
                return False
        elif not close(factor, ratio):
            return False
        agreed += 1
    return agreed >= 3


# Sets of real numbers: intervals, unions, conditions on one unknown. Two of them are equal if they agree at every mark
# (where membership of either can change), between neighbouring marks and beyond the outer ones.

class Region(NamedTuple):
    name: str | None                    # the unknown it is a condition on, None for a set without one
    marks: list                         # finite endpoints
    holds: Callable                     # is this number in the set?


def is_region(node: Node) -> bool:
    """Is this written as a set of reals (and not as a pair that could be a point)?"""
    if node[0] == "rel":
        return bool(set(node[1]) & {"<", "<=", ">", ">=", "!=", "in"})
    if node[0] in ("list", "add"):
        return (all if node[0] == "list" else any)(map(is_region, node[1]))
    return node[0] in ("cup", "cap", "setminus", "where") or node == ("sym", "ℝ")


def region(node: Node) -> Region | None:
    """The set of reals that a tree describes, None if it describes none that these rules know."""
    try:
        return region_of(node)
    except (Undefined, TooBig):
        return None


def region_of(node: Node) -> Region | None:
    kind = node[0]
    if node == ("sym", "ℝ"):
        return Region(None, [], lambda x: True)
    if kind == "tuple" and len(node[3]) == 2:
        low, high = map(endpoint, node[3])
        if not before(low, high):
            return None
        return Region(None, [low, high], lambda x: (before(low, x) or node[1] == "[" and not before(x, low))
                      and (before(x, high) or node[2] == "]" and not before(high, x)))
    if kind == "set":
        values = [endpoint(item) for item in node[1]]
        return Region(None, values, lambda x: any(not before(v, x) and not before(x, v) for v in values))
    if kind == "add" and len(node[1]) == 2 and node[1][1][0] == "mul" and node[1][1][1][0] == number(-1):       # R - {0}
        kind, node = "setminus", ("setminus", node[1][0], node[1][1][1][1])
    if kind in ("cup", "cap", "setminus"):
        left, right = region_of(node[1]), region_of(node[2])
        if not left or not right:
            return None
        join = {"cup": lambda x: left.holds(x) or right.holds(x), "cap": lambda x: left.holds(x) and right.holds(x),
                "setminus": lambda x: left.holds(x) and not right.holds(x)}[kind]
        return Region(left.name or right.name, left.marks + right.marks, join)
    if kind in ("where", "list"):
        parts = [region_of(condition) for condition in node[1]]
        if not all(parts) or len({part.name for part in parts}) != 1:
            return None
        marks = [mark for part in parts for mark in part.marks]
        both = Region(None if kind == "where" else parts[0].name, marks, lambda x: all(part.holds(x) for part in parts))
        if node[2] == "or" or parts[0].name is None or node[2] == "," and not any(map(both.holds, probes(marks))):
            return both._replace(holds=lambda x: any(part.holds(x) for part in parts))                       # "x < 1, x > 3"
        return both
    return condition(node) if kind == "rel" else None


def condition(node: Node) -> Region | None:
    """x in A, a < x <= b, x != a, the same for |x| and for linear 2x + 1."""
    operators, sides = node[1], node[2]
    if operators == ("in",):
        inside = region_of(sides[1])
        return inside and inside._replace(name=sides[0][1] if sides[0][0] == "sym" else None)
    free = [i for i, side in enumerate(sides) if unknowns(side) or side[0] == "call"]
    if len(free) != 1 or not set(operators) <= set(_FLIP) - {"="} or free[0] not in (0, 1) or len(operators) > 2 or len(operators) == 2 and free != [1]:
        return None
    middle = sides[free[0]]
    bounds = [(_FLIP[op] if i < free[0] else op, endpoint(side)) for i, (op, side) in enumerate(
        zip(operators, [side for i, side in enumerate(sides) if i != free[0]]))]
    name, marks, value = None, [bound for _, bound in bounds], lambda x: x
    if middle[0] == "sym":
        name = middle[1] if middle[1] != "?" else None
    elif middle[:2] == ("fn", "abs") and middle[2][0][0] == "sym":
        name, marks, value = middle[2][0][1], marks + [-mark for mark in marks], abs
    elif middle[0] != "call":
        if len(unknowns(middle)) != 1 or has(middle, "call"):
            return None
        name = min(unknowns(middle))
        at = [evaluate(middle, Scope(_LOW, {name: Fraction(k)})) for k in (0, 1, 2, 5)]
        if not all(isinstance(v, Fraction) for v in at) or (at[2] - at[0], at[3] - at[0]) != (2 * (at[1] - at[0]), 5 * (at[1] - at[0])) or at[0] == at[1]:
            return None                                     # not linear with rational coefficients
        slope = at[1] - at[0]
        marks = [times(plus(mark, -at[0], _LOW), 1 / slope, _LOW) for mark in marks if not isinstance(mark, float)]
        value = lambda x: plus(times(x, slope, _LOW), at[0], _LOW)
    test = {"<": lambda u, v: before(u, v), ">": lambda u, v: before(v, u), "<=": lambda u, v: not before(v, u),
            ">=": lambda u, v: not before(u, v), "!=": lambda u, v: before(u, v) or before(v, u)}
    return Region(name, marks, lambda x: all(test[op](value(x), bound) for op, bound in bounds))


def endpoint(node: Node):
    """A real number as Fraction or mpf, or a float infinity."""
    if node in (("sym", "∞"), negative(("sym", "∞"))):
        return math.inf if node[0] == "sym" else -math.inf
    if unknowns(node):
        raise Undefined("an endpoint with an unknown")
    value = evaluate(node[1] if node[0] in ("unit", "deg") else node, Scope(_LOW, {}))
    if isinstance(value, tuple) or not is_real(value):
        raise Undefined("an endpoint that is not real")
    return value if isinstance(value, Fraction) else _LOW.re(value)


def before(a, b) -> bool:
    """a < b; what is equal within the precision is not before."""
    if isinstance(a, float) or isinstance(b, float):        # only infinities are floats
        a, b = (x if isinstance(x, float) else 0.0 for x in (a, b))
        return a < b
    return not close(a, b) and to_mp(a, _LOW) < to_mp(b, _LOW)


def probes(marks: list) -> list:
    """The marks, a number between each two neighbours and one beyond each end."""
    marks = sorted((to_mp(mark, _LOW) for mark in marks if not isinstance(mark, float)))
    if not marks:
        return [_LOW.mpf(0)]
    return marks + [(a + b) / 2 for a, b in zip(marks, marks[1:]) if not close(a, b)] + [marks[0] - 1, marks[-1] + 1]


def same_region(a: Region, b: Region) -> bool:
    return (None in (a.name, b.name) or a.name == b.name) and all(a.holds(x) == b.holds(x) for x in probes(a.marks + b.marks))


# Layer 4, values at points.

def same_value(a: Node, b: Node) -> bool:
    """Have two expressions the same value wherever both are real (or, if they never are, in the complex numbers)?

    Rational expressions are compared exactly, at fractions; the others at 50 digits, and a doubt is settled at 110.
    NOT IN PAPER: log is natural or decimal, a degree is a number or an angle, 25% is 25 or 1/4: any one reading that
    makes both sides equal will do, as the question fixed it. cos 36 is never cos 36°.
    """
    if has(a, *_NO_VALUE) or has(b, *_NO_VALUE):
        return False
    both = walk(a) + walk(b)
    kinds = {node[0] for node in both}
    trig = any(node[0] == "fn" and node[1] in ("sin", "cos", "tan", "cot", "sec", "csc") for node in both)
    log = any(node[0] == "fn" and node[1] == "log" and len(node[2]) == 1 for node in both)
    return any(agree(a, b, Scope(_LOW, {}, degree, percent, log10))
               for degree in ((True, False) if "deg" in kinds and not trig else (True,))
               for percent in ((True, False) if "pct" in kinds else (True,))
               for log10 in ((True, False) if log else (False,))) or printed(a, b) or printed(b, a)


_NO_VALUE = ("list", "set", "rel", "text", "based", "cup", "cap", "setminus", "where", "ratio", "choice", "pm")


def agree(a: Node, b: Node, scope: Scope) -> bool:
    """Equal at all points where both have a value: real values at fractions, else real at whole numbers, else complex."""
    names = sorted(unknowns(a) | unknowns(b))
    imaginary = not names or ("sym", "i") in walk(a) + walk(b)
    for real in (False,) if imaginary else (True, False):
        agreed = Counter()
        for kind, env in points(names):
            if kind == "whole" and agreed["real"] >= 2:
                break
            at = scope._replace(env=env, real=real)
            try:
                low = evaluate(a, at), evaluate(b, at)
                verdict = close(*low)
                if verdict is None:
                    at = at._replace(mp=_HIGH)
                    verdict = vanishes(low, (evaluate(a, at), evaluate(b, at)))
            except (Undefined, TooBig):
                continue
            if not verdict:
                return False
            agreed[kind] += 1
        if max(agreed.values(), default=0) >= (2 if names else 1):
            return True
    return False


def is_real(value) -> bool:
    if isinstance(value, tuple):
        return all(is_real(v) for row in value for v in row)
    return isinstance(value, Fraction) or abs(_LOW.im(value)) <= abs(_LOW.re(value)) * 1e-40


def printed(a: Node, b: Node) -> bool:
    """Is `a` a decimal of 15 to 17 digits, as a computer prints a float, and `b` the number it stands for (1/12, sqrt 2)?"""
    if a[0] != "num" or a[1].denominator < 10 ** 5 or unknowns(b):
        return False
    places = next((k for k in range(10, 20) if 10 ** k % a[1].denominator == 0), None)
    if places is None or not 15 <= len(str(abs(int(a[1] * 10 ** places)))) <= 17:
        return False
    value = evaluate(b, Scope(_LOW, {}))
    if isinstance(value, tuple) or not is_real(value) or isinstance(value, Fraction) and 10 ** 18 % value.denominator == 0:
        return False
    return abs(to_mp(a[1], _LOW) - to_mp(value, _LOW)) < _LOW.mpf(10) ** -places


# The public comparison

_DASHED = re.compile(r"\d+(?: ?- ?\d+)+")


def compare(answer: str, gold: str) -> bool | None:
    """is_equal without its safety net: None if the answer or the gold cannot be read."""
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return None
    verdict = same_plain(answer, gold)
    if verdict is not None:
        return verdict
    answer, gold = clean(answer), clean(gold)
    trees, golds = read(answer), read(gold)
    if not trees or not golds:
        return None
    if squeeze(answer) == squeeze(gold):
        return True
    if _DASHED.fullmatch(answer) and _DASHED.fullmatch(gold):                        # scores, ranges, dates: no differences
        return False
    for a, b in itertools.product(trees, golds):
        try:
            if same(a, b):
                return True
        except (Unreadable, Undefined, TooBig):
            continue
    return False


def is_equal(answer: str, gold: str) -> bool:
    """Are two answers the same to a careful grader? Pure, symmetric on answers, bounded in time, never raises.

    An unreadable gold equals nothing. NOT IN PAPER: a decimal equals a fraction or a constant only if it is exactly that
    number (0.5 = 1/2, but 0.33 is not 1/3 and 3.14 is not pi, on either side), except for the 15 to 17 digits that a
    computer prints: fewer digits would let a policy answer with an estimate.
    """
    try:
        return bool(compare(answer, gold))
    except Exception:           # whatever text of a policy finds a hole here, training goes on and the answer is wrong
        return False


def is_readable(answer: str) -> bool:
    """Does the parser accept this answer, so that it can serve as a gold?"""
    return is_equal(answer, answer)


# ----------------------------------------------------------------------------------------------------------------------
# grade: a batch of responses in worker processes
#
# trainer  --pipe-->  server (python verify.py --serve, one a process that calls grade)  --pipes-->  workers (forked)
# The server has imported everything once, so that a fresh worker costs a fork, and it has one thread, so that forking
# is safe whatever threads the trainer runs. It ends when the trainer does (end of file), and its workers with it.

class Grades(list):
    """The verdicts of `grade` in order, with `.stats`: what to log about them."""

    stats: dict[str, int]


def send(fd: int, message) -> None:
    data = json.dumps(message).encode()
    data = memoryview(struct.pack("!I", len(data)) + data)
    while data:
        data = data[os.write(fd, data):]


def receive(fd: int, deadline: float | None = None):
    """One message, None at the end of file; TimeoutError past the deadline (time.monotonic)."""
    data, want = b"", 4
    while len(data) < want:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(fd, want - len(data))
        if not chunk:
            return None
        data += chunk
        if want == 4 and len(data) == 4:
            want = 4 + struct.unpack("!I", data)[0]
    return json.loads(data[4:])


def worker_count() -> int:
    """Worker processes of one server: the cores of this machine, shared by the ranks that torchrun says it started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def worker(inbox: int, outbox: int) -> None:
    """The life of a worker: pairs in, verdicts out. Bounded in memory; killed by the server when it is late."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: do not outlive the server
    while (pair := receive(inbox)) is not None:
        try:
            verdict = compare(*pair)
            send(outbox, "unparsable" if verdict is None else verdict)
        except Exception:                                   # MemoryError too: this worker is fine again after it
            send(outbox, "crashes")


class Worker(NamedTuple):
    pid: int
    inbox: int
    outbox: int

    @staticmethod
    def start(others: list[Worker]) -> Worker:
        (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for fd in [in_write, out_read, 0, 1] + [fd for other in others for fd in (other.inbox, other.outbox)]:
                    os.close(fd)
                worker(in_read, out_write)
            finally:
                os._exit(0)
        os.close(in_read)
        os.close(out_write)
        return Worker(pid, in_write, out_read)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.inbox)
        os.close(self.outbox)


def serve() -> None:
    """The server: a batch [timeout, pairs] in, the list of verdicts out, until the end of the input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C in a terminal is for the trainer
    workers: list[Worker] = []
    workers += [Worker.start(workers) for _ in range(1)]
    while len(workers) < worker_count():
        workers.append(Worker.start(workers))
    send(1, len(workers))
    while (batch := receive(0)) is not None:
        timeout, pairs = batch
        verdicts: list = [None] * len(pairs)
        waiting, idle, busy = list(range(len(pairs)))[::-1], list(workers), {}          # busy: outbox -> (worker, index, deadline)
        deaths = [0] * len(pairs)
        while waiting or busy:
            while waiting and idle:
                job, index = idle.pop(), waiting.pop()
                try:
                    send(job.inbox, pairs[index])
                except BrokenPipeError:                     # it was killed while idle: a fresh one takes the pair
                    idle.append(replace(workers, job))
                    waiting.append(index)
                    continue
                busy[job.outbox] = (job, index, time.monotonic() + timeout)
            pause = max(0.0, min(deadline for _, _, deadline in busy.values()) - time.monotonic())
            ready, _, _ = select.select([0, *busy], [], [], pause)
            if 0 in ready:                                  # nobody sends while a batch runs: the trainer is gone
                break
            now = time.monotonic()
            for outbox, (job, index, deadline) in list(busy.items()):
                if outbox in ready:
                    verdicts[index] = receive(outbox)
                    if verdicts[index] is None:             # its worker died: killed from outside, or by this very pair?
                        job = replace(workers, job)
                        deaths[index] += 1
                        if deaths[index] < TRIES:
                            waiting.append(index)
                        else:
                            verdicts[index] = "crashes"
                elif now >= deadline:
                    verdicts[index] = "timeouts"
                    job = replace(workers, job)
                else:
                    continue
                del busy[outbox]
                idle.append(job)
        else:
            send(1, verdicts)
            continue
        break
    for job in workers:
        job.stop()


def replace(workers: list[Worker], dead: Worker) -> Worker:
    workers.remove(dead)
    dead.stop()
    workers.append(Worker.start(workers))
    return workers[-1]


class Pool:
    """The trainer's end of the server. One batch at a time, whatever the number of threads."""

    def __init__(self):
        self.owner = os.getpid()
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            self.workers = receive(self.process.stdout.fileno(), time.monotonic() + 120)
        except TimeoutError:
            self.workers = None
        if self.workers is None:
            self.stop()
            raise RuntimeError(f"verify.py: the grading server did not start; `{sys.executable} {__file__} --serve` shows why")

    def ask(self, pairs: list[tuple[str, str]], timeout: float) -> list | None:
        """A verdict for each pair: True, False, 'unparsable', 'timeouts' or 'crashes'. None: the server died."""
        patience = 30 + timeout * (len(pairs) / self.workers + 1)
        try:
            send(self.process.stdin.fileno(), [timeout, pairs])
            verdicts = receive(self.process.stdout.fileno(), time.monotonic() + patience)
        except (TimeoutError, BrokenPipeError):
            verdicts = None
        if verdicts is None:
            self.stop()
        return verdicts

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


_pool: Pool | None = None
_pool_lock = threading.Lock()
_cache: OrderedDict[tuple[str, str], bool | str] = OrderedDict()


def pool() -> Pool:
    """The pool of this process: started at the first use, anew after a fork or after its server died."""
    global _pool
    if _pool is None or _pool.owner != os.getpid() or _pool.process.poll() is not None:
        _pool = Pool()
        atexit.register(_pool.stop)
    return _pool


def ask(pairs: list[tuple[str, str]], timeout: float) -> list:
    """The verdicts of the server. One that dies is replaced and asked again: a kill costs time, and no reward."""
    for attempt in range(TRIES):
        try:
            if (verdicts := pool().ask(pairs, timeout)) is not None:
                return verdicts
        except RuntimeError:                                # it did not even start
            if attempt == TRIES - 1:
                raise
    return ["crashes"] * len(pairs)


def grade(responses: list[str], golds: list[str], timeout: float = 1.0) -> Grades:
    """Is the boxed answer of each response equal to its gold? The batch entry that RL uses.

    Order is kept; what fails is False. Two plain numbers are compared here and now, all else in worker processes:
    each pair has `timeout` seconds of wall clock and MAX_MEMORY bytes, a worker that overruns is killed and replaced,
    and verdicts are cached (the K samples of a prompt repeat each other). Works from any thread, under torchrun with
    one server a rank, and in notebooks; no signals in the trainer, no state besides pool and cache.
    `.stats` of the result counts no_answer (no box), unparsable (answer or gold), timeouts and crashes, and gives the
    number of workers (0 while none was needed).
    """
    return grade_answers([extract_answer(response) for response in responses], golds, timeout)


def grade_answers(answers: list[str | None], golds: list[str], timeout: float = 1.0) -> Grades:
    """`grade` for answers that are extracted already; None is no answer."""
    if len(answers) != len(golds):
        raise ValueError(f"grade: {len(answers)} answers but {len(golds)} golds")
    if not timeout > 0:
        raise ValueError(f"grade: timeout must be positive, not {timeout}")
    verdicts: list = []
    asked: dict[tuple[str, str], bool | str] = {}
    with _pool_lock:
        for answer, gold in zip(answers, golds):
            if answer is None or max(len(answer), len(gold)) > MAX_CHARS:
                verdicts.append("no_answer" if answer is None else "unparsable")
                continue
            verdicts.append(same_plain(answer, gold))
            if verdicts[-1] is None and (answer, gold) not in _cache:
                asked[answer, gold] = False
        if asked:
            asked = dict(zip(asked, ask(list(asked), timeout)))
        for i, pair in enumerate(zip(answers, golds)):
            if verdicts[i] is None:
                if pair in _cache:
                    _cache.move_to_end(pair)
                verdicts[i] = asked[pair] if pair in asked else _cache[pair]
        _cache.update((pair, verdict) for pair, verdict in asked.items() if verdict not in ("timeouts", "crashes"))
        while len(_cache) > CACHE_SIZE:                     # those not used for long go; a machine's failure is never remembered
            _cache.popitem(last=False)
    grades = Grades(verdict is True for verdict in verdicts)
    grades.stats = {name: verdicts.count(name) for name in ("no_answer", "unparsable", "timeouts", "crashes")}
    grades.failed = {i for i, verdict in enumerate(verdicts) if verdict in ("timeouts", "crashes")}
    grades.stats["workers"] = _pool.workers if _pool else 0
    return grades


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def load_rows(path: str) -> list[dict]:
    """Rows {"pred", "gold"[, "equal", "category", "form", "debatable"]} of a file; debatable rows are left out."""
    from data_prep import Misuse, parse, raw_rows, row_at   # the one reader of files; only this command needs it, grading does not

    rows = []
    try:
        for where, raw in raw_rows(path, {"pred", "gold", "equal", "category", "form", "debatable"}):
            row = parse(where, raw)
            if not isinstance(row.get("pred"), str) or not isinstance(row.get("gold"), str):
                raise Misuse(f"{row_at(where)}: fields 'pred' and 'gold' must be there and text")
            if not row.get("debatable"):
                rows.append(row | {"category": str(row.get("category", "-"))})
        if not rows:
            raise Misuse(f"{path}: no rows")
    except Misuse as error:
        raise SystemExit(str(error))
    return rows


def answer_of(row: dict) -> str | None:
    """pred is a whole response if the row says so or if it has a box; else it is the answer itself."""
    response = row["form"] == "response" if "form" in row else "\\boxed" in row["pred"] or "\\fbox" in row["pred"]
    return extract_answer(row["pred"]) if response else row["pred"]


def report(rows: list[dict], verdicts: list[bool], title: str, details: bool) -> None:
    """The share of right verdicts, by category, and the rows that differ from their label."""
    labelled = [(row, verdict) for row, verdict in zip(rows, verdicts) if "equal" in row]
    if not labelled:
        print(f"{title}: {sum(verdicts)} of {len(rows)} equal")
        return
    wrong = [(row, verdict) for row, verdict in labelled if verdict != bool(row["equal"])]
    false_right = sum(verdict for _, verdict in wrong)
    print(f"{title}: {100 * (1 - len(wrong) / len(labelled)):.2f} % of {len(labelled)} rows right, "
          f"{false_right} false right, {len(wrong) - false_right} false wrong")
    if details:
        total, missed = (Counter(row["category"] for row, _ in part) for part in (labelled, wrong))
        for category in sorted(total):
            print(f"  {category:<20} {total[category] - missed[category]:>5} of {total[category]}")
        for row, verdict in wrong:
            print(f"  {'FALSE RIGHT' if verdict else 'FALSE WRONG'}  pred {row['pred'][-200:]!r}  gold {row['gold']!r}")


def math_verify_verdicts(rows: list[dict]) -> list[bool]:
    """The same rows through the installed math-verify: responses as they are, answers as a box in a formula."""
    from math_verify import parse, verify

    def parsed(text: str):
        return parse(text if "\\boxed" in text or "\\fbox" in text else f"$\\boxed{{{text}}}$")
    return [bool(verify(parsed(row["gold"]), parsed(row["pred"]))) for row in rows]


def run_rows(path: str, bench: bool, timeout: float) -> None:
    if bench and importlib.util.find_spec("math_verify") is None:
        raise SystemExit("--bench needs math-verify: pip install 'math-verify[antlr4_13_2]'")
    rows = load_rows(path)
    answers, golds = [answer_of(row) for row in rows], [row["gold"] for row in rows]
    pool()                                                  # started before the clock
    runs = [("verify.py, grade", lambda: grade_answers(answers, golds, timeout))]
    if bench:
        runs += [("verify.py, one process", lambda: [answer is not None and is_equal(answer, gold) for answer, gold in zip(answers, golds)]),
                 ("math-verify, one process", lambda: math_verify_verdicts(rows))]
    for title, run in runs:
        start = time.perf_counter()
        verdicts = run()
        seconds = time.perf_counter() - start
        report(rows, verdicts, title, details=run is runs[0][1])
        counts = "".join(f", {name} {count}" for name, count in verdicts.stats.items()) if isinstance(verdicts, Grades) else ""
        print(f"  {len(rows) / seconds:,.0f} rows/s{counts}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="verify.py", description="Is this answer right?", epilog="Exit status: 0 equal, 1 different, 2 misuse.")
    parser.add_argument("answers", nargs="*", metavar="ANSWER GOLD", help="two answers to compare")
    parser.add_argument("--jsonl", metavar="FILE", help='rows {"pred", "gold"[, "equal", "category"]}: table per category, rows that differ, speed')
    parser.add_argument("--bench", action="store_true", help="with --jsonl: also the installed math-verify, on the same rows in the same run")
    parser.add_argument("--timeout", type=float, default=1.0, help="with --jsonl: seconds for one pair (default 1)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    two = len(sys.argv) == 3 and not sys.argv[1].startswith("--")                    # so that an answer may begin with a minus
    args = parser.parse_args(["--", *sys.argv[1:]] if two else None)
    if args.serve:
        return serve()
    if args.jsonl and not args.answers and args.timeout > 0:
        try:
            return run_rows(args.jsonl, args.bench, args.timeout)
        except SystemExit as error:
            print(f"verify.py: {error}", file=sys.stderr)
            sys.exit(2)
    if args.jsonl or args.bench or len(args.answers) != 2:
        parser.error("give two answers (ANSWER GOLD), or --jsonl FILE")
    equal = is_equal(*args.answers)
    print(equal)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
