"""Is this answer right?  The answer checker that is the reward of RL (NOT IN PAPER: the authors had an LLM judge).

    python verify.py '\\frac12' 0.5             prints True and exits 0 (False: 1, misuse: 2)
    python verify.py --jsonl rows.jsonl         rows {"pred", "gold"[, "equal", "category"]}: shares, misses, rows/s

Three names matter: `extract_answer` (the last complete box), `is_equal` (two answers, pure) and `grade` (a batch of
responses, in worker processes under a deadline and a memory limit). The text of an answer is data: it is never
evaluated by Python or by a computer algebra system, only read by the small parser below, whose trees are bounded.

Order of this file: limits - extraction - clean-up - tokens - units - parser - values - trees - comparison, cheapest
layer first - copies of the problem - grade and its workers - command line.
"""

from __future__ import annotations

import argparse
import atexit
import gzip
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from contextlib import suppress
from collections import Counter, OrderedDict
from fractions import Fraction
from functools import lru_cache, partial, reduce
from typing import Callable, NamedTuple

import mpmath

MAX_CHARS = (
    2000  # a longer answer is no answer; bounds the tokens, the tree and every regular expression
)
MAX_PROBLEM = 10_000  # characters of a problem in which a copied answer is looked for
MAX_DOTS = 1000  # terms that dots may stand for
MAX_DEPTH = 80  # nested terms, atoms and exponents: 40 brackets
MAX_BITS = 200_000  # of an exact numerator or denominator, about 60,000 digits
MAX_DIGITS = 4000  # of an irrational value
MAX_DIGITS_AT_POINTS = 700  # where there are unknowns, since there are other points
MAX_FACTORIAL = 3000  # largest argument that is computed exactly
MAX_WORDS = 12  # a longer text is prose: no rule can tell whether two of them agree
MAX_WORK = 50_000  # units of about a microsecond that one comparison may take
CACHE_SIZE = 100_000  # pairs that `grade` remembers
TRIES = 10  # deaths of workers on one pair until it counts as crashed
MAX_STARTS = 100  # signals that may kill a worker while it starts
MAX_TIMEOUT = 86_400  # seconds for one pair
START_SECONDS = 20  # for a worker to start
MAX_MEMORY = 512 << 20  # bytes of address space of one worker process
MAX_ROW = 16 << 20  # bytes of a row of --jsonl


# What ends a reading or a comparison. All four are caught below; none reaches the caller.


class Unreadable(ValueError):
    """The text is no answer that this parser knows."""


class Undefined(ArithmeticError):
    """The expression has no value: 1/0, log 0, 0 * infinity."""


class TooBig(ArithmeticError):
    """The value is beyond the limits above; nothing is known about it."""


class TooMuchWork(Exception):
    """The comparison takes more than MAX_WORK; the answers count as different."""


class Work(threading.local):
    left: float = MAX_WORK


_work = Work()


def spend(units: float) -> None:
    """Count work, not seconds, so that no verdict depends on the speed or the load of the machine."""
    _work.left -= units
    if _work.left < 0:
        raise TooMuchWork


# ----------------------------------------------------------------------------------------------------------------------
# Extraction

_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:(\{)|(-?\d[\d.,]*\d|-?\d|[A-Za-z](?![A-Za-z])))|\\.|[{}]", re.S
)


def extract_answer(response: str) -> str | None:
    """Content of the last complete `\\boxed{...}` or `\\fbox{...}` after `</think>`, or None.

    Braces may be nested, `\\boxed 5` is read as TeX users mean it, of nested boxes the outer one counts, and a
    response whose last `<think>` is not closed has not answered yet.
    NOT IN PAPER: the authors let an LLM find the answer in prose. A rule is the better reward: it costs microseconds,
    gives the same verdict every time, and cannot be talked to by the policy that is optimised against it.
    """
    _, _, body = response.rpartition("</think>")
    if "<think>" in body:
        return None
    # opened: start of the content for a box, None for a plain brace
    found = None
    opened = []
    for match in _BOX.finditer(body):
        token = match[0]
        if match[1] or token == "{":
            opened.append(match.end() if match[1] else None)
        elif match[2]:
            found = match[2]
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = body[start : match.start()]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Clean-up: what changes only the looks of an answer

_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
    )
)
# LaTeX or ASCII, then the letters that mean the same.
_SPELLINGS = r"""
- −–—‐‑﹣－  \cdot ·⋅∙•  / ÷∕⁄  ^\circ °º˚  \emptyset ∅⌀  , ，、  . 。．  \le ≤≦⩽  \ge ≥≧⩾
\pi πℼ  ' ’′  | ∣｜  \times ×  \sqrt √  \sqrt[3] ∛  \infty ∞  \ne ≠  \approx ≈  \in ∈  \cup ∪
\cap ∩  \pm ±  \mp ∓  \angle ∠  \R ℝ  \setminus ∖  \equiv ≡  \phi ϕ  \circ ∘  ; ；  : ：∶
\ldots …  % ％  $ ＄  \langle ⟨  \rangle ⟩
(1) ①  (2) ②  (3) ③  (4) ④  (5) ⑤  (6) ⑥  (7) ⑦  (8) ⑧  (9) ⑨  (10) ⑩
\frac{1}{4} ¼  \frac{1}{2} ½  \frac{3}{4} ¾  \frac{1}{7} ⅐  \frac{1}{9} ⅑  \frac{1}{10} ⅒
\frac{1}{3} ⅓  \frac{2}{3} ⅔  \frac{1}{5} ⅕  \frac{2}{5} ⅖  \frac{3}{5} ⅗  \frac{4}{5} ⅘
\frac{1}{6} ⅙  \frac{5}{6} ⅚  \frac{1}{8} ⅛  \frac{3}{8} ⅜  \frac{5}{8} ⅝  \frac{7}{8} ⅞"""
_INVISIBLE = "00ad 200b 200c 200d 200e 200f 202a 202b 202c 202d 202e 2060 2061 2062 2063 2064 feff"
_UNICODE = {ord(letter): f"\\{name} " for letter, name in _GREEK.items()}
_UNICODE |= {int(code, 16): "" for code in _INVISIBLE.split()}
for _row in re.split("  |\n", _SPELLINGS)[1:]:
    _latex, _letters = _row.split(" ")
    _blank = " " if _latex[-1].isalpha() else ""
    _UNICODE |= dict.fromkeys(map(ord, _letters), _latex + _blank)
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)|([₀₁₂₃₄₅₆₇₈₉]+)")
_FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|up|sf|tt|normal)?|emph|[mh]box|math(?:rm|bf|it|sf|tt|cal|scr|frak)|boldsymbol|bm|pmb"
    r"|operatorname\*?|bf|rm|it)(?![a-zA-Z]) ?(\{(?:[^{}]|\^ ?\{-?\d\})*\})?"
)

# \mathbf{i}, \hat{\imath}, \hat{\mathbf j}
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|hat|vec|widehat|overrightarrow) ?"
    r"(?:(\{)? ?\\(?:mathbf|hat|vec|rm) ?)?(\{)? ?(?:\\([ij])math|([ijk])(?![a-zA-Z]))"
    r"(?(2) ?\})(?(1) ?\})"
)
# trigger ⟶ pattern ⟶ replacement, applied in this order to a text without double blanks. A text
# without the trigger has no match (this saves most of the time). § is the end of a command's name,
# ␣ a blank at an end; a line that is indented goes on with the one above.
_CLEAN_ROWS = r"""
# layout
# \\[4pt]
\\ ⟶ \\\\ ?\[[^\]]*\] ⟶ \\\\␣
\ ⟶ (?<!\\)\\[()\[\]]|\\(?:boxed|fbox|displaystyle|textstyle|[lL]arge|small|(?:no)?limits
    |(?:left|right)\.)§ ⟶ ␣
\ ⟶ \\(?:left|right|[bB]igg?[lrm]?|middle|underline|mathop|ensuremath)§ ⟶
\ ⟶ \\(?:text)?color ?\{[^{}]*\}|\\(?:hspace|vspace|phantom|tag) ?\*?\{[^{}]*\} ⟶ ␣
\mathbb ⟶ \\mathbb ?\{?([A-Z])\}? ⟶ \\\1␣
{,} ⟶ (?<=\d)\{,\}(?=\d{3}) ⟶
# 1\,000
\ ⟶ (?<=\d),?\\! ?(?=\d{3}(?!\d))|(?<=\d)(?<!\d\.\d)\\[, ](?=\d{3}(?!\d)) ⟶
{ ⟶ \{([-+:])\} ⟶ \1
# TeX shows {5}6 as 56
{ ⟶ (?<![\w^_}\]\\ ])\{ ?(\d[\d.]*) ?\}(?! ?[,}]) ⟶ \1
# {x | x > 2}
{ ⟶ ^ ?\{ ?([a-z] ?(?:\\mid§|[|:]).*)\} ?$ ⟶ \\{\1\\}
\ ⟶ (?<!\\)\\[!,;:> ]|\\(?:quad|qquad|thinspace|enspace|medspace)§|\\+ ?$ ⟶ ␣
# numbers
# 5^{\text{th}}
^ ⟶ \^ ?\{? ?\\text ?\{ ?(?:st|nd|rd|th) ?\} ?\}?|\^ ?\{ ?(?:st|nd|rd|th) ?\} ⟶ ␣
# 21st
⟶ (?<=\d) ?\\text ?\{ ?(?:st|nd|rd|th) ?\}|(?<=\d)(?:st|nd|rd|th)§ ⟶ ␣
# 1 000 000
␣ ⟶ ^ ?([-+]?\d{1,3}) (\d{3})(?: (\d{3}))?(?: (\d{3}))? ?$ ⟶ \1\2\3\4
# 3x10^5
10 ⟶ (?<=\d) ?[xX] ?(?=10 ?\^) ⟶ \\times␣
# (12)_5
_ ⟶ \((\d[0-9A-F]*)\) ?(?=_) ⟶ \1
# 12\text{ base }5
base ⟶ (?<=\d) ?(?:\\text ?\{)? ?\(? ?base[- ]?\}? ?(\d{1,2}) ?\)? ?\}? ⟶ _{\1}
# commands
frac ⟶ \\[dtc]frac§ ⟶ \\frac␣
binom ⟶ \\[dt]binom§ ⟶ \\binom␣
\var ⟶ \\varnothing§ ⟶ \\emptyset␣
\vec ⟶ \\vec§ ⟶ \\overrightarrow␣
\bar ⟶ \\bar§ ⟶ \\overline␣
\hat ⟶ \\hat§ ⟶ \\widehat␣
dots ⟶ \\(?:ldots|dots|cdots|dotsc)§ ⟶ ...
\ ⟶ \^ ?\{ ?\\circ ?\}|\^ ?\\circ§|\\degree§ ⟶ °␣
° ⟶ ° *(?:\\text ?\{ ?([CF])(?:elsius|ahrenheit)? ?\}|([CF])§) ⟶ \\text{degree\1\2}
degree ⟶ \bdegrees? (C)elsius§|\bdegrees? (F)ahrenheit§ ⟶ degree\1\2
\over ⟶ \{([^{}]*)\\over§([^{}]*)\}|^([^{}]*)\\over§([^{}]*)$ ⟶ \\frac {\1\3}{\2\4}
\choose ⟶ \{([^{}]*)\\choose§([^{}]*)\} ⟶ \\binom {\1}{\2}
# dy/dx is a name, not a quotient
\text{d} ⟶ \\text\{d\} ?(?=[a-zA-Z]) ⟶ d
\frac ⟶ \\frac ?\{ ?d( ?\^ ?\{?\d\}?)? ?([A-Za-z]) ?\} ?\{ ?d ?([A-Za-z])(?: ?\^ ?\{?\d\}?)? ?\}
     ⟶ \\widehat{d\2d\3\1}
/ ⟶ (?<![a-zA-Z\\])d([a-zA-Z]) ?/ ?d([a-zA-Z])§ ⟶ \\widehat{d\1d\2}
# C_5^2, _5C_2, {}_5P_2, ^5C_2
C ⟶ (?<![A-Za-z\\])C ?_ ?\{?(\d+|[nmkN])\}? ?\^ ?(\{[^{}]*\}|\w+) ⟶ \\binom{\1}{\2}
C ⟶ (?<![\w}])(?:\{ ?\} ?)?[_^] ?\{?(\d+|[a-z])\}? ?C ?_ ?\{?(\d+|[a-z])\}? ⟶ \\binom{\1}{\2}
P ⟶ (?<![\w}])(?:\{ ?\} ?)?[_^] ?\{?(\d+|[a-z])\}? ?P ?_ ?\{?(\d+|[a-z])\}? ⟶ (\\binom{\1}{\2}(\2)!)
mod ⟶ \\text ?\{ ?\(? ?mod ?\}? ?(\d+) ?\)? ?\}?|\( ?\\?b?mod ?(\d+) ?\)
    |\( ?\\text ?\{ ?mod ?\}? ?(\d+) ?\}? ?\) ⟶ \\mod \1\2\3␣
& ⟶ & ?\\text ?\{ ?(?:if|for|when)§ ⟶ & \\text{
& ⟶ & ?(?=[=<>]|\\(?:[lg]eq?|neq?|approx|equiv|in)§) ⟶
\approx ⟶ \( ?(\\approx[^()]*)\) ?$ ⟶ \1
\not ⟶ \\not ?= ⟶ \\ne␣
\ ⟶ \\([%_]) ⟶ \1
\ ⟶ \\\$|\\euro§ ⟶ ␣$␣
# \R - \{0\}
\R ⟶ (\\R) *- *(?=\\\{|[(\[]) ⟶ \1 \\setminus␣
U ⟶ (?<=[)\]]) ?U ?(?=[(\[]) ⟶ \\cup␣
# units
- ⟶ (?<=\d) ([a-zA-Z]{1,3}) ?\\cdot ?([a-zA-Z]{1,3}) ?\^ ?\{? ?-(\d) ?\}? ?$ ⟶ \\text{\1/\2^\3}
/ ⟶ (?<=\d) (k?m|cm|k?g) ?/ ?(s|h|min|c?m)( ?\^ ?\{?\d\}?)? ?$ ⟶ \\text{\1/\2\3}
sterling ⟶ pounds? sterling ⟶ £
# 2 hours and 30 minutes, 5 feet, 4 inches are one quantity
min ⟶ \b(h(?:ou)?rs? {0,3}\}?),?( {0,3}(?:\\text ?\{)? ?)(?:and\b)?
    (?= ?\}? {0,3}\d{1,4} {0,3}(?:\\text ?\{ ?)?min) ⟶ \1\2␣
sec ⟶ \b(min(?:ute)?s? {0,3}\}?),?( {0,3}(?:\\text ?\{)? ?)(?:and\b)?
    (?= ?\}? {0,3}\d{1,4} {0,3}(?:\\text ?\{ ?)?sec) ⟶ \1\2␣
in ⟶ \b(f(?:oo|ee)?t {0,3}\}?),?( {0,3}(?:\\text ?\{)? ?)(?:and\b)?
    (?= ?\}? {0,3}\d{1,4} {0,3}(?:\\text ?\{ ?)?in) ⟶ \1\2␣
# words
. ⟶ \b([aApP])\. ?[mM]\b\.? ⟶ \1m
per cent ⟶ \bper cent\b ⟶ percent
\text ⟶ \( ?\\text ?\{([A-J])\} ?\) ⟶ \\text{(\1)}
# 20 \textbf{(D)}
\text ⟶ ^((?!\\text).+?) ?\\text ?\{ ?\(([A-J])\) ?\}[ .]*$ ⟶ \\text{(\2)} \1
⟶ (?i)^ ?(?:\\text ?\{)? ?(?:the )?(?:final )?answer\b ?(?:is|:)? ?:? ?\}?(?=.) ⟶
# prose around a value: words that cannot change it
\text ⟶ (?i)^ ?\\text ?\{ ?(?:so|thus|hence|therefore)?,? ?(?:an|(?-i:a)(?= )
    |there (?:are|is)|it is|(?:the )?(?:value|result|solution) is)?:? ?\}(?= *[^ ,.]) ⟶
\text ⟶ (?i)^ ?\\text ?\{ ?(?:(?:so|thus|hence|therefore),? )?the (maximum|minimum|total|area|volume
    |perimeter|length|distance|probability)(?: value)? is ?\}(?= *[^ ,.]) ⟶ \\text{\1}=
crease ⟶ (?i)^ ?\\text ?\{ ?(?:an? )?(in|de)creased? (?:of|by) ?\} ?(.+) ⟶ \2 \\text{\1crease}
** ⟶ ^ ?\*\*([^*]+)\*\* ⟶ \1
\text ⟶ ,? ?\\text ?\{,? ?(?:for|where)(?: a\w+)?(?: integers?)? ?\} ?
    ([a-z] ?\\in ?\\[NZ])[ .]*$ ⟶ , \1
\text ⟶ ,? ?\\text ?\{,? ?(?:for|where)(?: all
    | any)? integers? ?\} ?([a-z])[ .]*$ ⟶ , \1 \\in \\Z␣
\text ⟶ ,? ?\\text ?\{,? ?for (?:all|any|every|each|some)(?: (?:real|constant
    |number)s?)* ?\}? ?[a-z]?(?: ?\\in ?\\[QR])? ?\}?[ .]*$ ⟶
\in ⟶ ,? ?\(( ?[a-z] ?\\in ?\\[NZR] ?)\)[ .]*$ ⟶ , \1
** ⟶ \*\* ⟶ ^
= ⟶ ==|:= ⟶ =
\infin ⟶ \\infin§ ⟶ \\infty␣
方 ⟶ ([平立]方)(?=\w) ⟶ \1␣
# f^{-1}(x) is a function's value
^ ⟶ (?<![A-Za-z\\])([fghFGH]) ?\^ ?\{ ?- ?1 ?\} ?(?=\() ⟶ \1_{-1}
␣␣ ⟶ ␣ + ⟶ ␣"""
_CLEAN = []
for _row in _CLEAN_ROWS.replace("\n    ", "").split("\n")[1:]:
    if not _row.startswith("#"):
        _trigger, _pattern, _to = (part.strip(" ").replace("␣", " ") for part in _row.split("⟶"))
        _pattern = re.compile(_pattern.replace("§", "(?![a-zA-Z])"))
        _CLEAN.append((_trigger, _pattern, operator.methodcaller("expand", _to)))


