"""Settings: what is read, what is refused, and that nothing is declared without being used."""

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

from vl_dist.config import changes, dump, help_text, keys, load, plain, split_words, value_at
from vl_dist.durations import duration_s
from vl_dist.errors import UserError
from vl_dist.settings import Config, TrainFile

ROOT = Path(__file__).parent.parent


def test_words_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim:\n  lr: 1e-5\n  num_epochs: 7\n")
    config = load(recipe, ["optim.lr=3e-4", "run.output_dir=out"])
    assert (config.optim.lr, config.optim.num_epochs, config.optim.weight_decay) == (3e-4, 7, 0.0)
    assert config.run.output_dir == Path("out")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_dumped_configuration_is_a_recipe_that_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, ["lora.init_from=some/dir", "optim.max_grad_norm=null"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    assert yaml.safe_load(dump(config))["run"]["output_dir"] == str(config.run.output_dir)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.prompt=COCO Yes:", "COCO Yes:"),
        ("data.prompt=null and void", "null and void"),
        ("data.end_token=<|endoftext|>", "<|endoftext|>"),
        ("data.eval=last:4", "last:4"),
        ("optim.max_steps=null", None),
        ("model.recompute=null", None),
        ("model.recompute=every_2", "every_2"),
        ("lora.target_modules=[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("lora.target_modules=[0]", ("0",)),
        (r"lora.target_modules=.*\.layers\.[0-3]\..*q_proj", r".*\.layers\.[0-3]\..*q_proj"),
        ("lora.target_modules=(q|v)_proj: x", "(q|v)_proj: x"),
        ("lora.init_lora_weights=true", "default"),
        ("model.quantize=4bit", "4bit"),
        ("optim.lr=1e-4", 1e-4),
        ("data.shuffle=false", False),
        ("model.recompute=none", "none"),
    ],
)
def test_a_word_means_what_it_says(word: str, expected: object) -> None:
    path = word.split("=")[0]
    assert value_at(load(None, [word]), path) == expected


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("optimizer.lr=1", ["optimizer.lr", "optim.lr"]),
        ("optim.lr=fast", ["optim.lr", "fast", "number"]),
        ("optim.schedule=step", ["optim.schedule", "linear", "cosine", "constant"]),
        ("optim.num_epochs=1.5", ["optim.num_epochs", "1.5"]),
        ("optim.num_epochs=0", ["optim.num_epochs", "1 or more"]),
        ("optim=3", ["optim"]),
        ("model.recompute=some", ["model.recompute", "none, all, or every_N", "every_2"]),
        ("model.recompute=every_1", ["model.recompute", "2 or more"]),
        ("optim.lr.x=3", ["optim.lr.x"]),
        ("optim.lr", ["section.key=value"]),
        ("lora.dropout=1.0", ["lora.dropout", "below 1"]),
        ("lora.target_modules=[]", ["lora.target_modules", "list of names", "regular expression"]),
        ("lora.target_modules=null", ["lora.target_modules", "list of names"]),
        ("lora.target_modules=[[q_proj]]", ["lora.target_modules", "list of names"]),
        ("lora.target_modules=(q_proj", ["lora.target_modules", "no regular expression", "[q_proj, v_proj]"]),
        ("lora.init_lora_weights=pissa_niter_4", ["lora.init_lora_weights", "changes the frozen base", "orthogonal"]),
        ("lora.init_lora_weights=olora", ["lora.init_lora_weights", "changes the frozen base"]),
        ("lora.init_lora_weights=eva", ["lora.init_lora_weights", "pass over the data"]),
        ("lora.init_lora_weights=false", ["lora.init_lora_weights", "not known"]),
        ("optim.lr_tower=1e-5", ["optim.lr_tower", "lora.tower"]),
        ("optim.lr_merger=0", ["optim.lr_merger", "above 0"]),
        ("model.quantize=8bit", ["model.quantize", "4bit"]),
        ("data.resized_height=280", ["data.resized_width"]),
        ("run.final=best", ["data.eval", "run.final=last"]),
        ("eval.best_metric=ciderr", ["eval.best_metric", "cider | bleu1"]),
        ("data.eval=last:x", ["data.eval", "last:N"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "2 or more"]),
    ],
)
def test_a_wrong_word_is_refused_with_its_key_and_the_rule(word: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load(None, [word])
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("text", ["optim: [", "- 1\n- 2", "just text", "optim:\n  lr: 1\n  lr: 2\n", "\tx: 1"])
def test_a_broken_recipe_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load(tmp_path / "bad.yaml")


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="one of the two"):
        load(None, ["data.resized_height=28", "data.resized_width=28", "data.max_pixels=9"])
    with pytest.raises(UserError, match=r"feature_cache.*lora\.merger"):
        load(None, ["model.feature_cache=kept", "lora.merger=true"])
    with pytest.raises(UserError, match="is above"):
        load(None, ["data.min_pixels=10", "data.max_pixels=9"])


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    text = help_text()
    for key in keys():
        default = "null" if key.default is None else str(plain(key.default))
        assert f"{key.path}  ({key.type}" in text
        assert f"default {default})\n    {key.meaning}" in text
        assert key.meaning


