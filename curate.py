"""
The data pipeline of Re-Align-410K: from folders of pictures to training samples.

    references      by task, in the paper's proportions: which pictures of your pools
                    (characters/ objects/ scenes/) a sample is made of
    instructions    an MLLM sees the references and writes an instruction that can be carried out
    plans           an MLLM sees references and instruction, never the target: it writes the IC-CoT
    targets         an image model sees references, instruction and caption, and paints
    scores          CLIP(caption, target), aesthetic score of the target, PF and SC by an MLLM judge
    shards          what passes the cuts, as tar shards (data.py), and a report of what was dropped

Each stage reads the file of the one before and appends to its own, a line a sample: it can be
killed and repeated. Answers of models are kept in replies/ (studies/endpoint.py), so nothing is
asked twice; scores are kept apart from the cuts, so that these can be changed without asking again.
A sample that fails, by a picture that does not open or an endpoint that gives no usable answer, is
dropped with its reason and the others go on; repeating the command tries it again, unless the model
declined. The run stops when most samples fail.

Differences from the paper: its prompts and thresholds are unpublished; these are ours, and cuts are
percentiles within a task, since CLIP's cosines differ between models and tasks. Left out:
deduplication of pools, image search, human review, languages other than English.

Without a network, against an endpoint that answers both routes by drawing:

    python curate.py --serve_toy
    python curate.py --config toy
    python sft.py --config toy --data out/toy-curated/shards --out out/curated-sft

With your pictures and any OpenAI-compatible endpoint (pip install openai; the key comes from
OPENAI_API_KEY): what it would ask, and then what it asks. Of samples that exist, such as MACRO's
(studies/material.py), pictures are kept, and only plans and scores are asked for:

    python curate.py --config full --pools pictures --count 1000 --dry_run
    python curate.py --config full --pools pictures --count 1000
    python curate.py --config full --from Macro --count 1000 --max_references 10
"""

import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import iccot
from data import ShardWriter, hash_of
from runtime import files
from runtime.config import UserError, exit_on_user_error, parse
from studies.endpoint import (
    Access,
    Endpoint,
    Fault,
    Question,
    Refused,
    ask_score,
    commonest,
    in_parallel,
    last_object,
    to_send,
    visible,
)
from studies.material import draw_references, folder_of, pools_of, read_triples
from toy.prepare import toy_clip
from toy.server import draw_pools, serve
from vision import open_image, to_png

TOY_CLIP_STEPS = 300  # of training, where the toy's CLIP is missing
LONGEST = 1000  # characters of an instruction


@dataclass(frozen=True)
class Config:
    config: str = ""  # name of the preset
    pools: str = ""  # folder with characters/, objects/ and scenes/
    from_path: str = ""  # or samples without IC-CoT, whose pictures are kept (--from PATH)
    out: str = "out/curated"
    count: int = 1000  # samples to begin with
    max_references: int = 4  # of a sample, up to 10
    seed: int = 0
    dry_run: bool = False  # count what would be asked, and stop
    # models
    chat_url: str = "https://api.openai.com/v1"  # OpenAI-compatible base URL of the MLLM, up to /v1
    chat_model: str = "gpt-5.4"  # writes instructions and plans
    judge_model: str = ""  # gives PF and SC; "": chat_model
    image_url: str = ""  # base URL of the image model; "": chat_url
    image_model: str = "gpt-image-2"
    image_size: str = "1024x1024"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    workers: int = 8  # requests at a time
    timeout: float = 180.0  # seconds
    tries: int = 6  # of one request, with growing pauses
    max_tokens: int = 1400  # of an answer in text, thinking included; raised where it is too few
    # scores and cuts
    clip: str = "ViT-B-32:openai"  # CLIP of the caption-target score, or the folder of one
    aesthetic: str = ""  # .safetensors, weight (1, E) and bias (1,): LAION's linear head; "": none
    drop_clip: float = 10.0  # per cent of each task with the lowest CLIP score
    drop_aesthetic: float = 10.0  # per cent of each task with the lowest aesthetic score
    least_pf: float = 6.0
    least_sc: float = 6.0
    # output
    shard_size: int = 1000
    serve_toy: bool = False  # answer both routes by drawing the toy world, until stopped
    port: int = 8765  # of that endpoint
    painter_errors: float = 0.0  # share of its targets with one wrong fact

    def __post_init__(self):
        if self.count < 1 or self.workers < 1 or not 2 <= self.max_references <= 10:
            raise ValueError(
                f"count={self.count}, workers={self.workers}, "
                f"max_references={self.max_references}: expected 1 or more, at least 1, and 2 to 10"
            )