@lru_cache(maxsize=1 << 14)
def clean(text: str) -> str:
    """The answer in one spelling: unicode to LaTeX, no layout, no math delimiters, no final full stop."""
    if not text.isascii():
        text = re.sub(r"(?<=\d) ?m(?=[²³](?! *[-+*=(]|\w))", r" \\text{m}", text)
        text = _SCRIPTS.sub(latex_script, text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    if "$" in text and len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        # pairs are math delimiters, a single one is money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"[\s~]+", " ", text)
    text = _FONTS.sub(as_text, _UNIT_VECTOR.sub(r" \3\4 ", text))
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # \\frac: escaped once too often
    for trigger, pattern, replacement in _CLEAN:
        if trigger in text:
            text = pattern.sub(replacement, text)
    text = text.strip().lstrip(",;: ")
    return text if text.endswith("...") else text.rstrip(" .,;:")


def as_text(match: re.Match) -> str:
    """\\mathrm{m\\,s^{-1}} is \\text{m\\,s^-1}: inside a text no braces are left."""
    return "\\text{" + re.sub(r"\{(-?\d)\}", r"\1 ", match[1][1:-1]) + "}" if match[1] else " "


def latex_script(match: re.Match) -> str:
    """Unicode superscripts and subscripts: x² is x^{2}."""
    return ("^" if match[1] else "_") + "{" + unicodedata.normalize("NFKC", match[0]) + "}"


def squeeze(text: str) -> str:
    """A cleaned answer without blanks (but those between two digits) and without text commands: the key of layer 1."""
    if "\\text" in text:
        text = re.sub(r"\\text *\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


class Token(NamedTuple):
    kind: str  # num, let (one letter), word, cmd, op, begin, end, eof
    text: str
    spaced: bool  # a blank comes before it


_TOKEN = r"""
(?P<space>\s*)(?: \\text\s*\{(?P<body>[^{}]*)\}
| \\(?P<env>begin|end)\s*\{(?P<name>array(?=\}\{)|[a-zA-Z]+)\*?\}((?<=array\})\{[lcr|\s]*\})?
| (?P<rep>\d*\.\d*(?:\\(?:overline|bar)\s*\{\d+\}|\\(?:overline|bar)\s*\d|\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?
          |\(\d+\)|(?<=\d)\.\.\.))
| (?P<num>SEPARATED(?=\d+[A-F])[0-9A-F]++(?=_\{?1[1-9])|\d+(?:\.\d+)?|\.\d+)
| \\(?P<cmd>[a-zA-Z]+|.) | (?P<word>[A-Za-z]+|[^\W\d_A-Za-z]+) | (?P<op><=|>=|!=|==|:=|\*\*|\.\.\.|\S))"""
_SEPARATED = r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?:\.\d+)?|"  # 1,200 is one number
_LEXERS = {
    separated: re.compile(_TOKEN.replace("SEPARATED", _SEPARATED if separated else ""), re.X | re.S)
    for separated in (True, False)
}


def aliases(table: str) -> dict[str, str]:
    """Rows `name: alias alias ...` as {alias: name}."""
    found = {}
    for row in table.strip().split("\n"):
        name, names = row.split(": ")
        found |= dict.fromkeys(names.split(), name)
    return found


# Operators and functions by the commands of LaTeX that mean them.
_OPERATORS = aliases(r"""
<=: le leq leqslant leqq
>=: ge geq geqslant geqq
!=: ne neq
<: lt
>: gt
in: in
~: approx simeq thickapprox doteq
=: equiv
cup: cup bigcup
cap: cap bigcap
*: cdot times ast
setminus: setminus backslash smallsetminus
/: div
±: pm
∓: mp
\{: lbrace {
\}: rbrace }
(: langle lparen lgroup
): rangle rparen rgroup
[: lbrack
]: rbrack
|: lvert rvert vert mid |
:: colon
£: pounds textsterling
and: land
or: lor
cr: \ cr newline
&: &
mod: mod pmod bmod
⌊: lfloor
⌋: rfloor
⌈: lceil
⌉: rceil""")
_FUNCTIONS = aliases("""
sin: sin
cos: cos
tan: tan tg
cot: cot ctg cotg
sec: sec
csc: csc cosec
cis: cis
asin: arcsin asin
acos: arccos acos
atan: arctan atan arctg
acot: arccot
asec: arcsec
acsc: arccsc
sinh: sinh
cosh: cosh
tanh: tanh
asinh: arcsinh asinh
acosh: arccosh acosh
atanh: arctanh atanh
ln: ln
log: log
lg: lg
exp: exp
gcd: gcd
lcm: lcm
max: max
min: min
sgn: sgn sign""")
# Words and letters with a meaning of their own.
_GREEK_NAMES = {*_GREEK.values(), *"pi varphi vartheta varepsilon ell hbar top".split()}
_CONNECTORS = aliases("""
and: and 和 与 且 и
or: or 或 或者 или""")
_BEFORE_WORD = set("begin word let num and or , ; = in ) }".split())
_BLANKS = {("cmd", value) for value in " '-/"}
_SHORT_WORDS = set("yes no odd the an not to per of one two six ten sq cu".split())


def tokenise(text: str, separated: bool, inside: Token | None = None) -> list[Token]:
    """Tokens of a cleaned answer. `inside`: the token before the \\text{...} whose words these are."""
    tokens: list[Token] = []
    for match in _LEXERS[separated].finditer(text):
        kind = match.lastgroup
        value = match[0].lstrip()
        spaced = bool(match["space"])
        before = tokens[-1] if tokens else inside
        if kind == "body":
            before = before or Token("begin", "", False)
            tokens += tokenise(match["body"].strip(), separated, before)
            continue
        if kind == "word":
            tokens += word_tokens(value, spaced, inside is not None, before)
            continue
        if match["env"]:
            kind = match["env"]
            value = match["name"]
        elif kind == "rep":
            kind = "num"
            value = str(repeating_decimal(value))
        elif kind == "num":
            value = value.replace(",", "")
        elif kind == "cmd":
            value = match["cmd"]
            if value in _OPERATORS:
                kind = "op"
                value = _OPERATORS[value]
        is_full_stop = value == "." and inside  # it ends an abbreviation
        if not is_full_stop and (kind, value) not in _BLANKS:
            tokens.append(Token(kind, value, spaced))
    return tokens


def word_tokens(run: str, spaced: bool, in_text: bool, before: Token | None) -> list[Token]:
    """A run of letters: a connector, a function, a constant, a word (unit, name, text) or a product of letters.

    Outside \\text{...} only known units, and longer runs with a vowel that do not stick to a number, are words.
    """
    low = run.lower()
    kind, previous = (before.kind, before.text) if before else ("begin", "")
    after_number = kind == "num" or previous in ") } ° % pi".split()
    if low in _CONNECTORS:
        return [Token("op", _CONNECTORS[low], spaced)]
    if run in _FUNCTIONS and not (low in UNITS and after_number):
        return [Token("cmd", run, spaced)]
    if run in "pi theta alpha beta sqrt infty".split() or low in ("infinity", "inf"):
        return [Token("cmd", "infty" if low[:3] == "inf" else run, spaced)]
    if low in ("nan", "zoo"):
        raise Unreadable  # not a number
    if len(run) == 1 and run.isascii():
        is_unit = (
            in_text and run in UNITS and (after_number or kind == "word" or previous in ("/", "*"))
        )
        return [Token("word" if is_unit else "let", run, spaced)]
    is_unit = (run in UNITS or low in UNITS) and (
        len(run) > 2 or after_number or kind == "word" or previous == "/"
    )
    if in_text or is_unit or not run.isascii() or low in _SHORT_WORDS or run == "DNE":
        return [Token("word", run, spaced)]
    apart = {kind, previous} & _BEFORE_WORD
    is_long = len(run) + after_number > 3 and (spaced or not after_number)
    if apart and is_long and any(letter in "aeiouy" for letter in run) and not run.isupper():
        return [Token("word", run, spaced)]
    if run[:-1] in _FUNCTIONS:  # sinx
        return [Token("cmd", run[:-1], spaced), Token("let", run[-1], False)]
    return [Token("let", letter, spaced and i == 0) for i, letter in enumerate(run)]


def repeating_decimal(text: str) -> Fraction:
    """0.1\\overline{6}, 0.\\dot{1}4\\dot{2}, 0.1(6), or 0.166...: dots repeat the digits that are there twice."""
    head, _, tail = text.partition(".")
    if tail.endswith("..."):
        digits = tail[:-3]
        period = next(
            (n for n in range(1, len(digits) // 2 + 1) if digits.endswith(2 * digits[-n:])), None
        )
        if period is None:
            raise Unreadable  # dots
        fixed = digits[:-period]
        block = digits[-period:]
    else:
        fixed = re.match(r"\d*", tail).group()
        block = "".join(re.findall(r"\d", tail[len(fixed) :]))
    repeated = Fraction(int(block), 10 ** len(fixed) * (10 ** len(block) - 1))
    return int(head or 0) + Fraction(int(fixed or 0), 10 ** len(fixed)) + repeated


# ----------------------------------------------------------------------------------------------------------------------
# Units: name -> (base, factor). Units of one base convert (75 cents = 0.75 dollars); units of different bases differ.

_UNIT_TABLE = """
m 1 m meter metre 米; m 1/100 cm centimeter centimetre 厘米; m 1/1000 mm millimeter millimetre 毫米;
m 1000 km kilometer kilometre 千米 公里; m 1/10 dm decimeter 分米; inch 1 in inch inches; inch 12 ft foot feet;
inch 36 yd yds yard; inch 63360 mi mile; g 1 g gram 克; g 1000 kg kgs kilogram 千克 公斤; g 1/1000 mg milligram;
tonne 1 tonne ton 吨; pound 1 lb lbs pound; pound 1/16 oz ounce; second 1 s sec second 秒; second 1/1000 ms millisecond;
second 60 min minute 分钟; second 3600 h hr hrs hour 小时; second 86400 day 天; second 604800 week; month 1 month;
month 12 year yr yrs 年; liter 1 l L liter litre 升; liter 1/1000 ml mL milliliter; gallon 1 gal gallon;
gallon 1/4 quart; gallon 1/8 pint; dollar 1 $ dollar usd buck; dollar 1/100 cent penny pennies ¢; euro 1 euro;
poundsterling 1 £; pence 1 pence; yuan 1 yuan 元 rmb; yen 1 ¥ yen; rupee 1 rupee rs; ruble 1 ruble; newton 1 N newton;
joule 1 J joule; watt 1 W watt; volt 1 V volt; ohm 1 ohm; hertz 1 Hz hertz; mole 1 mol mole; kelvin 1 K;
degreeC 1 degreeC; degreeF 1 degreeF; radian 1 rad radian; unit 1 unit; acre 1 acre; hectare 1 hectare; am 1 am;
pm 1 pm; watt 1000 kilowatt; m·second^-1 5/18 kmh kph; inch·second^-1 88/5 mph; ° 1 degree deg 度;
% 1 percent pct percentage"""
_FILLERS = set("of the in total different distinct possible such old long each".split())
UNITS: dict[str, tuple[str, Fraction]] = {}
for _row in _UNIT_TABLE.replace("\n", " ").split(";"):
    _base, _factor, *_names = _row.split()
    for _name in _names:
        UNITS[_name] = (_base.replace("·", " "), Fraction(_factor))
        if len(_name) > 2:
            UNITS[_name + "s"] = UNITS[_name]
# Words that multiply, raise or are a number.
_MULTIPLIERS = dict(dozen=12, hundred=100, thousand=1000, million=10**6)
_MULTIPLIERS |= dict(billion=10**9, trillion=10**12)
_POWERS = dict.fromkeys(("square", "sq", "平方"), 2) | dict.fromkeys(("cubic", "cu", "立方"), 3)
_NUMERALS = {
    word: i
    for i, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
}
_NUMERALS |= {
    word: 10 * i
    for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}


def singular(word: str) -> str:
    word = word.lower()
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


# Things that answers count. Any other word after a number may change it (5 thousandths, 5 halves): it is no unit.
_COUNTED = set(
    map(
        singular,
        """
    apple arrangement ball banana basket bead bill bird block board book bottle bouquet box boxes boy brick bus buses
    cake camel candies candy car card cat chair child children choice circle city cities class classes code coin color
    combination cookie cow customer cyclist digit dog donkey door dot edge egg element employee equation face fish
    flag flower friend frog function game girl goal graph group guest handshake hexagon horse house integer
    intersection item jar key kid knight lap leaf leaves letter line lion marble match matches member men minivan
    mouse move number nut object orange ordering outcome page painting panda parallelogram path peach peaches pear pen
    pencil pentagon people permutation person piece pig pizza plant plate player point polygon polynomial possibility
    possibilities problem quadrilateral queen question rabbit rectangle region ring rod room rope rose row school seat
    segment sequence shape sheep shelf shelves shirt side slice sock soldier solution step stick sticker story stories
    student subset symbol table teacher team term ticket tile toy train tree triangle trip truck tuple value vertex
    vertices visitor vote voter wagon wall way weighing wheel win window woman women word worker
    个 人 种 名 只 条 本 次 分 岁 块""".split(),
    )
)

# ----------------------------------------------------------------------------------------------------------------------
# Parser: the grammar of answers. A node is a tuple (kind, ...); every kind is made in exactly one place below.
#   num Fraction | sym name | add items | mul items | pow base exponent | fn name args | call name args | pm sign node
#   deg node | pct node | unit node base factor | sum/prod low high body | matrix rows | list items joiner | set items
#   tuple open close items | rel operators items | ratio items | based digits base | cup/cap/setminus a b | where items
#   builder template conditions joiner | text words | choice letter node

_ONE = Fraction(1)
_CALLS = set("fghpqrstuvwFGHPQRSTUVWNEL")  # before a bracket these may be functions
_OPENERS = "( [ { \\{ ... ⌊ ⌈".split()
_ANGLES = "sin cos tan cot sec csc cis".split()  # functions of angles
_OPAQUE = set("fghFGH")  # f(x) is never f times x
_RELATIONS = "= < > <= >= != ~ in mod".split()
_CLOSERS = ") ] \\} } & cr".split()
# What reads an atom, by the kind of its first token or, of an operator, by its text.
_READERS = aliases(r"""
numeral: num
symbol: let
command: cmd
environment: begin
bracket: ( [ {
braces: \{
fence: | ⌊ ⌈""")
_MATRICES = set("pmatrix bmatrix matrix array Bmatrix smallmatrix".split())
_NUMBER_SETS = dict(zip("RNZQC", "ℝℕℤℚℂ"))
_MARKS = set("angle triangle odot overline overrightarrow widehat tilde".split())


def number(value):
    return ("num", Fraction(value))


# Nodes that are asked for by name.
_MINUS_ONE = number(-1)
_SIGNS = (number(1), _MINUS_ONE)
_INFINITY = ("sym", "∞")
_REALS = ("sym", "ℝ")
_UNWRITTEN = ("sym", "?")  # the unknown of "> 5"


# Texts that mean a set, or that nothing exists; singular, without articles.
_PHRASES = dict.fromkeys(("no solution", "no real solution"), ("set", ()))
_PHRASES |= dict.fromkeys(("all real number", "all real", "any real number"), _REALS)
_PHRASES["doe not exist"] = ("text", "dne")


def negative(node):
    if node[0] == "num":
        return ("num", -node[1])
    return ("based", "-" + node[1], node[2]) if node[0] == "based" else ("mul", (_MINUS_ONE, node))


def equation(left, right):
    return ("rel", ("=",), (left, right))


def point(items):
    return ("tuple", "(", ")", tuple(items))


def reciprocal(node):
    return ("num", 1 / node[1]) if node[0] == "num" and node[1] else ("pow", node, _MINUS_ONE)


def written_out(items):
    """1, 2, ..., 5 is 1, 2, 3, 4, 5. Of 1, 2, ..., n the first terms that show the step stay."""
    dots = ("sym", "...")
    head = items[:-2]
    is_row = len(items) > 2 and items[-2] == dots and {item[0] for item in head} == {"num"}
    if not is_row:
        return items
    first = head[0][1]
    step = head[1][1] - first if len(head) > 1 else _ONE
    if any(item[1] != first + i * step for i, item in enumerate(head)) or not step:
        return items
    if items[-1][0] != "num":
        return [*head[: 1 if step == 1 else 2], dots, items[-1]]
    count = (items[-1][1] - first) / step + 1
    if count.denominator > 1 or not len(head) < count <= MAX_DOTS:
        return items
    spend(5 * count)
    return [number(first + i * step) for i in range(int(count))]


def congruences(items):
    """x = 1, 4 (mod 5), read item by item, is x = 1 (mod 5), x = 4 (mod 5)."""
    first = items[0]
    last = items[-1]
    if len(items) < 2 or first[:2] != ("rel", ("=",)) or last[:2] != ("rel", ("mod",)):
        return items
    values = [first[2][1], *items[1:-1], last[2][0]]
    return [("rel", ("=", "mod"), (first[2][0], value, last[2][1])) for value in values]


def limited(method):
    """Every cycle of the recursion below passes through one of these methods."""

    def inside(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable  # nested too deep
        spend(5)
        node = method(self)
        self.depth -= 1
        return node

    return inside


class Parser:
    """Recursive descent over the tokens of one answer. Raises Unreadable where the grammar of answers ends."""

    def __init__(self, tokens):
        self.tokens = tokens + [Token("eof", "", False)] * 8
        self.at = 0
        self.depth = 0
        self.bars = False  # inside |...| or {... | ...}: a bar ends what came before
        self.in_set = False  # inside {...}: a colon, too
        self.currency: str | None = None  # seen in the quantity that is being read
        self.has_points = False  # after B(0, 4) C(5, 3) is a point

    @property
    def next(self):
        return self.tokens[self.at]

    def peek(self, ahead):
        return self.tokens[self.at + ahead]

    def is_op(self, *texts: str):
        token = self.tokens[self.at]
        return token.kind == "op" and token.text in texts

    def take(self, *texts: str):
        """The next token if it is one of these operators; any token if none is named."""
        token = self.next
        if texts and not self.is_op(*texts):
            return None
        if token.kind == "eof":
            raise Unreadable  # it breaks off
        self.at += 1
        return token

    def need(self, *texts: str):
        token = self.take(*texts)
        if token is None:
            raise Unreadable  # another token was expected
        return token

    # answers: lists, relations, sets

    def answer(self):
        node = self.items()
        if self.next.kind != "eof":
            raise Unreadable  # something is left over
        return node

    def items(self):
        """Items between commas, 'and', 'or'; groups of them between semicolons. One item stands for itself."""
        groups = [[]]
        joiner = ","
        while True:
            groups[-1].append(self.relation())
            separators = [self.take().text] if self.is_op(",", ";", "and", "or") else []
            while separators and self.is_op("and", "or"):  # ", and" is one
                separators.append(self.take().text)
            if not separators or self.next.kind in ("eof", "end") or self.is_op(*_CLOSERS):
                break
            joiner = separators[-1] if separators[-1] in ("and", "or") else joiner
            if ";" in separators:
                groups.append([])
        if len(groups) > 1:
            groups = [[group[0] if len(group) == 1 else point(group) for group in groups]]
        items = congruences(written_out(groups[0]))
        return items[0] if len(items) == 1 else ("list", tuple(items), joiner)

    def relation(self):
        operators = []
        sides = [
            _UNWRITTEN if self.is_op(*_RELATIONS) else self.ratio()
        ]  # "> 5": the unknown is not written
        while self.is_op(*_RELATIONS):
            operators.append(self.take().text)
            sides.append(self.ratio())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def ratio(self):
        parts = [self.union()]
        while (
            self.is_op(":")
            and not self.in_set
            or self.next.text == "to"
            and self.peek(1).kind == "num"
        ):
            self.take()
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else ("ratio", tuple(parts))

    def union(self):
        node = self.quantity()
        while self.is_op("cup", "cap", "setminus"):
            self.depth += 1  # the tree of a chain is deep
            operator = self.take().text
            node = (operator, self.as_set(node), self.as_set(self.quantity()))
        return node

    @staticmethod
    def as_set(node):
        """Beside a union sign {1, 2} and 3 mean sets."""
        return (
            ("set", node[1] if node[0] == "list" else (node,))
            if node[0] in ("list", "num")
            else node
        )

    # quantities and texts

    def quantity(self):
        """An expression with its unit (currency may come before or after it), or words."""
        if self.next.kind == "word" and not (self.depth and self.next.text.isupper()):
            return self.words()
        self.currency = None
        node = self.expression()
        if self.is_op(*"$€£¥¢"):
            self.currency = self.take().text
        base = ""
        factor = _ONE
        count = 1
        if self.next.kind == "word" and self.next.text != "to":
            base, factor, count = self.unit()
        node = node if count == 1 else ("mul", (number(count), node))  # 5 million
        if self.currency and base not in ("°", "%"):
            money = UNITS.get(self.currency, (self.currency, _ONE))
            if (base, factor) != money:  # $5 profit, $5 per hour; but $5 dollars is $5
                base = f"{money[0]} {base}".strip()
                factor *= money[1]
        if base in ("°", "%"):
            return ("deg" if base == "°" else "pct", node)
        if base and self.next.kind == "num":  # 2 hours 30 minutes
            rest = self.quantity()
            if rest[0] != "unit" or rest[2] != base or rest[3] >= factor:
                raise Unreadable  # two quantities
            node = ("add", (("mul", (number(factor), node)), ("mul", (number(rest[3]), rest[1]))))
            factor = _ONE
        return ("unit", node, base, factor) if base else node

    def unit(self):
        """The words after a number: ('m^2', 1/10000, 1) for square centimetres, ('yuan', 1, 1000) for thousand yuan.

        An unknown word is a unit of its own, marked by a question mark: it is never left out.
        """
        parts = []
        factor = _ONE
        count = 1
        sign = 1
        power = 1
        while True:
            if self.next.kind != "word":
                next_is_unit = self.peek(1).kind == "word" or self.peek(1).text in UNITS
                if not (parts and next_is_unit and self.is_op("/", "*", "-")):
                    return " ".join(parts), factor, count
                sign = -1 if self.take().text == "/" else 1
                self.tokens[self.at] = self.next._replace(kind="word")  # the h of km/h
                continue
            token = self.take()
            word = token.text if token.text in UNITS else token.text.lower()
            is_after_unit = parts or self.currency  # $5 per hour
            if word in _POWERS:
                power = _POWERS[word]
            elif is_after_unit and word in ("per", "a", "an"):
                sign = -1
            elif not parts and word in _MULTIPLIERS:
                count *= _MULTIPLIERS[word]
            elif word not in _FILLERS or word == "in" and not is_after_unit:
                one = singular(word)
                base, scale = UNITS.get(word) or (
                    one if one in _COUNTED else f"?{one}",
                    _ONE,
                )
                if self.take("^"):
                    exponent = ("-" if self.take("-") else "") + self.raw_group().strip("{}")
                    if not re.fullmatch("-?[123]", exponent):
                        raise Unreadable  # power of a unit
                    power = int(exponent)
                factor *= scale ** (sign * power)
                parts.append(base if sign * power == 1 else f"{base}^{sign * power}")
                sign = power = 1

    def words(self):
        """A text: lower case, singular, no articles. Some texts are numbers (five) or choices (option C)."""
        words: list[str] = []
        while self.next.kind in ("word", "let", "num") or self.is_op("-", "'", "/") and words:
            token = self.take()
            if token.kind != "op":
                words.append(token.text.lower() if token.kind == "word" else token.text)
        words = [word for word in words if word not in "a an the of".split()] or words
        if len(words) > MAX_WORDS:
            raise Unreadable  # prose
        values = [_NUMERALS.get(word, -1) for word in words]
        if (
            len(values) == 1
            and values[0] >= 0
            or len(values) == 2
            and values[0] >= 20
            and 0 < values[1] < 10
        ):
            return number(sum(values))  # five, forty-two
        if re.fullmatch("(?:option|choice|answer|选项|选) [A-J]", " ".join(words)):
            return ("sym", words[1])
        text = " ".join(map(singular, words))
        return _PHRASES.get(text, ("text", text))

    # expressions

    def expression(self):
        terms = [self.term()]
        while self.is_op("+", "-", "±", "∓"):
            terms.append(self.term())  # term() reads the sign
        return terms[0] if len(terms) == 1 else ("add", tuple(terms))

    @limited
    def term(self):
        """Factors joined by *, / or by standing side by side. Signs bind looser: -x^2 is -(x^2)."""
        sign = self.take("+", "-", "±", "∓")
        if sign:
            node = self.term()
            if sign.text in "±∓":
                return ("pm", 1 if sign.text == "±" else -1, node)
            return negative(node) if sign.text == "-" else node
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

    def signed_power(self):
        return negative(self.power()) if self.take("-") else self.power()

    def starts_factor(self):
        """May the next token begin a factor without a sign before it? A number after a number only in 2^6 3^5."""
        token = self.next
        before = self.tokens[self.at - 1]
        if token.kind == "num" and before.kind == "num":
            return self.tokens[self.at - 2].text == "^" == self.peek(1).text
        if token.kind == "num":
            return before.text not in ("%", "°")
        if token.text == "{" and before.kind == "num" and self.peek(1).kind == "num":
            return False  # 5{6}
        return (
            token.kind in ("let", "begin", "cmd")
            or self.is_op(*_OPENERS)
            or self.is_op("|")
            and not self.bars
        )

    def power(self):
        node = self.postfix(self.atom())
        if not self.take("^"):
            return node
        exponent = self.exponent()
        if node[0] in ("matrix", "tuple") and exponent in (("sym", "T"), ("sym", "\\top")):
            rows = node[1] if node[0] == "matrix" else (node[3],)
            return ("matrix", tuple(zip(*rows)))
        return self.postfix(("pow", node, exponent))

    @limited
    def exponent(self):
        """A group, or a signed power: x^-1, x^10, and 2^3^2 from the right."""
        if self.is_op("{"):
            return self.atom()
        if self.is_op("-") or self.next.kind == "num":
            return self.signed_power()
        return self.postfix(self.atom())

    def postfix(self, node):
        for _ in range(4):
            sign = self.take("!", "%", "°")
            if sign is None:
                return node
            if sign.text == "!":
                node = ("fn", "fac2" if self.take("!") else "factorial", (node,))
            else:
                node = ("pct" if sign.text == "%" else "deg", node)
        raise Unreadable  # too many signs

    # atoms

    @limited
    def atom(self):
        token = self.take()
        reader = _READERS.get(token.text if token.kind == "op" else token.kind)
        if reader:
            return getattr(self, reader)(token.text)
        if (
            token.kind == "word" and token.text.isascii() and token.text.isupper()
        ):  # segments that look like words: NO
            return ("mul", tuple(("sym", letter) for letter in token.text))
        if token.kind == "op" and token.text == "...":
            return ("sym", "...")
        if token.kind == "op" and token.text in "$€£¥":
            self.currency = token.text
            return self.signed_power()
        raise Unreadable  # no formula

    def numeral(self, text):
        """A number, a mixed number (3\\frac12, 3 1/2) or a number in another base (12_5)."""
        if self.take("_"):
            base = self.raw_group().strip("{()}").removeprefix("base")
            base = str(_NUMERALS.get(base.lower(), base))
            if not re.fullmatch(r"\d{1,2}", base) or "/" in text:
                raise Unreadable  # base of a numeral
            return number(text) if base == "10" else ("based", text.lstrip("0") or "0", int(base))
        start = self.at
        parts = None
        token = self.next
        if text.isdigit() and (token.kind, token.text) == ("cmd", "frac"):
            self.take()
            parts = self.argument(), self.argument()
        elif (
            text.isdigit()
            and token.spaced
            and token.kind == self.peek(2).kind == "num"
            and self.peek(1).text == "/"
        ):
            parts = number(self.next.text), number(self.peek(2).text)
            self.at += 3
        if parts and parts[0][0] == parts[1][0] == "num" and 0 < parts[0][1] < parts[1][1]:
            return number(int(text) + parts[0][1] / parts[1][1])
        self.at = start
        return number(int(text) if text.isdecimal() else text)

    def raw_group(self):
        """The text of a subscript: one token or a braced group, unparsed."""
        text = ""
        level = 0
        while True:
            token = self.take()
            level += (token.text == "{") - (token.text == "}")
            text += token.text
            if level <= 0:
                return text

    def symbol(self, name):
        """A letter with its subscript and primes; a letter before a bracket may be a function: f(x)."""
        if self.take("_"):
            name += "_" + self.raw_group().removeprefix("{").removesuffix("}")
        while self.take("'"):
            name += "'"
        if not self.is_op("(") or name[0] not in _CALLS and not name[0].isupper():
            return ("sym", name)
        inside = self.bracket(self.take().text)
        arguments = inside[3] if inside[0] == "tuple" else (inside,)
        if name == "C" and len(arguments) == 2 and not self.has_points:  # and so is C(5, 2)
            return ("fn", "binom", arguments)
        self.has_points |= name == "B" and len(arguments) > 1
        is_call = name[0] in _CALLS or len(arguments) > 1
        return ("call", name, arguments) if is_call else ("mul", (("sym", name), inside))

    def enclosed(self, in_set=False):
        """What stands between brackets: bars and colons outside do not matter inside."""
        outer = self.bars, self.in_set
        self.bars = self.in_set = in_set
        node = self.items()
        self.bars, self.in_set = outer
        return node

    def argument(self):
        """The argument of \\frac, \\binom or \\log_: a group, or one digit of a longer number as TeX reads it."""
        token = self.next
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.at] = token._replace(text=token.text[1:])
            return number(token.text[0])
        return negative(self.atom()) if self.take("-") else self.atom()

    def bracket(self, opening):
        """After '(' or '[': a group, or a tuple, point or interval with its brackets as written.

        After '{' of LaTeX: one item, or a plain list ({1,2} is often meant as the set).
        """
        node = self.enclosed()
        closing = self.need(*("}" if opening == "{" else ")]")).text
        return (
            ("tuple", opening, closing, node[1]) if node[0] == "list" and opening != "{" else node
        )

    def braces(self, _opening):
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
        template = node[2][0] if node[0] == "rel" and node[1] == ("in",) else node
        if template[0] != "sym" or not any(template in walk(part) for part in conditions):
            return ("builder", node, conditions, joiner)  # {x^2 : x > 3}: what is collected matters
        if node[0] == "rel" and node[2][-1] != _REALS:
            if joiner == "or":
                raise Unreadable  # a condition that binds on both sides of 'or'
            conditions = (node,) + conditions
        return ("where", conditions, joiner)

    def fence(self, opening):
        """|x|, floor and ceiling."""
        closing, name = {"|": ("|", "abs"), "⌊": ("⌋", "floor"), "⌈": ("⌉", "ceil")}[opening]
        outer = self.bars
        self.bars = opening == "|"
        node = self.expression()
        self.need(closing)
        self.bars = outer
        return ("fn", name, (node,))

    def environment(self, name):
        """A matrix, a list (the lines of `aligned`) or a set (value and condition of `cases`)."""
        lines = name in "cases aligned align gathered".split()
        if not lines and name not in _MATRICES:
            raise Unreadable  # an unknown environment
        rows = [[]]
        while self.next.kind != "end":
            if name in ("aligned", "align") and not rows[-1]:
                self.take("&")
            rows[-1].append(self.enclosed())
            if self.take("cr"):
                rows.append([])
            elif not self.take("&") and self.next.kind != "end":
                raise Unreadable  # no matrix
        self.take()
        rows = tuple(tuple(row) for row in rows if row)
        if len({len(row) for row in rows}) != 1:
            raise Unreadable  # ragged matrix
        if not lines:
            return ("matrix", rows)
        if name == "cases" and len(rows[0]) == 2:
            return ("set", tuple(point(row) for row in rows))
        items = tuple(item for row in rows for item in row)
        return items[0] if len(items) == 1 else ("list", items, ",")

    def command(self, name):
        if name == "frac":
            top = self.argument()
            over = reciprocal(self.argument())
            return ("num", top[1] * over[1]) if top[0] == over[0] == "num" else ("mul", (top, over))
        if name == "sqrt":
            degree = number(2)
            if self.take("["):
                degree = self.expression()
                self.need("]")
            inside = self.atom()
            return ("pow", inside, reciprocal(degree))
        if name == "binom":
            return ("fn", name, (self.argument(), self.argument()))
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if name in ("sum", "prod"):  # read, but not evaluated
            self.need("_")
            low = self.atom()
            self.need("^")
            return (name, low, self.exponent(), self.term())
        if name == "emptyset":
            return ("set", ())
        if name in _NUMBER_SETS and not self.is_op("^", "_"):
            return ("sym", _NUMBER_SETS[name])
        if name in _MARKS:  # \overline{AB}, \angle ABC
            letters = self.raw_group().strip("{}")
            while (
                name in ("angle", "triangle", "odot")
                and self.next.kind == "let"
                and self.next.text.isupper()
            ):
                letters += self.take().text
            return ("sym", f"{name} {letters}")
        if name == "infty" or name in _GREEK_NAMES:
            return self.symbol({"infty": "∞", "pi": "π"}.get(name, f"\\{name}"))
        raise Unreadable  # an unknown command

    def function(self, name):
        """sin x, sin^2 x, sin^{-1} x, log_2 x, max(a, b). Without brackets the argument ends at + or at a function."""
        base = power = None
        while self.is_op("_", "^"):
            if self.take("^"):
                power = self.exponent()
            elif name == "log" and self.take("_"):
                base = self.atom() if self.next.text == "10" else self.argument()
            else:
                raise Unreadable  # a subscript
        if self.is_op("(", "[", "{", "\\{"):
            inside = self.atom()
            arguments = (
                inside[3]
                if inside[0] == "tuple"
                else inside[0] in ("list", "set") and inside[1] or (inside,)
            )
        else:
            negated = bool(self.take("-"))
            factors = [self.power()]
            while (
                self.starts_factor()
                and self.next.text not in _FUNCTIONS
                and not self.is_op("(", "[")
            ):
                factors.append(self.power())
            argument = factors[0] if len(factors) == 1 else ("mul", tuple(factors))
            arguments = (negative(argument) if negated else argument,)
        if power == _MINUS_ONE and "a" + name in _FUNCTIONS.values():
            name = "a" + name
            power = None
        node = ("fn", name, arguments + ((base,) if base else ()))
        return node if power is None else ("pow", node, power)


# ----------------------------------------------------------------------------------------------------------------------
# Values: exact fractions as long as possible, else as many digits as it takes to tell two values apart (`same_number`)

_HUGE = 10**30  # beyond it, powers and functions are not evaluated


@lru_cache(maxsize=64)
def arithmetic(digits):
    context = mpmath.MPContext()
    context.dps = digits
    return context


_MP = arithmetic(140)


class Scope(NamedTuple):
    """What an evaluation needs: the arithmetic, the values of the unknowns, and how to read three notations."""

    env: dict
    mp: mpmath.MPContext = _MP
    degree: bool = True  # 30° is pi/6 (else 30)
    percent: bool = True  # 25% is 1/4 (else 25)
    log10: bool = False  # log is decimal (else natural)
    real: bool = False  # roots and logarithms of negative numbers are undefined
    largest: list | None = (
        None  # [bits before or after the point of the largest or smallest value met]
    )


def is_exact(value):
    return type(value) is Fraction


def to_mp(value, mp=_MP):
    return mp.mpf(value.numerator) / value.denominator if is_exact(value) else mp.convert(value)


def bits(value):
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def exact(value):
    size = bits(value)
    if size > MAX_BITS:
        raise TooBig  # digits
    spend((size / 2000) ** 2)
    return value


def combined(operation, a, b, mp=_MP):
    if is_exact(a) and is_exact(b):
        return exact(operation(a, b))
    spend(mp.dps / 25)
    return operation(to_mp(a, mp), to_mp(b, mp))


plus = partial(combined, operator.add)
times = partial(combined, operator.mul)


def raised(a, b, mp):
    """a to the b. Odd roots of negative numbers are real, as schools write them: (-8)^{1/3} = -2."""
    if not a:
        if mp.re(to_mp(b, mp)) > 0:
            return Fraction(0)
        raise Undefined  # 0 to the power 0 or below
    root = b.denominator if is_exact(b) else 0
    if root == 1:
        b = b.numerator
    if abs(b) > _HUGE:
        raise TooBig  # exponent
    if root == 1:
        if is_exact(a) and (bits(a) - 1) * abs(b) <= MAX_BITS:
            return exact(a**b)
        return to_mp(a, mp) ** b
    if root % 2 and is_real(a) and mp.re(to_mp(a, mp)) < 0:
        value = raised(-a, b, mp)
        return -value if b.numerator % 2 else value
    spend(mp.dps / 2 if root == 2 else mp.dps**1.5 / 10)
    if abs(b) * scale(a, mp) > _HUGE:
        raise TooBig  # power
    return to_mp(a, mp) ** to_mp(b, mp)


def is_real(value):
    return is_exact(value) or abs(_MP.im(value)) <= abs(_MP.re(value)) * 1e-40


def scale(value, mp):
    """How many bits a value is away from the point, to the left or to the right."""
    if is_exact(value):
        return abs(value.numerator.bit_length() - value.denominator.bit_length())
    magnitude = mp.mag(value)
    if magnitude == mp.inf or magnitude != magnitude:
        raise Undefined  # infinite
    return 0 if magnitude == mp.ninf else abs(magnitude)


def evaluate(node, s):
    """The value of an expression, a Fraction, mpf or mpc; Undefined if it has none."""
    kind = node[0]
    mp = s.mp
    if kind == "num":
        return node[1]
    if kind == "sym" and node[1] in s.env:
        return s.env[node[1]]
    if kind == "sym" and node[1] in ("π", "e", "i"):
        return {"π": mp.pi, "e": mp.e, "i": mp.j}[node[1]] * 1
    spend(1)
    if kind in ("add", "mul"):
        spend(3 * len(node[1]))
        join = plus if kind == "add" else times
        value, *others = [evaluate(item, s) for item in node[1]]
        for other in others:
            value = join(value, other, mp)
    elif kind == "pow":
        value = raised(evaluate(node[1], s), evaluate(node[2], s), mp)
    elif kind == "fn":
        value = apply(node[1], [evaluate(argument, s) for argument in node[2]], s)
    elif kind == "call":
        value = call(node, s)
    elif kind in ("deg", "pct", "unit"):
        read_as = {
            "deg": s.degree and mp.pi / 180,
            "pct": s.percent and Fraction(1, 100),
            "unit": node[-1],
        }[kind]
        value = times(evaluate(node[1], s), read_as or _ONE, mp)
    else:
        raise Undefined  # it has no value
    if not is_exact(value):
        spend(mp.dps / 30)
        if s.real and not is_real(value):
            raise Undefined  # not real
    if s.largest is not None:
        size = scale(value, mp)
        is_rounded_zero = (
            size > 2.5 * mp.dps and abs(value) < 1 and kind not in ("mul", "pow")
        )  # sin(pi)
        if size > s.largest[0] and not is_rounded_zero:
            s.largest[0] = size
    return value


def call(node, s):
    """f(x) of an unknown function gets a value that depends on its name and arguments only; a(b+c) is a product."""
    arguments = [evaluate(argument, s) for argument in node[2]]
    if is_product(node):
        return times(evaluate(("sym", node[1]), s), arguments[0], s.mp)
    key = node[1] + repr([s.mp.nstr(to_mp(a, s.mp), 12) for a in arguments])
    return Fraction(random.Random(key).randrange(1, 10**6), 99_991)


def is_product(node):
    """p(q+1) may be a product; f(x) and P(0) are not."""
    return node[1][0] not in _OPAQUE and len(node[2]) == 1 and bool(unknowns(node[2][0]))


def apply(name, arguments, s):
    """A named function. Arguments so large that reducing them would take long are refused."""
    mp = s.mp
    x = arguments[0]
    if any(abs(a) > _HUGE for a in arguments) and name not in ("abs", "max", "min"):
        raise TooBig  # argument
    real = all(map(is_real, arguments))
    integers = all(is_exact(a) and a.denominator == 1 for a in arguments)
    if name in ("gcd", "lcm") and integers:
        function = getattr(math, name)
        return reduce(lambda u, v: exact(Fraction(function(int(u), int(v)))), arguments)
    if name in ("max", "min") and real:
        spend(5 * len(arguments))
        return (max if name == "max" else min)(arguments, key=lambda a: mp.re(to_mp(a, mp)))
    if name == "binom" and len(arguments) == 2:
        if integers and 0 <= x <= MAX_FACTORIAL and arguments[1] >= 0:
            return exact(Fraction(math.comb(int(x), int(arguments[1]))))
        if real and all(abs(a) < 10**6 for a in arguments):
            spend(5000)
            return mp.binomial(*(to_mp(a, mp) for a in arguments))
    if name == "log" and len(arguments) == 2 and arguments[1] not in (0, 1):
        return apply("ln", [x], s) / apply("ln", [arguments[1]], s)
    is_reals_only = name in ("sgn", "floor", "ceil") and not real
    if len(arguments) != 1 or is_reals_only or name in "gcd lcm max min binom".split():
        raise Undefined  # no such function
    if name == "abs":
        return abs(x)
    if name == "sgn":
        return Fraction(int(mp.sign(mp.re(to_mp(x, mp)))))
    if name in ("floor", "ceil") and is_exact(x):
        return Fraction(getattr(math, name)(x))
    if name in ("floor", "ceil"):
        near = mp.nint(mp.re(x))  # sqrt(2)^2 is 2 but for rounding
        is_near = abs(x - near) <= mp.mpf(10) ** (-(mp.dps + 20) // 2)
        return Fraction(int(near if is_near else getattr(mp, name)(mp.re(x))))
    if name in ("factorial", "fac2") and integers and x <= MAX_FACTORIAL:
        if x < 0:
            raise Undefined  # factorial of a negative number
        is_single = name == "factorial"
        product = math.factorial(int(x)) if is_single else math.prod(range(int(x), 0, -2))
        return exact(Fraction(product))
    spend(mp.dps**1.5 / 15)
    if name in ("ln", "log", "lg"):
        if x == 0:
            raise Undefined  # log 0
        return mp.log(to_mp(x, mp)) / (
            mp.log(10) if name == "lg" or name == "log" and s.log10 else 1
        )
    if name in "exp sinh cosh tanh".split() and s.largest is not None:  # tanh is 1 but for exp(-2x)
        s.largest[0] = max(s.largest[0], int(3 * abs(x)))
    if name in ("factorial", "fac2"):
        spend(mp.dps**1.5 * 5)
    try:
        return getattr(mp, {"cis": "expj"}.get(name, name))(to_mp(x, mp))
    except (ZeroDivisionError, ValueError):  # a pole
        raise Undefined from None


def same_number(a, b, s):
    """Have two expressions the same value here? Undefined or TooBig if nothing can be said.

    Fractions are compared exactly. Other values get more digits than a coincidence can hide: it takes long numbers in
    the expressions, or large (or small) values on the way. To 90 digits sqrt(10^100 + 1) is 10^50, and the 10^100 says
    that this may be so; cos(10^-60) is 1 to 120. What 4,000 digits cannot tell stays unknown.
    """
    digits = _MP.dps
    while digits <= (MAX_DIGITS_AT_POINTS if s.env else MAX_DIGITS):
        at = s._replace(mp=arithmetic(digits), largest=[0])
        x = evaluate(a, at)
        y = evaluate(b, at)
        if is_exact(x) and is_exact(y):
            return x == y
        hidden = int((written(a) + written(b) + at.largest[0]) * 0.302) + 1
        x = to_mp(x, at.mp)
        y = to_mp(y, at.mp)
        gap = abs(x - y)
        size = max(abs(x), abs(y))
        needed = 60 + 4 * hidden
        if needed <= digits:
            return gap <= at.mp.mpf(10) ** -(3 * hidden + 40)
        if hidden <= 40 and gap > size * 1e-5 and size > 1e-20:
            return False
        digits = needed // 50 * 50 + 50
    raise TooBig  # digits


# ----------------------------------------------------------------------------------------------------------------------
# Trees

_KINDS = set(
    "num sym add mul pow fn call pm deg pct unit sum prod matrix list set tuple rel ratio based "
    "cup cap setminus where builder text choice".split()
)


def mapped(part, change):
    """A copy of a node (or of a tuple of nodes) with `change` applied to its direct children."""

    if part[0] in ("num", "sym"):
        return part

    def visit(item):
        if not isinstance(item, tuple):
            return item
        return (
            change(item)
            if item and isinstance(item[0], str) and item[0] in _KINDS
            else tuple(map(visit, item))
        )

    return part[:1] + tuple(map(visit, part[1:]))


@lru_cache(maxsize=1 << 14)
def walk(node):
    """The node and all nodes below it."""
    found = [node]
    for part in found:
        mapped(part, found.append)
    return tuple(found)


def children(node):
    """The nodes right below, without factors of 1 and -1."""
    found = []
    mapped(node, found.append)
    return tuple(child for child in found if node[0] != "mul" or child not in _SIGNS)


@lru_cache(maxsize=1 << 14)
def canonical(node):
    """The tree with flat, sorted sums, products and sets: equal for two answers that differ only in such order."""
    node = mapped(node, canonical)
    if node[0] in ("add", "mul"):
        items = [part for item in node[1] for part in (item[1] if item[0] == node[0] else (item,))]
        neutral = number(node[0] == "mul")  # 0 + x, 1 x
        items = [item for item in items if item != neutral] or items[:1]
        return (node[0], tuple(sorted(items, key=repr))) if len(items) > 1 else items[0]
    if node[0] in ("sum", "prod") and node[1][0] == "rel":  # the index has no name
        index = re.escape(node[1][2][0][1])
        fresh = f"#{sum(part[0] == node[0] for part in walk(node))}"
        names = {part[1] for part in walk(node) if part[0] == "sym"}
        return substituted(
            node,
            {name: ("sym", re.sub(rf"^{index}$|(?<=_){index}$", fresh, name)) for name in names},
        )
    return ("set", tuple(sorted(node[1], key=repr))) if node[0] == "set" else node


@lru_cache(maxsize=1 << 14)
def unknowns(node):
    """The names without a fixed value."""
    names = {n[1] for n in walk(node) if n[0] == "sym" or n[0] == "call" and is_product(n)}
    return frozenset(names - {"π", "e", "i", "∞"})


def written(node):
    """The bits of the numbers in an expression."""
    return sum(bits(n[1]) for n in walk(node) if n[0] == "num")


@lru_cache(maxsize=1 << 14)
def kinds_in(node):
    return frozenset(n[0] for n in walk(node))


def has(node, *kinds: str):
    return not kinds_in(node).isdisjoint(kinds)


def substituted(node, values):
    if node[0] == "sym":
        return values.get(node[1], node)
    return mapped(node, lambda child: substituted(child, values))


def variants(node):
    """An expression with plus-minus signs stands for its two values; all its signs go together."""
    if not has(node, "pm"):
        return [node]

    def pick(part, sign):
        if part[0] == "pm":
            inner = pick(part[2], sign)
            return inner if part[1] == sign else negative(inner)
        return mapped(part, lambda child: pick(child, sign))

    return [pick(node, 1), pick(node, -1)]


_ALGEBRA = set("num sym add mul pow".split())
_SETS = set("set cup cap setminus sum prod".split())


def is_harmless(base, exponent):
    """A power of a number that is not 0, and a power above 0, have a value."""
    return exponent[0] == "num" and (base[0] == "num" and base[1] or exponent[1] > 0)


def is_defined(tree):
    """Has every expression of the tree a value somewhere? 1/0 has none, and is no answer."""
    if tree[0] in ("num", "sym", "text") or tree == negative(_INFINITY):
        return True
    nodes = walk(tree)
    kinds = {node[0] for node in nodes}
    if kinds <= _ALGEBRA and _INFINITY not in nodes:
        if all(is_harmless(*node[1:]) for node in nodes if node[0] == "pow"):
            return True
    if tree[0] not in "add mul pow fn pm".split() or kinds & {"matrix", "tuple"}:
        return all(map(is_defined, children(canonical(tree) if kinds & {"sum", "prod"} else tree)))
    if kinds & _SETS:
        return True
    names = sorted(unknowns(tree))
    rng = random.Random(1)
    for env in itertools.chain(
        ordinary_points(names, set(names), rng), ordinary_points(names, set(), rng)
    ):
        with suppress(Undefined):
            with suppress(TooBig):
                for variant in variants(tree):
                    evaluate(variant, Scope(env))
            return True
    return False


# Points at which expressions are compared. They are drawn with the pair of expressions as the seed: the same for every
# run, and not known to one who makes up an expression that agrees with another at given points.

_WHOLE_NAMES = set("nmkN")
_SIZES = (1, 5, 40, 5, 40, 1000, 10**6)


def ordinary_points(names, whole, rng):
    """Values for the unknowns: small and large, first positive, then of both signs; fractions, or whole numbers."""
    for i, size in enumerate(_SIZES if names else (1,)):
        env = {}
        for name in names:
            sign = 1 if i < 3 else rng.choice((1, -1)) if len(names) > 1 else (-1) ** i
            if name in whole:
                env[name] = Fraction(sign * rng.randint(1, max(size, 3 + 2 * i)))
            else:
                env[name] = Fraction(sign * rng.randrange(7, 101 * size), rng.choice((89, 97, 101)))
        yield env


def switches(tree):
    """Expressions at whose zeros the formula of the tree may change: |.|, sgn, max, min, roots, floor, ceiling."""
    found = []
    for node in walk(tree):
        if node[0] == "fn" and node[1] in ("abs", "sgn"):
            found.append(node[2][0])
        elif node[0] == "fn" and node[1] in "max min gcd lcm".split():
            pairs = itertools.islice(itertools.combinations(node[2], 2), 40)
            found += [("add", (x, negative(y))) for x, y in pairs]
        elif node[0] == "fn" and node[1] in ("floor", "ceil"):
            found += [("add", (node[2][0], number(-k))) for k in (-3, -2, -1, 0, 1, 2, 5, 17)]
        elif node[0] == "pow" and node[2][0] == "num" and node[2][1].denominator > 1:
            found.append(node[1])
    return [node for node in dict.fromkeys(found) if unknowns(node)][:40]


def zeros(node, name, env):
    """Real zeros of an expression in one unknown: those of its factors; up to degree 2, else a grid to look on."""
    if node[0] == "mul":
        return [zero for item in node[1] for zero in zeros(item, name, env)]
    if node[0] == "pow" and node[2][0] == "num":
        return zeros(node[1], name, env)
    with suppress(Undefined, TooBig):
        c, up, down, test = (
            to_mp(evaluate(node, Scope(env | {name: Fraction(x)}, real=True))).real
            for x in (0, 1, -1, 7)
        )
        a = (up + down) / 2 - c
        b = (up - down) / 2
        if abs(49 * a + 7 * b + c - test) < 1e-40:  # it is a x^2 + b x + c
            if abs(a) < 1e-60:
                return [-c / b] if abs(b) > 1e-60 else []
            root = abs(b * b - 4 * a * c) ** 0.5
            return [(-b + root) / (2 * a), (-b - root) / (2 * a)]
    return [sign * Fraction(2) ** k for k in range(-4, 21) for sign in (1, -1)]


def runs(a, b, names, whole, rng):
    """24 numbers in a row for each unknown: there (-1)^n and \\gcd(n, 12) show their period."""
    for name in names:
        nodes = walk(a) + walk(b)
        periodic = [node[2] for node in nodes if node[0] == "pow"]
        if name in whole:
            periodic += [node for node in nodes if node[0] == "fn"]
        if any(name in unknowns(node) for node in periodic):
            base = next(ordinary_points(names, whole, rng))
            start = rng.randint(1, 12)
            for k in range(24 if name in whole else 4):
                yield base | {name: Fraction(start + k, 1 if name in whole else 97)}


def points_between(a, b, names, whole, rng):
    """Points at, and on both sides of, the switches of both trees, one unknown moving at a time; and far out."""
    expressions = switches(a) + switches(b)
    for name in names if expressions else ():
        base = rng.choice(list(ordinary_points(names, whole, rng))[:5])
        marks = {
            Fraction(float(zero)).limit_denominator(9999)
            for expression in expressions
            for zero in zeros(expression, name, base)
            if abs(zero) < 10**15
        } or {Fraction(0)}
        marks = sorted(rng.sample(sorted(marks), min(len(marks), 40)))
        width = max(abs(marks[0]), abs(marks[-1]), 1)
        ends = [marks[0] - width, *marks, marks[-1] + width]
        values = [
            low + (high - low) * Fraction(rng.randrange(1, 100), 101)
            for low, high in zip(ends, ends[1:])
        ]
        values += [*marks, width * rng.randrange(5, 5000), -width * rng.randrange(5, 5000)]
        if name in whole:
            values = {Fraction(math.floor(value) + k) for value in values for k in (0, 1)}
        yield from (base | {name: value} for value in sorted(values))


# ----------------------------------------------------------------------------------------------------------------------
# Comparison, cheapest layer first

# Layer 1, strings: `squeeze` of the cleaned texts is the same. Safe, as the clean-up removes layout only.
# Layer 2, plain numbers.

_PLAIN = re.compile(
    r"([-+]?)([1-9]\d{0,2}(?:,\d{3})+|\d*)(\.\d+)?(?:[eE]([-+]?\d{1,3}))?"
    r"|([-+]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))"
)


@lru_cache(maxsize=1 << 14)
def plain_number(text):
    """The exact value of a written integer (1,200 too), decimal or fraction of integers; None for all else.

    Safe: the pattern leaves no second reading, and the arithmetic is exact. Linear in the text.
    """
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_CHARS else None
    if not match:
        return None
    sign, whole, decimals, exponent, sign2, top, bottom, top2, bottom2 = match.groups()
    if whole or decimals:
        return Fraction(f"{sign}{whole.replace(',', '') or 0}{decimals or ''}e{exponent or 0}")
    top = int(top or top2 or 0)
    bottom = int(bottom or bottom2 or 0)
    return Fraction(-top if sign2 == "-" else top, bottom) if bottom else None


def same_plain(answer, gold):
    """The verdict on two plain numbers; None if it takes the parser."""
    a = plain_number(answer.strip())
    b = plain_number(gold.strip())
    return None if a is None or b is None else a == b


# Layer 3, trees.

# (C) 8, \textbf{(C)}\ 8, C. 8, C: 8 (but A: B = 1:2 is a ratio)
_CHOICE = re.compile(
    r"(?P<open>\\text *\{ *)?(?:\((?=.\)))?(?P<letter>[A-J])"
    r"(?:\)|\.(?= )|:(?=[ \\}])(?! *[A-Z] *(?:[:=]|$)|.*[A-Z] ?:))(?P<shut> *\})?"
    r"(?:(?<=[ }])|[ :]+|(?<=\))(?=[\d\\]))(?P<rest>[^ +*/^=<>,)&_!].*)"
)


# 4 July, July 4, 2020
_MONTH = (
    r"((?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b)\.?"
)
_DATE = re.compile(rf"(?:(\d\d?) *(?:of )?{_MONTH}|{_MONTH} *(\d\d?))(?:,? *(\d{{4}}))?")


@lru_cache(maxsize=1 << 14)
def read(text):
    """The readings of a cleaned answer, () if it has none: 1,200 may be a number or two, 12,5 may be 12.5."""
    if not text or len(text) > MAX_CHARS:
        return ()
    if plain_number(text) is not None:
        return (number(plain_number(text)),)
    note = "\\text" in text and re.fullmatch(
        r"(.+?) ?(?:\\text ?\{ ?\(([^(){}]+)\) ?\}|\( ?\\text ?\{([^{}]+)\} ?\))", text
    )
    if note and set(read(note[1])) & set(read(note[2] or note[3])):  # 42 (forty-two)
        return read(note[1])
    plain = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    if ")" in plain and re.fullmatch(
        r"(?:\( ?\d\d? ?\)[ ,]*)+", plain.strip()
    ):  # (1)(3): the numbers of statements
        numbers = tuple(map(number, re.findall(r"\d+", plain)))
        return (("list", numbers, ","),)
    date = _DATE.fullmatch(plain.strip(" {}").lower())
    if date:
        return (("text", f"{(date[2] or date[3])[:3]} {date[1] or date[4]} {date[5]}"),)
    choice = _CHOICE.fullmatch(text)
    if choice:
        text = (
            choice["rest"]
            if choice["shut"] or not choice["open"]
            else choice["rest"].replace("}", "", 1)
        )
    readings = [False]
    if re.search(r"(?<!\d)[1-9]\d{0,2},\d{3}(?!\d)", text) and not re.search(
        r"[(\[][^()\[\]]*\d,\d{3}(?!\d)", text
    ):
        readings = [True] if re.search(r"\d,0\d\d(?!\d)", text) else [True, False]
    trees = []
    for separated in readings:
        with suppress(Unreadable):
            trees.append(Parser(tokenise(text, separated)).answer())
    if re.fullmatch(r"[-+]?\d+,\d+", text) and readings == [False]:
        trees.append(number(text.replace(",", ".")))  # a decimal comma
    if re.fullmatch(r"\d[\da-f]*[a-f][\da-f]*_\{?1[1-6]\}?", text):
        trees += read(text.upper())  # 2a_{16}, if it is no term of a sequence
    if not trees and text.count("{") == text.count("}") and not re.search(r"[_\\]{2}|[;#@`]", text):
        words = re.findall(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text))
        if (1 if "\\text" in text else 2) <= len(words) <= MAX_WORDS:
            trees.append(
                ("text", squeeze(text).lower())
            )  # words and formulas: equal as a text only
    if choice:
        trees = [("choice", choice["letter"], tree) for tree in trees]
    return tuple(tree for tree in trees if is_defined(tree))


def same(a, b):
    """Do two trees mean the same answer? One rule for each kind; what no rule accepts is different."""
    spend(20)
    if a == b or canonical(a) == canonical(b):
        return True
    if "choice" in (a[0], b[0]):
        return same_choice(a, b)
    a, b = simplified(components(a, b)), simplified(components(b, a))
    kinds = {a[0], b[0]}
    if "builder" in kinds:
        return (
            kinds == {"builder"} and same(a[1], b[1]) and same(("where", *a[2:]), ("where", *b[2:]))
        )
    if is_region(a) or is_region(b):
        with suppress(Undefined, TooBig):
            parts = walk(a) + walk(b)
            units = {part[:1] + part[2:] for part in parts if part[0] in ("unit", "deg", "pct")}
            if len(units) > 1 or "?" in repr(units):
                raise Undefined  # x > 3 km and x > 3 m, n > 3 odd: compared as relations
            left = region(a)
            right = region(b)
            names = {left.name, right.name}
            is_expression = any(name and name.startswith("(") for name in names)
            same_name = len(names) == 1 or None in names and not is_expression
            return same_name and all(
                left.holds(x) == right.holds(x) for x in probes(left.marks + right.marks)
            )
    if is_collection(a) or is_collection(b):
        return same_collection(a, b)
    if "rel" in kinds:
        return same_relation(a, b)
    if "ratio" in kinds:
        return same_ratio(a, b)
    if kinds == {"tuple"}:
        return a[1:3] == b[1:3] and len(a[3]) == len(b[3]) and all(map(same, a[3], b[3]))
    if kinds == {"tuple", "call"}:  # P(1, 2)
        point, pair = (a, b) if a[0] == "call" else (b, a)
        return (
            point[1].isupper() and len(point[2]) > 1 and same(("tuple", "(", ")", point[2]), pair)
        )
    if has(a, "matrix") or has(b, "matrix"):
        return same_matrix(a, b)
    if "unit" in kinds:
        return same_quantity(a, b)
    return same_value(a, b)


def simplified(node):
    """A list or set of one is its element (but {{1}} is not {1}); equations are checked, as `name = value`."""
    is_single = node[0] in ("list", "set") and len(node[1]) == 1
    if is_single and node[1][0][0] != "set" and not has(node, "pm"):
        return simplified(node[1][0])
    if node[0] == "list" and node[2] != "or" and len(set(node[1])) == len(node[1]):
        if all(item[0] == "sym" and item[1] in set("ABCDEFGH") for item in node[1]):
            return ("mul", node[1])  # the choices A, C are AC
    if node[0] == "rel" and node[1][-1] == "mod":
        return ("rel", node[1], tuple(residue(side, node[2][-1]) for side in node[2]))
    if node[0] == "list" and node[1][0][0] == "rel" and node[1][0][2][0][0] == "call":
        # f(n) = n + c, n in Z, c in R: the problem gives the domain
        arguments = node[1][0][2][0][2]
        kept = []
        for item in node[1]:
            is_in = item[0] == "rel" and item[1] == ("in",)
            is_domain = is_in and item[2][0] in arguments and item[2][1][0] == "sym"
            if not is_domain and not (is_in and item[2][1] == _REALS):
                kept.append(item)
        return simplified(("list", tuple(kept), node[2])) if len(kept) < len(node[1]) else node
    if node[0] == "rel" and node[1] == ("in",) and simplified(node[2][1]) != node[2][1]:
        return equation(node[2][0], simplified(node[2][1]))  # x in {2}
    if node[0] != "rel" or not set(node[1]) <= {"=", "~"}:
        return node
    operators = node[1]
    sides = list(node[2])
    if operators[0] == "=" and "~" in operators:  # x = 1/3 ~ 0.33: the exact part counts
        sides = sides[: operators.index("~") + 1]
    if operators == ("~",) and not any(map(unknowns, sides)):  # 3\sqrt2 ~ 4.24
        if sides[0][0] != "unit" and sides[1][0] == "unit":  # 3\sqrt2 ~ 4.24 cm
            sides[0] = ("unit", sides[0], *sides[1][2:])
        precise, rounded = (to_mp(evaluate(side, Scope({}))) for side in sides)
        if abs(precise - rounded) > abs(precise) / 100:
            raise Unreadable  # a bad approximation
        return sides[0]
    if is_label(sides[-1]) and not is_label(sides[0]) and not unknowns(sides[0]):
        sides.reverse()  # 5 = x
    constant = [side for side in sides if not is_label(side) and not unknowns(side)]
    is_claim = sides[-1] in constant or len(constant) == len(sides)
    if is_claim and not all(same(side, sides[-1]) for side in constant):
        raise Unreadable  # a false equation; x = 6 = 5
    # Of x = 2 + 3 = 5 nothing is left in the middle. 2n + 1 = 17 may be a condition, but
    # 2n + 1 = 16 + 1 = 17 is a value.
    middle = [side for side in sides[1:-1] if side not in constant]
    if len(constant) > 1 and not middle and unknowns(sides[0]) and not is_label(sides[0]):
        sides[0] = _UNWRITTEN
    return ("rel", ("=",) * (len(middle) + 1), (sides[0], *middle, sides[-1]))


def residue(side, modulus):
    """10 (mod 7) is 3 (mod 7); the modulus itself and what is no whole number stay."""
    numbers = side[0] == modulus[0] == "num" and side[1].denominator == modulus[1].denominator == 1
    if not numbers or modulus[1] < 2 or side is modulus:
        return side
    return number(side[1] % modulus[1])


def components(node, other):
    """Beside a tuple or a matrix 3i - 4j is (3, -4): the values at i = 1, j = 0 and i = 0, j = 1."""
    names = unknowns(node) if other[0] in ("tuple", "matrix") else frozenset()
    if node[0] != "add" or names.isdisjoint("jk") or ("sym", "i") not in walk(node):
        return node
    zero = dict.fromkeys("ijk", number(0))
    axes = "ijk" if "k" in names else "ij"
    return point(substituted(node, zero | {axis: number(1)}) for axis in axes)


def is_label(node):
    """Is this the name of something asked for: x, a_1, f(x), AB, \\angle ABC, \\cos A, |AB|, (p, q), AB/CD, V_1:V_2?"""
    kind = node[0]
    if kind == "sym":
        return bool(unknowns(node))
    if kind == "call":
        return all(
            argument[0] in ("num", "rel") or is_label(argument) for argument in node[2]
        )  # P(X = 2)
    if kind in ("tuple", "ratio"):  # (y, x) = (1, 2) is not the point (1, 2)
        letters = [part[1] for part in node[-1] if part[0] == "sym" and len(part[1]) == 1]
        is_family = any(
            set(letters) <= set(family) for family in "abcdefg mn pqrst uvw xyz".split()
        )
        return all(map(is_label, node[-1])) and (letters == sorted(letters) or not is_family)
    if kind == "fn":
        inner = node[2][0]
        names_angle = (
            node[1] in _ANGLES and inner[0] == "sym" and re.match(r"[A-Z\\]|.* ", inner[1])
        )
        return names_angle or node[1] == "abs" and inner[0] == "mul" and is_label(inner)
    if kind == "pow":
        return node[2] == _MINUS_ONE and is_label(node[1])
    if kind == "mul":  # points are capital letters; the m of m\angle ABC is none
        is_measure = any(" " in str(item[1]) for item in node[1][1:])
        return all(
            item[0] in ("pow", "mul")
            and is_label(item)
            or item[0] == "sym"
            and (item[1][0].isupper() or " " in item[1] or item[1] == "m" and is_measure)
            for item in node[1]
        )
    return kind == "text"


def same_choice(a, b):
    """(C) 8 is C, and is 8; (C) 8 is not (D) 8."""
    if a[0] == b[0]:
        return a[1] == b[1] and same(a[2], b[2])
    choice, other = (a, b) if a[0] == "choice" else (b, a)
    return other == ("sym", choice[1]) or same(choice[2], other)


def same_quantity(a, b):
    """Units on both sides must be the same or convert; where one side has none, the question gave it."""
    if a[0] == b[0]:
        return a[2] == b[2] and same_value(a, b)
    bare, measured = (a, b) if b[0] == "unit" else (b, a)
    if measured[2] in ("?increase", "?decrease"):  # 20% increase
        return bare[0] == measured[1][0] == "pct" and same(bare, measured[1])
    return bare[0] not in ("deg", "pct") and "?" not in measured[2] and same(bare, measured[1])


def same_ratio(a, b):
    """3:4 = 6:8 = 3/4. A ratio with a zero is equal to itself only: its cross products agree with everything."""
    bases = [[part[2] for part in walk(node) if part[0] == "unit"] for node in (a, b)]
    is_other = re.search(r"\?|'[ap]m'", repr(bases))  # 3 halves : 4, 4:40 a.m.
    if is_other or all(bases) and bases[0] != bases[1]:
        return False
    if a[0] == b[0]:
        if len(a[1]) != len(b[1]) or any(same(part, number(0)) for part in a[1] + b[1]):
            return False
        x, *xs = a[1]
        y, *ys = b[1]
        return all(same_value(("mul", (u, y)), ("mul", (v, x))) for u, v in zip(xs, ys))
    ratio, other = (a, b) if a[0] == "ratio" else (b, a)
    return (
        len(ratio[1]) == 2
        and other[0] not in "tuple unit deg pct".split()
        and same_value(("mul", (ratio[1][0], reciprocal(ratio[1][1]))), other)
    )


def same_matrix(a, b):
    """Matrices entry by entry; (1, 2) may stand for a column."""
    a = worked_in(a)
    b = worked_in(b)
    if (a[0], b[0]) != ("matrix", "matrix"):
        return "matrix" not in (a[0], b[0]) and same_value(a, b)
    shapes = [list(map(len, node[1])) for node in (a, b)]
    return shapes[0] == shapes[1] and all(map(same, sum(a[1], ()), sum(b[1], ())))


def worked_in(node):
    """Factors and summands moved into the entries: 2 (1, 2) is (2, 4); a matrix of one entry is its entry."""
    if node[0] == "tuple" and node[1:3] == ("(", ")"):
        return ("matrix", tuple((item,) for item in node[3]))
    if node[0] == "matrix":
        return node[1][0][0] if [len(row) for row in node[1]] == [1] else node
    parts = (
        [worked_in(item) if has(item, "matrix") else item for item in node[1]]
        if node[0] in ("add", "mul")
        else []
    )
    matrices = [part for part in parts if part[0] == "matrix"]
    if node[0] == "mul" and len(matrices) == 1:
        factors = tuple(part for part in parts if part[0] != "matrix")
        return mapped(matrices[0], lambda cell: ("mul", (*factors, cell)))
    shapes = {tuple(map(len, part[1])) for part in matrices}
    if node[0] == "add" and matrices == parts and len(shapes) == 1:
        rows = []
        for row in zip(*(part[1] for part in parts)):
            rows.append(tuple(("add", cells) for cells in zip(*row)))
        return ("matrix", tuple(rows))
    return node


# Collections


def is_collection(node):
    return (
        node[0] in ("list", "set")
        or node[0] not in ("tuple", "matrix", "ratio")
        and has(node, "pm")
    )


def elements(node):
    """The members of a list or set (and of x = {1, 2}, x in {1, 2}), plus-minus written out, inner lists spliced in."""
    if node[0] in ("list", "set"):
        return [
            member
            for item in node[1]
            for member in ([item] if item[0] == "set" else elements(item))
        ]
    if node[0] == "rel" and node[1] in (("=",), ("in",)) and node[2][1][0] in ("list", "set"):
        return [equation(node[2][0], member) for member in elements(node[2][1])]
    return variants(node)


# Factors in a sum that an answer may give: 100m + n, m - n.
_TENS = set(map(number, (-1, 10, 100, 1000)))


def label_of(node):
    """The name in `name = value` and `name in set`; the sum in m - n = 6 and 100m + n = 305."""
    if node[0] != "rel" or node[1] not in (("=",), ("in",)):
        return None
    side, value = node[2]
    is_asked = side[0] == "add" and not unknowns(value) and value != number(0)
    terms = side[1] if is_asked else ()
    names = [term[1][1] if term[0] == "mul" and term[1][0] in _TENS else term for term in terms]
    is_sum = names and all(name[0] == "sym" and name[1] in "abcdkmnpqrst" for name in names)
    return canonical(side) if is_label(side) or is_sum else None


def named_values(members):
    """The names in `name = value`, and the values."""
    names = list(dict.fromkeys(filter(None, map(label_of, members))))
    return names, list(map(value_of, members))


def points(members, joiner=","):
    """x = 1, y = 2, x = 2, y = 1 are two points (x, y) = (1, 2), (2, 1); x = 1 or y = 2 is none."""
    names = sorted(named_values(members)[0], key=repr)
    groups = [members[i : i + len(names)] for i in range(0, len(members), len(names) or 1)]
    is_complete = all(set(map(label_of, group)) == set(names) for group in groups)
    if len(names) < 2 or joiner == "or" and len(groups) == 1 or not is_complete:
        joined = {member: points(member[3]) for member in members if member[0] == "tuple"}
        return [
            joined[member][0] if len(joined.get(member, ())) == 1 else member for member in members
        ]
    found = []
    for group in groups:
        members = sorted(group, key=lambda member: repr(label_of(member)))
        found.append(equation(point(names), point(member[2][1] for member in members)))
    return found


def same_collection(a, b):
    """Lists and sets, in any order. Beside a tuple or beside `x = 1, y = 2` a list without names is in that order."""
    xs = [node if node[0] == "set" else simplified(node) for node in elements(a)]
    ys = [node if node[0] == "set" else simplified(node) for node in elements(b)]
    spend(9 * len(xs + ys))
    names, values = named_values(xs)
    other_names, other_values = named_values(ys)
    has_or = "or" in (a[-1], b[-1])
    is_named = any(value[0] in ("sym", "text") for value in values + other_values)
    is_one_name = len(names) == 1 and names == other_names
    is_solved = is_one_name and {member[1] for member in xs + ys} == {("=",)}  # x = a, x = b
    if has_or and a[0] == b[0] and a[-1] != b[-1] and is_named and not is_solved:
        return False  # A and B, A or B
    signs = [part for part in walk(a) + walk(b) if part[0] == "pm"]
    beside_tuple = "tuple" in (a[0], b[0]) and not names + other_names and len(signs) != 1
    beside_names = (
        not (names and other_names) and len(names + other_names) == len(xs) == len(ys) > 1
    )
    if beside_names and "set" in (a[0], b[0]):  # x_1 = 2, x_2 = 3 is {2, 3}
        return matched(values, other_values)
    if not has_or and "set" not in (a[0], b[0]) and (beside_tuple or beside_names):
        xs, ys = (
            node[3] if node[:3] == ("tuple", "(", ")") else side
            for node, side in ((a, values), (b, other_values))
        )
        return len(xs) == len(ys) and all(map(same, xs, ys))
    names, xs = named_values(points(xs, a[-1]))
    other_names, ys = named_values(points(ys, b[-1]))
    is_set = any(map(is_region, xs + ys))  # a = 0, b = 1 is a point, and not 0 < x < 1
    if names != other_names and (names and other_names or len(names + other_names) > 1 or is_set):
        return False
    if signs or "set" in (a[0], b[0]) or all(member[0] in ("tuple", "rel") for member in xs + ys):
        xs = distinct(xs)
        ys = distinct(ys)
    return matched(xs, ys)


def distinct(nodes):
    """Without repeats: {1, 1, 2} is {1, 2}, and a solution that is listed twice is one solution."""
    nodes = list({canonical(node): node for node in nodes}.values())
    if len(nodes) > 30:
        return nodes
    found = []
    for node in nodes:
        if not any(same_member(node, other) for other in found):
            found.append(node)
    return found


def same_member(x, y):
    return (x[0] == "set") == (y[0] == "set") and same(x, y)  # {1} is not a member of {1}


def matched(xs, ys):
    """Is there a one-to-one match? Equal trees are cancelled first; many that are left mean different lists."""
    left = Counter(map(canonical, xs))
    right = Counter(map(canonical, ys))
    xs = list((left - right).elements())
    ys = list((right - left).elements())
    if len(xs) != len(ys) or len(xs) > 40:
        return False
    for x in xs:
        partner = next((y for y in ys if same_member(x, y)), None)
        if partner is None:
            return False
        ys.remove(partner)
    return True


# Relations

_FLIP = dict(zip("< <= > >= = !=".split(), "> >= < <= = !=".split()))


def same_relation(a, b):
    """Two relations: the same sides, or the same up to a factor. A value agrees with `name = value` only."""
    if a[0] != b[0]:
        relation, value = (a, b) if a[0] == "rel" else (b, a)
        sides = relation[2]
        is_equation = set(relation[1]) == {"="}
        if value[0] == "tuple" and len(sides) > 2 and all(map(is_label, sides[:-1])):
            size = len(sides) - 1  # x = y = 1 is (1, 1)
            return is_equation and same(value, value[:3] + (sides[-1:] * size,))
        is_value = is_equation and (is_label(sides[0]) or not any(map(unknowns, sides)))
        return (is_value or label_of(relation) is not None) and same(sides[-1], value)
    if len(a[1]) != len(b[1]):  # S = ab/2 = 6 is S = 6, but x = y = 5 says more than x = 5
        is_said = any(map(is_label, a[2][1:-1] + b[2][1:-1])) or {*a[1], *b[1]} != {"="}
        return not is_said and same(a[2][0], b[2][0]) and same(a[2][-1], b[2][-1])
    flipped = tuple(map(_FLIP.get, reversed(b[1])))
    for operators, sides in ((b[1], b[2]), (flipped, b[2][::-1])):
        if a[1] == operators and all(map(same, a[2], sides)):
            return True
    return len(a[1]) == 1 and a[1] in (b[1], flipped) and a[1][0] in _FLIP and proportional(a, b)


def proportional(a, b):
    """Is (left - right) of one a constant multiple of the other's, with the sign that the direction asks for?"""
    f, g = (("add", (node[2][0], negative(node[2][1]))) for node in (a, b))
    names = sorted(unknowns(f))
    has_no_value = has(("add", (f, g)), "unit", *_NO_VALUE)
    if has_no_value or not names or unknowns(f) != unknowns(g):
        return False
    for env in ordinary_points(names, _WHOLE_NAMES, pair_seed(f, g)):
        with suppress(Undefined, TooBig):
            x = evaluate(f, Scope(env))
            y = evaluate(g, Scope(env))
            if abs(x) < 1e-30 or abs(y) < 1e-30:
                continue
            same_sign = is_real(x) and is_real(y) and to_mp(x).real * to_mp(y).real > 0
            if a[1][0] not in ("=", "!=") and same_sign != (a[1] == b[1]):
                return False
            point = {name: ("num", value) for name, value in env.items()}
            return same_value(
                ("mul", (f, substituted(g, point))), ("mul", (g, substituted(f, point)))
            )
    return False


# Sets of real numbers: intervals, unions, conditions on one unknown. Two of them are equal if they agree at every mark
# (where membership of either can change), between neighbouring marks and beyond the outer ones.


class Region(NamedTuple):
    name: str | None  # the unknown it is a condition on, None for a set without one
    marks: list  # finite endpoints
    holds: Callable  # is this number in the set?


def is_region(node):
    """Is this written as a set of reals (and not as a pair that could be a point)?"""
    if node[0] == "rel":
        return bool(set(node[1]) & {*_FLIP, "in"} - {"="})
    if node[0] == "list":
        return all(map(is_region, node[1]))
    return node[0] in "cup cap setminus where".split() or node == _REALS


def region(node):
    """The set of reals that a tree describes. Undefined or TooBig if it is none that these rules know."""
    kind = node[0]
    if node == _REALS:
        return Region(None, [], lambda x: True)
    if kind == "tuple" and len(node[3]) == 2:  # [0, 1) is 0 <= ? < 1
        low, high = node[3]
        if not before(endpoint(low), endpoint(high)):
            raise Undefined  # an empty interval
        operators = tuple("<=" if bracket in "[]" else "<" for bracket in node[1:3])
        return condition(operators, (low, _UNWRITTEN, high))
    if kind == "set":
        values = [endpoint(item) for item in node[1]]
        return Region(None, values, lambda x: any(meets("=", x, value) for value in values))
    if kind in ("cup", "cap", "setminus"):
        left = region(node[1])
        right = region(node[2])
        join = {
            "cup": lambda x: left.holds(x) or right.holds(x),
            "cap": lambda x: left.holds(x) and right.holds(x),
            "setminus": lambda x: left.holds(x) and not right.holds(x),
        }[kind]
        return Region(left.name or right.name, left.marks + right.marks, join)
    if kind == "where" or kind == "list" and is_region(node):
        parts = [region(condition) for condition in node[1]]
        if len({part.name for part in parts}) != 1:
            raise Undefined  # conditions on two unknowns
        marks = [mark for part in parts for mark in part.marks]
        name = parts[0].name if kind == "list" else None
        both = Region(name, marks, lambda x: all(part.holds(x) for part in parts))
        either = Region(name, marks, lambda x: any(part.holds(x) for part in parts))
        if node[2] == "or" or parts[0].name is None:
            return either
        is_empty = node[2] == "," and not any(map(both.holds, probes(marks)))
        return either if is_empty else both  # x < 1, x > 3
    if kind != "rel":
        raise Undefined  # no set of reals
    return condition(node[1], node[2])


def condition(operators, sides):
    """x in A, a < x <= b, x != a, and the same for |x|."""
    if operators == ("in",):
        return region(sides[1])._replace(name=subject(sides[0]))
    free = [i for i, side in enumerate(sides) if unknowns(side) or side[0] == "call"]
    is_chain = len(operators) <= 2 and (free == [1] or free == [0] and len(operators) == 1)
    if not is_chain or not set(operators) <= set(_FLIP):
        raise Undefined  # no bounds of an unknown
    middle = sides[free[0]]
    others = [side for i, side in enumerate(sides) if i != free[0]]
    if free == [1]:  # 1 < x is x > 1
        operators = (_FLIP[operators[0]], *operators[1:])
    marks = list(map(endpoint, others))
    bounds = list(zip(operators, marks))
    value = lambda x: x
    if middle[:2] == ("fn", "abs") and middle[2][0][0] == "sym":
        middle = middle[2][0]
        marks += [-mark for mark in marks]
        value = abs
    elif middle[0] not in ("sym", "call"):
        raise Undefined  # bounds of an expression
    name = None if middle == _UNWRITTEN else subject(middle)
    return Region(name, marks, lambda x: all(meets(op, value(x), bound) for op, bound in bounds))


def subject(side):
    """What a condition is about: a set without a name may stand for x, f(x), a + b, not for x^2."""
    if label_of(equation(side, number(1))) and side[0] == "add":
        return "+" + repr(canonical(side))
    if side[0] == "call" and all(argument[0] == "sym" for argument in side[2]):
        return side[1] + "()"
    return side[1] if side[0] == "sym" else repr(canonical(side))


def meets(op, u, v):
    if op in ("<", ">="):
        return before(u, v) == (op == "<")
    if op in (">", "<="):
        return before(v, u) == (op == ">")
    return (before(u, v) or before(v, u)) == (op == "!=")


def endpoint(node):
    """A real number as Fraction or mpf, or an infinity. TooBig if 100 digits may not tell it from another."""
    if node in (_INFINITY, negative(_INFINITY)):
        return _MP.inf if node[0] == "sym" else _MP.ninf
    scope = Scope({}, real=True, largest=[0])
    value = evaluate(node[1] if node[0] in ("unit", "deg") else node, scope)
    if is_exact(value):
        return value
    if written(node) + scope.largest[0] > 60:
        raise TooBig  # digits
    return _MP.re(value)


def before(a, b):
    """a < b; what is equal within the precision is not before."""
    spend(3)
    if is_exact(a) and is_exact(b):
        return a < b
    return to_mp(b) - to_mp(a) > 1e-60  # no for two equal infinities: their difference is no number


def probes(marks):
    """The marks, a number between each two neighbours and one beyond each end."""
    marks = sorted((mark for mark in marks if abs(mark) != _MP.inf), key=to_mp)
    if not marks:
        return [Fraction(0)]
    between = [plus(a, b) / 2 for a, b in zip(marks, marks[1:]) if before(a, b)]
    return marks + between + [plus(marks[0], Fraction(-1)), plus(marks[-1], _ONE)]


# Layer 4, values at points.

_NO_VALUE = set(
    "list set rel text based cup cap setminus where builder ratio choice pm matrix tuple sum prod".split()
)


def same_value(a, b):
    """Have two expressions the same value wherever both are real (or, if they never are, in the complex numbers)?

    NOT IN PAPER: log is natural or decimal, a degree is a number or an angle, 25% is 25 or 1/4: any one reading that
    makes both sides equal will do, as the question fixed it. cos 36 is never cos 36°.
    """
    kinds = kinds_in(a) | kinds_in(b)
    if kinds & _NO_VALUE or {"deg", "pct"} <= kinds:  # with degrees read as numbers, 25° were 25%
        return False
    functions = (
        {node[1:2] + (len(node[2]),) for node in walk(a) + walk(b) if node[0] == "fn"}
        if "fn" in kinds
        else ()
    )
    has_angle = any(name in _ANGLES for name, _ in functions)
    has_log = ("log", 1) in functions
    return any(
        agree(a, b, Scope({}, degree=degree, percent=percent, log10=log10))
        for degree in ((True, False) if "deg" in kinds and not has_angle else (True,))
        for percent in ((True, False) if "pct" in kinds else (True,))
        for log10 in ((True, False) if has_log else (False,))
    )


def pair_seed(a, b):
    return random.Random("|".join(sorted((repr(a), repr(b)))))


def agree(a, b, scope):
    """Equal at all points where both have a value: real ones; if there are none, at whole numbers, or complex.

    n, m and k are whole numbers: there \\lceil n/2\\rceil is \\lfloor (n+1)/2\\rfloor, and \\cos n\\pi is (-1)^n.
    """
    names = sorted(unknowns(a) | unknowns(b))
    rng = pair_seed(a, b) if names else None
    whole = _WHOLE_NAMES.intersection(names)
    ways = [(True, whole), (True, set(names)), (False, whole)]
    for real, whole in ways[2:] if not names or ("sym", "i") in walk(a) + walk(b) else ways:
        agreed = 0
        near = itertools.chain(ordinary_points(names, whole, rng), runs(a, b, names, whole, rng))
        far = points_between(a, b, names, whole, rng)
        for envs, is_far in ((near, False), (far, True)):
            for env in envs:
                try:
                    if not same_number(a, b, scope._replace(env=env, real=real)):
                        return False
                    agreed += 1
                except Undefined:
                    continue
                except TooBig:
                    if is_far:  # what happens beyond a switch cannot be seen
                        return False
        if agreed >= (2 if names else 1):
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Copies of the problem

_MATH = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation)\*?\}(.+?)\\end",
    re.S,
)
_BREAKS = re.compile(
    r"[=<>,;&]|\\(?:le|ge|leq|geq|ne|neq|in|quad|qquad|\\)(?![a-zA-Z])|\\text\{[^{}]*\}"
)
_AS_THEY_ARE = set("num sym text list set tuple unit deg pct based choice".split())


