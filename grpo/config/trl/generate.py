"""Writes what is generated from the table of TRL's names and the sections: the types of `GRPOConfig`, and docs/trl.md.

    python -m rankup.grpo.config.trl.generate

Run it from the root of the repository after a change of an option or of `fields.py`; tests hold both files current.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from ....rewards.config import RewardFunction
from ....section import Section
from ..data import EvalSet
from ..run_config import GRPOConfig, known_keys
from .field import Kind, TrlField
from .fields import ALIASES, ALL_NAMES, FIELDS, NONE_IS_UNSET, OLDER_NAMES, OTHER_NAMES, TEXT_FOR_SECTIONS, TRL_VERSION
from .peft_fields import PEFT_FIELDS, PEFT_VERSION
from .trainer_arguments import TRAINER_ARGUMENTS

TYPES_FILE = Path("grpo/config/trl/arguments.py")
PAGE = Path("docs/trl.md")

ALSO_ACCEPTED = {
    "stop": "str",
    "functions": "str | dict[str, Any]",
    "eval_functions": "dict[str, str | dict[str, Any]]",
    "profile_steps": "int",
    "report_to": "str",
    "scale_rewards": "bool",
    "mode": "bool",
    "init_lora_weights": "bool",
    "warmup_steps": "float",
    "eval_steps": "float",
    "save_steps": "float",
    "lr_scheduler_kwargs": "str",
    "chat_template_kwargs": "str",
    "generation_kwargs": "dict[str, Any] | str",
    "run_name": "None",
    "output_dir": "None",
    "on_error": "str",
    "logging_steps": "float",
}
"""Types that the check of an option accepts in addition to its own."""

TYPES_HEADER = '''"""The keyword arguments of `GRPOConfig`, for editors and type checkers: sections, flat names, names of TRL.

Generated: `python -m rankup.grpo.config.trl.generate`. Do not edit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

