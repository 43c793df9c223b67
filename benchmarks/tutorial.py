"""The tutorial's fine-tune on HF Trainer: what this project's loop is compared with, in numbers and in speed.

Same preparation of data, same LoRA, same arguments of the Trainer. What current transformers forces is the only change: the
kinds of tokens (`mm_token_type_ids`), without which it builds no image positions, go along and are padded. The tutorial's
captioning after training is left out.

    python -m benchmarks.tutorial MODEL_DIR DATA_VL_JSON OUTPUT_DIR

Legend: B images of a micro-batch, T tokens, P patches of one image, C values of a patch.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from qwen_vl_utils import process_vision_info
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NO_TARGET = -100  # torch's cross entropy skips this label
TEXT = 0  # mm_token_type_ids: 0 text, 1 image
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Features = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TutorialSettings:
    """Every number of the tutorial. Fields after `save_steps` are not the tutorial's: they make a run comparable."""

    model_dir: Path
    data: Path  # the tutorial's data_vl.json, with absolute image paths
    output_dir: Path
    dtype: torch.dtype = torch.bfloat16
    num_held_out: int = 4  # rows at the end that are not trained on
    prompt: str = "COCO Yes:"
    resized_height: int = 280
    resized_width: int = 280
    max_length: int = 8192  # tokens; what is longer is cut
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    micro_batch_size: int = 2
    gradient_accumulation_steps: int = 2
    num_epochs: int = 2
    learning_rate: float = 1e-4
    logging_steps: int = 10
    save_steps: int = 100
    start_from: Path | None = None  # an adapter directory that PEFT saved; None: fresh weights
    shuffle: bool = True  # False: rows in the order of the file
    max_steps: int | None = None  # optimizer steps, and the length of the schedule; None: num_epochs
    max_grad_norm: float | None = 1.0  # None: gradients are not clipped
    seed: int = 42  # of the order of rows and of dropout; the Trainer's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class TutorialRun:
    """What a run gave."""

    losses: tuple[float, ...]  # of each optimizer step, not rounded: the mean over the targets of all its micro-batches
    adapter: dict[str, torch.Tensor]  # on the CPU, by the names in PEFT's files
    num_examples: int  # rows that were trained on, counted anew in each epoch
    seconds: float  # the training alone, without loading and tokenising


