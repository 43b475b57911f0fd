"""Tests of the experiments.   python -m pytest -q experiments: the quick core; -m slow: kills and more fuzz"""

import copy
import dataclasses
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
from experiments import bench, claims, costs, gpu, ledger, plan, predict, spending, stress
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
        patch.setattr(
            data_prep, "embedded_tokenizer", functools.cache(data_prep.embedded_tokenizer)
        )
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


def test_the_p_value_is_students():
    for dof in range(1, 11):  # two tails: 1 minus the integral of the density from -t to t
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        for t in (0.3, 1.0, 2.5, 8.0):
            x = np.linspace(-t, t, 200_001)
            inside = np.trapezoid(scale * (1 + x**2 / dof) ** (-(dof + 1) / 2), x)
            assert (
                claims.p_value(-t, dof)
                == claims.p_value(t, dof)
                == pytest.approx(1 - inside, abs=1e-8)
            )


def test_the_quantiles_are_those_of_the_printed_tables():
    printed = {
        1: 12.706,
        2: 4.303,
        3: 3.182,
        4: 2.776,
        5: 2.571,
        6: 2.447,
        7: 2.365,
        10: 2.228,
        30: 2.042,
    }
    for dof, quantile in printed.items():
        assert claims.t_quantile(dof) == pytest.approx(quantile, abs=5e-4)
    assert claims.t_quantile(4, 0.01) == pytest.approx(4.604, abs=5e-4)


def test_holm_is_the_step_down_procedure():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # by hand
    assert claims.holm([]) == [] and claims.holm([0.9, 0.8]) == [1.0, 1.0]
    rng = random.Random(0)
    for _ in range(200):
        values = [
            rng.choice((0.001, 0.01, 0.02, 0.03, rng.random())) for _ in range(rng.randrange(1, 7))
        ]
        adjusted, level = claims.holm(values), rng.random() / 5
        rejected = (
            set()
        )  # reject the smallest p while it is at most level / (number of hypotheses left)
        while len(rejected) < len(values):
            left = [i for i in range(len(values)) if i not in rejected]
            smallest = min(left, key=values.__getitem__)
            if values[smallest] > level / len(left):
                break
            rejected.add(smallest)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


@pytest.mark.parametrize(
    "mean, sign, p, expected",
    [
        (0.05, 1, 0.04, "yes"),
        (0.05, -1, 0.04, "no"),
        (0.05, 0, 0.04, "higher"),
        (-0.05, 0, 0.04, "lower"),
        (-0.05, -1, 0.04, "yes"),
        (0.05, 1, 0.06, "open"),
    ],
)
def test_verdict(mean, sign, p, expected):
    assert claims.verdict(mean, sign, p) == expected


def test_statistics_of_differences():
    found = claims.statistics([0.05, 0.01, 0.06])  # t = 2.619: beyond 1.96, within t(2) = 4.303
    assert (found["n"], found["mean"], found["sd"]) == (
        3,
        pytest.approx(0.04),
        pytest.approx(0.0264575),
    )
    assert found["half"] == pytest.approx(4.3027 * 0.0264575 / 3**0.5, rel=1e-4)
    assert found["p"] == pytest.approx(0.1201, abs=1e-4)
    same, none = claims.statistics([0.5, 0.5]), claims.statistics([0.0, 0.0])
    assert (same["p"], same["half"], none["p"]) == (0.0, 0.0, 1.0)
    n = claims.seeds_for(0.03, 0.02)
    wide, narrow = (claims.t_quantile(m - 1) * 0.03 / m**0.5 for m in (n - 1, n))
    assert narrow <= 0.02 < wide


