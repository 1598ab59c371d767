"""Each option of the four commands, and how it shows that it acts: the rows of test_options.py.

    option: change(what is seen, new value, **what it needs to act)

The base is the preset smoke with BASE. A new option gets its row in the table of its command.
"""

# fmt: off
BASE = {  # beside the preset smoke
    "sft": dict(
        samples_per_step=2, steps=2, warmup=0, painter_errors=0.0, save_every=100,
    ),
    "grpo": dict(
        prompts_per_step=1, updates=1, group_size=2, max_plan_tokens=4, picture_side=16,
        num_timesteps=4, likelihood="sde", window=1, window_end=1.0, steps=1, save_every=100,
        init="model", kl_beta=0.0, std_floor=0.003, cot_temperature=1.0,
    ),
    "sample": dict(
        checkpoint="model", prompt="Put it in a meadow.", max_plan_tokens=4, num_timesteps=3,
        size="16x16", device="cpu",
    ),
    "evaluate": dict(
        checkpoint="model", num_samples=3, max_plan_tokens=4, num_timesteps=3, side=16,
        device="cpu",
    ),
}
# fmt: on


def change(seen, value, also=None, **base):
    """A row: what is seen, the option's new value, what changes with it; `base` is there before."""
    return seen, value, also or {}, base


