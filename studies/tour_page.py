"""
docs/TOUR.md: the words of docs/tour/words.md with the numbers of docs/tour/numbers.json.

    python -m studies.tour_page      write the page again, say after code has moved; takes a second

In the words {name} is a number or a table of `values` below, and {link[file.py:Class.name]} a link
to the line where that stands now, found by parsing its file. `studies.tour` measures the numbers
and draws the pictures. tests/test_tour.py fails when a link or a number of the page is not current,
and names this command. Left out: sentences that depend on what was measured, but for one word.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime import files
from runtime.config import UserError, exit_on_user_error, parse

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("PF", "SC", "Overall")


@dataclass(frozen=True)
class Config:
    out: str = "docs"  # folder of TOUR.md, and of tour/ with numbers.json


PRESETS = {"default": {}}


def line_of(entry):
    """The line at which `file.py:name` or `file.py:Class.name` stands. UserError if it does not."""
    path, name = entry.split(":")
    body = ast.parse(files.read_text(ROOT / path)).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise UserError(f"docs/tour/words.md links {entry}, and {path} has no {part}")
        body = getattr(found[0], "body", [])
    return found[0].lineno


class Links(dict):
    """{entry: its link}, made when it is asked for."""

    def __missing__(self, entry):
        return f"[`{entry}`](../{entry.split(':')[0]}#L{line_of(entry)})"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)


def page(numbers):
    """The whole page. numbers: what numbers.json holds."""
    words = files.read_text(ROOT / "docs" / "tour" / "words.md")
    return words.format_map({"link": Links(), **values(numbers)})


def values(n):
    """What the words ask for."""
    plain = {key: n["pack"][key] for key in ("N", "ce", "ce_tokens", "t", "mse")}
    plain |= {key: n["prompt"][key] for key in ("task", "instruction", "instruction_tokens")}
    plain |= {key: n["group"][key] for key in ("mean", "std", "true_caption")}
    plain |= {key: n["step"][key] for key in ("lr", "clip_range", "scores", "grad_norm", "loss")}
    plain |= {key: n["settings"][key] for key in ("shift", "noise_level", "window")}
    plain |= {key: n["settings"][key] for key in ("values", "toy_steps", "command")}
    return plain | of_stage_1(n) | of_flow(n) | of_stage_2(n)


def of_stage_1(n):
    """Tables of the prompt, the pack and the plan."""
    seen, plan = n["prompt"]["references"], n["plan"]
    references = [
        [f"image {i}", f"{one['size'][0]} x {one['size'][1]}"]
        + [f"{tokens} of {width} values" for tokens, width in (one["latents"], one["patches"])]
        for i, one in enumerate(seen, 1)
    ]
    runs = [
        [one["name"], one["rows"][1] - one["rows"][0], between(one["rows"][0], one["rows"][1] - 1)]
        + [between(*one["positions"])]
        for one in n["pack"]["runs"]
    ]
    unsure = sorted(plan["tokens"], key=lambda one: one[1])[:5]
    return {
        "references": table(["reference", "pixels", "latent tokens", "ViT tokens"], references),
        "runs": table(["run", "tokens", "rows", "rope positions"], runs),
        "sure": sum(one[1] > 0.99 for one in plan["tokens"]),
        "plan_tokens": len(plan["tokens"]),
        "unsure": table(
            ["token", "p", "best rival", "p"],
            [[f"`{a.strip()}`", f"{p:.3f}", f"`{b.strip()}`", f"{q:.3f}"] for a, p, b, q in unsure],
        ),
        "caption": plan["caption"],
        "relations": "\n".join(f"* {one}" for one in plan["relations"]),
        "right": "right" if plan["caption"] == n["group"]["true_caption"] else "wrong",
    }


def between(first, last):
    """Both, or one where they are the same."""
    return f"{first} … {last}" if first != last else first


def of_flow(n):
    """Tables of the path and of the stochastic steps."""
    steps, runs = n["path"]["steps"], n["sde"]["runs"]
    path = [
        [f"{one['t']:.3f}", f"{one['off']:.3f}", *(f"{one[key]:.1f}" for key in SCORES)]
        for one in steps
    ]
    drawn = [
        [f"{one['t']:.3f}", f"{one['std']:.3f}", f"{one['log_prob']:.3f}", f"{two['log_prob']:.3f}"]
        for one, two in zip(*(run["steps"] for run in runs))
    ]
    return {
        "flow_steps": len(steps),
        "path": table(["t", "where it heads: rms distance to the end", *SCORES], path),
        "sde": table(["t", "std", "log p, noise 1", "log p, noise 2"], drawn),
        "ode_overall": steps[-1]["Overall"],
        "sde_overall": " and ".join(f"{run['Overall']:.1f}" for run in runs),
    }


def of_stage_2(n):
    """Tables of the group and of the step."""
    members, s, true = n["group"]["members"], n["step"], n["group"]["true_caption"]
    group = [
        [i, f"{one['reward']:.3f}", f"{one['advantage']:+.2f}", f"{one['Overall']:.1f}"]
        + ["true" if one["caption"] == true else "wrong"]
        for i, one in enumerate(members, 1)
    ]
    moved = list(zip(members, s["log_ratio"], s["reward_after"], s["verdicts_after"]))
    step = [
        [i, f"{one['advantage']:+.2f}", f"{1 + log_ratio:.4f}", f"{one['reward']:.3f}"]
        + [f"{after:.3f}", f"{after - one['reward']:+.4f}"]
        for i, (one, log_ratio, after, _) in enumerate(moved, 1)
    ]
    (tree_prompt, tree_rest), whole = s["tokens"], n["whole"]
    return {
        "whole_prompts": whole["prompts"],
        "whole_pictures": whole["prompts"] * len(members),
        "whole_better": whole["better"],
        "whole_reward": "{:.4f} to {:.4f}".format(*whole["reward"]),
        "whole_overall": "{:.2f} to {:.2f}".format(*whole["Overall"]),
        "members": len(members),
        "captions": len({one["caption"] for one in members}),
        "true_captions": sum(one["caption"] == true for one in members),
        "group": table(["member", "reward r", "advantage A", "Overall", "caption"], group),
        "tree_prompt": tree_prompt,
        "tree_rest": tree_rest,
        "step": table(
            ["member", "A", "ratio after", "r before", "r after, same plan and noise", "change"],
            step,
        ),
        "sided": sum(one["advantage"] * log_ratio > 0 for one, log_ratio, *_ in moved),
        "gain": mean(after - one["reward"] for one, _, after, _ in moved),
        "overall_gain": mean(after["Overall"] - one["Overall"] for one, *_, after in moved),
    }


def mean(values):
    """Their mean."""
    found = list(values)
    return sum(found) / len(found)


def write(out):
    """TOUR.md in the folder `out`, from tour/numbers.json in it."""
    numbers = files.read_json(Path(out) / "tour" / "numbers.json")
    files.write_text(Path(out) / "TOUR.md", page(numbers))


@exit_on_user_error()
def main(config):
    """Write the page."""
    write(config.out)
    print(f"wrote {config.out}/TOUR.md")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
