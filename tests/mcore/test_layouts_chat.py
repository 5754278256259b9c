"""Conversations on real Megatron: learned answers are scored right; a rejecting template ends the job."""

import json
from pathlib import Path

import pytest
from chat_rows import LEARNED, QUESTIONS
from small_run import outcome


@pytest.mark.parametrize("name", LEARNED)
def test_a_model_that_learned_the_conversations_answers_all_of_them(layouts: Path, name: str) -> None:
    outcome(layouts, f"train-{name}")
    outcome(layouts, f"evaluate-{name}")
    rows = json.loads((layouts / f"answers-{name}/{name}.json").read_text())["rows"]
    assert {row["language"]: (row["n"], row["correct"]) for row in rows} == dict.fromkeys(
        ("ar", "en"), (len(QUESTIONS),) * 2
    )


@pytest.mark.parametrize("job", ["chat-refused", "chat-refused-offline"])
def test_a_template_that_refuses_the_data_is_told_before_a_model_is_built(layouts: Path, job: str) -> None:
    """The offline job has no checkpoint either: that would be the next error."""
    error = json.loads((layouts / f"{job}.json").read_text())["error"]
    for words in (
        "id 'one', language 'en'",
        "roles system, user",
        "System role not supported",
        "--chat-template",
    ):
        assert words in error
    assert not list(layouts.glob(f"{job}.[0-9].safetensors")), "no model was built"
