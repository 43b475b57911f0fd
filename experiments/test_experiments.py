"""Tests of the experiments: python -m pytest -q experiments, the quick core; -m slow, the rest."""

import copy
import dataclasses
import functools
import html
import importlib
import itertools
import json
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import data_prep
import experiments
import t1
import test_t1
import verify
from experiments import bench, claims, gpu, ledger, look, plan, stress, words
from test_t1 import HERE, SMALL, Fork, LiveBytes, config, embedded_model, torch_engine, write_rows
from test_t1 import one_tokenizer, talkative  # noqa: F401 (fixtures)


# ------------------------------------------------------------------------------------------- ledger
def test_statistics_of_differences():
    """Quantiles are those of the printed tables."""
    printed = {1: 12.706, 2: 4.303, 4: 2.776, 6: 2.447, 10: 2.228, 30: 2.042}
    for dof, quantile in printed.items():
        assert claims.t_quantile(dof) == pytest.approx(quantile, abs=5e-4)
    assert claims.t_quantile(4, 0.01) == pytest.approx(4.604, abs=5e-4)
    assert claims.p_value(-2.776, 4) == pytest.approx(0.05, abs=1e-4)
    found = claims.statistics([0.05, 0.01, 0.06])  # t = 2.619: beyond 1.96, within t(2) = 4.303
    half = 4.3027 * 0.0264575 / 3**0.5
    expected = dict(n=3, mean=0.04, sd=0.0264575, half=half, p=0.12012)
    assert found == pytest.approx(expected, rel=1e-4)
    same = claims.statistics([0.5, 0.5])
    none = claims.statistics([0.0, 0.0])
    assert (same["p"], same["half"], none["p"]) == (0.0, 0.0, 1.0)
    n = claims.seeds_for(0.03, 0.02)
    wide, narrow = (claims.t_quantile(m - 1) * 0.03 / m**0.5 for m in (n - 1, n))
    assert narrow <= 0.02 < wide


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
        left = sorted(values)  # the smallest p is rejected while it is at most level / len(left)
        while left and left[0] <= level / len(left):
            del left[0]
        open_ones = [p for p, adjusted in zip(values, claims.holm(values)) if adjusted > level]
        assert sorted(open_ones) == left


def a_run(variant, seed, **more):
    """A published record with other values."""
    published = t1.read_log(claims.PUBLISHED)
    record = next(r for r in published if r["variant"] == "base")
    return record | dict(variant=variant, seed=seed) | more


def test_differences_are_paired_by_seed():
    records = []
    for seed, value in {0: 0.7, 1: 0.8, 3: 0.9}.items():
        records.append(a_run("base", seed, pass_at_1=value, length=50))
    for seed, value in {3: 0.6, 1: 0.75, 2: 0.1, 0: 0.2}.items():
        records.append(a_run("k4", seed, pass_at_1=value))
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
    # entropy: at equal accuracy
    steps = dict(accuracy=[0.2, 0.6, 0.8], entropy=[1.0, 0.6, 0.4])
    fast = a_run("base", 0, steps=steps)
    steps = dict(accuracy=[0.3, 0.4, 0.5], entropy=[0.9, 0.8, 0.2])
    slow = a_run("alpha0", 0, steps=steps)
    # the weaker reaches 0.5 at its end, with 0.2; the other between 0.2 and 0.6, with 0.7
    assert claims.entropy_difference(fast, slow) == pytest.approx(0.5)
    assert claims.entropy_difference(slow, fast) == pytest.approx(-0.5)


LEDGER = """--name led --sft-steps 2 --sft-batch 4 --rl-steps 2 --prompts 4 --k 2 --max-new 40
    --eval-samples 2"""


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
    monkeypatch.setitem(ledger.VARIANTS, "sft", "--sft-steps 2 --max-new 640")


