"""`ArrowTexts`: texts in one buffer are the texts, and each is found at its first place."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.texts import ArrowTexts

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=12)


@given(TEXTS)
def test_the_texts_come_back(texts: list[str]) -> None:
    found = ArrowTexts.of(texts)
    assert len(found) == len(texts)
    assert [found[place] for place in range(len(texts))] == texts
    assert found[:] == tuple(texts)


@given(TEXTS, TEXTS)
def test_each_text_is_found_at_its_first_place(texts: list[str], sought: list[str]) -> None:
    expected = [texts.index(text) if text in texts else -1 for text in sought]
    assert ArrowTexts.of(texts).find(sought).tolist() == expected
    assert ArrowTexts.of(texts).find(ArrowTexts.of(sought)).tolist() == expected


def test_no_rank_waits_for_the_import_of_pandas() -> None:
    code = (
        "import sys; from ramoe_megatron.artifacts.texts import ArrowTexts; "
        "ArrowTexts.of(['a']).find(['a', 'b']); print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