@lru_cache(maxsize=4096)
def expressions(problem):
    """What a problem states in formulas: as trees, these with all their parts, and as texts."""
    texts = [next(filter(None, match.groups())) for match in _MATH.finditer(problem[:MAX_PROBLEM])]
    trees = []
    parts = {}
    _work.left = MAX_WORK
    for text in texts:
        for part in dict.fromkeys([text, *_BREAKS.split(text)]):
            with suppress(Unreadable, Undefined, TooBig, TooMuchWork):
                for tree in read(clean(part)):
                    trees.append(canonical(tree))
                    parts |= dict.fromkeys(map(canonical, walk(tree)))
    return trees, parts, tuple(squeeze(clean(text)) for text in texts)


def contains(tree, part):
    """Is everything of `part` still there in the tree, nested as it was?

    Other things may stand around and between. Signs, the order of terms and the names of unknowns
    do not matter: 2(x + 1 - 1) - 0y contains x + 1 and y + 1.
    """
    below = children(tree)
    wanted = children(part)
    spend(12 + len(below + wanted))
    if len(wanted) == 1 and part[0] == "mul":
        return contains(tree, wanted[0])
    if part[0] == "num":
        is_here = tree[0] == "num" and abs(tree[1]) == abs(part[1])
    elif part[0] == "sym":
        is_here = tree == part or tree[0] == "sym" and unknowns(part) and unknowns(tree)
    else:
        is_here = tree[0] == part[0] and (part[0] != "fn" or tree[1] == part[1])
        is_here = is_here and all(stands_in(below, child) for child in wanted)
    return is_here or stands_in(below, part)


