"""What a trainer can do before, during and after a run: `model`, `generate`, `evaluate`, `save_model`, `log`, `close`."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pages import ROOT, code_blocks
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import ROWS, metrics_of, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from rankup import GRPOTrainer

QUESTION = "count to 5"
CONVERSATION = [{"role": "user", "content": QUESTION}]


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """The adapter of `trainer.model`."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def timeless_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in ("eval_runtime", "eval_samples_per_second")}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(one[name].equal(other[name]) for name in one.keys() | other.keys())


def test_train_returns_what_transformers_returns(make_trainer, tmp_path):
    trainer = make_trainer()
    output = trainer.train()
    assert isinstance(output, TrainOutput) and output.global_step == 2
    steps = [row for row in metrics_of(tmp_path / "run") if "reward" in row]
    assert output.training_loss == pytest.approx(sum(row["loss"] for row in steps) / 2) == output.metrics["train_loss"]
    seconds = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] == pytest.approx(2 * 12 / seconds)
    assert trainer.summary == json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.engine)])
def test_evaluate_is_of_the_policy_as_it_is_now(make_trainer, engine_shelf, tmp_path, engine):
    engine_shelf.close()  # the trainer starts a vLLM of its own
    with make_trainer(engine=engine, max_steps=6) as trainer:
        before = timeless_metrics(trainer.evaluate())
        trainer.train()
        after = timeless_metrics(trainer.evaluate())
        evaluation = trainer.summary["evaluation"]
        assert before["eval_reward"] == pytest.approx(evaluation["before"]["reward"])
        assert after["eval_reward"] == pytest.approx(evaluation["after"]["reward"])
        assert before["eval_reward"] != after["eval_reward"], "the test needs a run that changes the evaluation"
        assert trainer.state.log_history[-1]["eval_reward"] == after["eval_reward"]
        assert timeless_metrics(trainer.evaluate(adapter=tmp_path / "run" / "adapter")) == after
        texts = trainer.generate([QUESTION, "count to 7"], temperature=0)
        trainer.close()
        assert timeless_metrics(trainer.evaluate()) == after, "opened again, with the run's adapter"
        assert trainer.generate([QUESTION, "count to 7"], temperature=0) == texts


def test_other_data_can_be_evaluated(make_trainer):
    trainer = make_trainer()
    own = trainer.evaluate()["eval_reward"]
    other = trainer.evaluate({"first": ROWS[:4], "rest": ROWS[4:]})
    assert other["eval_first_reward"] == own
    assert other["eval_reward"] == pytest.approx((4 * own + 8 * other["eval_rest_reward"]) / 12)
    assert trainer.evaluate()["eval_reward"] == own


def test_dropped_rows_of_other_data_are_told(make_trainer, capsys):
    make_trainer().evaluate([*ROWS[:3], {"prompt": "x" * 100, "target": 1}])
    assert "1 of 4 evaluation prompts are longer than 64 tokens and were dropped" in capsys.readouterr().out


