"""
The tokenizer of the toys: a byte-level BPE trained on texts of the toy world, in Qwen2.5's form.

    text      is cut at white space only, so that tags fuse with their neighbours as in Qwen2.5:
              "<out_caption>A" is one token
    special   <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>, one token each
    tags      <think>, <out_caption>, <relation_1>, ... are ordinary text
    bytes     each is in the vocabulary: any unicode round-trips

The texts are the instructions and plans of the first 2000 samples of the train split.
Left out: Qwen2.5's own cuts (at digits and punctuation), a chat template.

    tokenizer = train_tokenizer("out/tokenizer", vocab_size=1024)
"""

import iccot
from runtime.pretrained import load_tokenizer
from toy.tasks import draw_sample

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def train_tokenizer(folder, vocab_size: int = 1024):
    """Train the tokenizer, save it into `folder`, and return it as `load_tokenizer` does.

    vocab_size: the most tokens; the toy world needs fewer. ValueError if it cannot even hold the
    bytes.
    """
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small; {least} hold the bytes alone")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=_trained(vocab_size),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return load_tokenizer(folder)


def _trained(vocab_size: int):
    """The BPE itself, a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts():
    """The texts to train on; every second sample may have a fifth reference."""
    for index in range(2000):
        sample = draw_sample("train", index, max_references=4 + index % 2)
        yield sample.instruction
        yield iccot.render(sample.plan)