PRESETS = {
    "full": {},
    "toy": dict(
        pools="out/toy-pools",
        out="out/toy-curated",
        count=60,
        chat_url="http://127.0.0.1:8765/v1",  # of --serve_toy
        chat_model="toy",
        image_model="toy",
        image_size="32x32",
        clip="out/toy-clip-metric",
        drop_aesthetic=0.0,
        shard_size=25,
    ),
}


# --------------------------------------------------------------------------------------------------
# what the models are asked, and how their answers are read. The judge's: studies/endpoint.py

ACTIONS = {
    "add": "Image 1 is a picture to edit. The instruction adds the subject of image 2 to it.",
    "replace": "Image 1 is a picture to edit. The instruction replaces something in it with the "
    "subject of image 2.",
    "attribute": "Image 1 shows an object to edit. The instruction gives it an attribute of image "
    "2: its colour, pattern, material or style.",
    "scene": "The instruction moves what image 1 shows into the scene of image 2.",
    "subject": "The instruction shows the subject of image 1 in a new situation.",
    "subject_composition": "The instruction brings the subjects of all images together in one "
    "picture.",
    "scene_composition": "The instruction brings the subjects together in the scene of the last "
    "image.",
}

INSTRUCTION_PROMPT = """You write instructions for an artist who makes one new picture from {count}
reference image(s).
Task type: {task}. {action}
Look closely at the images, at secondary details too: what a subject holds or wears, where there is
room, how the light falls. Write one instruction that can be carried out, that uses every image, and
that does not describe what the images already show. Speak of the images as "image 1", "the second
image" and so on, or by what they show. Answer with the instruction alone, in one or two
sentences."""

PLAN_PROMPT = """An artist will make one new picture from {count} reference image(s) and this
instruction:
{instruction}
Task type: {task}. You see the references, not the picture: it does not exist yet. Write a plan for
it as one JSON object:
{{"out_caption": "one sentence that describes the finished picture by itself, without the word
image", "relations": [{shape}]}}
There is exactly one relation for each reference image, in order: one short sentence that says what
it gives to the picture, such as "The woman is from image_1." or "The style is consistent with
image_2." Answer with the JSON object alone."""

TARGET_PROMPT = """Make one picture from the reference images.
Instruction: {instruction}
The finished picture: {caption}
Keep the identity of every subject as its reference shows it."""

# how a model begins that declines in words
DECLINED = re.compile(
    r"\W*(?:(?:I['’]m|I am|we['’]re|we are) (?:very |so )?(?:sorry|unable|not able)|sorry\b|"
    r"I (?:can['’]?t|cannot|can not|won['’]t|will not)\b|as an AI\b)",
    re.IGNORECASE,
)


def plan_question(record, images):
    """Asks for an IC-CoT: references and instruction, and nothing else, never the target."""
    count = len(record["references"])
    shape = ", ".join(f'{{"relation_{i}": "..."}}' for i in range(1, count + 1))
    prompt = PLAN_PROMPT.format(
        count=count, instruction=record["instruction"], task=record["task"], shape=shape
    )
    return Question(prompt, images)


def read_instruction(record, answer):
    """{"instruction": ...}, neither empty nor too long.

    Refused if it is none, but says that the model declines. ValueError for one that will not do.
    """
    instruction = " ".join(visible(answer).split()).strip('"').strip()
    if not 0 < len(instruction) <= LONGEST:
        raise ValueError(f"an instruction of {len(instruction)} characters")
    if DECLINED.match(instruction):
        raise Refused(instruction)
    return {"instruction": instruction}


def read_plan(record, answer):
    """{"plan": ...} of the last JSON object that looks like one; else ValueError."""
    plan = json.dumps(last_object(answer, "out_caption"))
    plan = iccot.from_json(plan, len(record["references"]))
    return {"plan": iccot.to_record(plan)}


def read_picture(answer):
    """The picture as PNG bytes; ValueError if it does not open."""
    return to_png(open_image(io.BytesIO(answer), "the picture that came"))


# --------------------------------------------------------------------------------------------------
# a stage: a file with a line a sample


