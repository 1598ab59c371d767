"""
The data pipeline of Re-Align-410K (paper section 6): from folders of pictures to training samples.

    pools         characters/ objects/ scenes/: your pictures
    references    by task type, in the paper's proportions: which pictures a sample is made of          no model
    instructions  an MLLM sees the references and writes an instruction that can be carried out
    plans         an MLLM sees references and instruction, never the target, and writes the IC-CoT
    targets       an image model sees references, instruction and caption, and paints
    scores        CLIP(caption, target), aesthetic score of the target, PF and SC by an MLLM judge
    shards        what passes the cuts, as tar shards (shards.py), with a report of what was dropped and why

Each stage reads the file of the one before and appends to its own, a line a sample: it can be killed and repeated.
Answers of models are kept in replies/ (endpoint.py), so nothing is asked twice; scores are kept apart from the cuts,
so that thresholds can be changed without asking again. Without a network:

    python curate.py --serve_toy                                 an endpoint that answers both routes by drawing
    python curate.py --config toy                                draws pools, runs all stages against it
    python sft.py --config toy --data out/toy-curated/shards --out out/curated-sft

With your own pictures and any OpenAI-compatible endpoint (the key is read from OPENAI_API_KEY):

    python curate.py --config full --pools pictures --count 1000 --dry_run     requests, tokens, pictures
    python curate.py --config full --pools pictures --count 1000 --chat_model gemini-2.5-pro --image_model gpt-image-2

Differences from the paper: its prompts and thresholds are unpublished; these are ours, and by default cuts are
percentiles within a task, since CLIP's cosines differ between models and tasks. Left out: deduplication of pools,
image search, human review.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import iccot
from data import ShardWriter, Source, picture_sheet
from iccot import TASKS
from reward import Clip
from runtime import files
from runtime.config import UserError, exit_on_user_error, parse
from studies.endpoint import Endpoint, Question, Refused, Unusable, in_parallel
from studies.judge import ask_score
from toy.clip import train_toy_clip
from vision import open_image, to_png

STAGES = ("references", "instructions", "plans", "targets", "scores", "shards")


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


TRIES = 3  # questions to get a usable answer


@dataclass(frozen=True)
class Config:
    config: str = ""  # name of the preset
    pools: str = ""  # folder with characters/, objects/ and scenes/
    out: str = "out/curated"
    count: int = 1000  # samples to begin with
    max_references: int = 4
    seed: int = 0
    stage: str = "all"  # all, or one of references, instructions, plans, targets, scores, shards
    dry_run: bool = False  # count what would be asked, and stop
    # models
    chat_url: str = "https://api.openai.com/v1"  # OpenAI-compatible base URL of the MLLM, up to /v1
    chat_model: str = "gemini-2.5-pro"  # writes instructions and plans
    judge_model: str = ""  # gives PF and SC; "": chat_model
    image_url: str = ""  # base URL of the image model; "": chat_url
    image_model: str = "gpt-image-2"
    image_size: str = "1024x1024"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    workers: int = 8  # requests at a time
    per_minute: float | None = None  # requests a minute, at most, to each model
    timeout: float = 180.0  # seconds
    tries: int = 6  # of one request, with growing pauses
    # scores and cuts
    clip_name: str = "ViT-B-32"  # CLIP of the caption-target score
    clip: str = "openai"
    aesthetic: str = ""  # .safetensors, weight (1, E) and bias (1,): LAION's linear head; "": none
    drop_clip: float = 10.0  # per cent of each task with the lowest CLIP score
    drop_aesthetic: float = 10.0  # per cent of each task with the lowest aesthetic score
    least_clip: float | None = None  # absolute cut in place of the percentage
    least_pf: float = 6.0
    least_sc: float = 6.0
    # output
    shard_size: int = 1000
    serve_toy: bool = False  # answer both routes by drawing the toy world, until stopped
    port: int = 8765  # of that endpoint

    def __post_init__(self):
        if self.stage not in ("all", *STAGES):
            raise ValueError(f"stage={self.stage}: expected all or one of {', '.join(STAGES)}")
        if self.count < 1 or self.workers < 1 or not 2 <= self.max_references <= 4:
            raise ValueError(
                f"count={self.count}, workers={self.workers}, max_references={self.max_references}: expected "
                f"1 or more, "
                f"at least 1, and 2 to 4"
            )


TOY_URL = "http://127.0.0.1:8765/v1"


PRESETS = {
    "full": {},
    "toy": dict(
        pools="out/toy-pools",
        out="out/toy-curated",
        count=60,
        chat_url=TOY_URL,
        chat_model="toy",
        image_model="toy",
        image_size="32x32",
        clip_name="toy",
        clip="out/toy-clip-metric",
        drop_aesthetic=0.0,
        shard_size=25,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# files: a line a sample, appended and synced; a line torn by a crash is forgotten


def read_lines(path):
    """{key: record}. A last line without its end was not written: it is cut off, so that the next one starts afresh."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    records = [json.loads(line) for line in whole.splitlines() if line.strip()]
    return {record["key"]: record for record in records}