def stands_in(nodes, part):
    return any(contains(node, part) for node in nodes)


def bare(tree):
    """The canonical tree of an answer without its letter: (C) 8 is 8."""
    return canonical(tree[-1] if tree[0] == "choice" else tree)


def value_of(node):
    return node[2][-1] if label_of(node) else node


def is_done(node):
    """Is nothing left to compute: a number, a name, x = 4, a list of those?"""
    node = value_of(node)
    return is_label(node) or kinds_in(node) <= _AS_THEY_ARE


def is_copied(answer, gold, problem):
    """Is a right answer only an expression of its problem: "evaluate sin 315°" answered by sin 315°?

    NOT IN PAPER. Such an answer is right if it is the gold up to layout and order, or if nothing in
    it is left to compute: a number, a name, a list of them. A copy stays a copy whatever it wears
    (2 sin 315° / 2, |sin 315°|, a unit, an equation): it still contains a whole expression of the
    problem that is itself equal to the gold.
    """
    trees, golds = (list(map(bare, read(text))) for text in (answer, gold))
    values = list(map(value_of, trees))
    wanted = set(map(value_of, golds))
    # 0.\overline{3} as a fraction is a task
    repeats = re.search(
        r"[\d.]*(?:\\(?:overline|bar|dot)\{?\d+|\d\.\.\.)", squeeze(answer.rpartition("=")[2])
    )
    if not repeats and (not wanted.isdisjoint(values) or any(map(is_done, values))):
        return False
    stated, parts, texts = expressions(problem)
    pattern = re.compile(r"(?<![\w\\.^])" + re.escape(squeeze(answer)) + r"(?![\w.^])")
    if any(tree in parts for tree in trees + values) or any(map(pattern.search, texts)):
        return True
    if repeats:
        return any(repeats.group() in text for text in texts)
    _work.left = MAX_WORK  # `expressions` is remembered: what it took must not count
    golds = [tree[2][-1] if tree[0] == "rel" and not unknowns(tree) else tree for tree in golds]
    relations = [part for part in parts if part[0] == "rel"]
    for value in values:
        is_chain = value[0] == "rel" and set(value[1]) <= {"=", "~"}  # sin 30° = 1/2 tells more
        sides = [side for side in value[2] if not is_label(side)] if is_chain else [value]
        if not wanted.isdisjoint(sides):
            continue
        if wears(value, relations, golds) or all(wears(side, stated, golds) for side in sides):
            return True
    return False