def by_key(path):
    """{key: record} of a stage's file, {} where there is none. UserError for a torn record."""
    records = files.read_lines(path, "key")
    for record in records:
        files.check_name(record["key"], path)
    return {record["key"]: record for record in records}


def run_stage(name, before, function, config):
    """Apply `function` to every record that the stage before finished and this one has not.

    function(record) -> fields to add. A Fault is the fault of one sample: it stays in the file as
    {"dropped": why}, goes no further, and is tried again next time, unless the model declined.
    Returns {key: record}. UserError when most new samples fail, or when none is left.
    """
    path = Path(config.out) / f"{name}.jsonl"
    done = by_key(path)
    usable = [record for record in before.values() if "dropped" not in record]
    new = [record for record in usable if record["key"] not in done]
    again = [record for record in usable if may_recover(done.get(record["key"], {}))]
    with tqdm(total=len(new) + len(again), disable=None, desc=name) as bar:
        for records, patient in ((new, False), (again, True)):  # what failed once may fail again
            results = in_parallel(function, records, config.workers, bar=bar, patient=patient)
            for record, result in results:
                fields = {"dropped": str(result)} if isinstance(result, Fault) else result
                if done.get(record["key"]) != record | fields:
                    done[record["key"]] = record | fields
                    files.append_line(path, done[record["key"]])
    reasons = [record["dropped"] for record in done.values() if "dropped" in record]
    once_more = sum(map(may_recover, done.values()))
    print(
        f"{name}: {len(new)} new, {len(again)} tried again, {len(done) - len(reasons)} usable, "
        f"{len(reasons)} dropped" + f" ({once_more} will be tried again)" * bool(once_more)
    )
    if reasons and len(reasons) == len(done):
        raise UserError(
            f"{name}: none of {len(done)} samples is usable, most often: {commonest(reasons)}"
        )
    return done


def may_recover(record):
    """Whether a sample was dropped for another reason than a model that declined."""
    return not record.get("dropped", "refused").startswith("refused")


# --------------------------------------------------------------------------------------------------
# the stages that ask


def opened(path):
    """A picture; a Fault of its sample if it does not open."""
    try:
        return open_image(path)
    except (OSError, ValueError) as error:
        raise Fault("a picture does not open", error) from None


def references_of(record, config):
    """The references of a record, PIL."""
    return [opened(Path(config.pools) / path) for path in record["references"]]


def pictures_of(record, config):
    """PNG bytes of a record's references, as they are sent."""
    return tuple(map(to_send, references_of(record, config)))


def aesthetic_head(path, clip):
    """(weight (E,), bias) of a linear head on unit CLIP embeddings; None where path is ""."""
    if not path:
        return None
    if not Path(path).is_file():
        raise UserError(f"aesthetic head not found at {path}; give a .safetensors file or none")
    head, size = load_file(path), clip.embed_captions(["a"]).shape[1]
    if set(head) != {"weight", "bias"} or head["weight"].numel() != size:
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        raise UserError(
            f"{path} holds {shapes}; expected weight (1, {size}) and bias (1,), "
            "for the embedding of this CLIP"
        )
    return head["weight"].flatten().float(), float(head["bias"])  # (E,)