def a_run(variant, seed, **more):
    """A record as `claims.record_of` makes it, with values that no test looks at."""
    steps = {column: [0.1] * 3 for column in claims.STEPS}
    values = dict(
        pass_at_1=0.5,
        pass_at_8=0.7,
        length=50,
        corrected=0.2,
        jump=0.1,
        overlong=0.1,
        repetition=0.0,
    )
    values |= dict(distance=1.0, scaling=[[32, 0.2], [128, 0.4], [320, 0.5]], steps=steps)
    values |= dict(noise={"4": 1.0, "16": 0.25, "64": 0.0625})
    values |= dict(spread={"0.8": 0.1, "1.1": 0.2, "1.3": 0.4, "1.3, min-p 0.05": 0.1})
    return dict(variant=variant, seed=seed) | values | more


def test_differences_are_paired_by_seed():
    values = {"base": {0: 0.7, 1: 0.8, 3: 0.9}, "k4": {3: 0.6, 1: 0.75, 2: 0.1, 0: 0.2}}
    records = [
        a_run(name, seed, pass_at_1=v) for name, of in values.items() for seed, v in of.items()
    ]
    records[-1] = dict(variant="k4", seed=0, stopped="the loss is not finite")
    test = claims.Test("pass@1, points", "k4", "base", -1)
    assert claims.differences(records, test) == pytest.approx([-0.05, -0.3])
    alone = claims.Test("tokens", "base", "", 1)
    assert claims.differences(records, alone) == [50, 50, 50]
    found = claims.answers(records)
    assert (
        found[claims.pays("k4", "base", -1)]["n"] == 2
        and claims.pays("t0.8", "base", -1) not in found
    )
    smallest = min(found.values(), key=lambda answer: answer["p"])
    assert smallest["holm"] == pytest.approx(len(found) * smallest["p"])
    assert "k4" in claims.open_variants(records) and "t0.8" in claims.open_variants(records)


def test_entropy_is_compared_at_equal_accuracy():
    fast = a_run("base", 0, steps=dict(accuracy=[0.2, 0.6, 0.8], entropy=[1.0, 0.6, 0.4]))
    slow = a_run("alpha0", 0, steps=dict(accuracy=[0.3, 0.4, 0.5], entropy=[0.9, 0.8, 0.2]))
    # the weaker reaches 0.5 at its end, with 0.2; the other three quarters of the way from 0.2 to 0.6, with 0.7
    assert claims.entropy_difference(fast, slow) == pytest.approx(0.5)
    assert claims.entropy_difference(slow, fast) == pytest.approx(-0.5)


def test_measures_of_a_record():
    of = {name: measure.of for name, measure in claims.MEASURES.items()}
    record = a_run("beta5e-2-uncentred", 0, steps=dict(kl=[1.0, 3.0]))
    assert of["variance ~ K to the"](record) == pytest.approx(-1.0)  # 1/K
    assert of["mean advantage, 1/1000"](record) == pytest.approx(-0.1)
    assert of["mean advantage, 1/1000"](a_run("base", 0)) == 0
    assert of["32 to 320 tokens, points"](record) == pytest.approx(0.3)
    assert of["pass@8 - pass@1, points"](record) == pytest.approx(0.2)
    assert of["spread 1.1 - 0.8, points"](record) == pytest.approx(0.1)
    assert of["spread 1.3 - 1.1, points"](record) == pytest.approx(0.2)
    assert of["spread, points"](record) == pytest.approx(-0.3)


def test_every_claim_asks_runs_and_measures_that_exist():
    for test in claims.TESTS:
        assert test.measure in claims.MEASURES and test.sign in (-1, 0, 1)
        assert test.variant in claims.VARIANTS and test.against in (*claims.VARIANTS, "")
    papers = {
        "RL lifts SFT",
        "K",
        "temperature",
        "penalties",
        "moving anchor",
        "entropy bonus",
        "centred KL",
    }
    assert papers | {"inference scaling", "longer", "self-correcting"} <= {
        claim.paper for claim in claims.CLAIMS
    }


