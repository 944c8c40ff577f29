from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from scored import scorer_of
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

from rankup.rewards import Inputs
from rankup.rewards.classifier import SequenceClassifier

PROMPTS = ["What is 2 + 3?", "Say hello.", "2 + 3 =", "Why?", "p"]
COMPLETIONS = ["It is 5.", "Hello! " * 9, " 5", "", "Ünïcödé"]


def make_classifier(folder: Path, kind: str, *, num_labels: int = 1, pad_token: str | None = "<pad>") -> Path:
    """Write a random sequence classifier with its tokenizer to `folder`."""
    import torch
    import transformers

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad_token
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, num_labels=num_labels
    )
    config.pad_token_id = None if pad_token is None else tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        "llama": make_classifier(root / "llama", "Llama"),
        "llama without pad": make_classifier(root / "llama_without_pad", "Llama", pad_token=None),
        "bert": make_classifier(root / "bert", "Bert"),
        "two labels": make_classifier(root / "two_labels", "Llama", num_labels=2),
        "three labels": make_classifier(root / "three_labels", "Bert", num_labels=3),
    }


@pytest.fixture(scope="module")
def rewards_of_trl(classifiers, tiny_model_path, tmp_path_factory) -> Callable[..., dict[str, list[float]]]:
    """What TRL's trainer makes of model ids among its reward functions: their rewards, by the kind of classifier."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    kinds = ["llama", "llama without pad", "bert"]
    output = str(tmp_path_factory.mktemp("trl"))
    trainer = GRPOTrainer(
        model=str(tiny_model_path("llama")),
        reward_funcs=[str(classifiers[kind]) for kind in kinds],
        args=GRPOConfig(output_dir=output, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=8),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    assert trainer.reward_func_names == [classifiers[kind].name for kind in kinds]

    def rewards(prompts: list[Any], completions: list[Any]) -> dict[str, list[float]]:
        rows = [{"prompt": prompt} for prompt in prompts]
        columns = trainer._calculate_rewards(rows, prompts, completions, [[1]] * len(prompts)).T
        return dict(zip(kinds, columns.tolist(), strict=True))

    return rewards


def as_messages(role: str, texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


# ------------------------------------------------------------------------------------------ as in TRL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM:UserWarning")
def test_texts_get_the_same_rewards_as_in_trl(classifiers, rewards_of_trl):
    for kind, expected in rewards_of_trl(PROMPTS, COMPLETIONS).items():
        assert len({round(reward, 4) for reward in expected}) == 5
        for batch_size in (1, 2, 16):
            classifier = SequenceClassifier(str(classifiers[kind]), batch_size=batch_size, device="cpu")
            assert classifier(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected, abs=1e-4), kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM:UserWarning")
def test_conversations_get_the_same_rewards_as_in_trl(classifiers, rewards_of_trl):
    prompts, completions = as_messages("user", PROMPTS), as_messages("assistant", COMPLETIONS)
    prompts[1].insert(0, {"role": "system", "content": "Be kind."})
    completions[2] += [{"role": "tool", "content": "5"}, {"role": "assistant", "content": "so 5"}]
    as_texts = rewards_of_trl(PROMPTS, COMPLETIONS)
    for kind, expected in rewards_of_trl(prompts, completions).items():
        classifier = SequenceClassifier(str(classifiers[kind]), device="cpu")
        assert classifier(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-4), kind
        assert expected != pytest.approx(as_texts[kind], abs=1e-2)


def test_in_a_scorer(classifiers):
    classifier = SequenceClassifier(str(classifiers["bert"]), device="cpu")
    scores = scorer_of(classifier).score(
        Inputs(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 5, columns={"answer": [1] * 5})
    )
    assert scores.by_function == {"bert": classifier(prompts=PROMPTS, completions=COMPLETIONS)}


# ------------------------------------------------------------------------------------------ the object


@pytest.mark.parametrize(
    ("model_id", "name"), [("org/helpful-rm", "helpful-rm"), ("models/rm/", "rm"), ("/abs/rm", "rm"), ("rm", "rm")]
)
def test_the_name_is_the_last_part_of_the_id(model_id, name):
    assert SequenceClassifier(model_id).__name__ == name


def test_it_is_loaded_when_it_is_called(tmp_path, classifiers):
    classifier = SequenceClassifier(str(tmp_path / "later"), device="cpu")
    make_classifier(tmp_path / "later", "Bert")
    assert len(classifier(prompts=["p"], completions=["c"])) == 1


def test_nothing_is_left_to_train(classifiers):
    import torch

    classifier = SequenceClassifier(str(classifiers["bert"]), device="cpu")
    rewards = [classifier(prompts=["p"], completions=["c"]) for _ in range(2)]
    assert rewards[0] == rewards[1]  # dropout would make them differ
    assert classifier._loaded is not None
    model, _ = classifier._loaded
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_it_is_pickled_without_its_weights(classifiers):
    classifier = SequenceClassifier(str(classifiers["llama"]), device="cpu", batch_size=2)
    rewards = classifier(prompts=PROMPTS, completions=COMPLETIONS)
    data = cloudpickle.dumps(classifier)
    assert len(data) < 1000
    copy = cloudpickle.loads(data)
    assert (copy.__name__, copy(prompts=PROMPTS, completions=COMPLETIONS)) == ("llama", rewards)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("kind", "labels"), [("two labels", 2), ("three labels", 3)])
def test_more_than_one_label_is_an_error(classifiers, kind, labels):
    with pytest.raises(ValueError, match=rf"is not a reward model: its .* has {labels} labels instead of one"):
        SequenceClassifier(str(classifiers[kind]), device="cpu")(prompts=["p"], completions=["c"])


def test_a_language_model_is_an_error(tiny_model_path):
    with pytest.raises(ValueError, match=r"is not a sequence classifier: its score\.weight would be random"):
        SequenceClassifier(str(tiny_model_path("llama")), device="cpu")(prompts=["p"], completions=["c"])


def test_a_text_that_is_too_long_is_an_error(tmp_path):
    folder = make_classifier(tmp_path / "short", "Bert")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(folder)
    classifier = SequenceClassifier(str(folder), device="cpu")
    assert len(classifier(prompts=["p" * 10], completions=["c" * 10])) == 1
    with pytest.raises(ValueError, match="short accepts 20 tokens, but prompt and completion have 21"):
        classifier(prompts=["p" * 10], completions=["c" * 11])


def test_a_batch_size_below_one_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        SequenceClassifier("rm", batch_size=0)


def test_conversations_need_a_chat_template(tmp_path):
    folder = make_classifier(tmp_path / "plain", "Bert")
    (folder / "chat_template.jinja").unlink()
    prompts, completions = as_messages("user", ["p"]), as_messages("assistant", ["c"])
    with pytest.raises(ValueError, match="chat_template"):
        SequenceClassifier(str(folder), device="cpu")(prompts=prompts, completions=completions)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert len(SequenceClassifier(str(folder), device="cpu")(prompts=prompts, completions=completions)) == 1


# ------------------------------------------------------------------------------------------ a loaded model


def load(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, as a script loads it, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "llama without pad", "bert"])
def test_a_loaded_model_gives_the_same_rewards_as_its_folder(classifiers, kind):
    model, tokenizer = load(classifiers[kind])
    model.train()
    expected = SequenceClassifier(str(classifiers[kind]), device="cpu")(prompts=PROMPTS, completions=COMPLETIONS)
    for given in (tokenizer, None):
        classifier = SequenceClassifier(model, tokenizer=given, device="cpu")
        assert classifier.__name__ == classifiers[kind].name
        assert classifier(prompts=PROMPTS, completions=COMPLETIONS) == expected


def test_a_loaded_model_is_scored_with_the_tokenizer_that_is_passed(classifiers):
    model, tokenizer = load(classifiers["bert"])
    tokenizer.chat_template = "{{ messages[-1].content }}"
    prompts, completions = as_messages("user", PROMPTS), as_messages("assistant", [*COMPLETIONS[:3], "x", "y"])
    classifier = SequenceClassifier(model, tokenizer=tokenizer, device="cpu")
    without_prompts = classifier(prompts=[""] * 5, completions=[row[-1]["content"] for row in completions])
    assert classifier(prompts=prompts, completions=completions) == without_prompts


def test_a_loaded_model_is_pickled_with_its_weights(classifiers):
    import torch

    model, tokenizer = load(classifiers["llama"])
    with torch.no_grad():
        model.score.weight.mul_(3)
    classifier = SequenceClassifier(model, tokenizer=tokenizer, device="cpu")
    rewards = classifier(prompts=PROMPTS, completions=COMPLETIONS)
    copy = cloudpickle.loads(cloudpickle.dumps(classifier))
    assert (copy.__name__, copy(prompts=PROMPTS, completions=COMPLETIONS)) == ("llama", rewards)


def test_a_loaded_model_needs_one_label_and_a_tokenizer(classifiers, tiny_model_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(classifiers["three labels"])
    with pytest.raises(ValueError, match="is not a reward model: it is a BertForSequenceClassification with 3 labels instead"):
        SequenceClassifier(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="is not a reward model: it is a LlamaForCausalLM with 2 labels instead of one"):
        SequenceClassifier(AutoModelForCausalLM.from_pretrained(tiny_model_path("llama")), tokenizer=tokenizer)
    model, _ = load(classifiers["bert"])
    new = type(model)(model.config)
    new.name_or_path = ""
    with pytest.raises(ValueError, match="BertForSequenceClassification has no name to load its tokenizer by: pass"):
        SequenceClassifier(new)