class Crew:
    """The models of the pipeline, and what each does with a record: fields to add, or a Fault."""

    def __init__(self, config):
        self.config = config
        self.chat = self._endpoint(config.chat_url, config.chat_model)
        self.painter = self._endpoint(config.image_url or config.chat_url, config.image_model)
        self.judge = self._endpoint(config.chat_url, config.judge_model or config.chat_model)
        self.stages = {
            "instructions": self.instruct,
            "plans": self.plan,
            "targets": self.paint,
            "scores": self.score,
        }
        if config.from_path:  # samples that exist have instruction and target
            del self.stages["instructions"], self.stages["targets"]

    def _endpoint(self, url, model):
        config = self.config
        access = Access(
            url, model, config.key_variable, config.timeout, config.tries, config.max_tokens
        )
        return Endpoint(access, Path(config.out) / "replies")

    def load_scorer(self):
        """Make ready for `score`: the CLIP, and the aesthetic head on it."""
        steps = TOY_CLIP_STEPS if self.config.config == "toy" else 0
        self.clip = toy_clip(self.config.clip, steps)
        self.head = aesthetic_head(self.config.aesthetic, self.clip)

    def instruct(self, record):
        """The instruction, by the MLLM."""
        prompt = INSTRUCTION_PROMPT.format(
            count=len(record["references"]), task=record["task"], action=ACTIONS[record["task"]]
        )
        question = Question(prompt, pictures_of(record, self.config))
        return self.chat.ask(question, partial(read_instruction, record))

    def plan(self, record):
        """The IC-CoT, by the MLLM, which does not see the target."""
        question = plan_question(record, pictures_of(record, self.config))
        return self.chat.ask(question, partial(read_plan, record))

    def paint(self, record):
        """The target, by the image model."""
        prompt = TARGET_PROMPT.format(
            instruction=record["instruction"], caption=record["plan"]["out_caption"]
        )
        images = pictures_of(record, self.config)
        picture = self.painter.ask(Question(prompt, images, self.config.image_size), read_picture)
        path = Path(self.config.out) / "targets" / f"{record['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.published(path) as hidden:
            hidden.write_bytes(picture)
        return {"target": f"targets/{path.name}"}

    def score(self, record):
        """CLIP cosine of caption and target, aesthetic score, PF and SC; after `load_scorer`."""
        image = opened(Path(self.config.out) / record["target"])
        e = self.clip.embed_images([image])  # (1, E)
        u = self.clip.embed_captions([record["plan"]["out_caption"]])  # (1, E)
        scores = {"clip": round(float((e * u).sum()), 5)}
        if self.head is not None:
            weight, bias = self.head
            scores["aesthetic"] = round(float(e[0] @ weight + bias), 4)
        pictures = (*pictures_of(record, self.config), to_send(image))
        scene = "scene" in record["task"]
        for name in ("PF", "SC"):
            scores[name], scores[f"{name}_reason"] = ask_score(
                self.judge, name, record["instruction"], pictures=pictures, scene=scene
            )
        return {"scores": scores}


# --------------------------------------------------------------------------------------------------
# cuts and shards


def why_dropped(records, config):
    """{key: reason} of the scored records that do not pass, "" for those that do."""
    reasons = {}
    for task in {record["task"]: None for record in records.values()}:
        of_task = [record for record in records.values() if record["task"] == task]
        least_clip = floor(of_task, "clip", config.drop_clip)
        least_aesthetic = floor(of_task, "aesthetic", config.drop_aesthetic)
        for record in of_task:
            scores, reason = record["scores"], ""
            if scores["PF"] < config.least_pf:
                reason = f"PF below {config.least_pf:g}"
            elif scores["SC"] < config.least_sc:
                reason = f"SC below {config.least_sc:g}"
            elif scores["clip"] < least_clip:
                reason = "caption and target disagree (CLIP)"
            elif scores.get("aesthetic", 0) < least_aesthetic:
                reason = "aesthetic score"
            reasons[record["key"]] = reason
    return reasons


def floor(records, name, percent):
    """The score below which so many per cent of the records are; none where they have no such."""
    scores = [record["scores"][name] for record in records if name in record["scores"]]
    return np.percentile(scores, percent) if scores else -np.inf


def write_shards(records, config):
    """Shards of the scored records that pass, written anew, tasks mixed; nothing is asked.

    Returns `why_dropped` of them all.
    """
    scored = {key: record for key, record in records.items() if "dropped" not in record}
    reasons, out = why_dropped(scored, config), Path(config.out)
    makers = {
        "chat_model": config.chat_model,
        "image_model": "" if config.from_path else config.image_model,
        "judge_model": config.judge_model or config.chat_model,
    }
    with (
        files.published(out / "shards") as hidden,
        ShardWriter(hidden, config.shard_size) as shards,
    ):
        for key in sorted(scored, key=lambda key: hash_of(key, "order")):
            record = scored[key]
            if reasons[key]:
                continue
            try:
                pictures = [to_png(image) for image in references_of(record, config)]
                target = to_png(opened(out / record["target"]))
            except Fault as fault:  # it was there when it was scored
                reasons[key] = str(fault)
                continue
            about = {
                name: record[name] for name in ("key", "task", "instruction", "plan", "scores")
            }
            about["provenance"] = {"references": record["references"], **makers}
            shards.write(about, pictures, target)
    return reasons


