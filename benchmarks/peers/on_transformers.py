"""Hugging Face: ``generate`` of transformers, SFT and GRPO of TRL."""

import tempfile

import torch
from clock import Clock, Task, task, tell
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

CLOCK = Clock()


class Ticks(TrainerCallback):
    """A tick at the end of each optimizer step."""

    def on_step_end(self, *_: object, **__: object) -> None:
        CLOCK.tick()


def load(folder: str):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def sample(given: Task) -> None:
    model, tokenizer = load(given.folder)
    batch = tokenizer(given.prompts(), return_tensors="pt")
    assert batch["input_ids"].shape[1] == given.prompt
    for _ in range(given.repeats + 2):
        CLOCK.tick()
        with torch.inference_mode():
            out = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=given.new, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        assert out.shape == (given.rows, given.prompt + given.new)


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 1000,
}


def sft(given: Task, output: str) -> None:
    model, tokenizer = load(given.folder)
    length = given.prompt + given.new
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in given.prompts()]
    assert {len(row) for row in rows} == {length}
    settings = SFTConfig(
        output, **COMMON, per_device_train_batch_size=given.rows, max_steps=given.steps,
        max_length=length,
    )  # fmt: skip
    SFTTrainer(
        model, settings, train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer, callbacks=[Ticks()],
    ).train()  # fmt: skip


def grpo(given: Task, output: str) -> None:
    model, tokenizer = load(given.folder)
    settings = GRPOConfig(
        output, **COMMON, per_device_train_batch_size=given.rows, num_generations=given.n,
        max_completion_length=given.new, max_steps=given.steps, temperature=1.0, top_p=1.0,
        top_k=0, beta=0.04, num_iterations=1, generation_batch_size=given.rows,
    )  # fmt: skip
    GRPOTrainer(
        model, lambda completions, **_: CLOCK.reward(completions), settings,
        train_dataset=Dataset.from_dict({"prompt": given.prompts()[:: given.n]}),
        processing_class=tokenizer,
    ).train()  # fmt: skip


def main() -> None:
    given = task()
    if given.subject == "sampling":
        sample(given)
    else:
        with tempfile.TemporaryDirectory() as output:
            {"sft": sft, "grpo": grpo}[given.learns](given, output)
    tell(given, CLOCK)


if __name__ == "__main__":
    main()