def test_the_ledger_end_to_end_with_a_kill(tmp_path, quick_runs, monkeypatch):
    args = f"{LEDGER} --out {tmp_path} --seeds 0,1 --variants k4,base".split()
    rl = t1.STAGES["rl"]
    calls = []

    def killed(cfg):  # the third run of RL is cut off in the middle
        calls.append(cfg.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rl(cfg)

    monkeypatch.setitem(t1.STAGES, "rl", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.main(args)
    assert ledger.main(args) == 0
    assert calls == ["k4-seed0", "base-seed0", "k4-seed1", "k4-seed1", "base-seed1"]
    base = tmp_path / "led"
    records = t1.read_log(base / "ledger.jsonl")
    expected = list(itertools.product(("sft", "base", "k4"), (0, 1)))
    assert [(r["variant"], r["seed"]) for r in records] == expected
    of_k4 = data_prep.read_json(base / "k4-seed1/rl/config.json")
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


def test_a_stop_is_a_result_and_a_signal_is_not(tmp_path, quick_runs, monkeypatch, capsys):
    args = f"{LEDGER} --out {tmp_path} --seeds 0 --variants alpha1e-1".split()
    with monkeypatch.context() as patch:
        # the stage saves and returns after one step
        patch.setattr(t1.Interrupt, "received", lambda self: "SIGTERM")
        assert ledger.main(args) == 0
        assert "the same command resumes" in capsys.readouterr().out
    assert len(t1.read_log(tmp_path / "led" / "root" / "sft" / "metrics.jsonl")) == 1
    assert not (tmp_path / "led/ledger.jsonl").exists()

    def fails(cfg):
        raise t1.Stop("the loss is not finite")

    monkeypatch.setitem(t1.STAGES, "rl", fails)
    assert ledger.main(args) == 0
    assert len(t1.read_log(tmp_path / "led" / "root" / "sft" / "metrics.jsonl")) == 2
    assert t1.read_log(tmp_path / "led/ledger.jsonl")[1]["stopped"] == "the loss is not finite"
    assert "| alpha1e-1 | 1/1 |" in (tmp_path / "led/ledger.md").read_text()


def test_the_documents_hold_the_tables_of_the_published_runs():
    records = t1.read_log(claims.PUBLISHED)
    found = claims.answers(records)
    page = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("docs/*.md"))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert claims.claim_table(found) in page
    assert claims.variant_table(records) in page
    assert claims.seeds_needed(found) in page
    for folder in ("figures/embedded", "figures"):
        real = words.table(t1.read_log(HERE / folder / "words.jsonl"))
        assert real in page
    tables = {"**A real model.**": real, "The ledger, failures": claims.claim_table(found)}
    for start, table in tables.items():
        rows = re.search(r"(?s)\n\n(\|.*?)\n\n", readme.split(start)[1])[1].splitlines()
        assert len(rows) >= 7
        assert set(rows) <= set(table.splitlines())


def test_gradient_variance_is_that_over_draws(talkative, monkeypatch):
    """Against numpy's variance of the stacked gradients of the plain objective."""
    policy = talkative.policy
    cfg = dataclasses.replace(talkative.cfg, max_new=12, k=4)
    monkeypatch.setattr(ledger, "DRAWS", 3)
    drawn = []

    def judge(rollouts, *unused):
        rewards = torch.tensor([float(len(r.ids) % 2) for r in rollouts])
        drawn.append((rollouts, rewards))
        return rewards

    monkeypatch.setattr(t1, "judge", judge)
    rows = data_prep.embedded_problems("train")[:5]
    problems = t1.encode_prompts(rows, talkative.tokenizer, cfg)
    value = ledger.gradient_variance(policy, torch_engine(talkative), problems, cfg)
    gradients = []
    for rollouts, rewards in drawn:
        loss = 0.0
        N = sum(len(r.ids) for r in rollouts)
        for r, advantage in zip(rollouts, t1.rloo_advantages(rewards.view(5, 4)).flatten()):
            prompt = r.problem.prompt
            logits = policy.lm(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
            logp = (logits[:, : policy.vocabulary] / cfg.temperature).log_softmax(-1)
            loss = loss - advantage * logp.gather(1, torch.tensor(r.ids)[:, None]).sum() / N
        grads = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]).double().numpy())
    assert [len(rewards) for _, rewards in drawn] == [4 * 5] * 3
    assert value > 0
    assert value == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-3)