def wears(node, parts, golds):
    """Does it contain one of the parts that is equal to the gold, and not in the gold itself?"""
    for part in parts:
        spend(len(walk(part)))
        if len(walk(part)) > len(walk(node)) or is_done(part):
            continue
        is_worn = contains(node, part) and not any(contains(tree, part) for tree in golds)
        if is_worn and any(same_answer(part, tree) for tree in golds):
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# The public comparison

_DASHED = re.compile(r"\d+(?: ?- ?\d+)+")
_TIME = re.compile(r"(\d\d?):([0-5]\d)(?: ?(?:\\text ?\{ ?)?([apAP])[mM] ?\}?)?")


def same_time(a: re.Match, b: re.Match) -> bool:
    """Times of day agree digit by digit (7:20 is not 14:40); 8:34 PM is 20:34, and may be 8:34."""
    (hour, minute, half), (hour2, minute2, half2) = (match.groups() for match in (a, b))
    if half and not half2:
        return same_time(b, a)
    if minute != minute2 or half and half.lower() != half2.lower():
        return False
    later = half2 and int(hour2) % 12 + (12 if half2 in "pP" else 0)
    return int(hour) == int(hour2) or not half and int(hour) == later


def compare(answer: str, gold: str, problem: str | None = None) -> bool | str | None:
    """is_equal without its safety net: None if the answer or the gold cannot be read, "copied" for a copy."""
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return None
    _work.left = MAX_WORK
    verdict = same_plain(answer, gold)
    if verdict is not None:
        return verdict
    answer = clean(answer)
    gold = clean(gold)
    try:
        trees = read(answer)
        golds = read(gold)
        if not trees or not golds:
            return None
        if squeeze(answer) == squeeze(gold):
            return True
        if _DASHED.fullmatch(answer) and _DASHED.fullmatch(
            gold
        ):  # scores, ranges, dates: no differences
            return False
        times_of_day = _TIME.fullmatch(answer), _TIME.fullmatch(gold)
        if all(times_of_day):
            return same_time(*times_of_day)
        if not any(same_answer(a, b) for a, b in itertools.product(trees, golds)):
            return False
        return "copied" if problem and is_copied(answer, gold, problem) else True
    except TooMuchWork:
        return False


