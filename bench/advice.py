"""
What a dry run (walk.py) prints, and what would make a command fit that does not.

    dry_run(walk_grpo, config, shape)       the table of phases, which one decides, or a UserError

A phase that needs more than the card is refused in one line; whatever that line advises was walked
first and leaves a tenth of the card free. Options that change no result come first, then what is
trained and on how many GPUs, at last what changes the method. Not a concept of the paper.
Left out: a search for the fastest of the settings that fit.
"""

from dataclasses import replace
from itertools import combinations

from example import most_tokens
from runtime.config import UserError


def dry_run(walk, config, shape):
    """Walk a command and print its phases; UserError, with what would fit, if it cannot fit.

    walk: one of the walk_... above.
    """
    card, found = config.gpu_memory, walk(config, shape)
    print_walk(found, card)
    if not found.fits(card, spare=1.0):
        one = found.deciding
        peak, ways = found.peak(one) / 1e9, remedies(walk, config, shape)
        advice = " or ".join(ways) or "a larger GPU, since no option of this command is enough"
        raise UserError(
            f"{one.name} needs {peak:.1f} GB of each GPU, more than gpu_memory={card:g}; "
            f"what would fit: {advice}"
        )


def print_walk(found, card):
    """The table, in GB (10^9 bytes)."""
    one, total = found.deciding, sum(found.always.values())
    print(f"{'GB on each GPU, computed':26s}{'tokens':>9s}{'own':>8s}{'peak':>8s}  of it")
    print(f"{'always':26s}{'':9s}{total / 1e9:8.2f}{total / 1e9:8.2f}  {listed(found.always)}")
    for phase in found.phases:
        tokens = f"{phase.tokens:,}" if phase.tokens else ""
        sizes = f"{phase.own / 1e9:8.2f}{found.peak(phase) / 1e9:8.2f}"
        print(f"{phase.name:26s}{tokens:>9s}{sizes}  {listed(phase.parts)}")
    if found.host:
        print(f"on the host of the first process: {listed(found.host)}")
    word = "fits" if found.fits(card) else "tight" if found.fits(card, spare=1.0) else "no"
    print(
        f"decides: {one.name}, {found.peak(one) / 1e9:.1f} GB of {card:g}; "
        f"fits, a tenth left free: {word}"
    )


def listed(parts):
    """{what: bytes} as text."""
    return ", ".join(f"{what} {size / 1e9:.2f}" for what, size in parts.items() if size >= 5e6)


def remedies(walk, config, shape):
    """Up to four changes of options, as words of the command line, with which a command fits.

    First single options that change no result, then what is trained and on how many GPUs, then
    these together, and at last what changes the method.
    """
    several = frugal(config, ({}, *strong(config)), shape) if cheap(config, shape) else []
    last = frugal(config, otherwise(config), shape)
    for some in ([*cheap(config, shape), *strong(config)], several, last):
        found = {}  # {options that are changed: the words}, the mildest change of each and no more
        for change in some:
            what = frozenset(change)
            if len(found) == 4 or any(options <= what for options in found):
                continue
            if fits(walk, replace(config, **change), shape):
                found[what] = words_of(change)
        if found:
            return list(found.values())
    return []


def fits(walk, config, shape):
    """Whether a command fits; not so if its samples or weights cannot be shared by the GPUs."""
    try:
        return walk(config, shape).fits(config.gpu_memory)
    except UserError:
        return False


def words_of(change):
    """{option: value} -> "--option value ..."."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())


def changes(config, wanted):
    """Of [(option, value)] those that the config has, and has otherwise: [{option: value}]."""
    missing = object()
    values = [(name, value, getattr(config, name, missing)) for name, value in wanted]
    return [{name: value} for name, value, now in values if now is not missing and now != value]


def frugal(config, found, shape):
    """Changes, each with all that is cheap beside it."""
    whole = []
    for change in found:
        beside = {}
        for one in cheap(replace(config, **change), shape):
            beside |= one
        whole.append(beside | change)
    return whole


def cheap(config, shape):
    """Changes that bound memory and change no result but rounding."""
    wanted = [("replicas", 1), ("sum_every_pass", True), ("checkpointing", True), ("eval_batch", 1)]
    wanted += [("groups_at_once", 1), ("batch", 1), ("precision", "bfloat16")]
    wanted += [("dtype", "bfloat16")] * (getattr(config, "dtype", "auto") == "float32")
    halves = (getattr(config, "pictures_at_once", 1) // 2**n for n in range(1, 9))
    wanted += [("pictures_at_once", n) for n in halves if n]
    if hasattr(config, "window"):
        wanted += [("tokens_per_pack", n) for n in (24_576, 16_384) if n < config.tokens_per_pack]
    elif hasattr(config, "noise_copies"):
        needed = most_tokens(shape, config)
        wanted += [("tokens_per_pack", needed)] * (needed < config.tokens_per_pack)
    return changes(config, wanted)


def less(config):
    """Changes to fewer trained weights: of a checkpoint, and where plans are not trained."""
    if not getattr(config, "init", "") or getattr(config, "train_text", False):
        return []
    ways = ("all", "gen", "lora")
    return [{"train": way} for way in ways[ways.index(getattr(config, "train", "lora")) + 1 :]]


def rounded(config):
    """Changes to weights of fewer bits: of those that are frozen, so of a stage with adapters."""
    found = changes(config, [("weights", "int8"), ("weights", "nf4")])
    if getattr(config, "train", "lora") == "lora":
        return found
    return [{"train": "lora"} | change for change in found if less(config)]


def strong(config):
    """Changes of what is trained, of how exact weights are, and of the number of GPUs."""
    found = less(config) + rounded(config)
    more = (2, 4, 8, 16, 32, 64, 128)
    return found + [{"gpus": n} for n in more if n > getattr(config, "gpus", 128)]


def otherwise(config):
    """Changes of the method, where nothing else is enough; the last are the strongest."""
    most = (less(config) + rounded(config))[-1:] or [{}]
    wanted = [("text_guidance", 1.0), ("max_references", 1)]
    wanted += [("picture_side", 512)] * (getattr(config, "picture_side", 0) > 512)
    contexts = changes(config, wanted)
    scores = "scored_times" if getattr(config, "likelihood", "") == "forward" else "window"
    windows = changes(config, [(scores, n) for n in (8, 4, 2, 1)])
    pairs = [a | b for a, b in combinations(contexts, 2)]
    found = [*contexts, *windows, *pairs, *(a | b for a in contexts for b in windows)]
    found += [one | most[0] for one in found if most[0]]
    adapters = "lora" in (getattr(config, "train", ""), most[0].get("train"))
    ranks = changes(config, [("lora_rank", 16)]) if adapters else []
    return found + [one | rank for rank in ranks for one in found]