def test_correct_only_traces_hold_no_failed_try():
    traces = data_prep.embedded_traces(2000, correct_only=True)
    assert {data_prep.habit_of(t["response"]) for t in traces} == {"jump"}
    assert not any(" not " in t["response"] or "wait" in t["response"] for t in traces)
    assert all(verify.grade([t["response"] for t in traces], [t["answer"] for t in traces]))
    assert {data_prep.habit_of(t["response"]) for t in data_prep.embedded_traces(2000)} == {
        "jump",
        "wander",
        "orderly",
    }


def ledger_args(out, *more):
    steps = "--sft-steps 2 --sft-batch 4 --rl-steps 2 --prompts 4 --k 2 --max-new 40 --eval-samples 2".split()
    return ["--out", str(out), "--name", "led", *steps, *SMALL, *more]


@pytest.fixture
def quick_runs(monkeypatch):
    """Few traces and problems, and no pictures of the stages."""
    data_prep.embedded_tokenizer()  # kept for all tests: from all traces
    short = data_prep.embedded_traces(400, dataclasses.replace(data_prep.HARD, longest=1))
    problems = {
        name: data_prep.embedded_problems(name, data_prep.HARD)[:10] for name in ("train", "test")
    }
    monkeypatch.setattr(data_prep, "embedded_traces", lambda **ground: [dict(row) for row in short])
    monkeypatch.setattr(data_prep, "embedded_problems", lambda split, *ground: problems[split])
    monkeypatch.setattr(t1, "draw_steps", lambda *args: None)
    monkeypatch.setattr(ledger, "DRAWS", 2)
    monkeypatch.setattr(ledger, "DRAWN_K", (2, 4))
    monkeypatch.setattr(ledger, "BRANCH", dict(sft_steps=2, max_new=640))


