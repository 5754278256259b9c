"""`checkpoint: hf:FOLDER`: the folder's flags, its tokenizer, and a stage that converts it."""

import shutil
from pathlib import Path

import pytest
import yaml
from chat_templates import FAMILIES, chat, load_tokenizer, write_tokenizer
from method_rows import document
from tiny_models import write_model

from ramoe_megatron.data.encode import encode
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.convert import copy_others
from ramoe_megatron.recipe.load import load_recipe
from ramoe_megatron.recipe.plan import make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data as the recipe names them."""
    folder = tmp_path_factory.mktemp("hugging-face")
    write_model("mixtral", folder / "model")
    for name in ("parallel.jsonl", "general.jsonl", "tokenizer.model"):
        (folder / name).touch()
    return folder


def recipe(folder: Path, **changes: object) -> Path:
    raw = document(folder, "one")
    del raw["model"], raw["tokenizer"]
    raw |= {"checkpoint": "hf:model", "methods": ["sft"], **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_folder_gives_flags_and_tokenizer_unless_the_recipe_does(folder: Path) -> None:
    found = load_recipe(recipe(folder, model={"max-position-embeddings": 32}))
    assert found.checkpoint == f"hf:{folder / 'model'}"
    assert found.model["num-experts"] == 8
    assert found.model["max-position-embeddings"] == 32
    assert found.tokenizer == {
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": str(folder / "model"),
    }
    assert load_recipe(recipe(folder, tokenizer={"tokenizer-type": "NullTokenizer"})).tokenizer == {
        "tokenizer-type": "NullTokenizer"
    }


def test_a_stage_converts_the_folder_before_anything_reads_it(folder: Path, tmp_path: Path) -> None:
    stages = make_plan(load_recipe(recipe(folder)), tmp_path / "run", folder)
    first, then = stages[:2]
    base = tmp_path / "run/checkpoints/base"
    assert first.command == ("ramoe_megatron.cli", "convert", str(folder / "model"), "--out", str(base))
    assert (first.name, first.ranks, first.outputs) == ("convert", 0, (base,))
    assert then.name == "taxonomy"
    assert base in then.inputs
    assert then.command[then.command.index("--load") + 1] == str(base)
    write_model("mixtral", folder / "model", max_shard_size="100KB")
    (folder / "model/model.safetensors").unlink(missing_ok=True)
    again = make_plan(load_recipe(recipe(folder)), tmp_path / "run", folder)[0]
    assert again.settings != first.settings, "another folder is converted anew"


def test_the_jobs_write_chats_with_the_template_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """`checkpoint` is the only key: the stages' flags make the tokenizer with its own template and tokens.

    The folder that the conversion writes has them too.
    """
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    write_tokenizer(model, FAMILIES["phi-3.5"])
    stages = make_plan(load_recipe(recipe(folder, checkpoint=f"hf:{model}")), tmp_path / "run", folder)
    (words,) = [stage.command for stage in stages if stage.name == "taxonomy"]
    assert "--chat-template" not in words
    copy_others(model, tmp_path / "converted")
    named = words[words.index("--tokenizer-model") + 1]
    assert words[words.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"
    asked = chat("EUR", "Which ?")
    for place in (named, tmp_path / "converted"):
        tokenizer = load_tokenizer(Path(place))
        assert tokenizer.chat_template == FAMILIES["phi-3.5"].template
        last = encode(asked, tokenizer).ids[-1:]
        assert tokenizer.detokenize(last).strip() == FAMILIES["phi-3.5"].end != FAMILIES["phi-3.5"].eos


def test_an_absent_folder_is_refused(folder: Path) -> None:
    with pytest.raises(RamoeError, match="absent is a folder neither in"):
        load_recipe(recipe(folder, checkpoint="hf:absent"))
