"""Speed and memory of a step of RL and of SFT on the embedded model, beside TRL's trainers.

    export OMP_NUM_THREADS=1
    python -m experiments.bench                   with TRL (pip install trl==1.16.0): both, in turn
    python -m experiments.bench --max-new 512     rows of different lengths
    python -m experiments.bench --model MODEL --data FILE   a step of RL on your model and rows
    python -m experiments.bench --shared 95,31,8  prompt and response tokens, K: what sharing saves
    python -m experiments.bench --gpu             what one GPU does, in minutes; no download

The job: 16 prompts "a+b=" x 16 samples, T = 1, KL to a moving anchor, random weights; the rest is
in docs/speed.md. Both sides get the same folder, problems, K, lengths, type and threads, and take
their steps in turn, so that both see the same machine. Other options are t1.py's."""

import copy
import importlib.metadata
import math
import os
import platform
import re
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

import data_prep
import experiments
import t1
from experiments import gpu

BENCH = """--prompts 16 --k 16 --max-new 128 --temperature 1 --kl-coef 0.05 --ema-decay 0.99
    --rl-lr 1e-4 --sft-lr 1e-4 --sft-batch 64"""  # the job, on top of the preset tiny
MODEL = dict(layers=4, width=256)  # of the job
TRL_ROWS = 64  # rows of one of RLOOTrainer's micro-batches; 8 of a model of yours
TRL_PACK = (1024, 4)  # SFTTrainer packs to rows of so many tokens, so many rows per step
RL, SFT = "step of RL", "step of SFT"


@dataclass
class Timing:
    """What one step took: tokens that were trained on, and (CPU, wall) seconds per phase."""

    tokens: int
    seconds: dict[str, tuple[float, float]]

    def rate(self, clock: int, phase: str = "") -> float:
        """Tokens per second of CPU (clock 0) or wall time (1), of one phase or of the step."""
        phases = [self.seconds[phase]] if phase else self.seconds.values()
        return self.tokens / sum(seconds[clock] for seconds in phases)


# --- Our side: the very steps of t1.py ------------------------------------------------------------
class Job:
    """Problems and traces for pairs + 1 steps, and a model: the other side reads it in `folder`."""

    def __init__(self, folder: Path, pairs: int, cfg: t1.Config, sft_cfg: t1.Config):
        self.folder = folder
        self.pairs = pairs
        self.cfg = cfg  # of stage rl
        self.sft_cfg = sft_cfg
        self.policy = model_of(cfg)
        tokenizer = self.policy.tokenizer
        self.policy.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.anchor = copy.deepcopy(self.policy).requires_grad_(False)
        self.engine = t1.make_engine(str(folder), self.policy, tokenizer, cfg)
        self.optimizer = t1.make_optimizer(self.policy, cfg)
        self.problems = []
        rng = np.random.default_rng(cfg.seed)
        for a, b in rng.integers(1, 1000, (cfg.prompts * (pairs + 1), 2)).tolist():
            row = dict(id=f"{a} {b}", problem=f"{a}+{b}=", answer=str(a + b))
            prompt = tokenizer(row["problem"], add_special_tokens=False).input_ids
            self.problems.append(t1.Problem(row, prompt))
        if cfg.data:
            rows = t1.read_rows(cfg.data, "rl", cfg.columns)[: len(self.problems)]
            self.problems = t1.encode_prompts(rows, tokenizer, cfg)
        rows = data_prep.embedded_traces()[: 4 * sft_cfg.sft_batch * (pairs + 1)]  # TRL packs them
        of_traces = t1.encode_prompts(rows, tokenizer, cfg)
        unlimited = replace(sft_cfg, max_new=10**9)
        self.traces = t1.encode_responses(of_traces, tokenizer, unlimited)

    def rl_step(self, step: int) -> Timing:
        t1.clock.take()
        models = self.policy, self.anchor, self.engine, self.optimizer
        row, _ = t1.rl_step(step, self.problems, *models, self.cfg)
        return Timing(row["tokens"], t1.clock.take())

    def sft_step(self, step: int) -> Timing:
        t1.clock.take()
        steps = len(self.traces) // self.sft_cfg.sft_batch
        row = t1.sft_step(step, steps, self.traces, self.policy, self.optimizer, self.sft_cfg)
        return Timing(row["tokens"], t1.clock.take())


def model_of(cfg: t1.Config) -> t1.Policy:
    """The model of --model, or the job's own: it has one end token, so that nearly all responses
    have the full length, but above 128 new tokens one token in 64 is an end token."""
    with mock.patch.dict(t1.TINY, MODEL):
        policy, tokenizer = t1.load_whole(cfg.model, cfg)
    if not cfg.model:
        ends = len(tokenizer) // 64 if cfg.max_new > 128 else 1
        policy.end_ids = [tokenizer.eos_token_id, *range(20, 19 + ends)]
        policy.lm.generation_config.eos_token_id = policy.end_ids
    return policy


