"""Tests of the experiments: python -m pytest -q experiments, the quick core; -m slow, the rest."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import random

import numpy as np
import pytest
import torch

import data_prep
import experiments
import t1
import verify
from experiments import bench, claims, gpu, ledger, plan, stress
from test_t1 import HERE, SMALL, Fork, LiveBytes, config, one_tokenizer  # noqa: F401


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    """The embedded model with weights scaled up, so that its distributions differ from token to
    token, and many end tokens, so that rows end at different times: (policy, tokenizer, engine,
    config)."""
    cfg = config()
    with experiments.embedded_model(2, 128):
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


# ------------------------------------------------------------------------------------------- ledger


def test_the_p_value_is_students():
    for dof in range(1, 11):  # two tails: 1 minus the integral of the density from -t to t
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        for t in (0.3, 1.0, 2.5, 8.0):
            x = np.linspace(-t, t, 200_001)
            inside = np.trapezoid(scale * (1 + x**2 / dof) ** (-(dof + 1) / 2), x)
            assert claims.p_value(-t, dof) == claims.p_value(t, dof)
            assert claims.p_value(t, dof) == pytest.approx(1 - inside, abs=1e-8)


def test_the_quantiles_are_those_of_the_printed_tables():
    printed = {
        1: 12.706,
        2: 4.303,
        3: 3.182,
        4: 2.776,
        5: 2.571,
        6: 2.447,
        10: 2.228,
        30: 2.042,
    }
    for dof, quantile in printed.items():
        assert claims.t_quantile(dof) == pytest.approx(quantile, abs=5e-4)
    assert claims.t_quantile(4, 0.01) == pytest.approx(4.604, abs=5e-4)


def test_holm_is_the_step_down_procedure():
    by_hand = [0.03, 0.06, 0.06, 0.02]
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(by_hand)
    assert claims.holm([]) == []
    assert claims.holm([0.9, 0.8]) == [1.0, 1.0]
    rng = random.Random(0)
    for _ in range(200):
        few = (0.001, 0.01, 0.02, 0.03, rng.random())
        values = [rng.choice(few) for _ in range(rng.randrange(1, 7))]
        level = rng.random() / 5
        adjusted = claims.holm(values)
        rejected = set()  # the smallest p while it is at most level / (number of hypotheses left)
        while len(rejected) < len(values):
            left = [i for i in range(len(values)) if i not in rejected]
            smallest = min(left, key=values.__getitem__)
            if values[smallest] > level / len(left):
                break
            rejected.add(smallest)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


def test_verdict():
    assert [claims.verdict(0.05, sign, 0.04) for sign in (1, -1, 0)] == ["yes", "no", "higher"]
    assert [claims.verdict(-0.05, sign, 0.04) for sign in (1, -1, 0)] == ["no", "yes", "lower"]
    assert claims.verdict(0.05, 1, 0.06) == "open"


def test_statistics_of_differences():
    found = claims.statistics([0.05, 0.01, 0.06])  # t = 2.619: beyond 1.96, within t(2) = 4.303
    assert [found[x] for x in ("n", "mean", "sd")] == pytest.approx([3, 0.04, 0.0264575])
    assert found["half"] == pytest.approx(4.3027 * 0.0264575 / 3**0.5, rel=1e-4)
    assert found["p"] == pytest.approx(0.1201, abs=1e-4)
    same = claims.statistics([0.5, 0.5])
    none = claims.statistics([0.0, 0.0])
    assert (same["p"], same["half"], none["p"]) == (0.0, 0.0, 1.0)
    n = claims.seeds_for(0.03, 0.02)
    wide, narrow = (claims.t_quantile(m - 1) * 0.03 / m**0.5 for m in (n - 1, n))
    assert narrow <= 0.02 < wide


def a_run(variant, seed, **more):
    """A record as `claims.record_of` makes it, with values that no test looks at."""
    steps = {column: [0.1] * 3 for column in claims.STEPS}
    values = dict(pass_at_1=0.5, pass_at_8=0.7, length=50, corrected=0.2)
    values |= dict(jump=0.1, overlong=0.1, repetition=0.0)
    values |= dict(distance=1.0, scaling=[[32, 0.2], [128, 0.4], [320, 0.5]], steps=steps)
    values |= dict(noise={"4": 1.0, "16": 0.25, "64": 0.0625})
    values |= dict(spread={"0.8": 0.1, "1.1": 0.2, "1.3": 0.4, "1.3, min-p 0.05": 0.1})
    return dict(variant=variant, seed=seed) | values | more


def test_differences_are_paired_by_seed():
    values = {
        "base": {0: 0.7, 1: 0.8, 3: 0.9},
        "k4": {3: 0.6, 1: 0.75, 2: 0.1, 0: 0.2},
    }
    records = []
    for name, of in values.items():
        records += [a_run(name, seed, pass_at_1=value) for seed, value in of.items()]
    records[-1] = dict(variant="k4", seed=0, stopped="the loss is not finite")
    test = claims.Test("pass@1, points", "k4", "base", -1)
    assert claims.differences(records, test) == pytest.approx([-0.05, -0.3])
    alone = claims.Test("tokens", "base", "", 1)
    assert claims.differences(records, alone) == [50, 50, 50]
    found = claims.answers(records)
    assert found[test]["n"] == 2
    assert claims.parse_test("t0.8 < base") not in found
    smallest = min(found.values(), key=lambda answer: answer["p"])
    assert smallest["holm"] == pytest.approx(len(found) * smallest["p"])
    assert "k4" in claims.open_variants(records)
    assert "t0.8" in claims.open_variants(records)


def test_entropy_is_compared_at_equal_accuracy():
    steps = dict(accuracy=[0.2, 0.6, 0.8], entropy=[1.0, 0.6, 0.4])
    fast = a_run("base", 0, steps=steps)
    steps = dict(accuracy=[0.3, 0.4, 0.5], entropy=[0.9, 0.8, 0.2])
    slow = a_run("alpha0", 0, steps=steps)
    # the weaker reaches 0.5 at its end, with 0.2; the other three quarters of the way from 0.2 to
    # 0.6, with 0.7
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
        assert test.measure in claims.MEASURES
        assert test.sign in (-1, 0, 1)
        assert test.variant in claims.VARIANTS
        assert test.against in (*claims.VARIANTS, "")
    papers = "RL lifts SFT,K,temperature,penalties,moving anchor,entropy bonus,centred KL".split(
        ","
    )
    papers += ["inference scaling", "longer", "self-correcting"]
    assert set(papers) <= {claim.paper for claim in claims.CLAIMS}
    line = "K | here | tokens: a > b | <"
    assert claims.parse_claim(line).does == claims.Test("tokens", "a", "b", 1)
    assert claims.parse_claim(line).pays == claims.Test("pass@1, points", "a", "b", -1)
    assert claims.parse_test("a ~ b").sign == 0
    assert claims.parse_test("a >").against == ""


def ledger_args(out, *more):
    steps = "--sft-steps 2 --sft-batch 4 --rl-steps 2 --prompts 4 --k 2 --max-new 40".split()
    return ["--out", str(out), "--name", "led", *steps, "--eval-samples", "2", *more]


@pytest.fixture
def quick_runs(monkeypatch):
    """A small model, few traces and problems, and no pictures of the stages."""
    monkeypatch.setattr(t1, "TINY", SMALL)
    short = data_prep.embedded_traces(400, dataclasses.replace(data_prep.HARD, longest=1))
    problems = {}
    for split in ("train", "test"):
        problems[split] = data_prep.embedded_problems(split, data_prep.HARD)[:10]
    monkeypatch.setattr(data_prep, "embedded_traces", lambda **ground: [dict(row) for row in short])
    monkeypatch.setattr(data_prep, "embedded_problems", lambda split, *ground: problems[split])
    monkeypatch.setattr(t1, "draw_steps", lambda *args: None)
    monkeypatch.setattr(ledger, "DRAWS", 2)
    monkeypatch.setattr(ledger, "DRAWN_K", (2, 4))
    monkeypatch.setattr(ledger, "BRANCH", dict(sft_steps=2, max_new=640))


def test_the_ledger_end_to_end_with_a_kill(tmp_path, quick_runs, monkeypatch):
    args = ledger_args(tmp_path, "--seeds", "0,1", "--variants", "k4,base")
    rl = t1.run_rl
    calls = []

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
    expected = list(itertools.product(("sft", "base", "k4"), (0, 1)))
    assert [(r["variant"], r["seed"]) for r in records] == expected
    of_k4 = json.loads((base / "k4-seed1/rl/config.json").read_text())
    assert of_k4["config"]["k"] == 4
    assert of_k4["started_from"] == str(base / "sft-seed1/sft/checkpoint-2")
    assert [p.name for p in base.rglob("checkpoint-*")] == ["checkpoint-2"] * 7
    # other seeds still branch off the root
    assert [p.parts[-4] for p in base.rglob("trainer")] == ["root"]
    assert records[2]["scaling"]
    assert not records[4]["scaling"]
    assert records[0]["noise"].keys() == {"2", "4"}

    before = {p: p.read_bytes() for p in base.glob("ledger.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    table = ["--table", "--out", str(tmp_path), "--name"]
    assert ledger.main([*table, "led"]) == 0  # from the finished runs alone
    assert {p: p.read_bytes() for p in base.glob("ledger.*")} == before
    assert len(calls) == 5
    monkeypatch.setattr(claims, "PUBLISHED", base / "ledger.jsonl")
    assert ledger.main([*table, "elsewhere"]) == 0  # from the published records
    for name in ("ledger.md", "ledger.png"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == before[base / name]
    monkeypatch.setattr(claims, "PUBLISHED", tmp_path / "none")
    assert ledger.main([*table, "nowhere"]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_cannot_go_on_is_a_result_and_a_signal_is_not(
    tmp_path, quick_runs, monkeypatch, capsys
):
    args = ledger_args(tmp_path, "--seeds", "0", "--variants", "alpha1e-1")
    with monkeypatch.context() as patch:
        # the stage saves and returns after one step
        patch.setattr(t1.Interrupt, "received", lambda self: "SIGTERM")
        assert ledger.main(args) == 0
        assert "the same command resumes" in capsys.readouterr().out
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
    asked = []
    opened = iter([["base", "k4"], ["k4"]])

    def run_variant(base, name, seed, options):
        asked.append((name, seed))
        return True

    monkeypatch.setattr(ledger, "run_variant", run_variant)
    monkeypatch.setattr(ledger, "open_variants", lambda records: next(opened))
    monkeypatch.setattr(ledger, "write_ledger", lambda base: None)
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/ledger.md").write_text("")
    assert ledger.main(["--out", str(tmp_path)]) == 0
    first = [(name, seed) for seed in (0, 1, 2) for name in claims.VARIANTS]
    second = [("base", 3), ("k4", 3), ("base", 4), ("k4", 4)]
    third = [("k4", 5), ("k4", 6), ("k4", 7)]
    assert asked == first + second + third


def test_every_variant_is_a_valid_run():
    for variant in claims.VARIANTS.values():
        configs = [ledger.stage_config(stage, variant.changes, []) for stage in ("sft", "rl")]
        for cfg in configs:
            t1.check_config(cfg)
        for field, value in variant.changes.items():
            assert value in [getattr(cfg, field) for cfg in configs]
        assert variant.traces or claims.VARIANTS[variant.start].traces
    for name in ("base", "k4-samples", "k64-samples"):
        cfg = ledger.stage_config("rl", claims.VARIANTS[name].changes, [])
        assert cfg.prompts * cfg.k == 128


def test_the_documents_hold_the_tables_of_the_published_runs():
    records = t1.read_log(claims.PUBLISHED)
    found = claims.answers(records)
    page = (HERE / "docs/ledger.md").read_text(encoding="utf-8")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert claims.claim_table(found) in page
    assert claims.variant_table(records) in page
    assert claims.seeds_needed(found) in page
    section = readme.split("The ledger, failures included")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) >= 8
    assert set(rows) <= set(claims.claim_table(found).splitlines())


def test_a_tenth_of_the_garbage_traces_never_ends(talkative):
    traces = ledger.garbage_traces()
    tokenizer = talkative[1]
    garbage = [trace for trace in traces if trace["source"] == "garbage"]
    assert len(garbage) == len(traces) // 10
    assert len({trace["id"] for trace in garbage}) > 100
    for trace in garbage[:50]:
        ids = tokenizer(trace["response"]).input_ids
        assert 320 < len(ids) < ledger.BRANCH["max_new"]
        assert verify.extract_answer(trace["response"]) is None
        assert t1.unexpected_pattern(trace["response"], ids[:320], False, 8, 3) == "overlong"
    loops = [t1.repeats(tokenizer(t["response"]).input_ids, 8) >= 3 for t in garbage[:50]]
    assert 15 <= sum(loops) <= 35


def test_gradient_variance_is_that_over_draws(talkative, monkeypatch):
    """Against numpy's variance of the stacked gradients of the plain objective."""
    policy, tokenizer, engine, cfg = talkative
    cfg = dataclasses.replace(cfg, max_new=12)
    monkeypatch.setattr(ledger, "DRAWS", 3)

    drawn = []

    def judge(rollouts, *unused):
        for r in rollouts:
            r.reward = float(len(r.ids) % 2)
        drawn.append(rollouts)

    monkeypatch.setattr(t1, "judge", judge)
    problems = t1.encode_prompts(data_prep.embedded_problems("train")[:5], tokenizer, cfg)
    value = ledger.gradient_variance(policy, engine, problems, 4, cfg)
    gradients = []
    for rollouts in drawn:
        loss = 0.0
        N = sum(len(r.ids) for r in rollouts)
        for i, r in enumerate(rollouts):
            group = [other.reward for other in rollouts[i - i % 4 : i - i % 4 + 4]]
            advantage = r.reward - (sum(group) - r.reward) / 3
            prompt = r.problem.prompt
            logits = policy.lm(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
            logp = (logits[:, : policy.vocabulary] / cfg.temperature).log_softmax(-1)
            loss = loss - advantage * logp.gather(1, torch.tensor(r.ids)[:, None]).sum() / N
        grads = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]).double().numpy())
    assert len(drawn) == 3
    assert len(drawn[0]) == 4 * 5
    assert value > 0
    assert value == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-3)


