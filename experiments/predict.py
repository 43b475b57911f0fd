"""Is the model of costs right? Phases of a step of RL as experiments.costs predicts them, beside measured ones.

    export OMP_NUM_THREADS=1
    python -m experiments.predict --job bench                   the job of experiments.bench
    python -m experiments.predict --job tiny --engine vllm      the preset tiny, and vLLM (options are t1.py's)

Constants are measured on this machine just before each step, on other rows and lengths than the step has: FLOP/s of
log-probs and gradient, seconds of a decode step (a + b rows + c cached tokens) and of judging, bytes/s of AdamW and
anchor, seconds of a push. Of the measured steps the prediction knows what metrics.jsonl has: mean length, and the share
of responses that reach --max-new. All in CPU seconds, medians over the steps. Weights are random; above 128 new tokens
one token in 64 ends a response, below nearly all have the full length.
"""

import dataclasses
import math
import sys
import tempfile
import time

import numpy as np
import torch

import data_prep
import experiments
import t1
from experiments import bench, costs, plan

GENERATE = ((4, 16, 4), (12, 16, 4), (4, 16, 1.33), (12, 16, 1.33))  # prompts, samples of each, --max-new / longest


def cpu_seconds(work, *args) -> tuple[float, object]:
    start = time.process_time()
    result = work(*args)
    return time.process_time() - start, result