def same_answer(a, b) -> bool:
    """`same`, whatever the names of parameters: f(x) = x is f(t) = t, and x = n pi, n in Z is x = k pi, k in Z."""
    x, y = (list(dict.fromkeys(parameters(node))) for node in (a, b))
    is_free = len(x) == len(y) > 0 and not (set(x) - set(y)) & unknowns(b)
    if is_free and not (set(y) - set(x)) & unknowns(a):
        b = substituted(b, {old: ("sym", new) for old, new in zip(y, x)})
    try:
        return same(a, b)
    except (Unreadable, Undefined, TooBig):
        return False


def parameters(node) -> list[str]:
    """Names whose choice is free: the n of `n in Z`, the x of `f(x) = `, the k of {2k | k in Z}, the t
    of the line (t, 2t), the C of x^2 + C, the c_1 and c_2 or A and B of y = c_1 e^x + c_2 e^{-x}."""
    if node[0] in ("list", "where"):
        return [name for item in node[1] for name in parameters(item)]
    if node[0] == "builder":
        return sorted(unknowns(node[1]))
    names = unknowns(node)
    if node[0] in ("tuple", "matrix") and len(names) == 1:
        return sorted(names & set("tsrk"))
    chosen = [name for name in sorted(names) if re.fullmatch("[CcKk](_[0-9])?", name)]
    chosen += ["A", "B"] if {"A", "B"} <= names else []
    chosen = chosen if len(names) > len(chosen) else []
    if node[0] == "add" and any(("sym", name) in node[1] for name in chosen):
        return chosen if names & set("xtuyzs") else []  # x^2 + C, not n - k
    if node[0] != "rel":
        return []
    left = node[2][0]
    if node[1] == ("in",) and left[0] == "sym" and node[2][1] in (("sym", "ℤ"), ("sym", "ℕ")):
        return [left[1]]
    arguments = [part[1] for part in left[2] if part[0] == "sym"] if left[0] == "call" else []
    is_solved = left[0] == "call" or unknowns(left) in map(set, "y xy ty tx".split())
    return arguments + chosen if is_solved else []


