"""Tests of the experiments.   python -m pytest -q experiments: the quick core; -m slow: kills and more fuzz"""

import copy
import functools
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data_prep
import experiments
import t1
import verify
from experiments import bench, costs, gpu, ledger, plan, predict, spending, stress
from test_t1 import HERE, SHARED, SMALL, LiveBytes, config

def program(name, *args):
    """python -m experiments.NAME as a user calls it -> (exit code, stdout, stderr)."""
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer():
    """The embedded tokenizer takes seconds to make: once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "embedded_tokenizer", functools.cache(data_prep.embedded_tokenizer))
        yield


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    """The embedded model with weights scaled up, so that its distributions differ from token to token, and many end
    tokens, so that rows end at different times: (policy, tokenizer, engine, config)."""
    cfg = config("--tiny-layers", "2")
    policy, tokenizer = t1.tiny_policy(cfg)
    torch.manual_seed(6)
    with torch.no_grad():
        for p in policy.parameters():
            if p.dim() > 1:
                p.mul_(6)
    policy.end_ids = list(range(0, len(tokenizer), 23))
    engine = t1.TorchEngine(tokenizer, cfg)
    engine.load(policy)
    return policy, tokenizer, engine, cfg


def few_problems(path):
    """Ten problems as a file, so that an evaluation takes a second."""
    path.write_text("".join(json.dumps(row) + "\n" for row in stress.naming_rows("rl")))
    return path


# --------------------------------------------------------------------------------------------------------------- ledger


UNRESOLVED = "not resolved at this scale"


@pytest.mark.parametrize(
    "differences, sign, expected",
    [
        ([0.05, 0.06, 0.055], +1, "holds"),
        ([0.05, 0.06, 0.055], -1, "does not hold"),
        ([0.05, 0.06, 0.055], 0, "higher"),
        ([-0.05, -0.06, -0.055], 0, "lower"),
        ([0.05, 0.01, 0.06], +1, UNRESOLVED),  # 2.6 standard errors from zero: beyond 1.96, within t(2) = 4.30
        ([0.05], +1, UNRESOLVED),
        ([], +1, UNRESOLVED),
        ([0.0, 0.0], -1, UNRESOLVED),
    ],
)
def test_verdict(differences, sign, expected):
    assert ledger.verdict(differences, sign) == expected


def test_the_quantiles_are_students():
    for dof, quantile in enumerate((*ledger.T95, ledger.T95_MORE), 1):  # P(T <= q) = 0.975, integrating the density
        x = np.linspace(0, quantile, 200_001)
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        density = scale * (1 + x**2 / dof) ** (-(dof + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=3e-4)


def test_correct_only_traces_hold_no_failed_try():
    traces = data_prep.embedded_traces(2000, correct_only=True)
    assert {data_prep.habit_of(t["response"]) for t in traces} == {"jump"}
    assert not any(" not " in t["response"] or "wait" in t["response"] for t in traces)
    assert all(verify.grade([t["response"] for t in traces], [t["answer"] for t in traces]))
    assert {data_prep.habit_of(t["response"]) for t in data_prep.embedded_traces(2000)} == {"jump", "wander", "orderly"}


def ledger_args(out, rows, *more):
    steps = "--sft-steps 2 --sft-batch 4 --rl-steps 2 --prompts 4 --k 2 --max-new 40 --eval-samples 1".split()
    return ["--out", str(out), "--name", "led", "--test", str(rows), *steps, *SMALL, *more]


@pytest.fixture
def quick_runs(monkeypatch):
    """Few traces, and no pictures of the stages."""
    short = data_prep.embedded_traces(400, 1)
    monkeypatch.setattr(data_prep, "embedded_traces", lambda correct_only=False: short)
    monkeypatch.setattr(t1, "draw_steps", lambda *args: None)


def test_the_ledger_end_to_end_with_a_kill(tmp_path, quick_runs, monkeypatch):
    rows = few_problems(tmp_path / "rows.jsonl")
    args = ledger_args(tmp_path, rows, "--seeds", "0,1", "--variants", "k4,cold")
    rl, calls = t1.run_rl, []

    def killed(cfg):  # the third run of RL is cut off in the middle
        calls.append(cfg.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rl(cfg)

    monkeypatch.setattr(t1, "run_rl", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.main(args)
    assert ledger.main(args) == 0
    assert calls == [
        *("base-seed0", "k4-seed0", "cold-seed0", "cold-seed0"),
        *("base-seed1", "k4-seed1", "cold-seed1"),
    ]
    base = tmp_path / "led"
    content = json.loads((base / "ledger.json").read_text())
    expected = [(v, s) for v in ("base", "cold", "k4") for s in (0, 1)]
    assert [(r["variant"], r["seed"]) for r in content["runs"]] == expected
    assert all(r["start"] is not None for r in content["runs"])
    assert [r["variant"] for r in content["variants"]] == ["base", "k4", "cold"]
    of_k4 = json.loads((base / "k4-seed1/rl/config.json").read_text())
    assert of_k4["config"]["k"] == 4 and of_k4["started_from"] == str(base / "base-seed1/sft/checkpoint-2")
    assert [p.name for p in base.rglob("checkpoint-*")] == ["checkpoint-2"] * 10 and not list(base.rglob("trainer"))

    before = {p: p.read_bytes() for p in base.glob("ledger.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    assert ledger.main(["--table", "--out", str(tmp_path), "--name", "led"]) == 0  # from the finished runs alone
    assert {p: p.read_bytes() for p in base.glob("ledger.*")} == before and len(calls) == 7
    falling = [dict(step=i, accuracy=0.9 - 0.01 * i, entropy=0.1) for i in range(8)]  # ends below where it began
    (base / "k4-seed0/rl/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in falling))
    for run in ledger.read_runs(base):
        assert run["fell"] == (run["variant"] == "k4" and run["seed"] == 0) and run["collapsed"] >= run["fell"]


def test_a_run_that_cannot_go_on_is_a_result_and_a_signal_is_not(tmp_path, quick_runs, monkeypatch, capsys):
    rows = few_problems(tmp_path / "rows.jsonl")
    args = ledger_args(tmp_path, rows, "--seeds", "0", "--variants", "hot")
    with monkeypatch.context() as patch:
        patch.setattr(t1.Interrupt, "received", lambda self: "SIGTERM")  # the stage saves and returns after one step
        assert ledger.main(args) == 0 and "the same command resumes" in capsys.readouterr().out
    assert len(t1.read_log(tmp_path / "led/base-seed0/sft/metrics.jsonl")) == 1
    assert not (tmp_path / "led/ledger.json").exists()
    rl = t1.run_rl

    def fails(cfg):
        if cfg.name.startswith("hot"):
            raise t1.Stop("the loss is not finite")
        rl(cfg)

    monkeypatch.setattr(t1, "run_rl", fails)
    assert ledger.main(args) == 0
    assert len(t1.read_log(tmp_path / "led/base-seed0/sft/metrics.jsonl")) == 2
    assert json.loads((tmp_path / "led/hot-seed0/stopped.json").read_text())["reason"] == "the loss is not finite"
    assert "| hot | rl_lr=0.001 |  |  |  |  |  | 1/1 |" in (tmp_path / "led/ledger.md").read_text()


def test_the_ledger_counts_pairs_and_collapses():
    same = dict(stopped=False, length=50, overlong=0.1, entropy=0.1, start=0.4, collapsed=False)
    runs = [same | dict(variant="base", seed=s, pass_at_1=v) for s, v in enumerate((0.7, 0.8, 0.75))]
    runs += [same | dict(variant="k4", seed=s, pass_at_1=v) for s, v in enumerate((0.6, 0.71, 0.65))]
    runs += [same | dict(variant="t1.0", seed=0, pass_at_1=0.2, collapsed=True)]
    runs += [dict(variant="t1.0", seed=1, stopped=True, collapsed=True)]
    rows, claims = ledger.ledger_of(runs)
    by = {r["variant"]: r for r in rows}
    assert by["base"]["pass_at_1"] == pytest.approx([0.75, 0.05 / 3**0.5])
    assert by["k4"]["gain"] == pytest.approx([-0.29 / 3, np.std([0.1, 0.09, 0.1], ddof=1) / 3**0.5])
    assert (by["t1.0"]["collapsed"], by["t1.0"]["runs"], by["t1.0"]["each"]) == (2, 2, [0.2])
    assert {c["variant"]: c["verdict"] for c in claims} == {"k4": "holds", "t1.0": UNRESOLVED}
    assert "| t1.0 | temperature=1.0 | 20.0 | -50.0 | 50 | 0.100 | 10.0 | 2/2 |" in ledger.variant_table(rows)
    assert "| k4 - base | 3 | -9.7±0.3 | holds |" in ledger.claim_table(claims)


def test_every_variant_is_a_valid_run():
    for name, variant in ledger.VARIANTS.items():
        configs = [ledger.stage_config(stage, variant.changes, []) for stage in ("sft", "rl")]
        for cfg in configs:
            t1.check_config(cfg)
        for field, value in variant.changes.items():
            assert value in [getattr(cfg, field) for cfg in configs]
        assert (variant.against in ledger.VARIANTS and variant.claim) or name == "base"


# ----------------------------------------------------------------------------------------------------------------- plan


def plan_config(*args):
    return config("--tiny-layers", "2", "--tiny-width", "64", "--max-new", "512", *args)


SIZES = [  # layers, width, vocabulary (0: the tokenizer's), tokens of a row, tokens of a micro-batch
    (2, 64, 0, 128, 1024),
    (4, 128, 0, 128, 2048),
    (3, 256, 0, 256, 2048),
    (2, 64, 0, 64, 4096),
    (6, 128, 0, 512, 1024),
    (2, 128, 20_000, 64, 512),
    (1, 64, 50_000, 16, 512),
]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("layers, width, vocabulary, length, micro", SIZES)
def test_plan_is_the_measured_memory(layers, width, vocabulary, length, micro, checkpointing):
    """One rank, float32: the most bytes of tensors that live during log-probs of the anchor, gradient (several
    micro-batches) and update."""
    shape = ["--tiny-layers", layers, "--tiny-width", width]
    cfg = plan_config(*shape, "--micro-tokens", micro, "--checkpointing", checkpointing)
    policy = small_policy(cfg, vocabulary)
    anchor, optimizer = copy.deepcopy(policy).requires_grad_(False), t1.make_optimizer(policy, cfg)
    rows = [([1], [2 + (7 * i + j) % 200 for j in range(length - 1)]) for i in range(2 * micro // length)]
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    with LiveBytes(*policy.parameters(), *anchor.parameters(), *state) as live:
        t1.response_logprobs(anchor, rows, cfg, 1.0, 0.0)
        t1.accumulate_gradient(policy, rows, torch.ones(len(rows)), torch.full((len(rows),), 1e-3), cfg, 1e-3)
        t1.update(policy, optimizer, 1e-4, cfg)
    planned = plan.memory_plan(plan.shape_of(policy.lm.config), 1, max(length, micro), cfg)
    assert planned["parameters"] == sum(p.numel() for p in policy.parameters())
    assert 0.95 * live.peak < planned["update"] < 1.1 * live.peak


def small_policy(cfg, vocabulary):
    """The embedded model, its vocabulary padded to `vocabulary` rows that are all used."""
    policy, tokenizer = t1.tiny_policy(cfg)
    if vocabulary:
        policy.lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        policy.vocabulary = vocabulary
    return t1.shard(policy, tokenizer, cfg)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_activations_are_what_autograd_saves(dtype):
    """Of each layer, by torch's hooks on saved tensors, distinct storages that are no parameters: a model wholly in the
    type of the run."""
    rows = [([1], list(range(2, 129))) for _ in range(8)]
    n = sum(len(y) for _, y in rows)  # tokens that go in: the last one predicts nothing

    def saved(layers):
        deep = plan_config("--tiny-layers", layers)
        policy, _ = t1.tiny_policy(deep)
        policy = policy.to(getattr(torch, dtype))
        weights, kept = {p.untyped_storage()._cdata for p in policy.parameters()}, {}

        def note(t):
            kept.setdefault(t.untyped_storage()._cdata, (t.untyped_storage().nbytes(), t))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden = policy(t1.pack(rows, policy.device))
        assert hidden.shape[0] == n
        return sum(size for key, (size, _) in kept.items() if key not in weights)

    def planned(layers):
        shape = costs.Shape(64, layers, 192, 4, 2, 16, 473, True)
        return plan.memory_plan(shape, 1, n, plan_config("--dtype", dtype))["activations"]

    assert planned(3) - planned(2) == pytest.approx(saved(3) - saved(2), rel=0.02)


H100 = costs.MACHINES["h100"]
LLAMA_72B = costs.Shape(8192, 80, 29568, 64, 8, 128, 152064, False)


def large_plan(name, gpus, *args):
    """-> Config, memory plan and seconds of a step of 32 x 64 responses of 3,200 tokens in the mean, 8,192 at most."""
    cfg, shape = config("--preset", "qwen2.5-14b", *args), plan.SHAPES[name]
    memory = plan.memory_plan(shape, gpus, 16384, cfg, H100)
    lengths = costs.response_lengths(32, 64, 3200, 0.05, 8192)
    return cfg, memory, costs.step_seconds(shape, gpus, lengths, 200, memory, cfg, H100)


def test_plan_of_the_papers_models():
    for name, billions in {"zai-org/glm-4-9b-hf": 9.40, "Qwen/Qwen2.5-14B": 14.77, "Qwen/Qwen2.5-32B": 32.76}.items():

        def of(gpus, *args):
            return plan.memory_plan(plan.SHAPES[name], gpus, 16384, config("--preset", "qwen2.5-14b", *args), H100)

        eight, parked = of(8, "--offload", "false"), of(8)
        assert eight["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert eight["weights"] == 4 * eight["parameters"] / 8
        assert eight["optimizer"] == 2 * eight["anchor"] == 2 * eight["weights"]
        assert of(64)["update"] < parked["update"] < of(8, "--checkpointing", "false")["update"]
        assert of(8, "--anchor", "none")["update"] == parked["update"] == eight["update"] - eight["anchor"]
        assert parked["cache"] > eight["cache"]  # the engine gets what the anchor leaves
        held = eight["weights"] + eight["anchor"]
        gathered = eight["rollout"] - held - eight["share"] * H100.card
        assert eight["share"] == t1.engine_share(H100.card, int(held), int(gathered))
        assert eight["tp"] == t1.engine_ranks(2 * eight["parameters"], H100.card, 8)


def test_a_step_of_the_14b_model_on_eight_gpus_and_the_32b_model_on_sixteen():
    """The bar of the plan, by its own model."""
    _, _, seconds = large_plan("Qwen/Qwen2.5-14B", 8)
    assert set(seconds) == set(plan.PHASES) and 400 < sum(seconds.values()) <= 570
    cfg, memory, _ = large_plan("Qwen/Qwen2.5-32B", 16)
    assert memory["update"] < H100.usable * H100.card and memory["cache"] > 8 * (cfg.max_prompt + cfg.max_new)


def test_simulation_gives_the_numbers_of_another_one():
    """Seconds of a rollout of the 14B model with engines on two GPUs each, as another scheduler simulation had them:
    the mean of engines that get whole prompts, the slowest where samples are dealt, and that with 0.8 of the card."""
    lengths, shape = costs.response_lengths(32, 64, 3200, 0.05, 8192), plan.SHAPES["Qwen/Qwen2.5-14B"]
    engine = costs.decode_costs(shape, 2, H100)

    def seconds(share, part):
        room = share * H100.card - 14.77e9 - H100.own
        prompts, rows = np.repeat(np.arange(len(part)), part.shape[1]), part.ravel()
        return costs.simulate(rows, prompts, 200, 2 * room / plan.cache_bytes(shape), 1024, engine)

    assert np.mean([seconds(0.5, lengths[i::4]) for i in range(4)]) == pytest.approx(357, rel=0.1)
    assert max(seconds(0.5, lengths[:, i::4]) for i in range(4)) == pytest.approx(376, rel=0.1)
    assert max(seconds(0.8, lengths[:, i::4]) for i in range(4)) == pytest.approx(293, rel=0.1)


def one_by_one(lengths, prompts, prompt, cache, requests, c):
    """The scheduler of `costs.simulate`, a step at a time and without its arithmetic -> seconds, rows read in again."""
    waiting, running, done, seconds, again, full = list(range(len(lengths))), [], [0] * len(lengths), 0.0, 0, False
    while waiting or running:
        def used():
            return sum(done[i] + 8 for i in running) + prompt * len({prompts[i] for i in running})

        while waiting and not full and len(running) < requests:
            new = done[waiting[0]] + (0 if prompts[waiting[0]] in [prompts[i] for i in running] else prompt)
            if used() + new + 16 > cache:
                break
            again += done[waiting[0]] > 0
            running.append(waiting.pop(0))
            seconds += c.prefill * new
        if used() + len(running) > cache:  # no room for a token of each
            waiting.insert(0, running.pop())
            full = True
            continue
        seconds += c.step + max(c.weights, len(running) * c.product) + len(running) * c.row
        for i in running:
            seconds += c.cached * (done[i] + prompt)
            done[i] += 1
        ended = [i for i in running if done[i] == lengths[i]]
        running = [i for i in running if i not in ended]
        full = full and not ended
    return seconds, again


@pytest.mark.parametrize("seed", range(5))
def test_simulate_is_a_scheduler_of_single_steps(seed):
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(1, 60, 40), np.repeat(np.arange(10), 4)
    c = costs.Decode(step=1.0, weights=0.5, product=0.07, row=0.01, cached=0.001, prefill=0.002)
    for cache, requests in ((1e6, 1024), (1e6, 7), (400, 1024), (150, 5)):
        expected, again = one_by_one(lengths.tolist(), prompts.tolist(), 12, cache, requests, c)
        assert costs.simulate(lengths, prompts, 12, cache, requests, c) == pytest.approx(expected, rel=1e-9)
        assert (again > 0) == (cache == 400 or (cache == 150 and again > 0))
    assert costs.simulate(lengths, prompts, 12, 20, 1024, c) == math.inf  # not one row fits


def test_lengths_have_the_mean_and_the_share_that_is_cut():
    for mean, cut, longest in ((3200, 0.05, 8192), (64, 0.1, 160), (112, 0.77, 128)):
        lengths = costs.response_lengths(400, 50, mean, cut, longest)
        assert lengths.shape == (400, 50) and lengths.min() >= 1 and lengths.max() == longest
        assert lengths.mean() == pytest.approx(mean, rel=0.01)
        assert (lengths == longest).mean() == pytest.approx(cut, abs=0.03)
        assert np.std(np.log(lengths).mean(1)) > 3 * np.std(np.log(lengths)) / 50**0.5  # prompts differ


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flop_of_the_update_are_those_of_torchs_counter(checkpointing):
    """Of the products. What it does not count on a CPU is added: attention by a loop over positions, and the head's
    gradient, an addmm_, by hand."""
    cfg = plan_config("--tiny-layers", 3, "--checkpointing", checkpointing)
    policy, tokenizer = t1.tiny_policy(cfg)
    policy, shape, lengths = t1.shard(policy, tokenizer, cfg), plan.shape_of(policy.lm.config), np.full(4, 120)
    rows = [([1] * 8, list(range(2, 122))) for _ in lengths]
    attention = 4 * 3 * sum(4 * 64 * position for position in range(1, 129))  # two products of 2 x 64 FLOP a position
    head_gradient = 2 * 4 * 120 * policy.vocabulary * 64
    forward, gradient = costs.update_flop(shape, lengths, 8, cfg)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.response_logprobs(policy, rows, cfg)
    assert counter.get_total_flops() + attention == pytest.approx(forward, rel=0.015)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.accumulate_gradient(policy, rows, torch.ones(4), torch.ones(4), cfg)
    attention *= 3.5 + (checkpointing == "true")
    assert counter.get_total_flops() + attention + head_gradient == pytest.approx(gradient, rel=0.015)


def test_decoding_is_as_fast_as_the_measurement_that_it_comes_from():
    """Qwen2.5-72B on two H100: 30.9 ms a token of one row."""
    c = costs.decode_costs(LLAMA_72B, 2, H100)
    assert 1e3 * (c.step - H100.decode + max(c.weights, c.product) + c.row) == pytest.approx(30.9, rel=0.02)


def test_traffic_counts_where_it_is_longer_than_the_computation():
    cfg, memory, _ = large_plan("Qwen/Qwen2.5-14B", 16)
    lengths, shape = np.full((32, 64), 100), plan.SHAPES["Qwen/Qwen2.5-14B"]

    def gradient(**constants):
        machine = costs.Machine(**constants)
        return costs.step_seconds(shape, 16, lengths, 200, memory, cfg, machine)["gradient"]

    micro = math.ceil(32 * 64 * 300 / 16 / cfg.micro_tokens)
    slow = micro * 8 * memory["parameters"] * 15 / 16 / 1e9  # two gathers in bfloat16, a sum in float32
    assert gradient(network=1e9) == pytest.approx(slow)
    assert gradient(network=1e12) == gradient(network=1e13) < slow


def test_plan_command(talkative, tmp_path, capsys):
    few = "--prompts 4 --k 4 --max-new 1024".split()
    assert plan.main(few) == 0
    out = capsys.readouterr().out
    assert all(out.count(name.split("/")[1]) == 8 for name in plan.SHAPES)  # 4 numbers of GPUs, two tables
    assert "bfloat16, checkpointing, compile, offload, anchor ema" in out and out.splitlines()[-1].split()[2] == "400"
    talkative[0].lm.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--gpus", "1,2", "--set", "efficiency=0.2,requests=64", *few]
    assert plan.main(model) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out if line.startswith("model")] == [
        [name, gpus] for _ in range(2) for name, gpus in (("model", "GPUs"), ("model", "1"), ("model", "2"))
    ]
    rows = [dict(step=i, length=900.0 if i < 10 else 320.0, overlong=0.1) for i in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps(dict(config=dict(max_new=1024))))
    assert plan.main([*model, "--lengths", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "320"  # of the last 20 steps
    assert plan.main(["--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--model {tmp_path}" in err


@pytest.mark.slow
@pytest.mark.parametrize("job, engine", [(job, engine) for job in ("tiny", "bench") for engine in ("torch", "vllm")])
def test_phases_are_predicted_within_a_quarter(job, engine):
    """In CPU seconds, with constants measured in turn with the steps; phases below 2 % of a step are left out."""
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        pytest.skip("the vLLM engine is not installed here")
    code, out, err = program("predict", "--job", job, "--engine", engine)
    rows = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in (*plan.PHASES, "step")]
    measured = {name: float(seconds) for name, seconds, *_ in rows}
    assert code == 0 and set(measured) == {*plan.PHASES, "step"}, err
    for name, seconds, predicted, *_ in rows:
        if float(seconds) > 0.02 * measured["step"]:
            assert float(predicted) == pytest.approx(float(seconds), rel=0.25), out


# ---------------------------------------------------------------------------------------------------------------- bench


TINY_BENCH = "--prompts 2 --k 2 --max-new 8 --tiny-layers 1 --tiny-width 32 --sft-batch 4".split()


def test_bench_command(capsys):
    """At a size of seconds; where TRL is installed its lines are printed, too."""
    assert bench.main(["--pairs", "1", *TINY_BENCH]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"rollout", "anchor", "gradient", "update", bench.RL, bench.SFT} <= lines
    assert "peak memory of the process" in out
    with_trl = "RLOOTrainer: trained tokens per CPU second" in out and "SFTTrainer, packing" in out
    assert ("TRL is not installed" in out) != with_trl


def test_the_benchs_job_is_trls(tmp_path):
    """The values that docs/speed.md names, and the very step of t1.py: a policy that moves."""
    cfg, sft_cfg = (bench.job_config(stage, []) for stage in ("rl", "sft"))
    assert (cfg.prompts, cfg.k, cfg.max_new, cfg.temperature, cfg.rl_lr) == (16, 16, 128, 1.0, 1e-4)
    assert (sft_cfg.sft_batch, sft_cfg.sft_lr, sft_cfg.tiny_width) == (64, 1e-4, 256)
    options = "--prompts 2 --k 2 --max-new 200 --tiny-layers 1 --tiny-width 32 --sft-batch 4".split()
    job = bench.make_job(str(tmp_path), 1, *(bench.job_config(stage, options) for stage in ("rl", "sft")))
    before = [p.clone() for p in job.policy.parameters()]
    timing = bench.our_rl_step(job, 0)
    assert 4 <= timing.tokens < 800 and set(timing.seconds) == set(plan.PHASES)
    assert any(not torch.equal(p, q) for p, q in zip(before, job.policy.parameters()))
    cpu = sum(seconds[0] for seconds in timing.seconds.values())
    assert timing.rate(0) == pytest.approx(timing.tokens / cpu)
    assert len(job.policy.end_ids) > 1 and bench.our_sft_step(job, 0).tokens > 0


SMALL_SHAPE = costs.Shape(64, 2, 128, 4, 2, 16, 512, True)
SMALL_SIZES = gpu.Sizes(
    device="cpu", product=64, copied=2**16, rows=3, row=48, stack=SMALL_SHAPE, head=(32, 64, 2048),
    models=(("small", SMALL_SHAPE),), samples=4, new=8, steps=(2, 2),
)  # fmt: skip


def test_what_one_gpu_does_is_measured_by_functions_that_run_here(tmp_path, monkeypatch, capsys):
    """All but the stages, and --compile; an item that fails is a row, the others go on, the exit code says so."""
    items = gpu.items_of(SMALL_SIZES)
    left_out = {"tiny, torch engine": items.pop("tiny, torch engine"), "x": items.pop("update at small, --compile")}
    assert left_out["x"] == (gpu.measure_update, "small", True) and len(items) == 5
    monkeypatch.setattr(gpu, "items_of", lambda sizes: items)
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 0
    out, rows = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())["results"]
    assert set(rows) == set(items) and all(name in out for name in items)
    compared = rows["packed rows and gradient against float32"]
    for what in ("log-prob gap", "gradient"):
        assert 0 < compared[f"{what}, ours"] < 1.5 * compared[f"{what}, library"]
    assert rows["update at small"]["parked bits"] == "same"
    items["card"] = (lambda sizes: 1 / 0,)
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 1
    rows = json.loads((tmp_path / "numbers.json").read_text())["results"]
    assert rows["card"] == dict(failed="ZeroDivisionError: division by zero")
    assert "ms" in rows["head, 32 positions, D 64, V 2,048"]


def test_packed_rows_that_see_each_other_are_further_from_float32_than_the_library(monkeypatch):
    """The comparison can fail: with one row end forgotten, ours is far off."""
    ends = t1.pack

    def forgetful(rows, device):
        packed = ends(rows, device)
        packed.to_grid, packed.to_packed = packed.to_grid.roll(1), packed.to_packed
        return packed

    monkeypatch.setattr(t1, "pack", forgetful)
    compared = gpu.compare_with_float32(SMALL_SIZES)
    assert compared["log-prob gap, ours"] > 5 * compared["log-prob gap, library"]


def test_an_older_varlen_attn_gets_as_many_key_value_heads_as_queries():
    def older(q, k, v, *lengths, scale):
        assert q.shape == k.shape == v.shape and (lengths, scale) == ((1, 2), 0.5)
        return k

    q, k = torch.zeros(3, 4, 2), torch.arange(12.0).view(3, 2, 2)
    repeated = gpu.with_repeated_heads(older)(q, k, k, 1, 2, scale=0.5, enable_gqa=True)
    assert all(torch.equal(repeated[:, head], k[:, head // 2]) for head in range(4))  # a group's heads side by side


@pytest.mark.slow
def test_gpu_bench_from_end_to_end_on_a_cpu(tmp_path):
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 0
    row = json.loads((tmp_path / "numbers.json").read_text())["results"]["tiny, torch engine"]
    assert row["sft tokens/s"] > 0 and row["rl tokens/s"] > 0 and row["engine gap, nats"] < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_bench_without_a_gpu_is_one_line(capsys):
    assert bench.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "t1.py: --gpu: torch sees no GPU here\n"


# ------------------------------------------------------------------------------------------------------------- spending


def test_majority_is_by_equality_and_a_tie_goes_to_the_first_answer():
    assert spending.majority(["1/2", "3", "0.5", "3", "\\frac12"]) == 0  # three spellings of one half
    assert spending.majority(["7", "3", "3", "7"]) == 0
    assert spending.majority([None, "3", None, "7"]) == 1 and spending.majority([None, None]) is None
    rng = random.Random(0)
    for _ in range(300):  # brute force on integers: count, then the first to appear among the most frequent
        n, k = rng.randint(1, 9), rng.randint(1, 4)
        answers = [rng.choice([None, "1", "2", "3"]) for _ in range(n)]
        right = [a == "2" for a in answers]
        winners = []
        for group in (answers[i : i + k] for i in range(0, n, k) if i + k <= n):
            most = max((group.count(a) for a in group if a is not None), default=0)
            winners.append(next((a for a in group if a is not None and group.count(a) == most), None))
        if winners:
            assert spending.maj_at_k(answers, right, k) == sum(w == "2" for w in winners) / len(winners)


def test_budget_forcing_works_on_ids(talkative):
    """Every thought has exactly the budget's tokens, begins with its own and waits where it would have ended; a cut
    never re-encodes."""
    _, tokenizer, engine, cfg = talkative

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def force(engine, rollouts):
        return spending.force_budget(engine, rollouts, 60, ", wait\\n", cfg)

    question, wait = encode("Find n.\n"), encode(", wait\n")
    thought = encode("<think>\n12 mod 5 = 2 not 3, wait\n13 mod 5 = 3 yes\n")
    ended = thought + encode("</think>\nThe answer is \\boxed{13}.") + [tokenizer.eos_token_id]
    endless = encode("<think>\n" + "7 mod 5 = 2 not 3, wait\n" * 3)
    rollouts = [
        t1.Rollout(question, ended, [], True),
        t1.Rollout(question, endless, [], False),
        t1.Rollout(question, thought + [tokenizer.eos_token_id], [], True),
    ]
    assert spending.before_end(ended, tokenizer) == thought and spending.before_end(thought, tokenizer) == thought
    assert spending.before_end(encode("so</th") + encode("ink> 5"), tokenizer) == encode("so")  # spelled otherwise
    forced = force(engine, rollouts)
    assert [len(r.ids) for r in forced] == [60] * 3 and not any(r.finished for r in forced)
    assert not any("</think>" in tokenizer.decode(r.ids) or tokenizer.eos_token_id in r.ids for r in forced)
    for r, start in zip(forced, (thought + wait, endless, thought + wait)):
        assert r.ids[: len(start)] == start and r.prompt == question
    assert forced == force(engine, rollouts)

    class Ends:  # an engine whose every answer is the end of the thought
        tokenizer = engine.tokenizer

        def generate(self, prompts, samples, seeds, room, temperature, min_p=0.0):
            return [t1.Rollout(p, ended[len(thought) :], [], True) for p in prompts]

    assert force(Ends(), rollouts[:1])[0].ids == (thought + wait * 60)[:60]
    prefix = encode("</think>\nThe answer is \\boxed{")
    for budget, ids in ((20, forced[0].ids[:20]), (60, forced[0].ids)):
        (cut, *_) = t1.cut_thoughts(engine, tokenizer, forced, budget, cfg)
        assert cut.ids[: budget + len(prefix)] == ids + prefix


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """A run of the embedded model, SFT for 250 steps and evaluated on ten problems with 2 samples each."""
    base = stress.make_guess(tmp_path_factory.mktemp("evaluated"))
    common = ["--out", str(base), "--test", str(base / "ten.jsonl"), "--max-new", "24"]
    assert t1.main(["--stage", "eval", *common, "--eval-samples", "2", "--budgets", "4,12,24"]) == 0
    return base


def test_spending_reads_the_run_and_resumes(evaluated, tmp_path):
    args = ["--out", str(tmp_path), "--samples", "4"]
    shutil.copytree(evaluated / "tiny", tmp_path / "tiny")
    assert spending.main(args) == 0
    folder = tmp_path / "tiny/eval"
    content = json.loads((folder / "spending.json").read_text())
    results = json.loads((folder / "results.json").read_text())["checkpoints"]
    (test,) = content["tests"]
    assert test["cut"] == results[-1]["scaling"] and content["name"] == results[-1]["name"]
    assert [point[0] for point in test["forced"]] == [4, 12, 24] and test["problems"] == 10
    assert [point[0] for point in test["majority"]] == [1, 2, 4]
    assert test["majority"][2][3] == pytest.approx(4 * test["majority"][0][3])
    tokens = [point[3] for point in test["forced"]]
    assert all(b <= t <= b + 40 for b, t in zip((4, 12, 24), tokens)), tokens  # the thought, and an answer
    picture = (folder / "spending.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"

    kept = (folder / "spending.jsonl").read_bytes()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert len(rows) == 40 and len({(r["number"], r["sample"]) for r in rows}) == 40
    first = np.mean([r["right"] for r in rows])
    assert test["majority"][0][1] == pytest.approx(first)
    (folder / "spending.jsonl").write_bytes(kept[: len(kept) // 2])  # what a kill leaves: a cut line at the end
    before = (folder / "spending.json").read_bytes()
    assert spending.main(args) == 0
    assert (folder / "spending.json").read_bytes() == before and (folder / "spending.png").read_bytes() == picture
    assert len(t1.read_log(folder / "spending.jsonl")) == 40

    assert spending.main(["--out", str(tmp_path), "--samples", "2"]) == 0  # the evaluation's own responses will do
    (test,) = json.loads((folder / "spending.json").read_text())["tests"]
    assert test["majority"][0][1] == pytest.approx(results[-1]["pass_at_1"])


# --------------------------------------------------------------------------------------------------------------- stress


def stress_program(what, count, *more):
    """In a process of its own: kills forks, fuzz sets timers."""
    code, out, err = program("stress", what, count, *more)
    assert code == 0, out[-1000:] + err[-3000:]
    return out


def test_every_phase_can_be_killed():
    for functions in stress.PHASES.values():
        for path in functions:
            stress.find(path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, count", [(1, 12), (2, 5)])
def test_killed_and_resumed_is_the_same_run(ranks, count):
    """`python -m experiments.stress kills 300` is the long form."""
    assert f"{count} kills on {ranks} rank(s)" in stress_program("kills", count, "--ranks", ranks, "--seed", 5)


@pytest.mark.parametrize("count", [38, pytest.param(1000, marks=pytest.mark.slow)])
def test_fuzz_no_input_makes_a_traceback_a_hang_or_half_an_output(count):
    out = stress_program("fuzz", count, "--seed", 1)
    assert f"{count} cases, 0 failed, seed 1" in out
    assert all(f"{kind:10}" in out for kind in stress.KINDS)


def test_fuzz_reports_what_fails(tmp_path, monkeypatch):
    def broken(rng, folder, base):
        (folder / "rows").write_text("x")
        return folder / "rows", [lambda: 1 / 0]

    def silent(rng, folder, base):
        (folder / "rows").write_text("x")
        return folder / "rows", [refuse_without_a_name]

    def refuse_without_a_name():
        raise t1.Misuse("bad")

    monkeypatch.setattr(stress, "good_files", lambda folder: {})
    monkeypatch.setattr(stress, "KINDS", {"broken": (broken, 1), "silent": (silent, 1)})
    counts, failures = stress.run_fuzz(range(4), 0, tmp_path)
    assert counts == {("broken", "FAILED"): 2, ("silent", "FAILED"): 2}
    assert "ZeroDivisionError" in failures[0][2] and "does not name the file" in failures[1][2]


# -------------------------------------------------------------------------------------------------------- command lines


PROGRAMS = dict(ledger=ledger, bench=bench, plan=plan, predict=predict, spending=spending, stress=stress)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_every_option(name, capsys):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[name].main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and f"python -m experiments.{name}" in out and "default" in out


def test_options_go_to_the_stages_that_read_them():
    options = "--seed 1 --kl-center --k=4 --no-kl-center --sft_steps 3 --max-new 24 --budgets 8,24".split()
    common = "--seed 1 --max-new 24".split()
    assert experiments.stage_options("sft", options) == [*common[:2], "--sft_steps", "3", *common[2:], "--stage", "sft"]
    assert experiments.stage_options("eval", options) == [*common, "--budgets", "8,24", "--stage", "eval"]
    of_rl = t1.parse_args(experiments.stage_options("rl", options))
    assert (of_rl.k, of_rl.kl_center, of_rl.sft_steps, of_rl.max_new) == (4, False, 0, 24)


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("ledger", "--seeds 0,x", "--seeds"),
        ("ledger", "--variants base,nothing", "no variant 'nothing'"),
        ("ledger", "--k 1 --out OUT", "leave-one-out"),
        ("ledger", "--table --out OUT", "no finished run"),
        ("ledger", "--no-such-option", "--no-such-option"),
        ("bench", "--pairs 0", "--pairs"),
        ("bench", "--prompts many", "--prompts"),
        ("plan", "--gpus 0", "--gpus"),
        ("plan", "--vllm-tp 3", "--vllm-tp"),
        ("plan", "--set efficiency=fast", "--set"),
        ("plan", "--overlong 1", "--overlong"),
        ("plan", "--length 9000", "--length"),
        ("plan", "--lengths OUT", "--lengths"),
        ("plan", "--preset tiny", "--model"),
        ("predict", "--steps 0", "--steps"),
        ("spending", "--samples 0 --out OUT", "--samples"),
        ("spending", "--out OUT", "run python t1.py --stage eval first"),
        ("stress", "", "required"),
        ("stress", "kills", "required"),
        ("stress", "burn 3", "burn"),
        ("stress", "fuzz 0", "above 0"),
    ],
)
def test_misuse_is_one_line(name, args, says, tmp_path, capsys):
    assert PROGRAMS[name].main(args.replace("OUT", str(tmp_path / "out")).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and not (tmp_path / "out").exists()

# --- second_hour ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data/math500.jsonl.gz").exists(), reason="no real MATH rows beside this checkout")
def test_a_users_own_model_and_data_go_through_by_readmes_commands(tmp_path):
    rows, test = SHARED / "data/math_train.jsonl.gz", SHARED / "data/math500.jsonl.gz"
    command = [sys.executable, "-m", "experiments.second_hour", "--rows", rows, "--test", test, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "every step did what its user means" in done.stdout, done.stdout + done.stderr
