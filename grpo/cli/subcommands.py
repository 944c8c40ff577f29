"""The commands of `rankup` that have their own modules."""

from __future__ import annotations

from typing import Any

from .chat.chat import add_chat_command
from .doctor.doctor import add_doctor_command
from .eval.command import add_eval_command
from .eval.compare import add_compare_command
from .export.export import add_export_command
from .plan.plan import add_plan_command
from .report.report import add_report_command
from .reward import add_reward_commands
from .trl.trl import add_trl_command


def add_subcommands(commands: Any) -> None:
    """Add them to the subcommands of a parser (what `add_subparsers` returns)."""
    add_eval_command(commands)
    add_compare_command(commands)
    add_chat_command(commands)
    add_report_command(commands)
    add_doctor_command(commands)
    add_export_command(commands)
    add_plan_command(commands)
    add_reward_commands(commands)
    add_trl_command(commands)