def is_equal(answer: str, gold: str, problem: str | None = None) -> bool:
    """Are two answers the same to a careful grader? Pure, symmetric on answers, bounded in time, never raises.

    An unreadable gold equals nothing. NOT IN PAPER: a decimal equals a fraction or a constant only if it is exactly
    that number (0.5 = 1/2, but 0.33 is not 1/3 and 3.14 is not pi): a policy could answer with an estimate.
    With the problem at hand, an answer that only repeats an expression of it is no answer (`is_copied`).
    """
    try:
        return compare(answer, gold, problem) is True
    except Exception:  # whatever text finds a hole here, training continues and the answer is wrong
        return False


def is_readable(answer: str) -> bool:
    """Does the parser accept this answer, so that it can serve as a gold?"""
    return is_equal(answer, answer)


# ----------------------------------------------------------------------------------------------------------------------
# grade: a batch of responses, compared in worker processes
#
# A worker is `python verify.py --serve`: a pair in as a line of JSON, one letter out. It is started by exec, not by
# fork alone, which is safe in a trainer with threads and a GPU. One that misses a deadline is killed and replaced.

_DIED = b""
_LATE = b"l"
_VERDICTS = {
    b"t": True,
    b"f": False,
    b"u": "unparsable",
    b"p": "copied",
    b"c": "crashes",
    _DIED: "crashes",
    _LATE: "timeouts",
}


