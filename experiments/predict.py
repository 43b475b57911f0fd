"""Is the model of costs right? Phases of a step of RL as experiments.costs predicts them, beside measured ones.

    export OMP_NUM_THREADS=1
    python -m experiments.predict --job bench                   the job of experiments.bench
    python -m experiments.predict --job tiny --engine vllm      the preset tiny, and vLLM (options are t1.py's)

Constants are measured on this machine just before each step, on other rows and lengths than the step has: FLOP/s of
log-probs and gradient, seconds of a decode step (a + b rows + c cached tokens) and of judging, bytes/s of AdamW and
anchor, seconds of a push. Of the measured steps the prediction knows what metrics.jsonl has: mean length, and the share
of responses that reach --max-new. All in CPU seconds, the least of the steps: other work on a machine only adds.
Weights are random; above 128 new tokens one token in 64 ends a response, below nearly all have the full length.
"""

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

GENERATE = (
    (4, 16, 4),
    (12, 16, 4),
    (4, 16, 1.33),
    (12, 16, 1.33),
)  # prompts, samples of each, --max-new / longest


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


def generate(job: bench.Job) -> list[tuple]:
    """For each of GENERATE (decode steps, tokens, cached tokens read, tokens of prompts), CPU seconds, and seconds to
    judge a token."""
    points = []
    for P, K, part in GENERATE:
        prompts = [job.prompts[-1 - i] for i in range(P)]
        request = (
            prompts,
            [list(range(K))] * P,
            list(range(P)),
            int(job.cfg.max_new / part),
            job.cfg.temperature,
        )
        seconds, rollouts = cpu_seconds(job.engine.generate, *request)
        lengths = np.array([len(r.ids) for r in rollouts])
        cached = (
            lengths * np.repeat([len(p) for p in prompts], K) + lengths * (lengths - 1) / 2
        ).sum()
        asked = [job.problems[-1 - i] for i in range(P) for _ in range(K)]
        judging, _ = cpu_seconds(t1.judge, rollouts, asked, job.tokenizer, job.cfg)
        features = lengths.max(), lengths.sum(), cached, sum(map(len, prompts))
        points.append((features, seconds, judging / lengths.sum()))
    return points


def measure(job: bench.Job, shape: costs.Shape) -> tuple[dict[str, float], list[tuple]]:
    """CPU seconds of a FLOP, of a byte of the update, of a pushed tensor; and the points of `generate`."""
    cfg, length = job.cfg, job.cfg.max_new // 2
    n = 2 * cfg.micro_tokens // (length + 8)
    rows, ones = (
        [([1] * 8, [2 + (7 * i + j) % 200 for j in range(length)]) for i in range(n)],
        torch.ones(n),
    )
    forward, _ = cpu_seconds(t1.response_logprobs, job.anchor, rows, cfg, cfg.temperature)
    options = cfg.entropy_coef, cfg.temperature, 0.0, [[-1.0] * length] * n
    gradient, _ = cpu_seconds(
        t1.accumulate_gradient, job.policy, rows, ones, ones / length / n, cfg, *options
    )
    update, _ = cpu_seconds(t1.update, job.policy, job.optimizer, 0.0, cfg)
    follow, _ = cpu_seconds(t1.ema_update_, job.anchor, job.policy, cfg.ema_decay)
    push, pushed = cpu_seconds(job.engine.load, job.policy)
    if pushed:
        push += cpu_seconds(t1.check_push, job.engine, job.policy, job.prompts[0], cfg)[0]
    parameters = sum(p.numel() for p in job.policy.parameters())
    flop = (forward + gradient) / sum(costs.update_flop(shape, np.full(n, length), 8, cfg))
    tensor = push / (12 * shape.layers + 3)
    return dict(
        flop=flop, byte=(update + follow) / costs.UPDATE_BYTES / parameters, tensor=tensor
    ), generate(job)


