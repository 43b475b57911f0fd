"""What one GPU does with this code: `python -m experiments.bench --gpu`.

Every function runs on a CPU, too, with smaller Sizes (test_experiments.py), so that nothing is new
on a GPU but the device. An item that fails is a row of the table; the others go on."""

import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import data_prep
import t1
from experiments.plan import PHASES, Shape, update_flop


@dataclass(frozen=True)
class Sizes:
    """What --gpu works on."""

    device: str = "cuda"
    rows: int = 4  # of a micro-batch
    row: int = 4096  # tokens
    stack: Shape = Shape(1024, 4, 2816, 16, 4, 64, 4096, True)  # whose gradients are compared
    head: tuple[int, int, int] = (4096, 896, 151_936)  # positions, D, V
    models: tuple[tuple[str, Shape], ...] = (  # Qwen2.5's
        ("0.5B", Shape(896, 24, 4864, 14, 2, 64, 151_936, True)),
        ("1.5B", Shape(1536, 28, 8960, 12, 2, 128, 151_936, True)),
    )
    samples: int = 128  # rows that the torch engine generates
    new: int = 128  # tokens of each
    steps: tuple[int, int] = (100, 10)  # of SFT and RL of the preset tiny
    peak: float = 989e12  # FLOP/s of which MFU is a share: H100 and H200, dense bfloat16


def timed(sizes: Sizes, work, repeats: int = 3) -> tuple[float, float]:
    """-> median wall seconds of work() after a warm-up, and GiB that it took (0 on a CPU)."""
    seconds = []
    memory = 0
    gpu = sizes.device == "cuda"
    for _ in range(1 + repeats):
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() - before
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])), memory / 2**30


def gpu_config(sizes: Sizes, *options) -> t1.Config:
    micro = ["--micro-tokens", sizes.rows * sizes.row, *options]
    fixed = "--stage rl --preset tiny --engine torch --entropy-coef 1e-3 --temperature 1.2".split()
    return t1.parse_args([*fixed, *map(str, micro)])


def random_policy(shape: Shape, sizes: Sizes, cfg: t1.Config) -> t1.Policy:
    """A Qwen2 of this shape with random weights, all of its vocabulary in use."""
    tokenizer = data_prep.embedded_tokenizer()
    config = transformers.Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(sizes.device):
        lm = t1.empty_lm(config, transformers.GenerationConfig())
        policy = t1.Policy(lm, tokenizer, cfg, torch.device(sizes.device))
    policy.vocabulary, policy.end_ids = shape.vocabulary, [-1]  # nothing ends a response
    return t1.shard(policy, tokenizer, cfg)