def test_the_ledger_end_to_end_with_a_kill(tmp_path, quick_runs, monkeypatch):
    args = ledger_args(tmp_path, "--seeds", "0,1", "--variants", "k4,base")
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
    assert calls == ["k4-seed0", "base-seed0", "k4-seed1", "k4-seed1", "base-seed1"]
    base = tmp_path / "led"
    records = t1.read_log(base / "ledger.jsonl")
    assert [(r["variant"], r["seed"]) for r in records] == [
        (v, s) for v in ("sft", "base", "k4") for s in (0, 1)
    ]
    of_k4 = json.loads((base / "k4-seed1/rl/config.json").read_text())
    assert of_k4["config"]["k"] == 4 and of_k4["started_from"] == str(
        base / "sft-seed1/sft/checkpoint-2"
    )
    assert [p.name for p in base.rglob("checkpoint-*")] == ["checkpoint-2"] * 7
    assert [p.parts[-4] for p in base.rglob("trainer")] == [
        "root"
    ]  # from which other seeds still branch
    assert (
        records[2]["scaling"]
        and not records[4]["scaling"]
        and records[0]["noise"].keys() == {"2", "4"}
    )

    before = {p: p.read_bytes() for p in base.glob("ledger.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    assert (
        ledger.main(["--table", "--out", str(tmp_path), "--name", "led"]) == 0
    )  # from the finished runs alone
    assert {p: p.read_bytes() for p in base.glob("ledger.*")} == before and len(calls) == 5
    monkeypatch.setattr(claims, "PUBLISHED", base / "ledger.jsonl")
    assert (
        ledger.main(["--table", "--out", str(tmp_path), "--name", "elsewhere"]) == 0
    )  # from the published records
    for name in ("ledger.md", "ledger.png"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == before[base / name]
    monkeypatch.setattr(claims, "PUBLISHED", tmp_path / "none")
    assert ledger.main(["--table", "--out", str(tmp_path), "--name", "nowhere"]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_cannot_go_on_is_a_result_and_a_signal_is_not(
    tmp_path, quick_runs, monkeypatch, capsys
):
    args = ledger_args(tmp_path, "--seeds", "0", "--variants", "alpha1e-1")
    with monkeypatch.context() as patch:
        patch.setattr(
            t1.Interrupt, "received", lambda self: "SIGTERM"
        )  # the stage saves and returns after one step
        assert ledger.main(args) == 0 and "the same command resumes" in capsys.readouterr().out
    assert len(t1.read_log(tmp_path / "led" / "root" / "sft" / "metrics.jsonl")) == 1
    assert not (tmp_path / "led/ledger.jsonl").exists()

    def fails(cfg):
        raise t1.Stop("the loss is not finite")

    monkeypatch.setattr(t1, "run_rl", fails)
    assert ledger.main(args) == 0
    assert len(t1.read_log(tmp_path / "led" / "root" / "sft" / "metrics.jsonl")) == 2
    assert t1.read_log(tmp_path / "led/ledger.jsonl")[1]["stopped"] == "the loss is not finite"
    assert "| alpha1e-1 | 1/1 |" in (tmp_path / "led/ledger.md").read_text()


def test_the_plan_asks_again_only_where_a_question_is_open(tmp_path, monkeypatch):
    asked, opened = [], iter([["base", "k4"], ["k4"]])
    monkeypatch.setattr(
        ledger, "run_variant", lambda base, name, seed, options: asked.append((name, seed)) or True
    )
    monkeypatch.setattr(ledger, "open_variants", lambda records: next(opened))
    monkeypatch.setattr(
        ledger, "write_ledger", lambda base: t1.write_json(base.parent / "ledger.md", "")
    )
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/ledger.md").write_text("")
    assert ledger.main(["--out", str(tmp_path)]) == 0
    first = [(name, seed) for seed in (0, 1, 2) for name in claims.VARIANTS]
    assert asked == first + [
        ("base", 3),
        ("k4", 3),
        ("base", 4),
        ("k4", 4),
        ("k4", 5),
        ("k4", 6),
        ("k4", 7),
    ]


def test_every_variant_is_a_valid_run():
    for variant in claims.VARIANTS.values():
        configs = [ledger.stage_config(stage, variant.changes, []) for stage in ("sft", "rl")]
        for cfg in configs:
            t1.check_config(cfg)
        for field, value in variant.changes.items():
            assert value in [getattr(cfg, field) for cfg in configs]
        assert variant.traces or claims.VARIANTS[variant.start].traces
    changes = [claims.VARIANTS[name].changes for name in ("base", "k4-samples", "k64-samples")]
    assert (
        len({cfg.prompts * cfg.k for cfg in (ledger.stage_config("rl", c, []) for c in changes)})
        == 1
    )


def test_the_documents_hold_the_tables_of_the_published_runs():
    records = t1.read_log(claims.PUBLISHED)
    found = claims.answers(records)
    page, readme = (
        (HERE / name).read_text(encoding="utf-8") for name in ("docs/ledger.md", "README.md")
    )
    assert claims.claim_table(found) in page and claims.variant_table(records) in page
    assert claims.seeds_needed(found) in page
    section = readme.split("The ledger, failures included")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) >= 8 and set(rows) <= set(claims.claim_table(found).splitlines())


def test_a_tenth_of_the_garbage_traces_never_ends(talkative):
    traces, tokenizer = ledger.garbage_traces(), talkative[1]
    garbage = [trace for trace in traces if trace["source"] == "garbage"]
    assert len(garbage) == len(traces) // 10 and len({trace["id"] for trace in garbage}) > 100
    for trace in garbage[:50]:
        ids = tokenizer(trace["response"]).input_ids
        assert (
            320 < len(ids) < ledger.BRANCH["max_new"]
            and verify.extract_answer(trace["response"]) is None
        )
        assert t1.unexpected_pattern(trace["response"], ids[:320], False, 8, 3) == "overlong"
    loops = [data_prep.repeats(tokenizer(t["response"]).input_ids, 8) >= 3 for t in garbage[:50]]
    assert 15 <= sum(loops) <= 35


def test_gradient_variance_is_that_over_draws(talkative, monkeypatch):
    """Against numpy's variance of the stacked gradients of the plain objective."""
    policy, tokenizer, engine, cfg = talkative
    cfg = dataclasses.replace(cfg, max_new=12)
    monkeypatch.setattr(ledger, "DRAWS", 3)
    monkeypatch.setattr(
        t1,
        "judge",
        lambda rollouts, *unused: [dict(reward=float(len(r.ids) % 2)) for r in rollouts],
    )
    drawn, roll_out = [], t1.roll_out
    monkeypatch.setattr(t1, "roll_out", lambda *args: drawn.append(roll_out(*args)) or drawn[-1])
    problems, prompts = t1.encode_prompts(data_prep.embedded_problems("train")[:5], tokenizer, cfg)
    value = ledger.gradient_variance(policy, engine, problems, prompts, 4, cfg)
    gradients = []
    for rollouts, records in drawn:
        loss, N = 0.0, sum(len(r.ids) for r in rollouts)
        for i, r in enumerate(rollouts):
            group = [record["reward"] for record in records[i - i % 4 : i - i % 4 + 4]]
            advantage = records[i]["reward"] - (sum(group) - records[i]["reward"]) / 3
            logits = policy.lm(torch.tensor([r.prompt + r.ids])).logits[
                0, len(r.prompt) - 1 : -1, : policy.vocabulary
            ]
            logp = (logits / cfg.temperature).log_softmax(-1)
            loss = loss - advantage * logp.gather(1, torch.tensor(r.ids)[:, None]).sum() / N
        grads = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]).double().numpy())
    assert len(drawn) == 3 and len(drawn[0][0]) == 4 * 5 and value > 0
    assert value == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-3)


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
    rows = [
        ([1], [2 + (7 * i + j) % 200 for j in range(length - 1)])
        for i in range(2 * micro // length)
    ]
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    with LiveBytes(*policy.parameters(), *anchor.parameters(), *state) as live:
        t1.response_logprobs(anchor, rows, cfg, 1.0, 0.0)
        t1.accumulate_gradient(
            policy, rows, torch.ones(len(rows)), torch.full((len(rows),), 1e-3), cfg, 1e-3
        )
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
    for name, billions in {
        "zai-org/glm-4-9b-hf": 9.40,
        "Qwen/Qwen2.5-14B": 14.77,
        "Qwen/Qwen2.5-32B": 32.76,
    }.items():

        def of(gpus, *args):
            return plan.memory_plan(
                plan.SHAPES[name], gpus, 16384, config("--preset", "qwen2.5-14b", *args), H100
            )

        eight, parked = of(8, "--offload", "false"), of(8)
        assert eight["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert eight["weights"] == 4 * eight["parameters"] / 8
        assert eight["optimizer"] == 2 * eight["anchor"] == 2 * eight["weights"]
        assert of(64)["update"] < parked["update"] < of(8, "--checkpointing", "false")["update"]
        assert (
            of(8, "--anchor", "none")["update"]
            == parked["update"]
            == eight["update"] - eight["anchor"]
        )
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
    assert memory["update"] < H100.usable * H100.card and memory["cache"] > 8 * (
        cfg.max_prompt + cfg.max_new
    )


def test_simulation_gives_the_numbers_of_another_one():
    """Seconds of a rollout of the 14B model with engines on two GPUs each, as another scheduler simulation had them:
    the mean of engines that get whole prompts, the slowest where samples are dealt, and that with 0.8 of the card."""
    lengths, shape = (
        costs.response_lengths(32, 64, 3200, 0.05, 8192),
        plan.SHAPES["Qwen/Qwen2.5-14B"],
    )
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
    waiting, running, done, seconds, again, full = (
        list(range(len(lengths))),
        [],
        [0] * len(lengths),
        0.0,
        0,
        False,
    )
    while waiting or running:

        def used():
            return sum(done[i] + 8 for i in running) + prompt * len({prompts[i] for i in running})

        while waiting and not full and len(running) < requests:
            new = done[waiting[0]] + (
                0 if prompts[waiting[0]] in [prompts[i] for i in running] else prompt
            )
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
        assert costs.simulate(lengths, prompts, 12, cache, requests, c) == pytest.approx(
            expected, rel=1e-9
        )
        assert (again > 0) == (cache == 400 or (cache == 150 and again > 0))
    assert costs.simulate(lengths, prompts, 12, 20, 1024, c) == math.inf  # not one row fits


def test_lengths_have_the_mean_and_the_share_that_is_cut():
    for mean, cut, longest in ((3200, 0.05, 8192), (64, 0.1, 160), (112, 0.77, 128)):
        lengths = costs.response_lengths(400, 50, mean, cut, longest)
        assert lengths.shape == (400, 50) and lengths.min() >= 1 and lengths.max() == longest
        assert lengths.mean() == pytest.approx(mean, rel=0.01)
        assert (lengths == longest).mean() == pytest.approx(cut, abs=0.03)
        assert (
            np.std(np.log(lengths).mean(1)) > 3 * np.std(np.log(lengths)) / 50**0.5
        )  # prompts differ


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flop_of_the_update_are_those_of_torchs_counter(checkpointing):
    """Of the products. What it does not count on a CPU is added: attention by a loop over positions, and the head's
    gradient, an addmm_, by hand."""
    cfg = plan_config("--tiny-layers", 3, "--checkpointing", checkpointing)
    policy, tokenizer = t1.tiny_policy(cfg)
    policy, shape, lengths = (
        t1.shard(policy, tokenizer, cfg),
        plan.shape_of(policy.lm.config),
        np.full(4, 120),
    )
    rows = [([1] * 8, list(range(2, 122))) for _ in lengths]
    attention = (
        4 * 3 * sum(4 * 64 * position for position in range(1, 129))
    )  # two products of 2 x 64 FLOP a position
    head_gradient = 2 * 4 * 120 * policy.vocabulary * 64
    forward, gradient = costs.update_flop(shape, lengths, 8, cfg)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.response_logprobs(policy, rows, cfg)
    assert counter.get_total_flops() + attention == pytest.approx(forward, rel=0.015)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.accumulate_gradient(policy, rows, torch.ones(4), torch.ones(4), cfg)
    attention *= 3.5 + (checkpointing == "true")
    assert counter.get_total_flops() + attention + head_gradient == pytest.approx(
        gradient, rel=0.015
    )


def test_decoding_is_as_fast_as_the_measurement_that_it_comes_from():
    """Qwen2.5-72B on two H100: 30.9 ms a token of one row."""
    c = costs.decode_costs(LLAMA_72B, 2, H100)
    assert 1e3 * (c.step - H100.decode + max(c.weights, c.product) + c.row) == pytest.approx(
        30.9, rel=0.02
    )


def test_traffic_counts_where_it_is_longer_than_the_computation():
    cfg, memory, _ = large_plan("Qwen/Qwen2.5-14B", 16)
    lengths, shape = np.full((32, 64), 100), plan.SHAPES["Qwen/Qwen2.5-14B"]

    def gradient(**constants):
        machine = costs.Machine(**constants)
        return costs.step_seconds(shape, 16, lengths, 200, memory, cfg, machine)["gradient"]

    micro = math.ceil(32 * 64 * 300 / 16 / cfg.micro_tokens)
    slow = (
        micro * 8 * memory["parameters"] * 15 / 16 / 1e9
    )  # two gathers in bfloat16, a sum in float32
    assert gradient(network=1e9) == pytest.approx(slow)
    assert gradient(network=1e12) == gradient(network=1e13) < slow


def test_plan_command(talkative, tmp_path, capsys):
    few = "--prompts 4 --k 4 --max-new 1024".split()
    assert plan.main(few) == 0
    out = capsys.readouterr().out
    assert all(
        out.count(name.split("/")[1]) == 8 for name in plan.SHAPES
    )  # 4 numbers of GPUs, two tables
    assert (
        "bfloat16, checkpointing, compile, offload, anchor ema" in out
        and out.splitlines()[-1].split()[2] == "400"
    )
    talkative[0].lm.save_pretrained(tmp_path / "model")
    model = [
        "--model",
        str(tmp_path / "model"),
        "--gpus",
        "1,2",
        "--set",
        "efficiency=0.2,requests=64",
        *few,
    ]
    assert plan.main(model) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out if line.startswith("model")] == [
        [name, gpus]
        for _ in range(2)
        for name, gpus in (("model", "GPUs"), ("model", "1"), ("model", "2"))
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
@pytest.mark.parametrize(
    "job, engine", [(job, engine) for job in ("tiny", "bench") for engine in ("torch", "vllm")]
)
def test_phases_are_predicted_within_a_quarter(job, engine):
    """In CPU seconds, with constants measured in turn with the steps; phases below 2 % of a step are left out."""
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        pytest.skip("the vLLM engine is not installed here")
    code, out, err = program("predict", "--job", job, "--engine", engine)
    rows = [
        line.split()
        for line in out.splitlines()
        if line.split()[:1] and line.split()[0] in (*plan.PHASES, "step")
    ]
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
    options = (
        "--prompts 2 --k 2 --max-new 200 --tiny-layers 1 --tiny-width 32 --sft-batch 4".split()
    )
    job = bench.make_job(
        str(tmp_path), 1, *(bench.job_config(stage, options) for stage in ("rl", "sft"))
    )
    before = [p.clone() for p in job.policy.parameters()]
    timing = bench.our_rl_step(job, 0)
    assert 4 <= timing.tokens < 800 and set(timing.seconds) == set(plan.PHASES)
    assert any(not torch.equal(p, q) for p, q in zip(before, job.policy.parameters()))
    cpu = sum(seconds[0] for seconds in timing.seconds.values())
    assert timing.rate(0) == pytest.approx(timing.tokens / cpu)
    assert len(job.policy.end_ids) > 1 and bench.our_sft_step(job, 0).tokens > 0


SMALL_SHAPE = costs.Shape(64, 2, 128, 4, 2, 16, 512, True)
SMALL_SIZES = gpu.Sizes(
    device="cpu",
    product=64,
    copied=2**16,
    rows=3,
    row=48,
    stack=SMALL_SHAPE,
    head=(32, 64, 2048),
    models=(("small", SMALL_SHAPE),),
    samples=4,
    new=8,
    steps=(2, 2),
)


def test_what_one_gpu_does_is_measured_by_functions_that_run_here(tmp_path, monkeypatch, capsys):
    """All but the stages, and --compile; an item that fails is a row, the others go on, the exit code says so."""
    items = gpu.items_of(SMALL_SIZES)
    left_out = {
        "tiny, torch engine": items.pop("tiny, torch engine"),
        "x": items.pop("update at small, --compile"),
    }
    assert left_out["x"] == (gpu.measure_update, "small", True) and len(items) == 5
    monkeypatch.setattr(gpu, "items_of", lambda sizes: items)
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 0
    out, rows = (
        capsys.readouterr().out,
        json.loads((tmp_path / "numbers.json").read_text())["results"],
    )
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
    assert all(
        torch.equal(repeated[:, head], k[:, head // 2]) for head in range(4)
    )  # a group's heads side by side


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
    assert (
        spending.majority(["1/2", "3", "0.5", "3", "\\frac12"]) == 0
    )  # three spellings of one half
    assert spending.majority(["7", "3", "3", "7"]) == 0
    assert (
        spending.majority([None, "3", None, "7"]) == 1 and spending.majority([None, None]) is None
    )
    rng = random.Random(0)
    for _ in range(
        300
    ):  # brute force on integers: count, then the first to appear among the most frequent
        n, k = rng.randint(1, 9), rng.randint(1, 4)
        answers = [rng.choice([None, "1", "2", "3"]) for _ in range(n)]
        right = [a == "2" for a in answers]
        winners = []
        for group in (answers[i : i + k] for i in range(0, n, k) if i + k <= n):
            most = max((group.count(a) for a in group if a is not None), default=0)
            winners.append(
                next((a for a in group if a is not None and group.count(a) == most), None)
            )
        if winners:
            assert spending.maj_at_k(answers, right, k) == sum(w == "2" for w in winners) / len(
                winners
            )


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
    assert (
        spending.before_end(ended, tokenizer) == thought
        and spending.before_end(thought, tokenizer) == thought
    )
    assert spending.before_end(encode("so</th") + encode("ink> 5"), tokenizer) == encode(
        "so"
    )  # spelled otherwise
    forced = force(engine, rollouts)
    assert [len(r.ids) for r in forced] == [60] * 3 and not any(r.finished for r in forced)
    assert not any(
        "</think>" in tokenizer.decode(r.ids) or tokenizer.eos_token_id in r.ids for r in forced
    )
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
    assert all(b <= t <= b + 40 for b, t in zip((4, 12, 24), tokens)), (
        tokens
    )  # the thought, and an answer
    picture = (folder / "spending.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"

    kept = (folder / "spending.jsonl").read_bytes()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert len(rows) == 40 and len({(r["number"], r["sample"]) for r in rows}) == 40
    first = np.mean([r["right"] for r in rows])
    assert test["majority"][0][1] == pytest.approx(first)
    before = (folder / "spending.json").read_bytes()
    assert spending.main(args) == 0
    assert (folder / "spending.json").read_bytes() == before and (
        folder / "spending.png"
    ).read_bytes() == picture
    assert len(t1.read_log(folder / "spending.jsonl")) == 40

    assert (
        spending.main(["--out", str(tmp_path), "--samples", "2"]) == 0
    )  # the evaluation's own responses will do
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
    assert f"{count} kills on {ranks} rank(s)" in stress_program(
        "kills", count, "--ranks", ranks, "--seed", 5
    )


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


PROGRAMS = dict(
    ledger=ledger, bench=bench, plan=plan, predict=predict, spending=spending, stress=stress
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_every_option(name, capsys):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[name].main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and f"python -m experiments.{name}" in out and "default" in out


def test_options_go_to_the_stages_that_read_them():
    options = "--seed 1 --kl-center --k=4 --no-kl-center --sft_steps 3 --max-new 24 --budgets 8,24".split()
    common = "--seed 1 --max-new 24".split()
    assert experiments.stage_options("sft", options) == [
        *common[:2],
        "--sft_steps",
        "3",
        *common[2:],
        "--stage",
        "sft",
    ]
    assert experiments.stage_options("eval", options) == [
        *common,
        "--budgets",
        "8,24",
        "--stage",
        "eval",
    ]
    of_rl = t1.parse_args(experiments.stage_options("rl", options))
    assert (of_rl.k, of_rl.kl_center, of_rl.sft_steps, of_rl.max_new) == (4, False, 0, 24)


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("ledger", "--seeds 0,x", "--seeds"),
        ("ledger", "--variants base,nothing", "no variant 'nothing'"),
        ("ledger", "--k 1 --out OUT", "leave-one-out"),
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
@pytest.mark.skipif(
    not (SHARED / "data/math500.jsonl.gz").exists(), reason="no real MATH rows beside this checkout"
)
def test_a_users_own_model_and_data_go_through_by_readmes_commands(tmp_path):
    rows, test = SHARED / "data/math_train.jsonl.gz", SHARED / "data/math500.jsonl.gz"
    command = [
        sys.executable,
        "-m",
        "experiments.second_hour",
        "--rows",
        rows,
        "--test",
        test,
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "every step did what its user means" in done.stdout, (
        done.stdout + done.stderr
    )