def constants_of(
    job: bench.Job, shape: costs.Shape, rounds: list
) -> tuple[costs.Machine, costs.Decode]:
    """The constants of this machine for the job's model: of each time the least of the rounds."""
    least = {name: min(times[name] for times, _ in rounds) for name in rounds[0][0]}
    points = [
        min(same, key=lambda point: point[1] / point[0][1])
        for same in zip(*(points for _, points in rounds))
    ]
    prefill = 2 * shape.layers * costs.parameter_counts(shape)[0] * least["flop"]
    features, seconds = (
        np.array([f for f, _, _ in points], float),
        np.array([s for _, s, _ in points]),
    )
    step, row, cached = fit_positive(features[:, :3], seconds - prefill * features[:, 3])
    requests, judge = (
        job.cfg.rollout_rows,
        min(point[2] for _, points in rounds for point in points),
    )
    if isinstance(job.engine, t1.VLLMEngine):
        requests = job.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    machine = costs.Machine(
        flops=1 / least["flop"],
        efficiency=1,
        bandwidth=1 / least["byte"],
        reading=1,
        pcie=math.inf,
        wake=0,
        tensor=least["tensor"],
        judge=judge,
        gather=0,
        requests=requests,
    )
    return machine, costs.Decode(
        step=step, weights=0, product=0, row=row, cached=cached, prefill=prefill
    )


def run_predict(name: str, steps: int, options: list[str]) -> dict[str, tuple[float, float]]:
    """-> (measured, predicted) CPU seconds of each phase, printed as a table."""
    preset = (
        [f"--{key.replace('_', '-')}={value}" for key, value in bench.BENCH.items()]
        if name == "bench"
        else []
    )
    options = ["--preset", "tiny", *preset, *options]
    cfg, sft_cfg = (
        t1.parse_args(experiments.stage_options(stage, options)) for stage in ("rl", "sft")
    )
    with tempfile.TemporaryDirectory() as folder:
        job = bench.make_job(folder, steps, cfg, sft_cfg)
        if name == "tiny":
            job.problems, job.prompts = t1.encode_prompts(
                data_prep.embedded_problems("train"), job.tokenizer, cfg
            )
        shape = plan.shape_of(job.policy.lm.config)
        job.engine.load(job.policy)
        rounds, timings = [], []
        for step in range(steps + 1):
            rounds.append(measure(job, shape))
            timings.append(bench.our_rl_step(job, step))
        rounds, timings = rounds[1:], timings[1:]  # the first ones warm up
    machine, engine = constants_of(job, shape, rounds)
    mean, cut = (float(np.mean([t.row[key] for t in timings])) for key in ("length", "overlong"))
    lengths = costs.response_lengths(
        cfg.prompts, cfg.k, mean, min(max(cut, 1e-3), 0.999), cfg.max_new
    )
    prompt = round(np.mean([len(x) for x in job.prompts]))
    memory = dict(tp=1, parameters=sum(p.numel() for p in job.policy.parameters()), cache=1e15)
    predicted = costs.step_seconds(shape, 1, lengths, prompt, memory, cfg, machine, engine)
    measured = {phase: min(t.seconds[phase][0] for t in timings) for phase in predicted}
    phases = {phase: (measured[phase], predicted[phase]) for phase in predicted} | {
        "step": (0.0, 0.0)
    }
    phases["step"] = tuple(map(sum, zip(*phases.values())))
    t1.print0(bench.about_machine())
    of_step = f"{mean:.0f} tokens a response, {cut:.0%} reach {cfg.max_new}"
    t1.print0(
        f"{name}, {type(job.engine).__name__}: {of_step}, {steps} steps; {machine.flops / 1e9:.1f} GFLOP/s"
    )
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
    parser.add_argument(
        "--job", choices=("tiny", "bench"), default="tiny", help="which job (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps, after one (default: %(default)s)"
    )
    return experiments.run(parser, predict_command, argv)


def predict_command(own, options: list[str]):
    if own.steps < 1:
        raise t1.Misuse("--steps must be above 0")
    run_predict(own.job, own.steps, options)


if __name__ == "__main__":
    sys.exit(main())