# --------------------------------------------------------------------------------------------- plan
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize(
    "layers, width, vocabulary, length, micro",
    [(2, 64, 0, 128, 1024), (3, 256, 0, 256, 2048), (1, 64, 50_000, 16, 512)],
)
def test_plan_is_the_measured_memory(layers, width, vocabulary, length, micro, checkpointing):
    """One rank, float32: the most bytes of tensors that live during log-probs of the anchor,
    gradient (several micro-batches of so many tokens) and update. length: of a row."""
    cfg = config("--micro-tokens", micro, "--checkpointing", checkpointing)
    policy = small_policy(cfg, layers, width, vocabulary)
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = t1.make_optimizer(policy, cfg)
    rows = [([1], list(range(2, length + 1)))] * (2 * micro // length)
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    with LiveBytes(*policy.parameters(), *anchor.parameters(), *state) as live:
        t1.response_logprobs(anchor, rows, cfg, 1.0, 0.0)
        gpu.gradient_of(policy, rows, cfg)
        t1.update(policy, optimizer, 1e-4, cfg)
    planned = plan.memory_plan(plan.shape_of(policy.lm.config), 1, max(length, micro), cfg)
    assert planned["parameters"] == t1.number_of_parameters(policy)
    assert 0.95 * live.peak < planned["update"] < 1.1 * live.peak


def small_policy(cfg, layers, width, vocabulary=0):
    """The embedded model of another size; `vocabulary`: padded to so many rows, all used."""
    policy, tokenizer = embedded_model(layers, width)
    if vocabulary:
        policy.lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        policy.vocabulary = vocabulary
    return t1.shard(policy, tokenizer, cfg)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_activations_are_what_autograd_saves(dtype):
    """By torch's hooks on saved tensors: distinct storages of a layer that are no parameters."""
    rows = [([i], list(range(2, 299))) for i in range(4)]  # too long for float32 in `attention`
    n = sum(len(y) for _, y in rows)  # tokens that go in: the last one predicts nothing

    def saved(layers):
        policy = small_policy(config(), layers, 64).to(getattr(torch, dtype))
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
        return plan.memory_plan(shape, 1, n, config("--dtype", dtype))["activations"]

    assert planned(3) - planned(2) == pytest.approx(saved(3) - saved(2), rel=0.02)


def step_of(shape, gpus, length, prompt, *args, engine={}, **constants):
    """-> Config, memory plan and seconds of a step of RL at a preset's values."""
    cfg = dataclasses.replace(config("--preset", "qwen2.5-14b", *args), **engine)
    machine = plan.Machine(**constants)
    memory = plan.memory_plan(shape, gpus, 16384, cfg, machine)
    return cfg, memory, plan.step_seconds(shape, gpus, length, prompt, memory, cfg, machine)


def test_plan_of_the_papers_models():
    for shape, billions in zip(plan.SHAPES.values(), (9.40, 14.77, 32.76), strict=True):
        plain = step_of(shape, 8, 3200, 200, "--offload", "false")[1]
        parked = step_of(shape, 8, 3200, 200)[1]
        assert plain["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert parked["update"] == plain["update"] - plain["anchor"]
        assert parked["cache"] > plain["cache"]  # the engine gets what the anchor leaves
    cfg, memory, _ = step_of(shape, 16, 3200, 200)  # the last: 32B
    assert memory["update"] < 0.9 * plan.Machine().card
    assert memory["cache"] > 8 * (cfg.max_prompt + cfg.max_new)


# NeMo RL v0.4, performance summary: 64 prompts x 32 samples, at most 4,096 tokens with the prompt;
# the prompt follows from its tokens a second, `again` (layers computed again) from its recipes
@pytest.mark.parametrize(
    "shape, gpus, tp, again, length, prompt, measured",
    [
        (plan.Shape(5120, 64, 25600, 64, 8, 128, 151936, False), 32, 4, False, 3206, 110, 393),
        (plan.Shape(4096, 32, 14336, 32, 8, 128, 128256, False), 16, 1, True, 1060, 130, 97.7),
    ],
    ids=["Qwen3-32B", "Llama-3.1-8B"],
)
def test_seconds_are_those_that_nvidia_measured(shape, gpus, tp, again, length, prompt, measured):
    """Within 25 %. NeMo RL takes the policy's log-probs, too: a pass as that of the anchor."""
    job = ["--prompts", 64, "--k", 32, "--max-new", 4096 - prompt, "--checkpointing", again]
    engine = dict(vllm_tp=tp, vllm_memory=0.6)
    seconds = step_of(shape, gpus, length, prompt, *job, engine=engine)[2]
    assert sum(seconds.values()) + seconds["anchor"] == pytest.approx(measured, rel=0.25)


def test_a_step_of_14b_on_eight_gpus_is_a_range_that_holds_the_middle():
    def total(**constants):
        seconds = step_of(plan.SHAPES["Qwen/Qwen2.5-14B"], 8, 4000, 200, **constants)[2]
        assert set(seconds) == set(plan.PHASES)
        return sum(seconds.values())

    page = (HERE / "docs/cluster.md").read_text(encoding="utf-8")
    low, high = total(**plan.BEST), total(**plan.WORST)
    says = f"{total():.0f} | {low:.0f}-{high:,.0f} |"
    assert f"| Qwen2.5-14B | 8 | 2 | 33 | 459 k | 461 | 84 | 334 | {says}" in page
    for name in plan.BEST:
        assert total(**{name: plan.BEST[name]}) < total()
        assert total(**{name: plan.WORST[name]}) > total()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flop_of_the_update_are_those_of_torchs_counter(checkpointing):
    """Attention, which it does not count on a CPU, is added by a loop over positions."""
    cfg = config("--checkpointing", checkpointing)
    policy = small_policy(cfg, 3, 64)
    shape = plan.shape_of(policy.lm.config)
    rows = [([i] * 8, list(range(2, 122))) for i in range(4)]
    attention = 4 * 3 * sum(4 * 64 * position for position in range(1, 129))
    forward, gradient = plan.update_flop(shape, 4, 120, 8, cfg)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        t1.response_logprobs(policy, rows, cfg)
    assert counter.get_total_flops() + attention == pytest.approx(forward, rel=0.015)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.gradient_of(policy, rows, cfg)
    attention *= 3.5 + (checkpointing == "true")
    assert counter.get_total_flops() + attention == pytest.approx(gradient, rel=0.015)


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


def test_plan_command(talkative, capsys, tmp_path):
    few = "--prompts 4 --k 4 --max-new 1024".split()
    assert plan.main(few) == 0
    out = capsys.readouterr().out
    for name in plan.SHAPES:
        assert f"{name.split('/')[1]}: 4 x 4 responses of 400 tokens" in out
    assert out.count(" yes ") == 12 and "efficiency 0.32 to 0.5" in out
    model = f"--model {talkative.folder} --gpus 1,2 --set efficiency=0.2,pcie=2e10".split()
    assert plan.main([*model, *few]) == 0
    assert re.findall(r"(?m)^ +(\d+) ", capsys.readouterr().out) == ["1", "2"]
    transformers.MixtralConfig().save_pretrained(tmp_path)
    assert plan.main(["--model", str(tmp_path)]) == 2  # for its planned 7 billion parameters
    assert "46,702,792,704 parameters" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- bench
TINY_BENCH = "--prompts 2 --k 2 --max-new 8 --sft-batch 4".split()


def test_the_benchs_job_is_trls(tmp_path, monkeypatch, capsys):
    """The values that docs/speed.md names, and the very step of t1.py: a policy that moves. Then
    the command, at a size of seconds; where TRL is installed its lines are printed, too."""
    cfg, sft_cfg = bench.configs_of([])
    assert (cfg.prompts, cfg.k, cfg.max_new) == (16, 16, 128)
    assert (cfg.temperature, cfg.rl_lr) == (1.0, 1e-4)
    assert (sft_cfg.sft_batch, sft_cfg.sft_lr, bench.MODEL["width"]) == (64, 1e-4, 256)
    monkeypatch.setattr(bench, "MODEL", dict(layers=1, width=32))
    options = [*TINY_BENCH, "--max-new", "200"]
    job = bench.Job(tmp_path, 1, *bench.configs_of(options))
    before = [p.clone() for p in job.policy.parameters()]
    timing = job.rl_step(0)
    assert 4 <= timing.tokens < 800
    assert set(timing.seconds) == {*plan.PHASES, "judge"}
    assert any(not torch.equal(p, q) for p, q in zip(before, job.policy.parameters()))
    cpu = sum(seconds[0] for seconds in timing.seconds.values())
    assert timing.rate(0) == pytest.approx(timing.tokens / cpu)
    assert len(job.policy.end_ids) > 1
    assert job.sft_step(0).tokens > 0
    assert bench.main(["--pairs", "1", *TINY_BENCH]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"rollout", "judge", "anchor", "gradient", "update", bench.RL, bench.SFT} <= lines
    assert "peak memory of the process" in out
    with_trl = "RLOOTrainer: trained tokens per CPU second" in out and "SFTTrainer, packing" in out
    assert ("TRL is not installed" in out) != with_trl


def test_what_a_shared_prompt_saves(talkative, tmp_path, monkeypatch, capsys):
    """Half of the rows share prompts, all else is equal; a user's model and rows are the job."""
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

    rows = [dict(problem=f"{i} + 1 is", x=str(i + 1)) for i in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = f"--preset tiny --model {talkative.folder} --data {path} --columns answer=x"
    job = bench.Job(tmp_path, 1, *bench.configs_of([*TINY_BENCH, *options.split()]))
    assert [p.row["problem"] for p in job.problems] == [row["problem"] for row in rows][:4]
    assert job.rl_step(0).tokens > 0


SMALL_SHAPE = plan.Shape(64, 2, 128, 4, 2, 16, 512, True)
SMALL_SIZES = gpu.Sizes(
    device="cpu",
    rows=3,
    row=48,
    stack=SMALL_SHAPE,
    head=(32, 64, 2048),
    models=(("small", SMALL_SHAPE),),
    samples=4,
    new=8,
    steps=(2, 2),
)


def test_what_one_gpu_does_is_measured_here(tmp_path, quick_runs, monkeypatch, capsys):
    """An item that fails is a row, the others go on, the exit code says so."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setitem(t1.PRESETS, "tiny", dict(prompts=2, k=4))
    items = gpu.items_of(SMALL_SIZES)
    numbers = tmp_path / "numbers.json"
    assert gpu.run_gpu(SMALL_SIZES, "a machine", numbers) == 0
    out = capsys.readouterr().out
    rows = data_prep.read_json(numbers)["results"]
    assert set(rows) == set(items)
    assert all(name in out for name in items)
    compared = rows["packed rows and gradient against float32"]
    for what in ("log-prob gap", "gradient"):
        assert 0 < compared[f"{what}, ours"] < 1.5 * compared[f"{what}, library"]
    assert rows["update at small"]["parked bits"] == "same"
    of_tiny = rows["tiny, torch engine"]
    assert min(of_tiny["sft tokens/s"], of_tiny["rl tokens/s"]) > 0
    assert of_tiny["engine gap, nats"] < 0.02
    failing = {"card": (lambda sizes: 1 / 0,), "head": (gpu.measure_head,)}
    monkeypatch.setattr(gpu, "items_of", lambda sizes: failing)
    assert gpu.run_gpu(SMALL_SIZES, "a machine", numbers) == 1
    rows = data_prep.read_json(numbers)["results"]
    assert rows["card"] == dict(failed="ZeroDivisionError: division by zero")
    assert "ms" in rows["head"]
    # The comparison can fail: with one row end forgotten, ours is far off.
    pack = t1.pack

    def forgetful(rows, device, ragged):
        packed = pack(rows, device, ragged)
        packed.spread = packed.spread.roll(1)
        return packed

    monkeypatch.setattr(t1, "pack", forgetful)
    compared = gpu.compare_with_float32(SMALL_SIZES)
    assert compared["log-prob gap, ours"] > 5 * compared["log-prob gap, library"]


# --------------------------------------------------------------------------------------------- look
HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
DRIVER = """<script>
function shown(id, value, where) {
  at(id).value = value;
  at(id).dispatchEvent(new Event("input"));
  return at(where).textContent;
}
const seen = {failed: window.failed, owned: window.owned};
seen.groups = data.groups.map((group, i) => shown("step", i, "group"));
seen.kinds = ["entropy", "ratio"].map(kind => shown("kind", kind, "group"));
seen.pairs = [at("budget").max, 0].map(budget => shown("budget", budget, "pair"));
seen.tails = document.querySelectorAll(".tail").length;
seen.tags = document.querySelectorAll("p *:not(small), pre *:not(span), .box img, option *").length;
document.body.textContent = JSON.stringify(seen);
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """RL on problems that hold HTML, as does a sample -> its folder, the rollouts of its first
    step, and its page, which was made without them."""
    plain = test_t1.naming_rows

    def odd(*count):
        return [row | dict(problem=row["problem"] + HOSTILE) for row in plain(*count)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_t1, "naming_rows", odd)
        base = test_t1.make_guess(tmp_path_factory.mktemp("seen"))
    steps = ["--rl-steps", 2, "--rl-save-every", 1, "--keep-rollouts", "--out", base]
    assert test_t1.main(*test_t1.rl_args(base, *steps))[0] == 0
    folder = base / "tiny/rl"
    kept = t1.read_log(folder / "rollouts.jsonl.gz")
    (folder / "rollouts.jsonl.gz").unlink()
    sample = t1.read_log(folder / "samples.jsonl")[0]
    data_prep.append_rows(folder / "samples.jsonl", [sample | dict(response=HOSTILE, length=99)])
    assert look.main([f"{base}/tiny"]) == 0
    return folder, kept[:18], (base / "tiny/look.html").read_text(encoding="utf-8")


@pytest.mark.slow
@torch.no_grad()
def test_the_page_shows_the_runs_responses_and_what_its_models_give_them(seen):
    folder, kept, page = seen
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])
    cards = data["groups"][0]["cards"]
    drawn = [(card["response"], card["reward"]) for card in cards if "advantage" in card]
    of_run = [row for row in kept if row["problem"] == cards[0]["problem"]]
    assert drawn == [(row["response"], row["reward"]) for row in of_run]
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint-2")
    anchor = copy.deepcopy(policy)
    for path in folder.glob("checkpoint-2/trainer/*.safetensors"):
        weights = safetensors.torch.load_file(path)
        weights = {name.removeprefix("anchor."): weights[name] for name in weights}
        anchor.load_state_dict(weights, strict=False)
    cards = data["groups"][-1]["cards"]  # after the last step
    paid = [card["reward"] - 2e-4 * card["d"] for card in cards]
    for card, own in zip(cards, paid):
        prompt = tokenizer(card["problem"] + "\n").input_ids
        ids = tokenizer(card["response"]).input_ids + [tokenizer.eos_token_id]
        assert "".join(card["pieces"]) == tokenizer.decode(ids)
        inputs = torch.tensor([prompt + ids])
        logits = torch.cat([policy(inputs).logits, anchor(inputs).logits])
        logp, reference = (logits[:, len(prompt) - 1 : -1] / 1.1).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        places = torch.arange(len(ids)), torch.tensor(ids)
        ratio = logp[places] - reference[places]
        found = dict(logprob=logp[places], entropy=entropy, ratio=ratio)
        for name, values in found.items():
            assert card[name] == pytest.approx(values.tolist(), abs=1e-3)
        assert card["d"] == pytest.approx(ratio.sum().item(), abs=1e-3)
        assert card["advantage"] == pytest.approx(own - (sum(paid) - own) / 5, abs=1e-3)
    assert max(max(card["ratio"]) for card in cards) > 0.01
    for card in itertools.chain(*data["pairs"]):
        assert [cut["budget"] for cut in card["cuts"]] == [4]
        for cut in card["cuts"]:
            text = "".join(card["pieces"][: cut["kept"]]) + cut["tail"]
            assert cut["kept"] <= cut["budget"]
            assert cut["answer"] == verify.extract_answer(text)


BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no browser: apt-get install chromium-headless-shell")
def test_the_page_in_a_browser(seen, tmp_path):
    page = seen[2]
    assert not re.findall("https?://[^\"' ]+", page)
    alarm = "<script>window.onerror = what => { window.failed = what };</script>"
    path = tmp_path / "page.html"
    path.write_text(page.replace("<style>", alarm + "<style>") + DRIVER, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    found = json.loads(html.unescape(re.search("<body>(.*?)</body>", said, re.S)[1]))
    assert set(found) == {"groups", "kinds", "pairs", "tails", "tags"}  # not failed, not owned
    assert found["tags"] == 0
    assert HOSTILE in found["groups"][0]
    assert len(set(found["groups"])) == len(found["groups"]) >= 3  # of two steps
    assert found["kinds"][0] == found["kinds"][1]  # other colours alone
    assert found["pairs"][0] != found["pairs"][1]
    assert found["tails"] == 2  # before and after RL


# ------------------------------------------------------------------------------------------- stress
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "command, says",
    [
        ("fuzz 30 --seed 1", "30 cases, 0 failed, seed 1"),
        slow("fuzz 600 --seed 1", "600 cases, 0 failed, seed 1"),
        slow("kills 12 --seed 5", "12 kills on 1 rank(s)"),
        slow("kills 5 --ranks 2 --seed 5", "5 kills on 2 rank(s)"),
    ],
)
def test_kills_change_no_bit_and_no_file_makes_a_traceback(command, says, tmp_path):
    """In a process of its own, with which the timers of fuzz end. stress.py has the long forms."""
    code, said = Fork(tmp_path / "log", stress.main, command.split()).ended()
    assert code == 0, said[-3000:]
    assert says in said
    assert "kills" in command or all(f"{kind:8}" in said for kind in stress.READERS)


# ------------------------------------------------------------------------------------ command lines
@pytest.mark.parametrize(
    "name", ["bench", "ledger", "look", "plan", "smollm2", "stress", "walkthrough", "words"]
)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"experiments.{name}").main(["--help"])
    assert end.value.code == 0
    assert name in capsys.readouterr().out


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
        ("ledger", "--variants base,nothing", "choose from"),
        ("ledger", "--k 1 --out OUT", "leave-one-out"),
        ("ledger", "--no-such-option", "--no-such-option"),
        ("bench", "--pairs 0", "--pairs"),
        ("bench", "--prompts many", "--prompts"),
        ("bench", "--shared 95,31", "--shared"),
        ("bench", "--gpu", "--gpu: torch sees no GPU here"),
        ("plan", "--gpus 0", "--gpus"),
        ("plan", "--set efficiency=fast", "--set"),
        ("plan", "--length 9000", "--length"),
        ("plan", "--preset tiny", "--model"),
        ("plan", "--model OUT", "out: no such causal LM"),
        ("stress", "", "required"),
        ("stress", "kills", "required"),
        ("stress", "burn 3", "burn"),
        ("stress", "fuzz 0", "above 0"),
        ("look", "", "required"),
        ("look", "OUT", "rl/config.json"),
        ("walkthrough", "--out OUT", "unrecognized arguments: --out"),
        ("words", "--runs OUT --out OUT", "has no evaluation on test.jsonl"),
    ],
)
def test_misuse_is_one_line(name, args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = importlib.import_module(f"experiments.{name}")
    assert program.main(args.replace("OUT", str(tmp_path / "out")).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- words
def test_word_problems_as_data(tmp_path):
    """Both spellings of SVAMP, three lengths of GSM8K: no problem is in two files, every thought
    ends with the answer, and RL's problems are of one calculation."""
    svamp = []
    for n in (*range(1, 40), 701):
        equation = f"( {n + 2}.0 - {n}.0 )"
        hub = dict(ID=f"chal-{n}", Body="Tom has", Question=f"{n} pens?", Answer="2.0")
        svamp.append(dict(**hub, Equation=equation))
        text = f"Tom has {n + 5} pens and {n} cups. How many more pens?"
        equation = f"( {n + 5} - {n} )"
        svamp.append(dict(id=f"chal-{n}", problem=text, answer="5", equation=equation))
    gsm8k = []
    for n in range(60):
        steps = []
        for i in range(n, n + 1 + n % 3):
            steps.append(f"He has 1+{i}=<<1+{i}={i + 1}>>{i + 1}.")
        answer = "\n".join([*steps, f"#### {i + 1}"])
        split = "test" if n % 4 == 0 else "train"
        gsm8k.append(dict(split=split, question=f"How many are {n}?", answer=answer))
    svamp = write_rows(tmp_path / "svamp.jsonl", svamp)
    gsm8k = write_rows(tmp_path / "gsm8k.jsonl", gsm8k)
    assert words.main(f"--svamp {svamp} --gsm8k {gsm8k} --out {tmp_path}".split()) == 0
    assert words.main(f"--svamp {gsm8k} --out {tmp_path}/none".split()) == 2
    texts = set()
    rows = 0
    for name in ("sft", "rl", "test"):
        made = t1.read_log(tmp_path / f"{name}.jsonl")
        texts |= {row["problem"] for row in made}
        rows += len(made)
        assert len(made) >= 7
        for row in made:
            thought, _, rest = row["response"].partition("\n</think>")
            assert thought.endswith(f" = {row['answer']}") and ".0" not in thought
            assert verify.grade([row["response"]], [row["answer"]])[0]
            assert name == "sft" or row["response"].count(" = ") == 1
            assert (name == "test") == (row["id"] == "svamp-701" or "-test-" in row["id"])
    assert rows == len(texts)

    # Problems with right and with wrong responses are chosen.
    responses = []
    rl = t1.read_log(tmp_path / "rl.jsonl")
    for i, row in enumerate(rl):
        for sample in range(3):
            responses.append(dict(problem=row["problem"], right=i % 4 == 0 or i % 4 == sample))
    responses = write_rows(tmp_path / "responses.jsonl", responses)
    assert words.main(f"--responses {responses} --out {tmp_path}".split()) == 0
    chosen = t1.read_log(tmp_path / "chosen.jsonl")
    assert chosen == [row for i, row in enumerate(rl) if i % 4 in (1, 2)]