class StepLosses(Trainer):  # type: ignore[misc]
    """A Trainer that keeps the losses which it otherwise only logs, and can keep the order of the rows."""

    def __init__(self, *args: Any, shuffle: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shuffle = shuffle
        self._micro_losses: list[list[torch.Tensor]] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch. Its loss comes divided by the number of targets of the whole optimizer step."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if len(self._micro_losses) == self.state.global_step:
            self._micro_losses.append([])
        self._micro_losses[self.state.global_step].append(loss)  # read at the end: a read here would slow the step
        return loss

    @property
    def step_losses(self) -> tuple[float, ...]:
        """The loss of each optimizer step so far."""
        return tuple(sum(float(loss) for loss in losses) for losses in self._micro_losses)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._shuffle:
            return super()._get_train_sampler(train_dataset)
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def train_tutorial(settings: TutorialSettings) -> TutorialRun:
    """The tutorial's training, from its files to the trained adapter."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model_dir)
    processor = AutoProcessor.from_pretrained(settings.model_dir)
    model = load_model(settings)
    dataset = load_rows(settings).map(lambda row: encode(row, settings, tokenizer, processor))
    trainer = StepLosses(
        model=model,
        args=training_arguments(settings),
        train_dataset=dataset,
        data_collator=padding_collator(tokenizer),
        shuffle=settings.shuffle,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return TutorialRun(
        losses=trainer.step_losses,
        adapter={name: tensor.detach().cpu().clone() for name, tensor in weights.items()},
        num_examples=round(trainer.state.epoch * len(dataset)),
        seconds=seconds,
    )


def load_model(settings: TutorialSettings) -> PeftModel:
    """The base with a trainable adapter. The tower is not frozen out of autograd, as in the tutorial."""
    base = Qwen2VLForConditionalGeneration.from_pretrained(settings.model_dir, dtype=settings.dtype, device_map="auto")
    base.enable_input_require_grads()  # gradient checkpointing needs inputs with gradients where all weights are frozen
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(TARGET_MODULES),
        inference_mode=False,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
    )
    if settings.start_from is None:
        return get_peft_model(base, lora)
    return PeftModel.from_pretrained(base, str(settings.start_from), is_trainable=True, config=lora)


def load_rows(settings: TutorialSettings) -> Dataset:
    """The rows to train on; both parts of the file are written to the output directory."""
    rows = json.loads(settings.data.read_text(encoding="utf-8"))
    count = len(rows) - settings.num_held_out
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:count]), ("test", rows[count:])):
        (settings.output_dir / f"data_vl_{name}.json").write_text(json.dumps(part), encoding="utf-8")
    cache = settings.output_dir / "cache"  # datasets' shared one would give back rows that an earlier run encoded
    return Dataset.from_json(str(settings.output_dir / "data_vl_train.json"), cache_dir=str(cache))


def encode(row: Features, settings: TutorialSettings, tokenizer: Any, processor: Any) -> Features:
    """One row as the model takes it: rendered prompt with image, then the caption, then the padding token as its end."""
    question, caption = (turn["value"] for turn in row["conversations"])
    prompt = encode_prompt(image_path(question), settings, processor)
    answer = tokenizer(caption, add_special_tokens=False)
    length = len(prompt["input_ids"][0])
    targets = [*answer["input_ids"], tokenizer.pad_token_id]
    by_token = {
        "input_ids": prompt["input_ids"][0] + targets,
        "attention_mask": prompt["attention_mask"][0] + answer["attention_mask"] + [1],
        "labels": [NO_TARGET] * length + targets,
        "mm_token_type_ids": prompt["mm_token_type_ids"][0] + [TEXT] * len(targets),
    }
    return {
        **{name: torch.tensor(values[: settings.max_length]) for name, values in by_token.items()},
        "pixel_values": torch.tensor(prompt["pixel_values"]),  # [P, C]
        "image_grid_thw": torch.tensor(prompt["image_grid_thw"]).squeeze(0),  # [3]
    }


def encode_prompt(image: str, settings: TutorialSettings, processor: Any) -> Features:
    """What the processor makes of one image and the prompt, as lists with a batch of one in front."""
    picture = {
        "type": "image",
        "image": image,
        "resized_height": settings.resized_height,
        "resized_width": settings.resized_width,
    }
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": settings.prompt}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages)
    made = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
    return {name: tensor.tolist() for name, tensor in made.items()}


def image_path(question: str) -> str:
    """The path between the two marks of a user turn; the text around them is not used."""
    return question.split("<|vision_start|>")[1].split("<|vision_end|>")[0]


def padding_collator(tokenizer: Any) -> Callable[[Sequence[Features]], Features]:
    """DataCollatorForSeq2Seq, and padded `mm_token_type_ids`, which it does not know.

    It stacks `pixel_values` to [B, P, C] and `image_grid_thw` to [B, 3]: all images have one size.
    """
    pad_known = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)

    def collate(rows: Sequence[Features]) -> Features:
        kinds = [torch.as_tensor(row["mm_token_type_ids"]) for row in rows]
        known = [{name: value for name, value in row.items() if name != "mm_token_type_ids"} for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(
            kinds, batch_first=True, padding_value=TEXT, padding_side=tokenizer.padding_side
        )  # [B, T]
        return {**pad_known(known), "mm_token_type_ids": padded}

    return collate


def training_arguments(settings: TutorialSettings) -> TrainingArguments:
    """What the tutorial sets; all else is the Trainer's default: AdamW, linear decay to 0, no warm-up."""
    return TrainingArguments(
        output_dir=str(settings.output_dir),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        logging_steps=settings.logging_steps,
        num_train_epochs=settings.num_epochs,
        save_steps=settings.save_steps,
        learning_rate=settings.learning_rate,
        save_on_each_node=True,
        gradient_checkpointing=True,
        report_to="none",
        max_steps=-1 if settings.max_steps is None else settings.max_steps,  # -1: the Trainer's "not set"
        max_grad_norm=0.0 if settings.max_grad_norm is None else settings.max_grad_norm,  # 0: the Trainer's "never"
        seed=settings.seed,
    )


def main(words: Sequence[str]) -> None:
    """The command: three paths, and what a machine may need otherwise."""
    parser = argparse.ArgumentParser(prog="benchmarks.tutorial", description="Train as the tutorial does, on HF Trainer.")
    parser.add_argument("model_dir", type=Path, help="directory of Qwen2-VL")
    parser.add_argument("data", type=Path, help="the tutorial's data_vl.json")
    parser.add_argument("output_dir", type=Path, help="gets checkpoints, the two parts of the data, and a cache")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="precision of the base")
    parser.add_argument("--max-steps", type=int, help="end after this many optimizer steps")
    given = parser.parse_args(words)
    run = train_tutorial(
        TutorialSettings(
            model_dir=given.model_dir,
            data=given.data,
            output_dir=given.output_dir,
            dtype=DTYPES[given.dtype],
            max_steps=given.max_steps,
        )
    )
    speed = run.num_examples / run.seconds
    sys.stdout.write(f"{len(run.losses)} steps, last loss {run.losses[-1]:.4f}, {speed:.2f} examples/s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
