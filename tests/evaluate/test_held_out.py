"""Evaluation: captions equal those of plain generation, each question once, all references counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Collator
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Example
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import generate, length_batches
from vl_dist.evaluate.held_out import evaluate, group_questions, read_frequency
from vl_dist.evaluate.scores import cider_d, tokenize
from vl_dist.run.distributed import Ranks, evaluating
from vl_dist.settings import EvalConfig


def test_examples_of_one_image_and_prompt_are_one_question_with_all_references() -> None:
    cat = SEVEN[2]
    examples = [
        Example("r#0", cat.prompt, "A cat."),
        Example("other", cat.prompt, "Cat!"),
        Example("r#1", cat.prompt, "A cat."),
    ]
    questions = group_questions([*examples, SEVEN[0]])
    assert [(q.prompt.id, q.references) for q in questions] == [
        ("r", ("A cat.", "Cat!", "A cat.")),  # said twice, counts twice
        ("rocket", (SEVEN[0].answer,)),
    ]


def test_rarity_comes_from_the_questions_of_a_record_file(tmp_path: Path) -> None:
    def line(name: str, image: str, answer: str) -> str:
        user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}
        return json.dumps({"id": name, "messages": [user], "answers": [answer]}) + "\n"

    path = tmp_path / "corpus.jsonl"
    path.write_text(line("1", "x.jpg", "A cat.") + line("2", "x.jpg", "The cat") + line("3", "y.jpg", "a dog"))
    frequency = read_frequency(path)  # the images need not be there
    assert frequency.num_documents == 2, "records of one image and prompt are one document"
    assert dict(frequency.counts) == {"a": 2, "cat": 1, "the": 1, "dog": 1, "a cat": 1, "the cat": 1, "a dog": 1}
    with pytest.raises(UserError, match=r"eval\.cider_corpus"):
        read_frequency(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_answers_equal_those_of_each_prompt_alone(
    tiny_model: Path, collator: Collator, processor: Any, batch_size: int
) -> None:
    model = packed_model(tiny_model)
    base = model.peft_model.get_base_model()
    stop_ids = list(collator.encoder.stop_ids)
    alone = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=stop_ids, pad_token_id=0)
    with evaluating(model):
        lengths = [collator.prompt(example)[0].num_tokens for example in SEVEN]
        batches = length_batches(lengths, batch_size)
        answers = generate(base, collator, SEVEN, batches, max_new_tokens=6, pad_id=0)
        found = dict(pair for batch in answers for pair in batch)
        for n, example in enumerate(SEVEN):
            encoded, pixels = collator.prompt(example)
            ids = torch.from_numpy(encoded.input_ids)[None]
            images = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[g.t, g.h, g.w] for g in encoded.grids])}
            output = base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=torch.from_numpy(encoded.is_image.astype("int64"))[None],
                **(images if encoded.grids else {}),
                generation_config=alone,
            )
            expected = [t for t in output[0, ids.shape[1] :].tolist() if t not in stop_ids]
            assert found[n] == expected[: len(found[n])]


def test_batches_are_neighbours_in_length_the_longest_first_and_each_prompt_once() -> None:
    lengths = [5, 90, 7, 90, 6, 30, 5]
    assert length_batches(lengths, 3) == [[1, 3, 5], [2, 4, 0], [6]]
    assert length_batches([], 3) == []


def test_an_evaluation_that_is_to_stop_ends_between_two_batches(
    tiny_model: Path, collator: Collator, photos: Path, shape: PatchShape, processor: Any
) -> None:
    from accelerate import Accelerator

    lengths = measure(SEVEN, collator.encoder, HeaderReader(photos, collator.budget, shape))
    model = packed_model(tiny_model)
    done: list[int] = []
    found = evaluate(
        model,
        LoadedData(SEVEN, lengths, collator),
        Ranks(Accelerator(cpu=True)),
        EvalConfig(batch_size=2, max_new_tokens=3),
        tokenizer=processor.tokenizer,
        max_tokens=150,
        on_progress=lambda now, total: done.append(now),
        stopping=lambda: 4 in done,
    )
    assert found is None and done == [0, 2, 4]
    assert model.training, "the mode is as it was"


def test_an_evaluation_gives_the_mean_loss_and_a_sample_for_each_question(
    tiny_model: Path, collator: Collator, photos: Path, shape: PatchShape, processor: Any
) -> None:
    from accelerate import Accelerator

    lengths = measure(SEVEN, collator.encoder, HeaderReader(photos, collator.budget, shape))
    model = packed_model(tiny_model, dropout=0.5)
    done: list[tuple[int, int]] = []
    evaluation = evaluate(
        model,
        LoadedData(SEVEN, lengths, collator),
        Ranks(Accelerator(cpu=True)),
        EvalConfig(batch_size=4, max_new_tokens=3),
        tokenizer=processor.tokenizer,
        max_tokens=150,
        on_progress=lambda now, total: done.append((now, total)),
    )
    assert model.training, "evaluation leaves the mode as it was"
    with evaluating(model):
        batch = collator.pack(SEVEN)
        expected = float(model(batch)) / batch.num_targets
    assert evaluation.scores["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert [sample.id for sample in evaluation.samples] == [example.id for example in SEVEN]
    assert done == [(0, 7), (4, 7), (7, 7)]
    samples = evaluation.samples
    each = cider_d([tokenize(s.prediction) for s in samples], [[tokenize(r) for r in s.references] for s in samples])
    assert [sample.score for sample in samples] == each
    assert evaluation.scores["eval/cider"] == pytest.approx(sum(each) / 7)
    names = ["loss", "cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "exact_match"]
    assert list(evaluation.scores) == [f"eval/{name}" for name in names]
