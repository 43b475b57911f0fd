"""Other ways of spending tokens than a longer thought: budget forcing and the majority of k. Neither is in the T1 paper.

    python -m experiments.spending --name NAME                      after python t1.py --stage eval --name NAME
    python -m experiments.spending --name NAME --samples 32 --wait-words Wait

Takes the run's last evaluated checkpoint and asks, on the same test set, what accuracy its tokens could have bought otherwise:
  cut      a thought of at most a budget of tokens (paper, section 3): read from results.json;
  forced   budget forcing after Muennighoff et al., s1: Simple test-time scaling (arXiv 2501.19393): each time a thought ends before the
           budget, `</think>` gives way to --wait-words and the policy thinks on; one thought per problem, the first of responses.jsonl;
  majority the most frequent answer of k of --samples responses.
Writes OUT/NAME/eval/spending.json, spending.png and spending.jsonl (the responses of `majority`). Settings are those of the run and of
its evaluation; other options are t1.py's. The same command after a kill resumes and ends with the same numbers.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import data_prep
import t1
import verify

# ----------------------------------------------------------------------------------------------------------------------
# Majority
# ----------------------------------------------------------------------------------------------------------------------


def majority(answers: list[str | None]) -> int | None:
    """Index of the first response with the most frequent answer; a tie goes to the answer that appeared first. None: no answer at all.

    Two answers are one if `verify.is_equal` says so; a response without an answer has no vote.
    >>> majority(["1/2", "3", "0.5", None])
    0
    """
    votes = {}  # index of the first answer of its kind -> votes
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in votes if verify.is_equal(answer, answers[j])), i)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=votes.get) if votes else None  # max takes the first of equals


def maj_at_k(answers: list[str | None], right: list[bool], k: int) -> float:
    """How often the majority of k samples is right, over the n // k disjoint groups of k consecutive samples: an unbiased estimate."""
    hits = []
    for start in range(0, len(answers) - k + 1, k):
        chosen = majority(answers[start : start + k])
        hits.append(chosen is not None and right[start + chosen])
    return sum(hits) / len(hits)


def majorities(records: list[dict], samples: int) -> list[list]:
    """maj@k for k = 1, 2, 4, ... samples -> [k, accuracy, standard error over problems, tokens spent per problem].

    `records`: of `samples` consecutive responses per problem, with "answer", "right" and "length" (tokens).
    """
    answers = t1.grouped([r["answer"] for r in records], samples)
    right = t1.grouped([r["right"] for r in records], samples)
    length = float(np.mean([r["length"] for r in records]))
    points = []
    for k in (2**i for i in range(samples.bit_length())):
        points.append([k, *t1.with_error([[maj_at_k(a, r, k)] for a, r in zip(answers, right)]), k * length])
    return points


# ----------------------------------------------------------------------------------------------------------------------
# Budget forcing
# ----------------------------------------------------------------------------------------------------------------------


def before_end(ids: list[int], tokenizer) -> list[int]:
    """The tokens of a thought before its `</think>`: the longest run of whole tokens whose text ends before it."""
    text = tokenizer.decode(ids).partition("</think>")[0]
    n = t1.thought_length(ids, tokenizer) or len(ids)
    while not text.startswith(tokenizer.decode(ids[:n])):
        n -= 1
    return ids[:n]


def reopened(ids: list[int], finished: bool, wait: list[int], tokenizer) -> list[int]:
    """A thought that ended, or a response that did, waits instead of ending; one that was cut off is returned unchanged."""
    ids = ids[:-1] if finished else ids  # without the end token
    thought = before_end(ids, tokenizer)
    ended = finished or len(thought) < len(ids)
    return thought + wait if ended else thought


def force_budget(engine, rollouts: list[t1.Rollout], budget: int, wait_words: str, cfg: t1.Config) -> list[t1.Rollout]:
    """The same thoughts, each forced to `budget` tokens: `wait_words` stand in place of every `</think>`. Ids only, nothing is encoded
    again. Cut at a smaller budget they are the thoughts forced to that one: one set of generations serves all budgets."""
    tokenizer = engine.tokenizer
    wait = tokenizer(wait_words.replace("\\n", "\n"), add_special_tokens=False).input_ids
    thoughts = [reopened(r.ids, r.finished, wait, tokenizer) for r in rollouts]
    turn = 0
    while short := [i for i, thought in enumerate(thoughts) if len(thought) < budget]:
        turn += 1
        room = budget - min(len(thoughts[i]) for i in short)
        seeds = [t1.seed_for(cfg.seed, "forced", turn, i) for i in short]
        prompts = [rollouts[i].prompt + thoughts[i] for i in short]
        for i, new in zip(short, engine.generate(prompts, 1, seeds, room, cfg.eval_temperature)):
            thoughts[i] = reopened(thoughts[i] + new.ids, new.finished, wait, tokenizer)
    return [t1.Rollout(r.prompt, thought[:budget], [], False) for r, thought in zip(rollouts, thoughts)]
