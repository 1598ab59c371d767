"""
From the command line: references and an instruction to a plan and a picture (engine.py).

Each picture gets its plan beside it as JSON. Several seeds, or prompts from a file, go into a
folder, one after the other; pictures that are there already are not painted again. A picture is as
large as the last reference after its resize, as in BAGEL's inferencer, or square.

    python sample.py --checkpoint out/toy-grpo --ref a.png --ref b.png --prompt "Put them together."
    python sample.py --checkpoint out/toy-grpo --prompts prompts.jsonl --seeds 4 --out pictures
    python sample.py --checkpoint out/toy-grpo --prompt "A man in red." --steps_picture steps.png

A line of prompts.jsonl: {"prompt": "Put them together.", "ref": ["a.png", "b.png"], "key": "here"}
Left out: pages to click on, top-k, beam search.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

import flow
import iccot
from engine import Engine, Request, Sampler, Thinking
from runtime import accountant, files, processes
from runtime.config import UserError, exit_on_user_error, parse
from runtime.pretrained import shape_of
from runtime.quantised import load_quantised
from studies.pictures import evenly, save_path
from vision import open_image

LINE = '{"prompt": "...", "ref": ["a.png"], "key": "..."}'  # of a file of prompts

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
STEPS = 9  # of --steps_picture, at most


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    init: str = ""  # the same, under the name it has in training
    ref: tuple[str, ...] = ()  # reference pictures: --ref a.png --ref b.png
    prompt: str = ""  # the instruction; "image 1" names a reference, <image> places it
    prompts: str = ""  # in place of both: a file of JSON lines {"prompt", "ref", "key"}
    out: str = "picture.png"  # file to write; a folder for several prompts or seeds
    steps_picture: str = ""  # a PNG of the way from noise to the picture; of one picture alone
    seeds: int = 1  # pictures of each prompt, with the seeds seed, seed + 1, ...
    plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    max_references: int = 4
    max_plan_tokens: int = 1000
    temperature: float = 0.0  # of the plan; 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this total probability; 1: all
    system_prompt: bool = False  # BAGEL's request to think first; for weights not trained here
    num_timesteps: int = 50  # grid points; one more than model evaluations
    timestep_shift: float = 3.0
    text_guidance: float = 4.0  # 1: off; these five as in BAGEL's gen_image (evaluate.py: editing)
    image_guidance: float = 1.5
    guidance_low: float = 0.4  # guidance acts at times above this
    guidance_high: float = 1.0  # and up to this
    renorm: Literal["global", "channel", "text_channel"] = "global"  # see flow.guide
    renorm_min: float = 0.0  # the least factor of the renormalisation; 1: off
    cache_interval: int = 1  # denoising steps to a pass of the model; the others extrapolate
    square: bool = False  # without height and width: the largest square, not the last reference
    height: int = 0  # pixels; 0: see square
    width: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; bfloat16 on a GPU
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures
    config: str = ""  # name of the preset
    memory: str = ""  # 1x80: print what every phase would hold of a GPU of 80 GB, and stop

    def __post_init__(self):
        _ = self.sampler, self.thinking  # ValueError for what cannot be drawn
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected at least 1")
        if self.steps_picture and (self.prompts or self.seeds > 1):
            raise ValueError("--steps_picture shows one picture; leave --prompts and --seeds out")
        if self.steps_picture and not self.steps_picture.lower().endswith(".png"):
            raise ValueError(f"steps_picture={self.steps_picture}: expected a name with .png")
        if self.prompts and (self.prompt or self.ref):
            raise ValueError(
                "--prompts brings prompts and references from a file; leave --prompt and --ref out"
            )

    @property
    def sampler(self):
        return Sampler(
            self.num_timesteps,
            self.timestep_shift,
            self.text_guidance,
            self.image_guidance,
            (self.guidance_low, self.guidance_high),
            self.renorm,
            self.renorm_min,
            self.cache_interval,
        )

    @property
    def thinking(self):
        if not self.plan:
            return None
        return Thinking(self.max_plan_tokens, self.temperature, self.top_p)

    def work(self, shape):
        """What is painted at once, for --memory: as many references as are given or allowed."""
        references = self.max_references if self.prompts else len(self.ref)
        side = max(self.height, self.width) or shape.latent_side * shape.token_pixels
        return accountant.Work(1, references, side, self.sampler, self.thinking)


# fmt: off
TOY = dict(
    max_plan_tokens=72, num_timesteps=7, timestep_shift=10.0, text_guidance=1.0, image_guidance=1.0,
    square=True,
)
PRESETS = {
    "toy": TOY,
    "smoke": TOY | dict(checkpoint="out/smoke-grpo"),
    "small": TOY | dict(checkpoint="out/small-grpo"),
    "rehearsal": dict(checkpoint="out/rehearsal-grpo", num_timesteps=5),
    "full": dict(checkpoint="out/full-grpo"),
}
# fmt: on


@dataclass(frozen=True)
class Job:
    """One picture to paint."""

    prompt: str
    references: tuple  # paths
    seed: int
    out: Path


def jobs(config):
    """All pictures that are asked for, in order; UserError for a file of prompts that is none."""
    prompts = [("", config.prompt, config.ref)]
    if config.prompts:
        prompts = read_prompts(Path(config.prompts))
    if not config.prompts and config.seeds == 1:
        return [Job(config.prompt, config.ref, config.seed, Path(config.out))]
    folder, seeds = Path(config.out), range(config.seed, config.seed + config.seeds)
    if folder.suffix.lower() in PICTURES:
        raise UserError(
            f"--out {config.out}: several pictures go into a folder; give a name without "
            f"{folder.suffix}"
        )
    return [
        Job(prompt, tuple(refs), seed, folder / f"{key or 'picture'}-{seed}.png")
        for key, prompt, refs in prompts
        for seed in seeds
    ]


def read_prompts(path):
    """[(key, prompt, paths of the references)]; relative paths are meant from the file's folder."""
    if not path.is_file():
        raise UserError(f"file of prompts not found: {path}")
    found = []
    for number, line in files.lines_of(path):
        try:
            one = {"key": f"{number:04d}", "ref": []} | files.object_of(line)
            check_prompt(one)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; expected {LINE}") from None
        refs = [str(path.parent / ref) for ref in one["ref"]]
        found.append((str(one["key"]), one["prompt"], refs))
    if not found:
        raise UserError(f"{path} holds no prompts; expected a line for each, {LINE}")
    names = [key for key, *_ in found]
    if len(set(names)) < len(names):
        (name, _), *_ = Counter(names).most_common(1)
        raise UserError(f"{path}: keys name files, so they must differ; {name!r} comes twice")
    return found