# --- The other side: TRL's trainers ---------------------------------------------------------------
def trl_reward(completions, answer, **unused) -> list[float]:
    """A reward that costs TRL next to nothing."""
    return [float(c.strip().startswith(a)) for c, a in zip(completions, answer)]


def trl_trainer(kind: str, job: Job, cfg: t1.Config, rows: list[dict], settings: dict, **more):
    """TRL's trainer of this kind on the bench's model and rows."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    settings = getattr(trl, f"{kind}Config")(
        output_dir=f"{job.folder}/trl",
        max_steps=job.pairs + 1,
        lr_scheduler_type="constant",
        max_grad_norm=cfg.grad_clip,
        bf16=cfg.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.folder),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        **more,
    )


def trl_rloo(job: Job):
    """TRL's RLOOTrainer on the bench's job."""
    cfg = job.cfg
    micro = math.gcd(cfg.prompts * cfg.k, 8 if cfg.model else TRL_ROWS)
    settings = dict(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=cfg.prompts * cfg.k // micro,
        num_generations=cfg.k,
        max_completion_length=cfg.max_new,
        temperature=cfg.temperature,
        learning_rate=cfg.rl_lr,
        beta=cfg.kl_coef,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1 - cfg.ema_decay,
        shuffle_dataset=False,
    )
    rows = []
    for problem in job.problems:
        prompt = job.policy.tokenizer.decode(problem.prompt)
        rows.append(dict(prompt=prompt, answer=problem.row["answer"]))
    return trl_trainer("RLOO", job, cfg, rows, settings, reward_funcs=trl_reward)


def trl_sft(job: Job):
    """TRL's SFTTrainer with packing."""
    length, packed = TRL_PACK
    settings = dict(
        packing=True,
        max_length=length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=packed,
        learning_rate=job.sft_cfg.sft_lr,
    )
    rows = []
    for trace in job.traces:
        row = trace.problem.row
        rows.append(dict(prompt=row["problem"] + "\n", completion=row["response"]))
    return trl_trainer("SFT", job, job.sft_cfg, rows, settings)


def in_turn(trainer, ours, pairs: int) -> list[tuple[Timing, Timing]]:
    """A step of a TRL trainer and ours(step) in turn, once to warm up, then `pairs` times."""
    results = []
    tokens = []
    loss = trainer.compute_loss

    def counted(model, inputs, *args, **kwargs):
        trained = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"]
        tokens.append(trained.sum().item())
        return loss(model, inputs, *args, **kwargs)

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.process_time(), time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            took = time.process_time() - self.started[0], time.perf_counter() - self.started[1]
            theirs = Timing(sum(tokens), {"all": took})
            tokens.clear()
            mine = ours(len(results))
            results.append((mine, theirs))
            pair = f"{type(trainer).__name__} {len(results) - 1} of {pairs}"
            t1.print0(f"{pair}: ratio {mine.rate(0) / theirs.rate(0):.2f}")

    trainer.compute_loss = counted
    trainer.add_callback(InTurn())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return results[1:]


# --- The table ------------------------------------------------------------------------------------
def median_of(values) -> str:
    """Median (smallest-largest)."""
    digits = 2 if max(values) < 100 else 0
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def peak_memory() -> float:
    """GiB: the most that this process has held so far; on a GPU, of the GPU's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def about_machine() -> str:
    """Processor, cores, load, threads and versions."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    packages = filter(t1.installed, ("torch", "transformers", "trl"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{cpu}, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} thread(s); {versions}"


def report(rl: list[Timing], sft: list[Timing], memory: float):
    """Print tokens per second of every phase: median (smallest-largest) over the steps."""
    heads = "tokens per CPU second", "tokens per second", "share of a step"
    t1.print0(f"{'phase':16} {heads[0]:>26} {heads[1]:>26} {heads[2]:>16}")
    rows = [(phase, rl, phase) for phase in rl[0].seconds] + [(RL, rl, ""), (SFT, sft, "")]
    for name, timings, phase in rows:
        share = np.median([t.rate(0) / t.rate(0, phase) for t in timings])
        cpu = median_of([t.rate(0, phase) for t in timings])
        wall = median_of([t.rate(1, phase) for t in timings])
        t1.print0(f"{name:16} {cpu:>26} {wall:>26} {100 * share:14.0f} %")
    tokens = np.median([t.tokens for t in rl])
    t1.print0(f"peak memory of the process {memory:.2f} GiB, {tokens:,.0f} tokens per {RL}")


def report_pairs(name: str, pairs: list[tuple[Timing, Timing]]):
    """Print tokens per second of both sides and their ratio within each pair."""
    for clock, unit in enumerate(("CPU second", "second")):
        ours = [a.rate(clock) for a, _ in pairs]
        theirs = [b.rate(clock) for _, b in pairs]
        ratio = median_of([a / b for a, b in zip(ours, theirs)])
        said = f"{median_of(ours)}, TRL {median_of(theirs)}, ratio {ratio}"
        t1.print0(f"{name}: trained tokens per {unit} {said}")


