"""
The tokenizer of the toys: a byte-level BPE trained on texts of the toy world, in the form of Qwen2.5's.
"""

import iccot
from toy.tasks import draw_sample

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer of the toys

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def train_tokenizer(folder, vocab_size: int = 1024):
    """Train a byte-level BPE on 2000 train samples, save it into `folder`, and return it as `load_tokenizer` does.

    vocab_size: the most tokens; the toy world needs fewer. ValueError if it cannot even hold the bytes.

    Text is cut at white space only, so that tags fuse with their neighbours as in Qwen2.5 ("<out_caption>A" is one
    token); the think and field tags are ordinary text. Every byte is in the vocabulary: any unicode round-trips.
    """
    # slow to import: only here
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from runtime.pretrained import load_tokenizer

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size={vocab_size} is too small; {256 + len(SPECIAL_TOKENS)} hold the bytes alone"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    samples = (draw_sample("train", index, max_references=4 + index % 2) for index in range(2000))
    tokenizer.train_from_iterator(
        (text for one in samples for text in (one.instruction, iccot.render(one.plan))), trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return load_tokenizer(folder)
