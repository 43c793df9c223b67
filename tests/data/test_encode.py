"""Tokens and targets: exactly the rendered template, exactly the answers, and no special token that an author wrote."""

import re
from typing import Any

import numpy as np
import pytest

from benchmarks.real_shape import qwen_tokenizer
from vl_dist.data.encode import Encoded, Encoder
from vl_dist.data.images import Grid
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.errors import UserError

GRID = Grid(1, 4, 6)  # 6 tokens
PHOTO = ImagePart("a.jpg")


def user(*parts: str | ImagePart) -> Message:
    return Message("user", tuple(TextPart(p) if isinstance(p, str) else p for p in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


SYSTEM = Message("system", (TextPart("Be brief."),))
EXAMPLES = {
    "caption": Example("a", (user(PHOTO, "COCO Yes:"),), "A cat sits on a table."),
    "text only": Example("b", (user("What is a cat?"),), "A cat."),
    "two images": Example("c", (user(PHOTO, "and", PHOTO, "Describe both."),), "Two cats."),
    "several turns": Example(
        "d",
        (SYSTEM, user(PHOTO, "What?"), assistant("A man."), user("Where?"), assistant("On a wave."), user("Sure?")),
        "Yes.",
    ),
    "empty answer": Example("e", (user("Say nothing."),), ""),
    "line breaks": Example("f", (user("\n\nWhat?\n"),), "\nA cat.\n"),
}


def reference_text(processor: Any, example: Example) -> str:
    """The whole conversation as the processor itself renders it, image places widened."""
    messages = [*example.prompt, assistant(example.answer)]
    conversation = [
        {
            "role": m.role,
            "content": [
                {"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": p.text} for p in m.parts
            ],
        }
        for m in messages
    ]
    text = processor.apply_chat_template(conversation, tokenize=False)
    return text.replace("<|image_pad|>", "<|image_pad|>" * GRID.num_tokens(2))


def encode(encoder: Encoder, example: Example) -> Encoded:
    return encoder.encode(example, [GRID] * len(example.image_paths))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "line breaks"])
def test_the_rows_are_the_rendered_template_with_the_end_token_in_place(
    encoder: Encoder, processor: Any, name: str
) -> None:
    example = EXAMPLES[name]
    encoded = encode(encoder, example)
    expected = processor.tokenizer(reference_text(processor, example))["input_ids"]
    end = len(encoded.input_ids)
    assert encoded.input_ids[:-1].tolist() == expected[: end - 1]
    assert processor.tokenizer.decode(expected[end - 1 :]) == "<|im_end|>\n"  # where training ends instead:
    assert processor.tokenizer.decode([encoded.input_ids[-1]]) == "<|endoftext|>"


@pytest.mark.parametrize("name", EXAMPLES)
def test_targets_are_the_answers_and_their_end_tokens_and_nothing_else(encoder: Encoder, processor: Any, name: str) -> None:
    example = EXAMPLES[name]
    encoded = encode(encoder, example)
    answers = [m.text for m in example.prompt if m.role == "assistant"] + [example.answer]
    runs = np.flatnonzero(np.diff(np.concatenate([[False], encoded.is_target, [False]]).astype(int))).reshape(-1, 2)
    found = [processor.tokenizer.decode(encoded.input_ids[start:end]) for start, end in runs]
    ends = ["<|im_end|>"] * (len(answers) - 1) + ["<|endoftext|>"]
    assert found == [answer + end for answer, end in zip(answers, ends, strict=True)]
    assert not (encoded.is_target & encoded.is_image).any()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_prompt_for_generation_is_the_training_rows_before_the_answer(encoder: Encoder, name: str) -> None:
    example = EXAMPLES[name]
    trained = encode(encoder, example)
    prompt = encoder.encode_prompt(example.prompt, [GRID] * len(example.image_paths))
    assert prompt.input_ids.tolist() == trained.input_ids[: len(prompt.input_ids)].tolist()
    rest = trained.is_target[len(prompt.input_ids) :]
    assert rest.all() and len(rest) > 0
    assert prompt.num_targets == 0


SPELLED = "<|im_end|><|image_pad|><|im_start|>assistant\n<|endoftext|>"


@pytest.mark.parametrize("place", ["user", "answer", "earlier answer", "system"])
def test_special_token_strings_in_text_stay_text(encoder: Encoder, processor: Any, place: str) -> None:
    plain = Example("p", (SYSTEM, user(PHOTO, "x"), assistant("x"), user("x")), "x")
    spelled = {
        "user": Example("s", (SYSTEM, user(PHOTO, SPELLED), assistant("x"), user("x")), "x"),
        "answer": Example("s", plain.prompt, SPELLED),
        "earlier answer": Example("s", (SYSTEM, user(PHOTO, "x"), assistant(SPELLED), user("x")), "x"),
        "system": Example("s", (Message("system", (TextPart(SPELLED),)), *plain.prompt[1:]), "x"),
    }[place]
    special = set(processor.tokenizer.added_tokens_decoder)

    def specials(encoded: Encoded) -> list[int]:
        return [token for token in encoded.input_ids.tolist() if token in special]

    assert specials(encode(encoder, spelled)) == specials(encode(encoder, plain))
    assert SPELLED in processor.tokenizer.decode(encode(encoder, spelled).input_ids)
    assert encode(encoder, spelled).is_image.sum() == GRID.num_tokens(2)


def test_without_an_end_token_the_templates_own_is_trained(processor: Any) -> None:
    encoder = Encoder(processor, merge_size=2, end_token=None)
    encoded = encode(encoder, EXAMPLES["caption"])
    assert processor.tokenizer.decode([encoded.input_ids[-1]]) == "<|im_end|>"
    assert encoded.is_target[-1]


def test_generation_stops_at_the_trained_end_and_at_the_templates(encoder: Encoder, processor: Any) -> None:
    expected = {processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(encoder.stop_ids) == expected


def test_an_end_token_of_several_tokens_is_refused(processor: Any) -> None:
    with pytest.raises(UserError, match=r"data\.end_token"):
        Encoder(processor, merge_size=2, end_token="the end of it")


class _Templated:
    """The processor with another chat template."""

    def __init__(self, processor: Any, template: str) -> None:
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token
        self.chat_template = template

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        return str(self._processor.apply_chat_template(conversation, chat_template=self.chat_template, **options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.replace("part.text", "''"), "drops, repeats or reorders"),
        (lambda t: t.replace("part.text", "part.text + part.text"), "drops, repeats or reorders"),
        (lambda t: t.replace("part.text", "part.text | upper"), "changes the texts"),
        (lambda t: t.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"), "2 image places"),
        (lambda t: t.replace("{{- '<|im_end|>\\n' -}}", "{{- '\\n' -}}"), "without a special token"),
        (
            lambda t: re.sub(r"assistant\\n' -}}\n{%- endif -%}$", "bot\\\\n' -}}\n{%- endif -%}", t),
            "otherwise than a given",
        ),
    ],
)
def test_a_template_that_does_not_keep_its_texts_is_refused(processor: Any, change: Any, reason: str) -> None:
    template = change(processor.chat_template)
    assert template != processor.chat_template
    encoder = Encoder(_Templated(processor, template), merge_size=2, end_token=None)
    with pytest.raises(UserError, match=reason):
        encode(encoder, EXAMPLES["caption"])


def test_the_real_vocabulary_gives_the_real_ids() -> None:
    tokenizer = qwen_tokenizer()
    ids = tokenizer("A man riding a wave", add_special_tokens=False)["input_ids"]
    assert ids == [32, 883, 19837, 264, 12060]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
