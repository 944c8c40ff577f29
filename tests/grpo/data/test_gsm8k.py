"""The run file for GSM8K takes local files as well as the hub: rows, prompts and the reward fit together."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import tiny_tokenizer

from rankup.grpo.config import load_config
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.data.sources import load_rows
from rankup.rewards.contract import Inputs
from rankup.rewards.runner import Scorer

RUN_FILE = Path(__file__).resolve().parents[3] / "configs" / "gsm8k_qwen2.5_1.5b.yaml"
ROWS = [
    {"question": "A pen costs $2. What do 617 pens cost?", "answer": "617 * 2 = <<617*2=1234>>1234\n#### 1,234"},
    {"question": "Tom had 5 and lost 8. What has he?", "answer": "5 - 8 = <<5-8=-3>>-3\n#### -3"},
]


def test_local_files_train_by_the_same_run_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = load_config(RUN_FILE, [f"data.train={path}", f"data.eval={path}"])
    assert config.data.train is not None
    rows = load_rows(config.data.train, split=config.data.train_split, subset=config.data.subset)
    prompts = prepare_prompts(rows, tiny_tokenizer(), config.data, max_prompt_length=config.rollout.max_prompt_length).rows
    messages = prompts[0].content
    assert isinstance(messages, list)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "pens" in messages[1]["content"]
    completions = [[{"role": "assistant", "content": text}] for text in ("They cost $1,234.", "He has 3.")]
    scores = Scorer(config.rewards).score(
        Inputs(
            prompts=[row.content for row in prompts],
            completions=completions,
            completion_ids=[[1], [1]],
            columns={"answer": [row.columns["answer"] for row in prompts]},
        )
    )
    assert scores.total == [1.0, 0.0]
