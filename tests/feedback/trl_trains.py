"""Run in TRL's own environment: python trl_trains.py MODEL TRAINER FILE OUT, one step of a trainer from a file."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

TRAINERS = {
    "reward": (RewardConfig, RewardTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "sft": (SFTConfig, SFTTrainer),
}


def main(model: str, trainer: str, file: str, out: str) -> None:
    kind = "parquet" if file.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=file, split="train", cache_dir=f"{out}/cache")
    config, cls = TRAINERS[trainer]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = (
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        if trainer == "reward"
        else AutoModelForCausalLM.from_pretrained(model)
    )
    args = config(
        output_dir=out,
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=48,
    )
    taught = cls(model=made, args=args, train_dataset=rows, processing_class=tokenizer)
    loss = taught.train().training_loss
    print(f"{trainer}: {len(rows)} rows of {sorted(rows.column_names)}, loss {loss:.3f}")
    assert loss == loss, "not a number"


if __name__ == "__main__":
    main(*sys.argv[1:])