def append(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_stage(name, before, function, config):
    """Apply `function` to every record that the stage before finished and this one has not. Returns {key: record}.

    function(record) -> fields to add, or {"dropped": why}. A dropped sample stays in the file and goes no further.
    """
    path = Path(config.out) / f"{name}.jsonl"
    done = read_lines(path)
    left = [record for key, record in before.items() if key not in done and "dropped" not in record]
    with tqdm(total=len(left), disable=None, desc=name) as bar:
        for record, fields in in_parallel(function, left, config.workers, bar):
            done[record["key"]] = record | fields
            append(path, done[record["key"]])
    dropped = sum("dropped" in record for record in done.values())
    print(f"{name}: {len(left)} new, {len(done) - dropped} usable, {dropped} dropped")
    return done


def usable_answer(endpoint, question, read):
    """read(answer) of the first usable answer of up to TRIES, or {"dropped": why}."""
    for nonce in range(TRIES):
        asked = Question(question.prompt, question.images, question.size, nonce)
        try:
            return read(endpoint.picture(asked) if asked.size else endpoint.text(asked))
        except Refused as error:
            return {"dropped": f"refused: {error}"}
        except UserError:  # the endpoint itself is at fault, not this answer
            raise
        except (Unusable, ValueError) as error:
            reason = error
    return {"dropped": f"no usable answer in {TRIES}: {reason}"}


# ---------------------------------------------------------------------------------------------------------------------
# references


def pools_of(config):
    """{kind: [paths relative to the pools]}; UserError for a pool that is missing or empty."""
    found = {}
    for kind in ("characters", "objects", "scenes"):
        folder = Path(config.pools) / kind
        if not config.pools or not folder.is_dir():
            raise UserError(
                f"the pool {folder} is missing; --pools must hold characters/, objects/ and scenes/ with pictures"
            )
        found[kind] = sorted(
            str(path.relative_to(config.pools))
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES
        )
        if not found[kind]:
            raise UserError(f"the pool {folder} holds no {', '.join(SUFFIXES)} picture")
    return found


def draw_references(pools, config):
    """{key: record} of `count` samples: task in the paper's proportions, then pictures of the kinds that it needs."""
    records, rng = {}, np.random.default_rng(config.seed)
    shares = np.array(list(TASKS.values())) / sum(TASKS.values())
    pick = lambda kind: pools[kind][int(rng.integers(len(pools[kind])))]
    subject = lambda: pick("characters" if rng.random() < 0.5 else "objects")
    attempts = 0
    while len(records) < config.count:
        attempts += 1
        if attempts > 50 * config.count:
            raise UserError(
                f"the pools have too few pictures for {config.count} different samples; use --count={len(records)}"
            )
        task = str(rng.choice(list(TASKS), p=shares))
        references = {
            "add": lambda: [pick("scenes"), subject()],
            "replace": lambda: [pick("scenes"), subject()],
            "attribute": lambda: [pick("objects"), pick("objects")],
            "scene": lambda: [subject(), pick("scenes")],
            "subject": lambda: [subject()],
            "subject_composition": lambda: [
                subject() for _ in range(int(rng.integers(2, config.max_references + 1)))
            ],
            "scene_composition": lambda: [
                *(subject() for _ in range(int(rng.integers(1, config.max_references)))),
                pick("scenes"),
            ],
        }[task]()
        if len(set(references)) < len(references):
            continue
        key = f"{task}-{hashlib.sha256(json.dumps([task, references]).encode()).hexdigest()[:16]}"
        records.setdefault(key, {"key": key, "task": task, "references": references})
    return records


# ---------------------------------------------------------------------------------------------------------------------
# what models are asked. A question holds references and text; the target is in those of the judge alone.

ACTIONS = {
    "add": "Image 1 is a picture to edit. The instruction adds the subject of image 2 to it.",
    "replace": "Image 1 is a picture to edit. The instruction replaces something in it with the subject of image 2.",
    "attribute": "Image 1 shows an object to edit. The instruction gives it an attribute of image 2: its colour, "
    "pattern, material or style.",
    "scene": "The instruction moves what image 1 shows into the scene of image 2.",
    "subject": "The instruction shows the subject of image 1 in a new situation.",
    "subject_composition": "The instruction brings the subjects of all images together in one picture.",
    "scene_composition": "The instruction brings the subjects together in the scene of the last image.",
}


INSTRUCTION_PROMPT = """You write instructions for an artist who makes one new picture from {count} reference image(s).
Task type: {task}. {action}
Look closely at the images, at secondary details too: what a subject holds or wears, where there is room, how the light
falls. Write one instruction that can be carried out, that uses every image, and that does not describe what the images
already show. Speak of the images as "image 1", "the second image" and so on, or by what they show. Answer with the
instruction alone, in one or two sentences."""


PLAN_PROMPT = """An artist will make one new picture from {count} reference image(s) and this instruction:
{instruction}
Task type: {task}. You see the references, not the picture: it does not exist yet. Write a plan for it as one JSON
object:
{{"out_caption": "one sentence that describes the finished picture by itself, without the word image",
 "relations": [{shape}]}}
There is exactly one relation for each reference image, in order: one short sentence that says what it gives to the
picture, such as "The woman is from image_1." or "The style is consistent with image_2." Answer with the JSON
object alone."""


TARGET_PROMPT = """Make one picture from the reference images.
Instruction: {instruction}
The finished picture: {caption}
Keep the identity of every subject as its reference shows it."""


def pictures_of(record, config):
    return tuple(to_png(open_image(Path(config.pools) / path)) for path in record["references"])


def instruction_question(record, config):
    prompt = INSTRUCTION_PROMPT.format(
        count=len(record["references"]), task=record["task"], action=ACTIONS[record["task"]]
    )
    return Question(prompt, pictures_of(record, config))


def plan_question(record, config):
    """References and instruction, and nothing else: the plan must not know the target."""
    shape = ", ".join(f'{{"relation_{i}": "..."}}' for i in range(1, len(record["references"]) + 1))
    prompt = PLAN_PROMPT.format(
        count=len(record["references"]),
        instruction=record["instruction"],
        task=record["task"],
        shape=shape,
    )
    return Question(prompt, pictures_of(record, config))


def target_question(record, config):
    prompt = TARGET_PROMPT.format(
        instruction=record["instruction"], caption=record["plan"]["out_caption"]
    )
    return Question(prompt, pictures_of(record, config), config.image_size)


# ---------------------------------------------------------------------------------------------------------------------
# the stages that ask


def read_instruction(record, answer):
    instruction = " ".join(answer.split()).strip('"')
    if len(instruction) > 1000:
        raise ValueError(f"an instruction of {len(instruction)} characters")
    iccot.check_instruction(instruction, len(record["references"]))
    return {"instruction": instruction}


def read_plan(record, answer):
    """Only plans that follow the grammar are kept; a JSON object may have words or a code fence around it."""
    start, end = answer.find("{"), answer.rfind("}")
    text = answer[start : end + 1] if start >= 0 else answer
    plan = (
        iccot.from_json(text, len(record["references"]))
        if start >= 0
        else iccot.parse(text, len(record["references"]))
    )
    return {"plan": json.loads(iccot.to_json(plan))}


def keep_target(record, answer, config):
    """Store the picture as PNG; ValueError if it is none."""
    import io

    image = open_image(io.BytesIO(answer), "the picture that came")
    path = Path(config.out) / "targets" / f"{record['key']}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_suffix(".tmp")
    hidden.write_bytes(to_png(image))
    os.replace(hidden, path)
    return {"target": str(path.relative_to(config.out))}


def aesthetic_head(path, clip):
    """(weight (D,), bias) of a linear head on unit CLIP embeddings, or None."""
    if not path:
        return None
    if not Path(path).is_file():
        raise UserError(
            f"aesthetic head not found at {path}; give a .safetensors file with weight and bias, or leave it out"
        )
    head = load_file(path)
    wanted = clip.embed_captions(["a"]).shape[1]
    if set(head) != {"weight", "bias"} or head["weight"].numel() != wanted:
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        raise UserError(
            f"{path} holds {shapes}; expected weight (1, {wanted}) and bias (1,), for the embedding of this CLIP"
        )
    return head["weight"].flatten().float(), float(head["bias"])


def score(record, clip, head, judge, config):
    """{"scores": ...}: CLIP cosine of caption and target, aesthetic score, PF and SC (None: no usable answer)."""
    image = open_image(Path(config.out) / record["target"])
    e, u = clip.embed_images([image]), clip.embed_captions([record["plan"]["out_caption"]])
    scores = {"clip": round(float((e * u).sum()), 5)}
    if head is not None:
        scores["aesthetic"] = round(float(e[0] @ head[0] + head[1]), 4)
    pictures = (*pictures_of(record, config), to_png(image))
    for name in ("PF", "SC"):
        try:
            scores[name], scores[f"{name}_reason"] = ask_score(
                judge, name, record["instruction"], pictures, "scene" in record["task"]
            )
        except Refused as error:
            return {"dropped": f"refused by the judge: {error}"}
    return {"scores": scores}


# ---------------------------------------------------------------------------------------------------------------------
# cuts and shards


def why_dropped(records, config):
    """{key: reason} of the scored records that do not pass, "" for those that do."""
    reasons = {}
    for task in TASKS:
        of_task = [record for record in records.values() if record["task"] == task]
        floor = {
            name: np.percentile([one["scores"][name] for one in of_task], percent)
            if of_task and name in of_task[0]["scores"]
            else -np.inf
            for name, percent in (("clip", config.drop_clip), ("aesthetic", config.drop_aesthetic))
        }
        if config.least_clip is not None:
            floor["clip"] = config.least_clip
        for record in of_task:
            scores, reason = record["scores"], ""
            if scores["PF"] is None or scores["SC"] is None:
                reason = "the judge gave no score"
            elif scores["PF"] < config.least_pf:
                reason = f"PF below {config.least_pf:g}"
            elif scores["SC"] < config.least_sc:
                reason = f"SC below {config.least_sc:g}"
            elif scores["clip"] < floor["clip"]:
                reason = "caption and target disagree (CLIP)"
            elif scores.get("aesthetic", 0) < floor["aesthetic"]:
                reason = "aesthetic score"
            reasons[record["key"]] = reason
    return reasons


def write_shards(records, config):
    """Shards of what passes, a report, a sheet of examples. Shards are written anew; nothing is asked."""
    scored = {key: record for key, record in records.items() if "dropped" not in record}
    reasons = why_dropped(scored, config)
    folder = Path(config.out) / "shards"
    for old in [*folder.glob("*.tar"), *folder.glob("*.partial")]:
        old.unlink()
    with ShardWriter(folder, config.shard_size) as writer:
        for key, record in sorted(scored.items()):
            if not reasons[key]:
                kept = {
                    name: record[name] for name in ("key", "task", "instruction", "plan", "scores")
                }
                kept["provenance"] = {
                    "references": record["references"],
                    "chat_model": config.chat_model,
                    "image_model": config.image_model,
                    "judge_model": config.judge_model or config.chat_model,
                }
                writer.write(
                    kept,
                    pictures_of(record, config),
                    (Path(config.out) / record["target"]).read_bytes(),
                )
    return reasons


def report(all_records, reasons, config):
    """report.md: what each stage dropped and why, and what is left of each task."""
    lines = ["| stage | dropped because | samples |", "| --- | --- | --- |"]
    for stage in STAGES[1:-1]:
        why = Counter(
            record["dropped"].split(":")[0]
            for record in all_records[stage].values()
            if "dropped" in record
        )
        lines += [f"| {stage} | {reason} | {count} |" for reason, count in why.most_common()]
    lines += [
        f"| cuts | {reason} | {count} |"
        for reason, count in Counter(r for r in reasons.values() if r).most_common()
    ]
    lines += ["", "| task | begun | kept |", "| --- | --- | --- |"]
    begun = Counter(record["task"] for record in all_records["references"].values())
    kept = Counter(key.rsplit("-", 1)[0] for key, reason in reasons.items() if not reason)
    lines += [f"| {task} | {begun[task]} | {kept[task]} |" for task in TASKS]
    total, left = sum(begun.values()), sum(kept.values())
    lines += [f"| all | {total} | {left} ({100 * left / max(1, total):.0f} %) |"]
    text = "\n".join(lines)
    files.write_text(Path(config.out) / "report.md", text + "\n")
    print(text)
    if left:
        source = Source(Path(config.out) / "shards")
        picture_sheet([source.sample(i) for i in range(min(12, len(source)))]).save(
            Path(config.out) / "examples.png"
        )
        print(f"{left} samples in {config.out}/shards, examples in {config.out}/examples.png")


# ---------------------------------------------------------------------------------------------------------------------
# running it


def estimate(records, config):
    """What the models would be asked, at most one answer each: requests, pictures sent and made, tokens (about)."""
    count, references = len(records), sum(len(record["references"]) for record in records.values())
    # characters a token
    words = (len(INSTRUCTION_PROMPT) + len(PLAN_PROMPT) + len(TARGET_PROMPT) + 2 * 1200) // 4
    picture = 1000  # tokens of a picture of about a megapixel, roughly; ask your provider
    print(f"{count} samples, {references} references; nothing was asked")
    print(
        f"chat      {4 * count:8,d} requests (instruction, plan, PF, SC), {4 * references + 2 * count:8,d} pictures "
        f"sent, about {count * (words + 250) + picture * (4 * references + 2 * count):,d} tokens"
    )
    print(
        f"images    {count:8,d} requests, {references:8,d} pictures sent, {count:,d} made ({config.image_size})"
    )


def open_clip_of(config):
    if config.clip_name == "toy" and not (Path(config.clip) / "clip.json").is_file():
        train_toy_clip(config.clip, seed=1, steps=300, patch_size=8, width=128)
    return Clip(config.clip_name, config.clip)


def curate(config):
    """All stages that are asked for."""
    out = Path(config.out)
    files.check_writable(out)
    settings = {key: getattr(config, key) for key in ("pools", "count", "max_references", "seed")}
    if (out / "settings.json").is_file() and (
        before := files.read_json(out / "settings.json")
    ) != settings:
        key = next(key for key in settings if before.get(key) != settings[key])
        raise UserError(
            f"{out} was begun with {key}={before.get(key)}, now {key}={settings[key]}; choose another --out"
        )
    if config.config == "toy" and not Path(config.pools).is_dir():
        from toy.server import draw_pools

        draw_pools(config.pools)
    records = {"references": read_lines(out / "references.jsonl")}
    if len(records["references"]) < config.count:
        drawn = draw_references(pools_of(config), config)
        if config.dry_run:
            return estimate(drawn, config)
        files.write_text(out / "settings.json", json.dumps(settings) + "\n")
        files.write_text(
            out / "references.jsonl",
            "".join(json.dumps(record) + "\n" for record in drawn.values()),
        )
        records["references"] = drawn
    if config.dry_run:
        return estimate(records["references"], config)
    endpoint = partial(
        Endpoint,
        replies=out / "replies",
        key_variable=config.key_variable,
        per_minute=config.per_minute,
        timeout=config.timeout,
        tries=config.tries,
    )
    chat, painter = (
        endpoint(config.chat_url, config.chat_model),
        endpoint(config.image_url or config.chat_url, config.image_model),
    )
    judge = endpoint(config.chat_url, config.judge_model or config.chat_model)
    scorer = lru_cache(
        lambda: (clip := open_clip_of(config), aesthetic_head(config.aesthetic, clip))
    )
    stages = {
        "instructions": lambda r: usable_answer(
            chat, instruction_question(r, config), partial(read_instruction, r)
        ),
        "plans": lambda r: usable_answer(chat, plan_question(r, config), partial(read_plan, r)),
        "targets": lambda r: usable_answer(
            painter, target_question(r, config), lambda answer: keep_target(r, answer, config)
        ),
        "scores": lambda r: score(r, *scorer(), judge, config),
    }
    last = STAGES.index(config.stage) if config.stage != "all" else len(STAGES) - 1
    for i, (name, function) in enumerate(stages.items(), 1):
        if i < last and config.stage != "all" or i > last:
            records[name] = read_lines(out / f"{name}.jsonl")
            continue
        if name == "scores":
            scorer()  # before any question: a CLIP that is not there is found out now
        records[name] = run_stage(name, records[STAGES[i - 1]], function, config)
    if config.stage in ("all", "shards"):
        report(records, write_shards(records["scores"], config), config)


def main(config):
    with exit_on_user_error(ValueError):
        if config.serve_toy:
            from toy.server import serve

            serve(config.port)
            return
        with torch.no_grad():
            curate(config)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