def random_rows(sizes: Sizes, vocabulary: int, even: bool = True) -> list[tuple]:
    """Rows of sizes.row tokens, or of a whole, a half, a third ... of that."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (sizes.rows, sizes.row)).tolist()
    ends = [len(x) if even else max(16, len(x) // (i + 1)) for i, x in enumerate(ids)]
    return [(x[:8], x[8:end]) for x, end in zip(ids, ends)]


def gradient_of(policy, rows: list[tuple], cfg: t1.Config):
    """That of rows (ids of a prompt, ids of a response), each with the advantage 1, in .grad."""
    policy.zero_grad()
    rollouts = [t1.Rollout(t1.Problem({}, prompt), ids=ids) for prompt, ids in rows]
    t1.accumulate_gradient(policy, rollouts, torch.ones(len(rows)), cfg)


def flat_gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def compare_with_float32(sizes: Sizes) -> dict:
    """Log-probs and gradients of rows of different lengths, packed and in bfloat16, against the
    library's own forward row by row: its bfloat16 and its float32. Ours should be about as far from
    float32 as the library's bfloat16."""
    cfg = gpu_config(sizes, "--dtype", "bfloat16")
    policy = random_policy(sizes.stack, sizes, cfg)
    rows = random_rows(sizes, sizes.stack.vocabulary, even=False)
    tokens = sum(len(y) for _, y in rows)

    def library(dtype):
        policy.zero_grad()
        policy.lm.set_attn_implementation("eager")
        parts = []
        for x, y in rows:
            ids = torch.tensor([x + y], device=sizes.device)
            with torch.autocast(sizes.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = policy.lm.base_model(ids).last_hidden_state[0, len(x) - 1 : -1]
            head = policy.lm.get_output_embeddings().weight
            logp = (hidden.float() @ head.T / 1.2).log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            parts.append(logp.gather(1, ids[0, len(x) :, None])[:, 0])
            (-(parts[-1] + 1e-3 * entropy).sum() / tokens).backward()
        policy.lm.set_attn_implementation("t1")
        return torch.cat(parts).detach().cpu(), flat_gradient(policy)

    logp, gradient = library(torch.float32)
    low_logp, low_gradient = library(torch.bfloat16)
    ours = torch.cat(t1.response_logprobs(policy, rows, cfg, 1.2))
    gradient_of(policy, rows, cfg)
    result = {}
    found = dict(ours=(ours, flat_gradient(policy)), library=(low_logp, low_gradient))
    for name, (logprobs, g) in found.items():
        result[f"log-prob gap, {name}"] = (logprobs - logp).abs().mean().item()
        result[f"gradient, {name}"] = ((g - gradient).norm() / gradient.norm()).item()
    return result


def measure_head(sizes: Sizes) -> dict:
    """`policy_loss` forward and backward, and the reference that holds all logits."""
    n, D, V = sizes.head
    inputs = []
    with torch.device(sizes.device):
        for rows in (n, V):  # hidden states and head: logits of variance 1
            matrix = torch.empty(rows, D, dtype=torch.bfloat16).normal_(0, D**-0.25)
            inputs.append(matrix.requires_grad_())
        inputs += [torch.randint(V, (n,)), torch.randn(n), torch.full((n,), 1 / n), 1e-3, 1.2]
    ours, memory = timed(sizes, lambda: t1.policy_loss(*inputs)[0].backward())
    reference, more = timed(sizes, lambda: t1.policy_loss_reference(*inputs).backward(), 1)
    row = {"ms": 1e3 * ours, "GiB": memory}
    return row | {"reference ms": 1e3 * reference, "reference GiB": more}


def measure_update(sizes: Sizes, shape: Shape, compiled: bool) -> dict:
    """Gradient and AdamW of a model, rows of sizes.row tokens; AdamW's state parked or not."""
    cfg = gpu_config(sizes, "--dtype", "bfloat16", "--checkpointing", "--compile", compiled)
    policy, rows = random_policy(shape, sizes, cfg), random_rows(sizes, shape.vocabulary)
    seconds, memory = timed(sizes, lambda: gradient_of(policy, rows, cfg))
    # of the model: without what is computed again
    plain = update_flop(shape, sizes.rows, sizes.row - 8, 8, gpu_config(sizes))[1]
    rate = sizes.rows * sizes.row / seconds
    row = {"tokens/s": rate, "MFU %": 100 * plain / seconds / sizes.peak, "GiB": memory}
    if compiled:
        return row
    optimizer = t1.make_optimizer(policy, cfg)
    update = timed(sizes, optimizer.step)[0]
    state = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    before = [x.clone() for x in state[:2]]
    parked = t1.Parked(state)

    def fetch_and_park():
        with parked:
            pass

    parking = timed(sizes, fetch_and_park)[0]
    with parked:
        same = all(torch.equal(x, y) for x, y in zip(before, state))
    row["parked bits"] = "same" if same else "OTHER"
    row["AdamW ms"] = 1e3 * update
    row["parked ms"] = 1e3 * parking
    return row


def measure_rollout(sizes: Sizes, shape: Shape) -> dict:
    """The torch engine: all rows of full length."""
    cfg = gpu_config(sizes, "--dtype", "bfloat16")
    engine = t1.TorchEngine(data_prep.embedded_tokenizer(), cfg)
    engine.load(random_policy(shape, sizes, cfg))
    problem = t1.Problem({}, list(range(1, 65)))
    rollouts = [t1.Rollout(problem, 0, sample) for sample in range(sizes.samples)]
    seconds, memory = timed(sizes, lambda: engine.generate(rollouts, sizes.new, 1.2), 1)
    steps = sizes.new / seconds
    return {"tokens/s": sizes.samples * steps, "ms a token": 1e3 / steps, "GiB": memory}


def measure_stages(sizes: Sizes, engine: str) -> dict:
    """SFT and RL of the preset tiny through t1.main, in bfloat16: tokens per second of the later
    half of the steps. `engine` is that of RL: one process has room for one vLLM engine."""
    row, said = {}, io.StringIO()
    with tempfile.TemporaryDirectory() as out:
        for stage, steps, writer in zip(("sft", "rl"), sizes.steps, ("torch", engine)):
            options = f"--stage {stage} --preset tiny --out {out} --{stage}-steps {steps}"
            where = f"--dtype bfloat16 --engine {writer}"
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                if t1.main(f"{options} {where}".split()):
                    raise t1.Stop(f"stage {stage}: {said.getvalue().strip().splitlines()[-1]}")
            logs = data_prep.read_log(Path(out) / "tiny" / stage / "timings.jsonl")[steps // 2 :]
            seconds = sum(x.get(phase, 0) for x in logs for phase in ("judge", *PHASES))
            row[f"{stage} tokens/s"] = sum(x["tokens"] for x in logs) / seconds
        rows = data_prep.read_log(Path(out) / "tiny" / "rl" / "metrics.jsonl")
    gap = max(x["logprob_gap"] for x in rows)
    return row | {"engine gap, nats": gap, "right": rows[-1]["accuracy"]}


def items_of(sizes: Sizes) -> dict:
    """Name -> the measurement, in the order of the table."""
    items = {
        "packed rows and gradient against float32": (compare_with_float32,),
        "head, {} positions, D {}, V {:,}".format(*sizes.head): (measure_head,),
    }
    for name, shape in sizes.models:
        items[f"update at {name}"] = measure_update, shape, False
        items[f"update at {name}, --compile"] = measure_update, shape, True
        items[f"torch engine at {name}"] = measure_rollout, shape
    items["tiny, torch engine"] = measure_stages, "torch"
    if sizes.device == "cuda" and t1.installed("vllm"):
        items["tiny, vLLM"] = measure_stages, "vllm"  # last: it stays in the process
    return items


def run_gpu(sizes: Sizes, about: str, path: Path) -> int:
    """Measure every item, print the table, write it as JSON -> exit code: 1 if an item failed."""
    results = {}
    t1.print0(about)
    for name, (measure, *args) in items_of(sizes).items():
        try:
            results[name] = measure(sizes, *args)
        except Exception as e:  # whatever a library raises here: the others are still worth having
            results[name] = dict(failed=f"{type(e).__name__}: {t1.reason_of(e)}")
        cells = []
        for key, value in results[name].items():
            cells.append(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}")
        t1.print0(f"{name:44} {', '.join(cells)}")
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
    data_prep.write_json(path, dict(about=about, results=results))
    t1.print0(f"the same in {path}")
    return int(any("failed" in row for row in results.values()))