def fit_positive(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients, none negative, by least squares of the relative error."""
    used, scaled = list(range(features.shape[1])), features / seconds[:, None]
    while True:
        found = np.linalg.lstsq(scaled[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            return np.bincount(used, found, features.shape[1])
        used.pop(int(found.argmin()))


def decode_costs(job: bench.Job, prefill: float) -> tuple[costs.Decode, float]:
    """Costs of the job's engine, from generations of several sizes; and seconds to judge a token."""
    features, seconds, judging = [], [], []
    for P, K, part in GENERATE:
        prompts = [job.prompts[-1 - i] for i in range(P)]
        request = prompts, [list(range(K))] * P, list(range(P)), int(job.cfg.max_new / part), job.cfg.temperature
        took, rollouts = cpu_seconds(job.engine.generate, *request)
        lengths = np.array([len(r.ids) for r in rollouts])
        cached = (lengths * np.repeat([len(p) for p in prompts], K) + lengths * (lengths - 1) / 2).sum()
        features.append((lengths.max(), lengths.sum(), cached))
        seconds.append(took - prefill * sum(map(len, prompts)))
        asked = [job.problems[-1 - i] for i in range(P) for _ in range(K)]
        judging.append(cpu_seconds(t1.judge, rollouts, asked, job.tokenizer, job.cfg)[0] / lengths.sum())
    step, row, cached = fit_positive(np.array(features, float), np.array(seconds))
    return costs.Decode(step=step, weights=0, product=0, row=row, cached=cached, prefill=prefill), np.median(judging)


def measure(job: bench.Job, shape: costs.Shape) -> tuple[costs.Machine, costs.Decode]:
    """The constants of this machine for the job's model."""
    cfg, length = job.cfg, job.cfg.max_new // 2
    n = 2 * cfg.micro_tokens // (length + 8)
    rows, ones = [([1] * 8, [2 + (7 * i + j) % 200 for j in range(length)]) for i in range(n)], torch.ones(n)
    forward, _ = cpu_seconds(t1.response_logprobs, job.anchor, rows, cfg, cfg.temperature)
    sampled = [[-1.0] * length] * len(rows)
    options = cfg.entropy_coef, cfg.temperature, 0.0, sampled
    gradient, _ = cpu_seconds(t1.accumulate_gradient, job.policy, rows, ones, ones / length / len(rows), cfg, *options)
    flop = costs.update_flop(shape, np.full(len(rows), length), 8, cfg)
    update, _ = cpu_seconds(t1.update, job.policy, job.optimizer, 0.0, cfg)
    follow, _ = cpu_seconds(t1.ema_update_, job.anchor, job.policy, cfg.ema_decay)
    speed = sum(flop) / (forward + gradient)
    engine, judge = decode_costs(job, flop[0] / len(rows) / (length + 8) / speed)
    push, pushed = cpu_seconds(job.engine.load, job.policy)
    if pushed:
        push += cpu_seconds(t1.check_push, job.engine, job.policy, job.prompts[0], cfg)[0]
    parameters, requests = sum(p.numel() for p in job.policy.parameters()), cfg.rollout_rows
    if isinstance(job.engine, t1.VLLMEngine):
        requests = job.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    machine = costs.Machine(
        flops=speed,
        efficiency=1,
        bandwidth=44 * parameters / (update + follow),
        reading=1,
        pcie=math.inf,
        wake=0,
        tensor=push / (12 * shape.layers + 3),
        judge=judge,
        gather=0,
        requests=requests,
    )
    return machine, engine


def median_of(values: list):
    """The dataclass of the medians of each field."""
    fields = [field.name for field in dataclasses.fields(values[0])]
    return type(values[0])(**{name: float(np.median([getattr(v, name) for v in values])) for name in fields})


def run_predict(name: str, steps: int, options: list[str]) -> dict[str, tuple[float, float]]:
    """-> (measured, predicted) CPU seconds of each phase, printed as a table."""
    preset = [f"--{key.replace('_', '-')}={value}" for key, value in bench.BENCH.items()] if name == "bench" else []
    options = ["--preset", "tiny", *preset, *options]
    cfg, sft_cfg = (t1.parse_args(experiments.stage_options(stage, options)) for stage in ("rl", "sft"))
    with tempfile.TemporaryDirectory() as folder:
        job = bench.make_job(folder, steps, cfg, sft_cfg)
        if name == "tiny":
            job.problems, job.prompts = t1.encode_prompts(data_prep.embedded_problems("train"), job.tokenizer, cfg)
        shape = plan.shape_of(job.policy.lm.config)
        job.engine.load(job.policy)
        constants, timings = [], []
        for step in range(steps + 1):
            constants.append(measure(job, shape))
            timings.append(bench.our_rl_step(job, step))
        constants, timings = constants[1:], timings[1:]  # the first ones warm up
    machine, engine = (median_of(list(values)) for values in zip(*constants))
    mean, cut = (float(np.mean([t.row[key] for t in timings])) for key in ("length", "overlong"))
    lengths = costs.response_lengths(cfg.prompts, cfg.k, mean, min(max(cut, 1e-3), 0.999), cfg.max_new)
    prompt = round(np.mean([len(x) for x in job.prompts]))
    memory = dict(tp=1, parameters=sum(p.numel() for p in job.policy.parameters()), cache=1e15)
    predicted = costs.step_seconds(shape, 1, lengths, prompt, memory, cfg, machine, engine)
    measured = {phase: float(np.median([t.seconds[phase][0] for t in timings])) for phase in predicted}
    phases = {phase: (measured[phase], predicted[phase]) for phase in predicted} | {"step": (0.0, 0.0)}
    phases["step"] = tuple(map(sum, zip(*phases.values())))
    t1.print0(bench.about_machine())
    of_step = f"{mean:.0f} tokens a response, {cut:.0%} reach {cfg.max_new}"
    t1.print0(f"{name}, {type(job.engine).__name__}: {of_step}, {steps} steps; {machine.flops / 1e9:.1f} GFLOP/s")
    a_row = f"{1e6 * engine.row:.1f} us a row + {1e9 * engine.cached:.1f} ns a cached token"
    t1.print0(f"a decode step {1e3 * engine.step:.2f} ms + {a_row}")
    t1.print0(f"{'phase':10} {'measured':>9} {'predicted':>9} {'ratio':>6}   (CPU seconds)")
    for phase, (real, guess) in phases.items():
        ratio = f"{guess / real:6.2f}" if real else "     -"
        t1.print0(f"{phase:10} {real:9.3f} {guess:9.3f} {ratio}")
    return phases


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("predict", __doc__)
    parser.add_argument("--job", choices=("tiny", "bench"), default="tiny", help="which job (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one (default: %(default)s)")
    return experiments.run(parser, predict_command, argv)


def predict_command(own, options: list[str]):
    if own.steps < 1:
        raise t1.Misuse("--steps must be above 0")
    run_predict(own.job, own.steps, options)


if __name__ == "__main__":
    sys.exit(main())
