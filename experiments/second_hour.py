"""The second hour of a user: own model and own data, from README's commands and the `next:` lines alone.

    python -m experiments.second_hour --rows math_train.jsonl.gz --test math500.jsonl.gz --out FOLDER

Two models with random weights and tokenizers trained on the rows, a Qwen2 with a chat template and a Llama without,
go through curate, SFT, RL (killed once, resumed) and eval. Every step is a process of its own, each command is
README's or the one that the step before has printed; flags beside them only make the run short. Exits 1 with one line
where a step fails or does something else than its user means.
"""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import tokenizers
import transformers

import data_prep
import experiments
import t1

HERE = Path(__file__).resolve().parent.parent
SHORT = dict(  # makes the stages of a random model short; README names these flags
    sft="--sft-steps 30 --max-new 256",
    rl="--rl-steps 4 --prompts 4 --k 4 --max-new 48 --rl-save-every 2",
    eval="--eval-samples 1",
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_model(kind: str, texts: list[str], folder: Path):
    """A random model of about 2 million parameters with a BPE tokenizer of its own, as a user's folder."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    names = dict(
        qwen2=(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        llama=(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    )
    make_config, make_lm = names[kind]
    if kind == "qwen2":
        tokenizer.chat_template = TEMPLATE
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=kind == "qwen2",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    transformers.set_seed(0)
    make_lm(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command: str, kill_after=None) -> str:
    """Run one command of README -> its output. kill_after: a file; the process is killed when it has three lines."""
    print(f"$ {command}", flush=True)
    words = shlex.split(command)
    if words[0] == "torchrun":  # one process: torchrun t1.py and python t1.py are the same
        words[0] = "python"
    words[0] = sys.executable
    words[1] = str(HERE / words[1])
    log = open("output.txt", "w+", encoding="utf-8")
    process = subprocess.Popen(
        words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(HF_HUB_OFFLINE="1")
    )
    while process.poll() is None:
        time.sleep(0.05)
        if kill_after and kill_after.exists() and kill_after.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGKILL)
            kill_after = None
            process.wait()
            return ""
    log.seek(0)
    text = log.read()
    if process.returncode or "Traceback" in text:
        print(text[-3000:])
        raise t1.Stop(f"exit code {process.returncode} of: {command}")
    return text


def next_command(text: str) -> str:
    found = re.findall(r"^next: (.+)$", text, re.M)
    expect(found, f"no next: line in {text[-2000:]}")
    return found[-1]


def expect(condition, what: str):
    if not condition:
        raise t1.Stop(what)


def second_hour(kind: str, test: str, rows: list[dict]):
    """Everything that a user of one model does; the working directory is the user's."""
    make_model(kind, [row["problem"] + row["solution"] for row in rows], Path(kind))
    common = f"--model {kind} --data data/rl.jsonl --test {test} --name {kind}"
    text = run(f"python t1.py --stage sft {common} {SHORT['sft']}")
    expect("preset pretrained" in text, "the values of the preset pretrained are not said")
    expect(
        "embedded" not in text, "an embedded problem is met although --data and --test are given"
    )
    expect(f"problems of {test}" in text, "the held-out problems are not those of --test")
    rl = f"{next_command(text)} {SHORT['rl']}"
    expect(
        "--data data/rl.jsonl" in rl and f"--name {kind}" in rl, f"next: drops data or name: {rl}"
    )
    log = Path("runs") / kind / "rl" / "metrics.jsonl"
    run(rl, kill_after=log)
    text = run(rl)
    expect("resuming from" in text, "the killed run was not resumed")
    steps = [row["step"] for row in data_prep.read_log(log)]
    expect(steps == [0, 1, 2, 3], f"steps of the resumed run: {steps}")
    config = json.loads((log.parent / "config.json").read_text())
    expect(
        config["started_from"].startswith(f"runs/{kind}/sft/"),
        f"RL started from {config['started_from']}",
    )
    text = run(f"{next_command(text)} {SHORT['eval']}")
    entries = json.loads(Path(f"runs/{kind}/eval/results.json").read_text())["checkpoints"]
    expect({e["test"] for e in entries} == {test}, f"evaluated on {[e['test'] for e in entries]}")
    branch = run(f"{rl} --resume-from 2")
    run(f"{next_command(branch)} {SHORT['eval']}")
    expect(
        Path(f"runs/{kind}-from-2/eval/results.json").exists(),
        "the branch was not evaluated under its own name",
    )


def walk(own, options: list[str]):
    sources = {"math.jsonl": (own.rows, 600), "test.jsonl": (own.test, 40)}
    parts = {
        name: list(itertools.islice(data_prep.raw_rows(path), most))
        for name, (path, most) in sources.items()
    }
    rows = [data_prep.parse(where, raw) for where, raw in parts["math.jsonl"]]
    Path(own.out).mkdir(parents=True, exist_ok=True)
    os.chdir(own.out)
    for name, part in parts.items():
        data_prep.write(
            Path(name), (data_prep.json_line(data_prep.parse(where, raw)) for where, raw in part)
        )
    run("python data_prep.py curate --math math.jsonl --decontaminate test.jsonl --out data")
    for kind in ("qwen2", "llama"):
        second_hour(kind, "test.jsonl", rows)
    text = run(
        f"python t1.py --stage sft --model llama --data data/rl.jsonl --name held {SHORT['sft']}"
    )
    expect(
        "held out for evaluation" in text and "embedded" not in text,
        "without --test no part of --data is held out",
    )
    text = run(f"{next_command(text)} {SHORT['rl']}")
    run(f"{next_command(text)} {SHORT['eval']}")
    print("second_hour: every step did what its user means")


def main(argv: list[str] | None = None) -> int:
    parser = experiments.Parser("second_hour", __doc__, t1_options=False)
    parser.add_argument(
        "--rows", required=True, help="MATH rows with problem and solution (JSON lines, .gz or not)"
    )
    parser.add_argument(
        "--test", required=True, help="problems to evaluate on; the first 40 are taken"
    )
    parser.add_argument("--out", required=True, help="an empty folder to work in")
    return experiments.run(parser, walk, argv)


if __name__ == "__main__":
    sys.exit(main())