def test_an_adapter_that_is_evaluated_leaves_the_policy_as_it_is(make_trainer, tmp_path):
    make_trainer(output_dir=tmp_path / "other", max_steps=6).train()
    trainer = make_trainer()
    trainer.train()
    current, history = weights_of(trainer), len(trainer.state.log_history)
    of_other = trainer.evaluate(adapter=tmp_path / "other" / "adapter")
    assert of_other["eval_reward"] != trainer.summary["evaluation"]["after"]["reward"]
    assert are_equal(weights_of(trainer), current)
    assert len(trainer.state.log_history) == history, "it says nothing about the run"
    with pytest.raises(ValueError, match=r"no adapter in"):
        trainer.evaluate(adapter=tmp_path)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(trainer.summary["evaluation"]["after"]["reward"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_one_of_transformers(make_trainer, tiny_model_path, tmp_path, checkpointing):
    trainer = make_trainer(max_steps=4, gradient_checkpointing=checkpointing)
    tokenizer = trainer.processing_class
    ids = tokenizer(QUESTION, return_tensors="pt")
    untrained = trainer.model.generate(**ids, max_new_tokens=8, do_sample=False)
    trainer.train()
    trained = trainer.model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert not untrained.equal(trained)
    [text] = trainer.generate(QUESTION, temperature=0)
    assert tokenizer.decode(trained[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text

    trainer.model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path("llama"), dtype=torch.float32)
    stock = PeftModel.from_pretrained(plain, tmp_path / "saved")
    padded = tokenizer([QUESTION, "count"], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        expected, found = stock(**padded).logits, trainer.model(**padded).logits
    mask = padded["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_changed_weights_of_the_model_are_those_that_sample_and_train(make_trainer, tmp_path):
    def nudge(trainer: GRPOTrainer) -> None:
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    plain, nudged = make_trainer(output_dir=tmp_path / "plain"), make_trainer(output_dir=tmp_path / "nudged")
    plain.train()
    untouched = nudged.generate(QUESTION, temperature=0)
    nudge(nudged)
    changed = nudged.generate(QUESTION, temperature=0)
    assert changed != untouched
    nudged.train()
    first_steps = [metrics_of(tmp_path / name)[1] for name in ("plain", "nudged")]
    assert first_steps[0]["reward"] != first_steps[1]["reward"]
    assert first_steps[1]["sampling/sampling_logp_difference/max"] < 1e-3, "the trainer computes with the same weights"


def test_a_second_call_of_train_is_a_new_run(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    first = weights_of(trainer)
    trainer.train()
    assert are_equal(first, weights_of(trainer)) and timeless(tmp_path / "run") == timeless(tmp_path / "run.1")


def test_using_the_trainer_before_a_run_does_not_change_it(make_trainer, tmp_path):
    make_trainer(output_dir=tmp_path / "plain").train()
    used = make_trainer(output_dir=tmp_path / "used")
    used.evaluate()
    used.generate([QUESTION] * 3)
    used.train()
    assert timeless(tmp_path / "plain") == timeless(tmp_path / "used")


def test_callbacks_can_use_the_trainer_in_a_run_and_do_not_change_it(make_trainer, tmp_path):
    class Uses(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, record: Any, **kwargs: Any) -> None:
            trainer.log({"mine": float(state.global_step)})
            seen.append((trainer.evaluate()["eval_reward"], trainer.generate(QUESTION, temperature=0)[0]))
            ids = trainer.processing_class(QUESTION, return_tensors="pt")
            model.generate(**ids, max_new_tokens=3, do_sample=False)
            groups.append([completion.text for group in record.groups for completion in group.completions])

    seen: list[tuple[float, str]] = []
    groups: list[list[str]] = []
    make_trainer(output_dir=tmp_path / "plain", max_steps=3).train()
    trainer = make_trainer(output_dir=tmp_path / "used", callbacks=[Uses()], max_steps=3)
    trainer.train()
    rows = timeless(tmp_path / "used")
    assert [row for row in rows if "mine" not in row] == timeless(tmp_path / "plain")
    assert [row for row in rows if "mine" in row] == [{"step": step, "mine": float(step)} for step in (1, 2, 3)]
    assert seen[-1][0] == pytest.approx(trainer.summary["evaluation"]["after"]["reward"])
    assert seen[-1][1] == trainer.generate(QUESTION, temperature=0)[0]
    assert [len(texts) for texts in groups] == [12, 12, 12]


def test_generate_takes_texts_and_conversations(make_trainer):
    trainer = make_trainer()
    [of_text], [of_conversation] = trainer.generate(QUESTION, temperature=0), trainer.generate(CONVERSATION, temperature=0)
    assert of_text != of_conversation, "a conversation goes through the chat template"
    both = trainer.generate([QUESTION, CONVERSATION], temperature=0)
    assert both == [of_text, of_conversation] and trainer.generate([]) == []
    assert trainer.generate([QUESTION] * 3, seed=1) == trainer.generate([QUESTION] * 3, seed=1)
    assert len(set(trainer.generate([QUESTION] * 8, seed=1))) > 1, "the same prompt again is another sample"
    assert trainer.generate([QUESTION] * 8) != trainer.generate([QUESTION] * 8)
    [short] = trainer.generate(QUESTION, temperature=0, max_completion_length=2)
    assert of_text.startswith(short) and len(short) < len(of_text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "x" * 100}, r"1 of 1 prompts are longer than rollout\.max_prompt_length, which is 64"),
        ({"prompts": ["short", "x" * 100]}, r"1 of 2 prompts are longer"),
        ({"prompts": 5}, r"neither a text nor a conversation"),
        ({"prompts": ["a", 5]}, r"neither a text nor a conversation"),
        ({"prompts": "a", "max_completion_length": 9}, r"must be at most rollout\.max_completion_length, which is 8"),
        ({"prompts": "a", "temperature": -1.0}, r"temperature"),
    ],
)
def test_what_cannot_be_generated_is_refused(make_trainer, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_trainer().generate(**arguments)


def test_a_saved_model_is_loaded_by_peft_with_its_tokenizer(make_trainer, tiny_model_path, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(tmp_path / "mine")
    of_run = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert are_equal(load_file(tmp_path / "mine" / "adapter_model.safetensors"), of_run)
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").decode([70]) == trainer.processing_class.decode([70])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path("llama")), tmp_path / "mine")
    trainer.save_model(tmp_path / "run")  # as TRL's scripts do with output_dir
    assert (tmp_path / "run" / "metrics.jsonl").is_file() and (tmp_path / "run" / "adapter_model.safetensors").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        trainer.save_model(tmp_path / "file")


def test_a_saved_model_has_the_files_of_the_tokenizer_and_the_template_of_the_run(make_trainer, tiny_model_path, tmp_path):
    trainer = make_trainer(chat_template="{{ messages[0].content }}")
    trainer.save_model(tmp_path / "mine")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "mine" / name).read_bytes() == (tiny_model_path("llama") / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template == "{{ messages[0].content }}"
    trainer.processing_class.chat_template = {"default": "{{ messages[1].content }}", "tools": "{{ tools }}"}
    for _ in range(2):  # the second time replaces the files of the first
        trainer.save_model(tmp_path / "changed")
    assert AutoTokenizer.from_pretrained(tmp_path / "changed").chat_template == trainer.processing_class.chat_template


def test_a_failed_run_leaves_its_policy_and_no_engine(make_trainer, tmp_path):
    def fails_in_the_second_step(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyError("no such answer")
        return [float(len(set(ids))) for ids in completion_ids]

    trainer = make_trainer(reward=fails_in_the_second_step, eval_before=False)
    policy = weakref.ref(trainer._current().policy)
    with pytest.raises(RuntimeError, match="fails_in_the_second_step") as failure:
        trainer.train()
    assert failure.tb and policy() is None, "the traceback, which a notebook keeps, does not keep the model"
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    current = {name.replace(".default", ""): weight for name, weight in weights_of(trainer).items()}
    assert are_equal(current, saved) and any(weight.any() for name, weight in current.items() if "lora_B" in name)


def test_a_trainer_that_is_garbage_or_closed_frees_its_policy(make_trainer):
    closed, garbage = make_trainer(), make_trainer()
    closed.train()
    policy = weakref.ref(closed._current().policy)
    closed.close()
    closed.close()
    assert policy() is None
    garbage.train()
    policy = weakref.ref(garbage._current().policy)
    del garbage
    gc.collect()
    assert policy() is None


def test_another_trainer_takes_the_place_of_the_first(make_trainer, tmp_path, capsys):
    first, second = make_trainer(output_dir=tmp_path / "first"), make_trainer(output_dir=tmp_path / "second", seed=1)
    first.train()
    trained, policy = weights_of(first), weakref.ref(first._current().policy)
    second.train()
    assert policy() is None and "closing the engine of another trainer" in capsys.readouterr().out
    assert are_equal(weights_of(first), trained) and not are_equal(weights_of(second), trained)


def test_a_step_is_saved_although_a_callback_fails_after_it(make_trainer, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[Fails()], max_steps=3).train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    resumed = make_trainer(max_steps=3)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    make_trainer(output_dir=tmp_path / "whole", max_steps=3).train()
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_a_finished_run_is_taken_as_it_is(make_trainer):
    trainer = make_trainer()
    trainer.train()
    again = make_trainer()
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert are_equal(weights_of(again), weights_of(trainer))
    *steps, end = again.state.log_history
    assert (steps, end["train_loss"]) == (trainer.state.log_history[:-1], trainer.state.log_history[-1]["train_loss"])


def test_the_example_of_the_documentation(tiny_model_path, tmp_path, monkeypatch, capsys):
    """Apart from the model, the engine and the number of steps."""
    page = (ROOT / "docs" / "runs.md").read_text()
    [example] = [block for language, block in code_blocks(page) if language == "python" and "with GRPOTrainer(" in block]
    for text, other in (
        ("smollm2-135m-instruct", str(tiny_model_path("llama"))),
        ("max_steps=20", 'max_steps=2, engine="torch", dtype="float32", max_completion_length=8'),
    ):
        assert example.count(text) == 1
        example = example.replace(text, other)
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": n + 1}) + "\n" for n in range(8)))
    exec(example, {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.splitlines()[-1].startswith("[")


class InSteps(TrainerCallback):
    """Does something at the end of each step."""

    def __init__(self, does: Callable[[], object]) -> None:
        self.does = does

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.does()


def test_a_trainer_that_a_callback_closes_is_closed_after_the_run(make_trainer, tmp_path):
    policies = []

    def close() -> None:
        policies.append(weakref.ref(trainer._current().policy))
        trainer.close()

    trainer = make_trainer(callbacks=[InSteps(close)])
    assert trainer.train().global_step == 2
    gc.collect()
    assert policies[0]() is None
    assert trainer.evaluate()["eval_reward"] == pytest.approx(trainer.summary["evaluation"]["after"]["reward"])


def test_a_run_inside_of_a_run_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[InSteps(lambda: trainer.train())])
    with pytest.raises(ValueError, match="in the middle of a run or an evaluation"):
        trainer.train()
    assert not (tmp_path / "run.1").exists()
    trainer.remove_callback(InSteps)
    assert trainer.can_resume and trainer.train(resume_from_checkpoint=True).global_step == 2


def test_what_is_logged_are_plain_numbers(make_trainer, tmp_path):
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(3), "d": float("nan"), "e": None}
    trainer = make_trainer(callbacks=[InSteps(lambda: trainer.log(metrics))], max_steps=1)
    trainer.train()
    [row] = [row for row in metrics_of(tmp_path / "run") if "a" in row]
    assert row == {"step": 1, "a": 0.5, "b": 2, "c": 3, "d": None, "e": None}
    trainer.save_state()
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("value", ["good", [1.0], {"a": 1.0}, np.arange(3), torch.zeros(2)])
def test_what_is_no_number_is_not_logged(make_trainer, value: Any):
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"log: mine must be a number \(got "):
        trainer.log({"mine": value})
    assert trainer.state.log_history == []


@pytest.mark.parametrize("name", ["step", "epoch", "loss", "reward", "eval_reward"])
def test_names_of_the_run_are_not_logged(make_trainer, name: str):
    with pytest.raises(ValueError, match=rf"log: {name} is logged by the run: use another name"):
        make_trainer().log({name: 1.0, "mine": 2.0})


def test_an_evaluation_by_one_callback_leaves_that_which_another_asked_for(make_trainer, tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = True

    trainer = make_trainer(callbacks=[Asks(), InSteps(lambda: trainer.evaluate(ROWS[4:]))], max_steps=3)
    trainer.train()
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "eval_reward" in row] == [0, 1, 2, 3]


def test_a_trainer_keeps_its_adapter_when_another_one_takes_its_folder(make_trainer, tmp_path):
    first, second = make_trainer(), make_trainer(seed=1)
    first.train()
    trained = weights_of(first)
    first.save_model()
    second.train()
    assert (tmp_path / "run.1").is_dir() and not are_equal(weights_of(second), trained)
    assert are_equal(weights_of(first), trained)
    shutil.rmtree(tmp_path / "run.1")
    first.close()
    with pytest.raises(ValueError, match=r"is gone, or another run has replaced it"):
        first.evaluate()
    assert first.train().global_step == 2