def test_changes_say_which_settings_differ_and_whether_they_shape_training() -> None:
    before, after = load(None, []), load(None, ["optim.lr=1", "log.every_steps=3"])
    rows = {change.path: (change.before, change.after, change.trains) for change in changes(before, after)}
    assert rows == {"optim.lr": (1e-4, 1.0, True), "log.every_steps": (10, 3, False)}


def test_the_first_word_without_an_equals_sign_is_the_recipe() -> None:
    assert split_words(["a.yaml", "optim.lr=1"]) == (Path("a.yaml"), ["optim.lr=1"])
    assert split_words(["optim.lr=1"]) == (Path("recipes/shapes.yaml"), ["optim.lr=1"])


def test_every_key_is_read_somewhere_outside_the_tree() -> None:
    sources = [ROOT / "train.py", *(ROOT / "vl_dist").rglob("*.py")]
    read = {
        node.attr
        for path in sources
        if path.name not in ("settings.py", "config.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    unread = [key.path for key in keys() if key.path.rsplit(".", 1)[-1] not in read]
    assert unread == []


def test_the_tree_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 1  # type: ignore[misc]


def test_the_tutorials_recipe_carries_the_tutorials_numbers() -> None:
    config = load(ROOT / "recipes" / "coco2014_tutorial.yaml")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 16, 0.05)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (config.data.resized_height, config.data.resized_width, config.data.prompt) == (280, 280, "COCO Yes:")
    assert (config.data.eval, config.data.end_token, config.batch.examples_per_step) == ("last:4", "<|endoftext|>", 4)
    assert (config.data.shuffle, config.data.bucket_steps) == (True, 1)
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.num_epochs, optim.warmup_steps) == (1e-4, "linear", 2, 0)
    assert (optim.weight_decay, optim.max_grad_norm, optim.max_steps) == (0.0, 1.0, None)
    assert yaml.safe_load((ROOT / "recipes" / "coco2014_tutorial.yaml").read_text())["model"]["dtype"] == "auto"


def test_training_files_are_one_path_or_several_with_weights(tmp_path: Path) -> None:
    one, several = load(None, ["data.train=a.jsonl"]), load(None, ["data.train=[a.jsonl,{path: b.jsonl, weight: 2.5}]"])
    assert one.data.train == (TrainFile(path=Path("a.jsonl"), weight=1.0),)
    assert several.data.train == (TrainFile(path=Path("a.jsonl")), TrainFile(path=Path("b.jsonl"), weight=2.5))
    for config, written in (
        (one, "train: a.jsonl\n"),
        (several, "train:\n  - a.jsonl\n  - path: b.jsonl\n    weight: 2.5\n"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        assert load(path) == config
        assert " ".join(written.split()) in " ".join(dump(config).split())
    (change,) = changes(one, several)
    assert (change.before, change.after) == ("a.jsonl", ["a.jsonl", {"path": "b.jsonl", "weight": 2.5}])
    assert change.trains


@pytest.mark.parametrize(
    "word",
    ["data.train=[1]", "data.train=null", "data.train=[]", "data.train=[{path: x, wei: 2}]",
     "data.train=[{path: x, weight: 0}]", "data.train=[{path: x, weight: often}]", "data.train=[{weight: 1}]"],
)  # fmt: skip
def test_training_files_of_another_form_are_refused_with_the_form(word: str) -> None:
    with pytest.raises(UserError, match=r"data\.train .*(path|weights)"):
        load(None, [word])


@pytest.mark.parametrize(
    ("word", "seconds"),
    [
        ("5400", 5400), ("90.5", 90.5), ("30:00", 1800), ("1:30:00", 5400), ("01:30:00", 5400), ("11:59:59", 43199),
        ("1-00:00:30", 86430), ("2-12:00:00", 216000),
    ],
)  # fmt: skip
def test_a_duration_means_the_same_however_yaml_reads_it(word: str, seconds: float) -> None:
    config = load(None, [f"run.max_time={word}"])
    assert config.run.max_time is not None and duration_s(config.run.max_time) == seconds


@pytest.mark.parametrize("word", ["0", "soon", "1-2:3:4:5", "-5", "1h", "nan", "x-01:00:00", "'1:-30'"])
def test_what_is_no_duration_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"run\.max_time"):
        load(None, [f"run.max_time={word}"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lora.init_lora_weights=orthogonal", "lora.r=5"], ["orthogonal", "even", "5"]),
        (["lora.init_lora_weights=gaussian", "lora.init_from=x"], ["lora.init_from", "lora.init_lora_weights"]),
    ],
)
def test_first_weights_that_cannot_be_are_refused(words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load(None, words)
    assert all(part in str(refused.value) for part in parts)


def test_an_expression_in_a_recipe_is_text_and_a_list_is_names_and_both_read_back(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for written, expected in ((r"'.*\.[02]\.mlp\..*'", r".*\.[02]\.mlp\..*"), ("[q_proj]", ("q_proj",))):
        path.write_text(f"lora:\n  target_modules: {written}\n")
        config = load(path)
        assert config.lora.target_modules == expected
        path.write_text(dump(config))
        assert load(path) == config
    assert load(path, ["lora.r=3"]).lora.target_modules == ("q_proj",)