# fmt: off
# what both stages have
TRAINING = dict(
    checkpointing=change("blocks", True),
    replicas=change("exit", 2),  # of one process there are no copies
    memory=change("exit", "1x0.0001"),
    seed=change("log", 1),
    threads=change("threads", 2),
    tracker=change("tracker", "wandb"),
    eval_every=change("measured", 1),
    eval_batch=change("strips", 3),
    export=change("exit", True),  # there is no state yet
    data=change("log", "shards"),
    steps=change("log", 3),
    lr=change("weights", 0.1),
    out=change("folder", "elsewhere"),
    save_every=change("states", 1, steps=2),
    metric=change("asked", "elsewhere", eval_every=1),
    max_references=change("log", 2),
)
SFT = TRAINING | dict(
    model=change("weights", "toy"),
    init=change("log", "model"),
    train=change("weights", "gen", init="model"),
    lora_rank=change("weights", 2, init="model", train="lora"),
    weights=change("exit", "nf4", init="model", train="lora", memory="1x1.0906"),
    # what is seen of a sample
    tokens_per_pack=change("passes", 600, samples_per_step=6),
    noise_copies=change("log", 2),
    in_context=change("log", False),
    plan_dropout=change("log", 1.0),
    text_dropout=change("log", 1.0),
    vae_dropout=change("log", 1.0),
    vit_dropout=change("log", 1.0),
    timestep_shift=change("log", 1.0),
    painter_errors=change("log", 1.0),
    filter_targets=change("log", 0.9),
    pretraining_steps=change("log", 1, painter_errors=1.0),
    # the rest
    workers=change("read", 1),
    samples_per_step=change("log", 3),
    warmup=change("weights", 100),
    decay=change("weights", 1.0),
    beta2=change("weights", 0.5),
    average=change("weights", 0.0),
    ce_weight=change("weights", 0.0),
    picture_side=change("strips", 16),
    sample_timesteps=change("strips", 9),
    sample_shift=change("strips", 1.0),
    sample_plan_tokens=change("strips", 9),
)
TWO = dict(prompts_per_step=2)
SECOND = dict(prompts_per_step=2, updates=2, lr=0.01)  # the second update is off policy
GRPO = TRAINING | dict(
    # what is sampled
    prompts_per_step=change("log", 2),
    updates=change("weights", 2, **TWO),
    group_size=change("log", 4),
    images_per_cot=change("log", 2, group_size=4),
    cot_temperature=change("log", 0.1),
    max_plan_tokens=change("log", 8),
    picture_side=change("log", 32),
    num_timesteps=change("log", 5),
    timestep_shift=change("log", 1.0),
    likelihood=change("log", "forward"),
    scored_shift=change("log", 1.0, likelihood="forward"),
    window=change("log", 2),
    window_end=change("log", 0.2, num_timesteps=9),
    text_guidance=change("log", 4.0),
    image_guidance=change("log", 4.0, text_guidance=4.0),
    train_text=change("weights", True),
    pictures_at_once=change("passes", 1),
    tokens_per_pack=change("passes", 40),
    # the objective
    std_floor=change("log", 10.0),
    clip_kappa=change("weights", 1e-9, **SECOND | dict(group_size=8)),
    kl_beta=change("weights", 1.0, **SECOND),
    # the rest
    init=change("log", "other"),
    max_references=change("log", 2, prompts_per_step=3),
    train=change("weights", "gen"),
    lora_rank=change("weights", 2, train="lora"),
    weights=change("exit", "nf4", train="lora", memory="1x0.0102"),
    average=change("weights", 0.99),
    clip=change("asked", "elsewhere"),
    eval_data=change("strips", "shards"),
    eval_samples=change("strips", 3),
    eval_timesteps=change("strips", 9),
)
MANY = dict(out="many", prompt="")
GUIDED = dict(text_guidance=4.0, image_guidance=3.0, ref=("a.png",), plan=False, guidance_low=0.0)
SAMPLE = dict(
    checkpoint=change("asked", "other"),
    ref=change("files", ("a.png",)),
    prompt=change("files", "They meet."),
    prompts=change("files", "prompts.jsonl", also=MANY),
    out=change("files", "other.png"),
    steps_picture=change("files", "steps.png"),
    seeds=change("files", 2, **MANY, prompts="prompts.jsonl"),
    plan=change("files", False),
    max_plan_tokens=change("files", 8),
    temperature=change("files", 1.0),
    top_p=change("files", 1e-6, temperature=1.0),
    system_prompt=change("files", True),
    num_timesteps=change("files", 5),
    timestep_shift=change("files", 1.0),
    text_guidance=change("files", 4.0, guidance_low=0.0),
    image_guidance=change("files", 1.0, **GUIDED),
    guidance_low=change("files", 0.99, **GUIDED),
    renorm=change("files", "channel", **GUIDED),
    cache_interval=change("files", 5, num_timesteps=9),
    size=change("files", "", ref=("wide.png",)),
    weights=change("exit", "nf4", memory="1x0.0007"),
    device=change("exit", "cuda:99"),
    seed=change("files", 1),
    threads=change("threads", 2),
    memory=change("exit", "1x0.0001"),
)
BENCH = dict(bench="dreamomni2", bench_path="bench", out="results", num_timesteps=2)
STUDY = dict(ablation=True, seeds=1)
GUIDED = dict(text_guidance=4.0, image_guidance=3.0)
EVALUATE = dict(
    checkpoint=change("asked", "other"),
    side=change("pictures", 32),
    data=change("pictures", "shards"),
    split=change("pictures", "all", data="shards"),
    num_samples=change("pictures", 2),
    max_references=change("pictures", 2, num_samples=6),
    num_timesteps=change("pictures", 5),
    timestep_shift=change("pictures", 1.0),
    text_guidance=change("pictures", 4.0),
    use_plan=change("pictures", False),
    metric=change("asked", "elsewhere"),
    seed=change("pictures", 1),
    threads=change("threads", 2),
    out=change("files", "grid.png"),
    json=change("printed", True),
    image_guidance=change("pictures", 1.0, **GUIDED),
    cache_interval=change("pictures", 5, num_timesteps=9),
    max_plan_tokens=change("pictures", 8),
    device=change("exit", "cuda:99"),
    weights=change("exit", "nf4", memory="1x0.00385"),
    batch=change("passes", 1),
    memory=change("exit", "1x0.0001"),
    bench=change("files", "dreamomni2", also=BENCH),
    bench_path=change("files", "bench-2", **BENCH),
    generate_only=change("asked", True, **BENCH),
    judge_url=change("asked", "http://localhost:1", **BENCH),
    judge_model=change("asked", "other", **BENCH),
    ablation=change("files", True, also=STUDY),
    seeds=change("rows", 2, **STUDY),
)
ROWS = {"sft": SFT, "grpo": GRPO, "sample": SAMPLE, "evaluate": EVALUATE}
PRESET = {"config": "test_loop.py:test_full_trains_no_stage_1_whatever_its_clip"}
STAGES = PRESET | {
    "precision": "worker.py:work",
}
ELSEWHERE = {"sft": STAGES, "grpo": STAGES, "sample": PRESET, "evaluate": PRESET}
# fmt: on