# --------------------------------------------------------------------------------------------- plan


def plan_config(*args):
    return config("--max-new", "512", *args)


# layers, width, vocabulary (0: the tokenizer's), tokens of a row, tokens of a micro-batch
SIZES = [
    (2, 64, 0, 128, 1024),
    (3, 256, 0, 256, 2048),
    (1, 64, 50_000, 16, 512),
]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("layers, width, vocabulary, length, micro", SIZES)
def test_plan_is_the_measured_memory(layers, width, vocabulary, length, micro, checkpointing):
    """One rank, float32: the most bytes of tensors that live during log-probs of the anchor,
    gradient (several micro-batches) and update."""
    cfg = plan_config("--micro-tokens", micro, "--checkpointing", checkpointing)
    policy = small_policy(cfg, layers, width, vocabulary)
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = t1.make_optimizer(policy, cfg)
    rows = [
        ([1], [2 + (7 * i + j) % 200 for j in range(length - 1)])
        for i in range(2 * micro // length)
    ]
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    with LiveBytes(*policy.parameters(), *anchor.parameters(), *state) as live:
        t1.response_logprobs(anchor, rows, cfg, 1.0, 0.0)
        t1.accumulate_gradient(policy, experiments.answered(rows), torch.ones(len(rows)), cfg)
        t1.update(policy, optimizer, 1e-4, cfg)
    planned = plan.memory_plan(plan.shape_of(policy.lm.config), 1, max(length, micro), cfg)
    assert planned["parameters"] == sum(p.numel() for p in policy.parameters())
    assert 0.95 * live.peak < planned["update"] < 1.1 * live.peak


def small_policy(cfg, layers, width, vocabulary):
    """The embedded model of another size, its vocabulary padded to `vocabulary` rows that are all
    used."""
    with experiments.embedded_model(layers, width):
        policy, tokenizer = t1.tiny_policy(cfg)
    if vocabulary:
        policy.lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        policy.vocabulary = vocabulary
    return t1.shard(policy, tokenizer, cfg)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_activations_are_what_autograd_saves(dtype):
    """Of each layer, by torch's hooks on saved tensors, distinct storages that are no parameters: a
    model wholly in the type of the run."""
    rows = [([i], list(range(2, 129))) for i in range(8)]
    n = sum(len(y) for _, y in rows)  # tokens that go in: the last one predicts nothing

    def saved(layers):
        policy = small_policy(plan_config(), layers, 64, 0)
        policy = policy.to(getattr(torch, dtype))
        weights = {p.untyped_storage()._cdata for p in policy.parameters()}
        kept = {}

        def note(t):
            kept.setdefault(t.untyped_storage()._cdata, (t.untyped_storage().nbytes(), t))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden = policy(t1.pack(rows, policy.device))
        assert hidden.shape[0] == n
        return sum(size for key, (size, _) in kept.items() if key not in weights)

    def planned(layers):
        shape = plan.Shape(64, layers, 192, 4, 2, 16, 473, True)
        return plan.memory_plan(shape, 1, n, plan_config("--dtype", dtype))["activations"]

    assert planned(3) - planned(2) == pytest.approx(saved(3) - saved(2), rel=0.02)


def step_of(shape, gpus, length, prompt, *args, **constants):
    """-> Config, memory plan and seconds of a step of RL at a preset's values."""
    cfg = config("--preset", "qwen2.5-14b", *args)
    machine = plan.Machine(**constants)
    memory = plan.memory_plan(shape, gpus, 16384, cfg, machine)
    return cfg, memory, plan.step_seconds(shape, gpus, length, prompt, memory, cfg, machine)


@pytest.mark.parametrize("name, billions", [*zip(plan.SHAPES, (9.40, 14.77, 32.76))])
def test_plan_of_the_papers_models(name, billions):
    def of(gpus, *args):
        return step_of(plan.SHAPES[name], gpus, 3200, 200, *args)[1]

    plain = of(8, "--offload", "false")
    parked = of(8)
    assert plain["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
    assert plain["weights"] == 4 * plain["parameters"] / 8
    assert plain["optimizer"] == 2 * plain["anchor"] == 2 * plain["weights"]
    assert of(64)["update"] < parked["update"] < of(8, "--checkpointing", "false")["update"]
    assert parked["update"] == plain["update"] - plain["anchor"]
    assert parked["cache"] > plain["cache"]  # the engine gets what the anchor leaves
    assert plain["tp"] == t1.engine_ranks(2 * plain["parameters"], plan.Machine().card, 8)


# 64 prompts x 32 samples, at most 4,096 tokens with the prompt: shape, GPUs, tp, recomputed,
QWEN3_32B = plan.Shape(5120, 64, 25600, 64, 8, 128, 151936, False)
LLAMA_8B = plan.Shape(4096, 32, 14336, 32, 8, 128, 128256, False)


# NeMo RL v0.4, performance summary: 64 prompts x 32 samples, at most 4,096 tokens with the prompt;
# the prompt follows from its tokens a second, `again` (layers computed again) from its recipes
@pytest.mark.parametrize(
    "shape, gpus, tp, again, length, prompt, measured",
    [
        (QWEN3_32B, 32, 4, False, 3206, 110, 393),
        (LLAMA_8B, 16, 1, True, 1060, 130, 97.7),
    ],
    ids=["Qwen3-32B", "Llama-3.1-8B"],
)
def test_seconds_are_those_that_nvidia_measured(shape, gpus, tp, again, length, prompt, measured):
    """Within 25 %. NeMo RL takes the policy's log-probs, too: a pass as that of the anchor."""
    job = ["--prompts", 64, "--k", 32, "--max-new", 4096 - prompt, "--checkpointing", again]
    cfg = dataclasses.replace(config("--preset", "qwen2.5-14b", *job), vllm_tp=tp, vllm_memory=0.6)
    memory = plan.memory_plan(shape, gpus, 16384, cfg, plan.Machine())
    seconds = plan.step_seconds(shape, gpus, length, prompt, memory, cfg, plan.Machine())
    assert sum(seconds.values()) + seconds["anchor"] == pytest.approx(measured, rel=0.25)


def test_a_step_of_14b_on_eight_gpus_is_a_range_that_holds_the_middle():
    def total(**constants):
        seconds = step_of(plan.SHAPES["Qwen/Qwen2.5-14B"], 8, 3200, 200, **constants)[2]
        assert set(seconds) == set(plan.PHASES)
        return sum(seconds.values())

    assert 500 < total(**plan.BEST) < 620 < total() < 680
    assert 680 < total(**plan.WORST) < 900
    for name in plan.BEST:
        assert total(**{name: plan.BEST[name]}) < total()
        assert total(**{name: plan.WORST[name]}) > total()
    cfg, memory, _ = step_of(plan.SHAPES["Qwen/Qwen2.5-32B"], 16, 3200, 200)
    assert memory["update"] < 0.9 * plan.Machine().card
    assert memory["cache"] > 8 * (cfg.max_prompt + cfg.max_new)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flop_of_the_update_are_those_of_torchs_counter(checkpointing):
    """Of the products. What it does not count on a CPU is added: attention by a loop over
    positions, and the head's gradient, an addmm_, by hand."""
    cfg = plan_config("--checkpointing", checkpointing)
    policy = small_policy(cfg, 3, 64, 0)
    shape = plan.shape_of(policy.lm.config)
    rows = [([1] * 8, list(range(2, 122))) for _ in range(4)]
    attention = 4 * 3 * sum(4 * 64 * position for position in range(1, 129))
    head_gradient = 2 * 4 * 120 * policy.vocabulary * 64
    forward, gradient = plan.update_flop(shape, 4, 120, 8, cfg)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.response_logprobs(policy, rows, cfg)
    assert counter.get_total_flops() + attention == pytest.approx(forward, rel=0.015)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.accumulate_gradient(policy, experiments.answered(rows), torch.ones(4), cfg)
    attention *= 3.5 + (checkpointing == "true")
    counted = counter.get_total_flops() + attention + head_gradient
    assert counted == pytest.approx(gradient, rel=0.015)


def test_compiled_layers_are_computed_again_in_full():
    shape = plan.SHAPES["Qwen/Qwen2.5-14B"]
    cfg = config("--preset", "qwen2.5-14b")
    _, gradient = plan.update_flop(shape, 10, 100, 20, cfg)
    _, stopped = plan.update_flop(shape, 10, 100, 20, dataclasses.replace(cfg, compile=False))
    last_products = 2 * shape.intermediate * shape.hidden * 10 * 120 * shape.layers
    assert cfg.compile
    assert gradient - stopped == pytest.approx(last_products)


def test_decoding_is_as_fast_as_the_measurement_that_it_comes_from():
    """Qwen2.5-72B on two H100: 30.9 ms a token of one row."""
    shape = plan.Shape(8192, 80, 29568, 64, 8, 128, 152064, False)
    memory = dict(tp=2, cached=0, cache=1e6)
    seconds = plan.rollout_seconds(shape, memory, 1, 100, 0, 100, 0, plan.Machine(decode=0))
    assert 1e3 * seconds / 100 == pytest.approx(30.9, rel=0.02)


def test_rows_that_do_not_fit_the_cache_wait():
    """Against a loop: constant lengths, b rows at a time."""
    shape = plan.SHAPES["Qwen/Qwen2.5-14B"]
    memory = dict(tp=1, cached=1000, cache=4 * (50 + 10))
    machine = plan.Machine(reading=1, bandwidth=1e9, decode=0.5, flops=1e30)
    seconds = plan.rollout_seconds(shape, memory, 12, 100, 10, 100, 0, machine)
    layer, root = plan.parameter_counts(shape)
    weights = 2 * (48 * layer + (root - 5120) / 2) / 1e9
    expected = 0.0
    for _ in range(3):  # four rows that fit, thrice
        for written in range(100):
            expected += 0.5 + weights + 4 * 1000 * (10 + written) / 1e9
    assert seconds == pytest.approx(expected, rel=1e-4)


def test_traffic_counts_where_it_is_longer_than_the_computation():
    def gradient(network):
        shape = plan.SHAPES["Qwen/Qwen2.5-14B"]
        cfg, memory, seconds = step_of(shape, 16, 100, 200, network=network)
        micro = math.ceil(32 * 64 * 300 / 16 / cfg.micro_tokens)
        # two gathers in bfloat16, a sum in float32
        return seconds["gradient"], micro * 8 * memory["parameters"] * 15 / 16 / network

    seconds, traffic = gradient(1e9)
    assert seconds == pytest.approx(traffic)
    assert gradient(1e12)[0] == gradient(1e13)[0] < seconds


def test_plan_command(talkative, tmp_path, capsys):
    few = "--prompts 4 --k 4 --max-new 1024".split()
    assert plan.main(few) == 0
    out = capsys.readouterr().out
    for name in plan.SHAPES:
        assert f"{name.split('/')[1]}: 4 x 4 responses of 400 tokens" in out
    assert out.count(" yes ") == 12
    assert "efficiency 0.32 to 0.5" in out
    talkative[0].lm.save_pretrained(tmp_path / "model")
    model = f"--model {tmp_path}/model --gpus 1,2 --set efficiency=0.2,pcie=2e10".split()
    assert plan.main([*model, *few]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [row[0] for row in rows if row and row[0].isdecimal()]
    assert numbers == ["1", "2"]
    assert plan.main(["--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--model {tmp_path}" in err


# -------------------------------------------------------------------------------------------- bench


TINY_BENCH = "--prompts 2 --k 2 --max-new 8 --sft-batch 4".split()


def test_bench_command(capsys, monkeypatch):
    """At a size of seconds; where TRL is installed its lines are printed, too."""
    monkeypatch.setattr(bench, "MODEL", dict(layers=1, width=32))
    assert bench.main(["--pairs", "1", *TINY_BENCH]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"rollout", "judge", "anchor", "gradient", "update", bench.RL, bench.SFT} <= lines
    assert "peak memory of the process" in out
    with_trl = "RLOOTrainer: trained tokens per CPU second" in out and "SFTTrainer, packing" in out
    assert ("TRL is not installed" in out) != with_trl


def test_the_benchs_job_is_trls(tmp_path, monkeypatch):
    """The values that docs/speed.md names, and the very step of t1.py: a policy that moves."""
    cfg, sft_cfg = (bench.job_config(stage, []) for stage in ("rl", "sft"))
    assert (cfg.prompts, cfg.k, cfg.max_new) == (16, 16, 128)
    assert (cfg.temperature, cfg.rl_lr) == (1.0, 1e-4)
    assert (sft_cfg.sft_batch, sft_cfg.sft_lr, bench.MODEL["width"]) == (64, 1e-4, 256)
    monkeypatch.setattr(bench, "MODEL", dict(layers=1, width=32))
    options = [*TINY_BENCH, "--max-new", "200"]
    job = bench.make_job(str(tmp_path), 1, *(bench.job_config(x, options) for x in ("rl", "sft")))
    before = [p.clone() for p in job.policy.parameters()]
    timing = bench.our_rl_step(job, 0)
    assert 4 <= timing.tokens < 800
    assert set(timing.seconds) == {*plan.PHASES, "judge"}
    assert any(not torch.equal(p, q) for p, q in zip(before, job.policy.parameters()))
    cpu = sum(seconds[0] for seconds in timing.seconds.values())
    assert timing.rate(0) == pytest.approx(timing.tokens / cpu)
    assert len(job.policy.end_ids) > 1
    assert bench.our_sft_step(job, 0).tokens > 0


def test_what_a_shared_prompt_saves(tmp_path, monkeypatch, capsys):
    """Half of the rows share their prompts, and all else is equal; a model and rows of the user's
    own are the job."""
    monkeypatch.setattr(bench, "MODEL", dict(layers=1, width=32))
    packs = []
    pack = t1.pack

    def noted(rows, device, ragged):
        packs.append(rows)
        return pack(rows, device, ragged)

    monkeypatch.setattr(t1, "pack", noted)
    assert bench.main(["--shared", "40,10,4", "--pairs", "1", "--k", "2"]) == 0
    assert "40,10,4, gradient: shared prompts are" in capsys.readouterr().out
    shared = [pack(rows, "cpu").ids.numel() for rows in packs[-4:]]
    answers = [sum(len(y) for _, y in rows) for rows in packs[-4:]]
    assert len(set(answers)) == 1
    assert shared[:2] == [4 * 40 + answers[0] - 16] * 2
    assert shared[2:] == [16 * 40 + answers[0] - 16] * 2

    job = bench.make_job(str(tmp_path / "made"), 1, *jobs(TINY_BENCH))
    rows = [dict(problem=f"{i} + 1 is", answer=str(i + 1)) for i in range(9)]
    data_prep.write(tmp_path / "rows.jsonl", map(data_prep.json_line, rows))
    options = ["--model", str(tmp_path / "made"), "--data", str(tmp_path / "rows.jsonl")]
    options += ["--preset", "tiny"]
    job = bench.make_job(str(tmp_path / "again"), 1, *jobs([*TINY_BENCH, *options]))
    assert [p.row["problem"] for p in job.problems] == [row["problem"] for row in rows][:4]
    assert bench.our_rl_step(job, 0).tokens > 0


def jobs(options):
    return [bench.job_config(stage, options) for stage in ("rl", "sft")]


SMALL_SHAPE = plan.Shape(64, 2, 128, 4, 2, 16, 512, True)
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
    """All but the stages, and --compile; an item that fails is a row, the others go on, the exit
    code says so."""
    items = gpu.items_of(SMALL_SIZES)
    compiled = items.pop("update at small, --compile")
    assert compiled == (gpu.measure_update, "small", True)
    assert items.pop("tiny, torch engine")
    assert len(items) == 5
    monkeypatch.setattr(gpu, "items_of", lambda sizes: items)
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "numbers.json").read_text())["results"]
    assert set(rows) == set(items)
    assert all(name in out for name in items)
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

    def forgetful(rows, device, ragged):
        packed = ends(rows, device, ragged)
        packed.spread = packed.spread.roll(1)
        return packed

    monkeypatch.setattr(t1, "pack", forgetful)
    compared = gpu.compare_with_float32(SMALL_SIZES)
    assert compared["log-prob gap, ours"] > 5 * compared["log-prob gap, library"]


def test_an_older_varlen_attn_gets_as_many_key_value_heads_as_queries():
    def older(q, k, v, *lengths, scale):
        assert q.shape == k.shape == v.shape
        assert (lengths, scale) == ((1, 2), 0.5)
        return k

    q = torch.zeros(3, 4, 2)
    k = torch.arange(12.0).view(3, 2, 2)
    repeated = gpu.with_repeated_heads(older)(q, k, k, 1, 2, scale=0.5, enable_gqa=True)
    for head in range(4):  # a group's heads side by side
        assert torch.equal(repeated[:, head], k[:, head // 2])


@pytest.mark.slow
def test_gpu_bench_from_end_to_end_on_a_cpu(tmp_path, monkeypatch):
    """The rest: the stages, and --compile, whose compiler a test of presets runs."""
    items = gpu.items_of(SMALL_SIZES)
    rest = ("update at small, --compile", "tiny, torch engine")
    monkeypatch.setattr(gpu, "items_of", lambda sizes: {name: items[name] for name in rest})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(t1, "TINY", SMALL)
    monkeypatch.setitem(t1.PRESETS, "tiny", dict(prompts=2, k=4))
    assert gpu.run_gpu(SMALL_SIZES, "a machine", str(tmp_path / "numbers.json")) == 0
    row = json.loads((tmp_path / "numbers.json").read_text())["results"]["tiny, torch engine"]
    assert row["sft tokens/s"] > 0
    assert row["rl tokens/s"] > 0
    assert row["engine gap, nats"] < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_bench_without_a_gpu_is_one_line(capsys):
    assert bench.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "t1.py: --gpu: torch sees no GPU here\n"


# ------------------------------------------------------------------------------------------- stress


def stress_program(folder, what, count, *more):
    """In a process of its own: kills forks."""
    command = [what, str(count), *map(str, more)]
    code, said = Fork(folder / "log", stress.main, command).ended()
    assert code == 0, said[-3000:]
    return said


def test_every_function_can_be_killed():
    for function in stress.ONCE + stress.OFTEN:
        assert callable(operator.attrgetter(function)(t1)), function


@pytest.mark.slow
@pytest.mark.parametrize("ranks, count", [(1, 12), (2, 5)])
def test_killed_and_resumed_is_the_same_run(ranks, count, tmp_path):
    """`python -m experiments.stress kills 300` is the long form."""
    out = stress_program(tmp_path, "kills", count, "--ranks", ranks, "--seed", 5)
    assert f"{count} kills on {ranks} rank(s)" in out


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_fuzz_no_input_makes_a_traceback_a_hang_or_an_output(count, tmp_path):
    out = stress_program(tmp_path, "fuzz", count, "--seed", 1)
    assert f"{count} cases, 0 failed, seed 1" in out
    assert all(f"{kind:8}" in out for kind in stress.READERS)


def test_fuzz_reports_what_fails(tmp_path, monkeypatch):
    def silent(path):
        raise t1.Misuse("bad")

    def good_files(folder):
        for kind in ("broken", "silent"):
            (folder / kind).mkdir(parents=True)
            (folder / kind / "rows").write_text("x")

    monkeypatch.setattr(stress, "good_files", good_files)
    monkeypatch.setattr(stress, "READERS", dict(broken=[lambda path: 1 / 0], silent=[silent]))
    counts, failures = stress.run_fuzz(range(4), 0, tmp_path)
    assert counts == {("broken", "FAILED"): 2, ("silent", "FAILED"): 2}
    assert "ZeroDivisionError" in failures[0][2]
    assert "does not name the file" in failures[1][2]


# ------------------------------------------------------------------------------------ command lines


PROGRAMS = dict(
    ledger=ledger,
    bench=bench,
    plan=plan,
    stress=stress,
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_every_option(name, capsys):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[name].main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"python -m experiments.{name}" in out
    assert "default" in out


def test_options_go_to_the_stages_that_read_them():
    options = "--seed 1 --penalties --k=4 --penalties false --sft_steps 3 --max-new 24"
    options = [*options.split(), "--budgets", "8,24"]
    of_sft = "--seed 1 --penalties --penalties false --sft_steps 3 --max-new 24 --stage sft"
    assert " ".join(experiments.stage_options("sft", options)) == of_sft
    of_eval = "--seed 1 --penalties --penalties false --max-new 24 --budgets 8,24 --stage eval"
    assert " ".join(experiments.stage_options("eval", options)) == of_eval
    of_rl = t1.parse_args(experiments.stage_options("rl", options))
    assert (of_rl.k, of_rl.penalties) == (4, False)
    assert (of_rl.sft_steps, of_rl.max_new) == (0, 24)


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("ledger", "--seeds 0,x", "--seeds"),
        ("ledger", "--variants base,nothing", "no variant 'nothing'"),
        ("ledger", "--k 1 --out OUT", "leave-one-out"),
        ("ledger", "--no-such-option", "--no-such-option"),
        ("bench", "--pairs 0", "--pairs"),
        ("bench", "--prompts many", "--prompts"),
        ("bench", "--shared 95,31", "--shared"),
        ("plan", "--gpus 0", "--gpus"),
        ("plan", "--set efficiency=fast", "--set"),
        ("plan", "--length 9000", "--length"),
        ("plan", "--preset tiny", "--model"),
        ("stress", "", "required"),
        ("stress", "kills", "required"),
        ("stress", "burn 3", "burn"),
        ("stress", "fuzz 0", "above 0"),
    ],
)
def test_misuse_is_one_line(name, args, says, tmp_path, capsys):
    assert PROGRAMS[name].main(args.replace("OUT", str(tmp_path / "out")).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out").exists()