def run_bench(pairs: int, cfg: t1.Config, sft_cfg: t1.Config):
    """Measure `pairs` steps of each kind after one to warm up, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), pairs, cfg, sft_cfg)
        size = t1.number_of_parameters(job.policy) / 1e6
        t1.print0(about_machine())
        of_job = f"{cfg.prompts} prompts x {cfg.k} samples, at most {cfg.max_new} new tokens"
        t1.print0(f"{size:.2f} M parameters, V {job.policy.vocabulary}, {of_job}, {cfg.dtype}")
        t1.print0(f"{pairs} steps and one to warm up: median (min-max)")
        if not t1.installed("trl"):
            rl = [job.rl_step(step) for step in range(pairs + 1)][1:]
            sft = [job.sft_step(step) for step in range(pairs + 1)][1:]
            report(rl, sft, peak_memory())
            t1.print0("TRL is not installed (pip install trl==1.16.0): nothing to compare with")
            return
        job.rl_step(0)
        job.sft_step(0)
        memory = peak_memory()
        rl = in_turn(trl_rloo(job), job.rl_step, pairs)
        sft = in_turn(trl_sft(job), job.sft_step, pairs)
    report([a for a, _ in rl], [a for a, _ in sft], memory)
    report_pairs("RLOOTrainer", rl)
    report_pairs("SFTTrainer, packing", sft)
    t1.print0(f"peak memory with TRL in the same process {peak_memory():.2f} GiB")


# --- What a prompt that stands once saves ---------------------------------------------------------
def measure_sharing(case: str, pairs: int, cfg: t1.Config):
    """Gradient and anchor's log-probs of K responses to each of 4 prompts, of random ids, in turn
    with the same rows whose prompts differ in their first id, so that none is shared."""
    prompt, response, K = map(int, case.split(","))
    policy = model_of(cfg)
    rng = np.random.default_rng(cfg.seed)
    shared = []
    apart = []
    for _ in range(4):
        ids = rng.integers(0, policy.vocabulary, prompt).tolist()
        for i, n in enumerate(rng.integers(0.4 * response, 1.6 * response, K).tolist()):
            answer = rng.integers(0, policy.vocabulary, n + 1).tolist()
            sampled = dict(ids=answer, logprobs=[0.0] * len(answer))
            shared.append(t1.Rollout(t1.Problem({}, ids), **sampled))
            apart.append(t1.Rollout(t1.Problem({}, [i, *ids[1:]]), **sampled))

    def seconds(rollouts) -> list[float]:
        t1.clock.take()
        t1.accumulate_gradient(policy, rollouts, torch.ones(len(rollouts)), cfg)
        policy.zero_grad()
        t1.kl_to_anchor(policy, rollouts, cfg)
        return [cpu for cpu, _ in t1.clock.take().values()]

    ratios = []
    for _ in range(pairs + 1):
        once = seconds(shared)
        ratios.append([a / b for a, b in zip(seconds(apart), once)])
    for name, values in zip(("gradient", "anchor"), zip(*ratios[1:])):
        t1.print0(f"{case}, {name}: shared prompts are {median_of(values)} times as fast")


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("bench", __doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="measured steps of each kind (default: %(default)s)")
    add("--shared", default="", help="PROMPT,RESPONSE,K: measure the shared prompt (default: off)")
    add("--gpu", action="store_true", help="measure this machine's GPU instead (default: off)")
    own, options = parser.parse_known_args(argv)
    if own.pairs < 1:
        raise t1.Misuse("--pairs must be above 0")
    if own.gpu and options:
        raise t1.Misuse(f"--gpu takes no options of t1.py: {' '.join(options)}")
    if own.gpu and not torch.cuda.is_available():
        raise t1.Misuse("--gpu: torch sees no GPU here")
    if own.gpu:
        about = f"{torch.cuda.get_device_name()}; {about_machine()}"
        return gpu.run_gpu(gpu.Sizes(), about, Path("bench-gpu.json"))
    cfg, sft_cfg = configs_of(options)
    if own.shared:
        if not re.fullmatch(r"[1-9]\d*,[1-9]\d+,[1-9]\d*", own.shared):
            raise t1.Misuse("--shared: PROMPT,RESPONSE,K, such as 95,31,8")
        t1.print0(about_machine())
        return measure_sharing(own.shared, own.pairs, cfg)
    run_bench(own.pairs, cfg, sft_cfg)


def configs_of(options: list[str]) -> list[t1.Config]:
    """Those of RL and of SFT."""
    job = [*BENCH.split(), *options]
    return [t1.parse_args(experiments.stage_options(stage, job)) for stage in ("rl", "sft")]


if __name__ == "__main__":
    raise SystemExit(main())