def report(all_records, reasons, config):
    """report.md: what each stage dropped and why, and what is left of each task.

    all_records: {stage: {key: record}}; reasons: of `write_shards`. What was begun is what was
    dropped, kept, and not finished yet.
    """
    gone = Counter()  # of (stage, kind of reason)
    for stage, records in all_records.items():
        dropped = [record["dropped"] for record in records.values() if "dropped" in record]
        gone.update((stage, reason.partition(":")[0]) for reason in dropped)
    gone.update(("cuts", reason.partition(":")[0]) for reason in reasons.values() if reason)
    begun = Counter(record["task"] for record in all_records["references"].values())
    kept = Counter(key.rsplit("-", 1)[0] for key, reason in reasons.items() if not reason)
    total, left = begun.total(), kept.total()
    if total > left + gone.total():
        gone["all", "not finished yet"] = total - left - gone.total()
    lines = ["| stage | dropped because | samples |", "| --- | --- | --- |"]
    lines += [f"| {stage} | {reason} | {count} |" for (stage, reason), count in gone.items()]
    lines += ["", "| task | begun | kept |", "| --- | --- | --- |"]
    lines += [f"| {task} | {begun[task]} | {kept[task]} |" for task in sorted(begun)]
    lines += [f"| all | {total} | {left} ({100 * left / max(1, total):.0f} %) |"]
    text, out = "\n".join(lines), Path(config.out)
    files.write_text(out / "report.md", text + "\n")
    print(text)
    print(f"{left} samples in {out}/shards; python data.py --show {out}/shards draws them")


# --------------------------------------------------------------------------------------------------
# running it


def estimate(records, config):
    """Print what the models would be asked, at most one answer each: requests and pictures."""
    records = [record for record in records.values() if "dropped" not in record]
    count, references = len(records), sum(len(record["references"]) for record in records)
    texts = ("plan", "PF", "SC") if config.from_path else ("instruction", "plan", "PF", "SC")
    sent = len(texts) * references + 2 * count
    print(f"{count} samples, {references} references; nothing was asked")
    print(f"chat    {len(texts) * count:,d} requests ({', '.join(texts)}), {sent:,d} pictures sent")
    if not config.from_path:
        print(f"images  {count:,d} requests, {references:,d} pictures sent, {count:,d} made")


def begin(config):
    """{key: record} of the references: those of before, or drawn and, but for a dry run, kept.

    UserError where `out` was begun with other settings.
    """
    out = Path(config.out)
    names = ("pools", "from_path", "count", "max_references", "seed")
    settings = {name: getattr(config, name) for name in names}
    if (out / "settings.json").is_file():
        before = settings | files.read_json(out / "settings.json")
        if before != settings:
            raise UserError(f"{out} was begun with {before}, now {settings}; choose another --out")
    if config.config == "toy" and not config.from_path and not Path(config.pools).is_dir():
        draw_pools(config.pools)
    records = by_key(out / "references.jsonl")
    if len(records) < config.count:
        if config.from_path:
            records = read_triples(config.from_path, config.count, config.max_references)
        else:
            pools = pools_of(config.pools)
            records = draw_references(pools, config.count, config.max_references, seed=config.seed)
        if not config.dry_run:
            files.write_text(out / "settings.json", json.dumps(settings) + "\n")
            lines = [json.dumps(record) + "\n" for record in records.values()]
            files.write_text(out / "references.jsonl", "".join(lines))
    return records


def curate(config):
    """All stages that are asked for; the others are read as they are."""
    files.check_writable(config.out)
    if config.from_path:
        config = replace(config, pools=str(folder_of(config.from_path)))
    records, before = {"references": begin(config)}, "references"
    if config.dry_run:
        return estimate(records["references"], config)
    crew = Crew(config)
    for name, function in crew.stages.items():
        if name == "scores":
            crew.load_scorer()  # before any question: a missing CLIP is found out now
        records[name] = run_stage(name, records[before], function, config)
        before = name
    report(records, write_shards(records["scores"], config), config)


def arguments(argv):
    """`--from PATH` in the parser's words: "from" is one of Python's."""
    return [re.sub(r"^--from(?==|$)", "--from_path", word) for word in argv]


def main(config):
    """The toy endpoint, or the pipeline. Exits with status 2 after a mistake of the user."""
    with exit_on_user_error(ValueError):
        if config.serve_toy:
            serve(config.port, config.painter_errors)
            return
        with torch.no_grad():
            curate(config)


if __name__ == "__main__":
    main(parse(Config, PRESETS, arguments(sys.argv[1:])))
