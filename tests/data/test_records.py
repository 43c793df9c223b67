"""Records: both input formats, and each way a line can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vl_dist.data.record_files import BadRow, read_records, read_rows
from vl_dist.data.records import (
    ImagePart,
    Message,
    TextPart,
    examples_of,
    messages_to_json,
    parse_messages,
    parse_record,
    parse_tutorial,
    usual_prompt,
    with_images,
)
from vl_dist.errors import UserError

USER = {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "A cat."}


def record(**changed: Any) -> dict[str, Any]:
    return {"id": "r1", "messages": [USER, ANSWER]} | changed


def test_a_record_is_its_conversation_and_its_answer() -> None:
    parsed = parse_record(record())
    assert parsed.prompt == (Message("user", (ImagePart("a.jpg"), TextPart("What?"))),)
    assert parsed.answers == ("A cat.",)
    assert parsed.image_paths == ("a.jpg",)
    assert [example.id for example in examples_of([parsed])] == ["r1"]


def test_several_answers_are_several_examples_numbered_from_zero() -> None:
    parsed = parse_record(record(messages=[USER], answers=["A cat.", "Some cat."]))
    assert [(e.id, e.answer) for e in examples_of([parsed])] == [("r1#0", "A cat."), ("r1#1", "Some cat.")]


def test_several_turns_images_and_system_text_are_kept_in_order() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]
    parsed = parse_record(record(messages=messages))
    assert [message.role for message in parsed.prompt] == ["system", "user", "assistant", "user"]
    assert parsed.image_paths == ("a.jpg", "a.jpg")
    assert parse_messages(messages_to_json(parsed.prompt)) == parsed.prompt


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ([], "JSON object"),
        (record(id=""), "id"),
        (record(id=3), "id"),
        (record(messages=[]), "at least one"),
        (record(messages=[USER]), "assistant"),
        (record(answers=["x"]), "instead of"),
        (record(messages=[USER], answers=[]), "answers"),
        (record(messages=[USER], answers=[1]), "answers"),
        (record(messages=[{"role": "bot", "content": "x"}, ANSWER]), "role"),
        (record(messages=[{"role": "user", "content": []}, ANSWER]), "content"),
        (record(messages=[{"role": "user", "content": [{"type": "video"}]}, ANSWER]), "message 1"),
        (record(messages=[USER, {"role": "assistant", "content": USER["content"]}]), "must be text"),
        (record(caption="x"), "caption"),
    ],
)
def test_a_record_that_breaks_the_format_is_refused_with_the_rule(row: Any, part: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_record(row)
    assert part in str(refused.value)


def tutorial_row(question: str, answer: str = "A cat.") -> dict[str, Any]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"id": "identity_1", "conversations": turns}


def test_the_tutorials_conversation_becomes_image_then_prompt() -> None:
    parsed = parse_tutorial(tutorial_row("COCO Yes: <|vision_start|>x/1.jpg<|vision_end|>"), "COCO Yes:")
    assert parsed.prompt == (Message("user", (ImagePart("x/1.jpg"), TextPart("COCO Yes:"))),)
    assert parsed.answers == ("A cat.",)


@pytest.mark.parametrize("question", ["no marks", "<|vision_end|>x<|vision_start|>", "<|vision_start|>a<|vision_end|>" * 2])
def test_a_tutorial_question_without_exactly_one_image_is_refused(question: str) -> None:
    with pytest.raises(UserError, match="one image path"):
        parse_tutorial(tutorial_row(question), "p")


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record()) + "\n\n{broken\n")
    with pytest.raises(UserError, match="line 3"):
        read_records(path, default_prompt="")


def test_an_id_used_twice_is_named_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text((json.dumps(record()) + "\n") * 2)
    with pytest.raises(UserError, match=r"line 2 .*'r1' was used before, in line 1"):
        read_records(path, default_prompt="")


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        (b'{"id": "x", "messages": ', None, "not valid JSON"),
        (b'{"id": "x", "messages": []}', "x", "at least one message"),
        (b"[1, 2]", None, "JSON object"),
        (b"\xff\xfe", None, "JSON|UTF-8"),
        (b'{"id": "x", "messages": "\xe9"}', None, "not UTF-8 text"),
        (b"[" * 100_000, None, "cannot be read|not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", None, "cannot be read"),
        (
            json.dumps(record(id="x", messages=[USER, {"role": "assistant", "content": "\ud83d"}])).encode(),
            None,
            "surrogate",
        ),
        (json.dumps(record(id="r1")).encode(), "r1", "used before, in line 1"),
    ],
    ids=["cut", "no message", "list", "UTF-16", "Latin-1", "nested", "huge number", "half a character", "id twice"],
)
def test_a_row_that_is_no_record_is_left_out_and_the_others_stay(
    tmp_path: Path, line: bytes, name: str | None, reason: str
) -> None:
    path = tmp_path / "records.jsonl"
    good = [json.dumps(record(id=name)).encode() for name in ("r1", "r2")]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good[0], line, good[1]]) + b"\r\n\n")
    first, bad, last = read_rows(path, default_prompt="")
    assert isinstance(bad, BadRow)
    assert (first.id, bad.id, last.id) == ("r1", name, "r2")
    assert bad.place == f"{path}, line 2"
    assert re.search(reason, bad.reason)


def test_a_bad_conversation_of_the_tutorials_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data_vl.json"
    good = tutorial_row("COCO Yes: <|vision_start|>x/1.jpg<|vision_end|>")
    path.write_text(json.dumps([good, {"id": "bad"}, 3, good]))
    rows = read_rows(path, default_prompt="")
    assert [isinstance(one, BadRow) for one in rows] == [False, True, True, True]
    assert [one.id for one in rows[1:]] == ["bad", None, rows[0].id]
    path.write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match="UTF-8"):
        read_rows(path, default_prompt="")


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no record"):
        read_records(tmp_path / "empty.jsonl", default_prompt="")
    with pytest.raises(UserError, match="There is no record file"):
        read_records(tmp_path / "absent.jsonl", default_prompt="")


def test_unicode_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    text = "one\u2028two\x85three"
    row = record(messages=[USER, {"role": "assistant", "content": text}])
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_records(path, default_prompt="")[0].answers == (text,)


def test_the_usual_prompt_is_the_most_common_whatever_its_images() -> None:
    rows = [record(id="1"), record(id="2"), record(id="3", messages=[{"role": "user", "content": "Hi"}, ANSWER])]
    prompt = usual_prompt(examples_of(parse_record(row) for row in rows))
    assert with_images(prompt, ["b.jpg"])[0].parts == (ImagePart("b.jpg"), TextPart("What?"))
    with pytest.raises(UserError, match="1 images, got 2"):
        with_images(prompt, ["a", "b"])
