"""A page to look into a run: one HTML file that needs no server and no network.

    python -m experiments.look runs/NAME                    writes runs/NAME/look.html

Without --keep-rollouts the nearest checkpoint draws the K responses of a step in samples.jsonl
again, with the step's random numbers: at a checkpoint's own step they are the run's, but for
rounding. Other options are t1.py's, in place of the run's: --data FILE, --k 8."""

import base64
import copy
import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import data_prep
import experiments
import t1
import verify


def run_config(folder: Path, options: list[str]) -> t1.Config:
    """That of RL, with `options` in place of its own."""
    values = data_prep.read_json(folder / "config.json").get("config")
    if not isinstance(values, dict):
        raise t1.Misuse(f"{folder}/config.json: damaged; bring it back")
    if values.get("reward"):
        t1.print0(f"--reward {values['reward']} is code: it is used only if it is given here, too")
    names = {option.name for option in dataclasses.fields(t1.Config)} - {"reward", "engine"}
    old = [f"--{name}={value}" for name, value in values.items() if name in names]
    return t1.parse_args([*old, *options, "--stage=rl"])


def policies_of(folder: Path, cfg, most: int) -> dict[int, Path]:
    """Steps done -> where RL began, and some checkpoints with the trainer's state: the anchor."""
    kept = [path for path in t1.checkpoints(folder) if (path / "trainer").exists()]
    found = {} if cfg.resume_from else {0: Path(t1.latest(cfg.model or f"{folder.parent}/sft"))}
    found |= {t1.step_of(path): path for path in evenly(kept, most)}
    if not found:
        raise t1.Misuse(f"{folder}: no checkpoint yet")
    return found


def logged(folder: Path, last: int, most: int) -> dict[int, dict[str, list]]:
    """Step -> problem -> its rows in the logs, for `most` steps; none for `last`, not taken yet."""
    path = folder / "rollouts.jsonl.gz"
    found = {last: {}}
    for row in t1.read_log(path if path.exists() else folder / "samples.jsonl"):
        if row.get("kind") != "held-out":
            found.setdefault(row["step"], {}).setdefault(row["problem"], []).append(row)
    return {step: found[step] for step in evenly(sorted(found), most)}


