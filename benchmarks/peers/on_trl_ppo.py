"""PPO of TRL, in the last release that has it (1.12)."""

import tempfile
from types import SimpleNamespace

import torch
from clock import Clock, Task, task, tell
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

CLOCK = Clock()


class Free(torch.nn.Module):
    """A reward model that costs nothing: the trainer takes no function."""

    base_model_prefix = "backbone"

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(1, 1)
        self.backbone = self.read

    def read(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        # Asked once an iteration: see local_rollout_forward_batch_size.
        given = CLOCK.reward(input_ids)
        hidden = torch.tensor(given)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[hidden])


def ppo(given: Task, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given.folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32) for _ in range(2)
    )
    critic = AutoModelForSequenceClassification.from_pretrained(
        given.folder, num_labels=1, dtype=torch.float32
    )
    rows = Dataset.from_dict({"input_ids": [tokenizer(t)["input_ids"] for t in given.prompts()]})
    settings = PPOConfig(
        output, use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
        learning_rate=1e-6, gradient_checkpointing=False, num_sample_generations=0,
        per_device_train_batch_size=given.rows // given.minibatches,
        gradient_accumulation_steps=given.minibatches, num_mini_batches=given.minibatches,
        local_rollout_forward_batch_size=given.rows, response_length=given.new, num_ppo_epochs=1,
        temperature=1.0, total_episodes=given.rows * given.steps, logging_steps=1000,
    )  # fmt: skip
    PPOTrainer(
        settings, tokenizer, model=policy, ref_model=reference, reward_model=Free(),
        train_dataset=rows, value_model=critic,
    ).train()  # fmt: skip


def main() -> None:
    given = task()
    with tempfile.TemporaryDirectory() as output:
        ppo(given, output)
    tell(given, CLOCK)


if __name__ == "__main__":
    main()