from ....rewards.config import RewardFunction, RewardsConfig
from ....rollout.config import RolloutConfig
from ....rollout.generation_kwargs import GenerationKwargs
'''

SCRIPTS_HEADER = """# Scripts written for TRL

Change the import, or change nothing:

```python
from rankup import GRPOConfig, GRPOTrainer  # instead of: from trl import GRPOConfig, GRPOTrainer
```

```bash
rankup trl train_grpo.py                    # the unchanged script; everything after its name is the script's, --help too
```

`rankup trl` replaces `GRPOConfig` and `GRPOTrainer` in `trl`, `trl.trainer` and the modules that define them. Reward functions,
`SFTTrainer` and all other names stay TRL's. It needs TRL to be installed; the changed import does not. For example, with this
script as `train_grpo.py`:

```python
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

numbers = [(a, b) for a in range(1, 10) for b in range(1, 10)]
dataset = Dataset.from_list([{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in numbers])


def correct(completions, answer, **kwargs):
    return [float(expected in completion) for completion, expected in zip(completions, answer)]


trainer = GRPOTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    reward_funcs=correct,
    args=GRPOConfig(
        output_dir="runs/sums",
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=32,
        max_steps=100,
        learning_rate=1e-4,
        use_vllm=True,
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model("sums")
print(trainer.state.log_history[-1]["train_loss"])
```

**What is trained.** Always a LoRA adapter, also where TRL would train the complete model; `save_model` writes it in PEFT's
format. `rankup export --merge` makes a plain model of it.

**What samples.** `use_vllm=True` is `rollout.engine=vllm`; `use_vllm=False` is `rollout.engine=torch`, the trainer's own
forward: slower, but without vLLM. A script that does not set it gets the default here, vLLM.

**Command lines.** Scripts that parse theirs with `TrlParser` or `HfArgumentParser` run with `rankup trl` only. Options that
neither the command line nor the file of `--config` names have the defaults of this package. TRL's own `trl/scripts/grpo.py`
runs too.

**Reading and changing options.** With `rankup trl` a script can read every field of TRL from its configuration, and set fields
until a trainer has read them. A dataclass derived from `GRPOConfig` may add fields, no methods. With the changed import the
configuration is frozen.

**The trainer.** Besides `train`, `evaluate`, `save_model`, `push_to_hub`, `log`, callbacks and `state`, it has `log_metrics`,
`save_metrics`, `save_state`, `accelerator` (`print`, `is_main_process`, ...), `is_world_process_zero` and `end`. A subclass
that overrides what TRL calls while it trains, such as `compute_loss`, is an error: it would never be called here.

**Log entries.** `state.log_history` has an entry for each step, whatever `logging_steps` is, with TRL's names. `step_time` is
`time/<phase>` here, `total_flos` does not exist, and `clip_ratio/...` needs `num_iterations` above 1.
"""

PAGE_HEADER = """## The configuration

`GRPOConfig` accepts every field of TRL {version}, next to the [options](options.md) of this package: as flat names in Python,
in run files and in overrides. An option that is set twice, by its name here and by TRL's, is an error. Numbers may be text
(`"1e-6"`).

```python
GRPOConfig(output_dir="runs/mine", per_device_train_batch_size=8, gradient_accumulation_steps=4, num_train_epochs=1,
           learning_rate=1e-5, lr_scheduler_type="cosine", warmup_ratio=0.1, bf16=True, use_vllm=True, beta=0.04)
```

This page is generated: `python -m rankup.grpo.config.trl.generate`. Of the {total} fields, {mapped} are mapped, {other} are
mapped and have TRL's default under the rule below, {moot} have no effect here, and {refused} are refused: their values
other than TRL's default are an error that says what to do instead.

## Defaults

**Amounts are TRL's, stability is ours.** A script that names a field of the batch (`per_device_train_batch_size`,
`gradient_accumulation_steps`, `steps_per_generation` or `generation_batch_size`) relies on TRL's other amounts: for those
that it does not name, TRL's defaults apply (the table [below](#mapped-with-trls-default)). A script that names none of them
gets `optim.prompts_per_step` and the other defaults of this package.

All other defaults are those of this package, also in such a script: what keeps a LoRA of rank 64 stable (learning rate,
schedule, upper clip, importance weights, guards), and what only concerns memory, display and checkpoints. The table of
mapped fields has both defaults.

## Batch

TRL samples a generation of `per_device_train_batch_size * processes * steps_per_generation` completions at once, goes over
it `num_iterations` times in passes of `per_device_train_batch_size` completions, and updates the policy after every
`gradient_accumulation_steps` passes. `cluster.workers` is the number of processes. A step of this package samples the
prompts of one update (`optim.prompts_per_step`), and updates the policy `algorithm.num_iterations` times on all of its
completions:

| TRL | here |
|---|---|
| an update has passed over one complete generation | a step is a generation; `num_iterations` is kept |
| over several generations (`gradient_accumulation_steps` is a multiple) | a step has the prompts of all of them |
| over a part of a generation (`steps_per_generation` above `gradient_accumulation_steps`) | an error |

TRL's errors for values that do not divide are errors here too. A run with such a batch prints its step once:

    a step: 4 prompts x 8 completions = 32, 1 optimizer step on them; 120 steps in all

How many tokens a forward pass has is independent of all this: `optim.tokens_per_pack`.

## Steps

With a field of the batch, `max_steps`, `eval_steps`, `save_steps`, `logging_steps` and `warmup_steps` count optimizer
steps, as in TRL. They differ from steps of this package with `num_iterations` above 1 only, and are divided by it, rounded
up. Values below 1 are shares of the run. `num_train_epochs` and the strategy `epoch` become steps once the data is loaded:
an epoch is `rows / optim.prompts_per_step` steps, and an incomplete batch at its end is filled with rows of the next epoch,
where TRL drops it.

## Data sets

`train_dataset` and `eval_dataset` are those of TRL: a `datasets.Dataset`, an `IterableDataset` (for training with `max_steps`,
not `num_train_epochs`), and for evaluation also a dictionary of data sets, each of which is evaluated under its name.
[data.md](data.md) has the details, and the metrics of an evaluation.
"""

ARGUMENTS_HEADER = """## Arguments of GRPOTrainer

`from rankup import GRPOTrainer` takes the place of TRL's. Its arguments may be the same objects:

{arguments}
**Model objects.** Training reads the model from a folder. If `model` is unchanged since it was loaded, that is the folder (or
the cached files of the Hub) that it came from; nothing is written. Otherwise it is saved once into the cache
(`~/.cache/rankup`, or `$XDG_CACHE_HOME/rankup`), under a name with a hash of its content: the same object has the same
folder, also in a resumed run, and nothing there is deleted. On several machines the cache must be on a shared disk.
The weights' dtype becomes `model.dtype`, unless that is set. The object itself is not trained: the trained model is
`trainer.model`. A model that bitsandbytes quantized to NF4 is read from its original files again and rounded here; other
quantizations are errors.

**A PeftModel.** Its base model is treated like that, and its active adapter is saved into the cache and becomes
`lora.start_from`. Adapters other than LoRA, merged or disabled ones, and a `peft_config` in addition are errors.

**Tokenizers.** A `processing_class` that encodes and decodes like the model's tokenizer changes nothing; the padding side and
token do not matter, as nothing is padded. Another one is saved into the cache and becomes `model.tokenizer`.

**Quantization.** Weights are rounded to the same values of NF4 as by bitsandbytes, but without double quantization, and
`model.dtype` is the dtype of all products, whatever `bnb_4bit_compute_dtype` says.

### peft_config

The fields of `LoraConfig` in PEFT {peft}. What PEFT sets by default (`r=8`, `lora_alpha=8`) counts, not the defaults of this
package. An option of `lora` that the configuration sets to another value is an error.

{fields}"""


def types_module() -> str:
    """The text of `arguments.py`."""
    keys, fields = known_keys(), GRPOConfig.model_fields
    sections = {name: cast(type[Section], fields[name].annotation) for name in keys.sections}
    elsewhere = ("rewards", "rollout")
    modules: dict[str, list[str]] = {}
    for name, section in sections.items():
        if name not in elsewhere:
            modules.setdefault(section.__module__.rpartition(".")[2], []).append(section.__name__)
    modules["data"].append(EvalSet.__name__)
    imports = "".join(f"from ..{module} import {', '.join(sorted(names))}\n" for module, names in sorted(modules.items()))
    lines = [_line(name, f"{section.__name__} | dict[str, Any]" + (" | str" if name in TEXT_FOR_SECTIONS else ""))
             for name, section in sections.items()]  # fmt: skip
    lines += [_line(name, _type(name, fields[name])) for name in keys.top_level]
    options = {f"{section}.{name}": field for section, cls in sections.items() for name, field in cls.model_fields.items()}
    flat = {dotted.partition(".")[2]: field for dotted, field in options.items()}
    lines += [_line(name, _type(name, field)) for name, field in flat.items()]
    for name, field in ALL_NAMES.items():
        if name not in flat and name not in fields:
            lines.append(_line(name, _type_of_trl(name, field, options)))
    text = "Names of TRL stand at the end, without those that are the same here. A value of None is that of no value."
    return f'{TYPES_HEADER}{imports}\n\nclass Arguments(TypedDict, total=False):\n    """{text}"""\n\n' + "".join(lines)


def _type_of_trl(name: str, field: TrlField, options: dict[str, FieldInfo]) -> str:
    """The type of our option if the value is simply its value, else TRL's."""
    option = options.get(field.to[0]) if field.kind == "mapped" and not field.converts else None
    if option is None:
        return _union([field.type, ALSO_ACCEPTED.get(name, "")])
    return _union([_type(name, option), "None" if name in NONE_IS_UNSET or "None" in field.type else ""])


def _type(name: str, field: FieldInfo) -> str:
    """The annotation of an option in source form, with what else its check accepts."""
    can_be_none = field.default is None or name in NONE_IS_UNSET
    return _union([*_source(field.annotation), ALSO_ACCEPTED.get(name, ""), "None" if can_be_none else ""])


def _source(annotation: Any) -> Iterator[str]:
    """The members of the union in an annotation, as Python writes them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _source(arguments[0])
    elif origin is Literal:
        yield f"Literal[{', '.join(_quoted(argument) for argument in arguments)}]"
    elif origin in (list, dict):
        yield f"{origin.__name__}[{', '.join(_union(list(_source(argument))) for argument in arguments)}]"
    elif origin is Callable:
        yield "Callable[..., Any]"
    elif arguments:
        for argument in arguments:
            yield from _source(argument)
    elif annotation is Path:
        yield from ("str", "Path")
    elif annotation in (RewardFunction, EvalSet):
        yield from (annotation.__name__, "dict[str, Any]")
    else:
        yield {NoneType: "None", Any: "Any"}.get(annotation) or annotation.__name__


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _union(parts: list[str]) -> str:
    found = dict.fromkeys(part for parts_of in parts for part in _members(parts_of) if part)
    return " | ".join([part for part in found if part != "None"] + ["None"] * ("None" in found))


def _members(union: str) -> list[str]:
    """The types of a union in source form: what ` | ` outside of all brackets separates."""
    members, depth = [""], 0
    for part in re.split(r"( \| |[\[\]])", union):
        depth += {"[": 1, "]": -1}.get(part, 0)
        if part == " | " and depth == 0:
            members.append("")
        else:
            members[-1] += part
    return members


def _line(name: str, type: str) -> str:
    line = f"    {name}: {type}\n"
    if len(line) <= 129:
        return line
    opening, _, values = type.removesuffix("]").partition("[")  # a Literal
    return f"    {name}: {opening}[\n" + "".join(f"        {value},\n" for value in values.split(", ")) + "    ]\n"


def page() -> str:
    """The text of docs/trl.md."""
    counts = {kind: sum(field.kind == kind for field in FIELDS.values()) for kind in ("mapped", "other default", "no effect")}
    header = PAGE_HEADER.format(
        version=TRL_VERSION,
        total=len(FIELDS),
        mapped=counts["mapped"],
        other=counts["other default"],
        moot=counts["no effect"],
        refused=sum(field.kind == "refused" for field in FIELDS.values()),
    )
    titles: dict[Kind, str] = {
        "other default": "Mapped, with TRL's default",
        "mapped": "Mapped",
        "refused": "Refused",
        "no effect": "Without effect",
    }
    parts = [SCRIPTS_HEADER, header, _arguments()]
    for kind, title in titles.items():
        parts.append(f"## {title}\n\n{_table({name: field for name, field in FIELDS.items() if field.kind == kind}, kind)}")
    aliases = ", ".join(f"`{old}` ({new})" for old, new in ALIASES.items())
    others = {name: field for name, field in {**OTHER_NAMES, **OLDER_NAMES}.items() if field.kind == "mapped"}
    silent = ", ".join(f"`{name}`" for name, field in OLDER_NAMES.items() if field.kind == "no effect")
    parts.append(
        f"## Other names\n\nNames of TRL's `ModelConfig` and `ScriptArguments`, and of earlier versions:\n\n"
        f"{_table(others, 'mapped')}\nWithout effect: {silent}. Renamed in TRL: {aliases}.\n"
    )
    return "\n".join(parts)


def _arguments() -> str:
    """The section about the arguments of `GRPOTrainer`."""
    arguments = ["| argument | here |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in TRAINER_ARGUMENTS.items())]
    rows = ["| PEFT | default | here | note |", "|---|---|---|---|"]
    for name, field in PEFT_FIELDS.items():
        here = ", ".join(f"`{to}`" for to in field.to) or field.kind
        rows.append(f"| `{name}` | {_shown(field.default)} | {here} | {field.note} |")
    return ARGUMENTS_HEADER.format(
        arguments="\n".join(arguments) + "\n", peft=PEFT_VERSION, fields="\n".join(rows) + "\n"
    )


def _table(fields: dict[str, TrlField], kind: Kind) -> str:
    is_mapped = kind in ("mapped", "other default")
    columns = ["TRL", "default", *(["here", "default here"] if is_mapped else []), "note"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, field in fields.items():
        here = [", ".join(f"`{to}`" for to in field.to), _default_here(field)] if is_mapped else []
        cells = [f"`{name}`", _shown(field.default), *here, field.note]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _default_here(field: TrlField) -> str:
    """The default of the first option that the field sets; empty for a switch that is no option."""
    section, _, name = field.to[0].partition(".")
    owner = getattr(GRPOConfig(), section)
    return "" if name and name not in type(owner).model_fields else _shown(getattr(owner, name) if name else owner)


def _shown(value: object) -> str:
    if value is None or isinstance(value, Section):
        return "None"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    TYPES_FILE.write_text(types_module(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