def evenly(items: list, most: int) -> list:
    """The last item, and others at equal distances."""
    return items[:: min(-1, -len(items) // max(1, most))][::-1]


class Checkpoint:
    """Policy and anchor after `step` steps of RL; where RL begins the two are equal."""

    def __init__(self, step: int, path: Path, cfg):
        self.cfg = cfg
        self.name = f"{path.parent.name} {path.name}".replace("checkpoint-", "")
        self.policy, self.tokenizer = t1.load_whole(str(path), cfg)
        self.anchor = copy.deepcopy(self.policy)
        if step:
            trainer = t1.sound_checkpoint(path.parent, step) + "/trainer"
            state = {}  # float32; those beside it are rounded with --dtype bfloat16
            for kind in ("policy", "anchor"):
                for name, weight in getattr(self, kind).lm.named_parameters():
                    state[f"{kind}.{name}"] = weight.detach()
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(trainer))
        self.engine = t1.TorchEngine(self.tokenizer, cfg)
        self.engine.load(self.policy)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds; a character of several tokens is added by the last."""
        texts = []
        for i in range(len(ids)):
            window = ids[max(0, i - 8) : i + 1]
            before = self.tokenizer.decode(window[:-1]).rstrip("\ufffd")
            texts.append(self.tokenizer.decode(window).rstrip("\ufffd")[len(before) :])
        return texts

    @torch.no_grad()
    def cards(self, records: list[dict], rows: list[tuple], *options) -> list[dict]:
        """Judged responses, each with three numbers for each token, at temperature and min-p."""
        batch = self.policy.pack(rows)
        arguments = (self.policy(batch), self.policy.head, batch.targets)
        sizes = [len(ids) for _, ids in rows]
        both = t1.token_logprobs_and_entropy(*arguments, *options)
        found = [values.cpu().split(sizes) for values in both]
        anchors = t1.response_logprobs(self.anchor, rows, self.cfg, *options)
        cards = []
        for record, (_, ids), logprob, entropy, anchor in zip(records, rows, *found, anchors):
            ratio = logprob - anchor
            card = record | dict(pieces=self.pieces(ids), d=round(ratio.sum().item(), 3))
            for name, values in dict(entropy=entropy, logprob=logprob, ratio=ratio).items():
                card[name] = values.double().round(decimals=3).tolist()
            cards.append(card)
        return cards

    def group(self, step: int, place: int, problem: t1.Problem, logs: list[dict]) -> dict:
        """K responses to the problem at this place of a step: its logs, or drawn again beside."""
        cfg = self.cfg
        options = (cfg.temperature, cfg.min_p)
        rollouts = []
        if len(logs) < cfg.k:
            seed = t1.seed_for(cfg.seed, "rollout", step, place)
            rollouts = [t1.Rollout(problem, seed, sample) for sample in range(cfg.k)]
            t1.generate(self.engine, rollouts, cfg.max_new, *options)
            t1.judge(rollouts, self.tokenizer, cfg)
            others = {row["response"]: row for row in logs}
            logs = [others[text] for text in others if text not in [r.text for r in rollouts]]
        rows = []
        for row in logs[: cfg.k]:  # the ids are those of the text
            whole = dataclasses.replace(cfg, max_new=10**9)
            (trace,) = t1.encode_responses([t1.Problem(row, problem.prompt)], self.tokenizer, whole)
            rows.append((problem.prompt, trace.ids[: row["length"]]))
        rows += map(t1.row_of, rollouts)
        cards = self.cards([*logs[: cfg.k], *map(t1.record_of, rollouts)], rows, *options)
        rewards = [card["reward"] - cfg.kl_coef * card["d"] for card in cards[-cfg.k :]]
        advantages = t1.rloo_advantages(torch.tensor([rewards]))[0]
        for i, card in enumerate(cards[-cfg.k :]):
            card |= dict(name=f"{i + 1}", advantage=round(advantages[i].item(), 3))
        about = f"Right: {problem.row['answer']}. Scored by {self.name}."
        return dict(step=step, about=about, cards=cards)

    def answers(self, tests: list[t1.Problem]) -> list[dict]:
        """A card for each held-out problem, with its answers after cut thoughts."""
        rollouts = t1.evaluate(self.engine, tests, 1, self.cfg)
        thoughts = [min(len(r.ids), t1.thought_length(r, self.tokenizer)) for r in rollouts]
        records = [t1.record_of(r) | dict(name=self.name, cuts=[]) for r in rollouts]
        rows = list(map(t1.row_of, rollouts))
        cards = self.cards(records, rows, self.cfg.eval_temperature or 1.0)
        for budget in (2**i for i in range(2, 14)):
            cut = t1.cut_thoughts(self.engine, self.tokenizer, rollouts, thoughts, budget, self.cfg)
            t1.grade(cut)
            for card, whole, r in zip(cards, rollouts, cut):
                if r is not whole:
                    kept = len(t1.cut_at(whole.ids, budget, self.tokenizer))
                    tail = self.tokenizer.decode(r.ids[kept:])
                    found = dict(budget=budget, kept=kept, tail=tail, right=r.right)
                    card["cuts"].append(found | dict(answer=verify.extract_answer(r.text)))
        return cards


def look(own, options: list[str]):
    """Write the page; one checkpoint is in memory at a time."""
    folder = own.folder / "rl"
    cfg = run_config(folder, options)
    found = policies_of(folder, cfg, own.checkpoints)
    rows, tests = t1.read_data(cfg)
    logs = logged(folder, max(found), own.steps)
    groups = []
    answers = []
    for at, path in found.items():
        model = Checkpoint(at, path, cfg)
        if not answers:
            problems = t1.encode_prompts(rows, model.tokenizer, cfg)
            tests = evenly(t1.encode_prompts(tests, model.tokenizer, cfg), own.problems)
        if tests and at in (min(found), max(found)):
            answers.append(model.answers(tests))
        for step in [x for x in logs if at == min(found, key=lambda y: abs(y - x))]:
            batch = {}
            for place, i in enumerate(t1.batch_indices(len(problems), cfg.prompts, step, cfg.seed)):
                batch.setdefault(problems[i].row["problem"], (place, problems[i]))
            if not set(logs[step]) <= set(batch):
                raise t1.Misuse(f"--data {cfg.data}: the run's step {step} had other problems")
            for text in list(logs[step] or batch)[-2:]:
                groups.append(model.group(step, *batch[text], logs[step].get(text, [])))
    data = dict(name=own.folder.resolve().name, curves=[], groups=groups)
    data["about"] = f"P {cfg.prompts}, K {cfg.k}, T {cfg.temperature}{t1.changes_of(cfg)}"
    for picture in (folder / "curves.png", own.folder / "sft/curves.png"):
        if picture.exists():
            data["curves"].append(base64.b64encode(picture.read_bytes()).decode())
    data["pairs"] = list(zip(*answers))  # the answers to each problem, before and after RL
    data["golds"] = [problem.row["answer"] for problem in tests]
    path = own.folder / "look.html"
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    data_prep.write(path, [TEMPLATE.replace("DATA", text)])
    t1.print0(f"{path}: {len(text) / 1e6:.1f} MB")


TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>T1</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'; img-src data:">
<style>
* { box-sizing: border-box; min-width: 0 } .tail { background: #fff3bf; outline: 1px solid #e6c94c }
body { margin: 0 auto; max-width: 1500px; padding: 0 16px 60px; background: #f6f7f9;
  color: #1c2430; font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2 { margin: 28px 0 8px; line-height: 1.2 } select { font: inherit; max-width: 100% }
small { color: #667085; font-size: 12px }
img { max-width: min(100%, max(49%, 600px)); vertical-align: top }
.bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 6px 9px; background: inherit }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)) }
.box { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 10px }
.right { border-top: 4px solid #12a150 } .wrong { border-top: 4px solid #d92d20 }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; margin: 6px 0 0 }
</style><h1></h1><p id="about"></p><h2>Curves</h2><div id="curves"></div>
<h2>K responses to one problem at one step</h2>
<div class="bar"><select id="step"></select> <select id="kind"><option value="entropy">entropy
<option value="logprob">log π<option value="ratio">log π - log π_ref</select>
<small id="token">Point at a token for its numbers. Colours are full at entropy 1.5, log π -3,
log π - log π_ref 0.3 nats (red: below 0); d is its sum over the response.</small></div>
<p id="asked" class="box"></p><div id="group" class="grid"></div>
<h2>A held-out problem before and after, and a thought that is cut</h2>
<div class="bar"><select id="test"></select><label>thinking budget
<input id="budget" type="range" min="0" max="99" value="99"></label><output></output></div>
<p id="tested" class="box"></p><div id="pair" class="grid"></div>
<script type="application/json" id="data">DATA</script><script>
const at = id => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const KINDS = {entropy: [1.5, "234,88,12"], logprob: [-3, "37,99,235"], ratio: [0.3, "5,150,105"]};
// What a run wrote goes through textContent alone: it is never read as HTML.
function add(parent, tag, text = "", attributes = {}) {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  return made;
}
function show(parent, card, cut = card) {
  const kind = at("kind").value, [full, ink] = KINDS[kind];
  const verdict = cut.right ? "right" : "wrong";
  const box = add(parent, "div", "", {class: `box ${card.pattern ? "wrong" : verdict}`});
  add(box, "b", card.name || `logged, ${card.kind || "kept"}`);
  const count = cut == card ? card.pieces.length : `${cut.kept} of ${card.pieces.length}`;
  const words = ["", verdict, `answer ${cut.answer ?? "none"}`, `${count} tokens`];
  if (cut == card) words.push(`reward ${card.reward}`, card.pattern || "no pattern", `d ${card.d}`);
  if ("advantage" in card) words.push(`advantage ${card.advantage}`);
  add(box, "small", words.join(" · "));
  const text = add(box, "pre");
  card.pieces.slice(0, cut.kept).forEach((piece, i) => {
    const part = 0.75 * card[kind][i] / full;
    const hue = part < 0 ? "217,45,32" : ink;
    const style = `background: rgba(${hue},${Math.min(0.75, Math.abs(part))})`;
    const title = `entropy ${card.entropy[i]}, log π ${card.logprob[i]}, `;
    add(text, "span", piece, {style, title: title + `log π - log π_ref ${card.ratio[i]}`});
  });
  if (cut.tail) add(text, "span", cut.tail, {class: "tail"});
}
function render() {
  for (const id of ["group", "pair"]) at(id).replaceChildren();
  const group = data.groups[at("step").value];
  at("asked").textContent = group.cards[0].problem;
  add(at("asked"), "small", ` ${group.about}`);
  group.cards.forEach(card => show(at("group"), card));
  const pair = data.pairs[at("test").value]; if (!pair) return;
  at("tested").textContent = pair[0].problem;
  add(at("tested"), "small", ` Right: ${data.golds[at("test").value]}.`);
  const cuts = pair.flatMap(card => card.cuts);
  const budgets = [...new Set(cuts.map(cut => cut.budget))].sort((a, b) => a - b);
  at("budget").max = budgets.length;
  const budget = budgets[at("budget").value];
  document.querySelector("output").textContent = budget ? `${budget} tokens` : "the whole thought";
  pair.forEach(card => show(at("pair"), card, card.cuts.find(x => x.budget == budget)));
}
document.title = document.querySelector("h1").textContent = `Run ${data.name}`;
at("about").textContent = data.about;
data.curves.forEach(png => add(at("curves"), "img", "", {src: `data:image/png;base64,${png}`}));
data.groups.forEach(({step, cards}, value) =>
  add(at("step"), "option", `step ${step}: ${cards[0].problem}`.slice(0, 80), {value}));
data.pairs.forEach(([card], value) => add(at("test"), "option", card.problem.slice(0,80), {value}));
for (const id of ["step", "kind", "test", "budget"]) at(id).oninput = render;
for (const [id, value] of new URLSearchParams(location.hash.slice(1))) at(id).value = value;
document.onpointerover = e => e.target.title && (at("token").textContent = e.target.title);
render();
</script>
"""


@experiments.program
def main(argv: list[str] | None = None):
    parser = experiments.Parser("look", __doc__)
    parser.add_argument("folder", type=Path, help="runs/NAME")
    for name, most in dict(steps=3, checkpoints=2, problems=3).items():
        parser.add_argument(f"--{name}", type=int, default=most, help=f"at most (default: {most})")
    look(*parser.parse_known_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