def check_prompt(one):
    """ValueError unless these are the fields of a line of a file of prompts."""
    kinds = {"prompt": str, "ref": list, "key": (str, int)}
    for name, value in {"prompt": None, **one}.items():
        if name not in kinds:
            raise ValueError(f"it has a field {name!r}")
        if not isinstance(value, kinds[name]) or name == "prompt" and not value.strip():
            raise ValueError(f"its {name} is {json.dumps(value)}")
    if not all(isinstance(ref, str) for ref in one["ref"]):
        raise ValueError(f"its ref is {json.dumps(one['ref'])}")
    files.check_name(str(one["key"]), "its key")


def request_of(config, model, job):
    """The engine.Request of a job, after everything a person can get wrong was checked."""
    if not job.prompt.strip():
        raise UserError("--prompt is empty; say what to draw")
    if len(job.references) > config.max_references:
        raise UserError(
            f"{len(job.references)} references given, the preset allows {config.max_references}; "
            f"leave some out or raise --max_references"
        )
    try:
        iccot.arranged(job.references, job.prompt)
    except ValueError as error:
        raise UserError(f"{job.out}: {error}") from None
    if job.out.suffix.lower() not in PICTURES:
        raise UserError(f"--out {job.out}: expected a file name that ends in .png, .jpg or .webp")
    references = [open_image(path) for path in job.references]
    shape, unit = model.config, model.config.token_pixels
    largest = shape.latent_side * unit
    width, height = largest, largest
    if references and not config.square:
        width, height = shape.image_rule.size(*references[-1].size)
    height, width = config.height or height, config.width or width
    for name, side in (("height", height), ("width", width)):
        if not 0 < side <= largest or side % unit:
            raise UserError(
                f"--{name}={side}: expected a multiple of {unit} up to {largest} pixels"
            )
    for path in (job.out, *([config.steps_picture] if config.steps_picture else [])):
        files.check_writable(Path(path).parent)
    system = iccot.GENERATION_SYSTEM_PROMPT if config.plan and config.system_prompt else ""
    return Request(tuple(references), job.prompt, (height // unit, width // unit), system)


def paint(engine, job, config):
    """Make one picture; its plan (if there shall be one) is printed and kept beside it."""
    request = request_of(config, engine.model, job)
    how = dict(sampler=config.sampler, thinking=config.thinking, batch=1, seeds=[(job.seed,)])
    seen = []

    def kept(k, x, v, *, t, t_next):
        seen.append((t, x, flow.estimates(x, v, t)[0]))
        return flow.euler_step(x, v, t, t_next=t_next)

    (result,) = engine.generate([request], **how, step=kept if config.steps_picture else None)
    about = print_plan(result) if config.plan else {}
    about |= {"prompt": job.prompt, "references": list(job.references), "seed": job.seed}
    text = json.dumps(about, ensure_ascii=False, indent=1)
    files.write_text(job.out.with_suffix(".json"), text + "\n")
    with files.published(job.out) as hidden:
        result.image.save(hidden, Image.registered_extensions()[job.out.suffix.lower()])
    print(f"picture    {job.out}")
    if seen:
        save_steps(engine, [seen[i] for i in evenly(len(seen), STEPS)], config, grid=request.grid)


def save_steps(engine, seen, config, *, grid):
    """The PNG of --steps_picture. seen: of some steps (t, x_t, the estimate of x_0)."""
    times, noised, clean = zip(*seen)
    rows = {"x_t": noised, "what the model takes it for: x_t - t v": clean}
    rows = {name: engine.pictures(list(x), [grid] * len(x)) for name, x in rows.items()}
    save_path(config.steps_picture, [f"t = {t:.3f}" for t in times], rows)
    print(f"steps      {config.steps_picture}")


def print_plan(result):
    """The IC-CoT as a person reads it, or the raw text. Returns what the JSON file says of it."""
    read = result.plan
    about = {
        "text": result.text,
        "plan": json.loads(iccot.to_json(read)) if read else None,
        "problems": result.problems,
    }
    if read is None:
        print(f"plan       unreadable: {result.text}")
        return about
    print(f"caption    {read.caption}")
    for i, relation in enumerate(read.relations, 1):
        print(f"relation {i} {relation}")
    for problem in result.problems:
        print(f"problem    {problem}")
    return about


def main(config):
    """All pictures that are asked for; every mistake is found before the first is painted."""
    if config.memory:
        default = PRESETS.get(config.config, {}).get("checkpoint", Config.checkpoint)
        with exit_on_user_error(ValueError):
            shape = shape_of(config.init or config.checkpoint, config.config, default)
            accountant.dry_run(accountant.walk_sample, config, shape)
        return
    with exit_on_user_error(ValueError):
        wanted, place = jobs(config), processes.placed(config.device, config.dtype)
        path = config.init or config.checkpoint
        engine = Engine(*load_quantised(path, *place, kind=config.weights))
        for job in wanted:
            request_of(config, engine.model, job)
    processes.choose_threads(config.threads)
    several = len(wanted) > 1 or Path(config.out) != wanted[0].out
    if several and (there := sum(job.out.is_file() for job in wanted)):
        print(
            f"{there} of {len(wanted)} pictures are there and stay; another --out paints them anew"
        )
    for job in tqdm(wanted, disable=None if several else True, desc="sample"):
        if not several or not job.out.is_file():
            paint(engine, job, config)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