def leave_with(trainer: int) -> None:
    """End this worker with its trainer: a child of the trainer may hold its pipe open."""
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(0)


def serve(trainer: int) -> None:
    """The life of a worker, bounded in memory. It ends with its input or its trainer."""
    threading.Thread(target=leave_with, args=(trainer,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the trainer
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.write(1, b"r")  # ready
    for line in sys.stdin.buffer:
        *arguments, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)
        try:
            letter = {True: b"t", False: b"f", None: b"u", "copied": b"p"}[compare(*arguments)]
        except Exception:  # MemoryError too: this worker is fine again after it
            letter = b"c"
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, letter)


class Worker:
    """The trainer's end of a worker process. `index` is that of its question in the batch, None while it has none."""

    def __init__(self):
        command = [sys.executable, os.path.abspath(__file__), "--serve", str(os.getpid())]
        for _ in range(MAX_STARTS):
            try:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                )
            except OSError as error:  # no more processes, memory or files
                raise RuntimeError(f"verify.py: no grading worker starts: {error}")
            os.set_blocking(self.process.stdin.fileno(), False)
            self.index = None
            self.unsent = b""
            if active([self], START_SECONDS) and self.process.stdout.read(1):
                return
            self.stop()
            if self.process.returncode >= 0:  # it ended by itself: no signal killed it
                break
        raise RuntimeError(f"verify.py: no grading worker starts; `{' '.join(command)}` shows why")

    def ask(self, index: int, question: tuple, timeout: float) -> None:
        self.index = index
        self.deadline = time.monotonic() + timeout
        self.unsent = json.dumps([*question, timeout]).encode() + b"\n"
        self.send()

    def send(self) -> None:
        """As much of the question as the pipe takes: a worker that stands still blocks nobody."""
        try:
            self.unsent = self.unsent[self.process.stdin.write(self.unsent) or 0 :]
        except BrokenPipeError:  # it was killed while idle: its output ends
            self.unsent = b""

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def active(workers: list[Worker], seconds: float) -> list[Worker]:
    """The workers that have written or died, as soon as there is one; none when the time is over.

    Before that, what the workers have not yet read of their questions is sent.
    """
    poll = select.poll()
    for worker in workers:
        poll.register(worker.process.stdout, select.POLLIN)
        if worker.unsent:
            poll.register(worker.process.stdin, select.POLLOUT)
    files = dict(poll.poll(max(0.0, seconds) * 1000))
    for worker in workers:
        if worker.process.stdin.fileno() in files:
            worker.send()
    return [worker for worker in workers if worker.process.stdout.fileno() in files]


class Pool:
    """The workers of one process. They work on one batch at a time, whatever the number of threads."""

    def __init__(self):
        self.owner = os.getpid()
        self.workers: list[Worker] = []
        self.fill()

    def fill(self) -> None:
        """Start the workers that are missing. Fewer will do where the machine gives no more."""
        while len(self.workers) < worker_count():
            try:
                self.workers.append(Worker())
            except RuntimeError:
                if not self.workers:
                    raise
                return

    def verdicts(self, questions: list[tuple], timeout: float) -> list[bool | str]:
        """What `compare` says to each question, or 'timeouts' or 'crashes'.

        A question whose worker died is asked again: something else may have killed it, and that costs no reward.
        """
        for worker in list(self.workers):
            if worker.index is not None:  # an interrupt ended the batch before
                self.remove(worker)
        self.fill()
        found: dict[int, bool | str] = {}
        waiting = list(reversed(range(len(questions))))
        deaths = Counter()
        while len(found) < len(questions):
            for worker in self.workers:
                if worker.index is None and waiting:
                    index = waiting.pop()
                    worker.ask(index, questions[index], timeout)
            busy = [worker for worker in self.workers if worker.index is not None]
            heard = active(busy, min(worker.deadline for worker in busy) - time.monotonic())
            for worker in busy:
                if worker not in heard and time.monotonic() < worker.deadline:
                    continue
                # _DIED: its output ended
                letter = worker.process.stdout.read(1) if worker in heard else _LATE
                index = worker.index
                worker.index = None
                if letter in (_DIED, _LATE):
                    self.remove(worker)
                    self.fill()
                    deaths[index] += 1
                if letter == _DIED and deaths[index] < TRIES:
                    waiting.append(index)
                else:
                    found[index] = _VERDICTS[letter]
        return [found[index] for index in range(len(questions))]

    def remove(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.stop()

    def stop(self) -> None:
        if self.owner == os.getpid():
            for worker in self.workers:
                worker.stop()


def worker_count() -> int:
    """The cores of this machine, shared by the ranks that torchrun says it started."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Grades(list):
    """The verdicts of `grade` in order, with `.stats`: what to log about them."""


_pool: Pool | None = None
_pool_lock = threading.Lock()
_cache: OrderedDict[tuple, bool | str] = OrderedDict()


def forget_pool() -> None:
    """In a forked child: the pool is the parent's, and another thread may have held the lock."""
    global _pool, _pool_lock
    _pool = None
    _pool_lock = threading.Lock()


os.register_at_fork(after_in_child=forget_pool)


def pool() -> Pool:
    """The pool of this process: started at the first use, and anew after a fork."""
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.stop)
    return _pool


def grade(
    responses: list[str], golds: list[str], timeout: float = 1.0, problems: list[str] | None = None
) -> Grades:
    """Is the boxed answer of each response equal to its gold? The batch entry that RL uses.

    Order is kept; what fails is False. Two plain numbers are compared here and now, all else in worker processes:
    each pair has `timeout` seconds of wall clock and MAX_MEMORY bytes, a worker that overruns is killed and replaced,
    and verdicts are cached (the K samples of a prompt repeat each other). Works from any thread, under torchrun and in
    notebooks; no signals in the trainer, no state besides pool and cache. Given the problems, an answer that only
    repeats an expression of its problem is wrong (`is_copied`).
    `.stats` of the result counts no_answer (no box), unparsable (answer or gold), copied, timeouts and crashes, and
    gives the number of workers (0 while none was needed).
    """
    return grade_answers(
        [extract_answer(response or "") for response in responses], golds, timeout, problems
    )


def first_look(answer: str | None, gold: str) -> bool | str | None:
    """The verdict that needs no worker; None if it takes one."""
    if answer is None:
        return "no_answer"
    if not isinstance(gold, str) or max(len(answer), len(gold)) > MAX_CHARS:
        return "unparsable"
    return same_plain(answer, gold)


def grade_answers(
    answers: list[str | None],
    golds: list[str],
    timeout: float = 1.0,
    problems: list[str] | None = None,
) -> Grades:
    """`grade` for answers that are extracted already; None is no answer."""
    problems = [""] * len(golds) if problems is None else problems
    if not len(answers) == len(golds) == len(problems):
        raise ValueError(
            f"grade: {len(answers)} answers, {len(golds)} golds and {len(problems)} problems"
        )
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"grade: timeout must be above 0 and at most {MAX_TIMEOUT} s, not {timeout}"
        )
    questions = [
        (answer, gold, problem[:MAX_PROBLEM] if isinstance(problem, str) else "")
        for answer, gold, problem in zip(answers, golds, problems)
    ]
    verdicts = [first_look(answer, gold) for answer, gold, _ in questions]
    asked = dict.fromkeys(
        question for question, verdict in zip(questions, verdicts) if verdict is None
    )
    with _pool_lock:
        known = {question: _cache.pop(question) for question in asked if question in _cache}
        new = [question for question in asked if question not in known]
        if new:
            known |= zip(new, pool().verdicts(new, timeout))
        _cache.update(
            (pair, verdict)
            for pair, verdict in known.items()
            if verdict not in ("timeouts", "crashes")
        )
        while len(_cache) > CACHE_SIZE:  # those not used for long go
            _cache.popitem(last=False)
    verdicts = [
        known[question] if verdict is None else verdict
        for question, verdict in zip(questions, verdicts)
    ]
    grades = Grades(verdict is True for verdict in verdicts)
    grades.stats = {
        name: verdicts.count(name)
        for name in "no_answer unparsable copied timeouts crashes".split()
    }
    grades.failed = {i for i, verdict in enumerate(verdicts) if verdict in ("timeouts", "crashes")}
    grades.stats["workers"] = len(_pool.workers) if _pool else 0
    return grades


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def load_rows(path: str) -> list[dict]:
    """Rows {"pred", "gold"[, "equal", "category", "form", "debatable"]} of a file, gzipped or not, but debatable ones.

    Misuse ends in one line that names file, row and fault (SystemExit).
    """
    rows = []
    place = path
    try:
        if not os.path.isfile(path):
            raise ValueError("not a file" if os.path.exists(path) else "no such file")
        with open(path, "rb") as plain:
            file = gzip.GzipFile(fileobj=plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain
            for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), b""), 1):
                place = f"{path}, row {number}"
                if len(line) > MAX_ROW:
                    raise ValueError(f"longer than {MAX_ROW >> 20} MiB")
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else {"debatable": True}
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                if not row.get("debatable"):
                    if not all(isinstance(row.get(field), str) for field in ("pred", "gold")):
                        raise ValueError("fields 'pred' and 'gold' must be there and text")
                    rows.append(row | {"category": printable(str(row.get("category", "-")))})
        if not rows:
            raise ValueError("no rows")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise SystemExit(printable(f"{place}: {error}"))
    return rows


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def answer_of(row: dict) -> str | None:
    """pred is a whole response if the row says so or if it has a box; else it is the answer itself."""
    is_response = (
        row["form"] == "response"
        if "form" in row
        else "\\boxed" in row["pred"] or "\\fbox" in row["pred"]
    )
    return extract_answer(row["pred"]) if is_response else row["pred"]


def run_rows(path: str, timeout: float) -> None:
    """Print the share of right verdicts, by category, the rows that differ from their label, and the speed."""
    rows = load_rows(path)
    pool()  # the workers start before the clock does
    start = time.perf_counter()
    grades = grade_answers([answer_of(row) for row in rows], [row["gold"] for row in rows], timeout)
    seconds = time.perf_counter() - start
    labelled = [(row, verdict) for row, verdict in zip(rows, grades) if "equal" in row]
    wrong = [(row, verdict) for row, verdict in labelled if verdict != bool(row["equal"])]
    false_right = sum(verdict for _, verdict in wrong)
    if labelled:
        print(
            f"{path}: {100 * (1 - len(wrong) / len(labelled)):.2f} % of {len(labelled)} rows right, "
            f"{false_right} false right, {len(wrong) - false_right} false wrong"
        )
    else:
        print(f"{path}: {sum(grades)} of {len(rows)} equal")
    total = Counter(row["category"] for row, _ in labelled)
    missed = Counter(row["category"] for row, _ in wrong)
    for category, count in sorted(total.items()):
        print(f"  {category:<20} {count - missed[category]:>5} of {count}")
    for row, verdict in wrong:
        print(
            f"  {'FALSE RIGHT' if verdict else 'FALSE WRONG'}  pred {row['pred'][-200:]!r}  gold {row['gold']!r}"
        )
    print(
        f"  {len(rows) / seconds:,.0f} rows/s"
        + "".join(f", {name} {count}" for name, count in grades.stats.items())
    )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="verify.py",
        description="Is this answer right?",
        epilog="Exit status: 0 equal, 1 different, 2 misuse.",
    )
    parser.add_argument("answers", nargs="*", metavar="ANSWER GOLD", help="two answers to compare")
    parser.add_argument(
        "--jsonl",
        metavar="FILE",
        help='rows {"pred", "gold"[, "equal", "category"]}: share by category, rows that differ, speed',
    )
    parser.add_argument(
        "--timeout", type=float, default=1.0, help="with --jsonl: seconds for one pair (default 1)"
    )
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    if len(arguments) == 2 and not arguments[0].startswith(
        "--"
    ):  # an answer may begin with a minus
        arguments = ["--", *arguments]
    args = parser.parse_args(arguments)
    if args.serve:
        serve(args.serve)
    elif args.jsonl and not args.answers and 0 < args.timeout <= MAX_TIMEOUT:
        try:
            run_rows(args.jsonl, args.timeout)
        except SystemExit as error:
            print(f"verify.py: {error}", file=sys.stderr)
            return 2
    elif args.jsonl or len(args.answers) != 2:
        parser.error("give two answers (ANSWER GOLD), or --jsonl FILE")
    else:
        equal = is_equal(*args.answers)
        print(equal)
        return int(not equal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
